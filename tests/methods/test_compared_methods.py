"""Every method that a comparison names says something about a batch, not only parses."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drkd.adapters import RetinaNetBuilder
from drkd.contracts import DetectionBatch
from drkd.engine import Distiller
from drkd.methods import DRKD

ROOT = Path(__file__).parents[2]
FILES = ("benchmarks/comparisons/ablation.yaml", "benchmarks/comparisons/tuning.yaml", "recipes/compare/digits.yaml")


def _make(entry: Any) -> Callable[..., torch.nn.Module]:
    """A factory of what a recipe writes: a class, with arguments that may name classes themselves."""
    path, arguments = (entry, {}) if isinstance(entry, str) else (entry["class_path"], entry.get("init_args", {}))
    module, _, name = path.rpartition(".")
    return partial(getattr(importlib.import_module(module), name), **{key: _made(arguments[key]) for key in arguments})


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _make(value) if "class_path" in value else {key: _made(entry) for key, entry in value.items()}
    return value


def _methods() -> dict[str, Any]:
    found = {}
    for file in FILES:
        for name, entry in yaml.safe_load((ROOT / file).read_text())["methods"].items():
            if entry != "train" and (isinstance(entry, str) or entry.get("class_path")):
                found[f"{Path(file).stem}-{name}"] = entry
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    student, teacher = (RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16) for _ in range(2))
    return student.build(("cat", "dog")), teacher.build(("cat", "dog"))


@pytest.mark.parametrize("name", _methods())
def test_a_compared_method_is_heard(name: str, pair: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    boxes = [torch.tensor([[4.0, 4.0, 60.0, 60.0], [20.0, 8.0, 40.0, 50.0]]), torch.tensor([[2.0, 2.0, 30.0, 40.0]])]
    targets = [{"boxes": box, "labels": torch.arange(len(box))} for box in boxes]
    batch = DetectionBatch.from_lists(list(torch.rand(2, 3, 64, 64)), targets)
    losses = Distiller(*pair, _make(_methods()[name]))(batch)
    terms = {term: value for term, value in losses.items() if term.startswith("kd/")}
    assert terms and all(torch.isfinite(value) for value in terms.values())
    assert any(value > 0 for value in terms.values())


def test_no_row_of_drkd_is_the_default_under_another_name() -> None:
    defaults = {name: entry.default for name, entry in inspect.signature(DRKD).parameters.items()}
    for name, entry in _methods().items():
        if not isinstance(entry, str) and entry["class_path"] == "drkd.methods.DRKD":
            arguments = entry.get("init_args", {})
            assert arguments or entry.get("overrides"), name
            assert [key for key, value in arguments.items() if value == defaults[key]] == [], name
