"""One form for the networks of all libraries: the functions that `layers.py` compiles and times.

Every library initializes in its own way, and then takes the weights of the hand-written network. A
weight is found by its path in the library, which `named` translates:

    "{input;hidden}/[i,f]/kernel"  [input/i, input/f] over [hidden/i, hidden/f]: one matrix of four
    "*/norm/scale"                 stacked over all copies: 0/norm/scale, 1/norm/scale, ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# pyright: reportMissingImports=false

Weights = dict[str, Any]
ZERO = "zero"  # a vector of zeros, for a bias that only some libraries have


class Net(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: (key, x) -> (params, state), as the library initializes; state is {} if there is none.
      apply: (params, state, x, train) -> (outputs, state).
      named: path in the library -> names of weights.
      transposed: whether kernels are [out, in, *window].
      adjust: weights -> weights, for a library that computes another form of the same function.
      lacks: weights that the library does not have. They are zero at the start.
    """

    init: Callable[[Any, Any], tuple[Any, Any]]
    apply: Callable[[Any, Any, Any, bool], tuple[Any, Any]]
    named: Callable[[str], str] = lambda path: path
    transposed: bool = False
    adjust: Callable[[Weights], Weights] = lambda weights: weights
    lacks: Sequence[str] = ()


class TorchNet(NamedTuple):
    """A module of PyTorch with the weights set, and what makes its input of an array."""

    module: Any
    to_input: Callable[[np.ndarray], Any]


def renamed(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """A translation of paths by regular expressions, one after the other."""

    def named(path):
        for pattern, name in pairs:
            path = re.sub(pattern, name, path)
        return path

    return named


# Weights


def filled(net: Net, params: Any, weights: Weights) -> Any:
    """The weights as the parameters of a network. Raises ValueError if one is missing or left."""
    weights, used = net.adjust(weights), set()

    def leaf(path, slot):
        if isinstance(slot, str):
            return jnp.asarray(_value(slot, weights, used, False))
        name = net.named(jax.tree_util.keystr(path, simple=True, separator="/"))
        value = _value(name, weights, used, net.transposed)
        if value.size != slot.size:
            raise ValueError(f"{name} has {value.size} numbers, expected {slot.size}")
        return jnp.asarray(value.reshape(slot.shape), slot.dtype)

    made = jax.tree_util.tree_map_with_path(leaf, params)
    if left := set(weights) - used - {ZERO, *net.lacks}:
        raise ValueError(f"the network has no {', '.join(sorted(left))}")
    return made


def _value(name: str, weights: Weights, used: set[str], transposed: bool) -> np.ndarray:
    if "*" in name:
        copies = sorted({int(i) for i in re.findall(r"\b\d+(?=/)", " ".join(weights))})
        return np.stack(
            [_value(name.replace("*", str(i), 1), weights, used, transposed) for i in copies]
        )
    value = _joined(name, weights, used)
    if transposed and name.endswith("kernel"):
        window = range(value.ndim - 2)
        value = value.transpose(value.ndim - 1, value.ndim - 2, *window)
    return value


def _joined(name: str, weights: Weights, used: set[str]) -> np.ndarray:
    for opened, closed, separator, axis in (r"{", r"}", ";", 0), (r"[", r"]", ",", -1):
        if opened in name:
            before, rest = name.split(opened, 1)
            inside, after = rest.split(closed, 1)
            parts = [before + part.strip() + after for part in inside.split(separator)]
            return np.concatenate([_joined(part, weights, used) for part in parts], axis)
    used.add(name)
    return weights[name]


# The libraries


def hand(apply: Callable, names: Any, state: Any = None) -> Net:
    """Hand-written JAX: (params, state, x, train) -> (y, state), or (params, x) -> y without state.
    `names` is the tree of params with the names of the weights in the place of arrays.
    """

    def stateless(params, kept, x, train):
        return apply(params, x), kept

    return Net(lambda key, x: (names, state or {}), apply if state else stateless)


def jaxnet(net: Any, *pairs: tuple[str, str], **facts: Any) -> Net:
    from jaxnet import call

    def init(key, x):
        state = net.init_state(x) if net.init_state else {}
        return net.init(key, x), state

    def apply(params, state, x, train):
        y, new = call(net, params, x, state=state or None, train=train)
        return y, new or {}

    return Net(init, apply, renamed(*pairs), **facts)


def linen(module: Any, *pairs: tuple[str, str], **facts: Any) -> Net:
    """A module whose `__call__` is (x, train)."""

    def init(key, x):
        variables = dict(module.init(key, x, False))
        return variables.pop("params"), variables

    def apply(params, state, x, train):
        variables = {"params": params, **state}
        if state and train:
            return module.apply(variables, x, True, mutable=list(state))
        return module.apply(variables, x, train), state

    return Net(init, apply, renamed(*pairs), **facts)


def nnx(make: Callable[[Any], Any], *pairs: tuple[str, str], **facts: Any) -> Net:
    """`make(rngs)` gives a module whose `__call__` is (x, train). A compiled loop takes the
    functional form: `nnx.split` and `nnx.merge`.
    """
    from flax import nnx

    split: Any = nnx.split
    graph: Any = None

    def init(key, x):
        nonlocal graph
        graph, params, state = split(make(nnx.Rngs(key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(params, state, x, train):
        module = nnx.merge(graph, params, state)
        y = module(x, train)
        return y, nnx.to_pure_dict(split(module, nnx.Param, ...)[2]) if train else state

    return Net(init, apply, renamed(*pairs), **facts)


def equinox(make: Callable[[Any], Any], *pairs, stateful: bool = False, **facts: Any) -> Net:
    """`make(key)` gives a module of one example: x -> y, or (x, state) -> (y, state)."""
    import equinox as eqx

    static: Any = None

    def init(key, x):
        nonlocal static
        module, state = eqx.nn.make_with_state(make)(key) if stateful else (make(key), {})
        params, static = eqx.partition(module, eqx.is_inexact_array)
        return params, state

    def apply(params, state, x, train):
        module = eqx.combine(params, static)
        if not stateful:
            return jax.vmap(module)(x), state
        module = module if train else eqx.nn.inference_mode(module)
        over_batch = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return over_batch(x, state)

    return Net(init, apply, renamed(*pairs), transposed=True, **facts)


def haiku(forward: Callable[[Any, bool], Any], *pairs: tuple[str, str], **facts: Any) -> Net:
    import haiku as hk

    network = hk.transform_with_state(forward)

    def init(key, x):
        params, state = network.init(key, x, True)
        # The running averages of its batch norm are those of x. Those of the others are 0 and 1.
        for name, part in state.items():
            if "average" in part:
                start = jnp.ones if "var_ema" in name else jnp.zeros
                part["average"] = start(part["average"].shape)
        return params, state

    def apply(params, state, x, train):
        return network.apply(params, state, None, x, train)

    ours = (r"/w$", "/kernel"), (r"/b$", "/bias"), (r"/offset$", "/bias")
    ours = (*ours, (r"/embeddings$", "/embedding"), (r"~/|/~", ""))
    return Net(init, apply, renamed(*ours, *pairs), **facts)


def keras(make: Callable[[], Any], *pairs: tuple[str, str], **facts: Any) -> Net:
    """`make()` gives a built model; a compiled loop takes its `stateless_call`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # noqa: F401

    model: Any = None

    def init(key, x):
        nonlocal model
        model = make()
        variables = model.trainable_variables, model.non_trainable_variables
        params, state = ({v.path: jnp.asarray(v.value) for v in part} for part in variables)
        return params, state

    def apply(params, state, x, train):
        trained = [params[v.path] for v in model.trainable_variables]
        others = [state[v.path] for v in model.non_trainable_variables]
        y, new = model.stateless_call(trained, others, x, training=train)
        return y, dict(zip((v.path for v in model.non_trainable_variables), new, strict=True))

    ours = (r"/gamma$", "/scale"), (r"/beta$", "/bias"), (r"/embeddings$", "/embedding")
    return Net(init, apply, renamed(*ours, *pairs), **facts)


def torch(
    module: Any,
    weights: Weights,
    *pairs: tuple[str, str],
    to_input: Callable | None = None,
) -> TorchNet:
    """The module with the weights set; a `weight` is a kernel if no pair says otherwise."""
    from torch import from_numpy, no_grad

    named = renamed((r"\.", "/"), *pairs, (r"weight$", "kernel"))
    params = {name: p.detach().numpy() for name, p in module.named_parameters()}
    made = filled(Net(lambda *_: None, lambda *_: None, named, True), params, weights)  # pyright: ignore
    with no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(from_numpy(np.array(made[name])))
    return TorchNet(module, to_input or from_numpy)


def channels_first(channels_last: bool, images: np.ndarray) -> Any:
    """Images [B, H, W, C] as a tensor [B, C, H, W], in one of the two orders of memory."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return x.to(memory_format=torch.channels_last) if channels_last else x
