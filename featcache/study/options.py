"""How heads are trained and compared: one object that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featcache.errors import TrainingError
from featcache.heads.search import SearchOptions

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions(SearchOptions):
    """What all heads of a comparison are trained under; see `featcache.train`.

    Raises
    ------
    TrainingError
        A number that is out of range.
    """

    cv: int = 5
    group: bool = False
    nested: bool = False

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < 1:
            raise TrainingError(f"memory is a number of bytes, at least 1, not {self.memory}")
        if self.n_jobs == 0:
            raise TrainingError("n_jobs is the number of fits at a time, or -1: one a core; not 0")

    def to_request(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        names = ("cv", "group", "scoring", "class_weight", "nested", "random_state")
        return {name: getattr(self, name) for name in names}
