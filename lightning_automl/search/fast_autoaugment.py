"""Fast AutoAugment: find augmentation policies without training with any of them.

A network that was trained on other images says how well it still recognises what a policy makes of held-out ones.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import jsonargparse
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState, create_trial
from torch import Tensor

from lightning_automl.augment import engine
from lightning_automl.augment.policy import Policy
from lightning_automl.augment.spaces import OperationSpace
from lightning_automl.rundir import UserError, differences
from lightning_automl.search.policies import PolicyMethod, PolicySpace, Scored
from lightning_automl.search.study import derived_seed

#: Images that the network gets at once, when nothing else is said; several copies of an image count as several.
BATCH = 512

#: Samplers that remember more than the trials that have ended, or do not take a seed for each.
_REMEMBERING = (
    *("CmaEsSampler", "NSGAIISampler", "NSGAIIISampler"),
    *("GridSampler", "BruteForceSampler", "QMCSampler", "PopulationSampler", "PartialFixedSampler", "GroupwiseSampler"),
)

#: Seconds between two moments at which what was recorded is safe from a failure of the power, too.
_SAFE = 1.0


class Images(Protocol):
    """uint8 images ``(images, channels, height, width)``: a tensor, or what reads them when they are looked at."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Those of some rows."""


class FastAutoAugmentSearch(PolicyMethod):
    """Score policies by density matching: nothing is trained but one network a fold.

    Lim et al., *Fast AutoAugment*, NeurIPS 2019, https://arxiv.org/abs/1905.00397 (algorithm 1). The data are cut into
    K folds. For each, a network is trained on the others; then a sampler proposes B policies in each of T rounds, and
    a policy's value is the loss of that network on the fold's images augmented by it, which is small when the policy
    makes images that look to the network like those it was trained on. The N best of each round are kept; the union of
    all is the policy that is found.

    The released code departs from the paper, and what it does can be chosen: with ``reduce: min`` and ``objective:
    error`` an image counts as recognised when any of its copies, one a sub-policy, is. That is optimistic: one
    sub-policy that does next to nothing hides what the others do.

    Args:
        space: What may be done: a name, a YAML file or its content, as of an image policy.
        operations: Those to choose from; all of the space but those of ``base_augment``, and those that do nothing to
            the images at hand, when left out.
        rounds: T, searches on each fold, independent of each other.
        keep: N, policies kept of each round.
        sub_policies: Of each policy that is tried.
        length: Steps of each sub-policy.
        reduce: What the copies of an image come to: ``mean``, or ``min`` as in the released code.
        objective: ``loss``: minus the logarithm of the probability of the label; ``error``: whether another class is
            more probable.

    Raises:
        UserError: If an operation is unknown or forbidden in the space, or a number is too small.
    """

    direction: Literal["minimize", "maximize"] = "minimize"

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace = "natural",
        operations: list[str] | None = None,
        rounds: int = 2,
        keep: int = 10,
        sub_policies: int = 5,
        length: int = 2,
        reduce: Literal["mean", "min"] = "mean",
        objective: Literal["loss", "error"] = "loss",
    ) -> None:
        if rounds < 1:
            raise UserError(f"rounds is {rounds}; it must be 1 or more")
        for what, value, known in (("reduce", reduce, ("mean", "min")), ("objective", objective, ("loss", "error"))):
            if value not in known:
                raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        super().__init__(space, operations, keep, sub_policies, length, None, None)
        self.rounds = rounds
        self.reduce: Literal["mean", "min"] = reduce
        self.objective: Literal["loss", "error"] = objective

    def check(self, trials: int, folds: int) -> None:
        """See :meth:`PolicyMethod.check`."""
        super().check(trials, folds)
        if folds < 2:
            raise UserError(f"folds is {folds}; a network is trained on the other folds, so give 2 or more")

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PolicyMethod.arguments`."""
        return {
            **super().arguments(),
            "rounds": self.rounds,
            "reduce": self.reduce,
            "objective": self.objective,
        }


class DensityMatch:
    """How well a network recognises held-out images that a policy has augmented: one copy by each sub-policy.

    Lim et al., *Fast AutoAugment*, NeurIPS 2019, https://arxiv.org/abs/1905.00397 (equation 4). The copies of all
    sub-policies go through operations and network together. Copies that are as the image was (their steps were not
    done, or did nothing) are given what the clean image was, which is known.

    Args:
        network: Maps uint8 images ``(batch, channels, height, width)`` to logarithms of probabilities ``(batch,
            classes)``, in evaluation mode, each image by itself.
        images: uint8 ``(images, channels, height, width)``, held out from the network's training, or what gives slices
            of them; they are augmented on the device they are on.
        labels: int64 ``(images,)``, on the same device.
        reduce: What the copies of an image come to: their mean or the smallest.
        objective: What a copy is given: its loss, minus the logarithm of its label's probability; or its error, 1 if
            another class is more probable.
        batch: Copies at once.
        between: Called after each batch.

    Attributes:
        clean: Mean over the images as they are: the value of the policy that does nothing.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        images: Images,
        labels: Tensor,
        *,
        reduce: Literal["mean", "min"] = "mean",
        objective: Literal["loss", "error"] = "loss",
        batch: int = BATCH,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._network = network
        self._images = images
        self._labels = labels
        self._reduce = reduce
        self._objective = objective
        self._batch = batch
        self._between = between
        with torch.inference_mode():
            self._clean = torch.cat([self._of(images[rows], labels[rows]) for rows in self._slices(1)])
            self.clean = float(self._clean.double().mean())

    def __call__(self, policy: Policy, seed: int) -> float:
        """The mean over the images; NaN if the network gives one.

        All draws are made first, so that the value does not depend on ``batch``, but for ``sample_pairing``, whose
        other image is one of the same batch.

        Args:
            policy: What is done to the images.
            seed: Of its draws.
        """
        copies, count = len(policy), len(self._labels)
        plan = policy.draw_each(count, torch.Generator().manual_seed(seed))
        places = torch.arange(copies * count).view(copies, count)
        sums = []
        with torch.inference_mode():
            for rows in self._slices(copies):
                images = torch.cat([self._images[rows]] * copies)  # unlike repeat() it keeps the layout in memory
                plan_here = plan[places[:, rows].flatten()]
                changed = engine.apply(images, plan_here, interpolation=policy.interpolation, fill=policy.fill)
                values = self._clean[rows].repeat(copies)
                new = (changed != images).flatten(1).any(1).nonzero()[:, 0]
                if len(new):
                    values[new] = self._of(changed[new], self._labels[rows].repeat(copies)[new])
                values = values.view(copies, -1)
                sums.append((values.mean(0) if self._reduce == "mean" else values.amin(0)).sum())
            return float(torch.stack(sums).double().sum()) / count

    def _slices(self, copies: int) -> Iterator[slice]:
        step = max(1, self._batch // copies)
        for first in range(0, len(self._labels), step):
            yield slice(first, first + step)
            self._between()

    def _of(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self._network(images).float()
        if self._objective == "loss":
            return -scores.gather(1, labels[:, None])[:, 0]
        wrong = (scores.argmax(1) != labels).float()
        return wrong.where(~scores.isnan().any(1), math.nan)


def default_sampler(seed: int) -> BaseSampler:
    """What proposes policies when nothing else is said: TPE that takes each parameter by itself, as in the paper.

    Optuna's own default takes all parameters together. With 30 of them and 200 trials that is faster (13 instead of 22
    ms a policy on one core) and finds worse: in ten searches each on a fold of the digits, the ten best had about twice
    the loss of clean images four times, with this one once; and it kept an operation that destroys images, with a
    probability so small that it hardly showed.
    """
    return TPESampler(seed=seed, multivariate=False)


def sampler_maker(spec: Mapping[str, Any] | None) -> Callable[[int], BaseSampler]:
    """Make samplers with a seed, from a ``class_path`` and ``init_args``.

    Raises:
        UserError: If such a sampler cannot go on from the trials alone, or takes no seed.
    """
    if spec is None:
        return default_sampler
    name = spec["class_path"].rsplit(".", 1)[-1]
    others = "use TPESampler, GPSampler or RandomSampler"
    if name in _REMEMBERING:
        raise UserError(
            f"{name} needs more than the policies that were scored, and could not go on after an interruption; {others}"
        )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseSampler, "sampler")

    def make(seed: int) -> BaseSampler:
        arguments = {**(spec.get("init_args") or {}), "seed": seed}
        read = parser.parse_object({"sampler": {"class_path": spec["class_path"], "init_args": arguments}})
        sampler: BaseSampler = parser.instantiate(read).sampler
        return sampler

    try:
        make(0)
    except Exception as error:  # before the networks are trained that are to score its policies
        raise UserError(f"{name} cannot be made with a seed of its own for each policy; {others}") from error
    return make


def seed_of(seed: int, fold: int, turn: int, number: int, what: str = "") -> int:
    """A seed of its own for each trial of each round of each fold, so that none depends on what ran before.

    Args:
        seed: Of the search.
        fold: Number of the fold.
        turn: Number of the round on it.
        number: Of the trial in the round.
        what: Tells apart several uses in a trial.
    """
    return derived_seed(seed, number + 1, f"fold {fold} round {turn} {what}")


def search_round(
    policies: PolicySpace,
    score: Callable[[Policy, int], float],
    trials: int,
    record: Path,
    make_sampler: Callable[[int], BaseSampler],
    *,
    identity: Mapping[str, Any] | None = None,
    on_trial: Callable[[Scored], None] = lambda scored: None,
) -> list[Scored]:
    """Score so many policies, each proposed by what is known of those before; a round of Fast AutoAugment.

    The study is in memory: a policy has 30 parameters, which are 30 transactions of a storage and more than its score
    costs. Instead each result is a line of ``record``, written at once. After ``kill -9`` the same call goes on behind
    the last whole line; and since each trial has a sampler of its own, the result is that of an uninterrupted call.

    Args:
        policies: What to choose from.
        score: Called with each policy and its number; small is good. What is not finite has failed: it counts as a
            trial and is never among the best.
        trials: How many in all, those of former calls included.
        record: File with a line of JSON for each; made when missing.
        make_sampler: Called with the number of each trial. It must work from the trials that have ended alone, as
            those of TPE, Gaussian processes and random search do.
        identity: What else must be the same when a record is continued, as JSON.
        on_trial: Called with each trial that has ended now.

    Returns:
        The trials in their order.

    Raises:
        UserError: If ``record`` is of another search, or in use.
    """
    distributions = policies.distributions()
    header = json.loads(json.dumps({"version": 1, "policies": policies.describe(), "identity": dict(identity or {})}))
    with _opened(record) as file:
        scored = _continued(file, record, header)[:trials]
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), direction="minimize")
        for each in scored:
            study.add_trial(_trial(each, distributions))
        safe = time.monotonic()
        for number in range(len(scored), trials):
            began = time.perf_counter()
            study.sampler = make_sampler(number)
            trial = study.ask(distributions)
            value = float(score(policies.policy(trial.params), number))
            failed = not math.isfinite(value)
            study.tell(trial, None if failed else value, TrialState.FAIL if failed else TrialState.COMPLETE)
            each = Scored(
                number,
                trial.params,
                None if failed else value,
                round(time.perf_counter() - began, 4),
                f"the value is {value}" if failed else "",
            )
            file.write(json.dumps(each.to_dict()).encode() + b"\n")
            file.flush()  # to the kernel, which no kill takes it from
            if time.monotonic() >= safe + _SAFE:  # for each trial it would cost as much as the trial
                os.fsync(file.fileno())
                safe = time.monotonic()
            scored.append(each)
            on_trial(each)
        os.fsync(file.fileno())
    return scored


def record_of(records: Path, fold: int, turn: int) -> Path:
    """Where the trials of a round on a fold are."""
    return records / f"fold-{fold}-round-{turn}.jsonl"


def read_round(record: Path) -> list[Scored]:
    """The trials in a record of :func:`search_round`, finished or not; none if there is no such file."""
    if not record.exists():
        return []
    _, lines, _ = _whole_lines(record.read_bytes())
    return lines


@contextmanager
def _opened(record: Path) -> Iterator[BinaryIO]:
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{record} is being written by another process; wait for it or end it") from error
        yield file


def _continued(file: BinaryIO, record: Path, header: dict[str, Any]) -> list[Scored]:
    """What the file has already, after a line that was cut off is removed; a new file gets its header."""
    file.seek(0)
    found, scored, length = _whole_lines(file.read())
    file.truncate(length)
    if found is None:
        file.write(json.dumps(header).encode() + b"\n")
        file.flush()
        return []
    for key, (old, new) in differences(found, header).items():
        raise UserError(f"{record} was made with {key}={old!r}, now it is {new!r}; give the former, or another --dir")
    return scored


def _whole_lines(content: bytes) -> tuple[dict[str, Any] | None, list[Scored], int]:
    """The header, the trials and the length of what is whole."""
    header: dict[str, Any] | None = None
    scored: list[Scored] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or (header is not None and entry.get("number") != len(scored)):
            break  # killed while it was written, or the power failed
        if header is None:
            header = entry
        else:
            scored.append(Scored(**entry))
        length += len(line)
    return header, scored, length


def _trial(scored: Scored, distributions: dict[str, BaseDistribution]) -> optuna.trial.FrozenTrial:
    return create_trial(
        state=TrialState[scored.state], value=scored.value, params=scored.values, distributions=distributions
    )
