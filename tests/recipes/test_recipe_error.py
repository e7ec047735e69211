"""A mistyped key or class of a recipe is answered with the one that was meant, however deep it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drkd.contracts import DrkdError
from drkd.recipes.recipe import load_recipe


def _wrong(**arguments: object) -> str:
    inner = {"class_path": "drkd.methods.PKD", "init_args": arguments}
    return json.dumps({"class_path": "drkd.methods.MismatchedTeacher", "init_args": {"method": inner}})


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--method.pixel_wieght=3", "method: there is no such key as 'pixel_wieght'; did you mean 'pixel_weight'?"),
        ("--method.init_args.decy=x", "method: there is no such key as 'decy'; did you mean 'decay'?"),
        ("--method=drkd.methods.DRDK", "method: drkd.methods has no 'DRDK'; did you mean 'DRKD'?"),
        (
            "--student.init_args.backbon=resnet18",
            "student (of FasterRCNNBuilder): there is no such key as 'backbon'; did you mean 'backbone'?",
        ),
        ("--student.colour=red", "there is no such key as 'colour'; FasterRCNNBuilder takes backbone, width, "),
        (f"--method={_wrong(wieght=3)}", "method: there is no such key as 'wieght'; did you mean 'weight'?"),
        (f"--method={_wrong(techer=3)}", "method: there is no such key as 'techer'; PKD takes weight, "),
        ("--training.optimisation.optimizer=sgd", "did you mean 'training.optimization.optimizer'?"),
    ],
)
def test_what_was_meant_is_named(option: str, answer: str, tmp_path: Path) -> None:
    with pytest.raises(DrkdError) as caught:
        load_recipe(["demo"], [f"--output={tmp_path}", option])
    message = str(caught.value)
    assert answer in message
    assert "\n" not in message and "Parser key" not in message and "Namespace" not in message
    assert message.endswith("?") or not message.count("?")


def test_a_call_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DrkdError):
        load_recipe(["demo"], [f"--output={tmp_path}", "--print_config", "--training.steps=x"])
    assert load_recipe(["demo"], [f"--output={tmp_path}"]).output == tmp_path
