import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxnet import data


def header(shape, descr="<f8"):
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, {"descr": descr, "fortran_order": False, "shape": shape})
    return text.getvalue()


def archive(path, x, compression=zipfile.ZIP_STORED):
    """An archive whose array x is these bytes, beside three labels."""
    labels = io.BytesIO()
    np.save(labels, np.arange(3))
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (header((10**13,)), r"'x' claims to be \(10000000000000,\) of float64, and the archive holds 0 bytes of it"),
        (header((10**13, 1)) + bytes(800), "claims to be .* holds 800 bytes"),
        (header((10**9, 10**9)) + bytes(8), "claims to be"),
        (header((3, 2)) + bytes(10), "claims to be"),
        (header((3, 2)) + bytes(100), "claims to be"),
        (header((-3, -2)) + bytes(48), "not a readable .npz"),
        (header((10**13,), "|O"), "Python objects"),
        (header((10**13,), "<U0"), "not numeric"),
        (header((10**13, 0)), "expected inputs"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(99), "not a readable .npz"),
        (b"\x93NUMPY\x09\x00\xff\xff" + bytes(99), "not a readable .npz"),
        (b"", "'x' is not an array"),
    ],
)
def test_a_header_that_claims_what_is_not_there_is_refused_before_room_is_made(tmp_path, text, words):
    path = archive(tmp_path / "a.npz", text)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words):
        data.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_an_archive_that_unpacks_to_far_more_than_it_weighs_is_refused(tmp_path):
    shape = (2**20 + 1, 8)
    path = archive(tmp_path / "a.npz", header(shape) + bytes(8 * shape[0] * shape[1]), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"'x' would unpack to 64 MiB, from a file of 0\.\d; .* by numpy.savez"):
        data.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_what_is_packed_as_usual_is_read(tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(300, 20)))
    np.savez_compressed(tmp_path / "a.NPZ", x=x, y=np.zeros(300))
    (tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ")
    found = data.read(tmp_path / "a.NPZ")
    np.testing.assert_array_equal(found.inputs, x)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(bool, "i"), (np.uint8, "i"), (np.int64, "i"), (np.uint64, "i"), (np.float16, "f"), (np.float64, "f")],
)
def test_integers_are_told_from_floats_by_their_type(tmp_path, dtype, kept):
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=np.array([0, 1, 1], dtype))
    assert data.load(tmp_path / "a.npz")[1].dtype.kind == kept
