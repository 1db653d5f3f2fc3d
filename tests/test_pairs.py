"""[B, 1] against [B]: refused in every form and every time, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import chain, dense
from jaxnet.train import TrainState, Weighted, all_pairs, evaluate, fit, train_step, train_steps
from jaxnet.train.pairs import refuse_pairs

B = 8
BATCH = {
    "p": np.ones((B, 1), np.float32),  # as a network with one output predicts
    "y": np.ones(B, np.float32),
    "i": np.arange(B) % 3,
    "z": np.ones((B, 5), np.float32),
    "s": np.ones((B, B), np.float32),  # as many features as examples
}
FREQUENCIES = np.ones(B, np.float32)  # as many as examples


@pytest.fixture(autouse=True)
def rank_promotion_as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


PAIRED = {
    "difference": lambda b: b["p"] - b["y"],
    "difference, turned": lambda b: b["y"] - b["p"],
    "product": lambda b: b["p"] * b["y"],
    "cross entropy": lambda b: optax.sigmoid_binary_cross_entropy(b["p"], b["y"]),
    "focal loss": lambda b: optax.sigmoid_focal_loss(b["p"], b["y"]),
    "hinge": lambda b: optax.hinge_loss(b["p"], b["y"]),
    "Huber": lambda b: optax.huber_loss(b["p"], b["y"]),
    "log cosh": lambda b: optax.log_cosh(b["p"], b["y"]),
    "accuracy": lambda b: (b["p"] > 0) == b["y"],
    "argmax": lambda b: b["z"].argmax(-1, keepdims=True) == b["i"],
    "where, condition [B]": lambda b: jnp.where(b["y"] > 0, b["p"], -b["p"]),
    "where, condition [B, 1]": lambda b: jnp.where(b["p"] > 0, b["y"], 0.0),
    "sum over a mask": lambda b: jnp.sum(b["p"], where=b["y"] > 0),
    "select": lambda b: jnp.select([b["p"] > 0], [b["y"]], 0.0),
    "maximum": lambda b: jnp.maximum(b["p"], b["y"]),
    "clip": lambda b: jnp.clip(b["p"], -1, b["y"]),
    "power": lambda b: jnp.power(b["p"], b["y"]),
    "logaddexp": lambda b: jnp.logaddexp(b["p"], b["y"]),
    "hypot": lambda b: jnp.hypot(b["p"], b["y"]),
    "xlogy": lambda b: jax.scipy.special.xlogy(b["p"], b["y"]),
    "isclose": lambda b: jnp.isclose(b["p"], b["y"]),
    "logical_and": lambda b: jnp.logical_and(b["p"], b["y"]),
    "inside jit": lambda b: jax.jit(lambda p, y: p - y)(b["p"], b["y"]),
    "inside scan": lambda b: jax.lax.scan(
        lambda c, _: (c + (b["p"] - b["y"]).mean(), None), 0.0, None, 3
    )[0],
    "inside remat": lambda b: jax.checkpoint(lambda p, y: (p - y) ** 2)(b["p"], b["y"]),
    "inside grad": lambda b: jax.grad(lambda p: jnp.mean((p - b["y"]) ** 2))(b["p"]),
    "inside vmap": lambda b: jax.vmap(lambda scale: scale * b["p"] - b["y"])(jnp.ones(3)),
    "[B, C] against [B]": lambda b: b["s"] - b["y"],
    "[B, C] == [B]": lambda b: b["s"] == b["i"],
    "[B, C] where [B]": lambda b: jnp.where(b["y"] > 0, b["s"], 0.0),
}
UNPAIRED = {
    "all rows as one axis": lambda b: b["z"].reshape(-1, 1) - (2 * b["z"]).reshape(-1),
    "an axis put in by the loss": lambda b: b["i"][:, None] - b["y"],
    "one shape": lambda b: b["p"][:, 0] - b["y"],
    "one shape, by the target": lambda b: b["p"] - b["y"][:, None],
    "pairs, written out": lambda b: b["p"] - b["y"][None, :],
    "pairs, newaxis": lambda b: b["p"] - b["y"][jnp.newaxis],
    "pairs, expand_dims": lambda b: jnp.expand_dims(b["y"], 0) - b["p"],
    "pairs, reshape": lambda b: b["y"].reshape(1, -1) - b["p"],
    "pairs, transposed": lambda b: b["p"] - (b["p"] + 1).T,
    "pairs, broadcast_to": lambda b: b["p"] - jnp.broadcast_to(b["y"], (len(b["y"]),) * 2),
    "pairs, where": lambda b: jnp.where(b["y"][None, :] > 0, b["p"], 0),
    "pairs, outer": lambda b: jnp.outer(b["p"], b["y"]),
    "pairs, einsum": lambda b: jnp.einsum("i,j->ij", b["y"], b["y"]),
    "pairs, meshgrid": lambda b: jnp.stack(jnp.meshgrid(b["y"], b["y"])),
    "pairs, vmap twice": lambda b: jax.vmap(lambda x: jax.vmap(lambda y: x - y)(b["y"]))(b["i"]),
    "pairs, marked": all_pairs(lambda b: b["p"] - b["y"]),
    "pairs, marked inside": lambda b: all_pairs(jnp.subtract)(b["p"], b["y"]),
    "pairs with itself": lambda b: (b["z"][:, None] - b["z"]) ** 2,
    "equal labels": lambda b: b["i"][:, None] == b["i"],
    "similarities": lambda b: b["z"] @ b["z"].T,
    "contrastive": lambda b: optax.losses.ntxent(b["z"], b["i"]),
    "contrastive, softmax": lambda b: optax.softmax_cross_entropy(
        b["z"] @ b["z"].T, jnp.eye(len(b["z"]))
    ),
    "columns of similarities": lambda b: (
        b["s"] @ b["s"].T - jax.nn.logsumexp(b["s"] @ b["s"].T, axis=0)
    ),
    "distances": lambda b: jnp.linalg.norm(b["z"][:, None, :] - b["z"][None, :, :], axis=-1),
    "bias, as many features as examples": lambda b: b["s"] + FREQUENCIES,
    "frequencies, as many as examples": lambda b: jnp.sin(b["y"][:, None] * FREQUENCIES),
    "frequencies of [B, 1]": lambda b: jnp.sin(b["p"] * FREQUENCIES),
    "causal mask, as long as the batch": lambda b: (
        b["y"][0] * (jnp.arange(B)[:, None] >= jnp.arange(B))
    ),
    "causal mask of 15": lambda b: b["y"][0] * (jnp.arange(15)[:, None] >= jnp.arange(15)),
    "norm": lambda b: (b["s"] - b["s"].mean(-1, keepdims=True)) * FREQUENCIES + FREQUENCIES,
    "attention": lambda b: jax.nn.dot_product_attention(*[b["z"].reshape(-1, 5, 1, 1)] * 3),
    "covariance": lambda b: jnp.cov(b["z"].T),
    "one hot": lambda b: jax.nn.one_hot(b["i"], B),
    "cross entropy": lambda b: optax.softmax_cross_entropy_with_integer_labels(b["s"], b["i"]),
    "class weights": lambda b: FREQUENCIES[b["i"]] * b["y"] + (b["s"] * FREQUENCIES).sum(-1),
    "a size that is written down": lambda b: b["y"].reshape(2, 4) - 1,
    "a size that is written down, bias": lambda b: b["s"].reshape(8, 8) + FREQUENCIES,
    "take along": lambda b: jnp.take_along_axis(b["z"], b["i"][:, None], 1),
    "scalars": lambda b: b["p"] * 2 - b["y"].mean(),
}


@pytest.mark.parametrize("form", PAIRED)
def test_pairs_that_broadcasting_makes_are_refused_every_time(form):
    for _ in range(2):  # JAX remembers what it has traced
        with pytest.raises(
            ValueError,
            match=r"the loss broadcasts \[.*\] against \[.*\] in '\w+'.* pairs every example",
        ):
            refuse_pairs("the loss", PAIRED[form], BATCH)


@pytest.mark.sample(4)
@pytest.mark.parametrize("form", UNPAIRED)
def test_other_broadcasting_and_pairs_on_purpose_are_not_refused(form):
    UNPAIRED[form](BATCH)  # works at all
    refuse_pairs("the loss", UNPAIRED[form], BATCH)


def fixed(function):
    """A loss that accepts only the true size of the batch."""
    return lambda b, p: jnp.reshape(b[1], (B,)).sum() + jnp.mean(function(b, p))


def stateful(function):
    """A loss with a state of the true size of the batch, as truncated backpropagation through time
    has.
    """
    return lambda b, p: (jnp.tanh(jnp.zeros((B, 4)) + b[0][:, :4]), function(b, p))


def f(p, b):
    return (b[0] @ p)[:, 0]


norm = jnp.linalg.norm
CODES, MIX = np.ones((B, 5), np.float32), np.ones((5, B), np.float32)
RESEARCH = {
    "off-diagonal mask": lambda b, p: jnp.arange(len(b[0]))[:, None] != jnp.arange(len(b[0])),
    "distances, keepdims": lambda b, p: (
        jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(b[0] ** 2, 1) - 2 * b[0] @ b[0].T
    ),
    "distances, newaxis": lambda b, p: (
        jnp.sum(b[0] ** 2, 1)[:, None] + jnp.sum(b[0] ** 2, 1) - 2 * b[0] @ b[0].T
    ),
    "distances of two arrays": lambda b, p: (
        jnp.sum(b[0] ** 2, 1)[:, None] + jnp.sum(b[2][:, 0] ** 2, 1) - 2 * b[0] @ b[2][:, 0].T
    ),
    "distances of two arrays, keepdims": lambda b, p: (
        jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(b[2][:, 0] ** 2, 1) - 2 * b[0] @ b[2][:, 0].T
    ),
    "distances, another order": lambda b, p: (
        (b[0] * b[0]).sum(-1, keepdims=True) - 2 * b[0] @ b[0].T + (b[0] * b[0]).sum(-1)
    ),
    "cosines": lambda b, p: (
        b[0] @ b[0].T / (norm(b[0], axis=1, keepdims=True) * norm(b[0], axis=1))
    ),
    "cosines of two arrays": lambda b, p: (
        b[0] @ b[2][:, 1].T / (norm(b[0], axis=1, keepdims=True) * norm(b[2][:, 1], axis=1))
    ),
    "RankNet": lambda b, p: f(p, b)[:, None] - f(p, b),
    "concordance": lambda b, p: -b[1][:, None] < -b[1],
    "equal labels, converted": lambda b, p: (
        b[1].astype(jnp.float16)[:, None] == b[1].astype(jnp.float16)
    ),
    "pairs of a mask": lambda b, p: (b[1] > 0)[:, None] * (b[1] > 0),
    "AUC": lambda b, p: jnp.where((b[1] > 0)[:, None] & (b[1] < 1), f(p, b)[:, None] - f(p, b), 0),
    "kernel of two arrays": lambda b, p: (f(p, b)[:, None] - b[1]) ** 2,
    "kernel of two arrays of vectors": lambda b, p: (b[0][:, None] - b[2][:, 0]) ** 2,
    "projected": lambda b, p: (b[0][:, None] @ p - b[0] @ p) ** 2,
    "stopped gradient": lambda b, p: f(p, b)[:, None] - jax.lax.stop_gradient(f(p, b)),
    "Sinkhorn loop": lambda b, p: jax.lax.fori_loop(
        0,
        5,
        lambda i, uv: (
            lambda u, v, C: (-jax.nn.logsumexp((v - C), 1), -jax.nn.logsumexp(u[:, None] - C, 0))
        )(
            *uv,
            b[0] @ b[0].T,  # pyright: ignore
        ),
        (jnp.zeros(len(b[0])), jnp.zeros(len(b[0]))),
    ),
    "Sinkhorn": lambda b, p: b[1][:, None] + f(p, b) - b[0] @ b[0].T,
    "margin": lambda b, p: jax.nn.relu(1 - f(p, b)[:, None] + b[1]),
    "expand_dims": lambda b, p: jnp.expand_dims(f(p, b), 1) - b[1],
    "lax.expand_dims": lambda b, p: jax.lax.expand_dims(f(p, b), (1,)) - b[1],
    "reshape, method": lambda b, p: f(p, b).reshape(-1, 1) - b[1],
    "reshape": lambda b, p: jnp.reshape(f(p, b), (-1, 1)) - b[1],
    "temperature of shape [1]": lambda b, p: (f(p, b)[:, None] / p[0]) - b[1],
    "logaddexp of pairs": lambda b, p: jnp.logaddexp(f(p, b)[:, None], b[1]),
    "inside jit": lambda b, p: jax.jit(lambda u, v: u[:, None] - v)(f(p, b), b[1]),
    "into jit": lambda b, p: jax.jit(lambda u, v: u - v)(f(p, b)[:, None], b[1]),
    "true size, mask of 2B": fixed(lambda b, p: jnp.arange(16)[:, None] >= jnp.arange(16)),
    "true size, mask of B": fixed(lambda b, p: jnp.arange(8)[:, None] >= jnp.arange(8)),
    "state, mask of 2B": stateful(lambda b, p: jnp.arange(16)[:, None] >= jnp.arange(16)),
    "true size, codebook of B": fixed(
        lambda b, p: (
            jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(CODES**2, 1) - 2 * b[0] @ CODES.T
        )
    ),
    "codebook of B": lambda b, p: (
        jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(CODES**2, 1) - 2 * b[0] @ CODES.T
    ),
    "state, codebook of B": stateful(
        lambda b, p: jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(CODES**2, 1)
    ),
    "true size, bias of B": fixed(lambda b, p: jax.nn.relu(b[0] @ MIX + FREQUENCIES)),
    "true size, norm of B": fixed(
        lambda b, p: (
            lambda h: (
                (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True)) * FREQUENCIES
            )
        )(b[0] @ MIX)
    ),
    "true size, distances": fixed(
        lambda b, p: (
            jnp.sum(b[0] ** 2, 1, keepdims=True) + jnp.sum(b[0] ** 2, 1) - 2 * b[0] @ b[0].T
        )
    ),
    "true size, RankNet": fixed(lambda b, p: f(p, b)[:, None] - f(p, b)),
    "vmap twice": lambda b, p: jax.vmap(lambda x: jax.vmap(lambda y: ((x - y) ** 2).sum())(b[0]))(
        b[0]
    ),
    "vmap twice, [B, 1]": lambda b, p: jax.vmap(
        lambda x: jax.vmap(lambda y: ((x - y) ** 2).sum())(b[1])
    )(b[0] @ p),
    "vmap over [B, 1]": lambda b, p: jax.vmap(lambda x: (x - b[1]) ** 2)(b[0] @ p),
    "einsum that names pairs": lambda b, p: jnp.einsum("ik,jk->ij", b[0] @ p, b[0] @ p),
    "einsum, one shape": lambda b, p: jnp.einsum("...,...->...", (b[0] @ p)[:, 0], b[1]),
    "einsum of [B] and [B]": lambda b, p: jnp.einsum("i,j->ij", (b[0] @ p).squeeze(-1), b[1]),
    "vectorize, one shape": lambda b, p: jnp.vectorize(lambda a, c: (a - c) ** 2)(
        (b[0] @ p)[:, 0], b[1]
    ),
    "vectorize, both [B, 1]": lambda b, p: jnp.vectorize(lambda a, c: (a - c) ** 2)(
        (b[0] @ p), b[1][:, None]
    ),
    "keepdims of both axes": lambda b, p: (
        lambda d: d.min(1, keepdims=True) - d.min(0, keepdims=True)
    )(b[0] @ b[0].T),
    "gradient of RankNet": lambda b, p: jax.grad(
        lambda q: jnp.mean((f(q, b)[:, None] - f(q, b) - (b[1][:, None] - b[1])) ** 2)
    )(p),
    "supervised contrastive": lambda b, p: (
        lambda z, m, s: (
            (s - jnp.log(jnp.sum(jnp.exp(s) * (1 - jnp.eye(len(z))), 1, keepdims=True))) * m
        ).sum()
    )(b[0] / norm(b[0], axis=1, keepdims=True), b[1][:, None] == b[1], b[0] @ b[0].T),
    "Cox": lambda b, p: jax.nn.logsumexp(
        jnp.where(b[1][:, None] <= b[1], f(p, b), -jnp.inf), axis=1
    ),
}
# Each with the name of the operation that the error has.
MISTAKES = {
    "vectorize": (
        "subtract",
        lambda b, p: jnp.vectorize(lambda a, c: (a - c) ** 2)(b[0] @ p, b[1]),
    ),
    "shifted": ("subtract", lambda b, p: ((b[0] @ p)[1:] - b[1][1:]) ** 2),
    "half of the batch": (
        "subtract",
        lambda b, p: (b[0] @ p)[: len(b[1]) // 2] - b[1][: len(b[1]) // 2],
    ),
    "half, a size that is written down": (
        "subtract",
        lambda b, p: (b[0] @ p)[: B // 2] - b[1][: B // 2],
    ),
    "split": ("subtract", lambda b, p: jnp.split(b[0] @ p, 2)[0] - jnp.split(b[1], 2)[0]),
    "logpdf": ("logpdf", lambda b, p: jax.scipy.stats.norm.logpdf(b[1], 0.0, jnp.exp(b[0] @ p))),
    "logpdf, mean is a parameter": (
        "logpdf",
        lambda b, p: jax.scipy.stats.norm.logpdf(b[1], p[0, 0], jnp.exp(b[0] @ p)),
    ),
    "logpdf, both predicted": (
        "logpdf",
        lambda b, p: jax.scipy.stats.norm.logpdf(b[1], b[0] @ p, jnp.exp(b[0] @ p)),
    ),
    "Poisson": (
        "logpmf",
        lambda b, p: jax.scipy.stats.poisson.logpmf(b[1].astype(int), jnp.exp(b[0] @ p)),
    ),
    "einsum": ("einsum", lambda b, p: jnp.einsum("...,...->...", b[0] @ p, b[1])),
    "atleast_2d": ("subtract", lambda b, p: b[0] @ p - jnp.atleast_2d(b[1])),
    "true size, [B, B] against [B]": ("subtract", fixed(lambda b, p: b[0] @ MIX - b[1])),
    "state, [B, B] against [B]": ("subtract", stateful(lambda b, p: b[0] @ MIX - b[1])),
    "true size": ("subtract", fixed(lambda b, p: b[0] @ p - b[1])),
    "logaddexp": ("logaddexp", lambda b, p: jnp.logaddexp(b[0] @ p, b[1])),
    "weights": ("subtract", lambda b, p: (b[0] @ p) * b[1][:, None] - b[1]),
    "take_along_axis": (
        "subtract",
        lambda b, p: jnp.take_along_axis(b[0], b[1].astype(int)[:, None], 1) - b[1],
    ),
    "network of [:, None]": (
        "subtract",
        lambda b, p: (
            jax.nn.relu(f(p, b)[:, None] @ np.ones((1, 4), "f")) @ np.ones((4, 1), "f") - b[1]
        ),
    ),
    "[B, B], logaddexp": ("logaddexp", lambda b, p: jnp.logaddexp(b[0] @ MIX, b[1])),
    "[B, B], where": ("where", lambda b, p: jnp.where(b[1] > 0, b[0] @ MIX, 0.0)),
    "[B, B], hypot": ("hypot", lambda b, p: jnp.hypot(b[0] @ MIX, b[1])),
    "clip": ("clip", lambda b, p: jnp.clip(b[0] @ p, -1, b[1])),
    "xlogy": ("xlogy", lambda b, p: jax.scipy.special.xlogy(b[0] @ p, b[1])),
    "argmax": ("equal", lambda b, p: b[0].argmax(-1, keepdims=True) == b[1]),
    "mean of one column": (
        "subtract",
        lambda b, p: jax.nn.sigmoid(b[0] @ p).mean(-1, keepdims=True) - b[1],
    ),
    "scan": (
        "subtract",
        lambda b, p: jax.lax.scan(lambda c, x: (c, x @ p - b[1]), 0.0, jnp.swapaxes(b[2], 0, 1)),
    ),
}
INPUTS = (
    np.random.default_rng(0).normal(size=(B, 5)).astype(np.float32),
    (np.arange(B) % 3).astype(np.float32),
    np.ones((B, 7, 5), np.float32),
)
WEIGHT = np.ones((5, 1), np.float32)


@pytest.mark.sample(14)
@pytest.mark.parametrize("form", RESEARCH)
def test_pairs_that_the_code_of_a_loss_writes_are_not_refused(form):
    RESEARCH[form](INPUTS, WEIGHT)  # works at all
    refuse_pairs("the loss", RESEARCH[form], INPUTS, WEIGHT)


@pytest.mark.sample(8)
@pytest.mark.parametrize("form", MISTAKES)
def test_pairs_of_a_prediction_of_one_column_are_refused_by_name(form):
    operation, function = MISTAKES[form]
    function(INPUTS, WEIGHT)  # works at all
    with pytest.raises(ValueError, match=rf"broadcasts \[\d, \d\] against \[\d\] in '{operation}'"):
        refuse_pairs("the loss", function, INPUTS, WEIGHT)


def test_the_error_has_the_true_sizes_of_a_part_of_the_batch():
    with pytest.raises(ValueError, match=r"broadcasts \[7, 1\] against \[7\] in 'subtract'"):
        refuse_pairs("the loss", MISTAKES["shifted"][1], INPUTS, WEIGHT)
    with pytest.raises(ValueError, match=r"broadcasts \[4, 1\] against \[4\] in 'subtract'"):
        refuse_pairs("the loss", MISTAKES["half of the batch"][1], INPUTS, WEIGHT)


def test_a_batch_of_one_has_no_pairs():
    refuse_pairs("the loss", lambda b: b["p"] - b["y"], jax.tree.map(lambda leaf: leaf[:1], BATCH))


def test_the_error_of_the_loss_itself_is_not_hidden():
    with pytest.raises(ValueError, match="ncompatible shapes"):
        step = train_step(lambda w, b: w * jnp.mean(b["z"] - b["y"]), 0.1)
        jax.jit(step)(TrainState.create(jnp.float32(1), 0.1, jax.random.key(0)), BATCH)


def test_the_error_names_the_operation_the_shapes_and_the_line():
    def loss(w, batch):
        return jnp.mean((w * batch["p"] - batch["y"]) ** 2)

    with pytest.raises(ValueError) as caught:
        train_step(loss, 0.1)(TrainState.create(jnp.float32(1), 0.1, jax.random.key(0)), BATCH)
    line = loss.__code__.co_firstlineno + 1
    assert str(caught.value).splitlines()[0] == (
        "train_step: the loss broadcasts [8, 1] against [8] in 'subtract' "
        f"(test_pairs.py:{line}), which pairs every example with every other one: give both one "
        "shape, with x[:, 0] or y[:, None]; if all pairs are meant, write y[None, :] or wrap the "
        "function in jaxnet.train.all_pairs"
    )


NET = chain(out=dense(1))
DATA = (np.linspace(-1, 1, 24, dtype=np.float32)[:, None], np.ones(24, np.float32))


def cross_entropy(params, batch):
    return optax.sigmoid_binary_cross_entropy(NET.apply(params, batch[0]), batch[1]).mean()


def accuracy(params, batch):
    logits = NET.apply(params, batch[0])
    return logits[:, 0].mean(), {"accuracy": jnp.mean((logits > 0) == batch[1])}


def start():
    return TrainState.create(NET.init(jax.random.key(0), DATA[0]), 0.1, jax.random.key(1))


@pytest.mark.parametrize("loss", [cross_entropy, accuracy])
@pytest.mark.parametrize("data", [DATA, (DATA[1][:, None], DATA[0][:, 0])])
def test_a_fit_is_refused_before_its_first_step_every_time(loss, data):
    for _ in range(3):
        with pytest.raises(ValueError, match="pairs every example with every other one"):
            fit(train_step(loss, 0.1), start(), data, batch_size=8, epochs=1, progress=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_steps_weights_parts_and_members_are_refused_too(accumulate):
    def per_example(params, batch):
        return jnp.mean((NET.apply(params, batch[0]) - batch[1]) ** 2, axis=-1)

    step = train_step(per_example, 0.1, accumulate=accumulate)
    for data in (DATA, Weighted(DATA, np.ones(24, np.float32))):
        with pytest.raises(ValueError, match="pairs every example with every other one"):
            jax.jit(train_steps(step, 8, 3))(start(), data)
    with pytest.raises(ValueError, match="pairs every example with every other one"):
        states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start())
        jax.vmap(train_steps(step, 8, 3), in_axes=(0, None))(states, DATA)


@pytest.mark.parametrize("batch_size", [8, 5, 24, None])
def test_an_evaluation_is_refused_every_time(batch_size):
    def square(params, batch):
        return {"mse": jnp.mean((NET.apply(params, batch[0]) - batch[1]) ** 2)}

    data = DATA if batch_size else [DATA]
    for _ in range(2):
        with pytest.raises(
            ValueError, match="evaluate: a metric broadcasts .* pairs every example"
        ):
            evaluate(square, data, batch_size=batch_size)(start())
    right = evaluate(
        lambda p, b: {"mse": jnp.mean((NET.apply(p, b[0])[:, 0] - b[1]) ** 2)},
        data,
        batch_size=batch_size,
    )
    predicted = np.asarray(NET.apply(start().params, DATA[0]))[:, 0]
    assert float(right(start())["mse"]) == pytest.approx(
        np.mean((predicted - DATA[1]) ** 2), rel=1e-5
    )


def test_a_loss_of_all_pairs_trains_when_it_says_so():
    @all_pairs
    def ranking(params, batch):
        return jnp.mean(jax.nn.softplus(NET.apply(params, batch[0]) - batch[1]))

    state, metrics = train_step(ranking, 0.1)(start(), DATA)
    predicted = np.asarray(NET.apply(start().params, DATA[0]), np.float64)
    by_hand = np.log1p(np.exp(predicted - DATA[1][None])).mean()
    assert float(metrics["loss"]) == pytest.approx(by_hand, rel=1e-5) and state.step == 1
