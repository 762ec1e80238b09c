"""What goes wrong outside the program: shown as one line."""


class UserError(ValueError):
    """A mistake in input, not in the program, found before anything is written; its text says what is allowed."""


class WriteError(Exception):
    """A file could not be written (disk full, a limit, no permission): the text says which and why.

    What was saved before is intact.
    """


def one_line(error: Exception) -> str:
    """The text of ``error`` on one line, shortened: it may quote what a damaged or hostile file contains."""
    text = " ".join(str(error)[:1000].split())
    return "".join(c for c in text if c.isprintable())[:200] or type(error).__name__
