"""FLUX.2 klein base: the models before distillation."""

from __future__ import annotations

from byg_plugin.families.spec import FamilySpec, MusubiSpec, ShiftByTokensAndSteps


def _klein(size: str, text_width: int, most_swapped: int) -> FamilySpec:
    return FamilySpec(
        name=f"flux2-klein-{size}",
        implementation="byg_plugin.models.flux2:Flux2Family",
        lora_layout="flux2",
        positions=("same", "reference"),
        reference_id=10,
        guidance="classifier_free",
        guidance_scales=(4.0, 4.0),
        text_encoders=("qwen",),
        text_in_sequence=True,
        text_width=text_width,
        # A latent is a token: the VAE's own 2 x 2 squares are channels.
        shift=ShiftByTokensAndSteps(
            lines={10: (8.73809524e-05, 1.89833333), 200: (0.00016927, 0.45666666)},
            most_tokens=4300,
        ),
        distilled=r"(?i)^(?!.*base).*klein|(?<!un)distill|(?<!de[-_])turbo",
        diffusers=(0, 37),
        modelspec=(f"Flux.2-klein-{size}", "https://github.com/black-forest-labs/flux2"),
        defaults={"sample": {"steps": 50}},
        musubi=MusubiSpec(
            adapter=f"byg_plugin.musubi.flux2:Klein{size.upper()}OnMusubi",
            decided={"model_version": f"klein-base-{size}"},
            network_module="networks.lora_flux_2",
            text_encoders=("text_encoder",),
            most_swapped=most_swapped,
        ),
    )


# The host swaps double and single blocks in proportion and keeps two of each: of 5 + 20 and of 8 + 24.
SPECS = (_klein("4b", 3 * 2560, 13), _klein("9b", 3 * 4096, 16))
