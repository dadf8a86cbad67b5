"""Qwen-Image, and Krea 2, which has its VAE, its template and the same kind of text encoder."""

from byg_plugin.families.spec import FamilySpec, MusubiSpec, ShiftByTokens

SPECS = (
    FamilySpec(
        name="qwen-image",
        implementation="byg_plugin.models.qwen_image:QwenImageFamily",
        lora_layout="qwen",
        positions=("same", "reference"),
        guidance="classifier_free",
        guidance_scales=(4.0, 4.0),
        guidance_keeps_length=True,  # QwenImagePipeline
        negative=" ",
        text_encoders=("qwen",),
        text_in_sequence=True,
        shift=ShiftByTokens(tokens=(256, 8192), mu=(0.5, 0.9), terminal=0.02),
        distilled=r"(?i)lightning|(?<!un)distill|(?<!de[-_])turbo",
        diffusers=(0, 37),  # the first that masks padded texts
        modelspec=("Qwen-Image", "https://github.com/QwenLM/Qwen-Image"),
        defaults={"sample": {"steps": 50}},
        musubi=MusubiSpec(
            adapter="byg_plugin.musubi.qwen_image:QwenImageOnMusubi",
            decided={
                "model_version": "original",
                "edit": False,
                "edit_plus": False,
                "is_edit": False,
                "is_layered": False,
                "remove_first_image_from_target": False,
            },
            network_module="networks.lora_qwen_image",
            text_encoders=("text_encoder",),
            most_swapped=59,
        ),
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
        modelspec=("Krea-2", "https://github.com/krea-ai/krea-2"),
        defaults={"sample": {"steps": 52}},
        musubi=MusubiSpec(
            adapter="byg_plugin.musubi.krea2:Krea2OnMusubi",
            network_module="networks.lora_krea2",
            text_encoders=("text_encoder",),
            most_swapped=26,
        ),
    ),
)
