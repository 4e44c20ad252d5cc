"""Files that outlive a run: checkpoints and prompts in, trained parts and results out."""
