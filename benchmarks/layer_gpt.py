"""A GPT in every library: pre-norm blocks with causal attention, learned positions, AdamW; see
`layers.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import layer_nets as nets
from layer_gpt_jax import (
    DEEP,
    FORMS,
    SIZE,
    TINY,
    VOCABULARY,
    Size,
    hand,
    jaxnet,
    texts,
    weights_of,
)
from layer_nets import Net, TorchNet, Weights
from layer_task import Task

# pyright: reportMissingImports=false


def gpt_task(quick: bool) -> Task:
    return task(TINY if quick else SIZE)


def deep_task(quick: bool) -> Task:
    return task(TINY._replace(depth=3) if quick else DEEP)


def task(size: Size) -> Task:
    weights = weights_of(size)
    made: dict[str, Any] = {name: functools.partial(make, size) for name, make in NETS.items()}
    made["PyTorch eager"] = lambda: torch(size, weights)
    return Task(
        f"GPT, {size.depth} layers of width {size.width}, {size.batch} x {size.tokens} tokens, "
        "AdamW",
        functools.partial(texts, size),
        "cross entropy",
        weights,
        made,
        rate=1e-3,
        adamw=True,
    )


# The peers


def linen_module(size: Size, scanned: bool = False):
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            h = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(size.heads, name="attention")(h, mask=mask)
            h = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
            h = nn.gelu(nn.Dense(4 * size.width, name="up")(h))
            return x + nn.Dense(size.width, name="down")(h)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Block(name="block")(x), None

    class Gpt(nn.Module):
        @nn.compact
        def __call__(self, ids, train):
            x = nn.Embed(VOCABULARY, size.width, name="tokens")(ids)
            x = x + nn.Embed(size.tokens, size.width, name="positions")(jnp.arange(size.tokens))
            if scanned:
                axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                x, _ = nn.scan(Step, **axes, length=size.depth)(name="blocks")(x, None)
            else:
                for i in range(size.depth):
                    x = Block(name=f"block{i}")(x)
            x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
            return nn.Dense(VOCABULARY, use_bias=False, name="head")(x)

    return Gpt()


FLAX_NAMES = (
    ("^block(s/)?(?=[0-9])", ""),
    ("^blocks/block/", "*/"),
    ("attention/", ""),
    ("/key/", "/keys/"),
    ("/value/", "/values/"),
)


def linen(size: Size, scanned: bool = False) -> Net:
    return nets.linen(linen_module(size, scanned), *FLAX_NAMES)


def nnx(size: Size) -> Net:
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1 = nnx.LayerNorm(size.width, epsilon=1e-5, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(size.heads, size.width, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(size.width, epsilon=1e-5, rngs=rngs)
            self.up = nnx.Linear(size.width, 4 * size.width, rngs=rngs)
            self.down = nnx.Linear(4 * size.width, size.width, rngs=rngs)

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Gpt(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(VOCABULARY, size.width, rngs=rngs)
            self.positions = nnx.Embed(size.tokens, size.width, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(size.depth)])
            self.norm = nnx.LayerNorm(size.width, epsilon=1e-5, rngs=rngs)
            self.head = nnx.Linear(size.width, VOCABULARY, use_bias=False, rngs=rngs)

        def __call__(self, ids, train):
            x = self.tokens(ids) + self.positions(jnp.arange(size.tokens))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return nets.nnx(Gpt, *FLAX_NAMES)


def equinox(size: Size) -> Net:
    import equinox as eqx

    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}

    class Block(eqx.Module):
        norm1: Any
        attention: Any
        norm2: Any
        up: Any
        down: Any

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.norm1, self.norm2 = eqx.nn.LayerNorm(size.width), eqx.nn.LayerNorm(size.width)
            self.attention = eqx.nn.MultiheadAttention(
                size.heads, size.width, **biases, key=keys[0]
            )
            self.up = eqx.nn.Linear(size.width, 4 * size.width, key=keys[1])
            self.down = eqx.nn.Linear(4 * size.width, size.width, key=keys[2])

        def __call__(self, x):
            h = jax.vmap(self.norm1)(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
            return x + jax.vmap(self.down)(h)

    class Gpt(eqx.Module):
        tokens: Any
        positions: Any
        blocks: Any
        norm: Any
        head: Any

        def __init__(self, key):
            keys = jax.random.split(key, size.depth + 3)
            self.tokens = eqx.nn.Embedding(VOCABULARY, size.width, key=keys[0])
            self.positions = eqx.nn.Embedding(size.tokens, size.width, key=keys[1])
            self.blocks = [Block(key) for key in keys[3:]]
            self.norm = eqx.nn.LayerNorm(size.width)
            self.head = eqx.nn.Linear(size.width, VOCABULARY, use_bias=False, key=keys[2])

        def __call__(self, ids):
            x = jax.vmap(self.tokens)(ids) + jax.vmap(self.positions)(jnp.arange(len(ids)))
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(jax.vmap(self.norm)(x))

    return nets.equinox(
        Gpt,
        ("^blocks/", ""),
        (r"(norm\d?)/weight", r"\1/scale"),
        ("(tokens|positions)/weight", r"\1/embedding"),
        ("weight$", "kernel"),
        ("attention/", ""),
        ("query_proj", "query"),
        ("key_proj", "keys"),
        ("value_proj", "values"),
        ("output_proj", "out"),
    )


def haiku(size: Size) -> Net:
    import haiku as hk

    def norm(name):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)

    def forward(ids, train):
        x = hk.Embed(VOCABULARY, size.width, name="tokens")(ids)
        x = x + hk.Embed(size.tokens, size.width, name="positions")(jnp.arange(size.tokens))
        mask = jnp.tril(jnp.ones((1, 1, size.tokens, size.tokens)))
        for i in range(size.depth):
            h = norm(f"block{i}_norm1")(x)
            attention = hk.MultiHeadAttention(
                size.heads,
                size.width // size.heads,
                w_init=hk.initializers.VarianceScaling(),
                name=f"block{i}_attention",
            )
            x = x + attention(h, h, h, mask=mask)
            h = hk.Linear(4 * size.width, name=f"block{i}_up")(norm(f"block{i}_norm2")(x))
            x = x + hk.Linear(size.width, name=f"block{i}_down")(jax.nn.gelu(h))
        return hk.Linear(VOCABULARY, with_bias=False, name="head")(norm("norm")(x))

    return nets.haiku(
        forward,
        (r"^block(\d+)_", r"\1/"),
        ("attention/", ""),
        ("/key/", "/keys/"),
        ("/value/", "/values/"),
        ("/linear/", "/out/"),
    )


def keras(size: Size) -> Net:
    def make():
        import keras
        from keras import layers

        class Embeddings(layers.Layer):
            def __init__(self, **options):
                super().__init__(**options)
                self.tokens = layers.Embedding(VOCABULARY, size.width, name="tokens")
                self.positions = layers.Embedding(size.tokens, size.width, name="positions")

            def call(self, ids):
                return self.tokens(ids) + self.positions(keras.ops.arange(size.tokens))

        ids = keras.Input((size.tokens,), dtype="int32")
        x = Embeddings(name="embeddings")(ids)
        for i in range(size.depth):
            h = layers.LayerNormalization(epsilon=1e-5, name=f"block{i}_norm1")(x)
            attention = layers.MultiHeadAttention(
                size.heads, size.width // size.heads, name=f"block{i}_attention"
            )
            x = x + attention(h, h, use_causal_mask=True)
            h = layers.LayerNormalization(epsilon=1e-5, name=f"block{i}_norm2")(x)
            h = layers.Dense(4 * size.width, name=f"block{i}_up")(h)
            h = keras.activations.gelu(h, approximate=True)
            x = x + layers.Dense(size.width, name=f"block{i}_down")(h)
        x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
        return keras.Model(ids, layers.Dense(VOCABULARY, use_bias=False, name="head")(x))

    return nets.keras(
        make,
        ("^embeddings/", ""),
        (r"^block(\d+)_", r"\1/"),
        ("attention/", ""),
        ("/key/", "/keys/"),
        ("/value/", "/values/"),
        ("/attention_output/", "/out/"),
    )


def torch_module(size: Size) -> Any:
    """The class of the network, with one product for queries, keys and values, and the fused
    attention.
    """
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
            self.qkv, self.out = (
                nn.Linear(size.width, 3 * size.width),
                nn.Linear(size.width, size.width),
            )
            self.up, self.down = (
                nn.Linear(size.width, 4 * size.width),
                nn.Linear(4 * size.width, size.width),
            )
            self.gelu = nn.GELU(approximate="tanh")

        def forward(self, x):
            q, k, v = (
                part.view(*x.shape[:2], size.heads, -1).transpose(1, 2)
                for part in self.qkv(self.norm1(x)).split(size.width, dim=2)
            )
            h = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(h.transpose(1, 2).reshape(x.shape))
            return x + self.down(self.gelu(self.up(self.norm2(x))))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, size.width)
            self.positions = nn.Embedding(size.tokens, size.width)
            self.blocks = nn.ModuleList([Block() for _ in range(size.depth)])
            self.norm = nn.LayerNorm(size.width)
            self.head = nn.Linear(size.width, VOCABULARY, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Gpt


def torch(size: Size, weights: Weights) -> TorchNet:
    return nets.torch(
        torch_module(size)(),
        weights,
        ("^blocks/", ""),
        (r"(norm\d?)/weight", r"\1/scale"),
        ("(tokens|positions)/weight", r"\1/embedding"),
        ("/qkv/weight", "/[query,keys,values]/kernel"),
        ("/qkv/bias", "/[query,keys,values]/bias"),
    )


NETS = {
    "JAX by hand": functools.partial(hand, "chain"),
    "JAX by hand, scan": functools.partial(hand, "repeat"),
    "JAX by hand, scan with remat": functools.partial(hand, "repeat with remat"),
    **{f"jaxnet, {form}": functools.partial(jaxnet, form) for form in FORMS},
    "Flax Linen": linen,
    "Flax Linen, nn.scan": functools.partial(linen, scanned=True),
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
    "Keras": keras,
}
