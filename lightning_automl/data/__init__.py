"""Data modules: labelled images in memory or mapped from a cache, batches by one index operation."""

from lightning_automl.data.arrays import ArraysDataModule
from lightning_automl.data.base import ImageDataModule, Index
from lightning_automl.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_automl.data.datasets import LabelledImages
from lightning_automl.data.digits import DigitsDataModule
from lightning_automl.data.folder import FolderDataModule

__all__ = [
    "ArraysDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "Index",
    "LabelledImages",
]
