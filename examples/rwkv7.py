"""A trained RWKV-7 of 834 thousand parameters goes on with a text, byte by byte (CPU seconds):

python examples/rwkv7.py FOLDER                 100 bytes, 5.3 s
python examples/rwkv7.py FOLDER --parallel      the prompt by an associative scan, 5.9 s

FOLDER holds tiny-rwkv-7v0-834K-FP32.bin (the tests of RWKV/rwkv.cpp on GitHub, MIT licence).
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import dense, embed, layer_norm, repeat, wire
from jaxnet.layers import rwkv7_channel_mix, rwkv7_time_mix
from jaxnet.train import compile_cache


def rwkv7(vocabulary, width, depth, parallel=False):
    """(ids [B, T], carry) -> (logits [B, T, vocabulary], carry). The carry continues a text."""

    def block(first):
        att = rwkv7_time_mix(width, head_size=width, rank=32, first=first, parallel=parallel)

        @wire(ln1=layer_norm(), att=att, ln2=layer_norm(), ffn=rwkv7_channel_mix(width))
        def block(f, x, value, carry=(None, None)):
            y, value, of_att = f.att(f.ln1(x), value, carry[0])
            x = x + y
            y, of_ffn = f.ffn(f.ln2(x), carry[1])
            carry = of_att, of_ffn
            return x + y, ((value, carry) if first else carry)

        return block

    @wire(
        emb=embed(vocabulary, width),
        ln0=layer_norm(),
        first=block(first=True),
        blocks=repeat(block(first=False), depth - 1, each="carry", collect=True),
        norm=layer_norm(),
        head=dense(vocabulary, bias=False),
    )
    def net(f, ids, carry=((None, None), (None, None))):
        x, (value, first) = f.first(f.ln0(f.emb(ids)), None, carry[0])
        x, rest = f.blocks(x, value, carry=carry[1])
        return f.head(f.norm(x)), (first, rest)

    return net


def read(folder, parallel=False):
    """(network, parameters) from the file of rwkv.cpp."""
    file = (pathlib.Path(folder) / "tiny-rwkv-7v0-834K-FP32.bin").read_bytes()
    _, _, vocabulary, width, depth, _ = np.frombuffer(file, "<i4", 6).tolist()
    tensors, at = {}, 24
    while at < len(file):
        axes, letters, _ = np.frombuffer(file, "<i4", 3, at).tolist()
        shape = np.frombuffer(file, "<i4", axes, at + 12)[::-1]
        start = at + 12 + 4 * axes + letters
        values = np.frombuffer(file, "<f4", np.prod(shape), start).reshape(shape)
        tensors[file[start - letters : start].decode()] = values
        at = start + values.nbytes

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def block(i):
        def kernel(name):
            return {"kernel": tensors[f"blocks.{i}.{name}"].T}

        def flat(name, *shape):
            return tensors[f"blocks.{i}.{name}"].reshape(*shape, width)

        def low_rank(name):
            maps = {"down": kernel(f"att.{name}1"), "up": kernel(f"att.{name}2")}
            if name != "g":
                maps["up"]["bias"] = flat(f"att.{name}0")
            return maps

        vectors = {"mix": flat("att.x_rwkvag", 6), "bonus": flat("att.r_k", 1)}
        vectors |= {"removal": flat("att.k_k"), "change": flat("att.k_a")}
        linear = {"receptance": "receptance", "keys": "key", "values": "value", "output": "output"}
        att = {new: kernel(f"att.{old}.weight") for new, old in linear.items()}
        att |= {"decay": low_rank("w"), "rate": low_rank("a"), "gate": low_rank("g")}
        att |= {"vectors": vectors, "norm": norm(f"blocks.{i}.att.ln_x")}
        if i:
            att["blend"] = low_rank("v")
        ffn = {"keys": kernel("ffn.key.weight"), "values": kernel("ffn.value.weight")}
        ffn["vectors"] = {"mix": flat("ffn.x_k")}
        ln1, ln2 = norm(f"blocks.{i}.ln1"), norm(f"blocks.{i}.ln2")
        return {"ln1": ln1, "att": att, "ln2": ln2, "ffn": ffn}

    params = {
        "emb": {"embedding": tensors["emb.weight"]},
        "ln0": norm("blocks.0.ln0"),
        "first": block(0),
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(1, depth))),
        "norm": norm("ln_out"),
        "head": {"kernel": tensors["head.weight"].T},
    }
    return rwkv7(vocabulary, width, depth, parallel), jax.tree.map(jnp.asarray, params)


def generate(net, params, prompt, length):
    """The most likely bytes after the prompt [B, T]. Each step computes one of them."""

    def step(carry, _):
        ids, state = carry
        logits, state = net.apply(params, ids, state)
        return (logits[:, -1:].argmax(-1), state), ids[:, 0]

    logits, state = net.apply(params, prompt)
    start = logits[:, -1:].argmax(-1), state
    return jax.lax.scan(step, start, length=length)[1].T


def main(folder, *, prompt='"in', length=100, parallel=False):
    net, params = read(folder, parallel)
    ids = jnp.asarray([list(prompt.encode())])
    written = jax.jit(generate, static_argnums=(0, 3))(net, params, ids, length)
    text = prompt + bytes(written[0].tolist()).decode(errors="replace")
    print(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Let a small trained RWKV-7 go on with a text.")
    parser.add_argument("folder", help="folder with tiny-rwkv-7v0-834K-FP32.bin")
    parser.add_argument("--prompt", default='"in', help="how the text begins")
    parser.add_argument("--length", type=int, default=100, help="so many bytes more")
    parser.add_argument(
        "--parallel", action="store_true", help="compute all steps of the prompt in parallel"
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="keep compiled programs there")
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    main(**args)
