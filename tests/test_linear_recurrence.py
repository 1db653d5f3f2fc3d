"""Linear recurrences: the equations in NumPy, and the parallel form against the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import close, floats, numbers, quick_to_compile, weights  # noqa: F401 (a fixture)

from jaxnet import chain, conv, dense, wire
from jaxnet.layers import (
    lru,
    lru_cell,
    min_gru,
    min_gru_cell,
    recurrent,
    rwkv7_channel_mix,
    rwkv7_time_mix,
    selective_ssm,
    selective_ssm_cell,
)

few = settings(max_examples=4, deadline=None, derandomize=True, database=None)
many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
PAIRS = {
    "lru": (lru, lru_cell),
    "min_gru": (min_gru, min_gru_cell),
    "selective_ssm": (selective_ssm, selective_ssm_cell),
}
CASES = st.fixed_dictionaries(
    {
        "pair": st.sampled_from(sorted(PAIRS)),
        "size": st.integers(1, 4),
        "width": st.integers(1, 4),
        "lengths": st.lists(st.integers(0, 6), min_size=1, max_size=3),
        "seed": st.integers(0, 99),
    }
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


# --- the equations, written out -------------------------------------------------------------------


def lru_by_hand(p, x):
    size = len(p["nu"])
    factor = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    b = (p["kernel"][:, :size] + 1j * p["kernel"][:, size:]).T
    c = (p["output"][:size] - 1j * p["output"][size:]).T
    h, ys = np.zeros(size, complex), []
    for now in x:
        h = factor * h + np.exp(p["gamma"]) * (b @ now)
        ys.append((c @ h).real + p["skip"] * now)
    return np.stack(ys)


def min_gru_by_hand(p, x):
    h, ys = 0, []
    for now in x:
        z, n = np.split(now @ p["kernel"] + p["bias"], 2)
        h = (1 - sigmoid(z)) * h + sigmoid(z) * n
        ys.append(h)
    return np.stack(ys)


def selective_ssm_by_hand(p, x):
    """Algorithm 2 of Gu & Dao, one number at a time."""
    rank, (width, size) = len(p["delta_kernel"]), p["decay"].shape
    h, ys = np.zeros((width, size)), np.zeros(x.shape)
    for t, now in enumerate(x):
        u, b, c = np.split(now @ p["kernel"], [rank, rank + size])
        delta = softplus(u @ p["delta_kernel"] + p["delta_bias"])
        for d in range(width):
            for n in range(size):
                a = -np.exp(p["decay"][d, n])
                h[d, n] = np.exp(delta[d] * a) * h[d, n] + delta[d] * b[n] * now[d]
            ys[t, d] = h[d] @ c + p["skip"][d] * now[d]
    return ys


BY_HAND = {
    "lru": lru_by_hand,
    "min_gru": min_gru_by_hand,
    "selective_ssm": selective_ssm_by_hand,
}


def check(case):
    make, cell = PAIRS[case["pair"]]
    lengths = np.array(case["lengths"])
    x64 = np.random.default_rng(case["seed"]).normal(size=(len(lengths), 6, case["width"]))
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            nets = (
                make(case["size"], return_carry=True),
                recurrent(cell(case["size"]), return_carry=True),
            )
            x = x64.astype(dtype)
            # The initial values, whose recurrences decay.
            params = nets[0].init(jax.random.key(case["seed"]), x)

            def run(net, params, x):
                def loss(params, x):
                    outputs = net.apply(params, x, lengths=lengths)
                    return sum(jnp.sin(y).sum() for y in jax.tree.leaves(outputs)), outputs

                return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

            (_, (carry, y)), grads = jax.jit(run, static_argnums=0)(nets[0], params, x)
            (_, steps), step_grads = jax.jit(run, static_argnums=0)(nets[1], params, x)
        close((carry, y, grads), (*steps, step_grads), rtol=10 * tolerance, atol=tolerance)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        for i, length in enumerate(lengths):
            if length:
                hand = BY_HAND[case["pair"]](wide, x[i, :length].astype(np.float64))
                np.testing.assert_allclose(y[i, :length], hand, rtol=tolerance, atol=tolerance)
            assert not np.any(y[i, length:])


@few
@given(CASES)
def test_the_parallel_form_the_steps_and_numpy_are_equal(case):
    check(case)


@pytest.mark.slow
@many
@given(CASES)
def test_the_parallel_form_the_steps_and_numpy_are_equal_in_more_cases(case):
    check(case)


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [lru, min_gru, selective_ssm])
def test_a_sequence_goes_on_from_its_carry(make):
    net, x = make(3, return_carry=True), numbers(floats(2, 7, 4))
    params = net.init(jax.random.key(0), x)
    last, whole = net.apply(params, x)
    carry, first = net.apply(params, x[:, :3])
    carry, second = net.apply(params, x[:, 3:], carry=carry)
    close((carry, jnp.concatenate([first, second], 1)), (last, whole))
    close(net.apply(params, x[:, :0], carry=carry)[0], carry)


@pytest.mark.slow
def test_a_long_sequence_neither_grows_nor_vanishes():
    """1,024 steps of the initial recurrence, in float32, against float64."""
    x = np.random.default_rng(0).normal(size=(1, 1024, 4))
    net = lru(8, r_min=0.9, r_max=0.999)
    params = net.init(jax.random.key(0), x.astype("f"))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    np.testing.assert_allclose(
        net.apply(params, x.astype("f"))[0], lru_by_hand(wide, x[0]), rtol=1e-4, atol=1e-4
    )
    size = np.exp(-np.exp(wide["nu"]))
    assert np.all((size >= 0.9) & (size <= 0.9991))
    np.testing.assert_allclose(np.exp(2 * wide["gamma"]), 1 - size**2, rtol=1e-3)


def test_a_block_of_mamba_is_made_of_layers_and_sees_no_later_step():
    """Figure 3 of Gu & Dao."""
    causal = conv(8, (4,), padding=((3, 0),), groups=8)

    @wire(up=dense(16, bias=False), mix=causal, ssm=selective_ssm(3), down=dense(4, bias=False))
    def mamba(f, x):
        x, gate = jnp.split(f.up(x), 2, -1)
        return f.down(f.ssm(jax.nn.silu(f.mix(x))) * jax.nn.silu(gate))

    net, x = chain(mamba, mamba), numbers(floats(2, 6, 4))
    params = net.init(jax.random.key(0), x)
    changed = net.apply(params, x.at[:, 4].add(1)) - net.apply(params, x)
    assert not np.any(changed[:, :4]) and np.all(np.any(changed[:, 4:], -1))
    assert np.all(np.asarray(params["0"]["ssm"]["delta_bias"]) < np.log(np.expm1(0.1)) + 1e-4)


# --- RWKV-7 ---------------------------------------------------------------------------------------


def time_mix_by_hand(p, x, first, heads):
    """The equations of Peng et al. for one sequence, one step and one head at a time."""
    width = x.shape[1]
    size, vectors = width // heads, p["vectors"]
    low = lambda q, y, act=lambda y: y: act(y @ q["down"]["kernel"]) @ q["up"]["kernel"]  # noqa: E731
    state, old, ys = np.zeros((heads, size, size)), np.zeros(width), []
    for now, v_first in zip(x, first, strict=True):
        r, w, k, v, a, g = (now + m * (old - now) for m in vectors["mix"])
        old = now
        mixed_v = v
        r, k, v = (
            y @ p[name]["kernel"] for y, name in ((r, "receptance"), (k, "keys"), (v, "values"))
        )
        # The decay, exp(-exp(-softplus(-y) - 1/2)), is exp(-sigmoid(y) / sqrt(e)).
        y = low(p["decay"], w, np.tanh) + p["decay"]["up"]["bias"]
        w = np.exp(-sigmoid(y) * np.exp(-0.5))
        a = sigmoid(low(p["rate"], a) + p["rate"]["up"]["bias"])
        g = low(p["gate"], g, sigmoid)
        blend = sigmoid(low(p["blend"], mixed_v) + p["blend"]["up"]["bias"])
        v = v + (v_first - v) * blend
        removal = (k * vectors["removal"]).reshape(heads, size)
        removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
        k = k * (1 + (a - 1) * vectors["change"])
        r, w, k, v, a = (y.reshape(heads, size) for y in (r, w, k, v, a))
        out = np.zeros((heads, size))
        for h in range(heads):
            change = np.diag(w[h]) - np.outer(removal[h], a[h] * removal[h])
            state[h] = state[h] @ change + np.outer(v[h], k[h])
            y = state[h] @ r[h]
            y = (y - y.mean()) / np.sqrt(y.var() + 64e-5)
            part = slice(h * size, (h + 1) * size)
            y = y * p["norm"]["scale"][part] + p["norm"]["bias"][part]
            out[h] = y + (r[h] * k[h] * vectors["bonus"][h]).sum() * v[h]
        ys.append((out.ravel() * g) @ p["output"]["kernel"])
    return np.stack(ys), state


@pytest.mark.parametrize("parallel", [False, True])
def test_time_mix_equals_numpy_and_goes_on_from_its_carry(parallel):
    with jax.enable_x64(True):
        x, value = np.random.default_rng(0).normal(size=(2, 2, 5, 6))
        net = rwkv7_time_mix(6, head_size=3, rank=2, parallel=parallel)
        params = weights(net, *(jax.ShapeDtypeStruct(x.shape, jnp.float64),) * 2)
        apply = jax.jit(net.apply)
        y, same, carry = apply(params, x, value)
        np.testing.assert_array_equal(same, value)
        wide = jax.tree.map(np.asarray, params)
        for b in range(2):
            hand, state = time_mix_by_hand(wide, x[b], value[b], heads=2)
            np.testing.assert_allclose(y[b], hand, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(carry[1][b], state, rtol=1e-10, atol=1e-12)
        steps, now = [], None
        for t in range(5):
            one, _, now = apply(params, x[:, t : t + 1], value[:, t : t + 1], now)
            steps.append(one)
        close((jnp.concatenate(steps, 1), now), (y, carry), rtol=1e-10, atol=1e-12)


def test_both_forms_of_time_mix_have_the_same_gradients():
    with jax.enable_x64(True):
        x, value = np.random.default_rng(0).normal(size=(2, 2, 4, 4))
        nets = [rwkv7_time_mix(4, head_size=2, rank=2, parallel=p) for p in (False, True)]
        params = weights(nets[0], *(jax.ShapeDtypeStruct(x.shape, jnp.float64),) * 2)

        def loss(params, x, net):
            y, _, (_, state) = net.apply(params, x, value)
            return jnp.sin(y).sum() + jnp.sin(state).sum()

        grads = [jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, x, net) for net in nets]
    close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_channel_mix_equals_numpy_and_goes_on_from_its_carry():
    net, x = rwkv7_channel_mix(3, hidden=5), numbers(floats(2, 4, 3))
    params = weights(net, x)
    p = jax.tree.map(np.asarray, params)
    seen = np.asarray(x)
    before = np.concatenate([np.zeros((2, 1, 3)), seen[:, :-1]], 1)
    mixed = seen + p["vectors"]["mix"] * (before - seen)
    hand = np.maximum(mixed @ p["keys"]["kernel"], 0) ** 2 @ p["values"]["kernel"]
    y, carry = net.apply(params, x)
    close(y, hand, rtol=1e-5, atol=1e-5)
    first, half = net.apply(params, x[:, :2])
    second, last = net.apply(params, x[:, 2:], half)
    close((jnp.concatenate([first, second], 1), last), (y, carry), rtol=1e-5, atol=1e-5)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lru, lru_cell, min_gru, min_gru_cell, selective_ssm, selective_ssm_cell, rwkv7_channel_mix],
)
def test_sizes_may_be_integers_of_numpy_and_nothing_else(make):
    assert repr(make(np.int64(3))) == repr(make(3))
    for wrong in (True, 2.0, "2", None, 0):
        with pytest.raises(ValueError, match=r"must be a positive int, got "):
            make(wrong)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="head_size must divide the features.*6.*head_size=4"):
        rwkv7_time_mix(6, head_size=4)
    with pytest.raises(ValueError, match="expected 0 <= r_min < r_max <= 1"):
        lru(3, r_min=1.0)
    x = np.zeros((2, 5, 4), np.float32)
    with pytest.raises(TypeError, match="the value of the first block must be an array"):
        rwkv7_time_mix(4, head_size=2).init(jax.random.key(0), x)
    net = lru(3)
    params = net.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match=r"the carry must have shape \[2, 6\], got float32\[2, 3\]"
    ):
        net.apply(params, x, carry=np.zeros((2, 3), "f"))
    with pytest.raises(ValueError, match="last axis must be 4"):
        net.apply(params, x[..., :3])
    with pytest.raises(TypeError, match="must be real, got complex64"):
        net.apply({**params, "nu": params["nu"].astype(jnp.complex64)}, x)
