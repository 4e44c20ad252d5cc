"""From the scores of the target and a draft to committed tokens."""
