"""What each operation costs: FLOPs, bytes and launches, as pure functions of shapes and dtype.

The rules, the same for every operation:

- FLOPs are matrix products only, two for a multiply-add, over the channels that exist (padding is not
  work). It is what torch.utils.flop_counter counts; elementwise arithmetic is priced by its bytes.
- Bytes are the traffic to memory that no implementation of the operation can avoid: every input is read
  once, every output written once, every weight read once. Nothing is assumed to stay in a cache
  between two launches. Feature maps and weights are in ``dtype``; vectors a channel (norm weights, biases,
  time rows) and statistics are float32; a step's own x is float32.
- A launch is one kernel.

Each function has two forms. "fused" is the operation as the kernels run it. "plain" is what it stands for
in eager torch: each of concatenation, normalisation, activation, convolution, addition a launch that
reads its inputs and writes its outputs. A convolution's bias is an addition: cuDNN's takes none, and torch adds
it in a launch of its own (aten/src/ATen/native/Convolution.cpp). The sum around a block is divided by its output
scale, as diffusers' UNet2DModel does where that is 1 too. FLOPs differ between the forms in one place only,
`upsample_conv`.
Shapes are [N, C, H, W]. An unknown form raises ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .reference import sides

VECTOR_BYTES = 4  # float32: biases, norm weights, time rows, statistics, x_t
CHANNEL_PAD = 16  # the low-precision copy of x that conv_in reads has its channels padded to a multiple of this
MAX_PARTS = 64  # statistics of more parts are merged, MERGE_RUN to one, before a norm_act reads them
MERGE_RUN = 32
TABLE_ROW_BYTES = 12 * 4  # one row of a step table, reference.TABLE_WIDTH float32 values
FORMS = ("fused", "plain")


@dataclass(frozen=True)
class Cost:
    """FLOPs (2 x MAC), bytes read from and written to memory, and kernel launches. Costs add."""

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.launches + other.launches,
        )

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time at two roofs: the larger of compute and traffic, for they overlap within a launch."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def total(costs: Sequence[Cost]) -> Cost:
    """The sum of costs; of none, nothing."""
    return sum(costs, Cost())


def norm_act(
    x: Sequence[int],  # [N, C1, H, W]
    dtype: torch.dtype,
    *,
    skip_channels: int = 0,  # C2 of the virtual concatenation; C = C1 + C2
    affine: bool = True,
    act: bool = True,
    bias_rows: int = 0,  # rows read of bias_row: 1 from a table, N without; 0: none
    shift_rows: int = 0,  # rows read of scale_shift
    residual: bool = False,
    parts: int = 0,  # P of the statistics of x taken from its producer; 0: computed here
    skip_parts: int = 0,
    form: str = "fused",
) -> Cost:
    """Fused: [x, skip] in, the result out, in one launch; statistics are 12 bytes a channel and part. Where
    there are more than MAX_PARTS of them, launches before it merge them.

    Plain: concatenation, row addition, normalisation, scale and shift (two), activation, residual.
    """
    n, c1, h, w = x
    channels, pixels, size = c1 + skip_channels, n * h * w, dtype.itemsize
    image = pixels * channels * size
    vectors = VECTOR_BYTES * channels * (2 * affine + bias_rows + 2 * shift_rows)
    if _is_fused(form):
        merging, parts = _merge(n, c1, parts)
        skip_merging, skip_parts = _merge(n, skip_channels, skip_parts)
        statistics = VECTOR_BYTES * 3 * n * (parts * c1 + skip_parts * skip_channels)
        return Cost(0, image * (1 + residual) + vectors + statistics, image, 1) + merging + skip_merging
    unary = (skip_channels > 0) + (bias_rows > 0) + 1 + 2 * (shift_rows > 0) + act
    return Cost(0, image * (unary + 2 * residual) + vectors, image * (unary + residual), unary + residual)


def channel_stats(x: Sequence[int], dtype: torch.dtype, parts: int) -> Cost:
    """Statistics [N, P, 3, C] of x in a launch of their own: what norm_act needs first of a large image whose
    producer left none."""
    return Cost(0, _count(x) * dtype.itemsize, VECTOR_BYTES * 3 * x[0] * parts * x[1], 1)


def conv(
    x: Sequence[int],  # [N, C1, H, W]
    out_channels: int,  # K
    dtype: torch.dtype,
    *,
    kernel: int = 3,  # of k x k taps
    skip_channels: int = 0,
    stride: int = 1,
    padding: tuple[int, ...] | None = None,  # as reference.conv takes it
    bias: bool = True,
    time_rows: int = 0,  # rows read of time: 1 from a table, N without; 0: none
    residual: bool = False,
    shortcut_channels: int = 0,  # C1 + C2 of the 1x1 shortcut; 0: none
    scale: float = 1.0,
    parts: int = 0,  # P of the statistics written with the result; 0: none
    form: str = "fused",
) -> Cost:
    """One convolution with its epilogue: inputs, weights and residual in, result and statistics out.

    Fused: an image of fewer than CHANNEL_PAD channels (conv_in's) lies padded to that many, and is read so.
    Plain: concatenation, uneven padding, convolution, then bias, time row, shortcut (a second convolution, that
    reads the concatenation which norm_act made, its bias, and an addition), residual and scale one launch each.
    """
    n, c1, h, w = x
    top, bottom, left, right = sides(padding, kernel)
    padded = h + top + bottom, w + left + right
    height, width = ((side - kernel) // stride + 1 for side in padded)
    lying = max(c1 + skip_channels, CHANNEL_PAD if _is_fused(form) else 0)
    image = n * lying * h * w * dtype.itemsize
    cost = _product(image, n * height * width, c1 + skip_channels, out_channels, kernel**2, bias, dtype)
    if not _is_fused(form):
        if skip_channels:
            cost += Cost(0, image, image, 1)
        if (top, left) != (bottom, right):
            moved = image // (h * w) * padded[0] * padded[1]
            cost += Cost(0, moved, moved, 1)
    return cost + _epilogue(
        (n, out_channels, height, width), dtype, bias, time_rows, residual, shortcut_channels, scale, parts, form
    )


def upsample_conv(
    x: Sequence[int],  # [N, C, H, W]
    out_channels: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    time_rows: int = 0,
    residual: bool = False,
    shortcut_channels: int = 0,
    scale: float = 1.0,
    parts: int = 0,
    form: str = "fused",
) -> Cost:
    """Nearest x2 and a 3x3 convolution: [N, C, H, W] -> [N, K, 2H, 2W].

    Fused: four 2x2 convolutions of x with summed taps, one an output phase: 16 C K products for each pixel
    of x where the plain form has 36, so 2.25 times fewer FLOPs, on 16/9 of the weights. Plain: the
    enlarged image is written and read back.
    """
    n, c, h, w = x
    image = n * c * h * w * dtype.itemsize
    if _is_fused(form):
        cost = _product(image, n * h * w, c, out_channels, 16, bias, dtype)
        cost = Cost(cost.flops, cost.bytes_read, 4 * cost.bytes_written, 1)
    else:
        cost = upsample(x, dtype) + _product(4 * image, 4 * n * h * w, c, out_channels, 9, bias, dtype)
    out = (n, out_channels, 2 * h, 2 * w)
    return cost + _epilogue(out, dtype, bias, time_rows, residual, shortcut_channels, scale, parts, form)


def attention(
    qkv: Sequence[int],  # [N, 3 * D, H, W]
    dtype: torch.dtype,
) -> Cost:
    """Two products of H*W x H*W scores with D channels (any number of heads), scores never in memory."""
    n, width, h, w = qkv
    pixels, d = h * w, width // 3
    values = n * pixels * dtype.itemsize
    return Cost(4 * n * pixels * pixels * d, values * 3 * d, values * d, 1)


def upsample(x: Sequence[int], dtype: torch.dtype) -> Cost:
    """[N, C, H, W] -> [N, C, 2H, 2W] in one launch."""
    image = _count(x) * dtype.itemsize
    return Cost(0, image, 4 * image, 1)


def downsample(x: Sequence[int], dtype: torch.dtype) -> Cost:
    """[N, C, H, W] -> [N, C, H // 2, W // 2] in one launch."""
    n, c, h, w = x
    return Cost(0, _count(x) * dtype.itemsize, n * c * (h // 2) * (w // 2) * dtype.itemsize, 1)


def linear(rows: int, channels: int, out_channels: int, dtype: torch.dtype) -> Cost:
    """[rows, C] -> [rows, K] with a bias: the time embedding, where it is not a table."""
    return _product(rows * channels * dtype.itemsize, rows, channels, out_channels, 1, True, dtype)


def sampler_step(
    x: Sequence[int],  # [N, C, H, W], float32
    dtype: torch.dtype,  # of the network's output and of the low-precision copy
    *,
    variance: str = "fixed",
    low_channels: int | None = None,  # C' of the low-precision copy; None: no copy
    given_noise: bool = False,
    form: str = "fused",
) -> Cost:
    """x_t and the network's output in, x_{t-1} and its padded copy out; noise is drawn in the kernel.

    Also 8 bytes an id, and 16 + TABLE_ROW_BYTES of seed, counter and table row.

    Plain: the ten float32 launches of a plain DDPM loop: b * out, x - that, / a, clamp, c0 * x0, cx * x,
    their sum, z, sigma * z, their sum; and one conversion of the result for the network.
    """
    n, _, h, w = x
    values = _count(x)
    output = values * (1 if variance == "fixed" else 2) * dtype.itemsize
    if _is_fused(form):
        read = values * VECTOR_BYTES * (1 + given_noise) + output + 8 * n + 16 + TABLE_ROW_BYTES
        low = n * (low_channels or 0) * h * w * dtype.itemsize
        return Cost(0, read, values * VECTOR_BYTES + low, 1)
    extra = 0 if variance == "fixed" else 1  # sigma becomes an image: read once more, by sigma * z
    read = values * VECTOR_BYTES * (11 + extra) + output
    written = values * VECTOR_BYTES * (10 + extra)
    convert = Cost(0, values * VECTOR_BYTES, values * dtype.itemsize, 1)
    return Cost(0, read, written, 10 + extra) + convert


def conv_step(
    x: Sequence[int],  # [N, C, H, W]: what conv_out reads
    image_channels: int,
    dtype: torch.dtype,
    *,
    variance: str = "fixed",
    low_channels: int | None = CHANNEL_PAD,
    form: str = "fused",
) -> Cost:
    """conv_out and the sampler step. Fused: the network's output stays in registers; one launch."""
    n, _, h, w = x
    outputs = image_channels * (1 if variance == "fixed" else 2)
    first = conv(x, outputs, dtype, form=form)
    step = sampler_step((n, image_channels, h, w), dtype, variance=variance, low_channels=low_channels, form=form)
    if not _is_fused(form):
        return first + step
    between = first.bytes_written
    return Cost(first.flops, first.bytes_read + step.bytes_read - between, step.bytes_written, 1)


def _product(image: int, pixels: int, channels: int, out: int, taps: int, bias: bool, dtype: torch.dtype) -> Cost:
    """One matrix product an output pixel: image bytes and weights in, [pixels, out] out, one launch."""
    read = image + taps * channels * out * dtype.itemsize + VECTOR_BYTES * out * bias
    return Cost(2 * pixels * taps * channels * out, read, pixels * out * dtype.itemsize, 1)


def _merge(n: int, channels: int, parts: int) -> tuple[Cost, int]:
    """Merge statistics until at most MAX_PARTS are left: the cost, and how many are."""
    cost, part = Cost(), VECTOR_BYTES * 3 * n * channels
    while parts > MAX_PARTS:
        fewer = -(-parts // MERGE_RUN)
        cost += Cost(0, part * parts, part * fewer, 1)
        parts = fewer
    return cost, parts


def _epilogue(
    y: tuple[int, int, int, int],
    dtype: torch.dtype,
    bias: bool,
    time_rows: int,
    residual: bool,
    shortcut_channels: int,
    scale: float,
    parts: int,
    form: str,
) -> Cost:
    """What the epilogue adds: fused, no launch, only its own reads, products and statistics."""
    n, k, h, w = y
    image = _count(y) * dtype.itemsize
    cost = Cost(0, VECTOR_BYTES * k * time_rows)
    if shortcut_channels:
        source = n * shortcut_channels * h * w * dtype.itemsize
        cost += _product(source, n * h * w, shortcut_channels, k, 1, bias, dtype)
    if _is_fused(form):
        read = cost.bytes_read + image * residual
        return Cost(cost.flops, read, VECTOR_BYTES * 3 * n * parts * k)
    around = shortcut_channels > 0
    unary = bias * (1 + around) + (time_rows > 0) + (around or residual or scale != 1.0)
    binary = around + residual
    return cost + Cost(0, (unary + 2 * binary) * image, (unary + binary) * image, unary + binary)


def _count(shape: Sequence[int]) -> int:
    n, c, h, w = shape
    return n * c * h * w


def _is_fused(form: str) -> bool:
    if form not in FORMS:
        raise ValueError(f"a cost has a form, one of {', '.join(FORMS)}; got {form!r}")
    return form == "fused"
