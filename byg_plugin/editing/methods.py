"""How a model edits: with a LoRA, or without one, as baselines do. torch is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from byg_plugin.config.sections import Config, SampleConfig
    from byg_plugin.families import FamilySpec
    from byg_plugin.hosts import Host
    from byg_plugin.models.base import Family

Encoded = dict[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is edited at once, on the host's device.

    Attributes:
        latents: (B, C, F, H, W) of the sources.
        texts: encoded texts of B, one by one in the order of `Method.reads`.
        negative: the encoded text that guidance leads away from; None: no guidance.
        seeds: B.
        on_step: called after each of `steps`.
    """

    config: Config
    family: Family
    host: Host
    latents: Tensor
    texts: Sequence[Encoded]
    negative: Encoded | None
    seeds: Sequence[int]
    steps: int
    schedule: str
    on_step: Callable[[], object] | None


class Method(Protocol):
    """A way to edit with a loaded model.

    Attributes:
        name: of `--method`.
        reads: fields of a tuple, in the order of `Batch.texts`.
    """

    name: str
    reads: tuple[str, ...]

    def steps(self, sample: SampleConfig) -> int:
        """Unless asked for otherwise."""
        ...

    @property
    def negative(self) -> Callable[[Config], str | None]:
        """The text that guidance leads away from; None where there is no guidance."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What it has beside the settings that all share; under keys of theirs it stands above them."""
        ...

    def sample(self, batch: Batch) -> Tensor:
        """The edits' latents."""
        ...


class _Sampled:
    """By the configured sampler."""

    def steps(self, sample: SampleConfig) -> int:
        """The configured ones."""
        return sample.steps

    def negative(self, config: Config) -> str | None:
        """The configured one."""
        return config.negative

    def settings(self) -> Mapping[str, Any]:
        """The shared ones."""
        return {}

    def _sample(self, batch: Batch, velocity: Any, source: Tensor | None) -> Tensor:
        import torch

        from byg_plugin import sampling

        # One noise a seed, whatever the batch: a picture does not depend on its neighbours.
        shape = (1, *batch.latents.shape[1:])
        noise = torch.cat([sampling.seeded_noise(shape, seed, batch.latents.device) for seed in batch.seeds])
        return sampling.sample_as_configured(
            batch.config,
            batch.family,
            velocity,
            noise,
            batch.texts[0],
            source,
            steps=batch.steps,
            schedule=batch.schedule,
            negative=batch.negative,
            on_step=batch.on_step,
        )


class Lora(_Sampled):
    """The trained editor: instruction and source tokens."""

    name = "lora"
    reads: tuple[str, ...] = ("instruction",)

    def sample(self, batch: Batch) -> Tensor:
        """See `Method`."""
        with batch.host.live() as velocity:
            return self._sample(batch, velocity, batch.latents)


class Base(_Sampled):
    """The frozen base by the target caption: it has not seen the source."""

    name = "base"
    reads: tuple[str, ...] = ("tgt_caption",)

    def sample(self, batch: Batch) -> Tensor:
        """See `Method`."""
        with batch.host.base() as velocity:
            return self._sample(batch, velocity, None)


@dataclass(frozen=True, kw_only=True)
class FlowEdit:
    """`flowedit.flowedit` on the frozen base; make it with `of`."""

    n_max: int
    n_min: int
    n_avg: int
    source_guidance: float
    target_guidance: float
    schedule_steps: int

    name = "flowedit"
    reads = ("src_caption", "tgt_caption")

    @classmethod
    def of(
        cls,
        spec: FamilySpec,
        *,
        steps: int | None = None,
        n_max: int | None = None,
        n_min: int | None = None,
        n_avg: int | None = None,
        source_guidance: float | None = None,
        target_guidance: float | None = None,
    ) -> FlowEdit:
        """The family's settings where nothing is given; of other `steps` the same share is made.

        Raises:
            ValueError: the numbers of steps do not fit each other, or a scale is below the family's least.
        """
        usual = spec.flowedit
        steps = steps or usual.steps
        most = max(1, round(steps * usual.n_max / usual.steps)) if n_max is None else n_max
        least = n_min or 0
        if not least <= most <= steps:
            raise ValueError(f"--n-min {least}, --n-max {most}, --steps {steps}: each is at most the next; lower the first ones")
        scales = {
            "source_guidance": usual.source_guidance if source_guidance is None else source_guidance,
            "target_guidance": usual.target_guidance if target_guidance is None else target_guidance,
        }
        if spec.guidance == "classifier_free":
            for name, scale in scales.items():
                if scale < spec.unguided:
                    option = "--" + name.replace("_", "-")
                    raise ValueError(f"{option} {scale:g} is below {spec.unguided:g}, which is no guidance for {spec.name}; raise it")
        return cls(n_max=most, n_min=least, n_avg=n_avg or 1, schedule_steps=steps, **scales)

    def steps(self, sample: SampleConfig) -> int:
        """See `of`."""
        return self.schedule_steps

    def negative(self, config: Config) -> str | None:
        """Where the family has classifier-free guidance; FlowEdit's scales are not those of `[sample]`."""
        spec = config.model.spec
        if spec.guidance == "embedding" or self.source_guidance == self.target_guidance == spec.unguided:
            return None
        return spec.negative if config.sample.negative is None else config.sample.negative

    def settings(self) -> Mapping[str, Any]:
        """Its own, and none of the sampler's."""
        own = {name: value for name, value in asdict(self).items() if name != "schedule_steps"}
        return own | {"solver": "euler", **dict.fromkeys(("guidance", "cfg_high_noise", "cfg_low_noise"))}

    def sample(self, batch: Batch) -> Tensor:
        """See `Method`."""
        import torch

        from byg_plugin import flowedit, sampling

        assert batch.steps == self.schedule_steps, "n_max counts them"
        latents = batch.latents
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]  # on the CPU: one noise on every device

        def draw() -> Tensor:
            return torch.cat([torch.randn((1, *latents.shape[1:]), generator=each) for each in generators]).to(latents.device)

        nodes = sampling.sampling_nodes(batch.family, batch.steps, batch.schedule, tuple(latents.shape))
        with batch.host.base() as velocity:
            source_field, target_field = (
                sampling.at_guidance(velocity, text, scale, batch.family, batch.negative)
                for text, scale in zip(batch.texts, (self.source_guidance, self.target_guidance), strict=True)
            )
            numbers = {"n_max": self.n_max, "n_min": self.n_min, "n_avg": self.n_avg}
            return flowedit.flowedit(source_field, target_field, latents, draw, nodes, **numbers, on_step=batch.on_step)
