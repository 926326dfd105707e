"""A finished model: runs of several seeds, put together as the validation split prefers, and calibrated by it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_automl.auto.averaging import choose_average
from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.evaluated import read_evaluated
from lightning_automl.auto.judging import score_name, scores_of
from lightning_automl.auto.operating import choose_temperature
from lightning_automl.auto.runs import Outcome
from lightning_automl.metrics.scores import SCORES
from lightning_automl.results.ensemble import Average, combine_predictions
from lightning_automl.results.run import Predictions


@dataclass(frozen=True)
class FinalModel:
    """What became of the final runs of a candidate.

    Attributes:
        candidate: Of which they are.
        seeds: The runs by seed.
        average: How they are put together.
        members: Directories of the runs that are asked: all, the one with the averaged weights, or the only one.
        values: The metric on the validation split for each way of averaging, None where there is none.
        why: A sentence about it.
        temperature: By which the logits are divided.
        temperature_why: A sentence about it.
    """

    candidate: Candidate
    seeds: Mapping[int, Outcome]
    average: Average
    members: Sequence[Path]
    values: Mapping[str, float | None]
    why: str
    temperature: float
    temperature_why: str

    def predictions(self, split: str, calibrated: bool = True) -> Predictions:
        """What it gives for the images of a split, as one run would; all members were evaluated on it.

        Where each did without another fold, ``val`` are the images of these folds, each by the members that have not
        seen it.
        """
        members = [read_evaluated(place, split) for place in self.members]
        return combine_predictions(members, self.temperature if calibrated else 1.0)

    def record(self, directory: Path) -> dict[str, Any]:
        """Its entry in ``evaluation.json``: scores of each run as it is, and of the calibrated whole."""

        def scores(found: Predictions) -> dict[str, float]:
            return scores_of(found.probabilities, found.labels)

        seeds = [
            {
                "seed": seed,
                "directory": each.place.relative_to(directory).as_posix(),
                **{split: scores(read_evaluated(each.place, split)) for split in ("val", "test")},
                "seconds": each.seconds,
                "epochs": each.epochs,
            }
            for seed, each in self.seeds.items()
        ]
        return {
            **{"key": self.candidate.key, "title": self.candidate.title, "seeds": seeds},
            **{split: scores(self.predictions(split)) for split in ("val", "test")},
            **{"average": self.average, "temperature": self.temperature},
        }


def put_together(
    candidate: Candidate, seeds: Mapping[int, Outcome], averaged: Path | None, metric: str, direction: str
) -> FinalModel:
    """Put the runs of a candidate together as the validation split prefers.

    Args:
        candidate: Of which they are.
        seeds: One or more runs by seed, evaluated on ``val``.
        averaged: The directory with the mean of their weights, likewise, if there is one.
        metric: What decides.
        direction: ``maximize`` or ``minimize`` for it.
    """
    score = SCORES[score_name(metric)]
    places = [each.place for each in seeds.values()]
    single = [read_evaluated(place, "val") for place in places]
    of_each = [score(each.probabilities, each.labels) for each in single]
    values: dict[str, float | None] = {
        "predictions": None,
        "weights": None,
        "single": math.fsum(of_each) / len(of_each),
    }
    if len(single) > 1:
        together = combine_predictions(single)
        values["predictions"] = score(together.probabilities, together.labels)
        if averaged is not None:
            values["weights"] = score(read_evaluated(averaged, "val").probabilities, together.labels)
    average, why = choose_average(values, direction, metric)
    members = [averaged] if average == "weights" and averaged is not None else places
    validated = combine_predictions([read_evaluated(place, "val") for place in members])
    temperature, temperature_why = choose_temperature(validated.probabilities, validated.labels)
    return FinalModel(candidate, seeds, average, members, values, why, temperature, temperature_why)
