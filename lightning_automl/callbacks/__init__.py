"""Callbacks that watch a run."""

from lightning_automl.callbacks.batch_size import BatchSizeProbe
from lightning_automl.callbacks.run_writer import AtomicCheckpointIO, RunWriter, mode_of

__all__ = ["AtomicCheckpointIO", "BatchSizeProbe", "RunWriter", "mode_of"]
