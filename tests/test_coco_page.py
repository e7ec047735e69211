"""The commands of docs/coco.md are what the command line takes, and its tables hold the comparisons' cells."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from drkd import cli
from drkd.recipes.builtin import builtin_recipe
from drkd.recipes.comparison.cell import Cell, make_cells
from drkd.recipes.comparison.definition import load_comparison
from drkd.recipes.comparison.run import select_cells

PAGE = (Path(__file__).parents[1] / "docs" / "coco.md").read_text(encoding="utf-8")
COMPARISONS = ("compare/coco_retinanet", "compare/coco_faster_rcnn")


def _commands() -> list[str]:
    """Those of the code blocks, continued lines joined and comments cut off, and those within the text."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ")
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    lines = [*blocks.splitlines(), *re.findall(r"`([^`\n]+)`", prose)]
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("drkd ")]
    # `drkd compare` as the name of a verb is no command.
    return list(dict.fromkeys(command for command in commands if "-" in command))


COMMANDS = _commands()
# Of those that differ in the cell's name only the first of each comparison is parsed; all names are looked up.
PARSED = list({re.sub(r" --only .*", " --only", command): command for command in reversed(COMMANDS)}.values())
NAMED = [words for words in map(shlex.split, COMMANDS) if "--only" in words]


@cache
def _cells(name: str) -> list[Cell]:
    file = builtin_recipe(name)
    return make_cells(load_comparison(file), source=str(file))


@pytest.mark.parametrize("command", PARSED)
def test_every_command_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    key = next(key for key in cli._VERBS if tuple(words[: len(key)]) == key)
    parser = cli._VERBS[key].parser("", prog="drkd", exit_on_error=False, formatter_class=cli._Help)
    cli._parse(parser, words[len(key) :])


def test_every_named_cell_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {words[3] for words in NAMED} == set(COMPARISONS)
    for words in NAMED:
        assert words[:3] == ["drkd", "compare", "--config"] and words[4] == "--only"
        assert select_cells(_cells(words[3]), words[5:], source=words[3])


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_tables_have_every_cell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = re.findall(rf"^\|.*`drkd compare --config {name} --only (\S+)` \|$", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(cell.name for cell in _cells(name))
    assert not re.search(r"^\|.*\.\.\.", PAGE, flags=re.MULTILINE)


def test_the_papers_numbers_are_there() -> None:
    rows = {
        row.group(2): row.group(1)
        for row in re.finditer(r"^\| [^|]+ \| ([^|]+) \|.*--only (\S+)` \|$", PAGE, flags=re.MULTILINE)
    }
    expected = {"faster_rcnn/student/0": "38.4", "faster_rcnn/paper/0": "41.6"}
    expected |= {"retinanet/student/0": "37.4", "retinanet/paper/0": "40.3"}
    for cell, number in expected.items():
        assert rows[cell].split()[0] == number
        assert number in PAGE.partition("## 1.")[0]


def test_the_files_of_the_teachers_are_spoken_of() -> None:
    assert "DATE-HASH" in PAGE
    assert "--teacher.path=FILE" in PAGE
    assert "--teacher.part=detector --method=drkd.methods.LogitKD" in PAGE
