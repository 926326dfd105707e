"""LightningModules: how one run trains."""

from lightning_automl.tasks.classification import ClassificationTask
from lightning_automl.tasks.darts import DartsTask
from lightning_automl.tasks.finetune import FinetuneTask
from lightning_automl.tasks.schedules import WarmupCosineLR

__all__ = ["ClassificationTask", "DartsTask", "FinetuneTask", "WarmupCosineLR"]
