#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2 script.py` starts one process and says nothing of the other: the list of
# options that it prints names those that got defaults, and num_processes is not among them. torchrun with the same script starts two.
#
# Seen:
#   accelerate launch --cpu --num_processes 2: process 0 of 1
#   torchrun --nproc-per-node 2: processes 0 and 1 of 2
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
cat > "$place/script.py" <<'PYTHON'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}\n", end="", flush=True)
PYTHON
cd "$place"
export CUDA_VISIBLE_DEVICES="" HF_HOME="$place/home"
"$place/venv/bin/accelerate" launch --cpu --num_processes 2 script.py | grep '^process' | sort | tee launched
"$place/venv/bin/torchrun" --nproc-per-node 2 script.py | grep '^process' | sort | tee torchrun
[ "$(cat launched)" = "process 0 of 1" ] && [ "$(cat torchrun)" = "$(printf 'process 0 of 2\nprocess 1 of 2')" ]
echo "as seen"
