"""Claims: one owner each, dead owners known at once on this machine and by their silence elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_fast.store import claims as store_claims
from ddpm_fast.store.claims import Claims


def claim_of(folder: Path, name: str, **owner: Any) -> Path:
    """A claim as some other process wrote it."""
    values = {"token": "other", "host": store_claims.host(), "pid": os.getppid(), "started": None, **owner}
    path = folder / f"{name}.claim"
    path.write_text(json.dumps(values))
    return path


def test_a_claim_has_one_owner_until_it_is_given_back(tmp_path: Path):
    with Claims(tmp_path) as a, Claims(tmp_path) as b:
        assert a.take("0") and not b.take("0") and b.take("1")
        assert a.others() == ["1"] and b.others() == ["0"]
        b.release("0")  # not its own: stays
        assert not b.take("0")
        a.release("0")
        assert b.take("0") and b.others() == []
    assert list(tmp_path.iterdir()) == []  # given back at the end


def test_of_many_processes_one_takes_it(tmp_path: Path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from ddpm_fast.store.claims import Claims\n"
        "sys.stdin.readline()\n"
        "claims = Claims(Path(sys.argv[1])).__enter__()\n"
        "print(sum(claims.take(str(k)) for k in range(200)), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    root = str(Path(__file__).parents[1])
    # The package itself needs torch; its folder alone is enough for this one module.
    words = [
        sys.executable,
        "-c",
        code.replace("ddpm_fast.store.claims", "claims"),
        str(tmp_path),
        f"{root}/ddpm_fast/store",
    ]
    workers = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    counts = [int(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
    assert sum(counts) == 200 and len(list(tmp_path.glob("*.claim"))) == 200
    for worker in workers:
        worker.kill()
        worker.communicate()


def test_a_dead_owner_is_known_at_once_and_what_it_was_writing_goes(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = store_claims._started(process.pid)
    claim_of(tmp_path, "000001", pid=process.pid, started=started)
    (tmp_path / "000001.other.tmp").write_bytes(b"half")
    (tmp_path / "000002.other.tmp").write_bytes(b"of another shard")
    with Claims(tmp_path) as claims:
        assert not claims.take("000001")
        process.kill()
        if started is not None:  # with /proc: a zombie that no one has waited for is dead too
            while store_claims._stat(process.pid)[0] != "Z":  # type: ignore[index]
                time.sleep(0.001)
            assert claims.take("000001")
            assert not (tmp_path / "000001.other.tmp").exists() and (tmp_path / "000002.other.tmp").exists()
    process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times come from /proc")
def test_a_process_id_used_again_is_not_the_owner(tmp_path: Path):
    claim_of(tmp_path, "0", started="1")
    with Claims(tmp_path) as claims:
        assert claims.take("0")


def test_an_owner_on_another_machine_is_known_by_its_silence(tmp_path: Path):
    """Its own clock may be years off: only whether the time moves counts."""
    path = claim_of(tmp_path, "0", host="elsewhere", pid=1)
    os.utime(path, (1, 1))
    with Claims(tmp_path, stale_s=0.2) as claims:
        assert not claims.take("0")
        time.sleep(0.15)
        os.utime(path, (2, 2))
        assert not claims.take("0")
        time.sleep(0.15)
        assert not claims.take("0")  # silent for 0.15 s
        time.sleep(0.1)
        assert claims.take("0")
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_living_owner_s_claims_move(tmp_path: Path):
    with Claims(tmp_path, heartbeat_s=0.01) as claims:
        claims.take("0")
        path = tmp_path / "0.claim"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert path.stat().st_mtime > 2


@pytest.mark.parametrize("content", [b"", b'{"tok', b"[1]"])
def test_a_claim_whose_owner_died_before_it_wrote_its_name(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_claims, "EMPTY_S", 0.05)
    (tmp_path / "0.claim").write_bytes(content)
    with Claims(tmp_path) as claims:
        assert not claims.take("0")
        time.sleep(0.06)
        assert claims.take("0")


def test_one_that_was_taken_for_dead_goes_on_unharmed(tmp_path: Path):
    """Its claim is another's: it neither touches nor removes that one."""
    with Claims(tmp_path) as slow:
        slow.take("0")
        path = claim_of(tmp_path, "0", host="elsewhere", token="thief")
        slow.release("0")
        assert path.exists() and json.loads(path.read_text())["token"] == "thief"


def test_a_failure_in_this_process_leaves_nothing_claimed_for_long(tmp_path: Path):
    """Where even giving back failed, as on a disk that was away: this process knows that it no longer works on it."""
    with Claims(tmp_path / "a") as first:
        (tmp_path / "a").mkdir()
        first.take("0")
        (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "0.claim").exists()
    with Claims(tmp_path / "b") as second:
        assert second.take("0")
