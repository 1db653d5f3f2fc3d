"""Convert parameters of other JAX libraries, whose containers are pytrees: Flax, Haiku, Equinox."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxnet.checkpoint.renaming import Rename
from jaxnet.checkpoint.request import checked_request
from jaxnet.checkpoint.words import shown
from jaxnet.interop import attention
from jaxnet.interop.collect import by_path, flat
from jaxnet.interop.convert import Convention, convert
from jaxnet.interop.recurrent import joined_gates, joined_halves, reordered_gru
from jaxnet.interop.transposed import with_flipped, with_transposed
from jaxnet.interop.variables import STATE

__all__ = ["from_equinox", "from_flax", "from_haiku"]

FLAX = Convention({})
HAIKU = Convention(
    {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}
    | {
        f"{name}_ema/{kind}": name if kind == "average" else None
        for name in STATE
        for kind in ("average", "hidden")
    },
    broadcast=True,
)
EQUINOX = Convention({}, features_first=True, broadcast=True)


def from_flax(
    variables: Any,
    *,
    like: Any = None,
    rename: Rename | None = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
    transposed: str | Iterable[str] = (),
) -> dict[str, Any]:
    """Convert the variables of a Flax network.

    Names and layouts are the same: `kernel`, `bias`, `scale`, `embedding`. Of the variables of
    Linen, the collections `params` and `batch_stats` are converted. Arrays with the names `mean`
    and `var` become state, unless `like` has them in params. Random keys are left out, and so are
    integers that `like` does not have. The gates of `LSTMCell`, `OptimizedLSTMCell` and `GRUCell`
    are joined to the `kernel`, `bias` and `hidden_bias` of `lstm_cell` and `gru_cell`.

    A `MultiHeadDotProductAttention` fills a `multi_head_attention`: its `key` and `value` are
    `keys` and `values` here, and the axes of heads and features are joined.

    Args:
      variables: the result of Linen's `init`, or an NNX module or `nnx.state(module)`; its arrays
        have the shapes of those in jaxnet.
      like: as in `from_torch`.
      rename: {path of a module or parameter in Flax, without the collection: path here}, or a
        function.
      pattern: as in `from_torch`.
      strict: as in `from_torch`.
      cast: as in `from_torch`.
      transposed: a pattern of paths in Flax, or several: the transposed convolutions, because
        neither name nor shape tells them. Their kernels, [*window, in, out], are flipped and their
        features exchanged. Those with transpose_kernel=True need no change.

    Returns:
      As `from_torch`.

    Raises:
      CheckpointError: as `from_torch`.
      ValueError: as `from_torch`; or a path is in params and in batch_stats; or a pattern of
        `transposed` matches no kernel.
    """
    request = checked_request(like, pattern, rename, strict, cast)
    file = "the variables of Flax"
    if isinstance(variables, Mapping) and "params" in variables:
        leaves = by_path(file, flat(variables["params"]), str)
        statistics = by_path(file, flat(variables.get("batch_stats")), str)
        if both := sorted(leaves.keys() & statistics.keys()):
            raise ValueError(
                f"the variables of Flax have '{shown(both[0])}' in params and in batch_stats: "
                "rename one of them"
            )
        leaves |= statistics
    else:
        leaves = by_path(file, flat(variables), lambda name: name.removesuffix("/value"))
    leaves = joined_gates(file, with_flipped(leaves, transposed, "kernel", exchange=True))
    return convert(file, attention.of_flax(leaves), FLAX, request)


def from_haiku(
    params: Any,
    state: Any = None,
    *,
    like: Any = None,
    rename: Rename | None = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
    transposed: str | Iterable[str] = (),
) -> dict[str, Any]:
    """Convert the parameters and the state of a Haiku network.

    | Haiku | here |
    |---|---|
    | `w`, `b` | `kernel`, `bias` |
    | `scale`, `offset` | `scale`, `bias`, without axes of size 1 |
    | `embeddings` | `embedding` |
    | `mean_ema/average`, `var_ema/average` in the state | `mean`, `var`, in `state` |
    | `query`, `key`, `value`, `linear` of an attention | `query`, `keys`, `values`, `out` |
    | `w_i`, `w_h`, `b` of a GRU | `kernel`, `bias` of `gru_cell(reset_after=False)` |
    | a step `~` in the name of a module: `mlp/~/linear_0` | left out: `mlp/linear_0` |

    Args:
      params: the parameters from Haiku's `init`.
      state: the state from Haiku's `init`, if the network has state.
      like: as in `from_torch`.
      rename: {path of a module or parameter in Haiku, without '~': path here}, or a function.
      pattern: as in `from_torch`.
      strict: as in `from_torch`.
      cast: as in `from_torch`.
      transposed: a pattern of paths in Haiku, without '~', or several: the transposed convolutions,
        because neither name nor shape tells them. Their kernels, [*window, out, in], are flipped.

    Returns:
      As `from_torch`.

    Raises:
      CheckpointError: as `from_torch`.
      ValueError: as `from_torch`; or a pattern of `transposed` matches no kernel.
    """
    request = checked_request(like, pattern, rename, strict, cast)
    file = "the parameters of Haiku"

    def without_marks(name: str) -> str:
        return "/".join(step for step in name.split("/") if step != "~")

    leaves = by_path(file, [*flat(params), *flat(state)], without_marks)
    leaves = reordered_gru(file, with_flipped(leaves, transposed, "w", exchange=False))
    return convert(file, attention.of_haiku(leaves), HAIKU, request)


def from_equinox(
    model: Any,
    state: Any = None,
    *,
    like: Any = None,
    rename: Rename | None = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> dict[str, Any]:
    """Convert the parameters of an Equinox model, and the averages of its batch norms.

    Names and layouts are those of PyTorch (`from_torch` has the table); vectors lose axes of size
    1, and the kernels of transposed convolutions are flipped. The averages come from `state`. Those
    of a batch norm with mode "batch" are corrected for their start at zero, as Equinox does when it
    uses them. The inputs of a dense layer after a flattened convolution must be reordered, too. The
    projections of a `MultiheadAttention` are `query`, `keys`, `values` and `out` here.

    Args:
      model: a module.
      state: its `equinox.nn.State`, if there is one.
      like: as in `from_torch`.
      rename: {path of a module or array in the model, as in 'layers/0': path here}, or a function.
      pattern: as in `from_torch`.
      strict: as in `from_torch`.
      cast: as in `from_torch`.

    Returns:
      As `from_torch`.

    Raises:
      CheckpointError: as `from_torch`.
      ValueError: as `from_torch`.
    """
    request = checked_request(like, pattern, rename, strict, cast)
    file = "the model of Equinox"
    averages = [] if state is None else _averages(model, state)
    leaves = by_path(file, [*flat(with_transposed(model)), *averages], str)
    return convert(file, attention.of_equinox(joined_halves(file, leaves)), EQUINOX, request)


def _averages(model: Any, state: Any) -> list[tuple[str, Any]]:
    """The mean and var of each batch norm in a model of Equinox, with their paths."""
    import jax
    import jax.numpy as jnp

    def is_norm(x: Any) -> bool:
        return hasattr(x, "batch_state_index") and hasattr(x, "ema_state_index")

    result = []
    for path, norm in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_norm):
        if not is_norm(norm):
            continue
        if norm.ema_state_index is not None:
            averages = state.get(norm.ema_state_index)
        else:
            count = state.get(norm.batch_counter)
            # The weight of the batches in the average. The remaining weight is that of the initial
            # zero.
            share = jnp.where(count == 0, 1, 1 - norm.momentum**count)
            averages = [
                x / jnp.broadcast_to(share, x.shape) for x in state.get(norm.batch_state_index)
            ]
        for name, x in zip(STATE, averages, strict=True):
            steps = (*path, jax.tree_util.GetAttrKey(name))
            result.append((jax.tree_util.keystr(steps, simple=True, separator="/"), x))
    return result
