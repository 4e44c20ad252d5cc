"""A memory of finished texts, searched for what followed the newest tokens of a text."""
