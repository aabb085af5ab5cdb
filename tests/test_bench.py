"""`ddpm-fast bench`: providers on the same weights and noise, judged before they are timed, and what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_fakes import Crooked, fake
from models import TINY, normal, unet

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.benchmarking import providers, run, startup, text
from ddpm_fast.benchmarking.checks import CHAIN_LIMIT, FLOAT32_LIMITS, Judge, allowances
from ddpm_fast.benchmarking.providers import DTYPES, Case, Provider, chosen
from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.cli import bench as cli_bench
from ddpm_fast.cli import sources
from ddpm_fast.cli.words import joined
from ddpm_fast.house_rule import FLOOR, full_float32
from ddpm_fast.roofline import Roofs

CPU = torch.device("cpu")
SCHEDULE = df.Schedule(num_train_timesteps=20)


def case(batch: int = 3, **changes) -> Case:
    return Case(unet({**TINY, **changes}), SCHEDULE, batch, 4, CPU)


def checkpoint() -> Checkpoint:
    return Checkpoint(unet(TINY), SCHEDULE, "tiny", "test", [])


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fakes say who they are; workers find their module."""
    monkeypatch.setenv("BENCH_FAKES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return tmp_path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    return tmp_path / "model"


def settings(**changes) -> run.Settings:
    fields = {"batches": [2], "dtypes": ["float32"], "steps": 3, "startups": False, "rounds": (3, 3)}
    return run.Settings(**{**fields, **changes})


PEERS = [
    ("reference", "float32"),
    ("reference", "bfloat16"),
    ("cpu", "float32"),
    ("cpu", "bfloat16"),
    ("diffusers", "float32"),
    ("diffusers", "bfloat16"),
    ("diffusers-channels-last", "float32"),
    ("diffusers-channels-last", "bfloat16"),
    ("guided", "bfloat16"),
    ("guided", "float16"),
    ("openvino", "float32"),
    ("onnxruntime", "float32"),
]


def made(name: str, dtype: str, of: Case):
    (provider,) = chosen([name])
    reason = provider.missing(CPU, DTYPES[dtype])
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return provider.make(of, DTYPES[dtype])


@pytest.mark.parametrize(("name", "dtype"), PEERS)
def test_every_provider_computes_the_model(name: str, dtype: str) -> None:
    """Outputs within the house rule, and the trajectory from the same noise is the reference's."""
    of = case()
    judge = Judge(of)
    verdict = judge.verdict(made(name, dtype, of), DTYPES[dtype], strict=True)
    assert verdict.ok, verdict
    assert 0 < verdict.largest_allowed < (1e-3 if dtype == "float32" else 1.0)
    assert verdict.chain < CHAIN_LIMIT[DTYPES[dtype]] / 2


GPU_PEERS = [
    *((f"triton-{graph}", dtype) for graph in providers.GRAPHS for dtype in ("bfloat16", "float16", "float32")),
    *((name, "bfloat16") for name in ("diffusers-channels-last", "diffusers-compile")),
    ("diffusers", "float32"),
    ("guided", "float16"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), GPU_PEERS)
def test_every_provider_computes_the_model_on_a_gpu(name: str, dtype: str) -> None:
    model = sources.measured("tiny", None, {}).model.cuda()
    of = Case(model, SCHEDULE, 3, 4, torch.device("cuda"))
    (provider,) = chosen([name])
    why_not = provider.missing(of.device, DTYPES[dtype])
    if why_not and provider.packages:
        pytest.skip(why_not)
    assert why_not is None
    with full_float32(provider.ours):
        verdict = Judge(of).verdict(provider.make(of, DTYPES[dtype]), DTYPES[dtype], strict=provider.ours)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", ["diffusers", "diffusers-channels-last", "guided", "cpu"])
def test_labels_and_a_learned_variance_reach_every_provider(name: str) -> None:
    of = case(num_class_embeds=5, out_channels=6, in_channels=3)
    of = replace(of, schedule=df.Schedule(num_train_timesteps=20, variance_type="learned_range"))
    dtype = "bfloat16" if name == "guided" else "float32"
    verdict = Judge(of).verdict(made(name, dtype, of), DTYPES[dtype], strict=True)
    assert verdict.ok, verdict
    labels = of.labels()
    assert labels is not None and labels.tolist() == [0, 1, 0]


def test_the_compiled_provider_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the minutes of a real compilation: torch.compile is asked once, with frozen weights, and used."""
    pytest.importorskip("diffusers")
    asked: list[dict] = []

    def compile(module, **kwargs):
        asked.append(kwargs)
        return lambda x, t: module(x, t) * 1.001

    monkeypatch.setattr(torch, "compile", compile)
    of = case()
    verdict = Judge(of).verdict(made("diffusers-compile", "float32", of), torch.float32, strict=True)
    assert asked == [{"fullgraph": True, "dynamic": False, "options": {"freezing": True}}]
    assert not verdict.ok and verdict.rms == pytest.approx(1e-3, rel=0.5)


@pytest.mark.parametrize(
    ("wrong", "ok"),
    [("", True), ("scale", False), ("nan", False), ("noise", False), ("order", False), ("overflow", False)],
)
def test_a_check_sees_one_thing_wrong(wrong: str, ok: bool) -> None:
    of = case()
    assert Judge(of).verdict(Crooked(of, wrong), torch.float32, strict=True).ok is ok


def test_a_wrong_timestep_is_seen() -> None:
    of = replace(case(), steps=6)
    judge = Judge(of)
    judge.probes = [0, 3]
    assert not judge.verdict(Crooked(of, "timestep"), torch.float32, strict=True).ok


def test_a_chain_of_another_method_is_refused_in_one_line(tmp_path: Path) -> None:
    """And by --set method=ddpm its network is timed in a DDPM chain, by diffusers too."""
    pytest.importorskip("diffusers")
    ddim = df.Schedule(num_train_timesteps=20, method="ddim", num_inference_steps=20, set_alpha_to_one=False)
    df.save(tmp_path / "ddim", unet(TINY), ddim)
    loaded = df.load(tmp_path / "ddim")
    with pytest.raises(ValueError, match=r"^bench times DDPM chains [^\n]*/ddim is DDIM; --set method=ddpm [^\n]*$"):
        run.run(loaded, chosen(["reference"]), settings())
    schedule = df.load(tmp_path / "ddim", overrides={"method": "ddpm"}).schedule
    assert schedule.method == "ddpm" and not schedule.set_alpha_to_one
    of = replace(case(), schedule=schedule)
    verdict = Judge(of).verdict(made("diffusers", "float32", of), torch.float32, strict=True)
    assert verdict.ok, verdict


def test_a_network_of_another_kind_is_refused_in_one_line():
    other = replace(checkpoint(), model=torch.nn.Identity(), family="lucidrains", source="model-10.pt")
    with pytest.raises(ValueError, match=r"^bench compares [^\n]*; model-10.pt is a lucidrains network[^\n]*$"):
        run.run(other, chosen(["reference"]), settings())


def test_what_follows_from_a_step_s_time(fakes: Path) -> None:
    slow, fast = fake("sleeps", "slow", ms=40.0), fake("sleeps", "fast", ms=10.0)
    roofs = [Roofs("cpu", "float32", 1, "2", 1e9, 1e9, 2e9)]
    found = run.run(checkpoint(), [slow, fast], settings(baseline="slow float32", batches=[4]), roofs)
    a, b = found["rows"]
    assert a["ms_a_step"]["median"] == pytest.approx(40.0, rel=0.3)
    assert b["ms_a_step"]["median"] == pytest.approx(10.0, rel=0.5)
    assert a["times_as_fast"] == {"as": "slow float32", "value": 1.0, "low": 1.0, "high": 1.0}
    assert b["times_as_fast"]["value"] == pytest.approx(4.0, rel=0.4)
    for row in (a, b):
        s = row["ms_a_step"]["median"] / 1e3
        assert row["images_per_s"] == pytest.approx(4 / (s * 20))
        flops = found["gflop_per_image_and_step"] * 1e9 * 4
        assert row["tflops"] == pytest.approx(flops / s / 1e12)
        assert row["share_of_convolution_roof"] == pytest.approx(flops / s / 2e9)
    shown = text.report_text(found)
    assert "extrapolated from 3 of 20 steps" in shown and f"{b['times_as_fast']['value']:.2f} (" in shown
    assert "extrapolated" not in text.report_text({**found, "timed_steps": 20})
    whole = run.run(checkpoint(), [], settings(steps=None))
    assert whole["timed_steps"] == whole["chain"] == 20


def test_the_first_step_and_memory_in_a_process_of_its_own(saved: Path) -> None:
    (provider,) = chosen(["reference"])
    found = startup.startup(provider, "float32", saved, 2, CPU)
    assert "failed" not in found, found
    assert 0 < found["first_step_s"] < 60 and 0 < found["load_s"] < 60
    assert found["threads"] == torch.get_num_threads() and "cached_first_step_s" not in found
    if sys.platform == "linux":  # of that process, which has torch in it, and not of this one
        assert 100 < found["peak_mib"] < 4000


def test_a_process_that_dies_or_hangs_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (provider,) = chosen(["reference"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    args = (provider, "float32", Path("model"), 2, CPU)
    assert startup.startup(*args) == {"failed": "exit code 1"}

    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", 5)

    monkeypatch.setattr(subprocess, "run", hang)
    assert startup.startup(*args, time_limit_s=5) == {"failed": "no first step within 5 s"}


def test_compiled_code_is_asked_for_twice_from_one_empty_cache(monkeypatch, saved: Path) -> None:
    seen: list[str] = []

    def ask(request, environment, limit):
        seen.append(environment["TORCHINDUCTOR_CACHE_DIR"])
        assert Path(request["folder"]).is_dir() and environment["XDG_CACHE_HOME"] != environment["HF_HOME"]
        return {"first_step_s": 40.0 / len(seen)}

    monkeypatch.setattr(startup, "_ask", ask)
    provider = Provider("x", lambda of, dtype: None, compiles=True)
    found = startup.startup(provider, "float32", saved, 2, CPU)
    assert found == {"first_step_s": 40.0, "cached_first_step_s": 20.0} and len(set(seen)) == 1


def test_reasons_for_not_being_available(monkeypatch: pytest.MonkeyPatch) -> None:
    known = providers.providers()
    cuda = torch.device("cuda")
    assert known["openvino"].missing(cuda, torch.float32) == "runs on cpu, not on cuda"
    assert known["triton-loop"].missing(CPU, torch.float32) == "runs on cuda, not on cpu"
    assert known["onnxruntime"].missing(CPU, torch.bfloat16) == "has no bfloat16"
    later = Provider("later", lambda of, dtype: None, operations="no_such_set")
    assert later.missing(CPU, torch.float32) == "this version has no ops.no_such_set()"

    def none_here():
        raise RuntimeError("ops.winograd() needs a C++ compiler")

    monkeypatch.setattr(ops, "winograd", none_here)
    assert known["winograd"].missing(CPU, torch.float32) == "ops.winograd() needs a C++ compiler"
    assert set(providers.default_names(CPU)) | set(providers.default_names(cuda)) <= set(known)
    with pytest.raises(ValueError, match="no provider is called 'jax'; there are: reference, "):
        chosen(["jax"])


# --- the command ---


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--batch-size 1 4 16 folder", "--batch-size 1,4,16 folder"),
        ("folder --batch-size 1 4 --full", "folder --batch-size 1,4 --full"),
        ("--providers cpu diffusers folder", "--providers cpu,diffusers folder"),
        ("--providers cpu,winograd diffusers --batch-size 4", "--providers cpu,winograd,diffusers --batch-size 4"),
        ("--dtype float32 bfloat16 --batch-size 2 8 3", "--dtype float32,bfloat16 --batch-size 2,8,3"),
        ("--batch-size=1 4 16", "--batch-size=1,4,16"),
        ("--batch-size --full 4", "--batch-size --full 4"),
        ("--steps 5 6", "--steps 5 6"),
        ("--providers nonsense cpu folder", "--providers nonsense,cpu folder"),
    ],
)
def test_several_values_after_an_option(words: str, wanted: str) -> None:
    assert joined(words.split(), cli_bench.SEVERAL) == wanted.split()


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> int:
    from ddpm_fast import cli

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "ddpm_fast.roofline._SHAPES", {"copy": ([1], []), "gemm": ([(8, 8, 8)], []), "conv": ([(1, 8, 4)], [])}
    )
    monkeypatch.setattr("ddpm_fast.roofline.BUDGET_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0  # type: ignore[return-value]


def test_the_command_writes_a_table_and_json(monkeypatch, tmp_path: Path, capsys) -> None:
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    out = tmp_path / "found.json"
    words = [
        "bench",
        str(tmp_path / "model"),
        "--batch-size",
        "1",
        "2",
        "--providers",
        "reference",
        "guided",
        "--dtype",
    ]
    words += ["float32", "--steps", "2", "--no-startup", "--budget", "600", "--out", str(out)]
    assert command(monkeypatch, tmp_path, *words) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [(r["batch"], r["provider"]) for r in found["rows"]] == [
        (1, "reference"), (1, "guided"), (2, "reference"), (2, "guided"),
    ]  # fmt: skip
    assert "guided float32: has no float32" in shown and "batch 2" in shown
    assert "copy" in shown and found["roofs"][0]["conv_flops_per_s"] > 0
    assert found["environment"]["versions"]["torch"] == torch.__version__


def test_a_wrong_set_of_ours_ends_with_exit_code_1(monkeypatch, tmp_path: Path, capsys, fakes: Path) -> None:
    wrong = fake("wrong_attention", "cpu", is_ours=True)
    monkeypatch.setattr(providers, "providers", lambda: {"cpu": wrong})
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    words = [str(tmp_path / "model"), "--batch-size", "1", "--providers", "cpu", "--dtype", "float32", "--no-startup"]
    assert command(monkeypatch, tmp_path, "bench", *words, "--steps", "2") == 1
    shown = capsys.readouterr().out
    assert "cpu float32: WRONG, so no speed" in shown and "images/s" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be whole numbers of at least 1; got '0'"),
        (["--batch-size", "four"], "--batch-size must be whole numbers of at least 1; got 'four'"),
        (["--providers", "jax"], "no provider is called 'jax'"),
        (["--dtype", "float8"], "--dtype must be of float32, bfloat16, float16; got 'float8'"),
        (["--clock", "sun"], "--clock must be wall, or on a CPU cpu; got 'sun'"),
        (["--out", "x.txt"], "--out must be a .json file; got x.txt"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
        (["--steps", "0"], "--steps and --rounds must be at least 1"),
        (["--budget", "0"], "--budget above 0; got 20, 3, 0"),
        (["--budget", "nan"], "--budget above 0; got 20, 3, nan"),
    ],
)
def test_a_mistake_costs_one_line(monkeypatch, tmp_path: Path, capsys, words, message) -> None:
    assert command(monkeypatch, tmp_path, "bench", *words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_batch_size_is_kept_and_shown_when_it_ends(monkeypatch, tmp_path: Path, capsys) -> None:
    """Ctrl-C in the second of three: the first one is in the file, and the last line says what is left."""
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    rows = run._Batch.rows

    def stop_in_the_second(self, providers):
        if self.case.batch == 2:
            assert [r["batch"] for r in json.loads(out.read_text())["rows"]] == [1]
            raise KeyboardInterrupt
        return rows(self, providers)

    monkeypatch.setattr(run._Batch, "rows", stop_in_the_second)
    out = tmp_path / "found.json"
    words = [str(tmp_path / "model"), "--batch-size", "1", "2", "4", "--providers", "reference", "--dtype", "float32"]
    words += ["--steps", "2", "--no-startup"]
    assert command(monkeypatch, tmp_path, "bench", *words, "--out", str(out)) == 130
    shown = capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["batches"] == [1, 2, 4] and [r["batch"] for r in found["rows"]] == [1]
    assert found["rows"][0]["ms_a_step"]["median"] > 0 and "images/s" in shown.out and "batch 1" in shown.out
    assert shown.err.splitlines()[-1] == (
        f"ddpm-fast: interrupted; batch size 1 of 1, 2, 4 is in {out}; --batch-size 2 4 measures what is left, with "
        "another --out"
    )
    monkeypatch.setattr(run._Batch, "rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(monkeypatch, tmp_path, "bench", *words) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "ddpm-fast: interrupted; no batch size is finished, so nothing is kept"


def test_a_spent_budget_names_all_that_was_not_measured() -> None:
    there, missing = chosen(["reference", "guided"])
    seen: list[int] = []
    found = run.run(
        checkpoint(),
        [there, missing],
        settings(batches=[1, 2], budget_s=0.0),
        keep=lambda found: seen.append(len(found["rows"])),
    )
    assert seen == [2, 4] and [(r["batch"], r["provider"], r["reason"]) for r in found["rows"]] == [
        (n, name, reason)
        for n in (1, 2)
        for name, reason in (("reference", "not measured: the budget was spent"), ("guided", "has no float32"))
    ]
    shown = text.report_text(found)
    assert shown.count("reference float32: not measured: the budget was spent") == 2
    assert run.wrong(found) == []


def test_what_hangs_does_not_outlast_the_budget(fakes: Path) -> None:
    """In the making, and in its turns: it is ended, and what is measured besides it stays."""
    (reference,) = chosen(["reference"])
    began = time.monotonic()
    providers_ = [fake("hangs"), reference]
    found = run.run(checkpoint(), providers_, settings(budget_s=25.0, baseline="reference float32"))
    assert time.monotonic() - began < 35
    hanging, right = found["rows"]
    assert hanging["reason"] == "not measured: the budget was spent" and "failed" not in hanging
    assert right["times_as_fast"]["value"] == 1  # the baseline was made first
    began = time.monotonic()
    found = run.run(checkpoint(), [fake("stalls"), reference], settings(budget_s=20.0))
    assert time.monotonic() - began < 30
    assert [r["reason"] for r in found["rows"]] == ["not measured: the budget was spent"] * 2


def test_first_steps_that_did_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = run._Batch.time

    def outlast(self, *args):
        time_(self, *args)
        self.until = time.monotonic() - 1

    monkeypatch.setattr(run, "startup", lambda *_: pytest.fail("there is no time"))
    monkeypatch.setattr(run._Batch, "time", outlast)
    (reference,) = chosen(["reference"])
    found = run.run(checkpoint(), [reference], settings(budget_s=1e4, startups=True))
    assert found["rows"][0]["startup"] == {"failed": "not measured: the budget was spent"}
    assert "reference float32: no first step: not measured: the budget was spent" in text.report_text(found)


def test_the_help_names_every_provider(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert command(monkeypatch, tmp_path, "bench", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in providers.providers():
        assert (name if not name.startswith("triton-") else name.removeprefix("triton")) in shown, name


def test_roofs_by_the_command(monkeypatch, tmp_path: Path, capsys) -> None:
    assert command(monkeypatch, tmp_path, "roofs", "--json", "--dtype", "float32") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float32" and found["copy_bytes_per_s"] > 0
    assert command(monkeypatch, tmp_path, "roofs", "--dtype", "int8") == 2


def test_a_network_without_a_file_has_random_weights_that_are_always_the_same() -> None:
    a, b = (sources.measured("tiny", None, {"sample_size": 8}) for _ in range(2))
    assert a.source == "tiny (random weights)" and a.model.config.sample_size == 8
    x = normal(1, 3, 8, 8)
    assert torch.equal(a.model(x, 3), b.model(x, 3)) and float(a.model(x, 3).detach().abs().max()) > 0


def test_what_torch_overflows_allows_nobody_more():
    inf = float("inf")
    largest, rms = allowances(torch.float16, inf, 1e-3)
    assert largest == FLOOR and rms == pytest.approx(2e-3 + FLOOR)
    assert allowances(torch.float32, inf, inf) == FLOAT32_LIMITS
