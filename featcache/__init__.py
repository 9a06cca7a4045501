"""Compute image features once with a frozen network, keep them in HDF5, train on them in seconds.

>>> import featcache as fc
>>> images = fc.ImageSet.from_folder("flowers")  # doctest: +SKIP
>>> backbone = fc.Backbone("resnet50", layers=["avgpool"])  # doctest: +SKIP
>>> store = fc.extract(images, backbone, "flowers.h5")  # doctest: +SKIP

Names are imported when they are first used, so that ``import featcache`` and
``featcache --help`` load neither torch nor scikit-learn. Meanwhile Python's garbage collector
rests: it would go through all that torch and scikit-learn define, several times, and free nothing
of it, which was a quarter of the start of every command.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featcache.version import __version__ as __version__

if TYPE_CHECKING:
    from featcache.errors import FeatcacheError as FeatcacheError
    from featcache.extraction.extract import extract as extract
    from featcache.finetuning.settings import SuffixSettings as SuffixSettings
    from featcache.fingerprint import Fingerprint as Fingerprint
    from featcache.images.image_set import ImageSet as ImageSet
    from featcache.networks.backbone import Backbone as Backbone
    from featcache.networks.backbone import backbones as backbones
    from featcache.networks.taps import Tap as Tap
    from featcache.pixels.preprocessing import Preprocessing as Preprocessing
    from featcache.pixels.views import Augmentation as Augmentation
    from featcache.predictor.predictor import Prediction as Prediction
    from featcache.predictor.predictor import Predictor as Predictor
    from featcache.report.data import write_report as write_report
    from featcache.report.plots import plot_confusion as plot_confusion
    from featcache.report.plots import plot_embedding as plot_embedding
    from featcache.report.plots import plot_leaderboard as plot_leaderboard
    from featcache.report.plots import plot_learning_curve as plot_learning_curve
    from featcache.report.plots import plot_reliability as plot_reliability
    from featcache.results.evaluation import Evaluation as Evaluation
    from featcache.results.leaderboard import Leaderboard as Leaderboard
    from featcache.store.store import FeatureStore as FeatureStore
    from featcache.study.evaluate import evaluate as evaluate
    from featcache.study.learning_curve import LearningCurve as LearningCurve
    from featcache.study.learning_curve import learning_curve as learning_curve
    from featcache.study.train import compare as compare
    from featcache.study.train import train as train
    from featcache.study.train import train_files as train_files

# The one table of public names, by module.
_NAMES = {
    "errors": ("FeatcacheError",),
    "extraction.extract": ("extract",),
    "finetuning.settings": ("SuffixSettings",),
    "fingerprint": ("Fingerprint",),
    "images.image_set": ("ImageSet",),
    "networks.backbone": ("Backbone", "backbones"),
    "networks.taps": ("Tap",),
    "pixels.preprocessing": ("Preprocessing",),
    "pixels.views": ("Augmentation",),
    "predictor.predictor": ("Prediction", "Predictor"),
    "report.data": ("write_report",),
    "report.plots": (
        "plot_confusion",
        "plot_embedding",
        "plot_leaderboard",
        "plot_learning_curve",
        "plot_reliability",
    ),
    "results.evaluation": ("Evaluation",),
    "results.leaderboard": ("Leaderboard",),
    "store.store": ("FeatureStore",),
    "study.evaluate": ("evaluate",),
    "study.learning_curve": ("LearningCurve", "learning_curve"),
    "study.train": ("compare", "train", "train_files"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


@contextmanager
def _collector_resting() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    with _collector_resting():
        value = getattr(importlib.import_module(f"featcache.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
