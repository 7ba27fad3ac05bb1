"""Where the files of a trace lie: a folder, or one stored (undeflated) .zip of it.

Both refuse what a trace never contains: links, other names, compressed or encrypted members, members that
reach past the end of the archive. A handle reads from the very file that was checked.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, Protocol

from moesim.errors import TraceError, describe

MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"(?:tokens-\d{5,9}|steps|kernels|counts)\.parquet\Z")
MAX_MEMBERS = 65000


class Archive(Protocol):
    """Named files of a trace."""

    place: str

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        ...


class FolderArchive:
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)

    def open(self, name: str) -> BinaryIO:
        """Open a regular file of the folder, following no link."""
        path = self.path / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            unfinished = "the recording was not finished, or this is not a moetrace/1 folder; record or import the trace again"
            rule = unfinished if name == MANIFEST else "copy the whole folder again"
            raise TraceError(f"{path}: does not exist; {rule}") from None
        except OSError as cause:
            raise TraceError(f"{path}: cannot be opened ({cause.strerror or cause}); it must be a readable file, not a link") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise TraceError(f"{path}: is not a regular file; copy the whole folder again")
        return os.fdopen(handle, "rb")

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size


class _Slice(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._start + self._at)
        read = self._file.readinto(view[:count]) or 0  # type: ignore[attr-defined]
        self._at += read
        return int(read)

    def close(self) -> None:
        self._file.close()
        super().close()


class ZipArchive:
    """A .zip whose members are stored as they are; the folder may be one level down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)
        self._members: dict[str, tuple[int, int]] = {}
        remedy = "write it with `zip -0 -r`"
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                _check_directory(file, size, self.place)
                with zipfile.ZipFile(file) as archive:
                    for info in archive.infolist():
                        if info.is_dir():
                            continue
                        name = info.filename.rsplit("/", 1)[-1]
                        if info.filename.count("/") > 1 or info.filename.startswith(("/", "../")) or not (name == MANIFEST or FILE_NAME.match(name)):
                            raise TraceError(describe(self.place, "member", info.filename, "is not a file of a trace", remedy))
                        if name in self._members:
                            raise TraceError(describe(self.place, "member", info.filename, "appears twice", remedy))
                        if (
                            info.compress_type != zipfile.ZIP_STORED
                            or info.flag_bits & 1
                            or info.compress_size != info.file_size
                            or stat.S_ISLNK(info.external_attr >> 16)
                        ):
                            raise TraceError(describe(self.place, "member", info.filename, "must be stored without compression or encryption", remedy))
                        self._members[name] = (_data_start(file, info, size, self.place), info.file_size)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as cause:
            raise TraceError(f"{self.place}: is not a readable .zip ({cause}); {remedy}") from None

    def size(self, name: str) -> int:
        """Return the bytes of a member."""
        return self._member(name)[1]

    def open(self, name: str) -> BinaryIO:
        """Open a member for reading."""
        start, length = self._member(name)
        return io.BufferedReader(_Slice(self.path.open("rb", buffering=0), start, length), 1 << 16)

    def _member(self, name: str) -> tuple[int, int]:
        if name not in self._members:
            raise TraceError(f"{self.place}: has no member {name}; zip the whole trace folder")
        return self._members[name]


def _check_directory(file: BinaryIO, size: int, place: str) -> None:
    """Bound the central directory before the standard library loads it."""
    file.seek(max(0, size - 66000))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise TraceError(f"{place}: is not a .zip archive; give a trace folder or its stored .zip")
    entries, directory = struct.unpack_from("<HI", tail, at + 10)
    if entries > MAX_MEMBERS or directory > 16 << 20:
        raise TraceError(describe(place, "members", entries, f"must be <= {MAX_MEMBERS}"))
    file.seek(0)


def _data_start(file: BinaryIO, info: zipfile.ZipInfo, size: int, place: str) -> int:
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise TraceError(describe(place, "member", info.filename, "has no local header", "copy the archive again"))
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + info.file_size > size:
        raise TraceError(describe(place, "member", info.filename, f"reaches past the end of the archive ({size} B)", "copy the archive again"))
    return start
