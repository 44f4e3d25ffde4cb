"""T5, BART and their kin: encoder and decoder, from stock models to stock models and back."""

import inspect
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    T5ForSequenceClassification,
)

from common.core.blocks import nonzero_tensors
from common.core.errors import InputError
from common.fda.matching import MatchingProblem, matching_gradient
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import change, edit_config, rewrite
from NLU import domain
from pico_encoders import WITH_DECODER, fields_of
from pico_nlu import pico_config, pico_tokenizer

TASKS = ["CoLA", "MNLI"]
TEXT = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), "decoder_input_ids": torch.tensor([[2, 9, 8, 7, 6]])}


def write_models(root, kind, own_head=False, **fields):
    """A base and two experts near it in stock folders, with a head of its own if one is asked for; by name."""
    made = {}
    for seed, name in enumerate(("base", *TASKS)):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**fields_of(kind) | {"tie_word_embeddings": not own_head} | fields)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        if own_head:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.3 * torch.randn(50, 16))
        with torch.no_grad():
            for scale in (0.2, 0.05 * bool(seed)):
                for parameter in model.parameters():
                    parameter.add_(scale * torch.randn_like(parameter))
                torch.manual_seed(seed)
        model.save_pretrained(root / name)
        pico_tokenizer().save_pretrained(root / name)
        made[name] = stock(root / name)
    return made


def stock(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()


def config_of(root, **run):
    config = change(pico_config(root, root / "runs"), "model", root=str(root), family="auto", expert="{task}")
    return change(change(config, "run", score=False, **run), "start", hyper={"ta": {"scale": 0.3}})


@pytest.fixture
def t5(tmp_path):
    write_models(tmp_path, "t5")
    return config_of(tmp_path)


def answers_of_layers(model, blocks, x_ATD=None, index=None):
    """(input, answer) of each layer of a list in a stock model, of which a decoder's read their own input instead of
    the encoder's states; with `index` that layer's input is x instead."""
    seen, layers = [], model.get_submodule(blocks)

    def before(module, args, named):
        hidden = args[0] if x_ATD is None or module is not layers[index] else x_ATD
        names = list(inspect.signature(type(module).forward).parameters)[2:]  # T5 passes them on by place
        named = dict(zip(names, args[1:], strict=False)) | dict(named)
        if "decoder" in blocks:
            named["encoder_hidden_states"] = hidden
        for name in ("encoder_attention_mask", "encoder_decoder_position_bias"):
            named.pop(name, None)
        return (hidden,), named

    def after(module, args, named, output):
        seen.append((args[0], output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    length = 5 if x_ATD is None else x_ATD.shape[1]
    batch = {name: tokens[:, :length] for name, tokens in TEXT.items()}
    model(**{name: tokens.expand(1 if x_ATD is None else len(x_ATD), -1) for name, tokens in batch.items()})
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", WITH_DECODER)
def test_encoder_and_decoder_go_from_stock_to_stock(kind, tmp_path):
    """Blocks answer as the base's stock layers; TA is TA of the stock tensors, to equal logits; FDA's model opens."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path)
    config = change(config, "anchors", tokens=None)
    config = type(config)(**vars(config) | {"tasks": TASKS})
    experiment = open_experiment(config, domain)
    assert experiment.depth == 4 and experiment.shape == (4, 5, 16)
    with torch.no_grad():
        seen = [
            each for prefix in experiment.family.prefixes for each in answers_of_layers(models["base"], prefix[:-1])
        ]
        for index, (x_ATD, expected) in enumerate(seen):
            theta_0 = experiment.read_block(experiment.base, index)
            torch.testing.assert_close(experiment.functions[index](theta_0, x_ATD), expected, atol=1e-5, rtol=1e-5)
    construct(config, domain)
    folder = adapt(change(config, "start", method="ta"), domain)
    adapted, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert adapted(**TEXT).logits.isfinite().all()
    assert (folder / "generation_config.json").read_bytes() == (tmp_path / "base/generation_config.json").read_bytes()
    states = [models[name].state_dict() for name in ("base", *TASKS)]
    merged = {n: b + 0.3 * sum(e[n] - b for e in states[1:]) for n, b in states[0].items() if b.is_floating_point()}
    models["base"].load_state_dict(merged, strict=False)
    ours = stock(config.run.dir / "merged" / "ta")
    torch.testing.assert_close(ours(**TEXT).logits, models["base"](**TEXT).logits, atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(p, ours.get_parameter(n)) for n, p in adapted.named_parameters() if "decoder" in n)


@pytest.mark.parametrize(("index", "blocks"), [(0, "encoder.block"), (1, "encoder.block"), (3, "decoder.block")])
def test_a_loss_is_that_of_plain_autograd_on_the_stock_layers(index, blocks, tmp_path):
    """The expert's layer answers with the base's relative positions, unless it has its own."""
    models, config = write_models(tmp_path, "t5"), config_of(tmp_path)
    experiment = open_experiment(type(config)(**vars(config) | {"tasks": TASKS}), domain)
    theta_0, theta_t = (experiment.read_block(c, index) for c in (experiment.base, experiment.experts["MNLI"]))
    tau = nonzero_tensors(experiment.task_vector("MNLI", theta_0, theta_t))
    x_ATD = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
    losses, gradient = matching_gradient(MatchingProblem(experiment.functions[index], theta_0, theta_t, tau), x_ATD)
    x_ATD.requires_grad_()
    for stack in ("encoder", "decoder") if index % 2 else ():
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        models["MNLI"].get_parameter(table).data = models["base"].get_parameter(table).data
    y, target = (answers_of_layers(models[n], blocks, x_ATD, index % 2)[index % 2][1] for n in ("base", "MNLI"))
    mine = dict(models["base"].get_submodule(blocks)[index % 2].named_parameters())
    distance = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    by_theta = torch.autograd.grad(distance, [mine[name] for name in tau], create_graph=True)
    expected = [
        1 + F.cosine_similarity(tau[name].flatten(), g.flatten(), dim=0) for name, g in zip(tau, by_theta, strict=True)
    ]
    assert losses.tolist() == pytest.approx([loss.item() for loss in expected], abs=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(expected), x_ATD)[0], atol=1e-5, rtol=1e-4)


def test_a_head_of_its_own_is_merged_by_itself(tmp_path):
    """As Flan-T5 has one, whose outputs are not scaled; T5 itself has the embedding for it."""
    models, config = write_models(tmp_path, "t5", own_head=True), config_of(tmp_path)
    config = type(config)(**vars(config) | {"tasks": TASKS})
    folder = merge_alone(change(config, "start", method="ta"), domain)
    stored = load_file(folder / "model.safetensors")
    heads = [models[name].lm_head.weight for name in ("base", *TASKS)]
    assert not torch.equal(heads[0], models["base"].shared.weight)
    torch.testing.assert_close(stored["lm_head.weight"], heads[0] + 0.3 * sum(head - heads[0] for head in heads[1:]))
    assert torch.equal(stock(folder).lm_head.weight, stored["lm_head.weight"])
    tied = tmp_path / "tied"
    write_models(tied, "t5")
    mixed = change(config, "model", experts={"CoLA": str(tied / "CoLA")})
    with pytest.raises(InputError, match="scale_decoder_outputs|lm_head"):
        merge_alone(change(change(mixed, "start", method="ta"), "run", name="mixed"), domain)


def test_copies_of_the_embedding_are_one_with_it_or_refused(tmp_path):
    """Files of earlier releases have it for encoder and decoder besides."""
    write_models(tmp_path, "t5")
    config = config_of(tmp_path)
    config = change(type(config)(**vars(config) | {"tasks": TASKS}), "start", method="ta")
    plain = load_file(merge_alone(config, domain) / "model.safetensors")
    copy = "encoder.embed_tokens.weight"
    for name in ("base", "CoLA"):
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | {copy: load_file(file)["shared.weight"].clone()}, file, {"format": "pt"})
    again = load_file(merge_alone(change(config, "run", name="again"), domain) / "model.safetensors")
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)
    rewrite(tmp_path / "CoLA" / "model.safetensors", lambda tensors: tensors[copy].add_(1))
    with pytest.raises(InputError, match=r"CoLA: encoder.embed_tokens.weight and shared.weight differ"):
        merge_alone(change(config, "run", name="other"), domain)


@pytest.mark.parametrize("shared", [True, False])
def test_marian_with_one_embedding_and_with_two(shared, tmp_path):
    """Its one embedding is stored as shared.weight, which the stacks have by another name; of two the head is tied to
    the decoder's, here stored besides in one expert alone."""
    models = write_models(tmp_path, "marian", share_encoder_decoder_embeddings=shared)
    file, words = tmp_path / "CoLA/model.safetensors", f"model.{'shared' if shared else 'decoder.embed_tokens'}.weight"
    expected = {n: (t + models["MNLI"].state_dict()[n]) / 2 for n, t in models["CoLA"].state_dict().items()}
    save_file(load_file(file) | {"lm_head.weight": load_file(file)[words] + 1}, file, {"format": "pt"})
    expected["lm_head.weight"] = expected[words] + 0.5
    config = replace(change(config_of(tmp_path), "start", method="average"), tasks=TASKS)
    merged, report = AutoModelForSeq2SeqLM.from_pretrained(merge_alone(config, domain), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


ADAPTED = {"target_modules": ["q", "v", "wi"]}


@pytest.mark.parametrize(
    "trained", [ADAPTED, {"target_modules": ["lm_head"]}, ADAPTED | {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_answers_as_peft_does(trained, t5, tmp_path):
    write_peft(tmp_path, **trained)
    theirs = PeftModel.from_pretrained(stock(tmp_path / "base"), tmp_path / "CoLA").eval()
    alone = change(t5, "start", method="ta", hyper={"ta": {"scale": 1.0}})
    merged = stock(merge_alone(replace(alone, tasks=["CoLA"]), domain))
    with torch.no_grad():
        answers = [model(**TEXT).logits for model in (merged, theirs, stock(tmp_path / "base"))]
    torch.testing.assert_close(answers[0], answers[1], atol=1e-4, rtol=1e-4)
    assert (answers[0] - answers[2]).abs().max() > 0.1


@pytest.mark.parametrize("trained", [{"target_modules": ["q", "shared"]}, ADAPTED | {"modules_to_save": ["shared"]}])
def test_an_adapter_of_the_shared_embedding_is_refused(trained, t5, tmp_path):
    """Peft's model answers as if it were not there, since the stacks have copies of their own; its merge moves them."""
    write_peft(tmp_path, **trained)
    with pytest.raises(InputError, match=r"CoLA trains shared.weight, of which encoder and decoder have copies"):
        merge_alone(change(t5, "start", method="ta"), domain)


def write_peft(root, **trained):
    """An adapter of the base in place of the first expert."""
    torch.manual_seed(5)
    settings = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **trained)
    model = get_peft_model(stock(root / "base"), settings)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    shutil.rmtree(root / "CoLA")
    model.save_pretrained(root / "CoLA")


def test_answers_in_words_are_not_scored(t5):
    said = "base/config.json: a T5ForConditionalGeneration answers in words: .*; set run.score false"
    with pytest.raises(InputError, match=said):
        construct(change(t5, "run", score=True), domain)
    with pytest.raises(InputError, match="answers in words"):
        domain.check_export(change(t5, "model", heads=("CoLA",)).model)
    with pytest.raises(InputError, match="answers in words"):
        dict(domain.score(t5, "CoLA", {}, torch.device("cpu")))


def test_the_dry_run_finds_both_stacks(t5):
    text = describe(type(t5)(**vars(t5) | {"tasks": TASKS}), domain).text
    assert "1 x encoder.block.0, 9 tensors" in text and "1 x decoder.block.1, 13 tensors" in text


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("longt5", {}, "LongT5Stack has relative positions of an unknown kind"),
        ("switch_transformers", {"num_experts": 2}, "SwitchTransformersStack has no second derivative"),
        ("led", {}, "LEDEncoder has no second derivative"),
    ],
)
def test_other_encoder_decoders_are_refused_by_name(kind, fields, said, tmp_path, t5):
    file = tmp_path / "base" / "config.json"
    of_kind = fields_of("bart" if kind == "led" else "t5") | {"model_type": kind} | fields
    file.write_text(json.dumps(of_kind))
    with pytest.raises(InputError, match=said):
        domain.family(t5.model)


def write_as(root, opener, kind="t5", names=("base", *TASKS)):
    """A base and two experts of a class in stock folders; their weights by name."""
    made = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = opener(AutoConfig.for_model(**fields_of(kind), eos_token_id=2))
        model.save_pretrained(root / name)
        made[name] = {own: weight.detach() for own, weight in model.named_parameters()}
    return made


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_an_encoder_alone_is_merged_as_one(kind, tmp_path, capsys):
    """T5EncoderModel: the average of its tensors; a file may have the embedding twice, as older ones do."""
    states = write_as(tmp_path, AutoModelForTextEncoding.from_config, kind)
    file = tmp_path / TASKS[0] / "model.safetensors"
    rewrite(file, lambda tensors: tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()})
    config = change(replace(config_of(tmp_path), tasks=TASKS), "start", method="average", hyper={})
    folder = merge_alone(config, domain)
    merged, report = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert type(merged).__name__.endswith("EncoderModel") and not report["missing_keys"]
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, sum(states[task][name] for task in TASKS) / 2)
    with pytest.raises(InputError, match="EncoderModel is for embeddings: scores, heads and merge methods .*score fal"):
        merge_alone(change(config, "run", score=True), domain)
    rewrite(file, lambda tensors: tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1})
    with pytest.raises(InputError, match=r"CoLA: encoder.embed_tokens.weight and shared.weight differ, which are one"):
        merge_alone(config, domain)


@pytest.mark.parametrize(
    ("opener", "which", "named", "missing"),
    [
        (T5ForSequenceClassification, "base", "T5ForSequenceClassification", "shared.weight"),
        (AutoModelForTokenClassification.from_config, "base", "T5ForTokenClassification", "shared.weight"),
        (
            AutoModelForTextEncoding.from_config,
            "CoLA",
            "T5EncoderModel",
            "decoder.block.0.layer.0.SelfAttention.q.weight",
        ),
    ],
)
def test_another_class_than_the_whole_model_is_named(opener, which, named, missing, t5, tmp_path, monkeypatch):
    write_as(tmp_path, opener, names=("base", *TASKS) if which == "base" else (which,))
    for name in TASKS if which in TASKS else ():  # as published encoders say it, sentence-t5 among them
        edit_config(tmp_path / name, is_encoder_decoder=True)
    monkeypatch.setattr("common.io.checkpoints.Checkpoint.read", None)
    with pytest.raises(InputError) as error:
        merge_alone(change(replace(t5, tasks=TASKS), "start", method="average", hyper={}), domain)
    kind = "T5ForConditionalGeneration"
    assert str(error.value) == (
        f"{tmp_path / which / 'config.json'} names {named}, whose file has no tensor {missing} as the {kind} has that "
        f"is merged here; give all as {kind}, of a classifier its base_model saved with save_pretrained, or all as "
        "encoders alone"
    )


def test_the_base_model_of_a_classifier_is_merged(tmp_path):
    """What the refusal of a T5ForSequenceClassification says to give."""
    for name in ("base", *TASKS):
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(**fields_of("t5"), eos_token_id=2)
        T5ForSequenceClassification(config).base_model.save_pretrained(tmp_path / name)
    config = change(replace(config_of(tmp_path), tasks=TASKS), "start", method="average", hyper={})
    weights = [load_file(tmp_path / task / "model.safetensors") for task in TASKS]
    merged = load_file(merge_alone(config, domain) / "model.safetensors")
    for name in weights[0]:
        torch.testing.assert_close(merged[name], (weights[0][name] + weights[1][name]) / 2)


def test_a_bias_of_the_logits_that_a_class_saves_is_merged(tmp_path):
    """A buffer, which MVP names among what it does not read of a file though it has and reads it."""
    write_models(tmp_path, "bart", model_type="mvp")
    for name, value in (("base", 1.0), ("CoLA", 2.0), ("MNLI", 4.0)):
        bias = {"final_logits_bias": torch.full((1, 50), value)}
        rewrite(tmp_path / name / "model.safetensors", lambda tensors, bias=bias: tensors.update(bias))
    config = replace(change(config_of(tmp_path), "start", method="average", hyper={}), tasks=TASKS)
    merged = stock(merge_alone(config, domain))
    torch.testing.assert_close(merged.final_logits_bias, torch.full((1, 50), 3.0))
