"""Stacks: the data of some steps, as the inputs of a compiled call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Stack", "plan_size", "stack_size"]

# Bytes of batches that are copied to the device together.
STACK = 32 << 20
# The most rows in the plan of a compiled call: 2 MB.
PLAN = 1 << 19


class Stack(NamedTuple):
    """The data of some steps, and their position in the data.

    Attributes:
      inputs: the inputs of the compiled call after the train state.
      size: the most steps that the inputs can hold.
      n: the steps in the inputs.
      samples: examples in the n steps.
      before: the position before the first step, for a checkpoint.
      after: the position after the last step, if `end`.
      end: whether a pass over the data ends with the stack.
    """

    inputs: tuple
    size: int
    n: int
    samples: int
    before: dict[str, Any]
    after: dict[str, Any]
    end: bool


def plan_size(batch_size: int) -> int:
    """The most steps in the plan of a compiled call."""
    return int(np.clip(PLAN // batch_size, 16, 1 << 17))


def stack_size(batch_bytes: int) -> int:
    """The most batches in a stack."""
    return int(np.clip(STACK // max(batch_bytes, 1), 1, 64))
