"""What a method's adapters start as, beside a head that the student has from its teacher."""

from __future__ import annotations

from torch import nn

from drkd.contracts import KDMethod
from drkd.losses.alignment import starts_at_random
from drkd.recipes.doctor.finding import Finding


def judge_adapters(method: nn.Module | None, *, inherits: bool) -> list[Finding]:
    """Be careful where adapters begin as a random basis and the student with the teacher's neck and head.

    Such a head reads the teacher's features as they are, and a random basis asks the student for others; measured in
    the repository's benchmarks/results/tuning.

    Args:
        method: The method, or what it is made of.
        inherits: Whether the student starts from its teacher's neck and head.
    """
    if method is None or not inherits:
        return []
    parts = [part for part in method.modules() if isinstance(part, KDMethod)]
    names: dict[str, None] = {}
    for part in parts:
        others = [other for other in part.modules() if other in parts and other is not part]
        inner = {module for other in others for module in other.modules()}
        if any(starts_at_random(module) for module in part.modules() if module not in inner):
            names[type(part).__name__] = None
    if not names:
        return []
    text = (
        f"The adapters of {' and '.join(names)} start as a random basis, and the student starts from its teacher's "
        "neck and head, which read the teacher's features as they are. Try `adapter_init: identity` (docs/methods.md)."
    )
    return [Finding("careful", "adapters", text)]
