"""Two real processes with gloo stand for two GPUs: started from outside, and by Lightning from a user's script."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from optuna.trial import TrialState
from two_ranks import part

from lightning_automl.callbacks import (
    AtomicCheckpointIO,
    NonFiniteMetricError,
    RunWriter,
    TrialPruning,
    UnknownMetricError,
)
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
SANITY = 0.999  # what a validation before the training finds
RISING = [0.1, 0.2, 0.3, 0.4, 0.5]


class Scripted(ClassificationTask):
    """Validates with given numbers: one an epoch, or a list of those within the epoch."""

    def __init__(self, numbers, metric="val_accuracy", **others):
        super().__init__(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8]), 10)
        self.numbers, self.metric, self.others = numbers, metric, others
        self.validations = 0

    def on_train_epoch_start(self):
        self.validations = 0

    def log_stage(self, stage):
        if stage == "val":
            found = self.numbers[self.current_epoch]
            if isinstance(found, list):
                found = found[self.validations]
            self.validations += not self.trainer.sanity_checking
            self.log_dict({self.metric: SANITY if self.trainer.sanity_checking else found, **self.others})


class Recorder:
    """A trial that writes down what it is told, and prunes after so many epochs."""

    def __init__(self, prune_at=math.inf, known=()):
        self.prune_at = prune_at
        self.intermediate_values = dict(known)
        self.reports = []

    def report(self, value, step):
        assert type(step) is int
        self.reports.append((step, pytest.approx(value)))
        self.intermediate_values[step] = value

    def should_prune(self):
        return max(self.intermediate_values) >= self.prune_at


class Counter(Callback):
    """Counts epochs and the ends of trainings."""

    def __init__(self, stop_in=None, fail_in=None):
        self.epochs = self.ends = 0
        self.stop_in, self.fail_in = stop_in, fail_in

    @property
    def state_key(self):
        return f"Counter {id(self)}"

    def on_train_batch_end(self, trainer, *_):
        place = (trainer.current_epoch, trainer.fit_loop.batch_idx)
        trainer.should_stop |= place == self.stop_in
        if place == self.fail_in:
            raise InterruptedError

    def on_train_epoch_end(self, *_):
        self.epochs += 1

    def on_fit_end(self, *_):
        self.ends += 1


def fit(trial, numbers, *others, task=None, directory=None, **arguments):
    """Train five batches an epoch; in a directory, go on from the checkpoint that is there."""
    callback = TrialPruning(trial, monitor="val_accuracy")
    arguments = {"max_epochs": len(numbers), "limit_train_batches": 5, "limit_val_batches": 1, **arguments}
    checkpoint = None
    if directory is not None:
        arguments["enable_checkpointing"] = None
        others = (*others, writer := RunWriter(directory))
        checkpoint = writer.last_checkpoint if writer.last_checkpoint.exists() else None
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback, *others], plugins=[AtomicCheckpointIO()], **QUIET | arguments
    )
    trainer.fit(task or Scripted(numbers), DigitsDataModule(), ckpt_path=checkpoint, weights_only=True)
    return callback


def pruned(*arguments, **others):
    with pytest.raises(optuna.TrialPruned) as caught:
        fit(*arguments, **others)
    return str(caught.value)


def test_each_epoch_is_reported_once_with_the_number_of_epochs_done_and_not_the_sanity_check():
    trial = Recorder()
    callback = fit(trial, [0.1, 0.3, 0.2], num_sanity_val_steps=1)
    assert trial.reports == [(1, 0.1), (2, 0.3), (3, 0.2)]
    assert not callback.pruned


@pytest.mark.parametrize("interval", [2, 0.4, 1])
def test_of_several_validations_in_an_epoch_the_last_is_reported(interval):
    trial = Recorder()
    fit(trial, [[0.9, 0.1, 0.9, 0.9, 0.3], [0.9, 0.2, 0.9, 0.9, 0.4]], val_check_interval=interval)
    assert trial.reports == ([(1, 0.3), (2, 0.4)] if interval == 1 else [(1, 0.1), (2, 0.2)])


def test_validations_counted_over_epochs_are_reported_in_the_epoch_they_fall_in():
    trial = Recorder()
    numbers = [[0.1], [0.2], [0.3], [0.9, 0.4]]  # of 5 batches: after batches 4, 8, 12, 16 and 20
    fit(trial, numbers, val_check_interval=4, check_val_every_n_epoch=None)
    assert trial.reports == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_epochs_without_validation_are_not_reported():
    trial = Recorder()
    fit(trial, [0.0, 0.1, 0.0, 0.2, 0.0], check_val_every_n_epoch=2)
    assert trial.reports == [(2, 0.1), (4, 0.2)]


def test_an_epoch_that_was_cut_short_is_not_reported():
    trial = Recorder()
    fit(trial, RISING, Counter(stop_in=(1, 1)))
    assert trial.reports == [(1, 0.1)]


@pytest.mark.parametrize("interval", [1.0, 2])
def test_fit_raises_when_the_trial_is_pruned_after_everybody_else_has_ended(interval):
    trial, before, after = Recorder(prune_at=2), Counter(), Counter()
    numbers = [[number] * 2 for number in RISING]
    callback = TrialPruning(trial)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[before, callback, after],
        max_epochs=5,
        limit_train_batches=5,
        limit_val_batches=1,
        val_check_interval=interval,
        **QUIET,
    )
    with pytest.raises(optuna.TrialPruned, match=r"pruned after 2 epochs with val_accuracy 0\.2"):
        trainer.fit(Scripted(numbers), DigitsDataModule())
    assert callback.pruned
    assert trial.reports == [(1, 0.1), (2, 0.2)]
    assert (before.epochs, before.ends) == (after.epochs, after.ends) == (2, 1)


def test_after_the_decision_nothing_is_reported_though_min_epochs_go_on():
    trial, counter = Recorder(prune_at=1), Counter()
    assert "after 1 epochs" in pruned(trial, RISING, counter, min_epochs=3)
    assert trial.reports == [(1, 0.1)]
    assert counter.epochs == 3


def test_a_trial_that_is_pruned_while_early_stopping_fires_is_pruned():
    stopping = EarlyStopping("val_accuracy", mode="max", patience=1)
    pruned(Recorder(prune_at=2), [0.5, 0.4, 0.3], stopping)
    assert stopping.stopped_epoch == 1
    assert not fit(Recorder(), [0.5, 0.4, 0.3], EarlyStopping("val_accuracy", mode="max", patience=1)).pruned


def test_a_metric_that_nobody_logs_is_a_user_error_and_a_key_error_and_lists_the_others():
    with pytest.raises(UnknownMetricError) as caught:
        fit(Recorder(), RISING, task=Scripted(RISING, metric="val_score", val_f1=0.5))
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == (
        "monitor 'val_accuracy' is not logged by the validation of Scripted; logged are: val_f1, val_score"
    )


@pytest.mark.parametrize(
    ("number", "loss", "told"),
    [
        (math.nan, 1.0, "val_accuracy is nan in epoch 1"),
        (0.5, math.inf, "val_loss is inf in epoch 1"),
        (0.5, math.nan, "val_loss is nan in epoch 1"),
    ],
)
def test_a_diverged_network_is_no_result(number, loss, told):
    trial = Recorder()
    with pytest.raises(NonFiniteMetricError, match=told) as caught:
        fit(trial, [number] * 2, task=Scripted([number] * 2, val_loss=loss, val_f1=math.nan))
    assert isinstance(caught.value, FloatingPointError)
    assert trial.reports == []


def test_a_finite_loss_beside_a_metric_that_is_undefined_is_a_result():
    trial = Recorder()
    fit(trial, [0.5], task=Scripted([0.5], val_loss=1.0, val_auroc=math.nan))
    assert trial.reports == [(1, 0.5)]


def test_one_process_without_a_trial_is_a_mistake_when_it_trains():
    with pytest.raises(UserError, match="TrialPruning has no trial on rank 0; give it the study's trial"):
        fit(None, RISING)
    trainer = Trainer(accelerator="cpu", callbacks=[TrialPruning(None)], limit_val_batches=1, **QUIET)
    (found,) = trainer.validate(Scripted(RISING), DigitsDataModule(), verbose=False)
    assert found == {"val_accuracy": pytest.approx(0.1)}


def test_training_without_validation_is_a_mistake():
    with pytest.raises(UserError, match="waits for 'val_accuracy', but nothing is validated"):
        fit(Recorder(), RISING, limit_val_batches=0)


def test_what_a_trial_raises_ends_the_run():
    class Gone(Recorder):
        def should_prune(self):
            raise ConnectionError("no database")

    with pytest.raises(ConnectionError, match="no database"):
        fit(Gone(), RISING)


# Continued runs


def interrupted(directory, numbers, where, **arguments):
    """Train until the given epoch and batch; what was reported by then."""
    trial = Recorder()
    with pytest.raises(InterruptedError):
        fit(trial, numbers, Counter(fail_in=where), directory=directory, **arguments)
    return trial


@pytest.mark.parametrize(("known", "handed_on"), [((), [1, 2, 3, 4, 5]), ((1, 2), [3, 4, 5]), ((1, 2, 3), [4, 5])])
def test_a_continued_run_hands_on_the_reports_that_its_trial_does_not_know(known, handed_on, tmp_path):
    assert interrupted(tmp_path, RISING, (2, 1)).reports == [(1, 0.1), (2, 0.2)]
    trial = Recorder(known={step: RISING[step - 1] for step in known})
    callback = fit(trial, RISING, directory=tmp_path)
    assert trial.reports == [(step, RISING[step - 1]) for step in handed_on]
    assert callback.reported == [[step, pytest.approx(RISING[step - 1])] for step in range(1, 6)]


def test_a_validation_within_the_epoch_before_a_kill_is_reported_at_the_end_of_the_epoch(tmp_path):
    numbers = [[0.9, 0.1], [0.9, 0.2], [0.9, 0.3]]
    # RunWriter writes a checkpoint at the validation after batch 4; batch 5 is lost.
    trial = interrupted(tmp_path, numbers, (1, 4), val_check_interval=2)
    assert trial.reports == [(1, 0.1)]
    fit(trial, numbers, directory=tmp_path, val_check_interval=2)
    assert trial.reports == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_continued_run_can_be_pruned(tmp_path):
    interrupted(tmp_path, RISING, (2, 1))
    trial, counter = Recorder(prune_at=4), Counter()
    assert "after 4 epochs" in pruned(trial, RISING, counter, directory=tmp_path)
    assert counter.epochs == 2


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_run_killed_between_its_last_report_and_its_end_is_pruned_without_further_training(epochs, tmp_path):
    """Also when its last epoch was done, so that there is nothing to train."""
    fit(Recorder(), RISING[:epochs], directory=tmp_path)
    trial, counter = Recorder(prune_at=2), Counter()
    assert f"after {epochs} epochs" in pruned(trial, RISING, counter, directory=tmp_path)
    assert (counter.epochs, counter.ends) == (0, 1)
    assert len(trial.reports) == epochs


def test_the_same_callback_in_a_new_training_starts_anew():
    trial = Recorder(prune_at=2)
    callback = TrialPruning(trial)
    for epochs, expected in ((3, [[1, 0.2], [2, 0.3]]), (1, [[1, 0.2]])):
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[callback],
            max_epochs=epochs,
            limit_train_batches=1,
            limit_val_batches=1,
            **QUIET,
        )
        with pytest.raises(optuna.TrialPruned):
            trainer.fit(Scripted([0.2, 0.3, 0.4]), DigitsDataModule())
        assert callback.reported == [[step, pytest.approx(value)] for step, value in expected]
    assert trial.reports == [(1, 0.2), (2, 0.3)]  # it knew the first of the second training


# Real studies


def test_the_median_pruner_ends_a_worse_trial_and_the_study_has_its_last_value():
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    counter = Counter()

    def train(trial):
        worse = trial.number == 2
        numbers = [0.8, 0.9, 0.95] if not worse else [0.85, 0.2, 0.99]
        fit(trial, numbers, *[counter] if worse else [])
        return numbers[-1]

    study.optimize(train, n_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[2].value == pytest.approx(0.2)
    assert study.trials[2].intermediate_values == pytest.approx({1: 0.85, 2: 0.2})
    assert study.trials[0].intermediate_values == pytest.approx({1: 0.8, 2: 0.9, 3: 0.95})
    assert counter.epochs == 2


def test_the_same_optuna_trial_goes_on_without_a_warning_and_another_gets_all_reports(tmp_path):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    first, other = study.ask(), study.ask()
    fit(first, RISING[:2], directory=tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "other")
    fit(first, RISING[:3], directory=tmp_path / "first")
    fit(other, RISING[:3], directory=tmp_path / "other")
    for trial in study.trials:
        assert trial.intermediate_values == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})


def test_a_study_of_several_objectives_is_refused_before_training():
    study = optuna.create_study(directions=["maximize", "minimize"])
    counter = Counter()
    with pytest.raises(UserError, match=r"a pruner needs one objective \(the study has 2\); give one monitor"):
        fit(study.ask(), RISING, counter)
    assert counter.epochs == 0


def test_a_channel_to_a_study_of_several_objectives_is_refused():
    class Channel:
        def report(self, value, step):
            study = optuna.create_study(directions=["maximize", "minimize"])
            study.ask().report(value, step)

        def should_prune(self):
            return False

    with pytest.raises(UserError, match="a pruner needs one objective"):
        fit(Channel(), RISING)


# Two ranks


def pruner():
    return optuna.pruners.MedianPruner(n_startup_trials=1)


def good_trial():
    return optuna.trial.create_trial(value=0.9, intermediate_values={1: 0.1, 2: 0.9, 3: 0.9})


def trainer_of_two(*callbacks, epochs):
    return Trainer(
        devices=2,
        accelerator="cpu",
        strategy="ddp",
        max_epochs=epochs,
        limit_train_batches=1,
        limit_val_batches=1,
        callbacks=list(callbacks),
        **QUIET,
    )


def train_on_ranks(trial, numbers, **others):
    """One training on two ranks: what came of it on this one."""
    callback, counter = TrialPruning(trial, monitor="val_accuracy"), Counter()
    error = ""
    try:
        trainer_of_two(callback, counter, epochs=len(numbers)).fit(Scripted(numbers, **others), DigitsDataModule())
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"pruned": callback.pruned, "epochs": counter.epochs, "ends": counter.ends, "error": error}


class Broken(Recorder):
    def report(self, value, step):
        raise ConnectionError("no database")


def on_rank(rank):
    """Runs in each of two processes started from outside, one training after the other in one process group."""
    first = rank == 0
    found = {}
    study = None
    if first:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
        study = optuna.create_study(storage=storage, direction="maximize", pruner=pruner())
        study.add_trial(good_trial())
    trial = study.ask() if first else None
    found["optuna"] = train_on_ranks(trial, [0.2, 0.3, 0.4])
    if first:
        study.tell(trial, state=TrialState.PRUNED)
        found["optuna"]["states"] = [each.state.name for each in study.trials]
        found["optuna"]["value"] = study.trials[1].value
    found["unknown"] = train_on_ranks(Recorder() if first else None, RISING, metric="val_score")
    found["unknown on one"] = train_on_ranks(
        Recorder() if first else None, RISING, metric="val_accuracy" if first else "val_score"
    )
    found["nothing"] = train_on_ranks(None, RISING)
    found["two trials"] = train_on_ranks(Recorder(), RISING)
    found["nan on one"] = train_on_ranks(Recorder() if first else None, [0.1, 0.2 if first else math.nan, 0.3])
    found["loss on one"] = train_on_ranks(Recorder() if first else None, RISING, val_loss=1.0 if first else math.inf)
    found["broken trial"] = train_on_ranks(Broken() if first else None, RISING)
    trial = Recorder() if first else None
    found["different"] = train_on_ranks(trial, [0.2, 0.4] if first else [0.4, 0.6])
    if first:
        found["different"]["reports"] = list(trial.intermediate_values.values())
    Path(f"rank{rank}.json").write_text(json.dumps(found))
    part()


def in_users_script(url):
    """What a user's script does, which Lightning starts once more for the second rank."""

    def train(trial):
        callback, counter = TrialPruning(trial, monitor="val_accuracy"), Counter()
        trainer = trainer_of_two(callback, counter, epochs=3)
        try:
            trainer.fit(Scripted([0.2, 0.3, 0.4]), DigitsDataModule())
        finally:
            Path(f"rank{trainer.global_rank}.json").write_text(json.dumps([callback.pruned, counter.epochs]))
        return float(trainer.callback_metrics["val_accuracy"])

    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        study = optuna.load_study(study_name="s", storage=url, pruner=pruner())
        study.optimize(train, n_trials=1)
    else:
        train(None)
    part()


def environment(**others):
    tests = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests, **others}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks of `on_rank` have found, and what rank 0 said."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with (folder / f"log{rank}").open("w") as log:
            command = [sys.executable, __file__, "rank", rank]
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment(**variables), stdout=log, stderr=log)
            )
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=180) == 0, (folder / f"log{rank}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return found, (folder / "log0").read_text()


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_epoch_and_the_one_with_the_trial_raises(ranks):
    (zero, one), _ = ranks
    assert [rank["optuna"]["epochs"] for rank in (zero, one)] == [2, 2]
    assert [rank["optuna"]["ends"] for rank in (zero, one)] == [1, 1]
    assert [rank["optuna"]["pruned"] for rank in (zero, one)] == [True, True]
    assert zero["optuna"]["error"] == "TrialPruned: pruned after 2 epochs with val_accuracy 0.3"
    assert one["optuna"]["error"] == ""
    assert zero["optuna"]["states"] == ["COMPLETE", "PRUNED"]
    assert zero["optuna"]["value"] == pytest.approx(0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "epochs", "told"),
    [
        ("unknown", 0, "UnknownMetricError: monitor 'val_accuracy' is not logged by the validation of Scripted"),
        ("unknown on one", 0, "UnknownMetricError: monitor 'val_accuracy' is not logged by the validation of Scripted"),
        ("nothing", 0, "UserError: TrialPruning has no trial on rank 0"),
        ("two trials", 0, "UserError: TrialPruning has a trial on rank 1"),
        ("nan on one", 1, "NonFiniteMetricError: val_accuracy is nan in epoch 2"),
        ("loss on one", 0, "NonFiniteMetricError: val_loss is inf in epoch 1"),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_both(ranks, case, epochs, told):
    for rank in ranks[0]:
        assert rank[case]["error"].startswith(told)
        assert rank[case]["epochs"] == epochs


@pytest.mark.slow
def test_a_trial_that_fails_on_rank_0_leaves_no_rank_waiting(ranks):
    (zero, one), _ = ranks
    assert zero["broken trial"]["error"] == "ConnectionError: no database"
    assert one["broken trial"]["error"] == "RuntimeError: rank 0 could not report to its trial: no database"


@pytest.mark.slow
def test_of_values_that_differ_between_ranks_the_mean_is_reported_and_told_once(ranks):
    (zero, one), log = ranks
    assert zero["different"]["error"] == one["different"]["error"] == ""
    assert zero["different"]["reports"] == pytest.approx([0.3, 0.5])
    assert log.count("val_accuracy is 0.2, 0.4 on the 2 ranks, and the mean is reported") == 1
    assert log.count("on the 2 ranks") == 1
    assert "log it with sync_dist=True" in log


@pytest.mark.slow
def test_a_users_script_that_lightning_starts_again_for_rank_1_prunes_once(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="s", storage=url, direction="maximize")
    study.add_trial(good_trial())
    command = [sys.executable, __file__, "script", url]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [True, 2]
    study = optuna.load_study(study_name="s", storage=url)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[1].intermediate_values == pytest.approx({1: 0.2, 2: 0.3})
    assert study.trials[1].value == pytest.approx(0.3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "rank":
        on_rank(int(sys.argv[2]))
    else:
        in_users_script(sys.argv[2])
