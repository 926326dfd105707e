import csv
import json
import math
import warnings

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from lightning_automl.rundir import DiskFullError
from lightning_automl.search import records
from lightning_automl.search.records import best_trials, importances, pareto_front, write_records
from lightning_automl.search.spaces import Space

SPACE = """
optimizer: {choice: [AdamW, SGD], path: model.init_args.optimizer.class_path}
lr: {log_float: [1e-4, 1e-1], path: model.init_args.optimizer.init_args.lr}
momentum: {float: [0, 0.9], path: model.init_args.optimizer.init_args.momentum, when: {optimizer: SGD}}
pools: {choice: [[max, none], null], path: model.init_args.pools}
flag: {choice: [true, false]}
"""
SEARCH = {"run": "run.yaml", "trials": 5, "storage": "postgresql://me:s3:c@ret@host:5432/db"}


@pytest.fixture(autouse=True)
def silence():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def space():
    return Space.parse(yaml.safe_load(SPACE))


def start(study, space, **values):
    study.enqueue_trial(space.encode(values))
    trial = study.ask()
    space.suggest(trial)
    return trial


@pytest.fixture
def study(space):
    """A trial in each state."""
    study = optuna.create_study(
        study_name="digits", direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    good = start(study, space, optimizer="AdamW", lr=0.01, pools=["max", "none"], flag=True)
    for epoch, value in ((1, 0.5), (2, 0.75)):
        good.report(value, epoch)
    for name, value in (
        ("epochs", 2),
        ("seconds", 3.25),
        ("directory", "trials/0000"),
        ("metrics", {"parameters": 10}),
    ):
        good.set_user_attr(name, value)
    study.tell(good, 0.75)

    pruned = start(study, space, optimizer="SGD", lr=0.001, momentum=0.5, pools=None, flag=False)
    pruned.report(0.25, 1)
    pruned.set_user_attr("epochs", 1)
    pruned.set_user_attr("seconds", 1.0004)
    pruned.set_user_attr("reason", "worse than the median, 0.5, after epoch 1")
    study.tell(pruned, state=TrialState.PRUNED)

    lost = start(study, space, optimizer="AdamW", lr=0.1, pools=None, flag=True)
    for name, value in (("lost", True), ("epochs", 1), ("seconds", 2.0), ("reason", "its worker died")):
        lost.set_user_attr(name, value)
    study.tell(lost, state=TrialState.FAIL)

    refused = start(study, space, optimizer="AdamW", lr=0.02, pools=None, flag=True)
    refused.set_user_attr("infeasible", True)
    refused.set_user_attr("seconds", 0.0)
    refused.set_constraint("feasible", 1.0)
    study.tell(refused, state=TrialState.PRUNED)

    failed = start(study, space, optimizer="AdamW", lr=0.03, pools=None, flag=True)
    failed.set_user_attr("reason", 'out of "memory"')
    failed.set_user_attr("seconds", 1.0)
    study.tell(failed, state=TrialState.FAIL)

    running = start(study, space, optimizer="AdamW", lr=0.04, pools=None, flag=True)
    running.report(float("nan"), 1)
    running.set_user_attr("retry_of", 2)
    running.set_user_attr("member", 0)
    study.enqueue_trial(space.encode({"lr": 0.05}))
    return study


def written(study, space, directory, monitors=("val_accuracy",), **arguments):
    write_records(study, space, directory, monitors=monitors, search=SEARCH, **arguments)
    return (directory / "trials.csv").read_text(), json.loads((directory / "study.json").read_text())


def test_the_table_has_a_row_a_trial(study, space, tmp_path):
    table, _ = written(study, space, tmp_path)
    assert table == "\n".join(
        [
            "number,state,value,seconds,reason,epochs,directory,retry_of,optimizer,lr,momentum,pools,flag",
            '0,COMPLETE,0.75,3.25,,2,trials/0000,,AdamW,0.01,,"[""max"", ""none""]",true',
            '1,PRUNED,0.25,1.0,"worse than the median, 0.5, after epoch 1",1,,,SGD,0.001,0.5,null,false',
            "2,FAIL,,2.0,its worker died,1,,,AdamW,0.1,,null,true",
            "3,PRUNED,,0.0,,0,,,AdamW,0.02,,null,true",
            '4,FAIL,,1.0,"out of ""memory""",0,,,AdamW,0.03,,null,true',
            "5,RUNNING,,,,0,,2,AdamW,0.04,,null,true",
            "6,WAITING,,,,0,,,,,,,",
            "",
        ]
    )


def test_the_summary_tells_the_study(study, space, tmp_path):
    _, summary = written(study, space, tmp_path)
    assert list(summary) == [
        *("name", "storage", "monitors", "directions", "search", "space", "best", "importances", "totals", "trials")
    ]
    assert summary["name"] == "digits"
    assert summary["storage"] == "postgresql://me:***@host:5432/db"
    assert summary["search"] == {**SEARCH, "storage": summary["storage"]}
    assert (summary["monitors"], summary["directions"]) == (["val_accuracy"], ["maximize"])
    assert summary["space"] == space.describe()
    assert summary["best"] == [0]
    assert summary["importances"] == {}
    assert summary["totals"] == {
        **{"COMPLETE": 1, "PRUNED": 2, "FAIL": 1, "LOST": 1, "RUNNING": 1, "WAITING": 1},
        **{"epochs": 4, "seconds": 7.25},
    }
    good, pruned, lost, refused, _, running, waiting = summary["trials"]
    assert good.pop("started") <= good.pop("ended")
    assert good == {
        **{"number": 0, "state": "COMPLETE", "values": [0.75], "reason": "", "seconds": 3.25, "epochs": 2},
        "directory": "trials/0000",
        "params": {"optimizer": "AdamW", "lr": 0.01, "pools": '["max", "none"]', "flag": True},
        "intermediate": [[1, 0.5], [2, 0.75]],
        **{"lost": False, "infeasible": False, "retry_of": None, "metrics": {"parameters": 10}},
    }
    assert (pruned["values"], pruned["intermediate"]) == ([0.25], [[1, 0.25]])
    assert (lost["lost"], lost["values"], refused["infeasible"], refused["lost"]) == (True, None, True, False)
    assert (running["retry_of"], running["member"], running["intermediate"]) == (2, 0, [[1, None]])
    assert (running["seconds"], running["ended"], waiting["started"], waiting["params"]) == (None, None, None, {})


def test_the_url_given_beside_the_search_wins(study, space, tmp_path):
    _, summary = written(study, space, tmp_path, storage="sqlite:////home/me@work/study.db")
    assert summary["storage"] == "sqlite:////home/me@work/study.db"


def test_seconds_are_those_of_the_trial_unless_it_was_found_dead(space, tmp_path):
    study = optuna.create_study()
    for lost in (False, True):
        trial = study.ask()
        trial.set_user_attr("lost", lost)
        study.tell(trial, state=TrialState.FAIL)
    table, _ = written(study, space, tmp_path)
    alive, dead = (row["seconds"] for row in csv.DictReader(table.splitlines()))
    assert float(alive) >= 0
    assert dead == ""


def test_files_of_before_stay_when_the_disk_is_full(study, space, tmp_path, monkeypatch):
    before = written(study, space, tmp_path)
    study.tell(5, 0.9)
    write = records.write_text

    def full(path, text):
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
            write(path, text)

    monkeypatch.setattr(records, "write_text", full)
    with pytest.raises(DiskFullError):
        written(study, space, tmp_path)
    assert ((tmp_path / "trials.csv").read_text(), json.loads((tmp_path / "study.json").read_text())) == before
    assert {path.name for path in tmp_path.iterdir()} == {"trials.csv", "study.json"}


def test_an_empty_study_has_records(space, tmp_path):
    table, summary = written(optuna.create_study(), space, tmp_path)
    assert table.count("\n") == 1
    assert (summary["best"], summary["trials"], summary["totals"]["COMPLETE"]) == ([], [], 0)


@pytest.mark.parametrize(("direction", "numbers"), [("minimize", [0]), ("maximize", [1])])
def test_the_first_of_equal_best_trials_is_best_and_constraints_count(direction, numbers):
    study = optuna.create_study(direction=direction)
    for values, bad in ((1.0, False), (2.0, False), (2.0, False), (1.0, False), (9.0, True), (-9.0, True)):
        trial = study.ask()
        if bad:
            trial.set_constraint("feasible", 1.0)
        study.tell(trial, values)
    study.tell(study.ask(), state=TrialState.PRUNED)
    assert pareto_front(study) == [trial.number for trial in best_trials(study)] == numbers


def objectives(count=24, directions=("maximize", "minimize"), seed=0):
    """Accuracy hangs on x alone, cost on n and a little on x; y is for nothing."""
    space = Space.parse({"y": {"float": [0, 1]}, "x": {"float": [0, 1]}, "n": {"int": [1, 8]}})
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(count):
        trial = study.ask()
        values = space.suggest(trial)
        study.tell(
            trial, [value for value, _ in zip((values["x"], values["n"] + values["x"]), directions, strict=False)]
        )
    return study, space


def test_records_of_several_objectives(tmp_path):
    study, space = objectives(60)
    table, summary = written(study, space, tmp_path, monitors=("val_accuracy", "cost"))
    rows = list(csv.DictReader(table.splitlines()))
    assert list(rows[0])[:5] == ["number", "state", "value_val_accuracy", "value_cost", "seconds"]
    assert [float(rows[7]["value_val_accuracy"]), float(rows[7]["value_cost"])] == study.trials[7].values
    assert summary["directions"] == ["maximize", "minimize"]
    assert set(summary["importances"]) == {"val_accuracy", "cost"}
    for shares in summary["importances"]["val_accuracy"].values():
        assert next(iter(shares)) == "x"
    for shares in summary["importances"]["cost"].values():
        assert next(iter(shares)) == "n"
    points = [trial.values for trial in study.trials]
    front = [
        number
        for number, (accuracy, cost) in enumerate(points)
        if not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
    ]
    assert summary["best"] == pareto_front(study) == front
    assert len(front) > 1


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_importances_sum_to_one_and_put_an_irrelevant_parameter_last(direction):
    space = Space.parse({"useless": {"float": [0, 1]}, "strong": {"float": [0, 1]}, "weak": {"log_int": [1, 100]}})
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=1))
    sign = 1 if direction == "minimize" else -1
    for _ in range(100):
        trial = study.ask()
        values = space.suggest(trial)
        study.tell(trial, sign * (4 * (values["strong"] - 0.3) ** 2 + 0.3 * math.log10(values["weak"])))
    found = importances(study, space)
    assert list(found) == ["ped_anova", "fanova"]
    for shares in found.values():
        assert list(shares)[-1] == "useless"
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(isinstance(share, float) and 0 <= share <= 1 for share in shares.values())
    assert importances(study, space) == found
    assert importances(study, space, fanova=False) == {"ped_anova": found["ped_anova"]}


@pytest.mark.parametrize(("count", "quantile"), [(20, 0.25), (80, 0.1)])
def test_five_trials_or_more_are_the_best(count, quantile):
    study, space = objectives(count, ("maximize",))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert importances(study, space, fanova=False)["ped_anova"] == pytest.approx(expected)


def test_importances_of_a_target_take_low_ones_as_good():
    space = Space.parse({"x": {"float": [0, 1]}, "y": {"float": [0, 1]}})
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        trial = study.ask()
        values = space.suggest(trial)
        # low where x is low; among the high ones only y tells
        study.tell(trial, values["x"] if values["x"] < 0.5 else 1 + values["y"])
    assert next(iter(importances(study, space)["ped_anova"])) == "y"
    assert next(iter(importances(study, space, lambda trial: trial.value)["ped_anova"])) == "x"
    assert importances(study, space, lambda trial: -trial.value) == importances(study, space)


def test_conditional_parameters_have_a_share_in_ped_anova_alone(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        study.tell(trial, space.suggest(trial).get("momentum", 0.5))
    found = importances(study, space)
    assert set(found["ped_anova"]) == set(space.parameters)
    assert set(found["fanova"]) == set(space.parameters) - {"momentum"}


def test_a_condition_that_held_once_gives_no_warning(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for index in range(12):
        trial = start(study, space, optimizer="AdamW" if index else "SGD")
        study.tell(trial, trial.params["lr"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "momentum" in importances(study, space)["ped_anova"]
    assert not caught


@pytest.mark.parametrize("count", [records.IMPORTANCE_TRIALS - 1, records.IMPORTANCE_TRIALS])
def test_importances_need_some_trials(count):
    study, space = objectives(count, ("maximize",))
    study.tell(study.ask(), state=TrialState.FAIL)
    assert bool(importances(study, space)) == (count == records.IMPORTANCE_TRIALS)


@pytest.mark.parametrize(
    ("entry", "value"),
    [({"float": [0, 1]}, lambda number: 3.0), ({"choice": ["only"]}, float), ({"float": [0, 1]}, lambda _: math.inf)],
)
def test_methods_that_cannot_tell_are_left_out(entry, value):
    space = Space.parse({"x": entry})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(12):
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, value(number))
    assert importances(study, space) == {}
