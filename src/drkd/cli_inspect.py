"""``drkd inspect``: its options, and the table that it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from rich.console import Console

    from drkd.recipes.inspection import Inspected, LayerRow


def inspect_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd inspect``."""
    parser = ArgumentParser(description=description, **settings)
    parser.add_argument(
        "model",
        type=str,
        metavar="MODEL",
        help="A recipe (its student and its teacher), a student.pt or run folder, or the import path 'module:function' "
        "of what returns a torch module.",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="Height and width of the image, px; multiples of the coarsest stride.",
    )
    parser.add_argument(
        "--depth", type=int, default=3, help="List layers down to so many parts of a dotted name; 0 lists all."
    )
    parser.add_argument(
        "--forward",
        type=str | None,
        default=None,
        metavar="MODULE:FUNCTION",
        help="Function of (model, batch) that runs the model; by default it is called with the images.",
    )
    for name, text in (
        ("json", "Print JSON instead of tables."),
        ("trust_code", "Call the functions that a checkpoint with a detector of your own names."),
    ):
        parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)
    return parser


def run_inspect(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Look at the model and print what was found."""
    from drkd.recipes.inspection import inspect_model

    del parser
    height, width = config.size
    found = inspect_model(
        config.model,
        size=(height, width),
        depth=config.depth,
        forward=config.forward,
        trust_code=config.trust_code,
    )
    if config.json:
        console.print(json.dumps([entry.as_json() for entry in found], indent=2))
        return 0
    for number, entry in enumerate(found):
        if number:
            console.print()
        _print_model(entry, console)
    return 0


def _print_model(found: Inspected, console: Console) -> None:
    height, width = found.image_size
    console.print(
        f"{found.title}: {found.kind}, {found.parameters / 1e6:.2f} M parameters, {found.flops / 1e9:.2f} G FLOPs (a "
        f"multiply-add is two) on one image of {height} x {width} px\n"
    )
    rows = [("", "layer", "type", "stride", "channels", "output", "parameters", "FLOPs")]
    for row in found.layers:
        size = f"{row.size[0]} x {row.size[1]}"
        mark = "*" if row.pyramid else ""
        rows.append((mark, row.name, row.kind, f"{row.stride:g}", str(row.channels), size, *_cost(row)))
    widths = [max(len(cells[index]) for cells in rows) for index in range(len(rows[0]))]
    for cells in rows:
        left = (cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True))
        right = (cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True))
        console.print("  ".join([*left, *right]).rstrip())
    if found.hidden:
        console.print(f"{found.hidden} deeper layers are left out; --depth 0 lists all.")
    marked = any(row.pyramid for row in found.layers)
    console.print("* in the pyramid" if marked else "No layer is marked: drkd does not know this model's pyramid.")
    console.print(f"\n{found.note}\n\n{found.yaml}")


def _cost(row: LayerRow) -> tuple[str, str]:
    """Parameters and operations; a layer of several maps has them in its first row only."""
    if row.parameters is None or row.flops is None:
        return "", ""
    return f"{row.parameters:,}", f"{row.flops / 1e9:.3f} G"
