"""What holds for the command as a whole: when the test split is looked at, and that nothing but time changes."""

import contextlib
import json
import re

import numpy as np
import pytest
import yaml

from lightning_automl.auto import auto, plan
from lightning_automl.rundir import read_json

pytestmark = pytest.mark.slow

#: What of a file hangs on the time or the place.
_TIMES = {"seconds", "fingerprint"}
_NAMES = ("first-place", "second-place")


def short(whole):
    """The plan with all stages but the searches for policy and architecture, of two epochs each; it tells no times."""

    def make_plan(*arguments, **keys):
        made = whole(*arguments, **keys)
        arms = [each | {"epochs": 2, "policies": ["none", "trivial_augment"]} for each in made["arms"][:1]]
        return made | {
            **{"arms": arms, "generations": [2, 2], "comparison": {"seeds": 1}, "final": {"seeds": 2}},
            **{"policy_search": None, "architecture_search": None, "search_folds": [0, 1]},
            **{"not_run": [], "why_not": {}, "sentences": ["It is short."]},
        }

    return make_plan


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes."""
    path, generator = tmp_path_factory.mktemp("data") / "images.npz", np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("val", 20), ("test", 24)):
        labels = np.arange(count) % 2
        pixels = generator.integers(0, 100, (count, 8, 8, 1)) + labels[:, None, None, None] * 40
        arrays |= {f"{split}_images": pixels.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def twice(_server, tmp_path_factory, images):
    """Two directories of the same command with the same seed, and what the data module was asked for until then."""
    place = tmp_path_factory.mktemp("invariants")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_automl.auto.strategy.TrialServer", lambda call: contextlib.nullcontext(_server))
        patch.setattr(plan, "make_plan", short(plan.make_plan))
        watched = [str(place / _NAMES[0] / name) for name in ("look.json", "selection.json", "model.json")]
        arguments = {"path": str(images), "notes": str(place / "notes"), "watched": watched}
        file = place / "images.yaml"
        file.write_text(yaml.safe_dump({"class_path": "spied_data.SpiedDataModule", "init_args": arguments}))
        for name in _NAMES:
            auto(file, budget=3600, directory=place / name, seed=5, workers=2, backbone="none")
            asked = [json.loads(line) for line in (place / "notes").read_text().splitlines()]
            found.append((place / name, asked))
    return found


def test_after_the_look_the_test_split_is_asked_for_only_when_there_is_a_model(twice):
    out, asked = twice[0]
    after = [(split, model) for split, look, _, model in asked if look]
    assert {split for split, model in after if not model} == {"train", "val"}
    assert ("test", True) in after
    assert any(split == "val" and not model for split, _, selection, model in asked if selection)
    for path in out.glob("runs/*/*/summary.json"):
        assert read_json(path)["test_opened"] == 0
    assert read_json(out / "summary.json")["test_opened"] == 1


def test_no_choice_has_trained_or_judged_on_a_fold_of_the_comparison(twice):
    out, _ = twice[0]
    look = read_json(out / "look.json")
    places = [path.parent for path in out.glob("runs/*/fold-*-seed-5/config.yaml")]
    assert places
    for place in places:
        own = yaml.safe_load((place / "config.yaml").read_text())["data"]["init_args"]
        assert own["fold"] not in look["comparison_folds"]
        assert own["without_folds"] == look["comparison_folds"]


def test_the_same_seed_gives_the_same_page_but_for_times_and_places(twice):
    pages = []
    for out, _ in twice:
        text = re.sub("|".join(_NAMES), "NAME", (out / "report.html").read_text())
        text = re.sub(r"<tr><td>(commit|started)</td>.*", "", text)  # somebody may commit in between
        text = re.sub(r"\d[\d.,]*\s*(s|min|h)\b", "TIME", text)
        pages.append(re.sub(r"(TIME\s*)+", "TIME ", text).splitlines())
    assert len(pages[0]) == len(pages[1])
    different = [(one[:300], other[:300]) for one, other in zip(*pages, strict=True) if one != other]
    assert different == []


@pytest.mark.parametrize("name", ["look", "selection", "comparison", "model", "evaluation"])
def test_the_same_seed_gives_the_same_files_but_for_times_and_places(twice, name):
    first, second = (_without_times(read_json(out / f"{name}.json")) for out, _ in twice)
    assert first == second


def _without_times(content):
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in _TIMES}
    return [_without_times(value) for value in content] if isinstance(content, list) else content
