"""Length policies: how many tokens to draft, decided anew for every row and step."""
