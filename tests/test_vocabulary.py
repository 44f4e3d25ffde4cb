"""Vocabularies that differ: every row of a merged embedding is that of one token.

Expected: put together by hand from the rows that the tokenizers give to a token.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.config import Config
from common.core import notices
from common.core.errors import InputError
from common.opening import open_experiment
from common.pipeline import merge_alone
from common.provenance import inputs_of
from helpers import rewrite
from NLG import domain
from NLU import domain as nlu
from pico_nlg import PICO, VOCABULARY, pico_config, pico_model, pico_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NAMES = ("model.embed_tokens.weight", "lm_head.weight")
WIDTH = 16


def with_tokens(*added: str, padding: str = "") -> PreTrainedTokenizerFast:
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)} if added else {})
    if padding:
        tokenizer.add_special_tokens({"pad_token": padding})
    return tokenizer


def write(root: Path, name: str, tokenizer: PreTrainedTokenizerFast | None, rows: int, tied: bool = False) -> None:
    """A model of random weights with so many rows."""
    torch.manual_seed(len(name) + ord(name[0]))
    pico_model("llama", vocab_size=rows, tie_word_embeddings=tied).save_pretrained(root / "llama" / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(root / "llama" / name)


def config_of(root: Path, policy: str, scale: float = 0.5, **run) -> Config:
    config = pico_config(root, root / "runs")
    return replace(
        config,
        model=replace(config.model, vocabulary=policy, tokenizers=()),
        start=replace(config.start, method="ta", hyper={"ta": {"scale": scale}}),
        run=replace(config.run, name=policy, score=False),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        stored |= load_file(file)
    return stored


def models(root: Path) -> list[dict[str, torch.Tensor]]:
    return [weights(root / "llama" / name) for name in ("base", "math", "code")]


def two_tokens(root: Path) -> None:
    """Each expert has a token of its own in row 41."""
    write(root, "base", with_tokens(), VOCABULARY)
    write(root, "math", with_tokens("<think>"), VOCABULARY + 1)
    write(root, "code", with_tokens("<tool>"), VOCABULARY + 1)


@pytest.mark.parametrize("policy", ["pad"])
def test_one_row_is_not_two_tokens(tmp_path, policy):
    two_tokens(tmp_path)
    said = r"row 41 is the token '<think>' in .*math, the token '<tool>' is row 41 in .*code"
    with pytest.raises(InputError, match=said) as e:
        merge_alone(config_of(tmp_path, policy), domain)
    assert "model.vocabulary may be union" in str(e.value) and not (tmp_path / "runs").exists()


def test_one_token_is_not_two_rows(tmp_path):
    """The same two tokens in another order: each sentence is of the file that it names."""
    write(tmp_path, "base", with_tokens(), VOCABULARY)
    write(tmp_path, "math", with_tokens("<x>", "<y>"), VOCABULARY + 2)
    write(tmp_path, "code", with_tokens("<y>", "<x>"), VOCABULARY + 2)
    said = r"row 41 is the token '<x>' in .*/math, the token '<x>' is row 42 in .*/code; model"
    with pytest.raises(InputError, match=said):
        merge_alone(config_of(tmp_path, "pad"), domain)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_union_has_a_row_for_every_token(tmp_path, tied):
    write(tmp_path, "base", with_tokens(), VOCABULARY, tied)
    write(tmp_path, "math", with_tokens("<think>", "<both>"), VOCABULARY + 2, tied)
    write(tmp_path, "code", with_tokens("<tool>", "<both>"), 64, tied)
    folder = merge_alone(config_of(tmp_path, "union"), domain)
    merged, (base, math, code) = weights(folder), models(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<think>", "<both>", "<tool>"]) == [41, 42, 43]
    assert len(tokenizer) == 44 and tokenizer("ab<tool>c")["input_ids"] == [3, 4, 43, 5]
    for name in NAMES[: 1 if tied else 2]:
        old = base[name] + 0.5 * (math[name][:41] - base[name]) + 0.5 * (code[name][:41] - base[name])
        new = torch.stack([math[name][41], (math[name][42] + code[name][42]) / 2, code[name][41]])
        torch.testing.assert_close(merged[name], torch.cat([old, new]), atol=1e-6, rtol=1e-6)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.vocab_size == 44 and opened(torch.tensor([[3, 43]])).logits.shape[-1] == 44


@pytest.mark.parametrize("policy", ["union", "pad"])
def test_models_named_by_their_file_have_the_tokenizer_beside_it(tmp_path, policy):
    """What is written is what is written of the folders, but for the names of the models in what says so."""
    two_tokens(tmp_path)
    if policy == "pad":
        write(tmp_path, "code", with_tokens(), VOCABULARY)
    config = config_of(tmp_path, policy)
    files = replace(config.model, base="base/model.safetensors", expert="{task}/model.safetensors")
    named = replace(config, model=files, run=replace(config.run, name="files"))
    whole, same = merge_alone(config, domain), merge_alone(named, domain)
    written = sorted(file.name for file in whole.iterdir())
    assert "tokenizer.json" in written and written == sorted(file.name for file in same.iterdir())
    unlike = [name for name in written if (whole / name).read_bytes() != (same / name).read_bytes()]
    assert set(unlike) <= {"README.md", "provenance.json"}


def test_a_token_that_one_expert_lacks_is_moved_by_the_other_alone(tmp_path):
    write(tmp_path, "base", with_tokens(), VOCABULARY)
    write(tmp_path, "math", with_tokens("<think>"), VOCABULARY + 1)
    write(tmp_path, "code", with_tokens(), VOCABULARY)
    merged, (base, math, _) = weights(merge_alone(config_of(tmp_path, "pad"), domain)), models(tmp_path)
    for name in NAMES:
        mean = base[name].mean(0)
        torch.testing.assert_close(merged[name][41], mean + 0.5 * (math[name][41] - mean), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("policy", "moved"), [("refuse", True), ("pad", True), ("base", False), ("union", None)])
def test_a_token_in_a_row_that_the_base_has_spare(tmp_path, policy, moved):
    """Rows are padded to 64. Code has no token in row 41, so it pulls only if math's is left out."""
    write(tmp_path, "base", with_tokens(), 64)
    write(tmp_path, "math", with_tokens("<think>"), 64)
    write(tmp_path, "code", with_tokens(), 64)
    merged, (base, math, code) = weights(merge_alone(config_of(tmp_path, policy), domain)), models(tmp_path)
    for name in NAMES:
        old, own = base[name][41], math[name][41]
        expected = own if moved is None else old + 0.5 * ((own if moved else code[name][41]) - old)
        torch.testing.assert_close(merged[name][41], expected, atol=1e-6, rtol=1e-6)
        spare = base[name][42:] + 0.5 * (math[name][42:] - base[name][42:]) + 0.5 * (code[name][42:] - base[name][42:])
        torch.testing.assert_close(merged[name][42:], spare, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("policy", ["refuse", "pad"])
def test_tokens_in_spare_rows_join_the_merged_tokenizer(tmp_path, policy):
    """In their own rows, whatever the order of the experts; the rows are merged as ever."""
    write(tmp_path, "base", with_tokens(), 64)
    write(tmp_path, "math", with_tokens("<|im_start|>", "<|im_end|>"), 64)
    write(tmp_path, "code", with_tokens("<|im_start|>"), 64)
    folder = merge_alone(config_of(tmp_path, policy), domain)
    tokenizer, (base, math, code) = AutoTokenizer.from_pretrained(folder), models(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [41, 42] and len(tokenizer) == 43
    assert tokenizer("a<|im_end|>b")["input_ids"] == [3, 42, 4]
    expected = base[NAMES[0]][41] + 0.5 * (math[NAMES[0]][41] + code[NAMES[0]][41] - 2 * base[NAMES[0]][41])
    torch.testing.assert_close(weights(folder)[NAMES[0]][41], expected, atol=1e-6, rtol=1e-6)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "llama" / "base")) == 41


def test_tokens_that_cannot_join_the_merged_tokenizer_are_named(tmp_path, capsys, monkeypatch):
    """Math's are numbered from 43 on: the tokenizers library would number them from 41 on."""
    monkeypatch.setattr(notices, "_said", set())
    write(tmp_path, "base", with_tokens(), 64)
    write(tmp_path, "math", with_tokens("<a>", "<b>", "<c>", "<d>"), 64)
    write(tmp_path, "code", with_tokens(), 64)
    file = tmp_path / "llama" / "math" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["added_tokens"] = [row for row in whole["added_tokens"] if row["content"] not in ("<a>", "<b>")]
    file.write_text(json.dumps(whole))
    settings = file.with_name("tokenizer_config.json")
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "added" not in k}))
    folder = merge_alone(config_of(tmp_path, "refuse"), domain)
    assert len(AutoTokenizer.from_pretrained(folder)) == 41
    err = capsys.readouterr().err
    assert "rows are merged of '<c>', '<d>', tokens of math, which the merged model's tokenizer does not know" in err


def test_rows_in_another_order_are_matched_by_token(tmp_path):
    """Math has a and b the other way round."""
    for name in ("base", "math", "code"):
        write(tmp_path, name, with_tokens(), VOCABULARY)
    file = tmp_path / "llama" / "math" / "tokenizer.json"
    whole = json.loads(file.read_text())
    ids = whole["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(whole))
    config = config_of(tmp_path, "refuse")
    merged, (base, math, code) = weights(merge_alone(config, domain)), models(tmp_path)
    order = [*range(3), 4, 3, *range(5, VOCABULARY)]
    for name in NAMES:
        expected = base[name] + 0.5 * (math[name][order] - base[name]) + 0.5 * (code[name] - base[name])
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    for change in ({"run": replace(config.run, score=True)}, {"model": replace(config.model, tokenizers=("math",))}):
        with pytest.raises(InputError, match=r"the tokenizer of math .* has 'a' as number 4, the merged model .* 3"):
            open_experiment(replace(config, **change), domain)


def test_a_row_for_padding_is_called_what_it_is(tmp_path):
    write(tmp_path, "base", with_tokens(), VOCABULARY)
    write(tmp_path, "math", with_tokens(padding="[PAD]"), VOCABULARY + 1)
    write(tmp_path, "code", with_tokens("<x>"), VOCABULARY + 1)
    with pytest.raises(
        InputError, match=r"^row 41 is the padding token in .*/math, the token '<x>' is row 41 in .*/code"
    ):
        merge_alone(config_of(tmp_path, "pad"), domain)


def write_lines(root: Path, **tokens: list[str]) -> None:
    """Models with a vocabulary in lines alone, as that of a classic BERT."""
    for name, lines in tokens.items():
        write(root, name, None, VOCABULARY)
        (root / "llama" / name / "vocab.txt").write_text("\n".join(lines) + "\n")


def test_a_vocabulary_in_lines_is_matched_by_token(tmp_path, capsys):
    """A line may hold what others take for the end of one; the last is not empty."""
    tokens = ["[PAD]", "\x85", "\u2028", *map(str, range(VOCABULARY - 3))]
    order = [*range(3), *range(VOCABULARY - 1, 2, -1)]
    write_lines(tmp_path, base=tokens, math=[tokens[i] for i in order], code=tokens)
    merged, (base, math, code) = weights(merge_alone(config_of(tmp_path, "refuse"), domain)), models(tmp_path)
    for name in NAMES:
        expected = base[name] + 0.5 * (math[name][order] - base[name]) + 0.5 * (code[name] - base[name])
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    assert "matched by number" not in capsys.readouterr().err
    (tmp_path / "llama" / "math" / "bpe.codes").touch()  # with which the lines are no tokens
    open_experiment(config_of(tmp_path, "refuse"), domain)
    assert "/math are matched by number" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model"])
def test_files_whose_tokens_cannot_be_read_are_compared_as_they_are(tmp_path, file, capsys):
    for name in ("base", "math", "code"):
        write(tmp_path, name, None, VOCABULARY)
        (tmp_path / "llama" / name / file).write_bytes(b"pieces")
    open_experiment(config_of(tmp_path, "refuse"), domain)
    assert "matched by number" not in capsys.readouterr().err
    (tmp_path / "llama" / "math" / file).write_bytes(b"other pieces")
    open_experiment(config_of(tmp_path, "refuse"), domain)
    said = capsys.readouterr().err
    assert said.count("matched by number") == 1
    assert f"/math are matched by number: its {file} is not the base's, nor is there a tokenizer.json; save" in said
    with_tokens().save_pretrained(tmp_path / "llama" / "base")  # code has one of its files
    open_experiment(config_of(tmp_path, "refuse"), domain)
    assert "/math are matched by number: " in (said := capsys.readouterr().err) and "code" not in said


LETTERS_TURNED = [*range(3), *range(VOCABULARY - 1, 2, -1)]  # the tokens behind the special ones, the last first
SECOND = {
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def turned_tokenizer() -> PreTrainedTokenizerFast:
    """The pico tokenizer with its letters numbered from the last on."""
    whole = json.loads(pico_tokenizer().backend_tokenizer.to_str())
    tokens = list(whole["model"]["vocab"])
    whole["model"]["vocab"] = {tokens[row]: i for i, row in enumerate(LETTERS_TURNED)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


def write_turned(root: Path, model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """The model as base, two experts near it, math's tokens the other way round; {name: state before turning}."""
    states = {}
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(seed)
        model.load_state_dict({n: t + 0.1 * torch.randn_like(t) for n, t in model.state_dict().items()})
        states[name] = {n: t.clone() for n, t in model.state_dict().items()}
        rows = {id(t): t for _, t in [*model.named_parameters(), *model.named_buffers()] if VOCABULARY in t.shape}
        for tensor in rows.values() if name == "math" else ():
            tensor.data = tensor.data.index_select(tensor.shape.index(VOCABULARY), torch.tensor(LETTERS_TURNED))
        model.save_pretrained(root / "llama" / name)
        (turned_tokenizer() if name == "math" else pico_tokenizer()).save_pretrained(root / "llama" / name)
        model.load_state_dict(states["base"])
    return states


@pytest.mark.parametrize(
    ("kind", "fields", "rows"),
    [
        ("phi", {}, 3),
        ("gptj", {"rotary_dim": 4}, 3),
        ("gemma4_text", SECOND | {"tie_word_embeddings": True}, 2),
        ("bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                  "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}, 2),
        ("bert", {}, 1),
    ],
)  # fmt: skip
def test_every_tensor_by_token_is_matched_by_token(tmp_path, kind, fields, rows):
    """Heads' biases, a second embedding, a bias of the answers, an encoder's embedding: TA of what means the same."""
    config = AutoConfig.for_model(kind, **PICO | {"tie_word_embeddings": False} | fields)
    opener = {"bart": AutoModelForSeq2SeqLM, "bert": AutoModel}.get(kind, AutoModelForCausalLM)
    states = write_turned(tmp_path, opener.from_config(config))
    config = config_of(tmp_path, "refuse")
    config = replace(config, model=replace(config.model, family="auto"), eval=replace(config.eval, tests={}))
    config, domain_of = (replace(config, domain="nlu"), nlu) if kind in ("bart", "bert") else (config, domain)
    assert len(domain_of.family(config.model).by_token) >= rows
    merged = opener.from_pretrained(merge_alone(config, domain_of), dtype=torch.float32).state_dict()
    base, math, code = states.values()
    for name in base:
        if base[name].is_floating_point() and "pooler" not in name:
            expected = base[name] + 0.5 * (math[name] - base[name]) + 0.5 * (code[name] - base[name])
            torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    if domain_of is nlu and kind == "bert":
        scored = replace(config, run=replace(config.run, score=True))
        with pytest.raises(InputError, match=r"the tokenizer of math .* number .*: set run.score false"):
            open_experiment(scored, domain_of)


@pytest.mark.parametrize(("policy", "rows"), [("union", VOCABULARY + 2), ("base", VOCABULARY), ("pad", VOCABULARY + 1)])
def test_a_heads_bias_has_the_rows_of_its_head(tmp_path, policy, rows):
    for name, token in (("base", ""), ("math", "<think>"), ("code", "<tool>" if policy != "pad" else "<think>")):
        torch.manual_seed(len(name) + ord(name[0]))
        config = AutoConfig.for_model("phi", **PICO | {"vocab_size": VOCABULARY + bool(token)})
        model = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path / "llama" / name)
        with_tokens(*filter(None, [token])).save_pretrained(tmp_path / "llama" / name)
    config = config_of(tmp_path, policy)
    folder = merge_alone(replace(config, model=replace(config.model, family="phi")), domain)
    merged, (base, math, code) = weights(folder)["lm_head.bias"], [each["lm_head.bias"] for each in models(tmp_path)]
    mean = base.mean()
    new = {"union": [math[-1], code[-1]], "base": [], "pad": [mean + 0.5 * (math[-1] + code[-1] - 2 * mean)]}[policy]
    old = base + 0.5 * (math[:VOCABULARY] - base) + 0.5 * (code[:VOCABULARY] - base)
    torch.testing.assert_close(merged, torch.cat([old, torch.tensor(new)]), atol=1e-6, rtol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.bias.shape == (rows,)


def test_a_second_embedding_of_other_rows_keeps_them(tmp_path):
    """Gemma 3n's has fewer than the first: those of the images' tokens are missing."""
    fields = PICO | SECOND | {"tie_word_embeddings": True, "vocab_size_per_layer_input": VOCABULARY - 2}
    for name in ("base", "math", "code"):
        torch.manual_seed(len(name) + ord(name[0]))
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **fields)).save_pretrained(
            tmp_path / "llama" / name
        )
        with_tokens().save_pretrained(tmp_path / "llama" / name)
    config = config_of(tmp_path, "refuse")
    config = replace(config, model=replace(config.model, family="auto"))
    second = "model.embed_tokens_per_layer.weight"
    merged, (base, math, code) = (
        weights(merge_alone(config, domain))[second],
        [each[second] for each in models(tmp_path)],
    )
    torch.testing.assert_close(merged, base + 0.5 * (math - base) + 0.5 * (code - base), atol=1e-6, rtol=1e-6)
    file = tmp_path / "llama" / "code" / "model.safetensors"
    rewrite(file, lambda tensors: tensors | {second: tensors[second][:-1].contiguous()})
    with pytest.raises(InputError, match=rf"code: {second} has 38 rows, in .*base it has 39, fewer or more than"):
        open_experiment(config, domain)


def test_the_padding_token_is_one_by_whatever_name(tmp_path):
    """As in the paper's models: [PAD] in one, <pad> in the other, both row 32000."""
    write(tmp_path, "base", with_tokens(), VOCABULARY)
    write(tmp_path, "math", with_tokens(padding="[PAD]"), VOCABULARY + 1)
    write(tmp_path, "code", with_tokens(padding="<pad>"), VOCABULARY + 1)
    config = config_of(tmp_path, "pad")
    merged, (base, math, code) = weights(merge_alone(config, domain)), models(tmp_path)
    for name in NAMES:
        mean = base[name].mean(0)
        expected = mean + 0.5 * (math[name][41] - mean) + 0.5 * (code[name][41] - mean)
        torch.testing.assert_close(merged[name][41], expected, atol=1e-6, rtol=1e-6)
    assert "rows" not in inputs_of(open_experiment(config, domain))["model"]  # as before: no earlier result is stale


def test_what_is_matched_is_part_of_the_provenance(tmp_path):
    two_tokens(tmp_path)
    assert len(inputs_of(open_experiment(config_of(tmp_path, "union"), domain))["model"]["rows"]) == 16


def test_where_nothing_has_a_tokenizer_there_is_nothing_to_warn_of(tmp_path, capsys):
    for name in ("base", "math", "code"):
        write(tmp_path, name, None, VOCABULARY)
    merge_alone(config_of(tmp_path, "refuse"), domain)
    assert "matched by number" not in capsys.readouterr().err
    expert = config_of(tmp_path, "refuse").model.path("expert", "code")
    (expert / "tokenizer.model").write_bytes(b"names that are not read")
    open_experiment(config_of(tmp_path, "refuse"), domain)
    assert capsys.readouterr().err.count("matched by number") == 2


def test_without_a_tokenizer_rows_are_matched_by_number_and_it_is_said(tmp_path, capsys):
    write(tmp_path, "base", with_tokens(), VOCABULARY)
    write(tmp_path, "math", None, VOCABULARY)
    write(tmp_path, "code", with_tokens(), VOCABULARY)
    merged, (base, math, code) = weights(merge_alone(config_of(tmp_path, "refuse"), domain)), models(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "matched by number" in line]
    assert len(said) == 1 and "warning: the rows of " in said[0] and "/math are matched by number" in said[0]
    expected = base[NAMES[0]] + 0.5 * (math[NAMES[0]] - base[NAMES[0]]) + 0.5 * (code[NAMES[0]] - base[NAMES[0]])
    torch.testing.assert_close(merged[NAMES[0]], expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match=r"model.vocabulary is union, but .*math has no tokenizer.json"):
        merge_alone(config_of(tmp_path, "union"), domain)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    two_tokens(tmp_path)
    (tmp_path / "llama" / "math" / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"math") as error:
        merge_alone(config_of(tmp_path, "union"), domain)
    assert "\n" not in str(error.value) and "tokenizer" in str(error.value)
