#!/usr/bin/env bash
# diffusers 0.42.1's UniPCMultistepScheduler, set up as WanPipeline's (flow_shift 12, 40 steps), calls the network at other times than
# Wan2.2's own sampler (wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler, shift 12): 19 of 40 differ. diffusers spaces
# u = 1 ... 0.001, Wan u = 0.999 ... 0, both cut the last; most of the difference is at the low-noise end: the last call is at 242 of
# 1000 instead of 235. So a LoRA's edits in diffusers and in Wan's code are made by two schedules under one name.
#
# Seen:
#   differ: 19 of 40
#   diffusers, last five: [633, 573, 496, 391, 242]
#   Wan's,     last five: [631, 571, 492, 386, 235]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import numpy as np
from diffusers import UniPCMultistepScheduler

steps, shift = 40, 12.0
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
scheduler.set_timesteps(steps)
theirs = scheduler.timesteps.tolist()
# Wan's own formula: sigma_max = 0.999 and sigma_min = 0 in float32, equal steps, then the shift, cut to whole thousandths.
u = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
own = (shift * u / (1 + (shift - 1) * u) * 1000).astype(np.int64).tolist()
differ = sum(a != b for a, b in zip(theirs, own))
print(f"differ: {differ} of {steps}")
print("diffusers, last five:", theirs[-5:])
print("Wan's,     last five:", own[-5:])
assert differ == 19 and theirs[-1] == 242 and own[-1] == 235, "this has changed"
PYTHON
