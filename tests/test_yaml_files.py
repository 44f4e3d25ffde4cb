"""YAML that people write: what it says, and what of it is refused with its line."""

import pytest

from common.command import parse
from common.core.errors import InputError
from common.io.yaml_files import read_rows, read_yaml, read_yaml_file
from NLG.scoring import read_tasks as read_language_tasks
from NLU.tasks import read_tasks
from Vision.tasks import Task

CONFIG = "domain: vision\ntasks: [MNIST]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' twice in one group, in lines 1 and 3; leave one out"),
        ("a: {x: 1, x: 1}\n", "'x' twice in one group, in line 1;"),
        ("a:\n- b:\n    c: 1\n    'c': 2\n", "'c' twice in one group, in lines 3 and 4"),
        ("1: a\n0x1: b\n", "'0x1' twice in one group, in lines 1 and 2"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}\n", "'d' twice in one group, in line 2"),
        ("a: [1\n", "cannot be read as YAML: .*line 2"),
        ("a: " + "9" * 5000, "cannot be read as YAML: .*digits"),
        ("[" * 100_000, "cannot be read as YAML: maximum recursion depth"),
        ("a: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML: could not determine a constructor"),
    ],
)
def test_what_is_said_twice_or_is_no_yaml_is_refused_by_line(text, said, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=f"x.yaml (has the key )?{said}"):
        read_yaml_file(tmp_path / "x.yaml")


def test_one_key_in_two_groups_and_a_merged_one_are_not_twice():
    text = "a: &x {k: 1}\nb: {<<: *x, k: 2}\nc: {<<: *x, m: 3}\nd: {<<: [*x, {k: 4}]}\ne: {1: p, '1': q}\n"
    read = {"a": {"k": 1}, "b": {"k": 2}, "c": {"k": 1, "m": 3}, "d": {"k": 1}, "e": {1: "p", "1": "q"}}
    assert read_yaml(text, "here") == read and read_yaml("", "here") is None


def test_numbers_may_have_an_exponent_and_a_date_is_text():
    text = "[1e-3, 1.5E4, -2e+1, .5e1, 1_0e1, 1., e1, 1e, 2026-11-28, .inf, no]"
    numbers = [0.001, 15000.0, -20.0, 5.0, 100.0, 1.0]
    assert read_yaml(text, "here") == [*numbers, "e1", "1e", "2026-11-28", float("inf"), False]


def test_a_config_that_says_something_twice_is_refused_by_file_and_line(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(CONFIG + "start: {method: ta}\n")
    second.write_text("start:\n  method: tsv\nrun: {name: x}\nstart: {method: average}\n")
    assert parse("", ["--config", str(first)]).start.method == "ta"
    with pytest.raises(InputError, match="second.yaml has the key 'start' twice in one group, in lines 1 and 4"):
        parse("", ["--config", str(first), "--config", str(second)])


def test_what_is_twice_in_a_field_that_is_typed_counts_for_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG + "eval: {tests: {MNIST: [MNIST], MNIST: [SVHN]}}\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert parse("", [*config, "--eval.tests", "{MNIST: []}"]).eval.tests == {"MNIST": []}
    for typed in ([], ["--eval.test", "x"], ["--eval.limit", "3"]):
        with pytest.raises(InputError, match="c.yaml has the key 'MNIST' twice in one group, in line 3"):
            parse("", [*config, *typed])


def test_what_the_command_line_says_twice_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "adapt.yaml").write_text("lr: 0.1\nlr: 0.2\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    for typed, key in {
        "--start.hyper={ta: {scale: 0.1}, ta: {scale: 0.2}}": "ta",
        "--start.hyper={ta: {scale: 0.1, scale: 0.2}}": "scale",
        f"--adapt={tmp_path / 'adapt.yaml'}": "lr",
    }.items():
        with pytest.raises(InputError, match=f"the command line, or a file that it names, has the key '{key}' twice"):
            parse("", [*config, typed])


def test_a_row_of_tasks_that_stands_twice_is_refused(tmp_path):
    row = "SST-2: {text: [sentence], labels: 2, metric: accuracy}\n"
    (tmp_path / "tasks.yaml").write_text(row)
    assert list(read_tasks(tmp_path / "tasks.yaml")) == ["SST-2"]
    (tmp_path / "tasks.yaml").write_text(row + "\n" + row)
    with pytest.raises(InputError, match="tasks.yaml has the key 'SST-2' twice in one group, in lines 1 and 3"):
        read_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{templates: ['a {c}.'], clases: [x]}", "task X has no field 'clases'; choose from templates, classes, hub"),
        ("{templates: ['a {c}.'], classes: [0, 1]}", r"task X: classes must be a list, \[a, b\], it is \[0, 1\]"),
        ("{templates: 'a {c}.', classes: [x]}", r"task X: templates must be a list"),
        ("{classes: [x]}", "task X lacks templates"),
        ("", "task X lacks templates, classes"),
    ],
)
def test_a_row_of_a_task_is_refused_by_its_field(tmp_path, row, said):
    (tmp_path / "tasks.yaml").write_text(f"X: {row}\n")
    with pytest.raises(InputError, match=f"tasks.yaml: {said}"):
        read_rows(tmp_path / "tasks.yaml", Task)


def test_a_rule_that_is_none_is_refused(tmp_path):
    row = "X: {rule: nummer, prompt: '{problem}', max_new_tokens: 8}\n"
    (tmp_path / "tasks.yaml").write_text(row)
    with pytest.raises(InputError, match="task X: unknown rule 'nummer'; choose from number, expression"):
        read_language_tasks(tmp_path / "tasks.yaml")
    (tmp_path / "tasks.yaml").write_text(row.replace("nummer", "number"))
    assert read_language_tasks(tmp_path / "tasks.yaml")["X"].max_new_tokens == 8
    (tmp_path / "tasks.yaml").write_text("[X]\n")
    with pytest.raises(InputError, match="is no mapping of names to rows"):
        read_language_tasks(tmp_path / "tasks.yaml")
