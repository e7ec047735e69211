"""What several processes have to agree on: one teacher to learn from, one student to score, one step to go on from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")


def gather(value: _T) -> list[_T]:
    """What every process says, by rank; with one process, its own alone. Collective.

    Args:
        value: Anything that can be pickled.
    """
    if not _several():
        return [value]
    found = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one; with one process, do nothing. Collective.

    Parameters are equal anyway. The running statistics of batch norms are not: each process takes those of its own
    images, and what is saved is the first one's.
    """
    _send(module.buffers())


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, frozen or not; with one process, do nothing.

    Collective.
    """
    _send((*module.parameters(), *module.buffers()))


def _send(tensors: Iterable[Tensor]) -> None:
    if _several():
        for tensor in tensors:
            # A weight may lie channels last, which not every backend sends.
            sent = tensor.contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
