"""Policies: what they draw, how they are kept in files, and that they are transforms of torchvision's kind."""

import copy
import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import AutoAugmentPolicy, v2

from lightning_automl.augment import (
    OPS,
    AutoAugment,
    Identity,
    ImagePolicy,
    ImageTypeError,
    OperationSpace,
    Policy,
    RandAugment,
    Step,
    TimmAugment,
    TrivialAugment,
    load_policy,
    policy_from_dict,
    policy_to_dict,
    save_policy,
)
from lightning_automl.augment.exchange import TORCHVISION
from lightning_automl.augment.policy import PLACES
from lightning_automl.augment.published import numbers
from lightning_automl.rundir import UserError

SEARCHED = [
    [Step("rotate", 0.3, 0.5), Step("invert", 0.8)],
    [Step("color", 1.0, 1.0, -1), Step("equalize", 0.25, 0.7)],
    [Step("translate_x", 0.6, 0.25)],
]

POLICIES = [
    Policy(SEARCHED),
    Policy(SEARCHED, "natural", "bilinear", 10.0),
    Policy(
        [[Step("zoom", 0.5, 0.5)]], {"name": "mine", "operations": {"zoom": 0.2, "rotate": 3}}, fill=[1.0, 2.0, 3.0]
    ),
    Policy.identity(),
    Identity(),
    Identity("radiograph"),
    AutoAugment("svhn"),
    AutoAugment("imagenet", "natural"),
    TrivialAugment(),
    TrivialAugment("histology", bins=11),
    RandAugment(),
    RandAugment(3, 15, "dermoscopy"),
    TimmAugment("rand-m9-mstd0.5-inc1"),
    TimmAugment("original"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def test_every_class_of_policy_is_in_the_list_of_this_file():
    from lightning_automl.augment.policy import _classes

    assert {type(policy).__name__ for policy in POLICIES} == set(_classes())


# Files


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_is_the_same_after_a_round_trip(policy, tmp_path):
    path = tmp_path / "policy.json"
    save_policy(policy, path)
    again = load_policy(path)
    assert again == policy
    assert type(again) is type(policy)
    assert hash(again) == hash(policy)
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy
    images = noise(20, 3, 16, 16)
    torch.testing.assert_close(again.apply(images, generator()), policy.apply(images, generator()))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_workers_get_a_policy_that_draws_the_same(policy):
    for again in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert again == policy
        left, right = (each.draw(8, 3, (16, 16), generator()) for each in (again, policy))
        assert torch.equal(left.operations, right.operations)
        assert torch.equal(left.strengths, right.strengths)
        assert torch.equal(left.seeds, right.seeds)


def test_policies_differ_when_their_arguments_do():
    assert len(set(POLICIES)) == len(POLICIES)
    assert Policy(SEARCHED) != Policy(SEARCHED[:2])


def test_the_file_says_version_class_and_arguments(tmp_path):
    save_policy(TrivialAugment("radiograph"), tmp_path / "policy.json")
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["version"] == 1
    assert content["policy"] == "TrivialAugment"
    assert content["arguments"]["space"]["operations"]["rotate"] == 10


WRONG_FILES = {
    "{": "is no JSON",
    "[]": "holds no policy",
    "{}": "holds no policy",
    '{"version": 2, "policy": "Identity", "arguments": {}}': "a policy of version 2 and this release reads version 1",
    '{"version": true, "policy": "Identity"}': "of version True",
    '{"version": 1, "policy": "TrivialAugmnt"}': r"unknown policy 'TrivialAugmnt'; did you mean TrivialAugment\?",
    '{"version": 1, "policy": null}': "unknown policy None",
    '{"version": 1, "policy": "Identity", "argument": {}}': "unknown key 'argument'; known: version, policy, arguments",
    '{"version": 1, "policy": ["a"]}': "unknown policy",
    '{"version": 1, "policy": "Identity", "arguments": []}': "are a mapping",
    '{"version": 1, "policy": "Identity", "arguments": {"strength": 3}}': "Identity does not take.*strength",
    '{"version": 1, "policy": "Policy", "arguments": {"sub_policies": 3}}': "not a list of lists",
    '{"version": 1, "policy": "Policy", "arguments": {"sub_policies": []}}': "no sub-policies",
    '{"version": 1, "policy": "Policy", "arguments": {"sub_policies": [[]]}}': "a sub-policy without steps",
    '{"version": 1, "policy": "Policy", "arguments": {"sub_policies": [[3]]}}': "3 is no step",
    '{"version": 1, "policy": "Policy", "arguments": {"sub_policies": [[{"operation": "rotat"}]]}}': "mean rotate",
    '{"version": 1, "policy": "RandAugment", "arguments": {"magnitude": 31}}': "whole number from 0 to 30",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_named_and_told_in_one_sentence(text, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(UserError, match=WRONG_FILES[text]) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_an_unreadable_file_are_told(tmp_path):
    with pytest.raises(UserError, match="there is no policy file"):
        load_policy(tmp_path / "policy.json")
    with pytest.raises(UserError, match=r"is a folder; give the policy file in it, .*policy\.json"):
        load_policy(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no JSON"):
        load_policy(tmp_path / "binary.json")


def test_a_policy_of_another_package_is_not_written(tmp_path):
    class Own(Identity):
        pass

    with pytest.raises(UserError, match="Own cannot be written"):
        save_policy(Own(), tmp_path / "policy.json")
    assert not list(tmp_path.iterdir())


# Steps and sub-policies


WRONG_STEPS = [
    ({"operation": "shearx"}, r"unknown image operation 'shearx'; did you mean shear_x\?"),
    ({"operation": "rotate", "probability": 1.5}, r"rotate has the probability 1.5; give a number in \[0, 1\]"),
    ({"operation": "rotate", "probability": -0.1}, "probability -0.1"),
    ({"operation": "rotate", "magnitude": 2}, "magnitude 2"),
    ({"operation": "rotate", "magnitude": math.nan}, "magnitude nan"),
    ({"operation": "rotate", "magnitude": "1"}, "magnitude '1'"),
    ({"operation": "rotate", "magnitude": True}, "magnitude True"),
    ({"operation": "rotate", "sign": 2}, "give -1, 0 or 1"),
    ({"operation": "posterize", "sign": 1}, "one way only"),
    ({"operation": "rotate", "magnitud": 1}, r"unknown key 'magnitud'; did you mean magnitude\?"),
    ({"probability": 1.0}, "needs operation"),
    ({"operation": None}, "the operation of a step is None; give a name"),
    ({"operation": ["rotate"]}, "give a name, such as rotate"),
    ("rotate", "'rotate' is no step"),
]


@pytest.mark.parametrize(("step", "message"), WRONG_STEPS)
def test_a_wrong_step_is_told_in_one_sentence(step, message):
    with pytest.raises(UserError, match=message):
        Policy([[step]])


def test_numbers_of_numpy_are_numbers():
    step = Step("rotate", np.float32(0.5), np.float64(0.25))
    assert step == Step("rotate", 0.5, 0.25)
    assert type(step.probability) is float


def test_quarter_turns_are_refused_for_all_images_that_are_not_square():
    policy = Policy([[Step("quarter_turn", 0.0)]])
    for images in (noise(2, 3, 8, 9), noise(3, 8, 9)):
        with pytest.raises(UserError, match="quarter_turn needs square images and these have 8 x 9 pixels"):
            policy.apply(images)
    assert policy.apply(noise(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_a_policy_is_json_whatever_numbers_it_was_given(tmp_path):
    policy = Policy([[Step("rotate", 1, np.float32(0.5), np.int64(-1))]], fill=(1, np.float32(2), 3))
    save_policy(policy, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy
    assert policy.fill == [1, 2, 3]


def test_the_words_of_a_space_make_no_other_policy():
    plain, told = ({"name": "mine", "operations": {"rotate": 3}, "reason": reason} for reason in ("", "since"))
    assert TrivialAugment(plain) == TrivialAugment(told)
    assert hash(TrivialAugment(plain)) == hash(TrivialAugment(told))
    assert TrivialAugment(plain) != TrivialAugment({**plain, "operations": {"rotate": 4}})
    steps = [[Step("rotate")]]
    assert Policy(steps, plain) + Policy(steps, told) == Policy(steps, plain)


def test_an_unknown_interpolation_is_told():
    with pytest.raises(UserError, match="known: nearest, bilinear"):
        TrivialAugment(interpolation="bicubic")


def test_magnitudes_are_shares_of_what_the_space_allows():
    step = Step("rotate", magnitude=0.5)
    assert Policy([[step]]).strength(step) == 15
    assert Policy([[step]], "radiograph").strength(step) == 5
    assert Policy([[step]], "dermoscopy").strongest() == {"rotate": 90}


def test_merging_keeps_each_sub_policy_once():
    first = Policy([[Step("rotate", 0.5, 0.5)], [Step("invert", 0.5, 0.1)]])
    second = Policy([[Step("invert", 0.5, 0.9)], [Step("rotate", 0.5, 0.6)], [Step("rotate", 0.5, 0.5)]])
    merged = first + second
    assert merged.sub_policies == (*first.sub_policies, (Step("rotate", 0.5, 0.6),))
    assert len(merged) == 3
    assert first.merge() == first
    assert len(AutoAugment("imagenet") + AutoAugment("imagenet")) == len(
        {tuple(map(str, s)) for s in numbers("imagenet")}
    )
    with pytest.raises(UserError, match="another space cannot be merged: None and 'natural'"):
        first.merge(Policy([[Step("rotate")]], "natural"))
    with pytest.raises(UserError, match="another fill cannot be merged: None and 3"):
        first.merge(Policy([[Step("rotate")]], fill=3))
    with pytest.raises(TypeError, match="unsupported operand"):
        first + TrivialAugment()


def test_merged_steps_are_as_strong_as_they_were():
    space = OperationSpace("wide", {name: known.limit for name, known in OPS.items()})
    policy = AutoAugment("cifar10", space)
    assert policy.strongest()["rotate"] == pytest.approx(30 * 2 / 9)
    assert policy.merge().strongest() == pytest.approx(policy.strongest())
    assert Policy([[Step("rotate", magnitude=0.5)]], space).merge(policy).strongest()["rotate"] == 90


# Draws


def test_sub_policies_are_drawn_uniformly():
    count = 10_000
    policy = Policy([[Step("rotate", magnitude=(place + 1) / 25, sign=1)] for place in range(25)])
    plan = policy.draw(count, 3, (32, 32), generator())
    found = np.unique(plan.strengths.numpy(), return_counts=True)[1]
    assert len(found) == 25
    chi_square = ((found - count / 25) ** 2 / (count / 25)).sum()
    assert chi_square < 51.2  # 24 degrees of freedom, p = 0.001


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_step_is_done_as_often_as_its_probability_says(probability):
    count = 10_000
    plan = Policy([[Step("identity"), Step("rotate", probability)]]).draw(count, 3, (32, 32), generator())
    done = (plan.operations[:, 1] == PLACES["rotate"]).float().mean().item()
    assert abs(done - probability) <= 3 * math.sqrt(probability * (1 - probability) / count)


def test_signs_are_drawn_where_operations_have_two_and_are_not_fixed():
    steps = [Step("rotate"), Step("color", sign=-1), Step("solarize"), Step("translate_y", sign=1)]
    strengths = Policy([steps]).draw(10_000, 3, (32, 32), generator()).strengths
    assert abs((strengths[:, 0] == 30).float().mean() - 0.5) < 0.015
    assert abs((strengths[:, 0] == -30).float().mean() - 0.5) < 0.015
    assert (strengths[:, 1] == -0.9).all()
    assert (strengths[:, 2] == 256).all()
    assert (strengths[:, 3] > 0).all()


def test_the_decisions_of_a_step_are_independent():
    steps = [Step("rotate", 0.5), Step("color", 0.5)]
    plan = Policy([steps, steps]).draw(10_000, 3, (32, 32), generator())
    columns = [plan.operations[:, 0] != PLACES["identity"], plan.operations[:, 1] != PLACES["identity"]]
    columns += [plan.strengths[:, 0] > 0, plan.strengths[:, 1] > 0, plan.seeds[:, 0] % 2, plan.seeds[:, 1] > 2**30]
    correlations = np.corrcoef(torch.stack([column.double() for column in columns]).numpy())
    assert np.abs(correlations - np.eye(len(columns))).max() < 0.04


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_image_draws_the_same_whatever_follows_in_its_batch(policy):
    few, many = (policy.draw(count, 3, (16, 16), generator()) for count in (5, 12))
    assert torch.equal(few.operations, many.operations[:5])
    assert torch.equal(few.strengths, many.strengths[:5])
    assert torch.equal(few.seeds, many.seeds[:5])


STRONG = [Policy([[Step("noise", 1.0, 1.0), Step("rotate")]]), RandAugment(4, 30), TimmAugment("rand-m10-n6-inc1")]


@pytest.mark.parametrize("policy", STRONG, ids=repr)
def test_a_seed_decides_all(policy):
    images = noise(100, 3, 16, 16)
    state = generator(3)
    first = policy.apply(images, state)
    assert torch.equal(first, policy.apply(images, generator(3)))
    for other in (policy.apply(images, state), policy.apply(images, generator(4))):
        assert (first != other).flatten(1).any(1).float().mean() > 0.9
    torch.manual_seed(3)  # without a generator it is torch's own
    assert torch.equal(first, policy(images))
    assert torch.equal(images, noise(100, 3, 16, 16))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_generator_elsewhere_than_on_the_cpu_is_refused(policy):
    if isinstance(policy, Identity):
        return  # draws nothing

    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(RuntimeError, match="plans are drawn on the CPU"):
        policy.draw(4, 3, (8, 8), Elsewhere())


# Random policies


def test_trivial_augment_draws_the_bins_of_torchvision():
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    policy = TrivialAugment()
    height, width, count = 40, 64, 60_000
    plan = policy.draw(count, 3, (height, width), generator())
    assert plan.operations.shape == (count, 1)
    assert set(policy.drawn) == {TORCHVISION.get(name, "identity") for name in space}
    expected = count / len(space)
    for name, (bins, signed) in space.items():
        ours = TORCHVISION.get(name, "identity")
        strengths = plan.strengths[plan.operations == PLACES[ours]].numpy()
        assert abs(len(strengths) - expected) < 4 * math.sqrt(expected)
        theirs = bins(31, height, width)
        if theirs is None:
            continue
        theirs = theirs.double().numpy()
        if ours == "solarize":
            theirs = 256 * (1 - theirs)
        elif ours == "posterize":
            strengths, theirs = strengths.round(), 8 - theirs
        elif ours.startswith("translate"):
            theirs = theirs / (width if ours == "translate_x" else height)
        values, found = np.unique(np.abs(strengths).round(6), return_counts=True)
        wanted, shares = np.unique(theirs.round(6), return_counts=True)
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=2e-6)
        wanted_counts = shares / 31 * len(strengths)
        assert ((found - wanted_counts) ** 2 / wanted_counts).sum() < 59.7, name  # 30 degrees of freedom, p = 0.001
        negative = (strengths < 0).mean()
        assert abs(negative - (0.5 * 30 / 31 if signed else 0)) < 0.05


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_has_the_operations_and_strengths_of_torchvision(magnitude):
    space = v2.RandAugment._AUGMENTATION_SPACE
    policy = RandAugment(3, magnitude)
    plan = policy.draw(5_000, 3, (32, 32), generator())
    assert plan.operations.shape == (5_000, 3)
    counts = Counter(plan.operations.flatten().tolist())
    assert len(counts) == len(space)
    expected = 15_000 / len(space)
    assert sum((found - expected) ** 2 / expected for found in counts.values()) < 34.5  # 13 degrees, p = 0.001
    for name, (bins, signed) in space.items():
        ours = TORCHVISION.get(name, "identity")
        strengths = plan.strengths[plan.operations == PLACES[ours]]
        theirs = bins(31, 32, 32)
        if theirs is None:
            continue
        theirs = float(theirs[magnitude])
        if ours == "solarize":
            theirs = 256 * (1 - theirs)
        elif ours == "posterize":
            strengths, theirs = strengths.round(), 8 - theirs
        elif ours.startswith("translate"):
            theirs = theirs / 32
        assert strengths.abs().numpy() == pytest.approx(theirs, abs=1e-5), name
        assert (len(strengths.unique()) == 2) == (signed and magnitude > 0)


def test_random_policies_in_a_space_draw_what_it_allows():
    drawn = TrivialAugment("radiograph").drawn
    assert "identity" in drawn
    assert {"zoom", "elastic", "gamma", "noise", "blur"} <= set(drawn)
    assert not {"horizontal_flip", "crop", "invert", "shear_x"} & set(drawn)
    assert set(TrivialAugment("natural").drawn) == set(TrivialAugment().drawn)
    assert RandAugment(space="histology").drawn == TrivialAugment("histology").drawn


WRONG_ARGUMENTS = [
    (lambda: RandAugment(0), "at least 1"),
    (lambda: RandAugment(1.5), "whole number"),
    (lambda: RandAugment(magnitude=-1), "from 0 to 30"),
    (lambda: RandAugment(magnitude=9, bins=5), "with 5 bins"),
    (lambda: TrivialAugment(bins=1), "at least 2"),
    (lambda: AutoAugment("cifar100"), "known: cifar10, svhn, imagenet"),
    (lambda: AutoAugment(["cifar10"]), "known: cifar10, svhn, imagenet"),
    (lambda: TrivialAugment(fill="red"), "fill is 'red'; give a level from 0 to 255, or a list"),
    (lambda: TrivialAugment(fill=[0, None, 0]), "give a level from 0 to 255"),
    (lambda: Policy([[Step("rotate")]], fill=256), "give a level from 0 to 255"),
    (lambda: TrivialAugment(fill=[]), "give a level from 0 to 255"),
    (lambda: RandAugment(fill=True), "give a level from 0 to 255"),
    (lambda: AutoAugment("cifar10", "radiograph"), "invert is forbidden in the space 'radiograph'"),
]


@pytest.mark.parametrize(("make", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


# AutoAugment


@pytest.mark.parametrize("name", [policy.value for policy in AutoAugmentPolicy])
def test_published_policies_are_those_of_torchvision(name):
    theirs = v2.AutoAugment(AutoAugmentPolicy(name))._policies
    ours = AutoAugment(name).sub_policies
    assert len(ours) == len(theirs) == 25
    for pair, steps in zip(theirs, ours, strict=True):
        converted = [Step(TORCHVISION[step], p, 0.0 if number is None else number / 9) for step, p, number in pair]
        assert list(steps) == converted


# As a transform


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_is_a_transform_of_torchvision(policy):
    gray = isinstance(policy.fill, list)
    pipeline = v2.Compose([policy, v2.ToImage()])
    picture = Image.fromarray(noise(16, 16, 3).numpy())
    torch.manual_seed(0)
    result = pipeline(picture)
    tensor = v2.functional.pil_to_tensor(picture)
    torch.manual_seed(0)
    assert torch.equal(policy(tensor), result)
    torch.manual_seed(0)
    wrapped = policy(tv_tensors.Image(tensor))
    assert isinstance(wrapped, tv_tensors.Image)
    assert torch.equal(wrapped, result)
    for sample in ((picture, 3), (tensor, torch.tensor(3)), {"image": tensor, "label": 3}):
        torch.manual_seed(0)
        out = policy(sample)
        image, label = out.values() if isinstance(out, dict) else out
        assert type(out) is type(sample)
        assert label == 3
        assert type(image) is type(sample["image"] if isinstance(sample, dict) else sample[0])
        assert torch.equal(v2.functional.to_image(image), result)
    torch.manual_seed(0)
    image, label = policy(tensor, 3)
    assert torch.equal(image, result)
    assert policy(noise(5, 3, 16, 16)).shape == (5, 3, 16, 16)
    floats = policy(torch.rand(2, 3, 16, 16)) if not policy.fill else policy(noise(2, 3, 16, 16))
    assert floats.shape == (2, 3, 16, 16)
    if not gray:
        out = policy(Image.fromarray(noise(16, 16).numpy()))
        assert (out.mode, out.size) == ("L", (16, 16))


@pytest.mark.parametrize(
    "target",
    [
        tv_tensors.BoundingBoxes(torch.tensor([[0, 0, 4, 4]]), format="XYXY", canvas_size=(16, 16)),
        tv_tensors.Mask(torch.zeros(16, 16, dtype=torch.uint8)),
        tv_tensors.KeyPoints(torch.tensor([[1, 1]]), canvas_size=(16, 16)),
        tv_tensors.Video(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
    ],
    ids=lambda target: type(target).__name__,
)
def test_what_would_not_move_with_the_image_is_refused(target):
    with pytest.raises(TypeError, match=f"{type(target).__name__} are not supported by TrivialAugment"):
        TrivialAugment()(tv_tensors.Image(noise(3, 16, 16)), target)


def test_other_inputs_are_refused():
    policy = TrivialAugment()
    with pytest.raises(TypeError, match="one image and found 0"):
        policy(3)
    with pytest.raises(TypeError, match="one image and found 2"):
        policy(tv_tensors.Image(noise(3, 16, 16)), tv_tensors.Image(noise(3, 16, 16)))
    with pytest.raises(TypeError, match="mode RGBA"):
        policy(Image.new("RGBA", (4, 4)))
    with pytest.raises(UserError, match=r"the shape \(16, 16\)"):
        policy(noise(16, 16))
    with pytest.raises(ImageTypeError, match=r"torch.int64"):
        policy(torch.zeros(2, 3, 8, 8, dtype=torch.int64))


class Noise(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(noise(3, 16, 16)), index


def test_workers_of_a_loader_augment_each_image_by_its_own_draw():
    loader = torch.utils.data.DataLoader(Noise(RandAugment(4, 30)), batch_size=4, num_workers=2, generator=generator())
    images = torch.cat([batch for batch, _ in loader])
    assert len({image.numpy().tobytes() for image in images}) > 5


# In YAML


def test_a_policy_is_named_in_yaml_by_its_short_name():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=ImagePolicy)

    def made(*arguments):
        return parser.instantiate_classes(parser.parse_args(list(arguments))).policy

    assert made("--policy", "TrivialAugment", "--policy.space", "radiograph") == TrivialAugment("radiograph")
    assert made("--policy", "TimmAugment", "--policy.config", "rand-m9-inc1") == TimmAugment("rand-m9-inc1")
    space = '{"name": "mine", "operations": {"rotate": 5}}'
    assert made("--policy", "TrivialAugment", "--policy.space", space) == TrivialAugment(json.loads(space))
    for policy in POLICIES:
        content = policy_to_dict(policy)
        text = json.dumps({"class_path": content["policy"], "init_args": content["arguments"]})
        assert made("--policy", text) == policy
        dumped = parser.dump(parser.parse_args(["--policy", text]))
        assert parser.instantiate_classes(parser.parse_string(dumped)).policy == policy


def test_the_strongest_of_each_operation_is_known():
    assert Policy(SEARCHED).strongest() == {
        "rotate": 15,
        "invert": None,
        "color": OPS["color"].strongest,
        "equalize": None,
        "translate_x": OPS["translate_x"].strongest / 4,
    }
    assert Identity().operations() == set()
    assert TrivialAugment().strongest()["rotate"] == 135
    assert RandAugment(magnitude=15).strongest()["rotate"] == 15
