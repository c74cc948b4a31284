"""Several processes that train one network, as `torchrun` starts them, each with its own crops.

On CPUs a process for each core, of one thread, is far faster than one process of many threads: the
layers are too small to be shared out. On GPUs it is one process for each.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer


def join(on_cuda: bool) -> None:
    """Meet the other processes of `torchrun`, if there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if on_cuda else "gloo")


def leave() -> None:
    """Part from the others at the end."""
    if distributed.is_initialized():
        gc.collect()  # what still refers to the group keeps its threads, and they end in an abort
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; the one of number 0 writes files and has the clock."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@torch.no_grad()
def average_gradients(network: nn.Module) -> None:
    """Give every process the mean of all processes' gradients."""
    if not distributed.is_initialized():
        return
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad.copy_(mean.view_as(parameter))


@torch.no_grad()
def copy_of_first(*networks: nn.Module) -> None:
    """Give every process the first one's weights."""
    if distributed.is_initialized():
        for network in networks:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, 0)


def shared_out(kind: type[Optimizer], network: nn.Module, **options: Any) -> Optimizer:
    """An optimiser of a network; of several processes each updates a share of the weights, and
    gives it to the others (Rajbhandari et al. 2020, ZeRO stage 1)."""
    if not distributed.is_initialized():
        return kind(network.parameters(), **options)
    return ZeroRedundancyOptimizer(network.parameters(), kind, **options)


def collect(optimiser: Optimizer) -> None:
    """Give the first process the whole state of an optimiser of `shared_out`."""
    if isinstance(optimiser, ZeroRedundancyOptimizer):
        optimiser.consolidate_state_dict()


def number_of_first(value: float, device: str) -> float:
    """The first process's number, in every process."""
    if not distributed.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.broadcast(tensor, 0)
    return float(tensor)
