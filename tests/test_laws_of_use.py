"""The laws of how networks are used, for every public layer and combinator: meshes, export, NumPy's
arrays and sizes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from registry import CASES, Case, close, floats, ints, numbers, quick_to_compile, state_of  # noqa: F401 (a fixture)

from jaxnet import cast, chain, tree
from jaxnet.core import call, describe, layer, param
from jaxnet.layers import (
    alibi,
    alpha_dropout,
    avg_pool,
    batch_norm,
    conv,
    dense,
    drop_path,
    dropout,
    embed,
    flatten,
    fourier_features,
    gated_mlp,
    gaussian_dropout,
    gaussian_noise,
    global_avg_pool,
    global_max_pool,
    group_norm,
    instance_norm,
    layer_norm,
    learned_positions,
    local_response_norm,
    masked_softmax,
    max_pool,
    mlp,
    moe,
    multi_head_attention,
    relative_bias,
    rms_norm,
    rotary,
    sink_softmax,
    sinusoidal,
    spatial_dropout,
    squeeze_excite,
    vector_quantize,
    window,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Training has all that evaluation has. By default, it runs in float32.
each_use = pytest.mark.parametrize(
    "case, train, dtype",
    [
        pytest.param(
            case, train, dtype, id=f"{name}-{'train' if train else 'evaluate'}-{dtype}", marks=marks
        )
        for name, case in CASES.items()
        for train, dtype in [
            (False, "float32"),
            (True, "float32"),
            (True, "bfloat16"),
            (True, "float64"),
        ]
        if train in case.modes
        for marks in [[pytest.mark.slow] if (train, dtype) != (max(case.modes), "float32") else []]
    ],
)


def larger(case: Case, dtype, times: int):
    """Inputs whose batch is that of the case, several times; each copy has other numbers."""
    specs = case.specs(dtype)
    return numbers(
        tuple(jax.ShapeDtypeStruct((times * x.shape[0], *x.shape[1:]), x.dtype) for x in specs),
        seed=7,
    )


def used(case: Case, train: bool):
    """Everything that a training step asks of a network: gradients of parameters and of float
    inputs, outputs, state.
    """

    def use(params, state, inputs):
        key = jax.random.key(1) if train else None
        moving = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def loss(params, floating):
            filled = list(inputs)
            for i, x in zip(moving, floating, strict=True):
                filled[i] = x
            outputs, new_state = call(case.net, params, *filled, state=state, key=key, train=train)
            wide = (
                y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in jax.tree.leaves(outputs)
            )
            return sum(jnp.sum(jnp.sin(y)) for y in wide), (outputs, new_state)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, [inputs[i] for i in moving])

    return jax.jit(use)


def agree(actual, expected, dtype):
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(jnp.shape, expected)
    assert describe(actual) == describe(expected)
    # Sums over a mesh are taken in another order.
    tolerance = {"float64": 1e-9, "float32": 1e-4}.get(dtype, 0.1)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(expected).items()}
    sizes = {path: np.abs(leaf).max(initial=0) for path, leaf in leaves.items()}
    # The gradient of a bias before a normalization is zero: its terms cancel, and their rounding
    # errors are left. Such an error is at most a few units in the last place of the terms, which
    # are no larger than the largest gradient here.
    rounding = (
        4 * np.finfo("float64" if dtype == "float64" else "float32").eps * max(sizes.values())
    )
    for path, leaf in leaves.items():
        bound = max(tolerance * max(sizes[path], 1e-2), rounding)
        np.testing.assert_allclose(
            np.asarray(tree.get(actual, path), np.float64), leaf, rtol=0, atol=bound, err_msg=path
        )


def exact(case: Case, dtype: str) -> str:
    """The dtype whose tolerance holds for what the case computes in."""
    return "bfloat16" if "differences" in case.exempt else dtype


# --- inputs sharded over the batch on a mesh as JAX makes it by default ---------------------------


@pytest.mark.cpu_only("it wants four devices")
@each_use
def test_inputs_may_be_sharded_over_the_batch(case, train, dtype):
    with jax.enable_x64(dtype == "float64"):
        (params, state), inputs = case.start(dtype), larger(case, dtype, 4)
        use = used(case, train)
        expected = use(params, state, inputs)
        mesh = jax.make_mesh((4,), ("batch",))
        assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("batch")))
            params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
            agree(use(params, state, sharded), expected, exact(case, dtype))


@pytest.mark.cpu_only("it wants four devices")
def test_an_embedding_is_sharded_as_ids_and_table_are():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    params, ids = {"embedding": jnp.arange(24.0).reshape(6, 4)}, jnp.array([[0, 5], [3, 7]])
    expected = embed(6, 4).apply(params, ids)
    with jax.set_mesh(mesh):
        table = jax.device_put(
            params["embedding"], NamedSharding(mesh, PartitionSpec(None, "model"))
        )
        split = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
        for function in (embed(6, 4).apply, jax.jit(embed(6, 4).apply)):
            y = function({"embedding": table}, split)
            np.testing.assert_array_equal(y, expected)
            assert y.sharding.spec == PartitionSpec("data", None, "model")


# --- jax.export with a symbolic batch -------------------------------------------------------------


@each_use
def test_a_batch_may_be_symbolic_in_an_export(case, train, dtype):
    with jax.enable_x64(dtype == "float64"):
        (params, state), use = case.start(dtype), used(case, train)
        (batch,) = jax.export.symbolic_shape("batch")
        spec = tuple(
            jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in case.specs(dtype)
        )
        exported = jax.export.export(use)(
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state)), spec
        )
        inputs = larger(case, dtype, 3)
        agree(exported.call(params, state, inputs), use(params, state, inputs), exact(case, dtype))


# --- NumPy's arrays and integers ------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("train", [False, True])
def test_parameters_and_state_may_be_numpy_arrays(case, train):
    """As `load` gives them."""
    if train and case.net.init_state is None and not case.net.random:
        pytest.skip("training and evaluation are the same program")
    params, state = case.start()
    given = jax.tree.map(np.asarray, (params, state))

    def use(params, state, inputs):
        key = jax.random.key(1) if train else None
        return call(case.net, params, *inputs, state=state, key=key, train=train)

    for inputs in (case.data(), jax.tree.map(np.asarray, case.data())):
        expected = use(params, state, inputs)
        for function in (use, jax.jit(use)):
            actual = function(*given, inputs)  # pyright: ignore[reportCallIssue]
            tolerance = 2e-2 if "differences" in case.exempt else 1e-5
            close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
            close(actual[1], expected[1], rtol=tolerance, atol=tolerance)


def normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


# By what is made: how, from sizes of any type, and for which input. All sizes of all constructors
# are here.
SIZED = {
    "dense": (lambda i: dense(i(3)), floats(2, 4)),
    "conv": (
        lambda i: conv(i(4), i(3), strides=i(2), padding=i(1), dilation=i(1), groups=i(2)),
        floats(2, 9, 9, 4),
    ),
    "conv: by axis": (
        lambda i: conv(
            i(4),
            (i(3), i(2)),
            strides=(i(2), i(1)),
            padding=((i(1), i(0)), (i(0), i(1))),
            dilation=[i(1), i(2)],
        ),
        floats(2, 9, 9, 4),
    ),
    "max_pool": (lambda i: max_pool(i(3), strides=i(2), padding=i(1)), floats(2, 9, 9, 4)),
    "avg_pool": (
        lambda i: avg_pool((i(3),), strides=(i(1),), padding=[(i(1), i(0))]),
        floats(2, 9, 4),
    ),
    "global_max_pool": (lambda i: global_max_pool(i(1)), floats(2, 9, 4)),
    "global_avg_pool": (lambda i: global_avg_pool(i(2)), floats(2, 9, 9, 4)),
    "embed": (lambda i: embed(i(5), i(3)), ints(2, 4)),
    "flatten": (lambda i: flatten(i(2)), floats(2, 3, 4)),
    "multi_head_attention": (
        lambda i: multi_head_attention(i(4), i(2), groups=i(1), size=i(2), mask=window(i(1))),
        floats(2, 3, 4),
    ),
    "rotary": (lambda i: rotary(size=i(2)), floats(2, 3, 2, 4)),
    "learned_positions": (lambda i: learned_positions(i(3)), floats(2, 3, 4)),
    "mlp": (lambda i: mlp(i(3), i(2)), floats(2, 4)),
    "gated_mlp": (lambda i: gated_mlp(i(3), i(2)), floats(2, 4)),
    "squeeze_excite": (lambda i: squeeze_excite(i(4), i(2)), floats(2, 3, 3, 4)),
    "moe": (lambda i: moe(i(3), i(2), i(4), i(2)), floats(2, 3, 4)),
    "layer_norm": (lambda i: layer_norm(rank=i(2)), floats(2, 3, 4)),
    "group_norm": (lambda i: group_norm(i(2), rank=i(0)), floats(2, 4)),
    "instance_norm": (lambda i: instance_norm(rank=i(1)), floats(2, 3, 4)),
    "local_response_norm": (lambda i: local_response_norm(i(3)), floats(2, 4)),
    "spatial_dropout": (lambda i: spatial_dropout(0.5, rank=i(1)), floats(2, 3, 4)),
    "param": (lambda i: param((i(5), i(0)), normal), None),
}


@pytest.mark.parametrize(
    "kind",
    [np.int64, np.uint8, lambda n: np.array(n), jnp.int32],
    ids=["int64", "uint8", "0-d", "jax"],
)
@pytest.mark.parametrize("make, spec", SIZED.values(), ids=SIZED.keys())
def test_sizes_may_be_integers_of_numpy(make, spec, kind):
    """`labels.max() + 1` is one."""
    made, expected = make(kind), make(int)
    inputs = () if spec is None else (numbers(spec),)
    params = expected.init(jax.random.key(0), *inputs)
    assert repr(made) == repr(expected)
    close(made.init(jax.random.key(0), *inputs), params, rtol=0, atol=0)
    close(made.apply(params, *inputs), expected.apply(params, *inputs), rtol=0, atol=0)
    assert describe(jax.eval_shape(made.init, jax.random.key(0), *inputs)) == describe(params)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 2.0, np.float32(2), "2", None], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        dense,
        lambda n: conv(n, 3),
        lambda n: conv(4, n),
        lambda n: conv(4, (3, n)),
        lambda n: conv(4, 3, strides=n),
        lambda n: conv(4, 3, dilation=(1, n)),
        lambda n: conv(4, 3, padding=((1, n), (1, 1))),
        lambda n: conv(4, 3, groups=n),
        max_pool,
        lambda n: max_pool(3, strides=(n, 1)),
        lambda n: avg_pool(2, padding=((0, 1), (n, 1))),
        global_max_pool,
        global_avg_pool,
        lambda n: embed(n, 3),
        lambda n: embed(3, n),
        flatten,
        lambda n: multi_head_attention(n, 2),
        lambda n: multi_head_attention(4, n),
        lambda n: multi_head_attention(4, 2, groups=n or -1),
        lambda n: alibi(n),
        lambda n: relative_bias(2, buckets=n),
        learned_positions,
        lambda n: mlp(3, n),
        lambda n: gated_mlp(n, 3),
        lambda n: squeeze_excite(n),
        lambda n: moe(3, n, 4, 4),
        lambda n: layer_norm(rank=n),
        lambda n: group_norm(n),
        lambda n: group_norm(2, rank=n),
        lambda n: instance_norm(rank=n),
        local_response_norm,
        lambda n: spatial_dropout(0.5, rank=n),
        vector_quantize,
        fourier_features,
        lambda n: param((2, n), normal),
    ],
)
def test_what_is_no_integer_is_no_size(make, wrong):
    with pytest.raises(
        ValueError, match=r"must be (a positive int|an int of at least 0|'SAME').*, got "
    ):
        make(wrong)


def test_an_array_of_sizes_is_one_for_each_axis():
    sizes: Any = np.array([3, 2])
    pads: Any = np.array([[1, 0], [0, 1]])
    layer, same = (
        conv(4, sizes, strides=sizes, padding=pads),
        conv(4, (3, 2), strides=(3, 2), padding=((1, 0), (0, 1))),
    )
    x = numbers(floats(2, 9, 9, 4))
    params = same.init(jax.random.key(0), x)
    close(layer.apply(params, x), same.apply(params, x), rtol=0, atol=0)
    close(max_pool(sizes).apply({}, x), max_pool((3, 2)).apply({}, x), rtol=0, atol=0)


# --- state under cast -----------------------------------------------------------------------------


def kv_cache(length: int):
    """A stateful layer as users write them: the last `length` inputs, whatever they are computed
    in.
    """

    def init_state(x):
        return {
            "seen": jnp.zeros((*x.shape[:-2], length, x.shape[-1]), x.dtype),
            "at": jnp.zeros((), jnp.int32),
        }

    def fn(params, x, state):
        seen, at = state["seen"], state["at"]
        start = (0,) * (x.ndim - 2) + (at, 0)
        # Into the state in its dtype.
        seen = jax.lax.dynamic_update_slice(seen, x.astype(seen.dtype), start)
        return seen.sum(-2, keepdims=True).astype(x.dtype), {
            "seen": seen,
            "at": at + x.shape[-2],
        }  # and out in that of x

    return layer(None, fn, init_state=init_state, label="kv_cache")


STATEFUL = {name: case for name, case in CASES.items() if case.net.init_state} | {
    "kv_cache": Case(chain(dense(4), kv_cache(6), dense(3)), (floats(2, 1, 4),))
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", STATEFUL.values(), ids=STATEFUL.keys())
def test_cast_takes_the_state_that_init_state_gave_and_keeps_its_dtypes(case, dtype):
    net = cast(case.net, dtype)
    params, start = Case(net, case.inputs).start()
    plain, exact_state = case.start()[0], state_of(case.net, *case.inputs)
    step = jax.jit(
        lambda state, x: net.apply(params, *x, state=state, key=jax.random.key(1), train=True)
    )
    state = start
    for seed in (7, 8, 9):
        x = case.data(seed=seed)
        y, state = step(state, x)
        expected, exact_state = case.net.apply(
            plain, *x, state=exact_state, key=jax.random.key(1), train=True
        )
        assert describe(state) == describe(start)
        assert describe(y) == describe(expected)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    # The numbers are those of float32, but for rounding.
    for path, leaf in tree.flatten(exact_state).items():
        scale = float(np.abs(np.asarray(leaf, np.float64)).max()) or 1.0
        np.testing.assert_allclose(
            tree.get(state, path), leaf, rtol=0, atol=0.05 * scale, err_msg=path
        )


# --- complex numbers ------------------------------------------------------------------------------

COMPUTING = {
    "dense": (dense(3), floats(4, 4)),
    "conv": (conv(3, 2), floats(2, 4, 4, 2)),
    "max_pool": (max_pool(2), floats(2, 4, 4, 2)),
    "avg_pool": (avg_pool(2), floats(2, 4, 4, 2)),
    "global_max_pool": (global_max_pool(), floats(2, 4, 4, 2)),
    "global_avg_pool": (global_avg_pool(), floats(2, 4, 4, 2)),
    "batch_norm": (batch_norm(), floats(4, 4)),
    "layer_norm": (layer_norm(), floats(4, 4)),
    "rms_norm": (rms_norm(), floats(4, 4)),
    "group_norm": (group_norm(2), floats(4, 2, 2, 4)),
    "instance_norm": (instance_norm(), floats(4, 2, 2, 4)),
    "local_response_norm": (local_response_norm(3), floats(4, 4)),
    "dropout": (dropout(0.5), floats(4, 4)),
    "spatial_dropout": (spatial_dropout(0.5, rank=1), floats(4, 4)),
    "alpha_dropout": (alpha_dropout(0.5), floats(4, 4)),
    "gaussian_noise": (gaussian_noise(0.5), floats(4, 4)),
    "gaussian_dropout": (gaussian_dropout(0.5), floats(4, 4)),
    "drop_path": (drop_path(0.5), floats(4, 4)),
    "fourier_features": (fourier_features(3), floats(4, 4)),
    "vector_quantize": (vector_quantize(3), floats(4, 4)),
    "embed": (embed(4, 4), ints(4)),
    "masked_softmax": (masked_softmax(), floats(2, 3, 4)),
    "sink_softmax": (sink_softmax(), floats(2, 3, 4)),
    "rotary": (rotary(), floats(2, 3, 4)),
    "sinusoidal": (sinusoidal(), floats(3, 4)),
    "learned_positions": (learned_positions(3), floats(3, 4)),
}


@pytest.mark.parametrize("net, spec", COMPUTING.values(), ids=COMPUTING.keys())
def test_layers_that_compute_refuse_complex_numbers(net, spec):
    """As inputs and as parameters. `flatten` only moves numbers, of any dtype; combinators leave it
    to what is inside.
    """
    params, x = net.init(jax.random.key(0), spec), numbers(spec)
    state = {"state": state_of(net, spec)} if net.init_state else {}
    for function in (net.apply, jax.jit(net.apply)):
        with pytest.raises(
            TypeError,
            match=r"(the input must be (floating|real|integer)|dtype of the parameters).*complex64",
        ):
            function(params, x.astype(jnp.complex64), **state)
        for path in params:
            wrong = {**params, path: params[path].astype(jnp.complex64)}
            with pytest.raises(
                TypeError, match=rf"the parameter '{path}' must be real, got complex64"
            ):
                function(wrong, x, **state)
    with pytest.raises(TypeError, match="embed.* must be a float, got complex64"):
        embed(4, 4, dtype=jnp.complex64)
