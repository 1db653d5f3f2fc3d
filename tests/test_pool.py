"""The pooling layers: ranks, batch axes, conventions, and what they say to a wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet.layers import avg_pool, global_avg_pool, global_max_pool, max_pool


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("window, spatial", [((2,), (6,)), (2, (6, 4)), ((2, 1, 2), (4, 3, 2))])
def test_windows_that_tile_the_input_are_blocks(window, spatial):
    sizes = (2, 2) if window == 2 else window
    x = normal((2, 3, *spatial, 5))
    pairs = [size for n, w in zip(spatial, sizes, strict=True) for size in (n // w, w)]
    blocks = np.asarray(x).reshape(2, 3, *pairs, 5)
    taps = tuple(range(3, 3 + 2 * len(sizes), 2))
    np.testing.assert_array_equal(max_pool(window).apply({}, x), blocks.max(taps))
    np.testing.assert_allclose(
        avg_pool(window).apply({}, x), blocks.mean(taps), rtol=1e-5, atol=1e-6
    )
    # No batch axis.
    np.testing.assert_array_equal(max_pool(window).apply({}, x[0, 0]), blocks.max(taps)[0, 0])


def test_pools_over_everything():
    x = normal((2, 3, 4, 5))
    np.testing.assert_allclose(
        global_avg_pool().apply({}, x), np.mean(x, (1, 2)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(global_max_pool().apply({}, x), np.max(x, (1, 2)))
    np.testing.assert_array_equal(global_max_pool(1).apply({}, x), np.max(x, 2))
    np.testing.assert_allclose(
        global_avg_pool(3).apply({}, x), np.mean(x, (0, 1, 2)), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda x: global_max_pool().apply({}, x).sum())(jnp.ones((2, 2, 1)))
    np.testing.assert_array_equal(gradient, jnp.full((2, 2, 1), 0.25))  # shared equally


def test_padding_is_not_counted_and_never_wins():
    x = -jnp.ones((1, 5, 5, 1))
    for pool in (avg_pool(3, strides=2, padding="SAME"), max_pool(3, strides=2, padding="SAME")):
        np.testing.assert_allclose(pool.apply({}, x), -jnp.ones((1, 3, 3, 1)), rtol=1e-6)
    assert max_pool(3, strides=1, padding=1).apply({}, x.astype(int)).dtype == jnp.int32


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: max_pool(0), "max_pool: window must be a positive int"),
        (lambda: avg_pool(2, padding="CAUSAL"), r"avg_pool\(2\): padding must be 'SAME', 'VALID'"),
        (
            lambda: max_pool((2, 3), padding=2),
            r"max_pool\(\(2, 3\)\): padding must be smaller than the window, \(2, 3\)",
        ),
        (
            lambda: max_pool((2,), strides=(1, 1)),
            r"max_pool\(\(2,\)\): strides must be a positive int, or one for the",
        ),
        (lambda: global_avg_pool(0), "global_avg_pool: rank must be a positive int"),
    ],
)
def test_pools_refuse_options_when_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "layer, x, error, message",
    [
        (
            max_pool(2),
            jnp.ones((4, 3)),
            ValueError,
            r"max_pool\(2\): the input must be \[..., height, width, features\], got",
        ),
        (
            max_pool(5),
            jnp.ones((4, 4, 3)),
            ValueError,
            r"max_pool\(5\): the window \(5, 5\) does not fit into .* \(4, 4\)",
        ),
        (
            avg_pool(2),
            jnp.ones((4, 4, 3), int),
            TypeError,
            r"avg_pool\(2\): the input must be floating, got int32\[4, 4, 3\]",
        ),
        (
            max_pool(2),
            jnp.ones((4, 4, 3), bool),
            TypeError,
            r"max_pool\(2\): the input must be number, got bool",
        ),
        (
            global_max_pool(),
            jnp.ones((4, 0, 3)),
            ValueError,
            r"global_max_pool\(2\): there must be something to pool over",
        ),
        (
            global_avg_pool(),
            jnp.ones((4, 3)),
            ValueError,
            r"global_avg_pool\(2\): the input must be \[..., height, width",
        ),
    ],
)
def test_pools_refuse_inputs(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer.apply({}, x)
