"""The rows of a batch: their slots, their tokens, and the reports of steps."""
