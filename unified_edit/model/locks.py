"""Who does what only one may do, among processes that share a folder.

A lock of the system goes when its process goes, however that ends, so that nothing has to be
cleared away after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


def taken(path: Path) -> AbstractContextManager[bool]:
    """Take the lock `path`, and let it go at the end of the context.

    The context gives whether it is ours; False if another process, or thread, has it. Folders are
    made. Raises OSError at once where nothing can be written, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return nullcontext(False)
    except NotImplementedError as problem:
        raise OSError(f"no locks there: {problem}") from problem
    return _held(lock)


@contextmanager
def _held(lock: BaseFileLock) -> Iterator[bool]:
    try:
        yield True
    finally:
        lock.release()
