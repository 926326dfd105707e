"""Train a network on labelled images."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_automl.augment import normalize
from lightning_automl.metrics import StageOutputs, classification_metrics
from lightning_automl.rundir import UserError

Batch = tuple[Tensor, Tensor]


class ClassificationTask(LightningModule):
    """Train a network on labelled images.

    The metrics of every stage are called ``{train,val,test}_{loss,accuracy,balanced_accuracy,auroc,f1,
    calibration_error}`` and are those of all images of the split, on any number of ranks.

    Mean and standard deviation of the images are buffers: filled from the train split when a run starts, unless the
    network has an attribute ``normalization`` (mean, standard deviation) of its own, or a checkpoint brings them. An
    exported model hence contains them.

    Args:
        model: Maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``; one logit will do
            for two classes with ``BinaryCrossEntropy``.
        num_classes: Number of labels.
        optimizer: Called with the parameters, or with parameter groups, to train. Fused optimizers never wait for the
            device; AdamW that is not reads a number of it for every parameter and step.
        scheduler: Called with the optimizer; ``total_steps`` is filled in when it takes such an argument and has none,
            and it then steps after every batch (``OneCycleLR``, ``WarmupCosineLR``), else after every epoch.
        loss: Maps logits and labels ``(batch,)`` int64, or soft labels ``(batch, num_classes)``, to a scalar;
            cross-entropy by default. One with a method ``probabilities(logits)`` is asked for probabilities, else it is
            softmax.
        class_weights: ``balanced`` for N / (classes * count of the class) of the train split, or one number a class;
            given to the loss as its ``weight``. Validation and test losses are weighted likewise.
        mix: Maps a batch of images and labels to mixed images and soft labels in training, as torchvision's ``MixUp``
            and ``CutMix`` do; their ``num_classes`` may be left out.
        decay_norms_and_biases: False to exempt parameters of one dimension or less (norms, biases, scales) from weight
            decay.
        channels_last: Keep images and convolution weights in the channels-last layout, which is about twice as fast on
            CPUs and on GPUs with tensor cores; the values are the same.
        compile: Compile the network with ``torch.compile``.
        auxiliary_weight: Weight, 0 or more, of the losses of further logits that the network gives in training, as a
            :class:`~lightning_automl.models.GenotypeNetwork` with an auxiliary head does.

    Example:
        >>> task = ClassificationTask(TunableCNN(num_classes=10, in_channels=1, image_size=8), num_classes=10)
        >>> Trainer(max_epochs=5).fit(task, DigitsDataModule())  # doctest: +SKIP
    """

    #: Stages that keep metrics of their own.
    stages: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        # Any, since jsonargparse takes a function only if its annotations agree with those that stand here
        loss: nn.Module | Callable[[Tensor, Tensor], Any] | None = None,
        class_weights: Literal["balanced"] | list[float] | None = None,
        mix: nn.Module | Callable[[Tensor, Tensor], Any] | None = None,
        decay_norms_and_biases: bool = True,
        channels_last: bool = True,
        compile: bool = False,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if auxiliary_weight < 0:
            raise UserError(f"auxiliary_weight is {auxiliary_weight}; it must be 0 or more")
        self.save_hyperparameters(ignore=["model", "optimizer", "scheduler", "loss", "mix", "arch_optimizer", "cost"])
        self.num_classes = num_classes
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.class_weights = class_weights
        self.mix = mix
        if mix is not None and getattr(mix, "num_classes", 0) is None:
            setattr(mix, "num_classes", num_classes)  # noqa: B010  # a function has no such attribute
        self.decay_norms_and_biases = decay_norms_and_biases
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_network = compile
        self.auxiliary_weight = auxiliary_weight
        self.register_buffer("mean", torch.zeros(1, 1, 1))
        self.register_buffer("std", torch.ones(1, 1, 1))
        #: Counts ``(true, predicted)`` of the newest epoch of each stage.
        self.confusion: dict[str, Tensor] = {}
        #: Probabilities ``(images, num_classes)`` and labels of the newest epoch of each stage but training.
        self.predictions: dict[str, Batch] = {}
        for stage in self.stages:
            setattr(self, f"{stage}_outputs", StageOutputs())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the network and its state (weight averaging does); what builds optimizers is shared.

        LightningCLI's callables hold the whole command line with its open files, which cannot be copied. A callback
        that copies in its own ``setup`` comes before ours, so that what the data say is taken over here already.
        """
        if self._trainer is not None:
            self._take_over_from_data()
        memo |= {id(part): part for part in (self.optimizer, self.scheduler)}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = deepcopy(self.__getstate__(), memo)
        return copied

    def setup(self, stage: str) -> None:
        """Take normalisation and class weights from network or train split; lay out and compile the network."""
        self._take_over_from_data()
        self.model.to(memory_format=self.memory_format)
        if self.compile_network:
            self.model.compile()

    def _take_over_from_data(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        mean, std = getattr(self.model, "normalization", None) or (
            getattr(data, "mean", None),
            getattr(data, "std", None),
        )
        if mean is not None and std is not None:
            self.mean = torch.as_tensor(mean, dtype=torch.float32).to(self.mean.device).view(-1, 1, 1)
            self.std = torch.as_tensor(std, dtype=torch.float32).to(self.std.device).view(-1, 1, 1)
        if self.class_weights is not None:
            self._set_class_weights(getattr(data, "class_counts", None))

    def _set_class_weights(self, counts: Tensor | None) -> None:
        if not hasattr(self.loss, "weight"):
            raise UserError(
                f"class_weights is given, but the loss {type(self.loss).__name__} has no 'weight'; "
                "use CrossEntropyLoss, FocalLoss or BinaryCrossEntropy, or leave class_weights out"
            )
        if self.class_weights != "balanced":
            weights = torch.tensor(self.class_weights)
            if len(weights) != self.num_classes:
                raise UserError(
                    f"class_weights has {len(weights)} numbers for {self.num_classes} classes; give one a class"
                )
        elif counts is None:
            raise UserError("class_weights 'balanced' needs a data module with 'class_counts'; give one number a class")
        else:
            weights = counts.sum() / (len(counts) * counts.float())
        self.loss.weight = weights.float().to(self.mean.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep those hyper-parameters that can be read back without pickle; of a subclass they may be anything."""
        kept = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name in [name for name, value in kept.items() if not _is_plain(value)]:
            del kept[name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give buffers whose size depends on the data the checkpoint's size, and refuse one of another network."""
        state = checkpoint["state_dict"]
        for name in ("mean", "std"):
            if name in state:
                setattr(self, name, torch.zeros_like(state[name], device=self.mean.device))
        if "loss.weight" in state and isinstance(self.loss, nn.Module) and self.loss.weight is None:
            self.loss.weight = torch.zeros_like(state["loss.weight"], device=self.mean.device)
        if self.strict_loading:
            check_same_network(self.state_dict(), state)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)``, float in [0, 1] or uint8, to logits."""
        logits: Tensor = self.model(self.normalized(images))
        return logits

    def normalized(self, images: Tensor) -> Tensor:
        """What the network gets for images that are float in [0, 1] or uint8."""
        if not images.is_floating_point():
            images = images / 255
        return normalize(images, self.mean, self.std).contiguous(memory_format=self.memory_format)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Map logits to probabilities ``(batch, num_classes)``, as the loss understands them."""
        own = getattr(self.loss, "probabilities", None)
        scores: Tensor = logits.softmax(1) if own is None else own(logits)
        return scores

    def step(self, batch: Batch, stage: str) -> Tensor:
        """Return the loss of a batch and keep its logits for the metrics of the stage.

        A network may give several logits as a tuple in training: the losses of those after the first are added with
        ``auxiliary_weight``. The metrics, with them ``train_loss``, are of the first alone, as they are in validation.
        """
        images, labels = batch
        targets = labels
        if stage == "train" and self.mix is not None:
            images, targets = self.mix(images, labels)
            labels = targets.argmax(1)
        output = self(images)
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss: Tensor = self.loss(_full(logits), targets)
        self.outputs(stage).update(logits, labels, loss)
        for others in auxiliary:
            loss = loss + self.auxiliary_weight * self.loss(_full(others), targets)
        return loss

    def outputs(self, stage: str) -> StageOutputs:
        """What the current epoch of a stage has given so far."""
        outputs: StageOutputs = getattr(self, f"{stage}_outputs")
        return outputs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the training loss."""
        return self.step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep a validation batch's logits."""
        self.step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep a test batch's logits."""
        self.step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return probabilities ``(batch, num_classes)``."""
        return self.probabilities(self(batch[0]).float())

    def on_train_epoch_end(self) -> None:
        """Log the training metrics of the epoch."""
        self.log_stage("train")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log_stage("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log_stage("test")

    def log_stage(self, stage: str) -> None:
        """Compute, log and forget the outputs of a stage's epoch."""
        outputs = self.outputs(stage)
        if not outputs.update_called:
            # Fewer images than ranks, or a resumed run at the end of an epoch: this rank still has to join the others.
            nothing = torch.zeros(0, self.num_classes, device=self.device)
            outputs.update(nothing, nothing[:, 0].long(), nothing.sum())
        logits, labels, loss = outputs.compute()
        outputs.reset()
        if len(labels) == 0:
            return
        scores = self.probabilities(logits)
        # The mean of batches would be wrong with class weights; in training the network changed between them.
        metrics: dict[str, Tensor] = {"loss": loss if stage == "train" else self.loss(logits, labels)}
        metrics |= classification_metrics(scores, labels)
        self.confusion[stage] = multiclass_confusion_matrix(scores, labels, self.num_classes, validate_args=False)
        if stage != "train":
            self.predictions[stage] = scores, labels
        if metrics["auroc"].isnan():  # undefined: a single class was seen
            del metrics["auroc"]
        # The values are equal on all ranks; sync_dist only keeps Lightning from asking for it.
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule that knows the length of the run when it wants to."""
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        arguments = {}
        if _wants_total_steps(self.scheduler):
            arguments["total_steps"] = self.total_steps()
        try:
            scheduler = self.scheduler(optimizer, **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"the scheduler refused its arguments: {error}") from error
        entry: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if arguments else "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            entry["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": entry}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer of :meth:`parameter_groups`."""
        try:
            optimizer: torch.optim.Optimizer = self.optimizer(self.parameter_groups())
        except (TypeError, ValueError) as error:
            raise UserError(f"the optimizer refused its arguments: {error}") from error
        return optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters to train, those without weight decay in a group of their own if so asked."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.decay_norms_and_biases:
            return [{"params": parameters}]
        return [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]

    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the scheduler needs to know the length of the run; set trainer.max_epochs or max_steps")
        return int(steps)


def _full(logits: Tensor) -> Tensor:
    """Logits in float32 where they are in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _wants_total_steps(scheduler: Callable[..., Any]) -> bool:
    # LightningCLI makes functools.partial(instantiate, ..., class, **init_args); in Python it is a class or a partial.
    arguments: dict[str, Any] = {}
    target = scheduler
    if isinstance(scheduler, partial):
        arguments = scheduler.keywords
        target = next((value for value in reversed(scheduler.args) if isinstance(value, type)), scheduler.func)
    parameter = signature(target).parameters.get("total_steps")
    return parameter is not None and arguments.get("total_steps") is None


def check_same_network(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raise a UserError when a checkpoint's tensors have other names or shapes than the network's."""
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape)
    if missing or unknown or reshaped:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
            if names
        ]
        raise UserError(
            f"the checkpoint is of another network: tensors {'; '.join(parts)}; "
            "give the config that it was trained with"
        )
