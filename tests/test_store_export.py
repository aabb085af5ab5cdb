"""A set as one .npz, PNGs or a webdataset .tar: every pixel and label, in order, in bounded memory."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from store_setup import StandIn, begin, files, levels

from ddpm_fast.store import SampleStore, StoreError
from ddpm_fast.store.export import export
from ddpm_fast.store.workers import fill

IDS = range(7, 18)
LABELS = [i % 3 for i in IDS]


@pytest.fixture(params=[True, False], ids=["labels", "plain"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> SampleStore:
    labels = {"rule": "all", "classes": 3} if request.param else None
    store = begin(tmp_path / "set", n=len(IDS), first_id=IDS.start, labels=labels)
    fill(store, StandIn())
    return store


def pixels(store: SampleStore) -> np.ndarray:
    return np.stack([levels(3, i, i % 3 if store.labelled else None) for i in IDS])


def test_npz(whole: SampleStore, tmp_path: Path):
    assert export(whole, tmp_path / "new" / "a.npz") == len(IDS)
    with np.load(tmp_path / "new" / "a.npz") as file:
        assert file.files == (["arr_0", "arr_1"] if whole.labelled else ["arr_0"])
        assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], pixels(whole))
        assert not whole.labelled or (file["arr_1"].tolist() == LABELS and file["arr_1"].dtype == np.int64)
    export(whole, tmp_path / "b.npz")
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "new" / "a.npz").read_bytes()


def test_webdataset_tar(whole: SampleStore, tmp_path: Path):
    """Members of a sample are next to each other and share their name up to the first dot."""
    export(whole, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    kinds = ("png", "cls") if whole.labelled else ("png",)
    assert list(members) == [f"{i:06d}.{kind}" for i in IDS for kind in kinds]
    for i, image, label in zip(IDS, pixels(whole), LABELS):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[f"{i:06d}.png"]))), image)
        assert not whole.labelled or members[f"{i:06d}.cls"] == str(label).encode()
    export(whole, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()


def test_folder(whole: SampleStore, tmp_path: Path):
    export(whole, tmp_path / "pngs")
    found = files(tmp_path / "pngs")
    assert set(found) == {f"{i:06d}.png" for i in IDS} | {"set.json"} | ({"labels.csv"} if whole.labelled else set())
    for i, image in zip(IDS, pixels(whole)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[f"{i:06d}.png"]))), image)
    if whole.labelled:
        lines = found["labels.csv"].decode().splitlines()
        assert lines == ["file,label", *(f"{i:06d}.png,{k}" for i, k in zip(IDS, LABELS))]


@pytest.mark.parametrize("out", ["a.npz", "a.tar", "pngs"])
def test_a_set_that_is_not_whole_is_not_exported(out: str, whole: SampleStore, tmp_path: Path):
    (whole.folder / "checksums/000001.sha256").unlink()
    with pytest.raises(StoreError, match=r"1 of 3 shards of .* are not drawn yet"):
        export(whole, tmp_path / out)
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("out", ["a.npz", "a.tar", "pngs"])
def test_a_damaged_shard_is_named_and_no_file_is_left(out: str, whole: SampleStore, tmp_path: Path):
    path = whole.folder / "images/000001.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 4
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard 1 of .* is damaged \(.*000001.npy\); .* with --verify"):
        export(whole, tmp_path / out)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]  # neither half an archive nor a temporary file


def test_where_a_set_cannot_go(whole: SampleStore, tmp_path: Path):
    with pytest.raises(ValueError, match=r"an .npz, a .tar or a folder of PNGs; got .*a.zip"):
        export(whole, tmp_path / "a.zip")
    for inside in (whole.folder, whole.folder / "images"):
        with pytest.raises(ValueError, match="outside the set"):
            export(whole, inside)
    two = begin(tmp_path / "two", n=2, image_shape=[4, 6, 2])
    fill(two, StandIn(shape=(4, 6, 2)))
    with pytest.raises(ValueError, match="a PNG needs 1, 3 or 4 channels; these images have 2"):
        export(two, tmp_path / "pngs")
    export(two, tmp_path / "two.npz")


def test_ids_beyond_six_digits_sort(tmp_path: Path):
    store = begin(tmp_path / "set", n=3, first_id=999_999)
    fill(store, StandIn())
    export(store, tmp_path / "pngs")
    assert sorted(files(tmp_path / "pngs")) == ["0999999.png", "1000000.png", "1000001.png", "set.json"]


def test_memory_does_not_grow_with_the_set(tmp_path: Path):
    peaks = []
    for n in (64, 512):
        store = begin(tmp_path / str(n), n=n, shard_size=32, image_shape=[64, 64, 3])
        sampler = StandIn(shape=(64, 64, 3))
        sampler.sample = lambda n, *args, **options: torch.zeros(n, 3, 64, 64)  # type: ignore[method-assign]
        fill(store, sampler)
        tracemalloc.start()
        export(store, tmp_path / f"{n}.npz")
        export(store, tmp_path / f"{n}.tar")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.3
