"""What the pictures of the vision toy are drawn with: colours, noise, characters, outlines, and the brush.

"Wild" pictures are distorted, low in contrast and cluttered; the others are tidy. All chance comes from `rng`.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # pixels
WORLD_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "cmss10", "STIXGeneral"]
WILD_FONTS = [*WORLD_FONTS, "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "cmtt10", "cmb10", "STIXGeneralBolIta"]
PALETTE = {
    "red": (0.85, 0.12, 0.12), "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2), "green": (0.15, 0.65, 0.2),
    "cyan": (0.2, 0.8, 0.85), "blue": (0.15, 0.25, 0.85), "purple": (0.5, 0.2, 0.65), "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.28, 0.15), "white": (0.95, 0.95, 0.95), "grey": (0.5, 0.5, 0.5), "black": (0.07, 0.07, 0.07),
}  # fmt: skip
Y, X = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE), indexing="ij")


@cache
def upsampling(k: int) -> np.ndarray:
    """Linear interpolation from k points to SIZE points, (SIZE, k)."""
    at = np.linspace(0, k - 1, SIZE)
    return np.clip(1 - np.abs(at[:, None] - np.arange(k)), 0, 1)


def smooth_noise(rng: np.random.Generator, k: int, channels: int = 3) -> np.ndarray:
    """Unit noise on a k by k grid, interpolated to (SIZE, SIZE, channels)."""
    u = upsampling(k)
    return (u @ rng.standard_normal((channels, k, k)) @ u.T).transpose(1, 2, 0)


def two_colours(rng: np.random.Generator, wild: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """Foreground, background, and their names as a caption's ending."""
    if wild:
        while True:
            fg, bg = rng.random((2, 3))
            if np.abs(fg - bg).sum() > 0.9:
                return fg, bg, ""
    while True:
        names = rng.choice(list(PALETTE), 2, replace=False)
        fg, bg = (np.array(PALETTE[n]) + rng.uniform(-0.08, 0.08, 3) for n in names)
        if np.abs(fg - bg).sum() > 0.9:
            return fg, bg, rng.choice(["", f" in {names[0]}", f" in {names[0]} on {names[1]}"], p=[0.4, 0.3, 0.3])


def paint(rng: np.random.Generator, mask: np.ndarray, fg: np.ndarray, bg: np.ndarray, wild: bool) -> np.ndarray:
    """Foreground through `mask` (SIZE, SIZE) on the background; wild pictures get clutter, shade and noise."""
    if wild:
        bg = bg + 0.06 * smooth_noise(rng, int(rng.integers(3, 9)))
        fg = fg + 0.05 * smooth_noise(rng, 4)
    picture = bg + (fg - bg) * mask[..., None]
    if wild:
        shade, tilt = rng.uniform(-0.15, 0.15), rng.uniform(-np.pi, np.pi)
        picture = picture + shade * (np.cos(tilt) * X + np.sin(tilt) * Y)[..., None]
    return picture + rng.standard_normal(picture.shape) * rng.uniform(0, 0.07 if wild else 0.03)


@cache
def glyph(font: str, char: str) -> Image.Image:
    """One white character, 28 pixels high on a 48-pixel black square."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    square = Image.new("L", (48, 48))
    ImageDraw.Draw(square).text((24, 24), char, 255, ImageFont.truetype(str(path), 34), anchor="mm")
    return square


def character(rng: np.random.Generator, char: str, wild: bool, shift: float = 0.0) -> np.ndarray:
    """The mask of a character: turned, sheared, scaled and moved, much if wild and little if not."""
    much = 0.7 if wild else 0.25
    angle, shear, stretch = rng.uniform(-1, 1, 3) * much * (0.35, 0.3, 0.15)
    scale = rng.uniform(0.95, 1.4) if wild else rng.uniform(1.0, 1.3)
    move = rng.uniform(-2, 2, 2) * much + (shift, 0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ [[1, shear], [0, 1]] @ np.diag([scale * (1 + stretch), scale])
    offset = 24 - inverse @ (SIZE / 2 + move)
    square = glyph(rng.choice(WILD_FONTS if wild else WORLD_FONTS), char)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    return np.asarray(square.transform((SIZE, SIZE), Image.AFFINE, coefficients, Image.BILINEAR)) / 255


def outline(name: str) -> np.ndarray:
    """Corners (n, 2) of a shape within the unit circle, y downwards."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    corners = {"triangle": 3, "square": 4, "hexagon": 6}
    if name in corners:
        n = corners[name]
        turn = np.arange(n) * 2 * np.pi / n - np.pi / 2 + (np.pi / 4 if n == 4 else 0)
    if name == "star":
        turn, radius = np.arange(10) * np.pi / 5 - np.pi / 2, np.tile([1, 0.42], 5)[:, None]
        return radius * np.stack([np.cos(turn), np.sin(turn)], 1)
    if name == "cross":
        a, b = 0.3, 0.95
        right = np.array([(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)])
        return np.concatenate([right, -right])
    if name == "arrow":
        return np.array([(-1, -0.25), (0.15, -0.25), (0.15, -0.7), (1, 0), (0.15, 0.7), (0.15, 0.25), (-1, 0.25)])
    if name == "heart":
        y = 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn) - 13 * np.cos(turn)
        return np.stack([16 * np.sin(turn) ** 3, y], 1) / 17
    return np.stack([np.cos(turn), np.sin(turn)], 1)
