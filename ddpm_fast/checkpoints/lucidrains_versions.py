"""What versions of denoising-diffusion-pytorch differ in, and which of them a layout of tensors may be of.

Versions went from 0.32 back to 0.1.0, in November 2022, and on to 1.0.0: 0.22 to 0.32 are older than 0.1.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .files import CheckpointError

PACKAGE = "denoising-diffusion-pytorch"


class Version(NamedTuple):
    """Ordered by time: era 0 is before the numbers started anew."""

    era: int
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


_VERSION = re.compile(rf"(?:{PACKAGE}[-=@ ]*)?v?(\d{{1,3}})\.(\d{{1,3}})(?:\.(\d{{1,3}}))?")


def is_version(text: str) -> bool:
    return _VERSION.fullmatch(text.strip()) is not None


def version(text: str) -> Version:
    """Of "1.7.1", with the package's name or a v before it at will. CheckpointError for anything else."""
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise CheckpointError(
            f"a preset for a lucidrains checkpoint is the version of {PACKAGE} that trained it, like 1.7.1; "
            f"got {text!r}"
        )
    major, minor, patch = (int(part or 0) for part in match.groups())
    return Version(0 if major == 0 and minor >= 2 else 1, major, minor, patch)


FIRST = Version(0, 0, 22, 0)  # two skips a level
UNSHUFFLED = Version(0, 0, 32, 0)
RMS = Version(1, 1, 7, 1)
PLAIN_CONV = Version(1, 1, 7, 3)
PLAIN_VALUES = Version(1, 1, 7, 4)
FLAT = Version(1, 1, 8, 0)  # attention's names without .fn.fn.
MEMORY = Version(1, 1, 9, 0)
RMS_BLOCKS = Version(1, 2, 0, 0)
LAST = Version(9, 0, 0, 0)

# The spans of one arithmetic among those whose tensors look alike, for messages.
SPANS = {
    "unshuffle": "0.32.0 and 0.1.0 to 1.7.0; 1.7.1 and 1.7.2; 1.7.3; 1.7.4 and later",
    "conv": "0.22.0 to 0.25; 0.26.0 to 0.26.3; 0.26.4 to 0.27.3; 0.27.4 and later; 0.28.0 to 0.31",
}


def arithmetic(v: Version) -> dict[str, Any]:
    """The fields of LucidrainsConfig that tensors do not show."""
    cosine = None
    if Version(0, 0, 26, 0) <= v < Version(0, 0, 28, 0):
        cosine = 16.0 if v < Version(0, 0, 27, 4) else 10.0
    standardised = None
    if Version(0, 0, 27, 4) <= v < PLAIN_CONV:
        standardised = "added" if v < RMS else "clamped"
    return {
        "channel_norm": "layer" if v < RMS else "rms",
        "standardised": standardised,
        "values_over_pixels": Version(0, 0, 26, 4) <= v < PLAIN_VALUES,
        "cosine_scale": cosine,
    }


def defaults(v: Version) -> dict[str, Any]:
    """GaussianDiffusion's default arguments, as far as sampling needs them."""
    return {
        "timesteps": 1000,
        "beta_schedule": "cosine" if v < Version(1, 1, 0, 1) else "sigmoid",
        "objective": "pred_noise" if v < Version(1, 1, 6, 3) else "pred_v",
    }
