"""The harness behind `specdec bench`: equality first, then time, in interleaved repeats with the peers in one process.

suite.py: what is decoded. methods.py, sweeps.py: by whom. measure.py: the check and the clock. latency.py, stages.py,
memory.py, roofline.py: what is seen beside the clock. statistics.py: medians and their intervals. record.py: the JSON
record. tables.py, plots.py (drawing.py), page.py: the record as Markdown, plots and one HTML page. compare.py: two of
them. spec_bench.py: Spec-Bench's answer files. run.py puts all together.
"""
