import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from lightning_automl.auto.duplicates import Looks, dhash, near_duplicates
from lightning_automl.data import ArraysDataModule, DigitsDataModule, LabelledImages


def grey(pixels):
    return np.asarray(pixels, np.uint8)[None, :, :, None]


def test_each_bit_says_that_a_cell_is_darker_than_its_right_neighbour():
    image = np.full((8, 9), 100)
    image[0] = [0, 10, 20, 30, 40, 50, 60, 70, 80]  # lighter and lighter
    image[1] = [80, 70, 60, 50, 40, 30, 20, 10, 0]
    image[2] = [9, 90, 9, 90, 9, 90, 9, 90, 9]
    image[3, 4:] = 103  # one step, above the margin
    image[4, 4:] = 102  # one step, within it
    expected = np.zeros((8, 8), dtype=bool)
    expected[0] = True
    expected[2, ::2] = True
    expected[3, 3] = True
    assert (dhash(grey(image))[0].reshape(8, 8) == expected).all()


def test_cells_are_means_of_areas():
    image = np.random.default_rng(0).integers(0, 256, (8, 9))
    larger = image.repeat(3, axis=0).repeat(2, axis=1)
    assert (dhash(grey(larger)) == dhash(grey(image))).all()
    # two pixels, 0 and 90, under nine cells: four of 0, one of half and half, four of 90
    assert dhash(grey([[0, 90]]))[0].reshape(8, 8)[0].tolist() == [False, False, False, True, True, False, False, False]


def test_colours_count_by_their_mean():
    image = np.random.default_rng(0).integers(0, 80, (1, 8, 9, 1))
    coloured = np.concatenate([image, 2 * image, 3 * image], axis=3).astype(np.uint8)
    assert (dhash(coloured) == dhash((2 * image).astype(np.uint8))).all()


def test_what_is_compared_after_the_hash_has_mean_0_and_length_1():
    looks = Looks.of_images(grey(np.random.default_rng(0).integers(0, 256, (24, 40))))
    assert looks.cells.mean() == pytest.approx(0, abs=1e-6)
    assert np.linalg.norm(looks.cells) == pytest.approx(1)


def scene(number, side=48):
    """Blobs of light, different for each number."""
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[:side, :side] / side
    image = np.full((side, side), 60.0)
    for _ in range(6):
        y, x, width = generator.uniform(0.1, 0.9), generator.uniform(0.1, 0.9), generator.uniform(0.05, 0.2)
        image += generator.uniform(-60, 120) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width**2)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def saved(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def dataset(images):
    pixels = np.stack([np.asarray(image) for image in images])[..., None]
    return LabelledImages(torch.from_numpy(pixels), torch.zeros(len(images), dtype=torch.long))


def found(train, test, known=()):
    names = {"train": [f"a{number}" for number in range(len(train))], "test": [f"b{n}" for n in range(len(test))]}
    return near_duplicates({"train": dataset(train), "test": dataset(test)}, names, known)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: saved(image, 60),
        lambda image: image.resize((32, 32)).resize((48, 48)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.05),
        lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    ],
    ids=["jpeg", "resized", "brighter", "weaker contrast"],
)
def test_an_image_that_was_changed_a_little_is_found_and_no_other(change):
    train = [scene(number) for number in range(40)]
    test = [change(scene(7)), scene(100), change(scene(31))]
    assert found(train, test) == [("a7", "b0"), ("a31", "b2")]


def test_an_image_that_is_much_brighter_is_another():
    assert found([scene(1)], [scene(1).point(lambda level: level + 20)]) == []


def test_flat_images_are_not_near_duplicates():
    flat = [Image.new("L", (48, 48), level) for level in (0, 1, 2, 120, 121)]
    assert found(flat, flat) == []


def test_what_is_known_to_be_equal_is_not_told_again():
    assert found([scene(1), scene(2)], [scene(1), scene(2)], known={"b0"}) == [("a1", "b1")]


def test_the_most_similar_of_all_earlier_splits_is_told():
    near, nearer = saved(scene(3), 50), saved(scene(3), 95)
    datasets = {"train": dataset([near, scene(4)]), "val": dataset([nearer]), "test": dataset([scene(3)])}
    names = {"train": ["t0", "t1"], "val": ["v0"], "test": ["e0"]}
    assert near_duplicates(datasets, names) == [("t0", "v0"), ("v0", "e0")]


def test_too_many_images_are_not_compared(monkeypatch):
    monkeypatch.setattr("lightning_automl.auto.duplicates._MOST_PAIRS", 3)
    assert found([scene(1), scene(2)], [scene(1), scene(2)]) is None


def test_blocks_do_not_change_what_is_found(monkeypatch):
    train, test = [scene(number) for number in range(12)], [saved(scene(number), 80) for number in range(5, 20)]
    whole = found(train, test)
    monkeypatch.setattr("lightning_automl.auto.duplicates._PAIRS_AT_ONCE", 1)
    monkeypatch.setattr("lightning_automl.auto.duplicates._PIXELS_AT_ONCE", 1)
    assert found(train, test) == whole == [(f"a{number}", f"b{number - 5}") for number in range(5, 12)]


def test_handwritten_digits_of_one_class_are_not_duplicates():
    data = DigitsDataModule()
    data.dataset("train")
    names = {split: [data.contents.names[row] for row in rows] for split, rows in data.split_rows.items()}
    assert near_duplicates(data.datasets, names) == []


def test_images_mapped_from_a_cache_are_compared_too(make_npz, tmp_path):
    data = ArraysDataModule(str(make_npz(tmp_path / "a.npz", side=16)))
    data.dataset("train")
    images = torch.cat([each.images for each in data.datasets.values()])
    rows = {"train": torch.arange(30), "test": torch.arange(20, 54)}
    mapped = {split: LabelledImages(images, torch.zeros(len(own)), own) for split, own in rows.items()}
    names = {split: own.tolist() for split, own in rows.items()}
    assert near_duplicates(mapped, names) == [(row, row) for row in range(20, 30)]
