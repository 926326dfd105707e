import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from policy_searches import acceptance, cut_off, write_search
from test_study_report import StudyPage, trial

from lightning_automl.augment import (
    OPS,
    SPACES,
    AutoAugment,
    Identity,
    Policy,
    RandAugment,
    TrivialAugment,
    apply_operation,
    load_space,
    save_policy,
)
from lightning_automl.plots import captioned_images
from lightning_automl.results import Run, draw_pictures, report
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.policy_pictures import Examples, examples, policy_rows, strongest_rows
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.sections.policy import augmentation, space_table
from lightning_automl.results.sections.policy_search import SECTIONS, verdict
from lightning_automl.results.sections.policy_search.progress import cost
from lightning_automl.results.sections.policy_search.settings import commands
from lightning_automl.results.sections.policy_search.verdict import cautions
from lightning_automl.results.sections.policy_words import WORDS, done_words, operation_name, strength_words
from lightning_automl.rundir import UserError, write_json

SMALL = {"folds": 2, "rounds": 1, "trials": 8, "keep": 2}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def search(tmp_path):
    """Write a small finished search."""
    return lambda **keys: write_search(tmp_path / "my search", **{**SMALL, **keys})


def page_of(directory):
    return StudyPage(plain(report(directory).read_text()))


def notes_of(section):
    return " ".join(sentence for block in section.blocks for sentence in block.sentences)


def pixels(channels=3, side=16, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(30, 200, (count, channels, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("lightning_automl.results.sections.scoring.DRAWS", 200)


def plain(text):
    """As one types it."""
    return text.translate({0xA0: " ", ord("\N{MINUS SIGN}"): "-", ord("\N{MULTIPLICATION SIGN}"): "x"})


def shown(channels=3, side=16, count=2):
    return Examples(pixels(channels, side, count).numpy(), [f"original: {index}" for index in range(count)])


# ---- words


def test_every_operation_has_words_and_no_others_have():
    assert WORDS.keys() == OPS.keys()
    assert len({operation_name(name) for name in OPS}) == len(OPS)


@pytest.mark.parametrize("name", OPS)
def test_each_strength_has_words_of_its_own_with_its_sign(name):
    operation = OPS[name]
    if name == "identity":
        assert done_words(name, None) == ""
        return
    if operation.strongest is None:
        assert done_words(name, None)
        assert strength_words(name, None, operation.signed) == ""
        return
    signs = (1, -1) if operation.signed else (1,)
    said = {sign * share: done_words(name, sign * share * operation.strongest) for sign in signs for share in (0.5, 1)}
    assert len(set(said.values())) == len(said)
    assert all(said.values())
    assert done_words(name, 0.0) == ""
    text = strength_words(name, operation.strongest, operation.signed)
    assert text.startswith("±") == operation.signed
    assert any(character.isdecimal() for character in text)


def test_words_say_the_direction_that_images_show():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 4], image[..., 4, 8], image[..., 8, 4] = 50, 100, 150  # middle, right, bottom

    def place(changed, level):
        return tuple(int(found[0]) for found in torch.where(changed[0, 0] == level))

    def of(name, strength):
        return done_words(name, strength), apply_operation(name, image, strength)

    words, moved = of("translate_x", -2 / 9)
    assert (words.split()[:2], place(moved, 50)) == (["moved", "left"], (4, 2))
    words, moved = of("translate_y", 2 / 9)
    assert (words.split()[:2], place(moved, 50)) == (["moved", "down"], (6, 4))
    words, turned = of("rotate", 90)
    assert words.startswith("turned left")
    assert place(turned, 100) == (0, 4)  # what was at the right is on top
    words, sheared = of("shear_x", 0.25)
    assert words.startswith("sheared to the left")
    assert place(sheared, 150)[1] < place(sheared, 50)[1]  # the bottom more than the middle
    words, sheared = of("shear_y", 0.25)
    assert words.startswith("sheared upwards")
    assert place(sheared, 100)[0] < place(sheared, 50)[0]


def test_factors_levels_and_bits_are_those_that_are_applied():
    assert plain(done_words("contrast", -0.9)) == "contrast x 0.10"
    assert done_words("solarize", 56.0) == "solarized from level 200 on"
    assert done_words("posterize", 4.0) == "4 of 8 bits kept"
    assert done_words("posterize", 0.3) == ""
    assert done_words("rotate", 0.01) == "turned left by less than 0.1°"
    assert done_words("color", 0.9, channels=1) == ""
    assert done_words("translate_x", 4.0) == "moved out of the image"


# ---- pictures


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_space_is_shown_with_each_allowed_operation_at_its_cap_in_both_directions(name, channels):
    space = SPACES[name]
    rows = strongest_rows(space.caps, shown(channels, 32), "a title")
    captions = [caption for _, caption in rows[0].images]
    wanted = ["original: 0"]
    for operation in (OPS[each] for each in OPS if each in space.caps):
        cap = space.cap(operation.name)
        signs = [cap] if cap is None or not operation.signed else [cap, -cap]
        said = [done_words(operation.name, strength, channels) for strength in signs]
        wanted += said if any(said) else [f"{operation_name(operation.name)}: no change"]
    assert captions == wanted
    assert len(set(captions)) == len(captions)
    assert [row.title for row in rows] == ["a title", ""]
    original = rows[0].images[0][0]
    assert np.array_equal(original, pixels(channels, 32)[0].numpy())
    same = [caption for image, caption in rows[0].images[1:] if np.array_equal(image, original)]
    assert all("no change" in caption or caption.startswith("shifted by up to") for caption in same)  # it may be by 0


@pytest.mark.parametrize("name", SPACES)
def test_the_table_of_a_space_is_what_its_file_would_hold(name):
    table = space_table(SPACES[name]).table
    assert [row[0] for row in table.rows] == [operation_name(each) for each in SPACES[name].caps]
    operations = yaml.safe_load("\n".join(row[2] for row in table.rows))
    caps = load_space({"operations": operations}).caps
    assert list(caps) == list(SPACES[name].caps)
    for each, cap in SPACES[name].caps.items():
        assert caps[each] == (None if cap is None else pytest.approx(cap, rel=1e-3))


def test_what_needs_square_images_is_left_out_of_others():
    images = Examples(np.zeros((1, 1, 8, 12), np.uint8), ["original"])
    captions = [caption for _, caption in strongest_rows(SPACES["histology"].caps, images)[0].images]
    assert not any("quarter" in caption for caption in captions)


POLICIES = [
    Policy([[{"operation": "rotate", "magnitude": 0.5}, {"operation": "invert", "probability": 0.0}]], space="natural"),
    TrivialAugment(),
    TrivialAugment("radiograph"),
    RandAugment(),
    AutoAugment("svhn"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_draws_of_a_policy_say_what_was_done(policy):
    rows = policy_rows(policy, shown(), draws=4)
    assert len(rows) == 2
    for row in rows:
        (original, said), *others = row.images
        assert said.startswith("original")
        assert len(others) == 4
        for image, caption in others:
            assert image.shape == original.shape
            assert image.dtype == np.uint8
            if caption == "unchanged":
                assert np.array_equal(image, original)
    again = policy_rows(policy, shown(), draws=4)
    assert str([row.images for row in again]) == str([row.images for row in rows])


def test_a_caption_has_the_operations_in_their_order_with_their_own_strengths():
    steps = [
        {"operation": "contrast", "magnitude": 0.5, "sign": 1},
        {"operation": "rotate", "magnitude": 0.1, "sign": -1},
    ]
    ((_, caption),) = policy_rows(Policy([steps], space="natural"), shown(count=1), draws=1)[0].images[1:]
    assert plain(caption) == "contrast x 1.45, turned right by 3°"


def test_a_function_is_shown_without_words_and_the_generator_of_torch_stays_as_it_was():
    before = torch.get_rng_state()
    (row,) = policy_rows(lambda images: images + torch.randint(1, 9, (1,)).to(torch.uint8), shown(count=1), draws=2)
    assert [caption for _, caption in row.images] == ["original: 0", "draw 1", "draw 2"]
    assert torch.equal(before, torch.get_rng_state())


def test_examples_are_of_different_classes_and_of_the_train_split(digits):
    evidence = Evidence(Run.read(digits))
    found = examples(evidence, 4)
    assert [caption.removeprefix("original: ") for caption in found.captions] == ["0", "1", "2", "3"]
    train = evidence.data.read(evidence.data.split_rows["train"])
    assert all((train == image).all(axis=(1, 2, 3)).any() for image in found.images)
    assert found.note == ""
    assert len(examples(evidence, 12).images) == 12  # two of some classes


def test_without_a_run_digits_are_shown_and_it_is_said_why():
    found = examples(None, 2)
    assert found.images.shape == (2, 1, 8, 8)
    assert "handwritten digits" in found.note


@pytest.mark.parametrize("adopted", ["searched", "trivial_augment", "none"])
def test_the_pictures_of_a_search_are_files_and_the_same_each_time(search, digits, adopted, monkeypatch):
    titles = []
    monkeypatch.setattr("lightning_automl.plots.captioned_images", _noting(titles))
    directory = search(found={**acceptance(), "adopted": adopted}, run=digits)
    written = draw_pictures(directory)
    assert [path.name for path in written] == ["policy.png", "space.png"]
    content = [path.read_bytes() for path in written]
    assert all(each.startswith(PNG) for each in content)
    if adopted == "none":
        assert [path.read_bytes() for path in draw_pictures(directory)] == content
    searched = "a policy of 20 sub-policies"
    wanted = {
        "searched": [f"The searched policy, which was adopted: {searched}"],
        "trivial_augment": ["policy.json: TrivialAugment", f"The searched policy, which was not adopted: {searched}"],
        "none": [f"The searched policy, which was not adopted: {searched}"],
    }
    assert titles[: len(wanted[adopted])] == wanted[adopted]
    assert "Space natural: each allowed operation at its strongest" in titles


def _noting(titles):
    def draw(rows, columns=7):
        titles.extend(row.title for row in rows if row.title)
        return captioned_images(rows, columns)

    return draw


def test_a_search_that_has_no_policy_yet_has_a_picture_of_its_space(search):
    assert [path.name for path in draw_pictures(cut_off(search()))] == ["space.png"]


# ---- the page of a search


def test_the_page_has_every_section_and_needs_nothing_beside_itself(search, digits):
    directory = search(run=digits)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    page = page_of(directory)
    assert list(page.sections) == [
        "To keep in mind",
        "Searched policy against simple ones",
        "The policy on images of the train split",
        "The space at full strength",
        "Operations that were kept",
        "How the best policies were found",
        "Policies that gave no value",
        "Cost",
        "Settings of the search",
        "Versions",
        "Commands",
    ]
    assert len(page.sections) == len(SECTIONS)
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert "handwritten" not in page.sections["The space at full strength"]
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert after.pop(directory / "report.html")
    assert after == before
    assert report(directory).read_text() == (directory / "report.html").read_text()


def test_the_command_writes_the_page_and_says_the_verdict(command, search):
    directory = search()
    answer = command("report", directory)
    assert answer.status == 0
    assert answer.err.startswith(f"{directory}/report.html: 16 policies were scored on 2 folds, of which 2 gave no ")


def sentences(directory):
    return [plain(sentence) for sentence in verdict(PolicySearchRecord.read(directory))]


def test_the_verdict_says_what_was_scored_at_what_cost(search):
    assert sentences(search(rounds=2))[0] == (
        "32 policies were scored on 2 folds in 2 rounds each, of which 4 gave no value; the best 8 together are a "
        "policy of 40 sub-policies. All took 80 epochs and 5 min 13 s of all workers together."
    )


LEADS = "On 2 folds with 3 seeds each that the search had not seen, the searched policy "


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            acceptance((0.03, 0.02), 0.01),
            "beat training without a policy (val_accuracy 0.0300 higher, 95 % interval +0.0200 to +0.0400) and "
            "TrivialAugment (val_accuracy 0.0200 higher, 95 % interval +0.0100 to +0.0300); policy.json names the "
            "searched policy.",
        ),
        (
            acceptance((0.03, -0.002), 0.01),
            "did not beat TrivialAugment (val_accuracy 0.0020 lower, 95 % interval -0.0120 to +0.0080), though it beat "
            "training without a policy (val_accuracy 0.0300 higher, 95 % interval +0.0200 to +0.0400); policy.json "
            "names TrivialAugment in the space natural.",
        ),
        (
            acceptance((-0.03, 0.002), 0.01),
            "did not beat training without a policy (val_accuracy 0.0300 lower, 95 % interval -0.0400 to -0.0200, so "
            "that it is worse) or TrivialAugment (val_accuracy 0.0020 higher, 95 % interval -0.0080 to +0.0120); "
            "policy.json therefore says to train without a policy.",
        ),
        (
            acceptance((-0.03, -0.02), 0.01, "minimize", "val_loss"),
            "beat training without a policy (val_loss 0.0300 lower, 95 % interval -0.0400 to -0.0200) and "
            "TrivialAugment (val_loss 0.0200 lower, 95 % interval -0.0300 to -0.0100); policy.json names the searched "
            "policy.",
        ),
    ],
)
def test_the_verdict_says_whether_the_searched_policy_is_better_and_what_is_adopted(search, found, sentence):
    assert sentences(search(found=found))[1:] == [LEADS + sentence]


def test_what_cannot_be_compared_is_told(search):
    nothing = {"difference": None, "low": None, "high": None, "p_value": None, "better": False}
    found = acceptance()
    found["comparisons"] = [{"against": "none", **nothing}, found["comparisons"][1]]
    found["arms"]["none"]["values"][0]["value"] = None
    found["arms"]["none"] |= dict.fromkeys(("mean", "low", "high"))
    directory = search(found=found)
    assert "did not beat training without a policy (no values to compare) or TrivialAugment" in sentences(directory)[1]
    page = page_of(directory)
    assert "1 run of the comparison gave no number" in page.sections["To keep in mind"]
    assert "nan" not in page.sections["Searched policy against simple ones"]


def test_a_search_that_went_on_and_was_killed_does_not_say_that_nothing_was_compared(search):
    directory = search()
    record = json.loads((directory / "policy_search.json").read_text())
    (directory / "policy_search.json").write_text(json.dumps(record | {"acceptance": None}))
    assert "what it has found now is not compared yet" in sentences(directory)[1]


def test_a_comparison_on_one_fold_says_how_little_it_tells(search):
    found = acceptance()
    for arm in found["arms"].values():
        arm["values"] = [each for each in arm["values"] if each["fold"] == 0]
    directory = search(found=found)
    assert "how much seeds matter" in notes_of(cautions(PolicySearchRecord.read(directory)))
    shutil.rmtree(directory)
    assert "how much seeds matter" not in notes_of(cautions(PolicySearchRecord.read(search())))


def test_a_search_without_a_comparison_says_that_nothing_is_known(search):
    directory = search(found="")
    assert sentences(directory)[1] == (
        "The searched policy was compared with nothing: policy.json names it; whether it helps is not known."
    )
    assert "Searched policy against simple ones" not in page_of(directory).sections


def test_the_comparison_is_in_numbers_too(search):
    rows = page_of(search()).rows["Searched policy against simple ones"]
    assert rows[:4] == [
        ["", "mean val_accuracy", "95 % interval"],
        ["no policy", "0.9460", "0.9380 to 0.9540"],
        ["TrivialAugment (adopted)", "0.9560", "0.9480 to 0.9640"],
        ["searched policy", "0.9500", "0.9420 to 0.9580"],
    ]
    assert rows[4] == ["", "no policy", "TrivialAugment", "searched policy"]
    assert [row[0] for row in rows[5:11]] == [f"fold {fold}, seed {seed}" for fold in (0, 1) for seed in (0, 1, 2)]
    assert rows[12] == ["minus no policy", "+0.0040 (-0.0080 to +0.0160)", "0.2", "not told apart"]


def test_former_policies_that_were_compared_are_told(search):
    directory = search()
    assert "compared on the same folds before" not in notes_of(cautions(PolicySearchRecord.read(directory)))
    for number in (1, 2):
        (directory / "superseded" / f"searched-{number}").mkdir(parents=True)
    told = "2 policies of fewer trials had been compared on the same folds before"
    assert told in notes_of(cautions(PolicySearchRecord.read(directory)))


def test_cautions_are_given_where_they_hold(search):
    def cautioned(**keys):
        directory = search(**keys)
        found = notes_of(cautions(PolicySearchRecord.read(directory)))
        shutil.rmtree(directory)
        return found

    usual = cautioned()
    assert "rewards what is harmless, not what helps" in usual
    assert "With 6 values an arm" in usual
    assert "choices to be reviewed" not in usual
    assert "The test split was not opened" in usual
    assert "2 of 16 policies gave no value" in usual
    assert "What the space radiograph allows" in cautioned(space="radiograph")
    assert "hidden by a mild one" in cautioned(arguments={"space": "natural", "reduce": "min"})
    assert "With 12 values" not in cautioned(found=acceptance(seeds=6))


def test_operations_are_counted_with_the_means_of_their_steps(search):
    def step(operation, probability, magnitude):
        return {"operation": operation, "probability": probability, "magnitude": magnitude}

    steps = [[step("rotate", 0.5, 0.2), step("invert", 1.0, 0.9)], [step("rotate", 0.7, 0.4), step("blur", 0.1, 1.0)]]
    kept = [{"fold": 0, "round": 0, "number": 1, "value": 0.14, "sub_policies": steps}]
    space = {"name": "own", "operations": {"rotate": 20, "invert": True, "blur": 1.0, "noise": 0.1}}
    arguments = {"operations": ["rotate", "invert", "blur", "noise"]}
    directory = search()
    path = directory / "policy_search.json"
    write_json(path, json.loads(path.read_text()) | {"kept": kept, "space": space, "arguments": arguments})
    page = page_of(directory)
    rows = page.rows["Operations that were kept"]
    assert rows == [
        ["operation", "steps", "mean probability", "mean magnitude", "that is"],
        ["rotate", "2", "0.60", "0.30", "±6°"],
        ["blur", "1", "0.10", "1.00", "1 px"],
        ["invert", "1", "1.00", "", ""],
        ["noise", "0", "", "", ""],
    ]
    text = page.sections["Operations that were kept"]
    assert "4 steps in the 1 policy that was kept" in text
    assert "Never kept: noise." in text
    assert "Their mean loss on augmented images is 0.1400, that of unchanged images 0.1500; 1 of 1" in text


def test_the_cost_of_each_stage_is_told(search):
    (table, *texts) = cost(PolicySearchRecord.read(search())).blocks
    assert table.rows == [
        ["training the folds' networks", "2 runs", "8", "75.0 s"],
        ["scoring policies", "16 policies", "0", "48.0 s"],
        ["comparing with simple policies", "18 runs", "72", "3 min 10 s"],
        ["all, added up over workers", "", "80", "5 min 13 s"],
    ]
    assert texts[0].text == "0.333 policies were scored a second of a worker's time."


def test_commands_train_with_what_was_adopted_and_go_on(search):
    directory = search()
    (block,) = commands(PolicySearchRecord.read(directory)).blocks
    place = f"'{directory}'"
    policy = "lightning-automl fit --config CONFIG.yaml --data.init_args.train_policy"
    assert block.lines == [
        f"lightning-automl fit --config {place}/best.yaml --dir {place}-best",
        f"{policy} {place}/policy.json    # any other run",
        f"{policy} {place}/searched_policy.json    # the searched policy all the same",
    ]
    (block,) = commands(PolicySearchRecord.read(cut_off(directory))).blocks
    assert block.lines == [f"lightning-automl search --dir {place}    # goes on"]


# ---- unfinished and damaged searches


def test_a_search_that_was_cut_off_says_how_far_it_came(search):
    directory = cut_off(search(rounds=2))
    for fold in range(2):
        (directory / "folds" / str(fold)).mkdir()
    write_json(directory / "folds/0/summary.json", {"status": "finished"})
    write_json(directory / "folds/1/summary.json", {"status": "failed"})
    assert sentences(directory) == [
        "This search is not finished: the networks of 1 of 2 folds are trained and 7 of 32 policies are scored."
    ]
    page = page_of(directory)
    assert list(page.sections) == [
        "To keep in mind",
        "The space at full strength",
        "How the best policies were found",
        "Policies that gave no value",
        "Settings of the search",
        "Versions",
        "Commands",
    ]
    assert "handwritten digits" in page.sections["The space at full strength"]
    write_json(directory / "summary.json", {"status": "failed", "reason": "no space left"})
    assert sentences(directory)[0].startswith("This search is not finished (no space left): ")


def test_runs_of_the_comparison_are_counted_while_it_goes_on(search):
    directory = cut_off(search())
    for arm in ("none", "searched"):
        (directory / f"acceptance/{arm}/fold-2-seed-0").mkdir(parents=True)
        write_json(directory / f"acceptance/{arm}/fold-2-seed-0/summary.json", {"status": "finished"})
    assert sentences(directory)[0].endswith("7 of 16 policies are scored and 2 runs of the comparison are done.")


def test_a_search_that_has_just_begun_has_a_page(tmp_path):
    directory = tmp_path / "begun"
    directory.mkdir()
    (directory / "config.yaml").write_text(
        yaml.safe_dump({"run": {}, "method": {"class_path": "FastAutoAugmentSearch"}, "folds": 3, "trials": 10})
    )
    assert sentences(directory)[0].endswith("the networks of 0 of 3 folds are trained and 0 of 30 policies are scored.")
    assert "Commands" in page_of(directory).sections


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged"),
        ('{"version": 2}', "its version is 2, and 1 is known"),
        ('{"version": 1, "kept": [{"fold": 0}]}', "no 'round'"),
        ('{"version": 1, "acceptance": {"arms": {}}}', "no 'comparisons'"),
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(search, content, sentence):
    directory = search()
    (directory / "policy_search.json").write_text(content)
    for do in (report, draw_pictures):
        with pytest.raises(UserError) as caught:
            do(directory)
        assert sentence in str(caught.value)
        assert str(caught.value).startswith(f"{directory}/policy_search.json is ")
        assert "\n" not in str(caught.value)
    assert not (directory / "report.html").exists()


def test_a_policy_file_that_is_damaged_is_told_on_the_page(search):
    directory = search()
    (directory / "searched_policy.json").write_text("{")
    assert "cannot be shown" in page_of(directory).sections["The policy on images of the train split"]


def test_other_directories_are_refused(tmp_path, search):
    with pytest.raises(UserError, match="is not the directory of a policy search"):
        draw_pictures(tmp_path)
    with pytest.raises(UserError, match=r"is the directory of a search; give that of a run, as .*/folds/0"):
        Run.read(search())


# ---- a search that is a study


def test_the_page_of_autoaugment_is_that_of_its_study_with_the_sections_of_its_policies(search):
    directory = search(method="AutoAugmentSearch", seconds={"acceptance": 190.0}, epochs={"acceptance": 72})
    shutil.rmtree(directory / "density")
    trials = [trial(number, value=0.8 + 0.01 * number) for number in range(12)]
    settings = {"method": {"class_path": "AutoAugmentSearch"}, "folds": 2, "trials": 12}
    content = {"name": "aa", "monitors": ["val_accuracy"], "directions": ["maximize"], "search": settings, "space": {}}
    write_json(directory / "study.json", content | {"best": [11], "trials": trials})
    page = page_of(directory)
    titles = list(page.sections)
    assert len(set(titles)) == len(titles)
    assert titles[0] == "To keep in mind"
    assert titles[-1] == "Commands"
    assert {"Searched policy against simple ones", "The space at full strength"} <= set(titles)
    assert {"How the best value grew", "Each trial over its epochs"} <= set(titles)
    assert "Value against each parameter" not in titles
    assert "How the best policies were found" not in titles
    text = (directory / "report.html").read_text()
    assert "Of 12 trials, all are complete" in text
    assert LEADS in text
    assert "rewards what is harmless" not in page.sections["To keep in mind"]
    assert "comparing with simple policies" in page.sections["Cost"]
    assert "time of all trials together" in page.sections["Cost"]
    assert "--retrain" not in text


# ---- the section of a run


@pytest.fixture
def augmented(digits):
    """Give the digits' run a policy: in its config, and as the file that it keeps."""

    def write(policy, given="policy.json", keep=True):
        config = yaml.safe_load((digits / "config.yaml").read_text())
        config["data"]["init_args"]["train_policy"] = str(digits / given) if given == "policy.json" else given
        (digits / "config.yaml").write_text(yaml.safe_dump(config))
        if keep:
            save_policy(policy, digits / "policy.json")
        return digits

    return write


def section_of(directory):
    """What stands in the section, and below its images."""
    section = augmentation(Evidence(Run.read(directory)))
    texts = []
    for block in section.blocks:
        texts.append(getattr(block, "text", ""))
        texts += [caption for _, caption, _ in getattr(block, "images", ())]
    return plain("\n".join(texts))


def test_a_run_with_a_policy_shows_it_on_its_images_and_its_space_at_full_strength(augmented):
    steps = [[{"operation": "rotate", "probability": 0.5, "magnitude": 0.5}, {"operation": "contrast"}]]
    page = page_of(augmented(Policy(steps, space="radiograph")))
    text = page.sections["Augmentation"]
    assert "Training images are augmented by a policy of 1 sub-policy in the space radiograph" in text
    assert "original: 0" in text
    assert "contrast x 1.10" in text
    assert "turned right by 10°" in text  # of the space
    assert ["1", "rotate ±5°, probability 0.50; then contrast ±10 %, probability 1.00"] in page.rows["Augmentation"]
    assert ["shift sideways", "±5 %", "translate_x: 0.05"] in page.rows["Augmentation"]
    assert list(page.sections).index("Augmentation") == list(page.sections).index("Data") + 1


@pytest.mark.parametrize("policy", [TrivialAugment(), RandAugment(), AutoAugment()], ids=repr)
def test_without_a_space_the_strongest_that_the_policy_may_do_is_shown(augmented, policy):
    text = section_of(augmented(policy))
    assert "Without a space, these are the operations of the policy" in text
    most = policy.strongest()["rotate"]
    assert done_words("rotate", most) in text


def test_the_arm_that_does_nothing_is_called_so(augmented):
    text = section_of(augmented(Identity("natural")))
    assert "augmented by no policy in the space natural" in text
    assert "at their strongest" not in text


def test_a_function_as_policy_is_shown_as_well(augmented):
    text = section_of(augmented(None, "torchvision.transforms.v2.functional.invert", keep=False))
    assert "augmented by invert" in text or "augmented by invert_image" in text
    assert "draw 5" in text


def test_a_policy_that_is_not_there_any_more_is_told(augmented):
    directory = augmented(TrivialAugment(), keep=False)
    assert "cannot be shown" in section_of(directory)


def test_a_run_without_a_policy_has_no_such_section(digits):
    assert augmentation(Evidence(Run.read(digits))) is None


def test_nothing_heavy_is_imported_for_the_page_of_a_run_without_a_policy():
    code = "import sys, lightning_automl.results; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_numbers_that_are_none_become_no_numbers(search):
    record = PolicySearchRecord.read(search())
    assert sum(math.isnan(value) for values in record.values.values() for value in values) == 2
    assert {key: len(values) for key, values in record.values.items()} == {(0, 0): 8, (1, 0): 8}
    assert record.clean == pytest.approx({0: 0.15, 1: 0.16})
