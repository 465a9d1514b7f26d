"""The error for bad input: one line that names the thing and says what to do."""

from collections.abc import Sequence

_LISTED = 10


class InputError(ValueError):
    """Raised when the user's input (a path, a field, a file's content) is wrong.

    The message is shown as it is, without a traceback, and the command exits with code 2.
    """


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """Returns a list for an error's text: the first ten, and how many more there are."""
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")
