"""Reads the golden files: inputs from seeds, parameters from seeds, and comparisons at each precision's tolerance."""

import json
from pathlib import Path

import numpy
import pytest
import torch

TOLERANCE = {"float64": 1e-10, "float32": 2e-6}
PRECISIONS = pytest.mark.parametrize("precision", ["float64", "float32"])


class Goldens:
    """One golden file.

    Attributes:
        cases: By name.
    """

    def __init__(self, name):
        content = json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())
        self._parameters = content["param_sets"]
        self.cases = {case["case"]: case for case in content["cases"]}

    def named(self, beginning):
        return [name for name in self.cases if name.startswith(beginning)]

    def parameters(self, case):
        """Names of the original code, and values."""
        for name, shape, seed in self._parameters[case["params"]]:
            constant = isinstance(seed, str)
            yield name, torch.full(shape, float(seed[1:])) if constant else draw(seed, shape, 0.05)


def draw(seed, shape, scale=1.0):
    return torch.from_numpy((numpy.random.RandomState(seed).standard_normal(shape) * scale).astype(numpy.float32))


def inputs(entry, precision):
    entry = {key: value for key, value in entry.items() if key != "edit"}
    return draw(**entry).to(getattr(torch, precision)).requires_grad_()


def load_renamed(module, named, renamed, *, skip=()):
    """Load parameters by the original code's names; every parameter of the module must be among them."""
    state = {}
    for name, value in named:
        owner, _, kind = name.rpartition(".")
        if name not in skip and owner in renamed:
            target = f"{renamed[owner]}.{kind}"
            state[target] = value.reshape(module.state_dict()[target].shape)
    assert set(dict(module.named_parameters())) == set(state)
    module.load_state_dict(state, strict=False)


def close(value, expected, precision):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    value = torch.as_tensor(value).detach().double()
    torch.testing.assert_close(value, expected, rtol=TOLERANCE[precision], atol=1e-12)


def norm(tensors):
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()
