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
from typing import Any

import lazy_loader

from featcache.version import __version__ as __version__

# The public names stand in __init__.pyi alone.
_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    from featcache.system.console import doing

    collecting = gc.isenabled()
    gc.disable()
    try:
        with doing(
            None if name in __all__ else False, f"loading the libraries of featcache.{name}"
        ):
            return _import_name(name)
    finally:
        if collecting:
            gc.enable()
