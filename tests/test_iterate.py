"""`scan`, `vmap` and the options of `repeat`, against Python loops over the same layers; keys,
state and captured outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import cell, close, noisy_block, numbers, quick_to_compile, state_of, weights  # noqa: F401 (a fixture)

from jaxnet import (
    around,
    capture,
    cast,
    chain,
    dense,
    dropout,
    layer,
    param,
    remat,
    repeat,
    replace,
    scan,
    summary,
    vmap,
    walk,
    wire,
)
from jaxnet.core import output_specs
from jaxnet.layers import batch_norm

T, B, D = 5, 3, 4
H = jnp.zeros((B, D))
XS = numbers(jax.ShapeDtypeStruct((T, B, D), jnp.float32), seed=1)
X = XS[0]


def key(seed: int = 0):
    return jax.random.key(seed)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def copy_of(trees, i):
    return jax.tree.map(lambda leaf: leaf[i], trees)


# --- scan -----------------------------------------------------------------------------------------


def scanned_by_hand(params, state, carry, xs, order=range(T)):
    ys = [None] * T
    for t in order:
        (carry, ys[t]), state = cell.apply(
            params, carry, xs[t], state=state, key=jax.random.fold_in(key(5), t), train=True
        )
    return (carry, jnp.stack(ys)), state  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "options", [{}, {"remat": True}, {"unroll": 2}, {"reverse": True}], ids=str
)
def test_scan_is_a_loop_in_outputs_state_and_gradients(options):
    """The cell is stateful and random: each step has its key, and the statistics go from step to
    step.
    """
    net = scan(cell, **options)
    params, state = weights(net, H, XS), state_of(net, H, XS)
    assert jax.tree.structure(params) == jax.tree.structure(weights(cell, H, X))
    order = range(T)[::-1] if "reverse" in options else range(T)

    def value(run):
        def loss(params):
            result = run(params)
            return sum(jnp.sum(jnp.sin(y)) for y in result[0]), result

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    with jax.enable_x64(True):
        params, state, carry, xs = jax.tree.map(
            lambda leaf: leaf.astype("float64"), (params, state, H, XS)
        )
        expected = value(lambda params: scanned_by_hand(params, state, carry, xs, order))
        actual = value(
            lambda params: net.apply(params, carry, xs, state=state, key=key(5), train=True)
        )
        close(actual, expected, rtol=1e-9, atol=1e-12)


def test_each_step_draws_its_own_mask():
    _, ys = scan(wire(drop=dropout(0.5))(lambda f, c, x: (c, f.drop(x)))).apply(
        {}, 0.0, jnp.ones((T, 50)), key=key(), train=True
    )
    assert len(np.unique(ys, axis=0)) == T


def test_the_axis_of_time_may_be_another():
    net = scan(cell, axis=1)
    params, state = weights(scan(cell), H, XS), state_of(scan(cell), H, XS)
    close(weights(net, H, jnp.moveaxis(XS, 0, 1)), params)
    (carry, ys), new = net.apply(params, H, jnp.moveaxis(XS, 0, 1), state=state)
    (carry_0, ys_0), new_0 = scan(cell).apply(params, H, XS, state=state)
    close((carry, jnp.moveaxis(ys, 1, 0), new), (carry_0, ys_0, new_0))
    assert output_specs(net, False, H, jnp.moveaxis(XS, 0, 1))[1].shape == (B, T, D)


def test_xs_may_be_a_tree_or_nothing_and_further_inputs_are_the_same_for_all_steps():
    def step(carry, x, shift, *, scale=1.0, mode="add"):
        assert mode == "add"
        return carry + scale * x["a"] + x["b"][0] + shift, None

    xs = {"a": jnp.arange(3.0), "b": (jnp.ones(3), None)}
    carry, ys = scan(step).apply({}, jnp.zeros(()), xs, 10.0, scale=2.0)
    np.testing.assert_array_equal(carry, 2 * 3 + 3 + 30)
    assert ys is None
    doubled = scan(lambda c, x: (2 * c, c), length=4)
    np.testing.assert_array_equal(doubled.apply({}, jnp.ones(()))[1], [1, 2, 4, 8])
    np.testing.assert_array_equal(doubled.apply({}, jnp.ones(()), None)[0], 16)
    carry, ys = scan(lambda c, x: (c + x, x)).apply({}, jnp.ones(()), jnp.zeros((0,)))
    assert carry == 1 and ys.shape == (0,)


@pytest.mark.parametrize(
    "net, inputs, message",
    [
        (
            scan(lambda c, x: c),
            (X, XS),
            r"scan: the cell returns \(carry, y\), a pair, got float32\[3, 4\]",
        ),
        (
            scan(lambda c, x: (c[:1], x)),
            (X, XS),
            r"scan: the layer must return what it receives, float32\[3, 4\], got",
        ),
        (
            scan(lambda c, x: (c.astype("int32"), x)),
            (X, XS),
            "scan: the layer must return what it receives",
        ),
        (
            scan(lambda c, x: (c, x)),
            (X, (XS, XS[:2])),
            "the arrays of xs must have one length along axis 0",
        ),
        (scan(lambda c, x: (c, x), length=4), (X, XS), "one length along axis 0.* and length=4"),
        (
            scan(lambda c, x: (c, x), axis=3),
            (X, XS),
            r"every leaf of xs must be an array with the axis of time, 3",
        ),
        (scan(lambda c, x: (c, x)), (X, 3.0), "every leaf of xs must be an array"),
        (scan(lambda c, x: (c, x)), (X,), "say how many steps, by an array in xs or by length="),
    ],
)
def test_wrong_cells_and_inputs_of_scan_are_named(net, inputs, message):
    for call in [lambda: net.apply({}, *inputs), lambda: chain(net).init(key(), *inputs)]:
        with pytest.raises(ValueError, match=message):
            call()


# --- vmap -----------------------------------------------------------------------------------------


def test_copies_side_by_side_are_a_loop_in_outputs_state_and_gradients():
    n, net = 3, vmap(noisy_block, 3)
    x = XS[:n]
    params, state = weights(net, x), state_of(net, x)
    assert {leaf.shape[0] for leaf in jax.tree.leaves((params, state))} == {n}

    def by_hand(params):
        made = [
            noisy_block.apply(
                copy_of(params, i),
                x[i],
                state=copy_of(state, i),
                key=jax.random.fold_in(key(5), i),
                train=True,
            )
            for i in range(n)
        ]
        return stacked(made)

    def value(run):
        def loss(params):
            result = run(params)
            return jnp.sum(jnp.sin(result[0])), result

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    actual = value(lambda params: net.apply(params, x, state=state, key=key(5), train=True))
    close(actual, value(by_hand), rtol=1e-4, atol=1e-5)


def test_in_axes_say_what_each_copy_receives():
    net = vmap(
        lambda x, y, mode, *, z: x + y + z if mode == "add" else None, 2, in_axes=(None, 1, 0)
    )
    y, z = jnp.asarray([[1.0, 2.0]]), jnp.asarray([10.0, 20.0])
    np.testing.assert_array_equal(net.apply({}, 0.5, y, "add", z=z), [[11.5], [22.5]])
    experts = vmap(dense(2), 3, in_axes=None)
    params = weights(experts, X)
    close(
        experts.apply(params, X),
        jnp.stack([dense(2).apply(copy_of(params, i), X) for i in range(3)]),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "net, inputs, message",
    [
        (
            vmap(dense(4), 2),
            (X,),
            (
                r"vmap\[2\]: an input is divided .* must have 2 parts along axis 0, got "
                r"float32\[3, 4\]"
            ),
        ),
        (vmap(dense(4), 2, in_axes=5), (X,), "must have 2 parts along axis 5"),
        (vmap(dense(4), 2, in_axes=(0, 0)), (X,), r"vmap\[2\]: in_axes is for 2 inputs, got 1"),
    ],
)
def test_wrong_inputs_of_vmap_are_named(net, inputs, message):
    for call in [lambda: net.init(key(), *inputs), lambda: net.apply({}, *inputs)]:
        with pytest.raises(ValueError, match=message):
            call()


def test_parameters_for_another_number_of_copies_are_refused():
    params = weights(vmap(dense(4), 3), XS[:3])
    with pytest.raises(
        ValueError,
        match=r"vmap\[2\]: leaves of params and state must be stacked, \[2, ...\], got float32\[3",
    ):
        vmap(dense(4), 2).apply(params, XS[:2])


# --- repeat: each, collect, reverse, policies, no copies ------------------------------------------


@wire(mix=dense(4), drop=dropout(0.3))
def cached(f, x, start, rate, cache):
    """A block with an input of its own, and an output."""
    y = jnp.tanh(f.mix(x) + rate * cache + start)
    return x + f.drop(y), (cache + y, start)


@pytest.mark.parametrize(
    "options", [{}, {"remat": True}, {"reverse": True}, {"unroll": 3}], ids=str
)
def test_each_copy_takes_and_gives_its_own(options):
    n, rate, cache = 3, jnp.linspace(0.0, 1.0, 3), XS[:3]
    net = repeat(cached, n, each=("rate", "cache"), collect=True, **options)
    params = weights(net, X, 0.5, rate=rate, cache=cache)
    specs = output_specs(net, False, X, 0.5, rate=rate, cache=cache)
    x, outs = X, [None] * n
    for i in range(n)[:: -1 if "reverse" in options else 1]:
        x, outs[i] = cached.apply(
            copy_of(params, i),
            x,
            0.5,
            rate[i],
            cache[i],
            key=jax.random.fold_in(key(7), i),
            train=True,
        )
    expected = x, (jnp.stack([out[0] for out in outs]), jnp.full(n, 0.5))  # pyright: ignore[reportOptionalSubscript]
    actual = net.apply(params, X, 0.5, rate=rate, cache=cache, key=key(7), train=True)
    close(actual, expected, rtol=1e-4)
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(lambda spec: spec.shape, specs)


def test_reverse_is_the_inverse_of_a_flow():
    """x -> x + f(x_other) with shared parameters, undone from the last copy to the first (RealNVP,
    Dinh et al. 2017).
    """
    forward = wire(shift=dense(2))(
        lambda f, x: jnp.concatenate([x[..., 2:], x[..., :2] + f.shift(x[..., 2:])], -1)
    )
    backward = wire(shift=dense(2))(
        lambda f, y: jnp.concatenate([y[..., 2:] - f.shift(y[..., :2]), y[..., :2]], -1)
    )
    params = weights(repeat(forward, 4), X)
    y = repeat(forward, 4).apply(params, X)
    close(repeat(backward, 4, reverse=True).apply(params, y), X, rtol=1e-3, atol=1e-4)
    assert not np.allclose(repeat(backward, 4).apply(params, y), X, atol=1e-2)


def test_a_policy_of_remat_says_what_is_stored():
    block = chain(dense(4), jnp.sin)
    params = weights(repeat(block, 3), X)

    def products(remat):
        net = repeat(block, 3, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(net.apply(p, X))))(params)).count(
            "dot_general"
        )

    # Forward, two gradients, and the recomputed forward product unless the policy stores it.
    assert (products(False), products(True), products(jax.checkpoint_policies.dots_saveable)) == (
        3,
        4,
        3,
    )
    for combinator in [repeat, scan]:
        with pytest.raises(
            TypeError,
            match="remat must be True, False or a policy of jax.checkpoint_policies, got 'all'",
        ):
            combinator(block, *([3] if combinator is repeat else []), remat="all")


@pytest.mark.parametrize(
    "block", [chain(dense(4), jnp.tanh), noisy_block, jnp.tanh], ids=["plain", "noisy", "function"]
)
def test_no_copies_are_the_identity(block):
    net = chain(first=dense(4), rest=repeat(block, 0))
    params = net.init(key(), X)
    assert params.keys() == {"first"}
    expected = dense(4).apply(params["first"], X)
    if net.init_state is None:
        close(net.apply(params, X), expected)
    else:
        outputs, state = net.apply(params, X, state=net.init_state(X), key=key(), train=True)
        close(outputs, expected)
        assert state == net.init_state(X) == {"rest": {}}
    assert summary(net, X).parameters == 20
    with pytest.raises(
        ValueError, match=r"repeat\[0\]: leaves of params and state must be stacked, \[0, ...\]"
    ):
        repeat(dense(4), 0).apply(weights(repeat(dense(4), 2), X), X)


def test_no_copies_collect_empty_arrays():
    net = repeat(lambda x: (x, x[0]), 0, collect=True)
    x, outs = net.apply({}, X)
    close(x, X)
    assert outs.shape == (0, 4) and output_specs(net, False, X)[1].shape == (0, 4)


@pytest.mark.parametrize("n", [np.int64(3), np.uint8(3), jnp.int32(3)], ids=repr)
def test_the_number_of_copies_may_be_an_integer_of_numpy(n):
    close(repeat(dense(4), n).init(key(), X), repeat(dense(4), 3).init(key(), X))
    close(vmap(dense(4), n).init(key(), XS[:3]), vmap(dense(4), 3).init(key(), XS[:3]))


@pytest.mark.parametrize(
    "net, named, message",
    [
        (
            repeat(lambda x, r: x, 3, each="r"),
            {"r": 0.5},
            r"repeat\[3\]: 'r' is divided .* 3 parts along axis 0, got float",
        ),
        (
            repeat(lambda x, r: x, 3, each="r"),
            {"r": jnp.ones(2)},
            r"3 parts along axis 0, got float32\[2\]",
        ),
        (
            repeat(lambda x: x, 3, collect=True),
            {},
            r"with collect the block returns \(x, out\), a pair, got float32\[3, 4\]",
        ),
    ],
)
def test_wrong_inputs_and_outputs_per_copy_are_named(net, named, message):
    for call in [lambda: net.init(key(), X, **named), lambda: net.apply({}, X, **named)]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_block_that_changes_its_input_is_found_by_init():
    with pytest.raises(ValueError, match=r"repeat\[3\]: the layer must return what it receives"):
        repeat(dense(5), 3).init(key(), X)


def test_the_copies_are_initialized_alike_one_by_one_and_as_one_program():
    net = repeat(
        chain(
            dense(4), wire(t=param((2,), jax.nn.initializers.normal()))(lambda f, x: x * f.t()[0])
        ),
        3,
    )
    eager, traced = net.init(key(3), X), jax.jit(net.init)(key(3), X)
    close(eager, traced)
    one_by_one = [net.children[""].init(jax.random.fold_in(key(3), i), X) for i in range(3)]
    jax.tree.map(np.testing.assert_array_equal, eager, stacked(one_by_one))
    with jax.debug_key_reuse(False):
        other = jax.random.key(3, impl="rbg")
        close(net.init(other, X), jax.jit(net.init)(other, X))


# --- state that begins random ---------------------------------------------------------------------


def fourier(m: int = 3):
    def init_state(x, key):
        return {"b": jax.random.normal(key, (x.shape[-1], m))}

    return layer(
        None,
        lambda params, x, state: (x @ state["b"], state),
        init_state=init_state,
        label="fourier",
    )


def test_random_state_differs_by_copy_place_and_member():
    keep = wire(ff=fourier(4), mix=dense(4))(lambda f, x: f.mix(f.ff(x)))
    net = wire(a=keep, b=repeat(keep, 2), c=vmap(keep, 2, in_axes=None), d=scan(keep_carry))(
        lambda f, x: (f.a(x), f.b(x), f.c(x), f.d(x, XS))
    )
    state = net.init_state(X, key=key(1))
    found = [
        state["a"]["ff"]["b"],
        *state["b"]["ff"]["b"],
        *state["c"]["ff"]["b"],
        state["d"]["ff"]["b"],
    ]
    assert len({leaf.tobytes() for leaf in map(np.asarray, found)}) == 6
    close(net.init_state(X, key=key(1)), state)
    members = jax.vmap(lambda k: net.init_state(X, key=k))(jax.random.split(key(2), 3))
    assert len(np.unique(members["a"]["ff"]["b"], axis=0)) == 3
    jax.jit(functools.partial(net.apply, train=True))(
        net.init(key(3), X), X, state=state, key=key(4)
    )
    assert summary(net, X).state_bytes == 6 * 4 * 4 * 4


keep_carry = wire(ff=fourier(4))(lambda f, c, x: (c, f.ff(x)))


def test_one_key_may_serve_both_params_and_state():
    draw = layer(
        lambda key, x: {"w": jax.random.normal(key, (3,))},
        lambda params, x, state: (x, state),
        init_state=lambda x, key: {"w": jax.random.normal(key, (3,))},
    )
    for net in [draw, chain(draw), repeat(draw, 2)]:
        with jax.debug_key_reuse(False):
            params, state = net.init(key(5), X), net.init_state(X, key=key(5))
        drawn, kept = np.ravel(jax.tree.leaves(params)[0]), np.ravel(jax.tree.leaves(state)[0])
        assert not np.isin(drawn, kept).any()


def test_random_state_without_a_key_is_an_error_with_the_path():
    net = chain(first=batch_norm(), features=repeat(fourier(4), 2))
    with pytest.raises(
        ValueError, match="fourier: the state begins with random numbers: pass key= to init_state"
    ) as error:
        net.init_state(X)
    assert "in layer 'features'" in error.value.__notes__
    for stateful in [
        chain(batch_norm()),
        batch_norm(),
        remat(batch_norm()),
        repeat(batch_norm(), 2),
    ]:
        close(stateful.init_state(X, key=key()), stateful.init_state(X))  # a key does no harm


# --- captured outputs, summary, replace, cast, nesting --------------------------------------------


AUX = "**/aux"


def with_aux(inner):
    """A block that hands a loss term out: the square of what comes in."""
    return wire(inner=inner, aux=lambda v: v)(lambda f, x: _aux_and(f, x))


def _aux_and(f, x):
    f.aux(jnp.mean(x**2))
    return f.inner(x)


@pytest.mark.parametrize(
    "around_blocks", [lambda b: b, remat, lambda b: cast(b, "float32")], ids=["", "remat", "cast"]
)
def test_loss_terms_come_out_of_every_kind_of_iteration(around_blocks):
    block = with_aux(chain(dense(4), jnp.tanh))
    step = wire(block=block)(lambda f, c, x: (f.block(c + x),) * 2)
    net = wire(
        deep=repeat(around_blocks(block), 2, remat=True),
        wide=vmap(block, 2, in_axes=None),
        long=scan(around_blocks(step)),
    )(lambda f, x: f.long(f.wide(f.deep(x)).sum(0), XS)[1])
    params = weights(net, X)
    assert summary(net, X).parameters == 20 * 5

    def by_hand(params):
        terms, x = {"deep": [], "wide": [], "long": []}, X

        def run(name, p, x):
            terms[name].append(jnp.mean(x**2))
            return jnp.tanh(dense(4).apply(p["inner"]["0"], x))

        for i in range(2):
            x = run("deep", copy_of(params["deep"], i), x)
        x = sum(run("wide", copy_of(params["wide"], i), x) for i in range(2))
        for t in range(T):
            x = run("long", params["long"]["block"], x + XS[t])
        return {k: jnp.stack(v) for k, v in terms.items()}

    def captured(params):
        _, seen = capture(net, AUX)(params, X)
        return {"deep": seen["deep/aux"], "wide": seen["wide/aux"], "long": seen["long/block/aux"]}

    close(captured(params), by_hand(params), rtol=1e-4)
    total = lambda terms: lambda p: sum(jnp.sum(jnp.sin(v)) for v in terms(p).values())  # noqa: E731
    close(
        jax.jit(jax.grad(total(captured)))(params),
        jax.grad(total(by_hand))(params),
        rtol=1e-3,
        atol=1e-5,
    )


def test_capture_leaves_state_and_outputs_of_iterations_as_they_are():
    net = wire(a=scan(cell), b=vmap(repeat(noisy_block, 2), 2))(
        lambda f, x: f.b(f.a(x[0], x)[1][:2])
    )
    params, state = weights(net, XS), state_of(net, XS)
    expected = net.apply(params, XS, state=state, key=key(1), train=True)
    for pattern, paths in {
        "**": None,
        "a/**": {"a", "a/hidden", "a/norm", "a/drop"},
        "b/1": {"b/1"},
    }.items():
        result, seen = capture(net, pattern)(params, XS, state=state, key=key(1), train=True)
        close(result, expected, rtol=1e-4)
        assert paths is None or seen.keys() == paths
    _, seen = capture(net)(params, XS, state=state, key=key(1), train=True)
    assert seen["a/hidden"].shape == (T, B, D) and seen["b/1"].shape == (2, 2, B, D)
    assert seen["b"].shape == (2, B, D)  # vmap speaks for what shares its path


def test_a_scan_that_is_called_again_keeps_its_calls_apart():
    net = wire(rnn=scan(with_aux_cell))(lambda f, xs: f.rnn(f.rnn(H, xs)[0], xs)[1])
    params = weights(net, XS)
    _, seen = capture(net, AUX)(params, XS)
    assert seen.keys() == {"rnn/aux", "rnn/aux:1"} and seen["rnn/aux"].shape == (T,)
    assert np.all(seen["rnn/aux"] != seen["rnn/aux:1"])


@wire(mix=dense(4), aux=lambda v: v)
def with_aux_cell(f, carry, x):
    f.aux(jnp.mean(carry**2) + jnp.sum(x))
    return (jnp.tanh(f.mix(carry + x)),) * 2


def test_a_chosen_layer_that_cannot_be_captured_is_an_error_and_not_left_out():
    net = wire(blocks=with_aux(dense(4)), head=dense(4))(lambda f, x: f.head(jax.vmap(f.blocks)(x)))
    params = weights(net, X)
    assert set(capture(net)(params, X)[1]) == {"", "head"}
    for pattern in ["**/aux", "blocks", ["head", "blocks/**"]]:
        with pytest.raises(
            RuntimeError,
            match=r"capture: 'blocks.*' ran inside a raw JAX transform.*jaxnet.scan, vmap",
        ):
            capture(net, pattern)(params, X)
    assert set(capture(net, ["head", ""])(params, X)[1]) == {"", "head"}


def test_a_combinator_that_drops_what_was_captured_is_found():
    def opaque(inner):
        def call(run, params, state, key, x):
            y, state, _ = run(params, state, key, x)
            return y, state, {}

        return around(inner, call, label="opaque", rebuild=opaque)

    net = chain(inside=opaque(with_aux(dense(4))))
    assert set(capture(net)(weights(net, X), X)[1]) == {"", "inside"}
    with pytest.raises(RuntimeError, match="capture: 'inside/aux' ran inside a raw JAX transform"):
        capture(net, AUX)(weights(net, X), X)


def test_flops_of_a_scan_and_of_copies_side_by_side():
    """2 B D H + B H per dense layer, as often as it runs."""
    one = 2 * B * D * D + B * D
    rows = {
        row.path: row.flops
        for row in summary(wire(rnn=scan(plain_cell))(lambda f, xs: f.rnn(xs[0], xs)), XS).rows
    }
    assert rows["rnn/mix"] == T * one and rows["rnn"] == rows[""] == T * (one + B * D)
    rows = {
        row.path: row.flops for row in summary(vmap(chain(mix=dense(D)), 3, in_axes=None), X).rows
    }
    assert rows == {"": 3 * one, "mix": 3 * one}


plain_cell = wire(mix=dense(D))(lambda f, carry, x: (f.mix(carry + x), None))


def test_layers_inside_iterations_are_walked_and_replaced():
    net = chain(a=vmap(chain(mix=dense(4)), 2), b=repeat(chain(mix=dense(4)), 2))
    assert [path for path, _ in walk(net)] == ["", "a", "a", "a/mix", "b", "b", "b/mix"]
    shifted = replace(net, ("a/mix", "b/mix"), lambda path, inner: chain())
    x = XS[:2]
    close(shifted.apply({}, x), x)
    every = replace(net, "**", lambda path, inner: chain() if inner is dense(4) else inner)
    assert repr(every) == repr(shifted)
    with pytest.raises(KeyError, match="no layer matches 'c/mix'"):
        replace(net, ("a/mix", "c/mix"), chain())


def test_an_iteration_under_cast_carries_its_state():
    net = cast(scan(cell), "bfloat16")
    params, state = weights(net, H, XS), state_of(net, H, XS)
    (carry, ys), new = net.apply(params, H, XS, state=state, key=key(), train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((carry, ys, new))} == {jnp.dtype("float32")}
    (exact, _), _ = scan(cell).apply(params, H, XS, state=state, key=key(), train=True)
    assert 0 < np.abs(carry - exact).max() < 0.05


# --- around ---------------------------------------------------------------------------------------


def test_a_combinator_of_an_author_changes_parameters_and_outputs():
    """Weight normalization, w = g v / |v| (Salimans & Kingma 2016), as a layer around a layer."""

    def weight_norm(inner):
        def call(run, params, state, key, *inputs, **named):
            v = params["kernel"]
            kernel = v / jnp.linalg.norm(v, axis=0, keepdims=True) * params["gain"][None]
            return run({"kernel": kernel, "bias": params["bias"]}, state, key, *inputs, **named)

        def init(key, *inputs, **named):
            params = inner.init(key, *inputs, **named)
            return params | {"gain": jnp.linalg.norm(params["kernel"], axis=0)}

        return around(inner, call, label="weight_norm", rebuild=weight_norm, init=init)

    net = chain(first=weight_norm(dense(4)), second=dense(2))
    params = net.init(key(), X)
    assert set(params["first"]) == {"kernel", "bias", "gain"}
    plain = {"kernel": params["first"]["kernel"], "bias": params["first"]["bias"]}
    close(
        net.apply(params, X), dense(2).apply(params["second"], dense(4).apply(plain, X)), rtol=1e-4
    )
    assert set(capture(net)(params, X)[1]) == {"", "first", "second"}


def test_a_combinator_may_use_a_custom_derivative():
    def scaled_gradient(inner, factor):
        def call(run, params, state, key, x):
            @jax.custom_vjp
            def fn(params, x):
                return run(params, state, key, x)[0]

            def backward(residuals, g):
                grads = jax.vjp(lambda p, x: run(p, state, key, x)[0], *residuals)[1](g)
                return jax.tree.map(lambda leaf: factor * leaf, grads)

            fn.defvjp(lambda params, x: (fn(params, x), (params, x)), backward)
            return fn(params, x), state, {}

        return around(inner, call, label="scaled", rebuild=lambda new: scaled_gradient(new, factor))

    inner = chain(dense(4), jnp.tanh)
    net = repeat(scaled_gradient(inner, 3.0), 1, remat=True)
    params = weights(net, X)
    grads = jax.grad(lambda p: net.apply(p, X).sum())(params)
    expected = jax.grad(lambda p: repeat(inner, 1).apply(p, X).sum())(params)
    close(grads, jax.tree.map(lambda leaf: 3 * leaf, expected), rtol=1e-4)


def test_a_combinator_must_return_three_things():
    net = around(
        jnp.tanh, lambda run, params, state, key, x: x, label="forgetful", rebuild=lambda new: new
    )
    with pytest.raises(
        TypeError, match=r"forgetful: the function of `around` returns \(outputs, state, seen\)"
    ):
        net.apply({}, X)
