"""Recurrent cells and their runner equal PyTorch, Keras, Flax or the formula in float64."""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import close, floats, numbers, quick_to_compile, weights  # noqa: F401 (a fixture)

from jaxnet import chain, dense, dropout, param, tree, wire
from jaxnet.layers import (
    bidirectional,
    conv_lstm_cell,
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    mgu_cell,
    recurrent,
    rnn_cell,
    simple_rnn,
    stacked,
)

few = settings(max_examples=4, deadline=None, derandomize=True, database=None)
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


# --- PyTorch, over packed sequences ---------------------------------------------------------------

SEQUENCES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["lstm", "projected", "gru", "tanh", "relu"]),
        "width": st.integers(1, 4),
        "features": st.integers(2, 4),
        "layers": st.integers(1, 2),
        "directions": st.integers(1, 2),
        "bias": st.booleans(),
        "lengths": st.lists(st.integers(1, 5), min_size=1, max_size=3),
        "seed": st.integers(0, 99),
    }
)


def of_torch(case):
    """The module of PyTorch and the same network here."""
    import torch

    features, projected = case["features"], case["kind"] == "projected"
    shared: dict[str, Any] = dict(
        num_layers=case["layers"],
        bias=case["bias"],
        batch_first=True,
        bidirectional=case["directions"] == 2,
    )
    sizes = case["width"], features
    options: dict[str, Any] = dict(bias=case["bias"], return_carry=True)
    make = {"gru": gru, "tanh": simple_rnn, "relu": simple_rnn}.get(case["kind"], lstm)
    if make is lstm:
        module = torch.nn.LSTM(*sizes, proj_size=1 if projected else 0, **shared)
        options |= {"projection": 1} if projected else {}
    elif make is gru:
        module = torch.nn.GRU(*sizes, **shared)
    else:
        module = torch.nn.RNN(*sizes, nonlinearity=case["kind"], **shared)
        options |= {"activation": {"tanh": jnp.tanh, "relu": jax.nn.relu}[case["kind"]]}

    def one_layer():
        one = make(features, **options)
        if case["directions"] == 1:
            return one
        return bidirectional(one, make(features, reverse=True, **options))

    return module, stacked(*(one_layer() for _ in range(case["layers"])))


def params_of(case, tensors, *, gradients=False):
    """The parameters, or the gradients, of a module of PyTorch as those of the network here."""
    gru_size = case["features"] if case["kind"] == "gru" else None

    def one(suffix):
        get = lambda name: tensors[f"{name}_{suffix}"]  # noqa: E731
        params = {"kernel": np.concatenate([get("weight_ih").T, get("weight_hh").T])}
        if f"bias_ih_{suffix}" in tensors:
            # Each of PyTorch's two biases has the gradient of their sum.
            total = get("bias_ih") + (0 if gradients else get("bias_hh"))
            if gru_size:
                total[2 * gru_size :] = get("bias_ih")[2 * gru_size :]
                params["hidden_bias"] = get("bias_hh")[2 * gru_size :]
            params["bias"] = total
        if f"weight_hr_{suffix}" in tensors:
            params["projection"] = get("weight_hr").T
        return params

    def layer(i):
        if case["directions"] == 1:
            return one(f"l{i}")
        return {"forward": one(f"l{i}"), "backward": one(f"l{i}_reverse")}

    return {str(i): layer(i) for i in range(case["layers"])}


def carries_of(case, h, c):
    """The last carries of PyTorch, [layers * directions, B, H] each, as those of the network."""
    both = [(h[i], c[i]) if c is not None else h[i] for i in range(len(h))]
    if case["directions"] == 1:
        return tuple(both)
    return tuple((both[2 * i], both[2 * i + 1]) for i in range(case["layers"]))


def check_sequences(case):
    import torch

    rng = np.random.default_rng(case["seed"])
    lengths = np.array(case["lengths"])
    x64 = rng.normal(size=(len(lengths), 5, case["width"]))
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        torch.manual_seed(case["seed"])
        module, net = of_torch(case)
        module = module.to(getattr(torch, dtype))
        x = torch.tensor(x64.astype(dtype), requires_grad=True)
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed, last = module(
            pack(x, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False)
        )
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=5)
        towards = np.cos(np.arange(y.numel())).reshape(tuple(y.shape)).astype(dtype)
        (y * torch.tensor(towards)).sum().backward()
        h, c = last if isinstance(last, tuple) else (last, None)
        named = dict(module.named_parameters())
        arrays = {name: p.detach().numpy() for name, p in named.items()}
        grads = {name: np.asarray(p.grad) for name, p in named.items()}
        with jax.enable_x64(dtype == "float64"):
            params = params_of(case, arrays)

            def loss(params, x, net=net, towards=towards):
                carry, y = net.apply(params, x, lengths=lengths)
                return jnp.vdot(y, towards), (carry, y)

            run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
            (_, (carry, ours)), (dparams, dx) = run(params, x.detach().numpy())
            bound = dict(rtol=tolerance, atol=tolerance)
            close(ours, y.detach().numpy(), **bound)
            to_numpy = lambda a: None if a is None else a.detach().numpy()  # noqa: E731
            close(carry, carries_of(case, to_numpy(h), to_numpy(c)), **bound)
            close(dparams, params_of(case, grads, gradients=True), **bound)
            close(dx, np.asarray(x.grad), **bound)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@needs("torch")
@few
@given(SEQUENCES)
def test_sequences_equal_those_of_torch(case):
    check_sequences(case)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.slow
@needs("torch")
@many
@given(SEQUENCES)
def test_more_sequences_equal_those_of_torch(case):
    check_sequences(case)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@needs("torch")
@pytest.mark.parametrize("kind", ["projected", "gru"])
def test_two_layers_in_two_directions_equal_torch(kind):
    case = dict(kind=kind, width=3, features=2, layers=2, directions=2, bias=True, seed=1)
    check_sequences({**case, "lengths": [5, 1, 3]})


# --- Keras and Flax -------------------------------------------------------------------------------


@needs("keras")
# Keras itself causes it in NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_equals_keras(reset_after):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    twin = keras.layers.GRU(2, reset_after=reset_after, return_sequences=True)
    with jax.numpy_rank_promotion("allow"):
        twin.build(x.shape)
    kernel, hidden, bias = (
        np.random.default_rng(1).normal(size=w.shape).astype("float32") for w in twin.get_weights()
    )
    twin.set_weights([kernel, hidden, bias])
    z, r, n = np.split(np.concatenate([kernel, hidden]), 3, -1)
    params = {"kernel": np.concatenate([r, z, n], -1)}
    sums = bias.sum(0) if reset_after else bias
    z, r, n = np.split(sums, 3)
    if reset_after:
        n, params["hidden_bias"] = bias[0, 4:], bias[1, 4:]
    params["bias"] = np.concatenate([r, z, n])
    net = gru(2, reset_after=reset_after)
    with jax.numpy_rank_promotion("allow"):
        expected = np.asarray(twin(x))
    close(net.apply(params, x), expected, rtol=1e-5, atol=1e-6)


@needs("flax")
def test_mgu_equals_flax():
    import flax.linen as nn

    x = numbers(floats(2, 4, 3))
    twin = nn.RNN(nn.MGUCell(2))
    theirs = numbers(jax.eval_shape(twin.init, jax.random.key(0), x)["params"], 1)
    cell = next(iter(theirs.values()))
    kernels = [[cell[f"{a}{b}"]["kernel"] for b in "fn"] for a in "ih"]
    params = {
        "kernel": np.block([[np.asarray(k) for k in row] for row in kernels]),
        "bias": np.concatenate([cell["if"]["bias"], cell["in"]["bias"]]),
        "hidden_bias": cell["hn"]["bias"],
    }
    close(recurrent(mgu_cell(2)).apply(params, x), twin.apply({"params": theirs}, x))


@needs("flax")
def test_conv_lstm_equals_flax_whose_forget_gate_has_one_more():
    import flax.linen as nn

    x = numbers(floats(2, 3, 4, 5, 2))
    twin = nn.RNN(nn.ConvLSTMCell(3, (3, 2)))
    theirs = numbers(jax.eval_shape(twin.init, jax.random.key(0), x)["params"], 1)
    cell = next(iter(theirs.values()))
    order = lambda a: np.concatenate([np.split(a, 4, -1)[i] for i in (0, 2, 1, 3)], -1)  # noqa: E731
    kernel = np.concatenate([cell["ih"]["kernel"], cell["hh"]["kernel"]], 2)
    bias = order(np.asarray(cell["ih"]["bias"] + cell["hh"]["bias"]))
    bias[3:6] += 1
    params = {"gates": {"kernel": order(kernel), "bias": bias}}
    net = recurrent(conv_lstm_cell(3, (3, 2)), axis=-4)
    close(net.apply(params, x), twin.apply({"params": theirs}, x), rtol=1e-5, atol=2e-6)
    fresh = net.init(jax.random.key(0), x)["gates"]["bias"]
    np.testing.assert_array_equal(fresh, np.repeat([0, 1, 0, 0], 3))


# --- NumPy ----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_peepholes_equal_the_formula_of_gers():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(2, 5, 3))
        net = recurrent(lstm_cell(4, peephole=True), return_carry=True)
        params = weights(net, jax.ShapeDtypeStruct(x.shape, jnp.float64))
        p = jax.tree.map(np.asarray, params)
        h = c = np.zeros((2, 4))
        for t in range(5):
            i, f, g, o = np.split(np.concatenate([x[:, t], h], -1) @ p["kernel"] + p["bias"], 4, -1)
            i, f = sigmoid(i + p["peephole"][0] * c), sigmoid(f + p["peephole"][1] * c)
            c = f * c + i * np.tanh(g)
            h = sigmoid(o + p["peephole"][2] * c) * np.tanh(c)
        (last, memory), ys = net.apply(params, x)
        close((last, memory, ys[:, -1]), (h, c, h), rtol=1e-10, atol=1e-12)


# --- the runner -----------------------------------------------------------------------------------


def by_hand(cell, params, x, alive, carry, reverse):
    """The definition: steps one by one, of one sequence; a step that is not valid does nothing."""
    ys: list[Any] = [None] * len(x)
    for t in range(len(x))[:: -1 if reverse else 1]:
        new, y = cell.apply(params, carry, x[t])
        ys[t] = y if alive[t] else jnp.zeros_like(y)
        carry = new if alive[t] else carry
    return carry, jnp.stack(ys)


MASKS = {
    "lengths": np.arange(5) < np.array([[5], [0], [3]]),
    "holes": np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool),
}


@pytest.mark.parametrize("remat_every", [None, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_steps_that_are_not_valid_do_nothing_even_if_they_hold_nan(mask, reverse, remat_every):
    cell = lstm_cell(3)
    options = dict(reverse=reverse, remat_every=remat_every, return_carry=True)
    net, x = recurrent(cell, **options), np.asarray(numbers(floats(3, 5, 2)))
    params, carry = weights(net, x), tuple(numbers(floats(3, 3), i) for i in (1, 2))
    pairs = [
        by_hand(cell, params, x[b], mask[b], jax.tree.map(lambda c, b=b: c[b], carry), reverse)
        for b in range(3)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    padded = np.where(mask[..., None], x, np.nan)

    def loss(params, x):
        carried, y = net.apply(params, x, mask=mask, carry=carry)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carried, y))), (carried, y)

    (_, result), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, padded)
    close(result, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.any(grads[1][~mask])
    # The second sequence has no step, so its carry is the first one.
    close(jax.tree.map(lambda c: c[1], result[0]), jax.tree.map(lambda c: c[1], carry), 0, 0)


def test_lengths_are_a_mask_and_any_number_of_batch_axes_works():
    net, x = gru(3), numbers(floats(2, 3, 5, 2))
    params, lengths = weights(net, x), np.array([[5, 0, 9], [1, 2, 3]], np.int8)
    expected = net.apply(params, x, mask=np.arange(5) < lengths[..., None])
    close(net.apply(params, x, lengths=lengths), expected, 0, 0)
    close(net.apply(params, x[0, 0]), net.apply(params, x)[0, 0])
    assert net.apply(params, x[:0]).shape == (0, 3, 5, 3)
    assert net.apply(params, x[..., :0, :]).shape == (2, 3, 0, 3)


def test_chunks_store_fewer_numbers_for_the_backward_pass():
    x = floats(4, 256, 8)

    def stored(**options):
        net = recurrent(lstm_cell(8), **options)
        params = weights(net, x)
        grad = jax.jit(jax.grad(lambda p, x: jnp.square(net.apply(p, x)).sum()))
        analysis: Any = grad.lower(params, x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    whole, chunks = stored(), stored(remat_every=16)
    assert chunks < whole / 3


def test_dropout_in_the_cell_is_fresh_at_each_step_and_outside_one_for_all():
    ones = jnp.ones((2, 6, 50))

    @wire(drop=dropout(0.5))
    def noisy(f, carry, x):
        return carry, f.drop(x)

    @wire(rnn=recurrent(noisy), drop=dropout(0.5), same=recurrent(lambda carry, x: (carry, x)))
    def net(f, x):
        carry = jnp.zeros((2, 1))
        return f.rnn(x, carry=carry), f.same(x * f.drop(jnp.ones((2, 1, 50))), carry=carry)

    fresh, fixed = net.apply({}, ones, key=jax.random.key(0), train=True)
    assert all(np.any(fresh[:, t] != fresh[:, 0]) for t in range(1, 6))
    assert not np.any(fixed != fixed[:, :1]) and np.any(fixed == 0) and np.any(fixed == 2)


def test_the_first_carry_may_be_learned():
    @wire(rnn=gru(3), start=param((3,), jax.nn.initializers.normal()))
    def net(f, x):
        return f.rnn(x, carry=jnp.broadcast_to(f.start(), (*x.shape[:-2], 3)))

    x = numbers(floats(2, 4, 2))
    params = net.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: net.apply(p, x).sum())(params)
    assert np.all(grads["start"] != 0)


def test_a_recurrent_layer_has_the_paths_of_its_cell_and_fits_a_chain():
    net, x = chain(lstm(3), stacked(gru(4), simple_rnn(2)), dense(1)), numbers(floats(2, 5, 3))
    shapes = {path: p.shape for path, p in tree.flatten(net.init(jax.random.key(0), x)).items()}
    assert shapes["0/kernel"] == (6, 12) and shapes["1/0/hidden_bias"] == (4,)
    assert net.apply(weights(net, x), x).shape == (2, 5, 1)


def test_stacked_dropout_is_between_the_layers_only():
    net, x = stacked(simple_rnn(40), simple_rnn(40), dropout_rate=0.5), numbers(floats(2, 5, 3))
    params = weights(net, x)
    quiet, loud = net.apply(params, x), net.apply(params, x, key=jax.random.key(0), train=True)
    assert np.any(quiet != loud) and not np.any(loud == 0)
    one = stacked(simple_rnn(4), dropout_rate=0.5)
    one.apply(weights(one, x), x, train=True)


def test_initial_kernels_are_orthogonal_per_gate_and_the_forget_gate_begins_open():
    params = lstm_cell(4).init(jax.random.key(0), None, floats(2, 3))
    for gate in np.split(params["kernel"][3:], 4, -1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(4), atol=1e-6)
    np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], 4))
    narrow = gru_cell(4).init(jax.random.key(0), None, jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rnn_cell, gru_cell, mgu_cell, lstm_cell, lstm, gru, simple_rnn])
def test_sizes_may_be_integers_of_numpy_and_nothing_else(make):
    assert repr(make(np.int64(3))) == repr(make(3))
    for wrong in (True, 2.0, "2", None, 0):
        with pytest.raises(ValueError, match=r"features must be a positive int, got "):
            make(wrong)


X = np.zeros((2, 5, 3), np.float32)
WRONG = {
    "lengths of floats": (
        dict(lengths=np.ones(2)),
        TypeError,
        "lengths must be .* integers.*float",
    ),
    "lengths of another batch": (dict(lengths=np.ones(3, int)), ValueError, r"\[2\], got int"),
    "a mask of integers": (dict(mask=np.ones((2, 5), int)), TypeError, "an array of bools"),
    "a mask of another length": (dict(mask=np.ones((2, 4), bool)), ValueError, r"\[2, 5\], got"),
    "both": (dict(mask=np.ones((2, 5), bool), lengths=np.ones(2, int)), ValueError, "got both"),
    "half a carry": (dict(carry=(np.zeros((2, 4), "f"),)), ValueError, r"a pair \(h, c\)"),
    "a carry of another batch": (
        dict(carry=(np.zeros((3, 4), "f"), np.zeros((2, 4), "f"))),
        ValueError,
        r"h of the carry must have shape \[2, 4\], got float32\[3, 4\]",
    ),
}


@pytest.mark.parametrize("named, error, text", WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_named(named, error, text):
    net = lstm(4)
    params = weights(net, X)
    with pytest.raises(error, match=text):
        net.apply(params, X, **named)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"axis counts from the end.*-2 for .*got 1"):
        recurrent(lstm_cell(3), axis=1)
    with pytest.raises(ValueError, match="remat_every must be a positive int, got 0"):
        recurrent(lstm_cell(3), remat_every=0)
    with pytest.raises(ValueError, match="expected at least one layer"):
        stacked()
    with pytest.raises(ValueError, match="at least 2 axes"):
        lstm(3).init(jax.random.key(0), np.zeros(3, "f"))
    mixed = bidirectional(lstm(3), lstm(3, reverse=True, return_carry=True))
    with pytest.raises(ValueError, match="return their carry, or none, got"):
        mixed.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="parameter 'kernel' must be real, got complex64"):
        params = weights(lstm(3), X)
        lstm(3).apply({**params, "kernel": params["kernel"].astype(complex)}, X)
