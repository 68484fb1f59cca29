import zipfile

import numpy as np
import pytest

from jaxnet import data


def write(path, text):
    path.write_text(text)
    return path


def test_csv_reads_the_target_column(tmp_path):
    path = write(tmp_path / "a.csv", "a,b,c\n1,2,0\n3,4.5,1\n")
    x, y = data.load(path)
    np.testing.assert_array_equal(x, [[1, 2], [3, 4.5]])
    np.testing.assert_array_equal(y, [0, 1])
    assert y.dtype == np.int32
    x, y = data.load(str(path), target="b")
    np.testing.assert_array_equal(x, [[1, 0], [3, 1]])
    assert y.dtype == np.float32


def test_npz_reads_named_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(
        path,
        x=np.ones((3, 2)),
        y=np.array([0.5, 1, 2]),
        images=np.ones((3, 4, 4), np.uint8),
        labels=np.arange(3),
    )
    x, y = data.load(path)
    assert x.shape == (3, 2)
    assert y.dtype == np.float32
    x, y = data.load(path, inputs="images", targets="labels")
    assert x.shape == (3, 4, 4)
    assert y.tolist() == [0, 1, 2]


def test_other_malformed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=".npz or .csv"):
        data.load(write(tmp_path / "a.txt", "a"))
    with pytest.raises(ValueError, match="not a readable .npz"):
        data.load(write(tmp_path / "a.npz", "not a zip"))
    with pytest.raises(ValueError, match="no column named 'z'; it has a, b"):
        data.load(write(tmp_path / "a.csv", "a,b\n1,2\n"), target="z")
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=np.ones(2), words=np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(2,\)"):
        data.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="no array named 'z'; it holds x, y, words"):
        data.load(tmp_path / "a.npz", targets="z")
    with pytest.raises(ValueError, match="'words' is not numeric"):
        data.load(tmp_path / "a.npz", targets="words")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("y", "text")
    with pytest.raises(ValueError, match="'x' is not an array"):
        data.load(tmp_path / "raw.npz")
    np.savez(tmp_path / "empty.npz", x=np.ones((3, 0)), y=np.ones(3))
    with pytest.raises(ValueError, match="expected inputs"):
        data.load(tmp_path / "empty.npz")
    np.savez(tmp_path / "big.npz", x=np.full((3, 1), 1e39), y=np.ones(3))
    with pytest.raises(ValueError, match="too large for float32"):
        data.load(tmp_path / "big.npz")
    np.savez(tmp_path / "o.npz", x=np.array([{}, {}]), y=np.ones(2))
    with pytest.raises(ValueError, match="Python objects"):
        data.load(tmp_path / "o.npz")
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=np.ones(3))
    for options in ({"target": "y"}, {"drop": "y"}):
        with pytest.raises(ValueError, match="target and drop name columns of a table"):
            data.load(tmp_path / "a.npz", **options)
    for options in ({"targets": "b"}, {"inputs": "a"}):
        with pytest.raises(ValueError, match="of a table name the column target"):
            data.load(tmp_path / "a.csv", **options)
