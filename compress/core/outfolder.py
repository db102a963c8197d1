"""Output folders that appear under their final name only when they are complete."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from compress.core.commits import Commits
from compress.core.errors import InputError
from compress.core.progress import say
from compress.core.resources import free_disk, in_words


class WorkFolder:
    """`with` this: what is written to `output` gets its name, `out`, at the end.

    Until then everything is in `.NAME.KIND` beside the final place, under a lock, so that two runs
    on one output do not mix.  On an exception that folder is removed, unless there is something to
    go on from, and an existing output is left as it was.

    Raises InputError when `out` is no folder name.
    """

    output: Path
    kept_words = "What was done is kept: run the same command again to go on from there"

    def __init__(self, out: Path, overwrite: bool, kind: str) -> None:
        if not out.name:
            raise InputError(f"output '{out}' is not a folder name; give one, such as ./out")
        self.out = out
        self.overwrite = overwrite
        self.progress = out.with_name(f".{out.name}.{kind}")
        self._left = False
        self._lock = FileLock(self.progress / "lock")

    @property
    def has_kept(self) -> bool:
        """Whether there is something that the next run goes on from."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise InputError when the output exists and may not be replaced.

        Creates nothing, unlike entering.
        """
        try:
            exists = self.out.exists()
            if exists and not self.out.is_dir():
                raise InputError(f"output '{self.out}' is a file; give another name")
            if exists and any(self.out.iterdir()) and not self.overwrite:
                raise InputError(
                    f"output '{self.out}' exists; pass --overwrite, or give another name"
                )
        except (OSError, ValueError) as error:  # a name too long, no right to look, a NUL byte
            if isinstance(error, InputError):
                raise
            raise self._refused(error) from None

    def __enter__(self) -> Self:
        self.check()
        try:
            self.progress.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"output '{self.out}' is being written by another run; wait for it"
            ) from None
        except OSError as error:
            raise self._refused(error) from None
        try:
            self._tidy()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _tidy(self) -> None:
        """Remove what a killed run has left half written."""
        for leftover in list(self.progress.rglob(".*.partial")):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def leave(self) -> None:
        """End without an output: what was committed is kept for a run that goes on from there."""
        self._left = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._left:
                return
            if error is None:
                old = self.out.with_name(f".{self.out.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                if self.out.exists():
                    self.out.rename(old)
                self.output.rename(self.out)
                shutil.rmtree(old, ignore_errors=True)
                shutil.rmtree(self.progress, ignore_errors=True)
                return
            if not self.has_kept:
                shutil.rmtree(self.progress, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                say(self.kept_words)
            if isinstance(error, OSError):
                raise self._refused(error) from error
        finally:
            self._lock.release()

    def _refused(self, error: Exception) -> InputError:
        reason = getattr(error, "strerror", None) or str(error)
        kept = ""
        if self.has_kept:
            kept = "; what was done is kept: mend that and run the same command again to go on"
        return InputError(f"cannot write output '{self.out}': {reason}{kept}")


class OutputFolder(WorkFolder):
    """`with OutputFolder(out, overwrite) as work:` begin, then write into `work.output`.

        .NAME.progress/output        what will be NAME
        .NAME.progress/commits       what a broken-off run goes on from (commits.py)
        .NAME.progress/activations   the hidden states that it goes on with (activations.py)
        .NAME.progress/start         the checkpoint that a training of the whole model starts from
        .NAME.progress/trials        models that are made only to be measured
        .NAME.progress/training      checkpoints and the log of that training
        .NAME.progress/lock

    What a killed run leaves is found by the next one on this output.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        super().__init__(out, overwrite, "progress")
        self.output = self.progress / "output"
        self.commits = Commits(self.progress / "commits")
        self.activations = self.progress / "activations"
        self.start = self.progress / "start"
        self.trials = self.progress / "trials"
        self.training = self.progress / "training"

    def check_disk(self, needed: int) -> None:
        """Raise InputError where the disk has fewer bytes free than a run needs.

        What a broken-off run towards this output holds counts as free.
        """
        place = self.out.absolute().parent
        held = sum(path.stat().st_size for path in self.progress.rglob("*") if path.is_file())
        if needed > (free := free_disk(place) + held):
            raise InputError(
                f"output '{self.out}' takes up to {in_words(needed)} of disk while it is made, and "
                f"'{place}' has {in_words(free)} free; free some, or put --out elsewhere"
            )

    @property
    def has_kept(self) -> bool:
        return self.commits.exist

    @property
    def has_trained(self) -> bool:
        """Whether there are checkpoints of a training, which are kept whatever ends it."""
        return any(self.training.glob("checkpoints/step-*"))

    def begin(self, identity: Mapping[str, Any], restart: bool = False) -> None:
        """Go on with the commits there are, or begin with none and an empty output.

        `identity` says what the run is of.  Commits of another run are refused with an InputError
        that names the first difference, unless `restart`, which drops them.
        """
        if self.commits.exist and not restart:
            if difference := self.commits.difference(identity):
                raise InputError(
                    f"output '{self.out}' has an unfinished run with another {difference}; to drop "
                    f"it pass --restart or remove '{self.progress}', or give another name"
                )
            return
        for folder in (self.output, self.activations, self.start, self.trials, self.training):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.commits.begin(identity)

    def _tidy(self) -> None:
        if not self.output.is_dir():  # never begun, or killed when all was done
            self.commits.clear()
        super()._tidy()
