"""Gradients in narrow dtypes: sums over many examples, and the error of whole networks beside
PyTorch's autocast.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import (
    CASES,
    as_stated,
    close,
    floats,
    ints,
    numbers,
    quick_to_compile,  # noqa: F401 (a fixture)
    state_of,
    weights,
)

from jaxnet import capture, cast, chain, remat, repeat, tree
from jaxnet.core import call, param, wire
from jaxnet.layers import batch_norm, conv, dense, embed, flatten, layer_norm, max_pool
from jaxnet.mixed import add_bias, affine, rows

NARROW = ["bfloat16", "float16"]
each_narrow = pytest.mark.parametrize("dtype", NARROW)


def grads(net, params, inputs, cotangent=1.0, train=False):
    """Gradients of the sum of all outputs, with all cotangents equal."""
    state = state_of(net, *inputs) if net.init_state else None

    def loss(params):
        outputs, _ = call(net, params, *inputs, state=state, train=train)
        return sum(jnp.sum(y.astype(jnp.float32) * cotangent) for y in jax.tree.leaves(outputs))

    return jax.jit(jax.grad(loss))(params)


# --- sums over many examples ----------------------------------------------------------------------

# 64 x 28 x 28; half precision knows the integers up to 256 (bfloat16) and 2,048 (float16) only.
MANY = 50_176
# A layer, its input, and the parameters whose gradient is the number of examples, by definition.
SHARED = {
    "dense": (dense(3), jnp.ones((MANY, 4)), ["bias"]),
    "dense: sequences": (dense(3), jnp.ones((MANY // 28, 28, 4)), ["bias"]),
    "conv": (conv(4, 3), jnp.ones((64, 28, 28, 4)), ["bias"]),
    "conv: sequence": (conv(4, (3,), padding="VALID"), jnp.ones((MANY // 28, 30, 4)), ["bias"]),
    "conv: depthwise": (conv(4, 3, groups=4), jnp.ones((64, 28, 28, 4)), ["bias"]),
    "layer_norm": (layer_norm(), jnp.tile(jnp.array([-1.0, 1]), (MANY, 1)), ["bias"]),
    # Its first state is mean 0 and var 1.
    "batch_norm": (batch_norm(), jnp.ones((64, 28, 28, 4)), ["bias", "scale"]),
    "embed": (embed(3, 2), jnp.zeros(MANY, int), ["embedding"]),
    "embed: images": (embed(3, 2), jnp.zeros((64, 28, 28), int), ["embedding"]),
}


@each_narrow
@pytest.mark.parametrize("net, x, shared", SHARED.values(), ids=SHARED.keys())
def test_a_gradient_counts_all_examples(net, x, shared, dtype):
    params = net.init(jax.random.key(0), x)
    got = grads(cast(net, dtype), params, (x,))
    for name in shared:
        row = got[name].reshape(-1, got[name].shape[-1])[0]
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(row, np.full(row.shape, MANY), rtol=1e-4)


@each_narrow
def test_a_gradient_counts_all_examples_inside_combinators(dtype):
    net, x = (
        cast(chain(blocks=repeat(remat(chain(mix=dense(4), norm=layer_norm())), 2)), dtype),
        jnp.ones((MANY, 4)),
    )
    params = weights(net, x)
    for apply in (net.apply, lambda p, x: capture(net)(p, x)[0]):
        got = jax.jit(jax.grad(lambda p, apply=apply: jnp.sum(apply(p, x))))(params)["blocks"]
        # Of the last block.
        np.testing.assert_allclose(got["norm"]["bias"][1], np.full(4, MANY), rtol=1e-4)


@each_narrow
def test_parameters_that_are_narrow_themselves_have_sums_that_are_rounded_once(dtype):
    """Without `cast`: 50,176 is a float16, and in bfloat16 numbers of this size are 256 apart."""
    x, ids = jnp.ones((MANY, 4), dtype), jnp.zeros(MANY, int)
    for net, inputs, name in [
        (dense(3), x, "bias"),
        (conv(3, (1,)), x[:, None], "bias"),
        (embed(3, 2, dtype=dtype), ids, "embedding"),
    ]:
        got = grads(net, net.init(jax.random.key(0), inputs), (inputs,))[name].reshape(-1)[0]
        assert got.dtype == dtype and float(got) == MANY


def test_above_the_range_of_float16_only_products_overflow():
    """65,504 is its largest number. Gradients of kernels are float16 numbers, as in PyTorch; those
    of biases are not.
    """
    n = 100_000
    got = grads(
        cast(dense(3), "float16"),
        dense(3).init(jax.random.key(0), floats(n, 4)),
        (jnp.ones((n, 4)),),
    )
    np.testing.assert_allclose(got["bias"], np.full(3, n), rtol=1e-4)
    assert np.isinf(got["kernel"]).all()
    got = grads(
        cast(embed(3, 2), "float16"),
        embed(3, 2).init(jax.random.key(0), ints(n)),
        (jnp.zeros(n, int),),
    )
    np.testing.assert_allclose(got["embedding"][0], [n, n], rtol=1e-4)


@pytest.mark.sample(8)
# In float16, what is made of other layers has nothing new.
@pytest.mark.parametrize(
    "case, train, dtype",
    [
        pytest.param(case, train, dtype, id=f"{name}-{train}-{dtype}", marks=marks)
        for name, case in CASES.items()
        # Training draws other numbers for each copy, or it is evaluation.
        for train in ([False, True] if case.net.init_state and not case.net.random else [False])
        for dtype in NARROW
        for marks in [[pytest.mark.slow] if case.net.children and dtype == "float16" else []]
    ],
)
def test_copies_of_a_batch_multiply_every_gradient(case, train, dtype):
    """The gradient over n copies of a batch is n times that of one, for each leaf of each layer:
    only sums could differ.
    """
    net, (params, _), inputs = cast(case.net, dtype), case.start(), case.data()
    copies = 50_000 // inputs[0].shape[0]
    many = tuple(jnp.tile(x, (copies, *[1] * (x.ndim - 1))) for x in inputs)
    one, all_ = grads(net, params, inputs, 0.05, train), grads(net, params, many, 0.05, train)
    for path, leaf in tree.flatten(one).items():
        leaf, got = np.asarray(leaf, np.float64), np.asarray(tree.get(all_, path), np.float64)
        # Inside a network, the cotangents themselves are rounded, and not in the same way in two
        # programs.
        share = 0.04 if case.net.children else 0.01
        bound = share * np.abs(leaf).max() + 1e-3
        np.testing.assert_allclose(got / copies, leaf, rtol=0, atol=bound, err_msg=path)


@each_narrow
def test_bodies_that_share_an_array_have_the_same_sums(dtype):
    """`add_bias` and `rows` are for the bodies of `wire`; a plain `+` or `[]` sums in the narrow
    dtype.
    """

    @wire(
        table=param((3, 4), jax.nn.initializers.ones), shift=param((4,), jax.nn.initializers.zeros)
    )
    def body(f, ids):
        return add_bias(rows(f.table(), ids), f.shift())

    net = cast(body, dtype)
    got = grads(net, net.init(jax.random.key(0), ints(MANY)), (jnp.zeros(MANY, int),))
    # Rounded once to the narrow dtype.
    np.testing.assert_allclose(got["table"][0], np.full(4, MANY), rtol=4e-3)
    np.testing.assert_allclose(got["shift"], np.full(4, MANY), rtol=4e-3)


# --- what must not change -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_programs_have_no_conversions(dtype):
    with jax.enable_x64(dtype == "float64"):
        for net, spec in [
            (dense(3), floats(4, 4)),
            (conv(3, 2), floats(2, 4, 4, 2)),
            (layer_norm(), floats(4, 4)),
            (embed(4, 4), ints(3)),
        ]:
            spec = (
                spec if net.label.startswith("embed") else jax.ShapeDtypeStruct(spec.shape, dtype)
            )
            params = weights(net, spec)
            grad = jax.grad(lambda p, x, net=net: jnp.sum(net.apply(p, x)))
            program = str(jax.make_jaxpr(grad)(params, numbers(spec)))
            assert "custom_jvp" not in program
            # Whose ids are compared with bounds of another type.
            if not net.label.startswith("embed"):
                assert "convert_element_type" not in program


@pytest.mark.parametrize("dtype, roundings", [("float16", 1), ("bfloat16", 2)])
def test_narrow_results_are_those_of_float32_rounded_once(dtype, roundings):
    """In bfloat16 twice where XLA does not merge the product and the sum, as outside of `jit`."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in [(64, 32), (32, 16)])
    bias = jnp.asarray(rng.normal(size=16), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(
        bias, np.float64
    )
    y = np.asarray(affine(x, kernel, bias), np.float64)
    assert affine(x, kernel, bias).dtype == dtype
    half_a_step = float(jnp.finfo(dtype).eps) / 2
    product = np.abs(exact - np.asarray(bias, np.float64)) * (roundings - 1)
    assert (np.abs(y - exact) <= half_a_step * (np.abs(exact) + product) * 1.01 + 1e-5).all()


@each_narrow
def test_all_transformations_of_jax_agree(dtype):
    """Forward and reverse mode, second derivatives, per-example gradients, remat with policies,
    export, capture.

    They are compared in programs that round alike. The gradient of an ordinary program is compared
    with that of the network in float32.
    """
    net = cast(chain(dense(8), jnp.tanh, norm=layer_norm(), out=dense(3)), dtype)
    x = numbers(floats(6, 4))
    params, direction = weights(net, x), weights(net, x, seed=1)
    tolerance = 0.1 if dtype == "bfloat16" else 0.02

    def agree(actual, expected):
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    def loss(params, net=net):
        return jnp.sum(jnp.sin(net.apply(params, x)))

    def along(tree_):
        return sum(map(jnp.vdot, jax.tree.leaves(tree_), jax.tree.leaves(direction)))

    grad = as_stated(jax.grad(loss))(params)
    agree(as_stated(lambda p: jax.jvp(loss, (p,), (direction,))[1])(params), along(grad))
    forward_over_reverse = as_stated(lambda p: jax.jvp(jax.grad(loss), (p,), (direction,))[1])(
        params
    )
    agree(as_stated(jax.grad(lambda p: along(jax.grad(loss)(p))))(params), forward_over_reverse)
    of_one = jax.grad(lambda p, x: jnp.sum(jnp.sin(net.apply(p, x))))
    each = as_stated(jax.vmap(of_one, (None, 0)))(params, x)
    agree(jax.tree.map(lambda g: g.sum(0), each), grad)
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        agree(
            as_stated(jax.grad(lambda p, policy=policy: loss(p, remat(net, policy=policy))))(
                params
            ),
            grad,
        )
    exported = jax.export.export(jax.jit(jax.grad(loss)))(params)
    agree(as_stated(exported.call)(params), grad)
    close(capture(net)(params, x)[0], net.apply(params, x), rtol=0, atol=0)
    in_float32 = jax.grad(lambda p: loss(p, net.children[""]))
    agree(jax.jit(jax.grad(loss))(params), jax.jit(in_float32)(params))


def test_biases_and_scales_are_not_rounded_and_everything_else_is():
    seen = {}

    def note(name):
        def fn(x):
            seen[name] = x.dtype
            return x

        return fn

    net = cast(chain(a=note("a"), norm=layer_norm(), b=note("b"), out=dense(2)), "bfloat16")
    x = jnp.array([[-1.0, 1.0]])
    fine = 1 + 2.0**-12  # no bfloat16
    params = {
        "norm": {"scale": jnp.full(2, fine), "bias": jnp.zeros(2)},
        "out": {"kernel": jnp.zeros((2, 2)), "bias": jnp.full(2, fine)},
    }
    y = net.apply(params, x)
    assert set(seen.values()) == {jnp.dtype("bfloat16")} and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.ones((1, 2)))  # what a layer returns is rounded to bfloat16
    grad = jax.grad(lambda p: jnp.sum(net.apply(p, x)) * fine)(params)
    assert {g.dtype for g in jax.tree.leaves(grad)} == {jnp.dtype("float32")}
    # Without cast, a mixture is refused.
    with pytest.raises(TypeError, match="layer_norm: .* float32, got bfloat16"):
        layer_norm().apply(params["norm"], x.astype("bfloat16"))


# --- whole networks beside PyTorch's autocast -----------------------------------------------------

HEADS, WIDTH, TIME, WORDS = 4, 32, 16, 23


@wire(norm=layer_norm(), qkv=dense(3 * WIDTH), out=dense(WIDTH))
def attend(f, x):
    q, k, v = jnp.split(f.qkv(f.norm(x)).reshape(*x.shape[:-1], HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k) / (WIDTH / HEADS) ** 0.5
    mixed = jnp.einsum("...nqk,...knh->...qnh", jax.nn.softmax(scores), v)
    return f.out(mixed.reshape(x.shape))


@wire(norm=layer_norm(), up=dense(4 * WIDTH), down=dense(WIDTH))
def think(f, x):
    return f.down(jax.nn.gelu(f.up(f.norm(x))))


@wire(
    words=embed(WORDS, WIDTH),
    places=embed(TIME, WIDTH),
    attend=attend,
    think=think,
    norm=layer_norm(),
    head=dense(WORDS),
)
def gpt(f, ids):
    x = f.words(ids) + f.places(jnp.broadcast_to(jnp.arange(TIME), ids.shape))
    x = x + f.attend(x)
    x = x + f.think(x)
    return f.head(f.norm(x))


mlp = chain(a=dense(64), r=jax.nn.relu, b=dense(32), s=jax.nn.relu, head=dense(10))
convnet = chain(
    a=conv(8, 3),
    q=jax.nn.relu,
    p=max_pool(2),
    n=batch_norm(),
    b=conv(16, 3),
    r=jax.nn.relu,
    f=flatten(),
    head=dense(10),
)
NETWORKS = {
    "mlp": (mlp, floats(256, 50), 10),
    "convnet": (convnet, floats(128, 12, 12, 1), 10),
    "gpt": (gpt, ints(128, TIME), WORDS),
}


def of_torch(torch, name, p, x):
    """The logits of the same network in PyTorch."""
    f = torch.nn.functional

    def affine(p, x):
        return f.linear(x, p["kernel"].t(), p["bias"])

    def norm(p, x):
        return f.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)

    if name == "mlp":
        return affine(p["head"], f.relu(affine(p["b"], f.relu(affine(p["a"], x)))))
    if name == "convnet":
        x = f.conv2d(
            x.permute(0, 3, 1, 2), p["a"]["kernel"].permute(3, 2, 0, 1), p["a"]["bias"], padding=1
        )
        x = f.batch_norm(
            f.max_pool2d(f.relu(x), 2), None, None, p["n"]["scale"], p["n"]["bias"], True
        )
        x = f.relu(f.conv2d(x, p["b"]["kernel"].permute(3, 2, 0, 1), p["b"]["bias"], padding=1))
        return affine(p["head"], x.permute(0, 2, 3, 1).flatten(1))
    x = f.embedding(x, p["words"]["embedding"]) + f.embedding(
        torch.arange(TIME).expand(x.shape), p["places"]["embedding"]
    )
    a, t = p["attend"], p["think"]
    q, k, v = affine(a["qkv"], norm(a["norm"], x)).reshape(*x.shape[:-1], HEADS, -1).chunk(3, -1)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / (WIDTH / HEADS) ** 0.5
    mixed = torch.einsum("bnqk,bknh->bqnh", torch.softmax(scores, -1), v).reshape(x.shape)
    x = x + affine(a["out"], mixed)
    x = x + affine(t["down"], f.gelu(affine(t["up"], norm(t["norm"], x)), approximate="tanh"))
    return affine(p["head"], norm(p["norm"], x))


@pytest.mark.sample(3)
@each_narrow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_of_every_leaf_is_at_most_half_more_than_that_of_pytorchs_autocast(name, dtype):
    """Relative rms error of the gradient of the mean cross entropy, times 256 as a loss scale,
    against float32.
    """
    torch = pytest.importorskip("torch")
    net, spec, classes = NETWORKS[name]
    rng = np.random.default_rng(0)
    whole = jnp.issubdtype(spec.dtype, jnp.integer)
    x = rng.integers(0, classes, spec.shape) if whole else np.float32(rng.normal(size=spec.shape))
    labels = rng.integers(0, classes, (*spec.shape, 1) if whole else (spec.shape[0], 1))
    noise = weights(net, x, seed=1)
    params = jax.tree.map(lambda p, n: p + 0.02 * n, net.init(jax.random.key(0), x), noise)

    def ours(net):
        def loss(params):
            state = state_of(net, x) if net.init_state else None
            logits, _ = call(net, params, jnp.asarray(x), state=state, train=True)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels, -1)
            return -256 * chosen.mean()

        return jax.jit(jax.grad(loss))(params)

    def theirs(kind):
        leaves = jax.tree.map(lambda p: torch.tensor(np.asarray(p)).requires_grad_(), params)
        with torch.autocast("cpu", dtype=kind) if kind else contextlib.nullcontext():
            logits = of_torch(torch, name, leaves, torch.tensor(x))
        loss = torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, classes), torch.tensor(labels.ravel())
        )
        (256 * loss).backward()
        return jax.tree.map(lambda p: p.grad.numpy(), leaves)

    def errors(grad):
        def error(g, e):
            return float(
                np.linalg.norm(np.float64(g) - np.float64(e)) / np.linalg.norm(np.float64(e))
            )

        return tree.flatten(jax.tree.map(error, grad, exact))

    exact = ours(net)
    assert max(errors(theirs(None)).values()) < 1e-4  # it is the same network
    own, reference = errors(ours(cast(net, dtype))), errors(theirs(getattr(torch, dtype)))
    too_large = {
        path: (own[path], reference[path]) for path in own if own[path] > 1.5 * reference[path]
    }
    assert not too_large, too_large
