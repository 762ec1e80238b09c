"""What goes wrong outside the program: shown as one line."""


class UserError(ValueError):
    """A mistake in input, not in the program, found before anything is written; its text says what is allowed."""


class WriteError(Exception):
    """A file could not be written (disk full, a limit, no permission): the text says which and why.

    What was saved before is intact.
    """
