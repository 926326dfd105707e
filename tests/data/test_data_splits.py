import numpy as np
import pytest

from lightning_automl.data.splits import make_splits
from lightning_automl.rundir import UserError

COUNTS = (120, 60, 20)
LABELS = np.repeat(np.arange(3), COUNTS)
NAMES = ["a", "b", "c"]
GROUPS = np.arange(200) // 4  # groups of four images, each of one class
UNASSIGNED = np.full(200, "", dtype="<U5")


def shares(rows):
    return np.bincount(LABELS[rows], minlength=3) / np.array(COUNTS)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_splits_are_disjoint_complete_and_stratified(groups):
    splits = make_splits(LABELS, NAMES, groups=groups, val_fraction=0.25, test_fraction=0.2)
    assert list(splits) == ["train", "val", "test"]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(200))
    assert np.abs(shares(splits["test"]) - 0.2).max() <= 0.1
    assert np.abs(shares(splits["val"]) - 0.8 * 0.25).max() <= 0.1
    if groups is None:
        assert shares(splits["test"]) == pytest.approx([0.2] * 3)
        assert shares(splits["val"]) == pytest.approx([0.2] * 3)


def test_a_group_is_in_one_split():
    groups = np.random.default_rng(0).integers(0, 40, 200)  # groups of several classes
    splits = make_splits(LABELS, NAMES, groups=groups)
    parts = [set(groups[rows]) for rows in splits.values()]
    assert sum(len(part) for part in parts) == len(set(groups))


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.5, 0.7])
def test_grouped_splits_are_about_as_large_as_asked(fraction):
    splits = make_splits(LABELS, NAMES, groups=GROUPS, test_fraction=fraction)
    assert len(splits["test"]) / 200 == pytest.approx(fraction, abs=0.06)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_same_seed_gives_the_same_splits(groups):
    def splits(seed):
        parts = make_splits(LABELS, NAMES, groups=groups, seed=seed, subset=0.5)
        return {split: rows.tolist() for split, rows in parts.items()}

    assert splits(3) == splits(3)
    assert splits(3) != splits(4)


def test_official_splits_are_kept_and_what_is_missing_is_cut_from_train():
    official = UNASSIGNED.copy()
    official[::10] = "test"
    splits = make_splits(LABELS, NAMES, official)
    assert splits["test"].tolist() == list(range(0, 200, 10))
    official[1::10] = "val"
    splits = make_splits(LABELS, NAMES, official)
    assert splits["val"].tolist() == list(range(1, 200, 10))
    assert len(splits["train"]) == 160


def test_rare_classes_are_in_every_split():
    labels = np.array([0] * 500 + [1] * 3)
    splits = make_splits(labels, ["a", "b"])
    assert [int((labels[rows] == 1).sum()) for rows in splits.values()] == [1, 1, 1]


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("with_test", [False, True])
def test_folds_partition_train_and_val_and_leave_test_apart(groups, with_test):
    official = None
    if with_test:
        official = np.where(GROUPS % 5 == 0, "test", np.where(GROUPS % 5 == 1, "val", "train"))
    parts = [make_splits(LABELS, NAMES, official, groups, fold=fold, folds=3) for fold in range(3)]
    assert len({part["test"].tobytes() for part in parts}) == 1
    vals = np.concatenate([part["val"] for part in parts])
    assert len(set(vals)) == len(vals)
    assert set(vals) | set(parts[0]["test"]) == set(range(200))
    for part in parts:
        assert set(part["train"]) == set(vals) - set(part["val"])
        assert (np.bincount(LABELS[part["val"]], minlength=3) > 0).all()
        if groups is not None:
            assert not set(groups[part["train"]]) & set(groups[part["val"]])


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_images_of_folds_that_are_left_out_are_in_no_split(groups):
    whole = [make_splits(LABELS, NAMES, groups=groups, fold=fold, folds=4) for fold in range(4)]
    apart = make_splits(LABELS, NAMES, groups=groups, fold=1, folds=4, without_folds=[2, 3])
    assert apart["val"].tolist() == whole[1]["val"].tolist()
    assert apart["train"].tolist() == whole[0]["val"].tolist()
    assert apart["test"].tolist() == whole[1]["test"].tolist()


def test_a_subset_keeps_the_shares_of_the_classes_and_lies_within_larger_ones():
    whole = make_splits(LABELS, NAMES)
    half, tenth = (make_splits(LABELS, NAMES, subset=share) for share in (0.5, 0.1))
    expected = np.bincount(LABELS[whole["train"]])
    assert np.abs(np.bincount(LABELS[half["train"]]) - expected / 2).max() <= 0.5
    assert np.abs(np.bincount(LABELS[tenth["train"]]) - expected / 10).max() <= 0.5
    assert set(tenth["train"]) < set(half["train"]) < set(whole["train"])
    assert half["val"].tolist() == whole["val"].tolist()
    assert make_splits(LABELS, NAMES, subset=1.0)["train"].tolist() == whole["train"].tolist()


def test_a_subset_takes_whole_groups():
    whole = make_splits(LABELS, NAMES, groups=GROUPS)["train"]
    half = make_splits(LABELS, NAMES, groups=GROUPS, subset=0.5)["train"]
    assert np.abs(np.bincount(LABELS[half]) - np.bincount(LABELS[whole]) / 2).max() <= 4
    assert not set(GROUPS[half]) & set(GROUPS[np.setdiff1d(whole, half)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": 5}, "fold is 5; with folds=5 it must be between 0 and 4"),
        ({"fold": -1}, "fold is -1; with folds=5 it must be between 0 and 4"),
        ({"folds": 1}, "folds is 1; it must be at least 2"),
        ({"without_folds": [1]}, r"without_folds is \[1\] and there is no fold; give the fold that is to be val"),
        ({"fold": 0, "without_folds": [5]}, "without_folds names fold 5; with folds=5 there are 0 to 4"),
        ({"fold": 1, "without_folds": [1]}, "fold 1 is to be the val split and is in without_folds too"),
        ({"fold": 0, "folds": 2, "without_folds": [1]}, "without_folds leaves none of the 2 folds to train on"),
        ({"subset": 0.0}, "subset is 0.0; it must be above 0 and at most 1, for example 0.1"),
        ({"subset": 1.5}, "subset is 1.5; it must be above 0 and at most 1"),
        ({"subset": 0.01}, "subset 0.01 leaves none of the 14 train images of class 'c'; use at least 0.08"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0; it must lie between 0 and 1"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; it must lie between 0 and 1"),
        ({"seed": -1}, "split_seed is -1; it must lie between 0 and 2147483647"),
        (
            {"fold": 0, "folds": 17},
            "class 'c' has 16 images outside the test split, too few for 17 folds; use at most",
        ),
        (
            {"fold": 0, "folds": 5, "groups": GROUPS},
            "class 'c' has 4 groups outside the test split, too few for 5 folds; use at most folds=4",
        ),
    ],
)
def test_impossible_wishes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_splits(LABELS, NAMES, **settings)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (
            [0] * 9 + [1],
            None,
            "class 'b' has 1 image, too few to be in train, val and test; add images or",
        ),
        ([0] * 9, None, "class 'b' has 0 images, too few to be in train, val and test"),
        (
            [0] * 9 + [1] * 9,
            [*range(9), *[9] * 4, *[10] * 5],
            "class 'b' has 2 groups, too few to be in train, v",
        ),
    ],
)
def test_too_small_classes_are_refused(labels, groups, message):
    groups = None if groups is None else np.array(groups)
    with pytest.raises(UserError, match=message):
        make_splits(np.array(labels), ["a", "b"], groups=groups)


def test_a_class_too_small_for_any_folds_is_refused():
    with pytest.raises(UserError, match=r"class 'b' has 1 image outside the test split.*it needs at least 2 images"):
        make_splits(np.array([0] * 20 + [1] * 2), ["a", "b"], fold=0, folds=2)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_official_split_without_a_class_is_refused(split):
    official = np.array(["train", "val", "test"] * 66 + ["train", "val"])
    official[(LABELS == 2) & (official == split)] = "val" if split == "train" else "train"
    with pytest.raises(UserError, match=f"class 'c' has no image in the {split} split; every split needs images"):
        make_splits(LABELS, NAMES, official)


def test_official_splits_without_train_or_with_unknown_names_are_refused():
    with pytest.raises(UserError, match="no image is in the train split; known: test"):
        make_splits(LABELS, NAMES, np.full(200, "test"))
    with pytest.raises(UserError, match="unknown split 'dev'; known: train, val, test, or nothing"):
        make_splits(LABELS, NAMES, np.full(200, "dev"))


def test_a_group_in_two_official_splits_is_refused():
    official = np.array(["train", "test"] * 100)
    with pytest.raises(UserError, match="group '0' is in the train split and in the test split; put all images"):
        make_splits(LABELS, NAMES, official, GROUPS)


def test_groups_that_cannot_be_cut_are_refused():
    labels = np.array([0, 1, 1, 0, 0, 1, 1, 1, 1])
    groups = np.array([0, 0, 1, 1, 2, 2, 2, 2, 2])
    splits = make_splits(labels, ["a", "b"], groups=groups)
    assert sorted(len(set(groups[rows])) for rows in splits.values()) == [1, 1, 1]
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 3, 4, 5])
    groups_of_both = np.array([0, 1, 2, 0, 1, 0])
    with pytest.raises(UserError, match="class 'b' has 2 groups, too few"):
        make_splits(labels, ["a", "b"], groups=groups_of_both)
    assert [len(rows) for rows in make_splits(labels, ["a", "b"], groups=groups).values()] == [2, 2, 2]
