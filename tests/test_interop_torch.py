"""State dicts of PyTorch in the field: files of every name and age, containers, odd tensors,
hostile archives. The expectation for values is torch's own `x.tolist()`.
"""

import argparse
import collections
import dataclasses
import os
import shutil
import types
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxnet import tree
from jaxnet.checkpoint import CheckpointError, from_equinox, from_flax, from_haiku, from_torch, load
from jaxnet.cli import main

A, B = np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(3, dtype=np.float32)
STATE_DICT = {"fc.weight": A, "fc.bias": B}


@pytest.fixture
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torch", reason="torch is not installed: it writes these files")


@pytest.fixture
def state_dict(torch):
    return {name: torch.from_numpy(x.copy()) for name, x in STATE_DICT.items()}


def paths(variables):
    return sorted(tree.paths(variables))


def assert_is_state_dict(variables, prefix="params"):
    got = tree.flatten(variables)
    assert got.keys() == {f"{prefix}/fc/kernel", f"{prefix}/fc/bias"}
    np.testing.assert_array_equal(got[f"{prefix}/fc/kernel"], A.T)
    np.testing.assert_array_equal(got[f"{prefix}/fc/bias"], B)


# ----------------------------------------------------------------------------------- kinds of files

NAMES = [
    "net.pth.tar",
    "net.tar",
    "net.model",
    "net.pkl",
    "net",
    "net.safetensors",
    "net.h5",
    "net.pt",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_is_told_by_its_first_bytes(
    name, zipped, torch, state_dict, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict, name, _use_new_zipfile_serialization=zipped)
    assert_is_state_dict(from_torch(name))
    assert main(["convert", name, "out"]) == 0
    assert_is_state_dict(load("out"))


@pytest.mark.parametrize("name", NAMES)
def test_a_safetensors_file_is_told_by_its_first_bytes(name, tmp_path):
    safetensors.numpy.save_file(STATE_DICT, tmp_path / name)
    assert_is_state_dict(from_torch(tmp_path / name))


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_one_of_safetensors(length, tmp_path):
    """80 02 to 80 05 begin a pickle; they are the lengths 640, 896, 1152 and 1408, too."""
    content = safetensors.numpy.save(STATE_DICT)
    size = int.from_bytes(content[:8], "little")
    content = (
        length.to_bytes(8, "little") + content[8 : 8 + size].ljust(length) + content[8 + size :]
    )
    (tmp_path / "net").write_bytes(content)
    assert_is_state_dict(from_torch(tmp_path / "net"))


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "it is empty"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed as a whole: unpack it first"),
        (bytes(257) + b"ustar" + bytes(600), "a tar archive: unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "first bytes are b'<!DOCTYPE html>"),
        (b"PK\x03\x04 and no more", "zip archive is damaged or cut off"),
        (b"PK\x05\x06" + bytes(18), "a zip archive, but neither of torch.save nor of Keras"),
    ],
)
def test_a_file_of_another_kind_is_named(content, match, tmp_path, capsys):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        from_torch(tmp_path / "net.pt")
    assert main(["convert", str(tmp_path / "net.pt"), str(tmp_path / "out")]) == 1
    assert match in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_archives_of_numpy_and_of_torchscript_have_a_remedy(torch, tmp_path):
    np.savez(tmp_path / "net.npz", **STATE_DICT)
    with pytest.raises(
        CheckpointError, match=r"an archive of NumPy: from_torch\(dict\(numpy.load\(file\)\)\)"
    ):
        from_torch(tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as content:
        assert_is_state_dict(from_torch(dict(content)))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="a TorchScript program: open it with torch.jit.load"):
        from_torch(tmp_path / "script.pt")


def test_published_files_are_told_apart(real_data, torch, tmp_path):
    """Real files: one of torch, and others whose names (.bin, .npz, .onnx, .json) say nothing of
    torch.
    """
    folder = real_data / "pretrained"
    resnet = folder / "resnet_cifar10" / "resnet20-12fca82f.th"
    if not resnet.exists():
        pytest.skip("the trained networks are not there")
    expected = from_torch(resnet, pattern="state_dict", rename={"state_dict.module": ""})
    with np.load(resnet.with_suffix(".npz")) as arrays:
        kernel = (
            arrays["conv1.weight"] if "conv1.weight" in arrays else arrays["module.conv1.weight"]
        )
    np.testing.assert_array_equal(
        expected["params"]["conv1"]["kernel"], kernel.transpose(2, 3, 1, 0)
    )
    for name in ("net.pth.tar", "net"):
        shutil.copy(resnet, tmp_path / name)
        got = from_torch(
            tmp_path / name, like=expected, pattern="state_dict", rename={"state_dict.module": ""}
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, got, expected))
    for path in folder.rglob("*"):
        if path.suffix in (".bin", ".npz", ".onnx", ".json", ".txt"):
            with pytest.raises(CheckpointError):
                from_torch(path)


# --------------------------------------------------------------------------------------- containers


class Pair(collections.namedtuple("Pair", ["student", "teacher"])):
    pass


@dataclasses.dataclass
class Run:
    model: Any
    epoch: int = 3


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (lambda x: {"state_dict": [{}, x]}, "state_dict/1"),
        (lambda x: {"state_dict": (x, 3)}, "state_dict/0"),
        (lambda x: collections.OrderedDict(a=collections.deque([None, [x]])), "a/1/0"),
        (lambda x: {"nets": Pair(x, None)}, "nets/student"),
        (lambda x: Pair(None, {"net": x}), "teacher/net"),
        (lambda x: Run(x), "model"),
        (lambda x: {"runs": [Run(x)]}, "runs/0/model"),
        (lambda x: [x, {"epoch": 3}], "0"),
        (lambda x: types.MappingProxyType({7: x}), "7"),
    ],
)
def test_arrays_are_found_in_any_container(wrap, prefix):
    assert_is_state_dict(from_torch(wrap(STATE_DICT)), f"params/{prefix}")
    assert_is_state_dict(from_torch(wrap(STATE_DICT), pattern=prefix, rename={prefix: ""}))


def test_containers_in_a_file(torch, state_dict, tmp_path):
    torch.save({"state_dict": [state_dict, state_dict], "epoch": 3}, tmp_path / "net")
    got = from_torch(tmp_path / "net")
    assert len(tree.paths(got)) == 4
    np.testing.assert_array_equal(got["params"]["state_dict"]["1"]["fc"]["kernel"], A.T)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"a": [{}, {"b": ()}]}, {"text": np.array(["x"])}]
)
def test_nothing_found_is_an_error(content):
    with pytest.raises(CheckpointError, match="no array of floats is in it"):
        from_torch(content)


@pytest.mark.parametrize("content", [[A, B], (A,), A, 3, None, [], [1, 2]])
def test_arrays_without_names_are_an_error(content):
    with pytest.raises(CheckpointError, match="it holds a .*, expected a dict of tensors"):
        from_torch(content)


def test_two_arrays_of_one_path_are_an_error_whatever_the_library():
    for content in [
        {"a.b": A, "a": {"b": B}},
        {"a": {1: A, "1": B}},
        {"a/b": A, "a.b": B},
        {"a": {"b": A}, "a/b": B},
    ]:
        with pytest.raises(CheckpointError, match="two arrays have this path"):
            from_torch(content)
    for call in [from_flax, from_haiku, from_equinox]:
        with pytest.raises(CheckpointError, match="leaf 'a/b': two arrays have this path"):
            call({"a/b": A, "a": {"b": B}})
    with pytest.raises(CheckpointError, match="leaf 'a/w': two arrays have this path"):
        from_haiku({"a": {"w": A}}, {"a": {"w": B}})


def test_a_container_that_contains_itself_is_an_error(torch, tmp_path):
    cycle: dict[str, Any] = {"w": torch.ones(2)}
    cycle["again"] = [cycle]
    for zipped in (True, False):
        torch.save(cycle, tmp_path / "net", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="does it contain itself"):
            from_torch(tmp_path / "net")
    doubled: Any = [A]
    for _ in range(60):
        doubled = [doubled, doubled]
    for content in (cycle, {"x": doubled}):
        with pytest.raises(CheckpointError, match="does it contain itself"):
            from_torch(content)


# ----------------------------------------------------------------------------- training checkpoints


@pytest.fixture
def training(torch, tmp_path):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(content, tmp_path / "train.pth.tar")
    return tmp_path / "train.pth.tar", model


LINEAR = {"params": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}


def test_only_takes_the_model_out_of_a_training_checkpoint(training):
    path, model = training
    with pytest.raises(CheckpointError, match="not in the template: optimizer/state/0/exp_avg"):
        from_torch(path, like=LINEAR, rename={"model": ""})
    got = from_torch(path, like=LINEAR, pattern="model", rename={"model": ""})
    np.testing.assert_array_equal(got["params"]["kernel"], model.weight.detach().numpy().T)
    np.testing.assert_array_equal(got["params"]["bias"], model.bias.detach().numpy())
    assert paths(from_torch(path, pattern="model")) == ["params/model/bias", "params/model/kernel"]
    assert paths(from_torch(path, pattern=["model.bias", "model.weight"])) == paths(
        from_torch(path, pattern="model")
    )
    # As in `load`, a pattern speaks of the new paths, and `like` is the part that it chooses.
    for pattern in ("kernel", "params/kernel", "k*"):
        got = from_torch(
            path,
            like={"params": {"kernel": LINEAR["params"]["kernel"]}},
            pattern=pattern,
            rename={"model": ""},
        )
        np.testing.assert_array_equal(got["params"]["kernel"], model.weight.detach().numpy().T)


def test_only_must_match_something(training):
    with pytest.raises(
        CheckpointError, match="pattern: no path matches 'modle'; the nearest of .*'model/"
    ):
        from_torch(training[0], pattern=["model", "modle"])
    with pytest.raises(ValueError, match="pattern must be a pattern of paths or several, got none"):
        from_torch(training[0], pattern=[])


def test_only_leaves_alone_what_cannot_be_read(torch, state_dict):
    content = {
        "model": state_dict,
        "teacher": torch.nn.Linear(2, 2),
        "sparse": {"w": torch.eye(2).to_sparse()},
    }
    assert_is_state_dict(from_torch(content, pattern="model", rename={"model": ""}))
    with pytest.raises(
        CheckpointError,
        match="leaf 'teacher': .*Linear, expected arrays by name: give its state_dict",
    ):
        from_torch(content)


def test_only_for_the_other_libraries_and_for_stacks():
    variables = {"params": {"a": {"kernel": A}, "b": {"kernel": A}}}
    assert paths(from_flax(variables, pattern="b")) == ["params/b/kernel"]
    assert paths(from_haiku({"a": {"w": A}, "b": {"w": A}}, pattern="b/kernel")) == [
        "params/b/kernel"
    ]
    assert paths(from_equinox({"a": {"weight": A}, "b": {"weight": A}}, pattern="b")) == [
        "params/b/kernel"
    ]
    like = {"params": {"blocks": {"bias": jnp.zeros((2, 3))}}}
    source = {"blocks.0.bias": B, "blocks.1.bias": 2 * B, "head.bias": B}
    for pattern in ("blocks", "blocks/bias", "**/blocks/bias"):
        got = from_torch(source, like=like, pattern=pattern)
        np.testing.assert_array_equal(got["params"]["blocks"]["bias"], [B, 2 * B])


def test_convert_takes_only_a_part(training, tmp_path):
    assert (
        main(
            [
                "convert",
                str(training[0]),
                str(tmp_path / "out"),
                "--pattern",
                "model",
                "--rename",
                "model=",
            ]
        )
        == 0
    )
    assert paths(load(tmp_path / "out")) == ["params/bias", "params/kernel"]
    with pytest.raises(SystemExit, match="^2$"):
        main(
            [
                "convert",
                str(training[0]),
                str(tmp_path / "more"),
                "--pattern",
                "model",
                "--to",
                "torch",
            ]
        )


# -------------------------------------------------------------------------------------- odd tensors

STRIDED = {
    "transposed": lambda t: t.arange(24.0).reshape(4, 6).T,
    "every other": lambda t: t.arange(24.0).reshape(4, 6)[::2, ::3],
    "column": lambda t: t.arange(24.0).reshape(4, 6)[:, 1],
    "one of a strided axis": lambda t: t.arange(10.0)[5::5][:1],
    "expanded": lambda t: t.arange(3.0).expand(4, 3),
    "expanded scalar": lambda t: t.tensor(2.0).expand(3),
    "channels last": lambda t: (
        t.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=t.channels_last)
    ),
    "parameter": lambda t: t.nn.Parameter(t.arange(24.0).reshape(4, 6))[1:, ::2],
    "half": lambda t: t.arange(6.0).half()[::2],
    "diagonal": lambda t: t.arange(9.0).reshape(3, 3).diagonal(),
    "windows": lambda t: t.arange(6.0).unfold(0, 3, 1),
    "conjugate": lambda t: t.tensor([[1 + 2j, 3 - 1j], [2j, 1]]).conj(),
    "conjugate transposed": lambda t: t.tensor([[1 + 2j, 3 - 1j], [2j, 1]]).conj().T,
    "negative": lambda t: t.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "real part": lambda t: t.tensor([1 + 2j, 3 - 1j]).real,
    "empty": lambda t: t.zeros(0, 3).T,
    "scalar": lambda t: t.arange(3.0)[1],
}


@pytest.mark.parametrize("name", STRIDED)
def test_tensors_of_all_strides_have_their_values(name, torch, tmp_path):
    x = STRIDED[name](torch)
    got = from_torch({"w": x})["params"]["w"]
    assert got.shape == tuple(x.shape) and got.dtype.name == str(x.dtype).removeprefix("torch.")
    assert np.asarray(got).tolist() == x.tolist()
    torch.save({"w": x.detach()}, tmp_path / "net")
    np.testing.assert_array_equal(from_torch(tmp_path / "net")["params"]["w"], got)


def test_bits_of_narrow_dtypes_survive_strides(torch):
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        x = torch.tensor([[0.5, -2.0, 3.0], [1.0, 0.0, -0.25]]).to(getattr(torch, name)).T[::2]
        got = from_torch({"w": x})["params"]["w"]
        assert got.dtype.name == name
        np.testing.assert_array_equal(np.asarray(got, np.float32), x.float().numpy())


def test_arrays_of_numpy_of_all_strides_and_byte_orders():
    for x in [
        A.T,
        A[::-1, ::-1],
        A[:, :1],
        np.broadcast_to(B, (2, 3)),
        A.astype(">f4"),
        np.asfortranarray(A),
    ]:
        got = from_torch({"w": x})["params"]["w"]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, x)


REFUSED = {
    "COO": (lambda t: t.eye(3).to_sparse(), "sparse tensor .torch.sparse_coo.*give x.to_dense()"),
    "CSR": (
        lambda t: t.eye(3).to_sparse_csr(),
        "sparse tensor .torch.sparse_csr.*give x.to_dense()",
    ),
    "meta": (lambda t: t.ones(2, device="meta"), "device 'meta' has no values"),
    "quantized": (
        lambda t: t.quantize_per_tensor(t.ones(2), 0.1, 0, t.qint8),
        "quantized .*give x.dequantize()",
    ),
    "complex32": (
        lambda t: t.ones(2, dtype=t.complex32),
        "complex32 cannot be read: give x.to.torch.complex64",
    ),
    "nested": (
        lambda t: t.nested.nested_tensor([t.ones(2), t.ones(3)]),
        "nested tensor has no one shape",
    ),
    "lazy": (
        lambda t: t.nn.LazyLinear(3).weight,
        "uninitialized parameter has no values: run the model once",
    ),
    "packed": (
        lambda t: t.zeros(4, dtype=t.uint8).view(t.float4_e2m1fn_x2),
        "float4_e2m1fn_x2 cannot be read",
    ),
    "module": (
        lambda t: t.nn.Linear(2, 2),
        "Linear, expected arrays by name: give its state_dict()",
    ),
    "optimizer": (
        lambda t: t.optim.SGD([t.nn.Parameter(t.ones(1))]),
        "SGD, expected .*give its state_dict()",
    ),
    "set": (lambda t: {t.ones(2)}, "arrays in a set have no names"),
    "namespace": (
        lambda t: types.SimpleNamespace(w=t.ones(2)),
        "SimpleNamespace that holds arrays.*give vars()",
    ),
    "masked": (
        lambda t: np.ma.array([1.0, 2.0], mask=[False, True]),
        "would lose its mask: fill it",
    ),
    "objects": (lambda t: np.array([None, 1.0]), "dtype object cannot be stored"),
    "abstract": (
        lambda t: jax.ShapeDtypeStruct((2,), jnp.float32),
        "ShapeDtypeStruct has no values",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated).*")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_values_in_order_is_refused_by_path_with_the_remedy(name, torch):
    make, match = REFUSED[name]
    with pytest.raises(CheckpointError, match=f"leaf 'net/w': .*{match}"):
        from_torch({"ok": A, "net": {"w": make(torch)}})


def test_a_module_or_an_optimizer_instead_of_its_state_dict(torch):
    model = torch.nn.Linear(2, 3)
    for source in (model, torch.optim.SGD(model.parameters())):
        with pytest.raises(CheckpointError, match="expected arrays by name: give its state_dict()"):
            from_torch(source)
    np.testing.assert_array_equal(
        from_torch(model.state_dict())["params"]["bias"], model.bias.detach().numpy()
    )


def test_random_keys_and_text_beside_arrays_are_left_out():
    content = STATE_DICT | {
        "key": jax.random.key(0),
        "name": "x",
        "path": np.array(["a"]),
        "when": np.datetime64("2020"),
    }
    assert_is_state_dict(from_torch(content))


# --------------------------------------------------------------------------------- hostile archives


def rewritten(
    source, target, compression=zipfile.ZIP_STORED, change=lambda info, data: (info, data)
):
    """A copy of a zip archive, record by record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            info = zipfile.ZipInfo(record.filename)
            info.compress_type = compression
            info, data = change(info, old.read(record))
            new.writestr(info, data)


def test_a_deflated_archive_is_refused_before_it_is_unpacked(torch, tmp_path):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "net.pt")
    rewritten(tmp_path / "net.pt", tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED)
    assert os.path.getsize(tmp_path / "bomb.pt") < 10_000
    with pytest.raises(
        CheckpointError, match="compressed or encrypted, expected bytes as they are"
    ):
        from_torch(tmp_path / "bomb.pt")
    rewritten(tmp_path / "net.pt", tmp_path / "again.pt")
    assert from_torch(tmp_path / "again.pt")["params"]["w"].shape == (1 << 20,)


def test_damage_of_any_record_is_found(torch, state_dict, tmp_path):
    """torch does not check checksums: a flipped bit gives an error here or, in padding, the same
    numbers, never others.
    """
    torch.save(state_dict, tmp_path / "net.pt")
    raw = (tmp_path / "net.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        directory = archive.start_dir
    # All of the directory at the end, where one bit makes torch hand out memory that nothing has
    # filled.
    places = [*range(directory, len(raw)), *np.random.default_rng(0).integers(0, directory, 200)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 0x10
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            got = from_torch(tmp_path / "damaged.pt")
        except CheckpointError:
            continue
        assert_is_state_dict(got)


def test_a_record_that_is_marked_as_a_folder_is_refused(torch, state_dict, tmp_path):
    def as_folder(info, data):
        info.external_attr = 0x10 if info.filename.endswith("data/0") else 0
        return info, data

    torch.save(state_dict, tmp_path / "net.pt")
    rewritten(tmp_path / "net.pt", tmp_path / "evil.pt", change=as_folder)
    with pytest.raises(CheckpointError, match="data/0': the record is marked as a folder"):
        from_torch(tmp_path / "evil.pt")


def test_a_file_without_checksums_says_how_to_write_it_again(torch, state_dict, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict, tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    text = "a file of torch.save, .*set_crc32_options.False.: save it again without"
    with pytest.raises(CheckpointError, match=text):
        from_torch(tmp_path / "net.pt")


def test_a_record_twice_is_refused(torch, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "net.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "net.pt", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("net/data/0", bytes(A.nbytes))
    with pytest.raises(
        CheckpointError, match="leaf 'net/data/0': the archive has two records of this name"
    ):
        from_torch(tmp_path / "net.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_file_does_not_ask_for_much_memory(zipped, torch, tmp_path):
    torch.save(
        {"w": torch.zeros(1).expand(1 << 34)},
        tmp_path / "net.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="leaf 'w': the tensors take 68,719,476,736 bytes"):
        from_torch(tmp_path / "net.pt")


def test_an_object_of_another_class_is_named(torch, state_dict, tmp_path):
    torch.save({"model": state_dict, "args": argparse.Namespace(lr=0.1)}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError,
        match=r"an object of argparse.Namespace; .*safe_globals\(\[argparse.Namespace\]\)",
    ):
        from_torch(tmp_path / "net.pt")
    # The remedy that the error names, for a file that can be trusted.
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert_is_state_dict(from_torch(tmp_path / "net.pt", pattern="model", rename={"model": ""}))
