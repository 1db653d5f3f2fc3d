"""Convert parameters of other libraries: PyTorch, Flax, Haiku, Equinox and Keras, from files and
from memory.

    like = {"params": params, "state": state}
    variables = from_torch("net.pt", like=like, rename={"features": "body"})

In all functions, the variables of a network are `{"params": params, "state": state}`.
docs/checkpoints.md has the table of names and layouts.
"""

from jaxnet.interop.jax_libraries import from_equinox, from_flax, from_haiku
from jaxnet.interop.keras_model import from_keras
from jaxnet.interop.torch_state import from_torch, to_torch

__all__ = ["from_equinox", "from_flax", "from_haiku", "from_keras", "from_torch", "to_torch"]
