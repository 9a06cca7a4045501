"""A network as it was asked for: known, compared and kept without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from featcache.version import __version__

__all__ = ["as_asked"]


def as_asked(
    network: str,
    *,
    weights: str | Path | None = "auto",
    layers: Iterable[str] | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Return the arguments of a `Backbone` as JSON values, with all that they depend on.

    Equal values ask for the same features: they hold the versions of the libraries that names are
    looked up in, and the state of a weights file. Unequal values say nothing.

    Parameters
    ----------
    network, weights, layers, options
        As for `Backbone`; options that are left out, None or False say the same.

    Returns
    -------
    dict or None
        None for a callable: only what it returns tells which network it is.
    """
    if ":" in network:
        return None
    library = "timm" if network.startswith("timm/") else "torchvision"
    try:
        versions = {library: metadata.version(library), "featcache": __version__}
    except metadata.PackageNotFoundError:
        return None
    file = Path(weights or "").expanduser()
    state = None
    if weights and file.is_file():
        status = file.stat()
        state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return {
        "network": network,
        "weights": None if weights in (None, "none") else str(weights),
        "file": state and [str(file.absolute()), *state],
        "layers": [layers] if isinstance(layers, str) else list(layers or ()),
        "versions": versions,
        **{name: value for name, value in options.items() if value},
    }
