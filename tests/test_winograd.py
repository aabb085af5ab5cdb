"""Winograd convolutions: the transforms in exact arithmetic, the compiled functions against float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from tensors import double, fresh, poison
from torch import Tensor

from ddpm_fast.house_rule import check, error
from ddpm_fast.kernels import onednn, reference
from ddpm_fast.kernels.norm_compiled import AFFINE, AFFINE_SILU, RAW
from ddpm_fast.kernels.winograd import (
    F2,
    F4,
    SCHEMES,
    UP,
    PartStats,
    Products,
    Scheme,
    Source,
    scheme_for,
    transformed_filter,
)
from ddpm_fast.ops import compiled
from ddpm_fast.ops import winograd_set as ops_winograd


def _compiler() -> str | None:
    try:
        return compiled.compiler()[0]
    except RuntimeError:
        return None


pytestmark = pytest.mark.skipif(_compiler() is None, reason="NO C++ COMPILER: Winograd's transforms are NOT TESTED")

DTYPES = [torch.float32, torch.bfloat16]
ALL = [F2, F4, UP]


def exact(matrix: tuple[tuple[float, ...], ...]) -> list[list[Fraction]]:
    rows = [[Fraction(v).limit_denominator(24) for v in row] for row in matrix]
    assert all(float(f) == v for fs, vs in zip(rows, matrix) for f, v in zip(fs, vs)), "no rounded neighbour of it"
    return rows


def applied(matrix: list[list[Fraction]], x: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, x)), Fraction(0)) for row in matrix]


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_the_transforms_are_convolutions_in_exact_arithmetic(scheme: Scheme):
    """Both sides are bilinear in pixels and taps, so equality on all pairs of unit vectors is equality."""
    g, b, a = exact(scheme.filter), exact(scheme.input), exact(scheme.output)
    patch = len(b[0])
    for i in range(patch):
        for j in range(3):
            d, w = ([Fraction(int(at == k)) for k in range(size)] for at, size in ((i, patch), (j, 3)))
            got = applied(a, [p * q for p, q in zip(applied(g, w), applied(b, d))])
            if scheme is UP:  # outputs 2i and 2i + 1 of the doubled line, of which pixel i is the patch's middle
                doubled = [v for v in d for _ in range(2)]
                wanted = [sum(w[t] * doubled[2 + o + t - 1] for t in range(3)) for o in range(2)]
            else:
                wanted = [sum(w[t] * d[o + t] for t in range(3)) for o in range(scheme.out)]
            assert got == wanted


def matrices(scheme: Scheme) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(m, dtype=torch.float64) for m in (scheme.input, scheme.output))  # type: ignore[return-value]


def patches(x: Tensor, scheme: Scheme) -> Tensor:
    """[N, C, H, W] -> float64 [N, C, th, tw, P, P]: transformed, by the matrices."""
    b, _ = matrices(scheme)
    size = b.shape[1]
    th, tw = scheme.tiles(1, *x.shape[2:])[1:]
    high, wide = (th - 1) * scheme.step + size, (tw - 1) * scheme.step + size
    padded = F.pad(x.double(), (1, wide - 1 - x.shape[3], 1, high - 1 - x.shape[2]))
    cut = padded.unfold(2, size, scheme.step).unfold(3, size, scheme.step)
    return torch.einsum("ia,nctuab,jb->nctuij", b, cut, b)


def source(dtype: torch.dtype, c1: int, c2: int, h: int, w: int, act: int, n: int = 2) -> tuple[Source, Tensor]:
    """A map to read, and in float64 what is to be read."""
    x, skip = fresh((n, c1, h, w), dtype, seed=1), fresh((n, c2, h, w), dtype, seed=2) if c2 else None
    scale, shift = fresh((n, c1 + c2), torch.float32, seed=3), fresh((n, c1 + c2), torch.float32, seed=4)
    whole = reference._join(x, skip).double()
    if act == RAW:
        return Source(x, skip), whole
    y = whole * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    return Source(x, skip, scale, shift, act), F.silu(y) if act == AFFINE_SILU else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("c1", "c2", "h", "w", "act"),
    [
        (16, 0, 8, 8, RAW),
        (20, 0, 7, 5, AFFINE_SILU),
        (12, 25, 5, 9, AFFINE),
        (3, 0, 1, 2, RAW),
        (32, 16, 6, 6, AFFINE_SILU),
    ],
)
def test_the_input_transform(scheme: Scheme, dtype: torch.dtype, c1: int, c2: int, h: int, w: int, act: int):
    """Sides that tiles do not divide, channels that vectors do not, a concatenation that straddles a vector."""
    s, whole = source(dtype, c1, c2, h, w, act)
    n, cp = 2, -(-(c1 + c2) // 16) * 16
    t = scheme.tiles(n, h, w)
    v = poison((t[0] * t[1] * t[2], scheme.positions, cp), dtype)
    ops_winograd.kernels(dtype).input_transform(scheme, s, v)
    truth = patches(whole, scheme).permute(0, 2, 3, 4, 5, 1).reshape(len(v), scheme.positions, -1)
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    # Of sums of up to 36 products with factors up to 25, in float32, then rounded.
    bound = unit * truth.abs() + 60 * 2.0**-24 * max(1.0, float(whole.abs().max())) * (25 if scheme is F4 else 4)
    assert ((v[:, :, : c1 + c2].double() - truth).abs() <= bound).all()
    assert (v[:, :, c1 + c2 :] == 0).all()


def whole_conv(
    s: Source, products: Products, k: int, rows: int, with_stats: bool = False, **epilogue
) -> tuple[Tensor, PartStats | None]:
    """Of ``rows`` rows of tiles at once."""
    run, scheme = ops_winograd.kernels(s.x.dtype), products.scheme
    n, _, h, w = s.x.shape
    n, down, across = scheme.tiles(n, h, w)
    up = scheme.out // scheme.step
    y = poison((n, k, up * h, up * w), s.x.dtype, memory_format=torch.channels_last)
    stats = run.stats_of(scheme, y) if with_stats else None
    for begin in range(0, n * down, rows):
        v = poison((min(rows, n * down - begin) * across, scheme.positions, products.cp), s.x.dtype)
        run.input_transform(scheme, s, v, begin)
        run.output_transform(scheme, products(v), y, **epilogue, stats=stats, begin=begin)
    return y, stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize(("n", "c1", "c2", "h", "w", "k"), [(2, 20, 0, 7, 10, 40), (1, 48, 16, 8, 8, 32)])
def test_a_convolution_with_all_that_surrounds_it(scheme: Scheme, dtype: torch.dtype, n, c1, c2, h, w, k):
    c = c1 + c2
    s, whole = source(dtype, c1, c2, h, w, AFFINE_SILU, n)
    weight = fresh((k, c, 3, 3), torch.float32, seed=5, std=(1 / (9 * c)) ** 0.5)
    up = 2 if scheme is UP else 1
    bias, time = fresh((k,), torch.float32, seed=6), fresh((n, k), torch.float32, seed=7)
    residual = fresh((n, k, up * h, up * w), dtype, seed=8)
    products, around = Products(weight, scheme, dtype), {"bias": bias, "time": time, "residual": residual, "scale": 0.7}
    y, stats = whole_conv(s, products, k, 100, True, **around)
    in_parts, _ = whole_conv(s, products, k, 3, **around)  # which end within an image
    assert torch.allclose(in_parts.float(), y.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    del around["bias"]
    definition = reference.upsample_conv if scheme is UP else reference.conv
    truth = definition(whole, weight.double(), bias.double(), **{k: double(v) for k, v in around.items()})
    if dtype == torch.bfloat16 and scheme is not F4:  # F(4x4) is not used in bfloat16
        check(y, definition(whole.to(dtype), weight.to(dtype), bias.to(dtype), **around), truth)
    else:
        bound = {F2: 2e-6, UP: 2e-6, F4: 2e-5}[scheme] if dtype == torch.float32 else 0.1
        assert error(y, truth).largest <= bound
    values, rows = stats
    mean, m2 = merged(values, rows, up * h, up * w)
    wide = y.double().flatten(2)
    unit = 3e-7 if dtype == torch.float32 else 2e-3  # the statistics are of what has not been rounded yet
    assert ((mean - wide.mean(2)).abs() <= unit * wide.abs().mean(2) + 1e-12).all()
    assert ((m2 - wide.var(2, correction=0) * wide.shape[2]).abs() <= 10 * unit * m2).all()


def merged(values: Tensor, rows: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """[N, parts, 2, C] -> mean and centred sum of squares [N, C], in float64."""
    counts = torch.tensor([min(rows, h - start) * w for start in range(0, h, rows)]).double()[None, :, None]
    means, squares = values.double().unbind(2)
    assert means.shape[1] == counts.shape[1]
    mean = (means * counts).sum(1) / (h * w)
    return mean, (squares + counts * (means - mean[:, None]).square()).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_do_not_lose_what_a_large_mean_hides(dtype: torch.dtype):
    x = fresh((2, 20, 9, 7), dtype, seed=1, mean=100.0)
    mean, m2 = merged(*ops_winograd.kernels(dtype).statistics(x), 9, 7)
    wide = x.double().flatten(2)
    assert torch.allclose(mean, wide.mean(2), rtol=2e-7)
    assert torch.allclose(m2, wide.var(2, correction=0) * 63, rtol=1e-5)


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_filters_are_rounded_once(scheme: Scheme):
    weight = fresh((16, 16, 3, 3), torch.float32, seed=1)
    g = torch.tensor(scheme.filter, dtype=torch.float64)
    truth = torch.einsum("ia,kcab,jb->ijkc", g, weight.double(), g).reshape(-1, 16, 16)
    assert torch.allclose(transformed_filter(weight, scheme), truth, rtol=1e-14, atol=1e-15)
    for dtype in DTYPES:
        assert torch.equal(Products(weight, scheme, dtype).plain(), transformed_filter(weight, scheme).to(dtype))


def test_products_are_those_of_bmm_for_any_number_of_patches_and_without_onednn(monkeypatch: pytest.MonkeyPatch):
    weight = fresh((24, 20, 3, 3), torch.float32, seed=1)
    products = Products(weight, F2, torch.float32)
    filters = transformed_filter(weight, F2)
    monkeypatch.setattr(onednn, "computes", lambda dtype: False)
    plain = Products(weight, F2, torch.float32)
    for tiles in (5, 1, 64, 5):
        v = torch.zeros(tiles, 16, 32)
        v[:, :, :20] = fresh((tiles, 16, 20), torch.float32, seed=tiles)
        truth = torch.einsum("tpc,pkc->tpk", v[:, :, :20].double(), filters)
        for form in (products, plain):
            got = form(v)
            assert got.is_contiguous() and (got[:, :, 24:] == 0).all()
            assert torch.allclose(got[:, :, :24].double(), truth, rtol=1e-5, atol=1e-5)


def test_what_is_chosen_by_shape():
    """Fewest multiplications where patches are many; reading 36 positions' weights for four patches is not worth it."""
    wide = [(128, 32), (256, 16), (256, 8)]
    assert {scheme_for(torch.float32, 4, c, h, h, c) for c, h in wide} == {F4}
    assert {scheme_for(torch.bfloat16, 4, c, h, h, c) for c, h in wide} == {F2}
    assert scheme_for(torch.float32, 1, 256, 8, 8, 256) is F2
    assert scheme_for(torch.float32, 1, 256, 4, 4, 256) is scheme_for(torch.bfloat16, 1, 256, 4, 4, 256) is None
    assert F4 not in SCHEMES[torch.bfloat16], "which would round ten times as much"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype):
    s, _ = source(dtype, 20, 12, 9, 11, AFFINE_SILU, n=3)
    run = ops_winograd.kernels(dtype)
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            v = poison((3 * 3 * 3, 36, 32), dtype)
            run.input_transform(F4, s, v)
            m = fresh((27, 36, 32), dtype, seed=2)
            y = poison((3, 24, 9, 11), dtype, memory_format=torch.channels_last)
            stats = run.stats_of(F4, y)
            run.output_transform(F4, m, y, stats=stats)
            seen.append((v, y, stats.values, run.statistics(s.x).values, run.norm_apply(s)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))
    assert not seen[0][0].isnan().any()


def test_silu_of_any_value():
    """Where e^-x leaves float32 too: torch's own to a few units in the last place."""
    few = torch.tensor([-3e4, -88.5, -87.2, 0.0, 88.5, 3e4, 1e30])
    sizes = torch.cat((torch.linspace(-120, 120, 1000), few))
    x = sizes.view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(1, x.shape[1]), torch.zeros(1, x.shape[1])
    got = ops_winograd.kernels(torch.float32).norm_apply(Source(x, None, one, zero, AFFINE_SILU))
    truth = F.silu(x.double())
    assert ((got.double() - truth).abs() <= 5 * 2.0**-24 * truth.abs() + 1e-33).all()


def test_bfloat16_is_rounded_to_nearest_even():
    """Half units in the last place added to odd and even values, and infinity."""
    x = torch.tensor([1.0, 1 + 2.0**-7, -1.0, -1 - 2.0**-7, 3.0, 2.0**100, float("inf"), 1e-30]).bfloat16()
    shift = torch.tensor([2.0**-8, 2.0**-8, -(2.0**-8), -(2.0**-8), 2.0**-8 * 1.01, 0.0, 0.0, 0.0])
    source = Source(x.view(1, 8, 1, 1), None, torch.ones(1, 8), shift[None], AFFINE)
    got = ops_winograd.kernels(torch.bfloat16).norm_apply(source)
    assert torch.equal(got.flatten(), (x.float() + shift).bfloat16())
