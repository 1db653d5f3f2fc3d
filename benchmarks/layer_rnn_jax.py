"""The LSTM and the GRU of `layer_rnn.py` by hand and in jaxnet, with their weights.

The weights are those of each gate: input/i/kernel, hidden/i/kernel and bias/i of an LSTM with gates
i, f, g, o; input/r/kernel, input/r/bias and hidden/r/kernel of a GRU with gates r, z, n, and
hidden/n/bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_nets import ZERO, Net, Weights

LSTM, GRU = "i,f,g,o", "r,z,n"
RATE = 30.0  # of a mean over 32 x 64 x 128 numbers
BATCH, TIME, WIDTH = 32, 64, 128


def sizes(quick: bool) -> tuple[int, int, int]:
    return (2, 3, 4) if quick else (BATCH, TIME, WIDTH)


def random_steps(steps, batch, time, width):
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, steps, batch, time, width)).astype(np.float32)
    return x, y


def lstm_weights(random, width) -> Weights:
    weights = {}
    for gate in "ifgo":
        for part in ("input", "hidden"):
            weights[f"{part}/{gate}/kernel"] = normal(random, width)
        weights[f"bias/{gate}"] = 0.1 * random.normal(size=width).astype(np.float32)
    return weights | {ZERO: np.zeros(width, np.float32)}


def gru_weights(random, width) -> Weights:
    weights = {}
    for gate in "rzn":
        for part in ("input", "hidden"):
            weights[f"{part}/{gate}/kernel"] = normal(random, width)
        weights[f"input/{gate}/bias"] = 0.1 * random.normal(size=width).astype(np.float32)
    zero = np.zeros(width, np.float32)
    return weights | {"hidden/n/bias": zero, ZERO: zero}


def normal(random, width):
    return (random.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)


# JAX by hand


def over_time(step, carry, x):
    """Outputs [B, T, H] of step(carry, x_t) -> (carry, y_t)."""
    return jax.lax.scan(step, carry, x.swapaxes(0, 1))[1].swapaxes(0, 1)


def hand_lstm(width, *, apart: bool = False) -> Net:
    """One product of the input and the hidden vector, side by side, with all gates; or two products
    `apart`, whose sum is the same.
    """

    def apply(p, x):
        def gates_of(x, h):
            if apart:
                return x @ p["kernel"][: x.shape[-1]] + h @ p["kernel"][x.shape[-1] :]
            return jnp.concatenate([x, h], -1) @ p["kernel"]

        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(gates_of(x, h) + p["bias"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((len(x), width))
        return over_time(step, (start, start), x)

    return nets.hand(
        apply, {"kernel": f"{{input;hidden}}/[{LSTM}]/kernel", "bias": f"bias/[{LSTM}]"}
    )


def hand_gru(width, *, before: bool = False, hoisted: bool = True) -> Net:
    """`before` applies the reset gate before the product, as in Cho et al. 2014. `hoisted` computes
    the products with the inputs before the loop.
    """

    def inputs(p, x):
        return x.reshape(-1, x.shape[-1]) @ p["input"] + p["bias"]

    def apply(p, x):
        def step(h, x):
            x = x if hoisted else inputs(p, x)
            if before:
                r, z = jnp.split(
                    jax.nn.sigmoid(x[:, : 2 * width] + h @ p["hidden"][:, : 2 * width]), 2, -1
                )
                n = jnp.tanh(
                    x[:, 2 * width :] + (r * h) @ p["hidden"][:, 2 * width :] + p["bias_n"]
                )
            else:
                xr, xz, xn = jnp.split(x, 3, -1)
                hr, hz, hn = jnp.split(h @ p["hidden"], 3, -1)
                r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
                n = jnp.tanh(xn + r * (hn + p["bias_n"]))
            h = n + z * (h - n)
            return h, h

        x = inputs(p, x).reshape(*x.shape[:2], -1) if hoisted else x
        return over_time(step, jnp.zeros((len(x), width)), x)

    names = {"input": f"input/[{GRU}]/kernel", "hidden": f"hidden/[{GRU}]/kernel"}
    names |= {"bias": f"input/[{GRU}]/bias", "bias_n": "hidden/n/bias"}
    return nets.hand(apply, names)


# jaxnet


def jaxnet_lstm(width) -> Net:
    from jaxnet.layers import lstm

    kernel = f"{{input;hidden}}/[{LSTM}]/kernel"
    return nets.jaxnet(lstm(width), ("^kernel$", kernel), ("^bias$", f"bias/[{LSTM}]"))


def jaxnet_gru(width) -> Net:
    from jaxnet.layers import gru

    return nets.jaxnet(
        gru(width),
        ("^hidden_bias$", "hidden/n/bias"),
        ("^bias$", f"input/[{GRU}]/bias"),
        ("^kernel$", f"{{input;hidden}}/[{GRU}]/kernel"),
    )
