"""Qwen-Image, and Krea 2, which has its VAE, its template and the same kind of text encoder."""

from byg_plugin.families.spec import FamilySpec, ShiftByTokens

SPECS = (
    FamilySpec(
        name="qwen-image",
        implementation="byg_plugin.models.qwen_image:QwenImageFamily",
        lora_layout="qwen",
        positions=("same", "reference"),
        guidance="classifier_free",
        guidance_scales=(4.0, 4.0),
        negative=" ",
        text_encoders=("qwen",),
        text_in_sequence=True,
        shift=ShiftByTokens(tokens=(256, 8192), mu=(0.5, 0.9), terminal=0.02),
        distilled=r"(?i)lightning|(?<!un)distill|(?<!de[-_])turbo",
        diffusers=(0, 37),  # the first that masks padded texts
        defaults={"sample": {"steps": 50}},
    ),
    FamilySpec(
        name="krea2",
        implementation="byg_plugin.models.krea2:Krea2Family",
        lora_layout="krea2",
        positions=("same", "reference"),
        guidance="classifier_free",
        guidance_scales=(3.5, 3.5),  # as its authors advise for Raw; diffusers' pipeline has 4.5 and 28 steps
        unguided=0.0,
        text_encoders=("qwen",),
        text_in_sequence=True,
        shift=ShiftByTokens(tokens=(256, 6400), mu=(0.5, 1.15)),
        distilled=r"(?i)(?<!de[-_])turbo|(?<!un)distill|tdm",
        diffusers=(0, 39),
        defaults={"sample": {"steps": 52}},
    ),
)
