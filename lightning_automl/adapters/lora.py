"""LoRA, rsLoRA and DoRA for convolutions of any kind, linear layers and attention.

Hu et al., *LoRA*, ICLR 2022, https://arxiv.org/abs/2106.09685 (section 4.1): ``h = W0 x + s B A x`` with frozen
``W0``, ``A`` of ``r`` rows and ``B = 0`` at the start; ``s = alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA
(Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732). DoRA (Liu et al., ICML 2024, https://arxiv.org/abs/2402.09353,
equation 5): ``W' = m (W0 + s B A) / ||W0 + s B A||`` with a learned magnitude an output and the norm held constant in
the gradient.

peft injects, switches and saves. Its layers for convolutions are wrong for dilation, padding modes and groups (peft
0.21: issues 3697, 2403, 2202), and its layer for attention changes the weights during the forward pass and adds the
update of the output projection twice; the layers here replace them and keep the names of the parameters:

- *Composition*, for ``nn.Linear`` and for ``nn.Conv2d`` without groups: ``A`` is a convolution with the base's kernel,
  stride, padding, dilation and padding mode to ``r`` channels, ``B`` one of 1 x 1.
- *Weight*, for groups, subclasses (static "same" padding, standardised weights) and DoRA: the base's own forward with
  the weight ``W0 + s B A``, where ``A`` is ``(r, inputs per group x kernel)`` and ``B`` ``(outputs, r)``. This is exact
  for whatever the layer does with its weight.

Some networks use the weight of a layer without calling it (torchvision's Swin, ``nn.MultiheadAttention``);
``layer.weight`` is therefore the weight with the adapter in it. There, dropout does not act, which a warning says.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import peft
import torch
from peft.tuners import lora
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_automl.adapters.anatomy import Anatomy, anatomy, base_module
from lightning_automl.adapters.injection import ImageTuner, base_modules, tuner_layers
from lightning_automl.adapters.registration import register
from lightning_automl.adapters.targets import resolve_targets
from lightning_automl.rundir import UnsupportedError, UserError


class LoraConfig(peft.LoraConfig):
    """What LoRA adapts, and how.

    Args:
        r: Rank, at least 1 and at most the smaller side of each adapted weight as a matrix.
        lora_alpha: Scale of the update, above 0; it is multiplied by ``lora_alpha / r``.
        lora_dropout: Probability, in [0, 1), with which inputs of ``A`` are dropped in training. Without effect, which
            a warning says, in ``nn.MultiheadAttention`` and in layers whose weight is used without calling them.
        use_rslora: Multiply by ``lora_alpha / sqrt(r)`` instead.
        use_dora: Learn the magnitude of each output apart from the direction. Each forward pass computes the norms of
            the weights anew, also in evaluation; merge the adapter before use.
        scale: Whether the factor is fixed, or learned for each layer from that value on; merged with the rest.
        target_modules: ``"auto"``, all layers but the first and the head for which the adapter is smaller than the
            layer; of these ``"conv"``, ``"linear"`` or ``"attention"``; or a regular expression for full names, or a
            list of full names or of their ends, which may name any layer.
        modules_to_save: Names of modules to train as a whole and to save and switch with the adapter. ``None`` is the
            head, ``[]`` nothing.
        rank_pattern: Ranks of layers by the end of their names, or by regular expressions for it.
        alpha_pattern: ``lora_alpha`` of layers in the same way.
        num_classes: Outputs of a new head for this adapter; ``None`` keeps the network's.
        base_digest: Filled when the adapter is added, see :func:`~lightning_automl.adapters.base_digest`. When given,
            the base must have it, and names are taken literally.
        peft_type: The method's name in files.

    Raises:
        UserError: If a value is out of its range.
    """

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        scale: Literal["fixed", "learnable"] = "fixed",
        target_modules: str | list[str] = "auto",
        modules_to_save: list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        num_classes: int | None = None,
        base_digest: str | None = None,
        peft_type: str = "IMAGE_LORA",
    ) -> None:
        for rank in (r, *(rank_pattern or {}).values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UserError(f"LoRA's rank r is {rank!r}; give an integer of at least 1, such as 8")
        for alpha in (lora_alpha, *(alpha_pattern or {}).values()):
            if not 0 < alpha < math.inf:
                raise UserError(f"lora_alpha is {alpha!r}; give a number above 0, such as r or 2 r")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout is {lora_dropout!r}; give a probability of at least 0 and below 1")
        if scale not in ("fixed", "learnable"):
            raise UserError(f"unknown scale {scale!r}; known: fixed, learnable")
        if use_dora and scale == "learnable":
            raise UserError("DoRA learns a magnitude for each output, so scale must be 'fixed' with use_dora")
        if num_classes is not None and (isinstance(num_classes, bool) or num_classes < 1):
            raise UserError(f"num_classes is {num_classes!r}; give the number of labels, or nothing to keep the head")
        super().__init__(
            r=r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=modules_to_save,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
        )
        self.target_modules: Any = target_modules  # peft makes a set of a list
        self.peft_type = PeftType(peft_type)
        self.scale = scale
        self.num_classes = num_classes
        self.base_digest = base_digest

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as they go into a file."""
        return {
            "peft_type": PeftType(self.peft_type).value,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "scale": self.scale,
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules],
            "modules_to_save": None if self.modules_to_save is None else [*self.modules_to_save],
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "num_classes": self.num_classes,
            "base_digest": self.base_digest,
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, without the name of the network's class."""
        kwargs.pop("auto_mapping_dict", None)
        super().save_pretrained(save_directory, **kwargs)

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this full name."""
        ranks = self.rank_pattern or {}
        return int(ranks.get(get_pattern_key(list(ranks), name), self.r))


class Magnitude(nn.Module):
    """DoRA's magnitude of each output; a module, as in peft, so that the names in files agree.

    Args:
        weight: Initial values, one an output.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoraLayer(nn.Module, lora.LoraLayer):
    """A layer with low-rank updates of its weight, one an adapter name.

    Args:
        base_layer: The layer to adapt; stays as it is, below the attribute of this name.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        r: Its rank in this layer.
        lora_alpha: Its alpha in this layer.
    """

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_scale")

    #: Name of the base layer's parameter that is adapted.
    weight_name = "weight"
    #: Shape of DoRA's magnitudes, as in peft.
    magnitude_shape: tuple[int, ...] = (-1,)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        super().__init__()
        lora.LoraLayer.__init__(self, base_layer)
        self.lora_scale = nn.ParameterDict()
        #: Base weights by name as they were before the merge; empty when nothing is merged.
        self.originals: dict[str, Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def __getattr__(self, name: str) -> Any:
        # Networks ask their layers for more than the output: kernel_size, in_channels, num_heads, …
        if (modules := self.__dict__.get("_modules")) is not None and name in modules:  # as fast as can be
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def factors(self, r: int) -> tuple[nn.Module, nn.Module]:
        """``A`` and ``B``, with weights ``(r, …)`` and ``(outputs, r, …)``."""
        raise NotImplementedError

    @property
    def composes(self) -> bool:
        """Whether ``B(A(x))`` is what the update adds to the output."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter, or make one of this name anew."""
        side = min(self.in_features_of_matrix, self.base_weight.shape[0])
        assert 0 < r <= side, (r, side)  # LoraModel.resolve has seen to it
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_bias[adapter_name] = False
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name], self.lora_B[adapter_name] = self.factors(r)
        self.reset_lora_parameters(adapter_name, True)  # type: ignore[no-untyped-call]
        if config.scale == "learnable":
            self.lora_scale[adapter_name] = nn.Parameter(torch.tensor(self.scaling[adapter_name]))
        if config.use_dora:
            norms = _norms(self.base_weight.detach())
            self.lora_magnitude_vector[adapter_name] = Magnitude(norms.view(self.magnitude_shape))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def base_weight(self) -> Tensor:
        """The base layer's parameter, with the adapter in it if that is merged."""
        weight: Tensor = getattr(self.base_layer, self.weight_name)
        return weight

    @property
    def in_features_of_matrix(self) -> int:
        """Columns of the weight as a matrix."""
        return self.base_weight[0].numel()

    def applied(self, names: Iterable[str] | None = None) -> list[str]:
        """Those of the named adapters, by default of the active ones, that this layer has."""
        present = self.lora_A
        return [name for name in (self.active_adapters if names is None else names) if name in present]

    def scale(self, name: str) -> Tensor | float:
        """The factor of the adapter's update."""
        learned = self.lora_scale
        scale: Tensor | float = learned[name] if name in learned else self.scaling[name]
        return scale

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B A`` in the shape of the base weight."""
        first, second = _weight(self.lora_A[adapter]), _weight(self.lora_B[adapter])
        with torch.autocast(first.device.type, enabled=False):
            product = second.flatten(1) @ first.flatten(1)
            return (product * self.scale(adapter)).reshape(self.base_weight.shape)

    def weights(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """The part of the adapted weight that comes from the base weight, and the adapted weight.

        Args:
            names: Adapters, applied in this order.
        """
        kept = adapted = self.base_weight
        for name in names:
            adapted = adapted + self.get_delta_weight(name).to(adapted.dtype)
            if self.use_dora[name]:
                # Section 4.3 of the paper: the norm is a constant in the backward pass.
                norm = _norms(adapted.detach()).clamp_min(torch.finfo(adapted.dtype).tiny)
                factor = _weight(self.lora_magnitude_vector[name]).flatten().to(adapted.dtype) / norm
                factor = factor.view(-1, *(1,) * (adapted.ndim - 1))
                kept, adapted = kept * factor, adapted * factor
        return kept, adapted

    def effective_weight(self) -> Tensor:
        """The weight that the layer acts with now."""
        if self.disable_adapters:
            return self.originals.get(self.weight_name, self.base_weight)
        names = [] if self.merged else self.applied()
        return self.weights(names)[1] if names else self.base_weight

    @property
    def weight(self) -> Tensor:
        """The weight that the layer acts with now, for networks that use it without a call."""
        return self.effective_weight()

    def call_base(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with other weights."""
        return functional_call(self.base_layer, dict(weights), args, kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward, with the active adapters."""
        if self.disable_adapters and self.merged:
            return self.call_base(self.originals, x, *args, **kwargs)
        names = [] if self.disable_adapters or self.merged else self.applied()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.composes and not any(self.use_dora[name] for name in names):
            result = self.base_layer(x, *args, **kwargs)
            for name in names:
                first: Any = self.lora_A[name]
                inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(first.weight.dtype)
                if type(dropout := self.lora_dropout[name]) is not nn.Identity:
                    inputs = dropout(inputs)
                result = result + (self.lora_B[name](first(inputs)) * self.scale(name)).to(result.dtype)
            return result
        kept, adapted = self.weights(names)
        drop = next(
            (self.lora_dropout[name] for name in names if isinstance(self.lora_dropout[name], nn.Dropout)), None
        )
        if drop is None or not self.training:
            return self.call_base({"weight": adapted}, x, *args, **kwargs)
        # What the update adds to the output, for an input of which some values are dropped.
        result = self.call_base({"weight": kept}, x, *args, **kwargs)
        dropped = drop(x)
        if type(self.base_layer) in _LINEAR:
            bias = self.base_layer._parameters["bias"]
            update = {"weight": adapted - kept} | ({} if bias is None else {"bias": torch.zeros_like(bias)})
            return result + self.call_base(update, dropped, *args, **kwargs)
        # A difference of two passes, as a subclass need not be linear in its weight.
        with_update = self.call_base({"weight": adapted}, dropped, *args, **kwargs)
        return result + with_update - self.call_base({"weight": kept}, dropped, *args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; which parameters train is not touched, unlike in peft."""
        self._disable_adapters = not enabled

    def train(self, mode: bool = True) -> "LoraLayer":
        """Set the mode.

        Raises:
            RuntimeError: If training is asked for while an adapter is merged, as the merged weight would not train.
        """
        if mode and self.merged:
            raise RuntimeError(_MERGED.format("train"))
        super().train(mode)
        return self

    def merged_weight(self, names: Iterable[str] | None = None) -> Tensor:
        """The base weight with the adapters in it.

        Raises:
            RuntimeError: If it is not finite.
        """
        with torch.no_grad():
            weight = self.weights(self.applied(names))[1]
        if not torch.isfinite(weight).all():
            raise RuntimeError(
                f"adapter {', '.join(self.applied(names))} gives weights that are not finite, so it was not merged and "
                "the base is as before; use an earlier checkpoint"
            )
        return weight

    def set_merged(self, weight: Tensor, names: list[str]) -> None:
        """Put a merged weight into the base and keep the old one."""
        base = self.base_weight
        self.originals = {self.weight_name: base.detach().clone()}
        base.data.copy_(weight)
        self.merged_adapters = list(names)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight, and keep a copy of it.

        Args:
            safe_merge: Has no effect: values are always checked first.
            adapter_names: By default those that are active.

        Raises:
            RuntimeError: If an adapter is merged already, or the result is not finite; the base is then as before.
        """
        if self.merged:
            raise RuntimeError(_MERGED.format("merge again"))
        if names := self.applied(adapter_names):
            self.set_merged(self.merged_weight(names), names)

    def unmerge(self) -> None:
        """Put the base weight back as it was, bit by bit.

        Raises:
            RuntimeError: If no adapter is merged.
        """
        if not self.merged:
            raise RuntimeError(_NOT_MERGED)
        self.base_weight.data.copy_(self.originals[self.weight_name])
        self.originals = {}
        self.merged_adapters = []


class LoraLinear(LoraLayer):
    """A linear layer with low-rank updates."""

    def factors(self, r: int) -> tuple[nn.Module, nn.Module]:
        """``A`` with weight ``(r, inputs)`` and ``B`` with ``(outputs, r)``."""
        outputs, inputs = self.base_weight.shape
        return nn.Linear(inputs, r, bias=False), nn.Linear(r, outputs, bias=False)

    @property
    def composes(self) -> bool:
        """Whether ``B(A(x))`` is what the update adds to the output."""
        return type(self.base_layer) in _LINEAR


class LoraConv2d(LoraLayer):
    """A convolution with low-rank updates."""

    magnitude_shape = (1, -1, 1, 1)

    def factors(self, r: int) -> tuple[nn.Module, nn.Module]:
        """``A`` with weight ``(r, inputs per group, height, width)`` and ``B`` with ``(outputs, r, 1, 1)``."""
        base: Any = self.base_layer
        first = nn.Conv2d(
            *(base.weight.shape[1], r, base.kernel_size, base.stride, base.padding, base.dilation),
            bias=False,
            padding_mode=base.padding_mode,
        )
        return first, nn.Conv2d(r, base.weight.shape[0], 1, bias=False)

    @property
    def composes(self) -> bool:
        """Whether ``B(A(x))`` is what the update adds to the output."""
        return type(self.base_layer) is nn.Conv2d and self.base_layer.groups == 1


class LoraMultiheadAttention(LoraLayer):
    """An attention with low-rank updates of its input projection; the output projection has a layer of its own."""

    weight_name = "in_proj_weight"

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        assert isinstance(base_layer, nn.MultiheadAttention)
        projection = LoraLinear(base_layer.out_proj, adapter_name, config, r, lora_alpha)
        base_layer.out_proj = projection  # type: ignore[assignment]
        super().__init__(base_layer, adapter_name, config, r, lora_alpha)

    def factors(self, r: int) -> tuple[nn.Module, nn.Module]:
        """``A`` with weight ``(r, width)`` and ``B`` with ``(3 width, r)``."""
        outputs, inputs = self.base_weight.shape
        return nn.Linear(inputs, r, bias=False), nn.Linear(r, outputs, bias=False)

    @property
    def composes(self) -> bool:
        """An attention has its weights inside."""
        return False

    @property
    def projection(self) -> LoraLinear:
        """The layer around the output projection."""
        attention: Any = self.base_layer
        layer: LoraLinear = attention.out_proj
        return layer

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight that the input projection acts with now."""
        return self.effective_weight()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter to both projections."""
        super().update_layer(adapter_name, r, lora_alpha, config)
        if adapter_name not in self.projection.lora_A:
            self.projection.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention with the active adapters; it takes the weight of the output projection from its layer."""
        return self.call_base({self.weight_name: self.effective_weight()}, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into both projections, see :meth:`LoraLayer.merge`."""
        if not self.merged:
            self.projection.merged_weight(adapter_names)  # raises before the first is touched
        super().merge(safe_merge, adapter_names)
        self.projection.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put both weights back as they were."""
        super().unmerge()
        if self.projection.merged:
            self.projection.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer for peft's ``merge_and_unload`` and ``unload``."""
        if merge:
            self.merge(safe_merge, adapter_names)
        self.base_layer.out_proj = self.projection.base_layer
        return self.base_layer


class LoraModel(ImageTuner, lora.LoraModel):
    """peft's LoRA tuner with the layers of this file."""

    prefix: str = "lora_"
    tuner_layer_cls: type[lora.LoraLayer] = LoraLayer

    def resolve(self, config: LoraConfig, network: nn.Module) -> list[str]:
        """Full names of the layers to adapt; see the arguments of :class:`LoraConfig`."""
        modules = {name: base_module(module) for name, _, module in base_modules(network)}
        if config.base_digest is None:
            found = anatomy(network)
            names = resolve_targets(network, config.target_modules, config.r, found)
            if config.lora_dropout and (silent := [name for name in names if _uses_weight_alone(name, found)]):
                warnings.warn(
                    f"lora_dropout has no effect in {', '.join(silent[:5])}"
                    + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
                    + ", as the network uses the weight there without calling a layer",
                    stacklevel=2,
                )
        else:
            wanted = config.target_modules
            names = [name for name in modules if re.fullmatch(wanted, name)] if isinstance(wanted, str) else [*wanted]
            if missing := [name for name in names if name not in modules]:
                raise UserError(
                    f"the adapter was made for another architecture: this network has no {', '.join(missing[:10])}"
                    + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
                    + "; load the network that it was trained on"
                )
        for name in names:
            _check_layer(name, modules[name])
            shapes = [weight.flatten(1).shape for weight in _matrices(modules[name])]
            rank, side = config.rank_of(name), min(min(shape) for shape in shapes)
            matrices = " and ".join(f"{rows} x {columns}" for rows, columns in shapes)
            if rank > side:
                raise UserError(
                    f"rank {rank} is more than the smaller side of {name} ({matrices}); give at most {side}, in r or "
                    "in rank_pattern, or leave the layer out of target_modules"
                )
            if rank == side:
                warnings.warn(
                    f"rank {rank} of {name} is its full rank ({matrices}): the adapter can give any weight and is "
                    "larger than the layer",
                    stacklevel=2,
                )
        return names

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> LoraLayer:
        layer = next(layer for kind, layer in _LAYERS.items() if isinstance(target, kind))
        return layer(target, adapter_name, lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"])

    def train(self, mode: bool = True) -> "LoraModel":
        """Set the mode of the network; see :meth:`LoraLayer.train`."""
        if mode and any(layer.merged for layer in tuner_layers(self.model)):
            raise RuntimeError(_MERGED.format("train"))
        super().train(mode)
        return self

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the base weights of all layers, or of none; see :meth:`LoraLayer.merge`."""
        merge_layers(self.model, adapter_names)

    def unmerge_adapter(self) -> None:
        """Put all base weights back as they were, bit by bit.

        Raises:
            RuntimeError: If no adapter is merged.
        """
        merged = [layer for layer in tuner_layers(self.model) if layer.merged]
        if not merged:
            raise RuntimeError(_NOT_MERGED)
        for layer in merged:
            LoraLayer.unmerge(layer)


def merge_layers(network: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Put adapters into the weights of all :class:`LoraLayer` of a network, or of none; see :meth:`LoraLayer.merge`."""
    layers: list[LoraLayer] = list(tuner_layers(network))
    if any(layer.merged for layer in layers):
        raise RuntimeError(_MERGED.format("merge again"))
    weights = [
        (layer, names, layer.merged_weight(names)) for layer in layers if (names := layer.applied(adapter_names))
    ]
    for layer, names, weight in weights:
        layer.set_merged(weight, names)


_MERGED = "cannot {} while an adapter is merged into the weights; unmerge it first"
#: Classes whose output is linear in the weight; subclasses may be anything.
_LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d)
_NOT_MERGED = "cannot unmerge: no adapter is merged into the weights"
_LAYERS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Conv2d: LoraConv2d,
    nn.Linear: LoraLinear,
    nn.MultiheadAttention: LoraMultiheadAttention,
}


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = weight.flatten(1).norm(dim=1)
    return norms


def _matrices(module: Any) -> list[Tensor]:
    if isinstance(module, nn.MultiheadAttention):
        return [module.in_proj_weight, module.out_proj.weight]
    return [module.weight]


def _uses_weight_alone(name: str, found: Anatomy) -> bool:
    return found.kinds.get(name) == "attention" or (name in found.kinds and name not in found.shapes)


def _check_layer(name: str, module: nn.Module) -> None:
    if not isinstance(module, tuple(_LAYERS)):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__}, which LoRA does not adapt here; known: "
            f"{', '.join(kind.__name__ for kind in _LAYERS)} and their subclasses"
        )
    if isinstance(module, nn.MultiheadAttention):
        known = module._qkv_same_embed_dim
    else:
        known = "weight" in module._parameters
    if not known:
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} whose weight is not one parameter (separate key and value sizes, or "
            "a parametrisation), which LoRA does not adapt here; leave it out of target_modules"
        )


register("image_lora", LoraConfig, LoraModel, "lora_")
