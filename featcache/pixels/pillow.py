"""What it takes to use Pillow on any file: no noise, no address in a message, no trust in EXIF."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Pillow logs what it cannot decode; without any handler Python would print that.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ORIENTATION = 0x0112  # EXIF tag


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is loaded: 1 to 8, 1 is upright.

    Damaged EXIF data say nothing: the picture is taken as it is.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises whatever the bytes make it raise
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def reason(error: Exception) -> str:
    """Return an exception's type and message on one line, the same in every run."""
    text = " ".join(str(error).split())
    text = re.sub(r" at 0x[0-9a-f]+", "", text)[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Quiet:
    """Ignores the warnings of Pillow while any thread decodes.

    ``warnings.catch_warnings`` saves and restores one list for the whole process, so that threads
    whose blocks overlap would restore it in the wrong order. Here the first thread to come in
    saves, and the last to leave restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._saved = _without_warnings()
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)


def _without_warnings() -> warnings.catch_warnings[None]:
    """Enter a ``catch_warnings`` in which Pillow's warnings are ignored, and return it."""
    saved: warnings.catch_warnings[None] = warnings.catch_warnings()
    saved.__enter__()
    # Some of Pillow's warnings are attributed to its caller, one of these modules.
    warnings.filterwarnings("ignore", module=r"(PIL|pillow_\w+)(\.|$)|featcache\.(images|pixels)\.")
    return saved


quiet = _Quiet()
"""Context in which Pillow's warnings are ignored; may be entered by several threads at once."""
