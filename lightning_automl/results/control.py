"""A found genotype beside random ones of the same space: what a study that tried both says of the search."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

import yaml

from lightning_automl.results.study import ParameterRecord, StudyRecord, TrialRecord
from lightning_automl.rundir import UserError, read_json

if TYPE_CHECKING:
    from lightning_automl.metrics import SampleDifference

#: Random genotypes that it takes to say anything of their spread.
FEWEST = 3
#: Metrics with such names lie in [0, 1], and so do the ends of their intervals.
_SHARES = ("accuracy", "auroc", "f1", "precision", "recall")
_RANDOM, _SEED = "random", "seed_everything"


@dataclass(frozen=True)
class TriedGenotype:
    """The runs of one genotype.

    Attributes:
        random: The seed that it was drawn with; None for the one that the search has found.
        values: Of the complete runs, one a seed.
        trials: All of its runs that have ended, the first ones of equal ones.
        mean: Of the values, NaN without one.
        low: The lower end of Student's 95 % interval of the mean over the seeds; NaN without two different values.
        high: The upper end.
    """

    random: int | None
    values: tuple[float, ...]
    trials: tuple[TrialRecord, ...]
    mean: float
    low: float
    high: float

    @property
    def name(self) -> str:
        """What it is called on a page."""
        return "found" if self.random is None else f"random {self.random}"

    @property
    def seconds(self) -> float:
        """Mean time of a complete run, NaN if it is not known."""
        known = [trial.seconds for trial in self.trials if trial.usable and trial.seconds]
        return fmean(known) if known else math.nan

    @property
    def missing(self) -> dict[str, int]:
        """How many of its runs gave no value, by state."""
        states = [trial.state for trial in self.trials if not trial.usable]
        return {state: states.count(state) for state in dict.fromkeys(states)}


@dataclass(frozen=True)
class Control:
    """The genotypes of a study, the best one first; those without a value last.

    Attributes:
        record: Of the study.
        parameter: The one that says which random genotype was trained.
        genotypes: Of the study.
        others: Labels of what else it varies, other than seeds.
    """

    record: StudyRecord
    parameter: ParameterRecord
    genotypes: tuple[TriedGenotype, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, record: StudyRecord) -> Self | None:
        """Of a study whose space has a network's ``random``; None for others, and before the first trial."""
        parameter = next((each for each in record.parameters.values() if _is_random(each)), None)
        if parameter is None or not record.trials:
            return None
        ended = [trial for trial in record.trials if trial.state not in ("LOST", "RUNNING", "WAITING")]
        by_random: dict[int | None, dict[str, TrialRecord]] = {}
        for trial in ended:
            random = trial.params.get(parameter.name)
            if parameter.name not in trial.params or not _is_seed(random):
                continue
            own = by_random.setdefault(random, {})
            key = str(sorted(trial.params.items()))  # equal runs tell nothing new
            if key not in own or (trial.usable and not own[key].usable):
                own[key] = trial
        if not by_random:
            return None
        bounded = any(word in record.monitors[0] for word in _SHARES)
        found = [_tried(random, tuple(own.values()), bounded) for random, own in by_random.items()]
        sign = -1 if record.maximize() else 1
        found.sort(
            key=lambda each: (
                math.isnan(each.mean),
                sign * each.mean if math.isfinite(each.mean) else 0,
                -1 if each.random is None else each.random,
            )
        )
        others = [each.label for each in record.parameters.values() if each is not parameter and not _is_run_seed(each)]
        return cls(record, parameter, tuple(found), tuple(others))

    @property
    def found(self) -> TriedGenotype | None:
        """The genotype of the search, if it was trained."""
        return next((each for each in self.genotypes if each.random is None), None)

    @cached_property
    def random(self) -> list[TriedGenotype]:
        """The random ones that have a value, the best one first."""
        return [each for each in self.genotypes if each.random is not None and each.values]

    @cached_property
    def difference(self) -> "SampleDifference | None":
        """The found one minus the mean of the random ones, or None where one is missing or there are too few.

        The unit is the genotype: each counts once, by the mean of its seeds.
        """
        from lightning_automl.metrics import difference_from_sample

        if self.found is None or not self.found.values or len(self.random) < FEWEST:
            return None
        return difference_from_sample(self.found.mean, [each.mean for each in self.random])

    @property
    def rank(self) -> int | None:
        """Place of the found one among all that have a value, from 1; equal ones share the better place."""
        if self.found is None or not self.found.values:
            return None
        sign = 1 if self.record.maximize() else -1
        found = self.found.mean  # means of equal values may differ in the last digit
        return 1 + sum(sign * each.mean > sign * found and not math.isclose(each.mean, found) for each in self.random)

    @property
    def tied(self) -> int:
        """How many random ones have the mean of the found one."""
        return 0 if self.found is None else sum(math.isclose(each.mean, self.found.mean) for each in self.random)

    @property
    def expected(self) -> tuple[float, float, float] | None:
        """Mean of the random ones, and the ends between which a further one would be expected; None for too few."""
        from lightning_automl.metrics import difference_from_sample

        if len(self.random) < FEWEST:
            return None
        means = [each.mean for each in self.random]
        centre = fmean(means)
        around = difference_from_sample(centre, means)
        return centre, centre + around.low, centre + around.high

    def parameters(self, tried: TriedGenotype) -> int | None:
        """Number of parameters of its network, if one of its runs says it."""
        for trial in tried.trials:
            if trial.directory:
                try:
                    content = read_json(self.record.directory / trial.directory / "environment.json")
                except (UserError, OSError):
                    continue
                network = content.get("network") if isinstance(content, Mapping) else None
                number = network.get("parameters") if isinstance(network, Mapping) else None
                if isinstance(number, int):
                    return number
        return None

    def genotype(self, tried: TriedGenotype) -> Any:
        """The `models.Genotype` of these runs.

        Raises:
            UserError: If its file is not there any more, or is none.
        """
        from lightning_automl.models.genotype import load_genotype, random_genotype

        configs = [self._config(trial) for trial in tried.trials]
        run = self.record.search.get("run")
        given = next((found for each in [*configs, run] if (found := self._arguments(each))), None)
        if given is None:
            raise UserError("no config of its runs is there any more")
        genotype = load_genotype(given["genotype"])
        return genotype if tried.random is None else random_genotype(genotype, tried.random)

    def _config(self, trial: TrialRecord) -> Any:
        if not trial.directory:
            return None
        try:
            return yaml.safe_load((self.record.directory / trial.directory / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return None

    def _arguments(self, config: Any) -> Mapping[str, Any] | None:
        """The arguments of the network beside ``random`` that have a genotype."""
        for key in self.parameter.path.split(".")[:-1]:
            config = config.get(key) if isinstance(config, Mapping) else None
        return config if isinstance(config, Mapping) and config.get("genotype") else None


def _is_random(parameter: ParameterRecord) -> bool:
    if parameter.path.rsplit(".", 1)[-1] != _RANDOM:
        return False
    return parameter.kind == "int" or (parameter.kind == "choice" and all(map(_is_seed, parameter.choices)))


def _is_run_seed(parameter: ParameterRecord) -> bool:
    return parameter.path.rsplit(".", 1)[-1] == _SEED


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _tried(random: int | None, trials: Sequence[TrialRecord], bounded: bool) -> TriedGenotype:
    values = tuple(trial.values[0] for trial in trials if trial.usable)
    mean, low, high = _student(values)
    if bounded:
        low, high = (min(max(end, 0.0), 1.0) if math.isfinite(end) else end for end in (low, high))
    return TriedGenotype(random, values, tuple(trials), mean, low, high)


def _student(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean with the ends of Student's 95 % interval; NaN where there are too few values, or all are equal."""
    if len(set(values)) < 2:
        return (fmean(values) if values else math.nan), math.nan, math.nan
    from statistics import stdev

    from scipy.stats import t

    mean = fmean(values)
    reach = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach
