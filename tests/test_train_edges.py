"""Edges of training: weights of zero, the limit of the counter, foreign dtypes, wrong arguments,
NaN at the start.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import repeat, scan
from jaxnet.train import (
    NonFiniteError,
    TrainState,
    Weighted,
    early_stopping,
    evaluate,
    fit,
    time_budget,
    train_epoch,
    train_step,
    train_steps,
    write_csv,
    write_jsonl,
)

X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
DATA = (X, X[:, 0].copy())


def loss(params, batch):
    return (batch[0] @ params - batch[1]) ** 2


def start(params=None):
    return TrainState.create(jnp.zeros(3) if params is None else params, 0.1, jax.random.key(0))


def ran(data=DATA, *, begin=None, **options):
    options = {"batch_size": 8, "epochs": 1, "progress": False} | options
    return fit(train_step(loss, 0.1), begin or start(), data, **options)


# Weights that are all zero in a batch


def test_a_record_over_weights_of_zero_lacks_the_metrics_and_means_over_records_are_right():
    weights = np.ones(24, np.float32)
    weights[:16] = 0
    data = Weighted(DATA, weights)
    result = ran(
        data,
        order=None,
        record_every=1,
        evaluate=lambda state: {"t": 1.0},
        stop=early_stopping("min loss", 9),
    )
    assert ["loss" in record for record in result.history] == [False, False, True]
    means = [record["loss"] for record in result.history if "loss" in record]
    # Nothing moves the parameters from 0 before the last batch, so its loss is the mean square of
    # its targets.
    np.testing.assert_allclose(means, [np.mean(DATA[1][16:].astype(float) ** 2)], rtol=1e-6)
    np.testing.assert_allclose(result.evaluations[0]["loss"], means[0], rtol=1e-6)
    metrics = train_epoch(train_step(loss, 0.1), 8, order=None)(start(), data)[1]
    np.testing.assert_allclose(metrics["weight"], [0, 0, 8])
    assert np.isfinite(metrics["loss"]).all()


def test_a_history_with_gaps_is_saved_and_restored(tmp_path):
    weights = np.ones(24, np.float32)
    weights[:16] = 0
    options = {"order": None, "record_every": 1, "checkpoint": tmp_path / "run.safetensors"}
    first = ran(Weighted(DATA, weights), **options)
    assert ran(Weighted(DATA, weights), epochs=2, **options).history[:3] == first.history


# The counter of steps


def test_the_counter_of_steps_has_a_limit():
    near = start()._replace(step=jnp.int32(2**31 - 4))
    assert int(train_steps(train_step(loss, 0.1), 8, 3)(near, DATA)[0].step) == 2**31 - 1
    with pytest.raises(
        ValueError, match=r"less than 2\*\*31, got 2147483644 done \+ 4 = 2147483648"
    ):
        train_steps(train_step(loss, 0.1), 8, 4)(near, DATA)


# Byte orders and structured arrays


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_big_endian_arrays_are_converted(dtype, tmp_path):
    expected = ran().train_state.params
    foreign = tuple(part.astype(dtype) for part in DATA)
    np.testing.assert_array_equal(ran(foreign).train_state.params, expected)
    np.testing.assert_array_equal(
        train_epoch(train_step(loss, 0.1), 8)(start(), foreign)[0].params, expected
    )
    np.save(tmp_path / "x.npy", foreign[0])
    lazy = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(ran((lazy, foreign[1])).train_state.params, expected)
    value = evaluate(lambda params, batch: {"error": loss(params, batch)}, foreign)(start())[
        "error"
    ]
    np.testing.assert_allclose(value, np.mean(DATA[1].astype(float) ** 2), rtol=1e-6)
    batches = [tuple(part[i : i + 8] for part in foreign) for i in (0, 8, 16)]
    whole = ran(order=None).train_state.params
    np.testing.assert_array_equal(ran(batches, batch_size=None).train_state.params, whole)
    # A file of a run with the same numbers continues.
    ran(checkpoint=tmp_path / "run.safetensors")
    assert ran(foreign, epochs=2, checkpoint=tmp_path / "run.safetensors").history[-1]["epoch"] == 2


@pytest.mark.parametrize("dtype", [[("a", "f4"), ("b", "i4")], "V8"])
def test_structured_arrays_are_refused_by_name(dtype):
    data = {"x": np.zeros(24, dtype), "y": DATA[1]}
    for use in (
        lambda: ran(data),
        lambda: train_epoch(train_step(loss, 0.1), 8)(start(), data),
        lambda: evaluate(lambda params, batch: {}, data),
        lambda: ran([data], batch_size=None),
    ):
        with pytest.raises(TypeError, match="'x'"):
            use()


# Arguments of fit


@pytest.mark.parametrize("value", [-1, float("nan"), True, "60", None])
def test_save_seconds_is_a_number_of_seconds(value):
    with pytest.raises(ValueError, match="save_seconds must be a number of seconds"):
        ran(save_seconds=value)


@pytest.mark.parametrize("maker", [write_jsonl, write_csv])
def test_a_maker_of_callbacks_is_not_a_callback(maker):
    with pytest.raises(TypeError, match=rf"callbacks\[0\] is {maker.__name__} itself; call it"):
        ran(callbacks=[maker])


def test_a_maker_of_conditions_is_not_a_condition():
    with pytest.raises(TypeError, match="stop is time_budget itself; call it"):
        ran(stop=time_budget)


@pytest.mark.parametrize(
    "stop, error",
    [
        (lambda history: history[-1]["los"] < 1, KeyError),
        (lambda history: history.loss < 1, AttributeError),
        (lambda history: np.asarray([record["loss"] for record in history]) < 1, TypeError),
        (lambda history: jnp.ones(2) > 0, TypeError),
    ],
)
def test_a_condition_that_cannot_work_is_an_error_before_the_first_step(stop, error):
    seen = []
    with pytest.raises(error):
        ran(stop=stop, callbacks=[seen.append])
    assert not seen


def test_a_condition_may_use_the_values_of_evaluate_and_a_longer_history():
    result = ran(
        epochs=3,
        evaluate=lambda state: {"t": state.step},
        stop=lambda history: history[-1]["t"] >= 6 and history[-2]["t"] == 3,
    )
    assert result.train_state.step == 6 and result.stopped == "the condition held"


# NaN at the start


def test_nan_in_the_first_parameters_is_named():
    def of_dict(params, batch):
        return loss(params["w"], batch)

    begin = TrainState.create(
        {"w": jnp.asarray([0, np.nan, 0], jnp.float32)}, 0.1, jax.random.key(0)
    )
    with pytest.raises(NonFiniteError, match="'params/w': NaN before the first step"):
        fit(train_step(of_dict, 0.1), begin, DATA, batch_size=8, epochs=1, progress=False)


# Sizes


@pytest.mark.parametrize("unroll", [True, 0, 1.5])
def test_unroll_is_a_size(unroll):
    with pytest.raises(ValueError, match="repeat: unroll must be a positive int"):
        repeat(lambda x: x, 3, unroll=unroll)
    with pytest.raises(ValueError, match="scan: unroll must be a positive int"):
        scan(lambda carry, x: (carry, x), unroll=unroll)
    assert repeat(lambda x: x + 1, 3, unroll=np.int64(2)).apply({}, jnp.zeros(())) == 3  # pyright: ignore
