"""Checkpoints against diffusers in the same process: what it saves we load, what we save it loads, outputs equal."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ddpm_fast.checkpoints import CheckpointError, files, load, save
from ddpm_fast.config import UNetConfig
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
GOOGLE_LIKE = {**TINY, "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0}
GOOGLE_LIKE |= {"freq_shift": 1, "flip_sin_to_cos": False}
CONFIGS = {
    "tiny": TINY,
    "google": GOOGLE_LIKE,
    "classes": {**TINY, "num_class_embeds": 3},
    "class_timestep": {**TINY, "class_embed_type": "timestep"},
    "class_identity": {**TINY, "class_embed_type": "identity"},
    "fourier": {**TINY, "time_embedding_type": "fourier"},
    "learned": {**TINY, "time_embedding_type": "learned", "num_train_timesteps": 50},
    "scale_shift": {**TINY, "resnet_time_scale_shift": "scale_shift", "out_channels": 6},
    "scale_shift_norm": {**TINY, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resnet_resampling": {
        **TINY,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "upsample_type": "resnet",
    },
    "attn_resnet": {**TINY, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "downsample_type": "resnet"},
    "no_mid": {**TINY, "mid_block_type": None},
    "no_mid_attention": {**TINY, "add_attention": False, "layers_per_block": 2, "time_embedding_dim": 24},
    "ncsnpp": {
        **TINY,
        "block_out_channels": (8, 32),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "norm_num_groups": None,
        "mid_block_scale_factor": 2**0.5,
    },
    "gray": {**TINY, "in_channels": 1, "out_channels": 1, "act_fn": "gelu", "center_input_sample": True},
}
# In float64 only diffusers' sinusoids are float32. A wrong but loadable setting moves outputs by far more than 1e-5.
TOLERANCE = 1e-5


def theirs(config: dict[str, Any], seed: int = 0) -> Any:
    """A diffusers model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def ours(config: dict[str, Any], seed: int = 0) -> UNet:
    model = UNet(UNetConfig(**config)).eval()
    model.load_state_dict(theirs(config, seed).state_dict())
    return model


def run(model: Any, config: dict[str, Any]) -> torch.Tensor:
    """The model's output for one batch, in float64: no order of its sums is felt on any processor."""
    model, g = copy.deepcopy(model).double(), torch.Generator().manual_seed(1)
    x = torch.randn(2, config.get("in_channels", 3), 8, 8, generator=g).double()
    t = torch.tensor([7, 42])
    labels: Any = None
    if config.get("num_class_embeds"):
        labels = torch.tensor([0, 2])
    elif config.get("class_embed_type") == "timestep":
        labels = torch.tensor([3, 11])
        model.class_embedding.register_forward_pre_hook(
            lambda module, args: (args[0].double(),)
        )  # as diffusers does not
    elif config.get("class_embed_type") == "identity":
        labels = torch.randn(2, 32, generator=g).double()
    with torch.no_grad():
        out = model(x, t, labels)
    return out if isinstance(out, torch.Tensor) else out.sample


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape
    largest, rms = float((a - b).abs().max()), float(b.square().mean().sqrt())
    assert rms > 0.01
    assert largest <= tolerance * rms, f"largest error {largest:.3e}, RMS {rms:.3e}"


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def pipeline(config: dict[str, Any] = TINY, **schedule: Any) -> Any:
    return diffusers.DDPMPipeline(theirs(config), diffusers.DDPMScheduler(**schedule))


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_diffusers_saves_we_load(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = theirs(config)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert_same(run(checkpoint.model, config), run(model, config))
    assert checkpoint.schedule == Schedule(variance_type="fixed_large")
    assert (checkpoint.family, checkpoint.source, checkpoint.notes) == ("diffusers", str(tmp_path), [])
    assert not checkpoint.model.training
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_diffusers_loads(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = ours(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = Schedule(num_train_timesteps=50, variance_type="fixed_large", beta_schedule="squaredcos_cap_v2")
    save(tmp_path / "out", model, schedule)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert_same(run(pipe.unet, config), run(model, config))
    assert_same(pipe.scheduler.betas, schedule.betas.float(), 1e-6)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    back = load(tmp_path / "out")
    assert back.schedule == schedule
    assert back.model.config == model.config
    assert same_weights(back.model, model)
    assert all(p.is_contiguous() for p in back.model.parameters())


def test_the_pipeline_runs_what_we_save_to_the_same_images(tmp_path: Path) -> None:
    schedule = Schedule(num_train_timesteps=20)
    save(tmp_path / "out", ours(TINY), schedule)
    reference = diffusers.DDPMPipeline(theirs(TINY), diffusers.DDPMScheduler(num_train_timesteps=20))
    images = [
        pipe(2, generator=torch.Generator().manual_seed(3), num_inference_steps=20, output_type="np").images
        for pipe in (diffusers.DDPMPipeline.from_pretrained(tmp_path / "out"), reference)
    ]
    assert images[0].std() > 0.1
    assert abs(images[0] - images[1]).max() <= 1e-6


def test_fixed_large_log_is_saved_under_the_name_that_works_upstream(tmp_path: Path) -> None:
    save(tmp_path / "out", ours(TINY), Schedule(num_train_timesteps=10, variance_type="fixed_large_log"))
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    images = pipe(1, num_inference_steps=10, output_type="np").images
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert (images == images).all()


# --- layouts ---


def as_root(folder: Path) -> None:
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()


def test_root_layout_and_bin_with_the_names_of_old_files(tmp_path: Path) -> None:
    """Like google/ddpm-*: all at the top, .bin, attention projections under the names before diffusers 0.17."""
    model = theirs(GOOGLE_LIKE)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    as_root(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in model.state_dict().items():
        if "attentions" in name and not name.startswith("up_blocks"):  # up blocks keep the new names: mixed
            for new, before in old.items():
                if f".{new}." in name:
                    name = name.replace(new, before)
                    if name.startswith("mid_block") and name.endswith("weight"):
                        tensor = tensor[:, :, None, None]
        state[name] = tensor
    assert sum(".query." in name or ".proj_attn." in name for name in state) == 8
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    edit(tmp_path / "config.json", drop=["dropout", "add_attention", "class_embed_type"], _diffusers_version="0.0.4")
    edit(tmp_path / "config.json", down_block_types=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"])
    (tmp_path / "modeling_ddpm.py").write_text("raise SystemExit('stray code was run')")
    checkpoint = load(tmp_path)
    assert_same(run(checkpoint.model, GOOGLE_LIKE), run(model, GOOGLE_LIKE))


def edit(path: Path, drop: list[str] | None = None, **values: Any) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in (drop or [])}
    path.write_text(json.dumps({**content, **values}))


def test_a_bare_folder_and_a_single_file(tmp_path: Path) -> None:
    model = theirs(TINY)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        checkpoint = load(source)
        assert torch.equal(run(checkpoint.model, TINY), run(load(tmp_path).model, TINY))
        assert_same(run(checkpoint.model, TINY), run(model, TINY))
        assert checkpoint.schedule == Schedule()
        assert "no scheduler_config.json" in checkpoint.notes[-1]
        assert "DDPMScheduler's defaults" in checkpoint.notes[-1]


def test_missing_fields_mean_the_class_defaults(tmp_path: Path) -> None:
    """A config that says little is what UNet2DModel makes of it, not what google's files say."""
    pipeline().save_pretrained(tmp_path)
    drop = ["norm_eps", "downsample_padding", "freq_shift", "flip_sin_to_cos", "attention_head_dim"]
    edit(tmp_path / "unet/config.json", drop=drop, block_out_channels=[8, 16])
    edit(tmp_path / "scheduler/scheduler_config.json", drop=["variance_type", "clip_sample", "beta_end"])
    checkpoint = load(tmp_path)
    model = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert_same(run(checkpoint.model, TINY), run(model, TINY))
    assert checkpoint.schedule == Schedule()


def test_half_precision_variant(tmp_path: Path) -> None:
    pipeline().to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    checkpoint = load(tmp_path)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    assert_same(run(checkpoint.model, TINY), run(theirs(TINY).half().float(), TINY))
    assert checkpoint.notes == [
        "only the variant 'fp16' is there; it is used",
        "stored in float16, loaded as float32",
    ]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(safe: bool, variant: str | None, tmp_path: Path) -> None:
    model = theirs(TINY)
    model.save_pretrained(tmp_path, max_shard_size="50KB", safe_serialization=safe, variant=variant)
    assert len(list(tmp_path.glob("*-of-*"))) >= 2
    assert_same(run(load(tmp_path).model, TINY), run(model, TINY))
    (index,) = tmp_path.glob("*.index*.json")
    assert_same(run(load(index).model, TINY), run(model, TINY))


def test_shards_in_a_hub_cache_are_links_into_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123abc"
    model = theirs(TINY)
    model.save_pretrained(snapshot, max_shard_size="50KB")
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    assert_same(run(load(snapshot).model, TINY), run(model, TINY))


def test_training_folders_prefer_the_averaged_weights(tmp_path: Path) -> None:
    raw, averaged = theirs(TINY, 1), theirs(TINY, 2)
    step = tmp_path / "checkpoint-200"
    raw.save_pretrained(step / "unet")
    kind, config = type(averaged), averaged.config
    ema = diffusers.training_utils.EMAModel(averaged.parameters(), model_cls=kind, model_config=config)
    ema.save_pretrained(step / "unet_ema")
    raw.save_pretrained(tmp_path / "checkpoint-90" / "unet")
    diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(tmp_path / "scheduler")
    for source in (tmp_path, step, step / "unet_ema"):
        checkpoint = load(source)
        assert_same(run(checkpoint.model, TINY), run(averaged, TINY))
        assert checkpoint.schedule.variance_type == "fixed_large"
        assert any("unet_ema" in note for note in checkpoint.notes) == (source != step / "unet_ema")
    assert any("checkpoint-200" in note for note in load(tmp_path).notes)
    assert_same(run(load(step / "unet").model, TINY), run(raw, TINY))


def test_wrappers_prefixes_are_stripped(tmp_path: Path) -> None:
    model = theirs(TINY)
    model.save_config(tmp_path)
    state = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    assert_same(run(load(tmp_path / "weights.pt").model, TINY), run(model, TINY))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_is_not_weights(name: str, tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a configuration, not weights; name its folder"):
        load(tmp_path / name)


def test_an_activation_s_name_in_capitals(tmp_path: Path) -> None:
    config = {**TINY, "act_fn": "SiLU"}
    pipeline(config).save_pretrained(tmp_path)
    assert_same(run(load(tmp_path).model, config), run(theirs(config), config))


def test_old_fourier_weight_name(tmp_path: Path) -> None:
    model = theirs(CONFIGS["fourier"])
    model.save_config(tmp_path)
    state = {k.replace("time_proj.weight", "time_proj.W"): v for k, v in model.state_dict().items()}
    assert "time_proj.W" in state
    torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    assert_same(run(load(tmp_path / "weights.pt").model, TINY), run(model, TINY))


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"_class_name": "GaussianDDPMScheduler", "timesteps": 300}, Schedule(num_train_timesteps=300)),
        ({"timestep_values": None, "tensor_format": "np", "clip_predicted_image": False}, Schedule(clip_sample=False)),
        ({"predict_epsilon": False}, Schedule(prediction_type="sample")),
        ({"predict_epsilon": True, "timestep_values": [1, 2]}, Schedule()),
    ],
)
def test_old_scheduler_names(old: dict[str, Any], expected: Schedule, tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    content = {"_class_name": "DDPMScheduler", **old}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(content))
    assert load(tmp_path).schedule == expected


# --- presets and overrides ---


def test_skip_blocks_need_their_config(tmp_path: Path) -> None:
    torch.save(theirs(CONFIGS["ncsnpp"]).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"NCSN\+\+'s Skip blocks, .*; put the model's config\.json beside"):
        load(tmp_path / "weights.pt", preset="google")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ncsnpp"])
def test_shapes_and_a_preset_rebuild_the_model(name: str, tmp_path: Path) -> None:
    """Weights alone: the shapes tell the rest of the config, the preset what they do not, overrides the odd ones."""
    config = CONFIGS[name]
    google = config is GOOGLE_LIKE
    model = theirs(config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    unknowable = {k: config[k] for k in ("act_fn", "center_input_sample", "class_embed_type") if k in config}
    if config.get("class_embed_type") == "timestep":
        unknowable.pop("class_embed_type")  # seen in the keys
    odd = {"norm_num_groups": 4, **unknowable} | ({} if google else {"attention_head_dim": 4})
    odd |= {"attn_norm_num_groups": 4} if "attn_norm_num_groups" in config else {}
    checkpoint = load(tmp_path / "weights.pt", preset="google" if google else "diffusers-default", overrides=odd)
    assert_same(run(checkpoint.model, config), run(model, config))
    notes = "; ".join(checkpoint.notes)
    assert "inferred from the shapes: " in notes and "norm_eps=1e-06" in notes if google else "norm_eps=1e-05" in notes
    learned = config.get("out_channels") == 6
    assert checkpoint.schedule.variance_type == ("learned_range" if learned else "fixed_small")
    with pytest.raises(CheckpointError, match=r"no config\.json.*google, diffusers-default"):
        load(tmp_path / "weights.pt")


def test_google_preset_knows_the_released_models(tmp_path: Path) -> None:
    """A state dict shaped like google/ddpm-cifar10-32 gets all that its two files say (CHECKPOINTS, 1.2)."""
    from ddpm_fast.checkpoints import infer

    config = UNetConfig(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert sum(t.numel() for t in state.values()) == 35_746_307
    inferred = infer.config_from_shapes(state)
    assert UNetConfig.from_dict({**infer.preset_config("google", inferred, state), **inferred}) == config
    assert infer.preset_schedule("google", config.block_out_channels) == {"variance_type": "fixed_large"}
    assert infer.preset_schedule("google", (128, 128, 256, 256, 512, 512)) == {"variance_type": "fixed_small"}


def test_overrides_come_last_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    pipeline(num_train_timesteps=100).save_pretrained(tmp_path)
    changed = load(tmp_path, overrides={"freq_shift": 1, "num_train_timesteps": 40, "variance_type": "fixed_large"})
    assert_same(run(changed.model, TINY), run(_with(theirs(TINY), freq_shift=1), TINY))
    assert changed.schedule == Schedule(num_train_timesteps=40, variance_type="fixed_large")
    assert "overridden: freq_shift=1, num_train_timesteps=40, variance_type='fixed_large'" in changed.notes
    with pytest.raises(CheckpointError, match=r"unknown override 'norm_epz'; did you mean norm_eps"):
        load(tmp_path, overrides={"norm_epz": 1e-6})
    with pytest.raises(CheckpointError, match="norm_eps must be a positive number; got 'small'"):
        load(tmp_path, overrides={"norm_eps": "small"})


def _with(model: Any, **changes: Any) -> Any:
    other = diffusers.UNet2DModel(**{**TINY, **changes}).eval()
    other.load_state_dict(model.state_dict())
    return other


# --- hub and bundled model ---


def test_hub_ids_fetch_json_and_the_preferred_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    remote, calls = tmp_path / "remote", []
    pipeline().save_pretrained(remote, safe_serialization=False)
    (remote / "modeling.py").write_text("")
    (remote / "unet/optimizer.bin").write_text("")

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision))
        for path in remote.rglob("*"):
            name = str(path.relative_to(remote))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = load("some-one/a.model@v1")
    assert_same(run(checkpoint.model, TINY), run(theirs(TINY), TINY))
    assert checkpoint.source == "some-one/a.model@v1"
    assert calls == [("some-one/a.model", "v1")] * 2  # no safetensors, so a second call, for .bin
    names = {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert names == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
    }


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"^nobody/nothing is neither .*ConnectionError: no network\)$"):
        load("nobody/nothing")


def test_no_source_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddpm_fast.checkpoints as checkpoints

    save(tmp_path / "pixel-art", ours(TINY), Schedule())
    monkeypatch.setattr(checkpoints, "BUNDLED", tmp_path / "pixel-art")
    assert torch.equal(run(load().model, TINY), run(ours(TINY), TINY))


# --- saving ---


def test_saving_half_precision_and_labels(tmp_path: Path) -> None:
    config = CONFIGS["classes"]
    save(tmp_path / "out", ours(config), Schedule(), dtype=torch.float16, label_names=["cat", "dog"])
    half = load(tmp_path / "out")
    assert half.labels == ["cat", "dog"]
    assert_same(run(half.model, config), run(ours(config).half().float(), config))
    stored = files.read_safetensors(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    save(tmp_path / "out", ours(config), Schedule())
    assert load(tmp_path / "out").labels is None


def test_saving_over_a_folder_keeps_what_is_not_of_the_layout(tmp_path: Path) -> None:
    theirs(TINY, 5).save_pretrained(tmp_path / "unet", max_shard_size="50KB")  # an index that would win
    for name in ("state/step_1.pt", "log.jsonl", "samples/a.png", "unet/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    save(tmp_path, ours(TINY), Schedule())
    for name in ("state/step_1.pt", "log.jsonl", "samples/a.png", "unet/notes.txt"):
        assert (tmp_path / name).read_text() == name
    assert torch.equal(run(load(tmp_path).model, TINY), run(ours(TINY), TINY))
    assert_same(run(diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet"), TINY), run(ours(TINY), TINY))


def test_a_crash_while_saving_leaves_the_old_checkpoint_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_fast.checkpoints import diffusers as module

    real, count = module.write_atomically, 0

    def failing(path: Path, write: Any) -> None:
        nonlocal count
        count += 1
        if count % 4 == 0:  # the fourth file, model_index.json
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(module, "write_atomically", failing)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "new", ours(TINY), Schedule())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "write_atomically", real)
    save(tmp_path / "old", ours(TINY), Schedule())
    monkeypatch.setattr(module, "write_atomically", failing)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "old", ours(TINY, 9), Schedule())
    assert torch.equal(run(load(tmp_path / "old").model, TINY), run(ours(TINY, 9), TINY))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = ours(TINY)
    with pytest.raises(CheckpointError, match="needs a UNet and a Schedule; got DataParallel"):
        save(out, torch.nn.DataParallel(model), Schedule())  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="label_names must be at most 0 strings"):
        save(out, model, Schedule(), label_names=["cat"])
    with pytest.raises(CheckpointError, match="the weights' dtype must be one of"):
        save(out, model, Schedule(), dtype=torch.int8)
    model.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"conv_in\.weight has NaN or infinite values in torch\.float16"):
        save(out, model, Schedule(), dtype=torch.float16)
    model.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1)
    with pytest.raises(CheckpointError, match="not the one that its config describes"):
        save(out, model, Schedule())
    assert not out.exists()
    (out / "unet_ema").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="unet_ema, which would be read in place"):
        save(out, ours(TINY), Schedule())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save(tmp_path / "file", ours(TINY), Schedule())
