"""Attention of other libraries, with their own numbers, equals that of the library itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import chain, dense, repeat
from jaxnet.interop import from_equinox, from_flax, from_haiku, from_torch
from jaxnet.layers import multi_head_attention

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
NET = chain(attn=multi_head_attention(8, 2), head=dense(3))


def like(net=NET, x=X):
    return {"params": jax.eval_shape(net.init, jax.random.key(0), x)}


@pytest.mark.parametrize("bias", [True, False])
def test_from_torch(bias):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attn(x, x, x)[0])

    theirs = Net()
    net = chain(attn=multi_head_attention(8, 2, bias=bias), head=dense(3))
    params = from_torch(theirs.state_dict(), like=like(net))["params"]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(net.apply(params, X), expected, rtol=1e-5, atol=1e-5)


def test_from_torch_with_other_widths_of_the_context_and_in_a_stack():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    context = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    net = multi_head_attention(8, 2)
    template = {"params": jax.eval_shape(net.init, jax.random.key(0), X, context)}
    params = from_torch(theirs.state_dict(), like=template)["params"]
    with torch.no_grad():
        x, c = torch.from_numpy(X), torch.from_numpy(context)
        expected = theirs(x, c, c)[0].numpy()
    np.testing.assert_allclose(net.apply(params, X, context), expected, rtol=1e-5, atol=1e-5)

    layers = torch.nn.ModuleList(torch.nn.MultiheadAttention(8, 2, batch_first=True) for _ in "12")
    net = chain(layers=repeat(multi_head_attention(8, 2), 2))
    state = {f"layers.{name}": x for name, x in layers.state_dict().items()}
    params = from_torch(state, like=like(net))["params"]
    with torch.no_grad():
        expected = torch.from_numpy(X)
        for layer in layers:
            expected = layer(expected, expected, expected)[0]
    np.testing.assert_allclose(net.apply(params, X), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_from_flax_linen_and_nnx():
    nn = pytest.importorskip("flax.linen")
    from flax import nnx

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
            return nn.Dense(3, name="head")(x)

    with jax.numpy_rank_promotion("allow"):
        variables = Net().init(jax.random.key(0), X)
        expected = Net().apply(variables, X)
        params = from_flax(variables, like=like())["params"]
        np.testing.assert_allclose(NET.apply(params, X), expected, rtol=1e-4, atol=1e-5)

        theirs = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        net = multi_head_attention(8, 2)
        params = from_flax(theirs, like=like(net))["params"]
        expected = theirs(jnp.asarray(X))
        np.testing.assert_allclose(net.apply(params, X), expected, rtol=1e-4, atol=1e-5)


def test_from_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        attn = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal(), name="attn")
        return hk.Linear(3, name="head")(attn(x, x, x))

    theirs = hk.without_apply_rng(hk.transform(forward))
    with jax.numpy_rank_promotion("allow"):
        source = theirs.init(jax.random.PRNGKey(0), X)
        expected = theirs.apply(source, X)
    params = from_haiku(source, like=like())["params"]
    np.testing.assert_allclose(NET.apply(params, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_from_equinox(bias):
    eqx = pytest.importorskip("equinox")
    used = {f"use_{name}_bias": bias for name in ("query", "key", "value", "output")}
    theirs = eqx.nn.MultiheadAttention(2, 8, **used, key=jax.random.key(0))
    net = multi_head_attention(8, 2, bias=bias)
    with jax.numpy_rank_promotion("allow"):
        expected = jax.vmap(lambda x: theirs(x, x, x))(jnp.asarray(X))
    params = from_equinox(theirs, like=like(net))["params"]
    np.testing.assert_allclose(net.apply(params, X), expected, rtol=1e-5, atol=1e-5)


def test_other_modules_with_such_names_stay_as_they_are():
    source = {"a.in_proj_weight": np.ones((6, 2), np.float32), "b.out_proj.weight": np.ones((2, 2))}
    params = from_torch(source)["params"]
    assert params["a"]["in_proj_weight"].shape == (6, 2)
    assert params["b"]["out_proj"]["kernel"].shape == (2, 2)
    source = {f"{name}/kernel": np.ones((2, 2), np.float32) for name in ("query", "key", "value")}
    tree = {"params": {name: {"kernel": np.ones((2, 2))} for name in ("query", "key", "value")}}
    assert sorted(from_flax(tree)["params"]) == ["key", "query", "value"]
