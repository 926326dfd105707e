"""Fine-tune a pretrained network: all of it, its last blocks, its head alone, or an adapter beside it."""

import copy
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_automl.models.cost import parameter_count
from lightning_automl.models.layers import SyncBatchNorm2d
from lightning_automl.models.weights import is_loading
from lightning_automl.rundir import UserError
from lightning_automl.tasks.classification import ClassificationTask
from lightning_automl.tasks.partly_frozen import PartlyFrozenTask

if TYPE_CHECKING:  # peft takes most of a second to import, and most runs do without; jsonargparse reads this block
    from peft import PeftConfig
    from torch.optim import Optimizer

    from lightning_automl.adapters.low_rank import LowRankConfig

log = logging.getLogger(__name__)

#: What peft puts around names of the network that it wraps.
_WRAPPER = "base_model.model."
#: The name that the adapter has in the network.
_ADAPTER = "default"
#: Batches from which an adapter's norm of a block's output takes its first values.
_CALIBRATION = 8


class FinetuneTask(PartlyFrozenTask):
    """Fine-tune a pretrained network; its head is always trained.

    Checkpoints hold only what is trained. The frozen rest is that of the network as it was given: a checkpoint says by
    a digest which one that was, and is refused by another. A run directory keeps it once, in
    ``checkpoints/base.safetensors``, so that nothing outside of the directory is needed later. The adapter of the best
    epoch is in ``adapter/`` when the run ends, as files of peft.

    Args:
        model: The network, with its first weights; see :class:`ClassificationTask`.
        num_classes: Number of labels.
        adapter: What is trained beside the frozen network: ``LoraConfig`` (also peft's own) or ``ConvAdapterConfig``;
            or ``LowRankConfig``, by which layers are factorised and their factors trained.
        unfreeze: Which layers of the network itself are trained beside its head: none (``head``), the last so many
            blocks and what follows them (a number), or all.
        unfreeze_every: Unfreeze gradually: in the first so many epochs the head alone is trained, then one block more
            after every so many, from the last one on, and at last what comes before the first block. Howard and
            Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018,
            https://arxiv.org/abs/1801.06146 (section 3.3).
        batch_norm: ``frozen``: statistics stay as they were. ``reestimated``: they are taken anew from the train
            split before training, and then stay. ``trained``: all batch norms are trained, weights and statistics.
            With an adapter what changes is saved as a part of it. By default ``trained`` if all layers are, else
            ``frozen``. With few images and small batches ``frozen`` may be much better for all layers too: the
            statistics of a few dozen batches are poor (``benchmarks/adapters_transfer``).
        adapter_lr: Learning rate of the adapter; the optimizer's by default.
        scale_lr: Learning rate of the adapter's learnable scales; that of the adapter by default.
        head_lr: Learning rate of the head; the optimizer's by default.
        layer_decay: Learning rates fall by this factor in (0, 1] from block to block, seen from the head: Clark et
            al., *ELECTRA*, ICLR 2020, https://arxiv.org/abs/2003.10555 (appendix A). Adapters too have that of their
            block.
        kwargs: Further arguments of :class:`ClassificationTask`.

    Raises:
        UserError: If arguments contradict each other, or the network has no such parts.

    Example:
        >>> task = FinetuneTask(network, num_classes=7, adapter=LoraConfig(r=4))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        adapter: "PeftConfig | LowRankConfig | None" = None,
        unfreeze: Literal["head", "all"] | int = "head",
        unfreeze_every: int | None = None,
        batch_norm: Literal["frozen", "reestimated", "trained"] | None = None,
        adapter_lr: float | None = None,
        scale_lr: float | None = None,
        head_lr: float | None = None,
        layer_decay: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, num_classes, **kwargs)
        self.unfrozen = unfreeze
        self.unfreeze_every = unfreeze_every
        self.batch_norm = batch_norm or ("trained" if unfreeze == "all" else "frozen")
        self.adapter_lr = adapter_lr
        self.scale_lr = scale_lr
        self.head_lr = head_lr
        self.layer_decay = layer_decay
        low_rank = adapter is not None and not hasattr(adapter, "peft_type")
        if adapter is not None and not low_rank:
            _check_method(adapter)
        self._check_arguments(low_rank, hasattr(adapter, "peft_type") or hasattr(model, "peft_config"))
        self._prepared = False  # whether statistics have been taken before training
        self._adapter_digest: str | None = None
        self._rates: list[float] = []
        self._plan: dict[str, Any] | None = None  # of the factorised layers
        self._waiting: Any = None  # for a plan: without its weights a network does not say which ranks it is to have
        self._analyse()
        config: Any = adapter
        if low_rank and not is_loading() and config.ranks is None:
            self._waiting = config
        elif low_rank:
            self._factorise(config)
        elif adapter is not None:
            self._add_adapter(config)
        self._settle()

    def _check_arguments(self, low_rank: bool, adapted: bool) -> None:
        if isinstance(self.unfrozen, bool) or (isinstance(self.unfrozen, str) and self.unfrozen not in ("head", "all")):
            raise UserError(f"unfreeze is {self.unfrozen!r}; known: head, all, or a number of blocks")
        if self.batch_norm not in ("frozen", "reestimated", "trained"):
            raise UserError(f"unknown batch_norm {self.batch_norm!r}; known: frozen, reestimated, trained")
        if adapted and self.unfrozen != "head":
            raise UserError(
                f"unfreeze is {self.unfrozen!r}, but with an adapter the network itself stays as it is; "
                "leave out one of the two"
            )
        if self.unfreeze_every is not None:
            if self.unfrozen == "head":
                raise UserError(
                    "unfreeze_every is given, but only the head is trained; set unfreeze to all or to a number"
                )
            if self.unfreeze_every < 1:
                raise UserError(f"unfreeze_every is {self.unfreeze_every}; it is a number of epochs, 1 or more")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}; it is in (0, 1]")
        for name in ("adapter_lr", "scale_lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}; it is a number, 0 or more")
            if value is not None and name != "head_lr" and not (adapted or low_rank):
                raise UserError(f"{name} is given, but no adapter; leave it out, or set it to null")

    # Parts of the network -------------------------------------------------------------------------------------------

    def _analyse(self) -> None:
        """Find head and blocks, and number all modules by depth: 0 before the first block, then by block."""
        from lightning_automl.adapters.anatomy import anatomy

        found = anatomy(self.model)
        self._head = tuple(found.head)
        self._blocks = tuple(found.blocks)
        self._norms = tuple(found.norms)
        self._image_shape = found.image_shape
        if isinstance(self.unfrozen, int) and not 1 <= self.unfrozen <= len(self._blocks):
            raise UserError(
                f"unfreeze is {self.unfrozen}, but the network has {len(self._blocks)} blocks; "
                f"give a number from 1 to {len(self._blocks)}, or head or all"
            )
        fits = found.num_classes == self.num_classes or (found.num_classes, self.num_classes) == (1, 2)
        self._new_head = None if fits else self.num_classes
        self._depths: dict[str, int] = {}
        depth = 0
        for name, _ in self.model.named_parameters():
            plain = _plain_name(name)
            number = next((index for index, block in enumerate(self._blocks) if _is_within(plain, block)), None)
            # What lies between two blocks goes with the former, such as the norm behind the last one.
            depth = depth if number is None else number + 1
            module, _, _ = plain.rpartition(".")
            self._depths.setdefault(module, depth)

    def _depth(self, name: str) -> int:
        """Depth of a parameter of the network by its name: 0 to the number of blocks, one more for the head."""
        plain = _plain_name(name)
        if any(_is_within(plain, head) for head in self._head):
            return len(self._blocks) + 1
        number = next((index for index, block in enumerate(self._blocks) if _is_within(plain, block)), None)
        if number is not None:
            return number + 1
        module = plain
        while module not in self._depths and module:
            module, _, _ = module.rpartition(".")
        return self._depths.get(module, 0)

    def _kind(self, name: str) -> Literal["head", "scale", "adapter", "network"]:
        if self._depth(name) > len(self._blocks):
            return "head"
        if not self.adapted:
            return "adapter" if self._is_factor(name) else "network"
        prefix = self._wrapped.base_model.prefix
        return "scale" if f"{prefix}scale" in name.split(".") else "adapter"

    def _is_factor(self, name: str) -> bool:
        layers: dict[str, int] = self._plan["ranks"] if self._plan is not None else {}
        return any(_is_within(name, layer) for layer in layers)

    @property
    def adapted(self) -> bool:
        """Whether the network carries an adapter of peft."""
        return hasattr(self.model, "peft_config")

    def _add_adapter(self, config: Any) -> None:
        from lightning_automl.adapters import add_adapter

        config = copy.copy(config)
        if not is_loading():
            config.base_digest = None  # of weights that are yet to come
        norms = () if self.batch_norm == "frozen" else self._norms
        config.modules_to_save = list(dict.fromkeys([*self._head, *(config.modules_to_save or ()), *norms]))
        self.model = add_adapter(self.model, config, _ADAPTER, num_classes=self._new_head)

    def _factorise(self, config: Any) -> None:
        from lightning_automl.adapters.low_rank import low_rank_network

        images = torch.rand(2, *self._image_shape, generator=torch.Generator().manual_seed(0))
        self.model, report = low_rank_network(self.model, config, images)
        self._plan = report.plan
        self._report = str(report)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How layers were factorised."""
        return self._plan

    @property
    def waiting(self) -> bool:
        """Whether layers are yet to be factorised as a file says."""
        return self._waiting is not None

    def follow(self, recipe: dict[str, Any]) -> None:
        """Factorise as the run did whose files are loaded."""
        if not self.waiting:
            return
        from lightning_automl.adapters.low_rank import LowRankConfig

        self._waiting = None
        self._factorise(LowRankConfig(**recipe))
        self._settle()

    def _settle(self) -> None:
        """Decide about everything in the network whether it is trained."""
        self._freeze()
        self.frozen = self._find_frozen()
        self.rest()

    def _freeze(self) -> None:
        if self._new_head is not None and not self.adapted:
            raise UserError(f"the network does not give {self.num_classes} logits; build it with as many classes")
        moving = {id(parameter) for norm in self._live_norms() for parameter in norm.parameters()}
        for name, parameter in self.model.named_parameters():
            if self.batch_norm == "trained" and id(parameter) in moving:
                parameter.requires_grad = True
            elif not self.adapted:
                parameter.requires_grad = self._is_factor(name) or self._depth(name) >= self._first_trained
            elif id(parameter) in moving:  # peft would train what is saved with an adapter
                parameter.requires_grad = False
        if self.unfrozen == "all":
            for parameter in self.model.parameters():
                parameter.requires_grad = True

    @property
    def _first_trained(self) -> int:
        """Depth from which on the layers of the network are trained."""
        if self.unfrozen == "all":
            return 0
        return len(self._blocks) + 1 - (0 if self.unfrozen == "head" else int(self.unfrozen))

    def _first_awake(self) -> int:
        """Depth from which on they are trained in this epoch."""
        if self.unfreeze_every is None or self._trainer is None:
            return self._first_trained
        return max(self._first_trained, len(self._blocks) + 1 - self.current_epoch // self.unfreeze_every)

    def _find_frozen(self) -> frozenset[str]:
        if self.unfrozen == "all":
            return frozenset()
        trained = {name.rpartition(".")[0] for name, each in self.model.named_parameters() if each.requires_grad}
        moving = () if self.batch_norm == "frozen" else tuple(name for name, _ in self._named_norms())
        parameters = {id(parameter) for parameter in self.model.parameters()}
        frozen = set()
        for name, value in self.model.state_dict(keep_vars=True).items():
            owner = name.rpartition(".")[0]
            if value.requires_grad or owner in moving or ".modules_to_save." in name:
                continue
            if id(value) in parameters or owner not in trained:
                frozen.add(f"model.{name}")
        return frozenset(frozen)

    def _named_norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        """The batch norms that are at work: not the originals of those that an adapter brings its own of."""
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and ".original_module" not in name:
                yield name, module

    def _live_norms(self) -> list[_BatchNorm]:
        """The batch norms that belong to what is trained or taken anew."""
        return [] if self.batch_norm == "frozen" else [norm for _, norm in self._named_norms()]

    def rest(self) -> None:
        """Let batch norms evaluate whose statistics are to stay, in gradual unfreezing for now."""
        super().rest()
        first = self._first_awake()
        complete = first == self._first_trained
        for name, norm in self._named_norms():
            awake = self.batch_norm == "trained" and (complete or self._depth(name) >= first)
            norm.train(self.training and awake and norm.running_mean is not None)

    # Files ----------------------------------------------------------------------------------------------------------

    def save_adapter(self, directory: Path, state: dict[str, Tensor] | None = None) -> Path | None:
        """Write the adapter as files of peft.

        Args:
            directory: Where to.
            state: The ``state_dict`` of a checkpoint to take its values from; as they are now when left out.

        Returns:
            The directory; ``None`` if there is no adapter.
        """
        if not self.adapted:
            return None
        from lightning_automl.adapters import save_adapter

        tensors = None
        if state is not None:
            tensors = self.model.state_dict()
            tensors |= {
                name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")
            }
        written: Path = save_adapter(
            self._wrapped, directory, self._active, state_dict=tensors, digest=self._adapter_digest
        )
        return written

    @property
    def low_rank(self) -> dict[str, Any] | None:
        """The arguments of the ``LowRankConfig`` that makes the factorised layers again; ``None`` without any."""
        return self._plan

    @property
    def mergeable(self) -> bool:
        """Whether what :meth:`deployed` gives has no layers of adapters."""
        if not self.adapted:
            return True
        from lightning_automl.adapters import is_mergeable

        return bool(is_mergeable(self._wrapped))

    @property
    def _wrapped(self) -> Any:
        """The network as what peft has made of it."""
        return self.model

    @property
    def _active(self) -> str:
        return str(self._wrapped.active_adapter)

    def deployed(self) -> ClassificationTask:
        """A copy for use alone: LoRA is merged, so that the network has the layers that it had without."""
        if not self.adapted:
            network = copy.deepcopy(self.model)
        else:
            from lightning_automl.adapters import merged_network

            wrapped = self._wrapped
            network = merged_network(wrapped) if self.mergeable else copy.deepcopy(wrapped.get_base_model())
        task = ClassificationTask(
            network,
            self.num_classes,
            loss=self.loss,
            channels_last=self.memory_format == torch.channels_last,
        )
        task.mean, task.std = self.mean.clone(), self.std.clone()
        return task.train(self.training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what was done before training."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["prepared"] = self._prepared

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take note of what was done before training."""
        super().on_load_checkpoint(checkpoint)
        self._prepared = checkpoint.get("prepared", self._prepared)

    # Training -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepare the network; an adapter's files know the base by its values before any change of precision."""
        super().setup(stage)
        if self.adapted and stage == "fit":
            from lightning_automl.adapters import base_digest

            saved = self._wrapped.peft_config[self._active].modules_to_save
            self._adapter_digest = base_digest(self.model, saved or ())

    def on_fit_start(self) -> None:
        """Tell what is trained, and what of the arguments has no effect."""
        if not self.trainer.is_global_zero:
            return
        log.info("%s", self.description())
        kinds = {self._kind(name) for name, each in self.model.named_parameters() if each.requires_grad}
        if self.scale_lr is not None and "scale" not in kinds:
            log.info("scale_lr has no effect: the adapter has no learnable scale")
        epochs = self.trainer.max_epochs or -1
        if self.unfreeze_every is not None and 0 < epochs <= self.unfreeze_every:
            log.warning(
                "unfreeze_every is %d and the run has %d epochs: the head alone is trained", self.unfreeze_every, epochs
            )

    def description(self) -> str:
        """What is trained, and which share of the parameters that is."""
        if self.adapted:
            from lightning_automl.adapters import describe_adapters

            return str(describe_adapters(self.model))
        if self._plan is not None:
            return self._report
        trained, total = parameter_count(self.model, trainable_only=True), parameter_count(self.model)
        what = {"head": "the head", "all": "all layers"}.get(
            str(self.unfrozen), f"the head and the last {self.unfrozen} of {len(self._blocks)} blocks"
        )
        gradually = f", one block more every {self.unfreeze_every} epochs" if self.unfreeze_every else ""
        return (
            f"trained: {what}{gradually}: {trained:,} of {total:,} parameters ({trained / total:.2%}); "
            f"batch norms {self.batch_norm}"
        )

    def on_train_start(self) -> None:
        """Take statistics before the first step, where asked to; a continued run has them already."""
        if not self._prepared:
            if self.batch_norm == "reestimated":
                self._reestimate()
            config = self._wrapped.peft_config[self._active] if self.adapted else None
            if getattr(config, "norm", "none") != "none" and getattr(config, "norm_at", "") == "block":
                from lightning_automl.adapters.conv_adapter import calibrate

                calibrate(self.model, map(self.normalized, islice(self._images(), _CALIBRATION)))
            self._prepared = True
            for reference in self._copies:
                if (copied := reference()) is not None:
                    copied.load_state_dict(self.state_dict())
        self.rest()
        super().on_train_start()

    def _images(self) -> Iterator[Tensor]:
        """Batches of this rank's share of the train split, not augmented if that is possible."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        loader: Any = self.trainer.train_dataloader
        if hasattr(data, "eval_dataloader"):
            loader = data.eval_dataloader("train")
        with torch.random.fork_rng([]):
            for batch in loader:
                images = batch[0].to(self.device)
                images = images if images.is_floating_point() else images / 255
                yield self.trainer.precision_plugin.convert_input(images)

    @torch.no_grad()
    def _reestimate(self) -> None:
        """Take the statistics of all batch norms from the train split: averages of those of its batches."""
        norms = [norm for norm in self._live_norms() if norm.running_mean is not None]
        if any(isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm2d) for norm in norms):  # ranks may have unlike batches
            raise UserError(
                "batch_norm is reestimated, which takes the statistics of all processes together already; "
                "leave out sync_batchnorm, and give the network the norm batch, not sync_batch"
            )
        momenta = [norm.momentum for norm in norms]
        modes = {module: module.training for module in self.modules()}
        self.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        batches = 0
        for images in self._images():
            if len(images) > 1:  # of one image some norms see one value a channel
                self(images)
                batches += 1
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
        total = float(self._sum(torch.tensor(float(batches), device=self.device)))
        if not total:
            raise UserError("batch norms cannot be re-estimated: the train split has no batch of two images")
        for norm in norms:
            for value in (norm.running_mean, norm.running_var):
                assert value is not None
                value.copy_(self._sum(value * batches) / total)

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        summed: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return summed

    def on_train_epoch_start(self) -> None:
        """Wake up the norms of the blocks that are trained from now on."""
        self.rest()

    def on_before_optimizer_step(self, optimizer: "Optimizer") -> None:
        """Leave blocks that are not yet to be trained as they are.

        They have gradients from the start, since ranks that exchange gradients have to know in advance of which.
        """
        first = self._first_awake()
        if first == self._first_trained:
            return
        for name, parameter in self.model.named_parameters():
            if self._depth(name) < first and self._kind(name) == "network":
                parameter.grad = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters to train, in one group for each combination of learning rate and weight decay.

        Learnable scales of adapters count as parameters of one dimension.
        """
        groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            kind = self._kind(name)
            factor = self.layer_decay ** (len(self._blocks) + 1 - self._depth(name))
            decays = self.decay_norms_and_biases or (parameter.ndim > 1 and kind != "scale")
            groups.setdefault((kind, factor, decays), []).append(parameter)
        own = {id(parameter) for parameter in self.model.parameters()}
        further = [each for each in self.parameters() if each.requires_grad and id(each) not in own]
        if further:  # a loss with parameters
            groups.setdefault(("network", 1.0, True), []).extend(further)
        return [
            {"params": parameters, "rate": (kind, factor)} | ({} if decays else {"weight_decay": 0.0})
            for (kind, factor, decays), parameters in groups.items()
        ]

    def make_optimizer(self) -> "Optimizer":
        """Build the optimizer and give each group its learning rate."""
        optimizer = super().make_optimizer()
        own = {"head": self.head_lr, "adapter": self.adapter_lr, "network": None}
        own["scale"] = self.adapter_lr if self.scale_lr is None else self.scale_lr
        for group in optimizer.param_groups:
            kind, factor = group.pop("rate")
            group["lr"] = (group["lr"] if own[kind] is None else own[kind]) * factor
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        return optimizer

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule.

        Raises:
            UserError: If the schedule puts a learning rate of its own in the place of those of the groups.
        """
        built = super().configure_optimizers()
        if isinstance(built, dict):
            groups, scheduler = built["optimizer"].param_groups, built["lr_scheduler"]["scheduler"]
            found = [float(group.get("initial_lr", rate)) for group, rate in zip(groups, self._rates, strict=True)]
            if len(set(self._rates)) > 1 and found != self._rates:
                raise UserError(
                    f"{type(scheduler).__name__} gives all parameters one learning rate, but adapter, head or blocks "
                    "have their own; use WarmupCosineLR, or leave those out"
                )
        return built


def _plain_name(name: str) -> str:
    """The name that a parameter or module of a network has, or would have, without what peft puts around it."""
    if not name.startswith(_WRAPPER):
        return name
    parts = iter(name.removeprefix(_WRAPPER).split("."))
    plain = []
    for part in parts:
        if part == "modules_to_save":
            next(parts, None)  # the name of the adapter
        elif part not in ("base_layer", "original_module"):
            plain.append(part)
    return ".".join(plain)


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _check_method(adapter: Any) -> None:
    import peft

    from lightning_automl.adapters import ADAPTERS

    if not isinstance(adapter, (peft.LoraConfig, *ADAPTERS.values())):
        raise UserError(
            f"adapter is a {type(adapter).__name__}, which is not known to work on image networks; known: "
            f"{', '.join(each.__name__ for each in ADAPTERS.values())}, LowRankConfig"
        )
