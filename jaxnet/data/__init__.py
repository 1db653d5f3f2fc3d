"""Real data as plain NumPy arrays: IDX files, MNIST, the 8x8 digits, and batches and windows for a
loop of one's own.
"""

from .batching import Dataset, Split, batches, check_labels
from .idx import read_idx, write_idx
from .mnist_files import mnist
from .optical_digits import digits
from .windows import Windows

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
