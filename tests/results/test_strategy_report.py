import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from policy_searches import write_search
from safetensors.numpy import load_file, save_file
from strategies import SEARCHED, SIMPLE, STAGES, TITLES, candidate, comparison, write_strategy
from test_report import Page
from test_study_report import SPACE, StudyPage, trial

from lightning_automl.metrics import SCORES, clopper_pearson
from lightning_automl.results import report
from lightning_automl.results.ensemble import combine, is_of_auto
from lightning_automl.results.page import write_page
from lightning_automl.results.sections.strategy import SECTIONS, verdict
from lightning_automl.results.sections.strategy.calibration import without_temperature
from lightning_automl.results.sections.strategy.leaderboard import rows_of
from lightning_automl.results.sections.strategy.provenance import time_text
from lightning_automl.results.strategy import StrategyRecord
from lightning_automl.rundir import UserError, write_json

KEEP = "To keep in mind"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("lightning_automl.results.sections.scoring.DRAWS", 100)


@pytest.fixture(scope="session")
def finished_strategy(tmp_path_factory):
    return write_strategy(tmp_path_factory.mktemp("auto") / "my strategy")


@pytest.fixture
def finished(finished_strategy, tmp_path):
    """A copy of a finished one."""
    return shutil.copytree(finished_strategy, tmp_path / "my strategy")


@pytest.fixture
def write(tmp_path):
    return lambda stage="finished", **keys: write_strategy(tmp_path / "auto", stage, **keys)


def read(directory):
    return StrategyRecord.read(directory)


def page_of(directory, *makers):
    """The page, with all sections or only with those of these functions, which is faster."""
    if not makers:
        return StudyPage(report(directory).read_text())
    record, path = read(directory), directory / "part.html"
    made = [section for make in SECTIONS if make.__name__ in makers and (section := make(record)) is not None]
    write_page(path, "part", verdict(record), made)
    return StudyPage(path.read_text())


def change(directory, name, **keys):
    path = directory / f"{name}.json"
    write_json(path, json.loads(path.read_text()) | keys)
    return directory


def sentences_of(directory):
    found = [sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in verdict(read(directory))]
    assert len(found) == 3
    for sentence in found:  # one each
        assert re.fullmatch(r"[A-Z'].*[^ .]\.", sentence), sentence
        assert not re.search(r"\. [A-Z]", sentence), sentence
    return found


# ---- how far it is


@pytest.mark.parametrize("stage", STAGES)
def test_there_is_a_page_at_every_moment(write, stage):
    directory = write(stage)
    sentences_of(directory)
    page = page_of(directory)
    assert next(iter(page.sections)) == KEEP
    assert list(page.sections)[-1] == "Commands"
    assert ("Leaderboard" in page.sections) == (STAGES.index(stage) >= STAGES.index("measured"))
    assert ("Metrics" in page.sections) == (stage == "finished")
    assert "This program is not a medical device" in page.sections[KEEP]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("config", "the data have not been looked at yet"),
        ("look", "the data are looked at (224 images in 2 classes); there is no plan yet"),
        ("plan", "the plan is made; no candidate is judged yet"),
        ("selecting", "3 of 6 candidates are judged, 2 of them on all folds"),
        ("compared", "what was searched is compared with the simple arm"),
        ("finals", "3 final trainings are done, and none is tested"),
    ],
)
def test_an_unfinished_one_says_how_far_it_is_and_that_the_same_command_goes_on(write, stage, said):
    first, second, third = sentences_of(write(stage))
    assert first.startswith("This strategy is not finished: ")
    assert said in first
    assert "of 30 min" in first
    assert "test split is closed" in second
    assert third.startswith("Give the same command again: it goes on")


def test_the_leader_so_far_is_named_and_its_value_is_said_to_flatter(write):
    _, second, _ = sentences_of(write("selected"))
    assert second.startswith(
        "So far 'ResNet-20 from scratch, TrivialAugment, tuned' leads with AUROC 0.9167 over 3 folds"
    )
    assert "flatters" in second


def test_a_failed_one_gives_the_reason_and_an_interrupted_one_is_only_unfinished(write):
    directory = write("selecting")
    summary = {"command": "auto", "status": "failed", "metrics": {}, "seconds": 3.0, "test_opened": 0}
    write_json(directory / "summary.json", summary | {"reason": "no space left"})
    assert sentences_of(directory)[0].startswith("This strategy failed (no space left): ")
    write_json(directory / "summary.json", summary | {"reason": "interrupted"})
    assert sentences_of(directory)[0].startswith("This strategy is not finished: ")


def test_a_longer_budget_since_is_told(write):
    directory = write(config={"budget": 3600.0})
    assert "A longer budget was given since" in page_of(directory, "cautions").sections[KEEP]


# ---- what is known


def test_the_directory_is_told_from_a_study_and_a_run(write, tmp_path):
    directory = write("selected")
    write_json(directory / "study.json", {"name": "selection"})
    assert is_of_auto(directory)
    assert not is_of_auto(tmp_path)
    with pytest.raises(UserError, match=r"is not the directory of an auto command; give its --dir"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["selection", "evaluation"])
def test_a_file_of_another_form_is_named(write, name):
    directory = write()
    content = {"selection": {"candidates": [{"number": 0}]}, "evaluation": {"models": {"chosen": {"seeds": []}}}}[name]
    change(directory, name, **content)
    with pytest.raises(UserError, match=rf"{name}.json cannot be understood \(no 'key'\)"):
        report(directory)


def test_writing_the_page_changes_nothing_else_and_needs_nothing_else(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    text = report(finished).read_text()
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {finished / "report.html"}
    assert all(after[path] == before[path] for path in before)
    assert all(reference.startswith(("data:image/", "#")) for reference in Page(text).references)


def test_the_same_files_give_the_same_page(finished):
    assert report(finished).read_bytes() == report(finished).read_bytes()


# ---- the verdict


def test_the_verdict_has_the_scores_with_intervals_the_comparison_and_the_weakest_class(finished):
    first, second, third = sentences_of(finished)
    found = load_file(finished / "predictions_test.safetensors")
    probabilities, labels = found["probabilities"].astype(float), found["labels"]
    balanced, auroc = (SCORES[name](probabilities, labels) for name in ("balanced_accuracy", "auroc"))
    assert first.startswith("On the 64 test images, opened once, 'ResNet-20 from scratch, TrivialAugment' (the mean of")
    assert f"a balanced accuracy of {100 * balanced:.1f} % (95 % interval" in first
    assert f"an AUROC of {auroc:.3f} (95 % interval" in first
    assert first.endswith("where guessing would give 50.0 % and 0.5.")
    assert "did not outperform the simple arm" in second
    hits = np.bincount(labels[probabilities.argmax(1) == labels], minlength=2)
    worst = int((hits / [48, 16]).argmin())
    assert third.startswith(f"The weakest class is '{['benign', 'malignant'][worst]}': {hits[worst]} of its")


@pytest.mark.parametrize(
    "keys",
    [
        {"difference": 0.0, "reach": 0.0},  # a trainer that gives a constant
        {"difference": 0.004, "reach": 0.02},
        {"difference": -0.03, "reach": 0.01},
        {"difference": 0.01, "reach": 0.02, "better": True, "adopted": "searched"},  # it says so, and is not
        {"difference": 0.01, "reach": math.nan, "better": True},
    ],
)
def test_nothing_is_claimed_where_the_interval_does_not_say_so(write, keys):
    directory = write(comparison=comparison(**keys))
    text = " ".join(sentences_of(directory)) + page_of(directory, "comparison").sections["Searched against simple"]
    assert "did not outperform" in text
    assert " beat " not in text
    assert not re.search(r"\bbetter\b", text)


def test_what_is_better_by_its_interval_is_said_to_have_beaten_the_simple_arm(write):
    directory = write(comparison=comparison(difference=0.03, reach=0.01))
    second = sentences_of(directory)[1]
    assert second == (
        "What was searched (hyper-parameters: 'ResNet-20 from scratch, TrivialAugment, tuned') beat the simple arm "
        "('ResNet-20 from scratch, TrivialAugment') in 4 paired trainings on folds that no search had seen: AUROC "
        "0.0300 higher, 95 % interval +0.0200 to +0.0400."
    )
    rows = page_of(directory, "comparison").rows["Searched against simple"]
    assert ["searched minus simple", "+0.0300", "+0.0200 to +0.0400", "0.01", "better"] in rows


def test_what_was_adopted_and_gave_no_model_is_not_what_is_used(write):
    record = comparison(difference=0.03, reach=0.01)
    directory = write(comparison=record, evaluation={"instead_of": {"key": SEARCHED, "title": TITLES["resnet"]}})
    first, second, _ = sentences_of(directory)
    assert read(directory).chosen.title in first
    assert second.endswith(", yet none of its final trainings gave a model, so that the simple one is used.")
    text = page_of(directory, "comparison").sections["Searched against simple"]
    assert "Adopted is the searched one, but none of its final trainings gave a model" in text


def test_a_single_fold_is_said_to_know_little_of_other_images(write):
    record = comparison(difference=0.03, reach=0.01)
    directory = write(comparison=record)
    assert "With one fold" not in page_of(directory, "comparison").sections["Searched against simple"]
    for own in record["values"].values():
        own[:] = [{**each, "fold": 4, "seed": 1000 + place} for place, each in enumerate(own)]
    change(directory, "comparison", **record)
    assert (
        "With one fold it knows of other seeds" in page_of(directory, "comparison").sections["Searched against simple"]
    )


def test_of_a_loss_less_is_better(write):
    record = comparison(metric="val_loss", difference=-0.03, reach=0.01, direction="minimize", better=True)
    record["adopted"] = "searched"
    selection = {"metric": "val_loss", "direction": "minimize"}
    directory = write(comparison=record, selection=selection)
    assert "beat the simple arm" in sentences_of(directory)[1]
    assert "loss 0.0300 lower" in sentences_of(directory)[1]


def test_where_nothing_was_searched_that_is_said(write):
    sentence = "Nothing was searched; the simple arm is kept."
    directory = write(comparison={key: None for key in comparison()} | {"adopted": "simple", "sentence": sentence})
    assert sentences_of(directory)[1] == (
        "Nothing was searched; the simple arm ('ResNet-20 from scratch, TrivialAugment') is kept."
    )
    (directory / "comparison.json").unlink()
    change(directory, "plan", why_not={"comparison": "there is one comparison fold and no time"})
    assert sentences_of(directory)[1].startswith("There is one comparison fold and no time; the simple arm (")
    assert (
        page_of(directory, "comparison").sections["Searched against simple"].strip().startswith("Not run: there is one")
    )


# ---- the leaderboard


def test_every_arm_is_listed_and_one_without_a_value_says_why(finished):
    page = page_of(finished, "leaderboard")
    text = page.sections["Leaderboard"]
    for title in (*TITLES.values(), "pretrained, head only", "pretrained, LoRA"):
        assert title in text
    without = [row for row in page.rows["Leaderboard"] if len(row) == 2]
    assert ["DenseNet-40 from scratch, no policy", "failed: the loss is not finite"] in without
    assert ["searched augmentation policy", "not run: it would take 40 minutes of the 30"] in without
    assert ["searched architecture", "not run: 120 train images; a search needs 1,000"] in without
    assert all(row[1] for row in without[1:])


@pytest.mark.parametrize(("arms", "rows"), [(("pcdarts",), 0), ((), 1)])
def test_a_search_for_which_nothing_was_measured_has_no_row_beside_that_of_its_arm(write, arms, rows):
    why = "there was no time to measure it in this budget"
    directory = write("plan", measured={"not_run": dict.fromkeys((*arms, "architecture_search"), why)})
    titles = [row.title for row in rows_of(read(directory))]
    assert "architecture_search" not in titles
    assert titles.count("searched architecture") == rows


def test_an_arm_that_came_to_no_candidate_is_not_left_out(write):
    directory = write("selecting")
    rows = {row.title: row.note for row in rows_of(read(directory))}
    assert rows[TITLES["densenet"]] == "not judged yet"
    write_json(directory / "progress.json", {"seconds": 1.0, "cuts": {"selection": "no time for it"}, "stages": {}})
    assert {row.title: row.note for row in rows_of(read(directory))}[TITLES["densenet"]] == "not run: no time for it"
    (directory / "progress.json").unlink()
    write_json(directory / "comparison.json", comparison())
    rows = {row.title: row.note for row in rows_of(read(directory))}
    assert rows[TITLES["densenet"]] == "not run: no candidate of it was judged"


def test_the_best_of_each_arm_is_shown_in_order_and_the_chosen_one_too_where_it_is_another(finished):
    rows = [row for row in rows_of(read(finished)) if row.candidate is not None]
    assert [(row.candidate.key, row.chosen) for row in rows] == [
        (SEARCHED, False),
        (SIMPLE, True),
        ("cnn-0000000c", False),
    ]
    cells = page_of(finished, "leaderboard").rows["Leaderboard"]
    assert cells[1][1:3] == ["0.917 (0.867 to 0.967)", "0.920, 0.910, 0.920"]
    assert cells[2][-1] == "chosen, complete, the simple arm"
    assert cells[3][-1] == "stopped early"


def test_what_was_stopped_early_is_below_what_has_all_folds(write):
    best = candidate(2, "cnn-0000000c", {0: 0.99})
    directory = write("selected", selection={"candidates": [candidate(0, SIMPLE, {0: 0.9, 1: 0.9, 2: 0.9}), best]})
    assert [row.candidate.key for row in rows_of(read(directory)) if row.candidate] == [SIMPLE, "cnn-0000000c"]


def test_the_only_candidate_is_chosen_without_a_value_and_nothing_is_drawn(write):
    only = candidate(0, SIMPLE, {}, state="PRUNED", reason="the only candidate, so that there was nothing to choose")
    directory = write(selection={"candidates": [only], "searched": None, "leaders": []})
    page = page_of(directory, "leaderboard", "cautions")
    said = ["ResNet-20 from scratch, no policy", "chosen: the only candidate, so that there was nothing to choose"]
    assert page.rows["Leaderboard"][1] == said
    assert "mean AUROC" not in page.rows["Leaderboard"][0]
    assert "which is optimistic" not in page.sections[KEEP]


def test_of_a_loss_the_smallest_comes_first(write):
    candidates = [
        candidate(0, SIMPLE, dict.fromkeys(range(3), 0.5)),
        candidate(1, "cnn-0000000c", dict.fromkeys(range(3), 0.4)),
    ]
    selection = {"candidates": candidates, "metric": "val_loss", "direction": "minimize"}
    rows = rows_of(read(write("selected", selection=selection)))
    assert [row.candidate.key for row in rows if row.candidate] == ["cnn-0000000c", SIMPLE]


def test_challengers_that_came_later_have_rows_of_their_own(write):
    challengers = [
        {"key": SIMPLE, "title": "x", "kind": "simple", "mean": 0.91},
        {"key": "resnet-0000000f", "title": "ResNet-20, searched policy", "kind": "policy", "mean": 0.93},
        {"key": "pcdarts-0000000f", "title": "searched cells", "kind": "architecture", "mean": None},
    ]
    directory = write("compared", comparison={"challengers": challengers})
    rows = rows_of(read(directory))
    assert rows[0].candidate.key == "resnet-0000000f"
    notes = {row.title: row.note for row in rows}
    assert notes["searched cells"] == "failed: it has no value on every search fold"
    assert not {"searched augmentation policy", "searched architecture"} & notes.keys()
    assert ["ResNet-20, searched policy", "0.930"] == page_of(directory, "leaderboard").rows["Leaderboard"][1][:2]


def test_a_search_that_was_planned_has_not_come_to_its_end_or_was_cut(write):
    directory = write("selected", plan={"policy_search": {"folds": 2}, "why_not": {}})
    notes = {row.title: row.note for row in rows_of(read(directory))}
    assert notes["searched augmentation policy"] == "not searched yet"
    assert notes["searched architecture"] == "not run: no reason is known"
    change(directory, "progress", cuts={"policy_search": "no time"})
    assert {row.title: row.note for row in rows_of(read(directory))}[
        "searched augmentation policy"
    ] == "not run: no time"


# ---- the chosen model and the simple one


def test_every_seed_of_the_models_is_shown(finished):
    rows = page_of(finished, "models").rows["Chosen model (test)"]
    assert [row[0] for row in rows] == ["", f"chosen: {TITLES['resnet']}, TrivialAugment", "seed 0", "seed 1", "seed 2"]
    assert rows[3][1] == f"{float(rows[2][1]) - 0.01:.4f}"


def test_runs_that_did_without_a_fold_each_are_said_to_have(finished):
    own = page_of(finished, "models").sections["Chosen model (test)"]
    assert "on validation (" in own
    assert "another fold" not in own
    change(finished, "evaluation", folds=[0, 1, 2, 3, 4])
    own = page_of(finished, "models").sections["Chosen model (test)"]
    assert "each training did without another fold of train and validation" in own
    assert "chosen by" not in own


def test_the_simple_model_beside_it_has_intervals_from_what_its_runs_have_kept(finished):
    found = load_file(finished / "predictions_test.safetensors")
    places = [f"runs/simple/final-seed-{seed}" for seed in range(2)]
    for seed, place in enumerate(places):
        (finished / place).mkdir(parents=True)
        own = np.roll(found["probabilities"], seed, 0)
        save_file({"probabilities": own, "labels": found["labels"]}, finished / place / "evaluated_test.safetensors")
    values = {"val": {"auroc": 0.8}, "test": {"auroc": 0.8}, "seconds": 1.0, "epochs": 3}
    seeds = [{"seed": seed, "directory": place} | values for seed, place in enumerate(places)]
    models = json.loads((finished / "evaluation.json").read_text())["models"]
    models["simple"] = {"key": "simple", "title": "small CNN", "seeds": seeds, "temperature": 2.0} | values
    change(finished, "evaluation", models=models)
    members = [found["probabilities"], np.roll(found["probabilities"], 1, 0)]
    value = SCORES["auroc"](combine(members, 2.0), found["labels"])
    rows = page_of(finished, "models").rows["Chosen model (test)"]
    row = next(row for row in rows if row[0] == "simple arm: small CNN")
    assert row[rows[0].index("test AUROC")].startswith(f"{value:.3f} (")
    assert len([each for each in rows if each[0].startswith("seed")]) == 5


@pytest.mark.parametrize(
    ("low", "high", "better", "said"),
    [
        (-0.01, 0.05, False, "did not outperform the simple one there"),
        (-0.01, 0.05, True, "did not outperform the simple one there"),
        (0.01, 0.05, True, "it is better on images like these"),
        (-0.05, -0.01, False, "It is worse than the simple one there"),
    ],
)
def test_the_difference_on_the_test_split_is_judged_by_its_interval(finished, low, high, better, said):
    gap = {"metric": "val_auroc", "difference": (low + high) / 2, "low": low, "high": high, "better": better}
    change(finished, "evaluation", comparison=gap)
    assert said in page_of(finished, "models").sections["Chosen model (test)"]


def test_one_seed_is_told_and_nothing_is_averaged(write):
    page = page_of(write(seeds=1), "cautions", "models")
    assert "one training with one seed" in page.sections[KEEP]
    assert "nothing to average" in page.sections["Chosen model (test)"]


def test_a_closed_test_split_leaves_validation_that_is_said_to_flatter(finished):
    (finished / "predictions_test.safetensors").unlink()
    change(finished, "summary", test_opened=0)
    change(finished, "evaluation", opened=0)
    first, _, third = sentences_of(finished)
    assert first.startswith("On the 40 validation images, ")
    assert "the test split is still closed" in first
    assert third.startswith("Its weakest point is that")
    assert "Chosen model (validation)" in page_of(finished, "models").sections


# ---- decisions


def test_rates_at_the_operating_point_have_exact_intervals(finished):
    found = load_file(finished / "predictions_test.safetensors")
    said, truth = found["probabilities"][:, 1] >= 0.42, found["labels"] == 1
    hits = int((said & truth).sum())
    low, high = clopper_pearson(hits, 16)
    page = page_of(finished, "operating_point")
    cell = f"{100 * hits / 16:.1f} % ({100 * low:.1f} % to {100 * high:.1f} %; {hits} of 16)"
    assert page.rows["Operating point"][1][:2] == ["sensitivity (right of 'malignant')", cell]
    wrong = int((said & ~truth).sum())
    assert f"{hits} of {hits + wrong})" in page.rows["Operating point"][3][1]
    assert "25.0 % (as in test)" in page.sections["Operating point"]


def test_three_classes_have_no_operating_point(write):
    directory = write(classes=3)
    page = page_of(directory, "operating_point", "unsure")
    assert "Operating point" not in page.sections
    assert "Unsure answers" in page.sections
    assert "guessing would give 33.3 %" in sentences_of(directory)[0]


def test_unsure_answers_are_counted_by_hand(finished):
    found = load_file(finished / "predictions_val.safetensors")
    best = found["probabilities"].max(1)
    right = found["probabilities"].argmax(1) == found["labels"]
    row = page_of(finished, "unsure").rows["Unsure answers"][2]
    assert row[0] == "validation"
    assert row[1].startswith(f"{(best < 0.6).sum()} of 40 ")
    assert f"; {(right & (best >= 0.6)).sum()} of {(best >= 0.6).sum()})" in row[2]


@pytest.mark.parametrize(
    ("below", "said"), [(0.6, "below 0.600:"), (0.9996, "below 0.9996:"), (0.99999969, "below 0.9999997:")]
)
def test_nothing_can_be_surer_than_a_probability_that_is_said_to_be_1(finished, below, said):
    change(finished, "model", unsure_below=below)
    assert said in page_of(finished, "unsure").sections["Unsure answers"]


def test_the_temperature_can_be_taken_out_again():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8]])
    for temperature in (0.5, 1.0, 3.0):
        found = without_temperature(combine([probabilities], temperature), temperature)
        assert found == pytest.approx(probabilities)


def test_calibration_is_told_before_and_after_the_temperature(finished):
    text = page_of(finished, "calibration").sections["Calibration (test)"]
    assert "the temperature 1.30, fitted on validation" in text
    found = load_file(finished / "predictions_test.safetensors")
    after = SCORES["calibration_error"](found["probabilities"].astype(float), found["labels"])
    assert f"is {100 * after:.1f} % off after" in text


# ---- pictures


def test_activations_are_shown_beside_their_images_and_left_out_where_there_are_none(finished):
    page = page_of(finished, "activations")
    text = page.sections["Where the network looks"]
    assert text.count("original: ") == 6
    assert "what speaks for malignant (it is benign)" in text
    (finished / "activations.safetensors").write_bytes(b"damaged")
    assert (
        "activations.safetensors cannot be read" in page_of(finished, "activations").sections["Where the network looks"]
    )
    (finished / "activations.safetensors").unlink()
    assert "Where the network looks" not in page_of(finished, "activations").sections


def test_which_epoch_of_a_final_training_is_kept_is_said(finished):
    own = page_of(finished, "curves").sections["Learning curves"]
    assert "Of each the epoch with the best validation AUROC is kept." in own
    for path in finished.glob("runs/*/final-seed-*/config.yaml"):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"monitor": "epoch"}))
    assert "Of each the last epoch is kept" in page_of(finished, "curves").sections["Learning curves"]


def test_the_policy_is_shown_on_images_and_its_lack_is_told(finished):
    assert "TrivialAugment in the space radiograph" in page_of(finished, "augmentation").sections["Augmentation"]
    path = next(finished.glob("runs/*/final-seed-0/config.yaml"))
    lines = [line for line in path.read_text().splitlines() if "train_policy" not in line and "policies/" not in line]
    path.write_text("\n".join(lines))
    assert "without an augmentation policy" in page_of(finished, "augmentation").sections["Augmentation"]


def test_a_searched_policy_is_shown_with_its_operations_whether_it_was_adopted_or_not(finished):
    write_search(
        finished / "policy_search", space="radiograph", folds=2, rounds=1, trials=12, keep=2, sentence="Found."
    )
    text = page_of(finished, "policy").sections["Searched augmentation policy"]
    assert "Found." in text
    assert "It is not that of the chosen model." in text
    assert "policies that were kept" in text
    shutil.copy(finished / "policy_search/searched_policy.json", finished / "policy.json")
    assert (
        "It is the policy of the chosen model" in page_of(finished, "policy").sections["Searched augmentation policy"]
    )


def test_a_genotype_that_was_not_chosen_is_drawn_and_said_to_be_none(finished):
    cell = [[["sep_conv_3x3", 0], ["skip_connect", 1]]]
    (finished / "architecture_search").mkdir()
    genotype = {"normal": cell, "normal_concat": [2], "reduce": cell, "reduce_concat": [2]}
    write_json(finished / "architecture_search/genotype.json", genotype)
    assert "is not what was chosen" in page_of(finished, "architecture").sections["Searched architecture"]
    (finished / "architecture_search/genotype.json").write_text('{"normal": 3}')
    assert "cannot be shown" in page_of(finished, "architecture").sections["Searched architecture"]


def test_importances_of_hyper_parameters_are_shown_where_there_is_a_study(finished):
    assert "Which parameters matter" not in page_of(finished, "importances").sections
    study = {
        "name": "selection",
        "monitors": ["val_auroc"],
        "directions": ["maximize"],
        "search": {"folds": 3, "importances_of": "the first fold"},
        "space": SPACE,
        "best": [11],
        "importances": {"ped_anova": dict.fromkeys(SPACE, 0.2)},
        "trials": [trial(number, value=0.8 + 0.01 * number) for number in range(12)],
    }
    write_json(finished / "study.json", study)
    assert (
        "Explained are the values on the first fold."
        in page_of(finished, "importances").sections["Which parameters matter"]
    )


def test_images_that_are_gone_are_told_and_the_rest_is_there(write, tmp_path):
    directory = write()
    (tmp_path / "images-2.npz").unlink()
    page = page_of(directory, "most_wrong", "scores", "data")
    assert "cannot be shown" in page.sections["Most wrong images (test)"]
    assert "Metrics" in page.sections


# ---- what to keep in mind, cost, commands


def test_what_limits_the_numbers_is_kept_in_mind(finished):
    text = page_of(finished, "cautions").sections[KEEP]
    assert "Of the class 'malignant' there are 3 times fewer images" in text
    assert "1 pair of images is equal in different splits (a.png = b.png)" in text
    assert "intervals assume independent images" in text
    assert "Not run: pretrained, head only; pretrained, LoRA. The reason: the pretrained network" in text
    assert "which is optimistic" in text
    assert "fewer than 10" not in text


def test_cuts_openings_left_out_seeds_and_few_images_are_kept_in_mind(finished):
    change(finished, "progress", cuts={"comparison": "it has 1 of 2 seeds."})
    change(finished, "selection", cut="of 6 planned candidates 5 were trained")
    left_out = [{"key": SIMPLE, "title": "ResNet", "seed": 3, "reason": "there was no time left for it"}]
    change(finished, "evaluation", opened=2, left_out=left_out)
    change(finished, "look", groups=30, counts={"train": [90, 30], "val": [30, 10], "test": [48, 16]})
    path = finished / "predictions_test.safetensors"
    found = load_file(path)
    found["groups"] = np.minimum(np.arange(64), 52)  # the second class is of five groups
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        origin = file.metadata()
    save_file(found, path, origin)
    text = page_of(finished, "cautions").sections[KEEP]
    assert "The time ran short (searched against simple): it has 1 of 2 seeds." in text
    assert "The time ran short (arms compete): of 6 planned candidates 5 were trained." in text
    assert "Final trainings left out: seed 3 of ResNet: there was no time left for it." in text
    assert "The test split was opened 2 times" in text
    assert "1 of 2 classes has fewer than 10 test groups" in text.replace("class has", "classes has")
    assert "independent images" not in text
    assert "opened 2 times" in sentences_of(finished)[0]


def test_the_cost_of_each_stage_is_shown_as_planned_and_as_it_was(finished):
    rows = {row[0]: row[1:] for row in page_of(finished, "cost").rows["Cost"] if len(row) == 4}
    assert rows["arms compete"] == ["10 min 40 s", "10 min 10 s", "5 candidates, 10 trainings, 300 epochs"]
    assert rows["look at the data"] == ["", "3.2\N{NO-BREAK SPACE}s", ""]
    assert rows["final trainings"][2] == "3 trainings, 9 epochs"
    assert rows["in all"][:2] == ["25 min 30 s", "25 min 47 s"]


def test_the_plan_is_told_in_its_own_sentences(finished):
    text = page_of(finished, "plan").sections["Plan"]
    assert "Three arms compete on 3 folds." in text
    assert "No search for an architecture: 120 train images; a search needs 1,000." in text


def test_the_commands_can_be_pasted(finished, write):
    lines = page_of(finished, "commands").sections["Commands"].strip().splitlines()
    assert lines[0].startswith("lightning-automl classify ")
    assert lines[0].endswith("my strategy' new_images --out predictions.csv")
    assert "--budget 30m --modality radiograph --workers 2 --dir " in lines[2]
    assert "--budget 1h " in lines[3]
    lines = page_of(write("plan"), "commands").sections["Commands"].strip().splitlines()
    assert lines[0].startswith("lightning-automl auto ")
    assert lines[0].endswith("    # goes on")


@pytest.mark.parametrize(("seconds", "text"), [(90.0, "90s"), (60, "1m"), (1800.0, "30m"), (7200, "2h"), (0.5, "0.5s")])
def test_times_are_written_as_the_command_takes_them(seconds, text):
    assert time_text(seconds) == text
