"""`model.safetensors`: the weights in a layout, by default the one they came in."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json
from finetune_jax.core.pytrees import named
from finetune_jax.core.registry import closest
from finetune_jax.inference.export import libraries, text_encoders
from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.formats.safetensors_file import save_safetensors
from finetune_jax.weights.layout import OURS, Layout, layouts
from finetune_jax.weights.prefixes import without_prefix

# Torch's leaves of the last dense layer.
_HEAD = {"weight": "params/head/logits/kernel", "bias": "params/head/logits/bias"}


def write(trained: Trained, folder: pathlib.Path) -> str:
    """Writes `model.safetensors`, and the files that its library reads beside it.

    Returns:
        Markdown on loading the weights.

    Raises:
        UserError: The layout has no names for the model.
    """
    layout = chosen_layout(trained)
    leaves = {name: np.asarray(leaf) for name, leaf in named(trained.variables).items()}
    tensors = layout.tensors(leaves, _original(trained))
    metadata = {"format": "pt", "layout": layout.name}
    files, code = {}, []
    if layout is not OURS:
        files, code = libraries.files_and_code(trained, layout)
    if files and text_encoders.pools_by_mean(trained):
        # transformers has no head after mean pooling, and would load this one as another.
        names = layout.names(_HEAD.values())
        head = {leaf: tensors.pop(names[name]) for leaf, name in _HEAD.items()}
        more, dense = text_encoders.sentence_files(trained, head)
        files |= more
        (folder / text_encoders.DENSE).mkdir()
        save_safetensors(dense, folder / text_encoders.DENSE / "model.safetensors")
    save_safetensors(tensors, folder / "model.safetensors", metadata=metadata)
    text = f"`model.safetensors` has the weights in the layout {layout.name!r}"
    if layout is OURS:
        return f"{text}: `--config.init.pretrained=file:model.safetensors` of finetune_jax."
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)
    beside = f", with {' and '.join(f'`{name}`' for name in files)} beside it"
    blocks = [f"```python\n{block}\n```" for block in code]
    return "\n\n".join([f"{text}{beside if files else ''}.", *blocks])


def chosen_layout(trained: Trained) -> Layout:
    """Returns the requested layout, or by default the one that the weights came in.

    Raises:
        UserError: The layout has no names for the model.
    """
    names = list(named(trained.variables))
    fitting = [one for one in layouts() if set(names) == set(one.places(names))]
    asked = trained.layout
    if asked is None:
        if trained.came_in is None:
            return OURS
        for layout in fitting:
            if layout.name == trained.came_in:
                return _for_task(layout, trained)
        raise UserError(
            f"--formats=safetensors: the weights came in the layout {trained.came_in!r}, "
            "which has no names for some parts of this model, such as hidden layers of "
            "a head. --layout=finetune_jax writes them by our own names."
        )
    known = {}
    for layout in reversed(fitting):
        if layout is OURS or libraries.computes(trained, layout):
            known |= dict.fromkeys((layout.name, *layout.words), layout)
    if asked not in known:
        names = dict.fromkeys(one.name for one in known.values())
        raise UserError(
            f"--layout: the model {trained.model['name']!r} has no names in {asked!r}"
            f"{closest(asked, known)}; it has them in {', '.join(sorted(names))}"
        )
    return _for_task(known[asked], trained)


def _for_task(layout: Layout, trained: Trained) -> Layout:
    """Returns the layout whose head is named as its library names that of the task."""
    family = libraries.family_of(trained)
    if trained.task.head_kind != "spans" or not hasattr(family, "with_head"):
        return layout
    return family.with_head(layout, "spans")


def _original(trained: Trained) -> Mapping[str, np.ndarray] | None:
    """Returns the tensors of the initial weights, if their file has not changed.

    They include batch counters and others that no model here, and no checkpoint, has.
    """
    address = trained.pretrained
    if address is None or address.startswith(("hf:", "orbax:")) or trained.layout:
        return None
    try:
        entry = json.loads(trained.config)["init"]["entry"]
        weights = without_prefix(read_weights(address, entry), named(trained.variables))
    except UserError:
        return None
    return weights.tensors if weights.sha256 == trained.weights_sha256 else None
