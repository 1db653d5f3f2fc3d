"""RWKV-7: the published weights against the logits stored beside them, and the equations against
NumPy.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "rwkv7.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_rwkv7", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(real_data):
    path = real_data / "pretrained" / "rwkv7"
    if not path.is_dir():
        pytest.skip("the weights of RWKV-7 are not here")
    return path


@pytest.mark.parametrize("form", ["in order", "in parallel", "byte by byte"])
def test_the_logits_are_those_stored_with_the_weights(example, folder, form):
    """The file has the logits after the bytes of '"in', from the tests of rwkv.cpp."""
    expected = np.fromfile(folder / "expected-logits-7v0-834K.bin", "<f4")
    net, params = example.read(folder, parallel=form == "in parallel")
    ids = jnp.asarray([list(b'"in')])
    if form == "byte by byte":
        apply = jax.jit(net.apply)
        logits, carry = apply(params, ids[:, :1])
        for i in (1, 2):
            logits, carry = apply(params, ids[:, i : i + 1], carry)
    else:
        logits, _ = jax.jit(net.apply)(params, ids)
    error = np.abs(np.asarray(logits[0, -1]) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


def test_the_example_goes_on_with_the_text(example, folder, capsys):
    text = example.main(folder, length=5)
    assert text.startswith('"in') and len(text.encode()) == 8
    assert capsys.readouterr().out == f"{text}\n"
    assert example.main(folder, length=5, parallel=True) == text
