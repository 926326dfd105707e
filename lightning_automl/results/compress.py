"""Make the trained network of a run smaller by low rank, and say what that costs in accuracy."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.network import what_was_trained
from lightning_automl.results.run import Run, open_data
from lightning_automl.rundir import UserError, index_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule

log = logging.getLogger("lightning_automl")

_NO_VALIDATION = (
    "{} was trained without a validation split, by which a compressed network is judged; compress a run that has one"
)


@dataclass(frozen=True)
class Compression:
    """How a network is compressed before it is exported.

    Args:
        energy: Each layer keeps at least this share, in (0, 1], of its squared singular values; 0.95 when neither this
            nor ``flops`` is given.
        flops: The network keeps at most this share, in (0, 1), of its operations.
        form: ``channel`` or ``spatial``: how convolutions are cut in two, see
            :class:`~lightning_automl.adapters.low_rank.LowRankConfig`.
        finetune: Epochs on the train split afterwards; 0 for none.
        lr: Largest learning rate of these epochs, of AdamW with a warm-up and half a cosine.

    Raises:
        UserError: If a value is outside its range, or both ``energy`` and ``flops`` are given.
    """

    energy: float | None = None
    flops: float | None = None
    form: Literal["channel", "spatial"] = "channel"
    finetune: int = 0
    lr: float = 5e-4

    def __post_init__(self) -> None:
        from lightning_automl.adapters.low_rank import ENERGY, LowRankConfig

        if self.energy is None and self.flops is None:
            object.__setattr__(self, "energy", ENERGY)
        LowRankConfig(self.energy, self.flops, form=self.form)
        if self.finetune < 0:
            raise UserError(f"finetune is {self.finetune}; it is a number of epochs, 0 for none")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr is {self.lr}; a learning rate is above 0")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``energy=0.95,form=spatial,finetune=2``.

        Raises:
            UserError: If a part is not ``name=value`` with a known name, is given twice, or is out of its range.
        """
        kinds: dict[str, type] = {"energy": float, "flops": float, "form": str, "finetune": int, "lr": float}
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in kinds or not value:
                raise UserError(
                    f"--compress does not know {part.strip()!r}; give name=value with commas between, of the names "
                    f"{', '.join(kinds)}, as energy=0.95,finetune=2"
                )
            if name in given:
                raise UserError(f"--compress has {name} twice; give it once")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                expected = "a whole number" if kinds[name] is int else "a number"
                raise UserError(f"--compress has {name}={value}, which is not {expected}") from None
        return cls(**given)


class Evaluation(NamedTuple):
    """Predictions for the validation split, images in a fixed order."""

    correct: NDArray[np.bool_]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the images whose most probable class is theirs."""
        return float(self.correct.mean())


def compressed_task(run: Run, task: "LightningModule", wanted: Compression) -> tuple["LightningModule", dict[str, Any]]:
    """Compress the network of a run, evaluate it on the validation split before and after, and train it on if asked.

    The test split stays closed. Batch norms are folded before, so that what is trained on afterwards has none behind
    its layers. Of a network that was trained on, the weights of the last epoch are kept if they are not worse on the
    validation split than the compressed ones.

    Args:
        run: Its data are read.
        task: What :func:`~lightning_automl.results.network.trained_task` gives; it stays as it is. Its ``model`` maps
            normalised images to logits.
        wanted: How.

    Returns:
        A task like the given one with the compressed network, in evaluation mode, on the CPU; and the record that
        ``compression.json`` will have: ``accuracy`` and ``loss`` (``before``, ``after``, and ``finetuned`` when asked
        for), ``lost`` (the difference to before of each, with the ends of its 95 % interval), ``parameters`` and
        ``flops`` (before and after), ``layers``, ``plan``, ``exported`` (``after`` or ``finetuned``), ``images`` and
        ``asked``.

    Raises:
        UserError: If the data are not there or have changed, there is no validation split, the task is of another kind,
            or nothing can be compressed.
    """
    import torch

    from lightning_automl.adapters.low_rank import LowRankConfig, low_rank_network
    from lightning_automl.tasks import ClassificationTask

    started = time.monotonic()
    if not isinstance(task, ClassificationTask):
        raise UserError(f"only the network of a ClassificationTask can be compressed, not of a {type(task).__name__}")
    data = _data_module(run)
    before = _evaluate(run, task, data)
    trained = what_was_trained(run)
    image = torch.randn(2, trained.channels, *trained.image_size, generator=torch.Generator().manual_seed(0))
    config = LowRankConfig(wanted.energy, wanted.flops, form=wanted.form)
    network, report = low_rank_network(_plain_network(task), config, image)
    log.info("%s", str(report).splitlines()[0])
    log.debug("%s", report)
    smaller = _task_like(task, network)
    results = {"before": before, "after": _evaluate(run, smaller, data)}
    exported = "after"
    if wanted.finetune:
        tuned = _finetuned(run, smaller, data, wanted)
        results["finetuned"] = _evaluate(run, tuned, data)
        if results["finetuned"].accuracy >= results["after"].accuracy:
            smaller, exported = tuned, "finetuned"
    record = {
        "asked": asdict(wanted),
        "images": len(before.correct),
        "accuracy": {name: each.accuracy for name, each in results.items()},
        "loss": {name: each.loss for name, each in results.items()},
        "lost": {name: _lost(before, each) for name, each in results.items() if name != "before"},
        "parameters": dict(zip(("before", "after"), report.parameters, strict=True)),
        "flops": dict(zip(("before", "after"), report.flops, strict=True)),
        "exported": exported,
        "seconds": round(time.monotonic() - started, 1),
        "plan": report.plan,
        "layers": [asdict(layer) for layer in report.layers],
    }
    log.info("%s", sentence(record))
    smaller.low_rank = report.plan
    return smaller.eval().cpu(), record


def sentence(record: Mapping[str, Any]) -> str:
    """What a ``compression.json`` says, in short."""
    accuracy, parameters, flops = record["accuracy"], record["parameters"], record["flops"]
    tuned = f", after fine-tuning {accuracy['finetuned']:.4f}" if "finetuned" in accuracy else ""
    return (
        f"validation accuracy before {accuracy['before']:.4f}, after {accuracy['after']:.4f}{tuned}; "
        f"{parameters['after'] / parameters['before']:.1%} of the parameters and "
        f"{flops['after'] / max(1, flops['before']):.1%} of the operations are left"
    )


def _plain_network(task: Any) -> Any:
    """The task's network; adapters are merged into it."""
    return (task.deployed() if hasattr(task, "deployed") else task).model


def _task_like(task: Any, network: Any) -> Any:
    """A plain task with another network and the same normalisation and loss."""
    import torch

    from lightning_automl.tasks import ClassificationTask

    other = ClassificationTask(
        network,
        task.num_classes,
        loss=deepcopy(task.loss),
        decay_norms_and_biases=False,
        channels_last=task.memory_format is torch.channels_last,
    )
    other.mean, other.std = task.mean.clone(), task.std.clone()
    return other.eval()


def _data_module(run: Run) -> Any:
    if not run.config.get("data"):
        raise UserError(f"{run.directory} has no data module, without which no accuracy can be told")
    try:
        data = open_data(run)
    except Exception as error:
        raise UserError(
            f"the accuracy of the compressed network cannot be told, since the data of {run.directory} cannot be "
            f"opened: {one_sentence(root_cause(error))}"
        ) from error
    if "val" not in getattr(data, "split_rows", ("val",)):
        raise UserError(_NO_VALIDATION.format(run.directory))
    known = run.data.get("index")
    if known and hasattr(data, "contents"):
        if index_digest(data.contents.names, data.contents.labels.tolist()) != known:
            raise UserError(
                f"the data are not those that {run.directory} was trained on: images were added, removed, renamed or "
                "labelled otherwise, which changes the splits; restore them"
            )
    return data


@contextmanager
def _quiet() -> "Iterator[None]":
    """Without what Lightning says of devices and loaders, and with the random state as it was afterwards."""
    from lightning.pytorch.utilities.seed import isolate_rng

    loud = logging.getLogger("lightning.pytorch")
    level, seed = loud.level, os.environ.get("PL_GLOBAL_SEED")
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), isolate_rng():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            yield
    finally:
        loud.setLevel(level)
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _trainer(run: Run, **kwargs: Any) -> Any:
    from lightning.pytorch import Trainer

    return Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        use_distributed_sampler=False,
        default_root_dir=run.directory,
        **kwargs,
    )


def _evaluate(run: Run, task: Any, data: Any) -> Evaluation:
    with _quiet():
        trainer = _trainer(run)
        trainer.validate(task, datamodule=data, verbose=False)
    if "val" not in task.predictions:
        raise UserError(_NO_VALIDATION.format(run.directory))
    scores, labels = (tensor.cpu() for tensor in task.predictions["val"])
    task.cpu().eval()
    return Evaluation((scores.argmax(1) == labels).numpy(), float(trainer.callback_metrics["val_loss"]))


def _finetuned(run: Run, task: Any, data: Any, wanted: Compression) -> Any:
    """A copy of a task, trained for some epochs."""
    import torch
    from lightning.pytorch import seed_everything

    from lightning_automl.tasks.precision import fast_precision
    from lightning_automl.tasks.schedules import WarmupCosineLR

    tuned = _task_like(task, deepcopy(task.model))
    tuned.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=wanted.lr, weight_decay=1e-4)
    tuned.scheduler = WarmupCosineLR
    tuned.train()
    tuned.requires_grad_(True)
    with _quiet():
        given = run.config.get("seed_everything")
        seed_everything(given if isinstance(given, int) and not isinstance(given, bool) else 0, verbose=False)
        trainer = _trainer(
            run,
            max_epochs=wanted.finetune,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            precision=fast_precision(tuned, "cuda" if torch.cuda.is_available() else "cpu"),
        )
        try:
            trainer.fit(tuned, datamodule=data)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
    if trainer.received_sigterm:
        raise KeyboardInterrupt
    return tuned.cpu().eval()


def _lost(before: Evaluation, other: Evaluation) -> list[float]:
    """How much lower the accuracy is, with the ends of its 95 % interval over images."""
    from lightning_automl.metrics.comparison import paired_bootstrap

    found = paired_bootstrap(
        lambda rows: float(before.correct[rows].mean()),
        lambda rows: float(other.correct[rows].mean()),
        len(before.correct),
    )
    return [found.difference, found.low, found.high]
