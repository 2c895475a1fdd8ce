"""The one exception that means: the user can mend this, and here is how."""

import math
from types import SimpleNamespace


class UserError(Exception):
    """A mistake in what the run was given. Its text is one line: what is wrong, where, what to do.

    Scripts print that line on standard error and leave with exit status 2; any other exception is a bug of ours.
    """


def at_least(constants: SimpleNamespace, least: int, *names: str) -> None:
    """Raises UserError where one of the constants `names`, or a number of it, is below `least` or no finite number."""
    for name in names:
        value = getattr(constants, name)
        if not all(least <= number < math.inf for number in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name} is {value}; it must be {least} or more")
