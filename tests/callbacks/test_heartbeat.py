import pytest
from lightning.pytorch import Callback, Trainer

from lightning_automl.callbacks import AtomicCheckpointIO, Heartbeat, RunWriter
from lightning_automl.callbacks import heartbeat as module
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds, that the callback sees."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def network():
    return ClassificationTask(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8]), 10)


def trainer(directory, *callbacks):
    limits = dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches"), 2)
    limits |= {"limit_predict_batches": 2, "max_epochs": 1, "default_root_dir": directory}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], **limits, **QUIET)


def test_it_beats_at_most_once_in_the_given_time(clock):
    beats = []
    heartbeat = Heartbeat(lambda: beats.append(clock.now), every=2.0)
    for clock.now in (0.0, 1.0, 1.9, 2.0, 3.9, 4.1, 60.0):
        heartbeat.on_train_batch_start(None, None, None, 0)
    assert beats == [0.0, 2.0, 4.1, 60.0]


class Place(Callback):
    """Comes before the heartbeat and says where the run is."""

    def __init__(self):
        self.now = ""


def named(hook):
    def note(self, *args, **kwargs):
        self.now = hook

    return note


HOOKS = [name for name in dir(Callback) if name.startswith("on_")]
for hook in [*HOOKS, "setup", "teardown"]:
    setattr(Place, hook, named(hook))


def test_it_beats_from_every_part_of_a_run(tmp_path):
    place = Place()
    beats = set()
    runner = trainer(tmp_path, place, Heartbeat(lambda: beats.add(place.now), every=0), RunWriter(tmp_path))
    task, data = network(), DigitsDataModule()
    runner.fit(task, data)
    assert {"setup", "teardown", "on_fit_start", "on_save_checkpoint", "on_fit_end"} <= beats
    for part in ("train", "validation"):
        assert {f"on_{part}_batch_start", f"on_{part}_batch_end", f"on_{part}_end"} <= beats
    runner.test(task, data, verbose=False)
    runner.predict(task, data)
    for part in ("test", "predict"):
        assert {f"on_{part}_batch_start", f"on_{part}_batch_end", f"on_{part}_end"} <= beats


def test_it_is_silent_while_a_batch_hangs(clock):
    """A minute in a training step: nothing is sent from within, and at once after it."""
    beats = []

    class Slow(ClassificationTask):
        def training_step(self, batch, batch_idx):
            clock.now += 60
            return super().training_step(batch, batch_idx)

    task = Slow(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8]), 10)
    heartbeat = Heartbeat(lambda: beats.append(clock.now), every=1.0)
    runner = Trainer(
        accelerator="cpu",
        callbacks=[heartbeat],
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=0,
        enable_checkpointing=False,
        **QUIET,
    )
    runner.fit(task, DigitsDataModule())
    assert beats == [1000.0, 1060.0, 1120.0, 1180.0]


def test_what_the_receiver_raises_ends_the_run():
    def gone():
        raise BrokenPipeError

    runner = Trainer(accelerator="cpu", callbacks=[Heartbeat(gone)], enable_checkpointing=False, max_epochs=1, **QUIET)
    with pytest.raises(BrokenPipeError):
        runner.fit(network(), DigitsDataModule())


def test_a_negative_time_is_a_mistake():
    with pytest.raises(UserError, match=r"every is -1\.0; it is a number of seconds, 0 or more"):
        Heartbeat(print, every=-1.0)
