"""The command `search`, with real processes; what its parts do is tested beside them."""

import json
import random
import signal
import time

import optuna
import pytest
import torch
import yaml
from faulty_network import FAULTS
from searches import processes_of, rows_of, run_of, start, wait_until

OPTIMIZER = "model.init_args.optimizer.init_args"
NETWORK = "model.init_args.model.init_args"


LR = {"lr": {"log_float": [1e-4, 1.0], "path": f"{OPTIMIZER}.lr"}}


@pytest.fixture
def searched(command, warm_server, tmp_path):
    """Write a search config and give the command; keys that are None are left out."""

    def search(*arguments, directory="study", **config):
        config = {"run": run_of(), "space": LR, "name": "test", "trials": 2, **config}
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return command("search", "--config", path, "--dir", tmp_path / directory, *arguments)

    return search


@pytest.mark.slow
def test_trials_of_two_ranks_end_in_every_way_with_their_reason(searched, tmp_path):
    faults = list(FAULTS)
    answer = searched(
        run=run_of(ranks=2),
        space=LR | {"fault": {"choice": faults, "path": f"{NETWORK}.fault"}},
        enqueue=[{"fault": "none", "lr": 0.1}, {"fault": "none", "lr": 0.2}, {"fault": "none", "lr": 1e-4}]
        + [{"fault": fault, "lr": 0.1} for fault in faults if fault != "none"],
        pruner={"class_path": "MedianPruner", "init_args": {"n_startup_trials": 2, "n_warmup_steps": 0}},
        trials=3 + len(faults) - 1,
        hang_timeout="15s",
    )
    rows = {row["fault"] + row["lr"]: row for row in rows_of(tmp_path / "study")}
    assert [rows[f"none{lr}"]["state"] for lr in ("0.1", "0.2", "0.0001")] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert rows["none0.0001"]["epochs"] == "1"
    said = {fault: rows[f"{fault}0.1"]["reason"] for fault in faults if fault != "none"}
    assert {rows[f"{fault}0.1"]["state"] for fault in said} == {"FAIL"}
    assert "the network broke" in said["raise"]
    assert "out of memory" in said["memory"]
    assert "loss is nan" in said["nan"]
    assert "rank 1 was killed by signal 9" in said["kill"]
    assert "without a result" in said["exit"]
    assert "silent" in said["hang"]
    assert "the network broke" in (tmp_path / "study/trials/0003/output.txt").read_text()
    # six of nine failed, but only the first ten count for that
    assert answer.status == 0, answer.err
    assert not processes_of(tmp_path / "study")


@pytest.mark.slow
def test_a_seed_and_one_worker_give_one_list_of_configs(searched, tmp_path):
    lists = []
    for name in ("one", "two"):
        assert searched(directory=name, trials=3, run=run_of(epochs=1)).status == 0
        lists.append([row["lr"] for row in rows_of(tmp_path / name)])
    assert lists[0] == lists[1]
    assert lists[0][0] == "0.1"  # the unchanged run comes first
    configs = [yaml.safe_load((tmp_path / f"one/trials/{n:04d}/config.yaml").read_text()) for n in range(3)]
    assert [str(config["model"]["init_args"]["optimizer"]["init_args"]["lr"]) for config in configs] == lists[0]
    assert not any(config["test_after_fit"] for config in configs)


@pytest.mark.slow
def test_what_comes_out_is_a_config_tables_and_a_test_of_retrained_seeds(searched, command, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_automl.search_command._cores", lambda: 1)  # as many threads as the run by hand
    answer = searched("--retrain", "2", trials=2)
    assert answer.status == 0, answer.err
    study = tmp_path / "study"
    rows = rows_of(study)
    best = max(rows, key=lambda row: float(row["value"]))
    config = yaml.safe_load((study / "best.yaml").read_text())
    assert str(config["model"]["init_args"]["optimizer"]["init_args"]["lr"]) == best["lr"]
    assert config["test_after_fit"] is True
    summary = json.loads((study / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["test_opened"] == 2
    assert summary["metrics"]["val_accuracy"] == float(best["value"])
    retrained = json.loads((study / "retrain.json").read_text())
    accuracies = [run["metrics"]["test_accuracy"] for run in retrained["runs"]]
    assert retrained["metrics"]["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    of_seed = yaml.safe_load((study / retrained["runs"][1]["directory"] / "config.yaml").read_text())
    assert of_seed["data"]["init_args"]["train_on_val"] is True
    assert of_seed["seed_everything"] == 1
    # a trial is a config: by hand it comes to the same value, and so does best.yaml, which opens the test split
    torch.set_num_threads(1)
    place = study / "trials" / f"{int(best['number']):04d}"
    assert command("fit", "--config", place / "config.yaml", "--dir", "again").status == 0
    assert command("fit", "--config", study / "best.yaml", "--dir", "best").status == 0
    again, opened = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("again", "best"))
    assert again["metrics"]["val_accuracy"] == opened["metrics"]["val_accuracy"] == float(best["value"])
    assert (again["test_opened"], opened["test_opened"]) == (0, 1)
    # the printed URL and name open the study elsewhere
    url, name = json.loads((study / "study.json").read_text())["storage"], "test"
    assert url in answer.err
    assert len(optuna.load_study(study_name=name, storage=url).trials) == 2
    assert "report.html" in {path.name for path in study.iterdir()}


@pytest.mark.slow
def test_the_same_command_goes_on_with_larger_limits_and_refuses_other_changes(searched, command, tmp_path):
    assert searched(trials=1, run=run_of(epochs=1)).status == 0
    answer = searched(
        trials=2, run=run_of(epochs=1), space={"lr": {"log_float": [1e-3, 1.0], "path": f"{OPTIMIZER}.lr"}}
    )
    assert answer.status == 2
    assert "space.lr" in answer.err
    assert searched(trials=2, run=run_of(epochs=1)).status == 0
    assert [row["number"] for row in rows_of(tmp_path / "study")] == ["0", "1"]
    answer = command("search", "--dir", tmp_path / "study", "--trials", "3")
    assert answer.status == 0, answer.err
    assert len({row["lr"] for row in rows_of(tmp_path / "study")}) == 3  # the sampler does not begin anew
    answer = searched(trials=1, run=run_of(epochs=1))
    assert answer.status == 2
    assert "limits can only grow" in answer.err


@pytest.mark.slow
def test_refused_values_cost_nothing_and_are_told_in_the_networks_own_words(searched, tmp_path):
    answer = searched(
        space=LR | {"width": {"int": [2, 3], "path": f"{NETWORK}.width"}},
        enqueue=[{"lr": 0.1, "width": 3}, {"lr": 0.1, "width": 2}],
        run=run_of(epochs=1),
    )
    assert answer.status == 0, answer.err
    refused, fine = rows_of(tmp_path / "study")
    assert (refused["state"], refused["epochs"]) == ("PRUNED", "0")
    assert refused["reason"] == "infeasible: width is 3; it must be even"
    assert fine["state"] == "COMPLETE"


@pytest.mark.slow
def test_a_limit_of_epochs_stops_exactly_there(searched, tmp_path):
    answer = searched(trials=None, epochs=7, run=run_of(epochs=3))
    assert answer.status == 0, answer.err
    rows = rows_of(tmp_path / "study")
    assert [row["epochs"] for row in rows] == ["3", "3", "1"]
    assert rows[2]["state"] == "PRUNED"
    assert "the limit of 7 epochs" in rows[2]["reason"]
    trained = sum(len((tmp_path / f"study/trials/{n:04d}/metrics.csv").read_text().splitlines()) - 1 for n in range(3))
    assert trained == 7


@pytest.mark.slow
def test_a_trial_over_folds_is_their_mean(searched, tmp_path):
    answer = searched(folds=3, trials=2, run=run_of(epochs=1))
    assert answer.status == 0, answer.err
    study = json.loads((tmp_path / "study/study.json").read_text())
    for trial in study["trials"]:
        values = [
            json.loads((tmp_path / "study" / trial["directory"] / f"fold-{fold}/summary.json").read_text())["metrics"]
            for fold in range(3)
        ]
        accuracies = [each["val_accuracy"] for each in values]
        assert [value for _, value in trial["intermediate"]] == pytest.approx(accuracies)
        assert trial["values"][0] == pytest.approx(sum(accuracies) / 3)
        assert trial["epochs"] == 3


@pytest.mark.slow
def test_several_objectives_leave_a_front(searched, tmp_path):
    answer = searched(
        run=run_of(network="TunableCNN", epochs=1),
        monitor=["val_accuracy", "parameters", "latency"],
        space={"units": {"choice": [[16], [32]], "path": f"{NETWORK}.units"}},
        trials=2,
        sampler={"class_path": "NSGAIISampler"},
    )
    assert answer.status == 0, answer.err
    rows = rows_of(tmp_path / "study")
    assert {"value_val_accuracy", "value_parameters", "value_latency"} <= rows[0].keys()
    assert all(float(row["value_parameters"]) > 0 and float(row["value_latency"]) > 0 for row in rows)
    study = json.loads((tmp_path / "study/study.json").read_text())
    assert study["directions"] == ["maximize", "minimize", "minimize"]
    assert study["best"]


@pytest.mark.slow
def test_the_winner_of_population_based_training_is_replayed_bit_for_bit(searched, command, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_automl.search_command._cores", lambda: 1)  # as many threads as the run by hand
    answer = searched(
        run=run_of(network="TunableCNN", epochs=4),
        space=LR | {"momentum": {"float": [0.0, 0.99], "path": f"{OPTIMIZER}.momentum"}},
        sampler={
            "class_path": "PopulationSampler",
            "init_args": {"population": 3, "ready": 2, "bottom": 0.34, "top": 0.34},
        },
        trials=None,
    )
    assert answer.status == 0, answer.err
    study = json.loads((tmp_path / "study/study.json").read_text())
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE"] * 6
    second = [trial for trial in study["trials"] if "parent" in trial]
    assert any(study["trials"][trial["parent"]]["member"] != trial["member"] for trial in second)  # one was replaced
    best = max(second, key=lambda trial: trial["values"][0])["number"]
    torch.set_num_threads(1)
    # any segment's config replays its whole lineage
    assert command("fit", "--config", tmp_path / f"study/trials/{best:04d}/config.yaml", "--dir", "again").status == 0
    weights = [
        torch.load(place / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for place in (tmp_path / f"study/trials/{best:04d}", tmp_path / "again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_ten_kills_lose_no_trial_and_make_none_twice(tmp_path):
    config = {
        "run": run_of(ranks=2, epochs=8),
        # a single fault among many: a search ends when its first four trials all fail
        "space": LR | {"fault": {"choice": [*(f"none-{i}" for i in range(15)), "raise"], "path": f"{NETWORK}.fault"}},
        "sampler": {"class_path": "RandomSampler"},
        "pruner": {"class_path": "SuccessiveHalvingPruner", "init_args": {"min_resource": 1, "reduction_factor": 2}},
        "enqueue": [{"fault": "raise"}],
        "trials": 14,
        "name": "killed",
    }
    directory = tmp_path / "study"
    generator = random.Random(0)

    for _ in range(10):
        process = start(directory, config)
        before = len(list(directory.glob("trials/*")))
        wait_until(lambda: process.poll() is not None or len(list(directory.glob("trials/*"))) > before)  # noqa: B023
        time.sleep(generator.uniform(0.0, 3.0))
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of(directory))
    assert start(directory, config).wait(timeout=300) == 0, (tmp_path / "study.err").read_text()
    rows = rows_of(directory)
    assert [int(row["number"]) for row in rows] == list(range(len(rows)))
    lost = [row for row in rows if row["reason"].startswith("lost")]
    own = [row for row in rows if row not in lost]
    assert len(own) == 14
    assert {row["state"] for row in own} == {"COMPLETE", "PRUNED", "FAIL"}
    assert len(lost) >= 3
    retried = [row["retry_of"] for row in rows if row["retry_of"]]
    assert sorted(retried, key=int) == [row["number"] for row in lost]
    assert len({(row["lr"], row["fault"]) for row in own}) == 14


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_an_interrupted_search(number, tmp_path):
    directory = tmp_path / "study"
    config = {"run": run_of(ranks=2, epochs=1000), "space": LR, "name": "test", "trials": 3}
    process = start(directory, config)
    wait_until(lambda: process.poll() is not None or (directory / "trials/0000/checkpoints/last.ckpt").exists())
    assert processes_of(directory)
    process.send_signal(number)
    assert process.wait(timeout=60) == (-number if number == signal.SIGKILL else 130)
    wait_until(lambda: not processes_of(directory))
    if number != signal.SIGKILL:
        assert json.loads((directory / "summary.json").read_text())["reason"] == "interrupted"
        assert [row["state"] for row in rows_of(directory)] == ["FAIL", "WAITING"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "proxy"])
def test_two_commands_share_a_study(kind, request, tmp_path):
    url = request.getfixturevalue(kind)
    config = {"run": run_of(epochs=2), "space": LR, "name": "shared by commands", "trials": 8, "storage": url}
    processes = [start(tmp_path / name, config) for name in ("one", "two")]
    for process, name in zip(processes, ("one", "two"), strict=True):
        assert process.wait(timeout=300) == 0, (tmp_path / f"{name}.err").read_text()
    # the first to end leaves what the other one still trains to it
    last = next(rows for rows in map(rows_of, (tmp_path / "one", tmp_path / "two")) if "RUNNING" not in str(rows))
    own = [row for row in last if not row["reason"].startswith("withdrawn")]
    assert len(own) == 8
    assert {row["state"] for row in own} == {"COMPLETE"}
    numbers = [{path.name for path in (tmp_path / name / "trials").iterdir()} for name in ("one", "two")]
    assert not numbers[0] & numbers[1]
    assert all(numbers)
    assert "s3cr" not in "".join(path.read_text() for path in tmp_path.glob("*/log.txt"))


def test_passwords_are_not_kept(searched, tmp_path):
    assert searched("--storage", "postgresql://me:***@host/database").status == 2
    answer = searched("--storage", f"sqlite:///{tmp_path}/own.db")
    assert answer.status == 0, answer.err
    assert yaml.safe_load((tmp_path / "study/config.yaml").read_text())["storage"] == f"sqlite:///{tmp_path}/own.db"


def test_the_directory_of_a_run_is_not_taken(fit, searched, tmp_path):
    assert fit("--dir", tmp_path / "study").status == 0
    answer = searched()
    assert answer.status == 2
    assert "the directory of a run" in answer.err


def test_a_dry_run_shows_three_configs_and_makes_nothing(searched, tmp_path):
    answer = searched("--dry-run", directory="never")
    assert answer.status == 0, answer.err
    assert answer.out.count("# config") == 3
    assert f"{OPTIMIZER}.lr" in answer.out
    assert not (tmp_path / "never").exists()


BAD = {
    "path of the space": (
        {"space": {"model.init_args.optimizer.init_args.lrr": {"float": [0, 1]}}},
        "did you mean 'lr'",
    ),
    "type in the space": ({"space": {f"{OPTIMIZER}.lr": {"choice": ["fast"]}}}, "'fast'"),
    "empty space": ({"space": {}}, "the space is empty"),
    "distribution": ({"space": {"lr": {"lg_float": [1e-3, 1]}}}, "log_float"),
    "range": ({"space": {"lr": {"float": [1, 0], "path": f"{OPTIMIZER}.lr"}}}, "lr"),
    "sampler": ({"sampler": {"class_path": "TPESampelr"}}, "TPESampler"),
    "pruner": ({"pruner": {"class_path": "MedianPrunner"}}, "MedianPruner"),
    "argument of a pruner": ({"pruner": {"class_path": "MedianPruner", "init_args": {"warmup": 1}}}, "n_warmup_steps"),
    "value of a pruner": (
        {"pruner": {"class_path": "SuccessiveHalvingPruner", "init_args": {"reduction_factor": 1}}},
        "reduction_factor",
    ),
    "pruner with several objectives": (
        {"monitor": ["val_accuracy", "parameters"], "pruner": {"class_path": "MedianPruner"}},
        "MedianPruner",
    ),
    "key": ({"trails": 3}, "trials"),
    "run": ({"run": "nowhere.yaml"}, "nowhere.yaml"),
    "key of the run": ({"run": run_of() | {"trainr": {"max_epochs": 1}}}, "trainr"),
    "no limit": ({"trials": None}, "limit"),
    "limit": ({"trials": 0}, "trials is 0"),
    "time": ({"timeout": "soon"}, "timeout"),
    "storage": ({"storage": "postgresql://user:secret@127.0.0.1:1/none"}, "127.0.0.1"),
    "kind of storage": ({"storage": "postgrse://x"}, "storage"),
    "name in enqueue": ({"enqueue": [{"rl": 1}]}, "'rl'"),
    "direction": ({"direction": "up"}, "up"),
    "path without init_args": (
        {"space": {"lr": {"float": [0, 1], "path": "model.optimizer.lr"}}},
        "did you mean model.init_args.optimizer.init_args.lr",
    ),
    "name that is no path": ({"space": {"lr": {"float": [0, 1]}}}, "a name without path: is the path itself"),
    "devices in the space": ({"space": {"d": {"choice": [1], "path": "trainer.devices"}}}, "trainer.devices"),
    "endless grid": ({"sampler": {"class_path": "BruteForceSampler"}}, "without end"),
    "seeds": ({"retrain": -1}, "retrain is -1"),
    "fit config": ({"model": {"class_path": "x"}}, "fit config"),
    "cost": ({"monitor": ["val_accuracy", "paramters"]}, "did you mean 'parameters'"),
    "costs alone": ({"monitor": "latency"}, "give a metric"),
    "the test split": ({"monitor": "test_accuracy"}, "must not see the test split"),
    "nothing validated": ({"run": run_of(limit_val_batches=0)}, "nothing is validated"),
    "data": (
        {"run": run_of() | {"data": {"class_path": "ArraysDataModule", "init_args": {"path": "no.npz"}}}},
        "no.npz",
    ),
    "list of devices": ({"run": run_of(strategy="ddp") | {"trainer": {"devices": [0, 1]}}}, "trainer.devices=[0, 1]"),
    "segments and folds": (
        {"folds": 2, "sampler": {"class_path": "PopulationSampler", "init_args": {"population": 2, "ready": 1}}},
        "folds",
    ),
    "name": ({"name": "a/b"}, "slash"),
    "groups": (
        {"sampler": {"class_path": "GroupwiseSampler", "init_args": {"groups": [["rl"]], "trials_per_group": 2}}},
        "rl",
    ),
    "folds": ({"folds": 1}, "folds is 1"),
    "spawned ranks": ({"run": run_of(ranks=2) | {"trainer": {"strategy": "ddp_spawn"}}}, "ddp_spawn"),
    "values built into a run that change while it trains": (
        {
            "space": {"width": {"int": [2, 4], "path": f"{NETWORK}.width"}},
            "sampler": {"class_path": "PopulationSampler", "init_args": {"population": 2, "ready": 1}},
        },
        "width",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(case, searched, tmp_path):
    config, words = BAD[case]
    answer = searched(**config)
    assert answer.status == 2, answer.err
    sentences = [line for line in answer.err.splitlines() if line.startswith("lightning-automl:")]
    assert len(sentences) == 1, answer.err
    assert words in sentences[0]
    assert "secret" not in answer.err
    assert "Traceback" not in answer.err
    assert not list((tmp_path / "study").glob("trials/*"))


def test_a_study_of_another_search_is_not_joined(searched, tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    optuna.create_study(study_name="test", storage=url).ask()
    answer = searched(storage=url)
    assert answer.status == 2
    assert "in use" in answer.err


@pytest.mark.slow
def test_a_monitor_that_nothing_logs_ends_the_search_with_what_is_logged(searched):
    answer = searched(monitor="val_acuracy")
    assert answer.status == 2
    assert "'val_acuracy'" in answer.err
    assert "val_accuracy" in answer.err


@pytest.mark.slow
def test_a_run_outside_of_the_space_is_not_called_unchanged(searched, tmp_path):
    run, path = run_of(epochs=1), "model.init_args.scheduler"
    written = {"class_path": "WarmupCosineLR"}
    other = {"class_path": "WarmupCosineLR", "init_args": {"warmup": 0.5}}
    for name, space, first in (
        ("within", LR | {"schedule": {"choice": [None, written, other], "path": path}}, True),
        ("range", {"lr": {"log_float": [0.2, 1.0], "path": f"{OPTIMIZER}.lr"}}, False),
        ("choice", LR | {"schedule": {"choice": [None, other], "path": path}}, False),
    ):
        assert searched(directory=name, run=run, space=space, trials=1).status == 0
        record = json.loads((tmp_path / name / "study.json").read_text())
        assert record["search"]["enqueued_default"] is first
        config = yaml.safe_load((tmp_path / name / "trials/0000/config.yaml").read_text())["model"]["init_args"]
        as_it_was = config["optimizer"]["init_args"]["lr"] == 0.1 and "warmup: 0.05" in yaml.safe_dump(config)
        assert as_it_was is first


@pytest.mark.slow
def test_a_directory_with_trials_of_another_study_is_refused(searched, tmp_path):
    one = {"run": run_of(epochs=1), "trials": 1}
    assert searched(**one).status == 0
    answer = searched("--storage", f"sqlite:///{tmp_path}/other.db", **one)
    assert answer.status == 2
    assert "another study" in answer.err


@pytest.mark.slow
def test_a_segment_that_a_limit_cuts_is_trained_to_its_end_later(searched, tmp_path):
    config = {
        "run": run_of(network="TunableCNN", epochs=4),
        "sampler": {"class_path": "PopulationSampler", "init_args": {"population": 2, "ready": 2}},
        "trials": None,
    }
    assert searched(**config, epochs=3).status == 0
    assert [row["state"] for row in rows_of(tmp_path / "study")] == ["COMPLETE", "FAIL", "WAITING"]
    assert searched(**config, epochs=30).status == 0
    rows = [row for row in rows_of(tmp_path / "study") if row["state"] == "COMPLETE"]
    assert len(rows) == 4
    assert sum(int(row["epochs"]) for row in rows_of(tmp_path / "study")) == 8


@pytest.mark.slow
def test_a_better_config_after_growing_is_retrained_beside_the_former_one(searched, tmp_path):
    config = {
        "run": run_of(epochs=1, callbacks=[{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}])
    }
    first = [{"lr": 2e-4}, {"lr": 0.3}]
    assert searched("--retrain", "1", **config, trials=1, enqueue=first).status == 0
    answer = searched("--retrain", "1", **config, trials=2, enqueue=first)
    assert answer.status == 0, answer.err
    summary = json.loads((tmp_path / "study/summary.json").read_text())
    assert summary["test_opened"] == 2
    assert json.loads((tmp_path / "study/retrain.json").read_text())["trial"] == 1


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_ends_with_the_commonest_reason(searched, tmp_path):
    space = LR | {"fault": {"choice": ["raise"], "path": f"{NETWORK}.fault"}}
    answer = searched(space=space, enqueue=[], trials=20)
    assert answer.status == 1
    assert "4 of 4 trials failed" in answer.err
    assert "the network broke" in answer.err
    assert json.loads((tmp_path / "study/summary.json").read_text())["status"] == "failed"
