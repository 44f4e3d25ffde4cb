"""Configs: every YAML loads, the command line comes first, and what is wrong is named with its choices."""

from pathlib import Path

import pytest

from common.command import parse
from common.config import ROOT
from common.core.errors import InputError
from common.validation import check_choices
from Vision import domain

VISION = sorted((ROOT / "configs" / "vision").glob("*.yaml"))


def vision(*arguments, config="vit_b32"):
    return parse("", ["--config", str(ROOT / "configs" / "vision" / f"{config}.yaml"), *arguments])


@pytest.mark.parametrize("file", VISION, ids=lambda f: f.stem)
def test_every_vision_config_loads_and_its_choices_exist(file):
    config = parse("", ["--config", str(file)])
    check_choices(config, domain)
    assert file.stem in file.read_text().split("domain:")[0], "the header gives the command"


@pytest.mark.parametrize("name", ["vit_b32", "vit_b16", "vit_l14"])
def test_the_papers_settings(name):
    config = vision(config=name)
    anchors = config.anchors
    assert (anchors.number, anchors.steps, anchors.lr, anchors.distance) == (64, 1200, 0.01, "cos")
    settings = {s: config.adapt.for_start(s) for s in ("pretrained", "ta", "tsv", "wudi")}
    assert {s: (a.lr, a.epochs, a.batch_size) for s, a in settings.items()} == {
        "pretrained": (1e-5, 100, 128),
        "ta": (1e-2, 100, 128),
        "tsv": (1e-2, 100, 128),
        "wudi": (1e-2, 25, 512),
    }


def test_the_command_line_comes_before_what_the_yaml_says_of_a_start():
    config = vision("--adapt.epochs=7", "--adapt.lr", "0.5")
    wudi, pretrained = config.adapt.for_start("wudi"), config.adapt.for_start("pretrained")
    assert (wudi.epochs, wudi.batch_size, pretrained.lr, pretrained.epochs) == (7, 512, 0.5, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--anchors.init", "rows"], ["anchors.init", "weight", "gauss", "rows"]),
        (["--anchors.distance", "l3"], ["anchors.distance", "cos", "mse", "l1"]),
        (["--anchors.weights", "big"], ["anchors.weights", "equal", "size", "norm"]),
        (["--anchors.stps", "3"], ["anchors.stps", "did you mean --anchors.steps?"]),
        (["--epochs=3"], ["--epochs=3; did you mean --adapt.epochs?"]),
        (["--quite_another", "3"], ["arguments: --quite_another 3 (in"]),
        (["--eval.limit", "many"], ["eval.limit is many, but should be a whole number or null (in"]),
        (["--compare.seeds", "3"], ["compare.seeds is 3, but should be a list"]),
        (["--start.hyper", "{ta:{scale:1}}"], ["start.hyper is {ta:{scale:1}}, but should be a mapping"]),
        (["--adapt.rest", "ta"], ["adapt.rest", "pretrained", "start"]),
        (["--run.name"], ["--run.name wants a value behind it (in"]),
        (["--config", "nope.yaml"], ["there is no file", "nope.yaml"]),
    ],
)
def test_wrong_options_are_named_with_their_choices(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        vision(*arguments)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and all(word in said for word in words)


@pytest.mark.parametrize("written", ["anchors: {stps: 3}", "anchros: {steps: 3}"])
def test_an_unknown_yaml_key_is_named_with_the_nearest(written, tmp_path, capsys):
    file = tmp_path / "x.yaml"
    file.write_text(f"domain: vision\ntasks: [MNIST]\n{written}\n")
    with pytest.raises(SystemExit):
        parse("", ["--config", str(file)])
    said = capsys.readouterr().err
    assert "there is no option an" in said and "did you mean anchors.steps? (in" in said and str(file) in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval.tests", "{MNIST: [MNITS]}"], "unknown test set 'MNITS'; choose from SUN397, Cars"),
        (["--tasks", "[MNIST,MNIST]"], "none twice"),
        (["--compare.starts", "[tas]"], "compare.starts: unknown start 'tas'; choose from pretrained, average, "),
        (["--start.hyper", "{ta: {scael: 1}}"], "unknown hyperparameter 'scael', accepted: scale"),
        (["--anchors.number", "0"], "anchors.number is 0"),
        (["--anchors.scale", "0"], "anchors.scale is 0"),
        (["--anchors.lr", ".inf"], "anchors.lr is inf; it must be a finite number"),
        (["--anchors.scale", ".nan"], "anchors.scale is nan; it must be a finite number"),
        (["--adapt.lr", ".nan"], "adapt.lr is nan; it must be a finite number"),
        (["--adapt.blend", ".nan"], "adapt.blend is nan; it must be a finite number"),
        (["--adapt.speedup", ".inf"], "adapt.speedup is inf; it must be a finite number"),
        (["--adapt.by_start", "{ta: {lr: .inf}}"], "adapt.by_start.ta.lr is inf; it must be a finite number"),
        (["--run.gpus_per_unit", ".nan"], "run.gpus_per_unit is nan; it must be a finite number"),
        (["--start.hyper", "{ta: {scale: [1, .nan]}}"], r"start.hyper.ta.scale\[1\] is nan; it must be a finite"),
        (["--compare.search", "{ta: {scale: [.inf]}}"], r"compare.search.ta.scale\[0\] is inf; it must be a finite"),
        (["--anchors.steps=-1"], "anchors.steps is -1; it must be zero or more"),
        (["--eval.limit", "0"], "eval.limit is 0; it must be above zero"),
        (["--eval.limit=-3"], "eval.limit is -3"),
        (
            ["--start.method", "swudi-a"],
            "start.method: unknown start 'swudi-a'; choose from pretrained, .*; did you mean swudi_a?",
        ),
        (["--run.name", "../up"], "run.name is '../up'; it must name a folder below run.root"),
        (["--run.name", "/tmp"], "run.name is '/tmp'"),
        (["--run.name="], "run.name is ''"),
        (["--run.name", "."], "run.name is '.'"),
        (["--run.name", "a/../../b"], "run.name is 'a/../../b'"),
        (["--adapt.label", "a/b"], "adapt.label is 'a/b'; it is a part of a folder's name, and has no slash"),
        (["--adapt.label", "../../x"], "adapt.label is '../../x'; it is a part"),
        (["--adapt.by_start", "{ta: {label: a/b}}"], "adapt.by_start.ta.label is 'a/b'"),
        (["--start.checkpoint", "x", "--start.method", "../../x"], "start.method is '../../x'; it is a part"),
        (["--tasks", "[MNIST,../x]"], "the task '../x' must be the name of a folder below the run's"),
        (["--eval.workers=-1"], "eval.workers is -1"),
        (["--run.blocks", "[]"], "run.blocks names no block; leave it out"),
        (["--run.blocks", "[0,0]"], "run.blocks names a block twice: .0, 0"),
        (["--compare.starts", "[tsv,ta,tsv]"], "compare.starts names a start twice: tsv, ta, tsv"),
        (["--compare.inits", "[gauss,gauss]"], "compare.inits names an initialisation twice: gauss, gauss"),
        (["--domain", "nlu"], "config is of domain nlu"),
    ],
)
def test_wrong_choices_are_named_before_anything_is_opened(arguments, message):
    with pytest.raises(InputError, match=message):
        check_choices(vision(*arguments), domain)


def test_names_with_a_slash_where_folders_are_meant_are_taken():
    check_choices(vision("--run.name", "table/seed_0", "--adapt.label", "σ 0.01, run 2..3"), domain)


def test_no_without_quotes_is_a_choice_wherever_it_is_one(tmp_path):
    """YAML reads it as false; false of what is true or false stays that."""
    file = tmp_path / "no.yaml"
    file.write_text(
        "domain: vision\ntasks: [MNIST]\nanchors: {together: no, skip_null_gradients: no}\n"
        "start: {hyper: {dc_merge: {smooth: no}}}\ncompare: {search: {dc_merge: {smooth: [no, mean]}}}\n"
        "run: {report: no, score: no}\n"
    )
    config = parse("", ["--config", str(file)])
    assert (config.run.report, config.run.score) == ("no", False)
    assert (config.anchors.together, config.anchors.skip_null_gradients) == ("no", False)
    assert config.start.hyper == {"dc_merge": {"smooth": "no"}}
    assert config.compare.search == {"dc_merge": {"smooth": ["no", "mean"]}}
    typed = vision("--run.report", "no", "--start.hyper", "{dc_merge: {smooth: no}}", "--run.score", "no")
    assert (typed.run.report, typed.run.score) == ("no", False)
    assert typed.start.hyper["dc_merge"] == {"smooth": "no"}


def test_an_unknown_field_of_one_start_is_named():
    with pytest.raises(InputError, match=r"adapt.by_start.wudi has no field 'epoch'; choose from batch_size"):
        vision("--adapt.by_start", "{wudi: {epoch: 3}}")


def test_paths_are_relative_to_the_root():
    model = vision("--model.root", "/data").model
    assert model.path("expert", "DTD") == Path("/data/DTD/finetuned.safetensors")


def test_a_preset_stands_between_the_config_and_what_is_typed():
    paper, fast = vision(), vision("--preset", "fast")
    assert (paper.anchors.optimizer, paper.run.precision) == ("adamw", "float32")
    assert (fast.anchors.optimizer, fast.anchors.schedule, fast.run.precision) == ("muon", "linear", "bf16")
    assert fast.anchors.number == paper.anchors.number and fast.anchors.steps < paper.anchors.steps
    for arguments in (["--preset=fast", "--anchors.steps", "7"], ["--anchors.steps", "7", "--preset", "fast"]):
        assert vision(*arguments).anchors.steps == 7
    file = str(ROOT / "configs" / "vision" / "vit_b32.yaml")
    assert parse("", ["--anchors.steps=7", "--preset=fast", "--config", file]) == vision(
        "--preset=fast", "--anchors.steps=7"
    )


def test_an_unknown_preset_is_named_with_the_choices():
    with pytest.raises(InputError, match="unknown preset 'quick'; choose from fast"):
        vision("--preset", "quick")


def test_no_epochs_are_a_merge_of_their_own_after_a_warm_start_alone():
    check_choices(vision("--adapt.epochs", "0", "--adapt.warm_start", "regmean"), domain)
    with pytest.raises(InputError, match="adapt.epochs is 0"):
        check_choices(vision("--adapt.epochs", "0"), domain)


def test_a_ridge_is_of_a_warm_start_and_never_below_zero():
    warm = ("--adapt.warm_start", "regmean")
    check_choices(vision(*warm, "--adapt.ridge", "0.1"), domain)
    with pytest.raises(InputError, match="adapt.ridge is of the closed form: set adapt.warm_start regmean"):
        check_choices(vision("--adapt.ridge", "0.1"), domain)
    for wrong, said in {"-1": "zero or more", ".inf": "a finite number", ".nan": "a finite number"}.items():
        with pytest.raises(InputError, match=f"adapt.ridge is .*; it must be {said}"):
            check_choices(vision(*warm, f"--adapt.ridge={wrong}"), domain)
