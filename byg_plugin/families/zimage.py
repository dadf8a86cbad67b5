"""Z-Image, the model before distillation."""

from byg_plugin.families.spec import FamilySpec, MusubiSpec

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
        modelspec=("Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
        defaults={"sample": {"steps": 50}},
        musubi=MusubiSpec(
            adapter="byg_plugin.musubi.zimage:ZImageOnMusubi",
            network_module="networks.lora_zimage",
            text_encoders=("text_encoder",),
            most_swapped=28,
            unguided=0.0,
        ),
    ),
)
