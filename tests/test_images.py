"""Pictures out, by pixel values; and that a failure in the middle leaves nothing behind."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_fast import images
from ddpm_fast.sampler import to_uint8


def coloured(n: int, height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray:
    """[n, H, W, C] uint8 in which every value of the set is distinguishable from its neighbours, none of it white."""
    values = np.random.default_rng(n).integers(0, 255, (n, height, width, channels))
    return values.astype(np.uint8)


@pytest.mark.parametrize("n, columns, shape", [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3)), (5, 4, (2, 4))])
def test_a_grid_holds_each_image_row_by_row_with_white_between(n: int, columns: int | None, shape: tuple[int, int]):
    x = coloured(n)
    sheet = images.grid(x, columns, gap=2, side=1)  # a side of 1 pixel: not enlarged
    rows, across = shape
    assert sheet.shape == (rows * 4 + (rows - 1) * 2, across * 6 + (across - 1) * 2, 3)
    used = np.zeros(sheet.shape[:2], bool)
    for i in range(n):
        y, x0 = i // across * 6, i % across * 8
        assert np.array_equal(sheet[y : y + 4, x0 : x0 + 6], x[i])
        used[y : y + 4, x0 : x0 + 6] = True
    assert (sheet[~used] == 255).all()


@pytest.mark.parametrize("side, factor", [(512, 512 // 18), (36, 2), (35, 1), (17, 1)])
def test_small_images_are_enlarged_by_whole_factors(side: int, factor: int):
    x = coloured(7)  # 3 x 3 images of 4 x 6 pixels: the wide axis has 18
    sheet = images.grid(x, side=side)
    gap = max(1, factor // 4)
    tile = sheet[: 4 * factor, 6 * factor + gap : 12 * factor + gap]
    assert np.array_equal(tile, np.kron(x[1], np.ones((factor, factor, 1), np.uint8)))
    assert sheet.shape[:2] == (3 * 4 * factor + 2 * gap, 3 * 6 * factor + 2 * gap)


def test_a_grid_of_nothing_and_pictures_of_two_channels():
    with pytest.raises(ValueError, match="a grid needs at least one image; got none"):
        images.grid(coloured(0))
    with pytest.raises(ValueError, match=r"a picture needs 1, 3 or 4 channels; got 2; write an .npz instead"):
        images.picture(coloured(1, channels=2)[0])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_png_holds_the_pixels(channels: int, mode: str, tmp_path: Path):
    x = coloured(1, channels=channels)[0]
    path = tmp_path / "new" / "a.png"  # the folder is made
    images.save_picture(path, x)
    with Image.open(path) as image:
        assert (image.mode, image.format, image.size) == (mode, "PNG", (6, 4))
        assert np.array_equal(np.asarray(image).reshape(x.shape), x)


def test_an_unknown_suffix(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a.xyz: .xyz is not a picture format; use .png"):
        images.save_picture(tmp_path / "a.xyz", coloured(1)[0])
    assert list(tmp_path.iterdir()) == []


def test_npz_layout(tmp_path: Path):
    x, labels = coloured(5), np.arange(5)
    images.save_npz(tmp_path / "a.npz", x)
    images.save_npz(tmp_path / "b.npz", x, labels)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a.files == ["arr_0"] and b.files == ["arr_0", "arr_1"]
        assert a["arr_0"].dtype == np.uint8 and a["arr_0"].shape == (5, 4, 6, 3)
        assert np.array_equal(a["arr_0"], x) and np.array_equal(b["arr_0"], x) and np.array_equal(b["arr_1"], labels)


def test_a_folder_names_images_by_their_ids(tmp_path: Path):
    x = coloured(3)
    images.save_folder(tmp_path / "out", x, [7, 8, 1234567])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000007.png", "000008.png", "1234567.png"]
    for name, image in zip(("000007", "000008", "1234567"), x):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), image)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_no_file_and_no_temporary(error: type[BaseException], tmp_path: Path):
    with pytest.raises(error), images.whole_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.npz"
    images.save_npz(path, coloured(2))
    before = path.read_bytes()

    def fail(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save_npz(path, coloured(3))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "a.bin"
    with images.whole_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="error numbers")
@pytest.mark.parametrize("name", ["n" * 250, "folder", "folder.bin"])
def test_an_error_names_the_file_and_not_the_temporary_one(name: str, tmp_path: Path):
    """Of mkstemp, whose name is longer; of the last renaming; and of a temporary name that the caller gave."""
    (tmp_path / "folder").mkdir()
    given = tmp_path / "folder" if name == "folder.bin" else None
    with pytest.raises(OSError) as failed, images.whole_file(tmp_path / name, given) as file:
        file.write(b"x")
    assert failed.value.filename == str(tmp_path / name) and failed.value.filename2 is None
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_permissions_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        with images.whole_file(tmp_path / "a.bin"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def film_of(steps: int, n: int = 3, channels: int = 3, frames: int = 12) -> tuple[images.Film, list[torch.Tensor]]:
    """A film shown moment k as the level k / steps * 2 - 1, plus a little per image; and what it was shown."""
    film = images.Film(steps, to_uint8, frames=frames)
    shown = []
    for step in range(steps + 1):
        x = torch.full((n, channels, 4, 6), step / steps * 1.9 - 1) + 0.01 * torch.arange(n)[:, None, None, None]
        shown.append(x.clone())
        film.callback(step, x)
        x.zero_()  # the sampler goes on in the same memory
    for step in range(steps + 1):  # a later batch is not of the film
        film.callback(step, torch.ones(n, channels, 4, 6))
    return film, shown


@pytest.mark.parametrize("steps, frames", [(50, 12), (50, 5), (4, 12), (1, 12)])
def test_a_film_keeps_evenly_spaced_moments_with_both_ends(steps: int, frames: int):
    film, shown = film_of(steps, frames=frames)
    count = min(frames, steps + 1)
    moments = [round(i * steps / (count - 1)) for i in range(count)]
    assert len(film.frames) == count
    for frame, moment in zip(film.frames, moments):
        assert np.array_equal(frame, to_uint8(shown[moment]).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_has_a_row_an_image_and_time_to_the_right(channels: int, tmp_path: Path):
    film, _ = film_of(5, channels=channels)
    film.save(tmp_path / "film.png")
    strip = np.asarray(Image.open(tmp_path / "film.png"))
    strip = strip.reshape(*strip.shape[:2], channels)
    factor = 1200 // (6 * 6)
    gap = factor // 4
    assert strip.shape[:2] == (3 * 4 * factor + 2 * gap, 6 * 6 * factor + 5 * gap)
    for row in range(3):
        for moment in range(6):
            y, x = row * (4 * factor + gap), moment * (6 * factor + gap)
            tile = strip[y : y + 4 * factor, x : x + 6 * factor]
            assert (tile == film.frames[moment][row, 0, 0]).all(), (row, moment)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_has_a_frame_a_moment_and_ends_at_the_image(channels: int, tmp_path: Path):
    film, _ = film_of(5, n=2, channels=channels)
    film.save(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0
        pages = []
        durations = []
        for page in ImageSequence.Iterator(gif):
            durations.append(page.info["duration"])
            pages.append(np.asarray(page.convert("RGB")))
    assert durations == [120] * 5 + [2000]
    factor = 512 // 12
    for page, frame in zip(pages, film.frames):
        for i in range(2):
            x = i * (6 * factor + factor // 4)
            # flat grey levels survive GIF's palette
            assert (page[: 4 * factor, x : x + 6 * factor] == frame[i, 0, 0]).all()


def test_a_film_of_more_images_than_it_shows():
    film, shown = film_of(3, n=11)
    assert all(len(f) == 8 for f in film.frames)
    assert np.array_equal(film.frames[0], to_uint8(shown[0][:8]).numpy())


def test_a_film_of_a_batch_that_starts_over():
    """Where memory ended, the first batch is drawn again in halves."""
    film = images.Film(3, to_uint8)
    shown = [torch.full((4, 3, 2, 2), value) for value in (-1.0, -0.5, 0.0, 0.5)]
    for step in (0, 1, 0, 1, 2, 3, 0, 1, 2, 3):
        film.callback(step, shown[step])
    assert [int(f.flat[0]) for f in film.frames] == [int(to_uint8(x).flatten()[0]) for x in shown]
