"""An .npz archive to numbers."""

import math
import pathlib
import zipfile
import zlib

import numpy as np

from jaxnet.contract import UserError

# zlib packs 1 : 1032 at most, and real data seldom beyond 1 : 100. What unpacks to little may be packed as it likes.
MOST_UNPACKED, MOST_PACKING = 2**26, 100


def read_archive(path: pathlib.Path, inputs: str, targets: str) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays that are named: inputs as float64, targets as int64 or float64."""
    unreadable = f"{path}: not a readable .npz archive; write it with numpy.savez"
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise UserError(unreadable)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            for name in (inputs, targets):
                if name not in names:
                    raise UserError(f"{path}: no array named {name!r}; it holds {', '.join(names) or 'none'}")
                _check_member(path, archive.zip, name)
            x, y = archive[inputs], archive[targets]
    except UserError:
        raise
    # NumPy and zipfile have as many words for a damaged archive as it has places to be damaged in.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(unreadable) from error
    except MemoryError as error:
        raise UserError(f"{path}: its arrays do not fit the memory") from error
    return x.astype(np.float64), _plain(y)


def _check_member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> None:
    """Raise unless a member's own header describes numbers, and as many of them as the archive really has.

    NumPy makes room for what a header claims before it reads on.
    """
    info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
        except ValueError as error:
            raise UserError(f"{path}: {name!r} is not an array; write the archive with numpy.savez") from error
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        begin = member.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects; save plain numeric arrays")
    if dtype.kind not in "biuf":
        raise UserError(f"{path}: array {name!r} is not numeric but {dtype}; save it as numbers")
    if math.prod(shape) * dtype.itemsize != info.file_size - begin:
        raise UserError(
            f"{path}: array {name!r} claims to be {shape} of {dtype}, and the archive holds {info.file_size - begin} "
            "bytes of it; write it anew with numpy.savez"
        )
    weight = path.stat().st_size
    if info.file_size > max(MOST_UNPACKED, MOST_PACKING * weight):
        raise UserError(
            f"{path}: array {name!r} would unpack to {info.file_size / 2**20:.0f} MiB, from a file of "
            f"{weight / 2**20:.1f}; if that is meant, save it unpacked, by numpy.savez"
        )


def _plain(y: np.ndarray) -> np.ndarray:
    """Integers stay integers: what they are is their type's to say, not their values'."""
    exact = y.dtype.kind in "bi" or (y.dtype.kind == "u" and (y <= np.iinfo(np.int64).max).all())
    return y.astype(np.int64 if exact else np.float64)
