"""einsum_dense, bilinear and the tied embedding, against Keras, Flax and PyTorch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry import close
from torch_peers import agree, applied, drawn, examples, torch

from jaxnet.combinators import cast
from jaxnet.core import wire
from jaxnet.layers import bilinear, dense, einsum_dense, embed

EQUATIONS = {  # equation, shape of x, sizes, default bias axes
    "d,df->f": ((2, 3, 4), dict(f=5), "f"),
    "td,dhk->thk": ((2, 3, 4), dict(h=2, k=3), "hk"),
    "...d,dhk->...hk": ((2, 3, 4), dict(h=2, k=3), "hk"),
    "btd,df->btf": ((2, 3, 4), dict(f=5), "f"),
    "thk,hkd->td": ((2, 3, 4, 5), dict(d=6), "d"),
    "ed,edf->ef": ((5, 3, 4), dict(f=2), "ef"),
    "td,ts->sd": ((2, 3, 4), dict(s=5), "s"),
    "bd...,bdf->bf...": ((2, 3, 4), dict(f=5), "bf"),
    "d...,df->...f": ((3, 2, 4), dict(f=5), "f"),
    "hd,dhk->kh": ((2, 3, 4), dict(k=2), "kh"),
    "hk,khd->d": ((2, 3, 4), dict(d=6), "d"),
    "t,ts->ts": ((2, 3), dict(s=4), "ts"),
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("bias", [None, "", "last"])
def test_einsum_dense_is_the_einsum_of_pytorch(equation, bias):
    shape, sizes, axes = EQUATIONS[equation]
    left, y = equation.split("->")
    letters = y.replace("...", "")
    bias = letters[-1] if bias == "last" else bias
    layer = einsum_dense(equation, bias_axes=bias, **sizes)
    axes = axes if bias is None else bias
    full = equation
    if "..." not in equation:
        first, kernel = left.split(",")
        full = f"...{first},{kernel}->...{y}"

    def reference(p, x):
        t = torch()
        out = t.einsum(full, x, p["kernel"])
        if not axes:
            return out
        # Bring the bias into the place of its letters, by an einsum with ones for the others.
        places = full.split("->")[1]
        return out + t.einsum(f"{axes},{places}->{places}", p["bias"], t.ones_like(out))

    for dtype in ("float64", "float32"):
        agree(layer, reference, drawn(shape, 0, dtype))
    params = jax.eval_shape(layer.init, jax.random.key(0), drawn(shape, 0, "float32"))
    assert ("bias" in params) == bool(axes)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "equation, sizes, shape, output, bias_axes",
    [
        ("abc,cd->abd", dict(d=5), (2, 3, 4), (None, 5), "d"),
        ("abc,cde->abde", dict(d=2, e=3), (2, 3, 4), (None, 2, 3), "de"),
        ("abc,cde->abde", dict(d=2, e=3), (2, 3, 4), (None, 2, 3), "e"),
        ("abcd,cde->abe", dict(e=3), (2, 3, 4, 5), (None, 3), "e"),
        ("...x,xy->...y", dict(y=5), (2, 3, 4), 5, "y"),
    ],
)
def test_einsum_dense_is_that_of_keras(equation, sizes, shape, output, bias_axes, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras = pytest.importorskip("keras")
        twin = keras.layers.EinsumDense(equation, output_shape=output, bias_axes=bias_axes)
        x = drawn(shape, 0, "float32")
        twin.build(shape)
        kernel, bias = (drawn(w.shape, i, "float32") for i, w in enumerate(twin.weights))
        twin.set_weights([kernel, bias])
        with jax.numpy_rank_promotion("allow"):
            expected = np.asarray(twin(x))
    layer = einsum_dense(equation, bias_axes=bias_axes, **sizes)
    params = layer.init(jax.random.key(0), x)
    assert params["kernel"].shape == kernel.shape
    params = {"kernel": kernel, "bias": bias.reshape(params["bias"].shape)}
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5, atol=1e-5)


def test_einsum_dense_is_dense_general_of_flax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linen = pytest.importorskip("flax.linen")
    x = drawn((2, 5, 4), 0, "float32")
    twin, layer = linen.DenseGeneral((3, 2)), einsum_dense("d,dhk->hk", h=3, k=2)
    params = twin.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(
        layer.apply(params, x), twin.apply({"params": params}, x), rtol=1e-5, atol=1e-6
    )


def test_einsum_dense_starts_with_the_variance_of_its_fan_in():
    """The fan-in is the product of the axes that are summed, wherever they stand."""
    for equation, fan_in in [("hk,khd->d", 64 * 8), ("hk,hkd->hd", 64)]:
        params = einsum_dense(equation, d=300).init(jax.random.key(0), jnp.ones((8, 64)))
        np.testing.assert_allclose(np.var(params["kernel"]) * fan_in, 1, atol=0.05)


def test_einsum_dense_over_the_last_axis_is_one_product_of_matrices():
    layer, x = einsum_dense("thk,hkd->td", d=3), jnp.ones((2, 3, 4, 5))
    params = layer.init(jax.random.key(0), x)
    text = jax.jit(jax.grad(lambda p: layer.apply(p, x).sum())).lower(params).as_text()
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "tensor<6x3xf32>" in product and "tensor<6x20xf32>" in product


def test_empty_batches():
    for layer, x in [
        (einsum_dense("td,dhk->thk", h=2, k=2), (jnp.ones((0, 3, 4)),)),
        (bilinear(3), (jnp.ones((0, 2)), jnp.ones((0, 4)))),
    ]:
        params = layer.init(jax.random.key(0), *x)
        assert layer.apply(params, *x).shape[0] == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: einsum_dense("td->t"), "the equation must be 'axes of x,axes of the kernel->"),
        (lambda: einsum_dense("tt,td->d", d=3), "the equation must be"),
        (lambda: einsum_dense("d,d...->...", d=3), "the equation must be"),
        (lambda: einsum_dense("...d,df->f", f=3), "x and y must both have an ellipsis"),
        (lambda: einsum_dense("td,df->tg", f=3), "axis 'g' must be in two of the three operands"),
        (lambda: einsum_dense("td,df->tf"), "the size of axis 'f' is missing, as in f=8"),
        (lambda: einsum_dense("td,df->tf", f=3, h=2), "'h' is no axis of the equation"),
        (lambda: einsum_dense("td,df->tf", f=0), "f must be a positive int, got 0"),
        (lambda: einsum_dense("td,df->tf", f=True), "f must be a positive int, got True"),
        (lambda: einsum_dense("td,df->tf", f=3, bias_axes="d"), "bias_axes must be letters of y"),
        (lambda: bilinear(0), "bilinear: features must be a positive int, got 0"),
    ],
)
def test_options_of_the_wrong_form_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused():
    layer = einsum_dense("td,dhk->thk", h=2, k=2)
    params = layer.init(jax.random.key(0), jnp.ones((3, 4)))
    with pytest.raises(
        ValueError, match=r"axis 'd' must be 4, got float32\[3, 5\]; the parameters"
    ):
        layer.apply(params, jnp.ones((3, 5)))
    with pytest.raises(
        ValueError, match=r"einsum_dense\(.*\): the input must have at least 2 axes"
    ):
        layer.init(jax.random.key(0), jnp.ones(4))
    with pytest.raises(ValueError, match=r"axis 'd' must be 3, got float32\[3, 4\]"):
        einsum_dense("td,df->tf", d=3, f=2).init(jax.random.key(0), jnp.ones((3, 4)))
    layer = bilinear(2)
    with pytest.raises(ValueError, match="both inputs must have the same batch axes, got float32"):
        layer.init(jax.random.key(0), jnp.ones((3, 4)), jnp.ones((2, 4)))
    params = layer.init(jax.random.key(0), jnp.ones((3, 4)), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"last axis must be 5, got float32\[3, 4\]"):
        layer.apply(params, jnp.ones((3, 4)), jnp.ones((3, 4)))


@examples(10)
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([(), (3,), (2, 3), (0,)]),
    st.booleans(),
    st.sampled_from(["float64", "float32"]),
)
def test_bilinear_is_that_of_pytorch(sizes, batch, bias, dtype):
    d, e, features = sizes

    def reference(p, x, z):
        weight = p["kernel"].permute(2, 1, 0).contiguous()
        return torch().nn.functional.bilinear(x, z, weight, p.get("bias"))

    x, z = drawn((*batch, d), 0, dtype), drawn((*batch, e), 3, dtype)
    agree(bilinear(features, bias=bias), reference, x, z)


# --- the embedding as output layer ----------------------------------------------------------------


def test_attend_is_that_of_flax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linen = pytest.importorskip("flax.linen")
    layer, twin = embed(7, 4), linen.Embed(7, 4)
    params = layer.init(jax.random.key(0), jnp.ones(3, int))
    x = drawn((2, 3, 4), 0, "float32")

    def outcome(apply):
        y, pull = jax.vjp(apply, params, jnp.asarray(x))
        return y, pull(jnp.cos(3 * y))

    ours = outcome(lambda p, x: layer.apply(p, x, attend=True))
    theirs = outcome(lambda p, x: twin.apply({"params": p}, x, method="attend"))
    close(ours, theirs)


@wire(embed=embed(9, 4), hidden=dense(4))
def language_model(f, ids):
    return f.embed(jnp.tanh(f.hidden(f.embed(ids))), attend=True)


def test_one_child_embeds_and_attends():
    ids = jnp.array([[1, 8, 2]])
    params = language_model.init(jax.random.key(0), ids)
    assert jax.tree.map(jnp.shape, params["embed"]) == {"embedding": (9, 4)}
    table, hidden = params["embed"]["embedding"], params["hidden"]
    h = jnp.tanh(table[ids] @ hidden["kernel"] + hidden["bias"][None, None])
    close(language_model.apply(params, ids), h @ table.T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_many_scores_is_summed_in_float32(dtype):
    """50,000 equal gradients of 1: a narrow sum would stop at 256 or 2,048, or overflow."""
    layer = cast(embed(2, 3), dtype)
    params = {"embedding": jnp.ones((2, 3))}

    def loss(params, x):
        y = layer.apply(params, x, attend=True)
        return y.astype(jnp.float32).sum()

    for n in (50_000, 100_000):
        gradient = jax.jit(jax.grad(loss))(params, jnp.ones((n, 3)))["embedding"]
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, n, rtol=1e-2)


def test_scores_in_a_narrow_dtype_have_narrow_products():
    """The products of the outputs and of the gradient of x, which are the expensive ones."""
    layer, x = cast(embed(5, 3), "bfloat16"), jnp.ones((4, 3))
    params = {"embedding": jnp.ones((5, 3))}

    def loss(x):
        return layer.apply(params, x, attend=True).astype(jnp.float32).sum()

    products = [
        line
        for line in jax.jit(jax.value_and_grad(loss)).lower(x).as_text().splitlines()
        if "dot_general" in line
    ]
    assert products and all("xbf16>" in line and "xf32>" not in line for line in products)


def test_the_tied_model_is_close_to_float32_in_bfloat16():
    ids = jnp.array([[1, 8, 2]])
    params = language_model.init(jax.random.key(0), ids)
    net = cast(language_model, "bfloat16")

    def gradient(net):
        return jax.grad(lambda p: jnp.sin(net.apply(p, ids)).astype(jnp.float32).sum())(params)

    exact, narrow = gradient(language_model), gradient(net)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=0.03 * np.abs(b).max())


def test_what_cannot_attend_is_refused():
    layer = embed(5, 3)
    params = layer.init(jax.random.key(0), jnp.ones(2, int))
    with pytest.raises(
        ValueError, match=r"embed\(5, 3\): last axis must be 3, got float32\[2, 4\]"
    ):
        layer.apply(params, jnp.ones((2, 4)), attend=True)
    with pytest.raises(TypeError, match=r"embed\(5, 3\): the input must be floating, got int32"):
        layer.apply(params, jnp.ones((2, 3), int), attend=True)
    with pytest.raises(TypeError, match=r"embed\(5, 3\): the input must be integer, got float32"):
        layer.apply(params, jnp.ones((2, 3)))
    assert applied(layer, params, jnp.ones(2, int)).shape == (2, 3)
