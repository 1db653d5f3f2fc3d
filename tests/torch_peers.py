"""Compare a layer with a function of PyTorch: outputs, and gradients of parameters and inputs."""

import warnings
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# The options are chosen at trace time, so the quality of the machine code is not tested.
QUICK = {"xla_backend_optimization_level": 0}


def torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch", reason="these numbers are compared with PyTorch's")


def examples(quick: int, slow: int = 0):
    """The settings of a test over drawn options; `slow` of a test marked as slow."""
    health = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    return hypothesis.settings(
        max_examples=slow or quick,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=health,
    )


def drawn(shape, seed=0, dtype: Any = "float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def outcome(net, params, *inputs, train=True, first=False):
    """The outputs, and the gradients of parameters and float inputs for the cotangent cos(3 y)."""

    def everything(params, *inputs):
        y, pull = jax.vjp(lambda p, *x: net.apply(p, *x)[0] if first else net.apply(p, *x), params,
                          *inputs)  # fmt: skip
        return y, pull(jnp.cos(3 * y))

    y, (grads, *pulled) = jax.jit(everything, compiler_options=QUICK)(params, *inputs)
    return y, grads, [g for g in pulled if g.dtype != jax.dtypes.float0]


def applied(net, params, *inputs):
    """The outputs of one compiled call."""
    return jax.jit(net.apply, compiler_options=QUICK)(params, *inputs)


def expected(reference, params, *inputs):
    """The same of a function of tensors in jaxnet's layouts."""
    t = torch()

    def leaf(x):
        x = t.tensor(np.asarray(x))
        return x.requires_grad_() if x.is_floating_point() else x

    leaves, tensors = jax.tree.map(leaf, params), [leaf(x) for x in inputs]
    y = reference(leaves, *tensors)
    if y.requires_grad:
        y.backward(t.cos(3 * y.detach()))

    def grad(x):
        return np.zeros(x.shape) if x.grad is None else x.grad.numpy()

    grads = jax.tree.map(grad, leaves, is_leaf=lambda x: isinstance(x, t.Tensor))
    return y.detach().numpy(), grads, [grad(x) for x in tensors if x.is_floating_point()]


def agree(net, reference, *inputs, seed=1, first=False, tolerance=None):
    """Assert that the layer is the function of PyTorch: `tolerance` times the largest number."""
    dtype = np.result_type(*(x for x in inputs if np.issubdtype(x.dtype, np.floating)))
    tolerance = tolerance or {"float64": 1e-10, "float32": 1e-5}[dtype.name]
    with jax.enable_x64(dtype == np.float64):
        shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
        params = jax.tree.map(lambda p: drawn(p.shape, seed, dtype), shapes)
        actual = jax.device_get(outcome(net, params, *map(jnp.asarray, inputs), first=first))
    wanted = expected(reference, params, *inputs)
    assert jax.tree.map(np.shape, actual) == jax.tree.map(np.shape, wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        bound = tolerance * max(1.0, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def channels_first(x):
    """[N, *spatial, C] -> [N, C, *spatial] of a tensor."""
    return x.movedim(-1, 1)


def channels_last(x):
    return x.movedim(1, -1)
