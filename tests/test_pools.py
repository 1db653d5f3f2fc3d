"""Pooling of every kind against PyTorch, and against the text of ONNX's operators where PyTorch has
no such thing, over drawn options.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_peers import agree, applied, channels_first, channels_last, drawn, examples, torch

from jaxnet.layers import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_avg_pool,
    global_lp_pool,
    global_max_pool,
    lp_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
    min_pool,
)

DTYPES = st.sampled_from(["float64", "float64", "float32"])


def per_axis(rank, low, high):
    return st.tuples(*[st.integers(low, high)] * rank)


@st.composite
def poolings(draw, dilated=True):
    """(x, window, options) that PyTorch accepts: its padding is at most half of the window."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes, window = draw(per_axis(rank, 2, 9)), draw(per_axis(rank, 1, 6 if rank < 3 else 3))
    dilation = draw(per_axis(rank, 1, 3)) if dilated else (1,) * rank
    pads = tuple(draw(st.integers(0, w // 2)) for w in window)
    options: Any = dict(
        strides=draw(st.one_of(st.none(), per_axis(rank, 1, 4))),
        padding=tuple((p, p) for p in pads),
        ceil_mode=draw(st.booleans()),
    )
    if dilated:
        options["dilation"] = dilation
    x = drawn((draw(st.sampled_from([1, 2, 3])), *sizes, draw(st.integers(1, 2))), 0, draw(DTYPES))
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    strides = options["strides"] or window
    extra = [s - 1 if options["ceil_mode"] else 0 for s in strides]
    room = [
        (n + 2 * p - span + more) // s
        for n, p, span, more, s in zip(sizes, pads, spans, extra, strides, strict=True)
    ]
    return (x, window, options) if min(room) >= 0 else None


def of_torch(name, window, options, **more):
    """The pooling of PyTorch as a function of [N, *spatial, C]."""
    t = torch().nn.functional
    rank = len(window)
    fn = getattr(t, f"{name}{rank}d")
    pads = [lo for lo, _ in options["padding"]]
    rest = {k: v for k, v in options.items() if k in ("ceil_mode", "dilation")} | more
    return lambda x: fn(x, window, options["strides"] or window, pads, **rest)


def check_max(case):
    if case is None:
        return
    x, window, options = case
    pool = of_torch("max_pool", window, options)
    y = channels_last(pool(channels_first(torch().tensor(x)))).numpy()
    if np.isinf(y).any():
        # A window with gaps meets only padding. PyTorch gives its gradient to some element.
        layer = max_pool(window, **options)
        np.testing.assert_allclose(applied(layer, {}, x.astype("float32")), y, rtol=1e-6)
        return
    agree(max_pool(window, **options), lambda p, x: channels_last(pool(channels_first(x))), x)


@examples(20)
@given(poolings())
def test_max_pool_is_that_of_pytorch(case):
    check_max(case)


@pytest.mark.slow
@examples(0, 120)
@given(poolings())
def test_max_pool_is_that_of_pytorch_in_many_cases(case):
    check_max(case)


@examples(8)
@given(poolings())
def test_min_pool_is_the_negative_of_the_maximum_of_negatives(case):
    if case is None:
        return
    x, window, options = case
    pool = of_torch("max_pool", window, options)
    agree(min_pool(window, **options), lambda p, x: channels_last(-pool(channels_first(-x))), x)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_min_pool_of_integers(dtype):
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = np.array([least, most, 3, 2, most, most], dtype)[:, None]
    y = min_pool((2,), padding=1).apply({}, x)
    np.testing.assert_array_equal(y[:, 0], [least, 3, 2, most])
    assert y.dtype == x.dtype


def check_avg(case, count_padding):
    if case is None or any(n < w for n, w in zip(case[0].shape[1:-1], case[1], strict=True)):
        return  # PyTorch refuses some windows that are larger than the input.
    x, window, options = case
    pool = of_torch("avg_pool", window, options, count_include_pad=count_padding)
    layer = avg_pool(window, count_padding=count_padding, **options)
    agree(layer, lambda p, x: channels_last(pool(channels_first(x))), x)


@examples(16)
@given(poolings(dilated=False), st.booleans())
def test_avg_pool_is_that_of_pytorch(case, count_padding):
    check_avg(case, count_padding)


@pytest.mark.slow
@examples(0, 120)
@given(poolings(dilated=False), st.booleans())
def test_avg_pool_is_that_of_pytorch_in_many_cases(case, count_padding):
    check_avg(case, count_padding)


def onnx_windows(x, window, strides, pads, dilation, ceil_mode):
    """For each output, the values of its window and their positions, by the text of ONNX: the
    number of windows is floor or ceil of (size + pads - span) / stride + 1, and a window that would
    start behind the input and its first padding is ignored. x [*spatial].
    """
    outputs, at = [], []
    for n, w, s, (lo, hi), d in zip(x.shape, window, strides, pads, dilation, strict=True):
        span = (w - 1) * d + 1
        o = (n + lo + hi - span) / s
        o = int(np.ceil(o) if ceil_mode else np.floor(o)) + 1
        if ceil_mode and (o - 1) * s >= n + lo:
            o -= 1
        outputs.append(o)
        at.append([[i * s - lo + j * d for j in range(w)] for i in range(o)])
    for o in np.ndindex(*outputs):
        taps = list(itertools.product(*(axis[i] for axis, i in zip(at, o, strict=True))))
        yield o, outputs, taps


def onnx_pool(x, reduce, count, *facts):
    """[*spatial] -> [*outputs]; `count` tells which positions count."""
    result: Any = None
    for o, outputs, taps in onnx_windows(x, *facts):
        result = np.zeros(outputs) if result is None else result
        values = [
            x[tap] if all(0 <= i < n for i, n in zip(tap, x.shape, strict=True)) else 0
            for tap in taps
        ]
        counted = [count(tap) for tap in taps]
        result[o] = reduce(np.array(values), np.array(counted))
    return result


@st.composite
def onnx_cases(draw):
    rank = draw(st.sampled_from([1, 2]))
    sizes, window = draw(per_axis(rank, 3, 8)), draw(per_axis(rank, 1, 6))
    strides, dilation = draw(per_axis(rank, 1, 3)), draw(per_axis(rank, 1, 2))
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    pads = tuple(
        (draw(st.integers(0, min(3, span - 1))), draw(st.integers(0, min(3, span - 1))))
        for span in spans
    )
    ceil_mode = draw(st.booleans())
    fits = all(n + lo + hi >= s for n, (lo, hi), s in zip(sizes, pads, spans, strict=True))
    return (sizes, window, strides, pads, dilation, ceil_mode) if fits else None


@examples(20)
@given(onnx_cases(), st.sampled_from(["max", "mean", "mean of all", "norm 1", "norm 2", "norm 3"]))
def test_asymmetric_and_dilated_pools_are_those_of_onnx(case, kind):
    if case is None:
        return
    sizes, window, strides, pads, dilation, ceil_mode = case
    x = drawn(sizes, 0, "float32")
    options: Any = dict(strides=strides, padding=pads, dilation=dilation, ceil_mode=ceil_mode)

    def inside(tap):
        return all(0 <= i < n for i, n in zip(tap, sizes, strict=True))

    def padded(tap):
        return all(-lo <= i < n + hi for i, n, (lo, hi) in zip(tap, sizes, pads, strict=True))

    if kind == "max":
        layer = max_pool(window, **options)
        reduce = lambda values, counted: values[counted].max(initial=-np.inf)  # noqa: E731
    elif kind.startswith("mean"):
        layer = avg_pool(window, count_padding=kind != "mean", **options)
        reduce = lambda values, counted: values.sum() / max(1, counted.sum())  # noqa: E731
    else:
        p = int(kind[-1])
        layer = lp_pool(p, window, **options)
        reduce = lambda values, counted: (np.abs(values) ** p).sum() ** (1 / p)  # noqa: E731
    count = padded if kind == "mean of all" else inside
    expected = onnx_pool(x, reduce, count, window, strides, pads, dilation, ceil_mode)
    y = applied(layer, {}, x[..., None])[..., 0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@examples(8)
@given(poolings(dilated=False), st.sampled_from([2, 4]))
def test_lp_pool_is_that_of_pytorch_for_even_exponents(case, p):
    """PyTorch has no padding here."""
    if case is None or len(case[1]) > 2 or any(map(any, case[2]["padding"])):
        return
    x, window, options = case
    t = torch().nn.functional
    fn = [t.lp_pool1d, t.lp_pool2d][len(window) - 1]
    size, strides = (window, options["strides"] or window)
    if len(window) == 1:
        size, strides = size[0], strides[0]

    def reference(p_, x):
        return channels_last(fn(channels_first(x), p, size, strides, options["ceil_mode"]))

    # PyTorch multiplies the mean of a cut window by the size of the whole one.
    if not options["ceil_mode"]:
        agree(lp_pool(p, window, **options), reference, x)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_norms_of_zeros_have_zero_gradients(p):
    x = jnp.zeros((4, 4, 1))
    for layer in (lp_pool(p, 2), global_lp_pool(p)):
        gradient = jax.grad(lambda x, layer=layer: layer.apply({}, x).sum())(x)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


def test_global_lp_pool_is_the_norm():
    x = drawn((2, 3, 4, 5), 0, "float32")
    for p in (1, 2, 3.5):
        expected = (np.abs(x) ** p).sum((1, 2)) ** (1 / p)
        np.testing.assert_allclose(global_lp_pool(p).apply({}, x), expected, rtol=1e-5)


def test_the_definitions_hold_for_long_dilated_windows():
    """Windows of more than four elements are combined from shorter ones."""
    x = drawn((1, 40, 1), 0, "float32")
    for taps, gap in [(5, 2), (9, 3), (6, 5)]:
        windows = np.lib.stride_tricks.sliding_window_view(x[0, :, 0], (taps - 1) * gap + 1)
        windows = windows[:, ::gap]
        options: Any = dict(strides=(1,), dilation=gap)
        for layer, reduce in [
            (max_pool((taps,), **options), np.max),
            (min_pool((taps,), **options), np.min),
            (avg_pool((taps,), **options), np.mean),
        ]:
            y = layer.apply({}, x)[0, :, 0]
            np.testing.assert_allclose(y, reduce(windows, -1), rtol=1e-5, atol=1e-6)


def test_same_lower_pads_before():
    x = jnp.arange(1.0, 6.0)[:, None]
    y = max_pool((2,), strides=1, padding="SAME_LOWER").apply({}, x)[:, 0]
    np.testing.assert_array_equal(y, [1, 2, 3, 4, 5])
    y = max_pool((2,), strides=1, padding="SAME").apply({}, x)[:, 0]
    np.testing.assert_array_equal(y, [2, 3, 4, 5, 5])


# --- adaptive -------------------------------------------------------------------------------------


@st.composite
def adaptive(draw):
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes = draw(per_axis(rank, 1, 9))
    bins = tuple(draw(st.one_of(st.none(), st.integers(1, 7))) for _ in range(rank))
    x = drawn((draw(st.sampled_from([0, 1, 2])), *sizes, draw(st.integers(1, 3))), 0, draw(DTYPES))
    return x, bins


@examples(14)
@given(adaptive(), st.sampled_from(["avg", "max"]))
def test_adaptive_pools_are_those_of_pytorch(case, kind):
    x, bins = case
    t = torch().nn.functional
    fn = getattr(t, f"adaptive_{kind}_pool{len(bins)}d")
    whole = [b or n for b, n in zip(bins, x.shape[1:-1], strict=True)]
    layer = {"avg": adaptive_avg_pool, "max": adaptive_max_pool}[kind](bins)
    if x.shape[0] == 0:
        assert layer.apply({}, x.astype("float32")).shape == (0, *whole, x.shape[-1])
        return
    agree(layer, lambda p, x: channels_last(fn(channels_first(x), whole)), x)


def test_adaptive_max_pool_takes_the_first_of_equal_elements_and_every_nan():
    x = np.array([1.0, 1.0, 0.0, np.nan, 2.0], np.float32)[:, None]
    layer = adaptive_max_pool((2,))
    y, pull = jax.vjp(lambda x: layer.apply({}, x), x)
    np.testing.assert_array_equal(y[:, 0], [1, np.nan])
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0][:, 0], [1, 0, 0, 1, 0])
    ints = adaptive_max_pool((2,)).apply({}, jnp.array([[-3], [-5], [-4]], jnp.int8))
    np.testing.assert_array_equal(ints, [[-3], [-4]])
    infinite = adaptive_avg_pool((3,)).apply({}, jnp.array([[jnp.inf], [1.0], [2.0], [3.0]]))
    np.testing.assert_array_equal(infinite, [[jnp.inf], [1.5], [2.5]])


# --- indices --------------------------------------------------------------------------------------


@examples(12)
@given(poolings())
def test_indices_are_those_of_pytorch(case):
    if case is None:
        return
    x, window, options = case
    pool = of_torch("max_pool", window, options, return_indices=True)
    layer = max_pool_with_indices(window, **options)
    values = lambda p, x: channels_last(pool(channels_first(x))[0])  # noqa: E731
    agree(layer, values, x, first=True)
    _, expected = pool(channels_first(torch().tensor(x)))
    _, indices = applied(layer, {}, x.astype(np.float32))
    np.testing.assert_array_equal(indices, channels_last(expected))
    assert indices.dtype == jnp.int32


def test_indices_of_narrow_numbers_are_exact():
    x = jnp.zeros((400, 1), jnp.bfloat16).at[377].set(1)
    y, indices = applied(max_pool_with_indices((400,)), {}, x)
    assert y.dtype == jnp.bfloat16 and indices.tolist() == [[377]]


@examples(10)
@given(st.sampled_from([1, 2, 3]), st.data())
def test_max_unpool_is_that_of_pytorch(rank, data):
    window = data.draw(per_axis(rank, 1, 3))
    strides = data.draw(st.one_of(st.none(), st.just(window)))
    sizes = data.draw(per_axis(rank, 3, 6))
    x = drawn((2, *sizes, 2), 0, data.draw(DTYPES))
    t = torch().nn.functional
    pooled, indices = getattr(t, f"max_pool{rank}d")(
        channels_first(torch().tensor(x)), window, return_indices=True
    )
    given_size = data.draw(st.booleans())
    layer = max_unpool(window, strides=strides, output_size=sizes if given_size else None)
    unpool = getattr(t, f"max_unpool{rank}d")
    shape = list(sizes) if given_size else None

    if not given_size and any(n % w for n, w in zip(sizes, window, strict=True)):
        return

    def reference(p, x, indices):
        y = unpool(channels_first(x), channels_first(indices), window, output_size=shape)
        return channels_last(y)

    values, at = channels_last(pooled).numpy(), channels_last(indices).numpy()
    agree(layer, reference, values, at)


def test_unpooling_inverts_pooling():
    x = jnp.asarray(drawn((2, 4, 6, 3), 0, "float32"))
    pool, unpool = max_pool_with_indices(2), max_unpool(2)
    y = unpool.apply({}, *pool.apply({}, x))
    np.testing.assert_array_equal(max_pool(2).apply({}, jnp.where(y == 0, -9, y)), max_pool(2)
                                  .apply({}, x))  # fmt: skip
    assert ((y == 0) | (y == x)).all() and (y != 0).sum() == 2 * 2 * 3 * 3
    # Positions that do not exist are ignored, and do not count from the end.
    lost = unpool.apply({}, jnp.ones((1, 1, 2)), jnp.array([[[-1, 4]]]))
    np.testing.assert_array_equal(lost, jnp.zeros((2, 2, 2)))


# --- what is refused, and batches without images --------------------------------------------------

LAYERS = [
    max_pool(2),
    min_pool(2),
    avg_pool(2),
    lp_pool(2, 2),
    adaptive_avg_pool(3),
    adaptive_max_pool(3),
    global_avg_pool(),
    global_lp_pool(2),
    global_max_pool(),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_batch_may_be_empty(layer):
    one = jax.eval_shape(layer.apply, {}, jnp.ones((1, 8, 8, 2))).shape
    y, pull = jax.vjp(lambda x: layer.apply({}, x), jnp.ones((0, 8, 8, 2)))
    assert y.shape == (0, *one[1:]) and pull(y)[0].shape == (0, 8, 8, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: max_pool(2, dilation=0), r"max_pool\(2\): dilation must be a positive int"),
        (lambda: min_pool(0), "min_pool: window must be a positive int"),
        (lambda: lp_pool(0.5, 2), "lp_pool: p must be a finite number of at least 1, got 0.5"),
        (lambda: lp_pool(True, 2), "lp_pool: p must be a finite number"),
        (lambda: global_lp_pool(np.inf), "global_lp_pool: p must be a finite number"),
        (lambda: adaptive_avg_pool(0), "adaptive_avg_pool: size must be a positive int, .* got 0"),
        (lambda: adaptive_max_pool(()), "adaptive_max_pool: size must be a positive int"),
        (lambda: adaptive_max_pool((True, 2)), "adaptive_max_pool: size must be a positive int"),
        (lambda: max_unpool(2, padding="SAME"), r"max_unpool\(2\): padding must be"),  # pyright: ignore[reportArgumentType]
        (lambda: avg_pool((2, 3), padding=2), r"padding must be smaller than the window, \(2, 3\)"),
    ],
)
def test_options_of_the_wrong_form_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"max_unpool\(2\): the indices must have the shape of x"):
        max_unpool(2).apply({}, jnp.ones((2, 2, 3)), jnp.ones((2, 2, 1), int))
    with pytest.raises(TypeError, match=r"max_unpool\(2\): indices: the input must be integer"):
        max_unpool(2).apply({}, jnp.ones((2, 2, 3)), jnp.ones((2, 2, 3)))
    with pytest.raises(ValueError, match=r"adaptive_avg_pool\(3\): there must be something"):
        adaptive_avg_pool(3).apply({}, jnp.ones((0, 2, 3)))
    with pytest.raises(ValueError, match=r"max_pool\(3\): the window \(3, 3\) with dilation=\(2"):
        max_pool(3, dilation=2).apply({}, jnp.ones((4, 4, 1)))
