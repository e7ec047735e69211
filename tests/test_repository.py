"""What the repository promises as a whole: one version, commands that exist, docstrings, no catch-all modules."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import drkd

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "drkd").rglob("*.py"))


def _source_files() -> list[Path]:
    """Every file that belongs to the project: tracked by git, or all outside ignored folders in a source archive."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    folders = ("src", "tests", "recipes", "docs")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert citation["version"] == drkd.__version__
    assert newest is not None
    assert newest.group(1) == drkd.__version__


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["doi"] == "10.24963/ijcai.2023/142"
    assert [author["family-names"] for author in paper["authors"]] == ["Ni", "Yang", "Wen", "Zhang"]


@pytest.mark.parametrize("target", ["demo", "quick", "test", "check"])
def test_readme_shows_targets_that_the_makefile_has(target: str) -> None:
    assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    dead = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not dead


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_catch_all_modules() -> None:
    caught = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in MODULES if caught & set(path.relative_to(ROOT).with_suffix("").parts)]


def test_no_file_names_a_place_on_one_machine() -> None:
    # Written in pieces, so that this file is not its own finding.
    home = re.compile(r"(?<![\w.])/(?:home|Users|root|work)" + r"/[\w.-]+/")
    found = []
    for path in _source_files():
        if path.suffix in {".png", ".jpg", ".pt", ".onnx", ".npz"}:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in home.finditer(text)]
    assert not found


@pytest.mark.parametrize("path", sorted((ROOT / "src/drkd/losses").glob("*.py")), ids=lambda path: path.name)
def test_losses_need_torch_only(path: Path) -> None:
    foreign = {
        name
        for name in _imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and name.split(".")[0] != "torch"
        and not name.startswith("drkd.losses")
        and not name.startswith("torchvision.ops")
    }
    # `from torchvision import ops` reads as an import of torchvision too.
    assert foreign <= ({"torchvision"} if "torchvision.ops" in _imports(path) else set())


def test_contracts_need_torch_only() -> None:
    roots = {name.split(".")[0] for name in _imports(ROOT / "src/drkd/contracts.py")}
    assert roots - sys.stdlib_module_names <= {"torch"}


def test_importing_drkd_loads_no_torch() -> None:
    code = "import sys, drkd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in drkd.__all__ if name != "__version__"])
def test_public_name_is_importable(name: str) -> None:
    assert getattr(drkd, name).__name__ == name


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        drkd.NoSuchThing


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lets_python_keep_its_bytecode() -> None:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    rule = 'include Makefile\nprobe:\n\t@echo "kept: $${PYTHONDONTWRITEBYTECODE-all}"\n'
    command = ["make", "--no-print-directory", "-f", "-", "probe"]
    found = subprocess.run(command, input=rule, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert found.stdout == "kept: all\n"
