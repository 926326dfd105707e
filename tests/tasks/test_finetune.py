import copy
import logging
from contextlib import nullcontext

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.layers import EvoNorm2dB0
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import OneCycleLR

from lightning_automl.adapters import ADAPTERS, ConvAdapterConfig, LoraConfig, load_adapter
from lightning_automl.adapters.low_rank import LowRankConfig
from lightning_automl.callbacks import HyperparameterSchedule
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import ResNet, without_loading
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask, FinetuneTask, WarmupCosineLR

HEAD = {"model.linear.weight", "model.linear.bias"}
DATA = {"mean", "std"}

#: Arguments of the task for every way to fine-tune; the adapters are those of the registry.
WAYS = {
    "head": {},
    "last block": {"unfreeze": 1},
    "all": {"unfreeze": "all"},
    "gradually": {"unfreeze": "all", "unfreeze_every": 1},
    "head, norms reestimated": {"batch_norm": "reestimated"},
    "head, norms trained": {"batch_norm": "trained"},
    "low rank": {"adapter": LowRankConfig(rank=3)},
    **{name: {"adapter": ADAPTERS[name]()} for name in ADAPTERS if name != "low_rank"},
    "lora, norms trained": {"adapter": LoraConfig(r=2), "batch_norm": "trained"},
    "lora, norms reestimated": {"adapter": LoraConfig(r=2), "batch_norm": "reestimated"},
    "conv adapter, calibrated": {"adapter": ConvAdapterConfig(norm="layer", norm_at="block", compression=4)},
}
ways = pytest.mark.parametrize("way", WAYS)


def network(seed=0):
    torch.manual_seed(seed)
    made = ResNet(10, 1, depth=8, width=8)
    for module in made.modules():  # statistics that are not those of a fresh network
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.9, 1.1)
    return made


def task_of(way, seed=0, **arguments):
    return FinetuneTask(network(seed), 10, **{**copy.deepcopy(WAYS[way]), **arguments})


def trainer(epochs=1, batches=3, **arguments):
    return Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **arguments,
    )


def fit(task, epochs=1, batches=3, **arguments):
    made = trainer(epochs, batches, **arguments)
    made.fit(task, DigitsDataModule(batch_size=32))
    return made


def copied(state):
    return {name: value.clone() for name, value in state.items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@ways
def test_ten_steps_move_nothing_that_is_frozen_and_the_head(way):
    task = task_of(way)
    before = copied(task.whole_state())
    fit(task, batches=10)
    changed = moved(before, task.whole_state())
    assert not changed & task.frozen
    trained = {name for name, each in task.named_parameters() if each.requires_grad}
    assert not trained & task.frozen
    assert [name for name in changed if name.endswith("linear.weight") or ".linear." in name]
    if way in ("head", "last block"):
        first = "model.layer3.0." if way == "last block" else "model.linear."
        assert changed - DATA == {name for name in before if name.startswith((first, "model.linear."))} - {
            name for name in before if "running" in name or "tracked" in name
        }
    if "trained" not in way and "reestimated" not in way and way not in ("all", "gradually"):
        assert not [name for name in changed if "running_" in name or "num_batches" in name]


@ways
def test_a_checkpoint_has_only_what_is_trained_and_loads_into_the_same_base(way, tmp_path):
    task = task_of(way)
    made = fit(task)
    path = tmp_path / "a.ckpt"
    made.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert not state.keys() & task.frozen
    assert state.keys() | task.frozen == task.whole_state().keys()
    other = task_of(way)
    result = trainer().validate(other, DigitsDataModule(), ckpt_path=path, weights_only=True, verbose=False)
    assert moved(task.whole_state(), other.whole_state()) == set()
    expected = trainer().validate(task, DigitsDataModule(), verbose=False)
    assert result == [pytest.approx(expected[0], rel=1e-5)]


@ways
def test_another_base_is_refused_and_the_right_one_can_be_read_from_its_file(way, tmp_path):
    task = task_of(way)
    task.save_base(tmp_path / "base.safetensors")
    made = fit(task)
    made.save_checkpoint(tmp_path / "a.ckpt")
    arguments = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True, "verbose": False}
    if task.frozen:
        with pytest.raises(UserError, match="the checkpoint belongs to other frozen weights than the network has"):
            trainer().validate(task_of(way, seed=1), DigitsDataModule(), **arguments)
    with without_loading():
        other = task_of(way, seed=1)
    other.load_base(tmp_path / "base.safetensors")
    trainer().validate(other, DigitsDataModule(), **arguments)
    assert moved(task.state_dict(), other.state_dict()) == set()
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(task.eval()(images), other.eval()(images))


@ways
def test_averaged_copies_keep_what_is_frozen(way):
    task = task_of(way)
    before = copied({name: task.whole_state()[name] for name in task.frozen})
    average = EMAWeightAveraging(decay=0.7)
    fit(task, batches=8, callbacks=[average])
    assert moved(before, task.whole_state()) == set()  # the average has taken their place by now


@ways
def test_what_is_deployed_gives_the_same_and_has_all_tensors(way):
    task = task_of(way)
    fit(task)
    task.eval()
    deployed = task.deployed()
    assert type(deployed) is ClassificationTask
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), task(images), atol=1e-5, rtol=1e-5)
    if way.startswith("lora"):
        assert deployed.model.state_dict().keys() == network().state_dict().keys()
        assert [type(each) for each in deployed.model.modules()] == [type(each) for each in network().modules()]


@pytest.mark.parametrize("name", [way for way in WAYS if hasattr(WAYS[way].get("adapter"), "peft_type")])
def test_the_adapter_of_a_checkpoint_makes_the_same_network_from_its_base(name, tmp_path):
    task = task_of(name)
    made = fit(task)
    made.save_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter += 1  # what is trained later is not what the checkpoint has
    task.save_adapter(tmp_path / "adapter", torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    loaded = load_adapter(network(), tmp_path / "adapter").eval()
    other = task_of(name)
    trainer().validate(other, DigitsDataModule(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(other.normalized(images)), other.eval()(images), atol=1e-5, rtol=1e-5)


def test_learning_rates_are_those_of_the_parts():
    optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    config = LoraConfig(r=2, scale="learnable")
    task = task_of("lora", adapter=config, optimizer=optimizer, adapter_lr=0.01, scale_lr=0.5, head_lr=0.2)
    rates = {name: group["lr"] for group in task.configure_optimizers().param_groups for name in names_of(task, group)}
    for name, rate in rates.items():
        kind = 0.2 if "linear" in name else 0.5 if "lora_scale" in name else 0.01
        assert rate == kind, name
    assert len(set(rates.values())) == 3


def test_a_schedule_of_the_rate_keeps_the_ratios_of_the_parts():
    segments = [{"from_epoch": 0, "values": {"lr": 0.1}}, {"from_epoch": 1, "values": {"lr": 0.3}}]
    optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    task = task_of("last block", optimizer=optimizer, head_lr=0.2)
    made = fit(task, epochs=2, callbacks=[HyperparameterSchedule(segments)])
    rates = {name: group["lr"] for group in made.optimizers[0].param_groups for name in names_of(task, group)}
    assert rates["model.linear.weight"] == pytest.approx(0.6)
    assert rates["model.layer3.0.conv1.weight"] == pytest.approx(0.3)


def names_of(task, group):
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_rates_decay_from_block_to_block():
    optimizer = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    task = task_of("all", optimizer=optimizer, layer_decay=0.5)
    rates = {name: group["lr"] for group in task.configure_optimizers().param_groups for name in names_of(task, group)}
    places = ("model.conv1", "model.layer1.0", "model.layer2.0", "model.layer3.0", "model.linear")
    for place, rate in zip(places, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), strict=True):
        assert {rates[name] for name in rates if name.startswith(f"{place}.")} == {rate}
    adapted = task_of("lora", optimizer=optimizer, layer_decay=0.5)
    rates = {
        name: group["lr"] for group in adapted.configure_optimizers().param_groups for name in names_of(adapted, group)
    }
    assert {rate for name, rate in rates.items() if "layer2.0" in name} == {1 / 4}


@pytest.mark.parametrize("scheme", ["conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential"])
def test_rates_of_conv_adapters_are_those_of_their_blocks(scheme):
    optimizer = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    task = task_of("head", adapter=ConvAdapterConfig(scheme), optimizer=optimizer, layer_decay=0.5)
    rates = {name: group["lr"] for group in task.configure_optimizers().param_groups for name in names_of(task, group)}
    for place, rate in (("layer1.0.", 1 / 8), ("layer2.0.", 1 / 4), ("layer3.0.", 1 / 2)):
        assert {value for name, value in rates.items() if place in name} == {rate}


class Normed(nn.Module):
    """A network whose norm is to be found among the buffers that move by themselves."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = norm
        self.second = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.linear = nn.Linear(8, 10)

    def forward(self, images):
        return self.linear(self.second(self.norm(self.conv(images)).relu()).mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, track_running_stats=True), EvoNorm2dB0(8), nn.BatchNorm2d(8)])
def test_buffers_of_all_kinds_of_norms_stay_when_they_are_frozen(norm):
    task = FinetuneTask(Normed(norm), 10)
    before = copied(task.whole_state())
    fit(task, batches=5)
    assert moved(before, task.whole_state()) - DATA == {"model.linear.weight", "model.linear.bias"}


class Counting(Normed):
    """Changes a buffer in each pass, in whatever mode."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images):
        self.passes += 1
        return super().forward(images)


def test_a_frozen_buffer_that_changes_by_itself_ends_the_run():
    with pytest.raises(RuntimeError, match=r"frozen buffers have changed in training: model.passes; a module"):
        fit(FinetuneTask(Counting(), 10))


def test_scales_have_no_weight_decay_where_norms_have_none():
    config = LoraConfig(r=2, scale="learnable")
    task = task_of("lora", adapter=config, decay_norms_and_biases=False)
    for group in task.configure_optimizers().param_groups:
        small = {"lora_scale" in name or name.endswith("bias") for name in names_of(task, group)}
        assert small == {group["weight_decay"] == 0}


@pytest.mark.parametrize(("scheduler", "refused"), [(OneCycleLR, True), (WarmupCosineLR, False)])
def test_a_schedule_with_one_rate_for_all_is_refused_where_there_are_several(scheduler, refused):
    schedule = lambda optimizer, total_steps: scheduler(optimizer, total_steps=total_steps, **extra)  # noqa: E731
    extra = {"max_lr": 0.1} if scheduler is OneCycleLR else {}
    expected = pytest.raises(UserError, match="OneCycleLR gives all parameters one learning rate") if refused else None
    with expected or nullcontext():
        fit(task_of("head", scheduler=schedule, unfreeze=1, head_lr=0.02))
    fit(task_of("head", scheduler=schedule))


def test_blocks_are_unfrozen_one_by_one_from_the_last():
    task = task_of("gradually")
    seen = []

    def state():
        return copied(task.whole_state())

    before = [state()]
    original = task.on_train_epoch_end

    def at_end():
        original()
        after = state()
        seen.append(moved(before[0], after) - DATA)
        before[0] = after

    task.on_train_epoch_end = at_end
    fit(task, epochs=5, batches=2)
    places = ("model.linear.", "model.layer3.", "model.layer2.", "model.layer1.", "model.")
    for number, changed in enumerate(seen):
        expected = {name for name in before[0] if name.startswith(places[: number + 1])}
        assert changed == expected, f"epoch {number}"


def test_statistics_taken_anew_are_averages_over_the_train_split():
    task = task_of("head, norms reestimated")
    data = DigitsDataModule(batch_size=32)
    trainer(batches=1).fit(task, data)
    first = network()
    images = torch.cat([images for images, _ in data.eval_dataloader("train")])
    with torch.no_grad():
        means = [first.conv1(task.normalized(part)).mean((0, 2, 3)) for part in images.split(32)]
    torch.testing.assert_close(task.model.bn1.running_mean, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "sync_batch"])
def test_statistics_are_not_taken_anew_by_norms_that_wait_for_other_processes(norm):
    task = task_of("head, norms reestimated")
    task.model = ResNet(10, 1, depth=8, width=8, norm=norm)
    if norm == "batch":
        task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
    with pytest.raises(UserError, match="leave out sync_batchnorm"):
        fit(task)


def test_what_is_trained_is_told_at_the_start_and_what_has_no_effect(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_automl"):
        fit(task_of("head"))
        fit(task_of("lora", scale_lr=0.1))
        fit(task_of("gradually", unfreeze_every=3))
    text = "\n".join(caplog.messages)
    assert "trained: the head: 330 of 19,074 parameters (1.73%); batch norms frozen" in text
    assert "scale_lr has no effect: the adapter has no learnable scale" in text
    assert "unfreeze_every is 3 and the run has 1 epochs: the head alone is trained" in text
    assert "layer2.0.conv1  conv" in text  # in the first layers rank 8 would not save


def test_a_network_for_other_classes_gets_a_head_with_an_adapter():
    task = FinetuneTask(network(), 4, adapter=LoraConfig(r=2))
    assert task.eval()(torch.rand(2, 1, 8, 8)).shape == (2, 4)


LORA = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"unfreeze": "some"}, "unfreeze is 'some'; known: head, all, or a number of blocks"),
        ({"unfreeze": True}, "unfreeze is True; known: head, all"),
        ({"unfreeze": 4}, "unfreeze is 4, but the network has 3 blocks; give a number from 1 to 3"),
        ({"unfreeze": 0}, "unfreeze is 0, but the network has 3 blocks"),
        ({"unfreeze_every": 2}, "unfreeze_every is given, but only the head is trained"),
        ({"unfreeze": "all", "unfreeze_every": 0}, "unfreeze_every is 0; it is a number of epochs, 1 or more"),
        ({"adapter": LORA, "unfreeze": "all"}, "unfreeze is 'all', but with an adapter the network itself stays"),
        ({"batch_norm": "off"}, "unknown batch_norm 'off'; known: frozen, reestimated, trained"),
        ({"layer_decay": 0.0}, r"layer_decay is 0.0; it is in \(0, 1\]"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"head_lr": -1.0}, "head_lr is -1.0; it is a number, 0 or more"),
        ({"adapter_lr": 0.1}, "adapter_lr is given, but no adapter; leave it out"),
        ({"scale_lr": 0.1}, "scale_lr is given, but no adapter; leave it out"),
        (
            {"adapter": peft.LoHaConfig()},
            "adapter is a LoHaConfig, .*; known: LoraConfig, ConvAdapterConfig, LowRankConfig",
        ),
        (
            {"adapter": LoraConfig(target_modules=["linear"])},
            "'linear' is trained in full, as the head",
        ),
        ({"num_classes": 3}, "the network does not give 3 logits; build it with as many classes"),
    ],
)
def test_contradictions_are_told_in_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        FinetuneTask(network(), **{"num_classes": 10, **arguments})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "base.safetensors is missing, which holds the frozen rest of the network"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot be read .* it is damaged, restore it"),
        (
            lambda path: FinetuneTask(ResNet(10, 1, depth=8, width=4), 10).save_base(path),
            "is of another network: it lacks model.bn1.bias, .*give the config that the run was started with",
        ),
    ],
)
def test_a_spoilt_file_of_the_frozen_rest_is_told(tmp_path, spoil, sentence):
    path = tmp_path / "base.safetensors"
    task = task_of("head")
    task.save_base(path)
    spoil(path)
    with pytest.raises(UserError, match=sentence):
        task.load_base(path)
