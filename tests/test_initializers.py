"""The layers' own initializers against those of `jax.nn.initializers`, bit for bit."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import batch_norm, chain, conv, dense, embed, layer_norm
from jaxnet.layers import initializers

JAX = {
    initializers.lecun_normal: jax.nn.initializers.lecun_normal(),
    initializers.fan_in_normal: jax.nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", out_axis=0
    ),
    initializers.zeros: jax.nn.initializers.zeros,
    initializers.ones: jax.nn.initializers.ones,
}
RANDOM = [initializers.lecun_normal, initializers.fan_in_normal]
TRACED = [(7, 5), (4, 8)]  # one that is cut from a longer draw, and one that is a whole draw
# The last two are the shortest draw, and beyond it.
EAGER = [(1, 1), (100, 37), (256, 256), (300, 255)]
each_random = pytest.mark.parametrize("ours", RANDOM, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True, scope="module")
def programs_of_this_module():
    """Other modules compile without optimizations, which rounds differently; JAX would find their
    programs again.
    """
    jax.clear_caches()


@pytest.fixture(autouse=True)
def one_key_for_two_draws():
    with jax.debug_key_reuse(False):  # which is what it takes to compare them
        yield


def same_bits(actual, expected):
    assert isinstance(actual, jax.Array) and actual.weak_type == expected.weak_type
    assert (actual.dtype, actual.shape, actual.committed) == (
        expected.dtype,
        expected.shape,
        expected.committed,
    )
    # Where jax.nn.initializers rounds the fan-in otherwise than in 0.10.
    if jax.__version_info__ >= (0, 11):
        eps = jnp.finfo(expected.dtype).eps
        actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
        return np.testing.assert_allclose(actual, expected, rtol=4 * float(eps))
    actual, expected = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (actual, expected))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("ours", JAX, ids=lambda f: f.__name__)
def test_bits_are_those_of_jax_and_the_same_under_jit_and_vmap(ours, dtype):
    dtype = jnp.dtype(dtype)
    with jax.enable_x64(dtype == jnp.float64):
        shapes = TRACED + (EAGER if dtype == jnp.float32 else [])
        shapes += [(3, 3, 5, 8)] if ours is initializers.lecun_normal else []
        for i, shape in enumerate(shapes):
            keys = jax.random.split(jax.random.key(i), 2)
            expected = [JAX[ours](key, shape, dtype) for key in keys]
            same_bits(ours(keys[0], shape, dtype), expected[0])
            if shape in TRACED:
                init = lambda key, shape=shape: ours(key, shape, dtype)  # noqa: E731
                same_bits(jax.jit(init)(keys[0]), expected[0])
                same_bits(jax.vmap(init, axis_size=2)(keys), jnp.stack(expected))


@each_random
@pytest.mark.parametrize("impl, raw", [("threefry2x32", True), ("rbg", False), ("rbg", True)])
def test_bits_are_those_of_jax_for_every_kind_of_key(ours, impl, raw):
    with jax.default_prng_impl(impl):
        key = jax.random.PRNGKey(3) if raw else jax.random.key(3)
        same_bits(ours(key, (7, 5), jnp.float32), JAX[ours](key, (7, 5), jnp.float32))


@each_random
def test_bits_are_those_of_jax_where_no_longer_draw_has_them(ours, monkeypatch):
    key = jax.random.key(3)
    with jax.threefry_partitionable(False):  # the numbers depend on how many there are
        same_bits(ours(key, (7, 5), jnp.float32), JAX[ours](key, (7, 5), jnp.float32))
    for longest in (34, 35):
        monkeypatch.setattr(initializers, "LONGEST", longest)
        same_bits(ours(key, (7, 5), jnp.float32), JAX[ours](key, (7, 5), jnp.float32))


@pytest.mark.cpu_only("it wants several devices")
@each_random
def test_parameters_are_where_the_key_is(ours):
    device = jax.devices()[1]
    key = jax.device_put(jax.random.key(3), device)
    same_bits(ours(key, (7, 5), jnp.float32), JAX[ours](key, (7, 5), jnp.float32))
    assert ours(key, (7, 5), jnp.float32).devices() == {device}
    with jax.default_device(device):
        assert ours(jax.random.key(3), (7, 5), jnp.float32).devices() == {device}


@pytest.mark.cpu_only("it wants several devices")
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
@pytest.mark.parametrize("ours", JAX, ids=lambda f: f.__name__)
def test_a_mesh_places_parameters_as_it_places_those_of_jax(ours, axis_type):
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(axis_type,))):
        actual, expected = (
            init(jax.random.key(3), (8, 5), jnp.float32) for init in (ours, JAX[ours])
        )
        same_bits(actual, expected)
        assert actual.sharding.is_equivalent_to(expected.sharding, 2) and len(actual.devices()) == 4


def test_layers_have_the_parameters_that_jax_would_give_them():
    key, x = jax.random.key(5), jnp.ones((2, 6, 6, 3))
    same_bits(
        dense(7).init(key, x)["kernel"],
        jax.nn.initializers.lecun_normal()(key, (3, 7), jnp.float32),
    )
    same_bits(
        conv(7, 3).init(key, x)["kernel"],
        jax.nn.initializers.lecun_normal()(key, (3, 3, 3, 7), jnp.float32),
    )
    table = embed(11, 7).init(key, jnp.zeros((2,), jnp.int32))["embedding"]
    same_bits(table, JAX[initializers.fan_in_normal](key, (11, 7), jnp.float32))


def test_a_network_has_the_same_parameters_under_jit():
    net = chain(embed(11, 7), conv(6, (3,)), batch_norm(), layer_norm(), dense(5))
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    init = lambda key: net.init(key, ids)  # noqa: E731
    jax.tree.map(same_bits, jax.jit(init)(jax.random.key(5)), init(jax.random.key(5)))
    jax.tree.map(same_bits, jax.jit(lambda: init(jax.random.key(5)))(), init(jax.random.key(5)))


def test_a_network_compiles_one_program_of_random_numbers_however_many_shapes_it_has():
    """Counted by JAX's own log of compilations, in a process that has compiled nothing yet."""
    # The first init imports `jax.extend`. JAX 0.12 then compiles again what made the key, so the
    # import comes first.
    code = """
import jax, jax.extend.core, jax.numpy as jnp, sys
from jaxnet import batch_norm, chain, conv, dense, flatten
net = chain(conv(4, 3), batch_norm(), conv(5, 3), flatten(), dense(6), dense(7))
x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
with jax.log_compiles():
    key = jax.random.key(0)
    print("the key is made", file=sys.stderr)
    net.init(key, x), net.init_state(x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [
        line.split("jit(")[1].split(")")[0]
        for line in done.stderr.partition("the key is made")[2].splitlines()
        if "XLA compilation of" in line
    ]
    # One program draws the numbers, the other one derives the keys of the layers.
    assert sorted(compiled) == ["_blocks", "_fold_in"]


def test_what_init_returns_may_be_donated():
    net = chain(a=dense(3), b=layer_norm(), c=batch_norm())
    x = jnp.ones((4, 2))
    params, state = net.init(jax.random.key(0), x), net.init_state(x)
    expected = jax.tree.map(lambda w: np.asarray(w) + 1, (params, state))
    actual = jax.jit(lambda tree: jax.tree.map(lambda w: w + 1, tree), donate_argnums=0)(
        (params, state)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
