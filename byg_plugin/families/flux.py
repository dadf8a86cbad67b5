"""FLUX.1-dev."""

from byg_plugin.families.spec import FamilySpec, MusubiSpec, ShiftByTokens

SPECS = (
    FamilySpec(
        name="flux",
        implementation="byg_plugin.models.flux:FluxFamily",
        lora_layout="flux",
        positions=("same", "kontext"),
        guidance="embedding",
        text_encoders=("t5", "clip"),
        text_in_sequence=True,
        shift=ShiftByTokens(tokens=(256, 4096), mu=(0.5, 1.15)),
        modelspec=("Flux.1-dev", "https://github.com/black-forest-labs/flux"),
        musubi=MusubiSpec(
            adapter="byg_plugin.musubi.flux:FluxOnMusubi",
            network_module="networks.lora_flux",
            text_encoders=("text_encoder1", "text_encoder2"),
            # Of 19 + 38 blocks the host swaps n // 2 and twice the rest + 1, and keeps two of each.
            most_swapped=34,
            previews_with_fp8_t5=False,  # it names a dtype that torch has not
        ),
    ),
)
