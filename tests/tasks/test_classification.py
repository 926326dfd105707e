from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import CutMix, MixUp

from lightning_automl.data import ArraysDataModule, DigitsDataModule
from lightning_automl.losses import BinaryCrossEntropy, FocalLoss
from lightning_automl.models import ResNet, TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask, WarmupCosineLR


def network(**arguments):
    return TunableCNN(10, in_channels=1, image_size=8, filters=[8], units=[16], **arguments)


def fit(task, data=None, **arguments):
    seed_everything(0, verbose=False)
    defaults = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults |= dict.fromkeys(quiet, False) | {"num_sanity_val_steps": 0, "accelerator": "cpu"}
    trainer = Trainer(**(defaults | arguments))
    trainer.fit(task, data or DigitsDataModule(batch_size=64))
    return trainer


def test_every_stage_has_every_metric():
    task = ClassificationTask(network(), 10)
    data = DigitsDataModule(batch_size=64)
    trainer = fit(task, data)
    names = ("loss", "accuracy", "balanced_accuracy", "auroc", "f1", "calibration_error")
    assert {f"{stage}_{name}" for stage in ("train", "val") for name in names} == set(trainer.callback_metrics)
    (tested,) = trainer.test(task, data, verbose=False)
    assert {f"test_{name}" for name in names} == set(tested)


def test_the_loss_of_a_split_is_the_mean_over_its_images():
    """Also with class weights and batches of uneven weight, where the mean over batches is another number."""
    data = DigitsDataModule(batch_size=50)
    task = ClassificationTask(network(), 10, class_weights=[1.0, 5.0] * 5)
    trainer = fit(task, data, limit_val_batches=1.0)
    dataset = data.dataset("val")
    task.eval()
    with torch.no_grad():
        logits = task(dataset.images.permute(0, 3, 1, 2))
    weight = torch.tensor([1.0, 5.0] * 5)
    expected = nn.functional.cross_entropy(logits, dataset.labels, weight)
    assert trainer.callback_metrics["val_loss"] == pytest.approx(expected.item(), abs=1e-5)
    accuracy = (logits.argmax(1) == dataset.labels).float().mean().item()
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert task.confusion["val"].sum() == len(dataset)
    assert task.confusion["val"].diag().sum() / len(dataset) == pytest.approx(accuracy, abs=1e-6)


def test_normalisation_is_that_of_the_train_split():
    data = DigitsDataModule(batch_size=64)
    task = ClassificationTask(network(), 10)
    fit(task, data)
    images = data.dataset("train").images.permute(0, 3, 1, 2) / 255
    seen = []
    task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task.eval()(images)
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert seen[0].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_network_may_bring_its_own_normalisation():
    model = ResNet(10, in_channels=1, depth=8, mean=[0.25], std=[0.5])
    task = ClassificationTask(model, 10)
    fit(task)
    assert (task.mean.item(), task.std.item()) == (0.25, 0.5)


def test_uint8_images_are_read_as_shares_of_255():
    task = ClassificationTask(network(), 10).eval()
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(task(images), task(images / 255))


def test_channels_last_changes_the_layout_and_not_the_values():
    torch.manual_seed(0)
    model = network().eval()
    images = torch.rand(4, 1, 8, 8)
    plain = ClassificationTask(model, 10, channels_last=False)(images)
    task = ClassificationTask(model, 10)
    task.model.to(memory_format=task.memory_format)
    torch.testing.assert_close(task(images), plain)


def test_balanced_class_weights_sum_to_the_number_of_images():
    data = DigitsDataModule(batch_size=64)
    task = ClassificationTask(network(), 10, class_weights="balanced")
    fit(task, data)
    assert (task.loss.weight * data.class_counts).sum().item() == pytest.approx(len(data.dataset("train")), rel=1e-5)
    assert torch.allclose(task.loss.weight * data.class_counts, torch.tensor(len(data.dataset("train")) / 10))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), FocalLoss(), BinaryCrossEntropy()])
def test_each_loss_trains_and_gives_probabilities(loss):
    task = ClassificationTask(network(), 10, loss=loss, mix=MixUp(alpha=0.4), class_weights="balanced")
    before = [parameter.clone() for parameter in task.parameters()]
    fit(task)
    assert all((new != old).any() for new, old in zip(task.parameters(), before, strict=True))
    scores = task.probabilities(torch.randn(5, 10))
    torch.testing.assert_close(scores.sum(1), torch.ones(5))


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixing_knows_the_number_of_classes_and_leaves_validation_alone(mix):
    given = mix(alpha=1.0)
    task = ClassificationTask(network(), 10, mix=given)
    assert given.num_classes == 10
    seen = {"train": [], "val": []}
    plain = task.loss.forward
    task.loss.forward = lambda logits, targets: (
        seen["train" if task.training else "val"].append(targets.ndim),
        plain(logits, targets),
    )[1]
    fit(task)
    assert set(seen["train"]) == {2}
    assert set(seen["val"]) == {1}


def test_norms_and_biases_are_exempt_from_weight_decay_by_a_switch():
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    task = ClassificationTask(network(), 10, optimizer, decay_norms_and_biases=False)
    decayed, exempt = task.optimizer(task.parameter_groups()).param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in exempt["params"])
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(task.parameters()))


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1),
        WarmupCosineLR,
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1),
    ],
)
def test_schedules_know_the_length_of_the_run(scheduler):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = ClassificationTask(network(), 10, partial(torch.optim.SGD, lr=0.1), scheduler)
    trainer = fit(task, max_epochs=4, callbacks=[Watch()])
    schedule = trainer.lr_scheduler_configs[0]
    if scheduler is WarmupCosineLR or scheduler.func is torch.optim.lr_scheduler.OneCycleLR:
        assert schedule.interval == "step"
        assert len(rates) == 12
        assert rates[-1] < 1e-3 * max(rates)
        assert rates[-2] > 1e-3 * max(rates)
    else:
        assert rates[::3] == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_a_plateau_schedule_watches_its_metric():
    from lightning.pytorch.cli import ReduceLROnPlateau

    task = ClassificationTask(network(), 10, scheduler=partial(ReduceLROnPlateau, monitor="val_loss"))
    trainer = fit(task)
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"


class CountItems(TorchDispatchMode):
    """Counts the calls that wait for the device to give a number to Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}])
def test_twenty_training_steps_never_wait_for_the_device(optimizer):
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, *_):
            self.mode = CountItems()
            self.mode.__enter__()

        def on_train_batch_end(self, *_):
            self.mode.__exit__(None, None, None)
            counts.append(self.mode.count)

    task = ClassificationTask(network(fc_dropout=0.3), 10, scheduler=WarmupCosineLR, **optimizer)
    data = DigitsDataModule(batch_size=32, base_augment="crop_flip")
    fit(task, data, limit_train_batches=20, callbacks=[Count()])
    assert counts == [0] * 20


def test_the_counter_of_waits_counts():
    with CountItems() as mode:
        torch.ones(1).item()
    assert mode.count == 1


class TwoHeads(nn.Module):
    """Gives further logits in training, as networks with auxiliary heads do."""

    def __init__(self, others=1):
        super().__init__()
        self.first = nn.Linear(64, 10)
        self.others = nn.ModuleList(nn.Linear(64, 10) for _ in range(others))

    def forward(self, images):
        features = images.flatten(1)
        logits = self.first(features)
        return (logits, *(head(features) for head in self.others)) if self.training else logits


@pytest.mark.parametrize("others", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_losses_of_auxiliary_logits_are_added_with_their_weight(others, mixed):
    model = TwoHeads(others)
    mix = MixUp(alpha=1.0) if mixed else None
    task = ClassificationTask(model, 10, auxiliary_weight=0.3, mix=mix, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    torch.manual_seed(1)
    loss = task.step((images, labels), "train")
    torch.manual_seed(1)
    targets = labels
    if mixed:
        images, targets = mix(images, labels)
    features = images.flatten(1)
    losses = [task.loss(head(features), targets) for head in (model.first, *model.others)]
    torch.testing.assert_close(loss, losses[0] + 0.3 * sum(losses[1:]))
    logits, _, kept = task.outputs("train").compute()
    torch.testing.assert_close(logits, model.first(features))
    torch.testing.assert_close(kept, losses[0])


def test_a_network_with_an_auxiliary_head_trains_and_is_validated_by_its_logits_alone():
    trained = ClassificationTask(TwoHeads(), 10)
    before = [parameter.clone() for parameter in trained.parameters()]
    trainer = fit(trained)
    assert all((new != old).any() for new, old in zip(trained.parameters(), before, strict=True))
    assert {"train_loss", "val_loss"} <= trainer.callback_metrics.keys()
    without = ClassificationTask(TwoHeads(), 10, auxiliary_weight=0.0)
    head = without.model.others[0]
    kept = head.weight.clone()
    optimizer = partial(torch.optim.SGD, lr=0.1)
    without.optimizer = optimizer
    fit(without)
    assert torch.equal(head.weight, kept)


def test_a_negative_weight_of_auxiliary_logits_is_refused():
    with pytest.raises(UserError, match="auxiliary_weight is -1"):
        ClassificationTask(network(), 10, auxiliary_weight=-1)


class MyTask(ClassificationTask):
    """A subclass built in Python, with a class among its arguments."""

    def __init__(self, *arguments, kind=nn.ReLU, **keywords):
        super().__init__(*arguments, **keywords)
        self.extra = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_of_a_subclass_loads_without_pickle(tmp_path, ema):
    task = MyTask(network(), 10, class_weights="balanced", loss=FocalLoss())
    trainer = fit(task, callbacks=[EMAWeightAveraging(decay=0.9)] if ema else [])
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    built = {"model": network(), "num_classes": 10, "class_weights": "balanced", "loss": FocalLoss()}
    loaded = MyTask.load_from_checkpoint(tmp_path / "a.ckpt", **built, weights_only=True)
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {"mean", "std", "loss.weight", "extra"} < set(kept)
    assert all(torch.equal(value, kept[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.mean, task.mean)


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    trainer = fit(ClassificationTask(network(), 10))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    other = ResNet(10, in_channels=1, depth=8)
    with pytest.raises(UserError, match=r"the checkpoint is of another network: tensors \d+ missing \(model"):
        ClassificationTask.load_from_checkpoint(tmp_path / "a.ckpt", model=other, num_classes=10, weights_only=True)


def test_averaged_weights_are_those_that_are_validated_and_kept(tmp_path):
    task = ClassificationTask(network(), 10, partial(torch.optim.SGD, lr=0.5))
    average = EMAWeightAveraging(decay=0.5)
    trainer = fit(task, callbacks=[average])
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    averaged = average._average_model.module.state_dict()
    assert all(torch.equal(kept[name], averaged[name]) for name, _ in task.named_parameters())


def test_weights_need_a_loss_that_takes_them():
    task = ClassificationTask(network(), 10, loss=nn.functional.cross_entropy, class_weights="balanced")
    with pytest.raises(UserError, match="the loss function has no 'weight'"):
        fit(task)


@pytest.mark.slow
def test_the_network_can_be_compiled():
    task = ClassificationTask(network(), 10, compile=True)
    trainer = fit(task, max_epochs=2)
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert set(task.state_dict()) == set(ClassificationTask(network(), 10).state_dict())


def test_averaging_starts_from_the_normalisation_of_the_data(make_npz, tmp_path):
    data = ArraysDataModule(str(make_npz(tmp_path / "a.npz", channels=3)), batch_size=8)
    model = TunableCNN(3, in_channels=3, image_size=8, filters=[4], units=[8])
    task = ClassificationTask(model, 3, class_weights="balanced")
    average = EMAWeightAveraging(decay=0.9)
    fit(task, data, callbacks=[average])
    averaged = average._average_model.module
    assert torch.equal(averaged.mean.flatten(), data.mean)
    assert torch.equal(averaged.loss.weight, task.loss.weight)
