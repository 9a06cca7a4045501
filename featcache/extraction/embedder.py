"""`Embedder`: images to features as a transformer of scikit-learn's, with a store as its memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags

from featcache.errors import DecodeError, FingerprintMismatch, StoreError
from featcache.extraction import reuse
from featcache.extraction.canaries import check_canaries, usable_canaries
from featcache.extraction.features import check_batch, features, no_features
from featcache.extraction.filling import versions
from featcache.extraction.stream import Options, compute
from featcache.fingerprint import Fingerprint
from featcache.images.given import Images, image_sets
from featcache.images.image_set import ImageSet, content_hash
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime, Settings
from featcache.pixels.decode import RawImage
from featcache.store import disk
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter, check_unreplaced
from featcache.system.memory import reuse_memory

_WAIT = 600.0  # seconds for another process that adds rows


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Images in, features out: a transformer of scikit-learn's, for a Pipeline.

    Nothing is fitted: the network is frozen. Clones share the backbone.

    Parameters
    ----------
    backbone : Backbone
        The network. The features of its taps stand side by side, maps flattened.
    path : path, optional
        A feature file, as `extract` makes it, or one to be made. An image whose content is in it is
        not computed again, whatever its name; others are added, with the hash of their content as
        id. Rows are never changed or removed. Left out, nothing is kept.
    batch_size, device
        As for `featcache.features`.

    Examples
    --------
    >>> import featcache as fc
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> images = fc.ImageSet.open("flowers").select(range(0, 80, 8))
    >>> embedder = fc.Embedder(fc.Backbone("resnet18", weights=None), "seen.h5")
    >>> classifier = make_pipeline(embedder, LogisticRegression())
    >>> files = [f"flowers/{name}" for name in images.ids]
    >>> classifier.fit(files, images.labels.tolist()).predict(files[:2]).shape
    (2,)
    >>> len(fc.FeatureStore.open("seen.h5"))
    10
    """

    def __init__(
        self,
        backbone: Backbone,
        path: str | Path | None = None,
        *,
        batch_size: int | None = None,
        device: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.path = path
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Images, y: Any = None) -> Self:
        """Return the transformer: there is nothing to fit."""
        return self

    def transform(self, X: Images) -> np.ndarray:
        """Return the features of images.

        Parameters
        ----------
        X : list of paths or images, or whatever else `featcache.features` takes
            The images.

        Returns
        -------
        ndarray of float32, shape (n, d)

        Raises
        ------
        ImageSetError
            There is no image, or something else than images.
        ExtractionError
            An image cannot be read, or its features are not finite; the message names it.
        FingerprintMismatch
            The file at `path` holds features of another network.
        StoreError
            It cannot be read or written.
        """
        options: Any = {"batch_size": self.batch_size, "device": self.device, "workers": 0}
        if self.path is not None:
            with reuse_memory():
                return self._remembered([one for _, one in image_sets(X)], Options(**options))
        found = features(X, self.backbone, **options)
        parts = found.values() if isinstance(found, dict) else [found]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def _remembered(self, sets: list[ImageSet], options: Options) -> np.ndarray:
        """Return features (n, d) from the file, by content; add those that are not there."""
        path = os.path.realpath(str(self.path))
        images = [(one, row) for one in sets for row in range(len(one))]
        hashes = [content_hash(_read(*image)) for image in images]
        by_hash = dict(zip(hashes, images, strict=True))
        while True:
            seen, store = disk.identity(path), reuse.finished_store(path)
            known = {} if store is None else {x.tobytes(): k for k, x in enumerate(store.sha256)}
            made: Any = {}
            if store is not None:  # whose precision and type of features are kept to
                how = ("precision", "store_dtype", "varying")
                made = {name: getattr(store.fingerprint, name) for name in how}
            fingerprint = self.backbone.fingerprint(**made)
            if store is not None and (differs := store.fingerprint.diff(fingerprint)):
                raise FingerprintMismatch(f"{path} holds other features:\n{differs}")
            new = {one: image for one, image in by_hash.items() if one not in known}
            if not new and store is not None:
                return store.select([known[one] for one in hashes]).matrix()
            asked = replace(options, precision=fingerprint.precision)
            settings = Settings.from_dict((store and store.meta.get("settings")) or {})
            runtime = asked.runtime(self.backbone, len(new), settings=settings)
            try:
                _add(path, seen, store, new, runtime, fingerprint, asked)
            except StoreError:
                if disk.identity(path) == seen:
                    raise  # else another process has added rows meanwhile: look again

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return a name for each column: ``TAP[0]``, ``TAP[1]`` ..."""
        widths = {tap: int(np.prod(shape)) for tap, shape in self.backbone.shapes.items()}
        names = [f"{tap}[{k}]" for tap, width in widths.items() for k in range(width)]
        return np.array(names, dtype=object)

    def __sklearn_clone__(self) -> Self:
        # A copy of the network would be loaded anew for every fold.
        return type(self)(**self.get_params(deep=False))

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = False, True
        return tags


def _add(
    path: str,
    seen: tuple[int, int] | None,
    store: FeatureStore | None,
    new: dict[bytes, tuple[ImageSet, int]],
    runtime: Runtime,
    fingerprint: Fingerprint,
    options: Options,
) -> None:
    """Make the store anew, with all its rows and those of images by their hash."""
    old, images, found = 0 if store is None else len(store), list(new.values()), []
    for one in dict.fromkeys(one for one, _ in images):
        row_of = {row: old + k for k, (other, row) in enumerate(images) if other is one}
        for batch in compute(one, runtime, np.array(sorted(row_of)), options):
            check_batch(one, batch)
            found.append(([row_of[row] for row in batch.rows.tolist()], batch))
    tables = {"ids": np.array([one.hex() for one in new])}
    if store is not None:
        none = np.full(len(new), "")
        tables = {name: np.append(x, tables.get(name, none)) for name, x in store.tables.items()}
    with FeatureWriter.begin(
        path,
        tables,
        runtime.backbone.shapes,
        fingerprint=fingerprint,
        meta={"versions": versions()} if store is None else store.meta,
        canaries=usable_canaries(runtime.backbone),
        wait=_WAIT,
    ) as writer:
        check_unreplaced(path, seen)
        check_canaries(writer, runtime)
        writer.set_meta("settings", runtime.settings.to_dict())
        if store is not None:
            writer.copy_rows(store, np.arange(old), np.arange(old))
        for rows, batch in found:
            stat = {name: batch.entries[name] for name in ("sha256", "size", "stamp")}
            writer.write(rows, batch.features, **stat)
        writer.finish()


def _read(images: ImageSet, row: int) -> RawImage:
    try:
        return images.read(row)
    except DecodeError as error:
        raise no_features(images, row, str(error)) from error
