"""What all our methods share when peft puts them into a network: exact names, head, modes and the base's digest.

peft 0.21 finds modules by the ends of their names (``conv1`` also means ``layer1.0.conv1``, and a head ``fc`` also
means ``se.xfc``), shortens long lists of names to such ends, leaves adapters in training mode that it puts into a
network in evaluation mode, and lets frozen adapters train after they were disabled for a moment. That is right for
language models and wrong for arbitrary image networks, so :class:`ImageTuner` does these steps itself.
"""

import copy
import difflib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from lightning_automl.adapters.anatomy import anatomy, base_module
from lightning_automl.adapters.digest import base_digest, inside
from lightning_automl.rundir import UnsupportedError, UserError


class ImageTuner(BaseTuner):
    """A peft tuner for image networks; a method adds :meth:`resolve` and the layer that it puts in.

    Its configuration has ``target_modules``, ``modules_to_save`` (``None`` is the head), ``num_classes`` (of this
    adapter's head; ``None`` keeps the network's) and ``base_digest``. After injection the first two are tuples of full
    names, and ``base_digest`` is set: a configuration with a digest, as read from a file, is taken literally.
    """

    def resolve(self, config: Any, network: nn.Module) -> list[str]:
        """Full names of the modules to adapt, before anything of the network was changed.

        Args:
            config: Of the adapter to come; may be filled with what the layers need.
            network: Without or with other adapters.

        Raises:
            UserError: If the configuration does not fit the network.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.target_modules

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter in, or leave the network as it was if that fails."""
        config: Any = self.peft_config[adapter_name]
        _check_name(model, adapter_name)
        if any(layer.merged for layer in tuner_layers(model)):
            raise RuntimeError("an adapter is merged into this network; unmerge it before another one is added")
        resolved = config.base_digest is not None
        targets = self.resolve(config, model)
        modules = {name: module for name, _, module in base_modules(model)}
        for name in targets:
            if isinstance(modules[name], AuxiliaryTrainingWrapper):
                raise UserError(f"{name} is trained as a whole with another adapter, so it cannot be adapted as well")
        saved = _saved_names(model, config, targets, exact=resolved)
        heads = _heads(model, saved) if config.num_classes is not None else []
        digest = base_digest(model, saved)
        if resolved and config.base_digest != digest:
            raise UserError(
                f"adapter {adapter_name!r} was made for another base network (digest {config.base_digest}, this one "
                f"has {digest}); load the network with the weights that it was trained on"
            )
        config.base_digest = digest
        config.target_modules = tuple(targets)  # peft would shorten a list or a set
        config.modules_to_save = None  # peft would wrap by the ends of names
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config.modules_to_save = tuple(saved)
            for name in saved:
                self._save_module(model, name, adapter_name, config.num_classes if name in heads else None)
        except BaseException:
            if len(self.peft_config) == 1:
                unwrap(model)
            else:
                super().delete_adapter(adapter_name)
            raise
        for layer in tuner_layers(model):
            layer.training = layer.base_layer.training
            for child_name, child in layer.named_children():
                if child_name != "base_layer":
                    child.train(layer.training)

    def _save_module(self, model: nn.Module, name: str, adapter_name: str, num_classes: int | None) -> None:
        path = {plain: path for plain, path, _ in base_modules(model)}[name]
        parent, _, child_name = path.rpartition(".")
        wrapper: Any = model.get_submodule(path)
        active = adapter_name in self.active_adapters
        trains = active and not self.peft_config[adapter_name].inference_mode
        if not isinstance(wrapper, ModulesToSaveWrapper):
            module = wrapper
            wrapper = ModulesToSaveWrapper(module, adapter_name)  # type: ignore[no-untyped-call]
            wrapper.set_adapter(adapter_name if active else [], inference_mode=not trains)
            wrapper.training = wrapper.modules_to_save.training = module.training
            setattr(model.get_submodule(parent), child_name, wrapper)
        else:
            wrapper.update(adapter_name)  # type: ignore[no-untyped-call]
        if num_classes is not None:
            wrapper.modules_to_save[adapter_name] = resized(wrapper.original_module, num_classes)
        wrapper.modules_to_save[adapter_name].requires_grad_(trains)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # peft would also set requires_grad: an adapter frozen for inference trained after being disabled for a moment.
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module._disable_adapters = not enabled


def tuner_layers(network: nn.Module) -> Iterator[Any]:
    """All layers that carry an adapter, also those inside of another."""
    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def unwrap(network: nn.Module) -> nn.Module:
    """Take all adapters out of a network, in place; where a module is saved with the active adapter, that one stays.

    Weights are left as they are, merged or not. Without an active adapter the original modules stay.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            module: Any = child
            while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                if isinstance(module, BaseTunerLayer):
                    module = inside(module)
                else:
                    active = [a for a in module.active_adapters if a in getattr(module, "modules_to_save", {})]
                    module = module.modules_to_save[active[0]] if active else module.original_module
            if module is not child:
                setattr(parent, name, module)
    if hasattr(network, "peft_config"):
        del network.peft_config
    return network


def resized(module: nn.Module, num_classes: int) -> nn.Module:
    """A copy of a head whose last linear layer or convolution is new and has ``num_classes`` outputs.

    Raises:
        UnsupportedError: If there is no such layer in it.
    """
    head = copy.deepcopy(module)
    names = [name for name, layer in head.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not names:
        raise UnsupportedError(
            f"no head of {num_classes} classes can be made from a {type(module).__name__}, which has no nn.Linear and "
            "no nn.Conv2d; give the network a head of this size"
        )
    last: Any = head.get_submodule(names[-1])
    weight = last.weight
    if isinstance(last, nn.Linear):
        new: nn.Module = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    else:
        new = nn.Conv2d(
            *(last.in_channels, num_classes, last.kernel_size, last.stride, last.padding, last.dilation, last.groups),
            bias=last.bias is not None,
            padding_mode=last.padding_mode,
        )
    new = new.to(weight.device, weight.dtype).train(last.training).requires_grad_(weight.requires_grad)
    if not names[-1]:
        return new
    parent, _, child = names[-1].rpartition(".")
    setattr(head.get_submodule(parent), child, new)
    return head


def _check_name(network: nn.Module, adapter_name: str) -> None:
    parts = {part for name, _ in network.named_modules() for part in name.split(".")}
    taken = parts - {part for layer in tuner_layers(network) for part in _adapters(layer)}
    if "." in adapter_name or not adapter_name:
        raise UserError(f"an adapter cannot be named {adapter_name!r}; give a name without dots")
    if adapter_name in taken:
        raise UserError(
            f"an adapter cannot be named {adapter_name!r}: peft tells adapters apart by the parts of names between "
            "dots, and a module of this network has it; choose another"
        )


def _adapters(layer: Any) -> set[str]:
    return set(layer._get_available_adapters())


def _saved_names(network: nn.Module, config: Any, targets: list[str], exact: bool) -> list[str]:
    """Full names of the modules that are trained as a whole and saved with the adapter."""
    if config.modules_to_save is None:
        return [name for name in anatomy(network).head if name not in targets]
    modules = {name: module for name, _, module in base_modules(network) if name}
    known = list(modules)
    names: list[str] = []
    for wanted in config.modules_to_save:
        found = [name for name in known if name == wanted or (not exact and name.endswith(f".{wanted}"))]
        if not found:
            near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.0)
            raise UserError(
                f"no module is named {wanted!r}, as modules_to_save asks for; nearest are {', '.join(near)}"
            )
        names += [name for name in found if name not in names]
    for name in names:
        if isinstance(modules[name], BaseTunerLayer):
            raise UserError(f"{name} is adapted by another adapter, so it cannot be in modules_to_save")
        attentions = (target for target in targets if isinstance(base_module(modules[target]), nn.MultiheadAttention))
        if any(f"{target}.".startswith(f"{name}.") for target in targets) or name.startswith(
            tuple(f"{attention}." for attention in attentions)
        ):
            raise UserError(
                f"{name!r} is trained in full, as the head and modules_to_save are, and adapted too; leave it out of "
                "target_modules or of modules_to_save"
            )
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _heads(network: nn.Module, saved: list[str]) -> list[str]:
    heads = anatomy(network).head
    found = [name for name in saved if any(head == name or head.startswith(f"{name}.") for head in heads)]
    if not found:
        raise UserError(
            f"num_classes is given, but the head ({', '.join(heads)}) is not in modules_to_save; add it or leave out "
            "num_classes"
        )
    return found


def base_modules(module: nn.Module, plain: str = "", path: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """The modules of a network without those of its adapters.

    Unlike :func:`~lightning_automl.adapters.anatomy.plain_modules`, which serves to choose layers, with those inside of
    an attention and without those of modules that are saved with an adapter, as wrapping and files see them.

    Yields:
        Name in the network without adapters, name now, and the module: an adapted one is given as the layer around it,
        and so is one that is saved with an adapter.
    """
    yield plain, path, module
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    inner: Any = module
    while isinstance(inner, BaseTunerLayer):
        inner, path = inside(inner), f"{path}.base_layer"
    for name, child in inner.named_children():
        yield from base_modules(child, f"{plain}.{name}" if plain else name, f"{path}.{name}" if path else name)
