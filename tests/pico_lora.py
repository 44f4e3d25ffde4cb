"""LoRA adapters in the files of peft 0.21."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    """The two files of peft; keys of the tensors are without base_model.model. target_modules are those that have
    factors, by their whole names, where none are given."""
    adapted = sorted({key.partition(".lora_")[0] for key in tensors if ".lora_" in key})
    config = {
        "base_model_name_or_path": "nowhere/nothing", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.0,
        "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": adapted, "task_type": None, "trainable_token_indices": None,
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
