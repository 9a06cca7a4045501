"""JSON from a file, held to the types that the fields of a dataclass have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from featcache.errors import PredictorError


def check_types(name: str, value: Any, kind: Any) -> None:
    """Refuse JSON of another type than it should have, wherever in it that is.

    Parameters
    ----------
    name : str
        What the value is called; what is inside it has dotted names.
    value : Any
        From JSON.
    kind : Any
        The type that it should have, or a union of one and None. A dict or a dataclass has the
        types by key: no other key may be there, and one that is missing counts as None. A tuple is
        a list in JSON. No bool is taken for an int, and floats are finite.

    Raises
    ------
    PredictorError
        With the name of the value.

    Examples
    --------
    >>> check_types("row", {"head": "svm", "notes": []}, {"head": str, "notes": tuple[str, ...]})
    """
    if isinstance(kind, UnionType):
        kind = get_args(kind)[value is None]
    if is_dataclass(kind):
        kind = get_type_hints(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, dict) and isinstance(value, dict):
        for key in kind | value:
            check_types(f"{name}.{key}".lstrip("."), value.get(key), kind.get(key))
    elif (
        origin is tuple
        and isinstance(value, list)
        and (inner[-1] is ... or len(inner) == len(value))
    ):
        for one in value:
            check_types(name, one, inner[0])
    elif type(value) is not {Mapping: dict}.get(origin, kind) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise PredictorError(f"Its {name!r} is {value!r:.80}, which no predictor has there.")
