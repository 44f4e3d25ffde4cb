"""The files beside a model's weights that say how text and images become its input, and how it answers.

Names are those that transformers 4 and 5, sentencepiece, tiktoken and mistral-common write. Python files that a
tokenizer may bring along are never copied.
"""

from collections.abc import Iterable
from pathlib import Path

# Each of these alone can hold a vocabulary.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "vocab.json", "vocab.txt", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "tekken.json", "*.tiktoken",
)  # fmt: skip
# How an image is prepared, or another thing that a processor has besides text.
PROCESSOR_FILES = (
    "preprocessor_config.json", "image_preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
# All of a tokenizer, its chat templates and what else a processor is made of.
TOKENIZER_FILES = (
    *VOCABULARIES, "vocab.*", "merges.txt", "bpe.codes", "dict.txt", "added_tokens.json", "special_tokens_map.json",
    "tokenizer_config.json", "normalizer.json", "chat_template.*", "additional_chat_templates/*.jinja",
    *PROCESSOR_FILES, "audio_tokenizer_config.json",
)  # fmt: skip

# What sentence-transformers has around an encoder: its modules and their folders, prompts, lengths.
MODULES_FILE = "modules.json"
SENTENCE_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
IN_MODULE = ("*.json", "*.txt", "*.safetensors")  # what is read of the folder of a module
MODULE_FILES = tuple(f"[0-9]*_*/{name}" for name in IN_MODULE)
SENTENCE_FILES = (MODULES_FILE, *SENTENCE_SETTINGS, *MODULE_FILES)


def matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files in a folder that one of the patterns describes, in order."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(folder)) for file in found)


def contents(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """{name: content} of the files in a folder that one of the patterns describes."""
    return {name: (folder / name).read_bytes() for name in matching(folder, patterns)}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return bool(matching(folder, VOCABULARIES))
