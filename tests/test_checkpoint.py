"""Checkpoints: the trees that come back, the files that are refused, and the state after a failure.
Expected values come from the trees themselves (a round trip is the identity, bit for bit), from the
official safetensors package, from the reader printed in docs/checkpoint_format.md, and from files
written once and kept in tests/golden.
"""

import collections
import contextlib
import copy
import errno
import fcntl
import json
import os
import pathlib
import pickle
import random
import re
import stat
import threading
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnet.checkpoint import CheckpointError, Leaf, inspect, load, save, verify
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import CODES, WIDENED
from jaxnet.checkpoint.tensors import crc_start, layout

HERE = pathlib.Path(__file__).parent
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in CODES | WIDENED}
# The last four: x64 is off.
NOT_IN_JAX = ("float6_e2m3fn", "float6_e3m2fn", "int64", "uint64", "float64", "complex128")


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclass
class Moments:
    mean: Any
    var: Any
    name: str = field(default="m", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Nameless:
    """A registered node whose children have no names."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


# ---------------------------------------------------------------------------------- what comes back


def values(dtype, shape=(2, 3), seed=0):
    """A NumPy array with random bits: every value of the type may appear, NaNs with payloads
    too.
    """
    size = int(np.prod(shape))
    raw = np.random.default_rng(seed).bytes(size * dtype.itemsize)
    return from_bits(dtype, raw).reshape(shape)


def from_bits(dtype, raw):
    bits = {"bool": 1, "float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}.get(
        dtype.name, 8
    )
    if re.fullmatch("u?int[124]", dtype.name):
        return (np.frombuffer(raw, np.uint8) % 2 ** int(dtype.name[-1])).astype(dtype)
    data = np.frombuffer(raw, np.uint8)
    return (data if bits == 8 else data % 2**bits).view(dtype)


def plain(tree):
    """The result of `load` without a template: records become dicts."""
    if isinstance(tree, Pair):
        return {"first": plain(tree.first), "second": plain(tree.second)}
    if isinstance(tree, list | tuple):
        return type(tree)(plain(x) for x in tree)
    return {key: plain(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def assert_same(got, expected, path=""):
    """Assert the same types, structure, order of keys and bits."""
    if isinstance(expected, jax.Array):
        assert isinstance(got, jax.Array), path
        assert got.dtype == expected.dtype and got.shape == expected.shape, path
        if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
            got, expected = jax.random.key_data(got), jax.random.key_data(expected)
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), path
        return
    assert type(got) is type(expected), (path, type(got), type(expected))
    if isinstance(expected, np.ndarray | np.generic):
        assert got.dtype == expected.dtype.newbyteorder("=") and got.shape == expected.shape, path
        assert got.tobytes() == expected.astype(got.dtype).tobytes(), path
    elif isinstance(expected, dict):
        assert list(got) == list(expected), path
        for key in expected:
            assert_same(got[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), path
        for i, x in enumerate(expected):
            assert_same(got[i], x, f"{path}/{i}")
    else:
        # Repr tells -0.0 from 0.0 and shows nan as equal to nan.
        assert repr(got) == repr(expected), path


def round_trip(tree, folder, **kwargs):
    save(folder / "t.safetensors", tree)
    return load(folder / "t.safetensors", **kwargs)


@st.composite
def arrays(draw):
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape)) * dtype.itemsize
    x = from_bits(dtype, draw(st.binary(min_size=size, max_size=size))).reshape(shape)
    kind = draw(st.sampled_from(["jax", "numpy", "scalar"]))
    if kind == "jax" and dtype.name not in NOT_IN_JAX:
        return jax.device_put(x)
    return x[()] if kind == "scalar" and shape == () else x


SCALARS = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.text(max_size=5),
    ),
    *(st.binary(max_size=5), st.just(2**10000), st.just("\ud800")),
)
TREES = st.recursive(
    arrays() | SCALARS,
    lambda tree: st.one_of(
        st.lists(tree, max_size=3),
        st.lists(tree, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), tree, max_size=3),
        st.dictionaries(st.integers(), tree, max_size=3),
        st.dictionaries(st.text("/~01", max_size=3), tree, max_size=3),
        st.builds(Pair, tree, tree),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(tree=TREES)
def test_every_tree_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "property.safetensors"
    save(path, tree)
    assert_same(load(path), plain(tree))
    # JAX sorts the keys of dicts.
    expected = jax.tree.map(lambda x: x, tree)
    assert_same(load(path, like=tree), expected)
    verify(path)
    manifest, tensors = documented_reader()(path)
    names = [leaf.path for leaf in inspect(path).leaves]
    assert set(names) == set(tensors) and len(names) == len(tensors)
    assert manifest["version"] == 1


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(name, shape, tmp_path):
    tree = {"numpy": values(DTYPES[name], shape)}
    if name not in NOT_IN_JAX:
        tree["jax"] = jax.device_put(tree["numpy"])
    assert_same(round_trip(tree, tmp_path), tree)
    assert_same(
        load(tmp_path / "t.safetensors", like=tree), {key: tree[key] for key in sorted(tree)}
    )


def test_nan_payloads_and_negative_zero_survive(tmp_path):
    # The bits of two NaNs, of -0.0 and of a denormal (IEEE 754).
    bits = np.array([0x7FC12345, 0xFF800001, 0x80000000, 0x00000001], np.uint32)
    got = round_trip(jax.device_put(bits.view(np.float32)), tmp_path)
    assert np.asarray(got).view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize(
    "x",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12)[::-2],
        np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, 1],
        np.arange(3, dtype=">i4"),
        np.arange(3, dtype=">f8").reshape(3, 1).T,
        np.asfortranarray(np.arange(6, dtype=np.complex64).reshape(2, 3)),
        np.broadcast_to(np.float32(3), (2, 2)),
        np.array(5, ">u2"),
    ],
    ids=[
        "transposed",
        "reversed",
        "slice",
        "big-endian",
        "big-endian view",
        "fortran",
        "broadcast",
        "big-endian 0-d",
    ],
)
def test_numpy_layouts(x, tmp_path):
    before = x.copy()
    got = round_trip({"x": x}, tmp_path)["x"]
    np.testing.assert_array_equal(got, before)
    assert got.dtype.isnative and got.shape == x.shape and got.flags.writeable
    np.testing.assert_array_equal(x, before)


def test_memory_mapped_arrays_can_be_saved(tmp_path):
    x = np.memmap(tmp_path / "m", np.float32, "w+", shape=(3,))
    x[:] = [1, 2, 3]
    assert_same(round_trip(x, tmp_path), np.array([1, 2, 3], np.float32))


def test_typed_random_keys_continue_the_same_stream(tmp_path):
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        keys = {
            "one": jax.random.key(7, impl=impl),
            "many": jax.random.split(jax.random.key(8, impl=impl), (2, 3)),
        }
        got = round_trip(keys, tmp_path)
        assert got["one"].dtype == keys["one"].dtype and got["many"].shape == (2, 3)
        assert_same(jax.random.normal(got["one"]), jax.random.normal(keys["one"]))
        assert_same(
            load(tmp_path / "t.safetensors", like=jax.eval_shape(lambda k: k, keys)),
            dict(sorted(keys.items())),
        )
    assert inspect(tmp_path / "t.safetensors").leaves[1] == Leaf(
        "many", (2, 3), "key<unsafe_rbg>", 6 * 16
    )


def test_a_key_that_has_been_used_can_be_saved(tmp_path):
    key = jax.random.key(0)
    jax.random.normal(key)
    # Threefry: the key of seed 0.
    assert jax.random.key_data(round_trip(key, tmp_path)).tolist() == [0, 0]


def test_64_bit_arrays_are_never_narrowed(tmp_path):
    tree = {"i": np.array(2**40), "f": np.array([1 + 2**-40]), "s": np.int64(2**40)}
    assert_same(round_trip(tree, tmp_path), tree)
    with jax.enable_x64(True):
        wide = {key: jnp.asarray(x) for key, x in tree.items()}
        save(tmp_path / "wide.safetensors", wide)
        assert_same(load(tmp_path / "wide.safetensors"), wide)
    narrow = load(tmp_path / "wide.safetensors")
    assert_same(narrow, {"i": np.array(2**40), "f": np.array([1 + 2**-40]), "s": np.array(2**40)})
    like = {"i": jax.ShapeDtypeStruct((), np.int64), "f": np.zeros(1), "s": np.array(0)}
    assert_same(load(tmp_path / "wide.safetensors", like=like), dict(sorted(narrow.items())))


def test_containers_without_a_template(tmp_path):
    state = optax.adam(1e-3).init({"w": jnp.ones(2)})
    tree = {
        "optax": state,
        "moments": Moments(jnp.ones(2), None),
        "nameless": Nameless(1, [2]),
        "default": collections.defaultdict(list, a=1),
        "ordered": collections.OrderedDict(b=1, a=2),
        "empty": [{}, [], (), None, collections.OrderedDict()],
        "keys": [
            {3: 1, -1: 2},
            {(0, "a"): 1},
            {b"x": 1},
            {0.5: 1},
            {True: 1},
            {None: 1},
            {"": {"": 2}},
        ],
    }
    zeros = {"w": jnp.zeros(2)}
    expected = tree | {
        # Optax's docs: Adam starts at 0.
        "optax": ({"count": jnp.zeros((), jnp.int32), "mu": zeros, "nu": zeros}, {}),
        "moments": {"mean": jnp.ones(2), "var": None},
        "nameless": {"0": 1, "1": [2]},
        "default": {"a": 1},
    }
    assert_same(round_trip(tree, tmp_path), expected)


def test_containers_with_a_template(tmp_path):
    tree = {
        "optax": optax.adamw(optax.cosine_decay_schedule(0.1, 9)).init(
            {"w": jnp.ones((2, 2), jnp.bfloat16)}
        ),
        "moments": Moments(jnp.ones(2), [None], "saved"),
        "nameless": Nameless(jnp.ones(1), [2]),
        "default": collections.defaultdict(list, a=1),
    }
    like = tree | {"moments": Moments(jnp.zeros(2), [None], "template")}
    got = round_trip(tree, tmp_path, like=like)
    # Static fields come from the template.
    assert jax.tree.structure(got) == jax.tree.structure(like)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert_same(a, b)
    abstract = jax.eval_shape(lambda x: x, {"optax": tree["optax"]})
    assert_same(
        round_trip({"optax": tree["optax"]}, tmp_path, like=abstract), {"optax": tree["optax"]}
    )


def test_a_template_says_which_kind_of_array(tmp_path):
    tree = {
        "a": jnp.ones(2),
        "b": np.ones(2, np.float32),
        "c": np.float32(1),
        "d": np.array(1, np.int8),
    }
    like = {"a": np.zeros(2, ">f4"), "b": jnp.zeros(2), "c": jnp.zeros(()), "d": np.int8(0)}
    got = round_trip(tree, tmp_path, like=like)
    assert_same(
        got, {"a": np.ones(2, np.float32), "b": jnp.ones(2), "c": jnp.ones(()), "d": np.int8(1)}
    )


def test_a_template_may_be_deleted_by_donation(tmp_path):
    x = jnp.arange(3.0)
    save(tmp_path / "x", x)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    assert_same(load(tmp_path / "x", like=x), jnp.arange(3.0))


@pytest.mark.cpu_only("it wants several devices")
def test_shardings_are_gathered_and_honoured(tmp_path):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    rows, both = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in [("a",), ("a", "b")])
    x = jnp.arange(16.0).reshape(4, 4)
    keys = jax.random.split(jax.random.key(0), 4)
    tree = {
        "x": jax.device_put(x, both),
        "k": jax.device_put(keys, rows),
        "y": x,
        "n": jax.device_put(x, jax.devices()[3]),
    }
    save(tmp_path / "s", tree)
    for leaf in load(tmp_path / "s").values():
        assert len(leaf.sharding.device_set) == 1 and not leaf.committed
    got = load(tmp_path / "s", like=tree)
    assert (
        got["x"].sharding == both
        and got["k"].sharding == rows
        and got["n"].devices() == {jax.devices()[3]}
    )
    # As in the template, it may follow other arrays.
    assert not got["y"].committed
    assert_same(got, dict(sorted(tree.items())))
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in tree.items()
    }
    assert all(leaf.sharding == rows for leaf in load(tmp_path / "s", like=like).values())
    save(tmp_path / "odd", {"x": jnp.ones(3)})
    with pytest.raises(
        CheckpointError,
        match=(
            "the shardings of `like` do not suit its shapes: .*divided|suit its shapes: "
            ".*partitioned 2 times"
        ),
    ):
        load(tmp_path / "odd", like={"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=rows)})


def test_loaded_arrays_can_be_donated(tmp_path):
    # It has 4 KiB and is aligned, so JAX on a CPU takes over the memory that was read into.
    x = jnp.arange(1024.0)
    got = round_trip({"x": x}, tmp_path)["x"]
    assert_same(jax.jit(lambda x: 2 * x, donate_argnums=0)(got), 2 * x)


def test_saving_changes_nothing_in_the_tree(tmp_path):
    tree = {"b": jnp.ones(2), "a": [np.arange(3, dtype=">i2"), {"x": None}], "k": jax.random.key(1)}
    inner, leaves = copy.copy(tree), jax.tree.leaves(tree)
    save(tmp_path / "t", tree, metadata=(metadata := {"a": [1]}))
    assert list(tree) == ["b", "a", "k"] and all(tree[key] is inner[key] for key in tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(tree), leaves, strict=True))
    assert tree["a"][0].dtype == ">i2" and metadata == {"a": [1]}


def test_names_are_paths_and_never_collide(tmp_path):
    tree = {
        "a/b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
        "a~1b": 1,
        "~": {"/": jnp.ones(2)},
        "__metadata__": jnp.ones(3),
    }
    assert_same(round_trip(tree, tmp_path), tree)
    names = [leaf.path for leaf in inspect(tmp_path / "t.safetensors").leaves]
    # The names follow RFC 6901, section 4.
    assert names == ["a~1b", "a/b", "~0/~1", "~__metadata__"]


# ------------------------------------------------------------------------ what is refused at saving

DEEP: list = []
for _ in range(101):
    DEEP = [DEEP]
LOOP: list = []
LOOP.append(LOOP)
DELETED = jnp.arange(3.0)
DELETED.delete()
REFUSED = {
    "object array": (
        {"a": [np.array([None])]},
        r"leaf 'a/0': dtype object cannot be stored: convert it to one of bool,",
    ),
    "text array": ({"a": np.array(["x"])}, r"leaf 'a': dtype <U1 cannot be stored"),
    "datetime": (
        {"a": np.array(["2020"], "M8[s]")},
        r"leaf 'a': dtype datetime64\[s\] cannot be stored",
    ),
    "long double": ({"a": np.ones(1, np.longdouble)}, r"leaf 'a': dtype float128 cannot be stored"),
    "structured": ({"a": np.zeros(1, "i4,f4")}, r"leaf 'a': dtype .*'f0'.* cannot be stored"),
    "masked": (
        {"a": np.ma.masked_equal([1, 2], 1)},
        r"leaf 'a': a numpy.ma.MaskedArray is neither an array nor",
    ),
    "unknown class": (
        {"a": (1, object())},
        r"leaf 'a/1': a builtins.object is neither an array nor a Python scalar",
    ),
    "function": ({"a": len}, r"leaf 'a': a builtins.builtin_function_or_method is neither"),
    "set": ({"a": {1}}, r"leaf 'a': a builtins.set is neither"),
    "int subclass": ({"a": re.IGNORECASE}, r"leaf 'a': a re.RegexFlag is neither an array"),
    "abstract": (
        {"a": jax.ShapeDtypeStruct((2,), jnp.float32)},
        r"leaf 'a': a ShapeDtypeStruct has no values",
    ),
    "deleted": (
        {"a": {"b": DELETED}},
        r"leaf 'a/b': the array has been deleted \(donated to a jitted function\?\)",
    ),
    "same name": (
        {"x": {1: jnp.ones(1), "1": jnp.ones(1)}},
        r"leaf 'x/1': two keys of type int and str give this one name",
    ),
    "key type": ({"x": {np.int64(1): 2}}, r"leaf 'x': it has a key of type int64: use str, int,"),
    "tuple in a tuple": ({(1, (2,)): 2}, r"leaf '': it has a key of type tuple"),
    "key in a tuple": ({(1, frozenset()): 2}, r"leaf '': it has a key of type frozenset"),
    "endless key": ({2**20000: 1}, r"it has a key of type int"),
    "surrogate key": ({"a\ud800": 1}, r"its key 'a.ud800' is not Unicode text"),
    "too deep": (DEEP, r"nested deeper than 100 levels"),
    "loop": (
        {"a": LOOP},
        (
            r"leaf 'a/0/0/0/0/0/0/0/...': the tree is nested deeper than 100 levels: does it "
            r"contain itself"
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_named(name, tmp_path):
    tree, match = REFUSED[name]
    with pytest.raises(CheckpointError, match=match) as caught:
        save(tmp_path / "t.safetensors", tree)
    assert caught.value.path == str(tmp_path / "t.safetensors") and str(caught.value).startswith(
        caught.value.path
    )
    assert os.listdir(tmp_path) == []


def test_saving_inside_jit_is_an_error(tmp_path):
    with pytest.raises(
        CheckpointError, match="leaf 'x': a traced array has no values yet: save outside jit"
    ):
        jax.jit(lambda x: save(tmp_path / "t", {"x": x}))(jnp.ones(2))


DEEP_METADATA: dict = {}
for _ in range(100):
    DEEP_METADATA = {"a": DEEP_METADATA}


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": float("nan")},
        {"a": (1, 2)},
        {1: 2},
        {"a": np.float32(1)},
        {"a": jnp.ones(1)},
        [1],
        {"a": {1}},
        DEEP_METADATA,
    ],
    ids=["nan", "tuple", "int key", "numpy", "array", "list", "set", "deep"],
)
def test_metadata_must_survive_json(metadata, tmp_path):
    with pytest.raises(CheckpointError, match="metadata must be a dict of str keys"):
        save(tmp_path / "t", {}, metadata=metadata)


def test_metadata_comes_back(tmp_path):
    metadata = {"z": 0.1, "a": [1, None, True, {"é": "\ud800"}], "big": 2**70}
    save(tmp_path / "t", {}, metadata=metadata)
    assert inspect(tmp_path / "t").metadata == metadata and list(
        inspect(tmp_path / "t").metadata
    ) == list(metadata)


def test_an_error_can_cross_processes():
    error = pickle.loads(pickle.dumps(CheckpointError("f", "a/b", "why")))
    assert (error.path, error.leaf, error.reason, str(error)) == (
        "f",
        "a/b",
        "why",
        "f: leaf 'a/b': why",
    )


# ------------------------------------------------------------------------ templates that do not fit

X, N = jnp.zeros((2, 3)), jnp.zeros(4, jnp.int32)
MISFITS = {
    "larger": (
        {"a": X},
        {"a": jnp.zeros((3, 3))},
        r"shape differs: a: template float32\[3,3\], file float32\[2,3\]",
    ),
    "smaller": (
        {"a": X},
        {"a": jnp.zeros((1, 3))},
        r"shape differs: a: template float32\[1,3\], file float32\[2,3\]",
    ),
    "transposed": ({"a": X}, {"a": X.T}, r"shape differs: a: template float32\[3,2\]"),
    "rank": ({"a": X}, {"a": jnp.zeros(6)}, r"shape differs: a: template float32\[6\]"),
    "float to int": (
        {"a": X},
        {"a": X.astype(int)},
        r"dtype differs: a: template int32\[2,3\], file float32\[2,3\]",
    ),
    "float to half": (
        {"a": X},
        {"a": X.astype(jnp.float16)},
        r"dtype differs: a: template float16",
    ),
    "float to bfloat16": (
        {"a": X},
        {"a": X.astype(jnp.bfloat16)},
        r"dtype differs: a: template bfloat16",
    ),
    "int to float": (
        {"a": N},
        {"a": N.astype(float)},
        r"dtype differs: a: template float32\[4\], file int32\[4\]",
    ),
    "leaf missing": ({"a": X}, {"a": X, "b": N}, r"missing from the file: b int32\[4\]"),
    "leaf unexpected": ({"a": X, "b": N}, {"a": X}, r"not in the template: b int32\[4\]"),
    "renamed": (
        {"kernel": X},
        {"kernels": X},
        r"perhaps renamed: kernel in the file is kernels in the template",
    ),
    "list for tuple": ({"a": [X]}, {"a": (X,)}, r"container differs: a: template tuple, file list"),
    "dict for list": (
        {"a": {"0": X}},
        {"a": [X]},
        r"container differs: a: template list, file dict",
    ),
    "record for dict": (
        Pair(X, N),
        {"first": X, "second": N},
        r"the root: template dict, file record of named fields",
    ),
    "longer list": ([X], [X, X], r"missing from the file: 1 float32\[2,3\]"),
    "number for array": (
        {"a": 1},
        {"a": jnp.int32(1)},
        r"shape differs: a: template int32\[\], file int",
    ),
    "float for int": ({"a": 1}, {"a": 1.0}, r"dtype differs: a: template float, file int"),
    "bool for int": ({"a": 1}, {"a": True}, r"dtype differs: a: template bool, file int"),
    "None for array": (
        {"a": None},
        {"a": X},
        r"(?s)missing from the file: a float32.*a: template nothing, file None",
    ),
    "None for empty": ({"a": None}, {"a": {}}, r"container differs: a: template dict, file None"),
    "empty missing": ({}, {"a": {}}, r"container differs: a: template dict, file nothing"),
    "key type": (
        {"d": {1: X}},
        {"d": {"1": X}},
        r"container differs: d: template dict, file dict with keys of type int",
    ),
    "key for data": (
        {"a": jnp.zeros(2, jnp.uint32)},
        {"a": jax.random.key(0)},
        r"key<threefry2x32>\[\], file uint32\[2\]",
    ),
    "other key": (
        {"a": jax.random.key(0, impl="rbg")},
        {"a": jax.random.key(0)},
        r"dtype differs: a: template key<threefry2x32>\[\], file key<rbg>\[\]",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_template_that_does_not_fit_is_refused(name, tmp_path):
    tree, like, match = MISFITS[name]
    with pytest.raises(CheckpointError, match=match):
        round_trip(tree, tmp_path, like=like)
    # The file itself is fine.
    assert_same(load(tmp_path / "t.safetensors"), plain(tree))


def test_all_differences_are_listed_in_one_error(tmp_path):
    save(tmp_path / "t", {"enc": {"w": X, "b": N, "old": N}, "dec": [X, 1], "opt": (N,)})
    with pytest.raises(CheckpointError) as caught:
        load(
            tmp_path / "t",
            like={"enc": {"w": X.T, "b": X, "older": N}, "dec": (X, 1), "opt": (N, X)},
        )
    assert caught.value.reason.split("\n") == [
        "it does not fit the template `like` (without `like` it loads as saved):",
        "  missing from the file: enc/older int32[4]",
        "  missing from the file: opt/1 float32[2,3]",
        "  not in the template: enc/old int32[4]",
        "  shape differs: enc/w: template float32[3,2], file float32[2,3]",
        "  shape differs: enc/b: template float32[2,3], file int32[4]",
        "  container differs: dec: template tuple, file list",
        "  perhaps renamed: enc/old in the file is enc/older in the template",
        "  if so: rename={'enc/old': 'enc/older'}",
    ]


def test_a_template_with_an_unknown_leaf_is_refused(tmp_path):
    save(tmp_path / "t", {"a": X})
    with pytest.raises(CheckpointError, match="leaf 'a': a builtins.object is neither"):
        load(tmp_path / "t", like={"a": object()})


# --------------------------------------------------------------------------- the format is for ever


def documented_reader():
    code = (
        (HERE.parent / "docs" / "checkpoint_format.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
    )
    exec(code, names := {})
    return names["read"]


def golden_trees():
    words = jnp.arange(10, dtype=jnp.uint32)
    keys = [
        jax.random.wrap_key_data(words[:2]),
        jax.random.wrap_key_data(words[2:].reshape(2, 4), impl="rbg"),
    ]
    structure = {
        "params": {
            "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3, jnp.bfloat16)}
        },
        "opt": (Pair(jnp.int32(4), {"w": np.arange(3)}), optax.EmptyState()),
        "moments": Moments(np.float32(1.5), None),
        "list": [True, -31, 1.5, -0.0, float("inf"), 1 - 2j, "é\n", b"\0\xff", None, 2**70],
        "keys": keys,
        "odd": {
            "a/b": {"~": jnp.ones(1)},
            "": {},
            "tuple": (),
            "ordered": collections.OrderedDict(b=1, a=[]),
        },
        "ints": {3: 1, -1: {(0, "a"): 2}},
        "__metadata__": 1,
    }
    dtypes = {name: np.arange(2 * dtype.itemsize, dtype=np.uint8) for name, dtype in DTYPES.items()}
    return {
        "v1_structure": structure,
        "v1_dtypes": {name: from_bits(DTYPES[name], raw.tobytes()) for name, raw in dtypes.items()},
        "v1_array": jnp.array([[1.0, float("nan")]]),
        "v1_empty": {},
    }


@pytest.mark.parametrize("name", ["v1_structure", "v1_dtypes", "v1_array", "v1_empty"])
def test_golden_files(name, tmp_path):
    """The files of version 1 were written once.

    Never regenerate them: a new version gets new files beside them.
    """
    golden, tree = HERE / "golden" / f"{name}.safetensors", golden_trees()[name]
    got = load(golden, like=tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert_same(a, b)
    assert inspect(golden).metadata == {"written by": "jaxnet 0.1.0"}
    save(tmp_path / "again", tree, metadata={"written by": "jaxnet 0.1.0"})
    # Today's writer still writes version 1.
    assert (tmp_path / "again").read_bytes() == golden.read_bytes()


def test_golden_structure_without_a_template():
    got, tree = load(HERE / "golden" / "v1_structure.safetensors"), golden_trees()["v1_structure"]
    tree["opt"] = ({"first": jnp.int32(4), "second": {"w": np.arange(3)}}, {})
    tree["moments"] = {"mean": np.float32(1.5), "var": None}
    assert_same(got, tree)


def test_the_documented_example_byte_by_byte(tmp_path):
    text = (HERE.parent / "docs" / "checkpoint_format.md").read_text()
    rows = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} ?)+)", text, re.MULTILINE)
    expected = bytes.fromhex("".join(row for _, row in rows))
    assert [int(offset, 16) for offset, _ in rows] == list(range(0, len(expected), 16))
    save(tmp_path / "tiny", {"w": jnp.array([1.0, -2.0]), "step": 3}, metadata={"run": "a"})
    assert (tmp_path / "tiny").read_bytes() == expected
    manifest, tensors = documented_reader()(tmp_path / "tiny")
    assert tensors == {"w": ("F32", (2,), np.array([1, -2], "<f4").tobytes())}
    assert manifest["tree"] == ["dict", [["w", ["jax", "float32"]], ["step", ["int", "0x3"]]]]


def test_large_tensors_have_one_checksum_for_each_64_mib(tmp_path):
    x = np.zeros(65 << 20, np.uint8)
    x[[0, 1 << 26, -1]] = 1
    save(tmp_path / "x", {"x": x})
    manifest, _ = documented_reader()(tmp_path / "x")
    assert len(manifest["crc32"][0]) == 16
    np.testing.assert_array_equal(load(tmp_path / "x")["x"], x)
    with open(tmp_path / "x", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x02")
    for check in (load, verify):
        with pytest.raises(
            CheckpointError,
            match=r"leaf 'x': its bytes \(67109\d+ to 6815\d+ of the file\) are not those",
        ):
            check(tmp_path / "x")


def test_a_newer_version_is_refused_by_name(tmp_path):
    header = fmt.write_header("", [], {"version": 4, "new": "things"})
    (tmp_path / "new").write_bytes(header)
    for check in (load, inspect, verify):
        with pytest.raises(
            CheckpointError,
            match="it has format version 4, this jaxnet reads versions up to 3: install",
        ):
            check(tmp_path / "new")


# ------------------------------------------------------------------ safetensors from and for others


def test_the_official_package_reads_our_files(tmp_path):
    tree = {name: values(dtype, (2, 3)) for name, dtype in DTYPES.items()}
    tree |= {"nested": {"a/b": [values(DTYPES["float32"], (0, 2)), values(DTYPES["int16"], ())]}}
    save(tmp_path / "t", tree)
    raw = dict(safetensors.deserialize((tmp_path / "t").read_bytes()))
    for name, dtype in DTYPES.items():
        expected = tree[name]
        if name in WIDENED and "int" in name:
            # The documentation says that the same numbers are stored in whole bytes.
            expected = expected.astype(np.int8)
        shape = [2, 3, 2] if name == "complex128" else [2, 3]
        assert (raw[name]["dtype"], raw[name]["shape"]) == ((CODES | WIDENED)[name], shape)
        assert bytes(raw[name]["data"]) == expected.tobytes(), (name, dtype)
    assert raw["nested/a~1b/0"]["shape"] == [0, 2] and raw["nested/a~1b/1"]["shape"] == []


def test_the_official_numpy_and_jax_readers(tmp_path):
    tree = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.array(True),
        "c": np.ones(2, np.complex64),
    }
    save(tmp_path / "t", tree)
    for name, x in safetensors.numpy.load_file(tmp_path / "t").items():
        assert_same(x, tree[name])
    save(tmp_path / "j", {"x": jnp.array([1.5, -0.0], jnp.bfloat16)})
    assert_same(
        safetensors.flax.load_file(tmp_path / "j")["x"], jnp.array([1.5, -0.0], jnp.bfloat16)
    )


def test_we_read_files_of_the_official_package(tmp_path):
    flat = {
        "enc/0/w": jnp.ones((2, 3), jnp.bfloat16),
        "enc/0/b": jnp.arange(3),
        "head.w": jnp.zeros(()),
        "~": jnp.ones(0),
    }
    safetensors.flax.save_file(dict(flat), tmp_path / "f", metadata={"format": "pt"})
    nested = {
        "enc": {"0": {"b": flat["enc/0/b"], "w": flat["enc/0/w"]}},
        "head.w": flat["head.w"],
        "~": flat["~"],
    }
    got = load(tmp_path / "f")
    assert jax.tree.structure(got) == jax.tree.structure(nested)
    jax.tree.map(assert_same, got, nested)
    assert_same(load(tmp_path / "f", like=nested), nested)
    info = verify(tmp_path / "f")
    assert (info.version, info.metadata, info.scalars) == (None, {"format": "pt"}, {})
    assert Leaf("enc/0/w", (2, 3), "bfloat16", 12) in info.leaves
    lists = {
        "enc": [{"b": flat["enc/0/b"], "w": flat["enc/0/w"]}],
        "head.w": flat["head.w"],
        "~": flat["~"],
    }
    # A file without structure takes that of the template.
    assert_same(load(tmp_path / "f", like=lists), lists)
    with pytest.raises(CheckpointError, match="missing from the file: enc/0/scale"):
        load(tmp_path / "f", like={"enc": {"0": {"scale": flat["enc/0/b"]}}})


def test_a_name_that_is_also_a_folder_keeps_all_names_flat(tmp_path):
    flat = {
        "a": np.ones(1, np.float32),
        "a/b": np.ones(2, np.float32),
        "c/d": np.ones(3, np.float32),
    }
    safetensors.numpy.save_file(flat, tmp_path / "f")
    assert {name: x.shape for name, x in load(tmp_path / "f").items()} == {
        name: x.shape for name, x in flat.items()
    }


def test_names_that_nest_too_deep_stay_flat(tmp_path):
    deep = "/".join("a" * 101)
    (tmp_path / "f").write_bytes(container({deep: entry(), "a/b": entry(start=2, stop=4)}, b"1234"))
    assert list(load(tmp_path / "f")) == [deep, "a/b"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Fail("fsync", 2, OSError(errno.EINVAL, "not for folders")))
    save(tmp_path / "t", OLD)
    assert_same(load(tmp_path / "t"), OLD)


def test_foreign_types(tmp_path):
    safetensors.numpy.save_file({"i": np.array([2**40]), "f": np.array([0.1])}, tmp_path / "n")
    assert_same(
        dict(sorted(load(tmp_path / "n").items())), {"f": np.array([0.1]), "i": np.array([2**40])}
    )
    (tmp_path / "f4").write_bytes(container({"x": entry("F4", [4], 0, 2)}, b"12"))
    assert inspect(tmp_path / "f4").leaves == (Leaf("x", (4,), "F4", 2),)
    with pytest.raises(
        CheckpointError, match="leaf 'x': safetensors' type F4 packs several elements into a byte"
    ):
        load(tmp_path / "f4")


# ------------------------------------------------------------------------------------------- damage


def damages(data, count, seed):
    """Copies of `data` with one kind of damage each: those of checkpoints in the field, and some
    more.
    """
    rng = random.Random(seed)
    for i in range(count):
        bad, at, kind = bytearray(data), rng.randrange(len(data)), i % 8
        block = slice(at, at + 64)
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            bad += rng.randbytes(rng.randint(1, 64))
        elif kind == 3:
            bad[block] = bytes(len(bad[block]))
        elif kind == 4:
            other = rng.randrange(len(data) - 63)
            at = rng.randrange(len(data) - 63)
            bad[at : at + 64], bad[other : other + 64] = bad[other : other + 64], bad[at : at + 64]
        elif kind == 5:
            for _ in range(4):
                bad[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 6:
            bad.insert(at, rng.randrange(256))
        else:
            del bad[at]
        if bad != data:
            yield kind, bytes(bad)


DAMAGED = {
    "w": jnp.arange(40.0).reshape(4, 10),
    "opt": Pair(jnp.zeros(300, jnp.int8), {"nu": jnp.zeros(300, jnp.int8), "k": jax.random.key(0)}),
    "zeros": [jnp.zeros((3, 0)), 7, "text"],
}


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_never_silent(seed, tmp_path):
    save(tmp_path / "t", DAMAGED, metadata={"a": 1})
    data, count = (tmp_path / "t").read_bytes(), 0
    for kind, bad in damages(data, 1000, seed):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(tmp_path / "bad", like=DAMAGED if count % 2 else None)
            pytest.fail(f"damage of kind {kind} went unnoticed")
        count += 1
    assert count > 900


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path):
    save(tmp_path / "t", {"w": jnp.array([1.0]), "n": 5})
    data = (tmp_path / "t").read_bytes()
    with open(tmp_path / "t", "r+b", buffering=0) as f:
        for at in range(len(data)):
            for bit in range(8):
                os.pwrite(f.fileno(), bytes([data[at] ^ 1 << bit]), at)
                with pytest.raises(CheckpointError):
                    verify(tmp_path / "t")
            os.pwrite(f.fileno(), data[at : at + 1], at)
    assert_same(load(tmp_path / "t"), {"w": jnp.array([1.0]), "n": 5})


def test_every_truncation_of_a_small_file_is_found(tmp_path):
    save(tmp_path / "t", {"w": jnp.array([1.0])})
    for size in reversed(range(os.path.getsize(tmp_path / "t"))):
        os.truncate(tmp_path / "t", size)
        for check in (inspect, verify):
            with pytest.raises(CheckpointError):
                check(tmp_path / "t")


def test_damage_names_the_leaf_the_place_and_the_remedy(tmp_path):
    save(tmp_path / "t", {"enc": {"kernel": jnp.ones(4)}, "z": jnp.zeros(4, jnp.int8)})
    data = bytearray((tmp_path / "t").read_bytes())
    data[-8] ^= 1
    (tmp_path / "t").write_bytes(data)
    start = len(data) - 20
    text = (
        rf"leaf 'enc/kernel': its bytes \({start} to {start + 16} of the file\) are not those "
        r"that were saved: "
    )
    with pytest.raises(
        CheckpointError,
        match=text + r"CRC-32 [0-9a-f]{8}, expected [0-9a-f]{8}; .*restore it from a copy",
    ):
        load(tmp_path / "t")


# ---------------------------------------------------------------------------------- hostile headers


def container(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "U8", shape: Any = (2,), start=0, stop=2):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "nothing": (b"", "0 bytes are too few for a safetensors file"),
    "short": (b"1234567", "7 bytes are too few"),
    "huge header": (
        (2**60).to_bytes(8, "little") + b"{}",
        "announce a header of 1152921504606846976 bytes",
    ),
    "header over the limit": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        "announce a header of 100000001 bytes",
    ),
    "header past the end": (
        b"\x03" + bytes(7) + b"{}",
        "announce a header of 3 bytes, the file has 10",
    ),
    "no object": (container(b"[]"), r"the header begins with b'\['"),
    "leading space": (container(b" {}"), "the header begins with b' '"),
    "not UTF-8": (container(b'{"\xff": 1}'), "the header is not the JSON .*utf-8"),
    "not JSON": (container(b"{a}"), "the header is not the JSON of a safetensors file"),
    "cut JSON": (container(b'{"a'), "the header is not the JSON"),
    "two objects": (container(b"{}{}"), "the header is not the JSON .*Extra data"),
    "NaN": (container(b'{"a": NaN}'), "NaN is not a JSON number"),
    "double name": (container(b'{"a": 1, "a": 1}'), "two entries are called 'a'"),
    "deep": (
        container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "the header is not the JSON .*recursion",
    ),
    "long number": (container(b'{"a":' + b"1" * 5000 + b"}"), "the header is not the JSON"),
    "entry is no object": (container({"a": 3}), "leaf 'a': unknown dtype None"),
    "unknown dtype": (
        container({"a": entry("F128")}, b"12"),
        "leaf 'a': unknown dtype 'F128', expected one of BOOL",
    ),
    "dtype is a list": (container({"a": entry(["U8"])}, b"12"), "leaf 'a': unknown dtype"),
    "no shape": (container({"a": entry(shape=None)}, b"12"), "leaf 'a': shape None is not a list"),
    "negative size": (
        container({"a": entry(shape=[-2])}, b"12"),
        r"leaf 'a': shape \[-2\] is not a list of",
    ),
    "fraction": (container({"a": entry(shape=[2.0])}, b"12"), r"leaf 'a': shape \[2.0\] is not"),
    "bool size": (
        container({"a": entry(shape=[True, 2])}, b"12"),
        r"leaf 'a': shape \[True, 2\] is not",
    ),
    "many axes": (
        container({"a": entry(shape=[1] * 64 + [2])}, b"12"),
        "leaf 'a': shape .* at most 64 sizes",
    ),
    "overflow": (
        container({"a": entry(shape=[2**62, 2**62])}, b"12"),
        "leaf 'a': .* does not take 2 bytes",
    ),
    "huge and empty": (
        container({"a": entry(shape=[2**62, 2**62, 0], stop=0)}),
        "leaf 'a': .*cannot make",
    ),
    "one offset": (
        container({"a": entry() | {"data_offsets": [0]}}, b"12"),
        r"leaf 'a': data_offsets \[0\] are not two",
    ),
    "negative offset": (
        container({"a": entry(start=-2, stop=0)}, b"12"),
        r"data_offsets \[-2, 0\] are not two positions",
    ),
    "backwards": (container({"a": entry(start=2, stop=0)}, b"12"), "does not take -2 bytes"),
    "wrong length": (
        container({"a": entry(stop=1)}, b"1"),
        r"leaf 'a': U8\[2\] does not take 1 bytes",
    ),
    "half a byte": (
        container({"a": entry("F4", [3], 0, 2)}, b"12"),
        r"F4\[3\] does not take 2 bytes",
    ),
    "hole": (
        container({"a": entry(), "b": entry(start=3, stop=5)}, b"12345"),
        "leaf 'b': its data starts at byte 3, exp",
    ),
    "overlap": (
        container({"a": entry(), "b": entry(start=1, stop=3)}, b"123"),
        "leaf 'b': its data starts at byte 1",
    ),
    "trailing bytes": (
        container({"a": entry()}, b"123"),
        "the tensors need 2 bytes, the file has 3 for them: it is foll",
    ),
    "missing bytes": (
        container({"a": entry()}, b"1"),
        "the tensors need 2 bytes, the file has 1 for them: it is cut off",
    ),
    "metadata is a list": (
        container({"__metadata__": []}),
        "__metadata__ must be an object of strings",
    ),
    "metadata of numbers": (
        container({"__metadata__": {"a": 1}}),
        "__metadata__ must be an object of strings",
    ),
    "lone surrogate": (
        container(b'{"\\ud800": 1}'),
        r"leaf '\\ud800': its name is not Unicode text",
    ),
    "our name elsewhere": (
        container({"__metadata__": {"jaxnet": "{}"}}),
        r"its header has \['jaxnet'\], but not at the beg",
    ),
    "no digest": (container(fmt.PREFIX), "the header's SHA-256 is .*, expected ;"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_a_reason(name, tmp_path):
    data, match = HOSTILE[name]
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(tmp_path / "f")
    assert len(str(caught.value)) < 3000


def forge(tree, tensors=(), crcs=None, **more):
    """A file with a right digest and a wrong manifest."""
    placed = layout([(name, code, tuple(shape)) for name, code, shape in tensors])
    size = placed[-1].stop if placed else 0
    crcs = [f"{crc_start(t, 0):08x}" for t in placed] if crcs is None else crcs
    manifest = {"version": 1, "metadata": {}, "tree": tree, "crc32": crcs} | more
    return fmt.write_header("", placed, manifest) + bytes(size)


def nested(depth, node):
    for _ in range(depth):
        node = ["list", [node]]
    return node


A = [("a", "F32", (0,))]
FORGED = {
    "no tree": (forge(None), "the manifest's tree is not well-formed at ''"),
    "unknown kind": (forge(["os.system", "true"]), "unknown kind 'os.system'"),
    "kind is a list": (forge([["dict"], []]), "not well-formed"),
    "three parts": (forge(["none", None, 1]), "not well-formed"),
    "text": (forge("ab"), "unknown kind 'a'"),
    "none with content": (forge(["none", 1]), "1 is not the form of a none"),
    "bool as number": (forge(["bool", 1]), "1 is not the form of a bool"),
    "int as number": (forge(["int", 1]), "not well-formed"),
    "int with spaces": (forge(["int", " 0x1"]), "' 0x1' is not the form of a int"),
    "float in decimal": (forge(["float", "0.1"]), "'0.1' is not the form of a float"),
    "float overflow": (forge(["float", "0x1p99999"]), "too large"),
    "half a complex": (forge(["complex", ["0x0.0p+0"]]), "not the form of a complex"),
    "str as number": (forge(["str", 1]), "1 is not the form of a str"),
    "bad base64": (forge(["bytes", "a"]), "not well-formed"),
    "dict is an object": (forge(["dict", {}]), "unknown kind 'dict', or the wrong content"),
    "pair of three": (forge(["dict", [["a", ["none", None], 1]]]), "not well-formed"),
    "double key": (
        forge(["dict", [["a", ["none", None]], ["a", ["none", None]]]]),
        "two keys are alike",
    ),
    "equal keys": (
        forge(["dict", [[["int", "0x1"], ["none", None]], [["bool", True], ["none", None]]]]),
        "two keys are al",
    ),
    "key in a key": (
        forge(["dict", [[["tuple", [["tuple", []]]], ["none", None]]]]),
        "unknown kind 'tuple' of a key",
    ),
    "key is empty": (forge(["dict", [[[], ["none", None]]]]), "not well-formed"),
    "key is a dict": (forge(["dict", [[["dict", []], ["none", None]]]]), "not well-formed"),
    "field is a number": (
        forge(["record", [[["int", "0x1"], ["none", None]]]]),
        "the names of fields are strings",
    ),
    "too deep": (forge(nested(101, ["none", None])), "nested deeper than 100 levels"),
    "far too deep": (forge(nested(400, ["none", None])), "nested deeper than 100|not the JSON"),
    "array without tensor": (
        forge(["jax", "float32"]),
        "leaf '': it is in the tree or in the header, but not in both",
    ),
    "tensor without array": (
        forge(["dict", []], A),
        "leaf 'a': it is in the tree or in the header, but not in both",
    ),
    "wrong type": (
        forge(["dict", [["a", ["jax", "int8"]]]], A),
        r"leaf 'a': the tree calls it int8, .* as F32\[0\]",
    ),
    "unknown dtype": (
        forge(["dict", [["a", ["jax", "object"]]]], A),
        "leaf 'a': the tree gives it an unknown dtype, 'object'",
    ),
    "complex without pairs": (
        forge(["dict", [["a", ["numpy", "complex128"]]]], [("a", "F64", (3,))]),
        "leaf 'a': the tree calls it complex128",
    ),
    "unknown keys": (
        forge(["dict", [["a", ["key", "os"]]]], [("a", "U32", (0, 2))]),
        "leaf 'a': its data uint32.* are not random keys of kind 'os'",
    ),
    "keys of other size": (
        forge(["dict", [["a", ["key", "rbg"]]]], [("a", "U32", (0, 3))]),
        "leaf 'a': its data .* are not random keys of kind 'rbg'",
    ),
    "key without data": (
        forge(["dict", [["a", ["key", "rbg"]]]], [("a", "U32", ())]),
        "leaf 'a': the tree calls it rbg",
    ),
    "crc missing": (
        forge(["dict", [["a", ["jax", "float32"]]]], A, []),
        "one crc32 for each of 1 tensors",
    ),
    "crc too long": (
        forge(["dict", [["a", ["jax", "float32"]]]], A, ["0" * 16]),
        "leaf 'a': its crc32 must be 8 hexadecimal",
    ),
    "crc is a number": (
        forge(["dict", [["a", ["jax", "float32"]]]], A, [0]),
        "leaf 'a': its crc32 must be",
    ),
    "crc of another name": (
        forge(["dict", [["a", ["jax", "float32"]]]], A, ["00000000"]),
        "leaf 'a': its bytes",
    ),
    "version is text": (
        forge(["none", None], version="1"),
        "the manifest's version is '1', expected a number",
    ),
    "version 0": (forge(["none", None], version=0), "the manifest's version is 0"),
    "metadata is a list": (
        forge(["none", None], metadata=[]),
        "the manifest's metadata must be an object",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests_are_refused_with_a_reason(name, tmp_path):
    data, match = FORGED[name]
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / "f")


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["a", "0x1", "dict", "list", "int", "record", "jax"]),
    lambda x: (
        st.lists(x, max_size=3)
        | st.tuples(st.sampled_from(["dict", "list", "record", "tuple", "complex"]), x)
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(tree=JSONS)
def test_any_json_in_place_of_the_tree_gives_a_tree_or_a_checkpoint_error(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "forged"
    path.write_bytes(forge(tree))
    with contextlib.suppress(CheckpointError):
        save(path, got := load(path))
        assert_same(load(path), got)


# --------------------------------------------------------------------------------------- durability

OLD, NEW = {"x": np.zeros(3)}, {"x": np.arange(10_000.0), "y": [1, jnp.ones(7)]}


class Fail:
    """An os function that raises at its n-th call."""

    def __init__(self, name, n, error):
        self.real, self.left, self.error = getattr(os, name), n, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad disk"), KeyboardInterrupt()],
    ids=repr,
)
@pytest.mark.parametrize("name", ["open", "write", "lseek", "fstat", "fchmod", "fsync", "replace"])
def test_a_failure_at_any_call_leaves_the_old_file_or_the_new_one(
    name, error, tmp_path, monkeypatch
):
    """Fail the n-th call, for n = 1, 2, ...

    until the save succeeds, as SQLite does (sqlite.org/testing.html).
    """
    path, failures = tmp_path / "t.safetensors", 0
    for n in range(1, 30):
        save(path, OLD)
        path.chmod(0o600)
        before = path.stat().st_ino
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail := Fail(name, n, error))
            try:
                save(path, NEW)
            except (OSError, KeyboardInterrupt) as e:
                assert e is error
        # No temporary file is left.
        assert os.listdir(tmp_path) == [path.name]
        replaced = path.stat().st_ino != before
        assert_same(load(path), NEW if replaced else OLD)
        if fail.left > 0:
            break
        failures += 1
        # These two come once more, for the folder, after the rename.
        assert not replaced or name in ("open", "fsync")
    assert (
        replaced
        and failures
        == {"open": 2, "write": 3, "lseek": 2, "fstat": 2, "fchmod": 1, "fsync": 2, "replace": 1}[
            name
        ]
    )


def test_an_error_says_that_nothing_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "write", Fail("write", 1, OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path / "t", OLD)
    assert caught.value.__notes__ == [f"while saving {tmp_path / 't'}: nothing has been replaced"]


def test_a_failed_sync_in_the_background_is_not_lost(tmp_path, monkeypatch):
    """The disk reports an error to one fsync only, which may be the one in the background."""
    monkeypatch.setattr(os, "fsync", Fail("fsync", 1, OSError(errno.EIO, "bad disk")))
    with pytest.raises(OSError, match="bad disk"):
        save(tmp_path / "t", np.zeros(40 << 20, np.uint8))
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    save(tmp_path / "t", NEW)
    assert_same(load(tmp_path / "t"), NEW)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    save(tmp_path / "t", NEW)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    assert_same(load(tmp_path / "t"), NEW)


def test_a_read_error_is_a_checkpoint_error(tmp_path, monkeypatch):
    save(tmp_path / "t", NEW)
    monkeypatch.setattr(os, "preadv", Fail("preadv", 3, OSError(errno.EIO, "bad disk")))
    with pytest.raises(CheckpointError, match=r"cannot be read at byte \d+ \(.*bad disk\)"):
        load(tmp_path / "t")


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """ALICE (Pillai et al., OSDI 2014) found this order broken most often: data, name, folder."""
    calls = []

    def recording(name, real):
        def call(*args):
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("fsync folder" if folder else name)
            return real(*args)

        return call

    for name in ("mkdir", "write", "fsync", "replace"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    save(tmp_path / "new" / "deep" / "t", {"x": jnp.ones(3)})
    assert calls == ["mkdir", "fsync folder"] * 2 + [
        "write",
        "write",
        "fsync",
        "replace",
        "fsync folder",
    ]


def test_temporary_files_of_the_dead_are_swept_and_those_of_the_living_kept(tmp_path):
    for name in (".jaxnet-1-dead.tmp", ".jaxnet-2-alive.tmp", "other.tmp", ".jaxnet-note"):
        (tmp_path / name).write_bytes(b"")
    with open(tmp_path / ".jaxnet-2-alive.tmp") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        save(tmp_path / "t", OLD)
    assert sorted(os.listdir(tmp_path)) == [".jaxnet-2-alive.tmp", ".jaxnet-note", "other.tmp", "t"]


def test_a_temporary_file_that_was_swept_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    real, swept = fcntl.flock, []

    def flock(fd, how):
        if not swept:
            swept.extend(entry for entry in os.listdir(tmp_path))
            os.unlink(tmp_path / swept[0])
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    save(tmp_path / "t", OLD)
    assert len(swept) == 1 and os.listdir(tmp_path) == ["t"]
    # Its name tells the writer.
    assert re.fullmatch(rf"\.jaxnet-{os.getpid()}-[0-9a-f]+\.tmp", swept[0])


def test_without_locks_nothing_is_swept_and_saving_works(tmp_path, monkeypatch):
    (tmp_path / ".jaxnet-1-dead.tmp").write_bytes(b"")

    def flock(fd, how):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    save(tmp_path / "t", OLD)
    assert sorted(os.listdir(tmp_path)) == [".jaxnet-1-dead.tmp", "t"]


def test_two_writers_and_a_reader(tmp_path):
    trees = [{"x": jnp.full(2000, i)} for i in range(2)]
    save(tmp_path / "t", trees[0])
    seen, failures = set(), []

    def write(tree):
        try:
            for _ in range(20):
                save(tmp_path / "t", tree)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen |= set(np.unique(load(tmp_path / "t")["x"]).tolist())
    for thread in threads:
        thread.join()
    assert not failures and seen <= {0, 1} and os.listdir(tmp_path) == ["t"]


# -------------------------------------------------------------------------- paths, speed and memory


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ["relative", b"bytes", tmp_path / "a" / "b c" / "é.safetensors", "n" * 250]:
        save(path, OLD)
        assert_same(load(path), OLD)
    with pytest.raises(
        IsADirectoryError, match="a checkpoint is a file, this is a folder: add a file name"
    ):
        save(tmp_path / "a", OLD)
    with pytest.raises(IsADirectoryError, match="a checkpoint is a file, this is a folder"):
        load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="missing"):
        load("missing")
    with pytest.raises(NotADirectoryError):
        save("relative/x", OLD)
    os.mkfifo("pipe")
    with pytest.raises(CheckpointError, match="pipe: not a regular file"):
        load("pipe")
    with pytest.raises(
        FileExistsError, match="neither a file nor a folder, and will not be replaced"
    ):
        save("pipe", OLD)


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "t")
    # At first, the link points to nothing.
    for tree in (OLD, NEW):
        save(tmp_path / "link", tree)
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["t"]
        assert_same(load(tmp_path / "link"), tree)


def test_the_mode_of_the_old_file_is_kept(tmp_path):
    save(tmp_path / "t", OLD)
    umask = os.umask(0)
    os.umask(umask)
    # open() gives new files the same mode.
    assert stat.S_IMODE(os.stat(tmp_path / "t").st_mode) == 0o666 & ~umask
    os.chmod(tmp_path / "t", 0o600)
    save(tmp_path / "t", NEW)
    assert stat.S_IMODE(os.stat(tmp_path / "t").st_mode) == 0o600


def test_inspect_reads_only_the_header(tmp_path):
    size = 10 * 1000**3
    placed = layout([("w", "F32", (size // 4,))])
    manifest = {"version": 1, "metadata": {}, "tree": ["dict", [["w", ["jax", "float32"]]]]}
    (tmp_path / "t").write_bytes(
        fmt.write_header("", placed, manifest | {"crc32": ["0" * 8 * placed[0].chunks]})
    )
    # 10 GB that take no space on the disk.
    os.truncate(tmp_path / "t", os.path.getsize(tmp_path / "t") + size)
    start = time.perf_counter()
    info = inspect(tmp_path / "t")
    # Reading 10 GB would take seconds.
    assert time.perf_counter() - start < 0.5
    assert info.leaves == (Leaf("w", (size // 4,), "float32", size),)


def test_inspect_shows_all_leaves_in_the_order_of_the_tree(tmp_path):
    save(
        tmp_path / "t",
        {"b": jnp.ones(2, jnp.int8), "a": [np.ones((2, 3)), 7, "x"]},
        metadata={"m": 1},
    )
    info = inspect(tmp_path / "t")
    assert info.leaves == (Leaf("b", (2,), "int8", 2), Leaf("a/0", (2, 3), "float64", 48))
    assert (
        info.scalars == {"a/1": 7, "a/2": "x"} and info.metadata == {"m": 1} and info.version == 1
    )
    assert info.nbytes == os.path.getsize(tmp_path / "t") and info == verify(tmp_path / "t")


def test_memory(tmp_path):
    # The tree has 16 MiB.
    tree = {str(i): np.zeros(2 << 20, np.uint8) for i in range(8)}

    def peak(f, *args):
        tracemalloc.start()
        f(*args)
        _, result = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return result

    # Contiguous arrays are written from where they are.
    assert peak(save, tmp_path / "t", tree) < 1 << 20
    # Two leaves, not eight.
    assert peak(save, tmp_path / "t", {key: x[::-1] for key, x in tree.items()}) < 5 << 20
    assert peak(load, tmp_path / "t") < 18 << 20
    # Each thread holds one block.
    assert peak(verify, tmp_path / "t") < 5 << 20


def test_all_arrays_go_to_the_device_in_one_call(tmp_path, monkeypatch):
    """2,000 leaves: 0.11 s in one call, 0.15 s one by one (a CPU; a GPU adds a round trip to each
    call).
    """
    tree, calls, real = (
        [jnp.zeros(3), {"a": jnp.ones((2, 2)), "b": 1}, np.ones(2)],
        [],
        jax.device_put,
    )
    save(tmp_path / "t", tree)
    monkeypatch.setattr(jax, "device_put", lambda x, *args: calls.append(len(x)) or real(x, *args))
    assert_same(load(tmp_path / "t"), tree)
    assert calls == [2]
