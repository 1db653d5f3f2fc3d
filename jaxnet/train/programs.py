"""The compiled programs of a run, one per kind of batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.train.chunk import chunk_of
from jaxnet.train.feed import Feed
from jaxnet.train.identity import program_digest
from jaxnet.train.mistakes import maybe_takes_params, takes_params
from jaxnet.train.state import TrainState
from jaxnet.train.step import Step

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

    Args:
      step: (train_state, batch) -> (train_state, metrics).
      feed: plans the data of a call.
      check_finite: as in `chunk_of`.
      digests: whether to compute the digest of the step.

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
        self._programs: dict[Any, tuple[Callable[..., Any], dict[str, str]]] = {}
        self._spec: dict[str, str] = {}

    def get(self, size: int, inputs: tuple) -> Callable[..., Any] | None:
        """The program for inputs of this kind; None if it has not been compiled yet."""
        found = self._programs.get(_kind(size, inputs))
        if found is None:
            return None
        program, self._spec = found
        return program

    def trace(self, size: int, inputs: tuple, train_state: TrainState, good: jax.Array) -> Any:
        """Trace the loop over the step. This raises errors of the step before anything runs."""
        chunk = chunk_of(self.step, size, self.feed.plan, check_finite=self.check_finite)
        shardings = _shardings(train_state), None, None
        jitted = jax.jit(chunk, donate_argnums=0, out_shardings=shardings)
        try:
            traced = jitted.trace(train_state, good, jnp.int32(0), jnp.int32(0), *inputs)
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(self.step, Step):
                raise
            if maybe_takes_params(error):
                error.add_note(
                    "fit: step receives the train state; train_step(loss, optimizer) makes a step "
                    "of a loss (params, batch)"
                )
            if takes_params(error):
                raise TypeError(
                    "fit: step receives the train state, and this one takes it for parameters: "
                    "train_step(loss, optimizer) makes a step of a loss (params, batch)"
                ) from None
            raise
        self.metrics = tuple(traced.out_info[2])
        if self.digests and self.digest is None:
            self.digest = program_digest(traced.jaxpr)
        return traced

    def compile(
        self, size: int, inputs: tuple, traced: Any, seconds: float
    ) -> tuple[Callable[..., Any], str]:
        """Compile a traced program.

        Args:
          size: the most steps of a call.
          inputs: the inputs of a stack.
          traced: the result of `trace`.
          seconds: the time that tracing took.

        Returns:
          The program, and a line to print.
        """
        start, spec = time.perf_counter(), _spec_of(inputs)
        program = traced.lower().compile()
        self._programs[_kind(size, inputs)] = program, spec
        seconds, why = seconds + time.perf_counter() - start, ""
        if self.compiled:
            changed = [
                f"'{path}' from {self._spec.get(path)} to {now}"
                for path, now in spec.items()
                if self._spec.get(path) != now
            ]
            why = f": the batch changed, {', '.join(changed[:3]) or 'in structure'}"
        self._spec = spec
        self.compiled.append(f"compiled in {seconds:.1f} s{why}")
        return program, self.compiled[-1]


def _kind(size: int, inputs: tuple) -> Any:
    """The kind of batches: size, structure, shapes and dtypes. Each kind needs a separate
    program.
    """
    leaves, structure = jax.tree.flatten(inputs)
    return (size, structure, *[(leaf.shape, leaf.dtype) for leaf in leaves])


def _spec_of(inputs: tuple) -> dict[str, str]:
    """The shape and dtype of each part of a batch, by path, from inputs [steps, B, ...]."""
    leaves = tree.flatten(inputs).items()
    return {path: f"{leaf.dtype}{list(leaf.shape[1:])}" for path, leaf in leaves}


def _shardings(train_state: TrainState) -> Any:
    """The shardings of a train state on several devices, which the program must keep; None for a
    single device.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    several = any(len(sharding.device_set) > 1 for sharding in jax.tree.leaves(shardings))
    return shardings if several else None
