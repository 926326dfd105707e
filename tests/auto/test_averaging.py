import pytest
import torch
import yaml
from torch import nn

from lightning_automl.auto.averaging import average_weights, choose_average
from lightning_automl.auto.evaluated import weights_digest
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run

CONFIG = {"model": {"class_path": "ClassificationTask"}, "trainer": {}, "data": None}


def run_of(place, state, **facts):
    (place / "checkpoints").mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (place / "data.json").write_text("{}")
    torch.save({"state_dict": state, "optimizer_states": [1], **facts}, place / "checkpoints" / "best.ckpt")
    return place


def kept(place):
    return torch.load(place / "checkpoints" / "best.ckpt", weights_only=True)


def test_numbers_are_averaged_and_counts_are_those_of_the_first(tmp_path):
    places = [
        run_of(tmp_path / str(index), {"w": torch.tensor([1.0, float(index)]), "n": torch.tensor(7 + index)})
        for index in range(3)
    ]
    assert average_weights(places, tmp_path / "averaged")
    found = kept(tmp_path / "averaged")
    assert found["state_dict"]["w"].tolist() == [1.0, 1.0]
    assert found["state_dict"]["w"].dtype == torch.float32
    assert found["state_dict"]["n"] == 7
    assert "optimizer_states" not in found
    assert [kept(place)["state_dict"]["w"][1] for place in places] == [0, 1, 2]


def test_runs_of_other_shapes_or_other_frozen_weights_have_no_average(tmp_path):
    first = run_of(tmp_path / "a", {"w": torch.zeros(2)}, frozen={"base": "x"})
    others = [
        run_of(tmp_path / "b", {"w": torch.zeros(3)}, frozen={"base": "x"}),
        run_of(tmp_path / "c", {"v": torch.zeros(2)}, frozen={"base": "x"}),
        run_of(tmp_path / "d", {"w": torch.zeros(2)}, frozen={"base": "y"}),
    ]
    for other in others:
        assert not average_weights([first, other], tmp_path / "averaged")
        assert not (tmp_path / "averaged").exists()


def test_what_was_averaged_is_averaged_anew_when_there_are_other_runs(tmp_path):
    places = [run_of(tmp_path / str(index), {"w": torch.full((2,), float(index))}) for index in range(3)]
    target = tmp_path / "averaged"
    average_weights(places[:2], target)
    before = weights_digest(target)
    (target / "evaluated_val.safetensors").touch()
    average_weights(places[:2], target)
    assert (target / "evaluated_val.safetensors").exists()
    average_weights(places, target)
    assert weights_digest(target) != before
    assert kept(target)["state_dict"]["w"].tolist() == [1.0, 1.0]
    assert not (target / "evaluated_val.safetensors").exists()


def test_the_average_of_a_run_with_itself_is_that_run(digits):
    average_weights([digits, digits], digits.parent / "averaged")
    one, other = (trained_task(Run.read(place)) for place in (digits, digits.parent / "averaged"))
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(one(images), other(images))


def test_frozen_weights_come_along(tmp_path):
    from lightning_automl.models import ResNet
    from lightning_automl.tasks import FinetuneTask

    places = []
    for index in range(2):
        torch.manual_seed(0)
        network = ResNet(num_classes=3, depth=8, width=4)
        torch.manual_seed(index)
        nn.init.normal_(network.linear.weight)
        task = FinetuneTask(network, num_classes=3)
        checkpoint = {"state_dict": task.state_dict()}
        task.on_save_checkpoint(checkpoint)
        place = run_of(tmp_path / str(index), checkpoint["state_dict"], **{"frozen": checkpoint["frozen"]})
        task.save_base(place / "checkpoints" / "base.safetensors")
        places.append((place, task))
    target = tmp_path / "averaged"
    assert average_weights([place for place, _ in places], target)
    torch.manual_seed(0)
    mean = FinetuneTask(ResNet(num_classes=3, depth=8, width=4), num_classes=3)
    mean.load_base(target / "checkpoints" / "base.safetensors")
    mean.on_load_checkpoint(kept(target))
    mean.load_state_dict(kept(target)["state_dict"])
    heads = [task.model.linear.weight for _, task in places]
    torch.testing.assert_close(mean.model.linear.weight, (heads[0] + heads[1]) / 2)
    assert torch.equal(mean.model.conv1.weight, places[0][1].model.conv1.weight)


@pytest.mark.parametrize(
    ("predictions", "weights", "direction", "kind"),
    [
        (0.9, 0.8, "maximize", "predictions"),
        (0.9, 0.9, "maximize", "predictions"),
        (0.9, 0.91, "maximize", "weights"),
        (0.9, 0.91, "minimize", "predictions"),
        (0.9, 0.89, "minimize", "weights"),
        (0.9, None, "maximize", "predictions"),
        (None, 0.9, "maximize", "weights"),
        (None, None, "maximize", "single"),
    ],
)
def test_validation_chooses_and_of_equal_ones_predictions(predictions, weights, direction, kind):
    values = {"predictions": predictions, "weights": weights, "single": 0.99}
    chosen, why = choose_average(values, direction, "val_auroc")
    assert chosen == kind
    assert ("cheaper" in why) == (None not in (predictions, weights))
