"""Text encoders of every architecture of pico_encoders.yaml, from stock models to stock models and back."""

import json
from dataclasses import replace

import datasets
import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from common.core.errors import InputError
from common.fda.matching import MatchingProblem, matching_loss
from common.io import skeleton
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from helpers import assert_same_in_bf16, change
from NLU import domain
from pico_encoders import ENCODERS, fields_of
from pico_nlu import pico_config, pico_tokenizer, slug

TASKS = ["CoLA", "MNLI"]
LABELS = {"CoLA": 2, "MNLI": 3}


def write_models(root, kind):
    """A masked language model in root/base, classifiers near it in root/<task>/model; the stock models by name."""
    torch.manual_seed(0)
    base = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**fields_of(kind))).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = {"base": base}
    for task in TASKS:
        config = AutoConfig.for_model(**fields_of(kind), num_labels=LABELS[task])
        made[task] = AutoModelForSequenceClassification.from_config(config).eval()
        weights = {n: t + 0.05 * torch.randn_like(t) for n, t in base.base_model.state_dict().items()}
        made[task].base_model.load_state_dict(weights, strict=False)
    for name, model in made.items():
        model.save_pretrained(root / slug(name) / ("model" if name != "base" else ""))
        pico_tokenizer().save_pretrained(root / slug(name) / ("model" if name != "base" else ""))
    return made


def config_of(root, data):
    config = pico_config(root, root / "runs")
    config = change(config, "model", root=str(root), family="auto", base="base", expert="{slug}/model")
    return replace(change(change(config, "eval", data=str(data)), "run", score=False), tasks=TASKS)


def seen_by_layers(model, path):
    """(what each layer of a stock encoder is given, what it answers), for a text of five tokens."""
    seen = []

    def see(module, args, named, output):
        seen.append(((*args, *named.values())[0], output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in model.get_submodule(path)]
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5, 6, 7]]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ENCODERS)
def test_blocks_are_the_stock_layers_and_merges_open(kind, tmp_path, nlu_inputs):
    """A block answers what the layer answers within the stock model; TA is TA of the stock tensors; a loss is plain
    autograd's; what FDA makes opens, and every head scores on it."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path, nlu_inputs / "data")
    experiment = open_experiment(config, domain)
    bodies = {name: model.base_model for name, model in models.items()}
    seen = seen_by_layers(bodies["base"], experiment.family.blocks)
    assert len(seen) == experiment.depth or kind == "albert"  # which passes its one layer again
    for index in range(experiment.depth):
        theta_0 = experiment.read_block(experiment.base, index)
        torch.testing.assert_close(experiment.functions[index](theta_0, seen[index][0]), seen[index][1])
    check_loss(experiment, bodies, seen[0][0])
    construct(config, domain)
    folder = adapt(change(config, "start", method="ta"), domain)
    adapted, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not {n for n in report["missing_keys"] if "pooler" not in n} and not report["unexpected_keys"]
    assert adapted(torch.tensor([[3, 4, 5]])).last_hidden_state.isfinite().all()
    merged = AutoModel.from_pretrained(config.run.dir / "merged" / "ta").state_dict()
    states = [bodies[name].state_dict() for name in ("base", *TASKS)]
    for name, base in states[0].items():
        if base.is_floating_point() and "pooler" not in name:
            expected = base + 0.3 * sum(expert[name] - base for expert in states[1:])
            torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    scored = dict(domain.score(config, "MNLI", {"x": folder}, torch.device("cpu")))["x"]
    assert scored.n == 30


def check_loss(experiment, bodies, x_ATD):
    """The matching losses of the first block are those of plain autograd on the stock layers."""
    block, path = experiment.functions[0], f"{experiment.family.blocks}.0"
    base, expert = (dict(bodies[name].get_submodule(path).named_parameters()) for name in ("base", "MNLI"))
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["MNLI"]))
    y, target = block(base, x_ATD), block(expert, x_ATD).detach()
    loss = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    tau = experiment.task_vector("MNLI", theta_0, theta_t)
    tau = {name: t for name, t in tau.items() if t.any()}
    gradients = torch.autograd.grad(loss, [base[name] for name in tau])
    expected = [
        1 + F.cosine_similarity((expert[n] - base[n]).flatten(), g.flatten(), dim=0).item()
        for n, g in zip(tau, gradients, strict=True)
    ]
    problem = MatchingProblem(block, theta_0, theta_t, tau)
    assert matching_loss(problem, x_ATD).tolist() == pytest.approx(expected, abs=1e-5)
    assert_same_in_bf16(problem, x_ATD)


FUSED = ["nomic_bert", "gte", "jina_embeddings_v3"]


@pytest.mark.parametrize("kind", FUSED)
def test_fused_queries_merge_with_data_and_under_heads(kind, tmp_path, nlu_inputs):
    """A file has queries, keys and values in one tensor and under other names than the module, through which inputs
    go; scores are those of the classifier that stock transformers opens from heads/."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path, nlu_inputs / "data")
    config = change(change(config, "model", heads=tuple(TASKS)), "start", method="regmean")
    folder = merge_alone(config, domain)
    body = AutoModel.from_pretrained(folder).state_dict()
    for task in TASKS:
        place = folder / "heads" / task
        opened, report = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        own = models[task].state_dict()
        for name, tensor in opened.state_dict().items():
            within = name.removeprefix(f"{opened.base_model_prefix}.")
            is_head = within not in body or "pooler" in within
            assert torch.equal(tensor, own[name] if is_head else body[within]), name
    texts = datasets.load_from_disk(str(nlu_inputs / "data" / "MNLI"))["validation_matched"]
    tokens = pico_tokenizer()(
        *(list(texts[each]) for each in ("premise", "hypothesis")), padding=True, return_tensors="pt"
    )
    for place, model in ((folder, opened), (tmp_path / "mnli" / "model", models["MNLI"])):
        with torch.no_grad():
            right = model(**tokens).logits.argmax(-1) == torch.tensor(list(texts["label"]))
        scored = dict(domain.score(config, "MNLI", {"x": place}, torch.device("cpu")))["x"]
        assert scored.value == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("kind", FUSED)
def test_an_adapter_of_a_part_of_a_fused_tensor_is_refused(kind, tmp_path, nlu_inputs):
    """One of a whole tensor that has another name is merged as peft merges it."""
    write_models(tmp_path, kind)
    for target in ("q_proj", "o_proj"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
        settings = peft.LoraConfig(r=2, target_modules=[target], task_type="SEQ_CLS", init_lora_weights=False)
        adapted = peft.get_peft_model(model, settings)
        adapted.save_pretrained(tmp_path / target)
        config = change(config_of(tmp_path, nlu_inputs / "data"), "model", expert=target)
        config = replace(change(config, "start", method="ta", hyper={"ta": {"scale": 1.0}}), tasks=["CoLA"])
        if target == "q_proj":
            with pytest.raises(InputError, match=r"q_proj\.lora_A.* matches no tensor .* merge the adapter into it"):
                merge_alone(config, domain)
            continue
        merged = AutoModel.from_pretrained(merge_alone(config, domain)).state_dict()
        for name, tensor in adapted.merge_and_unload().base_model.state_dict().items():
            if tensor.is_floating_point() and "pooler" not in name:
                torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_encoder_that_is_stored_in_another_form_is_refused(kind, tmp_path, nlu_inputs):
    """Of what a file has otherwise than by rows, such as experts by themselves that are one stack in the module."""
    write_models(tmp_path, "bert")
    experts = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}
    fields = fields_of("bert") | {"model_type": kind, "head_dim": 8} | experts
    for place in ("base", "cola/model", "mnli/model"):
        (tmp_path / place / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts\.\w+ is stored in another form; take models"):
        open_experiment(config_of(tmp_path, nlu_inputs / "data"), domain)


@pytest.mark.parametrize("turned", [True, False])
def test_rows_in_another_order_are_told(turned, monkeypatch):
    """A conversion that transformers may come to have; those it has are by rows."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**fields_of("nomic_bert")))
    revert = skeleton.revert_weight_conversion

    def reverted(model, tensors):
        stored = revert(model, tensors)
        return {n: t.flip(0) if n.endswith("layers.1.mlp.fc2.weight") and turned else t for n, t in stored.items()}

    monkeypatch.setattr(skeleton, "revert_weight_conversion", reverted)
    assert skeleton.not_by_rows(model) == ("layers.1.mlp.down_proj.weight" if turned else "")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mpnet", "a layer of MPNetModel is called with position_bias besides its hidden states"),
        ("deberta-v2", "DebertaV2Model is called with rel_embeddings besides"),
        ("roformer", "RoFormerModel is called with sinusoidal_pos besides"),
        ("xlm", "a layer of XLMModel lies in pieces in the lists attentions, layer_norm1, ffns, layer_norm2;"),
        ("flaubert", "a layer of FlaubertModel lies in pieces in the lists attentions, layer_norm1, ffns,"),
        ("longformer", "a layer of LongformerModel has no second derivative; it cannot be anchored: Sequence length"),
        ("luke", "LukeModel has weights that its hidden states do not reach, attention.self.w2e_query.weight"),
    ],
)
def test_what_cannot_be_anchored_is_refused_by_its_class(kind, said, tmp_path, nlu_inputs):
    write_models(tmp_path, "bert")
    fields = {"model_type": kind, **{k: v for k, v in fields_of("bert").items() if k != "model_type"}}
    fields |= {"relative_attention": True}  # of DeBERTa
    for place in ("base", "cola/model", "mnli/model"):
        (tmp_path / place / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=said):
        construct(config_of(tmp_path, nlu_inputs / "data"), domain)


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "roformer", "xlnet", "xlm", "longformer", "luke"])
def test_what_cannot_be_anchored_is_merged_all_the_same(kind, tmp_path, nlu_inputs):
    """By scripts/merge.py, which anchors nothing: the average is that of the stock encoders, and stock opens it."""
    fields = {k: v for k, v in fields_of("bert").items() if k != "model_type"} | {"relative_attention": True}
    if kind == "xlnet":
        fields = {"vocab_size": fields["vocab_size"], "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    torch.manual_seed(0)
    body = AutoModel.from_config(AutoConfig.for_model(kind, **fields)).eval()
    experts = {}
    for task in ("base", *TASKS):
        folder = tmp_path / slug(task) / ("model" if task != "base" else "")
        if task != "base":
            with torch.no_grad():
                for parameter in body.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            experts[task] = {name: p.detach().double() for name, p in body.named_parameters()}
        body.save_pretrained(folder)
        pico_tokenizer().save_pretrained(folder)
    config = config_of(tmp_path, nlu_inputs / "data")
    config = replace(config, start=replace(config.start, method="average"), run=replace(config.run, score=False))
    merged = AutoModel.from_pretrained(merge_alone(config, domain))
    for name, p in merged.named_parameters():
        expected = sum(of_task[name] for of_task in experts.values()) / len(TASKS)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6, msg=name)
