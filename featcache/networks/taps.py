"""Taps: where in a network features are read, and how maps and tokens become vectors.

A tap is written ``LAYER[#K][:input|:output][:mean|:max|:flatten|:map|:cls|:patches]``.

- ``LAYER`` is a module's name as `torch.nn.Module.named_modules` gives it. The empty name, as in
  ``:output``, is the whole network.
- ``#K`` chooses the K-th run (from 1) of a module that runs several times in one forward pass.
- The side is ``output`` unless ``input`` is written; the input is the module's first tensor.
- The reduction decides what is kept of one image:

  =========== ================= ===================== ==========================================
  reduction   of a vector (d,)  of a map (c, h, w)    of tokens (n, d) or channels (d, n)
  =========== ================= ===================== ==========================================
  ``flatten`` (d,)              (c * h * w,)          (n * d,)
  ``mean``                      (c,)                  (d,), over all tokens
  ``max``                       (c,)                  (d,), over all tokens
  ``map``                       as the layer gives it (n, d)
  ``cls``                                             (d,), the class token
  ``patches``                                         (d,), mean of all but the class and
                                                      register tokens
  =========== ================= ===================== ==========================================

  Left out: a vector or a 1 x 1 map is flattened, a larger map averaged, of tokens the class token
  is taken, or the mean where there is none.

The *canonical* form states everything: ``avgpool`` of a ResNet is ``avgpool:output:flatten``. It
names the dataset in a store and enters the fingerprint, so two spellings of one tap are one tap.

Which axis of a map or of tokens holds the channels is found by
`featcache.networks.tracing.trace`; ``map`` and ``flatten`` keep a layer's own layout.

Examples
--------
>>> str(Tap.parse("layer4:mean"))
'layer4:mean'
>>> Tap.parse("layer1.0.relu#3:output:mean").call
3
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featcache.errors import TapError
from featcache.fingerprint import Side, Tap
from featcache.networks.tracing import Call, Trace, Value, described, first_argument

__all__ = ["ResolvedTap", "StopForward", "Tap", "Tapped", "resolve"]

_POOLING = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_NO_TOKENS = "not tokens. Use :mean, :max, :flatten or :map"
_CONVOLUTION = nn.modules.conv._ConvNd
_NORMALISATION = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ResolvedTap:
    """A tap in canonical form, with all that is needed to read it.

    Attributes
    ----------
    tap : Tap
        Canonical: nothing left out but ``#1`` of a layer that runs once.
    shape : tuple of int
        Shape of the features of one image.
    channel_axis : int or None
        Axis of the channels of maps, counted with the batch axis.
    prefix_tokens : int
        Number of class and register tokens before the others.
    """

    tap: Tap
    shape: tuple[int, ...]
    channel_axis: int | None = None
    prefix_tokens: int = 0

    def __str__(self) -> str:
        return str(self.tap)

    def reduce(self, value: Tensor) -> Tensor:
        """Reduce what the layer gives to features.

        Parameters
        ----------
        value : torch.Tensor
            Output or input of the layer, shape (b, ...).

        Returns
        -------
        torch.Tensor
            Features, shape (b, *shape). A view of `value` for ``flatten``, ``map`` and ``cls``.
            Means are taken in float32 when `value` is in half precision.
        """
        how = self.tap.reduce
        if how == "flatten":
            return value.flatten(1)  # (b, ...) -> (b, d)
        if how == "map":
            return value
        if how == "cls":
            return value[:, 0]  # (b, n, d) -> (b, d)
        if how == "patches":
            return _mean(value[:, self.prefix_tokens :], (1,))  # (b, n, d) -> (b, d)
        kept = value.ndim - 1 if self.channel_axis is None else self.channel_axis
        axes = tuple(axis for axis in range(1, value.ndim) if axis != kept)
        # (b, c, h, w) or (b, h, w, c) -> (b, c); (b, n, d) -> (b, d)
        return value.amax(axes) if how == "max" else _mean(value, axes)


def _mean(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    return value.mean(axes, dtype=dtype)


class _Resolver:
    """Brings taps to their canonical form, by what a trace knows of the layers."""

    def __init__(self, traced: Trace) -> None:
        self.module = traced.module
        self.calls = traced.calls
        self.trace = traced

    def default(self) -> Tap:
        """Return the tap used when none is named; the rule is in `resolve`."""
        if callable(getattr(self.module, "get_classifier", None)):
            return self._default_of_classifier()
        convolution, head = self._last(_CONVOLUTION), self._last(_CONVOLUTION, nn.Linear)
        if head < 0:
            raise TapError(
                "The network runs no convolution and no Linear, so there is no default tap. "
                f"Name a layer: {self.trace.some_names()}"
            )
        if self._last(*_NORMALISATION) > head:
            return Tap("", side="output")
        between = self.calls[convolution + 1 : head]
        if pools := [call for call in between if isinstance(call.module, _POOLING)]:
            return self._tap(pools[-1], "output")
        return self._tap(self.calls[head], "input")

    def _last(self, *kinds: type[nn.Module]) -> int:
        """Return the position of the last run of a layer of these kinds, or -1."""
        found = [i for i, call in enumerate(self.calls) if isinstance(call.module, kinds)]
        return max(found, default=-1)

    def _default_of_classifier(self) -> Tap:
        classifier = self.module.get_classifier()  # type: ignore[operator]
        if not isinstance(classifier, nn.Module):
            raise TapError(
                f"The network has several heads ({described(classifier)}), so there is no default "
                f"tap. Name a layer: {self.trace.some_names()}"
            )
        calls = [call for call in self.calls if call.module is classifier]
        if not calls:
            return Tap("", side="output")
        return self._tap(calls[-1], "input")

    def _tap(self, call: Call, side: Side) -> Tap:
        several = len(self.trace.runs(call.layer)) > 1
        return Tap(call.layer, call.number if several else None, side)

    def resolve(self, tap: Tap) -> ResolvedTap:
        """Return a tap in its canonical form."""
        call = self._run_of(tap)
        side: Side = tap.side or "output"
        tap = replace(self._tap(call, side), reduce=tap.reduce)
        value = call.input if side == "input" else call.output
        shape = self._checked_shape(tap, call, value)
        if len(shape) == 2:
            return self._of_vector(tap, shape)
        if len(shape) == 3:
            return self._of_tokens(tap, shape, value.channel_axis)
        if len(shape) == 4:
            return self._of_map(tap, shape, value.channel_axis)
        return self._of_other(tap, shape)

    def _run_of(self, tap: Tap) -> Call:
        calls = self.trace.runs(tap.layer)
        if not calls:
            raise TapError(
                f"The layer {tap.layer!r} never runs when the network computes features, so it "
                f"cannot be tapped. Layers that run: {self.trace.some_names()}"
            )
        if tap.call is not None:
            if tap.call > len(calls):
                raise TapError(
                    f"{str(tap)!r}: the layer {tap.layer!r} runs {len(calls)} times, there is no "
                    f"run {tap.call}"
                )
            return calls[tap.call - 1]
        if len(calls) > 1:
            runs = "; ".join(f"{tap.layer}#{c.number} {c.input} -> {c.output}" for c in calls)
            raise TapError(
                f"The layer {tap.layer!r} runs {len(calls)} times in one forward pass. "
                f"Choose a run: {runs}"
            )
        return calls[0]

    def _checked_shape(self, tap: Tap, call: Call, value: Value) -> tuple[int, ...]:
        batch = self.calls[0].input.shape
        if value.shape is None:
            wrong = f"is {value.what}, not a tensor, and cannot be stored"
        elif len(value.shape) < 2 or batch is None or value.shape[0] != batch[0]:
            wrong = f"has the shape {value}: its first axis is not the images of the batch"
        else:
            return value.shape
        raise TapError(f"{str(tap)!r} {wrong}. {self._instead(call)}")

    def _instead(self, call: Call) -> str:
        """Name layers inside and after `call` that give a tensor with one row per image."""
        prefix = f"{call.layer}." if call.layer else ""
        images = (self.calls[0].input.shape or (0,))[0]
        later = self.calls[self.calls.index(call) + 1 :]
        good = [c.layer for c in later if c.output.shape and c.output.shape[0] == images]
        inside = [name for name in good if name.startswith(prefix)]
        near = list(dict.fromkeys((inside or good)[:3]))
        return f"Tap a layer inside it or after it, for example {', '.join(near)}" if near else ""

    def _of_vector(self, tap: Tap, shape: tuple[int, ...]) -> ResolvedTap:
        if tap.reduce not in (None, "flatten"):
            raise _refused(
                tap,
                f"is a vector of {shape[1]} numbers and needs no reduction. "
                f"Write {replace(tap, reduce=None)}",
            )
        return _resolved(replace(tap, reduce="flatten"), shape)

    def _of_map(self, tap: Tap, shape: tuple[int, ...], known_axis: int | None) -> ResolvedTap:
        how = tap.reduce
        if how in ("cls", "patches"):
            raise _refused(tap, f"is a map of shape {shape[1:]}, {_NO_TOKENS}")
        axis = known_axis if known_axis is not None else _guess_channel_axis(shape)
        if axis is None:
            return self._of_other(tap, shape)
        pixels = math.prod(shape[1:]) // shape[axis]
        if pixels == 1 and how in (None, "mean", "max"):
            how = "flatten"
        return _resolved(replace(tap, reduce=how or "mean"), shape, axis)

    def _of_tokens(self, tap: Tap, shape: tuple[int, ...], axis: int | None) -> ResolvedTap:
        if axis is None:
            return self._of_other(tap, shape)
        if axis == 1 and tap.reduce in ("cls", "patches"):
            of = f"{shape[1]} channels of {shape[2]} positions"
            raise _refused(tap, f"is {of}, {_NO_TOKENS}")
        prefix = self._prefix_tokens(shape[1]) if axis == 2 else 0
        how = tap.reduce or ("cls" if prefix else "mean")
        if how == "cls" and not prefix:
            instead = replace(tap, reduce="mean")
            raise _refused(tap, f"is {shape[1]} tokens that hold no class token. Write {instead}")
        if how == "patches" and not prefix:
            how = "mean"
        return _resolved(replace(tap, reduce=how), shape, axis, prefix_tokens=prefix)

    def _of_other(self, tap: Tap, shape: tuple[int, ...]) -> ResolvedTap:
        if tap.reduce not in ("flatten", "map"):
            raise _refused(
                tap,
                f"has the shape {shape[1:]} per image, and which axis holds the channels "
                f"cannot be told. Write {replace(tap, reduce='flatten')} or "
                f"{replace(tap, reduce='map')}",
            )
        return _resolved(tap, shape)

    def _prefix_tokens(self, tokens: int) -> int:
        """Return how many of the tokens at a layer are class and register tokens.

        The network says how many it puts in front; whether they are there yet (they are not after
        the patch embedding) shows in the number of tokens, which is else that of some map's pixels.
        """
        prefix = _declared_prefix_tokens(self.module)
        grids = {
            math.prod(value.shape[1:]) // value.shape[value.channel_axis]
            for call in self.calls
            for value in (call.input, call.output)
            if value.shape and len(value.shape) == 4 and value.channel_axis is not None
        }
        without = tokens in grids and tokens - prefix not in grids
        return 0 if without or tokens <= prefix else prefix


def _refused(tap: Tap, why: str) -> TapError:
    return TapError(f"{str(tap)!r}: the {tap.side} of {tap.layer!r} {why}")


def _resolved(
    tap: Tap, shape: tuple[int, ...], channel_axis: int | None = None, prefix_tokens: int = 0
) -> ResolvedTap:
    """Return a canonical tap of what a layer gives, `shape`, with the shape of its features."""
    resolved = ResolvedTap(tap, shape[1:], channel_axis, prefix_tokens)
    features = resolved.reduce(torch.empty(shape, device="meta"))
    return replace(resolved, shape=tuple(features.shape[1:]))


def resolve(traced: Trace, texts: Iterable[str] | None) -> list[ResolvedTap]:
    """Bring taps to their canonical form.

    Where none is named, the default tap is taken. The head is the last executed `Linear` if it runs
    after the last convolution, else the last convolution. If an `AvgPool2d`, `AdaptiveAvgPool2d` or
    `AdaptiveMaxPool2d` runs after the last convolution and before the head, the default tap is the
    last such layer's output, otherwise the head's input. A network that can name its own classifier
    (timm's ``get_classifier``) gives that classifier's input. When a normalisation layer runs after
    the layer that would be the head, the network has no head, and the tap is its output.

    Parameters
    ----------
    traced : Trace
        Trace of the network.
    texts : iterable of str or None
        Taps as written; None or nothing for the default tap.

    Returns
    -------
    list of ResolvedTap
        Taps for `Tapped`, in the order given; ``str(tap)`` is the canonical form. Two spellings of
        one tap give one.

    Raises
    ------
    TapError
        For an unknown layer, one that never runs, one that runs several times without ``#K``, one
        that gives no tensor, or a reduction that does not fit its shape; without `texts`, if the
        network has several classifiers, or neither a convolution nor a `Linear`.

    Examples
    --------
    >>> from featcache.networks.tracing import trace
    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> traced = trace(network.eval(), torch.zeros(1, 3, 8, 8))
    >>> for tap in resolve(traced, ["0", "1:max"]) + resolve(traced, None):
    ...     print(tap, tap.shape)
    0:output:mean (4,)
    1:output:max (4,)
    3:input:flatten (144,)
    """
    resolver = _Resolver(traced)
    taps = [Tap.parse(text) for text in texts or ()] or [resolver.default()]
    return list({str(tap): tap for tap in map(resolver.resolve, taps)}.values())


class StopForward(Exception):
    """Raised by the hook that reads the last tap, to skip the rest of the network."""


class Tapped:
    """A network with hooks at its taps, which stops as soon as the last of them has been read.

    Use it as a context manager: the hooks are registered on entering and removed on leaving.
    Called outside one, it registers them for that call only.

    Hooks registered before `torch.compile` are compiled in, later ones never fire; so compile
    `capture`, inside the context. Gradients are the caller's business: wrap calls in
    `torch.inference_mode` to extract features.

    Parameters
    ----------
    module : torch.nn.Module
        Network in evaluation mode; only hooks are added to it.
    taps : sequence of ResolvedTap
        Taps from `resolve`, for this network or one with the same layers.

    Examples
    --------
    >>> from featcache.networks.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).eval()
    >>> batch = torch.zeros(5, 3, 8, 8)
    >>> with Tapped(net, resolve(trace(net, batch), ["0:output:mean"])) as tapped:
    ...     features = tapped(batch)
    >>> {name: tuple(array.shape) for name, array in features.items()}
    {'0:output:mean': (5, 4)}
    """

    def __init__(self, module: nn.Module, taps: Sequence[ResolvedTap]) -> None:
        self.module = module
        self.taps = tuple(taps)
        self._handles: list[Any] = []
        self._captured: dict[str, Tensor] = {}
        self._runs: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Tapped:
        if self._handles:
            raise RuntimeError("this Tapped has been entered already")
        points: dict[tuple[str, str], list[ResolvedTap]] = {}
        for tap in self.taps:
            points.setdefault((tap.tap.layer, tap.tap.side or "output"), []).append(tap)
        for (layer, side), taps in points.items():
            part, hook = self.module.get_submodule(layer), self._hook(layer, side, taps)
            self._handles.append(
                part.register_forward_pre_hook(hook, with_kwargs=True)
                if side == "input"
                else part.register_forward_hook(hook)
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the features of a batch; see `capture`."""
        if self._handles:
            return self.capture(batch)
        with self:
            return self.capture(batch)

    def capture(self, batch: Tensor) -> dict[str, Tensor]:
        """Run the network up to the last tap. Needs the hooks: call it inside the context.

        Parameters
        ----------
        batch : torch.Tensor
            Normalised images of shape (b, c, h, w).

        Returns
        -------
        dict of str to torch.Tensor
            Tensor of shape (b, *shape) for each tap in its canonical form.

        Raises
        ------
        TapError
            If a layer did not run this time, or gave another number of rows than there are images.
        """
        self._captured = {}
        self._runs = Counter()
        try:  # noqa: SIM105 (what torch.compile traces)
            self.module(batch)
        except StopForward:
            pass
        captured, self._captured = self._captured, {}
        if len(captured) != len(self.taps):
            missing = [str(tap) for tap in self.taps if str(tap) not in captured]
            raise TapError(f"Not every tap was reached in this forward pass: {', '.join(missing)}")
        for name, features in captured.items():
            if features.shape[0] != batch.shape[0]:
                raise TapError(
                    f"{name!r} gave {features.shape[0]} rows for {batch.shape[0]} images, so rows "
                    "cannot be matched to images. Tap another layer"
                )
        return {str(tap): captured[str(tap)] for tap in self.taps}

    def _hook(
        self, layer: str, side: str, taps: Sequence[ResolvedTap]
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Return a hook before a layer, which gets its keywords, or after it, with its output."""

        # A forward hook would be too late for the input: ReLU(inplace=True) has clipped it by then.
        def hook(module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
            value = first_argument(args, last) if side == "input" else last
            self._read(layer, side, taps, value)

        return hook

    def _read(self, layer: str, side: str, taps: Sequence[ResolvedTap], value: Any) -> None:
        self._runs[layer, side] += 1
        for tap in taps:
            if tap.tap.call in (None, self._runs[layer, side]):
                self._captured[str(tap)] = tap.reduce(value)
        if len(self._captured) == len(self.taps):
            raise StopForward
        # Layers still to come may write into `value`: what is a view of it must be copied now.
        for tap in taps:
            name = str(tap)
            if name in self._captured and tap.tap.reduce in ("flatten", "map", "cls"):
                self._captured[name] = self._captured[name].clone()


def _guess_channel_axis(shape: tuple[int, ...]) -> int | None:
    """Take the two equal sizes for height and width; None when that does not tell."""
    _, a, b, c = shape
    if b == c:
        return 1 if a != b or a == 1 else None
    return 3 if a == b else None


_CLASS_TOKENS = frozenset({"class_token", "cls_token", "class_embedding"})
_OTHER_TOKENS = frozenset({"dist_token", "reg_token", "register_tokens", "storage_tokens"})


def _declared_prefix_tokens(module: nn.Module) -> int:
    """Return how many class and register tokens the network puts before the patch tokens."""
    for part in module.modules():
        declared = getattr(part, "num_prefix_tokens", None)
        if isinstance(declared, int):
            has_class = getattr(part, "has_class_token", declared > 0)
            return declared if has_class else 0
    named = {name.rpartition(".")[2]: p for name, p in module.named_parameters()}
    if not _CLASS_TOKENS & named.keys():
        return 0
    others = (p for name, p in named.items() if name in _OTHER_TOKENS)
    return 1 + sum(p.shape[1] if p.ndim == 3 else 1 for p in others)
