"""What a model is and costs, and what this machine can do: the facts behind ``inspect`` and ``doctor``."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import re
import shutil
import sys
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import doctor_checks
from .checkpoints import Checkpoint
from .classes import listed, null_class
from .graphs import why_no_loop
from .ops import recording, reference
from .ops.triton_set import falls_back
from .stages import stage
from .step_table import StepTable, step_table
from .unet import TimeRows, UNet
from .vp_sde import PREDICTORS

EXTRAS = {"eval": "for evaluate", "avatars": "to train on avatars:STYLE", "bench": "for all of bench's providers"}


class _PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one moment; works on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key in self._seen or key in given:
                    continue
                self._seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key, storage.nbytes())
        return result

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def model_cost(model: UNet, height: int, width: int, batch_size: int = 1) -> dict[str, int]:
    """Of one forward pass, from shapes alone (nothing is computed): ``flops`` an image (2 per multiply-add of
    convolutions, linear layers and attention), ``activation_bytes`` at the peak for the batch, in the model's
    dtype, and ``parameters``."""
    ghost = copy.deepcopy(model).to("meta").eval()
    x = torch.empty(batch_size, model.config.in_channels, height, width, dtype=model.dtype, device="meta")
    labels = None
    if model.config.class_embed_type == "identity":
        labels = torch.empty(batch_size, model.config.time_width, dtype=model.dtype, device="meta")
    elif model.class_embedding is not None:
        labels = torch.empty(batch_size, dtype=torch.int64, device="meta")
    t = torch.empty(batch_size, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        ghost(x, t, labels)
    with torch.no_grad(), _PeakMemory() as memory:
        ghost(x, t, labels)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops.get_total_flops() // batch_size,
        "activation_bytes": memory.peak,
    }


def fallbacks(model: UNet, chain: StepTable) -> dict[str, int]:
    """Why calls of a step in bfloat16 have no fused kernel and run on torch's operations, and how many do."""
    reasons: dict[str, int] = {}

    def noting(operation: str, arguments: Any) -> str | None:
        why = falls_back(operation, arguments)
        if why:
            reasons[why] = reasons.get(why, 0) + 1
        return why

    with torch.device("meta"), torch.no_grad():
        ghost = UNet(model.config).eval().to(torch.bfloat16)
        side = 2**model.config.levels  # twice the least: torch refuses a norm over one value
        x = torch.empty(1, model.config.in_channels, side, side, dtype=torch.bfloat16)
        width = sum(block.time_emb_proj.out_features for block in ghost.residual_blocks())
        ops, _ = recording(replace(reference(), falls_back=noting))
        out = ghost.run(x, TimeRows(table=torch.empty(1, width), t=torch.empty(1)), ops)
    why = falls_back("sampler_step", {"out": out, "thresholding": chain.thresholding})
    return {**reasons, **({why: 1} if why else {})}


@stage("counting what a step costs")
def describe(checkpoint: Checkpoint, batch_size: int = 1) -> dict[str, Any]:
    """Architecture, schedule, cost and the loader's notes of a checkpoint, JSON-ready."""
    model = checkpoint.model
    size = model.config.image_size
    chain = step_table(checkpoint.schedule)
    embedded = model.config.num_class_embeds
    nobody = null_class(embedded, checkpoint.labels)
    facts: dict[str, Any] = {
        "source": checkpoint.source,
        "family": checkpoint.family,
        "notes": list(checkpoint.notes),
        "model": model.config.to_dict(),
        "schedule": checkpoint.schedule.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": None if embedded is None else embedded - (nobody is not None),
        "labels": checkpoint.labels,
        "null_class": nobody,
        "steps": len(chain),
        "on_torch_operations": fallbacks(model, chain) if isinstance(model, UNet) else {},
    }
    if size is None:
        facts["notes"].append("sample_size is not stated, so the cost of an image is not known")
        return facts
    height, width = size
    cost = model_cost(model, height, width, batch_size)
    facts |= {
        "batch_size": batch_size,
        "gflop_per_image_and_step": cost["flops"] / 1e9,
        "gflop_per_image": cost["flops"] / 1e9 * len(chain),
        "weights_mib": {"float32": cost["parameters"] * 4 / 2**20, "bfloat16": cost["parameters"] * 2 / 2**20},
        "peak_activations_mib": cost["activation_bytes"] / 2**20,
    }
    return facts


def describe_text(facts: dict[str, Any]) -> str:
    """`describe`'s facts for a person."""
    m, s = facts["model"], facts["schedule"]
    size, channels = m.get("sample_size", m.get("image_size")), m.get("in_channels", m.get("channels"))
    size = size if isinstance(size, (list, tuple)) else [size] * 2
    sides = "size not stated" if size[0] is None else f"{size[0]} x {size[1]}"
    lines = [
        f"{facts['source']}  ({facts['family']})",
        f"  images      {sides}, {channels} channel{'s' * (channels != 1)}",
        f"  parameters  {facts['parameters']:,}",
    ]
    if facts.get("classes"):
        none = "" if facts["null_class"] is None else f"; {facts['null_class']} stands for none, for guidance"
        lines.append(f"  classes     {facts['classes']}: {listed(facts['classes'], facts['labels'])}{none}")
    lines += _lucidrains_lines(m) if "dim_mults" in m else _unet_lines(m)
    betas = "trained betas" if s["trained_betas"] else f"{s['beta_schedule']} {s['beta_start']}..{s['beta_end']}"
    process = [f"T={s['num_train_timesteps']}", betas, s["prediction_type"]]
    process += [s["variance_type"]] if s.get("method", "ddpm") == "ddpm" else []  # DDIM's is eta's
    lines.append("  schedule    " + ", ".join(process))
    lines += _drawing_lines(s, facts["steps"])
    lines += [
        f"  operations  {count} x {why}, so on torch's operations"
        for why, count in facts["on_torch_operations"].items()
    ]
    if "gflop_per_image_and_step" in facts:
        lines += [
            f"  cost        {facts['gflop_per_image_and_step']:.3f} GFLOP an image and step, "
            f"{facts['gflop_per_image'] / 1e3:,.3f} TFLOP an image of {facts['steps']} steps (2 x MAC)",
            f"  memory      weights {facts['weights_mib']['float32']:.1f} MiB in float32; activations at their peak "
            f"{facts['peak_activations_mib']:.1f} MiB at batch {facts['batch_size']}",
        ]
    lines += [f"  note        {note}" for note in facts["notes"]]
    return "\n".join(lines)


def _unet_lines(m: dict[str, Any]) -> list[str]:
    lines = []
    for i, (channels, down) in enumerate(zip(m["block_out_channels"], m["down_block_types"])):
        up = m["up_block_types"][-1 - i]
        lines.append(f"  level {i}     {channels:>4} channels  {m['layers_per_block']} blocks  {down} / {up}")
    heads = "attention_head_dim" if m.get("num_attention_heads") is None else "num_attention_heads"
    odd = {k: m[k] for k in ("norm_eps", "norm_num_groups", heads, "downsample_padding")}
    odd |= {k: m[k] for k in ("freq_shift", "flip_sin_to_cos", "resnet_time_scale_shift", "time_embedding_type")}
    if m.get("time_proj_channels") is not None:
        odd["time_proj_channels"] = m["time_proj_channels"]
    if m.get("block_scale_factor", 1) != 1:
        odd["block_scale_factor"] = f"{m['block_scale_factor']:g}"
    odd |= {k: m[k] for k in ("up_attention", "resnet_resample_shortcut") if k in m}
    if odd.get("attention_head_dim", 1) is None:
        odd["attention_head_dim"] = "None (one head)"
    return [*lines, "  settings    " + ", ".join(f"{k}={v}" for k, v in odd.items())]


def _drawing_lines(s: dict[str, Any], steps: int) -> list[str]:
    """The method, steps and times, where they are not DDPM's over all timesteps as they are."""
    lines = []
    method = s.get("method", "ddpm")
    if method != "ddpm" or steps != s["num_train_timesteps"]:
        eta = f", eta {s.get('eta', 0):g}" if method == "ddim" else ""
        name = method if method in PREDICTORS else method.upper()
        lines.append(f"  draws       {name} of {steps} steps{eta}, unless asked otherwise")
    if s.get("time_scale", 1) != 1 or s.get("time_offset"):
        plus = f" plus {s['time_offset']:g}" if s.get("time_offset") else ""
        lines.append(
            f"  times       the network is given time_scale={s.get('time_scale', 1):g} times the timestep{plus}"
        )
    return lines


def _lucidrains_lines(m: dict[str, Any]) -> list[str]:
    widths = [m["init_dim"], *(round(mult * m["dim"]) for mult in m["dim_mults"])]
    lines = [
        f"  level {i}     {inner:>4} to {outer} channels  2 blocks  {'full' if full else 'linear'} attention, "
        f"{heads} heads of {dim_head}"
        for i, (inner, outer, full, heads, dim_head) in enumerate(
            zip(widths, widths[1:], m["full_attn"], m["attn_heads"], m["attn_dim_head"])
        )
    ]
    names = ("self_condition", "num_mem_kv", "block_norm", "channel_norm", "standardised", "values_over_pixels")
    lines.append("  settings    " + ", ".join(f"{k}={m[k]}" for k in (*names, "cosine_scale", "downsample")))
    return [*lines, "  operations  torch's, not the fused kernels; the step, its noise and the graph are ours"]


@stage("looking at devices and packages")
def diagnose() -> dict[str, Any]:
    """Versions, devices, what works here and what "auto" takes for it, and what is missing. JSON-ready.

    The compiler is tried, files are written to the folders that are used, and a GPU runs the smallest kernel.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("ddpm-fast", "triton", "numpy", "safetensors", "huggingface_hub", "diffusers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "capability": f"sm_{p.major}{p.minor}", "memory_gib": p.total_memory / 2**30})
    findings = []
    if gpus and versions["triton"]:
        findings.append("fused Triton kernels can run on the GPUs above")
    elif gpus:
        findings.append("a GPU is here but triton is not installed: pip install triton")
    else:
        findings.append("no CUDA GPU is visible to torch: sampling runs on the CPU")
    devices = _devices(len(gpus))
    compiler, folders = doctor_checks.compiler_facts(), doctor_checks.cache_facts()
    auto = doctor_checks.auto_facts(devices, compiler["problem"])
    findings += doctor_checks.findings(compiler, folders, auto)
    findings += _missing_extras()
    loops = {name: why_no_loop(torch.device(name)) for name in devices}
    findings += [_loop_finding(name, why_not) for name, why_not in loops.items()]
    if not gpus and shutil.which("nvidia-smi"):
        findings.append("nvidia-smi is installed, but this torch sees no GPU; its build is " + _torch_build())
    if versions["triton"] is None:
        findings.append("triton is not installed (it exists for Linux only); nothing but the fused kernels needs it")
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": sys.executable,
        "cpu_threads": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch_build": _torch_build(),
        "gpus": gpus,
        "compiler": compiler,
        "folders": folders,
        "auto": auto,
        "why_no_graph_loop": loops,
        "findings": findings,
    }


def _devices(gpus: int) -> list[str]:
    return [f"cuda:{i}" for i in range(gpus)] or ["cpu"]


def _loop_finding(device: str, why_not: str | None) -> str:
    if why_not is None:
        return f"{device}: a whole trajectory is one launch (graph=loop)"
    return f"{device}: the loop of steps cannot run on the device (graph=loop): {why_not}"


def _missing_extras() -> list[str]:
    """By what this installation's metadata ask for; of a tree that is not installed nothing is known."""
    try:
        required = importlib.metadata.requires("ddpm-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    findings = []
    for extra, purpose in EXTRAS.items():
        of_it = [line.partition(";")[0] for line in required if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        names = [match[0] for line in of_it if (match := re.match(r"[\w.-]+", line))]
        missing = [name for name in names if not _installed(name)]
        if missing:
            findings.append(f'{purpose}: pip install "ddpm-fast[{extra}]" (not installed: {", ".join(missing)})')
    return findings


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _torch_build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def diagnose_text(facts: dict[str, Any]) -> str:
    """`diagnose`'s facts for a person."""
    lines = [f"{name:<16} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'platform':<16} {facts['platform']}, torch built for {facts['torch_build']}")
    lines.append(f"{'cpu':<16} {facts['cpu_threads']} threads, {facts['cpu_instructions']}")
    lines += [f"{'gpu':<16} {g['name']}, {g['capability']}, {g['memory_gib']:.0f} GiB" for g in facts["gpus"]]
    return "\n".join(lines + [f"- {finding}" for finding in facts["findings"]])
