"""What would fail hours later, or hang, is refused when the recipe is read."""

from __future__ import annotations

import pytest

from drkd.contracts import DrkdError
from drkd.recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("strategy=fsdp", "training.strategy: fsdp spreads one model over the devices"),
        ("strategy=deepspeed_stage_2", "training.strategy: deepspeed_stage_2 spreads"),
        ("checkpoint_minutes=0", "training.checkpoint_minutes: expected a positive number or null, got 0"),
        ("checkpoint_every=0", "training.checkpoint_every: expected at least 1, got 0"),
        ("skip_nonfinite=-1", "training.skip_nonfinite: expected at least 0, got -1"),
        ("clip_norm=-2", "training.clip_norm: expected a positive number or null, got -2"),
    ],
)
def test_a_number_or_strategy_that_cannot_work(option: str, message: str) -> None:
    with pytest.raises(DrkdError, match=message):
        load_recipe(["digits/retinanet"], [f"--training.{option}"])


def test_batch_norm_is_synchronised_on_gpus_only() -> None:
    arguments = ["--training.sync_batchnorm=true", "--training.accelerator=cpu"]
    with pytest.raises(DrkdError, match=r"training\.sync_batchnorm"):
        load_recipe(["digits/retinanet"], arguments)
    assert load_recipe(["digits/retinanet"], ["--training.strategy=ddp"]).training.strategy == "ddp"
