"""A leading tilde is the user's home, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from drkd.contracts import DrkdError
from drkd.recipes.home import expand_home


def test_a_tilde_is_the_home_in_texts_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home({"a": ["~/x", "x~/y"], "b": Path("~/z")}) == {
        "a": [f"{tmp_path}/x", "x~/y"],
        "b": tmp_path / "z",
    }


@pytest.mark.parametrize("value", ["~/data", Path("~/data")])
def test_a_user_without_a_home_is_told(value: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(DrkdError, match=r"~/data: the home folder is not known .*\. Set HOME, or write the whole path"):
        expand_home(value)
