"""Networks around a layer of each kind that carry LoRA. Apart from the networks, which tests of plain peft use too."""

import pytest
import torch
from layer_kinds import KINDS, network, target

from lightning_automl.adapters import LoraConfig, add_adapter

#: Options of LoraConfig for each of its forms.
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "learnable": {"scale": "learnable"},
    "dora": {"use_dora": True},
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def adapted(kind, seed=0, **options):
    """A network around a layer of this kind that carries LoRA of rank 2."""
    return add_adapter(network(kind, seed), LoraConfig(**{"r": 2, "target_modules": [target(kind)], **options}))


def moved(model, by=0.3):
    """Give every trained tensor another value, as training does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def altered(kind, **options):
    """Such a network whose trained tensors have other values than at the start."""
    return moved(adapted(kind, **options))
