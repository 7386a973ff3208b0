"""Pretrained families: one a file, named like the module in `models`.

A file has `LAYOUTS`, the tables between our names and those of published weights, and
functions between our arguments and the files that libraries keep beside weights. All but
`LAYOUTS` may be missing.

Reading:
    TRANSFORMERS: The `model_type`s of transformers that the family follows, each with the
        beginning of the names of its classes.
    read_transformers(fields, kind, name): Reads the fields of transformers' `config.json`;
        `kind` is a key of `TRANSFORMERS`, `name` our model.
    read_timm(fields, arguments, architecture, name): Reads the fields of timm's
        `config.json` and those of `model_args`; returns the names of the latter that it
        follows. `architecture` has no tag.
    ambiguous(layout, name): Returns the arguments that a layout leaves open, and why.

Writing, for a `weights.layout.Built` model; None says that the library cannot compute it:
    transformers_config(built): Returns `config.json` without labels.
    timm_model(built): Returns the model's name in timm, and its arguments there.
    torchvision_model(built): Likewise for torchvision.
    with_head(layout, head_kind): Returns the layout with the names of a task's head.

As in `models`, a folder `finetune_jax/weights/layouts/` elsewhere on `sys.path` adds to
them.
"""

from finetune_jax.core import registry

__path__ = registry.open_path(__name__, __path__)
