"""Small BERTs of transformers with random numbers."""

import numpy as np
import oracles

TINY = {
    "layers": 2, "width": 16, "heads": 4, "hidden": 24, "vocabulary": 31, "positions": 12,
}  # fmt: skip

CLASSES = 3


def oracle(kind, sizes, classes=CLASSES):
    """Returns a module with everything at random, in evaluation mode."""
    oracles.import_torchvision()  # Which transformers imports where it is there.
    transformers = oracles.import_transformers()
    import torch

    bert = {
        "layers": "num_hidden_layers", "width": "hidden_size",
        "heads": "num_attention_heads", "hidden": "intermediate_size",
        "vocabulary": "vocab_size", "positions": "max_position_embeddings",
    }  # fmt: skip
    distil = {
        **bert, "layers": "n_layers", "width": "dim", "heads": "n_heads",
        "hidden": "hidden_dim",
    }  # fmt: skip
    theirs = distil if kind.startswith("Distil") else bert
    make = (
        transformers.DistilBertConfig if theirs is distil else transformers.BertConfig
    )
    config = make(num_labels=classes, **{theirs[k]: v for k, v in sizes.items()})
    module = getattr(transformers, kind)(config)
    rng = torch.Generator().manual_seed(0)
    for name, leaf in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        spread = 0.8 * sizes["width"] ** -0.5  # Or attention would be all or nothing.
        leaf.data.normal_(1.0 if is_scale else 0.0, spread, generator=rng)
    return module.eval()


def tensors_of(module):
    return {name: leaf.numpy() for name, leaf in module.state_dict().items()}


def texts(vocabulary=TINY["vocabulary"], length=9, types=2):
    """Returns four texts, one of them as long as there is room."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < np.array([length, 5, 2, 7])[:, None]
    return {
        # Token 0 is torch's padding, which has no gradient there.
        "ids": rng.integers(1, vocabulary, mask.shape).astype(np.int32),
        "types": (rng.random(mask.shape) < 0.5 * bool(types - 1)).astype(np.int32),
        "mask": mask.astype(np.int32),
    }
