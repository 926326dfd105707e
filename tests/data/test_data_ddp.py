import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_automl.data import DigitsDataModule


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks under gloo, started as torchrun starts them, saw in data_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "data",
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("data_ranks.py")
        with (folder / f"log{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, script, folder], env={**os.environ, **environment}, stdout=log, stderr=log
                )
            )
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "".join((folder / f"log{rank}.txt").read_text() for rank in range(2))
    assert codes == [0, 0], logs
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_ranks_validate_every_image_once(ranks):
    data = DigitsDataModule()
    expected = torch.from_numpy(data.pixels[data.split_rows["val"]]).flatten(1).float() / 255
    assert len(expected) % 2 == 1  # the last batches are of unequal size
    seen = torch.cat([rank["whole"]["seen"] for rank in ranks])
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, expected.numpy()))
    assert [rank["whole"]["total"] for rank in ranks] == [len(expected)] * 2


def test_a_rank_without_images_takes_part_in_validation(ranks):
    assert [len(rank["one image"]["seen"]) for rank in ranks] == [1, 0]
    assert [rank["one image"]["total"] for rank in ranks] == [1, 1]


def test_two_ranks_train_on_equal_shares(ranks):
    images = len(DigitsDataModule().split_rows["train"])
    sizes = [rank["whole"]["train_sizes"] for rank in ranks]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 2 * 7
    assert sum(sizes[0]) == 2 * (images // 2)


def test_two_ranks_resume_bit_for_bit(ranks):
    for rank in ranks:
        assert len(rank["resumed"]["train_sizes"]) == 14 - 9
        assert torch.equal(rank["resumed"]["weights"], rank["whole"]["weights"])
    assert torch.equal(ranks[0]["whole"]["weights"], ranks[1]["whole"]["weights"])
