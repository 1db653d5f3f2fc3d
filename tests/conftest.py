"""Strict by default: what a user may do by accident is an error in every test."""

import getpass
import os
import pathlib
import signal
import sys
import tempfile

# Programs are compiled once for all tests, both processes and the next run: JAX tells them apart by
# version and options.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"jaxnet-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

# The processes that tests start need a third less time if they find the bytecode of the library.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts its background jobs with Ctrl-C ignored, which tests of signals would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For a GPU. The flags are a part of the keys of the compile cache, so all processes need the same:
# pytest, its workers, which inherit the variable, and what these start.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
if DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
jax.config.update("jax_num_cpu_devices", 4)  # before any device is used
# (4,) against (4, 1) is a bug, not a broadcast.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)  # a key consumed twice is a bug


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked `@pytest.mark.sample(n)`, n run by default. They are evenly
    spread over the list of the cases, and the others are marked slow.
    """
    cases = {}
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            cases.setdefault(item.function, []).append(item)
    for group in cases.values():
        (n,) = group[0].get_closest_marker("sample").args
        chosen = {i * len(group) // n for i in range(n)}
        for i, item in enumerate(group):
            if i not in chosen:
                item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    """Skip the tests marked `@pytest.mark.cpu_only("reason")` where JAX computes on a GPU or a
    TPU.
    """
    marker = item.get_closest_marker("cpu_only")
    if marker is not None and jax.default_backend() != "cpu":
        (reason,) = marker.args
        pytest.skip(f"for the CPU only: {reason}")


@pytest.fixture
def exact_products():
    """Products of float32 in float32 on a GPU, too, whose convolutions round their factors to TF32
    by default.
    """
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def real_data():
    """The folder with real data sets (MNIST and others); tests that need it skip where it is
    missing.
    """
    folder = pathlib.Path(
        os.environ.get("JAXNET_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
    )
    if not folder.is_dir():
        pytest.skip("no real data here: set JAXNET_DATA to a folder with mnist/ in it")
    return folder
