"""What transformers and sentence-transformers read beside the weights of an encoder."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.weights.fields import ACTIVATIONS
from finetune_jax.weights.metadata.tokenizer import CONFIG, FILE

# Their heads by how ours pools, and the activations before them.
_KINDS = {"cls": "ForSequenceClassification", "none": "ForTokenClassification"}
_QUESTIONS = "ForQuestionAnswering"
_ACTIVATIONS = {"Bert": "tanh", "DistilBert": "relu"}
_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_SENTENCE = "sentence_transformers.models"
# Of the folder that has the head of a model that pools by mean.
DENSE = "2_Dense"


def is_encoder(trained: Trained) -> bool:
    """Returns whether a model is one of those that this module knows."""
    return type(trained.task.models[""]).__name__ == "Bert"


def pools_by_mean(trained: Trained) -> bool:
    """Returns whether the head takes the mean of a text, as none of transformers' does."""
    module: Any = trained.task.models[""]
    return is_encoder(trained) and module.pooling == "mean"


def architecture(trained: Trained, layout: str) -> str | None:
    """Returns the class of transformers that computes the same, None where there is none.

    Args:
        trained: What is exported.
        layout: The name of the layout of its weights.
    """
    module: Any = trained.task.models[""]
    name = "DistilBert" if "DistilBERT" in layout else "Bert"
    if (module.types == 0) != (name == "DistilBert"):
        return None
    if name == "DistilBert" and dict(module.block_arguments)["epsilon"] != 1e-12:
        return None  # DistilBERT has no field for it.
    if module.pooling == "mean":
        return f"{name}Model"
    if module.pooling == "cls" and module.activation != _ACTIVATIONS[name]:
        return None
    asks = layout.endswith("questions")
    return name + (_QUESTIONS if asks else _KINDS[module.pooling])


def model_config(trained: Trained, architecture: str) -> dict[str, Any]:
    """Returns `config.json` without labels."""
    module: Any = trained.task.models[""]
    sizes, block = dict(module.embeddings_arguments), dict(module.block_arguments)
    shared = {
        "architectures": [architecture],
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": sizes["places"],
        "pad_token_id": 0,
    }
    dropout = dict(module.head_arguments).get("dropout", 0.0)
    if architecture.startswith("Distil"):
        return {
            **shared,
            "model_type": "distilbert",
            "dim": sizes["width"],
            "n_layers": module.layers,
            "n_heads": block["heads"],
            "hidden_dim": block["hidden"],
            "activation": ACTIVATIONS[block["activation"]][0],
            "dropout": block["dropout"],
            "attention_dropout": block["attention_dropout"],
            "seq_classif_dropout": dropout,
            "sinusoidal_pos_embds": False,
        }
    return {
        **shared,
        "model_type": "bert",
        "hidden_size": sizes["width"],
        "num_hidden_layers": module.layers,
        "num_attention_heads": block["heads"],
        "intermediate_size": block["hidden"],
        "hidden_act": ACTIVATIONS[block["activation"]][0],
        "hidden_dropout_prob": block["dropout"],
        "attention_probs_dropout_prob": block["attention_dropout"],
        "classifier_dropout": dropout,
        "type_vocab_size": sizes["types"],
        "layer_norm_eps": block["epsilon"],
    }


def sentence_files(
    trained: Trained, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what makes the folder one of sentence-transformers, and the head in it.

    Args:
        trained: A model that pools by mean.
        tensors: `weight` and `bias` of its head.

    Returns:
        Files of JSON by name, and the tensors of the last of its modules.
    """
    assert trained.spec.text is not None
    classes, width = tensors["weight"].shape
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", DENSE))
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"{_SENTENCE}.{kind}"}
        for at, (kind, path) in enumerate(kinds)
    ]
    length = trained.spec.text.options.max_tokens
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
    """Returns the files of the tokenizer as the run has kept them, by name.

    What is longer than `config.data.max_tokens` is cut there as in the run; where the
    source had no `tokenizer_config.json`, transformers reads `tokenizer.json` as it is.
    """
    kept, text = dict(trained.tokenizer), trained.spec.text
    if FILE not in kept or text is None:
        return {}
    config: dict[str, Any] = json.loads(kept.get(CONFIG, "{}"))
    if not config:
        vocabulary = json.loads(kept[FILE]).get("model", {}).get("vocab", {})
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if isinstance(vocabulary, dict):
            special = {
                key: name for key, name in _SPECIAL.items() if name in vocabulary
            }
            config |= special
        module: Any = trained.task.models[""]
        types = ["token_type_ids"] if getattr(module, "types", 0) else []
        config["model_input_names"] = ["input_ids", *types, "attention_mask"]
    config["model_max_length"] = text.options.max_tokens
    return {**kept, CONFIG: json.dumps(config, indent=2) + "\n"}
