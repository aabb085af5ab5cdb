"""Inference engines that run an exported network: OpenVINO and ONNX Runtime, on diffusers' U-Net and scheduler."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .peers import Flat, Looped, build
from .providers import Case


def openvino_lacks(device: torch.device, dtype: torch.dtype) -> str | None:
    """bfloat16 is silently float32 where the processor has none."""
    if dtype != torch.bfloat16:
        return None
    from openvino import Core

    able = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in able else "this processor has no bfloat16 arithmetic, and OpenVINO would use float32"


def openvino(case: Case, dtype: torch.dtype) -> Looped:
    """Traced, with static shapes, tuned for latency, on as many threads as torch has."""
    import openvino as ov

    unet, scheduler = build(case)
    x, t = torch.zeros(case.shape), torch.tensor(1)
    with torch.no_grad(), _quiet():
        network = ov.convert_model(Flat(unet, case.labels()), example_input=(x, t), input=[list(case.shape), []])
    request = ov.compile_model(
        network,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    ).create_infer_request()

    def run(x: Tensor, t: Tensor) -> Tensor:
        found = request.infer([x.numpy(), t.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    return Looped(case, run, scheduler, torch.contiguous_format)


def onnxruntime(case: Case, dtype: torch.dtype) -> Looped:
    """Exported by torch.onnx with static shapes, all of the runtime's optimisations, as many threads as torch has."""
    import onnxruntime as ort

    unet, scheduler = build(case)
    options: Any = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        arguments = (torch.zeros(case.shape), torch.tensor(1))
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                Flat(unet, case.labels()), arguments, str(path), input_names=["x", "t"], dynamo=True, verbose=False
            )
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])

    return Looped(case, run, scheduler, torch.contiguous_format)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on tracing, which hold for shapes that change; these do not."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
