"""Convolutions of every kind against PyTorch, Keras and their definitions, over drawn options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_peers import agree, channels_first, channels_last, drawn, examples, torch

from jaxnet.core import describe
from jaxnet.layers import (
    conv,
    conv_transpose,
    depthwise_conv,
    locally_connected,
    separable_conv,
)
from jaxnet.ops import convolve, convolve_locally, convolve_transpose

DTYPES = st.sampled_from(["float64", "float64", "float32"])


def per_axis(rank, low, high):
    return st.tuples(*[st.integers(low, high)] * rank)


def named(rank):
    names = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "same"]
    pairs = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank)
    return st.one_of(st.sampled_from(names + ["CAUSAL"] * (rank == 1)), st.integers(0, 2), pairs)


@st.composite
def convolutions(draw):
    """(x, kernel size, options, features)."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes, window = draw(per_axis(rank, 4, 8)), draw(per_axis(rank, 1, 4 if rank < 3 else 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    options: Any = dict(
        strides=draw(per_axis(rank, 1, 3)),
        dilation=draw(per_axis(rank, 1, 2)),
        padding=draw(named(rank)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    x = drawn((batch, *sizes, groups * draw(st.integers(1, 3))), 0, draw(DTYPES))
    return x, window, options, groups * draw(st.integers(1, 3))


def pads_of(padding, sizes, window, strides, dilation):
    """The amounts and the mode, by the definitions of TensorFlow ("SAME"), ONNX ("SAME_LOWER"), and
    Flax ("CAUSAL", "CIRCULAR", "REFLECT").
    """
    rank = len(sizes)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    if not isinstance(padding, str):
        return [(padding, padding)] * rank if isinstance(padding, int) else padding, "constant"
    name = padding.upper()
    if name == "VALID":
        return [(0, 0)] * rank, "constant"
    if name == "CAUSAL":
        return [(spans[0] - 1, 0)], "constant"
    if name in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "circular", "REFLECT": "reflect"}[name]
        return [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans], mode
    totals = [
        max(span - s if n % s == 0 else span - n % s, 0)
        for n, s, span in zip(sizes, strides, spans, strict=True)
    ]
    low = [(t // 2, t - t // 2) for t in totals]
    return (low if name == "SAME" else [(b, a) for a, b in low]), "constant"


def padded(x, pads, mode):
    """A tensor [N, C, *spatial] with its padding. PyTorch has no padding of an empty batch."""
    t = torch()
    flat = [n for pair in reversed(list(pads)) for n in pair]
    if mode == "constant" or not any(flat) or x.shape[0] == 0:
        return t.nn.functional.pad(x, flat)
    return t.nn.functional.pad(x, flat, mode=mode)


def torch_conv(x, kernel, bias, padding, strides, dilation, groups):
    """jaxnet's layouts in and out."""
    t = torch()
    rank = x.ndim - 2
    pads, mode = pads_of(padding, x.shape[1:-1], kernel.shape[:rank], strides, dilation)
    fn = [t.nn.functional.conv1d, t.nn.functional.conv2d, t.nn.functional.conv3d][rank - 1]
    kernel = kernel.permute(rank + 1, rank, *range(rank)).contiguous()
    x = padded(channels_first(x), pads, mode)
    return channels_last(fn(x, kernel, bias, strides, 0, dilation, groups))


def fits(x, window, options):
    """Whether PyTorch can do it: a window fits, and no mirror image is longer than x."""
    sizes, dilation = x.shape[1:-1], options["dilation"]
    pads, mode = pads_of(options["padding"], sizes, window, options["strides"], dilation)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    whole = all(n + lo + hi >= span for n, (lo, hi), span in zip(sizes, pads, spans, strict=True))
    most = {"reflect": 1, "circular": 0}.get(mode)
    short = most is None or all(max(pair) <= n - most for n, pair in zip(sizes, pads, strict=True))
    return whole and short


def check_conv(case):
    x, window, options, features = case
    if not fits(x, window, options):
        return

    def reference(p, x):
        rest = {name: options[name] for name in ("padding", "strides", "dilation", "groups")}
        return torch_conv(x, p["kernel"], p.get("bias"), **rest)

    agree(conv(features, window, **options), reference, x)


@examples(22)
@given(convolutions())
def test_conv_is_that_of_pytorch(case):
    check_conv(case)


@pytest.mark.slow
@examples(0, 120)
@given(convolutions())
def test_conv_is_that_of_pytorch_in_many_cases(case):
    check_conv(case)


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", ((2, 0), (1, 3))], ids=str)
def test_input_dilation_is_that_of_lax(padding):
    x, layer = (
        drawn((2, 4, 3, 2), 0, "float32"),
        conv(3, (3, 2), strides=(1, 2), dilation=(1, 2), input_dilation=(2, 3), padding=padding),
    )
    params = layer.init(jax.random.key(0), x)
    pads = padding
    if isinstance(padding, str):
        # The sizes of x with its zeros between.
        pads, _ = pads_of(padding, (7, 7), (3, 2), (1, 2), (1, 2))
    expected = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (1, 2),
        pads,
        lhs_dilation=(2, 3),
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-6)


def test_a_causal_convolution_does_not_see_the_future():
    layer = conv(3, (3,), padding="CAUSAL", dilation=2)
    x = drawn((1, 9, 2), 0, "float32")
    params = layer.init(jax.random.key(0), x)
    jacobian = jax.jacobian(lambda x: layer.apply(params, x)[0].sum(-1))(x)[:, 0].any(-1)
    expected = [[o - i in (0, 2, 4) for i in range(9)] for o in range(9)]
    np.testing.assert_array_equal(jacobian, expected)


# --- depthwise and separable ----------------------------------------------------------------------


@st.composite
def depthwise(draw):
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes, window = draw(per_axis(rank, 4, 8)), draw(per_axis(rank, 1, 4 if rank < 3 else 2))
    options: Any = dict(
        strides=draw(per_axis(rank, 1, 2)),
        dilation=draw(per_axis(rank, 1, 2)),
        padding=draw(st.sampled_from(["SAME", "SAME_LOWER", "CIRCULAR", 2])),
        multiplier=draw(st.integers(1, 3)),
    )
    batch = draw(st.sampled_from([0, 1, 2]))
    return drawn((batch, *sizes, draw(st.integers(1, 4))), 0, draw(DTYPES)), window, options


@examples(12)
@given(depthwise())
def test_depthwise_conv_is_a_convolution_in_groups(case):
    x, window, options = case
    plain = {name: options[name] for name in ("padding", "strides", "dilation")}
    if not fits(x, window, options):
        return

    def reference(p, x):
        return torch_conv(x, p["kernel"], p["bias"], groups=x.shape[-1], **plain)

    agree(depthwise_conv(window, **options), reference, x)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_separable_conv_is_a_depthwise_and_a_pointwise_one(multiplier):
    layer = separable_conv(5, 3, multiplier=multiplier, strides=2, dilation=1)
    x = drawn((2, 7, 6, 3))

    def reference(p, x):
        first = torch_conv(x, p["depthwise"]["kernel"], None, "SAME", (2, 2), (1, 1), 3)
        kernel, bias = p["pointwise"]["kernel"], p["pointwise"]["bias"]
        return torch_conv(first, kernel, bias, "VALID", (1, 1), (1, 1), 1)

    agree(layer, reference, x)
    assert describe(jax.eval_shape(layer.init, jax.random.key(0), x)["depthwise"]) == (
        f"{{'kernel': float32[3, 3, 1, {3 * multiplier}]}}"
    )


# --- transposed -----------------------------------------------------------------------------------


@st.composite
def transposed(draw):
    """(x, kernel size, options, features) with numbers as padding."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes, window = draw(per_axis(rank, 1, 5)), draw(per_axis(rank, 1, 4 if rank < 3 else 2))
    strides, dilation = draw(per_axis(rank, 1, 3)), draw(per_axis(rank, 1, 2))
    most = [max(s, d) - 1 for s, d in zip(strides, dilation, strict=True)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    options: Any = dict(
        strides=strides,
        dilation=dilation,
        padding=tuple((p, p) for p in draw(per_axis(rank, 0, 2))),
        output_padding=tuple(draw(st.integers(0, m)) for m in most),
        groups=groups,
        bias=draw(st.booleans()),
    )
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    x = drawn((batch, *sizes, groups * draw(st.integers(1, 3))), 0, draw(DTYPES))
    return x, window, options, groups * draw(st.integers(1, 3))


def torch_transposed(x, kernel, bias, padding, strides, dilation, output_padding, groups):
    """The kernel [*window, F / groups, C] is PyTorch's [C, F / groups, *window]."""
    t = torch().nn.functional
    rank = x.ndim - 2
    fn = [t.conv_transpose1d, t.conv_transpose2d, t.conv_transpose3d][rank - 1]
    kernel = kernel.permute(rank + 1, rank, *range(rank)).contiguous()
    pads = [lo for lo, _ in padding]
    options = strides, pads, output_padding, groups, dilation
    return channels_last(fn(channels_first(x), kernel, bias, *options))


def check_transposed(case):
    x, window, options, features = case
    names = "strides", "dilation", "padding", "output_padding"
    facts = zip(x.shape[1:-1], window, *(options[name] for name in names), strict=True)
    outputs = [(n - 1) * s + (w - 1) * d + 1 - 2 * p[0] + o for n, w, s, d, p, o in facts]
    layer = conv_transpose(features, window, **options)
    if min(outputs) < 1:
        with pytest.raises(ValueError, match="nothing is left of spatial axes"):
            layer.init(jax.random.key(0), x)
        return

    def reference(p, x):
        rest = {name: value for name, value in options.items() if name != "bias"}
        return torch_transposed(x, p["kernel"], p.get("bias"), **rest)

    agree(layer, reference, x)


@examples(22)
@given(transposed())
def test_conv_transpose_is_that_of_pytorch(case):
    check_transposed(case)


@pytest.mark.slow
@examples(0, 120)
@given(transposed())
def test_conv_transpose_is_that_of_pytorch_in_many_cases(case):
    check_transposed(case)


@examples(12)
@given(
    st.sampled_from(["SAME", "SAME_LOWER", "VALID"]),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(1, 2),
    st.booleans(),
)
def test_the_sizes_of_names_are_those_of_onnx(padding, numbers, dilation, given_size):
    """The operator's text, written out: total = s (n - 1) + span - output_shape; "SAME_UPPER" cuts
    total / 2 at the start, "SAME_LOWER" total - total / 2. Without an output_shape it is n s, and
    for "VALID", Keras has n s + max(span - s, 0).
    """
    n, w, s = numbers
    span = (w - 1) * dilation + 1
    full = (n - 1) * s + span
    size = n * s if padding != "VALID" else n * s + max(span - s, 0)
    options: Any = {}
    if given_size and padding != "VALID":
        size = max(1, full - 1)
        options = {"output_size": (size,)}
    total = max(0, full - size) if padding != "VALID" else 0
    start = total // 2 if padding != "SAME_LOWER" else total - total // 2
    layer = conv_transpose(
        2, (w,), strides=(s,), dilation=dilation, padding=padding, bias=False, **options
    )
    x = drawn((2, n, 3), 0, "float32")
    kernel = drawn((w, 2, 3), 1, "float32")
    whole = np.zeros((2, max(full, start + size), 2))
    for i, j in np.ndindex(n, w):
        whole[:, i * s + j * dilation] += x[:, i] @ kernel[j].T
    y = layer.apply({"kernel": kernel}, x)
    np.testing.assert_allclose(y, whole[:, start : start + size], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("window, strides", [(3, 2), (2, 3), (4, 2), (5, 1), (1, 2)])
def test_conv_transpose_is_that_of_lax(padding, window, strides):
    """With transpose_kernel=True, as Keras calls it."""
    layer = conv_transpose(4, window, strides=strides, padding=padding, bias=False)
    x = drawn((2, 4, 3, 3), 0, "float32")
    params = layer.init(jax.random.key(0), x)
    assert params["kernel"].shape == (window, window, 4, 3)
    expected = jax.lax.conv_transpose(
        x, params["kernel"], (strides,) * 2, padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True,
    )  # fmt: skip
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-5)


def test_an_output_size_chooses_the_output_padding():
    x = drawn((2, 4, 3), 0, "float32")
    layers = [
        conv_transpose(2, (3,), strides=3, padding=1, output_size=12),
        conv_transpose(2, (3,), strides=3, padding=1, output_padding=2),
    ]
    params = layers[0].init(jax.random.key(0), x)
    np.testing.assert_array_equal(*(layer.apply(params, x) for layer in layers))
    with pytest.raises(ValueError, match=r"may have sizes from \(10,\) to \(12,\).* got \(13,\)"):
        conv_transpose(2, (3,), strides=3, padding=1, output_size=13).init(jax.random.key(0), x)


def test_it_is_the_gradient_of_the_convolution_with_the_same_kernel():
    """Also in groups, whose kernels have one layout in both."""
    x, y = drawn((2, 7, 6), 0, "float32"), drawn((2, 4, 4), 1, "float32")
    kernel = jnp.asarray(drawn((3, 3, 4), 2, "float32"))

    def forward(x):
        return convolve(x, kernel, strides=2, padding=1, groups=2)

    (expected,) = jax.vjp(forward, jnp.asarray(x))[1](jnp.asarray(y))
    actual = convolve_transpose(y, kernel, strides=2, padding=1, groups=2, output_size=(7,))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_kernels_of_transposed_convolutions_have_the_variance_of_their_fan_in(groups):
    """1 / (3 3 C / groups), the number of products in the sum of an output of stride 1."""
    layer = conv_transpose(48, 3, groups=groups)
    kernel = layer.init(jax.random.key(0), jnp.ones((2, 2, 96)))["kernel"]
    assert kernel.shape == (3, 3, 48 // groups, 96)
    # 13,824 weights or more: sd 1.2 % or less.
    np.testing.assert_allclose(np.var(kernel) * 9 * 96 / groups, 1, atol=0.05)


# --- locally connected ----------------------------------------------------------------------------


@st.composite
def local(draw):
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes, window = draw(per_axis(rank, 3, 6)), draw(per_axis(rank, 1, 3))
    options: Any = dict(
        strides=draw(per_axis(rank, 1, 2)),
        dilation=draw(per_axis(rank, 1, 2)),
        padding=draw(st.sampled_from(["SAME", "VALID", 1, "CIRCULAR"])),
        bias=draw(st.booleans()),
    )
    x = drawn((draw(st.sampled_from([0, 1, 3])), *sizes, draw(st.integers(1, 3))), 0, draw(DTYPES))
    return x, window, options


@examples(12)
@given(local())
def test_locally_connected_has_a_kernel_for_each_position(case):
    """The sum over the elements of each window, written with slices of PyTorch."""
    x, window, options = case
    if not fits(x, window, options):
        return
    strides, dilation = options["strides"], options["dilation"]

    def reference(p, x):
        t = torch()
        rank = len(window)
        pads, mode = pads_of(options["padding"], x.shape[1:-1], window, strides, dilation)
        x = channels_last(padded(channels_first(x), pads, mode))
        kernel = p["kernel"]
        rows = []
        for o in np.ndindex(*kernel.shape[:rank]):
            total = 0
            for w in np.ndindex(*window):
                at = tuple(
                    i * s + j * d for i, s, j, d in zip(o, strides, w, dilation, strict=True)
                )
                total = total + x[(slice(None), *at)] @ kernel[(*o, *w)]
            rows.append(total)
        y = t.stack(rows, 1).reshape(x.shape[0], *kernel.shape[:rank], 2)
        return y + p["bias"] if "bias" in p else y

    agree(locally_connected(2, window, **options), reference, x)


def test_long_local_windows_make_short_programs():
    x, kernel = jnp.ones((1, 40, 40, 2)), jnp.ones((10, 10, 31, 31, 2, 1))

    def run(x, kernel):
        y, pull = jax.vjp(convolve_locally, x, kernel)
        return y, pull(y)

    assert len(jax.jit(run).lower(x, kernel).as_text().splitlines()) <= 500


def test_kernels_of_local_layers_have_the_variance_of_their_fan_in():
    kernel = locally_connected(16, 3).init(jax.random.key(0), jnp.ones((6, 6, 8)))["kernel"]
    assert kernel.shape == (4, 4, 3, 3, 8, 16)
    np.testing.assert_allclose(np.var(kernel) * 72, 1, atol=0.05)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conv(8, 3, padding="CAUSAL"), r"conv\(8, 3\): padding must be .* one axis, 'CAU"),
        (lambda: conv(8, 3, input_dilation=0), r"conv\(8, 3\): input_dilation must be a positive"),
        (lambda: depthwise_conv(3, multiplier=0), r"depthwise_conv\(3\): multiplier must be a pos"),
        (lambda: separable_conv(0, 3), "separable_conv: features must be a positive int, got 0"),
        (lambda: conv_transpose(0, 3), r"conv_transpose\(0, 3\): features must be a positive int"),
        (lambda: conv_transpose(4, 3, groups=3), "groups must divide the features, got groups=3"),
        (
            lambda: conv_transpose(4, 3, padding=1, output_padding=1),
            r"output_padding must be smaller than stride or dilation, got \(1, 1\)",
        ),
        (
            lambda: conv_transpose(4, 3, strides=2, output_padding=1),
            "output_padding goes with numbers as padding .* got padding='SAME'",
        ),
        (lambda: conv_transpose(4, 3, padding="CAUSAL"), "padding must be 'SAME', .* got 'CAUSAL'"),
        (
            lambda: conv_transpose(4, 3, padding="FULL", output_size=9),
            "padding must be 'SAME', .* got 'FULL'",
        ),
        (lambda: conv_transpose(4, 3, padding=True), "padding must be"),
        (lambda: locally_connected(4, 0), "locally_connected: kernel_size must be a positive int"),
    ],
)
def test_options_of_the_wrong_form_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_sizes_than_at_init_are_refused():
    layer = locally_connected(4, (3,))
    params = layer.init(jax.random.key(0), jnp.ones((9, 2)))
    with pytest.raises(ValueError, match=r"spatial sizes \(7,\), as at init, got \(8,\) from"):
        layer.apply(params, jnp.ones((10, 2)))
    layer = conv_transpose(4, (3,), groups=2)
    with pytest.raises(ValueError, match=r"groups must divide the last axis, got groups=2 and"):
        layer.init(jax.random.key(0), jnp.ones((9, 3)))
    params = layer.init(jax.random.key(0), jnp.ones((9, 2)))
    with pytest.raises(ValueError, match=r"last axis must be 2, got float32\[9, 4\]"):
        layer.apply(params, jnp.ones((9, 4)))
    layer = depthwise_conv((3,), multiplier=2)
    params = layer.init(jax.random.key(0), jnp.ones((9, 2)))
    with pytest.raises(ValueError, match=r"last axis must be 2, got float32\[9, 4\]"):
        layer.apply(params, jnp.ones((9, 4)))
