"""What several processes have to agree on before they score one student together."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one; with one process, do nothing. Collective.

    Parameters are equal anyway. The running statistics of batch norms are not: each process takes those of its own
    images, and what is saved is the first one's.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
