"""Networks that are no DDPM over pixels, known by their tensor names so that a refusal can say what a file is."""

from __future__ import annotations

import re

from .family import Family

Names = frozenset[str]


def _starts(names: Names, *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)


def _conditional(names: Names) -> bool:
    guided = any(".attn2." in name or name.startswith("encoder_hid") for name in names)
    return guided and _starts(names, "down_blocks.")


def _latent(names: Names) -> bool:
    return _starts(names, "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


def _with_transformers(names: Names) -> bool:
    return _starts(names, "input_blocks.") and any(".transformer_blocks." in name for name in names)


def _control_net(names: Names) -> bool:
    return _starts(names, "control_model.", "controlnet_") or (
        _starts(names, "input_hint_block.") and _starts(names, "zero_convs.")
    )


def _lora(names: Names) -> bool:
    return all(re.search(r"(^|[._])(lora|lokr|loha|hada)[_.]|\.alpha$", name) for name in names) and any(
        "lo" in name or "hada" in name for name in names
    )


EDM_NETWORK = "an EDM network, whose noise levels are continuous; it is no DDPM: draw from it with EDM's own code"
AUTOENCODER = "autoencoder"

# Before the families that load: (name, what tells it among the names under one prefix, what it is and what to do).
FOREIGN: tuple[Family, ...] = (
    Family(
        "conditional U-Net",
        _conditional,
        refusal="a U-Net guided by text or images (UNet2DConditionModel), no unconditional DDPM; run it in diffusers",
    ),
    Family(
        "latent diffusion",
        _with_transformers,
        refusal="a latent diffusion model (its U-Net has transformer blocks), no DDPM over pixels; run it in its code",
    ),
    Family(
        "latent diffusion with its parts",
        _latent,
        refusal="a latent diffusion model (Stable Diffusion or the like, with its autoencoder in one file), no DDPM "
        "over pixels; run it in diffusers (from_single_file) or in its own code",
        hides=True,
    ),
    Family(
        "ControlNet",
        _control_net,
        refusal="a ControlNet, which steers a text-guided U-Net and draws nothing by itself; run it in diffusers",
        hides=True,
    ),
    Family(
        "LoRA",
        _lora,
        refusal="a LoRA, a change to another model's weights; load that model in its own code, merge the LoRA there "
        "and save the model",
    ),
    Family(
        "diffusion transformer",
        lambda names: {"x_embedder.proj.weight", "t_embedder.mlp.0.weight"} <= names,
        refusal="a diffusion transformer (DiT, SiT, MMDiT), which works on latents; it is no U-Net: run it in its code",
    ),
    Family(
        "transformer of diffusers",
        lambda names: _starts(names, "transformer_blocks.") and any(".attn1." in n or ".attn." in n for n in names),
        refusal="a transformer of diffusers (DiT, PixArt, SD3, Flux or the like), which works on latents; run it there",
    ),
    Family(
        "Flux",
        lambda names: _starts(names, "double_blocks.") and _starts(names, "single_blocks."),
        refusal="a Flux transformer, which works on latents; it is no DDPM: run it in diffusers",
    ),
    Family(
        "U-ViT",
        lambda names: _starts(names, "in_blocks.") and {"pos_embed", "patch_embed.proj.weight"} <= names,
        refusal="a U-ViT, a transformer and no U-Net of a DDPM; run it in its own code",
    ),
    Family(
        "k-diffusion wrapper",
        lambda names: _starts(names, "inner_model."),
        refusal="a model of k-diffusion (inner_model inside a denoiser), whose noise levels are continuous (sigmas); "
        "it is no DDPM: draw from it with k-diffusion",
    ),
    Family(
        "k-diffusion",
        lambda names: (
            {"timestep_embed.weight", "mapping.0.weight"} <= names
            or {"time_emb.weight", "patch_in.proj.weight"} <= names
        ),
        refusal="a network of k-diffusion, whose noise levels are continuous (sigmas); it is no DDPM: draw from it "
        "with k-diffusion",
    ),
    Family(
        "simple diffusion",
        lambda names: _starts(names, "vit.layers.") and {"time_mlp.0.weights", "final_conv.weight"} <= names,
        refusal="a UViT of simple diffusion (lucidrains' simple_diffusion.py), which is trained on log-SNR in "
        "continuous time; it is no DDPM: draw from it with denoising_diffusion_pytorch.simple_diffusion",
    ),
    Family(
        "Imagen",
        lambda names: "init_conv.convs.0.weight" in names,
        refusal="a U-Net of lucidrains' imagen-pytorch, guided by text; it is no DDPM of images alone: run it there",
    ),
    Family(
        "Karras U-Net",
        lambda names: _starts(names, "to_time_emb.") and _starts(names, "downs."),
        refusal="a Karras (EDM2) U-Net, of the sort in lucidrains' package; it is no DDPM's: draw from it there",
    ),
    Family("EDM", lambda names: "map_layer0.weight" in names, refusal=EDM_NETWORK),
    Family(
        "EDM2",
        lambda names: "emb_noise.weight" in names and _starts(names, "enc."),
        refusal="an EDM2 network, whose noise levels are continuous; it is no DDPM: draw from it with EDM2's own code",
    ),
    Family(
        "NCSN",
        lambda names: "begin_conv.weight" in names and _starts(names, "refine1."),
        refusal="an NCSN (Song and Ermon), trained on noise levels and drawn from by Langevin dynamics; it is no DDPM",
    ),
    Family(
        "StyleGAN",
        lambda names: _starts(names, "synthesis.") and _starts(names, "mapping."),
        refusal="a StyleGAN generator; it is no diffusion model",
    ),
    Family(
        AUTOENCODER,
        lambda names: {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= names,
        refusal="an autoencoder (VAE or VQ model), the part of a latent diffusion model that turns latents into images",
    ),
    Family(
        "text encoder",
        lambda names: _starts(names, "text_model.encoder.layers."),
        refusal="a CLIP text encoder; name the file of the U-Net",
    ),
)
