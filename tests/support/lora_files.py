"""LoRA files of a tiny FLUX, and what diffusers computes with them."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from byg_plugin import _cli, convert_lora
from byg_plugin.lora import flux_names
from byg_plugin.models import files

DOUBLE_ONLY = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)"
)
DEFAULT = DOUBLE_ONLY + r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
BLOCKS, SINGLES = 2, 3
METADATA = {"format": "pt", "byg.version": "0.1.0", "byg.family": "flux", "byg.position": "same", "byg.rank": "4"}


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=BLOCKS,
        num_single_layers=SINGLES,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    ).eval()


@torch.no_grad()
def output(model: FluxTransformer2DModel) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(2, 6, 16, generator=g),
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.tensor([3.5, 2.0]),
        encoder_hidden_states=torch.randn(2, 5, 24, generator=g),
        pooled_projections=torch.randn(2, 20, generator=g),
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=1).float(),
        return_dict=False,
    )[0]


def status(*arguments: object) -> int:
    """Exit status of the command, as its wrapper ends the process."""
    try:
        _cli.run(lambda: convert_lora.main(list(map(str, arguments))))
    except SystemExit as stop:
        return stop.code
    return 0


def peft_lora(targets: str | list[str] = DEFAULT, rank: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """(our file's tensors, the model's output with them) of a PEFT LoRA on the tiny FLUX whose B is not zero."""
    model = tiny_flux()
    base = output(model)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    edited = output(model)
    assert (edited - base).abs().max() > 1e-2, "the adapter must do something"
    tensors = {
        "transformer." + name.replace(".default.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return tensors, edited


def kohya(rank: int = 6, alpha: float | None = 2.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A native file as trainers of fused layers write it: one shared `down` for q, k, v."""
    g = torch.Generator().manual_seed(3)
    out = {}
    for linear in flux_names.linears(BLOCKS, SINGLES, guidance=False):
        if not linear.native.startswith(("double_blocks", "single_blocks")):
            continue
        name = "lora_unet_" + linear.native.replace(".", "_")
        out[f"{name}.lora_down.weight"] = torch.randn(rank, 64, generator=g).to(dtype)
        out[f"{name}.lora_up.weight"] = torch.randn(64 * sum(linear.widths), rank, generator=g).to(dtype)
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def full_size_peft(targets: set[str] | None = None) -> dict[str, Tensor]:
    """Every layer of a full FLUX.1-dev at rank 1; real numbers of rows, memory for none of them."""
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(files.shipped_config("flux_dev/transformer"))
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (targets is None or name in targets):
            out[f"transformer.{name}.lora_A.weight"] = torch.ones(1, 1).expand(1, module.in_features)
            out[f"transformer.{name}.lora_B.weight"] = torch.ones(1, 1).expand(module.out_features, 1)
    return out
