"""Image operations on whole batches."""

from lightning_automl.augment.crops import normalize, random_crop, random_crop_flip, random_flip
from lightning_automl.augment.engine import ImageTypeError, Plan, apply, apply_operation
from lightning_automl.augment.ops import BASE, OPS, Operation

__all__ = [
    "BASE",
    "OPS",
    "ImageTypeError",
    "Operation",
    "Plan",
    "apply",
    "apply_operation",
    "normalize",
    "random_crop",
    "random_crop_flip",
    "random_flip",
]
