"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input from the user.

    The message says what was given, what was expected and what to change. The entry points print it
    as one line and exit with status 2; anything else is a defect and keeps its traceback.
    """
