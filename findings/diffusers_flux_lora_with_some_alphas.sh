#!/usr/bin/env bash
# A FLUX LoRA in PEFT's names (`lora_A`, `lora_B`) where one layer has an `.alpha` beside it and another has none: without `.alpha`, alpha
# is the rank, and ComfyUI reads the file so. diffusers 0.42.1 takes one alpha, the most common that it finds, for every layer of the file:
# the layer without is loaded at half its strength, without a word.
#
# Seen (rank 4; to_q has alpha 2, to_k none):
#   to_q alpha / rank 0.5
#   to_k alpha / rank 0.5
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

network = FluxTransformer2DModel(
    in_channels=64,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
pipe = FluxPipeline(None, None, None, None, None, None, network)
tensors = {}
for layer in ("to_q", "to_k"):
    name = f"transformer.transformer_blocks.0.attn.{layer}"
    tensors[f"{name}.lora_A.weight"] = torch.randn(4, 32)
    tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4)
tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(2.0)
pipe.load_lora_weights(tensors, adapter_name="a")
attention = pipe.transformer.transformer_blocks[0].attn
scales = {layer: getattr(attention, layer).scaling["a"] for layer in ("to_q", "to_k")}
for layer, scale in scales.items():
    print(f"{layer} alpha / rank {scale}")
assert scales == {"to_q": 0.5, "to_k": 0.5}, "this has changed"
PYTHON
