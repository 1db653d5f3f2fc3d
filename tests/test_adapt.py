"""Networks adapted by path: numbers against PyTorch's parametrizations and formulas in NumPy, alone
and under repeat, vmap, scan, cast and capture.
"""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from registry import close, numbers, quick_to_compile, weights  # noqa: F401 (a fixture)

from jaxnet import (
    call,
    capture,
    cast,
    chain,
    repeat,
    replace,
    residual,
    scan,
    summary,
    tree,
    vmap,
    walk,
)
from jaxnet.adapt import (
    fold_weights,
    frozen,
    lora,
    merge_lora,
    prune,
    quantize_int8,
    spectral_norm,
    tie,
    weight_norm,
    weight_standardization,
)
from jaxnet.layers import batch_norm, conv, dense, dropout, embed, layer_norm
from jaxnet.train import by_path

X = numbers(jax.ShapeDtypeStruct((5, 4), "float32"), 3)
KEY = jax.random.key(1)


def started(net, *inputs) -> Any:
    """Normal parameters and the first state."""
    state = net.init_state(*inputs, key=KEY) if net.init_state else None
    return weights(net, *inputs), state


# --- against PyTorch ------------------------------------------------------------------------------


def twins(shape, module, change, **options):
    """A PyTorch layer with a parametrization, and the kernel it had before."""
    torch = pytest.importorskip("torch")
    parametrizations = torch.nn.utils.parametrizations
    torch.manual_seed(0)
    there = module(torch)
    before = there.weight.detach().numpy().copy()
    return torch, getattr(parametrizations, change)(there, **options), before


LAYERS = {
    "dense": (dense(3), lambda torch: torch.nn.Linear(4, 3), (5, 4), (1, 0)),
    "conv": (
        conv(3, 2, padding="VALID"),
        lambda torch: torch.nn.Conv2d(2, 3, 2),
        (2, 3, 3, 2),
        (2, 3, 1, 0),
    ),
}
each_layer = pytest.mark.parametrize("net, module, shape, order", LAYERS.values(), ids=LAYERS)


def gradient_there(torch, there, x):
    x = torch.tensor(np.asarray(x))
    y = there(x.movedim(-1, 1) if x.ndim > 2 else x)
    y = y.movedim(1, -1) if y.ndim > 2 else y
    torch.sin(y).sum().backward()
    return y.detach().numpy()


@each_layer
def test_weight_norm_is_that_of_pytorch(net, module, shape, order):
    torch, there, before = twins(shape, module, "weight_norm")
    x = numbers(jax.ShapeDtypeStruct(shape, "float32"))
    normed = weight_norm(net)
    given = {"kernel": before.transpose(order), "bias": there.bias.detach().numpy()}
    params = {**given, "kernel_gain": 1.5 * np.ones(3, np.float32)}
    original = there.parametrizations.weight
    with torch.no_grad():
        original.original0.fill_(1.5)
    loss = lambda params: jnp.sin(normed.apply(params, x)).sum()  # noqa: E731
    expected = gradient_there(torch, there, x)
    np.testing.assert_allclose(normed.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(loss))(params)
    gain, v = original.original0.grad.numpy(), original.original1.grad.numpy()
    np.testing.assert_allclose(grads["kernel_gain"], gain.reshape(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["kernel"], v.transpose(order), rtol=1e-4, atol=1e-5)


@each_layer
@pytest.mark.parametrize("iterations", [1, 3])
def test_spectral_norm_is_that_of_pytorch(net, module, shape, order, iterations):
    torch, there, before = twins(shape, module, "spectral_norm", n_power_iterations=iterations)
    x = numbers(jax.ShapeDtypeStruct(shape, "float32"))
    normed = spectral_norm(net, iterations=iterations)
    params = {"kernel": before.transpose(order), "bias": there.bias.detach().numpy()}
    power = there.parametrizations.weight[0]
    # A kernel here is [*window, in, out], and there [out, in, *window]: v has another order.
    inputs = power._v.numpy().reshape(before.shape[1:])
    v = inputs.transpose([axis - 1 for axis in order[:-1]]).reshape(-1)
    state = {"kernel_u": power._u.numpy().copy(), "kernel_v": v.copy()}
    there.train()
    for _ in range(2):
        expected = gradient_there(torch, there, x)

        def loss(params, state=state):
            y, new = normed.apply(params, x, state=state, train=True)
            return jnp.sin(y).sum(), (y, new)

        grads, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(params)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state["kernel_u"], power._u.numpy(), rtol=1e-4, atol=1e-5)
        grad = there.parametrizations.weight.original.grad.numpy()
        np.testing.assert_allclose(grads["kernel"], grad.transpose(order), rtol=1e-3, atol=1e-5)
        there.zero_grad()
    there.eval()
    y, same = normed.apply(params, x, state=state)
    np.testing.assert_allclose(y, gradient_there(torch, there, x), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_spectral_norm_tends_to_norm_one_from_its_random_state():
    net = spectral_norm(dense(3))
    params, state = started(net, X)
    assert not np.array_equal(
        state["kernel_u"], net.init_state(X, key=jax.random.key(2))["kernel_u"]
    )
    for _ in range(50):
        _, state = net.apply(params, X, state=state, train=True)
    folded, left = fold_weights(net, params, state)
    assert left is None and abs(np.linalg.norm(folded["kernel"], 2) - 1) < 1e-4
    with pytest.raises(ValueError, match="spectral_norm: .* pass key= to init_state"):
        net.init_state(X)


@each_layer
def test_weight_standardization_is_its_formula(net, module, shape, order):
    x = numbers(jax.ShapeDtypeStruct(shape, "float32"))
    changed = weight_standardization(net, eps=1e-3)
    params = weights(changed, x)
    k = np.asarray(params["kernel"], np.float64).reshape(-1, 3)
    k = (k - k.mean(0)) / np.sqrt(k.var(0) + 1e-3)
    expected = net.apply({**params, "kernel": np.float32(k.reshape(params["kernel"].shape))}, x)
    np.testing.assert_allclose(changed.apply(params, x), expected, rtol=1e-4, atol=1e-5)


# --- under combinators ----------------------------------------------------------------------------


def pruned_dense(inner):
    return prune(inner, inner.init(KEY, X), "**", 0.5)[0]


def int8_dense(inner):
    return quantize_int8(inner, inner.init(KEY, X), "**")[0]


CHANGES = {
    "weight_norm": weight_norm,
    "weight_standardization": weight_standardization,
    "spectral_norm": spectral_norm,
    "lora": lambda inner: lora(inner, "**", 2),
    "frozen": lambda inner: frozen(inner, "**"),
    "prune": pruned_dense,
    "quantize_int8": int8_dense,
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def over_time(net):
    """The layer as a cell."""
    cell = scan(chain(cell=net, pair=lambda y: (y, y)))
    return cell


@pytest.mark.sample(3)
@each_change
def test_a_changed_layer_works_under_combinators(change):
    layer = change(dense(4))
    net = chain(
        deep=repeat(residual(layer), 2),
        wide=vmap(layer, 3, in_axes=None),
        sum=lambda y: y.sum(0),
        cast=cast(layer, "bfloat16"),
        out=layer,
    )
    params, state = started(net, X)
    step = jax.jit(lambda params, state: call(net, params, X, state=state, key=KEY, train=True))
    y, new = step(params, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    _, seen = capture(net, "out")(
        params, X, **({} if state is None else {"state": new}), key=KEY, train=True
    )
    assert np.isfinite(y).all() and list(seen) == ["out"]
    # The plain parameters give the same outputs in the plain network.
    plain_net = chain(
        deep=repeat(residual(dense(4)), 2),
        wide=vmap(dense(4), 3, in_axes=None),
        sum=lambda y: y.sum(0),
        cast=cast(dense(4), "bfloat16"),
        out=dense(4),
    )
    evaluated, _ = call(net, params, X, state=new)
    plain, left = fold_weights(net, params, new)
    assert tree.paths(plain) == tree.paths(plain_net.init(KEY, X)) and left is None
    scale = float(jnp.abs(evaluated).max())
    np.testing.assert_allclose(
        plain_net.apply(plain, X), evaluated, rtol=0, atol=max(0.02 * scale, 1e-5)
    )
    again = replace(net, "out", dense(4))
    assert repr(again).endswith("out: dense(4)\n)") and len([*walk(again)]) == len([*walk(net)]) - 1


@each_change
def test_a_changed_layer_is_a_step_of_a_scan(change):
    layer = change(dense(4))
    net = scan(chain(cell=lambda h, x: h + x, out=layer, pair=lambda y: (y, y)))
    xs = jnp.ones((3, 5, 4))
    params, state = started(net, X, xs)
    (h, ys), new = call(net, params, X, xs, state=state, key=KEY, train=True)
    assert ys.shape == (3, 5, 4) and np.isfinite(h).all()
    assert jax.tree.structure(new) == jax.tree.structure(state)


# --- lora -----------------------------------------------------------------------------------------

BLOCK = residual(chain(norm=layer_norm(), up=dense(6), act=jnp.tanh, down=dense(4)))
NET = chain(stem=conv(4, (3,)), blocks=repeat(BLOCK, 2), head=dense(3))
ROWS = numbers(jax.ShapeDtypeStruct((2, 5, 4), "float32"))
KERNELS = ("stem", "blocks/up", "head")


def adapted():
    base = weights(NET, ROWS)
    net = lora(NET, KERNELS, 2, alpha=4)
    added, _ = tree.split(net.init(KEY, ROWS), "**/kernel_[ab]")
    return base, net, tree.merge(base, added)


def test_lora_begins_as_the_network_and_trains_only_what_it_adds():
    base, net, params = adapted()
    np.testing.assert_array_equal(net.apply(params, ROWS), NET.apply(base, ROWS))
    assert tree.get(params, "blocks/up/kernel_a").shape == (2, 4, 2)
    optimizer = by_path({"**/kernel_[ab]": optax.sgd(1e-3), "**": None})
    opt_state = optimizer.init(params)
    loss = lambda params: jnp.square(net.apply(params, ROWS)).mean()  # noqa: E731

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    new = params
    for _ in range(3):
        new, opt_state = step(new, opt_state)
    for path, leaf in tree.flatten(new).items():
        moved = not np.array_equal(leaf, tree.get(params, path))
        assert moved == path.endswith(("_a", "_b")), path
    assert loss(new) < loss(params)
    merged = merge_lora(net, new)
    assert tree.paths(merged) == tree.paths(base)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    np.testing.assert_allclose(NET.apply(merged, ROWS), net.apply(new, ROWS), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        tree.get(merged, "blocks/down/kernel"), tree.get(base, "blocks/down/kernel")
    )
    a, b = (np.asarray(tree.get(new, f"blocks/up/kernel_{c}"), np.float64) for c in "ab")
    expected = np.asarray(tree.get(base, "blocks/up/kernel"), np.float64) + 2 * a @ b
    np.testing.assert_allclose(tree.get(merged, "blocks/up/kernel"), expected, rtol=1e-5, atol=1e-6)


# --- frozen, tie ----------------------------------------------------------------------------------


def test_a_frozen_body_keeps_its_statistics_and_parameters_and_passes_the_gradient_on():
    body = chain(lin=dense(4), norm=batch_norm(), drop=dropout(0.5))
    net = chain(first=dense(4), body=body, norm=batch_norm(), head=dense(2))
    params, state = started(net, X)
    still = frozen(net, "body")

    def loss(params):
        y, new = still.apply(params, X, state=state, train=True)
        return jnp.sin(y).sum(), (y, new)

    grads, (_, new) = jax.jit(jax.grad(loss, has_aux=True))(params)
    jax.tree.map(np.testing.assert_array_equal, new["body"], state["body"])
    assert not np.array_equal(new["norm"]["mean"], state["norm"]["mean"])
    for path, grad in tree.flatten(grads).items():
        zero = path.startswith("body")
        # The bias before the batch norm has a gradient of rounding errors.
        assert zero == (not np.any(grad)) or path == "first/bias", path
    y, _ = still.apply(params, X, state=state)
    np.testing.assert_array_equal(y, net.apply(params, X, state=state)[0])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_are_one_parameter_with_the_sum_of_the_gradients(dtype):
    plain = chain(embed=embed(7, 4), hidden=dense(4), head=dense(7, bias=False))
    tied = tie(plain, "head/kernel", "embed/embedding", change=jnp.transpose)
    ids = jnp.asarray([[1, 2], [3, 6]])
    params = tied.init(KEY, ids)
    assert tree.paths(params) == ["embed/embedding", "hidden/bias", "hidden/kernel"]
    both = tree.merge(params, {"head": {"kernel": params["embed"]["embedding"].T}})
    loss = lambda net, params: jnp.sin(net.apply(params, ids)).sum()  # noqa: E731
    if dtype is not None:
        tied, plain = cast(tied, dtype), cast(plain, dtype)
    close(tied.apply(params, ids), plain.apply(both, ids))
    grad = jax.grad(functools.partial(loss, tied))(params)["embed"]["embedding"]
    parts = jax.grad(functools.partial(loss, plain))(both)
    expected = parts["embed"]["embedding"] + parts["head"]["kernel"].T
    np.testing.assert_allclose(grad, expected, rtol=1e-5 if dtype is None else 0.02, atol=1e-2)


# --- int8, prune ----------------------------------------------------------------------------------


def test_int8_kernels_are_within_half_a_step_per_output_feature():
    base = weights(NET, ROWS)
    net, params, state = quantize_int8(NET, base, KERNELS)
    assert net.init_state is not None
    assert "kernel" not in params.get("stem", {}) and "bias" in params["stem"]
    stored = tree.get(state, "blocks/up/kernel_int8")
    assert stored.dtype == jnp.int8 and stored.shape == (2, 4, 6)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), net.init_state(ROWS)
    )
    plain, _ = fold_weights(net, params, state)
    for path in KERNELS:
        k, w = (np.asarray(tree.get(p, f"{path}/kernel")) for p in (base, plain))
        stack = path.startswith("blocks")
        axes = tuple(range(1 if stack else 0, k.ndim - 1))
        bound = np.abs(k).max(axes, keepdims=True) / 127 / 2
        assert np.all(np.abs(k - w) <= bound * 1.001), path
        assert np.any(k != w)
    y, same = jax.jit(lambda: net.apply(params, ROWS, state=state))()
    np.testing.assert_allclose(y, NET.apply(plain, ROWS), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_pruned_weights_are_the_smallest_and_stay_zero_in_training():
    base = weights(NET, ROWS)
    net, params, state = prune(NET, base, KERNELS, 0.5)
    for path in KERNELS:
        k, w = (np.asarray(tree.get(p, f"{path}/kernel")) for p in (base, params))
        for before, after in zip(k, w, strict=True) if path.startswith("blocks") else [(k, w)]:
            assert (after == 0).sum() == before.size // 2
            assert np.abs(before[after == 0]).max() <= np.abs(after[after != 0]).min()
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: jnp.square(net.apply(p, ROWS, state=state, train=True)[0] - 1).mean()  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    new = params
    for _ in range(3):
        new, opt_state = step(new, opt_state)
    for path in KERNELS:
        before, after = (np.asarray(tree.get(p, f"{path}/kernel")) for p in (params, new))
        assert np.array_equal(before == 0, after == 0) and not np.array_equal(before, after)


def test_a_stateful_network_keeps_its_other_state():
    net = chain(lin=dense(4), norm=batch_norm(), out=dense(2))
    params, state = started(net, X)
    _, state = net.apply(params, X, state=state, train=True)
    for change in (quantize_int8, functools.partial(prune, sparsity=0.0)):
        changed, new_params, new_state = change(net, params, patterns=["lin", "out"], state=state)
        jax.tree.map(np.testing.assert_array_equal, new_state["norm"], state["norm"])
        y, _ = changed.apply(new_params, X, state=new_state)
        expected, _ = net.apply(params, X, state=state)
        np.testing.assert_allclose(y, expected, rtol=0, atol=0.05 * float(jnp.abs(expected).max()))
        plain, left = fold_weights(changed, new_params, new_state)
        assert tree.paths(plain) == tree.paths(params)
        jax.tree.map(np.testing.assert_array_equal, left, state)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: lora(NET, "stem", 0), ValueError, "lora: rank must be a positive int, got 0"),
        (lambda: lora(NET, "stm", 2), KeyError, "lora: no layer matches 'stm'; the layers are"),
        (lambda: lora(NET, "blocks/act", 2), KeyError, "matches no layer with parameters"),
        (
            lambda: lora(NET, "blocks/norm", 2).init(KEY, ROWS),
            ValueError,
            r"lora\[2\]: the layer must have a parameter 'kernel', got \{.*choose the layer",
        ),
        (lambda: merge_lora(NET, {}), ValueError, "merge_lora: the network must come from lora"),
        (lambda: frozen(NET, "bdy"), KeyError, "no layer matches 'bdy'"),
        (lambda: prune(NET, {}, "stem", 1.5), ValueError, r"sparsity .* in \[0, 1\], got 1.5"),
        (
            lambda: quantize_int8(NET, weights(NET, ROWS), "blocks/norm"),
            ValueError,
            "quantize_int8: the layer must have a parameter 'kernel', got",
        ),
        (
            lambda: spectral_norm(dense(3), iterations=0),
            ValueError,
            "iterations must be a positive",
        ),
        (lambda: tie(NET, "head/kernel", "head/kernel"), ValueError, "must be two paths"),
        (
            lambda: tie(NET, "head/kernel", "stem/kernel").init(KEY, ROWS),
            ValueError,
            r"tie: 'head/kernel' must be float32\[4, 3\], got float32\[3, 4, 4\]",
        ),
    ],
)
def test_a_wrong_argument_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- use ------------------------------------------------------------------------------------------


@each_change
def test_a_changed_network_is_pickled_and_summarized(change):
    net = chain(first=change(dense(4)), out=dense(2))
    again = pickle.loads(pickle.dumps(net))
    assert repr(again) == repr(net)
    params, state = started(net, X)
    close(call(again, params, X, state=state)[0], call(net, params, X, state=state)[0])
    assert [row.path for row in summary(net, X).rows] == ["", "first", "out"]


@pytest.mark.cpu_only("it wants four devices")
@each_change
def test_a_changed_layer_takes_a_batch_that_a_mesh_divides(change):
    net, x = change(dense(4)), numbers(jax.ShapeDtypeStruct((8, 4), "float32"))
    params, state = started(net, x)

    def step(params, state, x):
        def loss(params):
            y, new = call(net, params, x, state=state, train=True)
            return jnp.sin(y).sum(), (y, new)

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.jit(step)(params, state, x)
    mesh = jax.make_mesh((4,), ("batch",))
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
        close(jax.jit(step)(params, state, divided), expected, rtol=1e-4, atol=1e-5)


@each_change
def test_the_batch_of_a_changed_layer_may_be_symbolic(change):
    net = change(dense(4))
    params, state = started(net, X)
    (batch,) = jax.export.symbolic_shape("batch")
    run = jax.jit(lambda x: call(net, params, x, state=state, train=True))
    exported = jax.export.export(run)(jax.ShapeDtypeStruct((batch, 4), "float32"))
    close(exported.call(X), run(X))
