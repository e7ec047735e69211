"""Names a model of the wrong kind, and says where the right one may be: inside ``torch.compile``'s, or DDP's."""

from __future__ import annotations

# What holds another module as a whole, and where: torch.compile's OptimizedModule, (Distributed)DataParallel.
_INSIDE = ("_orig_mod", "module")


def describe_model(model: object) -> str:
    """The model's type for a message; of one that holds another, with that other's and how to reach it."""
    found = type(model).__name__
    for name in _INSIDE:
        inner = getattr(model, name, None)
        if inner is not None:
            return (
                f"{found}, which holds a {type(inner).__name__}: hand over the plain model, model.{name}, and compile "
                "or distribute what drkd makes of it"
            )
    return found
