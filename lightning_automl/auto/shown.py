"""Which images a report shows of a model: what it is most certain of, rightly and wrongly, of every class."""

import numpy as np
from numpy.typing import NDArray


def choose_images(probabilities: NDArray[np.floating], labels: NDArray[np.integer], most: int) -> NDArray[np.int64]:
    """Half of them recognised images, half mistaken ones, where there are as many; of each class in turn.

    Args:
        probabilities: ``(images, classes)``.
        labels: True classes ``(images,)``.
        most: How many at most.

    Returns:
        Positions, the recognised ones first, each half by class and falling certainty.
    """
    certainty, right = probabilities.max(1), probabilities.argmax(1) == labels
    recognised, mistaken = (_in_turn(certainty, labels, np.flatnonzero(each)) for each in (right, ~right))
    half = most // 2
    wrong = min(len(mistaken), max(half, most - len(recognised)))
    chosen = recognised[: most - wrong], mistaken[:wrong]
    return np.array(
        [each for part in chosen for each in sorted(part, key=lambda at: (labels[at], -certainty[at]))], int
    )


def _in_turn(certainty: NDArray[np.floating], labels: NDArray[np.integer], positions: NDArray[np.int64]) -> list[int]:
    """Positions so that each class has its most certain one before any has its second."""
    order = positions[np.argsort(-certainty[positions], kind="stable")]
    taken: dict[int, int] = {}
    turns = []
    for position in order:
        label = int(labels[position])
        turns.append((taken.setdefault(label, 0), int(position)))
        taken[label] += 1
    return [position for _, position in sorted(turns, key=lambda turn: (turn[0], -certainty[turn[1]]))]
