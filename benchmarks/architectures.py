"""What the benchmarks of architecture search share: searching, training what was found, and its rivals."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.studies import fit
from lightning_automl.models import DenseNet, GenotypeNetwork, ResNet, load_genotype, parameter_count

CONFIGS = Path(__file__).parent.parent / "configs" / "nas"


def config_of(name: str, **keys: Any) -> dict[str, Any]:
    """A config of ``configs/nas`` with values by dotted key, ``__`` for a dot."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    for key, value in keys.items():
        place = config
        *path, last = key.split("__")
        for each in path:
            place = place.setdefault(each, {})
        place[last] = value
    return config


def find_genotype(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Search for an architecture, or go on with it; the genotype, its skip connections, and what it took."""
    done = fit(config, directory)
    genotype = load_genotype(directory / "genotype.json")
    epochs = json.loads((directory / "architecture.json").read_text())["epochs"]
    return {
        "genotype": genotype.to_dict(),
        "skips": {kind: genotype.skips(kind) for kind in ("normal", "reduce")},
        "cpu_seconds": done.get("cpu_seconds"),  # unknown of one that was killed at its very end
        "memory": done["memory"],
        "supernet accuracy": epochs[-1].get("val_accuracy"),
    }


def train(config: dict[str, Any], network: dict[str, Any], directory: Path, seed: int) -> dict[str, Any]:
    """Train a network on train and val together and open the test split at the end.

    Returns:
        Its test accuracy, the processor seconds of the run, and the network's parameters.
    """
    config = json.loads(json.dumps(config))
    config["model"]["init_args"]["model"] = network
    if network["class_path"] != "GenotypeNetwork":
        config["trainer"].pop("callbacks", None)  # drop path is of the cells
    config["data"]["init_args"]["train_on_val"] = True
    config["trainer"]["limit_val_batches"] = 0
    config["seed_everything"] = seed
    done = fit(config, directory)
    assert done["test_opened"] == 1, f"{directory} has opened the test split {done['test_opened']} times"
    weights = torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    buffers = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")
    count = sum(value.numel() for name, value in weights.items() if name.rsplit(".", 1)[-1] not in buffers)
    return {"accuracy": done["metrics"]["test_accuracy"], "cpu_seconds": done["cpu_seconds"], "parameters": count}


def rivals(network: dict[str, Any], classes: int, channels: int) -> dict[str, dict[str, Any]]:
    """The ResNet and the DenseNet whose parameters are nearest to those of a ``GenotypeNetwork``."""
    wanted = parameter_count(GenotypeNetwork(classes, channels, **network["init_args"]))
    found = {}
    for cls, choices in (
        (ResNet, [{"depth": depth, "width": width} for depth in (8, 14, 20) for width in range(4, 40)]),
        (DenseNet, [{"depth": depth, "growth": growth} for depth in (22, 40) for growth in range(4, 40)]),
    ):
        build: Callable[..., nn.Module] = cls
        with torch.device("meta"):
            counts = [parameter_count(build(classes, channels, **choice)) for choice in choices]
        # Of networks of about this size the deepest.
        near = [index for index, count in enumerate(counts) if abs(count - wanted) < 0.1 * wanted]
        best = max(near, key=lambda index: choices[index]["depth"], default=None)
        if best is None:
            best = min(range(len(counts)), key=lambda index: abs(counts[index] - wanted))
        same = [index for index in near if choices[index]["depth"] == choices[best]["depth"]] or [best]
        best = min(same, key=lambda index: abs(counts[index] - wanted))
        found[cls.__name__] = {"class_path": cls.__name__, "init_args": choices[best]}
    return found


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any], processes: int) -> dict[Any, Any]:
    """The result of each item, several at once."""
    items = list(items)
    with ThreadPoolExecutor(processes) as pool:
        return dict(zip(items, pool.map(work, items), strict=True))
