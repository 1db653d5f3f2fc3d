"""ResNet-20 with batch norm in every library; see `layers.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import layer_nets as nets
from layer_images import CLASSES, FOR_LOOPS, HAND, Images, sized, task_of
from layer_nets import Net, TorchNet, Weights
from layer_resnet_jax import EPS, for_loops, hand, jaxnet, plain, shortcut, weights_of
from layer_task import Task

# pyright: reportMissingImports=false


def resnet_task(quick: bool) -> Task:
    images = sized(16, (16, 3, 1), (32, 3, 2), (64, 3, 2))
    if quick:
        images = sized(4, (4, 1, 1), (8, 1, 2), batch=4, side=8)
    title = f"ResNet-{2 * len(images.blocks) + 2} with batch norm"
    return task_of(title, images, weights_of(images), NETS, torch, rate=0.02)


# The peers


def linen(images: Images) -> Net:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def layer(x, name, i, features, stride):
                x = nn.Conv(
                    features, (3, 3), stride, padding=1, use_bias=False, name=f"{name}_conv{i}"
                )(x)
                return nn.BatchNorm(not train, momentum=0.9, epsilon=EPS, name=f"{name}_norm{i}")(x)

            x = nn.relu(layer(x, "stem", "", images.stem, 1))
            for block in images.blocks:
                y = nn.relu(layer(x, f"block{block.name}", 1, block.features, block.stride))
                y = layer(y, f"block{block.name}", 2, block.features, 1)
                x = nn.relu(y + shortcut(x, block))
            return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))

    return nets.linen(Net(), ("^(block)?(stem|[0-9]+)_", r"\2/"))


def nnx(images: Images) -> Net:
    from flax import nnx

    def conv(before, features, stride, rngs):
        return nnx.Conv(before, features, (3, 3), stride, padding=1, use_bias=False, rngs=rngs)

    def normed(features, rngs):
        return nnx.BatchNorm(features, momentum=0.9, epsilon=EPS, rngs=rngs)

    class Part(nnx.Module):
        def __init__(self, block, rngs):
            self.block = nnx.static(block) if hasattr(nnx, "static") else block
            self.conv1 = conv(block.before, block.features, block.stride, rngs)
            self.norm1 = normed(block.features, rngs)
            self.conv2 = conv(block.features, block.features, 1, rngs)
            self.norm2 = normed(block.features, rngs)

        def __call__(self, x, train):
            y = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
            y = self.norm2(self.conv2(y), use_running_average=not train)
            return nnx.relu(y + shortcut(x, self.block))

    class Stem(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = conv(3, images.stem, 1, rngs), normed(images.stem, rngs)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = Stem(rngs)
            self.blocks = nnx.List([Part(block, rngs) for block in images.blocks])
            self.head = nnx.Linear(images.blocks[-1].features, CLASSES, rngs=rngs)

        def __call__(self, x, train):
            x = self.stem.norm(self.stem.conv(x), use_running_average=not train)
            x = nnx.relu(x)
            for block in self.blocks:
                x = block(x, train)
            return self.head(x.mean((1, 2)))

    return nets.nnx(Net, ("^blocks/", ""))


def equinox(images: Images) -> Net:
    """For one image [H, W, C], which it turns to the order of its convolutions, [C, H, W]."""
    import equinox as eqx

    def conv(before, features, stride, key):
        return eqx.nn.Conv2d(before, features, 3, stride, padding=1, use_bias=False, key=key)

    def normed(features):
        return eqx.nn.BatchNorm(features, "batch", EPS, momentum=0.9, mode="batch")

    class Part(eqx.Module):
        conv1: Any
        norm1: Any
        conv2: Any
        norm2: Any
        block: Any = eqx.field(static=True)

        def __init__(self, block, key):
            keys = jax.random.split(key)
            self.conv1 = conv(block.before, block.features, block.stride, keys[0])
            self.conv2 = conv(block.features, block.features, 1, keys[1])
            self.norm1, self.norm2 = normed(block.features), normed(block.features)
            self.block = block

        def __call__(self, x, state):
            y, state = self.norm1(self.conv1(x), state)
            y, state = self.norm2(self.conv2(jax.nn.relu(y)), state)
            extra = (self.block.features - self.block.before) // 2
            skip = x[:, :: self.block.stride, :: self.block.stride]
            return jax.nn.relu(y + jnp.pad(skip, ((extra, extra), (0, 0), (0, 0)))), state

    class Net(eqx.Module):
        conv: Any
        norm: Any
        blocks: Any
        head: Any

        def __init__(self, key):
            keys = jax.random.split(key, len(images.blocks) + 2)
            self.conv, self.norm = conv(3, images.stem, 1, keys[0]), normed(images.stem)
            self.blocks = [
                Part(block, key) for block, key in zip(images.blocks, keys[2:], strict=True)
            ]
            self.head = eqx.nn.Linear(images.blocks[-1].features, CLASSES, key=keys[1])

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x.transpose(2, 0, 1)), state)
            x = jax.nn.relu(x)
            for block in self.blocks:
                x, state = block(x, state)
            return self.head(x.mean((1, 2))), state

    return nets.equinox(
        Net,
        ("^blocks/", ""),
        ("^(conv|norm)/", r"stem/\1/"),
        (r"(norm\d?)/weight", r"\1/scale"),
        ("weight$", "kernel"),
        stateful=True,
    )


def haiku(images: Images) -> Net:
    import haiku as hk

    def forward(x, train):
        def layer(x, name, i, features, stride):
            conv = hk.Conv2D(
                features, 3, stride, padding=(1, 1), with_bias=False, name=f"{name}_conv{i}"
            )
            return hk.BatchNorm(True, True, 0.9, EPS, name=f"{name}_norm{i}")(conv(x), train)

        x = jax.nn.relu(layer(x, "stem", "", images.stem, 1))
        for block in images.blocks:
            y = jax.nn.relu(layer(x, f"block{block.name}", 1, block.features, block.stride))
            y = layer(y, f"block{block.name}", 2, block.features, 1)
            x = jax.nn.relu(y + shortcut(x, block))
        return hk.Linear(CLASSES, name="head")(x.mean((1, 2)))

    return nets.haiku(forward, ("^(block)?(stem|[0-9]+)_", r"\2/"))


def keras(images: Images) -> Net:
    def make():
        import keras
        from keras import layers

        def layer(x, name, i, features, stride):
            x = layers.ZeroPadding2D(1)(x)
            x = layers.Conv2D(features, 3, stride, use_bias=False, name=f"{name}_conv{i}")(x)
            return layers.BatchNormalization(momentum=0.9, epsilon=EPS, name=f"{name}_norm{i}")(x)

        pixels = keras.Input((images.side, images.side, 3))
        x = layers.ReLU()(layer(pixels, "stem", "", images.stem, 1))
        for block in images.blocks:
            y = layers.ReLU()(layer(x, f"block{block.name}", 1, block.features, block.stride))
            y = layer(y, f"block{block.name}", 2, block.features, 1)
            extra = (block.features - block.before) // 2
            skip = x[:, :: block.stride, :: block.stride]
            skip = keras.ops.pad(skip, ((0, 0), (0, 0), (0, 0), (extra, extra)))
            x = layers.ReLU()(y + skip)
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(pixels, layers.Dense(CLASSES, name="head")(x))

    return nets.keras(make, ("^(block)?(stem|[0-9]+)_", r"\2/"))


def torch(images: Images, weights: Weights, channels_last: bool) -> TorchNet:
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(before, features, stride):
        return nn.Conv2d(before, features, 3, stride, padding=1, bias=False)

    class Part(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block
            self.conv1 = conv(block.before, block.features, block.stride)
            self.norm1 = nn.BatchNorm2d(block.features)
            self.conv2 = conv(block.features, block.features, 1)
            self.norm2 = nn.BatchNorm2d(block.features)

        def forward(self, x):
            y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
            extra, stride = (self.block.features - self.block.before) // 2, self.block.stride
            skip = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra, extra))
            return functional.relu(y + skip)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(3, images.stem, 1), nn.BatchNorm2d(images.stem)
            self.blocks = nn.ModuleList([Part(block) for block in images.blocks])
            self.head = nn.Linear(images.blocks[-1].features, CLASSES)

        def forward(self, x):
            x = functional.relu(self.norm(self.conv(x)))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    net = nets.torch(
        Net(),
        weights,
        ("^blocks/", ""),
        ("^(conv|norm)/", r"stem/\1/"),
        (r"(norm\d?)/weight", r"\1/scale"),
        to_input=functools.partial(nets.channels_first, channels_last),
    )
    if channels_last:
        net.module.to(memory_format=torch.channels_last)
    return net


NETS = {
    HAND: functools.partial(hand, plain),
    FOR_LOOPS: functools.partial(hand, for_loops),
    "jaxnet": jaxnet,
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
    "Keras": keras,
}
