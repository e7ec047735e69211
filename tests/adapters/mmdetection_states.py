"""State dicts as MMDetection writes them, and its forward pass written from its definition, without torchvision."""

from __future__ import annotations

import torch
from torch.nn import functional

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def backbone_names(blocks, *, groups=1, base_width=64, base=64, dcn=(), modulated=False):
    """Names and shapes of a bottleneck ResNet or ResNeXt; `dcn` are stages whose 3x3 convolutions are deformable."""
    shapes = {"backbone.conv1.weight": (base, 3, 7, 7), **_norm("backbone.bn1", base)}
    inside = base
    for stage, count in enumerate(blocks):
        planes = base * 2**stage
        width = int(planes * base_width / 64) * groups
        for block in range(count):
            name = f"backbone.layer{stage + 1}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, inside, 1, 1), **_norm(f"{name}.bn1", width)}
            shapes |= {f"{name}.conv2.weight": (width, width // groups, 3, 3), **_norm(f"{name}.bn2", width)}
            if stage + 1 in dcn:
                channels = 27 if modulated else 18
                shapes[f"{name}.conv2.conv_offset.weight"] = (channels, width, 3, 3)
                shapes[f"{name}.conv2.conv_offset.bias"] = (channels,)
            shapes |= {f"{name}.conv3.weight": (4 * planes, width, 1, 1), **_norm(f"{name}.bn3", 4 * planes)}
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * planes, inside, 1, 1)}
                shapes |= _norm(f"{name}.downsample.1", 4 * planes)
            inside = 4 * planes
    return shapes


def _norm(name, width):
    shapes = {f"{name}.{kind}": (width,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def neck_names(inputs, *, channels=256, extra=()):
    """Names and shapes of the pyramid; `extra` are the channels that the convolutions above it take."""
    shapes = {}
    for index, width in enumerate(inputs):
        shapes |= _conv(f"neck.lateral_convs.{index}.conv", channels, width, 1)
        shapes |= _conv(f"neck.fpn_convs.{index}.conv", channels, channels, 3)
    for index, width in enumerate(extra):
        shapes |= _conv(f"neck.fpn_convs.{len(inputs) + index}.conv", channels, width, 3)
    return shapes


def _conv(name, outputs, inputs, size):
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def retinanet_names(classes, *, channels=256):
    """Names and shapes of a RetinaNet head."""
    shapes = {}
    for index in range(4):
        shapes |= _conv(f"bbox_head.cls_convs.{index}.conv", channels, channels, 3)
        shapes |= _conv(f"bbox_head.reg_convs.{index}.conv", channels, channels, 3)
    shapes |= _conv("bbox_head.retina_cls", 9 * classes, channels, 3)
    return shapes | _conv("bbox_head.retina_reg", 36, channels, 3)


def faster_rcnn_names(classes, *, channels=256):
    """Names and shapes of the two heads of a Faster R-CNN."""
    shapes = _conv("rpn_head.rpn_conv", channels, channels, 3)
    shapes |= _conv("rpn_head.rpn_cls", 3, channels, 1)
    shapes |= _conv("rpn_head.rpn_reg", 12, channels, 1)
    for name, size in (
        ("shared_fcs.0", (1024, channels * 49)),
        ("shared_fcs.1", (1024, 1024)),
        ("fc_cls", (classes + 1, 1024)),
        ("fc_reg", (4 * classes, 1024)),
    ):
        shapes |= {f"roi_head.bbox_head.{name}.weight": size, f"roi_head.bbox_head.{name}.bias": size[:1]}
    return shapes


def draw_state(shapes, *, seed=0):
    """Random values that keep the size of what flows through, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {}
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            state[name] = torch.tensor(7)
        elif kind == "running_var":
            state[name] = draw(*shape).square() + 0.5
        elif len(shape) > 1:
            fan = torch.tensor(shape[1:]).prod().item()
            state[name] = draw(*shape) * (1.5 / fan) ** 0.5
        else:
            state[name] = 0.1 * draw(*shape) + (1.0 if kind == "weight" else 0.0)
    return state


def pyramid_features(
    state, images, blocks, *, groups, stages, caffe=False, extra="none", relu_before_extra=False, deform=None
):
    """MMDetection's ResNeXt and FPN on normalised images, by functions alone; maps finest first."""

    def norm(name, x):
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5).sqrt()
        shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def conv(name, x, **options):
        return functional.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    x = norm("backbone.bn1", conv("backbone.conv1", images, stride=2, padding=3)).relu()
    x = functional.max_pool2d(x, 3, stride=2, padding=1)
    found = []
    for stage, count in enumerate(blocks):
        for block in range(count):
            name = f"backbone.layer{stage + 1}.{block}"
            stride = 2 if stage and not block else 1
            first, second = (stride, 1) if caffe else (1, stride)
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride=first)).relu()
            if f"{name}.conv2.conv_offset.weight" in state:
                y = deform(state, f"{name}.conv2", y, second)
            else:
                y = conv(f"{name}.conv2", y, stride=second, padding=1, groups=groups)
            y = norm(f"{name}.bn3", conv(f"{name}.conv3", norm(f"{name}.bn2", y).relu()))
            if not block:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride=stride))
            x = (x + y).relu()
        found.append(x)
    used = [found[stage - 1] for stage in stages]
    laterals = [conv(f"neck.lateral_convs.{index}.conv", entry) for index, entry in enumerate(used)]
    for index in range(len(laterals) - 1, 0, -1):
        size = laterals[index - 1].shape[-2:]
        laterals[index - 1] = laterals[index - 1] + functional.interpolate(laterals[index], size=size, mode="nearest")
    maps = [conv(f"neck.fpn_convs.{index}.conv", entry, padding=1) for index, entry in enumerate(laterals)]
    if extra == "none":
        return [*maps, maps[-1][..., ::2, ::2]]
    current = used[-1] if extra == "input" else maps[-1]
    for step in range(2):
        current = current.relu() if step and relu_before_extra else current
        current = conv(f"neck.fpn_convs.{len(used) + step}.conv", current, stride=2, padding=1)
        maps.append(current)
    return maps
