"""Files of sentence-transformers, and of tokenizers, beside exported weights."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.models.layers.stages import MaskedMean
from finetune_jax.tasks.components.text_inputs import embeddings_of
from finetune_jax.weights.metadata.tokenizer import CONFIG, FILE

_SPECIAL = ("unk", "sep", "pad", "cls", "mask")
_SENTENCE = "sentence_transformers.models"
# Folder of the head after mean pooling.
DENSE = "2_Dense"


def pools_by_mean(trained: Trained) -> bool:
    """Returns whether the model pools texts by mean, as no head of transformers does."""
    module: Any = trained.task.models[""]
    pools = any(isinstance(part, MaskedMean) for part in getattr(module, "parts", ()))
    return bool(trained.tokenizer) and pools


def sentence_files(
    trained: Trained, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the files of a model of sentence-transformers, and the tensors of its head.

    Args:
        trained: Model that pools by mean.
        tensors: `weight` and `bias` of the head.

    Returns:
        JSON files by name, and the tensors of the last module.
    """
    classes, width = tensors["weight"].shape
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", DENSE))
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"{_SENTENCE}.{kind}"}
        for at, (kind, path) in enumerate(kinds)
    ]
    length = trained.spec.inputs.options.max_tokens
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        f"{DENSE}/config.json": {
            "in_features": width,
            "out_features": classes,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }
    return files, {f"linear.{name}": tensor for name, tensor in tensors.items()}


def tokenizer_files(trained: Trained) -> dict[str, str]:
    """Returns the files of the run's tokenizer, by name.

    It truncates texts to `config.data.max_tokens`, as the run does. Without a
    `tokenizer_config.json` in its source, transformers reads `tokenizer.json` alone.
    """
    kept = dict(trained.tokenizer)
    if FILE not in kept:
        return {}
    config: dict[str, Any] = json.loads(kept.get(CONFIG, "{}"))
    if not config:
        vocabulary = json.loads(kept[FILE]).get("model", {}).get("vocab", {})
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if isinstance(vocabulary, dict):
            special = {f"{name}_token": f"[{name.upper()}]" for name in _SPECIAL}
            config |= {key: name for key, name in special.items() if name in vocabulary}
        embeddings = embeddings_of(trained.task.models[""])
        types = ["token_type_ids"] if getattr(embeddings, "types", 0) else []
        config["model_input_names"] = ["input_ids", *types, "attention_mask"]
    config["model_max_length"] = trained.spec.inputs.options.max_tokens
    return {**kept, CONFIG: json.dumps(config, indent=2) + "\n"}
