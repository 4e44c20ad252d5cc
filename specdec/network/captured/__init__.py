"""Captured steps and prompts of a network: CUDA graphs, replayed by one launch, and what they cost."""
