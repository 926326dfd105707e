"""What a process of the trial server does for a search: read fit configs, look at images, be one rank of a trial."""

import csv
import os
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_automl.auto.evaluation import evaluate
from lightning_automl.callbacks import Heartbeat, TrialPruning, mode_of
from lightning_automl.cli import AutoMLCLI
from lightning_automl.density import score_fold
from lightning_automl.models.cost import latency
from lightning_automl.parser import adapt_jsonargparse, keep_genotypes
from lightning_automl.process import keep_freed_memory, see_working_directory
from lightning_automl.rundir import UserError, environment, read_json, summarise
from lightning_automl.search.channel import Channel
from lightning_automl.studies.runs import COSTS


def run(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Do what ``payload["do"]`` says: ``resolve``, ``check`` or ``fit`` configs, or score policies by ``density``."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    keep_freed_memory()
    adapt_jsonargparse()
    see_working_directory()
    actions = {
        **{"resolve": _resolve, "check": _check, "fit": _fit},
        **{"density": score_fold, "look": _look, "evaluate": evaluate},
    }
    return actions[payload["do"]](payload, channel)


def _look(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """What is seen of the images of ``auto`` before anything is trained, and where we are."""
    from lightning_automl.auto.look import look

    facts = look(
        payload["data"],
        Path(payload["directory"]),
        **{key: payload[key] for key in ("modality", "image_size", "folds", "budget")},
    )
    return {"facts": facts.to_dict(), "environment": environment(payload["seed"])}


class _Reader(AutoMLCLI):
    """Reads a fit config and builds nothing."""

    def _check_directory(self, directory: Path, config: Any) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...

    @classmethod
    def resolved(cls, arguments: list[str], before: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole config of a fit command line, as ``fit`` writes it into its directory.

        Args:
            arguments: The command line behind ``fit``.
            before: What it was when a search was started that goes on now.
        """
        reader = cls(["fit", *arguments])
        keep_genotypes(reader.config["fit"], before)
        config: dict[str, Any] = yaml.safe_load(reader.dump())
        return config


def _resolve(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The resolved config of ``arguments``, how many processes it takes, what is to be made small, and where we are."""
    config = _Reader.resolved(payload["arguments"], payload.get("before"))
    monitors = payload["monitors"] or [config["monitor"]]
    modes = [config["mode"] if name == config["monitor"] and config.get("mode") else mode_of(name) for name in monitors]
    modes = ["min" if name in COSTS else mode for name, mode in zip(monitors, modes, strict=True)]
    if config["trainer"].get("limit_val_batches") == 0:
        raise UserError("the run has trainer.limit_val_batches=0, so nothing is validated that could be searched for")
    return {
        "config": config,
        "monitors": monitors,
        "directions": [f"{mode}imize" for mode in modes],
        "ranks": _ranks(config["trainer"], payload["gpus"]),
        "environment": environment(payload["seed"]),
    }


def _ranks(trainer: dict[str, Any], gpus: int) -> int:
    """Processes of a run on a machine where it sees so many GPUs."""
    if trainer["num_nodes"] != 1:
        raise UserError(
            f"the run has trainer.num_nodes={trainer['num_nodes']}, and a trial stays on one machine; start the same "
            "search with one --storage on each of them"
        )
    if str(trainer["strategy"]).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(f"the run has trainer.strategy={trainer['strategy']}, which cannot be pruned; use ddp")
    devices = trainer["devices"]
    if str(devices) in ("auto", "-1"):
        return max(1, gpus) if trainer["accelerator"] != "cpu" else 1
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UserError(
            f"the run has trainer.devices={devices}; give a number, the search chooses which each trial gets"
        )
    return int(devices)


def _check(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Read ``configs`` and build what is in those of ``built``; the first mistake in one is raised.

    Returns:
        ``resolved``: those of ``configs``; ``images``: what the data modules of ``built`` say of their images, as far
        as they say it, by ``channels`` and ``image_size``.
    """
    path = Path(payload["file"])
    resolved, images = [], []
    for config in payload["configs"]:
        path.write_text(yaml.safe_dump(config))
        resolved.append(_Reader.resolved(["--config", str(path)]))
    for config in payload["built"]:
        path.write_text(yaml.safe_dump(config))
        data = _Builder(["fit", "--config", str(path)]).datamodule
        images.append({name: getattr(data, name) for name in ("channels", "image_size") if hasattr(data, name)})
    return {"resolved": resolved, "images": images}


class _Builder(_Reader):
    """Builds data module and network too, reads no image and trains nothing."""

    def instantiate_classes(self) -> None:
        AutoMLCLI.instantiate_classes(self)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


class _Parent:
    """A trial as :class:`TrialPruning` wants it, which is asked for over the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._prune = False

    def report(self, value: float, step: int) -> None:
        """Tell a value and be told whether to stop."""
        self._prune = bool(self._channel.ask({"report": value, "step": step}))

    def should_prune(self) -> bool:
        """Whether the newest report was answered by a stop."""
        return self._prune


class _Started(Callback):
    """Tells when the first training step is done."""

    def __init__(self, channel: Channel) -> None:
        self._channel: Channel | None = channel

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tell it once."""
        if self._channel is not None:
            self._channel.send({"started": trainer.current_epoch})
        self._channel = None


def _fit(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train in ``directory`` by the config that lies there, going on from its last checkpoint.

    Returns:
        On rank 0 ``status``, ``metrics`` (those of the best epoch, and the costs asked for) and ``history`` (the
        watched metric by number of epochs done).
    """
    directory = Path(payload["directory"])
    watching: list[Callback] = [Heartbeat(channel.beat)]
    if channel.rank == 0:
        watching.append(_Started(channel))
    if payload["watch"]:
        watching.append(TrialPruning(_Parent(channel) if channel.rank == 0 else None, payload["watch"]))
    cli = AutoMLCLI(["fit", "--config", str(directory / "config.yaml"), "--dir", str(directory)], watching)
    if channel.rank != 0:
        return {}
    summary = read_json(directory / "summary.json")
    metrics = dict(summary["metrics"])
    cost = (read_json(directory / "environment.json") or {}).get("network", {})
    metrics |= {name: cost[name] for name in ("parameters", "flops") if name in cost}
    if "latency" in payload["costs"] and not cli.finished_before:
        data: Any = cli.datamodule
        network = getattr(cli.model, "model", cli.model).to(cli.trainer.strategy.root_device)
        metrics["latency"] = latency(network, (data.channels, *data.image_size))
        summarise(directory, "fit", summary["status"], metrics={"latency": metrics["latency"]})
    with (directory / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if payload["watch"] and row.get(payload["watch"])]
    history = [[int(float(row["epoch"])) + 1, float(row[payload["watch"]])] for row in rows]
    return {"status": summary["status"], "metrics": metrics, "history": history}
