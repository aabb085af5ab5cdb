"""``ddpm-fast``: parses, calls, prints. Everything it does is reachable from Python too."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer

from .. import stages
from .._version import __version__
from . import bench, convert, engine, evaluate, export, profile, sample, train
from .interruption import streams
from .options import Json, Settings, Source, Weights, WeightsPreset, assignments
from .words import CLICK_ERROR, command_class

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ddpm-fast {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Denoising diffusion (DDPM), exact and fast: sample, train, inspect."""


def _with_torch(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which imports torch when it runs: its import takes seconds, which --help and a typing mistake
    need not wait for."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            with stages.stage_now("importing torch"):
                importlib.import_module("torch")
        except KeyboardInterrupt:
            print("ddpm-fast: interrupted; nothing was begun", file=sys.stderr)
            raise SystemExit(130) from None
        command(*args, **options)

    return run


def inspect(
    source: Source = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch, for the memory estimate.")] = 1,
    as_json: Json = False,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Print a checkpoint's architecture, schedule, cost and memory."""
    from ..checkpoints import load
    from ..inspection import describe, describe_text

    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {batch_size}")
    facts = describe(load(source, weights_preset, assignments(settings), weights=weights), batch_size)
    print(json.dumps(facts, indent=2) if as_json else describe_text(facts))


def doctor(as_json: Json = False) -> None:
    """Print versions, devices, and what is accelerated here."""
    from ..inspection import diagnose, diagnose_text

    facts = diagnose()
    print(json.dumps(facts, indent=2) if as_json else diagnose_text(facts))


# Former names of options, which stay understood.
_PRESET = {"--preset": "--weights-preset"}
_BATCH = {"--batch": "--batch-size"}

for command, kind in (
    (sample.sample, command_class(_PRESET)),
    (train.train, command_class()),
    (inspect, command_class(_PRESET)),
    (doctor, command_class()),
    (engine.verify, command_class(_PRESET)),
    (engine.plan, command_class(_BATCH | _PRESET)),
    (export.export, command_class()),
    (evaluate.evaluate, command_class()),
    (bench.roofs, command_class(several=bench.SEVERAL)),
    (profile.profile, profile.ProfileCommand),
    (bench.bench, command_class(_BATCH | _PRESET, bench.SEVERAL)),
    (convert.convert, command_class(_PRESET)),
):
    app.command(cls=kind)(_with_torch(command))


@streams()
def main() -> None:
    """The entry point: a user's mistake costs one line on stderr and exit code 2, never a traceback."""
    warnings.showwarning = lambda message, *_: print(f"ddpm-fast: warning: {message}", file=sys.stderr)
    stages.show()
    try:
        with _ended_in_order():
            code = app(standalone_mode=False)
        if code == 130:  # some versions of typer catch the interrupt and return this
            raise KeyboardInterrupt
        raise SystemExit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("ddpm-fast: interrupted; nothing half-written is left", file=sys.stderr)
        raise SystemExit(130) from None
    except CLICK_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            raise SystemExit(0) from None
        _fail(error.format_message())
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (ValueError, RuntimeError) as error:
        _fail(str(error))
    finally:
        stages.hide()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, end a command as Ctrl-C does: its temporary files and the
    processes that it began go with it, and its claims are given back. A signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    replaced = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str) -> None:
    print("ddpm-fast: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
