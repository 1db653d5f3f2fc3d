"""Many trainings at once: one run, mapped over seeds, learning rates or whatever else its arguments
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.checks import size_of

__all__ = ["many"]


Run = TypeVar("Run", bound=Callable[..., Any])


def many(run: Run, *, how: Literal["vmap", "map"] | int | None = None) -> Run:
    """Map a whole run over its members, many(run)(*xs)[i] = run(*(x[i] for x in xs)), as one
    compiled call.

        def run(key, lr):
            optimizer = optax.adam(lr)
            state = TrainState.create(net.init(key, images), optimizer, key)
            return train_steps(train_step(loss, optimizer), batch_size, steps)(state, data)

        states, metrics = many(run)(jax.random.split(key, 256), jnp.geomspace(1e-4, 1e-1, 256))

    What all members share, as the data here, `run` closes over. The result is an ordinary function
    for `jax.jit`, `jax.vmap` and `jax.grad`. Call it once, or keep it: what `many` returns
    remembers what it has compiled.

    Args:
      run: a pure function of arrays (PRNG keys, too) or pytrees of them, as for `jax.vmap`.
      how: "vmap", all members in step; "map", one after the other; an int, so many in step, blocks
        one after the other. The results are the same to rounding. None chooses by the platform that
        the program is compiled for: "vmap", but on a CPU blocks of at most 16 members, and fewer as
        they get larger, so that for all of them together the largest floating-point result in the
        run (as a rule the parameters with the optimizer's state, which the training loop carries,
        or the largest activation) is at most 2 MiB and stays in the cache.

    Returns:
      A function with the arguments of `run`, every leaf with a leading axis of members [M, ...],
      and its results stacked the same way.

    Raises:
      ValueError: `how` is invalid; when the function is called, the leaves have no common leading
        axis.

    Source: `python benchmarks/ensembles.py`, on one CPU core, 256 members from 2-2-1 to
    784-256-128-10 (benchmarks/README.md has the table): in units of the fastest form's time of each
    case, this choice takes at most 1.10, "vmap" 4.55, "map" 3.06, 4 1.36 and 16 1.91. On
    accelerators `vmap` is the usual choice; nothing was measured there.
    """
    if not (how is None or isinstance(how, str) and how in ("vmap", "map")):
        how = size_of("many: how must be 'vmap', 'map' or None, or else it", how)

    def one(member):
        args, kwargs = member
        return run(*args, **kwargs)

    @jax.jit
    def mapped(*args, **kwargs):
        members = args, kwargs
        count = _members(members)
        if how == "vmap":
            return jax.vmap(one)(members)
        if how is not None:
            return _in_blocks(one, members, 1 if how == "map" else min(how, count))
        block = _block(one, members, count)
        return lax.platform_dependent(
            members, cpu=lambda xs: _in_blocks(one, xs, block), default=jax.vmap(one)
        )

    return mapped  # pyright: ignore[reportReturnType]


_BLOCK = 16  # members in step on a CPU: enough to hide what a loop and its small operations cost
# Bytes of the largest result, for all of a block. A few such results are at work at once.
_CACHE = 2 * 2**20


def _in_blocks(one: Callable[..., Any], members: Any, size: int) -> Any:
    return lax.map(one, members, batch_size=size if size > 1 else None)


def _block(one: Callable[..., Any], members: Any, count: int) -> int:
    """How many members in step on a CPU: a divisor of `count` if there is a good one, for a rest is
    one more program.
    """
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), members)
    most = min(_BLOCK, count, max(1, _CACHE // max(1, _largest(jax.make_jaxpr(one)(member)))))
    divisor = max(size for size in range(1, most + 1) if count % size == 0)
    return divisor if 2 * divisor >= most else most


def _largest(jaxpr: Any) -> int:
    """Bytes of the largest floating-point result of one equation; for loops and calls, those
    within, and what they carry.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
    found = [_bytes(jaxpr.outvars)]
    for equation in jaxpr.eqns:
        inner = [
            part
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
            if _is_jaxpr(part)
        ]
        found.extend(map(_largest, inner))
        if not inner:
            found.append(_bytes(equation.outvars))
    return max(found)


def _bytes(variables: Any) -> int:
    kinds = [variable.aval for variable in variables if hasattr(variable.aval, "dtype")]
    return sum(
        kind.size * kind.dtype.itemsize for kind in kinds if jnp.issubdtype(kind.dtype, jnp.inexact)
    )


def _is_jaxpr(part: Any) -> bool:
    return hasattr(getattr(part, "jaxpr", part), "eqns")


def _members(members: Any) -> int:
    """The length M of the leading axis that all leaves share."""
    args, kwargs = members
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        )
    }
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            "many: all arguments must have one leading axis, of one member or more, got the shapes "
            + (
                ", ".join(f"{shape} of '{path}'" for path, shape in shapes.items())
                or "of no arrays at all"
            )
            + (
                "; let `run` close over what all members share, and give every member its part "
                "of the rest, as arrays"
            )
        )
    return counts.pop()[0]
