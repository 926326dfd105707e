import math

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from lightning_automl.augment import BASE, SPACES, Policy, Step
from lightning_automl.augment.spaces import OperationSpace
from lightning_automl.search.autoaugment import AutoAugmentSearch
from lightning_automl.search.fast_autoaugment import FastAutoAugmentSearch
from lightning_automl.search.policies import PolicySpace, Scored, best_of, merged, space_size
from lightning_automl.search.spaces import Space

TINY = PolicySpace(SPACES["natural"], ["rotate", "invert"], sub_policies=2, length=1)


def values_of(*steps):
    return {
        f"{i}.0.{what}": value
        for i, step in enumerate(steps)
        for what, value in zip(("operation", "probability", "magnitude"), step, strict=True)
    }


def drawn(policies, rng):
    """Values of a random policy; Optuna's own sampler would take minutes for as many as here."""
    distributions = policies.distributions()
    values = {}
    for (name, distribution), share in zip(distributions.items(), rng.random(len(distributions)), strict=True):
        if isinstance(distribution, CategoricalDistribution):
            values[name] = distribution.choices[int(share * len(distribution.choices))]
        elif isinstance(distribution, FloatDistribution):
            values[name] = distribution.low + (distribution.high - distribution.low) * share
        else:
            values[name] = distribution.low + int(share * (distribution.high + 1 - distribution.low))
    return values


def test_there_are_as_many_policies_as_in_the_paper():
    assert space_size(16, 11, 10, 10) == 1760**10
    assert AutoAugmentSearch("natural").policies().size == 1760**10
    assert FastAutoAugmentSearch("natural").policies().size is None


def test_a_policy_has_thirty_parameters():
    names = list(FastAutoAugmentSearch().policies().distributions())
    assert len(names) == 30
    assert names[:3] == ["0.0.operation", "0.0.probability", "0.0.magnitude"]
    assert names[-1] == "4.1.magnitude"


def test_any_values_become_a_policy():
    policy = TINY.policy(values_of(("rotate", 0.25, 0.5), ("invert", 1.0, 0.125)))
    assert policy == Policy([[Step("rotate", 0.25, 0.5)], [Step("invert", 1.0, 0.125)]], SPACES["natural"])
    assert policy.strongest() == {"rotate": 15, "invert": None}


def test_evenly_spaced_values_become_shares():
    policies = PolicySpace(SPACES["natural"], ["rotate", "invert"], 2, 1, probabilities=11, magnitudes=10)
    policy = policies.policy(values_of(("rotate", 3, 9), ("invert", 10, 3)))
    assert policy.sub_policies == ((Step("rotate", 0.3, 1.0),), (Step("invert", 1.0, 1 / 3),))


@pytest.mark.parametrize("method", [FastAutoAugmentSearch, AutoAugmentSearch])
@pytest.mark.parametrize("name", SPACES)
def test_sampled_policies_never_leave_their_space(name, method):
    space = SPACES[name]
    policies = method(name).policies()
    rng = np.random.default_rng(0)
    for _ in range(10_000 if method is FastAutoAugmentSearch else 100):
        strongest = policies.policy(drawn(policies, rng)).strongest()
        assert strongest.keys() <= space.caps.keys()
        for operation, strength in strongest.items():
            assert strength is None or strength <= space.caps[operation]


@pytest.mark.parametrize("name", SPACES)
def test_what_the_base_augmentation_does_is_not_searched(name):
    operations = FastAutoAugmentSearch(name).policies().operations
    assert not {*BASE, "identity"} & set(operations)
    assert {*operations, *BASE} >= SPACES[name].caps.keys()


def test_operations_that_do_nothing_to_the_images_are_not_searched_unless_named():
    assert "color" in FastAutoAugmentSearch("natural").policies(channels=3).operations
    assert "color" not in FastAutoAugmentSearch("natural").policies(channels=1).operations
    assert "color" in FastAutoAugmentSearch("natural", operations=["color"]).policies(channels=1).operations
    assert "quarter_turn" in FastAutoAugmentSearch("histology").policies(3, (8, 8)).operations
    assert "quarter_turn" not in FastAutoAugmentSearch("histology").policies(3, (8, 9)).operations


@pytest.mark.parametrize("method", [FastAutoAugmentSearch(), AutoAugmentSearch()], ids=lambda each: type(each).__name__)
def test_studies_know_the_space_again(method):
    space = method.policies().as_space()
    assert Space.parse(space.describe()) == space
    assert space.distributions() == method.policies().distributions()


@pytest.mark.parametrize(
    "method",
    [
        FastAutoAugmentSearch("radiograph", ["rotate"], 1, 3, 2, 1, "min", "error"),
        AutoAugmentSearch("histology", None, 2, 3, 1, 6, 5),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_method_can_be_made_again_from_its_arguments(method):
    again = type(method)(**method.arguments())
    assert again.arguments() == method.arguments()
    assert again.policies().describe() == method.policies().describe()


def test_the_best_are_the_smallest_and_of_equal_ones_the_earliest():
    scored = [Scored(number, {}, value) for number, value in enumerate([0.5, None, 0.1, 0.5, 0.3])]
    assert [each.number for each in best_of(scored, 3)] == [2, 4, 0]
    assert [each.number for each in best_of(scored, 9)] == [2, 4, 0, 3]
    assert [each.number for each in best_of(scored, 3, "maximize")] == [0, 3, 4]


def test_merging_keeps_each_sub_policy_once():
    first = Scored(0, values_of(("rotate", 0.5, 0.5), ("invert", 0.5, 0.1)), 0.0)
    second = Scored(1, values_of(("invert", 0.5, 0.9), ("rotate", 0.5, 0.25)), 0.0)  # invert has no strength
    policy = merged(TINY, [first, second, first])
    assert [steps[0].operation for steps in policy.sub_policies] == ["rotate", "invert", "rotate"]
    with pytest.raises(ValueError, match="no policy was scored"):
        merged(TINY, [])


def test_what_is_hardly_ever_done_is_not_kept():
    seldom = Scored(0, values_of(("rotate", 0.049, 0.5), ("invert", 0.05, 0.1)), 0.0)
    never = Scored(1, values_of(("rotate", 0.0, 0.5), ("invert", 0.01, 0.1)), 0.0)
    assert [[step.operation for step in steps] for steps in merged(TINY, [seldom, never]).sub_policies] == [["invert"]]
    assert merged(TINY, [never]).operations() == {"identity"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"operations": ["shearx"]}, "unknown image operation 'shearx'; did you mean shear_x"),
        ({"space": "radiograph", "operations": ["rotate", "invert"]}, "invert is forbidden in the space 'radiograph'"),
        ({"operations": ["rotate", "rotate"]}, "operations has rotate twice"),
        ({"operations": []}, "there is no operation to search"),
        ({"space": "x-ray"}, "no space of operations is called 'x-ray'"),
        ({"space": {"name": "own", "operations": {"crop": True}}}, "there is no operation to search"),
        ({"keep": 0}, "keep is 0"),
        ({"sub_policies": 0}, "sub_policies is 0"),
        ({"length": 0}, "length is 0"),
        ({"rounds": 0}, "rounds is 0; it must be 1 or more"),
        ({"reduce": "max"}, "unknown reduce 'max'; known: mean, min"),
        ({"objective": "auroc"}, "unknown objective 'auroc'; known: loss, error"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        FastAutoAugmentSearch(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("trials", "folds", "sentence"),
    [
        (4, 5, "keep is 5, of 4 trials"),
        (0, 5, "trials is 0"),
        (5, 1, "folds is 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(trials, folds, sentence):
    FastAutoAugmentSearch(keep=5).check(5, 2)
    with pytest.raises(ValueError, match=sentence):
        FastAutoAugmentSearch(keep=5).check(trials, folds)


def test_single_levels_are_refused():
    for arguments in ({"probabilities": 1}, {"magnitudes": 1}):
        with pytest.raises(ValueError, match="give 2 values or more"):
            AutoAugmentSearch(**arguments)


def test_spaces_of_a_user_are_searched_as_they_are():
    own = OperationSpace("own", {"rotate": 7.0, "vertical_flip": None})
    policies = FastAutoAugmentSearch(own).policies()
    assert policies.operations == ("rotate", "vertical_flip")
    values = {name: "rotate" if name.endswith("operation") else 1.0 for name in policies.distributions()}
    assert math.isclose(policies.policy(values).strongest()["rotate"], 7.0)
