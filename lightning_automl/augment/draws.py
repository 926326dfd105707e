"""Random numbers that belong to an image: the same on every device, and whatever else is in its batch."""

import torch
from torch import Tensor


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Numbers ``(images, count)`` in [0, 1), float32, a function of each image's seed alone.

    A generator would give each image other numbers when the batch is another, and other ones on another device. These
    are the integers ``seed + i * 0x9E3779B9`` mixed by ``lowbias32`` (https://nullprogram.com/blog/2018/07/31/), of
    which 24 bits are taken.

    Args:
        seeds: ``(images,)``, int32 or int64 in [0, 2**31), on the device where the numbers are needed.
        count: How many.
    """
    steps = torch.arange(count, dtype=torch.int32, device=seeds.device) * -0x61C88647  # 0x9E3779B9 as a signed number
    mixed = _mixed(seeds.to(torch.int32)).unsqueeze(1) + steps
    return (_mixed(mixed) >> 8 & 0xFFFFFF).float() * 2.0**-24


def _mixed(numbers: Tensor) -> Tensor:
    # int32 wraps around; >> keeps the sign, hence the masks
    numbers = (numbers ^ numbers >> 16 & 0xFFFF) * 0x7FEB352D
    numbers = (numbers ^ numbers >> 15 & 0x1FFFF) * -0x7B935975  # 0x846CA68B
    return numbers ^ numbers >> 16 & 0xFFFF
