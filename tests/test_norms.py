"""The norms on data that is hard for float32, against float64; PyTorch's errors on the same data
are in the comments.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import state_of

from jaxnet.layers import batch_norm, layer_norm

ROWS = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)


def outlier(row):
    x = ROWS.copy()
    x[row] = 1e4
    return x


# Each with the largest error of y that is allowed. Deviations are of size 1, and PyTorch's errors
# are those of torch 2.13.0+cpu with BatchNorm1d(3, affine=False): 5.8e-6, 4.3e-6, 1.7e-3, 2.2e-2,
# 5.4e-3, 1.0, 0.87, 1.1e-16, 5.3e-7, 4.5e-5.
HARD = {
    "the first row is an outlier of 1e4 deviations": (outlier(0), 1.7e-5),
    "another row is an outlier": (outlier(500), 1.7e-5),
    "mean 1e4": (ROWS + np.float32(1e4), 2e-6),
    "mean 1e6": (ROWS + np.float32(1e6), 2e-6),
    "constant": (np.full((1000, 3), 3.7, np.float32), 1e-6),
    "constant and large": (np.full((1000, 3), 1e6 / 3, np.float32), 1e-6),
    "two values that are 1e6 apart from zero": (
        np.repeat(np.array([[1e6], [1e6 + 1]], np.float32), 500, 0).repeat(3, 1),
        2e-6,
    ),
    "tiny": (ROWS * np.float32(1e-12), 1e-12),
    "a long ramp": (np.linspace(0, 1e6, 1000, dtype=np.float32)[:, None].repeat(3, 1), 2e-6),
    "of every size": (np.exp(8 * ROWS), 5e-5),
}


@pytest.mark.parametrize("x, bound", HARD.values(), ids=HARD.keys())
def test_norms_are_as_exact_as_float32_allows(x, bound):
    wide, n = x.astype(np.float64), len(x)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    batch, layer = (
        batch_norm(momentum=0.0, scale=False, bias=False),
        layer_norm(scale=False, bias=False),
    )
    y, state = jax.jit(lambda x: batch.apply({}, x, state=state_of(batch, x), train=True))(x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(
        state["mean"], wide.mean(0), rtol=2e-6, atol=1e-6 * np.abs(wide).max()
    )
    floor = (
        np.finfo(np.float32).eps * np.abs(wide).max()
    ) ** 2  # of a variance that is zero: numbers are this far apart
    np.testing.assert_allclose(state["var"], wide.var(0) * n / (n - 1), rtol=3e-6, atol=floor)
    np.testing.assert_allclose(
        jax.jit(lambda x: layer.apply({}, x))(x.T), expected.T, rtol=0, atol=bound
    )


@pytest.mark.parametrize("lead", [(), (1,), (5, 4)], ids=str)
def test_images_and_rows_have_the_same_statistics(lead):
    x = jnp.asarray(ROWS[:20] + np.float32(1e4)).reshape(*lead, -1, 3)
    norm = batch_norm()
    start = norm.init(jax.random.key(0), x), state_of(norm, x)
    y, state = norm.apply(start[0], x, state=start[1], train=True)
    flat, same = norm.apply(start[0], x.reshape(20, 3), state=start[1], train=True)
    np.testing.assert_allclose(y.reshape(20, 3), flat, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, same)


@pytest.mark.parametrize("make", [batch_norm, layer_norm])
def test_the_gradient_is_that_of_float64_where_one_row_decides(make):
    norm, x = make(scale=False, bias=False), outlier(0)
    x = x if make is batch_norm else x.T.copy()
    towards = np.cos(np.arange(x.size)).reshape(x.shape)

    def grad(x):
        def loss(x):
            state = {"state": state_of(norm, x), "train": True} if norm.init_state else {}
            y = norm.apply({}, x, **state)
            return jnp.vdot(y[0] if norm.init_state else y, towards)

        return jax.jit(jax.grad(loss))(x)

    with jax.enable_x64(True):
        expected = grad(x.astype(np.float64))
    np.testing.assert_allclose(grad(x), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
