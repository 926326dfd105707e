import json
import math
import os
import signal
import time

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import RandomSampler, TPESampler
from sklearn.datasets import load_digits
from torch import nn

from lightning_automl.augment import SPACES, Policy, Step, engine
from lightning_automl.augment.policy import PLACES
from lightning_automl.density import score_fold
from lightning_automl.rundir import read_json
from lightning_automl.search import fast_autoaugment
from lightning_automl.search.fast_autoaugment import (
    DensityMatch,
    FastAutoAugmentSearch,
    default_sampler,
    read_round,
    record_of,
    sampler_maker,
    search_round,
    seed_of,
)
from lightning_automl.search.policies import PolicySpace, best_of, merged

NATURAL = SPACES["natural"]
INVERT = [Step("invert", 1.0)]
NOTHING = [Step("rotate", 1.0, 0.0)]

#: Ten of the policy's parameters are enough to try what does not depend on their number.
SMALL = PolicySpace(NATURAL, ["rotate", "invert", "contrast"], sub_policies=2, length=1)


class Learnt(nn.Module):
    """A network with batch norm that has learnt 8x8 digits; maps uint8 images to logarithms of probabilities."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
        )

    def forward(self, images):
        return self.layers(images.float() / 255).log_softmax(1)


@pytest.fixture(scope="module")
def learnt():
    """The network, and held-out images ``(297, 1, 8, 8)`` with their labels."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy((digits.images * 15.9375).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target)
    network = Learnt()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(10):
        for rows in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            nn.functional.nll_loss(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval(), images[1500:], labels[1500:]


def brightness(images):
    """Class 1 is as probable as the image is bright."""
    share = images.float().mean((1, 2, 3)) / 255
    return torch.stack([1 - share, share], 1).log()


def grey(*levels):
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


# ---- values


@pytest.mark.parametrize(
    ("reduce", "objective", "by_hand"),
    [
        # Images of brightness 0.2 (class 0) and 0.4 (class 1), as they are and inverted: the labels' probabilities are
        # 0.8 and 0.4, and 0.2 and 0.6.
        ("mean", "loss", -(math.log(0.8) + math.log(0.4) + math.log(0.2) + math.log(0.6)) / 4),
        ("min", "loss", -(math.log(0.8) + math.log(0.6)) / 2),
        ("mean", "error", (0 + 1 + 1 + 0) / 4),
        ("min", "error", 0),
    ],
)
def test_the_value_of_a_policy_by_hand(reduce, objective, by_hand):
    match = DensityMatch(brightness, grey(51, 102), torch.tensor([0, 1]), reduce=reduce, objective=objective)
    assert match(Policy([NOTHING, INVERT]), 0) == pytest.approx(by_hand, abs=1e-6)


def test_min_is_what_the_released_code_counts(learnt):
    """https://github.com/kakaobrain/fast-autoaugment, ``search.py``, ``eval_tta``: the smallest loss of the copies, and
    right is what is right in any of them."""
    network, images, labels = learnt
    policy = Policy([INVERT, NOTHING, [Step("vertical_flip", 1.0)]])
    copies = [255 - images, images, images.flip(2)]
    with torch.no_grad():
        scores = torch.stack([network(each) for each in copies])
    losses = torch.stack([nn.functional.nll_loss(each, labels, reduction="none") for each in scores])
    right = (scores.argmax(2) == labels).any(0)
    loss, error = (DensityMatch(*learnt, reduce="min", objective=each)(policy, 0) for each in ("loss", "error"))
    assert loss == pytest.approx(float(losses.amin(0).mean()), rel=1e-5)
    assert error == pytest.approx(1 - float(right.float().mean()))


def test_probabilities_are_those_of_the_policy():
    match = DensityMatch(brightness, grey(*[51] * 4000), torch.zeros(4000, dtype=torch.int64), objective="error")
    assert match(Policy([[Step("invert", 0.3)], NOTHING]), 0) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("reduce", ["mean", "min"])
@pytest.mark.parametrize("objective", ["loss", "error"])
def test_doing_nothing_has_the_value_of_clean_images(learnt, reduce, objective):
    network, images, labels = learnt
    with torch.no_grad():
        scores = network(images)
    loss, error = nn.functional.nll_loss(scores, labels), (scores.argmax(1) != labels).float().mean()
    match = DensityMatch(*learnt, reduce=reduce, objective=objective)
    assert match.clean == pytest.approx(float(loss if objective == "loss" else error), rel=1e-5)
    for policy in (Policy.identity(), Policy([NOTHING] * 5), Policy([[Step("invert", 0.0)]])):
        assert match(policy, 0) == pytest.approx(match.clean, rel=1e-6)


def test_the_value_does_not_depend_on_the_batch(learnt):
    policy = Policy([[Step("rotate", 0.5), Step("invert", 0.1)], [Step("noise", 1.0)], [Step("cutout", 0.7)]])
    values = [DensityMatch(*learnt, batch=batch)(policy, 3) for batch in (50, 400, 10_000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_seed_decides_about_the_draws(learnt):
    match = DensityMatch(*learnt)
    policy = Policy([[Step("rotate", 0.5)]])
    assert match(policy, 1) == match(policy, 1) != match(policy, 2)


def test_scoring_changes_neither_network_nor_images(learnt):
    network, images, labels = learnt
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pixels, state = images.clone(), torch.get_rng_state()
    DensityMatch(network, images, labels)(Policy([[Step("noise"), Step("invert")]]), 0)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(images, pixels)
    assert torch.equal(torch.get_rng_state(), state)


# ---- rounds


def steepness(policy, number):
    """What the default sampler soon finds to be small where little is done."""
    return sum(step.probability * step.magnitude for steps in policy.sub_policies for step in steps)


def round_of(record, trials, score=steepness, **arguments):
    return search_round(
        SMALL, score, trials, record, lambda number: default_sampler(seed_of(0, 0, 0, number)), **arguments
    )


def seen(scored):
    return [(each.number, each.values, each.value, each.reason) for each in scored]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return round_of(tmp_path_factory.mktemp("round") / "record.jsonl", 24)


def test_a_hundred_and_a_hundred_trials_are_two_hundred(uninterrupted, tmp_path):
    record = tmp_path / "record.jsonl"
    assert len(round_of(record, 12)) == 12
    new = []
    both = round_of(record, 24, on_trial=new.append)
    assert seen(both) == seen(uninterrupted)
    assert [each.number for each in new] == list(range(12, 24))


@pytest.mark.parametrize("cut", [1, 2, 30, 250, 10_000])
def test_a_line_that_was_cut_off_is_scored_again(uninterrupted, tmp_path, cut):
    record = tmp_path / "record.jsonl"
    round_of(record, 14)
    whole = record.read_bytes()
    record.write_bytes(whole[:-cut])
    assert len(read_round(record)) < 14
    assert seen(round_of(record, 24)) == seen(uninterrupted)
    assert len(record.read_bytes().splitlines()) == 25


def test_zeros_that_a_failed_power_supply_leaves_are_dropped(uninterrupted, tmp_path):
    record = tmp_path / "record.jsonl"
    round_of(record, 12)
    record.write_bytes(record.read_bytes()[:-200] + b"\0" * 200 + b"\n")
    assert seen(round_of(record, 24)) == seen(uninterrupted)


def test_a_killed_round_goes_on(uninterrupted, tmp_path):
    record = tmp_path / "record.jsonl"

    def slowly(policy, number):
        time.sleep(0.05 if number < 10 else 600)
        return steepness(policy, number)

    child = os.fork()
    if child == 0:
        try:
            round_of(record, 24, slowly)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while len(read_round(record)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert 3 <= len(read_round(record)) < 24
    assert seen(round_of(record, 24)) == seen(uninterrupted)


def test_a_round_makes_exactly_its_trials(tmp_path):
    calls = []

    def score(policy, number):
        calls.append(number)
        return 1.0

    for trials in (5, 5, 9):
        assert len(round_of(tmp_path / "record.jsonl", trials, score)) == trials
    assert calls == list(range(9))


def test_what_is_no_number_has_failed_and_is_never_among_the_best(tmp_path):
    def score(policy, number):
        return (math.nan, math.inf, -math.inf, 1.0 + number)[number % 4]

    scored = round_of(tmp_path / "record.jsonl", 16, score)
    assert [each.state for each in scored] == ["FAIL", "FAIL", "FAIL", "COMPLETE"] * 4
    assert scored[0].reason == "the value is nan"
    assert [each.number for each in best_of(scored, 10)] == [3, 7, 11, 15]
    assert seen(read_round(tmp_path / "record.jsonl")) == seen(scored)


def test_a_network_that_gives_no_numbers_gives_a_policy_none():
    def broken(images):
        return brightness(images).where(images.float().mean((1, 2, 3))[:, None] < 100, math.nan)

    for objective in ("loss", "error"):
        match = DensityMatch(broken, grey(51, 60), torch.tensor([0, 1]), objective=objective)
        assert not math.isnan(match.clean)
        assert math.isnan(match(Policy([INVERT]), 0))


def test_the_sampler_learns(uninterrupted):
    assert np.mean([each.value for each in uninterrupted[16:]]) < np.mean([each.value for each in uninterrupted[:10]])


def test_rounds_and_folds_try_other_policies(tmp_path):
    drawn = [
        search_round(
            SMALL,
            steepness,
            1,
            tmp_path / f"{fold}-{turn}",
            lambda number, place=(fold, turn): default_sampler(seed_of(0, *place, number)),
        )
        for fold in range(2)
        for turn in range(2)
    ]
    assert len({json.dumps(each.values) for (each,) in drawn}) == 4


def test_a_record_of_another_search_is_refused(tmp_path):
    record = tmp_path / "record.jsonl"
    round_of(record, 2, identity={"seed": 0})
    before = record.read_bytes()
    with pytest.raises(ValueError, match=r"was made with identity\.seed=0, now it is 1; give the former"):
        round_of(record, 3, identity={"seed": 1})
    other = PolicySpace(NATURAL, ["rotate", "invert"], sub_policies=2, length=1)
    with pytest.raises(ValueError, match=r"was made with policies\.operations"):
        search_round(other, steepness, 3, record, lambda seed: RandomSampler(seed=seed), identity={"seed": 0})
    assert record.read_bytes() == before


def test_two_processes_do_not_write_one_record(tmp_path):
    record = tmp_path / "record.jsonl"

    def score(policy, number):
        with pytest.raises(ValueError, match="is being written by another process"):
            round_of(record, 2)
        return 1.0

    assert len(round_of(record, 1, score)) == 1


# ---- what is kept


@pytest.fixture
def planted(monkeypatch):
    """Let `solarize` put noise in the place of the image, and `posterize` do nothing, however strong they are."""
    destroys, harmless = PLACES["solarize"], PLACES["posterize"]
    real = engine.apply

    def apply(images, plan, **arguments):
        destroyed = (plan.operations == destroys).any(1)
        others = plan.operations.clone()
        others[(others == destroys) | (others == harmless)] = PLACES["identity"]
        result = real(images, engine.Plan(others, plan.strengths, plan.seeds), **arguments)
        noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        result[destroyed] = noise[destroyed]
        return result

    monkeypatch.setattr(fast_autoaugment.engine, "apply", apply)


def test_a_harmful_operation_is_never_kept_and_a_harmless_one_is(planted, learnt, tmp_path):
    policies = PolicySpace(NATURAL, ["solarize", "posterize", "rotate", "contrast", "cutout", "invert"], 3, 2)
    match = DensityMatch(*learnt)
    kept = []
    for turn in range(2):
        scored = search_round(
            policies,
            lambda policy, number, turn=turn: match(policy, seed_of(0, 0, turn, number)),
            100,
            tmp_path / f"{turn}.jsonl",
            lambda number, turn=turn: default_sampler(seed_of(0, 0, turn, number)),
        )
        kept += best_of(scored, 5)
    operations = [step.operation for steps in merged(policies, kept).sub_policies for step in steps]
    assert "solarize" not in operations
    assert operations.count("posterize") >= 5
    assert len(merged(policies, kept)) <= 2 * 5 * 3


# ---- the action of a trial process


class Told:
    """The end of a channel that only keeps what is said."""

    rank = 0

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def beat(self):
        self.send({"beat": True})


def spec_of(method):
    return {"class_path": f"{type(method).__module__}.{type(method).__name__}", "init_args": method.arguments()}


@pytest.fixture
def payload(finished_digits, tmp_path):
    method = FastAutoAugmentSearch(rounds=2, keep=2)
    return {
        "do": "density",
        "directory": str(finished_digits),
        "records": str(tmp_path / "density"),
        "fold": 0,
        "method": spec_of(method),
        "sampler": None,
        "trials": 3,
        "seed": 0,
    }


class OnlyRotation(FastAutoAugmentSearch):
    def policies(self, channels=3, image_size=(1, 1)):
        return PolicySpace(self.space, ["rotate"], 1, 1)


def test_a_method_of_the_users_own_is_the_one_that_scores(payload, tmp_path):
    score_fold({**payload, "method": spec_of(OnlyRotation(rounds=1, keep=1))}, Told())
    scored = read_round(tmp_path / "density/fold-0-round-0.jsonl")
    assert {name: value for each in scored for name, value in each.values.items() if "operation" in name} == {
        "0.0.operation": "rotate"
    }


def test_a_fold_is_scored_by_its_own_network_on_images_that_it_has_not_seen(payload, finished_digits, tmp_path):
    checkpoint = (finished_digits / "checkpoints/best.ckpt").read_bytes()
    channel = Told()
    result = score_fold(payload, channel)
    assert result["identity_value"] == pytest.approx(
        read_json(finished_digits / "summary.json")["metrics"]["val_loss"], rel=1e-3
    )
    assert result["evaluations"] == 2 * 3
    assert result["failed"] == 0
    told = [message["density"] for message in channel.messages if "density" in message]
    assert [(each["fold"], each["round"], each["number"]) for each in told] == [
        (0, t, n) for t in (0, 1) for n in range(3)
    ]
    records = [read_round(record_of(tmp_path / "density", 0, turn)) for turn in range(2)]
    assert [each.value for scored in records for each in scored] == [each["value"] for each in told]
    assert "color" not in {value for each in records[0] for value in each.values.values()}
    assert (finished_digits / "checkpoints/best.ckpt").read_bytes() == checkpoint

    silent = Told()
    assert score_fold(payload, silent)["evaluations"] == 6
    assert not [message for message in silent.messages if "density" in message]
    with pytest.raises(ValueError, match=r"identity\.seed"):
        score_fold({**payload, "seed": 1}, silent)


def test_data_that_changed_since_the_training_are_refused(payload, digits):
    data = read_json(digits / "data.json")
    (digits / "data.json").write_text(json.dumps({**data, "index": "of other data"}))
    with pytest.raises(ValueError, match="the data are not those that"):
        score_fold({**payload, "directory": str(digits)}, Told())


def test_samplers_of_a_config_get_a_seed_for_each_trial():
    make = sampler_maker({"class_path": "optuna.samplers.TPESampler", "init_args": {"multivariate": False, "seed": 5}})
    assert isinstance(make(3), TPESampler)
    first, again, other = (
        optuna.create_study(sampler=make(seed)).ask(SMALL.distributions()).params for seed in (3, 3, 4)
    )
    assert first == again != other


class Seedless(RandomSampler):
    def __init__(self):
        super().__init__(seed=0)


def test_a_sampler_without_a_seed_is_refused_before_it_is_needed():
    with pytest.raises(ValueError, match="Seedless cannot be made with a seed of its own"):
        sampler_maker({"class_path": f"{__name__}.Seedless"})


@pytest.mark.parametrize("name", ["CmaEsSampler", "GridSampler", "QMCSampler", "NSGAIISampler", "PartialFixedSampler"])
def test_samplers_that_could_not_go_on_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs more than the policies"):
        sampler_maker({"class_path": f"optuna.samplers.{name}"})
