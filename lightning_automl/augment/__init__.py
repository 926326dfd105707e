"""Image operations on whole batches, and policies that draw them."""

from lightning_automl.augment.crops import normalize, random_crop, random_crop_flip, random_flip
from lightning_automl.augment.engine import ImageTypeError, Plan, apply, apply_operation
from lightning_automl.augment.exchange import from_timm, from_torchvision, to_timm, to_torchvision
from lightning_automl.augment.ops import BASE, OPS, Operation
from lightning_automl.augment.policy import (
    Identity,
    ImagePolicy,
    Policy,
    Step,
    check_space,
    load_policy,
    policy_from_dict,
    policy_to_dict,
    save_policy,
)
from lightning_automl.augment.published import AutoAugment
from lightning_automl.augment.random_policies import RandAugment, TrivialAugment
from lightning_automl.augment.spaces import SPACES, OperationSpace, load_space
from lightning_automl.augment.timm_augment import TimmAugment

__all__ = [
    "BASE",
    "OPS",
    "SPACES",
    "AutoAugment",
    "Identity",
    "ImagePolicy",
    "ImageTypeError",
    "Operation",
    "OperationSpace",
    "Plan",
    "Policy",
    "RandAugment",
    "Step",
    "TimmAugment",
    "TrivialAugment",
    "apply",
    "apply_operation",
    "check_space",
    "from_timm",
    "from_torchvision",
    "load_policy",
    "load_space",
    "normalize",
    "policy_from_dict",
    "policy_to_dict",
    "random_crop",
    "random_crop_flip",
    "random_flip",
    "save_policy",
    "to_timm",
    "to_torchvision",
]
