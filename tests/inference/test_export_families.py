"""Every family goes back to its library: tensors to the bit, and logits after training."""

import dataclasses
import functools

import bert_oracles
import jax
import numpy as np
import oracle_models
import oracles
import pytest
import small
import text_configs
import texts
from safetensors.numpy import save_file

from finetune_jax import config as configs
from finetune_jax.core.pytrees import digest, named
from finetune_jax.inference.export import weights
from finetune_jax.inference.export.exported_model import Trained, answer
from finetune_jax.models import convnext, efficientnet_lite, vit
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.layout import layouts, recognise
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.prefixes import without_prefix

pytestmark = pytest.mark.slow
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ONCE, NARROW = (1, 1, 1, 1), (8, 8, 16, 16)
SMALL_VIT = vit.Shape(16, 2, 2, 16)
# Models that are made smaller than their names say.
SMALLER = (
    (vit, "vit_tiny_patch16", functools.partial(vit._vit, SMALL_VIT, heads=2)),
    (
        convnext,
        "convnext_tiny",
        functools.partial(convnext._convnext, convnext.Shape(ONCE, NARROW)),
    ),
    (
        efficientnet_lite,
        "efficientnet_lite0",
        functools.partial(efficientnet_lite._efficientnet_lite, 1.0, 0.1),
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in a layout.

    Attributes:
        library: The oracle's.
        name: Of the model.
        arguments: Of our model.
        theirs: Arguments of the oracle.
        says: Whether the export says how the library makes the model, small as it is.
        layout: That is renamed to, where the library has no package here.
    """

    library: str
    name: str
    arguments: dict = dataclasses.field(default_factory=dict)
    theirs: dict = dataclasses.field(default_factory=dict)
    says: bool = False
    layout: str | None = None

    def __str__(self):
        said = [str(value) for value in self.arguments.values()]
        return "-".join([self.layout or self.library, self.name, *said])


VIT = {"depth": 2, "image_size": 32}
CONVNEXT = {"widths": NARROW, "depths": ONCE}
VGG = {"dense": 8, "dropout": 0.0}
EPSILON = {"epsilon": 1e-12}
VITS = "vit_tiny_patch16"
LITE = Row("timm", "efficientnet_lite0", theirs={"depth": 1})
ROWS = [
    Row("timm", VITS, theirs=VIT, says=True),
    Row(
        "timm", VITS, {"pool": "mean_norm"}, VIT | {"global_pool": "avg"}, says=True
    ),
    Row("torchvision", VITS, theirs=VIT),
    Row("transformers", VITS, EPSILON, VIT, says=True),
    Row(
        "timm", VITS, {"heads": 4, "hidden_activation": "quick_gelu"},
        VIT | {"num_heads": 4, "act_layer": "quick_gelu"}, says=True,
    ),
    Row(
        "transformers", VITS, {"heads": 1, "hidden_activation": "relu", "epsilon": 1e-3},
        VIT | {"num_heads": 1, "hidden_act": "relu", "layer_norm_eps": 1e-3}, says=True,
    ),
    Row("torchvision", "convnext_tiny", theirs=CONVNEXT),
    Row("timm", "convnext_tiny", theirs=CONVNEXT, says=True),
    Row("transformers", "convnext_tiny", EPSILON, CONVNEXT, says=True),
    Row("torchvision", "vgg11", VGG, {"dense": 8}),
    LITE,
    Row(
        "timm", "efficientnet_lite0", {"padding": "symmetric", "epsilon": 1e-5},
        {"depth": 1, "prefix": ""},
    ),
    dataclasses.replace(LITE, layout="efficientnet-lite-pytorch"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    for module, name, made in SMALLER:
        monkeypatch.setitem(module.MODELS, name, made)
    sizes = {"tiny": tuple(SMALL_VIT[:3])}
    monkeypatch.setattr(vit, "SIZES", sizes)


def oracle_of(row):
    return oracle_models.make(row.library, row.name, **row.theirs)


def layout_named(name):
    return next(one for one in layouts() if one.name == name)


def began(task, config, address, tokenizer=None):
    """Returns what a run that begins with some weights would export at once."""
    found = read_weights(address)
    shapes = jax.eval_shape(lambda: random_state(task, 0))
    start = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    start = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), start)
    variables = load_weights(start, found, fresh=config.init.fresh)
    fitting = without_prefix(found, named(start)).tensors
    layout = recognise(named(start), fitting, address).name if fitting else None
    return Trained(
        task=task,
        spec=task.inputs.data,
        variables=variables,
        step=0,
        model=dict(config.model),
        config=configs.to_json(config),
        pretrained=address,
        weights_sha256=found.sha256,
        came_in=layout,
        layout=None,
        tokenizer=tokenizer or {},
    )


def fine_tuned(trained):
    """Returns the same with every number moved, as updates do; compiling them is dear.

    Whole runs are exported in `test_export_published` and `test_export_texts`.
    """
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: (leaf * rng.uniform(0.9, 1.1, leaf.shape)).astype(leaf.dtype),
        trained.variables,
    )
    return dataclasses.replace(trained, variables=variables)


def written(trained, folder):
    """Returns the tensors of an export, and the text on how it is loaded."""
    folder.mkdir()
    text = weights.write(trained, folder)
    return read_weights(f"file:{folder}/model.safetensors").tensors, text


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert digest(dict(found)) == digest(dict(wanted))


def assert_moved(after, before):
    """Every tensor that learns has moved."""
    still = [name for name in after if np.array_equal(after[name], before[name])]
    assert not [name for name in still if before[name].ndim], still


def answers_of(trained, inputs, key="logits"):
    found = jax.jit(functools.partial(answer, trained.task))(trained.variables, inputs)
    return np.asarray(found[key])


def assert_close(found, wanted, tolerance=1e-4):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def loaded_back(row, folder):
    """Returns the network that a library makes of an export."""
    if row.says and row.library == "transformers":
        auto = oracles.import_transformers().AutoModelForImageClassification
        made, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not [value for value in info.values() if value]
        return made.eval()
    if row.says and row.library == "timm":
        create = oracles.import_timm().create_model
        return create(f"local-dir:{folder}", pretrained=True).eval()
    from safetensors.torch import load_file

    made = oracle_of(row).module
    made.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return made.eval()


@pytest.mark.parametrize("row", ROWS, ids=map(str, ROWS))
@pytest.mark.ci_runs(
    "timm-vit_tiny_patch16-mean_norm",
    "transformers-vit_tiny_patch16-1-relu-0.001",
    "torchvision-convnext_tiny",
    "timm-convnext_tiny",
    "torchvision-vgg11-8-0.0",
    "timm-efficientnet_lite0",
    "efficientnet-lite-pytorch-efficientnet_lite0",
)
def test_weights_go_back_to_their_library(row, tmp_path):
    before = oracle_of(row).tensors()
    overrides = [("data.mean", str(MEAN)), ("data.std", str(STD))]
    config = small.config(model=row.name, overrides=overrides, **row.arguments)
    fields = {"mean": MEAN, "std": STD}
    task = small.task_of(config, small.spec((32, 32, 3), **fields))
    if row.layout:
        theirs = {name: np.array(tensor) for name, tensor in before.items()}
        save_file(theirs, tmp_path / "theirs.safetensors")
        leaves = began(task, config, f"file:{tmp_path}/theirs.safetensors").variables
        before = layout_named(row.layout).tensors(named(leaves))
    save_file({k: np.array(v) for k, v in before.items()}, tmp_path / "w.safetensors")
    trained = began(task, config, f"file:{tmp_path}/w.safetensors")
    assert_same(written(trained, tmp_path / "same")[0], before)
    trained = fine_tuned(trained)
    after, _ = written(trained, tmp_path / "after")
    assert_moved(after, before)
    if row.layout:
        trained = dataclasses.replace(trained, layout=row.library)
        written(trained, tmp_path / "theirs")
    import torch

    inputs = small.batch(3, (32, 32, 3))["inputs"][0]
    x = torch.from_numpy(((inputs / 255 - MEAN) / STD).astype(np.float32))
    folder = tmp_path / ("theirs" if row.layout else "after")
    with torch.no_grad():
        found = loaded_back(row, folder)(x.permute(0, 3, 1, 2))
    found = getattr(found, "logits", found).numpy()
    assert_close(found, answers_of(trained, inputs))


# Texts


TEXT_ROWS = [  # Ours, how it pools, the oracle, and what file names differ in.
    ("bert_base", "cls", "BertForSequenceClassification", ""),
    ("bert_base", "cls", "BertForSequenceClassification", "older"),
    ("bert_base", "cls", "BertForSequenceClassification", "variant"),
    ("bert_base", "none", "BertForTokenClassification", ""),
    ("minilm_l6", "mean", "BertModel", ""),
    ("distilbert_base", "cls", "DistilBertForSequenceClassification", ""),
]


def text_task(tmp_path, name, pool, **arguments):
    """Returns a config, its task and a batch of texts."""
    is_tagged = pool == "none"
    folder = tmp_path / "texts"
    (texts.write_tagged if is_tagged else texts.write)(folder)
    make = text_configs.tag_config if is_tagged else text_configs.config
    config = make(folder)
    config = config.replaced(model={"name": name, "pool": pool, **arguments})
    data = run_data(config)
    task = small.task_of(config, data.spec)
    return config, task, data.train.take(np.arange(4))


def older(tensors):
    """Returns tensors as the first files of BERT name them."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    found = {}
    for name, tensor in tensors.items():
        for new, old in names.items():
            name = name.replace(new, old)
        found[name] = tensor
    return found


def their_logits(folder, kind, inputs):
    """Returns what transformers gives, and sentence-transformers where that is needed."""
    import torch
    from safetensors.torch import load_file

    transformers = oracles.import_transformers()
    make = getattr(transformers, f"AutoModel{kind.partition('Bert')[2]}", None)
    make = make or transformers.AutoModel
    module, info = make.from_pretrained(folder, output_loading_info=True)
    assert type(module).__name__ == kind
    assert not [value for value in info.values() if value]
    ids, sentence = (torch.from_numpy(part).long() for part in inputs.swapaxes(0, 1))
    mask, given = (sentence > 0).long(), {}
    if "Distil" not in kind:
        given["token_type_ids"] = (sentence - 1).clamp(min=0)
    with torch.no_grad():
        found = module.eval()(input_ids=ids, attention_mask=mask, **given)
        if kind != "BertModel":
            return found.logits.numpy(), mask.numpy()
        hidden, mask = found.last_hidden_state, mask[..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        dense = load_file(folder / "2_Dense" / "model.safetensors")
        logits = mean @ dense["linear.weight"].T + dense["linear.bias"]
    return logits.numpy(), None


@pytest.mark.parametrize("row", TEXT_ROWS, ids="-".join)
@pytest.mark.ci_runs(
    "bert_base-cls-BertForSequenceClassification-older",
    "bert_base-none-BertForTokenClassification-",
    "minilm_l6-mean-BertModel-",
    "distilbert_base-cls-DistilBertForSequenceClassification-",
)
def test_encoders_go_back_to_transformers(row, tmp_path):
    name, pool, kind, names = row
    arguments = {"types": 0 if name.startswith("distil") else 2}
    if names == "variant":
        arguments |= {"heads": 2, "hidden_activation": "relu", "epsilon": 1e-3}
    config, task, batch = text_task(tmp_path, name, pool, **arguments)
    tiny = {k: v for k, v in text_configs.TINY.items() if k in bert_oracles.TINY}
    module = bert_oracles.oracle(kind, tiny, 2)
    before = {k: np.array(v) for k, v in bert_oracles.tensors_of(module).items()}
    before = older(before) if names == "older" else before
    save_file(before, tmp_path / "w.safetensors")
    if kind == "BertModel":
        config = config.replaced(init={"fresh": ("head/.*",)})
    address, tokenizer = f"file:{tmp_path}/w.safetensors", {"tokenizer.json": "{}"}
    trained = began(task, config, address, tokenizer)
    assert_same(written(trained, tmp_path / "same")[0], before)
    trained = fine_tuned(trained)
    after, text = written(trained, tmp_path / "after")
    pooler = {n for n in before if kind == "BertModel" and "pooler" in n}
    assert_moved({n: t for n, t in after.items() if n not in pooler}, before)
    assert ("SentenceTransformer" in text) == (kind == "BertModel")
    found, mask = their_logits(tmp_path / "after", kind, batch["inputs"])
    if pool != "none":
        assert_close(found, answers_of(trained, batch["inputs"]))
        return
    variables, given = trained.variables, {**batch, "inputs": batch["inputs"]}
    given = task.prepare(given, jax.random.key(0), None)
    ours, _ = jax.jit(task.models.forward)(variables, given["inputs"])
    assert_close(found[mask > 0], np.asarray(ours)[mask > 0])
