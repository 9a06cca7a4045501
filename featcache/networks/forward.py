"""Run a network: device, precision, memory format, batch size.

On a CPU four things decide how fast a network runs (measured with ResNet-50 on 224 x 224 images,
two cores with AVX-512), and all of them are done here:

- The system's allocator gives the pages of every large tensor back to the kernel and faults them in
  again, a million times a batch. `featcache.system.memory.reuse_memory` stops that; it doubles the
  speed.
- Convolutions run faster on maps whose channels lie side by side (channels_last).
- Batch normalisations are folded into convolutions; see `featcache.networks.faster`.
- bfloat16 and float16 convert the network itself. ``torch.autocast`` converts weights again and
  again, and stays a fallback for networks that mix types.

Each of them may change the last bits of a feature. `Settings` holds every such choice. None is made
by a clock, so two runs on one machine make the same; extraction records the settings, and a resumed
run or another machine repeats them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import joblib
import numpy as np
import torch
from torch import Tensor

from featcache.errors import BackboneError, DeviceError
from featcache.networks.backbone import Backbone, one_at_a_time, shared_property
from featcache.networks.faster import faster_copy, find_speed_ups, products_pay
from featcache.networks.taps import Tapped
from featcache.system.console import check_stopped, is_stopped
from featcache.system.defaults import torch_defaults
from featcache.system.memory import glibc

__all__ = ["PRECISIONS", "Pending", "Runtime", "Settings", "default_threads", "select_device"]

_Compute: TypeAlias = Callable[[Tensor], dict[str, Tensor]]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Images a forward pass, by the kind of device alone.
_DEFAULT_BATCH = {"cpu": 8, "cuda": 128, "mps": 64}
# From so many batches on it pays to find out whether an image may change its place in a batch.
_LONG_RUN = 64
_SPEED_UPS = ("folded", "packed_products")
# Relative differences that rounding explains (1e-6, 1e-2, 1e-3 are usual), and no mistake does.
_SAME = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}


def select_device(name: str = "auto") -> torch.device:
    """Return the device of that name.

    Parameters
    ----------
    name : str
        ``"auto"`` (the first CUDA device, else Apple's GPU, else the CPU), ``"cpu"``, ``"cuda"``,
        ``"cuda:1"`` or ``"mps"``.

    Raises
    ------
    DeviceError
        If it is not the name of a device, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in _DEFAULT_BATCH:
        raise DeviceError(f"{name!r} is no device. Type one of: auto, cpu, cuda, cuda:1, mps")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            has = f"has {count} CUDA devices" if count else "has no CUDA device"
            raise DeviceError(f"--device {name}: this machine {has} that torch can use")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: this machine has no Apple GPU that torch can use")
    return torch.device(device.type)


def _float32_products() -> tuple[Any, ...]:
    """Return the kinds of float32 products that torch may round, each with its `fp32_precision`.

    The older switches (``allow_tf32``, ``set_float32_matmul_precision``) raise where a program has
    used the newer ones; these can be read and set after either.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    convolutions = cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.rnn
    return torch.backends.cuda.matmul, mkldnn.matmul, *convolutions


def _own_precision(kind: Any) -> str:
    """Return what was set for a kind itself; "none" is what it takes over from all kinds."""
    found: str = kind.fp32_precision
    if getattr(kind, "backend", "") == "cuda":
        return found  # they have a default of their own, which "none" would not bring back
    kind.fp32_precision = "none"
    return "none" if kind.fp32_precision == found else found


def default_threads() -> int:
    """Return the number of threads of a forward pass on a CPU.

    That is torch's own number, as the user started the process. An engine may set
    ``OMP_NUM_THREADS=1`` for its workers in the process that starts them, as Dask does. Where torch
    is imported after that, its number is the engine's, and MobileNetV2's features would have other
    bits; then it is the number of cores.
    """
    threads = torch.get_num_threads()
    now = os.environ.get("OMP_NUM_THREADS")
    if now == _started_with("OMP_NUM_THREADS") or str(threads) != now:
        return threads
    return int(joblib.cpu_count(only_physical_cores=True))


def _started_with(variable: str) -> str | None:
    """Return a variable of the environment as it was when this process began."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:  # not Linux
        return os.environ.get(variable)
    started = dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
    return started.get(variable)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that may change the last bits of a feature on one machine.

    Attributes
    ----------
    device : {"cpu", "cuda", "mps"}
        Kind of device.
    precision : {"float32", "bfloat16", "float16"}
        Type of the forward pass.
    batch_size : int
        Images in one forward pass; shorter batches are padded.
    threads : int
        Threads of a forward pass on a CPU.
    channels_last : bool
        Maps are laid out as (n, h, w, c).
    folded : bool
        Batch normalisations are folded into convolutions.
    packed_products : bool
        oneDNN multiplies the matrices of linear layers.
    autocast : bool
        Types are chosen operation by operation; the network is not converted.
    compiled : bool
        ``torch.compile`` is used.
    fixed_slots : bool
        An image must keep its slot in a batch to give the same bits.
    """

    device: str
    precision: str
    batch_size: int
    threads: int
    channels_last: bool
    folded: bool
    packed_products: bool
    autocast: bool
    compiled: bool
    fixed_slots: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self | None:
        """Return the settings that `to_dict` gave, None where they are of another version."""
        types = {field.name: field.type for field in fields(cls)}
        if {name: type(value).__name__ for name, value in values.items()} != types:
            return None
        return cls(**values)


class Pending:
    """Features that are being computed.

    Parameters
    ----------
    parts : list of dict of str to torch.Tensor
        Features (b, *shape) for each tap, batch by batch, in the memory of the CPU.
    event : torch.cuda.Event, optional
        Event to wait for before the features are read.
    """

    def __init__(self, parts: list[dict[str, Tensor]], event: torch.cuda.Event | None) -> None:
        self._parts = parts
        self._event = event

    def result(self) -> dict[str, np.ndarray]:
        """Wait for the features and return them: an array (k, *shape) for each tap."""
        if self._event is not None:
            self._event.synchronize()
        joined = {tap: [part[tap] for part in self._parts] for tap in self._parts[0]}
        return {
            tap: (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
            for tap, parts in joined.items()
        }


class Runtime:
    """Computes features of batches of pixels.

    Nothing is loaded until `settings` or a call needs it. Use it within `reuse_memory`.

    Parameters
    ----------
    backbone : Backbone
        Network with its taps; its module is not changed.
    device : str
        Name of the device; see `select_device`.
    precision : {"float32", "bfloat16", "float16"}
        Type of the forward pass. The features are float32 in any case.
    batch_size : int, optional
        Images in one forward pass. Left out: 8 on a CPU, 128 with CUDA, 64 on an Apple GPU.
    compile : bool, optional
        Use ``torch.compile``. Left out: as in `settings`, otherwise not.
    settings : Settings, optional
        Settings recorded by an earlier run or on another machine; reused so that results are
        identical. They are ignored if they belong to another kind of device or another precision;
        `batch_size` and `compile` take precedence over them. If this machine cannot run with them,
        `Runtime.settings` differs from them.
    count : int, optional
        Number of images to come. A batch is never larger than that.

    Raises
    ------
    DeviceError
        This machine has no such device.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
        compile: bool | None = None,
        settings: Settings | None = None,
        count: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise DeviceError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
        if batch_size is not None and batch_size < 1:
            raise DeviceError(f"batch_size is at least 1, not {batch_size}")
        self.backbone = backbone
        self.device = select_device(device)
        self._on_cuda = self.device.type == "cuda"
        self.precision = precision
        self._batch_size = batch_size
        self._compile = compile
        self._recorded = settings
        self._count = count
        self._compute: _Compute

    @property
    def asked(self) -> tuple[Any, ...]:
        """What decides how it computes: runtimes of one backbone with the same are alike."""
        batch = self._batch_size or min(_DEFAULT_BATCH[self.device.type], self._count or 1 << 30)
        return self.device, self.precision, batch, self._compile, self._recorded

    @shared_property
    def settings(self) -> Settings:
        """Settings in use. First access loads the network."""
        return self._prepare()

    def __call__(self, pixels: np.ndarray | Tensor) -> dict[str, np.ndarray]:
        """Compute features.

        Parameters
        ----------
        pixels : uint8 array or tensor, shape (k, channels, h, w)
            Cropped images, as the backbone's `Preprocessing` gives them. Any number `k` of them is
            cut into batches, and a short batch is padded with black images.

        Returns
        -------
        dict of str to ndarray of float32, shape (k, ...)
            Features for each tap.
        """
        features = self.submit(pixels).result()
        check_stopped()
        return features

    def submit(self, pixels: np.ndarray | Tensor, *, group: int | None = None) -> Pending:
        """Start to compute features; a GPU goes on while this process does other things.

        Parameters
        ----------
        pixels : uint8 array or tensor, shape (k, channels, h, w)
            Cropped images; see `__call__`.
        group : int, optional
            No batch reaches from one group of so many images into the next.

        Returns
        -------
        Pending
            Its ``result()`` is what a call returns; after a signal, of the first images only.
        """
        batch = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
        parts: list[dict[str, Tensor]] = []
        with self._configured(self.settings):
            start, group = 0, group or len(batch)
            check_stopped()
            while start < len(batch) and not (parts and is_stopped()):
                size = self.settings.batch_size
                end = min(start + size, start - start % group + group)
                try:
                    parts.append(self._forward(batch[start:end]))
                except (RuntimeError, MemoryError) as error:
                    if not _is_out_of_memory(error) or size == 1:
                        raise
                    self._halve()
                    continue
                start = end
        event = None
        if self._on_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
        return Pending(parts, event)

    def _forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Run one batch: pixels (k, c, h, w) to features (k, *shape) for each tap."""
        settings, k = self.settings, len(batch)
        if k < settings.batch_size:
            padding = batch.new_zeros((settings.batch_size - k, *batch.shape[1:]))
            batch = torch.cat([batch, padding])  # (k, c, h, w) -> (b, c, h, w)
        # As bytes they are a quarter of their size as numbers.
        batch = batch.to(self.device, non_blocking=self._on_cuda)
        if settings.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        batch = self.backbone.preprocessing.normalize(batch, self._dtype(settings))
        # CUDA copies into pinned memory, and `Pending` waits for the event. Elsewhere nothing would
        # wait for a copy that does not block.
        return {  # (b, c, h, w) -> (b, *shape) -> (k, *shape)
            tap: value[:k].to("cpu", torch.float32, non_blocking=self._on_cuda, copy=True)
            for tap, value in self._compute(batch).items()
        }

    def _dtype(self, settings: Settings) -> torch.dtype:
        """Return the type of the network and of what goes into it."""
        return torch.float32 if settings.autocast else PRECISIONS[settings.precision]

    @contextlib.contextmanager
    def _configured(self, settings: Settings) -> Iterator[None]:
        """Set what torch keeps for the whole process: threads, and float32 that is float32.

        No gradients are computed, and types are chosen operation by operation where it is asked
        for.
        """
        with one_at_a_time:
            # torch.compile's freezing knows no_grad, not inference_mode.
            mode = torch.no_grad() if settings.compiled else torch.inference_mode()
            dtype, mixed = PRECISIONS[settings.precision], settings.autocast
            threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
            kinds = [(kind, _own_precision(kind)) for kind in _float32_products()]
            flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
            if self.device.type == "cpu" and settings.threads != threads:
                torch.set_num_threads(settings.threads)
            try:
                for kind, _ in kinds:
                    kind.fp32_precision = "ieee"  # no TF32, and no bfloat16 on a CPU
                cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, False, True
                with torch_defaults(), mode, torch.autocast(self.device.type, dtype, enabled=mixed):
                    yield
            finally:
                cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags
                for kind, precision in kinds:
                    kind.fp32_precision = precision
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)

    def _halve(self) -> None:
        self.settings = replace(self.settings, batch_size=max(1, self.settings.batch_size // 2))
        if self._on_cuda:
            torch.cuda.empty_cache()

    # --- choosing -------------------------------------------------------------------------------

    @torch_defaults()
    def _prepare(self) -> Settings:
        """Load the network and choose the settings; the first that work and agree are taken."""
        self._foldable, self._products = find_speed_ups(self.backbone)
        with torch.no_grad():
            self._expected = Tapped(self.backbone.module, self.backbone.points)(self._example())
        failure: Exception | None = None
        for settings in self._attempts(self._wanted()):
            try:
                if not self._is_sound(settings):
                    continue
                tapped = self._tapped_copy(settings)
                matches = self._matches_original(tapped, settings)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                if _is_out_of_memory(error):
                    raise
                failure = error
                continue
            if matches or not any(getattr(settings, name) for name in _SPEED_UPS):
                self._compute = tapped
                chosen = self._finish(settings)
                if library := glibc():
                    library.malloc_trim(0)  # what choosing took need not stay beside the batches
                return chosen
        raise BackboneError(
            f"The network {self.backbone.name} does not run in {self.precision} on "
            f"{self.device}: {failure}. Try --precision float32 or --device cpu"
        ) from failure

    def _wanted(self) -> Settings:
        """Return the recorded settings, else what the device, the network and the user ask for."""
        recorded = self._recorded
        if recorded and (recorded.device, recorded.precision) == (self.device.type, self.precision):
            return replace(
                recorded,
                batch_size=self._batch_size or recorded.batch_size,
                compiled=recorded.compiled if self._compile is None else self._compile,
            )
        cpu = self.device.type == "cpu"
        batch_size = self._batch_size or _DEFAULT_BATCH[self.device.type]
        if self._batch_size is None and self._count is not None:
            batch_size = max(1, min(batch_size, self._count))
        largest = max(self._products.values(), key=math.prod, default=(0, 0, 0))
        return Settings(
            device=self.device.type,
            precision=self.precision,
            batch_size=batch_size,
            threads=default_threads() if cpu else 1,
            channels_last=True,
            folded=bool(self._foldable),
            packed_products=cpu and products_pay(largest, batch_size, PRECISIONS[self.precision]),
            autocast=False,
            compiled=bool(self._compile),
        )

    def _attempts(self, wanted: Settings) -> Iterator[Settings]:
        """Yield the settings to try: all that is wanted, all but one thing, nothing of it."""
        nothing: dict[str, Any] = dict.fromkeys(_SPEED_UPS, False)
        for step in [{}, *({name: False} for name in nothing if getattr(wanted, name)), nothing]:
            settings = replace(wanted, **step)
            yield settings
            if self.precision != "float32" and not wanted.autocast:
                # autocast does not know the operations of packed layers
                yield replace(settings, autocast=True, packed_products=False)

    def _example(self) -> Tensor:
        """Return one normalised image of noise (1, c, h, w), the same every time."""
        pixels = np.random.default_rng(0).integers(
            0, 256, (1, *self.backbone.preprocessing.output_shape), dtype=np.uint8
        )
        return self.backbone.preprocessing.normalize(torch.from_numpy(pixels))

    def _is_sound(self, settings: Settings) -> bool:
        """Check a folded or packed copy in float32, where rounding cannot hide a mistake."""
        exact = replace(settings, precision="float32", autocast=False)
        if exact == settings or not any(getattr(settings, name) for name in _SPEED_UPS):
            return True
        return self._matches_original(self._tapped_copy(exact), exact)

    def _tapped_copy(self, settings: Settings) -> Tapped:
        module = faster_copy(
            self.backbone,
            fold=self._foldable if settings.folded else (),
            pack=self._products if settings.packed_products else (),
            device=self.device,
            dtype=self._dtype(settings),
            channels_last=settings.channels_last,
        )
        return Tapped(module, self.backbone.points)

    def _matches_original(self, compute: _Compute, settings: Settings, images: int = 1) -> bool:
        """Run a copy on one image, or a batch of it, and compare with the original's features."""
        features = self._run(compute, settings, images)
        return all(
            _allclose(features[tap], expected, relative=_SAME[settings.precision])
            for tap, expected in self._expected.items()
        )

    def _finish(self, settings: Settings) -> Settings:
        """Compile where that is wanted, and find out whether the slots of a batch are alike."""
        if settings.compiled:
            settings = self._compiled(settings)
        if settings == self._recorded:
            return settings
        # Keeping every image's slot is always right, and costs a short run nothing.
        long_run = (self._count or 0) >= _LONG_RUN * settings.batch_size
        fixed = not (long_run and self._same_bits_in_every_slot(settings))
        return replace(settings, fixed_slots=fixed)

    def _same_bits_in_every_slot(self, settings: Settings) -> bool:
        """Fill a batch with one image and compare the features of its slots."""
        features = self._run(self._compute, settings, settings.batch_size)
        return all(bool((value == value[:1]).all()) for value in features.values())

    def _run(self, compute: _Compute, settings: Settings, images: int) -> dict[str, Tensor]:
        """Run a network on a batch of one image of noise, (images, c, h, w), as it takes it."""
        batch = self._example().expand(images, -1, -1, -1)
        batch = batch.to(self.device, self._dtype(settings))
        form = torch.channels_last if settings.channels_last else torch.contiguous_format
        with self._configured(settings):
            return compute(batch.contiguous(memory_format=form))

    def _compiled(self, settings: Settings) -> Settings:
        """Compile the network; return the settings without that if it cannot be done here."""
        # The compiler packs by itself, and does not see through layers that are packed already.
        compiled = replace(settings, compiled=True, packed_products=False)
        tapped = self._tapped_copy(compiled)
        tapped.__enter__()  # hooks that come after compiling would never fire
        options: dict[str, Any] = {"freezing": True} if settings.device == "cpu" else {}
        compute = torch.compile(tapped.capture, dynamic=False, options=options)
        # On a machine without CUDA the compiler would say that there is none.
        logger = logging.getLogger("torch.utils.cpp_extension")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            matches = self._matches_original(compute, compiled, compiled.batch_size)
        except Exception:  # no compiler, an operation it does not know: hundreds of reasons
            matches = False
        finally:
            logger.setLevel(level)
        if not matches:
            return replace(settings, compiled=False)
        self._compute = compute
        return compiled


def _allclose(features: Tensor, expected: Tensor, *, relative: float) -> bool:
    """Return whether copies of one image (b, ...) have the features (1, ...), but for rounding."""
    difference = float((features.float().cpu() - expected).norm())
    return difference <= relative * float(expected.norm()) * math.sqrt(len(features))


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text
    )
