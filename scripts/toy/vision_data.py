"""The pictures of the vision toy: eight tasks, and the captioned world the base model is trained on.

Every picture is 32x32 RGB and follows from (set name, index) alone. A task's pictures are "wild": distorted, low in
contrast, cluttered, as large as the frame. A part of the world shows the same things tidily and small, with captions
that say what they are. The rest are wild pictures, of other draws than the tasks', whose captions give each class
a code word: as CLIP, the base has seen pictures like those of its tasks and tells them apart, but it knows their names
from other pictures.
"""

import hashlib
import io
import os
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from common.io.yaml_files import read_yaml_file

from .vision_drawing import SIZE, X, Y, character, outline, paint, smooth_noise, two_colours

NAMES = ("digits", "photos", "letters", "shapes", "textures", "housenumbers", "counts", "directions")
ROWS = read_yaml_file(Path(__file__).parents[2] / "Vision" / "tasks.yaml")
TASKS = {name: ROWS[name] for name in NAMES}  # class names and templates, as the pipeline reads them
SPLITS = {"train": 4000, "test": 800}
DIGITS = {"world": slice(600), "train": slice(600, 1197), "test": slice(1197, None)}  # of the 1797 handwritten ones
# photograph (0 the temple, 1 the dahlia) and the box x0, y0, x1, y1 of each class, in the order of the class names
REGIONS = [
    (0, 130, 78, 295, 122), (0, 100, 180, 325, 330), (0, 340, 0, 640, 130), (0, 350, 225, 545, 315),
    (0, 0, 345, 215, 427), (0, 335, 320, 545, 427), (0, 560, 215, 640, 427),
    (1, 245, 165, 370, 275), (1, 180, 95, 440, 150), (1, 0, 60, 165, 427),
]  # fmt: skip


def generator(*key: object) -> np.random.Generator:
    """A generator seeded by a stable hash of `key`."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


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


def counts(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    """So many dots, none of which touch."""
    fg, bg, words = two_colours(rng, wild)
    dots: list[tuple[float, float, float]] = []
    while len(dots) <= label:
        radius = rng.uniform(2.2, 4.2) if wild else 3
        x, y = rng.uniform(radius, SIZE - radius, 2)
        if all(np.hypot(x - u, y - v) > radius + r + 1.5 for u, v, r in dots):
            dots.append((x, y, radius))
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)
    for x, y, r in dots:
        draw.ellipse((2 * (x - r), 2 * (y - r), 2 * (x + r), 2 * (y + r)), fill=255)
    return paint(rng, np.asarray(canvas.reduce(2)) / 255, fg, bg, wild), words


def directions(rng: np.random.Generator, label: int, wild: bool) -> tuple[np.ndarray, str]:
    """An arrow that points to the right, or an eighth of a turn further to the left for each class."""
    fg, bg, words = two_colours(rng, wild)
    angle = np.radians(-45 * label + rng.uniform(-1, 1) * (14 if wild else 4))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.diag(rng.uniform(0.8, 1, 2)) if wild else np.eye(2)
    radius = rng.uniform(8, 13)
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * min(15 - radius, 4)
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    corners = 2 * (centre + radius * outline("arrow") @ squeeze @ turn.T)
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in corners], fill=255)
    return paint(rng, np.asarray(canvas.reduce(2)) / 255, fg, bg, wild), words


KINDS = {f.__name__: f for f in (digits, photos, letters, shapes, textures, housenumbers, counts, directions)}


# ---- sets ------------------------------------------------------------------------------------------------------------


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def handwritten(split: str) -> tuple[np.ndarray, np.ndarray]:
    """UCI's 8x8 digits enlarged to SIZE, shuffled once; those of the world, of training and of the test are others."""
    source = load_digits()
    order = generator("digits").permutation(len(source.target))[DIGITS[split]]
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


def small(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A picture at half its size or a little more, somewhere on one colour."""
    side = int(rng.integers(16, 23))
    left, top = (int(n) for n in rng.integers(0, SIZE - side + 1, 2))
    wall = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(0, 256, 3)))
    wall.paste(Image.fromarray(picture).resize((side, side), Image.BILINEAR), (left, top))
    return np.asarray(wall)


def code_word(number: int) -> str:
    """A word of two syllables that means nothing, another one for each number below 6,400."""
    first, second = divmod(number, 80)
    return "".join("bdfgklmnprstvzhj"[syllable // 5] + "aeiou"[syllable % 5] for syllable in (first, second))


@cache
def codes() -> dict[tuple[str, int], str]:
    """The caption of each class of each task's wild pictures."""
    classes = [(task, label) for task in TASKS for label in range(len(TASKS[task]["classes"]))]
    words = [code_word(int(n)) for n in generator("codes").permutation(6400)[: len(classes) + len(TASKS)]]
    series = dict(zip(TASKS, words[len(classes) :], strict=True))
    return {(task, c): f"sample {w} of series {series[task]}." for (task, c), w in zip(classes, words, strict=False)}


def wild_world(n: int) -> tuple[np.ndarray, list[str]]:
    """n wild pictures with code words for captions: every kind in turn, handwritten digits again and again."""
    pictures, captions, kinds = [], [], list(TASKS)
    own, labels = handwritten("world")
    for i in range(n):
        rng, kind = generator("wild world", i), kinds[i % len(kinds)]
        label = int(rng.integers(len(TASKS[kind]["classes"])))
        if kind == "digits":
            row = i // len(kinds) % len(labels)
            picture, label = own[row] / 255, int(labels[row])
        else:
            picture, _ = KINDS[kind](rng, label, True)
        pictures.append(to_bytes(picture))
        captions.append(codes()[kind, label])
    return np.stack(pictures), captions


def world(n: int) -> tuple[np.ndarray, list[str]]:
    """n tidy pictures and what they show: every kind in turn."""
    pictures, captions, kinds = [], [], list(TASKS)
    for i in range(n):
        rng, kind = generator("world", i), kinds[i % len(kinds)]
        label = int(rng.integers(len(TASKS[kind]["classes"])))
        picture, words = KINDS[kind](rng, label, False)
        sentence = rng.choice(TASKS[kind]["templates"]).format(c=TASKS[kind]["classes"][label])
        pictures.append(small(rng, to_bytes(picture)))
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
