"""The head ``suffix``: the network's own last layers, trained on features at an earlier layer.

The settings are given, nothing is searched; what the folds are for is an accuracy and a
temperature that can be compared with those of the other heads. So with k folds there are k + 1
trainings: one on each fold's training part, whose scores of the fold's other part are the
out-of-fold scores, and one on all rows, which is kept. Each sets its own inner validation part
aside (unless told not to), and stops by that: no image decides when to stop a training that it is
then used to judge. To save time, use fewer folds, or a store with a validation split, which is one.

Measured with MobileNetV2 on the demo, two cores (``python tests/benchmarks/recipes.py``): an epoch
of the last stage costs 0.96 s from the cache and 19.5 s inside the network. Trained from
``features.14`` on four views, the rest of the network had 0.869 [0.842, 0.895] of the held-out
images right and a linear head 0.857 [0.829, 0.884]: +0.012 [-0.011, +0.037], no certain gain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn

from featcache.errors import TapError, TrainingError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.cutting import check, cut, suggest, taps_before
from featcache.finetuning.head import SuffixStep
from featcache.finetuning.settings import SuffixSettings
from featcache.finetuning.training import Finetuned, Maps, finetune, scores_of
from featcache.heads.rows import TrainingRows
from featcache.heads.search import HeadKind, Params, Search, gather
from featcache.heads.steps import Step
from featcache.networks import identity
from featcache.networks.forward import select_device
from featcache.networks.tracing import Trace, trace
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.system.defaults import torch_defaults
from featcache.version import __version__

if TYPE_CHECKING:
    from featcache.networks.backbone import Backbone

__all__ = ["SUFFIX", "SuffixHead", "choose_tap"]

SUFFIX = "suffix"


@dataclass(frozen=True, kw_only=True)
class SuffixHead(HeadKind):
    """The rest of a network, on the maps of one store. Made by `of`.

    Attributes
    ----------
    maps : Maps
        Features at the cut.
    network : torch.nn.Module
        The whole network.
    image_shape : tuple of int
        (c, h, w) of the images.
    settings : SuffixSettings
        How to train.
    groups : ndarray of str, shape (n,), or None
        Groups that the inner validation part does not cut.
    checkpoints : Path or None
        Folder of the checkpoints.
    """

    maps: Maps
    network: nn.Module
    image_shape: tuple[int, int, int]
    settings: SuffixSettings
    groups: np.ndarray | None = None
    checkpoints: Path | None = None
    name: ClassVar[str] = SUFFIX
    out_of_core: ClassVar[bool] = True

    @classmethod
    @torch_defaults()
    def of(
        cls,
        store: FeatureStore,
        *,
        layers: Sequence[str],
        settings: SuffixSettings,
        backbone: Backbone | None = None,
        **more: Any,
    ) -> SuffixHead:
        """Find the tap to cut at, load the network and check that the cut is complete.

        Parameters
        ----------
        store : FeatureStore
            Of one network, with maps kept.
        layers : list of str
            Full names of the taps to choose from.
        settings : SuffixSettings
            How to train; ``settings.first`` decides which tap is needed.
        backbone : Backbone, optional
            Needed where the store's network is one's own, or has weights from a checkpoint.
        **more
            groups and checkpoints, as in `SuffixHead`.

        Raises
        ------
        TrainingError
            The store has no tap to cut at; the message has the command that makes one.
        TapError
            The network has a path around the cut.
        """
        if len(store.fingerprints) > 1:
            raise TrainingError(
                "The rest of a network is trained on the features of that network alone; these "
                f"stores hold those of {len(store.fingerprints)}. Name one store."
            )
        # Only weights and preprocessing matter, not the taps that the network was given with.
        (chosen,) = identity.choose([replace(store.fingerprint, taps=())], backbone)
        shape = chosen.preprocessing.output_shape
        traced = trace(chosen.module, torch.zeros((2, *shape)))
        tap = choose_tap(store, layers, chosen.module, traced, settings.first)
        check(chosen.module, cut(chosen.module, tap, shape, traced=traced))
        return cls(
            maps=Maps(store, tap),
            network=chosen.module,
            image_shape=shape,
            settings=settings,
            **more,
        )

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Train on each fold with the settings that were given."""
        device, scores = select_device(self.settings.device), []
        for number, (train, valid) in enumerate(rows.folds, 1):
            suffix = self._train(rows, train, f"fold-{number}").suffix.to(device)
            scores.append(scores_of(suffix, self.maps, valid, device))
            search.fitted()
        params = {
            "from": self.settings.first or suffix.order[0],
            "lr": self.settings.lr,
            "epochs": self.settings.epochs,
        }
        search.tried(params, gather(rows, scores))

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Train on all rows."""
        trained = self._train(rows, np.arange(len(rows)), "final")
        return [SuffixStep.trained(trained.suffix, len(rows.classes), trained.best)]

    def report(self, params: Params, steps: Sequence[Step]) -> Params:
        """Return the settings, and the epoch of the last training whose weights were kept."""
        return {**params, "best_epoch": cast(SuffixStep, steps[-1]).best_epoch}

    def _train(self, rows: TrainingRows, images: np.ndarray, name: str) -> Finetuned:
        """Train on some images, of which a part only decides when to stop."""
        fit, valid = images, images[:0]
        if self.settings.validation:
            inner = splitting.holdout(
                rows.labels[images],
                groups=None if self.groups is None else self.groups[images],
                sha256=self.maps.store.sha256[images],
                test_size=self.settings.validation,
                random_state=self.options.random_state,
            )
            fit, valid = (images[np.sort(part)] for part in inner)
        weight = compute_sample_weight(self.options.class_weight, rows.labels)
        if rows.weight is not None:
            weight = weight * rows.weight
        return finetune(
            cut(self.network, self.maps.tap, self.image_shape),
            len(rows.classes),
            self.maps,
            rows.codes,
            fit,
            valid,
            self.settings,
            weight=weight,
            random_state=self.options.random_state,
            checkpoint=self._checkpoint(name, rows, images, weight),
        )

    def _checkpoint(
        self, name: str, rows: TrainingRows, images: np.ndarray, weight: np.ndarray
    ) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        store = self.maps.store
        request = {
            **asdict(self.settings),
            "featcache": __version__,
            "fingerprint": store.fingerprint.digest,
            "tap": self.maps.tap,
            "random_state": self.options.random_state,
            "labels": rows.labels.tolist(),
        }
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
        for array in (store.sha256, np.asarray(images, np.int64), weight):
            digest.update(array.tobytes())
        return Checkpoint(self.checkpoints / f"{name}.pt", digest.hexdigest())


def choose_tap(
    store: FeatureStore,
    layers: Sequence[str],
    network: nn.Module,
    traced: Trace,
    first: str | None,
) -> str:
    """Return the tap of a store to cut at to train a layer and all behind it.

    Parameters
    ----------
    store : FeatureStore
        Of one network.
    layers : list of str
        Taps to choose from.
    network : torch.nn.Module
        The network.
    traced : Trace
        Of the network.
    first : str or None
        The first layer to train. None: the first one behind the only maps of the store.

    Returns
    -------
    str
        The last one that can be cut at: the least is computed behind it.

    Raises
    ------
    TrainingError
        No tap can be cut at, or several, and `first` does not choose one.
    TapError
        There is no layer of that name.
    """
    good = taps_before(traced, layers, first)
    if first is None:
        maps = [tap for tap in good if len(store.taps[tap].shape) - (store.views > 1) > 1]
        if len(maps) > 1:
            raise TrainingError(
                f"{store.paths[0]} holds maps of several layers, {', '.join(maps)}: name the first "
                "layer to train with --from (library: SuffixSettings(first=...))."
            )
        good = maps or good
    if good:
        return good[0]
    shape = traced.calls[0].input.shape
    assert shape is not None
    if first is None:
        raise TrainingError(
            f"{store.paths[0]} keeps no maps, only {', '.join(layers)}, so no part of the network "
            f"can run on them. Keep those before the part to train: {_command(store, 'LAYER')}"
        )
    tap = f"{first}:input:map"
    try:
        check(network, cut(network, tap, shape[1:], traced=traced))
    except TapError:
        hint = suggest(network, first.rpartition(".")[0], shape[1:])
        raise TrainingError(
            f"Training cannot start at {first!r}: {store.paths[0]} keeps nothing before it, and "
            f"the network cannot be cut there. {hint}"
        ) from None
    raise TrainingError(
        f"To train from {first!r} on, the input of that layer must be kept; {store.paths[0]} holds "
        f"{', '.join(layers)}. Keep it: {_command(store, first)}"
    )


def _command(store: FeatureStore, layer: str) -> str:
    """Return the command that keeps the input of a layer."""
    fingerprint = store.fingerprint
    views = f" --views {fingerprint.views}" if fingerprint.views > 1 else ""
    return (
        f"featcache extract IMAGES -o maps.h5 --backbone {identity.spec_of(fingerprint)} "
        f"--layer {layer}:input:map{views}"
    )
