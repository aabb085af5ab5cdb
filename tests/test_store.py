"""The sample store: what a set holds byte by byte, how it goes on, and that damage and other options are found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, unet
from store_setup import SHAPE, StandIn, begin, checkpoint, expected, files, levels, manifest, without_manifest

import ddpm_fast as df
from ddpm_fast.store import SampleStore, StoreError
from ddpm_fast.store import manifest as store_manifest
from ddpm_fast.store.export import export
from ddpm_fast.store.workers import fill

IMAGES = np.stack([levels(3, i) for i in range(22)])


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A whole set of 22 images in 6 shards."""
    fill(begin(tmp_path / "set"), StandIn())
    return tmp_path / "set"


def test_a_set_is_shards_of_npy_with_checksums_and_a_manifest(whole: Path, tmp_path: Path):
    assert without_manifest(whole) == expected(tmp_path / "oracle", IMAGES, 4)
    assert json.loads((whole / "manifest.json").read_text()) == manifest()
    assert sorted(p.name for p in whole.iterdir()) == ["checksums", "images", "manifest.json"]
    assert np.array_equal(np.concatenate(list(SampleStore.open(whole).shards())), IMAGES)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_reads_the_checksums(whole: Path):
    lines = "".join(p.read_text() for p in sorted((whole / "checksums").iterdir()))
    done = subprocess.run(["sha256sum", "-c", "--quiet"], cwd=whole, input=lines, text=True, capture_output=True)
    assert done.returncode == 0 and lines.count("\n") == 6, done.stderr


def test_labels_are_stored_with_the_images(tmp_path: Path):
    store = begin(tmp_path / "set", n=7, first_id=5, labels={"rule": "all", "classes": 3})
    fill(store, StandIn())
    labels = np.array([5 % 3, 6 % 3, 7 % 3, 8 % 3, 9 % 3, 10 % 3, 11 % 3], np.int64)
    images = np.stack([levels(3, i, i % 3) for i in range(5, 12)])
    assert without_manifest(tmp_path / "set") == expected(tmp_path / "oracle", images, 4, labels)
    one = begin(tmp_path / "one", n=3, labels={"rule": 2, "classes": 3})
    fill(one, StandIn())
    images, found = one.load(0)
    assert found is not None and found.tolist() == [2, 2, 2]
    assert np.array_equal(images, np.stack([levels(3, i, 2) for i in range(3)]))


def test_levels_are_truncated_where_asked(tmp_path: Path):
    class Between(StandIn):  # just above level 100: rounded 100, and truncated 100; just below 101: 101 and 100
        def sample(self, n: int, *args: Any, **options: Any) -> torch.Tensor:
            return torch.full((n, 3, 4, 6), (100.9 / 127.5) - 1)

    for name, level in (("round", 101), ("truncate", 100)):
        store = begin(tmp_path / name, n=2, sampler__to_uint8=name)
        fill(store, Between())
        assert (store.load(0)[0] == level).all()


def test_a_stopped_run_goes_on_with_the_missing_shards_only(tmp_path: Path, whole: Path):
    def stop() -> None:
        raise KeyboardInterrupt

    first = StandIn()
    first.at_shard[12] = stop
    with pytest.raises(KeyboardInterrupt):
        fill(begin(tmp_path / "b"), first)
    assert first.drawn == list(range(12)) and begin(tmp_path / "b").finished() == {0, 1, 2}
    assert not list((tmp_path / "b" / "unfinished").iterdir())  # no claim is left
    second = StandIn()
    assert fill(begin(tmp_path / "b"), second) == 3
    assert second.drawn == list(range(12, 22))
    assert files(tmp_path / "b") == files(whole)
    assert fill(begin(tmp_path / "b"), StandIn()) == 0


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 4}, ["seed: was 3, now 4"]),
        ({"n": 23}, ["n: was 22, now 23"]),
        ({"first_id": 1, "shard_size": 8}, ["first_id: was 0, now 1", "shard_size: was 4, now 8"]),
        ({"sampler__dtype": "bfloat16"}, ['sampler.dtype: was "float32", now "bfloat16"']),
        ({"sampler__to_uint8": "truncate"}, ['sampler.to_uint8: was "round", now "truncate"']),
        ({"sampler__steps": 5, "sampler__table": "u" * 64}, ["sampler.steps: was null, now 5"]),
        ({"sampler__table": "u" * 64}, ["sampler.table: was"]),
        ({"schedule__beta_end": 0.4}, ["schedule.beta_end: was 0.5, now 0.4"]),
        ({"model__fingerprint": "e" * 64}, ["model.fingerprint: was"]),
        ({"device": "cuda"}, ['device: was "cpu", now "cuda"']),
        ({"labels": {"rule": 1, "classes": 2}}, ["labels: was null, now {"]),
    ],
)
def test_other_options_refuse_and_name_the_difference(changes: dict[str, Any], named: list[str], whole: Path):
    before = files(whole)
    with pytest.raises(StoreError) as caught:
        begin(whole, **changes)
    message = str(caught.value)
    assert all(name in message for name in named) and message.count(": was ") == len(named), message
    assert "begun with other options" in message and files(whole) == before


def test_what_does_not_change_the_images_is_no_difference(whole: Path):
    assert begin(whole, source="elsewhere").whole()
    assert begin(whole, sampler__steps=10, sampler__method="ddpm").whole()  # another spelling of the same table
    _, changed = SampleStore.begin(whole, manifest(environment={"torch": "2.14.0"}))
    assert changed == ['torch: was "2.13.0", now "2.14.0"']
    store, changed = SampleStore.begin(whole, manifest(shard_size=9, threads=8), ("shard_size", "threads"))
    assert (store.shard_size, store.manifest["threads"], changed) == (4, 1, [])


def flip(path: Path, old_time: bool) -> None:
    """One bit of the last byte; old_time: as a failing disk does it, which no file time shows."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    stamp = times.st_mtime_ns if old_time else times.st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


def truncate(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(times.st_mtime_ns, times.st_mtime_ns))


DAMAGES: dict[str, tuple[Callable[[Path], object], bool]] = {  # and whether every start finds it
    "a flipped bit": (lambda folder: flip(folder / "images/000002.npy", old_time=False), True),
    "a bit that rotted": (lambda folder: flip(folder / "images/000002.npy", old_time=True), False),
    "cut off": (lambda folder: truncate(folder / "images/000002.npy"), True),
    "removed": (lambda folder: (folder / "images/000002.npy").unlink(), True),
    "emptied checksum": (lambda folder: (folder / "checksums/000002.sha256").write_bytes(b""), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_and_drawn_again(damage: str, whole: Path):
    before = files(whole)
    hurt, at_start = DAMAGES[damage]
    hurt(whole)
    with pytest.raises(StoreError, match=r"shard 2 of .* is (damaged|not drawn)"):
        list(SampleStore.open(whole).shards())
    store = begin(whole)
    assert store.check() == ([2] if at_start else [])
    assert store.check(every=True) == ([] if at_start else [2])
    sampler = StandIn()
    fill(store, sampler)
    assert sampler.drawn == list(range(8, 12)) and files(whole) == before
    assert begin(whole).check(every=True) == []


def test_a_copied_set_is_compared_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """cp gives every file a new time, in any order."""
    shutil.copytree(whole, tmp_path / "copy", copy_function=shutil.copy)
    for path in (tmp_path / "copy" / "images").iterdir():
        os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    monkeypatch.setattr("ddpm_fast.store.samples.os.utime", lambda path: os_utime(path, ns=(2 * 10**18, 2 * 10**18)))
    hashed = []
    from ddpm_fast.store import samples as module

    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda path: hashed.append(path) or digest(path))
    store = begin(tmp_path / "copy")
    assert store.check() == [] and len(hashed) == 6
    assert store.check() == [] and len(hashed) == 6


os_utime = os.utime


def test_only_a_new_or_empty_folder_or_a_set(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000000.png").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"holds other things \(000000.png, ...\) and no manifest.json"):
        begin(tmp_path / "pictures")
    with pytest.raises(StoreError, match="holds no sample store"):
        SampleStore.open(tmp_path / "pictures")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="a file is in its way"):
        begin(tmp_path / "file" / "set")
    begin(tmp_path / "a" / "b")  # made with what is above it


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 2, "n": 3}'])
def test_a_manifest_that_cannot_be_read(content: bytes, whole: Path):
    (whole / "manifest.json").write_bytes(content)
    for action in (lambda: SampleStore.open(whole), lambda: begin(whole)):
        with pytest.raises(StoreError, match=r"manifest.json (is damaged|has format)"):
            action()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dicts and lists, the outermost included."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


READ_BACK = {  # by which a set is drawn, read and named: no other value may stand there
    *(
        "format",
        "n",
        "first_id",
        "seed",
        "shard_size",
        "image_shape",
        "labels",
        "labels.rule",
        "labels.classes",
        "device",
    ),
    *("threads", "model", "schedule", "environment", "sampler", "sampler.batch_size", "sampler.ops"),
    *("sampler.to_uint8", "image_shape.0", "image_shape.1", "image_shape.2", ""),
}
MISSING = object()


@pytest.mark.parametrize(
    "junk",
    [MISSING, None, -1, 0, "x", [], {}, True, 1.5, 1e99, 2**64, float("nan"), [[]]],
    ids=lambda junk: "missing" if junk is MISSING else str(junk),
)
def test_an_edited_manifest_costs_one_line(junk: Any, whole: Path):
    """Every field of a manifest removed or replaced: a set that reads, or one line that names file and field."""
    labels = {"rule": "all", "classes": 3}
    sound = manifest(labels=labels)
    right = [  # what other value may stand where
        ("seed", -1), ("seed", 0), ("first_id", 0), ("threads", None), ("labels", None), ("labels.rule", 0),
        ("sampler.ops", "x"), ("device", "x"), ("model", {}), ("schedule", {}), ("environment", {}),
    ]  # fmt: skip
    for place in places(sound):
        edited = json.loads(json.dumps(sound))
        if not place:
            edited = None if junk is MISSING else junk
        else:
            inner = edited
            for key in place[:-1]:
                inner = inner[key]
            if junk is MISSING:
                del inner[place[-1]]
            else:
                inner[place[-1]] = junk
        name = ".".join(map(str, place))
        (whole / "manifest.json").write_text(json.dumps(edited))
        fine = name not in READ_BACK or any(name == n and junk == v and type(junk) is type(v) for n, v in right)
        if fine:
            SampleStore.open(whole)
            continue
        with pytest.raises(StoreError) as caught:
            SampleStore.open(whole)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400 and str(whole / "manifest.json") in message, (name, message)
        assert place == () or str(place[0]) in message, (name, message)


def test_a_manifest_that_says_another_shape_than_the_shards_have(whole: Path, tmp_path: Path):
    (whole / "manifest.json").write_text(json.dumps(manifest(image_shape=[6, 4, 3])))
    with pytest.raises(
        StoreError, match=r"000000.npy does not fit .*manifest.json, by which it is uint8 \[4, 6, 4, 3\]"
    ):
        export(SampleStore.open(whole), tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_a_set_begun_by_many_at_once_has_one_manifest(tmp_path: Path):
    """Eight threads with a manifest each: all continue the first one's."""
    found: list[Any] = []

    def one(k: int) -> None:
        store, _ = SampleStore.begin(tmp_path / "set", manifest(shard_size=4 + k), ("shard_size",))
        found.append(store.shard_size)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "checksums",
        "images",
        "manifest.json",
        "unfinished",
    ]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fill(begin(tmp_path / "set"), StandIn())
    assert without_manifest(tmp_path / "set") == expected(tmp_path / "oracle", IMAGES, 4)
    assert not [p for p in (tmp_path / "set").iterdir() if p.name.startswith(".")]


def test_memory_does_not_grow_with_n(tmp_path: Path):
    """Traced: numpy's memory. A shard here has 768 KiB of levels."""
    shape, peaks = (64, 64, 3), []
    for n in (128, 1024):
        store = begin(tmp_path / str(n), n=n, shard_size=64, image_shape=list(shape))
        sampler = StandIn(shape=shape)
        sampler.sample = lambda n, *args, **options: torch.zeros(n, 3, 64, 64)  # type: ignore[method-assign]
        tracemalloc.start()
        fill(store, sampler)
        for _ in store.shards():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 and peaks[0] < 6 << 20


def test_a_shard_larger_than_is_held_at_once_is_drawn_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ddpm_fast.store.workers.HELD_BYTES", 4 * 4 * int(np.prod(SHAPE)) * 2)  # two batches of four
    calls: list[int] = []
    sampler = StandIn()
    draw = sampler.sample
    sampler.sample = lambda n, *args, **options: calls.append(n) or draw(n, *args, **options)  # type: ignore
    fill(begin(tmp_path / "set", shard_size=19), sampler)
    assert calls == [8, 8, 3, 3]
    assert without_manifest(tmp_path / "set") == expected(tmp_path / "oracle", IMAGES, 19)


def test_too_many_shards(tmp_path: Path):
    with pytest.raises(ValueError, match=r"less than 1,000,000 shards; got 5,000,000: 11 images a shard are the least"):
        begin(tmp_path / "set", n=10_000_000, shard_size=2)


# --- disks that fill up, refuse, or go away ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk of its own, or mounts it again with other options. Skips where that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NOT PROVEN HERE: no disk can be mounted: {done.stderr.strip()}")
        return folder

    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("NOT PROVEN HERE: mounting is Linux's")
    yield mount
    while subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode == 0:
        pass


def test_a_full_disk(disk: Callable[[str], Path], tmp_path: Path):
    folder = disk("size=64k") / "set"
    with pytest.raises(StoreError) as caught:
        fill(begin(folder, n=80), StandIn())
    finished = SampleStore.open(folder).finished()
    assert 2 < len(finished) < 20
    assert str(caught.value) == (
        f"no space is left for {folder}; make room; {len(finished)} of 20 shards are finished and kept; "
        "the same command goes on from there"
    )
    disk("size=1m,remount")
    sampler = StandIn()
    fill(begin(folder, n=80), sampler)
    assert len(sampler.drawn) == 4 * (20 - len(finished))
    images = np.stack([levels(3, i) for i in range(80)])
    assert without_manifest(folder) == expected(tmp_path / "oracle", images, 4)


def test_a_disk_that_is_full_from_the_start(disk: Callable[[str], Path]):
    folder = disk("size=4k")
    (folder / "x").write_bytes(b"x" * 4096)
    with pytest.raises(StoreError, match=r"no space is left for .*; 0 of 6 shards are finished and kept"):
        begin(folder / "set")
    assert not [p for p in (folder / "set").rglob("*") if p.is_file()]


def test_a_limit_on_file_size(tmp_path: Path):
    """No privileges needed, unlike a disk of its own: the second file that is too large fails as it is written."""
    import resource

    store = begin(tmp_path / "set", shard_size=20)  # shards of 20 images, 1,568 bytes, and of 2, 272 bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be used: \[Errno 27\] File too large.*; 0 of 2 shards"):
            fill(store, StandIn())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p for p in (tmp_path / "set").rglob("*") if p.is_file()] == [tmp_path / "set" / "manifest.json"]
    fill(store, StandIn())
    assert without_manifest(tmp_path / "set") == expected(tmp_path / "oracle", IMAGES, 20)


def test_a_read_only_folder(disk: Callable[[str], Path]):
    folder = disk("size=1m") / "set"
    begin(folder)
    disk("ro,remount")
    for place in (folder, folder.parent / "new"):
        with pytest.raises((StoreError, OSError), match=r"cannot be written to"):
            begin(place)
    disk("rw,remount")
    fill(begin(folder), StandIn())
    before = files(folder)
    disk("ro,remount")
    assert fill(begin(folder), StandIn()) == 0  # a whole set needs nothing written
    assert begin(folder).check() == [] and np.array_equal(np.concatenate(list(begin(folder).shards())), IMAGES)
    assert files(folder) == before


def test_a_folder_that_turns_read_only(disk: Callable[[str], Path]):
    folder = disk("size=1m") / "set"
    sampler = StandIn()
    sampler.at_shard[8] = lambda: disk("ro,remount")
    with pytest.raises(StoreError, match=r"cannot be written to \(Read-only file system\); 2 of 6 shards are finished"):
        fill(begin(folder), sampler)
    disk("rw,remount")
    fill(begin(folder), StandIn())
    assert np.array_equal(np.concatenate(list(begin(folder).shards())), IMAGES)


def test_a_mount_that_is_lost(tmp_path: Path):
    """The folder goes away under the run, and nothing is written where it was."""
    folder = tmp_path / "set"
    sampler = StandIn()
    sampler.at_shard[8] = lambda: folder.rename(tmp_path / "gone")
    with pytest.raises(StoreError, match=r"is gone or does not answer .*; 2 of 6 shards are finished and kept"):
        fill(begin(folder), sampler)
    assert not folder.exists()
    (tmp_path / "gone").rename(folder)
    again = StandIn()
    fill(begin(folder), again)
    assert sorted(again.drawn) == list(range(8, 22))
    assert without_manifest(folder) == expected(tmp_path / "oracle", IMAGES, 4)


# --- the manifest of a real sampler ---

SCHEDULE = df.Schedule(num_train_timesteps=10, beta_start=0.01, beta_end=0.5)


def described(seed: int = 0, schedule: df.Schedule = SCHEDULE, **options: Any) -> dict[str, Any]:
    model = unet({**TINY, "num_class_embeds": 3}, seed)
    sampler = df.Sampler(model, schedule, batch_size=4, **options)
    return store_manifest.describe(
        checkpoint(model, schedule),
        sampler,
        n=8,
        seed=0,
        first_id=0,
        label="all",
        shard_size=4,
        truncate=False,
        chain={"method": options.get("method"), "steps": options.get("steps"), "eta": options.get("eta", 0.0)},
    )


def test_a_manifest_of_a_sampler_names_what_changes_its_images():
    base = described()
    assert store_manifest.differences(json.loads(json.dumps(base)), base) == []
    assert base["labels"] == {"rule": "all", "classes": 3} and base["image_shape"] == [8, 8, 3]

    def names(**options: Any) -> list[str]:
        return [line.partition(":")[0] for line in store_manifest.differences(base, described(**options))]

    assert names(seed=1) == ["model.fingerprint"]
    assert names(steps=5) == ["sampler.steps"] and names(steps=10) == [] and names(method="ddpm") == []
    assert names(method="ddim") == ["sampler.method"]
    assert names(dtype=torch.bfloat16) == ["sampler.dtype"]
    assert names(guidance_scale=2.0) == ["labels.classes", "sampler.guidance_scale"]  # the last class is none
    other = df.Schedule(**{**SCHEDULE.to_dict(), "variance_type": "fixed_large"})
    assert names(schedule=other) == ["schedule.variance_type"]


@pytest.mark.parametrize("n, batch, size", [(50_000, 64, 64), (50_000, 256, 256), (10_000_000, 256, 10_240), (3, 3, 3)])
def test_shards_are_whole_batches_and_about_a_thousand_at_most(n: int, batch: int, size: int):
    assert store_manifest.shard_size(n, batch) == size and -(-n // size) <= 1000


def test_the_benchmark_of_the_store(tmp_path: Path):
    from benchmarks.store import overhead, resume

    loaded = df.load()
    share = overhead(loaded, tmp_path / "a", n=2, batch_size=1, steps=2)
    assert share["store_s"] > 0 and share["overhead"] == pytest.approx(share["store_s"] / share["sampling_s"])
    assert SampleStore.open(tmp_path / "a").whole()
    start = resume(loaded, tmp_path / "b", shards=5, shard_size=2, repeats=1)
    assert start["shards"] == 5 and start["resume_start_s"] > 0 and SampleStore.open(tmp_path / "b").whole()
