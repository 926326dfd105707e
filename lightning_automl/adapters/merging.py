"""Put adapters into the weights of the network that they were added to, and take them out again."""

import copy
from typing import Any

from peft import PeftModel
from torch import nn

from lightning_automl.adapters.injection import tuner_layers, unwrap
from lightning_automl.adapters.lora import LoraLayer, merge_layers
from lightning_automl.rundir import UnsupportedError


def is_mergeable(model: nn.Module) -> bool:
    """Whether the active adapter of a model can be put into the weights: LoRA can, a conv adapter cannot."""
    layers = list(tuner_layers(model))
    return isinstance(model, PeftModel) and bool(layers) and all(isinstance(layer, LoraLayer) for layer in layers)


def merge_adapter(model: PeftModel) -> None:
    """Put the active adapter into the weights, in place: the network then costs what the base network costs.

    A copy of the base weights is kept. The head and other modules that are saved with the adapter are not touched.

    Raises:
        UnsupportedError: If the adapter is no change of weights.
        RuntimeError: If an adapter is merged already, or the result is not finite; the base is then as before.
    """
    _check_mergeable(model)
    tuner: Any = model.base_model
    tuner.merge_adapter()


def unmerge_adapter(model: PeftModel) -> None:
    """Put the base weights back as they were, bit by bit, in place.

    Raises:
        UnsupportedError: If the adapter is no change of weights.
        RuntimeError: If no adapter is merged.
    """
    _check_mergeable(model)
    tuner: Any = model.base_model
    tuner.unmerge_adapter()


def merged_network(model: PeftModel) -> nn.Module:
    """A plain network that gives what the model gives, with layers of the same types as the base network.

    Args:
        model: With an active adapter, merged or not; it is not changed.

    Returns:
        A copy with the adapter in its weights, and with the adapter's own head and norms.

    Raises:
        UnsupportedError: If the adapter is no change of weights.
        RuntimeError: If the merged weights are not finite.
    """
    _check_mergeable(model)
    network = copy.deepcopy(model.get_base_model())
    for layer in tuner_layers(network):
        layer.enable_adapters(True)
    if not any(layer.merged for layer in tuner_layers(network)):
        merge_layers(network)
    return unwrap(network)


def _check_mergeable(model: nn.Module) -> None:
    if not is_mergeable(model):
        kinds = sorted({type(layer).__name__ for layer in tuner_layers(model)})
        raise UnsupportedError(
            f"only adapters that change weights can be merged, those of LoraConfig; this model has "
            f"{', '.join(kinds) or 'no adapter'}, so use it as it is"
        )
