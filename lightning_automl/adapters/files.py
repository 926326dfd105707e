"""Add, switch, save and load adapters; files in peft's layout.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``. When peft's own layers give the same
outputs, the file is a plain LoRA file, which peft reads without this package. Otherwise its method is one that peft
does not know before ``lightning_automl.adapters`` is imported: it fails then, and never gives other outputs silently.
"""

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, get_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_automl import rundir
from lightning_automl.adapters.anatomy import anatomy
from lightning_automl.adapters.digest import base_digest
from lightning_automl.adapters.injection import ImageTuner, base_modules, tuner_layers, unwrap
from lightning_automl.adapters.lora import LoraConfig, LoraLayer, LoraLinear
from lightning_automl.rundir import UserError

__all__ = ["add_adapter", "base_digest", "load_adapter", "save_adapter", "switch_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: Options of peft's LoRA that a configuration of ours has too.
_SHARED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
)
#: What peft writes into files about itself and the base.
_BOOKKEEPING = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("runtime_config",),
}


def add_adapter(
    network: nn.Module, config: PeftConfig, name: str = "default", num_classes: int | None = None
) -> PeftModel:
    """Add a new adapter to a network and make it the active one; everything else is frozen.

    Args:
        network: Plain (it is changed in place) or a model with other adapters of the same method.
        config: Of the adapter; not changed. One of ``peft.LoraConfig`` is taken over.
        name: Name of the adapter; no module of the network may have it.
        num_classes: Gives the adapter a new head with so many outputs; ``None`` starts with the network's.

    Returns:
        The model, in the mode that the network was in; its outputs are those of the network, but for a new head.

    Raises:
        UserError: If the configuration does not fit the network, or the name is taken.
        RuntimeError: If another adapter is merged.
        UnsupportedError: If a layer is of an unsupported type.
    """
    own: Any = _taken_over(config) if type(config) is peft.LoraConfig else copy.deepcopy(config)
    own.inference_mode = False
    if num_classes is not None:
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; give the number of labels, or nothing to keep the head")
        own.num_classes = num_classes
    if not isinstance(network, PeftModel):
        model = PeftModel(network, own, adapter_name=name)
        model.training = model.base_model.training = network.training
        return model
    if name in network.peft_config:
        raise UserError(
            f"the model has an adapter {name!r} already (known: {', '.join(network.peft_config)}); choose another name"
        )
    if own.peft_type != network.peft_type:
        raise UserError(
            f"the model has adapters of the method {PeftType(network.peft_type).value}, so one of "
            f"{own.peft_type.value} cannot be added; add it to a network of its own"
        )
    with warnings.catch_warnings():
        # peft fears for names such as "a", part of "lora_": a rest of when it looked for names inside of keys
        warnings.filterwarnings("ignore", "Adapter name .* should not be contained in the prefix")
        network.add_adapter(name, own)
    _activate(network, name, inference=False)
    return network


def switch_adapter(model: PeftModel, name: str) -> None:
    """Make another adapter the active one, with its head and its norms.

    A merged adapter is taken out and the new one merged. The new adapter trains if the old one did.

    Raises:
        UserError: If there is no adapter of this name.
    """
    if name not in model.peft_config:
        raise UserError(f"the model has no adapter {name!r}; known: {', '.join(model.peft_config)}")
    tuner: Any = model.base_model
    merged = any(layer.merged for layer in tuner_layers(model))
    if merged:
        tuner.unmerge_adapter()
    _activate(model, name, inference=not any(parameter.requires_grad for parameter in model.parameters()))
    if merged:
        tuner.merge_adapter()


def _activate(model: PeftModel, name: str, inference: bool) -> None:
    wrappers = [module for _, _, module in base_modules(model.get_base_model()) if hasattr(module, "modules_to_save")]
    modes = [_active_module(wrapper).training for wrapper in wrappers]
    model.set_adapter(name, inference_mode=inference)
    for wrapper, mode in zip(wrappers, modes, strict=True):
        _active_module(wrapper).train(mode)


def _active_module(wrapper: Any) -> nn.Module:
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    module: nn.Module = wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    return module


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    digest: str | None = None,
) -> Path:
    """Write one adapter, its head and other modules that are saved with it.

    Args:
        model: May have other adapters, and any of them merged.
        directory: Made when missing; each file is written atomically, the weights first.
        name: Of the adapter. The file does not know it.
        state_dict: Tensors to write instead of the model's, under the names of ``model.state_dict()``.
        digest: That of the base, if its values have since been rounded; else it is taken from the model.

    Returns:
        The directory.

    Raises:
        UserError: If there is no adapter of this name, or ``state_dict`` lacks some of its tensors.
    """
    if name not in model.peft_config:
        raise UserError(f"the model has no adapter {name!r}; known: {', '.join(model.peft_config)}")
    directory = Path(directory)
    config: Any = model.peft_config[name]
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = own
    if state_dict is not None:
        try:
            tensors = get_peft_model_state_dict(
                model, state_dict=dict(state_dict), adapter_name=name, save_embedding_layers=False
            )
        except KeyError as error:
            raise UserError(f"the tensors given for adapter {name!r} lack {error.args[0]}") from error
        if missing := sorted(own.keys() - tensors.keys()):
            raise UserError(f"the tensors given for adapter {name!r} lack {', '.join(missing[:10])}")
    digest = digest or base_digest(model, config.modules_to_save or ())
    contents = _plain_contents(model, name) or {**config.to_dict(), "base_digest": digest}
    written = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with rundir.replacing(directory / WEIGHTS) as partial:
        # save_file would make it readable for its owner alone
        partial.write_bytes(save(written, {"format": "pt", "base_digest": digest}))
    rundir.write_json(directory / CONFIG, contents)
    return directory


def load_adapter(network: nn.Module, directory: str | Path, name: str = "default") -> PeftModel:
    """Read an adapter from files, add it to a network and make it the active one.

    Args:
        network: The base that the adapter was made for: plain (it is changed in place), or a model with other adapters.
        directory: Written by :func:`save_adapter` or by peft.
        name: Of the adapter in the model.

    Returns:
        The model, in the mode that the network was in. A head of another size than the network's is made.

    Raises:
        UserError: If a file is missing or damaged, or the network is not the adapter's base; the network is then as it
            was.
    """
    directory = Path(directory)
    contents = _read_config(directory / CONFIG)
    tensors, metadata = _read_weights(directory / WEIGHTS)
    config = _config(contents, directory)
    config.base_digest = config.base_digest or metadata.get("base_digest")
    base = network.get_base_model() if isinstance(network, PeftModel) else network
    if config.num_classes is None:
        config.num_classes = _classes(base, config, tensors)
    active = str(network.active_adapter) if isinstance(network, PeftModel) else None
    model = add_adapter(network, config, name)
    try:
        _fill(model, tensors, name, directory)
        if contents["peft_type"] == "LORA":
            _check_peft_was_right(model, name, directory)
    except BaseException:
        if active is None:
            unwrap(base)
        else:
            with contextlib.suppress(UserError):
                _activate(model, active, inference=False)
            model.delete_adapter(name)
        raise
    return model


def _fill(model: PeftModel, tensors: dict[str, Tensor], name: str, directory: Path) -> None:
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for title, keys in (
        ("lacks", own.keys() - tensors.keys()),
        ("has what the model lacks:", tensors.keys() - own.keys()),
        ("has other sizes of", {key for key in own.keys() & tensors if own[key].shape != tensors[key].shape}),
    ):
        if keys:
            listed = ", ".join(key.removeprefix("base_model.model.") for key in sorted(keys)[:10])
            more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
            raise UserError(
                f"the adapter in {directory} was made for another architecture: it {title} {listed}{more}; load the "
                "network that it was trained on"
            )
    with torch.no_grad():  # in place: peft's way loses the versions that some networks ask for (torchvision's MNASNet)
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def _check_peft_was_right(model: PeftModel, name: str, directory: Path) -> None:
    """Refuse what plain peft trained with other outputs than LoRA's, as they could not be reproduced."""
    for plain, _, layer in base_modules(model.get_base_model()):
        if isinstance(layer, LoraLayer) and name in layer.lora_A and not _peft_is_right(layer):
            raise UserError(
                f"{directory} holds an adapter that peft made for {plain}, a {type(layer.base_layer).__name__} for "
                "which peft's own layer is wrong, so its outputs cannot be reproduced; train it again with this package"
            )


def _read_config(path: Path) -> dict[str, Any]:
    contents = rundir.read_json(path)
    if contents is None:
        raise UserError(f"{path.parent} has no {path.name}, so it holds no adapter; give a directory that has one")
    if not isinstance(contents, dict) or "peft_type" not in contents:
        raise UserError(f"{path} is not the configuration of an adapter, as it names no peft_type")
    return contents


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}, so it holds no adapter; give a directory that has one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); write or copy it again") from error


def _config(contents: dict[str, Any], directory: Path) -> Any:
    kind = contents["peft_type"]
    if kind == "LORA":
        return _taken_over(peft.LoraConfig.from_peft_type(**contents), loaded=True)  # type: ignore[no-untyped-call]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if config_class is None or tuner_class is None or not issubclass(tuner_class, ImageTuner):
        raise UserError(f"{directory} holds an adapter of the method {kind!r}, which this package does not read")
    try:
        return config_class(**contents)
    except TypeError as error:
        raise UserError(
            f"{directory / CONFIG} is not the configuration of an adapter of this version ({error})"
        ) from error


def _taken_over(config: peft.LoraConfig, loaded: bool = False) -> LoraConfig:
    """Our configuration for one of peft's; in a file, ``modules_to_save=None`` means that nothing was saved."""
    default = peft.LoraConfig()
    free = {*_SHARED, *_BOOKKEEPING} | ({"init_lora_weights"} if loaded else set())
    other = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in free and getattr(config, field.name) != getattr(default, field.name)
    ]
    if other:
        raise UserError(
            f"peft's LoraConfig sets {', '.join(other)}, which image networks are not adapted with here; known: "
            f"{', '.join(_SHARED)}"
        )
    values: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    targets = values["target_modules"]
    values["target_modules"] = (
        {"all-linear": "linear", None: "auto"}.get(targets, targets)
        if targets is None or isinstance(targets, str)
        else sorted(targets)
    )
    if loaded:
        values["modules_to_save"] = list(values["modules_to_save"] or [])
    return LoraConfig(**values)


def _classes(network: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of the head in a file, if the network's has another number."""
    modules = {name: getattr(module, "original_module", module) for name, _, module in base_modules(network)}
    for name in config.modules_to_save or ():
        layers = modules.get(name, nn.Identity()).named_modules()
        for inner, layer in layers:
            weight = tensors.get(f"base_model.model.{name}{'.' * bool(inner)}{inner}.weight")
            if isinstance(layer, nn.Linear | nn.Conv2d) and weight is not None and len(weight) != len(layer.weight):
                return len(weight)
    return None


def _plain_contents(model: PeftModel, name: str) -> dict[str, Any] | None:
    """The configuration of a plain LoRA file, if peft's own layers give the same outputs for it."""
    config: Any = model.peft_config[name]
    if not isinstance(config, LoraConfig) or config.scale != "fixed":
        return None
    network = model.get_base_model()
    names = [plain for plain, _, _ in base_modules(network)]
    saved = list(config.modules_to_save or ())
    ends = Counter(end for end in saved for plain in names if plain.endswith(end))  # peft's rule for modules_to_save
    if any(ends[end] != 1 for end in saved):
        return None
    layers = {plain: module for plain, _, module in base_modules(network) if plain in config.target_modules}
    try:
        called = anatomy(network).shapes
    except UserError:
        return None
    for plain, layer in layers.items():
        if not (isinstance(layer, LoraLayer) and plain in called and _peft_is_right(layer)):
            return None
    targets = list(config.target_modules)
    exact = all(plain in layers or not plain.endswith(tuple(f".{target}" for target in targets)) for plain in names)
    contents: dict[str, Any] = peft.LoraConfig(
        **{
            option: getattr(config, option) for option in _SHARED if option not in ("target_modules", "modules_to_save")
        },
        inference_mode=True,
    ).to_dict()  # type: ignore[no-untyped-call]
    contents["peft_type"] = "LORA"
    contents["modules_to_save"] = saved or None
    contents["target_modules"] = targets if exact else "|".join(target.replace(".", r"\.") for target in targets)
    return contents


def _peft_is_right(layer: LoraLayer) -> bool:
    base: Any = layer.base_layer
    if isinstance(layer, LoraLinear):
        return type(base) in (nn.Linear, NonDynamicallyQuantizableLinear)
    # Not on attention: peft 0.21 adds the update of the output projection twice (MultiheadAttention.merge).
    return (
        type(base) is nn.Conv2d
        and base.groups == 1
        and base.padding_mode == "zeros"
        and all(one == 1 for one in base.dilation)
    )
