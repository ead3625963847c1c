"""Output that is complete or not there.

Everything is written into a fresh folder beside its target, flushed to the disk, and renamed into place at the end.
Nothing that exists is overwritten, but by `write_text`. A process holds a lock on its folder, which the system takes
back when the process ends: one whose lock is free was left by a process that was killed, and the next write there
removes it.
"""

import os
import platform
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from s2ft_compile.errors import ExportError, of_the_system
from s2ft_compile.slices.processes import one_writes

try:
    import fcntl
except ImportError:  # no such locks: what was left behind stays
    fcntl = None

# of one machine, since a lock on a network's file system may not be seen from another
MINE = f".s2ft-{zlib.crc32(platform.node().encode()):08x}-"


@contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a folder to write into that becomes `target` when the block ends without an error.

    `target` may exist only as an empty folder; folders above it are made. Raises `ExportError` for one that
    cannot be written, before the block runs where it can be known then.
    """
    path = _resolved(target)
    _refuse_filled(path, target)
    if path.is_dir() and (os.path.ismount(path) or path == Path.cwd()):
        raise ExportError(
            f"{target} is a mount point or the current folder, which cannot be replaced; name a new folder inside it"
        )
    with _staging(path, target) as folder:
        yield folder
        _flush(folder)
        _refuse_filled(path, target)  # by another process, meanwhile
        os.rename(folder, path)  # replaces an empty folder


@contextmanager
def new_files(*targets: str | os.PathLike) -> Iterator[Path]:
    """Yields a folder; what is written there under the names of `targets` (of one parent) moves into place.

    The first target appears last, so that whoever sees it can rely on the others. Raises `ExportError` if
    one of them exists, before the block runs.
    """
    paths = [_resolved(target) for target in targets]
    _refuse_existing(paths)
    with _staging(paths[0], targets[0]) as folder, ExitStack() as undo:
        yield folder
        _flush(folder)
        _refuse_existing(paths)
        for path in reversed(paths):
            if (folder / path.name).exists():
                os.rename(folder / path.name, path)
                undo.callback(path.unlink, missing_ok=True)
        undo.pop_all()


def write_text(target: str | os.PathLike, text: str) -> None:
    """Makes a file hold this text (UTF-8), or leaves it as it was: whoever reads it sees all of either."""
    path = _resolved(target)
    with _staging(path, target) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
        _flush(folder)
        os.replace(folder / path.name, path)


def _resolved(target) -> Path:
    """Absolute and through symbolic links, so that the temporary folder is on the target's file system."""
    return Path(target).resolve()


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ExportError(f"{path} exists; name a file that does not exist yet, or remove it first{one_writes()}")


def _refuse_filled(path: Path, target) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(
            f"{target} exists{'' if path.is_dir() else ' and is not a folder'}; "
            f"name a folder that does not exist yet, or an empty one{one_writes()}"
        )


@contextmanager
def _staging(path: Path, target) -> Iterator[Path]:
    """A temporary folder beside `path`, gone afterwards; on failure so are the folders above that it made."""
    new_parents = [parent for parent in path.parents if not parent.exists()]
    with ExitStack() as undo:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_left_behind(path.parent)
            folder = _own_folder(path.parent, undo)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            yield folder
            _flush_folder(path.parent)
        except BaseException as error:
            undo.close()
            for parent in new_parents:
                _remove_if_empty(parent)
            if of_the_system(error):
                raise ExportError(f"could not write {target}: {error}") from error
            raise


def _own_folder(parent: Path, undo: ExitStack) -> Path:
    """A new folder, locked until `undo` closes."""
    while True:
        folder = parent / f"{MINE}{secrets.token_hex(6)}.tmp"  # mkdtemp would make it private to its owner
        folder.mkdir()
        descriptor = _lock(folder, wait=True)
        if descriptor is None:
            return folder
        undo.callback(os.close, descriptor)
        if folder.exists():  # and not removed in the moment before it was locked
            return folder


def remove_left_behind(parent: Path) -> None:
    """Removes the folders of processes of this machine that were killed while they wrote here."""
    for folder in parent.glob(f"{MINE}*.tmp"):
        descriptor = _lock(folder, wait=False)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int | None:
    """A descriptor that holds a folder's lock; None where another one does, or there are no locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # never made, or something else lives in it by now


def _flush(folder: Path) -> None:
    """Waits until what lies in `folder` is on the disk: a rename may otherwise get there before it.

    Files get the permissions that the umask gave the folder; safetensors makes them private to their owner.
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
                os.chmod(file.fileno(), mode)
        _flush_folder(root)


def _flush_folder(folder) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
