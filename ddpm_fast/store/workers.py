"""Workers: each takes a shard that no one draws, draws it, stores it, and takes the next, until the set is whole.

They have a folder in common and nothing else: shards are dealt by claim files (claims.py), whether workers were
started by torchrun, by a batch queue on several machines, or by hand. What a shard holds depends on its ids alone, so
the set does not depend on how many workers there were, or who drew what.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..distributed import World
from ..progress import progress_bar
from ..sampler import Sampler, to_uint8
from .claims import HEARTBEAT_S, STALE_S, Claims
from .manifest import label_of
from .samples import UNFINISHED, SampleStore, StoreError

HELD_BYTES = 256 << 20  # of float32 images drawn by one call of the sampler
Look = Callable[[int, torch.Tensor], None]  # a sampler's callback: steps done, the batch as it stands
POLL_S = 1.0  # between looks at what others draw, where nothing is left to take
REFRESH_S = 2.0  # between listings for the progress bar


def fill(
    store: SampleStore,
    sampler: Sampler,
    world: World | None = None,
    progress: bool = False,
    *,
    title: str | None = None,
    look: Look | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    stale_s: float = STALE_S,
) -> int:
    """Draw shards of ``store`` until the set is whole, beside any other worker.

    It ends when the last shard is finished, whoever drew it: a shard whose worker died meanwhile is taken over.

    Args:
        store: the set, of which ``sampler`` draws.
        sampler: draws the images.
        world: this worker among those that were started with it.
        progress: whether a bar shows.
        title: what the bar is called. Default: the folder.
        look: a callback of the sampler for the first batch of the set, if this worker draws it.
        heartbeat_s: how often a claim is renewed.
        stale_s: after how long an owner that is not heard of counts as dead.

    Returns:
        How many shards this worker drew.

    Raises:
        StoreError: the folder cannot be used.
    """
    drawn = 0
    if store.whole():
        store.finish()
        return drawn
    with store.disk():  # of a set that was whole until damage was found in it
        (store.folder / UNFINISHED).mkdir(exist_ok=True)
    with Claims(store.folder / UNFINISHED, heartbeat_s, stale_s) as claims, Bar(store, progress, title) as bar:
        start = _start(store, claims, world or World())
        while (shard := _next(store, claims, start, bar)) is not None:
            name = _name(shard)
            images = draw(store, sampler, shard, bar.part if progress else None, look if shard == 0 else None)
            labels = _labels(store, shard) if store.labelled else None
            try:
                store.write(shard, images, labels, claims.temporary(name))
            except StoreError:
                # Where this worker was taken for dead, another may have finished shard and set, and tidied up.
                if not store.has(shard):
                    raise
            claims.release(name)
            drawn += 1
            start = shard + 1
            bar.look()
    store.finish()
    return drawn


def draw(
    store: SampleStore,
    sampler: Sampler,
    shard: int,
    done: Callable[[float], None] | None = None,  # is told how many images are drawn
    look: Look | None = None,  # a callback of the sampler for the first batch
) -> np.ndarray:  # [count, H, W, C] uint8
    """The images of a shard. It holds a bounded number of them as float32, in whole batches."""
    ids, options = store.ids(shard), store.manifest
    truncate = options["sampler"]["to_uint8"] == "truncate"
    pixels = np.empty((len(ids), *store.image_shape), np.uint8)
    batch = sampler.batch_size
    at_once = batch * max(1, HELD_BYTES // (4 * batch * int(np.prod(store.image_shape))))
    labels = _labels(store, shard) if store.labelled else None
    for start in range(0, len(ids), at_once):
        count = min(at_once, len(ids) - start)
        x = sampler.sample(
            count,
            options["seed"],
            None if labels is None else torch.from_numpy(labels[start : start + count]),
            ids[start],
            **watched(sampler, start, count, done, look if start == 0 else None),
        )
        pixels[start : start + count] = to_uint8(x, truncate).cpu().numpy()
    return pixels


def watched(
    sampler: Sampler,
    start: int,
    count: int,
    done: Callable[[float], None] | None,
    look: Look | None = None,
) -> dict[str, Any]:
    """The sampler's ``callback`` and ``interval`` for ``count`` images after ``start`` others.

    done: is told of images, a fraction for each step of those in work. look: a callback that sees each step of the
    first batch.
    """
    steps, finished = len(sampler.table), 0

    def callback(step: int, x: torch.Tensor) -> None:
        nonlocal finished
        if look is not None and not finished:
            look(step, x)
        if done is not None:
            done(start + min(count, finished + len(x) * step / steps))
        if step == steps:
            finished += len(x)

    none = done is None and look is None
    return {"callback": None if none else callback, "interval": max(1, steps // 20) if look is None else 1}


def _labels(store: SampleStore, shard: int) -> np.ndarray:  # [count] int64
    rule, classes = store.manifest["labels"]["rule"], store.manifest["labels"]["classes"]
    return np.array([label_of(rule, i, classes) for i in store.ids(shard)], np.int64)


def _name(shard: int) -> str:
    return f"{shard:06d}"


def _start(store: SampleStore, claims: Claims, world: World) -> int:
    """Where this worker begins to look: apart from the others, so that they do not ask for the same shards."""
    if world.size > 1:
        return world.part(len(store)).start
    return random.randrange(len(store)) if claims.others() else 0


def _next(store: SampleStore, claims: Claims, start: int, bar: Bar) -> int | None:
    """A shard that is this worker's now; None once all are finished. Waits while others draw what is left."""
    while True:
        missing = sorted(set(range(len(store))) - store.finished())
        if not missing:
            return None
        with store.disk():
            for shard in [s for s in missing if s >= start] + [s for s in missing if s < start]:
                try:
                    taken = claims.take(_name(shard))
                except FileNotFoundError:
                    if store.whole():  # another worker finished the set, and tidied up
                        return None
                    raise
                if not taken:
                    continue
                if not store.has(shard):
                    return shard
                claims.release(_name(shard))  # finished since the listing
        bar.look()
        time.sleep(POLL_S)


class Bar:
    """Images, images a second and time left of a whole set, counted in its folder: so over all its workers."""

    def __init__(self, store: SampleStore, wanted: bool, title: str | None = None):
        self._store, self._wanted = store, wanted
        self._next_look = 0.0
        self._finished = store.images_in(store.finished()) if wanted else 0
        self._bar = progress_bar(
            wanted,
            store.count,
            "image",
            title or str(store.folder),
            initial=self._finished,
            smoothing=0.02,  # several workers' shards come in bursts
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.look()
        self._bar.close()

    def look(self) -> None:
        """Count what is finished."""
        if self._wanted:
            began = time.monotonic()
            self._finished = self._store.images_in(self._store.finished())
            now = time.monotonic()
            self._next_look = now + max(REFRESH_S, 100 * (now - began))  # at most 1 % of the time is spent on it
            self._show(self._finished)

    def part(self, images: float) -> None:
        """So many images of this worker's own shard are drawn."""
        if time.monotonic() > self._next_look:
            self.look()
        self._show(self._finished + images)

    def _show(self, images: float) -> None:
        images = round(min(images, self._store.count))
        if images > self._bar.n:
            self._bar.update(images - self._bar.n)
