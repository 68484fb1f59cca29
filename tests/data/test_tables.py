import itertools

import numpy as np
import pandas as pd
import pytest

from jaxnet import data


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


ROWS = [("a", "b", "c"), (1, -2.5, 0), (3, 1e-3, 1), (5, 40, 1)]
INPUTS, TARGETS = np.array([[1, -2.5], [3, 1e-3], [5, 40]]), np.array([0, 1, 1])


def text_of(separator=",", end="\n", pad="", decimal="."):
    cell = lambda x: f"{pad}{x}{pad}".replace(".", decimal) if isinstance(x, float) else f"{pad}{x}{pad}"
    return "".join(separator.join(map(cell, row)) + end for row in ROWS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (text_of(), "a.CSV"),
        (text_of(";"), "a.csv"),
        (text_of(";", decimal=","), "a.csv"),
        (text_of(";", decimal=",", pad=" "), "a.csv"),
        (text_of("\t"), "a.csv"),
        (text_of("\t"), "a.tsv"),
        (text_of(","), "a.TSV"),
        (text_of("|"), "a.csv"),
        (text_of(", "), "a.csv"),
        (text_of(pad=" "), "a.csv"),
        (text_of(end="\r\n"), "a.csv"),
        (text_of(end="\n \n\n"), "a.csv"),
        (b"\xef\xbb\xbf" + text_of().encode(), "a.csv"),
        (text_of().replace("-2.5", '"-2.5"'), "a.csv"),
        (text_of(end=",\n"), "a.csv"),
    ],
)
def test_one_table_in_many_spellings(write, text, name):
    found = data.read(write(text, name))
    np.testing.assert_array_equal(found.inputs, INPUTS)
    np.testing.assert_array_equal(found.targets, TARGETS)
    assert found.targets.dtype == np.int64
    assert found.words is None


@pytest.mark.parametrize(
    "text",
    [
        'a [m;s;k],b\n1,"u, v;w"\n2,"w"\n3,"w"\n',
        'a [m;s;k], b\n1, "u, v;w"\n2, "w"\n3, w\n',
        b"\xef\xbb\xbf" + b'a [m;s;k]\tb\n1\t"u, v;w"\n2\tw\n3\tw\n',
        'a [m;s;k]|"b"\n"1"|u, v;w\n"2"|w\n"3"|w \n',
    ],
)
def test_what_a_cell_holds_separates_nothing(write, text):
    found = data.read(write(text), target="a [m;s;k]")
    assert found.inputs.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert found.targets.tolist() == [1, 2, 3]
    assert any(note.endswith("one for each word: u, v;w, w") for note in found.notes)


def test_numbers_are_read_to_the_last_bit(write):
    bits = np.random.default_rng(0).integers(0, 2**64, (500, 2), dtype=np.uint64)
    numbers = np.nan_to_num(bits.view(np.float64), nan=0.5)
    found = data.read(write("\n".join(["a,b", *(f"{float(a)!r},{float(b)!r}" for a, b in numbers)])))
    np.testing.assert_array_equal(found.inputs[:, 0], numbers[:, 0])
    np.testing.assert_array_equal(found.targets, numbers[:, 1])
    huge = data.read(write(f"a,b,c\n{10**30},{2**64 - 1},-{2**63}\n5,1,2\n"))
    np.testing.assert_array_equal(huge.inputs, [[1e30, 2.0**64], [5, 1]])
    assert huge.targets.tolist() == [-(2**63), 2]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("y,x,y", "columns 1, 3 have the same name 'y'"),
        ("x,,", "columns 2, 3 have no name"),
        ("x,,y", "column 2.* has no name and is no index; name it in the header"),
        ("y , x,y", "columns 1, 3 have the same name 'y'"),
    ],
)
def test_columns_that_names_do_not_tell_apart_are_refused(write, header, words):
    with pytest.raises(ValueError, match=words):
        data.load(write(f"{header}\n1.5,2,3\n4,5,6\n"))


@pytest.mark.parametrize(
    "text",
    ["1234_5678", "１２", "٣", "1,234", "1.234,5", "1 000", "5%", "$3.50", "1'000", "3e", "0x1F", "1d5", "1+", "x"],
)
def test_what_is_no_number_among_numbers_is_refused(write, text):
    for column in ("a", "b"):
        rows = [f'"{text}",7,1', "2,8,2", "3,7,3"]
        with pytest.raises(ValueError, match=r"'a' is not numeric: .* in row 1; write plain numbers"):
            data.load(write("\n".join(["a,b,c", *rows])), target=column)


@pytest.mark.parametrize("text", ["1234_5678", "１２", "٣", "1,234", "1.234,5", "1 000", "5%", "$3.50", "1'000"])
def test_a_column_of_what_only_looks_like_numbers_is_refused(write, text):
    with pytest.raises(ValueError, match=r"'a' is not numeric: .* in row 2; write plain numbers, such as 1234.5"):
        data.load(write(f'a,b\nother,1\n"{text}",2\nother,3\n'))


@pytest.mark.parametrize("text", ["3e", "0x1F", "1d5", "18-25", "3+", "12:30", "1st"])
def test_a_column_of_codes_is_one_of_words(write, text):
    assert data.load(write(f"a,b\n{text},1\n{text},2\nother,3\n"))[0].tolist() == [[1, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize("text", ["inf", "-inf", "infinity", "1e400"])
def test_infinity_is_refused_by_the_row_it_has_in_the_file(write, text):
    for target, column in ((None, "a"), ("a", "a")):
        with pytest.raises(ValueError, match=f"column '{column}' holds infinity in 1 of 3 rows, the first is row 3"):
            data.load(write(f"a,b\n1,1\n,5\n{text},2\n3,3\n"), target=target)
    words = data.read(write("a,b\ninfinity,1\nzero,2\nzero,3\n"))
    np.testing.assert_array_equal(words.inputs, [[1, 0], [0, 1], [0, 1]])


FRAME = pd.DataFrame(
    {"a": [5.5, 6, 7, 9], "colour": ["red", "blue", "red", "green"], "y": ["cat", "dog", "cat", "cat"]}
)


@pytest.mark.parametrize(
    "index", [range(4), range(1, 5), [2, 0, 3, 1], [0, 1, 0, 1], ["Ann", "Bob", "Cid", "Dan"]], ids=str
)
def test_an_index_of_pandas_is_no_input(write, tmp_path, index):
    frame = FRAME.set_index(pd.Index(index))
    expected = pd.get_dummies(FRAME[["a", "colour"]]).to_numpy(float)
    frame.to_csv(tmp_path / "once.csv")
    pd.read_csv(tmp_path / "once.csv").to_csv(tmp_path / "twice.csv")
    for name, unnamed in (("once", 1), ("twice", 2)):
        found = data.read(tmp_path / f"{name}.csv")
        np.testing.assert_array_equal(found.inputs, expected)
        assert found.targets.tolist() == [0, 1, 0, 0]
        assert found.words == ("cat", "dog")
        assert sum("is an index" in note for note in found.notes) == unnamed
        assert any("'colour' is 3 inputs, 0 or 1, one for each word: blue, green, red" in note for note in found.notes)


def test_a_nameless_column_of_measurements_is_no_index(write):
    with pytest.raises(ValueError, match="has no name and is no index"):
        data.load(write(",a,b\n.5,1,2\n.7,3,4\n"))


def test_rows_with_a_gap_are_left_out_and_said(write):
    rows = ["1,red,0", ",red,1", "3,NA,1", "4,red,", "5,?,0", "6,blue,1", "7, nan ,0", "8,red,1"]
    rows += ["9,blue,0", "10,red,1", "11,red,N/A", "12,blue,0", "13,red,1"]
    found = data.read(write("\n".join(["a,b,c", *rows])))
    np.testing.assert_array_equal(found.inputs[:, 0], [1, 6, 8, 9, 10, 12, 13])
    assert found.targets.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert found.targets.dtype == np.int64
    assert any(note == "rows left out, 6 of 13: a cell is empty or NA in 'a', 'b', 'c'" for note in found.notes)
    with pytest.raises(ValueError, match="2 of 4 rows have an empty or NA cell, column 'b' 2 of them; .* by drop"):
        data.load(write("a,b,c\n1,,0\n2,,1\n3,3,0\n4,4,1\n"))
    assert data.load(write("a,b,c\n1,,0\n2,,1\n3,3,0\n4,4,1\n"), drop="b")[0].shape == (4, 1)


def test_what_tells_nothing_is_left_out_and_said(write):
    text = "a,day,name,same,gap,ok\n5,2024-01-02,Ann,x,,1\n6,2024-01-02,Bob,x,,0\n8,2024-02-03,Cid,x,,1\n"
    found = data.read(write(text))
    np.testing.assert_array_equal(found.inputs, [[5], [6], [8]])
    for column in ("'day' is left out: it holds dates", "'name' is left out: each row has a word of its own"):
        assert any(column in note for note in found.notes)
    for column in ("'same' is left out: all rows have the same word", "'gap' is left out: it is empty"):
        assert any(column in note for note in found.notes)
    with pytest.raises(ValueError, match="no column is left as an input; column 'day' is left out"):
        data.load(write("day,b\n2024-01-02,1\n2024-01-03,2\n"))
    with pytest.raises(ValueError, match="holds dates, which cannot be a target"):
        data.load(write("b,day\n1,31.12.2024\n2,1.1.2025\n"))
    with pytest.raises(ValueError, match="1001 different words"):
        data.load(write("\n".join(["a,b", *(f"w{min(i, 1000)},{i}" for i in range(1002))])))
    counts = data.read(write("id,a,b\n1,5,1\n2,7,0\n3,6,1\n"))
    assert counts.inputs.shape == (3, 2)
    assert "column 'id' counts the rows and is an input all the same, unless drop names it" in counts.notes
    gap = data.read(write("id,a,b\n0,5,1\n1,,0\n2,6,1\n3,6,0\n"))
    assert any("'id' counts the rows" in note for note in gap.notes)


def test_truth_values_are_0_and_1(write):
    found = data.read(write("a,b\nTrue,FALSE\nFalse,TRUE\nTrue,FALSE\n"))
    assert found.inputs.tolist() == [[1], [0], [1]]
    assert found.targets.tolist() == [0, 1, 0]
    assert "column 'a': False is 0, True is 1" in found.notes


def test_integers_are_told_from_floats_by_how_they_are_written(write):
    for texts, dtype in ((("0", "1"), np.int32), (("0.0", "1.0"), np.float32), (("0", "1e0"), np.float32)):
        assert data.load(write(f"a,b\n5,{texts[0]}\n6,{texts[1]}\n"))[1].dtype == dtype
    assert data.load(write(f"a,b\n5,{2**31}\n6,1\n"))[1].dtype == np.float32


def test_several_targets_and_columns_to_drop(write):
    path = write('id,a,"b,c",d\n7,1,2,3.5\n9,3,4,5\n')
    x, y = data.load(path, target="a, d", drop="id")
    np.testing.assert_array_equal(x, [[2], [4]])
    np.testing.assert_array_equal(y, [[1, 3.5], [3, 5]])
    np.testing.assert_array_equal(data.load(path, target="b,c")[1], [2, 4])
    for options, words in (
        ({"target": "a,z"}, "no column named 'z'; it has id, a, b,c, d"),
        ({"target": "a,a"}, "target names the column 'a' more than once"),
        ({"drop": "z"}, "no column named 'z'"),
        ({"drop": "a", "target": "a"}, "no column named 'a'; it has id, b,c, d"),
        ({"drop": "id,b", "target": "d"}, "no column named 'b'"),
    ):
        with pytest.raises(ValueError, match=words):
            data.load(path, **options)
    for texts in itertools.permutations(("2", "x")):
        with pytest.raises(ValueError, match=r"is not numeric|holds words; where there are several"):
            data.load(write("a,b,c\n1,{},3\n4,{},6\n".format(*texts)), target="b,c")
    with pytest.raises(ValueError, match="column 'b' holds words; where there are several targets all must be numbers"):
        data.load(write("a,b,c\n1,u,3\n4,v,6\n"), target="b,c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\nx,4\n", "column 'a' is not numeric: 'x' in row 2; write plain numbers, .* or words alone"),
        ("a,b\n1,\n", "column 'b' is empty; name another target"),
        ("a,b\n1,2\n3\n", "row 2 has 1 values, its header 2"),
        ("a,b\n1,2,3\n", "row 1 has 3 values, its header 2"),
        ("a;b\n1,5;2.5\n2;3\n", "column 'a' is not numeric: '1,5'"),
        ("a,b\n1,2\nnan,4\n", "1 of 2 rows have an empty or NA cell, column 'a' 1 of them"),
        ("a\n1\n", "two or more columns"),
        ("a,b\n", "rows below it"),
        ("", "two or more columns"),
        (" \n\n", "two or more columns"),
        ("1,2\n3,4\n", "begin with a header line"),
        ("5.1,1.4,setosa\n4,1,setosa\n3,2,other\n", "begin with a header line"),
        (b"a,b\n\xff\xfe,1\n", "save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "save it as UTF-8"),
        ('a,b\n1,2\n"3,4\n', "row 2 has 1 values|save it as UTF-8"),
    ],
)
def test_malformed_tables(write, text, words):
    with pytest.raises(ValueError, match=words):
        data.load(write(text))


def test_a_table_without_pandas_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r"a table is read with pandas: pip install 'jaxnet\[table\]'"):
        data.load(write("a,b\n1,2\n"))
