"""A mixture of experts in every library, 8 gated experts of width 128, the best 2 of a token; see
`layers.py`.

The weights are router, and for each expert i i/gate, i/up and i/down, all without biases. No other
library has such a layer. The JAX libraries compute all experts for all tokens, as `vmap` over a
module gives it; PyTorch computes for each expert its own tokens, as the implementations for it do.
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

TOP = 2
PARTS = ("gate", "up", "down")


class Size(NamedTuple):
    experts: int
    width: int
    hidden: int
    batch: int
    tokens: int

    def shape(self, part: str) -> tuple[int, int]:
        return (self.hidden, self.width) if part == "down" else (self.width, self.hidden)


def moe_task(quick: bool) -> Task:
    size = Size(4, 6, 8, 2, 3) if quick else Size(8, 128, 256, 16, 128)
    weights = weights_of(size)
    made: dict[str, Any] = {name: functools.partial(make, size) for name, make in NETS.items()}
    made["PyTorch eager"] = lambda: torch(size, weights)
    return Task(
        f"Mixture of {size.experts} experts, the best {TOP}, width {size.width}, hidden "
        f"{size.hidden}, {size.batch} x {size.tokens} tokens, plain SGD",
        functools.partial(tokens, size),
        "mean square",
        weights,
        made,
        rate=10.0,
    )


def tokens(size: Size, steps: int):
    shape = (2, steps, size.batch, size.tokens, size.width)
    x, y = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return x, y


def weights_of(size: Size) -> Weights:
    random = np.random.default_rng(0)
    shapes = {"router": (size.width, size.experts)}
    shapes |= {f"{i}/{part}": size.shape(part) for i in range(size.experts) for part in PARTS}
    return {
        f"{name}/kernel": (random.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in shapes.items()
    }


def shares_of(logits):
    """[..., experts]: the share of each expert, zero but for the best."""
    best, chosen = jax.lax.top_k(jax.nn.softmax(logits), TOP)
    best = best / best.sum(-1, keepdims=True)
    return (best[..., None] * jax.nn.one_hot(chosen, logits.shape[-1])).sum(-2)


def mixed(logits, outputs):
    """The outputs [experts, ..., features] of all experts, weighted by their shares."""
    return jnp.einsum("...e,e...f->...f", shares_of(logits), outputs)


# JAX by hand


def hand_dense(size: Size) -> Net:
    """All experts for all tokens."""

    def apply(p, x):
        gate = jnp.einsum("...c,ech->e...h", x, p["gate"])
        up = jnp.einsum("...c,ech->e...h", x, p["up"])
        y = jnp.einsum("e...h,ehf->e...f", jax.nn.silu(gate) * up, p["down"])
        return mixed(x @ p["router"], y)

    return nets.hand(apply, HAND_NAMES)


def hand_sorted(size: Size) -> Net:
    """Each expert for its own tokens, which are sorted by expert."""

    def apply(p, x):
        flat = x.reshape(-1, x.shape[-1])
        best, chosen = jax.lax.top_k(jax.nn.softmax(flat @ p["router"]), TOP)
        best = best / best.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        counts = jnp.bincount(chosen.reshape(-1), length=size.experts).astype(jnp.int32)
        rows = flat[order // TOP]
        gate, up = (jax.lax.ragged_dot(rows, p[part], counts) for part in ("gate", "up"))
        y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, p["down"], counts)
        y = y * best.reshape(-1)[order][:, None]
        return jnp.zeros_like(flat).at[order // TOP].add(y).reshape(x.shape)

    return nets.hand(apply, HAND_NAMES)


def hand_blocks(size: Size, rows: int = 64) -> Net:
    """Each expert for its own tokens, in blocks of `rows` places that belong to one expert. Some
    places of the last block of an expert are empty.
    """

    def apply(p, x):
        flat = x.reshape(-1, x.shape[-1])
        best, chosen = jax.lax.top_k(jax.nn.softmax(flat @ p["router"]), TOP)
        best, chosen = best / best.sum(-1, keepdims=True), chosen.reshape(-1)
        picked = jax.nn.one_hot(chosen, size.experts, dtype=jnp.int32)
        rank = (jnp.cumsum(picked, 0) - picked)[jnp.arange(len(chosen)), chosen]
        ends = jnp.cumsum(-(-picked.sum(0) // rows))
        # The first block of an expert is where the last block of the one before ends.
        place = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[chosen] * rows + rank
        blocks = -(-len(chosen) // rows) + size.experts
        owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right").clip(0, size.experts - 1)
        # An empty place has the row of zeros at the end.
        source = jnp.full(blocks * rows, len(flat)).at[place].set(jnp.arange(len(chosen)) // TOP)
        inputs = jnp.concatenate([flat, jnp.zeros_like(flat[:1])])[source]

        def expert(block):
            x, i = block
            return (jax.nn.silu(x @ p["gate"][i]) * (x @ p["up"][i])) @ p["down"][i]

        y = jax.lax.map(expert, (inputs.reshape(blocks, rows, -1), owner))
        y = y.reshape(blocks * rows, -1)[place].reshape(-1, TOP, x.shape[-1])
        return (y * best[..., None]).sum(1).reshape(x.shape)

    return nets.hand(apply, HAND_NAMES)


HAND_NAMES = {part: f"*/{part}/kernel" for part in PARTS} | {"router": "router/kernel"}


# jaxnet


def jaxnet(size: Size, ragged: bool = False) -> Net:
    from jaxnet.layers import moe

    net = moe(size.experts, TOP, size.hidden, size.width, ragged=ragged)
    return nets.jaxnet(net, ("^experts/", "*/"))


# The peers


def linen(size: Size) -> Net:
    from flax import linen as nn

    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x):
            gate, up = (nn.Dense(size.hidden, False, name=name)(x) for name in ("gate", "up"))
            return nn.Dense(size.width, False, name="down")(nn.silu(gate) * up)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            experts = nn.vmap(
                Expert,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,  # pyright: ignore[reportArgumentType]
                axis_size=size.experts,
            )
            logits = nn.Dense(size.experts, False, name="router")(x)
            return mixed(logits, experts(name="experts")(x))

    return nets.linen(Net(), ("^experts/", "*/"))


def nnx(size: Size) -> Net:
    from flax import nnx

    class Expert(nnx.Module):
        def __init__(self, rngs):
            linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
            self.gate, self.up, self.down = (linear(*size.shape(part)) for part in PARTS)

        def __call__(self, x):
            return self.down(nnx.silu(self.gate(x)) * self.up(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.router = nnx.Linear(size.width, size.experts, use_bias=False, rngs=rngs)
            make = nnx.vmap(lambda rngs: Expert(rngs), in_axes=0, out_axes=0)
            self.experts = nnx.split_rngs(splits=size.experts)(make)(rngs)

        def __call__(self, x, train):
            run = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=0)
            return mixed(self.router(x), run(self.experts, x))

    return nets.nnx(Net, ("^experts/", "*/"))


def equinox(size: Size) -> Net:
    import equinox as eqx

    class Expert(eqx.Module):
        gate: Any
        up: Any
        down: Any

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.gate, self.up, self.down = (
                eqx.nn.Linear(*size.shape(part), use_bias=False, key=key)
                for part, key in zip(PARTS, keys, strict=True)
            )

        def __call__(self, x):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    class Net(eqx.Module):
        router: Any
        experts: Any

        def __init__(self, key):
            keys = jax.random.split(key, size.experts + 1)
            self.router = eqx.nn.Linear(size.width, size.experts, use_bias=False, key=keys[0])
            self.experts = eqx.filter_vmap(Expert)(keys[1:])

        def __call__(self, x):
            @eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
            def run(expert, x):
                return jax.vmap(expert)(x)

            return mixed(jax.vmap(self.router)(x), run(self.experts, x))

    return nets.equinox(Net, ("^experts/", "*/"), ("weight$", "kernel"))


def haiku(size: Size) -> Net:
    """Its parameters of several copies are made by hand: `hk.vmap` shares them."""
    import haiku as hk

    def forward(x, train):
        init = hk.initializers.VarianceScaling()
        gate, up, down = (
            hk.get_parameter(part, (size.experts, *size.shape(part)), init=init) for part in PARTS
        )
        y = jax.nn.silu(jnp.einsum("...c,ech->e...h", x, gate))
        y = y * jnp.einsum("...c,ech->e...h", x, up)
        y = jnp.einsum("e...h,ehf->e...f", y, down)
        return mixed(hk.Linear(size.experts, with_bias=False, name="router")(x), y)

    return nets.haiku(forward, ("^.*(gate|up|down)$", r"*/\1/kernel"))


def keras(size: Size) -> Net:
    """One `Dense` a part and expert, all experts for all tokens."""

    def make():
        import keras
        from keras import layers

        ops: Any = keras.ops
        x = keras.Input((size.tokens, size.width))
        logits = layers.Dense(size.experts, use_bias=False, name="router")(x)
        best, chosen = ops.top_k(ops.softmax(logits), TOP)
        best = best / ops.sum(best, -1, keepdims=True)
        shares = ops.sum(best[..., None] * ops.one_hot(chosen, size.experts), -2)
        outputs = []
        for i in range(size.experts):
            gate, up = (
                layers.Dense(size.hidden, use_bias=False, name=f"expert{i}_{name}")(x)
                for name in ("gate", "up")
            )
            down = layers.Dense(size.width, use_bias=False, name=f"expert{i}_down")
            outputs.append(down(ops.silu(gate) * up) * shares[..., i : i + 1])
        return keras.Model(x, layers.Add()(outputs))

    return nets.keras(make, (r"^expert(\d+)_", r"\1/"))


def torch(size: Size, weights: Weights) -> TorchNet:
    import torch
    from torch import nn
    from torch.nn import functional

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = (
                nn.Linear(*size.shape(part), bias=False) for part in PARTS
            )

        def forward(self, x):
            return self.down(functional.silu(self.gate(x)) * self.up(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(size.width, size.experts, bias=False)
            self.experts = nn.ModuleList([Expert() for _ in range(size.experts)])

        def forward(self, x):
            flat = x.view(-1, size.width)
            best, chosen = self.router(flat).softmax(-1).topk(TOP, dim=-1)
            best = best / best.sum(-1, keepdim=True)
            y = torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                rows, place = torch.where(chosen == i)
                y.index_add_(0, rows, expert(flat[rows]) * best[rows, place, None])
            return y.view_as(x)

    return nets.torch(Net(), weights, ("^experts/", ""))


NETS = {
    "JAX by hand": hand_dense,
    "JAX by hand, sorted": hand_sorted,
    "JAX by hand, blocks": hand_blocks,
    "jaxnet": jaxnet,
    "jaxnet, ragged": functools.partial(jaxnet, ragged=True),
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
    "Keras": keras,
}
