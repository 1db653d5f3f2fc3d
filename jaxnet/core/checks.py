"""Errors of a layer: checks of its arguments, and its path."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core.keys import SharedKey
from jaxnet.core.specs import describe, dtype_of, is_array

__all__ = [
    "check_input",
    "check_key",
    "check_mode",
    "check_names",
    "check_state",
    "closest",
    "explain_call",
    "is_empty",
    "scope",
]


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Run the block in the name of a layer.

    Profiler rows show the name. Errors get one line with the whole path, "in layer 'mlp/hidden'".

    Args:
      name: the name of the layer in its parent.

    Yields:
      None.
    """
    try:
        with jax.named_scope(name):
            yield
    except Exception as error:
        notes, start = getattr(error, "__notes__", []), "in layer '"
        known = next((i for i, note in enumerate(notes) if note.startswith(start)), None)
        if known is None:
            error.add_note(f"{start}{name}'")
            # JAX's own notes follow the path.
            error.__notes__.insert(0, error.__notes__.pop())
        else:
            notes[known] = f"{start}{name}/{notes[known].removeprefix(start)}"
        raise


def check_input(
    label: str,
    x: Any,
    *,
    width: int | None = None,
    rank: int = 1,
    kind: Any = jnp.floating,
    like: Any = None,
) -> None:
    """Check an input: an array with at least `rank` axes, the last of size `width`, in the dtype
    of `like`.

    Args:
      label: the name of the layer in errors.
      x: the input, [..., width].
      width: the size of the last axis; None for any size.
      rank: the minimum number of axes.
      kind: the kind of dtype, as in `jnp.issubdtype`; `object` for any.
      like: a parameter whose dtype x must have.

    Raises:
      TypeError: x is not an array, or it has another dtype.
      ValueError: x has another shape.
    """
    if not is_array(x):
        raise TypeError(f"{label}: the input must be an array or a jax.ShapeDtypeStruct, got {x!r}")
    if kind is not object and not jnp.issubdtype(x.dtype, kind):
        remedy = "x.astype(jnp.float32)" if kind is jnp.floating else "x.astype(jnp.int32)"
        raise TypeError(
            f"{label}: the input must be {kind.__name__}, got {describe(x)}; convert it, as in "
            f"{remedy}"
        )
    if len(x.shape) < rank:
        raise ValueError(f"{label}: the input must have at least {rank} axes, got {describe(x)}")
    if width is not None and x.shape[-1] != width:
        raise ValueError(
            f"{label}: last axis must be {width}, got {describe(x)}; the parameters were made "
            f"for {width}"
        )
    if like is not None and dtype_of(x) != dtype_of(like):
        raise TypeError(
            f"{label}: the input must have the dtype of the parameters, {like.dtype}, got "
            f"{describe(x)}; convert one of them, or compute in another dtype with jaxnet.cast"
        )


def check_key(label: str, key: Any) -> None:
    """Check that `key` is one JAX PRNG key, typed or raw.

    Args:
      label: the name of the layer in errors.
      key: the value to check.

    Raises:
      TypeError: it is anything else.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and not (dtype == jnp.uint32 and shape and len(shape) == 1):
        got = describe(key) if dtype is not None else repr(key)
        raise TypeError(f"{label}: key must be one PRNG key such as jax.random.key(0), got {got}")


def check_mode(label: str, key: Any, train: Any) -> None:
    """Check the arguments `key` and `train` of `apply`.

    Args:
      label: the name of the layer in errors.
      key: None or one PRNG key.
      train: a bool that is not traced.

    Raises:
      TypeError: one of them is anything else.
    """
    if key is not None and not isinstance(key, SharedKey):
        check_key(label, key)
    if not isinstance(train, bool):
        got = describe(train) if is_array(train) else repr(train)
        remedy = (
            "under jax.jit, jax.jit(net.apply, static_argnames='train') or "
            "functools.partial(net.apply, train=True)"
        )
        raise TypeError(f"{label}: train must be True or False, got {got}; {remedy}")


def check_state(label: str, state: Any, *, stateful: bool) -> None:
    """Check that `apply` received a state if and only if the layer carries one.

    Args:
      label: the name of the layer in errors.
      state: the state, or None.
      stateful: whether the layer carries state.

    Raises:
      ValueError: a stateful layer received no state.
      TypeError: a stateless layer received one.
    """
    if stateful and state is None:
        raise ValueError(
            f"{label}: this layer carries state: pass state=net.init_state(*inputs), or the "
            "state of the last call"
        )
    if not stateful and state is not None and not is_empty(state):
        raise TypeError(
            f"{label}: this layer has no state (its init_state is None): call apply without state="
        )


def check_names(what: str, tree: Any, names: Iterable[str]) -> None:
    """Check that a tree of parameters or state is a dict whose keys are names of children.

    Args:
      what: how errors name the tree, such as "mlp: params".
      tree: the tree.
      names: the names of the children.

    Raises:
      TypeError: the tree is not a dict.
      ValueError: a key is not among the names.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what} must be a dict by the name of the child, got {describe(tree)}")
    for name in tree:
        if name not in names:
            raise ValueError(
                f"{what} must have no '{name}', which is not a child of this "
                f"layer{closest(name, names)}"
            )


def explain_call(
    what: str, error: Exception, fn: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Raise TypeError with the signature of `fn` if `error` comes from a call that does not match
    it.
    """
    if not isinstance(error, TypeError):
        return
    signature = inspect.signature(fn)
    try:
        signature.bind(*inputs, **named)
    except TypeError as mismatch:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        raise TypeError(f"{what} takes {inspect.Signature(bare)}: {mismatch}") from error


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a message: the most similar name, and all names."""
    close = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (children: {', '.join(names) or 'none'})"


def is_empty(tree: Any) -> bool:
    """Whether the tree is a dict without entries."""
    return isinstance(tree, Mapping) and not tree
