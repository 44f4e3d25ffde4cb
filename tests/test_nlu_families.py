"""Encoders of three families: stock transformers opens what was merged, and what is no such encoder is refused."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DPRConfig,
    DPRQuestionEncoder,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
)

from common.config import Start
from common.core import notices
from common.core.blocks import nonzero_tensors
from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.evaluation.scoring import score_run
from common.fda.construction import SearchSettings, optimise_anchors
from common.fda.matching import MatchingProblem, matching_loss
from common.io.checkpoints import Checkpoint, read_header, write_tensors
from common.layout import RunLayout
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.start import merge_start
from helpers import change, edit_config, rewrite
from NLU import domain, scoring
from NLU.encoders import encoder as blocks_of
from pico_nlu import (
    CONFIGS,
    PICO,
    pico_architecture,
    pico_config,
)

SPEECH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
UNLIKE = {  # a model type, the fields of a pico config of it, and why nlu cannot merge it
    "canine": (PICO, "nlu cannot merge a CanineModel, which has no one embedding of its tokens"),
    "perceiver": (
        {"d_model": 16, "num_latents": 4},
        "nlu cannot merge a PerceiverModel, which has no one embedding of",
    ),
    "clip": ({}, "nlu cannot merge a CLIPModel, which has no one embedding of its tokens"),
    "wav2vec2": (PICO, "nlu cannot merge a Wav2Vec2Model, which has no one embedding of its tokens"),
    "whisper": (SPEECH, "nlu cannot merge a whisper, for AutoModelForSeq2SeqLM opens none such"),
    "fsmt": (
        SPEECH | {"langs": ["a", "b"], "src_vocab_size": 50, "tgt_vocab_size": 50},
        "whose encoder is no model by",
    ),
    "encoder-decoder": (
        {part: {"model_type": "bert"} | PICO for part in ("encoder", "decoder")},
        "nlu cannot merge a EncoderDecoderModel, whose config has no one hidden_size",
    ),
    "bert": (PICO | {"hidden_act": "none"}, "transformers cannot build the model of .*config.json: 'none'"),
}
KEY_BIAS = "attention.self.key.bias"


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_transformers_opens_the_encoder_of_every_start_and_family(nlu_inputs, tmp_path, family):
    config = change(pico_config(nlu_inputs, tmp_path, family), "run", score=False)
    construct(config, domain)
    for start in ("pretrained", "ta", "tsv", "wudi"):
        folder = adapt(change(config, "start", method=start), domain)
        encoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert {name.split(".")[0] for name in report["missing_keys"]} <= {"pooler"} and not report["unexpected_keys"]
        tokens = AutoTokenizer.from_pretrained(folder)("w1 w2", return_tensors="pt")
        assert encoder(**tokens).last_hidden_state.isfinite().all()
    score_run(config, domain)
    rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
    assert Counter(r["method"] for r in rows) == {m: 3 * n for m, n in zip(
        ("pretrained", "individual", "ta", "tsv", "wudi", "fda"), (1, 1, 2, 2, 2, 4), strict=True
    )}  # fmt: skip
    assert {r["task"]: (r["metric"], r["n"]) for r in rows} == {
        "CoLA": ("Matthews", 30), "STS-B": ("Pearson and Spearman", 30), "MNLI": ("accuracy", 30)
    }  # fmt: skip


def test_position_embeddings_lie_in_what_is_stored(nlu_config):
    """A step of length nothing leaves the anchors at their start: what is stored differs by the expert's rows."""
    still = change(change(nlu_config, "anchors", steps=1, lr=1e-30), "run", score=False)
    added = change(change(still, "anchors", position_embeddings=True), "run", name="added")
    for one in (still, added):
        construct(one, domain)
    rows_TD = open_experiment(added, domain).positions("MNLI")
    expert = Checkpoint(nlu_config.model.path("expert", "MNLI")).read(["roberta.embeddings.position_embeddings.weight"])
    assert torch.equal(rows_TD, expert["roberta.embeddings.position_embeddings.weight"][:3])
    stored, plain = (
        load_file(c.run.dir / "anchors/weight/MNLI/block_01.safetensors")["anchors"] for c in (added, still)
    )
    torch.testing.assert_close(stored, plain + rows_TD)
    adapt(added, domain)
    with pytest.raises(InputError, match="anchors.position_embeddings = True, now it is False"):
        construct(change(still, "run", name="added"), domain)


def test_position_embeddings_are_added_while_anchors_are_optimised(nlu_config):
    """The loss that the file records is the loss of what it holds, at the block itself."""
    added = change(change(nlu_config, "anchors", position_embeddings=True), "run", score=False)
    construct(added, domain)
    experiment = open_experiment(added, domain)
    file = RunLayout(added).anchor_file("CoLA", 0)
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["CoLA"]))
    tau = nonzero_tensors(experiment.task_vector("CoLA", theta_0, theta_t))
    problem = MatchingProblem(experiment.functions[0], theta_0, theta_t, tau)
    losses = matching_loss(problem, load_file(file)["anchors"])
    assert dict(zip(tau, losses.tolist(), strict=True)) == pytest.approx(read_header(file)["losses"], abs=1e-4)


def test_position_embeddings_that_cannot_be_added_are_refused(nlu_inputs, tmp_path, nlu_config):
    """ELECTRA's are as narrow as its word embeddings; 141 tokens are more than there are positions."""
    narrow = change(pico_config(nlu_inputs, tmp_path, "electra"), "anchors", position_embeddings=True)
    with pytest.raises(InputError, match=r"position_embeddings.weight is \(140, 8\), anchors are \(3, 16\)"):
        construct(narrow, domain)
    with pytest.raises(InputError, match=r"is \(140, 16\), anchors are \(141, 16\)"):
        construct(change(nlu_config, "anchors", position_embeddings=True, tokens=141), domain)


@pytest.mark.parametrize("form", ["bare", "classifier", "legacy"])
def test_a_base_saved_in_another_form_is_the_same_base(own_nlu, form):
    """The pico base is a masked language model: roberta.… and lm_head.…; the names of the encoder are what counts."""
    encoder = {
        n: t for n, t in load_file(own_nlu.model.path("base") / "model.safetensors").items() if "lm_head" not in n
    }
    bare = {n.removeprefix("roberta."): t for n, t in encoder.items()}
    forms = {
        "bare": bare | {"pooler.dense.weight": torch.ones(16, 16), "embeddings.position_ids": torch.arange(140)[None]},
        "classifier": encoder | {"classifier.dense.weight": torch.ones(16, 16)},
        "legacy": {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in encoder.items()
        },
    }
    write_tensors(own_nlu.model.path("base") / "model.safetensors", forms[form])
    base = open_experiment(own_nlu, domain).base
    assert base.shapes.keys() == bare.keys()
    assert all(torch.equal(t, bare[n]) for n, t in base.read(base.shapes).items())


def test_the_papers_models_have_the_papers_shapes(tmp_path):
    large = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for name, architecture, width, depth, size in (
        ("base", RobertaConfig(), 768, 12, 7_087_872),
        ("large", large, 1024, 24, 12_596_224),
    ):
        architecture.save_pretrained(tmp_path / name)
        model = replace(pico_config(tmp_path, tmp_path).model, root=str(tmp_path), base=name)
        assert domain.token_shape(model) == (5, width)
        blocks = [m for _, m in domain.family(model).modules(domain.skeleton(model))]
        parameters = dict(blocks[0].named_parameters())
        assert (len(blocks), len(parameters), sum(p.numel() for p in parameters.values())) == (depth, 16, size)
        assert all(p.is_meta for p in parameters.values())


def test_the_key_bias_is_noise_when_kept_and_a_floor_gone_when_dropped():
    """No input moves it: its loss stays about 1, where chance has it, and what chases it is lost for the others.

    Where it ends hangs on how a processor rounds, so it is asked of the mean of six sets of anchors.
    """
    torch.manual_seed(0)
    wide = pico_architecture("roberta", hidden_size=64, num_hidden_layers=1)
    encoder = AutoModel.from_config(wide, attn_implementation="eager")
    family = blocks_of(encoder, "roberta")
    ((_, module),) = family.modules(encoder)
    block = family.pure(module)
    theta_0 = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in module.named_parameters()}
    theta_t = {n: p + 0.05 * torch.randn_like(p) for n, p in theta_0.items()}
    xs = [torch.randn(8, 5, 64) for _ in range(6)]

    exact = {n: p.double().requires_grad_() for n, p in theta_0.items()}
    block(exact, xs[0].double()).square().sum().backward()
    assert exact[KEY_BIAS].grad.abs().max() < 1e-12 < 1e-3 < exact["attention.self.query.bias"].grad.abs().max()

    tau = subtract(theta_t, theta_0)
    cleaned = family.without_null_gradients(tau)

    def optimised(t, x):
        return optimise_anchors(MatchingProblem(block, theta_0, theta_t, t), x, SearchSettings(60, lr=0.05))

    alone = optimised({KEY_BIAS: tau[KEY_BIAS]}, xs[0])
    kept, dropped = ([optimised(t, x) for x in xs] for t in (tau, cleaned))
    assert sum(alone.trace) / 61 == pytest.approx(1, abs=0.1), "sixty steps on it alone lead nowhere"
    assert sum(with_it.losses[KEY_BIAS] for with_it in kept) / len(xs) > 0.5
    for with_it, without in zip(kept, dropped, strict=True):
        assert set(with_it.losses) - set(without.losses) == {KEY_BIAS}
        assert max(without.trace[-1], without.losses["attention.self.query.bias"]) < 0.5
        others = [loss for name, loss in with_it.losses.items() if name != KEY_BIAS]
        assert sum(without.losses.values()) < sum(others), "the noise costs the other tensors as well"


def write_embedders(root, tasks):
    """Bare BERTs with their poolers, the base and experts near it: embedding models, without a head."""
    base = BertModel(pico_architecture("bert"))
    base.save_pretrained(root / "base")
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        near = BertModel(base.config)
        near.load_state_dict({n: t + 0.05 * torch.randn_like(t) for n, t in base.state_dict().items()})
        near.save_pretrained(root / task)


def test_the_pooler_of_models_without_a_head_is_merged(tmp_path, capsys):
    write_embedders(tmp_path / "e", ["RTE", "own"])
    config = pico_config(tmp_path, tmp_path, "bert")
    config = replace(config, tasks=["RTE", "own"], start=Start(method="ta", hyper={"ta": {"scale": 0.5}}))
    config = change(change(config, "model", root=str(tmp_path / "e"), expert="{task}"), "run", score=False)
    base, one, two = (load_file(tmp_path / f"e/{n}/model.safetensors") for n in ("base", "RTE", "own"))
    merged = load_file(merge_alone(config, domain) / "model.safetensors")
    assert merged.keys() == base.keys() and "pooler.dense.weight" in merged
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.5 * one[name] + 0.5 * two[name], rtol=0, atol=1e-6)

    lacking = {n: t for n, t in two.items() if not n.startswith("pooler.")}
    write_tensors(tmp_path / "e/own/model.safetensors", lacking)
    merged = load_file(merge_alone(change(config, "run", name="lacking"), domain) / "model.safetensors")
    assert torch.equal(merged["pooler.dense.weight"], base["pooler.dense.weight"])
    assert f"pooler.… is not merged, for {tmp_path}/e/own and {tmp_path}/e/base do not" in capsys.readouterr().err


def test_classifiers_leave_the_encoder_the_base_s_pooler(nlu_inputs, own_nlu, tmp_path):
    """Never one that is drawn at random; the folders of classifiers beside it hold their own, which they open with."""
    shutil.copytree(nlu_inputs / "bert", tmp_path / "own/bert")
    config = change(change(pico_config(tmp_path / "own", tmp_path, "bert"), "start", method="ta"), "run", score=False)
    file = config.model.path("base") / "model.safetensors"
    pooler = {"bert.pooler.dense.weight": torch.full((16, 16), 0.5), "bert.pooler.dense.bias": torch.ones(16)}
    write_tensors(file, load_file(file) | pooler)
    for heads in ((), ("MNLI",)):
        folder = merge_alone(change(change(config, "model", heads=heads), "run", name=f"heads{len(heads)}"), domain)
        merged, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(merged.pooler.dense.weight, pooler["bert.pooler.dense.weight"])
        given = change(change(config, "start", checkpoint=str(folder)), "run", name=f"given{len(heads)}")
        taken = merge_start(open_experiment(given, domain), domain).path  # what we wrote can be a start
        assert torch.equal(AutoModel.from_pretrained(taken).pooler.dense.weight, merged.pooler.dense.weight)
    mnli, report = AutoModelForSequenceClassification.from_pretrained(folder / "heads/MNLI", output_loading_info=True)
    assert not any(report.values())
    own = load_file(config.model.path("expert", "MNLI") / "model.safetensors")
    assert torch.equal(mnli.bert.pooler.dense.weight, own["bert.pooler.dense.weight"])


def test_the_head_of_a_task_with_a_slash_in_its_name_opens(own_nlu, tmp_path):
    shutil.copytree(own_nlu.model.path("expert", "CoLA"), tmp_path / "own/org/CoLA")
    config = replace(own_nlu, tasks=["org/CoLA", "org/a b"], start=Start(method="average"))
    shutil.copytree(tmp_path / "own/org/CoLA", tmp_path / "own/org/a b")
    (tmp_path / "own/base").symlink_to(own_nlu.model.path("base"))
    places = {"root": str(tmp_path / "own"), "expert": "{task}", "heads": ("org/CoLA", "org/a b")}
    folder = merge_alone(change(change(config, "model", **places), "run", score=False), domain)
    for task in config.tasks:
        stock, report = AutoModelForSequenceClassification.from_pretrained(
            folder / "heads" / task, output_loading_info=True
        )
        assert not any(report.values())
        assert stock.base_model.encoder.layer[0].output.dense.weight.equal(
            AutoModel.from_pretrained(folder).encoder.layer[0].output.dense.weight
        )


def test_an_expert_without_a_classifier_has_no_head_to_keep(own_nlu):
    """A masked language model, whose class is none of those with a head that is kept."""
    shutil.copytree(own_nlu.model.path("base"), own_nlu.model.path("expert", "own"))
    with pytest.raises(
        InputError, match="config.json names RobertaForMaskedLM, which has no classifier; leave own out"
    ):
        domain.check_export(change(own_nlu, "model", heads=("own",)).model)


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "RobertaForCausalLM", "RobertaModel", "classifiers"])
def test_language_models_are_said_to_lose_their_heads(own_nlu, kind, monkeypatch, capsys):
    """The base of classifiers is one too, of which nobody expects a head over words."""
    monkeypatch.setattr(notices, "_said", set())
    base = own_nlu.model.path("base")
    for task in own_nlu.tasks if kind != "classifiers" else []:
        shutil.rmtree(own_nlu.model.path("expert", task))
        shutil.copytree(base, own_nlu.model.path("expert", task))
        edit_config(own_nlu.model.path("expert", task), architectures=[kind])
    edit_config(base, architectures=[kind if kind != "classifiers" else "RobertaForMaskedLM"])
    open_experiment(own_nlu, domain)
    said = f"base and experts are language models ({kind}), of which the encoder alone is merged"
    assert (said in capsys.readouterr().err) == kind.endswith("LM")


def test_heads_and_poolers_are_never_merged(nlu_inputs, tmp_path):
    """A BERT classifier pools before it classifies: whatever is merged, it scores with the expert's own pooler."""
    config = pico_config(nlu_inputs, tmp_path, "bert")
    merged = Checkpoint(merge_alone(change(change(config, "start", method="ta"), "run", score=False), domain))
    assert {n.split(".")[0] for n in merged.shapes} == {"embeddings", "encoder"}
    own, expert = scoring.open_classifier(config.model, "MNLI").state_dict(), config.model.path("expert", "MNLI")
    stored = load_file(expert / "model.safetensors")
    heads = [n for n in stored if n.startswith(("classifier.", "bert.pooler."))]
    assert len(heads) == 4 and all(torch.equal(own[n], stored[n]) for n in heads)


@pytest.mark.parametrize("place", ["base", "CoLA"])
@pytest.mark.parametrize("prefix", ["ema.", "model_ema.module."])
def test_a_second_copy_of_the_layers_is_no_head(own_nlu, place, prefix):
    folder = own_nlu.model.path("base") if place == "base" else own_nlu.model.path("expert", place)
    rewrite(folder / "model.safetensors", lambda own: own | {f"{prefix}{n}": t + 1 for n, t in own.items()})
    name = r"roberta\.encoder\.layer\.\d.*"
    with pytest.raises(InputError, match=rf"holds {prefix}{name} beside encoder\.layer\.\d.*: a second model"):
        open_experiment(own_nlu, domain)


def test_matrices_that_are_stored_the_other_way_round_are_refused(own_nlu):
    """As GPT-2's: what goes by the rows of a matrix would take its outputs for its inputs."""
    for folder in (own_nlu.model.path("base"), *(own_nlu.model.path("expert", task) for task in own_nlu.tasks)):
        GPT2Model(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(folder)
    with pytest.raises(InputError, match=r"base/config.json: a GPT2Model has its matrices as .*; merge it as the dec"):
        merge_alone(change(change(own_nlu, "model", family="auto"), "start", method="ta"), domain)


def test_checkpoints_of_another_kind_are_refused(own_nlu):
    with pytest.raises(InputError, match="base/config.json has model type 'roberta', model.family is 'bert'"):
        construct(change(own_nlu, "model", family="bert"), domain)
    with pytest.raises(InputError, match="model.head is not for nlu"):
        construct(change(own_nlu, "model", head="x"), domain)
    expert = own_nlu.model.path("expert", "CoLA")
    (expert / "model.safetensors").rename(expert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cola/model holds none of .*; scripts/convert_checkpoint.py makes .*\.bin"):
        construct(own_nlu, domain)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "base/config.json is no config file"), (None, "no config.json")]
)
def test_a_base_without_a_readable_config_is_refused_in_the_dry_run_too(own_nlu, content, message):
    file = own_nlu.model.path("base") / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(InputError, match=message):
        construct(own_nlu, domain)
    assert message in describe(own_nlu, domain).text


def test_code_that_comes_with_a_model_is_never_run(own_nlu, tmp_path):
    base = own_nlu.model.path("base")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(base, model_type="strange", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(InputError, match="base/config.json has model type 'strange', model.family is 'roberta'"):
        construct(own_nlu, domain)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_no_text_encoder_is_named_in_one_sentence(kind, tmp_path):
    """Before any weight, of which the base has none here but one; the sentence says what to take instead."""
    fields, said = UNLIKE[kind]
    write_tensors(tmp_path / "base" / "model.safetensors", {"weight": torch.ones(1)})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind} | fields))
    shutil.copytree(tmp_path / "base", tmp_path / "CoLA")
    config = change(
        pico_config(tmp_path, tmp_path / "runs"), "model", root=str(tmp_path), family="auto", expert="{task}"
    )
    config = change(change(config, "start", method="average"), "run", score=False)
    with pytest.raises(InputError, match=said) as error:
        merge_alone(replace(config, tasks=["CoLA"]), domain)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert kind == "bert" or str(error.value).endswith("take models of an architecture that NLU/README.md lists")


def test_a_body_that_its_own_class_calls_by_the_prefix_is_merged(tmp_path):
    """DPR's question encoder has all its tensors under the prefix of its base model, and no name without it."""
    for seed, name in enumerate(("base", "CoLA", "MNLI")):
        torch.manual_seed(seed)
        DPRQuestionEncoder(DPRConfig(**PICO)).save_pretrained(tmp_path / name)
    config = change(pico_config(tmp_path, tmp_path / "runs"), "start", method="average")
    config = change(change(config, "run", score=False), "model", root=str(tmp_path), family="auto", expert="{task}")
    folder = merge_alone(replace(config, tasks=["CoLA", "MNLI"]), domain)
    merged, *experts = (
        load_file(place / "model.safetensors") for place in (folder, tmp_path / "CoLA", tmp_path / "MNLI")
    )
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (experts[0][name] + experts[1][name]) / 2)
    assert merged.keys() == experts[0].keys()
