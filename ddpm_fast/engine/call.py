"""One call of a sampler: what its images are functions of, so that any of them can be drawn again, in any batch; and
what is seen of it while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_seed, whole_number
from ..noise import NoiseSource, Philox, TorchNoise


def check_numbers(n: int, first_id: int, seed: int) -> None:
    """Raise ValueError unless there can be n images from this id on, each id in 64 bits, of a seed that torch takes."""
    if n < 0:
        raise ValueError(f"n must be 0 or more; got {n}")
    check_seed(seed)
    if not -(2**63) <= first_id <= 2**63 - n:
        raise ValueError(f"all ids from first_id on must lie in [-2**63, 2**63); got first_id={first_id} and n={n}")


def looked_at(interval: int | None, steps: int, each: bool) -> int:
    """The steps between two looks at a batch: those asked for, or each one, or a fiftieth of them all.

    Raises ValueError for what is no whole number of 1 or more.
    """
    if interval is None:
        return 1 if each else max(1, steps // 50)
    interval = whole_number("interval", interval)
    if interval < 1:
        raise ValueError(f"interval must be 1 or more; got {interval}")
    return interval


@dataclass
class Call:
    """The seed, the ids, the labels and the noise of ``n`` images.

    Images that draw from one torch generator belong together: a unit is what is drawn at once where memory allows, and
    the noise of a smaller part of it is the same rows of the same draws, from the generators' states at its beginning.
    """

    n: int
    seed: int
    first_id: int
    labels: Tensor | None  # [n]
    generators: torch.Generator | Sequence[torch.Generator] | None  # None: noise by (seed, id)
    in_step: bool  # noise by (seed, id) is drawn by the step itself
    image_shape: tuple[int, int, int]
    draws: Sequence[bool]  # per step: does it draw?
    dtype: torch.dtype  # of noise from generators
    device: torch.device
    unit: int  # images
    _states: dict[int, list[Tensor]] = field(default_factory=dict)  # unit's first row -> its generators' states

    def units(self) -> list[range]:
        return [range(i, min(i + self.unit, self.n)) for i in range(0, self.n, self.unit)]

    def ids(self, rows: Sequence[int]) -> Tensor:  # [len(rows)] int64 on the CPU
        return self.first_id + torch.tensor(list(rows), dtype=torch.int64, device="cpu")

    def labels_of(self, rows: Sequence[int]) -> Tensor | None:
        return None if self.labels is None else pick(self.labels, rows)

    def source(self, unit: range, rows: Sequence[int]) -> NoiseSource | None:
        """Noise from the host for ``rows`` of ``unit``, from the beginning; None: the step draws it itself."""
        if self.generators is None:
            if self.in_step:
                return None
            key = torch.tensor([(self.seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=self.device)
            return Philox(key, self.ids(rows).to(self.device), self.image_shape)
        mine = self._generators(unit)
        if unit.start in self._states:
            self.restore(unit)
        else:
            self._states[unit.start] = [g.get_state() for g in _each_once(mine)]
        whole = TorchNoise(mine, (len(unit), *self.image_shape), self.draws, self.dtype, self.device)
        return whole if len(rows) == len(unit) else _Rows(whole, [row - unit.start for row in rows])

    def restore(self, unit: range) -> None:
        """Put the generators of ``unit`` back to where they were before it."""
        for generator, state in zip(_each_once(self._generators(unit)), self._states.get(unit.start, [])):
            generator.set_state(state)

    def states(self) -> list[Tensor]:
        """Of all generators, now."""
        return [g.get_state() for g in _each_once(self._generators(range(self.n)))]

    def put_back(self, states: list[Tensor]) -> None:
        for generator, state in zip(_each_once(self._generators(range(self.n))), states):
            generator.set_state(state)

    def _generators(self, unit: range) -> list[torch.Generator]:
        if self.generators is None:
            return []
        if isinstance(self.generators, torch.Generator):
            return [self.generators]
        return list(self.generators if len(self.generators) == 1 else self.generators[unit.start : unit.stop])


class _Rows:
    """Some rows of what a source draws for a whole unit."""

    def __init__(self, whole: NoiseSource, rows: Sequence[int]):
        self.whole, self.rows = whole, rows

    def initial(self) -> Tensor:
        return self.whole.initial()[self.rows]

    def step(self, index: int, count: int) -> Tensor | None:
        z = self.whole.step(index, count)
        return None if z is None else z[self.rows]


class Shown:
    """What of a call is seen outside: the bar and the callback, batch by batch."""

    def __init__(self, bar: Any, callback: Callable[[int, Tensor], None] | None, steps: int, waits: bool):
        self.bar, self.callback, self.steps, self.waits = bar, callback, steps, waits
        self._done = 0

    @contextmanager
    def batch(self, first: bool) -> Iterator[None]:
        """One batch; not the ``first`` of its unit: one that the bar does not know of. A failed one is taken back."""
        self._done, more = 0, 0 if first else self.steps
        if more:
            self.bar.total += more
        try:
            yield
        except BaseException:
            self.bar.update(-self._done)
            self.bar.total -= more
            raise

    def look(self, done: int, x: Tensor) -> None:
        if self.waits:
            torch.cuda.current_stream(x.device).synchronize()
        self.bar.update(done - self._done)
        self._done = done
        if self.callback is not None:
            self.callback(done, x)


def pick(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows [len(rows), ...] of values; a view where they are a range."""
    return values[rows.start : rows.stop] if isinstance(rows, range) else values[list(rows)]


def strides(total: int, interval: int) -> Iterator[tuple[int, int]]:
    """(steps done, steps of this stride): at each multiple of ``interval`` and at the end."""
    done = 0
    while done < total:
        steps = min(interval, total - done)
        done += steps
        yield done, steps


def padded(values: Tensor, n: int) -> Tensor:
    """[m, ...] -> [n, ...]: the last one repeated, for the images of a partial batch that are thrown away."""
    return torch.cat((values, values[-1:].expand(n - len(values), *values.shape[1:]))) if len(values) < n else values


def _each_once(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    return list({id(g): g for g in generators}.values())
