"""An ensemble: 256 networks read handwritten digits, each with its own seed and learning rate,
trained as one compiled call.

    python examples/ensemble.py   64-64-10, Adam: 7 to 16 s on two busy cores, twice with compiling

                                    accuracy        NLL, nats            ECE
    median member                 93.0 ± 1.6 %   0.449 ± 0.168    5.6 ± 0.9 %
    median of the best quarter    96.9 ± 0.8 %   0.121 ± 0.056    2.1 ± 0.3 %
    best member                   97.6 ± 0.3 %   0.111 ± 0.051    1.9 ± 0.2 %
    mean of all                   97.7 ± 0.6 %   0.478 ± 0.074   33.4 ± 3.8 %
    mean of the best quarter      97.4 ± 0.9 %   0.100 ± 0.042    1.8 ± 0.8 %

(on 359 test images; mean and deviation over 5 seeds, each with a split of its own:
`python -m pytest -m slow tests/test_examples.py -k gains -s` prints them)

What does an ensemble gain over one network, and does it mind bad members? The learning rates are
drawn log-uniformly from 1e-5 to 1, so that some members learn nothing; the best are those with the
least loss on a fifth of the training images, kept out of training. The mean of all forgives the bad
ones in accuracy, but not in confidence: it is far too modest. Without them the mean is likelier
than its median member on each of the 5 splits (NLL); in accuracy 359 images cannot tell it from the
best member. Width and epochs were chosen on the images kept out, too; the test images choose
nothing.

Sources: Lakshminarayanan, Pritzel & Blundell, "Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles", NIPS 2017 (the mean of the members' probabilities); Guo, Pleiss,
Sun & Weinberger, "On Calibration of Modern Neural Networks", ICML 2017 (expected calibration
error).
"""

import argparse
import pathlib
import time

import jax
import numpy as np
import optax

import jaxnet
from jaxnet import Layer, chain, dense, flatten
from jaxnet.data import Split, digits
from jaxnet.train import TrainState, compile_cache, many, train_step, train_steps


def network(width: int) -> Layer:
    return chain(flatten=flatten(), hidden=dense(width), relu=jax.nn.relu, out=dense(10))


def trainer(net: Layer, data: Split, *, epochs: int, batch_size: int):
    """A whole training as a function of what differs between members, (key, lr) -> params."""
    steps = epochs * (len(data.labels) // batch_size)

    def loss(params, batch):
        logits = net.apply(params, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def train(key, lr):
        init_key, run_key = jax.random.split(key)
        optimizer = optax.adam(lr)
        start = TrainState.create(net.init(init_key, data.images), optimizer, run_key)
        end, _ = train_steps(train_step(loss, optimizer), batch_size, steps)(start, data)
        return end.params

    return train


def held_out(data: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """The data without a random part, and that part."""
    order = np.random.default_rng(seed).permutation(len(data.labels))
    rest, part = np.split(order, [round(len(order) * (1 - fraction))])
    return Split(data.images[rest], data.labels[rest]), Split(data.images[part], data.labels[part])


def accuracy(probabilities, labels):
    """The share of images whose most probable digit is the right one.   [..., N, 10], [N] ->
    [...]
    """
    return np.mean(probabilities.argmax(-1) == labels, axis=-1)


def negative_log_likelihood(probabilities, labels):
    """-1/N sum of log p(label), in nats.   [..., N, 10], [N] -> [...]"""
    right = np.take_along_axis(
        probabilities, np.broadcast_to(labels[:, None], (*probabilities.shape[:-1], 1)), -1
    )
    return -np.log(np.maximum(right[..., 0], np.finfo(np.float32).tiny)).mean(-1)


def calibration_error(probabilities, labels, bins: int = 15):
    """Expected calibration error, the sum over bins B of |B|/N |accuracy(B) - confidence(B)|.

    [..., N, 10], [N] -> [...]

    The confidence is the largest probability, and bin b holds the images with confidence in
    ((b-1)/bins, b/bins].
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    place = np.ceil(confidence * bins) - 1
    gaps = [np.abs(((right - confidence) * (place == b)).sum(-1)) for b in range(bins)]
    return np.sum(gaps, axis=0) / len(labels)


MEASURES = {"accuracy": accuracy, "NLL": negative_log_likelihood, "ECE": calibration_error}


def sizes(members: int) -> list[int]:
    return [2**i for i in range(members.bit_length())]


def by_size(measure, probabilities, labels):
    """The mean of a measure over disjoint ensembles of 1, 2, 4, ... members."""
    values = []
    for size in sizes(len(probabilities)):
        groups = probabilities[: len(probabilities) // size * size]
        groups = groups.reshape(-1, size, *probabilities.shape[1:]).mean(1)
        values.append(measure(groups, labels).mean())
    return values


def draw(path, rates, test_accuracy, curves, whole) -> None:
    """Accuracy against the learning rate, and what the size of the ensemble does to accuracy and
    likelihood.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    left.scatter(rates, 100 * test_accuracy, s=12, alpha=0.6, label="one member each")
    left.axhline(100 * whole, color="C1", label="the mean of all")
    left.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="test accuracy, %",
        title="Members by learning rate",
    )
    for name, curve in curves.items():
        n = sizes(2 ** (len(curve["accuracy"]) - 1))
        middle.plot(n, 100 * np.array(curve["accuracy"]), marker="o", label=name)
        right.plot(n, curve["NLL"], marker="o", label=name)
    middle.set(xscale="log", xlabel="members", ylabel="test accuracy, %", title="Accuracy by size")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="members",
        ylabel="nats",
        title="Negative log-likelihood by size",
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(n, [str(size) for size in n])
    figure.savefig(path, dpi=150)


def main(
    members: int = 256,
    epochs: int = 30,
    batch_size: int = 32,
    width: int = 64,
    seed: int = 0,
    out: str = "out",
) -> dict[str, dict[str, float]]:
    """Train, compare on the test images, draw, save; returns the measures of each row of the
    table.
    """
    if members < 4:
        raise ValueError(
            f"members must be at least 4, for a quarter of them to be one, got {members}"
        )
    if epochs < 1 or width < 1:
        raise ValueError(f"epochs and width must be at least 1, got {epochs} and {width}")
    data = digits(seed=seed)
    training, validation = held_out(data.train, 0.2, seed)
    net = network(width)
    rates_key, key = jax.random.split(jax.random.key(seed))
    rates = 10 ** jax.random.uniform(rates_key, (members,), minval=-5, maxval=0)
    keys = jax.random.split(key, members)

    train = jax.jit(many(trainer(net, training, epochs=epochs, batch_size=batch_size)))
    clock = time.perf_counter()
    train = train.lower(keys, rates).compile()
    compiled = time.perf_counter()
    params = jax.block_until_ready(train(keys, rates))
    seconds = time.perf_counter() - compiled
    print(
        f"{members} networks 64-{width}-10, {epochs} epochs of {len(training.labels):,} images: "
        f"{seconds:.1f} s, {members / seconds:.1f} members a second (and {compiled - clock:.1f} "
        "s to compile)"
    )

    predict = jax.jit(
        jax.vmap(lambda params, images: jax.nn.softmax(net.apply(params, images)), (0, None))
    )
    valid, test = (
        np.asarray(predict(params, part.images), np.float64) for part in (validation, data.test)
    )
    best_first = np.argsort(negative_log_likelihood(valid, validation.labels))
    labels, rates = data.test.labels, np.asarray(rates)

    alone = {name: measure(test, labels) for name, measure in MEASURES.items()}
    quarter = best_first[: members // 4]
    table = {}
    for name, rows in {"median member": best_first, "median of the best quarter": quarter}.items():
        table[name] = {measure: float(np.median(alone[measure][rows])) for measure in MEASURES}
    for name, rows in {
        "best member": best_first[:1],
        "mean of all": best_first,
        "mean of the best quarter": quarter,
    }.items():
        mean = test[rows].mean(0)
        table[name] = {measure: float(f(mean, labels)) for measure, f in MEASURES.items()}
    print(f"\n{'on ' + str(len(labels)) + ' test images':28} accuracy  NLL, nats     ECE")
    for name, row in table.items():
        print(f"{name:28} {row['accuracy']:8.2%} {row['NLL']:10.3f} {row['ECE']:7.2%}")

    curves = {
        "all, at random": {name: by_size(MEASURES[name], test, labels) for name in MEASURES},
        "the best in validation": {
            name: [
                MEASURES[name](test[best_first[:size]].mean(0), labels) for size in sizes(members)
            ]
            for name in MEASURES
        },
    }
    print("\nmembers" + "".join(f"{size:>9}" for size in sizes(members)))
    for name, curve in curves.items():
        print(
            f"{name}\n"
            + "\n".join(f"  {m:9}" + "".join(f"{x:9.3f}" for x in curve[m]) for m in MEASURES)
        )

    print("\nlearning rate     members   median accuracy   worst")
    for low in range(-5, 0):
        group = (rates >= 10.0**low) & (rates < 10.0 ** (low + 1))
        if group.any():
            values = alone["accuracy"][group]
            print(
                f"1e{low} to 1e{low + 1:<8} {group.sum():9} {np.median(values):17.2%} "
                f"{values.min():7.2%}"
            )

    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture, file = folder / "ensemble.png", folder / "ensemble.safetensors"
    draw(picture, rates, alone["accuracy"], curves, table["mean of all"]["accuracy"])
    jaxnet.save(file, {"params": params, "rates": rates})
    print(f"\npicture in {picture}, the parameters of all members, stacked, in {file}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--members", type=int, default=256, help="networks to train at once (default: 256)"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, help="passes over the training images (default: 30)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default: 32)")
    parser.add_argument("--width", type=int, default=64, help="hidden units (default: 64)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, rates, order and split (default: 0)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="out", help="for picture and checkpoint (default: out)"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        help="keep compiled programs there: later starts are faster",
    )
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    try:
        main(**args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ensemble.py: {error}") from None
