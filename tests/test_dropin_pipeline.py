"""Which pipelines accelerate takes, and the object that it gives."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, VQModel
from dropin_setup import SHORT, SMALL, agrees, difference, drawn, pipeline
from models import diffusers_unet
from torch import nn

import ddpm_fast as df
from ddpm_fast.dropin import Accelerated

# --- the pipeline ---


class Brighter(DDPMPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = DDPMPipeline.__call__(self, *args, **kwargs)
        result.images = result.images * 0.5
        return result


class HalfWay(DDPMPipeline):
    def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
        return iterable[: len(iterable) // 2]


class Dressed(DDPMPipeline):
    """wraps copies the name and the module of what it wraps."""

    @functools.wraps(DDPMPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Brighter.__call__(self, *args, **kwargs)


class DressedHalf(DDPMPipeline):
    @functools.wraps(DDPMPipeline.progress_bar)
    def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
        return iterable[: len(iterable) // 2]


class Plain(DDPMPipeline):
    """With parts of diffusers' pipeline alone."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__(unet, scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)


class Negative(DDPMPipeline):
    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> Any:
        return DDPMPipeline.numpy_to_pil(1 - images)


class DressedNegative(DDPMPipeline):
    numpy_to_pil = staticmethod(
        functools.wraps(DDPMPipeline.numpy_to_pil)(lambda images: Negative.numpy_to_pil(images))
    )


@pytest.mark.parametrize(
    "kind, method",
    [(Brighter, "__call__"), (HalfWay, "progress_bar"), (Dressed, "__call__"), (DressedHalf, "progress_bar")],
)
def test_a_pipeline_that_draws_by_code_of_its_own_is_refused(kind: Any, method: str):
    plain = pipeline()
    p = pipeline(kind)
    assert difference(drawn(p), drawn(plain)) > 1e-2
    with pytest.raises(
        ValueError, match=rf"this {kind.__name__} .* by a {method} of its own \({kind.__name__}.{method}"
    ) as error:
        df.accelerate(p)
    assert "DDPMPipeline(pipeline.unet, pipeline.scheduler)" in str(error.value)
    assert agrees(drawn(df.accelerate(DDPMPipeline(p.unet, p.scheduler))), plain)


def test_methods_that_were_replaced_are_refused(monkeypatch: pytest.MonkeyPatch):
    p = pipeline()
    fast = df.accelerate(p)
    p.progress_bar = lambda iterable: iterable[1:]
    with pytest.raises(ValueError, match="hands out the timesteps by a progress_bar of its own"):
        drawn(fast)
    del p.progress_bar
    for patch in (lambda self: None, functools.wraps(DDPMPipeline.__call__)(lambda self: None)):
        monkeypatch.setattr(DDPMPipeline, "__call__", patch)
        with pytest.raises(ValueError, match="draws the images by a __call__ of its own"):
            drawn(fast)


def test_a_subclass_that_draws_as_its_base_is_taken():
    p = pipeline(Plain)
    assert agrees(drawn(df.accelerate(p)), p)


@pytest.mark.parametrize("kind", [Negative, DressedNegative])
def test_pictures_are_made_by_the_pipeline_s_own_method(kind: Any):
    p = pipeline(kind)
    ours, theirs = (drawn(q, output_type="pil") for q in (df.accelerate(p), p))
    plain = drawn(pipeline(), output_type="pil")
    assert difference(theirs[0], plain[0]) > 50
    assert max(difference(a, b) for a, b in zip(ours, theirs)) <= 1


def test_pipelines_with_other_parts_are_refused_by_name():
    vqvae = VQModel(block_out_channels=(4,), norm_num_groups=2)
    p = LDMPipeline(vqvae, diffusers_unet(SMALL), DDIMScheduler(**SHORT))
    with pytest.raises(ValueError, match=r"this LDMPipeline has vqvae \(VQModel\) too, so its unet draws latents"):
        df.accelerate(p)

    class Coded(DDPMPipeline):
        def __init__(self, unet: Any, scheduler: Any, vae: Any, text_encoder: Any = None):
            super().__init__(unet, scheduler)
            self.register_modules(vae=vae, text_encoder=text_encoder)

    with pytest.raises(ValueError, match=r"this Coded has vae \(VQModel\) too"):
        df.accelerate(Coded(diffusers_unet(SMALL), DDPMScheduler(**SHORT), vqvae))


def test_other_pipelines_of_the_same_parts_are_refused_with_what_to_do():
    unet = diffusers_unet(SMALL)
    p = diffusers.PNDMPipeline(unet, diffusers.PNDMScheduler(**SHORT))
    with pytest.raises(ValueError, match=r"got PNDMPipeline; to draw by DDIM, accelerate DDIMPipeline\(pipeline.unet"):
        df.accelerate(p)
    p = diffusers.ScoreSdeVePipeline(unet, diffusers.ScoreSdeVeScheduler())
    with pytest.raises(ValueError, match=r"DDPMPipeline or DDIMPipeline; got ScoreSdeVePipeline$"):
        df.accelerate(p)


# --- the object ---


def test_it_shows_what_it_is():
    fast = df.accelerate(pipeline(sample_size=(8, 12)))
    count = sum(p.numel() for p in fast.unet.parameters())
    assert repr(fast) == (
        f"Accelerated(DDPMPipeline of UNet2DModel of {count:,} parameters for images of 3x8x12, DDPMScheduler of 20 "
        "timesteps; computes in float32 on cpu, ops='auto', graph='auto')"
    )
    fast.to(torch.bfloat16)
    assert "computes in bfloat16 (the pipeline's own network is in float32) on cpu" in repr(fast)
    fast.pipeline.unet = nn.Identity()
    assert repr(fast) == "Accelerated(DDPMPipeline of Identity and DDPMScheduler)"
    ddim = df.accelerate(pipeline(DDIMPipeline, DDIMScheduler), ops=df.ops.reference())
    assert repr(ddim).startswith("AcceleratedDDIM(DDIMPipeline of ") and "ops='reference'" in repr(ddim)


def test_to_takes_a_pipeline_s_forms_and_says_what_it_does_to_its_own_network():
    p = pipeline()
    fast = df.accelerate(p)
    assert fast.to("cuda:0", torch.float16) is fast
    assert (fast.device, fast.dtype) == (torch.device("cuda:0"), torch.float16)
    fast.to(device=torch.device("cpu"), dtype=torch.bfloat16, silence_dtype_warnings=True)
    assert (fast.device, fast.dtype, fast.unet.dtype) == (torch.device("cpu"), torch.bfloat16, torch.float32)
    assert "``fast.unet.dtype`` may differ from ``fast.dtype``" in (Accelerated.to.__doc__ or "")
    fast.pipeline.to(torch.bfloat16)  # what the docstring says to do
    assert fast.unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"computes in float32, bfloat16, float16; got torch\.float64"):
        fast.to(torch.float64)


@pytest.mark.parametrize("kind, steps", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_arguments_of_other_pipelines_are_named(kind: Any, steps: Any):
    p = pipeline(kind, steps)
    fast = df.accelerate(p)
    for call in (p, fast):
        with pytest.raises(TypeError, match="callback_on_step_end"):
            call(num_inference_steps=2, callback_on_step_end=print)
    with pytest.raises(TypeError, match=r"has no argument callback_on_step_end; .*Sampler.*callback="):
        fast(num_inference_steps=2, callback_on_step_end=print)
    with pytest.raises(TypeError, match=f"^a {kind.__name__}'s call has no argument height, width$"):
        fast(num_inference_steps=2, height=8, width=8)


def test_a_copy_draws_the_same_and_is_its_own():
    fast = df.accelerate(pipeline())
    expected = drawn(fast)
    other = copy.deepcopy(fast)
    assert other.pipeline is not fast.pipeline and difference(drawn(other), expected) == 0
    with torch.no_grad():
        other.unet.conv_out.bias += 0.5
    assert agrees(drawn(other), other.pipeline)
    assert difference(drawn(other), expected) > 1e-2 and difference(drawn(fast), expected) == 0


def test_threads_take_turns():
    fast = df.accelerate(pipeline())
    expected = {seed: fast(2, torch.Generator().manual_seed(seed), 10, "np").images for seed in range(6)}
    got: dict[int, Any] = {}

    def draw(seed: int) -> None:
        got[seed] = fast(2, torch.Generator().manual_seed(seed), 10, "np").images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: difference(got[seed], images) for seed, images in expected.items()} == dict.fromkeys(expected, 0.0)
