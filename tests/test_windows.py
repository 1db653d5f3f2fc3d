"""A law of windows: up to 31 elements along every axis, and beyond, programs stay short and agree
with `jax.lax`.

The program is the StableHLO text of the forward pass and all gradients.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxnet.ops import avg_pool, convolve, max_pool

pytestmark = pytest.mark.cpu_only("is about the forms of the operations on a CPU")

LINES = 500
CONVOLUTIONS = {  # features in and out of a group, groups
    "one feature": (1, 1, 1),
    "few in": (2, 7, 1),
    "few out": (7, 1, 1),
    "small": (6, 8, 1),
    "wide": (18, 20, 1),
    "groups": (2, 5, 3),
    "depthwise": (1, 1, 5),
    "depthwise, two out of each": (1, 2, 3),
}
KINDS = (*CONVOLUTIONS, "max_pool", "avg_pool")
SIZES = {1: (37,), 2: (9, 12), 3: (4, 3, 5)}
QUICK = {"xla_backend_optimization_level": 0}  # compile in less time; the forms are chosen before


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lax_convolution(x, kernel, *, strides=1, padding="SAME", dilation=1, groups=1):
    n = x.ndim - 2
    axes = "DHW"[-n:]
    strides, dilation = np.broadcast_to(strides, n).tolist(), np.broadcast_to(dilation, n).tolist()
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


def lax_pool(kind, window, strides, padding, x):
    pads = [(0, 0), *padding, (0, 0)]

    def reduced(start, combine, x):
        return lax.reduce_window(x, start, combine, (1, *window, 1), (1, *strides, 1), pads)

    if kind == "max_pool":
        return reduced(-jnp.inf, lax.max, x)
    return reduced(0.0, lax.add, x) / reduced(0.0, lax.add, jnp.ones_like(x))


def check(ours, reference, *operands, rtol=1e-4):
    """The program is short; forward and all gradients agree to `rtol` of the largest number."""

    def everything(fn):
        def run(*operands):
            y, pull_back = jax.vjp(fn, *operands)
            return y, pull_back(jnp.cos(3 * y))

        return jax.jit(run, compiler_options=QUICK)

    assert len(everything(ours).lower(*operands).as_text().splitlines()) <= LINES
    actual, expected = everything(ours)(*operands), everything(reference)(*operands)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, float(jnp.abs(b).max())))


def check_window(kind, window, sizes, batch=2, **options):
    if kind in CONVOLUTIONS:
        channels, features, groups = CONVOLUTIONS[kind]
        # Sums of many products of the size of one: the gradients stay of the size of one, too.
        kernel = normal((*window, channels, features * groups), 1) / np.sqrt(
            np.prod(window) * channels
        )
        options = options | dict(groups=groups)
        ours, reference = (functools.partial(fn, **options) for fn in (convolve, lax_convolution))
        return check(ours, reference, normal((batch, *sizes, channels * groups)), kernel)
    strides, padding = (
        options.get("strides", (1,) * len(window)),
        [(w // 2, (w - 1) // 2) for w in window],
    )
    pool = {"max_pool": max_pool, "avg_pool": avg_pool}[kind]
    check(
        functools.partial(pool, window=window, strides=strides, padding=padding),
        functools.partial(lax_pool, kind, window, strides, padding),
        normal((batch, *sizes, 3)),
    )


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [(6,), (31,), (3, 7), (11, 10), (7, 2, 3)], ids=str)
def test_long_windows_make_short_programs_and_agree_with_lax(kind, window):
    check_window(kind, window, SIZES[len(window)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_all_windows_up_to_31_make_short_programs_and_agree_with_lax(kind, rank):
    for size in range(1, 32):
        check_window(kind, (size,) * rank, SIZES[rank])
        check_window(kind, tuple(random.Random(size).choices(range(1, 32), k=rank)), SIZES[rank])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_combination_of_options_agrees_with_lax(seed):
    """Windows, strides, dilation, padding, features and groups at random; nothing of what they
    decide is left out.
    """
    draw, checked = random.Random(seed), 0
    while checked < 12:
        rank = draw.choice([1, 2, 2, 3])
        sizes = [draw.randint(1, {1: 60, 2: 14, 3: 6}[rank]) for _ in range(rank)]
        window = [
            draw.choice([1, 2, 3, 5, 6, 7, 9, 16, 25, 31] if rank < 3 else [1, 2, 3, 6, 9])
            for _ in range(rank)
        ]
        channels, features = (draw.choice([1, 2, 4, 5, 16, 17, 33]) for _ in range(2))
        groups = draw.choice([1, 1, 2, 3])
        options = dict(
            strides=[draw.choice([1, 1, 2, 3]) for _ in range(rank)],
            dilation=[draw.choice([1, 1, 1, 2, 3]) for _ in range(rank)],
            padding=[(draw.randint(0, w), draw.randint(0, w)) for w in window],
            groups=groups,
        )
        x = normal((draw.choice([1, 3, 8]), *sizes, channels * groups))
        kernel = normal((*window, channels, features * groups), 1) / np.sqrt(
            np.prod(window) * channels
        )
        ours, reference = (functools.partial(fn, **options) for fn in (convolve, lax_convolution))
        if 0 in jax.eval_shape(reference, x, kernel).shape:
            continue
        check(ours, reference, x, kernel)
        checked += 1


@pytest.mark.parametrize(
    "kind, window, sizes",
    [
        ("depthwise", (512,), (600,)),
        ("small", (512,), (600,)),
        ("max_pool", (1000,), (1020,)),
        ("avg_pool", (1000,), (1020,)),
    ],
)
def test_windows_of_hundreds(kind, window, sizes):
    check_window(kind, window, sizes, batch=1)


@pytest.mark.parametrize("kind", ["depthwise", "max_pool", "avg_pool"])
def test_programs_of_31_in_three_axes_are_short(kind):
    window = (31, 31, 31)
    if kind == "depthwise":
        ours = functools.partial(convolve, groups=5)
        operands = jnp.ones((1, 9, 9, 9, 5)), jnp.ones((*window, 1, 5))
    else:
        ours = functools.partial(
            {"max_pool": max_pool, "avg_pool": avg_pool}[kind], window=window, strides=1, padding=15
        )
        operands = (jnp.ones((1, 33, 33, 33, 2)),)

    def gradients(*operands):
        return jax.vjp(ours, *operands)[1](ours(*operands))

    assert len(jax.jit(gradients).lower(*operands).as_text().splitlines()) <= LINES


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["small", "depthwise", "max_pool"])
@pytest.mark.parametrize("window", [(6,), (7, 6)], ids=str)
def test_second_derivatives_of_long_windows_agree_with_lax(kind, window):
    sizes = SIZES[len(window)]
    channels, features, groups = CONVOLUTIONS.get(kind, (3, 0, 1))
    x = normal((2, *sizes, channels * groups))
    xs = jnp.stack([x, jnp.sin(x)], 1)
    if kind == "max_pool":
        pads = [(w // 2, (w - 1) // 2) for w in window]
        fns = (
            functools.partial(max_pool, window=window, strides=1, padding=pads),
            functools.partial(lax_pool, kind, window, (1,) * len(window), pads),
        )
    else:
        kernel = normal((*window, channels, features * groups), 1)
        fns = tuple(
            functools.partial(lambda fn, x: fn(x, kernel, groups=groups), fn)
            for fn in (convolve, lax_convolution)
        )

    def modes(fn):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(fn(x))))
        run = jax.jit(
            lambda x, xs: (jax.jvp(gradient, (x,), (jnp.cos(x),)), jax.vmap(gradient, 1)(xs)),
            compiler_options=QUICK,
        )
        return run(x, xs)

    for a, b in zip(jax.tree.leaves(modes(fns[0])), jax.tree.leaves(modes(fns[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * float(jnp.abs(b).max()))
