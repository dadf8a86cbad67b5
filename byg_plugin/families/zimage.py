"""Z-Image, the model before distillation."""

from byg_plugin.families.spec import FamilySpec

SPECS = (
    FamilySpec(
        name="z-image",
        implementation="byg_plugin.models.zimage:ZImageFamily",
        lora_layout="zimage",
        positions=("same",),
        guidance="classifier_free",
        guidance_scales=(5.0, 5.0),
        unguided=0.0,
        text_encoders=("qwen",),
        text_in_sequence=True,
        shift=6.0,
        distilled=r"(?i)(?<!de[-_])turbo|(?<!un)distill",
        diffusers=(0, 37),
        defaults={"sample": {"steps": 50}},
    ),
)
