"""Can two sets of samples of one model be told apart? bfloat16 against float32, graph against eager.

Images of the same number are pairs: with one seed they come from the same noise. If it does not matter which of the
two sets an image came from, swapping the images within any of the pairs changes nothing about the distance between
the sets; so the distance is held against its values under random swaps. The test is exact at any number of images.

Pairs from the same noise show differences far too small for anyone to see who does not know the noise. So the same
test is made of the even images of one set and the odd ones of the other as well, which have no noise in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_seed
from ..stages import stage
from .features import Extractor
from .image_stream import ImageStream

MOST_PAIRS = 5_000  # the matrix of kernels is 200 MB then
SWAPS = 9_999
LEVEL = 0.05
RESAMPLES = 1_000


@dataclass(frozen=True)
class PairReport:
    """Two sets held against each other."""

    pairs: int
    kid: float  # unbiased squared MMD of the features, KID's kernel; 0 on average for sets that are alike
    interval: tuple[float, float]  # 95 % of it, by resampling pairs
    threshold: float  # the distance that random swaps exceed in 5 % of cases: what this many pairs can see
    p_value: float  # share of swaps with a distance as large
    unpaired_kid: float  # the same three of images without noise in common, half as many
    unpaired_threshold: float
    unpaired_p_value: float
    same_noise: bool | None  # whether the manifests say so; None: no manifests
    identical: int  # pairs equal in every byte
    pixel_error: float  # mean absolute difference within pairs, of 255
    psnr: float | None  # dB over all pixels; None: no difference

    @property
    def distinguishable(self) -> bool:
        """Image by image, at the 5 % level."""
        return self.p_value <= LEVEL

    @property
    def distinguishable_as_sets(self) -> bool:
        """Without noise in common, at the 5 % level."""
        return self.unpaired_p_value <= LEVEL

    def facts(self) -> dict[str, Any]:
        """As plain values, by the names of the fields."""
        verdicts = {
            "distinguishable": self.distinguishable,
            "distinguishable_as_sets": self.distinguishable_as_sets,
        }
        return {**self.__dict__, "interval": list(self.interval), **verdicts}


@stage("comparing the two sets")
def compare_pair(
    a: ImageStream,
    b: ImageStream,
    extractor: Extractor,
    most_pairs: int = MOST_PAIRS,
    batch_size: int = 64,
    seed: int = 0,  # of swaps and resamples
) -> PairReport:
    """Compares the first ``most_pairs`` images of two sets. ValueError for fewer than 20 or other sizes."""
    check_seed(seed)
    count = min(a.count, b.count, most_pairs)
    if count < 20:
        raise ValueError(f"a comparison needs at least 20 images in both sets; got {a.count} and {b.count}")
    features = [torch.empty(count, extractor.num_features) for _ in range(2)]
    identical, absolute, squared, values, done = 0, 0.0, 0.0, 0, 0
    for pixels in zip(a.batches(batch_size), b.batches(batch_size)):
        x, y = (p[: count - done] for p in pixels)
        if x.shape != y.shape:
            raise ValueError(f"both sets must have images of one size; got {list(x.shape[1:])}, {list(y.shape[1:])}")
        if not len(x):
            break
        difference = x.astype(np.float64) - y
        identical += int((difference == 0).all((1, 2, 3)).sum())
        absolute, squared, values = (
            absolute + float(np.abs(difference).sum()),
            squared + float(np.square(difference).sum()),
            values + difference.size,
        )
        for kept, p in zip(features, (x, y)):
            kept[done : done + len(x)] = extractor(torch.from_numpy(np.ascontiguousarray(p)).permute(0, 3, 1, 2))
        done += len(x)
    h = pair_terms(*features)
    kid, threshold, p_value = swap_test(h, seed)
    half = count // 2
    unpaired = swap_test(pair_terms(features[0][0 : 2 * half : 2], features[1][1 : 2 * half : 2]), seed)
    error = squared / values
    return PairReport(
        pairs=count,
        kid=kid,
        interval=resampled_interval(h, seed),
        threshold=threshold,
        p_value=p_value,
        unpaired_kid=unpaired[0],
        unpaired_threshold=unpaired[1],
        unpaired_p_value=unpaired[2],
        same_noise=_same_noise(a.facts, b.facts),
        identical=identical,
        pixel_error=absolute / values,
        psnr=10 * float(np.log10(255**2 / error)) if error else None,
    )


def pair_terms(a: Tensor, b: Tensor) -> Tensor:
    """h(i, j) = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j) [n, n] float64, zero for i = j.

    k(x, y) = (x.y / F + 1)^3, KID's. Gretton et al. 2012, equation 4, whose mean over i != j is the unbiased
    squared MMD.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    cross = kernel(a, b)
    return (kernel(a, a) + kernel(b, b) - cross - cross.T).fill_diagonal_(0)


def swap_test(h: Tensor, seed: int = 0, swaps: int = SWAPS) -> tuple[float, float, float]:
    """(squared MMD, its 95 % quantile under random swaps within pairs, p value)."""
    n = len(h)
    draw = torch.Generator().manual_seed(seed)
    observed = float(h.sum() / (n * (n - 1)))
    null = []
    for start in range(0, swaps, 1000):
        signs = torch.randint(0, 2, (n, min(1000, swaps - start)), generator=draw).double() * 2 - 1
        null.append((signs * (h @ signs)).sum(0) / (n * (n - 1)))
    values = torch.cat(null)
    # Swaps that change nothing (identical sets, the identity itself) must count as large, whatever the rounding.
    tolerance = 1e-12 * float(h.abs().sum() / (n * (n - 1)))
    p_value = (1 + int((values >= observed - tolerance).sum())) / (1 + swaps)
    return observed, float(values.quantile(1 - LEVEL)), p_value


def resampled_interval(h: Tensor, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the squared MMD over pairs drawn with replacement; a pair is not compared with itself."""
    n = len(h)
    draw = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(0, RESAMPLES, 100):
        counts = torch.stack(
            [torch.bincount(torch.randint(0, n, (n,), generator=draw), minlength=n).double() for _ in range(100)], dim=1
        )
        different = n * n - counts.square().sum(0)  # draws of two different pairs
        values.append((counts * (h @ counts)).sum(0) / different)
    low, high = torch.cat(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def _same_noise(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool | None:
    if a is None or b is None:
        return None
    keys = ("seed", "first_id", "model")
    return all(a.get(k) == b.get(k) for k in keys)
