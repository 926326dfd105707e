import json
import shlex
import subprocess
import sys
import warnings

import optuna
import pytest
import yaml
from test_report import Page

from lightning_automl.results import Run, StudyRecord, report
from lightning_automl.results.sections.study import SECTIONS, verdict
from lightning_automl.results.sections.study.population import population
from lightning_automl.results.sections.study.progress import Spending, epochs_spent, spending
from lightning_automl.results.sections.study.settings import commands
from lightning_automl.results.sections.study.verdict import at_border, cautions
from lightning_automl.results.study import labels_of
from lightning_automl.rundir import UserError, write_json
from lightning_automl.search.records import write_records
from lightning_automl.search.spaces import Space

OPTIMIZER = "model.init_args.optimizer.class_path"
LR = "model.init_args.optimizer.init_args.lr"
SPACE = {
    OPTIMIZER: {"choice": ["torch.optim.AdamW", "torch.optim.SGD"]},
    LR: {"float": {"low": 1e-4, "high": 1e-1, "log": True}},
    "momentum": {
        "float": {"low": 0.0, "high": 0.9},
        "path": "model.init_args.optimizer.init_args.momentum",
        "when": {OPTIMIZER: ["torch.optim.SGD"]},
    },
    "data.init_args.batch_size": {"choice": [32, 64]},
    "model.init_args.model.init_args.depth": {"int": {"low": 1, "high": 6}},
}


def trial(number, state="COMPLETE", value=None, epochs=4, **keys):
    """An entry of study.json; its reports rise by a hundredth an epoch up to the value."""
    values = [value] if isinstance(value, float) else value
    steps = (
        [[step, value - 0.01 * (epochs - step)] for step in range(1, epochs + 1)] if isinstance(value, float) else []
    )
    params = {OPTIMIZER: "torch.optim.AdamW", LR: 1e-3 * (1 + number % 9), "data.init_args.batch_size": 64}
    params |= {"model.init_args.model.init_args.depth": 1 + number % 6}
    if number % 3 == 2:
        params |= {OPTIMIZER: "torch.optim.SGD", "momentum": 0.5}
    return {
        "number": number,
        "state": state,
        "values": values,
        "reason": "",
        "seconds": 10.0 * epochs,
        "epochs": epochs,
        "directory": f"trials/{number:04d}",
        "params": params,
        "intermediate": steps,
        "started": f"2026-01-02T03:{number % 60:02d}:00",
        "ended": None if state in ("RUNNING", "WAITING") else f"2026-01-02T04:{number % 60:02d}:00",
        "lost": False,
        "infeasible": False,
        "retry_of": None,
        "metrics": {},
        **keys,
    }


@pytest.fixture
def study(tmp_path):
    """Write a study directory; the best trial is that of the largest value."""

    def write(trials, *, summary=True, retrain=None, **keys):
        directory = tmp_path / "my study"
        directory.mkdir(exist_ok=True)
        complete = [each for each in trials if each["state"] == "COMPLETE" and each["values"] not in (None, [None])]
        best = max(complete, key=lambda each: each["values"][0], default=None)
        content = {
            "name": "digits",
            "storage": "sqlite:////tmp/study.db",
            "monitors": ["val_accuracy"],
            "directions": ["maximize"],
            "search": {"trials": 20, "enqueued_default": True, "run": {"trainer": {"max_epochs": 4}}},
            "space": SPACE,
            "best": [] if best is None else [best["number"]],
            "importances": {},
            "totals": {},
            "trials": trials,
        }
        write_json(directory / "study.json", content | keys)
        if summary:
            write_json(directory / "summary.json", {"command": "search", "status": "finished", "seconds": 99.0})
        if retrain:
            write_json(directory / "retrain.json", retrain)
        return directory

    return write


def usual():
    """Twelve complete trials, three pruned, two failed, one lost and continued, one refused."""
    trials = [trial(number, value=0.8 + 0.01 * number) for number in range(12)]
    trials += [trial(number, "PRUNED", 0.5, epochs=1) for number in (12, 13, 14)]
    trials += [
        trial(15, "FAIL", epochs=2, reason="out of memory: no 2 GiB (see runs/x/trials/0015/output.txt)"),
        trial(16, "FAIL", epochs=0, reason="out of memory: no 2 GiB (see runs/x/trials/0016/output.txt)"),
        trial(17, "FAIL", epochs=3, lost=True, reason="its worker ended"),
        trial(18, value=0.7, epochs=1, retry_of=17),
        trial(19, "PRUNED", epochs=0, infeasible=True, reason="a depth of 6 is too deep"),
    ]
    return trials


class StudyPage(Page):
    """With the cells of the tables, by section."""

    def __init__(self, text):
        self.rows = {}
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.setdefault(self.title, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.title][-1].append("")

    def handle_data(self, data):
        super().handle_data(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[self.title][-1][-1] += data


def page_of(directory):
    return StudyPage(report(directory).read_text())


def read(directory):
    return StudyRecord.read(directory)


# ---- reading


def test_what_write_records_has_written_is_read(tmp_path):
    space = Space.parse(
        {
            "optimizer": {"choice": ["SGD", "AdamW"], "path": OPTIMIZER},
            "lr": {"log_float": [1e-4, 1e-1], "path": LR, "when": {"optimizer": "SGD"}},
            "model.init_args.filters": {"choice": [[8, 16], [16, 32]]},
            "model.init_args.depth": {"int": [2, 8, 2]},
        }
    )
    study = optuna.create_study(study_name="größe", direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(12):
        each = study.ask()
        space.suggest(each)
        each.set_user_attr("epochs", 3)
        if number == 5:
            each.report(float("nan"), 1)
            study.tell(each, state=optuna.trial.TrialState.PRUNED)
        elif number == 6:
            each.set_user_attr("lost", True)
            study.tell(each, state=optuna.trial.TrialState.FAIL)
        else:
            each.report(0.25 * number, 1)
            study.tell(each, 0.5 * number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_records(
            study, space, tmp_path, monitors=["val_accuracy"], search={"trials": 12}, storage="sqlite:///x.db"
        )
    record = read(tmp_path)
    assert record.name == "größe"
    assert record.winner.number == 11
    assert record.winner.values == (5.5,)
    assert record.winner.steps == ((1, 2.75),)
    assert [record.by_number[number].state for number in (4, 5, 6)] == ["COMPLETE", "PRUNED", "LOST"]
    assert sum(each.epochs for each in record.trials) == 36
    lr, filters = record.parameters["lr"], record.parameters["model.init_args.filters"]
    depth = record.parameters["model.init_args.depth"]
    assert (lr.kind, lr.low, lr.high, lr.log, lr.when) == ("float", 1e-4, 1e-1, True, {"optimizer": ["SGD"]})
    assert (depth.kind, depth.low, depth.high, depth.step) == ("int", 2, 8, 2)
    for each in record.trials:  # every value has a place on the axis of its parameter
        assert set(each.params) <= set(record.parameters)
        assert all(record.parameters[name].place(value) >= 0 for name, value in each.params.items())
    assert {filters.place(each.params[filters.name]) for each in record.trials} == {0, 1}
    page_of(tmp_path)


def test_states_that_optuna_does_not_have_are_told_apart(study):
    record = read(study(usual()))
    assert [each.number for each in record.of_state("LOST")] == [17]
    assert [each.number for each in record.of_state("REFUSED")] == [19]
    assert [each.number for each in record.of_state("FAIL")] == [15, 16]
    assert [each.number for each in record.of_state("PRUNED")] == [12, 13, 14]
    assert record.ranked[0].number == 11


def test_short_forms_of_a_space_are_read_too(study):
    space = {"a": {"log_float": [1e-3, 1.0]}, "b": {"int": [2, 8, 2]}, "c": {"log_int": {"low": 1, "high": 64}}}
    found = read(study([], space=space)).parameters
    assert [(found[name].kind, found[name].log) for name in "abc"] == [("float", True), ("int", False), ("int", True)]
    assert found["b"].step == 2


def test_true_is_not_one(study):
    found = read(study([], space={"a": {"choice": [1, True, None, "1", [8, 16]]}})).parameters["a"]
    assert [found.place(value) for value in (1, "1", None, "[8, 16]")] == [0, 3, 2, 4]
    assert found.place(True) == 1
    assert found.place("missing") != found.place("missing")  # no number


def test_labels_are_the_end_of_a_name_that_tells_it_from_the_others():
    assert labels_of([OPTIMIZER, LR, "model.init_args.scheduler.init_args.lr", "momentum", "model.filters.0"]) == {
        OPTIMIZER: "optimizer",
        LR: "optimizer.lr",
        "model.init_args.scheduler.init_args.lr": "scheduler.lr",
        "momentum": "momentum",
        "model.filters.0": "filters.0",
    }
    assert labels_of(["lr", "model.lr", "model.init_args.lr"]) == {
        name: name for name in ("lr", "model.lr", "model.init_args.lr")
    }


WHOLE = {"trials": [], "name": "x", "monitors": ["a"], "directions": ["maximize"]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged"),
        ("[]", "is not the record of a study"),
        ("{}", "is not the record of a study (no 'trials')"),
        ({"trials": [{"state": "COMPLETE"}]}, "is not the record of a study (no 'number')"),
        ({**WHOLE, "directions": []}, "(1 monitors and 0 directions)"),
        ({**WHOLE, "best": [3]}, "(trial 3 is missing)"),
        ({**WHOLE, "space": {"lr": {"beta": 1}}}, "(the range of lr is {'beta': 1})"),
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "study.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        report(tmp_path)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/study.json is ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_search_that_has_written_nothing_yet_is_told_from_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {}, "space": {"lr": {"float": [0, 1]}}}))
    with pytest.raises(UserError, match=r"is the directory of a search, but has no study.json yet; wait"):
        report(tmp_path)
    with pytest.raises(UserError, match=r"is the directory of a search; give that of a run, as .*/trials/0000"):
        Run.read(tmp_path)


# ---- the page


def test_the_page_has_every_section_and_needs_nothing_beside_itself(study):
    directory = study(
        usual(),
        importances={"ped_anova": {LR: 0.75, "momentum": 0.25}, "fanova": {LR: 1.0}},
        retrain=RETRAIN,
    )
    write_json(directory / "environment.json", {"versions": {"python": "3.11", "optuna": "5.0.0"}, "seed": 3})
    before = {path: path.read_bytes() for path in directory.rglob("*")}
    page = page_of(directory)
    assert list(page.sections) == [
        "To keep in mind",
        "Test of the best config (trial 11)",
        "Best trials",
        "How the best value grew",
        "Which parameters matter",
        "Value against each parameter",
        "Parallel coordinates",
        "Each trial over its epochs",
        "Trials that gave no value",
        "Cost",
        "Space",
        "Settings of the search",
        "Versions",
        "Commands",
    ]
    assert len(page.sections) == len(SECTIONS) - 3  # neither two objectives, a population nor random genotypes
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    after = {path: path.read_bytes() for path in directory.rglob("*")}
    assert after.pop(directory / "report.html")
    assert after == before
    assert report(directory).read_text() == (directory / "report.html").read_text()


def test_the_same_study_gives_the_same_page(study):
    directory = study(usual())
    assert report(directory).read_text() == report(directory).read_text()


def test_neither_torch_nor_optuna_are_imported_for_it(study):
    directory = study(usual())
    code = "\n".join(
        [
            "import sys; from lightning_automl.results import report",
            f"report({str(directory)!r})",
            "print(sorted({'torch', 'lightning', 'optuna', 'scipy', 'sklearn'} & sys.modules.keys()))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert (directory / "report.html").exists()


def test_the_command_writes_the_page_and_says_the_verdict(command, study):
    directory = study(usual())
    answer = command("report", directory)
    assert answer.status == 0
    assert answer.err.startswith(f"{directory}/report.html: Of 20 trials, 13 are complete, 3 were pruned, ")


# ---- the verdict

RETRAIN = {
    "trial": 11,
    "config": "best.yaml",
    "seeds": [0, 1],
    "runs": [
        {"seed": seed, "directory": f"retrain/seed-{seed}", "metrics": {"test_accuracy": 0.9 + seed / 50}}
        for seed in (0, 1)
    ],
    "metrics": {"test_accuracy": {"mean": 0.91, "low": 0.85, "high": 0.97, "std": 0.0141, "n": 2}},
}


def test_the_verdict_says_how_many_at_what_cost_the_best_with_its_bias_the_gain_and_the_test(study):
    assert verdict(read(study(usual(), retrain=RETRAIN))) == [
        "Of 20 trials, 13 are complete, 3 were pruned, 1 was refused before training, 2 failed and 1 was lost with its "
        "worker; they took 57 epochs and 9 min 30 s.",
        "The best val_accuracy is 0.9100, of trial 11; chosen as the largest of 13 noisy validation values it is "
        "optimistic: expect somewhat less on new images.",
        "The unchanged run (trial 0) has 0.8000: the best is 0.1100 better, on validation.",
        "Trained anew on train and val with 2 seeds, its config has a mean test_accuracy of 0.9100 (95 % interval over "
        "the seeds 0.8500 to 0.9700); the test split was opened 2 times, once a seed.",
    ]


def test_of_a_loss_the_smallest_is_best_and_more_is_to_be_expected(study):
    trials = [trial(0, value=0.5), trial(1, value=0.25)]
    sentences = verdict(read(study(trials, monitors=["val_loss"], directions=["minimize"], best=[1])))
    assert "The best val_loss is 0.2500, of trial 1; chosen as the smallest of 2" in sentences[1]
    assert "expect somewhat more on new images" in sentences[1]
    assert "the best is 0.2500 better" in sentences[2]


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        ({"value": 0.9}, "No trial was better than the unchanged run, which is this one."),
        ({"value": 0.85}, "The unchanged run (trial 0) has 0.8500 too: nothing was gained."),
        (
            {"state": "PRUNED", "value": 0.3, "epochs": 2},
            "The unchanged run (trial 0) was pruned after 2 epochs, so",
        ),
        ({"state": "FAIL"}, "The unchanged run (trial 0) failed, so that it is not known how much was gained."),
        ({"state": "RUNNING"}, "The unchanged run (trial 0) is running, so that it is not known how much was gained."),
    ],
)
def test_the_best_is_compared_with_the_unchanged_run(study, first, sentence):
    best = {} if first.get("value") == 0.9 else {"best": [1]}
    assert verdict(read(study([trial(0, **first), trial(1, value=0.85)], **best)))[2].startswith(sentence)


def test_the_unchanged_run_is_found_where_it_was_enqueued_and_what_continued_it(study):
    trials = [trial(0, value=0.5), trial(1, "FAIL", lost=True), trial(2, value=0.6), trial(3, value=0.7, retry_of=1)]
    search = {"enqueue": [{LR: 0.01}, {}], "enqueued_default": False}
    assert read(study(trials, search=search)).unchanged.number == 3
    assert read(study(trials, search={"enqueue": [{LR: 0.01}]})).unchanged is None
    assert read(study(trials, search={})).unchanged is None
    notes = cautions(read(study(trials, search={}))).blocks[0].sentences
    assert "The unchanged run was not tried, so that it is not known whether the search gained anything." in notes


def test_one_seed_tells_no_spread(study):
    retrain = json.loads(json.dumps(RETRAIN))
    retrain |= {"runs": retrain["runs"][:1], "seeds": [0]}
    retrain["metrics"]["test_accuracy"] |= {"low": None, "high": None, "std": None, "n": 1}
    directory = study(usual(), retrain=retrain)
    assert "opened once, and the spread over seeds is not known" in verdict(read(directory))[3]
    assert "interval" not in page_of(directory).sections["Test of the best config (trial 11)"]


def test_test_metrics_of_a_former_best_are_told(study):
    directory = study(usual(), retrain=RETRAIN | {"trial": 4})
    assert "the config of trial 4, the best one then, has a mean test_accuracy" in verdict(read(directory))[3]
    notes = cautions(read(directory)).blocks[0].sentences
    assert "The test metrics are of trial 4; the best one is 11 by now." in notes


def test_more_openings_of_the_test_split_than_runs_are_told(study):
    directory = study(usual(), retrain=RETRAIN)
    assert "in all" not in notes_of(directory)
    write_json(directory / "summary.json", {"status": "finished", "test_opened": 5})
    assert "The test split was opened 5 times in all: what was chosen in between has seen it." in notes_of(directory)


def test_an_unfinished_and_an_interrupted_search_say_so(study):
    trials = [trial(0, value=0.8), trial(1, "RUNNING", epochs=0)]
    directory = study(trials, summary=False)
    assert verdict(read(directory))[0].startswith(
        "This search is not finished: of 2 trials, 1 is complete and 1 is running; they took 4 epochs"
    )
    assert f"search --dir {shlex.quote(str(directory))}    # goes on" in page_of(directory).sections["Commands"]
    write_json(directory / "summary.json", {"status": "failed", "reason": "interrupted", "seconds": 3})
    assert verdict(read(directory))[0].startswith("This search was not finished (interrupted): of 2 trials")


# ---- cautions


def notes_of(directory):
    return " ".join(cautions(read(directory)).blocks[0].sentences)


def test_few_trials_and_a_missing_test_are_told_with_the_command(study):
    directory = study([trial(0, value=0.8), trial(1, value=0.7)])
    notes = notes_of(directory)
    assert "There are only 2 complete trials" in notes
    assert f"lightning-automl search --dir {shlex.quote(str(directory))} --retrain 5 trains" in notes
    assert "There are only" not in notes_of(study([trial(number, value=0.8) for number in range(10)]))
    assert "Nothing was tested yet" not in notes_of(study(usual(), retrain=RETRAIN))


def test_many_failures_are_told_with_the_commonest_reason_without_its_file(study):
    trials = [trial(number, value=0.8) for number in range(4)]
    trials += [trial(4, "FAIL", reason="no number (see a/4.txt)"), trial(5, "FAIL", reason="no number (see a/5.txt)")]
    trials += [trial(6, "FAIL", reason="it crashed")]
    assert "3 of 7 trials failed, most often (2 times) with: no number." in notes_of(study(trials))
    assert "failed, most often" not in notes_of(study(usual()))


@pytest.mark.parametrize(
    ("name", "value", "end"),
    [
        # 5 % of three decades above 1e-4 is 1e-4 * 10**0.15 = 1.41e-4
        (LR, 1.40e-4, "lower"),
        (LR, 1.42e-4, None),
        (LR, 0.1, "upper"),
        ("momentum", 0.046, None),
        ("momentum", 0.044, "lower"),
        ("model.init_args.model.init_args.depth", 6, "upper"),
        ("model.init_args.model.init_args.depth", 5, None),
        ("data.init_args.batch_size", 64, None),
    ],
)
def test_a_best_value_at_an_end_of_its_range_is_found(study, name, value, end):
    record = read(study([trial(0, value=0.8, params={name: value})]))
    assert [(parameter.name, which) for parameter, _, which in at_border(record)] == [(name, end)] * (end is not None)


def test_a_value_at_the_border_is_named_with_what_to_do(study):
    notes = notes_of(study([trial(0, value=0.8, params={LR: 0.095})]))
    assert "The best lr, 0.095, lies at the upper end of its range: if values above 0.1 are possible, widen it" in notes


# ---- cost


def test_epochs_spent_and_saved_by_hand(study):
    trials = [
        trial(0, value=0.8, epochs=10),
        trial(1, value=0.7, epochs=8),
        trial(2, "PRUNED", 0.5, epochs=3),
        trial(3, "FAIL", epochs=2, lost=True),
        trial(4, "PRUNED", 0.5, epochs=4, retry_of=3),  # goes on after the 2 of trial 3
        trial(5, "FAIL", epochs=5),
        trial(6, "PRUNED", epochs=0, infeasible=True),  # was never to be trained
        trial(7, "FAIL", epochs=1, lost=True),  # nothing continued it
    ]
    directory = study(trials)
    assert spending(read(directory)) == Spending(
        total=33, pruned=3 + (2 + 4), wasted=5 + 1, longest=10, saved=(10 - 3) + (10 - 6)
    )
    page = page_of(directory)
    assert page.rows["Cost"] == [
        ["epochs in all", "33"],
        ["of them for pruned trials", "9 (27.3 %)"],
        ["of them for failed or lost trials", "6 (18.2 %)"],
        ["epochs saved by pruning", "11"],
        ["time of all trials together", "5 min 30 s"],
        ["time of a complete trial (median)", "90.0 s"],
        ["time of the search, retraining included", "99.0 s"],
    ]
    assert "run for 10 epochs, as the longest complete one did" in page.sections["Cost"]


def test_epochs_are_spent_in_the_order_in_which_trials_ended(study):
    trials = [trial(0, value=0.8, epochs=10, ended="2026-01-02T05:00:00"), trial(1, value=0.7, epochs=4)]
    trials += [trial(2, "RUNNING", epochs=2)]
    assert epochs_spent(read(study(trials))) == {1: 4, 0: 14, 2: 16}


def test_without_pruning_nothing_is_said_of_it(study):
    text = page_of(study([trial(0, value=0.8), trial(1, value=0.7)])).sections["Cost"]
    assert "pruned" not in text
    assert "saved" not in text


# ---- tables and figures


def test_the_best_ten_are_in_order_with_their_values(study):
    head, *rows = page_of(study(usual())).rows["Best trials"]
    assert head == ["trial", "val_accuracy", "epochs", "time", "optimizer", "lr", "momentum", "batch_size", "depth"]
    assert [row[0] for row in rows] == [str(number) for number in range(11, 1, -1)]
    assert rows[0] == ["11", "0.9100", "4", "40.0\xa0s", "SGD", "0.003", "0.5", "64", "6"]
    assert rows[1] == ["10", "0.9000", "4", "40.0\xa0s", "AdamW", "0.002", "-", "64", "5"]


def test_failures_are_listed_with_reason_and_log(study):
    directory = study(usual())
    (directory / "trials/0015").mkdir(parents=True)
    (directory / "trials/0015/output.txt").touch()
    page = page_of(directory)
    assert page.rows["Trials that gave no value"] == [
        ["trial", "", "reason", "log"],
        ["15", "failed", "out of memory: no 2 GiB", "trials/0015/output.txt"],
        ["16", "failed", "out of memory: no 2 GiB", "trials/0016"],
        ["17", "lost", "its worker ended", "trials/0017"],
        ["19", "refused", "a depth of 6 is too deep", "trials/0019"],
    ]
    assert "The commonest reason, 2 of 4: out of memory: no 2 GiB." in page.sections["Trials that gave no value"]


def test_many_failures_are_folded(study):
    page = page_of(study([trial(number, "FAIL", reason="x") for number in range(25)]))
    assert "5 more" in page.sections["Trials that gave no value"]
    assert len(page.rows["Trials that gave no value"]) == 25 + 2


def test_importances_need_ten_trials_and_say_on_how_many_they_rest(study):
    few = page_of(study([trial(0, value=0.8)])).sections["Which parameters matter"]
    assert "There is 1 complete trial, and no importances: they need 10 complete trials." in few
    alike = page_of(study([trial(number, value=0.8) for number in range(12)])).sections["Which parameters matter"]
    assert "the values of the trials hardly differ" in alike
    many = page_of(study(usual(), importances={"ped_anova": {LR: 1.0}})).sections["Which parameters matter"]
    assert "From 13 complete trials, which is little" in many
    assert "PED-ANOVA compares" in many
    assert "fANOVA splits" not in many
    assert "Of a parameter that few trials have, a share says little." in many


def test_a_study_of_folds_speaks_of_folds(study):
    page = page_of(study(usual(), search={"folds": 5}))
    assert "Each trial over its folds" in page.sections
    assert "Each value is of 5 folds" in page.sections["To keep in mind"]


def test_the_space_and_all_settings_are_there(study):
    search = {
        "trials": 20,
        "sampler": {"class_path": "optuna.samplers.TPESampler", "init_args": {"seed": 3}},
        "run": {"trainer": {"max_epochs": 17}},
    }
    page = page_of(study(usual(), search=search))
    assert ["lr", "0.0001 to 0.1 (logarithmic)", "", LR] in page.rows["Space"]
    path = "model.init_args.optimizer.init_args.momentum"
    assert ["momentum", "0 to 0.9", "optimizer is SGD", path] in page.rows["Space"]
    rows = page.rows["Settings of the search"]
    assert rows[:4] == [
        ["key", "value"],
        ["study", "digits"],
        ["storage", "sqlite:////tmp/study.db"],
        ["trials", "20"],
    ]
    assert ["sampler.init_args.seed", "3"] in rows
    assert rows[-2:] == [["key", "value"], ["trainer.max_epochs", "17"]]


# ---- commands


def lines_of(record):
    return commands(record).blocks[0].lines


def test_commands_train_the_best_go_on_retrain_and_look(study):
    directory = study(usual())
    quoted = shlex.quote(str(directory))
    assert quoted.startswith("'")  # a blank is in it
    *lines, python = lines_of(read(directory))
    assert lines == [
        f"lightning-automl fit --config {quoted}/best.yaml --dir {quoted}-best",
        f"lightning-automl search --dir {quoted} --trials 69    # 50 more",
        f"lightning-automl search --dir {quoted} --retrain 5    # opens the test split",
        "optuna-dashboard sqlite:////tmp/study.db",
    ]
    assert shlex.split(python)[:2] == ["python", "-c"]
    assert 'optuna.load_study(study_name="digits", storage="sqlite:////tmp/study.db")' in shlex.split(python)[2]


@pytest.mark.parametrize("name", ["plain", 'Größe\'s "study"'])
def test_the_python_line_runs(study, tmp_path, name):
    url = f"sqlite:///{tmp_path}/study.db"
    made = optuna.create_study(study_name=name, storage=url)
    made.add_trial(optuna.create_trial(value=0.125))
    *_, python = lines_of(read(study(usual(), name=name, storage=url)))
    words = shlex.split(python)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
    assert "values=[0.125]" in done.stdout


def test_a_grid_that_was_visited_gets_no_more_trials(study):
    search = {"sampler": {"class_path": "optuna.samplers.GridSampler"}}
    assert any("--trials 69" in line for line in lines_of(read(study(usual()))))
    assert not any("--trials" in line for line in lines_of(read(study(usual(), search=search))))


def test_a_journal_is_opened_as_one(study, tmp_path):
    path = tmp_path / "study.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    optuna.create_study(study_name="digits", storage=storage).add_trial(optuna.create_trial(value=0.125))
    *_, dashboard, python = lines_of(read(study(usual(), storage=f"journal://{path}")))
    assert dashboard == f"optuna-dashboard {path}"
    done = subprocess.run([sys.executable, *shlex.split(python)[1:]], capture_output=True, text=True, check=True)
    assert "values=[0.125]" in done.stdout


def test_a_proxy_a_hidden_password_and_no_storage(study):
    *_, last = lines_of(read(study(usual(), storage="grpc://host:13000")))
    assert 'storage=GrpcStorageProxy(host="host", port=13000)' in shlex.split(last)[2]
    assert not any("dashboard" in line for line in lines_of(read(study(usual(), storage="grpc://host:13000"))))
    *_, dashboard, last = lines_of(read(study(usual(), storage="postgresql://me:***@host/db")))
    assert dashboard.endswith("# with the password for ***")
    assert not any("optuna" in line for line in lines_of(read(study(usual(), storage=None))))


# ---- studies of every size


def test_a_study_without_trials_has_a_page(study):
    directory = study([], summary=False, search={})
    assert verdict(read(directory)) == ["This search is not finished: no trial has begun yet."]
    assert list(page_of(directory).sections) == ["To keep in mind", "Space", "Settings of the search", "Commands"]


@pytest.mark.parametrize(
    "trials",
    [
        [trial(0, "RUNNING", epochs=0)],
        [trial(0, "WAITING", epochs=0, params={})],
        [trial(0, "FAIL", epochs=0, reason="it crashed"), trial(1, "PRUNED", 0.3, epochs=1)],
        [trial(0, "PRUNED", epochs=0, infeasible=True, reason="too deep")],
        [trial(0, "FAIL", lost=True)],
    ],
    ids=["running", "waiting", "failed and pruned", "refused", "lost"],
)
def test_a_study_without_a_complete_trial_has_a_page(study, trials):
    page = page_of(study(trials))
    assert verdict(read(study(trials)))[1] == "None is complete, so that there is no best one yet."
    assert "Best trials" not in page.sections
    assert "best.yaml" not in page.sections["Commands"]


def test_one_trial_of_one_parameter_has_a_page(study):
    space = {"lr": {"float": {"low": 0.0, "high": 1.0}}}
    directory = study([trial(0, value=0.8, epochs=1, params={"lr": 0.5})], space=space)
    assert verdict(read(directory))[0] == "Of 1 trial, which is complete; it took 1 epoch and 10.0 s."
    assert verdict(read(directory))[1] == "The best val_accuracy is 0.8000, of trial 0, the only complete one."
    page_of(directory)
    page = page_of(study([trial(n, value=0.8 + n / 100, params={"lr": 0.5}) for n in range(3)], space=space))
    assert {"Value against each parameter", "Parallel coordinates"} <= page.sections.keys()


def test_a_space_that_was_never_used_and_values_that_are_no_numbers_have_a_page(study):
    trials = [trial(n, value=[None], params={}) for n in range(12)] + [trial(12, value=0.5, params={})]
    directory = study(trials, best=[12])
    assert "of trial 12, the only complete one" in verdict(read(directory))[1]
    page = page_of(directory)
    assert "Parallel coordinates" not in page.sections


def test_hundreds_of_trials_have_a_page_of_a_few_megabytes(study):
    trials = [trial(n, "COMPLETE" if n % 3 else "PRUNED", 0.5 + (n * 37 % 100) / 250, epochs=20) for n in range(400)]
    directory = study(trials)
    page_of(directory)
    assert (directory / "report.html").stat().st_size < 4_000_000


def test_names_are_escaped_and_may_be_of_any_script(study):
    evil = "<script>alert('x')</script>"
    space = {
        evil: {"choice": [evil, "a&b", "$x$"]},
        "größe": {"float": {"low": 0.0, "high": 1.0}},
        "学习率": {"float": {"low": 0.0, "high": 1.0}},
    }
    values = [{evil: evil, "größe": 0.5, "学习率": 0.1 * n} for n in range(3)]
    trials = [trial(n, value=0.5 + n / 100, params=each, reason=evil) for n, each in enumerate(values)]
    trials += [trial(3, "FAIL", reason=evil)]
    directory = study(trials, space=space, name=evil, monitors=["val_" + evil], search={"sampler": evil, "run": evil})
    page = page_of(directory)
    text = (directory / "report.html").read_text()
    assert "<script" not in text
    assert "学习率" in page.sections["Space"]
    assert ">学习率</text>" in text  # in the browser's font, as matplotlib's has no such characters


# ---- several objectives


def several(count=20, objectives=2):
    values = [[0.5 + n / 100, 1000.0 * (n + 1), 30.0 - n][:objectives] for n in range(count)]
    return [trial(n, value=each) for n, each in enumerate(values)]


def test_two_objectives_have_a_front(study):
    trials = [*several(), trial(20, value=[0.4, 5000.0])]
    keys = {"monitors": ["val_accuracy", "parameters"], "directions": ["maximize", "minimize"], "best": list(range(20))}
    shares = {"val_accuracy": {"ped_anova": {LR: 1.0}}, "parameters": {"fanova": {LR: 1.0}}}
    directory = study(trials, importances=shares, **keys)
    assert verdict(read(directory))[1] == (
        "20 of 21 complete trials are on the Pareto front of val_accuracy and parameters: none is better in one of "
        "them without being worse in another. The best value of val_accuracy is 0.6900, with parameters 20,000 (trial "
        "19); the best value of parameters is 1,000, with val_accuracy 0.5000 (trial 0); chosen among noisy validation "
        "values, they are optimistic."
    )
    page = page_of(directory)
    assert "Pareto front" in page.sections
    assert "Each trial over its epochs" not in page.sections
    assert page.rows["Best trials"][1][:3] == ["19\xa0*", "0.6900", "20,000"]
    assert (directory / "report.html").read_text().count("<svg") == 2 + 1 + 2 + 10 + 1  # history, front, shares, slices
    assert "trials/0001/config.yaml --test_after_fit true" in page.sections["Commands"]


def test_three_objectives_have_a_front_for_each_pair(study):
    keys = {"monitors": ["a", "b", "c"], "directions": ["maximize", "minimize", "minimize"], "best": list(range(20))}
    directory = study(several(objectives=3), **keys)
    assert "may look surpassed where only two of them are drawn" in page_of(directory).sections["Pareto front"]
    assert (directory / "report.html").read_text().count("<svg") == 3 + 3 + 12 + 1


# ---- population based training


def segment(number, member, until, value, parent=None, lr=0.01):
    """Two epochs of a member."""
    steps = [[until - 1, value - 0.05], [until, value]]
    keys = {} if parent is None else {"parent": parent}
    return trial(number, value=value, epochs=2, params={LR: lr}, intermediate=steps, member=member, **keys)


SEGMENTS = [
    segment(0, 0, 2, 0.5, lr=0.1),
    segment(1, 1, 2, 0.3, lr=0.001),
    segment(2, 0, 4, 0.6, parent=0, lr=0.1),
    segment(3, 1, 4, 0.7, parent=0, lr=0.08),  # took over the weights of member 0
]


def test_a_population_is_drawn_as_segments_with_the_schedule_of_the_winner(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "lightning_automl.plots.population_history",
        lambda segments, **keys: drawn.update(segments=segments) or _figure(),
    )
    monkeypatch.setattr(
        "lightning_automl.plots.value_schedule",
        lambda dimension, spans: drawn.update({dimension.name: spans}) or _figure(),
    )
    section = population(read(study(SEGMENTS, best=[3])))
    first, second, third, fourth = drawn["segments"]
    assert first.points == [(1, 0.45), (2, 0.5)]
    assert fourth.points == [(2, 0.5), (3, pytest.approx(0.65)), (4, 0.7)]
    assert [each.copied for each in drawn["segments"]] == [False, False, False, True]
    assert [each.winner for each in drawn["segments"]] == [True, False, False, True]
    assert third.points[0] == (2, 0.5)
    assert len(second.points) == 2
    assert drawn["lr"] == [(0, 2, 0.1), (2, 4, 0.08)]
    text = " ".join(block.text for block in section.blocks if block.kind == "text")
    assert "2 members; 1 time one of the worst took over" in text
    assert "(trial 3, member 1)" in text


def _figure():
    from matplotlib.figure import Figure

    return Figure()


def test_a_population_has_a_page_without_what_time_would_spoil(study):
    directory = study(SEGMENTS, best=[3], importances={"ped_anova": {LR: 1.0}}, summary=False)
    page = page_of(directory)
    assert "Population" in page.sections
    assert (
        not {"Which parameters matter", "Value against each parameter", "Parallel coordinates"} & page.sections.keys()
    )
    first, second = verdict(read(directory))
    assert first.startswith("This search is not finished: of 4 segments of the training of 2 members, all are complete")
    assert "of trial 3" in second
    assert "until epoch" in page.sections["Best trials"]
    unsorted = [segment(0, 0, 2, 0.5), trial(1, "RUNNING", epochs=0, member=1)]
    page_of(study(unsorted))


def test_segments_without_reports_are_placed_by_their_epochs(study):
    bare = [{**each, "intermediate": []} for each in SEGMENTS]
    page_of(study(bare, best=[3]))
