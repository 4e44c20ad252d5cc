"""Records of a run: statistics, tables, plots, the page, comparisons."""
