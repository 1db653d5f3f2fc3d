"""Handwritten digits on one page, from the data to a prediction (one seed, CPU seconds):

python examples/mnist.py                                        98.1 % of 8x8 digits, 9 s
python examples/mnist.py --data FOLDER --download --epochs 5    98.9 % of MNIST's, 75 s
"""

import argparse

import jax
import optax

import jaxnet
from jaxnet import chain, conv, dense, flatten, max_pool
from jaxnet.data import digits, mnist
from jaxnet.train import TrainState, compile_cache, evaluate, fit, train_step


def main(folder=None, *, download=False, epochs=20, out="mnist.safetensors"):
    # Images [N, H, W, 1] in [0, 1] and labels [N], as NumPy arrays.
    data = mnist(folder, download=download) if folder else digits()

    # A network is a pair of pure functions. Its parameters are dicts of arrays, by layer.
    body = chain(conv(16, 3), jax.nn.relu, max_pool(2), conv(32, 3), jax.nn.relu, max_pool(2))
    net = chain(body, flatten(), hidden=dense(64), relu=jax.nn.relu, out=dense(10))
    params = net.init(jax.random.key(0), data.train.images)
    print(jaxnet.summary(net, data.train.images[:1]))

    # A loss or a metric may return one number per example; the mean is taken.
    def loss(params, batch):
        logits = net.apply(params, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    def test(params, batch):
        return {"accuracy": net.apply(params, batch.images).argmax(-1) == batch.labels}

    optimizer = optax.adam(1e-3)
    start = TrainState.create(params, optimizer, jax.random.key(1))
    step, evaluation = train_step(loss, optimizer), evaluate(test, data.test)
    run = fit(step, start, data.train, batch_size=64, epochs=epochs, evaluate=evaluation)
    accuracy = run.evaluations[-1]["accuracy"]
    print(f"test accuracy {accuracy:.1%}")

    # A checkpoint is one safetensors file; `jaxnet inspect FILE` shows its contents.
    jaxnet.save(out, run.train_state.params, metadata={"accuracy": accuracy})
    restored = jaxnet.load(out, like=params)
    predicted = jax.jit(net.apply)(restored, data.test.images[:10]).argmax(-1)
    print(f"predicted {predicted}\nlabels    {data.test.labels[:10]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, save, reload and ask a convnet.")
    parser.add_argument("--data", dest="folder", help="folder with MNIST (default: 8x8 digits)")
    parser.add_argument("--download", action="store_true", help="fetch files that it lacks")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
    parser.add_argument("--out", default="mnist.safetensors", help="file for the checkpoint")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="keep compiled programs there")
    args = vars(parser.parse_args())
    if cache_dir := args.pop("cache_dir"):
        compile_cache(cache_dir)
    main(**args)
