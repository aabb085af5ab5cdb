"""The command line in this process, and in one of its own where signals and tracebacks are the point."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, unet
from PIL import Image
from processes import interruptible
from test_unet import CIFAR10

import ddpm_fast as df
from ddpm_fast import cli
from ddpm_fast.images import grid
from ddpm_fast.store import SampleStore

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
SCHEDULE = df.Schedule(num_train_timesteps=10, beta_start=0.01, beta_end=0.5)
ROOT = Path(__file__).parents[1]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "plain"
    df.save(folder, unet(SMALL), SCHEDULE)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "classes"
    df.save(folder, unet({**SMALL, "num_class_embeds": 3}), SCHEDULE)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``ddpm-fast`` with these words, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        code = stop.value.code
        out, err = capsys.readouterr()
        return 0 if code is None else int(code), out, err

    return call


def drawn(folder: Path, n: int, **options: Any) -> np.ndarray:
    """What the library draws: [n, H, W, C] uint8."""
    loaded = df.load(folder)
    arguments = {k: options.pop(k) for k in ("seed", "labels", "first_id") if k in options}
    return df.to_uint8(df.Sampler(loaded.model, loaded.schedule, **options).sample(n, **arguments)).numpy()


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the last of 255 levels: another batch may round another way."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_sample_to_a_grid(run: Run, checkpoint: Path, tmp_path: Path):
    code, out, err = run("sample", checkpoint, "-n", 5, "--seed", 3)
    assert (code, out) == (0, "5 images in samples.png\n")
    assert "10/10" in err
    assert near(np.asarray(Image.open(tmp_path / "samples.png")), grid(drawn(checkpoint, 5, seed=3)))


def test_sample_to_npz_with_labels(run: Run, classes: Path, tmp_path: Path):
    assert run("sample", classes, "-n", 3, "--label", 2, "--out", "new/x.npz", "--batch-size", 2)[0] == 0
    with np.load(tmp_path / "new" / "x.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert near(file["arr_0"], drawn(classes, 3, labels=2)) and file["arr_1"].tolist() == [2, 2, 2]


def test_a_class_may_be_called_by_its_name(run: Run, classes: Path, tmp_path: Path):
    df.save(tmp_path / "named", df.load(classes).model, SCHEDULE, label_names=["cat", "dog", "7"])
    for label, number in (("dog", 1), ("1", 1), ("7", None), ("cow", None)):
        code, _, err = run("sample", "named", "-n", 1, "--label", label, "--out", "x.npz")
        if number is None:  # a number is never a name
            said = (
                "labels must be in 0..2; got 7" if label == "7" else "a whole number or one of cat, dog, 7; got 'cow'"
            )
            assert code == 2 and said in err
        else:
            assert code == 0 and np.load(tmp_path / "x.npz")["arr_1"].tolist() == [number]
    assert run("sample", "named", "-n", 2, "--label", "dog", "--store", "--out", "set")[0] == 0
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["labels"]["rule"] == 1
    assert run("sample", "named", "-n", 2, "--label", 1, "--store", "--out", "set")[0] == 0


def test_sample_to_a_folder_by_ids(run: Run, checkpoint: Path, tmp_path: Path):
    assert run("sample", checkpoint, "-n", 2, "--first-id", 3, "--out", "pictures")[0] == 0
    files = sorted((tmp_path / "pictures").glob("*.png"))
    assert [f.name for f in files] == ["000003.png", "000004.png"]
    assert near(np.stack([np.asarray(Image.open(f)) for f in files]), drawn(checkpoint, 5)[3:])


@pytest.mark.parametrize(
    "words, options",
    [
        (("--steps", 4), {"steps": 4}),
        (("--method", "ddim", "--eta", 0.5, "--steps", 5), {"method": "ddim", "eta": 0.5, "steps": 5}),
        (("--dtype", "bfloat16"), {"dtype": torch.bfloat16}),
    ],
)
def test_sample_passes_its_options_on(
    words: tuple[object, ...], options: dict[str, Any], run: Run, checkpoint: Path, tmp_path: Path
):
    assert run("sample", checkpoint, "-n", 2, "--out", "x.npz", *words)[0] == 0
    got = np.load(tmp_path / "x.npz")["arr_0"]
    assert near(got, drawn(checkpoint, 2, **options)) and not near(got, drawn(checkpoint, 2))


def test_settings_override_the_checkpoint(run: Run, checkpoint: Path, tmp_path: Path):
    loaded = df.load(checkpoint)
    schedule = df.Schedule(**{**loaded.schedule.to_dict(), "variance_type": "fixed_large", "clip_sample": False})
    expected = df.to_uint8(df.Sampler(loaded.model, schedule).sample(2)).numpy()
    words = ("--set", "variance_type=fixed_large", "--set", "clip_sample=false")
    assert run("sample", checkpoint, "-n", 2, "--out", "x.npz", *words)[0] == 0
    assert near(np.load(tmp_path / "x.npz")["arr_0"], expected)


@pytest.mark.parametrize("name", ["film.png", "film.gif"])
def test_film(name: str, run: Run, checkpoint: Path, tmp_path: Path):
    code, out, _ = run("sample", checkpoint, "-n", 2, "--out", "x.npz", "--film", name)
    assert (code, out) == (0, f"2 images in x.npz, the denoising in {name}\n")
    final = np.load(tmp_path / "x.npz")["arr_0"]
    with Image.open(tmp_path / name) as film:
        if name == "film.gif":  # x_T, and after each of 10 steps
            assert film.n_frames == 11
            return
        strip = np.asarray(film)
    factor = 1200 // (11 * 8)
    tile = strip[: 8 * factor, -8 * factor :]  # the first image at the end of its row
    assert np.array_equal(tile[::factor, ::factor], final[0])


def test_inspect(run: Run, checkpoint: Path):
    code, text, _ = run("inspect", checkpoint)
    parameters = sum(p.numel() for p in df.load(checkpoint).model.parameters())
    assert code == 0 and f"parameters  {parameters:,}" in text and "8 x 8, 3 channels" in text
    assert "T=10, linear 0.01..0.5, epsilon, fixed_small" in text
    code, text, _ = run("inspect", checkpoint, "--json", "--batch-size", 4)
    facts = json.loads(text)
    assert code == 0 and facts["parameters"] == parameters and facts["batch_size"] == 4
    assert facts["model"] == df.load(checkpoint).model.config.to_dict()
    assert facts["weights_mib"]["float32"] == pytest.approx(parameters * 4 / 2**20)


def test_inspect_prices_one_convolution_by_hand(run: Run, tmp_path: Path):
    """A network without mid block, attention or levels: its convolutions and linear layers, counted here."""
    c = {**SMALL, "block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    df.save(tmp_path / "one", unet({**c, "mid_block_type": None}), SCHEDULE)
    facts = json.loads(run("inspect", tmp_path / "one", "--json")[1])
    down = 4 * 4 * 9 * 2
    up = 2 * (8 * 4 * 9 + 4 * 4 * 9 + 8 * 4)  # two blocks, each of (h, skip) with its 1x1 shortcut
    convolutions = 64 * (3 * 4 * 9 + down + up + 4 * 3 * 9)
    linear = 4 * 16 + 16 * 16 + 3 * 16 * 4
    assert facts["gflop_per_image_and_step"] * 1e9 == 2 * (convolutions + linear)


def test_the_cost_of_the_google_cifar10_model():
    """12.44 GFLOP an image and step, 35,746,307 parameters: nothing is computed, so on the meta device."""
    from ddpm_fast.inspection import model_cost

    with torch.device("meta"):
        model = df.UNet(df.UNetConfig(**CIFAR10))
    cost = model_cost(model, 32, 32, batch_size=2)
    assert cost["flops"] / 1e9 == pytest.approx(12.44, rel=0.005)
    assert cost["parameters"] == 35_746_307


def test_doctor(run: Run):
    code, text, _ = run("doctor")
    assert code == 0 and torch.__version__.split("+")[0] in text and sys.version.split()[0] in text
    facts = json.loads(run("doctor", "--json")[1])
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["findings"]


def test_doctor_names_the_extras_that_are_missing(run: Run, monkeypatch: pytest.MonkeyPatch):
    required = ["torch>=2", 'torch>=2; extra == "eval"', "not-there-1>=1,<2; extra == 'bench'", 'b.c; extra == "bench"']
    monkeypatch.setattr("importlib.metadata.requires", lambda _: required)
    text = run("doctor")[1]
    said = [line for line in text.splitlines() if "pip install" in line and "ddpm-fast[" in line]
    assert len(said) == 1 and said[0].endswith('pip install "ddpm-fast[bench]" (not installed: not-there-1, b.c)')


def test_version(run: Run):
    assert run("--version") == (0, f"ddpm-fast {df.__version__}\n", "")


def test_help(run: Run):
    for words in ((), ("--help",), ("sample", "--help")):
        code, out, err = run(*words)
        assert (code, err) == (0, "") and len(out.splitlines()) > 8
        assert "..." not in out.partition("Commands:")[2], "a command's summary is cut off"


@pytest.mark.parametrize(
    "words, message",
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("sample", "CKPT", "--nonsense"), "No such option: --nonsense"),
        (("sample", "CKPT", "-n", "two"), "'-n'"),
        (("sample", "CKPT", "-n", 0), "-n must be at least 1; got 0"),
        (("sample", "nowhere"), "nowhere does not exist"),
        (("sample", "CKPT", "--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got int8"),
        (("sample", "CKPT", "--device", "abacus"), "--device must be cpu, cuda or cuda:N; got 'abacus'"),
        (("sample", "CKPT", "--device", "meta"), "--device must be cpu, cuda or cuda:N; got 'meta'"),
        (("sample", "CKPT", "--device", "cuda:99"), "--device cuda:99: torch sees"),
        (("sample", "CKPT", "--out", "a.jpg"), "--out must be a .png, an .npz or a folder; got a.jpg"),
        (
            ("sample", "CKPT", "--out", "CKPT/unet/config.json/a.png"),
            "config.json cannot be a folder: a file is in its way",
        ),
        (("sample", "CKPT", "--film", "a.mp4"), "--film must end in .png or .gif; got a.mp4"),
        (("sample", "CKPT", "--steps", 11), "steps must be between 1 and num_train_timesteps=10; got 11"),
        (
            ("sample", "CKPT", "--method", "euler"),
            "method must be one of ddpm, ddim, ancestral_sampling, euler_maruyama, reverse_diffusion; got 'euler'",
        ),
        (("sample", "CKPT", "--eta", 0.5), "eta belongs to method='ddim'"),
        (("sample", "CKPT", "--batch-size", 0), "batch_size must be a positive integer or 'auto'; got 0"),
        (("sample", "CKPT", "--label", 1), "this model has no classes, so it takes no labels"),
        (("sample", "CLASSES"), "this model has 3 classes (0 to 2): pass labels"),
        (("sample", "CLASSES", "--label", 3), "labels must be in 0..2; got 3\n"),
        (
            ("sample", "CKPT", "--first-id", 2**63 - 1, "-n", 2),
            "[-2**63, 2**63); got first_id=9223372036854775807",
        ),
        (("sample", "CKPT", "--seed", 2**64), "--seed must be in 0 .. 2**64 - 1; got 18446744073709551616"),
        (("sample", "CKPT", "--seed", -1), "--seed must be in 0 .. 2**64 - 1; got -1"),
        (("sample", "CKPT", "--first-id", -1), "--first-id must be 0 or more, as files are named by it; got -1"),
        (("verify", "CKPT", "--seed", 2**64), "seed must be in [-2**63, 2**64), as for torch.manual_seed; got 1844674"),
        (("evaluate", "a.npz", "--against", "b.npz", "--seed", 2**64), "seed must be in [-2**63, 2**64)"),
        (("sample", "CKPT", "--set", "sample_size=7", "--out", "set", "--store"), "multiples of 2; got 7x7"),
        (("sample", "CKPT", "--film", "a.png", "--out", "./a.png"), "--film and --out must be two files; got a.png"),
        (
            ("sample", "CKPT", "--film", "set/a.png", "--out", "set"),
            "--film must lie outside the folder",
        ),
        (("verify", "CLASSES", "--label", 3), "labels must be in 0..2; got 3\n"),
        (("verify", "CLASSES", "--label", -1), "labels must be in 0..2; got -1\n"),
        (("profile", "CKPT", "--seconds", "nan"), "--seconds must be above 0, and finite; got nan"),
        (("profile", "CKPT", "--seconds", "inf"), "--seconds must be above 0, and finite; got inf"),
        (("profile", "CKPT", "--html", "a", "--trace", "./a"), "--html, --out and --trace must be different files"),
        (("sample", "CKPT", "--set", "norm_eps"), "--set takes NAME=VALUE; got 'norm_eps'"),
        (("sample", "CKPT", "--set", "colour=red"), "colour"),
        (("sample", "CKPT", "--weights-preset", "nonsense"), "nonsense"),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("inspect", "CKPT", "--batch-size", 0), "--batch-size must be at least 1; got 0"),
        (("train", "nowhere", "--out", "run"), "no training data at nowhere"),
        (
            ("train", "avatars:pixel-art:2", "--out", "run", "--set", "lerning_rate=1"),
            "no setting is called 'lerning_rate'",
        ),
        (("train", "avatars:pixel-art:2", "--preset", "huge", "--out", "run"), "huge"),
        (("train", "avatars:pixel-art:2", "--image-size", 0), "image_size must be a positive number of pixels; got 0"),
        (("train", "avatars:pixel-art:2", "--set", "lr=fast"), "TrainConfig.lr must be a number; got 'fast'"),
        (("train", "avatars:pixel-art:2", "--set", "betas=0.9"), "TrainConfig.betas must be two in [0, 1); got 0.9"),
        (("train", "avatars:pixel-art:2", "--set", "flip=maybe"), "TrainConfig.flip must be true or false"),
        (
            ("train", "avatars:pixel-art:2", "--out", "CKPT/unet/config.json"),
            "cannot be a folder: a file is in its way",
        ),
        (
            ("evaluate", "a.npz", "--against", "b.npz", "--log", "CKPT/unet/config.json/log"),
            "config.json cannot be a folder: a file is in its way",
        ),
        (("evaluate", "a.npz", "--against", "b.npz", "--log", "CKPT"), "is a folder; give a file"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(
    words: tuple[object, ...], message: str, run: Run, checkpoint: Path, classes: Path, tmp_path: Path
):
    words = tuple(
        w.replace("CKPT", str(checkpoint)).replace("CLASSES", str(classes)) if isinstance(w, str) else w for w in words
    )
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert err.startswith("ddpm-fast: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("out", [("a.png",), ("pictures", "--pngs"), ("a.npz", "--film", "a.gif")], ids=str)
def test_two_channels_are_no_picture_before_anything_is_drawn(out: tuple[str, ...], run: Run, tmp_path: Path):
    df.save(tmp_path / "two", unet({**SMALL, "in_channels": 2, "out_channels": 2}), SCHEDULE)
    code, _, err = run("sample", tmp_path / "two", "-n", 1, "--out", *out)
    assert code == 2 and err == "ddpm-fast: a picture needs 1, 3 or 4 channels; got 2; write an .npz instead\n"
    code, _, err = run("sample", tmp_path / "two", "-n", 1, "--out", "a.npz")
    assert code == 0 and np.load(tmp_path / "a.npz")["arr_0"].shape == (1, 8, 8, 2)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run: Run, checkpoint: Path, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("sample", checkpoint, "--out", "locked/a.png")
    assert code == 2 and "locked cannot be written to" in err and err.count("\n") == 1


def test_train_then_sample(run: Run, tmp_path: Path):
    words = ["train", "avatars:pixel-art:6", "--out", "run", "--image-size", 8]
    settings = {
        "steps": 3,
        "batch_size": 4,
        "num_train_timesteps": 10,
        "block_out_channels": "[4, 8]",
        "down_block_types": '["DownBlock2D", "DownBlock2D"]',
        "up_block_types": '["UpBlock2D", "UpBlock2D"]',
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "precision": "fp32",
        "sample_every": 0,
    }
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    code, out, err = run(*words)
    assert code == 0, err
    assert out == "trained 3 steps; the model is in run: ddpm-fast sample run\n" and "data: 6 images" in err
    loaded = df.load(tmp_path / "run")
    assert loaded.model.config.block_out_channels == (4, 8) and loaded.model.config.sample_size == 8
    assert loaded.schedule.num_train_timesteps == 10
    assert run("sample", "run", "-n", 2, "--out", "x.npz")[0] == 0
    assert near(np.load(tmp_path / "x.npz")["arr_0"], drawn(tmp_path / "run", 2))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_leaves_what_is_finished_and_nothing_half_written(checkpoint: Path, tmp_path: Path):
    """A run of far more images than it is given time for, stopped once its log has begun."""
    words = ["sample", str(checkpoint), "-n", "100000", "--batch-size", "1", "--out", "a.npz"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_fast", *words],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stderr is not None
    try:
        seen = ""
        deadline = time.monotonic() + 120
        while "0/100000 " not in seen and time.monotonic() < deadline:
            seen += process.stderr.read(1)
        time.sleep(0.2)  # some images
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, seen + err
    assert "Traceback" not in seen + err
    kept = r"(\d+) of 100000 images are finished and kept in a.npz.parts; the same command goes on"
    said = re.fullmatch(f"ddpm-fast: interrupted; {kept}", err.splitlines()[-1])
    assert said is not None, err
    assert os.listdir(tmp_path) == ["a.npz.parts"] and not os.listdir(tmp_path / "a.npz.parts" / "unfinished")
    store = SampleStore.open(tmp_path / "a.npz.parts")
    assert store.images_in(store.finished()) == int(said[1]) and store.check(every=True) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_while_torch_is_imported_makes_no_traceback(tmp_path: Path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "doctor"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        preexec_fn=interruptible,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ddpm-fast: interrupted; nothing was begun\n")


def test_names_of_the_package_are_imported_when_they_are_asked_for():
    assert {name: getattr(df, name).__name__ for name in df.__all__ if name != "__version__"} == {
        name: name for name in df.__all__ if name != "__version__"
    }
    assert set(df.__all__) <= set(dir(df))
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        df.sampel  # noqa: B018


def test_a_process_of_its_own_has_the_exit_code_and_no_traceback(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "sample", "nowhere"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nowhere does not exist" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_clears_away_what_a_command_began(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores one of them

    def command(**_: Any) -> None:
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN), "the test itself would end"
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(10)

    monkeypatch.setattr("ddpm_fast.cli.commands.app", command)
    try:
        code, _, err = run()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (code, err) == (130, "ddpm-fast: interrupted; nothing half-written is left\n")
    assert list(tmp_path.iterdir()) == []
