"""What the stages share; the command as a whole is tested in test_auto_command.py."""

from types import SimpleNamespace

import pytest
from seen import BREAST, DIGITS, seen

from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.clock import Clock
from lightning_automl.auto.comparison import Challenger, Choice
from lightning_automl.auto.strategy import _Strategy
from lightning_automl.rundir import UserError, read_json, write_json


class Killed(BaseException):
    """As if the process had ended there."""


class Staged(_Strategy):
    """One whose stages are there already, but for the training, which does what it is told."""

    def __init__(self, directory, budget, train):
        super().__init__(directory, {"workers": 1, "metric": None, "budget": budget}, None, Clock(directory, budget))
        self.train = train

    def _look(self):
        return BREAST

    def _plan(self, facts, metric, keep=True):
        plan = {"budget": self.settings["budget"], "metric": metric}
        write_json(self.directory / "plan.json", plan)
        return plan

    def _train(self, facts, plan):
        self.train(plan)


@pytest.fixture
def pages(monkeypatch):
    """The directories that a page was made of."""
    made = []

    def report(directory):
        made.append(directory)
        (directory / "report.html").write_text("page")

    monkeypatch.setattr("lightning_automl.auto.strategy.report", report)
    return made


def evaluated(directory, opened=1):
    scores = {"accuracy": 0.9}
    models = {"chosen": {"val": scores, "test": scores}}
    write_json(directory / "evaluation.json", {"models": models, "opened": opened})


def test_killed_while_it_goes_on_with_a_longer_budget_it_is_not_finished(tmp_path, pages):
    evaluated(tmp_path)
    assert Staged(tmp_path, 60.0, lambda plan: None)(False).status == "finished"
    assert Staged(tmp_path, 60.0, lambda plan: pytest.fail("trained again"))(False).metrics["test_accuracy"] == 0.9

    def kill(plan):
        saved.append((tmp_path / "summary.json").read_text())
        raise Killed

    saved = []
    with pytest.raises(Killed):
        Staged(tmp_path, 90.0, kill)(False)
    (tmp_path / "summary.json").write_text(saved[0])  # it had no time to note its end
    assert read_json(tmp_path / "summary.json")["status"] == "failed"
    trained = []
    assert Staged(tmp_path, 90.0, trained.append)(False).status == "finished"
    assert [plan["budget"] for plan in trained] == [90.0]
    assert read_json(tmp_path / "summary.json")["test_opened"] == 1


def test_a_page_of_a_failure_or_of_a_smaller_budget_is_not_taken_for_that_of_the_end(tmp_path, pages, monkeypatch):
    evaluated(tmp_path)
    (tmp_path / "report.html").write_text("old")

    def kill(directory):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lightning_automl.auto.strategy.report", kill)
        with pytest.raises(Killed):
            Staged(tmp_path, 60.0, lambda plan: None)(False)
    Staged(tmp_path, 60.0, lambda plan: pytest.fail("trained again"))(False)
    assert pages == [tmp_path]
    assert (tmp_path / "report.html").read_text() == "page"


def test_an_opening_is_counted_once(tmp_path, pages):
    evaluated(tmp_path)
    Staged(tmp_path, 60.0, lambda plan: None)(False)
    Staged(tmp_path, 90.0, lambda plan: evaluated(tmp_path, opened=2))(False)
    assert read_json(tmp_path / "summary.json")["test_opened"] == 2
    Staged(tmp_path, 120.0, lambda plan: None)(False)
    assert read_json(tmp_path / "summary.json")["test_opened"] == 2


def test_each_run_sees_one_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_automl.auto.strategy.visible_gpus", lambda: ("0", "1", "GPU-c", "3"))
    for workers, gpus in ((None, ["0", "1", "GPU-c", "3"]), (3, ["0", "1", "GPU-c"]), (1, ["0"])):
        strategy = _Strategy(tmp_path, {"workers": workers}, None, None)
        assert [each.gpus for each in strategy.workers.slices] == [(gpu,) for gpu in gpus]
    with pytest.raises(UserError, match="possible: at most 4 workers"):
        _Strategy(tmp_path, {"workers": 5}, None, None)


def test_a_larger_budget_does_not_look_at_other_sizes(tmp_path, monkeypatch):
    facts = seen((9, 9), (3, 3), (3, 3), size=48).to_dict()
    write_json(tmp_path / "look.json", facts)
    asked = []
    answer = {"facts": facts}
    place = "lightning_automl.auto.strategy.answer_of"
    monkeypatch.setattr(place, lambda server, payload: asked.append(payload) or answer)
    settings = {**dict.fromkeys(("workers", "image_size", "folds")), "seed": 0, "budget": 9.0}
    strategy = _Strategy(tmp_path, {**settings, "auto": "images", "modality": "natural"}, None, None)
    strategy._look()
    (tmp_path / "look.json").unlink()
    with pytest.raises(KeyError, match="environment"):
        strategy._look()
    assert [each["image_size"] for each in asked] == [48, None]


@pytest.mark.parametrize(
    ("facts", "given", "metric"),
    [(BREAST, None, "val_auroc"), (DIGITS, None, "val_balanced_accuracy"), (DIGITS, "val_loss", "val_loss")],
)
def test_what_decides_hangs_on_the_number_of_classes_unless_it_is_given(tmp_path, pages, facts, given, metric):
    evaluated(tmp_path)
    strategy = Staged(tmp_path, 60.0, lambda plan: None)
    strategy._look = lambda: facts
    strategy.settings["metric"] = given
    assert strategy(False).plan["metric"] == metric


def candidate(lr, **network):
    """With a policy that is in a file, as all have."""
    model = {"init_args": {"model": {"init_args": network}, "lr": lr}}
    return Candidate("cnn", {}, "none", {"model": model, "data": {"init_args": {"train_policy": None}}}, lr == 1)


@pytest.mark.parametrize(("adopted", "used"), [("simple", 0), ("searched", 1)])
def test_what_was_searched_is_taken_only_if_it_was_adopted(tmp_path, monkeypatch, adopted, used):
    simple, tuned = candidate(1), candidate(2)
    led = []
    auto = "lightning_automl.auto"
    monkeypatch.setattr(f"{auto}.policy_arm.search_policy", lambda *given, **keys: led.append(given[4]))
    monkeypatch.setattr(f"{auto}.architecture_arm.search_architecture", lambda *given, **keys: None)
    choice = Choice(Challenger(tuned, "hyper-parameters"), 1, [], "")
    monkeypatch.setattr(f"{auto}.comparison.best_challenger", lambda *given, **keys: choice)
    monkeypatch.setattr(f"{auto}.comparison.compare", lambda *given, **keys: {"adopted": adopted, "sentence": "."})
    strategy = Staged(tmp_path, 60.0, None)
    strategy.settings["seed"] = 0
    for searched in (tuned, None):
        found = strategy._adopted(None, BREAST, {}, SimpleNamespace(simple=simple, searched=searched, candidates={}))
        assert found is (simple, tuned)[used]
    assert led == [tuned, simple]  # the policy is searched with the best there is
    assert read_json(tmp_path / "comparison.json")["adopted"] == adopted


def test_tuned_values_that_are_no_better_on_the_search_folds_are_told(tmp_path):
    simple, tuned = candidate(1), candidate(2)
    strategy = Staged(tmp_path, 60.0, None)
    strategy.settings["seed"] = 0
    plan = {"metric": "val_auroc", "direction": "maximize", "search_folds": [0, 1, 2], "comparison": {"seeds": 1}}
    plan |= dict.fromkeys(("policy_search", "architecture_search"))
    for several, sentence in (
        ([simple, tuned], "The tuned hyper-parameters did not outperform"),
        ([simple], "Nothing"),
    ):
        selection = SimpleNamespace(simple=simple, searched=None, candidates=dict(enumerate(several)))
        assert strategy._adopted(None, BREAST, plan, selection) is simple
        assert read_json(tmp_path / "comparison.json")["sentence"].startswith(sentence)


def test_the_genotype_beside_the_model_is_that_of_the_model(tmp_path):
    strategy = Staged(tmp_path, 60.0, None)
    strategy._keep_parts(candidate(1, genotype={"normal": []}))
    assert read_json(tmp_path / "genotype.json") == {"normal": []}
    strategy._keep_parts(candidate(1))
    assert not (tmp_path / "genotype.json").exists()


def test_a_new_plan_forgets_what_was_cut_and_the_same_keeps_it(tmp_path, monkeypatch):
    auto = "lightning_automl.auto"
    monkeypatch.setattr(f"{auto}.arms.available", lambda *given, **keys: ([], {}))
    monkeypatch.setattr(f"{auto}.measure.measure", lambda *given, **keys: {})
    monkeypatch.setattr(
        f"{auto}.plan.make_plan",
        lambda *given, **keys: {"budget": keys["budget"], "sentences": [], "former": keys["former"]},
    )
    for budget, cuts in ((60.0, {}), (60.0, {"final": "."}), (90.0, {})):
        strategy = Staged(tmp_path, budget, None)
        strategy.settings |= {"backbone": None, "weights": None, "seed": 0}
        plan = _Strategy._plan(strategy, BREAST, "val_auroc")
        assert (plan["budget"], strategy.clock.cuts) == (budget, cuts)
        strategy.clock.cut("final", ".")
    assert plan["former"]["budget"] == 60.0
