"""What a user can get wrong: shown as one line, exit code 2, before anything is written."""


class UserError(ValueError):
    """A mistake in input, not in the program; its text is one line and says what is allowed."""
