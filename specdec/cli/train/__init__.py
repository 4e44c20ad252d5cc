"""`specdec train`: one file per recipe."""
