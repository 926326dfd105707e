"""The engine on a GPU that is not there: fake tensors know where they are, and have no values to wait for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_automl.augment import OPS, Plan, apply, engine, geometry

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no GPU")


@pytest.mark.parametrize(
    ("dtype", "interpolation", "memory_format"),
    [
        (torch.uint8, "nearest", torch.channels_last),
        (torch.uint8, "bilinear", torch.contiguous_format),
        (torch.float16, "nearest", torch.contiguous_format),
    ],
    ids=str,
)
def test_nothing_waits_for_the_device_and_nothing_is_elsewhere(dtype, interpolation, memory_format, monkeypatch):
    operations = torch.randint(len(OPS), (64, 3))
    operations[: len(OPS), 0] = torch.arange(len(OPS))
    strengths = torch.tensor([operation.strongest or 0.0 for operation in OPS.values()], dtype=torch.float64)
    plan = Plan.draw(operations, strengths[operations])
    # What is decided on the CPU before, from numbers that fake tensors do not have.
    steps = engine._steps(plan, 3)
    monkeypatch.setattr(engine, "_steps", lambda plan, channels: steps)
    for name in ("crop", "quarter_turn"):
        monkeypatch.setitem(geometry.AFFINE, name, lambda strength, seeds, height, width: (1, 0, 2, 0, 1, -3))
    with FakeTensorMode(allow_non_fake_inputs=True):  # its tensors raise where a value is asked for
        images = torch.empty(64, 3, 16, 16, dtype=dtype, device="cuda").contiguous(memory_format=memory_format)
        result = apply(images, plan, interpolation=interpolation, fill=0.5)
        assert (result.shape, result.dtype, result.device) == (images.shape, dtype, images.device)
        assert result.is_contiguous(memory_format=memory_format)
