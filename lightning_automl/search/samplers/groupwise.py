"""Search one group of parameters after the other, the rest fixed at the best values so far."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lightning_automl.rundir import UserError
from lightning_automl.search.samplers.population import PopulationSampler, allows, note, whole


class GroupwiseSampler(BaseSampler):
    """Search the parameters group by group, in the order of their importance as you expect it.

    Trial k (of those that are not lost) samples the parameters of group ``k // trials_per_group``, the last group all
    further trials; the others are fixed to the values of the best trial so far. What that trial lacks, as its
    condition does not hold there, or has out of the range asked for, is sampled too; so is everything before a trial is
    complete. The user attributes of a trial are ``group``, from 0, and ``fixed_to``, the number of the best trial
    then.

    Args:
        groups: Names of parameters, or patterns of them as ``filters_*``; the first group that matches has a parameter.
            ``*`` in the last one is all others.
        trials_per_group: At least 1.
        sampler: For the parameters of the group; :class:`optuna.samplers.TPESampler` when left out.
        seed: Of that TPE sampler; a sampler of your own has its own.

    Raises:
        UserError: For arguments out of these ranges, a name that is in two groups and a study of several objectives;
            when they are seen, for a parameter that is in no group and, unless the groups were compared with the space
            before (:meth:`check`), a group that matches no parameter of the trials so far.
    """

    def __init__(
        self,
        groups: list[list[str]],
        trials_per_group: int,
        sampler: BaseSampler | None = None,
        seed: int | None = None,
    ) -> None:
        if not groups or not all(groups) or any(isinstance(group, str) for group in groups):
            raise UserError(f"groups are {groups!r}; give a list of lists of names, none empty, as [[lr], ['units_*']]")
        names = [name for group in groups for name in group]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{', '.join(twice)} occurs twice in the groups; name each parameter once")
        if trials_per_group < 1:
            raise UserError(f"trials_per_group is {trials_per_group}; give at least 1")
        if isinstance(sampler, PopulationSampler):
            raise UserError("PopulationSampler keeps the values of a member together; give another sampler for groups")
        if sampler is not None and seed is not None:
            raise UserError(f"seed {seed} is for the TPE sampler that is taken by default; give it to your own sampler")
        self.groups = [list(group) for group in groups]
        self.trials_per_group = trials_per_group
        self.sampler = sampler or TPESampler(seed=seed)
        self.checked = False

    def check(self, names: Sequence[str]) -> None:
        """Compare the groups with the names of a whole space, before the first trial.

        Args:
            names: Of all parameters, those under a condition too.

        Raises:
            UserError: For a name in no group, and for an entry of the groups that no parameter is left for.
        """
        for name in names:
            self._group_of(name)
        for index, group in enumerate(self.groups):
            own = [name for name in names if self._group_of(name) == index]
            for pattern in group:
                if not any(fnmatchcase(name, pattern) for name in own):
                    raise UserError(
                        f"{pattern!r} in group {index + 1} matches no parameter that is not in an earlier group; "
                        f"known: {', '.join(sorted(names))}"
                    )

        self.checked = True

    def reseed_rng(self) -> None:
        """Reseed the sampler within."""
        self.sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the trial's group and the trial that the other parameters are fixed to."""
        _check_single_objective(study)
        if "group" not in trial.user_attrs:  # else a second `optuna.Trial` of the same trial
            note(study, trial, self._choose(whole(study), trial))
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """That of the sampler within, less what is fixed."""
        _check_single_objective(study)
        # Optuna's PartialFixedSampler does the same, but warns at each construction that it is experimental.
        space = self.sampler.infer_relative_search_space(study, trial)
        fixed = self._fixed(study, trial)
        return {name: distribution for name, distribution in space.items() if name not in fixed}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """By the sampler within."""
        _check_single_objective(study)
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The fixed value where there is one that the distribution allows, else one of the sampler within."""
        _check_single_objective(study)
        self._group_of(param_name)
        fixed = self._fixed(study, trial)
        if param_name in fixed and allows(param_distribution, fixed[param_name]):
            return fixed[param_name]
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """By the sampler within."""
        self.sampler.after_trial(study, trial, state, values)

    def _choose(self, study: Study, trial: FrozenTrial) -> dict[str, int]:
        trials = study.get_trials(deepcopy=False)
        earlier = [each for each in trials[: trial.number] if each.state != TrialState.WAITING]
        counted = sum(not each.user_attrs.get("lost") for each in earlier)
        group = min(counted // self.trials_per_group, len(self.groups) - 1)
        try:
            best = study.best_trial  # of those that keep their constraints
        except ValueError:
            return {"group": group}
        seen = {name for each in trials if each.state == TrialState.COMPLETE for name in each.params}
        # In a known space it is a group under a condition that did not hold yet: nobody's mistake.
        if not self.checked and not any(self._group_of(name) == group for name in seen):
            raise UserError(
                f"no parameter of group {group + 1}, {', '.join(self.groups[group])}, occurred in the trials so far, "
                f"so there is nothing to search; known: {', '.join(sorted(seen))}"
            )
        return {"group": group, "fixed_to": best.number}

    def _fixed(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """The values that the trial does not sample."""
        if "fixed_to" not in trial.user_attrs:
            return {}
        best = whole(study).get_trials(deepcopy=False)[trial.user_attrs["fixed_to"]]
        group = trial.user_attrs["group"]
        return {name: value for name, value in best.params.items() if self._group_of(name) != group}

    def _group_of(self, name: str) -> int:
        """The first group that has the parameter."""
        for index, group in enumerate(self.groups):
            if any(fnmatchcase(name, pattern) for pattern in group):
                return index
        listed = "; ".join(", ".join(group) for group in self.groups)
        raise UserError(f"parameter {name!r} is in no group; known: {listed}; add it to one, or '*' to the last")


def _check_single_objective(study: Study) -> None:
    if len(study.directions) > 1:
        raise UserError(
            f"GroupwiseSampler fixes values at the best trial, which {len(study.directions)} objectives do not have; "
            "give one monitor, or another sampler"
        )
