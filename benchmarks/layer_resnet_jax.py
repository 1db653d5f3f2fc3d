"""The ResNet of `layer_resnet.py` by hand and in jaxnet, with its weights.

The weights are stem/conv, stem/norm, for each block i i/conv1, i/norm1, i/conv2 and i/norm2, and
head. The shortcuts have none: every other pixel, and zeros for the new features (He et al. 2016,
option A).
"""

from __future__ import annotations

import functools
from typing import Any

import convnet
import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_images import CLASSES, Images, kernel, norm, zeros
from layer_nets import Net, Weights

EPS = 1e-5


def weights_of(images: Images) -> Weights:
    random = np.random.default_rng(0)
    weights = {"stem/conv/kernel": kernel(random, 3, 3, 3, images.stem)}
    weights |= norm("stem/norm", images.stem)
    for name, before, features, _ in images.blocks:
        weights[f"{name}/conv1/kernel"] = kernel(random, 3, 3, before, features)
        weights[f"{name}/conv2/kernel"] = kernel(random, 3, 3, features, features)
        weights |= norm(f"{name}/norm1", features) | norm(f"{name}/norm2", features)
    weights["head/kernel"] = kernel(random, images.blocks[-1].features, CLASSES)
    return weights | {"head/bias": zeros(CLASSES)}


def shortcut(x, block):
    """[B, H, W, C] with every `stride`-th pixel, and zeros on both sides of the features."""
    extra = (block.features - block.before) // 2
    x = x[:, :: block.stride, :: block.stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra, extra)))


# JAX by hand


def plain(x, kernel, stride):
    """The convolution with a padding of 1, as everyone writes it."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def for_loops(x, kernel, stride):
    """With gradients that are fast in a compiled loop: those of `convnet.canonical_conv`, or with a
    stride one product of all patches.
    """
    if stride == 1:
        return convnet.canonical_conv(x, kernel)
    height, width = x.shape[1] // stride, x.shape[2] // stride
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(3)
        for j in range(3)
    ]
    patches = jnp.concatenate(taps, -1).reshape(-1, 9 * x.shape[-1])
    return (patches @ kernel.reshape(-1, kernel.shape[-1])).reshape(len(x), height, width, -1)


def hand(conv, images: Images) -> Net:
    def normed(p, kept, x, train):
        if not train:
            mean, var = kept["mean"], kept["var"]
        else:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            kept = {
                "mean": 0.9 * kept["mean"] + 0.1 * mean,
                "var": 0.9 * kept["var"] + 0.1 * var,
            }
        return (x - mean) * (jax.lax.rsqrt(var + EPS) * p["scale"]) + p["bias"], kept

    def apply(p, state, x, train):
        new = {}

        def layer(x, part, name, stride):
            y = conv(x, p[part][f"conv{name}"]["kernel"], stride)
            key = f"{part}/norm{name}"
            y, new[key] = normed(p[part][f"norm{name}"], state[key], y, train)
            return y

        x = jax.nn.relu(layer(x, "stem", "", 1))
        for block in images.blocks:
            y = jax.nn.relu(layer(x, block.name, "1", block.stride))
            x = jax.nn.relu(layer(y, block.name, "2", 1) + shortcut(x, block))
        return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"], new

    names: dict[str, Any] = {"head": {part: f"head/{part}" for part in ("kernel", "bias")}}
    state, parts = {}, [("stem", "", images.stem)]
    parts += [(block.name, i, block.features) for block in images.blocks for i in "12"]
    for part, i, features in parts:
        made = names.setdefault(part, {})
        made[f"conv{i}"] = {"kernel": f"{part}/conv{i}/kernel"}
        made[f"norm{i}"] = {each: f"{part}/norm{i}/{each}" for each in ("scale", "bias")}
        state[f"{part}/norm{i}"] = {"mean": jnp.zeros(features), "var": jnp.ones(features)}
    return nets.hand(apply, names, state)


# jaxnet


def jaxnet(images: Images) -> Net:
    from jaxnet import batch_norm, chain, conv, dense, global_avg_pool, parallel

    def normed(i, features, stride):
        layer = conv(features, 3, strides=stride, padding=1, bias=False)
        return {f"conv{i}": layer, f"norm{i}": batch_norm()}

    def block(part):
        first = normed("1", part.features, part.stride)
        body = chain(**first, relu=jax.nn.relu, **normed("2", part.features, 1))
        return parallel(
            body=body,
            skip=functools.partial(shortcut, block=part),
            merge=lambda x, y: jax.nn.relu(x + y),
        )

    net = chain(
        stem=chain(**normed("", images.stem, 1), relu=jax.nn.relu),
        **{f"block{part.name}": block(part) for part in images.blocks},
        pool=global_avg_pool(),
        head=dense(CLASSES),
    )
    return nets.jaxnet(net, (r"^block(\d+)/body/", r"\1/"))
