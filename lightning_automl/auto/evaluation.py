"""What trained networks give for the images of a split, found in a process of the trial server: one for all of them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_automl.auto.averaging import average_weights
from lightning_automl.auto.evaluated import file_of, is_evaluated, read_evaluated, weights_digest, write_predictions
from lightning_automl.auto.shown import choose_images
from lightning_automl.callbacks.records import split_digest
from lightning_automl.mistakes import one_sentence
from lightning_automl.models.activation import class_activation_maps
from lightning_automl.results.ensemble import combine
from lightning_automl.results.network import DIVERGED, probabilities, trained_task
from lightning_automl.results.run import Predictions, Run, open_data
from lightning_automl.rundir import UserError, index_digest, replacing
from lightning_automl.search.channel import Channel

log = logging.getLogger("lightning_automl")

_BATCH = 128

#: What of a data module matters in training alone, and what it is for an evaluation.
_OF_TRAINING = {
    **{"batch_size": _BATCH, "base_augment": "none", "train_policy": None, "sampling": "shuffle"},
    "arch_fraction": None,
}


def evaluate(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Write what the networks of run directories give for a split to ``evaluated_<split>.safetensors`` in each.

    Those files have the tensors of a run's ``predictions_<split>.safetensors``; their metadata say of which weights
    they are, and what is there of the same weights is left as it is. The images are not augmented, and the networks
    computed in float32.

    Args:
        payload: ``directories`` of the runs and the ``split``; ``averages``, pairs of a directory to make and the runs
            whose weights it is to hold the mean of, which is evaluated too; ``maps`` None or ``file``, where to write
            class activation maps, ``members``, the runs of the model whose first they are of, and ``most``, of how many
            images.
        channel: To the strategy.

    Returns:
        ``failed``: reasons by directory, of networks that give no numbers or cannot be built; ``averaged``: directories
        with averages that can be used; ``maps``: whether there are any.

    Raises:
        UserError: If the data are not those of the training.
    """
    split = payload["split"]
    opened = _Data()
    failed: dict[str, str] = {}
    averaged = []

    def try_one(directory: str) -> None:
        if is_evaluated(Path(directory), split):
            return
        run = Run.read(directory)
        data = opened.of(run, split)
        channel.beat()
        try:
            _evaluate(run, data, split, channel)
        except UserError as error:
            failed[directory] = str(error)

    for directory in payload["directories"]:
        try_one(directory)
    for target, members in payload.get("averages") or []:
        usable = [Path(member) for member in members if member not in failed]
        if len(usable) > 1 and average_weights(usable, Path(target)):
            try_one(target)
            averaged += [target] if target not in failed else []
    maps = payload.get("maps")
    shown = False
    if maps and not failed.keys() & set(maps["members"]):
        run = Run.read(maps["members"][0])
        shown = _write_maps(run, opened.of(run, split), split, maps)
    return {"failed": failed, "averaged": averaged, "maps": shown}


class _Data:
    """The data module of runs, built and read once for those that see the same images."""

    def __init__(self) -> None:
        self._key = ""
        self._data: Any = None

    def of(self, run: Run, split: str) -> Any:
        """The data module of a run, of which a split is wanted.

        Raises:
            UserError: If the data are not those of the training.
        """
        data = dict(run.config["data"])
        arguments = dict(data.get("init_args") or {})
        # The test split is the same whatever fold a run did without.
        others = _OF_TRAINING | ({"fold": None, "without_folds": None} if split == "test" else {})
        data["init_args"] = arguments | {name: value for name, value in others.items() if name in arguments}
        key = json.dumps([data, run.data.get("index")], sort_keys=True)
        if key != self._key:
            self._key, self._data = key, None  # the former one's images are not needed any more
            plain = Run(run.directory, run.config | {"data": data}, None, {}, run.data, [])
            self._data = open_data(plain)
            if run.data.get("index") != index_digest(self._data.contents.names, self._data.contents.labels.tolist()):
                raise UserError(
                    f"the data are not those that {run.directory} was trained on; restore them, or start anew"
                )
        return self._data


def _device(run: Run) -> torch.device:
    wanted = (run.config.get("trainer") or {}).get("accelerator")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def _network(run: Run) -> Any:
    """The task of a run on its device, in the layout of its training."""
    task: Any = trained_task(run).to(_device(run))
    return task.to(memory_format=task.memory_format) if hasattr(task, "memory_format") else task


def _evaluate(run: Run, data: Any, split: str, channel: Channel) -> None:
    task, device = _network(run), _device(run)
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode():
        for images, own in data.eval_dataloader(split):
            scores.append(probabilities(task, task(images.to(device).float().div_(255)).float()).cpu())
            labels.append(own.cpu())
            channel.beat()
    found = torch.cat(scores).numpy()
    if not np.isfinite(found).all():
        raise UserError(DIVERGED.format(run.directory))
    rows = data.split_rows[split]
    groups = data.contents.groups
    codes = None if groups is None else np.unique(groups[rows], return_inverse=True)[1].reshape(-1)
    validated = run.predictions("val")
    origin = {key: value for key, value in (validated.origin if validated else {}).items() if key in ("epoch", "step")}
    origin |= {"split": split_digest(data, split), "weights": weights_digest(run.directory)}
    predictions = Predictions(found, torch.cat(labels).numpy(), rows, codes, origin)
    write_predictions(file_of(run.directory, split), predictions)


def _write_maps(run: Run, data: Any, split: str, maps: Mapping[str, Any]) -> bool:
    """Write class activation maps of the first member's network for the class that the whole model predicts."""
    from safetensors.torch import save

    file = Path(maps["file"])
    members = [read_evaluated(Path(member), split) for member in maps["members"]]
    scores = combine([member.probabilities for member in members])
    positions = choose_images(scores, members[0].labels, maps["most"])
    images, labels = data.dataset(split)[torch.from_numpy(positions)]
    predicted = torch.from_numpy(scores.argmax(1)[positions])
    task, device = _network(run), _device(run)
    try:
        found = class_activation_maps(task, images.to(device).float().div_(255), predicted.to(device))
    except Exception as error:  # of whatever network; a picture is not worth the model
        log.warning("where the network looks cannot be shown: %s", one_sentence(error))
        found = None
    if found is None:
        file.unlink(missing_ok=True)
        return False
    tensors = {
        "maps": found.maps.cpu(),
        "images": images.cpu(),
        "rows": torch.from_numpy(data.split_rows[split][positions]),
        "labels": labels.cpu(),
        "predicted": predicted,
    }
    with replacing(file) as partial:
        partial.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}, {"split": split}))
    return True
