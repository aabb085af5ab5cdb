"""Philox4x32-10 and its normals: published vectors, the torch twin, float64, and statistics."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from tensors import box_muller64, normal64, poison
from torch import Tensor

from ddpm_fast.kernels import launch, philox

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# Random123's kat_vectors, philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# z is the square root of a log, times a sine, each within 1 to 2 ulp.
ULP = 4.0


@triton.jit
def _words_kernel(key_ptr, counter_ptr, out_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k0, k1 = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
    c0, c1 = tl.load(counter_ptr + 4 * i).to(tl.uint32), tl.load(counter_ptr + 4 * i + 1).to(tl.uint32)
    c2, c3 = tl.load(counter_ptr + 4 * i + 2).to(tl.uint32), tl.load(counter_ptr + 4 * i + 3).to(tl.uint32)
    w0, w1, w2, w3 = WORDS(k0, k1, c0, c1, c2, c3)
    tl.store(out_ptr + 4 * i, w0.to(tl.int64))
    tl.store(out_ptr + 4 * i + 1, w1.to(tl.int64))
    tl.store(out_ptr + 4 * i + 2, w2.to(tl.int64))
    tl.store(out_ptr + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def _pair_kernel(words_ptr, out_ptr, BOX_MULLER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    z0, z1 = BOX_MULLER(tl.load(words_ptr + 2 * i).to(tl.uint32), tl.load(words_ptr + 2 * i + 1).to(tl.uint32))
    tl.store(out_ptr + 2 * i, z0)
    tl.store(out_ptr + 2 * i + 1, z1)


@triton.jit(do_not_specialize=["step"])  # step 1 would be a plain int, without .to
def _normal_kernel(
    seed_ptr, ids_ptr, out_ptr, step, SPLIT: tl.constexpr, NORMAL: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k0, k1 = SPLIT(tl.load(seed_ptr))
    id0, id1 = SPLIT(tl.load(ids_ptr + n))
    out_ptr += n * tl.num_programs(1) * BLOCK * (1 if AT else 4)
    if AT:
        tl.store(out_ptr + i, NORMAL(k0, k1, i.to(tl.uint32), step.to(tl.uint32), id0, id1))
    else:
        z0, z1, z2, z3 = NORMAL(k0, k1, i.to(tl.uint32), step.to(tl.uint32), id0, id1)
        tl.store(out_ptr + 4 * i, z0)
        tl.store(out_ptr + 4 * i + 1, z1)
        tl.store(out_ptr + 4 * i + 2, z2)
        tl.store(out_ptr + 4 * i + 3, z3)


def device_words(module: ModuleType, key: Tensor, counters: Tensor) -> Tensor:
    """Words [B, 4] of counters [B, 4] under key [2]; all int64, B a power of two."""
    out = torch.full_like(counters, -1)
    launch.start(_words_kernel, (1,), out.device, key, counters, out, WORDS=module.words, BLOCK=len(counters))
    return out


def device_normal(module: ModuleType, seed: Tensor, ids: Tensor, step: int, count: int, at: bool = False) -> Tensor:
    """[N, count] normals on the device; count is a power of two, at least 4."""
    out = poison((len(ids), count), torch.float32, ids.device)
    items = count if at else count // 4
    block = min(items, 4096)
    normal = module.normal_at if at else module.normal4
    grid = (len(ids), items // block)
    launch.start(
        _normal_kernel, grid, ids.device,
        seed, ids, out, torch.tensor(step & 0xFFFFFFFF).to(torch.int32).item(), module.split64, normal, at, block
    )  # fmt: skip
    return out


def ulps(ours: Tensor, truth: Tensor) -> Tensor:
    """Distance in units of the truth's last place in float32."""
    exponent = torch.frexp(truth.abs().clamp_min(2.0**-120)).exponent - 24
    return (ours.double().cpu() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent)


def check_words(module: ModuleType, device: torch.device) -> None:
    """Published vectors, and the torch twin on random counters and keys, bit for bit."""
    for counter, key, want in KNOWN:
        got = device_words(module, torch.tensor(key, device=device), torch.tensor([counter], device=device))
        assert got[0].tolist() == list(want), [hex(w) for w in got[0].tolist()]
    g = torch.Generator().manual_seed(11)
    counters = torch.randint(0, 2**32, (256, 4), generator=g)
    key = torch.randint(0, 2**32, (2,), generator=g)
    want = torch.stack(philox.philox_words((key[0], key[1]), tuple(counters.unbind(1))), dim=1)
    assert torch.equal(device_words(module, key.to(device), counters.to(device)).cpu(), want)


def check_normals(module: ModuleType, device: torch.device) -> None:
    """Within a few ulp of float64, at the ends and quarter turns too; the same, element by element."""
    edges = [0, 1, 2, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x40000000, 0x40000100, 0x7FFFFFFF, 0x80000000]
    edges += [0xBFFFFFFF, 0xC0000000, 0xDFFFFFFF, 0xE0000000, 0xFFFFFF7F, 0xFFFFFFFF]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    out = poison(tuple(pairs.shape), torch.float32, device)
    launch.start(_pair_kernel, (1,), device, pairs.to(device), out, BOX_MULLER=module.box_muller, BLOCK=len(pairs))
    truth = torch.stack(box_muller64(pairs[:, 0], pairs[:, 1]), dim=1)
    # At quarter turns float64's own sine and cosine of 2 pi u are off by 1e-16, where ours are exactly zero.
    far = (out.double().cpu() - truth).abs() > 1e-14
    assert float((ulps(out, truth) * far).max()) <= ULP

    seed, ids = torch.tensor([-(2**62) + 12345], device=device), torch.tensor([7, 2**40 + 3], device=device)
    z = device_normal(module, seed, ids, 999, 8192)
    assert float(ulps(z, normal64(seed, ids, 999, (8192,))).max()) <= ULP
    assert torch.equal(z[:, :256], device_normal(module, seed, ids, 999, 256, at=True))


def test_words(device):
    check_words(philox, device)


def test_twin_gives_the_published_words():
    for counter, key, want in KNOWN:
        c, k = (tuple(torch.tensor([w]) for w in v) for v in (counter, key))
        assert [int(w) for w in philox.philox_words(k, c)] == list(want)


def test_normals(device):
    check_normals(philox, device)


def test_twin_agrees(device):
    """The twin rounds the angle (2.4e-7) and 2 pi itself (1.8e-7): that times the radius is all they differ by."""
    seed, ids, step = torch.tensor([3], device=device), torch.arange(4, device=device), torch.tensor([17])
    z = device_normal(philox, seed, ids, 17, 4096)
    twin = philox.philox_normal(seed, ids, step.to(device), (4096,))
    radius = z.unflatten(1, (-1, 2)).norm(dim=2).repeat_interleave(2, dim=1)
    assert float(((z - twin).abs() / radius).max()) <= 4.2e-7 + ULP * 2.0**-24


@pytest.mark.parametrize(
    "seed, sample, step", [(0, 0, 0), (1, 2**32, 999), (-1, -1, philox.INITIAL_STEP), (2**33, 5, 500)]
)
def test_distribution(device, seed, sample, step):
    """Moments, tails and the Kolmogorov distance of 2^16 normals, each within four of its standard errors."""
    n = 2**16
    z = device_normal(philox, torch.tensor([seed], device=device), torch.tensor([sample], device=device), step, n)
    z = z[0].double().cpu()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - mean) < 4 * math.sqrt(variance / n), power
    for bound in (1.0, 2.0, 3.0, 3.5):
        p = math.erfc(bound / math.sqrt(2))
        assert abs(float((z.abs() > bound).double().mean()) - p) < 4 * math.sqrt(p / n), bound
    cdf = 0.5 * torch.erfc(-z.sort().values / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand


def test_independence(device):
    """Streams that differ in one bit of step, id, or seed, and the elements of a block, are uncorrelated."""
    n = 2**14

    def draw(seed: int, sample: int, step: int) -> Tensor:
        seeds, ids = torch.tensor([seed], device=device), torch.tensor([sample], device=device)
        return device_normal(philox, seeds, ids, step, n)[0].double().cpu()

    base = draw(0, 0, 0)
    others = [draw(0, 0, 1), draw(0, 1, 0), draw(1, 0, 0), draw(2**32, 0, 0), draw(0, 2**32, 0), draw(0, 0, 2**31)]
    others += [base.roll(k) for k in (1, 2, 3, 4)]
    for k, other in enumerate(others):
        for a, b in ((base, other), (base.square() - 1, other.square() - 1), (base.abs() - 0.8, other)):
            correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
            assert abs(correlation) < 4.5 / math.sqrt(n), (k, correlation)


def test_avalanche():
    """Flipping any one bit of key or counter flips half of the 128 output bits."""
    g = torch.Generator().manual_seed(5)
    state = torch.randint(0, 2**32, (64, 6), generator=g)

    def run(s: Tensor) -> Tensor:
        return torch.stack(philox.philox_words((s[:, 0], s[:, 1]), (s[:, 2], s[:, 3], s[:, 4], s[:, 5])), dim=1)

    base = run(state)
    for word in range(6):
        for bit in range(0, 32, 5):
            flipped = state.clone()
            flipped[:, word] ^= 1 << bit
            different = run(flipped) ^ base
            bits = sum(int((different >> k & 1).sum()) for k in range(32)) / 64
            assert abs(bits - 64) < 4.5 * math.sqrt(32 / 64), (word, bit, bits)
