"""End a training early when a study's pruner says so, on all ranks at the same validation."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Protocol, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_automl.mistakes import one_sentence
from lightning_automl.rundir import UserError

Found = TypeVar("Found")


class TrialLike(Protocol):
    """An ``optuna.Trial``, or what passes on to one in another process.

    With an attribute ``intermediate_values`` (value by step) it says which reports it has already.
    """

    def report(self, value: float, step: int) -> None:
        """Take the value after ``step`` epochs."""

    def should_prune(self) -> bool:
        """Whether the reports so far are not worth going on."""


class UnknownMetricError(UserError, KeyError):
    """Nothing logs the monitored metric; the sentence lists those that are logged."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its argument as Python source


class NonFiniteMetricError(FloatingPointError):
    """A metric is NaN or infinite: the network has diverged, and its value is no result."""


class TrialPruning(Callback):
    """Reports a validation metric to a trial after each epoch, and ends the training when the trial's pruner says so.

    ``trainer.fit`` then raises ``optuna.TrialPruned`` by itself in the process that has the trial, so that the study
    records it as pruned with the value that was reported last. In the other processes of the run ``fit`` returns, and
    they find ``pruned`` to be true: whatever follows ``fit`` and needs all processes has to look at it.

    Reports carry the number of epochs done, from 1, and the metric of the last validation of the epoch. They are a part
    of the checkpoint: a continued run hands those on that its trial does not know, and asks at once whether to go on.

    Args:
        trial: Takes the reports; in a run of several processes that of global rank 0, and ``None`` in the others.
        monitor: Name of the metric.

    Attributes:
        pruned: Whether the training was ended here, the same on all ranks.
        reported: The ``[step, value]`` so far.

    Raises:
        UserError: On all ranks when training starts, if rank 0 has no trial or another rank has one, the study has
            several objectives or nothing is validated.
        UnknownMetricError: On all ranks after the first validation, if nothing logs ``monitor``.
        NonFiniteMetricError: On all ranks, if ``monitor`` or a metric called ``*_loss`` is NaN or infinite.
        optuna.TrialPruned: On rank 0 at the end of ``fit``, if pruned.
    """

    def __init__(self, trial: TrialLike | None, monitor: str = "val_accuracy") -> None:
        self.trial = trial
        self.monitor = monitor
        self.pruned = False
        self.reported: list[list[float]] = []
        self._known: set[int] | None = None  # steps that the trial has
        self._fresh: dict[str, float] | None = None  # of a validation that may be the last of its epoch
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """The reports so far, and the metrics of a validation within the epoch."""
        return {"reported": list(self.reported), "fresh": self._fresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the reports of the run that is continued."""
        self.reported, self._fresh = state_dict["reported"], state_dict["fresh"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could only end in a run without reports, or in ranks that wait for each other for ever."""
        if stage != "fit":
            return
        self.pruned, self._fresh = False, None
        self.reported = [each for each in self.reported if each[0] <= trainer.current_epoch]  # of a former training
        # Each rank sees another mistake or none: they tell each other, so that all of them raise.
        mistakes = [mistake for mistake in _of_all_ranks(trainer, self._mistake(trainer)) if mistake]
        if mistakes:
            raise UserError(mistakes[0])

    def _mistake(self, trainer: Trainer) -> str:
        if trainer.is_global_zero != (self.trial is not None):
            found = "no trial" if trainer.is_global_zero else "a trial"
            return (
                f"TrialPruning has {found} on rank {trainer.global_rank}; give it the study's trial in the process of "
                "rank 0, which alone may ask the study, and None in all others"
            )
        objectives = len(getattr(getattr(self.trial, "study", None), "directions", ()))
        if objectives > 1:
            return _one_objective(f"the study has {objectives}")
        if not trainer.enable_validation:
            return f"TrialPruning waits for {self.monitor!r}, but nothing is validated; give data to validate with"
        return ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand on what a continued run has reported before, and ask whether to go on with it.

        Here and not when training starts, which it does not if the last epoch was done before the run was killed.
        """
        if self.reported:
            self._ask(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last validation of an epoch, before a checkpoint is written."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._fresh = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name == self.monitor or name.endswith("_loss")
        }
        self._judge_if_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a validation that was the last of its epoch though batches followed (``val_check_interval``)."""
        self._judge_if_last(trainer, pl_module)

    def _judge_if_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short (EarlyStopping, max_time, max_steps) is not done and has no last batch.
        if self._fresh is None or not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        fresh, self._fresh = self._fresh, None
        if not self.pruned:  # else Lightning goes on until min_epochs
            self._judge(trainer, pl_module, fresh)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, fresh: dict[str, float]) -> None:
        step = trainer.current_epoch + 1
        ranks = _of_all_ranks(trainer, fresh)
        if any(self.monitor not in found for found in ranks):
            raise UnknownMetricError(
                f"monitor {self.monitor!r} is not logged by the validation of {type(pl_module).__name__}; "
                f"logged are: {', '.join(sorted(trainer.callback_metrics)) or 'none'}"
            )
        for name, value in ((name, value) for found in ranks for name, value in found.items()):
            if not math.isfinite(value):
                raise NonFiniteMetricError(
                    f"{name} is {value} in epoch {step}: the network has diverged; "
                    "lower the learning rate or set trainer.gradient_clip_val"
                )
        value = self._agreed(ranks)
        if not self.reported or self.reported[-1][0] < step:
            self.reported.append([step, value])
        self._ask(trainer)

    def _agreed(self, ranks: list[dict[str, float]]) -> float:
        """The value that all ranks have, or the mean of theirs."""
        values = [found[self.monitor] for found in ranks]
        if min(values) == max(values):
            return values[0]
        if not self._warned:
            shown = ", ".join(f"{value:.6g}" for value in values)
            rank_zero_warn(
                f"{self.monitor} is {shown} on the {len(values)} ranks, and the mean is reported; "
                "log it with sync_dist=True, or as a torchmetrics object"
            )
            self._warned = True
        return fmean(values)

    def _ask(self, trainer: Trainer) -> None:
        """Let rank 0 report and ask, and do the same on all ranks, also when that failed."""
        failure: Exception | None = None
        stop = False
        if self.trial is not None:
            try:
                stop = self._report(self.trial)
            except Exception as error:  # a database may be gone: the other ranks must not wait for this one
                failure = error
        # A collective: every rank comes here after every last validation, whether or not anything is to be pruned.
        stop, several, sentence = trainer.strategy.broadcast(
            (stop, isinstance(failure, NotImplementedError), "" if failure is None else one_sentence(failure))
        )
        if several:  # what Optuna raises for several objectives
            raise UserError(_one_objective(sentence)) from failure
        if failure is not None:
            raise failure
        if sentence:
            raise RuntimeError(f"rank 0 could not report to its trial: {sentence}")
        if stop:
            self.pruned = trainer.should_stop = True

    def _report(self, trial: TrialLike) -> bool:
        if self._known is None:
            self._known = _known_steps(trial)
        for step, value in self.reported:
            if step not in self._known:
                trial.report(value, int(step))
                self._known.add(int(step))
        return trial.should_prune()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the study, where it is, by the exception that it expects.

        Checked in Lightning 2.6.6: each ``on_fit_end`` has run on all ranks by now, and no rank waits for another any
        more. What comes after an exception follows, with ``on_exception`` in place of the hooks ``teardown`` that are
        left.
        """
        if stage == "fit" and self.pruned and self.trial is not None:
            from optuna import TrialPruned  # half a second that other runs need not spend

            step, value = self.reported[-1]
            raise TrialPruned(f"pruned after {step:.0f} epochs with {self.monitor} {value:.6g}")


def _one_objective(found: str) -> str:
    return f"a pruner needs one objective ({found.rstrip('.')}); give one monitor, or leave TrialPruning out"


def _of_all_ranks(trainer: Trainer, own: Found) -> list[Found]:
    """What each rank has found, by rank; a collective."""
    return [trainer.strategy.broadcast(own, src=rank) for rank in range(trainer.world_size)]


def _known_steps(trial: TrialLike) -> set[int]:
    values: Mapping[int, float] = getattr(trial, "intermediate_values", {})
    study = getattr(trial, "study", None)
    if study is not None:  # an optuna.Trial has no public way to its own reports
        values = study.get_trials(deepcopy=False)[getattr(trial, "number")].intermediate_values  # noqa: B009  # not of every trial
    return {int(step) for step in values}
