"""Convert Keras weights, from files and from models in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.renaming import Rename
from jaxnet.checkpoint.request import checked_request
from jaxnet.interop.collect import by_path
from jaxnet.interop.convert import Convention, convert
from jaxnet.interop.keras_file import read_layers
from jaxnet.interop.keras_layers import Weights, kind_of_class, placed

__all__ = ["from_keras"]

KERAS = Convention(
    {"embeddings": "embedding", "gamma": "scale", "beta": "bias", "moving_mean": "mean"}
    | {"moving_variance": "var", "variance": "var"}
)


def from_keras(
    source: Any,
    *,
    like: Any = None,
    rename: Rename | None = None,
    pattern: str | Iterable[str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> dict[str, Any]:
    """Read the weights of a Keras model.

        like = {"params": params, "state": state}
        variables = from_keras("net.keras", like=like, rename={"conv2d": "stem"})

    | Keras | here |
    |---|---|
    | `kernel`, `bias` | the same, as they are |
    | depthwise `kernel` [*window, C, M] | `kernel` [*window, 1, C * M] of `conv(..., groups=C)` |
    | a separable convolution | a `chain`: `depthwise/kernel`, `pointwise/kernel` and `/bias` |
    | `embeddings` | `embedding` |
    | `gamma`, `beta` of a normalization | `scale`, `bias` |
    | `moving_mean`, `moving_variance` | `mean`, `var`, in `state` |
    | other names (recurrent layers, attention) | the same, as they are |
    | the optimizer, integers (seeds, counters) | left out |

    Paths consist of the names of nested models and layers: `encoder/conv2d/kernel`. A
    `*.weights.h5` file has no names of arrays. They follow from the class of the layer if the file
    records it; otherwise they are numbers (`my_layer/0`). If a layer has only one of `gamma` and
    `beta`, its name is a number as well. `rename` gives such arrays their names.

    The kernel of a transposed convolution is not changed, [*window, out, in]. Keras norms have an
    epsilon of 1e-3, and jaxnet norms 1e-5: use `batch_norm(eps=1e-3)` and `layer_norm(eps=1e-3)`.

    Args:
      source: a `.keras` file, a `.weights.h5` or an old `.h5` file, recognized by the first bytes,
        not by the name; or a Keras 3 model that has been built, with any backend.
      like: as in `from_torch`.
      rename: {path of a layer or array in Keras: path here}, or a function.
      pattern: as in `from_torch`.
      strict: as in `from_torch`.
      cast: as in `from_torch`.

    Returns:
      {"params": ..., "state": ...}, or the parts of these that `like` has. Nothing shares memory
      with the source.

    Raises:
      CheckpointError: the file is damaged, is not a Keras file, links to other files, is compressed
        or declares more bytes than it contains; or it does not match the request (all differences
        in one error).
      ImportError: a file needs h5py, which is the extra `jaxnet[keras]`.
      TypeError: `source` is neither a path nor a Keras 3 model.
      ValueError: `like` does not have the form of variables.
      OSError: the file cannot be opened.
    """
    request = checked_request(like, pattern, rename, strict, cast)
    if isinstance(source, (str, bytes, os.PathLike)):
        file, layers = os.fsdecode(source), read_layers(source)
    else:
        file = "the model of Keras"
        layers = _layers(file, source)
    pairs = [("/".join((*layer.path, name)), x) for layer in layers for name, x in placed(layer)]
    return convert(file, by_path(file, pairs, str), KERAS, request)


def _layers(file: str, model: Any) -> list[Weights]:
    """The layers of a model in memory.

    Each has its own weights, and the names of all layers above it.
    """
    if not (hasattr(model, "_layers") and hasattr(model, "_trainable_variables")):
        what = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"from_keras needs a path or a model of Keras 3, got a {what}: give model.save()'s file"
        )
    if not model.built:
        text = (
            "it has not been built, so it has no weights: call it once, or model.build(input_shape)"
        )
        raise CheckpointError(file, None, text)
    found, seen = [], set()

    def visit(layer: Any, path: tuple[str, ...]) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        variables = [*layer._trainable_variables, *layer._non_trainable_variables]
        kinds = [kind_of_class(base.__name__) for base in type(layer).__mro__]
        arrays = by_path(file, [("/".join((*path, v.name)), v) for v in variables], str)
        own = {name.rpartition("/")[2]: v.value for name, v in arrays.items()}
        found.append(Weights(path, next(filter(None, kinds), ""), own))
        for child in getattr(layer, "layers", None) or layer._layers:
            visit(child, (*path, child.name))

    visit(model, ())
    return found
