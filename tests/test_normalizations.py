"""Normalizations against PyTorch (or Flax, where PyTorch has none), forward and gradients, in
float32 and float64; batch statistics over devices and with weights against those of the whole
batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from registry import numbers, quick_to_compile, state_of, weights  # noqa: F401 (a fixture)

from jaxnet import chain, replace
from jaxnet.layers import (
    batch_norm,
    dense,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
)

torch = pytest.importorskip("torch")

drawn = settings(max_examples=6, deadline=None, derandomize=True)
many = settings(max_examples=100, deadline=None, derandomize=True)


def compared(net, function, shape, dtype, seed, channels_first=False):
    """Outputs and gradients (of x and all parameters) of a layer equal those of a function of
    PyTorch tensors (x, params).
    """
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    with jax.enable_x64(dtype == "float64"):
        x, towards = numbers((jax.ShapeDtypeStruct(shape, dtype),) * 2, seed)
        params = weights(net, x, seed=seed)

        def loss(params, x):
            y = net.apply(params, x)
            return jnp.vdot(y, towards), y

        (dparams, dx), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    there = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in params.items()}
    x_there = torch.tensor(np.asarray(x), requires_grad=True)
    moved = x_there.movedim(-1, 1) if channels_first else x_there
    expected = function(moved, there)
    expected = expected.movedim(1, -1) if channels_first else expected
    (expected * torch.tensor(np.asarray(towards))).sum().backward()
    pairs = [(y, expected.detach()), (dx, x_there.grad)]
    pairs += [(dparams[name], p.grad) for name, p in there.items()]
    for actual, wanted in pairs:
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        np.testing.assert_allclose(actual, wanted.numpy(), rtol=0, atol=tolerance * max(scale, 1))


dtypes = st.sampled_from(["float32", "float64"])
sizes = st.integers(2, 5)


def group_norm_case(groups, size, spatial, batch, affine, dtype, seed):
    net = group_norm(groups, rank=len(spatial), scale=affine, bias=affine, eps=1e-3)
    function = lambda x, p: torch.nn.functional.group_norm(  # noqa: E731
        x, groups, p.get("scale"), p.get("bias"), 1e-3
    )
    compared(net, function, (batch, *spatial, groups * size), dtype, seed, channels_first=True)


group_norms = given(
    st.integers(1, 3),
    st.integers(2, 3),
    st.lists(sizes, max_size=3),
    st.integers(1, 3),
    st.booleans(),
    dtypes,
    st.integers(0, 99),
)
test_group_norm_is_that_of_pytorch = drawn(group_norms(group_norm_case))
test_group_norm_is_that_of_pytorch_often = pytest.mark.slow(many(group_norms(group_norm_case)))


@drawn
@given(st.lists(sizes, min_size=1, max_size=2), st.integers(1, 3), dtypes, st.integers(0, 99))
def test_instance_norm_is_that_of_pytorch(spatial, channels, dtype, seed):
    net = instance_norm(rank=len(spatial))
    function = lambda x, p: torch.nn.functional.instance_norm(  # noqa: E731
        x, weight=p["scale"], bias=p["bias"]
    )
    compared(net, function, (2, *spatial, channels), dtype, seed, channels_first=True)


@drawn
@given(st.lists(sizes, min_size=1, max_size=2), st.integers(0, 2), dtypes, st.integers(0, 99))
def test_layer_norm_over_several_axes_is_that_of_pytorch(last, lead, dtype, seed):
    function = lambda x, p: torch.nn.functional.layer_norm(x, last, p["scale"], p["bias"])  # noqa: E731
    compared(layer_norm(rank=len(last)), function, ((3,) * lead + tuple(last)), dtype, seed)


@drawn
@given(st.sampled_from([0.0, 1.0]), st.booleans(), dtypes, st.integers(0, 99))
def test_rms_norm_is_that_of_pytorch(offset, scale, dtype, seed):
    net = rms_norm(eps=1e-3, offset=offset, scale=scale)

    def function(x, p):
        weight = offset + p["scale"] if scale else None
        return torch.nn.functional.rms_norm(x, (5,), weight, 1e-3)

    compared(net, function, (3, 2, 5), dtype, seed)


def test_rms_norm_begins_with_a_factor_of_one():
    x = jnp.ones((2, 3))
    for offset in (0.0, 1.0):
        net = rms_norm(offset=offset)
        params = net.init(jax.random.key(0), x)
        np.testing.assert_array_equal(params["scale"], np.full(3, 1 - offset))
        np.testing.assert_allclose(net.apply(params, x), x, rtol=1e-6)


@drawn
@given(
    st.integers(1, 7),
    st.integers(1, 6),
    st.sampled_from([1e-4, 0.5]),
    st.sampled_from([0.75, 1.0]),
    dtypes,
    st.integers(0, 99),
)
def test_local_response_norm_is_that_of_pytorch(size, channels, alpha, beta, dtype, seed):
    net = local_response_norm(size, alpha=alpha, beta=beta, k=2.0)
    function = lambda x, p: torch.nn.functional.local_response_norm(x, size, alpha, beta, 2.0)  # noqa: E731
    compared(net, function, (2, 3, channels), dtype, seed, channels_first=True)


@pytest.mark.parametrize("make", [lambda: group_norm(2), instance_norm, rms_norm, layer_norm])
def test_an_empty_batch_and_a_constant_give_finite_numbers(make):
    net, x = make(), jnp.full((0, 3, 3, 4), 2.0)
    params = net.init(jax.random.key(0), x)
    assert net.apply(params, x).shape == x.shape
    constant = jnp.full((2, 3, 3, 4), 1e6)
    grads = jax.grad(lambda x: net.apply(params, x).sum())(constant)
    assert jnp.isfinite(grads).all() and jnp.isfinite(net.apply(params, constant)).all()


# --- batch norm -----------------------------------------------------------------------------------


def trained(net, x, *more, state=None):
    """Outputs, state and the gradient of x of one training step, in one jitted program."""

    def loss(x):
        y, new = net.apply(params, x, *more, state=start, train=True)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, new)

    start = state_of(net, x) if state is None else state
    params = weights(net, x)
    grad, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(x)
    return y, new, grad


def test_the_biased_variance_is_that_of_flax_and_the_unbiased_that_of_pytorch():
    flax = pytest.importorskip("flax.linen")
    x = numbers(jax.ShapeDtypeStruct((5, 3), "float32"))
    model = flax.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    variables = model.init(jax.random.key(0), x)
    _, moved = model.apply(variables, x, mutable=["batch_stats"])
    for unbiased, expected in [
        (False, moved["batch_stats"]["var"]),
        (True, 0.9 + 0.1 * torch.tensor(np.asarray(x)).var(0, unbiased=True).numpy()),
    ]:
        net = batch_norm(unbiased=unbiased)
        np.testing.assert_allclose(trained(net, x)[1]["var"], expected, rtol=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_weights_of_zero_are_as_if_the_examples_were_not_there(unbiased):
    x = numbers(jax.ShapeDtypeStruct((6, 2, 3), "float32"))
    net = batch_norm(unbiased=unbiased)
    padded = jnp.concatenate([x, jnp.full((3, 2, 3), 1e4)])
    y, state, _ = trained(net, x)
    y_padded, state_padded, grad = trained(net, padded, jnp.arange(9) < 6)
    np.testing.assert_allclose(y_padded[:6], y, rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state_padded, state)
    assert np.isfinite(grad).all()


def test_whole_weights_are_copies_of_examples():
    x = numbers(jax.ShapeDtypeStruct((4, 3), "float32"))
    times = jnp.asarray([1, 3, 2, 1])
    net = batch_norm()
    y, state, _ = trained(net, x, times)
    repeated, expected, _ = trained(net, jnp.repeat(x, times, 0, total_repeat_length=7))
    np.testing.assert_allclose(jnp.repeat(y, times, 0, total_repeat_length=7), repeated, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state, expected)


@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_a_batch_of_padding_alone_leaves_the_averages(fill):
    x = jnp.full((4, 3), fill)
    net = batch_norm()
    before = {"mean": jnp.asarray([1.0, 2, 3]), "var": jnp.asarray([4.0, 5, 6])}
    y, state, grad = trained(net, x, jnp.zeros(4), state=before)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    if fill == 1.0:
        assert np.isfinite(y).all() and np.isfinite(grad).all()


def test_padding_with_nan_changes_no_example():
    x = numbers(jax.ShapeDtypeStruct((4, 3), "float32"))
    net = batch_norm()
    padded = jnp.concatenate([x, jnp.full((2, 3), jnp.nan)])
    y, state, _ = trained(net, padded, jnp.arange(6) < 4)
    expected, moved, _ = trained(net, x)
    np.testing.assert_allclose(y[:4], expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state, moved)


@pytest.mark.cpu_only("it wants four devices")
@pytest.mark.parametrize("how", ["vmap", "shard_map", "jit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch(how, weighted):
    x, towards = numbers((jax.ShapeDtypeStruct((8, 3), "float32"),) * 2)
    w = (jnp.arange(8) % 3 > 0) if weighted else jnp.ones(8)
    params, start = weights(batch_norm(), x), state_of(batch_norm(), x)

    def step(net, x, w, towards):
        def loss(x):
            inputs = (x, w) if weighted else (x,)
            y, new = net.apply(params, *inputs, state=start, train=True)
            return jnp.sum(y * towards), (y, new)

        grad, (y, new) = jax.grad(loss, has_aux=True)(x)
        return y, grad, new

    y, grad, new = step(batch_norm(), x, w, towards)
    local = functools.partial(step, batch_norm(axis_name="batch"))
    parts = (x, w, towards)
    if how == "vmap":
        split = [a.reshape(4, 2, *a.shape[1:]) for a in parts]
        found = jax.vmap(local, axis_name="batch")(*split)
        found = (
            found[0].reshape(8, 3),
            found[1].reshape(8, 3),
            jax.tree.map(lambda a: a[3], found[2]),
        )
    else:
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        over = PartitionSpec("batch")
        if how == "shard_map":
            run = jax.shard_map(
                local, mesh=mesh, in_specs=over, out_specs=(over, over, PartitionSpec())
            )
        else:
            run = functools.partial(step, batch_norm())
            parts = jax.device_put(parts, NamedSharding(mesh, over))
        found = jax.jit(run)(*parts)
    np.testing.assert_allclose(found[0], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], grad, rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found[2], new)


def test_a_network_with_an_axis_name_is_initialized_outside_of_the_axis():
    net = chain(dense(4), batch_norm(axis_name="batch"), dense(2))
    x = jnp.ones((3, 4))
    params, state = net.init(jax.random.key(0), x), net.init_state(x)
    assert net.apply(params, x, state=state)[0].shape == (3, 2)


def test_a_frozen_batch_norm_is_its_evaluation_and_fits_the_parameters_of_the_other():
    x = numbers(jax.ShapeDtypeStruct((4, 3), "float32"))
    net = chain(norm=batch_norm(), out=dense(2))
    still = replace(net, "norm", batch_norm(frozen=True))
    params, (_, state) = (
        weights(net, x),
        net.apply(weights(net, x), x, state=net.init_state(x), train=True),
    )
    expected, _ = net.apply(params, x, state=state)
    y, same = still.apply(params, x, state=state, train=True)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, same, state)


X = jnp.ones((4, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: group_norm(0), "group_norm: groups must be a positive int, got 0"),
        (lambda: group_norm(2, rank=-1), "group_norm: rank must be an int of at least 0, got -1"),
        (lambda: instance_norm(rank=0), "instance_norm: rank must be a positive int, got 0"),
        (lambda: rms_norm(eps=-1), "rms_norm: eps must be a number of at least 0 .* got -1"),
        (lambda: rms_norm(offset=float("nan")), "rms_norm: offset must be a number"),
        (lambda: local_response_norm(5, k=0), "local_response_norm: k must be positive, got 0"),
        (lambda: layer_norm(rank=0), "layer_norm: rank must be a positive int"),
        (
            lambda: group_norm(2).init(jax.random.key(0), jnp.ones((2, 2, 2, 3))),
            r"group_norm\(2\): the groups must divide the last axis, got float32\[2, 2, 2, 3\]",
        ),
        (
            lambda: group_norm(3).init(jax.random.key(0), jnp.ones((2, 3))),
            "must have at least 3 axes",
        ),
        (
            lambda: batch_norm().apply(
                {"scale": X[0], "bias": X[0]},
                X,
                jnp.ones(3),
                state={"mean": X[0], "var": X[0]},
                train=True,
            ),
            r"batch_norm: the weights must have the leading axes of x, \[4\].* got float32\[3\]",
        ),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
