"""Lower the batch size until a training step fits in memory."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error

from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)


class BatchSizeProbe(Callback):
    """Halves the batch until a forward and backward pass fits, and accumulates gradients to make up for it.

    Works on a data module with ``device_batch_size``, ``channels`` and ``image_size``. Before training, each rank
    passes a batch of black images forward and backward in the trainer's precision, with room kept for two states per
    parameter as Adam has them; the smallest answer of all ranks holds. Weights, buffers, gradients and random numbers
    are as before. A task with an optimization of its own is told by its attribute ``accumulate``. The choice is a part
    of the checkpoint, so that a continued run uses the same batches.
    """

    def __init__(self) -> None:
        self.device_batch_size = 0
        self.accumulate = 1
        self._trainer: Trainer | None = None
        self._module: Any = None
        self._own = 1  # batches of a step that the module was given

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the batch size before the data loaders are made; without ``fit`` for a forward pass alone."""
        if self.device_batch_size:  # a test after fit, whose batches fit all the more
            return
        self._trainer, self._module = trainer, pl_module
        self._own = getattr(pl_module, "accumulate", 1)
        wanted = size = int(trainer.datamodule.device_batch_size)  # type: ignore[attr-defined]  # set by Trainer.fit
        while not trainer.strategy.reduce_boolean_decision(self._fits(trainer, pl_module, size, stage), all=True):
            if size == 1:
                raise UserError("not even one image fits in memory; take smaller images or a smaller network")
            size //= 2
        self.device_batch_size, self.accumulate = size, -(-wanted // size)
        self._apply()
        if size < wanted:
            log.info(
                "a batch of %d does not fit in memory: batches of %d with gradients accumulated over %d",
                wanted,
                size,
                self.accumulate,
            )

    def _fits(self, trainer: Trainer, pl_module: LightningModule, size: int, stage: str) -> bool:
        data = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        pl_module.to(device)
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        try:
            precision = trainer.precision_plugin.forward_context()
            seeds = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with seeds, precision, torch.set_grad_enabled(stage == "fit"):
                images = torch.zeros(size, data.channels, *data.image_size, dtype=torch.uint8, device=device)
                outputs = pl_module(images)
                # a network may give further logits beside its own in training (auxiliary heads)
                parts = outputs if isinstance(outputs, tuple) else (outputs,)
                total: Any = torch.stack([part.float().sum() for part in parts]).sum()
                if stage != "fit":
                    return True
                total.backward()
                states = [torch.empty_like(parameter) for parameter in pl_module.parameters() for _ in range(2)]
                del states
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not (is_oom_error(error) or isinstance(error, torch.OutOfMemoryError)):
                raise
            return False
        finally:
            pl_module.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in pl_module.named_buffers():
                    buffer.copy_(buffers[name])
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _apply(self) -> None:
        assert self._trainer is not None
        self._trainer.datamodule.device_batch_size = self.device_batch_size  # type: ignore[attr-defined]
        if not self._module.automatic_optimization:  # it accumulates itself, if it can
            self._module.accumulate = self._own * self.accumulate
        else:
            self._trainer.accumulate_grad_batches = self.accumulate

    def state_dict(self) -> dict[str, Any]:
        """The batch size found and the number of batches a step."""
        return {"device_batch_size": self.device_batch_size, "accumulate": self.accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use what the run that is continued had found."""
        self.device_batch_size, self.accumulate = state_dict["device_batch_size"], state_dict["accumulate"]
        if self._trainer is not None:
            self._apply()
