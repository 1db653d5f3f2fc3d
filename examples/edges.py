"""A convolution that learns to see edges: all nine weights of its kernel, by gradient.

    python examples/edges.py      (Sobel's kernel to 3e-6, digits to 97.8 %, 10 s on two cores)

First a 3x3 kernel is given images and their Sobel responses, and gradient descent finds the Sobel
operator from a random start. Then nobody names a feature: a small convnet learns to read digits,
and the kernels of its first layer become what it needs. Both are drawn in one picture, before and
after.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import Layer, chain, conv, dense, flatten, max_pool, sgd, tree
from jaxnet.data import Split, digits
from jaxnet.train import TrainState, compile_cache, evaluate, fit, train_step

# The kernel for vertical edges (Sobel & Feldman 1968).
SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)


def kernel_error(kernel) -> float:
    return float(np.abs(np.asarray(kernel)[:, :, 0, 0] - SOBEL).max())


def learn_sobel(images, key, *, steps: int, lr: float = 0.4):
    """Fit y = x * k to the Sobel responses by full-batch gradient descent; returns the kernel
    before and after.
    """
    net = conv(1, 3, padding="VALID", bias=False, kernel_init=jax.nn.initializers.normal(1.0))
    before = net.init(key, images)
    targets = net.apply({"kernel": jnp.asarray(SOBEL)[:, :, None, None]}, images)

    def loss(params):
        return jnp.mean(jnp.square(net.apply(params, images) - targets))

    train = jax.jit(
        lambda params: jax.lax.fori_loop(
            0, steps, lambda _, p: sgd(p, jax.grad(loss)(p), lr), params
        )
    )
    return before["kernel"], train(before)["kernel"]


def convnet() -> Layer:
    return chain(
        edges=conv(8, 3),
        relu1=jax.nn.relu,
        pool1=max_pool(2),
        shapes=conv(32, 3),
        relu2=jax.nn.relu,
        pool2=max_pool(2),
        flatten=flatten(),
        out=dense(10),
    )


def learn_digits(data, key, *, epochs: int):
    """Train the convnet; returns its params before and after, and the test accuracy."""
    net = convnet()
    init_key, key = jax.random.split(key)
    before = net.init(init_key, data.train.images[:1])

    def loss(params, batch: Split):
        logits = net.apply(params, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def test(params, batch: Split):
        return {"test_accuracy": net.apply(params, batch.images).argmax(-1) == batch.labels}

    optimizer = optax.adam(2e-3)
    start = TrainState.create(before, optimizer, key)
    run = fit(
        train_step(loss, optimizer), start, data.train, epochs=epochs, batch_size=64, progress=False
    )
    if run.stopped:
        raise SystemExit(run.exit_code)
    return (
        before,
        run.train_state.params,
        float(evaluate(test, data.test)(run.train_state)["test_accuracy"]),
    )


def draw(path, sobel, kernels, image, label: int) -> None:
    """Kernels as pictures: Sobel's and the first layer's, before and after, and the response of
    each to a digit.

    Weights share one scale per group (Sobel's kernel; the first layer's kernels), responses one
    scale per picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    columns = [("Sobel", *sobel)] + [
        (f"kernel {i}", b, a) for i, (b, a) in enumerate(zip(*kernels, strict=True))
    ]
    figure = Figure(figsize=(1.2 * (len(columns) + 1) + 2.4, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(columns) + 1)
    limits = [float(np.abs(np.asarray(sobel)).max())] + [
        float(np.abs(np.asarray(kernels)).max())
    ] * len(kernels[0])
    for column, ((name, before, after), limit) in enumerate(
        zip(columns, limits, strict=True), start=1
    ):
        response = _convolve(image, after)
        scales = [limit, limit, np.abs(response).max()]
        for row, (picture, scale) in enumerate(zip([before, after, response], scales, strict=True)):
            axes[row, column].imshow(picture, cmap="RdBu_r", vmin=-scale, vmax=scale)
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(name, fontsize=9)
    for row, name in enumerate(["before", "after", "response"]):
        axes[row, 1].set_ylabel(name)
    for row in range(3):
        axes[row, 0].set_axis_off()
    axes[2, 0].imshow(image, cmap="gray_r")
    axes[2, 0].set_title(f"input: test image 0,\na handwritten {label}", fontsize=8)
    shown = [
        (f"weights of\n{name}, ±{limit:.2g}", limit)
        for name, limit in (("Sobel", limits[0]), ("layer 1", limits[1]))
    ]
    shown.append(("response, relative to\nits largest", 1.0))
    for row, (text, limit) in enumerate(shown):
        bar = figure.colorbar(
            ScalarMappable(Normalize(-limit, limit), "RdBu_r"),
            ax=axes[row, :],
            fraction=0.02,
            pad=0.01,
        )
        bar.set_label(text, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        "Kernels learned by gradient: from Sobel's responses (left), and from labels of digits "
        "(right). Red is positive, blue negative.",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _convolve(image, kernel):
    layer = conv(1, 3, padding="VALID", bias=False)
    params = {"kernel": jnp.asarray(kernel)[:, :, None, None]}
    return np.asarray(layer.apply(params, jnp.asarray(image)[..., None]))[..., 0]


def main(
    steps: int = 1000, epochs: int = 20, seed: int = 0, out: str = "out"
) -> tuple[float, float]:
    """Returns the largest error of the learned Sobel kernel, and the test accuracy of the
    convnet.
    """
    data = digits()
    sobel_key, digits_key = jax.random.split(jax.random.key(seed))

    before, after = learn_sobel(jnp.asarray(data.train.images), sobel_key, steps=steps)
    error = kernel_error(after)
    print("A 3x3 kernel, from a random start to the Sobel operator, nine weights at once:")
    for old, new, target in zip(before[:, :, 0, 0], after[:, :, 0, 0], SOBEL, strict=True):
        print(
            "  ",
            *(f"{x:6.2f}" for x in old),
            "   ->  ",
            *(f"{x:8.4f}" for x in new),
            "   Sobel",
            *(f"{x:3.0f}" for x in target),
        )
    print(f"largest error {kernel_error(before):.2f} before, {error:.1e} after {steps:,} steps\n")

    first, last, accuracy = learn_digits(data, digits_key, epochs=epochs)
    moved = tree.norm(jax.tree.map(jnp.subtract, last["edges"], first["edges"])) / tree.norm(
        first["edges"]
    )
    print(
        f"A convnet of {tree.count(last):,} parameters reads the digits: test accuracy "
        f"{accuracy:.2%}."
    )
    print(f"Its first layer moved by {moved:.0%} of the norm that it started with.")

    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    picture = pathlib.Path(out) / "edges.png"
    kernels = [
        np.asarray(params["edges"]["kernel"])[:, :, 0, :].transpose(2, 0, 1)
        for params in (first, last)
    ]
    pair = [np.asarray(kernel)[:, :, 0, 0] for kernel in (before, after)]
    draw(picture, pair, kernels, data.test.images[0, :, :, 0], int(data.test.labels[0]))
    print(f"kernels before and after in {picture}")
    return error, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="of gradient descent to the Sobel operator (default: 1000)",
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="of the convnet on the digits (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random start (default: 0)")
    parser.add_argument(
        "--out", metavar="FOLDER", default="out", help="for the picture (default: out)"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        help="keep compiled programs there: later starts are faster",
    )
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    main(**args)
