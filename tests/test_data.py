"""jaxnet.data: IDX files byte for byte, MNIST from files and from (local) mirrors, digits, batches,
labels.
"""

import contextlib
import gzip
import hashlib
import http.server
import importlib
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxnet.data import (
    Dataset,
    Split,
    batches,
    check_labels,
    digits,
    mnist,
    read_idx,
    write_idx,
)
from jaxnet.data.batching import permutation

# The function of that name hides the module.
mnist_module = importlib.import_module("jaxnet.data.mnist_files")
digits_module = importlib.import_module("jaxnet.data.optical_digits")

# --- IDX ------------------------------------------------------------------------------------------

IDX_DTYPES = st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64])
SAMPLE = np.arange(6, dtype=np.int16).reshape(2, 3) - 2
# By hand, from the format.
SAMPLE_BYTES = bytes.fromhex("00000b02 00000002 00000003 fffe ffff 0000 0001 0002 0003")


@settings(max_examples=100, deadline=None)
@given(
    IDX_DTYPES.flatmap(
        lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    ),
    st.booleans(),
)
def test_idx_round_trip_is_bit_exact_for_every_dtype_and_shape(array, gzipped):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.idx.gz" if gzipped else "a.idx")
        write_idx(path, array)
        back = read_idx(path)
        assert os.listdir(folder) == [os.path.basename(path)]  # no temporary file is left
    assert (
        back.dtype == array.dtype
        and back.shape == array.shape
        and back.tobytes() == array.tobytes()
    )
    assert back.dtype.isnative and back.flags.writeable and back.flags.c_contiguous


def test_idx_bytes_are_those_of_the_format(tmp_path):
    write_idx(tmp_path / "a", SAMPLE)
    assert (tmp_path / "a").read_bytes() == SAMPLE_BYTES
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), SAMPLE)


def test_idx_is_gzipped_by_its_content_not_by_its_name(tmp_path):
    (tmp_path / "packed").write_bytes(gzip.compress(SAMPLE_BYTES, mtime=0))
    (tmp_path / "plain.gz").write_bytes(SAMPLE_BYTES)
    np.testing.assert_array_equal(read_idx(tmp_path / "packed"), SAMPLE)
    np.testing.assert_array_equal(read_idx(str(tmp_path / "plain.gz")), SAMPLE)


@pytest.mark.parametrize(
    "view", [SAMPLE.T, SAMPLE[::-1], SAMPLE.astype(">i2"), SAMPLE.astype("<i2")]
)
def test_idx_writes_any_layout_and_byte_order_and_leaves_the_array_alone(tmp_path, view):
    before = view.copy()
    write_idx(tmp_path / "a", view)
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), before)
    np.testing.assert_array_equal(view, before)


def test_idx_gzip_is_deterministic_and_replaces_whole_files(tmp_path):
    write_idx(tmp_path / "a.gz", SAMPLE)
    (tmp_path / "b.gz").write_bytes(b"an older file")
    write_idx(tmp_path / "b.gz", SAMPLE)
    packed = (tmp_path / "b.gz").read_bytes()
    assert packed == (tmp_path / "a.gz").read_bytes()
    assert packed[3] == 0 and packed[4:8] == bytes(4)  # RFC 1952: no file name, no time stamp
    assert gzip.decompress(packed) == SAMPLE_BYTES


def test_idx_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_idx(tmp_path / "a", SAMPLE)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_idx(tmp_path / "a", SAMPLE + 1)
    assert os.listdir(tmp_path) == ["a"]
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), SAMPLE)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float16, bool, "U3", "M8[s]"])
def test_idx_refuses_dtypes_it_cannot_hold(tmp_path, dtype):
    with pytest.raises(
        TypeError, match=r"a\.idx: IDX holds uint8, int8, .*float64, got .*; cast first"
    ):
        write_idx(tmp_path / "a.idx", np.zeros(2, dtype))
    assert not os.listdir(tmp_path)


def test_idx_refuses_an_axis_that_does_not_fit_its_header(tmp_path):
    with pytest.raises(ValueError, match="IDX axes are at most 4,294,967,295 long"):
        write_idx(tmp_path / "a", np.zeros((0, 2**32), np.uint8))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx_every_truncation_is_one_error(tmp_path, pack):
    whole, path = pack(SAMPLE_BYTES), tmp_path / "cut.idx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut\.idx: expected .*, got .*: fetch or write it again"
        ):
            read_idx(path)


def test_idx_every_bit_flip_of_the_header_is_an_error(tmp_path):
    """With one exception in the format itself: int8 and uint8 differ by a bit, and there is no
    checksum.
    """
    data = struct.pack(">BBBBII", 0, 0, 8, 2, 2, 3) + bytes(6)
    for bit in range(12 * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        if flipped[2] == 9:
            assert read_idx(tmp_path / "a").dtype == np.int8
        else:
            with pytest.raises(ValueError, match="expected .*, got"):
                read_idx(tmp_path / "a")


def test_idx_no_bit_flip_of_a_gzip_file_changes_what_is_read(tmp_path):
    packed = gzip.compress(SAMPLE_BYTES, mtime=0)
    unnoticed = 0
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        try:
            np.testing.assert_array_equal(read_idx(tmp_path / "a"), SAMPLE)
            unnoticed += 1
        except ValueError as error:
            assert "expected" in str(error) and "fetch or write it again" in str(error)
    # RFC 1952: the time stamp, XFL and OS (6 bytes), FTEXT and the reserved flags (4 bits) do not
    # touch the content; RFC 1951: nor do the bits that fill up the last byte of the deflate stream
    # (7 at most)
    assert unnoticed <= 6 * 8 + 4 + 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected an IDX header .* got an empty file"),
        (b"<!DOCTYPE html>", r"got a file that starts with 3c 21 44 4f"),
        (bytes.fromhex("00000a01"), r"a type out of 08 09 0b 0c 0d 0e.* starts with 00 00 0a 01"),
        (
            bytes.fromhex("00000803 00000001"),
            r"expected 3 sizes of 4 bytes in the header, got 4 bytes",
        ),
        (
            SAMPLE_BYTES + b"\0",
            r"expected 12 bytes of elements \(int16 of shape \(2, 3\).*, got more than that",
        ),
        (SAMPLE_BYTES[:-1], r"expected 12 bytes of elements .*, got 11;"),
        (
            gzip.compress(SAMPLE_BYTES + b"\0", mtime=0),
            r"expected 12 bytes of elements .*, got more than that",
        ),
        (gzip.compress(SAMPLE_BYTES[:-1], mtime=0), r"expected 12 bytes of elements .*, got 11;"),
        (gzip.compress(b"", mtime=0), r"expected an IDX header .* got an empty file"),
        (
            gzip.compress(SAMPLE_BYTES, mtime=0) + b"x",
            r"expected a whole gzip stream, got .* do not unpack \(Not a gzipped",
        ),
        (
            gzip.compress(SAMPLE_BYTES, mtime=0) + gzip.compress(b"more", mtime=0),
            r"got more than that",
        ),
        (
            gzip.compress(SAMPLE_BYTES, mtime=0)[:-8] + bytes(8),
            r"expected a whole gzip stream, .*\(CRC check failed",
        ),
        (b"\x1f\x8b", r"expected a whole gzip stream, got 2 bytes"),
        (
            bytes.fromhex("00000841") + bytes(4 * 65),
            r"expected a shape that NumPy can hold, got \(0, 0",
        ),
        (
            bytes.fromhex("00000804 00000000") + b"\xff" * 12,
            r"expected a shape that NumPy can hold",
        ),
    ],
)
def test_idx_says_what_is_wrong_with_a_file(tmp_path, content, message):
    (tmp_path / "bad.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.idx: .*" + message):
        read_idx(tmp_path / "bad.idx")


def test_idx_allows_the_zero_padding_that_gzip_allows(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(SAMPLE_BYTES, mtime=0) + bytes(512))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), SAMPLE)


@pytest.mark.parametrize(
    ("pack", "sizes", "received"),
    [
        (bytes, (10**6, 10**6), r"a file that can hold at most 4,0\d\d;"),
        (bytes, (2**32 - 1,) * 8, r"a file that can hold at most 4,0\d\d;"),
        (gzip.compress, (10**6, 10**6), r"a file that can hold at most 4,\d\d\d,\d\d\d;"),
        (gzip.compress, (2**32 - 1,) * 8, r"a file that can hold at most 4,\d\d\d,\d\d\d;"),
        # 4 MB, which so long a gzip file could hold: unpack and see.
        (gzip.compress, (500_000,), r"4,000;"),
    ],
)
def test_idx_never_allocates_what_a_header_only_claims(tmp_path, pack, sizes, received):
    header = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 0x0E, len(sizes), *sizes)
    (tmp_path / "a").write_bytes(pack(header + np.random.default_rng(0).bytes(4000)))
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"expected [\d,]+ bytes of elements \(float64 .*, got {received}"
        ):
            read_idx(tmp_path / "a")
        # The read buffer, not the 4 MB or the 8 TB.
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_idx_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.idx"):
        read_idx(tmp_path / "none.idx")


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_the_published_images_in_a_fixed_stratified_split():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    data = digits()
    assert data.train.images.shape == (1438, 8, 8, 1) and data.test.images.shape == (359, 8, 8, 1)
    for part in data:
        assert part.images.dtype == np.float32 and part.labels.dtype == np.int32
        assert part.images.min() == 0 and part.images.max() == 1
        # Sixteenths are exact in float32.
        np.testing.assert_array_equal(part.images * 16, np.round(part.images * 16))
    # each class is split as its own count says
    counts = np.bincount(labels)
    assert counts.sum() == 1797
    np.testing.assert_array_equal(np.bincount(data.test.labels), [round(0.2 * n) for n in counts])
    # the two parts together are the whole set, each row once
    test = digits_module._test_rows(labels, 0.2, 0)
    for part, rows in ((data.train, ~test), (data.test, test)):
        np.testing.assert_array_equal(part.images.reshape(-1, 64) * 16, pixels[rows])
        np.testing.assert_array_equal(part.labels, labels[rows])
    # The split is part of every number measured on it: this checksum must never change. Made with
    # NumPy 2.4.
    rows = np.nonzero(test)[0].astype("<i8")
    assert list(rows[:10]) == [6, 12, 17, 24, 30, 34, 43, 49, 51, 52]
    assert hashlib.sha256(rows.tobytes()).hexdigest() == (
        "534008189cc348d5d95355183d07dfe8d5c43c0328ba07f4f400f4749df68636"
    )


def test_digits_split_follows_seed_and_fraction():
    pytest.importorskip("sklearn")
    one, two = digits(seed=1, test_fraction=0.5), digits(seed=2, test_fraction=0.5)
    assert abs(len(one.test.labels) - 1797 / 2) <= 10  # each of 10 classes rounds by at most a half
    assert not np.array_equal(one.test.images, two.test.images)
    np.testing.assert_array_equal(digits(seed=1, test_fraction=0.5).test.images, one.test.images)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 0.001])
def test_digits_refuses_a_split_with_an_empty_side(fraction):
    pytest.importorskip("sklearn")
    with pytest.raises(
        ValueError,
        match=r"test_fraction must leave images on both sides, got .* of class 0; try 0\.2",
    ):
        digits(test_fraction=fraction)


def test_digits_come_from_the_file_of_scikit_learn_or_else_from_its_function(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits(return_X_y=True)
    monkeypatch.setattr(datasets, "load_digits", None)  # the file alone
    from_file = digits_module._published()
    monkeypatch.undo()
    monkeypatch.setattr(digits_module.importlib.util, "find_spec", lambda name: None)
    from_function = digits_module._published()
    for pixels, labels in (from_file, from_function):
        np.testing.assert_array_equal(pixels, expected[0])
        np.testing.assert_array_equal(labels, expected[1])
        assert pixels.dtype == expected[0].dtype and labels.dtype == expected[1].dtype


def test_digits_do_not_import_scikit_learn():
    pytest.importorskip("sklearn")
    code = "import sys, jaxnet.data; jaxnet.data.digits(); print('sklearn' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "False"
    )


def test_digits_says_how_to_get_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError,
        match=r"install scikit-learn, e\.g\. `pip install -e '\.\[examples\]'` in the ch",
    ):
        digits()


# --- MNIST ----------------------------------------------------------------------------------------

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with a set of 5 + 3 images in MNIST's four files; its checksums stand in for the
    real ones.
    """
    folder, rng = tmp_path / "published", np.random.default_rng(0)
    folder.mkdir()
    checksums = {}
    for name in NAMES:
        n = 5 if name.startswith("train") else 3
        content = (
            rng.integers(256, size=(n, 28, 28)) if "images" in name else rng.integers(10, size=n)
        )
        path = folder / f"{name}.gz"
        write_idx(path, content.astype(np.uint8))
        packed = path.read_bytes()
        checksums[name] = tuple(
            hashlib.sha256(data).hexdigest() for data in (packed, gzip.decompress(packed))
        )
    monkeypatch.setattr(mnist_module, "CHECKSUMS", checksums)
    return folder


def assert_is_published(data, published):
    for part, prefix in ((data.train, "train"), (data.test, "t10k")):
        np.testing.assert_array_equal(
            part.labels, read_idx(published / f"{prefix}-labels-idx1-ubyte.gz")
        )
        np.testing.assert_allclose(
            part.images[..., 0] * 255,
            read_idx(published / f"{prefix}-images-idx3-ubyte.gz"),
            rtol=1e-6,
        )
        assert part.images.dtype == np.float32 and part.labels.dtype == np.int32


def test_real_mnist_has_the_published_numbers(real_data):
    data = mnist(real_data / "mnist")
    assert data.train.images.shape == (60_000, 28, 28, 1) and data.train.images.dtype == np.float32
    assert data.test.images.shape == (10_000, 28, 28, 1) and data.test.labels.dtype == np.int32
    # label counts as tabulated at https://www.memotut.com/en/6bfacef12dafd63b1080/
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(data.train.labels), train)
    np.testing.assert_array_equal(np.bincount(data.test.labels), test)
    # the normalization constants in PyTorch's MNIST example, (0.1307,) and (0.3081,): those of the
    # training images
    assert round(float(data.train.images.mean(dtype=np.float64)), 4) == 0.1307
    assert round(float(data.train.images.std(dtype=np.float64)), 4) == 0.3081
    assert data.train.images.min() == 0 and data.train.images.max() == 1
    assert repr(data) == (
        "Dataset(train=Split(images=float32[60000, 28, 28, 1], labels=int32[60000]), "
        "test=Split(images=float32[10000, 28, 28, 1], labels=int32[10000]), classes=10)"
    )


def test_mnist_checksums_are_of_the_files_whose_md5_is_published(real_data):
    md5 = dict(  # torchvision/datasets/mnist.py, MNIST.resources
        zip(
            NAMES,
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            strict=True,
        )
    )
    assert set(mnist_module.CHECKSUMS) == set(NAMES)
    for name, (packed_sum, content_sum) in mnist_module.CHECKSUMS.items():
        packed = (real_data / "mnist" / f"{name}.gz").read_bytes()
        assert hashlib.md5(packed).hexdigest() == md5[name]
        assert hashlib.sha256(packed).hexdigest() == packed_sum
        assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == content_sum
        assert len(packed) < mnist_module._LARGEST


@pytest.mark.parametrize("spelling", ["{}.gz", "{}", "dots.gz", "dots", "unpacked but named {}.gz"])
def test_mnist_finds_every_spelling_packed_or_not(published, tmp_path, spelling):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES:
        packed = (published / f"{name}.gz").read_bytes()
        stem = name.replace("-idx", ".idx") if spelling.startswith("dots") else name
        suffix = ".gz" if spelling.endswith(".gz") else ""
        keep_packed = suffix and "unpacked" not in spelling
        (folder / (stem + suffix)).write_bytes(packed if keep_packed else gzip.decompress(packed))
    assert_is_published(mnist(folder), published)


def test_mnist_lists_what_is_missing(published, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"nowhere: .*missing {', '.join(NAMES)}; pass download=True"
    ):
        mnist(tmp_path / "nowhere")
    (published / f"{NAMES[1]}.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"missing {NAMES[1]}; pass download=True, or .* from https://"
    ):
        mnist(published)


@pytest.mark.parametrize("download", [False, True])
def test_mnist_refuses_a_wrong_file_and_leaves_it_alone(published, download):
    path = published / f"{NAMES[3]}.gz"
    write_idx(path, np.zeros(3, np.uint8))  # a good IDX file, but not the published one
    (published / f"{NAMES[0]}.gz").unlink()
    wrong = path.read_bytes()
    expected, received = mnist_module.CHECKSUMS[NAMES[3]][0], hashlib.sha256(wrong).hexdigest()
    with pytest.raises(
        ValueError,
        match=f"{path.name}: expected .*{expected}.* got sha256 {received}.*move it away",
    ):
        mnist(published, download=download, mirrors=["http://127.0.0.1:1/"])
    assert path.read_bytes() == wrong


class Mirror(http.server.ThreadingHTTPServer):
    """A server for the files of a folder whose first path component says how it behaves; it counts
    what was asked.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.folder, self.asked, self.release = folder, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self):
        self.server.asked.append(self.path)
        _, behaviour, name = self.path.replace("%20", " ").split("/")
        body = (self.server.folder / name).read_bytes()
        if behaviour == "absent":
            return self.send_error(404)
        if behaviour == "slow":
            self.server.release.wait(10)
            return None
        if behaviour in ("trickle", "trickling headers"):
            return self.trickle(body if behaviour == "trickle" else b"")
        self.send_response(200)
        if behaviour != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if behaviour == "endless":
            body = bytes(1 << 20)
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if behaviour == "short" else body)
            while behaviour == "endless":
                self.wfile.write(body)
        return None

    def trickle(self, body):
        """Send a byte now and then, each in time: of the body, or of a header that does not end."""
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if body else b"X-Header: "))
            for i in range(1000):
                if self.server.release.wait(0.05):
                    return
                self.wfile.write(body[i : i + 1] or b"x")

    def log_message(self, format, *args):
        pass


@pytest.fixture
def mirror(published, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")  # or urllib asks a proxy for 127.0.0.1
    with Mirror(published) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def refused():
    """A URL on which nothing listens: the port of a socket that has just been closed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_mnist_downloads_all_once(mirror, published, tmp_path):
    folder = tmp_path / "new" / "mnist"
    assert_is_published(mnist(folder, download=True, mirrors=[mirror.url + "/good/"]), published)
    assert sorted(os.listdir(folder)) == sorted(f"{name}.gz" for name in NAMES)
    assert len(mirror.asked) == 4
    assert_is_published(mnist(folder, download=True, mirrors=[mirror.url + "/good"]), published)
    assert len(mirror.asked) == 4  # nothing is fetched again


def test_mnist_downloads_only_what_is_missing(mirror, published, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES[:3]:
        packed = (published / f"{name}.gz").read_bytes()
        (folder / name.replace("-idx", ".idx")).write_bytes(gzip.decompress(packed))
    assert_is_published(mnist(folder, download=True, mirrors=[mirror.url + "/good/"]), published)
    assert mirror.asked == [f"/good/{NAMES[3]}.gz"]


@pytest.mark.parametrize("behaviour", ["absent", "short", "wrong", "slow", "endless", "refused"])
def test_mnist_falls_through_a_bad_mirror_to_a_good_one(
    mirror, published, tmp_path, behaviour, monkeypatch
):
    monkeypatch.setattr(mnist_module, "_LARGEST", 1 << 16)
    bad = refused() if behaviour == "refused" else f"{mirror.url}/{behaviour}"
    for name in NAMES[1:]:  # one file to fetch is enough: a slow mirror costs its timeout
        (tmp_path / f"{name}.gz").write_bytes((published / f"{name}.gz").read_bytes())
    data = mnist(tmp_path, download=True, mirrors=[bad, mirror.url + "/good"], timeout=0.3)
    assert_is_published(data, published)
    assert not list(tmp_path.glob(".*"))  # no temporary file


def test_mnist_names_each_mirrors_reason_when_all_fail(mirror, tmp_path):
    behaviours = ("absent", "short", "wrong", "slow")
    mirrors = [*(f"{mirror.url}/{b}" for b in behaviours), refused(), "no-such-scheme://x"]
    with pytest.raises(
        OSError, match=f"could not fetch {NAMES[0]}.gz from any of 6 mirrors"
    ) as caught:
        mnist(tmp_path / "mine", download=True, mirrors=mirrors, timeout=0.3)
    reasons = str(caught.value).splitlines()[1:]
    expected = (
        "404",
        "bytes",
        "bytes with sha256",
        "timed out",
        "urlopen error",
        "unknown url type",
    )
    for reason, url, words in zip(reasons, mirrors, expected, strict=True):
        assert url in reason and words in reason
    assert not (tmp_path / "mine").exists()  # nothing came, nothing was made


@pytest.mark.parametrize("behaviour", ["trickle", "trickling%20headers"])
def test_mnist_gives_up_a_mirror_that_trickles(mirror, published, tmp_path, behaviour):
    """Each byte comes within `timeout`, so that only a limit on the whole ends it: 10 MB would take
    a week.
    """
    folder, mirrors = tmp_path / "mine", [f"{mirror.url}/{behaviour}", mirror.url + "/good"]
    data = mnist(folder, download=True, mirrors=mirrors, timeout=5, time_limit=0.3)
    assert_is_published(data, published)
    (folder / f"{NAMES[0]}.gz").unlink()
    with pytest.raises(OSError, match="not done after 0.3 seconds"):
        mnist(folder, download=True, mirrors=mirrors[:1], timeout=5, time_limit=0.3)
    assert sorted(os.listdir(folder)) == sorted(f"{name}.gz" for name in NAMES[1:])


def test_idx_of_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match="expected a file on a disk, got a pipe or a device"):
            read_idx(path)
    with pytest.raises(IsADirectoryError):
        read_idx(tmp_path)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError):
            write_idx(path, np.zeros(3, np.uint8))
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_mnist_wants_a_sequence_of_mirrors(published):
    (published / f"{NAMES[0]}.gz").unlink()
    with pytest.raises(
        TypeError, match=r"mirrors must be a sequence of URLs, got one string; write \['http://x'\]"
    ):
        mnist(published, download=True, mirrors="http://x")


def test_mnist_mirrors_are_torchvisions():
    assert set(mnist_module._MIRRORS) == {
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    }


# --- Dataset, batches, labels ---------------------------------------------------------------------


def test_dataset_is_a_tree_of_four_arrays_and_prints_no_pixels():
    part = Split(np.zeros((4, 2, 2, 1), np.float32), np.array([0, 2, 1, 0], np.int32))
    data = Dataset(part, Split(part.images[:1], part.labels[:1]))
    assert len(jax.tree.leaves(data)) == 4 and data.classes == 3
    images, labels = data.train
    assert images is part.images and labels is part.labels
    assert repr(data).endswith(
        "test=Split(images=float32[1, 2, 2, 1], labels=int32[1]), classes=3)"
    )
    for f in (
        lambda _: None,
        np.mean,
        np.asarray,
        lambda a: np.asarray(a.mean()),
        lambda a: a[:0],
        jax.numpy.asarray,
    ):
        assert repr(jax.tree.map(f, data)).startswith("Dataset(train=Split(images=")
    jax.eval_shape(lambda d: repr(d) and d, data)  # tracers print too


@given(st.integers(1, 40), st.data(), st.one_of(st.none(), st.integers(0, 2**70)), st.booleans())
@settings(max_examples=50, deadline=None)
def test_batches_give_each_row_once_per_epoch(n, draw, seed, drop_last):
    size = draw.draw(st.integers(1, n))
    x = np.arange(n)
    got = list(batches({"x": x, "y": x * 10}, size, seed=seed, epochs=2, drop_last=drop_last))
    per_epoch = n // size if drop_last else -(-n // size)
    assert len(got) == 2 * per_epoch
    for epoch in (got[:per_epoch], got[per_epoch:]):
        rows = np.concatenate([batch["x"] for batch in epoch])
        assert len(set(rows)) == len(rows) == (n - n % size if drop_last else n)
        if seed is None:
            np.testing.assert_array_equal(rows, np.arange(len(rows)))
    for batch in got:
        np.testing.assert_array_equal(batch["y"], batch["x"] * 10)  # leaves stay aligned


def test_batches_order_is_fixed_by_seed_and_epoch_alone():
    def order(size, epochs, seed):
        return np.concatenate(list(batches(np.arange(100), size, seed=seed, epochs=epochs)))

    three = order(32, 3, seed=5)
    # Whatever the batch size and number of epochs.
    np.testing.assert_array_equal(order(7, 1, seed=5), three[:100])
    assert not np.array_equal(three[:100], three[100:200]) and not np.array_equal(
        three[100:200], three[200:]
    )
    assert not np.array_equal(order(32, 1, seed=6), three[:100])
    # a training run must not change with NumPy: made with NumPy 2.4, whose bit generators are
    # promised to be stable
    np.testing.assert_array_equal(permutation(8, seed=0, stream=0), [6, 3, 1, 4, 5, 2, 7, 0])


def test_permutation_is_uniform():
    """Each value falls on each place n/k times, give or take: chi-squared, 25 cells, 99.99 % point
    of 16 degrees.
    """
    k, n = 5, 4000
    counts = np.zeros((k, k))
    for stream in range(n):
        counts[np.arange(k), permutation(k, 7, stream)] += 1
    assert ((counts - n / k) ** 2 / (n / k)).sum() < 46.0  # a fixed seed: no chance is left


def test_batches_keep_the_structure():
    tree = {"a": [np.zeros(4), (np.ones((4, 2)),)], "b": Split(np.zeros((4, 1)), np.arange(4))}
    for batch in batches(tree, 2, seed=0):
        assert jax.tree.structure(batch) == jax.tree.structure(tree)
        assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2,), (2, 2), (2, 1), (2,)]
    (whole,) = batches(np.arange(3), 3)  # a single array, one batch
    np.testing.assert_array_equal(whole, [0, 1, 2])


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (
            {"x": np.zeros(3), "y": {"z": np.zeros(2)}},
            {},
            r"same leading length, got 'x' has 3, 'y/z' has 2",
        ),
        (Split(np.zeros(3), np.zeros(2)), {}, r"'images' has 3, 'labels' has 2"),
        (np.zeros((0, 3)), {}, r"at least one row, got leaves of length 0"),
        ({}, {}, r"at least one row, got no arrays at all"),
        ((np.zeros(3), 1.0), {}, r"'1' must be an array \[N, ...\], got array\(1\.\)"),
        (np.zeros(3), {"batch_size": 4}, r"size must be at most the 3 rows of the data, got 4"),
        (np.zeros(3), {"batch_size": 4, "drop_last": True}, r"size must be at most the 3 rows"),
        (np.zeros(3), {"batch_size": 0}, r"size must be a positive int, got 0"),
        (np.zeros(3), {"batch_size": 2.0}, r"size must be a positive int, got 2\.0"),
        (np.zeros(3), {"epochs": 0}, r"epochs must be a positive int, got 0"),
        (np.zeros(3), {"seed": -1}, r"seed must be an int of at least 0, got -1"),
    ],
)
def test_batches_refuse_at_the_call(data, kwargs, message):
    with pytest.raises(ValueError, match="batches: .*" + message):
        batches(data, **{"batch_size": 1, **kwargs})  # not iterated


@pytest.mark.parametrize("labels", [[], [0, 9, 3], [[0], [9]], np.uint8(9), jax.numpy.arange(10)])
def test_check_labels_passes_labels_in_range(labels):
    check_labels(np.asarray(labels, np.int8), 10)
    check_labels(np.asarray(labels, np.int8), 1000)  # more classes than the labels' type can count


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            [0, 1, 10, -1],
            ValueError,
            r"within 0\.\.9, got 10 at index 2 \(2 of 4 are outside\); renumber",
        ),
        ([-1, 3], ValueError, r"within 0\.\.9, got -1 at index 0 \(1 of 2"),
        ([[0, 1], [2, 99]], ValueError, r"got 99 at index \(1, 1\) \(1 of 4"),
        (np.array([2**64 - 1], np.uint64), ValueError, r"got 18446744073709551615 at index 0"),
        (np.int32(10), ValueError, r"got 10 at index \(\) \(1 of 1"),
        ([0.0, 1.0], TypeError, r"labels must be integers, got float64; cast"),
        ([True], TypeError, r"labels must be integers, got bool"),
    ],
)
def test_check_labels_names_the_first_bad_one(labels, error, message):
    with pytest.raises(
        error, match="check_labels: labels must be .*" + message.replace("labels must be ", "")
    ):
        check_labels(labels, 10)


def test_check_labels_wants_classes():
    with pytest.raises(ValueError, match="check_labels: classes must be a positive int, got 0"):
        check_labels([0], 0)
