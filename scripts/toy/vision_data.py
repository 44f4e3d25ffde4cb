"""The pictures of the vision toy: six tasks, and the captioned world the base model is trained on.

Every picture is 32x32 RGB and follows from (set name, index) alone. A task's pictures are "wild": distorted, low in
contrast, cluttered. The world shows the same things tidily, so a model that read its captions knows the words but not
the conditions, as CLIP does with street numbers and satellite views.
"""

import hashlib
import io
import os
from functools import cache
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

SIZE = 32
NAMES = ("digits", "photos", "letters", "shapes", "textures", "housenumbers")
ROWS = yaml.safe_load((Path(__file__).parents[2] / "Vision" / "tasks.yaml").read_text())
TASKS = {name: ROWS[name] for name in NAMES}  # class names and templates, as the pipeline reads them
SPLITS = {"train": 4000, "test": 800}
DIGITS_TRAIN = 1197  # of the 1797 handwritten digits; the last 600 are the test set
WORLD_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "cmss10", "STIXGeneral"]
WILD_FONTS = [*WORLD_FONTS, "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "cmtt10", "cmb10", "STIXGeneralBolIta"]
PALETTE = {
    "red": (0.85, 0.12, 0.12), "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2), "green": (0.15, 0.65, 0.2),
    "cyan": (0.2, 0.8, 0.85), "blue": (0.15, 0.25, 0.85), "purple": (0.5, 0.2, 0.65), "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.28, 0.15), "white": (0.95, 0.95, 0.95), "grey": (0.5, 0.5, 0.5), "black": (0.07, 0.07, 0.07),
}  # fmt: skip
# photograph (0 the temple, 1 the dahlia) and the box x0, y0, x1, y1 of each class, in the order of the class names
REGIONS = [
    (0, 130, 78, 295, 122), (0, 100, 180, 325, 330), (0, 340, 0, 640, 130), (0, 350, 225, 545, 315),
    (0, 0, 345, 215, 427), (0, 335, 320, 545, 427), (0, 560, 215, 640, 427),
    (1, 245, 165, 370, 275), (1, 180, 95, 440, 150), (1, 0, 60, 165, 427),
]  # fmt: skip
Y, X = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE), indexing="ij")


def generator(*key: object) -> np.random.Generator:
    """A generator seeded by a stable hash of `key`."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


# ---- parts -----------------------------------------------------------------------------------------------------------


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


# ---- kinds: (rng, label, wild) -> picture (SIZE, SIZE, 3) of floats around 0..1, caption ending ----------------------


def letters(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    fg, bg, words = two_colours(rng, wild)
    return paint(rng, character(rng, chr(ord("A") + label), wild), fg, bg, wild), words


def housenumbers(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    """Wild ones have neighbours that the frame cuts."""
    fg, bg, words = two_colours(rng, wild)
    mask = character(rng, str(label), wild)
    for side in (-1, 1):
        if wild and rng.random() < 0.4:
            mask = np.maximum(mask, character(rng, str(rng.integers(10)), wild, side * rng.uniform(16, 20)))
    return paint(rng, mask, fg, bg, wild), words


def digits(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    """The world's digits are printed, white on black; the task's are handwritten and come from `handwritten`."""
    return paint(rng, character(rng, str(label), wild), np.ones(3), np.zeros(3), wild), ""


def shapes(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    fg, bg, words = two_colours(rng, wild)
    radius = rng.uniform(8, 13)
    angle = rng.uniform(-1, 1) * (0.4 if wild else 0.1)
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * min(15 - radius, 4)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.diag(rng.uniform(0.8, 1, 2)) if wild else np.eye(2)
    name = TASKS["shapes"]["classes"][label]
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)

    def place(corners: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(p) for p in 2 * (centre + radius * corners @ squeeze @ turn.T)]

    draw.polygon(place(outline(name)), fill=255)
    if name == "ring":
        draw.polygon(place(0.6 * outline("circle")), fill=0)
    if name == "crescent":
        draw.polygon(place(0.85 * outline("circle") + (0.45, 0)), fill=0)
    return paint(rng, np.asarray(canvas.reduce(2)) / 255, fg, bg, wild), words


def textures(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    fg, bg, words = two_colours(rng, wild)
    frequency = rng.uniform(5, 14) if wild else rng.uniform(7, 12)
    angle = rng.uniform(-1, 1) * (0.3 if wild else 0.08)
    u, v = np.cos(angle) * X - np.sin(angle) * Y, np.sin(angle) * X + np.cos(angle) * Y
    px, py = rng.uniform(0, 2 * np.pi, 2)
    cx, cy = rng.uniform(-0.5, 0.5, 2)
    radius, azimuth = np.hypot(X - cx, Y - cy), np.arctan2(Y - cy, X - cx)
    wave_u, wave_v = np.sin(frequency * u + px), np.sin(frequency * v + py)
    name = TASKS["textures"]["classes"][label]
    field = {
        "horizontal stripes": lambda: wave_v,
        "vertical stripes": lambda: wave_u,
        "rising stripes": lambda: np.sin(frequency * (u + v) / 1.41 + px),
        "falling stripes": lambda: np.sin(frequency * (u - v) / 1.41 + px),
        "chequered squares": lambda: 3 * wave_u * wave_v,
        "polka dots": lambda: wave_u + wave_v - 0.8,
        "concentric rings": lambda: np.sin(frequency * radius + px),
        "rays": lambda: np.sin(np.round(frequency) * azimuth + px),
        "waves": lambda: np.sin(frequency * v + 1.6 * np.sin(6 * u + px) + py),
        "grid lines": lambda: np.maximum(wave_u, wave_v) - 0.7,
        "speckles": lambda: smooth_noise(rng, 24, 1)[..., 0] - 0.6,
        "clouds": lambda: 0.5 * smooth_noise(rng, 5, 1)[..., 0],
    }[name]()
    return paint(rng, np.clip(0.5 + 1.5 * field, 0, 1), fg, bg, wild), words


@cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in load_sample_images().images]


def photos(rng: np.random.Generator, label: int, wild: bool, test: bool = False) -> tuple[np.ndarray, str]:
    """A crop of one region; test crops lie in the last 40 % of the region's longer side, all others in the rest."""
    source, *box = REGIONS[label]
    axis = int(box[3] - box[1] > box[2] - box[0])
    box[axis if test else axis + 2] = box[axis] + 0.6 * (box[axis + 2] - box[axis])
    x0, y0, x1, y1 = box
    side = min(rng.uniform(20, 34) if wild else rng.uniform(32, 50), x1 - x0, y1 - y0)
    left, top = rng.uniform(x0, x1 - side), rng.uniform(y0, y1 - side)
    crop = photographs()[source].resize((SIZE, SIZE), Image.BILINEAR, (left, top, left + side, top + side))
    picture = np.asarray(crop) / 255
    if wild:
        picture = np.rot90(picture, rng.integers(4))[:, :: rng.choice([-1, 1])]
        picture = (picture - 0.5) * rng.uniform(0.6, 1.2) + 0.5 + rng.uniform(-0.12, 0.12, 3)
    return picture, rng.choice(["", " seen closely" if side < 40 else " seen from afar"])


KINDS = {f.__name__: f for f in (digits, photos, letters, shapes, textures, housenumbers)}


# ---- sets ------------------------------------------------------------------------------------------------------------


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def handwritten(split: str) -> tuple[np.ndarray, np.ndarray]:
    """UCI's 8x8 digits enlarged to SIZE, shuffled once; the two splits share no digit."""
    source = load_digits()
    order = generator("digits").permutation(len(source.target))
    order = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    small = [Image.fromarray((picture * 255 / 16).astype(np.uint8)) for picture in source.images[order]]
    grey = np.stack([np.asarray(p.resize((SIZE, SIZE), Image.BICUBIC)) for p in small])
    return np.repeat(grey[..., None], 3, axis=3), source.target[order].astype(np.int64)


def task_split(task: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, SIZE, SIZE, 3) of bytes and labels (N,), every class equally often in the rendered tasks."""
    if task == "digits":
        return handwritten(split)
    labels = np.arange(SPLITS[split]) % len(TASKS[task]["classes"])
    extra = {"test": split == "test"} if task == "photos" else {}
    render = KINDS[task]
    pictures = [render(generator(task, split, i), int(c), True, **extra)[0] for i, c in enumerate(labels)]
    return np.stack([to_bytes(p) for p in pictures]), labels


def world(n: int) -> tuple[np.ndarray, list[str]]:
    """The base model's n pictures and captions: every kind in turn, tidy."""
    pictures, captions, kinds = [], [], list(TASKS)
    for i in range(n):
        rng, kind = generator("world", i), kinds[i % len(kinds)]
        label = int(rng.integers(len(TASKS[kind]["classes"])))
        picture, words = KINDS[kind](rng, label, False)
        sentence = rng.choice(TASKS[kind]["templates"]).format(c=TASKS[kind]["classes"][label])
        pictures.append(to_bytes(picture))
        captions.append(sentence.removesuffix(".") + words + ".")
    return np.stack(pictures), captions


def write_split(folder: Path, task: str, split: str) -> None:
    """One parquet file that `datasets.load_dataset(folder, split=split)` reads: image (PNG) and label (class names)."""
    datasets.disable_progress_bars()

    def png(picture: np.ndarray) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    pictures, labels = task_split(task, split)
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=TASKS[task]["classes"])})
    rows = {"image": [png(p) for p in pictures], "label": labels.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(f"{path}.part")
    os.replace(f"{path}.part", path)
