"""Small files, written so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8) in one step, creating its folder if need be."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file `path` by `content` in one step, creating its folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        make_readable(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def keep_first(path: Path, text: str) -> str:
    """Write the file `path` unless another process has meanwhile; what it then holds. `text` if it cannot be written.

    For answers that all processes must share although each could find its own.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(draft, path)
        draft.unlink(missing_ok=True)
        return path.read_text()
    except OSError:
        return text


def make_readable(path: str | Path) -> None:
    """Give a file that a library made private the mode of any new file: a saved policy is there to be read."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
