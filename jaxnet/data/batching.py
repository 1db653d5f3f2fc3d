"""Batches of data in memory."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from jaxnet.checks import size_of

Tree = TypeVar("Tree")


def batches(
    data: Tree,
    batch_size: int,
    *,
    seed: int | None = None,
    epochs: int = 1,
    drop_last: bool = False,
) -> Iterator[Tree]:
    """Iterate over batches of data along the leading axis.

    Args:
      data: arrays [N, ...] with the same N, in a dict, tuple, named tuple or list, which may be
        nested; or a single array. Series, frames and tensors of other libraries are read by
        position.
      batch_size: the number of examples per batch.
      seed: the seed of the order, which differs from epoch to epoch. The order of an epoch depends
        only on the seed and its number, not on the batch size or the version of NumPy. None keeps
        the order of the data, and the batches are then views.
      epochs: the number of passes over the data.
      drop_last: leave out the last batch of an epoch if it is smaller, so that a compiled step sees
        a single shape.

    Returns:
      An iterator over trees of the same structure, leaves [batch_size, ...]. The last batch of an
      epoch has leaves [N % batch_size, ...] if that is not 0.

    Raises:
      ValueError: there are no data, the leaves differ in length, or a batch is larger than the
        data. The call raises it, not the iterator.
      TypeError: the data are a list of numbers or of examples, or have masked entries.

    Example:
      >>> [batch.tolist() for batch in batches(np.arange(5), 2)]
      [[0, 1], [2, 3], [4]]
    """
    batch_size = size_of("batches: batch_size", batch_size)
    epochs = size_of("batches: epochs", epochs)
    seed = None if seed is None else size_of("batches: seed", seed, 0)
    _check_lists(data)
    arrays = _map(_as_array, data)
    n = _common_length(arrays)
    if batch_size > n:
        raise ValueError(
            f"batches: batch_size must be at most the {n} rows of the data, got {batch_size}; "
            "lower it"
        )
    # The generator is a separate function, so that errors come at the call.
    return _generate(arrays, n, batch_size, seed, epochs, drop_last)


def permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A random order of 0..n-1, always the same for equal (seed, stream).

    It sorts raw 64-bit draws, because NumPy promises stable streams for its bit generators but not
    for `Generator.permutation` (NEP 19).
    """
    draws = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,))).random_raw(n)
    return np.argsort(draws, kind="stable")


def _generate(
    arrays: Any, n: int, size: int, seed: int | None, epochs: int, drop_last: bool
) -> Iterator[Any]:
    end = n - n % size if drop_last else n
    for epoch in range(epochs):
        order = None if seed is None else permutation(n, seed, epoch)
        for start in range(0, end, size):
            rows = slice(start, start + size) if order is None else order[start : start + size]
            yield _map(lambda leaf, rows=rows: leaf[rows], arrays)


def _common_length(arrays: Any) -> int:
    lengths = {}
    for path, leaf in _leaves(arrays):
        if leaf.ndim == 0:
            raise ValueError(
                f"batches: '{path}' must be an array [N, ...], got {leaf!r}; give it a leading axis"
            )
        lengths[path] = len(leaf)
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"'{path}' has {length}" for path, length in lengths.items())
        raise ValueError(
            f"batches: all leaves must have the same leading length, got {listed}; cut or pad them"
        )
    n = next(iter(lengths.values()), 0)
    if n == 0:
        what = "leaves of length 0" if lengths else "no arrays at all"
        raise ValueError(
            f"batches: the data must have at least one row, got {what}; pass arrays [N, ...]"
        )
    return n


# A list of more arrays than this, all of one shape, is a list of examples.
_MANY = 16


def _check_lists(data: Any) -> None:
    """Raise TypeError for a list of examples, which would count as a container of as many
    arrays.
    """
    if isinstance(data, list) and data:
        shapes = {np.shape(x) for x in data if hasattr(x, "shape")}
        if all(isinstance(x, bool | int | float | np.generic) for x in data):
            raise TypeError(
                f"batches: the data must be arrays, got a list of {len(data)} numbers; convert it "
                "with np.asarray"
            )
        if len(data) > _MANY and len(shapes) == 1:
            raise TypeError(
                f"batches: the data must be arrays, got a list of {len(data)} arrays "
                f"{list(*shapes)}; make it one array with np.stack"
            )
        if len(data) > _MANY and all(isinstance(x, list | tuple | dict) for x in data):
            raise TypeError(
                f"batches: the data must be arrays, got a list of {len(data)} examples; stack each "
                "of their parts with np.stack"
            )
    children = data.values() if isinstance(data, dict) else data
    if isinstance(data, dict | list | tuple):
        for child in children:
            _check_lists(child)


def _as_array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise TypeError(
            "batches: an array has masked entries, which a batch would show; fill them first"
        )
    return np.asarray(leaf)


def _map(f: Callable[..., Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(f, child) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(f, child) for child in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_map(f, child) for child in tree)
    return f(tree)


def _leaves(tree: Any, path: tuple = ()) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
    else:
        yield "/".join(map(str, path)), tree
        return
    for name, child in children:
        yield from _leaves(child, (*path, name))
