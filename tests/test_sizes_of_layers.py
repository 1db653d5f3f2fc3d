"""Convolutions, pools, resampling and linear maps: sizes of every kind of integer, and complex
numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import close, floats, numbers

from jaxnet.core import describe
from jaxnet.layers import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    bilinear,
    conv,
    conv_transpose,
    depthwise_conv,
    einsum_dense,
    global_lp_pool,
    locally_connected,
    lp_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
    min_pool,
    pixel_shuffle,
    pixel_unshuffle,
    resize,
    separable_conv,
    upsample,
)

# All sizes of the constructors, made from sizes of any type, and the input.
SIZED = {
    "conv": (lambda i: conv(i(3), (i(2),), input_dilation=i(2)), floats(2, 5, 2)),
    "depthwise_conv": (
        lambda i: depthwise_conv((i(3),), multiplier=i(2), strides=i(2), dilation=i(1)),
        floats(2, 9, 2),
    ),
    "separable_conv": (
        lambda i: separable_conv(i(3), (i(2),), multiplier=i(2), padding=((i(1), i(0)),)),
        floats(2, 9, 2),
    ),
    "conv_transpose": (
        lambda i: conv_transpose(
            i(4),
            (i(3),),
            strides=i(3),
            padding=i(1),
            output_padding=i(1),
            dilation=i(1),
            groups=i(2),
        ),
        floats(2, 5, 4),
    ),
    "conv_transpose: output_size": (
        lambda i: conv_transpose(i(2), (i(3),), strides=i(2), output_size=i(9)),
        floats(2, 5, 2),
    ),
    "locally_connected": (
        lambda i: locally_connected(i(2), (i(3),), strides=i(2)),
        floats(2, 9, 2),
    ),
    "max_pool": (lambda i: max_pool((i(2),), dilation=i(2)), floats(2, 9, 2)),
    "min_pool": (lambda i: min_pool((i(2),), strides=i(1), padding=i(1)), floats(2, 9, 2)),
    "avg_pool": (lambda i: avg_pool((i(2),), dilation=(i(2),)), floats(2, 9, 2)),
    "lp_pool": (lambda i: lp_pool(i(2), (i(2),)), floats(2, 9, 2)),
    "global_lp_pool": (lambda i: global_lp_pool(i(2), i(1)), floats(2, 9, 2)),
    "adaptive_avg_pool": (lambda i: adaptive_avg_pool((i(4),)), floats(2, 9, 2)),
    "adaptive_max_pool": (lambda i: adaptive_max_pool((i(4), None)), floats(2, 9, 2, 1)),
    "max_pool_with_indices": (lambda i: max_pool_with_indices((i(2),)), floats(2, 9, 2)),
    "resize": (lambda i: resize((i(4),)), floats(2, 9, 2)),
    "resize: scale": (lambda i: resize(scale=(i(2),)), floats(2, 9, 2)),
    "upsample": (lambda i: upsample((i(2),)), floats(2, 9, 2)),
    "pixel_shuffle": (lambda i: pixel_shuffle((i(2),)), floats(2, 9, 2)),
    "pixel_unshuffle": (lambda i: pixel_unshuffle((i(3),)), floats(2, 9, 2)),
    "einsum_dense": (lambda i: einsum_dense("d,dhk->hk", h=i(2), k=i(3)), floats(2, 2)),
}


@pytest.mark.parametrize("kind", [np.int64, np.uint8], ids=["int64", "uint8"])
@pytest.mark.parametrize("make, spec", SIZED.values(), ids=SIZED.keys())
def test_sizes_may_be_integers_of_numpy(make, spec, kind):
    made, expected = make(kind), make(int)
    params = jax.eval_shape(expected.init, jax.random.key(0), spec)
    assert repr(made) == repr(expected)
    assert describe(jax.eval_shape(made.init, jax.random.key(0), spec)) == describe(params)
    params, x = numbers(params), numbers(spec)
    close(made.apply(params, x), expected.apply(params, x), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 2.0, "2"], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda n: depthwise_conv(n),
        lambda n: depthwise_conv(3, multiplier=n),
        lambda n: separable_conv(n, 3),
        lambda n: conv_transpose(n, 3),
        lambda n: conv_transpose(3, n),
        lambda n: conv_transpose(3, 3, strides=n),
        lambda n: conv_transpose(3, 3, padding=1, output_padding=n),
        lambda n: conv_transpose(3, 3, output_size=n),
        lambda n: conv_transpose(3, 3, groups=n),
        lambda n: conv_transpose(3, 3, dilation=(1, n)),
        lambda n: conv(3, 3, input_dilation=n),
        lambda n: locally_connected(n, 3),
        lambda n: locally_connected(3, n),
        lambda n: min_pool(n),
        lambda n: max_pool(2, dilation=n),
        lambda n: adaptive_avg_pool((n,)),
        lambda n: adaptive_max_pool(n),
        lambda n: max_pool_with_indices(n),
        lambda n: max_unpool(n),
        lambda n: max_unpool(2, output_size=n),
        lambda n: global_lp_pool(2, n),
        lambda n: resize(n),
        lambda n: upsample(n),
        lambda n: pixel_shuffle(n),
        lambda n: pixel_unshuffle((n, 2)),
        lambda n: einsum_dense("d,df->f", f=n),
        lambda n: bilinear(n),
    ],
)
def test_what_is_no_integer_is_no_size(make, wrong):
    with pytest.raises(ValueError, match=r"must be (a positive int|an int of at least 0).*, got "):
        make(wrong)


COMPUTING = {
    "depthwise_conv": (depthwise_conv(2), floats(2, 4, 4, 2)),
    "conv_transpose": (conv_transpose(3, 2), floats(2, 4, 4, 2)),
    "locally_connected": (locally_connected(3, 2), floats(2, 4, 4, 2)),
    "min_pool": (min_pool(2), floats(2, 4, 4, 2)),
    "lp_pool": (lp_pool(2, 2), floats(2, 4, 4, 2)),
    "global_lp_pool": (global_lp_pool(2), floats(2, 4, 4, 2)),
    "adaptive_avg_pool": (adaptive_avg_pool(2), floats(2, 4, 4, 2)),
    "adaptive_max_pool": (adaptive_max_pool(2), floats(2, 4, 4, 2)),
    "max_pool_with_indices": (max_pool_with_indices(2), floats(2, 4, 4, 2)),
    "resize": (resize(3), floats(2, 4, 4, 2)),
    "einsum_dense": (einsum_dense("d,df->f", f=3), floats(4, 4)),
}


@pytest.mark.parametrize("net, spec", COMPUTING.values(), ids=COMPUTING.keys())
def test_layers_that_compute_refuse_complex_numbers(net, spec):
    params, x = numbers(jax.eval_shape(net.init, jax.random.key(0), spec)), numbers(spec)
    wrong_input = r"(the input must be (floating|real)|dtype of the parameters).*complex64"
    with pytest.raises(TypeError, match=wrong_input):
        net.apply(params, x.astype(jnp.complex64))
    for path in params:
        wrong = {**params, path: params[path].astype(jnp.complex64)}
        with pytest.raises(TypeError, match=rf"the parameter '{path}' must be real, got complex64"):
            net.apply(wrong, x)
