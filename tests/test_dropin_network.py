"""accelerate compares a pipeline's network with its own whenever it reads one.

The oracle is the pipeline itself, in the same process: what is refused changes its images, or is code that could.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from dropin_setup import agrees, difference, drawn, pipeline
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

import ddpm_fast as df
from ddpm_fast import dropin
from ddpm_fast.network_check import TIMES_OURS, check_network
from ddpm_fast.pipelines import model_of


def circular(p: Any) -> None:
    for module in p.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def one_padding(p: Any) -> None:
    p.unet.up_blocks[0].resnets[0].conv2.padding_mode = "reflect"


def replaced_forward(module: Any) -> None:
    forward = module.forward

    def brighter(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if isinstance(result, Tensor):
            return result + 0.1
        result.sample = result.sample + 0.1
        return result

    module.forward = brighter


def late(module: Any, args: Any, output: Any) -> None:
    """Acts at some timesteps alone, which no trial at others can find."""
    if int(args[1]) < 5:
        output.sample.mul_(-1)


class Loud(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Mixing(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True).expand(x.shape)


class Noisy(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


class Uniform:
    """An attention processor that looks at nothing."""

    def __call__(self, attention: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def swapped(name: str, kind: type[nn.Module], *args: int) -> Callable[[Any], None]:
    """Put a module of another class in the place of one, with the same weights."""

    def change(p: Any) -> None:
        module = kind(*args)
        module.__dict__.update(getattr(p.unet, name).__dict__)
        setattr(p.unet, name, module)

    return change


NETWORKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "circular": (circular, "conv_in.padding_mode is 'circular', not 'zeros'"),
    "one padding": (one_padding, "up_blocks.0.resnets.0.conv2.padding_mode is 'reflect', not 'zeros'; undo"),
    "scale": (lambda p: setattr(p.unet.mid_block.resnets[1], "output_scale_factor", 2.0), "output_scale_factor is 2.0"),
    "another module": (swapped("conv_out", Loud, 1, 1, 1), r"leave out: Loud\.forward on conv_out; remove it"),
    "images mixed": (swapped("conv_norm_out", Mixing, 1, 1), r"leave out: Mixing\.forward on conv_norm_out;"),
    "noise": (swapped("conv_norm_out", Noisy, 1, 1), r"leave out: Noisy\.forward on conv_norm_out;"),
    "activation": (lambda p: setattr(p.unet, "conv_act", nn.Tanh()), "conv_act is a Tanh, not a SiLU"),
    "hook": (lambda p: p.unet.register_forward_hook(late), r"leave out: a forward hook \(late\); remove it first"),
    "pre-hook": (
        lambda p: p.unet.mid_block.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:])),
        r"a forward pre-hook on mid_block \(.*lambda.*\)",
    ),
    "forward": (lambda p: replaced_forward(p.unet), "leave out: forward, replaced by .*brighter"),
    "mid forward": (lambda p: replaced_forward(p.unet.mid_block), "mid_block.forward, replaced by .*brighter"),
    "processor": (
        lambda p: setattr(p.unet.mid_block.attentions[0], "processor", Uniform()),
        r"an attention processor on mid_block.attentions.0 \(Uniform\)",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_computes_something_else_is_refused(name: str, when: str):
    change, message = NETWORKS[name]
    p = pipeline()
    plain = drawn(p)
    fast = df.accelerate(p) if when == "after" else None
    if fast is not None:
        assert agrees(drawn(fast), p, plain)
    change(p)
    assert difference(drawn(p), plain) > 1e-3
    with pytest.raises(ValueError, match=message) as error:
        df.accelerate(p) if fast is None else drawn(fast)
    assert "\n" not in str(error.value)


def test_a_learned_time_embedding():
    """Its rows are looked up, so timesteps are whole numbers in float64 too."""
    p = pipeline(time_embedding_type="learned", num_train_timesteps=20)
    fast = df.accelerate(p)
    before = drawn(fast)
    assert agrees(before, p)
    p.unet.time_proj.weight.data += 1
    after = drawn(fast)
    assert agrees(after, p) and difference(after, before) > 1e-3
    p.unet.to(torch.bfloat16)
    assert drawn(fast, generator=None).shape == before.shape


RESHAPED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a wider kernel": (
        lambda p: setattr(p.unet, "conv_in", nn.Conv2d(3, 4, 5, padding=2)),
        r"conv_in.weight is (4, 3, 5, 5), not (4, 3, 3, 3); ",
    ),
    "a narrower kernel": (
        lambda p: setattr(p.unet, "conv_out", nn.Conv2d(4, 3, 1)),
        r"conv_out.weight is (3, 4, 1, 1), not (3, 4, 3, 3); ",
    ),
    "groups": (
        lambda p: setattr(p.unet.mid_block.resnets[0], "conv1", nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        "mid_block.resnets.0.conv1.weight is (8, 4, 3, 3), not (8, 8, 3, 3); ",
    ),
    "registered": (
        lambda p: p.unet.register_to_config(in_channels=4),
        r"conv_in.weight is (4, 3, 3, 3), not (4, 4, 3, 3); ",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", RESHAPED)
def test_layers_of_other_shapes_are_refused_by_name(name: str, when: str):
    change, message = RESHAPED[name]
    p = pipeline()
    fast = df.accelerate(p) if when == "after" else None
    change(p)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        df.accelerate(p) if fast is None else drawn(fast)
    assert "\n" not in str(error.value)


def test_dropout_that_is_in_force_is_refused():
    p = pipeline(dropout=0.2)
    fast = df.accelerate(p)
    plain = drawn(p)
    p.unet.train()
    assert difference(drawn(p), plain) > 1e-3
    with pytest.raises(ValueError, match=r"in training mode with dropout 0.2.*call pipeline.unet.eval\(\) first"):
        drawn(fast)
    p.unet.eval()
    assert agrees(drawn(fast), p, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_far_below_what_is_refused_and_padding_far_above(dtype: torch.dtype):
    """The limit is several times our own rounding; circular padding must be several times the limit."""
    p = pipeline()
    p.unet.to(dtype)
    check_network(p.unet, p.unet, model_of(p.unet), 20)
    circular(p)
    with pytest.raises(ValueError) as error:
        check_network(p.unet, p.unet, model_of(p.unet), 20)
    found = re.search(r"differs by (\S+) of its scale, where rounding gives (\S+);", str(error.value))
    assert found is not None
    off, rounding = map(float, found.groups())
    assert off > 4 * TIMES_OURS * rounding
    assert rounding < {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


class Renamed(nn.GroupNorm):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def extra_repr(self) -> str:
        return "renamed"


# --- code that acts at some steps alone, which no trial at others can find ---


def counting(module: nn.Module, method: str = "forward", wraps: bool = False) -> None:
    """Give a module a class whose method, at each fifth call from the fourth on, gives twice as much."""
    base: Any = type(module)
    calls = [0]

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(base, method)(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] % 5 == 4:
            (result if isinstance(result, Tensor) else result.sample).mul_(2)
        return result

    if wraps:
        other = functools.wraps(getattr(base, method))(other)
    module.__class__ = type("Counting", (base,), {method: other, "__module__": __name__})


def in_a_wrapper(p: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: Any):
            super().__init__()
            self.module, self.config, self.dtype, self.device = module, module.config, module.dtype, module.device

        def forward(self, x: Tensor, t: Any) -> Any:
            result = self.module(x, t)
            result.sample = result.sample * (2 if int(t) < 5 else 1)
            return result

    object.__setattr__(p, "unet", Wrapper(p.unet))


def replaced_method(p: Any) -> None:
    attention = p.unet.mid_block.attentions[0]
    head_to_batch_dim = attention.head_to_batch_dim
    attention.head_to_batch_dim = functools.wraps(head_to_batch_dim)(lambda *args: head_to_batch_dim(*args))


def dressed_processor(p: Any) -> None:
    kind: Any = type(p.unet.mid_block.attentions[0].processor)
    call = functools.wraps(kind.__call__)(lambda self, attention, x, *a, **k: x)
    p.unet.mid_block.attentions[0].processor = type("Q", (kind,), {"__call__": call, "__module__": kind.__module__})()


LATE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "block": (lambda p: counting(p.unet.mid_block), r"leave out: Counting\.forward on mid_block; remove it first"),
    "dressed": (lambda p: counting(p.unet.mid_block, wraps=True), r"leave out: Counting\.forward on mid_block; "),
    "activation": (lambda p: counting(p.unet.conv_act), r"leave out: Counting\.forward on conv_act; "),
    "time": (lambda p: counting(p.unet.time_proj), r"leave out: Counting\.forward on time_proj; "),
    "call": (lambda p: counting(p.unet, "__call__"), r"leave out: Counting\.__call__; "),
    "call of a block": (lambda p: counting(p.unet.mid_block, "_call_impl"), r"Counting\._call_impl on mid_block; "),
    "inner": (lambda p: counting(p.unet.conv_out, "_conv_forward"), r"Counting\._conv_forward on conv_out; "),
    "wrapper": (in_a_wrapper, r"a Wrapper around a UNet2DModel: set pipeline\.unet = pipeline\.unet\.module$"),
    "method": (replaced_method, r"head_to_batch_dim, replaced by .* on mid_block\.attentions\.0; "),
    "processor": (dressed_processor, r"an attention processor on mid_block\.attentions\.0 \(Q\); "),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", LATE)
def test_code_that_acts_at_some_steps_alone_is_refused(name: str, when: str):
    change, message = LATE[name]
    p = pipeline()
    plain = drawn(p, num_inference_steps=5)
    fast = df.accelerate(p) if when == "after" else None
    change(p)
    assert difference(drawn(p, num_inference_steps=5), plain) > 1e-3 or name in ("method", "call of a block")
    with pytest.raises(ValueError, match=message) as error:
        df.accelerate(p) if fast is None else drawn(fast)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pre", [False, True])
def test_hooks_on_all_modules_are_refused_unless_they_are_torch_s(pre: bool):
    p = pipeline()
    fast = df.accelerate(p)
    expected = drawn(fast)
    register: Any = nn.modules.module.register_module_forward_pre_hook
    register = register if pre else nn.modules.module.register_module_forward_hook
    handle = register(late)
    try:
        for call in (lambda: drawn(fast), lambda: df.accelerate(p)):
            with pytest.raises(ValueError, match=rf"a forward {'pre-' * pre}hook on all modules \(late\); remove it"):
                call()
    finally:
        handle.remove()
    with ModuleTracker():  # torch's own, which registers hooks of both kinds
        assert difference(drawn(fast), expected) == 0


def test_methods_patched_into_the_libraries_are_refused(monkeypatch: pytest.MonkeyPatch):
    p = pipeline()
    fast = df.accelerate(p)
    forward = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", functools.wraps(forward)(lambda *args: forward(*args)))
    for call in (lambda: drawn(fast), lambda: df.accelerate(p)):
        with pytest.raises(ValueError, match=r"leave out: ResnetBlock2D\.forward, replaced on down_blocks"):
            call()


def compiled_forward(p: Any) -> None:
    p.unet.forward = torch.compile(p.unet.forward)  # compiles at its first call, which never comes


SAME: dict[str, Callable[[Any], Any]] = {
    "training mode without dropout": lambda p: p.unet.train(),
    "another attention processor": lambda p: setattr(p.unet.mid_block.attentions[0], "processor", AttnProcessor()),
    "channels_last": lambda p: p.unet.to(memory_format=torch.channels_last),
    "a class without code of its own": swapped("conv_norm_out", Renamed, 1, 1),
}


@pytest.mark.parametrize("name", SAME)
def test_a_network_that_computes_the_same_is_taken(name: str):
    p = pipeline()
    SAME[name](p)
    assert agrees(drawn(df.accelerate(p)), p)


def test_compiled_networks_are_not_compiled_for_the_trial():
    for change in (compiled_forward, lambda p: p.unet.compile()):
        p = pipeline()
        expected = drawn(p)
        change(p)
        with torch.compiler.set_stance("fail_on_recompile"):  # so that a compilation would be an error
            assert agrees(drawn(df.accelerate(p)), pipeline(), expected)


def test_a_network_of_one_size_is_tried_at_that_size():
    p = pipeline(sample_size=24)
    p.unet.conv_act = nn.Sequential(nn.Flatten(2), nn.SiLU(), nn.Unflatten(2, (24, 24)))
    assert agrees(drawn(df.accelerate(p)), p)
    p.unet.conv_act = nn.Sequential(nn.Flatten(2), nn.SiLU(), nn.Unflatten(2, (23, 24)))
    with pytest.raises(
        ValueError, match=r"the pipeline's own network does not run: RuntimeError: unflatten: .*tensor$"
    ):
        df.accelerate(p)


def test_a_trial_leaves_random_states_and_the_caller_s_autocast_alone():
    p = pipeline()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fast = df.accelerate(p)
    assert torch.equal(torch.rand(2), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(drawn(df.accelerate(p)), drawn(fast)) == 0
    p.unet.conv_act = nn.RReLU()  # in training mode it draws random slopes
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="conv_act is a RReLU, not a SiLU"):
        df.accelerate(p)
    assert torch.equal(torch.rand(2), expected)


def test_a_network_is_tried_again_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch):
    tried, check = [], dropin.check_network
    monkeypatch.setattr(dropin, "check_network", lambda *a: tried.append("network") or check(*a))
    steps, check_steps = [], dropin.checked_steps
    monkeypatch.setattr(dropin, "checked_steps", lambda *a: steps.append(a[2]) or check_steps(*a))
    p = pipeline()
    fast = df.accelerate(p)
    for _ in range(2):
        drawn(fast)
        drawn(p)  # which calls set_timesteps
    assert tried == ["network"] and steps == [10]
    drawn(fast, num_inference_steps=5)
    handle = p.unet.mid_block.register_forward_hook(late)
    with pytest.raises(ValueError, match="mid_block"):
        drawn(fast)
    handle.remove()
    drawn(fast)
    assert tried == ["network"] * 3 and steps == [10, 5, 10]
    p.scheduler.variance_type = "fixed_small_log"
    with pytest.raises(ValueError, match="DDPMScheduler takes other steps"):
        drawn(fast)
    assert tried == ["network"] * 3 and len(steps) == 4


class CpuOffload:
    """As accelerate's hook of that name: weights that lie elsewhere, the same outputs."""

    execution_device = "cpu"

    def pre_forward(self, module: Any, *args: Any) -> None:
        for p in module.parameters():
            p.data = p.data.clone()


def hooked(module: Any, hook: Any) -> None:
    """As accelerate's add_hook_to_module."""

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module._hf_hook.pre_forward(module, *args)
        return module._old_forward(*args, **kwargs)

    new_forward.__module__ = type(hook).__module__ = "accelerate.hooks"
    module._hf_hook, module._old_forward = hook, module.forward
    module.forward = functools.partial(new_forward, module)


def test_hooks_that_place_weights_are_let_through_and_others_are_not():
    p = pipeline()
    hooked(p.unet, CpuOffload())
    fast = df.accelerate(p)
    assert fast.device == torch.device("cpu") and agrees(drawn(fast), p)

    class Watching(CpuOffload):
        pass

    p = pipeline()
    hooked(p.unet.mid_block, Watching())
    with pytest.raises(ValueError, match=r"mid_block\.forward, replaced by Watching; remove it first"):
        df.accelerate(p)
    p = pipeline()
    replaced_forward(p.unet)
    hooked(p.unet, CpuOffload())  # over a forward that is another already
    with pytest.raises(ValueError, match="forward, replaced by CpuOffload"):
        df.accelerate(p)


def test_where_the_pipeline_executes_is_where_images_are_drawn(monkeypatch: pytest.MonkeyPatch):
    """With model offloading the weights lie on the CPU, and the pipeline draws on the GPU."""
    p = pipeline()
    fast = df.accelerate(p)
    hook = CpuOffload()
    hook.execution_device = "cuda:0"
    p.unet._hf_hook = hook
    assert fast.device == torch.device("cuda:0") and fast.to("cpu").device == torch.device("cpu")


def test_weights_kept_in_another_dtype_than_they_compute_in():
    p = pipeline()
    p.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    fast = df.accelerate(p)
    assert fast.dtype == torch.float32 and agrees(drawn(fast), p)


def test_a_subclass_of_the_network():
    class Same(UNet2DModel):
        pass

    class Other(UNet2DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    p = pipeline()
    p.unet.__class__ = Same
    assert agrees(drawn(df.accelerate(p)), p)
    p.unet.__class__ = Other
    with pytest.raises(ValueError, match="around a UNet2DModel; this one has a Other, whose forward is its own"):
        df.accelerate(p)
