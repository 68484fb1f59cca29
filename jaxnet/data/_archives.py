"""An .npz archive to numbers."""

import dataclasses
import math
import pathlib
import zipfile
import zlib

import numpy as np

from jaxnet.contract import UserError

# zlib packs 1 : 1032 at most, and real data seldom beyond 1 : 100. What unpacks to little may be packed as it likes.
MOST_UNPACKED, MOST_PACKING = 2**26, 100
# Bytes that are read at a time of an array that is not held whole.
_BLOCK = 2**24


def read_archive(
    path: pathlib.Path, inputs: str, targets: str, most_numbers: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[str]]:
    """The two arrays that are named, inputs as float64, targets as int64 or float64; and the rows that they are, where
    they are a sample, with a sentence that says so."""
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
            members = [_checked(path, archive.zip, name) for name in (inputs, targets)]
            (num, *shape), (num_targets, *_) = (member.shape or (0,) for member in members)
            chosen = sampled(num, math.prod(shape), most_numbers) if num == num_targets else None
            if chosen is None:
                x, y = archive[inputs], archive[targets]
            else:
                x, y = (member.rows(chosen) for member in members)
    except UserError:
        raise
    # NumPy and zipfile have as many words for a damaged archive as it has places to be damaged in.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(unreadable) from error
    except MemoryError as error:
        raise UserError(f"{path}: its arrays do not fit the memory") from error
    return x.astype(np.float64), _plain(y), chosen, [] if chosen is None else [of_sample(len(chosen), num)]


def sampled(num_rows: int, width: int, most_numbers: int | None) -> np.ndarray | None:
    """Rows drawn at random, in their order, so many that they hold at most so many numbers; None for all."""
    if most_numbers is None or num_rows * width <= most_numbers:
        return None
    count = max(3, most_numbers // width)
    return np.sort(np.random.default_rng(0).choice(num_rows, count, replace=False)) if count < num_rows else None


def of_sample(count: int, num_rows: int) -> str:
    """In words, what a sample is."""
    return f"a sample of {count:,} of {num_rows:,} rows, drawn at random: more would not fit the memory set aside"


@dataclasses.dataclass(frozen=True)
class _Member:
    """An array of an archive, by its header."""

    path: pathlib.Path
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype
    begin: int

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """Some rows, in the memory of those and a block."""
        if self.by_columns and len(self.shape) > 1:
            raise UserError(
                f"{self.path}: array {self.info.filename.removesuffix('.npy')!r} is saved column by column, from which "
                "no rows can be drawn; save numpy.ascontiguousarray of it"
            )
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        size = max(1, _BLOCK // row)
        found = []
        with self.archive.open(self.info) as file:
            file.read(self.begin)
            for start in range(0, self.shape[0], size):
                block = np.frombuffer(file.read(min(size, self.shape[0] - start) * row), self.dtype)
                first, last = np.searchsorted(chosen, (start, start + size))
                found.append(block.reshape(-1, *self.shape[1:])[chosen[first:last] - start])
        return np.concatenate(found)


def _checked(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> _Member:
    """A member whose own header describes numbers, and as many of them as the archive really has.

    NumPy makes room for what a header claims before it reads on.
    """
    info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
        except ValueError as error:
            raise UserError(f"{path}: {name!r} is not an array; write the archive with numpy.savez") from error
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(member)
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
    return _Member(path, archive, info, shape, by_columns, dtype, begin)


def _plain(y: np.ndarray) -> np.ndarray:
    """Integers stay integers: what they are is their type's to say, not their values'."""
    exact = y.dtype.kind in "bi" or (y.dtype.kind == "u" and (y <= np.iinfo(np.int64).max).all())
    return y.astype(np.int64 if exact else np.float64)
