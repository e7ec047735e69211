"""The shipped recipes are found by name, in a wheel as in a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from drkd.contracts import DrkdError
from drkd.recipes import builtin
from drkd.recipes.builtin import builtin_folder, builtin_recipe, list_builtin, list_comparisons


def test_every_listed_recipe_exists() -> None:
    assert list_builtin()
    assert all(builtin_recipe(name).is_file() for name in list_builtin())


def test_names_are_paths_below_the_folder_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "compare").mkdir()
    for name in ("demo.yaml", "coco/retinanet.yaml", "compare/all.yaml", "README.md"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(builtin, "_IN_WHEEL", tmp_path)
    assert list_builtin() == ["coco/retinanet", "demo"]
    assert list_comparisons() == ["compare/all"]
    assert builtin_recipe("compare/all") == tmp_path / "compare/all.yaml"
    assert builtin_recipe("coco/retinanet") == builtin_recipe("coco/retinanet.yaml") == tmp_path / "coco/retinanet.yaml"


def test_the_wheels_copy_wins_over_whatever_lies_three_folders_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "_IN_WHEEL", tmp_path)
    assert builtin_folder() == tmp_path


def test_unknown_name_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.yaml").write_text("{}")
    monkeypatch.setattr(builtin, "_IN_WHEEL", tmp_path)
    with pytest.raises(DrkdError, match=r"'dmeo'.*demo"):
        builtin_recipe("dmeo")


def test_installation_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_IN_WHEEL", tmp_path / "no")
    monkeypatch.setattr(builtin, "_IN_CHECKOUT", tmp_path / "neither")
    with pytest.raises(DrkdError, match="has no recipes"):
        list_builtin()
