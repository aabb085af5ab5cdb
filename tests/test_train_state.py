"""States and records on disk: whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ddpm_fast.training import state as train_state
from ddpm_fast.training.state import ResumeError


def test_two_states_are_kept_and_none_of_a_later_step(tmp_path: Path) -> None:
    (tmp_path / "step_000000009.pt").write_bytes(b"torn")
    (tmp_path / "step_000000001.pt.tmp").write_bytes(b"half")
    for step in (1, 2, 3):
        train_state.save_state(tmp_path, {"format": train_state.FORMAT, "step": step})
        assert train_state.load_latest_state(tmp_path)["step"] == step
    assert [p.name for p in train_state.state_paths(tmp_path)] == ["step_000000002.pt", "step_000000003.pt"]
    torch.save({"format": 99, "step": 4}, tmp_path / "step_000000004.pt")
    with pytest.raises(ResumeError, match="has state format 99; this version reads 1"):
        train_state.load_latest_state(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    train_state.write_json(path, {"a": 1})

    def fail_halfway(stream) -> None:
        stream.write(b'{"a": ')
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match=r"no space left: .*x\.json"):
        train_state.write_atomically(path, fail_halfway)
    assert json.loads(path.read_text()) == {"a": 1}
    train_state.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_said_and_the_states_before_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.save raises then speaks of its own archive."""
    train_state.save_state(tmp_path, {"format": train_state.FORMAT, "step": 1})

    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_state, "write_atomically", lambda path, write: write(Full()))
    with pytest.raises(
        OSError, match=r"step_000000002.pt cannot be written \(No space left on device\); once it can, the same"
    ):
        train_state.save_state(tmp_path, {"format": train_state.FORMAT, "step": 2, "x": torch.zeros(100_000)})
    assert train_state.load_latest_state(tmp_path)["step"] == 1
