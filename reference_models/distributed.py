"""Processes that share out every batch, as torchrun starts them; alone, all of this does nothing."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def join(device: str) -> None:
    """Joins the processes that torchrun started, if it did.

    Raises:
        ValueError: several processes for one GPU.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    if device != "cpu":
        raise ValueError(f"batches are shared out on a CPU, not on {device}: one process is enough there")
    dist.init_process_group("gloo")


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def part(count: int) -> int:
    """This process's part of a batch.

    Raises:
        ValueError: it cannot be shared out evenly.
    """
    size = dist.get_world_size() if _joined() else 1
    if count % size:
        raise ValueError(f"a batch of {count} cannot be shared out evenly among {size} processes")
    return count // size


def wait() -> None:
    """Until all are here."""
    if _joined():
        dist.barrier()


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes the mean over the processes."""
    if not _joined():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
