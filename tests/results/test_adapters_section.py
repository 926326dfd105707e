import json
import shutil

import pytest
from conftest import DIGITS
from safetensors import safe_open

from lightning_automl.__main__ import main
from lightning_automl.results import Run
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Folded, Notes, Pictures, Table, Text
from lightning_automl.results.sections.adapters import adapters
from lightning_automl.rundir import write_json

CONFIG = """
model:
  class_path: FinetuneTask
  init_args:
    model: {class_path: ResNet, init_args: {depth: 8, width: 16}}
    adapter: {class_path: lightning_automl.adapters.LoraConfig, init_args: {r: 2}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}
data:
  class_path: DigitsDataModule
trainer: {max_epochs: 2, limit_train_batches: 2, callbacks: [AdapterStatistics]}
"""


@pytest.fixture(scope="session")
def finished_adapter(tmp_path_factory):
    """Two epochs of LoRA on a network with random weights."""
    home = tmp_path_factory.mktemp("adapter")
    (home / "config.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(home / "config.yaml"), f"--dir={home / 'run'}"]) == 0
    return home / "run"


@pytest.fixture
def adapted(finished_adapter, tmp_path):
    return shutil.copytree(finished_adapter, tmp_path / "run")


def section_of(directory):
    return adapters(Evidence(Run.read(directory)))


def parts(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def test_a_run_without_an_adapter_has_no_such_section(digits):
    assert section_of(digits) is None


def test_the_section_says_what_is_adapted_and_what_it_costs(adapted):
    section = section_of(adapted)
    facts = {name: value for name, value in parts(section, Table)[0].rows}
    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    network = json.loads((adapted / "environment.json").read_text())["network"]
    assert facts["method"] == "LoRA"
    assert facts["settings"] == "r 2, lora_alpha 8.0"
    assert facts["adapted"].startswith(f"{len(config['target_modules'])} layers, from layer1.0.conv1 to layer3.0.conv2")
    assert facts["trained and saved in full"] == "linear"
    trained = f"{network['trained_parameters']:,} of {network['parameters']:,}"
    assert facts["parameters that are trained"].startswith(trained)
    size = sum(path.stat().st_size for path in (adapted / "adapter").iterdir())
    assert facts["files of the best epoch"] == f"adapter/, {size / 1e6:.2f} MB"
    with safe_open(adapted / "adapter" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["base_digest"] in facts.values()


def test_it_has_a_row_a_layer_a_picture_and_the_warnings(adapted):
    recorded = json.loads((adapted / "adapter_statistics.json").read_text())
    section = section_of(adapted)
    (*_, table) = parts(section, Table)
    last = recorded["epochs"][-1]["layers"]
    assert [(row[0], row[2]) for row in table.rows] == [(each["layer"], f"{each['ratio']:.3g}") for each in last]
    assert table.head[2:4] == ["ratio, epoch 2", "ratio, epoch 1"]
    assert len(parts(section, Pictures)[0].svgs) == 1
    assert [note for notes in parts(section, Notes) for note in notes.sentences] == recorded["warnings"]
    (text,) = (block.text for block in parts(section, Text))
    smallest = min(last, key=lambda each: each["ratio"])
    assert f"{smallest['ratio']:.2g} ({smallest['layer']})" in text


def test_many_layers_are_folded_and_what_is_not_finite_has_no_number(adapted):
    path = adapted / "adapter_statistics.json"
    recorded = json.loads(path.read_text())
    layer = recorded["epochs"][-1]["layers"][0]
    recorded["epochs"] = [
        {"epoch": 4, "layers": [{**layer, "layer": f"layer {at}", "ratio": None, "scale": None} for at in range(13)]}
    ]
    recorded["warnings"] = []
    write_json(path, recorded)
    section = section_of(adapted)
    (folded,) = parts(section, Folded)
    assert folded.summary == "The 13 adapted layers"
    assert {row[2] for row in folded.table.rows} == {""}
    assert "not finite" in parts(section, Text)[0].text
    assert parts(section, Notes) == []


def test_without_records_it_says_who_would_make_them(adapted):
    (adapted / "adapter_statistics.json").unlink()
    section = section_of(adapted)
    assert "AdapterStatistics" in parts(section, Text)[0].text
    assert parts(section, Pictures) == []


def test_a_run_at_its_beginning_tells_of_its_adapter_by_its_config(adapted):
    (adapted / "adapter_statistics.json").unlink()
    shutil.rmtree(adapted / "adapter")
    (table,) = section_of(adapted).blocks
    assert dict(table.rows)["method"] == "LoraConfig"


def test_the_pictures_are_among_what_the_run_has_left(adapted):
    summary = json.loads((adapted / "summary.json").read_text())
    assert summary["artefacts"]["adapter_outputs"] == "adapter_outputs.png"


def test_without_an_adapter_the_callback_is_a_mistake_told_in_one_sentence(command):
    answer = command("fit", "--config", DIGITS, "--trainer.callbacks=[AdapterStatistics]", "--dir=run")
    assert answer.status == 2
    assert answer.err.count("AdapterStatistics watches adapters, and ClassificationTask has none") == 1
