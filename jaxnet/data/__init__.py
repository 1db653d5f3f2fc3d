"""Real data as plain NumPy arrays, and batches of them."""

from jaxnet.data.batching import batches
from jaxnet.data.idx import read_idx, write_idx
from jaxnet.data.mnist_files import mnist
from jaxnet.data.optical_digits import digits
from jaxnet.data.splits import Dataset, Split, check_labels
from jaxnet.data.windows import Windows

__all__ = [
    "Dataset",
    "Split",
    "Windows",
    "batches",
    "check_labels",
    "digits",
    "mnist",
    "read_idx",
    "write_idx",
]
