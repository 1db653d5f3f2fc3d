"""The numbers of the layers against NumPy's formulas and PyTorch's results, and what they say to a
wrong input.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import state_of

from jaxnet import chain
from jaxnet.core import describe
from jaxnet.layers import batch_norm, dense, dropout, embed, flatten, layer_norm


def numbers(text: str, *shape: int) -> np.ndarray:
    return np.array(text.split(), np.float32).reshape(shape)


# --- against PyTorch ------------------------------------------------------------------------------

# torch 2.13.0+cpu, x = arange(12).reshape(4, 3).sin(), cotangent c = arange(12).reshape(4,
#     3).cos(), and for each layer weight =
#     arange(weight.numel()).reshape(weight.shape).add(1).cos(), bias =
#     arange(bias.numel()).add(2).sin() y = layer(x); dx, dweight, dbias = torch.autograd.grad((y *
#     c[:, :y.shape[1]]).sum(), [x, layer.weight, layer.bias])
# with Linear(3, 2), LayerNorm(3), BatchNorm1d(3) in training, and the same BatchNorm1d(3) then in
# evaluation.
X = np.sin(np.arange(12, dtype=np.float32)).reshape(4, 3)
COTANGENT = np.cos(np.arange(12, dtype=np.float32)).reshape(4, 3)
TORCH = {
    "dense": {
        "y": "-0.341076 1.252894 2.249814 -1.086529 -0.494532 1.460073 2.348341 -1.242738",
        "dx": "0.187137 -0.262883 -0.471210 -0.107645 0.226568 0.352476 "
        "0.025999 -0.185718 -0.226687 0.056168 0.141151 0.096361",
        "dweight": "-0.783488 2.717193 3.719699 -0.648691 1.901104 2.703033",
        "dbias": "0.059048 -0.198511",
    },
    "layer_norm": {
        "y": "0.146931 -0.118349 -1.536417 1.661917 0.342995 0.141968 "
        "0.169986 -0.014854 -1.740384 1.634147 0.259029 0.290834",
        "dx": "0.062649 -0.839387 0.776738 -0.135551 0.737599 -0.602048 "
        "0.168063 -0.641480 0.473418 -0.179488 0.555817 -0.376329",
        "dweight": "-5.326188 1.174273 -0.734479",
        "dbias": "0.059048 -0.198511 -0.273559",
    },
    "batch_norm train": {
        "y": "0.761091 -0.325178 -1.705181 1.066616 0.615747 0.211580 "
        "0.156155 -0.216569 -1.787322 1.653328 0.490480 0.253713",
        "dx": "1.664533 0.098520 0.152334 -1.677983 -0.098191 -0.152428 "
        "-0.334012 -0.131068 -0.143053 0.347462 0.130739 0.143147",
        "dweight": "-3.155649 2.703324 -0.832098",
        "dbias": "0.059048 -0.198511 -0.273559",
    },
    "batch_norm evaluation": {
        "y": "0.905417 -0.212957 -1.647796 0.985420 0.463542 0.179791 "
        "0.747011 -0.134871 -1.726116 1.139053 0.373478 0.219964",
        "dx": "0.566917 -0.228693 0.407095 -0.561243 0.276667 -0.277492 "
        "0.544336 -0.319103 0.142335 -0.516535 0.355153 -0.004329",
        "dweight": "-0.822505 1.934637 -0.789721",
        "dbias": "0.059048 -0.198511 -0.273559",
    },
}
# After one step of training.
TORCH_MEAN, TORCH_VAR = "0.006846 0.004941 -0.001506", "0.908303 0.966622 1.024142"
NORM_PARAMS = {"scale": np.cos(np.arange(3) + 1.0), "bias": np.sin(np.arange(3) + 2.0)}
STATE_AFTER = {"mean": numbers(TORCH_MEAN, 3), "var": numbers(TORCH_VAR, 3)}


@pytest.mark.parametrize(
    "name, layer, params, state, train",
    [
        (
            "dense",
            dense(2),
            {
                "kernel": np.cos(np.arange(6) + 1.0).reshape(2, 3).T,
                "bias": np.sin(np.arange(2) + 2.0),
            },
            None,
            False,
        ),
        ("layer_norm", layer_norm(), NORM_PARAMS, None, False),
        ("batch_norm train", batch_norm(), NORM_PARAMS, state_of(batch_norm(), X), True),
        ("batch_norm evaluation", batch_norm(), NORM_PARAMS, STATE_AFTER, False),
    ],
    ids=TORCH,
)
def test_outputs_and_gradients_are_those_of_pytorch(name, layer, params, state, train):
    expected = TORCH[name]
    params = jax.tree.map(jnp.float32, params)

    def function(x, params):
        if state is None:
            return layer.apply(params, x)
        return layer.apply(params, x, state=state, train=train)[0]

    @jax.jit
    def pulled(x, params, cotangent):
        y, pull = jax.vjp(function, x, params)
        return y, *pull(cotangent[:, : y.shape[1]])

    y, dx, dparams = pulled(X, params, COTANGENT)
    weight = "kernel" if name == "dense" else "scale"
    # PyTorch's Linear has (out, in).
    dweight = numbers(expected["dweight"], *params[weight].T.shape).T
    for actual, reference in [
        (y, numbers(expected["y"], *y.shape)),
        (dx, numbers(expected["dx"], 4, 3)),
        (dparams[weight], dweight),
        (dparams["bias"], numbers(expected["dbias"], *params["bias"].shape)),
    ]:
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=2e-6)


def test_running_statistics_are_those_of_pytorch():
    params = jax.tree.map(jnp.float32, NORM_PARAMS)
    norm = batch_norm()  # PyTorch's momentum=0.1 is 0.9 here
    _, state = norm.apply(params, X, state=state_of(norm, X), train=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), state, STATE_AFTER
    )
    _, same = norm.apply(params, X, state=state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


# --- against formulas -----------------------------------------------------------------------------


def test_dense_is_a_matrix_product_over_the_last_axis_for_any_leading_axes():
    rng = np.random.default_rng(0)
    kernel, bias, x = rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=(2, 4, 5))
    params = jax.tree.map(jnp.float32, {"kernel": kernel, "bias": bias})
    expected = np.einsum("abi,io->abo", x, kernel) + bias
    for lead in [(2, 4), (8,), (1, 2, 2, 2)]:
        y = dense(3).apply(params, jnp.float32(x).reshape(*lead, 5))
        np.testing.assert_allclose(y, expected.reshape(*lead, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        dense(3).apply(params, jnp.float32(x[0, 0])), expected[0, 0], rtol=1e-5, atol=1e-6
    )
    assert dense(3).apply(params, jnp.zeros((0, 5))).shape == (0, 3)
    bare = dense(3, bias=False)
    np.testing.assert_allclose(
        bare.apply({"kernel": params["kernel"]}, jnp.float32(x)), expected - bias, rtol=1e-4
    )


def test_dense_kernels_have_the_variance_of_lecun_and_biases_are_zero():
    n_in, n_out = 50, 200
    params = dense(n_out).init(jax.random.key(0), jnp.ones((1, n_in)))
    n = n_in * n_out
    # Its standard error is at most that of a normal sample, v sqrt(2 / n).
    sample = np.var(params["kernel"])
    np.testing.assert_allclose(sample, 1 / n_in, atol=4 / n_in * np.sqrt(2 / n))
    assert not params["bias"].any()


def test_initializers_and_precision_are_used():
    constant = jax.nn.initializers.constant
    layer = dense(2, kernel_init=constant(2.0), bias_init=constant(3.0), precision="highest")
    params = layer.init(jax.random.key(0), jnp.ones((1, 4)))
    np.testing.assert_array_equal(layer.apply(params, jnp.ones((1, 4))), [[11, 11]])  # 4 * 2 + 3
    assert "HIGHEST" in str(jax.make_jaxpr(layer.apply)(params, jnp.ones((1, 4))))
    normal = jax.nn.initializers.normal()
    drawn = dense(4, kernel_init=normal, bias_init=normal).init(jax.random.key(0), jnp.ones((1, 1)))
    assert np.all(drawn["kernel"][0] != drawn["bias"])  # from keys of their own
    table = embed(2, 3, embedding_init=constant(5.0)).init(jax.random.key(0), jnp.array([0]))[
        "embedding"
    ]
    np.testing.assert_array_equal(table, np.full((2, 3), 5))


def layer_norm_formula(x, eps):
    x = np.asarray(x, np.float64)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_is_its_formula(eps):
    x = np.random.default_rng(0).normal(3, 0.1, size=(2, 3, 7)).astype(np.float32)
    norm = layer_norm(eps=eps)
    y = jax.jit(norm.apply)(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(y, layer_norm_formula(x, eps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_batch_norm_takes_statistics_over_all_axes_but_the_last(momentum):
    x = np.random.default_rng(0).normal(3, 2, size=(4, 3, 2, 5)).astype(np.float32)
    norm = batch_norm(momentum=momentum, scale=False, bias=False)
    start = {"mean": jnp.full(5, 7.0), "var": jnp.full(5, 9.0)}
    apply = jax.jit(norm.apply, static_argnames="train")
    y, state = apply({}, x, state=start, train=True)
    wide, axes = x.astype(np.float64), (0, 1, 2)
    expected = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        state["mean"], momentum * 7 + (1 - momentum) * wide.mean(axes), rtol=1e-5
    )
    np.testing.assert_allclose(
        state["var"], momentum * 9 + (1 - momentum) * wide.var(axes, ddof=1), rtol=1e-5
    )
    y, _ = apply({}, x, state=start)
    np.testing.assert_allclose(y, (wide - 7) / np.sqrt(9 + 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["like the others", "an outlier", "zero"])
def test_batch_norm_is_accurate_where_the_mean_is_large_against_the_deviation(first):
    x = np.random.default_rng(0).normal(1e4, 1, size=(1000, 3)).astype(np.float32)
    if first != "like the others":
        # The first row is what variances are computed against.
        x[0] = {"an outlier": 1e4 + 100, "zero": 0}[first]
    norm = batch_norm(momentum=0.0, scale=False, bias=False)
    y, state = jax.jit(lambda x: norm.apply({}, x, state=state_of(norm, x), train=True))(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(state["var"], wide.var(0, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(state["mean"], wide.mean(0), rtol=1e-6)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    # Numbers of 1e4 in float32 are 1e-3 apart.
    np.testing.assert_allclose(y, expected, rtol=5e-4, atol=5e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_half_precision_inputs_are_computed_in_float32(dtype):
    """A mean of 64.1 would be 64.0 in bfloat16, which is 0.04 deviations; the sums of 4096 numbers
    stay finite too.
    """
    x = jnp.linspace(60.1, 68.1, 4096).astype(dtype)
    wide = np.asarray(x, np.float64)
    norm = layer_norm(scale=False, bias=False)
    y = jax.jit(norm.apply)({}, x)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), layer_norm_formula(wide, 1e-5), rtol=2**-8, atol=1e-3
    )
    batch = batch_norm(momentum=0.0, scale=False, bias=False)
    state = state_of(batch, x[:, None])
    _, state = jax.jit(functools.partial(batch.apply, train=True))({}, x[:, None], state=state)
    np.testing.assert_allclose(state["mean"], [wide.mean()], rtol=1e-5)
    np.testing.assert_allclose(state["var"], [wide.var(ddof=1)], rtol=1e-4)


def test_a_constant_feature_gives_finite_numbers_and_gradients():
    x = jnp.ones((8, 2))
    norm = batch_norm(scale=False, bias=False)
    for function in [
        lambda x: norm.apply({}, x, state=state_of(norm, x), train=True)[0],
        lambda x: layer_norm(scale=False, bias=False).apply({}, x),
    ]:
        np.testing.assert_array_equal(jax.jit(function)(x), np.zeros((8, 2)))
        assert np.isfinite(jax.jit(jax.grad(lambda x: function(x)[0].sum()))(x)).all()  # noqa: B023


def test_no_gradient_flows_through_the_running_statistics():
    norm = batch_norm(scale=False, bias=False)
    x = jnp.arange(6.0).reshape(3, 2)
    grad = jax.grad(
        lambda x: sum(
            s.sum() for s in norm.apply({}, x, state=state_of(norm, x), train=True)[1].values()
        )
    )
    np.testing.assert_array_equal(jax.jit(grad)(x), np.zeros((3, 2)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    n = 20_000
    y = np.asarray(dropout(rate).apply({}, jnp.ones(n), key=jax.random.key(0), train=True))
    kept = y != 0
    error = np.sqrt(rate * (1 - rate) / n)  # the standard error of a share
    assert abs(kept.mean() - (1 - rate)) < 4 * error
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < 4 * error / (1 - rate)
    neighbours = (
        kept[:-1] & kept[1:]
    ).mean()  # independent: the share of pairs is the square, its error at most double
    assert abs(neighbours - (1 - rate) ** 2) < 8 * error


def test_dropout_in_evaluation_and_at_rate_zero_is_the_identity():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(dropout(0.5).apply({}, x), x)
    np.testing.assert_array_equal(dropout(0.5).apply({}, x, key=jax.random.key(0)), x)
    np.testing.assert_array_equal(dropout(0).apply({}, x, train=True), x)


def test_dropout_stops_nan_and_infinity_where_it_drops():
    y = dropout(0.5).apply({}, jnp.full(100, jnp.inf), key=jax.random.key(0), train=True)
    assert set(np.unique(y)) == {0, np.inf}


def test_embed_looks_up_rows_and_marks_what_is_outside():
    params = {"embedding": jnp.arange(6.0).reshape(3, 2)}
    ids = jnp.array([[0, 2], [1, 1]])
    table = np.arange(6.0).reshape(3, 2)
    for dtype in ["int32", "uint8", "int8"]:
        np.testing.assert_array_equal(
            embed(3, 2).apply(params, ids.astype(dtype)), table[np.asarray(ids)]
        )
    assert np.isnan(embed(3, 2).apply(params, jnp.array([3, -1, 300]))).all()
    grad = jax.grad(lambda p: embed(3, 2).apply(p, ids).sum())(params)["embedding"]
    # How often each row was looked up.
    np.testing.assert_array_equal(grad, [[1, 1], [2, 2], [1, 1]])


def test_embeddings_have_unit_length_on_average_and_the_dtype_that_is_asked():
    table = embed(500, 40).init(jax.random.key(0), jnp.array([0]))["embedding"]
    n = table.size
    # Deviation 1 / sqrt(features).
    np.testing.assert_allclose(np.var(table), 1 / 40, atol=4 / 40 * np.sqrt(2 / n))
    half = embed(4, 4, dtype=jnp.bfloat16)
    params = half.init(jax.random.key(0), jnp.array([0]))
    assert half.apply(params, jnp.array([0])).dtype == params["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "rank, shape", [(1, (2, 3, 4, 5)), (2, (2, 3, 20)), (3, (2, 60)), (4, (120,))]
)
def test_flatten_merges_the_last_axes_in_order(rank, shape):
    x = np.arange(120).reshape(2, 3, 4, 5)
    y = flatten(rank).apply({}, x)
    assert y.shape == shape
    np.testing.assert_array_equal(y.ravel(), x.ravel())


# --- errors ---------------------------------------------------------------------------------------

X23 = jnp.ones((2, 3))
IDS = jnp.array([0, 1])
REMEDY = r"x\.astype\(jnp\."


WRONG = [
    (
        dense(4),
        X23,
        jnp.ones((2, 5)),
        ValueError,
        r"dense\(4\): last axis must be 3, got float32\[2, 5\]",
    ),
    (dense(4), X23, jnp.float32(1), ValueError, r"dense\(4\): .*at least 1 axes, got float32\[\]"),
    (
        dense(4),
        X23,
        jnp.ones((2, 3), int),
        TypeError,
        rf"dense\(4\): .*floating, got int32\[2, 3\].*{REMEDY}float32",
    ),
    (dense(4), X23, jnp.ones((2, 3), bool), TypeError, r"dense\(4\): .*floating, got bool\[2, 3\]"),
    (
        dense(4),
        X23,
        X23.astype("bfloat16"),
        TypeError,
        r"dense\(4\): .* float32, got bfloat16\[2, 3\].*jaxnet\.cast",
    ),
    (
        dense(4),
        X23,
        [1.0, 2.0, 3.0],
        TypeError,
        r"dense\(4\): the input must be an array.*got \[1\.0, 2\.0, 3\.0\]",
    ),
    (dense(4), X23, "text", TypeError, r"dense\(4\): the input must be an array.*got 'text'"),
    (dense(4), X23, None, TypeError, r"dense\(4\): the input must be an array.*got None"),
    (
        layer_norm(),
        X23,
        jnp.ones((2, 5)),
        ValueError,
        r"layer_norm: last axis must be 3, got float32\[2, 5\]",
    ),
    (
        layer_norm(),
        X23,
        X23.astype("float16"),
        TypeError,
        r"layer_norm: .* float32, got float16\[2, 3\]",
    ),
    (
        layer_norm(),
        X23,
        jnp.ones((2, 3), int),
        TypeError,
        r"layer_norm: .*floating, got int32\[2, 3\]",
    ),
    (
        layer_norm(scale=False),
        X23,
        jnp.ones((2, 5)),
        ValueError,
        r"layer_norm: last axis must be 3",
    ),
    (
        batch_norm(),
        X23,
        jnp.ones((2, 5)),
        ValueError,
        r"batch_norm: last axis must be 3, got float32\[2, 5\]",
    ),
    (
        batch_norm(bias=False),
        X23,
        X23.astype("float16"),
        TypeError,
        r"batch_norm: .* float32, got float16\[2, 3\]",
    ),
    (batch_norm(), X23, None, TypeError, r"batch_norm: the input must be an array"),
    (
        dropout(0.5),
        X23,
        jnp.ones((2, 3), int),
        TypeError,
        r"dropout\(0\.5\): .*floating, got int32\[2, 3\]",
    ),
    (
        embed(5, 4),
        IDS,
        jnp.ones(2),
        TypeError,
        rf"embed\(5, 4\): .*integer, got float32\[2\].*{REMEDY}int32",
    ),
    (embed(5, 4), IDS, 3, TypeError, r"embed\(5, 4\): the input must be an array.*got 3"),
    (
        flatten(2),
        X23,
        jnp.ones(3),
        ValueError,
        r"flatten\(2\): .*at least 2 axes, got float32\[3\]",
    ),
    (flatten(2), X23, 3.0, TypeError, r"flatten\(2\): the input must be an array.*got 3\.0"),
]


@pytest.mark.parametrize(
    "layer, good, bad, kind, message",
    WRONG,
    ids=[f"{layer!r}: {describe(bad)}" for layer, _, bad, *_ in WRONG],
)
def test_a_wrong_input_is_named_with_the_layer_the_expected_and_the_received(
    layer, good, bad, kind, message
):
    net = chain(outer=chain(inner=layer))
    params = net.init(jax.random.key(0), good)
    state = {"state": state_of(net, good)} if net.init_state else {}
    with pytest.raises(kind, match=message) as error:
        net.apply(params, bad, **state)
    assert error.value.__notes__[0] == "in layer 'outer/inner'"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dense(0), "dense: features must be a positive int, got 0"),
        (lambda: dense(2.0), "dense: features must be a positive int, got 2.0"),  # pyright: ignore[reportArgumentType]
        (lambda: embed(0, 3), "embed: num_embeddings must be a positive int, got 0"),
        (lambda: embed(3, -1), "embed: features must be a positive int, got -1"),
        (lambda: flatten(0), "flatten: rank must be a positive int, got 0"),
        (lambda: dropout(1.0), r"dropout: rate is the probability to drop, in \[0, 1\), got 1.0"),
        (lambda: dropout(-0.1), r"dropout: rate is the probability to drop, in \[0, 1\), got -0.1"),
        (lambda: batch_norm(momentum=1.0), r"batch_norm: momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_wrong_argument_fails_when_the_layer_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_norm_cannot_train_on_one_value_a_feature():
    norm = batch_norm(scale=False, bias=False)
    with pytest.raises(
        ValueError,
        match=r"batch_norm: training needs more than one value per feature, got float32\[1, 3\]",
    ):
        norm.apply({}, jnp.ones((1, 3)), state=state_of(norm, X23), train=True)


@pytest.mark.parametrize(
    "layer", [dense(2), layer_norm(), batch_norm(), dropout(0.5), flatten(1)], ids=repr
)
def test_numpy_arrays_are_inputs_too_and_float64_is_what_jit_makes_of_it(layer):
    x = np.ones((4, 3))
    assert x.dtype == np.float64
    params = layer.init(jax.random.key(0), x)
    arguments = {"key": jax.random.key(1), "train": True}
    if layer.init_state:
        arguments["state"] = state_of(layer, x)
    outputs = layer.apply(params, x, **arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, outputs))} == {np.dtype("float32")}
