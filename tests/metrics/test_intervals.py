import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap

from lightning_automl.metrics import SCORES, bootstrap_interval, clopper_pearson, mean_recall_interval
from lightning_automl.metrics.intervals import resamples
from lightning_automl.rundir import UserError


def width(interval):
    return interval.high - interval.low


def test_ten_of_ten_leave_doubt():
    assert clopper_pearson(10, 10) == pytest.approx((0.6915, 1), abs=5e-5)
    assert clopper_pearson(0, 10) == pytest.approx((0, 0.3085), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 7), (60, 600), (599, 600)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_clopper_pearson_agrees_with_scipy_and_its_definition(successes, trials, confidence):
    found = clopper_pearson(successes, trials, confidence)
    assert found == pytest.approx(tuple(binomtest(successes, trials).proportion_ci(confidence)), abs=1e-9)
    if successes:  # were the share as low as `low`, so many successes would have half the rest of the probability
        assert binom.sf(successes - 1, trials, found.low) == pytest.approx((1 - confidence) / 2)
    if successes < trials:
        assert binom.cdf(successes, trials, found.high) == pytest.approx((1 - confidence) / 2)


def test_of_no_trials_nothing_is_known():
    assert clopper_pearson(0, 0) == (0, 1)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_shares_are_refused(successes, trials):
    with pytest.raises(UserError, match=f"{successes} of {trials} is no share"):
        clopper_pearson(successes, trials)


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(UserError, match=f"confidence is {confidence}"):
        clopper_pearson(1, 2, confidence)
    with pytest.raises(UserError, match=f"confidence is {confidence}"):
        bootstrap_interval(np.mean, 4, draws=3, confidence=confidence)


def test_bootstrap_over_images_agrees_with_scipy_and_with_theory():
    values = np.random.default_rng(0).normal(size=200)
    found = bootstrap_interval(lambda rows: values[rows].mean(), 200, draws=4000)
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.05)
    assert found.undefined == 0


def test_confidence_decides_the_width():
    values = np.random.default_rng(0).normal(size=200)
    narrow, wide = (bootstrap_interval(lambda rows: values[rows].mean(), 200, confidence=c) for c in (0.5, 0.99))
    assert width(wide) / width(narrow) == pytest.approx(2.576 / 0.674, rel=0.1)


def test_the_ends_cut_off_as_much_below_as_above():
    values = iter(range(101))
    assert bootstrap_interval(lambda rows: next(values), 5, draws=101, confidence=0.9) == pytest.approx((5, 95, 0))


def test_groups_are_drawn_whole():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    members = {name: np.flatnonzero(groups == name).tolist() for name in "abc"}
    seen = set()
    for rows in resamples(6, groups, draws=50, seed=0):
        names = groups[rows]
        counts = {name: (names == name).sum() // len(members[name]) for name in "abc"}
        assert sum(counts.values()) == 3
        assert sorted(rows) == sorted(row for name in "abc" for row in members[name] * counts[name])
        seen.add(tuple(counts.values()))
    assert len(seen) == 10  # every way to draw 3 of 3 with replacement


def test_hundred_copies_of_an_image_of_a_patient_do_not_make_the_interval_narrower():
    generator = np.random.default_rng(0)
    right = generator.random(100) < 0.7
    patients = np.repeat(np.arange(20), 5)
    copied, copied_patients = np.append(right, [right[0]] * 100), np.append(patients, [0] * 100)
    before = bootstrap_interval(lambda rows: right[rows].mean(), 100, patients)
    after = bootstrap_interval(lambda rows: copied[rows].mean(), 200, copied_patients)
    assert width(after) >= width(before)
    # Images drawn one by one would promise more than there is to know.
    assert width(bootstrap_interval(lambda rows: copied[rows].mean(), 200)) < 0.8 * width(before)


def test_copies_of_all_images_change_nothing_when_patients_are_drawn():
    right = np.random.default_rng(0).random(60) < 0.7
    patients = np.repeat(np.arange(20), 3)
    copied, copied_patients = np.tile(right, 100), np.tile(patients, 100)
    before = bootstrap_interval(lambda rows: right[rows].mean(), 60, patients, draws=200)
    after = bootstrap_interval(lambda rows: copied[rows].mean(), 6000, copied_patients, draws=200)
    assert after == pytest.approx(before)


def test_same_seed_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    intervals = [bootstrap_interval(lambda rows: values[rows].mean(), 50, draws=100, seed=seed) for seed in (3, 3, 4)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_draws_without_a_value_are_left_out_and_counted():
    scores, labels = np.full((6, 2), 0.5), np.array([1, 0, 0, 0, 0, 0])
    found = bootstrap_interval(lambda rows: SCORES["auroc"](scores[rows], labels[rows]), 6)
    # The positive image is in no draw, or every one is it.
    assert found.undefined / 2000 == pytest.approx((5 / 6) ** 6 + (1 / 6) ** 6, abs=0.03)
    assert (found.low, found.high) == (0.5, 0.5)


def test_an_interval_of_a_score_that_is_never_defined_is_nan():
    low, high, undefined = bootstrap_interval(lambda rows: float("nan"), 5, draws=7)
    assert np.isnan([low, high]).all()
    assert undefined == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 1}, "1 image.* two images"),
        ({"images": 3, "groups": np.array([1, 1, 1])}, "1 group.* two groups"),
        ({"images": 3, "groups": np.array([1, 2])}, r"groups have shape \(2,\) for 3 images"),
        ({"images": 3, "draws": 0}, "draws is 0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        bootstrap_interval(lambda rows: 0.0, **options)


@pytest.mark.parametrize("hits", [0, 7, 10])
def test_the_mean_recall_interval_of_one_class_is_wilsons(hits):
    expected = binomtest(hits, 10).proportion_ci(0.95, "wilson")
    assert mean_recall_interval(np.array([hits]), np.array([10])) == pytest.approx(expected, abs=1e-12)


def test_the_mean_recall_interval_of_two_classes_by_hand():
    """All 2 of 2 right: Wilson's lower limit is 2 / (2 + 1.96**2) = 0.3424, and 1 - 0.6576 / sqrt(2) = 0.5350."""
    assert mean_recall_interval(np.array([2, 2]), np.array([2, 2])) == pytest.approx((0.5350, 1), abs=1e-4)


def test_the_mean_recall_interval_covers_as_often_as_it_says():
    trials, recalls = np.array([40, 15, 8, 90]), np.array([0.95, 0.8, 0.6, 0.99])
    generator = np.random.default_rng(0)
    found = [mean_recall_interval(generator.binomial(trials, recalls), trials) for _ in range(2000)]
    assert 0.93 < np.mean([low <= recalls.mean() <= high for low, high in found]) < 0.98


def test_the_mean_recall_interval_of_many_images_is_that_of_the_normal_approximation():
    trials, shares = np.array([4000, 1000]), np.array([0.9, 0.7])
    found = mean_recall_interval((trials * shares).astype(int), trials)
    half = 1.96 * np.sqrt((shares * (1 - shares) / trials).sum()) / 2
    assert found == pytest.approx((0.8 - half, 0.8 + half), abs=1e-3)


def test_a_class_without_an_image_says_nothing_about_the_mean_recall():
    with_it = mean_recall_interval(np.array([3, 0, 4]), np.array([5, 0, 4]))
    assert with_it == mean_recall_interval(np.array([3, 4]), np.array([5, 4]))


@pytest.mark.parametrize(("successes", "trials"), [([3], [2]), ([-1], [2]), ([0], [0])])
def test_shares_that_cannot_be_are_refused_for_the_mean_recall(successes, trials):
    with pytest.raises(UserError, match="are no shares"):
        mean_recall_interval(np.array(successes), np.array(trials))
