import pytest
import torch
from torch import nn

from lightning_automl.tasks.precision import fast_precision

PLAIN = nn.Conv2d(4, 4, 3)
DEPTHWISE = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("units", "model", "expected"),
    [
        ({"amx_bf16": True}, PLAIN, "bf16-mixed"),
        ({"avx512_bf16": True}, PLAIN, "bf16-mixed"),
        ({"avx512_bf16": True}, DEPTHWISE, "32-true"),
        ({"avx512_bf16": False}, PLAIN, "32-true"),
        ({}, PLAIN, "32-true"),
    ],
)
def test_bf16_is_for_processors_that_have_it_and_networks_that_gain(units, model, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert fast_precision(model, "cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_is_for_gpus_that_have_it(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert fast_precision(DEPTHWISE, "cuda") == expected


def test_other_devices_stay_with_float32():
    assert fast_precision(PLAIN, "mps") == "32-true"
