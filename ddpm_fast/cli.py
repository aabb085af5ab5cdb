"""``ddpm-fast``: parses, calls, prints. Everything it does is reachable from Python too."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_convert, cli_engine, cli_evaluate
from .cli_options import Device, Preset, Settings, Source, assignments, chosen_device

# Typer carries click inside, or imports it, by its version; either way this is the base of a wrong command line.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Denoising diffusion (DDPM), exact and fast: sample, train, inspect.",
)


@app.command()
def sample(
    source: Source = None,
    n: Annotated[int, typer.Option("-n", help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(help="Image k of a seed is always the same image.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Respaced chain of this many steps. Default: all.")] = None,
    method: Annotated[str, typer.Option(help="ddpm or ddim.")] = "ddpm",
    eta: Annotated[float, typer.Option(help="Of ddim: 0 deterministic ... 1.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Images drawn together.")] = 64,
    label: Annotated[int | None, typer.Option(help="Class of a class-conditional model.")] = None,
    first_id: Annotated[int, typer.Option(help="Start at image FIRST_ID of the seed.")] = 0,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the network.")] = "float32",
    out: Annotated[Path, typer.Option(help=".png: a grid; .npz: arr_0 uint8 NHWC; else a folder of PNGs.")] = Path(
        "samples.png"
    ),
    film: Annotated[Path | None, typer.Option(help="Also the denoising: .png strip or .gif.")] = None,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Draw images. With no argument: 16 from the bundled model into samples.png."""
    from . import images
    from .checkpoints import load
    from .sampler import DTYPES, Sampler, to_uint8

    if n < 1:
        raise ValueError(f"-n must be at least 1; got {n}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    if film is not None and film.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"--film must end in .png or .gif; got {film}")
    if out.suffix and out.suffix.lower() not in (".png", ".npz") and not out.is_dir():
        raise ValueError(f"--out must be a .png, an .npz or a folder; got {out}")
    for path in (out, film):
        if path is not None:  # now, not when the images are drawn
            images.make_folder(path.parent if path.suffix else path)
    where = chosen_device(device)
    checkpoint = load(source, preset, assignments(settings))
    sampler = Sampler(
        checkpoint.model,
        checkpoint.schedule,
        batch_size=min(batch_size, n) if batch_size > 0 else batch_size,
        steps=steps,
        method=method,
        eta=eta,
        dtype=DTYPES[dtype],
        device=where,
    )
    reel = images.Film(len(sampler.table), to_uint8) if film is not None else None
    drawn = sampler.sample(n, seed, label, first_id, progress=True, callback=None if reel is None else reel.callback)
    pixels = to_uint8(drawn).cpu().numpy()
    if out.suffix.lower() == ".npz":
        import numpy as np

        images.save_npz(out, pixels, None if label is None else np.full(n, label))
    elif out.suffix.lower() == ".png":
        images.save_picture(out, images.grid(pixels))
    else:
        images.save_folder(out, pixels, range(first_id, first_id + n))
    if reel is not None and film is not None:
        reel.save(film)
    print(f"{n} image{'s' * (n != 1)} in {out}" + (f", the denoising in {film}" if film is not None else ""))


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(help="A folder of images, .npz, .npy, .tar(.gz, .xz), or avatars:STYLE. Default: the preset's."),
    ] = "",
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run in it goes on.")] = Path("runs/ddpm"),
    preset: Annotated[str, typer.Option(help="tiny, cifar10 or lsun256.")] = "tiny",
    image_size: Annotated[
        int | None, typer.Option(help="Scale and crop images to this many pixels. Default: the preset's.")
    ] = None,
    label_dropout: Annotated[float, typer.Option(help="Share of labels dropped, for guidance.")] = 0.0,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Ignore the data's labels.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse data with unreadable images.")] = False,
    device: Device = None,
    settings: Settings = None,
) -> None:
    """Train a model (Algorithm 1). --set takes any field of TrainConfig, UNetConfig or Schedule."""
    from .training_cli import run

    finished = run(
        data=data,
        out=out,
        preset_name=preset,
        image_size=image_size,
        label_dropout=label_dropout,
        unconditional=unconditional,
        strict=strict,
        device=chosen_device(device),
        overrides=assignments(settings),
    )
    if not finished:
        print(f"stopped; the same command goes on from the last state in {out / 'state'}", file=sys.stderr)
        raise SystemExit(130)


@app.command()
def inspect(
    source: Source = None,
    batch_size: Annotated[int, typer.Option(help="For the memory estimate.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Print a checkpoint's architecture, schedule, cost and memory."""
    from .checkpoints import load
    from .inspection import describe, describe_text

    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {batch_size}")
    facts = describe(load(source, preset, assignments(settings)), batch_size)
    print(json.dumps(facts, indent=2) if as_json else describe_text(facts))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Print versions, devices, what is accelerated here and what is missing."""
    from .inspection import diagnose, diagnose_text

    facts = diagnose()
    print(json.dumps(facts, indent=2) if as_json else diagnose_text(facts))


for command in (cli_engine.verify, cli_engine.plan, cli_convert.convert, cli_evaluate.evaluate):
    app.command()(command)


def main() -> None:
    """The entry point: a user's mistake costs one line on stderr and exit code 2, never a traceback."""
    warnings.showwarning = lambda message, *_: print(f"ddpm-fast: warning: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # some versions of typer catch the interrupt and return this
            raise KeyboardInterrupt
        raise SystemExit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("ddpm-fast: interrupted; nothing half-written is left", file=sys.stderr)
        raise SystemExit(130) from None
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            raise SystemExit(0) from None
        _fail(error.format_message())
    except (ValueError, OSError, RuntimeError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print("ddpm-fast: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
