"""Compute image features once with a frozen network, keep them in HDF5, train on them in seconds.

>>> import featcache as fc
>>> images = fc.ImageSet.from_folder("flowers")  # doctest: +SKIP
>>> backbone = fc.Backbone.from_torchvision("resnet50", layers=["avgpool"])  # doctest: +SKIP
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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.backbone import Backbone, backbones
    from featcache.curves import LearningCurve, learning_curve
    from featcache.decoding import Augmentation, Preprocessing
    from featcache.errors import FeatcacheError
    from featcache.evaluation import Evaluation, evaluate
    from featcache.extraction import extract
    from featcache.fingerprint import Fingerprint
    from featcache.images import ImageSet
    from featcache.plots import (
        plot_confusion,
        plot_embedding,
        plot_leaderboard,
        plot_learning_curve,
        plot_reliability,
    )
    from featcache.predictor import Prediction, Predictor
    from featcache.report import write_report
    from featcache.store import FeatureStore
    from featcache.suffix_settings import SuffixSettings
    from featcache.taps import Tap
    from featcache.training import Leaderboard, compare, study, train

_MODULE_OF = {
    "Augmentation": "decoding",
    "Backbone": "backbone",
    "Evaluation": "evaluation",
    "FeatcacheError": "errors",
    "FeatureStore": "store",
    "Fingerprint": "fingerprint",
    "ImageSet": "images",
    "Leaderboard": "training",
    "LearningCurve": "curves",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "Preprocessing": "decoding",
    "SuffixSettings": "suffix_settings",
    "Tap": "taps",
    "backbones": "backbone",
    "compare": "training",
    "evaluate": "evaluation",
    "extract": "extraction",
    "learning_curve": "curves",
    "plot_confusion": "plots",
    "plot_embedding": "plots",
    "plot_leaderboard": "plots",
    "plot_learning_curve": "plots",
    "plot_reliability": "plots",
    "study": "training",
    "train": "training",
    "write_report": "report",
}

__all__ = [
    "Augmentation",
    "Backbone",
    "Evaluation",
    "FeatcacheError",
    "FeatureStore",
    "Fingerprint",
    "ImageSet",
    "Leaderboard",
    "LearningCurve",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "SuffixSettings",
    "Tap",
    "backbones",
    "compare",
    "evaluate",
    "extract",
    "learning_curve",
    "plot_confusion",
    "plot_embedding",
    "plot_leaderboard",
    "plot_learning_curve",
    "plot_reliability",
    "study",
    "train",
    "write_report",
]


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
