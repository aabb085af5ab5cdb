"""Where ``ddpm-fast sample`` puts its images: shards, PNGs, or one file. Each goes on where a killed run was."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import Drawing, begin, prepared, say_which, warn_of_changes
from .interruption import says_what_is_kept

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..sampler import Sampler
    from ..store import OtherSet, SampleStore
    from ..store.workers import Look

PARTS = ".parts"  # after a file's name: the folder of its images as long as it is not written


def fill_shards(drawing: Drawing, out: Path, shard_size: int | None, verify: bool, device: torch.device) -> None:
    """The set in ``out``, by this worker and all others."""
    from ..distributed import OtherProcessFailed, join
    from ..store import MANIFEST, OtherSet, SampleStore, StoreError
    from ..store.workers import fill
    from ..whole_files import check_folder

    def started() -> tuple[Sampler, SampleStore, list[str]]:
        try:
            return begin(SampleStore, out, drawing, device, shard_size)[1:]
        except OtherSet as error:
            raise _with_the_command(error, drawing, out) from None

    def joined() -> tuple[Sampler, SampleStore, list[str]]:
        try:
            SampleStore.open(out)
        except StoreError as error:
            raise StoreError(f"{out} must be one folder that all machines share; {error}") from None
        return started()

    whole = False
    try:
        with join(device) as world:
            if world.first and not (out / MANIFEST).exists():
                check_folder(out, "--out")
            # The first one begins the set, and says what is wrong with it; the others find it, and say nothing.
            own = world.together(lambda: started() if world.first else None)
            world.together(lambda: None if own is None else _report(own[1], own[2], verify))
            sampler, store, _ = world.together(lambda: own or joined())
            with says_what_is_kept(lambda: _kept(store), world.first):
                fill(store, sampler, world, progress=world.first)
            whole = True
            if world.first:
                shards = len(store)
                parts = f"{shards} shard{'s' * (shards != 1)}"
                print(f"{_images(drawing.n)} in {out}: {parts}, all finished")
    except OtherProcessFailed:
        raise SystemExit(2) from None  # the other one says why
    except RuntimeError:
        if not whole:  # else another worker died after its last shard, and nothing is lost by that
            raise


def fill_pngs(drawing: Drawing, out: Path, film: Path | None, device: torch.device) -> None:
    """The folder ``out`` of PNGs, each of which is there when its batch ends."""
    from ..store.pictures import PictureFolder, draw_pictures
    from ..whole_files import check_folder

    check_folder(out, "--out")
    drawing, sampler, folder, changed = begin(PictureFolder, out, drawing, device, as_picture=True)
    warn_of_changes(folder, changed)

    def kept() -> str:
        there = folder.finished()
        return _so_far(sum(i in there for i in drawing.ids), drawing.n, out)

    with says_what_is_kept(kept):
        draw_pictures(folder, sampler, drawing.ids, progress=True, look=_film(film, sampler))
    others = len(folder.finished()) - drawing.n
    beside = f", beside {others} other{'s' * (others != 1)} of the same set" if others else ""
    print(f"{_images(drawing.n)} in {out}{beside}{_and(film)}")


def fill_file(drawing: Drawing, out: Path, film: Path | None, device: torch.device) -> None:
    """One file, a grid or an .npz.

    More than one batch is drawn into a set of shards beside it, which a killed run leaves and the next one continues;
    it is removed when the file is written.
    """
    from ..store import OtherSet, SampleStore, StoreError
    from ..store.workers import fill
    from ..whole_files import check_file

    check_file(out, "--out")
    parts = out.with_name(out.name + PARTS)
    as_picture = film is not None or out.suffix.lower() != ".npz"
    if isinstance(drawing.batch_size, int) and drawing.n <= drawing.batch_size and not parts.exists():
        single, _, sampler = prepared(drawing, device, as_picture)
        say_which(drawing, sampler)
        pixels = _drawn(single, sampler, _film(film, sampler))
        _write(out, pixels, single.labels(sampler))
    else:
        try:
            drawing, sampler, store, changed = begin(SampleStore, parts, drawing, device, as_picture=as_picture)
        except OtherSet as error:
            raise StoreError(f"{error}; or remove {parts}, which an interrupted run left") from None
        _report(store, changed)
        look = _film(film, sampler)
        with says_what_is_kept(lambda: _kept(store)):
            if look is not None and store.has(0):  # drawn before: again, for the film alone
                _drawn(drawing.first(sampler.batch_size), sampler, look)
            fill(store, sampler, progress=True, title=str(out), look=look)
            _write_whole(out, store)
        store.remove()
    print(f"{_images(drawing.n)} in {out}{_and(film)}")


def _drawn(drawing: Drawing, sampler: Sampler, look: Look | None) -> np.ndarray:  # [n, H, W, C] uint8
    from ..sampler import to_uint8

    x = sampler.sample(drawing.n, drawing.seed, drawing.labels(sampler), drawing.first_id, progress=True, callback=look)
    return to_uint8(x, drawing.truncate).cpu().numpy()


def _write(out: Path, pixels: np.ndarray, labels: list[int] | None) -> None:
    import numpy as np

    from .. import images

    if out.suffix.lower() == ".npz":
        images.save_npz(out, pixels, None if labels is None else np.array(labels))
    else:
        images.save_picture(out, images.grid(pixels))


def _write_whole(out: Path, store: SampleStore) -> None:
    """The file of a whole set. StoreError, with what is kept, where it cannot be written."""
    import numpy as np

    from ..store import StoreError
    from ..store.export import export

    try:
        if out.suffix.lower() == ".npz":
            export(store, out)
        else:
            _write(out, np.concatenate(list(store.shards())), None)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written ({error.strerror or error}); its {_images(store.count)} are kept in "
            f"{store.folder}; the same command writes it without drawing them again"
        ) from error


def _film(path: Path | None, sampler: Sampler) -> Look | None:
    """A sampler's callback that saves the film of the first batch as soon as that has ended."""
    from ..images import Film
    from ..sampler import to_uint8

    if path is None:
        return None
    steps = len(sampler.table)
    film, file = Film(steps, to_uint8), path

    def look(step: int, x: torch.Tensor) -> None:
        film.callback(step, x)
        if step == steps and film.frames:
            film.save(file)

    return look


def _report(store: SampleStore, changed: list[str], verify: bool = False) -> None:
    """Say what is not as it was when the set was begun, and put damaged shards back to be drawn."""
    warn_of_changes(store, changed)
    damaged = store.check(every=verify)
    if damaged:
        text = ", ".join(map(str, damaged[:10])) + ", ..." * (len(damaged) > 10)
        print(f"ddpm-fast: damaged shards of {store.folder} are drawn again: {text}", file=sys.stderr)


def _kept(store: SampleStore) -> str:
    return _so_far(store.images_in(store.finished()), store.count, store.folder)


def _so_far(done: int, n: int, place: Path) -> str:
    return f"{done} of {_images(n)} {'is' if n == 1 else 'are'} finished and kept in {place}; the same command goes on"


def _with_the_command(error: OtherSet, drawing: Drawing, folder: Path) -> Exception:
    """The refusal; of a set that is to be longer, with the command that draws the other images."""
    from ..store import StoreError

    had = error.begun["n"]
    more = drawing.n - had
    if error.names != ["n"] or more < 0:
        return error
    options = {"-n": more, "--first-id": drawing.first_id + had, "--out": f"{folder}-{drawing.first_id + had}"}
    return StoreError(
        f"{folder} holds a set of {_images(had)}, and a set does not grow: draw the other {more} into a folder of "
        f"their own: {shlex.join(_replaced(sys.argv[1:], options))}"
    )


def _replaced(words: list[str], options: dict[str, Any]) -> list[str]:
    """The command ``ddpm-fast`` with these words, but for ``options``, which have other values."""
    kept, skip = ["ddpm-fast"], False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in options:
            skip = not equals
        elif not (word[:2] in options and word[2:].isdecimal()):  # -n500
            kept.append(word)
    return kept + [str(part) for option in options.items() for part in option]


def _images(n: int) -> str:
    return f"{n} image{'s' * (n != 1)}"


def _and(film: Path | None) -> str:
    return "" if film is None else f", the denoising in {film}"
