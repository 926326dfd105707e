"""A task of which a part never changes: its checkpoints hold the rest."""

import json
import warnings
import weakref
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_automl.rundir import UserError, replacing
from lightning_automl.tasks.classification import ClassificationTask

#: Buffers that modules change by themselves in training mode: statistics of norms, vectors of spectral norms.
_MOVING = {"running_mean", "running_var", "weight_u", "weight_v", "_u", "_v"}


class PartlyFrozenTask(ClassificationTask):
    """A task that trains a part of its network; a subclass says which by setting :attr:`frozen` when it is built.

    What is frozen is in no checkpoint: a digest in each says which values belong to it, and a network with others is
    refused. A run directory keeps the frozen values once, in ``checkpoints/base.safetensors``, so that nothing outside
    of it is needed later. Frozen buffers stay: modules that would change them in training keep evaluating, and one that
    changes them all the same ends the run.

    Args:
        model: The network, with its first weights; see :class:`ClassificationTask`.
        num_classes: Number of labels.
        kwargs: Further arguments of :class:`ClassificationTask`.
    """

    def __init__(self, model: nn.Module, num_classes: int, **kwargs: Any) -> None:
        super().__init__(model, num_classes, **kwargs)
        #: Names of the tensors of this task's state that never change.
        self.frozen: frozenset[str] = frozenset()
        self._digest: str | None = None
        self._copies: list[weakref.ref[Self]] = []
        self._buffers_at_start: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_do_without_frozen)  # type: ignore[no-untyped-call]

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What beside the configuration is needed to build the network again, as JSON; ``None`` for nothing."""
        return None

    def follow(self, recipe: dict[str, Any]) -> None:
        """Build the network again as the :attr:`recipe` of a file says."""
        raise NotImplementedError

    @property
    def waiting(self) -> bool:
        """Whether the network is yet to be built by a recipe."""
        return False

    def whole_state(self) -> dict[str, Tensor]:
        """All tensors by name, the frozen ones too, which ``state_dict`` leaves out."""
        return {f"model.{name}": value for name, value in self.model.state_dict().items()} | self.state_dict()

    def save_base(self, path: Path) -> None:
        """Write what is frozen to a safetensors file, and the :attr:`recipe`.

        None is written if there is nothing to write.
        """
        if not self.frozen and self.recipe is None:
            return
        from safetensors.torch import save

        whole = self.whole_state()
        tensors = {name: whole[name].detach().cpu().contiguous().clone() for name in sorted(self.frozen)}
        with replacing(path) as partial:
            facts = None if self.recipe is None else {"recipe": json.dumps(self.recipe)}
            partial.write_bytes(save(tensors, facts))  # save_file would make it readable for its owner alone

    def load_base(self, path: Path) -> None:
        """Take what is frozen from the file that a run keeps of it.

        Raises:
            UserError: If the file is missing, damaged or another network's.
        """
        if not self.frozen and not self.waiting:
            return
        if not path.exists():
            raise UserError(f"{path} is missing, which holds the frozen rest of the network; restore it")
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no dictionary
        except Exception as error:  # SafetensorError is no public name
            raise UserError(f"{path} cannot be read ({type(error).__name__}); it is damaged, restore it") from error
        if "recipe" in facts:
            self.follow(json.loads(facts["recipe"]))
        own = self.whole_state()
        wrong = sorted(self.frozen - tensors.keys()) or sorted(
            name for name in self.frozen if tensors[name].shape != own[name].shape
        )
        if wrong:
            raise UserError(
                f"{path} is of another network: it lacks {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}; "
                "give the config that the run was started with"
            )
        with torch.no_grad():
            for name in self.frozen:
                own[name].copy_(tensors[name])
        self._digest = None

    def base_digest(self) -> str:
        """32 hexadecimal digits that change with any frozen value; they do not depend on device or layout.

        What an adapter replaces as a whole, such as the head, is not a part of it.
        """
        if self._digest is None:
            from lightning_automl.adapters.digest import digest_of

            state = self.whole_state()
            names = (name for name in self.frozen if ".original_module." not in name)
            self._digest = digest_of((name, state[name]) for name in names)
        return self._digest

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which frozen weights belong to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["frozen"] = {"base": self.base_digest(), "recipe": self.recipe}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that belongs to other frozen weights."""
        facts = checkpoint.get("frozen")
        if facts is not None and facts["recipe"] is not None:
            self.follow(facts["recipe"])
        super().on_load_checkpoint(checkpoint)
        if facts is not None and facts["base"] != self.base_digest():
            raise UserError(
                "the checkpoint belongs to other frozen weights than the network has; give the weights that its "
                "training began with"
            )

    def setup(self, stage: str) -> None:
        """Prepare the network; what is frozen is known by its digest from before any change of precision."""
        super().setup(stage)
        # Lightning warns of modules in evaluation mode, which here is as it is to be.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
        self.base_digest()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; modules that would change frozen buffers keep evaluating."""
        super().train(mode)
        if mode and hasattr(self, "_copies"):
            self.rest()
        return self

    def rest(self) -> None:
        """Set modules that would change frozen buffers to evaluation mode."""
        for name, module in self.model.named_modules(prefix="model"):
            own = _MOVING & module._buffers.keys()
            if own and any(f"{name}.{buffer}" in self.frozen for buffer in own):
                module.training = False

    def on_train_start(self) -> None:
        """Take note of the frozen buffers."""
        names = {f"model.{name}" for name, _ in self.model.named_buffers()} & self.frozen
        state = self.whole_state()
        self._buffers_at_start = {name: state[name].detach().clone() for name in names}

    def on_train_epoch_end(self) -> None:
        """Log the training metrics of the epoch, and look whether frozen buffers are what they were.

        Raises:
            RuntimeError: If not.
        """
        super().on_train_epoch_end()
        self._keep_copies_exact()
        state = self.whole_state()
        moved = [name for name, value in self._buffers_at_start.items() if not torch.equal(state[name], value)]
        if moved:
            raise RuntimeError(
                f"frozen buffers have changed in training: {', '.join(sorted(moved)[:3])}"
                f"{', …' if len(moved) > 3 else ''}; a module of this network changes them by itself, so train the "
                "whole network or take another one"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep averaged copies of this task exact where nothing is trained."""
        self._keep_copies_exact()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = super().__deepcopy__(memo)
        copied._copies = []
        self._copies = [each for each in self._copies if each() is not None] + [weakref.ref(copied)]
        return copied

    def _keep_copies_exact(self) -> None:
        """Undo what averaging weights does to those that never change: 0.9 x + 0.1 x is not always x."""
        for reference in self._copies:
            copied = reference()
            if copied is None:
                continue
            own, other = (task.model.state_dict(keep_vars=True) for task in (self, copied))
            with torch.no_grad():
                for name in (name.removeprefix("model.") for name in self.frozen):
                    other[name].copy_(own[name])


def _leave_out_frozen(task: PartlyFrozenTask, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in task.frozen:
        del state[prefix + name]


def _do_without_frozen(task: PartlyFrozenTask, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not _is_frozen(task, name)]


def _is_frozen(task: PartlyFrozenTask, name: str) -> bool:
    while name not in task.frozen:  # within what holds the task, as one that averages weights
        _, dot, name = name.partition(".")
        if not dot:
            return False
    return True
