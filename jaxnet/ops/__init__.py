"""Operations on arrays whose derivatives keep their speed inside compiled loops. They import
nothing else of jaxnet.
"""

from typing import TYPE_CHECKING

from jaxnet.ops.pooling import avg_pool, max_pool

if TYPE_CHECKING:
    from jaxnet.ops.convolution import convolve

__all__ = ["avg_pool", "convolve", "max_pool"]


def __getattr__(name: str):
    """`convolve` is imported when it is asked for: what it needs of JAX takes 16 ms."""
    if name == "convolve":
        from jaxnet.ops.convolution import convolve

        return convolve
    raise AttributeError(f"module 'jaxnet.ops' has no attribute '{name}'")
