"""Click-through rates from Criteo's display-advertising table, by one of four models.

Question:  What does a model of tables reach, and how near is that to what can be known?
Command:   .venv/bin/python -m finetune_jax.main --config=configs/criteo.py \
               --config.data.dir=FILE
           FILE is of the format of the challenge, such as its train.txt, or
           what scripts/generate_clicks.py writes, which says the best AUC.
Expected:  2 million generated rows, dcn_v2: test AUC 0.8666, 0.0035 short of the true
           probabilities' 0.8701; one seed. It takes 5 minutes on two busy cores.
Argument:  dcn_v2 (default), dlrm, table_mlp, ft_transformer; `tiny` makes two updates:
           `:dlrm,tiny`.
"""

import ml_collections

from finetune_jax import config as configs
from finetune_jax.plans import as_config, full

# A product of two columns with ten values each is not within embeddings of 8; matrices
# of a low rank hold what few products there are at a quarter of the work. Chosen by us
# on validation rows of generated clicks.
MODELS = {
    "dcn_v2": {"width": 16, "layers": 2, "rank": 32},
    "dlrm": {"width": 8},
    "table_mlp": {"width": 8},
    "ft_transformer": {"width": 32},
}


def get_config(arg: str = "dcn_v2") -> ml_collections.ConfigDict:
    """Returns the config of a model."""
    words = arg.split(",")
    name = next((word for word in words if word in MODELS), "dcn_v2")
    config = configs.default()
    config.task.name = "tabular"
    config.task.metrics = (
        "loss", "roc_auc", "normalised_entropy", "accuracy", "f1_binary",
    )  # fmt: skip
    config.data.update(
        name="criteo",
        train="train",
        validation="validation",
        test="test",
        batch_size=1024,
        log_columns=(r"I\d+",),
        min_count=8,  # Rarer values share a row.
    )
    config.model.name = name
    config.model.update(MODELS[name])
    config.plan = as_config(full(epochs=1, optimizer="adam", peak_lr=2e-3))
    config.evaluate.every_epochs = 0.5
    config.evaluate.batch_size = 8192
    config.evaluate.best = "validation/loss"
    return configs.tiny(config) if "tiny" in words else config
