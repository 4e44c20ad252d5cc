"""The rows of a batch: where they stand, what they hold, what a step reports of them."""
