import json
import math
import shlex

import numpy as np
import pytest
import yaml
from architectures import (
    NASBENCH201,
    OPERATIONS,
    SKIP_STOP,
    architecture,
    cell_edges,
    derive,
    set_network,
    spied,
    write_search,
)
from conftest import ROOT
from test_study_report import StudyPage

from lightning_automl.__main__ import main
from lightning_automl.models.genotype import PUBLISHED, Genotype, random_genotype
from lightning_automl.results import Run, report
from lightning_automl.results.architecture_search import KINDS, ArchitectureRecord, Cells
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Commands, Folded, Notes, Pictures, Table, Text
from lightning_automl.results.sections import SECTIONS, verdict
from lightning_automl.results.sections.architecture import architecture as network_section
from lightning_automl.results.sections.architecture import architecture_search, search_progress
from lightning_automl.results.sections.architecture_words import (
    MANY_SKIPS,
    NEARLY_EQUAL,
    cell_words,
    node_words,
    short_name,
    verdict_of,
    warnings_of,
)
from lightning_automl.rundir import write_json


def evidence_of(directory):
    return Evidence(Run.read(directory))


def page_of(directory):
    return StudyPage(report(directory).read_text())


def parts(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def record_of(content, tmp_path):
    write_json(tmp_path / "architecture.json", content)
    return ArchitectureRecord.read(tmp_path)


@pytest.fixture
def searched(digits):
    """The digits' run as if it had been a search."""
    return lambda content=None, **keys: write_search(digits, content or architecture(), **keys)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made, and not rendered, which costs more than all else; the tests of pictures render them."""
    monkeypatch.setattr("lightning_automl.results.page._svg", lambda name, figure, font="path": f"<svg id={name}/>")


@pytest.fixture
def drawn(monkeypatch):
    """The genotypes of which drawings are made."""
    return spied(monkeypatch)


# ---- reading


def test_what_a_search_has_written_is_read(tmp_path):
    content = architecture(5, eigenvalue=True, cost=True, chosen=3, guards=[SKIP_STOP])
    record = record_of(content, tmp_path)
    assert record.operations == OPERATIONS
    assert [each.epoch for each in record.epochs] == [0, 1, 2, 3, 4]
    assert (record.chosen, record.reason) == (3, "the last epoch")
    for each, given in zip(record.epochs, content["epochs"], strict=True):
        for kind in KINDS:
            assert each.strengths[kind] == pytest.approx(np.array(given["strengths"][kind]))
            assert [[list(edge) for edge in node] for node in each.cells.nodes(kind)] == given["genotype"][kind]
        assert each.skips == given["skips"]
        assert each.entropy == given["entropy"]
        assert each.eigenvalue == given["eigenvalue"]
        assert each.cost == given["cost"]
        assert each.accuracies == {stage: given[f"{stage}_accuracy"] for stage in ("train", "arch", "val")}
    assert record.genotype == record.epochs[3].cells  # of the chosen epoch, without a genotype.json
    assert [(guard.name, guard.fired) for guard in record.guards] == [("SkipStop", False)]
    assert record.doubts == ()


def test_a_genotype_of_the_package_is_read_as_it_is():
    for genotype in PUBLISHED.values():
        cells = Cells.of(genotype.to_dict())
        assert (cells.normal, cells.reduce, cells.inputs) == (genotype.normal, genotype.reduce, genotype.inputs)
        assert (cells.normal_concat, cells.reduce_concat) == (genotype.normal_concat, genotype.reduce_concat)


def test_since_when_a_genotype_is_the_same_does_not_hang_on_the_order_of_edges(tmp_path):
    content = architecture(6, drift=0.5)
    last = content["epochs"][-1]["genotype"]
    other = content["epochs"][0]["genotype"]
    turned = {**last, "normal": [node[::-1] for node in last["normal"]]}
    for each, genotype in zip(content["epochs"], [other, last, other, last, turned, last], strict=True):
        each["genotype"] = genotype
    assert other["normal"] != last["normal"]
    assert record_of(content, tmp_path).same_since() == 3


def without(key):
    def change(content):
        for each in content["epochs"]:
            each.pop(key)

    return change


def broken(key, value):
    def change(content):
        for each in content["epochs"]:
            each[key] = value

    return change


def top(key, value):
    return lambda content: content.__setitem__(key, value)


def gone(key):
    return lambda content: content.pop(key)


#: What may be missing or strange in the file, as another release, a user's own network or an editor leaves it.
CHANGES = {
    **{f"no {key}": without(key) for key in architecture(1)["epochs"][0] if key != "epoch"},
    **{f"{key} of another kind": broken(key, [1, "x"]) for key in architecture(1)["epochs"][0]},
    **{f"top {key} of another kind": top(key, 3) for key in architecture(1)},
    "everything null": lambda content: content.update(dict.fromkeys(content)),
    "every value null": lambda content: [each.update(dict.fromkeys(each)) for each in content["epochs"]],
    "top epochs gone": gone("epochs"),
    "strengths of another size": broken("strengths", {"normal": [[1.0]], "reduce": [[0.5, 0.5]] * 14}),
    "strengths null": broken("strengths", {"normal": [[None] * 8] * 14}),
    "a genotype with later sources": broken("genotype", {"normal": [[["skip_connect", 9]]]}),
    "edges of another size": top("edges", {"normal": {"sources": [0], "targets": []}, "reduce": 5}),
    "guards strange": top("guards", [None, {"name": None, "settings": 5}, "x"]),
    "chosen of no epoch": top("chosen", {"epoch": 99, "reason": None}),
    "a user's own network": top("operations", []),
    "a later version": top("version", 2),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_or_strange_leaves_the_rest_of_the_page(searched, name):
    content = architecture(3, guards=[SKIP_STOP], nodes=2)
    directory = searched(content)
    CHANGES[name](content)
    write_json(directory / "architecture.json", content)
    evidence = evidence_of(directory)
    section = architecture_search(evidence)
    assert len(parts(section, Pictures)) == 1  # of genotype.json
    assert len(parts(section, Commands)) == 1
    assert verdict(evidence)[0].startswith("The search ")
    lost = name.startswith(("top epochs", "epoch ", "every")) or name == "a later version"
    assert (search_progress(evidence) is None) == lost
    if name == "a later version":
        assert "version 2, and this program knows version 1" in parts(section, Notes)[0].sentences[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"epochs": [{"epoch": 0, "stren'])
@pytest.mark.parametrize("name", ["architecture.json", "genotype.json"])
@pytest.mark.usefixtures("undrawn")
def test_a_truncated_file_is_told_and_the_rest_is_shown(searched, name, text):
    directory = searched(architecture(2, nodes=2))
    (directory / name).write_text(text)
    section = architecture_search(evidence_of(directory))
    (notes,) = parts(section, Notes)
    assert f"{directory}/{name}" in notes.sentences[0]
    assert "cannot be shown" in notes.sentences[0]
    assert (search_progress(evidence_of(directory)) is not None) == (name == "genotype.json")
    assert len(parts(section, Pictures)) == 1  # of the chosen epoch, or of genotype.json


def test_a_page_whose_files_are_all_damaged_appears(searched):
    directory = searched(architecture(2, nodes=2))
    for name in ("architecture.json", "genotype.json"):
        (directory / name).write_text("{")
    page = page_of(directory)
    assert page.sections["Found architecture"].count("is damaged") == 2
    assert "How the search went" not in page.sections
    assert {"Metrics", "Learning curves", "Commands"} <= page.sections.keys()
    assert verdict(evidence_of(directory))[0] == "This architecture search has left no genotype that can be read."


def test_an_operation_and_a_space_of_the_users_own_are_shown(searched):
    operations = ("none", "my $op_{2}", "skip_connect", "squeeze_excitation")
    content = architecture(4, operations=operations, nodes=2, kinds=("normal",), favoured="my $op_{2}")
    page = page_of(searched(content))
    assert "other operation" in page.sections["Found architecture"]
    assert "my $op {2}" in page.sections["How the search went"].replace("\N{NO-BREAK SPACE}", " ")


# ---- the page of a search


def test_a_run_that_is_no_search_has_none_of_it(digits):
    evidence = evidence_of(digits)
    assert architecture_search(evidence) is search_progress(evidence) is network_section(evidence) is None


def test_a_search_before_its_first_epoch_has_none_of_it(digits):
    set_network(digits, "lightning_automl.models.DartsSpace", {})
    assert architecture_search(evidence_of(digits)) is None


@pytest.mark.usefixtures("undrawn")
def test_the_page_begins_with_what_was_found_and_why(searched):
    content = architecture(6, chosen=3, reason="SkipStop: 2 skip connections in epoch 5")
    directory = searched(content)
    (sentence, *_, last) = verdict(evidence_of(directory))
    assert sentence.startswith(
        "The search chose the genotype of epoch 4 of 6 (SkipStop: 2 skip connections in epoch 5): its normal cell has "
    )
    assert last.startswith("The network of the search, which holds all operations: on the 359 test images")
    titles = [section.title for make in SECTIONS[:3] if (section := make(evidence_of(directory)))]
    assert titles == ["To keep in mind", "Found architecture", "How the search went"]


def test_an_unfinished_search_says_what_it_would_choose_and_how_to_go_on(searched):
    directory = searched(architecture(2))
    for name in ("summary.json", "predictions_val.safetensors", "predictions_test.safetensors"):
        (directory / name).unlink()
    sentences = verdict(evidence_of(directory))
    assert sentences[0].startswith("So far the search would choose the genotype of epoch 2 of 2")
    assert "goes on from the newest checkpoint" in sentences[-1]
    assert "Found architecture" in page_of(directory).sections


def test_the_genotype_is_drawn_and_told(searched, drawn):
    directory = searched(architecture(4, cost=True))
    section = architecture_search(evidence_of(directory))
    (block,) = parts(section, Pictures)
    content = json.loads((directory / "genotype.json").read_text())
    assert drawn == [Cells.of(content)]
    assert len(block.svgs) == 1
    facts = dict(parts(section, Table)[0].rows)
    cells = Cells.of(content)
    assert facts["normal cell"] == cell_words(cells, "normal")
    assert facts["reduction cell"] == cell_words(cells, "reduce")
    assert facts["its cost"] == "8,000,000 flops"


@pytest.mark.usefixtures("undrawn")
def test_each_guard_is_listed_with_its_settings_and_whether_it_fired(searched):
    fired = {"name": "EigenvalueStop", "settings": {"lag": 4}, "fired": True, "sentence": "it grew"}
    most = {"name": "max_skips", "settings": {"max_skips": 2}, "fired": False, "sentence": "at most 2"}
    section = architecture_search(evidence_of(searched(architecture(3, guards=[SKIP_STOP, fired, most]))))
    assert parts(section, Table)[1].rows == [
        ["SkipStop", "skips 2, kind normal", "no", "The normal cell never had 2 skip connections."],
        ["EigenvalueStop", "lag 4", "yes", "It grew."],
        ["max_skips", "max_skips 2", "", "At most 2."],
    ]


@pytest.mark.parametrize(("guards", "warned"), [([], True), (["max_skips", "warm-up"], True), (["SkipStop"], False)])
def test_a_search_that_nothing_could_end_is_told(tmp_path, guards, warned):
    listed = [{"name": name, "settings": {}, "fired": False, "sentence": ""} for name in guards]
    record = record_of(architecture(3, guards=listed), tmp_path)
    assert any("No guard that could end the search" in each for each in warnings_of(record)) == warned


def lines_of(directory):
    (commands,) = parts(architecture_search(evidence_of(directory)), Commands)
    return [shlex.split(line) for line in commands.lines]


def parsed(line, capfd):
    """The config that a line for `fit` comes to."""
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main([*line[1:], "--print_config"])
    return yaml.safe_load(capfd.readouterr().out)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_train_the_found_genotype_and_compare_it(searched, monkeypatch, capfd):
    directory = searched(architecture(3))
    write_json(directory / "genotype.json", PUBLISHED["darts_v1"].to_dict())
    monkeypatch.chdir(ROOT)
    fit, search = lines_of(directory)
    assert (fit[:2], search[:2]) == (["lightning-automl", "fit"], ["lightning-automl", "search"])
    config = parsed(fit, capfd)
    network = config["model"]["init_args"]["model"]
    assert network["class_path"].endswith(".GenotypeNetwork")
    assert Genotype.from_dict(network["init_args"]["genotype"]) == PUBLISHED["darts_v1"]
    assert config["data"]["class_path"].endswith(".DigitsDataModule")
    assert (ROOT / search[search.index("--config") + 1]).exists()
    assert search[search.index("--run.model.init_args.model.init_args.genotype") + 1] == f"{directory}/genotype.json"


@pytest.mark.usefixtures("undrawn")
def test_the_commands_name_the_data_and_the_network_of_another_space(searched, monkeypatch, capfd, make_npz, tmp_path):
    content = architecture(3, operations=NASBENCH201, kinds=("normal",), inputs=1, nodes=3)
    directory = searched(content)
    path = make_npz(tmp_path / "my images.npz")
    data = {"class_path": "lightning_automl.data.ArraysDataModule", "init_args": {"path": str(path)}}
    data["init_args"] |= {"arch_fraction": 0.5, "batch_size": 16}
    config = yaml.safe_load((directory / "config.yaml").read_text()) | {"data": data}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    blocks = architecture_search(evidence_of(directory)).blocks
    assert not any(isinstance(block, Commands) for block in blocks)  # the package has no network of this space
    assert any("one of your own" in str(block) for block in blocks)
    config["model"]["init_args"]["model"]["class_path"] = "lightning_automl.models.NasBench201Space"
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(ROOT)
    fit, search = lines_of(directory)
    config = parsed(fit, capfd)
    assert config["data"]["class_path"].endswith(".ArraysDataModule")
    assert config["data"]["init_args"]["path"] == str(path)
    assert config["data"]["init_args"]["batch_size"] == 16
    assert config["data"]["init_args"]["arch_fraction"] is None
    assert config["model"]["init_args"]["model"]["class_path"].endswith(".NasBench201Network")
    assert f"--run.{fit[fit.index('--data')][2:]}" in search
    assert config["trainer"]["callbacks"] is None  # there is no drop path
    assert search[search.index("--run.trainer.callbacks") + 1] == "null"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kinds", [("normal",), ("normal", "reduce")], ids="+".join)
def test_the_pictures_are_those_of_what_is_known(searched, kinds):
    content = architecture(3, kinds=kinds)
    section = search_progress(evidence_of(searched(content)))
    histories, strengths = parts(section, Pictures)
    assert len(histories.svgs) == 3  # accuracies, skips, entropy
    assert len(strengths.svgs) == len(kinds)
    content = architecture(3, kinds=kinds, eigenvalue=True, cost=True)
    histories, strengths = parts(search_progress(evidence_of(searched(content))), Pictures)
    assert len(histories.svgs) == 5
    for each in content["epochs"]:
        each.update(strengths={}, skips={}, entropy={}, cost=None, eigenvalue=None)
    (histories,) = parts(search_progress(evidence_of(searched(content))), Pictures)
    assert len(histories.svgs) == 1


@pytest.mark.usefixtures("undrawn")
def test_the_table_of_genotypes_has_a_row_for_each_change(searched):
    edges = cell_edges(2, 4)
    strengths = np.full((14, 8), 0.1)
    strengths[:, OPERATIONS.index("sep_conv_3x3")] = 0.2
    first = derive(strengths, edges, OPERATIONS, 2)
    strengths[edges.index((1, 5)), OPERATIONS.index("skip_connect")] = 0.9
    second = derive(strengths, edges, OPERATIONS, 2)
    content = architecture(6)
    for each, normal in zip(content["epochs"], [first, first, second, second, second, first], strict=True):
        each["genotype"]["normal"] = normal
        each["genotype"]["reduce"] = []
    section = search_progress(evidence_of(searched(content)))
    (table,) = parts(section, Table)
    assert list(table.head) == ["epochs", "node 2", "node 3", "node 4", "node 5"]
    assert [row[0] for row in table.rows] == ["1 to 2", "3 to 5", "6"]
    plain = [[str(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in table.rows]
    assert plain[0][1] == "sep 3x3 (cₖ₋₂), sep 3x3 (cₖ₋₁)"
    assert plain[1][1:4] == plain[0][1:4]
    assert plain[1][4] == "sep 3x3 (cₖ₋₂), skip (cₖ₋₁) *"
    assert [[cell.endswith("*") for cell in row[1:]] for row in plain] == [[False] * 4, *[[False] * 3 + [True]] * 2]
    assert any("2 changes in 6 epochs, the last one in epoch 6" in block.text for block in parts(section, Text))


@pytest.mark.usefixtures("undrawn")
def test_many_changes_are_folded(searched):
    content = architecture(12)
    for epoch, each in enumerate(content["epochs"]):
        each["genotype"]["normal"][0] = [["sep_conv_3x3", epoch % 2]]
        each["genotype"]["reduce"] = content["epochs"][0]["genotype"]["reduce"]
    section = search_progress(evidence_of(searched(content)))
    (folded,) = parts(section, Folded)
    assert folded.summary.startswith("Normal cell: 11 changes in 12 epochs, the last one in epoch 12")
    (table,) = parts(section, Table)
    assert [row[0] for row in table.rows] == ["1 to 12"]


# ---- warnings


def cells(skips, others=0, filler="sep_conv_3x3"):
    edges = [("skip_connect", 0)] * skips + [(filler, 1)] * others
    return Cells(tuple((edge,) for edge in edges), (2,), ((("skip_connect", 0),),) * 8)


@pytest.mark.parametrize(("skips", "warned"), [(0, False), (3, False), (4, True), (8, True)])
def test_many_skip_connections_of_the_normal_cell_are_told(skips, warned):
    record = ArchitectureRecord(genotype=cells(skips, 8 - skips))
    found = [each for each in warnings_of(record) if "Skip connections dominate" in each]
    assert bool(found) == warned == (skips >= MANY_SKIPS * 8)
    if found:
        assert f"{skips} of the 8 edges of the normal cell" in found[0]
        assert verdict_of(record, True)[1] == found[0]


def test_a_cell_without_weights_is_told():
    record = ArchitectureRecord(genotype=cells(3, 5, "max_pool_3x3"))
    assert any("No edge of the normal cell has weights to learn" in each for each in warnings_of(record))
    learning = ArchitectureRecord(genotype=cells(3, 5))
    assert not any("weights to learn" in each for each in warnings_of(learning))


@pytest.mark.parametrize(("drift", "warned"), [(0.001, True), (0.3, False)])
def test_strengths_that_hardly_differ_are_told(tmp_path, drift, warned):
    record = record_of(architecture(10, drift=drift, favoured="sep_conv_3x3"), tmp_path)
    assert (record.newest.entropy["normal"] >= NEARLY_EQUAL * math.log(8)) == warned
    assert any("nearly equal" in each for each in warnings_of(record)) == warned


def test_a_genotype_that_changes_until_the_end_is_told(tmp_path):
    content = architecture(20)
    calm = record_of(content, tmp_path)
    for each in content["epochs"]:
        each["genotype"] = content["epochs"][-1]["genotype"]
    settled = record_of(content, tmp_path)
    assert not any("not settled" in each for each in warnings_of(settled))
    assert settled.same_since() == 0
    content["epochs"][-2]["genotype"] = content["epochs"][-3]["genotype"] = architecture(20, favoured="skip_connect")[
        "epochs"
    ][-1]["genotype"]
    late = record_of(content, tmp_path)
    assert late.same_since() == 19
    assert any("still changed in epoch 20 of 20" in each for each in warnings_of(late))
    assert calm.genotype == late.genotype


def test_what_no_search_tells_is_always_said():
    for record in (ArchitectureRecord(), ArchitectureRecord(genotype=cells(0, 8), guards=())):
        said = " ".join(warnings_of(record))
        assert "does not predict" in said
        assert "One search is one sample" in said


# ---- words


def test_short_names_tell_all_operations_apart():
    from lightning_automl.models.ops import OPS

    assert len({short_name(name) for name in OPS}) == len(OPS)
    assert (short_name("sep_conv_3x3"), short_name("skip_connect"), short_name("none")) == ("sep 3x3", "skip", "none")


def test_a_node_names_its_sources_as_the_drawing_does():
    text = node_words((("skip_connect", 3), ("sep_conv_3x3", 0), ("max_pool_3x3", 1)), 2)
    assert text.replace("\N{NO-BREAK SPACE}", " ") == "sep 3x3 (cₖ₋₂), max pool 3x3 (cₖ₋₁), skip (3)"


def test_every_operation_is_counted_as_one_kind():
    from lightning_automl.models.ops import OPS

    told = cell_words(Cells((tuple((name, 0) for name in OPS),)), "normal")
    assert sum(int(word) for word in told.split() if word.isdigit()) == len(OPS)
    assert "1 edge left out" in told


# ---- a run with a genotype


@pytest.mark.parametrize("random", [None, 7])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_run_with_a_genotype_draws_it(digits, drawn, name, random):
    given = {"genotype": PUBLISHED[name].to_dict(), "random": random}
    set_network(digits, "lightning_automl.models.GenotypeNetwork", given)
    section = network_section(evidence_of(digits))
    genotype = PUBLISHED[name] if random is None else random_genotype(PUBLISHED[name], random)
    facts = dict(parts(section, Table)[0].rows)
    assert facts["digest"] == genotype.digest()
    assert (name in facts["genotype"]) if random is None else (f"with the seed {random}" in facts["genotype"])
    assert facts["parameters"] == f"{evidence_of(digits).run.environment['network']['parameters']:,}"
    assert len(parts(section, Pictures)) == 1
    assert [(each.normal, each.reduce) for each in drawn] == [(genotype.normal, genotype.reduce)]
    assert architecture_search(evidence_of(digits)) is None


def test_the_page_of_a_run_with_a_genotype_shows_it_in_place_of_its_text(digits):
    set_network(digits, "lightning_automl.models.GenotypeNetwork", {"genotype": PUBLISHED["darts_v2"].to_dict()})
    page = page_of(digits)
    assert "darts_v2, which is published" in page.sections["Architecture"]
    assert "drawn above" in page.sections["Configuration that differs from the defaults"]
    assert "max_pool_3x3" not in page.sections["Configuration that differs from the defaults"]


def test_a_genotype_that_is_gone_is_told_in_one_sentence(digits):
    set_network(digits, "lightning_automl.models.GenotypeNetwork", {"genotype": "gone.json"})
    (text,) = parts(network_section(evidence_of(digits)), Text)
    assert text.text.startswith("The genotype of this run cannot be shown: ")
    assert "gone.json" in text.text


@pytest.mark.usefixtures("undrawn")
def test_the_caution_of_a_search_is_on_its_page(searched):
    (notes,) = parts(architecture_search(evidence_of(searched(architecture(3, favoured="skip_connect")))), Notes)
    assert "Skip connections dominate" in notes.sentences[0]
    assert "No guard that could end the search watched for a collapse." in notes.sentences
