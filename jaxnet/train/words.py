"""Values in a few words, for errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["batch_in_words", "describe", "shape_of", "spec_of"]


def describe(x: Any) -> str:
    """A value in a few words."""
    if isinstance(x, Mapping):
        return f"a dict with {', '.join(map(repr, list(x)[:4]))}" + (" ..." if len(x) > 4 else "")
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    if type(x) is tuple:
        return f"({', '.join(describe(part) for part in x[:4])})"
    if callable(x) and hasattr(x, "__qualname__"):
        return f"the function {x.__qualname__}"
    if isinstance(x, Sequence) and not isinstance(x, str):
        return f"a {type(x).__name__} of {len(x)}"
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def batch_in_words(batch: Any) -> str:
    """The form of a batch, with the shapes and dtypes of its parts."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return f"{batch.dtype}{list(np.shape(batch))}"
    kind = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        parts = [f"{name!r}: {batch_in_words(part)}" for name, part in list(batch.items())[:8]]
        return f"a dict with {', '.join(parts)}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        fields: tuple[str, ...] = getattr(batch, "_fields", ())
        pairs = zip(fields, batch, strict=True)
        return f"{kind} with {', '.join(f'{name}: {batch_in_words(part)}' for name, part in pairs)}"
    if isinstance(batch, tuple | list):
        return f"{kind} of {len(batch)}: {', '.join(batch_in_words(part) for part in batch[:8])}"
    return kind


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array or a number, without reading it."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def spec_of(leaf: Any) -> str:
    """The dtype and shape of a leaf, as in 'float32[3]'."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return f"{dtype}{list(jnp.shape(leaf))}"
