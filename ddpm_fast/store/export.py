"""A set of shards as one .npz, a folder of PNGs or a webdataset .tar: shard by shard, in order of ids."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..progress import progress_bar
from ..whole_files import check_file, check_folder, whole_file
from .pictures import PictureFolder, png
from .samples import SampleStore, StoreError, npy_header


def export(store: SampleStore, out: Path, progress: bool = False) -> int:
    """Write a whole set as what ``out`` says: .npz, .tar, or else a folder of PNGs; the number of images.

    .npz: arr_0 uint8 [n, H, W, C], and arr_1 the labels, as the FID tools read it. .tar: 000000.png ... by id, with
    000000.cls where the model has classes, as webdataset reads it. A folder: 000000.png ... by id, and labels.csv.
    Every shard's checksum is compared. Files appear whole or not at all, and the same set gives the same bytes.

    Raises StoreError where shards are missing or damaged: they are named before anything is written, as far as a
    listing shows; ValueError for an ``out`` that cannot be.
    """
    suffix = out.suffix.lower()
    if suffix not in ("", ".npz", ".tar") and not out.is_dir():
        raise ValueError(f"export writes an .npz, a .tar or a folder of PNGs; got {out}")
    if suffix in (".npz", ".tar"):
        check_file(out)
    missing = len(store) - len(store.finished())
    if missing:
        raise StoreError(
            f"{missing} of {len(store)} shards of {store.folder} are not drawn yet; the ddpm-fast sample command "
            "that began the set goes on with it"
        )
    if suffix not in (".npz", ".tar"):
        if out.resolve() == store.folder.resolve() or store.folder.resolve() in out.resolve().parents:
            raise ValueError(f"the PNGs need a folder outside the set itself; got {out}")
        if store.image_shape[2] not in (1, 3, 4):
            raise ValueError(f"a PNG needs 1, 3 or 4 channels; these images have {store.image_shape[2]}; use .npz")
        check_folder(out)
        folder, _ = PictureFolder.begin(out, store.manifest)
    with progress_bar(progress, store.count, "image", str(out)) as bar:
        if suffix == ".npz":
            _npz(store, out, bar)
        elif suffix == ".tar":
            _tar(store, out, bar)
        else:
            _folder(store, folder, bar)
    return store.count


def _npz(store: SampleStore, out: Path, bar: Any) -> None:
    """Members are written as they come; only the labels, eight bytes an image, are kept until the end."""
    labels = []
    with whole_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            member.write(npy_header((store.count, *store.image_shape), np.dtype(np.uint8)))
            for shard in range(len(store)):
                images, own = store.load(shard)
                member.write(np.ascontiguousarray(images).data)
                labels.append(own)
                bar.update(len(images))
        if store.labelled:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels), version=(1, 0))  # type: ignore[arg-type]


def _tar(store: SampleStore, out: Path, bar: Any) -> None:
    with whole_file(out) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for name, image, label in _pictures(store, bar):
            _member(archive, f"{name}.png", png(image))
            if label is not None:
                _member(archive, f"{name}.cls", str(label).encode())


def _folder(store: SampleStore, folder: PictureFolder, bar: Any) -> None:
    """Each PNG is whole or not there; what a killed export lacks, the next one writes."""
    for shard in range(len(store)):
        images, _ = store.load(shard)
        folder.write(store.ids(shard), images)
        bar.update(len(images))
    folder.finish()


def _pictures(store: SampleStore, bar: Any) -> Iterator[tuple[str, np.ndarray, int | None]]:
    """(name by id, [H, W, C] uint8, class), in order."""
    digits = max(6, len(str(store.first_id + store.count - 1)))  # all alike, so that names sort
    for shard in range(len(store)):
        images, labels = store.load(shard)
        for row, sample_id in enumerate(store.ids(shard)):
            yield f"{sample_id:0{digits}d}", images[row], None if labels is None else int(labels[row])
        bar.update(len(images))


def _member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Without owner and time, so that the same set is the same archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
