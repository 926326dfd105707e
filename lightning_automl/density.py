"""Density matching in a process of the trial server: policies scored on the fold that a network was not trained on."""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from optuna.samplers import BaseSampler
from torch import Tensor

from lightning_automl.augment.policy import Policy
from lightning_automl.results.network import DIVERGED, probabilities, trained_task
from lightning_automl.results.run import Run, open_data
from lightning_automl.rundir import UserError, index_digest
from lightning_automl.search.channel import Channel
from lightning_automl.search.fast_autoaugment import (
    DensityMatch,
    FastAutoAugmentSearch,
    record_of,
    sampler_maker,
    search_round,
    seed_of,
)
from lightning_automl.search.policies import Scored

#: Pixels of all channels that a network gets at once when policies are scored, if its own batch is not larger. Of
#: 28 x 28 images a ResNet-8 takes 2 GB for 2**22 on a CPU, and 1.5 times as long for a policy as with 2**18 (0.2 GB).
_PIXELS, _PIXELS_OF_GPU = 2**18, 2**20

#: Bytes of held-out images that are kept on the device; more are read batch by batch.
_KEPT = 2**30


def score_fold(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Score policies on the val split of a run, which its network was not trained on.

    After each policy a message ``{"density": {"fold", "round", "number", "value"}}`` is sent; ``value`` is None when it
    failed.

    Args:
        payload: ``directory`` of the fold's run; ``records``, the folder for ``fold-K-round-T.jsonl``; ``fold``, its
            number; ``method``, ``class_path`` and ``init_args`` of a :class:`FastAutoAugmentSearch`; ``sampler``,
            likewise, or None; ``trials``, policies a round, those of former calls included; ``seed``.
        channel: To the search.

    Returns:
        ``identity_value``: what clean images are given; ``evaluations``: trials of all rounds, those of former calls
        included; ``failed``: those of them without a value; ``seconds``: of the scoring alone, in this call.

    Raises:
        UserError: If the data are others than those of the training, the network gives no numbers, the sampler cannot
            go on after a kill, or a record is of another search.
    """
    run = Run.read(payload["directory"])
    method = _method(payload["method"])
    fold, seed, records = payload["fold"], payload["seed"], Path(payload["records"])
    make_sampler = sampler_maker(payload["sampler"])
    data = open_data(run)
    if run.data.get("index") != index_digest(data.contents.names, data.contents.labels.tolist()):
        raise UserError(f"the data are not those that {run.directory} was trained on; restore them, or start anew")
    channel.beat()
    dataset = data.dataset("val")
    channel.beat()
    network, device = trained_network(run)
    images: Any = _HeldOut(dataset, device)
    if len(images) * data.image_bytes <= _KEPT:
        images = images[:]
    pixels = _PIXELS if device.type == "cpu" else _PIXELS_OF_GPU
    began = time.monotonic()
    match = DensityMatch(
        network,
        images,
        dataset.labels.to(device),
        reduce=method.reduce,
        objective=method.objective,
        batch=max(data.device_batch_size, pixels // data.image_bytes),
        between=_Beat(channel),
    )
    if match.clean != match.clean:
        raise UserError(DIVERGED.format(run.directory))
    policies = method.policies(data.channels, data.image_size)
    scored: list[Scored] = []
    for turn in range(method.rounds):
        scored += search_round(
            policies,
            _Draws(match, seed, fold, turn),
            payload["trials"],
            record_of(records, fold, turn),
            _Samplers(make_sampler, seed, fold, turn),
            identity={
                **{name: payload[name] for name in ("fold", "seed", "sampler")},
                **{"round": turn, "reduce": method.reduce, "objective": method.objective},
            },
            on_trial=_Told(channel, fold, turn),
        )
    return {
        "identity_value": match.clean,
        "evaluations": len(scored),
        "failed": sum(each.value is None for each in scored),
        "seconds": time.monotonic() - began,
    }


def _method(spec: dict[str, Any]) -> FastAutoAugmentSearch:
    module, _, name = spec["class_path"].rpartition(".")
    method: FastAutoAugmentSearch = getattr(import_module(module), name)(**spec["init_args"])
    return method


class _Beat:
    """Says at most once a second that this process is alive."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sent = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() > self._sent + 1:
            self._channel.beat()
            self._sent = time.monotonic()


class _Draws:
    """Scores a policy with draws that are its own, so that none is kept for a lucky one that all share."""

    def __init__(self, match: DensityMatch, seed: int, fold: int, turn: int) -> None:
        self._match = match
        self._place = seed, fold, turn

    def __call__(self, policy: Policy, number: int) -> float:
        return self._match(policy, seed_of(*self._place, number, "draws"))


class _Samplers:
    """Makes the sampler of each trial."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, fold: int, turn: int) -> None:
        self._make = make
        self._place = seed, fold, turn

    def __call__(self, number: int) -> BaseSampler:
        return self._make(seed_of(*self._place, number))


class _Told:
    """Tells the search of each trial."""

    def __init__(self, channel: Channel, fold: int, turn: int) -> None:
        self._channel = channel
        self._place = {"fold": fold, "round": turn}

    def __call__(self, each: Scored) -> None:
        self._channel.send({"density": {**self._place, "number": each.number, "value": each.value}})


class _HeldOut:
    """Images of a data set on a device, read when they are looked at.

    Args:
        dataset: ``dataset[indices]`` is images and labels.
        device: Where the images are wanted.
    """

    def __init__(self, dataset: Any, device: torch.device) -> None:
        self._dataset = dataset
        self._device = device

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: slice) -> Tensor:
        images: Tensor = self._dataset[torch.arange(len(self))[rows]][0]
        return images.to(self._device, non_blocking=True)


def trained_network(run: Run) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    """The network of a run as :class:`DensityMatch` wants it, on the device and in the precision of its training."""
    task = trained_task(run)
    trainer = Trainer(
        accelerator=run.config["trainer"]["accelerator"],
        devices=1,
        precision=run.environment["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    precision, device = trainer.precision_plugin, trainer.strategy.root_device
    network: Any = precision.convert_module(task).to(device)
    if hasattr(task, "memory_format"):
        network.to(memory_format=task.memory_format)
    tiny = torch.finfo(torch.float32).tiny

    def score(images: Tensor) -> Tensor:
        with precision.forward_context():
            logits = network(precision.convert_input(images.float().div_(255)))
        return probabilities(task, logits.float()).clamp_min(tiny).log()

    return score, device
