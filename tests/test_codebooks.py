"""Vector quantization against its formulas in NumPy, and random features against their kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import chain, dense, repeat
from jaxnet.layers import fourier_features, vector_quantize


def test_vectors_become_their_nearest_code_and_codes_move_to_the_mean_of_their_vectors():
    net, decay, eps = vector_quantize(5, decay=0.8, eps=1e-3), 0.8, 1e-3
    x = jax.random.normal(jax.random.key(0), (7, 6, 3))
    state = net.init_state(x, key=jax.random.key(1))
    (y, ids), new = jax.jit(lambda x: net.apply({}, x, state=state, train=True))(x)
    flat, codes = np.asarray(x, np.float64).reshape(-1, 3), np.asarray(state["codes"], np.float64)
    nearest = np.square(flat[:, None] - codes).sum(-1).argmin(-1)
    np.testing.assert_array_equal(ids.reshape(-1), nearest)
    np.testing.assert_allclose(y.reshape(-1, 3), codes[nearest], rtol=1e-5, atol=1e-6)
    chosen = np.eye(5)[nearest]
    counts = decay * np.ones(5) + (1 - decay) * chosen.sum(0)
    sums = decay * codes + (1 - decay) * chosen.T @ flat
    smooth = (counts + eps) / (counts.sum() + 5 * eps) * counts.sum()
    np.testing.assert_allclose(new["codes"], sums / smooth[:, None], rtol=1e-4, atol=1e-5)
    (same, _), kept = net.apply({}, x, state=state)
    np.testing.assert_allclose(same, y, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_the_gradient_passes_straight_through():
    net, x = vector_quantize(4), jnp.linspace(-1, 1, 12).reshape(4, 3)
    state = net.init_state(x, key=jax.random.key(0))
    towards = jnp.cos(x)
    grad = jax.grad(lambda x: jnp.vdot(net.apply({}, x, state=state)[0][0], towards))(x)
    np.testing.assert_array_equal(grad, towards)


def test_codes_converge_to_the_centers_of_clusters():
    centers = jnp.asarray([[3.0, 0], [-3, 0], [0, 3]])
    net = vector_quantize(3, decay=0.5)
    ids = jax.random.randint(jax.random.key(0), (300,), 0, 3)
    x = centers[ids] + 0.1 * jax.random.normal(jax.random.key(1), (300, 2))
    codes = centers * 0.5
    state = {"codes": codes, "counts": jnp.ones(3), "sums": codes}
    for _ in range(30):
        _, state = net.apply({}, x, state=state, train=True)
    np.testing.assert_allclose(state["codes"], centers, atol=0.05)


@pytest.mark.parametrize("length", [0.5, 1.0, 2.0])
def test_inner_products_of_fourier_features_are_the_gaussian_kernel(length):
    net = fourier_features(20_000, length=length)
    x = jnp.asarray([[0.3, -0.2], [0.9, 0.5], [-1.0, 0.1]])
    z, _ = net.apply({}, x, state=net.init_state(x, key=jax.random.key(0)))
    z, x = np.asarray(z, np.float64), np.asarray(x, np.float64)
    squares = np.square(x[:, None] - x).sum(-1)
    # Four standard errors of a mean of cosines.
    np.testing.assert_allclose(z @ z.T, np.exp(-squares / (2 * length**2)), atol=4 / 20_000**0.5)


def test_copies_begin_with_different_codes():
    net = repeat(chain(vector_quantize(4), lambda result: result[0]), 3)
    state = net.init_state(jnp.ones((2, 3)), key=jax.random.key(0))
    codes = jax.tree.leaves(state)[0]
    assert codes.shape == (3, 4, 3) and len(np.unique(codes)) == 36


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: vector_quantize(0), "vector_quantize: codes must be a positive int"),
        (lambda: vector_quantize(3, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: fourier_features(4, length=0), "length must be a positive number, got 0"),
        (lambda: vector_quantize(3).init_state(jnp.ones((2, 3))), "pass key= to init_state"),
        (
            lambda: chain(dense(3), f=fourier_features(4)).init_state(jnp.ones((2, 3))),
            "pass key= to init_state",
        ),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
