"""The commands, built on LightningCLI. The one file that knows all others; imported after ``--help`` is answered."""

import contextlib
import csv
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar, WeightAveraging  # noqa: F401  # EMA: short name in YAML
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_automl.augment
import lightning_automl.data
import lightning_automl.losses
import lightning_automl.models
import lightning_automl.tasks  # noqa: F401  # these imports make the short class names known
from lightning_automl.callbacks import AtomicCheckpointIO, BatchSizeProbe, GenotypeWriter, RunWriter, TrialPruning
from lightning_automl.callbacks.records import policy_changed
from lightning_automl.data.policies import policy_kept_in
from lightning_automl.mistakes import ending, one_sentence, root_cause
from lightning_automl.models import Supernet, flop_count, parameter_count
from lightning_automl.models.weights import without_loading
from lightning_automl.parser import Parser, adapt_jsonargparse, keep_genotypes, with_saved_config
from lightning_automl.process import keep_freed_memory, messages, rank, see_working_directory
from lightning_automl.results.configuration import RUN_DEFAULTS, TRAINER_DEFAULTS
from lightning_automl.results.network import FROM_DATA
from lightning_automl.rundir import (
    Status,
    UserError,
    check_continuation,
    environment,
    index_digest,
    lock,
    new_directory,
    read_json,
    remove_partial_files,
    summarise,
    write_json,
    write_text,
)
from lightning_automl.tasks.precision import fast_precision

log = logging.getLogger("lightning_automl")

#: The directory that rank 0 chose, for the ranks that Lightning starts from it.
DIRECTORY_VARIABLE = "LIGHTNING_AUTOML_DIR"

#: Keys of a command that are not part of what a run is.
NOT_KEPT = ("config", "dir", "ckpt_path", "weights_only", "verbose", "return_predictions", "data_split")


class AutoMLCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` in a run directory.

    Args:
        args: The command line behind the program's name.
        callbacks: Further ones that watch the run and are no part of its configuration.
    """

    def __init__(self, args: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
        self.arguments = list(args)
        self.watching = list(callbacks)
        self.started = time.monotonic()
        self.finished_before = False
        self.directory: Path | None = None
        with contextlib.ExitStack() as self.held:  # what is to be given back when the command ends
            self.log_to = self.held.enter_context(messages())
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=RUN_DEFAULTS["seed_everything"],
                trainer_defaults=dict(TRAINER_DEFAULTS),
                auto_configure_optimizers=False,
                parser_class=Parser,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own keys, and hand what the data know to the network and the task."""
        parser.add_argument(
            "--dir", type=str | None, default=None, help="Where everything goes; a new runs/NAME-N by default."
        )
        parser.add_argument(
            "--monitor", type=str, default=RUN_DEFAULTS["monitor"], help="Metric that decides which epoch is the best."
        )
        parser.add_argument(
            "--mode",
            type=Literal["min", "max"] | None,
            default=RUN_DEFAULTS["mode"],
            help="Whether the monitored metric is to be small or large; by its name when left out.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=RUN_DEFAULTS["test_after_fit"],
            help="Open the test split once at the end of fit.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int | None,
            default=RUN_DEFAULTS["checkpoint_every_n_steps"],
            help="Write last.ckpt also within an epoch, after so many optimizer steps.",
        )
        for source, target in FROM_DATA:
            parser.link_arguments(
                "data",
                f"model.init_args.{target}",
                compute_fn=self._from_data(source, f"model.init_args.{target}"),
                apply_on="instantiate",
            )

    def _from_data(self, attribute: str, target: str) -> Callable[[Any], Any]:
        """What the data say about ``attribute``; what the user gave for ``target`` when they say nothing."""

        def known(data: Any) -> Any:
            given = self._get(self.config, target)
            found = getattr(data, attribute, None)
            if found is None:
                return given
            if attribute == "num_classes" and given is not None and given != found:
                raise UserError(
                    f"{target} is {given}, but the data have {found} classes; leave it out, it is taken from the data"
                )
            return found

        return known

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look whether the directory that was given takes this run; nothing is written yet."""
        try:
            self.config = parser.parse_args(self.arguments)
        except jsonargparse.ArgumentError as error:
            parser = self._subcommand_parsers.get(self.arguments[0], parser)
            raise UserError(one_sentence(error, parser)) from error
        self.subcommand = self.config.subcommand
        config = self.config[self.subcommand]
        keep_genotypes(config)
        given = config.dir
        if given is None and rank() > 0:
            given = os.environ.get(DIRECTORY_VARIABLE)
        if given is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("several processes were started from outside without --dir; give one, the same to all")
        self.directory = None if given is None else Path(given)
        if self.directory is not None:
            self._check_directory(self.directory, config)

    def _check_directory(self, directory: Path, config: jsonargparse.Namespace) -> None:
        saved = directory / "config.yaml"
        fresh = self.subcommand == "fit" and not saved.exists()
        if fresh and rank() == 0:  # to other ranks, what rank 0 has begun may look strange
            strange = {path.name for path in directory.glob("[!.]*")} - {"log.txt"}
            if strange:
                raise UserError(
                    f"{directory} is not a run directory and not empty (it holds {min(strange)}); give another --dir"
                )
        if rank() == 0:
            self.held.enter_context(lock(directory))
            remove_partial_files(directory)
        if fresh or self.subcommand != "fit":
            return
        if not self._goes_on():
            # nothing was trained yet: a corrected command may take the place of the first, but not of a search
            if {"space", "method"} & (yaml.safe_load(saved.read_text()) or {}).keys():
                raise UserError(f"{directory} is the directory of a search, not of a run; give another --dir")
            return
        before = yaml.safe_load(saved.read_text())
        keep_genotypes(config, before)
        if config.seed_everything is True:
            config.seed_everything = before["seed_everything"]
        # All ranks come to the same answer: rank 0 changes the summary before the config, and they are read the other
        # way round.
        grown = check_continuation(directory, before, yaml.safe_load(self.dump()))
        summary = read_json(directory / "summary.json")
        if summary and summary["status"] == "finished":
            self.finished_before = not grown
            if grown and rank() == 0:
                # Until it ends again the run is not finished; what it cost so far is kept.
                reason = "not finished: continued with larger limits"
                summarise(directory, "fit", "failed", reason=reason, forget="test_")

    def _goes_on(self) -> bool:
        return self.directory is not None and (self.directory / "checkpoints" / "last.ckpt").exists()

    def _settle(self) -> Path:
        """Make the directory if none was given, and write down there what the run is."""
        if self.directory is None:
            files = self._get(self.config, "config")
            self.directory = new_directory(Path(str(files[-1])).stem if files else str(self.subcommand))
            self.held.enter_context(lock(self.directory))
        if rank() == 0:
            os.environ[DIRECTORY_VARIABLE] = str(self.directory)
            self.held.callback(os.environ.pop, DIRECTORY_VARIABLE, None)
            self.log_to(self.directory / "log.txt")
            if self.subcommand == "fit":
                write_text(self.directory / "config.yaml", self.dump())
        return self.directory

    def _dump_config(self) -> None:
        super()._dump_config()
        # Lightning 2.6 puts what the data say into this dump, where a task without a network, or a network of which
        # nothing else was said, has no place for it ("Expected key … to be in data").
        place = self.config_dump.get("model")
        for name in ("init_args", "model", "init_args"):
            if isinstance(place, dict):
                place = place.setdefault(name, {})

    def dump(self) -> str:
        """The resolved configuration as YAML, without the directory: what a run is."""
        config = self.config[self.config.subcommand].clone()
        for key in NOT_KEPT:
            config.pop(key, None)
        return str(self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True))

    def instantiate_classes(self) -> None:
        """Build the parts; a value that one of them refuses is the user's mistake."""
        if self.finished_before:
            return
        # A checkpoint brings all weights: those that the training began with may be gone by now, as may its policy.
        trained = self.subcommand != "fit" or self._goes_on()
        try:
            with contextlib.ExitStack() as stack:
                if trained:
                    stack.enter_context(without_loading())
                if trained and self.directory is not None:
                    stack.enter_context(policy_kept_in(self.directory, goes_on=self.subcommand == "fit"))
                super().instantiate_classes()
            load_base = getattr(self.model, "load_base", None)
            if trained and load_base is not None:  # of a task whose checkpoints lack what it has frozen
                load_base(self.writer.base)
        except Exception as error:
            # jsonargparse reports whatever a constructor raises as a ValueError of many lines.
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from None  # `from error` would close a circle: the error was raised from it
            if isinstance(cause, ValueError | TypeError | ImportError | FileNotFoundError | MisconfigurationException):
                raise UserError(one_sentence(cause)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with what a run directory and the fast path need; what the user set stays."""
        config = self._get(self.config_init, "trainer")
        directory = self._settle()
        self.writer = RunWriter(
            directory,
            self._get(self.config, "monitor"),
            self._get(self.config, "mode"),
            self._get(self.config, "checkpoint_every_n_steps"),
        )
        searches = isinstance(getattr(self.model, "model", None), Supernet)
        writers = [GenotypeWriter(directory), self.writer] if searches else [self.writer]
        callbacks = [*_as_list(config["callbacks"]), *self.watching, *writers]
        if getattr(self.datamodule, "batch_size", None) == "auto":
            callbacks.append(BatchSizeProbe())
        if config["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
            if sys.stderr.isatty():
                callbacks.append(RichProgressBar())
        if config["precision"] is None:
            kwargs["precision"] = fast_precision(self.model, _device_of(config["accelerator"]))
        if self.subcommand == "predict":
            kwargs["devices"] = 1  # the rows of predictions.csv are in the order of the split
        return super().instantiate_trainer(
            default_root_dir=str(directory),
            enable_checkpointing=None,
            enable_model_summary=bool(config["enable_model_summary"]),
            plugins=[*_as_list(config["plugins"]), AtomicCheckpointIO()],
            callbacks=callbacks,
            **kwargs,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        assert self.directory is not None
        if self.finished_before:
            summary = read_json(self.directory / "summary.json")
            print(f"{self.directory} is finished: {_shown(summary['metrics'])}; larger limits would continue it")
            return
        self._check_data(self.directory)
        try:
            super()._run_subcommand(subcommand)
            self._part()
        except BaseException as error:
            self._note_failure(self.directory, error)
            raise

    def _check_data(self, directory: Path) -> None:
        """Refuse data that have changed since the run began: splits would be cut anew, and tests see trained images.

        Other data on purpose (``test --data.init_args.path``) are another configuration and are let through.
        """
        data: Any = self.datamodule
        if self.subcommand == "fit" and self._goes_on() and policy_changed(directory / "policy.json", data):
            raise UserError(
                f"train_policy is not the policy that {directory} was started with, which its policy.json holds; "
                "restore the former one, or start anew in another --dir"
            )
        known = (read_json(directory / "data.json") or {}).get("index")
        if known is None or not hasattr(data, "contents") or (self.subcommand == "fit" and not self._goes_on()):
            return
        saved, now = (yaml.safe_load(text)["data"] for text in ((directory / "config.yaml").read_text(), self.dump()))
        if saved == now and index_digest(data.contents.names, data.contents.labels.tolist()) != known:
            raise UserError(
                f"the data are not those that {directory} was started with: images were added, removed, renamed or "
                "labelled otherwise, which changes the splits; restore them, or start anew in another --dir"
            )

    def _part(self) -> None:
        """Let the processes of a run end together: one that ends earlier takes the others with it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.trainer.strategy.barrier()
            torch.distributed.destroy_process_group()

    def _note_failure(self, directory: Path, error: BaseException) -> None:
        if rank() != 0 or self.subcommand != "fit":
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if interrupted else one_sentence(error)
        with contextlib.suppress(OSError):  # the disk may be full, which is what is being reported
            if not interrupted and not isinstance(root_cause(error), UserError):
                log.debug("%s", traceback.format_exc())
            summarise(directory, "fit", "failed", seconds=self.seconds(), reason=reason)

    def seconds(self) -> float:
        """Wall time of this command so far."""
        return time.monotonic() - self.started

    def fit(self, **kwargs: Any) -> None:
        """Train from the start or from ``last.ckpt``, then open the test split once."""
        if rank() == 0:
            self._describe()
        last = self.writer.last_checkpoint
        kwargs["ckpt_path"] = str(last) if last.exists() else kwargs.get("ckpt_path")
        kwargs["weights_only"] = True
        if last.exists():
            log.info("going on from %s", last)
            # Of a trial that is continued by hand: the callback that reported it to its study is not there any more.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
            if self.trainer.max_steps != -1:
                log.warning("with max_steps Lightning may skip batches after a continued epoch; max_epochs is exact")
        try:
            self.trainer.fit(**kwargs)
        except (SIGTERMException, SystemExit) as error:  # Lightning ends the process itself on Ctrl-C
            raise KeyboardInterrupt from error
        except Exception:  # TrialPruned, which the rank with the trial raises
            if not self.pruned:
                raise
        if self.trainer.received_sigterm:
            raise KeyboardInterrupt
        best = self.writer.best or {}
        metrics = {name: value for name, value in best.items() if name.startswith(("train_", "val_"))}
        if best:
            metrics["best_epoch"] = best["epoch"]
        if self.pruned:
            self._finish(metrics, 0, status="pruned")
            return
        opened = 0
        if self._get(self.config, "test_after_fit") and self._has_test_data():
            metrics |= self._evaluate(self.trainer.test, verbose=False)
            opened = 1
        self._finish(metrics, opened)

    @property
    def pruned(self) -> bool:
        """Whether a search has stopped the run before its end."""
        trainer: Any = self.trainer
        return any(each.pruned for each in trainer.callbacks if isinstance(each, TrialPruning))

    def _has_test_data(self) -> bool:
        data: Any = self.datamodule if self.datamodule is not None else self.model
        return type(data).test_dataloader not in (LightningDataModule.test_dataloader, LightningModule.test_dataloader)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate the best checkpoint on the validation split."""
        self._finish(self._evaluate(self.trainer.validate, **kwargs), 0)

    def test(self, **kwargs: Any) -> None:
        """Evaluate the best checkpoint on the test split."""
        self._finish(self._evaluate(self.trainer.test, **kwargs), 1)

    def predict(self, **kwargs: Any) -> None:
        """Write ``predictions.csv``: row, label, predicted class and probability of each class."""
        self._forget_averaging()
        kwargs |= {"ckpt_path": self._checkpoint(kwargs), "weights_only": True, "return_predictions": True}
        batches = self.trainer.predict(**kwargs)
        assert batches is not None
        probabilities = torch.cat([batch for batch in batches if isinstance(batch, torch.Tensor)])
        data: Any = self.datamodule
        write_text(self.writer.directory / "predictions.csv", _predictions_table(data, probabilities))
        log.info("%d predictions in %s", len(probabilities), self.writer.directory / "predictions.csv")
        on_test = getattr(data, "predict_split", "test") == "test"
        self._finish({}, int(on_test), {"predictions": "predictions.csv"})

    def _evaluate(self, evaluate: Callable[..., Any], **kwargs: Any) -> dict[str, float]:
        self._forget_averaging()
        kwargs |= {"model": self.model, "ckpt_path": self._checkpoint(kwargs), "weights_only": True}
        if self.datamodule is not None:
            kwargs["datamodule"] = self.datamodule
        return {name: value for metrics in evaluate(**kwargs) for name, value in metrics.items()}

    def _forget_averaging(self) -> None:
        """Let a checkpoint's averaged weights be used: the callback that made them would load the others instead."""
        trainer: Any = self.trainer
        trainer.callbacks[:] = [each for each in trainer.callbacks if not isinstance(each, WeightAveraging)]
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")

    def _checkpoint(self, kwargs: dict[str, Any]) -> str:
        path = Path(kwargs.get("ckpt_path") or self.writer.best_checkpoint)
        if not path.exists():
            raise UserError(f"{path} does not exist: no epoch of this run was finished; give the fit command again")
        return str(path)

    def _finish(
        self,
        metrics: dict[str, float],
        opened: int,
        artefacts: dict[str, str] | None = None,
        status: Status = "finished",
    ) -> None:
        if rank() != 0:
            return
        directory = self.writer.directory
        names = ["*.png", "predictions_*.safetensors", "data.json", "policy.json", "metrics.csv"]
        names += ["adapter", "adapter_statistics.json", "architecture.json", "genotype.json"]
        left = {path.stem: path.name for name in names for path in sorted(directory.glob(name))}
        if self.writer.best_checkpoint.exists():
            left["best_checkpoint"] = str(self.writer.best_checkpoint.relative_to(directory))
        summarise(
            directory,
            str(self.subcommand),
            status,
            metrics=metrics,
            seconds=self.seconds(),
            opened=opened,
            artefacts=left | (artefacts or {}),
        )
        if metrics:
            log.info("%s: %s", directory, _shown(metrics))

    def _network(self) -> dict[str, Any]:
        """Name and cost of the network, also told to the user."""
        network = getattr(self.model, "model", self.model)
        base = network.get_base_model() if hasattr(network, "get_base_model") else network  # without peft's wrapper
        size = parameter_count(network)
        if base is not network:  # adapters and the originals of what they replace are no parts of it
            from lightning_automl.adapters import adapter_parameters

            size = adapter_parameters(network)["base"]
        cost: dict[str, Any] = {"class": type(base).__name__, "parameters": size}
        told = f"{cost['class']}: {cost['parameters']:,} parameters"
        trained = parameter_count(network, trainable_only=True)
        if base is not network or trained < size:
            cost |= {"trained_parameters": trained, "trained_share": trained / size}
            told += f", of which {trained:,} are trained ({cost['trained_share']:.2%})"
        data: Any = self.datamodule
        if network is not self.model and hasattr(data, "channels") and hasattr(data, "image_size"):
            cost["flops"] = flop_count(network, (data.channels, *data.image_size))
            told += f", {cost['flops'] / 1e6:,.1f} million floating-point operations an image"
        log.info("%s; precision %s", told, self.trainer.precision)
        return cost

    def _describe(self) -> None:
        """Write ``environment.json``; a continued run adds to it when it goes on with other versions or hardware."""
        path = self.writer.directory / "environment.json"
        now = {
            **environment(self._get(self.config, "seed_everything")),
            "precision": str(self.trainer.precision),
            "network": self._network(),
        }
        before = read_json(path)
        if before is not None:
            changed = [key for key in ("versions", "hardware", "precision", "commit") if before.get(key) != now[key]]
            if changed:
                log.warning(
                    "continued with other %s: the result may differ from an uninterrupted run", ", ".join(changed)
                )
            now = {**before, "continued": [*before.get("continued", []), now]}
        write_json(path, now)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _device_of(accelerator: Any) -> str:
    if accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "mps"
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return "mps"
    return "cpu"


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith("test_")] or [n for n in metrics if n.startswith("val_")]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)


def _predictions_table(data: Any, probabilities: torch.Tensor) -> str:
    classes = getattr(data, "class_names", None) or [str(index) for index in range(probabilities.shape[1])]
    rows = data.split_rows[data.predict_split] if hasattr(data, "split_rows") else None
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "label", "predicted", *(f"probability_{name}" for name in classes)])
    for index, row in enumerate(probabilities.tolist()):
        image, label = str(index), ""
        if rows is not None:
            image, label = data.contents.names[rows[index]], classes[data.contents.labels[rows[index]]]
        writer.writerow([image, label, classes[max(range(len(row)), key=row.__getitem__)], *(f"{p:.6g}" for p in row)])
    return text.getvalue()


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status: 0 done, 1 the run failed, 2 a mistake in what was given."""
    keep_freed_memory()
    adapt_jsonargparse()
    see_working_directory()
    # Lightning's advertisements and hints about its own services are not messages of the run.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        AutoMLCLI(with_saved_config(arguments))
    except BaseException as error:
        status, sentence = ending(error, rank())
        if rank() == 0:
            print(sentence, file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends all processes when one has ended: let rank 0 speak
        return status
    return 0
