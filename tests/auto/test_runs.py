import errno
import json
import math
import threading

import pytest
import yaml
from competitions import FakeClock, leave, plan_of, planned, runs_of, write_arms
from seen import BREAST, DIGITS

from lightning_automl.auto.candidates import candidate_of, write_simple_policies
from lightning_automl.auto.runs import BUDGET, Job, Runs
from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.workers import Workers

PLAN = plan_of("cnn", "resnet", facts=BREAST)


@pytest.fixture
def directory(tmp_path):
    write_arms(tmp_path, "cnn", "resnet")
    write_simple_policies(tmp_path, BREAST.space)
    return tmp_path


@pytest.fixture
def jobs(directory):
    """Four runs: both arms on two folds."""
    both = [candidate_of(directory, planned(name), "none") for name in ("cnn", "resnet")]
    return [Job(candidate, fold, 7) for candidate in both for fold in (0, 1)]


def score(config, fold):
    return (0.8 if config["model"]["class_path"] == "cnn" else 0.9) + 0.01 * (fold or 0)


def test_a_run_on_a_fold_is_worth_its_last_epoch(directory, jobs):
    outcomes = runs_of(directory, BREAST, PLAN, score).each(jobs)
    assert [each.value for each in outcomes] == pytest.approx([0.8, 0.81, 0.9, 0.91])
    assert outcomes[0].place == directory / "runs" / jobs[0].candidate.key / "fold-0-seed-7"
    assert (outcomes[0].seconds, outcomes[0].epochs, outcomes[0].reason) == (2.5, 3, "")


def test_a_final_run_is_worth_its_best_epoch_and_keeps_its_network(directory, jobs):
    job = Job(jobs[0].candidate, None, 3)
    (outcome,) = runs_of(directory, BREAST, PLAN, score).each([job])
    assert outcome.value == pytest.approx(0.81)
    assert outcome.place.name == "final-seed-3"
    assert (outcome.place / "checkpoints" / "best.ckpt").exists()


def test_of_few_validation_images_the_last_epoch_counts(directory, jobs):
    job = Job(jobs[0].candidate, None, 3)
    assert BREAST.number("val") >= 30
    assert runs_of(directory, BREAST, PLAN, score).config_of(job)["monitor"] == "val_auroc"
    few = BREAST.from_dict({**BREAST.to_dict(), "counts": {**BREAST.counts, "val": [15, 14]}})
    config = runs_of(directory, few, PLAN, score).config_of(job)
    assert (config["monitor"], config["mode"]) == ("epoch", "max")
    assert runs_of(directory, few, PLAN, score).config_of(jobs[0])["monitor"] == "val_auroc"


def test_networks_of_folds_are_removed(directory, jobs):
    (outcome, *_) = runs_of(directory, BREAST, PLAN, score).each(jobs)
    assert not (outcome.place / "checkpoints").exists()
    assert {"config.yaml", "metrics.csv", "summary.json"} <= {each.name for each in outcome.place.iterdir()}


def test_what_is_finished_is_read_and_not_trained(directory, jobs):
    first = runs_of(directory, BREAST, PLAN, score)
    before = first.each(jobs)
    again = runs_of(directory, BREAST, PLAN, lambda config, fold: pytest.fail("trained again"))
    assert again.each(jobs) == before
    assert again.workers.trained == []
    assert sorted(first.workers.trained) == sorted(f"{job.candidate.key}/{job.name}" for job in jobs)


def test_folds_of_the_search_do_without_those_of_the_comparison(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score)
    assert (BREAST.search_folds, BREAST.comparison_folds) == ([0, 1, 2], [3, 4])
    arguments = runs.config_of(jobs[1])["data"]["init_args"]
    assert (arguments["fold"], arguments["folds"], arguments["without_folds"]) == (1, 5, [3, 4])
    compared = runs.config_of(Job(jobs[0].candidate, 4, 7))["data"]["init_args"]
    assert (compared["fold"], compared["folds"]) == (4, 5)
    assert "without_folds" not in compared
    assert "fold" not in runs.config_of(Job(jobs[0].candidate, None, 7))["data"]["init_args"]


def test_a_final_run_on_a_fold_is_trained_on_all_others_and_keeps_its_network(directory, jobs):
    few = BREAST.from_dict({**BREAST.to_dict(), "counts": {**BREAST.counts, "val": [15, 14]}})
    runs = runs_of(directory, few, PLAN, score)
    job = Job(jobs[1].candidate, jobs[1].fold, jobs[1].seed, final=True)
    config, searched = runs.config_of(job), runs.config_of(jobs[1])
    assert (config["data"]["init_args"]["fold"], searched["data"]["init_args"]["without_folds"]) == (1, [3, 4])
    assert "without_folds" not in config["data"]["init_args"]
    assert (config["monitor"], searched["monitor"]) == ("epoch", "val_auroc")
    (outcome,) = runs.each([job])
    assert outcome.place.name == "final-fold-1-seed-7" != runs.place(jobs[1]).name
    assert (outcome.place / "checkpoints" / "best.ckpt").exists()


def test_without_a_comparison_to_come_they_train_on_its_folds_too_in_another_place(directory, jobs):
    runs = runs_of(directory, BREAST, {**PLAN, "comparison": None}, score)
    assert "without_folds" not in runs.config_of(jobs[1])["data"]["init_args"]
    assert runs.place(jobs[1]).name == "fold-1-all-seed-7"
    assert runs_of(directory, BREAST, PLAN, score).place(jobs[1]).name == "fold-1-seed-7"


def test_no_run_opens_the_test_split_and_each_has_its_seed(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score)
    for job in (jobs[0], Job(jobs[0].candidate, None, 7)):
        config = runs.config_of(job)
        assert config["test_after_fit"] is False
        assert config["seed_everything"] == 7
        assert not config["trainer"]["enable_progress_bar"]


def test_with_two_folds_something_is_left_to_train_on(directory, jobs):
    plan = {**PLAN, "search_folds": [0], "comparison_folds": [1]}
    arguments = runs_of(directory, BREAST, plan, score).config_of(jobs[0])["data"]["init_args"]
    assert "without_folds" not in arguments


@pytest.mark.parametrize("error", [StudyFailed("the network broke"), UserError("the rate is too large")])
def test_a_failed_run_is_an_outcome_and_the_others_go_on(directory, jobs, error):
    def failing(config, fold):
        return error if config["model"]["class_path"] == "cnn" else score(config, fold)

    outcomes = runs_of(directory, BREAST, PLAN, failing).each(jobs)
    assert [each.value for each in outcomes] == [None, None, 0.9, 0.91]
    assert [each.reason for each in outcomes] == [str(error)] * 2 + ["", ""]


def test_a_failed_run_is_tried_again_with_another_budget_only(directory, jobs):
    def failing(config, fold):
        return StudyFailed("the network broke") if fold == 0 else score(config, fold)

    before = runs_of(directory, BREAST, PLAN, failing).each(jobs)
    same = runs_of(directory, BREAST, PLAN, score)
    assert [each.reason for each in same.each(jobs)] == [each.reason for each in before]
    assert same.workers.trained == []
    more = runs_of(directory, BREAST, {**PLAN, "budget": 2000.0}, score)
    assert [each.value for each in more.each(jobs)] == pytest.approx([0.8, 0.81, 0.9, 0.91])
    assert len(more.workers.trained) == 2


def test_a_run_that_has_diverged_has_no_value(directory, jobs):
    (outcome,) = runs_of(directory, BREAST, PLAN, lambda config, fold: math.nan).each(jobs[:1])
    assert outcome.value is None
    assert outcome.reason == "it has diverged: val_auroc is nan"


def test_a_metric_that_nothing_logs_is_a_mistake_of_all(directory, jobs):
    with pytest.raises(UserError, match="has no val_f1"):
        runs_of(directory, BREAST, {**PLAN, "metric": "val_f1"}, score).each(jobs)


def test_a_mistake_of_all_runs_is_raised_and_not_kept(directory, jobs):
    with pytest.raises(UserError, match="no such folder"):
        runs_of(directory, BREAST, PLAN, lambda config, fold: UserError("no such folder")).each(jobs)
    outcomes = runs_of(directory, BREAST, PLAN, score).each(jobs)  # the folder is there again
    assert all(each.value is not None for each in outcomes)


def test_a_refusal_among_other_failures_is_that_of_a_candidate(directory, jobs):
    def failing(config, fold):
        return UserError("too many filters") if config["model"]["class_path"] == "cnn" else StudyFailed("it broke")

    outcomes = runs_of(directory, BREAST, PLAN, failing).each(jobs)
    assert [each.reason for each in outcomes] == ["too many filters"] * 2 + ["it broke"] * 2


def test_a_run_on_a_fold_is_not_stopped_early(directory, jobs):
    candidate = jobs[0].candidate
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_loss"}}
    candidate.config["trainer"]["callbacks"] = [stopping]
    runs = runs_of(directory, BREAST, PLAN, score)
    assert runs.config_of(Job(candidate, 0, 0))["trainer"]["callbacks"] == []
    assert runs.config_of(Job(candidate, None, 0))["trainer"]["callbacks"] == [stopping]


def test_once_a_run_was_accepted_refusals_are_those_of_the_candidates(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score)
    runs.each(jobs[:1])
    runs.workers.value = lambda config, fold: UserError("too many filters")
    assert [each.reason for each in runs.each(jobs[1:])] == ["too many filters"] * 3


@pytest.mark.parametrize("error", [DiskFullError(errno.ENOSPC, "no space left"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_end_all(directory, jobs, error):
    with pytest.raises(type(error)):
        runs_of(directory, BREAST, PLAN, lambda config, fold: error).each(jobs)


def test_what_cannot_end_within_the_budget_is_not_started(directory, jobs):
    clock = FakeClock(left=25.0, cost=10.0)  # a run takes ten seconds by the plan
    runs = runs_of(directory, BREAST, PLAN, score, clock=clock, number=1)
    outcomes = runs.each(jobs)
    assert sum(each.value is not None for each in outcomes) == 2
    assert {each.reason for each in outcomes if each.value is None} == {BUDGET}
    assert not any(each.place.exists() for each in outcomes if each.reason == BUDGET)


def test_so_many_are_started_whatever_the_clock_says(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score, clock=FakeClock(left=-5.0), number=1)
    outcomes = runs.each(jobs, at_least=1)
    assert [each.value is None for each in outcomes] == [False, True, True, True]


def test_the_longest_are_started_first(directory, jobs):
    plan = {**PLAN, "arms": [planned("cnn", run_seconds=5.0), planned("resnet", run_seconds=50.0)]}
    runs = runs_of(directory, BREAST, plan, score, number=1)
    runs.each(jobs)
    assert [each.split("-")[0] for each in runs.workers.trained] == ["resnet", "resnet", "cnn", "cnn"]


def test_the_time_of_several_is_that_of_the_worker_that_ends_last(directory, jobs):
    plan = {**PLAN, "arms": [planned("cnn", run_seconds=6.0), planned("resnet", run_seconds=10.0)]}
    runs = runs_of(directory, BREAST, plan, score, number=2)
    assert runs.wall_seconds(jobs) == 16.0  # 10 + 6 on each
    assert runs.wall_seconds(jobs[:3]) == 12.0  # 10, and 6 + 6
    assert runs.wall_seconds([]) == 0.0
    runs.each(jobs[2:])
    assert runs.wall_seconds(jobs) == 6.0


def test_how_long_a_run_takes_is_learned(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score)
    assert runs.seconds(jobs[1]) == 10.0
    runs.each(jobs[:1])
    assert runs.seconds(jobs[1]) < 1.0  # of the same arm on such a fold
    assert runs.seconds(jobs[2]) == 10.0
    assert runs.seconds(Job(jobs[0].candidate, 4, 0)) == 10.0  # on more images: never less than planned
    # What a former command has trained took what its summary says.
    later = runs_of(directory, BREAST, PLAN, score)
    later.each(jobs[:1])
    assert later.seconds(jobs[1]) == 2.5


def test_if_runs_take_longer_than_planned_others_are_taken_to_do_so(directory, jobs):
    kinds = {"search": 1.25, "comparison": 2.0, "final": 3.0}
    plan = {**PLAN, "arms": [planned("cnn", seconds=kinds), planned("resnet", seconds=kinds)]}
    runs_of(directory, BREAST, plan, score).each(jobs[:1])
    runs = runs_of(directory, BREAST, plan, score)
    final = Job(jobs[2].candidate, None, 0)
    assert (runs.seconds(jobs[2]), runs.seconds(final)) == (1.25, 3.0)
    runs.each(jobs[:1])  # took 2.5 s, twice as long
    assert (runs.seconds(jobs[2]), runs.seconds(final)) == (2.5, 6.0)
    assert runs.seconds(Job(jobs[0].candidate, 4, 0)) == 4.0


def test_each_run_is_told_one_at_a_time(directory, jobs):
    told, busy = [], threading.Lock()

    def tell(job, outcome):
        assert busy.acquire(blocking=False)
        told.append((job.candidate.arm, job.fold, outcome.value))
        busy.release()

    runs_of(directory, BREAST, PLAN, score).each(jobs, on_run=tell)
    assert sorted(told) == [("cnn", 0, 0.8), ("cnn", 1, 0.81), ("resnet", 0, 0.9), ("resnet", 1, 0.91)]


def test_a_directory_says_of_what_it_is(directory, jobs):
    runs_of(directory, BREAST, PLAN, score).each(jobs)
    said = json.loads((directory / "runs" / jobs[0].candidate.key / "candidate.json").read_text())
    assert said["title"] == "Cnn, no policy"
    assert said["key"] == jobs[0].candidate.key
    assert (said["arm"], said["policy"], said["values"], said["default"]) == ("cnn", "none", {}, True)


def test_another_candidate_under_the_same_name_is_an_error(directory, jobs):
    place = directory / "runs" / jobs[0].candidate.key
    place.mkdir(parents=True)
    (place / "candidate.json").write_text(json.dumps({**jobs[1].candidate.to_dict(), "identity": {"other": 1}}))
    with pytest.raises(RuntimeError, match="same digits"):
        runs_of(directory, BREAST, PLAN, score).each(jobs)


def test_a_run_goes_on_by_the_config_that_it_has_written(directory, jobs):
    runs = runs_of(directory, BREAST, PLAN, score)
    place = runs.place(jobs[0])
    place.mkdir(parents=True)
    leave(place, 0.5)
    (place / "summary.json").unlink()  # killed before the end
    words = {**runs.config_of(jobs[0]), "further": "what fit has resolved"}
    (place / "config.yaml").write_text(yaml.safe_dump(words))
    runs.each(jobs[:1])
    assert yaml.safe_load((place / "config.yaml").read_text()) == words


# With real trainings -----------------------------------------------------------------------------------------------


def real_config(network, **trainer):
    """Seconds of the digits; not resolved, since the class of the optimizer has changed, as a space may do it."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_automl.tasks.classification.ClassificationTask",
            "init_args": {
                "model": network,
                "optimizer": {"class_path": "torch.optim.SGD"},
                "scheduler": {"class_path": "WarmupCosineLR"},
            },
        },
        "data": {
            "class_path": "lightning_automl.data.digits.DigitsDataModule",
            "init_args": {"subset": 0.3, "base_augment": "crop"},
        },
        "trainer": {"max_epochs": 9, "accelerator": "cpu", "callbacks": None, **trainer},
        "monitor": "val_balanced_accuracy",
    }


class Impatient(Workers):
    """Ends everything as soon as there is a checkpoint."""

    def __init__(self, *arguments, directory):
        super().__init__(*arguments, timeout=3600)
        self.directory = directory

    def is_set(self):
        return any(self.directory.glob("runs/*/*/checkpoints/last.ckpt"))


@pytest.fixture
def server(_server):
    return _server


@pytest.mark.slow
def test_real_runs(tmp_path, server):
    small = {"class_path": "TunableCNN", "init_args": {"filters": [4], "units": []}}
    networks = {"good": small, "bad": {"class_path": "faulty_network.FaultyNetwork", "init_args": {"fault": "raise"}}}
    write_simple_policies(tmp_path, DIGITS.space)
    (tmp_path / "arms").mkdir()
    for name, network in networks.items():
        (tmp_path / "arms" / f"{name}.yaml").write_text(yaml.safe_dump(real_config(network)))
    plan = plan_of(facts=DIGITS, metric="val_balanced_accuracy")
    plan["arms"] = [planned("good", run_seconds=1.0, epochs=2), planned("bad", run_seconds=1.0, epochs=2)]
    slices = [Slice((), 1)] * 2
    good = candidate_of(tmp_path, plan["arms"][0], "trivial_augment")
    jobs = [Job(good, 0, 0), Job(good, None, 0), Job(candidate_of(tmp_path, plan["arms"][1], "none"), 0, 0)]
    runs = Runs(Workers(server, slices, 1), tmp_path, DIGITS, plan, FakeClock())

    fold, final, bad = runs.each(jobs)
    assert 0.0 <= fold.value <= 1.0
    assert not (fold.place / "checkpoints").exists()
    assert json.loads((fold.place / "policy.json").read_text())["policy"] == "TrivialAugment"
    assert (final.place / "checkpoints" / "best.ckpt").exists()
    for each in (fold, final):
        assert each.epochs == 2
        assert json.loads((each.place / "summary.json").read_text())["test_opened"] == 0
    counts = {each.place.name: json.loads((each.place / "data.json").read_text())["counts"] for each in (fold, final)}
    sizes = {name: {split: sum(own) for split, own in each.items()} for name, each in counts.items()}
    assert sizes["fold-0-seed-0"]["train"] < sizes["final-seed-0"]["train"]  # 2 of 5 folds, as against all but val
    assert bad.value is None
    assert "the network broke" in bad.reason

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = Runs(Workers(server, slices, 1), tmp_path, DIGITS, plan, FakeClock())
    assert again.each(jobs) == [fold, final, bad]
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_real_run_that_was_killed_goes_on(tmp_path, server):
    write_simple_policies(tmp_path, DIGITS.space)
    (tmp_path / "arms").mkdir()
    small = {"class_path": "TunableCNN", "init_args": {"filters": [4], "units": []}}
    (tmp_path / "arms" / "good.yaml").write_text(yaml.safe_dump(real_config(small, limit_train_batches=2)))
    plan = plan_of(facts=DIGITS, metric="val_balanced_accuracy")
    plan["arms"] = [planned("good", run_seconds=1.0, epochs=40)]
    job = Job(candidate_of(tmp_path, plan["arms"][0], "none"), 0, 0)
    hasty = Impatient(server, [Slice((), 1)], 1, directory=tmp_path)
    (stopped,) = Runs(hasty, tmp_path, DIGITS, plan, FakeClock()).each([job])
    assert (stopped.value, stopped.reason) == (None, BUDGET)
    assert 1 <= stopped.epochs < 40

    (ended,) = Runs(Workers(server, [Slice((), 1)], 1), tmp_path, DIGITS, plan, FakeClock()).each([job])
    assert ended.reason == ""
    assert ended.epochs == 40
    assert "going on from" in (ended.place / "log.txt").read_text()
    rows = (ended.place / "metrics.csv").read_text().splitlines()
    assert len(rows) == 41  # each epoch once
