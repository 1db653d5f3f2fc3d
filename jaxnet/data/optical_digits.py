"""The handwritten digits that come with scikit-learn: real data without a download."""

import importlib.util
import pathlib

import numpy as np

from jaxnet.data.batching import permutation
from jaxnet.data.splits import Dataset, Split


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """Load scikit-learn's handwritten digits, 1,797 images of 8x8 pixels in 10 classes.

    The split is random, always the same for equal arguments, and keeps the share of each class. All
    images come from 13 writers, and the data do not say who wrote which image, so the same writers
    are in both parts. The test error is therefore that on new digits of known writers, which is
    lower than that of unknown writers.

    Source: E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998 (the 1,797 images of its test part),
    https://archive.ics.uci.edu/dataset/80

    Args:
      test_fraction: the share of each class that is for testing.
      seed: the seed of the split.

    Returns:
      A `Dataset` with images float32 [N, 8, 8, 1] in steps of 1/16 (0 paper, 1 ink) and labels
      int32 [N].

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: a class would be left without test or training images.
    """
    pixels, labels = _published()
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    test = _test_rows(labels, test_fraction, seed)
    return Dataset(
        train=Split(images[~test], labels[~test]), test=Split(images[test], labels[test])
    )


def _published() -> tuple[np.ndarray, np.ndarray]:
    """`load_digits(return_X_y=True)` of scikit-learn, from the file in its folder. Importing the
    package would take a second.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = pathlib.Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() needs scikit-learn, which holds the images, and could not import it; "
            "install scikit-learn, e.g. `pip install -e '.[examples]'` in the checkout"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels), np.asarray(labels)


def _test_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A mask of the rows to test on, round(fraction * count) of each class. A mask keeps the rows
    in order, so the parts are not sorted by class.
    """
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        count = round(fraction * len(rows))
        if not 0 < count < len(rows):
            raise ValueError(
                f"digits: test_fraction must leave images on both sides, got {fraction}, "
                f"which takes {count} of the {len(rows)} of class {label}; try 0.2"
            )
        test[rows[permutation(len(rows), seed, int(label))[:count]]] = True
    return test
