"""Where batches come from: arrays in memory, arrays that are read where they are needed, iterables of batches."""

from __future__ import annotations

import base64
import contextlib
import importlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.batch import Uneven, check_weights
from jaxnet.train.loop import planned

__all__ = ["Stack", "is_lazy", "on_device", "stacks_of_iterable", "stacks_of_rows"]

STACK = 32 << 20  # bytes of batches that go to the device at once
PLAN = 1 << 19  # rows that there is room for in a compiled call: 2 MB


class Stack(NamedTuple):
    """Some steps' work: inputs of a compiled call, and where in the data they stand.

    Attributes:
      inputs: of the compiled call, beside the train state.
      size: steps that the inputs have room for; n: steps that are in it.
      samples: examples in the n steps.
      before: the position in front of its first step, to be kept in a checkpoint; after: behind its last, if `end`.
      end: whether a pass over the data ends with it.
    """

    inputs: tuple
    size: int
    n: int
    samples: int
    before: dict[str, Any]
    after: dict[str, Any]
    end: bool


def is_lazy(leaf: Any) -> bool:
    """Tell whether an array is read row by row instead of being put on the device.

    These are memory maps, and whatever has `shape`, `dtype` and `array[rows]` but no way to hand over its numbers as a
    whole: datasets of h5py and zarr, `jaxnet.data.Windows`. Series, frames and tensors of other libraries are in memory:
    they are copied by position, since their `[]` may look rows up by a label.
    """
    if isinstance(leaf, np.memmap):
        return True
    if isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | bool | list):
        return False
    in_memory = any(hasattr(leaf, name) for name in ("to_numpy", "numpy", "__dlpack__", "toarray"))
    return not in_memory and all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))


def on_device(data: Any) -> Any:
    """Put a tree on the device, whatever library its arrays are from, by position.

    Raises:
      ValueError: an integer that JAX's 32 bits cannot hold, or weights that have no meaning.
      TypeError: something that is not an array of numbers.
    """
    data = tree.map_with_path(_fitting, data)
    check_weights(data)
    return jax.tree.map(jnp.asarray, data)


def plan_size(batch_size: int) -> int:
    """Steps that there is room for in a compiled call."""
    return int(np.clip(PLAN // batch_size, 16, 1 << 17))


def stacks_of_rows(
    data: Any, n: int, key: jax.Array, step: int, next_cut: Callable[[int], int], total: int, **batching
):
    """Batches of arrays that are too large for memory, by random access: the same batches as `train_steps` makes.

    Args: next_cut: as in `stacks_of_iterable`; total: the last step; batching: as in `planned`.
    """
    size = _stack_size(sum(_row_bytes(leaf) for leaf in jax.tree.leaves(data)) * batching["batch_size"])

    class At(NamedTuple):
        key: jax.Array
        step: jax.Array

    plan_from = jax.jit(lambda key, step: planned(At(key, step), n, size, **batching))  # pyright: ignore[reportArgumentType]
    while step < total:
        count = min(size, next_cut(step) - step)
        plan = jax.tree.map(np.asarray, plan_from(key, jnp.int32(step)))
        if plan is None:
            plan = np.broadcast_to(np.arange(n, dtype=np.int32), (size, n))
        rows = plan.batch if isinstance(plan, Uneven) else plan
        if rows[:count].min() < 0 or rows[:count].max() >= n:
            raise ValueError(
                f"order: rows must be within 0 .. {n - 1}, got {rows[:count].min()} .. {rows[:count].max()}"
            )

        def read(path, leaf, rows=rows[:count], count=count):
            values = _fitting(path, _rows_of(path, leaf, rows.reshape(-1)))
            out = np.zeros((size, *rows.shape[1:], *values.shape[1:]), values.dtype)
            out[:count] = values.reshape(*rows.shape, *values.shape[1:])
            return out

        batch, samples = tree.map_with_path(read, data), count * batching["batch_size"]
        if isinstance(plan, Uneven):
            batch = Uneven(batch, plan.last, plan.rest)
            samples -= int(plan.last[:count].sum()) * (batching["batch_size"] - plan.rest)
        yield Stack((jax.device_put(batch),), size, count, samples, {}, {}, False)
        step += count


def _rows_of(path: str, leaf: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array that is read lazily, in any order and with repetitions, read in increasing order."""
    wanted, inverse = np.unique(rows, return_inverse=True)
    values = leaf.oindex[wanted] if hasattr(leaf, "oindex") else leaf[wanted]
    if isinstance(values, list | tuple) or not hasattr(values, "shape"):
        values = np.asarray(values)
    if tuple(values.shape) != (len(wanted), *leaf.shape[1:]):
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, gives {list(values.shape)} for {len(wanted)} rows, not "
            f"{[len(wanted), *leaf.shape[1:]]}; pass an array whose `array[rows]` gives these rows, or np.asarray of it"
        )
    return np.asarray(values)[inverse]


def stacks_of_iterable(
    data: Any, position: dict[str, Any], next_cut: Callable[[int], int], step: int
) -> Iterator[Stack]:
    """Batches of an iterable, as many of one kind as fit, put on the device together; passes follow each other.

    Args:
      data: an iterable of batches, or a function from the number of the pass to one. What can be iterated only once ends
        with its first pass.
      position: {} or a position that a `Stack` gave: where to go on. Where the iterator offers `get_state` and `set_state`
        (Grain), or the iterable `state_dict` and `load_state_dict` (torchdata), the state is restored, else the
        batches that have been used are drawn again and passed over.
      next_cut: the first step after this one at which a stack has to end.
    Raises: ValueError for a pass without batches; whatever the iterable raises.
    """
    passes, since, anchor = position.get("passes", 0), position.get("skip", 0), position.get("state")
    reach = 1
    while True:
        batches = _begun(data, passes, anchor, since)
        held, before, kind, size, room = [], {}, None, 0, 0
        after: dict[str, Any] = {}
        while True:
            if len(held) == room and (state := _state_of(data, batches)) is not None:
                anchor, since = state, 0  # from here on, positions are counted from this state
            try:
                batch = next(batches, _END)
            except Exception:
                if held:  # what came before is not lost
                    yield _stacked(held, size, before, {})
                raise
            if batch is _END:  # what draws at random may draw otherwise in the next pass
                state = _state_of(data, None)
                after = {"passes": passes + 1, "skip": 0, "state": state}
            if held and (batch is _END or len(held) == room or _kind(batch) != kind):
                yield _stacked(held, size, before, after)
                step, held = step + len(held), []
            if batch is _END:
                break
            if not held:
                before = {"passes": passes, "skip": since, "state": anchor}
                kind, size = _kind(batch), _stack_size(_bytes(batch))
                room = min(size, reach, next_cut(step) - step)
                reach *= 2  # the first steps do not wait for many batches
            held.append(batch)
            since += 1
        if not before and not position:
            raise ValueError("data: the iterable has no batches")
        if batches is data:
            return
        passes, since, anchor, position = passes + 1, 0, None, {}


class Prefetch:
    """Run an iterator in a thread, at most `depth` items ahead. What it raises is raised here, in its place.

    Args: abandoned: while an item is waited for, whether to wait no longer; then the iteration ends.
    """

    def __init__(self, items: Iterator, abandoned: Callable[[], Any] = lambda: False, depth: int = 2):
        self.queue: queue.Queue = queue.Queue(depth)
        self.abandoned, self.closed = abandoned, threading.Event()
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]: of this thread
        self.thread = threading.Thread(target=self._fill, args=(items, x64), daemon=True, name="jaxnet-prefetch")
        self.thread.start()

    def _fill(self, items, x64):
        try:
            with jax.enable_x64(x64):
                for item in items:
                    if not self._put((item, None)):
                        return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item) -> bool:
        while not self.closed.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            try:
                item, error = self.queue.get(timeout=0.1)
                break
            except queue.Empty:
                if self.abandoned():
                    raise StopIteration from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self.closed.set()
        self.thread.join(2)  # it may be waiting for its source


_END = object()


def _stacked(batches: list, size: int, before: dict, after: dict) -> Stack:
    def stack(*leaves):
        out = np.zeros((size, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            out[i] = leaf
        return out

    fitting = [tree.map_with_path(_fitting, batch) for batch in batches]
    inputs = jax.device_put(jax.tree.map(stack, *fitting))
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(fitting[0])]
    samples = max((shape[0] for shape in shapes if shape), default=1)
    return Stack((inputs,), size, len(batches), len(batches) * samples, before, after, bool(after))


def _kind(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]


def _bytes(batch: Any) -> int:
    return sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(batch))


def _row_bytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape[1:], dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def _stack_size(batch_bytes: int) -> int:
    return int(np.clip(STACK // max(batch_bytes, 1), 1, 64))


def _fitting(path: str, leaf: Any) -> Any:
    """The leaf as JAX will hold it, with 64-bit integers checked before they are cut to 32."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = _as_numpy(path, leaf)
    if array.dtype.kind not in "biufcV":
        raise TypeError(f"data: '{path}' must hold numbers, got {array.dtype}; encode it first")
    wanted = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and wanted != array.dtype and array.size:
        low, high, info = array.min(), array.max(), np.iinfo(wanted)
        if low < info.min or high > info.max:
            worst = low if low < info.min else high
            raise ValueError(
                f"data: '{path}' holds {worst}, which {array.dtype} can and {wanted} cannot; JAX would wrap it around: "
                "use smaller numbers, or set jax_enable_x64"
            )
    return array.astype(wanted, copy=False)


def _as_numpy(path: str, leaf: Any) -> np.ndarray:
    """The numbers of an array of any library, by position."""
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise TypeError(f"data: '{path}' has masked entries, which JAX would read; fill them, or give them weight 0")
    if hasattr(leaf, "toarray"):
        raise TypeError(f"data: '{path}' is a sparse {type(leaf).__name__}; make it dense, with .toarray()")
    try:
        return np.asarray(leaf)
    except Exception as error:
        if hasattr(leaf, "__dlpack__"):  # a dtype that NumPy lacks, such as bfloat16
            with contextlib.suppress(Exception):
                return np.asarray(jax.dlpack.from_dlpack(leaf))
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, cannot be read as a NumPy array ({error}); convert it first, a "
            "tensor of PyTorch with .detach().cpu().numpy()"
        ) from error


def _begun(data: Any, passes: int, state: Any, skip: int) -> Iterator:
    """The iterator of a pass, taken to a position in it."""
    if state is not None:
        state = _from_json(state)
        if hasattr(data, "load_state_dict"):
            data.load_state_dict(state)
    iterable: Any = data(passes) if callable(data) else data
    batches: Any = iter(iterable)
    if state is not None and not hasattr(data, "load_state_dict"):
        batches.set_state(state)
    for _ in range(skip):
        if next(batches, _END) is _END:
            raise ValueError(f"data: the run had used {skip} batches of this pass, and now there are fewer")
    return batches


def _state_of(data: Any, batches: Any) -> Any:
    """Where an iterator stands, as JSON can hold it; None if it does not say."""
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        state = data.state_dict()
    elif hasattr(batches, "get_state") and hasattr(batches, "set_state"):
        state = batches.get_state()
    else:
        return None
    return _to_json(state)


def _to_json(x: Any) -> Any:
    """What iterators keep in their states, as JSON can hold it; what JSON cannot is an object with one entry, its kind."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, list):
        return [_to_json(y) for y in x]
    if isinstance(x, tuple):
        return {"tuple": [_to_json(y) for y in x]}
    if isinstance(x, dict):
        return {"dict": [[_to_json(key), _to_json(y)] for key, y in x.items()]}
    if isinstance(x, bytes):
        return {"bytes": base64.b64encode(x).decode()}
    if isinstance(x, np.ndarray | np.generic) or type(x).__module__ == "torch":
        array = np.asarray(x)
        if array.dtype.kind in "biufc":
            kind = "array" if isinstance(x, np.ndarray | np.generic) else "tensor"
            return {kind: [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]}
    raise TypeError(f"data: the iterator's state holds a {type(x).__name__}, which a checkpoint cannot keep")


def _from_json(x: Any) -> Any:
    if isinstance(x, list):
        return [_from_json(y) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "tuple":
        return tuple(_from_json(y) for y in content)
    if kind == "dict":
        return {_from_json(key): _from_json(y) for key, y in content}
    dtype, shape, data = content
    array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    if kind == "array":
        return array
    return importlib.import_module("torch").from_numpy(array)
