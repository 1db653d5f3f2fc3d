"""Attention, positions, masks and caches equal PyTorch, Keras or the formula in float64."""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import close, quick_to_compile, weights  # noqa: F401 (a fixture)

import jaxnet
from jaxnet import chain, dense, layer_norm, repeat, wire
from jaxnet.core import output_specs
from jaxnet.layers import (
    alibi,
    causal,
    dot_product_attention,
    empty_cache,
    fused_attention,
    kv_cache,
    learned_positions,
    masked_softmax,
    multi_head_attention,
    padding,
    relative_bias,
    rotary,
    scaling,
    segments,
    sink_softmax,
    sinusoidal,
    soft_cap,
    window,
)

few = settings(max_examples=5, deadline=None, derandomize=True, database=None)
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no PyTorch")

# What is drawn for one core of attention.
CORES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "queries": st.integers(1, 5),
        "keys": st.integers(1, 5),
        "groups": st.integers(1, 2),
        "per_group": st.integers(1, 3),
        "size": st.integers(1, 4),
        "mask": st.sampled_from(["none", "causal", "bools", "floats"]),
        "scale": st.sampled_from([None, 0.3]),
        "seed": st.integers(0, 99),
    }
)


def draw(case, dtype):
    """q, k, v and the weights of a loss, normal numbers."""
    rng = np.random.default_rng(case["seed"])
    heads = case["groups"] * case["per_group"]
    q = rng.normal(size=(case["batch"], case["queries"], heads, case["size"]))
    k, v = rng.normal(size=(2, case["batch"], case["keys"], case["groups"], case["size"]))
    shape = (case["batch"], 1, case["queries"], case["keys"])
    bools = rng.random(shape) < 0.6
    # PyTorch gives NaN for a query without a key.
    bools[..., 0] = True
    mask = {
        "none": None,
        "causal": causal(),
        "bools": bools,
        "floats": rng.normal(size=shape).astype(dtype),
    }[case["mask"]]
    return [x.astype(dtype) for x in (q, k, v, np.cos(np.arange(q.size)).reshape(q.shape))], mask


def check_core(case, core):
    import torch

    for dtype, rtol in (("float64", 1e-10), ("float32", 1e-5)):
        (q, k, v, towards), mask = draw(case, dtype)
        tensors: list[Any] = [torch.tensor(x.swapaxes(1, 2), requires_grad=True) for x in (q, k, v)]
        given_mask = torch.tensor(mask) if isinstance(mask, np.ndarray) else None
        y = torch.nn.functional.scaled_dot_product_attention(
            *tensors,
            attn_mask=given_mask,
            is_causal=case["mask"] == "causal",
            scale=case["scale"],
            enable_gqa=True,
        )
        (y * torch.tensor(towards.swapaxes(1, 2))).sum().backward()
        expected = [x.detach().numpy().swapaxes(1, 2) for x in (y, *(t.grad for t in tensors))]
        with jax.enable_x64(dtype == "float64"):

            def loss(q, k, v, mask, towards):
                y = core.apply({}, q, k, v, mask)
                return jnp.vdot(y, towards), y

            grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v, mask, towards)
            actual = [y, *grads]
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1, np.abs(b).max()))


@needs_torch
@few
@given(CORES)
def test_the_core_is_that_of_pytorch(case):
    check_core(case, dot_product_attention(scale=case["scale"]))


@pytest.mark.slow
@needs_torch
@many
@given(CORES)
def test_the_core_is_that_of_pytorch_for_many_shapes(case):
    check_core(case, dot_product_attention(scale=case["scale"]))


HEADS = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 3),
        "size": st.integers(1, 3),
        "queries": st.integers(1, 4),
        "keys": st.integers(1, 4),
        "bias": st.booleans(),
        "cross": st.booleans(),
        "lengths": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@needs_torch
@few
@given(HEADS)
def test_multi_head_attention_is_that_of_pytorch(case):
    """Forward and the gradients of inputs and parameters, in float64."""
    import torch

    width = case["heads"] * case["size"]
    rng = np.random.default_rng(case["seed"])
    x = rng.normal(size=(2, case["queries"], width))
    context = rng.normal(size=(2, case["keys"], width)) if case["cross"] else x
    lengths = rng.integers(1, context.shape[1] + 1, 2) if case["lengths"] else None
    theirs: Any = torch.nn.MultiheadAttention(
        width, case["heads"], bias=case["bias"], batch_first=True, dtype=torch.float64
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(case["seed"]))
    hidden = None
    if lengths is not None:
        hidden = torch.tensor(np.arange(context.shape[1]) >= lengths[:, None])
    a = torch.tensor(x, requires_grad=True)
    b = torch.tensor(context, requires_grad=True)
    y, w = theirs(a, b, b, key_padding_mask=hidden, average_attn_weights=False)
    towards = np.cos(np.arange(y.numel())).reshape(y.shape)
    (y * torch.tensor(towards)).sum().backward()

    with jax.enable_x64(True):
        net = multi_head_attention(width, case["heads"], bias=case["bias"])
        params = of_pytorch(dict(theirs.named_parameters()), lambda p: p.detach().numpy())
        mask = None if lengths is None else padding(jnp.asarray(lengths))
        tapped = jaxnet.capture(net, "**/weights")

        def loss(params, a, b):
            y, seen = tapped(params, a, b, mask=mask)
            return jnp.vdot(y, towards), (y, seen["core/weights"])

        grads, (y2, w2) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, context)
    expected = of_pytorch(dict(theirs.named_parameters()), grad_of)
    close((y2, w2), (y.detach().numpy(), w.detach().numpy()), 1e-10, 1e-10)
    close(grads, (expected, grad_of(a), grad_of(b)), 1e-9, 1e-10)


def grad_of(tensor: Any) -> np.ndarray:
    return tensor.grad.numpy()


def of_pytorch(named, numpy):
    """The parameters of torch.nn.MultiheadAttention by the names here."""
    split = {
        key: np.split(numpy(named[f"in_proj_{key}"]), 3)
        for key in ("weight", "bias")
        if f"in_proj_{key}" in named
    }
    params = {"out": {"kernel": numpy(named["out_proj.weight"]).T}}
    for i, name in enumerate(("query", "keys", "values")):
        params[name] = {"kernel": split["weight"][i].T}
        if "bias" in split:
            params[name]["bias"] = split["bias"][i]
    if "out_proj.bias" in named:
        params["out"]["bias"] = numpy(named["out_proj.bias"])
    return params


@pytest.mark.sample(1)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_are_those_of_keras(groups, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras: Any = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras must compute with JAX")
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    theirs = keras.layers.GroupQueryAttention(3, 4, groups)
    with jax.numpy_rank_promotion("allow"):
        y, w = theirs(x, x, use_causal_mask=True, return_attention_scores=True)
    net = multi_head_attention(8, 4, groups=groups, size=3, mask=causal())
    params = {}
    for name in ("query", "key", "value", "output"):
        part = getattr(theirs, f"_{name}_dense")
        kernel = np.asarray(part.kernel.value)
        flat = (-1, 8) if name == "output" else (8, -1)
        params[{"key": "keys", "value": "values", "output": "out"}.get(name, name)] = {
            "kernel": kernel.reshape(flat),
            "bias": np.asarray(part.bias.value).reshape(-1),
        }
    ours, seen = jaxnet.capture(net, "**/weights")(params, x)
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen["core/weights"], w, rtol=1e-5, atol=1e-6)


# --- masks ----------------------------------------------------------------------------------------


def test_masks_compose_as_sets_of_pairs():
    t, s = np.arange(5)[:, None], np.arange(6)
    ids = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    key_ids = np.array([[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2]])
    lengths, free = np.array([4, 6]), np.random.default_rng(0).random((2, 1, 5, 6)) < 0.7
    mask = causal() & window(2) & padding(lengths) & segments(ids, key_ids) & free
    expected = (s <= t) & (t - s <= 2) & (s < lengths[:, None, None, None])
    expected = expected & (ids[:, None, :, None] == key_ids[:, None, None, :]) & free
    np.testing.assert_array_equal(mask.pairs(jnp.arange(5), jnp.arange(6)), expected)
    # `&` takes the narrower window, and arrays from the left, too.
    both = jnp.asarray(free) & (window(3, 1) & window(2))
    expected = (t - s <= 2) & (s - t <= 1) & free
    np.testing.assert_array_equal(both.pairs(jnp.arange(5), jnp.arange(6)), expected)
    assert (causal() & None).pairs(jnp.arange(2), jnp.arange(2)).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("core", [dot_product_attention(), fused_attention()], ids=["own", "fused"])
def test_a_query_without_a_key_gives_zeros_and_finite_gradients(core):
    q = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2, 3)), jnp.float32)
    mask = padding(jnp.array([0, 2, 4])) & causal()
    y = core.apply({}, q, q, q, mask)
    np.testing.assert_array_equal(y[0], 0)
    alone = core.apply({}, q[1:2], q[1:2, :2], q[1:2, :2], causal())
    np.testing.assert_allclose(y[1], alone[0], rtol=1e-5, atol=1e-6)

    def loss(q, bias):
        return jnp.sum(jnp.sin(core.apply({}, q, q, q, mask & bias)))

    bias = jnp.zeros((1, 1, 4, 4))
    grads = jax.jit(jax.grad(loss, (0, 1)))(q, bias)
    assert all(np.isfinite(g).all() and np.any(g) for g in grads)
    np.testing.assert_array_equal(grads[0][0], 0)


def test_empty_batches_and_sequences():
    net = chain(sinusoidal(), multi_head_attention(4, 2, groups=1, positions=rotary()))
    params = weights(net, jnp.ones((1, 2, 4)))
    for shape in [(0, 3, 4), (2, 0, 4), (0, 0, 4)]:
        assert net.apply(params, jnp.zeros(shape)).shape == shape
    # A context without tokens gives zeros, and the bias of the output is left.
    net = multi_head_attention(4, 2)
    x = jnp.ones((2, 3, 4))
    params = weights(net, x)
    y = net.apply(params, x, jnp.ones((2, 0, 4)))
    np.testing.assert_allclose(y, np.broadcast_to(params["out"]["bias"], (2, 3, 4)))


def test_an_additive_mask_may_be_minus_infinity_everywhere():
    q = jnp.ones((1, 2, 1, 2))
    bias = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    run = lambda q, bias: dot_product_attention().apply({}, q, q, q, bias)  # noqa: E731
    np.testing.assert_allclose(run(q, bias)[0, :, 0], [[0, 0], [1, 1]])
    grads = jax.grad(lambda *a: jnp.sum(jnp.sin(run(*a))), (0, 1))(q, bias)
    assert all(np.isfinite(g).all() for g in grads)


def test_packed_sequences_equal_the_sequences_alone():
    net = multi_head_attention(8, 2, positions=rotary(), mask=causal())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 8)), jnp.float32)
    params = weights(net, x)
    ids, at = jnp.array([[0, 0, 0, 1, 1, 1, 1]]), jnp.array([0, 1, 2, 0, 1, 2, 3])
    # Positions begin again in each segment. A causal mask then allows keys of other segments,
    # which the segments hide.
    y = net.apply(params, x, at=at, mask=segments(ids))
    alone = [net.apply(params, x[:, :3]), net.apply(params, x[:, 3:])]
    np.testing.assert_allclose(y, jnp.concatenate(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [None, causal(), causal() & window(1), padding(jnp.array([2, 3])), "free"],
    ids=["none", "causal", "window", "lengths", "free"],
)
def test_the_fused_core_is_the_own_one(mask):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 3, 4, 2)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 3, 2, 2)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, 3, 3)) < 0.5) if mask == "free" else mask
    bias = alibi(4).apply({}, jnp.arange(3), jnp.arange(3))
    own, fused = (
        core.apply({}, q, k, v, mask, bias)
        for core in (dot_product_attention(), fused_attention("xla"))
    )
    np.testing.assert_allclose(fused, own, rtol=1e-5, atol=1e-6)


# --- positions ------------------------------------------------------------------------------------


def rotated(x, at, frequencies, factor, interleaved):
    """x [T, heads, size] by complex numbers, in float64."""
    if interleaved:
        z = x[..., ::2] + 1j * x[..., 1::2]
    else:
        z = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    z = z * factor * np.exp(1j * at[:, None, None] * frequencies)
    parts = [z.real, z.imag]
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)


def yarn_of_the_paper(base, size, factor, length, fast, slow):
    """Frequencies by the loop of the authors' program, with whole bounds."""
    find = lambda turns: size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    low, high = max(math.floor(find(fast)), 0), min(math.ceil(find(slow)), size - 1)
    result = []
    for i in range(size // 2):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        plain = base ** (-2 * i / size)
        result.append(plain / factor * ramp + plain * (1 - ramp))
    return np.array(result)


def llama3_of_the_model(base, size, factor, low, high, length):
    """Frequencies by the loop of Meta's program."""
    result = []
    for i in range(size // 2):
        f = base ** (-2 * i / size)
        wavelength = 2 * math.pi / f
        if wavelength < length / high:
            result.append(f)
        elif wavelength > length / low:
            result.append(f / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append((1 - smooth) * f / factor + smooth * f)
    return np.array(result)


SIZE = 16
PLAIN = 10_000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
SCALED = {
    "plain": (10_000.0, None, PLAIN, 1.0),
    "linear": (10_000.0, scaling.linear(4.0), PLAIN / 4, 1.0),
    "llama3": (
        500_000.0,
        scaling.llama3(8.0, low=1.0, high=4.0, length=256),
        llama3_of_the_model(500_000.0, SIZE, 8.0, 1.0, 4.0, 256),
        1.0,
    ),
    "yarn": (
        10_000.0,
        scaling.yarn(16.0, length=4096),
        yarn_of_the_paper(10_000.0, SIZE, 16.0, 4096, 32, 1),
        0.1 * math.log(16) + 1,
    ),
    "yarn, short": (
        100.0,
        scaling.yarn(4.0, length=64, fast=8.0, slow=2.0, magnitude=1.0),
        yarn_of_the_paper(100.0, SIZE, 4.0, 64, 8, 2),
        1.0,
    ),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_product_of_complex_numbers(name, interleaved):
    base, scaled, frequencies, factor = SCALED[name]
    x = np.random.default_rng(0).normal(size=(6, 2, SIZE + 3))
    at = np.array([0, 1, 2, 40, 41, 300])
    net = rotary(base, interleaved=interleaved, size=SIZE, scaling=scaled)
    expected = rotated(x[..., :SIZE], at, frequencies, factor, interleaved)
    expected = np.concatenate([expected, x[..., SIZE:]], -1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(net.apply({}, x, at), expected, rtol=1e-10, atol=1e-12)
        rows = np.stack([at, at[::-1]])
        y = net.apply({}, np.stack([x, x]), rows)
        np.testing.assert_allclose(y[0], expected, rtol=1e-10, atol=1e-12)
    y = net.apply({}, x.astype(np.float32), at)
    # An angle of 300 has an error of 2e-5 in float32.
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_scalar_position_is_that_of_the_first_token():
    x = np.random.default_rng(0).normal(size=(2, 3, 1, 4)).astype(np.float32)
    y = rotary().apply({}, x, 5)
    np.testing.assert_array_equal(y, rotary().apply({}, x, jnp.array([5, 6, 7])))
    with pytest.raises(ValueError, match="rotary: `at` must be a scalar.* all 3 tokens"):
        rotary().apply({}, x, jnp.array([5, 6]))


def test_sinusoidal_and_learned_positions():
    x = np.random.default_rng(0).normal(size=(2, 4, 5))
    p = np.array([2, 3, 4, 5])
    table = np.zeros((4, 5))
    for i in range(5):
        angle = p / 10_000 ** (i // 2 * 2 / 5)
        table[:, i] = np.cos(angle) if i % 2 else np.sin(angle)
    with jax.enable_x64(True):
        np.testing.assert_allclose(sinusoidal().apply({}, x, 2), x + table, rtol=1e-10)
        net = learned_positions(6)
        params = weights(net, jax.ShapeDtypeStruct(x.shape, x.dtype))
        y = net.apply(params, x, 2)
        np.testing.assert_allclose(y, x + np.asarray(params["embedding"])[2:], rtol=1e-12)
        assert np.isnan(net.apply(params, x, 3)[:, -1]).all()
        with pytest.raises(ValueError, match="at most 6 tokens"):
            net.apply(params, np.zeros((7, 5)))


def test_alibi_has_the_slopes_of_the_paper():
    eight = [2.0**-h for h in range(1, 9)]
    bias = alibi(8).apply({}, jnp.array([3]), jnp.arange(4))
    np.testing.assert_allclose(bias[:, 0], [[-3 * m, -2 * m, -m, 0] for m in eight])
    # The slopes of 12 heads in the authors' program: those of 8, then every other one of 16.
    twelve = alibi(12).apply({}, jnp.array([1]), jnp.array([0]))[:, 0, 0]
    np.testing.assert_allclose(twelve, [-m for m in eight + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]])


def t5_bucket(distance, bidirectional, buckets, longest):
    """`_relative_position_bucket` of T5 for one distance (key - query), in Python's float."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket += buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -min(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    large = math.log(distance / exact) / math.log(longest / exact) * (buckets - exact)
    return bucket + min(exact + int(large), buckets - 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_bias_has_the_buckets_of_t5(bidirectional):
    net = relative_bias(2, buckets=32, distance=100, bidirectional=bidirectional)
    q, k = jnp.array([0, 150]), jnp.arange(300)
    table = np.stack([np.arange(32), np.arange(32) + 100], -1).astype(np.float32)
    bias = net.apply({"embedding": table}, q, k)
    expected = [[t5_bucket(int(s - t), bidirectional, 32, 100) for s in k] for t in q]
    np.testing.assert_array_equal(bias[0], expected)
    np.testing.assert_array_equal(bias[1], np.array(expected) + 100)


def test_sinks_and_soft_cap_are_the_formulas():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 4, 2, 3))
    sinks = rng.normal(size=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 3**0.5
    scores = 1.5 * np.tanh(scores / 1.5)
    e = np.where(np.tri(4, dtype=bool), np.exp(scores), 0)
    w = e / (e.sum(-1, keepdims=True) + np.exp(sinks)[None, :, None, None])
    core = dot_product_attention(cap=soft_cap(1.5), softmax=sink_softmax())
    params = {"softmax": {"sinks": sinks}}
    with jax.enable_x64(True):
        y, seen = jaxnet.capture(core, "weights")(params, q, k, v, causal())
    np.testing.assert_allclose(seen["weights"], w, rtol=1e-10)
    np.testing.assert_allclose(y, np.einsum("bnts,bsnh->btnh", w, v), rtol=1e-10, atol=1e-12)


def test_softmax_is_that_of_jax_with_its_derivatives():
    s = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)) * 10, jnp.float32)
    own = lambda s: masked_softmax().apply({}, s)  # noqa: E731
    np.testing.assert_allclose(own(s), jax.nn.softmax(s), rtol=1e-5, atol=1e-7)
    for derivative in (jax.jacfwd, jax.jacrev):
        actual, expected = (jax.jit(derivative(f))(s) for f in (own, jax.nn.softmax))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


# --- caches ---------------------------------------------------------------------------------------


def language_model(mask, groups, positions, depth=2):
    attn = multi_head_attention(
        16, 4, groups=groups, bias=False, positions=positions, norm=layer_norm(), mask=mask,
        cached=True,
    )  # fmt: skip

    @wire(norm=layer_norm(), attn=attn, out=dense(16))
    def block(f, x, at, cache):
        y, cache = f.attn(f.norm(x), at=at, cache=cache)
        return x + f.out(jnp.tanh(x + y)), cache

    @wire(blocks=repeat(block, depth, each="cache", collect=True))
    def net(f, x, at=0, cache=None):
        return f.blocks(x, at, cache=cache)

    return net


CHUNKS = {"one by one": [1] * 9, "prompt, then one by one": [4, 1, 1, 1, 1, 1], "chunks": [2, 4, 3]}


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.06)])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize(
    "mask, groups, length",
    [
        (causal(), 4, 9),
        (causal(), 1, 12),
        (causal() & window(3), 2, 4),
        (causal() & window(3), 2, 9),
    ],
    ids=["multi-head", "multi-query, longer", "ring", "window in a full buffer"],
)
def test_decoding_equals_the_full_forward_pass(mask, groups, length, chunks, dtype, bound):
    net = language_model(mask, groups, rotary())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 16)), dtype)
    params = net.init(jax.random.key(0), x)
    full, _ = net.apply(params, x)
    _, specs = output_specs(net, False, jax.ShapeDtypeStruct((2, length, 16), x.dtype))
    cache, at, parts = empty_cache(specs), 0, []
    apply = jax.jit(net.apply)
    for size in chunks:
        y, cache = apply(params, x[:, at : at + size], at, cache)
        parts.append(y)
        at += size
    difference = jnp.concatenate(parts, 1).astype(jnp.float32) - full.astype(jnp.float32)
    assert np.abs(difference).max() < bound * np.abs(full.astype(jnp.float32)).max()


def test_rows_may_be_at_different_positions():
    """A batch of prompts of lengths 2 and 4 goes on, each row from its own position."""
    net = language_model(causal(), 2, rotary())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
    params = net.init(jax.random.key(0), x)
    full, _ = net.apply(params, x)
    at = jnp.broadcast_to(jnp.arange(6), (2, 6))
    _, specs = output_specs(
        net, False, jax.ShapeDtypeStruct((2, 8, 16), x.dtype), jnp.zeros((2, 8), int)
    )
    _, cache = net.apply(params, x[:, :4], at[:, :4], empty_cache(specs))
    lengths, apply = jnp.array([2, 4]), jax.jit(net.apply)
    for step in range(2):
        now = (lengths + step)[:, None]
        token = jnp.take_along_axis(x, now[..., None], 1)
        y, cache = apply(params, token, now, cache)
        expected = jnp.take_along_axis(full, now[..., None], 1)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_generation_may_go_back():
    net = language_model(causal(), 2, rotary())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 16)), jnp.float32)
    params = net.init(jax.random.key(0), x)
    full, cache = net.apply(params, x)
    _, specs = output_specs(net, False, x)
    _, cache = net.apply(params, -x, 0, empty_cache(specs))
    apply = jax.jit(net.apply)
    for at in range(6):
        y, cache = apply(params, x[:, at : at + 1], at, cache)
        np.testing.assert_allclose(y[:, 0], full[:, at], rtol=1e-4, atol=1e-5)


def test_bad_caches_are_refused():
    net = multi_head_attention(4, 2, cached=True)
    x = jnp.ones((2, 1, 4))
    params = net.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match="kv_cache: a cache has the arrays 'key', 'value' and 'at'"
    ):
        net.apply(params, x, cache=jnp.zeros((2, 8, 2, 2)))
    _, cache = net.apply(params, jnp.ones((3, 8, 4)))
    with pytest.raises(ValueError, match="kv_cache: the cache must fit keys"):
        net.apply(params, x, cache=cache)
    with pytest.raises(TypeError, match="only a layer with cached=True takes cache="):
        multi_head_attention(4, 2).apply(params, x, cache=cache)
    assert kv_cache() is kv_cache()


# --- composition and errors -----------------------------------------------------------------------


def test_children_are_replaced_by_path_with_the_same_parameters():
    net = chain(attn=multi_head_attention(8, 2, bias=False), head=dense(3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    params = weights(net, x)
    new = jaxnet.replace(net, "**/attn/positions", rotary())
    new = jaxnet.replace(new, "**/attn/mask", causal() & window(1))
    new = jaxnet.replace(new, "**/attn/position_bias", alibi(2))
    new = jaxnet.replace(new, "**/attn/core", fused_attention())
    same = multi_head_attention(
        8, 2, bias=False, positions=rotary(), mask=causal() & window(1), position_bias=alibi(2)
    )
    expected = chain(attn=same, head=dense(3)).apply(params, x)
    np.testing.assert_allclose(new.apply(params, x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_weights_draws_in_training_only():
    core = dot_product_attention(dropout=0.5)
    q = jnp.ones((1, 4, 1, 2))
    y = core.apply({}, q, q, q)
    np.testing.assert_allclose(y, 1)
    noisy = core.apply({}, q, q, q, key=jax.random.key(0), train=True)
    assert np.any(noisy != y) and set(np.unique(noisy)) <= {0, 0.5, 1, 1.5, 2}


def test_wrong_arguments_are_refused_with_a_remedy():
    for make, message in [
        (lambda: multi_head_attention(8, 3), "heads must divide features, or pass size="),
        (lambda: multi_head_attention(8, 4, groups=3), "groups must divide heads, got groups=3"),
        (lambda: multi_head_attention(8, True), "heads must be a positive int, got True"),
        (lambda: fused_attention("flash"), "implementation must be 'cudnn', 'xla' or None"),
        (lambda: rotary(size=3), "rotary: size must be even"),
        (lambda: window(-1), "window: before must be an int of at least 0"),
        (lambda: soft_cap(0.0), "the bound must be positive"),
        (lambda: relative_bias(2, buckets=3), "at least 4 buckets"),
        (lambda: scaling.yarn(0.5, length=8), "yarn: factor must be at least 1, got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="padding: lengths must be integers, got float32"):
        padding(jnp.ones(3))
    x, q = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 2, 4))
    net = multi_head_attention(4, 2)
    params = net.init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="mask: it must be a Mask such as causal"):
        net.apply(params, x, mask=jnp.ones((3, 3), int))
    with pytest.raises(ValueError, match="G must divide H"):
        dot_product_attention().apply({}, jnp.ones((2, 3, 3, 4)), q, q)
