"""Checks of parameters that the layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxnet.core import describe

__all__ = ["check_real"]


def check_real(label: str, params: Any) -> None:
    """Refuse complex parameters, because optimizers do not conjugate their gradients.

    Args:
      label: the name of the layer in errors.
      params: the parameters of the layer.

    Raises:
      TypeError: a parameter is complex.
    """
    # If params is not a dict, `layer` raises a better error.
    items = params.items() if isinstance(params, Mapping) else ()
    for name, param in items:
        if hasattr(param, "dtype") and jnp.issubdtype(param.dtype, jnp.complexfloating):
            raise TypeError(
                f"{label}: the parameter '{name}' must be real, got {describe(param)}; "
                "keep real and imaginary part as two parameters"
            )
