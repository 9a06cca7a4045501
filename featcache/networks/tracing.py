"""Run a network once and record what each layer is given and gives.

A `Trace` holds every run of every layer: shapes, which axis of a map holds the channels, and the
floating-point operations. On PyTorch's meta device it needs no weights and computes nothing.

Which axis holds the channels is not visible in a shape: torchvision's Swin computes in
(n, h, w, c). So it is followed from the images through every torch operation.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from featcache.errors import BackboneError, TapError
from featcache.fingerprint import GRAMMAR, Tap
from featcache.system.defaults import torch_defaults

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Call", "LayerRow", "Trace", "Value", "first_argument", "trace"]


@dataclass(frozen=True)
class Value:
    """What a layer was given, or what it gave.

    Attributes
    ----------
    shape : tuple of int or None
        Shape with the batch axis; None if it is no tensor.
    channel_axis : int or None
        Axis of a map (n, c, h, w) or (n, h, w, c), or of tokens (n, t, d) or (n, d, t), that holds
        the channels; None if unknown.
    what : str
        Description: "a tensor", "a tuple of 2", "a dict with the keys out, aux".
    """

    shape: tuple[int, ...] | None
    channel_axis: int | None
    what: str

    def __str__(self) -> str:
        return str(self.shape or self.what)


@dataclass
class Call:
    """One run of one layer during a traced forward pass.

    Attributes
    ----------
    layer : str
        Name of the module.
    module : torch.nn.Module
        The module.
    number : int
        Number of the run of this module, from 1.
    input, output : Value
        Input and output of the run.
    flops : int
        Floating-point operations of matrix products and convolutions, those of its parts included.
    began, ended : int
        Number of torch operations before the run, and until its end.
    source : Call or None
        The run of a layer without parts whose output it was given.
    """

    layer: str
    module: nn.Module
    number: int
    input: Value
    output: Value
    flops: int = 0
    began: int = 0
    ended: int = 0
    source: Call | None = None


@dataclass(frozen=True)
class LayerRow:
    """One run of one layer, as `Trace.layers` lists it.

    Attributes
    ----------
    name : str
        Name in a tap: the layer's name, with ``#K`` where it runs several times; empty for the
        whole network.
    kind : str
        Class of the module.
    output_shape : tuple of int or None
        Shape of its output for one image; None where it gives no tensor, or never runs.
    parameters : int
        Number of its parameters, those of the layers inside it included.
    share : float
        Share of the whole network's floating-point operations in matrix products and
        convolutions, from 0 to 1; those of the layers inside it included.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...] | None
    parameters: int
    share: float


class Trace:
    """What one forward pass of a network did, layer by layer, in the order of starting.

    Made by `trace`.

    Attributes
    ----------
    module : torch.nn.Module
        The network.
    calls : list of Call
        All runs of all layers.
    names : dict of str to str
        For each name of each module the name that `calls` uses.
    uses : dict of str to int
        Number of the torch operation that is the first to take a parameter or buffer, by its name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        first = {id(part): name for name, part in module.named_modules()}
        every = module.named_modules(remove_duplicate=False)
        self.names = {name: first[id(part)] for name, part in every}
        self.calls: list[Call] = []
        self.uses: dict[str, int] = {}

    def runs(self, layer: str) -> list[Call]:
        """Return the runs of the layer of that name.

        Raises
        ------
        TapError
            If there is no layer of that name (near names are given).
        """
        if layer not in self.names:
            known, _, suffix = layer.partition(":")
            if suffix and known in self.names:
                wrong = f"{suffix!r} is not what may follow: {GRAMMAR}"
                raise TapError(f"The layer {known} is there; {wrong}")
            near = difflib.get_close_matches(layer, [name for name in self.names if name], n=4)
            near += [name for name in self.names if name.endswith(f".{layer}")][:4]
            names = f"Near names: {', '.join(dict.fromkeys(near))}"
            known = names if near else f"Some that it has: {self.some_names()}"
            raise TapError(f"The network has no layer {layer!r}. {known}")
        return [call for call in self.calls if call.layer == self.names[layer]]

    def used_at(self, tap: Tap) -> set[str]:
        """Return the names of the parameters, buffers and layers that a tap depends on.

        These are what has been used until then, without the whole network, whose name is empty.
        """
        call = self.runs(tap.layer)[(tap.call or 1) - 1]
        now = call.began if tap.side == "input" else call.ended
        layers = {each.layer for each in self.calls if each.began < now or each.ended <= now}
        return {name for name, first in self.uses.items() if first <= now} | layers - {""}

    def layers(self) -> list[LayerRow]:
        """List the runs of layers in the order in which they start; those that never run come last.

        The share of the cost, for which floating-point operations must have been counted, is the
        same on every machine; a layer's share of the time depends on the machine as well.

        Examples
        --------
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> for row in trace(network, torch.zeros(1, 3, 2, 2)).layers():
        ...     print(row.name, row.kind, row.output_shape, row.parameters)
         Sequential (2,) 50
        0 Conv2d (4, 2, 2) 16
        1 Flatten (16,) 0
        2 Linear (2,) 34
        """
        total = max(self.calls[0].flops, 1)
        several = {call.layer for call in self.calls if call.number > 1}
        rows = [
            LayerRow(
                name=f"{call.layer}#{call.number}" if call.layer in several else call.layer,
                kind=type(call.module).__name__,
                output_shape=call.output.shape[1:] if call.output.shape else None,
                parameters=_count(call.module),
                share=call.flops / total,
            )
            for call in self.calls
        ]
        ran = {id(call.module) for call in self.calls}
        idle = [
            LayerRow(name, type(part).__name__, None, _count(part), 0.0)
            for name, part in self.module.named_modules()
            if id(part) not in ran
        ]
        return rows + idle

    def some_names(self) -> str:
        """Return a few names of layers that run, for messages."""
        ran = list(dict.fromkeys(call.layer for call in self.calls if call.layer))
        top = [name for name in ran if "." not in name] or ran
        return ", ".join(top[-6:]) or "none"


@torch_defaults()
def trace(module: nn.Module, example: Tensor, *, flops: bool = False) -> Trace:
    """Run a network once and record what each layer was given and gave.

    Parameters
    ----------
    module : torch.nn.Module
        Network in evaluation mode. On the meta device nothing is computed and no weights are
        needed.
    example : torch.Tensor
        Normalised images of shape (b, c, h, w).
    flops : bool
        Count the floating-point operations of each layer as well.

    Returns
    -------
    Trace

    Raises
    ------
    BackboneError
        If the network cannot run on that example.
    """
    result = Trace(module)
    counter = None
    if flops:
        # Imported here because it brings Triton along where that is installed: 70 MB.
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
    recorder = _Recorder(result, counter)
    handles = [
        handle
        for part in dict.fromkeys(module.modules())
        for handle in (
            part.register_forward_pre_hook(recorder.before, with_kwargs=True),
            part.register_forward_hook(recorder.after),
        )
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused attention of inference mode is one opaque operation without a count.
        torch.backends.mha.set_fastpath_enabled(False)
        tensors: list[Tensor] = [*module.parameters(), *module.buffers(), example]
        example = example.to(tensors[0].device)
        with torch.no_grad(), counter or nullcontext(), recorder.axes:
            recorder.axes.mark(example, 1)
            module(example)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        size = " x ".join(str(n) for n in example.shape[1:])
        raise BackboneError(
            f"The network {type(module).__name__} cannot run on an image of {size} "
            f"(channels x height x width): {error}. "
            + (
                "Call .float() on it"
                if "type" in str(error)
                else "Another size is chosen with --image-size N"
            )
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    return result


class _Axes(TorchFunctionMode):
    """Follow which axis of each map holds its channels, through every torch operation.

    The mark is an attribute of the tensor object. Where an operation is not understood (a reshape
    to windows), the mark ends.
    """

    _FIRST = frozenset(
        {"conv1d", "conv2d", "conv_transpose2d", "batch_norm", "group_norm", "instance_norm"}
    )
    _LAST = frozenset({"linear", "layer_norm", "rms_norm"})
    _MOVES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
    _SHAPES = frozenset({"reshape", "view", "unflatten", "flatten"})
    _ENDS = frozenset({"matmul", "bmm", "einsum", "__matmul__", "fold"})

    def __init__(self, result: Trace) -> None:
        self.count = 0
        self._uses = result.uses
        self._names: dict[int, list[str]] = {}
        for name, tensor in result.module.state_dict(keep_vars=True).items():
            self._names.setdefault(id(tensor), []).append(name)

    def mark(self, tensor: Tensor, axis: int) -> None:
        """Note that `axis` of `tensor` holds the channels."""
        tensor._featcache_axis = axis  # type: ignore[attr-defined]

    def of(self, tensor: Tensor) -> int | None:
        """Return the channel axis of maps or tokens, or None."""
        return getattr(tensor, "_featcache_axis", None) if tensor.ndim > 2 else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        for value in _flat(args, kwargs):
            for name in self._names.get(id(value), ()):
                self._uses.setdefault(name, self.count)
        result = func(*args, **kwargs)
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor) and out.ndim > 2:
                axis = self._axis(getattr(func, "__name__", ""), out, args, kwargs)
                if axis is not None:
                    self.mark(out, axis)
        return result

    def _axis(
        self, name: str, out: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> int | None:
        if name in self._FIRST:
            return 1
        source = self._source(args, kwargs)
        axis = None if source is None else self.of(source)
        if name in self._LAST and axis is None:
            return out.ndim - 1  # where it is known to be another, these mix positions
        if source is None or axis is None:
            return None
        if name in self._MOVES:
            return self._moved(name, source, axis, args, kwargs)
        if name in self._SHAPES:
            # The axis is still there if it has its size, and as many numbers stand before it.
            before = math.prod(source.shape[:axis])
            same = (k for k in range(1, out.ndim) if math.prod(out.shape[:k]) == before)
            return next((k for k in same if out.shape[k] == source.shape[axis]), None)
        if out.ndim != source.ndim or (name in self._ENDS and out.shape != source.shape):
            return None
        return axis

    def _source(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        maps = [v for v in _flat(args, kwargs) if isinstance(v, Tensor) and v.ndim > 2]
        return next((v for v in maps if self.of(v) is not None), maps[0] if maps else None)

    def _moved(
        self, name: str, source: Tensor, axis: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> int:
        # A probe with sizes 1, 2, 3 ..., moved the same way, shows where each axis goes.
        rest = {key: value for key, value in kwargs.items() if value is not source}
        moved = getattr(torch.empty(tuple(range(1, source.ndim + 1)), device="meta"), name)(
            *args[1:], **rest
        )
        return list(moved.shape).index(axis + 1)


class _Recorder:
    """The hooks of `trace`."""

    def __init__(self, result: Trace, counter: FlopCounterMode | None) -> None:
        self.result = result
        self.counter = counter
        self.axes = _Axes(result)
        self._name = {id(part): name for name, part in result.module.named_modules()}
        self._number: Counter[int] = Counter()
        self._open: list[tuple[Call, int]] = []
        self._made_by: MutableMapping[Tensor, Call] = WeakTensorKeyDictionary()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._number[id(module)] += 1
        first = first_argument(args, kwargs)
        given = self._value(first)
        call = Call(self._name[id(module)], module, self._number[id(module)], given, given)
        call.began = self.axes.count
        call.source = self._made_by.get(first) if isinstance(first, Tensor) else None
        self.result.calls.append(call)
        self._open.append((call, self._flops()))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, before = self._open.pop()
        call.output = self._value(output)
        call.ended = self.axes.count
        call.flops = self._flops() - before
        if isinstance(output, Tensor) and not module._modules:
            self._made_by[output] = call

    def _flops(self) -> int:
        return int(self.counter.get_total_flops()) if self.counter else 0

    def _value(self, value: Any) -> Value:
        if isinstance(value, Tensor):
            return Value(tuple(value.shape), self.axes.of(value), "a tensor")
        return Value(None, None, described(value))


def described(value: Any) -> str:
    """Return what a layer gives that is no tensor: "a tuple of 2", "a dict with the keys out"."""
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module was given: its first argument, positional or not."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments of a call, and the items of those that are lists."""
    for value in (*args, *kwargs.values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
