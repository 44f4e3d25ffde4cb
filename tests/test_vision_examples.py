"""The labelled images of a task: whose order their labels are in, and what of them is refused."""

import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.core.errors import InputError
from common.io.examples import Sample
from helpers import change
from pico_hf_classifiers import pico_classifier_config, write_pico_classifiers
from Vision import domain
from Vision.class_names import places_of
from Vision.examples import in_rgb
from Vision.tasks import TASKS

CPU = torch.device("cpu")
CLASSES = {name: TASKS[name].classes for name in ("MNIST", "GTSRB", "EuroSAT", "Cars", "shapes")}


def pictures(number):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(number)]


def write_table(folder, labels, feature=None, images=None):
    """A parquet file of so many images with labels of a kind."""
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.Value("int64")})
    records = {"image": images or pictures(len(labels)), "label": labels}
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(records, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


def write_folders(folder, labels, names):
    """The same images in one folder for each class."""
    for number, (image, label) in enumerate(zip(pictures(len(labels)), labels, strict=True)):
        place = folder / "test" / names[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03}.png")


def labelled(pico_config, data, task):
    return domain.labelled_images(change(pico_config, "eval", data=str(data)), task)


def by_image(examples):
    return {row["image"].tobytes(): row["label"] for row in (examples[i] for i in range(len(examples)))}


@pytest.mark.parametrize("task", ["MNIST", "GTSRB", "EuroSAT", "Cars", "shapes"])
def test_folders_have_the_labels_of_the_same_images_by_number(task, pico_config, tmp_path):
    """Folders by their names, those of GTSRB by their numbers; `datasets` sorts both by their text: 0, 1, 10, 11, …"""
    classes = CLASSES[task]
    labels = [i % len(classes) for i in range(len(classes) + 3)]
    write_table(tmp_path / "numbers" / task, labels)
    named = [name.replace(" ", "_").replace("/", "-") for name in classes]
    write_folders(tmp_path / "folders" / task, labels, list(map(str, range(43))) if task == "GTSRB" else named)
    expected = dict(zip((image.tobytes() for image in pictures(len(labels))), labels, strict=True))
    for data in ("numbers", "folders"):
        assert by_image(labelled(pico_config, tmp_path / data, task)) == expected


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (["b", "A"], ["a", "b"], [1, 0]),
        (["polka-dotted", "Hay_Field"], ["hay field", "polka dotted"], [1, 0]),
        (["0", "1", "10", *"23456789"], [f"sign {x}" for x in "abcdefghijk"], [0, 1, 10, *range(2, 10)]),
        (["1", "2", "3"], ["one", "two", "three"], [0, 1, 2]),
        (["00000", "00001", "00002"], ["one", "two", "three"], [0, 1, 2]),
        (["02", "00", "01"], ["0", "1", "2"], [2, 0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"], [0, 1, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["c", "b", "a"], [0, 1, 2]),
    ],
)
def test_places_are_by_name_and_else_by_number(names, classes, expected, capsys):
    assert places_of(names, classes, "the data") == expected and not capsys.readouterr().err


def test_names_that_tell_nothing_are_taken_in_order_with_a_warning(capsys):
    names = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    assert places_of(names.split(), CLASSES["EuroSAT"], "the data of X") == list(range(10))
    assert (
        "the data of X has names of classes that are not in Vision/tasks.yaml, such as 'Ann" in capsys.readouterr().err
    )


@pytest.mark.parametrize("names", [["c", "x", "a"], ["a", "A", "b"]])
def test_names_at_other_places_that_are_not_all_known_are_refused(names):
    with pytest.raises(InputError, match=r"the data calls class \d '.', which is class \d of .*: give all of them"):
        places_of(names, ["a", "b", "c"], "the data")
    with pytest.raises(InputError, match="calls class 0 '1', which is class 1 of"):  # the 10 of SVHN is a zero
        places_of([str(i) for i in range(1, 11)], CLASSES["MNIST"], "the data")


def test_a_perfect_classifier_scores_one_in_whatever_order_its_labels_are(tmp_path):
    models = write_pico_classifiers(tmp_path, "vit")
    classes, model = CLASSES["shapes"], models["MNIST"]
    alphabetical = sorted(classes)
    model.config.id2label = dict(enumerate(alphabetical))
    model.config.label2id = {name: number for number, name in enumerate(alphabetical)}
    model.save_pretrained(tmp_path / "shapes")
    shutil.copy(tmp_path / "MNIST" / "preprocessor_config.json", tmp_path / "shapes")
    config = replace(pico_classifier_config(tmp_path, tmp_path), tasks=["shapes"])
    pixels = domain.library(config.model).preprocessing(config, "shapes")
    with torch.no_grad():
        answers = model(**pixels([{"image": image} for image in pictures(30)])).logits.argmax(-1).tolist()
    assert len(set(answers)) > 1
    write_table(tmp_path / "own" / "shapes", answers, datasets.ClassLabel(names=alphabetical))
    ours = [classes.index(alphabetical[answer]) for answer in answers]
    write_table(tmp_path / "yaml" / "shapes", ours, datasets.ClassLabel(names=classes))
    write_table(tmp_path / "numbers" / "shapes", ours)
    for data in ("own", "yaml", "numbers"):
        each = change(config, "eval", data=str(tmp_path / data))
        assert dict(domain.score(each, "shapes", {"x": tmp_path / "shapes"}, CPU))["x"].value == 1
        drawn = domain.labelled_task(each, "shapes", Sample("test", None, 30), CPU).batch(range(30))["labels"]
        assert sorted(drawn.tolist()) == sorted(ours)


@pytest.mark.parametrize(
    ("labels", "feature", "said"),
    [
        ([0, 1, 2, 42], None, "42 in the column label of example 3 of 4 from 0; numbers 0 to 9 are needed"),
        ([0, -1], None, "-1 in the column label of example 1"),
        (list(range(1, 11)), None, "10 in the column label of example 9"),
        (["0", "1"], datasets.Value("string"), "'0' in the column label of example 0"),
        ([0, None], None, "None in the column label of example 1"),
        ([0.5], datasets.Value("float64"), "0.5 in the column label of example 0"),
        ([3, -1], datasets.ClassLabel(names=CLASSES["MNIST"]), "-1 in the column label of example 1"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels, feature, said, pico_config, tmp_path):
    write_table(tmp_path / "MNIST", labels, feature)
    with pytest.raises(InputError, match=f"the data of task MNIST has {said}"):
        labelled(pico_config, tmp_path, "MNIST")


def test_labels_that_are_whole_fractions_are_classes(pico_config, tmp_path):
    write_table(tmp_path / "MNIST", [0.0, 3.0], datasets.Value("float64"))
    assert labelled(pico_config, tmp_path, "MNIST").labels == [0, 3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\x89PNG nothing"])
def test_an_image_that_cannot_be_read_is_named_by_its_file(damage, workers, pico_config, tmp_path):
    write_folders(tmp_path / "MNIST", list(range(10)), CLASSES["MNIST"])
    file = tmp_path / "MNIST" / "test" / "7" / "007.png"
    file.write_bytes(damage(file.read_bytes()))
    config = change(pico_config, "eval", data=str(tmp_path), workers=workers)
    with pytest.raises(InputError, match=r"task MNIST, example 7 of 10 from 0, .*7/007.png: the image cannot be read"):
        dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, CPU))
    task = domain.calibration_task(config, "MNIST", Sample("test", None, 4), CPU)
    with pytest.raises(InputError, match=r"7/007.png: the image cannot be read \(\w+: .*\); mend it or leave it out"):
        list(task.batches)


def test_an_image_that_is_not_there_is_named(pico_config, tmp_path):
    write_table(tmp_path / "MNIST", [0, 1], images=[pictures(1)[0], None])
    with pytest.raises(InputError, match="task MNIST, example 1 of 2 from 0: the column image holds nothing; mend it"):
        labelled(pico_config, tmp_path, "MNIST")[1]


def test_grey_images_of_16_bits_keep_their_levels():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for kind in ("<u2", ">u2"):
        seen = np.asarray(in_rgb(Image.fromarray(levels.astype(kind))))
        assert (seen == (levels // 257)[..., None]).all() and seen.shape == (16, 16, 3)


def test_pixels_of_32_bits_are_taken_where_they_are_8_and_else_refused(pico_config, tmp_path):
    levels = np.arange(256).reshape(16, 16)
    for kind in (np.int32, np.float32):
        assert (np.asarray(in_rgb(Image.fromarray(levels.astype(kind))))[..., 0] == levels).all()
    with pytest.raises(ValueError, match="pixels of 32 bits from 0.0 to 1.0, where 0 to 255 are needed"):
        in_rgb(Image.fromarray((levels / 255).astype(np.float32)))
    place = tmp_path / "MNIST" / "test" / "0"
    for name in CLASSES["MNIST"]:
        (tmp_path / "MNIST" / "test" / name).mkdir(parents=True)
        Image.fromarray(levels.astype(np.int32) * 300).save(place.parent / name / "x.tiff")
    with pytest.raises(
        InputError, match=r"example 0 of 10 from 0, .*x.tiff: the image cannot be read \(ValueError: pi"
    ):
        labelled(pico_config, tmp_path, "MNIST")[0]
