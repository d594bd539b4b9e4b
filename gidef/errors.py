"""The exceptions that users see: for bad input, and for ranks that are lost."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input from the user.

    The message says what was given, what was expected and what to change. The entry points print it
    as one line and exit with status 2; anything else is a defect and keeps its traceback.
    """


class Diverged(InputError):
    """A training whose numbers are no longer finite, raised on every rank together: other trainings of the run can go on."""


class StorageError(InputError):
    """A full disk, or a file that is missing, damaged or of another run: nothing that an attack did, and nothing to go on with."""


class RankFailure(RuntimeError):
    """Another rank failed, or went missing, so this one cannot go on. The message names it.

    ranks: the ones that failed or are missing.  lines: the last lines of what the first of them said.  bad_input: that it was an InputError.
    log: that rank's log, once it is known where the run's folder is.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = (), lines: Sequence[str] = (), bad_input: bool = False) -> None:
        super().__init__(message)
        self.ranks, self.lines, self.bad_input = tuple(ranks), tuple(lines), bad_input
        self.log: object = None
