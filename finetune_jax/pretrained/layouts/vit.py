"""Layouts of Vision Transformers: those of timm, torchvision and transformers."""

from finetune_jax.pretrained.layout import Layout, Row


def _split(attention: str, *, bias: str, weight: str) -> list[Row]:
    """Returns the rows of queries, keys and values that are one tensor of theirs."""
    return [
        (f"block{{b}}/attention/{ours}/{leaf}", f"{attention}{theirs}[{part}/3]")
        for part, ours in enumerate(("query", "key", "value"))
        for leaf, theirs in (("kernel", weight), ("bias", bias))
    ]


TIMM: list[Row] = [
    ("stem/class_token", "cls_token"),
    ("stem/position_embedding", "pos_embed"),
    ("stem/conv", "patch_embed.proj"),
    ("block{b}/ln{k}", "blocks.{b-1}.norm{k}"),
    *_split("blocks.{b-1}.attn.", weight="qkv.weight", bias="qkv.bias"),
    ("block{b}/attention/out", "blocks.{b-1}.attn.proj"),
    ("block{b}/dense{k}", "blocks.{b-1}.mlp.fc{k}"),
    ("norm/ln", "norm"),
    ("pooled_norm/ln", "fc_norm"),
    ("head/logits", "head"),
]
_THERE = "encoder.layers.encoder_layer_{b-1}"
TORCHVISION: list[Row] = [
    ("stem/class_token", "class_token"),
    ("stem/position_embedding", "encoder.pos_embedding"),
    ("stem/conv", "conv_proj"),
    ("block{b}/ln{k}", f"{_THERE}.ln_{{k}}"),
    *_split(f"{_THERE}.self_attention.", weight="in_proj_weight", bias="in_proj_bias"),
    ("block{b}/attention/out", f"{_THERE}.self_attention.out_proj"),
    ("block{b}/dense{k}", f"{_THERE}.mlp.{{3k-3}}"),
    ("norm/ln", "encoder.ln"),
    ("head/logits", "heads.head"),
]


def _transformers(prefix: str, block: str, inside: dict[str, str]) -> list[Row]:
    """Returns the rows of a Hugging Face model.

    Args:
        prefix: Before all names but those of the head.
        block: Their name of a block.
        inside: Their names of the parts of a block.
    """
    return [
        ("stem/class_token", f"{prefix}embeddings.cls_token"),
        ("stem/position_embedding", f"{prefix}embeddings.position_embeddings"),
        ("stem/conv", f"{prefix}embeddings.patch_embeddings.projection"),
        ("block{b}/ln1", f"{prefix}{block}.layernorm_before"),
        ("block{b}/ln2", f"{prefix}{block}.layernorm_after"),
        *[(f"block{{b}}/{o}", f"{prefix}{block}.{t}") for o, t in inside.items()],
        ("norm/ln", f"{prefix}layernorm"),
        ("head/logits", "classifier"),
    ]


# As files have them, whatever the version that wrote them.
PUBLISHED = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "dense1": "intermediate.dense",
    "dense2": "output.dense",
}
# As the modules of version 5 have them, and so its `state_dict()`.
MODULES = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "dense{k}": "mlp.fc{k}",
}
# A dense layer behind the class token, which classifiers do not use; masked patches.
NEEDLESS = (r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token")

LAYOUTS = (
    Layout(name="timm ViT", rows=TIMM),
    Layout(name="torchvision ViT", rows=TORCHVISION),
    *(
        Layout(
            name=name,
            rows=_transformers(prefix, block, inside),
            needless=NEEDLESS,
        )
        for name, prefix, block, inside in (
            ("transformers ViT", "vit.", "encoder.layer.{b-1}", PUBLISHED),
            ("transformers ViT without a head", "", "encoder.layer.{b-1}", PUBLISHED),
            ("transformers ViT, module names", "vit.", "layers.{b-1}", MODULES),
            (
                "transformers ViT without a head, module names",
                "", "layers.{b-1}", MODULES,
            ),
        )
    ),
)  # fmt: skip
