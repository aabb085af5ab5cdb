"""Distances between a set of samples and the images they should look like: Frechet distance and KID.

The distances are torchmetrics'. Here are what they are taken of (features, read as a stream), a cache for the
reference's, and how much of a distance is only the small number of images.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_seed
from ..data.image_files import DataError
from ..images import whole_file
from ..ops.compiled import user_cache
from ..progress import progress_bar
from ..stages import stage
from .features import Extractor
from .image_stream import ImageStream

KEPT = 10_000  # features of the reference that are kept for KID; its cached file is 50 MB then
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # Binkowski et al. 2018 and most who report it
FRACTIONS = (1.0, 0.8, 0.6, 0.4, 0.2)  # of the samples, for the extrapolation to infinitely many
LEAST_FOR_EXTRAPOLATION = 500


@dataclass(frozen=True)
class Statistics:
    """What a Frechet distance needs of a set of images, and some features of it for KID."""

    mean: Tensor  # [F] float64
    covariance: Tensor  # [F, F] float64, of n - 1
    count: int | None  # images; None: from a file that does not say
    features: Tensor | None  # [min(n, KEPT), F] float32, drawn evenly from the set
    extractor: str | None  # None: from a file that does not say


@dataclass(frozen=True)
class Evaluation:
    """A set of samples held against a reference. Values are per the extractor's own convention."""

    distance_name: str  # FID only in torch-fidelity's Inception features
    distance: float
    extrapolated: float | None  # to infinitely many samples (Chong and Forsyth 2020); None: too few samples
    kid: float | None  # mean over subsets, unbiased in the number of images
    kid_std: float | None
    count: int
    against_count: int | None
    extractor: str
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As plain values, by the names of the fields."""
        return {**self.__dict__, "notes": list(self.notes)}


def evaluate(
    samples: ImageStream | Tensor,  # or features [n, F] already made
    against: Statistics,
    extractor: Extractor,
    batch_size: int = 64,
    progress: bool = False,
    seed: int = 0,  # of KID's subsets and the extrapolation's
) -> Evaluation:
    """Frechet distance (Heusel et al. 2017) and KID of samples against a reference's statistics.

    Raises ValueError where statistics of another extractor are given, or of fewer than two images.
    """
    check_seed(seed)
    if against.extractor not in (None, extractor.name) or len(against.mean) != extractor.num_features:
        raise ValueError(
            f"statistics and samples must have features of one extractor; got {against.extractor} with "
            f"{len(against.mean)} features, and {extractor.name} with {extractor.num_features}"
        )
    features = samples if isinstance(samples, Tensor) else features_of(samples, extractor, batch_size, progress)
    if len(features) < 2:
        raise ValueError(f"a distance needs at least 2 samples; got {len(features)}")
    distance = frechet_distance(features, against)
    notes = _notes(len(features), against, extractor)
    extrapolated = None
    if len(features) >= LEAST_FOR_EXTRAPOLATION:
        extrapolated = extrapolate(features, against, distance, seed)
    kid, kid_std = kernel_distance(features, against.features, seed) or (None, None)
    return Evaluation(
        distance_name=extractor.distance,
        distance=distance,
        extrapolated=extrapolated,
        kid=kid,
        kid_std=kid_std,
        count=len(features),
        against_count=against.count,
        extractor=extractor.name,
        notes=notes,
    )


def features_of(stream: ImageStream, extractor: Extractor, batch_size: int = 64, progress: bool = False) -> Tensor:
    """Features [n, F] float32 of all images: 256 MB for 50,000 of 1,280."""
    features = torch.empty(stream.count, extractor.num_features)
    done = 0
    for part in feature_batches(stream, extractor, batch_size, progress):
        features[done : done + len(part)] = part
        done += len(part)
    return features


def feature_batches(stream: ImageStream, extractor: Extractor, batch_size: int, progress: bool) -> Iterator[Tensor]:
    """Features [N, F] batch by batch, in order."""
    name = Path(stream.source).name
    quiet = nullcontext() if progress else stage(f"computing the features of {stream.count:,} images of {name}")
    with quiet, progress_bar(progress, stream.count, "image", name) as bar:
        for pixels in stream.batches(batch_size):
            yield extractor(torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2))
            bar.update(len(pixels))


def statistics(parts: Iterable[Tensor], count: int, extractor: str) -> Statistics:
    """Of features [N, F] that come batch by batch, ``count`` in all; sums in float64."""
    if count < 2:
        raise ValueError(f"statistics need at least 2 images; got {count}")
    total = outer = None
    kept, done = [], 0
    wanted = np.unique(np.linspace(0, count - 1, min(count, KEPT)).round().astype(np.int64))
    for part in parts:
        x = part.double()
        total = x.sum(0) if total is None else total + x.sum(0)
        outer = x.T @ x if outer is None else outer.addmm_(x.T, x)
        here = wanted[(wanted >= done) & (wanted < done + len(part))] - done
        kept.append(part[torch.from_numpy(here)].clone())
        done += len(part)
    if done != count or total is None or outer is None:
        raise DataError(f"the images said to be {count}; {done} came")
    mean = total / count
    return Statistics(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count, torch.cat(kept), extractor)


def frechet_distance(features: Tensor, against: Statistics) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), by torchmetrics, of features [n, F]."""
    metric = _metrics().image.fid.FrechetInceptionDistance(feature=_Features(len(against.mean)))
    n = against.count or 2  # with the sums made to match, any number gives back the same mean and covariance
    metric.real_features_sum = against.mean * n
    metric.real_features_cov_sum = against.covariance * (n - 1) + n * torch.outer(against.mean, against.mean)
    metric.real_features_num_samples = torch.tensor(n)
    for part in features.double().split(4096):
        metric.update(part, real=False)
    return float(metric.compute())


def extrapolate(features: Tensor, against: Statistics, distance: float, seed: int = 0) -> float:
    """The distance at infinitely many samples: the intercept of a line in 1/n (Chong and Forsyth 2020)."""
    draw = torch.Generator().manual_seed(seed)
    inverse, values = [1 / len(features)], [distance]
    for fraction in FRACTIONS[1:]:
        chosen = torch.randperm(len(features), generator=draw)[: round(fraction * len(features))]
        inverse.append(1 / len(chosen))
        values.append(frechet_distance(features[chosen], against))
    return float(np.polyfit(inverse, values, 1)[1])


def kernel_distance(features: Tensor, against: Tensor | None, seed: int = 0) -> tuple[float, float] | None:
    """KID (Binkowski et al. 2018) as mean and deviation over subsets; None without features to compare with."""
    if against is None:
        return None
    size = min(KID_SUBSET_SIZE, len(features), len(against))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        metric = _metrics().image.kid.KernelInceptionDistance(
            feature=_Features(features.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
        metric.update(against, real=True)
        metric.update(features, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def reference(
    stream: ImageStream,
    extractor: Extractor,
    batch_size: int = 64,
    progress: bool = False,
    cache: Path | None = None,  # a folder; None: the user's cache
) -> Statistics:
    """Statistics of a reference set, made once and then read from ``cache`` until its files change."""
    key = hashlib.sha256(f"{stream.fingerprint} {stream.count} {extractor.name}".encode()).hexdigest()[:24]
    path = (cache or default_cache()) / f"{key}.npz"
    if path.exists():
        try:
            return load_statistics(path)
        except DataError as error:
            warnings.warn(f"made anew: {error}", stacklevel=2)
    made = statistics(feature_batches(stream, extractor, batch_size, progress), stream.count, extractor.name)
    try:
        save_statistics(path, made)
    except OSError as error:
        warnings.warn(f"the statistics of {stream.source} could not be kept in {path.parent}: {error}", stacklevel=2)
    return made


def default_cache() -> Path:
    """Where statistics are kept unless told otherwise."""
    return user_cache() / "ddpm_fast" / "statistics"


def save_statistics(path: Path, made: Statistics) -> None:
    """An .npz with ``mu`` and ``sigma``, as other FID tools read it, and what else there is."""
    entries: dict[str, Any] = {"mu": made.mean.numpy(), "sigma": made.covariance.numpy()}
    entries |= {"count": made.count, "extractor": made.extractor, "features": made.features}
    with whole_file(path) as file:
        np.savez(file, **{name: np.asarray(value) for name, value in entries.items() if value is not None})  # type: ignore[arg-type]


def load_statistics(path: Path) -> Statistics:
    """Reads what `save_statistics` wrote, or any .npz with ``mu`` [F] and ``sigma`` [F, F]. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        mean, covariance = (torch.from_numpy(np.asarray(found[k], np.float64)) for k in ("mu", "sigma"))
    except Exception as error:  # numpy and zipfile raise many kinds on a damaged file
        raise DataError(f"{path} holds no statistics (mu and sigma): {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path} must hold mu [F] and sigma [F, F]; got {list(mean.shape)}, {list(covariance.shape)}")
    features = torch.from_numpy(found["features"]) if "features" in found else None
    count = int(found["count"]) if "count" in found else None
    return Statistics(mean, covariance, count, features, str(found["extractor"]) if "extractor" in found else None)


def is_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics and not images."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {"mu", "sigma"} <= set(stored.files)
    except Exception:
        return False


class _Features(nn.Module):
    """What torchmetrics takes for an extractor, where the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metrics() -> Any:
    try:
        import torchmetrics
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ImportError as error:
        raise RuntimeError('evaluation needs: pip install "ddpm-fast[eval]"') from error
    return torchmetrics


def _notes(n: int, against: Statistics, extractor: Extractor) -> tuple[str, ...]:
    notes = []
    fewest = min(n, against.count or n)
    if fewest < 50_000:
        notes.append(
            f"{extractor.distance} of {n:,} samples is biased upwards, by about a constant over n; compare it only "
            f"with values of as many images (published ones are of 50,000), or by the extrapolation and KID"
        )
    if fewest <= extractor.num_features:
        notes.append(
            f"{fewest:,} images do not fill {extractor.num_features:,} feature dimensions: the covariance is singular "
            f"and {extractor.distance} mostly bias"
        )
    if against.extractor is None:
        notes.append("the reference's file does not say which network and resizing its statistics come from")
    if against.features is None:
        notes.append("no KID: the reference's file has no features, only mean and covariance")
    return tuple(notes)
