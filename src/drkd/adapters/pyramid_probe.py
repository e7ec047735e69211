"""Find the levels that named layers of a model give, by one forward pass that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drkd.adapters.layer_outputs import (
    LayerName,
    LayerRecorder,
    describe_candidates,
    entry_of,
    is_map,
    tensors_in,
    trace_layers,
)
from drkd.contracts import BoxTargets, DetectionBatch, DrkdError, FeatureLevel, FeatureMap, Size

_IMAGES = 2
_SLACK = 1.5


@dataclass(frozen=True)
class LevelSource:
    """A level and the layer's output that it is."""

    layer: LayerName
    level: FeatureLevel


def find_levels(
    model: nn.Module, names: Sequence[LayerName], run: Callable[[DetectionBatch], object], batch: DetectionBatch
) -> tuple[LevelSource, ...]:
    """Run the model once and read strides and channels off what the layers return, finest level first.

    Args:
        model: The model; see `undisturbed`.
        names: Layers, or entries of what they return.
        run: Runs the model on a batch, wholly.
        batch: See `probe_batch`.

    Raises:
        DrkdError: If a layer does not exist, is not called once, returns no maps, or is overwritten afterwards.
    """
    with LayerRecorder(model, list(dict.fromkeys(name.module for name in names))) as recorder:
        try:
            run(batch)
        except DrkdError:
            raise
        except Exception as error:
            raise DrkdError(
                f"The first forward pass of {type(model).__name__}, on a batch {tuple(batch.images.shape)}, failed: "
                f"{type(error).__name__}: {error}. It runs in eval mode, through `features`, `detections` or "
                "`losses`, whichever is given first; does image_size suit the model?"
            ) from error

    def candidates() -> str:
        return list_candidates(model, run, batch)

    check_calls(recorder, candidates)
    for changed in recorder.changed_in_place:
        raise DrkdError(
            f"layers: what {changed!r} returns is overwritten by a layer that follows (in place?), so it would be "
            f"one map where the pass goes on and another where it stops there. Name that next layer. {candidates()}"
        )
    found = {}
    for name in names:
        for layer, tensor in _maps(recorder, name):
            if not is_map(tensor, len(batch), batch.image_size):
                raise DrkdError(
                    f"layers: {layer} returns {tuple(tensor.shape)} for a batch {tuple(batch.images.shape)}; expected "
                    f"a map (B, C, h, w) of much the same stride both ways, coarser than the image. {candidates()}"
                )
            found[layer] = tensor
        if not any(known.module == name.module for known in found):
            raise DrkdError(f"layers: {name} returns no map (B, C, h, w). {candidates()}")
    strides = {layer: _stride(tensor, batch.image_size) for layer, tensor in found.items()}
    exponents = [math.log2(stride) for stride in strides.values()]
    plain = len(set(exponents)) == len(exponents) and all(exponent.is_integer() for exponent in exponents)
    levels = [
        LevelSource(
            layer, FeatureLevel(f"p{int(math.log2(stride))}" if plain else str(layer), found[layer].shape[1], stride)
        )
        for layer, stride in strides.items()
    ]
    return tuple(sorted(levels, key=lambda source: source.level.stride))


def take_levels(
    recorder: LayerRecorder,
    sources: Sequence[LevelSource],
    batch: DetectionBatch,
    *,
    candidates: Callable[[], str],
    trains: bool,
) -> tuple[FeatureMap, ...]:
    """The pyramid, from what the layers returned for a batch.

    Args:
        recorder: What they returned.
        sources: The levels.
        batch: What the model was run on.
        candidates: See `list_candidates`.
        trains: Whether gradients are to reach the model. Else maps of inference mode, which no gradient can pass by,
            are copied, so that a method can train what it puts on them.

    Raises:
        DrkdError: If a layer was not called once, its map is not as large as its stride says, or the model trains and
            ran in inference mode.
    """
    check_calls(recorder, candidates)
    height, width = batch.image_size
    maps = []
    for source in sources:
        try:
            tensor = entry_of(recorder.outputs[source.layer.module][0], source.layer.keys)
        except KeyError as error:
            raise DrkdError(f"layers: {source.layer} returned nothing in this pass; no entry {error}.") from error
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            if trains:
                raise DrkdError(
                    f"layers: {source.layer} ran in torch.inference_mode(), so no gradient can reach it. Expected "
                    "functions and a model that leave gradients on, for a student; a teacher needs none."
                )
            tensor = tensor.clone()
        level = source.level
        rows, columns = tensor.shape[-2:]
        expected = height / level.stride, width / level.stride
        if tensor.shape[0] != len(batch) or max(abs(rows - expected[0]), abs(columns - expected[1])) > _SLACK:
            raise DrkdError(
                f"layers: {source.layer} has stride {level.stride:g} and should return about ({len(batch)}, "
                f"{level.channels}, {expected[0]:.0f}, {expected[1]:.0f}) for a batch {tuple(batch.images.shape)}, got "
                f"{tuple(tensor.shape)}. Does the model resize, cut or pad its images? Then features and boxes share "
                "no frame: pass it `batch.images` as they are."
            )
        maps.append(FeatureMap(level.name, tensor, height / rows, width / columns))
    return tuple(maps)


def check_calls(recorder: LayerRecorder, candidates: Callable[[], str]) -> None:
    """Each layer must have been called exactly once.

    Raises:
        DrkdError: If one was not; the message lists the candidates.
    """
    for name, outputs in recorder.outputs.items():
        if not outputs:
            raise DrkdError(
                f"layers: {name!r} is not called in a forward pass (or only one of its methods is, which no hook "
                f"sees), so it gives no features. {candidates()}"
            )
        if len(outputs) > 1:
            raise DrkdError(
                f"layers: {name!r} is called {len(outputs)} times in a forward pass (a head that all levels share?), "
                f"so what it returns is not one pyramid. {candidates()}"
            )


def list_candidates(model: nn.Module, run: Callable[[DetectionBatch], object], batch: DetectionBatch) -> str:
    """A sentence that names the layers that could be the pyramid."""
    traced = trace_layers(model, lambda: run(batch))
    return describe_candidates(traced, len(batch), batch.image_size)


def probe_batch(model: nn.Module, image_size: Size, *, images: int = _IMAGES, label: int = 0) -> DetectionBatch:
    """Images of noise with one box each, on the model's device and in its precision."""
    reference = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    height, width = image_size
    noise = torch.rand(images, 3, height, width, generator=generator)
    box = torch.tensor([[width * 0.2, height * 0.2, width * 0.7, height * 0.7]])
    target = BoxTargets(box, torch.tensor([label]), torch.tensor([False]))
    batch = DetectionBatch(
        noise.to(reference.dtype), (image_size,) * images, (image_size,) * images, (target,) * images, (0,) * images
    )
    return batch.to(reference.device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; modes, buffers and random states are put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({buffer.device.index or 0 for buffer in model.parameters() if buffer.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _maps(recorder: LayerRecorder, name: LayerName) -> Iterator[tuple[LayerName, Tensor]]:
    """The tensors that a name stands for: the one that its keys lead to, or all that are maps in what they lead to."""
    output = recorder.outputs[name.module][0]
    try:
        entry = entry_of(output, name.keys)
    except KeyError as error:
        raise DrkdError(
            f"layers: {name.module!r} returns no entry {error} (asked for as {name}); it returns "
            f"{', '.join(tensors_in(output)) if isinstance(output, Mapping | list | tuple) else 'one tensor'}."
        ) from error
    if isinstance(entry, Tensor):
        yield name, entry
        return
    for suffix, tensor in tensors_in(entry).items():
        if tensor.ndim == 4:
            yield LayerName(name.module, (*name.keys, *LayerName.parse(f"x{suffix}").keys)), tensor


def _stride(tensor: Tensor, image_size: Size) -> float:
    """Pixels a cell; the power of two that the map was rounded from where there is one."""
    strides = [side / cells for side, cells in zip(image_size, tensor.shape[2:], strict=True)]
    mean = math.sqrt(strides[0] * strides[1])
    power = 2.0 ** round(math.log2(mean))
    fits = all(abs(side / power - cells) < 1 for side, cells in zip(image_size, tensor.shape[2:], strict=True))
    return power if fits else mean
