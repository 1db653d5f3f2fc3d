"""Operations on arrays whose derivatives keep their speed inside compiled loops. They import nothing else of jaxnet."""

from jaxnet.ops.convolution import convolve
from jaxnet.ops.pooling import avg_pool, max_pool

__all__ = ["avg_pool", "convolve", "max_pool"]
