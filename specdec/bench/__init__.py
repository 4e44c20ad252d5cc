"""The harness of `specdec bench`: equality first, then time, in interleaved repeats with the peers in one process.

suite.py: the prompts. methods.py, sweeps.py: the decoding methods. measure.py: the check and the clock. latency.py,
stages.py, memory.py, roofline.py: measurements besides total time. spec_bench.py: Spec-Bench's answer files. run.py: a
whole run. report/: statistics.py: medians and their intervals; record.py: the JSON record; tables.py, plots.py
(drawing.py), page.py: the record as Markdown, plots and one HTML page; compare.py: comparison of two records.
"""
