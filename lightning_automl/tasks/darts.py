"""Search an architecture by gradient descent on its parameters beside the weights."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_automl.metrics import StageOutputs
from lightning_automl.models.architecture_cost import ArchitectureCost
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.relaxations import Relaxation
from lightning_automl.models.supernet import Supernet
from lightning_automl.rundir import UserError
from lightning_automl.tasks.bilevel import (
    begin_momentum,
    buffers_of_first_rank,
    filled,
    mean_over_ranks,
    shares,
    unrolled_gradient,
    untouched_buffers,
    virtual_step,
    world_size,
)
from lightning_automl.tasks.classification import Batch, ClassificationTask

#: Steps after which a device that works on its own is asked whether its numbers are finite.
_PATIENCE = 50
_SECOND_STREAM = (
    "set the data module's arch_fraction (0.5 in the paper), or let its train loader yield {'train': batch, 'arch': "
    "batch}"
)


class DartsTask(ClassificationTask):
    """Search an architecture: a step on its parameters, alphas, and a step on the weights, in turns.

    Liu, Simonyan and Yang, *DARTS: Differentiable Architecture Search*, ICLR 2019, https://arxiv.org/abs/1806.09055
    (algorithm 1). Each training batch is ``{"train": batch, "arch": batch}``, of two halves of the train split that
    share no image (``arch_fraction`` of the data module). First the alphas follow the gradient of the loss of
    ``arch``, then the weights that of ``train``. ``arch_accuracy`` and so on are those of the former stream; with
    ``unrolled`` at the weights one step ahead.

    The gradients are averaged over ranks, each by one exchange, so that several processes search what one would with
    the joint batch, and every epoch it is checked that all have the same genotype. Lightning's ``global_step`` counts
    the steps on the weights. What is random in the relaxation is a function of (seed, step), the same on all ranks.

    A search that goes on with larger ``max_epochs`` follows the relaxation's schedule (temperature, auxiliary skip) of
    the longer search from then on, while a schedule of the learning rate stays where it has ended: with a rate of 0
    there, only the alphas move. Search anew for so many epochs if that is not wanted.

    A subclass with another rule overrides :meth:`hypergradient` (what alphas follow), :meth:`architecture_loss` (what
    they are to make small) or :meth:`streams` (of which batches).

    Args:
        model: The supernet.
        num_classes: Number of labels.
        optimizer: Of the weights.
        arch_optimizer: Of the alphas; Adam with a rate of 3e-4, betas of 0.5 and 0.999 and weight decay 1e-3, as in the
            paper, when left out.
        unrolled: Let the alphas follow the loss after one more step on the weights (second order, section 2.3; about
            three times as slow) instead of the loss at the weights as they are. Needs SGD for the weights.
        gradient_clip: Largest norm of the gradient of all weights together; alphas are not clipped.
        warmup_epochs: Epochs in which the alphas stay as they are.
        accumulate: Do a step on alphas and one on weights after so many batches only, as if they were one batch; they
            are kept until then.
        cost: Penalty on the expected cost, and limit of the cost of the genotype.
        kwargs: Further arguments of :class:`ClassificationTask`. The scheduler is that of the weights.

    Raises:
        UserError: If an argument is out of range, or does not fit to another.

    Example:
        >>> task = DartsTask(DartsSpace(num_classes=10, in_channels=1, image_size=8), num_classes=10)  # doctest: +SKIP
        >>> Trainer(max_epochs=5).fit(task, DigitsDataModule(arch_fraction=0.5))  # doctest: +SKIP
    """

    stages: ClassVar[tuple[str, ...]] = ("arch", "train", "val", "test")
    model: Supernet

    def __init__(
        self,
        model: Supernet,
        num_classes: int,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(
            parameters, lr=0.025, momentum=0.9, weight_decay=3e-4
        ),
        # None, since jsonargparse takes no default with a tuple into a run's config
        arch_optimizer: OptimizerCallable | None = None,
        unrolled: bool = False,
        gradient_clip: float | None = 5.0,
        warmup_epochs: int = 0,
        accumulate: int = 1,
        cost: ArchitectureCost | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, num_classes, optimizer, **kwargs)
        if not isinstance(model, Supernet):
            raise UserError(
                f"model is a {type(model).__name__}, in which there is nothing to search; give a Supernet, such as "
                "DartsSpace or NasBench201Space, or train it with ClassificationTask"
            )
        if gradient_clip is not None and not gradient_clip > 0:
            raise UserError(f"gradient_clip is {gradient_clip}; it is a norm above 0, or null")
        if warmup_epochs < 0:
            raise UserError(f"warmup_epochs is {warmup_epochs}; it is a number of epochs, 0 or more")
        if accumulate < 1:
            raise UserError(f"accumulate is {accumulate}; it is a number of batches, 1 or more")
        self.automatic_optimization = False
        self.arch_optimizer = arch_optimizer or partial(
            torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3
        )
        self.unrolled = unrolled
        self.gradient_clip = gradient_clip
        self.warmup_epochs = warmup_epochs
        self.accumulate = accumulate
        self.cost = cost
        #: Epoch whose genotype is the result, and why, when a search was stopped before its end.
        self.chosen: tuple[int, str] | None = None
        #: The newest batch that the alphas were given.
        self.newest_arch_batch: Batch | None = None
        self._waiting: list[tuple[Batch, Batch]] = []  # for a step on several batches
        self._heard = True  # whether losses are those of the metrics
        self._questions: list[tuple[str, int, Tensor]] = []  # what was not finite, at which step, if it was

    def genotype(self) -> Genotype:
        """The architecture as it is now, within the limit of ``cost`` if there is one."""
        if self.cost is not None and getattr(self.cost, "limit", None) is not None:
            limited: Genotype = self.cost.within_limit(self.model)
            return limited
        return self.model.genotype()

    def stop_search(self, reason: str, epoch: int | None = None) -> None:
        """End the run after this epoch; to be called on all ranks.

        Args:
            reason: A sentence.
            epoch: Whose genotype is the result; this one by default.
        """
        self.chosen = (self.current_epoch if epoch is None else epoch, reason)
        self.trainer.should_stop = True

    def architecture_gradient(self, batch: Batch) -> list[Tensor]:
        """Gradient of the architecture's loss of a batch with respect to the alphas, at the weights as they are.

        Averaged over ranks and without autocast; metrics and buffers of the network are left alone. Called again
        before the next step, it gets the same noise.
        """
        alphas = self.model.alphas()
        with untouched_buffers(self.model):
            return filled(self._gradient([batch], "arch", alphas, exact=True), alphas)

    # The rule -------------------------------------------------------------------------------------------------------

    def streams(self, batch: Any) -> tuple[Batch, Batch]:
        """Take what the weights and what the alphas learn from out of what the data module gives."""
        if not isinstance(batch, Mapping) or not {"train", "arch"} <= batch.keys():
            raise UserError(f"the data give no second stream of batches, for the alphas of a search; {_SECOND_STREAM}")
        return batch["train"], batch["arch"]

    def architecture_loss(self, batch: Batch) -> Tensor:
        """What the alphas are to make small: the loss, and what ``cost`` and the network's relaxation add to it."""
        loss = self.step(batch, "arch")
        if self.cost is not None:
            loss = loss + self.cost.penalty(self.model)
        own: Any = getattr(self.model, "penalty", None)
        penalty = None if own is None else own()
        return loss if penalty is None else loss + penalty

    def weight_loss(self, batch: Batch) -> Tensor:
        """What the weights are to make small."""
        return self.step(batch, "train")

    def hypergradient(self, train: list[Batch], arch: list[Batch]) -> Sequence[Tensor | None]:
        """What the alphas follow, averaged over ranks; the weights have to be left as they were.

        Args:
            train: Batches that the weights learn from in this step; several only with ``accumulate``.
            arch: Batches of the other stream.
        """
        alphas: list[Tensor] = list(self.model.alphas())
        if not self.unrolled:
            return self._gradient(arch, "arch", alphas, heard=True)
        optimizer = self.trainer.optimizers[0]
        return unrolled_gradient(
            alphas,
            _parameters(optimizer),
            virtual_step(optimizer),
            partial(self._gradient, train, "train"),
            partial(self._gradient, arch, "arch", heard=True),
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # optimisation is manual
        """Do a step on the alphas and then one on the weights, or wait for more batches to do so."""
        train, arch = self.streams(batch)
        self.newest_arch_batch = arch
        self._waiting.append((train, arch))
        last = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        if (batch_idx + 1) % self.accumulate and not last:
            return
        trains, archs = (list(batches) for batches in zip(*self._waiting, strict=True))
        self._waiting = []
        if self.current_epoch >= self.warmup_epochs:
            self.architecture_step(trains, archs)
        self.weight_step(trains)
        self._step_schedules(last)

    def architecture_step(self, train: list[Batch], arch: list[Batch]) -> None:
        """Do a step on the alphas; weights and buffers stay as they are, bit for bit."""
        alphas, optimizer = self.model.alphas(), self.trainer.optimizers[1]
        with untouched_buffers(self.model):
            self._give(alphas, filled(self.hypergradient(train, arch), alphas))
        # not by LightningOptimizer.step, which would count it as a step of the run
        self.trainer.strategy.optimizer_step(optimizer, do_nothing_closure)
        optimizer.zero_grad()
        finite = torch.stack([alpha.detach().isfinite().all() for alpha in alphas]).all()
        self._ask("alphas are not finite", finite)

    def weight_step(self, train: list[Batch]) -> None:
        """Do a step on the weights; the alphas stay as they are."""
        optimizer: Any = self.optimizers()[0]  # type: ignore[index]  # there are two
        weights = _parameters(optimizer)
        self._give(weights, self._gradient(train, "train", weights, heard=True))
        optimizer.step()
        optimizer.zero_grad()  # the largest need of memory is in the next step on the alphas

    # Gradients ------------------------------------------------------------------------------------------------------

    def _gradient(
        self,
        batches: Sequence[Batch],
        stage: Literal["arch", "train"],
        parameters: Sequence[Tensor],
        *,
        exact: bool = False,
        heard: bool = False,
    ) -> list[Tensor | None]:
        """Gradient of the loss of all images of the batches of all ranks.

        ``torch.autograd.grad`` computes what is asked for and no more, and knows nothing of the hooks by which
        DistributedDataParallel would average: those want every parameter in each backward pass.
        """
        loss_of = self.architecture_loss if stage == "arch" else self.weight_loss
        parts = shares([len(labels) for _, labels in batches], self.device)
        total: list[Tensor | None] = [None] * len(parameters)
        value = torch.zeros((), device=self.device)
        for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            self._draw(stage, number, exact)
            with torch.enable_grad(), self._hearing(heard):
                with self._precision(exact):
                    loss = loss_of(batch)
                value = value + loss.detach() * part
                loss = loss if isinstance(part, float) and part == 1 else loss * part
                if not exact:
                    loss = self.trainer.precision_plugin.pre_backward(loss, self)  # scaled for fp16
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [_sum(*pair) for pair in zip(total, found, strict=True)]
        scale = None if exact else self._scale()
        if scale is not None:
            total = [None if gradient is None else gradient / scale for gradient in total]
        if world_size() > 1:  # all ranks exchange as much, whatever a pass has used
            *averaged, value = mean_over_ranks([*filled(total, parameters), value])
            total = [None if own is None else mean for own, mean in zip(total, averaged, strict=True)]
        if heard and (scale is None or not (self.unrolled and stage == "arch")):
            # one step ahead on gradients that have overflowed, the loss is not finite either; the scaler sees to that
            self._ask(f"{stage}_loss is not finite", value.isfinite())
        return total

    def _give(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Put gradients where an optimizer looks for them, scaled as Lightning expects it."""
        scale = self._scale()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if scale is None or gradient is None else gradient * scale
        self.trainer.precision_plugin.post_backward(torch.zeros(()), self)  # callbacks look at gradients

    def _scale(self) -> Tensor | None:
        """By what losses are multiplied so that gradients in fp16 do not vanish."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def _precision(self, exact: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, enabled=False) if exact else nullcontext()

    @contextmanager
    def _hearing(self, heard: bool) -> Iterator[None]:
        before, self._heard = self._heard, heard
        try:
            yield
        finally:
            self._heard = before

    def outputs(self, stage: str) -> StageOutputs:
        """What the current epoch of a stage has given so far; of passes that only serve a difference, nothing."""
        return super().outputs(stage) if self._heard else StageOutputs()

    def _draw(self, stage: str, number: int, exact: bool) -> None:
        """Make what is random in a pass a function of the step and of which batch it has.

        The relaxation's noise is the same on all ranks and for all batches of a step; that of the network itself
        (dropout, mixing of images) only has to be the same for the gradients that are compared.
        """
        seed = (int(os.environ.get("PL_GLOBAL_SEED", 0)) * 1_000_003 + self.global_step) * 2 + (stage == "train")
        relaxation = getattr(self.model, "relaxation", None)
        if relaxation is not None:
            relaxation.draw(seed % 2**63)
        if self.unrolled or exact:
            torch.manual_seed((seed * 1_000_003 + number * 65_537 + self.global_rank) % 2**63)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient of the weights."""
        if self.gradient_clip is None or optimizer is not self.trainer.optimizers[0]:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it itself, but later
        torch.nn.utils.clip_grad_norm_(_parameters(optimizer), self.gradient_clip)

    # Health ---------------------------------------------------------------------------------------------------------

    def _ask(self, what: str, finite: Tensor) -> None:
        """Take note of a finding on the device; it is looked at now and then, so that the device need not wait."""
        self._questions.append((what, self.global_step, finite.detach()))
        if not _waits(self.device) or len(self._questions) >= _PATIENCE:
            self._look()

    def _look(self) -> None:
        questions, self._questions = self._questions, []
        if not questions:
            return
        for (what, step, _), finite in zip(
            questions, torch.stack([each[2] for each in questions]).tolist(), strict=True
        ):
            if not finite:
                raise RuntimeError(
                    f"{what} at step {step}; lower the learning rate of weights or alphas, or look for unusual images"
                )

    def _check_agreement(self) -> None:
        if world_size() == 1:
            return
        digest = blake2b(self.genotype().digest().encode(), digest_size=7).digest()
        number = torch.tensor(int.from_bytes(digest, "big"), device=self.device)
        found: Any = self.all_gather(number)
        if len(set(found.tolist())) > 1:
            raise RuntimeError(
                f"after epoch {self.current_epoch} the processes have {len(set(found.tolist()))} different genotypes; "
                "what changes alphas has to do the same on all of them"
            )

    # The run --------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Refuse what does not fit to a search; Lightning calls this before it looks for itself."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._check_trainer()
        return super().configure_callbacks()

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer.gradient_clip_val:
            raise UserError(
                "trainer.gradient_clip_val is given, which would clip alphas too; leave it out and set the task's "
                "gradient_clip"
            )
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches is given, which would mix steps on alphas and on weights; leave it "
                "out and set the task's accumulate"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"a search does not run with {type(trainer.strategy).__name__}, which cuts the network into parts; "
                "use trainer.strategy ddp"
            )
        if str(trainer.precision) in ("16-true", "bf16-true", "transformer-engine-float16", "transformer-engine"):
            raise UserError(
                f"trainer.precision is {trainer.precision}, in which steps of alphas are too small to count; use "
                "bf16-mixed or 32-true"
            )

    def setup(self, stage: str) -> None:
        """Prepare the network, and forget the end of a former training."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self.chosen = None
        if stage == "fit" and getattr(data, "arch_fraction", 0) is None:
            raise UserError(f"the data give no second stream of batches, for the alphas of a search; {_SECOND_STREAM}")
        # Lightning 2.6 advises to keep weights from before the step, which nobody could continue from
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
        super().setup(stage)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the network and its state; what builds optimizers is shared."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._find_costs()  # by a callback in its setup: what it saves has to have them
        memo[id(self.arch_optimizer)] = self.arch_optimizer
        return super().__deepcopy__(memo)

    def _find_costs(self) -> None:
        if self.cost is None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "image_size"):
            raise UserError("cost needs a data module with 'channels' and 'image_size'; leave cost out")
        height, width = data.image_size
        self.cost.prepare(self.model, (data.channels, height, width), self.trainer.strategy.root_device)
        self.cost.to(self.device)

    def on_fit_start(self) -> None:
        """Find out costs, if no checkpoint has brought them, and do not go on with a search that was stopped."""
        super().on_fit_start()
        self._find_costs()
        self._waiting = []
        if self.chosen is not None:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """Set schedules of the relaxation; within an epoch that goes on the hook for its start is not called."""
        every = self.trainer.val_check_batch
        if self.accumulate > 1 and every not in (None, self.trainer.num_training_batches) and every % self.accumulate:
            raise UserError(
                f"trainer.val_check_interval amounts to {every} batches, but a step takes {self.accumulate} "
                "(accumulate); choose a multiple"
            )
        super().on_train_start()
        self._set_schedule(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Set schedules of the relaxation."""
        super().on_train_epoch_start()
        self._waiting = []
        self._set_schedule(self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        """Validate with the running statistics that are in checkpoints; without DDP's hooks ranks have their own."""
        super().on_validation_epoch_start()
        buffers_of_first_rank(self.model)

    def _set_schedule(self, epoch: int, epochs: int | None = None) -> None:
        relaxation = getattr(self.model, "relaxation", None)
        if relaxation is None:
            return
        epochs = self._epochs() if epochs is None else epochs
        if epochs is not None:
            relaxation.at(epoch, epochs)
        elif getattr(type(relaxation), "at", None) is not Relaxation.at:
            raise UserError("the relaxation follows the length of the search; set trainer.max_epochs or max_steps")

    def _epochs(self) -> int | None:
        """Length of the run, if it has one."""
        trainer = self.trainer
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            return trainer.max_epochs
        if trainer.max_steps > 0:
            return math.ceil(trainer.max_steps / math.ceil(trainer.num_training_batches / self.accumulate))
        return None

    def on_train_epoch_end(self) -> None:
        """Log the metrics of both streams, and look whether all ranks have the same genotype.

        Raises:
            RuntimeError: If not, or if a loss or an alpha was not finite.
        """
        self._look()
        super().on_train_epoch_end()
        self.log_stage("arch")
        self._check_agreement()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how far the relaxation's schedules are, and whether the search was stopped; refuse broken numbers."""
        self._look()
        super().on_save_checkpoint(checkpoint)
        checkpoint["search"] = {"chosen": self.chosen, "epochs": self._epochs()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up whether the search was stopped, the costs, and the schedules of the relaxation."""
        if self.cost is not None:
            self.cost.load_costs(checkpoint["state_dict"], "cost.")
        super().on_load_checkpoint(checkpoint)
        if self.cost is not None and self.cost.known:
            self.cost.prepare(self.model, self.cost.known)
        search = checkpoint.get("search")
        if search is not None:
            self.chosen = None if search["chosen"] is None else tuple(search["chosen"])
            if search["epochs"] is not None:
                self._set_schedule(int(checkpoint["epoch"]), search["epochs"])

    # Optimizers -----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the weights with its schedule, and that of the alphas."""
        built = super().configure_optimizers()
        entry = built if isinstance(built, dict) else {"optimizer": built}
        if isinstance(entry.get("lr_scheduler", {}).get("scheduler"), ReduceLROnPlateau):
            raise UserError(
                "ReduceLROnPlateau waits for a metric, while the weights of a search follow a schedule of known "
                "length; use CosineAnnealingLR or WarmupCosineLR"
            )
        if self.unrolled:
            virtual_step(entry["optimizer"])  # does it fit?
        begin_momentum(entry["optimizer"])
        try:
            alphas = self.arch_optimizer(self.model.alphas())
        except (TypeError, ValueError) as error:
            raise UserError(f"arch_optimizer refused its arguments: {error}") from error
        return [entry, {"optimizer": alphas}]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weights to train, as the supernet names them, and what a loss may have of its own."""
        own = {id(parameter) for parameter in self.model.parameters()}
        weights = {id(parameter) for parameter in self.model.weights()}
        if self.cost is not None:
            own |= {id(parameter) for parameter in self.cost.parameters()}
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [each for each in group["params"] if id(each) in weights or id(each) not in own]
        return [group for group in groups if group["params"]]

    def total_steps(self) -> int:
        """Number of steps on the weights in the run."""
        steps, trainer = super().total_steps(), self.trainer
        if self.accumulate == 1 or trainer.max_epochs is None or trainer.max_epochs < 1:
            return steps
        in_epochs = math.ceil(trainer.num_training_batches / self.accumulate) * trainer.max_epochs
        return in_epochs if trainer.max_steps < 1 else min(in_epochs, trainer.max_steps)

    def _step_schedules(self, end_of_epoch: bool) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step":
                due = self.global_step % config.frequency == 0
            else:
                due = end_of_epoch and (self.current_epoch + 1) % config.frequency == 0
            if due:
                self.lr_scheduler_step(config.scheduler, None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _waits(device: torch.device) -> bool:
    """Whether to look at a number means to wait for all that the device has to do until then."""
    return device.type != "cpu"
