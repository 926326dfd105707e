"""Final runs, the model that is made of them, and the test split that is opened once."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from searched import FakeWorkers, Time, leader_of, no_work, real_workers
from seen import seen

from lightning_automl.auto.clock import Clock
from lightning_automl.auto.final import _train as train
from lightning_automl.auto.final import finish
from lightning_automl.auto.judging import compare_models
from lightning_automl.auto.runs import BUDGET, Outcome, Runs
from lightning_automl.metrics.scores import negative_log_likelihood
from lightning_automl.results.ensemble import Ensemble, combine_predictions
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.predictor import Predictor
from lightning_automl.results.run import Predictions, Run, read_predictions
from lightning_automl.rundir import read_json
from lightning_automl.search.study import StudyFailed


def plan_of(seeds, **others):
    arms = [{"name": "cnn", "title": "small CNN", "epochs": 1, "run_seconds": 5.0, "policies": ["none"]}]
    stages = [{"name": name, "seconds": 10.0} for name in ("final", "evaluation")]
    metric = {
        "metric": "val_auroc",
        "direction": "maximize",
        "search_folds": [0],
        "comparison_folds": [1],
        "comparison": None,
    }
    return {"budget": 600.0, "arms": arms, "final": {"seeds": seeds}, "stages": stages, **metric, **others}


class Finished:
    """A strategy whose last stages are done, and can be done again with another plan."""

    def __init__(self, directory, server, val):
        self.directory = directory / "strategy"
        self.directory.mkdir()
        (self.directory / "config.yaml").write_text(yaml.safe_dump({"auto": "images", "seed": 3}))
        self.arrays = draw_images(directory / "images.npz", val)
        self.notes = directory / "notes"
        data = {
            "class_path": "spied_data.SpiedDataModule",
            "init_args": {
                **{"path": str(self.arrays), "notes": str(self.notes)},
                "watched": [str(self.directory / "model.json")],
            },
        }
        self.facts = seen((15, 15), (val // 2, val // 2), (8, 8), data=data)
        self.chosen = leader_of(self.facts)
        config = json.loads(json.dumps(self.chosen.config))
        config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0001
        self.simple = replace(self.chosen, config=config)
        self.workers = real_workers(server)

    def __call__(self, seeds, simple=True, workers=None, budget=600.0):
        plan = plan_of(seeds, budget=budget)
        with Clock(self.directory, budget) as clock:
            runs = Runs(workers or self.workers, self.directory, self.facts, plan, clock)
            arms = (self.chosen, self.simple if simple else self.chosen)
            self.used = finish(runs, workers or self.workers, self.directory, self.facts, plan, *arms)
        return read_json(self.directory / "evaluation.json")

    def asked(self):
        """Which splits were asked for by evaluations, and whether there was a model by then."""
        return [tuple(json.loads(line)) for line in self.notes.read_text().splitlines()]

    def images(self, split):
        return np.load(self.arrays)[f"{split}_images"].transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def start(tmp_path_factory, _server):
    """Make a strategy in a directory of its own."""
    return lambda val=32: Finished(tmp_path_factory.mktemp("final"), _server, val)


@pytest.fixture(scope="module")
def finished(start):
    """Two seeds of two candidates; never changed."""
    whole = start()
    whole.record = whole(2)
    return whole


@pytest.fixture(scope="module")
def few(start):
    """Six seeds of a candidate, where validation has few images; never changed."""
    whole = start(24)
    whole.record = whole(6, simple=False)
    return whole


def draw_images(path, val):
    """Two classes that are hard to tell apart: 30, some and 16 images."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in zip(("train", "val", "test"), (30, val, 16), strict=True):
        labels = np.arange(count) % 2
        images = generator.integers(0, 200, (count, 8, 8, 1)) + labels[:, None, None, None] * 30
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


def test_the_test_split_is_asked_for_when_the_model_is_there_and_not_before(finished):
    asked = finished.asked()
    assert [split for split, _ in asked].count("test") >= 1
    assert {there for split, there in asked if split == "test"} == {True}
    assert asked.index(("test", True)) > max(at for at, (split, _) in enumerate(asked) if split == "val")
    assert read_json(finished.directory / "openings.json") == [finished.record["fingerprint"]]
    assert finished.record["opened"] == 1
    summaries = [read_json(path) for path in finished.directory.glob("runs/*/final-seed-*/summary.json")]
    assert [each["test_opened"] for each in summaries] == [0] * 4


def test_every_run_and_both_models_have_their_scores(finished):
    models = finished.record["models"]
    for name, candidate in (("chosen", finished.chosen), ("simple", finished.simple)):
        assert models[name]["key"] == candidate.key
        assert [each["seed"] for each in models[name]["seeds"]] == [3, 4]
        for each in (models[name], *models[name]["seeds"]):
            for split in ("val", "test"):
                assert {"accuracy", "balanced_accuracy", "auroc", "average_precision", "f1"} <= each[split].keys()
        for each in models[name]["seeds"]:
            assert (finished.directory / each["directory"] / "evaluated_test.safetensors").exists()
            assert each["epochs"] == 1
    assert finished.record["left_out"] == []
    assert finished.record["comparison"]["sentence"].count("outperform") <= 1
    assert finished.record["comparison"]["unit"] == "image"


def test_the_model_gives_what_was_evaluated(finished):
    predictor = Predictor(finished.directory, "cpu")
    for split in ("val", "test"):
        found = read_predictions(finished.directory / f"predictions_{split}.safetensors")
        np.testing.assert_allclose(predictor.arrays(finished.images(split)), found.probabilities, atol=1e-5)
        assert found.labels.tolist() == np.load(finished.arrays)[f"{split}_labels"].tolist()


def test_what_validation_has_chosen_is_what_the_model_is(finished):
    ensemble, record = Ensemble.read(finished.directory), finished.record
    assert ensemble.average == record["averaging"]["kind"] in ("predictions", "weights")
    values = record["averaging"]["values"]
    assert (ensemble.average == "weights") == (values["weights"] > values["predictions"])
    assert len(ensemble.members) == (1 if ensemble.average == "weights" else 2)
    assert ensemble.temperature == record["temperature"]
    assert ensemble.threshold == record["threshold"]
    assert set(record["at_threshold"]["val"]) == {"accuracy", "recall", "precision", "specificity", "balanced_accuracy"}
    val = read_predictions(finished.directory / "predictions_val.safetensors")
    assert record["unsure"]["val"]["share"] == pytest.approx((val.probabilities.max(1) < ensemble.unsure_below).mean())
    assert (val.probabilities.max(1) < ensemble.unsure_below).sum() <= 3  # a tenth of 32
    assert record["unsure"]["below"] == ensemble.unsure_below


def test_the_temperature_never_raises_the_validation_loss(finished):
    calibrated = read_predictions(finished.directory / "predictions_val.safetensors")
    raw = finished.record["models"]["chosen"]
    places = [finished.directory / each for each in Ensemble.read(finished.directory).members]
    members = [read_predictions(place / "evaluated_val.safetensors").probabilities for place in places]
    before = negative_log_likelihood(np.mean(members, 0), calibrated.labels)
    assert raw["val"]["negative_log_likelihood"] <= before + 1e-6
    assert (np.mean(members, 0).argmax(1) == calibrated.predicted).all()


def test_a_report_can_take_its_predictions(finished):
    run = Run.read(finished.directory / finished.record["models"]["chosen"]["seeds"][0]["directory"])
    evidence = Evidence(replace(run, directory=finished.directory, data=read_json(finished.directory / "data.json")))
    assert evidence.doubts == []
    assert evidence.split == "test"


def test_maps_are_kept_of_images_of_the_test_split(finished):
    found = load_file(finished.directory / "activations.safetensors")
    assert found["maps"].shape == (12, 8, 8)
    arrays = np.load(finished.arrays)
    rows = found["rows"] - 30 - 32  # of the index, which has the splits one after the other
    assert (arrays["test_labels"][rows] == found["labels"]).all()
    assert (finished.images("test")[rows] == found["images"]).all()


def test_of_few_images_each_final_run_does_without_another_fold(few):
    places = [few.directory / each["directory"] for each in few.record["models"]["chosen"]["seeds"]]
    assert [place.name for place in places] == [f"final-fold-{n % 5}-seed-{3 + n}" for n in range(6)]
    own = [yaml.safe_load((place / "config.yaml").read_text()) for place in places]
    assert [each["data"]["init_args"]["fold"] for each in own] == [0, 1, 2, 3, 4, 0]
    assert {(each["monitor"], each["data"]["init_args"]["without_folds"]) for each in own} == {("epoch", None)}
    assert few.record["folds"] == [0, 1, 2, 3, 4]
    assert (few.record["averaging"]["kind"], few.record["averaging"]["values"]["weights"]) == ("predictions", None)
    counts = [read_json(place / "data.json")["counts"] for place in places]
    assert {sum(each["train"]) + sum(each["val"]) for each in counts} == {54}
    assert read_json(few.directory / "data.json")["counts"] == few.facts.counts


def test_validation_of_few_images_is_of_all_that_a_run_has_not_seen(few):
    found = read_predictions(few.directory / "predictions_val.safetensors")
    arrays = np.load(few.arrays)
    assert found.rows.tolist() == list(range(54))
    assert found.labels.tolist() == [*arrays["train_labels"], *arrays["val_labels"]]
    members = [read_predictions(place / "evaluated_val.safetensors") for place in Ensemble.read(few.directory).places]
    for row in range(54):
        raw = np.mean([each.probabilities[each.rows == row][0] for each in members if row in each.rows], 0)
        powers = raw ** (1 / few.record["temperature"])
        np.testing.assert_allclose(found.probabilities[row], powers / powers.sum(), atol=1e-6)
    assert sum(len(each.rows) for each in members) == 54 + len(members[0].rows)  # the first fold twice


def test_the_model_of_few_images_gives_what_was_evaluated(few):
    found = read_predictions(few.directory / "predictions_test.safetensors")
    given = Predictor(few.directory, "cpu").arrays(few.images("test"))
    np.testing.assert_allclose(given, found.probabilities, atol=1e-5)
    run = Run.read(few.directory / few.record["models"]["chosen"]["seeds"][0]["directory"])
    evidence = Evidence(replace(run, directory=few.directory, data=read_json(few.directory / "data.json")))
    assert (evidence.doubts, evidence.split, len(evidence.predictions("val").labels)) == ([], "test", 54)


def test_an_average_is_of_those_that_give_something_for_an_image():
    def of(rows, first, groups=None):
        first = np.array(first)
        labels = np.array(rows) % 2
        own = None if groups is None else np.array(groups)
        return Predictions(np.stack([first, 1 - first], 1), labels, np.array(rows), own, {"split": "a", "epoch": "1"})

    found = combine_predictions([of([5, 1], [0.2, 0.6], [1, 0]), of([2], [0.5], [0]), of([5, 1], [0.4, 0.8], [1, 0])])
    assert found.rows.tolist() == [1, 2, 5]
    np.testing.assert_allclose(found.probabilities[:, 0], [0.7, 0.5, 0.3])
    assert (found.labels.tolist(), found.groups.tolist()) == ([1, 0, 1], [0, 2, 1])
    assert found.origin == {"epoch": "1"}
    same = combine_predictions([of([5, 1], [0.2, 0.6]), of([5, 1], [0.4, 0.8])])
    assert (same.rows.tolist(), same.origin["split"]) == ([5, 1], "a")
    np.testing.assert_allclose(same.probabilities[:, 0], [0.3, 0.7])


def test_again_nothing_is_trained_evaluated_or_opened(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.directory.glob("*.safetensors")}
    (finished.directory / "evaluation.txt").unlink(missing_ok=True)
    asked = len(finished.asked())
    workers = _OnlyValidation(finished.workers)
    assert finished(2, workers=workers) == finished.record
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(finished.asked()) == asked
    assert workers.splits == ["val"]


class _OnlyValidation:
    """Workers that train nothing and open nothing."""

    def __init__(self, workers):
        self._workers = workers
        self.splits = []

    def __getattr__(self, name):
        return getattr(self._workers, name)

    def fit(self, *_):
        raise AssertionError("this was trained before")

    def do(self, what, payload, output):
        self.splits.append(payload["split"])
        assert payload["split"] == "val"
        return self._workers.do(what, payload, output)


def test_what_was_killed_before_its_end_is_the_same_opening(start):
    whole = start()
    first = whole(1, simple=False)
    assert (first["opened"], first["comparison"], first["models"]["simple"]) == (1, None, None)
    assert first["averaging"]["kind"] == "single"
    (whole.directory / "evaluation.json").unlink()
    assert whole(1, simple=False) == first
    more = whole(2, simple=False, budget=900.0)
    assert more["opened"] == 2
    assert read_json(whole.directory / "openings.json") == [first["fingerprint"], more["fingerprint"]]
    assert [each["seed"] for each in more["models"]["chosen"]["seeds"]] == [3, 4]


@pytest.mark.parametrize(
    "gone",
    [
        ["evaluation.json"],
        ["evaluation.json", "predictions_test.safetensors", "activations.safetensors"],
        ["evaluation.json", "openings.json"],
        ["evaluation.json", "openings.json", "model.json"],
        ["evaluation.json", "openings.json", "model.json", "predictions_val.safetensors", "data.json", "final.json"],
        ["runs/*/averaged/members.json", "evaluation.json"],
        ["runs/*/averaged", "evaluation.json", "openings.json", "model.json"],
        ["runs/*/*/evaluated_test.safetensors", "evaluation.json"],
        ["runs/*/*/evaluated_val.safetensors", "evaluation.json", "openings.json", "model.json"],
    ],
    ids=" ".join,
)
def test_killed_between_any_two_files_it_comes_to_the_same(finished, tmp_path, gone):
    again = copy.copy(finished)
    again.directory = shutil.copytree(finished.directory, tmp_path / "strategy")
    for path in (path for pattern in gone for path in again.directory.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again(2) == finished.record
    for name in ("model.json", "data.json", "openings.json", "final.json"):
        assert read_json(again.directory / name) == read_json(finished.directory / name)
    for split in ("val", "test"):
        one, other = (
            read_predictions(each / f"predictions_{split}.safetensors")
            for each in (again.directory, finished.directory)
        )
        assert (one.probabilities == other.probabilities).all()


def test_if_all_final_runs_of_the_chosen_one_fail_the_simple_one_is_used_and_that_is_said(start):
    whole = start()
    config = json.loads(json.dumps(whole.chosen.config))
    network = {"class_path": "faulty_network.FaultyNetwork", "init_args": {"fault": "raise"}}
    config["model"]["init_args"]["model"] = network
    config["data"]["init_args"]["batch_size"] = 8
    whole.chosen = replace(whole.chosen, config=config, arm_title="broken")
    record = whole(1)
    assert whole.used.key == whole.simple.key
    assert (record["models"]["chosen"]["key"], record["models"]["simple"]) == (whole.simple.key, None)
    assert record["instead_of"] == {"key": whole.chosen.key, "title": whole.chosen.title}
    assert [each["key"] for each in record["left_out"]] == [whole.chosen.key]
    assert Ensemble.read(whole.directory).members == [f"runs/{whole.simple.key}/final-seed-3"]


# What is left out --------------------------------------------------------------------------------------------------


class _Scripted:
    """Runs that end as they are told, each of which takes five seconds."""

    def __init__(self, directory, left, outcomes=None):
        self.clock = Time(left)
        self.directory = directory
        self.outcomes = outcomes or {}
        self.asked = []

    def wall_seconds(self, jobs):
        return 5.0 * len(jobs)

    def each(self, jobs, *, at_least, within=None, on_run=None):
        assert at_least >= min(1, len(jobs))
        self.asked = [(job.candidate.key, job.seed) for job in jobs]
        return [self.outcomes.get(key, Outcome(0.9, "", 5.0, 3, self.directory)) for key in self.asked]


@pytest.fixture
def arms():
    chosen = leader_of(seen())
    return [chosen, replace(chosen, arm="resnet", arm_title="ResNet-20")]


@pytest.mark.parametrize(
    ("left", "seeds", "kinds"),
    [(100, 3, 2), (41, 3, 2), (39, 2, 2), (20, 1, 2), (19, 1, 1), (-50, 1, 1)],
)
def test_as_many_whole_seeds_as_fit_are_trained_and_always_one(tmp_path, arms, left, seeds, kinds):
    runs = _Scripted(tmp_path, left)
    found, left_out = train(runs, tmp_path, seen(), plan_of(3), arms, 0)
    assert [sorted(each) for each in found] == [list(range(seeds)), list(range(seeds)) if kinds == 2 else []]
    assert len(left_out) == 6 - seeds * kinds
    assert {each["reason"] for each in left_out} <= {"there was no time left for it"}
    assert bool(runs.clock.cuts) == bool(left_out)
    later = _Scripted(tmp_path, 1000)  # what was decided stays so while the plan does
    train(later, tmp_path, seen(), plan_of(3), arms, 0)
    assert later.asked == runs.asked
    train(later, tmp_path, seen(), plan_of(3, budget=601.0), arms, 0)
    assert len(later.asked) == 6


@pytest.mark.parametrize(("left", "seeds"), [(100, 7), (130, 10), (1000, 10), (41, 3), (39, 2)])
def test_what_is_left_over_goes_into_more_seeds_than_planned(tmp_path, arms, left, seeds):
    runs = _Scripted(tmp_path, left)
    found, left_out = train(runs, tmp_path, seen(), plan_of(3, final={"seeds": 3, "most": 10}), arms, 0)
    assert [len(each) for each in found] == [seeds, seeds]
    assert len(left_out) == 2 * max(0, 3 - seeds)


def test_a_seed_that_fails_is_left_out_with_its_reason(tmp_path, arms):
    failed = Outcome(None, "it has diverged: val_auroc is nan", 5.0, 3, tmp_path)
    late = Outcome(None, BUDGET, 0.0, 0, tmp_path)
    runs = _Scripted(tmp_path, 100, {(arms[0].key, 1): failed, (arms[1].key, 2): late})
    found, left_out = train(runs, tmp_path, seen(), plan_of(3), arms, 0)
    assert [sorted(each) for each in found] == [[0, 2], [0, 1]]
    assert [(each["seed"], each["reason"]) for each in left_out] == [
        (1, "it has diverged: val_auroc is nan"),
        (2, "there was no time left for it"),
    ]


def test_a_simple_candidate_without_time_is_trained_if_it_is_all_that_is_left(tmp_path, arms):
    failed = Outcome(None, "the network broke", 5.0, 3, tmp_path)
    for _ in range(2):
        runs = _Scripted(tmp_path, 19, {(arms[0].key, 0): failed})
        found, left_out = train(runs, tmp_path, seen(), plan_of(3), arms, 0)
        assert [sorted(each) for each in found] == [[], [0]]
        assert runs.clock.cuts == {"final": "1 of 3 final seeds were trained, for lack of time."}
        assert {each["reason"] for each in left_out} == {"the network broke", "there was no time left for it"}


def test_if_no_final_run_gives_a_model_that_is_said(tmp_path):
    facts = seen()
    workers = FakeWorkers(StudyFailed("the network broke"))
    workers.is_set = lambda: False
    with Clock(tmp_path, 600.0) as clock:
        runs = Runs(workers, tmp_path, facts, plan_of(2), clock)
        with pytest.raises(StudyFailed, match=r"no final run of small CNN.*broke"):
            finish(runs, no_work(), tmp_path, facts, plan_of(2), leader_of(facts), None)
    assert not (tmp_path / "model.json").exists()
    assert not (tmp_path / "openings.json").exists()


# Comparison --------------------------------------------------------------------------------------------------------


def scores(right, images=60):
    """Two classes in turn, of which the first so many images are recognised."""
    labels = np.arange(images) % 2
    said = np.where(np.arange(images) < right, labels, 1 - labels)
    return np.eye(2)[said] * 0.8 + 0.1, labels


@pytest.mark.parametrize(
    ("first", "second", "better", "words"),
    [
        (58, 30, True, "A outperformed B"),
        (45, 44, False, "A did not outperform B"),
        (45, 45, False, "A did not outperform B on the test split: their balanced accuracy is the same"),
        (30, 58, False, "A was worse than B"),
    ],
)
def test_a_claim_needs_an_interval_without_zero(first, second, better, words):
    (one, labels), (other, _) = scores(first), scores(second)
    found = compare_models(("A", "B"), (one, other), labels, None, "val_balanced_accuracy", "maximize")
    assert found["better"] is better
    assert words in found["sentence"]
    assert found["difference"] == pytest.approx((first - second) / 60)
    assert found["accuracy"]["difference"] == pytest.approx((first - second) / 60)
    assert found["low"] <= found["difference"] <= found["high"]


def test_of_a_loss_less_is_better():
    (one, labels), (other, _) = scores(58), scores(30)
    found = compare_models(("A", "B"), (one, other), labels, None, "val_loss", "minimize")
    assert found["better"]
    assert found["difference"] < 0


def test_groups_are_drawn_as_a_whole():
    (one, labels), (other, _) = scores(58), scores(40)
    alone = compare_models(("A", "B"), (one, other), labels, None, "val_accuracy", "maximize")
    grouped = compare_models(("A", "B"), (one, other), labels, np.arange(60) // 20, "val_accuracy", "maximize")
    assert grouped["unit"] == "group"
    assert grouped["high"] - grouped["low"] > alone["high"] - alone["low"]
    assert not grouped["better"]


def test_what_cannot_be_compared_is_said_to_be_so():
    one, labels = scores(3, 4)
    found = compare_models(("A", "B"), (one, one), labels * 0, None, "val_auroc", "maximize")
    assert "cannot be compared" in found["sentence"]
    assert (found["difference"], found["low"], found["better"]) == (None, None, False)
    single = compare_models(("A", "B"), (one, one), labels, np.zeros(4), "val_accuracy", "maximize")
    assert "cannot be compared" in single["sentence"]


def test_models_of_different_numbers_of_seeds_are_told():
    one, labels = scores(50)
    found = compare_models(("A", "B"), (one, one), labels, None, "val_accuracy", "maximize", (3, 2))
    assert found["sentence"].endswith("They are models of 3 and 2 seeds.")
