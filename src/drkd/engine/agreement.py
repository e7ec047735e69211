"""What several processes have to agree on: one teacher to learn from, one student to score."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


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
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            # A weight may lie channels last, which not every backend sends.
            sent = tensor.contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)
