"""What tests of searches within a strategy share: a leader, a clock and workers."""

from lightning_automl.auto.candidates import Candidate
from lightning_automl.search.devices import Slice
from lightning_automl.studies.workers import Workers


class Time:
    """A clock that stands still."""

    def __init__(self, left=1000.0):
        self.seconds = left
        self.cuts = {}

    def left(self):
        return self.seconds

    def cut(self, stage, sentence):
        self.cuts[stage] = sentence


class FakeWorkers:
    """Fails whatever it is asked for, one after the other; ``jobs`` are the names of what was asked for."""

    def __init__(self, error):
        self.error = error
        self.jobs = []
        self.number = 1
        self.out_of_time = False

    def within(self, seconds):
        assert seconds > 0
        return self

    def each(self, work, items):
        return [work(item) for item in items]

    def fit(self, what, config, place):
        import json

        summary = place / "summary.json"
        if summary.exists():
            return json.loads(summary.read_text())
        self.jobs.append(what)
        raise self.error

    def do(self, what, payload, output, **others):
        self.jobs.append(what)
        raise self.error


def no_work():
    """Workers that nothing may be asked of."""
    return FakeWorkers(AssertionError("this was done before"))


def real_workers(server):
    return Workers(server, [Slice((), 1), Slice((), 1)], 1)


def leader_of(facts, **trainer):
    """A small network, trained for a moment."""
    network = {"class_path": "TunableCNN", "init_args": {"filters": [8], "units": []}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    config = {
        "model": {"class_path": "ClassificationTask", "init_args": {"model": network, "optimizer": optimizer}},
        "data": {"class_path": facts.data["class_path"], "init_args": {**facts.data["init_args"], "batch_size": 64}},
        "trainer": {"max_epochs": 1, "limit_train_batches": 4, "accelerator": "cpu", "devices": 1, **trainer},
        "monitor": "val_accuracy",
        "test_after_fit": False,
    }
    return Candidate("cnn", {}, "none", config, True, "small CNN")
