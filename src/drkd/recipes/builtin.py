"""Where the recipes that ship with drkd lie, in a wheel as in a checkout."""

from __future__ import annotations

from pathlib import Path

from drkd.contracts import DrkdError

# A wheel carries the repository's recipes/ folder beside this file; in a checkout, which is what an editable install
# runs from, that copy does not exist and the folder itself is read.
_IN_WHEEL = Path(__file__).parent / "files"
_IN_CHECKOUT = Path(__file__).parents[3] / "recipes"
_COMPARISONS = "compare/"


def builtin_folder() -> Path:
    """The folder that holds the shipped recipes.

    Raises:
        DrkdError: If this installation carries none.
    """
    for folder in (_IN_WHEEL, _IN_CHECKOUT):
        if folder.is_dir():
            return folder
    raise DrkdError(
        f"This installation of drkd has no recipes: neither {_IN_WHEEL} nor {_IN_CHECKOUT} exists. Install drkd again."
    )


def list_builtin() -> list[str]:
    """Names of the shipped recipes, sorted: paths below the folder without ``.yaml``, as in ``coco/retinanet``."""
    return [name for name in _list_files() if not name.startswith(_COMPARISONS)]


def list_comparisons() -> list[str]:
    """Names of the shipped comparisons of `drkd compare`, sorted, as in ``compare/digits``."""
    return [name for name in _list_files() if name.startswith(_COMPARISONS)]


def _list_files() -> list[str]:
    folder = builtin_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def builtin_recipe(name: str) -> Path:
    """Path of the shipped recipe or comparison of this name, with or without ``.yaml``.

    Raises:
        DrkdError: If there is none; the message lists those there are.
    """
    known = _list_files()
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise DrkdError(f"drkd ships no recipe called {name!r}. It ships: {', '.join(known) or 'none'}.")
    return builtin_folder() / f"{stem}.yaml"
