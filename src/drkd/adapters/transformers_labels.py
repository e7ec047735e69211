"""Which output of a transformers detector stands for which class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from drkd.contracts import DrkdError

# COCO's names in the published RT-DETR models are those of Darknet, which are VOC's for the classes that both have.
_OTHER_NAMES = {
    "airplane": "aeroplane",
    "couch": "sofa",
    "motorcycle": "motorbike",
    "tv": "tvmonitor",
}
_UNUSED = re.compile(r"n/?a|label_\d+|no[ _-]?object|__background__|background|", re.IGNORECASE)


def model_labels(id2label: Mapping[int, str]) -> tuple[list[str], list[int]]:
    """Names and labels of all classes of a model, slots without a name ("N/A") left out.

    A model whose names are transformers' placeholders (LABEL_0, ...) keeps them.
    """
    entries = sorted((int(label), str(name)) for label, name in id2label.items())
    named = [(label, name) for label, name in entries if not _UNUSED.fullmatch(name)] or entries
    return [name for _, name in named], [label for label, _ in named]


def find_labels(id2label: Mapping[int, str], class_names: Sequence[str], *, source: str) -> list[int]:
    """The model's label of each class by its name, -1 where the model does not know the class.

    Case, blanks, hyphens and underscores do not count, and neither does whether a COCO class has its old name
    (sofa for couch, aeroplane for airplane, ...). A model without names of its own (LABEL_0, ...) and as many outputs
    as there are classes is taken to have them in this order.

    Raises:
        DrkdError: If the model knows none of the classes.
    """
    names, labels = model_labels(id2label)
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names) and len(names) == len(class_names):
        return labels
    exact = dict(zip(names, labels, strict=True))
    loose = {_key(name): label for name, label in exact.items()}
    found = [exact.get(name, loose.get(_key(name), -1)) for name in class_names]
    if max(found, default=-1) < 0:
        raise DrkdError(
            f"{source}: none of the classes {shorten(class_names)} is among the model's {len(names)} "
            f"({shorten(names)}). Give it a new head (head: new), or use the model's names."
        )
    return found


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _key(name: str) -> str:
    plain = re.sub(r"[\s_-]+", "", name).casefold()
    return _OTHER_NAMES.get(plain, plain)
