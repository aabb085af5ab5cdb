"""What callers pass as numbers: Python's own, numpy's, and tensors of one element."""

from __future__ import annotations

import operator


def whole_number(name: str, value: object) -> int:
    """``value`` as an int. ValueError, naming the argument, for what is no whole number; True is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a whole number; got {value!r}") from None
