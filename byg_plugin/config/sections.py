"""The typed configuration: one TOML file drives caching, training and editing.

Every option is declared once, here, with a sentence and its unit; `loading.py` fills the sections from a file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from byg_plugin import families
from byg_plugin.config.fields import (
    LEAST,
    MOST,
    Decay,
    NonNegative,
    Pattern,
    Place,
    Probability,
    Scale,
    Section,
    Seed,
    Shift,
    Stem,
    Steps,
    Weight,
)

if TYPE_CHECKING:
    FamilyName = str
    Position = str
else:
    FamilyName = Literal[tuple(families.SPECS)]
    Position = Literal[families.POSITIONS]


class ModelConfig(Section):
    """Which frozen base model is edited with, and how it is held in memory."""

    family: FamilyName = Field("flux", description="Model family.")
    host: Literal["diffusers", "musubi"] = Field(
        "diffusers", description="Training host; `diffusers` is the embedded one, `musubi` an installed musubi-tuner."
    )
    host_path: Place | None = Field(
        None, description="Folder of a musubi-tuner checkout; default: the `musubi_tuner` that is installed in this environment."
    )
    path: Place | None = Field(None, description="Diffusers folder or hub id with every part of the model.")
    transformer: Place | None = Field(
        None, description="Single .safetensors file or folder of the DiT (Wan2.2-A14B: high-noise expert); overrides `path`."
    )
    transformer_2: Place | None = Field(None, description="The same of Wan2.2-A14B's low-noise expert; overrides `path`.")
    vae: Place | None = Field(None, description="Single .safetensors file or folder of the VAE; overrides `path`.")
    t5: Place | None = Field(None, description="Single .safetensors file or folder of the T5 encoder (Wan: UMT5); overrides `path`.")
    clip: Place | None = Field(None, description="Single .safetensors file or folder of CLIP-L; overrides `path`.")
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
        for key in ("t5", "clip"):
            if getattr(self, key) and key not in self.spec.text_encoders:
                raise ValueError(f"model.{key}: {self.family} has no such text encoder, leave it out")
        return self

    @property
    def spec(self) -> families.FamilySpec:
        """What is published of the family."""
        return families.named(self.family)

    def part(self, name: str) -> str:
        """Where one part (`transformer`, `transformer_2`, `vae`, `t5`, `clip`) is loaded from.

        Raises:
            ValueError: neither `model.<name>` nor `model.path` is set.
        """
        place = getattr(self, name) or self.path
        if place is None:
            raise ValueError(f"model.{name} is not set: give model.{name}, or model.path for a whole diffusers folder")
        return place


Frames = Annotated[int, Field(ge=1, le=10_000)]
AtOnce = Annotated[int, Field(ge=1, le=1024)]
"""What is in memory together."""


class DatasetConfig(Section):
    """What is trained on, and where its encodings are cached."""

    tuples: Place = Field(description="JSONL of edit tuples, or a folder of images with same-stem .json tuples.")
    rules: Literal["error", "warn"] = Field(
        "error", description="What becomes of texts that break a hard rule of Appendix D.1 (byg_plugin/data/rules.py)."
    )
    image_root: Place | None = Field(None, description="Folder that relative `source` paths start from; default: the tuples' own.")
    cache_dir: Place = Field(description="Folder of cached latents and text encodings.")
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
        description="Tuples held out for validation loss and previews (whole sources), unless tuples name a `split` of their own.",
    )
    cache_batch_size: AtOnce = Field(1, description="Images or texts encoded at once while caching; at most 1,024, all are in memory.")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Loader processes a rank that read the cache (0 = in the training process); at most 256, each has memory of its own."
    )


class ConditioningConfig(Section):
    """How the source enters the network."""

    position: Position = Field(
        "same",
        description="Positions of the source tokens: the noisy tokens' own; FLUX also first id 1 as stock Kontext tools (kontext), "
        "Wan also turned as ComfyUI's in-context latents (bernini).",
    )
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)] = Field(
        3.5, description="Value of FLUX's guidance embedding for edit, EMA and base, in training and editing. Wan has none."
    )
    max_text_tokens: Annotated[int, Field(ge=4, le=512)] = Field(512, description="T5 or UMT5 tokens a text is padded or cut to.")


_LEAST_RANGE = 1e-6  # of t, which is float32


class ObjectiveConfig(Section):
    """Algorithm 1 of the paper, its weights, and one switch per ablation of its Table 4."""

    name: Literal["unpaired_cycle", "paired"] = Field("unpaired_cycle", description="paired = the supervised baseline (Eq. 1).")
    graph: Literal["sequential", "joint"] = Field("sequential", description="One graph at a time, or the single-graph reference.")
    lambda_cycle: Weight = Field(1.0, description="Weight of the cycle loss.")
    lambda_prior: Weight = Field(1.0, description="Weight of forward and reverse prior losses.")
    lambda_id: Weight = Field(0.2, description="Weight of the identity loss.")
    alpha: Weight = Field(0.1, description="Weight of the MSE inside the prior loss.")
    ema_decay: Annotated[float, Field(ge=0.0, le=0.99999)] = Field(
        0.99,
        description="Decay of the rollout's weights, an optimizer step; 0 = current weights. At most 0.99999: a mean over 100,000 steps.",
    )
    rollout_steps: Annotated[int, Field(ge=2, le=1000)] = Field(
        10, description="Euler steps from noise to y_0; each is a pass through the network, at most 1,000."
    )
    rollout_schedule: Literal["uniform", "shifted"] = Field("uniform", description="Nodes of the rollout (family's shift).")
    t_distribution: Literal["uniform", "logit_normal"] = Field("uniform", description="Law of the training t.")
    t_shift: Shift = Field(1.0, description="t <- s t / (1 + (s - 1) t); 1 = none.")
    t_min: Probability = Field(0.0, description="Smallest t that is drawn.")
    t_max: Probability = Field(1.0, description="Largest t that is drawn.")
    identity_warmup_steps: Steps = Field(200, description="First optimizer steps that train the identity term alone.")
    identity_probability: Probability = Field(0.15, description="Chance that a later step trains the identity term alone.")
    identity_step_weight: Weight = Field(1.0, description="Weight of the identity term on an identity step.")
    frozen_batch: Literal[1, 2, 4] = Field(2, description="Frozen-base velocities of one sample evaluated at once.")
    rollout_weights: Literal["swap", "merged"] = Field(
        "swap",
        description="merged = the rollout's LoRA multiplied into a second copy of the adapted linears: no LoRA products in its steps, "
        "more memory; equal up to the rounding of model.dtype.",
    )
    merge_identity: bool = Field(False, description="Batch the identity pass with the reverse pass (small inputs; more memory).")
    routing: bool = Field(True, description="Ablation: false conditions the reverse pass on the one-step prediction.")
    bootstrap: bool = Field(True, description="Ablation: false feeds x_t instead of the rollout's y_t.")
    cycle: bool = Field(True, description="Ablation: false drops the cycle loss (the reverse prior stays).")
    directional: bool = Field(True, description="Ablation: false keeps only alpha * MSE of the prior.")
    prior: bool = Field(True, description="Ablation: false drops the prior losses.")

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.t_min >= self.t_max:
            raise ValueError(f"objective.t_min = {self.t_min} must be below objective.t_max = {self.t_max}: the range of t is empty")
        if self.t_max - self.t_min < _LEAST_RANGE:
            raise ValueError(
                f"objective.t_min = {self.t_min} and objective.t_max = {self.t_max} are one number in float32: the range of t is empty"
            )
        prior = self.lambda_prior and self.prior and (self.directional or self.alpha)
        if self.name == "unpaired_cycle" and not (self.lambda_cycle and self.cycle) and not prior and not self.lambda_id:
            raise ValueError(
                "objective.lambda_cycle, objective.lambda_prior and objective.lambda_id are all 0 or switched off (a prior without "
                "directional needs objective.alpha): nothing is left to train; give one of them a weight"
            )
        if self.name == "unpaired_cycle" and self.identity_probability == 1 and not self.identity_step_weight:
            raise ValueError(
                "objective.identity_probability = 1 makes every step an identity step, and objective.identity_step_weight = 0 trains "
                "nothing on those: change one of them"
            )
        if self.merge_identity and self.graph == "joint":
            raise ValueError("objective.merge_identity batches passes of graph = 'sequential'; set one of the two")
        return self


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
    init_from: Place | None = Field(
        None, description="Earlier LoRA file to start from (same family and rank); of two experts, either file of the pair."
    )
    experts: Literal["separate", "shared", "high_noise", "low_noise"] = Field(
        "separate", description="Wan2.2-A14B: a LoRA an expert, one in both, or one expert alone beside `other_expert`."
    )
    other_expert: Place | None = Field(None, description="LoRA file of the expert that is not trained; its weights stay as they are.")

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
        "adamw", description="adamw8bit needs the bitsandbytes extra, muon (torch's own; betas are not used) torch 2.9 or later."
    )
    weight_decay: Weight = Field(1e-2, description="AdamW's decoupled weight decay.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's moment decays.", strict=False)
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="Shape after the warm-up; cosine ends at 0.")
    lr_warmup_steps: Steps = Field(0, description="Steps of linear warm-up of the learning rate.")
    max_grad_norm: Weight = Field(1.0, description="Gradients are clipped to this global norm; 0 = not clipped.")
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="Autocast of the network's forward passes.")
    seed: Seed = Field(0, description="Seed of data order, t, noise and LoRA initialisation.")
    log_every: Annotated[int, Field(ge=1, le=10**8)] = Field(1, description="Steps between log lines.")
    save_every: Steps = Field(500, description="Steps between checkpoints; 0 = only at the end.")
    keep_last: NonNegative = Field(3, description="Checkpoints kept; 0 = all.")
    validate_every: Steps = Field(0, description="Steps between validation losses; 0 = never.")
    tracker: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="Where curves go; wandb is an extra.")


SampleSteps = Annotated[int, Field(ge=1, le=1000)]


class SampleConfig(Section):
    """Previews during training, and the defaults of `edit.py`."""

    every: Steps = Field(0, description="Steps between previews (and one at step 0); 0 = never.")
    items: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="Tuples previewed, from the validation items where there are any; at most 1,000, training waits for them."
    )
    steps: SampleSteps = Field(20, description="Euler steps of an edit; at most 1,000, the network tells no more times apart.")
    schedule: Literal["uniform", "shifted"] = Field("shifted", description="Nodes of the sampler (family's own shift).")
    solver: Literal["auto", "euler", "unipc", "unipc_diffusers"] = Field(
        "auto",
        description="auto = what the family is published with: FLUX Euler, Wan unipc, which is UniPC at the times of Wan's own code; "
        "unipc_diffusers takes those of diffusers' pipelines.",
    )
    cfg_high_noise: Scale | None = Field(
        None, description="Wan: classifier-free guidance of the (high-noise) expert, 1 = none; default: the published one."
    )
    cfg_low_noise: Scale | None = Field(None, description="The same of the low-noise expert.")
    negative: Annotated[str, Field(max_length=10_000)] | None = Field(
        None, description="Wan: text of the branch that guidance leads away from; default: the published one."
    )
    seed: Seed = Field(0, description="Seed of the previews' noise.")
    weights: Literal["ema", "live"] = Field("ema", description="Which LoRA weights the previews use.")


class OutputConfig(Section):
    """Where results go."""

    dir: Place = Field(description="Folder of checkpoints, logs, previews and the final LoRA.")
    # No full stop at the end: Windows drops it.
    name: Stem = Field(
        "byg_lora",
        description="File stem of the LoRA: letters, digits, `.`, `_`, `-`, at most 128 (suffixes follow); not `training`, which is "
        "the checkpoint's own file.",
    )


# What musubi-tuner has options of its own for: our key -> its option. These are not read on that host.
OPTIONS_OF_MUSUBI = {
    "model.transformer": "dit",
    "model.transformer_2": "dit",
    "model.vae": "vae",
    "model.t5": "t5",
    "model.clip": "text_encoder2",
    "model.path": "dit",
    "model.dtype": "mixed_precision",
    "model.quantization": "fp8_base and musubi.fp8_scaled",
    "model.attention": "sdpa, musubi.flash_attn or musubi.xformers",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.boundary": "timestep_boundary",
    "model.offload_inactive_expert": "offload_inactive_dit",
    "dataset.image_root": "dataset_config",
    "dataset.cache_dir": "dataset_config",
    "dataset.resolution": "dataset_config",
    "dataset.frames": "dataset_config",
    "dataset.fps": "dataset_config",
    "dataset.workers": "max_data_loader_n_workers",
    "lora.rank": "network_dim",
    "lora.alpha": "network_alpha",
    "lora.dropout": "network_dropout",
    "lora.targets": "network_args",
    "lora.init_from": "network_weights",
    "train.steps": "max_train_steps",
    "train.global_batch_size": "gradient_accumulation_steps",
    "train.batch_size": "dataset_config",
    "train.lr": "learning_rate",
    "train.optimizer": "optimizer_type",
    "train.weight_decay": "optimizer_args",
    "train.betas": "optimizer_args",
    "train.lr_schedule": "lr_scheduler",
    "train.lr_warmup_steps": "lr_warmup_steps",
    "train.max_grad_norm": "max_grad_norm",
    "train.mixed_precision": "mixed_precision",
    "train.seed": "seed",
    "train.save_every": "save_every_n_steps",
    "train.keep_last": "save_last_n_steps",
    "train.tracker": "log_with",
    "sample.every": "sample_every_n_steps",
    "output.dir": "output_dir",
    "output.name": "output_name",
}
_READ_ON_MUSUBI = {"model": {"family", "host", "host_path", "device"}, "dataset": {"tuples", "rules"}}


class Config(Section):
    """The whole configuration. Paths are relative to the folder the command is run in.

    On the host `musubi`, what that host has options for is in `[musubi]`, under its own names; `[train]`, `[lora]`, `[sample]` and
    `[output]` are then filled from there and cannot be written.
    """

    model: ModelConfig
    dataset: DatasetConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
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
                filled[section] = {**values, **given}
        return filled

    @model_validator(mode="before")
    @classmethod
    def _from_the_options_of_musubi(cls, raw: Any) -> Any:
        """Of the validators before, the one defined last runs first.

        On that host its options are the one truth; the sections that say the same here are filled from them.
        """
        sections = {name: raw.get(name, {}) for name in ("model", "dataset", "lora", "train", "sample", "output", "musubi")} if raw else {}
        if not sections or not all(isinstance(section, dict) for section in sections.values()):
            return raw
        if sections["model"].get("host") != "musubi":
            if sections["musubi"]:
                raise ValueError("[musubi] holds options of musubi-tuner, and model.host is not 'musubi': set it, or leave the section out")
            return raw
        for name in ("model", "dataset", "lora", "train", "sample", "output"):
            known = section_model(name)
            assert known is not None
            for key in sections[name]:
                if key in known.model_fields and key not in _READ_ON_MUSUBI.get(name, ()):
                    own = OPTIONS_OF_MUSUBI.get(f"{name}.{key}")
                    where = f"set musubi.{own}" if own else "leave it out"
                    raise ValueError(f"{name}.{key} is not read with model.host = 'musubi': {where}")
        return {**raw, **_filled_from(sections)}

    @model_validator(mode="after")
    def _check_musubi(self) -> Config:
        if self.model.host != "musubi":
            return self
        objective = self.objective
        if self.model.spec.musubi is None:
            raise ValueError(f"model.family = {self.model.family!r}: musubi-tuner does not train it; set model.host = 'diffusers'")
        if self.conditioning.position == "bernini":
            raise ValueError(
                "conditioning.position = 'bernini' turns the source's positions, for which musubi-tuner's Wan has no place: set "
                "conditioning.position = 'same', or model.host = 'diffusers'"
            )
        if objective.name != "unpaired_cycle":
            raise ValueError(
                f"objective.name = {objective.name!r}: with model.host = 'musubi' only 'unpaired_cycle'; the host trains pairs itself"
            )
        if objective.rollout_weights != "swap":
            raise ValueError("objective.rollout_weights = 'merged' is not for model.host = 'musubi': set it to 'swap'")
        if objective.graph == "joint" and self.musubi.get("blocks_to_swap"):
            raise ValueError(
                "objective.graph = 'joint' makes three forward passes before a backward pass: with musubi.blocks_to_swap the "
                "wrong blocks would be on the device; set objective.graph = 'sequential'"
            )
        return self

    @model_validator(mode="after")
    def _check_family(self) -> Config:
        family, spec = self.model.family, self.model.spec
        if self.conditioning.position not in spec.positions:
            raise ValueError(
                f"conditioning.position = {self.conditioning.position!r} is not for {family}: one of {', '.join(map(repr, spec.positions))}"
            )
        if self.sample.solver not in ("auto", "euler", *spec.solvers):
            raise ValueError(f"sample.solver = {self.sample.solver!r} is not {family}'s, leave it out")
        if spec.guidance != "classifier_free":
            for key in ("cfg_high_noise", "cfg_low_noise", "negative"):
                if (value := getattr(self.sample, key)) is not None:
                    raise ValueError(
                        f"sample.{key} = {value!r}: {family} has no classifier-free guidance, leave it out (it has conditioning.guidance)"
                    )
        if spec.guidance != "embedding" and self.conditioning.guidance != ConditioningConfig.model_fields["guidance"].default:
            raise ValueError(
                f"conditioning.guidance = {self.conditioning.guidance} is a guidance embedding, which {family} has not: leave it out "
                "(sample.cfg_high_noise and sample.cfg_low_noise guide previews and edits)"
            )
        if not spec.takes_clips:
            if self.dataset.frames > 1 or self.dataset.min_frames:
                raise ValueError(f"dataset.frames = {self.dataset.frames}: {family} takes images, set dataset.frames = 1")
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

    @property
    def fps(self) -> float | None:
        """Frames a second that clips are read at; None: as they are."""
        return self.dataset.fps or self.model.spec.fps

    def cfg_at(self, high_noise: bool) -> float:
        """Classifier-free guidance of previews and editing; 1 = none."""
        spec = self.model.spec
        high = high_noise or not spec.has_experts
        given = self.sample.cfg_high_noise if high else self.sample.cfg_low_noise
        return spec.guidance_scales[not high_noise] if given is None else given

    @property
    def negative(self) -> str | None:
        """The text of the branch that guidance leads away from; None where there is no guidance."""
        if self.cfg_at(True) == self.cfg_at(False) == 1.0:
            return None
        return self.model.spec.negative if self.sample.negative is None else self.sample.negative

    @model_validator(mode="after")
    def _check_that_it_trains(self) -> Config:
        objective, train = self.objective, self.train
        # With [musubi] max_train_epochs the host alone knows the steps.
        known = "max_train_epochs" not in self.musubi
        if (
            objective.name == "unpaired_cycle"
            and not objective.identity_step_weight
            and objective.identity_warmup_steps >= train.steps
            and known
        ):
            raise ValueError(
                f"objective.identity_warmup_steps = {objective.identity_warmup_steps} makes all of train.steps = {train.steps} identity "
                "steps, and objective.identity_step_weight = 0 trains nothing on those: change one of them"
            )
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
        if self.train.validate_every and not self.dataset.validation_items:
            raise ValueError("train.validate_every needs held-out tuples: set dataset.validation_items, e.g. 8")
        if self.model.quantization in ("int8", "nf4") and self.model.dtype == "float32":
            raise ValueError(f"model.quantization = {self.model.quantization!r} computes in 16 bit: set model.dtype = 'bfloat16'")
        if self.objective.rollout_weights == "merged" and self.model.offload_inactive_expert:
            raise ValueError(
                "objective.rollout_weights = 'merged' is a second copy of both experts' linears on the device, which "
                "model.offload_inactive_expert is to spare: set objective.rollout_weights = 'swap'"
            )
        if self.objective.rollout_weights == "merged" and self.model.quantization != "none":
            raise ValueError(
                f"objective.rollout_weights = 'merged' needs frozen weights that a LoRA can be added to, and model.quantization = "
                f"{self.model.quantization!r} would round most of it away: set objective.rollout_weights = 'swap'"
            )
        return self

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


def section_model(name: str) -> type[BaseModel] | None:
    field = Config.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _filled_from(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sections that the host's options decide. Wrong types are left to the check against the host's parser, which names them."""
    own = sections["musubi"]

    def given(option: str, kind: type, least: int = 0) -> Any:
        value = own.get(option)
        return value if isinstance(value, kind) and not isinstance(value, bool) and (kind is str or value >= least) else None

    family = sections["model"].get("family", "flux")
    family = family if isinstance(family, str) else ""  # the schema refuses it
    spec = families.SPECS.get(family)
    lora = {"rank": given("network_dim", int, 1), "experts": "shared" if spec and spec.has_experts else None}
    train = {"steps": given("max_train_steps", int, 1) or 1600, "seed": given("seed", int), "global_batch_size": 1}
    output = {"dir": given("output_dir", str) or ".", "name": given("output_name", str)}
    filled = {"lora": lora, "train": train, "output": output}
    return {
        # What was written there is unknown to these sections, and is told.
        **{name: {**sections[name], **{k: v for k, v in section.items() if v is not None}} for name, section in filled.items()},
        "dataset": {"cache_dir": ".", "frames": spec.defaults.get("dataset", {}).get("frames", 1) if spec else 1, **sections["dataset"]},
    }
