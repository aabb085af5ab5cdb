"""Names of the providers, apart from their code: the command line knows them before torch is imported."""

from __future__ import annotations

PROVIDERS = (
    "reference",
    "cpu",
    "winograd",
    "triton-none",
    "triton-step",
    "triton-chunk",
    "triton-loop",
    "triton",
    "diffusers",
    "diffusers-channels-last",
    "diffusers-compile",
    "openvino",
    "onnxruntime",
    "guided",
)
