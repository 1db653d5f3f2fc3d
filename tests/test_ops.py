"""Convolution and pooling as operations: equal to their definitions and to JAX's own, in every mode
of differentiation.
"""

import contextlib
import functools
import itertools
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnet.ops import avg_pool, convolve, max_pool

# spatial sizes, window, features in and out of one group, options; together they reach every form
# on the CPU
GEOMETRIES = {
    "wide": ((7, 6), (3, 3), 3, 18, {}),
    "wide, dilated": ((7, 6), (3, 2), 18, 5, dict(dilation=(2, 3), padding=((3, 0), (1, 2)))),
    "wide, strided, odd sizes": ((9, 7), (3, 2), 5, 17, dict(strides=(2, 3), padding="VALID")),
    "wide, strided, same": ((8, 7), (3, 4), 17, 6, dict(strides=2)),
    "wide, more outputs than inputs": ((4, 5), (3, 3), 6, 17, dict(padding=4)),
    "small": ((6, 7), (3, 2), 6, 8, {}),
    "small, strided": ((6, 7), (3, 2), 6, 8, dict(strides=(1, 2), dilation=(2, 1))),
    "few in": ((6, 5), (3, 3), 2, 7, dict(padding="VALID")),
    "few out": ((6, 5), (3, 2), 7, 1, dict(padding=((0, 1), (2, 0)))),
    "few out, strided": ((6, 5), (3, 2), 7, 2, dict(strides=2)),
    "pointwise": ((4, 3), (1, 1), 5, 6, {}),
    "pointwise, strided": ((5, 4), (1, 1), 5, 6, dict(strides=(2, 3))),
    "patches": ((6, 9), (2, 3), 3, 5, dict(strides=(2, 3))),
    "patches, gaps, a rest, zeros": (
        (8, 9), (2, 2), 3, 5, dict(strides=(4, 3), dilation=(2, 1), padding=((1, 1), (0, 1)))
    ),
    "window larger than the input": ((3, 2), (5, 4), 5, 6, dict(padding=((2, 3), (2, 2)))),
    "line": ((9,), (3,), 5, 18, dict(strides=2)),
    "line, small": ((9,), (4,), 5, 6, dict(dilation=2, padding=((5, 1),))),
    "volume": ((4, 5, 3), (2, 3, 2), 5, 6, dict(strides=(2, 1, 1))),
    "groups": ((5, 6), (3, 3), 5, 6, dict(groups=2)),
    "groups, strided line": ((9,), (3,), 2, 5, dict(groups=3, strides=2)),
    "depthwise": ((5, 6), (3, 3), 1, 1, dict(groups=5)),
    "depthwise, two out of each, strided": (
        (7, 6), (3, 2), 1, 2, dict(groups=3, strides=(1, 2), dilation=(2, 1))
    ),
    "depthwise volume": ((3, 4, 3), (2, 2, 2), 1, 1, dict(groups=3, padding="VALID")),
}  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}  # compile in less time; the forms are chosen before


def plain(x, kernel, *, strides=1, padding="SAME", dilation=1, groups=1):
    """The same convolution by `jax.lax`."""
    n = x.ndim - 2
    axes = "DHW"[-n:]
    strides, dilation = np.broadcast_to(strides, n).tolist(), np.broadcast_to(dilation, n).tolist()
    padding = [(padding, padding)] * n if isinstance(padding, int) else padding
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=names,
        feature_group_count=groups,
    )


def operands(name, dtype="float32", batch=None):
    """x, kernel and a cotangent y, and the options. Of many wide images, a few are taken at a
    time.
    """
    batch = batch or (12 if "wide" in name else 2)
    sizes, window, channels, features, options = GEOMETRIES[name]
    groups = options.get("groups", 1)
    x, kernel = (
        normal((batch, *sizes, channels * groups), 0, dtype),
        normal((*window, channels, features * groups), 1, dtype),
    )
    return (
        x,
        kernel,
        normal(jax.eval_shape(functools.partial(plain, **options), x, kernel).shape, 2, dtype),
        options,
    )


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quickly(fn, *args):
    return jax.jit(fn, compiler_options=QUICK)(*args)


def assert_trees_close(actual, expected, rtol=1e-4):
    """Equal structure, shapes and dtypes; values to `rtol` of the largest."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=rtol * max(1.0, abs(b).max(initial=0)),
            err_msg=jax.tree_util.keystr(path),
        )


# Convolution


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("stride", [1, 2])
def test_convolve_is_its_definition(stride):
    """y[n, o, p, f] = sum over h, w, c of x[n, s o + h - 1, s p + 2 w - 2, c] k[h, w, c, f],
    written as loops.
    """
    x, k = np.asarray(normal((2, 5, 6, 3), 0)), np.asarray(normal((3, 2, 3, 4), 1))
    outputs = (5 + 1 + 0 - 3) // stride + 1, (6 + 2 + 1 - 3) // stride + 1
    y = np.zeros((2, *outputs, 4))
    for n, o, p, f, h, w, c in itertools.product(
        range(2), *map(range, outputs), *map(range, (4, 3, 2, 3))
    ):
        i, j = stride * o + h - 1, stride * p + 2 * w - 2
        if 0 <= i < 5 and 0 <= j < 6:
            y[n, o, p, f] += x[n, i, j, c] * k[h, w, c, f]
    result = convolve(
        jnp.asarray(x), jnp.asarray(k), strides=stride, padding=((1, 0), (2, 1)), dilation=(1, 2)
    )
    np.testing.assert_allclose(result, y, rtol=1e-4, atol=1e-5)


def test_convolve_and_its_gradients_equal_those_of_pytorch():
    """torch 2.13, float64: conv2d with stride (2, 1), padding (1, 2), dilation (1, 2), 2 groups on
    sines and cosines.
    """
    with jax.enable_x64():

        def numbers(f, shape):
            return jnp.asarray(f(np.arange(np.prod(shape))).reshape(shape))

        def loss(x, k):
            y = convolve(x, k, strides=(2, 1), padding=((1, 1), (2, 2)), dilation=(1, 2), groups=2)
            return jnp.sum(y * numbers(np.sin, y.shape)), y

        x, k = numbers(np.sin, (1, 5, 4, 4)), numbers(np.cos, (3, 2, 2, 4))
        (dx, dk), y = jax.grad(loss, (0, 1), has_aux=True)(x, k)
    assert y.shape == (1, 3, 6, 4) and y.dtype == jnp.float64
    np.testing.assert_allclose(
        y[0, 1, 2], [0.97439208, 0.45879346, 0.19411291, 0.72655750], rtol=1e-6
    )
    np.testing.assert_allclose(
        dx[0, 2, 1], [0.58398130, 0.18341833, 0.62746440, -1.33189463], rtol=1e-6
    )
    np.testing.assert_allclose(
        dk[1, 0, 0], [0.99363994, 0.78209432, 1.47482644, 0.36631616], rtol=1e-6
    )


@pytest.mark.sample(10)
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolve_and_both_gradients_equal_lax(name):
    x, kernel, y, options = operands(name)

    def everything(convolution):
        def fn(x, kernel, y):
            result, pull_back = jax.vjp(functools.partial(convolution, **options), x, kernel)
            return result, pull_back(y)

        return quickly(fn, x, kernel, y)

    assert_trees_close(everything(convolve), everything(plain))


@pytest.mark.sample(3)
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    "name", ["wide", "small, strided", "few out", "groups, strided line", "depthwise"]
)
def test_every_mode_of_differentiation_equals_lax(name):
    x, kernel, _, options = operands(name, batch=1)
    x = x[:, :5]
    xs, kernels = jnp.stack([x, jnp.sin(x)], 1), jnp.stack([kernel, jnp.cos(kernel)], -1)

    def modes(convolution):
        fn = functools.partial(convolution, **options)
        gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(fn(x, kernel))), (0, 1))

        def step(carry, _):  # in a loop, where the forms matter
            x, kernel = carry
            dx, dk = gradient(x, kernel)
            return (x - 0.1 * dx, kernel - 0.1 * dk), None

        def all_modes(x, kernel, dx, dk, xs, kernels):
            _, linear = jax.linearize(fn, x, kernel)
            return {
                "jvp": jax.jvp(fn, (x, kernel), (dx, dk)),
                "linearize": linear(dx, dk),
                "jacfwd": jax.jacfwd(fn, 1)(x, kernel),
                "Hessian-vector product": jax.jvp(gradient, (x, kernel), (dx, dk)),
                "reverse over reverse": jax.vjp(gradient, x, kernel)[1]((dx, dk)),
                "vmap of x": jax.vmap(gradient, (1, None))(xs, kernel),
                "vmap of kernel": jax.vmap(gradient, (None, -1), (0, -1))(x, kernels),
                "vmap of both": jax.vmap(gradient, (1, -1), 1)(xs, kernels),
                "vmap of vmap": jax.vmap(jax.vmap(fn, (None, -1)), (1, None))(xs, kernels),
                "scan": lax.scan(step, (x, kernel), None, length=2)[0],
                "checkpoint": jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(fn(x, kernel)))))(
                    x
                ),
            }

        return quickly(all_modes, x, kernel, jnp.cos(x), jnp.sin(kernel), xs, kernels)

    assert_trees_close(modes(convolve), modes(plain))


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["small, strided", "few in", "depthwise"])
def test_dtype_in_dtype_out(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, kernel, y, options = operands(name, dtype)

        def everything(convolution):
            return lambda x, kernel, y: jax.vjp(
                functools.partial(convolution, **options), x, kernel
            )[1](y)

        assert convolve(x, kernel, **options).dtype == dtype
        exact = quickly(everything(plain), *(a.astype("float32") for a in (x, kernel, y)))
        result = quickly(everything(convolve), x, kernel, y)
        assert all(a.dtype == dtype for a in result)
        # Sums are in float32 or better: what is lost is the rounding of the result.
        tolerance = 1e-5 if dtype == "float64" else 1.01 * float(jnp.finfo(dtype).eps)
        assert_trees_close([a.astype("float32") for a in result], list(exact), rtol=tolerance)


@pytest.mark.sample(3)
@pytest.mark.cpu_only("is about the forms of the operations on a CPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "channels, features, groups", [(4, 32, 1), (32, 4, 1), (32, 32, 1), (4, 4, 4)]
)
def test_gradients_of_narrow_kernels_are_summed_in_float32(channels, features, groups, dtype):
    """64 images of 28 x 28 are 50,176 terms: in bfloat16, a sum of ones would stay at 256.

    The only rounding is that of the result, so it is the nearest narrow number to the sum in
    float64.
    """
    x, y = (normal((64, 28, 28, n), seed, dtype) + 1 for seed, n in enumerate((channels, features)))
    kernel = jnp.zeros((3, 3, channels // groups, features), dtype)
    fn = functools.partial(convolve, groups=groups)
    (result,) = quickly(lambda x, k, y: jax.vjp(functools.partial(fn, x), k)[1](y), x, kernel, y)
    pixels, sums = np.asarray(x, np.float64)[:, :27, :27], np.asarray(y, np.float64)[:, 1:, 1:]
    if groups == 1:
        exact = np.einsum("nhwc,nhwf->cf", pixels, sums)
    else:
        exact = np.einsum("nhwc,nhwc->c", pixels, sums)[None]
    assert result.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(result[0, 0], np.float64), exact, rtol=0.51 * float(jnp.finfo(dtype).eps)
    )


LOOPS = ("wide, strided, odd sizes", "wide, more outputs than inputs", "small", "few out, strided")


@pytest.mark.cpu_only("reads the program that XLA makes for a CPU")
@pytest.mark.parametrize(
    "name", [*LOOPS, "window larger than the input", "line", "volume", "groups"]
)
def test_no_convolution_leaves_the_fast_path_in_a_loop(name):
    """XLA has fast code on a CPU for images N.., C and kernels ..I, O alone; elsewhere than in a
    loop it transposes by itself.
    """
    x, kernel, y, options = operands(name)

    def step(carry, _):
        result, pull_back = jax.vjp(functools.partial(convolve, **options), *carry)
        dx, dk = pull_back(result)
        return (carry[0] - dx, carry[1] - dk), None

    loop = jax.jit(
        lambda x, kernel: lax.scan(step, (x, kernel), None, length=3)[0], compiler_options=QUICK
    )
    text = loop.lower(x, kernel).compile().as_text() or ""
    orders = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)
    assert set(orders) <= {"b01f_01io->b01f"}


def test_other_platforms_get_what_autodiff_makes_of_a_plain_convolution():
    x, kernel, _, options = operands("wide, strided, same")

    def convolutions(convolution):
        fn = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolution(x, kernel, **options))), (0, 1))
        module = jax.export.export(jax.jit(fn), platforms=["cuda"])(x, kernel).mlir_module()
        return sorted(re.findall(r"stablehlo\.convolution\(.*?\) (dim_numbers.*) loc", module))

    assert len(convolutions(plain)) == 3
    assert convolutions(convolve) == convolutions(plain)


@pytest.mark.parametrize("name", ["small", "patches", "groups", "depthwise"])
def test_a_batch_may_be_empty(name):
    x, kernel, _, options = operands(name)
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k, **options)), (0, 1))
    dx, dk = quickly(gradient, x[:0], kernel)
    assert dx.shape == (0, *x.shape[1:]) and not dk.any()


def test_convolve_of_no_features():
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k)), (0, 1))
    dx, dk = gradient(jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 0)))
    assert dk.shape == (3, 3, 3, 0) and not dx.any()
    y = convolve(jnp.ones((2, 5, 5, 0)), jnp.ones((3, 3, 0, 4)))
    assert y.shape == (2, 5, 5, 4) and not y.any()


def test_sizes_may_be_numpy_integers():
    x, kernel = normal((1, 9, 3)), normal((3, 3, 4), 1)
    two: Any = np.int64(2)
    one: Any = np.int32(1)
    assert_trees_close(
        convolve(x, kernel, strides=two, dilation=two), convolve(x, kernel, strides=2, dilation=2)
    )
    assert_trees_close(max_pool(x, two, strides=one), max_pool(x, 2, strides=1))


@pytest.mark.usefixtures("exact_products")
def test_convolve_works_in_all_places():
    x, kernel, _, _ = operands("wide")
    expected = jax.grad(lambda k: jnp.sum(plain(x, k) ** 2))(kernel)

    def gradient(kernel):
        return jax.grad(lambda k: jnp.sum(convolve(x, k) ** 2))(kernel)

    assert_trees_close(gradient(kernel), expected)  # not compiled
    with jax.disable_jit():
        assert_trees_close(gradient(kernel), expected)
    assert jax.eval_shape(convolve, x, kernel) == jax.ShapeDtypeStruct((12, 7, 6, 18), jnp.float32)
    exported = jax.export.export(jax.jit(gradient), platforms=["cpu", "cuda", "tpu"])(kernel)
    assert_trees_close(exported.call(kernel), expected)


@pytest.mark.cpu_only("needs four devices")
@pytest.mark.parametrize("name", ["wide", "few in", "depthwise"])
def test_convolve_over_several_devices(name):
    x, kernel, _, options = operands(name, batch=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shards = NamedSharding(mesh, P("data"))

    def gradients(convolution):
        return lambda x, kernel: jax.grad(lambda x, k: jnp.sum(jnp.sin(convolution(x, k))), (0, 1))(
            x, kernel
        )

    expected = quickly(gradients(functools.partial(plain, **options)), x, kernel)
    automatic = quickly(
        gradients(functools.partial(convolve, **options)), jax.device_put(x, shards), kernel
    )
    assert automatic[0].sharding.is_equivalent_to(shards, x.ndim)
    assert_trees_close(automatic, expected)
    by_hand = jax.shard_map(
        functools.partial(convolve, **options),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )
    assert_trees_close(
        quickly(gradients(by_hand), x, kernel), expected
    )  # the kernel's gradient is summed over the devices


FORMS = ("wide", "small", "few in", "few out", "patches", "groups", "depthwise")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", [*FORMS, *map(slow, ("wide, strided, odd sizes", "line", "volume"))]
)
def test_convolve_is_exported_for_any_size_of_the_batch(name):
    x, kernel, _, options = operands(name)

    def training(x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, **options)))

        return convolve(x, kernel, **options), jax.grad(loss, (0, 1))(x, kernel)

    assert_exports(training, x, kernel)


def assert_exports(fn, x, *rest):
    """One program exported for batches of any size computes what `fn` does for batches of two
    sizes.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(fn))(spec, *rest)
    for images in (x, x[:1]):
        assert_trees_close(exported.call(images, *rest), quickly(fn, images, *rest))


@pytest.mark.sample(3)
@pytest.mark.cpu_only("needs four devices")
@pytest.mark.parametrize(
    "name, named",
    [
        *((name, True) for name in FORMS),
        ("wide", False),
        *(slow(name, False) for name in FORMS[1:]),
        *(slow(name, named) for name in ("line", "volume") for named in (False, True)),
    ],
)
def test_convolve_over_the_batch_of_an_explicit_mesh(name, named):
    x, kernel, _, options = operands(name, batch=8)
    x = x[:, :5]

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, **options)))

    def modes(x, kernel):
        gradient = jax.grad(loss)
        dx = gradient(x, kernel), jax.jvp(lambda x: gradient(x, kernel), (x,), (jnp.cos(x),))[1]
        return convolve(x, kernel, **options), dx, jax.grad(loss, 1)(x, kernel)

    y, dx, _ = assert_spreads(modes, x, kernel, named=named)
    assert all(a.sharding.spec[0] == "data" for a in (y, *dx))


def assert_spreads(fn, x, *rest, named=True):
    """With x spread over the batch, on a mesh as `jax.make_mesh` makes it, `fn` gives the same
    numbers.
    """
    mesh = jax.make_mesh((4,), ("data",))
    expected = quickly(fn, x, *rest)
    with jax.set_mesh(mesh) if named else contextlib.nullcontext():
        result = quickly(fn, jax.device_put(x, NamedSharding(mesh, P("data"))), *rest)
    assert_trees_close(result, expected)
    return result


@pytest.mark.cpu_only("needs four devices")
def test_vmap_over_the_batch_of_an_explicit_mesh():
    x, kernels = normal((8, 2, 5, 4, 3)), normal((2, 3, 3, 3, 4), 1)

    def gradient(x, kernel):
        return jax.grad(lambda x: jnp.sum(jnp.sin(max_pool(convolve(x, kernel), 2))))(x)

    def modes(x, kernels):
        return {
            "images": jax.vmap(gradient, (0, None))(x, kernels[0]),
            "within": jax.vmap(gradient, (1, None), 1)(x, kernels[0]),
            "both": jax.vmap(gradient, (1, 0), 1)(x, kernels),
            "kernels": jax.vmap(gradient, (None, 0), 1)(x[:, 0], kernels),
        }

    assert all(dx.sharding.spec[0] == "data" for dx in assert_spreads(modes, x, kernels).values())


def test_precision_is_that_of_the_call():
    x, kernel, _, _ = operands("wide")

    def configured(fn):
        module = jax.export.export(jax.jit(fn), platforms=["cuda"])(x, kernel).mlir_module()
        return set(re.findall(r"#stablehlo<precision (\w+)>", module))

    def within(x, kernel):
        with jax.default_matmul_precision("highest"):
            return convolve(x, kernel)

    assert configured(within) == {"HIGHEST"}
    assert configured(functools.partial(convolve, precision=lax.Precision.HIGH)) == {"HIGH"}
    assert configured(jax.grad(lambda x, k: jnp.sum(convolve(x, k, precision="highest")))) == {
        "HIGHEST"
    }
    assert configured(convolve) <= {"DEFAULT"}


@pytest.mark.parametrize(
    "shapes, options, error, message",
    [
        (
            ((2, 5, 5, 3), (3, 3, 3, 4)),
            dict(padding="FULL"),
            ValueError,
            "padding must be 'SAME', 'VALID', an int or .*'FULL'",
        ),
        (
            ((2, 5, 5, 3), (3, 3, 3, 4)),
            dict(padding=[(1, 1)]),
            ValueError,
            "for each of the 2 spatial axes, got",
        ),
        (((2, 5, 5, 3), (3, 3, 3, 4)), dict(padding=-1), ValueError, "neither negative"),
        (
            ((2, 5, 5, 3), (3, 3, 3, 4)),
            dict(strides=(1, 2, 1)),
            ValueError,
            "strides must be a positive int, or one for each",
        ),
        (
            ((2, 5, 5, 3), (3, 3, 3, 4)),
            dict(strides=True),
            ValueError,
            "strides must be a positive int",
        ),
        (
            ((2, 5, 5, 3), (3, 3, 3, 4)),
            dict(dilation=0),
            ValueError,
            "dilation must be a positive int",
        ),
        (((2, 5, 5, 3), (3, 3, 2, 4)), dict(), ValueError, "groups=1 and shapes"),
        (((2, 5, 5, 4), (3, 3, 2, 5)), dict(groups=2), ValueError, "groups must divide"),
        (((2, 5, 5, 3), (3, 3, 4)), dict(), ValueError, "the same number of spatial axes"),
        (
            ((2, 5, 5, 3), (7, 3, 3, 4)),
            dict(padding="VALID"),
            ValueError,
            r"the window \(7, 3\) does not fit",
        ),
    ],
)
def test_convolve_says_what_it_got(shapes, options, error, message):
    with pytest.raises(error, match=message):
        convolve(*map(jnp.ones, shapes), **options)


def test_convolve_takes_one_floating_dtype():
    x, kernel = jnp.ones((1, 4, 2)), jnp.ones((3, 2, 2))
    with pytest.raises(TypeError, match="one floating dtype, got float32 and bfloat16"):
        convolve(x, kernel.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="got int32 and int32"):
        convolve(x.astype(int), kernel.astype(int))


# Pooling

POOLS = {
    "apart": ((6, 4), (2, 2), {}),
    "a rest": ((7, 5), (2, 2), {}),
    "overlapping": ((7, 6), (3, 3), dict(strides=2, padding="SAME")),
    "overlapping, in one step": ((7, 6), (2, 2), dict(strides=1, padding=((1, 0), (0, 1)))),
    "gaps": ((8, 9), (2, 3), dict(strides=(3, 4), padding=((1, 1), (0, 2)))),
    "line": ((9,), (4,), dict(strides=3, padding=2)),
    "volume": ((4, 5, 3), (2, 3, 2), dict(strides=1)),
}


def windows_by_definition(x, window, strides=None, padding: Any = "VALID"):
    """The elements of each window that are in x: a dict from the index of an output to the flat
    indices into one image.
    """
    sizes = x.shape[1:-1]
    strides = np.broadcast_to(window if strides is None else strides, len(sizes))
    if padding == "SAME":
        totals = [
            max(0, (-(-n // s) - 1) * s + w - n)
            for n, w, s in zip(sizes, window, strides, strict=True)
        ]
        padding = [(total // 2, total - total // 2) for total in totals]
    padding = {"VALID": 0}.get(padding, padding) if isinstance(padding, str) else padding
    padding = np.broadcast_to(padding, (len(sizes), 2))
    outputs = [
        (n + lo + hi - w) // s + 1
        for n, w, s, (lo, hi) in zip(sizes, window, strides, padding, strict=True)
    ]
    found = {}
    for output in np.ndindex(*outputs):
        taps = [
            np.add(np.multiply(output, strides), tap) - padding[:, 0] for tap in np.ndindex(*window)
        ]
        found[output] = [
            np.ravel_multi_index(tap, sizes)
            for tap in taps
            if np.all(tap >= 0) and np.all(tap < sizes)
        ]
    return found


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", POOLS)
def test_pools_and_their_gradients_are_their_definitions(name):
    """Maximum and mean of the elements that are in x; the gradient of a maximum is at the first of
    the largest.
    """
    sizes, window, options = POOLS[name]
    x = jnp.round(normal((2, *sizes, 3)) * 2)  # with ties
    flat = np.asarray(x).reshape(2, -1, 3)
    cells = windows_by_definition(x, window, **options)
    for pool in (max_pool, avg_pool):
        fn = functools.partial(pool, window=window, **options)
        cotangent = normal(jax.eval_shape(fn, x).shape, 1)
        y, (dx,) = quickly(
            lambda x, cotangent, fn=fn: (fn(x), jax.vjp(fn, x)[1](cotangent)), x, cotangent
        )
        expected, gradient = np.zeros(y.shape), np.zeros(flat.shape)
        for output, cell in cells.items():
            for n, c in itertools.product(range(2), range(3)):
                at = (n, *output, c)
                if pool is max_pool:
                    expected[at] = flat[n, cell, c].max()
                    gradient[n, cell[flat[n, cell, c].argmax()], c] += cotangent[at]
                else:
                    expected[at] = flat[n, cell, c].mean()
                    gradient[n, cell, c] += cotangent[at] / len(cell)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(dx, gradient.reshape(x.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["a rest", "overlapping"])
def test_pools_differentiate_in_every_mode_as_lax_does(name):
    sizes, window, options = POOLS[name]
    x = normal((1, *sizes, 2))
    xs = jnp.stack([x, jnp.sin(3 * x)], 2)
    strides = np.broadcast_to(options.get("strides", window), len(window)).tolist()
    padding = options.get("padding", "VALID")
    pads = (
        padding
        if isinstance(padding, str)
        else [(0, 0), *[(padding, padding)] * len(sizes), (0, 0)]
    )

    def reduced(start, combine, x):
        return lax.reduce_window(x, start, combine, (1, *window, 1), (1, *strides, 1), pads)

    def lax_avg(x):
        return reduced(0.0, lax.add, x) / reduced(0.0, lax.add, jnp.ones_like(x))

    def modes(pool):
        def all_modes(x, xs):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
            return {
                "jvp": jax.jvp(pool, (x,), (jnp.cos(x),)),
                "jacfwd": jax.jacfwd(pool)(x),
                "Hessian-vector product": jax.jvp(gradient, (x,), (jnp.cos(x),)),
                "reverse over reverse": jax.vjp(gradient, x)[1](jnp.cos(x)),
                "vmap": jax.vmap(gradient, 2, 1)(xs),
                "scan": lax.scan(lambda x, _: (x - gradient(x), None), x, None, length=2)[0],
            }

        return quickly(all_modes, x, xs)

    assert_trees_close(
        modes(functools.partial(max_pool, window=window, **options)),
        modes(functools.partial(reduced, -jnp.inf, lax.max)),
    )
    assert_trees_close(modes(functools.partial(avg_pool, window=window, **options)), modes(lax_avg))


def test_max_pool_sends_the_gradient_to_the_first_of_equals_as_pytorch():
    """torch 2.13: max_pool2d(x, 2) and max_pool2d(ones(3, 3), 3, stride=1, padding=1)."""
    x = jnp.array([[1, 1, 0, 2], [1, 0, 2, 2], [3, 3, 3, 3], [3, 3, 3, 3]], jnp.float32)[
        None, ..., None
    ]
    cotangent = jnp.array([[1.0, 2], [3, 4]])[None, ..., None]
    (gradient,) = quickly(lambda x: jax.vjp(lambda x: max_pool(x, 2), x)[1](cotangent), x)
    np.testing.assert_array_equal(
        gradient[0, ..., 0], [[1, 0, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    )
    gradient = quickly(
        jax.grad(lambda x: jnp.sum(max_pool(x, 3, strides=1, padding=1))), jnp.ones((1, 3, 3, 1))
    )
    np.testing.assert_array_equal(gradient[0, ..., 0], [[4, 2, 0], [2, 1, 0], [0, 0, 0]])


def test_padding_never_takes_the_gradient():
    """torch 2.13: max_pool2d(full((5, 5), -inf), 2, stride=2, padding=1), whose backward is 1 at
    the corner.
    """
    x = jnp.full((1, 5, 5, 1), -jnp.inf)
    gradient = quickly(
        jax.grad(lambda x: jnp.sum(max_pool(x, 2, strides=2, padding=1))), jnp.ones_like(x) * x
    )
    expected = np.zeros((5, 5))
    expected[np.ix_([0, 1, 3], [0, 1, 3])] = 1
    np.testing.assert_array_equal(gradient[0, ..., 0], expected)


WINDOWS_WITH_PADDING = [
    ((2, 2), 1, (1, 1)),
    ((3, 4), 2, (1, 2)),
    ((9, 13), 1, (4, 6)),
    ((31, 5), 3, (15, 2)),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("window, strides, padding", WINDOWS_WITH_PADDING)
def test_the_gradient_of_a_maximum_stays_in_x(window, strides, padding, dtype):
    """Of equals, the first in x in row-major order has it: where all are -inf, that is the first
    element of the window.
    """
    x = normal((1, 7, 8, 2))
    x = jnp.where(x < 0.5, -jnp.inf, jnp.round(x)).astype(dtype).at[..., 1].set(-jnp.inf)
    pads = [(p, p) for p in padding]
    fn = functools.partial(max_pool, window=window, strides=strides, padding=pads)
    y, (dx,) = quickly(lambda x: (fn(x), jax.vjp(fn, x)[1](jnp.ones_like(fn(x)))), x)
    cells = windows_by_definition(x, window, strides, pads)
    flat, expected = np.asarray(x, np.float32).reshape(-1, 2), np.zeros((56, 2))
    for output, cell in cells.items():
        for c in range(2):
            assert y[(0, *output, c)] == flat[cell, c].max()
            expected[cell[flat[cell, c].argmax()], c] += 1
    np.testing.assert_allclose(np.asarray(dx, np.float32).reshape(-1, 2), expected, rtol=0.02)


@pytest.mark.parametrize("window", [2, 3, 9])
def test_a_nan_takes_the_gradient(window):
    x = jnp.full((1, 12, 1), -jnp.inf).at[0, 5].set(jnp.nan)
    fn = functools.partial(max_pool, window=window, strides=1, padding=window // 2)
    y, (dx,) = quickly(lambda x: (fn(x), jax.vjp(fn, x)[1](jnp.ones_like(fn(x)))), x)
    assert jnp.isnan(y).sum() == window == dx[0, 5, 0]
    assert dx.sum() == y.size


@pytest.mark.sample(5)
@pytest.mark.parametrize("pool", [max_pool, avg_pool])
@pytest.mark.parametrize("name", [*POOLS, "long"])
def test_pools_are_exported_and_spread_over_the_batch(name, pool):
    sizes, window, options = POOLS.get(
        name, ((14, 5), (11, 2), dict(strides=1, padding=((5, 5), (1, 0))))
    )
    fn = functools.partial(pool, window=window, **options)

    def training(x):
        return fn(x), jax.grad(lambda x: jnp.sum(jnp.sin(fn(x))))(x)

    x = normal((8, *sizes, 2))
    assert_exports(training, x)
    if jax.default_backend() == "cpu":  # with four devices
        assert all(a.sharding.spec[0] == "data" for a in assert_spreads(training, x))


@pytest.mark.sample(1)
@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_pools_of_nothing(pool):
    for window, options in (
        (2, {}),
        (3, dict(strides=1, padding=1)),
        (9, dict(strides=1, padding=8)),
    ):
        fn = functools.partial(pool, window=window, **options)
        for x in (jnp.ones((0, 6, 6, 2)), jnp.ones((2, 6, 6, 0))):
            shape = jax.eval_shape(fn, jnp.ones((2, 6, 6, 2))).shape
            assert fn(x).shape == (x.shape[0], *shape[1:3], x.shape[3])
            assert quickly(jax.grad(lambda x, fn=fn: fn(x).sum()), x).shape == x.shape
    with pytest.raises(ValueError, match="does not fit|must be"):
        pool(jnp.ones((2, 0, 6, 2)), 2)


def test_padding_counts_for_nothing():
    """torch 2.13: avg_pool2d(arange(9), 2, stride=2, padding=1, count_include_pad=False)."""
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(
        avg_pool(x, 2, strides=2, padding=1)[0, ..., 0], [[0, 1.5], [4.5, 6]]
    )
    np.testing.assert_array_equal(
        max_pool(-x, 2, strides=2, padding=1)[0, ..., 0], [[0, -1], [-3, -4]]
    )
    integers = max_pool(-jnp.arange(9, dtype=jnp.int8).reshape(1, 3, 3, 1), 2, strides=2, padding=1)
    assert integers.dtype == jnp.int8
    np.testing.assert_array_equal(integers[0, ..., 0], [[0, -1], [-3, -4]])


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_passes_nan_on(window):
    x = jnp.zeros((1, 6, 6, 1)).at[0, 1, 0, 0].set(jnp.nan)
    y, dy = quickly(lambda x: jax.jvp(lambda x: max_pool(x, window), (x,), (jnp.ones_like(x),)), x)
    np.testing.assert_array_equal(y, quickly(lambda x: max_pool(x, window), x))
    assert jnp.isnan(y[0, 0, 0, 0]) and jnp.isnan(y).sum() == 1 and jnp.all(dy == 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_pools_keep_the_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = normal((1, 4, 4, 2), dtype=dtype)
        assert (
            max_pool(x, 2).dtype
            == avg_pool(x, 2).dtype
            == jax.grad(lambda x: avg_pool(x, 2).sum())(x).dtype
            == dtype
        )


@pytest.mark.parametrize(
    "pool, x, options, error, message",
    [
        (max_pool, jnp.ones((4, 3)), {}, ValueError, r"max_pool: x must be \[N, \*spatial, C\]"),
        (
            max_pool,
            jnp.ones((1, 4, 4, 3)),
            dict(window=(2, 2, 2)),
            ValueError,
            "window must be a positive int, or one for",
        ),
        (
            avg_pool,
            jnp.ones((1, 4, 4, 3)),
            dict(window=5),
            ValueError,
            r"avg_pool: the window \(5, 5\) does not fit",
        ),
        (
            avg_pool,
            jnp.ones((1, 4, 4, 3)),
            dict(padding=2),
            ValueError,
            "padding must be smaller than the window",
        ),
        (
            avg_pool,
            jnp.ones((1, 4, 4, 3)),
            dict(padding="same pls"),
            ValueError,
            "avg_pool: padding must be 'SAME'",
        ),
        (
            avg_pool,
            jnp.ones((1, 4, 4, 3), int),
            {},
            TypeError,
            "avg_pool: x must be floating, got int32",
        ),
        (
            max_pool,
            jnp.ones((1, 4, 4, 3), bool),
            {},
            TypeError,
            "max_pool: x must hold real numbers, got bool",
        ),
    ],
)
def test_pools_say_what_they_got(pool, x, options, error, message):
    with pytest.raises(error, match=message):
        pool(x, **({"window": 2} | options))
