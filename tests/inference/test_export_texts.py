"""A fine-tuned encoder and its tokenizer go to programs that have not this one."""

import json
import subprocess
import sys

import bert_oracles
import numpy as np
import oracles
import pytest
import text_configs
import texts
from exports import assert_close, export
from safetensors.numpy import save_file

from finetune_jax.core.errors import UserError
from finetune_jax.data.text.tokens import encode, make_encoder
from finetune_jax.inference.export.text_encoders import tokenizer_files
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.modes.startup import resolved_config
from finetune_jax.plans.phase import Phase
from finetune_jax.training.run import run
from finetune_jax.weights.metadata.tokenizer import find_tokenizer

RAW = ["the good film", "bad", "a great plot is a fine film", "dull the " * 9]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a workdir, what was exported of it, and the folder of its weights."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("texts")
    source = texts.write(folder / "data")
    tiny = {k: v for k, v in text_configs.TINY.items() if k in bert_oracles.TINY}
    module = bert_oracles.oracle("BertForSequenceClassification", tiny, 2)
    tensors = {k: np.array(v) for k, v in bert_oracles.tensors_of(module).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(texts.tokenizer())
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    plan = (Phase(name="all", steps=2, peak_lr=1e-2),)
    address = f"file:{folder}/model.safetensors"
    config = text_configs.config(
        source,
        plan=plan,
        tokenizer=None,
        model={"pool": "cls"},
        overrides=[("init.pretrained", address), ("data.max_tokens", "11")],
    )
    run(config, folder / "run")
    export(folder / "run", folder / "out", formats="jax,safetensors")
    return folder / "run", folder / "out", folder


def ours(workdir):
    """Returns ids and logits of the raw texts as predictions have them."""
    config = resolved_config("", workdir, [("parallel.devices", "1")])
    predictor = open_predictor(config, workdir)
    encoder = make_encoder((workdir / "tokenizer.json").read_text(), 11)
    rows = encode(encoder, [(text,) for text in RAW])
    inputs = np.zeros((len(rows), 2, 11), np.int32)
    for row, (ids, sentences) in enumerate(rows):
        inputs[row, :, : len(ids)] = ids, sentences
    task, placed = predictor.setup.task, predictor.state.placed
    batch = task.prepare({"inputs": inputs}, None, None)
    found = task.outputs(
        {"params": placed.params, "batch_stats": placed.batch_stats}, batch
    )
    return [ids for ids, _ in rows], np.asarray(found["logits"])


@pytest.mark.slow
def test_transformers_gives_our_ids_and_logits_of_raw_texts(exported):
    workdir, folder, source = exported
    import torch

    transformers = oracles.import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not [value for value in info.values() if value]
    given = tokenizer(RAW, truncation=True, padding=True, return_tensors="pt")
    ids, logits = ours(workdir)
    rows = zip(given["input_ids"].tolist(), given["attention_mask"].sum(1))
    assert [row[: int(tokens)] for row, tokens in rows] == ids
    assert len(ids[-1]) == 11
    with torch.no_grad():
        assert_close(model(**given).logits.numpy(), logits, 1e-4)
    assert model.config.id2label == {0: "0", 1: "1"}
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (folder / name).read_text() == (source / name).read_text()


@pytest.mark.slow
def test_the_card_says_how_texts_become_inputs_of_the_artifact(exported, tmp_path):
    workdir, folder, _ = exported
    about = json.loads((folder / "model.json").read_text())
    assert about["text"]["max_tokens"] == 11 and about["labels"] == ["0", "1"]
    card = (folder / "README.md").read_text()
    code = next(
        block.split("```")[0]
        for block in card.split("```python\n")[1:]
        if "from load" in block
    )
    assert '["A text."]' in code
    _, logits = ours(workdir)
    # Three of them are shorter than the longest there can be.
    for raw, wanted in ((RAW, logits), (RAW[:2], logits[:2])):
        told = code.replace('["A text."]', repr(raw)).replace("probabilities", "logits")
        told += f"\nnp.save({str(tmp_path / 'o.npy')!r}, model(inputs)['logits'])"
        done = subprocess.run(
            [sys.executable, "-c", told], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert_close(np.load(tmp_path / "o.npy"), wanted, 1e-5)


def test_the_tokenizer_config_of_the_source_is_kept_but_for_the_length():
    class Given:
        class spec:
            class inputs:
                class options:
                    max_tokens = 11

        tokenizer = {
            "tokenizer.json": "{}",
            "tokenizer_config.json": '{"tokenizer_class": "X", "model_max_length": 512}',
            "vocab.txt": "a",
        }

    found = tokenizer_files(Given)  # type: ignore[arg-type]
    config = json.loads(found.pop("tokenizer_config.json"))
    assert config == {"tokenizer_class": "X", "model_max_length": 11}
    assert found == {"tokenizer.json": "{}", "vocab.txt": "a"}


def test_a_vocabulary_alone_makes_the_tokenizer_of_older_berts(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film", "##s", "Good"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    weights = f"file:{tmp_path}/model.safetensors"
    made = find_tokenizer(None, weights)
    assert encode(make_encoder(str(made), 9), [("Good films",)]) == [
        ([2, 4, 5, 6, 3], [1] * 5)
    ]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    made = find_tokenizer(None, weights)
    assert encode(make_encoder(str(made), 9), [("Good",)])[0][0] == [2, 7, 3]
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="vocab.txt is no vocabulary"):
        find_tokenizer(None, weights)


def test_an_index_of_weights_is_no_tokenizer(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    address = f"file:{tmp_path}/model.safetensors.index.json"
    assert find_tokenizer(None, address) is None
    (tmp_path / "tokenizer.json").write_text("here")
    assert find_tokenizer(None, address) == "here"
