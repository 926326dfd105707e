"""What one step of an architecture search costs: the fast form of the cells beside the readable one."""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import results
from lightning_automl.models import DartsSpace
from lightning_automl.process import keep_freed_memory

FOLDER = Path(__file__).parent
SIZE = 32
CLASSES = 10
#: Threads, batch, least rounds.
CASES = {"one thread": (1, 16, 5), "two threads": (2, 16, 5), "batch 64": (2, 64, 2)}
FORMS = ("readable, NCHW", "readable, channels_last", "fast")
COLUMNS = ["case", "form", "seconds", "speedup", "lowest", "highest", "speedup_cpu", "rounds", "peak_mb", "memory"]
FACTS = [
    "form",
    "kernels",
    "kernels_share",
    "loss",
    "alphas",
    "weights",
    "alphas_exact",
    "weights_exact",
    "gflop",
    "gbyte",
]

# What a profile names beside kernels: views, allocations, and functions that call others.
NO_KERNELS = frozenset(
    """view reshape permute transpose t expand expand_as slice narrow select split split_with_sizes unbind unflatten
    flatten squeeze unsqueeze as_strided as_strided_ detach alias empty empty_like empty_strided new_empty resize_
    resize_as_ contiguous clone to _to_copy detach_ result_type item chunk _unsafe_view _reshape_alias zeros new_zeros
    zeros_like ones conv2d convolution _convolution batch_norm _batch_norm_impl_index relu relu_ matmul linear
    cross_entropy_loss max_pool2d softmax log_softmax nll_loss nll_loss_nd repeat_interleave stack resolve_conj
    resolve_neg pad constant_pad_nd lift_fresh group_norm _nnpack_available is_nonzero""".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of all rounds together")
    parser.add_argument("--rounds", type=int, help="at least so many a case; 5, and 2 of the large batch, if not given")
    parser.add_argument("--only", choices=CASES, nargs="+", help="cases")
    parser.add_argument(
        "--facts", choices=("no", "too", "only"), default="too", help="equality, kernels, profile, floor"
    )
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--table", action="store_true", help="print the tables of all results and run nothing")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(peak_memory(*arguments.memory_of)))
        return
    if not arguments.table:
        keep_freed_memory()  # as every command of the project
        cases = arguments.only or list(CASES)
        rows = []
        if arguments.facts != "only":
            rows += itertools.chain(*(measure(case, arguments.budget / len(cases), arguments.rounds) for case in cases))
        facts: dict[str, Any] = {"note": arguments.note}
        if arguments.facts != "no":
            torch.set_num_threads(1)
            rows += compared()
            facts |= {"profile": profiled(), "machine": machine()}
        print(
            results.write(
                FOLDER,
                "-".join(["facts" if arguments.facts == "only" else "step", *(arguments.only or ())]).replace(" ", "_"),
                rows,
                **facts,
            )
        )
    print(f"{table(COLUMNS)}\n\n{table(FACTS)}")


def table(columns: list[str]) -> str:
    """A table of the rows that have these columns: times and facts are rows of their own."""
    return "\n".join(line for line in results.table(FOLDER, columns).splitlines() if not line.endswith(" |  |"))


def search_step(form: str, batch: int, dtype: torch.dtype = torch.float32) -> tuple[DartsSpace, Callable[[], Any]]:
    """A space, and one step of its search, first order: the same weights and images in every form."""
    torch.manual_seed(0)
    space = DartsSpace(CLASSES, fused=form == "fast").to(dtype)
    images, labels = torch.randn(2, batch, 3, SIZE, SIZE).to(dtype), torch.randint(CLASSES, (2, batch))
    if form != FORMS[0]:
        space = space.to(memory_format=torch.channels_last)
    norms = [module for module in space.modules() if isinstance(module, nn.BatchNorm2d)]
    alphas, weights = space.alphas(), space.weights()
    adam = torch.optim.Adam(alphas, lr=0.0, betas=(0.5, 0.999))  # nothing moves, so that every step is the same
    sgd = torch.optim.SGD(weights, lr=0.0, momentum=0.9)

    def descend(
        half: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, list[Tensor]]:
        layout = torch.contiguous_format if form == FORMS[0] else torch.channels_last
        loss = F.cross_entropy(space(images[half].contiguous(memory_format=layout)), labels[half])
        gradients = list(torch.autograd.grad(loss, parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if parameters is weights:
            nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), gradients

    def step() -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
        for norm in norms:
            norm.track_running_stats = False
        architecture = descend(0, alphas, adam)
        for norm in norms:
            norm.track_running_stats = True
        return architecture, descend(1, weights, sgd)

    return space, step


def measure(case: str, seconds: float, rounds: int | None = None) -> list[dict[str, Any]]:
    """Seconds of a step in each form, in turns that rotate, and the memory of each in a process of its own."""
    threads, batch, least = CASES[case]
    least = rounds or least
    memory = {form: in_fresh_process(case, form) for form in FORMS}
    torch.set_num_threads(threads)
    steps = {form: search_step(form, batch)[1] for form in FORMS}
    for step in steps.values():
        step()  # memory is claimed, kernels are chosen
    wall: dict[str, list[float]] = {form: [] for form in FORMS}
    processor: dict[str, list[float]] = {form: [] for form in FORMS}
    begin = time.perf_counter()
    while len(wall[FORMS[0]]) < least or time.perf_counter() - begin < seconds:
        turn = len(wall[FORMS[0]]) % len(FORMS)
        for form in (*FORMS[turn:], *FORMS[:turn]):
            start, used = time.perf_counter(), time.process_time()
            steps[form]()
            processor[form].append(time.process_time() - used)
            wall[form].append(time.perf_counter() - start)
    rows = []
    for form in FORMS:
        ours, theirs = np.array(wall[form]), np.array(wall[FORMS[0]])
        chosen = np.random.default_rng(0).integers(len(ours), size=(1000, len(ours)))
        speedups = np.median(theirs[chosen], axis=1) / np.median(ours[chosen], axis=1)
        rows.append(
            {
                "case": f"{case}, {batch} images, {threads} thread{'s' * (threads > 1)}",
                "form": form,
                "seconds": statistics.median(wall[form]),
                "speedup": float(np.median(theirs) / np.median(ours)),
                "lowest": float(np.quantile(speedups, 0.025)),
                "highest": float(np.quantile(speedups, 0.975)),
                "speedup_cpu": statistics.median(processor[FORMS[0]]) / statistics.median(processor[form]),
                "rounds": len(ours),
                "peak_mb": memory[form],
                "memory": memory[form] / memory[FORMS[0]],
            }
        )
    return rows


def in_fresh_process(case: str, form: str) -> float:
    command = [sys.executable, "-m", "benchmarks.darts_step.run", "--memory-of", case, form]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(ended.stdout.splitlines()[-1]))


def peak_memory(case: str, form: str) -> float:
    """Megabytes that this process grows to in a step, beyond what it had before it."""
    keep_freed_memory()
    threads, batch, _ = CASES[case]
    torch.set_num_threads(threads)
    _, step = search_step(form, batch)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def compared() -> list[dict[str, Any]]:
    """Kernels of a step, and relative differences of its losses and gradients, from the reference and from float64."""
    batch = CASES["one thread"][1]
    exact = search_step("fast", batch, torch.float64)[1]()
    outcomes = {form: search_step(form, batch)[1]() for form in FORMS}
    rows = []
    for form, outcome in outcomes.items():
        row: dict[str, Any] = {"form": form}
        for other, suffix in ((outcomes[FORMS[0]], ""), (exact, "_exact")):
            for name, (loss, own), (other_loss, others) in zip(("alphas", "weights"), outcome, other, strict=True):
                row[f"{name}{suffix}"] = difference(own, others)
                row[f"loss{suffix}"] = max(row.get(f"loss{suffix}", 0.0), difference([loss], [other_loss]))
        counts = kernels(search_step(form, batch)[1])
        row |= {"kernels": sum(counts.values()), "most": dict(counts.most_common(12))}
        row |= moved(search_step(form, batch)[1])
        rows.append(row)
    for row in rows:
        row["kernels_share"] = row["kernels"] / rows[0]["kernels"]
    return rows


def difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Norm of the difference relative to the norm, all tensors together."""
    own, other = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (ours, theirs))
    return ((own - other).norm() / other.norm()).item()


def kernels(step: Callable[[], Any]) -> Counter[str]:
    """How often a step calls what would be a kernel on a GPU; what only calls others counts by what it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    counts: Counter[str] = Counter()
    waiting = [event for event in found.events() if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and name not in NO_KERNELS:
            counts[name] += 1
        else:
            waiting += event.cpu_children
    return counts


class _Work(TorchDispatchMode):
    """Adds up operations of convolutions and products, and the bytes that kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        read = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in read}
        view = written and all(tensor.untyped_storage().data_ptr() in known for tensor in written)
        if name.endswith("_") or not (view or name in NO_KERNELS - {"convolution"}):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
        if name == "convolution":  # torch's own counter takes the gradients of grouped ones for those of whole ones
            self.operations += 2 * result.numel() * arguments[1][0].numel()
        if name == "convolution_backward":
            self.operations += sum(arguments[10][:2]) * 2 * arguments[0].numel() * arguments[2][0].numel()
        if name == "mm":
            self.operations += 2 * result.numel() * arguments[0].shape[1]
        return result


def moved(step: Callable[[], Any]) -> dict[str, float]:
    """Operations of a step, and bytes in and out of its kernels, both in units of 10^9."""
    with _Work() as work:
        step()
    return {"gflop": work.operations / 1e9, "gbyte": work.bytes / 1e9}


def profiled() -> list[dict[str, Any]]:
    """The calls that take most of the fast form's time in one thread."""
    step = search_step("fast", CASES["one thread"][1])[1]
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    averages = found.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    largest = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:16]
    return [{"call": e.key, "share": e.self_cpu_time_total / total, "calls": e.count} for e in largest]


def machine() -> dict[str, float]:
    """What one thread reaches: 10^9 operations a second in a product of matrices, 10^9 bytes a second in a sum."""
    left, right = torch.randn(2, 1024, 1024)
    long = torch.randn(3, 2**24)
    return {
        "gflop_a_second": 2 * 1024**3 / 1e9 / fastest(lambda: torch.mm(left, right)),
        "gbyte_a_second": 3 * 4 * 2**24 / 1e9 / fastest(lambda: torch.add(long[0], long[1], out=long[2])),
    }


def fastest(call: Callable[[], Any]) -> float:
    found = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
