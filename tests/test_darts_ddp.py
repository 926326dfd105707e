"""The two ranks of these tests run this file as a script; all cases in one start."""

import os
from functools import partial
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from two_ranks import part, run_twice

from lightning_automl.data import DigitsDataModule
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.relaxations import AuxiliarySkip, GumbelSoftmax, PartialChannels, SoftmaxRelaxation
from lightning_automl.models.supernet import DartsSpace
from lightning_automl.tasks import DartsTask

pytestmark = pytest.mark.slow
RELAXATIONS = {
    "softmax": SoftmaxRelaxation,
    "partial": partial(PartialChannels, 2),
    "gumbel": GumbelSoftmax,
    "auxiliary": AuxiliarySkip,
}
#: Relaxation, norm, second order; each is to give what one process does with the joint batch.
EQUAL = list(product(RELAXATIONS, ("group", "sync_batch"), (False, True)))
#: Group norm of what is pooled over the empty margin of an image divides by next to nothing: one process differs from
#: itself by 3e-6 in second order when the images of a batch are put in another order.
OPERATIONS = {
    "group": ("none", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"),
    "sync_batch": ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"),
    "batch": ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"),
}


class Seen(Callback):
    """The images of the search batches."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.batches.append(batch["arch"][0].flatten(1).clone())


class Disagree(Callback):
    """Lets one rank go its own way."""

    def on_train_epoch_end(self, trainer, task):
        if trainer.global_rank == 1:
            for alpha in task.model.alphas():
                alpha.data.neg_()


class Break(Callback):
    """Gives one rank an image that is none."""

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 1:
            batch["arch"][0][0] = float("nan")


def search(ranks, relaxation="softmax", norm="group", unrolled=False, callbacks=(), accumulate=1):
    """Search for one epoch, with 16 images of each stream a step over all ranks."""
    seed_everything(3, verbose=False)
    torch.manual_seed(0)
    space = DartsSpace(
        num_classes=10,
        in_channels=1,
        channels=4,
        cells=3,
        nodes=2,
        operations=OPERATIONS[norm],
        relaxation=RELAXATIONS[relaxation](),
        norm=norm,
    )
    task = DartsTask(
        space,
        num_classes=10,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4),
        arch_optimizer=partial(torch.optim.Adam, lr=0.05),
        unrolled=unrolled,
        gradient_clip=0.5,
        accumulate=accumulate,
    )
    data = DigitsDataModule(batch_size=16 // ranks // accumulate, arch_fraction=0.5)
    data.stream_rows = {stream: rows[:48] for stream, rows in data.stream_rows.items()}
    seen = Seen()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="32-true" if norm == "batch" else "64-true",
        limit_val_batches=1 if norm == "batch" else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, *callbacks],
    )
    try:
        trainer.fit(task, data)
    except RuntimeError as error:
        return str(error)
    return {"state": space.state_dict(), "genotype": task.genotype().to_dict(), "seen": seen.batches}


def run(ranks):
    """All cases on this rank."""
    results = {case: search(ranks, *case) for case in EQUAL}
    results["accumulate"] = search(ranks, accumulate=2)
    results["batch norm"] = search(ranks, norm="batch")
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks under gloo, started as torchrun starts them, found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_twice(__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_close(one, other):
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        assert (value - other["state"][name]).abs().max() <= 1e-8, name
    assert one["genotype"] == other["genotype"]


def alphas(result):
    return torch.cat([value.flatten() for name, value in result["state"].items() if "architecture" in name])


@pytest.mark.parametrize("case", EQUAL, ids=str)
def test_two_ranks_search_what_one_process_does_with_the_joint_batch(ranks, case):
    alone = search(1, *case)
    for rank in ranks:
        assert_close(rank[case], alone)
    assert torch.equal(alphas(ranks[0][case]), alphas(ranks[1][case]))
    assert alphas(alone).abs().max() > 0.05  # they have moved


def test_so_they_do_with_several_batches_a_step(ranks):
    alone = search(1)
    for rank in ranks:
        assert_close(rank["accumulate"], alone)


def test_with_plain_batch_norm_all_ranks_hold_one_genotype(ranks):
    one, other = (rank["batch norm"] for rank in ranks)
    assert all(
        torch.equal(value, other["state"][name]) for name, value in one["state"].items() if "running" not in name
    )
    assert one["genotype"] == other["genotype"]
    alone = search(1, norm="batch")
    assert not torch.equal(alphas(alone), alphas(one))  # another search, and a valid one
    Genotype.from_dict(one["genotype"])


def test_the_search_batch_is_split_and_not_repeated(ranks):
    case = EQUAL[0]
    joint = search(1, *case)["seen"]
    assert len(joint) == len(ranks[0][case]["seen"]) == 3
    for step, images in enumerate(joint):
        parts = [rank[case]["seen"][step] for rank in ranks]
        assert [len(part) for part in parts] == [8, 8]
        assert sorted(map(bytes, torch.cat(parts).numpy())) == sorted(map(bytes, images.numpy()))


def test_ranks_with_different_genotypes_are_an_error_on_all(ranks):
    for rank in ranks:
        assert "after epoch 0 the processes have 2 different genotypes" in rank["disagree"]


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(ranks):
    for rank in ranks:
        assert "arch_loss is not finite at step 1" in rank["break"]


if __name__ == "__main__":
    results = run(2)
    results["disagree"] = search(2, callbacks=[Disagree()])
    results["break"] = search(2, callbacks=[Break()])
    torch.save(results, f"rank{os.environ['RANK']}.pt")
    part()
