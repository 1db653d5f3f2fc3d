"""[B, 1] against [B]: refused in every form and every time, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import chain, dense
from jaxnet.train import Weighted, all_pairs, evaluate, fit, train_state, train_step, train_steps
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
    "inside scan": lambda b: jax.lax.scan(lambda c, _: (c + (b["p"] - b["y"]).mean(), None), 0.0, None, 3)[0],
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
    "contrastive, softmax": lambda b: optax.softmax_cross_entropy(b["z"] @ b["z"].T, jnp.eye(len(b["z"]))),
    "columns of similarities": lambda b: b["s"] @ b["s"].T - jax.nn.logsumexp(b["s"] @ b["s"].T, axis=0),
    "distances": lambda b: jnp.linalg.norm(b["z"][:, None, :] - b["z"][None, :, :], axis=-1),
    "bias, as many features as examples": lambda b: b["s"] + FREQUENCIES,
    "frequencies, as many as examples": lambda b: jnp.sin(b["y"][:, None] * FREQUENCIES),
    "frequencies of [B, 1]": lambda b: jnp.sin(b["p"] * FREQUENCIES),
    "causal mask, as long as the batch": lambda b: b["y"][0] * (jnp.arange(B)[:, None] >= jnp.arange(B)),
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
            ValueError, match=r"the loss broadcasts \[.*\] against \[.*\] in '\w+'.* pairs every example"
        ):
            refuse_pairs("the loss", PAIRED[form], BATCH)


@pytest.mark.parametrize("form", UNPAIRED)
def test_other_broadcasting_and_pairs_on_purpose_are_not_refused(form):
    UNPAIRED[form](BATCH)  # works at all
    refuse_pairs("the loss", UNPAIRED[form], BATCH)


def test_a_batch_of_one_has_no_pairs():
    refuse_pairs("the loss", lambda b: b["p"] - b["y"], jax.tree.map(lambda leaf: leaf[:1], BATCH))


def test_the_error_of_the_loss_itself_is_not_hidden():
    with pytest.raises(ValueError, match="ncompatible shapes"):
        step = train_step(lambda w, b: w * jnp.mean(b["z"] - b["y"]), 0.1)
        jax.jit(step)(train_state(jnp.float32(1), 0.1, jax.random.key(0)), BATCH)


def test_the_error_names_the_operation_the_shapes_and_the_line():
    def loss(w, batch):
        return jnp.mean((w * batch["p"] - batch["y"]) ** 2)

    with pytest.raises(ValueError) as caught:
        train_step(loss, 0.1)(train_state(jnp.float32(1), 0.1, jax.random.key(0)), BATCH)
    line = loss.__code__.co_firstlineno + 1
    assert str(caught.value).splitlines()[0] == (
        f"train_step: the loss broadcasts [8, 1] against [8] in 'subtract' (test_pairs.py:{line}), which pairs every "
        "example with every other one: give both one shape, with x[:, 0] or y[:, None]; if all pairs are meant, write "
        "y[None, :] or wrap the function in jaxnet.train.all_pairs"
    )


NET = chain(out=dense(1))
DATA = (np.linspace(-1, 1, 24, dtype=np.float32)[:, None], np.ones(24, np.float32))


def cross_entropy(params, batch):
    return optax.sigmoid_binary_cross_entropy(NET.apply(params, batch[0]), batch[1]).mean()


def accuracy(params, batch):
    logits = NET.apply(params, batch[0])
    return logits[:, 0].mean(), {"accuracy": jnp.mean((logits > 0) == batch[1])}


def start():
    return train_state(NET.init(jax.random.key(0), DATA[0]), 0.1, jax.random.key(1))


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
        with pytest.raises(ValueError, match="evaluate: a metric broadcasts .* pairs every example"):
            evaluate(square, data, batch_size=batch_size)(start())
    right = evaluate(
        lambda p, b: {"mse": jnp.mean((NET.apply(p, b[0])[:, 0] - b[1]) ** 2)}, data, batch_size=batch_size
    )
    predicted = np.asarray(NET.apply(start().params, DATA[0]))[:, 0]
    assert float(right(start())["mse"]) == pytest.approx(np.mean((predicted - DATA[1]) ** 2), rel=1e-5)


def test_a_loss_of_all_pairs_trains_when_it_says_so():
    @all_pairs
    def ranking(params, batch):
        return jnp.mean(jax.nn.softplus(NET.apply(params, batch[0]) - batch[1]))

    state, metrics = train_step(ranking, 0.1)(start(), DATA)
    predicted = np.asarray(NET.apply(start().params, DATA[0]), np.float64)
    by_hand = np.log1p(np.exp(predicted - DATA[1][None])).mean()
    assert float(metrics["loss"]) == pytest.approx(by_hand, rel=1e-5) and state.step == 1
