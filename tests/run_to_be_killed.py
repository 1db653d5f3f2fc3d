"""A training run for tests that kill it: it goes on from its checkpoint, and ends with a file of
everything that it computed.

python tests/run_to_be_killed.py FOLDER STEPS
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnet
from jaxnet import batch_norm, chain, dense, dropout
from jaxnet.train import TrainState, fit, train_step, write_jsonl


def main(folder: pathlib.Path, steps: int) -> int:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8)).astype(np.float32)
    data = x, np.sin(x.sum(1))
    net = chain(dense(16), batch_norm(), jax.nn.relu, dropout(0.5), dense(1))
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.05, steps))

    def loss(params, batch, state, key):
        out, state = net.apply(params, batch[0], state=state, key=key, train=True)
        return jnp.square(out[:, 0] - batch[1]), state

    start = TrainState.create(
        net.init(jax.random.key(0), x), optimizer, jax.random.key(1), state=net.init_state(x)
    )
    result = fit(
        train_step(loss, optimizer),
        start,
        data,
        batch_size=8,
        steps=steps,
        drop_last=False,
        record_every=20,
        evaluate=lambda state: {"norm": optax.tree.norm(state.params)},
        evaluate_every=20,
        best_rule="min norm",
        callbacks=[
            write_jsonl(folder / "history.jsonl"),
            lambda record: print(record["step"], flush=True),
        ],
        checkpoint=folder / "run.safetensors",
        save_seconds=0.0,
        progress=False,
    )
    if result.stopped is None:
        kept = ("step", "epoch", "loss", "norm")
        history = {name: np.array([record[name] for record in result.history]) for name in kept}
        jaxnet.save(
            folder / "end.safetensors",
            {"train_state": result.train_state, "best": result.best, "history": history},
        )
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
