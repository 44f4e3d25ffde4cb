"""Codes, empty places and numbers that are no weights are told from headers, before anything is read."""

import json
from inspect import signature

import pytest
import torch
from safetensors.torch import save_file
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from common.core.errors import InputError
from common.io import checkpoints, tensors
from common.io.checkpoints import Checkpoint
from common.io.quantised import is_code

F8 = torch.float8_e4m3fn
NORM = {"model.norm.weight": torch.ones(4)}
Q = "model.layers.0.self_attn.q_proj"


def tensor(dtype, *shape):
    return torch.ones(shape or (4, 4)).to(dtype)


def of(module, **tensors):
    """Tensors of a module; a double underscore in a name stands for a dot."""
    return {f"{module}.{name.replace('__', '.')}": t for name, t in tensors.items()}


MOE = "model.layers.0.mlp.experts"
KINDS = {
    "bitsandbytes, 8 bits": of(Q, weight=tensor(torch.int8), SCB=tensor(torch.float32, 4)),
    "bitsandbytes, 4 bits": of(
        Q, weight=tensor(torch.uint8, 8, 1), weight__absmax=tensor(torch.float32, 2),
        weight__quant_map=tensor(torch.float32, 16), weight__quant_state__bitsandbytes__nf4=tensor(torch.uint8, 9),
    ),
    "GPTQ or AWQ": of(
        Q, qweight=tensor(torch.int32, 1, 4), qzeros=tensor(torch.int32, 1, 1), scales=tensor(torch.float16, 1, 4),
        g_idx=tensor(torch.int32, 4),
    ),
    "fp8": of(Q, weight=tensor(F8), weight_scale_inv=tensor(torch.float32, 1, 1)),
    "fp8, one scale": of(Q, weight=tensor(F8), weight_scale=tensor(torch.float32, 1), input_scale=tensor(F8, 1)),
    "fp8, scale": of(Q, weight=tensor(torch.float8_e5m2), scale=tensor(torch.float32, 1)),
    "fp8, of fused experts": of(MOE, up_proj=tensor(F8, 2, 4, 4), up_proj_scale_inv=tensor(torch.float32, 2, 1, 1)),
    "compressed-tensors": of(Q, weight_packed=tensor(torch.int32, 4, 1), weight_scale=tensor(torch.bfloat16, 4, 1)),
    "HQQ": of(Q, W_q=tensor(torch.uint8), scale=tensor(torch.float16, 1), zero=tensor(torch.float16, 1)),
    "AQLM": of(Q, codes=tensor(torch.int16, 4, 1, 1), codebooks=tensor(torch.float16, 1, 2, 1, 8)),
    "quanto": {f"{Q}.weight._data": tensor(torch.int8), f"{Q}.weight._scale": tensor(torch.float16, 4, 1)},
    "MXFP4": of(MOE, up_proj_blocks=tensor(torch.uint8, 2, 4, 2), up_proj_scales=tensor(torch.uint8, 2, 4)),
    "MLX": of(Q, weight=tensor(torch.uint32, 4, 1), scales=tensor(torch.float16, 4, 1), biases=torch.ones(4, 1)),
    "exponents": of(Q, weight=tensor(torch.float8_e8m0fnu)),
}  # fmt: skip


@pytest.fixture
def unread(monkeypatch):
    """Fails where a tensor is read."""
    monkeypatch.setattr(checkpoints, "read_tensor", None)


def write(folder, tensors, **config):
    save_file(NORM | tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("below", ["", "model.safetensors"], ids=["folder", "file"])
def test_codes_are_refused_by_name_without_a_word_in_the_config(tmp_path, unread, kind, below):
    write(tmp_path, KINDS[kind])
    with pytest.raises(InputError) as error:
        Checkpoint(tmp_path / below)
    said, name = str(error.value), kind.split(",")[0]
    assert "is quantised" in said and "merge the model that it was quantised from" in said and "\n" not in said
    assert f"({name})" in said or name in ("exponents", "fp8")
    assert any(stored in said for stored in KINDS[kind]) and "NORM" not in said


METHODS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "from_pretrained(FOLDER).dequantize()"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "CompressedTensorsConfig(dequantize=True)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "; merge the model that it was quantised from"),
    "awq": ({"quant_method": "awq", "bits": 4}, "; merge the model that it was quantised from"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_config_s_method_leads_to_the_next_step(tmp_path, unread, method):
    settings, step = METHODS[method]
    write(tmp_path, KINDS["bitsandbytes, 8 bits"], quantization_config=settings)
    with pytest.raises(InputError) as error:
        Checkpoint(tmp_path)
    assert f"is quantised ({method}): {Q}.weight holds codes of type I8" in str(error.value) and step in str(
        error.value
    )


def test_the_calls_in_the_next_steps_exist():
    for config in (FineGrainedFP8Config, Mxfp4Config, CompressedTensorsConfig):
        assert "dequantize" in signature(config).parameters
    assert callable(PreTrainedModel.dequantize)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_a_config_that_says_quantised_of_plain_weights_is_refused(tmp_path, unread, config, method):
    write(tmp_path, of(Q, weight=tensor(torch.bfloat16)), **config)
    with pytest.raises(
        InputError, match=rf"quantised \({method}\), but .* stored as BF16, F32, without codes; remove that entry"
    ):
        Checkpoint(tmp_path)


def test_mlx_is_undone_by_its_own_tool(tmp_path):
    write(tmp_path, KINDS["MLX"], quantization={"bits": 4})
    with pytest.raises(InputError, match="mlx_lm.convert --hf-path FOLDER --mlx-path OTHER --dequantize"):
        Checkpoint(tmp_path)


def test_a_config_beside_a_file_of_another_name_says_nothing_of_it(tmp_path):
    write(tmp_path, KINDS["fp8"], quantization_config={"quant_method": "fp8"})
    save_file(NORM, tmp_path / "expert.safetensors")
    assert Checkpoint(tmp_path / "expert.safetensors").shapes == {"model.norm.weight": (4,)}


# ---- what is no code -------------------------------------------------------------------------------------------------

BUFFERS = {
    "embeddings.position_ids": torch.arange(8)[None],
    "bn.num_batches_tracked": torch.tensor(3),
    "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
    "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
    "mask": torch.ones(2, dtype=torch.bool),
    "logit_scale": torch.tensor(4.6),
    "ls.scale": torch.ones(4),
    "empty_buffer": torch.empty(0),
}


def test_buffers_are_no_codes(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, BUFFERS | of(Q, weight=tensor(torch.float16))))
    found = {name: (row.dtype, row.nbytes) for name, row in checkpoint.rows.items()}
    assert found["logit_scale"] == ("F32", 4) and found[f"{Q}.weight"] == ("F16", 32)
    assert found["embeddings.position_ids"] == ("I64", 64) and len(found) == len(BUFFERS) + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_floating_type_are_weights(tmp_path, dtype):
    checkpoint = Checkpoint(write(tmp_path, of(Q, weight=torch.full((4, 4), 0.5, dtype=dtype))))
    read = checkpoint.read([f"{Q}.weight"])[f"{Q}.weight"]
    assert torch.equal(read.float(), torch.full((4, 4), 0.5))


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(each, False) for each in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")]
    + [(each, True) for each in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "I4", "U4", "I8", "U32", "I64")],
)
def test_every_type_of_the_format_is_a_weight_or_a_code(dtype, code):
    assert is_code(f"{Q}.weight", dtype, scaled=False) == code


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
@pytest.mark.parametrize("piece", [8 * 2**20, 3])
def test_plain_fp8_weights_are_widened(tmp_path, monkeypatch, dtype, piece):
    """All numbers that the type has but NaN and Inf, by torch's own table; also beside a scale of something else."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()][:240].reshape(12, 20)
    write(tmp_path, of(Q, weight=numbers.to(dtype)) | {"logit_scale": torch.tensor(1.0).to(dtype)})
    monkeypatch.setattr(tensors, "PIECE", piece)
    checkpoint = Checkpoint(tmp_path)
    read = checkpoint.read([f"{Q}.weight"])[f"{Q}.weight"]
    assert read.dtype == torch.float32 and torch.equal(read, numbers)
    assert checkpoint.read(["logit_scale"])["logit_scale"] == 1
    assert checkpoint.rows[f"{Q}.weight"].nbytes == 240


def test_complex_numbers_are_refused_when_read(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, {"freqs_cis": torch.ones(2, dtype=torch.complex64)}))
    with pytest.raises(InputError, match="freqs_cis holds complex numbers"):
        checkpoint.read(["freqs_cis"])


# ---- ZeRO-3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", f"{Q}.bias", "visual.transformer.resblocks.0.attn.in_proj_weight"]
)
@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_empty_places_for_weights_are_zero_3_s(tmp_path, unread, name, shape):
    write(tmp_path, {name: torch.empty(shape)})
    with pytest.raises(InputError) as error:
        Checkpoint(tmp_path)
    said = str(error.value)
    assert f"holds no weights in 1 of 2 tensors, {name} among them, of shape {list(shape)}" in said
    assert all(word in said for word in ("ZeRO-3", "stage3_gather_16bit_weights_on_model_save", "zero_to_fp32.py"))
