"""Language models of every architecture of pico_decoders.yaml, from stock models to stock models and back."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.fda.matching import MatchingProblem, matching_loss
from common.io.checkpoints import Checkpoint
from common.io.skeleton import canonical_names, unread_names
from common.io.unstacked import Unstacked
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import CONSTRUCT, MERGE, describe
from helpers import assert_same_in_bf16, change, read, rewrite
from NLG import domain
from NLG.openers import opener_of
from pico_decoders import DECODERS, MERGED_ALONE, fields_of
from pico_nlg import PICO, PICO_TASKS, pico_config, pico_tokenizer, save


def write_models(root, kind, **fields):
    """A base and two experts near it; returns the stock models by name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields_of(kind) | fields)
    models = {name: opener_of(config).from_config(config, dtype=torch.float32).eval() for name in ("base", *PICO_TASKS)}
    base = {n: noisy(t, 0.2) for n, t in models["base"].state_dict().items()}
    for name, model in models.items():
        model.load_state_dict({n: noisy(t, 0.1) for n, t in base.items()} if name != "base" else base)
        save(model, pico_tokenizer(), root / name)
    return models


def noisy(tensor, scale):
    return tensor + scale * torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def config_of(root):
    config = pico_config(root, root / "runs")
    model = {"root": str(root), "family": "auto", "vocabulary": "refuse", "tokenizers": ()}
    return change(change(config, "model", **model), "run", score=False)


def stock(folder):
    config = AutoConfig.from_pretrained(folder)
    return opener_of(config).from_pretrained(folder, dtype=torch.float32)


def stock_answer(model, path, x_ATD):
    """What the stock module of a block answers: its MLP, or one expert of a mixture's stack."""
    number = re.search(r"experts\.(\d+)\.$", path)
    if number is None:
        return model.get_submodule(path.removesuffix("."))(x_ATD)
    experts, tokens = model.get_submodule(path[: number.start()] + "experts"), x_ATD.flatten(0, 1)
    chosen = torch.full((len(tokens), 1), int(number[1]))
    return experts(tokens, chosen, torch.ones(len(tokens), 1)).view_as(x_ATD)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_merged_is_what_the_stock_models_give(kind, tmp_path):
    """Every block computes what the stock module does, a matching loss is what plain autograd gives on that, TA is TA
    of the stock models' tensors, and stock transformers opens what FDA makes."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path)
    experiment = open_experiment(config, domain)
    places = domain.family(config.model).modules(domain.skeleton(config.model))
    inside = own_paths(config, experiment.prefixes)
    x_ATD = torch.randn(3, 1, 16)
    for index, path in enumerate(inside):
        theta_0 = experiment.read_block(experiment.base, index)
        expected = stock_answer(models["base"], path, x_ATD)
        torch.testing.assert_close(experiment.functions[index](theta_0, x_ATD), expected, atol=1e-5, rtol=1e-5)
    assert len(places) == experiment.depth >= 2
    tensors = len(experiment.read_block(experiment.base, 0))
    assert plain_loss(models, inside[0], x_ATD, tensors) == pytest.approx(our_loss(experiment, x_ATD), abs=1e-5)
    construct(config, domain)
    adapted = stock(adapt(config, domain))
    assert adapted(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    merged, states = stock(config.run.dir / "merged" / "ta").state_dict(), [m.state_dict() for m in models.values()]
    for name, base in states[0].items():
        expected = base + 0.5 * sum(expert[name] - base for expert in states[1:]) if base.is_floating_point() else base
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(adapted.state_dict()[n], merged[n]) for n in merged)


def own_paths(config, prefixes):
    """Where blocks are in the model itself, whose names can be others than the checkpoint's."""
    family = domain.family(config.model)
    inside = [re.sub(f"^{re.escape(family.blocks)}", family.path or family.blocks, prefix) for prefix in prefixes]
    return [path.replace(".block_sparse_moe.", ".mlp.") for path in inside]


def our_loss(experiment, x_ATD):
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["math"]))
    problem = MatchingProblem(experiment.functions[0], theta_0, theta_t, subtract(theta_t, theta_0))
    assert_same_in_bf16(problem, x_ATD)
    return matching_loss(problem, x_ATD).mean().item()


def plain_loss(models, path, x_ATD, tensors):
    """Mean over a block's tensors of one minus the cosine of −τ and the gradient of the outputs' cosine distance."""
    base, expert = models["base"], models["math"]
    target = stock_answer(expert, path, x_ATD).detach()
    loss = (1 - F.cosine_similarity(stock_answer(base, path, x_ATD), target, dim=-1)).sum()
    number, place = re.search(r"experts\.(\d+)\.$", path), re.sub(r"experts\.\d+\.$", "experts.", path)
    names = [n for n, _ in base.named_parameters() if n.startswith(place)]
    parameters = dict(base.named_parameters())
    losses = []
    for name, gradient in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True):
        tau = expert.get_parameter(name).detach() - parameters[name].detach()
        pairs = [(tau, gradient)] if number is None else [(tau[int(number[1])], gradient[int(number[1])])]
        if number and tensors > len(names):  # the checkpoint keeps gate and up apart
            pairs = list(zip(*(p.chunk(1 + name.endswith("gate_up_proj")) for p in pairs[0]), strict=True))
        losses += [1 + F.cosine_similarity(t.flatten(), g.flatten(), dim=0).item() for t, g in pairs]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "mixtral"])
def test_stacks_on_disk_are_read_one_expert_at_a_time(kind, tmp_path):
    """A checkpoint that keeps the model's own stacks merges into the same model as one that keeps experts apart."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path)
    apart = stock(merge_alone(config, domain)).state_dict()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, save_original_format=False)
    stacked = change(config, "run", name="stacked")
    assert isinstance(open_experiment(stacked, domain).base, Unstacked)
    merged = stock(merge_alone(stacked, domain)).state_dict()
    assert all(torch.equal(apart[name], merged[name]) for name in apart)
    construct(stacked, domain)
    assert stock(adapt(stacked, domain))(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_file_by_the_models_own_names_is_that_by_the_stored_ones(tmp_path):
    """Patches of images are embedded by a convolution, of four axes; the head is the embedding, under its own name."""
    models, config = write_models(tmp_path, "gemma3"), config_of(tmp_path)
    expected = stock(merge_alone(config, domain)).state_dict()
    models["math"].save_pretrained(tmp_path / "math", save_original_format=False)
    assert any(n.startswith("model.") and len(s) == 4 for n, s in Checkpoint(tmp_path / "math").shapes.items())
    merged = stock(merge_alone(change(config, "run", name="own"), domain)).state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_an_adapter_of_a_tied_gemma_3_saves(tied, tmp_path):
    """Its name in the file is another than in the model, in which it is one with the embedding: as peft answers."""
    models = write_models(tmp_path, "gemma3", tie_word_embeddings=True)
    modules = {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": tied}
    adapted = get_peft_model(models["base"], LoraConfig(r=2, target_modules=["q_proj"], **modules))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "lora")
    config = change(config_of(tmp_path), "model", expert="lora")
    config = replace(change(config, "start", hyper={"ta": {"scale": 1.0}}), tasks=["math"])
    config = change(config, "eval", tests={})
    ids = torch.tensor([[3, 4, 5]])
    merged = stock(merge_alone(config, domain))
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_constant_that_an_mlp_keeps_in_the_file_stays(tmp_path):
    """Apertus keeps beta and eps of its activation as buffers: they are the MLP's, and those of all models."""
    fields = PICO | {"tie_word_embeddings": False}
    models = {}
    for seed, name in enumerate(("base", *PICO_TASKS)):
        torch.manual_seed(seed)
        models[name] = AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **fields)).eval()
        save(models[name], pico_tokenizer(), tmp_path / name)
    config = config_of(tmp_path)
    experiment = open_experiment(config, domain)
    x_ATD = torch.randn(3, 1, 16)
    theta_0 = experiment.read_block(experiment.base, 0)
    torch.testing.assert_close(experiment.functions[0](theta_0, x_ATD), models["base"].model.layers[0].mlp(x_ATD))
    construct(config, domain)
    adapted, report = AutoModelForCausalLM.from_pretrained(adapt(config, domain), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert adapted(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    merged = stock(config.run.dir / "merged" / "ta")
    base, math, code = (model.state_dict() for model in models.values())
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, base[name] + 0.5 * (math[name] + code[name] - 2 * base[name]))
    for name, buffer in adapted.named_buffers():
        if name.endswith(("beta", "eps")):
            assert torch.equal(buffer, base[name])


@pytest.mark.parametrize("having", [("base", *PICO_TASKS), ("base", "math"), ("base",), PICO_TASKS])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
        ("glm4_moe", "model.layers.46.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
        ("qwen3_next", "mtp.fc.weight"),
    ],
)
def test_layers_that_the_class_leaves_aside_are_merged(kind, name, having, tmp_path, capsys):
    """Those that predict several tokens: merged as other weights, with the base's where an expert lacks them."""
    write_models(tmp_path, kind)
    for number, model in enumerate(having):
        rewrite(tmp_path / model / "model.safetensors", lambda t, n=number: t | {name: torch.full((16, 32), 1.0 + n)})
    folder, said = merge_alone(config_of(tmp_path), domain), capsys.readouterr().err
    if "base" not in having:
        assert name not in Checkpoint(folder).shapes and said.count(f"has {name}, which transformers leaves") == 2
        return
    task_vectors = {3: 1.0 + 2.0, 2: 1.0 + 0.0, 1: 0.0}[len(having)]
    assert torch.equal(read(folder, name), torch.full((16, 32), 1.0 + 0.5 * task_vectors))
    lacking = {*PICO_TASKS} - {*having}
    assert said.count("; the base's stand for them") == len(lacking)
    assert all(f"{task} lacks {name}, which transformers leaves aside" in said for task in lacking)
    assert stock(folder)(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_masks_that_old_files_keep_are_no_weights():
    """They lie in modules that the model has; a module that it has not is one of further layers."""
    with torch.device("meta"):
        model = opener_of(config := AutoConfig.for_model(**fields_of("gpt2"))).from_config(config)
    names, unread = canonical_names(model), unread_names(model)
    assert names("transformer.h.0.attn.bias") is None and names("h.1.attn.bias") is None
    assert not unread("transformer.h.0.attn.bias") and not unread("transformer.h.0.attn.c_attn.bias")


@pytest.mark.parametrize(("kind", "step"), [("bart", "domain nlu merges it"), ("whisper", "no domain merges such")])
def test_an_encoder_with_a_decoder_is_sent_where_it_is_merged(kind, step):
    with pytest.raises(InputError, match=f"config.json: a {kind} has an encoder before its decoder: {step}"):
        opener_of(AutoConfig.for_model(kind))


def test_what_sees_images_is_opened_whether_or_not_it_has_an_encoder():
    assert opener_of(AutoConfig.for_model("florence2")) is AutoModelForImageTextToText


def test_of_a_stack_of_64_experts_one_is_in_memory(tmp_path):
    """gpt-oss keeps all experts of a layer in a tensor; a unit reads an expert of base and model, no stack."""
    write_models(tmp_path, "gpt_oss", num_local_experts=64, hidden_size=64, intermediate_size=64)
    experiment = open_experiment(config_of(tmp_path), domain)
    assert experiment.depth == 128
    stack = Checkpoint(tmp_path / "base").shapes["model.layers.0.mlp.experts.gate_up_proj"]
    theta_0 = experiment.read_block(experiment.base, 77)
    assert {name: tuple(p.shape) for name, p in theta_0.items()} == {
        "gate_up_proj": stack[:0:-1], "gate_up_proj_bias": stack[2:], "down_proj": (64, 64), "down_proj_bias": (64,),
    }  # fmt: skip
    whole = Checkpoint(tmp_path / "base").read(["model.layers.1.mlp.experts.gate_up_proj"])
    assert torch.equal(theta_0["gate_up_proj"], whole["model.layers.1.mlp.experts.gate_up_proj"][13].T)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in theta_0.values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("opt", r"a layer of OPTForCausalLM is made of self_attn, .*: there is no MLP among them \(mlp, feed_forward"),
        ("bloom", r"the mlp of a layer of BloomForCausalLM does not take a token of width 16 to one: "),
        ("bert", "a layer of BertLMHeadModel is made of attention, intermediate, output: there is no MLP"),
        ("t5", "a t5 has an encoder before its decoder: domain nlu merges it"),
    ],
)
def test_what_cannot_be_anchored_is_refused_by_its_class(kind, message, tmp_path):
    (tmp_path / "base").mkdir()
    fields = fields_of("llama") | {"model_type": kind}
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields | {"n_layer": 2, "n_head": 2, "dropout": 0.0}))
    save_file({"model.x": torch.zeros(2, 2)}, tmp_path / "base" / "model.safetensors")
    for task in PICO_TASKS:
        save_file({"model.x": torch.ones(2, 2)}, tmp_path / f"{task}.safetensors")
    config = change(config_of(tmp_path), "model", expert="{task}.safetensors")
    with pytest.raises(InputError, match=message):
        construct(config, domain)


@pytest.mark.parametrize("kind", [*MERGED_ALONE, "opt"])
def test_what_cannot_be_anchored_is_merged_all_the_same(kind, tmp_path):
    """The mean of the stock models' tensors, in a folder that stock transformers opens; and no circle of hints."""
    models, config = write_models(tmp_path, kind), change(config_of(tmp_path), "start", method="average", hyper={})
    with pytest.raises(InputError) as raised:
        construct(config, domain)
    said = str(raised.value)
    assert ("anchors.part layer anchors the layer as a whole" in said) == (kind == "opt")
    assert ("nor can anchors.part be layer, so the architecture is for scripts/merge.py alone" in said) == (
        kind != "opt"
    )
    assert describe(config, domain, MERGE, anchored=False).refusals == []
    assert describe(config, domain, CONSTRUCT).refusals[:1] == [said]
    merged = stock(merge_alone(config, domain)).state_dict()
    mean = {n: sum(models[t].state_dict()[n] for t in PICO_TASKS) / 2 for n in models["base"].state_dict()}
    assert merged.keys() == mean.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(merged[name], tensor.to(merged[name]), atol=1e-5, rtol=1e-5, msg=name)


def test_stacks_that_are_merged_as_they_are_need_a_method_of_weights(tmp_path):
    write_models(tmp_path, "granitemoe")
    config = change(config_of(tmp_path), "start", method="tsv", hyper={})
    with pytest.raises(InputError, match=r"stack of matrices .* which tsv is not for: .* from average, ta, ties,"):
        merge_alone(config, domain)
    assert not config.run.dir.exists()


def test_the_dry_run_says_what_was_found(tmp_path):
    write_models(tmp_path, "deepseek_v3")
    text = describe(config_of(tmp_path), domain).text
    assert "1 x model.layers.0.mlp, 3 tensors" in text
    assert "4 x model.layers.N.mlp.experts.N, 3 tensors" in text
    assert "1 x model.layers.1.mlp.shared_experts, 3 tensors" in text and "; D 16" in text


OLD_BUFFERS = {  # what files of earlier releases keep beside the weights
    "gpt_neo": {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gpt_bigcode": {"transformer.h.0.attn.bias": torch.ones(8, 8, dtype=torch.bool)},
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "gptj": {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9)},
    "xglm": {"model.embed_positions.weights": torch.ones(8, 16)},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}
GPT_NEO = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}
XGLM = {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24}


@pytest.mark.parametrize("kind", OLD_BUFFERS)
@pytest.mark.parametrize("where", ["base", PICO_TASKS[0]])
def test_buffers_that_one_side_alone_keeps_are_no_weights(kind, where, tmp_path):
    """A model saved by an earlier release has them, one saved today has not; what is merged is the same."""
    own = {"gpt_neo": GPT_NEO, "xglm": XGLM}.get(kind) or fields_of(kind)
    config = AutoConfig.for_model(**PICO | own | {"model_type": kind, "tie_word_embeddings": False})
    for name in ("base", *PICO_TASKS):
        save(opener_of(config).from_config(config, dtype=torch.float32), pico_tokenizer(), tmp_path / name)
    run = change(config_of(tmp_path), "start", method="average", hyper={})
    run = change(run, "anchors", part="layer") if kind == "xglm" else run
    plain = Checkpoint(merge_alone(run, domain)).read_under("")
    rewrite(tmp_path / where / "model.safetensors", lambda tensors: tensors.update(OLD_BUFFERS[kind]))
    merged = Checkpoint(merge_alone(change(run, "run", name="old"), domain)).read_under("")
    torch.testing.assert_close(merged, plain, rtol=0, atol=0)


def test_a_bias_that_an_architecture_has_is_no_mask(tmp_path):
    names = canonical_names(opener_of(config := AutoConfig.for_model(**fields_of("gpt2"))).from_config(config))
    assert names("transformer.h.0.attn.c_attn.bias") == names("h.0.attn.c_attn.bias")
    assert names("transformer.h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert names("transformer.h.0.attn.c_attn.masked_bias") is not None  # of a module that holds a weight itself
    assert names("transformer.h.0.attn.bias") is names("h.0.attn.masked_bias") is None
