"""Directories as an architecture search and its control leave them, for tests of their pages and pictures."""

import shutil

import numpy as np
import yaml

from lightning_automl.rundir import write_json

OPERATIONS = (
    *("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
    *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
)
NASBENCH201 = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def cell_edges(inputs, nodes):
    return [(source, target) for target in range(inputs, inputs + nodes) for source in range(target)]


def strengths_over(epochs, edges, operations, *, drift=0.08, seed=0, favoured=None):
    """Softmax of alphas that drift: float64 ``(epochs, edges, operations)``."""
    generator = np.random.default_rng(seed)
    towards = generator.normal(size=(edges, len(operations)))
    if favoured is not None:
        towards[:, operations.index(favoured)] += 2.5
    noise = generator.normal(0, 0.2, (epochs, edges, len(operations))).cumsum(0)
    alphas = drift * (towards * np.arange(epochs)[:, None, None] + noise)
    powers = np.exp(alphas)
    return powers / powers.sum(-1, keepdims=True)


def derive(strengths, edges, operations, inputs):
    """The two strongest edges of each node, with their strongest operation but none."""
    cell = []
    allowed = [at for at, name in enumerate(operations) if name != "none"]
    for target in range(inputs, max(each for _, each in edges) + 1):
        own = [at for at, (_, each) in enumerate(edges) if each == target]
        own.sort(key=lambda at: -strengths[at, allowed].max())
        if inputs == 1:
            kept, ops = sorted(own), range(len(operations))
        else:
            kept, ops = own[:2], allowed
        cell.append([[operations[max(ops, key=lambda op, at=at: strengths[at, op])], edges[at][0]] for at in kept])
    return cell


def genotype_of(strengths, operations=OPERATIONS, inputs=2, nodes=4):
    """What ``genotype.json`` would hold."""
    edges = cell_edges(inputs, nodes)
    concat = list(range(inputs, inputs + nodes)) if inputs == 2 else [nodes]
    cells = {kind: derive(each, edges, operations, inputs) for kind, each in strengths.items()}
    return {
        "version": 1,
        "normal": cells["normal"],
        "normal_concat": concat,
        "reduce": cells.get("reduce", []),
        "reduce_concat": concat if "reduce" in cells else [],
        "inputs": inputs,
        "operations": list(operations),
    }


def architecture(
    epochs=12,
    *,
    operations=OPERATIONS,
    kinds=("normal", "reduce"),
    inputs=2,
    nodes=4,
    drift=0.08,
    favoured=None,
    eigenvalue=False,
    cost=False,
    chosen=None,
    reason="the last epoch",
    guards=(),
):
    """The content of ``architecture.json``."""
    edges = cell_edges(inputs, nodes)
    strengths = {
        kind: strengths_over(epochs, len(edges), operations, drift=drift, seed=at, favoured=favoured)
        for at, kind in enumerate(kinds)
    }
    entries = []
    for epoch in range(epochs):
        own = {kind: each[epoch] for kind, each in strengths.items()}
        genotype = genotype_of(own, operations, inputs, nodes)
        entries.append(
            {
                "epoch": epoch,
                "strengths": {kind: each.tolist() for kind, each in own.items()},
                "genotype": genotype,
                "skips": {
                    kind: sum(name == "skip_connect" for node in genotype[kind] for name, _ in node) for kind in kinds
                },
                "entropy": {kind: float(-(each * np.log(each)).sum(-1).mean()) for kind, each in own.items()},
                "eigenvalue": 0.05 * 1.12**epoch if eigenvalue else None,
                "cost": {"expected": 9e6 - 1e5 * epoch, "genotype": 8e6 - 2e5 * (epoch % 3), "unit": "flops"}
                if cost
                else None,
                "train_accuracy": 0.98 - 0.7 * 0.7**epoch,
                "arch_accuracy": 0.95 - 0.7 * 0.72**epoch,
                "val_accuracy": 0.94 - 0.72 * 0.75**epoch,
            }
        )
    return {
        "operations": list(operations),
        "edges": {
            kind: {
                "sources": [source for source, _ in edges],
                "targets": [target for _, target in edges],
                "inputs": inputs,
            }
            for kind in kinds
        },
        "epochs": entries,
        "chosen": {"epoch": epochs - 1 if chosen is None else chosen, "reason": reason} if epochs else None,
        "guards": list(guards),
    }


SKIP_STOP = {
    "name": "SkipStop",
    "settings": {"skips": 2, "kind": "normal"},
    "fired": False,
    "sentence": "the normal cell never had 2 skip connections",
}


def write_search(run, content, *, network=None, task=None):
    """Make the copy of a run the directory of an architecture search."""
    write_json(run / "architecture.json", content)
    entries = {each["epoch"]: each["genotype"] for each in content["epochs"]}
    if content["chosen"]:
        write_json(run / "genotype.json", entries[content["chosen"]["epoch"]])
    set_network(run, "lightning_automl.models.DartsSpace", network or {"max_skips": 2}, task=task)
    return run


def set_network(run, class_path, init_args, task=None):
    """Change the network in the config of a run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["model"] = {"class_path": class_path, "init_args": dict(init_args)}
    config["model"]["init_args"].update(task or {})
    (run / "config.yaml").write_text(yaml.safe_dump(config))


RANDOM = "model.init_args.model.init_args.random"


def write_control(directory, values, *, genotype, seeds=3, states=None, space=None, monitor="val_accuracy", **keys):
    """A study over random genotypes: values by genotype (None is the run's own), one a seed.

    States are by genotype and seed, COMPLETE where nothing is said.
    """
    states = states or {}
    trials = []
    for seed in range(seeds):
        for random, own in values.items():
            number = len(trials)
            state = states.get((random, seed), "COMPLETE")
            value = own[seed] if seed < len(own) else None
            trials.append(
                {
                    "number": number,
                    "state": state,
                    "values": [value] if state in ("COMPLETE", "PRUNED") and value is not None else None,
                    "reason": "out of memory" if state == "FAIL" else "",
                    "seconds": 30.0 + number,
                    "epochs": 3,
                    "directory": f"trials/{number:04d}",
                    "params": {"random": random, "seed_everything": seed},
                    "intermediate": [],
                    "started": f"2026-01-02T03:{number % 60:02d}:00",
                    "ended": f"2026-01-02T04:{number % 60:02d}:00",
                    "lost": False,
                    "infeasible": False,
                    "retry_of": None,
                    "metrics": {},
                }
            )
            place = directory / f"trials/{number:04d}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            network = {
                "class_path": "lightning_automl.models.GenotypeNetwork",
                "init_args": {"genotype": genotype, "random": random, "channels": 16, "cells": 4},
            }
            config = {"model": {"init_args": {"model": network}}, "trainer": {}}
            (place / "config.yaml").write_text(yaml.safe_dump(config))
            size = 40_000 + 1_000 * (0 if random is None else random + 1)
            write_json(place / "environment.json", {"network": {"parameters": size, "class": "GenotypeNetwork"}})
    complete = [each for each in trials if each["state"] == "COMPLETE" and each["values"]]
    best = max(complete, key=lambda each: each["values"][0], default=None)
    network = {"genotype": genotype, "random": None, "channels": 16, "cells": 4}
    content = {
        "name": "control",
        "storage": "sqlite:////tmp/study.db",
        "monitors": [monitor],
        "directions": ["maximize"],
        "search": {
            "sampler": {"class_path": "optuna.samplers.GridSampler"},
            "run": {
                "model": {
                    "init_args": {
                        "model": {"class_path": "lightning_automl.models.GenotypeNetwork", "init_args": network}
                    }
                },
                "trainer": {"max_epochs": 3},
            },
        },
        "space": space
        or {
            "random": {"choice": list(values), "path": RANDOM},
            "seed_everything": {"choice": list(range(seeds))},
        },
        "best": [] if best is None else [best["number"]],
        "importances": {},
        "totals": {},
        "trials": trials,
    }
    write_json(directory / "study.json", content | keys)
    write_json(directory / "summary.json", {"command": "search", "status": "finished", "seconds": 99.0})
    return directory


def spied(monkeypatch):
    """A list to which every genotype is added of which a drawing is made."""
    from lightning_automl.plots import genotype

    made, drawing = [], genotype.genotype_figure
    monkeypatch.setattr(genotype, "genotype_figure", lambda each: (made.append(each), drawing(each))[1])
    return made
