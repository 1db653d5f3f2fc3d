"""The convolution layer: against SciPy, on lines, images and volumes; what it says to a wrong
input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet.core import describe
from jaxnet.layers import conv


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    "window, sizes", [((3,), (7,)), (3, (5, 6)), ((2, 3), (5, 6)), ((2, 3, 2), (4, 5, 3))]
)
def test_conv_is_the_sum_over_channels_of_scipy_correlations(window, sizes):
    # Every process would spend a second on this import at the top of the file.
    from scipy.signal import correlate

    layer = conv(2, window, padding="VALID")
    x = normal((2, *sizes, 3))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = {name: normal(spec.shape, seed) for seed, (name, spec) in enumerate(params.items())}
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    y = np.asarray(layer.apply(params, x))
    for n, f in np.ndindex(2, 2):
        parts = [correlate(x[n, ..., c], kernel[..., c, f], mode="valid") for c in range(3)]
        np.testing.assert_allclose(y[n, ..., f], sum(parts) + bias[f], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("exact_products")
def test_the_window_gives_the_rank_and_all_axes_before_are_batch():
    images, volume = conv(4, 3), conv(4, (3, 3, 3))
    x = normal((2, 3, 5, 6, 2))
    params, cubic = (
        images.init(jax.random.key(0), x),
        jax.eval_shape(volume.init, jax.random.key(0), x),
    )
    assert describe(params) == "{'bias': float32[4], 'kernel': float32[3, 3, 2, 4]}"
    assert describe(cubic) == "{'bias': float32[4], 'kernel': float32[3, 3, 3, 2, 4]}"
    y = images.apply(params, x)
    assert y.shape == (2, 3, 5, 6, 4) == jax.eval_shape(volume.apply, cubic, x).shape
    # No batch axis.
    np.testing.assert_allclose(y[1, 2], images.apply(params, x[1, 2]), rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(images.apply, params, x[:0]).shape == (0, 3, 5, 6, 4)


@pytest.mark.usefixtures("exact_products")
def test_options_reach_the_operation():
    layer = conv(
        6, (3, 2), strides=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2), groups=3, bias=False
    )
    x = normal((2, 7, 6, 3))
    params = layer.init(jax.random.key(0), x)
    assert describe(params) == "{'kernel': float32[3, 2, 1, 6]}"
    expected = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (2, 1),
        ((1, 0), (0, 2)),
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-6)


def test_outputs_start_with_the_variance_of_the_inputs():
    """lecun_normal: the sum over C features and w h taps has the variance of x where that of k is 1
    / (C w h).
    """
    kernel = conv(64, 5).init(jax.random.key(0), jnp.ones((9, 9, 16)))["kernel"]
    # 25,600 weights: sd 0.9 %.
    np.testing.assert_allclose(16 * 5 * 5 * np.var(kernel), 1, atol=0.04)


def test_a_loop_of_steps_learns_a_filter():
    """Least squares on y = k * x is convex, so gradient descent finds the kernel that made the
    data.
    """
    layer = conv(1, (3,), bias=False)
    x = normal((64, 12, 1))
    truth = {"kernel": jnp.array([0.5, -1.0, 2.0]).reshape(3, 1, 1)}

    def step(params, _):
        gradient = jax.grad(lambda p: jnp.mean((layer.apply(p, x) - layer.apply(truth, x)) ** 2))(
            params
        )
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient), None

    start = layer.init(jax.random.key(0), x)
    params, _ = jax.jit(lambda params: jax.lax.scan(step, params, None, length=100))(start)
    np.testing.assert_allclose(params["kernel"], truth["kernel"], atol=1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conv(0, 3), r"conv\(0, 3\): features must be a positive int, got 0"),
        (
            lambda: conv(8, 0),
            (
                "conv: kernel_size must be a positive int, or one for each spatial axis as in "
                "\\(3,\\), got 0"
            ),
        ),
        (lambda: conv(8, ()), "conv: kernel_size must be"),
        (
            lambda: conv(8, 3, groups=3),
            r"conv\(8, 3\): groups must divide the features, got groups=3",
        ),
        (lambda: conv(8, 3, groups=0), r"conv\(8, 3\): groups must be a positive int, got 0"),
        (
            lambda: conv(8, 3, padding="FULL"),
            r"conv\(8, 3\): padding must be 'SAME', 'VALID', an int or .* got 'FULL'",
        ),
        (
            lambda: conv(8, (3,), padding=((1, 1), (1, 1))),
            r"conv\(8, \(3,\)\): padding .* spatial axes, got",
        ),
        (
            lambda: conv(8, 3, strides=(2, 2, 2)),
            r"conv\(8, 3\): strides must be a positive int, or one for each of the 2",
        ),
        (lambda: conv(8, 3, dilation=0), r"conv\(8, 3\): dilation must be a positive int"),
    ],
)
def test_conv_refuses_options_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "layer, x, message",
    [
        (
            conv(8, 3),
            jnp.ones((28, 1)),
            r"conv\(8, 3\): the input must be \[..., height, width, features\], got float32",
        ),
        (
            conv(8, (3,)),
            jnp.ones(28),
            r"conv\(8, \(3,\)\): the input must be \[..., length, features\], got float32\[28\]",
        ),
        (
            conv(8, 3, groups=2),
            jnp.ones((5, 5, 3)),
            r"groups must divide the last axis, got groups=2 and float32\[5, 5, 3\]",
        ),
        (
            conv(8, 7, padding="VALID"),
            jnp.ones((5, 9, 3)),
            r"conv\(8, 7\): the window \(7, 7\) does not fit .*\(5, 9\).*'SAME'",
        ),
    ],
)
def test_conv_refuses_inputs_at_init(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), x)


def test_conv_refuses_other_inputs_than_at_init():
    layer = conv(32, 3)
    params = layer.init(jax.random.key(0), jnp.ones((8, 8, 3)))
    with pytest.raises(
        ValueError,
        match=r"conv\(32, 3\): last axis must be 3, got float32\[8, 28, 28, 1\]; the parameters",
    ):
        layer.apply(params, jnp.ones((8, 28, 28, 1)))
    with pytest.raises(
        TypeError, match=r"conv\(32, 3\): the input must be floating, got int32\[8, 8, 3\]"
    ):
        layer.apply(params, jnp.ones((8, 8, 3), int))
    with pytest.raises(TypeError, match="dtype of the parameters, float32, got bfloat16"):
        layer.apply(params, jnp.ones((8, 8, 3), jnp.bfloat16))


def test_an_error_says_how_the_axes_were_read():
    """A batch of grayscale images without their channel is 1 image with 28 channels."""
    params = conv(4, 3).init(jax.random.key(0), jnp.ones((32, 28, 28, 1)))
    read = r"the input was read as 1 image of 32x28 with 28 channels"
    with pytest.raises(ValueError, match=read):
        conv(4, 3).apply(params, jnp.ones((32, 28, 28)))
