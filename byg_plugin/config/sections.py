"""The typed configuration: one TOML file drives caching, training and editing.

Every option is declared once, here, with a sentence and its unit; `loading.py` fills the sections from a file.
"""

from __future__ import annotations

import json
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic.fields import FieldInfo

from byg_plugin import families
from byg_plugin.config.critic import CriticConfig
from byg_plugin.config.fields import (
    LEAST,
    MOST,
    Decay,
    LocalPath,
    NonNegative,
    PathText,
    Pattern,
    Probability,
    Scale,
    Section,
    Seed,
    Stem,
    Steps,
    Weight,
)
from byg_plugin.config.objective import DEFAULT, OBJECTIVES, ObjectiveConfig

# model.host -> what it makes of a configuration, a module with `fill(raw)` and `check(config)`; the embedded host takes it as it is.
HOSTS = {"musubi": "byg_plugin.musubi.section"}
if TYPE_CHECKING:
    FamilyName = str
    HostName = str
    Position = str
else:
    HostName = Literal[("diffusers", *HOSTS)]
    FamilyName = Literal[tuple(families.SPECS)]
    Position = Literal[families.POSITIONS]


class ModelConfig(Section):
    """Which frozen base model is edited with, and how it is held in memory."""

    family: FamilyName = Field("flux", description="Model family.")
    host: HostName = Field("diffusers", description="Training host; `diffusers` is the embedded one, `musubi` an installed musubi-tuner.")
    host_path: PathText | None = Field(
        None, description="Folder of a musubi-tuner checkout; default: the `musubi_tuner` that is installed in this environment."
    )
    path: PathText | None = Field(None, description="Diffusers folder or hub id with every part of the model.")
    transformer: PathText | None = Field(
        None, description="Single .safetensors file or folder of the DiT (Wan2.2-A14B: high-noise expert); overrides `path`."
    )
    transformer_2: PathText | None = Field(None, description="The same of Wan2.2-A14B's low-noise expert; overrides `path`.")
    vae: PathText | None = Field(None, description="Single .safetensors file or folder of the VAE; overrides `path`.")
    t5: PathText | None = Field(None, description="Single .safetensors file or folder of the T5 encoder (Wan: UMT5); overrides `path`.")
    clip: PathText | None = Field(None, description="Single .safetensors file or folder of CLIP-L; overrides `path`.")
    qwen: PathText | None = Field(
        None,
        description="Single .safetensors file or folder of the Qwen text encoder (FLUX.2 klein and Z-Image: Qwen3, Qwen-Image: Qwen2.5-VL, "
        "Krea 2: Qwen3-VL); overrides `path`.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Dtype of the frozen weights.")
    quantization: Literal["none", "fp8", "int8", "nf4"] = Field(
        "none",
        description="Storage of the frozen linears: fp8 (ours, per-channel scale), int8 or nf4 (bitsandbytes extra).",
    )
    attention: Literal["native", "flash", "xformers"] = Field(
        "native", description="Attention kernel; probed at start, refused with the reason when unusable."
    )
    gradient_checkpointing: bool = Field(True, description="Recompute blocks in backward (non-reentrant).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = CUDA where there is one, else CPU.")
    boundary: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="t in (0, 1) from which Wan2.2-A14B's high-noise expert serves; default: the checkpoint's own (0.875)."
    )
    offload_inactive_expert: bool = Field(
        False, description="Keep the expert that is not in use in main memory: half the weights on the device, a copy at each change."
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.host != "musubi" and self.host_path:
            raise ValueError(
                f"model.host_path is musubi-tuner's folder, model.host is {self.host!r}: leave it out, or set model.host = 'musubi'"
            )
        for key in ("transformer_2", "boundary", "offload_inactive_expert"):
            if getattr(self, key) not in (None, False) and not self.spec.has_experts:
                raise ValueError(f"model.{key} is for families of two experts, {self.family} has one network: leave it out")
        if self.offload_inactive_expert and self.quantization in ("int8", "nf4"):
            raise ValueError(
                f"model.offload_inactive_expert cannot move weights stored as {self.quantization}: set model.quantization = 'fp8' or 'none'"
            )
        for key in families.TEXT_ENCODERS:
            if getattr(self, key) and key not in self.spec.text_encoders:
                raise ValueError(f"model.{key}: {self.family} has no such text encoder, leave it out")
        return self

    @property
    def spec(self) -> families.FamilySpec:
        """What is published of the family."""
        return families.named(self.family)

    def part(self, name: str) -> str:
        """Where one part (`transformer`, `transformer_2`, `vae` or a text encoder) is loaded from.

        Raises:
            ValueError: neither `model.<name>` nor `model.path` is set.
        """
        path = getattr(self, name) or self.path
        if path is None:
            raise ValueError(f"model.{name} is not set: give model.{name}, or model.path for a whole diffusers folder")
        return path


Frames = Annotated[int, Field(ge=1, le=10_000)]
AtOnce = Annotated[int, Field(ge=1, le=1024)]
"""What is in memory together."""


class DatasetConfig(Section):
    """What is trained on, and where its encodings are cached."""

    tuples: LocalPath = Field(description="JSONL of edit tuples, or a folder of images with same-stem .json tuples.")
    rules: Literal["error", "warn"] = Field(
        "error", description="What becomes of texts that break a hard rule of Appendix D.1 (byg_plugin/data/rules.py)."
    )
    image_root: LocalPath | None = Field(None, description="Folder that relative `source` paths start from; default: the tuples' own.")
    cache_dir: LocalPath = Field(description="Folder of cached latents and text encodings.")
    resolution: Annotated[int, Field(ge=16, le=4096)] = Field(
        512, description="Target size: buckets have about resolution x resolution pixels, never more than the image or clip has."
    )
    frames: Frames = Field(
        1,
        description="Frames of a clip, rounded down to what the family takes (Wan: 4n + 1); default for Wan: 81. Images have one. "
        "At most 10,000: a clip goes through the network in one piece.",
    )
    min_frames: Frames | None = Field(
        None, description="Shorter clips are taken with their own length if they have this many; default: `frames`, others are too short."
    )
    fps: Annotated[float, Field(ge=0.1, le=240.0)] | None = Field(
        None, description="Frames a second that clips are read at; default: what the family was trained on (Wan: 16, the 5B 24)."
    )
    vae_tiling: bool = Field(False, description="Wan's VAE works in tiles of 256 pixels: less memory, slightly other latents.")
    max_lost: Probability = Field(
        0.0, description="Share of the tuples that may be left out because an image or clip is too short or unreadable; 0 = none."
    )
    buckets: bool = Field(True, description="Aspect-ratio buckets; false crops every image to a centred square.")
    max_aspect: Annotated[float, Field(ge=1.0, le=8.0)] = Field(2.0, description="Longest bucket side over its shortest.")
    bucket_step: Annotated[int, Field(ge=8, le=512)] | None = Field(
        None, description="Bucket sides are multiples of this many pixels; default: 64, or the family's own for less than 256 px."
    )
    validation_items: NonNegative = Field(
        0,
        description="Tuples held out for validation loss and previews, whole sources. Where tuples name a `split` of their own it decides "
        "which, and any number above 0 says that they are used.",
    )
    cache_batch_size: AtOnce = Field(1, description="Images or texts encoded at once while caching; at most 1,024, all are in memory.")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Loader processes a rank that read the cache (0 = in the training process); at most 256, each has memory of its own."
    )


class ConditioningConfig(Section):
    """How the source enters the network."""

    position: Position = Field(
        "same",
        description="Positions of the source tokens: the noisy tokens' own; FLUX.1 also first id 1 as stock Kontext tools (kontext), "
        "Wan also turned as ComfyUI's in-context latents (bernini), FLUX.2 klein, Qwen-Image and Krea 2 also those of the first "
        "reference image (reference).",
    )
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)] = Field(
        3.5, description="Value of FLUX.1's guidance embedding for edit, EMA and base, in training and editing. The others have none."
    )
    max_text_tokens: Annotated[int, Field(ge=4, le=512)] = Field(
        512, description="Tokens a text is padded or cut to (T5, UMT5), or cut to alone (Qwen)."
    )


SECTIONS_OF_OBJECTIVES: dict[str, type[ObjectiveConfig]] = {name: resolve_name(path) for name, path in OBJECTIVES.items()}


def _objective_of(section: Any) -> Any:
    """`objective.name` of a section, raw or made."""
    return section.get("name", DEFAULT) if isinstance(section, dict) else getattr(section, "name", None)


if TYPE_CHECKING:
    AnyObjective = ObjectiveConfig
else:
    AnyObjective = Annotated[
        Union[tuple(Annotated[section, Tag(name)] for name, section in SECTIONS_OF_OBJECTIVES.items())], Discriminator(_objective_of)  # noqa: UP007
    ]


class LoraConfig(Section):
    """The trained adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="Rank of every adapted linear; at most 4,096, above a linear's width it adds nothing."
    )
    alpha: Annotated[float, Field(ge=1e-6, le=MOST)] | None = Field(
        None, description="Scale numerator (scale = alpha / rank); default: rank."
    )
    dropout: Annotated[float, Field(ge=0.0, le=0.99)] = Field(0.0, description="Dropout on the adapter's input.")
    targets: Pattern | None = Field(
        None, description="Regular expression that a whole module name must match; default: attention and MLP linears of all blocks."
    )
    forward: Literal["factors", "merged"] = Field(
        "factors",
        description="merged = a differentiated pass multiplies the LoRA into each weight first: one product a linear for three, cheaper "
        "where the rank is near the width; equal up to rounding, which under train.mixed_precision = bf16 is that of the whole weight: a "
        "LoRA that is small beside it is mostly rounded away.",
    )
    init_from: PathText | None = Field(
        None,
        description="Earlier LoRA file to start from (same family, rank and conditioning.position); of two experts, either of the pair.",
    )
    experts: Literal["separate", "shared", "high_noise", "low_noise"] = Field(
        "separate", description="Wan2.2-A14B: a LoRA an expert, one in both, or one expert alone beside `other_expert`."
    )
    other_expert: PathText | None = Field(None, description="LoRA file of the expert that is not trained; its weights stay as they are.")

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        alone = self.experts in ("high_noise", "low_noise")
        if alone and not self.other_expert:
            raise ValueError(
                f"lora.experts = {self.experts!r} trains one expert alone, but a rollout from noise to data passes through both, and "
                "without a LoRA the other knows nothing of the source: give lora.other_expert, or set lora.experts = 'separate'"
            )
        if self.other_expert and not alone:
            raise ValueError(f"lora.other_expert is for lora.experts = 'high_noise' or 'low_noise', it is {self.experts!r}: leave it out")
        return self

    @property
    def scale_numerator(self) -> float:
        """alpha, which is the rank unless set."""
        return float(self.rank) if self.alpha is None else self.alpha


class TrainConfig(Section):
    """The loop."""

    steps: Annotated[int, Field(ge=1, le=10**8)] = Field(description="Optimizer steps.")
    global_batch_size: Annotated[int, Field(ge=1, le=100_000)] = Field(
        8,
        description="Tuples an optimizer step = processes x accumulation x batch_size; at most 100,000, all are one step.",
    )
    batch_size: AtOnce = Field(1, description="Tuples a process and micro-step; at most 1,024, all are in memory.")
    lr: Annotated[float, Field(ge=LEAST, le=MOST)] = Field(3e-4, description="Peak learning rate.")
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw", description="adamw8bit needs the bitsandbytes extra; muon is for matrices, which a LoRA's weights are."
    )
    weight_decay: Weight = Field(1e-2, description="Decoupled weight decay.")
    betas: tuple[Decay, Decay] | None = Field(None, description="AdamW's moment decays; default: [0.9, 0.999].", strict=False)
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="Shape after the warm-up; cosine ends at 0.")
    lr_warmup_steps: Steps = Field(0, description="Steps of linear warm-up of the learning rate.")
    max_grad_norm: Weight = Field(1.0, description="Gradients are clipped to this global norm; 0 = not clipped.")
    skip_grad_norm: Weight = Field(
        0.0,
        description="An update whose gradient has a larger norm before clipping is left out: the weights stay, the moments decay, the step "
        "counts; one that is not finite is left out too, and ten in a row of one set of weights end the run. 0 = none is left out, and one "
        "that is not finite ends the run.",
    )
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="Autocast of the network's forward passes.")
    seed: Seed = Field(0, description="Seed of data order, t, noise and LoRA initialisation.")
    log_every: Annotated[int, Field(ge=1, le=10**8)] = Field(1, description="Steps between log lines.")
    save_every: Steps = Field(500, description="Steps between checkpoints; 0 = only at the end.")
    keep_last: NonNegative = Field(3, description="Checkpoints kept; 0 = all.")
    validate_every: Steps = Field(0, description="Steps between validation losses; 0 = never.")
    tracker: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="Where curves go; wandb is an extra.")
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="Frozen base in shards over the processes; an accelerate configuration of DeepSpeed or FSDP2 says it too."
    )
    sharding_offload: bool = Field(False, description="Shards stay in main memory; a block at a time comes to the device.")
    collective_timeout: Annotated[float, Field(ge=0.01, le=10_000.0)] = Field(
        30.0, description="Minutes that a process waits for the others in one collective before the run is ended."
    )

    @model_validator(mode="before")
    @classmethod
    def _betas_of_adamw(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("betas") is None and raw.get("optimizer") != "muon":
            return {**raw, "betas": (0.9, 0.999)}
        return raw

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.sharding_offload and self.sharding == "none":
            raise ValueError("train.sharding_offload = true is for train.sharding = 'fsdp2', it is 'none': leave it out")
        if 0 < self.skip_grad_norm <= self.max_grad_norm:
            raise ValueError(
                f"train.skip_grad_norm = {self.skip_grad_norm} leaves out what train.max_grad_norm = {self.max_grad_norm} would clip: set "
                "it higher, or to 0"
            )
        if self.optimizer == "muon" and self.betas is not None:
            raise ValueError(f"train.betas = {list(self.betas)} are AdamW's moment decays, train.optimizer = 'muon' has none: leave it out")
        return self


# What earlier versions wrote down also where nothing read it; there it is None now.
ONCE_ALWAYS_WRITTEN = {"train.betas"}
SampleSteps = Annotated[int, Field(ge=1, le=1000)]


class SampleConfig(Section):
    """Previews during training, and the defaults of `edit.py`."""

    every: Steps = Field(0, description="Steps between previews (and one at step 0); 0 = never.")
    items: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="Tuples previewed, from the validation items where there are any; at most 1,000, training waits for them."
    )
    steps: SampleSteps = Field(
        20,
        description="Steps of an edit; at most 1,000: networks tell no more times apart. FLUX.2, Z-Image and Qwen-Image: 50, Krea 2: 52, "
        "Wan2.2 A14B: 40, other Wan: 50.",
    )
    schedule: Literal["uniform", "shifted"] = Field("shifted", description="Nodes of the sampler (family's own shift).")
    solver: Literal["auto", "euler", "unipc", "unipc_diffusers", "stochastic"] = Field(
        "auto",
        description="auto = what the family is published with: FLUX Euler, Wan unipc, which is UniPC at the times of Wan's own code; "
        "unipc_diffusers takes those of diffusers' pipelines; stochastic = each step predicts the edit and adds fresh noise (default of "
        "objective.name = 'np_edit', with its steps and schedule and without guidance).",
    )
    cfg_high_noise: Scale | None = Field(
        None,
        description="Classifier-free guidance (of Wan2.2-A14B the high-noise expert's), in the family's own formula: 1 = none, for Krea 2 "
        "and Z-Image 0 = none; default: the published one.",
    )
    cfg_low_noise: Scale | None = Field(None, description="The same of the low-noise expert.")
    negative: Annotated[str, Field(max_length=10_000)] | None = Field(
        None, description="Text of the branch that classifier-free guidance leads away from; default: the published one."
    )
    seed: Seed = Field(0, description="Seed of the previews' noise.")
    weights: Literal["ema", "live"] = Field("ema", description="Which LoRA weights the previews use.")


Names = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(min_length=1, max_length=20)]


class EvaluateConfig(Section):
    """Scores of held-out edits during training; `best.json` names the best checkpoint. docs/evaluation.md says what each metric needs."""

    every: Steps = Field(0, description="Steps between evaluations, a multiple of `train.save_every`; 0 = never.")
    items: Annotated[int, Field(ge=1, le=1000)] = Field(
        16,
        description="Validation items that are edited and scored each time, the previews' first; at most 1,000, training waits for them.",
    )
    metrics: Names = Field(("clip", "dino"), description="Metrics of evaluate.py by name.", strict=False)
    select: Names = Field(
        ("clip_directional", "dino"),
        description="Column by which a checkpoint is the best; of several the mean over items of their geometric mean, as far as they are "
        "positive: a copy of the source has no edit, a picture without it nothing preserved.",
        strict=False,
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where metrics' models run; on cuda the network makes way meanwhile.")
    clip: PathText | None = Field(None, description="Folder or hub id of CLIP; default: that of evaluate.py.")
    dino: PathText | None = Field(None, description="Folder or hub id of DINO; default: that of evaluate.py.")
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field("alex", description="Network of LPIPS.")
    aesthetic: PathText | None = Field(None, description="LAION's linear head, .safetensors, of the metric `aesthetic`.")
    cotracker: PathText | None = Field(None, description="CoTracker3's offline weights, .safetensors (CC-BY-NC), of the metric `motion`.")


class OutputConfig(Section):
    """Where results go."""

    dir: LocalPath = Field(description="Folder of checkpoints, logs, previews and the final LoRA.")
    # No full stop at the end: Windows drops it.
    name: Stem = Field(
        "byg_lora",
        description="File stem of the LoRA: letters, digits, `.`, `_`, `-`, at most 128 (suffixes follow); not `training`, which is "
        "the checkpoint's own file.",
    )
    thumbnail: bool = Field(
        False,
        description="The last preview, source beside edit, goes into the LoRA's header in 512 pixels, for model browsers to show.",
    )


class Config(Section):
    """The whole configuration. Paths are relative to the folder the command is run in.

    On the host `musubi`, what that host has options for is in `[musubi]`, under its own names; `[train]`, `[lora]`, `[sample]` and
    `[output]` are then filled from there and cannot be written.
    """

    model: ModelConfig
    dataset: DatasetConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    objective: AnyObjective = Field(default_factory=lambda: SECTIONS_OF_OBJECTIVES[DEFAULT].model_validate({}))
    critic: CriticConfig = CriticConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: OutputConfig
    musubi: dict[str, Any] = Field(
        default_factory=dict, description="musubi-tuner's own options under its own names (without the dashes), for model.host = 'musubi'."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, raw: Any) -> Any:
        model = raw.get("model") if isinstance(raw, dict) else None
        family = model.get("family") if isinstance(model, dict) else None
        if not isinstance(family, str) or family not in families.SPECS:
            return raw
        filled = dict(raw)
        for section, values in families.named(family).defaults.items():
            given = raw.get(section, {})
            if isinstance(given, dict):
                # A default of one objective is none of another.
                chosen = SECTIONS_OF_OBJECTIVES.get(str(_objective_of(given))) if section == "objective" else None
                keys = values if chosen is None else chosen.model_fields
                filled[section] = {key: value for key, value in values.items() if key in keys} | given
        return filled

    @model_validator(mode="before")
    @classmethod
    def _sampled_as_trained(cls, raw: Any) -> Any:
        """An objective that trains for a sampler of its own. Runs before the family's defaults, which it stands above."""
        objective, sample, model = (
            (raw.get(name, {}) for name in ("objective", "sample", "model")) if isinstance(raw, dict) else (None,) * 3
        )
        chosen = SECTIONS_OF_OBJECTIVES.get(str(_objective_of(objective)))
        family = model.get("family", ModelConfig.model_fields["family"].default) if isinstance(model, dict) else None
        known = isinstance(family, str) and family in families.SPECS
        if chosen is None or not known or not isinstance(sample, dict) or not isinstance(objective, dict):
            return raw
        defaults = chosen.sampled(objective, families.named(str(family)))
        return {**raw, "sample": defaults | sample} if defaults else raw

    @model_validator(mode="before")
    @classmethod
    def _from_the_host(cls, raw: Any) -> Any:
        """Of the validators before, the one defined last runs first."""
        model = raw.get("model") if isinstance(raw, dict) else None
        host = model.get("host") if isinstance(model, dict) else None
        for name in HOSTS:
            if name != host and isinstance(raw, dict) and raw.get(name):
                raise ValueError(f"[{name}] holds another host's options, and model.host is not {name!r}: set it, or leave the section out")
        return resolve_name(HOSTS[host]).fill(raw) if isinstance(host, str) and host in HOSTS else raw

    @model_validator(mode="after")
    def _check_host(self) -> Config:
        if self.model.host in HOSTS:
            resolve_name(HOSTS[self.model.host]).check(self)
        return self

    @model_validator(mode="after")
    def _check_family(self) -> Config:
        family, spec = self.model.family, self.model.spec
        if self.conditioning.position not in spec.positions:
            raise ValueError(
                f"conditioning.position = {self.conditioning.position!r} is not for {family}: one of {', '.join(map(repr, spec.positions))}"
            )
        if not self.objective.takes_experts and spec.has_experts:
            raise ValueError(
                f"objective.name = {self.objective.name!r} unrolls one network, {family} has two experts: choose another model.family"
            )
        if self.sample.solver not in ("auto", "euler", "stochastic", *spec.solvers):
            raise ValueError(f"sample.solver = {self.sample.solver!r} is not {family}'s, leave it out")
        if spec.guidance != "classifier_free":
            for key in ("cfg_high_noise", "cfg_low_noise", "negative"):
                if (value := getattr(self.sample, key)) is not None:
                    raise ValueError(
                        f"sample.{key} = {value!r}: {family} has no classifier-free guidance, leave it out (it has conditioning.guidance)"
                    )
        for key in ("cfg_high_noise", "cfg_low_noise"):
            if (value := getattr(self.sample, key)) is not None and value < spec.unguided:
                raise ValueError(f"sample.{key} = {value} is below {spec.unguided:g}, which is no guidance for {family}")
        if spec.guidance != "embedding" and self.conditioning.guidance != ConditioningConfig.model_fields["guidance"].default:
            raise ValueError(
                f"conditioning.guidance = {self.conditioning.guidance} is a guidance embedding, which {family} has not: leave it out "
                f"(sample.cfg_high_noise{' and sample.cfg_low_noise guide' if spec.has_experts else ' guides'} previews and edits)"
            )
        if not spec.takes_clips:
            if self.dataset.frames > 1:
                raise ValueError(f"dataset.frames = {self.dataset.frames}: {family} takes images, set dataset.frames = 1")
            if self.dataset.min_frames:
                raise ValueError(f"dataset.min_frames = {self.dataset.min_frames} is for clips, {family} takes images: leave it out")
            if self.dataset.fps:
                raise ValueError(f"dataset.fps = {self.dataset.fps} is for clips, {family} takes images: leave it out")
        if self.dataset.vae_tiling and not spec.vae_tiling:
            raise ValueError(f"dataset.vae_tiling: the VAE of {family} is not run in tiles, leave it out")
        if self.conditioning.max_text_tokens > spec.text_limit:
            raise ValueError(f"conditioning.max_text_tokens = {self.conditioning.max_text_tokens}: {family} takes up to {spec.text_limit}")
        if self.sample.cfg_low_noise is not None and not spec.has_experts:
            raise ValueError(f"sample.cfg_low_noise is for families of two experts, {family} has one network: set sample.cfg_high_noise")
        if self.lora.experts != "separate" and not spec.has_experts:
            raise ValueError(f"lora.experts = {self.lora.experts!r}: {family} has one network, leave it out")
        if self.dataset.min_frames and self.dataset.min_frames > self.dataset.frames:
            raise ValueError(f"dataset.min_frames = {self.dataset.min_frames} is above dataset.frames = {self.dataset.frames}")
        return self

    def doubts(self) -> tuple[str, ...]:
        """What is allowed and mostly a mistake, as warnings."""
        train, objective = self.train, self.objective
        found = [*objective.doubts(self.model.spec), *objective.doubts_of_steps(train.steps)]
        found += objective.doubts_of_log(train.log_every, train.steps)
        if train.lr_warmup_steps >= train.steps:
            found.append(f"train.lr_warmup_steps = {train.lr_warmup_steps}: in train.steps = {train.steps} the rate never reaches train.lr")
        if self.sample.negative is not None and self.negative is None:
            found.append("sample.negative is not used: the previews have no classifier-free guidance")
        return tuple(found)

    @property
    def fps(self) -> float | None:
        """Frames a second that clips are read at; None: as they are."""
        return self.dataset.fps or self.model.spec.fps

    def cfg_at(self, high_noise: bool) -> float:
        """Classifier-free guidance of previews and editing; the family's `unguided` = none."""
        spec = self.model.spec
        high = high_noise or not spec.has_experts
        given = self.sample.cfg_high_noise if high else self.sample.cfg_low_noise
        return spec.guidance_scales[not high_noise] if given is None else given

    @property
    def negative(self) -> str | None:
        """The text of the branch that guidance leads away from; None where there is no guidance."""
        if self.cfg_at(True) == self.cfg_at(False) == self.model.spec.unguided:
            return None
        return self.model.spec.negative if self.sample.negative is None else self.sample.negative

    @model_validator(mode="after")
    def _check_critic(self) -> Config:
        for key in self.critic.model_fields_set:
            if (
                not (self.objective.criticised or self.objective.may_ask_none)
                and getattr(self.critic, key) != CriticConfig.model_fields[key].default
            ):
                raise ValueError(
                    f"critic.{key} is for objectives that ask a critic, objective.name = {self.objective.name!r} asks none: leave it out"
                )
        if self.critic.quantization == "nf4" and self.critic.dtype == "float32":
            raise ValueError("critic.quantization = 'nf4' computes in 16 bit: set critic.dtype = 'bfloat16'")
        if self.objective.criticised and self.dataset.frames > 1:
            raise ValueError(
                f"dataset.frames = {self.dataset.frames}: a critic looks at single pictures; set dataset.frames = 1 (or another "
                "model.family), or ask none (objective.vlm = false, or leave objective.critique_types out)"
            )
        return self

    @model_validator(mode="after")
    def _check_that_it_trains(self) -> Config:
        train = self.train
        # With [musubi] max_train_epochs the host alone knows the steps.
        if "max_train_epochs" not in self.musubi and (why := self.objective.trains_nothing(train.steps)):
            raise ValueError(why)
        if train.lr * train.weight_decay >= 1:
            raise ValueError(
                f"train.weight_decay = {train.weight_decay} at train.lr = {train.lr}: a step multiplies the weights by "
                "1 - lr x weight_decay, which leaves nothing of them; lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.train.global_batch_size % self.train.batch_size:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is not a multiple of train.batch_size = "
                f"{self.train.batch_size}: change one of them"
            )
        if self.output.thumbnail and not self.sample.every:
            raise ValueError("output.thumbnail needs previews: set sample.every, e.g. 500")
        if self.train.validate_every and not self.dataset.validation_items:
            raise ValueError("train.validate_every needs held-out tuples: set dataset.validation_items, e.g. 8")
        self._check_evaluation()
        if self.model.quantization in ("int8", "nf4") and self.model.dtype == "float32":
            raise ValueError(f"model.quantization = {self.model.quantization!r} computes in 16 bit: set model.dtype = 'bfloat16'")
        if self.lora.forward == "merged":
            self._check_merged_forward()
        if self.objective.repeats_passes and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout}: objective.name = {self.objective.name!r} makes a pass twice, and dropout "
                "would make two different ones: set lora.dropout = 0"
            )
        if self.objective.merges_rollout and self.model.offload_inactive_expert:
            raise ValueError(
                "objective.rollout_weights = 'merged' is a second copy of both experts' linears on the device, which "
                "model.offload_inactive_expert is to spare: set objective.rollout_weights = 'swap'"
            )
        if self.objective.merges_rollout and self.model.quantization != "none":
            raise ValueError(
                f"objective.rollout_weights = 'merged' needs frozen weights that a LoRA can be added to, and model.quantization = "
                f"{self.model.quantization!r} would round most of it away: set objective.rollout_weights = 'swap'"
            )
        return self

    def _check_evaluation(self) -> None:
        every, save_every = self.evaluate.every, self.train.save_every
        if every and not self.dataset.validation_items:
            raise ValueError("evaluate.every needs held-out tuples: set dataset.validation_items, e.g. 16")
        if every and (not save_every or every % save_every):
            raise ValueError(
                f"evaluate.every = {every} is not a multiple of train.save_every = {save_every}: what is scored must be a checkpoint; set "
                f"train.save_every = {every}"
            )

    def _check_merged_forward(self) -> None:
        for key, value, needed in (
            ("model.dtype", self.model.dtype, "float32"),
            ("model.quantization", self.model.quantization, "none"),
            ("lora.dropout", self.lora.dropout, 0.0),
        ):
            if value != needed:
                why = "a LoRA has no input of its own there" if key == "lora.dropout" else "it would be rounded away in other weights"
                raise ValueError(
                    f"lora.forward = 'merged' adds the LoRA to the weights and needs {key} = {needed!r}, it is {value!r}: {why}; set "
                    "lora.forward = 'factors'"
                )

    def accumulation(self, processes: int) -> int:
        """Micro-steps an optimizer step on this many processes.

        Raises:
            ValueError: the global batch does not divide.
        """
        per_micro = self.train.batch_size * processes
        if self.train.global_batch_size % per_micro:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is not a multiple of {processes} processes x "
                f"train.batch_size = {self.train.batch_size}: change train.global_batch_size, e.g. to {per_micro}"
            )
        return self.train.global_batch_size // per_micro

    def to_json(self) -> str:
        """The resolved configuration as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


def models_of(section: str) -> tuple[type[BaseModel], ...]:
    """The classes of a section: none (no section, or one of free keys), one, or `[objective]`'s by `objective.name`."""
    if section == "objective":
        return tuple(SECTIONS_OF_OBJECTIVES.values())
    field = Config.model_fields.get(section)
    annotation = field.annotation if field else None
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()


def keys_of(section: str) -> dict[str, FieldInfo]:
    """Every key of a section, whatever chooses among its classes."""
    return {key: field for model in models_of(section) for key, field in model.model_fields.items()}
