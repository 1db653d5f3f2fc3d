"""Trees by path: laws over random trees, the pattern language as a table, and the text of tables
and errors.
"""

import collections
import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnet import tree

# --- random trees ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: object
    b: object


NAMES = st.sampled_from(["a", "b", "ab", "bias", "kernel", "x_1"])
EMPTY = st.sampled_from([None, (), [], {}, optax.EmptyState()])
LEAVES = st.integers(0, 99) | st.floats(0, 1) | st.builds(np.arange, st.integers(0, 3))


def nodes(children):
    named = st.dictionaries(NAMES, children, max_size=3)
    return (
        named
        | st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.builds(Pair, children, children)
        | named.map(lambda d: collections.OrderedDict(reversed(d.items())))
        | named.map(lambda d: collections.defaultdict(list, d))
        | st.dictionaries(st.integers(0, 20), children, max_size=3)
        | children.map(lambda child: optax.TraceState(trace=child))
    )


TREES = st.recursive(LEAVES | EMPTY, nodes, max_leaves=8)
DICTS = st.recursive(
    LEAVES, lambda children: st.dictionaries(NAMES, children, min_size=1, max_size=3), max_leaves=8
)
PATTERNS = st.lists(
    NAMES | st.sampled_from(["*", "**", "?", "[ab]", "[!a]", "k*", "0", "1", "trace"]),
    min_size=1,
    max_size=3,
)


def same(a, b) -> bool:
    """The same structure, types of nodes included, and the very same leaves."""
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y for x, y in zip(leaves, others, strict=True)
    )


quick = settings(max_examples=300, deadline=None)


@st.composite
def trees_and_patterns(draw):
    """A tree, and patterns made of its paths with wildcards in the place of some names."""
    t, patterns = draw(TREES), []
    for path in draw(st.lists(st.sampled_from(tree.paths(t)), max_size=2)) if tree.paths(t) else []:
        wild = draw(
            st.lists(
                st.sampled_from(["", "*", "**", "?*"]), min_size=path.count("/") + 1, max_size=9
            )
        )
        patterns.append(
            "/".join(new or old for new, old in zip(wild, path.split("/"), strict=False))
        )
    return t, [
        pattern
        for pattern in patterns
        if any(tree.matches(path, pattern) for path in tree.paths(t))
    ]


@quick
@given(trees_and_patterns())
def test_merge_is_the_inverse_of_split(sample):
    t, patterns = sample
    known = tree.paths(t)
    before = copy.copy(jax.tree.leaves(t))
    chosen, rest = tree.split(t, *patterns)
    assert tree.paths(chosen) == [path for path in known if tree.matches(path, *patterns)]
    assert tree.paths(rest) == [path for path in known if not tree.matches(path, *patterns)]
    assert same(tree.merge(chosen, rest), t) and same(tree.merge(rest, chosen), t)
    assert all(x is y for x, y in zip(before, jax.tree.leaves(t), strict=True))


@quick
@given(TREES, PATTERNS.map("/".join))
def test_select_mask_and_split_agree_and_a_pattern_for_nothing_is_an_error_in_each(t, pattern):
    known = tree.paths(t)
    if not any(tree.matches(path, pattern) for path in known):
        for function in [tree.select, tree.mask, tree.split]:
            with pytest.raises(KeyError, match="no path matches"):
                function(t, pattern)
        return
    chosen = tree.select(t, pattern)
    assert list(chosen) == [path for path in known if tree.matches(path, pattern)]
    assert all(tree.get(t, path) is leaf for path, leaf in chosen.items())
    mask = tree.mask(t, pattern)
    assert jax.tree.structure(mask) == jax.tree.structure(t)
    assert [path for path, chosen in tree.flatten(mask).items() if chosen] == list(chosen)


@quick
@given(DICTS)
def test_unflatten_is_the_inverse_of_flatten_on_dicts(t):
    assert same(tree.unflatten(tree.flatten(t)), t)
    assert list(tree.flatten(t)) == tree.paths(t)


@quick
@given(TREES, st.data())
def test_put_changes_one_place_and_get_finds_it(t, data):
    known = tree.paths(t)
    path, value = data.draw(st.sampled_from(known)) if known else "", object()
    structure, leaves = jax.tree.structure(t), jax.tree.leaves(t)
    changed = tree.put(t, path, value)
    assert tree.get(changed, path) is value
    assert not known or jax.tree.structure(changed) == structure
    for other in known:
        assert other == path or tree.get(changed, other) is tree.get(t, other)
    assert jax.tree.structure(t) == structure and all(
        x is y for x, y in zip(leaves, jax.tree.leaves(t), strict=True)
    )
    assert same(tree.put(t, path, tree.get(t, path)), t)


@quick
@given(TREES)
def test_map_with_path_sees_each_leaf_by_its_path(t):
    seen = tree.map_with_path(lambda path, leaf, twin: (path, leaf is twin), t, t)
    pairs = jax.tree.leaves(
        seen, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
    )
    assert [path for path, _ in pairs] == tree.paths(t) and all(twins for _, twins in pairs)


def network() -> dict:
    def dense():
        return {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}

    return {
        "blocks": {"attn": {"query": dense(), "out": dense()}, "norm": {"scale": jnp.ones(2)}},
        "head": dense(),
    }


@pytest.mark.parametrize("pattern", ["0/mu", "**/bias", "**/head", "0/count", "**"])
def test_split_and_merge_of_an_optimizer_state(pattern):
    state = optax.adamw(1e-3).init(network())
    chosen, rest = tree.split(state, pattern)
    assert same(tree.merge(chosen, rest), state)
    assert (
        len(tree.paths(chosen))
        == {"0/mu": 7, "**/bias": 6, "**/head": 4, "0/count": 1, "**": 15}[pattern]
    )


# --- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, path, matches, exactly",
    [
        ("head", "head", True, True),
        ("head", "head/bias", True, False),  # what is below a node belongs to it
        ("head", "header/bias", False, False),
        ("head", "blocks/head", False, False),  # from the top of the tree
        ("head/bias", "head", False, False),
        ("*", "head", True, True),
        ("*", "head/bias", True, False),
        ("*", "", False, False),  # a name, not none
        ("*/bias", "head/bias", True, True),
        ("*/bias", "bias", False, False),
        ("*/bias", "a/b/bias", False, False),  # one name only
        ("**/bias", "bias", True, True),
        ("**/bias", "a/b/bias", True, True),
        ("**/bias", "a/bias/b", True, False),
        ("**", "a/b", True, True),
        ("**", "", True, True),
        ("**/**", "a/b", True, True),
        ("a/**", "a/b/c", True, True),
        ("a/**", "a", True, True),  # any number of names, also none
        ("a/**", "b/a", False, False),
        ("a/**/c", "a/c", True, True),
        ("a/**/c", "a/b/b/c", True, True),
        ("a/**/c", "a/b", False, False),
        ("**/b/**", "a/b/c", True, True),
        ("**/a/*/c", "x/a/b/c", True, True),
        ("layer?", "layer1", True, True),
        ("layer?", "layer12", False, False),
        ("layer[12]", "layer2", True, True),
        ("layer[12]", "layer3", False, False),
        ("layer[!12]", "layer3", True, True),
        ("layer[!12]", "layer1", False, False),
        ("[a-c]", "b", True, True),
        ("k*l", "kernel", True, True),
        ("k*l", "kernel/l", True, False),
        ("k*l", "k/l", False, False),  # never across a '/'
        ("a.b", "axb", False, False),  # a dot is a dot
        ("(", "(", True, True),
        ("0/mu/*/kernel", "0/mu/head/kernel", True, True),
        ("Head", "head", False, False),
        ("", "", True, True),
        ("", "a", True, False),  # the root, and what is below it
    ],
)
def test_the_pattern_language(pattern, path, matches, exactly):
    assert tree.matches(path, pattern) is matches
    assert tree.matches(path, pattern, below=False) is exactly


def test_several_patterns_match_what_one_of_them_matches():
    assert (
        tree.matches("a/bias", "b", "**/bias")
        and not tree.matches("a/bias", "b", "c")
        and not tree.matches("a")
    )
    assert list(tree.select(network(), "head/bias", "**/scale")) == [
        "blocks/norm/scale",
        "head/bias",
    ]


# --- flatten, get, put, merge: cases --------------------------------------------------------------


def test_flatten_names_every_kind_of_node():
    state = optax.adam(0.1).init({"w": jnp.ones(2)})
    assert tree.paths(state) == ["0/count", "0/mu/w", "0/nu/w"]
    mixed = {2: [None, (1, {"x": 2})], 10: Pair(3, None)}
    assert tree.flatten(mixed) == {"2/1/0": 1, "2/1/1/x": 2, "10/a": 3}
    assert tree.flatten(5) == {"": 5} and tree.unflatten({"": 5}) == 5
    assert tree.flatten({}) == {} and tree.unflatten({}) == {}


def test_get_and_put_reach_nodes_and_new_keys():
    params = network()
    assert (
        tree.get(params, "blocks/norm") is params["blocks"]["norm"]
        and tree.get(params, "") is params
    )
    assert tree.get({"a": [None, 1]}, "a/0") is None
    without = tree.put(params, "blocks/attn", {})
    assert tree.paths(without["blocks"]) == ["norm/scale"] and "query" in params["blocks"]["attn"]
    assert tree.put(params, "head/scale", 3)["head"]["scale"] == 3 and "scale" not in params["head"]
    assert tree.put({"a": None}, "a", 3) == {"a": 3}
    assert tree.put(params, "", 7) == 7
    assert tree.put({3: {"x": 1}}, "3/x", 2) == {3: {"x": 2}}
    made = tree.put(collections.defaultdict(list, a=1), "b", 2)
    assert type(made) is collections.defaultdict and made == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: tree.get(network(), "blocks/atn/query"),
            KeyError,
            "no 'blocks/atn/query': blocks has no 'atn'; did you mean",
        ),
        (
            lambda: tree.get(network(), "hed"),
            KeyError,
            r"the top of the tree has no 'hed'; did you mean 'head'\?",
        ),
        (
            lambda: tree.get(network(), "head/bias/0"),
            KeyError,
            r"head/bias has no '0' \(it has no children\)",
        ),
        (
            lambda: tree.put(network(), "hed/bias", 1),
            KeyError,
            "no 'hed/bias': the top of the tree has no 'hed'",
        ),
        (lambda: tree.put([1, 2], "2", 1), KeyError, r"has no '2' \(it has 0, 1\)"),
        (
            lambda: tree.select(network(), "**/bais"),
            KeyError,
            r"no path matches '\*\*/bais'; the nearest of 7 are \[",
        ),
        (lambda: tree.mask({}, "a"), KeyError, r"no path matches 'a'; the nearest of 0 are \[\]"),
        (
            lambda: tree.flatten({"a/b": 1, "a": {"b": 2}}),
            ValueError,
            "two leaves have the path 'a/b'",
        ),
        (lambda: tree.unflatten({"a": 1, "a/b": 2}), ValueError, "'a/b' goes through a leaf"),
        (lambda: tree.unflatten({"a/b": 2, "a": 1}), ValueError, "'a' is both a leaf and a node"),
        (lambda: tree.merge({"a": {"b": 1}}, {"a": {"b": 2}}), ValueError, "both trees hold 'a/b'"),
        (lambda: tree.merge({"a": {"b": 1}}, {"a": 2}), ValueError, "both trees hold 'a'"),
        (
            lambda: tree.merge({"a": (1, None)}, {"a": [None, 2]}),
            ValueError,
            "cannot merge tuple and list at 'a'",
        ),
        (
            lambda: tree.merge((1, None), (None, 2, 3)),
            ValueError,
            "cannot merge tuple and tuple at '': their children differ",
        ),
    ],
)
def test_errors_say_where_and_what_is_nearest(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_merge_takes_any_number_of_parts():
    params = network()
    a, rest = tree.split(params, "head")
    b, c = tree.split(rest, "**/attn")
    assert (
        same(tree.merge(a, b, c), params)
        and same(tree.merge(c, b, a), params)
        and same(tree.merge(params), params)
    )


def test_parts_know_nothing_of_each_other_in_dicts_and_keep_positions_elsewhere():
    chosen, rest = tree.split({"a": {"x": 1, "y": 2}, "b": [1, {"x": 3}]}, "**/x")
    assert chosen == {"a": {"x": 1}, "b": [None, {"x": 3}]} and rest == {
        "a": {"y": 2},
        "b": [1, None],
    }
    assert tree.split({"a": 1}, "a") == ({"a": 1}, {}) and tree.split(5, "**") == (5, None)
    assert tree.split({"a": 1}) == ({}, {"a": 1})  # no pattern, nothing chosen
    assert tree.split({"a": 1, "e": {}, "n": None}, "**") == (
        {"a": 1},
        {"e": {}, "n": None},
    )  # no leaf, nothing to choose


# --- with optax -----------------------------------------------------------------------------------


def test_mask_drives_optax_masked():
    params = network()
    decay = optax.masked(optax.add_decayed_weights(0.5), tree.mask(params, "**/kernel"))
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    for path, update in tree.flatten(updates).items():
        np.testing.assert_array_equal(
            update, 0.5 * tree.get(params, path) if path.endswith("kernel") else 0 * update
        )
    state = optax.masked(optax.adam(0.1), tree.mask(params, "head")).init(params)
    assert [p for p in tree.paths(state) if "/mu/" in p] == [
        "inner_state/0/mu/head/bias",
        "inner_state/0/mu/head/kernel",
    ]
    assert same(tree.merge(*tree.split(state, "**/mu")), state)  # MaskedNodes stay where they are


# --- counts, norms, tables ------------------------------------------------------------------------

KEY = jax.random.key(0)
ODD = {
    "bf16": jnp.full((2, 3), 2, "bfloat16"),
    "bool": jnp.array([True, False]),
    "empty": jnp.zeros((0, 4)),
    "int": np.int64(3),
    "key": KEY,
    "python": 1.5,
    "spec": jax.ShapeDtypeStruct((4,), jnp.float16),
    "text": "word",
}


def test_count_and_bytes_are_sums_over_leaves_of_any_kind():
    sizes = {
        "bf16": (6, 12),
        "bool": (2, 2),
        "empty": (0, 0),
        "int": (1, 8),
        "key": (1, 8),
        "python": (1, 8),
        "spec": (4, 8),
    }
    for name, (count, size) in sizes.items():
        assert (tree.count(ODD[name]), tree.bytes_of(ODD[name])) == (count, size), name
    assert tree.count(ODD) == sum(count for count, _ in sizes.values()) + 1
    state = optax.adam(0.1).init(network())
    assert tree.count(state) == 2 * tree.count(network()) + 1 and tree.bytes_of(
        state
    ) == 4 * tree.count(state)
    assert tree.count(None) == tree.bytes_of({}) == 0


def test_norms_are_euclidean_and_accumulated_in_float32():
    assert tree.norm({"a": jnp.array([3.0, 0]), "b": [jnp.array(4)]}) == 5
    norms = tree.norms({"a": jnp.array([3, 4]), "b": {"c": jnp.array([3 + 4j])}})
    assert norms == {"a": 5, "b/c": 5}
    # Its square overflows float16, the sum of squares stops growing in bfloat16.
    half = jnp.full(4096, 300, "float16")
    np.testing.assert_allclose(tree.norm(half), 300 * 64, rtol=1e-6)
    np.testing.assert_allclose(tree.norm(half.astype("bfloat16")), 300 * 64, rtol=1e-6)
    assert tree.norm({}) == 0 and tree.norms({}) == {}
    np.testing.assert_allclose(jax.jit(tree.norm)(network()), np.sqrt(4 + 4 + 4 + 2), rtol=1e-6)
    with jax.enable_x64(True):
        assert tree.norm(jnp.ones(2)).dtype == jnp.float64


def test_the_gradient_of_a_norm_at_zero_is_zero():
    """As in PyTorch, whose norm has the subgradient 0 there."""
    zeros = {"a": jnp.zeros(3), "b": jnp.zeros(()), "empty": jnp.zeros((0, 2))}
    for norm in (tree.norm, lambda x: sum(tree.norms(x).values())):
        for leaf in jax.tree.leaves(jax.grad(norm)(zeros)):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert jax.jvp(tree.norm, (zeros,), (jax.tree.map(jnp.ones_like, zeros),))[1] == 0
    grad = jax.grad(tree.norm)({"a": jnp.array([3.0, 0]), "b": jnp.float32(4)})
    np.testing.assert_allclose(grad["a"], [0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(grad["b"], 0.8, rtol=1e-6)
    one_of_two = jax.grad(lambda x: sum(tree.norms(x).values()))(
        {"a": jnp.zeros(2), "b": jnp.array([3.0, 4.0])}
    )
    np.testing.assert_allclose(one_of_two["b"], [0.6, 0.8], rtol=1e-6)
    assert not one_of_two["a"].any()


@pytest.mark.parametrize(
    "dtype, value", [(d, v) for d in ("float32", "bfloat16") for v in (2e38, 1e30, 1.0, 1e-30)]
)
def test_squares_of_huge_and_tiny_numbers_neither_overflow_nor_vanish(dtype, value):
    x = jnp.array([value, 0.75 * value, -value]).astype(dtype)
    # 3.2e38 at most, below the largest float32.
    expected = np.linalg.norm(np.asarray(x, np.float64))
    np.testing.assert_allclose(jax.jit(tree.norm)({"x": x}), expected, rtol=1e-6)
    np.testing.assert_allclose(tree.norms({"x": x})["x"], expected, rtol=1e-6)
    grad = np.asarray(jax.grad(tree.norm)(x), np.float64)
    np.testing.assert_allclose(
        grad, np.asarray(x, np.float64) / expected, rtol=2 * float(jnp.finfo(dtype).eps)
    )


def test_norms_tell_what_is_not_finite_and_what_is_too_large():
    assert tree.norm(jnp.array([jnp.inf, 1])) == jnp.inf and jnp.isnan(
        tree.norm(jnp.array([jnp.nan, 1]))
    )
    assert tree.norm(jnp.full(9, 3e38)) == jnp.inf  # 9e38 is no float32
    assert tree.norm({"a": jnp.zeros((0, 4))}) == 0
    with jax.enable_x64(True):
        np.testing.assert_allclose(tree.norm(jnp.array([3e200, 4e200])), 5e200, rtol=1e-12)


def test_a_table_prints_any_leaf():
    text = """\
path    shape  dtype     count  bytes   norm
--------------------------------------------
bf16    2x3    bfloat16      6     12  4.899
bool    2      bool          2      2      1
empty   0x4    float32       0      0      0
int     -      int64         1      8      3
key     -      key<fry>      1      8      -
python  -      float64       1      8    1.5
spec    4      float16       4      8      -
text    -      <U4           1     16      -
total                       16     62"""
    assert tree.table(ODD) == text  # sqrt(6 * 2^2) = 4.899


def test_a_table_of_a_lone_leaf_and_of_nothing():
    assert tree.table(jnp.ones(4)).split("\n")[2].split() == [".", "4", "float32", "4", "16", "2"]
    assert tree.table({}).split("\n")[-1].split() == ["total", "0", "0"]
    assert "0/mu/head/kernel" in tree.table(optax.adam(0.1).init(network()))
