"""Noise: which elements share a coin, and the moments of the noise, those of the papers and of
PyTorch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import weights

from jaxnet import capture, chain, dense, repeat, wire
from jaxnet.layers import (
    alpha_dropout,
    drop_path,
    dropout,
    gaussian_dropout,
    gaussian_noise,
    spatial_dropout,
)

N = 20_000


def trained(net, *inputs, seed=0):
    return np.asarray(net.apply({}, *inputs, key=jax.random.key(seed), train=True))


@pytest.mark.parametrize(
    "net, axes",
    [
        (dropout(0.3, shared=-2), (1,)),
        (dropout(0.3, shared=(-1, -2)), (1, 2)),
        (spatial_dropout(0.3, rank=1), (1,)),
        (drop_path(0.3), (1, 2)),
    ],
    ids=str,
)
def test_one_coin_decides_along_the_shared_axes(net, axes):
    y = trained(net, jnp.ones((2000, 4, 3)))
    assert np.array_equal(y, np.broadcast_to(y.max(axes, keepdims=True), y.shape))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    coins = y.max(axes).ravel() > 0
    assert abs(coins.mean() - 0.7) < 4 * np.sqrt(0.21 / coins.size)


@pytest.mark.parametrize(
    "net, mean, deviation",
    [
        (gaussian_noise(0.5), 2.0, 0.5),
        (gaussian_dropout(0.2), 2.0, 2 * np.sqrt(0.2 / 0.8)),
        (dropout(0.2), 2.0, 2 * np.sqrt(0.2 / 0.8)),
    ],
    ids=str,
)
def test_the_moments_are_those_of_the_formula(net, mean, deviation):
    y = trained(net, jnp.full((N,), 2.0))
    assert abs(y.mean() - mean) < 4 * deviation / np.sqrt(N)
    assert abs(y.std() - deviation) < 4 * deviation / np.sqrt(N)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_alpha_dropout_has_the_two_values_of_pytorch_and_keeps_the_moments(rate):
    torch = pytest.importorskip("torch")
    x = jnp.ones(1000)
    expected = torch.nn.functional.alpha_dropout(torch.ones(1000), rate, training=True)
    np.testing.assert_allclose(
        np.unique(trained(alpha_dropout(rate), x)), np.unique(expected.numpy()), rtol=1e-4
    )
    y = trained(alpha_dropout(rate), jax.random.normal(jax.random.key(1), (N,)))
    assert abs(y.mean()) < 5 / np.sqrt(N) and abs(y.var() - 1) < 0.05


@pytest.mark.parametrize("rates", [[0.0, 0.2, 0.6]])
def test_drop_path_has_a_rate_per_copy_under_repeat(rates):
    @wire(inner=dense(3), drop=drop_path())
    def block(f, x, rate):
        return x + f.drop(f.inner(x), rate)

    net = chain(trunk=repeat(block, 3, each="rate"))
    x = jax.random.normal(jax.random.key(0), (2000, 3))
    call = lambda **more: capture(net, "trunk")(params, x, rate=jnp.asarray(rates), **more)  # noqa: E731
    params = weights(net, x, rate=jnp.asarray(rates))
    y, seen = call(key=jax.random.key(1), train=True)
    before = jnp.concatenate([x[None], seen["trunk"][:-1]])
    skipped = np.mean(np.all(seen["trunk"] == before, -1), 1)
    np.testing.assert_allclose(skipped, rates, atol=4 * np.sqrt(0.25 / 2000))
    evaluated, _ = call()
    expected = x
    for i in range(3):
        expected = expected + expected @ params["trunk"]["inner"]["kernel"][i]
        expected = expected + params["trunk"]["inner"]["bias"][i][None]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dropout(1.0), r"dropout: rate is the probability to drop, in \[0, 1\), got 1.0"),
        (lambda: drop_path(-0.1), "drop_path: rate"),
        (lambda: gaussian_noise(-1), "gaussian_noise: the deviation must be"),
        (lambda: dropout(0.5, shared=1), "shared axes are counted from the end"),
        (lambda: trained(dropout(0.5, shared=-3), jnp.ones((2, 2))), "x must have the shared axes"),
        (lambda: trained(drop_path(), jnp.ones((2, 2)), jnp.ones(2)), "the rate must be a scalar"),
        (lambda: spatial_dropout(0.5).apply({}, jnp.ones((2, 2)), train=True), "at least 3 axes"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
