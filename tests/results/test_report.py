import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import DIGITS
from safetensors import safe_open
from safetensors.numpy import save_file

from lightning_automl.metrics import SCORES, clopper_pearson
from lightning_automl.results import Run, report
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.sections import SECTIONS, verdict
from lightning_automl.rundir import write_json


class Page(HTMLParser):
    """The texts of a page by section, what it refers to, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.references, self.open, self.sections, self.title = [], [], {}, None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag == "section":
            self.title = None

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "svg" in self.open or "style" in self.open:
            return
        if self.open and self.open[-1] == "h2":
            self.title = data
            self.sections[data] = ""
        elif self.title is not None:
            self.sections[self.title] += data


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("lightning_automl.results.sections.scoring.DRAWS", 200)


def page_of(directory):
    return Page(report(directory).read_text())


def test_the_page_has_every_section_and_needs_nothing_beside_itself(digits):
    page = page_of(digits)
    assert [title.split(" (")[0] for title in page.sections] == [
        "To keep in mind",
        "Metrics",
        "Confusion matrix",
        "Recall of each class",
        "Calibration",
        "Most wrong images",
        "Least sure images",
        "Data",
        "Learning curves",
        "Configuration that differs from the defaults",
        "Cost",
        "Versions",
        "Commands",
    ]
    assert (
        len(page.sections) == len(SECTIONS) - 6
    )  # no policy, adapter or compressed export; neither a genotype nor a search for one (two)
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert not re.search(r"@import|url\((?!#)", (digits / "report.html").read_text())


def test_the_metrics_are_those_of_the_summary_with_their_intervals(digits):
    run = Run.read(digits)
    text = page_of(digits).sections["Metrics"]
    for name in ("accuracy", "balanced_accuracy", "auroc", "f1", "calibration_error"):
        value = run.summary["metrics"][f"test_{name}"]
        assert SCORES[name](*judged(run)) == pytest.approx(value, abs=1e-6)
        assert f"{value:.3f}" in text, name
    probabilities, labels = judged(run)
    low, high = clopper_pearson(int((probabilities.argmax(1) == labels).sum()), len(labels))
    assert f" ({low:.3f} to {high:.3f})" in text


def judged(run):
    found = run.predictions("test")
    return found.probabilities, found.labels


def test_the_verdict_is_two_sentences_with_the_interval_and_the_weakest_class(digits):
    run = Run.read(digits)
    first, second = verdict(Evidence(run))
    value = run.summary["metrics"]["test_balanced_accuracy"]
    assert first.startswith(
        f"On the 359 test images, opened once, the mean recall of the 10 classes is {100 * value:.1f} %"
    )
    assert "95 % interval" in first
    assert "guessing would give 10.0 %" in first
    probabilities, labels = judged(run)
    hits = np.bincount(labels[probabilities.argmax(1) == labels], minlength=10)
    worst = (hits / np.bincount(labels)).argmin()
    assert second.startswith(
        f"The weakest class is '{worst}': {hits[worst]} of its {np.bincount(labels)[worst]} images"
    )


def test_writing_it_opens_no_split_and_changes_nothing_else(digits):
    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    report(digits)
    after = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {digits / "report.html"}
    assert all(after[path] == before[path] for path in before)


def test_the_same_run_gives_the_same_page(digits):
    first = report(digits).read_text()
    assert report(digits).read_text() == first


def test_most_wrong_and_least_sure_images_are_in_order_and_shown(folder_run):
    run = Run.read(folder_run)
    found = run.predictions("test")
    margins = np.sort(found.probabilities, 1)
    first = int((margins[:, 1] - margins[:, 0]).argmin())
    page = page_of(folder_run)
    evidence = Evidence(run)
    name = evidence.data.contents.names[found.rows[first]]
    assert page.sections["Least sure images (test)"].strip().startswith(f"{name}: ")
    assert found.predicted.tolist() == found.labels.tolist()
    assert page.sections["Most wrong images (test)"].strip() == "No image was classified wrongly."


def test_the_mistakes_are_shown_from_the_surest_on(digits):
    run = Run.read(digits)
    found = run.predictions("test")
    wrong = np.flatnonzero(found.predicted != found.labels)
    surest = wrong[found.probabilities[wrong].max(1).argmax()]
    text = page_of(digits).sections["Most wrong images (test)"].strip()
    name = Evidence(run).data.contents.names[found.rows[surest]]
    assert text.startswith(f"{name}: {found.predicted[surest]} ({100 * found.probabilities[surest].max():.1f} %), is ")
    assert text.count(", is ") == min(12, len(wrong))


def test_without_a_mistake_no_interval_is_without_width(folder_run):
    """Two images of each class, all right: recalls of 3 / 4 would be no surprise."""
    first, _ = verdict(Evidence(Run.read(folder_run)))
    low, high = re.search(r"is 100.0 % \(95 % interval ([\d.]+) % to ([\d.]+) %", first).groups()
    assert float(low) < 60
    assert high == "100.0"
    assert "1.000 to 1.000" not in page_of(folder_run).sections["Metrics"]


def test_an_unfinished_run_says_so_and_that_validation_flatters(digits):
    (digits / "summary.json").unlink()
    (digits / "predictions_test.safetensors").unlink()
    first, _ = verdict(Evidence(Run.read(digits)))
    assert first.startswith("This run is not finished (3 of 3 epochs are done); on the 216 validation images, the mean")
    assert first.endswith("the test split is still closed, and validation, which chose the epoch, flatters.")
    assert "lightning-automl fit --dir" in page_of(digits).sections["Commands"]


def test_a_run_that_was_killed_before_its_first_epoch_has_a_report(finished_digits, tmp_path):
    for name in ("config.yaml", "environment.json", "data.json"):
        shutil.copy(finished_digits / name, tmp_path)
    page = page_of(tmp_path)
    assert "Metrics" not in page.sections
    assert "1,797 grey images of 8 x 8 pixels in 10 classes" in page.sections["Data"]
    first, second = verdict(Evidence(Run.read(tmp_path)))
    assert first == (
        "This run is not finished (0 of 3 epochs are done); no predictions are there yet, so that nothing can be said "
        "of its quality."
    )
    assert second.startswith("Give the command that started it again")


def test_a_config_alone_has_a_report(finished_digits, tmp_path):
    shutil.copy(finished_digits / "config.yaml", tmp_path)
    assert list(page_of(tmp_path).sections) == [
        "To keep in mind",
        "Configuration that differs from the defaults",
        "Commands",
    ]


def test_a_failed_run_gives_its_reason(digits):
    summary = json.loads((digits / "summary.json").read_text())
    write_json(digits / "summary.json", summary | {"status": "failed", "reason": "out of memory"})
    assert verdict(Evidence(Run.read(digits)))[0].startswith("This run failed (out of memory); on the 359 test images")


def test_data_that_are_gone_or_changed_are_told_and_the_rest_is_there(folder_run, tmp_path):
    text = (folder_run / "config.yaml").read_text()
    path = str(Evidence(Run.read(folder_run)).data.path)
    (folder_run / "config.yaml").write_text(text.replace(path, str(tmp_path / "gone")))
    page = page_of(folder_run)
    assert f"the data cannot be opened from here: there is no folder {tmp_path}/gone" in page.sections["Data"]
    assert "24 colour images of 12 x 16 pixels in 2 classes" in page.sections["Data"]

    shutil.copytree(path, tmp_path / "gone")
    shutil.copytree(tmp_path / "gone" / "dark", tmp_path / "gone" / "a")
    page = page_of(folder_run)
    assert "the data have changed since the run" in page.sections["Data"]


def test_two_classes_get_predictive_values_and_small_classes_a_warning(folder_run):
    page = page_of(folder_run)
    evidence = Evidence(Run.read(folder_run))
    found = evidence.judged
    hits = [(found.predicted == found.labels)[found.labels == label].mean() for label in (0, 1)]
    prior = 0.01
    positive = hits[1] * prior / (hits[1] * prior + (1 - hits[0]) * (1 - prior))
    assert f"1.0 %{100 * positive:.1f} %" in page.sections["Metrics"].replace("\n", "")
    assert "2 of 2 classes have fewer than 10 test images (dark, light)" in page.sections["To keep in mind"]
    assert verdict(evidence)[1].startswith("That is not conclusive for every class: of 'dark' there are only")


def test_leaks_openings_and_groups_are_kept_in_mind(digits):
    data = json.loads((digits / "data.json").read_text())
    write_json(digits / "data.json", data | {"leaks": [["digits[1]", "digits[7]"]], "leak_count": 1, "groups": {}})
    summary = json.loads((digits / "summary.json").read_text())
    write_json(digits / "summary.json", summary | {"test_opened": 3})
    notes = page_of(digits).sections["To keep in mind"]
    assert "The test split was opened 3 times" in notes
    assert "1 images of validation or test are also in another split (digits[1] = digits[7])" in notes
    assert "No groups were given" not in notes


def test_names_are_escaped(digits):
    data = json.loads((digits / "data.json").read_text())
    names = ["<script>alert(1)</script>", "a&b", "$x$", *data["class_names"][3:]]
    write_json(digits / "data.json", data | {"class_names": names})
    page_of(digits)
    assert "<script>" not in (digits / "report.html").read_text()


def test_groups_are_what_is_resampled(command, tmp_path):
    """Ten patients of the digits' test split: the interval is wider than that of single images."""
    command("fit", "--config", DIGITS, "--dir=run", "--trainer.max_epochs=1")
    path = tmp_path / "run" / "predictions_test.safetensors"
    tensors, metadata = read_tensors(path)
    alone = verdict(Evidence(Run.read("run")))[0]
    wrong = tensors["probabilities"].argmax(1) != tensors["labels"]
    groups = np.where(wrong, np.arange(len(wrong)) % 3, 3 + np.arange(len(wrong)) % 7)
    save_file(tensors | {"groups": groups.astype(np.int64)}, path, metadata)
    together = verdict(Evidence(Run.read("run")))[0]
    assert width(together) > 1.5 * width(alone)
    assert "bootstrap over groups" in page_of("run").sections["Metrics"]


def width(sentence):
    low, high = re.search(r"interval ([\d.]+) % to ([\d.]+) %", sentence).groups()
    return float(high) - float(low)


def test_the_command_writes_the_page_and_says_the_verdict(command, digits, tmp_path):
    answer = command("report", digits)
    assert answer.status == 0
    assert answer.err.startswith(f"{digits}/report.html: On the 359 test images, opened once, the mean recall")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "there is no directory nothing; give the --dir of a fit"),
        (["."], ". is not a run directory: it is empty and no config.yaml; give the --dir of a fit"),
        ([], "the following arguments are required: dir; see lightning-automl report --help"),
    ],
)
def test_a_directory_that_is_no_run_is_refused_in_one_sentence(command, arguments, sentence):
    answer = command("report", *arguments)
    assert (answer.status, answer.err) == (2, f"lightning-automl: {sentence}\n")


def test_with_groups_it_is_groups_that_are_few(digits):
    """Two patients a class: 36 images of a class are not 36 proofs."""
    tensors, metadata = read_tensors(digits / "predictions_test.safetensors")
    groups = tensors["labels"] * 2 + np.arange(len(tensors["labels"])) % 2
    save_file(tensors | {"groups": groups}, digits / "predictions_test.safetensors", metadata)
    _, second = verdict(Evidence(Run.read(digits)))
    assert second.startswith("That is not conclusive for every class: of '0' there are only 2 groups, and 10 of 10")
    assert "10 of 10 classes have fewer than 10 test groups" in page_of(digits).sections["To keep in mind"]


def test_test_predictions_of_an_older_epoch_are_left_out_and_told(command, tmp_path):
    command("fit", "--config", DIGITS, "--dir=run", "--trainer.max_epochs=1")
    command("fit", "--dir=run", "--trainer.max_epochs=3", "--test_after_fit=false")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert not any(name.startswith("test_") for name in summary["metrics"])
    assert summary["test_opened"] == 1
    page = page_of("run")
    assert "Confusion matrix (validation)" in page.sections
    notes = page.sections["To keep in mind"]
    assert "The test predictions that are there are of epoch 1, and the best one is 3 by now" in notes
    assert command("test", "--dir=run").status == 0
    assert verdict(Evidence(Run.read("run")))[0].startswith("On the 359 test images, opened 2 times,")


def test_test_predictions_of_other_images_are_left_out_and_told(command):
    command("fit", "--config", DIGITS, "--dir=run", "--trainer.max_epochs=1")
    assert command("test", "--dir=run", "--data.split_seed=5").status == 0
    page = page_of("run")
    assert "Confusion matrix (validation)" in page.sections
    assert "are of other images than the run's test split" in page.sections["To keep in mind"]


def test_a_diverged_run_has_a_report(command):
    keys = ("--model.optimizer.lr=1e30", "--model.scheduler=null", "--trainer.max_epochs=1")
    assert command("fit", "--config", DIGITS, "--dir=run", *keys).status == 0
    first, second = verdict(Evidence(Run.read("run")))
    assert first == (
        "216 of 216 validation predictions are no probabilities, as when training has diverged, so that nothing can be "
        "said of its quality."
    )
    assert "smaller learning rate" in second
    assert "Metrics" not in page_of("run").sections


def test_a_part_of_a_split_and_a_damaged_file_are_told(command, tmp_path):
    keys = ("--trainer.max_epochs=1", "--trainer.limit_test_batches=2", "--trainer.limit_val_batches=2")
    command("fit", "--config", DIGITS, "--dir=run", *keys)
    assert verdict(Evidence(Run.read("run")))[0].startswith("On 128 of the 359 test images, opened once, the mean")
    path = tmp_path / "run" / "predictions_test.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    notes = page_of("run").sections["To keep in mind"]
    assert "The test predictions cannot be read" in notes


def read_tensors(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
