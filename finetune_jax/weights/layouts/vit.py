"""Vision Transformers of timm, torchvision and transformers."""

import re
from typing import Any

from finetune_jax.models import vit
from finetune_jax.weights.fields import ACTIVATIONS, Fields
from finetune_jax.weights.layout import Built, Layout, Row


def _split(attention: str, *, bias: str, weight: str) -> list[Row]:
    """Returns the rows of queries, keys and values that share one tensor."""
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
    """Returns the rows of a model of transformers.

    Args:
        prefix: Prefix of all names but those of the head.
        block: Name of a block in transformers.
        inside: Names of the modules of a block, by ours.
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


# Names in files of all versions of transformers.
PUBLISHED = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "dense1": "intermediate.dense",
    "dense2": "output.dense",
}
# Names of the modules of version 5, and in its `state_dict()`.
MODULES = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "dense{k}": "mlp.fc{k}",
}
# A dense layer after the class token, which classifiers do not use; masked patches.
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

TRANSFORMERS = {"vit": "ViT"}
_TIMM_NAME = re.compile(
    r"(?:vit|deit)_(tiny|small|base|large)_patch(\d+)(?:_\d+)?(?:_in21k)?"
)
# Supported values of timm's arguments.
_TIMM_ARGUMENTS = {
    "mlp_ratio": (4,), "qkv_bias": (True,), "qk_norm": (False,), "proj_bias": (True,),
    "scale_attn_norm": (False,), "scale_mlp_norm": (False,), "init_values": (None,),
    "pos_embed": ("learn",), "no_embed_class": (False,), "reg_tokens": (0,),
    "pre_norm": (False,), "final_norm": (True,), "pool_include_prefix": (False,),
    "dynamic_img_pad": (False,), "norm_layer": ("layernorm",),
}  # fmt: skip


def read_transformers(fields: Fields, kind: str, name: str) -> None:
    """Reads `config.json` of transformers; see `weights.layouts`."""
    del kind
    fields.must("qkv_bias", True)
    fields.must("patch_size", _patch(name))
    fields.whole("heads", "num_attention_heads")
    fields.activation("hidden_activation", "hidden_act")
    fields.positive("epsilon", "layer_norm_eps")
    fields.take("pool", "token", "model_type", "transformers' vit")
    _not_square(fields, "image_size")


def read_timm(
    fields: Fields, arguments: Fields, architecture: str, name: str
) -> tuple[str, ...]:
    """Reads `config.json` of timm; see `weights.layouts`."""
    fits = _TIMM_NAME.fullmatch(architecture)
    _, size, patch = name.split("_")
    sized = arguments.get("embed_dim") is not None or (fits and fits[1] == size)
    cut = arguments.get("patch_size") is not None or (
        fits and f"patch{fits[2]}" == patch
    )
    if not fits or not sized or not cut:
        fields.refuse(
            "architecture", f"{name} follows {name}_224 of timm, of any size of images"
        )
        return tuple(arguments)
    arguments.must("patch_size", _patch(name))
    if arguments.get("num_heads") is not None:
        arguments.whole("heads", "num_heads")
    else:
        fields.take("heads", vit.SIZES[fits[1]][2], "architecture")
    if arguments.get("act_layer") is None:
        fields.take("hidden_activation", "gelu", "architecture")
    else:
        arguments.activation("hidden_activation", "act_layer")
    fields.take("epsilon", 1e-6, "architecture")
    _timm_pool(fields, arguments)
    _not_square(arguments, "img_size")
    read = ("num_heads", "act_layer", "class_token", "global_pool", "fc_norm")
    return (*read, *arguments.musts(_TIMM_ARGUMENTS))


def _timm_pool(fields: Fields, arguments: Fields) -> None:
    """Reads how timm pools, and whether there is a class token."""
    arguments.must("class_token", True, False)
    arguments.must("fc_norm", True, False)
    if arguments.get("class_token") is False:
        arguments.take("class_token", False, "class_token")
    place = arguments if arguments.get("global_pool") is not None else fields
    kind, normed = place.get("global_pool"), arguments.get("fc_norm")
    place.must("global_pool", "token", "avg", "")
    if kind == "avg":
        source = f"{place.said('global_pool')}, {arguments.said('fc_norm')}"
        pool = "mean" if normed is False else "mean_norm"
        place.take("pool", pool, "global_pool", source)
    elif kind in ("token", None):
        arguments.must("fc_norm", False)
        place.take("pool", "token", "global_pool")


def ambiguous(layout: str, name: str) -> tuple[tuple[str, ...], str]:
    """Returns the arguments that a layout leaves open, and the reason."""
    del name
    if layout not in {one.name for one in LAYOUTS}:
        return (), ""
    return ("heads", "hidden_activation", "epsilon"), (
        "no config.json says the heads, the activation and the epsilon of LayerNorms"
    )


def _patch(name: str) -> int:
    return int(name.rpartition("patch")[2])


def _not_square(fields: Fields, key: str) -> None:
    """Adds a note if the images are not square, which fixes their shape."""
    size = fields.get(key)
    if isinstance(size, list) and size and any(side != size[0] for side in size):
        fields.notes.append(
            f"{fields.where}: {fields.said(key)} is not square; the position embeddings "
            "fit images of this shape only"
        )


def _pool(built: Built) -> str:
    """Returns the argument `pool` of a model."""
    is_last = "pooled_norm" in built.module.stages
    return "mean_norm" if is_last else built.module["pool"].kind


def transformers_config(built: Built) -> dict[str, Any] | None:
    """Returns `config.json` of transformers without labels; see `weights.layouts`."""
    stem, block = built.module["stem"], built.module["block1"]
    if _pool(built) != "token":
        return None
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": stem.shape.width,
        "num_hidden_layers": stem.shape.depth,
        "num_attention_heads": stem.shape.heads,
        "intermediate_size": 4 * stem.shape.width,
        "hidden_act": ACTIVATIONS[block.activation][0],
        "layer_norm_eps": block.epsilon,
        "image_size": list(built.shape[:2]),
        "patch_size": stem.shape.patch,
        "num_channels": built.shape[-1],
        "qkv_bias": True,
    }


# Vision Transformers that timm has a name for; arguments turn one of them into others.
_TIMM_NAMES = (
    "vit_tiny_patch16", "vit_small_patch16", "vit_small_patch32", "vit_base_patch16",
    "vit_base_patch32", "vit_large_patch14", "vit_large_patch16", "vit_large_patch32",
)  # fmt: skip


def timm_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in timm and its arguments; see `weights.layouts`."""
    stem, block, kind = built.module["stem"], built.module["block1"], _pool(built)
    if block.epsilon != 1e-6:
        return None
    arguments = {
        "img_size": list(built.shape[:2]),
        "patch_size": stem.shape.patch,
        "embed_dim": stem.shape.width,
        "depth": stem.shape.depth,
        "num_heads": stem.shape.heads,
        "class_token": stem.class_token,
        "global_pool": "token" if kind == "token" else "avg",
    }
    if block.activation != "gelu":
        arguments["act_layer"] = block.activation
    if kind != "token":
        arguments["fc_norm"] = kind == "mean_norm"
    known = built.name if built.name in _TIMM_NAMES else "vit_base_patch16"
    return f"{known}_224", arguments


def torchvision_model(built: Built) -> tuple[str, dict[str, Any]] | None:
    """Returns the model in torchvision and its arguments; see `weights.layouts`."""
    heads = {width: heads for width, _, heads in vit.SIZES.values()}
    shape, block = built.module["stem"].shape, built.module["block1"]
    if (block.epsilon, block.activation, _pool(built)) != (1e-6, "gelu", "token"):
        return None
    if shape.heads != heads.get(shape.width):
        return None
    _, size, patch = built.name.split("_")
    found = f"vit_{size[0]}_{patch.removeprefix('patch')}"
    return found, {"image_size": built.shape[0]}
