"""The largest eigenvalue of a matrix that is known by its products with vectors."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_ROUNDING = 1e-6  # of the largest magnitude among the eigenvalues: no residual can be asked to be smaller


def largest_eigenvalue(
    product: Callable[[Vector], Vector],
    size: int,
    *,
    tolerance: float = 1e-3,
    iterations: int = 60,
    seed: int = 0,
    agreed: Callable[[bool], bool] = bool,
) -> float:
    """The largest (not the largest in magnitude) eigenvalue of a symmetric matrix, by the method of Lanczos.

    Golub and Van Loan, *Matrix Computations*, 4th edition, 2013, section 10.1: the eigenvalues at the ends of the
    spectrum are found first, of matrices of some hundred rows after some ten to forty products. Every new direction is
    made orthogonal to all before it, twice, so that rounding brings no eigenvalue up a second time.

    Args:
        product: Gives the matrix times a vector ``(size,)`` of norm 1.
        size: Rows of the matrix, 1 or more.
        tolerance: Residual of the eigenvector at which to end, relative to the eigenvalue; the error of the eigenvalue
            is at most that, and about its square unless the next eigenvalue is very near.
        iterations: Most products; what is known by then is returned.
        seed: Of the direction to begin with.
        agreed: Maps whether this process would end to whether all do, where several call ``product`` together.

    Returns:
        The eigenvalue; NaN when a product is not finite.
    """
    start = np.random.default_rng(seed).standard_normal(size)
    directions = (start / np.linalg.norm(start))[None]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = np.asarray(product(directions[-1]), np.float64)
        if not np.isfinite(image).all():
            value, length, ends = float("nan"), 1.0, True
        else:
            diagonal.append(float(directions[-1] @ image))
            for _ in range(2):
                image = image - directions.T @ (directions @ image)
            length = float(np.linalg.norm(image))
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
            value = float(values[-1])
            smallest = max(tolerance * abs(value), _ROUNDING * float(np.abs(values).max()))
            ends = length * abs(vectors[-1, -1]) <= smallest or len(diagonal) >= min(size, iterations)
        if agreed(bool(ends)):
            return value
        directions = np.vstack([directions, image / length])
        beside.append(length)
