"""Operations on arrays, with derivatives that keep their speed inside compiled loops."""

from typing import TYPE_CHECKING

from jaxnet.first_use import resolver
from jaxnet.ops.pooling import avg_pool, max_pool, sum_pool

if TYPE_CHECKING:
    from jaxnet.ops.convolution import convolve
    from jaxnet.ops.local import convolve_locally
    from jaxnet.ops.transposed import convolve_transpose

__all__ = [
    "avg_pool",
    "convolve",
    "convolve_locally",
    "convolve_transpose",
    "max_pool",
    "sum_pool",
]

_HOMES = {
    "convolve": "jaxnet.ops.convolution",
    "convolve_locally": "jaxnet.ops.local",
    "convolve_transpose": "jaxnet.ops.transposed",
}

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
