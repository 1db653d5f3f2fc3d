"""Every public layer and combinator as data, for the laws of `test_laws.py`.

A name is that of the constructor, with ': what is special' behind it where a layer has more than
one case.

    python tests/registry.py    writes tests/golden/layouts.json again, after a wanted change
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnet
from jaxnet import Layer, tree
from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual, scan, vmap
from jaxnet.core import abstractly, describe, layer, param, wire
from jaxnet.layers import (
    adaptive_avg_pool,
    adaptive_max_pool,
    alibi,
    alpha_dropout,
    avg_pool,
    batch_norm,
    bidirectional,
    bilinear,
    causal,
    conv,
    conv_lstm_cell,
    conv_transpose,
    dense,
    depthwise_conv,
    dot_product_attention,
    drop_path,
    dropout,
    einsum_dense,
    embed,
    flatten,
    fourier_features,
    fused_attention,
    gated_mlp,
    gaussian_dropout,
    gaussian_noise,
    global_avg_pool,
    global_lp_pool,
    global_max_pool,
    group_norm,
    gru,
    gru_cell,
    instance_norm,
    kv_cache,
    layer_norm,
    learned_positions,
    local_response_norm,
    locally_connected,
    lp_pool,
    lru,
    lru_cell,
    lstm,
    lstm_cell,
    masked_softmax,
    max_pool,
    max_pool_with_indices,
    max_unpool,
    mgu_cell,
    min_gru,
    min_gru_cell,
    min_pool,
    mlp,
    moe,
    multi_head_attention,
    pixel_shuffle,
    pixel_unshuffle,
    recurrent,
    relative_bias,
    resize,
    rms_norm,
    rnn_cell,
    rotary,
    rwkv7_channel_mix,
    rwkv7_time_mix,
    selective_ssm,
    selective_ssm_cell,
    separable_conv,
    simple_rnn,
    sink_softmax,
    sinusoidal,
    soft_cap,
    spatial_dropout,
    squeeze_excite,
    stacked,
    upsample,
    vector_quantize,
    window,
)
from jaxnet.mixed import rows

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layouts.json"

# Laws from which a case may be exempt, with the reason in the case: `dtype` (dtype in, dtype out),
# `differences` (gradients equal finite differences), `curvature` (second derivatives too).
LAWS = ("dtype", "differences", "curvature")


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """For a module of tests that compiles many small programs: XLA's optimisations would cost more
    than they save.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# XLA may leave out a rounding to a narrow dtype between two operations of one program. Which ones
# it leaves out depends on the program, so two forms of one network differ by roundings. A program
# from `as_stated` rounds wherever the network says so.
as_stated = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and the specs of its inputs; the first axis of each is a batch axis."""

    net: Layer
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of `train` that give different programs. Without a state and without random
        numbers, training and evaluation are the same.
        """
        return (False, True) if self.net.init_state or self.net.random else (True,)

    def specs(
        self, dtype: Any = jnp.float32, lead: tuple[int, ...] = ()
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The inputs with another float dtype and further leading axes."""
        return tuple(
            jax.ShapeDtypeStruct(
                lead + x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            )
            for x in self.inputs
        )

    def data(
        self, dtype: Any = jnp.float32, lead: tuple[int, ...] = (), seed: int = 7
    ) -> tuple[jax.Array, ...]:
        """Normal numbers of those specs; integers in 0 .. 3."""
        return numbers(self.specs(dtype, lead), seed)

    def start(self, dtype: Any = jnp.float32) -> tuple[Any, Any]:
        """Parameters, normal numbers all, and state (None for a stateless layer)."""
        specs = self.specs(dtype)
        return weights(self.net, *specs), state_of(
            self.net, *specs
        ) if self.net.init_state else None


def numbers(specs: Any, seed: int = 0) -> Any:
    """Arrays of these specs: normal numbers, or integers in 0 .. 3. Nothing is compiled for
    them.
    """
    rng = np.random.default_rng(seed)

    def draw(spec):
        whole = jnp.issubdtype(spec.dtype, jnp.integer)
        return jnp.asarray(
            rng.integers(0, 4, spec.shape) if whole else rng.normal(size=spec.shape), spec.dtype
        )

    return jax.tree.map(draw, specs)


def weights(net: Layer, *inputs: Any, seed: int = 0, **named: Any) -> Any:
    """Parameters of a network, normal numbers all, so that none is zero."""
    return numbers(abstractly(net.init)(jax.random.key(0), *inputs, **named), seed)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Assert that two trees have one structure and nearly the same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
    )


def state_of(net: Layer, *inputs: Any) -> Any:
    """The first state of a stateful layer."""
    assert net.init_state is not None
    return net.init_state(*inputs, key=jax.random.key(0))


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@wire(norm=layer_norm(), qkv=dense(3 * 4), out=dense(4))
def attention(f, x):
    """Pre-norm self-attention with 2 heads, written with jnp alone.  x [..., T, 4] -> y [..., T,
    4].
    """
    q, k, v = jnp.split(f.qkv(f.norm(x)).reshape(*x.shape[:-1], 2, 6), 3, axis=-1)
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k) / 2**0.5
    mixed = jnp.einsum("...nqk,...knh->...qnh", jax.nn.softmax(scores), v)
    return f.out(mixed.reshape(x.shape))


@wire(attn=residual(attention), drop=dropout(0.1), norm=layer_norm(), up=dense(4), down=dense(4))
def transformer_block(f, x):
    x = f.attn(x)
    return x + f.drop(f.down(jax.nn.gelu(f.up(f.norm(x)))))


@wire(
    table=param((4, 4), jax.nn.initializers.normal(1.0)), hidden=residual(chain(dense(4), jnp.tanh))
)
def tied(f, ids):
    """A language model whose output weights are its embedding."""
    x = rows(f.table(), ids)
    return f.hidden(x) @ f.table().T


@wire(embed=embed(4, 4), hidden=residual(chain(dense(4), jnp.tanh)))
def attending(f, ids):
    """A language model with one child as its embedding and its output layer."""
    return f.embed(f.hidden(f.embed(ids)), attend=True)


@wire(pool=max_pool_with_indices(2), unpool=max_unpool(2))
def pooled_and_back(f, x):
    return f.unpool(*f.pool(x))


@wire(unpool=max_unpool((2,), output_size=5))
def unpooled(f, indices, x):
    return f.unpool(x, indices)


@wire(first=dense(4), second=dense(4))
def product(f, x, y):
    return f.first(x) * f.second(y)


@wire(hidden=dense(4), norm=batch_norm(), drop=dropout(0.2))
def cell(f, carry, x):
    """A stateful and noisy recurrent cell.  carry [..., 4], x [..., 4] -> (carry, y)."""
    h = jnp.tanh(f.hidden(carry + x))
    return h, f.drop(f.norm(h))


@wire(rnn=scan(cell))
def scanned(f, x):
    """x [..., T, 4] -> y [..., T, 4]."""
    xs = jnp.moveaxis(x, -2, 0)
    return jnp.moveaxis(f.rnn(jnp.zeros_like(xs[0]), xs)[1], 0, -2)


@wire(cell=lstm_cell(3, projection=2, peephole=True, forget_bias=0.0))
def one_lstm_step(f, h, c, x):
    """h [..., 2], c [..., 3], x [..., 4] -> ((h, c), y)."""
    return f.cell((h, c), x)


@wire(cell=conv_lstm_cell(2, (2,), forget_bias=0.0))
def one_conv_lstm_step(f, h, c, x):
    """h and c [..., 3, 2], x [..., 3, 1] -> ((h, c), y)."""
    return f.cell((h, c), x)


@wire(mix=rwkv7_time_mix(8, head_size=4, rank=2))
def small_time_mix(f, x, value):
    """The decay is an exponential of an exponential: the third derivatives of larger numbers would
    spoil differences.
    """
    return f.mix(0.2 * x, 0.2 * value)


@wire(rnn=recurrent(cell, remat_every=2))
def by_lengths(f, lengths, x):
    """lengths [...], x [..., T, 4] -> y [..., T, 4]."""
    return f.rnn(x, lengths=lengths, carry=jnp.zeros_like(x[..., 0, :]))


@wire(cache=kv_cache())
def remembered(f, at, k, v):
    """The keys and values of a call without a cache."""
    return f.cache(k, v, at)[:2]


noisy_block = chain(dense(4), batch_norm(), jnp.tanh, dropout(0.2))

_BFLOAT16 = "it computes in bfloat16, too coarse for differences"
_NORMAL = jax.nn.initializers.normal(0.3)
_SLOW = "it would take long to compile"
_PARTS = "its parts are tested one by one, and it would take long to compile"
_IDS = "its inputs are integers; the dtype of its parameters is an argument"

_STRAIGHT = "its gradient is straight through a choice, not the derivative"

CASES: dict[str, Case] = {
    "dense": Case(dense(3), (floats(8, 4),)),
    "dense: without bias": Case(dense(3, bias=False), (floats(2, 3, 4),)),
    "conv": Case(conv(3, 2), (floats(2, 3, 4, 2),)),
    "conv: sequence, dilated, grouped": Case(
        conv(4, (3,), strides=2, padding="VALID", dilation=2, groups=2, bias=False),
        (floats(2, 9, 4),),
    ),
    "conv: circular, spread": Case(
        conv(3, (2,), padding="CIRCULAR", input_dilation=2), (floats(2, 3, 2),)
    ),
    "depthwise_conv": Case(depthwise_conv((3,), multiplier=2), (floats(2, 4, 2),)),
    "separable_conv": Case(separable_conv(3, (2,)), (floats(2, 4, 2),)),
    "conv_transpose": Case(conv_transpose(4, (3,), strides=2, groups=2), (floats(2, 3, 4),)),
    "locally_connected": Case(locally_connected(2, 2), (floats(2, 3, 3, 2),)),
    "max_pool": Case(max_pool(2), (floats(2, 4, 5, 2),)),
    "min_pool": Case(min_pool((2,), dilation=2, strides=1), (floats(2, 5, 2),)),
    "lp_pool": Case(lp_pool(3, (2,), ceil_mode=True), (floats(2, 5, 2),)),
    "adaptive_avg_pool": Case(adaptive_avg_pool((2,)), (floats(2, 3, 2),)),
    "adaptive_max_pool": Case(adaptive_max_pool((2,)), (floats(2, 3, 2),)),
    "max_pool_with_indices": Case(pooled_and_back, (floats(2, 4, 4, 2),)),
    "max_unpool": Case(unpooled, (ints(2, 1, 2), floats(2, 1, 2))),
    "resize": Case(resize((5,), method="cubic"), (floats(2, 3, 2),)),
    "upsample": Case(upsample((2,), method="linear"), (floats(2, 3, 2),)),
    "pixel_shuffle": Case(pixel_shuffle(2), (floats(2, 2, 2, 4),)),
    "pixel_unshuffle": Case(pixel_unshuffle(2), (floats(2, 4, 2, 1),)),
    "global_lp_pool": Case(global_lp_pool(2, 1), (floats(2, 3, 2),)),
    "bilinear": Case(bilinear(3), (floats(4, 2), floats(4, 3))),
    "einsum_dense": Case(einsum_dense("td,dhk->thk", h=2, k=2), (floats(2, 3, 4),)),
    "einsum_dense: general": Case(
        einsum_dense("ed,edk->ke", bias_axes="k", k=3), (floats(2, 4, 2),)
    ),
    "avg_pool": Case(avg_pool(2, strides=1, padding="SAME"), (floats(2, 3, 3, 2),)),
    "global_max_pool": Case(global_max_pool(), (floats(2, 3, 3, 2),)),
    "global_avg_pool": Case(global_avg_pool(1), (floats(2, 3, 2),)),
    "batch_norm": Case(batch_norm(), (floats(6, 2, 4),)),
    "batch_norm: bare": Case(batch_norm(scale=False, bias=False), (floats(6, 4),)),
    "layer_norm": Case(layer_norm(), (floats(6, 4),)),
    "layer_norm: bare": Case(layer_norm(scale=False, bias=False), (floats(6, 4),)),
    "layer_norm: two axes": Case(layer_norm(rank=2), (floats(4, 2, 3),)),
    "batch_norm: weights": Case(
        chain(wire(norm=batch_norm())(lambda f, x: f.norm(x, jnp.cos(x[..., 0]) > 0))),
        (floats(6, 4),),
    ),
    "rms_norm": Case(rms_norm(offset=1.0), (floats(6, 4),)),
    "group_norm": Case(group_norm(2, rank=1), (floats(3, 4, 4),)),
    "instance_norm": Case(instance_norm(rank=1), (floats(3, 4, 2),)),
    "local_response_norm": Case(local_response_norm(3, alpha=0.5), (floats(3, 5),)),
    "dropout": Case(dropout(0.4), (floats(4, 4),)),
    "dropout: shared": Case(dropout(0.4, shared=-2), (floats(4, 3, 4),)),
    "spatial_dropout": Case(spatial_dropout(0.4, rank=1), (floats(4, 3, 4),)),
    "alpha_dropout": Case(alpha_dropout(0.4), (floats(4, 4),)),
    "gaussian_noise": Case(gaussian_noise(0.4), (floats(4, 4),)),
    "gaussian_dropout": Case(gaussian_dropout(0.4), (floats(4, 4),)),
    "drop_path": Case(drop_path(0.4), (floats(4, 4),)),
    "fourier_features": Case(fourier_features(3), (floats(4, 2),)),
    "vector_quantize": Case(
        chain(vector_quantize(3), lambda result: result[0]),
        (floats(4, 2),),
        {"differences": _STRAIGHT, "curvature": _STRAIGHT},
    ),
    "embed": Case(embed(4, 4), (ints(4, 2),), {"dtype": _IDS}),
    "embed: attend": Case(attending, (ints(4, 2),), {"dtype": _IDS}),
    "multi_head_attention": Case(
        multi_head_attention(4, 2, groups=1, positions=rotary(), mask=causal() & window(1)),
        (floats(2, 3, 4),),
    ),
    "dot_product_attention": Case(
        dot_product_attention(cap=soft_cap(2.0), softmax=sink_softmax()),
        (floats(2, 3, 2, 4), floats(2, 3, 1, 4), floats(2, 3, 1, 4)),
        {"dtype": "its scores and the sinks beside them are float32"},
    ),
    "fused_attention": Case(
        fused_attention(),
        (floats(2, 3, 2, 4), floats(2, 3, 1, 4), floats(2, 3, 1, 4)),
        {"differences": "jax.nn.dot_product_attention has a float32 softmax in float64, too"},
    ),
    "masked_softmax": Case(masked_softmax(), (floats(2, 2, 3, 4),)),
    "sink_softmax": Case(sink_softmax(), (floats(2, 2, 3, 4),)),
    "kv_cache": Case(remembered, (ints(2, 3), floats(2, 3, 1, 4), floats(2, 3, 1, 4))),
    "rotary": Case(rotary(size=2), (floats(2, 3, 2, 4),)),
    "sinusoidal": Case(sinusoidal(), (floats(2, 3, 4),)),
    "learned_positions": Case(learned_positions(3), (floats(2, 3, 4),)),
    "alibi": Case(alibi(2), (ints(2, 3), ints(2, 4)), {"dtype": _IDS, "differences": _IDS}),
    "relative_bias": Case(relative_bias(2), (ints(2, 3), ints(2, 4)), {"dtype": _IDS}),
    "mlp": Case(mlp(6, 4), (floats(4, 4),)),
    "gated_mlp": Case(gated_mlp(6, 4), (floats(4, 4),)),
    "squeeze_excite": Case(squeeze_excite(4, 2), (floats(2, 3, 3, 4),)),
    "moe": Case(moe(3, 2, 6, 4), (floats(2, 3, 4),)),
    "flatten": Case(flatten(2), (floats(4, 2, 3),)),
    "rnn_cell": Case(rnn_cell(3), (floats(4, 3), floats(4, 2))),
    "gru_cell": Case(gru_cell(3), (floats(4, 3), floats(4, 2))),
    "gru_cell: reset before": Case(gru_cell(3, reset_after=False), (floats(4, 3), floats(4, 2))),
    "mgu_cell": Case(mgu_cell(3), (floats(4, 3), floats(4, 2))),
    "lstm_cell": Case(one_lstm_step, (floats(4, 2), floats(4, 3), floats(4, 4))),
    "conv_lstm_cell": Case(one_conv_lstm_step, (floats(4, 3, 2), floats(4, 3, 2), floats(4, 3, 1))),
    "recurrent": Case(by_lengths, (ints(4), floats(4, 3, 4)), {"curvature": _SLOW}),
    "lstm": Case(lstm(3, forget_bias=0.0), (floats(4, 3, 2),), {"curvature": _SLOW}),
    "gru": Case(gru(3, reverse=True), (floats(4, 3, 2),), {"curvature": _SLOW}),
    "simple_rnn": Case(simple_rnn(3), (floats(4, 3, 2),), {"curvature": _SLOW}),
    "lru": Case(lru(3), (floats(4, 3, 2),)),
    "lru_cell": Case(lru_cell(3), (floats(4, 6), floats(4, 2))),
    "min_gru": Case(min_gru(3), (floats(4, 3, 2),)),
    "min_gru_cell": Case(min_gru_cell(3), (floats(4, 3), floats(4, 2))),
    "selective_ssm": Case(selective_ssm(2, decay_init=_NORMAL), (floats(4, 3, 2),)),
    "selective_ssm_cell": Case(
        selective_ssm_cell(2, decay_init=_NORMAL), (floats(4, 3, 2), floats(4, 3))
    ),
    "rwkv7_time_mix": Case(
        small_time_mix,
        (floats(4, 2, 8), floats(4, 2, 8)),
        {"curvature": _SLOW},
    ),
    "rwkv7_channel_mix": Case(rwkv7_channel_mix(4, hidden=3), (floats(4, 3, 4),)),
    "bidirectional": Case(
        bidirectional(simple_rnn(2), simple_rnn(3, reverse=True)),
        (floats(4, 3, 2),),
        {"curvature": _SLOW},
    ),
    "stacked": Case(
        stacked(simple_rnn(3), simple_rnn(3), dropout_rate=0.2),
        (floats(4, 3, 2),),
        {"curvature": _SLOW},
    ),
    "layer": Case(layer(None, lambda params, x: jnp.sin(x), label="sin"), (floats(4, 4),)),
    "param": Case(tied, (ints(3, 2),), {"dtype": _IDS}),
    "wire": Case(product, (floats(4, 4), floats(4, 4))),
    "chain": Case(chain(dense(4), jnp.tanh, out=dense(3)), (floats(4, 4),)),
    "parallel": Case(parallel(dense(4), negative=jnp.negative), (floats(4, 4),)),
    "parallel: merge": Case(
        parallel(main=dense(4), shortcut=dense(4), merge=jnp.add), (floats(4, 4),)
    ),
    "residual": Case(residual(chain(layer_norm(), dense(4))), (floats(4, 4),)),
    "repeat": Case(repeat(chain(dense(4), jnp.tanh), 2), (floats(4, 4),)),
    "repeat: noisy, stateful, remat": Case(repeat(noisy_block, 2, remat=True), (floats(4, 4),)),
    "scan": Case(scanned, (floats(4, 3, 4),), {"curvature": _SLOW}),
    "vmap": Case(
        chain(vmap(chain(dense(4), jnp.tanh), 2, in_axes=-2), lambda y: y.sum(0)),
        (floats(4, 2, 4),),
    ),
    "vmap: noisy, stateful": Case(
        chain(vmap(noisy_block, 2, in_axes=None), lambda y: y[0] * y[1]), (floats(4, 4),)
    ),
    "remat": Case(remat(chain(dense(4), jnp.tanh)), (floats(4, 4),)),
    "cast": Case(
        cast(chain(dense(4), jnp.tanh), "bfloat16"), (floats(4, 4),), {"differences": _BFLOAT16}
    ),
    "network: transformer": Case(transformer_block, (floats(1, 4, 4),), {"curvature": _PARTS}),
    "network: convnet": Case(
        chain(conv(2, 3), batch_norm(), jax.nn.silu, max_pool(2), flatten(), head=dense(4)),
        (floats(2, 4, 4, 1),),
        {"curvature": _PARTS},
    ),
    "network: stateful": Case(
        chain(stem=dense(4), blocks=repeat(residual(noisy_block), 2)),
        (floats(4, 4),),
        {"curvature": _PARTS},
    ),
}


def public_names() -> set[str]:
    """What must have a case: all constructors, and the three ways to make a layer."""
    makers = {name for name in jaxnet.layers.__all__ if _makes_a_layer(name)}
    return {*makers, *jaxnet.combinators.__all__, "layer", "param", "wire"}


def _makes_a_layer(name: str) -> bool:
    """Whether a public name of `jaxnet.layers` returns a Layer. Masks are values, not layers."""
    return getattr(getattr(jaxnet.layers, name), "__annotations__", {}).get("return") == "Layer"


def layout(case: Case) -> dict[str, dict[str, str]]:
    """Path and spec of each parameter and of each number of the state."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: case.net.init(key, *case.inputs))
    state = jax.eval_shape(lambda: state_of(case.net, *case.inputs)) if case.net.init_state else {}
    return {
        name: {path: describe(spec) for path, spec in tree.flatten(part).items()}
        for name, part in [("params", params), ("state", state)]
    }


def layouts() -> dict[str, Any]:
    return {name: layout(case) for name, case in sorted(CASES.items())}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(layouts(), indent=1, sort_keys=True) + "\n")
    print(f"{GOLDEN}: {len(CASES)} cases")
