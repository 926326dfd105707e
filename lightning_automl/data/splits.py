"""Cut images into train, val and test: stratified, by groups where there are any, the same for the same seed."""

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_automl.rundir import UserError

Rows = NDArray[np.int64]

SPLITS = ("train", "val", "test")


def make_splits(
    labels: Rows,
    class_names: Sequence[str],
    official: NDArray[np.str_] | None = None,
    groups: NDArray[np.generic] | None = None,
    *,
    fold: int | None = None,
    folds: int = 5,
    without_folds: Sequence[int] = (),
    subset: float | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    train_on_val: bool = False,
    seed: int = 0,
) -> dict[str, Rows]:
    """Row numbers of the train, val and test split, each ascending.

    Splits that the data bring are kept. A missing test split is cut off first, then a missing val split from what
    remains. With ``fold`` the test split stays apart, and train and val together are cut into ``folds`` parts, of
    which part ``fold`` is val and the parts ``without_folds`` are left out. At last ``subset`` reduces train.

    Args:
        labels: Class ``(images,)`` of each image, in [0, classes).
        class_names: Names for messages.
        official: ``"train"``, ``"val"``, ``"test"`` or ``""`` (not said: treated as train), one an image.
        groups: One value an image; images of one group (a patient, a slide) never are in two splits.
        fold: Number of the fold, in [0, folds).
        folds: Number of folds.
        without_folds: Numbers of folds whose images are in no split, kept apart for another use; only with ``fold``.
        subset: Share of the train split to keep, in (0, 1]; smaller subsets lie within larger ones.
        val_fraction: Share of what is left after test, in (0, 1).
        test_fraction: Share of all images, in (0, 1).
        train_on_val: Put the val split into train; there is then no val split, and the test split is what it was.
        seed: Decides about everything random here.

    Raises:
        UserError: If a value is out of range, a class does not reach every split, or a group is in two splits.
    """
    _check_numbers(fold, folds, subset, val_fraction, test_fraction, seed)
    _check_without(without_folds, fold, folds)
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64).reshape(-1)
    cutter = _Cutter(labels, class_names, codes, seed)
    everything = np.arange(len(labels), dtype=np.int64)
    splits: dict[str, Rows] = {}
    if official is not None:
        unknown = sorted(set(np.unique(official)) - {*SPLITS, ""})
        if unknown:
            raise UserError(f"unknown split {str(unknown[0])!r}; known: train, val, test, or nothing")
        splits = {split: everything[official == split] for split in ("val", "test") if (official == split).any()}
        everything = everything[(official == "train") | (official == "")]
        if not len(everything):
            raise UserError("no image is in the train split; known: " + ", ".join(splits))
        cutter.check_complete({"train": everything, **splits})
        if groups is not None:
            _check_groups({"train": everything, **splits}, groups)
    missing = [split for split in ("val", "test") if split not in splits]
    wanted = ["train"] + [split for split in missing if split == "test" or fold is None]
    cutter.check_enough(everything, wanted)
    if "test" not in splits:
        everything, splits["test"] = cutter.hold_out(everything, test_fraction, reserve=len(wanted) - 1, salt=0)
    if fold is not None:
        pool = np.sort(np.concatenate([everything, splits.get("val", everything[:0])]))
        train, val = cutter.fold(pool, fold, folds, without_folds)
    elif "val" in splits:
        train, val = everything, splits["val"]
    else:
        train, val = cutter.hold_out(everything, val_fraction, reserve=1, salt=1)
    if train_on_val:
        if fold is not None:
            raise UserError("train_on_val and fold exclude each other: a fold is a val split; leave one of them out")
        train = np.sort(np.concatenate([train, val]))
    if subset is not None:
        train = cutter.reduce(train, subset)
    splits = {"train": train, **({} if train_on_val else {"val": val}), "test": splits["test"]}
    cutter.check_complete(splits)
    return splits


def cut_streams(
    rows: Rows,
    labels: Rows,
    class_names: Sequence[str],
    groups: NDArray[np.generic] | None = None,
    *,
    fraction: float,
    seed: int = 0,
) -> dict[str, Rows]:
    """Cut the train split for an architecture search: ``train`` for the weights, ``arch`` for the architecture.

    Args:
        rows: Those of the train split, ascending.
        labels: Class ``(images,)`` of each image of the index, in [0, classes).
        class_names: Names for messages.
        groups: One value an image of the index; images of one group come into one of the two.
        fraction: Share of each class that becomes ``arch``, in (0, 1); with groups about that.
        seed: Decides about everything random here.

    Returns:
        Rows by stream, each ascending, together those given.

    Raises:
        UserError: If the fraction is out of range, or some class cannot be in both.
    """
    if not 0 < fraction < 1:
        raise UserError(f"arch_fraction is {fraction}; it must lie between 0 and 1, for example 0.5")
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64).reshape(-1)
    cutter = _Cutter(labels, class_names, codes, seed)
    cutter.check_enough(rows, ["the weights' part of train", "the architecture's (arch_fraction)"])
    try:
        train, arch = cutter.hold_out(rows, fraction, reserve=1, salt=3)
    except UserError as error:
        raise UserError(
            f"arch_fraction is {fraction}, and the groups of the train split cannot be cut so that both parts hold "
            "every class; give another fraction, or images of more groups"
        ) from error
    return {"train": train, "arch": arch}


def _check_numbers(
    fold: int | None, folds: int, subset: float | None, val_fraction: float, test_fraction: float, seed: int
) -> None:
    if folds < 2:
        raise UserError(f"folds is {folds}; it must be at least 2")
    if fold is not None and not 0 <= fold < folds:
        raise UserError(f"fold is {fold}; with folds={folds} it must be between 0 and {folds - 1}")
    if subset is not None and not 0 < subset <= 1:
        raise UserError(f"subset is {subset}; it must be above 0 and at most 1, for example 0.1")
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise UserError(f"{name} is {fraction}; it must lie between 0 and 1, for example 0.2")
    if not 0 <= seed < 2**31:
        raise UserError(f"split_seed is {seed}; it must lie between 0 and {2**31 - 1}")


def _check_without(without_folds: Sequence[int], fold: int | None, folds: int) -> None:
    if not without_folds:
        return
    if fold is None:
        raise UserError(f"without_folds is {list(without_folds)} and there is no fold; give the fold that is to be val")
    outside = [number for number in without_folds if not 0 <= number < folds]
    if outside:
        raise UserError(f"without_folds names fold {outside[0]}; with folds={folds} there are 0 to {folds - 1}")
    if fold in without_folds:
        raise UserError(f"fold {fold} is to be the val split and is in without_folds too; leave it out there")
    if len({*without_folds, fold}) == folds:
        raise UserError(f"without_folds leaves none of the {folds} folds to train on; name fewer, or use more folds")


def _check_groups(splits: dict[str, Rows], groups: NDArray[np.generic]) -> None:
    owner: dict[object, str] = {}
    for split, rows in splits.items():
        for group in np.unique(groups[rows]).tolist():
            if owner.setdefault(group, split) != split:
                raise UserError(
                    f"group {str(group)!r} is in the {owner[group]} split and in the {split} split; "
                    "put all images of a group into one split"
                )


class _Cutter:
    """Cuts rows in two; what counts as a unit is an image, or a group where there are groups."""

    def __init__(self, labels: Rows, class_names: Sequence[str], groups: Rows | None, seed: int) -> None:
        self.labels = labels
        self.class_names = class_names
        self.groups = groups
        self.seed = seed
        self.unit = "image" if groups is None else "group"

    def units(self, rows: Rows) -> Rows:
        """Number of images, or of groups, ``(classes,)``."""
        labels = self.labels[rows]
        if self.groups is not None:
            labels = np.unique(np.stack([labels, self.groups[rows]]), axis=1)[0]
        return np.bincount(labels, minlength=len(self.class_names))

    def count(self, number: int) -> str:
        return f"{number} {self.unit}" if number == 1 else f"{number} {self.unit}s"

    def check_enough(self, rows: Rows, wanted: list[str]) -> None:
        units = self.units(rows)
        rarest = int(units.argmin())
        if units[rarest] < len(wanted):
            names = " and ".join([", ".join(wanted[:-1]), wanted[-1]]) if wanted[1:] else wanted[0]
            raise UserError(
                f"class {self.class_names[rarest]!r} has {self.count(int(units[rarest]))}, too few to be in {names}; "
                f"add {self.unit}s or leave the class out"
            )

    def check_complete(self, splits: dict[str, Rows]) -> None:
        for split, rows in splits.items():
            counts = np.bincount(self.labels[rows], minlength=len(self.class_names))
            if (counts == 0).any():
                name = self.class_names[int((counts == 0).argmax())]
                raise UserError(
                    f"class {name!r} has no image in the {split} split; every split needs images of every class"
                )

    def complete(self, *parts: Rows) -> bool:
        return all((np.bincount(self.labels[rows], minlength=len(self.class_names)) > 0).all() for rows in parts)

    def hold_out(self, rows: Rows, fraction: float, reserve: int, salt: int) -> tuple[Rows, Rows]:
        """Cut off about ``fraction`` of each class, at least one unit and leaving at least ``reserve``."""
        if self.groups is not None:
            return self._hold_out_groups(rows, fraction, reserve)
        # scikit-learn's stratified shuffle gives a rare class none of a small split; here each class gets at least one
        generator = np.random.default_rng([self.seed, salt])
        held = []
        for label in range(len(self.class_names)):
            own = generator.permutation(rows[self.labels[rows] == label])
            held.append(own[: min(max(1, round(fraction * len(own))), len(own) - reserve)])
        out = np.sort(np.concatenate(held))
        return np.setdiff1d(rows, out), out

    def _hold_out_groups(self, rows: Rows, fraction: float, reserve: int) -> tuple[Rows, Rows]:
        assert self.groups is not None
        small = min(fraction, 1 - fraction)
        for parts in range(min(round(1 / small), len(np.unique(self.groups[rows]))), 1, -1):
            for partition in self._grouped_folds(rows, parts):
                for part in partition:
                    others = np.setdiff1d(rows, part)
                    rest, out = (others, part) if fraction <= 0.5 else (part, others)
                    if self.complete(out) and (self.units(rest) >= reserve).all():
                        return rest, out
        raise UserError("the groups cannot be cut so that both parts hold every class; give the splits yourself")

    def _grouped_folds(self, rows: Rows, folds: int) -> Iterator[list[Rows]]:
        """Several partitions of ``rows`` by groups: the greedy one may leave a rare class out of a part."""
        from sklearn.model_selection import StratifiedGroupKFold

        assert self.groups is not None
        for attempt in range(10):
            cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=self.seed + attempt)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The least populated class")
                try:
                    yield [rows[out] for _, out in cutter.split(rows, self.labels[rows], self.groups[rows])]
                except ValueError:  # no class has that many images
                    return

    def fold(self, rows: Rows, fold: int, folds: int, without: Sequence[int] = ()) -> tuple[Rows, Rows]:
        """Cut into ``folds`` parts; returns all others but ``without`` together, and part ``fold``."""
        from sklearn.model_selection import StratifiedKFold

        units = self.units(rows)
        rarest = int(units.argmin())
        if (most := int(units[rarest])) < folds:
            what = f"class {self.class_names[rarest]!r} has {self.count(most)} outside the test split"
            advice = f"use at most folds={most}" if most > 1 else f"it needs at least 2 {self.unit}s"
            raise UserError(f"{what}, too few for {folds} folds; {advice}")
        if self.groups is None:
            cutter = StratifiedKFold(folds, shuffle=True, random_state=self.seed)
            parts = [rows[out] for _, out in cutter.split(rows, self.labels[rows])]
        else:
            tried = (parts for parts in self._grouped_folds(rows, folds) if self.complete(*parts))
            found = next(tried, None)
            if found is None:
                raise UserError(
                    f"the groups cannot be cut into {folds} folds that all hold every class; use fewer folds"
                )
            parts = found
        left = np.setdiff1d(rows, np.concatenate([parts[number] for number in {fold, *without}]))
        return left, parts[fold]

    def reduce(self, rows: Rows, share: float) -> Rows:
        """Keep about ``share`` of each class, whole groups where there are groups."""
        generator = np.random.default_rng([self.seed, 2])
        wanted = share * np.bincount(self.labels[rows], minlength=len(self.class_names))
        kept: list[Rows] = []
        if self.groups is None:
            for label in range(len(self.class_names)):
                kept.append(generator.permutation(rows[self.labels[rows] == label])[: round(wanted[label])])
        else:
            groups = self.groups[rows]
            have = np.zeros(len(self.class_names))
            for group in generator.permutation(np.unique(groups)):
                own = rows[groups == group]
                counts = np.bincount(self.labels[own], minlength=len(self.class_names))
                main = counts.argmax()
                if have[main] + counts[main] / 2 <= wanted[main]:  # nearer to the wanted number with it than without
                    kept.append(own)
                    have += counts
        result = np.sort(np.concatenate(kept)) if kept else rows[:0]
        counts = np.bincount(self.labels[result], minlength=len(self.class_names))
        if (counts == 0).any():
            numbers = np.bincount(self.labels[rows], minlength=len(self.class_names))
            label = min(np.flatnonzero(counts == 0).tolist(), key=lambda empty: int(numbers[empty]))
            number = int(numbers[label])
            least = math.ceil(100 / number) / 100
            raise UserError(
                f"subset {share} leaves none of the {number} train images of class {self.class_names[label]!r}; "
                + (f"use at least {least}" if self.groups is None else "use a larger share")
            )
        return result
