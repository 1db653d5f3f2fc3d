"""Recurrent layers of other libraries, with their own results as the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import close, floats, numbers

from jaxnet import tree, wire
from jaxnet.interop import from_equinox, from_flax, from_haiku, from_torch
from jaxnet.layers import bidirectional, gru, lstm, simple_rnn, stacked

X = np.asarray(numbers(floats(2, 4, 3)))
LIBRARIES = {
    "LSTM": (lstm, {}, {}),
    "LSTM projected": (lstm, {"proj_size": 1}, {"projection": 1}),
    "LSTM without bias": (lstm, {"bias": False}, {"bias": False}),
    "GRU": (gru, {}, {}),
    "RNN": (simple_rnn, {}, {}),
}


@pytest.mark.sample(4)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("layers, directions", [(1, 1), (2, 2)])
def test_torch(name, layers, directions):
    torch = pytest.importorskip("torch")
    make, theirs, ours = LIBRARIES[name]
    options = dict(num_layers=layers, bidirectional=directions == 2, batch_first=True, **theirs)
    module = torch.nn.ModuleDict({"rnn": getattr(torch.nn, name.split()[0])(3, 2, **options)})

    def one_layer():
        forward = make(2, **ours)
        return forward if directions == 1 else bidirectional(forward, make(2, reverse=True, **ours))

    inner = one_layer() if layers == 1 else stacked(*(one_layer() for _ in range(layers)))
    net = wire(encoder=inner)(lambda f, x: f.encoder(x))
    like = {"params": net.init(jax.random.key(0), X)}
    params = from_torch(module.state_dict(), like=like, rename={"rnn": "encoder"})["params"]
    with torch.no_grad():
        expected = module["rnn"](torch.tensor(X))[0].numpy()
    close(net.apply(params, X), expected, rtol=1e-5, atol=1e-6)


def test_a_bare_state_dict_of_torch_and_a_cell():
    torch = pytest.importorskip("torch")
    for module in (torch.nn.GRU(3, 2, batch_first=True), torch.nn.GRUCell(3, 2)):
        like = {"params": gru(2).init(jax.random.key(0), X)}
        params = from_torch(module.state_dict(), like=like)["params"]
        with torch.no_grad():
            result = module(torch.tensor(X if isinstance(module, torch.nn.GRU) else X[:, 0]))
        expected = result[0].numpy() if isinstance(result, tuple) else result[:, None].numpy()
        close(gru(2).apply(params, X)[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cell, make", [("LSTMCell", lstm), ("OptimizedLSTMCell", lstm), ("GRUCell", gru)]
)
def test_flax(cell, make):
    nn = pytest.importorskip("flax.linen")
    twin = nn.RNN(getattr(nn, cell)(2))
    variables = numbers(jax.eval_shape(twin.init, jax.random.key(0), X))
    (name,) = variables["params"]
    net = make(2)
    like = {"params": net.init(jax.random.key(0), X)}
    params = from_flax(variables, like=like, rename={name: ""})["params"]
    close(net.apply(params, X), twin.apply(variables, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell, make", [("LSTMCell", lstm), ("GRUCell", gru)])
def test_equinox(cell, make):
    eqx = pytest.importorskip("equinox")
    twin = getattr(eqx.nn, cell)(3, 2, key=jax.random.key(0))
    params = from_equinox(twin, like={"params": make(2).init(jax.random.key(0), X)})["params"]
    carry = (jnp.zeros(2),) * 2 if make is lstm else jnp.zeros(2)
    for t in range(4):
        carry = twin(X[0, t], carry)
        h = carry[0] if make is lstm else carry
        close(make(2).apply(params, X)[0, t], h, rtol=1e-5, atol=1e-6)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def run(x):
        core = hk.GRU(2)
        return hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)[0]

    twin = hk.without_apply_rng(hk.transform(run))
    theirs = numbers(jax.eval_shape(twin.init, jax.random.key(0), X))
    net = gru(2, reset_after=False)
    like = {"params": net.init(jax.random.key(0), X)}
    params = from_haiku(theirs, like=like, rename={"gru": ""})["params"]
    with jax.numpy_rank_promotion("allow"):
        expected = twin.apply(theirs, X)
    close(net.apply(params, X), expected, rtol=1e-5, atol=1e-6)


def test_other_arrays_of_these_names_stay_as_they_are():
    given = {"a.bias": np.ones(2, "f"), "b.weight_ih_l0": np.ones((8, 3), "f")}
    params = from_torch(given)["params"]
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == {
        "a/bias": (2,),
        "b/weight_ih_l0": (8, 3),
    }
