"""Train a GPT with AdamW: one jitted step, and a compiled loop of 20 steps.

    python benchmarks/gpt.py
    python benchmarks/gpt.py --depth 24 --width 64
    python benchmarks/gpt.py --compile

The network has pre-norm blocks with learned positions, as a chain of blocks, as a loop over stacked
parameters (`repeat`), and as such a loop that computes each block again in the backward pass. The
reference is the chain in JAX as everyone writes it. All competitors begin with the same numbers and
must reach the same loss. `--compile` instead compares the compile time of `repeat` with 24 blocks
and with 2.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from measure import Work

from jaxnet import Layer, chain, dense, embed, layer_norm, repeat, residual
from jaxnet.layers import causal, learned_positions, mlp, multi_head_attention

# pyright: reportMissingImports=false

VOCABULARY, TOKENS, BATCH, HEAD, STEPS = 65, 128, 16, 32, 20
FORMS = ("chain", "repeat", "repeat, remat")
REFERENCE = "JAX by hand, chain"
LEARNING_RATE = 3e-4


def network(width: int, depth: int, form: str) -> Layer:
    attention = multi_head_attention(width, width // HEAD, mask=causal())
    attend = residual(chain(norm=layer_norm(), attn=attention))
    feed = residual(chain(norm=layer_norm(), mlp=mlp(4 * width, width)))
    block = chain(attend=attend, feed=feed)
    blocks = chain(*[block] * depth)
    if form != "chain":
        blocks = repeat(block, depth, remat=form == "repeat, remat")
    return chain(
        tokens=embed(VOCABULARY, width),
        positions=learned_positions(TOKENS),
        blocks=blocks,
        norm=layer_norm(),
        head=dense(VOCABULARY, bias=False),
    )


# JAX as everyone writes it, on the parameters of the network above.


def by_hand(depth: int, form: str) -> Callable[[Any, Any], Any]:
    def apply(params, ids):
        x = params["tokens"]["embedding"][ids] + params["positions"]["embedding"][: ids.shape[1]]
        if form == "chain":
            for i in range(depth):
                x = hand_block(params["blocks"][str(i)], x)
        else:
            body = lambda x, p: (hand_block(p, x), None)  # noqa: E731
            body = jax.checkpoint(body, prevent_cse=False) if form == "repeat, remat" else body
            x, _ = jax.lax.scan(body, x, params["blocks"])
        return hand_norm(params["norm"], x) @ params["head"]["kernel"]

    return apply


def hand_block(p, x):
    x = x + hand_attention(p["attend"]["attn"], hand_norm(p["attend"]["norm"], x))
    h = hand_dense(p["feed"]["mlp"]["up"], hand_norm(p["feed"]["norm"], x))
    return x + hand_dense(p["feed"]["mlp"]["down"], jax.nn.gelu(h))


def hand_attention(p, x):
    q, k, v = (
        hand_dense(p[name], x).reshape(*x.shape[:2], -1, HEAD)
        for name in ("query", "keys", "values")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return hand_dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


def hand_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def hand_norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def data():
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TOKENS + 1))
    return jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])


def start(width: int, depth: int, form: str) -> Any:
    ids, _ = data()
    return jax.jit(network(width, depth, "repeat").init)(jax.random.key(0), ids) | {
        "blocks": blocks_of(width, depth, form)
    }


def blocks_of(width: int, depth: int, form: str) -> Any:
    """The same numbers, stacked or by block."""
    ids, _ = data()
    stacked = jax.jit(network(width, depth, "repeat").init)(jax.random.key(0), ids)["blocks"]
    if form != "chain":
        return stacked
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}


def trained(apply: Callable, params: Any, steps: int, calls: int) -> Work:
    """Work of `calls` calls that take `steps` steps each. The result is the last loss."""
    ids, labels = data()
    optimizer = optax.adamw(LEARNING_RATE)

    def loss(params):
        logits = apply(params, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, _):
        params, memory = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(grads, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    @jax.jit
    def run(state):
        if steps == 1:
            return step(state[0], None)
        state, values = jax.lax.scan(step, state[0], length=steps)
        return state, values[-1]

    state = (params, optimizer.init(params)), jnp.zeros(())
    return measure.carried(run, state, lambda state: state[1], calls=calls, steps=steps)


def competitors(width: int, depth: int, steps: int) -> dict[str, Callable[[], Work]]:
    calls = 1
    made: dict[str, Callable[[], Work]] = {}
    for form in FORMS:
        of_form = functools.partial(start, width, depth, form)
        made[f"JAX by hand, {form}"] = lambda form=form, of_form=of_form: trained(
            by_hand(depth, form), of_form(), steps, calls
        )
        made[f"jaxnet, {form}"] = lambda form=form, of_form=of_form: trained(
            network(width, depth, form).apply, of_form(), steps, calls
        )
    made["PyTorch eager"] = lambda: in_torch(width, depth, steps)
    return made


def in_torch(width: int, depth: int, steps: int) -> Work:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query, self.keys, self.values, self.out = (
                nn.Linear(width, width) for _ in range(4)
            )
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            h = self.norm1(x)
            q, k, v = (
                dense(h).view(*x.shape[:2], -1, HEAD).transpose(1, 2)
                for dense in (self.query, self.keys, self.values)
            )
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = (
                nn.Embedding(VOCABULARY, width),
                nn.Embedding(TOKENS, width),
            )
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    def fill(module, p):
        with torch.no_grad():
            for name, value in p.items():
                name = "bias" if name == "bias" else "weight"
                value = np.array(value)
                is_dense = isinstance(module, nn.Linear) and name == "weight"
                getattr(module, name).copy_(torch.from_numpy(value.T if is_dense else value))

    net, params = Gpt(), start(width, depth, "chain")
    for name in ("tokens", "positions", "norm", "head"):
        fill(getattr(net, name), params[name])
    for i, block in enumerate(net.blocks):
        p = params["blocks"][str(i)]
        fill(block.norm1, p["attend"]["norm"])
        fill(block.norm2, p["feed"]["norm"])
        for name in ("query", "keys", "values", "out"):
            fill(getattr(block, name), p["attend"]["attn"][name])
        for name in ("up", "down"):
            fill(getattr(block, name), p["feed"]["mlp"][name])
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-4)
    ids, labels = (torch.from_numpy(np.array(x)).long() for x in data())

    def run():
        for _ in range(steps):
            loss = functional.cross_entropy(net(ids).flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    return Work(run, steps, lambda loss: np.asarray(loss.detach()))


def compile_times(width: int) -> str:
    """Seconds to trace and compile a step with `repeat`, by the number of blocks."""
    lines = []
    for depth in (2, 24, 2, 24):
        ids, _ = data()
        net = network(width, depth, "repeat")
        params = jax.eval_shape(net.init, jax.random.key(0), ids)

        def loss(params, net=net, ids=ids):
            return jnp.sum(jnp.sin(net.apply(params, ids)))

        jax.clear_caches()
        begin = time.process_time()
        jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        lines.append(f"{depth:3} blocks: {time.process_time() - begin:.2f} s")
    return "\n".join(lines)


def main(argv=None):
    def add(parser):
        parser.add_argument("--width", type=int, default=128, help="features of a token")
        parser.add_argument("--depth", type=int, default=4, help="number of blocks")
        parser.add_argument("--compile", action="store_true", help="compare compile times")
        parser.add_argument("--form", choices=("step", "loop"), help="only one of the tables")

    options = measure.arguments(__doc__, rounds=5, seconds=120.0, add=add, argv=argv)
    if options.compile:
        return measure.publish(options, text=compile_times(options.width))
    tables = []
    for form, steps in {"step": 1, "loop": STEPS}.items():
        if options.form in (None, form):
            title = f"GPT, {options.depth} layers of width {options.width}, {form}"
            made = competitors(options.width, options.depth, steps)
            reached = functools.cache(
                lambda n, made=made: float(np.asarray(made[REFERENCE]().run()[1]))
            )
            tables.append(
                measure.compare(
                    title,
                    made,
                    per="step",
                    unit="ms",
                    reference=REFERENCE,
                    expected=reached,
                    options=options,
                )
            )
    measure.publish(options, *tables)


if __name__ == "__main__":
    main()
