"""Models of tables against rewrites in torch, in float64, with their gradients."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import torch

from finetune_jax.core.pytrees import named
from finetune_jax.models import make_model, stages_of

FIELDS = (("C1", 5), ("C2", 3), ("city", 7))
NUMBERS, BATCH = 4, 6
HEAD = {
    "hidden": (),
    "activation": "relu",
    "dropout": 0.0,
    "initialiser": "lecun_normal",
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def inputs(numbers=NUMBERS, fields=FIELDS):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, rows, BATCH) for _, rows in fields]
    return {
        "numbers": rng.normal(size=(BATCH, numbers)),
        "categories": np.stack(rows, axis=1).astype(np.int32)
        if rows
        else np.zeros((BATCH, 0), np.int32),
    }


def made(name, numbers=NUMBERS, fields=FIELDS, **arguments):
    """Returns a model and parameters of which none is zero."""
    module = make_model(
        name,
        {"head": HEAD, **arguments},
        classes=2,
        numbers=numbers,
        fields=fields,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
    )
    x = inputs(numbers, fields)
    init = functools.partial(module.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    rng = np.random.default_rng(1)
    flat = {k: rng.normal(size=v.shape) / 2 for k, v in flat.items()}
    return module, flax.traverse_util.unflatten_dict(flat, sep="/")


def compare(module, params, oracle, numbers=NUMBERS, fields=FIELDS):
    """Checks outputs and the gradients of a loss against `oracle(p, x)` of torch."""
    x = inputs(numbers, fields)
    weight = np.random.default_rng(2).normal(size=(BATCH, 2))

    def loss(params):
        out = module.apply({"params": params}, x, train=False)
        return jnp.sum(out * weight) + jnp.sum(out**2), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tensors = {
        name: torch.tensor(np.asarray(leaf), requires_grad=True)
        for name, leaf in named(params).items()
    }
    theirs = oracle(
        tensors,
        torch.tensor(x["numbers"]),
        torch.tensor(x["categories"], dtype=torch.long),
    )
    (torch.sum(theirs * torch.tensor(weight)) + torch.sum(theirs**2)).backward()
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-9, atol=1e-10)
    for name, leaf in named(gradients).items():
        assert tensors[name].grad is not None, name
        np.testing.assert_allclose(
            leaf, tensors[name].grad, rtol=1e-6, atol=1e-9, err_msg=name
        )


def embedded(p, categories, fields=FIELDS):
    return torch.stack(
        [
            p[f"embeddings/{f}/embedding"][categories[:, i]]
            for i, (f, _) in enumerate(fields)
        ],
        dim=1,
    )


def dense(p, name, x):
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def test_table_mlp_is_torchs():
    module, params = made("table_mlp", width=3, hidden=(8, 5))

    def oracle(p, numbers, categories):
        x = torch.cat([numbers, embedded(p, categories).flatten(1)], dim=1)
        for stage in ("stage1", "stage2"):
            x = torch.relu(dense(p, f"{stage}/dense1", x))
        return dense(p, "head/logits", x)

    compare(module, params, oracle)
    assert module.stages == ("embeddings", "stage1", "stage2", "head")


def test_dlrm_is_that_of_its_authors():
    module, params = made("dlrm", width=3, bottom=(6,), top=(7,))

    def oracle(p, numbers, categories):
        x = numbers
        for layer in ("dense1", "dense2"):
            x = torch.relu(dense(p, f"bottom/layers/{layer}", x))
        # As dlrm_s_pytorch.py's interact_features has it.
        vectors = torch.cat([x, embedded(p, categories).flatten(1)], dim=1)
        vectors = vectors.view((BATCH, -1, 3))
        products = torch.bmm(vectors, torch.transpose(vectors, 1, 2))
        _, ni, nj = products.shape
        li = torch.tensor([i for i in range(ni) for _ in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        x = torch.cat([x, products[:, li, lj]], dim=1)
        return dense(p, "head/logits", torch.relu(dense(p, "top/dense1", x)))

    compare(module, params, oracle)
    assert module.stages == ("embeddings", "bottom", "interaction", "top", "head")
    assert stages_of("dlrm") == ("embeddings", "bottom", "top", "head")


def test_dlrm_needs_no_numbers():
    module, params = made("dlrm", numbers=0, width=3, top=(7,))

    def oracle(p, numbers, categories):
        vectors = embedded(p, categories)
        products = [
            (vectors[:, i] * vectors[:, j]).sum(1) for i, j in ((1, 0), (2, 0), (2, 1))
        ]
        x = torch.relu(dense(p, "top/dense1", torch.stack(products, dim=1)))
        return dense(p, "head/logits", x)

    compare(module, params, oracle, numbers=0)


@pytest.mark.parametrize(("structure", "rank"), [("parallel", 0), ("stacked", 2)])
def test_dcn_v2_is_that_of_its_authors(structure, rank):
    module, params = made(
        "dcn_v2", width=2, layers=2, rank=rank, deep=(5,), structure=structure
    )

    def oracle(p, numbers, categories):
        x0 = x = torch.cat([numbers, embedded(p, categories).flatten(1)], dim=1)
        for layer in (1, 2):
            inner = dense(p, f"cross/down{layer}", x) if rank else x
            x = x0 * dense(p, f"cross/cross{layer}", inner) + x
        deep = torch.relu(
            dense(p, "deep/layers/dense1", x0 if structure[0] == "p" else x)
        )
        if structure == "parallel":
            deep = torch.cat([x, deep], dim=1)
        return dense(p, "head/logits", deep)

    compare(module, params, oracle)


def test_ft_transformer_is_that_of_its_authors():
    heads, width = 2, 6
    module, params = made("ft_transformer", width=width, heads=heads, layers=2)

    def normed(p, name, x):
        return torch.nn.functional.layer_norm(
            x, (width,), p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-5
        )

    def oracle(p, numbers, categories):
        tokens = numbers[..., None] * p["tokens/kernel"]
        tokens = torch.cat([tokens, embedded(p, categories)], dim=1) + p["tokens/bias"]
        x = torch.cat([p["tokens/class_token"].expand(BATCH, 1, width), tokens], dim=1)
        for block in ("stage1", "stage2"):
            y = x if block == "stage1" else normed(p, f"{block}/ln1", x)
            q, k, v = (
                dense(p, f"{block}/attention/{part}", y)
                .reshape(BATCH, -1, heads, width // heads)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            y = y.transpose(1, 2).reshape(BATCH, -1, width)
            x = x + dense(p, f"{block}/attention/out", y)
            a, b = dense(p, f"{block}/dense1", normed(p, f"{block}/ln2", x)).chunk(
                2, dim=-1
            )
            x = x + dense(p, f"{block}/dense2", a * torch.relu(b))
        return dense(p, "head/logits", torch.relu(normed(p, "norm/ln", x[:, 0])))

    compare(module, params, oracle)
    assert module.stages[:3] == ("embeddings", "tokens", "stage1")


@pytest.mark.parametrize("name", ["table_mlp", "dcn_v2", "ft_transformer"])
def test_tables_without_categories_are_models_too(name):
    module, params = made(name, fields=(), width=8)
    apply = functools.partial(module.apply, train=False)
    found = jax.eval_shape(apply, {"params": params}, inputs(fields=()))
    assert found.shape == (BATCH, 2) and "embeddings" not in params


@pytest.mark.parametrize("name", ["dlrm", "dcn_v2", "ft_transformer"])
def test_stages_of_tables_are_run_one_by_one(name):
    module, params = made(name, width=8)

    def both(x):
        whole = module.apply({"params": params}, x, train=False)
        for stage in module.stages:
            x = module.apply(
                {"params": params}, x, first=stage, last=stage, train=False
            )
        return x, whole

    np.testing.assert_allclose(*jax.jit(both)(inputs()), rtol=1e-12)
