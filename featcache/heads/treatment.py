"""Row-wise treatments of features that come before a head.

They learn nothing, so they cannot leak from one fold into another, and are applied to blocks as
they are read. What does learn (scaling, PCA) is fitted inside each fold.
"""

from __future__ import annotations

from featcache.heads.steps import Power, Step, Unit

TREATMENTS: dict[str, Step | None] = {"standard": None, "l2": Unit(), "power": Power()}
"""Name of a treatment to its step; None for features as they are."""
