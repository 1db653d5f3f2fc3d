"""Resampling against PyTorch, and against the text of ONNX's Resize where PyTorch has no such
thing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_peers import agree, applied, channels_first, channels_last, drawn, examples, torch

from jaxnet.layers import pixel_shuffle, pixel_unshuffle, resize, upsample

DTYPES = st.sampled_from(["float64", "float64", "float32"])
# Modes of torch.nn.functional.interpolate by rank, with the options of the same resampling here.
MODES = {
    "nearest": ({1, 2, 3}, dict(method="nearest", coordinates="asymmetric", rounding="floor")),
    "nearest-exact": ({1, 2, 3}, dict(method="nearest", rounding="round_prefer_ceil")),
    "linear": ({1}, dict(method="linear")),
    "bilinear": ({2}, dict(method="linear")),
    "trilinear": ({3}, dict(method="linear")),
    "bicubic": ({2}, dict(method="cubic")),
}


@st.composite
def resizings(draw):
    """(x, mode, arguments of interpolate, layer)."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    mode = draw(st.sampled_from([mode for mode, (ranks, _) in MODES.items() if rank in ranks]))
    options: Any = dict(MODES[mode][1])
    arguments: Any = {"mode": mode}
    if "nearest" not in mode and draw(st.booleans()):
        options["coordinates"] = "align_corners"
        arguments["align_corners"] = True
    sizes = draw(st.tuples(*[st.integers(1, 7)] * rank))
    if draw(st.booleans()):
        new = draw(st.tuples(*[st.integers(1, 13)] * rank))
        layer, arguments["size"] = resize(new, **options), new
    else:
        scales = st.sampled_from([2.0, 3.0, 1.5, 0.5, 0.75, 2.3, 1.0])
        if mode == "nearest":
            # PyTorch takes other elements if the new size is twice the old one by chance.
            scales = st.sampled_from([2.0, 3.0, 0.5, 1.0])
        scale = draw(st.tuples(*[scales] * rank))
        if any(math.floor(n * s) < 1 for n, s in zip(sizes, scale, strict=True)):
            scale = (2.0,) * rank
        layer, arguments["scale_factor"] = resize(scale=scale, **options), scale
    batch, dtype = draw(st.sampled_from([1, 2])), draw(DTYPES)
    return drawn((batch, *sizes, draw(st.integers(1, 2))), 0, dtype), arguments, layer


def check_resize(case):
    x, arguments, layer = case
    interpolate = torch().nn.functional.interpolate

    def reference(p, x):
        return channels_last(interpolate(channels_first(x), **arguments))

    agree(layer, reference, x)


@examples(24)
@given(resizings())
def test_resize_is_interpolate_of_pytorch(case):
    check_resize(case)


@pytest.mark.slow
@examples(0, 120)
@given(resizings())
def test_resize_is_interpolate_of_pytorch_in_many_cases(case):
    check_resize(case)


def onnx_resize(x, size, scale, method, coordinates, rounding, a):
    """One axis of x [n, C], by the text of the operator."""
    n, rows = len(x), []
    for o in range(size):
        p = {
            "half_pixel": (o + 0.5) / scale - 0.5,
            "align_corners": o * (n - 1) / (size - 1) if size > 1 else 0,
            "asymmetric": o / scale,
        }[coordinates]
        p = round(p * 1e9) / 1e9
        if method == "nearest":
            at = {
                "round_prefer_floor": math.ceil(p - 0.5),
                "round_prefer_ceil": math.floor(p + 0.5),
                "floor": math.floor(p),
                "ceil": math.ceil(p),
            }[rounding]
            rows.append(x[min(max(at, 0), n - 1)])
            continue
        base, total = math.floor(p), 0
        for tap in range(base - 1, base + 3):
            d = abs(p - tap)
            if method == "linear":
                w = max(0, 1 - d)
            elif d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0
            total = total + w * x[min(max(tap, 0), n - 1)]
        rows.append(total)
    return np.stack(rows)


@examples(20)
@given(
    st.integers(1, 7),
    st.integers(1, 12),
    st.sampled_from(["nearest", "linear", "cubic"]),
    st.sampled_from(["half_pixel", "align_corners", "asymmetric"]),
    st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    st.sampled_from([-0.75, -0.5]),
)
def test_resize_is_the_operator_of_onnx(n, size, method, coordinates, rounding, a):
    x = drawn((n, 2), 0, "float32")
    layer = resize(
        (size,),
        method=method,
        coordinates=coordinates,
        rounding=rounding,
        cubic_coefficient=a,
    )
    expected = onnx_resize(x, size, size / n, method, coordinates, rounding, a)
    np.testing.assert_allclose(applied(layer, {}, x), expected, rtol=1e-5, atol=1e-5)


def test_upsample_repeats_each_element():
    x = jnp.arange(6).reshape(2, 3, 1)
    y = upsample((2, 3)).apply({}, x)
    np.testing.assert_array_equal(y, x.repeat(2, 0).repeat(3, 1))
    assert y.dtype == x.dtype
    z = upsample(2, method="linear").apply({}, x.astype(jnp.float32))
    np.testing.assert_allclose(z[0, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2])


def test_resampling_by_whole_factors_has_neither_gather_nor_scatter():
    """Both are slow on a CPU; a gradient of slices is a sum of padded slices."""
    x = jnp.ones((1, 8, 8, 2))
    for layer in (upsample(2), upsample(4, method="linear"), resize(scale=0.5, method="cubic")):
        gradient = jax.grad(lambda x, layer=layer: layer.apply({}, x).sum())
        text = jax.jit(gradient).lower(x).as_text()
        assert "scatter" not in text and "gather" not in text
        assert len(text.splitlines()) < 300


def test_an_infinite_element_stays_where_it_is():
    x = jnp.zeros((8, 1)).at[6].set(jnp.inf)
    y = upsample((2,), method="linear").apply({}, x)
    assert jnp.isfinite(y[:11]).all()


@examples(10)
@given(st.integers(1, 3), st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from([(), (2,), (2, 0)]))
def test_pixel_shuffle_is_that_of_pytorch(factor, sizes, batch):
    t = torch().nn.functional
    h, w, c = sizes
    x = drawn((*batch, h, w, c * factor**2), 0, "float32")

    def first(x):
        return torch().tensor(x).movedim(-1, -3)

    shuffled = pixel_shuffle(factor).apply({}, x)
    if 0 not in batch:
        np.testing.assert_array_equal(shuffled, t.pixel_shuffle(first(x), factor).movedim(-3, -1))
    assert shuffled.shape == (*batch, h * factor, w * factor, c)
    np.testing.assert_array_equal(pixel_unshuffle(factor).apply({}, shuffled), x)


def test_pixels_are_shuffled_along_every_rank():
    x = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(
        pixel_shuffle((3,)).apply({}, x), [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    )
    assert pixel_shuffle((1, 2, 3)).apply({}, jnp.ones((4, 2, 2, 2, 12))).shape == (4, 2, 4, 6, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: resize(), "resize: give either size or scale, got size=None and scale=None"),
        (lambda: resize(4, scale=2.0), "resize: give either size or scale, got size=4 and"),
        (lambda: resize(4, method="area"), "resize: method must be one of nearest, linear, cubic"),
        (lambda: resize(4, coordinates="tf"), "resize: coordinates must be one of half_pixel"),
        (lambda: resize(4, rounding="up"), "resize: rounding must be one of round_prefer_floor"),
        (lambda: resize(0), "resize: size must be a positive int"),
        (lambda: resize(scale=0), "resize: scale must be a positive number, or one .* got 0"),
        (lambda: resize(scale=(2.0, True)), "resize: scale must be a positive number"),
        (lambda: upsample(1.5), "upsample: factor must be a positive int"),  # pyright: ignore[reportArgumentType]
        (lambda: pixel_shuffle(0), "pixel_shuffle: factor must be a positive int"),
    ],
)
def test_options_of_the_wrong_form_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"resize\(4, linear\): no spatial axis may be empty, got"):
        resize(4).apply({}, jnp.ones((0, 3, 1)))
    with pytest.raises(ValueError, match=r"no spatial axis may be empty, got float32\[3, 3, 1\]"):
        resize(scale=0.2).apply({}, jnp.ones((3, 3, 1)))
    with pytest.raises(TypeError, match=r"resize\(4, linear\): the input must be floating"):
        resize(4).apply({}, jnp.ones((3, 3, 1), int))
    with pytest.raises(ValueError, match=r"pixel_shuffle\(2\): the last axis must be a multiple"):
        pixel_shuffle(2).apply({}, jnp.ones((3, 3, 6)))
    with pytest.raises(ValueError, match=r"pixel_unshuffle\(2\): the spatial axes must be mult"):
        pixel_unshuffle(2).apply({}, jnp.ones((3, 4, 6)))
