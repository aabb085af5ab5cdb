"""Training of a DDPM: ``train`` runs Algorithm 1, records it, and goes on after a kill.

The run's folder holds the model in the diffusers layout (EMA weights), and beside it ``state/`` (the last two
training states), ``log.jsonl``, ``samples/``, ``evaluations.jsonl`` and ``train_config.json``. Under torchrun every
process computes its part of each batch, and rank 0 alone reads and writes the folder.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..checkpoints import diffusers
from ..config import UNetConfig
from ..data import DataError, ImageData
from ..images import grid, save_picture
from ..presets import ADJUSTABLE, TrainConfig, learning_rate
from ..progress import animated, progress_bar
from ..sampler import Sampler, to_uint8
from ..schedule import Schedule
from ..stages import stage
from . import state as train_state
from .background_evaluation import BackgroundEvaluation
from .report import begin_lines
from .state import ResumeError
from .step import Batch, Trainer, make_batch


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a number; the states saved before are intact."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended. ``finished`` is False if a signal stopped it; call it again to go on."""

    out: Path
    step: int
    finished: bool
    loss: float | None  # mean over the last logged interval; None if this call logged none


def train(
    data: ImageData,
    out: str | Path,
    model_config: UNetConfig,
    schedule: Schedule,
    train_config: TrainConfig,
    device: str | torch.device | None = None,  # None: CUDA if there is one, else the CPU; of several, each its own
    resume: bool = True,
    progress: bool = True,  # a bar; where stderr is no terminal, a line every half minute
    init_from: nn.Module | None = None,  # weights to begin with, for a new run only
    say: Callable[[str], None] | None = None,  # gets lines on data, network and steps before the first step
    record: Mapping[str, Any] | None = None,  # kept in train_config.json beside the settings
) -> TrainResult:
    """Trains until ``train_config.steps``; continues from the newest state in ``out`` if there is one.

    SIGINT, SIGTERM and SIGHUP save a state and return with ``finished=False``; a second one interrupts at once.

    In processes that torchrun started, or that have a process group, all train one run together: batch_size is that
    of the whole, and the loss curve is that of one process but for the order of sums (and for dropout's masks). A run
    may go on with another number of processes. A signal to one stops all after the same step.

    Raises ResumeError if ``out`` holds a run with other settings (each named), any run with ``resume=False``, or one
    that another process is training; OSError if the folder cannot be written to;
    TrainingDiverged if the loss becomes NaN or infinite; ValueError if data and model do not fit. Of several
    processes one raises it, and the others `distributed.OtherProcessFailed`.
    """
    out = Path(out)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    where = distributed.own_device(where, distributed.of_environment())
    with distributed.join(where) as world, _own_random_state(where), _deterministic(where):
        with stage("building the network"):
            trainer = world.together(
                lambda: Trainer(data, model_config, schedule, train_config, where, init_from, world)
            )
        run = world.together(lambda: _Run(trainer, out, progress))
        try:
            with stage("comparing with the last state, if there is one"):
                run.open(resume, record or {})
            if say is not None and world.first:
                for line in begin_lines(trainer, run.start):
                    say(line)
            return run.loop()
        finally:
            run.close()


class _Run:
    """The loop around ``Trainer.step``: prefetching, records, states."""

    def __init__(self, trainer: Trainer, out: Path, progress: bool):
        self.trainer, self.config, self.out = trainer, trainer.config, out
        self.world, self.progress = trainer.world, progress and trainer.world.first
        self.settings = trainer.settings()
        self.start = 0
        self.elapsed_before_s = 0.0
        self.loss: float | None = None
        self._began_s = 0.0
        self._loss_sum: Tensor | float = 0.0
        self._interval_steps = 0
        self._interval_began_s = 0.0
        self._release: Callable[[], None] = lambda: None
        self.evaluation: BackgroundEvaluation | None = None
        if self.config.evaluate_every:
            self.evaluation = _evaluation(trainer, out)

    def open(self, resume: bool, record: Mapping[str, Any]) -> None:
        """Loads the newest state, if there is one, and cuts the log back to it."""
        everywhere = self.world.gather(self.settings)
        self.world.together(lambda: train_state.check_same_everywhere(everywhere))
        state = self.world.on_first(lambda: self._open_folder(resume, record))
        if state is not None:
            self.trainer.load(state)
            self.start, self.elapsed_before_s = int(state["step"]), float(state["elapsed_s"])
        self.trainer.connect()

    def _open_folder(self, resume: bool, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest state of this very run; the log is cut back to it, and the settings are written."""
        train_state.check_out(self.out)
        self._release = train_state.hold(self.out)
        state = train_state.load_latest_state(self.out / "state")
        if state is not None:
            if not resume:
                raise ResumeError(f"{self.out} holds a run at step {state['step']}; resume it or give another folder")
            ignored = ADJUSTABLE | ({"steps"} if self.config.lr_schedule == "constant" else set())
            train_state.check_same_run(state["settings"], self.settings, frozenset(ignored))
        train_state.cut_log(self.out / "log.jsonl", 0 if state is None else int(state["step"]))
        train_state.write_record(self.out, {**self.settings, "source": self.trainer.data.source, **record})
        return state

    def close(self) -> None:
        """However the run ended, no process of it is left, and its folder is free."""
        if self.evaluation is not None:
            self.evaluation.finish(0)
        self._release()

    def loop(self) -> TrainResult:
        self._began_s = time.perf_counter()
        self._reset_interval()
        done, previewed = self.start, False
        if done >= self.config.steps:  # a kill may have come between the last state and its export
            self.world.on_first(self._export)
        with (
            _stop_signals() as stop,
            self._open_log() as log,
            progress_bar(self.progress, self.config.steps, "step", initial=done) as bar,
        ):
            for k, batch in self._batches():
                loss, norm = self.trainer.step(k, batch)
                self._loss_sum = self._loss_sum + loss
                self._interval_steps += 1
                done = k + 1
                bar.update()
                last = done == self.config.steps
                stopping = self.world.any(stop.is_set())
                if last or done % self.config.log_every == 0:
                    self._record(log, bar, done, norm)
                preview = self.config.sample_every and (last or done % self.config.sample_every == 0)
                # The first preview compiles and takes memory that training did not: it may end the process itself.
                if last or stopping or done % self.config.checkpoint_every == 0 or (preview and not previewed):
                    self._check_finite(done, float(norm))
                    self._on_first(self._save, done)
                if preview:
                    previewed = True
                    self._on_first(self._preview, done)
                if self.evaluation is not None and (last or done % self.config.evaluate_every == 0):
                    self._on_first(self._evaluate, done)
                if stopping:
                    break
        if self.evaluation is not None and done >= self.config.steps:
            self.evaluation.finish()
        return TrainResult(self.out, done, done >= self.config.steps, self.loss)

    def _open_log(self) -> AbstractContextManager[Any]:
        return open(self.out / "log.jsonl", "a", encoding="utf-8") if self.world.first else nullcontext()

    def _on_first(self, work: Callable[[int], None], done: int) -> None:
        """The others wait, as they would in the next step, and hear of it if it fails."""
        self.world.on_first(lambda: work(done))

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """Each step's batch, made while the step before it runs."""
        trainer, steps = self.trainer, self.config.steps
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for k in range(self.start, steps):
                made = ahead or pool.submit(make_batch, trainer.data, self.config, k, trainer.device, self.world)
                batch = made.result()
                if k + 1 < steps:
                    ahead = pool.submit(make_batch, trainer.data, self.config, k + 1, trainer.device, self.world)
                yield k, batch

    def _record(self, log: Any, bar: Any, done: int, norm: Tensor) -> None:
        mean = self._check_finite(done, float(norm)) / self._interval_steps
        now_s = time.perf_counter()
        images_per_s = self._interval_steps * self.config.batch_size / max(now_s - self._interval_began_s, 1e-9)
        entry = {
            "step": done,
            "loss": mean,
            "lr": learning_rate(self.config, done - 1),
            "grad_norm": float(norm),
            "images_per_s": round(images_per_s, 2),
            "elapsed_s": round(self._elapsed_s(), 3),
        }
        if self.world.first:
            log.write(json.dumps(entry) + "\n")
            log.flush()
        bar.set_postfix_str(f"loss {mean:.4f}, {images_per_s:.0f} images/s", refresh=animated())
        self.loss = mean
        self._reset_interval()

    def _reset_interval(self) -> None:
        self._loss_sum = 0.0
        self._interval_steps = 0
        self._interval_began_s = time.perf_counter()

    def _elapsed_s(self) -> float:
        return self.elapsed_before_s + time.perf_counter() - self._began_s

    def _check_finite(self, done: int, norm: float) -> float:
        """The sum of the whole batches' losses since the last record. TrainingDiverged, everywhere, if it is none."""
        loss_sum = self.world.sum(float(self._loss_sum))
        # With fp16 an infinite gradient is ordinary: the scaler skips that update and lowers its factor.
        bad_norm = not math.isfinite(norm) and not self.trainer.scaler.is_enabled()
        if bad_norm or not math.isfinite(loss_sum):
            self.world.together(lambda: self._diverged(done, loss_sum, norm))
        return loss_sum

    def _diverged(self, done: int, loss_sum: float, norm: float) -> None:
        raise TrainingDiverged(
            f"loss and gradient must stay finite; at step {done} the loss sum is {loss_sum} and the "
            f"gradient norm {norm}. {train_state.kept_text(self.out)}; lower lr or raise warmup_steps"
        )

    def _save(self, done: int) -> None:
        state = {
            "format": train_state.FORMAT,
            "step": done,
            "elapsed_s": self._elapsed_s(),
            "settings": self.settings,
            **self.trainer.state(),
        }
        train_state.save_state(self.out / "state", state)
        self._export()

    def _export(self) -> None:
        """The EMA weights in the diffusers layout."""
        names = self.trainer.data.label_names
        diffusers.save(self.out, self.trainer.ema.model, self.trainer.schedule, label_names=names)

    def _preview(self, done: int) -> None:
        """A grid of samples from the EMA weights, always from the same noise. One that fails is a warning."""
        began_s = time.perf_counter()
        trainer, count = self.trainer, self.config.sample_count
        steps = min(self.config.sample_steps, trainer.schedule.num_train_timesteps)
        labels = None
        if trainer.model.config.num_class_embeds is not None:
            labels = torch.arange(count, device=trainer.device) % trainer.data.num_classes
        with _no_reason_to_stop(f"no samples at step {done}"):
            sampler = Sampler(trainer.ema.model, trainer.schedule, batch_size=count, steps=steps, device=trainer.device)
            pixels = to_uint8(sampler.sample(count, seed=0, labels=labels)).cpu().numpy()
            save_picture(self.out / "samples" / f"step_{done:09d}.png", grid(pixels))
        self._interval_began_s += time.perf_counter() - began_s

    def _evaluate(self, done: int) -> None:
        """Has the EMA weights of this step evaluated; the process works while training goes on."""
        assert self.evaluation is not None
        if done == self.config.steps:  # nothing waits any more
            self.evaluation.finish()
        if not self.evaluation.running:
            with _no_reason_to_stop(f"no evaluation at step {done}"):
                self._export()
                self.evaluation.start(done)


@contextmanager
def _no_reason_to_stop(what: str) -> Iterator[None]:
    """Whatever fails inside is a warning: training is worth more than a look at it."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{what}: {lines[0]}", RuntimeWarning, stacklevel=3)


def _evaluation(trainer: Trainer, out: Path) -> BackgroundEvaluation:
    data = trainer.data
    if not data.source:
        raise DataError("evaluate_every needs data that another process can read: from a folder, a file or avatars:")
    config = trainer.config
    return BackgroundEvaluation(out, data.source, data.image_shape[1], config.evaluate_images, str(trainer.device))


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP (of a terminal that closes) set.

    A signal that is ignored (nohup, a shell's background job) stays so. Handlers exist in the main thread only;
    elsewhere nothing sets the event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        stop.set()
        restore()  # so that a second signal ends the process as it always does

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    for number in (getattr(signal, name) for name in names):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Steps seed torch's global generators (dropout draws from them); the caller's come back afterwards."""
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [device.index or 0] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, convolution algorithms that give the same bits every time: a resumed run must."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
