"""What GPUs can do at most, from their makers' datasheets: the roofs that `plan` prices launches against.

Dense rates of the matrix units with float32 accumulation; where a datasheet prints the rate with 2:4 sparsity,
half of it. Real kernels stay below these; `ddpm-fast` measures nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU's roofs."""

    name: str
    arch: int  # 90 for sm_90
    half_flops_per_s: float  # bfloat16 and float16 in, float32 accumulation, dense
    float_flops_per_s: float  # float32 outside the matrix units
    bytes_per_s: float  # device memory
    memory_bytes: int
    source: str

    def flops_per_s(self, itemsize: int) -> float:
        return self.half_flops_per_s if itemsize == 2 else self.float_flops_per_s


_GB = 10**9

# name, arch, 2-byte and float32 FLOP/s, bytes/s, memory, source
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100 80GB SXM", 80, 312e12, 19.5e12, 2.039e12, 80 * _GB, "NVIDIA A100 Tensor Core GPU datasheet"),
    "h100": Gpu("H100 SXM", 90, 1979e12 / 2, 67e12, 3.35e12, 80 * _GB, "NVIDIA H100 Tensor Core GPU datasheet"),
    "h200": Gpu("H200 SXM", 90, 1979e12 / 2, 67e12, 4.8e12, 141 * _GB, "NVIDIA H200 Tensor Core GPU datasheet"),
    "b200": Gpu("HGX B200", 100, 4.5e15 / 2, 80e12, 8.0e12, 180 * _GB, "NVIDIA Blackwell architecture brief, HGX B200"),
    "l4": Gpu("L4", 89, 242e12 / 2, 30.3e12, 300e9, 24 * _GB, "NVIDIA L4 Tensor Core GPU datasheet"),
    "rtx4090": Gpu("GeForce RTX 4090", 89, 165.2e12, 82.6e12, 1.008e12, 24 * _GB, "NVIDIA Ada GPU whitepaper, app. A"),
    "rtx5090": Gpu("GeForce RTX 5090", 120, 209.5e12, 104.8e12, 1.792e12, 32 * _GB, "NVIDIA RTX Blackwell whitepaper"),
}


def gpu(name: str) -> Gpu:
    """By a name such as "h100" or "RTX 4090"; ValueError names the ones there are."""
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in GPUS:
        raise ValueError(f"no GPU is called {name!r} here; there are: {', '.join(GPUS)}")
    return GPUS[key]
