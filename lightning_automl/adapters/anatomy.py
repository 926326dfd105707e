"""The parts of an image classifier, found by watching one image pass: layers, stem, head, blocks, norms.

The names of modules differ from library to library, and so do the places where a layer is used: torchvision's Swin
takes the weight of a layer without ever calling it. So nothing here goes by names. The network is copied (the tensors
of its parameters are shared), one empty image is sent through the copy in evaluation mode, hooks see the modules and a
:class:`torch.overrides.TorchFunctionMode` sees the operations.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_automl.rundir import UserError

Kind = Literal["conv", "linear", "attention"]

#: Tried when nothing is known of the images: pixels of a square one.
_SIZES = (224, 128, 64, 32, 16, 8, 256, 384, 299, 448, 512)

#: Numbers that operations may give in all (1 GiB of float32), as long as other sizes of images are left to try.
_MOST = 2**28


@dataclass(frozen=True)
class Anatomy:
    """What :func:`anatomy` found. All names are those of the network without adapters, see :func:`plain_modules`.

    Attributes:
        layers: Weight layers (``nn.Linear``, ``nn.Conv2d`` and ``nn.MultiheadAttention`` with their subclasses) in the
            order in which they are first used.
        kinds: Kind of each of ``layers``.
        attention: Those of ``layers`` that are, or lie within, a module that computes an attention.
        stem: First layer that sees the images.
        stems: All layers that see the images, with nothing learned before them; the first is ``stem``.
        head: The layers that make the logits, more than one if parallel heads are averaged.
        blocks: Repeated parts of the network, in order: residual blocks, Inception modules, transformer blocks. If
            there are none, as in a VGG, each layer between the stem and the head.
        shapes: For each module that was called with one tensor and gave one, the shapes of both without the batch.
        norms: Batch normalisations, also those that no image passes in evaluation mode.
        num_classes: Number of logits.
        image_shape: Shape of the images that were sent, ``(channels, height, width)``.
    """

    layers: tuple[str, ...]
    kinds: dict[str, Kind]
    attention: tuple[str, ...]
    stem: str
    stems: tuple[str, ...]
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(repr=False)
    norms: tuple[str, ...] = field(repr=False)
    num_classes: int
    image_shape: tuple[int, ...]


#: What was found in networks that are in use, and the modules that they had then.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, Anatomy]] = WeakKeyDictionary()


def anatomy(network: nn.Module, image: Tensor | None = None) -> Anatomy:
    """Find the parts of an image classifier, with or without adapters.

    Without an image, what was found is remembered for as long as the network has the same modules.

    Nothing of the network changes: neither its modes, buffers and hooks nor what it may have cached. Adapters are seen
    as the layers that they adapt, under the names that these have in the plain network.

    Args:
        network: Maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.
        image: A batch of images, or one image, that the network takes. If ``None``, an empty image of the size that the
            network says it was built for (``image_size``, ``resize``, ``img_size``, timm's ``default_cfg``) or of usual
            sizes. Sizes for which the network would need gigabytes, as an attention over all pixels does, come last.

    Returns:
        The parts.

    Raises:
        UserError: If the network takes no image of these, or has no weight layer.
    """
    network = plain_network(network)
    if image is not None:
        return _anatomy(network, image)
    built = [(name, type(base), id(base)) for name, base in _bases(network)]
    signature = (built, _shapes(network))
    known = _KNOWN.get(network)
    if known is None or known[0] != signature:
        known = _KNOWN[network] = signature, _anatomy(network, None)
    return known[1]


def _bases(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, base_module(module)) for name, module in plain_modules(network).items()]


def _anatomy(network: nn.Module, image: Tensor | None) -> Anatomy:
    watched = _copy(network).eval()
    modules = plain_modules(watched)
    if not any(layer_kind(module) for module in modules.values()):
        raise UserError(
            f"{type(network).__name__} has no nn.Linear, nn.Conv2d or nn.MultiheadAttention; adapters need at least one"
        )
    watch = _Watch(modules)
    refusals: list[str] = []
    shapes = [tuple(image.shape)] if image is not None else _shapes(network)
    most: float = math.inf if image is not None else _MOST
    while shapes:
        large = []
        for shape in shapes:
            images = _empty(network, shape) if image is None else image
            images = images.unsqueeze(0) if images.ndim == 3 else images
            try:
                logits = watch.send(watched, images, most)
            except _TooLarge:
                large.append(shape)
            except Exception as error:  # each library and layer refuses in its own way, by assertions among others
                refusals.append(f"of {list(shape)}: {_short(error)}")
            else:
                return watch.anatomy(logits, images)
        shapes, most = large, math.inf
    raise UserError(
        f"{type(network).__name__} refuses "
        + (f"the given image ({refusals[0]})" if image is not None else f"empty images of usual shapes ({refusals[0]})")
        + "; give one that it was built for"
    )


def plain_network(network: nn.Module) -> nn.Module:
    """The network that peft's wrappers were put around, with the adapters that are in it."""
    if isinstance(network, PeftModel):
        network = network.get_base_model()
    return network.model if isinstance(network, BaseTuner) else network


def plain_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network by the names that they have in the network without adapters, itself as ``""``.

    An adapted module is given as peft's layer around it, a module that is saved with an adapter as peft's wrapper. What
    is inside of both comes under its plain name: ``block.base_layer.conv`` as ``block.conv``. The modules of adapters
    are left out, and so are those inside of a weight layer.
    """
    return dict(_walk(plain_network(network), "", set()))


def base_module(module: nn.Module) -> nn.Module:
    """The module without adapters: the adapted one, or the active copy of one that is saved with an adapter."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", {})
            active = [] if module.disable_adapters else [name for name in module.active_adapters if name in copies]
            module = copies[active[0]] if active else module.original_module
        else:
            return module


def layer_kind(module: nn.Module) -> Kind | None:
    """The kind of a weight layer, adapted or not; ``None`` for any other module."""
    base = base_module(module)
    if isinstance(base, nn.MultiheadAttention):
        return "attention"
    if isinstance(base, nn.Conv2d) and not isinstance(base, nn.ConvTranspose2d):
        return "conv"
    return "linear" if isinstance(base, nn.Linear) else None


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    if layer_kind(module) is None:
        for child_name, child in base_module(module).named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _copy(network: nn.Module) -> nn.Module:
    """A copy of the network that has the same parameters, but modules and buffers of its own."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    for module in network.modules():
        computed = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        shared |= {id(tensor): tensor for tensor in computed}  # which deepcopy refuses
    return copy.deepcopy(network, shared)


def _empty(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _shapes(network: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of images to try, those of which the network tells first."""
    sizes: list[tuple[int, int]] = []
    for attribute in ("resize", "image_size", "img_size"):  # resize leaves the choice to the network, so it goes first
        for module in network.modules():
            value = getattr(module, attribute, None)
            pair = (value, value) if isinstance(value, int) else value
            if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, int) for one in pair):
                sizes.append((pair[0], pair[1]))
                break
    for module in network.modules():
        published = getattr(module, "default_cfg", None) or getattr(module, "pretrained_cfg", None)
        if isinstance(published, dict) and len(published.get("input_size") or ()) == 3:
            sizes.append((published["input_size"][1], published["input_size"][2]))
            break
    sizes += [(size, size) for size in _SIZES]
    first = next((base for _, base in _bases(network) if layer_kind(base) is not None), None)
    channels = getattr(network, "in_channels", None)
    if not isinstance(channels, int):
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Linear):  # on flattened images, if it is no transformer's
        for count in dict.fromkeys((channels, 1, 3)):
            size = math.isqrt(first.in_features // count)
            shapes += [(count, size, size)] if size and count * size**2 == first.in_features else []
    shapes += [(channels, *size) for size in sizes]
    shapes += [(1, *size) for size in sizes] if isinstance(first, nn.Linear) and channels != 1 else []
    return list(dict.fromkeys(shapes))


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in _tensors(one)]
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, tuple | list) else []


@dataclass
class _Call:
    """A call of a module: the first tensor given to it, the first that it gave, and the modules that called it."""

    name: str
    given: int
    gave: int
    above: tuple[str, ...]


class _TooLarge(Exception):
    """The operations on an image give more numbers than wanted."""


class _Watch(TorchFunctionMode):
    """Sees what happens to an image on its way through a network.

    Args:
        modules: The modules of the network, which gets hooks on all of them.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.names = {module: name for name, module in modules.items()}
        self.kinds = {name: kind for name, module in modules.items() if (kind := layer_kind(module)) is not None}
        self.clear()
        for name, module in modules.items():
            if name:
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, with_kwargs=True)

    def clear(self) -> None:
        """Forget everything."""
        self.kept: list[Tensor] = []  # so that no identity is given twice
        self.parents: dict[int, set[int]] = {}
        self.makers: dict[int, str] = {}
        self.reached: set[int] = set()  # what depends on the images
        self.raw: set[int] = set()  # what does so by nothing learned
        self.owners: dict[int, set[str]] = {}  # layers of weights, and of what is made of them alone
        for name in self.kinds:
            for parameter in self.modules[name].parameters():
                if _is_weight(parameter):
                    self.owners[id(parameter)] = {name}
        self.used: dict[str, None] = {}
        self.stems: dict[str, None] = {}
        self.entered: dict[str, int] = {}
        self.calls: list[_Call] = []
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.uses: Counter[tuple[str, int]] = Counter()  # how often a module itself used a tensor
        self.attending: set[str] = set()
        self.stack: list[tuple[str, int | None]] = []  # of modules, and what they were given

    def send(self, network: nn.Module, images: Tensor, most: float = math.inf) -> Tensor:
        """Send images through the network and return the logits.

        Raises:
            _TooLarge: If the operations give more than ``most`` numbers in all; the last one is then not done.
        """
        self.clear()
        self.left = most
        images = images.detach().view_as(images)
        self.raw.add(id(images))
        self.reached.add(id(images))
        self.kept.append(images)
        random = torch.get_rng_state()
        try:
            with torch.no_grad(), self:
                output = _tensors(network(images))
        finally:
            torch.set_rng_state(random)
        if not output:
            raise TypeError("the network gives no tensor")
        return next((tensor for tensor in output if tensor.ndim == 2), output[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See one operation."""
        kwargs = kwargs or {}
        if _products(func, args, kwargs) > self.left:
            raise _TooLarge
        result = func(*args, **kwargs)
        results = _tensors(result)
        self.left -= sum(tensor.numel() for tensor in results)
        if self.left < 0:
            raise _TooLarge
        if not results:
            return result
        given = _tensors(args) + _tensors(kwargs)
        self.kept += results
        made, came = {id(tensor) for tensor in results}, {id(tensor) for tensor in given}
        for one in made:
            self.parents.setdefault(one, set()).update(came - {one})
        name = self.stack[-1][0] if self.stack else ""
        self.uses.update((name, one) for one in came - made)
        reached = bool(came & self.reached)
        inside = any(above in self.kinds for above, _ in self.stack)
        owners = set() if inside else {owner for one in came for owner in self.owners.get(one, ())}
        if owners and not reached:  # a weight is prepared, to be used later
            for one in made:
                self.owners[one] = self.owners.get(one, set()) | owners
            return result
        for owner in owners:
            self.used[owner] = None
            if came & self.raw:
                self.stems[owner] = None
            for one in made:
                self.makers[one] = owner
        if reached:
            self.reached |= made
        if came & self.raw and not owners and not any(_is_weight(tensor) for tensor in given):
            self.raw |= made
        if _attends(func, args, kwargs, results[0]):
            self.attending.update(name for name, _ in self.stack[-1:])
        return result

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        given = _tensors(args) + _tensors(kwargs)
        self.entered.setdefault(name, len(self.entered))
        if name in self.kinds:
            self.used[name] = None
            if any(id(tensor) in self.raw for tensor in given):
                self.stems[name] = None
        self.kept += given
        self.stack.append((name, id(given[0]) if given else None))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, own = self.stack.pop()
        given, gave = _tensors(args) + _tensors(kwargs), _tensors(output)
        self.kept += gave
        above = self.stack[-1][0] if self.stack else ""
        self.uses.update((above, one) for one in {id(tensor) for tensor in given} - {id(tensor) for tensor in gave})
        self.reached.update(id(tensor) for tensor in gave)
        if name in self.kinds:
            for tensor in gave:
                self.makers[id(tensor)] = name
                self.raw.discard(id(tensor))
        if own is not None and gave:
            self.calls.append(_Call(name, own, id(gave[0]), tuple(above for above, _ in self.stack)))
            if len(given) == 1 and isinstance(output, Tensor):
                self.shapes.setdefault(name, (tuple(given[0].shape[1:]), tuple(output.shape[1:])))

    def anatomy(self, logits: Tensor, images: Tensor) -> Anatomy:
        """Read the parts out of what was seen."""
        layers = tuple(self.used)
        if not layers:
            raise UserError("no weight layer of the network is used by an image in evaluation mode; adapters need one")
        classes = logits.shape[1] if logits.ndim > 1 else 1
        stems = tuple(self.stems) or layers[:1]
        head = self._head(logits, classes)
        attending = {self._holder(name, layers) for name in self.attending} - {""}
        attention = tuple(
            name
            for name in layers
            if self.kinds[name] == "attention" or any(name.startswith(f"{above}.") for above in attending)
        )
        blocks = self._blocks(set(head) | set(stems))
        if not blocks:
            blocks = tuple(name for name in layers if name not in stems and name not in head)
        norms = (name for name, module in self.modules.items() if isinstance(base_module(module), _BatchNorm))
        return Anatomy(
            layers,
            {name: self.kinds[name] for name in layers},
            attention,
            stems[0],
            stems,
            head,
            blocks,
            self.shapes,
            tuple(norms),
            classes,
            tuple(images.shape[1:]),
        )

    def _holder(self, name: str, layers: tuple[str, ...]) -> str:
        """The module itself, or the nearest around it that has weight layers; a softmax may be a module of its own."""
        while name and not any(layer.startswith(f"{name}.") for layer in layers):
            name = name.rpartition(".")[0]
        return name

    def _head(self, logits: Tensor, classes: int) -> tuple[str, ...]:
        """The weight layers with as many outputs as there are logits from which nothing learned leads to the logits."""
        found, seen, ahead = set(), set(), [id(logits)]
        while ahead:
            one = ahead.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in self.makers:
                found.add(self.makers[one])
            else:
                ahead += self.parents.get(one, ())
        fitting = [name for name in self.used if _outputs(self.modules[name]) == classes]
        heads = tuple(name for name in fitting if name in found)
        return heads or tuple(fitting[-1:]) or tuple(self.used)[-1:]

    def _blocks(self, ends: set[str]) -> tuple[str, ...]:
        calls: dict[str, list[_Call]] = {}
        for call in self.calls:
            calls.setdefault(call.name, []).append(call)

        def inside(name: str, others: Any) -> list[str]:
            return [other for other in others if other.startswith(f"{name}.")]

        candidates = [
            name
            for name in sorted(calls, key=self.entered.__getitem__)
            if name
            and name not in self.kinds
            and not isinstance(base_module(self.modules[name]), nn.Sequential)
            and not inside(name, ends)
            and len(inside(name, self.used)) >= 2
        ]
        classes = {name: type(base_module(self.modules[name])) for name in candidates}

        forks: dict[int, set[str]] = {}  # who uses a tensor more than once
        for (name, tensor), count in self.uses.items():
            if count > 1:
                forks.setdefault(tensor, set()).add(name)

        def is_residual(name: str) -> bool:
            return any(name in forks.get(call.given, ()) for call in calls[name])

        def in_sequence(one: str, other: str) -> bool:
            if one == other:
                return False
            if classes[one] is classes[other] and is_residual(one) and is_residual(other):
                return True
            between = {call.gave for call in calls[one]} & {call.given for call in calls[other]}
            users = (user for tensor in between for user in forks.get(tensor, ()))
            return bool(between) and all(f"{user}.".startswith(f"{other}.") for user in users)

        # A stage hands its input to the first of its blocks; a residual block uses it twice. What most modules of a
        # class are, all are: a stage may have but one block, and a shortcut may be left out.
        holders = {name: within for name in candidates if (within := inside(name, candidates))}
        votes: Counter[type] = Counter()
        for name, within in holders.items():
            if is_residual(name):
                votes[classes[name]] -= 1
            elif any(in_sequence(one, other) for one in within for other in within):
                votes[classes[name]] += 1
        stages = {name for name in holders if votes[classes[name]] > 0}
        blocks: set[str] = set()
        for name in sorted(set(candidates) - stages, key=lambda name: min(len(call.above) for call in calls[name])):
            # by calls and not by names, since blocks may share a module that is registered outside of them
            if not all(blocks & set(call.above) for call in calls[name]):
                blocks.add(name)
        return tuple(sorted(blocks, key=self.entered.__getitem__))


def _products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many numbers a product of tensors gives, or an attention has for its pairs of tokens; 0 for the rest."""
    name = getattr(func, "__name__", "")
    given = _tensors(args) + _tensors(kwargs)
    if name in ("matmul", "__matmul__", "bmm", "baddbmm", "einsum"):
        shapes_alone = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return sum(tensor.numel() for tensor in _tensors(func(*shapes_alone[0], **shapes_alone[1])))
    if name == "scaled_dot_product_attention":  # (…, tokens, channels)
        return given[0].shape[:-1].numel() * given[1].shape[-2]
    if name == "multi_head_attention_forward":  # (tokens, batch, channels)
        return given[0].shape[:-1].numel() * given[1].shape[0] * int(kwargs.get("num_heads", args[4]))
    return 0


def _attends(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    """Whether an operation is that of an attention: a softmax over channels or tokens, which come last."""
    name = getattr(func, "__name__", "")
    if name == "softmax":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
        return result.ndim >= 3 and dim >= 2 and dim >= result.ndim - 2
    return name == "scaled_dot_product_attention"


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.ndim >= 2


def _outputs(module: nn.Module) -> int:
    base: Any = base_module(module)
    if isinstance(base, nn.MultiheadAttention):
        return int(base.embed_dim)
    return int(base.out_channels if isinstance(base, nn.Conv2d) else base.out_features)
