"""Networks changed after they are made: other weights from the same parameters, at chosen paths."""

from jaxnet.adapt.folding import fold_weights
from jaxnet.adapt.freezing import frozen
from jaxnet.adapt.low_rank import lora, merge_lora
from jaxnet.adapt.pruning import prune
from jaxnet.adapt.quantizing import quantize_int8
from jaxnet.adapt.spectral import spectral_norm
from jaxnet.adapt.tying import tie
from jaxnet.adapt.weights import weight_norm, weight_standardization

__all__ = [
    "fold_weights",
    "frozen",
    "lora",
    "merge_lora",
    "prune",
    "quantize_int8",
    "spectral_norm",
    "tie",
    "weight_norm",
    "weight_standardization",
]
