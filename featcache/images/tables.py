"""Columns of text, one value an image, as arrays of numpy's `StringDType`.

Ten million ids are then one array of 16 bytes a row and the text itself, and no Python objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.dtypes import StringDType

from featcache.errors import ImageSetError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def column(texts: Iterable[str], source: str) -> NDArray[Any]:
    """Return texts as an array of `StringDType`, shape (n,).

    Raises
    ------
    ImageSetError
        If a text is not valid Unicode. The message names `source`.
    """
    try:
        return np.fromiter(texts, StringDType())
    except UnicodeEncodeError as error:
        raise ImageSetError(f"{source}: {error.object!r} is not valid Unicode") from error
