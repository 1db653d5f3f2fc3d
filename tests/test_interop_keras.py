"""Weights of Keras: the outputs of Keras are the expectation, and no file may need more memory than
it has bytes.
"""

import json
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import batch_norm, chain, conv, dense, embed, flatten, global_avg_pool, layer_norm, tree
from jaxnet.checkpoint import CheckpointError, from_keras, from_torch, load
from jaxnet.cli import main

h5py = pytest.importorskip("h5py", reason="h5py is not installed: it reads the files of Keras")

RNG = np.random.default_rng(0)


@pytest.fixture
def keras(monkeypatch):
    """Keras on JAX, without the checks that this suite sets for jaxnet."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        warnings.simplefilter("ignore")
        yield pytest.importorskip(
            "keras", reason="keras is not installed: its outputs are the expectation"
        )


def shaken(model):
    """Weights that layers do not start with, because zeros and ones could be mistaken for those."""
    for v in model.weights:
        if "float" in str(v.dtype):
            v.assign(np.asarray(v) + RNG.uniform(0.1, 0.5, v.shape).astype(np.float32))
    return model


def saved(model, folder):
    """The model in every form that `from_keras` takes."""
    model.save_weights(folder / "net.weights.h5")
    model.save(folder / "net.keras")
    model.save(folder / "net.h5")
    return [model, folder / "net.keras", folder / "net.h5", folder / "net.weights.h5"]


def variables_like(net, *inputs):
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return {"params": params} | (
        {"state": jax.eval_shape(net.init_state, *inputs)} if net.init_state else {}
    )


def output(net, variables, x):
    if net.init_state:
        return net.apply(variables["params"], x, state=variables["state"])[0]
    return net.apply(variables["params"], x)


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_convnet_computes_the_same_from_every_kind_of_file_and_from_memory(keras, tmp_path):
    layers = keras.layers
    model = shaken(
        keras.Sequential(
            [
                keras.Input((9, 9, 3)),
                layers.Conv2D(4, 3, strides=2, padding="valid", activation="relu", name="stem"),
                layers.BatchNormalization(name="norm"),
                layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depth"),
                layers.SeparableConv2D(5, 3, depth_multiplier=2, padding="same", name="separable"),
                layers.Flatten(),
                layers.Dense(6, name="hidden"),
                layers.LayerNormalization(name="ln"),
                layers.Dropout(0.5),
                layers.Dense(2, use_bias=False, name="head"),
            ]
        )
    )
    separable = chain(depthwise=conv(16, 3, groups=8, bias=False), pointwise=conv(5, 1))
    net = chain(
        stem=conv(4, 3, strides=2, padding="VALID"),
        act=jax.nn.relu,
        norm=batch_norm(eps=1e-3),
        depth=conv(8, 3, groups=4),
        separable=separable,
        flat=flatten(),
        hidden=dense(6),
        ln=layer_norm(eps=1e-3),
        head=dense(2, bias=False),
    )
    x = RNG.normal(size=(3, 9, 9, 3)).astype(np.float32)
    expected = np.asarray(model(x))
    for source in saved(model, tmp_path):
        variables = from_keras(source, like=variables_like(net, jnp.asarray(x)))
        np.testing.assert_allclose(output(net, variables, x), expected, rtol=1e-4, atol=1e-4)
        assert same(from_keras(source), variables)


@pytest.mark.parametrize("rank, groups", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_convolutions_of_every_rank_and_in_groups(rank, groups, keras, tmp_path):
    window = (3, 2, 1)[:rank]
    layer = getattr(keras.layers, f"Conv{rank}D")(
        6, window, groups=groups, name="c", dilation_rate=1
    )
    model = shaken(keras.Sequential([keras.Input((*(5, 6, 4)[:rank], 4)), layer]))
    net = chain(c=conv(6, window, groups=groups, padding="VALID"))
    x = RNG.normal(size=(2, *(5, 6, 4)[:rank], 4)).astype(np.float32)
    for source in saved(model, tmp_path):
        variables = from_keras(source, like=variables_like(net, jnp.asarray(x)))
        np.testing.assert_allclose(
            output(net, variables, x), np.asarray(model(x)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("rank", [1, 2])
def test_a_depthwise_convolution_keeps_the_order_of_its_outputs(rank, keras, tmp_path):
    """In both libraries, channel c with multiplier M gives the outputs c * M to c * M + M - 1."""
    window = (3, 2)[:rank]
    layer = getattr(keras.layers, f"DepthwiseConv{rank}D")(
        window, depth_multiplier=3, name="d", use_bias=False
    )
    model = shaken(keras.Sequential([keras.Input((*(7, 6)[:rank], 4)), layer]))
    net = chain(d=conv(12, window, groups=4, padding="VALID", bias=False))
    x = RNG.normal(size=(2, *(7, 6)[:rank], 4)).astype(np.float32)
    for source in saved(model, tmp_path):
        variables = from_keras(source, like=variables_like(net, jnp.asarray(x)))
        np.testing.assert_allclose(
            output(net, variables, x), np.asarray(model(x)), rtol=1e-4, atol=1e-5
        )


def test_nested_models_embeddings_and_other_names(keras, tmp_path):
    layers = keras.layers
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="up"), layers.Dense(4, name="down")], name="body"
    )
    ids = keras.Input((5,), dtype="int32")
    h = layers.Embedding(7, 4, name="tokens")(ids)
    h = layers.BatchNormalization(name="bn")(layers.GlobalAveragePooling1D()(h))
    model = shaken(keras.Model(ids, layers.Dense(2, name="head")(inner(h)), name="whole"))
    body = chain(fc1=dense(4), fc2=dense(4))
    net = chain(
        wte=embed(7, 4), pool=global_avg_pool(1), bn=batch_norm(eps=1e-3), body=body, head=dense(2)
    )
    x = RNG.integers(0, 7, (3, 5)).astype(np.int32)
    rename = {"tokens": "wte", "body/up": "body/fc1", "body/down": "body/fc2"}
    for source in saved(model, tmp_path):
        variables = from_keras(source, like=variables_like(net, jnp.asarray(x)), rename=rename)
        np.testing.assert_allclose(
            output(net, variables, x), np.asarray(model(x)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("scale, center", [(False, True), (True, False), (False, False)])
def test_a_norm_without_scale_or_without_shift(scale, center, keras, tmp_path):
    """A file without configuration does not say whether its one array is gamma or beta, so its name
    is a number.
    """
    norms = keras.layers.BatchNormalization, keras.layers.LayerNormalization
    parts = [
        norm(scale=scale, center=center, name=name)
        for norm, name in zip(norms, ("bn", "ln"), strict=True)
    ]
    model = shaken(keras.Sequential([keras.Input((4,)), *parts, keras.layers.Dense(1, name="fc")]))
    net = chain(
        bn=batch_norm(eps=1e-3, scale=scale, bias=center),
        ln=layer_norm(eps=1e-3, scale=scale, bias=center),
        fc=dense(1),
    )
    x = RNG.normal(size=(6, 4)).astype(np.float32)
    like = variables_like(net, jnp.asarray(x))
    *sources, bare = saved(model, tmp_path)
    for source in sources:
        variables = from_keras(source, like=like)
        np.testing.assert_allclose(
            output(net, variables, x), np.asarray(model(x)), rtol=1e-4, atol=1e-5
        )
    if scale or center:
        with pytest.raises(CheckpointError, match="not in the template: bn/0"):
            from_keras(bare, like=like)
        name = "scale" if scale else "bias"
        assert same(
            from_keras(bare, like=like, rename={"bn/0": f"bn/{name}", "ln/0": f"ln/{name}"}),
            variables,
        )
    else:
        assert same(from_keras(bare, like=like), variables)


def test_a_subclassed_model_has_the_names_of_its_layers(keras, tmp_path):
    layers = keras.layers

    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.first, self.rest = (
                layers.Dense(3, name="dense_1"),
                [layers.Dense(3, name=n) for n in ("mine", "two")],
            )
            self.attention = layers.MultiHeadAttention(2, 2, name="mha")
            self.memory = layers.LSTM(3, name="lstm")

        def call(self, x):
            h = self.rest[1](self.rest[0](self.first(x)))
            return self.memory(self.attention(h, h))

    model = Net()
    model(np.zeros((2, 5, 3), np.float32))
    model.save_weights(tmp_path / "net.weights.h5")
    ours, theirs = (
        tree.flatten(from_keras(source)) for source in (model, tmp_path / "net.weights.h5")
    )
    assert {path.rpartition("/")[0] for path in ours} == {
        path.rpartition("/")[0] for path in theirs
    }
    assert ours["params/lstm/lstm_cell/recurrent_kernel"].shape == (3, 12)
    np.testing.assert_array_equal(
        ours["params/mha/query/kernel"], theirs["params/mha/query/kernel"]
    )
    # The list `rest` holds layers of class Dense, which the file says; of the name "mine" alone,
    # nothing follows.
    np.testing.assert_array_equal(ours["params/mine/kernel"], theirs["params/mine/kernel"])


def test_a_layer_of_an_unknown_class_has_numbers_that_rename_turns_into_names(keras, tmp_path):
    class Scaled(keras.layers.Layer):
        def build(self, shape):
            self.a = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")
            self.b = self.add_weight(shape=(2, 2), initializer="ones", name="other")

        def call(self, x):
            return x * self.a

    model = keras.Sequential([keras.Input((3,)), Scaled(name="mine")])
    model.save_weights(tmp_path / "net.weights.h5")
    assert sorted(tree.paths(from_keras(model))) == ["params/mine/factor", "params/mine/other"]
    got = from_keras(
        tmp_path / "net.weights.h5", rename={"mine/0": "mine/factor", "mine/1": "mine/other"}
    )
    assert same(got, from_keras(model))


def test_dtypes_are_kept_and_codes_of_quantized_layers_are_refused(keras, tmp_path):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16", name="fc")]
    )
    for source in saved(model, tmp_path):
        got = from_keras(source)["params"]["fc"]["kernel"]
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(got, np.float32), np.asarray(model.layers[0].kernel.value, np.float32)
        )
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="fc")])
    model.quantize("int8")
    model.save_weights(tmp_path / "int8.weights.h5")
    for source, name in [(model, "kernel"), (tmp_path / "int8.weights.h5", "0")]:
        with pytest.raises(
            CheckpointError, match=f"fc/{name}.*a quantized layer holds codes .int8., not values"
        ):
            from_keras(source)


def test_the_optimizer_is_left_out_and_only_takes_a_part(keras, tmp_path):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b")]
    )
    model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    for source in saved(model, tmp_path):
        assert from_keras(source)["params"].keys() == {"a", "b"}
        assert from_keras(source, pattern="b/kernel")["params"].keys() == {"b"}
        like = {"params": {"b": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}}
        np.testing.assert_array_equal(
            from_keras(source, like=like, pattern="b")["params"]["b"]["kernel"],
            model.layers[1].kernel,
        )


def test_what_is_no_model_or_has_no_weights(keras, tmp_path):
    with pytest.raises(TypeError, match="needs a path or a model of Keras 3, got a builtins.dict"):
        from_keras({})
    with pytest.raises(CheckpointError, match="has not been built"):
        from_keras(keras.Sequential([keras.layers.Dense(2)]))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.save(tmp_path / "net.keras")
    with pytest.raises(CheckpointError, match="it is a file of Keras: read it with from_keras"):
        from_torch(tmp_path / "net.keras")


def test_convert_reads_files_of_keras(keras, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = shaken(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="fc")]))
    model.save("net.keras")
    (tmp_path / "net.keras").rename("net")
    assert main(["convert", "net", "out", "--rename", "fc=head"]) == 0
    assert same(load("out"), from_keras("net", rename={"fc": "head"}))
    with pytest.raises(SystemExit, match="^2$"):
        main(["convert", "net", "back", "--to", "torch"])
    assert "--from keras" in capsys.readouterr().err


# --------------------------------------------------------------------- files made by hand: no Keras


def write(path, groups: dict[str, Any], names: dict[str, str] | None = None):
    """A `.weights.h5` with these arrays, and the names of these layers."""
    with h5py.File(path, "w") as file:
        for name, x in groups.items():
            file[name] = x
        for group, name in (names or {}).items():
            file[group].attrs["name"] = name
    return path


def test_a_weights_file_of_keras_2(tmp_path):
    """The arrays are called dense/kernel:0 inside the group of their layer, and depthwise kernels
    have another name.
    """
    kernel, depthwise = (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2),
    )
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"fc", b"dw", b"bn"]
        file["fc/fc/kernel:0"], file["fc/fc/bias:0"] = kernel, kernel[0]
        file["dw/model/dw/depthwise_kernel:0"] = depthwise
        file["bn/bn/gamma:0"], file["bn/bn/moving_mean:0"] = kernel[0], kernel[1]
        file.create_group("top_level_model_weights")
    got = from_keras(tmp_path / "old.h5")
    assert sorted(tree.paths(got)) == [
        *[
            "params/bn/scale",
            "params/dw/kernel",
            "params/fc/bias",
            "params/fc/kernel",
            "state/bn/mean",
        ]
    ]
    np.testing.assert_array_equal(got["params"]["fc"]["kernel"], kernel)
    np.testing.assert_array_equal(got["params"]["dw"]["kernel"], depthwise.reshape(3, 1, 1, 4))


def test_a_weights_file_without_names_of_layers_has_those_of_its_groups(tmp_path):
    x = np.ones((2, 2), np.float32)
    path = write(
        tmp_path / "a.h5",
        {"layers/dense/vars/0": x, "layers/dense_1/vars/0": x, "layers/dense/vars/1": x[0]},
    )
    assert sorted(tree.paths(from_keras(path))) == [
        "params/dense/bias",
        "params/dense/kernel",
        "params/dense_1/kernel",
    ]
    path = write(
        tmp_path / "b.h5",
        {"a/vars/0": x, "b/vars/0": x},
        {"a/vars": "dense", "b/vars": "dense"},
    )
    with pytest.raises(CheckpointError, match="dense/kernel.*two arrays have this path"):
        from_keras(path)


def test_without_h5py_its_files_are_refused_with_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5", {"layers/dense/vars/0": np.ones((2, 2), np.float32)})
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnet\[keras\]'"):
        from_keras(path)


SMALL = np.ones(4, np.float32)


def external(file, folder):
    write(folder / "other.h5", {"x": SMALL})
    file["layers/dense/vars/0"] = h5py.ExternalLink(str(folder / "other.h5"), "x")


def external_group(file, folder):
    write(folder / "other.h5", {"x/vars/0": SMALL})
    file["layers/dense"] = h5py.ExternalLink(str(folder / "other.h5"), "x")


def soft(file, folder):
    file["hidden/vars/0"] = SMALL
    file["layers/dense/vars/0"] = h5py.SoftLink("/hidden/vars/0")


def raw_file(file, folder):
    (folder / "raw").write_bytes(bytes(16))
    file.create_dataset("layers/dense/vars/0", (4,), "f4", external=[(str(folder / "raw"), 0, 16)])


def virtual(file, folder):
    write(folder / "other.h5", {"x": SMALL})
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (4,))
    file.create_virtual_dataset("layers/dense/vars/0", layout)


def huge(file, folder):
    file.create_dataset("layers/dense/vars/0", (2**40,), "f4", chunks=(1024,))


def huge_contiguous(file, folder):
    file.create_dataset("layers/dense/vars/0", (2**40,), "f4")


def bomb(file, folder):
    file.create_dataset(
        "layers/dense/vars/0",
        data=np.zeros(2**22, np.float32),
        compression="gzip",
        compression_opts=9,
    )


def lzf(file, folder):
    file.create_dataset("layers/dense/vars/0", data=np.zeros(1024, np.float32), compression="lzf")


def cycle(file, folder):
    file["layers/dense/vars/0"] = SMALL
    file["layers/dense/again"] = file["layers"]


def laughs(file, folder):
    group = file.create_group("layers/a")
    for i in range(60):
        below = file.create_group(f"hidden/{i}")
        group["a"], group["b"] = below, below
        group = below


def text(file, folder):
    file.create_dataset("layers/dense/vars/0", (1000,), h5py.string_dtype())


ATTACKS = {
    external: "is a link to somewhere else",
    external_group: "is a link to somewhere else",
    soft: "is a link to somewhere else",
    raw_file: "its values are in other files",
    virtual: "its values are in other files",
    huge: "announces 4,398,046,511,104 bytes and holds 0",
    huge_contiguous: "announces 4,398,046,511,104 bytes and holds 0",
    bomb: "it is compressed",
    lzf: "it is compressed",
    cycle: "does it contain itself",
    laughs: "does it contain itself",
    text: "text or other objects",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("old", [False, True])
def test_no_file_leads_out_of_itself_or_announces_more_than_it_holds(attack, old, tmp_path):
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        if old:
            group = file.create_group("model_weights")
            attack(group, tmp_path)
        else:
            attack(file, tmp_path)
    with pytest.raises(CheckpointError, match=ATTACKS[attack]):
        from_keras(tmp_path / "evil.h5")


def test_chunks_that_are_counted_twice_are_refused(tmp_path):
    """Two hard links to one array declare more bytes together than the file has."""
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        file["layers/dense/vars/0"] = np.zeros(4096, np.float32)
        for i in range(1, 20):
            file[f"layers/dense_{i}/vars/0"] = file["layers/dense/vars/0"]
    with pytest.raises(CheckpointError, match="all arrays together announce more"):
        from_keras(tmp_path / "evil.h5")


def archive(path, compression, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"metadata.json": b"{}", "config.json": b"{}", **members}.items():
            file.writestr(name, content)
    return path


def test_an_archive_is_stored_and_undamaged(tmp_path):
    raw = write(
        tmp_path / "a.h5", {"layers/dense/vars/0": np.zeros((512, 8), np.float32)}
    ).read_bytes()
    good = archive(tmp_path / "good.keras", zipfile.ZIP_STORED, **{"model.weights.h5": raw})
    assert from_keras(good)["params"]["dense"]["kernel"].shape == (512, 8)
    bad = archive(tmp_path / "bomb.keras", zipfile.ZIP_DEFLATED, **{"model.weights.h5": raw})
    with pytest.raises(CheckpointError, match="the record is compressed or encrypted"):
        from_keras(bad)
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 1
    good.write_bytes(content)
    with pytest.raises(CheckpointError, match="a file of Keras, whose zip archive is damaged") as e:
        from_keras(good)
    # A user of Keras cannot do anything with the names of torch.
    assert "CRC" in str(e.value) and "torch" not in str(e.value)
    shards = archive(tmp_path / "shards.keras", zipfile.ZIP_STORED, **{"model.weights.json": b"{}"})
    with pytest.raises(CheckpointError, match="has no model.weights.h5, but .*model.weights.json"):
        from_keras(shards)


@pytest.mark.parametrize(
    "config", [b"{}", b"[]", b"nonsense", b'{"config": {"layers": [3]}}', b"[" * 100_000]
)
def test_a_configuration_that_is_not_understood_names_no_layers(config, tmp_path):
    raw = write(
        tmp_path / "a.h5", {"layers/dense/vars/0": np.ones((2, 2), np.float32)}
    ).read_bytes()
    path = archive(
        tmp_path / "a.keras", zipfile.ZIP_STORED, **{"model.weights.h5": raw, "config.json": config}
    )
    assert tree.paths(from_keras(path)) == ["params/dense/kernel"]


def test_damage_is_a_typed_error(tmp_path):
    """A flipped bit gives CheckpointError, or other numbers (HDF5 has no checksums by default), and
    nothing else.
    """
    names = ["layers/dense/vars/0", "layers/dense/vars/1", "layers/batch_normalization/vars/0"]
    raw = write(tmp_path / "a.h5", {n: np.ones((2, 2), np.float32) for n in names}).read_bytes()
    for position in RNG.integers(0, len(raw), 300):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << int(RNG.integers(8))
        (tmp_path / "b.h5").write_bytes(damaged)
        try:
            from_keras(tmp_path / "b.h5")
        except CheckpointError:
            pass


def test_the_configuration_of_an_old_file_tells_depthwise_from_full_convolutions(tmp_path):
    layer = {"class_name": "DepthwiseConv2D", "config": {"name": "mine"}}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": {"layers": [layer]}}
        )
        file["model_weights/mine/mine/kernel"] = np.ones((3, 3, 2, 4), np.float32)
    assert from_keras(tmp_path / "a.h5")["params"]["mine"]["kernel"].shape == (3, 3, 1, 8)
