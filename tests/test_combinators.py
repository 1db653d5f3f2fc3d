"""Combinators against what they abbreviate, written out; programs are counted by the equations of
their jaxprs.
"""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from registry import close, floats, noisy_block, numbers, quick_to_compile, state_of, weights  # noqa: F401 (a fixture)

from jaxnet import tree
from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual
from jaxnet.core import layer, wire
from jaxnet.layers import batch_norm, dense, dropout, embed

X = numbers(floats(4, 4), seed=1)


def key(seed: int = 0):
    return jax.random.key(seed)


def equations(jaxpr) -> list[str]:
    """The names of the primitives in a program, with those inside its loops and calls."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            names += equations(inner)
    return names


def program(fn, *args) -> list[str]:
    return equations(jax.make_jaxpr(fn)(*args).jaxpr)


# --- chain, parallel, residual --------------------------------------------------------------------


def test_chain_applies_in_order_and_names_by_position_then_by_name():
    net = chain(dense(4), jnp.tanh, out=dense(2))
    params = weights(net, X)
    assert tree.paths(params) == ["0/bias", "0/kernel", "out/bias", "out/kernel"]
    h = dense(4).apply(params["0"], X)
    close(net.apply(params, X), dense(2).apply(params["out"], jnp.tanh(h)))


def test_the_first_layer_of_a_chain_may_take_several_inputs_and_an_empty_chain_is_the_identity():
    net = chain(lambda x, y, scale=1: scale * (x + y), jnp.negative)
    np.testing.assert_array_equal(net.apply({}, 1.0, 2.0, scale=3), -9)
    # The result of a layer is one input of the next.
    pairs = chain(lambda x: (x, 2 * x), lambda pair: pair[0] + pair[1])
    np.testing.assert_array_equal(pairs.apply({}, 1.0), 3)
    assert chain().apply({}, X) is X
    for wrong in [lambda: chain().apply({}, X, X), lambda: chain().apply({}, X, trian=True)]:
        with pytest.raises(
            TypeError, match="chain: without layers it is the identity of one input"
        ):
            wrong()


@pytest.mark.parametrize("combinator", [chain, parallel])
def test_two_children_of_one_name_are_an_error(combinator):
    with pytest.raises(ValueError, match=f"{combinator.__name__}: two children have the name '1'"):
        combinator(dense(2), dense(3), **{"1": dense(4)})


def test_parallel_gives_all_outputs_or_what_merge_makes_of_them():
    net = parallel(dense(4), jnp.tanh, last=jnp.negative)
    params = weights(net, X)
    outputs = net.apply(params, X)
    assert isinstance(outputs, tuple)
    close(outputs, (dense(4).apply(params["0"], X), jnp.tanh(X), -X))
    merged = parallel(dense(4), jnp.tanh, merge=lambda a, b: jnp.concatenate([a, b], -1))
    close(merged.apply(params, X), jnp.concatenate(outputs[:2], -1))
    close(parallel(jnp.add, jnp.multiply).apply({}, X, X), (X + X, X * X))  # each gets all inputs


def test_residual_adds_its_first_input_and_shares_the_path():
    net = chain(block=residual(lambda x, scale: scale * x))
    np.testing.assert_array_equal(net.apply({}, X, 2.0), 3 * X)
    inner = dense(4)
    params = weights(residual(inner), X)
    assert tree.paths(params) == ["bias", "kernel"]
    close(residual(inner).apply(params, X), X + inner.apply(params, X))


@pytest.mark.parametrize(
    "combinator, label",
    [(residual, "residual"), (lambda block: repeat(block, 2), r"repeat\[2\]")],
    ids=["residual", "repeat"],
)
@pytest.mark.parametrize(
    "block",
    [dense(3), lambda x: x.astype("bfloat16"), lambda x: (x, x)],
    ids=["shape", "dtype", "tree"],
)
def test_a_block_that_changes_its_input_cannot_be_added_or_repeated(combinator, label, block):
    net = chain(block=combinator(block))
    with pytest.raises(
        ValueError, match=rf"{label}: the layer must return what it receives, float32\[4, 4\], got"
    ) as error:
        net.apply(weights(net, X), X)
    assert "in layer 'block'" in error.value.__notes__


# --- repeat ---------------------------------------------------------------------------------------


def looped(block, n, params, x, state, key, train):
    """`repeat` written as a Python loop over copies; stateful."""
    states = []
    for i in range(n):
        params_i, state_i = jax.tree.map(lambda leaf: leaf[i], (params, state))  # noqa: B023 (used at once)
        x, new = block.apply(
            params_i, x, state=state_i, key=jax.random.fold_in(key, i), train=train
        )
        states.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def test_repeat_is_a_loop_over_copies_in_outputs_state_and_gradients():
    """The block is stateful and random, so keys and state must go to the right copy; remat and
    unroll change nothing.
    """
    n, block = 2, noisy_block
    params, state = weights(repeat(block, n), X), state_of(repeat(block, n), X)
    assert {leaf.shape[0] for leaf in jax.tree.leaves((params, state))} == {n}

    def run(apply):
        def loss(params):
            y, new_state = apply(params)
            return jnp.sum(jnp.sin(y)), (y, new_state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = run(lambda params: looped(block, n, params, X, state, key(5), True))
    for options in [{}, {"remat": True}, {"unroll": 2}]:
        net = repeat(block, n, **options)
        repeated = run(
            lambda params, net=net: net.apply(params, X, state=state, key=key(5), train=True)
        )
        close(repeated, expected, rtol=1e-4, atol=1e-5)


def test_unroll_is_that_of_the_scan():
    jaxpr = jax.make_jaxpr(repeat(jnp.tanh, 6, unroll=3).apply)({}, X)
    assert [
        equation.params["unroll"] for equation in jaxpr.eqns if equation.primitive.name == "scan"
    ] == [3]


def test_copy_i_is_initialized_with_fold_in_of_the_key_and_i():
    block = chain(dense(4), jnp.tanh)
    params = repeat(block, 3).init(key(7), X)
    for i in range(3):
        expected = block.init(jax.random.fold_in(key(7), i), X)
        close(jax.tree.map(lambda leaf: leaf[i], params), expected)  # noqa: B023 (used at once)


def test_each_copy_draws_its_own_numbers_and_keeps_its_own_state():
    counter = layer(
        None,
        lambda params, x, state: (x + state["n"], {"n": state["n"] + 1}),
        init_state=lambda x: {"n": jnp.zeros(())},
    )
    net = repeat(counter, 3)
    state = state_of(net, X)
    for call in range(3):
        outputs, state = net.apply({}, jnp.zeros(()), state=state)
        assert outputs == 3 * call  # each of the three copies adds how often it was called
    np.testing.assert_array_equal(state["n"], [3, 3, 3])
    survived = repeat(dropout(0.5), 2).apply({}, jnp.ones(10_000), key=key(), train=True)
    # 1/2 if both copies drew the same mask.
    assert abs(np.mean(survived != 0) - 1 / 4) < 4 * np.sqrt(3 / 16 / 10_000)


def test_further_inputs_and_keywords_of_repeat_are_the_same_for_all_copies_and_may_be_static():
    net = repeat(lambda x, y, mode, *, z=0: x * y + z if mode == "affine" else x, 3)
    # 5, 13, 29.
    np.testing.assert_array_equal(
        net.apply({}, jnp.float32(1), 2.0, "affine", z=jnp.float32(3)), 29
    )
    np.testing.assert_array_equal(net.apply({}, jnp.float32(1), 2.0, "identity"), 1)


def test_the_first_input_of_repeat_may_be_a_tree():
    net = repeat(lambda carry: {"a": carry["a"] + carry["b"], "b": carry["b"]}, 4)
    close(net.apply({}, {"a": X, "b": X}), {"a": 5 * X, "b": X})


def test_the_program_does_not_grow_with_the_number_of_copies():
    def size(n):
        net = repeat(noisy_block, n)
        params, state = weights(net, X), state_of(net, X)
        loss = lambda p: net.apply(p, X, state=state, key=key(), train=True)[0].sum()  # noqa: E731
        initialize = lambda key: net.init(key, X)  # noqa: E731
        return len(program(jax.grad(loss), params)), len(program(initialize, key()))

    assert size(2) == size(50)


@pytest.mark.parametrize("n", [2, 4])
def test_params_for_another_number_of_copies_are_an_error(n):
    params = weights(repeat(dense(4), n), X)
    with pytest.raises(
        ValueError,
        match=(
            r"repeat\[3\]: leaves of params and state must be stacked, \[3, ...\], got "
            rf"float32\[{n}"
        ),
    ):
        repeat(dense(4), 3).apply(params, X)


@pytest.mark.parametrize("n", [-1, 2.0, "3", True, np.bool_(True), None])
def test_the_number_of_copies_is_an_int_of_at_least_0(n):
    with pytest.raises(ValueError, match="repeat: n must be an int of at least 0, got"):
        repeat(dense(4), n)


# --- remat ----------------------------------------------------------------------------------------


def gradient_program(net, params):
    return program(jax.grad(lambda p: jnp.sum(net.apply(p, X))), params)


def test_remat_computes_again_in_the_backward_pass_and_changes_no_number():
    plain = chain(dense(4), jnp.sin, dense(4), jnp.sin)
    recomputed = remat(plain)
    params = weights(plain, X)
    close(recomputed.apply(params, X), plain.apply(params, X))
    gradients = [
        jax.grad(lambda p, net=net: jnp.sum(net.apply(p, X)))(params) for net in (plain, recomputed)
    ]
    close(*gradients)
    # The backward pass needs both products again and the first sine, whose output is an input; of
    # the last only the cosine.
    assert gradient_program(plain, params).count("sin") == 2
    assert gradient_program(recomputed, params).count("sin") == 3
    more = gradient_program(recomputed, params).count("dot_general") - gradient_program(
        plain, params
    ).count("dot_general")
    assert more == 2
    saved = remat(plain, policy=jax.checkpoint_policies.dots_saveable)
    assert gradient_program(saved, params).count("dot_general") == gradient_program(
        plain, params
    ).count("dot_general")
    assert gradient_program(saved, params).count("sin") == 3


def test_remat_of_repeat_computes_each_block_again():
    block = chain(dense(4), jnp.sin)
    plain, recomputed = repeat(block, 3), repeat(block, 3, remat=True)
    params = weights(plain, X)
    assert gradient_program(plain, params).count("dot_general") == 3  # forward, and two gradients
    assert gradient_program(recomputed, params).count("dot_general") == 4


def test_remat_carries_state_keys_static_inputs_and_keywords():
    @wire(norm=batch_norm(), drop=dropout(0.5))
    def block(f, x, mode, flip=False, *, shift=None):
        assert mode == "normal" and (shift is None or shift.shape == X.shape)
        x = f.drop(f.norm(x)) + (0 if shift is None else shift)
        return -x if flip else x

    params, state = weights(block, X, "normal"), state_of(block, X, "normal")

    def call(net):
        return net.apply(params, X, "normal", True, shift=X, state=state, key=key(3), train=True)

    close(call(remat(block)), call(block))


# --- cast -----------------------------------------------------------------------------------------


def test_cast_computes_in_another_dtype_and_returns_the_dtype_that_came_in():
    seen = []

    def note(x):
        seen.append(x.dtype)
        return x

    net = cast(chain(dense(4), note, batch_norm(), note, dense(4)), jnp.bfloat16)
    params, state = weights(net, X), state_of(net, X)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}
    seen.clear()

    def loss(params):
        y, new_state = net.apply(params, X, state=state, train=True)
        return jnp.sum(y), (y, new_state)

    grads, (y, new_state) = jax.grad(loss, has_aux=True)(params)
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, y, new_state))} == {jnp.dtype("float32")}
    exact, _ = chain(*net.children[""].children.values()).apply(params, X, state=state, train=True)
    error = np.abs(y - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05  # bfloat16 has 8 bits: it was used, and it was enough


def test_cast_leaves_integers_alone_and_returns_float32_where_no_float_came_in():
    def look(ids, table):
        assert ids.dtype == jnp.int32 and table.dtype == jnp.bfloat16
        return ids, table

    outputs = cast(look, "bfloat16").apply({}, jnp.arange(2), X)
    assert [y.dtype for y in outputs] == [jnp.int32, jnp.float32]
    net = cast(chain(embed(4, 4), dense(4)), "bfloat16")
    params = net.init(key(), jnp.arange(2))
    assert net.apply(params, jnp.arange(2)).dtype == jnp.float32
    assert cast(lambda ids: ids, "float16").apply({}, jnp.arange(2)).dtype == jnp.int32


def test_cast_of_keywords_and_of_what_is_static():
    net = cast(
        lambda x, mode, *, y: (
            (x + y).astype("float32") if mode == "add" and x.dtype == y.dtype else None
        ),
        "float16",
    )
    assert net.apply({}, X, "add", y=X).dtype == jnp.float32
    assert net.apply({}, X, "other", y=X) is None


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_cast_is_to_floats_only(dtype):
    with pytest.raises(
        TypeError, match=f"cast: the dtype to compute in must be a float, got {dtype}"
    ):
        cast(dense(4), dtype)


# --- all together ---------------------------------------------------------------------------------


def test_combinators_nest_in_any_order():
    """Each of the six around the next one, against the same network with plain JAX in the place of
    each combinator.
    """
    inner = chain(norm=batch_norm(), mix=dense(4))
    net = remat(
        chain(
            blocks=repeat(
                residual(cast(parallel(a=inner, b=jnp.tanh, merge=jnp.add), "float32")), 2
            )
        )
    )
    params, state = weights(net, X), state_of(net, X)
    assert tree.paths(params) == [
        f"blocks/a/{p}" for p in ["mix/bias", "mix/kernel", "norm/bias", "norm/scale"]
    ]

    def plain(params, state, x):
        states = []
        for i in range(2):
            params_i, state_i = jax.tree.map(
                lambda leaf: leaf[i],  # noqa: B023 (used at once)
                (params["blocks"]["a"], state["blocks"]["a"]),
            )
            y, norm = batch_norm().apply(params_i["norm"], x, state=state_i["norm"], train=True)
            x = x + dense(4).apply(params_i["mix"], y) + jnp.tanh(x)
            states.append({"blocks": {"a": {"norm": norm}}})
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    actual = jax.jit(functools.partial(net.apply, train=True))(params, X, state=state)
    close(actual, jax.jit(plain)(params, state, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "net, lines",
    [
        (dense(8), "dense(8)"),
        (repeat(residual(dense(4)), 3), "repeat[3](residual(dense(4)))"),
        (remat(cast(dropout(0.1), "bfloat16")), "remat(cast[bfloat16](dropout(0.1)))"),
        (chain(), "chain"),
        (
            chain(embed(10, 4), blocks=repeat(chain(dense(4), jax.nn.relu), 2), head=dense(10)),
            """chain(
  0: embed(10, 4)
  blocks: repeat[2](chain(
    0: dense(4)
    1: relu
  ))
  head: dense(10)
)""",
        ),
        (
            wire(a=parallel(dense(1), merge=jnp.negative))(lambda f, x: f.a(x)),
            "wire(\n  a: parallel(\n    0: dense(1)\n  )\n)",
        ),
    ],
    ids=range(6),
)
def test_a_network_prints_as_it_is_built(net, lines):
    assert repr(net) == lines
