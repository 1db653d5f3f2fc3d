"""The kernels of transposed convolutions, which Flax, Haiku and Equinox do not flip.

They compute y[o] = sum over w of x'[o + w - lo] k[w] of an x' with zeros between its elements;
jaxnet, Keras and PyTorch compute the gradient of a convolution, y[i s + w - lo] = sum of x[i] k[w].
One is the other with the kernel flipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxnet.checkpoint.words import shown

__all__ = ["with_flipped", "with_transposed"]


def with_flipped(
    leaves: Mapping[str, Any], patterns: str | Iterable[str], name: str, *, exchange: bool
) -> dict[str, Any]:
    """Flip the kernels of some modules.

    Args:
      leaves: arrays by path.
      patterns: a pattern of paths of modules, or several.
      name: the name of a kernel.
      exchange: whether to exchange the last two axes, too.

    Returns:
      The arrays by path.

    Raises:
      ValueError: a pattern matches no module with a kernel.
    """
    from jaxnet import tree

    result = dict(leaves)
    kernels = [path for path in leaves if path.rpartition("/")[2] == name]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [path for path in kernels if tree.matches(path.rpartition("/")[0], pattern)]
        if not hits:
            modules = ", ".join(shown(path.rpartition("/")[0]) for path in kernels[:5])
            raise ValueError(
                f"transposed: '{shown(pattern)}' matches no module with a kernel, such as {modules}"
            )
        for path in hits:
            result[path] = _flipped(leaves[path], exchange)
    return result


def with_transposed(model: Any) -> Any:
    """Bring the kernels of Equinox's transposed convolutions into the form of PyTorch.

    Args:
      model: a module of Equinox.

    Returns:
      The same tree with kernels [in, out / groups, *window], flipped, in place of [out, in /
      groups, *window].
    """
    import jax

    def is_transposed(x: Any) -> bool:
        return hasattr(x, "output_padding") and hasattr(x, "weight") and hasattr(x, "groups")

    def changed(x: Any) -> Any:
        if not is_transposed(x):
            return x
        leaves, structure = jax.tree.flatten(x)
        new = [_of_torch(leaf, x.groups) if leaf is x.weight else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, new)

    return jax.tree.map(changed, model, is_leaf=is_transposed)


def _of_torch(weight: Any, groups: int) -> Any:
    """[out, in / groups, *window] -> [in, out / groups, *window], flipped."""
    import numpy as np

    x = np.asarray(weight)
    x = np.flip(x, tuple(range(2, x.ndim)))
    x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _flipped(kernel: Any, exchange: bool) -> Any:
    import numpy as np

    x = np.asarray(kernel)
    x = np.flip(x, tuple(range(x.ndim - 2)))
    return x.swapaxes(-1, -2) if exchange else x
