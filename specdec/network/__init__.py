"""A causal language model over a ragged cache, and which of its forms serves a given model."""
