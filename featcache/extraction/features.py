"""Features without a file, by the very path of `extract`: of images in memory, and for prediction.

`features` is what one types first in a notebook: the network as it last ran is kept on the
`Backbone`, so that the second call begins at once, and no test images are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from featcache.errors import BackboneError, ExtractionError
from featcache.extraction.canaries import of_canaries
from featcache.extraction.decoding import Batch
from featcache.extraction.stream import Options, compute
from featcache.images.given import Images, image_sets
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime
from featcache.system.console import doing, progress_bar
from featcache.system.memory import reuse_memory

_FEW = 256  # images for which no process that decodes is started
_BAR_SECONDS = 2.0  # after which there is a progress bar


def features(
    images: Images, backbone: Backbone, *, progress: bool | None = None, **options: Any
) -> np.ndarray | dict[str, np.ndarray]:
    """Compute the features of images, and return them as an array; `backbone(images)` is the same.

    The features are those that `extract` would store of the same images, bit for bit. To keep them,
    or for more images than fit in memory, use `extract`.

    Parameters
    ----------
    images : path, list of paths, list of images, array or tensor of uint8, or ImageSet
        Files, folders, tars and patterns. Or images in memory, which may differ in size: PIL
        images, arrays of uint8 (h, w) or (h, w, 3), tensors of uint8 (3, h, w). Or one array
        (n, h, w) or (n, h, w, c), or one tensor (n, c, h, w) or (n, h, w, c). An array (h, w, 3)
        is one image. Images are resized, cropped and normalised as the network expects; arrays of
        floating point are refused, because nothing tells whether that was done.
    backbone : Backbone
        The network.
    progress : bool, optional
        Show a progress bar; left out, in a terminal or a notebook if it takes seconds.
    **options
        `batch_size`, `workers`, `max_pixels`, `device`, `precision` and `compile`, as for
        `extract`. Without `workers`, a few images are decoded in this process.

    Returns
    -------
    ndarray of float32, shape (n, d) or (n, c, h, w), or dict of str to such an array
        In the order of the images (of a folder, in that of its sorted paths); by tap where the
        backbone has several.

    Raises
    ------
    ImageSetError
        There is no image, or something else than images.
    ExtractionError
        An image cannot be read, or its features are not finite; the message names it.

    Examples
    --------
    >>> import featcache as fc
    >>> backbone = fc.Backbone("resnet18", weights=None)
    >>> fc.features("flowers/dahlia/*0.jpg", backbone).shape
    (4, 512)
    >>> from PIL import Image
    >>> backbone(Image.open("flowers/dahlia/00.jpg")).shape
    (1, 512)
    """
    if not isinstance(backbone, Backbone):
        raise BackboneError(f"backbone is a Backbone, such as Backbone('resnet50'): {backbone!r}")
    sets = image_sets(images)
    count = sum(len(one) for _, one in sets)
    asked = Options(**{"workers": 0 if count <= _FEW else None, **options})
    with doing(progress, "loading the network"), reuse_memory():
        runtime = _kept(asked.runtime(backbone, count))
        found = {
            tap: np.empty((count, *shape), np.float32) for tap, shape in backbone.shapes.items()
        }
    bar = progress_bar(
        progress, total=count, unit="img", desc=backbone.name, delay=_BAR_SECONDS, leave=False
    )
    start = 0
    with bar, reuse_memory():
        for _, one in sets:
            with contextlib.closing(compute(one, runtime, np.arange(len(one)), asked)) as batches:
                for batch in batches:
                    check_batch(one, batch)
                    for tap, values in batch.features.items():
                        found[tap][start + batch.rows] = values
                    bar.update(len(batch.rows))
            start += len(one)
    return found if len(found) > 1 else next(iter(found.values()))


def _kept(runtime: Runtime) -> Runtime:
    """Return the runtime that a backbone ran with last if it does the same, else keep this one."""
    kept: Runtime | None = runtime.backbone.runtime
    if kept is None or kept.asked != runtime.asked:
        kept = runtime.backbone.runtime = runtime
        _ = kept.settings  # loads the network
    return kept


def check_batch(images: ImageSet, batch: Batch) -> None:
    """Raise if an image of a batch has no features, or some that are not finite."""
    failed = {row: str(error) for row, error in batch.failures.items()}
    finite = [np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in batch.features.values()]
    for row in batch.rows[batch.done][~np.logical_and.reduce(finite)].tolist():
        failed[row] = "forward: features are not finite"
    if failed:
        raise no_features(images, *min(failed.items()))


def no_features(images: ImageSet, row: int, why: str) -> ExtractionError:
    """Return the error for an image without features where each must have some."""
    return ExtractionError(
        f"The image {images.ids[row]} of {images.source} has no features ({why}). Mend it or "
        "leave it out; extract() leaves such images out by itself and records them."
    )


def batches_of(
    images: ImageSet, backbone: Backbone, *, rows: np.ndarray | None = None, **options: Any
) -> Iterator[Batch]:
    """Compute features, a batch at a time, in the order of the rows.

    Parameters
    ----------
    images : ImageSet
        The images.
    backbone : Backbone
        The network.
    rows : array of int, optional
        Numbers of the images to compute, ascending; all if left out.
    **options
        `batch_size`, `workers`, `max_pixels`, `device`, `precision`, `compile` and `augmentation`,
        as for `extract`.

    Yields
    ------
    Batch
        Features and failures of the next images.
    """
    asked = Options(**options)
    wanted = np.arange(len(images)) if rows is None else np.asarray(rows, np.int64)
    with reuse_memory():
        yield from compute(images, asked.runtime(backbone, len(wanted)), wanted, asked)


def canary_features(
    backbone: Backbone, images: Sequence[bytes], **options: Any
) -> dict[str, np.ndarray]:
    """Compute the features of canary images.

    Parameters
    ----------
    backbone : Backbone
        The network.
    images : sequence of bytes
        Image files, as `featcache.pixels.canary.images` makes them or a store keeps them.
    **options
        `device` and `precision`, as for `extract`.

    Returns
    -------
    dict of str to ndarray of float32, shape (k, ...)
        Features by tap.
    """
    runtime = Options(**options).runtime(backbone, len(images))
    with reuse_memory():
        return of_canaries(runtime, images)
