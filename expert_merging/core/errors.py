"""The one exception that means: the user can mend this, and here is how."""


class UserError(Exception):
    """A mistake in what the run was given. Its text is one line: what is wrong, where, what to do.

    Scripts print that line on standard error and leave with exit status 2; any other exception is a bug of ours.
    """
