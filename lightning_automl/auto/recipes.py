"""The networks of the arms and how each is trained: the ``model`` of a ``fit`` config, with settings from no search.

The settings are those of ``configs/baseline`` and ``configs/finetune``, made to fit the size and the number of images.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_automl.auto.facts import Facts

#: The pretrained network when the user names none; its weights are a pip package.
BACKBONE = "efficientnet_lite0"

#: Train images below which fine-tuning leaves the statistics of batch norms at rest (benchmarks/adapters_transfer).
FEWEST_FOR_STATISTICS = 2000
#: Ratio of the largest to the smallest class above which classes are weighted.
_IMBALANCED = 1.5


class Source(NamedTuple):
    """Where an arm's network comes from.

    Args:
        backbone: Name of the pretrained network.
        weights: File with its weights, or None for those that come with it.
        genotype: What a searched network is built of: a file, or a published name.
    """

    backbone: str = BACKBONE
    weights: str | None = None
    genotype: str = "pc_darts_cifar"


def cnn(facts: Facts, source: Source) -> dict[str, Any]:
    """Blocks that halve the image until 3 to 5 pixels are left: at least two, at most five."""
    halved = min(5, max(0, int(math.log2(min(facts.image_size) / 3))))
    blocks = max(2, halved)
    network = {
        "filters": ([64, 128] if blocks == 2 else [32, 64, 128, 128, 128])[:blocks],
        "kernels": 3 if min(facts.image_size) >= 3 else 1,
        "pools": ["max" if block < halved else "none" for block in range(blocks)],
        "conv_dropout": 0.0,
        "units": [128],
        "fc_dropout": 0.3,
    }
    return _from_scratch(facts, "TunableCNN", network, lr=3.0e-3, weight_decay=0.01)


def resnet(facts: Facts, source: Source) -> dict[str, Any]:
    """ResNet-20."""
    return _from_scratch(facts, "ResNet", {"depth": 20}, lr=2.0e-3, weight_decay=0.05)


def densenet(facts: Facts, source: Source) -> dict[str, Any]:
    """DenseNet-BC of 40 layers; from 64 pixels on it halves the images twice at first, as for ImageNet."""
    network = {
        **{"depth": 40, "growth": 12, "bottleneck": True, "compression": 0.5, "dropout": 0.0},
        "stem": "small" if min(facts.image_size) < 64 else "imagenet",
    }
    return _from_scratch(facts, "DenseNet", network, lr=2.0e-3, weight_decay=0.05)


def pcdarts(facts: Facts, source: Source) -> dict[str, Any]:
    """The network of a genotype."""
    network = {"genotype": source.genotype, "channels": 16, "cells": 5, "drop_path": 0.1}
    return _from_scratch(facts, "GenotypeNetwork", network, lr=2.0e-3, weight_decay=0.05)


def head(facts: Facts, source: Source) -> dict[str, Any]:
    """The last layer alone."""
    return _fine_tuned(facts, source, lr=5.0e-3, weight_decay=0.01, unfreeze="head", batch_norm="frozen")


def finetune(facts: Facts, source: Source) -> dict[str, Any]:
    """All layers; a new head learns faster than they do."""
    few = facts.number("train") < FEWEST_FOR_STATISTICS
    return _fine_tuned(
        facts,
        source,
        lr=3.0e-4 if few else 5.0e-4,
        weight_decay=0.05,
        unfreeze="all",
        batch_norm="frozen" if few else "trained",
        head_lr=2.0e-3,
        layer_decay=1.0,
    )


def lora(facts: Facts, source: Source) -> dict[str, Any]:
    """LoRA of rank 4 on all layers for which it is smaller than the layer."""
    adapter = {"class_path": "LoraConfig", "init_args": {"r": 4, "lora_alpha": 4}}
    return _fine_tuned(facts, source, lr=2.0e-3, weight_decay=0.01, adapter=adapter, batch_norm="frozen")


def conv_adapter(facts: Facts, source: Source) -> dict[str, Any]:
    """A conv adapter beside each residual block, with a learnable scale a channel."""
    beside = {"scheme": "residual_parallel", "compression": 8, "scale": "learnable", "scale_per": "channel"}
    adapter = {"class_path": "ConvAdapterConfig", "init_args": beside}
    return _fine_tuned(facts, source, lr=5.0e-3, weight_decay=0.01, adapter=adapter, batch_norm="frozen")


def _from_scratch(facts: Facts, network: str, arguments: dict[str, Any], **rates: float) -> dict[str, Any]:
    return _task(facts, "ClassificationTask", {"class_path": network, "init_args": arguments}, rates)


def _fine_tuned(facts: Facts, source: Source, *, lr: float, weight_decay: float, **how: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"name": source.backbone, "resize": enlarged(facts)}
    if source.weights is not None:
        arguments["weights"] = source.weights
    network = {"class_path": "Backbone", "init_args": arguments}
    return _task(facts, "FinetuneTask", network, {"lr": lr, "weight_decay": weight_decay}, how)


def enlarged(facts: Facts) -> int | None:
    """Pixels to which a backbone resizes the images, None if they stay: one made for 224 gets more out of 96 than 28.

    Six-fold at most: more pixels than that hold nothing new, and they cost time.
    """
    side = min(facts.image_size)
    return None if side >= 96 else min(96, 6 * side)


def _task(
    facts: Facts,
    name: str,
    network: Mapping[str, Any],
    rates: Mapping[str, float],
    how: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "class_path": name,
        "init_args": {
            "model": dict(network),
            **(how or {}),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {**rates, "fused": True}},
            "scheduler": {"class_path": "WarmupCosineLR"},
            "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.0}},
            "class_weights": "balanced" if facts.imbalance > _IMBALANCED else None,
            "decay_norms_and_biases": False,
        },
    }
