"""Row-wise treatments of features that come before a head.

They learn nothing, so they cannot leak from one fold into another, and are applied to blocks as
they are read. What does learn (scaling, PCA) is fitted inside each fold.
"""

from __future__ import annotations

from typing import Any

from featcache.heads.base import FittedHead, fitted_head
from featcache.heads.steps import Power, Step, Unit

TREATMENTS: dict[str, Step | None] = {"standard": None, "l2": Unit(), "power": Power()}
"""Name of a treatment to its step; None for features as they are."""

unit_norm, power = Unit(), Power()


def with_treatment(treatment: str, estimator: Any, name: str) -> FittedHead:
    """Return a fitted estimator behind the step of its treatment, if that has one."""
    step, head = TREATMENTS[treatment], fitted_head(estimator)
    return head if step is None else FittedHead([step, *head.steps], head.classes)
