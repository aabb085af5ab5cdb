"""What ``doctor`` tries on this machine: the compiler, the folders that are written to, and what "auto" takes."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from .engine.choose_ops import LONG_RUN, why_not_triton, why_not_winograd
from .ops import compiled

PROBE_S = 10.0  # for the compiler to make the smallest library
LIBRARY_BYTES = 1 << 20  # more than our compiled functions take


def compiler_facts() -> dict[str, str | None]:
    """``named``: $CXX; ``command``: what compiles; ``problem``: why it does not, tried on the smallest library."""
    facts: dict[str, str | None] = {"named": os.environ.get("CXX") or None, "command": None, "problem": None}
    try:
        command = compiled.compiler()
        facts["command"] = " ".join(command)
        compiled.probe(command, PROBE_S)
    except compiled.BuildError as error:
        facts["problem"] = error.reason
    return facts


def folder_facts(folder: Path) -> dict[str, Any]:
    """``folder``, ``free_mib``, and as ``problem`` why nothing can be written there, tried with a file."""
    facts: dict[str, Any] = {"folder": str(folder), "free_mib": None, "problem": None}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts["free_mib"] = shutil.disk_usage(folder).free >> 20
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(LIBRARY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
    return facts


def cache_facts() -> dict[str, Any]:
    """`folder_facts` of the user's cache and of the folder for temporary files."""
    facts = {}
    for name, find in (("cache", lambda: compiled.user_cache() / "ddpm-fast"), ("temporary", _temporary)):
        try:
            facts[name] = folder_facts(find())
        except OSError as error:
            facts[name] = {"folder": None, "free_mib": None, "problem": error.strerror or str(error)}
    return facts


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def auto_facts(devices: list[str], compiler_problem: str | None) -> dict[str, dict[str, str]]:
    """For each device the operations that ops="auto" takes, and why. On a CPU the transforms are compiled to know."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in what is returned
        for name in devices:
            device = torch.device(name)
            if device.type == "cuda":
                obstacle = why_not_triton(device)
                ops = "triton" if obstacle is None else "reference"
                found[name] = {"ops": ops, "reason": obstacle or "fused kernels run on this GPU"}
                continue
            obstacle = compiler_problem or why_not_winograd(torch.float32)
            if obstacle is None:
                pays = f"for batches of {LONG_RUN / 1e12:g} TFLOP per thread and more, else cpu"
                found[name] = {"ops": "winograd", "reason": pays}
            else:
                found[name] = {"ops": "cpu", "reason": obstacle}
    return found


def findings(compiler: dict[str, str | None], folders: dict[str, Any], auto: dict[str, dict[str, str]]) -> list[str]:
    """The facts above in sentences: what does not work, and what is taken in its place."""
    said = []
    named, command, problem = compiler["named"], compiler["command"], compiler["problem"]
    if problem is not None:
        said.append(f"no C++ for winograd and for a faster normalisation of cpu: {problem}")
    elif named is not None and _is_missing(named):
        said.append(f"$CXX is {named}, which is not found; {command} compiles in its place")
    elif auto.get("cpu", {}).get("ops") != "cpu":  # else the reason is said below
        said.append(f"{command} compiles the transforms of ops=winograd, and the normalisation of ops=cpu")
    for what, variable in (("cache", "XDG_CACHE_HOME"), ("temporary", "TMPDIR")):
        facts = folders[what]
        if facts["problem"] is not None:
            free = "" if facts["free_mib"] is None else f", {facts['free_mib']} MiB free"
            said.append(
                f"the {what} folder {facts['folder']} cannot be written to ({facts['problem']}{free}): make room, or "
                f"name another by {variable}"
            )
    said += [f"on {device}, ops=auto takes {facts['ops']} ({facts['reason']})" for device, facts in auto.items()]
    return said


def _is_missing(named: str) -> bool:
    """Whether $CXX names a command that is not there, neither as a path nor on PATH."""
    words = shlex.split(named)
    return not words or shutil.which(words[0]) is None
