"""Which images of a store look most like others, by the cosine of their features."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ImageSetError
from featcache.images.given import image_sets
from featcache.networks import identity
from featcache.predictor import inputs
from featcache.predictor.file import then_and_now
from featcache.system.tables import text_table

if TYPE_CHECKING:
    from featcache.extraction.decoding import Batch
    from featcache.images.image_set import ImageSet
    from featcache.networks.backbone import Backbone
    from featcache.store.store import FeatureStore

__all__ = ["Neighbor", "Similar", "similar"]


@dataclass(frozen=True)
class Neighbor:
    """An image of a store: its id and label, and its cosine with the query, -1 to 1."""

    id: str
    label: str
    cosine: float


@dataclass(frozen=True)
class Similar:
    """What looks most like one image.

    Attributes
    ----------
    query : str
        Its id or path.
    nearest : tuple of Neighbor
        The nearest images first.
    """

    query: str
    nearest: tuple[Neighbor, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: ``query`` and ``nearest``."""
        return {"query": self.query, "nearest": [vars(one) for one in self.nearest]}

    def __str__(self) -> str:
        rows = [[one.id, one.label, f"{one.cosine:.4f}"] for one in self.nearest]
        return f"{self.query}\n{text_table(['id', 'label', 'cosine'], rows, right=[2])}"


def similar(
    store: FeatureStore,
    images: str | Path | Iterable[str | Path],
    k: int = 10,
    *,
    layers: str | Sequence[str] | None = None,
    backbone: Backbone | Sequence[Backbone] | str | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> list[Similar]:
    """Return the k images of a store whose features are most like those of each image.

    Parameters
    ----------
    store : FeatureStore
        Where to look; see `FeatureStore.nearest` for what is compared. May be joined.
    images : str, path, or list of them
        Ids of the store's images, which are not listed among their own neighbours, and paths of
        other images. What is both is the id: for the file, write ``./NAME``.
    k : int
        Neighbours.
    layers : str or list of str, optional
        Taps to use; None: all.
    backbone, weights
        The store's network, where no public name leads to it, as for `Predictor.attach`.
    **options
        `batch_size`, `workers`, `max_pixels` and `device`, as for `extract`.

    Returns
    -------
    list of Similar
        In the order of the images.

    Raises
    ------
    ImageSetError
        There is neither an image of that id nor such a file.
    ExtractionError
        An image cannot be read.
    FingerprintMismatch, PredictorError
        The network is not the store's, or must be given.

    Examples
    --------
    >>> import featcache as fc
    >>> images = fc.ImageSet.open("flowers").select([0, 1, 2, 40, 41])
    >>> network = fc.Backbone("resnet18", weights=None)
    >>> store = fc.extract(images, network, "similar.h5")
    >>> asked = ["dahlia/00.jpg", "flowers/palace/03.jpg"]
    >>> one, new = fc.similar(store, asked, 1, backbone=network)
    >>> one.query, len(one.nearest)
    ('dahlia/00.jpg', 1)
    """
    asked = [images] if isinstance(images, str | Path) else list(images)
    row_of = {id: row for row, id in enumerate(store.ids.tolist())}
    rows = [row_of.get(str(one), -1) for one in asked]
    for one, row in zip(asked, rows, strict=True):
        if row < 0 and not Path(one).exists():
            near = get_close_matches(str(one), row_of, 1) or store.ids[:1].tolist()
            raise ImageSetError(
                f"{', '.join(store.paths)} has no image {str(one)!r}, and there is no such file. "
                f"Ids look like {near[0]!r}."
            )
    names: list[str] = []
    own: list[int] = []
    features: list[npt.NDArray[np.float32]] = []
    for known, run in itertools.groupby(zip(asked, rows, strict=True), lambda one: one[1] >= 0):
        paths, numbers = map(list, zip(*run, strict=True))
        if known:
            found, X = list(map(str, paths)), store.select(numbers).matrix(layers)
        else:
            found, X = _computed(store, paths, layers, backbone, weights, options)
            numbers = [-1] * len(found)
        names, own, features = names + found, own + numbers, [*features, X]
    cosines, near = store.nearest(np.concatenate(features), k, layers=layers, exclude=own)
    return [
        Similar(
            name,
            tuple(
                Neighbor(str(store.ids[row]), str(store.labels[row]), float(cosine))
                for row, cosine in zip(*one, strict=True)
            ),
        )
        for name, *one in zip(names, near, cosines, strict=True)
    ]


def _computed(
    store: FeatureStore,
    paths: Sequence[str | Path],
    layers: str | Sequence[str] | None,
    backbone: Backbone | Sequence[Backbone] | str | None,
    weights: str | Path | None,
    options: dict[str, Any],
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Return the names of new images and their features, as `FeatureStore.matrix` gives them."""
    columns = inputs.columns_of(store, store.resolve(layers))
    used = sorted({column.source for column in columns})
    parts = [store.parts[source] for source in used]
    networks = identity.choose([part.fingerprint for part in parts], backbone, weights)
    sets = image_sets(paths)
    by_source = {}
    for source, part, network in zip(used, parts, networks, strict=True):
        batches = _batches(part, network, sets, options)
        taps = [column.tap for column in columns if column.source == source]
        by_source[source] = {
            tap: np.concatenate([one.features[tap] for one in batches]) for tap in taps
        }
    X = inputs.side_by_side(columns, store.fingerprints, by_source, views=store.views)
    names = [str(Path(place, id)) if place else id for place, one in sets for id in one.ids]
    return names, X


def _batches(
    store: FeatureStore,
    network: Backbone,
    sets: Sequence[tuple[str, ImageSet]],
    options: dict[str, Any],
) -> list[Batch]:
    """Return what the network of a store makes of images, once it is known to be that network."""
    from featcache.extraction.features import canary_features, check_batch

    kept, fingerprint = store.canaries, store.fingerprint
    if kept is not None and kept.features and not fingerprint.varying:
        how = {"device": options.get("device", "auto"), "precision": fingerprint.precision}
        found = canary_features(network, kept.images, **how)
        versions = then_and_now(store.meta["versions"])
        for tap, expected in kept.features.items():
            inputs.check_canaries(
                kept.names, found[tap], expected, [fingerprint.precision], versions, "Cosines"
            )
    batches = []
    for _, images in sets:
        for batch in inputs.features_of(images, network, fingerprint, **options):
            check_batch(images, batch)
            batches.append(batch)
    return batches
