"""Record what named layers of a model return during one forward pass, and leave nothing behind on the model."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from drkd.contracts import DrkdError, Size

_NAME = re.compile(r"([\w.]+)((?:\[[^\[\]]+\])*)")
_USEFUL_STRIDES = (3.0, 200.0)
_LISTED = 10


@dataclass(frozen=True)
class LayerName:
    """A layer's output, or an entry of it: ``neck``, ``neck[0]``, ``backbone[p3]``.

    Args:
        module: Dotted name of the module, as ``model.named_modules()`` has it.
        keys: Indices or keys into what the module returns; none for all of it.
    """

    module: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.module + "".join(f"[{key}]" for key in self.keys)

    @classmethod
    def parse(cls, text: str) -> LayerName:
        """Read a name.

        Raises:
            DrkdError: If it is none.
        """
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise DrkdError(
                f"layers: expected names such as 'neck', 'neck[0]' or 'backbone.body[p3]', got {text!r}. "
                "`drkd inspect` lists a model's layers."
            )
        return cls(match[1], tuple(re.findall(r"\[([^\[\]]+)\]", match[2])))


class _Enough(BaseException):
    """Stops a forward pass of which nothing more is wanted; no `except Exception` on its way may catch it."""


class LayerRecorder:
    """While entered, keeps what some layers return; hooks are there for that long only.

    Args:
        model: The model.
        modules: Dotted names of its layers.
        stop: End the block as soon as each of them has been called once.

    Attributes:
        outputs: By dotted name, what each call returned.
        versions: By dotted name, what tells whether the first call's tensors have changed since (`changed_in_place`);
            none where the block ends early.

    Raises:
        DrkdError: If the model has no such layer.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], *, stop: bool = False) -> None:
        self.outputs: dict[str, list[Any]] = {name: [] for name in modules}
        self.versions: dict[str, list[int | Tensor]] = {}
        self._modules = {name: find_module(model, name) for name in modules}
        self._stop = stop
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return kind is _Enough

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            self.outputs[name].append(output)
            if not self._stop and name not in self.versions:
                self.versions[name] = [_version(tensor) for tensor in tensors_in(output).values()]
            if self._stop and all(self.outputs.values()):
                raise _Enough

        return keep

    @property
    def changed_in_place(self) -> list[str]:
        """Layers whose output was overwritten after they had returned it."""
        return [
            name
            for name, versions in self.versions.items()
            if any(map(_has_changed, tensors_in(self.outputs[name][0]).values(), versions))
        ]


@dataclass(frozen=True)
class TracedLayer:
    """What a layer did in one forward pass.

    Args:
        name: Dotted name; empty for the model itself.
        kind: Name of its class.
        calls: How often it was called.
        parameters: Number of its weights, those of its children included.
        flops: Floating-point operations of all calls, children included, a multiply-add counted as two.
        tensors: What its first call returned, by index or key in brackets; the key is empty for a bare tensor.
    """

    name: str
    kind: str
    calls: int
    parameters: int
    flops: int
    tensors: Mapping[str, Tensor]

    def maps(self, batch_size: int, image_size: Size) -> dict[str, Tensor]:
        """Those of its tensors that can be levels of a pyramid, by the name that ``layers`` takes."""
        return {
            self.name + suffix: tensor
            for suffix, tensor in self.tensors.items()
            if is_map(tensor, batch_size, image_size)
        }


def trace_layers(model: nn.Module, run: Callable[[], Any]) -> list[TracedLayer]:
    """Call ``run``, which calls the model, and note what each of its layers does, in order of the first return.

    Args:
        model: The model.
        run: Anything that makes the model run; nothing stays on the model afterwards.
    """
    counter = FlopCounterMode(display=False)
    started: dict[str, list[int]] = {}
    flops: dict[str, int] = {}
    calls: dict[str, int] = {}
    first: dict[str, Any] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.setdefault(name, []).append(counter.get_total_flops())

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            calls[name] = calls.get(name, 0) + 1
            flops[name] = flops.get(name, 0) + counter.get_total_flops() - started[name].pop()
            first.setdefault(name, output)

        return note

    modules = dict(model.named_modules())
    try:
        for name, module in modules.items():
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        with _countable(model), counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [
        TracedLayer(
            name,
            type(modules[name]).__name__,
            calls[name],
            sum(parameter.numel() for parameter in modules[name].parameters()),
            flops[name],
            tensors_in(output),
        )
        for name, output in first.items()
    ]


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Let FlopCounterMode count all of a model, which is put back afterwards.

    It fails on parameters that are handed to a layer and want gradients, and knows neither the CPU's fused attention
    nor torch's fast path through whole encoder layers.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in wanted:
            parameter.requires_grad_(True)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The layer of this dotted name.

    Raises:
        DrkdError: If there is none; the message suggests others.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    names = [known for known in modules if known]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or [known for known in names if "." not in known]
    raise DrkdError(
        f"layers: {type(model).__name__} has no layer {name!r}; nearest: {', '.join(close[:_LISTED])}. "
        "`drkd inspect` lists a model's layers."
    )


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Tensors in what a layer returned, by their index or key in brackets, lists and dicts in them included."""
    if isinstance(output, Tensor):
        return {"": output}
    found: dict[str, Tensor] = {}
    for key, entry in _entries(output):
        found.update({f"[{key}]{rest}": tensor for rest, tensor in tensors_in(entry).items()})
    return found


def entry_of(output: Any, keys: Sequence[str]) -> Any:
    """What indices and keys lead to.

    Raises:
        KeyError: If they lead nowhere.
    """
    for key in keys:
        entries = dict(_entries(output))
        if key.startswith("-") and key not in entries and key[1:].isdigit():
            key = str(len(entries) + int(key))
        output = entries[key]
    return output


def is_map(tensor: Tensor, batch_size: int, image_size: Size) -> bool:
    """Whether a tensor can be a level: (B, C, h, w), of a stride that is useful and much the same both ways."""
    if tensor.ndim != 4 or tensor.shape[0] != batch_size or not tensor.is_floating_point():
        return False
    strides = [side / cells for side, cells in zip(image_size, tensor.shape[2:], strict=True)]
    least, most = _USEFUL_STRIDES
    return all(least <= stride <= most for stride in strides) and abs(math.log2(strides[0] / strides[1])) < 0.5


def describe_candidates(traced: Sequence[TracedLayer], batch_size: int, image_size: Size) -> str:
    """The layers that could be a pyramid, for a message: those that return several maps first, then the outermost."""
    found: list[tuple[int, int, int, str]] = []
    for place, layer in enumerate(traced):
        maps = layer.maps(batch_size, image_size)
        if layer.calls != 1 or not maps or not layer.name:
            continue
        strides = {round(image_size[0] / tensor.shape[2], 1) for tensor in maps.values()}
        channels = {tensor.shape[1] for tensor in maps.values()}
        text = f"{layer.name} (stride {_numbers(strides)}, {_numbers(channels)} channels)"
        found.append((-min(len(strides), 2), layer.name.count("."), place, text))
    chosen = [text for *_, text in sorted(found)[:_LISTED]]
    more = f", and {len(found) - _LISTED} more, which `drkd inspect` lists" if len(found) > _LISTED else ""
    return f"Candidates: {', '.join(chosen)}{more}." if chosen else "No layer of this model returns maps (B, C, h, w)."


def _entries(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), entry) for key, entry in output.items())
    elif isinstance(output, list | tuple):
        yield from ((str(index), entry) for index, entry in enumerate(output))


def _numbers(values: set[float] | set[int]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def _version(tensor: Tensor) -> int | Tensor:
    """The tensor's version, or a copy of it: tensors of inference mode count no versions."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _has_changed(tensor: Tensor, version: int | Tensor) -> bool:
    if isinstance(version, Tensor):
        return not bool(((tensor == version) | version.isnan()).all())
    return tensor._version != version
