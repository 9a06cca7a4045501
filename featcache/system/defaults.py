"""The settings of numpy, scikit-learn and torch that heads are computed under, whatever is set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["library_defaults", "torch_defaults"]


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Make and run networks with torch's defaults, whatever the program around has set.

    New tensors are float32 on the processor, and gradients are computed. Inside, a network that
    computes none switches them off by itself.
    """
    import torch

    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def library_defaults() -> Iterator[None]:
    """Compute as if the program around had changed no setting; put them back afterwards.

    That is for scikit-learn its whole configuration, for torch what `torch_defaults` sets, and for
    numpy what happens at overflow and the like: what is ignored stays so, nothing is raised.

    Examples
    --------
    >>> with np.errstate(all="raise"), library_defaults():
    ...     float(np.exp(np.float64(-1000.0)))
    0.0
    """
    from sklearn import config_context

    modes: dict[str, Any] = {
        name: "ignore" if how == "ignore" else "warn" for name, how in np.geterr().items()
    }
    configured = config_context(
        assume_finite=False,
        transform_output="default",
        array_api_dispatch=False,
        enable_metadata_routing=False,
        skip_parameter_validation=False,
    )
    with np.errstate(**{**modes, "under": "ignore"}), configured, torch_defaults():
        yield
