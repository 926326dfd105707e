"""Run as a script, this file is the server that starts searches by forking, so that each costs a second and not ten."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_resume import assert_same, written

EPOCHS = 8
CONFIG = {
    "model": {
        "class_path": "DartsTask",
        "init_args": {
            "model": {
                "class_path": "DartsSpace",
                "init_args": {
                    "channels": 4,
                    "cells": 3,
                    "nodes": 1,
                    "operations": ["none", "skip_connect", "avg_pool_3x3", "sep_conv_3x3"],
                },
            },
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
            "arch_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": EPOCHS}},
        },
    },
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"batch_size": 18, "base_augment": "crop", "arch_fraction": 0.5, "subset": 0.12},
    },
    "trainer": {"max_epochs": EPOCHS},
    "checkpoint_every_n_steps": 1,
    "test_after_fit": False,
}
#: What each case has beside or in the place of that.
CASES = {
    "first_order": {},
    "second_order": {
        "model.init_args.unrolled": True,
        "model.init_args.warmup_epochs": 1,
        "model.init_args.scheduler": {"class_path": "WarmupCosineLR"},
    },
    "gdas": {"model.init_args.model.init_args.relaxation": {"class_path": "GumbelSoftmax"}},
    "two_ranks": {"data.init_args.batch_size": 5, "model.init_args.accumulate": 2},
}
#: At which of the moments below a run is killed, in this order.
KILLS = {"first_order": (0, 1, 2, 1, 2), "second_order": (1, 2), "gdas": (2, 1), "two_ranks": (1, 2)}


def config_of(case):
    config = json.loads(json.dumps(CONFIG))
    for key, value in CASES[case].items():
        place = config
        *path, last = key.split(".")
        for name in path:
            place = place[name]
        place[last] = value
    if case == "two_ranks":
        config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    return config


def start(folder, case, run):
    """Fork what gives the command: one process, or two ranks as torchrun starts them; each is a group of its own."""
    ranks = 2 if case == "two_ranks" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.setpgid(0, 0)
        log = os.open(folder / f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
            os.environ |= dict(zip(names, map(str, (rank, rank, ranks, ranks, 0, port)), strict=True))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "darts"}
            from lightning.fabric.utilities.rank_zero import rank_zero_only

            rank_zero_only.rank = rank  # which it took from the environment when it was imported
        from lightning_automl.__main__ import main

        os._exit(main(["fit", "--config", str(folder / "c.yaml"), "--dir", str(folder / run)]))
    return children


def kill_at_some_moment(folder, case, moments, kill):
    last, table = (folder / "killed" / name for name in ("checkpoints/last.ckpt", "metrics.csv"))
    children = start(folder, case, "killed")

    def wait_for(look):
        before = look()
        while look() == before:
            for child in children:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(0.001)

    if kill == 0:  # before the first checkpoint
        wait_for((folder / "killed/config.yaml").exists)
    elif kill == 1:  # within an epoch, also while it writes a checkpoint
        for _ in range(moments.randint(1, 3)):
            wait_for(lambda: written(last))
        time.sleep(moments.uniform(0, 0.03))
    else:  # the end of an epoch has been reached
        wait_for(lambda: len(table.read_text().splitlines()) if table.exists() else 0)
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
        os.killpg(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def serve(folder):
    import sklearn.datasets  # noqa: F401
    import torch

    import lightning_automl.cli  # noqa: F401

    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1
    moments = random.Random(0)
    for case in CASES:
        home = folder / case
        home.mkdir()
        (home / "c.yaml").write_text(yaml.safe_dump(config_of(case)))
        for kill in KILLS[case]:
            kill_at_some_moment(home, case, moments, kill)
        children = start(home, case, "killed") + start(home, case, "whole")
        assert {os.waitpid(child, 0)[1] for child in children} == {0}, case


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each case a run that was killed now and then, and one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + "".join(path.read_text()[-2000:] for path in folder.rglob("*.log"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_search_ends_as_one_that_was_not(runs, case):
    home = runs / case
    assert (home / "killed.log").read_text().count("going on from") >= len(KILLS[case]) - 1
    killed, whole = (torch.load(home / run / "checkpoints/last.ckpt", weights_only=True) for run in ("killed", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "search"):
        assert_same(killed[part], whole[part])
    assert len(whole["optimizer_states"]) == 2
    records = [json.loads((home / run / "architecture.json").read_text()) for run in ("killed", "whole")]
    epochs = [[(each["epoch"], each["strengths"], each["genotype"]) for each in record["epochs"]] for record in records]
    assert epochs[0] == epochs[1]
    strengths = [strength for _, strength, _ in epochs[1]]
    assert all(strengths[number] != strengths[number + 1] for number in range(2, EPOCHS - 1))
    assert (home / "killed/genotype.json").read_bytes() == (home / "whole/genotype.json").read_bytes()
    assert not list((home / "killed").rglob("*.tmp"))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]))
