"""Where results go."""

import contextlib
import pathlib

import pytest

from jaxnet.contract import UserError
from jaxnet.lab._folders import folder_of


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command, **options):
    with folder_of(command, None, **options) as folder:
        (folder / "record.json").write_text("{}")
    return folder.as_posix()


def test_each_run_has_a_new_folder_and_a_resumed_one_the_latest():
    assert run("analyse", resume=True) == "jaxnet-out/analyse-1"
    assert run("analyse") == "jaxnet-out/analyse-2"
    assert run("train") == "jaxnet-out/train-1"
    for name in ("analyse-9", "analyse-10", "analyse-old", "analyse-all-12"):
        pathlib.Path("jaxnet-out", name).mkdir()
    assert run("analyse", resume=True) == "jaxnet-out/analyse-10"
    assert run("analyse") == "jaxnet-out/analyse-11"
    # Of two at the same moment, each has its own.
    with folder_of("analyse", None) as one, folder_of("analyse", None) as other:
        assert (one.name, other.name) == ("analyse-12", "analyse-13")


def test_a_folder_that_stays_empty_goes_again():
    with contextlib.suppress(UserError), folder_of("analyse", None) as folder:
        assert folder.is_dir()
        raise UserError("bad input")
    assert not pathlib.Path("jaxnet-out").exists()
    run("train")
    with folder_of("analyse", None):
        pass
    assert [path.name for path in pathlib.Path("jaxnet-out").iterdir()] == ["train-1"]


def test_what_is_in_the_way_is_told():
    pathlib.Path("jaxnet-out").write_text("kept")
    with pytest.raises(UserError, match="jaxnet-out is a file"), folder_of("analyse", None):
        pass
    pathlib.Path("mine").mkdir()
    pathlib.Path("mine", "a").write_text("kept")
    with pytest.raises(UserError, match="--out mine: is not empty"), folder_of("analyse", pathlib.Path("mine")):
        pass
    for option in ("overwrite", "resume"):
        with folder_of("analyse", pathlib.Path("mine"), **{option: True}) as folder:
            assert folder == pathlib.Path("mine")
    assert pathlib.Path("mine", "a").read_text() == pathlib.Path("jaxnet-out").read_text() == "kept"
