"""`specdec check`: equality, matrices, sampling, outputs of other engines."""
