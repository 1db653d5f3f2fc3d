"""The laws of the design, for every public layer and combinator: see `registry.py` for the
cases.
"""

import functools
import json

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import registry
from registry import CASES, Case, as_stated, quick_to_compile, state_of  # noqa: F401 (a fixture)

from jaxnet import chain, parallel, tree
from jaxnet.core import call, describe, layer, output_specs

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


DTYPES = ["float16", "bfloat16", "float32", "float64"]


def run(case: Case, params, state, inputs, *, train, key=None):
    """One call of any layer in one form: (outputs, new state)."""
    return call(case.net, params, *inputs, state=state, key=key, train=train)


def not_exempt(law: str):
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=name) for name, c in CASES.items() if law not in c.exempt]
    )


def close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
    )


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


# --- the registry ---------------------------------------------------------------------------------


def test_every_public_layer_and_combinator_has_a_case():
    constructors = {name.split(":")[0] for name in CASES} - {"network"}
    assert constructors == registry.public_names(), (
        "tests/registry.py needs a case for each public constructor"
    )


def test_exemptions_are_from_known_laws_and_say_why():
    exemptions = [(law, why) for case in CASES.values() for law, why in case.exempt.items()]
    assert all(law in registry.LAWS and len(why) > 10 for law, why in exemptions)


# --- law 1: specs, jit, vmap ----------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("train", [False, True])
def test_output_specs_are_those_of_apply(case, train):
    params, state = case.start()
    key = jax.random.key(1) if train else None
    traced = jax.eval_shape(
        lambda *a: run(case, *a, train=train, key=key), params, state, case.inputs
    )
    said = output_specs(case.net, train, *case.inputs)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), said) == jax.tree.map(
        lambda s: (s.shape, s.dtype), traced[0]
    )
    assert describe(traced[1]) == describe(state)


@each_case
def test_a_jitted_training_step_compiles_once_and_its_gradients_reach_every_parameter(case):
    params, state = case.start()

    def step(params, state, key, inputs):
        def loss(params):
            outputs, new_state = run(case, params, state, inputs, train=True, key=key)
            return sum(
                jnp.vdot(y, towards)
                for y, towards in zip(jax.tree.leaves(outputs), targets, strict=True)
            ), new_state

        grads, new_state = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), new_state, grads

    targets = [
        np.cos(np.arange(y.size).reshape(y.shape))
        for y in jax.tree.leaves(output_specs(case.net, True, *case.inputs))
    ]
    compiled = jax.jit(step)
    params, state, grads = compiled(params, state, jax.random.key(1), case.data())
    compiled(params, state, jax.random.key(2), case.data(seed=8))
    compiled_programs = compiled._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    assert compiled_programs == 1, "what a step returns must go in again without a recompilation"
    for path, grad in tree.flatten(grads).items():
        assert np.isfinite(grad).all(), path
        assert np.any(grad), f"no gradient reaches {path}"


@each_case
@pytest.mark.parametrize("train", [False, True])
def test_jit_equals_eager(case, train):
    if train and case.net.init_state is None and not case.net.random:
        pytest.skip("training and evaluation are the same program")
    params, state = case.start()

    def evaluate(params, state, inputs):
        return run(
            case, params, state, inputs, train=train, key=jax.random.key(1) if train else None
        )

    eager, jitted = (fn(params, state, case.data()) for fn in (evaluate, jax.jit(evaluate)))
    close(jitted, eager, rtol=2e-2 if "differences" in case.exempt else 1e-5)
    if not train:
        equal(eager[1], state)


@each_case
def test_leading_axes_are_batch_axes(case):
    """vmap over one more axis, one more leading axis, and a larger batch are the same; statistics
    are those of state.
    """
    params, state = case.start()
    inputs = case.data(lead=(2,))
    larger = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs)
    evaluate = as_stated(lambda inputs: run(case, params, state, inputs, train=False)[0])
    mapped = jax.vmap(evaluate)(inputs)
    close(evaluate(inputs), mapped)
    close(jax.tree.map(lambda y: y.reshape(2, -1, *y.shape[1:]), evaluate(larger)), mapped)


# --- law 2: dtypes --------------------------------------------------------------------------------


@not_exempt("dtype")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [False, True])
def test_dtype_in_is_dtype_out(case, dtype, train):
    if train not in case.modes:
        pytest.skip("training and evaluation are the same program")
    dtype = jnp.dtype(dtype)
    with jax.enable_x64(dtype == jnp.float64):
        specs, key = case.specs(dtype), jax.random.key(0)
        params = jax.eval_shape(lambda: case.net.init(key, *specs))
        state = jax.eval_shape(lambda: state_of(case.net, *specs)) if case.net.init_state else None

        def loss(params, state, inputs):
            outputs, state = run(
                case, params, state, inputs, train=train, key=key if train else None
            )
            return sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(outputs)), (
                outputs,
                state,
            )

        grads, (outputs, new_state) = jax.eval_shape(
            jax.grad(loss, has_aux=True), params, state, specs
        )
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, outputs))} == {dtype}
    wide = jnp.promote_types(dtype, jnp.float32)  # statistics are never kept in less than float32
    assert {leaf.dtype for leaf in jax.tree.leaves((state, new_state))} <= {wide}


# --- law 3: gradients -----------------------------------------------------------------------------


def float64(case):
    """The case in float64: all its numbers (parameters and float inputs), and a function of them to
    its outputs in training.
    """
    (params, state), inputs = case.start(jnp.float64), case.data(jnp.float64)
    ids = [x for x in inputs if jnp.issubdtype(x.dtype, jnp.integer)]
    floats = [x for x in inputs if not jnp.issubdtype(x.dtype, jnp.integer)]

    def function(numbers):
        params, inputs = numbers
        return run(case, params, state, (*ids, *inputs), train=True, key=jax.random.key(1))[0]

    return (params, floats), function


@not_exempt("differences")
def test_gradients_equal_finite_differences(case):
    """First and second derivatives in a direction v, forward and reverse, of a scalar of the
    outputs in training.

    With L(t) = loss(all numbers + t v), compiled once for t in {-h, 0, h}, the errors of central
    differences are O(h^2).
    """
    h = 1e-5
    with jax.enable_x64(True):
        numbers, function = float64(case)
        direction = jax.tree.map(lambda x: np.cos(1 + np.arange(x.size).reshape(x.shape)), numbers)

        def loss(numbers):
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(numbers)))

        def slope(numbers):  # by reverse mode
            return sum(
                map(jnp.vdot, jax.tree.leaves(jax.grad(loss)(numbers)), jax.tree.leaves(direction))
            )

        @jax.jit
        @jax.vmap
        def line(t):
            at = jax.tree.map(lambda x, v: x + t * v, numbers, direction)
            value, forward = jax.jvp(loss, (at,), (direction,))
            if "curvature" in case.exempt:
                return value, forward, slope(at)
            return value, forward, *jax.jvp(slope, (at,), (direction,))

        value, forward, reverse, *curvature = map(np.asarray, line(jnp.asarray([-h, 0, h])))
    np.testing.assert_allclose(forward[1], (value[2] - value[0]) / (2 * h), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reverse, forward, rtol=1e-9, atol=1e-12)
    for second in curvature:
        np.testing.assert_allclose(
            second[1], (reverse[2] - reverse[0]) / (2 * h), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
@not_exempt("differences")
def test_check_grads_of_jax_agrees_to_second_order(case):
    with jax.enable_x64(True):
        numbers, function = float64(case)
        modes, tolerance = ("fwd", "rev"), 1e-4
        jax.test_util.check_grads(
            jax.jit(function), (numbers,), 2, modes, tolerance, tolerance, eps=1e-5
        )


# --- law 4: the layout ----------------------------------------------------------------------------


def test_layouts_are_those_of_the_golden_file():
    golden = json.loads(registry.GOLDEN.read_text())
    now = registry.layouts()
    changed = sorted(
        name for name in golden.keys() | now.keys() if golden.get(name) != now.get(name)
    )
    remedy = (
        "if it is wanted, `python tests/registry.py` writes the file again: read its diff, saved "
        "parameters depend on it"
    )
    assert not changed, f"the layout of params or state is another for {changed}; {remedy}"


@each_case
def test_params_and_state_are_plain_nested_dicts_of_arrays(case):
    def check(node):
        assert type(node) is dict and all(type(name) is str for name in node)
        for child in node.values():
            if not isinstance(child, jax.ShapeDtypeStruct):
                check(child)
                assert child, "a layer without parameters has no entry in the dict of its parent"

    check(jax.eval_shape(lambda key: case.net.init(key, *case.inputs), jax.random.key(0)))
    if case.net.init_state:
        check(jax.eval_shape(lambda: state_of(case.net, *case.inputs)))


# --- law 5: init ----------------------------------------------------------------------------------


@each_case
def test_init_reads_only_specs_and_the_key(case):
    from_specs = case.net.init(jax.random.key(3), *case.inputs)
    equal(case.net.init(jax.random.key(3), *case.data()), from_specs)
    other = case.net.init(jax.random.key(4), *case.inputs)
    for path, leaf in tree.flatten(from_specs).items():
        random = np.any(leaf != leaf.ravel()[0])
        assert random == np.any(leaf != tree.get(other, path)), (
            f"{path} must depend on the key, unless it is constant"
        )


@each_case
def test_init_never_allocates_what_flows_through_the_network(case):
    huge = tuple(
        jax.ShapeDtypeStruct((10**12, *x.shape[1:]), x.dtype) for x in case.inputs
    )  # at least 2 terabytes each
    equal(case.net.init(jax.random.key(3), *huge), case.net.init(jax.random.key(3), *case.inputs))
    if case.net.init_state:
        equal(state_of(case.net, *huge), state_of(case.net, *case.inputs))


@each_case
def test_a_sibling_does_not_change_how_a_layer_is_initialized(case):
    sibling = layer(
        lambda key, *xs: {"w": jax.random.normal(key, (2,))}, lambda params, *xs: params["w"]
    )
    alone = parallel(case=case.net).init(jax.random.key(3), *case.inputs)
    beside = parallel(sibling=sibling, case=case.net).init(jax.random.key(3), *case.inputs)
    equal(beside.get("case", {}), alone.get("case", {}))


# --- law 6: errors --------------------------------------------------------------------------------


@each_case
def test_a_missing_parameter_is_named_by_layer_and_path(case):
    params, state = case.start()
    net = chain(outer=case.net)
    for path in tree.paths(params):
        _, rest = tree.split(params, path)
        with pytest.raises(ValueError) as error:
            run(
                Case(net, ()), {"outer": rest}, state and {"outer": state}, case.data(), train=False
            )
        *above, name = path.split("/")
        where = error.value.__notes__[0]
        assert (
            f"no '{name}' in params" in str(error.value) or f"in layer 'outer/{path}'" == where
        )  # `param` is its name
        assert where.startswith("in layer '" + "/".join(["outer", *above]))


@each_case
def test_params_must_be_what_init_returns(case):
    params, state = case.start()
    if params == {} and not case.net.children:
        pytest.skip("it has no parameters to look at")
    with pytest.raises(TypeError, match="params must be a dict.* got None"):
        run(case, None, state, case.data(), train=False)
    if case.net.children and "" not in case.net.children:
        with pytest.raises(ValueError, match="params must have no 'foreign', which is not a child"):
            run(case, {**params, "foreign": {}}, state, case.data(), train=False)


@each_case
def test_state_is_passed_just_where_it_is_carried(case):
    params, _ = case.start()
    if case.net.init_state is None:
        assert run(case, params, None, case.data(), train=False)[1] is None
        with pytest.raises(TypeError, match="has no state"):
            case.net.apply(params, *case.data(), state={"mean": jnp.ones(3)})
    else:
        with pytest.raises(ValueError, match=r"carries state: pass state=net\.init_state"):
            case.net.apply(params, *case.data())
        with pytest.raises((ValueError, TypeError), match="state"):
            case.net.apply(params, *case.data(), state={})


@each_case
def test_a_mistyped_keyword_is_a_type_error(case):
    params, state = case.start()
    with pytest.raises(TypeError, match="trian"):
        call(case.net, params, *case.data(), state=state, trian=True)


@each_case
def test_a_bad_key_is_told_apart_from_a_good_one(case):
    params, state = case.start()
    for bad in [0, jax.random.split(jax.random.key(0), 2), jnp.ones(2)]:
        if params:
            with pytest.raises(TypeError, match="key must be one PRNG key"):
                case.net.init(bad, *case.inputs)
        with pytest.raises(TypeError, match="key must be one PRNG key"):
            run(case, params, state, case.data(), train=True, key=bad)


@each_case
def test_training_without_a_key_raises_just_where_one_is_needed(case):
    params, state = case.start()
    noise = ("dropout", "gaussian_noise", "drop_path")
    if case.net.random and any(name in repr(case.net) for name in noise):
        with pytest.raises(ValueError, match=r": training draws random numbers: pass key="):
            run(case, params, state, case.data(), train=True)
    else:
        run(case, params, state, case.data(), train=True)
