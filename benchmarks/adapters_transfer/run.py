"""Adapters against full fine-tuning where images are few: EfficientNet-Lite0 to MedMNIST, ResNet-20 to CIFAR-100.

``python -m benchmarks.adapters_transfer.run --data-root DIR``; killed, it goes on with the same command. Every arm gets
the same grid of learning rates, tried with the first seed and chosen on validation images; the test split is opened
once by each run that enters the table.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from benchmarks import results
from lightning_automl.data import ArraysDataModule
from lightning_automl.metrics import bootstrap_interval, paired_bootstrap
from lightning_automl.models import Backbone, ResNet
from lightning_automl.models.cost import parameter_count
from lightning_automl.process import keep_freed_memory
from lightning_automl.rundir import read_json, replacing, write_json
from lightning_automl.tasks import WarmupCosineLR
from lightning_automl.tasks.precision import fast_precision

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Condition:
    """Some images of a data set, a pretrained network for them, and how long it is trained.

    Args:
        file: Name of the file with the data, in the layout of MedMNIST.
        images: Train images a class.
        val_images: Validation images a class at most.
        seeds: Number of runs an arm; each draws its own train images.
        batch_size: Train images a step.
        epochs: Passes through the train images.
        rates: Learning rates that every arm tries.
        chosen_with: Name of the condition whose first seed chooses among them.
    """

    file: str
    images: int
    val_images: int
    seeds: int
    batch_size: int
    epochs: int
    chosen_with: str
    rates: tuple[float, ...] = (3e-4, 2e-3, 1e-2)


BREAST, PNEUMONIA, CIFAR = "BreastMNIST, 10 a class", "PneumoniaMNIST, 10 a class", "CIFAR-100, 50 a class"
CONDITIONS = {
    BREAST: Condition("breastmnist.npz", 10, 50, 3, 20, 20, BREAST),
    PNEUMONIA: Condition("pneumoniamnist.npz", 10, 50, 3, 20, 20, PNEUMONIA),
    "BreastMNIST, 50 a class": Condition("breastmnist.npz", 50, 50, 3, 20, 6, BREAST),
    "PneumoniaMNIST, 50 a class": Condition("pneumoniamnist.npz", 50, 50, 3, 20, 6, PNEUMONIA),
    CIFAR: Condition("cifar100.npz", 50, 10, 1, 100, 1, CIFAR, (2e-3, 1e-2)),
}
FEW = [name for name in CONDITIONS if name != CIFAR]
#: What the others are compared with: batch norms trained, which is the default, or at rest as with adapters.
REFERENCES = ("full", "full, batch norms at rest")


def _lora(rank: int) -> Any:
    from lightning_automl.adapters import LoraConfig

    return LoraConfig(r=rank)


def _conv(**arguments: Any) -> Any:
    from lightning_automl.adapters.conv_adapter import ConvAdapterConfig

    return ConvAdapterConfig(scheme="residual_parallel", **arguments)


#: Arguments of FinetuneTask; everything that is not named is as by default, on all networks.
ARMS: dict[str, Callable[[], dict[str, Any]]] = {
    "head only": lambda: {"unfreeze": "head"},
    "last block": lambda: {"unfreeze": 1},
    REFERENCES[0]: lambda: {"unfreeze": "all"},
    REFERENCES[1]: lambda: {"unfreeze": "all", "batch_norm": "frozen"},
    "LoRA, r = 1": lambda: {"adapter": _lora(1)},
    "LoRA, r = 4": lambda: {"adapter": _lora(4)},
    "LoRA, r = 16": lambda: {"adapter": _lora(16)},
    "conv adapter, s = 1": lambda: {"adapter": _conv(scale="fixed", scale_init=1.0)},
    "conv adapter, s = 4": lambda: {"adapter": _conv(scale="fixed", scale_init=4.0)},
    "conv adapter, s learnable": lambda: {"adapter": _conv(scale="learnable")},
}


def network_of(name: str) -> str:
    """What is trained in a condition."""
    return "efficientnet_lite0" if name in FEW else "resnet20"


def network(condition: Condition, data: ArraysDataModule, data_root: Path) -> nn.Module:
    """The pretrained network of a condition, with a head for its classes."""
    if condition.file == "cifar100.npz":
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # with which the weights were trained
        return ResNet(data.num_classes, weights=str(data_root / "cifar10_resnet20.th"), mean=mean, std=std)
    return Backbone("efficientnet_lite0", data.num_classes, data.channels, data.image_size, resize=96)


def few_images(condition: Condition, seed: int, data_root: Path, work: Path) -> Path:
    """A file with the train images that a seed draws, the same validation images for all seeds, and the test split.

    A class's first ten of fifty train images are the ten of the smaller set of the same seed. Validation images that
    the data do not bring are taken from the train split first. No train image is byte for byte one of the others.
    """
    path = work / "data" / f"{Path(condition.file).stem}-{condition.images}-{seed}.npz"
    if path.exists():
        return path
    with np.load(data_root / condition.file) as file:
        arrays = {name: file[name] for name in file.files}
    everything = np.arange(len(arrays["train_labels"]))
    if "val_labels" in arrays:
        val = _draw(arrays["val_labels"], np.arange(len(arrays["val_labels"])), condition.val_images, 0)
        arrays |= {f"val_{what}": arrays[f"val_{what}"][val] for what in ("images", "labels")}
    else:
        val = _draw(arrays["train_labels"], everything, condition.val_images, 0)
        everything = np.setdiff1d(everything, val)
        arrays |= {f"val_{what}": arrays[f"train_{what}"][val] for what in ("images", "labels")}
    others = {image.tobytes() for split in ("val", "test") for image in arrays[f"{split}_images"]}
    everything = np.array([row for row in everything if arrays["train_images"][row].tobytes() not in others])
    train = _draw(arrays["train_labels"], everything, condition.images, seed + 1)
    arrays |= {f"train_{what}": arrays[f"train_{what}"][train] for what in ("images", "labels")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial_file, partial_file.open("wb") as out:
        np.savez(out, **arrays)
    return path


def _draw(labels: NDArray[Any], rows: NDArray[np.int64], images: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    own = labels.reshape(-1)
    return np.concatenate([generator.permutation(rows[own[rows] == label])[:images] for label in np.unique(own)])


class StepTimes(Callback):
    """CPU seconds of each training step, which on one thread are what it takes on a core of its own."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self.started)

    @property
    def median(self) -> float:
        """Median without the first steps, in which memory is allocated."""
        return statistics.median(self.seconds[2:])


class Run:
    """One training of an arm; it validates at the end, and tests when asked to.

    Args:
        condition: What to train on.
        arm: Name of the arm.
        rate: Peak learning rate of all that trains.
        seed: Decides about train images, new weights and order.
        data_root: Folder of the data and weights.
        work: Folder of the files of this benchmark.
        steps: End after so many steps, before there is a validation.
    """

    def __init__(
        self,
        condition: Condition,
        arm: str,
        rate: float,
        seed: int,
        data_root: Path,
        work: Path,
        steps: int = -1,
    ) -> None:
        from lightning_automl.tasks import FinetuneTask

        path = few_images(condition, seed, data_root, work)
        seed_everything(seed, verbose=False)
        self.data = ArraysDataModule(str(path), batch_size=condition.batch_size, base_augment="crop")
        base = network(condition, self.data, data_root)
        self.base_parameters = parameter_count(base)
        self.precision = fast_precision(base, "cpu")  # the same for all arms
        self.task = FinetuneTask(
            base,
            self.data.num_classes,
            optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01, fused=True),
            scheduler=partial(WarmupCosineLR, warmup=0.1),
            **ARMS[arm](),
        )
        self.times = StepTimes()
        self.trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=self.precision,
            max_epochs=condition.epochs,
            max_steps=steps,
            check_val_every_n_epoch=condition.epochs,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.times],
        )
        self.trainer.fit(self.task, self.data)
        metrics = self.trainer.callback_metrics
        #: On the validation images after the last epoch.
        self.validation = {
            name: float(metrics[f"val_{name}"])
            for name in ("loss", "accuracy", "balanced_accuracy")
            if f"val_{name}" in metrics
        }

    def test(self) -> dict[str, Any]:
        """Balanced accuracy and AUROC on the test images, and which of them are right, in the order of the file."""
        metrics = self.trainer.test(self.task, self.data, verbose=False)[0]
        scores, labels = self.task.predictions["test"]
        return {
            **{name: metrics[name] for name in ("test_balanced_accuracy", "test_auroc")},
            "right": (scores.argmax(1) == labels).int().tolist(),
        }

    def size(self) -> dict[str, float]:
        """Parameters that train, and bytes of all that a checkpoint keeps of the network."""
        trained = sum(each.numel() for each in self.task.parameters() if each.requires_grad)
        tensors = {name: value.contiguous().clone() for name, value in self.task.state_dict().items()}
        return {
            "trainable": trained,
            "trainable_share": trained / self.base_parameters,
            "file_bytes": len(save(tensors)),
        }


@dataclass(frozen=True)
class Job:
    """What one process does at a time: an arm with a seed, with all learning rates if it is to choose one."""

    name: str
    arm: str
    seed: int
    data_root: Path
    work: Path

    @property
    def file(self) -> Path:
        """Where the outcome is kept."""
        slug = "".join(letter if letter.isalnum() else "_" for letter in f"{self.name} {self.arm} {self.seed}")
        return self.work / "jobs" / f"{slug}.json"

    @property
    def chooser(self) -> "Job":
        """The job that chooses the learning rate of this one."""
        return replace(self, name=CONDITIONS[self.name].chosen_with, seed=0)

    @property
    def turn(self) -> tuple[bool, bool, int]:
        """Jobs of an earlier turn are done before."""
        return self.name == CIFAR, self != self.chooser, self.seed


def one(job: Job, until: float) -> dict[str, Any] | None:
    """Do a job unless it is done or the time is up; ``None`` for one that was left out."""
    done: dict[str, Any] | None = read_json(job.file)
    if done is not None or time.time() > until:
        return done
    _prepare()
    condition, started = CONDITIONS[job.name], time.time()
    rates = condition.rates
    if job != job.chooser:
        first = read_json(job.chooser.file)
        if first is None:
            return None
        rates = (first["rate"],)
    runs: list[Run] = []
    tried: list[dict[str, Any]] = []
    seconds: list[float] = []
    for rate in rates:
        run = Run(condition, job.arm, rate, job.seed, job.data_root, job.work)
        tried.append({"rate": rate, **run.validation})
        seconds.append(run.times.median)
        runs.append(run)
    best = min(range(len(tried)), key=lambda index: _order(tried[index]))
    outcome = {
        "condition": job.name,
        "arm": job.arm,
        "seed": job.seed,
        **tried[best],
        "tried": tried,
        "step_seconds": min(seconds),
        "precision": runs[best].precision,
        **runs[best].size(),
        **runs[best].test(),
        "seconds": time.time() - started,
    }
    write_json(job.file, outcome)
    return outcome


def _order(tried: dict[str, Any]) -> tuple[float, float]:
    """Higher balanced accuracy first, then lower loss; a loss that is no number is the worst."""
    loss = tried["loss"]
    return (-tried["balanced_accuracy"], loss) if np.isfinite(loss) else (1.0, 0.0)


def peak_memory(job: Job) -> dict[str, Any]:
    """Most memory of a process of its own that trains a few steps, in MB."""
    file = job.work / "memory" / job.file.name
    done: dict[str, Any] | None = read_json(file)
    if done is not None:
        return done
    _prepare()
    Run(CONDITIONS[job.name], job.arm, 1e-3, job.seed, job.data_root, job.work, steps=5)
    most = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    outcome = {"network": network_of(job.name), "arm": job.arm, "peak_memory_mb": most}
    write_json(file, outcome)
    return outcome


def _prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")


def summary(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each condition and arm.

    The accuracy is the mean over seeds; its interval, and those of the differences from full fine-tuning, are of a
    bootstrap over test images of that mean.
    """
    rows = []
    for name in CONDITIONS:
        arms = {
            arm: {job["seed"]: job for job in jobs if (job["condition"], job["arm"]) == (name, arm)} for arm in ARMS
        }
        for arm, own in arms.items():
            if not own:
                continue
            each = [statistics.fmean(job["right"]) for job in own.values()]
            any_job = next(iter(own.values()))
            images = len(any_job["right"])
            row: dict[str, Any] = {
                "condition": name,
                "arm": arm,
                "accuracy": statistics.fmean(each),
                "interval": bootstrap_interval(_mean_accuracy(own.values()), images)[:2],
                "accuracy_of_seeds": each,
                "balanced_accuracy": statistics.fmean(job["test_balanced_accuracy"] for job in own.values()),
                "auroc": statistics.fmean(job["test_auroc"] for job in own.values()),
                "rate": any_job["rate"],
            }
            for reference in REFERENCES:
                seeds = [seed for seed in own if seed in arms[reference]]
                if arm == reference or not seeds:
                    continue
                first, second = (_mean_accuracy(arms[which][seed] for seed in seeds) for which in (arm, reference))
                difference = paired_bootstrap(first, second, images)
                row[f"less {reference}"] = {
                    "mean": difference.difference,
                    "interval": [difference.low, difference.high],
                    "seeds": [
                        statistics.fmean(own[seed]["right"]) - statistics.fmean(arms[reference][seed]["right"])
                        for seed in seeds
                    ],
                    "balanced": statistics.fmean(
                        own[seed]["test_balanced_accuracy"] - arms[reference][seed]["test_balanced_accuracy"]
                        for seed in seeds
                    ),
                }
            rows.append(row)
    return rows


def _mean_accuracy(jobs: Iterable[dict[str, Any]]) -> Callable[[NDArray[np.int64]], float]:
    right = np.mean([job["right"] for job in jobs], 0)
    return lambda images: float(right[images].mean())


def costs(jobs: list[dict[str, Any]], memory: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an arm takes, one row for each network and arm."""
    rows = []
    for base in ("efficientnet_lite0", "resnet20"):
        for arm in ARMS:
            own = [job for job in jobs if job["arm"] == arm and network_of(job["condition"]) == base]
            if own:
                peaks = [each["peak_memory_mb"] for each in memory if (each["network"], each["arm"]) == (base, arm)]
                rows.append(
                    {
                        "network": base,
                        "arm": arm,
                        "trainable": own[0]["trainable"],
                        "trainable_share": own[0]["trainable_share"],
                        "file_kb": own[0]["file_bytes"] / 1024,
                        "step_ms": 1000 * statistics.median(job["step_seconds"] for job in own),
                        "precision": own[0]["precision"],
                        "peak_memory_mb": peaks[0] if peaks else None,
                    }
                )
    return rows


def overall(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm the mean difference from full fine-tuning over data sets, numbers of images and seeds of MedMNIST.

    The interval is Student's, as if the differences were independent; they share test images, so it is too narrow.
    """
    from scipy.stats import t as student

    found = []
    for reference in REFERENCES:
        for arm in ARMS:
            own = [row for row in rows if row["arm"] == arm and row["condition"] in FEW and f"less {reference}" in row]
            values = [value for row in own for value in row[f"less {reference}"]["seeds"]]
            if len(values) < 2:
                continue
            mean = statistics.fmean(values)
            reach = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
            found.append(
                {
                    "arm": arm,
                    "less": reference,
                    "mean": mean,
                    "interval": [mean - reach, mean + reach],
                    "differences": len(values),
                    "mean_of_balanced_accuracy": statistics.fmean(row[f"less {reference}"]["balanced"] for row in own),
                }
            )
    return found


def markdown(rows: list[dict[str, Any]], costs: list[dict[str, Any]], overall: list[dict[str, Any]]) -> str:
    """The tables of the README, in percent and in percentage points."""
    lines = []
    for name in CONDITIONS:
        head = ["arm", "test accuracy", "of each seed", *(f"less {reference}" for reference in REFERENCES)]
        lines += ["", f"{name}:", "", *_row(*head, "balanced accuracy", "AUROC", "learning rate", line=True)]
        for row in (row for row in rows if row["condition"] == name):
            low, high = (100 * end for end in row["interval"])
            lines += _row(
                row["arm"],
                f"{100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f})",
                ", ".join(f"{100 * value:.1f}" for value in row["accuracy_of_seeds"]),
                *(_difference(row.get(f"less {reference}")) for reference in REFERENCES),
                f"{100 * row['balanced_accuracy']:.1f}",
                f"{row['auroc']:.3f}",
                f"{row['rate']:g}",
            )
    lines += ["", *_row("arm", *(f"less {reference}" for reference in REFERENCES), "balanced accuracy", line=True)]
    for arm in ARMS:
        own = {each["less"]: each for each in overall if each["arm"] == arm}
        balanced = ", ".join(
            f"{100 * own[each]['mean_of_balanced_accuracy']:+.1f}" for each in REFERENCES if each in own
        )
        lines += _row(arm, *(_difference(own.get(reference)) for reference in REFERENCES), balanced)
    head = ["network", "arm", "trained parameters", "file, KB", "step, ms", "peak memory, MB"]
    lines += ["", *_row(*head, line=True)]
    for row in costs:
        lines += _row(
            row["network"],
            row["arm"],
            f"{row['trainable']:,} ({100 * row['trainable_share']:.1f} %)",
            f"{row['file_kb']:,.0f}",
            f"{row['step_ms']:.0f}",
            "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,}",
        )
    return "\n".join(lines)


def _row(*cells: str, line: bool = False) -> list[str]:
    return ["| " + " | ".join(cells) + " |", *(["|" + "---|" * len(cells)] if line else [])]


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--budget", type=float, default=2700, help="seconds after which no further run is started")
    parser.add_argument("--only", choices=ARMS, action="append", help="arms to run; all by default")
    parser.add_argument("--processes", type=int, default=2, help="each has one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/adapters_transfer"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of the .npz files")
    until = time.time() + arguments.budget
    every = [
        Job(name, arm, seed, arguments.data_root, arguments.work)
        for seed in range(max(condition.seeds for condition in CONDITIONS.values()))
        for name, condition in CONDITIONS.items()
        if seed < condition.seeds
        for arm in arguments.only or ARMS
    ]
    context = multiprocessing.get_context("spawn")
    jobs: list[dict[str, Any]] = []
    with context.Pool(arguments.processes) as pool:
        for turn in sorted({job.turn for job in every}):
            for outcome in pool.imap(partial(one, until=until), [job for job in every if job.turn == turn]):
                if outcome is None:
                    continue  # the time is up
                jobs.append(outcome)
                told = {key: outcome[key] for key in ("condition", "arm", "seed", "rate", "seconds")}
                print(told | {"test": round(statistics.fmean(outcome["right"]), 4)}, flush=True)
    with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
        measured = [job for job in every if job.seed == 0 and job.name in (FEW[-1], CIFAR)]
        memory = pool.map(peak_memory, measured, chunksize=1)
    rows, cost = summary(jobs), costs(jobs, memory)
    together = overall(rows)
    facts = {
        "budget": arguments.budget,
        "seconds_of_all_processes": sum(job["seconds"] for job in jobs),
        "jobs_left_out": len(every) - len(jobs),
        "tried": [{key: job[key] for key in ("condition", "arm", "seed", "tried")} for job in jobs],
    }
    print(results.write(HERE, "small", rows, costs=cost, overall=together, **facts))
    print(markdown(rows, cost, together))


if __name__ == "__main__":
    main()
