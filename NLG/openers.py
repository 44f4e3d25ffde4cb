"""Which class of transformers opens a language model of a config."""

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto import modeling_auto as classes

from common.core.errors import InputError
from common.io.model_files import CONFIG_FILE

Opener = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def opener_of(config: PretrainedConfig, where: str = CONFIG_FILE) -> Opener:
    """What opens a model of this config: that of a language model, or of one that sees images besides.

    Raises: InputError, which begins with `where`, if the config is of an encoder with a decoder and the class for it is
        that of a language model: transformers has one for BART, Whisper and their kin, but it is the decoder alone.
    """
    seeing = classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = (config.architectures or [""])[0]
    causal = config.model_type in classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and named not in seeing.values()
    if not causal and config.model_type in seeing:
        return AutoModelForImageTextToText
    if config.is_encoder_decoder:
        in_words = config.model_type in classes.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        step = "domain nlu merges it" if in_words else "no domain merges such"
        raise InputError(f"{where}: a {config.model_type} has an encoder before its decoder: {step}")
    return AutoModelForCausalLM
