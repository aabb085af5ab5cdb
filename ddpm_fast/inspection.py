"""What a model is and costs, and what this machine can do: the facts behind ``inspect`` and ``doctor``."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import shutil
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .checkpoints import Checkpoint
from .unet import UNet


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


def describe(checkpoint: Checkpoint, batch_size: int = 1) -> dict[str, Any]:
    """Architecture, schedule, cost and the loader's notes of a checkpoint, JSON-ready."""
    model = checkpoint.model
    size = model.config.image_size
    facts: dict[str, Any] = {
        "source": checkpoint.source,
        "family": checkpoint.family,
        "notes": list(checkpoint.notes),
        "model": model.config.to_dict(),
        "schedule": checkpoint.schedule.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "labels": checkpoint.labels,
    }
    if size is None:
        facts["notes"].append("sample_size is not stated, so the cost of an image is not known")
        return facts
    cost = model_cost(model, *size, batch_size=batch_size)
    facts |= {
        "batch_size": batch_size,
        "gflop_per_image_and_step": cost["flops"] / 1e9,
        "gflop_per_image": cost["flops"] / 1e9 * checkpoint.schedule.num_train_timesteps,
        "weights_mib": {"float32": cost["parameters"] * 4 / 2**20, "bfloat16": cost["parameters"] * 2 / 2**20},
        "peak_activations_mib": cost["activation_bytes"] / 2**20,
    }
    return facts


def describe_text(facts: dict[str, Any]) -> str:
    """`describe`'s facts for a person."""
    m, s = facts["model"], facts["schedule"]
    size = m["sample_size"] if isinstance(m["sample_size"], (list, tuple)) else [m["sample_size"]] * 2
    lines = [
        f"{facts['source']}  ({facts['family']})",
        f"  images      {size[0]} x {size[1]}, {m['in_channels']} channel{'s' * (m['in_channels'] != 1)}",
        f"  parameters  {facts['parameters']:,}",
    ]
    if facts.get("labels"):
        lines.append(f"  labels      {', '.join(facts['labels'])}")
    elif m["num_class_embeds"]:
        lines.append(f"  classes     {m['num_class_embeds']}")
    for i, (channels, down) in enumerate(zip(m["block_out_channels"], m["down_block_types"])):
        up = m["up_block_types"][-1 - i]
        lines.append(f"  level {i}     {channels:>4} channels  {m['layers_per_block']} blocks  {down} / {up}")
    odd = {k: m[k] for k in ("norm_eps", "norm_num_groups", "attention_head_dim", "downsample_padding")}
    odd |= {k: m[k] for k in ("freq_shift", "flip_sin_to_cos", "resnet_time_scale_shift", "time_embedding_type")}
    lines.append("  settings    " + ", ".join(f"{k}={v}" for k, v in odd.items()))
    betas = "trained betas" if s["trained_betas"] else f"{s['beta_schedule']} {s['beta_start']}..{s['beta_end']}"
    lines.append(f"  schedule    T={s['num_train_timesteps']}, {betas}, {s['prediction_type']}, {s['variance_type']}")
    if "gflop_per_image_and_step" in facts:
        lines += [
            f"  cost        {facts['gflop_per_image_and_step']:.3f} GFLOP an image and step, "
            f"{facts['gflop_per_image'] / 1e3:,.3f} TFLOP an image of {s['num_train_timesteps']} steps (2 x MAC)",
            f"  memory      weights {facts['weights_mib']['float32']:.1f} MiB in float32; activations at their peak "
            f"{facts['peak_activations_mib']:.1f} MiB at batch {facts['batch_size']}",
        ]
    lines += [f"  note        {note}" for note in facts["notes"]]
    return "\n".join(lines)


def diagnose() -> dict[str, Any]:
    """Versions, devices, what is accelerated here and what is missing, JSON-ready."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("ddpm-fast", "torch", "triton", "numpy", "safetensors", "huggingface_hub", "diffusers"):
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
        findings.append("no CUDA GPU is visible to torch: the plain PyTorch operations run on the CPU")
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
        "findings": findings,
    }


def _torch_build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def diagnose_text(facts: dict[str, Any]) -> str:
    """`diagnose`'s facts for a person."""
    lines = [f"{name:<16} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'platform':<16} {facts['platform']}, torch built for {facts['torch_build']}")
    lines.append(f"{'cpu':<16} {facts['cpu_threads']} threads, {facts['cpu_instructions']}")
    lines += [f"{'gpu':<16} {g['name']}, {g['capability']}, {g['memory_gib']:.0f} GiB" for g in facts["gpus"]]
    return "\n".join(lines + [f"- {finding}" for finding in facts["findings"]])
