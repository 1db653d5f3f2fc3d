"""An LSTM and a GRU, batch 32, 64 steps of width 128, in every library; see `layers.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
from layer_nets import ZERO, Net, TorchNet
from layer_rnn_jax import (
    GRU,
    LSTM,
    RATE,
    gru_weights,
    hand_gru,
    hand_lstm,
    jaxnet_gru,
    jaxnet_lstm,
    lstm_weights,
    random_steps,
    sizes,
)
from layer_task import Task

# pyright: reportMissingImports=false


def task(name, quick, weights_of, networks) -> Task:
    batch, time, width = sizes(quick)
    weights = weights_of(np.random.default_rng(0), width)
    made: dict[str, Any] = {
        title: functools.partial(make, width) for title, make in networks.items()
    }
    made["PyTorch eager"] = lambda: torch(width, name, weights)
    return Task(
        f"{name}, batch {batch}, {time} steps of width {width}, plain SGD",
        lambda steps: random_steps(steps, batch, time, width),
        "mean square",
        weights,
        made,
        rate=RATE,
    )


def lstm_task(quick: bool) -> Task:
    return task("LSTM", quick, lstm_weights, LSTM_NETS)


def gru_task(quick: bool) -> Task:
    made = task("GRU", quick, gru_weights, GRU_NETS)
    return made._replace(judges={"Haiku": lambda: hand_gru(sizes(quick)[2], before=True)})


# The peers


def linen(width, cell_name) -> Net:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.RNN(getattr(nn, cell_name)(width, name="cell"), name="rnn")(x)

    return nets.linen(
        Net(),
        (r"^(.*/)?i([ifgorzn])/", r"input/\2/"),
        (r"^(.*/)?h([ifgorzn])/", r"hidden/\2/"),
        *([(r"hidden/(.)/bias", r"bias/\1")] if "LSTM" in cell_name else []),
    )


def nnx(width, cell_name, *pairs, **facts) -> Net:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(getattr(nnx, cell_name)(width, width, rngs=rngs), rngs=rngs)

        def __call__(self, x, train):
            return self.rnn(x)

    return nets.nnx(Net, *pairs, **facts)


def nnx_lstm(width) -> Net:
    return nnx(
        width,
        "OptimizedLSTMCell",
        (".*dense_i/kernel", f"input/[{LSTM}]/kernel"),
        (".*dense_h/kernel", f"hidden/[{LSTM}]/kernel"),
        (".*dense_h/bias", f"bias/[{LSTM}]"),
    )


def nnx_gru(width) -> Net:
    return nnx(
        width,
        "GRUCell",
        (r".*dense_i/(\w+)", rf"input/[{GRU}]/\1"),
        (".*dense_h/kernel", f"hidden/[{GRU}]/kernel"),
        lacks=["hidden/n/bias"],
    )


def equinox(width, cell_name, *pairs) -> Net:
    import equinox as eqx

    class Net(eqx.Module):
        cell: Any

        def __init__(self, key):
            self.cell = getattr(eqx.nn, cell_name)(width, width, key=key)

        def __call__(self, x):
            def step(state, x):
                state = self.cell(x, state)
                return state, state if cell_name == "GRUCell" else state[0]

            start = jnp.zeros(width)
            return jax.lax.scan(step, start if cell_name == "GRUCell" else (start, start), x)[1]

    return nets.equinox(Net, *pairs)


def equinox_lstm(width) -> Net:
    return equinox(
        width,
        "LSTMCell",
        (".*weight_ih", f"input/[{LSTM}]/kernel"),
        (".*weight_hh", f"hidden/[{LSTM}]/kernel"),
        (".*bias", f"bias/[{LSTM}]"),
    )


def equinox_gru(width) -> Net:
    return equinox(
        width,
        "GRUCell",
        (".*weight_ih", f"input/[{GRU}]/kernel"),
        (".*weight_hh", f"hidden/[{GRU}]/kernel"),
        (".*bias_n", "hidden/n/bias"),
        ("^cell/bias$", f"input/[{GRU}]/bias"),
    )


def haiku(width, cell_name, *pairs, **facts) -> Net:
    import haiku as hk

    def forward(x, train):
        core = getattr(hk, cell_name)(width)
        start = core.initial_state(len(x))
        return hk.dynamic_unroll(core, x, start, time_major=False)[0]

    return nets.haiku(forward, *pairs, **facts)


def haiku_lstm(width) -> Net:
    """Haiku adds 1 to the forget gate."""
    return haiku(
        width,
        "LSTM",
        (".*kernel", "{input;hidden}/[i,g,f,o]/kernel"),
        (".*bias", "bias/[i,g,f,o]"),
        adjust=lambda weights: {**weights, "bias/f": weights["bias/f"] - 1},
    )


def haiku_gru(width) -> Net:
    """Haiku applies the reset gate before the product, and its z is 1 - z of the others."""
    changed = ("input/z/kernel", "input/z/bias", "hidden/z/kernel")
    return haiku(
        width,
        "GRU",
        (".*w_i$", "input/[z,r,n]/kernel"),
        (".*w_h$", "hidden/[z,r,n]/kernel"),
        ("^gru/bias$", "input/[z,r,n]/bias"),
        adjust=lambda weights: {**weights, **{name: -weights[name] for name in changed}},
        lacks=["hidden/n/bias"],
    )


def keras(width, layer_name, *pairs) -> Net:
    def make():
        import keras

        layer = getattr(keras.layers, layer_name)(width, return_sequences=True, name="rnn")
        return keras.Sequential([keras.Input((None, width)), layer])

    return nets.keras(make, *pairs)


def keras_lstm(width) -> Net:
    return keras(
        width,
        "LSTM",
        (".*recurrent_kernel", f"hidden/[{LSTM}]/kernel"),
        (".*rnn.*/kernel$", f"input/[{LSTM}]/kernel"),
        (".*rnn.*/bias$", f"bias/[{LSTM}]"),
    )


def keras_gru(width) -> Net:
    both = f"[{','.join(f'input/{gate}/bias' for gate in 'zrn')},{ZERO},{ZERO},hidden/n/bias]"
    return keras(
        width,
        "GRU",
        (".*recurrent_kernel", "hidden/[z,r,n]/kernel"),
        (".*rnn.*/kernel$", "input/[z,r,n]/kernel"),
        (".*rnn.*/bias$", both),
    )


def torch(width, name, weights) -> TorchNet:
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(nn, name)(width, width, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    lstm, gates = name == "LSTM", LSTM if name == "LSTM" else GRU
    second = [ZERO] * 4 if lstm else [ZERO, ZERO, "hidden/n/bias"]
    net = nets.torch(
        Net(),
        weights,
        (".*weight_ih.*", f"input/[{gates}]/kernel"),
        (".*weight_hh.*", f"hidden/[{gates}]/kernel"),
        (".*bias_ih.*", f"bias/[{gates}]" if lstm else f"input/[{gates}]/bias"),
        (".*bias_hh.*", f"[{','.join(second)}]"),
    )
    # The LSTM's second bias is one too many. It stays zero, as in the other libraries.
    net.module.rnn.bias_hh_l0.requires_grad_(not lstm)
    return net


LSTM_NETS = {
    "JAX by hand": hand_lstm,
    "JAX by hand, two products": lambda width: hand_lstm(width, apart=True),
    "jaxnet": jaxnet_lstm,
    "Flax Linen": lambda width: linen(width, "OptimizedLSTMCell"),
    "Flax NNX": nnx_lstm,
    "Equinox": equinox_lstm,
    "Haiku": haiku_lstm,
    "Keras": keras_lstm,
}
GRU_NETS = {
    "JAX by hand": hand_gru,
    "JAX by hand, all in the loop": lambda width: hand_gru(width, hoisted=False),
    "jaxnet": jaxnet_gru,
    "Flax Linen": lambda width: linen(width, "GRUCell"),
    "Flax NNX": nnx_gru,
    "Equinox": equinox_gru,
    "Haiku": haiku_gru,
    "Keras": keras_gru,
}
