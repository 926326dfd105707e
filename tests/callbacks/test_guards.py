"""Guards of architecture searches. The two ranks of the last test run this file as a script."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from scripted_search import ScriptedTask, search
from two_ranks import part, run_twice

from lightning_automl.callbacks import EigenvalueStop, SearchGuard, SkipStop, Verdict
from lightning_automl.callbacks.guards import architecture_eigenvalue, has_grown
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import DartsSpace, TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask, DartsTask

# Lightning 2.6.6 with torch 2.14: Lightning's own code, https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


# --------------------------------------------------------------------------------------------------- skip connections


@pytest.mark.parametrize(
    ("skips", "settings", "ended", "taken"),
    [
        ([0, 1, 2, 0], {}, 2, 2),
        ([0, 1, 1, 1], {}, None, None),
        ([1, 4], {}, 1, 0),  # more than asked for: the newest with no more
        ([2, 0, 4], {"not_before": 1}, 2, 1),
        ([4], {}, 0, 0),  # there is no earlier one
        ([0, 2, 1, 2, 2, 0], {"patience": 2}, 4, 4),
        ([0, 2, 3, 3], {"patience": 3}, 3, 1),
        ([4, 4, 1], {"not_before": 2}, None, None),
        ([4, 4, 1], {"not_before": 1}, 1, 1),
        ([0, 1], {"skips": 1}, 1, 1),
    ],
)
def test_a_search_ends_when_a_cell_has_too_many_skip_connections(skips, settings, ended, taken):
    guard, task = SkipStop(**{"not_before": 0, **settings}), ScriptedTask(skips)
    trainer = search(task, [guard])
    assert trainer.current_epoch == (8 if ended is None else ended + 1)
    assert (task.chosen and task.chosen[0]) == taken
    record = guard.record()
    assert record["fired"] == (ended is not None)
    assert record["settings"] == {"skips": 2, "kind": "normal", "patience": 1, "not_before": 0, **settings}
    if ended is None:
        most = max(skips)
        assert record["sentence"].startswith(f"SkipStop did not end the search: at most {most} skip connection")
    else:
        assert record["sentence"] == task.chosen[1]
        many = "skip connection" if skips[ended] == 1 else "skip connections"
        assert f"after epoch {ended + 1}: {skips[ended]} {many} in the normal cell" in record["sentence"]
        assert record["sentence"].endswith(f"; the genotype of epoch {taken + 1} was taken")


def test_either_cell_can_be_watched():
    for kind in ("normal", "reduce"):
        for watched in ("normal", "reduce"):
            guard = SkipStop(kind=watched, not_before=0)
            search(ScriptedTask([4], kind=kind), [guard], max_epochs=1)
            assert guard.record()["fired"] == (kind == watched)


def test_epochs_without_a_step_on_the_alphas_are_not_judged():
    guard = SkipStop(not_before=0)
    search(ScriptedTask([4, 4, 4, 1], warmup_epochs=3), [guard], max_epochs=5)
    assert guard.seen == [[3, 1], [4, 1]]
    assert not guard.record()["fired"]


def test_a_space_that_never_derives_so_many_skip_connections_is_refused():
    space = DartsSpace(10, in_channels=1, image_size=8, channels=2, cells=3, nodes=1, max_skips=1)
    with pytest.raises(UserError, match="SkipStop waits for 2 skip connections, and max_skips=1 of the space derives"):
        search(DartsTask(space, 10), [SkipStop()])


# ---------------------------------------------------------------------------------------------------------- eigenvalue


def test_constant_eigenvalues_never_stop():
    assert not any(has_grown([0.3] * number) for number in range(60))


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_eigenvalues_that_double_stop(start):
    assert has_grown([start] * 5 + [2 * start] * 4)
    assert not has_grown([start] * 5 + [2 * start] * 3)  # fewer than window + lag


def test_growth_is_that_of_means_by_hand():
    values = [1.0, 2.0, 3.0, 2.0, 1.0, 3.0, 4.0]
    # window 3, lag 2: (1 + 3 + 4) / 3 over (3 + 2 + 1) / 3
    assert has_grown(values, window=3, factor=8 / 6 - 1e-9, lag=2)
    assert not has_grown(values, window=3, factor=8 / 6 + 1e-9, lag=2)


@pytest.mark.parametrize("before", [0.0, -1.0, float("nan")])
def test_growth_from_what_is_not_above_zero_is_none(before):
    assert not has_grown([before] * 5 + [5.0] * 4)


@pytest.mark.parametrize(
    ("eigenvalues", "settings", "ended", "taken"),
    [
        ([1.0], {}, None, None),
        ([1, 1, 1, 1, 2, 2], {}, 4, 2),  # means of 3: (1 + 1 + 2) / 3 is more than 1.3 times 1
        ([1, 1, 1, 1, 1.5, 1.5, 1.5], {}, 5, 3),
        ([1, 1, 1, 1, 2, 2], {"not_before": 7}, None, None),  # by then both means have grown
        ([1, 1, 1, 1, 1, 2, 2, 2], {"not_before": 6}, 6, 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], {"lag": 1, "window": 1, "factor": 1.9}, 1, 0),
        # checks after epochs 1, 3, 5, 7 (from 0)
        ([9, 1, 9, 1, 9, 1.5, 9, 2], {"every": 2, "window": 1, "lag": 1, "factor": 1.4}, 5, 3),
    ],
)
def test_a_search_ends_when_the_eigenvalue_grows_and_takes_the_earlier_genotype(eigenvalues, settings, ended, taken):
    settings = {"window": 3, "lag": 2, "not_before": 0, **settings}
    guard, task = EigenvalueStop(**settings), ScriptedTask(eigenvalues=eigenvalues)
    trainer = search(task, [guard])
    assert trainer.current_epoch == (8 if ended is None else ended + 1)
    assert (task.chosen and task.chosen[0]) == taken
    record = guard.record()
    assert record["fired"] == (ended is not None)
    assert record["settings"] == {"every": 1, "factor": 1.3, **settings}
    for epoch, value in guard.seen:
        assert value == pytest.approx(eigenvalues[min(epoch, len(eigenvalues) - 1)], rel=1e-3)
        assert (epoch + 1) % settings.get("every", 1) == 0
    if ended is not None:
        of = "mean of the newest 3 eigenvalues" if settings["window"] == 3 else "newest eigenvalue"
        assert f"ended the search after epoch {ended + 1}: the {of} is " in record["sentence"]
        assert record["sentence"].endswith(f"the genotype of epoch {taken + 1} was taken")
    assert trainer.callback_metrics["eigenvalue"] == pytest.approx(guard.seen[-1][1])


def test_a_guard_says_how_far_the_eigenvalue_was_from_ending_the_search():
    guard = EigenvalueStop(window=2, lag=1, not_before=0, factor=5.0)
    search(ScriptedTask(eigenvalues=[1, 1, 3, 3]), [guard], max_epochs=4)
    assert "grew to at most 2.00 times that of 1 check before; 5 from epoch 1 on" in guard.record()["sentence"]
    search(ScriptedTask(), [guard], max_epochs=2)
    assert guard.record()["sentence"].endswith("2 checks, and its means need 3")


class Watching(Callback):
    """Takes the eigenvalue both ways at the end."""

    def on_train_epoch_end(self, trainer, pl_module):
        alphas, batch = pl_module.model.alphas(), pl_module.newest_arch_batch
        before = [alpha.detach().clone() for alpha in alphas]
        self.found = architecture_eigenvalue(pl_module, batch)
        self.kept = all(torch.equal(*pair) for pair in zip(before, pl_module.model.alphas(), strict=True))
        for cell in pl_module.model.cells:
            cell.fused = False  # the readable form can be differentiated twice
        with torch.autocast("cpu", enabled=False):
            loss = pl_module.architecture_loss(batch)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas, create_graph=True)])
        rows = [torch.autograd.grad(each, alphas, retain_graph=True) for each in gradient]
        hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        self.all = torch.linalg.eigvalsh((hessian + hessian.T) / 2)


def tiny_space(**settings):
    settings = {"channels": 2, "cells": 3, "nodes": 2, "operations": OPERATIONS, "stem_multiplier": 1, **settings}
    return DartsSpace(10, in_channels=1, image_size=8, **settings)


OPERATIONS = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3")


@pytest.mark.parametrize(("precision", "fused"), [("64-true", False), ("32-true", True), ("bf16-mixed", True)])
def test_the_eigenvalue_is_that_of_the_full_hessian(precision, fused):
    torch.manual_seed(1)
    task, watching = DartsTask(tiny_space(fused=fused), 10), Watching()
    search(task, [watching], max_epochs=1, limit_train_batches=4, precision=precision)
    assert len(watching.all) == 2 * 5 * 4  # normal and reduce, edges, operations
    assert watching.all[0] < 0 < watching.all[-1]
    assert watching.found == pytest.approx(watching.all[-1].item(), rel=1e-3)
    assert watching.kept


def test_a_guard_that_does_not_fire_changes_nothing():
    tensors = []
    for guards in ([], [EigenvalueStop(), SkipStop()]):
        torch.manual_seed(0)
        task = DartsTask(tiny_space(), 10)
        search(task, guards, max_epochs=2)
        tensors.append(task.state_dict())
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())


# --------------------------------------------------------------------------------------------------------- in a search


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Writes a checkpoint as a run does, after all others have seen the epoch, and fails in a later one."""

    def __init__(self, path, kill):
        self.path, self.kill = path, kill

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == self.kill:
            raise Killed

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def guards():
    return [SkipStop(not_before=0, patience=2), EigenvalueStop(window=2, lag=2, not_before=0)]


def outcome(trainer, task, callbacks):
    return trainer.current_epoch, task.chosen, [(each.record(), each.seen) for each in callbacks]


@pytest.mark.parametrize(
    "script",
    [{"skips": [1, 1, 1, 2, 1, 2, 2]}, {"eigenvalues": [1, 1, 1, 1, 1, 1, 3]}, {"skips": [0, 1]}],
    ids=["SkipStop", "EigenvalueStop", "neither"],
)
@pytest.mark.parametrize("kill", [1, 3, 5, 6])
def test_a_run_that_is_continued_decides_as_an_uninterrupted_one(tmp_path, script, kill):
    whole, task = guards(), ScriptedTask(**script)
    expected = outcome(search(task, whole), task, whole)
    assert (expected[1] is None) == (script == {"skips": [0, 1]})
    path = tmp_path / "last.ckpt"
    with pytest.raises(Killed):
        search(ScriptedTask(**script), [*guards(), SaveAndKill(path, kill)])
    continued, task = guards(), ScriptedTask(**script)
    trainer = search(task, [*continued, SaveAndKill(path, None)], ckpt_path=path)
    assert outcome(trainer, task, continued) == expected


def test_a_search_that_was_ended_stays_ended_with_more_epochs(tmp_path):
    path, script = tmp_path / "last.ckpt", [0, 0, 3, 0]
    first, task = SkipStop(not_before=0), ScriptedTask(script)
    search(task, [first, SaveAndKill(path, None)])
    again, other = SkipStop(not_before=0), ScriptedTask(script)
    search(other, [again, SaveAndKill(path, None)], ckpt_path=path, max_epochs=20)
    assert again.seen == [[0, 0], [1, 0], [2, 3]]
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in other.state_dict().items())
    assert other.chosen == task.chosen
    assert again.record() == first.record()


def test_a_guard_forgets_a_former_training():
    guard = SkipStop(not_before=0)
    search(ScriptedTask([4]), [guard])
    task = ScriptedTask([0])
    trainer = search(task, [guard], max_epochs=2)
    assert (trainer.current_epoch, task.chosen, guard.verdict) == (2, None, None)
    assert guard.seen == [[0, 0], [1, 0]]


def test_the_first_of_two_guards_that_fire_at_once_is_the_one():
    one, other = SkipStop(not_before=0), EigenvalueStop(window=1, lag=1, not_before=0)
    task = ScriptedTask([0, 2], eigenvalues=[1, 2])
    search(task, [one, other])
    assert task.chosen == (1, one.record()["sentence"])
    assert len(other.seen) == 2
    assert [one.record()["fired"], other.record()["fired"]] == [True, False]


class Impatient(SearchGuard):
    def judge(self, trainer, pl_module):
        self.see(trainer.current_epoch, 7.0)
        return Verdict(0, "Impatient has seen enough") if trainer.current_epoch == 1 else None

    def settings(self):
        return {}

    def state(self):
        return "Impatient waits"


def test_a_guard_of_one_s_own_says_when():
    guard, task = Impatient(), ScriptedTask()
    assert guard.record()["sentence"] == "Impatient waits"
    assert search(task, [guard]).current_epoch == 2
    assert task.chosen == (0, "Impatient has seen enough")
    assert guard.record() == {"name": "Impatient", "settings": {}, "fired": True, "sentence": task.chosen[1]}


def test_an_epoch_that_was_cut_short_and_continued_is_seen_once():
    guard = SkipStop()
    for epoch, value in ((0, 1), (1, 2), (1, 3), (2, 0)):
        guard.see(epoch, value)
    assert guard.seen == [[0, 1], [1, 3], [2, 0]]


@pytest.mark.parametrize("guard", [SkipStop, EigenvalueStop])
def test_a_task_that_searches_nothing_is_refused(guard):
    task = ClassificationTask(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[]), 10)
    sentence = f"{guard.__name__} watches an architecture search, and ClassificationTask is none; use DartsTask, or"
    with pytest.raises(UserError, match=sentence):
        search(task, [guard()], data=DigitsDataModule())


def test_a_task_without_gradients_of_its_architecture_is_refused():
    class Mine(ClassificationTask):
        stop_search = print

    task = Mine(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[]), 10)
    with pytest.raises(UserError, match="EigenvalueStop needs gradients of the architecture, and Mine has no method"):
        search(task, [EigenvalueStop()], data=DigitsDataModule())


@pytest.mark.parametrize(
    ("guard", "settings", "sentence"),
    [
        (SkipStop, {"skips": 0}, "skips is 0; it is a number of skip connections, 1 or more"),
        (SkipStop, {"patience": 0}, "patience is 0; it is a number of epochs, 1 or more"),
        (SkipStop, {"not_before": -1}, "not_before is -1; it is a number of epochs, 0 or more"),
        (SkipStop, {"kind": "both"}, "unknown kind 'both'; known: normal, reduce"),
        (EigenvalueStop, {"every": 0}, "every is 0; it is a number of epochs, 1 or more"),
        (EigenvalueStop, {"window": 0}, "window is 0; it is a number of checks, 1 or more"),
        (EigenvalueStop, {"lag": 1.5}, "lag is 1.5; it is a number of checks, 1 or more"),
        (EigenvalueStop, {"not_before": True}, "not_before is True; it is a number of epochs, 0 or more"),
        (EigenvalueStop, {"factor": 1.0}, "factor is 1.0; it is a growth, above 1, for example 1.3"),
        (EigenvalueStop, {"factor": float("nan")}, "factor is nan; it is a growth, above 1, for example 1.3"),
    ],
)
def test_wrong_settings_are_refused(guard, settings, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        guard(**settings)


# -------------------------------------------------------------------------------------------------------- on two ranks


class Split(ScriptedTask):
    """Ranks of different opinion: the second would end in another epoch."""

    def genotype(self):
        from scripted_search import genotype_of

        return genotype_of(2 if self.current_epoch >= 2 + self.global_rank else 0)

    def _check_agreement(self):
        pass


def on_rank(folder):
    torch.set_num_threads(1)
    found = {}
    torch.manual_seed(0)
    guard, task = EigenvalueStop(window=1, lag=1, not_before=0, factor=1e9), DartsTask(tiny_space(), 10)
    settings = {"devices": 2, "strategy": "ddp"}
    trainer = search(task, [guard], max_epochs=2, **settings)
    found["eigenvalues"] = guard.seen
    guard, task = SkipStop(not_before=0), Split()
    trainer = search(task, [guard], **settings)
    found["epochs"], found["chosen"], found["record"] = trainer.current_epoch, task.chosen, guard.record()
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")
    part()


def test_ranks_see_one_eigenvalue_and_decide_together(tmp_path):
    run_twice(__file__, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one == other
    assert [epoch for epoch, _ in one["eigenvalues"]] == [0, 1]
    assert one["epochs"] == 3  # by rank 0
    assert one["chosen"][0] == 2


if __name__ == "__main__":
    on_rank(Path.cwd())
