"""OpenAI's and lucidrains' rules of which timesteps a shorter chain visits."""

from __future__ import annotations

import torch


def sections(rule: str, total: int) -> list[int]:
    """OpenAI's respacing rule: timesteps of a chain of ``total``, descending.

    "10,15,20" cuts the chain into three sections of (nearly) one length and takes so many steps of each, first
    and last included, evenly spaced, rounded half to even; "250" is one section. "ddimN" takes every k-th
    timestep for the whole k that gives N of them. Improved and guided-diffusion's ``timestep_respacing``.
    """
    if rule.startswith("ddim"):
        wanted = _count(rule, rule[len("ddim") :])
        strides = [k for k in range(1, total) if len(range(0, total, k)) == wanted]
        if not strides:
            raise ValueError(f"steps={rule!r}: no whole stride takes {wanted} of {total} timesteps; choose another")
        return list(range(0, total, strides[0]))[::-1]
    counts = [_count(rule, part) for part in rule.split(",")]
    chain: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"steps={rule!r}: section {i} has {size} timesteps, fewer than {count}; ask for fewer")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0  # added up, not multiplied: upstream's rounding depends on it
        for _ in range(count):
            chain.append(start + round(place))
            place += stride
        start += size
    return chain[::-1]


def truncated(count: int, total: int) -> list[int]:
    """lucidrains' rule: of an even spacing from -1 to the last timestep, ``count`` after the -1 without their
    fractions, descending. In float32 on the CPU, as there, where a whole number may fall short of itself."""
    return torch.linspace(-1, total - 1, count + 1, dtype=torch.float32, device="cpu").int().tolist()[:0:-1]


def _count(rule: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f'steps as text must be like "250", "10,15,20" or "ddim50"; got {rule!r}')
    return int(text)
