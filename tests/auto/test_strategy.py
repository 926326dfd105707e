"""What the stages share; the command as a whole is tested in test_auto_command.py."""

import pytest
from seen import BREAST, seen

from lightning_automl.auto.clock import Clock
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

    def _plan(self, facts, metric):
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
    monkeypatch.setattr(_Strategy, "_ask", lambda self, **payload: asked.append(payload) or {"facts": facts})
    settings = {**dict.fromkeys(("workers", "image_size", "folds")), "seed": 0, "budget": 9.0}
    strategy = _Strategy(tmp_path, {**settings, "auto": "images", "modality": "natural"}, None, None)
    strategy._look()
    (tmp_path / "look.json").unlink()
    with pytest.raises(KeyError, match="environment"):
        strategy._look()
    assert [each["image_size"] for each in asked] == [48, None]
