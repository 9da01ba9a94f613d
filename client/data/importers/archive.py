"""Opening a source: a folder as it is, or a tar archive unpacked with care into a scratch folder."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from client.data.importers.layout import Progress
from common.errors import DataError


@dataclass(frozen=True)
class Source:
    """Where the source's files lie.

    Attributes:
        folder: The files.
        scratch: True if they were unpacked for this import and may be moved away.
    """

    folder: Path
    scratch: bool


@contextmanager
def open_source(path: Path, beside: Path, progress: Progress) -> Iterator[Source]:
    """Give a source's folder; an archive is unpacked beside the data root and removed afterwards.

    Args:
        path: Folder or tar archive (also .tar.gz, .tgz, .tar.bz2, .tar.xz).
        beside: The data root that is being written; unpacking happens in its parent, on the same file system.
        progress: Called per archive member.

    Raises:
        DataError: Nothing there, no tar archive, or an archive that `unpack` refuses.
    """
    if path.is_dir():
        yield Source(path, scratch=False)
        return
    require_source(path)
    scratch = Path(tempfile.mkdtemp(prefix="unpacked-", dir=beside.parent))
    try:
        unpack(path, scratch, progress)
        yield Source(scratch, scratch=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_source(path: Path) -> None:
    """Refuse a source that is neither a folder nor a tar archive.

    Raises:
        DataError: Nothing there, or another kind of file.
    """
    if path.is_dir():
        return
    if not path.exists():
        raise DataError(
            "SOURCE is not there. Give the folder or archive that was downloaded.", detail=str(path)
        )
    try:
        known = tarfile.is_tarfile(path)
    except (OSError, EOFError) as error:
        raise DataError("SOURCE cannot be read by this account.", detail=f"{path}: {error}") from error
    if not known:
        raise DataError(
            "SOURCE is neither a folder nor a tar archive. Unpack other archives (zip, 7z) first and give the folder.",
            detail=str(path),
        )


def unpack(archive: Path, folder: Path, progress: Progress) -> None:
    """Unpack a tar archive, after every member was looked at.

    Refused are members that lead out of the folder, links and devices, and more bytes than the disk has free.

    Raises:
        DataError: A member as above, or a damaged archive. Nothing outside `folder` was written.
    """
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for number, member in enumerate(members, 1):
                _refuse(member, number, archive)
            size = sum(member.size for member in members)
            if size > shutil.disk_usage(folder).free:
                raise DataError(
                    f"Unpacking needs {size / 2**30:.1f} GiB; the disk of OUT has less. Free some, or choose another OUT.",
                    detail=str(folder),
                )
            wanted = [member for member in members if not _mac_shadow(member.name)]
            for number, member in enumerate(wanted, 1):
                tar.extract(member, folder, filter="data")
                progress("unpacking", number, len(wanted))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            "The archive cannot be unpacked; it may be damaged or incomplete, or the disk full. "
            "Check its checksum, or download it again.",
            detail=f"{archive}: {type(error).__name__}: {error}",
        ) from error


def _refuse(member: tarfile.TarInfo, number: int, archive: Path) -> None:
    pure = PurePosixPath(member.name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in member.name:
        clause = "leads out of the folder that it is unpacked into"
    elif not (member.isfile() or member.isdir()):
        clause = "is a link or device, not a plain file or folder"
    else:
        return
    raise DataError(
        f"Member {number} of the archive {clause}. Nothing was unpacked; do not trust this archive.",
        detail=f"{archive}: {member.name!r}",
    )


def _mac_shadow(name: str) -> bool:
    """Tell the "._name" files that macOS puts into archives."""
    return PurePosixPath(name).name.startswith("._")
