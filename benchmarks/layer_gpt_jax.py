"""The GPT of `layer_gpt.py` by hand and in jaxnet, with its sizes and weights.

The weights are tokens/embedding, positions/embedding, norm, head, and for each block i i/norm1,
i/query, i/keys, i/values, i/out, i/norm2, i/up and i/down.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_nets import Net, Weights

VOCABULARY = 65
FORMS = ("chain", "repeat", "repeat with remat")
ATTENTION = ("query", "keys", "values", "out")


class Size(NamedTuple):
    depth: int
    width: int
    heads: int
    tokens: int
    batch: int


SIZE = Size(depth=4, width=128, heads=4, tokens=128, batch=16)
DEEP = Size(depth=24, width=64, heads=4, tokens=16, batch=8)
TINY = Size(depth=2, width=8, heads=2, tokens=4, batch=2)


def texts(size: Size, steps: int):
    """Tokens, and the tokens after them: each is 3 times the last plus 0, 1 or 2."""
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCABULARY, (steps, size.batch, size.tokens + 1), np.int32)
    for i in range(size.tokens):
        ids[..., i + 1] = (3 * ids[..., i] + ids[..., i + 1] % 3) % VOCABULARY
    return ids[..., :-1], ids[..., 1:]


def weights_of(size: Size) -> Weights:
    random, width = np.random.default_rng(0), size.width
    shapes = dict.fromkeys(ATTENTION, (width, width)) | {"up": (width, 4 * width)}
    weights = {}
    for i in range(size.depth):
        for name, shape in (shapes | {"down": (4 * width, width)}).items():
            weights[f"{i}/{name}/kernel"] = random.normal(size=shape) / math.sqrt(shape[0])
            weights[f"{i}/{name}/bias"] = np.zeros(shape[1])
        for name in ("norm1", "norm2"):
            weights[f"{i}/{name}/scale"], weights[f"{i}/{name}/bias"] = ones_and_zeros(width)
    weights["norm/scale"], weights["norm/bias"] = ones_and_zeros(width)
    weights["tokens/embedding"] = random.normal(size=(VOCABULARY, width)) / math.sqrt(width)
    weights["positions/embedding"] = random.normal(size=(size.tokens, width)) / math.sqrt(width)
    weights["head/kernel"] = random.normal(size=(width, VOCABULARY)) / math.sqrt(width)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def ones_and_zeros(width):
    return np.ones(width), np.zeros(width)


# JAX by hand, as everyone writes it


def hand(form: str, size: Size) -> Net:
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]

    def attend(p, x):
        q, k, v = (
            dense(p[name], x).reshape(*x.shape[:2], size.heads, -1) for name in ATTENTION[:3]
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape))

    def block(p, x):
        x = x + attend(p, norm(p["norm1"], x))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))))

    def apply(p, ids):
        x = p["tokens"]["embedding"][ids] + p["positions"]["embedding"]
        if form == "chain":
            for part in p["blocks"]:
                x = block(part, x)
        else:
            body = jax.checkpoint(block, prevent_cse=False) if "remat" in form else block
            x, _ = jax.lax.scan(lambda x, part: (body(part, x), None), x, p["blocks"])
        return norm(p["norm"], x) @ p["head"]["kernel"]

    return nets.hand(apply, hand_names(form, size))


def hand_names(form: str, size: Size) -> Any:
    def block(i):
        affine = {name: ("kernel", "bias") for name in (*ATTENTION, "up", "down")}
        both = affine | dict.fromkeys(("norm1", "norm2"), ("scale", "bias"))
        return {
            name: {part: f"{i}/{name}/{part}" for part in parts} for name, parts in both.items()
        }

    outside = {name: {"embedding": f"{name}/embedding"} for name in ("tokens", "positions")}
    outside |= {"norm": {part: f"norm/{part}" for part in ("scale", "bias")}}
    blocks = [block(i) for i in range(size.depth)] if form == "chain" else block("*")
    return outside | {"head": {"kernel": "head/kernel"}, "blocks": blocks}


def hand_init(size: Size, stacked: bool, key: Any) -> Any:
    """Random parameters in the form of the hand-written network."""
    draw, width = jax.nn.initializers.lecun_normal(), size.width
    shapes = dict.fromkeys(ATTENTION, (width, width)) | {"up": (width, 4 * width)}
    shapes |= {"down": (4 * width, width)}
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block(key):
        keys = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
        made = {
            name: {"kernel": draw(key, shape), "bias": jnp.zeros(shape[1])}
            for key, (name, shape) in keys
        }
        return made | {"norm1": norm, "norm2": norm}

    keys = jax.random.split(key, size.depth + 3)
    blocks = jax.vmap(block)(keys[3:]) if stacked else [block(key) for key in keys[3:]]
    return {
        "tokens": {"embedding": draw(keys[0], (VOCABULARY, width))},
        "positions": {"embedding": draw(keys[1], (size.tokens, width))},
        "head": {"kernel": draw(keys[2], (width, VOCABULARY))},
        "norm": norm,
        "blocks": blocks,
    }


# jaxnet


def jaxnet(form: str, size: Size) -> Net:
    from jaxnet import chain, dense, embed, layer_norm, repeat, residual
    from jaxnet.layers import causal, learned_positions, mlp, multi_head_attention

    width = size.width
    attention = multi_head_attention(width, size.heads, mask=causal())
    block = chain(
        attend=residual(chain(norm1=layer_norm(), attention=attention)),
        feed=residual(chain(norm2=layer_norm(), mlp=mlp(4 * width, width))),
    )
    if form == "chain":
        blocks = chain(*[block] * size.depth)
    else:
        blocks = repeat(block, size.depth, remat="remat" in form)
    net = chain(
        tokens=embed(VOCABULARY, width),
        positions=learned_positions(size.tokens),
        blocks=blocks,
        norm=layer_norm(),
        head=dense(VOCABULARY, bias=False),
    )
    copy = "" if form == "chain" else "*/"
    return nets.jaxnet(net, ("^blocks/", copy), ("(attend|attention|feed|mlp)/", ""))
