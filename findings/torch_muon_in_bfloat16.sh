#!/usr/bin/env bash
# torch.optim.Muon (torch 2.13.0) makes its update in bfloat16 whatever its weights are: every product of a step over float32 weights is one
# of bfloat16 matrices, and nothing of the constructor changes that. On a CPU without instructions for bfloat16 (AVX2 alone) a step over 184
# LoRA matrices of a small network took 0.48 s, the same five iterations in float32 0.04 s: a third of the run it was seen in.
#
# Seen:
#   products of a step over one float32 matrix: 15, of bfloat16: 15
#   seconds a step over 184 matrices, bfloat16 over float32: 24.7 without such instructions, one thread; not checked
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm")


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


weight = torch.nn.Parameter(torch.randn(64, 256))
weight.grad = torch.randn(64, 256)
optimizer = torch.optim.Muon([weight], lr=1e-3)
with Products() as seen:
    optimizer.step()
rounded = sum(dtype == torch.bfloat16 for dtype in seen.dtypes)
print(f"products of a step over one float32 matrix: {len(seen.dtypes)}, of bfloat16: {rounded}")

many = [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(184)]
for p in many:
    p.grad = torch.randn(64, 256)
optimizer = torch.optim.Muon(many, lr=1e-3)
optimizer.step()
started = time.perf_counter()
optimizer.step()
bfloat16 = time.perf_counter() - started
started = time.perf_counter()
for p in many:
    x = p.grad / p.grad.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
print(f"seconds a step over 184 matrices, bfloat16 over float32: {bfloat16 / (time.perf_counter() - started):.1f}")
assert weight.dtype == torch.float32 and len(seen.dtypes) == rounded == 15, "this has changed"
PYTHON
