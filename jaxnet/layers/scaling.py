"""Frequencies of rotary positions for contexts longer than those of the training.

Each function returns a function of the frequencies [size / 2], for `rotary(base, scaling=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["linear", "llama3", "yarn"]


def linear(factor: float) -> Callable[[np.ndarray], Any]:
    """Divide all frequencies by a factor, as if the positions were closer together.

    Source: Chen et al., "Extending Context Window ... via Positional Interpolation", 2023,
    arXiv:2306.15595.

    Args:
      factor: the new length over the length of the training.

    Returns:
      A function of the frequencies [size / 2].

    Raises:
      ValueError: the factor is less than 1.
    """
    factor = _factor("linear", factor)
    return lambda frequencies: frequencies / factor


def llama3(
    factor: float = 8.0, *, low: float = 1.0, high: float = 4.0, length: int = 8192
) -> Callable[[np.ndarray], Any]:
    """Divide low frequencies by a factor, and keep high ones, as Llama 3.1 does.

    Frequencies with at least `high` turns over `length` tokens stay, those with at most `low` turns
    are divided, and those between are interpolated in the number of turns.

    Args:
      factor: the new length over the length of the training.
      low: a number of turns (`low_freq_factor`).
      high: a number of turns (`high_freq_factor`).
      length: the length of the training (`original_max_position_embeddings`).

    Returns:
      A function of the frequencies [size / 2].

    Raises:
      ValueError: the factor is less than 1, or `high` is not above `low`.
    """
    factor = _factor("llama3", factor)
    if not high > low:
        raise ValueError(f"llama3: high must be above low, got {low=} and {high=}")

    def scaled(frequencies):
        turns = length * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor

    return scaled


def yarn(
    factor: float,
    *,
    length: int,
    fast: float = 32.0,
    slow: float = 1.0,
    magnitude: float | None = None,
    truncate: bool = True,
) -> Callable[[np.ndarray], Any]:
    """Divide low frequencies by a factor, keep high ones, and enlarge cos and sin: YaRN.

    Features with at least `fast` turns over `length` tokens stay, those with at most `slow` turns
    are divided, and those between are interpolated in the index of the feature.

    Source: Peng et al., "YaRN", ICLR 2024, arXiv:2309.00071.

    Args:
      factor: the new length over the length of the training.
      length: the length of the training (`original_max_position_embeddings`).
      fast: a number of turns (`beta_fast`).
      slow: a number of turns (`beta_slow`).
      magnitude: the factor of cos and sin (`attention_factor`); 0.1 ln(factor) + 1 by default.
      truncate: whether the bounds of the interpolation are rounded to whole features.

    Returns:
      A function of the frequencies [size / 2], to (frequencies, magnitude).

    Raises:
      ValueError: the factor is less than 1, or `fast` is not above `slow`.
    """
    factor = _factor("yarn", factor)
    if not fast > slow > 0:
        raise ValueError(f"yarn: fast must be above slow, got {fast=} and {slow=}")

    def scaled(frequencies):
        if len(frequencies) < 2:
            raise ValueError("yarn: at least two pairs of features must be rotated, got 1")
        # The index of the feature, not a whole number, that turns so often over the length.
        step = -math.log(frequencies[1])
        first, last = (math.log(length / (2 * math.pi * turns)) / step for turns in (fast, slow))
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * len(frequencies) - 1)
        width = last - first if last != first else 0.001
        divided = np.clip((np.arange(len(frequencies)) - first) / width, 0, 1)
        new = frequencies / factor * divided + frequencies * (1 - divided)
        return new, 0.1 * math.log(factor) + 1 if magnitude is None else magnitude

    return scaled


def _factor(label: str, factor: Any) -> float:
    if not factor >= 1:
        raise ValueError(f"{label}: factor must be at least 1, got {factor!r}")
    return float(factor)
