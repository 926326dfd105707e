import json
import logging
from functools import partial

import numpy as np
import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from scipy import stats
from torch import nn

from lightning_automl.adapters import ADAPTERS, LoraConfig, add_adapter, merge_adapter
from lightning_automl.callbacks import AdapterStatistics, RunWriter, adapter_report
from lightning_automl.callbacks.adapter_statistics import BIN_WIDTH, BINS, moments
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import ResNet
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask

QUIET = {
    **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
    **{"accelerator": "cpu", "num_sanity_val_steps": 0, "limit_train_batches": 3, "limit_val_batches": 2},
}


def network(config=None):
    torch.manual_seed(0)
    return add_adapter(ResNet(10, in_channels=1, depth=8, width=16), config or LoraConfig(r=2))


def moved(model, std=0.1):
    """The same with adapters that have learned something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn_like(parameter)
    return model


def task(model, lr=1e-3):
    return ClassificationTask(model, 10, optimizer=partial(torch.optim.SGD, lr=lr))


def fit(model, *callbacks, epochs=1, lr=1e-3, **arguments):
    torch.manual_seed(1)
    writes = any(isinstance(each, RunWriter) for each in callbacks)
    arguments = {**QUIET, "enable_checkpointing": writes, **arguments}
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **arguments)
    trainer.fit(task(model, lr), DigitsDataModule())
    return trainer


def test_a_rectified_normal_has_the_moments_that_theory_gives():
    found = moments(torch.randn(200_000).relu())
    assert found["zero_fraction"] == pytest.approx(0.5, abs=0.02)
    assert found["mean"] == pytest.approx(0.39894, abs=0.01)
    assert found["std"] == pytest.approx(0.58382, abs=0.01)
    assert found["skewness"] == pytest.approx(1.64056, abs=0.1)


def test_moments_are_scipys():
    values = torch.randn(3, 4, 50) ** 3 + 1
    found, flat = moments(values), values.double().numpy().ravel()
    assert found["std"] == pytest.approx(flat.std())
    assert found["skewness"] == pytest.approx(stats.skew(flat))
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(flat))


def test_the_histogram_is_numpys_in_standard_deviations():
    values = torch.randn(5000) * 3 + 1
    values[:7] = torch.tensor([1e3, 1e3, -1e3, 0, 0, 0, 0])
    found = moments(values)["histogram"]
    edges = (np.arange(BINS + 1) - BINS / 2) * BIN_WIDTH
    flat = values.double().numpy()
    expected = np.histogram(flat / flat.std(), edges)[0]
    assert found["shares"] == pytest.approx((expected / 5000).tolist(), abs=2e-6)
    assert (found["below"], found["above"]) == pytest.approx((1 / 5000, 2 / 5000), abs=2e-6)


@pytest.mark.parametrize("values", [torch.zeros(9), torch.full((9,), 2.0), torch.tensor([1.0, float("nan")])], ids=str)
def test_moments_of_what_does_not_vary_or_is_not_finite_are_told_as_such(values):
    found = moments(values)
    assert np.isnan(found["skewness"])
    assert found["zero_fraction"] == float((values == 0).all())


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_reported_on_and_is_zero_at_the_start(name):
    model = network(ADAPTERS[name]())
    rows = adapter_report(model, torch.rand(4, 1, 8, 8))
    assert rows
    assert {row["ratio"] for row in rows} == {0.0}
    assert {row["adapter"]["zero_fraction"] for row in rows} == {1.0}
    assert all(row["block"]["std"] > 0 for row in rows)
    rows = adapter_report(moved(model), torch.rand(4, 1, 8, 8))
    assert all(row["ratio"] > 0 and row["adapter"]["std"] > 0 and row["scale"] is not None for row in rows)


def test_block_and_adapter_by_hand():
    config = peft.LoraConfig(r=1, lora_alpha=8, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), config)
    layer = model.base_model.model[0]
    images = torch.randn(40, 6)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        block = images @ layer.base_layer.weight.T + layer.base_layer.bias
        adapter = 8 * images @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    (row,) = adapter_report(model, (images, torch.zeros(40)))
    assert (row["layer"], row["kind"], row["scale"]) == ("0", "Linear", 8)
    for part, expected in (("block", block), ("adapter", adapter)):
        for name in ("zero_fraction", "mean", "std", "skewness", "kurtosis"):
            assert row[part][name] == pytest.approx(moments(expected)[name], rel=1e-4, abs=1e-5), (part, name)
    assert row["ratio"] == pytest.approx(float(adapter.std() / block.std()), rel=1e-5)
    assert row["gradient_norm"] is None
    model(images).sum().backward()
    gradients = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    expected = sum(float(each.square().sum()) for each in gradients) ** 0.5
    assert adapter_report(model, images)[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_report_leaves_everything_as_it_was():
    model = moved(network())
    model.train()
    model.base_model.model.bn1.eval()
    model(torch.rand(4, 1, 8, 8)).sum().backward()

    def state():
        tensors = {f"gradient of {name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
        tensors |= {name: each for name, each in model.state_dict().items()} | {"random": torch.get_rng_state()}
        hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks), each.training) for each in model.modules()]
        trains = [each.requires_grad for each in model.parameters()]
        return {name: each.clone() for name, each in tensors.items()}, hooks, trains, torch.is_grad_enabled()

    before = state()
    adapter_report(model, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    after = state()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0].keys() | after[0].keys())
    assert before[1:] == after[1:]


class Tokens(nn.Module):
    """Sees the rows of an image as tokens."""

    image_size = 8
    in_channels = 1

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = self.stem(x[:, 0])
        x = nn.functional.linear(x, self.inner.weight, self.inner.bias)  # as torchvision's Swin transformers do
        return self.head(self.attention(x).flatten(1))


def test_a_layer_whose_weight_is_used_without_a_call_is_met_too():
    torch.manual_seed(0)
    model = moved(add_adapter(Tokens(), LoraConfig(r=1, target_modules=["inner"])))
    images = torch.rand(8, 1, 8, 8)
    layer = model.base_model.model.inner
    (row,) = adapter_report(model, images)
    x = model.base_model.model.stem(images[:, 0])
    expected = moments(x @ (layer.weight - layer.base_layer.weight).T)["std"]
    assert row["adapter"]["std"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_an_adapter_that_its_network_passes_by_has_no_effect():
    model = moved(peft.get_peft_model(Tokens(), peft.LoraConfig(r=1, target_modules=["inner"])))
    assert adapter_report(model, torch.rand(8, 1, 8, 8))[0]["ratio"] == 0


def test_a_block_that_changes_its_input_in_place_is_seen_with_the_right_one():
    model = moved(network(LoraConfig(r=2, target_modules=["layer1.0.conv1"])))
    layer = model.base_model.model.layer1[0].conv1
    images = torch.rand(4, 1, 8, 8)
    before = adapter_report(model, images)[0]["block"]["std"]
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    assert adapter_report(model, images)[0]["block"]["std"] == pytest.approx(2 * before, rel=1e-5)


def test_attention_is_one_layer_with_the_adapters_within_it():
    torch.manual_seed(0)
    model = add_adapter(Tokens().eval(), LoraConfig(r=2, target_modules="attention"))
    images = torch.rand(6, 1, 8, 8)
    (row,) = adapter_report(model, images)
    assert (row["layer"], row["kind"], row["ratio"]) == ("attention.self_attn", "MultiheadAttention", 0)
    plain = model.base_model.model
    layer = plain.attention.self_attn
    with torch.no_grad():
        x = plain.inner(plain.stem(images[:, 0]))
        base = layer(x, x, x)[0]
        layer.base_layer.out_proj.lora_B["default"].weight.normal_()
        output = layer(x, x, x)[0]
    (row,) = adapter_report(model, images)
    assert row["ratio"] == pytest.approx(float((output - base).std() / base.std()), rel=1e-4)


def test_a_compiled_network_is_reported_on_all_the_same():
    model = moved(network())
    images = torch.rand(4, 1, 8, 8)
    expected = adapter_report(model, images)
    model.eval().compile(backend="eager")
    model(images)
    assert adapter_report(model, images) == expected


def test_without_an_adapter_there_is_nothing_to_report_on():
    with pytest.raises(UserError, match="ResNet has no adapter"):
        adapter_report(ResNet(10, in_channels=1, depth=8), torch.rand(1, 1, 8, 8))
    with pytest.raises(UserError, match=r"AdapterStatistics watches adapters.*take AdapterStatistics out"):
        fit(ResNet(10, in_channels=1, depth=8, width=4), AdapterStatistics())
    with pytest.raises(UserError, match="images is 0"):
        AdapterStatistics(images=0)


def test_adapters_that_are_merged_or_switched_off_are_not_compared():
    model = network()
    with model.disable_adapter(), pytest.raises(UserError, match="is switched off; enable it"):
        adapter_report(model, torch.rand(1, 1, 8, 8))
    model.eval()
    merge_adapter(model)
    with pytest.raises(UserError, match="is merged into its weights; unmerge it"):
        adapter_report(model, torch.rand(1, 1, 8, 8))


class Gradients(Callback):
    """Takes the norms of all gradients of a layer's adapter, one step after the other."""

    def __init__(self, layer):
        self.layer, self.norms = layer, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = [each.grad for name, each in pl_module.named_parameters() if self.layer in name and each.requires_grad]
        self.norms.append(float(sum(each.square().sum() for each in found)) ** 0.5)


def read(directory):
    return json.loads((directory / "adapter_statistics.json").read_text())


def test_a_row_an_epoch_with_gradients_and_two_sets_of_histograms(tmp_path):
    spy, statistics = Gradients("layer2.0.conv1.lora"), AdapterStatistics()
    trainer = fit(network(), spy, statistics, epochs=3, default_root_dir=tmp_path)
    rows = read(tmp_path)["epochs"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [any("histogram" in each["block"] for each in row["layers"]) for row in rows] == [True, False, True]
    (layer,) = (each for each in rows[1]["layers"] if each["layer"] == "layer2.0.conv1")
    assert layer["gradient_norm"] == pytest.approx(np.mean(spy.norms[3:6]), rel=1e-4)
    assert (tmp_path / "adapter_outputs.png").read_bytes().startswith(b"\x89PNG")
    images = next(iter(trainer.datamodule.val_dataloader()))[0][:32]
    now = adapter_report(trainer.lightning_module, images)  # with the weights of the end
    assert [each["ratio"] for each in rows[2]["layers"]] == pytest.approx([each["ratio"] for each in now], rel=1e-4)


class Dropping(nn.Module):
    """Draws random numbers in training."""

    def __init__(self):
        super().__init__()
        self.network, self.drop = network(), nn.Dropout(0.2)

    def forward(self, x):
        return self.network(self.drop(x))


def test_training_is_what_it_would_be_without_it(tmp_path):
    models = [Dropping(), Dropping()]
    fit(models[0], epochs=2, default_root_dir=tmp_path)
    fit(models[1], AdapterStatistics(), epochs=2, default_root_dir=tmp_path)
    one, other = (each.state_dict() for each in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_validation_the_first_training_batch_is_looked_at(tmp_path):
    fit(network(), AdapterStatistics(directory=tmp_path), epochs=2, limit_val_batches=0)
    assert [row["epoch"] for row in read(tmp_path)["epochs"]] == [0, 1]


class Stop(Callback):
    """Ends a run within an epoch, after its checkpoint."""

    def __init__(self, epoch, batch):
        self.place = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise KeyboardInterrupt


@pytest.mark.parametrize("place", [(1, 0), (0, 2)])
def test_a_continued_run_records_what_one_without_a_break_does(place, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(network(), AdapterStatistics(), RunWriter(whole), epochs=2, default_root_dir=whole)
    first = [AdapterStatistics(), RunWriter(parts, every_n_steps=1)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(network(), *first, Stop(*place), epochs=2, default_root_dir=parts)
    torch.manual_seed(1)
    writer = RunWriter(parts)
    callbacks = [AdapterStatistics(), writer]
    trainer = Trainer(max_epochs=2, callbacks=callbacks, default_root_dir=parts, **QUIET)
    trainer.fit(task(network()), DigitsDataModule(), ckpt_path=writer.last_checkpoint, weights_only=True)
    expected, found = read(whole)["epochs"], read(parts)["epochs"]
    assert [row["epoch"] for row in found] == [0, 1]
    for one, other in zip(expected, found, strict=True):
        for left, right in zip(one["layers"], other["layers"], strict=True):
            assert left["ratio"] == pytest.approx(right["ratio"], rel=1e-4)
            assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(("std", "lr", "word"), [(0.0, 1e-6, "drowns the adapter"), (30.0, 0.0, "drowns its block")])
def test_a_layer_that_drowns_or_is_drowned_is_warned_about_once(std, lr, word, tmp_path, caplog):
    statistics = AdapterStatistics(directory=tmp_path)
    with caplog.at_level(logging.WARNING, "lightning_automl"):
        fit(moved(network(), std), statistics, epochs=2, lr=lr)
    (sentence,) = read(tmp_path)["warnings"]
    assert sentence.startswith("In epoch 1, in ")
    assert word in sentence
    assert caplog.messages.count(sentence) == 1


def test_adapters_of_usual_size_are_not_warned_about(tmp_path):
    fit(moved(network()), AdapterStatistics(directory=tmp_path), lr=0.0)
    ratios = [layer["ratio"] for layer in read(tmp_path)["epochs"][0]["layers"]]
    assert 0.01 < min(ratios) <= max(ratios) < 10
    assert read(tmp_path)["warnings"] == []
