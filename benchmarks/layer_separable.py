"""A convnet of depthwise-separable convolutions in every library; see `layers.py`.

The weights are stem, for each block i i/depthwise/kernel [3, 3, 1, C], i/pointwise/kernel [1, 1, C,
F] and i/pointwise/bias, and head. Each block ends with a ReLU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_images import CLASSES, FOR_LOOPS, HAND, Images, kernel, sized, task_of, zeros
from layer_nets import Net, TorchNet, Weights
from layer_resnet_jax import for_loops, plain
from layer_task import Task

# pyright: reportMissingImports=false


def separable_task(quick: bool) -> Task:
    images = sized(32, (64, 1, 1), (128, 2, 2), (256, 2, 2))
    if quick:
        images = sized(4, (8, 1, 1), (8, 1, 2), batch=4, side=8)
    title = f"{len(images.blocks)} depthwise-separable convolutions"
    return task_of(title, images, weights_of(images), NETS, torch, rate=0.05)


def weights_of(images: Images) -> Weights:
    random = np.random.default_rng(0)
    weights = {"stem/kernel": kernel(random, 3, 3, 3, images.stem), "stem/bias": zeros(images.stem)}
    for name, before, features, _ in images.blocks:
        weights[f"{name}/depthwise/kernel"] = kernel(random, 3, 3, 1, before)
        weights[f"{name}/pointwise/kernel"] = kernel(random, 1, 1, before, features)
        weights[f"{name}/pointwise/bias"] = zeros(features)
    weights["head/kernel"] = kernel(random, images.blocks[-1].features, CLASSES)
    return weights | {"head/bias": zeros(CLASSES)}


# JAX by hand


def depthwise(x, kernel, stride):
    """As everyone writes it."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted(x, kernel, stride):
    """The sum of nine shifted images, each times its row of the kernel."""
    height, width = x.shape[1] // stride, x.shape[2] // stride
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        * kernel[i, j, 0]
        for i in range(3)
        for j in range(3)
    )


def pointwise_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pointwise_product(x, kernel):
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def hand(conv, depthwise, pointwise, images: Images) -> Net:
    def apply(p, x):
        x = jax.nn.relu(conv(x, p["stem"]["kernel"], 1) + p["stem"]["bias"])
        for name, _, _, stride in images.blocks:
            x = depthwise(x, p[name]["depthwise"]["kernel"], stride)
            part = p[name]["pointwise"]
            x = jax.nn.relu(pointwise(x, part["kernel"]) + part["bias"])
        return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]

    def affine(name):
        return {part: f"{name}/{part}" for part in ("kernel", "bias")}

    names: dict[str, Any] = {name: affine(name) for name in ("stem", "head")}
    for name, *_ in images.blocks:
        names[name] = {
            "depthwise": {"kernel": f"{name}/depthwise/kernel"},
            "pointwise": affine(f"{name}/pointwise"),
        }
    return nets.hand(apply, names)


# jaxnet


def jaxnet(images: Images) -> Net:
    from jaxnet import chain, conv, dense, global_avg_pool
    from jaxnet.layers import separable_conv

    def block(part):
        made = separable_conv(part.features, 3, strides=part.stride, padding=1)
        return chain(conv=made, relu=jax.nn.relu)

    net = chain(
        stem=conv(images.stem, 3, padding=1),
        relu=jax.nn.relu,
        **{f"block{part.name}": block(part) for part in images.blocks},
        pool=global_avg_pool(),
        head=dense(CLASSES),
    )
    return nets.jaxnet(net, (r"^block(\d+)/conv/", r"\1/"))


# The peers


def linen(images: Images) -> Net:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(images.stem, (3, 3), padding=1, name="stem")(x))
            for name, before, features, stride in images.blocks:
                x = nn.Conv(
                    before,
                    (3, 3),
                    stride,
                    padding=1,
                    feature_group_count=before,
                    use_bias=False,
                    name=f"block{name}_depthwise",
                )(x)
                x = nn.relu(nn.Conv(features, (1, 1), name=f"block{name}_pointwise")(x))
            return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))

    return nets.linen(Net(), ("^block([0-9]+)_", r"\1/"))


def nnx(images: Images) -> Net:
    from flax import nnx

    class Part(nnx.Module):
        def __init__(self, block, rngs):
            self.depthwise = nnx.Conv(
                block.before,
                block.before,
                (3, 3),
                block.stride,
                padding=1,
                feature_group_count=block.before,
                use_bias=False,
                rngs=rngs,
            )
            self.pointwise = nnx.Conv(block.before, block.features, (1, 1), rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, images.stem, (3, 3), padding=1, rngs=rngs)
            self.blocks = nnx.List([Part(block, rngs) for block in images.blocks])
            self.head = nnx.Linear(images.blocks[-1].features, CLASSES, rngs=rngs)

        def __call__(self, x, train):
            x = nnx.relu(self.stem(x))
            for block in self.blocks:
                x = nnx.relu(block.pointwise(block.depthwise(x)))
            return self.head(x.mean((1, 2)))

    return nets.nnx(Net, ("^blocks/", ""))


def equinox(images: Images) -> Net:
    """For one image [H, W, C], which it turns to the order of its convolutions, [C, H, W]."""
    import equinox as eqx

    class Part(eqx.Module):
        depthwise: Any
        pointwise: Any

        def __init__(self, block, key):
            keys, before = jax.random.split(key), block.before
            self.depthwise = eqx.nn.Conv2d(
                before,
                before,
                3,
                block.stride,
                padding=1,
                groups=before,
                use_bias=False,
                key=keys[0],
            )
            self.pointwise = eqx.nn.Conv2d(before, block.features, 1, key=keys[1])

    class Net(eqx.Module):
        stem: Any
        blocks: Any
        head: Any

        def __init__(self, key):
            keys = jax.random.split(key, len(images.blocks) + 2)
            self.stem = eqx.nn.Conv2d(3, images.stem, 3, padding=1, key=keys[0])
            self.blocks = [
                Part(block, key) for block, key in zip(images.blocks, keys[2:], strict=True)
            ]
            self.head = eqx.nn.Linear(images.blocks[-1].features, CLASSES, key=keys[1])

        def __call__(self, x):
            x = jax.nn.relu(self.stem(x.transpose(2, 0, 1)))
            for block in self.blocks:
                x = jax.nn.relu(block.pointwise(block.depthwise(x)))
            return self.head(x.mean((1, 2)))

    return nets.equinox(Net, ("^blocks/", ""), ("weight$", "kernel"))


def haiku(images: Images) -> Net:
    import haiku as hk

    def forward(x, train):
        x = jax.nn.relu(hk.Conv2D(images.stem, 3, padding=(1, 1), name="stem")(x))
        for name, _, features, stride in images.blocks:
            x = hk.DepthwiseConv2D(
                1,
                3,
                stride,
                padding=((1, 1), (1, 1)),
                with_bias=False,
                name=f"block{name}_depthwise",
            )(x)
            x = jax.nn.relu(hk.Conv2D(features, 1, name=f"block{name}_pointwise")(x))
        return hk.Linear(CLASSES, name="head")(x.mean((1, 2)))

    return nets.haiku(forward, ("^block([0-9]+)_", r"\1/"))


def keras(images: Images) -> Net:
    def make():
        import keras
        from keras import layers

        pixels = keras.Input((images.side, images.side, 3))
        x = layers.Conv2D(images.stem, 3, padding="same", activation="relu", name="stem")(pixels)
        for name, _, features, stride in images.blocks:
            x = layers.SeparableConv2D(features, 3, stride, activation="relu", name=f"block{name}")(
                layers.ZeroPadding2D(1)(x)
            )
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(pixels, layers.Dense(CLASSES, name="head")(x))

    return nets.keras(
        make,
        ("^block([0-9]+)/depthwise_kernel", r"\1/depthwise/kernel"),
        ("^block([0-9]+)/pointwise_kernel", r"\1/pointwise/kernel"),
        ("^block([0-9]+)/bias", r"\1/pointwise/bias"),
    )


def torch(images: Images, weights: Weights, channels_last: bool) -> TorchNet:
    import torch
    from torch import nn

    class Part(nn.Module):
        def __init__(self, block):
            super().__init__()
            before = block.before
            self.depthwise = nn.Conv2d(
                before, before, 3, block.stride, padding=1, groups=before, bias=False
            )
            self.pointwise = nn.Conv2d(before, block.features, 1)

        def forward(self, x):
            return nn.functional.relu(self.pointwise(self.depthwise(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, images.stem, 3, padding=1)
            self.blocks = nn.Sequential(*[Part(block) for block in images.blocks])
            self.head = nn.Linear(images.blocks[-1].features, CLASSES)

        def forward(self, x):
            x = self.blocks(nn.functional.relu(self.stem(x)))
            return self.head(x.mean((2, 3)))

    to_input = functools.partial(nets.channels_first, channels_last)
    net = nets.torch(Net(), weights, ("^blocks/", ""), to_input=to_input)
    if channels_last:
        net.module.to(memory_format=torch.channels_last)
    return net


NETS = {
    HAND: functools.partial(hand, plain, depthwise, pointwise_conv),
    FOR_LOOPS: functools.partial(hand, for_loops, shifted, pointwise_product),
    "jaxnet": jaxnet,
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
    "Keras": keras,
}
