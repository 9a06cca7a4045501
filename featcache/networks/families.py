"""Families of networks: torchvision, timm, and one's own.

A family knows the names and the preprocessing of its networks without loading weights, builds a
*skeleton* (the network on PyTorch's meta device, which holds no numbers) to find shapes, and loads
the weights when asked to. `featcache.networks.backbone.Backbone` puts the same face on all of them.
A new family is a subclass of `Family`, and one line in `family_of`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import re
import sys
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from featcache.errors import BackboneError, MissingExtra, UnknownBackbone, WeightsError
from featcache.networks.checkpoints import SUFFIXES, PartialReport, WeightsFile, read_checkpoint
from featcache.networks.given import import_callable, own_copy
from featcache.pixels.preprocessing import Preprocessing
from featcache.system.console import is_shown

#: Seed of weights that are drawn at random.
RANDOM_SEED = 0

# The weights that "auto" means where it is not the newest: those that come with the demo.
_DEFAULT_WEIGHTS = {"mobilenet_v2": "IMAGENET1K_V1"}


def backbones() -> list[str]:
    """Return the names of torchvision's classification networks, sorted.

    timm's are listed by ``timm.list_models()``.
    """
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return sorted(names)


def family_of(
    network: str | nn.Module,
    weights: str | Path | None,
    preprocessing: Preprocessing | None = None,
    name: str | None = None,
    **options: Any,
) -> Family:
    """Return the family of a network; arguments as for `Backbone`, options as for `WeightsFile`."""
    if isinstance(network, nn.Module):
        if preprocessing is None:
            raise BackboneError(
                "What a module expects of images must be said: "
                "Backbone(module, preprocessing=Preprocessing(...))"
            )
        name = name or type(network).__name__
        return OwnModule(network, preprocessing, name, "module", weights, **options)
    if name is not None:
        raise BackboneError(f"name= is for a module; {network!r} has a name already")
    if network.startswith("timm/"):
        return Timm(network.removeprefix("timm/"), weights, **options)
    if ":" in network:
        return OwnModule(*import_callable(network), network, "callable", weights, **options)
    return Torchvision(network, weights, **options)


class Family(ABC):
    """One network of a family. Cheap to make; only `load` reads weights.

    Parameters
    ----------
    name : str
        Name of the network in the family.
    weights : str, Path or None
        One of those published, a file, or None to draw them at random.
    published : list of str
        Names of the weights that there are of the network.
    options : bool, str or None
        As for `WeightsFile`.

    Attributes
    ----------
    kind : str
        Name of the family: "torchvision", "timm", "callable" or "module".
    pinned : str or None
        Published name of the weights; None if they come from `file` or are drawn at random.
    file : WeightsFile or None
        A file with the weights.
    random : bool
        True if the weights are drawn at random.
    weights : str
        Published name of the weights, name of the weights file, or "none".
    """

    kind: str

    def __init__(
        self, name: str, weights: str | Path | None, published: list[str], **options: Any
    ) -> None:
        self.name, self.published = name, published
        self.pinned = str(weights) if weights in published else None
        self.file: WeightsFile | None = None
        if weights is not None and self.pinned is None:
            self.file = WeightsFile(self._path(weights), **options)
        self.random = weights is None
        self.weights = self.pinned or (self.file.path.name if self.file else "none")

    def _path(self, weights: str | Path) -> Path:
        """Return the path of a weights file that exists."""
        path = Path(weights).expanduser()
        if path.is_file():
            return path
        if isinstance(weights, Path) or path.suffix in SUFFIXES or len(path.parts) > 1:
            raise WeightsError(f"There is no checkpoint file {path}")
        known = f"{self.name} has the weights {', '.join(self.published) or 'none'}"
        near = difflib.get_close_matches(weights, self.published)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise WeightsError(f"There are no weights {weights!r}: {known}.{hint}")

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Return what the network expects of images."""

    def skeleton(self) -> nn.Module | None:
        """Return the network on the meta device, or None: some compute with their weights."""
        with _Skeleton():
            try:
                return self.build({}).to("meta")
            except (RuntimeError, TypeError, ValueError):
                return None

    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Return the network, and what a weights file left out of it.

        The weights are published (in the library's cache, or downloaded), read from a file, or
        drawn at random.
        """
        if self.pinned is not None:
            return self.load_published(self.pinned), None
        with _seeded():  # what a partial file leaves out is the same in every run
            state = read_checkpoint(self.file.path) if self.file else None
            module = self.build(state)
        return module, self.file.load(module, state) if self.file and state else None

    def load_published(self, pinned: str) -> nn.Module:
        """Return the network with published weights."""
        raise NotImplementedError

    def build(self, state: Mapping[str, Any] | None) -> nn.Module:
        """Return the network.

        `state` will be loaded into it; it is empty for a skeleton, None where its own weights stay.
        """
        raise NotImplementedError


class Torchvision(Family):
    """One of torchvision's classification networks; arguments as for `Backbone`."""

    kind = "torchvision"

    def __init__(self, name: str, weights: str | Path | None, **options: Any) -> None:
        from torchvision.models import get_model_weights

        if name not in backbones():
            listing = "python -c 'import featcache; print(*featcache.backbones())'"
            raise UnknownBackbone(_unknown(name, backbones(), "torchvision", listing))
        entries = get_model_weights(name)
        newest = entries["DEFAULT"].name
        if weights == "DEFAULT":
            raise WeightsError(
                f"DEFAULT means other weights in other versions of torchvision. Those of {name} "
                f"are now {newest}: write --weights {newest}"
            )
        if weights == "auto":
            weights = _DEFAULT_WEIGHTS.get(name, newest)
        super().__init__(name, weights, [entry.name for entry in entries], **options)
        # Weights from elsewhere were mostly trained on images prepared as for torchvision's own.
        self._transforms: Callable[[], Any] = entries[self.pinned or newest].transforms

    def preprocessing(self) -> Preprocessing:
        """Return the weights' own, or that of the newest weights for others."""
        return Preprocessing.from_torchvision(self._transforms())

    def load_published(self, pinned: str) -> nn.Module:
        """Load from torchvision's cache, or download."""
        # The builder knows what goes with its weights (inception's transform_input).
        from torchvision.models import get_model, get_model_weights

        entry = get_model_weights(self.name)[pinned]
        shown = is_shown(None)
        try:
            # The downloader would write to standard output, which is for results.
            with contextlib.redirect_stdout(sys.stderr if shown else io.StringIO()):
                module: nn.Module = get_model(self.name, weights=entry, progress=shown)
        except Exception as error:
            file = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
            remedy = (
                f"The file {file} is damaged: delete it"
                if file.exists()
                else f"They come from {entry.url}. Without a network, put the file into "
                f"{file.parent}, or name one with --weights FILE"
            )
            raise WeightsError(
                f"The weights {pinned} of {self.name} could not be loaded: {error}. {remedy}"
            ) from error
        return module

    def build(self, state: Mapping[str, Any] | None) -> nn.Module:
        """Return the network, with auxiliary heads if `state` has some."""
        from torchvision.models import get_model

        options: dict[str, Any] = {}
        if self.name in ("googlenet", "inception_v3"):
            aux_logits = not state or any(re.search(r"(^|[./])[aA]ux", key) for key in state)
            # Trained networks of these two expect inputs that torchvision rescales inside.
            options = {"aux_logits": aux_logits, "transform_input": not self.random}
            options["init_weights"] = state is None
        if self.name.startswith("vit_"):  # its position embedding has one size
            options = {"image_size": self.preprocessing().output_shape[-1]}
        module: nn.Module = get_model(self.name, weights=None, **options)
        return module


class Timm(Family):
    """One of timm's networks, with or without the tag of its weights in the name."""

    kind = "timm"

    def __init__(self, name: str, weights: str | Path | None, **options: Any) -> None:
        if importlib.util.find_spec("timm") is None:
            raise MissingExtra("timm", "timm", f"The backbone timm/{name}")
        import timm

        name, _, tag = name.partition(".")
        if not timm.is_model(name):
            listing = "python -c 'import timm; print(*timm.list_models())'"
            raise UnknownBackbone(_unknown(name, timm.list_models(), "timm", listing))
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if weights == "auto":
            config: Any = timm.models.get_pretrained_cfg(name)
            if not tag and (config is None or not tags):
                raise WeightsError(
                    f"timm has no weights for {name}. Name a checkpoint with --weights FILE, or "
                    "draw them at random with --weights none"
                )
            weights = tag or config.tag or tags[0]
        super().__init__(name, weights, tags, **options)

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

    def build(self, state: Mapping[str, Any] | None) -> nn.Module:
        """Return timm's network of that name."""
        import timm

        module: nn.Module = timm.create_model(self.name)
        return module

    def load_published(self, pinned: str) -> nn.Module:
        """Load from the hub's cache, or download."""
        import timm
        from huggingface_hub import constants

        create = functools.partial(timm.create_model, self._full_name(), pretrained=True)
        with contextlib.suppress(Exception), _offline():  # from the cache
            return create()
        try:
            if constants.HF_HUB_OFFLINE or not _is_reachable(constants.ENDPOINT):
                raise OSError(f"not in the cache, and {constants.ENDPOINT} cannot be reached.")
            return create()
        except Exception as error:
            raise WeightsError(
                f"timm's weights {self._full_name()} could not be loaded: {error} Without a "
                "network, name a checkpoint with --weights FILE"
            ) from error

    def _full_name(self) -> str:
        return f"{self.name}.{self.pinned}" if self.pinned else self.name


class OwnModule(Family):
    """A network of one's own, in memory: a module, or what a callable returned.

    Parameters
    ----------
    module : torch.nn.Module
        Network with its weights. It is copied: training it further changes no features.
    preprocessing : Preprocessing
        What the network expects of images.
    name : str
        Name in the fingerprint.
    kind : {"module", "callable"}
        Name of the family.
    weights : str, Path or None
        File to load into the module; "auto" or None leave it as it is.
    options : bool, str or None
        As for `WeightsFile`.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        name: str,
        kind: str,
        weights: str | Path | None,
        **options: Any,
    ) -> None:
        self.kind = kind
        super().__init__(
            name, "as given" if weights in ("auto", None) else weights, ["as given"], **options
        )
        self._module = own_copy(module)
        self._preprocessing = preprocessing
        self._report: PartialReport | None = None
        if self.file:
            self._report = self.file.load(self._module, read_checkpoint(self.file.path))

    def preprocessing(self) -> Preprocessing:
        """Return what was given."""
        return self._preprocessing

    def skeleton(self) -> nn.Module | None:
        """Return None: what was given has its weights anyway."""
        return None

    def load(self) -> tuple[nn.Module, PartialReport | None]:
        """Return what was given."""
        return self._module, self._report


class _Skeleton(TorchFunctionMode):
    """Build a network whose parameters have shapes but no numbers.

    Only `torch.empty`, with which layers make their parameters, is sent to the meta device: what
    builders compute with numbers (widths of RegNets, drop rates) needs real ones.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the hub of timm's weights look into its cache alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable(url: str) -> bool:
    """Return whether a server answers, be it with an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Draw from `RANDOM_SEED`, and give the generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        yield


def _unknown(name: str, names: list[str], source: str, listing: str) -> str:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"Near names: {', '.join(near)}" if near else f"{listing} lists them"
    return f"{source} has no classification network {name!r}. {hint}"
