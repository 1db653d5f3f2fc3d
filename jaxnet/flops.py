"""FLOPs of a program as it is written."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxnet.core import Layer, abstractly, memoized, run, start_state

__all__ = ["flops_of"]


def flops_of(layer: Layer, args: Any, train: bool) -> int:
    """The FLOPs of one call of a layer, with these inputs by position and by name."""
    inputs, named = args

    def start(key, *inputs, **named):
        params_key, state_key = jax.random.split(key)
        state = start_state(layer, state_key, inputs, named) if layer.init_state else None
        return layer.init(params_key, *inputs, **named), state

    def evaluate(params, state, key, *inputs, **named):
        return run(layer, params, state, key if train else None, train, inputs, named)[0]

    def compute():
        params, state = abstractly(start)(jax.random.key(0), *inputs, **named)
        trace = abstractly(evaluate, lambda fn, arrays: jax.make_jaxpr(fn)(arrays))
        return _count_flops(trace(params, state, jax.random.key(0), *inputs, **named).jaxpr)

    return memoized(layer, "flops", compute, train, inputs, named)


def _count_flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name = equation.primitive.name
    size = sum(math.prod(v.aval.shape) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return 2 * size * math.prod(kernel) // kernel[spec[0]]
    if name in _CONVOLUTIONS:
        operands = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        kernel, output = (operands[i] for i in _CONVOLUTIONS[name])
        return 2 * math.prod(output) * math.prod(kernel) // kernel[-1]
    if name.startswith("reduce_window"):
        return size * math.prod(equation.params["window_dimensions"])
    if name in _ARITHMETIC:
        return size
    if name in _REDUCTIONS:
        return math.prod(equation.invars[0].aval.shape)
    # This import takes 16 ms, so it is not at the top of the module.
    import jax.extend.core

    jaxprs = jax.extend.core.jaxprs_in_params(equation.params)
    inner = [_count_flops(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in jaxprs]
    if not inner:
        return 0
    return max(inner) if name == "cond" else sum(inner) * equation.params.get("length", 1)


# The primitives of jaxnet.ops: the positions of kernel and output among (operands, result).
_CONVOLUTIONS = {"convolve": (1, 2), "convolve_input": (0, 1), "convolve_kernel": (2, 1)}


_ARITHMETIC = frozenset(
    "add sub mul div rem max min neg abs sign pow integer_pow sqrt rsqrt cbrt exp exp2 expm1 log "
    "log1p tanh logistic sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc "
    "erf_inv square floor ceil round lgamma digamma cumsum cumprod cummax cummin cumlogsumexp "
    "add_any".split()
)


_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())
