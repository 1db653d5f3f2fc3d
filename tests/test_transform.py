"""capture, replace, summary, walk: against the same networks written out, and costs against
formulas and XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import (
    CASES,
    close,
    floats,
    noisy_block,
    numbers,
    quick_to_compile,  # noqa: F401 (a fixture)
    state_of,
    transformer_block,
    weights,
)

from jaxnet import tree
from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual
from jaxnet.core import call, layer, param, wire
from jaxnet.layers import batch_norm, dense, dropout, layer_norm
from jaxnet.transform import capture, replace, summary, walk

X = numbers(floats(4, 4), seed=1)


def key(seed: int = 0):
    return jax.random.key(seed)


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- walk -----------------------------------------------------------------------------------------


def test_walk_gives_every_layer_with_its_path_parents_first():
    net = chain(
        stem=dense(4),
        blocks=repeat(residual(chain(norm=layer_norm(), up=dense(4))), 2),
        head=jnp.tanh,
    )
    assert [(path, layer.label) for path, layer in walk(net)] == [
        ("", "chain"),
        ("stem", "dense(4)"),
        ("blocks", "repeat[2]"),
        ("blocks", "residual"),
        ("blocks", "chain"),
        ("blocks/norm", "layer_norm"),
        ("blocks/up", "dense(4)"),
        ("head", "tanh"),
    ]


# --- capture --------------------------------------------------------------------------------------


@pytest.mark.sample(20)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_capture_changes_neither_result_nor_state(case):
    """Bit for bit, in training; by specs if there is nothing inside."""
    params, state = case.start()

    def plain(params, state):
        return call(case.net, params, *case.data(), state=state, key=key(3), train=True)

    def captured(params, state):
        stateful = {} if state is None else {"state": state}
        result, seen = capture(case.net)(params, *case.data(), key=key(3), train=True, **stateful)
        return result if state is not None else (result, None), seen

    expected = jax.eval_shape(plain, params, state)
    assert jax.eval_shape(captured, params, state)[0] == expected
    if case.net.children:
        equal(captured(params, state)[0], plain(params, state))


def test_capture_gives_every_output_by_path():
    net = chain(encoder=chain(up=dense(4), act=jnp.tanh), head=dense(2))
    params = weights(net, X)
    result, seen = capture(net)(params, X)
    up = dense(4).apply(params["encoder"]["up"], X)
    expected = {
        "": result,
        "encoder": jnp.tanh(up),
        "encoder/act": jnp.tanh(up),
        "encoder/up": up,
        "head": result,
    }
    close(seen, expected)
    assert list(seen) == sorted(seen)


def test_outputs_inside_repeat_are_stacked_and_those_of_the_copies_are_at_its_path():
    block = chain(mix=dense(4), act=jnp.tanh)
    net = chain(blocks=repeat(repeat(block, 2), 3))
    params = weights(net, X)
    _, seen = capture(net, "blocks/**")(params, X)
    assert seen.keys() == {"blocks", "blocks/mix", "blocks/act"}
    x, mixes, acts = X, [], []
    for i in range(3):
        for j in range(2):
            kernel, bias = (
                params["blocks"]["mix"]["kernel"][i, j],
                params["blocks"]["mix"]["bias"][i, j],
            )
            mixes.append(x @ kernel + bias[None])
            x = jnp.tanh(mixes[-1])
            acts.append(x)
    stacked = {
        name: jnp.stack(xs).reshape(3, 2, 4, 4) for name, xs in [("mix", mixes), ("act", acts)]
    }
    close(
        seen,
        {"blocks": stacked["act"], "blocks/act": stacked["act"], "blocks/mix": stacked["mix"]},
        rtol=1e-4,
    )


def test_a_layer_called_again_has_its_call_in_the_path():
    net = wire(a=dense(4), drop=dropout(0.5))(lambda f, x: f.drop(f.a(f.drop(f.a(f.a(x))))))
    params = weights(net, X)
    _, seen = capture(net)(params, X, key=key(), train=True)
    assert list(seen) == ["", "a", "a:1", "a:2", "drop", "drop:1"]
    a = functools.partial(dense(4).apply, params["a"])
    close([seen["a"], seen["a:1"], seen["a:2"]], [a(X), a(a(X)), a(seen["drop"])], rtol=1e-4)


def test_a_shared_repeat_keeps_the_calls_of_its_copies_apart():
    net = wire(blocks=repeat(chain(mix=dense(4)), 2))(lambda f, x: f.blocks(f.blocks(x)))
    params = weights(net, X)
    result, seen = capture(net, "blocks/mix")(params, X)
    assert list(seen) == ["blocks/mix", "blocks/mix:1"] and seen["blocks/mix"].shape == (2, 4, 4)
    close(seen["blocks/mix:1"][1], result)


def test_what_shares_a_path_is_covered_by_the_outermost_layer():
    net = chain(a=residual(dense(4)), b=remat(cast(chain(inner=dense(4)), "bfloat16")))
    params = weights(net, X)
    result, seen = capture(net)(params, X)
    assert list(seen) == ["", "a", "b", "b/inner"]
    close(seen["a"], X + dense(4).apply(params["a"], X))
    assert seen["b"].dtype == jnp.float32 and seen["b/inner"].dtype == jnp.bfloat16
    equal(seen["b"], result)


def test_capture_carries_state_and_keeps_what_it_does_not_capture():
    net = chain(
        stem=batch_norm(),
        blocks=repeat(noisy_block, 2),
        tail=parallel(batch_norm(), jnp.tanh, merge=jnp.add),
    )
    params, state = weights(net, X), state_of(net, X)
    expected = net.apply(params, X, state=state, key=key(3), train=True)
    for pattern, seen_paths in [
        ("blocks/3", ["blocks/3"]),
        ("**/1", ["blocks/1", "tail/1"]),
    ]:
        result, seen = capture(net, pattern)(params, X, state=state, key=key(3), train=True)
        assert list(seen) == seen_paths
        close(result, expected)
    with pytest.raises(ValueError, match="chain: this layer carries state"):
        capture(net)(params, X)
    with pytest.raises(TypeError, match="this layer has no state"):
        capture(dense(4))(weights(dense(4), X), X, state={"mean": X})


@pytest.mark.parametrize(
    "first", [jnp.zeros(()), (jnp.zeros(()),), {}], ids=["array", "tuple", "empty"]
)
def test_capture_keeps_a_state_of_any_form(first):
    count = layer(
        None,
        lambda params, x, state: (x, jax.tree.map(lambda s: s + 1, state)),
        init_state=lambda x: first,
    )
    net = wire(count=count, plain=jnp.tanh, block=repeat(chain(count), 2))(
        lambda f, x: f.block(f.count(f.plain(f.count(x))))
    )
    state = state_of(net, X)
    expected = net.apply({}, X, state=state)
    result, seen = capture(net)({}, X, state=state)
    close(result, expected)
    assert list(seen) == ["", "block", "block/0", "count", "count:1", "plain"]
    close(capture(net)({}, X, state=result[1])[0], net.apply({}, X, state=expected[1]))


def test_captured_outputs_are_ordinary_values_under_jit_grad_and_vmap():
    net = chain(up=dense(4), act=jnp.tanh, down=dense(4))
    params = weights(net, X)

    def penalty(params, x):
        _, seen = capture(net, "act")(params, x)
        return jnp.sum(seen["act"] ** 2)

    def by_hand(params, x):
        return jnp.sum(jnp.tanh(dense(4).apply(params["up"], x)) ** 2)

    grads = jax.jit(jax.grad(penalty))(params, X)
    close(grads["up"], jax.grad(by_hand)(params, X)["up"], rtol=1e-4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["down"]))
    close(
        jax.vmap(penalty, (None, 0))(params, X),
        jnp.stack([by_hand(params, row) for row in X]),
        rtol=1e-4,
    )


def test_what_is_called_inside_a_raw_transform_is_left_out():
    @wire(cell=chain(mix=dense(4)), head=dense(4))
    def net(f, x):
        return f.head(jax.lax.map(f.cell, x))

    params = weights(net, X)
    with jax.checking_leaks():
        result, seen = capture(chain(net=net))({"net": params}, X)
    assert list(seen) == ["", "net", "net/head"]
    close(result, net.apply(params, X))


def test_captured_outputs_may_be_trees():
    net = chain(split=lambda x: {"a": x, "b": (x, None)}, join=lambda parts: parts["a"])
    _, seen = capture(net)({}, X)
    equal(seen["split"], {"a": X, "b": (X, None)})


@pytest.mark.parametrize(
    "function", [capture, lambda net, pattern: replace(net, pattern, dense(1))]
)
def test_a_pattern_for_no_layer_is_an_error(function):
    net = chain(encoder=chain(up=dense(4)), head=dense(2))
    with pytest.raises(
        KeyError, match="no layer matches 'encodr/up'; the layers are encoder, encoder/up, head"
    ):
        function(net, "encodr/up")
    with pytest.raises(KeyError, match="no layer matches 'head/kernel'"):  # layers, not parameters
        function(net, "head/kernel")


# --- replace --------------------------------------------------------------------------------------


def test_replace_exchanges_layers_by_path_and_keeps_parameters_usable():
    net = chain(
        stem=dense(4),
        blocks=repeat(residual(chain(norm=layer_norm(), up=dense(4))), 2),
        norm=layer_norm(),
    )
    params = weights(net, X)
    identity = replace(net, "**/norm", chain())
    assert "layer_norm" not in repr(identity) and "layer_norm" in repr(net)
    without = {"stem": params["stem"], "blocks": {"up": params["blocks"]["up"]}}
    x = dense(4).apply(params["stem"], X)
    for i in range(2):
        up = jax.tree.map(lambda leaf: leaf[i], params["blocks"]["up"])  # noqa: B023 (used at once)
        x = x + dense(4).apply(up, x)
    close(identity.apply(without, X), x, rtol=1e-4)
    same = replace(net, "**", lambda path, layer: layer)
    close(same.apply(params, X), net.apply(params, X))


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jnp.tanh, lambda: dense(2)])
def test_replace_refuses_a_function_that_does_not_take_path_and_layer(activation):
    """The optional second argument of `gelu` and `tanh` is not for a layer."""
    net = chain(hidden=dense(8), act=jax.nn.silu, out=dense(2))
    name = activation.__name__
    with pytest.raises(TypeError, match=rf"new\(path, layer\), but {name} does not.*pass chain\("):
        replace(net, "act", activation)


def test_a_function_replaces_an_activation_inside_a_chain():
    net = chain(hidden=dense(8), act=jax.nn.silu, out=dense(2))
    x = jnp.ones((3, 4))
    params = net.init(jax.random.key(0), x)
    expected = chain(hidden=dense(8), act=jax.nn.relu, out=dense(2)).apply(params, x)
    for new in (chain(jax.nn.relu), lambda path, layer: jax.nn.relu):
        np.testing.assert_array_equal(replace(net, "act", new).apply(params, x), expected)


def test_replace_edits_layers_by_a_function_of_path_and_layer():
    net = chain(a=dense(4), b=chain(c=dense(4), act=jnp.tanh))
    params = weights(net, X)
    paths = []

    def scaled(path, layer):
        paths.append(path)
        return chain_sharing_path(layer)

    def chain_sharing_path(inner):
        return layer(inner.init, lambda params, x: 2 * inner.apply(params, x), label="scaled")

    doubled = replace(net, "**/c", scaled)
    assert paths == ["b/c"] and doubled.children["b"].children["c"].label == "scaled"
    h = dense(4).apply(params["a"], X)
    close(doubled.apply(params, X), jnp.tanh(2 * dense(4).apply(params["b"]["c"], h)), rtol=1e-4)
    ablated = replace(net, "b", lambda path, layer: jnp.negative)  # a plain function is a layer
    close(ablated.apply({"a": params["a"]}, X), -h)


def test_a_star_is_one_name_and_replaces_no_root():
    net = chain(a=dense(4), b=chain(c=dense(4)))
    assert repr(replace(net, "*", chain())) == "chain(\n  a: chain\n  b: chain\n)"
    assert repr(replace(net, "", dense(3))) == "dense(3)"


def test_replace_reaches_into_every_combinator_and_keeps_its_options():
    net = remat(
        parallel(
            repeat(cast(residual(dense(4)), "float32"), 3, remat=True),
            wire(a=dense(4))(lambda f, x: f.a(x)),
            merge=jnp.add,
        )
    )
    out = replace(net, "**", lambda path, layer: layer if layer.children else jnp.sin)
    # A layer that comes back unchanged is searched further, so that "every layer without children"
    # can be said.
    assert repr(out) == repr(net).replace("dense(4)", "sin")
    assert repr(replace(net, "**", lambda path, layer: layer)) == repr(net)
    out = replace(replace(net, "0", lambda path, layer: repeat(jnp.sin, 2)), "1/a", chain(jnp.cos))
    close(out.apply({}, X), jnp.sin(jnp.sin(X)) + jnp.cos(X))


@pytest.mark.parametrize(
    "around",
    [
        functools.partial(repeat, n=2, remat=True),
        functools.partial(repeat, n=2, unroll=2),
        functools.partial(remat, policy=jax.checkpoint_policies.dots_saveable),
        functools.partial(cast, dtype="bfloat16"),
        lambda inner: parallel(inner, merge=jnp.negative),
    ],
    ids=["repeat remat", "repeat unroll", "remat policy", "cast dtype", "parallel merge"],
)
def test_a_network_with_the_same_parts_is_the_same_program(around):
    def gradient(net):
        params = weights(net, X)
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(net.apply(p, X))))(params))

    net = around(chain(dense(4), jnp.sin, dense(4), jnp.sin))
    assert gradient(replace(net, "**/1", lambda path, layer: jnp.sin)) == gradient(net)


def test_what_a_replacing_function_returns_must_be_a_layer():
    with pytest.raises(
        TypeError, match="replace: the new layer at 'a' must be a layer or a function"
    ):
        replace(chain(a=dense(4)), "a", lambda path, layer: None)


# --- summary --------------------------------------------------------------------------------------


def test_a_summary_prints_as_a_table():
    net = chain(
        stem=dense(8),
        blocks=repeat(residual(chain(norm=layer_norm(), mix=dense(8))), 3),
        norm=batch_norm(),
    )
    # FLOPs: dense 2 B D H + B H; layer_norm 9 operations on 4 x 8 numbers and 5 on 4 (three
    # divisions by 8, + eps, 1 / sqrt); batch_norm 3 on 4 x 8 and 3 on 8; the sum of the residual
    # 4 x 8; three copies of all layers in the blocks.
    text = """\
path         layer                       output         parameters  bytes  FLOPs
--------------------------------------------------------------------------------
.            chain                       float32[4, 8]         312  1,248  2,996
stem         dense(8)                    float32[4, 8]          32    128    224
blocks       repeat[3](residual(chain))  float32[4, 8]         264  1,056  2,652
blocks/norm  layer_norm                  float32[4, 8]          48    192    924
blocks/mix   dense(8)                    float32[4, 8]         216    864  1,632
norm         batch_norm                  float32[4, 8]          16     64    120
312 parameters, 1,248 bytes, 2,996 FLOPs per call, 64 bytes of state"""
    assert str(summary(net, floats(4, 3))) == text


@pytest.mark.sample(60)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("train", [False, True])
def test_parameters_bytes_and_rows_are_those_of_init(case, train):
    params, state = case.start()
    table = summary(case.net, *case.inputs, train=train)
    assert (table.parameters, table.bytes, table.state_bytes) == (
        tree.count(params),
        tree.bytes_of(params),
        tree.bytes_of(state),
    )
    rows = {row.path: row for row in table.rows}
    assert (
        list(rows) == list(dict.fromkeys(path for path, _ in walk(case.net)))
        and rows[""].flops == table.flops
    )
    for path, row in rows.items():
        inside = [leaf for name, leaf in tree.flatten(params).items() if tree.matches(name, path)]
        assert (row.parameters, row.bytes) == (tree.count(inside), tree.bytes_of(inside)), path


@jax.custom_vjp
def scaled_gradient(x):
    return jnp.tanh(x)


scaled_gradient.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (2 * g,))


def flops(net, *inputs, **options):
    return summary(net, *inputs, **options).flops


B, D, H = 4, 4, 8


def test_flops_of_dense_are_two_a_multiply_add_and_one_a_bias():
    assert flops(dense(H), floats(B, D)) == 2 * B * D * H + B * H
    assert flops(dense(H, bias=False), floats(2, B, D)) == 2 * 2 * B * D * H
    assert flops(repeat(dense(D), 5), floats(B, D)) == 5 * (2 * B * D * D + B * D)
    assert flops(repeat(repeat(dense(D), 5), 3, remat=True), floats(B, D)) == 15 * (
        2 * B * D * D + B * D
    )


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x @ x, 2 * 4**3),
        (lambda x: jnp.einsum("ij,kj->ik", x, x), 2 * 4**3),
        # A batched product: one multiply-add an element.
        (lambda x: jnp.einsum("ij,ij->i", x, x), 2 * 4**2),
        (lambda x: jnp.tanh(x) + 1, 2 * 4**2),
        (lambda x: x.sum(0), 4**2),  # one an input element
        (lambda x: x.T.reshape(2, 8)[:, ::2], 0),  # moving data is free
        # The dearest branch.
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, jnp.negative, x), 2 * 4**3),
        (lambda x: jax.lax.scan(lambda h, row: (h + row, None), x[0], x)[0], 4 * 4),
        # A scan; and its counter.
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x), 3 * (2 * 4**3 + 1)),
        (lambda x: jax.jit(jax.checkpoint(lambda x: x @ x))(x), 2 * 4**3),
        # One turn.
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), 2 * 4**3),
        (lambda x: jax.nn.relu(x), 4**2),  # through a custom_jvp
        (lambda x: scaled_gradient(x), 4**2),
        (
            lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID"),
            4 * 4,
        ),  # a window an output
        (
            lambda x: jax.lax.conv(x[None, None], jnp.ones((3, 1, 2, 2)), (1, 1), "VALID"),
            2 * (3 * 3 * 3) * (2 * 2),
        ),
    ],
)
def test_flops_of_a_body_are_counted_by_equation(function, expected):
    assert flops(function, floats(4, 4)) == expected


@pytest.mark.cpu_only("it counts the FLOPs of the CPU's program")
def test_flops_are_those_that_xla_counts():
    net = chain(dense(H), dense(D), dense(H))
    params = weights(net, X)
    xla = jax.jit(net.apply).lower(params, X).compile().cost_analysis() or {}
    assert flops(net, X) == xla["flops"] == 3 * 2 * B * D * H + B * (H + D + H)


def test_a_layer_called_twice_has_its_weights_counted_once_and_its_flops_twice():
    net = wire(a=dense(4), table=param((4, 4), jax.nn.initializers.ones))(
        lambda f, x: f.a(f.a(x)) @ f.table()
    )
    table = summary(net, X)
    assert table.parameters == 20 + 16
    assert [(row.path, row.parameters, row.flops) for row in table.rows] == [
        ("", 36, 2 * (2 * 64 + 16) + 2 * 64),
        ("a", 20, 2 * (2 * 64 + 16)),
        ("table", 16, 0),
    ]


def test_what_is_inside_a_raw_transform_has_parameters_and_its_parent_the_flops():
    net = wire(cell=dense(4))(lambda f, x: jax.vmap(f.cell)(x))
    rows = summary(net, X).rows
    assert [(row.path, row.output, row.parameters, row.flops) for row in rows] == [
        ("", "float32[4, 4]", 20, 2 * 64 + 16),
        ("cell", "", 20, 0),
    ]


def test_a_summary_runs_nothing_and_takes_the_inputs_that_the_network_takes():
    huge = jax.ShapeDtypeStruct((10**6, 10**6, 4), jnp.float32)
    assert (
        summary(chain(layer_norm(), dense(4)), huge).rows[0].output
        == "float32[1000000, 1000000, 4]"
    )
    net = wire(a=dense(4), b=dense(4))(
        lambda f, x, y, mode, *, flip=False: f.a(x) + f.b(y) if flip and mode == "add" else x
    )
    assert summary(net, X, X, "add", flip=True).parameters == 40
    assert (
        summary(transformer_block, floats(1, 4, 4), train=True).flops
        > summary(transformer_block, floats(1, 4, 4)).flops
    )
