"""A user's function by its import path, from the working folder too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drkd.contracts import DrkdError


def import_function(path: str, *, field: str) -> Callable[..., Any]:
    """Import ``my_package.module:function`` (the last dot will do for the colon).

    A module beside which the command is run is found as well: the installed ``drkd`` does not look there by itself.

    Args:
        path: The import path.
        field: What to call it in messages.

    Raises:
        DrkdError: If there is no such module or function, or the module fails to import.
    """
    module_name, mark, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not mark or not module_name or not name:
        raise DrkdError(f"{field}: expected an import path such as 'my_module:function', got {path!r}.")
    module = _import(module_name, field=field, path=path)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DrkdError(f"{field}: {module_name} has no function {name!r}; it has {', '.join(names[:10]) or 'none'}.")
    return found


def _import(module_name: str, *, field: str, path: str) -> Any:
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        # Last, so that nothing of the user's hides an installed package.
        sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise DrkdError(
                f"{field}: there is no module {error.name!r} (asked for as {path!r}), neither installed nor in the "
                f"folder {folder}."
            ) from error
        raise DrkdError(f"{field}: {module_name} needs {error.name!r}, which is not installed.") from error
    except Exception as error:
        raise DrkdError(f"{field}: {module_name} fails to import: {type(error).__name__}: {error}.") from error
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
