"""What `help`, notebooks and editors show: the inputs of `apply`, the name and the docstring of a
body.
"""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import (
    batch_norm,
    capture,
    cast,
    chain,
    conv,
    dense,
    dropout,
    layer,
    parallel,
    param,
    remat,
    repeat,
    residual,
    scan,
    vmap,
    wire,
)
from jaxnet.core import around

MODES = "state=None, key=None, train=False"
WRITTEN = f"(params, *inputs, {MODES}, **named)"


@wire(up=dense(8), down=dense(4))
def block(f, x, *, mask=None):
    """One block."""
    return x + f.down(f.up(x))


def noisy(params, x, temperature=1.0, *, key, train):
    return x


def positional(x, y=2, /):
    return x


def renamed(inner):
    def call(run, params, state, key, tokens, positions):
        return run(params, state, key, tokens + positions)

    return around(inner, call, label="renamed", rebuild=renamed)


class Cell:
    def __call__(self, carry, x):
        return carry, x


CASES = {
    "dense": (dense(3), f"(params, x, *, {MODES})"),
    "conv": (conv(3, 3), f"(params, x, *, {MODES})"),
    "dropout": (dropout(0.5), f"(params, x, *, {MODES})"),
    "stateful": (batch_norm(), f"(params, x, weights=None, *, {MODES})"),
    "param": (param((3,), jax.nn.initializers.zeros), f"(params, *, {MODES})"),
    "layer": (layer(None, noisy), f"(params, x, temperature=1.0, *, {MODES})"),
    "wire": (block, f"(params, x, *, mask=None, {MODES})"),
    "lambda": (wire(a=dense(3))(lambda f, x, y: f.a(x + y)), f"(params, x, y, *, {MODES})"),
    "any inputs": (
        wire(a=dense(3))(lambda f, *xs, **named: f.a(*xs)),
        f"(params, *xs, {MODES}, **named)",
    ),
    "chain": (chain(block, dense(3)), f"(params, x, *, mask=None, {MODES})"),
    "empty chain": (chain(), f"(params, *inputs, {MODES}, **kwargs)"),
    "parallel": (parallel(dense(3), block), f"(params, x, *, {MODES})"),
    "function": (chain(lambda a, b: a + b), f"(params, a, b, *, {MODES})"),
    "positional": (chain(positional), f"(params, x, y=2, /, *, {MODES})"),
    "partial": (chain(functools.partial(positional, 1)), f"(params, y=2, /, *, {MODES})"),
    "instance": (scan(Cell()), f"(params, carry, x, *, {MODES})"),
    "residual": (residual(block), f"(params, x, *, mask=None, {MODES})"),
    "repeat": (repeat(block, 3), f"(params, x, *, mask=None, {MODES})"),
    "remat": (remat(dense(3)), f"(params, x, *, {MODES})"),
    "cast": (cast(dense(3), jnp.bfloat16), f"(params, x, *, {MODES})"),
    "vmap": (vmap(dense(3), 3), f"(params, x, *, {MODES})"),
    "around": (renamed(dense(3)), f"(params, tokens, positions, *, {MODES})"),
    "nested": (chain(remat(repeat(residual(block), 2))), f"(params, x, *, mask=None, {MODES})"),
    # What cannot be shown truly is shown as `apply` is written.
    "no signature": (chain(max), WRITTEN),
    "a name of apply": (wire(a=dense(3))(lambda f, x, state: f.a(x)), WRITTEN),
    "f among all": (wire(a=dense(3))(lambda *everything: everything[0].a(everything[1])), WRITTEN),
}


@pytest.mark.parametrize("name", CASES)
def test_the_signature_of_apply_names_the_inputs(name):
    net, expected = CASES[name]
    assert str(inspect.signature(net.apply)) == expected


def test_capture_shows_the_inputs_of_the_network():
    assert inspect.signature(capture(block)) == inspect.signature(block.apply)


def test_apply_accepts_what_its_signature_shows():
    """`bind` follows the signature, and the call accepts the same arguments, also under jit."""
    x = jnp.ones((2, 4))
    params = block.init(jax.random.key(0), x)
    arguments = inspect.signature(block.apply).bind(params, x=x, mask=None, train=False)
    expected = block.apply(params, x)
    np.testing.assert_array_equal(block.apply(*arguments.args, **arguments.kwargs), expected)
    jitted = jax.jit(block.apply, static_argnames=("train", "mask"), donate_argnames=())
    np.testing.assert_allclose(jitted(params, x, mask=None, train=False), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="msk"):
        jax.jit(block.apply, static_argnames="msk")


def test_a_wrong_argument_is_answered_as_before():
    """The signature is for display; errors come from the call."""
    with pytest.raises(TypeError, match=r"block: the body takes \(f, x, \*, mask=None\)"):
        block.apply(block.init(jax.random.key(0), jnp.ones((2, 4))), jnp.ones((2, 4)), msk=1)


def test_a_decorated_body_keeps_its_name_and_docstring():
    assert (operator.attrgetter("__name__", "__doc__")(block)) == ("block", "One block.")
    assert "One block." in inspect.getdoc(block)  # pyright: ignore[reportOperatorIssue]
    assert repr(block).startswith("block(")
