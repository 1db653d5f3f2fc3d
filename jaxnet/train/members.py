"""Many trainings at once: one run, mapped over its arguments, such as seeds or learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.checks import size_of
from jaxnet.train.leading import leading_length

__all__ = ["many"]


def many(run: Callable[..., Any], *, how: str | int | None = None) -> Callable[..., Any]:
    """Map a whole run over its members, many(run)(*xs)[i] = run(*(x[i] for x in xs)), as one
    compiled call.

        def run(key, lr):
            optimizer = optax.adam(lr)
            state = TrainState.create(net.init(key, images), optimizer, key)
            return train_steps(train_step(loss, optimizer), batch_size, steps)(state, data)

        states, metrics = many(run)(jax.random.split(key, 256), jnp.geomspace(1e-4, 1e-1, 256))

    `run` closes over all that the members share, as the data here. The result is an ordinary
    function for `jax.jit`, `jax.vmap` and `jax.grad`. Call it once, or keep it: it remembers the
    programs that it has compiled.

    Source: `python benchmarks/ensembles.py`, on one CPU core, 256 members from 2-2-1 to
    784-256-128-10 (benchmarks/README.md has the table). In units of the fastest form's time of each
    case, the default takes at most 1.10, "vmap" 4.55, "map" 3.06, 4 1.36 and 16 1.91. On
    accelerators `vmap` is the usual choice; nothing was measured there.

    Args:
      run: a pure function of arrays (PRNG keys, too) or pytrees of them, as for `jax.vmap`.
      how: "vmap" runs all members in step, "map" one after the other, and an int this number of
        members in step, block after block. The results are the same up to rounding. None chooses by
        the platform that the program is compiled for: "vmap", but on a CPU blocks of at most 16
        members. There, blocks get smaller as the members get larger, so that the largest
        floating-point result of a block (as a rule the parameters with the optimizer's state, which
        the training loop carries, or the largest activation) is at most 2 MiB and stays in the
        cache.

    Returns:
      A function with the arguments of `run`, every leaf with a leading axis of members [M, ...],
      and its results stacked the same way.

    Raises:
      ValueError: `how` is invalid; when the function is called, the leaves have no common leading
        axis.
    """
    if not (how is None or isinstance(how, str) and how in ("vmap", "map")):
        how = size_of("many: how must be 'vmap', 'map' or None, or else it", how)

    def one(member):
        args, kwargs = member
        return run(*args, **kwargs)

    @jax.jit
    def mapped(*args, **kwargs):
        members = args, kwargs
        count = _count(args, kwargs)
        if how == "vmap":
            return jax.vmap(one)(members)
        if how is not None:
            return _in_blocks(one, members, 1 if how == "map" else min(how, count))
        block = _block(one, members, count)
        return lax.platform_dependent(
            members, cpu=lambda xs: _in_blocks(one, xs, block), default=jax.vmap(one)
        )

    return mapped  # pyright: ignore[reportReturnType]


# Members in step on a CPU, enough to hide the cost of a loop and its small operations.
_BLOCK = 16
# Bytes of the largest result, for all of a block. A few such results are at work at once.
_CACHE = 2 * 2**20


def _in_blocks(one: Callable[[Any], Any], members: Any, size: int) -> Any:
    return lax.map(one, members, batch_size=size if size > 1 else None)


def _block(one: Callable[[Any], Any], members: Any, count: int) -> int:
    """The number of members in step on a CPU: a divisor of `count` if there is a good one, because
    a rest would need another program.
    """
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), members)
    most = min(_BLOCK, count, max(1, _CACHE // max(1, _largest(jax.make_jaxpr(one)(member)))))
    divisor = max(size for size in range(1, most + 1) if count % size == 0)
    return divisor if 2 * divisor >= most else most


def _largest(jaxpr: Any) -> int:
    """Bytes of the largest floating-point result of one equation. For loops and calls, the
    equations inside and the values that they carry count.
    """
    # A closed jaxpr contains the jaxpr.
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = [_bytes(jaxpr.outvars)]
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        inner = [part for part in parts if _is_jaxpr(part)]
        found.extend(map(_largest, inner))
        if not inner:
            found.append(_bytes(equation.outvars))
    return max(found)


def _bytes(variables: Any) -> int:
    specs = [variable.aval for variable in variables if hasattr(variable.aval, "dtype")]
    floats = [spec for spec in specs if jnp.issubdtype(spec.dtype, jnp.inexact)]
    return sum(spec.size * spec.dtype.itemsize for spec in floats)


def _is_jaxpr(part: Any) -> bool:
    return hasattr(getattr(part, "jaxpr", part), "eqns")


def _count(args: tuple, kwargs: dict[str, Any]) -> int:
    """The length M of the leading axis that all leaves share."""
    remedy = (
        "let `run` close over what all members share, and give every member its part of the rest, "
        "as arrays"
    )
    named = {str(i): arg for i, arg in enumerate(args)} | kwargs
    return leading_length("many", "members", named, remedy)
