"""Handwritten digits: train, inspect, save, restore in a new process, and see that nothing changed.

    python examples/digits.py                                 98.3 ± 0.2 % of test images in 10 s
    python examples/digits.py --model convnet                 99.1 ± 0.3 % in 16 s
    python examples/digits.py --data FOLDER                   98.6 ± 0.1 % of MNIST's in 25 s
    python examples/digits.py --data FOLDER --model convnet   99.3 % in 5 minutes (2 seeds)

(as measured on two cores of a shared machine, compilation included; mean and deviation over 5
seeds, one fixed stratified split: `python -m pytest -m slow tests/test_examples.py -s` prints them)

The multilayer perceptron is the 784-256-128-10 store of weights and biases (64-256-128-10 for the
8x8 digits that come with scikit-learn, the default). FOLDER holds the four MNIST files; --download
fetches them.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnet
from jaxnet import Layer, batch_norm, call, chain, conv, dense, dropout, flatten, max_pool
from jaxnet.data import Dataset, check_labels, digits, mnist
from jaxnet.train import (
    Result,
    TrainState,
    augmented,
    compile_cache,
    evaluate,
    fit,
    plot_history,
    train_step,
)


def mlp() -> Layer:
    return chain(
        flatten=flatten(),
        hidden1=dense(256),
        relu1=jax.nn.relu,
        hidden2=dense(128),
        relu2=jax.nn.relu,
        out=dense(10),
    )


def convnet() -> Layer:
    return chain(
        conv1=conv(32, 3, bias=False),
        norm1=batch_norm(),
        relu1=jax.nn.relu,
        pool1=max_pool(2),
        conv2=conv(64, 3, bias=False),
        norm2=batch_norm(),
        relu2=jax.nn.relu,
        pool2=max_pool(2),
        flatten=flatten(),
        drop1=dropout(0.25),
        hidden=dense(128),
        relu3=jax.nn.relu,
        drop2=dropout(0.25),
        out=dense(10),
    )


MODELS = {"mlp": mlp, "convnet": convnet}
RATES = {"mlp": 3e-3, "convnet": 1e-3}


def train(
    net: Layer,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    noise: float = 0.1,
    seed: int = 0,
    checkpoint: pathlib.Path | None = None,
    progress: bool | None = None,
) -> Result:
    """AdamW on a cosine schedule, Gaussian noise on the training images; returns the train state
    and the history.

    With a checkpoint, the run goes on from there if the file exists, and its state is kept there if
    it is interrupted.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    example = jax.ShapeDtypeStruct((1, *data.train.images.shape[1:]), jnp.float32)
    params, state = net.init(init_key, example), net.init_state(example) if net.init_state else {}

    def add_noise(key, batch):
        return batch._replace(
            images=batch.images + noise * jax.random.normal(key, batch.images.shape)
        )

    def loss(params, batch, state, key):
        images, labels = batch
        logits, state = call(net, params, images, state=state, key=key, train=True)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return errors, state, {"accuracy": logits.argmax(-1) == labels}

    def test(params, batch, state):
        logits, _ = call(net, params, batch.images, state=state)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return {"test_loss": errors, "test_accuracy": logits.argmax(-1) == batch.labels}

    steps = epochs * (len(data.train.labels) // batch_size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(lr, max(steps, 1)), weight_decay=1e-4)
    return fit(
        augmented(train_step(loss, optimizer), add_noise),
        TrainState.create(params, optimizer, run_key, state=state),
        data.train,
        epochs=epochs,
        batch_size=batch_size,
        evaluate=evaluate(test, data.test),
        checkpoint=checkpoint,
        progress=progress,
    )


def predict(net: Layer, params, state, images) -> np.ndarray:
    """Logits [N, 10] for all images, 1,000 at a time."""
    apply = jax.jit(lambda params, state, images: call(net, params, images, state=state)[0])
    return np.concatenate(
        [apply(params, state, images[i : i + 1000]) for i in range(0, len(images), 1000)]
    )


def confusion(predicted, labels) -> str:
    """The confusion matrix as text: a row for each digit, a column for what it was taken for."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predicted), 1)
    rows = ["true \\ taken for" + "".join(f"{digit:6}" for digit in range(10))]
    for digit, row in enumerate(counts):
        rows.append(f"{digit:>15} " + "".join(f"{count:6}" if count else "     ." for count in row))
    return "\n".join(rows)


def draw_errors(path, images, predicted, labels) -> None:
    """The test images that were misread, each with what it is and what it was taken for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrong = np.flatnonzero(predicted != labels)[:24]
    rows = max(1, -(-len(wrong) // 8))
    figure = Figure(figsize=(8, 1.25 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, axes in enumerate(figure.subplots(rows, 8, squeeze=False).flat):
        axes.set_axis_off()
        if i < len(wrong):
            axes.imshow(images[wrong[i], :, :, 0], cmap="gray_r")
            axes.set_title(f"{labels[wrong[i]]}, read as {predicted[wrong[i]]}", fontsize=8)
    figure.suptitle(
        f"{np.sum(predicted != labels)} of {len(labels):,} test images misread", fontsize=10
    )
    figure.savefig(path, dpi=150)


def inspect(params) -> None:
    """Print the structure of weights and biases, with a few of their values."""
    print(jaxnet.tree.table(params))
    for path, leaf in list(jaxnet.tree.flatten(params).items())[:4]:
        print(f"  {path} = [{', '.join(f'{value:.4f}' for value in np.ravel(leaf)[:5])}, ...]")


def load_data(folder: str | None, *, download: bool = False) -> Dataset:
    data = mnist(folder, download=download) if folder else digits()
    check_labels(data.train.labels, 10)
    return data


def restore(file: str, folder: str | None, logits: str | None) -> float:
    """Load a checkpoint into a fresh process, and test it."""
    saved = jaxnet.load(file)
    if not isinstance(saved, dict) or saved.get("model") not in MODELS:
        raise ValueError(
            f"{file} is no checkpoint of this example: it holds {jaxnet.tree.paths(saved)[:5]}"
        )
    data = load_data(folder)
    answers = predict(MODELS[saved["model"]](), saved["params"], saved["state"], data.test.images)
    if logits:
        np.save(logits, answers)
    accuracy = float((answers.argmax(-1) == data.test.labels).mean())
    print(f"restored {file}: test accuracy {accuracy:.2%}")
    return accuracy


def main(
    model: str = "mlp",
    data: str | None = None,
    *,
    download: bool = False,
    epochs: int = 0,
    batch_size: int = 0,
    lr: float = 0,
    noise: float = 0.1,
    seed: int = 0,
    out: str = "out",
    resume: bool = False,
) -> float:
    """Train, inspect, save, restore; returns the test accuracy.

    Raises: SystemExit with code 130 or 143 if SIGINT or SIGTERM came; the state is saved, `resume`
    goes on from there.
    """
    folder, data_folder = pathlib.Path(out), data
    dataset = load_data(data_folder, download=download)
    epochs = epochs or (40 if data_folder is None else 10)
    batch_size = batch_size or (64 if data_folder is None else 128)
    folder.mkdir(parents=True, exist_ok=True)
    net = MODELS[model]()

    print(dataset)
    print(
        jaxnet.summary(
            net, jax.ShapeDtypeStruct((batch_size, *dataset.train.images.shape[1:]), jnp.float32)
        ),
        "\n",
    )
    running = folder / f"{model}_running.safetensors"
    if running.exists() and not resume:
        raise ValueError(
            f"{running} is of a run that was interrupted: --resume goes on from there; delete "
            "the file to begin anew"
        )
    if resume and not running.exists():
        print(f"nothing to resume: there is no {running}; the run begins anew")
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr or RATES[model],
        "noise": noise,
        "seed": seed,
    }
    result = train(net, dataset, **settings, checkpoint=running)
    if result.stopped:
        step = int(result.train_state.step)
        print(
            f"{result.stopped} at step {step}: the state is in {running}; the same command with "
            "--resume goes on"
        )
        raise SystemExit(result.exit_code)
    params, state = result.train_state.params, result.train_state.state

    print("\nWhat it learned, as a store of weights and biases:")
    inspect(params)

    answers = predict(net, params, state, dataset.test.images)
    predicted = answers.argmax(-1)
    accuracy = float((predicted == dataset.test.labels).mean())
    print(f"\n{confusion(predicted, dataset.test.labels)}\n")
    wrong = int((predicted != dataset.test.labels).sum())
    print(f"test accuracy {accuracy:.2%} ({wrong} of {len(predicted):,} wrong)")

    picture = folder / f"{model}.png"
    plot_history(
        result.history,
        picture,
        title=f"{model} on {len(dataset.train.labels):,} digits: {accuracy:.2%}",
    )
    mistakes = folder / f"{model}_misread.png"
    draw_errors(mistakes, dataset.test.images, predicted, dataset.test.labels)
    file = folder / f"{model}.safetensors"
    jaxnet.save(file, {"model": model, "params": params, "state": state})
    running.unlink()
    print(f"learning curves in {picture}, what it misread in {mistakes}, checkpoint in {file}")

    with tempfile.TemporaryDirectory() as scratch:
        logits = pathlib.Path(scratch) / "logits.npy"
        command = [sys.executable, __file__, "--restore", file, "--logits", logits]
        subprocess.run([*command, *(["--data", data_folder] if data_folder else [])], check=True)
        same = np.array_equal(np.load(logits), answers)
    print(
        "in a new process every prediction is "
        + ("identical, bit for bit" if same else "NOT identical")
    )
    if not same:
        raise SystemExit(1)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="mlp",
        help="mlp (default), or convnet with batch norm and dropout",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder with the four MNIST files (default: scikit-learn's 8x8 digits)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the MNIST files that FOLDER lacks (11 MB, checksums verified)",
    )
    parser.add_argument(
        "--epochs", type=int, default=0, help="passes over the data (default: 40; 10 with --data)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, help="images a step (default: 64; 128 with --data)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0,
        help="learning rate at the start (default: 0.003; convnet: 0.001)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.1,
        help="deviation of the noise on training images (default: 0.1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order and noise (default: 0)"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="out",
        help="for the picture and the checkpoint (default: out)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from where an interrupted run with this --out ended",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        help="keep compiled programs there: later starts are faster",
    )
    parser.add_argument(
        "--restore", metavar="FILE", help="load this checkpoint and test it, without training"
    )
    parser.add_argument(
        "--logits", metavar="FILE", help="with --restore: also write the logits there, as .npy"
    )
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    checkpoint, logits_file = args.pop("restore"), args.pop("logits")
    try:
        if checkpoint:
            restore(checkpoint, args["data"], logits_file)
        else:
            main(**args)
    except (ValueError, OSError, ArithmeticError, jaxnet.checkpoint.CheckpointError) as error:
        # The flag of this program, not the argument of the function that it calls.
        text = str(error).replace("download=True", "--download")
        raise SystemExit(f"digits.py: {text}") from None
