"""Fast AutoAugment over runs: a network a fold, and policies scored by it, several folds at once."""

import csv
import io
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.augment import Identity, OperationSpace, Policy, save_policy
from lightning_automl.rundir import UserError, read_json, write_json, write_text
from lightning_automl.search.fast_autoaugment import FastAutoAugmentSearch, read_round, record_of
from lightning_automl.search.policies import PolicyMethod, Scored, best_of, merged
from lightning_automl.studies.configs import closed, of_fold, to_its_end, with_policy
from lightning_automl.studies.progress import Pace, bar
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")

#: Rounds of all folds, by fold and round.
Rounds = Mapping[tuple[int, int], Sequence[Scored]]


def fold_run(
    base: Mapping[str, Any], directory: Path, space: OperationSpace, fold: int, folds: int, apart: Sequence[int]
) -> dict[str, Any]:
    """The config of a fold's network: trained without a policy, on all folds but this one and those set apart.

    The last epoch counts. To take the best one would be a choice by the images on which policies are then scored.

    Args:
        base: The resolved fit config.
        directory: Of the search; the policy that does nothing is written to its ``folds/policy.json``.
        space: Whose base operations the run has to obey.
        fold: Number of the fold.
        folds: How many there are, those set apart included.
        apart: Numbers of those set apart.
    """
    policy = directory / "folds" / "policy.json"
    save_policy(Identity(space), policy)
    config = to_its_end(of_fold(closed(with_policy(base, policy), directory), fold, folds, apart))
    config["trainer"]["limit_val_batches"] = 0
    return config


def record_of_search(
    method: PolicyMethod, folds: int, trials: int, kept: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """What ``policy_search.json`` says of any method.

    Args:
        method: How policies were searched.
        folds: That were searched on.
        trials: Policies of a round, or of all.
        kept: Fold, round and number of each policy that is kept, and its :meth:`PolicyMethod.entry`.
    """
    return {
        "version": 1,
        "method": type(method).__name__,
        "arguments": method.arguments(),
        "space": method.space.to_dict(),
        "folds": folds,
        "trials": trials,
        "kept": list(kept),
        "acceptance": None,
    }


class FoldSearches:
    """Trains a network for each fold and lets it score policies; what is done is not done again.

    Args:
        workers: Do the work.
        base: The resolved fit config, without a policy.
        directory: Of the search: networks are in ``folds/K``, the trials of fold and round in
            ``density/fold-K-round-T.jsonl``.
        method: How policies are searched.
        folds: Number of folds that are searched on.
        apart: Number of further folds, the last ones, which no run sees.
        trials: Policies of a round.
        seed: Of the sampler.
        sampler: Spec of a sampler, or None.
        between: Number of folds between these, which networks are trained on and policies are not scored on.
    """

    def __init__(
        self,
        workers: Workers,
        base: Mapping[str, Any],
        directory: Path,
        method: FastAutoAugmentSearch,
        *,
        folds: int,
        apart: int,
        trials: int,
        seed: int,
        sampler: Mapping[str, Any] | None,
        between: int = 0,
    ) -> None:
        self.workers = workers
        self.base = base
        self.directory = directory
        self.method = method
        self.folds = folds
        self.all_folds = folds + between + apart
        self.apart = range(folds + between, self.all_folds)
        self.trials = trials
        self.seed = seed
        self.sampler = sampler
        self._lock = threading.Lock()
        self._best: dict[int, float] = {}

    @property
    def evaluations(self) -> int:
        """Policies that are scored in all."""
        return self.folds * self.method.rounds * self.trials

    def place(self, fold: int) -> Path:
        """Where the network of a fold is."""
        return self.directory / "folds" / str(fold)

    def run(self) -> None:
        """Train and score what is not done yet.

        Raises:
            UserError: If a run refuses its config.
            StudyFailed: If a training failed, or the time is over.
        """
        done = sum(len(scored) for scored in self.rounds().values())
        pace = Pace(self.evaluations, done)
        configs = [
            fold_run(self.base, self.directory, self.method.space, fold, self.all_folds, self.apart)
            for fold in range(self.folds)
        ]
        with bar("policies", self.evaluations) as advance:

            def work(fold: int) -> None:
                before = (read_json(self.place(fold) / "summary.json") or {}).get("status") == "finished"
                log.info("fold %d: %s", fold, "trained before" if before else "a network is trained without it")
                summary = self.workers.fit(f"the training without fold {fold}", configs[fold], self.place(fold))
                if not before:
                    log.info("fold %d: its network is trained (%.0f s); scoring policies", fold, summary["seconds"])
                self._score(fold, pace, advance)

            self.workers.each(work, range(self.folds))

    def _score(self, fold: int, pace: Pace, advance: Any) -> None:
        """Let the network of a fold score policies, unless it has."""
        path = self.directory / "density" / f"fold-{fold}.json"
        ended = [each for (own, _), scored in self.rounds().items() if own == fold for each in scored]
        if path.exists() and len(ended) == self.method.rounds * self.trials:
            return
        found = self.workers.do(
            f"the scoring on fold {fold}",
            {
                "do": "density",
                "directory": str(self.place(fold).resolve()),
                "records": str((self.directory / "density").resolve()),
                "method": {
                    "class_path": f"{type(self.method).__module__}.{type(self.method).__name__}",
                    "init_args": self.method.arguments(),
                },
                "sampler": self.sampler,
                "trials": self.trials,
                "seed": self.seed,
                "fold": fold,
            },
            self.place(fold) / "output.txt",
            on_message=lambda message: self._heard(fold, message, pace, advance),
        )
        identity = found["identity_value"]
        write_json(path, {"identity": identity})
        ended = [each for (own, _), scored in self.rounds().items() if own == fold for each in scored]
        best = best_of(ended, 1)
        failed = sum(each.value is None for each in ended)
        log.info(
            "fold %d: %d policies scored%s, best %s, unchanged images %.4g; %d of %d in all%s",
            fold,
            len(ended),
            f", {failed} of them without a value" if failed else "",
            f"{best[0].value:.4g}" if best else "none",
            identity,
            pace.done,
            pace.total,
            pace.left(),
        )

    def _heard(self, fold: int, message: Mapping[str, Any], pace: Pace, advance: Any) -> None:
        trial = message.get("density", {})
        if "number" not in trial:
            return
        with self._lock:
            pace.step()
            value = trial["value"]
            if value is not None:
                self._best[fold] = min(value, self._best.get(fold, value))
            top = f"best of fold {fold} {self._best[fold]:.4g}" if fold in self._best else ""
            advance(pace.done, top)
            if pace.done % max(1, pace.total // 20) == 0:
                log.info(
                    "%d/%d policies: fold %d, round %d, trial %d%s; %s%s",
                    pace.done,
                    pace.total,
                    fold,
                    trial["round"],
                    trial["number"],
                    "" if value is None else f", value {value:.4g}",
                    top or "none scored yet",
                    pace.left(),
                )

    def rounds(self) -> dict[tuple[int, int], list[Scored]]:
        """The trials of all folds and rounds, as far as they are scored."""
        return {
            (fold, number): read_round(record_of(self.directory / "density", fold, number))
            for fold in range(self.folds)
            for number in range(self.method.rounds)
        }

    def kept(self) -> list[tuple[int, int, Scored]]:
        """Fold, round and trial of the policies that are kept: the best of each round, the same share of a part of one.

        Of a round that was stopped early, as many as of a whole one would be hardly a choice.
        """
        return [
            (fold, number, each)
            for (fold, number), scored in self.rounds().items()
            for each in best_of(scored, self.method.keep * min(len(scored), self.trials) // self.trials)
        ]

    def policy(self) -> Policy:
        """What is found: the sub-policies of all that are kept, each once.

        Raises:
            UserError: If no policy has a value.
        """
        kept = self.kept()
        if not kept:
            reasons = [each.reason for scored in self.rounds().values() for each in scored]
            raise UserError(f"no policy was scored: {reasons[0] if reasons else 'there was none'}")
        policy = merged(self.method.policies(), [each for _, _, each in kept])
        log.info("policies kept: %d; sub-policies without repetitions: %d", len(kept), len(policy))
        return policy

    def record(self) -> dict[str, Any]:
        """What ``policy_search.json`` says of the search itself; it has no costs and no comparison."""
        kept = [
            {"fold": fold, "round": turn, "number": self.number(fold, turn, each.number), **self.method.entry(each)}
            for fold, turn, each in self.kept()
        ]
        evaluations = sum(len(scored) for scored in self.rounds().values())
        return {
            **record_of_search(self.method, self.folds, self.trials, kept),
            "evaluations": evaluations,
            "identity_values": self.identity_values(),
        }

    def density_seconds(self) -> float:
        """What the scoring of all policies has cost, summed over folds."""
        return round(math.fsum(each.seconds for scored in self.rounds().values() for each in scored), 3)

    def identity_values(self) -> list[float | None]:
        """What the network of each fold gives for images that nothing was done to; None where it is not known yet."""
        found = (read_json(self.directory / "density" / f"fold-{fold}.json") or {} for fold in range(self.folds))
        return [each.get("identity") for each in found]

    def number(self, fold: int, round: int, trial: int) -> int:
        """Of a trial among all; it stays the same when each round gets more trials."""
        return (trial * self.folds + fold) * self.method.rounds + round

    def write_table(self) -> None:
        """Write ``trials.csv``, one row a scored policy."""
        rows = []
        for (fold, round), scored in self.rounds().items():
            for each in scored:
                row = {
                    "number": self.number(fold, round, each.number),
                    "state": each.state,
                    "value": each.value,
                    "seconds": each.seconds,
                    "reason": each.reason,
                    "fold": fold,
                    "round": round,
                }
                rows.append(row | each.values)
        names = ["number", "state", "value", "seconds", "reason", "fold", "round"]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*names, *self.method.policies().distributions()])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["number"]))
        write_text(self.directory / "trials.csv", text.getvalue())
