import copy
import json
import subprocess
import sys
from pathlib import Path

import layer_kinds
import peft
import pytest
import torch
from layer_kinds import KINDS, images, network
from lora_networks import VARIANTS, altered, every_kind, every_variant, moved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_automl.adapters import (
    ADAPTERS,
    LoraConfig,
    add_adapter,
    base_digest,
    load_adapter,
    merge_adapter,
    save_adapter,
    switch_adapter,
)
from lightning_automl.adapters.files import CONFIG, WEIGHTS
from lightning_automl.adapters.injection import tuner_layers
from lightning_automl.models import ResNet
from lightning_automl.rundir import UserError


def contents(directory):
    return json.loads((directory / CONFIG).read_text())


def metadata(directory):
    with safe_open(directory / WEIGHTS, "pt") as file:
        return file.metadata()


def same_weights(one, other):
    first, second = (load_file(directory / WEIGHTS) for directory in (one, other))
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and metadata(one) == metadata(other)


def is_plain(kind, variant):
    return KINDS[kind][1] and variant != "learnable"


@every_variant
@every_kind
def test_the_file_gives_a_fresh_base_the_same_outputs(kind, variant, tmp_path):
    model = altered(kind, modules_to_save=["head", "norm"], **VARIANTS[variant])
    model.base_model.model.norm.modules_to_save["default"].running_mean += 1
    wanted = model(images())
    assert save_adapter(model, tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    read = load_adapter(network(kind), tmp_path, "read")
    assert torch.equal(read(images()), wanted)
    assert read.active_adapter == "read"
    assert {name for name, parameter in read.named_parameters() if parameter.requires_grad} == {
        name.replace(".default", ".read") for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    # peft reads both kinds of files after the import, and reads plain ones with its own layers
    by_peft = peft.PeftModel.from_pretrained(network(kind), tmp_path)
    torch.testing.assert_close(by_peft(images()), wanted, atol=1e-6, rtol=1e-5)
    assert (type(by_peft.base_model) is peft.LoraModel) == is_plain(kind, variant)
    assert contents(tmp_path)["peft_type"] == ("LORA" if is_plain(kind, variant) else "IMAGE_LORA")
    save_adapter(read, tmp_path / "again", "read")
    assert (tmp_path / "again" / CONFIG).read_text() == (tmp_path / CONFIG).read_text()
    assert same_weights(tmp_path / "again", tmp_path)


WITHOUT_US = """
import sys, torch, peft
from layer_kinds import images, network
for kind in sys.argv[2:]:
    try:
        model = peft.PeftModel.from_pretrained(network(kind), f"{sys.argv[1]}/{kind}")
        torch.save(model(images()).detach(), f"{sys.argv[1]}/{kind}/outputs.pt")
    except KeyError as error:
        print(kind, error)
assert "lightning_automl" not in sys.modules
"""


@pytest.mark.slow
def test_without_this_package_peft_reads_it_rightly_or_fails(tmp_path):
    wanted = {}
    for kind in KINDS:
        model = altered(kind)
        save_adapter(model, tmp_path / kind)
        wanted[kind] = model(images())
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, tmp_path, *KINDS],
        env={"PYTHONPATH": str(Path(layer_kinds.__file__).parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == [f"{kind} 'IMAGE_LORA'" for kind in KINDS if not is_plain(kind, "lora")]
    for kind in KINDS:
        if is_plain(kind, "lora"):
            outputs = torch.load(tmp_path / kind / "outputs.pt", weights_only=True)
            torch.testing.assert_close(outputs, wanted[kind], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_files_of_two_tasks_are_independent(name, tmp_path):
    """A head of its own size, other targets and trained norms; each file alone gives its task's outputs."""

    def base():
        torch.manual_seed(3)
        return ResNet(4, depth=8, width=8).eval()

    names = [full for full, module in base().named_modules() if isinstance(module, nn.BatchNorm2d)][:2]
    model = moved(add_adapter(base(), ADAPTERS[name](), "first"))
    first = model(images(size=16))
    heads = [*model.peft_config["first"].modules_to_save]
    add_adapter(model, ADAPTERS[name](modules_to_save=[*heads, *names]), "second", num_classes=6)
    moved(model)
    second = model(images(size=16))
    save_adapter(model, tmp_path / "first", "first")
    save_adapter(model, tmp_path / "second", "second")
    assert first.shape[1] == 4
    assert second.shape[1] == 6
    short = load_adapter(load_adapter(base(), tmp_path / "first", "a"), tmp_path / "second", "r")  # parts of the prefix
    assert torch.equal(short(images(size=16)), second)
    for order in (("first", "second"), ("second", "first")):
        read = base()
        for task in order:
            read = load_adapter(read, tmp_path / task, task)
        for task, wanted in (("first", first), ("second", second), ("first", first)):
            switch_adapter(read, task)
            assert torch.equal(read(images(size=16)), wanted), (order, task)
        alone = load_adapter(base(), tmp_path / order[0])
        assert torch.equal(alone(images(size=16)), first if order[0] == "first" else second)


def test_tensors_may_come_from_elsewhere(tmp_path):
    """As from a checkpoint of the averaged weights; also where the adapter is merged."""
    model = altered("groups")
    state = copy.deepcopy(model.state_dict())
    wanted = model(images())
    moved(model)
    merge_adapter(model)
    save_adapter(model, tmp_path, state_dict=state)
    torch.testing.assert_close(load_adapter(network("groups"), tmp_path)(images()), wanted)
    trained = {name: value for name, value in state.items() if ".lora_" in name or ".modules_to_save." in name}
    save_adapter(model, tmp_path / "trained", state_dict=trained)
    assert same_weights(tmp_path / "trained", tmp_path)
    for lacking in trained:
        with pytest.raises(UserError, match="lack "):
            save_adapter(model, tmp_path / "none", state_dict={k: v for k, v in trained.items() if k != lacking})
    assert not (tmp_path / "none").exists()


def test_the_digest_knows_values_names_and_shapes_only():
    net = network("groups")
    digest = base_digest(net)
    assert len(digest) == 32
    assert digest == base_digest(copy.deepcopy(net).double().to(memory_format=torch.channels_last))
    assert digest == base_digest(copy.deepcopy(net).train())
    model = add_adapter(copy.deepcopy(net), LoraConfig(r=2, target_modules=["layer"], modules_to_save=["norm", "head"]))
    moved(model)
    assert digest == base_digest(model) == base_digest(model.get_base_model())
    merge_adapter(model)
    assert digest == base_digest(model)
    copy.deepcopy(net).norm.num_batches_tracked.add_(1)
    for change in ("stem.weight", "norm.running_mean"):
        other = copy.deepcopy(net)
        other.state_dict()[change].flatten()[0] += 1e-3
        assert base_digest(other) != digest
        assert base_digest(other, ["stem", "norm"]) == base_digest(net, ["stem", "norm"])
    other = copy.deepcopy(net)
    other.norm.num_batches_tracked += 1
    assert base_digest(other) == digest
    other.names = nn.Conv2d(1, 1, 1)
    assert base_digest(other) != digest


@every_kind
def test_another_base_is_refused_and_stays_as_it_was(kind, tmp_path):
    save_adapter(altered(kind), tmp_path)
    other = network(kind, seed=9)
    before = other(images())
    with pytest.raises(UserError, match=r"another base network \(digest [0-9a-f]{32}, this one has [0-9a-f]{32}\)"):
        load_adapter(other, tmp_path)
    assert torch.equal(other(images()), before)
    assert not list(tuner_layers(other))
    if contents(tmp_path)["peft_type"] == "IMAGE_LORA":
        with pytest.raises(UserError, match="another base network"):
            peft.PeftModel.from_pretrained(network(kind, seed=9), tmp_path)
    fresh = network(kind)
    nn.init.normal_(fresh.head.weight)  # the head comes from the file
    load_adapter(fresh, tmp_path)


def test_another_architecture_is_refused_with_the_names(tmp_path):
    save_adapter(altered("depthwise"), tmp_path / "plain")
    with pytest.raises(UserError, match=r"another architecture: this network has no layer\.0;"):
        load_adapter(network("conv"), tmp_path / "plain")
    torch.manual_seed(0)
    save_adapter(add_adapter(ResNet(4, depth=8, width=8), LoraConfig(r=1)), tmp_path / "resnet")
    with pytest.raises(
        UserError, match=r"another architecture: this network has no .* and \d+ more|another architecture"
    ):
        load_adapter(network("conv"), tmp_path / "resnet")


def test_a_file_of_peft_without_a_digest_is_checked_by_its_tensors(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], modules_to_save=["head"])
    theirs = moved(peft.get_peft_model(network("conv"), config).eval())
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(network("conv"), tmp_path)
    assert type(ours.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(ours(images()), theirs(images()))
    net = network("groups")
    before = net(images())
    with pytest.raises(UserError, match=r"other sizes of layer\.lora_A"):
        load_adapter(net, tmp_path)
    assert not list(tuner_layers(net))
    assert torch.equal(net(images()), before)
    model = moved(add_adapter(network("groups"), LoraConfig(r=2, target_modules=["layer"])))
    wanted = model(images())
    with pytest.raises(UserError, match=r"other sizes of layer\.lora_A"):
        load_adapter(model, tmp_path, "theirs")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(images()), wanted)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["attention", "reflect"])
def test_what_peft_trained_wrongly_is_refused(kind, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    moved(peft.get_peft_model(network(kind), config)).save_pretrained(tmp_path)
    net = network(kind)
    with pytest.raises(UserError, match="peft's own layer is wrong"):
        load_adapter(net, tmp_path)
    assert not list(tuner_layers(net))


@pytest.mark.parametrize("kind", ["attention", "reflect"])
def test_peft_is_still_wrong_where_its_files_are_refused(kind):
    """If this fails, peft has mended a layer, and files.py may call it right."""
    ours = altered(kind, modules_to_save=[])
    theirs = peft.get_peft_model(network(kind), peft.LoraConfig(r=2, target_modules=["layer"])).eval()
    theirs.load_state_dict(ours.state_dict())
    assert (theirs(images()) - ours(images())).abs().max() > 1e-2


def test_missing_and_unexpected_tensors_are_errors(tmp_path):
    save_adapter(altered("conv"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    about = metadata(tmp_path)
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / WEIGHTS, about)
        with pytest.raises(UserError, match=f"it lacks {name.removeprefix('base_model.model.')}"):
            load_adapter(network("conv"), tmp_path)
    save_file({**tensors, "base_model.model.more.lora_A.weight": torch.zeros(1)}, tmp_path / WEIGHTS, about)
    with pytest.raises(UserError, match=r"has what the model lacks: more\.lora_A\.weight"):
        load_adapter(network("conv"), tmp_path)


def damage_truncated(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return "is damaged"


def damage_empty(directory):
    (directory / WEIGHTS).write_bytes(b"")
    return "is damaged"


def damage_missing(directory):
    (directory / WEIGHTS).unlink()
    return f"has no {WEIGHTS}"


def damage_config_missing(directory):
    (directory / CONFIG).unlink()
    return f"has no {CONFIG}"


def damage_config_truncated(directory):
    (directory / CONFIG).write_text((directory / CONFIG).read_text()[:50])
    return "is damaged"


def damage_not_a_config(directory):
    (directory / CONFIG).write_text("[]")
    return "names no peft_type"


def damage_method_without_layers(directory):
    (directory / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    return "method 'PROMPT_TUNING', which this package does not read"


def damage_other_method(directory):
    (directory / CONFIG).write_text('{"peft_type": "IA3"}')
    return "method 'IA3', which this package does not read"


def damage_unknown_option(directory):
    (directory / CONFIG).write_text(json.dumps({**contents(directory), "peft_type": "IMAGE_LORA", "new_option": 1}))
    return "not the configuration of an adapter of this version"


def damage_bad_value(directory):
    (directory / CONFIG).write_text(json.dumps({**contents(directory), "peft_type": "IMAGE_LORA", "r": 0}))
    return "rank r is 0"


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_a_damaged_directory_is_refused_in_one_sentence(damage, tmp_path):
    save_adapter(altered("groups"), tmp_path)
    words = damage(tmp_path)
    net = network("groups")
    with pytest.raises(UserError, match=words) as caught:
        load_adapter(net, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tuner_layers(net))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="no adapter 'other'; known: default"):
        save_adapter(altered("conv"), tmp_path, "other")


def test_files_are_small(tmp_path):
    """An adapter's file holds the adapter and the head, not the network."""
    torch.manual_seed(0)
    model = add_adapter(ResNet(4, depth=20), LoraConfig(r=1))
    save_adapter(model, tmp_path)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 4 * trained < (tmp_path / WEIGHTS).stat().st_size < 4 * trained + 20_000
    assert trained < 0.1 * sum(parameter.numel() for parameter in model.parameters())


def test_names_that_peft_would_take_for_more_are_written_as_an_expression(tmp_path):
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.block = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3)})
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.block["conv1"](self.conv1(x)).mean((2, 3)))

    model = moved(add_adapter(Alike(), LoraConfig(r=1, target_modules="conv1")))
    save_adapter(model, tmp_path)
    assert contents(tmp_path)["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(Alike(), tmp_path)
    assert type(theirs.base_model) is peft.LoraModel
    torch.testing.assert_close(theirs(images()), model(images()))
    assert torch.equal(load_adapter(Alike(), tmp_path)(images()), model(images()))


def test_a_network_that_asks_for_the_version_of_what_it_loads_gets_its_adapter(tmp_path):
    class Versioned(ResNet):  # as torchvision's MNASNet does
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
            if local_metadata.get("version") is None:
                raise ValueError("version is missing")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    plain = Versioned(depth=8, num_classes=3).eval()
    model = moved(add_adapter(copy.deepcopy(plain), LoraConfig(r=2)))
    pictures = torch.rand(2, 3, 16, 16)
    loaded = load_adapter(plain, save_adapter(model, tmp_path))
    assert torch.equal(loaded(pictures), model(pictures))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "a.b"}, "cannot be named 'a.b'; give a name without dots"),
        ({"name": ""}, "cannot be named ''; give a name without dots"),
        ({"name": "layer"}, "cannot be named 'layer': .* a module of this network has it"),
        ({"num_classes": 0}, "num_classes is 0; give the number of labels"),
    ],
)
def test_names_and_sizes_that_cannot_be(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        add_adapter(network("conv"), LoraConfig(r=2), **arguments)


def test_others_may_read_what_is_written(tmp_path):
    save_adapter(altered("conv"), tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in (CONFIG, WEIGHTS)}
    (tmp_path / "other").write_text("")
    assert modes == {(tmp_path / "other").stat().st_mode}
