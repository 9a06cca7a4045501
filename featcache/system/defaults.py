"""The settings of numpy, scikit-learn and torch that heads are computed under, whatever is set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["library_defaults"]


@contextlib.contextmanager
def library_defaults() -> Iterator[None]:
    """Compute as if the program around had changed no setting; put them back afterwards.

    That is for scikit-learn its whole configuration, for torch the default device and type, and for
    numpy what happens at overflow and the like: what is ignored stays so, nothing is raised.

    Examples
    --------
    >>> with np.errstate(all="raise"), library_defaults():
    ...     float(np.exp(np.float64(-1000.0)))
    0.0
    """
    import torch
    from sklearn import config_context

    dtype = torch.get_default_dtype()
    modes: dict[str, Any] = {
        name: "ignore" if how == "ignore" else "warn" for name, how in np.geterr().items()
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(**{**modes, "under": "ignore"}))
        stack.enter_context(
            config_context(
                assume_finite=False,
                transform_output="default",
                array_api_dispatch=False,
                enable_metadata_routing=False,
                skip_parameter_validation=False,
            )
        )
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
