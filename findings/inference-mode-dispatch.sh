#!/usr/bin/env bash
# torch 2.13.0 on a CPU: what a TorchDispatchMode sees depends on the mode around it.
#
# Expected: a dispatch mode stands below autograd, so it sees the same operations in no_grad and in inference_mode.
# Seen: in no_grad, linear arrives as view, t and addmm, softmax as _softmax, matmul as bmm. In inference_mode the whole
# functions arrive, aten::linear, aten::softmax and aten::matmul, and what they consist of never does. A mode that looks
# for products or replaces them by name finds none of them there.
#
# Output seen:
#   linear: no_grad view, t, addmm, view; inference_mode linear
#   softmax: no_grad _softmax; inference_mode softmax
#   matmul: no_grad transpose, expand, view, expand, view, bmm, _unsafe_view; inference_mode transpose, matmul
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def names(call, mode):
    with mode(), Names() as found:
        call()
    return found.seen


x, layer = torch.randn(2, 3, 8), torch.nn.Linear(8, 4)
calls = {"linear": lambda: layer(x), "softmax": lambda: F.softmax(x, -1), "matmul": lambda: x @ x.transpose(1, 2)}
for name, call in calls.items():
    plain, inference = names(call, torch.no_grad), names(call, torch.inference_mode)
    print(f"{name}: no_grad {', '.join(plain)}; inference_mode {', '.join(inference)}")
    assert name in inference and name not in plain, (name, plain, inference)
print("torch", torch.__version__)
PYTHON
