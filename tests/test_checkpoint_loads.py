"""Load a part of a file: chosen leaves, other names, other dtypes, templates that share only some
leaves, one leaf. Expected values come from `jaxnet.tree.split` (the part of a tree), from the IEEE
754 formats (the numbers that a dtype can hold) and from exact integer arithmetic in Python.
"""

import collections
import contextlib
import math
import os
import tracemalloc
import zlib
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from test_checkpoint import DTYPES, Pair, damages

import jaxnet
from jaxnet import train
from jaxnet import tree as trees
from jaxnet.checkpoint import CheckpointError, inspect, lazy, load, save
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import WIDENED
from jaxnet.checkpoint.structure import leaf_name, leaf_path
from jaxnet.checkpoint.tensors import crc_start, layout


def block(i):
    return {"kernel": jnp.full((2, 3), i, jnp.float32), "bias": jnp.full(3, i, jnp.int32)}


PARAMS = {"blocks": [block(1), block(2)], "head": block(3), "scale": 2.5}
STATE = {
    "params": PARAMS,
    "opt": optax.adam(1e-3).init({"head": block(3)}),
    "key": jax.random.key(7),
    "names": {"a/b": np.arange(3), "none": None, "empty": {}},
    "counts": {4: "four", -1: 5},
    "ordered": collections.OrderedDict(z=1, a=np.float64(2)),
}


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "t", STATE)
    return tmp_path / "t"


def assert_equal(got, expected):
    """Assert the same structure (of dicts without order), types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y) and np.shape(x) == np.shape(y)
        if isinstance(y, jax.Array) and jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@contextlib.contextmanager
def reads(monkeypatch):
    """Record the bytes of files that are read: a list of (position, length)."""
    real, seen = os.preadv, []

    def preadv(fd, buffers, position):
        seen.append((position, sum(map(len, buffers))))
        return real(fd, buffers, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield seen


def damage(path, leaf):
    """Flip a bit in the data of one leaf."""
    data = bytearray(path.read_bytes())
    header = fmt.read_header("", bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]), len(data))
    tensor = next(t for t in header.tensors if t.name == leaf)
    data[header.data + tensor.start] ^= 1
    path.write_bytes(data)


# ----------------------------------------------------------------------------------------- pattern=


@pytest.mark.parametrize(
    "only",
    [
        "params",
        "params/blocks/*/kernel",
        "**/bias",
        "params/blocks/1",
        "params/scale",
        "key",
        ["**/kernel", "names"],
        "",
    ],
    ids=str,
)
def test_a_part_of_a_file_is_the_part_of_the_tree(only, path):
    """`jaxnet.tree.split` defines the remainder of a list whose elements are only partly chosen."""
    patterns = [only] if isinstance(only, str) else only
    like, _ = trees.split(STATE, *patterns)
    got = load(path, like=like, pattern=only)
    assert_equal(got, like)
    save(path.with_name("part"), like)
    assert_equal(load(path, pattern=only), load(path.with_name("part")))


PATTERNS = st.lists(st.sampled_from(["a", "b", "0", "1", "*", "**"]), min_size=1, max_size=3).map(
    "/".join
)
TREES = st.recursive(
    st.integers(0, 9).map(np.int32) | st.none(),
    lambda x: st.one_of(
        st.lists(x, max_size=2),
        st.lists(x, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("ab"), x),
        st.dictionaries(st.sampled_from("ab"), x).map(collections.OrderedDict),
        st.builds(lambda a, b: {"a": a, "b": b}, x, x),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(tree=TREES, pattern=PATTERNS)
def test_any_part_of_any_tree(tree, pattern, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "part"
    save(path, tree)
    if not any(trees.matches(name, pattern) for name in trees.paths(tree)):
        with pytest.raises(CheckpointError, match="no path matches"):
            load(path, pattern=pattern)
        return
    expected, _ = trees.split(tree, pattern)
    assert_equal(load(path, pattern=pattern), expected)
    assert_equal(load(path, like=expected, pattern=pattern), expected)


def test_only_the_chosen_leaves_are_read_and_checked(path, monkeypatch):
    damage(path, "params/head/kernel")
    with pytest.raises(CheckpointError, match="leaf 'params/head/kernel': its bytes"):
        load(path)
    with reads(monkeypatch) as seen:
        got = load(path, pattern="params/blocks/*/kernel")
    assert_equal(got, {"params": {"blocks": [{"kernel": block(i)["kernel"]} for i in (1, 2)]}})
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    # The two kernels have 6 float32s each.
    assert [n for position, n in seen if position >= header] == [24, 24]
    with pytest.raises(CheckpointError, match="leaf 'params/head/kernel': its bytes"):
        load(path, pattern=["params/blocks", "**/head"])


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(path):
    with pytest.raises(CheckpointError) as caught:
        load(path, pattern=["params/head", "params/block/*/kernel"])
    assert caught.value.path == str(path)
    assert caught.value.reason.startswith(
        "no path matches 'params/block/*/kernel'; the nearest of 18 are ["
    )
    assert "params/blocks/0/kernel" in caught.value.reason
    with pytest.raises(ValueError, match="pattern must be a pattern of paths or several, got none"):
        load(path, pattern=[])


def test_a_template_must_be_the_part_that_was_chosen(path):
    with pytest.raises(
        CheckpointError,
        match="what `pattern` selects does not fit (.|\n)* missing from the file: head/bias",
    ):
        load(path, like=PARAMS, pattern="params/scale")
    with pytest.raises(
        CheckpointError, match="container differs: params/blocks: template tuple, file list"
    ):
        load(path, like={"params": {"blocks": (None, block(2))}}, pattern="params/blocks/1")


def test_a_part_of_another_programs_file(tmp_path):
    safetensors.numpy.save_file(
        {"enc.0/w": np.ones(2, np.float32), "dec/w": np.zeros(1, np.float32)}, tmp_path / "f"
    )
    assert_equal(load(tmp_path / "f", pattern="enc.*"), {"enc.0": {"w": jnp.ones(2)}})


# ------------------------------------------------------------------------------------------ rename=


def test_a_dict_of_prefixes_renames_leaves_and_nodes(path):
    like = {
        "weights": {"layers": {"0": block(1), "second": block(2)}, "scale": 0.0},
        "out": block(0),
    }
    rename = {
        "params": "weights",
        "params/blocks": "weights/layers",
        # The longest path that fits counts.
        "params/blocks/1": "weights/layers/second",
        "params/head": "out",
    }
    expected = {
        "weights": {"layers": {"0": block(1), "second": block(2)}, "scale": 2.5},
        "out": block(3),
    }
    got = load(path, rename=rename, pattern=["weights", "out"])  # `pattern` speaks of the new paths
    assert_equal(got, expected)
    assert_equal(load(path, like=like, rename=rename, pattern=["weights", "out"]), expected)
    # Containers are those of `like`.
    lists = like | {"weights": {"layers": Pair(block(0), block(0)), "scale": 0.0}}
    got = load(
        path, like=lists, rename={**rename, "params/blocks/0": "weights/layers/first"}, strict=False
    )
    assert_equal(got["weights"]["layers"], Pair(block(1), block(2)))


def test_names_can_be_swapped(tmp_path):
    save(tmp_path / "t", {"a": 1, "b": {"c": 2}})
    assert load(tmp_path / "t", rename={"a": "b", "b": "a"}) == {"b": 1, "a": {"c": 2}}


def test_the_top_of_the_tree_is_the_empty_path(tmp_path):
    save(tmp_path / "t", block(1))
    assert_equal(load(tmp_path / "t", rename={"": "params/head"}), {"params": {"head": block(1)}})
    save(tmp_path / "t", {"params": block(1)})
    assert_equal(load(tmp_path / "t", rename={"params": ""}), block(1))
    save(tmp_path / "t", {"x": 3})
    assert (
        load(tmp_path / "t", rename={"x": ""}) == 3
        and load(tmp_path / "t", like=0, rename={"x": ""}) == 3
    )


def test_a_function_renames_every_leaf(tmp_path):
    """The usual case: a file of another program whose names have dots."""
    flat = {
        "encoder.layer.0.weight": np.ones((2, 3), np.float32),
        "encoder.bias": np.zeros(3, np.float32),
    }
    safetensors.numpy.save_file(flat, tmp_path / "f")
    expected = {"encoder": {"layer": [{"kernel": jnp.ones((2, 3))}], "bias": jnp.zeros(3)}}
    got = load(
        tmp_path / "f",
        like=expected,
        rename=lambda p: p.replace(".", "/").replace("weight", "kernel"),
    )
    assert_equal(got, expected)
    with pytest.raises(
        TypeError, match="rename must give a str for each path, got None for 'encoder.bias'"
    ):
        load(tmp_path / "f", rename=lambda p: None if "bias" in p else p)  # pyright: ignore[reportArgumentType]


def test_keys_with_a_slash_keep_it(path):
    got = load(path, rename={"names": "n"}, pattern=["n", "counts"])
    assert_equal(got, {"n": {"a/b": np.arange(3)}, "counts": {"4": "four", "-1": 5}})
    for steps in [(), ("a",), ("a/b", "~", ""), ("__metadata__",), ("~1", "~01")]:
        assert leaf_path(leaf_name(steps)) == steps


def test_collisions_and_unknown_names_are_errors(path):
    with pytest.raises(
        CheckpointError, match=r"leaf 'params/head/bias': rename gives this path to '.*' and '.*'"
    ):
        load(path, rename={"params/head/kernel": "params/head/bias"})
    text = (
        "leaf 'params/scale': rename makes 'params/scale' of the file a leaf here, and puts "
        "'key' below it"
    )
    with pytest.raises(CheckpointError, match=text):
        load(path, rename={"key": "params/scale/key"})
    # The root cannot be a leaf if there are other leaves, which would be lost.
    with pytest.raises(
        CheckpointError, match="leaf '': rename makes 'key' of the file a leaf here"
    ):
        load(path, rename={"key": ""})
    with pytest.raises(
        CheckpointError,
        match="no path matches 'params/heads'; the nearest of 18 are .*params/head/",
    ):
        load(path, rename={"params/heads": "out"})
    with pytest.raises(CheckpointError, match="no path matches"):
        # The keys are paths, not patterns.
        load(path, rename={"params/*": "out"})


def test_a_renamed_leaf_must_still_fit(path):
    with pytest.raises(
        CheckpointError,
        match=r"shape differs: out/kernel: template float32\[3,2\], file float32\[2,3\]",
    ):
        load(
            path,
            like={"out": block(0) | {"kernel": jnp.zeros((3, 2))}},
            rename={"params/head": "out"},
            pattern="out",
        )


def test_guesses_at_renames_can_be_pasted(tmp_path):
    save(tmp_path / "t", {"encoder": {"a": block(1), "b": block(2)}, "head": block(3), "step": 3})
    like = {
        "enc": {"a": block(0), "b": block(0)},
        "head": {"weights": jnp.zeros((2, 3)), "bias": block(0)["bias"]},
        "step": 0,
    }
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "t", like=like)
    *_, first, second, last = caught.value.reason.split("\n  ")
    assert first == "perhaps renamed: encoder in the file is enc in the template (4 leaves)"
    assert second == "perhaps renamed: head/kernel in the file is head/weights in the template"
    assert last == "if so: rename={'encoder': 'enc', 'head/kernel': 'head/weights'}"
    rename = eval(last.split("rename=")[1])
    head = {"weights": block(3)["kernel"], "bias": block(3)["bias"]}
    expected = {"enc": {"a": block(1), "b": block(2)}, "head": head, "step": 3}
    assert_equal(load(tmp_path / "t", like=like, rename=rename), expected)


def test_a_guess_that_the_whole_tree_moved(tmp_path):
    save(tmp_path / "t", {"params": {"a": block(1), "b": block(2)}})
    like = {"a": block(0), "b": block(0)}
    with pytest.raises(
        CheckpointError,
        match="perhaps renamed: params in the file is the root in the template .4 leaves",
    ):
        load(tmp_path / "t", like=like)
    assert_equal(
        load(tmp_path / "t", like=like, rename={"params": ""}), {"a": block(1), "b": block(2)}
    )


# ------------------------------------------------------------------------------------- strict=False


def test_missing_leaves_keep_their_values_and_others_are_ignored(path, monkeypatch):
    like = {
        "params": {"blocks": [block(8), block(9)], "adapter": block(5), "scale": 0.0},
        "note": "new",
    }
    # Ignored leaves are not even read.
    damage(path, "params/head/kernel")
    got = load(path, like=like, strict=False)
    expected = {
        "params": {"blocks": [block(1), block(2)], "adapter": block(5), "scale": 2.5},
        "note": "new",
    }
    assert_equal(got, expected)
    assert got["params"]["adapter"]["kernel"] is like["params"]["adapter"]["kernel"]
    abstract = jax.eval_shape(lambda: {"params": {"blocks": [block(0), block(0)]}})
    assert_equal(
        load(path, like=abstract, strict=False), {"params": {"blocks": [block(1), block(2)]}}
    )


def test_only_and_strict_load_a_part_into_a_whole(path):
    like = {"params": {"blocks": [block(8), block(9)], "head": block(0), "scale": 0.0}}
    got = load(path, like=like, pattern="params/head", strict=False)
    assert_equal(got, {"params": {"blocks": [block(8), block(9)], "head": block(3), "scale": 0.0}})


def test_what_has_no_value_cannot_be_kept(path):
    deleted = jnp.ones(3)
    deleted.delete()
    like = {"params": {"scale": 0.0, "a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": deleted}}
    with pytest.raises(CheckpointError) as caught:
        load(path, like=like, strict=False)
    assert caught.value.reason.split("\n  ")[1:] == [
        "missing from the file: params/a float32[2], and `like` has no value",
        "missing from the file: params/b float32[3], and `like` has no value",
    ]


HEAD = {"head": block(3)}
LOOSE_MISFITS = {
    "shape": (
        {"head": {"kernel": jnp.zeros((3, 2))}},
        r"shape differs: head/kernel: template float32\[3,2\]",
    ),
    "dtype": (
        {"head": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}},
        "dtype differs: head/kernel: template bfloat16",
    ),
    "container": ({"head": [jnp.zeros(3)]}, "container differs: head: template list, file dict"),
    "nothing in common": (
        {"tail": block(3)},
        r"perhaps renamed: head in (.|\n)*have no path in common",
    ),
}


@pytest.mark.parametrize("name", LOOSE_MISFITS)
def test_what_both_have_must_fit(name, tmp_path):
    like, match = LOOSE_MISFITS[name]
    save(tmp_path / "t", HEAD)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / "t", like=like, strict=False)


def test_cast_and_strict_need_a_template(path):
    for cast, strict in ((True, True), (False, False)):
        with pytest.raises(ValueError, match="need a tree `like`"):
            load(path, cast=cast, strict=strict)


# ---------------------------------------------------------------------------------------- cast=True

# IEEE 754; bfloat16: the upper half of float32.
MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


def cast_to(path, x, dtype):
    save(path, {"x": x})
    return np.asarray(load(path, like={"x": np.zeros(np.shape(x), dtype)}, cast=True)["x"])


@pytest.mark.parametrize(
    "source, values, target, refused",
    [
        # These are rounded.
        ("float32", [1 / 3, -0.0, 1e-30], "bfloat16", None),
        ("float32", [np.nan, np.inf, -np.inf], "float16", None),
        # This number is too small, and the nearest number is 0.
        ("float32", [1e-30], "float16", None),
        ("float32", [1.0, 70000.0, -1e9], "float16", ("2 of 3", "70000.0")),  # > 65504
        ("float32", [3.4e38], "bfloat16", ("1 of 1", "3.4e+38")),
        ("float64", [1e39], "float32", ("1 of 1", "1e+39")),
        # > 448, and this type has no infinity:
        ("float32", [500.0], "float8_e4m3fn", ("1 of 1", "500.0")),
        ("float32", [1.0, np.inf], "float8_e4m3fn", ("1 of 2", "inf")),
        ("float32", [7.0], "float4_e2m1fn", ("1 of 1", "7.0")),  # > 6: it would be silently 6
        ("float32", [np.nan], "float4_e2m1fn", ("1 of 1", "nan")),
        # The format has no sign.
        ("float32", [-2.0], "float8_e8m0fnu", ("1 of 1", "-2.0")),
        ("bfloat16", [1.5, -3e38], "float64", None),
        ("float32", [2.0, -0.0, -128.0], "int8", None),
        ("float32", [0.7], "int32", ("1 of 1", "0.7")),
        ("float32", [np.nan, np.inf, 0], "int32", ("2 of 3", "nan")),
        ("float32", [2.0**31], "int32", ("1 of 1", "2.1474836e+09")),
        ("float32", [-(2.0**31)], "int32", None),
        ("float64", [2.0**63], "int64", ("1 of 1", "9.223372036854776e+18")),
        ("float64", [2.0**63], "uint64", None),
        ("float64", [-1.0], "uint64", ("1 of 1", "-1.0")),
        ("float32", [7.0, -8.0], "int4", None),
        ("float32", [8.0], "int4", ("1 of 1", "8.0")),
        ("int32", [16777216], "float32", None),
        # The number is 2^24 + 1.
        ("int32", [16777217], "float32", ("1 of 1", "16777217")),
        ("int64", [2**53 + 1], "float64", ("1 of 1", "9007199254740993")),
        ("int64", [2**63 - 1], "float64", ("1 of 1", "9223372036854775807")),
        ("uint64", [2**64 - 1, 2**63], "float64", ("1 of 2", "18446744073709551615")),
        ("int32", [100000], "float16", ("1 of 1", "100000")),
        # The format has no zero.
        ("int32", [0], "float8_e8m0fnu", ("1 of 1", "0")),
        ("int32", [-1, 300], "uint8", ("2 of 2", "-1")),
        ("int8", [127, -128], "int64", None),
        ("uint64", [2**63], "int64", ("1 of 1", "9223372036854775808")),
        ("int8", [1, 0], "bool", None),
        ("float32", [1, 0], "bool", None),
        ("int8", [2], "bool", ("1 of 1", "2")),
        ("bool", [True, False], "float16", None),
        ("bool", [True], "int4", None),
        ("int4", [-8], "uint4", ("1 of 1", "-8")),
        ("int32", [3], "complex64", None),
        ("float64", [0.1], "complex64", None),
        ("complex128", [1 + 0.1j, complex(np.inf, 0)], "complex64", None),
        ("complex64", [1 + 0j], "float32", None),
        ("complex64", [1 + 1e-9j], "float32", ("1 of 1", "(1+1e-09j)")),
        ("complex128", [1e39j], "complex64", ("1 of 1", "1e+39j")),
        ("complex64", [2 + 0j], "uint8", None),
    ],
)
def test_a_cast_rounds_floats_and_is_exact_for_all_else(source, values, target, refused, tmp_path):
    x = np.array(values, np.complex128 if "complex" in source else None).astype(DTYPES[source])
    if refused is None:
        got = cast_to(tmp_path / "t", x, DTYPES[target])
        with np.errstate(all="ignore"):
            real = "complex" in source and "complex" not in target
            expected = (np.real(x) if real else x).astype(DTYPES[target])
        assert got.dtype == DTYPES[target] and got.tobytes() == expected.tobytes()
        return
    with pytest.raises(CheckpointError, match="would change by more than rounding") as caught:
        cast_to(tmp_path / "t", x, DTYPES[target])
    count, first = refused
    assert (
        f"x: {count} values of {source}[{len(x)}] do not fit {target}, the first is"
        in caught.value.reason
    )
    assert first in caught.value.reason.rpartition("the first is")[2]


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    x=st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2**25), 2**25)
    | st.integers(0, 63).map(lambda n: 2**n + 1),
    target=st.sampled_from(
        ["bfloat16", "float16", "float32", "float64", "int8", "uint16", "int32", "uint64"]
    ),
)
def test_an_integer_comes_through_if_the_target_has_it(x, target, tmp_path_factory):
    """A number of a format has an odd part of at most p bits, and is not greater than the largest
    number.
    """
    source = "int64" if x < 2**63 else "uint64"
    if target in MANTISSA:
        odd = abs(x) // (x & -x) if x else 0
        fits = odd.bit_length() <= MANTISSA[target] and abs(x) <= float(
            ml_dtypes.finfo(DTYPES[target]).max
        )
    else:
        fits = np.iinfo(target).min <= x <= np.iinfo(target).max
    path = tmp_path_factory.getbasetemp() / "cast"
    if fits:
        assert Fraction(float(cast_to(path, np.array(x, source), DTYPES[target]))) == Fraction(
            float(x)
        )
    else:
        with pytest.raises(CheckpointError, match="do not fit"):
            cast_to(path, np.array(x, source), DTYPES[target])


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    x=st.floats(), target=st.sampled_from(["float32", "float16", "bfloat16", "int16", "uint32"])
)
def test_a_float_is_rounded_to_a_float_and_never_to_an_integer(x, target, tmp_path_factory):
    path, dtype = tmp_path_factory.getbasetemp() / "cast", DTYPES[target]
    if target in MANTISSA:
        fits = not math.isfinite(x) or abs(x) <= float(ml_dtypes.finfo(dtype).max)
    else:
        fits = x.is_integer() and np.iinfo(dtype).min <= x <= np.iinfo(dtype).max
    if not fits:
        with pytest.raises(CheckpointError, match="do not fit"):
            cast_to(path, np.float64(x), dtype)
        return
    got = float(cast_to(path, np.float64(x), dtype))
    if math.isfinite(x):
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal) if target in MANTISSA else 0
        assert abs(Fraction(got) - Fraction(x)) <= max(
            abs(Fraction(x)) / 2 ** MANTISSA.get(target, 99), Fraction(tiny) / 2
        )
    else:
        assert got == x or math.isnan(got) and math.isnan(x)


NARROW = [
    name
    for name, dtype in DTYPES.items()
    if jnp.issubdtype(dtype, np.floating) and dtype.itemsize <= 2
]


@pytest.mark.parametrize("source", ["float64", "float32"])
@pytest.mark.parametrize("target", NARROW)
def test_a_cast_gives_the_nearest_of_all_numbers(target, source, tmp_path):
    """Every midpoint of two neighbors goes to the even one, and the next numbers go to their own
    side. The midpoints are exact in float64, and those of all 13 types in float32. Each target is
    decoded from all its bits.
    """
    dtype, wide = DTYPES[target], np.dtype(source)
    bits = {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}.get(
        target, 8 * dtype.itemsize
    )
    codes = np.arange(2**bits, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        numbers = codes.view(dtype).astype(np.float64)
    finite = np.isfinite(numbers)
    numbers, where = np.unique(numbers[finite], return_index=True)
    even = codes[finite][where][:-1] % 2 == 0
    low, high = numbers[:-1], numbers[1:]
    middle = ((low + high) / 2).astype(wide)
    assert (middle.astype(np.float64) == (low + high) / 2).all()
    infinity = np.full_like(middle, np.inf)
    below, above = np.nextafter(middle, -infinity), np.nextafter(middle, infinity)
    x = np.concatenate(
        [below, above, np.nextafter(below, -infinity), np.nextafter(above, infinity)]
    )
    expected = np.concatenate([low, high, low, high])
    # The format has no bit that could be even.
    if target != "float8_e8m0fnu":
        x, expected = (
            np.concatenate([x, middle]),
            np.concatenate([expected, np.where(even, low, high)]),
        )
    got = cast_to(tmp_path / "t", x, dtype)
    np.testing.assert_array_equal(got.astype(np.float64), expected)


def test_all_lossy_casts_are_listed_with_their_paths(tmp_path):
    save(
        tmp_path / "t",
        {"a": jnp.array([1.0, 70000.0]), "b": {"c": jnp.array([0.5])}, "d": jnp.ones(3)},
    )
    like = {
        "a": jnp.zeros(2, jnp.float16),
        "b": {"c": jnp.zeros(1, jnp.int8)},
        "d": jnp.zeros(3, jnp.bfloat16),
    }
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "t", like=like, cast=True)
    assert caught.value.reason.split("\n  ")[1:] == [
        "a: 1 of 2 values of float32[2] do not fit float16, the first is 70000.0",
        "b/c: 1 of 1 values of float32[1] do not fit int8, the first is 0.5",
    ]


def test_a_cast_is_only_of_arrays_and_keeps_shapes(tmp_path):
    save(tmp_path / "t", {"n": 3, "k": jax.random.key(0), "x": jnp.ones((2, 3))})
    like = {"n": 3.0, "k": jnp.zeros(2, jnp.uint32), "x": jnp.zeros((3, 2), jnp.bfloat16)}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "t", like=like, cast=True)
    assert caught.value.reason.split("\n  ")[1:] == [
        "dtype differs: n: template float, file int",
        "shape differs: k: template uint32[2], file key<threefry2x32>[]",
        "shape differs: x: template bfloat16[3,2], file float32[2,3]",
    ]


def test_a_cast_gives_the_kinds_and_places_of_the_template(tmp_path):
    save(
        tmp_path / "t",
        {"a": np.arange(3.0), "b": jnp.ones((3, 2)), "c": np.float64(2), "d": jnp.arange(4)},
    )
    like = {
        "a": jnp.zeros(3),
        "b": np.zeros((3, 2), np.float16),
        "c": np.float32(0),
        "d": jnp.zeros(4, jnp.int32),
    }
    expected = {
        "a": jnp.arange(3.0),
        "b": np.ones((3, 2), np.float16),
        "c": np.float32(2),
        "d": jnp.arange(4),
    }
    assert_equal(load(tmp_path / "t", like=like, cast=True), expected)
    wide = jax.ShapeDtypeStruct((3, 2), np.float64)
    got = load(tmp_path / "t", like=like | {"b": wide}, cast=True)["b"]
    # JAX would narrow it while x64 is off.
    assert isinstance(got, np.ndarray) and got.dtype == np.float64


def test_the_first_value_that_does_not_fit_is_found_behind_a_million_others(tmp_path):
    x = np.zeros((1 << 20) + 5, np.int32)
    x[-2:] = 300, 400
    with pytest.raises(CheckpointError, match="2 of 1048581 values .* the first is 300"):
        cast_to(tmp_path / "t", x, np.uint8)


def test_all_options_together(path):
    like = {"h": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "extra": jnp.ones(1)}, "n": 1}
    got = load(
        path, like=like, pattern="h/kernel", rename={"params/head": "h"}, strict=False, cast=True
    )
    assert_equal(
        got, {"h": {"kernel": jnp.full((2, 3), 3, jnp.bfloat16), "extra": jnp.ones(1)}, "n": 1}
    )


# ----------------------------------------------------------------------------------------- one leaf


def test_a_lazy_file_is_a_mapping_of_its_leaves(path):
    with lazy(path) as leaves:
        assert set(leaves) == {leaf.path for leaf in inspect(path).leaves} | set(
            inspect(path).scalars
        )
        assert len(leaves) == 18 and "params/scale" in leaves and "params" not in leaves
        kernel = leaves["params/blocks/1/kernel"]
        assert_equal(dict(leaves)["names/a~1b"], np.arange(3))
        assert_equal(
            [leaves["params/scale"], leaves["counts/4"], leaves["ordered/a"]],
            [2.5, "four", np.float64(2)],
        )
        assert_equal(leaves["key"], jax.random.key(7))
    # Arrays outlive the block.
    assert_equal(kernel, np.full((2, 3), 2, np.float32))
    with pytest.raises(ValueError, match="has been closed: look leaves up inside the `with` block"):
        leaves["key"]


def test_lazy_arrays_are_read_only_views_of_every_dtype(tmp_path):
    tree = {
        name: np.arange(2).astype(dtype)
        for name, dtype in DTYPES.items()
        if name != "float8_e8m0fnu"
    }
    tree |= {"nothing": np.zeros((0, 3))}
    save(tmp_path / "t", tree)
    with lazy(tmp_path / "t") as leaves:
        got = dict(leaves)
    assert_equal(got, tree)
    for name, x in got.items():
        with pytest.raises(ValueError, match="read-only"):
            x[...] = x
        assert name in WIDENED or not x.flags.owndata


def test_an_unknown_leaf_is_a_key_error_with_near_names(path):
    with (
        lazy(path) as leaves,
        pytest.raises(KeyError, match="no leaf 'params/haed/bias'; .* 18 are .'params/head/bias'"),
    ):
        leaves["params/haed/bias"]


def test_lazy_leaves_are_checked_when_they_are_first_looked_up(path, monkeypatch):
    damage(path, "params/head/kernel")
    with reads(monkeypatch) as seen, lazy(path) as leaves:
        opened = len(seen)
        assert_equal(leaves["params/head/bias"], np.full(3, 3, np.int32))
        assert [n for _, n in seen[opened:]] == [12]
        leaves["params/head/bias"]
        # The leaf was read once.
        assert len(seen) == opened + 1
        for _ in range(2):
            with pytest.raises(CheckpointError, match="leaf 'params/head/kernel': its bytes"):
                leaves["params/head/kernel"]


def test_a_part_of_a_damaged_file_is_right_or_refused(path):
    """Damage to the part that is read is always noticed.

    Damage elsewhere may go unnoticed, because it is not read.
    """
    expected, noticed = load(path, pattern="params"), 0
    bad = path.with_name("bad")
    for _, data in damages(path.read_bytes(), 400, seed=0):
        bad.write_bytes(data)
        got = None
        with contextlib.suppress(CheckpointError):
            got = load(bad, pattern="params")
        if got is None:
            noticed += 1
        else:
            assert_equal(got, expected)
        with pytest.raises(CheckpointError), lazy(bad) as leaves:
            dict(leaves)
    # Most damage is in the header, which is always read.
    assert 300 < noticed < 400


def test_one_leaf_of_ten_gigabytes_costs_that_leaf(tmp_path, monkeypatch):
    size = 10 * 1000**3
    placed = layout([("big", "F32", (size // 4,)), ("small", "F32", (1000,))])
    sums = [f"{crc_start(t, 0):08x}" * t.chunks for t in placed]
    tree = ["dict", [[name, ["jax", "float32"]] for name in ("big", "small")]]
    x = np.arange(1000, dtype=np.float32)
    sums[1] = f"{zlib.crc32(x.tobytes(), crc_start(placed[1], 0)):08x}"
    header = fmt.write_header(
        "", placed, {"version": 1, "metadata": {}, "tree": tree, "crc32": sums}
    )
    # The file is sparse: the big leaf takes no space on the disk.
    with open(tmp_path / "t", "wb") as f:
        f.write(header)
        f.seek(len(header) + placed[1].start)
        f.write(x.tobytes())
    for read in (
        lambda: load(tmp_path / "t", pattern="small")["small"],
        lambda: lazily(tmp_path / "t", "small"),
    ):
        tracemalloc.start()
        with reads(monkeypatch) as seen:
            got = read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(got, x)
        assert sum(n for _, n in seen) == len(header) + 4000 and peak < 1 << 20


def lazily(path, leaf):
    with lazy(path) as leaves:
        return leaves[leaf]


def test_lazy_arrays_survive_the_replacing_and_the_deletion_of_their_file(tmp_path):
    save(tmp_path / "t", {"x": np.arange(1000)})
    with lazy(tmp_path / "t") as leaves:
        save(tmp_path / "t", {"x": np.zeros(1000)})
        x = leaves["x"]
    os.unlink(tmp_path / "t")
    np.testing.assert_array_equal(x, np.arange(1000))


def test_lazy_files_are_closed_also_after_an_error(path):
    before = len(os.listdir("/dev/fd"))
    for error in (RuntimeError("mine"), None):
        with contextlib.suppress(RuntimeError), lazy(path) as leaves:
            leaves["params/head/kernel"]
            if error:
                raise error
    assert len(os.listdir("/dev/fd")) == before
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="too few|announce"), lazy(path):
        pass
    assert len(os.listdir("/dev/fd")) == before


def test_lazy_reads_other_programs_files(tmp_path):
    safetensors.numpy.save_file(
        {"a/b": np.arange(5, dtype=np.int16), "c": np.ones(1, np.float64)}, tmp_path / "f"
    )
    with lazy(tmp_path / "f") as leaves:
        assert_equal(
            trees.unflatten(leaves), {"a": {"b": np.arange(5, dtype=np.int16)}, "c": np.ones(1)}
        )


# --- parts of trees with empty containers, wrong arguments ----------------------------------------


@pytest.mark.parametrize("only", ["a", "a/**", ["a"], ["a/w"]])
def test_a_part_with_empty_containers_fits_its_template(tmp_path, only):
    """Every train state has empty containers: `state={}` of a stateless network, the EmptyState of
    optax.
    """
    file = tmp_path / "a.safetensors"
    jaxnet.save(file, {"a": {"w": jnp.ones(2), "s": {}, "t": ()}, "b": 1})
    like = {"a": {"w": jnp.zeros(2), "s": {}, "t": ()}}
    loaded = jaxnet.load(file, like=like, pattern=only)
    assert jax.tree.structure(loaded) == jax.tree.structure(like) and loaded["a"]["w"].tolist() == [
        1,
        1,
    ]
    with pytest.raises(CheckpointError, match="missing from the file: a/v"):
        jaxnet.load(file, like={"a": {"v": jnp.zeros(2), "s": {}}}, pattern="a")


def test_the_state_of_a_run_is_a_part_of_its_file(tmp_path):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    start = train.TrainState.create({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    file = tmp_path / "run.safetensors"
    jaxnet.save(file, {"train_state": start, "best": None})
    loaded = jaxnet.load(file, like={"train_state": start}, pattern="train_state")["train_state"]
    assert jax.tree.structure(loaded) == jax.tree.structure(start)


def test_networks_and_swapped_arguments_are_answered_in_words(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(
        CheckpointError, match="a network is code and holds no arrays: save its parameters"
    ):
        jaxnet.save(file, {"net": jaxnet.dense(3)})
    jaxnet.save(file, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="a network is code and holds no arrays"):
        jaxnet.load(file, like=jaxnet.dense(3))
    with pytest.raises(TypeError, match=r"save takes the path first: save\(path, tree\)"):
        jaxnet.save({"w": jnp.ones(2)}, str(file))  # pyright: ignore[reportArgumentType]


# --- parts of the file of a run -------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A file that `fit` wrote, with a best evaluation, and the run."""

    def loss(params, batch):
        return ((network.apply(params, batch["x"]) - batch["y"]) ** 2).mean(axis=-1)

    network, optimizer = jaxnet.chain(a=jaxnet.dense(4), b=jaxnet.dense(1)), optax.adam(0.1)
    x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
    data = {"x": x, "y": x[:, :1]}
    start = train.TrainState.create(
        network.init(jax.random.key(0), x), optimizer, jax.random.key(1)
    )
    file = tmp_path_factory.mktemp("run") / "run.safetensors"
    step, test = (
        train.train_step(loss, optimizer),
        train.evaluate(lambda p, batch: {"error": loss(p, batch)}, data),
    )
    run = train.fit(
        step,
        start,
        data,
        batch_size=8,
        epochs=3,
        evaluate=test,
        best_rule="min error",
        checkpoint=file,
    )
    return file, run


def pasted(error, like):
    """The result of the call that an error ends with."""
    return eval("load(" + str(error).rpartition("load(")[2], {"load": load, "like": like})


@pytest.mark.parametrize("strict", [True, False])
def test_a_template_of_a_part_of_a_run_is_answered_with_the_call(strict, run_file):
    file, run = run_file
    state = run.train_state
    some = {"b": state.params["b"]}
    cases = [
        ("train_state/params", state.params, state.params),
        ("train_state/params", some, some),
        ("train_state", state, state),
        ("train_state", {"params": state.params}, {"params": state.params}),
        ("train_state/params", {"a": state.params["a"]}, {"a": state.params["a"]}),
        (
            "best",
            {"params": run.best.params, "value": 0.0},
            {"params": run.best.params, "value": run.best.value},
        ),
    ]
    for place, like, expected in cases:
        with pytest.raises(CheckpointError) as caught:
            load(file, like=like, strict=strict)
        assert f"fit wrote this file, and paths of `like` are below '{place}' there: load(" in str(
            caught.value
        )
        assert len(str(caught.value).splitlines()) == 2
        assert_equal(pasted(caught.value, like), expected)


def test_a_template_with_more_than_a_run_has_gets_the_differences_and_the_call(run_file, tmp_path):
    file, run = run_file
    params = run.train_state.params
    with pytest.raises(CheckpointError, match="missing from the file: new/w float32.2.") as caught:
        load(file, like=params | {"new": {"w": jnp.ones(2)}})
    assert "below 'train_state/params' there: load(" in str(caught.value).splitlines()[-1]
    # No path fits anywhere, or the file is not one of `fit`.
    save(tmp_path / "a", {"train_state": {"params": params}})
    for path, like in [(file, {"new": jnp.ones(2)}), (tmp_path / "a", params)]:
        with pytest.raises(CheckpointError) as caught:
            load(path, like=like)
        assert "fit wrote this file" not in str(caught.value)


def test_only_takes_new_paths_or_paths_of_the_file(run_file, tmp_path):
    file, run = run_file
    params = run.train_state.params
    for only, new, expected in [
        ("params", "params", {"params": params}),
        ("train_state/params", "params", {"params": params}),
        (
            "train_state/params/*/kernel",
            "",
            {name: {"kernel": x["kernel"]} for name, x in params.items()},
        ),
        (["a", "train_state/params/b"], "", params),
    ]:
        assert_equal(load(file, pattern=only, rename={"train_state/params": new}), expected)
    with pytest.raises(
        CheckpointError, match=r"no path matches 'train_state/parms/a'; .*'train_state/params/a/"
    ):
        load(file, pattern="train_state/parms/a", rename={"train_state/params": ""})
    # A new path goes before a path of the file: after a swap, 'a' is the old 'b'.
    save(tmp_path / "swap", {"a": 1, "b": 2})
    assert load(tmp_path / "swap", pattern="a", rename={"a": "b", "b": "a"}) == {"a": 2}
