"""Feed-forward blocks and mixtures of experts equal the formulas in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import close, numbers, quick_to_compile, weights  # noqa: F401 (a fixture)

import jaxnet
from jaxnet import chain, repeat, residual
from jaxnet.layers import gated_mlp, mlp, moe, squeeze_excite


def silu(x):
    return x / (1 + np.exp(-x))


def affine(p, x):
    return np.asarray(x) @ np.asarray(p["kernel"]) + np.asarray(p.get("bias", 0))


def given(net, *shape):
    """(params, x) in float64, normal numbers all."""
    spec = jax.ShapeDtypeStruct(shape, jnp.float64)
    return weights(net, spec), numbers(spec, 1)


def test_feed_forward_blocks_are_the_formulas():
    with jax.enable_x64(True):
        net = mlp(6, 3, activation=jnp.tanh)
        p, x = given(net, 2, 4)
        expected = affine(p["down"], np.tanh(affine(p["up"], x)))
        np.testing.assert_allclose(net.apply(p, x), expected, rtol=1e-10)
        net = gated_mlp(6, 3)
        p, x = given(net, 2, 4)
        expected = affine(p["down"], silu(affine(p["gate"], x)) * affine(p["up"], x))
        np.testing.assert_allclose(net.apply(p, x), expected, rtol=1e-10)
        net = squeeze_excite(6, 3)
        p, x = given(net, 2, 3, 4, 6)
        hidden = np.maximum(affine(p["down"], np.asarray(x).mean((1, 2))), 0)
        scale = 1 / (1 + np.exp(-affine(p["up"], hidden)))
        np.testing.assert_allclose(
            net.apply(p, x), np.asarray(x) * scale[:, None, None], rtol=1e-10
        )


def test_the_activation_is_recomputed_and_its_derivatives_stay():
    """Derivatives of first and second order, forward and reverse, equal those without it."""
    net, x = mlp(8, 4), numbers(jax.ShapeDtypeStruct((3, 4), jnp.float32))
    p = weights(net, x)

    def plain(x):
        h = jax.nn.gelu(jnp.dot(x, p["up"]["kernel"]) + p["up"]["bias"][None])
        return jnp.sum(jnp.sin(h @ p["down"]["kernel"] + p["down"]["bias"][None]))

    own = lambda x: jnp.sum(jnp.sin(net.apply(p, x)))  # noqa: E731
    for derivative in (jax.grad, jax.hessian):
        close(jax.jit(derivative(own))(x), jax.jit(derivative(plain))(x), 1e-4, 1e-4)
    _, seen = jaxnet.capture(net, "act")(p, x)
    assert seen["act"].shape == (3, 8)


def mixed(p, x, top, normalize):
    """Token by token: (y, balance, z)."""
    logits = affine(p["router"], x)
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y, counts = np.zeros((*x.shape[:-1], p["experts"]["down"]["kernel"].shape[-1])), 0
    for at in np.ndindex(*x.shape[:-1]):
        best = np.argsort(-gates[at])[:top]
        shares = gates[at][best] / (gates[at][best].sum() if normalize else 1)
        for expert, share in zip(best, shares, strict=True):
            one = jax.tree.map(lambda leaf, e=expert: np.asarray(leaf[e]), p["experts"])
            y[at] += share * affine(
                one["down"], silu(affine(one["gate"], x[at])) * affine(one["up"], x[at])
            )
        counts = counts + np.isin(np.arange(gates.shape[-1]), best)
    n = np.prod(x.shape[:-1])
    balance = gates.shape[-1] * np.sum(counts / n * gates.reshape(n, -1).mean(0))
    return y, balance, np.square(np.log(np.exp(logits).sum(-1))).mean()


FORMS = {"dense": {}, "ragged": {"ragged": True}, "capacity": {"capacity": 4.0}}


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("top, normalize", [(1, False), (2, True), (3, False)])
def test_all_forms_are_the_mixture_of_numpy(form, top, normalize):
    with jax.enable_x64(True):
        net = moe(4, top, 5, 3, normalize=normalize, **form)
        p, x = given(net, 2, 6, 3)
        y, seen = jax.jit(jaxnet.capture(net, "aux"))(p, x)
        expected, balance, z = mixed(p, np.asarray(x), top, normalize)
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(seen["aux"]["balance"], balance, rtol=1e-10)
        np.testing.assert_allclose(seen["aux"]["z"], z, rtol=1e-10)
        loss = lambda net: lambda p, x: jnp.sum(jnp.sin(net.apply(p, x)))  # noqa: E731
        dense = jax.jit(jax.grad(loss(moe(4, top, 5, 3, normalize=normalize)), (0, 1)))(p, x)
        close(jax.jit(jax.grad(loss(net), (0, 1)))(p, x), dense, 1e-9, 1e-12)


def test_experts_at_capacity_drop_later_tokens_of_the_sequence():
    net, dense = moe(2, 1, 4, 3, capacity=0.5, normalize=False), moe(2, 1, 4, 3, normalize=False)
    x = numbers(jax.ShapeDtypeStruct((3, 8, 3), jnp.float32))
    p = weights(net, x)
    # ceil(1 * 8 * 0.5 / 2) = 2 places for each expert.
    chosen = np.argmax(x @ p["router"]["kernel"], -1)
    y, full = jax.jit(net.apply)(p, x), jax.jit(dense.apply)(p, x)
    for row in range(3):
        for token in range(8):
            earlier = np.sum(chosen[row, :token] == chosen[row, token])
            kept = full[row, token] if earlier < 2 else np.zeros(3)
            np.testing.assert_allclose(y[row, token], kept, rtol=1e-4, atol=1e-5)


def test_an_even_load_has_a_balance_of_top_and_losses_leave_a_loop():
    x = jnp.ones((1, 4, 3))
    net = chain(blocks=repeat(residual(moe(4, 2, 4, 3)), 3, remat=True))
    p = net.init(jax.random.key(0), x)
    p["blocks"]["router"] = jax.tree.map(jnp.zeros_like, p["blocks"]["router"])
    _, seen = jax.jit(jaxnet.capture(net, "**/aux"))(p, x)
    np.testing.assert_allclose(seen["blocks/aux"]["balance"], [2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(seen["blocks/aux"]["z"], [np.log(4) ** 2] * 3, rtol=1e-6)


def test_wrong_arguments_are_refused():
    for make, message in [
        (lambda: moe(2, 3, 4, 4), "top must be at most experts, got top=3 and experts=2"),
        (lambda: moe(2, 1, 4, 4, capacity=0), "capacity must be positive"),
        (lambda: moe(2, 1, 4, 4, capacity=1.0, ragged=True), "ragged drops no token"),
        (lambda: mlp(0, 3), "mlp: hidden must be a positive int, got 0"),
        (lambda: gated_mlp(3, True), "gated_mlp: features must be a positive int, got True"),
        (lambda: squeeze_excite(4, 0), "ratio must be a positive int, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    net = squeeze_excite(4, 2)
    with pytest.raises(ValueError, match="squeeze_excite.4.: last axis must be 4"):
        net.init(jax.random.key(0), jnp.ones((2, 3, 3, 5)))
