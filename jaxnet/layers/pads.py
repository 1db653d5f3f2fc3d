"""The paddings of convolutions: those of `jaxnet.ops`, and elements of the input in place of
zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxnet.layers.spatial import pads_along

__all__ = ["Padding", "convolution_padding"]

# Modes of `jax.numpy.pad`.
MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class Padding(NamedTuple):
    """A padding that `jaxnet.ops` knows, and how to make it.

    Attributes:
      pads: "SAME", "SAME_LOWER", "VALID", or (before, after) per spatial axis.
      mode: the mode of `jax.numpy.pad` that makes the elements; None for zeros.
    """

    pads: Any
    mode: str | None = None

    def extend(self, x: Any, rank: int) -> tuple[Any, Any]:
        """Add the elements that are not zeros.

        Args:
          x: images, [N, *spatial, C].
          rank: the number of spatial axes.

        Returns:
          (x with these elements, the padding that is left for the operation).
        """
        if self.mode is None:
            return x, self.pads
        return jnp.pad(x, ((0, 0), *self.pads, (0, 0)), mode=self.mode), ((0, 0),) * rank


def convolution_padding(
    what: str, padding: Any, window: tuple[int, ...], dilation: tuple[int, ...]
) -> Padding:
    """Convert the option `padding` of a convolution.

    Args:
      what: how errors name the option.
      padding: the option.
      window: the window along each spatial axis.
      dilation: the step between its elements.

    Returns:
      The padding.

    Raises:
      ValueError: it has no known form.
    """
    rank = len(window)
    padding = pads_along(what, padding, rank)
    if not isinstance(padding, str):
        return Padding(padding)
    name = padding.upper()
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    if name in MODES:
        return Padding(tuple(((span - 1) // 2, span // 2) for span in spans), MODES[name])
    if name == "CAUSAL" and rank == 1:
        return Padding(((spans[0] - 1, 0),))
    if name not in ("SAME", "SAME_LOWER", "VALID"):
        raise ValueError(
            f"{what} must be 'SAME', 'VALID', an int or (before, after) for each of the {rank} "
            "spatial axes, or 'SAME_LOWER', 'CIRCULAR', 'REFLECT' or, for one axis, 'CAUSAL', got "
            f"{padding!r}"
        )
    return Padding(padding)
