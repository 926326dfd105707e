import csv
import json
import logging
import math

import pytest
import yaml
from competitions import LR, FakeClock, arm, plan_of, planned, runs_of, write_arms
from seen import BREAST, DIGITS

from lightning_automl.auto import selection
from lightning_automl.auto.arms import ARMS
from lightning_automl.auto.arms import config_of as arm_config
from lightning_automl.auto.runs import Runs
from lightning_automl.auto.selection import policy_name, select, study_space
from lightning_automl.results.sections.study.space import importances
from lightning_automl.results.study import StudyRecord
from lightning_automl.rundir import UserError
from lightning_automl.search.devices import Slice
from lightning_automl.search.spaces import Space
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.workers import Workers

WORTH = {"cnn": 0.80, "resnet": 0.84, "densenet": 0.78}
NAMES = tuple(WORTH)


def rate(config):
    for key in LR.split("."):
        config = config[key]
    return config


def score(config, fold):
    """The best is a ResNet with TrivialAugment and a rate of 0.01; the defaults have 0.001."""
    arguments = config["data"]["init_args"]
    gain = 0.01 * arguments["train_policy"].endswith("trivial_augment.json")
    return WORTH[config["model"]["class_path"]] + gain - 0.05 * abs(math.log10(rate(config)) + 2) + 0.001 * fold


@pytest.fixture(autouse=True)
def spaces(monkeypatch):
    """The arms' own spaces, without what the images allow beside."""
    monkeypatch.setattr(selection, "space_of", lambda each, facts: each.space)


@pytest.fixture
def directory(tmp_path):
    write_arms(tmp_path, *NAMES)
    return tmp_path


def selected(directory, value=score, *, names=NAMES, generations=(6, 4), clock=None, number=2, seed=0, **keys):
    plan = plan_of(*names, facts=BREAST, generations=generations, **keys)
    runs = runs_of(directory, BREAST, plan, value, clock=clock, number=number)
    found = select(runs, directory, BREAST, plan, [arm(name) for name in names], seed)
    return found, read(directory), runs


def read(directory):
    return json.loads((directory / "selection.json").read_text())


def test_the_best_default_and_the_tuned_one_above_it_are_found(directory):
    found, kept, _ = selected(directory, generations=(6, 4, 4))
    assert (found.simple.arm, found.simple.policy, found.simple.default) == ("resnet", "trivial_augment", True)
    assert found.searched.arm == "resnet"
    assert not found.searched.default
    assert abs(math.log10(found.searched.values["lr"]) + 2) < 1
    assert (kept["simple"], kept["searched"]) == (found.simple.key, found.searched.key)
    assert kept["leaders"][0] == found.searched.key
    assert found.candidates[kept["leaders"][0]].title == "Resnet, TrivialAugment, tuned"


def test_the_first_generation_are_all_arms_with_all_their_policies_the_simplest_first(directory):
    _, kept, _ = selected(directory, generations=(6,))
    arms = [(each["arm"], each["policy"], each["default"], each["values"]) for each in kept["candidates"]]
    assert arms == [(name, policy, True, {}) for policy in ("none", "trivial_augment") for name in NAMES]
    assert [each["generation"] for each in kept["candidates"]] == [0] * 6
    assert kept["searched"] is None


def test_arms_may_have_other_policies(directory):
    arms = [planned("cnn"), planned("resnet", policies=["none"])]
    _, kept, _ = selected(directory, names=("cnn", "resnet"), generations=(3, 4), arms=arms)
    assert [(each["arm"], each["policy"]) for each in kept["candidates"][:3]] == [
        ("cnn", "none"),
        ("resnet", "none"),
        ("cnn", "trivial_augment"),
    ]
    assert {each["policy"] for each in kept["candidates"] if each["arm"] == "resnet"} == {"none"}


def test_every_candidate_is_told_with_its_values_folds_interval_and_cost(directory):
    _, kept, _ = selected(directory)
    first, best = kept["candidates"][0], kept["candidates"][4]
    assert best["state"] == "COMPLETE"
    values = [0.80 + 0.001 * fold for fold in (0, 1, 2)]  # ResNet with TrivialAugment: 0.84 + 0.01 - 0.05
    assert best["folds"] == pytest.approx({"0": values[0], "1": values[1], "2": values[2]})
    assert best["mean"] == pytest.approx(0.801)
    # Student's t with two degrees of freedom: 4.3027 at 97.5 %, of a deviation of 0.001 over three folds
    assert best["high"] - best["mean"] == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-3)
    assert (best["seconds"], best["epochs"]) == (7.5, 9)
    assert (first["state"], first["low"], first["high"]) == ("PRUNED", None, None)
    assert first["reason"] == "others were better on the first fold"
    assert first["folds"] == pytest.approx({"0": 0.75})


def test_no_run_is_on_a_fold_of_the_comparison_and_all_have_the_seed(directory):
    _, _, runs = selected(directory, seed=5)
    names = {each.split("/")[1] for each in runs.workers.trained}
    assert names == {f"fold-{fold}-seed-5" for fold in BREAST.search_folds}


def test_a_replay_trains_nothing_and_comes_to_the_same(directory):
    found, kept, _ = selected(directory)
    table = (directory / "trials.csv").read_bytes()
    again, also, runs = selected(directory, lambda config, fold: pytest.fail("trained again"))
    assert runs.workers.trained == []
    assert also == kept
    assert (directory / "trials.csv").read_bytes() == table
    assert (again.simple.key, again.searched.key) == (found.simple.key, found.searched.key)


@pytest.mark.parametrize("after", [1, 5, 7, 9, 12, 14])
def test_killed_after_any_run_it_comes_to_the_same(directory, tmp_path_factory, after):
    whole = tmp_path_factory.mktemp("whole")
    write_arms(whole, *NAMES)
    _, expected, _ = selected(whole)
    done = iter(range(after))

    def killed(config, fold):
        return score(config, fold) if next(done, None) is not None else KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        selected(directory, killed, number=1)
    _, kept, _ = selected(directory)
    assert kept == expected


def test_the_number_of_workers_changes_nothing(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_arms(other, *NAMES)
    assert selected(directory, number=1)[1] == selected(other, number=4)[1]


def test_a_longer_budget_adds_generations_and_repeats_nothing(directory):
    _, short, first = selected(directory)
    _, long, second = selected(directory, generations=(6, 4, 4), budget=2000.0)
    assert long["candidates"][:10] == short["candidates"]
    assert not set(first.workers.trained) & set(second.workers.trained)


def test_who_was_stopped_on_an_easy_fold_does_not_lead(directory):
    found, kept, _ = selected(directory, lambda config, fold: score(config, fold) - 0.2 * fold)
    states = {each["key"]: (each["state"], each["mean"]) for each in kept["candidates"]}
    assert [states[key][0] for key in kept["leaders"][:2]] == ["COMPLETE"] * 2
    assert states[found.simple.key][0] == "COMPLETE"
    assert states[found.simple.key][1] < max(mean for state, mean in states.values() if state == "PRUNED")


def test_tuned_ones_that_are_not_above_the_simple_one_are_no_challengers(directory):
    def worse(config, fold):
        return score(config, fold) if rate(config) == 1e-3 else 0.1

    found, kept, _ = selected(directory, worse)
    assert found.searched is None
    assert kept["searched"] is None
    assert kept["leaders"][0] == found.simple.key


def test_if_all_are_equal_the_first_default_stays(directory):
    found, _, _ = selected(directory, lambda config, fold: 0.5)
    assert (found.simple.arm, found.simple.policy) == ("cnn", "none")
    assert found.searched is None


def test_a_loss_is_to_be_small(directory):
    found, kept, _ = selected(directory, metric="val_loss", direction="minimize")  # what is left is 1 - value
    assert found.simple.arm == "resnet"
    assert found.searched is not None
    best = min(each["mean"] for each in kept["candidates"] if each["state"] == "COMPLETE")
    assert kept["candidates"][0]["mean"] > best


def test_a_failing_arm_is_out_with_its_reason_and_the_others_go_on(directory):
    def failing(config, fold):
        return StudyFailed("the network broke") if config["model"]["class_path"] == "resnet" else score(config, fold)

    found, kept, _ = selected(directory, failing)
    assert found.simple.arm == "cnn"
    failed = [each for each in kept["candidates"] if each["arm"] == "resnet"]
    assert {(each["state"], each["reason"], each["mean"]) for each in failed} == {("FAIL", "the network broke", None)}


def test_if_every_default_fails_it_ends_with_the_reason(directory):
    with pytest.raises(StudyFailed, match="no arm could be trained; Cnn, no policy: the network broke"):
        selected(directory, lambda config, fold: StudyFailed("the network broke"))
    assert {each["state"] for each in read(directory)["candidates"]} == {"FAIL"}


def test_a_mistake_of_all_runs_is_the_users(directory):
    with pytest.raises(UserError, match="no such folder"):
        selected(directory, lambda config, fold: UserError("no such folder"))


def test_a_single_candidate_needs_no_training(directory):
    found, kept, runs = selected(directory, names=("cnn",), generations=(1,))
    assert runs.workers.trained == []
    assert (found.simple.arm, found.searched, kept["cut"]) == ("cnn", None, None)
    assert kept["candidates"][0]["reason"] == "the only candidate, so that there was nothing to choose"
    assert kept["simple"] == found.simple.key


def clock_of(seconds, cost=10.0):
    """A clock with so many seconds for the selection; the stages after it need 40."""
    return FakeClock(left=seconds + 40.0, cost=cost)


def test_a_rung_that_cannot_end_in_time_is_not_begun(directory):
    # Six runs of 10 s by two workers are 30 s; the next rung would take 10 s.
    clock = FakeClock(left=75.0, cost=6.0)
    plan = plan_of(*NAMES, facts=BREAST, generations=(6, 4))
    runs = runs_of(directory, BREAST, plan, score, clock=clock, number=2)
    runs._learn = lambda job, seconds: None  # a run takes what is planned
    found = select(runs, directory, BREAST, plan, [arm(name) for name in NAMES], 0)
    kept = read(directory)
    assert len(runs.workers.trained) == 6
    assert found.simple.arm == "resnet"
    assert kept["cut"] == clock.cuts["selection"]
    assert "of 10 planned candidates 6 were trained, 0 of them on all 3 folds" in kept["cut"]
    assert {each["state"] for each in kept["candidates"]} == {"PRUNED"}
    assert kept["candidates"][4]["reason"] == "no time was left for it"


def test_of_the_first_rung_what_fits_is_trained_and_one_at_least(directory):
    for seconds, count in ((-10.0, 1), (5.0, 1), (20.0, 2), (40.0, 4)):
        place = directory / str(count) / str(seconds)
        write_arms(place, *NAMES)
        found, kept, runs = selected(place, clock=clock_of(seconds, cost=0.0), number=1)
        assert len(runs.workers.trained) == count, seconds
        assert kept["cut"] is not None
        assert found.simple.default


def test_without_time_for_any_value_the_plans_first_arm_is_taken(directory):
    def late(config, fold):
        runs.workers.stopped = True
        return StudyFailed("stopped at the limit")

    plan = plan_of(*NAMES, facts=BREAST, generations=(6,))
    clock = clock_of(0.0)
    runs = runs_of(directory, BREAST, plan, late, clock=clock, number=1)
    runs.workers.is_set = lambda: True
    found = select(runs, directory, BREAST, plan, [arm(name) for name in NAMES], 0)
    assert (found.simple.arm, found.simple.policy, found.leaders) == ("cnn", "none", [])
    assert "0 were trained" in read(directory)["cut"]


def test_a_cut_holds_for_the_same_budget_and_not_for_a_longer_one(directory):
    _, cut, first = selected(directory, clock=clock_of(20.0, cost=0.0), number=1)
    assert len(first.workers.trained) == 2
    _, again, second = selected(directory)  # as much time as one wants, but the same plan
    assert second.workers.trained == []
    assert again == cut
    _, more, third = selected(directory, budget=2000.0)
    assert more["cut"] is None
    assert len(third.workers.trained) > 10


def test_what_runs_may_take_half_of_the_time_for_later_stages_at_most(directory):
    _, _, runs = selected(directory, clock=FakeClock(left=1000.0), generations=(6,))
    assert runs.workers.ends[0] == 980.0  # of which 40 are for what follows


def test_trials_and_study_are_those_of_a_search(directory):
    _, kept, _ = selected(directory, generations=(6, 6, 6))
    with (directory / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(kept["candidates"]) == 18
    assert {"number", "state", "value", "seconds", "reason", "arm", "policy", "cnn.lr", "resnet.filters"} <= set(
        rows[0]
    )
    for row, each in zip(rows, kept["candidates"], strict=True):
        assert (int(row["number"]), row["state"]) == (each["number"], each["state"])
        assert float(row["value"]) == pytest.approx(each["mean"])
        assert row["directory"] == f"runs/{each['key']}"
        assert (row["arm"], row["policy"]) == (each["arm"], each["policy"])
    # The defaults have the values of the arm's config.
    assert (float(rows[0]["cnn.lr"]), json.loads(rows[0]["cnn.filters"]), rows[0]["resnet.lr"]) == (1e-3, [8, 8], "")
    study = StudyRecord.read(directory)
    assert study.monitors == ("val_auroc",)
    assert study.folds == 3
    assert study.winner.params["arm"] == "resnet"
    assert "ped_anova" in study.importances  # of the first fold, which all have
    *_, said = importances(study).blocks
    assert "From 18 trials by their values on the first fold, which is little" in said.text
    assert study.parameters["resnet.lr"].path == LR


def test_files_are_kept_up_to_date_after_each_rung(directory):
    seen = []

    def looking(config, fold):
        if fold == 1:
            seen.append(read(directory))
        return score(config, fold)

    selected(directory, looking, generations=(6,))
    states = [each["state"] for each in seen[0]["candidates"]]
    assert states == ["PRUNED", "RUNNING", "PRUNED", "PRUNED", "RUNNING", "PRUNED"]
    assert seen[0]["simple"] == seen[0]["leaders"][0]
    assert seen[0]["cut"] is None


def test_progress_is_told(directory, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_automl"):
        selected(directory, generations=(6, 4))
    lines = [each for each in caplog.messages if "generation" in each]
    assert lines[0].startswith("selection, generation 0: 1/6 ")
    assert "val_auroc 0." in lines[0]
    assert any("; best Resnet, TrivialAugment 0.8" in each for each in lines)
    assert any("left of the rung" in each for each in lines)
    assert any(
        each.startswith("selection: the best default is Resnet, TrivialAugment (val_auroc") for each in caplog.messages
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning_automl"):
        selected(directory, generations=(6, 4))
    assert not [each for each in caplog.messages if "generation" in each]  # nothing was trained


def test_the_space_of_all_arms_has_their_parameters_under_their_names():
    inner = {"depth": {"choice": [1, 2]}, "width": {"int": [1, 9], "when": {"depth": 2}}}
    spaces = {"a": Space.parse(inner), "b": Space.parse({"lr": {"float": [0, 1], "path": "x.lr"}})}
    arms = [planned("a"), planned("b")]
    space = study_space(arms, spaces)
    assert list(space.parameters) == ["arm", "policy", "a.depth", "a.width", "b.lr"]
    assert space.parameters["a.width"].when == {"arm": ("a",), "a.depth": (2,)}
    assert space.parameters["b.lr"].path == "x.lr"
    assert policy_name(arms, "a") == "policy"
    arms[1]["policies"] = ["none"]
    assert list(study_space(arms, spaces).parameters)[:2] == ["arm", "a.policy"]


@pytest.fixture
def server(_server):
    return _server


@pytest.mark.slow
def test_two_real_arms(tmp_path, server, monkeypatch):
    """From resolved configs of arms as they are to files; one worker less the second time, which trains nothing."""
    monkeypatch.undo()  # the arms' own spaces
    facts = DIGITS.from_dict({**DIGITS.to_dict(), "folds": 3, "search_folds": [0, 1], "comparison_folds": [2]})
    facts.data["init_args"]["subset"] = 0.15
    arms = [ARMS["cnn"], ARMS["resnet"]]
    configs = []
    for each in arms:
        config = arm_config(each, facts, epochs=1, metric="val_balanced_accuracy", seed=0)
        configs.append(config | {"trainer": {**config["trainer"], "limit_train_batches": 2}})
    asked = {"do": "check", "file": str(tmp_path / "check.yaml"), "configs": configs, "built": []}
    answer = server.run(asked, ranks=1, threads=1, log=tmp_path / "log.txt", on_message=lambda message: None)
    (tmp_path / "arms").mkdir()
    for each, config in zip(arms, answer.result["resolved"], strict=True):
        (tmp_path / "arms" / f"{each.name}.yaml").write_text(yaml.safe_dump(config))
    plan = plan_of("cnn", "resnet", facts=facts, metric="val_balanced_accuracy", generations=(3, 2))
    plan["arms"] = [planned(each.name, title=each.title, epochs=1, run_seconds=1.0) for each in arms]

    def run(number):
        runs = Runs(Workers(server, [Slice((), 1)] * number, 1), tmp_path, facts, plan, FakeClock())
        return select(runs, tmp_path, facts, plan, arms, 0)

    found = run(2)
    kept = read(tmp_path)
    assert {each["state"] for each in kept["candidates"]} <= {"COMPLETE", "PRUNED"}
    assert len(kept["candidates"]) == 5
    assert all(each["key"].startswith(each["arm"]) for each in kept["candidates"])
    assert kept["cut"] is None
    assert found.simple.key == kept["simple"]
    tuned = kept["candidates"][-1]
    ran = yaml.safe_load((tmp_path / "runs" / tuned["key"] / "fold-0-seed-0" / "config.yaml").read_text())
    assert rate(ran) == tuned["values"]["lr"]
    assert ran["data"]["init_args"]["base_augment"] == tuned["values"]["base_augment"]
    assert ran["data"]["init_args"]["without_folds"] == [2]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    run(1)
    assert read(tmp_path) == kept
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
