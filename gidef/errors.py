"""The exceptions for bad input."""


class InputError(ValueError):
    """Bad input from the user.

    The message says what was given, what was expected and what to change. The entry points print it
    as one line and exit with status 2; anything else is a defect and keeps its traceback.
    """


class StorageError(InputError):
    """A full disk, or a file that is missing, damaged or of another run: nothing that an attack did, and nothing to go on with."""
