"""The searched architecture: PC-DARTS as one run, without the images of the folds that the comparison is made on."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lightning_automl.auto.arms import batch_size_of
from lightning_automl.auto.candidates import Candidate, candidate_of
from lightning_automl.auto.clock import Clock
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.shares import put_aside, resolved, seconds_for
from lightning_automl.rundir import UserError, differences, read_json
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.configs import closed, of_fold, to_its_end
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")

#: Name of the stage in the plan, and of its directory.
STAGE = "architecture_search"
#: Share of the epochs in which the alphas stay as they are; 15 of 50 in the paper.
_WARMUP = 0.3
#: Skip connections in a cell at most: with more of them an architecture search has collapsed.
_SKIPS = 2


def search_architecture(
    workers: Workers, directory: Path, facts: Facts, plan: Mapping[str, Any], clock: Clock, *, seed: int = 0
) -> Path | None:
    """Search cells by PC-DARTS, in the run directory ``architecture_search/``.

    The first of the search folds is its val split, the others are trained on: one half by the weights and one by the
    architecture. The comparison folds are in no split. A search that was killed goes on from its last checkpoint. When
    its time is over, the genotype of its newest epoch is taken if the architecture has moved by then; that is noted as
    a cut, and later commands leave it so.

    Args:
        workers: Do the work.
        directory: Of the strategy.
        facts: What was seen of the data.
        plan: Says in ``architecture_search`` how many ``epochs``, and when to end.
        clock: Knows how much time is left.
        seed: Of the run.

    Returns:
        The file of the genotype; None if no search is planned, or it came to nothing, which is no error.

    Raises:
        DiskFullError: If there is no space left.
    """
    wanted = plan[STAGE]
    if wanted is None:
        return None
    if len(facts.search_folds) < 2:
        log.warning("no architecture is searched: of %d search fold none is left to train on", len(facts.search_folds))
        return None
    place = directory / STAGE
    epochs = int(wanted["epochs"])
    if STAGE not in clock.cuts and not _is_done(place, epochs):
        own = workers.within(seconds_for(STAGE, plan, clock))
        try:
            own.fit("the architecture search", _settled(own, directory, facts, plan, epochs, seed), place)
        except (UserError, StudyFailed) as error:
            _note(clock, error if not own.out_of_time else None, _epochs_of(place), epochs)
    return _found(place)


def challenger(directory: Path, plan: Mapping[str, Any], genotype: Path, policy: str = "none") -> Candidate:
    """The arm ``pcdarts`` with the cells that were found; the genotype itself is in its config.

    Args:
        directory: Of the strategy.
        plan: Has in ``architecture_search`` the ``arm``, and for how many epochs it trains.
        genotype: What :func:`search_architecture` has returned.
        policy: Name of a file in ``policies/``, without ``.json``.

    Raises:
        UserError: If the arm was not measured, so that it has no config.
    """
    plain = candidate_of(directory, plan[STAGE]["arm"], policy)
    config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(plain.config)))
    config["model"]["init_args"]["model"]["init_args"]["genotype"] = read_json(genotype)
    return replace(plain, config=config, default=False)


def config_of(facts: Facts, *, epochs: int, metric: str, seed: int) -> dict[str, Any]:
    """The ``fit`` config of the search, not resolved.

    Xu et al., *PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search*, ICLR 2020,
    https://arxiv.org/abs/1907.05737, made smaller: 5 cells of 16 channels (8 in the paper), one in four of which goes
    through the operations; an alpha rate of 6e-3, as the paper has for ImageNet, since there are fewer steps.

    Args:
        facts: What was seen of the data.
        epochs: How long it searches.
        metric: Of the validation, for the choice of a checkpoint, which nobody uses.
        seed: Of the run.
    """
    network = {
        "class_path": "DartsSpace",
        "init_args": {
            "channels": 16,
            "cells": 5,
            "max_skips": _SKIPS,
            "relaxation": {"class_path": "PartialChannels", "init_args": {"k": 4}},
        },
    }
    task = {
        "model": network,
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 3.0e-4},
        },
        "scheduler": {"class_path": "WarmupCosineLR", "init_args": {"final": 0.02}},
        "arch_optimizer": {
            "class_path": "torch.optim.Adam",
            "init_args": {"lr": 6.0e-3, "betas": [0.5, 0.999], "weight_decay": 1.0e-3},
        },
        "warmup_epochs": int(_WARMUP * epochs),
    }
    data = {
        "class_path": facts.data["class_path"],
        "init_args": {
            **facts.data["init_args"],
            "batch_size": batch_size_of(facts),
            "base_augment": "crop" if "crop" in facts.space["operations"] else "none",
            "arch_fraction": 0.5,
        },
    }
    config = {
        "seed_everything": seed,
        "model": {"class_path": "DartsTask", "init_args": task},
        "data": data,
        "trainer": {"max_epochs": epochs},
        "monitor": metric,
        "test_after_fit": False,
    }
    return of_fold(config, facts.search_folds[0], facts.folds, facts.comparison_folds)


def _settled(
    workers: Workers, directory: Path, facts: Facts, plan: Mapping[str, Any], epochs: int, seed: int
) -> dict[str, Any]:
    """The resolved config of the search; what was searched by another one is put aside."""
    place = directory / STAGE
    config = config_of(facts, epochs=epochs, metric=plan["metric"], seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = resolved(workers, "the look at the architecture search", config, Path(scratch, "check.yaml"))
    whole = to_its_end(closed(whole, directory))
    if (place / "config.yaml").exists() and differences(_config(place), whole):
        log.info("the architecture search is now another one; the former is in %s", put_aside(place))
    return whole


def _is_done(place: Path, epochs: int) -> bool:
    """Whether it was searched to its end, for so many epochs."""
    finished = (read_json(place / "summary.json") or {}).get("status") == "finished"
    return finished and bool(_config(place)["trainer"]["max_epochs"] == epochs)


def _config(place: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
    return config


def _epochs_of(place: Path) -> int:
    """Epochs that are done."""
    return len((read_json(place / "architecture.json") or {}).get("epochs", ()))


def _note(clock: Clock, error: Exception | None, done: int, epochs: int) -> None:
    """Note why the search has ended early."""
    so_far = f"after {done} of {epochs} epochs"
    if error is None:
        sentence = f"The architecture search was ended by the budget {so_far}."
    else:
        sentence = f"The architecture search failed {so_far}: {error}."
    log.warning("%s", sentence)
    clock.cut(STAGE, sentence)


def _found(place: Path) -> Path | None:
    """The genotype, unless its architecture has never moved, so that it was drawn by lot."""
    path = place / "genotype.json"
    if not path.exists() or _epochs_of(place) <= _config(place)["model"]["init_args"]["warmup_epochs"]:
        log.warning("No architecture was found.")
        return None
    return path
