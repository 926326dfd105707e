"""Plans on batches: what they do to an image depends on its row alone, and geometry is read once."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_automl.augment import AutoAugment, Policy, RandAugment, TrivialAugment, engine, geometry
from lightning_automl.augment.engine import Plan, apply
from lightning_automl.augment.ops import OPS
from lightning_automl.rundir import UserError

NAMES = list(OPS)
SIDE = 20


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=8, channels=3, size=(SIDE, SIDE), dtype=torch.uint8):
    coarse = torch.rand(count, channels, 5, 6, generator=generator(channels))
    images = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(torch.uint8) if dtype is torch.uint8 else images.to(dtype)


def plan_of(*rows, seed=0):
    """A plan of lists of ``(name, strength)``, one for each image."""
    length = max(map(len, rows))
    filled = [[*row, *[("identity", 0.0)] * (length - len(row))] for row in rows]
    operations = torch.tensor([[NAMES.index(name) for name, _ in row] for row in filled], dtype=torch.int64)
    strengths = torch.tensor([[strength for _, strength in row] for row in filled], dtype=torch.float64)
    return Plan.draw(operations, strengths, generator(seed))


def mixed_plan(count, length=3, seed=0, without=()):
    """Every operation in every place, with any strength."""
    operations = torch.randint(len(NAMES), (count, length), generator=generator(seed))
    operations[: len(NAMES), 0] = torch.arange(len(NAMES))[:count]
    for name in without:
        operations[operations == NAMES.index(name)] = NAMES.index("identity")
    strongest = torch.tensor([OPS[name].strongest or 0 for name in NAMES], dtype=torch.float64)[operations]
    signs = torch.tensor([-1.0 if OPS[name].signed else 1.0 for name in NAMES], dtype=torch.float64)[operations]
    signs = torch.where(torch.rand(count, length, generator=generator(seed + 1)) < 0.5, signs, 1)
    strengths = strongest * signs * torch.rand(count, length, generator=generator(seed + 2), dtype=torch.float64)
    return Plan.draw(operations, strengths, generator(seed + 3))


def policies():
    everything = [[{"operation": name, "probability": 1.0, "magnitude": 1.0}] for name in OPS]
    return {
        "every operation": Policy(everything),
        "AutoAugment": AutoAugment("cifar10"),
        "RandAugment": RandAugment(),
        "TrivialAugment": TrivialAugment(),
    }


# ---- an image's own row


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_batch_is_its_images_one_by_one(dtype, channels, interpolation):
    count = 2 * len(OPS)
    images = pictures(count, channels, dtype=dtype)
    plan = mixed_plan(count, without=["sample_pairing"])
    together = apply(images, plan, interpolation=interpolation)
    for row in range(count):
        alone = apply(images[row : row + 1], plan[row : row + 1], interpolation=interpolation)[0]
        torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=0)
    some = [7, 3, 50, 3]
    assert (
        apply(images[some], plan[some], interpolation=interpolation).float() - together[some].float()
    ).abs().max() < 1e-6
    assert torch.equal(apply(images[5], plan[5:6], interpolation=interpolation), together[5])


def test_other_images_of_the_batch_do_not_matter():
    count = 3 * len(OPS)
    images = pictures(count, dtype=torch.float32)
    plan = mixed_plan(count, without=["sample_pairing"])
    before = apply(images, plan)
    others = images.clone()
    others[::2] = torch.rand(others[::2].shape, generator=generator(9))
    torch.testing.assert_close(apply(others, plan)[1::2], before[1::2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_how_many_images_are_worked_on_at_once_does_not_matter(dtype, interpolation, monkeypatch):
    count = 4 * len(OPS)
    images, plan = pictures(count, dtype=dtype), mixed_plan(count)
    results = []
    for numbers in (2**40, 5 * images[0].numel(), 1):
        monkeypatch.setattr(engine, "_BLOCK", numbers)
        results.append(apply(images, plan, interpolation=interpolation))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=0)


def test_deformed_images_are_worked_on_a_few_at_once(monkeypatch):
    images = pictures(9)
    counts, displacements = [], geometry.displacements

    def counted(strengths, *arguments):
        counts.append(len(strengths))
        return displacements(strengths, *arguments)

    monkeypatch.setattr(geometry, "displacements", counted)
    monkeypatch.setattr(engine, "_BLOCK", 2 * images[0].numel())
    apply(images, plan_of(*[[("elastic", 0.05), ("rotate", 10)]] * 8, [("rotate", 10)]))
    assert counts == [2, 2, 2, 2]


def test_sample_pairing_takes_images_as_they_came_in():
    images = pictures(2, dtype=torch.float32)
    plan = plan_of([("invert", 0.0)], [("sample_pairing", 0.25)])
    result = apply(images, plan)
    torch.testing.assert_close(result[0], 1 - images[0])
    torch.testing.assert_close(result[1], 0.75 * images[1] + 0.25 * images[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_plan_twice_gives_the_same_in_every_memory_format_and_changes_nothing_it_is_given(dtype, memory_format):
    count = 3 * len(OPS)
    images, plan = pictures(count, dtype=dtype), mixed_plan(count)
    given = images.contiguous(memory_format=memory_format)
    before, numbers = given.clone(), [part.clone() for part in (plan.operations, plan.strengths, plan.seeds)]
    first, second = apply(given, plan), apply(given, plan)
    assert torch.equal(first, second)
    assert torch.equal(given, before)
    assert all(map(torch.equal, (plan.operations, plan.strengths, plan.seeds), numbers))
    assert (first.shape, first.dtype, first.device) == (images.shape, dtype, images.device)
    assert first.is_contiguous(memory_format=memory_format)
    assert first.isfinite().all()
    torch.testing.assert_close(first, apply(images, plan), atol=1e-6, rtol=0)


def test_steps_are_done_in_order():
    images = pictures(2)
    one, other = [("solarize", 100.0), ("brightness", -0.5)], [("brightness", -0.5), ("solarize", 100.0)]
    result = apply(images, plan_of(one, other))
    solarized = torch.where(images[0] >= 156, 255 - images[0], images[0])
    assert torch.equal(result[0], (solarized.float() * 0.5).to(torch.uint8))
    assert torch.equal(result[1], (images[1].float() * 0.5).to(torch.uint8))  # nothing is that bright any more


def test_a_plan_of_nothing_gives_a_copy():
    images = pictures(3)
    for plan in (plan_of([], [], []), plan_of(*[[("identity", 0.0), ("rotate", 0.0)]] * 3)):
        result = apply(images, plan)
        assert torch.equal(result, images)
        assert result.data_ptr() != images.data_ptr()


def test_a_plan_is_for_as_many_images():
    with pytest.raises(UserError, match=r"3 images.*2"):
        apply(pictures(2), mixed_plan(3))


def test_a_generator_of_another_device_is_a_runtime_error():
    class Elsewhere:
        device = torch.device("cuda", 0)

    for policy in policies().values():
        with pytest.raises(RuntimeError, match="CPU"):
            policy.apply(pictures(4), generator=Elsewhere())


# ---- one resampling


@pytest.fixture
def resamplings(monkeypatch):
    """How many images each call of ``geometry.resample`` had."""
    counts, original = [], geometry.resample

    def resample(images, *arguments, **keywords):
        counts.append(len(images))
        return original(images, *arguments, **keywords)

    monkeypatch.setattr(geometry, "resample", resample)
    return counts


CHAINS = {
    "two": [("rotate", 20.0), ("shear_x", 0.2)],
    "other order": [("shear_x", 0.2), ("rotate", 20.0)],
    "four": [("translate_x", 0.15), ("zoom", 0.08), ("shear_y", -0.1), ("rotate", -11.0)],
    "with a flip": [("horizontal_flip", 0.0), ("translate_y", -0.2), ("rotate", 25.0)],
    "with nothing between": [("rotate", 20.0), ("identity", 0.0), ("shear_y", 0.0), ("shear_x", 0.2)],
}


def matrix(name, strength, width, height):
    """From places of the result to places of the image."""
    centre, back = np.eye(3), np.eye(3)
    centre[:2, 2] = width / 2, height / 2
    back[:2, 2] = -width / 2, -height / 2
    about = np.eye(3)
    if name == "rotate":  # counter-clockwise on the screen, where y points down
        cosine, sine = np.cos(np.radians(strength)), np.sin(np.radians(strength))
        about[:2, :2] = [[cosine, -sine], [sine, cosine]]
    elif name == "zoom":
        about[0, 0] = about[1, 1] = 1 / (1 + strength)
    elif name == "horizontal_flip":
        about[0, 0] = -1
    if name in ("rotate", "zoom", "horizontal_flip"):
        return centre @ about @ back
    place = {"shear_x": (0, 1), "shear_y": (1, 0), "translate_x": (0, 2), "translate_y": (1, 2), "identity": (2, 2)}
    about[place[name]] += {"translate_x": -width, "translate_y": -height, "identity": 0}.get(name, 1) * strength
    return about


@pytest.mark.parametrize("chain", CHAINS)
def test_consecutive_geometric_operations_are_one_resampling_by_the_product_of_their_matrices(chain, resamplings):
    height, width = 31, 37
    images = pictures(2, 3, (height, width))
    result = apply(images, plan_of(CHAINS[chain], []))
    assert resamplings == [1]
    product = np.eye(3)
    for name, strength in CHAINS[chain]:
        product = product @ matrix(name, strength, width, height)
    image = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    wanted = np.array(image.transform(image.size, Image.Transform.AFFINE, product[:2].flatten().tolist()))
    different = (result[0].permute(1, 2, 0) != torch.from_numpy(wanted)).any(2)
    assert different.float().mean() < 0.005
    assert torch.equal(result[1], images[1])


def test_chains_of_different_images_are_read_together(resamplings):
    images = pictures(len(CHAINS), 3, (31, 37))
    apply(images, plan_of(*CHAINS.values()))
    assert sum(resamplings) == len(CHAINS)
    assert len(resamplings) == 1


def test_what_changes_pixels_between_parts_two_resamplings(resamplings):
    chain = [("rotate", 20.0), ("invert", 0.0), ("shear_x", 0.2)]
    images = pictures(1)
    result = apply(images, plan_of(chain))
    assert resamplings == [1, 1]
    for step in chain:
        images = apply(images, plan_of([step]))
    assert torch.equal(result, images)


@pytest.mark.parametrize(
    "chain",
    [
        [("horizontal_flip", 0.0), ("translate_x", 0.25)],
        [("translate_x", 0.25), ("horizontal_flip", 0.0)],
        [("rotate", 90.0), ("vertical_flip", 0.0), ("translate_y", 0.1), ("horizontal_flip", 0.0)],
        [("crop", 0.125), ("quarter_turn", 0.0), ("horizontal_flip", 0.0)],
    ],
    ids=lambda chain: " ".join(name for name, _ in chain),
)
def test_maps_by_whole_pixels_composed_are_the_maps_one_after_another(chain, resamplings):
    images = pictures(1)
    plan = plan_of(chain)
    result = apply(images, plan)
    assert resamplings == [1]
    for place in range(len(chain)):
        part = slice(place, place + 1)
        images = apply(images, Plan(plan.operations[:, part], plan.strengths[:, part], plan.seeds[:, part]))
    assert torch.equal(result, images)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_map_and_its_inverse_lose_nothing(interpolation):
    images = pictures(4, 3, (31, 37))
    for chain in ([("rotate", 20.0), ("rotate", -20.0)], [("translate_x", 0.3), ("translate_x", -0.3)]):
        result = apply(images, plan_of(*[chain] * 4), interpolation=interpolation)
        assert (result.int() - images.int()).abs().max() <= (0 if interpolation == "nearest" else 1)


@pytest.mark.parametrize("order", [1, -1], ids=["elastic first", "elastic last"])
def test_elastic_deformations_are_composed_with_affine_maps(order):
    coarse = torch.rand(16, 3, 6, 6, generator=generator())
    images = F.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1)
    chain = [("elastic", 0.05), ("rotate", 20.0), ("translate_x", 0.1)][::order]
    plan = plan_of(*[chain] * 16)
    result = apply(images, plan, interpolation="bilinear")
    apart = images
    for place in range(3):
        part = slice(place, place + 1)
        step = Plan(plan.operations[:, part], plan.strengths[:, part], plan.seeds[:, part])
        apart = apply(apart, step, interpolation="bilinear")
    inner = slice(14, -14)  # what was outside after one step is lost for the next
    assert (result - apart)[..., inner, inner].abs().mean() < 0.01
    assert (result - images)[..., inner, inner].abs().mean() > 0.05


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_elastic_deformation_is_read_at_once_with_the_maps_around_it(place):
    images = pictures(16, 3, (48, 48), torch.float32)
    there_and_back = [("rotate", 20.0), ("rotate", -20.0)]
    alone, chain = plan_of(*[[("elastic", 0.05)]] * 16), [*there_and_back, *there_and_back]
    chain.insert(2 * place, ("elastic", 0.05))
    plan = plan_of(*[chain] * 16)
    plan.seeds[:, 2 * place] = alone.seeds[:, 0]
    # nothing is lost at the border or by reading twice
    wanted, result = (apply(images, given, interpolation="bilinear") for given in (alone, plan))
    torch.testing.assert_close(result, wanted, atol=1e-4, rtol=0)


# ---- draws


@pytest.mark.parametrize("name", policies())
def test_the_same_generator_draws_the_same_and_another_one_differs(name):
    policy, images = policies()[name], pictures(400, 3, (32, 32))
    first, same, other = (policy.apply(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    differs = (first != other).flatten(1).any(1)
    changed = ((first != images) | (other != images)).flatten(1).any(1)  # both may have drawn to do nothing
    assert differs[changed].float().mean() > 0.9
    assert changed.float().mean() > 0.7


@pytest.mark.parametrize("probability", [0.0, 0.03, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", [name for name in OPS if name != "identity"])
def test_a_step_is_done_with_its_probability(name, probability):
    draws = 10_000
    policy = Policy([[{"operation": name, "probability": probability, "magnitude": 0.7}]])
    plan = policy.draw(draws, 3, (SIDE, SIDE), generator(3))
    done = (plan.operations == NAMES.index(name)).sum().item()
    assert abs(done - probability * draws) <= 3 * (draws * probability * (1 - probability)) ** 0.5
    assert ((plan.operations == NAMES.index(name)) | (plan.operations == NAMES.index("identity"))).all()
    operation = OPS[name]
    if operation.strongest is not None and done:
        strengths = plan.strengths[plan.operations == NAMES.index(name)]
        torch.testing.assert_close(
            strengths.abs().double(), torch.full((done,), 0.7 * operation.strongest, dtype=torch.float64)
        )
        negative = (strengths < 0).sum().item()
        assert abs(negative - done / 2) <= 3 * (done / 4) ** 0.5 if operation.signed else negative == 0


def test_images_are_changed_as_often_as_their_steps_probability():
    images = torch.full((10_000, 1, 1, 1), 7, dtype=torch.uint8)
    policy = Policy([[{"operation": "invert", "probability": 0.3, "magnitude": 0.0}]])
    changed = (policy.apply(images, generator()) == 248).sum().item()
    assert abs(changed - 3000) <= 3 * (10_000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_nothing_is_changed_where_the_probability_is_zero(name, dtype):
    images = pictures(32, dtype=dtype)
    policy = Policy([[{"operation": name, "probability": 0.0, "magnitude": 1.0}]])
    assert torch.equal(policy.apply(images, generator()), images)


@pytest.mark.parametrize("name", [name for name, operation in OPS.items() if operation.strongest is not None])
def test_nothing_is_changed_where_the_magnitude_is_zero(name):
    images = pictures(32, dtype=torch.float32)
    policy = Policy([[{"operation": name, "probability": 1.0, "magnitude": 0.0}]])
    assert torch.equal(policy.apply(images, generator()), images)


def test_sub_policies_are_drawn_uniformly():
    names = [name for name in OPS if name != "identity"]
    policy = Policy([[{"operation": name, "probability": 1.0, "magnitude": 1.0}] for name in names])
    plan = policy.draw(10_000, 3, (SIDE, SIDE), generator())
    counts = torch.bincount(plan.operations[:, 0], minlength=len(NAMES))[[NAMES.index(name) for name in names]]
    assert counts.sum() == 10_000
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.001
    pairs = torch.stack([plan.operations[:-1, 0], plan.operations[1:, 0]])
    assert abs(np.corrcoef(pairs.numpy())[0, 1]) < 4 / 100  # neighbours draw their own


def test_draws_of_the_steps_of_a_sub_policy_are_independent():
    step = {"operation": "rotate", "probability": 0.5, "magnitude": 1.0}
    plan = Policy([[step, step]]).draw(10_000, 3, (SIDE, SIDE), generator())
    done = plan.operations == NAMES.index("rotate")
    both = done.all(1).sum().item()
    assert abs(both - 2500) <= 3 * (10_000 * 0.25 * 0.75) ** 0.5
    signs = plan.strengths[done.all(1)] > 0
    assert abs((signs[:, 0] == signs[:, 1]).sum().item() - both / 2) <= 3 * (both / 4) ** 0.5
