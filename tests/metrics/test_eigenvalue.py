import math

import numpy as np
import pytest

from lightning_automl.metrics.eigenvalue import largest_eigenvalue


def matrix(values, seed=0):
    values = np.asarray(values, float)
    turned = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return turned @ np.diag(values) @ turned.T


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).standard_normal(224),
        np.linspace(-5, 0.5, 60),  # the largest in magnitude is another
        -np.arange(1.0, 30),
        [3.0] + [0.0] * 50,
        [2.0] * 5 + [-2.0] * 5,
        [0.0] * 4,
        [-1.5],
    ],
    ids=["random", "mostly negative", "negative", "rank one", "multiple", "zero", "one row"],
)
def test_the_largest_eigenvalue_is_found(values):
    found = matrix(values)
    asked = []

    def product(vector):
        assert np.linalg.norm(vector) == pytest.approx(1)
        asked.append(vector)
        return found @ vector

    assert largest_eigenvalue(product, len(values)) == pytest.approx(max(values), rel=1e-3, abs=1e-12)
    assert len(asked) <= min(60, len(values))


def test_it_ends_after_so_many_products():
    found = matrix(np.linspace(0, 1, 100))
    asked = []
    value = largest_eigenvalue(lambda vector: asked.append(0) or found @ vector, 100, iterations=5, tolerance=0)
    assert len(asked) == 5
    assert 0.5 < value < 1


def test_a_product_that_is_not_finite_gives_nan():
    assert math.isnan(largest_eigenvalue(lambda vector: vector * float("inf"), 3))


def test_processes_end_together():
    found = matrix([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    answers = []
    value = largest_eigenvalue(
        lambda vector: found @ vector, 6, tolerance=1.0, agreed=lambda ends: answers.append(ends) or len(answers) == 4
    )
    assert answers[0]  # this process would have ended at once
    assert len(answers) == 4
    assert value == pytest.approx(6, rel=0.1)
