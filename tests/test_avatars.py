"""Avatars: what dicebear and resvg draw, of public-domain styles only."""

from __future__ import annotations

import io
import json
import sys
from importlib import import_module, resources

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import avatars, load_data


@pytest.fixture(scope="module")
def definitions() -> dict[str, dict]:
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    folder = resources.files(pytest.importorskip("dicebear_styles"))
    return {f.name[:-5]: json.loads(f.read_text("utf-8")) for f in folder.iterdir() if f.name.endswith(".json")}


def test_avatars_are_what_dicebear_and_resvg_draw(definitions: dict[str, dict]) -> None:
    data = load_data("avatars:pixel-art:5")
    assert data.images.shape == (5, 16, 16, 3) and data.labels is None and data.source == "avatars:pixel-art:5"
    style = import_module("dicebear").Style(definitions["pixel-art"])
    for seed, image in enumerate(data.images):
        svg = str(import_module("dicebear").Avatar(style, {"seed": str(seed)}))
        drawn = Image.open(io.BytesIO(bytes(import_module("resvg_py").svg_to_bytes(svg_string=svg, width=16))))
        white = Image.new("RGBA", (16, 16), "white")
        want = np.asarray(Image.alpha_composite(white, drawn.convert("RGBA")).convert("RGB"))
        assert np.abs(image.astype(int) - want).max() <= 1  # where the background is blended in: resvg or Pillow
    assert len({image.tobytes() for image in data.images}) == 5
    assert load_data("avatars:pixel-art:5", image_size=24, channels=1).images.shape == (5, 24, 24, 1)


def test_only_public_domain_styles_are_drawn(definitions: dict[str, dict]) -> None:
    licences = {name: d["meta"]["license"]["name"] for name, d in definitions.items()}
    free = sorted(name for name, licence in licences.items() if licence == "CC0 1.0")
    assert "pixel-art" in free and len(free) < len(licences)
    assert avatars.public_domain_styles() == free
    for name in sorted(set(licences) - set(free)):
        with pytest.raises(ValueError, match=f"must be CC0 1.0; '{name}' is licensed '{licences[name]}'"):
            load_data(f"avatars:{name}:1")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("avatars:nobody", "no avatar style is called 'nobody'; these can be used: .*pixel-art"),
        ("avatars:pixel-art:0", "N a positive number"),
        ("avatars:pixel-art:many", "N a positive number"),
    ],
)
def test_avatar_mistakes(definitions: dict[str, dict], source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(source)


@pytest.mark.parametrize("missing", ["dicebear", "dicebear_styles", "resvg_py"])
def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RuntimeError, match=rf'{missing}.*pip install "ddpm-fast\[avatars\]"'):
        load_data("avatars:pixel-art:1")
