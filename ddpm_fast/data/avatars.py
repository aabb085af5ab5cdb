"""Training images that need no download: avatars drawn by DiceBear styles and rasterised by resvg.

The three packages are the extra ``avatars``: dicebear-core (imports as ``dicebear``), dicebear-styles and
resvg-py. Only styles dedicated to the public domain (CC0 1.0) are drawn, so that a model trained on them
carries no licence of others.
"""

from __future__ import annotations

import io
import json
from importlib import import_module, resources
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEFAULT_COUNT = 20_000
PUBLIC_DOMAIN = "CC0 1.0"
INSTALL_HINT = 'pip install "ddpm-fast[avatars]"'
# Styles are drawn on canvases from 5 to 1744 units wide. Up to this width a canvas unit is meant as a pixel.
LARGEST_NATIVE_SIZE = 32
DEFAULT_SIZE = 32


def _require(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"avatars: data needs the packages dicebear-core, dicebear-styles and resvg-py; cannot import "
            f"{error.name or name!r}. Install them with: {INSTALL_HINT}"
        ) from error


def _definitions() -> dict[str, str]:
    """Style name -> JSON text of its definition."""
    _require("dicebear_styles")
    folder = resources.files("dicebear_styles")
    return {f.name[:-5]: f.read_text(encoding="utf-8") for f in folder.iterdir() if f.name.endswith(".json")}


def public_domain_styles() -> list[str]:
    """Names of the installed styles that are CC0 1.0, sorted."""
    return sorted(name for name, text in _definitions().items() if _licence(json.loads(text)) == PUBLIC_DOMAIN)


def _licence(definition: dict) -> str:
    return str(definition.get("meta", {}).get("license", {}).get("name", "none stated"))


def load_style(style: str) -> dict:
    """The definition of ``style``. ValueError if it is unknown or not CC0; RuntimeError without the extra."""
    text = _definitions().get(style)
    if text is None:
        raise ValueError(f"no avatar style is called {style!r}; these can be used: {', '.join(public_domain_styles())}")
    definition = json.loads(text)
    licence = _licence(definition)
    if licence != PUBLIC_DOMAIN:
        raise ValueError(
            f"avatar styles must be {PUBLIC_DOMAIN}; {style!r} is licensed {licence!r}. "
            f"Use one of: {', '.join(public_domain_styles())}"
        )
    return definition


def native_size(definition: dict) -> int:
    """Pixels a side at which a style is drawn by default: its canvas if that is small, else 32."""
    width = int(definition.get("canvas", {}).get("width", DEFAULT_SIZE))
    return width if width <= LARGEST_NATIVE_SIZE else DEFAULT_SIZE


def render_avatars(
    style: str,
    count: int = DEFAULT_COUNT,
    image_size: int | None = None,  # pixels a side; None: the style's own
    channels: int = 3,
) -> NDArray[np.uint8]:  # [count, image_size, image_size, channels]
    """Avatars of the seeds "0" .. str(count - 1), on white. The same call gives the same images."""
    if count < 1:
        raise ValueError(f"avatars needs a count of at least 1; got {count}")
    dicebear, resvg = _require("dicebear"), _require("resvg_py")
    definition = load_style(style)
    drawn_style = dicebear.Style(definition)
    size = image_size or native_size(definition)
    images = np.empty((count, size, size, channels), np.uint8)
    for seed in range(count):
        svg = str(dicebear.Avatar(drawn_style, {"seed": str(seed)}))
        png = bytes(
            resvg.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        )
        with Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
        images[seed] = pixels.reshape(size, size, channels)
    return images
