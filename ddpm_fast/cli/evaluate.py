"""``ddpm-fast evaluate``: how far samples are from what they should look like, and whether two sets differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Json, chosen_device
from .sources import loaded

Pair = Annotated[
    tuple[Path, Path] | None,
    typer.Option(metavar="A B", help="Instead: test whether two sets of samples of one model can be told apart."),
]


def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(
            metavar="SAMPLES",
            help="A folder of shards or pictures, an .npz, .npy or .tar; with --draw a checkpoint.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="The reference: images in any of these forms, or an .npz of statistics (mu, sigma)."
        ),
    ] = None,
    pair: Pair = None,
    features: Annotated[
        str, typer.Option(help="efficientnet-lite0 (FD-EffLite0, works offline) or inception (FID).")
    ] = "efficientnet-lite0",
    inception_weights: Annotated[
        Path | None, typer.Option(help="File with Inception's weights, where they cannot be downloaded.")
    ] = None,
    draw: Annotated[
        int | None, typer.Option(metavar="N", help="Draw N images from the checkpoint SAMPLES and evaluate those.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="With --draw: which of several networks in the checkpoint. Default: the averaged one."
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Scale and crop DATA to this many pixels first.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images processed together.")] = 64,
    most_pairs: Annotated[int, typer.Option(help="With --pair: compare at most this many images of each set.")] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling, and of the images of --draw.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the statistics of references.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the reference's statistics in this .npz, too.")] = None,
    log: Annotated[Path | None, typer.Option(help="Append the result to this file, too, as one line of JSON.")] = None,
    note: Annotated[str | None, typer.Option(help="Text to put into the result, such as the training step.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure how far samples are from a set of images.

    The measures are the Frechet distance and KID. With --pair: test whether two sets of samples of one model differ."""
    from ..arguments import check_seed
    from ..evaluation.features import extractor
    from ..evaluation.image_stream import open_stream
    from ..whole_files import check_file, check_folder

    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {batch_size}")
    check_seed(seed)
    if (pair is None) == (samples is None):
        raise ValueError("give either SAMPLES with --against DATA, or --pair A B")
    if pair is None and against is None:
        raise ValueError("SAMPLES need --against DATA: the images that they should look like")
    if weights is not None and (draw is None or Path(weights).is_file()):  # the former name of --inception-weights
        inception_weights, weights = inception_weights or Path(weights), None
    if log is not None:
        check_file(log, "--log")
    if save is not None:
        if save.suffix.lower() != ".npz":
            raise ValueError(f"--save must be an .npz file; got {save}")
        check_file(save, "--save")
    if cache is not None:
        check_folder(cache, "--cache")
    chosen = extractor(features, chosen_device(device), inception_weights)
    progress = not as_json
    if pair is not None:
        from ..evaluation.two_sample import compare_pair

        first, second = (open_stream(path) for path in pair)
        report = compare_pair(first, second, chosen, most_pairs, batch_size, seed)
        facts, text = report.facts(), pair_text(report)
    else:
        assert samples is not None and against is not None
        if draw is not None and draw < 2:
            raise ValueError(f"--draw must be at least 2; got {draw}")
        stream = open_stream(samples) if draw is None else _drawn(samples, weights, draw, batch_size, seed, device)
        result = _against(stream, against, chosen, image_size, batch_size, seed, cache, save, progress)
        facts, text = result.facts(), evaluation_text(result)
    if note is not None:
        facts["note"] = note
    if log is not None:
        with open(log, "a") as file:
            file.write(json.dumps(facts) + "\n")
    print(json.dumps(facts, indent=2) if as_json else text)


def _against(
    stream: Any,
    against: str,
    chosen: Any,
    image_size: int | None,
    batch_size: int,
    seed: int,
    cache: Path | None,
    save: Path | None,
    progress: bool,
) -> Any:
    from .. import evaluation
    from ..evaluation.image_stream import open_stream

    if Path(against).suffix.lower() == ".npz" and evaluation.is_statistics(Path(against)):
        known = evaluation.load_statistics(Path(against))
    else:
        known = evaluation.reference(open_stream(against, image_size), chosen, batch_size, progress, cache)
    if save is not None:
        evaluation.save_statistics(save, known)
    return evaluation.evaluate(stream, known, chosen, batch_size, progress, seed)


def _drawn(source: str, weights: str | None, n: int, batch_size: int, seed: int, device: str | None) -> Any:
    """Samples of a checkpoint as a stream, drawn as they are asked for; of every class in turn where it has some."""
    import torch

    from ..evaluation.image_stream import ImageStream
    from ..sampler import Sampler, to_uint8
    from ..store.manifest import classes_of

    checkpoint = loaded(source, None, None, weights)
    sampler = Sampler(checkpoint.model, checkpoint.schedule, batch_size=batch_size, device=chosen_device(device))

    classes = classes_of(sampler)

    def batches(size: int) -> Any:
        for first in range(0, n, size):
            count = min(size, n - first)
            labels = classes and torch.arange(first, first + count) % classes
            yield to_uint8(sampler.sample(count, seed, labels, first_id=first)).cpu().numpy()

    return ImageStream(n, source, "", batches)


def evaluation_text(result: Any) -> str:
    """For people."""
    of = f"{result.count:,} samples against " + (
        "statistics" if result.against_count is None else f"{result.against_count:,} images"
    )
    lines = [f"{result.distance_name}  {result.distance:.4f}   {of}"]
    if result.extrapolated is not None:
        lines.append(f"  at infinitely many samples, extrapolated: {result.extrapolated:.4f}")
    if result.kid is not None:
        lines.append(f"KID x 1000  {1000 * result.kid:.4f} +- {1000 * result.kid_std:.4f}   (over subsets)")
    return "\n".join([*lines, f"features: {result.extractor}", *(f"note: {note}" for note in result.notes)])


def pair_text(report: Any) -> str:
    """For people."""
    verdict = "cannot be told apart"
    if report.distinguishable:
        verdict = "can be told apart" + ("" if report.distinguishable_as_sets else ", but only image by image")
    psnr = "no difference" if report.psnr is None else f"PSNR {report.psnr:.1f} dB"
    low, high = report.interval
    noise = {
        True: "from the same noise, by their manifests",
        False: "not from the same noise and model, by their manifests",
        None: "paired by position",
    }[report.same_noise]
    return "\n".join(
        [
            f"the sets {verdict}: {report.pairs:,} pairs, p = {report.p_value:.4f}; "
            f"without noise in common p = {report.unpaired_p_value:.4f} (below 0.05 tells them apart)",
            f"KID x 1000  {1000 * report.kid:.5f}, 95 % of resamples in {1000 * low:.5f} .. {1000 * high:.5f}; "
            f"above {1000 * report.threshold:.5f} it tells them apart",
            f"  without noise in common {1000 * report.unpaired_kid:.5f}; above {1000 * report.unpaired_threshold:.5f}",
            f"pairs: {noise}; {report.identical:,} equal in every byte; "
            f"mean difference {report.pixel_error:.3f} of 255, {psnr}",
        ]
    )
