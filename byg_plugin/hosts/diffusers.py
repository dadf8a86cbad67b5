"""The embedded host: a diffusers network, a PEFT LoRA or two, and the velocity fields over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from byg_plugin.config.extras import require_model_extras
from byg_plugin.hosts.blocks import linears_in_blocks
from byg_plugin.hosts.ema import Adapter, EmaWeights
from byg_plugin.hosts.experts import by_expert
from byg_plugin.hosts.lockstep import in_lockstep
from byg_plugin.hosts.merged import MergedLinear, MergedRollout
from byg_plugin.hosts.patterns import full_matches
from byg_plugin.hosts.quantize import after_eval_, quantize_
from byg_plugin.hosts.residency import OneExpertOnDevice
from byg_plugin.hosts.sharding import Sharding, agree_on_types, read_on_first
from byg_plugin.hosts.shards import make_shards
from byg_plugin.lora import start as start_lora
from byg_plugin.lora.formats import written_files
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import EDIT, FAKE, Critique, Text, Velocity
from byg_plugin.randomness import derived_seed

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config, LoraConfig

_ADAPTER = "byg"


class DiffusersHost:
    """Frozen experts with one trainable LoRA each, or two by turns, on a device. Implements `objectives.base.VelocityFields`.

    Args:
        config: the whole configuration.
        family: the model family that loads the experts and calls them.
        device: where the networks live.
        fresh: start from `lora.init_from`, where it is set.
        adapters: what is trained, `EDIT` first; `FAKE` is a second LoRA over the same frozen linears, which starts as the base.
        sharding: of the frozen weights; None: whole.

    Raises:
        ValueError: `lora.targets` matches nothing or something that is no linear, or an option cannot be honoured here.
    """

    critique: Critique | None = None

    def __init__(
        self,
        config: Config,
        family: Family,
        device: torch.device,
        *,
        fresh: bool = True,
        adapters: Sequence[str] = (EDIT,),
        sharding: Sharding | None = None,
    ):
        self.config, self.family, self.device = config, family, device
        dtype = getattr(torch, config.model.dtype)
        require_model_extras(config.model)
        _probe_attention(config.model.attention, device, dtype)
        self.networks: dict[str, nn.Module] = {}
        rng = torch.Generator().manual_seed(config.train.seed)
        self.sharding = sharding or Sharding()
        self._shards = make_shards(self.sharding, device) if self.sharding else None
        # An expert is quantised, and on its device, before the next one is read: two 16-bit copies are 53 GiB.
        for expert, network in self._networks(dtype):
            self.networks[expert] = network
            quantize_(network, config.model.quantization, dtype)
            if self._shards is not None:
                agree_on_types(network)
                self._shards.cut(network)
            elif not config.model.offload_inactive_expert:
                network.to(device)
            if config.model.attention != "native":
                network.set_attention_backend(config.model.attention)
            if config.model.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            _inject_lora(network, config, config.lora.targets or family.default_lora_targets, device, rng)
        if config.lora.experts == "shared":
            _share_lora(*self.networks.values())
        self._lora_layers = [layer for network in self.networks.values() for layer in _lora_layers_of(network)]
        self._lora_slots = [slot for n in self.networks.values() for slot in _slots_of_lora_layers(n)]
        self.merged = MergedRollout(self._lora_layers, _ADAPTER)
        self._edited = _one_product_each(self._lora_layers) if config.lora.forward == "merged" else None
        self._dropouts: list[nn.Module] = [d for layer in self._lora_layers for d in layer.lora_dropout.values()]
        self._every_lora = self._named_lora_parameters()
        self._residency: OneExpertOnDevice | None = None
        if config.model.offload_inactive_expert:
            self._residency = OneExpertOnDevice(self.networks, self._every_lora.values(), device)
        self.parameters = self._every_lora
        if config.lora.other_expert:
            self.parameters = self._freeze_other_expert()
        if config.lora.init_from and fresh:
            started = start_lora.read_init(config)
            with start_lora.fitting(config.lora, "init_from"):
                self.load_lora(start_lora.own_part(config.lora, started, self.parameters))
        self.ema_weights = EmaWeights(self.parameters, config.objective.ema_decay)
        self._fake: _SecondLora | None = None
        if FAKE in adapters:
            assert len(self.networks) == 1, "the configuration refuses a second LoRA on two experts"
            self._fake = _SecondLora(config, self._lora_layers, self._every_lora, device)

    def _networks(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        read = self.family.load_transformers(dtype)
        return read_on_first(read, self.family.meta_transformers()) if self.sharding else read

    # --- the velocity fields ---

    @contextmanager
    def edit(self) -> Iterator[Velocity]:
        """LoRA on, trainable. Backward runs inside. LoRA dropout is active where gradients are: a validation has none."""
        modes = [m.training for m in self._dropouts]
        for module in self._dropouts:
            module.train(torch.is_grad_enabled())
        try:
            with nullcontext() if self._edited is None else self._placed(self._edited):
                yield self._velocity
        finally:
            if self._residency is not None:
                self._residency.held = None
            for module, mode in zip(self._dropouts, modes, strict=True):
                module.train(mode)

    @contextmanager
    def ema(self) -> Iterator[Velocity]:
        """The EMA weights (decay 0: the current ones), no gradient; as a LoRA, or merged into linears of their own.

        What is made inside may be inference tensors: clone outside what autograd shall save.
        """
        merged = self.config.objective.merges_rollout
        with (
            self.ema_weights.swapped_in(),
            self._placed(self.merged.of_this_moment()) if merged else nullcontext(),
            self._without_gradient(),
            in_lockstep(self._of_side, self.family.boundary, self.device) if self.sharding else nullcontext(self._velocity) as velocity,
        ):
            yield velocity

    @contextmanager
    def live(self) -> Iterator[Velocity]:
        """The current weights, no gradient, no dropout: for previews and editing."""
        with torch.no_grad():
            yield self._velocity

    @contextmanager
    def base(self) -> Iterator[Velocity]:
        """The frozen model without LoRA, bit for bit: its own linears stand where the LoRA's layers were.

        What is made inside may be inference tensors, as in `ema`.
        """
        with self._placed([layer.base_layer for layer in self._lora_layers]), self._without_gradient():
            yield self._base_velocity

    @contextmanager
    def fake(self) -> Iterator[Velocity]:
        """The second LoRA in the first one's place, over the same frozen linears, trainable. Backward runs inside."""
        assert self._fake is not None, "the objective has asked for the adapter"
        with self._placed(self._fake.linears):
            yield self._base_velocity

    def _without_gradient(self) -> AbstractContextManager[Any]:
        """Inference mode, which has no autograd bookkeeping at all."""
        # bitsandbytes' linears make state in their first call and keep it: it must not be made of inference tensors.
        # FSDP2 writes what it gathers into tensors that it has made before.
        keeps = self.sharding or self.config.model.quantization in ("int8", "nf4")
        return torch.no_grad() if keeps else torch.inference_mode()

    @contextmanager
    def _placed(self, linears: Sequence[nn.Module]) -> Iterator[None]:
        """One linear in each LoRA layer's place, without PEFT's work around it; what stood there is back on exit.

        PEFT's own enable_adapters() would flip requires_grad of the LoRA and forget what it was.
        """
        found = [getattr(parent, name) for parent, name in self._lora_slots]
        try:
            for (parent, name), linear in zip(self._lora_slots, linears, strict=True):
                setattr(parent, name, linear)
            yield
        finally:
            for (parent, name), module in zip(self._lora_slots, found, strict=True):
                setattr(parent, name, module)

    def _velocity(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """The velocity of each sample by the expert that serves its t."""
        experts, boundary = self.family.experts, self.family.boundary
        if boundary is None:
            return self._one_expert(experts[0], noisy, t, text, source)
        return by_expert(
            self._of_side, boundary, lambda: self._residency is None or self._residency.present != experts[1], noisy, t, text, source
        )

    def _of_side(self, high: bool, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        return self._one_expert(self.family.experts[not high], noisy, t, text, source)

    def after_backward(self) -> None:
        """Free what a backward pass of sharded weights has left whole."""
        if self._shards is not None:
            self._shards.after_backward()

    def _one_expert(self, expert: str, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        network = self.networks[expert]
        if self._residency is not None:
            self._residency.bring(expert)
            if torch.is_grad_enabled():
                self._residency.held = expert
        bfloat16 = self.config.train.mixed_precision == "bf16"
        # A CPU's fused attention takes ten times as long backward in bfloat16 as plain products do. Not with checkpointing: the
        # blocks are recomputed outside this context and would save other tensors.
        slow = bfloat16 and self.device.type == "cpu" and torch.is_grad_enabled() and not network.is_gradient_checkpointing
        plain = sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16), plain:
            return self.family.velocity(network, noisy, t, text, source)

    def _base_velocity(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        assert source is None, "the frozen base is a text-to-image model: it has no source tokens"
        return self._velocity(noisy, t, text, None)

    @contextmanager
    def off_device(self) -> Iterator[None]:
        """The networks are in main memory: for work that needs the device's memory. int8 and nf4 weights stay where they are."""
        # bitsandbytes' weights do not come back from the CPU as they were.
        stays = self.device.type != "cuda" or self.config.model.quantization in ("int8", "nf4") or bool(self.sharding)
        networks = [] if stays or self._residency else list(self.networks.values())
        if self._residency is not None:
            self._residency.clear()
        if not stays:
            self.merged.free()
        try:
            for network in networks:
                network.to("cpu")
            yield
        finally:
            for network in networks:
                network.to(self.device)

    # --- LoRA weights ---

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The LoRA that edits, and the second one where there is one."""
        second = {} if self._fake is None else {FAKE: Adapter(self._fake.parameters, EmaWeights(self._fake.parameters, 0.0))}
        return {EDIT: Adapter(self.parameters, self.ema_weights), **second}

    def set_strength(self, strength: float) -> None:
        """Scale of the LoRA's contribution; 1 = as trained."""
        lora = self.config.lora
        for layer in self._lora_layers:
            layer.scaling[_ADAPTER] = strength * lora.scale_numerator / lora.rank

    def _named_lora_parameters(self) -> dict[str, nn.Parameter]:
        """`<expert>.<module>.lora_A.weight` -> parameter: the names of the LoRA file."""
        named: dict[str, nn.Parameter] = {}
        for expert, network in self.networks.items():
            for name, parameter in network.named_parameters():
                if f".{_ADAPTER}." in name and not any(parameter is other for other in named.values()):
                    named[f"{expert}.{name.replace(f'.{_ADAPTER}.', '.')}"] = parameter
        return named

    def _freeze_other_expert(self) -> dict[str, nn.Parameter]:
        """Give the expert that is not trained its LoRA from a file; returns the parameters that are trained."""
        trained = self.family.experts[self.config.lora.experts != "high_noise"]
        own = {name: p for name, p in self._every_lora.items() if name.partition(".")[0] == trained}
        others = {name: p for name, p in self._every_lora.items() if name not in own}
        expert = next(iter(others)).partition(".")[0]
        found = start_lora.read_other_expert(self.config)
        with start_lora.fitting(self.config.lora, "other_expert"):
            self._set(others, {expert + name.removeprefix("transformer"): value for name, value in found.items()})
        for parameter in others.values():
            parameter.requires_grad_(False)
        return own

    def lora_files(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Weights by our names -> tensors of each LoRA file, by what follows the file's stem; see `lora.formats.written_files`."""
        every = self.export_lora({name: weights.get(name, p.detach()) for name, p in self._every_lora.items()})
        return written_files(every, self.family.name)

    def export_lora(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by our names -> the tensors of a LoRA file, with alpha / rank folded into B, so that alpha == rank.

        Every reader agrees on a file without alpha; few agree on one with it.
        """
        scale = self.config.lora.scale_numerator / self.config.lora.rank
        return {
            name: (value * scale if name.endswith(".lora_B.weight") else value).detach().cpu().contiguous().clone()
            for name, value in weights.items()
        }

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights from the tensors of a LoRA file in our naming.

        Raises:
            ValueError: modules or shapes are not this network's and this `[lora]` section's.
        """
        self._set(self.parameters, tensors)

    def _set(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        start_lora.refuse_misfit(tensors, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
        scale = self.config.lora.scale_numerator / self.config.lora.rank
        for name, parameter in parameters.items():
            value = tensors[name]
            if name.endswith(".lora_B.weight"):
                value = value.float() / scale
            parameter.data.copy_(value)


class _SecondLora:
    """Another LoRA over the frozen linears of a first one. It stands outside the network until its layers are placed there.

    Args:
        config: the whole configuration.
        layers: PEFT's layers of the first LoRA.
        named: the first one's parameters, A before B of each layer, whose names the second one has too.
        device: of the weights.
    """

    def __init__(self, config: Config, layers: Sequence[Any], named: Mapping[str, nn.Parameter], device: torch.device):
        # PEFT wraps whatever stands in a module: here the very linears that the first LoRA's layers hold.
        holder = nn.ModuleList([layer.base_layer for layer in layers])
        rng = torch.Generator().manual_seed(derived_seed(config.train.seed, FAKE, 0))
        _inject_lora(holder, config, r"\d+", device, rng)
        own = _lora_layers_of(holder)
        assert all(one.base_layer is other.base_layer for one, other in zip(own, layers, strict=True))
        self.linears: list[Any] = _one_product_each(own) if config.lora.forward == "merged" else own
        weights = [getattr(layer, side)[_ADAPTER].weight for layer in own for side in ("lora_A", "lora_B")]
        self.parameters: dict[str, nn.Parameter] = dict(zip(named, weights, strict=True))
        assert all(weight.shape == named[name].shape for name, weight in self.parameters.items())


def _one_product_each(layers: Sequence[Any]) -> list[MergedLinear]:
    return [MergedLinear(layer, _ADAPTER) for layer in layers]


def _share_lora(first: nn.Module, *others: nn.Module) -> None:
    """One LoRA in several networks: the same parameters, not copies."""
    for network in others:
        for source, target in zip(_lora_layers_of(first), _lora_layers_of(network), strict=True):
            for kind in ("lora_A", "lora_B"):
                getattr(target, kind)[_ADAPTER].weight = getattr(source, kind)[_ADAPTER].weight


def _lora_layers_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if _is_lora_layer(module)]


def _is_lora_layer(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _slots_of_lora_layers(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) of each LoRA layer, in the order of `modules()`."""
    names = [name.rpartition(".") for name, module in network.named_modules() if _is_lora_layer(module)]
    return [(network.get_submodule(parent), attribute) for parent, _, attribute in names]


def matched_linears(network: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that `lora.targets` matches.

    Raises:
        ValueError: the pattern is not a regular expression, takes too long, matches nothing, or matches something that is no linear.
    """
    # PEFT matches the same names by the same pattern after this.
    names = set(full_matches(pattern, (name for name, _ in network.named_modules()), "lora.targets"))
    matched = [(name, module) for name, module in network.named_modules() if name in names]
    if not matched:
        linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        shown = linears_in_blocks(network) or linears
        raise ValueError(f"lora.targets = {pattern!r} matches no module; it must match whole names such as {shown[0]} or {shown[-1]}")
    # bitsandbytes' linears are nn.Linear too.
    wrong = [name for name, module in matched if not isinstance(module, nn.Linear)]
    if wrong:
        raise ValueError(
            f"lora.targets = {pattern!r} also matches {wrong[0] or 'the whole network'}, which is not a linear; narrow the pattern"
        )
    return [name for name, _ in matched]


def lora_shapes(network: nn.Module, lora: LoraConfig, family: Family) -> list[tuple[int, int]]:
    """Shapes of all LoRA tensors that `[lora]` asks of this network (which may lie on the meta device)."""
    shapes = []
    for name in matched_linears(network, lora.targets or family.default_lora_targets):
        linear: Any = network.get_submodule(name)
        shapes += [(lora.rank, linear.in_features), (linear.out_features, lora.rank)]
    return shapes


def lora_layout(lora: LoraConfig, family: Family) -> dict[str, tuple[int, int]]:
    """Names and shapes of `DiffusersHost.parameters`, in their order; loads no weights."""
    networks = family.meta_transformers()
    if lora.experts == "shared":
        networks = dict([next(iter(networks.items()))])
    elif lora.other_expert:
        trained = family.experts[lora.experts != "high_noise"]
        networks = {trained: networks[trained]}
    layout: dict[str, tuple[int, int]] = {}
    for expert, network in networks.items():
        names = matched_linears(network, lora.targets or family.default_lora_targets)
        tensors = [f"{expert}.{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")]
        layout |= zip(tensors, lora_shapes(network, lora, family), strict=True)
    return layout


def _inject_lora(network: nn.Module, config: Config, targets: str, device: torch.device, rng: torch.Generator) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    from byg_plugin.hosts.lora_product import use_one_product

    matched_linears(network, targets)
    lora = config.lora
    peft_config = PeftLoraConfig(r=lora.rank, lora_alpha=lora.scale_numerator, lora_dropout=lora.dropout, target_modules=targets)
    inject_adapter_in_model(peft_config, network, adapter_name=_ADAPTER)
    for layer in _lora_layers_of(network):
        use_one_product(layer, _ADAPTER)
    if config.train.mixed_precision == "bf16":
        for layer in _lora_layers_of(network):
            # PEFT would cast the input to float32 for its A, and autocast back to bfloat16, into a copy for every layer that is
            # kept for backward. Without, layers of one input keep that one; the values are the same.
            layer.cast_input_dtype_enabled = False
    for name, parameter in network.named_parameters():
        is_lora = f".{_ADAPTER}." in name
        parameter.requires_grad_(is_lora)
        if is_lora:
            # PEFT draws A in the base's dtype and on its device. Drawn here instead: one seed gives one start on every
            # device and for every storage of the base.
            value = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=rng)
            parameter.data = value.to(device)
    network.eval()
    after_eval_(network)


def _probe_attention(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run the attention kernel once, forward and backward, on this device and dtype: before a model is loaded.

    Raises:
        ValueError: it cannot be used here, with the reason.
    """
    if backend == "native":
        return
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.modeling_utils import ModelMixin

    try:
        # Checks that the package is there and new enough; the kernel itself does not.
        ModelMixin().set_attention_backend(backend)
        q = torch.randn(1, 8, 2, 64, device=device, dtype=dtype, requires_grad=True)
        dispatch_attention_fn(q, q, q, backend=backend).sum().backward()
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'model.attention = "{backend}" cannot be used on {device.type} with {dtype}: {reason}. Use model.attention = "native"'
        ) from error
