"""A norm_act and its convolution cut into images or rows: the cuts cover the whole once, and change no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import fresh, poison
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels.reference import Shortcut
from ddpm_fast.ops.buffers import Fresh
from ddpm_fast.ops.parts import ALL, cut

SAME: dict[str, Any] = {"stride": 1, "padding": None}
BF16, F32 = torch.bfloat16, torch.float32


@given(n=st.integers(2, 40), parts=st.integers(2, 8))
def test_images_are_cut_into_at_most_so_many_parts(n: int, parts: int):
    cuts = cut("conv", (n, 32, 8, 8), 3, SAME, parts)
    assert [i for p in cuts for i in range(n)[p.images]] == list(range(n))
    assert len(cuts) <= parts and max(p.images.stop - p.images.start for p in cuts) == -(-n // parts)
    assert all(p.read == p.written == ALL and p.padding is None for p in cuts)


@given(height=st.sampled_from([4, 8, 16, 24, 32, 64, 100, 256]), width=st.sampled_from([4, 8, 12, 16, 20, 32, 48, 256]))
def test_rows_are_cut_with_what_lies_around_them(height: int, width: int):
    """Each row written once; read are those within one row of it, and zeros where the image ends."""
    cuts = cut("conv", (1, 32, height, width), 3, SAME, 3)
    assert [r for p in cuts for r in range(height)[p.written]] == (list(range(height)) if cuts else [])
    assert len(cuts) != 1 and len(cuts) <= 3
    for p in cuts:
        around = {r + d for r in range(height)[p.written] for d in (-1, 0, 1)}
        assert set(range(height)[p.read]) == around & set(range(height))
        assert p.padding == ((-1 in around), (height in around), 1, 1)
        assert (p.written.stop - p.written.start) * width % 128 == 0, "whole tiles"


def test_what_cannot_be_cut_by_rows():
    image = (1, 32, 32, 32)
    assert len(cut("conv", image, 3, SAME, 2)) == 2
    assert len(cut("conv", image, 3, {"stride": 1, "padding": (1, 1)}, 2)) == 2
    for operation, taps, changes in (
        ("upsample_conv", 3, {}),
        ("conv", 1, {}),
        ("conv", 3, {"stride": 2}),
        ("conv", 3, {"padding": (0, 1)}),
    ):
        assert cut(operation, image, taps, {**SAME, **changes}, 2) == []
    assert cut("conv", (1, 32, 8, 16), 3, SAME, 2) == [], "one tile"
    # A whole image's statistics have parts of 128 pixels, those of half of it would have 64.
    assert cut("conv", (1, 32, 128, 128), 3, SAME, 2) == []


class Parts(Fresh):
    """Every norm_act in two parts; counts the maps."""

    def __init__(self) -> None:
        self.maps: list[tuple[int, ...]] = []

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.maps.append(shape)
        return poison(shape, dtype, device, torch.channels_last)

    def parts(self, shape: tuple[int, ...]) -> int:
        return 2


def pair(memory: Fresh, dtype: torch.dtype, device: torch.device, n: int, measured: bool) -> tuple[Tensor, Tensor]:
    """(pixels, statistics) of a block's second half, whose normalisation reads a concatenation."""
    pytest.importorskip("triton", reason="the fused operations need Triton")
    o = ops.triton().placed(memory)
    x, skip, residual = (
        o.enter(fresh((n, c, 16, 16), dtype, device, seed=i).contiguous(memory_format=torch.channels_last))
        for i, c in enumerate((32, 16, 16))
    )
    w = [fresh((32, 32, 1, 1), dtype, device, seed=3, std=0.2), fresh((16, 16, 1, 1), dtype, device, seed=4, std=0.2)]
    w += [fresh((16, 48, 3, 3), dtype, device, seed=5, std=0.05), fresh((16, 48, 1, 1), dtype, device, seed=6, std=0.1)]
    x, skip = (o.conv(t, v, with_stats=measured) for t, v in zip((x, skip), w))
    gain, shift = fresh((48,), F32, device, seed=7), fresh((48,), F32, device, seed=8)
    h = o.norm_act(x, gain, shift, 6, 1e-6, skip=skip)
    rows, row = fresh((3, 16), F32, device, seed=9), torch.tensor([1], dtype=torch.int32, device=device)
    around = Shortcut(x, skip, w[3], shift[:16])
    y = o.conv(h, w[2], gain[:16], time=rows, row=row, residual=residual, shortcut=around, scale=0.7, with_stats=True)
    return y.data, y.stats


@pytest.mark.parametrize(("dtype", "n"), [(BF16, 1), (F32, 1), (BF16, 2)])
def test_a_cut_changes_no_bit(dtype: torch.dtype, n: int, device: torch.device):
    whole, parts = pair(Fresh(), dtype, device, n, True), pair(memory := Parts(), dtype, device, n, True)
    assert whole[0].isfinite().all() and whole[1].isfinite().all()
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    buffer = (1, 48, 9, 16) if n == 1 else (1, 48, 16, 16)
    assert memory.maps[-1] == buffer and memory.maps.count((1, 48, 16, 16)) == n - 1


def test_without_statistics_an_image_is_normalised_whole(device: torch.device):
    whole, parts = pair(Fresh(), BF16, device, 1, False), pair(memory := Parts(), BF16, device, 1, False)
    assert torch.equal(whole[0], parts[0]) and (1, 48, 16, 16) in memory.maps
