"""What holds for each method in the registry, with its defaults, on a residual network."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F

from lightning_automl.adapters import ADAPTERS, add_adapter, base_digest, describe_adapters
from lightning_automl.models import ResNet

every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def base():
    torch.manual_seed(0)
    return ResNet(4, depth=8, width=8).eval()


def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(model, steps=10):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(6) % 4).backward()
        optimizer.step()
    return model


@every_adapter
def test_the_outputs_and_the_mode_are_the_bases_at_the_start(name):
    model = add_adapter(base(), ADAPTERS[name]())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(images()), base()(images()))


@every_adapter
def test_only_the_adapter_and_the_head_train_and_all_of_them_do(name):
    model = add_adapter(base(), ADAPTERS[name]())
    before = copy.deepcopy(model.state_dict())
    wanted = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    trained(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == wanted
    assert base_digest(model) == base_digest(base())
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[model.peft_type]
    assert all(f".{prefix}" in key or ".modules_to_save.default." in key for key in wanted)
    assert str(sum(p.numel() for p in model.parameters() if p.requires_grad)) in describe_adapters(model).replace(
        ",", ""
    )


@every_adapter
def test_disabling_gives_the_base_and_peft_reads_its_own_files(name, tmp_path):
    model = trained(add_adapter(base(), ADAPTERS[name]()), steps=2)
    with model.disable_adapter():
        assert torch.equal(model(images()), base()(images()))
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path)(images()), model(images()))
