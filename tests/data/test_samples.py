"""A file that is larger than what may be held is read as a sample of its rows."""

import csv
import tracemalloc

import numpy as np
import pytest

from jaxnet import data
from jaxnet.contract import UserError

N = 5000


def table(path, separator=",", decimal="."):
    """Each row tells its own number, three times; a cell in ten is quoted, with a line break in it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["a", "word", "b", "y"])
        for i in range(N):
            number = f"{i + 0.5}".replace(".", decimal)
            writer.writerow([i, ("red", 'a "new"\nline', "blue")[i % 10 % 3], number, i])
            if i % 7 == 0:
                file.write("\n")
    return path


@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", ","), ("\t", ".")])
def test_rows_of_a_table_stay_together(tmp_path, separator, decimal):
    path = table(tmp_path / "a.csv", separator, decimal)
    whole, found = data.read(path), data.read(path, most_numbers=4000)
    assert len(found.targets) == 4000 // 6  # a, b, y and three words
    np.testing.assert_array_equal(found.inputs, whole.inputs[found.targets])
    np.testing.assert_array_equal(found.targets, np.sort(found.targets))
    # Drawn from all of it: a mean of 666 lies within 4 of its standard errors.
    assert abs(found.targets.mean() - N / 2) < 4 * N / np.sqrt(12 * 666)
    assert "a sample of 666 of 5,000 rows" in found.notes[0]
    np.testing.assert_array_equal(data.read(path, most_numbers=4000).targets, found.targets)
    assert data.read(path, most_numbers=6 * N).notes == whole.notes


def test_rows_that_are_counted_are_told_in_a_sample_too(tmp_path):
    told = [note for note in data.read(table(tmp_path / "a.csv"), most_numbers=4000).notes if "counts the rows" in note]
    assert [note.split("'")[1] for note in told] == ["a"]


def test_fewer_rows_than_a_sample_has_are_read_whole(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 100)), y=np.arange(2))
    (tmp_path / "a.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n2,3,4,5,7\n")
    for name in ("a.npz", "a.csv"):
        found = data.read(tmp_path / name, most_numbers=4)
        assert len(found.inputs) == 2
        assert found.notes == ()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_of_an_archive_stay_together(tmp_path, save):
    x = np.arange(N * 6, dtype=np.float32).reshape(N, 2, 3)
    save(tmp_path / "a.npz", x=x, y=np.arange(N, dtype=np.int16))
    found = data.read(tmp_path / "a.npz", most_numbers=600)
    assert len(found.targets) == 100
    np.testing.assert_array_equal(found.inputs, x[found.targets])
    assert found.targets.dtype == np.int64
    assert found.notes == ("a sample of 100 of 5,000 rows, drawn at random: more would not fit the memory set aside",)


def test_the_memory_is_that_of_the_sample(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((30_000, 500), np.float32), y=np.arange(30_000))
    data.read(tmp_path / "a.npz", most_numbers=1000)
    tracemalloc.start()
    data.read(tmp_path / "a.npz", most_numbers=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45e6  # the file holds 60e6 bytes; a block of 2^24 and its copy are read at a time


def test_what_is_wrong_with_a_row_is_told_by_its_number_in_the_file(tmp_path):
    x = np.ones((N, 2))
    x[::2, 1] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(N))
    with pytest.raises(UserError, match=r"the first is row \d*[13579];"):
        data.read(tmp_path / "a.npz", most_numbers=100)
    text = "a,y\n" + "\n".join(f"{'1.2.3' if i % 2 else i},{i}" for i in range(1, N))
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"'1\.2\.3' in row \d*[13579];"):
        data.read(tmp_path / "a.csv", most_numbers=100)


def test_an_array_saved_by_columns_is_refused_where_rows_are_drawn(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(np.ones((N, 2))), y=np.arange(N))
    assert len(data.read(tmp_path / "a.npz").targets) == N
    with pytest.raises(UserError, match="save numpy.ascontiguousarray of it"):
        data.read(tmp_path / "a.npz", most_numbers=100)
