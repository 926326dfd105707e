"""Parameter-efficient fine-tuning: LoRA, conv adapters and low-rank factors for image networks, on top of peft.

Importing this makes the methods known to peft, so that its functions read their files.
"""

from peft import PeftConfig

from lightning_automl.adapters.anatomy import Anatomy, anatomy
from lightning_automl.adapters.conv_adapter import ConvAdapterConfig, calibrate
from lightning_automl.adapters.counts import (
    AttentionCount,
    attention_parameters,
    conv_adapter_parameters,
    conv_lora_parameters,
    lora_parameters,
)
from lightning_automl.adapters.digest import base_digest
from lightning_automl.adapters.factorisation import (
    factorise_conv,
    factorise_linear,
    low_rank_saves,
    numerical_rank,
    rank_factorise,
)
from lightning_automl.adapters.files import add_adapter, load_adapter, save_adapter, switch_adapter
from lightning_automl.adapters.folding import fold_batchnorm
from lightning_automl.adapters.lora import LoraConfig
from lightning_automl.adapters.low_rank import LowRankConfig, low_rank_network
from lightning_automl.adapters.merging import is_mergeable, merge_adapter, merged_network, unmerge_adapter
from lightning_automl.adapters.targets import (
    adapter_parameters,
    describe_adapters,
    resolve_blocks,
    resolve_targets,
)

#: Configurations of all methods that are registered with peft, by short name.
ADAPTERS: dict[str, type[PeftConfig]] = {"lora": LoraConfig, "conv_adapter": ConvAdapterConfig}

__all__ = [
    "ADAPTERS",
    "Anatomy",
    "AttentionCount",
    "ConvAdapterConfig",
    "LoraConfig",
    "LowRankConfig",
    "adapter_parameters",
    "add_adapter",
    "anatomy",
    "attention_parameters",
    "base_digest",
    "calibrate",
    "conv_adapter_parameters",
    "conv_lora_parameters",
    "describe_adapters",
    "factorise_conv",
    "factorise_linear",
    "fold_batchnorm",
    "is_mergeable",
    "load_adapter",
    "lora_parameters",
    "low_rank_network",
    "low_rank_saves",
    "merge_adapter",
    "merged_network",
    "numerical_rank",
    "rank_factorise",
    "resolve_blocks",
    "resolve_targets",
    "save_adapter",
    "switch_adapter",
    "unmerge_adapter",
]
