#!/usr/bin/env bash
# accelerate 1.15.0 with DeepSpeed 0.19.8 on a machine without an accelerator: `accelerate launch --use_deepspeed` starts two processes, and
# `Accelerator(cpu=True)` in them takes no notice of the configuration: prepare() gives DistributedDataParallel and a plain optimizer, and
# neither ZeRO-3 nor the file's clipping of 0.25 is in force. DeepSpeed itself runs ZeRO-3 on CPUs over gloo.
#
# Seen, on each of two processes: MULTI_CPU, DistributedDataParallel, no deepspeed plugin
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6 setuptools
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet deepspeed==0.19.8
cat > "$place/script.py" <<'PYTHON'
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
network = torch.nn.Linear(2, 2)
network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.1))
plugin = "a deepspeed plugin" if accelerator.state.deepspeed_plugin else "no deepspeed plugin"
print(f"seen: {accelerator.distributed_type.value}, {type(network).__name__}, {plugin}\n", end="", flush=True)
PYTHON
cat > "$place/ds.json" <<'JSON'
{"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.25}
JSON
cd "$place"
export CUDA_VISIBLE_DEVICES="" HF_HOME="$place/home" PATH="$place/venv/bin:$PATH"
accelerate launch --use_deepspeed --deepspeed_config_file ds.json --num_processes 2 --num_machines 1 script.py 2> errors | tee output
[ "$(grep -o 'seen: .*' output)" = "$(printf 'seen: MULTI_CPU, DistributedDataParallel, no deepspeed plugin\n%.0s' 1 2)" ]
echo "as seen"
