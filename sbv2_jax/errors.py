"""The error for bad input: one line that names the thing and says what to do."""


class InputError(ValueError):
    """Raised when the user's input (a path, a field, a file's content) is wrong.

    The message is shown as it is, without a traceback, and the command exits with code 2.
    """
