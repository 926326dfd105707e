"""Which modules of a network get adapters, by kind and size, by pattern or by name; and what adapters a network has."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lightning_automl.adapters.anatomy import (
    Anatomy,
    anatomy,
    base_module,
    layer_kind,
    plain_modules,
    plain_network,
)
from lightning_automl.rundir import UnsupportedError, UserError

#: Words that choose by themselves.
CHOICES = ("auto", "conv", "linear", "attention", "all-linear")

Targets = str | Sequence[str] | None


def resolve_targets(network: nn.Module, target_modules: Targets, rank: int, found: Anatomy | None = None) -> list[str]:
    """Full names of the weight layers that get an adapter of low rank.

    Args:
        network: With or without adapters.
        target_modules: ``auto`` (or ``None``): every weight layer but the stem and the head for which an adapter of
            this rank has fewer parameters than the layer, ``r (out + in) < out * in`` with ``in`` being ``channels /
            groups * height * width`` of a convolution's kernel. ``conv``, ``linear`` and ``attention``: those of them
            that are convolutions, linear layers, or projections of an attention. ``all-linear``: every linear layer but
            the head, as in peft. Any other string is a regular expression for whole names; a list has names or their
            last parts. Both may choose the stem and the head.
        rank: Rank of the adapters.
        found: The anatomy of the network, if it is known.

    Returns:
        Names, in the order in which an image passes them.

    Raises:
        UserError: If there is no such layer; the sentence lists candidates.
        UnsupportedError: If what is chosen is no weight layer that can have an adapter.
    """
    found = found or anatomy(network)
    modules = plain_modules(network)
    layers = _layers(modules, found)
    if target_modules is None or (isinstance(target_modules, str) and target_modules in CHOICES):
        choice = target_modules or "auto"
        if choice == "all-linear":
            chosen = [name for name in found.layers if found.kinds[name] == "linear" and name not in found.head]
        else:
            chosen = [
                name
                for name in found.layers
                if name not in (*found.stems, *found.head)
                and _is(choice, name, found)
                and _adaptable(modules[name])
                and adapter_size(modules[name], rank) < layer_size(modules[name])
            ]
        if not chosen:
            raise _none_fits(choice, rank, found, modules)
        return chosen
    return _by_hand(target_modules, layers, modules, found.head)


def resolve_blocks(
    network: nn.Module, scheme: str, target_modules: Targets = "auto", found: Anatomy | None = None
) -> dict[str, dict[str, Any]]:
    """Full names of the modules that get a convolutional adapter, each with the geometry of the adapter.

    Args:
        network: With or without adapters.
        scheme: ``conv_parallel`` and ``conv_sequential`` adapt convolutions, together with the norm and activation
            behind one if it stands in an ``nn.Sequential`` of its own; ``residual_parallel`` and
            ``residual_sequential`` adapt blocks.
        target_modules: ``auto`` (or ``None``): every convolution with a kernel larger than one pixel but the stem, or
            every block with such a convolution that maps images to images. Any other string is a regular expression for
            whole names; a list has names or their last parts.
        found: The anatomy of the network, if it is known.

    Returns:
        For each name ``in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode``, as a
        convolution takes them that gives an output of the shape of the module's: from the module's input (parallel
        schemes) or from its output (sequential schemes, stride 1). Sizes are lists of two numbers. The order is that in
        which an image passes.

    Raises:
        UserError: If there is no such module, or the shapes of one chosen by hand cannot be met by a convolution.
        UnsupportedError: If what is chosen by hand does not map images to images.
    """
    found = found or anatomy(network)
    modules = plain_modules(network)
    of_convolutions = scheme.startswith("conv")
    if of_convolutions:
        known = _convolution_blocks(found, modules)
    else:
        known = [
            name
            for name in found.blocks
            if name not in found.kinds and _maps_images(name, found) and _spatial(name, found, modules) is not None
        ]
    if target_modules is None or target_modules == "auto":
        geometries = {name: _geometry(name, scheme, found, modules) for name in known}
        chosen = {name: geometry for name, geometry in geometries.items() if geometry is not None}
        if not chosen:
            what = "convolution of more than one pixel" if of_convolutions else "block that maps images to images"
            advice = _listing("name one in target_modules", _image_modules(found), modules) or "choose LoraConfig"
            raise UserError(
                f"a {scheme} adapter needs a {what} behind the stem, and {_network(network)} has none; {advice}"
            )
        return chosen
    names = _by_hand(target_modules, [name for name in found.shapes if name], modules, (), known)
    chosen = {}
    for name in names:
        if not _maps_images(name, found):
            raise UnsupportedError(
                f"{name} ({_class(modules[name])}) does not map images to images, as a convolutional adapter does"
                f"{_listing('; candidates', known, modules)}"
            )
        geometry = _geometry(name, scheme, found, modules)
        if geometry is None:
            given, gave = found.shapes[name]
            raise UserError(
                f"{name} maps {_by(given)} to {_by(gave)}, which no convolution of its kind does; take it out of "
                "target_modules"
            )
        chosen[name] = geometry
    return chosen


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight of a layer as a matrix: outputs, and inputs of one of them.

    A convolution has ``channels / groups * height * width`` columns. An attention is taken by the sum over its
    projections, so this is that of its input projection.
    """
    base: Any = base_module(module)
    if isinstance(base, nn.MultiheadAttention):
        return 3 * base.embed_dim, base.embed_dim
    if isinstance(base, nn.Conv2d):
        height, width = base.kernel_size
        return base.out_channels, base.in_channels // base.groups * height * width
    return base.out_features, base.in_features


def layer_size(module: nn.Module) -> int:
    """Number of weights of a layer, adapted or not, without its bias."""
    rows, columns = matrix_shape(module)
    is_attention = isinstance(base_module(module), nn.MultiheadAttention)
    return rows * columns + (columns * columns if is_attention else 0)


def adapter_size(module: nn.Module, rank: int) -> int:
    """Number of parameters of a low-rank adapter: ``r (out + in)``, summed over the projections of an attention."""
    rows, columns = matrix_shape(module)
    is_attention = isinstance(base_module(module), nn.MultiheadAttention)
    return rank * (rows + columns + (2 * columns if is_attention else 0))


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """What an adapter adds to a network, and what of it trains.

    Args:
        model: A model of peft, or a network with adapters.
        adapter: Name of the adapter; the active one when left out.

    Returns:
        ``adapter`` (its name), ``layers`` (a row an adapted module: ``name``, ``kind``, ``class``, ``weight`` (shape,
        for weight layers), ``rank`` if it has one, ``size`` (parameters of the module itself), ``parameters`` (of the
        adapter)), ``saved`` (a row a module that is trained and saved with it, such as the head: ``name``, ``class``,
        ``parameters``), and the numbers of parameters ``base`` (the network without adapters), ``in_adapter``,
        ``in_saved``, ``trainable`` and ``share`` (``trainable`` of ``base``, in [0, 1] as a rule).
    """
    layers: list[dict[str, Any]] = []
    saved: list[dict[str, Any]] = []
    added = _added(model)
    for name, module in plain_modules(model).items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", {})
            chosen = adapter or _active(module)
            if chosen in copies:
                parameters = sum(parameter.numel() for parameter in copies[chosen].parameters())
                saved.append({"name": name, "class": _class(module), "parameters": parameters})
        for layer_name, layer in _tuner_layers(name, module):
            base: Any = base_module(layer)
            chosen = adapter or _active(layer)
            count = _adapter_parameters(layer, chosen)
            if count is None:
                continue
            kind = layer_kind(layer)
            row: dict[str, Any] = {"name": layer_name, "kind": kind or "block", "class": type(base).__name__}
            if kind is not None:
                weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
                row["weight"] = list(weight.shape)
            ranks = getattr(layer, "r", None)
            if isinstance(ranks, Mapping) and chosen in ranks:
                row["rank"] = ranks[chosen]
            row["size"] = sum(parameter.numel() for parameter in base.parameters() if id(parameter) not in added)
            layers.append(row | {"parameters": count})
    base_count = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in added)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    chosen = adapter or next((_active(layer) for layer in model.modules() if isinstance(layer, BaseTunerLayer)), None)
    return {
        "adapter": chosen,
        "layers": layers,
        "saved": saved,
        "base": base_count,
        "in_adapter": sum(row["parameters"] for row in layers),
        "in_saved": sum(row["parameters"] for row in saved),
        "trainable": trainable,
        "share": trainable / base_count if base_count else 0.0,
    }


def describe_adapters(model: PeftModel | nn.Module, adapter: str | None = None) -> str:
    """A table of what an adapter adds to a network, for people: see :func:`adapter_parameters`."""
    facts = adapter_parameters(model, adapter)
    rows = [["adapted module", "kind", "weight", "rank", "parameters", "of the module's"]]
    for row in facts["layers"]:
        share = f"{row['parameters'] / row['size']:.1%}" if row["size"] else ""
        weight = _by(row["weight"]) if "weight" in row else row["class"]
        rows.append(
            [
                row["name"],
                row["kind"],
                weight,
                str(row.get("rank", "")),
                f"{row['parameters']:,}",
                f"{share} of {row['size']:,}",
            ]
        )
    for row in facts["saved"]:
        rows.append([row["name"], "trained in full", row["class"], "", f"{row['parameters']:,}", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (3, 4)
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.append(
        f"{facts['in_adapter']:,} parameters in {len(facts['layers'])} adapters, {facts['in_saved']:,} in "
        f"{len(facts['saved'])} modules trained in full; {facts['trainable']:,} parameters train, "
        f"{facts['share']:.2%} of the {facts['base']:,} of the network"
    )
    return "\n".join(lines)


def _added(model: nn.Module) -> set[int]:
    """Identities of the parameters that the network without adapters does not have."""
    added: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inner = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
            added |= {id(parameter) for parameter in module.parameters()} - {
                id(parameter) for parameter in inner.parameters()
            }
    return added


def _tuner_layers(name: str, module: nn.Module) -> Iterable[tuple[str, Any]]:
    """The adapted module, or those within an attention whose projections are adapted one by one."""
    if isinstance(module, BaseTunerLayer):
        yield name, module
    elif layer_kind(module) is not None:
        for inner_name, inner in module.named_modules():
            if inner_name and isinstance(inner, BaseTunerLayer):
                yield f"{name}.{inner_name}", inner


def _adapter_parameters(layer: BaseTunerLayer, adapter: str | None) -> int | None:
    """Number of parameters of one adapter of a layer, ``None`` if it has no such adapter.

    An attention has a layer of its own for its output projection inside; that counts too.
    """
    layers = [layer]
    base = layer.get_base_layer()
    if isinstance(base, nn.MultiheadAttention):
        layers += [inner for inner in base.modules() if isinstance(inner, BaseTunerLayer)]
    found: dict[int, int] = {}
    known = False
    for one in layers:
        for attribute in one.adapter_layer_names:
            adapters = getattr(one, attribute, None)
            if adapters is None or adapter not in adapters:
                continue
            known = True
            part = adapters[adapter]
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                if isinstance(parameter, nn.Parameter):
                    found[id(parameter)] = parameter.numel()
    return sum(found.values()) if known else None


def _active(module: Any) -> str | None:
    names = module.active_adapters
    return names[0] if names else None


def _network(network: nn.Module) -> str:
    return _class(plain_network(network))


def _class(module: nn.Module) -> str:
    return type(base_module(module)).__name__


def _by(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _is(choice: str, name: str, found: Anatomy) -> bool:
    if choice == "attention":
        return name in found.attention
    return choice == "auto" or found.kinds[name] == choice


def _adaptable(module: nn.Module) -> bool:
    """Whether a weight layer can have an adapter of low rank."""
    base = base_module(module)
    return not isinstance(base, nn.MultiheadAttention) or base._qkv_same_embed_dim


def _layers(modules: Mapping[str, nn.Module], found: Anatomy) -> list[str]:
    """All weight layers, those that no image passes in evaluation mode last."""
    others = [name for name, module in modules.items() if layer_kind(module) is not None and name not in found.kinds]
    return [*found.layers, *others]


def _by_hand(
    targets: str | Sequence[str],
    known: Sequence[str],
    modules: Mapping[str, nn.Module],
    head: Sequence[str],
    listed: Sequence[str] | None = None,
) -> list[str]:
    """Those of ``known`` that a regular expression or a list of names or last parts chooses."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise UserError(f"target_modules is empty; give names, a pattern, or one of {', '.join(CHOICES)}")
    candidates = list(listed if listed is not None else known)
    candidates = [name for name in candidates if name not in head] + [name for name in candidates if name in head]
    chosen: set[str] = set()
    for pattern in patterns:
        matching = _matching(pattern, isinstance(targets, str), modules)
        fitting = [name for name in matching if name in known]
        refused = [name for name in fitting if layer_kind(modules[name]) and not _adaptable(modules[name])]
        if refused or (matching and not fitting):
            name = (refused or matching)[0]
            reason = " with keys or values of another width" if refused else ""
            raise UnsupportedError(
                f"{name} is a {_class(modules[name])}{reason}, which this adapter cannot be put on"
                f"{_listing('; candidates', _closest(name, candidates), modules)}"
            )
        if not matching:
            words = f"; {', '.join(CHOICES)} choose by themselves" if isinstance(targets, str) else ""
            raise UserError(
                f"no module is called {pattern!r}{_listing('; closest', _closest(pattern, candidates), modules)}{words}"
            )
        chosen.update(fitting)
    return [name for name in known if name in chosen]


def _matching(pattern: str, is_expression: bool, modules: Mapping[str, nn.Module]) -> list[str]:
    if not is_expression:
        return [name for name in modules if name and (name == pattern or name.endswith(f".{pattern}"))]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"target_modules {pattern!r} is no regular expression ({error})") from error
    return [name for name in modules if name and expression.fullmatch(name)]


def _closest(pattern: str, names: Sequence[str]) -> list[str]:
    """Names, the most similar to the pattern first."""
    plain = re.sub(r"[^\w.]+", "", pattern)
    near = difflib.get_close_matches(plain, names, n=8, cutoff=0.3)
    near += [name for name in names if name.split(".")[-1] == plain.split(".")[-1] and name not in near]
    return [*near, *(name for name in names if name not in near)]


def _listing(title: str, names: Sequence[str], modules: Mapping[str, nn.Module], limit: int = 8) -> str:
    """Names with class and size, cut after ``limit``."""
    if not names:
        return ""
    shown = []
    for name in names[:limit]:
        base: Any = base_module(modules[name])
        weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else getattr(base, "weight", None)
        size = f" {_by(weight.shape)}" if layer_kind(base) is not None and weight is not None else ""
        shown.append(f"{name} ({type(base).__name__}{size})")
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title}: {', '.join(shown)}{more}"


def _none_fits(choice: str, rank: int, found: Anatomy, modules: Mapping[str, nn.Module]) -> UserError:
    inner = [name for name in found.layers if name not in (*found.stems, *found.head)]
    of_choice = [name for name in inner if _is(choice, name, found) and _adaptable(modules[name])]
    if not of_choice:
        kinds = {
            "conv": "convolution",
            "linear": "linear layer",
            "all-linear": "linear layer",
            "attention": "projection of an attention",
        }
        what = kinds.get(choice, "weight layer")
        return UserError(
            f"target_modules is {choice}, but between stem and head there is no {what}"
            f"{_listing('; candidates', inner or found.layers, modules)}"
        )
    ranks = {name: (layer_size(modules[name]) - 1) // adapter_size(modules[name], 1) for name in of_choice}
    best = max(of_choice, key=ranks.__getitem__)
    advice = f"give a rank of {ranks[best]} or less" if ranks[best] > 0 else "name layers in target_modules"
    by_size = sorted(of_choice, key=lambda name: -layer_size(modules[name]))
    return UserError(
        f"an adapter of rank {rank} has no fewer parameters than any layer that target_modules {choice} may choose; "
        f"{advice}"
        f"{_listing('; candidates', by_size, modules)}"
    )


def _convolution_blocks(found: Anatomy, modules: Mapping[str, nn.Module]) -> list[str]:
    """Convolutions with a kernel larger than a pixel, or the container of one and its norm; never the stem."""
    names = []
    for name in found.layers:
        base = base_module(modules[name])
        if name in (*found.stems, *found.head) or name not in found.shapes or not isinstance(base, nn.Conv2d):
            continue
        if max(base.kernel_size) > 1:
            parent = name.rpartition(".")[0]
            names.append(parent if _is_container(parent, name, found, modules) else name)
    return names


def _is_container(parent: str, name: str, found: Anatomy, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``parent`` is a convolution with what is done to its output, and nothing else."""
    container = base_module(modules[parent])
    if not parent or not isinstance(container, nn.Sequential) or parent not in found.shapes or len(container) < 2:
        return False
    first = next(iter(container.children()))
    others = [base_module(modules[other]) for other in modules if other.startswith(f"{parent}.") and other != name]
    weights = [other.weight for other in others if isinstance(getattr(other, "weight", None), nn.Parameter)]
    return (
        base_module(first) is base_module(modules[name])
        and found.shapes[parent] == found.shapes[name]
        and all(weight.ndim == 1 for weight in weights)
    )


def _image_modules(found: Anatomy) -> list[str]:
    """What a user may name: modules behind the stem with something learned that map images to images."""
    return [
        name
        for name in found.shapes
        if name
        and _maps_images(name, found)
        and not any(f"{stem}.".startswith(f"{name}.") for stem in found.stems)
        and any(f"{layer}.".startswith(f"{name}.") for layer in found.layers)
    ]


def _maps_images(name: str, found: Anatomy) -> bool:
    return name in found.shapes and all(len(shape) == 3 for shape in found.shapes[name])


def _spatial(name: str, found: Anatomy, modules: Mapping[str, nn.Module]) -> nn.Conv2d | None:
    """The first convolution with a kernel larger than a pixel in a module, or the module itself."""
    for layer in found.layers:
        base = base_module(modules[layer])
        is_inside = layer == name or layer.startswith(f"{name}.")
        if is_inside and isinstance(base, nn.Conv2d) and max(base.kernel_size) > 1 and _maps_images(layer, found):
            return base
    return None


def _channels_last(name: str, found: Anatomy, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module takes images ``(height, width, channels)``, as some blocks with convolutions inside do."""
    shape = found.shapes[name][0]
    bases = [base_module(modules[layer]) for layer in found.layers if layer == name or layer.startswith(f"{name}.")]
    inputs = {base.in_channels for base in bases if isinstance(base, nn.Conv2d)}
    inputs |= {base.in_features for base in bases if isinstance(base, nn.Linear)}
    return shape[2] in inputs and not inputs & {shape[0], shape[0] // 2}


def _geometry(name: str, scheme: str, found: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """Arguments of a convolution between the shapes of a module, ``None`` if there is none."""
    given, gave = found.shapes[name]
    if _channels_last(name, found, modules):
        return None
    convolution = _spatial(name, found, modules)
    kernel = tuple(convolution.kernel_size) if convolution is not None else (3, 3)
    mode = convolution.padding_mode if convolution is not None else "zeros"
    if scheme.endswith("sequential"):
        kernel = tuple(size + 1 - size % 2 for size in kernel)
        return _checked(gave, gave, kernel, (1, 1), tuple(size // 2 for size in kernel), (1, 1), mode)
    if scheme.startswith("conv") and convolution is not None:  # of which there is but one
        dilation = tuple(convolution.dilation)
        if isinstance(convolution.padding, str):
            wide = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            padding = tuple(size // 2 if convolution.padding == "same" else 0 for size in wide)
        else:
            padding = tuple(convolution.padding)
        own = _checked(given, gave, kernel, tuple(convolution.stride), padding, dilation, mode)
        if own is not None:
            return own
    # a block, or a convolution that pads by itself as TensorFlow does
    kernel = tuple(size + 1 - size % 2 for size in kernel)
    stride = tuple(max(1, round(before / after)) for before, after in zip(given[1:], gave[1:], strict=True))
    return _checked(given, gave, kernel, stride, tuple(size // 2 for size in kernel), (1, 1), mode)


def _checked(
    given: Sequence[int],
    gave: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
) -> dict[str, Any] | None:
    """The arguments, if a convolution of them gives the shape that the module gave."""
    sizes = [
        (before + 2 * pad - step * (size - 1) - 1) // jump + 1
        for before, size, jump, pad, step in zip(given[1:], kernel, stride, padding, dilation, strict=True)
    ]
    if sizes != list(gave[1:]):
        return None
    return {
        "in_channels": given[0],
        "out_channels": gave[0],
        "kernel_size": list(kernel),
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "padding_mode": mode,
    }
