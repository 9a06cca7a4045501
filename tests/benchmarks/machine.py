"""What a benchmark's figures were taken on: every script prints it first."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


def machine(*packages: str) -> str:
    """Return processor, cores, load and the versions of Python and of some packages."""
    model = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    versions = [f"Python {platform.python_version()}", *map(_version, packages)]
    return f"{model}, {load}; {', '.join(versions)}"


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"
