"""Training data: every source gives the pixels that Pillow reads, and damage is named instead of fatal."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import DataError, ImageData, image_files, load_data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
NAMES = ("cat/0.png", "cat/1.png", "dog/a/0.png", "dog/a/1.png", "dog/a/2.PNG", "emu/x.png")
LABELS = [0, 0, 1, 1, 1, 2]


def png(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures in three class folders."""
    for name, pixels in zip(NAMES, PIXELS):
        write(tmp_path / "in" / name, png(pixels))
    return tmp_path / "in"


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    mode = {".xz": "w:xz", ".gz": "w:gz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# Folders


def test_folder_gives_the_pixels_and_its_sub_folders_as_classes(folder: Path) -> None:
    write(folder / "readme.txt", b"no picture")
    write(folder / "cat/.hidden.png", png(PIXELS[0]))
    write(folder / ".thumbnails/0.png", png(PIXELS[0]))
    data = load_data(folder)
    np.testing.assert_array_equal(data.images, PIXELS)
    assert data.labels.tolist() == LABELS
    assert data.label_names == ("cat", "dog/a", "emu")
    assert data.image_shape == (3, 8, 8) and data.num_classes == 3 and data.skipped == ()
    index = np.array([5, 0, 5])
    np.testing.assert_array_equal(data.batch(index), PIXELS[[5, 0, 5]].transpose(0, 3, 1, 2))


def test_pictures_in_one_folder_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"all/{i}.png", png(PIXELS[i]))
    data = load_data(tmp_path)
    assert data.labels is None and data.label_names is None and data.num_classes == 0
    np.testing.assert_array_equal(data.images, PIXELS[:3])


@pytest.mark.parametrize("kind", ["jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_every_format_reads_as_pillow_reads_it(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"x.{kind}", png(PIXELS[0], kind))
    want = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(load_data(tmp_path).images[0], want)
    grey = np.asarray(Image.open(path).convert("RGB" if kind == "gif" else "L").convert("L"))
    got = load_data(tmp_path, channels=1).images
    assert got.shape == (1, 8, 8, 1)
    assert np.abs(got[0, ..., 0].astype(int) - grey).max() <= (1 if kind == "gif" else 0)  # by way of its palette


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    alpha = np.array([[0, 255], [128, 51]], np.uint8)
    colour = np.full((2, 2, 3), (200, 100, 0), np.uint8)
    write(tmp_path / "x.png", png(np.dstack([colour, alpha])))
    part = alpha[..., None] / 255
    want = colour * part + 255 * (1 - part)
    got = load_data(tmp_path).images[0]
    np.testing.assert_allclose(got, want, atol=1)  # Pillow rounds in integers
    np.testing.assert_array_equal(got[0], [[255, 255, 255], [200, 100, 0]])


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    deep = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    write(tmp_path / "x.png", png(deep))
    np.testing.assert_array_equal(load_data(tmp_path, channels=1).images[0, ..., 0], deep >> 8)
    np.testing.assert_array_equal(load_data(tmp_path).images[0, ..., 2], deep >> 8)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    write(tmp_path / "x.png", png(PIXELS[0], exif=exif))
    np.testing.assert_array_equal(load_data(tmp_path).images[0], np.rot90(PIXELS[0], -1))


def test_image_size_scales_the_short_side_and_crops_the_middle(tmp_path: Path) -> None:
    wide = RNG.integers(0, 256, (10, 31, 3), dtype=np.uint8)
    write(tmp_path / "a.png", png(wide))
    write(tmp_path / "b.png", png(PIXELS[0]))
    data = load_data(tmp_path, image_size=8)
    scaled = Image.fromarray(wide).resize((25, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(data.images[0], np.asarray(scaled)[:, 8:16])
    np.testing.assert_array_equal(data.images[1], PIXELS[0])


def test_a_large_folder_is_read_batch_by_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = load_data(folder, image_size=8)
    photo = png(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    write(folder / "emu/y.jpg", photo[: len(photo) // 2])  # a JPEG's header does not tell that its end is missing
    monkeypatch.setattr(image_files, "LARGEST_IN_MEMORY_BYTES", 0)
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable .*emu/y\.jpg"):
        lazy = load_data(folder, image_size=8)
    assert isinstance(lazy.images, image_files.LazyFolder) and len(lazy) == 6
    assert lazy.labels.tolist() == LABELS and lazy.skipped == ("emu/y.jpg",)
    for index in (np.arange(6), np.array([4, 1])):
        np.testing.assert_array_equal(lazy.batch(index), at_once.batch(index))
    with pytest.raises(DataError, match=r"cannot read the image emu/y\.jpg"):
        load_data(folder, image_size=8, strict=True)
    with pytest.raises(DataError, match="give image_size"):
        load_data(folder)


# Arrays


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "NHW1", "N1HW"])
def test_arrays_of_every_layout(tmp_path: Path, suffix: str, layout: str) -> None:
    grey = PIXELS[..., 0]
    stored = {
        "NHWC": PIXELS,
        "NCHW": PIXELS.transpose(0, 3, 1, 2),
        "NHW": grey,
        "NHW1": grey[..., None],
        "N1HW": grey[:, None],
    }[layout]
    path = tmp_path / f"x{suffix}"
    np.save(path, stored) if suffix == ".npy" else np.savez(path, stored)
    rgb = PIXELS if layout in ("NHWC", "NCHW") else np.stack([grey] * 3, axis=-1)
    data = load_data(path)
    np.testing.assert_array_equal(data.images, rgb)
    assert data.labels is None
    as_grey = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in rgb])[..., None]
    np.testing.assert_array_equal(load_data(path, channels=1).images, as_grey)


@pytest.mark.parametrize("keys", [("arr_0", "arr_1"), ("x", "y"), ("images", "labels")])
def test_npz_labels(tmp_path: Path, keys: tuple[str, str]) -> None:
    labels = np.array([[2], [0], [3], [0], [2], [2]], np.int32)
    np.savez(tmp_path / "x.npz", **{keys[0]: PIXELS, keys[1]: labels})
    data = load_data(tmp_path / "x.npz")
    assert data.labels.tolist() == [2, 0, 3, 0, 2, 2] and data.labels.dtype == np.int64
    assert data.num_classes == 4 and data.label_names == ("0", "1", "2", "3")


def test_arrays_are_resized_like_pictures(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    want = [np.asarray(Image.fromarray(p).resize((4, 4), Image.Resampling.LANCZOS)) for p in PIXELS]
    np.testing.assert_array_equal(load_data(tmp_path / "x.npy", image_size=4).images, want)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": PIXELS.astype(np.float32)}, "must hold uint8 images .*got float32"),
        ({"arr_0": PIXELS[0, 0]}, r"must be \[n, H, W, C\].*got \(8, 3\)"),
        ({"arr_0": PIXELS[..., :2]}, r"C 1 or 3; got \(6, 8, 8, 2\)"),
        ({"arr_0": PIXELS[:0]}, "holds no images"),
        ({"pictures": PIXELS}, "under one of arr_0, x, images; found pictures"),
        ({"arr_0": PIXELS, "arr_1": np.zeros(5, int)}, r"labels must be 6 integers, one an image; got int64 \(5,\)"),
        ({"arr_0": PIXELS, "arr_1": np.zeros(6)}, "labels must be 6 integers.*got float64"),
        ({"arr_0": PIXELS, "arr_1": np.arange(6) - 1}, r"labels must be in 0 \.\. 999999; got -1 \.\. 4"),
        ({"arr_0": PIXELS, "arr_1": np.arange(6) << 40}, r"labels must be in 0 \.\. 999999"),
        ({"arr_0": np.array([{}] * 6)}, "not a readable .npz file.*pickle"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_arrays_are_an_error_that_names_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    np.save(path, PIXELS) if suffix == ".npy" else np.savez_compressed(path, PIXELS)
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=path.name):
            load_data(path)
    if suffix == ".npz":  # only the archive has check sums
        start = zipfile.ZipFile(io.BytesIO(whole)).infolist()[0].header_offset + 60
        for at in range(start, len(whole) - 200, 61):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
            with pytest.raises(DataError, match=path.name):
                load_data(path)


# Archives


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz", ".tar.bz2"])
def test_tar_reads_as_its_folder(folder: Path, tmp_path: Path, suffix: str) -> None:
    shuffled = [4, 0, 5, 2, 1, 3]
    path = tar_of(tmp_path / f"x{suffix}", {f"./{NAMES[i]}": png(PIXELS[i]) for i in shuffled})
    data = load_data(path)
    np.testing.assert_array_equal(data.images, PIXELS)
    assert data.labels.tolist() == LABELS and data.label_names == ("cat", "dog/a", "emu")
    assert data.digest() == load_data(folder).digest()


def test_odd_members_of_a_tar_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "outer/inner"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    path = deep / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i, name in enumerate(("../../escaped.png", str(tmp_path / "absolute.png"), "cat/0.png")):
            info = tarfile.TarInfo(name)
            info.size = len(png(PIXELS[i]))
            archive.addfile(info, io.BytesIO(png(PIXELS[i])))
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("folder.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        sparse = tarfile.TarInfo("sparse.png")  # claims a terabyte of zeros in five bytes
        sparse.size = 5
        sparse.pax_headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(1 << 40)}
        archive.addfile(sparse, io.BytesIO(b"12345"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable images .*sparse\.png"):
        data = load_data(path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    by_folder = {data.label_names[label]: image for label, image in zip(data.labels, data.images)}
    for name, image in zip(("../..", str(tmp_path), "cat"), PIXELS):
        np.testing.assert_array_equal(by_folder[name], image)
    assert len(data) == 3


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz", ".tar.bz2"])
@pytest.mark.filterwarnings("ignore:skipped")
def test_damaged_archives_are_an_error_or_skip_images(tmp_path: Path, suffix: str) -> None:
    large = RNG.integers(0, 256, (6, 80, 80, 3), dtype=np.uint8)  # beyond what one read of a stream buffers
    path = tar_of(tmp_path / f"x{suffix}", {name: png(p) for name, p in zip(NAMES, large)})
    whole = path.read_bytes()
    images = {p.tobytes() for p in large}
    refused = 0
    for at in [*range(0, len(whole), len(whole) // 30), *range(0, 60, 7), *range(len(whole) - 60, len(whole), 7)]:
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            path.write_bytes(content)
            try:
                data = load_data(path)
            except DataError as error:
                assert path.name in str(error) and "\n" not in str(error)
                refused += 1
            else:  # what is left of it is right: PNG has check sums, so a changed picture does not read
                assert all(image.tobytes() in images for image in np.asarray(data.images))
    assert refused > 10


# Damage and mistakes


def test_unreadable_images_are_named_and_skipped_or_refused(folder: Path) -> None:
    whole = png(PIXELS[0])
    damaged = {
        "cat/cut.png": whole[: len(whole) // 2],
        "cat/empty.png": b"",
        "dog/a/text.jpg": b"this is no picture at all",
        "emu/float.tif": png(np.zeros((8, 8), np.float32), "TIFF"),
    }
    for name, content in damaged.items():
        write(folder / name, content)
    with pytest.warns(UserWarning, match="skipped 4 unreadable images") as caught:
        data = load_data(folder)
    assert all(name in str(caught[0].message) for name in damaged)
    assert data.skipped == tuple(sorted(damaged))
    np.testing.assert_array_equal(data.images, PIXELS)
    assert data.labels.tolist() == LABELS
    with pytest.raises(DataError, match=r"cannot read the image cat/cut\.png"):
        load_data(folder, strict=True)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_a_picture_raises(tmp_path: Path, kind: str) -> None:
    good = write(tmp_path / "good.png", png(PIXELS[1]))
    whole = png(PIXELS[0], kind)
    rng = np.random.default_rng(1)
    for i in range(40):
        content = bytearray(whole[: rng.integers(1, len(whole))] if i % 2 else whole)
        for at in rng.integers(0, min(len(content), 80), 3):  # most of it in the headers
            content[at] = rng.integers(256)
        write(tmp_path / f"{i:02d}.{kind}", bytes(content))
    data = load_data(tmp_path, image_size=8)
    assert len(data) + len(data.skipped) == 41 and len(data.skipped) > 0
    np.testing.assert_array_equal(data.images[-1], np.asarray(Image.open(good)))


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "holds no images"), ({"x.txt": b"1"}, "holds no images"), ({"x.png": b"1"}, "no readable image")],
)
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.filterwarnings("ignore:skipped 1 unreadable")
def test_nothing_to_train_on(tmp_path: Path, content: dict[str, bytes], message: str, archive: bool) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, text in content.items():
        write(source / name, text)
    if archive:
        source = tar_of(tmp_path / "in.tar.xz", content)
    with pytest.raises(DataError, match=message):
        load_data(source)


def test_differing_sizes_name_both_images(folder: Path) -> None:
    write(folder / "dog/b.png", png(RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)))
    with pytest.raises(DataError, match=r"cat/0\.png is 8x8 and dog/b\.png is 9x7. Give image_size"):
        load_data(folder)
    assert load_data(folder, image_size=8).images.shape == (7, 8, 8, 3)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training data at .*missing"):
        load_data(tmp_path / "missing")
    with pytest.raises(DataError, match=r"x\.zip is no training data that can be read"):
        load_data(write(tmp_path / "x.zip", b"1"))
    with pytest.raises(DataError, match=r"channels must be 1 .*got 4"):
        load_data(tmp_path, channels=4)
    with pytest.raises(DataError, match="image_size must be a positive"):
        load_data(tmp_path, image_size=0)


def test_the_digest_sees_pixels_labels_and_shape() -> None:
    labels = np.array(LABELS)
    same = ImageData(PIXELS.copy(), labels, source="elsewhere").digest()
    assert ImageData(PIXELS, labels).digest() == same
    changed = PIXELS.copy()
    changed[5, 7, 7, 2] ^= 1
    others = [
        ImageData(changed, labels),
        ImageData(PIXELS, labels[::-1]),
        ImageData(PIXELS),
        ImageData(PIXELS.reshape(6, 4, 16, 3), labels),
    ]
    assert len({same, *(o.digest() for o in others)}) == 5
