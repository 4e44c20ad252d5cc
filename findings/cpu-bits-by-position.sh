#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the bits of a result depend on where an element lies, and on the number of threads.
#
# Expected: element-wise functions give an element the same bits wherever it lies, as one thread computes them all; the
# sum over a row has the same bits alone and in a batch.
# Seen: in one thread, sigmoid, silu and gelu give up to a fifth of 1000 elements other bits in a tensor than alone (what
# fills a vector register is computed by other code than the rest), while exp, tanh, log and erf do not. With two threads,
# most sums over a row of 40001 numbers differ from those in a batch of 64 rows, with one thread none does. So a batch of
# one and a batch of many may decode other tokens even in float32.
#
# Output seen on a processor with AVX-512:
#   1 thread: elements of 1000 that differ: exp 0, tanh 0, log 0, erf 0, sigmoid 39, silu 42, gelu 197
#   rows of 64 whose sum differs: 1 thread 0, 2 threads 47
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(1000)
same, other = (torch.exp, torch.tanh, torch.log, torch.erf), (torch.sigmoid, F.silu, F.gelu)
counts = {}
for function in (*same, *other):
    inputs = x.abs() + 0.1 if function is torch.log else x
    alone = torch.cat([function(inputs[i : i + 1]) for i in range(len(inputs))])
    counts[function.__name__] = int((alone != function(inputs)).sum())
print("1 thread: elements of 1000 that differ:", ", ".join(f"{name} {count}" for name, count in counts.items()))
assert all(counts[function.__name__] for function in other), counts

rows, found = torch.randn(64, 40001), {}
for threads in (1, 2):
    torch.set_num_threads(threads)
    alone = torch.cat([row[None].sum(-1) for row in rows])
    found[threads] = int((alone != rows.sum(-1)).sum())
print(f"rows of 64 whose sum differs: 1 thread {found[1]}, 2 threads {found[2]}")
assert found[1] == 0 and found[2] > 0, found
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
PYTHON
