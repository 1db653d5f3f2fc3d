"""A trained GPT of 85 thousand parameters sorts six digits of 0, 1, 2 (CPU seconds):

python examples/sort.py FOLDER    all 729 inputs are sorted, 2.5 s

FOLDER holds gpt-nano-sort-model.json (bbycroft/llm-viz on GitHub, MIT licence).
"""

import argparse
import base64
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import chain, dense, embed, layer_norm, repeat, residual
from jaxnet.layers import causal, learned_positions, mlp, multi_head_attention
from jaxnet.train import compile_cache

DIGITS = 6


def gpt(vocabulary, longest, width, heads, depth):
    """GPT-2: learned positions, norms before attention and MLP, causal mask."""
    attention = chain(norm=layer_norm(), attn=multi_head_attention(width, heads, mask=causal()))
    feed_forward = chain(norm=layer_norm(), mlp=mlp(4 * width, width))
    block = chain(attend=residual(attention), feed=residual(feed_forward))
    return chain(
        tokens=embed(vocabulary, width),
        positions=learned_positions(longest),
        blocks=repeat(block, depth),
        norm=layer_norm(),
        head=dense(vocabulary, bias=False),
    )


def read(folder):
    """(network, parameters) from the file of llm-viz, whose dense weights are [out, in]."""
    file = json.loads((pathlib.Path(folder) / "gpt-nano-sort-model.json").read_text())
    config = file.pop("config")
    width, heads, depth = config["n_embd"], config["n_head"], config["n_layer"]
    weights = {name: array(entry) for name, entry in file.items()}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def affine(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def block(name):
        fused, attn = affine(f"{name}.attn.c_attn"), {"out": affine(f"{name}.attn.c_proj")}
        for i, part in enumerate(["query", "keys", "values"]):
            attn[part] = {key: np.split(x, 3, -1)[i] for key, x in fused.items()}
        feed = {"up": affine(f"{name}.mlp.c_fc"), "down": affine(f"{name}.mlp.c_proj")}
        return {
            "attend": {"norm": norm(f"{name}.ln_1"), "attn": attn},
            "feed": {"norm": norm(f"{name}.ln_2"), "mlp": feed},
        }

    blocks = [block(f"transformer.h.{i}") for i in range(depth)]
    params = {
        "tokens": {"embedding": weights["transformer.wte.weight"]},
        "positions": {"embedding": weights["transformer.wpe.weight"]},
        "blocks": jax.tree.map(lambda *copies: np.stack(copies), *blocks),
        "norm": norm("transformer.ln_f"),
        "head": {"kernel": weights["lm_head.weight"].T},
    }
    return gpt(config["vocab_size"], config["block_size"], width, heads, depth), params


def array(entry):
    return np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(entry["shape"])


def sort(net, params, digits):
    """The six digits [N, 6] that the network appends to each row, one after the other."""

    def step(ids, at):
        token = net.apply(params, ids[:, :-1])[:, at].argmax(-1)
        return ids.at[:, at + 1].set(token), token

    ids = jnp.pad(digits, ((0, 0), (0, DIGITS)))
    return jax.lax.scan(step, ids, DIGITS - 1 + jnp.arange(DIGITS))[1].T


def main(folder):
    net, params = read(folder)
    digits = jnp.array(list(itertools.product(range(3), repeat=DIGITS)))
    answers = jax.jit(sort, static_argnums=0)(net, params, digits)
    right = (answers == jnp.sort(digits)).all(-1)
    print(f"{digits[321]} -> {answers[321]}\n{right.sum()} of {len(right)} inputs are sorted")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Let a small trained GPT sort digits.")
    parser.add_argument("folder", help="folder with gpt-nano-sort-model.json")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="keep compiled programs there")
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    main(**args)
