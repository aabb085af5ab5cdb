"""Images that are not finite: which, from which step on, and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call

MOST_NAMED = 8


def finite_images(x: Tensor) -> Tensor:  # [N, C, H, W] -> [N] bool, on its device
    """Which images hold neither NaN nor infinity; waits for nothing."""
    return torch.isfinite(x).all(dim=(1, 2, 3))


class FirstFaults:
    """Looks at every step of a batch, and remembers after which an image was first not finite."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}  # row of the call -> steps done

    def looking_at(self, rows: Sequence[int]) -> Callable[[int, Tensor], None]:
        """A callback (steps done, x [len(rows), C, H, W]); it waits for the device."""

        def look(done: int, x: Tensor) -> None:
            for i in (~finite_images(x)).nonzero().flatten().tolist():
                self.steps.setdefault(rows[i], done)

        return look


def described(faults: Mapping[int, int], first_id: int, timesteps: Sequence[int]) -> str:
    """ "id 3 from step 12 of 20 (t = 8), id 7 ...": the ids and steps of ``faults``, in one line."""
    named = []
    for row, done in list(faults.items())[:MOST_NAMED]:
        where = "x_T itself" if done == 0 else f"step {done} of {len(timesteps)} (t = {timesteps[done - 1]})"
        named.append(f"id {first_id + row} from {where}")
    more = len(faults) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


Redraw = Callable[[Call, Sequence[int], Tensor], Mapping[int, int]]
"""Draws rows of a call into the result under watch -> row: steps done when it was first not finite."""


def repair(
    call: Call,
    rows: Sequence[int],
    result: Tensor,  # [n, C, H, W]
    dtype: torch.dtype,
    timesteps: Sequence[int],
    redraw: Redraw,
    in_float32: Callable[[], Redraw | None],  # None where float32 is no way out
) -> None:
    """Draw ``rows``, which are not finite, again: as they were, which names the step, and then in float32.

    Warns of what was repaired. Raises RuntimeError, with ids and steps, for what is still not finite. Generators are
    left where the call left them.
    """
    after = call.states()
    faults = left = redraw(call, rows, result)
    exact = in_float32() if faults else None
    if exact is not None:
        left = exact(call, list(faults), result)
    call.put_back(after)
    name, named = str(dtype).removeprefix("torch."), described(left or faults, call.first_id, timesteps)
    if left:
        tried = name if exact is None else f"{name} and again in float32"
        raise RuntimeError(f"images must be finite; in {tried} these are not: {named}; look at the model's weights")
    if faults:
        warnings.warn(f"not finite in {name}, so drawn in float32: {named}", RuntimeWarning, stacklevel=4)
        return
    named = f"{len(rows)} images, id {call.first_id + rows[0]} the first"
    warnings.warn(f"not finite, but finite when drawn once more in the same way: {named}", RuntimeWarning, stacklevel=4)


class Unchanged:
    """Whether a model's parameters are still what they were when this was made."""

    def __init__(self, model: object):
        self.model = model
        self._versions: list[tuple[int, int]] | None = self._now()

    def __bool__(self) -> bool:
        return self._versions is not None and self._versions == self._now()

    def __copy__(self) -> Unchanged:
        return self

    def __deepcopy__(self, memo: object) -> Unchanged:
        """The same model is watched: a copy of a sampler needs no second one."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """The model goes along where it is still what it was."""
        return (Unchanged, (self.model,)) if self else (_changed, ())

    def _now(self) -> list[tuple[int, int]]:
        parameters: Any = getattr(self.model, "parameters", list)()
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def _changed() -> Unchanged:
    made = Unchanged(None)
    made._versions = None
    return made
