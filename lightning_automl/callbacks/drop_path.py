"""Let the drop-path probability of a network grow while it trains."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_automl.models.layers import check_probability
from lightning_automl.rundir import UserError


class DropPathSchedule(Callback):
    """Sets the attribute ``drop_path`` of the network to ``maximum * epoch / epochs`` in each epoch, from 0.

    Zoph, Vasudevan, Shlens and Le, *Learning Transferable Architectures for Scalable Image Recognition*, CVPR 2018,
    https://arxiv.org/abs/1707.07012 (section A.2: ScheduledDropPath), by epochs as DARTS's released code has it. A run
    that is continued takes the value of its epoch: there is nothing in the checkpoint. When it is continued with a
    larger ``max_epochs``, the probability falls back to the slower growth.

    Args:
        maximum: What the probability would reach at the end, in [0, 1); the paper of DARTS has 0.2.
        epochs: Length of the growth; ``max_epochs`` of the trainer by default. Afterwards the probability stays.

    Raises:
        UserError: If ``maximum`` is no probability or ``epochs`` below 1, and when training starts if the network has
            no ``drop_path`` or the length of the run is unknown.
    """

    def __init__(self, maximum: float = 0.2, epochs: int | None = None) -> None:
        check_probability("maximum", maximum)
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs is {epochs}; it must be 1 or more")
        self.maximum = maximum
        self.epochs = epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for what can be set, and set it: within an epoch that is continued nothing else would."""
        if not _with_drop_path(pl_module):
            network = type(getattr(pl_module, "model", pl_module)).__name__
            raise UserError(
                f"{network} has no drop_path to schedule; use a GenotypeNetwork, or leave DropPathSchedule out"
            )
        if self.epochs is None and (trainer.max_epochs is None or trainer.max_epochs < 1):
            raise UserError("DropPathSchedule does not know the length of the run; give it epochs, or set max_epochs")
        self._set(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the probability of this epoch."""
        self._set(trainer, pl_module)

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = self.epochs or trainer.max_epochs
        assert epochs is not None
        for module in _with_drop_path(pl_module):
            module.drop_path = self.maximum * min(trainer.current_epoch / epochs, 1.0)  # type: ignore[assignment]


def _with_drop_path(pl_module: LightningModule) -> list[nn.Module]:
    return [module for module in pl_module.modules() if isinstance(getattr(module, "drop_path", None), float)]
