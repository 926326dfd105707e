import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from scripted_search import ScriptedSpace, ScriptedTask, genotype_of, search
from torch.nn import functional as F

from lightning_automl.callbacks import EigenvalueStop, GenotypeWriter, RunWriter, SkipStop
from lightning_automl.models import ArchitectureCost, DartsSpace, NasBench201Space, load_genotype
from lightning_automl.models.relaxations import PartialChannels
from lightning_automl.results.architecture_search import ArchitectureRecord
from lightning_automl.rundir import UserError
from lightning_automl.tasks import DartsTask

# Lightning 2.6.6 with torch 2.14: Lightning's own code, https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
SIZES = {"in_channels": 1, "image_size": 8, "channels": 2}
SPACES = {
    "DARTS": lambda: DartsSpace(10, cells=3, nodes=2, **SIZES),
    "PC-DARTS": lambda: DartsSpace(10, cells=3, nodes=2, relaxation=PartialChannels(2), **SIZES),
    "NAS-Bench-201": lambda: NasBench201Space(10, cells_per_stage=1, **SIZES),
}


def read(directory):
    return json.loads((directory / "architecture.json").read_text())


@pytest.mark.parametrize("space", SPACES)
def test_the_files_say_how_the_search_went(tmp_path, space):
    torch.manual_seed(0)
    task = DartsTask(SPACES[space](), 10)
    writer = GenotypeWriter(tmp_path)
    search(task, [writer, EigenvalueStop(every=2)], max_epochs=2, limit_val_batches=1)
    found = task.model.genotype()
    assert load_genotype(tmp_path) == found
    assert (tmp_path / "genotype.svg").read_text().startswith("<?xml")
    assert (tmp_path / "genotype.png").read_bytes().startswith(b"\x89PNG")
    record = read(tmp_path)
    assert record["operations"] == list(task.model.operations)
    kinds = [kind for kind in ("normal", "reduce") if found.nodes(kind)]
    assert list(record["edges"]) == kinds
    assert record["chosen"] == {"epoch": 1, "reason": "the last epoch"}
    assert [each["epoch"] for each in record["epochs"]] == [0, 1]
    newest = record["epochs"][1]
    assert newest["genotype"] == found.to_dict()
    assert newest["skips"] == {kind: found.skips(kind) for kind in kinds}
    for kind, strengths in task.model.strengths().items():
        values = strengths.detach().numpy()
        edges = record["edges"][kind]
        assert len(edges["sources"]) == len(edges["targets"]) == len(values)
        assert edges["inputs"] == found.inputs
        assert np.array(newest["strengths"][kind]) == pytest.approx(values, abs=1e-6)
        shares = values / values.sum(1, keepdims=True)
        assert newest["entropy"][kind] == pytest.approx(-(shares * np.log(shares)).sum(1).mean(), rel=1e-5)
        assert newest["entropy"][kind] <= math.log(values.shape[1])
    assert [each["eigenvalue"] is None for each in record["epochs"]] == [True, False]
    for stage in ("train", "arch", "val"):
        assert all(0 <= each[f"{stage}_accuracy"] <= 1 for each in record["epochs"])
    assert [guard["name"] for guard in record["guards"]] == ["EigenvalueStop"]
    # as the report reads it
    known = ArchitectureRecord.read(tmp_path)
    assert not known.doubts
    assert known.newest.strengths.keys() == set(kinds)
    assert known.genotype.normal == found.normal


def test_the_epoch_that_a_guard_has_chosen_is_the_result(tmp_path):
    guard = SkipStop(not_before=0)
    search(ScriptedTask([1, 4]), [guard, GenotypeWriter(tmp_path)])
    assert load_genotype(tmp_path) == genotype_of(1)
    record = read(tmp_path)
    assert record["chosen"] == {"epoch": 0, "reason": guard.record()["sentence"]}
    assert [each["skips"]["normal"] for each in record["epochs"]] == [1, 4]
    assert record["guards"] == [guard.record()]
    assert record["guards"][0]["fired"]


def test_a_space_with_no_more_than_it_needs_leaves_the_rest_out(tmp_path):
    search(ScriptedTask([2, 1]), [GenotypeWriter(tmp_path)], max_epochs=2)
    record = read(tmp_path)
    assert set(record) == {"version", "epochs", "chosen", "guards"}
    assert set(record["epochs"][0]) == {"epoch", "genotype", "skips", "train_accuracy", "arch_accuracy"}
    assert load_genotype(tmp_path) == genotype_of(1)
    assert record["guards"] == []


def test_a_task_of_one_s_own_that_is_no_darts_task_is_written_too(tmp_path):
    class Mine(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ScriptedSpace()

        def training_step(self, batch, batch_idx):
            images, labels = batch["arch"]
            return F.cross_entropy(self.model(images), labels)

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    search(Mine(), [GenotypeWriter(tmp_path)], max_epochs=2)
    assert load_genotype(tmp_path) == genotype_of(0)
    assert [set(each) for each in read(tmp_path)["epochs"]] == [{"epoch", "genotype", "skips"}] * 2


def test_settings_that_guard_are_reported(tmp_path):
    space = DartsSpace(10, cells=3, nodes=1, max_skips=1, operations=("skip_connect", "avg_pool_3x3"), **SIZES)
    search(DartsTask(space, 10, warmup_epochs=1), [GenotypeWriter(tmp_path)], max_epochs=1)
    assert read(tmp_path)["guards"] == [
        {
            "name": "warm-up",
            "settings": {"warmup_epochs": 1},
            "fired": False,
            "sentence": "the alphas stay as they are in the first 1 epoch",
        },
        {
            "name": "max_skips",
            "settings": {"max_skips": 1},
            "fired": False,
            "sentence": "a derived cell has at most 1 skip connection",
        },
    ]


def test_the_cost_of_an_epoch_is_expected_and_that_of_its_genotype(tmp_path):
    space = DartsSpace(10, cells=3, nodes=1, operations=("none", "skip_connect", "sep_conv_3x3"), **SIZES)
    task = DartsTask(space, 10, cost=ArchitectureCost("parameters"))
    search(task, [GenotypeWriter(tmp_path)], max_epochs=1)
    cost = read(tmp_path)["epochs"][0]["cost"]
    assert cost["genotype"] == pytest.approx(task.cost.of_genotype(space, space.genotype()))
    assert cost["expected"] == pytest.approx(task.cost.expected(space).item())
    assert cost["unit"]


# ------------------------------------------------------------------------------------------------ killed and continued


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, epoch, batch=None):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == (self.batch or 0):
            raise Killed


def watchers(directory):
    """As the command line has them."""
    return [SkipStop(not_before=0, patience=2), GenotypeWriter(directory), RunWriter(directory, every_n_steps=1)]


SCRIPT = {"skips": [0, 1, 4, 1, 3, 3]}


@pytest.mark.parametrize(("kill", "batch"), [(1, 0), (2, 1), (4, 0), (5, 1)])
def test_a_continued_search_has_each_epoch_once_as_an_uninterrupted_one(tmp_path, kill, batch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    search(ScriptedTask(**SCRIPT), watchers(whole))
    assert [each["epoch"] for each in read(whole)["epochs"]] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(Killed):
        search(ScriptedTask(**SCRIPT), [*watchers(part), Kill(kill, batch)])
    assert [each["epoch"] for each in read(part)["epochs"]] == list(range(kill))
    assert read(part)["chosen"] == {"epoch": kill - 1, "reason": "the last epoch"}
    assert not (part / "genotype.svg").exists()  # a report draws it
    # a checkpoint within an epoch lacks the batches that its metrics were made of: the steps themselves are exact
    search(ScriptedTask(**SCRIPT), watchers(part), ckpt_path=part / "checkpoints/last.ckpt")
    names = ("train_accuracy", "arch_accuracy")
    epochs = [[{k: v for k, v in each.items() if k not in names} for each in read(d)["epochs"]] for d in (whole, part)]
    assert epochs[0] == epochs[1]
    for name in ("genotype.json", "genotype.svg"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert read(part)["chosen"] == read(whole)["chosen"]
    assert read(part)["guards"] == read(whole)["guards"]


def test_a_kill_between_the_files_and_the_checkpoint_is_mended(tmp_path):
    with pytest.raises(Killed):
        search(ScriptedTask(**SCRIPT), [*watchers(tmp_path), Kill(2)])
    expected = read(tmp_path)
    ahead = json.loads(json.dumps(expected))
    ahead["epochs"].append(ahead["epochs"][-1] | {"epoch": 2})
    (tmp_path / "architecture.json").write_text(json.dumps(ahead))
    (tmp_path / "genotype.json").write_text("{}")
    with pytest.raises(Killed):
        search(ScriptedTask(**SCRIPT), [*watchers(tmp_path), Kill(2)], ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert read(tmp_path) == expected
    assert load_genotype(tmp_path) == genotype_of(1)


def test_a_search_goes_on_with_more_epochs(tmp_path):
    search(ScriptedTask([0, 1, 0]), watchers(tmp_path), max_epochs=2)
    before = read(tmp_path)["epochs"]
    drawn = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, task):
            drawn.extend(tmp_path.glob("genotype.*g"))

    last = tmp_path / "checkpoints/last.ckpt"
    search(ScriptedTask([0, 1, 0]), [Look(), *watchers(tmp_path)], max_epochs=3, ckpt_path=last)
    assert not drawn  # of the genotype that is no more the result
    assert len(list(tmp_path.glob("genotype.*g"))) == 2
    after = read(tmp_path)["epochs"]
    assert after[:2] == before
    assert [each["epoch"] for each in after] == [0, 1, 2]
    assert load_genotype(tmp_path) == genotype_of(0)


def test_files_of_a_first_command_that_was_corrected_are_removed(tmp_path):
    for name in ("genotype.json", "genotype.svg", "genotype.png", "architecture.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(Killed):
        search(ScriptedTask(), [GenotypeWriter(tmp_path), Kill(0)])
    assert not list(tmp_path.iterdir())


def test_drawing_costs_no_time_in_an_epoch(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lightning_automl.plots.write_genotype", lambda genotype, path: drawn.append(path.name))
    search(ScriptedTask(), [GenotypeWriter(tmp_path)], max_epochs=4)
    assert drawn == ["genotype.svg", "genotype.png"]


@pytest.mark.parametrize(
    ("skips", "sentence"),
    [([0, 0, 0], "the genotype of epoch 3, the last epoch"), ([0, 1, 0], "SkipStop ended the search after epoch 2")],
)
def test_the_end_says_which_genotype_it_leaves(tmp_path, caplog, skips, sentence):
    with caplog.at_level("INFO", "lightning_automl"):
        search(ScriptedTask(skips), [GenotypeWriter(tmp_path), SkipStop(1, not_before=0)], max_epochs=3)
    assert [each for each in caplog.messages if each.startswith(f"{tmp_path / 'genotype.json'}: {sentence}")]


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (2, True), (3, False)])
def test_a_search_that_ends_within_its_warm_up_is_warned_of(tmp_path, caplog, epochs, warned):
    search(ScriptedTask(warmup_epochs=2), [GenotypeWriter(tmp_path)], max_epochs=epochs)
    sentence = f"warmup_epochs is 2, and the search ends after epoch {epochs}: its alphas never move"
    assert any(each.startswith(sentence) for each in caplog.messages) == warned


@pytest.mark.parametrize("watcher", [GenotypeWriter, SkipStop])
def test_a_genotype_of_another_form_is_refused_before_an_epoch(tmp_path, watcher):
    class ListSpace(ScriptedSpace):
        def genotype(self):
            return [0, 1]

    task = DartsTask(ListSpace(), 10)
    watching = GenotypeWriter(tmp_path) if watcher is GenotypeWriter else SkipStop()
    with pytest.raises(UserError, match=r"genotype\(\) of ListSpace gives list, where it has to give a lightning"):
        search(task, [watching])
    assert task.global_step == 0
