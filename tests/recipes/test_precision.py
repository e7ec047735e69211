"""What "auto" means for the precision of a run."""

from __future__ import annotations

import pytest

from drkd.recipes.precision import choose_precision
from drkd.recipes.recipe import Training, load_recipe


@pytest.mark.parametrize(
    ("settings", "gpu", "bf16", "expected"),
    [
        ({}, True, True, "bf16-mixed"),
        ({}, True, False, "32-true"),
        ({}, False, False, "32-true"),
        ({"accelerator": "cpu"}, True, True, "32-true"),
        ({"accelerator": "gpu"}, True, True, "bf16-mixed"),
        ({"precision": "16-mixed"}, True, True, "16-mixed"),
        ({"precision": "32-true"}, True, True, "32-true"),
    ],
)
def test_half_precision_where_the_gpu_computes_it(
    settings: dict[str, str], gpu: bool, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    assert choose_precision(Training(epochs=1, **settings)) == expected


@pytest.mark.parametrize("name", ["digits/retinanet", "digits/faster_rcnn", "coco/retinanet_r50"])
def test_recipes_of_committed_or_published_results_keep_float32(name: str) -> None:
    """Or a cell that is measured on a GPU could not stand beside one of a CPU; who names none gets "auto"."""
    assert load_recipe([name]).training.precision == "32-true"
    assert Training(epochs=1).precision == "auto"
