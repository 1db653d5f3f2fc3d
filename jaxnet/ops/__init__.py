"""Operations on arrays, with derivatives that keep their speed inside compiled loops."""

from typing import TYPE_CHECKING

from jaxnet.first_use import resolver
from jaxnet.ops.pooling import avg_pool, max_pool

if TYPE_CHECKING:
    from jaxnet.ops.convolution import convolve

__all__ = ["avg_pool", "convolve", "max_pool"]

_HOMES = {"convolve": "jaxnet.ops.convolution"}

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
