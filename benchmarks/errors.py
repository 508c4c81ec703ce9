"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """A fault of the arguments, the data or the run directory, in one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
