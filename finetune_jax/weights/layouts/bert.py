"""BERT encoders of transformers and of sentence-transformers."""

import dataclasses
from typing import Any

from finetune_jax.models.layers.stages import MaskedMean
from finetune_jax.weights.fields import ACTIVATIONS, Fields
from finetune_jax.weights.layout import Built, Layout, Row


def _bert(name: str, prefix: str, head: str) -> Layout:
    """Returns the layout of a BERT whose encoder's names begin with a prefix."""
    layer = f"{prefix}encoder.layer.{{b-1}}."
    return Layout(
        name=name,
        rows=(
            ("embeddings/words", f"{prefix}embeddings.word_embeddings"),
            ("embeddings/positions", f"{prefix}embeddings.position_embeddings"),
            ("embeddings/sentences", f"{prefix}embeddings.token_type_embeddings"),
            ("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
            ("block{b}/attention/query", f"{layer}attention.self.query"),
            ("block{b}/attention/key", f"{layer}attention.self.key"),
            ("block{b}/attention/value", f"{layer}attention.self.value"),
            ("block{b}/attention/output", f"{layer}attention.output.dense"),
            ("block{b}/attention_norm", f"{layer}attention.output.LayerNorm"),
            ("block{b}/dense1", f"{layer}intermediate.dense"),
            ("block{b}/dense2", f"{layer}output.dense"),
            ("block{b}/dense_norm", f"{layer}output.LayerNorm"),
            ("pool/dense", f"{prefix}pooler.dense"),
            ("head/logits", head),
        ),
        # Heads of pretraining, and the pooler, which mean pooling and token tasks lack.
        needless=(
            r"cls\..*",
            rf"{prefix}pooler\..*",
            rf"{prefix}embeddings.position_ids",
        ),
    )


def _distilbert(name: str, prefix: str, head: str) -> Layout:
    layer = f"{prefix}transformer.layer.{{b-1}}."
    return Layout(
        name=name,
        rows=(
            ("embeddings/words", f"{prefix}embeddings.word_embeddings"),
            ("embeddings/positions", f"{prefix}embeddings.position_embeddings"),
            ("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
            ("block{b}/attention/query", f"{layer}attention.q_lin"),
            ("block{b}/attention/key", f"{layer}attention.k_lin"),
            ("block{b}/attention/value", f"{layer}attention.v_lin"),
            ("block{b}/attention/output", f"{layer}attention.out_lin"),
            ("block{b}/attention_norm", f"{layer}sa_layer_norm"),
            ("block{b}/dense1", f"{layer}ffn.lin1"),
            ("block{b}/dense2", f"{layer}ffn.lin2"),
            ("block{b}/dense_norm", f"{layer}output_layer_norm"),
            ("pool/dense", "pre_classifier"),
            ("head/logits", head),
        ),
        needless=(
            r"vocab_(transform|layer_norm|projector)\..*",
            r"pre_classifier\..*",
            rf"{prefix}embeddings.position_ids",
        ),
    )


def _older(name: str, layout: Layout) -> Layout:
    """Returns a layout with gamma and beta of LayerNorms, as in the first BERT files."""
    rows: list[Row] = []
    for row in layout.rows:
        ours, theirs = row[:2]
        if theirs.endswith("LayerNorm"):
            rows.append((f"{ours}/scale", f"{theirs}.gamma"))
            rows.append((f"{ours}/bias", f"{theirs}.beta"))
        else:
            rows.append(row)
    return dataclasses.replace(layout, name=name, rows=tuple(rows))


_PLAIN = _bert("transformers' BERT", "", "classifier")
_HEADED = _bert("transformers' BERT with a head", "bert.", "classifier")
_QUESTIONS = _bert("transformers' BERT for questions", "bert.", "qa_outputs")
_DISTIL_QUESTIONS = _distilbert(
    "transformers' DistilBERT for questions", "distilbert.", "qa_outputs"
)
LAYOUTS = (
    _HEADED,
    _PLAIN,
    _QUESTIONS,
    _older("transformers' BERT, older names", _PLAIN),
    _older("transformers' BERT with a head, older names", _HEADED),
    _bert("sentence-transformers", "0.auto_model.", "classifier"),
    _distilbert("transformers' DistilBERT with a head", "distilbert.", "classifier"),
    _distilbert("transformers' DistilBERT", "", "classifier"),
    _DISTIL_QUESTIONS,
)

TRANSFORMERS = {"bert": "Bert", "distilbert": "DistilBert"}
# Pooling before the heads of transformers' classes, by the ends of their names.
_POOLS = {
    "ForSequenceClassification": "cls",
    "ForTokenClassification": "none",
    "ForQuestionAnswering": "none",
}


def read_transformers(fields: Fields, kind: str, name: str) -> None:
    """Reads `config.json` of transformers; see `weights.layouts`."""
    del name
    fields.must("position_embedding_type", "absolute")
    fields.must("embedding_size", fields.get("hidden_size"))
    classes = fields.get("architectures")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    for end, pool in _POOLS.items():
        if first.endswith(end):
            fields.take("pool", pool, "architectures")
    source = f"transformers' {kind}"
    if kind == "bert":
        fields.whole("heads", "num_attention_heads")
        fields.activation("hidden_activation", "hidden_act")
        fields.positive("epsilon", "layer_norm_eps")
        fields.take("activation", "tanh", "model_type", source)
        return
    own = fields.get("n_heads") is not None
    fields.whole("heads", "n_heads" if own else "num_attention_heads")
    fields.activation("hidden_activation", "activation")
    fields.take("epsilon", 1e-12, "model_type", source)
    fields.take("activation", "relu", "model_type", source)


def ambiguous(layout: str, name: str) -> tuple[tuple[str, ...], str]:
    """Returns the arguments that a layout leaves open, and the reason."""
    del name
    if layout not in {one.name for one in LAYOUTS}:
        return (), ""
    return ("heads", "hidden_activation", "epsilon"), (
        "no config.json says the heads, the activation and the epsilon of LayerNorms"
    )


# Activations before the heads of transformers' classes.
_ACTIVATIONS = {"Bert": "tanh", "DistilBert": "relu"}


def with_head(layout: Layout, head_kind: str) -> Layout:
    """Returns the layout whose head is named as transformers names that of a task.

    Args:
        layout: A layout of this family.
        head_kind: 'spans' for the head of question answering; others keep the layout.
    """
    if head_kind != "spans" or not layout.name.startswith("transformers"):
        return layout
    return _DISTIL_QUESTIONS if "DistilBERT" in layout.name else _QUESTIONS


def transformers_config(built: Built) -> dict[str, Any] | None:
    """Returns `config.json` of transformers without labels; see `weights.layouts`."""
    kind = _transformers_class(built)
    if kind is None:
        return None
    sizes, block = built.module["embeddings"], built.module["block1"]
    layers = sum(stage.startswith("block") for stage in built.module.stages)
    shared = {
        "architectures": [kind],
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.places,
        "pad_token_id": 0,
    }
    head = built.module["head"]
    dropout = getattr(head, "inner", head).dropout
    if kind.startswith("Distil"):
        return {
            **shared,
            "model_type": "distilbert",
            "dim": sizes.width,
            "n_layers": layers,
            "n_heads": block.heads,
            "hidden_dim": block.hidden,
            "activation": ACTIVATIONS[block.activation][0],
            "dropout": block.dropout,
            "attention_dropout": block.attention_dropout,
            "seq_classif_dropout": dropout,
            "sinusoidal_pos_embds": False,
        }
    return {
        **shared,
        "model_type": "bert",
        "hidden_size": sizes.width,
        "num_hidden_layers": layers,
        "num_attention_heads": block.heads,
        "intermediate_size": block.hidden,
        "hidden_act": ACTIVATIONS[block.activation][0],
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": block.attention_dropout,
        "classifier_dropout": dropout,
        "type_vocab_size": sizes.types,
        "layer_norm_eps": block.epsilon,
    }


def _transformers_class(built: Built) -> str | None:
    """Returns the equal class of transformers; None if it has none."""
    module = built.module
    name = "DistilBert" if "DistilBERT" in built.layout.name else "Bert"
    if (module["embeddings"].types == 0) != (name == "DistilBert"):
        return None
    if name == "DistilBert" and module["block1"].epsilon != 1e-12:
        return None  # DistilBERT has no field for it.
    pool = module["pool"] if "pool" in module.stages else None
    if isinstance(pool, MaskedMean):
        return f"{name}Model"
    if pool is not None and pool.activation != _ACTIVATIONS[name]:
        return None
    if built.layout in (_QUESTIONS, _DISTIL_QUESTIONS):
        return f"{name}ForQuestionAnswering"
    return f"{name}For{'Token' if pool is None else 'Sequence'}Classification"
