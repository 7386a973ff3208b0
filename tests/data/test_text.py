"""Texts: read, cut into tokens, padded, learned, and predicted."""

import json

import numpy as np
import pytest
import small
import texts
from safetensors.numpy import save_file
from text_configs import TINY, config, tag_config

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.data.batches import shortened, training_batches
from finetune_jax.data.text.tokens import TextLengths, make_encoder
from finetune_jax.modes import plan
from finetune_jax.modes import predict as predict_mode
from finetune_jax.modes.options import Options
from finetune_jax.pipeline import pipeline
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.objectives.entities import entities, entity_scores
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.training.loop import Preempted
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.metadata.tokenizer import find_tokenizer

pytestmark = pytest.mark.usefixtures("no_pictures")

HEAD = (("head/.*", 1.0), (".*", 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return texts.write(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_sources_give_the_same_tokens_and_labels(folder, suffix, tmp_path):
    texts.write(tmp_path, suffix)
    header = () if suffix == "jsonl" else ("sentence", "label")
    ours = run_data(config(tmp_path, name=suffix, header=header))
    same = run_data(config(folder))
    assert ours.fingerprint() == same.fingerprint()
    assert ours.spec.class_names == ("0", "1") and ours.spec.shape == (2, 12)
    assert len(ours.train) == 40 and set(ours.held_out) == {"validation", "test"}
    text, label = texts.rows(40)[5]
    batch = ours.train.take(np.array([5]))
    ids, sentence = batch["inputs"][0]
    words = [4 + texts.WORDS.index(word) for word in text.split()]
    assert ids[: len(words) + 2].tolist() == [2, *words, 3]
    assert sentence.tolist() == [1] * (len(words) + 2) + [0] * (10 - len(words))
    assert batch["label"][0] == int(label)


def test_two_sentences_have_types_and_the_longer_is_cut(tmp_path):
    lines = ["a\tb\tscore", f"{'the ' * 20}\tbad film\t0.5", "fine\tgood plot\t-1.25"]
    (tmp_path / "all.tsv").write_text("\n".join(lines * 1) + "\n")
    (tmp_path / "tokenizer.json").write_text(texts.tokenizer())
    found = config(
        tmp_path / "all.tsv",
        tokenizer=f"file:{tmp_path}",
        text=("a", "b"),
        label="score",
        labels="numbers",
        header=(),
        train="all",
        validation=None,
        test=None,
    )
    data = run_data(found)
    assert data.spec.targets == ("score",) and data.spec.class_names == ()
    batch = data.train.take(np.argsort(data.train.label[:, 0])[::-1])
    np.testing.assert_array_equal(batch["label"][:, 0], [0.5, -1.25])
    ids, sentence = batch["inputs"][0]
    assert sentence.tolist() == [1] * 9 + [2] * 3
    assert ids[-3:].tolist() == [7, 10, 3] and (ids[1:8] == 12).all()
    task = make_setup(found).task
    made = task.prepare(batch, None, None)["inputs"]
    assert made["types"][0].tolist() == [0] * 9 + [1] * 3
    assert made["mask"].sum(axis=1).tolist() == [12, 6]


def test_a_batch_is_as_long_as_the_smallest_bucket_that_holds_it(folder):
    data = run_data(config(folder))
    options = data.spec.inputs.options
    assert options.lengths() == (4, 8, 12)
    whole = data.train.take(np.arange(40))["inputs"]
    tokens = (whole[:, 1] != 0).sum(axis=-1)
    seen = set()
    for batch in training_batches(
        shortened(data.train),
        seed=0, batch_size=2, micro_batches=1, updates=range(60),
    ):  # fmt: skip
        inputs = batch["inputs"][0]
        longest = int((inputs[:, 1] != 0).sum(axis=-1).max())
        wanted = min(n for n in (4, 8, 12) if n >= longest)
        assert inputs.shape[-1] == wanted
        seen.add(wanted)
    assert seen >= {8, 12}
    few = TextLengths(options=options).shortened({"inputs": whole[tokens == 3]})
    assert few["inputs"].shape[-1] == 4
    assert (np.diff(tokens[shortened(data.train, by_length=True).order]) >= 0).all()


@pytest.mark.slow
def test_training_learns_and_padding_costs_no_result(folder, tmp_path):
    plan = (Phase(name="all", steps=60, peak_lr=3e-2, optimizer="adam"),)
    one = run(config(folder, plan=plan), tmp_path / "a")
    assert one["test/accuracy"] > 0.75
    whole = run(config(folder, plan=plan, buckets=(12,)), tmp_path / "b")
    assert abs(one["test/loss"] - whole["test/loss"]) < 1e-3
    assert (tmp_path / "a" / "tokenizer.json").read_text() == texts.tokenizer()


@pytest.mark.slow
def test_a_stopped_run_of_texts_goes_on_to_the_same_bits(folder, tmp_path):
    plan = (Phase(name="all", steps=6, peak_lr=1e-2),)
    straight = run(config(folder, plan=plan), tmp_path / "a")
    with pytest.raises(Preempted):
        run(config(folder, plan=plan), tmp_path / "b", small.stop_at_once())
    again = run(config(folder, plan=plan), tmp_path / "b")
    assert again["params_sha256"] == straight["params_sha256"]
    assert small.lines(tmp_path / "a") == small.lines(tmp_path / "b")


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pool", "block2"])
@pytest.mark.exhaustive
def test_cached_features_of_texts_give_what_none_give(folder, tmp_path, stage):
    """To the bit behind the encoder; within it last bits differ, see reproducibility.md."""
    rules = HEAD if stage == "pool" else ((r"(block2|head)/.*", 1.0), (".*", 0.0))
    plan = (Phase(name="top", steps=12, peak_lr=1e-2, rules=rules),)
    cached = run(config(folder, plan=plan), tmp_path / "a")
    anew = run(config(folder, plan=plan, cache="off"), tmp_path / "b")
    assert cached["final"] == pytest.approx(anew["final"], rel=1e-6)
    if stage == "pool":
        assert cached["params_sha256"] == anew["params_sha256"]


@pytest.mark.slow
def test_numbers_are_learned(tmp_path):
    folder = texts.write(tmp_path / "texts")
    plan = (Phase(name="all", steps=2, peak_lr=3e-2, optimizer="adam"),)
    found = run(config(folder, plan=plan, labels="numbers"), tmp_path / "run")
    assert {"test/mse", "test/mae", "test/r2"} <= set(found)


def test_what_is_wrong_with_files_is_told_at_once(tmp_path):
    texts.write(tmp_path)
    (tmp_path / "train.tsv").write_bytes(b"good film\t1\nbad \xff film\t0\n")
    (tmp_path / "dev.tsv").write_text("good film\t1\nno label\nmore\tthan\ttwo\n")
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path))
    text = str(error.value)
    assert "train.tsv, line 2: not UTF-8" in text and "0xff" in text
    assert "dev.tsv, line 2: 1 values" in text and "dev.tsv, line 3: 3 values" in text


def test_columns_and_empty_texts_are_told_at_once(tmp_path):
    texts.write(tmp_path)
    (tmp_path / "train.tsv").write_text(" \t1\ngood film\t \nfine\t1\n")
    (tmp_path / "dev.tsv").write_text("good film\t1\n")
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path, header=("sentense", "label")))
    assert "no column 'sentence'; did you mean 'sentense'?" in str(error.value)
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path))
    text = str(error.value)
    assert "train.tsv, line 1: 'sentence' is empty" in text
    assert "train.tsv, line 2: 'label' is empty" in text
    with pytest.raises(UserError, match="is 'good', not a number"):
        rows = "fine film\tgood\n"
        (tmp_path / "train.tsv").write_text(rows)
        run_data(config(tmp_path, labels="numbers"))


def test_tokenizer_and_model_must_fit(folder, tmp_path):
    with pytest.raises(UserError) as error:
        make_setup(config(folder, max_tokens=33, model={"vocabulary": 14}))
    text = str(error.value)
    assert "vocabulary: 14 embeddings, but the tokenizer knows 15" in text
    assert "max_tokens: 33, but 'minilm_l6' has 32 positions" in text
    with pytest.raises(UserError, match="vocabulary: 500"):
        make_setup(config(folder, model={"vocabulary": 500}))
    with pytest.raises(UserError, match="config.data.tokenizer: texts need one"):
        run_data(config(folder, tokenizer=None))
    with pytest.raises(UserError, match="no tokenizer.json there"):
        run_data(config(folder, tokenizer=f"file:{tmp_path}"))
    with pytest.raises(UserError, match="not a tokenizer"):
        make_encoder("{}", 8)
    with pytest.raises(UserError, match="3 are special"):
        make_encoder(texts.tokenizer(), 3)
    with pytest.raises(UserError, match="model.classes: 1, but the data has 2"):
        make_setup(config(folder, model={"classes": 1}))
    assert find_tokenizer(None, f"file:{folder}/model.safetensors") == texts.tokenizer()
    assert find_tokenizer(None, "zoo:resnet20_fashion_mnist") is None


@pytest.mark.slow
def test_preprocessing_of_images_beside_weights_is_passed_over(folder, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
    params = random_state(make_setup(config(folder)).task, 0).params
    tensors = {
        name: np.asarray(leaf) for name, leaf in named({"params": params}).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    address = f"file:{tmp_path}/model.safetensors"
    chosen = config(folder, overrides=[("init.pretrained", address)])
    assert plan.main(chosen, Options(config="", workdir=None)) == 0


def test_texts_and_images_are_not_taken_for_one_another(folder):
    with pytest.raises(UserError, match="'resnet20' takes no texts"):
        given = config(folder)
        bare = {k: v for k, v in given.model.items() if k not in TINY}
        given = small.editable(given)
        given.model = {**bare, "name": "resnet20"}
        make_setup(small.resolved(given))
    with pytest.raises(
        UserError,
        match="'classify' takes.*data is text with classes; such data is for 'text'",
    ):
        make_setup(config(folder, overrides=[("task.name", "classify")]))
    with pytest.raises(UserError, match="'digits' holds no texts"):
        run_data(config(folder, name="digits"))
    with pytest.raises(UserError, match="name their columns in config.data.text"):
        run_data(config(folder, text=(), tokenizer=None, header=(), max_tokens=128,
                        buckets=configs.default().data.buckets))  # fmt: skip
    with pytest.raises(UserError, match="max_tokens: 12, but config.data.text"):
        run_data(config(folder, text=(), tokenizer=None))


def test_lines_of_json_name_their_faults(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"sentence": 3, "label": 1}) + "\n[1]\n{bad\n"
    )
    found = {"name": "jsonl", "header": (), "tokenizer": None}
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path, **found))
    text = str(error.value)
    assert "line 2: not an object" in text and "line 3: not JSON" in text


@pytest.mark.slow
def test_new_texts_are_predicted_from_files_of_every_kind(folder, tmp_path):
    plan = (Phase(name="all", steps=30, peak_lr=3e-2, optimizer="adam"),)
    given, workdir = config(folder, plan=plan), tmp_path / "run"
    run(given, workdir)
    told = [texts.rows(20, seed=9)[row] for row in range(6)]
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text, _ in told))
    (tmp_path / "b.tsv").write_text("".join(f"{text}\t{k}\n" for text, k in told))
    (tmp_path / "c.csv").write_text("".join(f"{text}\n" for text, _ in told))
    lines = [json.dumps({"sentence": text}) for text, _ in told]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "e.txt").write_text("good\n\n")
    output = tmp_path / "found.jsonl"
    inputs = tuple(str(tmp_path / name) for name in ("a.txt", "b.tsv", "c.csv"))

    def predict(*inputs):
        options = Options(config="", workdir=workdir, inputs=inputs, output=str(output))
        predict_mode.main(given, options)
        return [json.loads(line) for line in output.read_text().splitlines()]

    found = predict(*inputs, str(tmp_path / "d.jsonl"))
    classes = [line["class"] for line in found]
    assert len(found) == 24 and classes[:6] == [label for _, label in told]
    assert classes == classes[:6] * 4
    assert found[7]["file"] == f"{tmp_path / 'b.tsv'}#2"
    classify = pipeline(workdir)
    notebook = classify([told[0][0], {"sentence": told[1][0]}])
    assert [record["class"] for record in notebook] == classes[:2]
    assert classify(told[1][0])["class"] == classes[1]
    with pytest.raises(UserError, match="input 1: 3 .int."):
        classify(["good", 3])
    with pytest.raises(UserError, match="e.txt, line 2: 'sentence' is empty"):
        predict(inputs[0], str(tmp_path / "e.txt"))
    with pytest.raises(UserError, match="no texts"):
        predict(str(workdir / "config.json"))


def test_words_have_tags_at_their_first_tokens(tmp_path):
    data = run_data(tag_config(texts.write_tagged(tmp_path)))
    assert data.spec.class_names == ("O", "B-GOOD")
    batch = data.train.take(np.array([1]))
    text = texts.rows(40)[1][0].split()
    wanted = [int(word in texts.WORDS[: texts.GOOD]) for word in text]
    assert batch["label"][0].tolist() == [-1, *wanted, *[-1] * (11 - len(text))]
    with pytest.raises(UserError, match="config.data.sampling"):
        run_data(tag_config(tmp_path, sampling="balanced"))
    (tmp_path / "dev.jsonl").write_text('{"words": "a b", "tags": "O"}\n')
    with pytest.raises(UserError, match="dev.jsonl, line 1: 2 words, but 1 tags"):
        run_data(tag_config(tmp_path))


@pytest.mark.slow
def test_tags_are_learned_and_predicted(tmp_path):
    folder, workdir = texts.write_tagged(tmp_path / "texts"), tmp_path / "run"
    plan = (Phase(name="all", steps=40, peak_lr=3e-2, optimizer="adam"),)
    found = run(tag_config(folder, plan=plan), workdir)
    assert found["test/f1"] > 0.9 and found["test/accuracy"] > 0.9
    (tmp_path / "a.txt").write_text("the good film\nbad plot\n")
    inputs, output = (str(tmp_path / "a.txt"),), str(tmp_path / "found.jsonl")
    predict_mode.main(
        tag_config(folder, plan=plan),
        Options(config="", workdir=workdir, inputs=inputs, output=output),
    )
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    tags = [json.loads(line)["tags"] for line in lines]
    assert tags == [["O", "B-GOOD", "O"], ["O", "O"]]
    assert pipeline(workdir)("the good film") == {"tags": tags[0]}


@pytest.mark.parametrize(
    "tags, wanted",
    [
        ("B-X I-X O", {("X", 0, 1)}),
        ("I-X I-X I-Y", {("X", 0, 1), ("Y", 2, 2)}),
        ("B-X B-X I-X", {("X", 0, 0), ("X", 1, 2)}),
        ("O I-X O B-Y I-X", {("X", 1, 1), ("Y", 3, 3), ("X", 4, 4)}),
        ("B-X I-X E-X S-Y", {("X", 0, 2), ("Y", 3, 3)}),
        ("O O", set()),
        ("B-X-1 I-X-1", {("X-1", 0, 1)}),
        ("B I O", {("_", 0, 1)}),
    ],
)
def test_entities_are_those_of_conlleval(tags, wanted):
    assert entities(tags.split()) == wanted


def test_scores_count_whole_entities():
    true = [["B-X", "I-X", "O", "B-Y"], ["O"]]
    predicted = [["B-X", "O", "O", "B-Y"], ["B-Y"]]
    scores = entity_scores(predicted, true)
    assert scores == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    assert entity_scores([["O"]], [["O"]]) == dict.fromkeys(scores, 0.0)


def test_entities_are_seqevals_on_random_tags():
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    rng = np.random.default_rng(0)
    names = ["O", *(f"{place}-{kind}" for place in "BIES" for kind in "XY")]
    for _ in range(2000):
        tags = [names[k] for k in rng.integers(len(names), size=6)]
        assert entities(tags) == set(seqeval.get_entities(tags))


def test_texts_of_tfds_are_those_of_files(folder, tmp_path):
    import tensorflow_datasets as tfds
    from etils import epath

    sizes = {"train": 40, "validation": 20, "test": 20}
    splits = {s: texts.rows(n, seed) for seed, (s, n) in enumerate(sizes.items())}

    class Told(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(__file__).parent

        def _info(self):
            features = {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["0", "1"]),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._rows(rows) for split, rows in splits.items()}

        def _rows(self, rows):
            for index, (text, label) in enumerate(rows):
                yield index, {"sentence": text, "label": label}

        def _generate_examples(self):
            raise NotImplementedError

    Told.name = "told"
    Told(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    data = {"name": "tfds:told", "dir": str(tmp_path), "header": ()}
    ours = run_data(config(folder, **data))
    assert ours.fingerprint() == run_data(config(folder)).fingerprint()
    with pytest.raises(UserError, match="no column 'sentense'; did you mean"):
        run_data(config(folder, **data, text=("sentense",)))
