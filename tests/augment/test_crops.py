from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_automl import augment
from lightning_automl.augment import crops
from lightning_automl.augment.crops import normalize, random_crop, random_crop_flip, random_flip

PADDING = 2
#: Every operation that the package exports, called with the images alone.
OPERATIONS = {
    name: getattr(augment, name) if name == "random_flip" else partial(getattr(augment, name), padding=PADDING)
    for name in augment.__all__
    if name.startswith("random_")
}


WAYS = {"all at once": 2**40, "one by one": 0}


@pytest.fixture(autouse=True, params=WAYS)
def way(request, monkeypatch):
    """Both ways to copy windows, whatever the size of the images."""
    monkeypatch.setattr(crops, "_LARGE", WAYS[request.param])


def batch(dtype=torch.uint8, channels=3, size=(6, 5), images=64):
    values = torch.randint(1, 256, (images, channels, *size), dtype=torch.uint8)
    return values if dtype is torch.uint8 else values.to(dtype) / 256


def places(image, flips=(False, True), padding=PADDING):
    """Every crop of an image, by ``(row, column, flip)``."""
    height, width = image.shape[-2:]
    found = {}
    for flip in flips:
        padded = F.pad(image.flip(-1) if flip else image, [padding] * 4)
        for row in range(2 * padding + 1):
            for column in range(2 * padding + 1):
                found[row, column, flip] = padded[..., row : row + height, column : column + width]
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_input_is_unchanged_and_shape_dtype_and_memory_format_are_kept(name, dtype, channels, memory_format):
    images = batch(dtype, channels).contiguous(memory_format=memory_format)
    before = images.clone()
    result = OPERATIONS[name](images)
    assert torch.equal(images, before)
    assert result.data_ptr() != images.data_ptr()
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.is_contiguous(memory_format=memory_format)
    assert not torch.equal(result, images)
    assert (result.amin() >= 0) & (result.amax() <= images.amax())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_image_is_one_of_its_own_crops_and_each_place_is_drawn_equally_often(memory_format):
    torch.manual_seed(0)
    image = batch(images=1)[0]
    images = image.expand(5000, -1, -1, -1).contiguous(memory_format=memory_format)
    results = random_crop_flip(images, PADDING)
    counts = torch.stack([(results == crop).flatten(1).all(1).sum() for crop in places(image).values()])
    assert counts.sum() == 5000  # 50 places, about 100 each
    assert counts.min() > 60
    assert counts.max() < 150


def test_images_of_a_batch_keep_their_order_and_draw_their_own_places():
    torch.manual_seed(0)
    images = batch()
    drawn = []
    for image, result in zip(images, random_crop_flip(images, PADDING), strict=True):
        drawn += [place for place, crop in places(image).items() if torch.equal(crop, result)]
    assert len(drawn) == len(images)
    assert len(set(drawn)) > 20


def test_channels_of_an_image_move_together():
    images = batch(channels=1).expand(-1, 3, -1, -1)
    result = random_crop_flip(images, PADDING)
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])


def test_a_crop_alone_never_flips():
    images = batch()
    for image, result in zip(images, random_crop(images, PADDING), strict=True):
        assert any(torch.equal(crop, result) for crop in places(image, flips=[False]).values())


def test_a_flip_alone_never_shifts_and_flips_about_half():
    torch.manual_seed(0)
    images = batch(images=1000)
    result = random_flip(images)
    flipped = (result == images.flip(3)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert torch.equal(flipped, ~kept)
    assert 400 < flipped.sum() < 600


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_seed_draws_the_same_and_the_memory_format_does_not_matter(name):
    images = batch()
    results = []
    for given in (images, images, images.contiguous(memory_format=torch.channels_last)):
        torch.manual_seed(3)
        results.append(OPERATIONS[name](given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_both_ways_give_the_same_for_the_same_seed(name, size, memory_format, monkeypatch):
    images = batch(size=size).contiguous(memory_format=memory_format)
    found = []
    for limit in WAYS.values():
        monkeypatch.setattr(crops, "_LARGE", limit)
        torch.manual_seed(3)
        found.append(OPERATIONS[name](images))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_views_give_what_their_copies_give(name):
    images = batch(size=(8, 10))[::2, :, 1:7, ::2]
    results = []
    for given in (images, images.contiguous(), images.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.manual_seed(3)
        results.append(OPERATIONS[name](given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (1, 1, 1, 1), (2, 3, 1, 7)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_empty_batches_and_tiny_images_pass(name, size):
    assert OPERATIONS[name](torch.zeros(size, dtype=torch.uint8)).shape == size


def test_no_padding_means_no_shift():
    images = batch()
    assert torch.equal(random_crop(images, 0), images)
    result = random_crop_flip(images, 0)
    assert ((result == images) | (result == images.flip(3))).flatten(1).all(1).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 1, 5, 4), (1, 3, 1, 1), (0, 3, 5, 4)], ids=str)
def test_normalize_is_the_same_in_either_memory_format(shape, memory_format):
    images = torch.rand(shape).contiguous(memory_format=memory_format)
    mean, std = torch.rand(shape[1]), torch.rand(shape[1]) + 0.1
    before = images.clone()
    expected = torch.stack([(images[:, index] - mean[index]) / std[index] for index in range(shape[1])], 1)
    for view in ((-1,), (-1, 1, 1)):
        result = normalize(images, mean.view(view), std.view(view))
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="-1 pixels"):
        random_crop(batch(), -1)
    with pytest.raises(ValueError, match=r"\(3, 6, 5\)"):
        random_flip(batch()[0])
