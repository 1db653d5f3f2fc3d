"""The contract: `wire`, `layer`, `param`, plain functions, keys, state, abstract initialization,
errors.
"""

import functools
import gc
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import numbers, quick_to_compile, state_of, weights  # noqa: F401 (a fixture)

from jaxnet import tree
from jaxnet.combinators import chain, parallel, remat, repeat, residual
from jaxnet.core import Layer, layer, output_specs, param, wire
from jaxnet.layers import batch_norm, dense, dropout
from jaxnet.transform import replace

X = numbers(jax.ShapeDtypeStruct((4, 4), jnp.float32), seed=1)
zeros, ones, normal = (
    jax.nn.initializers.zeros,
    jax.nn.initializers.ones,
    jax.nn.initializers.normal(1.0),
)


def key(seed: int = 0):
    return jax.random.key(seed)


def affine(params, x):
    return x @ params["kernel"] + params["bias"][None]


def close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
    )


def counter(step: int = 1) -> Layer:
    """A layer that adds how often it was called before."""

    def fn(params, x, state):
        return x + state["calls"], {"calls": state["calls"] + step}

    return layer(None, fn, init_state=lambda x: {"calls": jnp.zeros(())}, label="counter")


def traced(calls: list) -> Layer:
    """A plain function that notes each time it is traced or run."""

    def fn(x):
        calls.append(x.shape)
        return x

    return chain(fn)


# --- wire -----------------------------------------------------------------------------------------


def test_a_child_called_twice_shares_its_weights():
    net = wire(a=dense(4))(lambda f, x: f.a(jnp.tanh(f.a(x))))
    params = weights(net, X)
    assert tree.paths(params) == ["a/bias", "a/kernel"]
    close(net.apply(params, X), affine(params["a"], jnp.tanh(affine(params["a"], X))))


def test_a_dropout_called_twice_draws_anew_and_the_same_in_the_next_call():
    net = wire(drop=dropout(0.5))(
        lambda f, x: (f.drop(x), f.drop(x), f.drop(x, key=key(5)), f.drop(x, key=key(5)))
    )
    first, second, third, fourth = net.apply({}, X, key=key(), train=True)
    assert np.any(first != second) and np.any(first != third)
    np.testing.assert_array_equal(third, fourth)
    close(net.apply({}, X, key=key(), train=True), (first, second, third, fourth))
    assert np.any(net.apply({}, X, key=key(1), train=True)[0] != first)


def test_state_goes_from_call_to_call():
    net = wire(count=counter(), other=counter(10))(
        lambda f, x: (f.count(x), f.other(x), f.count(x))
    )
    state = state_of(net, X)
    assert state == {"count": {"calls": 0}, "other": {"calls": 0}}
    outputs, state = net.apply({}, 0.0, state=state)
    assert outputs == (0, 0, 1) and state == {"count": {"calls": 2}, "other": {"calls": 10}}
    outputs, after = net.apply({}, 0.0, state=state)
    assert outputs == (2, 10, 3) and after == {"count": {"calls": 4}, "other": {"calls": 20}}
    assert state == {"count": {"calls": 2}, "other": {"calls": 10}}  # what went in is as it was


def test_train_and_key_can_be_overridden_for_one_call():
    @wire(drop=dropout(0.5))
    def net(f, x):
        return f.drop(x), f.drop(x, train=not f.train, key=key(3))

    trained, evaluated = net.apply({}, X, key=key(), train=True)
    assert np.any(trained != X)
    np.testing.assert_array_equal(evaluated, X)
    evaluated, trained = net.apply({}, X)
    assert np.any(trained != X)
    np.testing.assert_array_equal(evaluated, X)


def test_a_body_has_a_key_of_its_own():
    @wire(drop=dropout(0.5), plain=jnp.tanh)
    def net(f, x):
        keys = [] if f.key is None else [f.key]
        return f.drop(x), f.plain(x), [jax.random.key_data(k) for k in keys]

    assert net.apply({}, X)[2] == []
    (own,) = net.apply({}, X, key=key())[2]
    assert np.any(own != jax.random.key_data(key()))
    np.testing.assert_array_equal(own, net.apply({}, X, key=key(), train=True)[2][0])
    inner = net.apply({}, X, key=key(1))[2][0]
    outer = chain(net).apply({}, X, key=key(1))[2][0]
    assert np.any(inner != outer)  # another place in a network, another key


def test_a_body_may_draw_in_evaluation_too():
    net = wire(a=dense(4))(lambda f, x: f.a(x) + jax.random.normal(f.key, x.shape))
    sample = layer(None, lambda params, x, key: x + jax.random.normal(key, x.shape))
    assert tree.paths(weights(chain(net, sample, jnp.tanh), X)) == ["0/a/bias", "0/a/kernel"]


def test_a_child_may_be_for_training_only():
    @wire(main=dense(4), auxiliary=dense(2))
    def net(f, x):
        h = f.main(x)
        return (h, f.auxiliary(h)) if f.train else h

    params = weights(net, X)
    assert set(params) == {"main", "auxiliary"}
    close(net.apply(params, X), affine(params["main"], X))
    close(
        net.apply(params, X, train=True)[1], affine(params["auxiliary"], affine(params["main"], X))
    )


def test_inputs_may_be_several_static_keywords_and_trees():
    class Pair(NamedTuple):
        left: jax.Array
        right: jax.Array | None

    @wire(a=dense(4), b=dense(4))
    def net(f, pair, mode, shift=None, *, flip=False):
        assert mode in ("sum", "left")  # a string stays one, at init too
        left = f.a(pair.left)
        both = left if pair.right is None else left + f.b(pair.right)
        both = both if shift is None else both + shift["by"]
        return {"out": -both if flip else both, "both": (both, [Pair(left, None)])}

    inputs, options = (Pair(X, X), "sum", {"by": X}), {"flip": True}
    params = weights(net, *inputs, **options)
    outputs = net.apply(params, *inputs, **options)
    expected = affine(params["a"], X) + affine(params["b"], X) + X
    close(outputs["out"], -expected)
    assert isinstance(outputs["both"][1][0], Pair) and outputs["both"][1][0].right is None
    outer = wire(net=net)(lambda f, x: f.net(Pair(x, x), "left", flip=True)["out"])
    assert jax.tree.map(jnp.shape, weights(outer, X)) == {"net": jax.tree.map(jnp.shape, params)}
    with pytest.raises(ValueError, match="child 'b' is never called"):
        net.init(key(), Pair(X, None), "left")


def test_static_inputs_that_are_equal_but_of_other_types_are_told_apart():
    net = wire(scale=lambda x, by: x * by, same=lambda x: x)(
        lambda f, x, by: f.same(f.scale(x, by))
    )
    ints = jnp.ones((2,), int)
    dtypes = [output_specs(net, False, ints, by).dtype for by in (True, 1, 1.0)]
    assert dtypes == [jnp.int32, jnp.int32, jnp.float32]


def test_a_child_keeps_the_weak_type_of_its_output():
    net = wire(half=lambda: jnp.asarray(0.5), a=dense(2))(lambda f, x: f.a(x * f.half()))
    params = net.init(key(), X.astype("bfloat16"))
    assert {leaf.dtype for leaf in params["a"].values()} == {jnp.dtype("bfloat16")}
    assert net.apply(params, X.astype("bfloat16")).dtype == jnp.bfloat16


def scanned(f, x):
    return jax.lax.scan(lambda h, row: (f.cell(h + row), f.cell(row)), jnp.zeros(4), x)[1]


def looped(f, x):
    return jax.lax.fori_loop(0, 2, lambda i, h: f.cell(h), x)


RAW = {
    "scan": (scanned, affine),
    "vmap": (lambda f, x: jax.vmap(f.cell)(x), affine),
    "nested vmap": (lambda f, x: jax.vmap(jax.vmap(f.cell))(x[None])[0], affine),
    "checkpoint": (lambda f, x: jax.checkpoint(lambda x: f.cell(x))(x), affine),
    "cond": (lambda f, x: jax.lax.cond(x[0, 0] > 9, jnp.negative, f.cell, x), affine),
    "jit": (lambda f, x: jax.jit(f.cell)(x), affine),
    "grad": (
        lambda f, x: jax.grad(lambda x: f.cell(x).sum())(x),
        lambda p, x: 0 * x + p["kernel"].sum(1)[None],
    ),
    "fori_loop": (looped, lambda p, x: affine(p, affine(p, x))),
    "map": (lambda f, x: jax.lax.map(f.cell, x), affine),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_transforms_are_fine_around_stateless_children(name):
    body, expected = RAW[name]
    net = chain(wired=wire(cell=dense(4))(body))
    with jax.checking_leaks():
        params = weights(net, X)
        outputs = jax.jit(net.apply)(params, X)
    assert jax.tree.map(jnp.shape, params) == {"wired": {"cell": {"bias": (4,), "kernel": (4, 4)}}}
    close(outputs, expected(params["wired"]["cell"], X))


def test_eager_raw_transforms_leak_nothing():
    net = wire(cell=chain(dense(4), jnp.tanh))(scanned)
    with jax.checking_leaks():
        params = net.init(key(), X)
        close(net.apply(params, X), jnp.tanh(affine(params["cell"]["0"], X)))


@pytest.mark.parametrize("name", RAW)
def test_a_stateful_child_inside_a_raw_transform_is_an_error_at_init_and_in_apply(name):
    net = wire(cell=batch_norm())(RAW[name][0])
    norm = batch_norm()
    params, state = {"cell": norm.init(key(), X)}, {"cell": state_of(norm, X)}
    for call in [lambda: net.init(key(), X), lambda: net.apply(params, X, state=state)]:
        with pytest.raises(
            RuntimeError, match="batch_norm: a layer with state cannot be called inside a raw"
        ) as error:
            call()
        assert "in layer 'cell'" in error.value.__notes__


def test_a_stateful_child_is_fine_where_the_whole_network_is_transformed():
    net = chain(dense(4), counter(), jnp.tanh)
    params, state = weights(net, X), state_of(net, X)
    expected = jnp.tanh(affine(params["0"], X) + 0), {"1": {"calls": jnp.float32(1)}}
    for transformed in [jax.jit(net.apply), jax.checkpoint(net.apply)]:
        close(transformed(params, X, state=state), expected)
    outputs, _ = jax.vmap(net.apply, in_axes=(None, 0))(
        params, X, state=jax.tree.map(lambda s: s[None].repeat(4), state)
    )
    close(outputs, expected[0])


# --- layer, param, plain functions ----------------------------------------------------------------


def test_a_function_is_handed_just_what_it_names():
    seen = {}

    def fn(params, x, train):
        seen.update(params=params, train=train)
        return x

    net = layer(None, fn)
    assert net.label == "fn" and not net.random
    net.apply({"p": 1}, X, key=key(), train=True)
    assert seen == {"params": {"p": 1}, "train": True}


@pytest.mark.parametrize(
    "init_state, fn",
    [(None, lambda params, x, state: (x, state)), (lambda x: {}, lambda params, x: x)],
)
def test_a_stateful_layer_has_both_halves_or_neither(init_state, fn):
    with pytest.raises(
        TypeError, match="both init_state and a parameter `state` of its function, or neither"
    ):
        layer(None, fn, init_state=init_state)


def test_param_is_an_array_in_the_dict_of_its_parent():
    net = wire(scale=param((4,), ones), table=param((2, 4), normal, dtype=jnp.bfloat16))(
        lambda f, x: (x * f.scale()[None], f.table())
    )
    params = net.init(key(), X)
    assert jax.tree.map(lambda p: (p.shape, str(p.dtype)), params) == {
        "scale": ((4,), "float32"),
        "table": ((2, 4), "bfloat16"),
    }
    close(net.apply(params, X)[0], X)
    with jax.enable_x64(True):
        assert param((2,), ones).init(key()).dtype == jnp.float64
    np.testing.assert_array_equal(param((), ones).init(key()), 1.0)


@pytest.mark.parametrize(
    "wrong, got", [(jnp.zeros(3), r"float32\[3\]"), ({}, r"\{\}"), ([1.0] * 4, r"\[float, .*\]")]
)
def test_param_names_a_wrong_array(wrong, got):
    net = wire(scale=param((4,), ones))(lambda f, x: x * f.scale())
    with pytest.raises(
        ValueError, match=rf"param\(4,\): the array must have shape \(4,\), got {got}"
    ) as error:
        net.apply({"scale": wrong}, X)
    assert error.value.__notes__ == ["in layer 'scale'"]


def test_tied_weights_get_the_gradients_of_both_uses():
    net = wire(table=param((3, 2), normal))(lambda f, ids: f.table()[ids] @ f.table().T)
    params, ids = weights(net, jnp.array([0, 1])), jnp.array([0, 2])

    def loss(look_up, read_out):
        return jnp.sum(jnp.sin(look_up[ids] @ read_out.T))

    separate = jax.grad(loss, (0, 1))(params["table"], params["table"])
    together = jax.grad(lambda p: jnp.sum(jnp.sin(net.apply(p, ids))))(params)
    close(together, {"table": sum(separate)})


class Scale:
    """A callable object, not a function."""

    def __call__(self, x):
        return 3 * x


@pytest.mark.parametrize(
    "function, expected, name",
    [
        (jnp.tanh, jnp.tanh, "tanh"),
        (jax.nn.relu, lambda x: x.clip(0), "relu"),
        (functools.partial(jnp.sum, axis=0), lambda x: x.sum(0), "sum"),
        (lambda x: x**2, lambda x: x**2, "<lambda>"),
        (Scale(), lambda x: 3 * x, "Scale"),
        (jnp.negative, lambda x: -x, "negative"),
        (jax.jit(jnp.exp), jnp.exp, "exp"),
    ],
)
def test_any_callable_is_a_layer_without_parameters(function, expected, name):
    net = chain(function)
    assert net.init(key(), X) == {} and not net.random and net.init_state is None
    close(net.apply({}, X), expected(X))
    assert net.children["0"].label == name


def test_an_error_of_a_plain_function_stays_what_it_is():
    net = chain(lookup=lambda x: {}["volume"])
    for call in [lambda: net.init(key(), X), lambda: net.apply({}, X)]:
        with pytest.raises(KeyError, match="volume") as error:
            call()
        assert error.value.__notes__[0] == "in layer 'lookup'"


def constructor(units):  # without an annotation that says what it returns
    return dense(units)


@pytest.mark.parametrize("combinator", [chain, residual, remat, lambda block: repeat(block, 2)])
@pytest.mark.parametrize("wrong", [dense, batch_norm, chain])
def test_a_constructor_in_the_place_of_a_layer_is_found_when_the_network_is_made(combinator, wrong):
    with pytest.raises(
        TypeError, match=rf"pass the layer that it returns, {wrong.__name__}\(...\)"
    ):
        combinator(wrong)


def test_a_constructor_in_the_place_of_a_layer_is_found_at_last_when_it_returns_a_layer():
    net = chain(lambda x: dense(3), jnp.tanh)
    for call in [lambda: net.init(key(), X), lambda: net.apply({}, X)]:
        with pytest.raises(
            TypeError, match="returned a layer when it was called with data; pass the layer"
        ):
            call()


@pytest.mark.parametrize("wrong", [3, None, "dense", {"kernel": 1}])
def test_what_is_not_callable_is_no_layer(wrong):
    with pytest.raises(
        TypeError, match="wire: child 'a' must be a layer or a function of its inputs, got"
    ):
        wire(a=wrong)(lambda f, x: f.a(x))
    with pytest.raises(TypeError, match="chain: child '0' must be a layer"):
        chain(wrong)


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a b",
        "a.b",
        "",
        "é",
        "train",
        "key",
        "state",
        "params",
        "_call",
        "__class__",
        "<tap>",
    ],
)
def test_a_name_that_cannot_be_part_of_a_path_or_hides_something_is_refused(name):
    with pytest.raises(ValueError, match="a child's name is letters, digits and"):
        wire(**{name: dense(2)})(lambda f, x: f[name](x))


def test_a_forgotten_or_wrong_body_is_found():
    with pytest.raises(
        TypeError, match=r"chain: child '0': wire\(...\) is a function that makes a layer"
    ):
        chain(wire(a=dense(4)))
    with pytest.raises(
        TypeError,
        match=r"wire: the body must be a function of \(f, \*inputs\), got float32\[4, 4\]",
    ):
        wire(a=dense(4))(X)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("net", [chain(dropout(0.5)), dropout(0.5), remat(jnp.tanh)], ids=repr)
def test_train_is_a_static_bool(net):
    message = (
        r"train must be True or False, got bool\[\]; under jax.jit, jax.jit\(net.apply, "
        r"static_argnames='train'\)"
    )
    with pytest.raises(TypeError, match=message):
        jax.jit(net.apply)({}, X, key=key(), train=True)
    with pytest.raises(TypeError, match="train must be True or False, got 'yes'"):
        net.apply({}, X, key=key(), train="yes")
    jitted = jax.jit(net.apply, static_argnames="train")
    close(jitted({}, X, key=key(), train=True), net.apply({}, X, key=key(), train=True))


def test_a_network_that_is_gone_leaves_nothing_in_memory():
    net = chain(dense(4), repeat(dense(4), 2))
    net.init(key(), X)
    gone = [weakref.ref(net), weakref.ref(net.children["1"])]
    del net
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# --- init: abstract, once per spec, deterministic -------------------------------------------------


def nested(depth: int, leaf: Layer, around=lambda net: net) -> Layer:
    """2^depth leaves under `depth` levels of wired layers."""
    if depth == 0:
        return leaf
    inner = [nested(depth - 1, leaf, around) for _ in range(2)]
    return around(wire(a=inner[0], b=inner[1])(lambda f, x: f.b(f.a(x))))


def test_init_traces_each_layer_once_however_deep_it_is():
    calls = []

    def fn(params, x):
        calls.append(x.shape)
        return x * params["scale"]

    def leaf():
        return layer(lambda key, x: {"scale": jnp.ones(())}, fn, label="leaf")

    def depth(d):
        return leaf() if d == 0 else wire(a=depth(d - 1), b=depth(d - 1))(lambda f, x: f.b(f.a(x)))

    net = depth(6)  # 64 leaves of their own
    params = net.init(key(), X)
    assert len(tree.paths(params)) == 64 and tree.paths(params)[0] == "a/a/a/a/a/a/scale"
    assert len(calls) == 64
    net.init(key(1), X)
    assert len(calls) == 64  # remembered
    net.init(key(1), X[:2])
    assert len(calls) == 128  # another spec


def test_init_of_layers_that_share_their_path_costs_at_most_a_trace_for_each_level():
    calls = []
    net = nested(5, traced(calls), residual)  # one leaf layer in 32 places
    net.init(key(), X)
    assert len(calls) <= 5 * 32


def test_64_dense_layers_six_deep_have_independent_weights():
    net = nested(6, dense(4))
    params = jax.tree.leaves(net.init(key(), X))
    kernels = np.stack([p for p in params if p.ndim == 2]).reshape(64, -1)
    assert len(np.unique(kernels, axis=0)) == 64


def test_init_is_the_same_under_jit_and_a_loop_under_vmap():
    scale = layer(
        lambda key, x: {"scale": jax.random.uniform(key)}, lambda params, x: x * params["scale"]
    )
    net = chain(a=scale, b=repeat(scale, 2))
    keys = jax.random.split(key(4), 3)
    loop = [net.init(key, X) for key in keys]
    for i, jitted in enumerate(map(jax.jit(lambda key: net.init(key, X)), keys)):
        close(jitted, loop[i])
    close(
        jax.jit(jax.vmap(lambda key: net.init(key, X)))(keys),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop),
    )


def test_raw_keys_are_keys_too():
    with jax.debug_key_reuse(False):  # it follows typed keys only
        raw = jax.random.PRNGKey(3)
        close(chain(dense(4)).init(raw, X), chain(dense(4)).init(key(3), X))
        close(
            dropout(0.5).apply({}, X, key=raw, train=True),
            dropout(0.5).apply({}, X, key=key(3), train=True),
        )


def test_the_layers_names_are_in_the_program():
    net = chain(encoder=chain(first=dense(4), second=dense(4)), head=dense(4))
    params = weights(net, X)
    text = jax.jit(net.apply).lower(params, X).as_text(debug_info=True)
    assert "encoder/first" in text and "encoder/second" in text and "/head/" in text


# --- the tree is plain: transforms, optimizers, freezing ------------------------------------------


def test_random_children_inside_a_raw_transform_take_a_key_of_each_iteration():
    """Without a key each turn would draw the same numbers, a bug that no loss curve shows: it is an
    error.
    """

    @wire(drop=dropout(0.5))
    def net(f, x):
        return jax.vmap(lambda row, key: f.drop(row, key=key))(x, jax.random.split(f.key, len(x)))

    fresh = net.apply({}, jnp.ones((3, 50)), key=key(), train=True)
    assert len(np.unique(fresh, axis=0)) == 3


RANDOM = {
    "scan": lambda f, x: jax.lax.scan(lambda h, row: (h, f.cell(row)), 0, x)[1],
    "vmap": lambda f, x: jax.vmap(f.cell)(x),
    "map": lambda f, x: jax.lax.map(f.cell, x),
    "fori_loop": lambda f, x: jax.lax.fori_loop(0, 2, lambda i, h: f.cell(h), x),
    "checkpoint": lambda f, x: jax.checkpoint(lambda x: f.cell(x))(x),
    "jit": lambda f, x: jax.jit(f.cell)(x),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("deep", [False, True])
def test_a_random_child_inside_a_raw_transform_without_a_key_is_an_error_where_it_draws(name, deep):
    inside = wire(lin=dense(4), drop=dropout(0.5))(lambda f, x: f.drop(f.lin(x)))
    net = wire(cell=repeat(inside, 2, remat=True) if deep else dropout(0.5))(RANDOM[name])
    params = weights(net, X)
    with pytest.raises(
        RuntimeError, match=r"drawn inside a raw JAX transform.*f\.cell\(\.\.\., key="
    ) as error:
        net.apply(params, X, key=key(), train=True)
    assert ("in layer 'cell/drop'" if deep else "in layer 'cell'") in error.value.__notes__
    net.apply(params, X, key=key())  # dropout draws nothing in evaluation
    quiet = wire(cell=wire(lin=dense(4))(lambda f, x: f.lin(x)))(RANDOM[name])
    quiet.apply(weights(quiet, X), X, key=key(), train=True)  # nothing is drawn at all


def test_the_same_numbers_in_every_turn_can_be_asked_for():
    net = wire(drop=dropout(0.5))(lambda f, x: jax.vmap(lambda row: f.drop(row, key=f.key))(x))
    same = net.apply({}, jnp.ones((3, 50)), key=key(), train=True)
    assert len(np.unique(same, axis=0)) == 1


def test_a_layer_that_draws_in_evaluation_is_an_error_inside_a_raw_transform_too():
    sample = layer(None, lambda params, x, key: x + jax.random.normal(key, x.shape), label="sample")
    net = wire(
        body=wire(a=jnp.tanh)(lambda f, x: f.a(x) + jax.random.normal(f.key, x.shape)),
        sample=sample,
    )(lambda f, x: (jax.vmap(f.sample)(x), jax.vmap(f.body)(x)))
    with pytest.raises(
        RuntimeError, match="sample: random numbers are drawn inside a raw JAX transform"
    ):
        net.apply({}, X, key=key())
    net = replace(net, "sample", chain(jnp.tanh))
    with pytest.raises(
        RuntimeError, match="wire: random numbers are drawn inside a raw JAX transform"
    ):
        net.apply({}, X, key=key())


def test_an_ensemble_is_vmap_over_stacked_parameters():
    net = chain(dense(4), jnp.tanh)
    members = [weights(net, X, seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    outputs = jax.vmap(net.apply, (0, None))(stacked, X)
    close(outputs, jnp.stack([jnp.tanh(affine(p["0"], X)) for p in members]))


def test_dropout_of_an_ensemble_has_a_mask_a_member():
    keys = jax.random.split(key(), 3)
    masks = jax.vmap(lambda k: dropout(0.5).apply({}, jnp.ones(50), key=k, train=True))(keys)
    assert len(np.unique(masks, axis=0)) == 3


def test_scan_over_steps_with_raw_optax_and_checkpoint_is_the_loop():
    net, tx = chain(dense(4), jnp.tanh, dropout(0.2), dense(4)), optax.adam(0.1)
    params = weights(net, X)
    apply = jax.checkpoint(functools.partial(net.apply, train=True))

    def step(carry, key):
        params, opt = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.square(apply(p, X, key=key) - X).mean())(
            params
        )
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), loss

    start = params, tx.init(params)
    (scanned, _), losses = jax.jit(
        lambda start: jax.lax.scan(step, start, jax.random.split(key(), 20))
    )(start)
    carry, one = start, jax.jit(step)
    for k in jax.random.split(key(), 20):
        carry, _ = one(carry, k)
    close(scanned, carry[0], rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state():
    net = chain(body=dense(4), head=dense(4))
    params = weights(net, X)
    head, body = tree.split(params, "head")

    def loss(head):
        return jnp.sum(net.apply(tree.merge(head, body), X) ** 2)

    grads = jax.grad(loss)(head)
    assert tree.paths(grads) == ["head/bias", "head/kernel"]
    everything = jax.grad(lambda p: jnp.sum(net.apply(p, X) ** 2))(params)
    close(grads["head"], everything["head"])
    tx = optax.adam(0.1)
    state = tx.init(head)
    assert tree.count(state) == 2 * tree.count(head) + 1  # two moments and a counter
    updates, _ = tx.update(grads, state, head)
    close(tree.merge(optax.apply_updates(head, updates), body)["body"], params["body"])


# --- errors ---------------------------------------------------------------------------------------


def test_an_unknown_child_is_an_error_with_a_suggestion():
    net = wire(encoder=dense(4), head=dense(2))(lambda f, x: f.head(f.encodr(x)))
    message = (
        r"<lambda> has no child 'encodr'; did you mean 'encoder'\? \(children: encoder, head\)"
    )
    for call in [lambda: net.init(key(), X), lambda: net.apply({}, X)]:
        with pytest.raises(AttributeError, match=message.replace("<lambda>", "wire")):
            call()


def test_a_child_that_is_never_called_is_an_error():
    net = wire(used=dense(4), forgotten=dense(2))(lambda f, x: f.used(x))
    with pytest.raises(
        ValueError,
        match=r"wire: child 'forgotten' is never called; call f.forgotten\(...\) in the body",
    ):
        net.init(key(), X)


def test_the_path_of_an_error_is_one_note_at_init_and_in_apply():
    net = chain(encoder=wire(block=repeat(chain(mlp=dense(4)), 2))(lambda f, x: f.block(x)))
    params = weights(net, X)
    wrong = jnp.ones((2, 5))
    with pytest.raises(ValueError, match=r"dense\(4\): last axis must be 4") as error:
        net.apply(params, wrong)
    paths = [note for note in error.value.__notes__ if note.startswith("in layer")]
    assert paths == ["in layer 'encoder/block/mlp'"]
    with pytest.raises(TypeError, match=r"dense\(4\): the input must be floating") as error:
        net.init(key(), jnp.ones((2, 4), int))
    paths = [note for note in error.value.__notes__ if note.startswith("in layer")]
    assert paths == ["in layer 'encoder/block/mlp'"]


def test_an_input_that_cannot_be_compared_is_named():
    class Odd:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

    net = chain(wire(a=dense(4))(lambda f, x, odd: f.a(x)))
    with pytest.raises(
        TypeError, match=r"inputs must be arrays or hashable values, got \(float32\[4, 4\], Odd\)"
    ):
        net.init(key(), X, Odd())


@pytest.mark.parametrize("state", [jnp.ones(3), [1], "state"])
def test_a_state_that_is_no_dict_is_named(state):
    net = chain(counter())
    with pytest.raises(
        TypeError, match="chain: state must be a dict by the name of the child, got"
    ):
        net.apply({}, X, state=state)
    with pytest.raises(
        TypeError, match=r"batch_norm: state must be a dict, \{'mean': float32\[4\].*got"
    ):
        batch_norm().apply(batch_norm().init(key(), X), X, state=state)


def test_foreign_names_in_params_and_state_are_errors_with_suggestions():
    net = chain(first=dense(4), count=counter())
    params, state = weights(net, X), state_of(net, X)
    with pytest.raises(
        ValueError,
        match=r"chain: params must have no 'frist', which is not a child.*did you mean 'first'\?",
    ):
        net.apply({"frist": params["first"]}, X, state=state)
    with pytest.raises(
        ValueError,
        match=r"chain: state must have no 'first', which is not a child.*\(children: count\)",
    ):
        net.apply(params, X, state={**state, "first": {}})


def test_missing_state_is_told_from_missing_parameters():
    net = parallel(norm=batch_norm())
    params = net.init(key(), X)
    with pytest.raises(
        ValueError,
        match=r"batch_norm: no 'mean' in params and state \(they hold scale float32\[4\]",
    ):
        net.apply(params, X, state={})
    with pytest.raises(
        ValueError,
        match=r"batch_norm: no 'scale' in params and state \(they hold mean float32\[4\]",
    ):
        net.apply({}, X, state=state_of(net, X))
