"""Limits that several rooms share, each named once. Kernels keep their own; a test pins that they agree."""

MAX_DRAFT_TOKENS = 32  # of one row in one step
MAX_STEP_WIDTH = MAX_DRAFT_TOKENS + 1  # columns of a row in one verify forward: the newest token and its draft
MAX_COLUMNS = 64  # of a row in one forward whose columns a 64-bit mask tells apart, as a tree's and branches'
