"""`train_files`: stores in, a predictor file out, and nothing to do twice: ``featcache train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import PredictorError
from featcache.finetuning.checkpoint import remove_checkpoints
from featcache.finetuning.search import SUFFIX
from featcache.finetuning.settings import SuffixSettings
from featcache.heads.table import CLASSICS
from featcache.predictor.file import is_predictor
from featcache.predictor.predictor import Predictor
from featcache.results.leaderboard import Leaderboard
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.options import TrainingOptions
from featcache.study.parts import hold_out, without_small
from featcache.study.train import head_names, train
from featcache.system.files import check_overwrite
from featcache.system.tables import printable
from featcache.version import __version__

if TYPE_CHECKING:
    from featcache.networks.backbone import Backbone

__all__ = ["TrainedFile", "train_files"]


@dataclass(frozen=True)
class TrainedFile:
    """The result of `train_files`.

    Attributes
    ----------
    predictor : Predictor
        The best by cross-validation, as saved.
    output : Path
        Where the predictor is.
    up_to_date : bool
        Nothing was trained: the file was made from the same features by the same request.
    """

    predictor: Predictor
    output: Path
    up_to_date: bool

    @property
    def leaderboard(self) -> Leaderboard:
        """All heads."""
        assert self.predictor.leaderboard is not None, "train makes one"
        return self.predictor.leaderboard

    def to_text(self) -> str:
        """Return the table, and where the predictor is, for people."""
        output = printable(str(self.output))
        last = f"saved: {output}"
        if self.up_to_date:
            last = (
                f"{output}: nothing to do, it was trained on the same features by the same request"
            )
        return f"{self.leaderboard.to_text()}\n{last}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "predictor": str(self.output),
            "up_to_date": self.up_to_date,
            "best": self.predictor.head,
            "leaderboard": self.leaderboard.to_dict(),
            "metrics": dict(self.predictor.metrics),
        }

    def __str__(self) -> str:
        return self.to_text()


def train_files(
    stores: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    head: str | Sequence[str] = (),
    layers: str | Sequence[str] | None = None,
    test_size: float | None = None,
    suffix: SuffixSettings | None = None,
    backbone: Backbone | None = None,
    progress: bool | None = None,
    **options: Any,
) -> TrainedFile:
    """Open stores, hold some images out, compare heads, and save the best: ``featcache train``.

    Parameters
    ----------
    stores : path or list of path
        Files of one fingerprint are put under each other, files of different ones side by side.
    output : path
        Where the predictor goes. Made by the same request from the same features, it is left.
    head : str or list of str
        As in `train`. Empty: linear, svm, rbf-svm and forest.
    test_size : float, optional
        Share to hold out. None: what the split column holds out, else a quarter. 0: nothing, to
        train on all images.
    layers, progress
        As in `train`.
    **options
        cv, group, drop_crossing_groups, scoring, class_weight, nested, min_images, memory, n_jobs
        and random_state, as in `train`. `min_images` counts before images are held out.
    suffix, backbone
        As in `train`. The checkpoints of the head ``suffix`` are in the folder
        ``OUTPUT.checkpoints`` until the predictor is saved; the same call resumes from them.

    Returns
    -------
    TrainedFile

    Raises
    ------
    StoreError
        A store cannot be opened or joined.
    TrainingError, Interrupted
        As in `train`.
    OutputError
        The output is there and is not a predictor, or the folder of checkpoints holds something
        else; found before anything is trained.
    """
    settings = TrainingOptions.of(**options)
    target, names = Path(output), head_names(head or CLASSICS)
    check_overwrite(target, is_predictor, "a featcache predictor")
    paths = [stores] if isinstance(stores, str | Path) else stores
    opened = [FeatureStore.open(path) for path in paths]
    request: dict[str, Any] = {
        "featcache": __version__,
        "scikit-learn": version("scikit-learn"),
        "stores": [store.digest for store in opened],
        "heads": names,
        "layers": layers if layers is None or isinstance(layers, str) else list(layers),
        "test_size": test_size,
        **settings.to_request(),
    }
    if SUFFIX in names:
        request["suffix"] = asdict(suffix or SuffixSettings())
    checkpoints = target.with_name(f"{target.name}.checkpoints")
    done = _up_to_date(target, request)
    if done is not None:
        if SUFFIX in names:  # the run that saved it may have been killed before it did this
            remove_checkpoints(checkpoints)
        return TrainedFile(done, target, up_to_date=True)
    store, _, small = without_small(_joined(opened), None, settings)
    fit, test = (store, None) if test_size == 0 else hold_out(store, test_size, settings)
    predictor = train(
        fit,
        test,
        head=names,
        layers=layers,
        suffix=suffix,
        backbone=backbone,
        checkpoints=checkpoints,
        progress=progress,
        **options | {"min_images": 1},
    )
    assert predictor.leaderboard is not None, "train makes one"
    unlabelled = splitting.n_unlabelled(store.labels)  # `split` left these out
    notes = (*small, *predictor.leaderboard.notes)
    predictor.leaderboard = replace(predictor.leaderboard, n_unlabelled=unlabelled, notes=notes)
    predictor.request = request
    predictor.save(target)
    if SUFFIX in names:
        remove_checkpoints(checkpoints)
    return TrainedFile(predictor, target, up_to_date=False)


def _up_to_date(target: Path, request: Mapping[str, Any]) -> Predictor | None:
    """Return the predictor at `target` if the same request made it."""
    try:
        found = Predictor.load(target)
    except PredictorError:
        return None  # there is none, or of another version, or damaged: it is made again
    return found if found.request == request and found.leaderboard is not None else None


def _joined(stores: Sequence[FeatureStore]) -> FeatureStore:
    """Put files of one fingerprint under each other, then those of several side by side."""
    by_origin: dict[str, list[str | Path]] = {}
    for store in stores:
        by_origin.setdefault(store.fingerprint.digest, []).extend(store.paths)
    return FeatureStore.join([FeatureStore.open(paths) for paths in by_origin.values()])
