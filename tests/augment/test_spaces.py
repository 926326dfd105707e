"""Spaces of operations: what they allow, how they are read, and that policies keep to them."""

import dataclasses
import pickle

import pytest
import torch

from lightning_automl.augment import (
    BASE,
    OPS,
    SPACES,
    Identity,
    OperationSpace,
    Policy,
    RandAugment,
    Step,
    TrivialAugment,
    check_space,
    load_space,
)
from lightning_automl.rundir import UserError

#: What carries meaning in a chest radiograph (method file, section 6).
FORBIDDEN_IN_RADIOGRAPHS = ("horizontal_flip", "vertical_flip", "invert", "solarize", "posterize", "equalize", "cutout")


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_the_same_after_a_round_trip(name):
    space = SPACES[name]
    again = load_space(space.to_dict())
    assert (again, again.reason) == (space, space.reason)
    assert pickle.loads(pickle.dumps(space)) == space
    assert load_space(name) is space
    assert load_space(space) is space


@pytest.mark.parametrize("name", SPACES)
def test_caps_are_within_what_operations_can_do(name):
    for operation, cap in SPACES[name].caps.items():
        known = OPS[operation]
        assert (cap is None) == (known.strongest is None), operation
        assert cap is None or 0 < cap <= known.limit, operation


@pytest.mark.parametrize("name", SPACES)
def test_a_search_chooses_from_all_that_is_allowed_but_what_is_always_done(name):
    space = SPACES[name]
    assert set(space.searched()) == set(space.caps) - set(BASE)
    assert "identity" not in space.searched()
    assert space.allows("identity")
    assert space.cap("identity") is None


@pytest.mark.parametrize("operation", FORBIDDEN_IN_RADIOGRAPHS)
def test_what_carries_meaning_is_forbidden_in_radiographs(operation):
    assert not SPACES["radiograph"].allows(operation)
    with pytest.raises(UserError, match=f"{operation} is forbidden in the space 'radiograph'"):
        Policy([[Step(operation)]], "radiograph")


def test_natural_is_the_space_of_autoaugment():
    searched = SPACES["natural"].searched()
    assert len(searched) == 16
    assert {name: SPACES["natural"].cap(name) for name in searched} == {name: OPS[name].strongest for name in searched}


def test_only_histology_and_dermoscopy_turn_images_upside_down():
    assert [name for name, space in SPACES.items() if space.allows("vertical_flip")] == ["histology", "dermoscopy"]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", [TrivialAugment, RandAugment])
def test_a_random_policy_never_leaves_its_space(name, kind):
    space = SPACES[name]
    policy = kind(space=name) if kind is TrivialAugment else kind(magnitude=30, space=name)
    check_space(policy, name)
    plan = policy.draw(10_000, 3, (32, 32), torch.Generator().manual_seed(0))
    names = list(OPS)
    for place in plan.operations.unique().tolist():
        operation = names[place]
        assert space.allows(operation)
        assert operation not in BASE
        cap = space.cap(operation)
        assert cap is None or plan.strengths[plan.operations == place].abs().max() == pytest.approx(cap)
    drawn = {names[place] for place in plan.operations.unique().tolist()}
    assert drawn == policy.operations()
    assert drawn == {"identity", *space.searched()} - {"invert", "cutout", "sample_pairing"}


@pytest.mark.parametrize("name", SPACES)
def test_a_sampled_policy_never_leaves_its_space(name):
    space, generator = SPACES[name], torch.Generator().manual_seed(1)
    searched = space.searched()
    drawn = torch.rand(10_000, 3, generator=generator).tolist()
    steps = [[Step(searched[int(which * len(searched))], p, m)] for which, p, m in drawn]
    policy = Policy(steps, name)
    check_space(policy, name)
    assert policy.operations() == set(searched)
    plan = policy.draw(10_000, 3, (32, 32), generator)
    names = list(OPS)
    for place in plan.operations.unique().tolist():
        cap = space.cap(names[place])
        assert cap is None or plan.strengths[plan.operations == place].abs().max() <= cap


def test_a_policy_stronger_than_a_space_allows_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"rotate goes up to 15 degrees .* 'radiograph' allows 10;"):
        check_space(Policy([[Step("rotate", magnitude=0.5)]]), "radiograph")
    check_space(Policy([[Step("rotate", magnitude=1 / 3)]]), "radiograph")
    with pytest.raises(UserError, match="shear_x is forbidden"):
        check_space(TrivialAugment(), "radiograph")
    with pytest.raises(UserError, match="goes up to"):
        check_space(TrivialAugment(), "natural")  # wide ranges
    check_space(RandAugment(magnitude=30), "natural")
    check_space(Identity(), "radiograph")


def test_own_spaces_come_from_yaml(tmp_path):
    path = tmp_path / "knee.yaml"
    path.write_text(
        "extends: radiograph\noperations: {rotate: 15, horizontal_flip: true, elastic: false, sharpness: true}"
    )
    space = load_space(str(path))
    assert space.name == "knee"
    assert space.cap("rotate") == 15
    assert space.cap("sharpness") == OPS["sharpness"].strongest
    assert space.allows("horizontal_flip")
    assert not space.allows("elastic")
    assert space.cap("noise") == SPACES["radiograph"].cap("noise")
    assert space.reason == f"extends radiograph: {SPACES['radiograph'].reason}"  # it may not hold here any more
    assert load_space(path) == space
    assert Policy([[Step("rotate", magnitude=1)]], str(path)).strongest() == {"rotate": 15}


WRONG = {
    "radiografh": r"no space of operations is called 'radiografh' .*did you mean radiograph\?",
    "nowhere/else.yaml": "there is no such file",
}


@pytest.mark.parametrize("spec", WRONG)
def test_an_unknown_space_is_told_with_the_closest(spec):
    with pytest.raises(UserError, match=WRONG[spec]):
        load_space(spec)


WRONG_CONTENT = [
    ({"operations": {"rotat": 3}}, r"unknown image operation 'rotat'; did you mean rotate\?"),
    ({"operations": {"flip": True}}, r"'flip'; did you mean horizontal_flip or vertical_flip\?"),
    ({"operations": {"rotate": 200}}, r"allows rotate up to 200; give a number above 0 and up to 180 degrees"),
    ({"operations": {"rotate": 0}}, "leave it out to forbid it"),
    ({"operations": {"rotate": -3}}, "give a number above 0"),
    ({"operations": {"rotate": "much"}}, "rotate up to 'much'"),
    ({"operations": {"rotate": float("nan")}}, "rotate up to nan"),
    ({"operations": {"invert": 0.5}}, "invert has no strength"),
    ({"operations": {}}, "allows no operation"),
    ({"operations": {"identity": True}}, "allows no operation"),
    ({"extends": "dermoscopy", "operations": dict.fromkeys(SPACES["dermoscopy"].caps, False)}, "allows no operation"),
    ({"operations": ["rotate"]}, "needs a mapping"),
    ({"operation": {"rotate": 3}}, r"unknown key 'operation'; did you mean operations\?"),
    ({"extends": "radiografh", "operations": {}}, "did you mean radiograph"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_CONTENT)
def test_a_wrong_space_is_told_in_one_sentence(content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_space(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{rotate", "- rotate", "rotate", ""])
def test_a_file_that_holds_no_space_is_named(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_space(path)
    path.write_text("operations: {rotat: 3}")
    with pytest.raises(UserError, match=r"mine\.yaml.*did you mean rotate"):
        load_space(path)


def test_spaces_that_extend_each_other_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("extends: two.yaml")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\noperations: {rotate: 3}")
    with pytest.raises(UserError, match=r"extends goes in a circle, back to one\.yaml") as caught:
        load_space("one.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"extends goes in a circle, back to two\.yaml"):
        load_space({"extends": "two.yaml"})


@pytest.mark.parametrize("spec", [3, True, ["rotate"]])
def test_what_is_no_space_is_told(spec):
    with pytest.raises(UserError, match="is no space of operations; give one of natural"):
        load_space(spec)


def test_a_space_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPACES["natural"].name = "x"  # type: ignore[misc]
    caps = {"rotate": 5}
    space = OperationSpace("mine", caps)
    caps["invert"] = None
    assert not space.allows("invert")


def test_a_reason_that_a_command_line_takes_for_yaml_stays_a_text():
    read = {"name": 7, "reason": {"lungs": "left and right"}, "operations": {"rotate": 5}}
    assert (load_space(read).name, load_space(read).reason) == ("7", "lungs: left and right")
