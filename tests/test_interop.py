"""Parameters of other libraries.

The output of the other library is the expectation for the output of jaxnet. The tests that need a
library are skipped if it is missing; the rules themselves are tested without.
"""

import json
import os
import pickle
import sys
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxnet import batch_norm, chain, conv, dense, embed, layer_norm, repeat, tree, wire
from jaxnet.checkpoint import (
    CheckpointError,
    from_equinox,
    from_flax,
    from_haiku,
    from_torch,
    load,
    save,
    to_torch,
)
from jaxnet.cli import main

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 9, 9, 3)).astype(np.float32)
IDS = np.array([5, 2], np.int32)


@wire(
    conv=conv(4, 3, strides=2, padding="VALID"),
    bn=batch_norm(),
    # The matrix is square, so its shape cannot tell whether it has been transposed.
    hidden=dense(4),
    embed=embed(7, 4),
    norm=layer_norm(),
    head=dense(5, bias=False),
)
def network(f, x, ids):
    h = jax.nn.relu(f.bn(f.conv(x))).mean((-3, -2))
    return f.head(f.norm(f.hidden(h) + f.embed(ids)))


def template(net=network, *inputs):
    inputs = inputs or (jnp.asarray(IMAGES), jnp.asarray(IDS))
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return {
        "params": params,
        "state": jax.eval_shape(net.init_state, *inputs) if net.init_state else {},
    }


def outputs(variables):
    y, _ = network.apply(
        variables["params"], jnp.asarray(IMAGES), jnp.asarray(IDS), state=variables["state"]
    )
    return np.asarray(y)


def noisy(x):
    """Numbers that layers do not start with, because zeros and ones could be mistaken for those;
    positive numbers stay positive.
    """
    return (x + RNG.uniform(0.1, 0.5, np.shape(x))).astype(x.dtype)


def library(name):
    """Import a module or skip the test; its warnings do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            name, reason=f"{name} is not installed: these numbers are compared with its own"
        )


@pytest.fixture
def torch():
    return library("torch")


def assert_equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        y = b[path]
        assert (np.asarray(x).dtype, np.shape(x)) == (np.asarray(y).dtype, np.shape(y)), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


# ---------------------------------------------------------------------------------------- the rules


def arange(*shape, dtype: Any = np.float32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


STATE_DICT = {
    "conv.weight": arange(2, 3, 4, 5),
    "conv.bias": arange(2),
    "bn.weight": arange(2),
    "bn.bias": arange(2),
    "bn.running_mean": arange(2),
    "bn.running_var": arange(2),
    "bn.num_batches_tracked": np.array(7),
    "square.weight": arange(3, 3),
    "line.weight": arange(2, 3, 4),
    "volume.weight": arange(2, 3, 4, 5, 6),
    "rnn.weight_ih_l0": arange(6, 2),
}


def test_the_layout_of_each_kind_of_array():
    """By PyTorch's documentation: linear [out, in], convolution [out, in, *window]."""
    got = from_torch(STATE_DICT)
    params, state = got["params"], got["state"]
    assert sorted(tree.paths(got)) == [
        *[
            "params/bn/bias",
            "params/bn/scale",
            "params/conv/bias",
            "params/conv/kernel",
            "params/line/kernel",
        ],
        *[
            "params/rnn/weight_ih_l0",
            "params/square/kernel",
            "params/volume/kernel",
            "state/bn/mean",
            "state/bn/var",
        ],
    ]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))
    conv, line, volume, square = (
        STATE_DICT[f"{n}.weight"] for n in ("conv", "line", "volume", "square")
    )
    assert (
        params["conv"]["kernel"].shape == (4, 5, 3, 2)
        and params["conv"]["kernel"][3, 1, 2, 0] == conv[0, 2, 3, 1]
    )
    assert (
        params["line"]["kernel"].shape == (4, 3, 2)
        and params["line"]["kernel"][3, 2, 1] == line[1, 2, 3]
    )
    assert params["volume"]["kernel"].shape == (4, 5, 6, 3, 2)
    assert params["volume"]["kernel"][1, 2, 3, 2, 1] == volume[1, 2, 1, 2, 3]
    np.testing.assert_array_equal(params["square"]["kernel"], square.T)
    # No rule: as it is.
    np.testing.assert_array_equal(params["rnn"]["weight_ih_l0"], STATE_DICT["rnn.weight_ih_l0"])
    np.testing.assert_array_equal(state["bn"]["var"], STATE_DICT["bn.running_var"])


def test_back_to_a_state_dict_and_forth_is_exact():
    got = to_torch(from_torch(STATE_DICT))
    assert got.keys() == STATE_DICT.keys() - {"bn.num_batches_tracked"}
    for name, x in got.items():
        assert type(x) is np.ndarray and x.dtype == STATE_DICT[name].dtype and x.flags.c_contiguous
        np.testing.assert_array_equal(x, STATE_DICT[name])
    variables = jax.tree.map(
        noisy, (network.init(jax.random.key(0), IMAGES, IDS), network.init_state(IMAGES, IDS))
    )
    variables = {"params": variables[0], "state": variables[1]}
    variables["params"]["head"]["kernel"] = jnp.asarray(
        variables["params"]["head"]["kernel"], jnp.bfloat16
    )
    assert_equal(from_torch(to_torch(variables), like=variables), variables)


def test_a_matrix_is_an_embedding_where_the_template_or_the_rename_says_so():
    source, table = (
        {"wte.weight": arange(3, 3), "lm.weight": arange(3, 3)},
        {"embedding": jnp.zeros((3, 3))},
    )
    like = {"params": {"tokens": table, "lm": {"kernel": jnp.zeros((3, 3))}}}
    by_like = from_torch(source, like=like, rename={"wte": "tokens"})
    by_name = from_torch(source, rename={"wte.weight": "tokens/embedding"})
    assert_equal(by_like["params"], by_name["params"])
    np.testing.assert_array_equal(by_like["params"]["tokens"]["embedding"], source["wte.weight"])
    np.testing.assert_array_equal(by_like["params"]["lm"]["kernel"], source["lm.weight"].T)
    assert by_like.keys() == {"params"} and by_name["state"] == {}
    back = to_torch(by_like, rename={"tokens/embedding": "wte.weight"})
    np.testing.assert_array_equal(back["wte.weight"], source["wte.weight"])


def test_renames_have_dots_or_slashes_the_longest_counts_and_a_function_may_do_it():
    source = {
        "state_dict": {"module": {f"{name}.bias": arange(2) for name in ("a.0", "a.1", "b")}},
        "epoch": 3,
    }
    wanted = ["params/b/bias", "params/first/bias", "params/rest/1/bias"]
    for rename in [
        {"state_dict.module": "", "state_dict.module.a": "rest", "state_dict.module.a.0": "first"},
        {"state_dict/module": "", "state_dict/module/a": "rest", "state_dict/module/a/0": "first"},
        lambda path: (
            path[len("state_dict/module/") :].replace("a/0", "first").replace("a/", "rest/")
        ),
    ]:
        got = from_torch(source, rename=rename)
        assert sorted(tree.paths(got)) == wanted
    back = to_torch(
        got,
        rename={
            "": "state_dict.module",
            "first": "state_dict.module.a.0",
            "rest": "state_dict/module/a",
        },
    )
    assert set(back) == {f"state_dict.module.{name}.bias" for name in ("a.0", "a.1", "b")}


def test_all_that_does_not_fit_is_in_one_error_with_a_rename_that_can_be_pasted():
    like = {
        "params": {
            "body": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
            "head": {"bias": jnp.zeros(4)},
        }
    }
    source = {
        "net.fc.weight": arange(2, 3),
        "net.fc.bias": arange(2),
        "head.bias": arange(5),
        "head.weight": arange(5),
    }
    with pytest.raises(CheckpointError) as caught:
        from_torch(source, like=like)
    assert str(caught.value).split("\n  ") == [
        "the state dict: it does not fit the template `like` (without `like` it loads as saved):",
        "missing from the file: body/kernel float32[3,2]",
        "missing from the file: body/bias float32[2]",
        "not in the template: net/fc/kernel float32[3,2]",
        "not in the template: net/fc/bias float32[2]",
        "not in the template: head/scale float32[5]",
        "shape differs: head/bias: template float32[4], file float32[5]",
        "perhaps renamed: net/fc in the file is body in the template (2 leaves)",
        "if so: rename={'net/fc': 'body'}",
    ]
    source["head.bias"] = arange(4)
    got = from_torch(source, like=like, rename={"net/fc": "body"}, strict=False)
    np.testing.assert_array_equal(got["params"]["body"]["kernel"], source["net.fc.weight"].T)
    np.testing.assert_array_equal(got["params"]["head"]["bias"], source["head.bias"])


def test_strict_false_leaves_out_what_only_the_source_has_and_forgives_nothing_else():
    like = {"params": {"body": {"bias": jnp.zeros(2)}, "more": jnp.ones(1)}}
    source = {"body.bias": arange(2), "head.bias": arange(3)}
    with pytest.raises(
        CheckpointError,
        match="missing from the file: more float32.1.(.|\n)*split off with jaxnet.tree",
    ):
        from_torch(source, like=like, strict=False)
    # The remedy that the error names.
    new, old = tree.split(like, "params/more")
    got = tree.merge(from_torch(source, like=old, strict=False), new)
    assert_equal(got, {"params": {"body": {"bias": jnp.arange(2.0)}, "more": jnp.ones(1)}})
    with pytest.raises(CheckpointError, match="missing from the file: head/bias"):
        from_torch(
            {"fc.bias": arange(2)}, like={"params": {"head": {"bias": jnp.zeros(2)}}}, strict=False
        )


def test_dtypes_are_kept_unless_cast_and_what_would_be_narrowed_stays_numpy():
    source = {"a.bias": arange(2, dtype=np.float64), "b.bias": arange(2).astype(ml_dtypes.bfloat16)}
    got = from_torch(source)["params"]
    assert type(got["a"]["bias"]) is np.ndarray and got["b"]["bias"].dtype == jnp.bfloat16
    like = {"params": {"a": {"bias": jnp.zeros(2)}, "b": {"bias": np.zeros(2)}}}
    with pytest.raises(
        CheckpointError, match="dtype differs: a/bias: template float32.2., file float64"
    ):
        from_torch(source, like=like)
    got = from_torch(source, like=like, cast=True)["params"]
    assert got["a"]["bias"].dtype == jnp.float32 and type(got["b"]["bias"]) is np.ndarray


def test_integers_are_taken_where_the_template_has_them():
    like = {"params": {}, "state": {"bn": {"num_batches_tracked": np.array(0)}}}
    got = from_torch({n: x for n, x in STATE_DICT.items() if n.endswith("tracked")}, like=like)
    assert_equal(
        got["state"], {"bn": {"num_batches_tracked": STATE_DICT["bn.num_batches_tracked"]}}
    )
    counts = {"params": {"a": jnp.ones(2)}, "state": {"norm": {"count": jnp.array(3)}}}
    assert_equal(from_torch(to_torch(counts), like=counts), counts)


def test_nothing_is_shared_with_the_source():
    source = {"a.bias": np.zeros(64, np.float32), "a.weight": np.zeros((64, 64), np.float32)}
    got = from_torch(source)
    back = to_torch(from_torch(source))
    for x in source.values():
        x += 1
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves((got, back)))


def test_numbered_modules_are_stacked_where_the_template_has_a_repeat():
    net = chain(body=repeat(chain(jax.nn.tanh, fc=dense(3), norm=batch_norm()), 4), head=dense(2))
    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    like = template(net, x)
    source = {f"h.{i}.fc.{n}": noisy(np.zeros(s, np.float32)) for i in range(4) for n, s in FC}
    source |= {f"h.{i}.norm.{n}": noisy(np.zeros(3, np.float32)) for i in range(4) for n in NORM}
    source |= {
        "head.weight": noisy(np.zeros((2, 3), np.float32)),
        "head.bias": np.zeros(2, np.float32),
    }
    got = from_torch(source, like=like, rename={"h": "body"})
    y = x
    # The layers one by one, as the numbers say; evaluation of batch norm as in its paper.
    for i in range(4):
        a = np.tanh(y) @ source[f"h.{i}.fc.weight"].T + source[f"h.{i}.fc.bias"]
        mean, var, scale, bias = (source[f"h.{i}.norm.{n}"] for n in NORM)
        y = (a - mean) / np.sqrt(var + 1e-5) * scale + bias
    y = y @ source["head.weight"].T
    np.testing.assert_allclose(
        net.apply(got["params"], x, state=got["state"])[0], y, rtol=1e-5, atol=1e-5
    )
    back = to_torch(got, rename={"body": "h"}, stacked="body")
    assert back.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(back[name], array)
    del source["h.2.fc.bias"]
    with pytest.raises(
        CheckpointError,
        match=r"missing from the file: body/fc/bias .*\n  not in the .*: body/0/fc/bias",
    ):
        from_torch(source, like=like, rename={"h": "body"})
    with pytest.raises(
        ValueError, match="the leaves below 'heads' must share a leading axis, these do not exist"
    ):
        to_torch(got, stacked="heads")
    with pytest.raises(
        ValueError, match=r"below 'head' must share a leading axis, these have .* sizes \[2, 3\]"
    ):
        to_torch(got, stacked=["body", "head"])


FC = [("weight", (3, 3)), ("bias", (3,))]
NORM = ["running_mean", "running_var", "weight", "bias"]


def test_what_is_no_variables_or_has_no_template():
    for wrong in [
        {"w": jnp.zeros(2)},
        {"state": {}},
        {"params": {}, "state": {}, "step": 1},
        jnp.zeros(2),
    ]:
        for call in [lambda x: from_torch({"w": arange(2)}, like=x), to_torch]:
            with pytest.raises(
                ValueError, match="must be {'params': params, 'state': state} or .*, got "
            ):
                call(wrong)
    both = {"params": {"a": jnp.zeros(1)}, "state": {"a": jnp.zeros(1)}}
    with pytest.raises(ValueError, match="'a' is in params and in state"):
        to_torch(both)
    for leaf, match in [
        (1.5, "'state/b' is of kind float"),
        (jax.random.key(0), "'state/b' is of kind key"),
    ]:
        with pytest.raises(ValueError, match=match):
            to_torch({"params": {}, "state": {"b": leaf}})
    with pytest.raises(CheckpointError, match="leaf 'params/a': a ShapeDtypeStruct has no values"):
        to_torch({"params": {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}})
    with pytest.raises(ValueError, match="'a/mean' in params and in batch_stats"):
        from_flax({"params": {"a": {"mean": arange(1)}}, "batch_stats": {"a": {"mean": arange(1)}}})
    with pytest.raises(ValueError, match="need a tree `like`"):
        from_torch({}, cast=True)
    with pytest.raises(
        CheckpointError,
        match="leaf 'a/kernel': rename gives this path to 'a/kernel' and 'a/weight'",
    ):
        from_torch({"a.kernel": arange(2, 2), "a.weight": arange(2, 2)})
    with pytest.raises(CheckpointError, match="another leaf is called 'a.weight' too"):
        to_torch({"params": {"a": {"kernel": arange(2, 2), "scale": arange(2)}}})
    with pytest.raises(
        CheckpointError, match="leaf 'a/b': two arrays have this path, 'a/b' and another"
    ):
        from_torch({"a.b": arange(1), "a/b": arange(1)})
    with pytest.raises(CheckpointError, match="leaf 'mlp/linear/w': two arrays have this path"):
        from_haiku({"mlp/~/linear": {"w": arange(1, 1)}, "mlp/linear": {"w": arange(1, 1)}})
    with pytest.raises(CheckpointError, match="no path matches 'b'"):
        from_torch({"a.kernel": arange(2, 2)}, rename={"b": "c"})


# -------------------------------------------------------------------------------------------- files


def test_a_safetensors_file_and_what_is_written(tmp_path):
    safetensors.numpy.save_file({n: x for n, x in STATE_DICT.items()}, tmp_path / "in.safetensors")
    variables = from_torch(tmp_path / "in.safetensors")
    assert_equal(variables, from_torch(STATE_DICT))
    save(tmp_path / "out.safetensors", to_torch(variables))
    # This is the official reader.
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert written.keys() == STATE_DICT.keys() - {"bn.num_batches_tracked"}
    for name, x in written.items():
        np.testing.assert_array_equal(x, STATE_DICT[name])
    assert_equal(from_torch(tmp_path / "out.safetensors"), variables)


def write_zip_of_torch(path):
    """The first bytes of a file of torch.save, and the record that tells it from other archives."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}))


def test_without_torch_its_files_are_refused_with_what_to_install(tmp_path, monkeypatch):
    # This makes `import torch` fail.
    monkeypatch.setitem(sys.modules, "torch", None)
    write_zip_of_torch(tmp_path / "net.pt")
    with pytest.raises(ImportError, match=r"net.pt: needs torch .* pip install 'jaxnet\[torch\]'"):
        from_torch(tmp_path / "net.pt")
    assert_equal(
        from_torch({"a.bias": arange(2)}), {"params": {"a": {"bias": jnp.arange(2.0)}}, "state": {}}
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_of_torch_is_executed(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "evil": Evil()}, "evil.pt")
    (tmp_path / "evil.th").write_bytes(pickle.dumps({"a": 1, "evil": Evil()}))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([torch.zeros(2)], "list.pt")
    for name, text in {
        "evil.pt": "torch cannot read it as tensors alone",
        "evil.th": "torch cannot read it as tensors alone",
        "cut.pt": "its zip archive is damaged or cut off",
        "empty.pt": "it is empty; expected safetensors, torch.save or Keras",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {text}"):
            from_torch(name)
    with pytest.raises(CheckpointError, match="it holds a list, expected a dict of tensors"):
        from_torch("list.pt")
    with pytest.raises(FileNotFoundError):
        from_torch("missing.pt")
    assert not os.path.exists("executed")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(
        ImportError, match="torch 2.5.1.cpu does not open files safely; from 2.6 on"
    ):
        from_torch("list.pt")


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safetensors.numpy.save_file(STATE_DICT, "torch.safetensors", metadata={"format": "pt"})
    save("jaxnet.safetensors", from_torch(STATE_DICT), metadata={"accuracy": 0.98})


def test_convert_from_a_state_dict_and_back(files, capsys):
    assert main(["convert", "torch.safetensors", "out"]) == 0
    size = os.path.getsize("out")
    # The parameters are 120 + 5 * 2 + 9 + 24 + 720 + 12.
    assert capsys.readouterr().out == f"out: 10 arrays, 895 parameters, {size:,} bytes\n"
    assert_equal(load("out"), from_torch(STATE_DICT))
    assert main(["convert", "out", "back.safetensors", "--to", "torch", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = safetensors.numpy.load_file("back.safetensors")
    assert {x["path"]: x["shape"] for x in printed["leaves"]} == {
        n: list(x.shape) for n, x in written.items()
    }
    assert printed["metadata"] == {"format": "pt"} and written.keys() == STATE_DICT.keys() - {
        "bn.num_batches_tracked"
    }
    for name, x in written.items():
        np.testing.assert_array_equal(x, STATE_DICT[name])


def test_convert_with_renames_a_template_and_stacks(files):
    names = ["--rename", "conv=stem/conv", "--rename", "square.weight=table/embedding"]
    assert main(["convert", "torch.safetensors", "out", *names]) == 0
    rename = {"conv": "stem/conv", "square.weight": "table/embedding"}
    assert_equal(load("out"), from_torch(STATE_DICT, rename=rename))
    save("like", {"params": {"body": {"kernel": jnp.zeros((2, 3, 3))}}, "opt": 1})
    save("numbered", {"h.0.weight": arange(3, 3), "h.1.weight": 2 * arange(3, 3)})
    assert (
        main(
            [
                "convert",
                "--from",
                "torch",
                "numbered",
                "stacked",
                "--like",
                "like",
                "--rename",
                "h=body",
            ]
        )
        == 0
    )
    np.testing.assert_array_equal(
        load("stacked")["params"]["body"]["kernel"][1], 2 * arange(3, 3).T
    )
    assert (
        main(
            [
                "convert",
                "stacked",
                "again",
                "--to",
                "torch",
                "--stacked",
                "body",
                "--rename",
                "body=h",
            ]
        )
        == 0
    )
    assert_equal(load("again"), load("numbered"))


def test_convert_repacks_without_another_layout(files):
    tree = {
        "enc": {"kernel": np.ones((2, 3))},
        "wide": np.int64(2**40),
        "key": jax.random.key(1),
        "step": 3,
    }
    save("t", tree, metadata={"a": 1})
    assert main(["convert", "t", "u"]) == 0
    with open("t", "rb") as a, open("u", "rb") as b:
        assert a.read() == b.read()
    assert (
        main(["convert", "t", "u", "--force", "--rename", "=params", "--rename", "enc=params/body"])
        == 0
    )
    assert sorted(tree.keys() - {"enc"} | {"body"}) == sorted(load("u")["params"])
    assert main(["convert", "torch.safetensors", "v", "--to", "torch", "--rename", "bn=norm"]) == 0
    written = safetensors.numpy.load_file("v")
    assert written.keys() == {n.replace("bn.", "norm.") for n in STATE_DICT}
    np.testing.assert_array_equal(written["conv.weight"], STATE_DICT["conv.weight"])
    assert main(["convert", "torch.safetensors", "w", "--from", "jaxnet"]) == 0
    assert load("w").keys() == STATE_DICT.keys()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            ["torch.safetensors", "jaxnet.safetensors"],
            "jaxnet.safetensors exists: --force replaces it",
        ),
        (["torch.safetensors", "out", "--rename", "conv"], "'conv' must be OLD=NEW"),
        (
            ["jaxnet.safetensors", "out", "--like", "jaxnet.safetensors"],
            "--like is for --from torch --to jaxnet",
        ),
        (
            ["torch.safetensors", "out", "--stacked", "body"],
            "--stacked is for --from jaxnet --to torch",
        ),
        (
            ["jaxnet.safetensors", "out", "--to", "torch", "--stacked", "body"],
            "'body' must share a leading axis",
        ),
        (["torch.safetensors", "out", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["torch.safetensors"], "required: OUT"),
    ],
)
def test_a_wrong_convert_gives_code_2_and_writes_nothing(arguments, match, files, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["convert", *arguments])
    assert match in capsys.readouterr().err and sorted(os.listdir()) == [
        "jaxnet.safetensors",
        "torch.safetensors",
    ]


def test_convert_tells_a_file_of_torch_by_its_content(files, capsys):
    write_zip_of_torch("net")
    with pytest.raises(SystemExit, match="^2$"):
        main(["convert", "net", "out", "--from", "jaxnet"])
    assert (
        "a checkpoint of jaxnet is a safetensors file, and this is one of torch.save"
        in capsys.readouterr().err
    )
    assert not os.path.exists("out")


def test_exit_codes_of_convert(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with open("torch.safetensors", "rb") as a, open("cut.safetensors", "wb") as b:
        b.write(a.read()[:-1])
    save("bare", {"kernel": jnp.ones(2)})
    run = {"params": {"a": {"kernel": jnp.ones((2, 3))}}, "state": {"a": {}}, "step": 3}
    save("run", {"train_state": run, "best": None})
    save("stateful", {"train_state": run | {"state": {"a": {"mean": jnp.ones(3)}}}, "best": None})
    write_zip_of_torch("net.pt")
    for arguments, code, match in [
        (["missing", "out"], 2, "No such file"),
        (["net.pt", "out"], 2, "pip install 'jaxnet[torch]'"),
        (["cut.safetensors", "out"], 1, "it is cut off"),
        (["torch.safetensors", "out", "--rename", "con=body"], 1, "no path matches 'con'"),
        (["torch.safetensors", "out", "--like", "bare"], 1, "bare: it has no 'params' at its top"),
        (["bare", "out", "--to", "torch"], 1, "jaxnet convert IN OUT --rename =params"),
        (["run", "out", "--to", "torch"], 1, "--pattern train_state/params --rename train_state="),
        (
            ["stateful", "out", "--to", "torch"],
            1,
            "--pattern train_state/params --pattern train_state/state --rename train_state=",
        ),
    ]:
        assert main(["convert", *arguments]) == code
        assert match in capsys.readouterr().err and not os.path.exists("out")


def test_the_command_that_convert_advises_gives_the_variables_of_a_run(files, capsys):
    run = {
        "params": {"a": {"kernel": jnp.ones((2, 3))}},
        "state": {"a": {"mean": jnp.zeros(3)}},
        "opt": {"mu": jnp.ones(2)},
    }
    save("run", {"train_state": run, "best": None})
    assert main(["convert", "run", "out", "--to", "torch"]) == 1
    options = capsys.readouterr().err.rpartition("IN NEW ")[2].split()
    assert (
        main(["convert", "run", "new", *options]) == 0
        and main(["convert", "new", "out", "--to", "torch"]) == 0
    )
    assert_equal(load("new"), {"params": run["params"], "state": run["state"]})
    # PyTorch's kernel of a linear map is [out, in].
    tensors = {name: x.shape for name, x in load("out").items()}
    assert tensors == {"a.weight": (3, 2), "a.running_mean": (3,)}


EVIL = "\x1b[31m\a\r\n  forged\u202e"


@pytest.mark.parametrize(
    "where", ["twice", "both", "stacked", "kind", "weight", "only", "rename", "values", "flax"]
)
def test_errors_of_other_libraries_names_are_printable_and_on_one_line(where):
    one = np.ones(2, np.float32)

    class Odd:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, *args, **kwargs):
            raise RuntimeError(EVIL[:6])

    calls = {
        "twice": lambda: from_torch({EVIL: {"b": one}, EVIL + ".b": one}),
        "both": lambda: to_torch({"params": {EVIL: one}, "state": {EVIL: one}}),
        "stacked": lambda: to_torch({"params": {"a": one}}, stacked=EVIL),
        "kind": lambda: to_torch({"params": {EVIL: 1.0}}),
        "weight": lambda: to_torch({"params": {EVIL: {"scale": one, "kernel": one}}}),
        "only": lambda: from_torch({"a": one}, pattern=EVIL),
        "rename": lambda: from_torch({EVIL: one}, rename=lambda name: 3),  # pyright: ignore[reportArgumentType]
        "values": lambda: from_torch({"a": Odd()}),
        "flax": lambda: from_flax({"params": {EVIL: one}, "batch_stats": {EVIL: one}}),
    }
    with pytest.raises((CheckpointError, ValueError, TypeError)) as caught:
        calls[where]()
    assert str(caught.value).isprintable() and r"\x1b[31m" in str(caught.value)


def test_convert_opens_files_of_torch(torch, files):
    torch.save({"model": {n: torch.from_numpy(x) for n, x in STATE_DICT.items()}}, "net.pt")
    assert main(["convert", "net.pt", "net.safetensors", "--rename", "model="]) == 0
    assert_equal(load("net.safetensors"), from_torch(STATE_DICT))


# ------------------------------------------------------------------------------------ the libraries


def torch_model(torch):
    """The network above in PyTorch, trained for three batches of statistics, and its output."""
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.hidden = (
                nn.Conv2d(3, 4, 3, stride=2),
                nn.BatchNorm2d(4),
                nn.Linear(4, 4),
            )
            self.embed, self.norm, self.head = (
                nn.Embedding(7, 4),
                nn.LayerNorm(4),
                nn.Linear(4, 5, bias=False),
            )

        def forward(self, x, ids):
            h = torch.relu(self.bn(self.conv(x))).mean((-2, -1))
            return self.head(self.norm(self.hidden(h) + self.embed(ids)))

    torch.manual_seed(0)
    model, x, ids = (
        Net(),
        torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(IDS),
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.rand_like(p)
        for _ in range(3):
            model(2 * x + 1, ids)
        return model.eval(), lambda: model(x, ids).detach().numpy()


def test_a_network_of_torch_computes_the_same_here_and_back_there(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, run = torch_model(torch)
    expected = run()
    variables = from_torch(model.state_dict(), like=template())
    # PyTorch's own output.
    np.testing.assert_allclose(outputs(variables), expected, rtol=1e-5, atol=1e-5)
    torch.save(model.state_dict(), "net.pt")
    torch.save(
        {"model": {f"module.{n}": x for n, x in model.state_dict().items()}, "epoch": 3},
        "train.pth",
    )
    assert_equal(from_torch("net.pt", like=template()), variables)
    assert_equal(from_torch("train.pth", like=template(), rename={"model.module": ""}), variables)
    save("out.safetensors", to_torch(variables))
    with torch.no_grad():
        for p in model.state_dict().values():
            p.zero_()
    assert abs(run() - expected).max() > 0.1
    load_file = pytest.importorskip("safetensors.torch").load_file
    # PyTorch's loading is strict by default.
    model.load_state_dict(load_file("out.safetensors"))
    np.testing.assert_array_equal(run(), expected)
    assert_equal(from_torch("out.safetensors", like=template()), variables)


def test_the_features_of_a_flattened_convolution_are_reordered_as_the_guide_says(torch):
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1, padding=1), nn.Flatten(), nn.Linear(4 * 9 * 9, 2)
    )
    net = chain(conv(4, 3, padding=1), lambda x: x.reshape(len(x), -1), dense(2))
    variables = from_torch(model.state_dict(), like=template(net, jnp.asarray(IMAGES)))
    kernel = variables["params"]["2"]["kernel"]  # [C H W, out] -> [H W C, out]
    kernel = kernel.reshape(4, 9, 9, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    variables = tree.put(variables, "params/2/kernel", kernel)
    expected = model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).detach().numpy()
    np.testing.assert_allclose(
        net.apply(variables["params"], IMAGES), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank, groups", [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_convolutions_of_every_rank_and_in_groups(rank, groups, torch):
    model = getattr(torch.nn, f"Conv{rank}d")(4, 8, (3, 2, 1)[:rank], groups=groups)
    x = RNG.normal(size=(2, *(5, 6, 4)[:rank], 4)).astype(np.float32)
    net = chain(conv(8, (3, 2, 1)[:rank], groups=groups, padding="VALID"))
    variables = from_torch(model.state_dict(), like=template(net, jnp.asarray(x)), rename={"": "0"})
    expected = np.moveaxis(
        model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy(), 1, -1
    )
    np.testing.assert_allclose(net.apply(variables["params"], x), expected, rtol=1e-4, atol=1e-5)


def test_every_dtype_of_torch_and_tensors_of_odd_strides(torch):
    for name in [
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ]:
        x = torch.tensor([[0.5, -2.0, 3.0], [1.0, 0.0, -0.25]]).to(getattr(torch, name))
        for tensor in [x, x.T, x[0], x[0, 1], x[:0]]:
            got = from_torch({"w": tensor.requires_grad_(name in ("float32", "float64"))})[
                "params"
            ]["w"]
            assert got.dtype.name == name and got.shape == tuple(tensor.shape)
            wide = torch.complex64 if name == "complex64" else torch.float64
            np.testing.assert_array_equal(
                np.asarray(got, str(wide)[6:]), tensor.detach().to(wide).numpy()
            )


def test_a_published_resnet_gives_its_published_logits(real_data, torch):
    """ResNet-20 for CIFAR-10, trained in PyTorch; the logits are from an independent forward pass
    in NumPy.
    """
    folder = real_data / "pretrained" / "resnet_cifar10"
    cifar = real_data / "cifar10" / "test_batch.bin.gz"
    if not folder.is_dir() or not cifar.exists():
        pytest.skip("the trained network or CIFAR-10 is not there")
    import gzip

    def block(features, stride):
        @wire(
            conv1=conv(features, 3, strides=stride, padding=1, bias=False),
            bn1=batch_norm(),
            conv2=conv(features, 3, padding=1, bias=False),
            bn2=batch_norm(),
        )
        def body(f, x):
            y = f.bn2(f.conv2(jax.nn.relu(f.bn1(f.conv1(x)))))
            # Shortcut A: every other pixel, and zeros on both sides.
            extra = (features - x.shape[-1]) // 2
            return jax.nn.relu(
                y + jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(extra, extra)])
            )

        return body

    stages = {
        f"layer{i + 1}": chain(*(block(16 << i, 2 if i and not n else 1) for n in range(3)))
        for i in range(3)
    }
    stem = dict(conv1=conv(16, 3, padding=1, bias=False), bn1=batch_norm(), relu=jax.nn.relu)
    resnet = chain(**stem, **stages, pool=lambda x: x.mean((1, 2)), linear=dense(10))
    records = np.frombuffer(gzip.decompress(cifar.read_bytes()), np.uint8).reshape(-1, 3073)[:256]
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / 255
    x = jnp.asarray(
        (images - [[[[0.485, 0.456, 0.406]]]]) / [[[[0.229, 0.224, 0.225]]]], jnp.float32
    )
    path = folder / "resnet20-12fca82f.th"
    variables = from_torch(path, like=template(resnet, x), rename={"state_dict.module": ""})
    logits, _ = jax.jit(lambda v, x: resnet.apply(v["params"], x, state=v["state"]))(variables, x)
    expected = np.load(folder / "resnet20_expected_logits_first256_test.npz")
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    # The published accuracy is 91.73 % of all 10,000.
    assert np.mean(np.argmax(logits, -1) == records[:, 0]) > 0.9


FLAX = {
    "Conv_0": "conv",
    "BatchNorm_0": "bn",
    "Dense_0": "hidden",
    "Embed_0": "embed",
    "LayerNorm_0": "norm",
}


def test_a_network_of_linen_computes_the_same():
    nn = library("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, ids):
            h = nn.Conv(4, (3, 3), strides=2, padding="VALID")(x)
            h = nn.relu(nn.BatchNorm(use_running_average=True)(h)).mean((-3, -2))
            h = nn.Dense(4)(h) + nn.Embed(7, 4)(ids)
            return nn.Dense(5, use_bias=False)(nn.LayerNorm(epsilon=1e-5)(h))

    with jax.numpy_rank_promotion("allow"):
        theirs = jax.tree.map(noisy, Net().init(jax.random.key(1), IMAGES, IDS))
        expected = Net().apply(theirs, IMAGES, IDS)
    variables = from_flax(theirs, like=template(), rename=FLAX | {"Dense_1": "head"})
    np.testing.assert_allclose(outputs(variables), expected, rtol=1e-5, atol=1e-5)
    # Without a template, the names are Flax's.
    plain = from_flax(theirs)
    assert plain["state"].keys() == {"BatchNorm_0"} and plain["params"].keys() == {*FLAX, "Dense_1"}


def test_a_network_of_nnx_computes_the_same():
    nnx = library("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), strides=2, padding="VALID", rngs=rngs)
            self.bn, self.hidden = nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
            self.embed, self.norm = (
                nnx.Embed(7, 4, rngs=rngs),
                nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs),
            )
            self.head, self.drop = (
                nnx.Linear(4, 5, use_bias=False, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
            )

        def __call__(self, x, ids):
            h = nnx.relu(self.bn(self.conv(x))).mean((-3, -2))
            return self.head(self.drop(self.norm(self.hidden(h) + self.embed(ids))))

    with jax.numpy_rank_promotion("allow"):
        model = Net(nnx.Rngs(0))
        nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
        model.eval()
        expected = model(jnp.asarray(IMAGES), jnp.asarray(IDS))
    for source in [model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))]:
        variables = from_flax(source, like=template())
        np.testing.assert_allclose(outputs(variables), expected, rtol=1e-5, atol=1e-5)


def test_a_network_of_haiku_computes_the_same():
    hk = library("haiku")

    def net(x, ids, training=False):
        h = hk.Conv2D(4, 3, stride=2, padding="VALID", name="conv")(x)
        h = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(h, training)).mean((-3, -2))
        h = hk.nets.MLP([4])(h) + hk.Embed(7, 4)(ids)
        return hk.Linear(5, with_bias=False)(hk.LayerNorm(-1, True, True)(h))

    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        init, apply = hk.transform_with_state(net)
        theirs, state = init(jax.random.key(2), IMAGES, IDS, True)
        theirs = jax.tree.map(noisy, theirs)
        for i in range(3):
            _, state = apply(theirs, state, None, IMAGES * (1 + i), IDS, True)
        expected, _ = apply(theirs, state, None, IMAGES, IDS)
    rename = {"batch_norm": "bn", "mlp/linear_0": "hidden", "layer_norm": "norm", "linear": "head"}
    variables = from_haiku(theirs, state, like=template(), rename=rename)
    np.testing.assert_allclose(outputs(variables), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_a_network_of_equinox_computes_the_same(mode):
    eqx = library("equinox")
    keys = jax.random.split(jax.random.key(3), 4)

    class Net(eqx.Module):
        conv: Any
        bn: Any
        hidden: Any
        embed: Any
        norm: Any
        head: Any

        def __call__(self, x, ids, state):
            h, state = self.bn(self.conv(x.transpose(2, 0, 1)), state)
            h = jax.nn.relu(h).mean((-2, -1))
            return self.head(self.norm(self.hidden[0](h) + self.embed(ids))), state

    def make():
        hidden, head = (
            eqx.nn.Linear(4, 4, key=keys[1]),
            eqx.nn.Linear(4, 5, use_bias=False, key=keys[3]),
        )
        first = (
            eqx.nn.Conv2d(3, 4, 3, stride=2, key=keys[0]),
            eqx.nn.BatchNorm(4, "batch", mode=mode, momentum=0.9),
        )
        return Net(*first, [hidden], eqx.nn.Embedding(7, 4, key=keys[2]), eqx.nn.LayerNorm(4), head)

    with jax.numpy_rank_promotion("allow"):
        model, state = eqx.nn.make_with_state(make)()
        model = jax.tree.map(lambda x: noisy(x) if eqx.is_array(x) else x, model)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
        for i in range(3):
            _, state = run(jnp.asarray(IMAGES) * (1 + i), jnp.asarray(IDS), state)
        model = eqx.nn.inference_mode(model)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
        expected, _ = run(jnp.asarray(IMAGES), jnp.asarray(IDS), state)
    variables = from_equinox(model, state, like=template(), rename={"hidden/0": "hidden"})
    np.testing.assert_allclose(outputs(variables), expected, rtol=1e-5, atol=1e-5)
    # Without its state, there are no averages.
    assert from_equinox(model)["state"] == {}
