"""What a data set is, and batches of it for a training loop of one's own."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxnet.checks import size_of

Tree = TypeVar("Tree")


class Split(NamedTuple):
    """One part of a data set; also the shape of a batch. It unpacks: `images, labels =
    data.train`.
    """

    images: NDArray[Any]  # float32 [N, H, W, C] in [0, 1]
    labels: NDArray[Any]  # int32 [N], 0..classes-1

    def __repr__(self) -> str:
        return f"Split(images={_brief(self.images)}, labels={_brief(self.labels)})"


class Dataset(NamedTuple):
    """Images to train on and images to test on."""

    train: Split
    test: Split

    @property
    def classes(self) -> int:
        """The number of classes: the largest label of either part, plus one."""
        return 1 + max(int(part.labels.max()) for part in self if part.labels.size)

    def __repr__(self) -> str:
        # jax.tree.map may have put anything in here: count only what surely can be counted
        labels = [getattr(part, "labels", None) for part in self]
        countable = all(
            isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.size for x in labels
        )
        classes = f", classes={self.classes}" if countable else ""
        return f"Dataset(train={self.train!r}, test={self.test!r}{classes})"


def batches(
    data: Tree,
    batch_size: int,
    *,
    seed: int | None = None,
    epochs: int = 1,
    drop_last: bool = False,
) -> Iterator[Tree]:
    """Yield `data` in batches of `batch_size` along the leading axis, `epochs` times over.

    Args:
        data: a dict, tuple, named tuple or list (nested at will) of arrays [N, ...] with one N, or
            a single array. Series, frames and tensors of other libraries are read by position.
        batch_size: examples per batch.
        epochs: passes over the data.
        seed: shuffles, anew for each epoch; the order is fixed by (seed, epoch) whatever the number
            of epochs or the batch size, and does not change with NumPy's version. None keeps the
            order, and the batches are views.
        drop_last: leave out an epoch's last batch where it is smaller (a compiled step then sees a
            single shape).

    Yields:
        The same structure, leaves [batch_size, ...]; the last of an epoch [N % batch_size, ...] if
        that is not 0.

    Raises:
        ValueError: at the call, for no data, leaves of unequal length, or a batch larger than the
            data.
        TypeError: at the call, for a list of numbers or of examples, and for masked entries.
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


def check_labels(labels: Any, classes: int) -> None:
    """Check that labels (integers of any shape) lie within 0..classes-1.

    Worth a call before training: indexing under `jit` cannot raise, so JAX answers a label out of
    range with NaN or with the loss of another class.

    Raises:
        TypeError: they are not integers.
        ValueError: names the first bad label and its index.
    """
    classes = size_of("check_labels: classes", classes)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(
            f"check_labels: labels must be integers, got {labels.dtype}; cast with "
            ".astype(np.int32)"
        )
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        index = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"check_labels: labels must be within 0..{classes - 1}, got {labels[index]} at index "
            f"{index[0] if len(index) == 1 else index} ({np.count_nonzero(bad)} of {labels.size} "
            "are outside); renumber them from 0, or raise `classes`"
        )


def permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A random order of 0..n-1, the same for ever for one (seed, stream).

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
                f"batches: a list of {len(data)} numbers is no array; make it one, with np.asarray"
            )
        if len(data) > _MANY and len(shapes) == 1:
            raise TypeError(
                f"batches: a list of {len(data)} arrays {list(*shapes)}; make it one array, with "
                "np.stack"
            )
        if len(data) > _MANY and all(isinstance(x, list | tuple | dict) for x in data):
            raise TypeError(
                f"batches: a list of {len(data)} examples; stack each of their parts, with np.stack"
            )
    for child in (
        data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ()
    ):
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


def _brief(leaf: Any) -> str:
    return (
        f"{leaf.dtype}{list(leaf.shape)}"
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        else repr(leaf)
    )
