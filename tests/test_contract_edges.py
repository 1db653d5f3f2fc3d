"""Edges of the contract: what was tried against it from outside, each with the right answer."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from registry import close, numbers, quick_to_compile, weights  # noqa: F401 (a fixture)

from jaxnet import (
    around,
    capture,
    chain,
    dense,
    dropout,
    layer,
    param,
    remat,
    repeat,
    replace,
    residual,
    scan,
    vmap,
    wire,
)
from jaxnet.core import Layer
from jaxnet.layers import layer_norm

X = numbers(jax.ShapeDtypeStruct((4, 6), jnp.float32), seed=1)
RATES = jnp.asarray([1.0, 2.0, 3.0])


def key(seed: int = 0):
    return jax.random.key(seed)


# --- inputs per copy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "each, inputs, named",
    [
        # By position it would go whole to every copy, and broadcast.
        ("rate", (jnp.zeros(3), RATES), {}),
        ("rates", (jnp.zeros(3),), {"rate": RATES}),
        (("rate", "other"), (jnp.zeros(3),), {"rate": RATES}),
    ],
)
def test_an_input_in_each_must_be_passed_by_its_name(each, inputs, named):
    net = repeat(lambda x, rate: x + rate, 3, each=each)
    for run in [lambda: net.apply({}, *inputs, **named), lambda: net.init(key(), *inputs, **named)]:
        with pytest.raises(
            TypeError, match=r"repeat\[3\]: each copy takes its part of '\w+': pass it by name"
        ):
            run()


def test_the_carried_input_is_passed_by_position():
    for net in [repeat(lambda x: x, 3), repeat(lambda x, w: x * w, 3, each="x")]:
        with pytest.raises(
            TypeError, match="the first input is carried from copy to copy: pass it by position"
        ):
            net.apply({}, x=jnp.ones(3))
    with pytest.raises(
        TypeError, match=r"scan: pass the carry and xs by position, \(carry, xs, \*rest\)"
    ):
        scan(dense(3)).init(key())


@pytest.mark.parametrize(
    "name", ["x", "layer", "name", "run", "carry", "xs", "key_", "inputs", "fn"]
)
def test_named_inputs_may_have_any_name(name):
    """The library's own argument names do not collide with those of the user's functions."""

    def add(h, **named):
        return h + named[name]

    nets = [
        repeat(add, 2),
        residual(add),
        remat(add),
        chain(add),
        vmap(add, 4),
        wire(a=add)(lambda f, h, **named: f.a(h, **named)),
    ]
    for net in nets:
        named = {name: jnp.ones((4, 6))}
        chain(net).init(key(), X, **named)
        net.apply({}, X, **named)
    (carry, _) = scan(lambda c, row, **named: (c + named[name], row)).apply(
        {}, jnp.zeros(6), X, **{name: 1.0}
    )
    close(carry, jnp.full(6, 4.0))


# --- captured values ------------------------------------------------------------------------------


def test_a_child_that_also_runs_inside_a_raw_transform_is_not_captured_in_part():
    @wire(aux=lambda v: v, block=wire(aux=lambda v: v)(lambda f, x: f.aux(x)))
    def net(f, x):
        f.aux(x.sum())
        f.block(x.sum())
        jax.vmap(f.block)(x)
        return jax.lax.scan(lambda c, r: (c, f.aux(100 * r.sum())), 0.0, x)[1]

    for pattern in ["aux", "block/aux"]:
        with pytest.raises(
            RuntimeError, match=f"capture: '{pattern}' ran inside a raw JAX transform"
        ):
            capture(net, pattern)({}, X)


# --- combinators that draw ------------------------------------------------------------------------


def noisy(inner):
    """Noise on the input, in training."""

    def call(run, params, state, key, x):
        if run.train:
            x = x + jax.random.normal(key, x.shape)
        return run(params, state, key, x)

    return around(inner, call, label="noisy", rebuild=noisy, random=True)


def test_a_combinator_that_draws_has_its_key_everywhere():
    net = chain(a=noisy(dense(5)))
    params = weights(net, X)
    close(net.apply(params, X, key=key()), dense(5).apply(params["a"], X))
    assert np.any(net.apply(params, X, key=key(2), train=True) != net.apply(params, X))
    _, ys = scan(wire(n=noisy(lambda x: x))(lambda f, c, x: (c, f.n(x)))).apply(
        {}, 0.0, 0 * X, key=key(), train=True
    )
    assert len(np.unique(ys, axis=0)) == 4
    mapped = wire(n=noisy(dense(5)))(lambda f, x: jax.vmap(f.n)(x))
    with pytest.raises(RuntimeError, match="random numbers are drawn inside a raw JAX transform"):
        mapped.apply({"n": params["a"]}, X, key=key(), train=True)
    mapped.apply({"n": params["a"]}, X, key=key())


def test_asking_for_the_key_without_drawing_is_no_draw():
    inner = wire(d=dense(6))(
        lambda f, x: (lambda k: f.d(x) + (jax.random.normal(k, x.shape) if f.train else 0))(f.key)
    )
    net = wire(i=inner)(lambda f, x: jax.vmap(f.i)(x))
    params = weights(net, X)
    close(net.apply(params, X, key=key(1)), net.apply(params, X))
    with pytest.raises(RuntimeError, match="random numbers are drawn inside a raw JAX transform"):
        net.apply(params, X, key=key(1), train=True)


# --- parameters and state -------------------------------------------------------------------------


def weight_norm(inner):
    def call(run, params, state, key, *inputs, **named):
        kernel = params["kernel"] / jnp.linalg.norm(params["kernel"], axis=0) * params["gain"]
        return run({"kernel": kernel, "bias": params["bias"]}, state, key, *inputs, **named)

    def init(key, *inputs, **named):
        params = inner.init(key, *inputs, **named)
        return params | {"gain": jnp.linalg.norm(params["kernel"], axis=0)}

    return around(inner, call, label="weight_norm", rebuild=weight_norm, init=init)


@pytest.mark.parametrize(
    "wrong",
    [
        {"junk": jnp.ones(3)},
        {"gain": jnp.ones(1)},
        {"gain": jnp.ones(())},
        {"kernel": jnp.ones((6, 1))},
    ],
    ids=str,
)
def test_parameters_of_a_combinator_with_its_own_init_are_checked(wrong):
    net = chain(weight_norm(dense(3)))
    with jax.numpy_rank_promotion("allow"):
        params = net.init(key(), X)
        net.apply(params, X)
        with pytest.raises(
            ValueError, match=r"weight_norm: (params must have no 'junk'|'\w+' in params must be)"
        ):
            net.apply({"0": params["0"] | wrong}, X)


@pytest.mark.parametrize(
    "net",
    [
        dropout(0.5),
        chain(a=dropout(0.5)),
        chain(a=repeat(jnp.tanh, 4)),
        chain(a=vmap(jnp.tanh, 4)),
        chain(a=residual(jnp.tanh)),
    ],
)
def test_unknown_parameters_are_refused_where_there_is_nothing_to_learn(net):
    junk = {"junk": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="params must (be empty|have no)"):
        net.apply(junk if not net.children else {"a": junk}, X)


def test_parameters_are_checked_as_far_as_possible_if_init_needs_more_than_apply():
    sized = layer(
        lambda key, x, width: {"w": jnp.ones((x.shape[-1], width))},
        lambda params, x, width=None: x @ params["w"],
        label="sized",
    )
    params = sized.init(key(), X, width=3)
    assert sized.apply(params, X).shape == (4, 3)
    with pytest.raises(
        ValueError, match=r"sized: 'w' in params must be float32\[6, 3\].*got float32\[6, 99\]"
    ):
        sized.apply({"w": jnp.ones((6, 99))}, X)
    with pytest.raises(ValueError, match="sized: params must have no 'junk'"):
        sized.apply(params | {"junk": X}, X)


def test_a_layer_whose_init_needs_an_axis_is_checked_inside_it():
    named = layer(
        lambda key, x: {"w": jnp.ones(x.shape[-1:]) * jax.lax.psum(1.0, "d")},
        lambda params, x: x * params["w"],
    )
    named.apply({"w": jnp.ones(6)}, X[0])  # outside of the axis nothing can be compared
    with pytest.raises(ValueError, match="'w' in params must be"):
        jax.vmap(lambda x: named.apply({"w": jnp.ones(1)}, x), axis_name="d")(X)


def test_a_cache_for_the_longest_sequence_serves_a_call_with_one_token():
    """Sizes that follow from batch and time axes are free; those that follow from features are
    not.
    """

    def fn(params, k, start, state):
        new = jax.lax.dynamic_update_slice_in_dim(state["k"], k, start, axis=1)
        return new, {"k": new}

    cache = layer(None, fn, init_state=lambda k, start: {"k": jnp.zeros_like(k)}, label="cache")
    state = cache.init_state(jax.ShapeDtypeStruct((2, 16, 6), "float32"), 0)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    outputs, state = cache.apply({}, jnp.ones((2, 1, 6)), 3, state=state)
    assert outputs.shape == (2, 16, 6) and outputs.sum() == 12
    with pytest.raises(
        ValueError,
        match=(
            r"cache: 'k' in state must be float32\[2, 1, 6\] for these inputs, got float32\[2, "
            r"16, 5\]"
        ),
    ):
        cache.apply({}, jnp.ones((2, 1, 6)), 3, state={"k": jnp.zeros((2, 16, 5))})
    positions = layer(
        lambda key, x: {"t": jnp.ones(x.shape[-2:])},
        lambda params, x: x + params["t"][: x.shape[-2]],
    )
    close(positions.apply(positions.init(key(), X), X[:2]), X[:2] + 1)
    with pytest.raises(ValueError, match="'t' in params must be"):
        positions.apply({"t": jnp.ones((4, 5))}, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x, state: (x, x + 1),  # (outputs, outputs): the state is forgotten
        lambda params, x, state: (x, {"m": (state["m"] + x).sum()}),
        lambda params, x, state: (x, {"m": state["m"], "n": x}),
    ],
)
@pytest.mark.parametrize("combinator", [lambda net: net, lambda net: repeat(net, 2), chain])
def test_a_new_state_of_another_form_is_an_error_in_the_call_that_makes_it(fn, combinator):
    net = combinator(layer(None, fn, init_state=lambda x: {"m": jnp.zeros(x.shape)}, label="cell"))
    with pytest.raises(
        ValueError,
        match=(
            r"cell: the new state must have the names and shapes of the old one, \{'m': "
            r"float32\[4, 6\]\}"
        ),
    ):
        net.apply({}, X, state=net.init_state(X))


def test_first_states_of_python_numbers_are_stacked():
    scaled = layer(lambda key, x: {"s": 1.0}, lambda params, x: x * params["s"])
    close(repeat(scaled, 3).init(key(), X), {"s": np.ones(3, np.float32)})
    count = layer(
        None, lambda params, x, state: (x, {"n": state["n"] + 1}), init_state=lambda x: {"n": 0}
    )
    net = repeat(count, 3)
    for state in [net.init_state(X), net.init_state(X, key=key())]:
        assert net.apply({}, X, state=state)[1]["n"].tolist() == [1, 1, 1]


def test_a_layer_made_by_hand_needs_no_key_for_its_state():
    by_hand = Layer(
        lambda key, x: {},
        lambda params, x, *, state, key=None, train=False: (x, state),
        init_state=lambda x: {"n": jnp.zeros(())},
    )
    for net in [chain(by_hand), repeat(by_hand, 2), remat(by_hand)]:
        assert jax.tree.leaves(net.init_state(X))[0].dtype == jnp.float32


# --- one layer per equal call ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gain:
    """Two of one name are equal, and differ."""

    name: str
    gain: float = dataclasses.field(compare=False)

    def __call__(self, x):
        return x * self.gain


def test_callables_that_are_equal_but_not_the_same_make_different_layers():
    nets = [chain(Gain("g", gain)) for gain in (1.0, 5.0)]
    assert [net.apply({}, jnp.ones(1))[0] for net in nets] == [1, 5]
    partials = [chain(functools.partial(jnp.sum, axis=axis)) for axis in (0, 1, 0)]
    assert [net.apply({}, X).shape for net in partials] == [(6,), (4,), (6,)]


SIZE = 4


def crop(x):
    return x[:, :SIZE]


def test_a_network_built_anew_sees_global_variables_anew(monkeypatch):
    """As in a notebook, where a cell with a constant is run again."""
    assert chain(crop, dense(3)).init(key(), X)["1"]["kernel"].shape == (4, 3)
    monkeypatch.setitem(globals(), "SIZE", 5)
    net = chain(crop, dense(3))
    params = net.init(key(), X)
    assert params["1"]["kernel"].shape == (5, 3) and net.apply(params, X).shape == (4, 3)


def test_a_child_as_an_input_of_another_holds_nothing_afterwards():
    solve = layer(
        lambda key, g, x: {"w": jnp.ones(x.shape[-1:])},
        lambda params, g, x: g(x) * params["w"][None],
        label="solve",
    )
    net = wire(field=dense(50), solve=solve)(lambda f, x: f.solve(f.field, x))
    x = jnp.ones((2, 50))
    params = net.init(key(), x)
    with jax.checking_leaks():
        jax.jit(net.apply)(params, x)

    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    net.apply(params, x)
    before = held()
    for _ in range(3):
        net.apply(jax.tree.map(lambda leaf: leaf * 0.9, params), x)
    assert held() == before


def test_static_inputs_that_change_do_not_fill_the_memory():
    from jaxnet.core import memo

    net = chain(
        scale=layer(
            lambda key, x, by: {"w": jnp.ones(())}, lambda params, x, by: x * by * params["w"]
        )
    )
    params = net.init(key(), X, 1.0)
    for i in range(300):
        net.apply(params, X, 1.0 + i)
    assert all(len(results) <= 256 for results in memo._MEMO.values())


# --- shapes, dtypes, meshes, export ---------------------------------------------------------------


@pytest.mark.parametrize(
    "child, call",
    [
        (vmap(lambda s: 0.5, 3), lambda half: half(jnp.zeros(3))[0]),
        (scan(lambda c, x: (c, 0.5)), lambda half: half(jnp.zeros(()), jnp.zeros(3))[1][0]),
        (repeat(lambda c: (c, 0.5), 2, collect=True), lambda half: half(jnp.zeros(()))[1][0]),
    ],
    ids=["vmap", "scan", "repeat"],
)
def test_weak_types_stay_weak_through_iterations(child, call):
    net = wire(d=dense(4), half=child)(lambda f, x: f.d(x * call(f.half)))
    x = X.astype("bfloat16")
    params = net.init(key(), x)
    assert params["d"]["kernel"].dtype == net.apply(params, x).dtype == jnp.bfloat16


def test_a_scalar_output_per_step_has_the_axis_that_it_can_have():
    net = scan(lambda c, x: (c + x, x.sum()), axis=1)
    carry, ys = net.apply({}, jnp.zeros(4), X)
    close((carry, ys), (X.sum(1), X.sum(0)))
    chain(net).init(key(), jnp.zeros(4), X)


def test_one_copy_for_all_is_said_for_named_inputs_too():
    net = vmap(lambda x, mask=1.0, start=0: x * mask + start, 4, in_axes=None)
    close(
        net.apply({}, jnp.ones((2, 4)), mask=jnp.arange(4.0)[None]),
        jnp.broadcast_to(jnp.arange(4.0), (4, 2, 4)),
    )
    close(jax.jit(lambda start: net.apply({}, X, start=start))(3)[0], X + 3)
    divided = vmap(lambda x, rate: x * rate, 3, in_axes=(None,))
    close(divided.apply({}, jnp.ones(2), rate=RATES), RATES[:, None] * jnp.ones((3, 2)))


def test_a_scan_is_exported_for_any_length():
    (T,) = jax.export.symbolic_shape("t")
    net = scan(wire(d=dense(6), drop=dropout(0.5))(lambda f, c, x: (f.d(c + x), f.drop(x))))
    params = weights(net, jnp.zeros(6), X)
    run = jax.jit(lambda params, xs: net.apply(params, jnp.zeros(6), xs, key=key(), train=True))
    exported = jax.export.export(run)(params, jax.ShapeDtypeStruct((T, 6), "float32"))
    close(exported.call(params, X), run(params, X))


@pytest.mark.cpu_only("needs four devices")
def test_experts_that_are_spread_over_a_mesh_draw_their_own_masks():
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices("cpu")[:4])
    net = vmap(chain(dense(6), dropout(0.5)), 8)
    x = jnp.ones((8, 5, 6))
    params = net.init(key(1), x)
    expected = net.apply(params, x, key=key(2), train=True)
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("d"))), (params, x)
    )
    with jax.set_mesh(mesh):
        actual = net.apply(*spread, key=key(2), train=True)
    close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5)


class Foreign:
    """An array of another library."""

    shape, dtype = (2, 3), "library.float32"


def test_init_without_inputs_says_what_to_pass():
    with pytest.raises(TypeError) as error:
        chain(jnp.tanh, dense(3)).init(key())
    assert any("net.init(key, x)" in note for note in error.value.__notes__)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, error, message",
    [
        (
            lambda: chain(dense(3)).init(key(), Foreign()),
            TypeError,
            r"got a .*Foreign; convert it, as in np.asarray",
        ),
        (
            lambda: layer_norm().apply(X, {"scale": X}),  # pyright: ignore
            TypeError,
            "the parameters come first|params must be a dict",
        ),
        (lambda: wire(a=dense(3)).init(key(), X), TypeError, "is not a layer before it has a body"),  # pyright: ignore
        (
            lambda: wire(a=dense(3))(dense(2)),
            TypeError,
            r"the body must be a function of \(f, \*inputs\), got dense\(2\)",
        ),
        (lambda: wire(dense(3)), TypeError, "give each child a name"),
        (lambda: chain([dense(3), dense(2)]), TypeError, r"unpack it, as in chain\(\*layers\)"),  # pyright: ignore
        (
            lambda: vmap(dense(3), 2, in_axes="x"),  # pyright: ignore
            TypeError,
            "in_axes is an int or None, or a tuple",
        ),
        (lambda: vmap(dense(3), 2, in_axes=((0, None),)), TypeError, "in_axes is an int or None"),  # pyright: ignore
        (
            lambda: remat(dense(3), policy="dots"),  # pyright: ignore
            TypeError,
            "policy must be one of jax.checkpoint_policies",
        ),
        (
            lambda: residual(dense(3)).init(key(), X),
            ValueError,
            "residual: the layer must return what it receives",
        ),
        (
            lambda: param(3, jax.nn.initializers.ones),  # pyright: ignore
            TypeError,
            r"the shape must be a tuple of sizes, such as \(3,\)",
        ),
        (
            lambda: chain(a=dense(3), b=dense(2)) and replace(chain(a=dense(3)), "a", 3),  # pyright: ignore
            TypeError,
            "new must be a Layer or",
        ),
    ],
)
def test_wrong_uses_are_answered_in_words(run, error, message):
    with pytest.raises(error, match=message):
        run()
