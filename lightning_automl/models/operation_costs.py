"""What each operation on each edge of a space of cells costs, and tables of latencies."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_automl.models.cost import flop_count, latency, parameter_count
from lightning_automl.models.genotype import Genotype
from lightning_automl.rundir import UserError, hardware, write_json

#: Of the format of files with latencies.
VERSION = 1
UNIT = "milliseconds"
_KEYS = ("version", "unit", "device", "space", "rest", "operations")


class Place(NamedTuple):
    """One operation on one edge of one cell of the network of a genotype, as a module.

    Attributes:
        kind: Kind of cell.
        edge: Number of the edge.
        operation: Number of the operation.
        module: The operation, as the network of a genotype has it.
        shape: ``(channels, height, width)`` of what comes in.
        stride: 1 or 2.
    """

    kind: str
    edge: int
    operation: int
    module: nn.Module
    shape: tuple[int, int, int]
    stride: int


def check_space(model: Any) -> None:
    """Raise a UserError if a supernet does not say what is needed to know the cost of its architectures."""
    needed = ("edges", "operations", "strengths", "mixed_ops", "network")
    lacking = [name for name in needed if not hasattr(model, name)]
    if lacking:
        raise UserError(
            f"the cost of {type(model).__name__} is not known, as it has no {', '.join(lacking)}; derive it from "
            "CellSpace, or leave cost out"
        )


def everywhere(model: Any, name: str) -> Genotype:
    """A genotype with every edge of the space, and one operation on all."""
    cells: dict[str, Any] = {
        kind: tuple(
            tuple((name, source) for source, end in zip(edges.sources, edges.targets, strict=True) if end == target)
            for target in sorted(set(edges.targets))
        )
        for kind, edges in model.edges.items()
    }
    like: Genotype = model.genotype()
    return replace(like, **cells)


def places(model: Any, image_shape: tuple[int, int, int], device: torch.device | None = None) -> Iterator[Place]:
    """All operations on all edges of all cells, for images of ``(channels, height, width)``."""
    shapes: dict[tuple[int, int], tuple[int, int, int]] = {}  # the same for all operations
    for number, name in enumerate(model.operations):
        network = build(model, everywhere(model, name), device)
        modules = dict(_operations(model, network))
        if not shapes:
            shapes = _input_shapes(network, modules, image_shape, device)
        for kind, cell, edge, mixed in model.mixed_ops():
            yield Place(kind, edge, number, modules[cell, edge], shapes[cell, edge], mixed.stride)


def build(model: Any, genotype: Genotype, device: torch.device | None = None) -> nn.Module:
    """The network of a genotype in evaluation mode; the random numbers of the run stay as they are."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = model.network(genotype)
    return network.eval().to(device)


def _operations(model: Any, network: Any) -> Iterator[tuple[tuple[int, int], nn.Module]]:
    """The modules of a network by cell and edge."""
    wires: dict[int, dict[tuple[int, int], nn.Module]] = {}
    for number, cell in enumerate(network.cells):
        if hasattr(cell, "wires"):
            wires[number] = {
                (wire.source, wire.target): module for wire, module in zip(cell.wires, cell.operations, strict=True)
            }
    for kind, number, edge, _ in model.mixed_ops():
        wiring = model.edges[kind]
        pair = wiring.sources[edge], wiring.targets[edge]
        if pair in wires[number]:
            yield (number, edge), wires[number][pair]


def _input_shapes(
    network: nn.Module,
    modules: Mapping[tuple[int, int], nn.Module],
    image_shape: tuple[int, int, int],
    device: torch.device | None,
) -> dict[tuple[int, int], tuple[int, int, int]]:
    shapes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def keep(place: tuple[int, int]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _, channels, height, width = inputs[0].shape
            shapes[place] = (channels, height, width)

        return hook

    hooks = [module.register_forward_pre_hook(keep(place)) for place, module in modules.items()]
    with torch.no_grad():
        network(torch.zeros(1, *image_shape, device=device))
    for hook in hooks:
        hook.remove()
    return shapes


def counted(model: Any, image_shape: tuple[int, int, int], of: str) -> tuple[dict[str, Tensor], int]:
    """Parameters or floating-point operations of every operation on every edge, summed over cells, and of the rest.

    Both are sums over modules, so that a genotype's, with the rest, are exactly those of its network.

    Args:
        model: The space.
        image_shape: ``(channels, height, width)`` of the images.
        of: ``flops`` or ``parameters``.

    Returns:
        By kind of cell ``(E, O)``, int64; and what a network costs beside its edges.
    """
    tables = _zeros(model)
    known: dict[Any, int] = {}
    for place in places(model, image_shape):
        key = (place.operation, place.shape, place.stride)
        if key not in known:
            known[key] = parameter_count(place.module) if of == "parameters" else flop_count(place.module, place.shape)
        tables[place.kind][place.edge, place.operation] += known[key]
    rests = set()
    for number in {0, len(model.operations) - 1}:
        network = build(model, everywhere(model, model.operations[number]))
        whole = parameter_count(network) if of == "parameters" else flop_count(network, image_shape)
        rests.add(whole - sum(int(table[:, number].sum()) for table in tables.values()))
    if len(rests) > 1:
        raise UserError(
            f"the {of} of the networks of {type(model).__name__} are not the sum of those of their operations and a "
            "constant, so that their expectation cannot be computed; leave cost out"
        )
    return tables, rests.pop()


def _zeros(model: Any) -> dict[str, Tensor]:
    return {
        kind: torch.zeros(len(edges.sources), len(model.operations), dtype=torch.int64)
        for kind, edges in model.edges.items()
    }


# Latencies ------------------------------------------------------------------------------------------------------------


def measure_latencies(
    model: Any, image_shape: tuple[int, int, int], repeats: int = 30, device: torch.device | None = None
) -> dict[str, Any]:
    """Measure how long each operation of a space takes for one image, and the network around them.

    Each operation is timed by itself, at each size that it has in the space (the median of ``repeats`` passes); the
    rest is what the network of the current genotype takes outside its operations. A table says something about the
    machine and the number of threads on which it was measured, for batches of one image. How far the sum is from the
    time of the whole network, see :class:`~lightning_automl.models.architecture_cost.ArchitectureCost`.

    Args:
        model: The space.
        image_shape: ``(channels, height, width)`` of the images.
        repeats: Timed passes of each operation.
        device: Where to measure; None: on the CPU.

    Returns:
        What a file of latencies holds, see :func:`save_latencies`.
    """
    check_space(model)
    device = torch.device("cpu") if device is None else device
    operations: dict[str, list[dict[str, Any]]] = {name: [] for name in model.operations}
    known = set()
    for place in places(model, image_shape, device):
        key = (place.operation, place.shape, place.stride)
        if key not in known:
            known.add(key)
            channels, height, width = place.shape
            operations[model.operations[place.operation]].append(
                {
                    **{"channels": channels, "stride": place.stride, "height": height, "width": width},
                    UNIT: latency(place.module, place.shape, repeats, device),
                }
            )
    return {
        "version": VERSION,
        "unit": UNIT,
        "device": _device_note(device),
        "space": space_of(model, image_shape),
        "rest": _outside(model, image_shape, repeats, device),
        "operations": operations,
    }


def _outside(model: Any, image_shape: tuple[int, int, int], repeats: int, device: torch.device) -> float:
    """Milliseconds of a pass of the network of the current genotype outside its operations."""
    network = build(model, model.genotype(), device)
    inside: list[float] = []
    begun: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _, module in _operations(model, network):
        module.register_forward_pre_hook(lambda *_: begun.append(now()))
        module.register_forward_hook(lambda *_: inside.append(now() - begun.pop()))
    image = torch.zeros(1, *image_shape, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + repeats // 3):
            inside.clear()
            start = now()
            network(image)
            seconds.append(now() - start - sum(inside))
    return 1000 * statistics.median(seconds[repeats // 3 :])


def _device_note(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = hardware()
    return f"{about['cpu']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''}, torch {torch.__version__}"


def space_of(model: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What decides the sizes of a space's operations and of the network around them, as JSON has it."""
    cells: dict[str, list[int]] = {kind: [] for kind in model.edges}
    for kind, _, edge, mixed in model.mixed_ops():
        if edge == 0:
            cells[kind].append(mixed.channels)
    return {
        "name": type(model).__name__,
        "image_shape": list(image_shape),
        "nodes": {kind: len(set(edges.targets)) for kind, edges in model.edges.items()},
        "cells": cells,  # channels of each
        "stem_multiplier": getattr(model, "stem_multiplier", None),
    }


def save_latencies(table: Mapping[str, Any], path: str | Path) -> None:
    """Write latencies as JSON, atomically.

    ``version`` and ``unit`` are those of this file (1, ``milliseconds``); ``device`` is a note for people; ``space``
    says what they were measured for (:func:`space_of`); ``rest`` is the time beside the operations; ``operations`` has
    for each name a list of ``{"channels", "stride", "height", "width", "milliseconds"}`` for one image of that size.
    """
    write_json(Path(path), dict(table))


def load_latencies(path: str | Path) -> dict[str, Any]:
    """Read latencies.

    Raises:
        UserError: If there is no such file, or it has another form or version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no table of latencies {path}; make one with measure_latencies and save_latencies, or leave out "
            "table to have it measured at the start"
        ) from None
    except (OSError, ValueError) as error:  # of JSON and of UTF-8
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, dict) or (missing := [key for key in _KEYS if key not in content]):
        lacks = f"lacks {', '.join(missing)}" if isinstance(content, dict) else "is no mapping"
        raise UserError(f"{path} {lacks}; a table of latencies has {', '.join(_KEYS)}")
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has the version {content['version']!r}, and this release reads version {VERSION}; measure it again"
        )
    if content["unit"] != UNIT:
        raise UserError(f"{path} has the unit {content['unit']!r}; give {UNIT}")
    return content


def latencies(
    model: Any, image_shape: tuple[int, int, int], table: Mapping[str, Any], name: str
) -> tuple[dict[str, Tensor], int]:
    """Nanoseconds of every operation on every edge, summed over cells, and of the rest.

    Args:
        model: The space.
        image_shape: ``(channels, height, width)`` of the images.
        table: As :func:`measure_latencies` gives it.
        name: What to call the table in an error.

    Returns:
        By kind of cell ``(E, O)``, int64; and what a network takes beside its edges.

    Raises:
        UserError: If the table is another space's, lacks an operation or a size of it, or has a number that is none.
    """
    here, there = space_of(model, image_shape), table["space"]
    if there != here:
        there = there if isinstance(there, dict) else {}
        keys = [key for key in here if here[key] != there.get(key)] or ["more than it should"]
        told = "; ".join(f"{key} {there.get(key)} instead of {here.get(key)}" for key in keys)
        raise UserError(f"{name} was measured for another space ({told}); measure this one")
    known: dict[Any, int] = {}
    tables = _zeros(model)
    for place in places(model, image_shape):
        operation = model.operations[place.operation]
        key = (operation, *place.shape, place.stride)
        if key not in known:
            known[key] = _found(table["operations"], operation, place, name)
        tables[place.kind][place.edge, place.operation] += known[key]
    return tables, _nanoseconds(table["rest"], f"rest of {name}")


def _found(operations: Any, operation: str, place: Place, name: str) -> int:
    channels, height, width = place.shape
    size = {"channels": channels, "stride": place.stride, "height": height, "width": width}
    entries = operations.get(operation) if isinstance(operations, dict) else None
    if not isinstance(entries, list):
        has = ", ".join(operations) if isinstance(operations, dict) and operations else "no operation"
        raise UserError(f"{name} has no latency of {operation}, only of {has}; measure it, or take the operation out")
    for entry in entries:
        if isinstance(entry, dict) and all(entry.get(key) == value for key, value in size.items()):
            return _nanoseconds(entry.get(UNIT), f"{operation} in {name}")
    raise UserError(
        f"{name} has no latency of {operation} for {channels} channels, {height} x {width} pixels and stride "
        f"{place.stride}; measure this space"
    )


def _nanoseconds(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise UserError(f"{where} is {value!r}; give {UNIT}, a number from 0 on")
    return round(value * 1e6)
