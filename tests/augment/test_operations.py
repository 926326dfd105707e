"""What each operation of the registry does to pixels: PIL's own results, formulas by hand, and what holds for all."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from lightning_automl.augment import geometry
from lightning_automl.augment.engine import ImageTypeError, apply_operation
from lightning_automl.augment.ops import BASE, OPS
from lightning_automl.rundir import UserError

WITH_STRENGTH = [name for name, operation in OPS.items() if operation.strongest is not None]
GEOMETRIC = [name for name, operation in OPS.items() if operation.kind == "geometric"]
FORMATS = (torch.contiguous_format, torch.channels_last)
SIZE = (18, 26)
GREY = (125, 123, 114)

#: Operations that a test in this file has computed in another way; the last test wants all of them.
VALUES = set()


def value_of(*names):
    VALUES.update(names)
    return lambda test: test


def pictures(count=8, channels=3, size=SIZE, dtype=torch.uint8):
    """Smooth shapes with grain; of four or more, the first has one level, the second two, the third dark ones."""
    generator = torch.Generator().manual_seed(channels)
    coarse = torch.rand(max(count, 4), channels, 5, 6, generator=generator)
    images = F.interpolate(coarse, size, mode="bicubic").mul(1.3).sub(0.15)
    images += 0.06 * torch.randn(images.shape, generator=generator)
    images[0] = 0.4
    images[1] = (images[1] > 0.5) * 0.7 + 0.1
    images[2] = images[2] * 0.2
    images = (images[-count:].clamp(0, 1) * 255).round()
    return images.to(torch.uint8) if dtype is torch.uint8 else (images / 255).to(dtype)


def size_for(name):
    return (20, 20) if name == "quarter_turn" else SIZE


def strengths(name, number=21, limit=False):
    """From none to the strongest, both signs; as far as any space may go if ``limit``."""
    operation = OPS[name]
    if operation.strongest is None:
        return [0.0]
    highest = operation.limit if limit else operation.strongest
    values = np.linspace(0, highest, number)
    return [*values, *(-values[1:] if operation.signed else [])]


def extremes(name, limit=False):
    return strengths(name, 2, limit)[1:] if name in WITH_STRENGTH else [0.0]


def act(name, images, strength=0.0, seed=0, **arguments):
    return apply_operation(name, images, strength, generator=torch.Generator().manual_seed(seed), **arguments)


def psnr(images, others):
    return -10 * torch.log10((images.float() - others.float()).square().mean()).item()


# ---- what holds for every operation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_STRENGTH)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_strength_zero_changes_no_bit(name, dtype, interpolation):
    images = pictures(size=size_for(name), dtype=torch.float64).mul(0.999)
    images = (images * 255).to(dtype) if dtype is torch.uint8 else images.to(dtype)
    result = act(name, images, 0.0, interpolation=interpolation)
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_shape_dtype_format_and_range_are_kept_and_the_input_is_not_changed(name, dtype, channels, memory_format):
    images = pictures(6, channels, size_for(name), dtype).contiguous(memory_format=memory_format)
    before = images.clone()
    for strength in extremes(name, limit=True):
        result = act(name, images, strength)
        assert torch.equal(images, before)
        assert (result.shape, result.dtype, result.device) == (images.shape, images.dtype, images.device)
        assert result.is_contiguous(memory_format=memory_format)
        assert result.isfinite().all()
        assert 0 <= result.min()
        assert result.max() <= (255 if dtype is torch.uint8 else 1)
        assert result.data_ptr() != images.data_ptr()
        if name != "identity" and not (name == "color" and channels != 3):
            assert not torch.equal(result, images)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", OPS)
def test_tiny_and_uniform_images_have_finite_results(name, interpolation, size):
    height, width = (size[0], size[0]) if name == "quarter_turn" else size
    for level in (0.0, 0.5, 1.0):
        images = torch.full((2, 3, height, width), level)
        for strength in extremes(name, limit=True):
            result = act(name, images, strength, interpolation=interpolation)
            assert result.shape == images.shape
            assert ((result >= 0) & (result <= 1)).all()  # false for NaN


@pytest.mark.parametrize("name", OPS)
def test_one_image_is_a_batch_of_one_and_no_image_stays_none(name):
    images = pictures(4, size=size_for(name))
    strength = extremes(name)[0]
    assert torch.equal(act(name, images[3], strength), act(name, images[3:], strength)[0])
    assert act(name, images[:0], strength).shape == images[:0].shape


@pytest.mark.parametrize("name", OPS)
def test_views_of_larger_images_are_read_as_they_are(name):
    images = pictures(4, 6, (40, 40))[:, ::2, 1:39:2, 3:22]
    strength = extremes(name)[0]
    assert torch.equal(act(name, images, strength), act(name, images.contiguous(), strength))


@pytest.mark.parametrize("name", OPS)
def test_each_image_has_its_own_strength(name):
    values = torch.tensor(strengths(name, 4), dtype=torch.float64)
    images = pictures(len(values), size=size_for(name))
    together = act(name, images, values)
    for row, value in enumerate(values):
        # the seeds of the rows differ: the row must be the same place in a batch of one strength
        assert torch.equal(act(name, images, float(value))[row], together[row])


@pytest.mark.parametrize("name", OPS)
def test_float_images_become_what_uint8_images_become(name):
    images = pictures(8, size=size_for(name))
    for strength in strengths(name, 9):
        if OPS[name].kind == "geometric":
            for interpolation, tolerance in (("nearest", 1e-6), ("bilinear", 0.51 / 255)):
                ours, theirs = (act(name, x, strength, interpolation=interpolation) for x in (images, images / 255))
                assert (ours / 255 - theirs).abs().max() < tolerance
            continue
        ours, theirs = act(name, images, strength), act(name, images / 255, strength)
        # the digits after the point, which uint8 cuts off
        assert (ours / 255 - theirs).abs().max() < 1.001 / 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_half_precision_is_only_how_images_are_kept(name, dtype):
    images = pictures(8, size=size_for(name), dtype=dtype)
    for strength in extremes(name):
        for interpolation in ("nearest", "bilinear"):
            exact = act(name, images.float(), strength, interpolation=interpolation)
            result = act(name, images, strength, interpolation=interpolation)
            torch.testing.assert_close(result.float(), exact, atol=torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_channels_move_together_and_geometry_makes_no_new_values(name):
    images = pictures(6, 1, size_for(name)).clamp(min=1)
    for strength in extremes(name, limit=True):
        result = act(name, images.expand(-1, 3, -1, -1), strength)
        assert torch.equal(result[:, 0], result[:, 1])
        assert torch.equal(result[:, 0], result[:, 2])
        assert set(result.unique().tolist()) <= {0, *images.unique().tolist()}


@pytest.mark.parametrize("fill", [0.25, (0.25, 0.5, 0.75)], ids=["one", "each"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_fill_comes_in_from_outside(name, fill, interpolation):
    for dtype, one in ((torch.float32, 1), (torch.uint8, 255)):
        images = torch.full((4, 3, 20, 20), one, dtype=dtype)
        filling = torch.tensor(fill).mul(one).to(dtype)
        given = filling.tolist()
        for strength in extremes(name, limit=True):
            result = act(name, images, strength, interpolation=interpolation, fill=given)
            black = act(name, images, strength, interpolation=interpolation)
            outside = black == 0
            assert torch.equal(result[~outside], black[~outside])
            assert torch.equal(result[outside], filling.view(-1, 1, 1).expand(4, 3, 20, 20)[outside])
            if name in ("shear_x", "shear_y", "translate_x", "translate_y", "crop"):
                assert outside.any()


# ---- PIL, called as AutoAugment's authors and torchvision call it


def affine(numbers):
    def transformed(image, strength):
        width, height = image.size
        return image.transform(image.size, Image.Transform.AFFINE, numbers(strength, width, height))

    return transformed


def zoomed(strength, width, height):
    scale = 1 / (1 + strength)
    return scale, 0, (1 - scale) * width / 2, 0, scale, (1 - scale) * height / 2


def added(levels, channels):
    """Of each level, as timm's ``solarize_add`` has it."""
    return [min(255, level + levels) if level < 128 else level for level in range(256)] * channels


def enhanced(kind):
    return lambda image, strength: kind(image).enhance(1 + strength)


#: What PIL makes of an image and a signed strength.
PIL = {
    "identity": lambda image, strength: image,
    "shear_x": affine(lambda strength, width, height: (1, strength, 0, 0, 1, 0)),
    "shear_y": affine(lambda strength, width, height: (1, 0, 0, strength, 1, 0)),
    "translate_x": affine(lambda strength, width, height: (1, 0, -strength * width, 0, 1, 0)),
    "translate_y": affine(lambda strength, width, height: (1, 0, 0, 0, 1, -strength * height)),
    "rotate": lambda image, strength: image.rotate(strength),
    "zoom": affine(zoomed),
    "horizontal_flip": lambda image, strength: ImageOps.mirror(image),
    "vertical_flip": lambda image, strength: ImageOps.flip(image),
    "autocontrast": lambda image, strength: ImageOps.autocontrast(image),
    "invert": lambda image, strength: ImageOps.invert(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "solarize": lambda image, strength: ImageOps.solarize(image, 256 - strength),
    "solarize_add": lambda image, strength: image.point(added(int(strength), len(image.getbands()))),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(strength)),
    "contrast": enhanced(ImageEnhance.Contrast),
    "color": enhanced(ImageEnhance.Color),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
}


def by_pil(name, image, strength):
    """PIL's result for ``(channels, height, width)``; PIL has no two or five channels, so that they come one by one."""
    if len(image) not in (1, 3):
        return torch.cat([by_pil(name, channel[None], strength) for channel in image])
    given = Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
    result = torch.from_numpy(np.array(PIL[name](given, float(strength))))
    return result[None] if len(image) == 1 else result.permute(2, 0, 1)


@value_of(*PIL)
@pytest.mark.parametrize("size", [(18, 26), (31, 17), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("name", PIL)
def test_uint8_images_become_what_pil_makes_of_them(name, channels, size):
    images = pictures(4, channels, size)
    if name == "contrast" and channels in (2, 5):
        images = images[:, :1].expand(-1, channels, -1, -1)  # as PIL would take the mean of each channel
    # half a pixel, or a scale like 21 / 20, would read on the lines between pixels, where the last digit decides
    odd = 0.98765 if name in ("translate_x", "translate_y", "zoom") else 1
    for strength in strengths(name, 13, limit=True) + strengths(name, 11):
        strength *= odd
        theirs = torch.stack([by_pil(name, image, strength) for image in images])
        ours = act(name, images, strength)
        difference = (ours.int() - theirs.int()).abs()
        if name in GEOMETRIC:
            # a place on the line between two pixels may be read on either side
            assert (difference > 0).any(1).float().mean() < 0.005, (strength, difference.float().mean())
        else:
            assert difference.max() == 0, (strength, difference.max(), difference.float().mean())


@pytest.mark.parametrize("name", PIL)
def test_larger_images_become_what_pil_makes_of_them(name):
    images = pictures(4, 3, (150, 201))  # where equalize has steps of many pixels
    for strength in (extremes(name)[0] * 0.98765, extremes(name)[-1] * 0.45678):
        theirs = torch.stack([by_pil(name, image, strength) for image in images])
        different = act(name, images, strength) != theirs
        assert different.float().mean() <= (0.005 if name in GEOMETRIC else 0), strength


@pytest.mark.parametrize("name", [name for name in PIL if name in GEOMETRIC])
def test_bilinear_reading_is_near_pils(name):
    images = F.interpolate(pictures(8, 1, (6, 8), torch.float32), (31, 37), mode="bilinear")
    images = (images * 255).round().to(torch.uint8)
    width, height = 37, 31
    numbers = {
        "shear_x": lambda strength: (1, strength, 0, 0, 1, 0),
        "shear_y": lambda strength: (1, 0, 0, strength, 1, 0),
        "translate_x": lambda strength: (1, 0, -strength * width, 0, 1, 0),
        "translate_y": lambda strength: (1, 0, 0, 0, 1, -strength * height),
        "zoom": lambda strength: zoomed(strength, width, height),
    }
    for strength in strengths(name, 5):
        theirs = []
        for image in images:
            given = Image.fromarray(image[0].numpy())
            if name in numbers:
                given = given.transform(given.size, Image.Transform.AFFINE, numbers[name](strength), Image.BILINEAR)
            elif name == "rotate":
                given = given.rotate(strength, Image.BILINEAR)
            else:
                given = PIL[name](given, strength)
            theirs.append(torch.from_numpy(np.array(given))[None])
        ours = act(name, images, strength, interpolation="bilinear")
        difference = (ours.int() - torch.stack(theirs).int()).abs()
        assert (difference > 1).float().mean() < 0.005, strength


@pytest.mark.parametrize("channels", [2, 5])
def test_contrast_of_other_numbers_of_channels_blends_with_the_mean_of_all(channels):
    images = pictures(6, channels)
    for strength in strengths("contrast", 7):
        mean = (images.float().mean((1, 2, 3)) + 0.5).floor().view(-1, 1, 1, 1)
        wanted = (mean + (1 + strength) * (images.float() - mean)).clamp(0, 255)
        assert (act("contrast", images, strength).float() - wanted).abs().max() <= 1.01


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_without_three_channels_have_no_colour(channels):
    images = pictures(6, channels)
    assert torch.equal(act("color", images, 0.9), images)


# ---- by hand


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_disc_rotated_there_and_back_is_the_disc(interpolation):
    places = torch.arange(64) - 31.5
    radius = (places[:, None].square() + places.square()).sqrt()
    disc = torch.sigmoid((20 - radius) / 2).expand(1, 3, 64, 64)  # an edge of a few pixels
    for degrees in strengths("rotate", 7, limit=True):
        there = act("rotate", disc, degrees, interpolation=interpolation)
        back = act("rotate", there, -degrees, interpolation=interpolation)
        assert psnr(back, disc) > 30


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_picture_rotated_there_and_back_is_the_picture(interpolation):
    images = F.interpolate(pictures(4, 3, (5, 5), torch.float32), (64, 64), mode="bicubic").clamp(0, 1)
    for degrees in (-30.0, 7.0, 20.0):
        there = act("rotate", images, degrees, interpolation=interpolation)
        back = act("rotate", there, -degrees, interpolation=interpolation)
        assert psnr(back[..., 20:-20, 20:-20], images[..., 20:-20, 20:-20]) > 30
        assert psnr(there[..., 20:-20, 20:-20], images[..., 20:-20, 20:-20]) < 35


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("side", [8, 9])
def test_quarters_of_a_turn_are_exact(side, interpolation):
    for images in (pictures(4, 3, (side, side)), pictures(4, 3, (side, side), torch.float32)):
        for turns in (-2, -1, 1, 2):
            result = act("rotate", images, 90.0 * turns, interpolation=interpolation)
            torch.testing.assert_close(result, images.rot90(turns, (2, 3)), atol=1e-5, rtol=0)


@value_of("quarter_turn")
def test_quarter_turns_are_90_180_or_270_degrees_equally_often():
    image = pictures(4, 3, (7, 7))[3]
    results = act("quarter_turn", image.expand(3000, -1, -1, -1))
    counts = [(results == image.rot90(turns, (1, 2))).flatten(1).all(1).sum().item() for turns in range(4)]
    assert counts[0] == 0
    assert sum(counts) == 3000
    assert scipy.stats.chisquare(counts[1:]).pvalue > 0.001


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "axis"), [("translate_x", 3), ("translate_y", 2)])
def test_a_translation_by_whole_pixels_is_a_shifted_copy(name, axis, dtype, interpolation):
    images = pictures(4, 3, SIZE, dtype)
    length = images.shape[axis]
    for pixels in (-length, -5, -1, 1, 3, length - 1):
        result = act(name, images, pixels / length, interpolation=interpolation)
        wanted = torch.zeros_like(images)
        kept = length - abs(pixels)
        to, source = (pixels, 0) if pixels > 0 else (0, -pixels)
        wanted.narrow(axis, min(to, length), kept).copy_(images.narrow(axis, min(source, length), kept))
        torch.testing.assert_close(result, wanted, atol=0 if interpolation == "nearest" else 1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_photometric_operations_at_their_ends(dtype):
    images = pictures(8, dtype=dtype)
    one = 255 if dtype is torch.uint8 else 1
    inverted = act("invert", images)
    torch.testing.assert_close(inverted, one - images)
    torch.testing.assert_close(act("invert", inverted), images)
    assert torch.equal(act("solarize", images, 256), inverted)  # the threshold is 0
    assert torch.equal(act("solarize", images, 0), images)  # 256
    assert torch.equal(act("posterize", images, 0.4), act("posterize", images, 0))
    for name in ("contrast", "color", "brightness", "sharpness"):
        assert torch.equal(act(name, images, 0), images)
    flat = act("contrast", images, -1)  # factor 0
    assert torch.equal(flat, flat[:, :1, :1, :1].expand_as(flat))
    assert (act("brightness", images, -1) == 0).all()
    grey = act("color", images, -1)
    torch.testing.assert_close(grey, grey[:, :1].expand_as(grey))


def test_what_has_one_level_is_neither_stretched_nor_equalized():
    images = torch.arange(0, 250, 25, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 9, 9)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(act(name, images), images)
        torch.testing.assert_close(act(name, images / 255), images / 255)


def test_solarize_counts_levels_also_in_float_images():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for strength in range(257):
        wanted = torch.where(ramp.int() >= 256 - strength, 255 - ramp, ramp)  # uint8 has no 256
        assert torch.equal(act("solarize", ramp, strength), wanted)
        torch.testing.assert_close(act("solarize", ramp / 255, strength), wanted / 255)


@value_of("crop")
@pytest.mark.parametrize("size", [(8, 16), (30, 10)], ids=str)
def test_a_crop_is_shifted_by_at_most_its_strength_and_every_place_is_equally_likely(size):
    image = pictures(4, 1, size)[3].clamp(min=1)
    height, width = size
    down, right = int(0.125 * height), int(0.125 * width)
    padded = F.pad(image, (right, right, down, down))
    places = [padded[:, y : y + height, x : x + width] for y in range(2 * down + 1) for x in range(2 * right + 1)]
    results = act("crop", image.expand(3000, -1, -1, -1), 0.125)
    counts = [(results == place).flatten(1).all(1).sum().item() for place in places]
    assert sum(counts) == 3000
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@value_of("gamma")
def test_gamma_is_a_power():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for strength in strengths("gamma", 11, limit=True):
        wanted = (ramp.double() / 255) ** (1 + strength)
        torch.testing.assert_close(act("gamma", ramp / 255, strength).double(), wanted, atol=1e-6, rtol=0)
        difference = act("gamma", ramp, strength).double() - wanted * 255
        assert difference.abs().max() < 0.5 + 1e-4


@value_of("noise")
def test_noise_is_normal_and_independent():
    images = torch.full((40, 3, 32, 32), 0.5)
    for strength in (0.02, 0.1):
        added = (act("noise", images, strength) - 0.5).double()
        count = added.numel()
        assert abs(added.mean()) < 4 * strength / math.sqrt(count)
        assert added.std().item() == pytest.approx(strength, rel=4 / math.sqrt(2 * count))
        assert scipy.stats.kstest(added.flatten().numpy()[::4] / strength, "norm").pvalue > 0.001
        shares = added / strength
        neighbours = [(shares[..., 1:], shares[..., :-1]), (shares[..., 1:, :], shares[..., :-1, :])]
        neighbours += [(shares[1:], shares[:-1]), (shares[:, 1:], shares[:, :-1])]
        for first, second in neighbours:
            assert abs((first * second).mean()) < 4 / math.sqrt(first.numel())


def test_noise_rounds_uint8_images_and_does_not_darken_them():
    images = torch.full((40, 1, 32, 32), 128, dtype=torch.uint8)
    added = act("noise", images, 0.05).double() - 128
    assert abs(added.mean()) < 4 * 0.05 * 255 / math.sqrt(added.numel())
    assert added.std().item() == pytest.approx(0.05 * 255, rel=0.03)


@value_of("blur")
@pytest.mark.parametrize("deviation", [0.2, 0.5, 1.0, 2.0, 7.0])
def test_blur_is_scipys_gaussian_filter_with_what_is_outside_left_out(deviation):
    images = pictures(4, 3, SIZE, torch.float32)

    def filtered(array):
        return scipy.ndimage.gaussian_filter(array, (0, 0, deviation, deviation), mode="constant", truncate=200)

    wanted = filtered(images.double().numpy()) / filtered(np.ones(images.shape))
    result = act("blur", images, deviation)
    torch.testing.assert_close(result.double(), torch.from_numpy(wanted), atol=2e-6, rtol=0)
    assert (act("blur", (images * 255).round().to(torch.uint8), deviation) / 255 - result).abs().max() < 0.51 / 255


@value_of("cutout")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_cutout_fills_a_square_around_any_pixel_with_grey(channels, dtype):
    height, width = 12, 20
    images = torch.zeros(2000, channels, height, width, dtype=dtype)
    results = act("cutout", images, 0.25)  # 5 pixels
    grey = torch.tensor(GREY if channels == 3 else [124] * channels)
    grey = grey.to(dtype) if dtype is torch.uint8 else grey / 255
    filled = (results != 0).any(1)
    for channel in range(channels):
        torch.testing.assert_close(results[:, channel][filled], grey[channel].expand(int(filled.sum())))
    rows, columns = filled.any(2), filled.any(1)
    assert torch.equal(filled, rows[:, :, None] & columns[:, None])  # a rectangle
    heights, widths = rows.sum(1), columns.sum(1)
    assert heights.max() == widths.max() == 5
    assert heights.min() >= 2  # a square around a pixel loses at most half of itself
    assert widths.min() >= 2
    first, last = columns.int().argmax(1), width - 1 - columns.flip(1).int().argmax(1)
    whole = (first > 0) & (last < width - 1)
    assert (widths[whole] == 5).all()
    assert (widths[~whole] < 5).any()
    centres = torch.where(first > 0, first + 2, last - 2)
    assert scipy.stats.chisquare(torch.bincount(centres, minlength=width).numpy()).pvalue > 0.001


@value_of("sample_pairing")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_sample_pairing_blends_with_another_image_of_the_batch(dtype):
    one = 255 if dtype is torch.uint8 else 1
    images = (torch.eye(5) * one).to(dtype).view(5, 1, 1, 5)
    met = set()
    for seed in range(60):
        results = act("sample_pairing", images, 0.4, seed)
        for row, result in enumerate(results):
            shares = result.flatten() / one
            partner = int(torch.cat([shares[:row], torch.zeros(1), shares[row + 1 :]]).argmax())
            assert partner != row
            met.add((row, partner))
            wanted = torch.zeros(5).index_fill(0, torch.tensor(row), 0.6).index_fill(0, torch.tensor(partner), 0.4)
            torch.testing.assert_close(shares, wanted, atol=1.001 / 255 if dtype is torch.uint8 else 1e-6, rtol=0)
    assert len(met) == 5 * 4
    alone = pictures(4)[3:]
    assert torch.equal(act("sample_pairing", alone, 0.4), alone)


def places_read(images, height, width, strength, seed=0):
    """Where an elastic deformation reads: the coordinates in pixels, NaN outside of the image."""
    ramps = torch.stack(
        [
            ((torch.arange(width) + 0.5) / width).expand(height, width),
            ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width),
        ]
    )
    read = act("elastic", ramps.expand(images, -1, -1, -1), strength, seed, interpolation="bilinear")
    outside = (read == 0).any(1, keepdim=True)
    return torch.where(outside, torch.nan, read * torch.tensor([width, height]).view(1, 2, 1, 1))


@value_of("elastic")
@pytest.mark.parametrize("size", [(28, 28), (20, 48), (96, 64)], ids=str)
@pytest.mark.parametrize("strength", [0.01, OPS["elastic"].strongest, OPS["elastic"].limit])
def test_an_elastic_deformation_never_folds(strength, size):
    height, width = size
    read = places_read(64, height, width, strength).double()
    determinants = []
    for row in (0, 1):
        for column in (0, 1):  # all four corners of a cell, as a bilinear map is steepest there
            right = (read[:, :, 1:, 1:] - read[:, :, 1:, :-1], read[:, :, :-1, 1:] - read[:, :, :-1, :-1])[row]
            down = (read[:, :, 1:, 1:] - read[:, :, :-1, 1:], read[:, :, 1:, :-1] - read[:, :, :-1, :-1])[column]
            determinants.append(right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0])
    determinants = torch.stack(determinants)
    # at the border the image is read as if its outermost pixels went on
    inside = (read[:, 0] > 1) & (read[:, 0] < width - 1) & (read[:, 1] > 1) & (read[:, 1] < height - 1)
    inside = inside[:, 1:, 1:] & inside[:, :-1, 1:] & inside[:, 1:, :-1] & inside[:, :-1, :-1]
    assert inside.float().mean() > 0.3
    assert determinants[:, inside].min() > 0
    assert determinants[:, inside].std() > 0.02  # it does deform


@pytest.mark.parametrize("strength", [0.01, OPS["elastic"].strongest])
def test_an_elastic_deformation_is_smooth_and_at_most_as_strong_as_asked(strength):
    height, width = 48, 64
    read = places_read(64, height, width, strength)
    moved = read - geometry.centres(height, width, read.device)
    inside = ~moved.isnan()
    assert moved[inside].abs().max() <= strength * width + 1e-3
    largest = moved.nan_to_num(0).abs().flatten(1).amax(1)
    assert largest.median() > 0.5 * strength * width
    assert moved[inside].mean().abs() < 0.1 * strength * width
    inner = moved[..., 3:-3, 3:-3]  # at the border the image is read as if its outermost pixels went on
    assert (inner[..., 1:] - inner[..., :-1]).nan_to_num(0).abs().max() < 0.4 * strength * width


def test_what_an_operation_draws_differs_between_images_and_seeds_and_is_kept_by_a_seed():
    drawing = []
    for name in OPS:
        image = pictures(4, 3, (32, 32))[3]
        images = pictures(100, 3, (32, 32)) if OPS[name].kind == "batch" else image.expand(100, -1, -1, -1)
        strength = extremes(name)[0]
        first, same, other = (act(name, images, strength, seed) for seed in (1, 1, 2))
        assert torch.equal(first, same)
        differs = (first != other).flatten(1).any(1).float().mean().item()
        if differs == 0:
            assert OPS[name].kind == "batch" or torch.equal(first, first[:1].expand_as(first))
            continue
        drawing.append(name)
        # of three quarter turns, one is drawn again
        assert differs > (0.5 if name == "quarter_turn" else 0.9), name
    assert drawing == [
        name for name in OPS if name in ("elastic", "quarter_turn", "crop", "noise", "cutout", "sample_pairing")
    ]


def test_without_a_generator_torchs_default_one_draws():
    images = pictures(4, 3, (32, 32))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(apply_operation("noise", images, 0.1))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    act("noise", images, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- bad input


@pytest.mark.parametrize("shape", [(), (4,), (8, 8), (2, 2, 3, 8, 8)], ids=str)
def test_images_have_three_or_four_dimensions(shape):
    with pytest.raises(UserError, match="shape"):
        act("invert", torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64], ids=str)
def test_images_are_uint8_or_float(dtype):
    with pytest.raises(ImageTypeError, match="uint8") as refused:
        act("invert", torch.zeros(2, 3, 8, 8, dtype=dtype))
    assert isinstance(refused.value, TypeError)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["identity", "invert", "rotate"])
def test_float_images_outside_of_zero_to_one_are_refused(name, value):
    images = torch.full((2, 3, 8, 8), 0.5)
    images[1, 2, 3, 4] = value
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        act(name, images, extremes(name)[0])


def test_float_images_a_hair_outside_are_clamped():
    images = torch.full((2, 3, 8, 8), 1.0005)
    for name in OPS:
        result = act(name, images, extremes(name)[0])
        assert result.max() <= 1.0005


def test_unknown_operations_are_named_with_the_closest_known_one():
    with pytest.raises(UserError, match=r"'shearx'.*shear_x"):
        act("shearx", pictures(2))


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rotate", "brightness"])
def test_strengths_are_numbers(name, strength):
    with pytest.raises(UserError, match=name):
        act(name, pictures(2), strength)


@pytest.mark.parametrize("name", [name for name in WITH_STRENGTH if not OPS[name].signed])
def test_strengths_have_a_sign_only_where_there_is_one(name):
    with pytest.raises(UserError, match=name):
        act(name, pictures(2), -0.1)


def test_as_many_strengths_as_images():
    with pytest.raises(UserError, match="3"):
        act("rotate", pictures(2), torch.ones(3))


def test_quarter_turns_need_square_images():
    with pytest.raises(UserError, match=r"quarter_turn.*18 x 26"):
        act("quarter_turn", pictures(2))


@pytest.mark.parametrize("fill", [-1, 256, (1, 2), math.nan])
def test_a_fill_is_a_level_or_one_for_each_channel(fill):
    with pytest.raises(UserError, match="fill"):
        act("rotate", pictures(2), 10, fill=fill)


def test_unknown_interpolations_are_refused():
    with pytest.raises(UserError, match=r"bicubic.*bilinear"):
        act("rotate", pictures(2), 10, interpolation="bicubic")


# ---- the registry


def test_every_operation_has_a_value_test():
    assert VALUES == set(OPS)


def test_names_are_unique_and_the_fields_fit_together():
    for name, operation in OPS.items():
        assert operation.name == name
        assert operation.kind in ("geometric", "pointwise", "neighbourhood", "batch")
        assert (operation.strongest is None) == (operation.limit is None)
        if operation.strongest is None:
            assert not operation.signed
            assert operation.wide in (None, 0)
        else:
            assert 0 < operation.strongest <= operation.limit
            assert operation.unit
    assert set(BASE) <= set(OPS)


def test_the_wide_list_is_torchvisions():
    from torchvision.transforms import v2

    theirs = v2.TrivialAugmentWide()._AUGMENTATION_SPACE
    ours = {name.replace("_", ""): operation for name, operation in OPS.items() if operation.wide is not None}
    assert set(ours) == {name.lower() for name in theirs}
    for name, (magnitudes, signed) in theirs.items():
        operation, values = ours[name.lower()], magnitudes(31, 100, 200)
        assert operation.signed == signed
        if values is None:
            assert not operation.wide
        else:
            # posterize counts the bits that go, solarize how far the threshold sinks (in shares of 255 there)
            last = {"Posterize": lambda x: 8 - x, "Solarize": lambda x: (1 - x) * 256}.get(name, lambda x: x)
            assert last(float(values[-1])) == pytest.approx(operation.wide)


def test_autoaugments_ranges_are_torchvisions():
    from torchvision.transforms import v2

    height, width = 100, 200
    for name, (magnitudes, signed) in v2.AutoAugment()._AUGMENTATION_SPACE.items():
        (ours,) = (operation for key, operation in OPS.items() if key.replace("_", "") == name.lower())
        values = magnitudes(10, height, width)
        assert ours.signed == signed
        if values is None:
            assert ours.strongest is None
        else:
            scale = {"TranslateX": width, "TranslateY": height, "Solarize": 1 / 256, "Posterize": 1}.get(name, 1)
            last = {"Posterize": lambda x: 8 - x, "Solarize": lambda x: 1 - x}.get(name, lambda x: x)
            assert last(float(values[-1])) / scale == pytest.approx(ours.strongest)
