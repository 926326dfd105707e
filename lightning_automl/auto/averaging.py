"""How runs of several seeds become one model: their predictions are averaged, or their weights."""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.results.ensemble import Average
from lightning_automl.rundir import read_json, replacing, write_json, write_text

#: The directory of the averaged weights, beside the runs that they are of.
AVERAGED = "averaged"

#: Of a checkpoint what belongs to a training that goes on.
_OF_TRAINING = {"optimizer_states", "lr_schedulers", "callbacks", "loops"}


def average_weights(places: Sequence[Path], target: Path) -> bool:
    """Make a run directory whose weights are the means of those of several runs.

    Wortsman et al., *Model soups*, ICML 2022, https://arxiv.org/abs/2203.05482 (uniform soup). In use it costs no more
    than one run. Of runs that do not share most of their weights from the start it is usually worthless, since what a
    channel has learned in one is elsewhere in the other; so it is to be judged by the validation split.

    Left is what ``trained_task`` needs: ``config.yaml`` and ``data.json`` of the first run, ``checkpoints/best.ckpt``,
    and ``checkpoints/base.safetensors`` where a part of the network is frozen. Floating-point tensors are averaged, and
    others are those of the first run. What is there of the same runs is left as it is.

    Args:
        places: Directories of two or more runs.
        target: The directory to make.

    Returns:
        Whether it could be done: the checkpoints have to have tensors of the same names and shapes, beside the same
        frozen weights.
    """
    import torch

    from lightning_automl.auto.evaluated import weights_digest

    members = {place.name: weights_digest(place) for place in places}
    if (read_json(target / "members.json") or {}) == members:
        return True
    shutil.rmtree(target, ignore_errors=True)
    first, *others = (_read(place) for place in places)
    state: dict[str, Any] = first["state_dict"]
    shapes = {name: value.shape for name, value in state.items()}
    for other in others:
        same = {name: value.shape for name, value in other["state_dict"].items()} == shapes
        if not same or other.get("frozen") != first.get("frozen"):
            return False
    for name, value in state.items():
        if value.is_floating_point():
            several = [value, *(other["state_dict"][name] for other in others)]
            state[name] = torch.stack([each.double() for each in several]).mean(0).to(value.dtype)
    checkpoints = target / "checkpoints"
    # Of a file with a name torch would keep the name, so that the same weights would not give the same bytes.
    with replacing(checkpoints / "best.ckpt") as partial, partial.open("wb") as file:
        torch.save({name: value for name, value in first.items() if name not in _OF_TRAINING}, file)
    for name in ("config.yaml", "data.json"):
        write_text(target / name, (places[0] / name).read_text())
    base = places[0] / "checkpoints" / "base.safetensors"
    if base.exists():
        _link(base, checkpoints / base.name)
    write_json(target / "members.json", members)
    return True


def choose_average(values: Mapping[str, float | None], direction: str, metric: str) -> tuple[Average, str]:
    """The way of averaging that the validation split prefers, and why.

    Args:
        values: Of ``predictions``, ``weights`` and ``single``, the mean of the single runs: the metric on the
            validation split, None where there is none.
        direction: ``maximize`` or ``minimize`` for it.
        metric: What the values are.

    Returns:
        ``single`` if it alone has a value; ``weights``, which cost no more than one run in use, if they are strictly
        better than ``predictions`` or these have none; else ``predictions``. And a sentence.
    """
    predictions, weights = values["predictions"], values["weights"]
    if predictions is None and weights is None:
        return "single", "there is one run of one seed, so there is nothing to average"
    if weights is None:
        return "predictions", "the runs' weights have no mean that could be judged, so their predictions are averaged"
    if predictions is None:
        return "weights", "the runs' predictions have no mean that could be judged, so their weights are averaged"
    both = f"{metric} {weights:.4f} against {predictions:.4f} on the validation split"
    if weights > predictions if direction == "maximize" else weights < predictions:
        return "weights", f"averaged weights are better than averaged predictions, and cheaper in use: {both}"
    return (
        "predictions",
        f"averaged weights would be cheaper in use, but are not better than averaged predictions: {both}",
    )


def _read(place: Path) -> dict[str, Any]:
    import torch

    checkpoint: dict[str, Any] = torch.load(
        place / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True, mmap=True
    )
    return checkpoint


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or where that cannot be, a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    with replacing(target) as partial:
        shutil.copyfile(source, partial)
