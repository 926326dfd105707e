import math
import statistics
import subprocess
import sys

import pytest
import yaml
from architectures import RANDOM, spied, write_control
from test_study_report import StudyPage

from lightning_automl.metrics import difference_from_sample
from lightning_automl.models.genotype import PUBLISHED, random_genotype
from lightning_automl.results import StudyRecord, report
from lightning_automl.results.control import FEWEST, Control
from lightning_automl.results.page import Folded, Notes, Pictures, Table, Text
from lightning_automl.results.sections.study import SECTIONS, verdict
from lightning_automl.results.sections.study.architectures import architectures
from lightning_automl.results.sections.study.verdict import cautions
from lightning_automl.rundir import write_json

GENOTYPE = PUBLISHED["darts_v1"]
#: By genotype, over three seeds: the found one (None) and five random ones.
VALUES = {
    None: [0.960, 0.970, 0.980],
    0: [0.940, 0.950, 0.960],
    1: [0.970, 0.960, 0.980],
    2: [0.930, 0.940, 0.920],
    3: [0.955, 0.945, 0.950],
    4: [0.965, 0.955, 0.960],
}


@pytest.fixture
def study(tmp_path):
    def write(values=VALUES, **keys):
        return write_control(tmp_path / "control", values, genotype=GENOTYPE.to_dict(), **keys)

    (tmp_path / "control").mkdir()
    return write


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made, and not rendered."""
    monkeypatch.setattr("lightning_automl.results.page._svg", lambda name, figure, font="path": f"<svg id={name}/>")


@pytest.fixture
def drawn(monkeypatch):
    """The genotypes of which drawings are made."""
    return spied(monkeypatch)


def control_of(directory):
    return Control.of(StudyRecord.read(directory))


def section_of(directory):
    return architectures(StudyRecord.read(directory))


def parts(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def with_values(**changed):
    return VALUES | {None if key == "found" else int(key[1:]): value for key, value in changed.items()}


# ---- what is compared


def test_each_genotype_counts_once_by_the_mean_of_its_seeds(study):
    control = control_of(study())
    means = {random: statistics.fmean(own) for random, own in VALUES.items()}
    assert [each.random for each in control.genotypes] == sorted(means, key=lambda key: (-means[key], key or -1))
    for each in control.genotypes:
        assert each.mean == pytest.approx(means[each.random])
        reach = 4.302653 * statistics.stdev(VALUES[each.random]) / math.sqrt(3)  # t of 2 degrees of freedom
        assert (each.low, each.high) == pytest.approx((each.mean - reach, min(1.0, each.mean + reach)))
    expected = difference_from_sample(means[None], [means[key] for key in range(5)])
    assert control.difference == pytest.approx(expected)
    assert (control.rank, control.tied) == (1, 1)
    assert "it is 1st of 6, with 1 other, and" in verdict(control.record)[1]


def test_a_found_genotype_far_above_the_random_ones_is_told(study):
    directory = study(with_values(found=[0.999, 0.998, 0.9995]))
    (sentence,) = verdict(StudyRecord.read(directory))[1:]
    assert sentence.startswith("The found genotype has a mean val_accuracy of 0.9988 over 3 seeds, 5 random genotypes ")
    assert sentence.endswith("; it is 1st of 6, and better than drawing at random gives.")


@pytest.mark.parametrize(
    ("found", "ending"),
    [
        ([0.999], "; but one seed is luck as well: train with two or more."),
        ([0.97] * 3, "it is 1st of 6, with 1 other, and did not outperform random genotypes by more than chance."),
        ([0.935] * 3, "it is 5th of 6, and did not outperform random genotypes by more than chance."),
        ([0.8, 0.81, 0.79], "it is 6th of 6, and worse than random ones by more than chance."),
    ],
    ids=str,
)
def test_the_verdict_is_that_of_the_interval(study, found, ending):
    directory = study(with_values(found=found))
    sentence = verdict(StudyRecord.read(directory))[1]
    gap = control_of(directory).difference
    assert sentence.endswith(ending)
    assert gap.excludes_zero == ("did not outperform" not in ending)
    assert f"{abs(gap.difference):.4f} (95 % interval" in sentence


def test_less_is_better_where_the_study_minimizes(study):
    directory = study(
        with_values(found=[0.10, 0.11, 0.12]),
        monitor="val_loss",
        directions=["minimize"],
    )
    control = control_of(directory)
    assert control.rank == 1
    assert control.genotypes[0].random is None
    assert "better than drawing at random gives" in verdict(StudyRecord.read(directory))[1]


@pytest.mark.parametrize("number", range(5))
def test_too_few_random_genotypes_are_told_and_give_no_interval(study, number):
    directory = study({key: own for key, own in VALUES.items() if key is None or key < number})
    control = control_of(directory)
    assert (control.difference is None) == (control.expected is None) == (number < FEWEST)
    sentence = verdict(StudyRecord.read(directory))[1]
    assert ("interval" in sentence) == (number >= FEWEST)
    if number == 0:
        assert "no random genotype has a value yet" in sentence
    elif number < FEWEST:
        assert f"at least {FEWEST} are needed" in sentence
        assert f"{number} random genotype" in sentence


def test_random_genotypes_that_are_all_equal_have_no_interval(study):
    values = {None: [0.97, 0.97, 0.97]} | {key: [0.96, 0.96, 0.96] for key in range(4)}
    sentence = verdict(StudyRecord.read(study(values)))[1]
    assert "without an interval, since the random ones are all equal" in sentence


def test_seeds_that_all_agree_give_no_interval(study):
    control = control_of(study(with_values(found=[0.97] * 3)))
    assert control.found.mean == pytest.approx(0.97)
    assert math.isnan(control.found.low)


@pytest.mark.usefixtures("undrawn")
def test_a_found_network_of_another_size_is_told(study):
    directory = study()  # 40,000 parameters beside 41,000 to 45,000
    said = "has 40,000 parameters, those of the random ones 41,000 to 45,000"
    assert any(said in each for each in parts(section_of(directory), Notes)[0].sentences)
    write_json(directory / "trials/0000/environment.json", {"network": {"parameters": 43_000}})
    assert not any("parameters" in each for each in parts(section_of(directory), Notes)[0].sentences)


# ---- runs without a value


@pytest.mark.usefixtures("undrawn")
def test_runs_that_failed_or_were_pruned_do_not_count_and_are_listed(study):
    states = {(0, 1): "FAIL", (1, 0): "PRUNED", (1, 2): "PRUNED", (3, 0): "RUNNING", (3, 1): "WAITING"}
    directory = study(states=states)
    control = control_of(directory)
    by_random = {each.random: each for each in control.genotypes}
    assert by_random[0].values == (0.940, 0.960)
    assert by_random[1].values == (0.960,)
    assert by_random[3].values == (0.950,)
    assert math.isnan(by_random[1].low)
    section = section_of(directory)
    rows = {row[0]: row for row in parts(section, Table)[0].rows}
    assert rows["random 0"][4] == "2 (1 failed)"
    assert rows["random 1"][4] == "1 (2 pruned)"
    assert rows["random 3"][4] == "1"
    assert rows["random 1"][3] == ""
    notes = " ".join(parts(section, Notes)[0].sentences)
    assert "same number of complete runs (1 to 3)" in notes
    assert "Pruned runs do not count" in notes


@pytest.mark.usefixtures("undrawn")
def test_a_genotype_without_any_value_is_listed_last(study):
    directory = study(states={(1, seed): "FAIL" for seed in range(3)})
    table = parts(section_of(directory), Table)[0]
    assert table.rows[-1][:5] == ["random 1", "", "none", "", "0 (3 failed)"]
    assert control_of(directory).rank == 1
    assert len(control_of(directory).random) == 4


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("state", ["FAIL", "PRUNED", "RUNNING", "LOST"])
def test_a_study_without_any_complete_run_says_so(study, state):
    states = {(random, seed): state for random in VALUES for seed in range(3)}
    directory = study(states=states)
    section = section_of(directory)
    if state in ("RUNNING", "LOST"):
        assert section is None  # there is nothing to tell yet
    else:
        assert "No run of the found genotype is complete" in verdict(StudyRecord.read(directory))[1]
        assert {row[2] for row in parts(section, Table)[0].rows} == {"none"}


@pytest.mark.usefixtures("undrawn")
def test_a_study_without_the_found_genotype_says_what_is_missing(study):
    directory = study({key: own for key, own in VALUES.items() if key is not None})
    assert "null among the values of random" in verdict(StudyRecord.read(directory))[1]
    captions = parts(section_of(directory), Pictures)[-1].captions
    assert [caption.split(":")[0] for caption in captions] == ["Random 1, the best", "Random 2, the worst"]


@pytest.mark.parametrize("change", [{}, {"state": "FAIL", "values": None}], ids=["complete", "failed"])
def test_equal_runs_count_once(study, change):
    directory = study()
    record = yaml.safe_load((directory / "study.json").read_text())
    again = [
        {**each, "number": 100 + each["number"], **change} for each in record["trials"] if each["params"]["random"] == 2
    ]
    write_json(directory / "study.json", record | {"trials": [*record["trials"], *again]})
    before = {each.random: each.values for each in control_of(directory).genotypes}
    assert before == {random: tuple(own) for random, own in VALUES.items()}


def test_a_lost_trial_and_what_continued_it_are_one_run(study):
    directory = study()
    record = yaml.safe_load((directory / "study.json").read_text())
    lost = {**record["trials"][0], "number": 200, "state": "FAIL", "lost": True, "values": None}
    write_json(directory / "study.json", record | {"trials": [*record["trials"], lost]})
    found = control_of(directory).found
    assert (found.values, found.missing) == (tuple(VALUES[None]), {})


# ---- which studies are controls

SEEDS = {"seed_everything": {"choice": [0, 1, 2]}}


@pytest.mark.parametrize(
    ("space", "is_control"),
    [
        ({RANDOM: {"choice": [None, 0, 1]}} | SEEDS, True),
        ({"random": {"choice": [None, 0, 1], "path": RANDOM}}, True),
        ({"random": {"int": [0, 9], "path": RANDOM}} | SEEDS, True),
        ({"random": {"choice": [None, 0, 1], "path": "model.init_args.model.init_args.width"}}, False),
        ({"random": {"choice": ["a", "b"], "path": RANDOM}}, False),
        ({"random": {"choice": [True, False], "path": RANDOM}}, False),
        ({"random": {"float": [0.0, 1.0], "path": RANDOM}}, False),
        ({"lr": {"log_float": [1e-4, 1e-1]}} | SEEDS, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_study_is_a_control_when_its_space_has_random_genotypes(study, space, is_control):
    directory = study()
    record = yaml.safe_load((directory / "study.json").read_text())
    for each in record["trials"]:
        each["params"] = {name: each["params"].get("random") for name in space}
    write_json(directory / "study.json", record | {"space": space})
    assert (control_of(directory) is not None) == is_control


@pytest.mark.usefixtures("undrawn")
def test_what_else_is_varied_is_told(study):
    space = {"random": {"choice": list(VALUES), "path": RANDOM}, **SEEDS, "lr": {"log_float": [1e-3, 1e-1]}}
    directory = study(space=space)
    assert control_of(directory).others == ("lr",)
    assert any("also varies lr" in each for each in parts(section_of(directory), Notes)[0].sentences)
    assert not any("also varies" in each for each in parts(section_of(study()), Notes)[0].sentences)


# ---- the section


@pytest.mark.usefixtures("undrawn")
def test_parameters_are_those_that_the_runs_say(study):
    directory = study()
    rows = {row[0]: row for row in parts(section_of(directory), Table)[0].rows}
    assert rows["found"][5] == "40,000"
    assert rows["random 2"][5] == "43,000"
    (directory / "trials/0000/environment.json").write_text("{")
    (directory / "trials/0006/environment.json").unlink()
    assert control_of(directory).parameters(control_of(directory).found) == 40_000  # of the third seed


def test_found_best_and_worst_are_drawn(study, drawn):
    directory = study()
    control = control_of(directory)
    for each in control.genotypes:
        expected = GENOTYPE if each.random is None else random_genotype(GENOTYPE, each.random)
        assert control.genotype(each) == expected
    block = parts(section_of(directory), Pictures)[-1]
    assert block.captions == ["Found: 0.9700", "Random 1, the best: 0.9700", "Random 2, the worst: 0.9300"]
    assert len(block.svgs) == 3
    genotypes = [GENOTYPE, *(random_genotype(GENOTYPE, random) for random in (1, 2))]
    assert [(each.normal, each.reduce) for each in drawn] == [(each.normal, each.reduce) for each in genotypes]


@pytest.mark.usefixtures("undrawn")
def test_a_genotype_that_is_gone_leaves_the_rest_of_the_section(study):
    directory = study()
    for path in directory.glob("trials/*/config.yaml"):
        path.unlink()
    assert len(parts(section_of(directory), Pictures)[-1].svgs) == 3  # of the run that the study varies
    record = yaml.safe_load((directory / "study.json").read_text())
    record["search"]["run"]["model"]["init_args"]["model"]["init_args"]["genotype"] = "gone.json"
    write_json(directory / "study.json", record)
    section = section_of(directory)
    assert len(parts(section, Pictures)) == 1
    assert any("cannot be drawn" in block.text and "gone.json" in block.text for block in parts(section, Text))


@pytest.mark.usefixtures("undrawn")
def test_many_genotypes_are_folded(study):
    values = {None: [0.9]} | {key: [0.9 + key / 1000] for key in range(60)}
    section = section_of(study(values, seeds=1))
    (folded,) = parts(section, Folded)
    assert folded.summary == "All 61 genotypes"
    assert any("trained with one seed" in each for each in parts(section, Notes)[0].sentences)


def test_the_page_says_it_first_and_how_the_interval_was_made(study):
    directory = study()
    page = StudyPage(report(directory).read_text())
    assert list(page.sections)[:2] == ["To keep in mind", "Architectures"]
    assert "K \N{MINUS SIGN} 1 degrees of freedom" in page.sections["Architectures"]
    assert "the first of 6 with a probability of 17 %" in page.sections["Architectures"]
    assert "The unchanged run was not tried" not in page.sections["To keep in mind"]
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)


def test_a_study_of_something_else_has_none_of_it(study):
    directory = study(space={"lr": {"log_float": [1e-3, 1e-1]}} | SEEDS)
    record = StudyRecord.read(directory)
    assert architectures in SECTIONS
    assert architectures(record) is None
    assert verdict(record)[1].startswith("The best val_accuracy is ")
    assert "The unchanged run was not tried" in " ".join(cautions(record).blocks[0].sentences)


def test_its_section_needs_torch_only_for_the_drawings(study):
    directory = study()
    code = (
        "import sys; from lightning_automl.results import StudyRecord; from lightning_automl.results.control import "
        f"Control; print(Control.of(StudyRecord.read({str(directory)!r})).rank, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
