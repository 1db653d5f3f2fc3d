"""Keys of children, and the stand-in for a key that would be drawn from more than once."""

from __future__ import annotations

import functools
import zlib
from typing import Any, NoReturn

import jax
import jax.core
import numpy as np

__all__ = ["SharedKey", "fold", "fold_all", "fold_copies", "is_threefry"]


def fold(key: Any, name: str) -> Any:
    """Derive the key of a child: fold_in(key, crc32(name)).

    It depends on the name alone, so adding or removing siblings does not change it.

    Args:
      key: the PRNG key of the parent.
      name: the name of the child.

    Returns:
      The PRNG key of the child.
    """
    return _fold_in(key, np.uint32(zlib.crc32(name.encode())))


@functools.partial(jax.jit, inline=True)
def _fold_in(key, code):
    # Outside of a compiled function, a jitted call takes a sixth of the time of `fold_in` itself.
    return jax.random.fold_in(key, code)


def fold_all(key: Any, names: list[str]) -> dict[str, Any]:
    """Derive the keys of several children, as `fold` does.

    For a traced key, one operation serves all names, which compiles much faster.

    Args:
      key: the PRNG key of the parent.
      names: the names of the children.

    Returns:
      The PRNG keys by name.
    """
    if not isinstance(key, jax.core.Tracer) or not is_threefry(key) or len(names) < 2:
        return {name: fold(key, name) for name in names}
    codes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    return dict(zip(names, jax.vmap(jax.random.fold_in, (None, 0))(key, codes), strict=True))


def fold_copies(key: Any, n: int) -> Any:
    """Derive the keys of n copies of a layer: fold_in(key, i) for copy i.

    Args:
      key: the PRNG key of the layer.
      n: the number of copies.

    Returns:
      The PRNG keys, [n].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(n))


def is_threefry(key: Any) -> bool:
    """Tell whether a key is of JAX's default generator. Others may draw and fold differently under
    vmap.

    Args:
      key: a PRNG key, typed or raw.

    Returns:
      True for a key of threefry2x32.
    """
    return str(jax.random.key_impl(key)) == "threefry2x32"


class SharedKey:
    """A placeholder for a key inside a raw JAX transform, where each iteration would draw the same
    numbers.

    Any use raises RuntimeError with the remedy. Layers that draw nothing never use it.

    Args:
      label: the label of the layer that would draw.
      name: the name of that layer in its parent.
    """

    def __init__(self, label: str, name: str):
        self.__dict__.update(label=label, name=name)

    def refuse(self) -> NoReturn:
        """Raise the error.

        Raises:
          RuntimeError: always.
        """
        raise RuntimeError(
            f"{self.label}: random numbers are drawn inside a raw JAX transform (scan, vmap, "
            "checkpoint, ...), where each turn would draw the same ones; pass a key, "
            f"f.{self.name}(..., key=jax.random.fold_in(f.key, i)), or key=f.key if the same "
            "numbers are wanted; jaxnet.scan, vmap, repeat and remat give each turn its key"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        self.refuse()

    def __iter__(self) -> NoReturn:
        self.refuse()

    def __getitem__(self, index: Any) -> NoReturn:
        self.refuse()
