import http.server
import logging
import threading
from collections import OrderedDict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_automl.adapters import ADAPTERS, add_adapter, save_adapter
from lightning_automl.models import LoadReport, ResNet, TunableCNN, load_weights, without_loading
from lightning_automl.models.weights import adapt_channels
from lightning_automl.rundir import UserError


def network(classes=3, depth=8):
    return ResNet(classes, depth=depth, width=4)


def same(first, second):
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


#: File and what is in it, by kind; each is given the state dict.
KINDS = {
    "plain.pt": lambda state: state,
    "plain.pth": lambda state: state,
    "parallel.th": lambda state: {
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "best": 91.7,
    },
    "compiled.pt": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "flat.safetensors": lambda state: state,
    "lightning.ckpt": lambda state: {
        "state_dict": {f"model.{name}": value for name, value in state.items()} | {"mean": torch.ones(3)},
        "epoch": 4,
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_read(name, tmp_path):
    saved, loaded = network(), network()
    path = save(KINDS[name](saved.state_dict()), tmp_path / name)
    assert not same(loaded, saved)
    report = load_weights(loaded, str(path))
    assert same(loaded, saved)
    assert report.matched == list(loaded.state_dict())
    assert report.missing == []
    assert report.unused == (["mean"] if name == "lightning.ckpt" else [])


def test_a_run_directory_gives_its_best_checkpoint(tmp_path):
    saved, loaded = network(), network()
    save(KINDS["lightning.ckpt"](saved.state_dict()), tmp_path / "checkpoints" / "best.ckpt")
    load_weights(loaded, str(tmp_path))
    assert same(loaded, saved)


def test_a_network_whose_own_names_begin_like_a_wrapper_is_read(tmp_path):
    saved, loaded = (nn.ModuleDict({"model": nn.Linear(2, 3)}) for _ in range(2))
    path = save({f"model.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "a.pt")
    load_weights(loaded, str(path))
    assert same(loaded, saved)


@pytest.mark.parametrize("wrapper", ["network.", "model.network.", "_orig_mod.", "model._orig_mod.network."])
def test_wrapped_networks_load_bare_files_and_the_other_way_round(wrapper, tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, chain):
            super().__init__()
            first, *rest = chain
            setattr(self, first, Wrapper(rest) if rest else network())

    bare, wrapped = network(), Wrapper(wrapper.split(".")[:-1])
    names = {f"{wrapper}{name}" for name in bare.state_dict()}
    assert wrapped.state_dict().keys() == names
    report = load_weights(wrapped, str(save(bare.state_dict(), tmp_path / "bare.pt")))
    assert set(report.matched) == names
    assert report.unused == []
    other = network()
    report = load_weights(other, str(save(wrapped.state_dict(), tmp_path / "wrapped.pt")))
    assert report.unused == []
    assert same(other, bare)


def test_the_first_convolution_is_adapted_to_the_channels(tmp_path, caplog):
    saved = network()
    path = str(save({"state_dict": {f"model.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "a.pt"))
    grey, five = (ResNet(3, channels, depth=8, width=4) for channels in (1, 5))
    with caplog.at_level(logging.INFO):
        report = load_weights(grey, path)
    assert f"{path}: conv1.weight adapted from 3 to 1 channels" in caplog.text
    assert report == LoadReport(matched=list(grey.state_dict()), missing=[], unused=[])
    images = torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(grey.eval()(images), saved.eval()(images.expand(-1, 3, -1, -1)))
    load_weights(five, path)
    torch.testing.assert_close(five.conv1.weight, saved.conv1.weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    back = network()
    load_weights(back, str(save(grey.state_dict(), tmp_path / "grey.pt")))
    torch.testing.assert_close(back.conv1.weight, grey.conv1.weight.expand(-1, 3, -1, -1) / 3)


def test_other_convolutions_are_not_adapted(tmp_path):
    first, second = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, groups * 2, 3, groups=groups), nn.Flatten(), nn.Linear(2, 2))
        for groups in (1, 2)
    )
    state = first.state_dict()
    state["1.weight"] = torch.rand(4, 4, 3, 3)
    state["1.bias"] = torch.rand(4)
    with pytest.raises(ValueError, match=r"1\.weight \(4, 4, 3, 3\) instead of \(4, 2, 3, 3\)"):
        load_weights(second, str(save(state, tmp_path / "a.pt")))


def test_adapted_channels_by_hand():
    weight = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    assert adapt_channels(weight, 1).flatten().tolist() == [9]
    assert adapt_channels(weight, 2).flatten().tolist() == [1.5, 3]
    assert adapt_channels(weight, 3) is weight
    assert adapt_channels(weight, 4).flatten().tolist() == [0.75, 1.5, 4.5, 0.75]
    assert adapt_channels(weight[:, :1], 2).flatten().tolist() == [0.5, 0.5]


def test_without_loading_no_file_is_asked_for(tmp_path):
    path = str(tmp_path / "gone.pt")
    before = network()
    after = network()
    after.load_state_dict(before.state_dict())
    with without_loading():
        assert load_weights(after, path) == LoadReport([], [], [])
        ResNet(3, depth=8, weights="http://nowhere.invalid/a.pt")
    assert same(after, before)
    with pytest.raises(ZeroDivisionError), without_loading():
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="there is no weight file"):
        load_weights(after, path)


def test_the_head_of_another_class_count_is_left_at_its_start(tmp_path, caplog):
    saved, loaded = network(classes=3), network(classes=5)
    before = loaded.linear.weight.clone()
    with caplog.at_level(logging.INFO):
        report = load_weights(loaded, str(save(saved.state_dict(), tmp_path / "a.pt")))
    assert report.missing == report.unused == ["linear.weight", "linear.bias"]
    assert torch.equal(loaded.linear.weight, before)
    assert torch.equal(loaded.conv1.weight, saved.conv1.weight)
    assert "unused: linear.weight, linear.bias" in caplog.text
    assert "matched: conv1.weight" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_missing_tensors_other_than_the_head_s_are_warned_of(tmp_path, caplog):
    state = network().state_dict()
    del state["bn1.weight"], state["bn1.num_batches_tracked"]
    report = load_weights(network(), str(save(state, tmp_path / "a.pt")))
    assert report.missing == ["bn1.weight"]
    told = [record.levelname for record in caplog.records if "missing: bn1.weight" in record.message]
    assert told == ["WARNING"]


@pytest.mark.parametrize(
    "other", [ResNet(3, depth=8, width=8), TunableCNN(3), nn.Linear(7, 3)], ids=lambda n: type(n).__name__
)
def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(other, tmp_path):
    loaded = network()
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    with pytest.raises(ValueError, match=r"a checkpoint of another network \(.*(weight|bias)"):
        load_weights(loaded, str(save(other.state_dict(), tmp_path / "a.pt")))
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("part", ["network", "adapter", "base layers"])
def test_a_file_of_a_network_with_adapters_is_refused_and_changes_nothing(method, part, tmp_path):
    model = add_adapter(ResNet(4, depth=8, width=8), ADAPTERS[method]())
    state = model.base_model.model.state_dict()
    if part == "adapter":
        state = load_file(save_adapter(model, tmp_path) / "adapter_model.safetensors")
    if part == "base layers":
        state = {name: tensor for name, tensor in state.items() if "lora" not in name and "conv_adapter" not in name}
    torch.save(state, tmp_path / "w.pth")
    network = ResNet(4, depth=8, width=8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"w\.pth is of a network with adapters \(it has .*\); give the weights of"):
        load_weights(network, str(tmp_path / "w.pth"))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_network_that_calls_its_parts_as_peft_does_is_read(tmp_path):
    network = nn.Sequential(OrderedDict(base_layer=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "w.pth")
    other = nn.Sequential(OrderedDict(base_layer=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    assert len(load_weights(other, str(tmp_path / "w.pth")).matched) == 4


def test_missing_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="there is no weight file"):
        load_weights(network(), str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"no checkpoints/best\.ckpt"):
        load_weights(network(), str(tmp_path))


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "a.pt")
    torch.save({"state_dict": Harmful()}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="run code from it"):
            load_weights(network(), str(tmp_path / name))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.th", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip file", b"text, but no weights\n" * 20])
def test_damaged_files_are_told(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(network(), str(tmp_path / name))


def test_other_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(network(), str(save({"epoch": 3}, tmp_path / "a.pt")))
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(network(), str(save([1, 2], tmp_path / "b.pt")))
    (tmp_path / "a.h5").touch()
    with pytest.raises(ValueError, match=r"none of \.ckpt, \.safetensors"):
        load_weights(network(), str(tmp_path / "a.h5"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_weights_come_from_the_web_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    saved, loaded = network(), network()
    save(saved.state_dict(), tmp_path / "web" / "best.safetensors")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/best.safetensors"
        load_weights(loaded, address)
        with pytest.raises(ValueError, match=r"could not be downloaded.*404"):
            load_weights(network(), address.replace("best", "worst"))
        server.shutdown()
        thread.join()
    assert same(loaded, saved)
    load_weights(network(), address)  # the server is gone
    with pytest.raises(ValueError, match=r"could not be downloaded.*offline"):
        load_weights(network(), address.replace("best", "other"))
