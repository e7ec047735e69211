"""Cost of a detector: parameters and FLOPs against a count by hand, latency, no lasting changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn, ssdlite320_mobilenet_v3_large

from drkd.evaluation import measure_cost


class OneConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.seen = []

    def forward(self, images):
        self.seen.append(images[0].clone())
        return self.convolution(images[0][None])


def test_counts_by_hand_and_times_every_repeat():
    model = OneConvolution().eval()
    cost = measure_cost(model, (8, 10), repeats=5, warmup=2)
    assert cost.parameters == 4 * 3 * 9 + 4
    assert cost.flops == 2 * (8 * 10) * 4 * (3 * 9)
    assert len(model.seen) == 1 + 2 + 5
    assert model.seen[0].shape == (3, 8, 10)
    assert torch.equal(model.seen[0], model.seen[-1])
    assert 0 < cost.latency_p10_ms <= cost.latency_ms <= cost.latency_p90_ms
    assert json.loads(json.dumps(cost.as_json()))["image_size"] == [8, 10]
    assert cost.device == "cpu"


def test_input_is_the_same_every_time():
    model = OneConvolution().eval()
    measure_cost(model, (4, 4), repeats=1, warmup=0)
    torch.manual_seed(5)
    measure_cost(model, (4, 4), repeats=1, warmup=0)
    assert torch.equal(model.seen[0], model.seen[-1])


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    cost = measure_cost(OneConvolution().eval(), (4, 4), repeats=1, threads=2)
    assert cost.threads == 2
    assert torch.get_num_threads() == before


def test_a_torchvision_detector_is_measured_at_the_size_asked_for():
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).eval()
    before = (model.transform.min_size, model.transform.max_size)
    small = measure_cost(model, (64, 96), repeats=1, warmup=0)
    large = measure_cost(model, (128, 192), repeats=1, warmup=0)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.1)
    assert (model.transform.min_size, model.transform.max_size) == before


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        measure_cost(OneConvolution(), (4, 4))
    with pytest.raises(ValueError, match="repeats >= 1"):
        measure_cost(OneConvolution().eval(), (4, 4), repeats=0)


def test_a_detector_of_one_size_is_measured_at_it():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    model.transform.fixed_size = (320, 256)  # torchvision's order: width, height
    costs = [measure_cost(model, size, repeats=1, warmup=0) for size in ((200, 320), (640, 640))]
    assert costs[0].flops == costs[1].flops
    assert {cost.image_size for cost in costs} == {(256, 320)}


class Attention(nn.Module):
    """Learned queries look at the pixels: written with torch's fused function, or as two products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.queries = nn.Parameter(torch.rand(1, 1, 5, 3))
        self.project = nn.Linear(3, 3)

    def forward(self, images):
        pixels = images[0].flatten(1).T[None, None]
        queries = self.project(self.queries)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(queries, pixels, pixels)
        return (queries @ pixels.transpose(-1, -2) / 3**0.5).softmax(dim=-1) @ pixels


def test_fused_attention_counts_and_parameters_may_be_handed_to_layers():
    fast = torch.backends.mha.get_fastpath_enabled()
    costs = [measure_cost(Attention(fused).eval(), (8, 8), repeats=1, warmup=0).flops for fused in (True, False)]
    assert costs == [2 * 5 * 3 * 3 + 2 * 2 * 5 * 64 * 3] * 2
    model = Attention(True).eval()
    measure_cost(model, (8, 8), repeats=1, warmup=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_whole_encoder_layers_count():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, images):
            return self.layer(images[0].new_ones(1, 6, 4))

    # In-projection, output projection and the two of the feed-forward part; the products of queries, keys and values.
    products = 6 * 4 * 12 + 6 * 4 * 4 + 2 * 6 * 4 * 8 + 2 * 6 * 6 * 4
    assert measure_cost(Encoder().eval(), (4, 4), repeats=1, warmup=0).flops == 2 * products
