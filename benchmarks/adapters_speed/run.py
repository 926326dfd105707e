"""What adapters cost: a training step beside plain peft's, and the network's answer merged and not merged."""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from peft import PeftModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks import results
from lightning_automl.adapters import (
    ConvAdapterConfig,
    LoraConfig,
    add_adapter,
    merge_adapter,
    merged_network,
    save_adapter,
)
from lightning_automl.models import ResNet

FOLDER = Path(__file__).parent
ROUNDS = 20
CLASSES = 10
COLUMNS = [
    *("network", "what", "variant", "ms", "ratio", "lowest", "highest"),
    *("ratio_cpu", "lowest_cpu", "highest_cpu", "rounds", "difference"),
]


class Case(NamedTuple):
    """A network with random weights, and what is sent through it."""

    build: Callable[[], nn.Module]
    batch: int
    size: int
    convolutional: bool = True
    plain: bool = True  # whether plain peft computes the same


NETWORKS = {
    "resnet20": Case(lambda: ResNet(CLASSES, depth=20), batch=16, size=32),
    "resnet18": Case(lambda: torchvision.models.resnet18(num_classes=CLASSES), batch=8, size=64),
    # timm's, as plain peft is wrong on the nn.MultiheadAttention of torchvision's
    "vit_3_layers": Case(
        lambda: VisionTransformer(64, 8, embed_dim=192, depth=3, num_heads=3, num_classes=CLASSES),
        batch=8,
        size=64,
        convolutional=False,
    ),
    # depthwise convolutions, which plain peft refuses at this rank
    "mobilenet_v3_small": Case(
        lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES), batch=8, size=96, plain=False
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=360.0, help="seconds; each case has its rounds in any case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", choices=NETWORKS, nargs="+", help="networks")
    parser.add_argument("--merged", action="store_true", help="only the network without and with a merged adapter")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        names = arguments.only or list(NETWORKS)
        rows = []
        for name in names:
            run = measure_merged if arguments.merged else measure
            rows += run(name, arguments.rank, arguments.budget / len(names))
        config = "merged" if arguments.merged else "speed"
        facts = {"threads": arguments.threads, "rank": arguments.rank, "note": arguments.note}
        print(results.write(FOLDER, "-".join([config, *(arguments.only or ())]), rows, **facts))
    print(results.table(FOLDER, COLUMNS))


def measure(name: str, rank: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one network: training steps for half of the time, then answers to one image and to a batch."""
    case = NETWORKS[name]
    torch.manual_seed(0)
    base = case.build().eval()
    images, labels = torch.randn(case.batch, 3, case.size, case.size), torch.arange(case.batch) % CLASSES
    lora = shaken(add_adapter(copy.deepcopy(base), LoraConfig(r=rank)))
    models = {"ours": lora}
    if case.plain:
        models["plain peft"] = read_by_plain_peft(lora, base)
    expected = answer(lora, images)
    differences = {variant: difference(answer(model, images), expected) for variant, model in models.items()}
    rows = []
    for variant, row in compared({v: step(m, images, labels) for v, m in models.items()}, "plain peft", seconds / 2):
        rows.append({"network": name, "what": f"training step, {case.batch} images", "variant": variant, **row})

    # compared with the network that was trained into, so that a head of the adapter's own is in all
    merged = merged_network(lora)
    in_place = copy.deepcopy(lora)
    merge_adapter(in_place)
    dora = shaken(add_adapter(copy.deepcopy(base), LoraConfig(r=rank, use_dora=True)))
    variants = {"base": base, "merged": merged, "merged in place": in_place, "LoRA, ours": lora, "DoRA, ours": dora}
    if case.plain:
        variants["LoRA, plain peft"] = models["plain peft"]
    if case.convolutional:
        variants["conv adapter"] = shaken(add_adapter(copy.deepcopy(base), ConvAdapterConfig()))
    differences |= {
        v: (answer(variants[v], images) - expected).abs().max().item() for v in ("merged", "merged in place")
    }
    for batch in (1, case.batch):
        calls = {variant: partial(answer, model, images[:batch]) for variant, model in variants.items()}
        for variant, row in compared(calls, "base", seconds / 4):
            rows.append({"network": name, "what": f"answer, {batch} images", "variant": variant, **row})
    for row in rows:
        row["difference"] = differences.get(row["variant"])
    return rows


def measure_merged(name: str, rank: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one network, to one image, without and with a merged adapter: nothing else, so many more rounds."""
    case = NETWORKS[name]
    torch.manual_seed(0)
    base = case.build().eval()
    lora = shaken(add_adapter(copy.deepcopy(base), LoraConfig(r=rank)))
    image = torch.randn(1, 3, case.size, case.size)
    variants = {"base": base, "merged": merged_network(lora)}
    calls = {variant: partial(answer, model, image) for variant, model in variants.items()}
    found = difference(calls["merged"](), answer(lora, image))
    return [
        {"network": name, "what": "answer, 1 images", "variant": variant, **row}
        | ({"difference": found} if variant == "merged" else {})
        for variant, row in compared(calls, "base", seconds)
    ]


def difference(logits: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def read_by_plain_peft(lora: PeftModel, base: nn.Module) -> PeftModel:
    """The same adapter in peft's own layers, from the file that ours writes for it."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(lora, folder)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    own = {type(module).__module__.split(".")[0] for module in model.modules() if hasattr(module, "lora_A")}
    assert own == {"peft"}, f"these layers are not peft's own: {own}"
    return model.eval()


def shaken(model: PeftModel) -> PeftModel:
    """Give what is trained other values, so that nothing is compared with zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 100)
    return model


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=0.0, momentum=0.9
    )  # a step as any other, but all that follow find the same network

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return train


def compared(
    calls: Mapping[str, Callable[[], Any]], reference: str, seconds: float
) -> list[tuple[str, dict[str, Any]]]:
    """Call each in turn, in an order that rotates, and compare medians.

    Returns:
        For each its median in milliseconds, the ratio of its median to that of the reference with the 95 % interval
        of a bootstrap over rounds, and the same ratio of processor time, which other processes disturb less.
    """
    names = list(calls)
    for call in itertools.chain(*(calls.values() for _ in range(3))):  # memory is claimed, kernels are chosen
        call()
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    while len(wall[names[0]]) < ROUNDS or time.perf_counter() - begin < seconds:
        shift = len(wall[names[0]]) % len(names)
        for name in [*names[shift:], *names[:shift]]:
            start, used = time.perf_counter(), time.process_time()
            calls[name]()
            processor[name].append(time.process_time() - used)
            wall[name].append(time.perf_counter() - start)
    return [(name, row(wall[name], processor[name], wall.get(reference), processor.get(reference))) for name in names]


def row(
    wall: Sequence[float],
    processor: Sequence[float],
    reference: Sequence[float] | None,
    reference_processor: Sequence[float] | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {"ms": 1000 * statistics.median(wall), "rounds": len(wall)}
    for suffix, own, other in (("", wall, reference), ("_cpu", processor, reference_processor)):
        if other is not None:
            ours, theirs = np.array(own), np.array(other)
            chosen = np.random.default_rng(0).integers(len(ours), size=(1000, len(ours)))
            ratios = np.median(ours[chosen], axis=1) / np.median(theirs[chosen], axis=1)
            found |= {
                f"ratio{suffix}": float(np.median(ours) / np.median(theirs)),
                f"lowest{suffix}": float(np.quantile(ratios, 0.025)),
                f"highest{suffix}": float(np.quantile(ratios, 0.975)),
            }
    return found


if __name__ == "__main__":
    main()
