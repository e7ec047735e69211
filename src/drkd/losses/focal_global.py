"""FGD: foreground and background are distilled apart, under the teacher's attention, together with global relations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, FeatureScale, MapAdapter, check_adapter, check_scale, rescale
from drkd.losses.attention import channel_attention, spatial_attention
from drkd.losses.box_masks import are_outside, in_portions, padded_boxes
from drkd.losses.distance import at_least_float32, full_precision


@torch.no_grad()
def foreground_weights(
    boxes: Sequence[Tensor], feature: Tensor, *, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Weights of a map's positions inside and outside the boxes (the binary and scale masks of FGD, section 3.1).

    A box covers the rows ``floor(y1)`` to ``ceil(y2)`` and the columns ``floor(x1)`` to ``ceil(x2)`` of the map, both
    ends included, as in the released code; each of its positions weighs one over their number (those outside the map
    are counted too), and where boxes overlap the smallest wins. A box outside the image has none, although its last
    row or column, rounded up, would be the map's first. All other positions of an image share the weight 1.

    Args:
        boxes: One (N, 4) tensor an image, xyxy px; may leave the image or have no area.
        feature: (B, C, H, W), for its size, device and dtype.
        image_size: Height and width of the image tensor, px.

    Returns:
        Foreground and background, (B, 1, H, W) each.
    """
    height, width = feature.shape[-2:]
    corners, present = padded_boxes(boxes, like=feature)
    present = present & ~are_outside(corners, image_size)
    scale_x, scale_y = width / image_size[1], height / image_size[0]
    left, right = (corners[..., 0] * scale_x).floor(), (corners[..., 2] * scale_x).ceil()
    top, bottom = (corners[..., 1] * scale_y).floor(), (corners[..., 3] * scale_y).ceil()
    # An inverted box covers nothing; its "area" must only not be zero.
    weight = 1 / ((bottom + 1 - top).clamp_min(1) * (right + 1 - left).clamp_min(1))
    rows = torch.arange(height, device=feature.device, dtype=feature.dtype)
    columns = torch.arange(width, device=feature.device, dtype=feature.dtype)
    inside_y = (rows >= top.unsqueeze(2)) & (rows <= bottom.unsqueeze(2)) & present.unsqueeze(2)
    inside_x = (columns >= left.unsqueeze(2)) & (columns <= right.unsqueeze(2))
    foreground = feature.new_zeros(feature.shape[0], height, width)
    for some_y, some_x, some_weight in in_portions(inside_y, inside_x, weight):
        if some_y.shape[1] > 0:
            inside = some_y.unsqueeze(3) & some_x.unsqueeze(2)
            painted = torch.where(inside, some_weight[..., None, None], 0.0).amax(dim=1)
            foreground = torch.maximum(foreground, painted)
    background = (foreground == 0).to(feature.dtype)
    background = background / background.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    return foreground.unsqueeze(1), background.unsqueeze(1)


class GlobalContext(nn.Module):
    r"""Adds to every position what the whole map says (GCNet, Cao et al., arXiv:1904.11492; FGD, section 3.2).

    .. math:: R(x) = x + W_2\,\mathrm{ReLU}(\mathrm{LN}(W_1 \sum_l \mathrm{softmax}_l(k \cdot x_l) x_l))

    W_1 halves the channels; W_2 starts at zero, so that the unit starts as the identity, as in the released code.

    Args:
        channels: Channels of the map.

    Shape:
        input: (B, C, H, W).
        output: same, at least float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.position = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Linear(channels, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Linear(inner, channels)
        )
        for parameter in self.transform[3].parameters():
            nn.init.zeros_(parameter)

    def forward(self, feature: Tensor) -> Tensor:
        """Add the context."""
        dtype = self.position.weight.dtype
        # Sums over all positions leave half precision's range and digits.
        with full_precision(feature):
            feature = feature.to(dtype)
            share = self.position(feature).flatten(2).softmax(dim=2)
            context = (feature.flatten(2) @ share.transpose(1, 2)).squeeze(2)
            return feature + self.transform(context)[..., None, None]


class FocalGlobalLoss(nn.Module):
    r"""Focal and global distillation of one pyramid level (FGD, Yang et al., CVPR 2022, arXiv:2111.11837, section 3).

    .. math:: \alpha \sum F e + \beta \sum G e + \gamma (|A^C_s - A^C_t| + |A^S_s - A^S_t|)
              + \lambda \|R_s(s) - R_t(t)\|^2, \qquad e = (s - t)^2 A^S_t A^C_t

    each sum divided by the batch. F and G are `foreground_weights`, A the attentions of `spatial_attention` and
    `channel_attention`, R a `GlobalContext` on each side. Reference code: yzd-v/FGD; the arithmetic is its own. Its
    R_t is trained by the loss, and so is ours, but no gradient reaches the teacher's features (there only a teacher
    under no_grad prevents it).

    Deviations: boxes are scaled by the padded image, whose map it is (there by the unpadded one, which shifts them in
    padded images); the part of a box left of or above the map is cut off (there a negative index wraps around).

    The default weights are the authors' for RetinaNet; for Faster R-CNN they give 5e-5, 2.5e-5, 5e-5 and 5e-7.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        foreground_weight: alpha.
        background_weight: beta.
        attention_weight: gamma.
        relation_weight: lambda; 0 leaves the two global contexts out.
        temperature: Of the attentions, units of the feature, > 0.
        scale: ``none``, the authors', or ``teacher_rms``, a deviation: both maps are divided by the root mean square of
            the teacher's first, see `rescale`. The temperature is absolute; where the features are many times larger,
            the attentions are nearly one-hot, and next to no place has a gradient.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal; not with
            the ``adapter_init`` ``none``.
        adapter_init: Its start, see `make_adapter`; ``default`` draws a random basis.

    Shape:
        student, teacher: see `MapAdapter`.
        boxes: one (N, 4) an image, xyxy px.
        image_size: height and width of the image tensor, px.
        output: 0-d, at least float32.

    Raises:
        ValueError: If an argument is out of range or the shapes do not fit.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
        scale: FeatureScale = "none",
        always_adapt: bool = False,
        adapter_init: AdapterInit = "default",
    ) -> None:
        super().__init__()
        weights = (foreground_weight, background_weight, attention_weight, relation_weight)
        if min(weights) < 0 or temperature <= 0:
            raise ValueError(f"Expected weights of at least 0 and a temperature above 0, got {weights}, {temperature}")
        check_scale(scale)
        check_adapter(adapter_init, always=always_adapt)
        self.align = MapAdapter(student_channels, teacher_channels, always=always_adapt, init=adapter_init)
        self.student_context = GlobalContext(teacher_channels) if relation_weight > 0 else None
        self.teacher_context = GlobalContext(teacher_channels) if relation_weight > 0 else None
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.attention_weight = attention_weight
        self.relation_weight = relation_weight
        self.temperature = temperature
        self.scale: FeatureScale = scale

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> Tensor:
        """The authors' weighted sum."""
        parts = self.parts(student, teacher, boxes, image_size=image_size)
        weights = (self.foreground_weight, self.background_weight, self.attention_weight, self.relation_weight)
        return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum()

    def parts(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Foreground, background, attention and relation, each before its weight."""
        student, teacher = self.align(*rescale(student, teacher, scale=self.scale))
        with full_precision(student):
            foreground, background = foreground_weights(boxes, teacher, image_size=image_size)
            where, which = (
                (attention(student, temperature=self.temperature), attention(teacher, temperature=self.temperature))
                for attention in (spatial_attention, channel_attention)
            )
            error = (student - teacher).square() * where[1] * which[1]
            attended = (where[0] - where[1]).abs().sum() + (which[0] - which[1]).abs().sum()
            sums = (error * foreground).sum(), (error * background).sum(), attended, self._relation(student, teacher)
            focal, rest, attention, relation = (part / student.shape[0] for part in sums)
        return focal, rest, attention, relation

    def _relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.student_context is None or self.teacher_context is None:
            return student.new_zeros(())
        difference = self.student_context(student) - self.teacher_context(teacher)
        return at_least_float32(difference).square().sum()
