"""The recipes of docs/recipes.md run, and their numbers are those of NumPy and PyTorch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

import jaxnet
from jaxnet import tree

PAGE = "docs/recipes.md"
SECTIONS = pages.programs(PAGE)


@functools.cache
def run(title: str) -> dict[str, Any]:
    return pages.run(PAGE, SECTIONS[title])


def program(start: str) -> dict[str, Any]:
    """The names that the program of a section leaves behind."""
    (title,) = [title for title in SECTIONS if title.startswith(start)]
    return run(title)


def lines(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(autouse=True)
def defaults():
    with pages.defaults():
        yield


@pytest.mark.parametrize("title", SECTIONS)
def test_every_recipe_runs(title):
    assert run(title)


# --- GPT ------------------------------------------------------------------------------------------


def gpt_in_numpy(params, ids, heads, groups):
    """The logits of one sequence, token by token and head by head, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table, T = params["table"], len(ids)
    size = table.shape[1] // heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rotated(vector, position):
        half = size // 2
        angles = position / 10_000 ** (np.arange(half) / half)
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    x = table[ids]
    for p in [
        jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(len(params["blocks"]["norm"]["scale"]))
    ]:
        h = norm(x, p["norm"]["scale"])
        q, k, v = (h @ p["attn"][name]["kernel"] for name in ("query", "keys", "values"))
        mixed = np.zeros((T, heads * size))
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            group = slice(head // (heads // groups) * size, (head // (heads // groups) + 1) * size)
            for t in range(T):
                scores = (
                    np.array(
                        [rotated(q[t, mine], t) @ rotated(k[s, group], s) for s in range(t + 1)]
                    )
                    / size**0.5
                )
                mixed[t, mine] = softmax(scores) @ v[: t + 1, group]
        x = x + mixed @ p["attn"]["out"]["kernel"]
        h, mlp = norm(x, p["mlp"]["0"]["scale"]), p["mlp"]["1"]
        gate = h @ mlp["gate"]["kernel"]
        x = x + (gate * sigmoid(gate) * (h @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ table.T


def test_gpt_and_its_generation_are_those_of_numpy():
    scope = program("GPT")
    params, prompt, net = scope["params"], np.asarray(scope["prompt"]), scope["net"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.05 * rng.normal(size=leaf.shape), leaf.dtype), params
    )
    logits, _ = net.apply(params, prompt)
    np.testing.assert_allclose(
        logits[0], gpt_in_numpy(params, prompt[0], 4, 2), rtol=1e-3, atol=1e-4
    )
    text = jax.jit(scope["generate"], static_argnums=(0, 4))(
        net, params, prompt, scope["cache"], 12
    )
    for row, generated in zip(prompt, np.asarray(text), strict=True):
        ids = list(row)
        for _ in range(12):
            ids.append(int(gpt_in_numpy(params, np.array(ids), 4, 2)[-1].argmax()))
        assert ids[len(row) :] == generated.tolist()


def test_gpt_is_trained_through_remat_and_stays_short():
    scope = program("GPT")
    net, params = scope["net"], scope["params"]
    ids = np.arange(12).reshape(2, 6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(net.apply(p, ids)[0]))))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    (blocks,) = [blocks for title, blocks in SECTIONS.items() if title.startswith("GPT")]
    assert lines(blocks[1].text) <= 20


# --- LSTM -----------------------------------------------------------------------------------------


def test_the_lstm_is_that_of_pytorch_on_packed_sequences():
    torch = pytest.importorskip("torch")
    scope = program("LSTM")
    params, x, lengths = scope["params"], scope["x"], scope["lengths"]
    gates = tree.get(params, "rnn/lstm")
    lstm = torch.nn.LSTM(5, 8, batch_first=True)
    kernel = np.asarray(gates["kernel"]).T
    with torch.no_grad():
        for name, value in [
            ("weight_ih_l0", kernel[:, :5]),
            ("weight_hh_l0", kernel[:, 5:]),
            ("bias_ih_l0", gates["bias"]),
        ]:
            getattr(lstm, name).copy_(torch.from_numpy(np.array(value)))
        lstm.bias_hh_l0.zero_()
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            torch.from_numpy(np.array(x)),
            torch.from_numpy(np.array(lengths)),
            batch_first=True,
            enforce_sorted=False,
        )
        h = lstm(packed)[1][0][0].numpy()
    expected = h @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(
        scope["net"].apply(params, x, lengths), expected, rtol=1e-5, atol=1e-6
    )


def test_what_follows_the_end_of_a_sequence_changes_nothing_and_masks_are_fresh():
    scope = program("LSTM")
    net, params, x, lengths = (scope[name] for name in ("net", "params", "x", "lengths"))
    changed = x.at[1, 2:].set(9.0)
    np.testing.assert_array_equal(
        net.apply(params, x, lengths), net.apply(params, changed, lengths)
    )
    _, seen = jaxnet.capture(net, "rnn/drop")(
        params, jnp.ones((3, 7, 5)), jnp.full(3, 7), key=jax.random.key(0), train=True
    )
    masks = np.asarray(seen["rnn/drop"]).reshape(7, -1)
    assert len(np.unique(masks, axis=0)) == 7


# --- experts --------------------------------------------------------------------------------------


def test_the_experts_are_those_of_numpy_with_their_loss_terms_and_train():
    scope = program("Mixture")
    tapped, params = scope["tapped"], scope["run"].train_state.params
    x = np.asarray(scope["x"][:16])
    _, seen = jaxnet.capture(scope["net"], ["blocks", "**/aux"])(params, x)
    assert jax.tree.map(jnp.shape, seen["blocks/aux"]) == {"balance": (4,), "z": (4,)}
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["blocks"])
    logits = x @ p["router"]["kernel"]
    gates = softmax(logits)
    expected, chosen_by = np.zeros_like(x, np.float64), np.zeros(8)
    for b in range(len(x)):
        chosen = np.argsort(-gates[b], kind="stable")[:2]
        for e in chosen:
            gate, up, down = (p["experts"][name]["kernel"][e] for name in ("gate", "up", "down"))
            h = x[b] @ gate
            expected[b] += (
                gates[b, e] / gates[b, chosen].sum() * ((h * sigmoid(h) * (x[b] @ up)) @ down)
            )
            chosen_by[e] += 1 / len(x)
    np.testing.assert_allclose(seen["blocks"][0], x + expected, rtol=1e-4, atol=1e-5)
    aux = jax.tree.map(lambda leaf: leaf[0], seen["blocks/aux"])
    np.testing.assert_allclose(aux["balance"], 8 * (gates.mean(0) * chosen_by).sum(), rtol=1e-5)
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    np.testing.assert_allclose(aux["z"], z, rtol=1e-5)
    losses = [record["loss"] for record in scope["run"].history]
    assert losses[-1] < losses[0] or len(losses) == 1
    total = lambda p: sum(v.sum() for v in jax.tree.leaves(tapped(p, x)[1]))  # noqa: E731
    grads = jax.grad(total)(params)
    assert np.any(grads["blocks"]["router"]["kernel"]) and not np.any(grads["head"]["kernel"])


def test_the_bodies_of_an_autoencoder_agree():
    scope = program("Encoder")
    np.testing.assert_allclose(
        scope["y"], scope["autoencode"].apply(scope["params"], scope["x"]), rtol=1e-6
    )


def test_stochastic_depth_drops_the_last_block_most():
    scope = program("Stochastic")
    net, params = scope["net"], scope["params"]
    x = jax.random.normal(jax.random.key(4), (2000, 16))
    _, seen = jaxnet.capture(net, "trunk")(params, x, key=jax.random.key(3), train=True)
    before = jnp.concatenate([x[None], seen["trunk"][:-1]])
    dropped = np.mean(np.all(seen["trunk"] == before, -1), 1)
    np.testing.assert_allclose(
        dropped, np.linspace(0, 0.3, 6), atol=4 * np.sqrt(0.21 / 2000)
    )  # four standard deviations


def test_fourier_features_approximate_the_gaussian_kernel():
    """The mean over features of cos(b(x - y)) tends to exp(-|x - y|^2 / 2) (Rahimi & Recht
    2007).
    """
    fourier = program("State")["fourier"](20_000)
    x = jnp.asarray([[0.3, -0.2], [0.9, 0.5]])
    z, _ = fourier.apply({}, x, state=fourier.init_state(x, key=jax.random.key(0)))
    assert abs(float(z[0] @ z[1]) / 20_000 - np.exp(-(0.6**2 + 0.7**2) / 2)) < 0.02


def test_weight_norm_has_columns_of_the_given_length():
    scope = program("A combinator")
    assert set(scope["seen"]) == {"", "first", "act", "out"}
    first, x = scope["params"]["first"], scope["x"]
    np.testing.assert_allclose(
        scope["seen"]["first"], x @ first["kernel"] + first["bias"], rtol=1e-5, atol=1e-6
    )
