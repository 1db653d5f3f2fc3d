"""Data sets of images: their parts, their labels."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxnet.checks import size_of


class Split(NamedTuple):
    """One part of a data set, or a batch. It unpacks: `images, labels = data.train`.

    Attributes:
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N] in 0..classes-1.
    """

    images: NDArray[Any]
    labels: NDArray[Any]

    def __repr__(self) -> str:
        return f"Split(images={_brief(self.images)}, labels={_brief(self.labels)})"


class Dataset(NamedTuple):
    """A data set of images.

    Attributes:
      train: the part for training.
      test: the part for testing.
    """

    train: Split
    test: Split

    @property
    def classes(self) -> int:
        """The number of classes: the largest label of either part, plus one."""
        return 1 + max(int(part.labels.max()) for part in self if part.labels.size)

    def __repr__(self) -> str:
        # After `jax.tree.map` the parts may be anything. Only arrays of integers can be counted.
        labels = [getattr(part, "labels", None) for part in self]
        countable = all(
            isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.size for x in labels
        )
        classes = f", classes={self.classes}" if countable else ""
        return f"Dataset(train={self.train!r}, test={self.test!r}{classes})"


def check_labels(labels: Any, classes: int) -> None:
    """Check that labels are within 0..classes-1.

    Call it before training: indexing under `jit` cannot raise, so a label out of range would give
    NaN, or the loss of another class.

    Args:
      labels: integers, [...].
      classes: the number of classes.

    Raises:
      TypeError: the labels are not integers.
      ValueError: a label is out of range; the message has the first one and its index.
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


def _brief(leaf: Any) -> str:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf)
