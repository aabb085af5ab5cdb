"""The inference copy computes what the model computes, in every architecture, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import fresh
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine.prepared import prepare, weight_bytes
from ddpm_fast.house_rule import check
from ddpm_fast.kernels.conv_pack import PackedConv, pack_upsample_conv
from ddpm_fast.unet import UNet

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
RESAMPLING = {
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"downsample_padding": 0},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.5},
    "resampling": RESAMPLING,
    "resampling_scale_shift": {**RESAMPLING, "resnet_time_scale_shift": "scale_shift"},
    "centred_mish": {"center_input_sample": True, "act_fn": "mish", "attention_head_dim": None},
    "fourier": {"time_embedding_type": "fourier"},
    "learned_time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "learned_variance": {"out_channels": 6},
    "classes": {"num_class_embeds": 3},
    "class_steps": {"class_embed_type": "timestep"},
}


def network(dtype: torch.dtype = torch.float64, **changes: Any) -> UNet:
    torch.manual_seed(1)
    model = UNet(UNetConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.0))
    return model.to(dtype)


def labels_for(model: UNet) -> Tensor | None:
    return None if model.class_embedding is None else torch.tensor([2, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_float64_copy_equals_the_model(variant: str):
    """Folded biases, joined projections and float64 tables leave rounding alone."""
    model = network(**VARIANTS[variant])
    copy = prepare(model, torch.float64, "cpu", ops.reference())
    x, t, labels = fresh((2, 3, 8, 8), torch.float64, seed=2), torch.tensor([700.0, 3.0]), labels_for(model)
    t = t.long() if "learned" in variant else t.double()
    with torch.no_grad():
        expected, got = model(x, t, labels), copy(x, t, labels)
    assert expected.square().mean() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", ["default", "scale_shift", "classes"])
def test_a_low_precision_copy_is_at_least_as_right_as_the_model_in_that_dtype(variant: str):
    model = network(torch.float32, **VARIANTS[variant])
    x, t, labels = fresh((2, 3, 8, 8), torch.bfloat16, seed=3), torch.tensor([700.0, 3.0]), labels_for(model)
    with torch.no_grad():
        got = prepare(model, torch.bfloat16, "cpu", ops.reference())(x, t, labels)
        truth = network(torch.float64, **VARIANTS[variant])(x.double(), t.double(), labels)
        same = model.bfloat16()(x, t, labels)
    check(got, same, truth, name=variant)


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_the_model_is_not_touched_and_not_shared(which: str):
    if which == "triton":
        pytest.importorskip("triton", reason="the fused operations need Triton")
    model = network(torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy = prepare(model, torch.float32, "cpu", getattr(ops, which)())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [copy.conv_in.weight, copy.time_embedding.linear_1.weight, copy.mid_block.attentions[0].packed[0]]
    held += [b.conv2.weight for b in copy.residual_blocks()] + [b.norm1.weight for b in copy.residual_blocks()]
    held += [b.conv_shortcut.weight for b in copy.residual_blocks() if b.conv_shortcut is not None]
    for weight in held:
        tensor = getattr(weight, "matrix", weight)
        assert tensor.untyped_storage().data_ptr() not in own
        assert not tensor.requires_grad


def test_biases_that_cost_nothing_are_folded():
    model = network()
    copy = prepare(model, torch.float64, "cpu", ops.reference())
    for ours, theirs in zip(copy.residual_blocks(), model.residual_blocks()):
        assert ours.conv1.bias is None
        assert torch.equal(ours.time_emb_proj.bias, theirs.time_emb_proj.bias + theirs.conv1.bias)
        if ours.conv_shortcut is not None:
            assert ours.conv_shortcut.bias is None
            assert torch.equal(ours.conv2.bias, theirs.conv2.bias + theirs.conv_shortcut.bias)
    shifted = prepare(network(**VARIANTS["scale_shift"]), torch.float64, "cpu", ops.reference())
    assert all(b.conv1.bias is not None for b in shifted.residual_blocks()), "the time row comes behind the norm there"


def test_the_fused_set_gets_its_own_packing():
    pytest.importorskip("triton", reason="the fused operations need Triton")
    model = network(torch.float32)
    copy = prepare(model, torch.bfloat16, "cpu", ops.triton())
    assert copy.dtype == torch.bfloat16
    assert copy.conv_in.weight.channels == (16,), "x_t's copy has 16 channels, whatever the image has"
    first_up = copy.up_blocks[0].resnets[0]
    assert first_up.conv_shortcut.weight.channels == (32, 32) == first_up.inputs
    assert copy.up_blocks[1].resnets[0].conv_shortcut.weight.channels == (32, 16)
    up = copy.up_blocks[0].upsamplers[0].conv.weight
    assert isinstance(up, PackedConv) and up.phases == 4
    exact = pack_upsample_conv(model.up_blocks[0].upsamplers[0].conv.weight.double(), dtype=torch.float64).matrix
    assert torch.equal(up.matrix, exact.to(torch.bfloat16)), "taps are summed in float32 at least, and rounded once"
    assert all(b.norm1.weight.dtype == torch.float32 for b in copy.residual_blocks())
    assert isinstance(copy.conv_out.step_weight, PackedConv)


def test_weight_bytes_counts_what_is_held():
    model = network(torch.float32)
    copy = prepare(model, torch.bfloat16, "cpu", ops.reference())
    products = [p for m in model.modules() if isinstance(m, torch.nn.Conv2d) for p in [m.weight]]
    products += [getattr(a, n).weight for a in model.modules() if hasattr(a, "to_q") for n in ("to_q", "to_k", "to_v")]
    products += [a.to_out[0].weight for a in model.modules() if hasattr(a, "to_q")]
    low = sum(p.numel() for p in products)
    folded = sum(b.conv1.bias.numel() for b in model.residual_blocks())
    folded += sum(b.conv_shortcut.bias.numel() for b in model.residual_blocks() if b.conv_shortcut is not None)
    rest = sum(p.numel() for p in model.parameters()) - low - folded
    assert weight_bytes(copy) == 2 * low + 4 * rest
