"""How heads are trained and compared: one object that checks itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from featcache.errors import TrainingError
from featcache.heads.search import SearchOptions, check_scoring

__all__ = ["TrainingOptions"]


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
    nested: bool = False

    def __post_init__(self) -> None:
        weights = self.class_weight
        if isinstance(weights, Mapping):
            sound = all(_is(Real, weight, 0, math.inf) for weight in weights.values())
        else:
            sound = weights in (None, "balanced")
        for name, right, expected in (
            ("cv", _is(Integral, self.cv, 1), "a number of folds, at least 2"),
            ("memory", self.memory is None or _is(Integral, self.memory, 0), "a number of bytes"),
            ("n_jobs", self.n_jobs == -1 or _is(Integral, self.n_jobs, 0), "at least 1, or -1"),
            ("random_state", _is(Integral, self.random_state, -1, 2**32), "from 0 to 2**32 - 1"),
            ("class_weight", sound, "'balanced', None or positive weights by class"),
        ):
            if not right:
                raise TrainingError(f"{name} is {expected}, not {getattr(self, name)!r}")
        check_scoring(self.scoring)

    def to_request(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        names = ("cv", "group", "scoring", "class_weight", "nested", "random_state", "memory")
        return {name: getattr(self, name) for name in names}


def _is(kind: type, value: Any, above: float, below: float = math.inf) -> bool:
    """Return whether a value is a number of this kind, between two others (excluded)."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return bool(above < value < below)  # type: ignore[operator]
