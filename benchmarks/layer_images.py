"""What the networks of images share: their sizes and their data; see `layers.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from layer_nets import Weights
from layer_task import Task

CLASSES = 10
HAND, FOR_LOOPS = "JAX by hand", "JAX by hand, for loops"


class Block(NamedTuple):
    """A block: its number as text, features before and after, and the stride."""

    name: str
    before: int
    features: int
    stride: int


class Images(NamedTuple):
    """A network: the features of the stem, what follows, and the size of a batch and an image."""

    stem: int
    blocks: tuple[Block, ...]
    batch: int
    side: int


def sized(stem: int, *stages: tuple[int, int, int], batch: int = 32, side: int = 32) -> Images:
    """A network with stages (features, blocks, stride of the first)."""
    blocks, before = [], stem
    for features, count, stride in stages:
        for i in range(count):
            blocks.append(Block(str(len(blocks)), before, features, 1 if i else stride))
            before = features
    return Images(stem, tuple(blocks), batch, side)


def task_of(
    title: str,
    images: Images,
    weights: Weights,
    networks: Mapping[str, Callable],
    torch: Callable,
    rate: float,
) -> Task:
    """`torch(images, weights, channels_last)` is the network of PyTorch."""
    made = {name: functools.partial(make, images) for name, make in networks.items()}
    made["PyTorch eager"] = functools.partial(torch, images, weights, False)
    made["PyTorch eager, channels_last"] = functools.partial(torch, images, weights, True)
    return Task(
        f"{title}, batch {images.batch} of {images.side}x{images.side}, plain SGD",
        functools.partial(pictures, images),
        "cross entropy",
        weights,
        made,
        rate=rate,
        # On a CPU XLA leaves its fast path for the gradients of convolutions inside a loop.
        slow=[name for name in made if not name.startswith(("jaxnet", "PyTorch", FOR_LOOPS))],
        references={"step loop": FOR_LOOPS},
    )


def pictures(images: Images, steps: int):
    """Noise with a pattern that belongs to the class, and the classes."""
    random = np.random.default_rng(1)
    patterns = random.normal(size=(CLASSES, images.side, images.side, 3))
    labels = random.integers(0, CLASSES, (steps, images.batch), np.int32)
    noise = random.normal(size=(steps, images.batch, images.side, images.side, 3))
    return (noise + patterns[labels]).astype(np.float32), labels


def kernel(random: Any, *shape: int) -> np.ndarray:
    """Normal with a variance of 2 over the number of inputs of a feature."""
    return (random.normal(size=shape) * math.sqrt(2 / math.prod(shape[:-1]))).astype(np.float32)


def zeros(features: int) -> np.ndarray:
    return np.zeros(features, np.float32)


def norm(name: str, features: int) -> Weights:
    return {f"{name}/scale": np.ones(features, np.float32), f"{name}/bias": zeros(features)}
