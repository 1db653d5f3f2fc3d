"""The compiled programs of a run, one per kind of batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.train.feed import Feed
from jaxnet.train.identity import program_digest
from jaxnet.train.loop import chunk_of
from jaxnet.train.step import TrainState

__all__ = ["Programs", "ordinary"]


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Switch off JAX's debugging options for the loop itself.

    `fit` checks for NaN at the end of each call and reports where it began. A loop that is not
    compiled would be another program. The transfers between host and device are few and intended.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
    ):
        yield


class Programs:
    """Compile a step for each kind of batch.

    Attributes:
      compiled: one line per compilation.
      metrics: the names of the metrics that the step returns; None until it has been traced.
      digest: the digest of the traced step, if `digests` is True.
      expected: the digest in the checkpoint from which the run resumes, if there is one.
    """

    def __init__(self, step: Callable[..., Any], feed: Feed, check_finite: bool, digests: bool):
        self.step, self.feed, self.check_finite, self.digests = step, feed, check_finite, digests
        self.compiled: list[str] = []
        self.metrics: tuple[str, ...] | None = None
        self.digest: str | None = None
        self.expected: str | None = None
        self._programs: dict[Any, tuple[Callable[..., Any], Mapping[str, str]]] = {}
        self._spec: Mapping[str, str] = {}

    def get(self, size: int, inputs: tuple) -> Callable[..., Any] | None:
        """The program for inputs of this kind; None if it has not been compiled yet."""
        found = self._programs.get(_kind(size, inputs))
        if found is None:
            return None
        program, self._spec = found
        return program

    def trace(self, size: int, inputs: tuple, train_state: TrainState, good: Any) -> Any:
        """Trace the loop over the step. This raises errors of the step before anything runs."""
        chunk = chunk_of(self.step, size, self.feed.batches(size), check_finite=self.check_finite)
        jitted = jax.jit(
            chunk, donate_argnums=0, out_shardings=(_shardings(train_state), None, None)
        )
        traced = jitted.trace(train_state, good, jnp.int32(0), jnp.int32(0), *inputs)
        self.metrics = tuple(traced.out_info[2])
        if self.digests and self.digest is None:
            self.digest = program_digest(traced.jaxpr)
        return traced

    def compile(self, size: int, inputs: tuple, traced: Any, seconds: float) -> str:
        """Compile a traced program and return the line to print. `seconds` is the time that tracing
        took.
        """
        start, spec = time.perf_counter(), self.feed.spec(inputs)
        self._programs[_kind(size, inputs)] = traced.lower().compile(), spec
        seconds, why = seconds + time.perf_counter() - start, ""
        if self.compiled:
            changed = [
                f"'{p}' from {self._spec.get(p)} to {x}"
                for p, x in spec.items()
                if self._spec.get(p) != x
            ]
            why = f": the batch changed, {', '.join(changed[:3]) or 'in structure'}"
        self._spec = spec
        self.compiled.append(f"compiled in {seconds:.1f} s{why}")
        return self.compiled[-1]


def _kind(size: int, inputs: tuple) -> Any:
    """The kind of batches: size, structure, shapes and dtypes. Each kind needs its own program."""
    leaves, structure = jax.tree.flatten(inputs)
    return (size, structure, *[(leaf.shape, leaf.dtype) for leaf in leaves])


def _shardings(train_state: TrainState) -> Any:
    """The shardings of a train state on several devices, which the program must keep; None for a
    single device.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    several = any(len(sharding.device_set) > 1 for sharding in jax.tree.leaves(shardings))
    return shardings if several else None
