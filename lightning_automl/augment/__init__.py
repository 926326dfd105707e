"""Image operations on whole batches."""

from lightning_automl.augment.ops import normalize, random_crop, random_crop_flip, random_flip

__all__ = ["normalize", "random_crop", "random_crop_flip", "random_flip"]
