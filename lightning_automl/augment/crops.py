"""Operations on batches of images ``(batch, channels, height, width)``, on the device where the batch is.

Every image of the batch draws its own random numbers, from torch's global generator of that device; there is no loop
over images and nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_automl.rundir import UserError

_LARGE = 2**15  # elements of an image from which on it is copied by itself


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to ``padding`` pixels in both directions; what comes in from outside is zero.

    Equal to a crop at a uniformly drawn place of the image padded with zeros on all four sides.

    Args:
        images: ``(batch, channels, height, width)``, of any dtype and device; it is not changed.
        padding: Largest shift, in pixels.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        UserError: If the padding is negative or the images have no four dimensions.
    """
    _check(images, padding)
    if padding == 0:
        return images.clone()
    if _one_by_one(images):
        return _shifted(images, torch.zeros(images.shape[0], dtype=torch.bool), padding)
    samples = torch.arange(images.shape[0], device=images.device)
    return _windows(F.pad(images, [padding] * 4), samples, padding)


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half.

    Args:
        images: ``(batch, channels, height, width)``, of any dtype and device; it is not changed.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        UserError: If the images have no four dimensions.
    """
    _check(images, padding=0)
    if _one_by_one(images):
        return _shifted(images, torch.randint(2, images.shape[:1]), padding=0)
    return _windows(*_with_mirrored(images), padding=0)


def random_crop_flip(images: Tensor, padding: int) -> Tensor:
    """Mirror each image with probability one half, then shift it: :func:`random_flip` and :func:`random_crop` in one.

    Args:
        images: ``(batch, channels, height, width)``, of any dtype and device; it is not changed.
        padding: Largest shift, in pixels.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        UserError: If the padding is negative or the images have no four dimensions.
    """
    _check(images, padding)
    if _one_by_one(images):
        return _shifted(images, torch.randint(2, images.shape[:1]), padding)
    both, samples = _with_mirrored(images)
    return _windows(F.pad(both, [padding] * 4), samples, padding)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: ``(batch, channels, height, width)``, float; they are not changed.
        mean: ``(channels,)`` or ``(channels, 1, 1)``.
        std: Likewise.

    Returns:
        Images of the same shape and memory format.
    """
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    if images.device.type == "cpu" and images.is_contiguous(memory_format=torch.channels_last):
        # The innermost loop of an elementwise operation would be over three channels; over the pixels of a row, each
        # with its channels, it is eight times as fast (128 x 3 x 32 x 32: 0.14 instead of 1.2 ms on one core).
        width = images.shape[3]
        mean, std = (value.view(1, 1, -1).repeat(1, width, 1).permute(2, 0, 1) for value in (mean, std))
    return (images - mean).div_(std)


def _check(images: Tensor, padding: int) -> None:
    if images.ndim != 4:
        raise UserError(
            f"images have the shape {tuple(images.shape)}; an image operation needs (batch, channels, height, width)"
        )
    if padding < 0:
        raise UserError(f"the padding of a crop is {padding} pixels; give 0 (no shift) or more")


def _one_by_one(images: Tensor) -> bool:
    return images.device.type == "cpu" and images[:1].numel() >= _LARGE


def _shifted(images: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """What :func:`_windows` gives for the same random numbers, image by image and with no copy of the whole batch.

    For a uint8 batch of 64 x 3 x 224 x 224 on one core 1.5 instead of 9 ms; for small images the loop costs more than
    the copies, and a GPU would wait for the numbers.
    """
    batch, _, height, width = images.shape
    rows = columns = [0] * batch
    if padding:
        rows, columns = (torch.randint(2 * padding + 1, (2, batch)) - padding).tolist()
    result = torch.zeros_like(images) if padding else torch.empty_like(images)
    for image, target, mirror, row, column in zip(images, result, mirrored.tolist(), rows, columns, strict=True):
        row, column = max(-height, min(row, height)), max(-width, min(column, width))  # beyond all is zero
        # The target's pixel (y, x) is the image's (y + row, x + column), where there is one.
        ys = slice(max(0, -row), min(height, height - row))
        xs = slice(max(0, -column), min(width, width - column))
        source = image[:, ys.start + row : ys.stop + row]
        if mirror:  # the same of the mirror image, which is not made
            start = width - (xs.stop + column)
            target[:, ys, xs] = source[:, :, start : start + xs.stop - xs.start].flip(2)
        else:
            target[:, ys, xs] = source[:, :, xs.start + column : xs.stop + column]
    return result


def _with_mirrored(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images followed by their mirror images, and for each image the row of the one that was drawn."""
    batch = images.shape[0]
    samples = torch.arange(batch, device=images.device)
    samples += batch * torch.randint(2, (batch,), device=images.device)
    return torch.cat([images, images.flip(3)]), samples


def _windows(padded: Tensor, samples: Tensor, padding: int) -> Tensor:
    """Cut from ``padded[samples]`` one window each that is ``2 * padding`` pixels smaller, at a random place.

    ``padded`` is dense, in either memory format; ``samples`` ``(batch,)`` may name an image twice or not at all.
    """
    # A window is a set of rows that lie in one piece in memory. All pieces of that length, one beginning at each
    # element, are an overlapping view, from which `index_select` copies the drawn ones with one memcpy a row: for
    # uint8 batches of 128 x 3 x 32 x 32 on one core 1.6 times as fast as gathering single pixels, 2.5 to 3.5 times as
    # fast as indexing an unfolded view or copying image by image (which would also wait for a GPU).
    # benchmarks/data_throughput has the whole pipeline.
    batch, device = samples.shape[0], padded.device
    channels, height, width = padded.shape[1], padded.shape[2] - 2 * padding, padded.shape[3] - 2 * padding
    if padded.numel() == 0:
        return padded.new_empty(batch, channels, height, width)
    channels_last = not padded.is_contiguous()  # a pixel's channels lie side by side, so one row holds all of them
    planes, length = (1, width * channels) if channels_last else (channels, width)
    to_sample, to_plane, to_row, to_column = padded.stride()
    starts = samples * to_sample
    if padding:
        rows, columns = torch.randint(2 * padding + 1, (2, batch), device=device)
        starts += rows * to_row + columns * to_column
    pieces = (
        starts.view(-1, 1, 1)
        + torch.arange(planes, device=device).view(-1, 1) * to_plane
        + torch.arange(height, device=device) * to_row
    )
    every_piece = padded.as_strided((padded.numel() - length + 1, length), (1, 1))
    chosen = every_piece.index_select(0, pieces.view(-1))
    if channels_last:
        return chosen.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return chosen.view(batch, channels, height, width)
