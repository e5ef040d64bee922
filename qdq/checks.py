"""What an option may be. Who refuses one says what was found, and what is wanted."""

from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np

from qdq.errors import ConfigError

__all__ = ["is_flag", "is_number", "is_whole", "want", "want_above_0", "want_whole"]


def want(option: str, value: object, right: bool, wanted: str) -> None:
    """Refuse an option.

    Args:
        option: its name.
        value: what was found.
        right: whether it may be that.
        wanted: what it may be, in words.

    Raises:
        ConfigError: if not ``right``.
    """
    if not right:
        raise ConfigError(f"{option}={value!r} ({type(value).__name__}): wants {wanted}")


def want_whole(option: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or below ``least``, as ``want`` does."""
    right = is_whole(value) and value >= least
    want(option, value, right, f"a whole number, {least} or more")


def want_above_0(option: str, value: object) -> None:
    """Refuse what is no finite number above 0, as ``want`` does."""
    right = is_number(value) and 0 < value < np.inf
    want(option, value, right, "a finite number above 0")


def is_flag(value: object) -> TypeGuard[bool]:
    """Whether it is True or False, of Python or numpy."""
    return isinstance(value, bool | np.bool_)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one real number, of Python or numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is one integer, of Python or numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
