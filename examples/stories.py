"""A trained Llama of 260 thousand parameters tells a story, in one compiled call (CPU seconds):

python examples/stories.py FOLDER               256 tokens, the published text, 2.6 s
python examples/stories.py FOLDER --no-cache    the same text without the cache, 3.8 s

FOLDER holds stories260K.bin and tok512.bin (karpathy/tinyllamas on Hugging Face, MIT licence).
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import (
    chain,
    gated_mlp,
    multi_head_attention,
    param,
    repeat,
    residual,
    rms_norm,
    rotary,
    wire,
)
from jaxnet.core import output_specs
from jaxnet.layers import causal, empty_cache
from jaxnet.train import compile_cache


def llama(vocabulary, width, hidden, depth, heads, groups):
    """Grouped-query attention with rotary positions, SwiGLU, RMS norms, tied embedding."""
    attention = multi_head_attention(
        width, heads, groups=groups, bias=False, positions=rotary(interleaved=True), mask=causal(),
        cached=True,
    )  # fmt: skip

    @wire(
        norm=rms_norm(eps=1e-5),
        attn=attention,
        mlp=residual(chain(rms_norm(eps=1e-5), gated_mlp(hidden, width))),
    )
    def block(f, x, at, cache):
        y, cache = f.attn(f.norm(x), at=at, cache=cache)
        return f.mlp(x + y), cache

    @wire(
        table=param((vocabulary, width), jax.nn.initializers.normal(0.02)),
        blocks=repeat(block, depth, each="cache", collect=True),
        norm=rms_norm(eps=1e-5),
    )
    def net(f, ids, at=0, cache=None):
        x, cache = f.blocks(f.table()[ids], at, cache=cache)
        return f.norm(x) @ f.table().T, cache

    return net


def read(folder):
    """(network, parameters, the text of each token) from the files of llama2.c."""
    file = (pathlib.Path(folder) / "stories260K.bin").read_bytes()
    width, hidden, depth, heads, groups, vocabulary, _ = np.frombuffer(file, "<i4", 7).tolist()
    numbers, keys = np.frombuffer(file, "<f4", offset=28), width // heads * groups

    def take(*shape):
        nonlocal numbers
        taken, numbers = np.split(numbers, [np.prod(shape)])
        return jnp.asarray(taken.reshape(shape))

    def kernels(outputs, inputs):
        return {"kernel": take(depth, outputs, inputs).swapaxes(1, 2)}

    table, norm = take(vocabulary, width), {"scale": take(depth, width)}
    sizes = {"query": width, "keys": keys, "values": keys, "out": width}
    attn = {name: kernels(size, width) for name, size in sizes.items()}
    mlp_norm = {"scale": take(depth, width)}
    gate, down, up = kernels(hidden, width), kernels(width, hidden), kernels(hidden, width)
    mlp = {"0": mlp_norm, "1": {"gate": gate, "up": up, "down": down}}
    blocks = {"norm": norm, "attn": attn, "mlp": mlp}
    params = {"table": table, "blocks": blocks, "norm": {"scale": take(width)}}
    net = llama(vocabulary, width, hidden, depth, heads, groups)
    return net, params, read_tokens(folder, vocabulary)


def read_tokens(folder, vocabulary):
    file, at, texts = (pathlib.Path(folder) / "tok512.bin").read_bytes(), 4, []
    for _ in range(vocabulary):
        size = int.from_bytes(file[at + 4 : at + 8], "little")
        texts.append(file[at + 8 : at + 8 + size].decode().replace("<0x0A>", "\n"))
        at += 8 + size
    return texts


def generate(net, params, first, length):
    """The most likely tokens after the first one. Each step computes one token."""
    _, specs = output_specs(net, False, jax.ShapeDtypeStruct((1, length), jnp.int32))

    def step(carry, at):
        logits, cache = net.apply(params, carry[0], at, carry[1])
        token = logits.argmax(-1)
        return (token, cache), token[0, 0]

    start = jnp.full((1, 1), first), empty_cache(specs)
    return jax.lax.scan(step, start, jnp.arange(length))[1]


def generate_without_cache(net, params, first, length):
    """The same tokens. Each step computes all tokens."""

    def step(ids, at):
        token = net.apply(params, ids)[0][0, at].argmax()
        return ids.at[0, at + 1].set(token), token

    ids = jnp.zeros((1, length), int).at[0, 0].set(first)
    return jax.lax.scan(step, ids, jnp.arange(length))[1]


def main(folder, *, length=256, cache=True):
    net, params, texts = read(folder)
    run = generate if cache else generate_without_cache
    tokens = jax.jit(run, static_argnums=(0, 3))(net, params, 1, length).tolist()
    # Token 1 begins a story, and ends it.
    tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
    text = "".join(texts[token] for token in tokens).lstrip(" ")
    print(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Let a small trained Llama tell a story.")
    parser.add_argument("folder", help="folder with stories260K.bin and tok512.bin")
    parser.add_argument("--length", type=int, default=256, help="at most so many tokens")
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="compute all tokens at each step"
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="keep compiled programs there")
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    main(**args)
