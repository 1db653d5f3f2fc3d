"""A diagonal linear recurrence over 1,024 steps in every library: the linear recurrent unit
(Orvieto et al. 2023); see `layers.py`.

h_t = l h_{t-1} + exp(gamma) (B x_t) and y_t = Re(C h_t) + skip x_t, with complex h and l =
exp(-exp(nu) + i exp(theta)). Input is [Re B, Im B], and output Re C above -Im C. No other library
has such a layer. There a module has the parameters, and the function is the hand-written one; Keras
has a scan of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_nets import Net, TorchNet, Weights
from layer_task import Task

# pyright: reportMissingImports=false


class Size(NamedTuple):
    batch: int
    time: int
    width: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        vectors = dict.fromkeys(("nu", "theta", "gamma", "skip"), (self.width,))
        matrices = {"input": (self.width, 2 * self.width), "output": (2 * self.width, self.width)}
        return vectors | matrices


def linear_task(quick: bool) -> Task:
    size = Size(2, 5, 4) if quick else Size(8, 1024, 128)
    weights = weights_of(size)
    made = {name: functools.partial(make, size) for name, make in NETS.items()}
    for name, scan in {"doubling": torch_doubling, "step by step": torch_steps}.items():
        made[f"PyTorch eager, {name}"] = functools.partial(torch, size, weights, scan)
    return Task(
        f"Diagonal linear recurrence, batch {size.batch}, {size.time:,} steps of width "
        f"{size.width}, plain SGD",
        functools.partial(sequences, size),
        "mean square",
        weights,
        made,
        rate=0.1,
    )


def sequences(size: Size, steps: int):
    shape = (2, steps, size.batch, size.time, size.width)
    x, y = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return x, y


def weights_of(size: Size) -> Weights:
    random, n = np.random.default_rng(0), size.width
    radius = np.sqrt(random.uniform(0.5, 0.98, n))
    nu = np.log(-np.log(radius))
    weights = {
        "nu": nu,
        "theta": np.log(random.uniform(0.01, np.pi, n)),
        "gamma": np.log(np.sqrt(1 - radius**2)),
        "input": random.normal(size=(n, 2 * n)) / np.sqrt(2 * n),
        "output": random.normal(size=(2 * n, n)) / np.sqrt(n),
        "skip": random.normal(size=n),
    }
    return {name: value.astype(np.float32) for name, value in weights.items()}


# JAX by hand


def after(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


def in_parallel(factor, b):
    """h [B, T, N] of one factor [N] and summands [B, T, N]."""
    a = jnp.broadcast_to(factor, b.shape)
    return jax.lax.associative_scan(after, (a, b), axis=1)[1]


def step_by_step(factor, b):
    def step(h, b):
        h = factor * h + b
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(b[:, 0]), b.swapaxes(0, 1))[1].swapaxes(0, 1)


def unit(scan, p, x):
    factor = jnp.exp(-jnp.exp(p["nu"]) + 1j * jnp.exp(p["theta"]))
    real, imag = jnp.split(x @ p["input"], 2, -1)
    h = scan(factor, jnp.exp(p["gamma"]) * jax.lax.complex(real, imag))
    return jnp.concatenate([h.real, h.imag], -1) @ p["output"] + p["skip"] * x


def hand(scan, size: Size) -> Net:
    return nets.hand(functools.partial(unit, scan), {name: name for name in size.shapes})


# jaxnet


def jaxnet(size: Size) -> Net:
    from jaxnet.layers import lru

    return nets.jaxnet(lru(size.width), ("kernel", "input"))


# The peers


def drawn(key, shape):
    return 0.1 * jax.random.normal(key, shape)


def linen(size: Size) -> Net:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            p = {name: self.param(name, drawn, shape) for name, shape in size.shapes.items()}
            return unit(in_parallel, p, x)

    return nets.linen(Net())


def nnx(size: Size) -> Net:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            for name, shape in size.shapes.items():
                setattr(self, name, nnx.Param(drawn(rngs.params(), shape)))

        def __call__(self, x, train):
            return unit(in_parallel, {name: getattr(self, name)[...] for name in size.shapes}, x)

    return nets.nnx(Net)


def equinox(size: Size) -> Net:
    import equinox as eqx

    class Net(eqx.Module):
        p: Any

        def __init__(self, key):
            keys = jax.random.split(key, len(size.shapes))
            self.p = {
                name: drawn(key, shape)
                for key, (name, shape) in zip(keys, size.shapes.items(), strict=True)
            }

        def __call__(self, x):
            return unit(in_parallel, self.p, x[None])[0]

    return nets.equinox(Net, ("^p/", ""))


def haiku(size: Size) -> Net:
    import haiku as hk

    class Unit(hk.Module):
        def __call__(self, x):
            init = hk.initializers.RandomNormal(0.1)
            p = {
                name: hk.get_parameter(name, shape, init=init)
                for name, shape in size.shapes.items()
            }
            return unit(in_parallel, p, x)

    return nets.haiku(lambda x, train: Unit(name="unit")(x), ("^unit/", ""))


def keras(size: Size) -> Net:
    def make():
        import keras

        ops: Any = keras.ops

        class Unit(keras.layers.Layer):
            def build(self, shape):
                for name, shape in size.shapes.items():
                    setattr(self, f"{name}_", self.add_weight(shape=shape, name=name))
                self.built = True

            def call(self, x):
                p = {name: getattr(self, f"{name}_") for name in size.shapes}
                size_, phase = ops.exp(-ops.exp(p["nu"])), ops.exp(p["theta"])
                factor = size_ * ops.cos(phase) + 1j * size_ * ops.sin(phase)
                real, imag = ops.split(ops.matmul(x, p["input"]), 2, -1)
                b = ops.exp(p["gamma"]) * (real + 1j * imag)
                a = ops.broadcast_to(factor, ops.shape(b))
                h = ops.associative_scan(after, (a, b), axis=1)[1]
                h = ops.concatenate([ops.real(h), ops.imag(h)], -1)
                return ops.matmul(h, p["output"]) + p["skip"] * x

        return keras.Sequential([keras.Input((size.time, size.width)), Unit(name="unit")])

    return nets.keras(make, ("^.*unit/", ""), ("^scale$", "gamma"))


def torch_doubling(factor, b):
    """h in log T passes over the sequence (Hillis & Steele 1986)."""
    import torch

    shift = 1
    while shift < b.shape[1]:
        before = torch.cat([torch.zeros_like(b[:, :shift]), b[:, :-shift]], 1)
        b = b + factor * before
        factor, shift = factor * factor, 2 * shift
    return b


def torch_steps(factor, b):
    import torch

    h, hs = torch.zeros_like(b[:, 0]), []
    for part in b.unbind(1):
        h = factor * h + part
        hs.append(h)
    return torch.stack(hs, 1)


def torch(size: Size, weights: Weights, scan) -> TorchNet:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, shape in size.shapes.items():
                setattr(self, name, nn.Parameter(torch.empty(shape)))

        def forward(self, x):
            p = dict(self.named_parameters())
            factor = torch.exp(torch.complex(-p["nu"].exp(), p["theta"].exp()))
            h = scan(factor, p["gamma"].exp() * torch.complex(*(x @ p["input"]).chunk(2, -1)))
            return torch.cat([h.real, h.imag], -1) @ p["output"] + p["skip"] * x

    return nets.torch(Net(), weights)


NETS = {
    "JAX by hand": functools.partial(hand, in_parallel),
    "JAX by hand, step by step": functools.partial(hand, step_by_step),
    "jaxnet": jaxnet,
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
    "Keras": keras,
}
