"""How heads are trained and compared: one object that checks itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, Self

from featcache.errors import TrainingError
from featcache.heads.search import SearchOptions, check_scoring

__all__ = ["TrainingOptions", "is_number"]


_FLAGS = ("group", "drop_crossing_groups", "nested")


@dataclass(frozen=True)
class TrainingOptions(SearchOptions):
    """What all heads of a comparison are trained under; see `featcache.train`.

    Raises
    ------
    TrainingError
        A value of another type, or out of range.
    """

    cv: int = 5
    group: bool = False
    drop_crossing_groups: bool = False
    nested: bool = False
    min_images: int = 1

    def __post_init__(self) -> None:
        weights, whole = self.class_weight, partial(is_number, Integral)
        if isinstance(weights, Mapping):
            sound = all(is_number(Real, weight, 0, math.inf) for weight in weights.values())
        else:
            sound = weights in (None, "balanced")
        for name, right, expected in (
            ("cv", whole(self.cv, 1), "a number of folds, at least 2"),
            ("min_images", whole(self.min_images, 0), "a number of images, at least 1"),
            ("memory", self.memory is None or whole(self.memory, 0), "a number of bytes"),
            ("n_jobs", self.n_jobs == -1 or whole(self.n_jobs, 0), "at least 1, or -1"),
            ("random_state", whole(self.random_state, -1, 2**32), "from 0 to 2**32 - 1"),
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in _FLAGS),
            ("class_weight", sound, "'balanced', None or positive weights by class"),
        ):
            if not right:
                raise TrainingError(f"{name} is {expected}, not {getattr(self, name)!r}.")
        check_scoring(self.decides)
        if self.drop_crossing_groups and not self.group:
            raise TrainingError("drop_crossing_groups goes with group=True (--group).")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Return options of their names, or refuse a name that is none."""
        known = [one.name for one in fields(cls) if one.name != "progress"]
        if unknown := options.keys() - known:
            raise TrainingError(f"There is no option {min(unknown)!r}. Options: {', '.join(known)}")
        return cls(**options)

    def to_request(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        left_out = ("n_jobs", "progress")
        return {name: value for name, value in vars(self).items() if name not in left_out}


def is_number(kind: type, value: Any, above: float, below: float = math.inf) -> bool:
    """Return whether a value is a number of this kind, between two others (excluded)."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return bool(above < value < below)  # type: ignore[operator]
