"""Policies from and to torchvision and timm: the same operations at the same strengths there and here."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from lightning_automl.augment import (
    OPS,
    AutoAugment,
    Identity,
    Policy,
    RandAugment,
    Step,
    TimmAugment,
    TrivialAugment,
    apply_operation,
    from_timm,
    from_torchvision,
    timm_augment,
    to_timm,
    to_torchvision,
)
from lightning_automl.augment.exchange import TORCHVISION
from lightning_automl.augment.policy import PLACES
from lightning_automl.rundir import UnsupportedError, UserError

timm = pytest.importorskip("timm.data.auto_augment")

SIZE = 33


def picture(seed=0):
    """A picture with smooth parts, edges and noise, uint8 ``(3, SIZE, SIZE)``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator) * 200 + 20
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[0]
    return (smooth + torch.randn(3, SIZE, SIZE, generator=generator) * 5).clamp(0, 255).to(torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def both_signs(step, policy, whole=False):
    """What a step gives here, in each of its directions; translations by whole pixels as torchvision cuts them."""
    strength = policy.strength(step) or 0.0
    if whole and step.operation.startswith("translate"):
        strength = math.trunc(strength * SIZE) / SIZE
    signs = (step.sign,) if step.sign else (1, -1) if OPS[step.operation].signed else (1,)
    images = [
        apply_operation(step.operation, picture(), sign * strength, fill=policy.filling(picture())) for sign in signs
    ]
    return [image.float() for image in images]


def difference(left, right):
    """Mean absolute difference, in levels."""
    return (left.float() - right.float()).abs().mean().item()


# torchvision


STEPS = [
    Step(name, 1.0, number / 9)
    for name in sorted(TORCHVISION.values())
    for number in ((3, 9) if OPS[name].strongest is not None else (9,))
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.operation}-{step.magnitude:.2f}")
def test_torchvision_does_the_same_with_an_exported_step(step):
    policy = Policy([[step]])
    transform = to_torchvision(policy)
    ours = both_signs(step, policy, whole=True)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        theirs = tensor(transform(pil(picture())))
        differences = [difference(image, theirs) for image in ours]
        assert min(differences) < 0.01
        torch.manual_seed(seed)  # on tensors torchvision rounds in other places
        theirs = transform(picture())
        assert min(difference(image, theirs) for image in ours) < 1
        seen.add(differences.index(min(differences)))
    assert len(seen) == len(ours)  # both directions
    if OPS[step.operation].strongest is not None:
        assert from_torchvision(transform) == policy.__class__([[*policy.sub_policies[0], Step("invert", 0.0, 0.0)]])


@pytest.mark.parametrize("name", [policy.value for policy in AutoAugmentPolicy])
def test_published_policies_come_from_torchvision_and_go_back(name):
    policy = AutoAugment(name)
    for given in (
        name,
        AutoAugmentPolicy(name),
        v1.AutoAugment(AutoAugmentPolicy(name)),
        v2.AutoAugment(AutoAugmentPolicy(name)),
    ):
        assert from_torchvision(given) == policy
    assert to_torchvision(policy)._policies == v2.AutoAugment(AutoAugmentPolicy(name))._policies
    # as a policy that is not known to be a published one
    again = to_torchvision(Policy(policy.sub_policies))
    assert from_torchvision(again).sub_policies == tuple(
        tuple(kept + [Step("invert", 0.0, 0.0)] * (2 - len(kept)))
        for kept in ([s for s in pair if s.probability and policy.strength(s) != 0] for pair in policy.sub_policies)
    )


@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
def test_random_policies_come_from_torchvision(module):
    bilinear = InterpolationMode.BILINEAR
    assert from_torchvision(module.TrivialAugmentWide(11, bilinear, [1, 2, 3])) == TrivialAugment(
        None, 11, "bilinear", [1.0, 2.0, 3.0]
    )
    assert from_torchvision(module.RandAugment(3, 4, 21, fill=7)) == RandAugment(3, 4, None, 21, fill=7)


def test_names_of_torchvision():
    assert from_torchvision("TrivialAugmentWide") == from_torchvision("ta_wide") == TrivialAugment()
    assert from_torchvision("RandAugment") == from_torchvision("ra") == RandAugment()
    assert from_torchvision("AutoAugment") == AutoAugment("imagenet")


@pytest.mark.parametrize(
    "policy", [TrivialAugment(bins=11), RandAugment(3, 4, bins=21), Identity(), AutoAugment("svhn")]
)
def test_random_policies_go_to_torchvision_and_come_back(policy):
    transform = to_torchvision(policy)
    if isinstance(policy, Identity):
        assert isinstance(transform, v2.Identity)
    else:
        assert from_torchvision(transform) == policy


def test_ten_magnitudes_in_the_natural_space_can_be_exported():
    names = [name for name in TORCHVISION.values()]
    policy = Policy(
        [[Step(name, 0.5, number / 9), Step("rotate", 0.1, 1 / 3)] for number in range(10) for name in names], "natural"
    )
    assert len(to_torchvision(policy)._policies) == len(policy)


NOT_IN_TORCHVISION = [
    (Policy([[Step("zoom")]]), "has no zoom"),
    (Policy([[Step("rotate", magnitude=0.5)]]), "15 is none of them"),
    (Policy([[Step("rotate", sign=1)]]), r"draws the sign of rotate, and the step fixes it to \+1"),
    (Policy([[Step("rotate")] * 3]), "one here has 3: rotate, rotate, rotate"),
    (Policy([[Step("rotate")]], "dermoscopy"), "180 is none of them"),
    (TrivialAugment("natural"), "not those of the space 'natural'"),
    (TimmAugment("original"), "nothing like TimmAugment"),
]


@pytest.mark.parametrize(("policy", "message"), NOT_IN_TORCHVISION)
def test_what_torchvision_cannot_express_is_named(policy, message):
    with pytest.raises(UnsupportedError, match=message):
        to_torchvision(policy)


NOT_FROM_TORCHVISION = [
    ("TrivialAugment", r"did you mean TrivialAugmentWide\?"),
    ("AugMix", "blends several augmented copies"),
    (v2.RandomHorizontalFlip(), "RandomHorizontalFlip cannot be made a policy"),
    (v2.TrivialAugmentWide(interpolation=InterpolationMode.BICUBIC), "'bicubic'; policies know nearest and bilinear"),
    (v2.RandAugment(fill={torch.Tensor: 3}), "one level, or one a channel"),
]


@pytest.mark.parametrize(("given", "message"), NOT_FROM_TORCHVISION)
def test_what_cannot_come_from_torchvision_is_told(given, message):
    with pytest.raises(UserError, match=message):
        from_torchvision(given)


def test_an_import_can_be_held_to_a_space():
    assert from_torchvision("cifar10", "natural") == AutoAugment("cifar10", "natural")
    own = v2.AutoAugment()
    own._policies = [(("Rotate", 0.5, 3), ("Contrast", 1.0, 1))]
    policy = from_torchvision(own, {"operations": {"rotate": 15, "contrast": 0.2}})
    assert policy.strongest() == pytest.approx({"rotate": 10, "contrast": 0.1})
    assert policy.space.caps == {"rotate": 15, "contrast": 0.2}  # which the base augmentation obeys
    with pytest.raises(UserError, match="invert is forbidden"):
        from_torchvision("cifar10", "radiograph")
    with pytest.raises(UserError, match="goes up to"):
        from_torchvision("TrivialAugmentWide", "natural")
    with pytest.raises(UserError, match="forbidden"):
        from_timm("rand-m9-inc1", "radiograph")


# timm


TIMM_STEPS = [
    *(
        Step(name, 1.0, magnitude)
        for name in (*sorted(TORCHVISION.values()), "solarize_add")
        for magnitude in ((0.25, 0.5, 1.0) if OPS[name].strongest is not None else (1.0,))
    ),
    *(Step(name, 1.0, 0.5, sign) for name in ("color", "contrast", "brightness", "sharpness") for sign in (-1, 1)),
]


@pytest.mark.parametrize("step", TIMM_STEPS, ids=lambda step: f"{step.operation}-{step.magnitude}-{step.sign}")
def test_timm_does_the_same_with_an_exported_step(step):
    policy = Policy([[step]], fill=9)
    transform = to_timm(policy)
    ours = both_signs(step, policy)
    seen = set()
    for seed in range(12):
        random.seed(seed)
        theirs = tensor(transform(pil(picture())))
        differences = [difference(image, theirs) for image in ours]
        assert min(differences) < 0.01
        seen.add(differences.index(min(differences)))
    assert len(seen) == len(ours)
    again = from_timm(transform).sub_policies[0][0]
    assert (again.operation, again.probability, again.sign) == (step.operation, step.probability, step.sign)
    if OPS[step.operation].strongest is not None:
        unit = 1 if step.operation.startswith(("posterize", "solarize")) else 1e-9
        assert abs(Policy([[again]]).strength(again) - policy.strength(step)) <= unit / 2


STRINGS = [
    *("rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m9-n3-mstd0.5", "rand-mstd1-tweights", "rand-m5-n1-p1-mstd101"),
    *("rand-m20-mmax30-inc1", "rand-m6-n4-t3aw-mstd1", "rand-t3a", "original", "originalr", "original-mstd0.5"),
    *("v0", "v0r", "v0r-mstd1", "3a", "rand", "rand-m9-mstd0.5-mstd2-m3-inc0"),
]


@pytest.mark.parametrize("config", STRINGS)
def test_a_string_names_the_steps_that_timm_makes_of_it(config):
    theirs = to_timm(TimmAugment(config))
    recipe = TimmAugment(config).recipe
    if config.startswith("rand"):
        steps = [(op,) for op in theirs.ops]
        assert theirs.num_layers == recipe.layers
        weights = theirs.choice_weights
        assert (weights is None) == (not recipe.weights)
        if weights is not None:
            assert weights == pytest.approx(np.array(recipe.weights) / sum(recipe.weights))
    else:
        steps = theirs.policy
        assert recipe.layers == 0
    counts = timm_augment.LEVELS
    assert [[(op.name, op.prob, op.magnitude * bool(counts[op.name].scale)) for op in ops] for ops in steps] == [
        [(name, probability, magnitude * bool(counts[name].scale)) for name, probability, magnitude in ours]
        for ours in recipe.sub_policies
    ]
    for ops in steps:
        for op in ops:
            assert op.magnitude_std == recipe.deviation
            assert (op.magnitude_max or 10) == recipe.largest


#: What timm passes to an operation, as our strength.
ARGUMENT = {
    "posterize": lambda bits: 8 - min(8, max(0, bits)),
    "solarize": lambda threshold: 256 - threshold,
    "solarize_add": lambda addition: addition,
    "blur": lambda sigma: sigma,
    "rotate": lambda degrees: degrees,
    **{name: lambda share: share for name in ("shear_x", "shear_y", "translate_x", "translate_y")},
    **{name: lambda factor: factor - 1 for name in ("contrast", "brightness", "sharpness")},
}


@pytest.mark.parametrize("name", timm_augment.LEVELS)
def test_levels_are_those_of_timm(name):
    level = timm_augment.LEVELS[name]
    theirs = timm.LEVEL_TO_ARG[name]
    if theirs is None:
        assert OPS[level.operation].strongest is None
        return
    convert = ARGUMENT.get(level.operation, (lambda f: -f) if name == "Desaturate" else (lambda f: f - 1))
    for magnitude in np.linspace(0, 13, 105):
        random.seed(0)
        found = {round(convert(theirs(magnitude, {})[0]), 9) for _ in range(20)}
        if level.uniform:  # it is up to twice that
            found = {2 * value for value in found}
        ours = {round(level.strength(magnitude, sign), 9) for sign in ((1, -1) if level.mirrored else (1,))}
        assert sorted(found) == pytest.approx(sorted(ours))


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m5-n1-p1-mstd101-inc1", "v0r-mstd1", "3a"]
)
def test_plans_have_the_strengths_that_timm_draws(config):
    count = 4_000
    policy, theirs = TimmAugment(config), to_timm(TimmAugment(config))
    plan = policy.draw(count, 3, (SIZE, SIZE), torch.Generator().manual_seed(0))
    ours = {name: plan.strengths[plan.operations == place].numpy() for name, place in PLACES.items()}
    drawn = {name: [] for name in PLACES}

    def record(name, op):
        level = timm_augment.LEVELS[name]
        convert = ARGUMENT.get(level.operation, (lambda f: -f) if name == "Desaturate" else (lambda f: f - 1))

        def done(image, *arguments, **_):
            value = convert(arguments[0]) if arguments else 0.0
            drawn[level.operation].append(random.uniform(0.1, 2 * arguments[0]) if level.uniform else value)
            return image

        op.aug_fn = done

    for op in getattr(theirs, "ops", None) or [op for ops in theirs.policy for op in ops]:
        record(op.name, op)
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        theirs(None)
    for name in PLACES:
        if name == "identity":
            continue
        left, right = np.array(drawn[name]), ours[name]
        assert abs(len(left) - len(right)) <= 4 * math.sqrt(len(left) + len(right) + 1), name
        if len(left) > 50 and OPS[name].strongest is not None:
            spread = max(left.std(), 1e-9)
            assert abs(left.mean() - right.mean()) < 5 * spread * math.sqrt(2 / len(left)) + 1e-6, name
            assert (
                abs(np.abs(left).mean() - np.abs(right).mean())
                < 5 * np.abs(left).std() * math.sqrt(2 / len(left)) + 1e-6
            )
            assert left.min() == pytest.approx(right.min(), abs=0.25 * (np.ptp(left) + 1e-6)), name
            assert left.max() == pytest.approx(right.max(), abs=0.25 * (np.ptp(left) + 1e-6)), name


def test_weighted_sets_are_drawn_without_replacement_as_timm_draws_them():
    config = "rand-m9-n3-tweights-p1"
    plan = TimmAugment(config).draw(20_000, 3, (SIZE, SIZE), torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in plan.operations[:2000].tolist())
    ours = Counter(plan.operations.flatten().tolist())
    theirs = to_timm(TimmAugment(config))
    np.random.seed(0)
    names = [op.name for op in theirs.ops]
    drawn = Counter()
    for _ in range(5_000):
        drawn.update(np.random.choice(len(names), 3, replace=False, p=theirs.choice_weights).tolist())
    for place, name in enumerate(names):
        share = ours[PLACES[timm_augment.LEVELS[name].operation]] / 20_000
        assert abs(share - drawn[place] / 5_000) < 4 * math.sqrt(max(share, 0.01) * (1 / 5_000 + 1 / 20_000)), name


@pytest.mark.parametrize("config", STRINGS)
def test_a_string_augments_batches(config):
    images = torch.stack([picture(seed) for seed in range(16)])
    first, again = (TimmAugment(config).apply(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first != images).flatten(1).any(1).sum() > 4


WRONG_STRINGS = [
    ("augmix-m5-w4-d2", "blends several augmented copies"),
    ("randaug-m9", "unknown augmentation string 'randaug-m9'"),
    ("rand-m9-inc", "unknown section 'inc'; known: m, n, p, mstd, mmax, inc, each followed by a number"),
    ("rand-k3", "unknown section 'k3'"),
    ("rand-m9.5", "m is '9.5'; give a whole number"),
    ("rand-n0", "give at least 1"),
    ("rand-p1.5", "give a probability"),
    ("rand-tweight", "known: 3a, 3aw, weights"),
    ("rand-n20-tweights", "weights has 15 operations"),
    ("original-m9", "unknown section 'm9'; known: mstd"),
    ("", "unknown augmentation string ''"),
]


@pytest.mark.parametrize(("config", "message"), WRONG_STRINGS)
def test_a_wrong_string_is_told(config, message):
    with pytest.raises(UserError, match=message):
        from_timm(config)


def test_sub_policies_of_timm_become_a_policy():
    policy = from_timm([[("Rotate", 0.8, 9), ("Color", 0.4, 3)], [("SolarizeIncreasing", 0.5, 5)]])
    assert policy.sub_policies[0][0] == Step("rotate", 0.8, 0.9)
    color = policy.sub_policies[0][1]
    assert (color.sign, policy.strength(color)) == (-1, pytest.approx(0.36))  # the factor is 0.1 + 1.8 * 0.3
    assert policy.strength(policy.sub_policies[1][0]) == 128
    assert from_timm([[("Rotate", 1.0, 3)]], "radiograph").sub_policies[0][0].magnitude == pytest.approx(0.9)
    original = from_timm(timm.auto_augment_transform("original"))
    assert original.sub_policies[0] == (Step("posterize", 0.4, 0.25), Step("rotate", 0.6, 0.9))
    assert original.strength(original.sub_policies[1][0]) == 128  # a threshold of 128


NOT_FROM_TIMM = [
    ([[("Posterize", 0.8, 2)]], "the strongest here is 4"),
    (timm.auto_augment_transform("originalr"), "posterize by 7 bits removed, and the strongest here is 4"),
    ([[("Desaturate", 1.0, 10)]], "the strongest here is 0.9"),
    ([[("GaussianBlurRand", 1.0, 10)]], "TimmAugment draws exactly"),
    ([[("TranslateX", 1.0, 3)]], r"did you mean TranslateXRel\?"),
    ([[("Rotate", 1.5, 3)]], "probability 1.5"),
    ([["Rotate"]], "give .name, probability, magnitude."),
    ([[("Rotate", 1.0, 5)]], "rotate by 15 degrees, and the strongest in the space 'radiograph' is 10"),
    (timm.rand_augment_transform("rand-m9"), "RandAugment cannot be made a policy"),
    (timm.auto_augment_transform("original-mstd0.5"), "vary"),
]


@pytest.mark.parametrize(("given", "message"), NOT_FROM_TIMM)
def test_what_cannot_come_from_timm_is_told(given, message):
    with pytest.raises(UserError, match=message):
        from_timm(given, "radiograph" if "radiograph" in message else None)


NOT_IN_TIMM = [
    (Policy([[Step("zoom")]]), "timm has no zoom"),
    (Policy([[Step("rotate", sign=-1)]]), "fixes it to -1"),
    (Policy([[Step("color")]], {"operations": {"color": 0.95}}), "a factor of 0.1 at the least"),
    (Policy([[Step("blur")]], {"operations": {"blur": 3}}), "0.1 to 2 pixels"),
    (TrivialAugment(), "a factor of 0.1 at the least"),
]


@pytest.mark.parametrize(("policy", "message"), NOT_IN_TIMM)
def test_what_timm_cannot_express_is_named(policy, message):
    with pytest.raises(UnsupportedError, match=message):
        to_timm(policy)


def test_random_policies_go_to_timm_with_our_operations():
    theirs = to_timm(RandAugment(3, 9))
    assert (theirs.num_layers, len(theirs.ops)) == (3, 14)
    assert [op.prob for op in theirs.ops] == [0.0 if name == "identity" else 1.0 for name in RandAugment().drawn]
    theirs = to_timm(TrivialAugment("natural", bins=3))
    assert (theirs.num_layers, len(theirs.ops)) == (1, 14 * 3)
    np.random.seed(0)
    random.seed(0)
    assert theirs(pil(picture())).size == (SIZE, SIZE)
    assert np.array_equal(to_timm(Identity())(pil(picture())), pil(picture()))
