"""The contract of layers, the ways to compose them, and functions for authors of layers and
combinators.
"""

from jaxnet.core.calls import Children
from jaxnet.core.checks import check_input, check_key, check_mode, check_names, check_state, scope
from jaxnet.core.composing import compose
from jaxnet.core.contract import Layer, call, no_params, run, start_state
from jaxnet.core.functions import as_layer, layer, param
from jaxnet.core.intern import interned
from jaxnet.core.keys import SharedKey, fold, fold_all, fold_copies, is_threefry
from jaxnet.core.layer_specs import output_specs
from jaxnet.core.memo import memoized
from jaxnet.core.signature import show_inputs
from jaxnet.core.specs import abstractly, describe, is_array, specs_of
from jaxnet.core.taps import tap
from jaxnet.core.wiring import wire
from jaxnet.core.wrapping import around

__all__ = [
    "Children",
    "Layer",
    "SharedKey",
    "abstractly",
    "around",
    "as_layer",
    "call",
    "check_input",
    "check_key",
    "check_mode",
    "check_names",
    "check_state",
    "compose",
    "describe",
    "fold",
    "fold_all",
    "fold_copies",
    "interned",
    "is_array",
    "is_threefry",
    "layer",
    "memoized",
    "no_params",
    "output_specs",
    "param",
    "run",
    "scope",
    "show_inputs",
    "specs_of",
    "start_state",
    "tap",
    "wire",
]
