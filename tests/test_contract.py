"""The contract's second half: parameters against the definition, several bodies, named inputs,
messages to newcomers.
"""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import CASES, close, numbers, quick_to_compile, state_of, weights  # noqa: F401 (a fixture)

from jaxnet import (
    cast,
    chain,
    conv,
    dense,
    dropout,
    embed,
    layer,
    parallel,
    param,
    remat,
    repeat,
    residual,
    scan,
    tree,
    vmap,
    wire,
)
from jaxnet.core import call, output_specs
from jaxnet.layers import batch_norm, layer_norm

X = numbers(jax.ShapeDtypeStruct((4, 4), jnp.float32), seed=1)
IMAGES = numbers(jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32), seed=2)


def key(seed: int = 0):
    return jax.random.key(seed)


# --- parameters of another architecture -----------------------------------------------------------


def scaled(shape):
    return layer(
        lambda key, x: {"w": jnp.ones(shape)},
        lambda params, x: x * jnp.sum(params["w"]),
        label="scaled",
    )


OTHERS = {
    "more features": (
        dense(4),
        dense(6),
        X,
        r"'bias' in params must be float32\[4\].*got float32\[6\]",
    ),
    "a bias too many": (
        dense(4, bias=False),
        dense(4),
        X,
        r"params must have no 'bias', got float32\[4\].*has kernel",
    ),
    "a bias too few": (dense(4), dense(4, bias=False), X, r"dense\(4\): no 'bias' in params"),
    "conv features": (
        conv(16, 3),
        conv(8, 3),
        IMAGES,
        r"'bias' in params must be float32\[16\] .*got float32\[8\]",
    ),
    "conv without bias": (
        conv(16, 3, bias=False),
        conv(8, 3, bias=False),
        IMAGES,
        (
            r"'kernel' in params must be float32\[3, 3, 3, 16\] for these inputs, got "
            r"float32\[3, 3, 3, 8\]"
        ),
    ),
    "conv window": (
        conv(8, 5),
        conv(8, 3),
        IMAGES,
        r"'kernel' in params must be float32\[5, 5, 3, 8\]",
    ),
    "conv groups": (
        conv(6, 3),
        conv(6, 3, groups=3),
        IMAGES,
        "last axis must be 1|'kernel' in params must be",
    ),
    "embed width": (
        embed(10, 8),
        embed(10, 4),
        jnp.arange(3),
        r"must be float32\[10, 8\] .*got float32\[10, 4\]",
    ),
    "embed rows": (
        embed(20, 4),
        embed(10, 4),
        jnp.arange(3),
        r"must be float32\[20, 4\] .*got float32\[10, 4\]",
    ),
    "no scale": (layer_norm(scale=False), layer_norm(), X, "params must have no 'scale'"),
    "a user's layer": (
        scaled((2, 3)),
        scaled((3, 2)),
        X,
        r"scaled: 'w' in params must be float32\[2, 3\]",
    ),
    "a user's scalar": (
        scaled(()),
        scaled((1,)),
        X,
        r"scaled: 'w' in params must be float32\[\] .*got float32\[1\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize(
    "around",
    [lambda net: net, remat, lambda net: vmap(net, 2, in_axes=None)],
    ids=["", "remat", "vmap"],
)
def test_parameters_of_another_architecture_are_refused(case, around):
    ours, theirs, x, message = case
    net = chain(outer=around(ours))
    params = weights(chain(outer=around(theirs)), x)
    for run in [net.apply, jax.jit(net.apply), lambda *args: jax.eval_shape(net.apply, *args)]:
        with pytest.raises(ValueError, match=message) as error:
            run(params, x)
        assert "in layer 'outer'" in error.value.__notes__
    net.apply(weights(net, x), x)


@pytest.mark.sample(30)
@pytest.mark.parametrize("name", CASES)
def test_every_layer_refuses_parameters_and_state_that_it_would_not_make(name):
    """For each leaf: another size of each axis, one more axis, a leaf that is missing, a leaf that
    is unknown.
    """
    case = CASES[name]
    params, state = case.start()

    def refused(params, state):
        with pytest.raises((ValueError, TypeError)) as error:
            jax.eval_shape(
                lambda p, s, x: call(case.net, p, *x, state=s, key=key(1), train=True),
                params,
                state,
                case.inputs,
            )
        return str(error.value)

    def changed(tree_, path, leaf):
        flat = tree.flatten(tree_)
        return tree.unflatten({**flat, path: leaf})

    for path, leaf in tree.flatten(params).items():
        for axis in range(leaf.ndim):
            refused(changed(params, path, jnp.concatenate([leaf, leaf], axis)), state)
        refused(changed(params, path, leaf[None]), state)
        refused(tree.split(params, path)[1], state)
        folder = path.rpartition("/")[0]
        text = refused(changed(params, f"{folder}/foreign".lstrip("/"), leaf), state)
        assert "foreign" in text
    for path, leaf in tree.flatten(state or {}).items():
        refused(params, changed(state, path, jnp.concatenate([leaf, leaf], -1)))
        refused(params, changed(state, path, leaf[None]))


def test_state_of_another_width_is_refused():
    net = chain(norm=batch_norm(scale=False, bias=False))
    with pytest.raises(
        ValueError, match=r"last axis must be 3|'mean' in state must be float32\[4\]"
    ):
        net.apply({}, X, state=state_of(net, X[:, :3]))
    count = layer(
        None,
        lambda p, x, state: (x, state),
        init_state=lambda x: {"n": jnp.zeros(())},
        label="count",
    )
    with pytest.raises(
        ValueError,
        match=r"count: 'n' in state must be float32\[\] for these inputs, got float32\[2\]",
    ):
        count.apply({}, X, state={"n": jnp.zeros(2)})
    with pytest.raises(ValueError, match="count: state must have no 'm'"):
        count.apply({}, X, state={"n": jnp.zeros(()), "m": X})


def test_parameters_for_a_child_without_any_are_refused():
    net = chain(first=dense(4), act=jnp.tanh)
    params = weights(net, X)
    with pytest.raises(
        ValueError,
        match=(
            r"chain: params must have no 'act', got \{'w': float32\[4, 4\]\}; tanh has no "
            r"parameters"
        ),
    ):
        net.apply(params | {"act": {"w": X}}, X)
    close(net.apply(params | {"act": {}}, X), net.apply(params, X))


def test_other_dtypes_batches_and_kinds_of_numbers_are_the_same_architecture():
    net = chain(dense(4), scaled(()))
    params = weights(net, X)
    expected = net.apply(params, X)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    assert net.apply(half, X.astype("bfloat16")).dtype == jnp.bfloat16
    close(net.apply(jax.tree.map(np.asarray, params), np.asarray(X)), expected)
    close(chain(scaled(())).apply({"0": {"w": 2.0}}, X), 2 * X)
    close(net.apply(params, X[:1]), expected[:1])
    close(jax.vmap(net.apply, (None, 0))(params, X), expected)


def test_the_definition_is_traced_once_per_layer_and_shape():
    traces = []

    def init(key, x):
        traces.append(x.shape)
        return {"w": jnp.ones(x.shape[-1])}

    net = chain(layer(init, lambda params, x: x * params["w"][None]))
    params = {"0": {"w": jnp.ones(4)}}
    for _ in range(3):
        jax.jit(lambda p, x: net.apply(p, x)).lower(params, X)
    assert traces == [(4, 4)]
    net.init(key(), X)
    net.apply(params, X)
    # The abstract run of the network and init itself; none for `apply`.
    assert traces == [(4, 4)] * 3
    net.apply(params, X[:2])
    assert traces == [(4, 4)] * 3 + [(2, 4)]


def test_a_check_of_parameters_leaves_nothing_in_the_program():
    net = chain(dense(4))
    text = str(jax.make_jaxpr(lambda p, x: net.apply(p, x))(weights(net, X), X))
    assert "random" not in text and text.count("dot_general") == 1


# --- what layers are made of ----------------------------------------------------------------------


def test_init_and_init_state_receive_the_named_inputs_that_they_name():
    def masked(params, x, state, *, mask, scale=1.0):
        return jnp.where(mask, x * params["w"] * scale, 0), state

    attention = layer(
        lambda key, x: {"w": jnp.ones(())},
        masked,
        init_state=lambda x, *, mask: {"seen": jnp.zeros(mask.shape)},
    )
    net = wire(a=attention)(lambda f, x, mask: f.a(x, mask=mask, scale=2.0))
    mask = X > 0
    params, state = net.init(key(), X, mask), net.init_state(X, mask)
    assert state["a"]["seen"].shape == (4, 4)
    close(net.apply(params, X, mask, state=state)[0], jnp.where(mask, 2 * X, 0))


@pytest.mark.parametrize("batch", [2, 3])
def test_a_stateful_function_that_forgets_its_state_is_found(batch):
    """With a batch of two, the array would silently be unpacked into outputs and state."""
    forgetful = layer(
        None,
        lambda params, x, state: x,
        init_state=lambda x: {"n": jnp.zeros(())},
        label="forgetful",
    )
    x = jnp.ones((batch, 3))
    for net, state in [
        (forgetful, {"n": jnp.zeros(())}),
        (chain(forgetful), {"0": {"n": jnp.zeros(())}}),
    ]:
        message = (
            rf"forgetful: a stateful layer returns \(outputs, new_state\), got float32\[{batch}, "
            r"3\]"
        )
        with pytest.raises(ValueError, match=message):
            net.apply({}, x, state=state)


def test_a_body_that_draws_in_training_without_a_key_says_so():
    net = chain(
        noise=wire(a=dense(4))(
            lambda f, x: f.a(x) + (jax.random.normal(f.key, x.shape) if f.train else 0)
        )
    )
    params = weights(net, X)
    net.apply(params, X)
    with pytest.raises(
        ValueError, match="wire: training draws random numbers: pass key= to apply"
    ) as error:
        net.apply(params, X, train=True)
    assert "in layer 'noise'" in error.value.__notes__


def test_outputs_may_be_told_so_that_init_runs_a_layer_nowhere():
    """A collective is unbound outside of its axis, where `init` runs."""

    def mean_over_devices(params, x):
        return jax.lax.pmean(x * params["w"], "data")

    def init(key, x):
        return {"w": jnp.ones(())}

    told = chain(layer(init, mean_over_devices, outputs=lambda x: x), dense(4))
    params = told.init(key(), X)
    y = jax.vmap(lambda x: told.apply(params, x), axis_name="data")(X[:, None])
    close(y[0], dense(4).apply(params["1"], X.mean(0)[None]), rtol=1e-4)
    with pytest.raises(NameError, match="unbound axis name"):
        chain(layer(init, mean_over_devices), dense(4)).init(key(), X)
    by_mode = layer(
        None,
        lambda p, x, train: x[:1] if train else x,
        outputs=lambda x, train: x[:1] if train else x,
    )
    assert [output_specs(by_mode, train, X).shape for train in (False, True)] == [(4, 4), (1, 4)]


@pytest.mark.parametrize("name", ["state", "params"])
def test_names_of_arguments_are_no_names_of_children(name):
    with pytest.raises(ValueError, match="a child's name is letters, digits"):
        chain(**{name: dense(2)})


@pytest.mark.parametrize(
    "child",
    [
        dense(4),
        chain(dense(4), repeat(dense(4), 5)),
        layer(lambda key, x: {"t": jnp.ones(x.shape[-2:])}, lambda p, x: x),
    ],
)
def test_two_calls_that_need_different_parameters_are_found_by_init(child):
    net = chain(pair=wire(a=child)(lambda f, x, y: (f.a(x), f.a(y))))
    other = jnp.ones((4, 3)) if "dense" in repr(child) else jnp.ones((1, 4))
    with pytest.raises(
        ValueError,
        match=r"it is called with .*4, 4\].* and with .*one set of parameters cannot serve both",
    ):
        net.init(key(), X, other)
    net.init(key(), X, jnp.ones((7, 4, 4)))  # batch axes may differ


def test_residual_adds_floats_only():
    """The edges of a graph, say, would silently be added to themselves."""
    graph = {"nodes": X, "senders": jnp.arange(3)}
    net = chain(block=residual(lambda g: {**g, "nodes": jnp.tanh(g["nodes"])}))
    for run in [lambda: net.apply({}, graph), lambda: net.init(key(), graph)]:
        with pytest.raises(
            TypeError,
            match=r"residual: it adds floats, got int32\[3\] at 'senders'; add the float part",
        ):
            run()
    with pytest.raises(TypeError, match=r"residual: it adds floats, got bool\[4, 4\]; add"):
        residual(lambda x: x).apply({}, X > 0)


# --- several bodies over the same children --------------------------------------------------------


def test_several_bodies_share_children_and_parameters():
    encode, decode, net = wire(encoder=dense(2), decoder=dense(4))(
        lambda f, x: f.encoder(x),
        lambda f, z: f.decoder(z),
        lambda f, x: f.decoder(jnp.tanh(f.encoder(x))),
    )
    params = net.init(key(), X)
    z = encode.apply(params, X)
    close(z, dense(2).apply(params["encoder"], X))
    close(net.apply(params, X), decode.apply(params, jnp.tanh(z)))
    parts = encode.init(key(), X) | decode.init(key(), z)
    jax.tree.map(np.testing.assert_array_equal, parts, params)
    assert encode.init(key(), X).keys() == {"encoder"}


def test_several_bodies_with_state_begin_with_the_state_of_what_they_call():
    encode, net = wire(norm=batch_norm(), head=dense(2), other=batch_norm())(
        lambda f, x: f.norm(x), lambda f, x: f.head(f.other(f.norm(x)))
    )
    params, state = net.init(key(), X), net.init_state(X)
    assert state.keys() == {"norm", "other"} and encode.init_state(X).keys() == {"norm"}
    _, new = encode.apply(params, X, state=state, train=True)
    assert new.keys() == state.keys() and np.any(new["norm"]["mean"] != state["norm"]["mean"])


def test_the_error_for_a_child_that_is_never_called_tells_of_several_bodies():
    with pytest.raises(
        ValueError, match=r"for an encoder and a decoder, pass all to one wire\(...\)\(body, ...\)"
    ):
        wire(a=dense(2), b=dense(4))(lambda f, x: f.a(x)).init(key(), X)


# --- messages to newcomers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, error, message",
    [
        (
            lambda net: net(X),
            TypeError,
            "a layer holds no parameters, so it cannot be called; make them with params = net.init",
        ),
        (
            lambda net: net.init(key()),
            TypeError,
            r"init takes \(key, x\): missing a required argument: 'x'",
        ),
        (lambda net: net.init(X), TypeError, "init takes|key must be one PRNG key"),
        (
            lambda net: net.apply(weights(net, X), X, True),
            TypeError,
            r"apply takes \(params, x\): too many positional",
        ),
        (
            lambda net: net.apply(weights(net, X), X, trian=True),
            TypeError,
            "apply takes .* unexpected keyword argument 'trian'",
        ),
    ],
)
def test_a_wrong_call_of_a_layer_says_what_to_write(run, error, message):
    with pytest.raises(error, match=message):
        run(dense(4))


@pytest.mark.parametrize(
    "body",
    [
        lambda f, x: f.d + x,
        lambda f, x: x + f.d,
        lambda f, x: x @ f.d,
        lambda f, x: -f.d,
        lambda f, x: jnp.tanh(f.d),
        lambda f, x: f.d[0],
        lambda f, x: x * f.d,
    ],
)
def test_a_child_that_is_used_without_a_call_says_so(body):
    net = wire(d=dense(4))(lambda f, x: (f.d(x), body(f, x))[1])
    for run in [lambda: net.init(key(), X), lambda: net.apply(weights(chain(d=dense(4)), X), X)]:
        with pytest.raises(
            TypeError, match=r"is a layer, not an array: call it, f\.(d|name)\(\.\.\.\)"
        ):
            run()


def test_a_body_shows_its_children():
    seen = []
    net = wire(up=dense(4), down=dense(4))(lambda f, x: (seen.append(f), f.down(f.up(x)))[1])
    net.init(key(), X)
    assert set(dir(seen[0])) == {"up", "down", "key", "train"}
    assert (
        repr(seen[0]) == "the children of wire: up, down" and repr(seen[0].up) == "f.up: dense(4)"
    )


def test_a_decorated_body_keeps_its_docstring():
    @wire(a=dense(4))
    def net(f, x):
        """x [..., 4] -> y [..., 4]."""
        return f.a(x)

    assert net.__doc__ == "x [..., 4] -> y [..., 4]."


def test_wrong_inputs_of_a_body_name_the_network():
    net = wire(a=dense(4))(lambda f, x, *, mask=None: f.a(x))
    for run in [
        lambda: net.init(key()),
        lambda: net.init(key(), X, X),
        lambda: net.init(key(), X, msk=X),
    ]:
        with pytest.raises(TypeError, match=r"wire: the body takes \(f, x, \*, mask=None\)"):
            run()


def test_a_branch_on_a_value_is_explained():
    net = wire(a=dense(4))(lambda f, x: f.a(x) if x.sum() > 0 else x)
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        net.init(key(), X)
    assert any(
        "trace the body, in which `if`, `int` and the like see no values" in note
        for note in error.value.__notes__
    )


# --- layers are values ----------------------------------------------------------------------------


def test_equal_calls_return_one_layer_and_different_ones_do_not():
    assert dense(4) is dense(4) and chain(dense(4), jnp.tanh) is chain(dense(4), jnp.tanh)
    assert repeat(chain(dense(4)), 2) is repeat(chain(dense(4)), 2)
    layers = [
        dense(4),
        dense(5),
        dense(4, bias=False),
        dropout(0),
        dropout(0.0),
        conv(4, 3),
        conv(4, (3,)),
        conv(4, (3, 3)),
    ]
    assert len(set(map(id, layers))) == len(layers)
    assert chain(lambda x: x) is not chain(lambda x: x)
    assert conv(4, [3, 3]) is not None  # arguments that cannot be hashed


def test_a_layer_that_nothing_refers_to_is_gone():
    class Function:
        def __call__(self, x):
            return x

    function = Function()
    net = chain(function, dense(4))
    net.init(key(), X)
    gone = [weakref.ref(net), weakref.ref(function)]
    del net, function
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize(
    "net",
    [
        dense(4, bias=False),
        chain(conv(4, (3, 3)), batch_norm(), out=repeat(residual(dense(4)), 2)),
        cast(dense(2), "bfloat16"),
    ],
)
def test_layers_of_the_librarys_constructors_can_be_pickled_and_copied(net):
    assert pickle.loads(pickle.dumps(net)) is net
    assert copy.deepcopy(net) is net


def test_a_network_with_a_body_is_copied_as_the_value_that_it_is():
    net = wire(a=dense(4))(lambda f, x: f.a(x))
    assert copy.deepcopy({"net": net})["net"] is net and copy.copy(net) is net
    with pytest.raises(
        (pickle.PicklingError, AttributeError), match="lambda|local"
    ):  # the body is code, which pickle refuses
        pickle.dumps(net)


def test_a_network_of_equal_blocks_is_traced_once_for_all():
    traces = []

    def activation(x):
        traces.append(x.shape)
        return jnp.tanh(x)

    def block():
        return residual(chain(layer_norm(), dense(4), activation, dense(4)))

    net = chain(*[block() for _ in range(24)])
    params = net.init(key(), X)
    assert len(traces) == 1 and len(params) == 24
    kernels = np.stack([params[str(i)]["1"]["kernel"] for i in range(24)])
    assert len(np.unique(kernels.reshape(24, -1), axis=0)) == 24


def test_parallel_and_scan_and_param_check_their_sizes():
    for make in [lambda n: vmap(dense(2), n), lambda n: param((n,), jax.nn.initializers.ones)]:
        for wrong in [-1, 2.0, True, "2"]:
            with pytest.raises(ValueError, match="must be"):
                make(wrong)
    with pytest.raises(ValueError, match="scan: axis must be an int of at least 0, got -1"):
        scan(dense(2), axis=-1)
    assert param((np.int64(2),), jax.nn.initializers.ones).init(key()).shape == (2,)  # pyright: ignore[reportArgumentType]
    assert repr(parallel(dense(2), merge=jnp.add)).startswith("parallel(")


TRACES: list[int] = []
WIDTH = 4


def made_block(factor: float = 1.0):
    @wire(a=dense(4))
    def body(f, x):
        TRACES.append(WIDTH)
        return factor * f.a(x[..., :WIDTH])

    return body


def test_equal_bodies_of_one_network_are_traced_once(monkeypatch):
    """Bodies with the same code and equal values around it; a global that changes counts from the
    next `init` on.
    """
    monkeypatch.setitem(globals(), "TRACES", [])
    params = chain(*[made_block() for _ in range(6)]).init(key(), X)
    assert TRACES == [4] and len({id(params[str(i)]["a"]["kernel"]) for i in range(6)}) == 6
    kernels = np.stack([params[str(i)]["a"]["kernel"] for i in range(6)])
    assert len(np.unique(kernels.reshape(6, -1), axis=0)) == 6
    TRACES.clear()
    chain(*[made_block(float(i)) for i in range(3)], made_block(1), made_block(True)).init(key(), X)
    assert TRACES == [4] * 5  # 1.0, 1 and True are not the same
    monkeypatch.setitem(globals(), "WIDTH", 3)
    narrow = chain(made_block()).init(key(), X)
    assert narrow["0"]["a"]["kernel"].shape == (3, 4)


def test_bodies_around_values_that_cannot_be_hashed_are_traced_each():
    seen = []

    def noted(factors):
        return wire(a=dense(4))(lambda f, x: (seen.append(factors), factors[0] * f.a(x))[1])

    chain(noted([1.0]), noted([2.0])).init(key(), X)
    assert seen == [[1.0], [2.0]]
