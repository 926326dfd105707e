"""Keeps the architectures of a search: ``genotype.json``, its drawing, and ``architecture.json`` of all epochs."""

from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint


class GenotypeWriter(Checkpoint):
    """Writes ``genotype.json`` and ``architecture.json`` after each epoch, and the drawing at the end."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
