"""The rest of a network as a head beside the others: cut, folds, last fit, calibration.

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

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featcache.errors import TapError, TrainingError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.cutting import Suffix, check, cut, suggest, taps_before
from featcache.finetuning.head import SuffixStep
from featcache.finetuning.settings import SuffixSettings
from featcache.finetuning.training import Epoch, Finetuned, Maps, finetune, scores_of
from featcache.heads.base import FittedHead
from featcache.heads.calibration import fit_temperature
from featcache.heads.search import SearchResult, Trial, score_folds
from featcache.networks import identity
from featcache.networks.forward import select_device
from featcache.networks.tracing import Trace, trace
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.system.console import progress_bar
from featcache.version import __version__

if TYPE_CHECKING:
    from featcache.networks.backbone import Backbone

__all__ = ["SUFFIX", "SuffixSearch", "choose_tap", "remove_checkpoints"]

SUFFIX = "suffix"


@dataclass(frozen=True)
class SuffixSearch:
    """What is needed to train the rest of a network on a store. Made by `of`.

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
    checkpoints : Path or None
        Folder of the checkpoints.
    progress : bool or None
        Show a progress bar on standard error; None: if that is a terminal.
    """

    maps: Maps
    network: nn.Module
    image_shape: tuple[int, int, int]
    settings: SuffixSettings
    checkpoints: Path | None = None
    progress: bool | None = None

    @classmethod
    def of(
        cls,
        store: FeatureStore,
        *,
        layers: Sequence[str],
        settings: SuffixSettings,
        backbone: Backbone | None = None,
        checkpoints: Path | None = None,
        progress: bool | None = None,
    ) -> SuffixSearch:
        """Find the tap to cut at, load the network and check that the cut is true.

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
        checkpoints : Path, optional
            Folder to resume from.
        progress : bool, optional
            Show a progress bar on standard error; left out, if that is a terminal.

        Raises
        ------
        TrainingError
            No tap of the store will do; the message has the command that makes one.
        TapError
            The network has a path around the cut.
        """
        if len(store.fingerprints) > 1:
            raise TrainingError(
                "The rest of a network is trained on the features of that network alone; these "
                f"stores hold those of {len(store.fingerprints)}. Name one store."
            )
        # Whatever taps a network was given with: its weights and preprocessing count.
        (chosen,) = identity.choose([replace(store.fingerprint, taps=())], backbone)
        shape = chosen.preprocessing.output_shape
        traced = trace(chosen.module, torch.zeros((2, *shape)))
        tap = choose_tap(store, layers, chosen.module, traced, settings.first)
        check(chosen.module, cut(chosen.module, tap, shape, traced=traced))
        return cls(Maps(store, tap), chosen.module, shape, settings, checkpoints, progress)

    def search(
        self,
        y: np.ndarray,
        folds: Sequence[splitting.Fold],
        *,
        groups: np.ndarray | None = None,
        class_weight: str | Mapping[str, float] | None = None,
        scoring: Any = "accuracy",
        random_state: int = 0,
    ) -> SearchResult:
        """Train on each fold and on all rows.

        Parameters
        ----------
        y : ndarray of str, shape (n,)
            Labels.
        folds : list of (train, valid)
            Row numbers.
        groups : ndarray of str, shape (n,), optional
            Groups that the inner validation part does not cut.
        class_weight : "balanced" or dict, optional
            As in scikit-learn.
        scoring : str or callable
            One of scikit-learn's scorers, for the folds' scores.
        random_state : int
            Seed.

        Returns
        -------
        SearchResult
        """
        run = _Run(self, y, groups, class_weight, random_state, len(folds) + 1)
        start = time.perf_counter()
        try:
            logits = run.out_of_fold(folds)
            middle = time.perf_counter()
            final = run.train(np.arange(len(y)), "final")
        finally:
            run.bar.close()
        scores = score_folds(logits, run.codes, run.classes, folds, scoring)
        best = Trial(self._params(final), scores)
        step = SuffixStep.trained(final.suffix, len(run.classes))
        return SearchResult(
            head=SUFFIX,
            estimator=FittedHead([step], run.classes),
            best=best,
            trials=(best,),
            classes=run.classes,
            logits=logits,
            temperature=fit_temperature(logits, run.codes, run.weight),
            search_seconds=middle - start,
            fit_seconds=time.perf_counter() - middle,
        )

    def suffix(self) -> Suffix:
        """Return the part behind the cut, with the pretrained weights."""
        return cut(self.network, self.maps.tap, self.image_shape)

    def _params(self, trained: Finetuned) -> dict[str, Any]:
        settings = self.settings
        return {
            "from": settings.first or trained.suffix.order[0],
            "lr": settings.lr,
            "epochs": settings.epochs,
            "best_epoch": trained.best,
        }


class _Run:
    """The trainings of one search, with one progress bar."""

    def __init__(
        self,
        task: SuffixSearch,
        y: np.ndarray,
        groups: np.ndarray | None,
        class_weight: str | Mapping[str, float] | None,
        random_state: int,
        count: int,
    ) -> None:
        from sklearn.utils.class_weight import compute_sample_weight

        self.task, self.y, self.groups = task, y, groups
        self.random_state = random_state
        self.classes, codes = np.unique(y, return_inverse=True)
        self.codes = codes.astype(np.int64)
        self.weight = (
            None if class_weight is None else np.asarray(compute_sample_weight(class_weight, y))
        )
        self.sha256 = task.maps.store.sha256
        self.count, self.done = count, 0
        epochs = count * task.settings.epochs
        self.bar = progress_bar(task.progress, total=epochs, unit="epoch", leave=False)

    def out_of_fold(self, folds: Sequence[splitting.Fold]) -> np.ndarray:
        """Train on each fold and return the scores of the others, NaN where no fold validates."""
        device = select_device(self.task.settings.device)
        logits = np.full((len(self.y), len(self.classes)), np.nan, np.float32)
        for number, (train, valid) in enumerate(folds):
            suffix = self.train(train, f"fold-{number + 1}").suffix.to(device)
            logits[valid] = scores_of(suffix, self.task.maps, np.asarray(valid), device)
        return logits

    def train(self, rows: np.ndarray, name: str) -> Finetuned:
        """Train on some rows, part of which only says when to stop."""
        settings = self.task.settings
        fit, valid = self._set_aside(rows)
        self.bar.set_description(name)
        trained = finetune(
            self.task.suffix(),
            len(self.classes),
            self.task.maps,
            self.codes,
            fit,
            valid,
            settings,
            weight=self.weight,
            random_state=self.random_state,
            checkpoint=self._checkpoint(name, rows),
            progress=self._show,
        )
        self.done += 1
        self.bar.n = self.done * settings.epochs  # early stopping leaves some out
        self.bar.refresh()
        return trained

    def _set_aside(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split rows into those to train on and those that say when to stop."""
        if not self.task.settings.validation:
            return rows, rows[:0]
        fit, valid = splitting.holdout(
            self.y[rows],
            groups=None if self.groups is None else self.groups[rows],
            sha256=self.sha256[rows],
            test_size=self.task.settings.validation,
            random_state=self.random_state,
        )
        return rows[np.sort(fit)], rows[np.sort(valid)]

    def _show(self, step: int, epoch: Epoch | None) -> None:
        if epoch is not None:
            found = {"loss": epoch.loss, "validation": epoch.validation_accuracy}
            shown = {name: f"{value:.3f}" for name, value in found.items() if value == value}
            self.bar.set_postfix(shown)
            self.bar.update()

    def _checkpoint(self, name: str, rows: np.ndarray) -> Checkpoint | None:
        if self.task.checkpoints is None:
            return None
        digest = hashlib.sha256()
        settings = asdict(self.task.settings)
        request = {
            **settings,
            "featcache": __version__,
            "fingerprint": self.task.maps.store.fingerprint.digest,
            "tap": self.task.maps.tap,
            "random_state": self.random_state,
        }
        digest.update(json.dumps(request, sort_keys=True).encode())
        digest.update(self.sha256.tobytes())
        digest.update(np.ascontiguousarray(rows, np.int64).tobytes())
        digest.update("\0".join(self.y.tolist()).encode())
        if self.weight is not None:
            digest.update(self.weight.astype(np.float64).tobytes())
        return Checkpoint(self.task.checkpoints / f"{name}.pt", digest.hexdigest())


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a search, and their folder if nothing else is in it."""
    for pattern in ("fold-*.pt", "final.pt"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def choose_tap(
    store: FeatureStore,
    layers: Sequence[str],
    network: nn.Module,
    traced: Trace,
    first: str | None,
) -> str:
    """Return the tap of a store to cut at, so that all from a layer on can be trained.

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
        The first layer to train. None: what follows the only maps of the store.

    Returns
    -------
    str
        The last one that will do: the least is computed behind it.

    Raises
    ------
    TrainingError
        None will do, or which is not said.
    TapError
        There is no layer of that name.
    """
    good = taps_before(traced, layers, first)
    if first is None:
        maps = [tap for tap in good if len(_shape(store, tap)) > 1]
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


def _shape(store: FeatureStore, tap: str) -> tuple[int, ...]:
    info = store.taps[tap]
    return info.shape[1:] if info.views > 1 else info.shape


def _command(store: FeatureStore, layer: str) -> str:
    """Return the command that keeps the input of a layer."""
    fingerprint = store.fingerprint
    views = f" --views {fingerprint.views}" if fingerprint.views > 1 else ""
    return (
        f"featcache extract IMAGES -o maps.h5 --backbone {identity.spec_of(fingerprint)} "
        f"--layer {layer}:input:map{views}"
    )
