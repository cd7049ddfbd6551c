"""Renders python_avatars drawings as the parts of the cartoon portraits, and writes them to `parts.npz`. LICENSE.md
lists their licences.

    pip install "sega_jax[train]" && python -m sega_jax.demo.training.draw_parts

The picture of a part is affine in its tint (the colour of hair, skin, cloth ...): premultiplied rgb = fixed + mask *
tint. Two renders, one with a black and one with a white tint, therefore determine the part in every colour. A part is
stored in five channels: fixed rgb, alpha and mask.
"""

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128
PARTS = Path(__file__).with_name("parts.npz")
_VIEW = "12 10 240 240"  # the square cropped from the original design of 264 x 280
_TINT = "TINT"  # the placeholder for the colour in the markup
_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{}">{}</svg>'

# Mouths are larger and lower than in the original design, so that they are visible at 128 pixels and below a moustache.
# Skin around them separates a dark mouth from a dark beard.
_MOUTH = 'transform="translate(132 160) scale(1.35) translate(-54 -21)"'
_SKIN = f'fill="{_TINT}" stroke="{_TINT}" stroke-width="{{}}" stroke-linecap="round" stroke-linejoin="round"'
_NEUTRAL = (
    f'<path d="M44,20 H64" {_SKIN.format(14)}/><rect x="42" y="17" width="24" height="6" rx="3" fill-opacity=".9"/>'
)
_ARC = 'd="M38,28 C43,12 65,12 70,28"'
_SAD = (
    f"<path {_ARC} {_SKIN.format(13)}/>"
    f'<path {_ARC} fill="none" stroke="#000" stroke-opacity=".9" stroke-width="5.5" stroke-linecap="round"/>'
)
_LIPS = '<ellipse cx="54" cy="22" rx="11.5" ry="12" {}/>'
_OPEN = (
    f'{_LIPS.format(_SKIN.format(8))}<clipPath id="lips">{_LIPS.format("")}</clipPath><g clip-path="url(#lips)">'
    '<rect width="108" height="44" fill-opacity=".75"/><circle cx="54" cy="37" r="10" fill="#FF4F6D"/></g>'
)
_ACCESSORY = 'transform="translate(62 85)"'
# Bright lenses make dark frames visible on dark skin.
_LENS = '<ellipse cx="{}" cy="27" rx="{}" ry="{}" fill="#fff" fill-opacity=".35"/>'
_LENSES = {
    "accessories/round": _LENS.format(40, 21, 21) + _LENS.format(102, 21, 21),
    "accessories/prescription_02": _LENS.format(39, 23, 17) + _LENS.format(103, 23, 17),
}
_BEARD = 'transform="translate(49 72)"'
_MOUSTACHE = 'transform="translate(133 142) scale(1.2) translate(-84 -73)"'
_CLOTHES = 'transform="translate(0 170)"'
_EYES = 'transform="translate(76 90)"'
_BROWS = 'transform="translate(76 82)"'

# {slot/value: (attributes of the SVG group around the part, its variants as the package's SVG files or as markup)}
_DRAWINGS = {
    "body": ("", ["styles/transparent"]),
    "clothes/shirt": (_CLOTHES, ["clothes/shirt_crew_neck", "clothes/shirt_v_neck"]),
    "clothes/hoodie": (_CLOTHES, ["clothes/hoodie"]),
    "clothes/jacket": (_CLOTHES, ["clothes/blazer_shirt"]),
    "clothes/overalls": ('transform="translate(0 154)"', ["clothes/overall"]),
    "beard/beard": (_BEARD, ["facial_hair/beard_medium", "facial_hair/beard_magestic"]),
    "moustache/moustache": (_MOUSTACHE, ["facial_hair/moustache_magnum", "facial_hair/moustache_fancy"]),
    "mouth/neutral": (_MOUTH, [_NEUTRAL]),
    "mouth/smile": (_MOUTH, ["mouth/smile"]),
    "mouth/sad": (_MOUTH, [_SAD]),
    "mouth/open": (_MOUTH, [_OPEN]),
    "nose": ('transform="translate(104 122)" fill-opacity=".16"', ["nose/default"]),
    "eyes": (_EYES, ["eyes/default"]),
    "brows": (_BROWS, ["eyebrows/default", "eyebrows/default_natural"]),
    "hair/short": ("", ["top/hair/short_flat", "top/hair/short_round", "top/hair/short_waved"]),
    "hair/long": ("", ["top/hair/straight_strand"]),
    "hair/curly": ("", ["top/hair/curly", "top/hair/fro"]),
    "glasses/glasses": (_ACCESSORY, ["accessories/prescription_02", "accessories/round"]),
    "glasses/sunglasses": (_ACCESSORY, ["accessories/sunglasses", "accessories/wayfarers"]),
    "hat/hat": ("", ["top/hat/hat"]),
    "hat/beanie": ('transform="translate(0 -4)"', ["top/hat/winter_hat_3"]),
}
# For each hat, the region below the brim where hair is visible. It is only as wide as the hair that shows below
# the brim.
_BRIMS = {"hat": "M0,280 V104 H264 V280 Z", "beanie": "M0,280 V180 A132,104 0 0 1 264,180 V280 Z"}


def drawings() -> dict[str, str]:
    """Returns {slot/value/variant: SVG markup} for every part, with TINT in place of its colour.

    Hair below a hat is a separate part, named hair/value/variant/hat.
    """
    parts = {}
    for name, (around, variants) in _DRAWINGS.items():
        for i, source in enumerate(variants):
            inner = source if source.startswith("<") else _read(source)
            parts[f"{name}/{i}"] = f"<g {around}>{inner}</g>"
    for name in [name for name in parts if name.startswith("hair/")]:
        for hat, brim in _BRIMS.items():
            clip = f'<clipPath id="brim"><path d="{brim}"/></clipPath>'
            parts[f"{name}/{hat}"] = f'{clip}<g clip-path="url(#brim)">{parts[name]}</g>'
    return {name: _own_ids(markup, f"p{i}-") for i, (name, markup) in enumerate(parts.items())}


def draw(markup: str, side: int = SIDE) -> np.ndarray:
    """Renders markup as float32 [side, side, 4]: premultiplied rgb and alpha in [0, 1], with 2x2 supersampling."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=_HEAD.format(_VIEW, markup), width=2 * side, height=2 * side)
    rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba.reshape(side, 2, side, 2, 4).mean((1, 3))


def layer(markup: str) -> np.ndarray:
    """Renders a part as uint8 [128, 128, 5]: fixed rgb (premultiplied), alpha, mask of the tint.

    Raises:
        ValueError: the picture is not affine in its tint, or the tint changes its alpha.
    """
    black, white = (draw(markup.replace(_TINT, colour)) for colour in ("#000000", "#ffffff"))
    change = white - black
    mask = change[..., :3].mean(-1, keepdims=True)
    if np.abs(change[..., :3] - mask).max() > 2 / 255 or np.abs(change[..., 3]).max() > 0:
        raise ValueError(f"the picture is not affine in its tint; use a single tint in its drawing: {markup[:200]}")
    return np.rint(255 * np.concatenate([black, mask], -1)).astype(np.uint8)


def _read(name: str) -> str:
    """Reads the markup of a python_avatars SVG file, with TINT in place of the colour of its tinted region."""
    spec = importlib.util.find_spec("python_avatars")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    text = (package / "avatar_parts" / f"{name}.svg").read_text()
    text = re.sub(r"<\?xml.*?\?>|<svg[^>]*>|</svg>|<title.*?</title>|<desc>.*?</desc>", "", text, flags=re.DOTALL)
    if name == "clothes/blazer_shirt":  # the jacket is tinted; the shirt below it is white
        text = text.replace('fill=""', 'fill="#F4F4F4"').replace("#3A4C5A", _TINT)
        return text.replace('fill="#2F4351"', 'fill="#000" fill-opacity=".25"')
    text = _LENSES.get(name, "") + text
    tinted = r'(id="(?:Hair|Facial-Hair|Fabric|Skin)-Color"[^>]*?fill=)"[^"]*"'
    return re.sub(tinted, rf'\1"{_TINT}"', text)


def _own_ids(markup: str, prefix: str) -> str:
    """Prefixes all ids, because the files share ids and a drawing combines several files."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", markup)


def main() -> None:
    """Writes `parts.npz`."""
    parts = drawings()
    layers = np.stack([layer(markup) for markup in parts.values()])
    np.savez_compressed(PARTS, names=np.array(list(parts)), layers=layers)
    print(f"{len(parts)} parts, {PARTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
