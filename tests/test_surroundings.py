"""What lies around the weights of a merged model: its config, types, tokenizers; and models that are something else."""

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from common.assembly import UNFINISHED
from common.core import notices
from common.core.errors import InputError
from common.evaluation.scoring import score_run
from common.io.checkpoints import Checkpoint, write_text
from common.pipeline import merge_alone
from common.planning.dry_run import MERGE, describe
from common.provenance import written_weights
from helpers import change, edit_config, read, rewrite
from NLG import domain as nlg
from NLG.inputs import check_ends
from NLU import domain as nlu
from pico_nlg import EMBEDDING, HEAD, VOCABULARY, pico_model, pico_tokenizer, save
from Vision import domain as vision

MODELS = ("base", "math", "code")


@pytest.fixture
def own(own_nlg, monkeypatch):
    """Llamas of equal vocabularies, all of which have the base's config."""
    monkeypatch.setattr(notices, "_said", set())
    root, config = own_nlg
    for name in MODELS:
        torch.manual_seed(len(name) + ord(name[0]))
        save(pico_model("llama"), pico_tokenizer(), root / name)
    return root, change(config, "model", vocabulary="refuse", tokenizers=())


def stored(folder):
    return {name: row.dtype for name, row in Checkpoint(folder).rows.items()}


def save_as(folder, edit):
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})


# ---- language models -------------------------------------------------------------------------------------------------


def test_an_expert_of_another_function_is_refused_before_any_weight(own, monkeypatch):
    root, config = own
    edit_config(root / "code", num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(InputError, match=r"code/config.json: num_attention_heads is 1, the base's is 2"):
        merge_alone(config, nlg)
    assert not config.run.dir.exists()


def test_an_encoder_decoder_is_sent_to_its_domain_before_any_weight(own, monkeypatch):
    root, config = own
    fields = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    kind = AutoConfig.for_model("bart", vocab_size=VOCABULARY, **fields, **heads)
    for name in MODELS:
        AutoModelForSeq2SeqLM.from_config(kind).save_pretrained(root / name)
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(InputError, match=r"base/config.json: a bart has an encoder before its decoder: domain nlu"):
        merge_alone(change(config, "model", family="auto"), nlg)
    assert not config.run.dir.exists()


def test_positions_that_are_counted_from_another_padding_are_refused(own, monkeypatch):
    root, config = own
    fields = {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 24, "pad_token_id": 1}
    kind = AutoConfig.for_model("xglm", vocab_size=VOCABULARY, max_position_embeddings=32, **fields)
    for name in MODELS:
        save(AutoModelForCausalLM.from_config(kind), pico_tokenizer(), root / name)
    edit_config(root / "code", pad_token_id=3)
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(InputError, match=r"code/config.json: pad_token_id is 3, the base's is 1"):
        merge_alone(change(config, "model", family="auto"), nlg)


def test_a_config_of_transformers_4_stays_one(own):
    root, config = own
    old = {"torch_dtype": "float32", "rope_theta": 5e5, "rope_scaling": None}
    for name in MODELS:
        fields = json.loads((root / name / "config.json").read_text()) | old
        fields = {k: v for k, v in fields.items() if k not in ("dtype", "rope_parameters")}
        (root / name / "config.json").write_text(json.dumps(fields, indent=1))
    folder = merge_alone(config, nlg)
    assert (folder / "config.json").read_bytes() == (root / "base" / "config.json").read_bytes()
    half = change(change(config, "model", dtype="float16"), "run", name="half")
    changed = json.loads((merge_alone(half, nlg) / "config.json").read_text())
    assert changed == fields | {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("said", "edit", "wanted", "embedding"),
    [
        ("bfloat16", lambda d: {n: t if n == EMBEDDING else t.bfloat16() for n, t in d.items()}, "BF16", "F32"),
        ("float32", lambda d: {n: t.bfloat16() if n == EMBEDDING else t for n, t in d.items()}, "F32", "BF16"),
        (None, lambda d: {n: t.bfloat16() if n == EMBEDDING else t.half() for n, t in d.items()}, "F16", "BF16"),
        ("float16", lambda d: {n: t.bfloat16() for n, t in d.items()}, "F16", "F16"),
    ],
)
def test_each_type_is_the_bases_unless_the_config_says_one_it_lacks(own, said, edit, wanted, embedding):
    root, config = own
    for name in MODELS:
        edit_config(root / name, dtype=said)
        save_as(root / name, lambda d: edit(d) | {"model.a.ids": torch.arange(2**40, 2**40 + 5)})
    folder = merge_alone(config, nlg)
    types = stored(folder)
    assert types.pop("model.a.ids") == "I64" and types.pop(EMBEDDING) == embedding
    assert set(types.values()) == {wanted}
    (file,) = folder.glob("model-*.safetensors")
    assert torch.equal(load_file(file)["model.a.ids"], torch.arange(2**40, 2**40 + 5))


def test_what_surrounds_an_expert_comes_with_its_tokenizer(own, capsys):
    """Ids of special tokens, the generation config, every chat template and tokenizer file; the rest is the base's."""
    root, config = own
    for file, text in {
        "generation_config.json": '{"eos_token_id": [1, 5], "temperature": 0.6}',
        "chat_template.jinja": "a", "chat_template.json": "{}", "additional_chat_templates/tools.jinja": "b",
        "tokenizer.model": "c", "spiece.model": "d", "x.tiktoken": "e", "tekken.json": "{}", "vocab.txt": "f",
        "preprocessor_config.json": "{}", "run.py": "never",
    }.items():  # fmt: skip
        (root / "code" / file).parent.mkdir(exist_ok=True)
        (root / "code" / file).write_text(text)
    edit_config(root / "code", eos_token_id=5, pad_token_id=3)
    folder = merge_alone(change(config, "model", tokenizers=("code",)), nlg)
    for file in (root / "code").rglob("*"):
        copied = folder / "code" / file.relative_to(root / "code")
        if file.is_file() and file.name not in ("config.json", "model.safetensors", "run.py"):
            assert copied.read_bytes() == file.read_bytes(), file
    assert not (folder / "code" / "run.py").exists() and not (folder / "chat_template.jinja").exists()
    base = json.loads((root / "base" / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == base
    assert json.loads((folder / "code" / "config.json").read_text()) == base | {"eos_token_id": 5, "pad_token_id": 3}
    assert "code ends its answers with eos_token_id [1, 5], the base with 1" in capsys.readouterr().err
    for name in ("base", "math"):
        (root / name / "generation_config.json").unlink(missing_ok=True)
        edit_config(root / name, eos_token_id=None)
    check_ends(config.model, {name: root / name for name in ("math", "code")})
    said = capsys.readouterr().err
    assert "code ends its answers with eos_token_id [1, 5], the base's files name none: the merged" in said
    assert "math" not in said


def said_of(own_config, capsys):
    """What a merge says on stderr, and its folder."""
    capsys.readouterr()
    return merge_alone(own_config, nlg), capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "math", "code", "said"),
    [
        ("", "x", "x", "math, code have one chat template, the base, {root}/base, has none, and neither has the"),
        ("", "x", "y", "math, code have unlike chat templates, the base, {root}/base, has none, and neither"),
        ("", "x", "", "math has a chat template, the base, {root}/base, has none, and neither has the merged model"),
        ("z", "x", "y", "math, code have unlike chat templates, the base, {root}/base, has another, which the merged"),
        ("z", "z", "y", "code has a chat template, the base, {root}/base, has another, which the merged model has"),
        ("z", "z", "z", ""),
        ("z", "", "", ""),
    ],
)
def test_chat_templates_unlike_the_bases_are_named(own, capsys, base, math, code, said):
    """Where it is written makes no difference: a file, or the tokenizer's settings as before transformers 4.43."""
    root, config = own
    for name, template in zip(MODELS, (base, math, code), strict=True):
        if template and name == "math":
            settings = root / name / "tokenizer_config.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
        elif template:
            (root / name / "chat_template.jinja").write_text(template)
    folder, err = said_of(config, capsys)
    assert ("chat template" in err) == bool(said) and said.format(root=root) in err
    assert not said or "model.tokenizers can name experts whose tokenizer" in err
    kept = folder / "chat_template.jinja"
    assert kept.read_text() == base if base else not kept.exists()
    notices._said.clear()
    beside = change(change(config, "model", tokenizers=("code",)), "run", name="beside")
    _, err = said_of(beside, capsys)
    assert ("beside it lies that of code, as model.tokenizers says" in err) == ("code" in said)


def test_an_expert_that_reads_text_otherwise_is_named(own, capsys):
    root, config = own
    file = root / "math" / "tokenizer.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"normalizer": {"type": "Lowercase"}}))
    (root / "code" / "tokenizer.json").write_text(json.dumps(whole | {"normalizer": None}))  # as it was
    _, err = said_of(config, capsys)
    own = root / "base" / "tokenizer.json"
    assert f"the normalizer in {file} is not the base's, {own}: the merged model reads a text as the base does" in err
    assert err.count("the base's, ") == 1


def test_a_classic_expert_that_reads_text_otherwise_is_named(own, capsys):
    root, config = own
    for name in MODELS:
        (root / name / "tokenizer.json").rename(root / name / "vocab.txt")
        (root / name / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": name != "math"}))
        (root / name / "vocab.txt").write_text("\n".join(map(str, range(VOCABULARY))))
    (root / "code" / "tokenizer_config.json").write_text("{}")
    _, err = said_of(config, capsys)
    files = [root / name / "tokenizer_config.json" for name in ("math", "base")]
    assert f"the do_lower_case in {files[0]} is not the base's, {files[1]}: the merged model" in err
    assert err.count("the base's, ") == 1 and "matched by number" not in err


def test_all_that_lies_beside_the_base_is_copied(own):
    """But weights, code, what is large, what is of another model, and what the merge writes by itself."""
    root, config = own
    kept = {
        "LICENSE": "l", "NOTICE.txt": "n", "USE_POLICY.md": "u", "audio_tokenizer_config.json": "{}", "source.spm": "s",
        "target.spm": "t", "mm_config.json": "{}", "special_tokens.txt": "", "speech_config.json": "{}",
    }  # fmt: skip
    left = {
        "README.md": "of the base", "provenance.json": "{}", "run.py": "x", "start.sh": "x", "training_args.bin": "x",
        "model.onnx": "x", "adapter_note.json": "{}", "pytorch_model.bin.index.json": "{}", ".gitattributes": "x",
        "large.json": " " * (2**24 + 1), "deeper/note.txt": "x",
    }  # fmt: skip
    for name, text in (kept | left).items():
        (root / "base" / name).parent.mkdir(exist_ok=True)
        (root / "base" / name).write_text(text)
    folder = merge_alone(config, nlg)
    assert {name: (folder / name).read_text() for name in kept} == kept
    written = {"README.md", "provenance.json"}
    assert not [name for name in left if (folder / name).exists() and name not in written]
    assert not [name for name in written if (folder / name).read_text() == left[name]]


def test_code_that_is_left_behind_is_not_named_as_if_it_were_there(own, capsys):
    """auto_map made from_pretrained(folder, trust_remote_code=True) look for files that are never copied."""
    root, config = own
    for name in MODELS:
        edit_config(root / name, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
        (root / name / "configuration_x.py").write_text("raise SystemExit")
        settings = root / name / "tokenizer_config.json"
        own_map = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | own_map))
    folder, err = said_of(change(config, "model", tokenizers=("code",)), capsys)
    for place in (folder, folder / "code"):
        assert not list(place.glob("*.py"))
        for file in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((place / file).read_text())
        assert "is left out, for it names configuration_x.py, modeling_x.py, and code is never copied" in err
        assert AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).config.model_type == "llama"
        assert len(AutoTokenizer.from_pretrained(place, trust_remote_code=True)) == VOCABULARY


def test_code_on_the_hub_is_where_it_was(own, capsys):
    root, config = own
    fields = {"auto_map": {"AutoConfig": "org/name--configuration_x.X"}}
    for name in MODELS:
        edit_config(root / name, **fields)
    folder, err = said_of(config, capsys)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == fields["auto_map"] and "auto_map" not in err


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "README.md", "heads"])
def test_what_lies_where_the_merge_goes_is_refused_and_stays(own, monkeypatch, name):
    """It may be one of the models that are merged. What a merge that was killed has left is its own."""
    _, config = own
    folder = config.run.dir / "merged" / "ta"
    (folder / "parts").mkdir(parents=True)
    (folder / ".model-00000.staged").write_text("left by a kill")
    write_text(folder / name / "config.json" if name == "heads" else folder / name, "somebody's")
    with monkeypatch.context() as patched, pytest.raises(InputError) as raised:
        patched.setattr(Checkpoint, "read", None)
        merge_alone(config, nlg)
    assert str(raised.value).startswith(f"{folder / name} lies where a merged model is to be written")
    assert describe(config, nlg, MERGE).refusals == [str(raised.value)]
    assert sorted(each.name for each in folder.iterdir()) == sorted([".model-00000.staged", "parts", name])
    if "-of-" not in name:
        shutil.rmtree(folder / name) if name == "heads" else (folder / name).unlink()
    (folder / UNFINISHED).touch()  # as the kill of a merge leaves it
    assert AutoModelForCausalLM.from_pretrained(merge_alone(config, nlg)).config.vocab_size == VOCABULARY
    assert not (folder / UNFINISHED).exists()


@pytest.mark.parametrize("linked", [True, False])
def test_an_expert_where_the_merge_goes_is_not_overwritten(own, linked):
    root, config = own
    folder = config.run.dir / "merged" / "ta"
    folder.parent.mkdir(parents=True)
    if linked:
        folder.symlink_to(root / "math")
    else:
        shutil.copytree(root / "math", folder)
        config = change(config, "model", experts={"math": str(folder)})
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(InputError, match="lies where a merged model is to be written"):
        merge_alone(config, nlg)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_file_in_the_place_of_a_folder_is_named(own):
    _, config = own
    write_text(config.run.dir / "merged", "no folder")
    with pytest.raises(InputError, match=r"merged is a file, where the folder \S+merged/ta is to be; move it away"):
        merge_alone(config, nlg)


def test_reward_models_stay_what_they_are_and_do_not_mix(own):
    root, config = own
    causal = json.loads((root / "base" / "config.json").read_text())
    for seed, name in enumerate(("rm", "math", "code")):
        torch.manual_seed(seed)
        fields = {k: v for k, v in causal.items() if k not in ("architectures", "dtype")}
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(**fields | {"num_labels": 1, "pad_token_id": 0})
        )
        save(model, pico_tokenizer(), root / name)
    with pytest.raises(
        InputError,
        match="math is a LlamaForSequenceClassification, with score.weight outside its body; the base .*base is a "
        "LlamaForCausalLM, with lm_head.weight",
    ):
        merge_alone(config, nlg)
    folder = merge_alone(change(config, "model", base="rm"), nlg)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    scores = [read(root / name, "score.weight") for name in ("rm", "math", "code")]
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(merged.score.weight.data, scores[0] + 0.5 * (scores[1] + scores[2] - 2 * scores[0]))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model._orig_mod."])
@pytest.mark.parametrize("wrapped", [("math",), ("base", "math", "code"), ("base",)], ids=["expert", "all", "base"])
def test_a_model_that_a_training_tool_has_wrapped_is_the_same_model(own, prefix, wrapped):
    root, config = own
    plain = merge_alone(config, nlg)
    for name in wrapped:
        rewrite(root / name / "model.safetensors", lambda tensors: {prefix + n: t for n, t in tensors.items()})
    merged = Checkpoint(merge_alone(change(config, "run", name="wrapped"), nlg)).read_under("")
    torch.testing.assert_close(merged, Checkpoint(plain).read_under(""), rtol=0, atol=0)


def test_the_tensors_of_another_class_are_not_listed_by_the_dozen(own):
    root, config = own
    heads = {f"tasks.{i}.weight": torch.zeros(2) for i in range(40)}
    rewrite(root / "math" / "model.safetensors", lambda tensors: tensors.update(heads))
    with pytest.raises(InputError, match=r"with lm_head\.weight, tasks\.0\.weight, tasks\.1\.weight, 38 more outside"):
        merge_alone(config, nlg)


def test_bare_models_merge_among_themselves_alone(own):
    root, config = own
    for name in ("math", "code"):
        AutoModel.from_pretrained(root / name).save_pretrained(root / name)
        assert "layers.0.mlp.up_proj.weight" in load_file(root / name / "model.safetensors")
    with pytest.raises(InputError, match="math is a LlamaModel, with no tensor outside its body; the base"):
        merge_alone(config, nlg)
    one = change(change(config, "model", base="math"), "start", hyper={"ta": {"scale": 1.0}})
    merged = AutoModel.from_pretrained(merge_alone(one, nlg))
    x, expert = torch.arange(9)[None], AutoModel.from_pretrained(root / "code")
    torch.testing.assert_close(merged(x).last_hidden_state, expert(x).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_a_class_that_the_weights_are_not_is_put_right(own):
    root, config = own
    edit_config(root / "base", architectures=["LlamaModel"])
    fields = json.loads((merge_alone(config, nlg) / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["vocab_size"] == VOCABULARY
    assert HEAD in stored(config.run.dir / "merged" / "ta")


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_an_encoder_keeps_its_type_and_the_rest_of_its_config(own_nlu):
    base = own_nlu.model.path("base")
    save_as(base, lambda d: {n: t.bfloat16() for n, t in d.items()})
    edit_config(base, torch_dtype="bfloat16", dtype="bfloat16", my_field=[1, 2])
    (base / "sentencepiece.bpe.model").write_bytes(b"x")
    for task in own_nlu.tasks:
        edit_config(own_nlu.model.path("expert", task), my_field=[1, 2])
    folder = merge_alone(change(change(own_nlu, "start", method="ta"), "run", score=False), nlu)
    assert set(stored(folder).values()) == {"BF16"} and (folder / "sentencepiece.bpe.model").read_bytes() == b"x"
    fields = json.loads((base / "config.json").read_text()) | {"architectures": ["RobertaModel"]}
    assert json.loads((folder / "config.json").read_text()) == fields
    assert len(AutoTokenizer.from_pretrained(folder)) == 44


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_clip(pico_config, pico_inputs, tmp_path):
    """The base as an expert's whole folder, so that it has a config of its own."""
    shutil.copytree(pico_inputs / "clip", tmp_path / "clip")
    shutil.copytree(tmp_path / "clip" / "base", tmp_path / "clip" / "SVHN", dirs_exist_ok=True)
    config = change(pico_config, "model", root=str(tmp_path / "clip"), expert="{task}")
    return tmp_path / "clip", change(change(config, "start", method="ta"), "run", score=False)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("", "quick_gelu", None, "quick_gelu is None, not True"),
        ("preprocess_cfg", "mean", [0.5, 0.5, 0.5], "preprocess_cfg.mean.0 is 0.5, not 0.48"),
        ("preprocess_cfg", "interpolation", "bilinear", "preprocess_cfg.interpolation is 'bilinear', not 'bicubic'"),
        ("vision_cfg", "head_width", 4, "vision_cfg.head_width is 4, not 8"),
        ("vision_cfg", "mlp_ratio", 4.0, ""),
        ("vision_cfg", "patch_dropout", 0.5, ""),
    ],
)
def test_clip_models_of_another_function_are_refused(own_clip, part, field, value, message):
    root, config = own_clip
    (root / "MNIST" / "finetuned.safetensors").rename(root / "MNIST" / "open_clip_model.safetensors")
    file = root / "SVHN" / "open_clip_config.json"
    fields = json.loads(file.read_text())
    target = fields["model_cfg"] if part in ("", "vision_cfg") else fields
    (target[part] if part else target)[field] = value
    file.write_text(json.dumps(fields))
    (root / "SVHN" / "finetuned.safetensors").unlink()
    if message:
        with pytest.raises(InputError, match=f"SVHN/open_clip_config.json: {message}"):
            merge_alone(config, vision)
    else:
        folder = merge_alone(config, vision)
        assert (folder / "open_clip_config.json").read_bytes() == (root / "base/open_clip_config.json").read_bytes()


def test_other_layouts_of_images_are_called_what_they_are(own_clip):
    root, config = own_clip
    for names, fields, message in (
        (
            "visual.trunk.stages.0.x",
            {},
            "timm that is no ViT; .* only such a tower, or a ViT of timm",
        ),
        ("vision_model.encoder.x", {"model_type": "x_clip", "architectures": ["XCLIP"]}, r"layout .*\(XCLIP in"),
        ("embeddings.x", {"model_type": "beit"}, r"layout of a model \(beit in config.json"),
    ):
        for file in (root / "base").iterdir():
            file.unlink()
        save_file({names: torch.ones(2, 2)}, root / "base" / "model.safetensors")
        (root / "base" / "config.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match=f"base holds .*{message}"):
            merge_alone(config, vision)
    (root / "base" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match=r"\(vit in config.json\).*: leave model.arch out"):
        merge_alone(change(config, "model", arch="ViT-B-32"), vision)
    with pytest.raises(InputError, match="image tower of RN50 is open_clip's ModifiedResNet"):
        vision.skeleton(change(config, "model", arch="RN50").model)


def test_a_clip_model_in_half_precision_stays_so(own_clip):
    root, config = own_clip
    (root / "SVHN" / "open_clip_config.json").unlink()
    (root / "SVHN" / "finetuned.safetensors").unlink()
    (root / "MNIST" / "finetuned.safetensors").rename(root / "MNIST" / "open_clip_model.safetensors")
    file = root / "base" / "open_clip_model.safetensors"
    rewrite(file, lambda d: d.update({n: t.half() for n, t in d.items()}))
    folder = merge_alone(config, vision)
    assert set(stored(folder).values()) == {"F16"}
    assert open_clip.create_model(f"local-dir:{folder}").visual.proj.isfinite().all()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_a_base_without_a_tokenizer_gets_the_experts_if_they_agree(own_nlu, same, monkeypatch, capsys):
    """One expert has none, which says nothing; the merged model opens with that of the others."""
    monkeypatch.setattr(notices, "_said", set())
    models = {task: own_nlu.model.path("expert", task) for task in own_nlu.tasks}
    for folder in (own_nlu.model.path("base"), models["CoLA"]):
        for file in folder.glob("tokenizer*"):
            file.unlink()
    if not same:
        file = models["MNLI"] / "tokenizer.json"
        file.write_text(file.read_text().replace('"w1"', '"other"'))
    config = change(change(own_nlu, "start", method="average"), "run", score=False)
    merged, said = merge_alone(config, nlu), capsys.readouterr().err
    if same:
        assert "the base has no tokenizer; the merged model has that of STS-B, MNLI" in said
        assert (
            AutoTokenizer.from_pretrained(merged).get_vocab()
            == AutoTokenizer.from_pretrained(models["MNLI"]).get_vocab()
        )
    else:
        assert "those of STS-B, MNLI differ, so the merged model has none; put the one that is meant beside" in said
        assert not (merged / "tokenizer.json").exists()


def test_a_merge_that_is_none_is_refused(own):
    _, config = own
    for named, message in (
        (
            change(config, "start", method="pretrained"),
            "start.method is pretrained, which merges nothing; name a method",
        ),
        (change(config, "start", checkpoint=str(config.model.path("expert", "math"))), "there is nothing to merge"),
    ):
        with pytest.raises(InputError, match=message):
            merge_alone(named, nlg)
        assert any(message in said for said in describe(named, nlg, MERGE).refusals)


def test_a_merge_that_has_lost_a_file_can_be_made_anew(own):
    _, config = own
    folder = merge_alone(config, nlg)
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}.*; it is a merge of this run: remove {folder} to have it made"):
        merge_alone(config, nlg)
    shutil.rmtree(folder)
    assert merge_alone(config, nlg) == folder and shard.is_file()


def test_a_model_saved_over_a_merge_is_not_taken_for_it(own):
    """As after a fine-tuning that saves where it read: same names, same shapes, other weights."""
    _, config = own
    folder = merge_alone(config, nlg)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        merged.lm_head.weight.mul_(2)
    merged.save_pretrained(folder)
    sentence = f"{folder} holds other weights than the run wrote there"
    assert any(sentence in said for said in describe(config, nlg, MERGE).refusals)
    for use in (merge_alone, score_run):
        with pytest.raises(InputError, match=sentence):
            use(config, nlg)
    shutil.rmtree(folder)
    merge_alone(config, nlg)


def test_a_merge_that_lost_what_lies_around_its_weights_is_not_whole(own):
    """As after a copy that was cut off; a file that was added, or the card, makes no difference."""
    _, config = own
    config = change(config, "model", tokenizers=("code",))
    folder = merge_alone(config, nlg)
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("somebody's")
    merge_alone(config, nlg)
    for name in ("config.json", "tokenizer.json", "code/tokenizer.json", "code/model-00001-of-00001.safetensors"):
        (folder / name).rename(aside := folder.parent / "aside")
        with pytest.raises(InputError, match=f"merged/ta has lost {name}, which the run wrote there; remove "):
            merge_alone(config, nlg)
        aside.rename(folder / name)
    assert merge_alone(config, nlg) == folder


def test_a_merge_of_before_weights_were_recorded_is_taken_as_it_is(own):
    _, config = own
    folder = merge_alone(config, nlg)
    file = folder / "provenance.json"
    made = json.loads(file.read_text())
    assert made.pop("weights") == written_weights(folder) and "config.json" in made.pop("files")
    write_text(file, json.dumps(made))
    assert merge_alone(config, nlg) == folder and json.loads(file.read_text()) == made
