"""Checkpoints whose numbers are not weights: codes of a quantised model, or the empty places that ZeRO-3 leaves.

A merge of codes means nothing, even where their scales lie beside them. Told from headers and config files:
    bitsandbytes            weight U8 or I8; weight.absmax, weight.quant_state.…, SCB
    GPTQ, AWQ               qweight, qzeros I32; scales, g_idx
    fp8 with scales         weight F8; weight_scale, weight_scale_inv, scale_weight, input_scale
    compressed-tensors      weight_packed, weight_scale, weight_zero_point
    HQQ, AQLM, quanto, …    W_q; codes, codebooks; weight._data, weight._scale
    MXFP4, MLX              …_blocks, …_scales; weight U32, scales, biases
F8 tensors without scales are plain numbers, widened as they are read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from common.core.errors import InputError

INTEGER = re.compile(r"[IU]\d+")
PACKED = re.compile(r"F4$|F6_|F8_E8M0|[IU]4$")  # several numbers in a byte, or exponents alone
FLOAT8 = re.compile(r"F8_")
WEIGHT = re.compile(r"(weight|qweight|weight_packed|W_q|codes|_blocks|weight[._]_?q?data)$")
SCALES = re.compile(r"(weight_scale(_inv|_2|s)?|scale_weight|input_scale|scale_input|weight\._scale)$")
OF_MODULE = re.compile(r"(^|\.)scales?(_inv)?$")  # a.scale of a.weight
OF_TENSOR = re.compile(r"_scales?(_inv)?$")  # a.up_proj_scale of a.up_proj
SIGNS = {
    "bitsandbytes": r"(SCB|weight_format|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+)$",
    "GPTQ or AWQ": r"(qweight|qzeros)$",
    "compressed-tensors": r"(weight_packed|weight_zero_point|weight_global_scale)$",
    "HQQ": r"\bW_q$",
    "AQLM": r"\bcodebooks$",
    "VPTQ": r"\bcentroids\.weight$",
    "quanto": r"weight\._(data|scale)$",
    "torchao": r"weight[._:]_weight_(qdata|scale)$|_weight_qdata$",
    "MXFP4": r"_blocks$",
    "MLX": r"\bbiases$",
    "fp8": r"weight_scale_inv$",
}
CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_map.json")
FROM = "AutoModelForCausalLM.from_pretrained(FOLDER"
DEQUANTISE = {
    "bitsandbytes": f"{FROM}).dequantize()",
    "fp8": f"{FROM}, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": f"{FROM}, quantization_config=Mxfp4Config(dequantize=True))",
    "compressed-tensors": f"{FROM}, quantization_config=CompressedTensorsConfig(dequantize=True))",
}


class Header(Protocol):
    """What a header says of a tensor: its type as safetensors calls it, and its shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def require_weights(where: Path, tensors: Mapping[str, Header], config: Mapping[str, Any], beside: str = "") -> None:
    """InputError if a checkpoint holds codes or empty places instead of weights; it names the kind and the next step.

    Args:
        where: The checkpoint, for the sentence.
        tensors: What its headers say, by stored name.
        config: The fields of the config.json beside it, if there is one.
        beside: Name of a file beside it that only a quantiser writes, if there is one.
    """
    require_gathered(where, tensors)
    code, method = first_code(tensors), method_of(config)
    if code:
        kind = method or sign_of(tensors) or beside
        raise InputError(
            f"{where} is quantised{f' ({kind})' if kind else ''}: {code} holds codes of type {tensors[code].dtype} "
            f"in place of weights; {next_step(method)}"
        )
    if method:
        types = ", ".join(sorted({t.dtype for t in tensors.values()}))
        raise InputError(
            f"the config.json of {where} calls it quantised ({method}), but its weights are stored as {types}, "
            "without codes; remove that entry if they are meant as they are stored"
        )


def require_gathered(where: Path, tensors: Mapping[str, Header]) -> None:
    """InputError if weights are empty: DeepSpeed's ZeRO-3 keeps them elsewhere and leaves places of shape [0], and one
    alone may have been lost in another way."""
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape and re.search(r"(weight|bias)$", name)]
    if empty:
        raise InputError(
            f"{where} holds no weights in {len(empty)} of {len(tensors)} tensors, {min(empty)} among them, of shape "
            f"{list(tensors[min(empty)].shape)}: they were not there when it was saved, as under DeepSpeed ZeRO-3, "
            "which does not gather them; save it again, there with stage3_gather_16bit_weights_on_model_save, or "
            "make it of the ZeRO checkpoint by zero_to_fp32.py"
        )


def first_code(tensors: Mapping[str, Header]) -> str | None:
    """The first tensor, by name, that holds codes: integers or packed numbers for weights, or F8 beside its scales."""
    scaled = {scaled_by(name) for name in tensors}
    return next((name for name in sorted(tensors) if is_code(name, tensors[name].dtype, name in scaled)), None)


def is_code(name: str, dtype: str, scaled: bool) -> bool:
    """Whether a tensor holds codes; `scaled` says that scales for it lie beside it."""
    if FLOAT8.match(dtype) and not PACKED.match(dtype):
        return scaled
    return bool(PACKED.match(dtype)) or bool(INTEGER.fullmatch(dtype) and WEIGHT.search(name))


def scaled_by(name: str) -> str:
    """The tensor that scales of this name belong to: a.weight for a.weight_scale_inv; "" if these are no scales."""
    module, dot, _ = name.rpartition(".")
    if SCALES.search(name) or OF_MODULE.search(name):
        return f"{module}{dot}weight"
    return OF_TENSOR.sub("", name) if OF_TENSOR.search(name) else ""


def method_of(config: Mapping[str, Any]) -> str:
    """The method by which a config.json says that a model is quantised, "" if it says nothing of the kind."""
    for part in (config, config.get("text_config")):
        for field in CONFIG_FIELDS:
            found = part.get(field) if isinstance(part, Mapping) else None
            if isinstance(found, Mapping) and found:
                known = found.get("quant_method") or ("mlx" if field == "quantization" else "")
                return str(known or ("bitsandbytes" if "load_in_4bit" in found else field))
    return ""


def sign_of(tensors: Mapping[str, Header]) -> str:
    """The method whose names for scales and codes the tensors bear; "" if none that is known."""
    return next((kind for kind, sign in SIGNS.items() if any(re.search(sign, name) for name in tensors)), "")


def next_step(method: str) -> str:
    """How weights can be had instead; only a method that config.json names is one that stock libraries undo."""
    if method == "mlx":
        return "`mlx_lm.convert --hf-path FOLDER --mlx-path OTHER --dequantize` makes weights of it"
    made = DEQUANTISE.get(method)
    either = f"make weights of it with transformers, {made}.save_pretrained(OTHER), or " if made else ""
    return f"{either}merge the model that it was quantised from"


def quantiser_files(folder: Path) -> Iterator[str]:
    """Names of files in a folder that only a quantiser writes."""
    yield from (name for name in CONFIG_FILES if (folder / name).is_file())
