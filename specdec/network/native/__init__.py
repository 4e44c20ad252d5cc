"""A decode step's layers as one native operation on a CPU, compiled once for the machine."""
