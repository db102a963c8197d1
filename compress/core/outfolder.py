"""An output folder that appears under its final name only when it is complete."""

import shutil
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from compress.core.errors import InputError


class OutputFolder:
    """`with OutputFolder(out, overwrite) as partial:` write into `partial`; success renames it.

    The work happens in `.NAME.partial` beside the final place, under a lock, so that two runs on
    one output do not mix.  On an exception the partial folder is removed, and an existing output
    is left as it was.  Raises InputError when the output exists and `overwrite` is false, when
    it cannot be written, or when another run holds the lock.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = out
        self.overwrite = overwrite
        self.partial = out.with_name(f".{out.name}.partial")
        self._lock = FileLock(out.with_name(f".{out.name}.lock"))

    def __enter__(self) -> Path:
        if not self.out.name:
            raise InputError(f"output '{self.out}' is not a folder name; give one, such as ./out")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"output '{self.out}' is a file; give another name")
        if self.out.exists() and any(self.out.iterdir()) and not self.overwrite:
            raise InputError(f"output '{self.out}' exists; pass --overwrite, or give another name")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"output '{self.out}' is being written by another run; wait for it"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot write to '{self.out.parent}': {error.strerror or error}"
            ) from None
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        return self.partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
                if isinstance(error, OSError):
                    reason = error.strerror or str(error)
                    raise InputError(f"cannot write output '{self.out}': {reason}") from error
                return
            old = self.out.with_name(f".{self.out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if self.out.exists():
                self.out.rename(old)
            self.partial.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            self._lock.release()
