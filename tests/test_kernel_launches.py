"""How kernels are started: on their tensors' device, and not on sizes that their 32-bit arithmetic cannot hold."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.kernels import launch

pytest.importorskip("triton")


class Kernel:
    """Remembers each launch, and which device was current then."""

    def __init__(self) -> None:
        self.current = "cuda:0"
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.current, grid, args, kwargs))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Any:
        before, self.current = self.current, str(device)
        yield
        self.current = before


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    """Triton launches on the current device, whose number no argument tells it."""
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "device", kernel.device)
    launch.start(kernel, (3, 2), torch.device("cuda:1"), "x", num_warps=4)
    launch.start(kernel, (1,), torch.device("cpu"), N=7)
    assert kernel.launches == [("cuda:1", (3, 2), ("x",), {"num_warps": 4}), ("cuda:0", (1,), (), {"N": 7})]
    assert kernel.current == "cuda:0"


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = True) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def normalise() -> object:
    from ddpm_fast.kernels.norm_act import norm_act

    return norm_act(image(1, 160, 4096, 4096), None, None, 32, 1e-6)


def step() -> object:
    from ddpm_fast.kernels.sampler_step import initial_noise

    ids = torch.empty(1, dtype=torch.int64, device="meta")
    return initial_noise(image(1, 9, 16384, 16384, dtype=torch.float32, last=False), ids, ids)


def convolve(*shape: int, out_channels: int = 16) -> object:
    from ddpm_fast.kernels.conv import conv

    weight = torch.empty(out_channels, shape[1], 3, 3, dtype=torch.bfloat16, device="meta")
    return conv(image(*shape), weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (normalise, "values of one image in 32 bits; got an input or out (1, 160, 4096, 4096)"),
        (step, "values of one image in 32 bits; got x (1, 9, 16384, 16384)"),
        (lambda: convolve(1, 128, 4096, 4096), "values of one image in 32 bits; got 4096 x 4096 of 128 channels"),
        # 49 pixels lie in 64 columns where there are statistics: n * 49 fits, n * 64 does not.
        (lambda: convolve(2**25 + 2**23, 16, 7, 7), "32 bits; got 41943040 images of 7 x 7"),
        (
            lambda: convolve(2**20, 16, 2, 2, out_channels=2048),
            "32 bits; got 1048576 images of 2 x 2 and 2048 channels",
        ),
    ],
)
def test_sizes_beyond_32_bits_are_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
