"""A comparison on the tiny data set, and the folder of what stands in for cells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

# Let the tests beside this file import what stands in for a cell.
sys.path.insert(0, str(Path(__file__).parent))

RECIPE = {
    "student": {
        "class_path": "drkd.adapters.RetinaNetBuilder",
        "init_args": {"width": 0.25, "fpn_channels": 32, "norm": "frozen", "score_threshold": 0.0},
    },
    "method": {"class_path": "drkd.methods.DRKD", "init_args": {"warmup_steps": 77}},
    "data": {"batch_size": 2, "min_size": 64, "max_size": 96, "workers": 0},
    "training": {
        "steps": 2,
        "validate_every": 0,
        "accelerator": "cpu",
        "log_interval": 1,
        "optimization": {"warmup_steps": 0},
    },
    "output": "run",
}


@pytest.fixture
def comparison_file(tmp_path: Path, tiny_coco: Path, tiny_detector: Path) -> Path:
    """One pair, three methods, two seeds."""
    teacher = {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(tiny_detector)}}
    recipe = {**RECIPE, "teacher": teacher, "data": {**RECIPE["data"], "root": str(tiny_coco)}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "pairs": {"tiny": "recipe.yaml"},
        "methods": {
            "student": "train",
            "hint": "drkd.methods.FeatureHint",
            "drkd": {
                "class_path": "drkd.methods.DRKD",
                "init_args": {"nodes": 4, "states": 8},
                "overrides": {"training.calibration_steps": 2},
            },
        },
        "seeds": [0, 1],
        "output": str(tmp_path / "out"),
        "jobs": 2,
    }
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
