"""The names of the arrays of Keras layers, and the layouts that differ from jaxnet's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxnet.interop.collect import Refused

__all__ = ["Weights", "kind_of_class", "named", "placed"]

# The order in which a layer stores its arrays. Arrays at the end may be missing (bias). For NORMS,
# gamma or beta may be.
KERNEL = ("kernel", "bias")
ORDERS: dict[str, tuple[str, ...]] = {
    **{f"conv{rank}d{end}": KERNEL for rank in (1, 2, 3) for end in ("", "_transpose")},
    **{f"depthwise_conv{rank}d": KERNEL for rank in (1, 2)},
    **{
        f"separable_conv{rank}d": ("depthwise_kernel", "pointwise_kernel", "bias")
        for rank in (1, 2)
    },
    **{kind: KERNEL for kind in ("dense", "einsum_dense")},
    # The children of an attention layer.
    **{f"{child}_dense": KERNEL for child in ("query", "key", "value", "output")},
    **{
        f"{kind}_cell": ("kernel", "recurrent_kernel", "bias")
        for kind in ("lstm", "gru", "simple_rnn")
    },
    "embedding": ("embeddings",),
    "rms_normalization": ("scale",),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
    "normalization": ("mean", "variance", "count"),
}
# The dtypes of quantized kernels; two codes of int4 share a byte.
CODES = ("int8", "uint8")
NORMS = ("batch_normalization", "layer_normalization", "group_normalization")


class Weights(NamedTuple):
    """The weights of a layer.

    Attributes:
      path: the names of the layers above it, and its own name.
      kind: its class, a key of ORDERS; '' if that is unknown.
      arrays: its arrays by name.
    """

    path: tuple[str, ...]
    kind: str
    arrays: dict[str, Any]


def kind_of_class(name: str) -> str:
    """Find the kind of a layer.

    Args:
      name: a class, a group in a file (`conv2d_1`) or the default name of a layer.

    Returns:
      The key of ORDERS; '' if it is unknown.
    """
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower().lstrip("_")
    name = name if name in ORDERS else re.sub(r"_\d+$", "", name)
    return name if name in ORDERS else ""


def named(kind: str, arrays: list[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arrays of a layer by their order.

    Args:
      kind: the kind of the layer.
      arrays: the arrays, of any shapes [...], in the order of the file.
      options: the arguments of the layer's constructor, if the file has them.

    Returns:
      The arrays by name; by number if their names are unknown.
    """
    order = ORDERS.get(kind, ())
    if kind in NORMS:
        present = [
            name
            for name, option in (("gamma", "scale"), ("beta", "center"))
            if options.get(option, True)
        ]
        order = (*present, *order[2:])
        if len(arrays) < len(order) and not options:
            # At most one of gamma and beta is here, and the file does not tell which.
            rest = ORDERS[kind][2:]
            order = (*map(str, range(len(arrays) - len(rest))), *rest)
    names = order if len(arrays) <= len(order) else ()
    return {names[i] if names else str(i): x for i, x in enumerate(arrays)}


def placed(layer: Weights) -> list[tuple[str, Any]]:
    """Bring the arrays of a layer into jaxnet's layout.

    Args:
      layer: the layer.

    Returns:
      The arrays with their names, of which `keras_model.KERAS` maps the rest.
    """
    arrays = dict(layer.arrays)
    for name, x in layer.arrays.items():
        if str(x.dtype).removeprefix("torch.") in CODES and len(x.shape) > 1:
            text = (
                f"a quantized layer holds codes ({x.dtype}), not values: save the model before "
                "model.quantize()"
            )
            arrays[name] = Refused(text)
    if "pointwise_kernel" in arrays:
        names = {
            "depthwise_kernel": "depthwise/kernel",
            "pointwise_kernel": "pointwise/kernel",
            "bias": "pointwise/bias",
        }
        arrays = {names.get(name, name): x for name, x in arrays.items()}
        return [
            (name, _depthwise(x) if name == "depthwise/kernel" else x) for name, x in arrays.items()
        ]
    # Keras 2 used this name for the kernel of a depthwise convolution.
    if "depthwise_kernel" in arrays:
        arrays["kernel"] = _depthwise(arrays.pop("depthwise_kernel"))
    elif layer.kind.startswith("depthwise_conv") and "kernel" in arrays:
        arrays["kernel"] = _depthwise(arrays["kernel"])
    return list(arrays.items())


def _depthwise(x: Any) -> Any:
    """[*window, C, M] as [*window, 1, C * M]: C groups of one channel and M outputs each."""
    return x if isinstance(x, Refused) else x.reshape(*x.shape[:-2], 1, x.shape[-2] * x.shape[-1])
