from hashlib import blake2b

import numpy as np
import pytest

import lightning_automl.data.measure as measure


@pytest.mark.parametrize("shape", [(50, 6, 8, 3), (3, 5, 7, 1), (1, 300, 20, 4)])
@pytest.mark.parametrize("at_once", [1, 1000, 2**20])
def test_facts_are_those_of_each_image_alone(monkeypatch, shape, at_once):
    monkeypatch.setattr(measure, "_BYTES_AT_ONCE", at_once)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    facts = measure.measure(images)
    exact = images.astype(np.int64)
    assert np.array_equal(facts["sum"], exact.sum((1, 2)))
    assert np.array_equal(facts["squares"], (exact**2).sum((1, 2)))
    assert facts["digest"].tolist() == [blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def test_the_brightest_images_do_not_overflow():
    images = np.full((1, 66_000, 1, 1), 255, np.uint8)
    assert measure.measure(images)["squares"].item() == 66_000 * 255**2


def test_mean_and_deviation_are_exact_where_floats_would_cancel():
    images = np.full((4, 100, 100, 1), 254, np.uint8)
    images[0, 0, 0] = 255
    mean, std = measure.mean_and_std(measure.measure(images), 100 * 100)
    share = 1 / 40_000
    assert mean.item() == pytest.approx((254 + share) / 255, rel=1e-7)
    assert std.item() == pytest.approx((share * (1 - share)) ** 0.5 / 255, rel=1e-6)
