"""The examples, with a small budget: what they claim, and that they equal the hand-written
originals.
"""

import importlib.util
import json
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnet

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ended(monkeypatch, capsys):
    """(name of an example, *options) -> (exit code, output, errors) of it as a program.

    It runs in this process, where JAX is imported already. A text for SystemExit is what Python
    prints to the errors, with the exit code 1.
    """

    def program(name, *options):
        file = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [file, *options])
        with pytest.raises(SystemExit) as error:
            runpy.run_path(file, run_name="__main__")
        code, (out, errors) = error.value.code, capsys.readouterr()
        return (1, out, f"{errors}{code}\n") if isinstance(code, str) else (code, out, errors)

    return program


@pytest.fixture(scope="module")
def xor():
    return example("xor")


@pytest.fixture(scope="module")
def edges():
    return example("edges")


@pytest.fixture(scope="module")
def digits():
    return example("digits")


@pytest.fixture(scope="module")
def ensemble():
    return example("ensemble")


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py"))])
def test_help_explains_every_option(name, ended):
    code, help, _ = ended(name, "--help")
    assert code == 0
    options = re.findall(r"^  (--[\w-]+)( [A-Z]+)?(.*(?:\n {10,}.*)?)", help, re.M)
    assert options and all(text.strip() for _, _, text in options)
    assert "--cache-dir" in {name for name, _, _ in options}


def test_headers_state_what_was_measured():
    for path in EXAMPLES.glob("*.py"):
        assert "HEADER" not in path.read_text(), f"{path.name}: the header has no figures yet"


# XOR


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def literal_xor(hidden, output, lr, epochs):
    """The classic NumPy program: forward, backward by hand, plain gradient descent; also the first
    step's gradients.
    """
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float64)
    y = np.array([[0], [1], [1], [0]], np.float64)
    hidden, output, first = hidden.copy(), output.copy(), []
    for _ in range(epochs):
        h = sigmoid(x @ hidden)
        f = sigmoid(h @ output)
        delta_output = (f - y) * f * (1 - f)
        delta_hidden = delta_output @ output.T * h * (1 - h)
        gradients = [x.T @ delta_hidden, h.T @ delta_output]
        first = first or gradients
        hidden -= lr * gradients[0]
        output -= lr * gradients[1]
    return hidden, output, first


def test_xor_equals_backpropagation_by_hand(xor):
    with jax.enable_x64(True):
        net = xor.network()
        table = jnp.asarray(xor.X, jnp.float64)
        params = net.init(jax.random.key(5), table)
        assert jax.tree.map(jnp.shape, params) == {
            "hidden": {"kernel": (2, 2)},
            "output": {"kernel": (2, 1)},
        }
        start = [np.asarray(params[name]["kernel"]) for name in ("hidden", "output")]
        assert all(np.abs(w).max() <= 1 for w in start)

        def loss(params):
            return (
                jnp.sum(jnp.square(jnp.asarray(xor.Y, jnp.float64) - net.apply(params, table))) / 2
            )

        def step(_, params):
            return jaxnet.sgd(params, jax.grad(loss)(params), 0.1)

        grads = jax.grad(loss)(params)
        after = jax.jit(lambda params: jax.lax.fori_loop(0, 10_000, step, params))(params)
        hidden, output, first = literal_xor(*start, lr=0.1, epochs=10_000)
        np.testing.assert_allclose(grads["hidden"]["kernel"], first[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grads["output"]["kernel"], first[1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(after["hidden"]["kernel"], hidden, atol=1e-9)
        np.testing.assert_allclose(after["output"]["kernel"], output, atol=1e-9)


def test_xor_learns_for_the_share_of_seeds_that_others_measured(xor, capsys):
    shares = list(xor.main(seeds=400).values())
    # 20.5 % of 5,000 seeds, 75.9 % and 99.9 % of 1,000; five standard errors of 400 seeds
    for share, known in zip(shares, [0.205, 0.759, 0.999], strict=True):
        assert abs(share - known) < 5 * (known * (1 - known) / 400) ** 0.5 + 0.005
    table = re.findall(
        r"^  ([01])  ([01])      ([01])       (\d\.\d+)$", capsys.readouterr().out, re.M
    )
    assert len(table) == 4 and all(
        round(float(answer)) == int(a) ^ int(b) == int(y) for a, b, y, answer in table
    )


# Edges


def test_all_nine_weights_of_the_sobel_operator_are_recovered(edges):
    images = jnp.asarray(np.random.default_rng(0).random((64, 8, 8, 1), np.float32))
    before, after = edges.learn_sobel(images, jax.random.key(1), steps=1500)
    assert edges.kernel_error(before) > 0.5
    assert edges.kernel_error(after) < 1e-3
    assert (np.abs(after - before) > 1e-3).all()  # every weight moved


@pytest.mark.slow
def test_edges_draws_kernels_before_and_after(edges, tmp_path, capsys):
    error, accuracy = edges.main(steps=400, epochs=2, out=str(tmp_path))
    assert error < 0.1 and accuracy > 0.5
    assert (tmp_path / "edges.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# MNIST on one page


def test_mnist_is_one_page():
    assert len((EXAMPLES / "mnist.py").read_text().splitlines()) <= 60


def run_mnist(folder, epochs, out, capsys):
    """The printed accuracy in percent, and the number of the ten predictions that are right."""
    example("mnist").main(folder, epochs=epochs, out=str(out))
    printed = capsys.readouterr().out
    accuracy = re.search(r"^test accuracy ([\d.]+)%$", printed, re.M)
    lines = [re.search(rf"^{name} +\[(.*)\]$", printed, re.M) for name in ("predicted", "labels")]
    assert accuracy and all(lines)
    predicted, labels = (line[1].split() for line in lines if line)
    assert len(labels) == 10
    return float(accuracy[1]), sum(a == b for a, b in zip(predicted, labels, strict=True))


def test_mnist_learns_the_small_digits(tmp_path, capsys):
    """A guess is right for 10 % of the images. 5 epochs gave 90.3 % and nine right predictions."""
    accuracy, right = run_mnist(None, 5, tmp_path / "net.safetensors", capsys)
    assert accuracy > 80 and right >= 7
    info = jaxnet.checkpoint.inspect(tmp_path / "net.safetensors")
    assert round(100 * info.metadata["accuracy"], 1) == accuracy
    assert [leaf.path for leaf in info.leaves if leaf.path.startswith("out/")] == [
        "out/bias",
        "out/kernel",
    ]


@pytest.mark.slow
def test_mnist_takes_the_mnist_files(real_data, tmp_path, capsys):
    """One epoch gave 98.0 %."""
    accuracy, right = run_mnist(str(real_data / "mnist"), 1, tmp_path / "net.safetensors", capsys)
    assert accuracy > 96 and right >= 9


# Digits


@pytest.mark.parametrize(
    "model, epochs, floor",
    [("mlp", 4, 0.85), pytest.param("convnet", 1, 0.3, marks=pytest.mark.slow)],
)
def test_digits_trains_saves_and_restores_in_a_new_process(
    digits, tmp_path, capfd, model, epochs, floor
):
    accuracy = digits.main(model, epochs=epochs, out=str(tmp_path), resume=True)
    out = capfd.readouterr().out
    assert accuracy > floor
    running = tmp_path / f"{model}_running.safetensors"
    assert f"nothing to resume: there is no {running}; the run begins anew" in out
    assert not running.exists()
    assert (
        "every prediction is identical, bit for bit" in out
        and f"restored {tmp_path / model}.safetensors" in out
    )
    assert (tmp_path / f"{model}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = [
        line.split()[1:] for line in out.splitlines() if re.fullmatch(r"\s+\d( +[\d.]+){10}", line)
    ]
    confusion = np.array([[0 if cell == "." else int(cell) for cell in row] for row in rows])
    assert confusion.shape == (10, 10) and confusion.sum() == 359
    assert confusion.trace() / 359 == pytest.approx(accuracy)
    if model == "mlp":
        params = jaxnet.load(tmp_path / "mlp.safetensors")["params"]
        assert jaxnet.tree.count(params) == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_digits_goes_on_after_an_interruption(tmp_path, number, code):
    command = [
        sys.executable,
        EXAMPLES / "digits.py",
        "--epochs",
        "150",
        "--out",
        tmp_path,
        "--cache-dir",
        jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("epoch"):
            assert process.poll() is None
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    said = re.search(rf"{number.name} at step (\d+): .*--resume goes on", printed)
    assert process.returncode == code and said and 0 < int(said[1]) < 120 * 22
    rest = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert rest.returncode == 0 and f"goes on from step {int(said[1]):,}" in rest.stderr
    assert (
        "identical, bit for bit" in rest.stdout
        and not (tmp_path / "mlp_running.safetensors").exists()
    )


def test_the_mnist_store_has_234_752_weights_and_394_biases(digits):
    params = jax.eval_shape(
        digits.mlp().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    )
    kernels, biases = jaxnet.tree.split(params, "**/kernel")
    assert jaxnet.tree.count(kernels) == 784 * 256 + 256 * 128 + 128 * 10 == 234_752
    assert jaxnet.tree.count(biases) == 256 + 128 + 10 == 394


def test_digits_refuses_a_checkpoint_of_something_else(digits, tmp_path):
    jaxnet.save(tmp_path / "other.safetensors", {"weights": jnp.ones(3)})
    with pytest.raises(ValueError, match="no checkpoint of this example: it holds .'weights'"):
        digits.restore(str(tmp_path / "other.safetensors"), None, None)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--data", "nowhere"], "digits.py: nowhere: expected the four MNIST files"),
        (
            ["--batch-size", "5000"],
            "digits.py: batch_size 5000 is larger than the data, 1438 examples",
        ),
        (["--restore", __file__], f"digits.py: {__file__}: "),
    ],
)
def test_digits_answers_wrong_options_in_one_line(options, text, tmp_path, monkeypatch, ended):
    monkeypatch.chdir(tmp_path)
    code, _, errors = ended("digits", *options)
    assert code == 1 and text in errors


@pytest.mark.slow
def test_digits_takes_the_mnist_files(digits, real_data, tmp_path, capfd):
    accuracy = digits.main("mlp", str(real_data / "mnist"), epochs=1, out=str(tmp_path))
    assert accuracy > 0.93
    assert "every prediction is identical" in capfd.readouterr().out


# Ensemble


def test_calibration_error_and_likelihood_of_a_case_worked_by_hand(ensemble):
    """Ten images at confidence 0.9 with 7 right, five at 0.5 with 4 right: ECE = (10 * 0.2 + 5 *
    0.3) / 15.
    """
    rest = np.eye(10)[1]
    probabilities = np.stack(
        [0.9 * np.eye(10)[0] + 0.1 * rest] * 10 + [0.5 * np.eye(10)[0] + 0.5 * rest] * 5
    )
    probabilities[10:, 0] += 1e-9  # no tie
    labels = np.array([0] * 7 + [1] * 3 + [0] * 4 + [1])
    np.testing.assert_allclose(
        ensemble.calibration_error(probabilities, labels), 3.5 / 15, rtol=1e-6
    )
    likelihood = -(7 * np.log(0.9) + 3 * np.log(0.1) + 5 * np.log(0.5)) / 15
    np.testing.assert_allclose(
        ensemble.negative_log_likelihood(probabilities, labels), likelihood, rtol=1e-6
    )
    assert ensemble.accuracy(probabilities, labels) == 11 / 15
    both = np.stack([probabilities, np.roll(probabilities, 1, -1)])  # a leading axis of members
    assert (
        ensemble.calibration_error(both, labels).shape
        == ensemble.negative_log_likelihood(both, labels).shape
        == (2,)
    )


def test_ensemble_compares_draws_and_saves(ensemble, tmp_path, capsys):
    table = ensemble.main(members=8, epochs=4, width=16, out=str(tmp_path))
    assert table["best member"]["accuracy"] > 0.8 > table["median member"]["accuracy"] > 0.1
    assert (tmp_path / "ensemble.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert sum(map(int, re.findall(r"^1e-\d to 1e-?\d +(\d+) ", out, re.M))) == 8
    # the mean of the members' probabilities is at least as likely as they are on average (Jensen)
    row = re.search(r"all, at random\n.*\n  NLL(.*)", out)
    assert row
    losses = [float(cell) for cell in row[1].split()]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(table["mean of all"]["NLL"], abs=5e-4)
    saved = jaxnet.load(tmp_path / "ensemble.safetensors")
    test = jaxnet.data.digits(seed=0).test
    logits = jax.vmap(ensemble.network(16).apply, (0, None))(saved["params"], test.images)
    mean = np.asarray(jax.nn.softmax(logits), np.float64).mean(0)
    assert ensemble.accuracy(mean, test.labels) == table["mean of all"]["accuracy"]


def test_ensemble_answers_wrong_options_in_one_line(tmp_path, monkeypatch, ended):
    monkeypatch.chdir(tmp_path)
    code, _, errors = ended("ensemble", "--members", "3")
    assert code == 1 and "ensemble.py: members must be at least 4" in errors


# The accuracies in the headers: `pytest -m slow`


def accuracies(digits, model, data, seeds, **settings):
    net, found = digits.MODELS[model](), []
    for seed in range(seeds):
        result = digits.train(
            net, data, lr=digits.RATES[model], noise=0.1, seed=seed, progress=False, **settings
        )
        found.append(result.history[-1]["test_accuracy"])
    spread = f" ± {np.std(found, ddof=1):.2%}" if seeds > 1 else ""
    print(f"{model}: {np.mean(found):.2%}{spread} ({seeds} seeds)")
    return np.mean(found)


@pytest.mark.slow
@pytest.mark.parametrize("model, floor", [("mlp", 0.97), ("convnet", 0.985)])
def test_accuracy_on_the_8x8_digits(digits, model, floor):
    assert accuracies(digits, model, digits.load_data(None), 5, epochs=40, batch_size=64) >= floor


@pytest.mark.slow
@pytest.mark.parametrize("model, seeds, floor", [("mlp", 5, 0.98), ("convnet", 1, 0.992)])
def test_accuracy_on_mnist(digits, real_data, model, seeds, floor):
    data = digits.load_data(str(real_data / "mnist"))
    assert accuracies(digits, model, data, seeds, epochs=10, batch_size=128) >= floor


@pytest.mark.slow
def test_what_an_ensemble_gains(ensemble, tmp_path):
    tables = [ensemble.main(seed=seed, out=str(tmp_path)) for seed in range(5)]
    for row in tables[0]:
        cells = {name: [table[row][name] for table in tables] for name in tables[0][row]}
        print(
            f"{row:28}"
            + "".join(f"  {m} {np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}" for m, x in cells.items())
        )
    gains = [
        table["median of the best quarter"]["NLL"] - table["mean of the best quarter"]["NLL"]
        for table in tables
    ]
    assert min(gains) > 0 and np.mean([table["mean of all"]["accuracy"] for table in tables]) > 0.95


def test_digits_does_not_delete_an_interrupted_run(digits, tmp_path):
    running = tmp_path / "mlp_running.safetensors"
    running.write_bytes(b"steps of an hour")
    remedy = (
        "is of a run that was interrupted: --resume goes on from there; delete the file to "
        "begin anew"
    )
    with pytest.raises(ValueError, match=remedy):
        digits.main(epochs=1, out=str(tmp_path))
    assert running.read_bytes() == b"steps of an hour"


def test_digits_names_its_own_flag(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "digits.py"),
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path),
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (
        told.returncode == 1 and "--download" in told.stderr and "download=True" not in told.stderr
    )
    assert "Traceback" not in told.stderr


# Trained language models


def trained(real_data, name):
    folder = real_data / "pretrained" / name
    if not folder.is_dir():
        pytest.skip(f"no pretrained/{name} in the real data")
    return folder


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_stories_tells_the_published_story(real_data, cache, capsys):
    folder = trained(real_data, "stories260k")
    with jax.numpy_rank_promotion("allow"):
        text = example("stories").main(str(folder), cache=cache)
    # The file ends with the line break of `print`.
    expected = (folder / "expected_greedy.txt").read_text()
    assert f"{text}\n" == expected == capsys.readouterr().out


def test_sort_sorts_all_inputs(real_data, capsys):
    folder = trained(real_data, "nano_sort")
    assert example("sort").main(str(folder)).all()
    assert "729 of 729 inputs are sorted" in capsys.readouterr().out


def test_every_activation_of_sort_is_the_stored_one(real_data):
    """Those of the first block, the outputs of all blocks, and the rest of the network."""
    folder, sort = trained(real_data, "nano_sort"), example("sort")
    net, params = sort.read(str(folder))
    file = json.loads((folder / "gpt-nano-sort-t0-partials.json").read_text())
    stored = {name: sort.array(entry) for name, entry in file.items() if name != "config"}
    ids = jnp.asarray(stored["idx"], jnp.int32)
    logits, seen = jaxnet.capture(net)(params, ids)

    def by_head(x):
        return x.reshape(*x.shape[:-1], 3, 16).swapaxes(1, 2)

    inner = {name: x[0] for name, x in seen.items() if isinstance(x, jax.Array)}
    attend = {
        name.removeprefix("blocks/attend/"): x for name, x in inner.items() if "/attend/" in name
    }
    heads = {name: attend[f"attn/{name}"] for name in ("query", "keys", "values")}
    causal = np.tri(11, dtype=bool)
    residual = seen["blocks/attend"][0]
    actual = {
        "tok_emb": seen["tokens"],
        "pos_emb": params["positions"]["embedding"][None],
        "x": seen["positions"],
        "ln1": attend["norm"],
        "q": by_head(heads["query"]),
        "k": by_head(heads["keys"]),
        "v": by_head(heads["values"]),
        "qkv": np.concatenate(list(heads.values()), -1),
        "att": np.where(causal, attend["attn/core/cap"], 0),
        "attSm": attend["attn/core/weights"],
        "y": attend["attn/core"].reshape(3, 11, 48),
        "yProj": attend["attn"],
        "attnResid": residual,
        "ln2": seen["blocks/feed/norm"][0],
        "fc": seen["blocks/feed/mlp/up"][0],
        "gelu": seen["blocks/feed/mlp/act"][0],
        "mlp": seen["blocks/feed/mlp"][0],
        "mlpResid": seen["blocks/feed"][0],
        **{f"block{i}": x for i, x in enumerate(seen["blocks"])},
        "ln_f": seen["norm"],
        "lm_head": logits,
        "probs": jax.nn.softmax(logits),
    }
    assert actual.keys() | {"idx"} == stored.keys()
    stored["att"] = np.where(causal, stored["att"], 0)
    for name, x in actual.items():
        np.testing.assert_allclose(x, stored[name], rtol=1e-5, atol=1e-5, err_msg=name)
