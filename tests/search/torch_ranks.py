"""What the trial server of the tests calls with torch imported before the fork."""

import os

import torch
import torch.distributed

torch.nn.functional.conv2d(torch.ones(8, 8, 64, 64), torch.ones(8, 8, 3, 3))  # harmless in a server with one thread


def convolve(payload, channel):
    """Two threads after the fork: hangs for ever when the server had a pool of threads."""
    convolution = torch.nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.fill_(1.0)
    total = convolution(torch.ones(16, 8, 64, 64))
    total.mean().backward()
    return {
        "value": total.mean().item(),
        "threads": torch.get_num_threads(),
        "tasks": len(os.listdir("/proc/self/task")),
    }


def reduce(payload, channel):
    """Two ranks that agree on a sum."""
    torch.distributed.init_process_group("gloo")
    value = torch.tensor([1.0 + channel.rank])
    torch.distributed.all_reduce(value)
    channel.send({"rank": channel.rank, "sum": value.item()})
    if payload.get("fails") == channel.rank:
        raise ValueError("rank 1 had enough")
    if "fails" in payload:
        torch.distributed.all_reduce(value)
    torch.distributed.destroy_process_group()
    return {"sum": value.item()}
