"""`Predictor`: a trained head, and all that is needed to go from an image file to a label.

Loading runs no code from the file and opens nothing that the file names: a network from
torchvision or timm is built by its public name when it is first needed and its weights are
compared with the fingerprint; a callable or a checkpoint path is not followed, the user names it
again. The canary rows are checked twice. At loading, the head must make of them what it made when
it was saved (another scikit-learn might not). At the first prediction, decoder and network must
make these rows of the canary images (another Pillow, torch or device might not).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from featcache.errors import PredictorError, explained, of_system
from featcache.finetuning.head import SuffixStep
from featcache.fingerprint import Fingerprint
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration
from featcache.networks import identity
from featcache.predictor import file, inputs
from featcache.predictor.file import CanaryRows, is_predictor
from featcache.predictor.inputs import InputTap
from featcache.predictor.measured import Quantiles, coverage_text, in_set
from featcache.predictor.predictions import Prediction
from featcache.predictor.typicality import Typicality
from featcache.results.evaluation import label_first
from featcache.results.leaderboard import Leaderboard
from featcache.store.splitting import hash_keys
from featcache.system.console import doing, progress_bar
from featcache.system.files import open_file, replacing
from featcache.system.tables import counted, first_names, html_table, settings_text, typed

if TYPE_CHECKING:
    from featcache.extraction.decoding import Batch
    from featcache.images.given import Images
    from featcache.images.image_set import ImageSet
    from featcache.networks.backbone import Backbone
    from featcache.predictor.grafting import Grafted
    from featcache.store.store import FeatureStore

__all__ = ["Predictor"]

Floats = npt.NDArray[np.float64]

USUAL_COVERAGE = 0.95
_SAME = 1e-4  # the head's canary scores, relative to the largest: another BLAS moves them by 1e-6


@dataclass(eq=False)
class Predictor:
    """A trained head with its backbone's identity and its class names. Made by `train` or `load`.

    Attributes
    ----------
    estimator : FittedHead
        The head: its steps, from float32 features (n, d) to scores of the classes.
    head : str
        Name of the head.
    params : dict
        Hyper-parameters that were chosen.
    classes : tuple of str
        Class names, sorted: the columns of probabilities.
    calibration : Calibration
        Probabilities are ``softmax(logits / temperature + bias)``; the label is that of the highest
        of the logits.
    columns : tuple of InputTap
        Where the features come from, in order.
    fingerprints : tuple of Fingerprint
        One a network; their taps are those that the head uses.
    train_sha256 : ndarray of uint8, shape (n, 32)
        Content hash of each image that it was trained on.
    train_groups : ndarray of uint8, shape (g, 32)
        Hash of the name of each group that these images are of.
    canaries : CanaryRows
        Rows to check head and network on.
    label_scores : Quantiles
        1 less the probability of the true class, out of fold: what sets of labels are made by.
    typicality : Typicality or None
        How typical an image is of those that it was trained on; None where that is not known:
        the head is ``suffix``, or takes over 55,000 columns.
    metrics : dict
        JSON values: out-of-fold and held-out figures.
    leaderboard : Leaderboard or None
        The comparison that this head won.
    request : dict or None
        What was asked for when it was trained, so that the same study need not run again.
    versions : dict
        Versions of the packages that it was trained with.
    """

    estimator: FittedHead
    head: str
    params: Mapping[str, Any]
    classes: tuple[str, ...]
    calibration: Calibration
    columns: tuple[InputTap, ...]
    fingerprints: tuple[Fingerprint, ...]
    train_sha256: npt.NDArray[np.uint8]
    train_groups: npt.NDArray[np.uint8]
    canaries: CanaryRows
    label_scores: Quantiles
    typicality: Typicality | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    leaderboard: Leaderboard | None = None
    request: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=file.versions)
    _networks: list[Backbone] | None = field(default=None, init=False, repr=False)
    _checked: bool = field(default=False, init=False, repr=False)

    def __repr__(self) -> str:
        names = " + ".join(one.backbone for one in self.fingerprints)
        return (
            f"Predictor({self.head} on {names}, {self.n_features} features, "
            f"{len(self.classes)} classes, {len(self.train_sha256):,} training images)"
        )

    @property
    def n_features(self) -> int:
        """Columns that the head takes."""
        return sum(column.width for column in self.columns)

    # --- from features -------------------------------------------------------------------------

    def logits(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the head's scores for features, whose highest is the label's.

        Parameters
        ----------
        X : ndarray of shape (n, d) or (n, views, d)
            Features, the columns as in `columns`. Views are averaged.

        Returns
        -------
        ndarray of float32, shape (n, k)
            Columns as in `classes`.

        Raises
        ------
        PredictorError
            Another number of features, or a row with a number that is not finite.
        """
        try:
            X = np.asarray(X)
        except ValueError as error:
            sizes = [len(row) if hasattr(row, "__len__") else 1 for row in X]
            first = next((k for k, size in enumerate(sizes) if size != self.n_features), 0)
            raise PredictorError(
                f"Expected features (n, {self.n_features}), got rows of other lengths (first: row "
                f"{first})."
            ) from error
        if X.dtype.kind not in "fiub":
            raise PredictorError(f"Expected features, an array of numbers, got {X.dtype}.")
        if X.ndim not in (2, 3) or X.shape[-1] != self.n_features:
            raise PredictorError(
                f"Expected features (n, {self.n_features}) or (n, views, {self.n_features}), got "
                f"shape {X.shape}."
            )
        if not len(X):
            return np.zeros((0, len(self.classes)), np.float32)
        with np.errstate(over="ignore"):
            X = np.ascontiguousarray(X, dtype=np.float32)
        finite = np.isfinite(X).all(axis=tuple(range(1, X.ndim)))
        if not finite.all():
            raise PredictorError(
                f"{counted(int((~finite).sum()), 'row holds', 'rows hold')} numbers that are not "
                f"finite or too large for float32 (first: row {finite.argmin()})."
            )
        self._bind()
        return self.estimator.logits(X)

    def predict_proba(self, X: npt.NDArray[Any]) -> Floats:
        """Return calibrated probabilities (n, k) for features; each row adds up to 1.

        The label's need not be the highest; see `Calibration`. Parameters are those of `logits`.
        """
        return self.calibration.proba(self.logits(X))

    def predict_features(self, X: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
        """Return the label for features; see `logits`."""
        labels: npt.NDArray[np.str_] = np.array(self.classes)[self.logits(X).argmax(axis=1)]
        return labels

    def label_sets(
        self, X: npt.NDArray[Any], coverage: float = USUAL_COVERAGE
    ) -> list[tuple[str, ...]]:
        """Return the set of labels of each image, its label first, for features; see `stream`.

        Parameters
        ----------
        X : ndarray of shape (n, d) or (n, views, d)
            Features, as for `logits`.
        coverage : float
            Share of the images whose set should hold the true label.

        Raises
        ------
        PredictorError
            Too few images were judged out of fold for this coverage.
        """
        logits = self.logits(X)
        ranked, size = self._ranked(logits, self.calibration.proba(logits), coverage)
        return [
            tuple(self.classes[k] for k in row[:many])
            for row, many in zip(ranked.tolist(), size.tolist(), strict=True)
        ]

    def _ranked(
        self, logits: npt.NDArray[Any], proba: Floats, coverage: float | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return columns (n, k), the label first, and how many of them are its set of labels (n,).

        The others follow by probability, so that the set is what comes first.
        """
        label = logits.argmax(axis=1)
        ranked = np.argsort(-label_first(proba, label), axis=1, kind="stable")
        held = np.zeros(proba.shape, dtype=bool)
        if coverage is not None:
            held = in_set(self.label_scores, proba, coverage)
        held[np.arange(len(label)), label] = True
        return ranked, held.sum(axis=1)

    def coverage_text(self, coverage: float = USUAL_COVERAGE) -> str:
        """Return what sets of labels of a coverage promise, and for which images."""
        grouped = bool(len(self.train_groups))
        return coverage_text(self.label_scores.n, coverage, grouped=grouped)

    def predict_proba_of(self, store: FeatureStore) -> Floats:
        """Return probabilities for all rows of a store; see `logits_of`."""
        return self.calibration.proba(self.logits_of(store))

    def logits_of(self, store: FeatureStore) -> npt.NDArray[np.float32]:
        """Return the head's scores for all rows of a store, read block by block.

        Raises
        ------
        FingerprintMismatch
            The store's features are of another origin.
        """
        layers = self.layers_of(store)
        logits = np.empty((len(store), len(self.classes)), np.float32)
        for part, block in store.blocks(layers):
            logits[part] = self.logits(block)
        return logits

    def trained_on(self, sha256: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the content hashes (n, 32) that are a training image's."""
        return np.isin(hash_keys(sha256), hash_keys(self.train_sha256))

    def trained_on_groups(self, groups: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return a mask (n,) of the groups (n,) that a training image is of; ``""`` is none."""
        names, code = np.unique(groups, return_inverse=True)
        known = np.zeros(len(names), dtype=bool)
        named = names != ""
        known[named] = np.isin(hash_keys(file.group_hashes(names)), hash_keys(self.train_groups))
        return known[code]

    def layers_of(self, store: FeatureStore) -> list[str]:
        """Return the names that the predictor's columns have in a store.

        The storage type may differ, there may be more taps, and joined stores may come in another
        order.

        Raises
        ------
        FingerprintMismatch
            The features are not what the predictor was trained on; with the difference, field by
            field.
        """
        return inputs.layers_of(self.columns, self.fingerprints, store)

    # --- from images ---------------------------------------------------------------------------

    def predict(self, images: Images, **options: Any) -> list[Prediction]:
        """Label images: a list with one prediction an image, in order.

        Parameters
        ----------
        images, **options
            As in `stream`.

        Returns
        -------
        list of Prediction
            An image that cannot be read has its reason in `Prediction.error`.

        Raises
        ------
        PredictorError
            The network must be attached, or does not make what it made at training.
        """
        return list(self.stream(images, **options))

    def stream(
        self,
        images: Images,
        *,
        top_k: int = 1,
        coverage: float | None = None,
        abstain: bool = False,
        batch_size: int | None = None,
        workers: int | None = None,
        max_pixels: int | None = None,
        device: str = "auto",
        progress: bool | None = None,
    ) -> Iterator[Prediction]:
        """Return what `predict` does, one image at a time: memory does not grow with images.

        What is wrong with the arguments, the images' names or the network is raised at once, not
        at the first image, so that no output need be begun.

        Parameters
        ----------
        images : ImageSet, path, list of paths or images, array or tensor of uint8
            As for `featcache.features`. Of several paths, the ids are the paths as they were given,
            joined with the path below them.
        top_k : int
            Classes to name: the label, then the others from the most probable one.
        coverage : float, optional
            Give each image a set of labels too, `Prediction.labels`, so large that it holds the
            true one for about this share of the images. So it was measured out of fold (LAC; see
            `featcache.predictor.measured.in_set`), which is no guarantee: the head that predicts
            was fitted on all folds. A set is never empty: the label is always in it.
        abstain : bool
            Leave the label empty where the set has more than one; `coverage` is then 0.95, if it
            is left out.
        batch_size, workers, max_pixels, device
            As for `extract`.
        progress : bool, optional
            Show a progress bar on standard error; left out, in a terminal or a notebook.
        """
        from featcache.images.given import image_sets

        if top_k < 1:
            raise PredictorError(f"top_k counts classes from 1, got {top_k}.")
        if abstain and coverage is None:
            coverage = USUAL_COVERAGE
        if coverage is not None:
            in_set(self.label_scores, np.zeros((0, len(self.classes))), coverage)
        listed = image_sets(images)
        with doing(progress, "loading the network"):
            networks = self._backbones()
            self._bind(networks, device)
            self._check_networks(networks, device)
        asked = {"top_k": top_k, "coverage": coverage, "abstain": abstain}
        settings = {
            "batch_size": batch_size,
            "workers": workers,
            "max_pixels": max_pixels,
            "device": device,
        }
        return (
            replace(one, id=str(Path(place, one.id))) if place else one
            for place, image_set in listed
            for one in self._stream_set(image_set, networks, asked, progress=progress, **settings)
        )

    def attach(
        self,
        backbone: Backbone | Sequence[Backbone] | str | None = None,
        *,
        weights: str | Path | None = None,
    ) -> Self:
        """Use these networks from now on, and return the predictor.

        Needed where no public name leads to the predictor's network: it is one's own, or has
        weights from a file. If the head is the rest of that network (``suffix``), it cannot compute
        without it, on features of a store either.

        Parameters
        ----------
        backbone : Backbone, list of Backbone, or str, optional
            One network for each fingerprint, or a name as on the command line: ``resnet50``,
            ``timm/NAME``, ``package.module:callable``. None: the predictor's own, where it is
            public.
        weights : str or Path, optional
            Where a name is given: a weights name or a checkpoint file. None: the predictor's own,
            where they are public.

        Raises
        ------
        FingerprintMismatch
            It is another network than that of training.
        PredictorError
            The predictor has several networks and none is named, or one that no name leads to.
        """
        self._checked = False
        self._networks = identity.choose(self.fingerprints, backbone, weights)
        self._bind(self._networks)
        return self

    def _backbones(self) -> list[Backbone]:
        """Return a network for every fingerprint; those built by name are kept for later."""
        if self._networks is None:
            self._networks = identity.choose(self.fingerprints, None)
        return self._networks

    def _bind(self, networks: Sequence[Backbone] | None = None, device: str | None = None) -> None:
        """Give a head that is the rest of a network the network's code; others need none."""
        head = self.estimator.steps[-1]
        if not isinstance(head, SuffixStep):
            return
        if not head.is_bound:
            known = networks or self._networks or [identity.rebuild(self.fingerprints[0])]
            shape = known[0].preprocessing.output_shape
            try:
                head.bind(known[0].skeleton(), shape)
                self._check_head()
            except Exception:
                # A few networks compute with their weights when they are built.
                head.bind(known[0].module, shape)
                self._check_head()
        if device is not None:
            from featcache.networks.forward import select_device

            head.to(select_device(device))

    def _check_networks(self, networks: Sequence[Backbone], device: str) -> None:
        """Compare, once, the features of the canary images with those of training.

        Raises
        ------
        PredictorError
            They have nothing to do with each other.
        """
        from featcache.extraction.features import canary_features

        kept = self.canaries
        varying = any(fingerprint.varying for fingerprint in self.fingerprints)
        if self._checked or varying or not kept.images:
            return
        found = inputs.side_by_side(
            self.columns,
            self.fingerprints,
            [
                canary_features(
                    network, kept.images, device=device, precision=fingerprint.precision
                )
                for network, fingerprint in zip(networks, self.fingerprints, strict=True)
            ],
        )
        precisions = [one.precision for one in self.fingerprints]
        versions = file.then_and_now(self.versions)
        inputs.check_canaries(kept.names, found, kept.x, precisions, versions)
        self._checked = True

    def _stream_set(
        self,
        images: ImageSet,
        networks: Sequence[Backbone],
        asked: Mapping[str, Any],
        *,
        progress: bool | None,
        **settings: Any,
    ) -> Iterator[Prediction]:
        """Yield the predictions of one image set."""
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(
                    contextlib.closing(inputs.features_of(images, network, fingerprint, **settings))
                )
                for network, fingerprint in zip(networks, self.fingerprints, strict=True)
            ]
            bar = stack.enter_context(
                progress_bar(
                    progress,
                    total=len(images),
                    unit="img",
                    smoothing=0.05,
                    desc=", ".join(network.name for network in networks),
                )
            )
            # As batches and views are of the same size, all networks take the same images together.
            for batches in zip(*streams, strict=True):
                yield from self._predictions(images, batches, **asked)
                bar.update(len(batches[0].rows))

    def _predictions(
        self,
        images: ImageSet,
        batches: Sequence[Batch],
        *,
        top_k: int,
        coverage: float | None,
        abstain: bool,
    ) -> Iterator[Prediction]:
        """Predict the images of a batch, which each network has seen."""
        errors = {row: error for one in batches[::-1] for row, error in one.failures.items()}
        done = np.logical_and.reduce([one.done for one in batches])  # (k,)
        features = [
            {tap: array[done[one.done]] for tap, array in one.features.items()} for one in batches
        ]
        views = self.fingerprints[0].views
        X = inputs.side_by_side(self.columns, self.fingerprints, features, views=views)
        logits = self.logits(X)
        proba = self.calibration.proba(logits)
        ranked, size = self._ranked(logits, proba, coverage)
        typical = [None] * len(X) if self.typicality is None else self.typicality(X).tolist()
        found = zip(ranked.tolist(), size.tolist(), proba, typical, strict=True)
        for row in batches[0].rows.tolist():
            if row in errors:
                failed = Prediction.failed(images.ids[row], str(errors[row]))
                yield failed if coverage is None else replace(failed, labels=())
                continue
            columns, many, own, share = next(found)
            top = tuple((self.classes[k], float(own[k])) for k in columns[:top_k])
            label, probability = top[0]
            yield Prediction(
                images.ids[row],
                "" if abstain and many > 1 else label,
                probability,
                top,
                labels=None if coverage is None else tuple(self.classes[k] for k in columns[:many]),
                typicality=share,
            )

    # --- as a network --------------------------------------------------------------------------

    def to_torch(self, *, probabilities: bool = True) -> Grafted:
        """Return the whole network, head grafted on, as an ordinary ``nn.Module``.

        Each step of the head is a layer, and the last one calibrates: the label is that of the
        highest of its outputs less ``calibration.bias``, before the softmax. Its input is what
        ``backbone.preprocessing.normalize`` returns; of views, it sees one.

        Parameters
        ----------
        probabilities : bool
            Whether the output is `predict_proba` (True), or logits to train further (False).

        Returns
        -------
        Grafted
            In evaluation mode, frozen but for the head.

        Raises
        ------
        PredictorError
            The head is not made of layers; the message names those that are.
        """
        from featcache.predictor.grafting import graft

        networks = self._backbones()
        self._bind(networks)
        grafted = graft(
            networks,
            self.columns,
            self.estimator,
            name=self.head,
            calibration=self.calibration,
            probabilities=probabilities,
        )
        return grafted.eval()

    # --- files ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return what the predictor is, as JSON values."""
        return {
            "head": self.head,
            "params": self.params,
            "classes": self.classes,
            "training_images": len(self.train_sha256),
            "judged_images": self.label_scores.n,
            "columns": [vars(column) for column in self.columns],
            "fingerprints": [one.to_dict() for one in self.fingerprints],
            "metrics": self.metrics,
            "versions": self.versions,
        }

    def _facts(self) -> list[tuple[str, str]]:
        """Return what people want to know, each under its name."""
        return [
            ("head", self.head),
            ("parameters", settings_text(self.params)),
            ("classes", f"{len(self.classes):,} ({first_names(self.classes)})"),
            ("trained on", counted(len(self.train_sha256), "image")),
            *(("tap", f"{column.tap}  ({column.width},)") for column in self.columns),
            *(("backbone", one.title) for one in self.fingerprints),
        ]

    def to_text(self) -> str:
        """Return what the predictor is and how well it did, for people."""
        lines = [f"{name:10} {text}" for name, text in self._facts()]
        figures = [] if self.leaderboard is None else ["", self.leaderboard.to_text()]
        return "\n".join([*lines, *figures])

    def _repr_html_(self) -> str:
        return html_table(["predictor", ""], self._facts())

    def save(self, path: str | Path) -> None:
        """Write the predictor to one file, atomically.

        Raises
        ------
        OutputError
            The path holds something that is not a predictor, or cannot be written.
        """
        target = Path(path)
        parts = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        content = file.write(parts)
        with replacing(target, is_predictor, "a featcache predictor") as output:
            output.write(content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a predictor file. No code in it is run, nothing it names is opened.

        Raises
        ------
        PredictorError
            No such file, damaged, hostile, of another format version, or a head that no longer
            computes what it did.
        """
        target = Path(path)
        try:
            with open_file(target) as opened:
                predictor = cls(**file.read(opened))
            predictor._check_head()
        except Exception as error:
            # What hostile bytes can make of JSON and arrays is endless; all of it is one error.
            what = f"{target} is not a usable predictor: {' '.join(str(error).split())}"
            if fault := of_system(error):
                what = f"Cannot read {target}: {explained(fault)}."
            elif isinstance(error, OSError):
                what = f"Cannot read a predictor from {target}: {error.strerror or error}."
                if not target.exists():
                    what += f" Make one with: {typed('featcache train STORE.h5 -o', target)}"
            raise PredictorError(what) from error
        return predictor

    def _check_head(self) -> None:
        """Refuse a head that does not compute what it computed when it was saved."""
        expected = self.canaries.logits
        head = self.estimator.steps[-1]
        if not len(expected) or (isinstance(head, SuffixStep) and not head.is_bound):
            return  # a head without its network is checked when it gets one
        with np.errstate(all="ignore"):
            found = self.estimator.logits(self.canaries.x)
        if found.shape != expected.shape or not inputs.distance(found, expected) <= _SAME:
            raise PredictorError(
                "The head no longer computes what it did when it was saved: "
                f"{file.then_and_now(self.versions)}. Install the former, or train again."
            )
