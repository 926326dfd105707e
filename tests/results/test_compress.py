import json

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open

from lightning_automl.adapters.low_rank import LowRankConfig, low_rank_network
from lightning_automl.data import DigitsDataModule
from lightning_automl.results import Run, export, report
from lightning_automl.results.compress import Compression, compressed_task
from lightning_automl.results.network import trained_task
from lightning_automl.rundir import UserError


def record_of(directory):
    return json.loads((directory / "compression.json").read_text())


@pytest.fixture(scope="module")
def validation(finished_digits):
    data = DigitsDataModule(**Run.read(finished_digits).config["data"]["init_args"])
    data.setup("validate")
    images, labels = zip(*data.val_dataloader(), strict=True)
    return torch.cat(images).float() / 255, torch.cat(labels)


def test_the_file_has_the_accuracy_that_is_told_and_the_run_stays_as_it_was(digits, validation):
    images, labels = validation
    before = (digits / "summary.json").read_text()
    path = export(digits, "onnx", compress="energy=0.6")
    assert path == digits / "model_compressed.onnx"
    record = record_of(digits)
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})
    accuracy = (logits.argmax(1) == labels.numpy()).mean()
    assert record["accuracy"]["after"] == pytest.approx(accuracy)
    assert record["accuracy"]["before"] == pytest.approx(json.loads(before)["metrics"]["val_accuracy"])
    difference, low, high = record["lost"]["after"]
    assert difference == pytest.approx(record["accuracy"]["before"] - record["accuracy"]["after"])
    assert low <= difference <= high
    assert record["images"] == len(labels)
    assert record["exported"] == "after"
    assert record["flops"]["after"] < record["flops"]["before"]
    assert record["file"] == str(path)
    assert (digits / "summary.json").read_text() == before  # the test split was not opened again
    assert not list(digits.glob("lightning_logs"))


def test_fine_tuning_wins_back_accuracy_and_is_told(digits, validation):
    images, labels = validation
    path = export(digits, "safetensors", compress="flops=0.15,finetune=2,lr=0.002")
    record = record_of(digits)
    accuracy = record["accuracy"]
    assert record["flops"]["after"] <= 0.15 * record["flops"]["before"]
    assert accuracy["after"] < accuracy["before"] - 0.02
    assert accuracy["finetuned"] > accuracy["after"]
    assert record["loss"]["finetuned"] < record["loss"]["after"]
    assert record["exported"] == "finetuned"
    # The file says how to build the network that its tensors belong to.
    task = trained_task(Run.read(digits))
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["low_rank"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no dictionary
    task.model, _ = low_rank_network(task.model, LowRankConfig(**plan))
    task.load_state_dict(tensors)
    with torch.no_grad():
        assert (task(images).argmax(1) == labels).float().mean() == pytest.approx(accuracy["finetuned"])


def test_the_same_command_gives_the_same_again_and_leaves_the_random_state(finished_digits):
    run = Run.read(finished_digits)
    results = []
    for _ in range(2):
        task = trained_task(run)
        state = torch.random.get_rng_state()
        task, record = compressed_task(run, task, Compression(flops=0.2, finetune=1))
        assert torch.equal(state, torch.random.get_rng_state())
        results.append((task.state_dict(), record["accuracy"]))
        torch.rand(1)
    (first, accuracy), (second, again) = results
    assert accuracy == again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_fine_tuning_made_worse_are_not_exported(finished_digits):
    run = Run.read(finished_digits)
    _, record = compressed_task(run, trained_task(run), Compression(energy=0.9, finetune=1, lr=10.0))
    assert record["accuracy"]["finetuned"] < record["accuracy"]["after"]
    assert record["exported"] == "after"


def test_the_report_has_a_section(digits):
    export(digits, "safetensors", compress="energy=0.8,form=spatial,finetune=1")
    text = report(digits).read_text()
    for expected in (
        "Compression by low rank",
        "compressed and fine-tuned",
        "keeping 80.0 % of the energy of each, in the spatial form",
        "216 validation images; the test split was not opened",
    ):
        assert expected in text


def test_by_default_95_percent_of_the_energy_are_kept():
    assert Compression.parse("finetune=2") == Compression(energy=0.95, finetune=2)
    assert Compression.parse("flops=0.5, form=spatial") == Compression(None, 0.5, "spatial")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("energie=0.9", "--compress does not know 'energie=0.9'; give name=value"),
        ("energy", "--compress does not know 'energy'"),
        ("energy=much", "--compress has energy=much, which is not a number"),
        ("finetune=1.5", "--compress has finetune=1.5, which is not a whole number"),
        ("energy=0.9,energy=0.8", "--compress has energy twice"),
        ("energy=1.2", "energy is 1.2; it is a share in (0, 1]"),
        ("energy=nan", "energy is nan"),
        ("flops=0.5,energy=0.9", "energy and flops are given"),
        ("form=round", "unknown form 'round'; known: channel, spatial"),
        ("finetune=-1", "finetune is -1"),
        ("lr=0", "lr is 0.0"),
        ("lr=inf", "lr is inf"),
        ("flops=0.001", "flops is 0.001, but with rank 1 everywhere 0.0"),
        ("energy=1", "with an energy of 1 no layer gets smaller; give 0.9"),
    ],
)
def test_mistakes_end_with_one_sentence(command, finished_digits, text, sentence):
    answer = command("export", finished_digits, "--format=safetensors", "--compress", text)
    assert answer.status == 2
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"lightning-automl: {sentence}")
    assert not (finished_digits / "compression.json").exists()


def test_data_that_are_gone_changed_or_without_validation_images_are_told(digits, tmp_path):
    config = yaml.safe_load((digits / "config.yaml").read_text())
    about = json.loads((digits / "data.json").read_text())
    (digits / "data.json").write_text(json.dumps(about | {"index": "0" * 32}))
    with pytest.raises(UserError, match=r"the data are not those that .* was trained on"):
        export(digits, "safetensors", compress="energy=0.9")
    (digits / "data.json").write_text(json.dumps(about))
    config["data"]["init_args"]["train_on_val"] = True
    (digits / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="was trained without a validation split"):
        export(digits, "safetensors", compress="energy=0.9")
    arguments = {"path": str(tmp_path / "gone.npz")}
    config["data"] = {"class_path": "lightning_automl.data.ArraysDataModule", "init_args": arguments}
    (digits / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"the data of .* cannot be opened: .*gone\.npz"):
        export(digits, "safetensors", compress="energy=0.9")
    config["data"] = None
    (digits / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="has no data module, without which no accuracy can be told"):
        export(digits, "safetensors", compress="energy=0.9")
    assert np.all([not path.name.startswith("model") for path in digits.iterdir()])


def test_tasks_of_another_kind_are_refused(finished_digits):
    from lightning.pytorch import LightningModule

    with pytest.raises(UserError, match="only the network of a ClassificationTask can be compressed"):
        compressed_task(Run.read(finished_digits), LightningModule(), Compression())
