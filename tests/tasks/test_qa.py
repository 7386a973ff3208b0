"""Questions on passages: read, cut into windows, learned, answered and predicted."""

import collections
import dataclasses
import json
import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import questions
import small

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.text.questions import Asked, encode_questions
from finetune_jax.data.text.tokens import TextOptions, make_encoder
from finetune_jax.modes import export as export_mode
from finetune_jax.modes import predict as predict_mode
from finetune_jax.modes.options import Options
from finetune_jax.pipeline import pipeline
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.tasks.components.text_inputs import questions as as_encoders_take
from finetune_jax.tasks.objectives.squad import match_scores, normalised
from finetune_jax.tasks.qa import best_spans
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup, metric_names

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = {
    "layers": 2, "width": 16, "heads": 2, "hidden": 32, "vocabulary": 30,
    "positions": 64, "dropout": 0.0, "attention_dropout": 0.0, "pool": "none",
}  # fmt: skip
OPTIONS = TextOptions(text=("question", "context"), label="answers", labels="answers")


def config(folder, *, plan=(), overrides=(), model=(), **data):
    given = configs.default()
    given.task.name = "qa"
    given.data.update(
        name="jsonl",
        dir=str(folder),
        text=("question", "context"),
        label="answers",
        labels="answers",
        tokenizer=f"file:{folder}",
        validation="validation",
        test="test",
        batch_size=16,
        max_tokens=32,
        buckets=(16, 24),
    )
    given.data.update(data)
    given.model.name = "minilm_l6"
    for name, value in {**TINY, **dict(model)}.items():
        given.model[name] = value
    given.plan = as_config(plan or (Phase(name="all", steps=2, peak_lr=1e-2),))
    given.parallel.devices = 1
    resolved, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return resolved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return questions.write(tmp_path_factory.mktemp("questions"))


def asked(question, passage, *answers):
    return Asked(
        where="here", name=None, question=question, passage=passage, answers=answers
    )


def encoded(rows, **fields):
    options = TextOptions(**{**vars(OPTIONS), **fields})
    return encode_questions(make_encoder(questions.tokenizer(), 64), rows, options)


# The rules of the official script, written down anew.
def official_scores(predicted, wanted):
    def plain(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(one, other):
        one, other = plain(one).split(), plain(other).split()
        if not one or not other:
            return float(one == other)
        same = sum((collections.Counter(one) & collections.Counter(other)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(one), same / len(other)
        return 2 * precision * recall / (precision + recall)

    exact, overlap = [], []
    for answer, right in zip(predicted, wanted):
        right = [text for text in right if plain(text)] or [""]
        exact.append(max(float(plain(answer) == plain(text)) for text in right))
        overlap.append(max(f1(answer, text) for text in right))
    return {"exact_match": np.mean(exact), "f1": np.mean(overlap)}


def test_scores_are_those_of_the_official_script():
    rng = np.random.default_rng(0)
    words = [
        "The",
        "an",
        "a",
        "Bern",
        "bern,",
        "U.S.",
        "new-york",
        "...",
        "theatre",
        "é",
    ]

    def text():
        return " ".join(rng.choice(words, rng.integers(0, 4)))

    predicted = [text() for _ in range(300)]
    wanted = [[text() for _ in range(rng.integers(0, 3))] for _ in predicted]
    ours = match_scores(predicted, wanted)
    assert ours == pytest.approx(official_scores(predicted, wanted), abs=1e-12)
    assert 0.05 < ours["exact_match"] < ours["f1"] < 0.95
    assert normalised("The U.S., an  Ally") == "us ally"
    assert match_scores(["", "x"], [[], []]) == {"exact_match": 0.5, "f1": 0.5}


@pytest.mark.parametrize("max_tokens, overlap", [(12, 3), (12, 0), (20, 9), (64, None)])
def test_windows_are_those_of_the_tokenizers_library(max_tokens, overlap):
    rows = [
        asked(row["question"], row["context"]) for row in questions.rows(12, longest=30)
    ]
    ours = encoded(rows, max_tokens=max_tokens, overlap=overlap)
    theirs = make_encoder(questions.tokenizer(), 64)
    # It never shares more than half of the room of a window, and neither do these.
    room = max_tokens - 6
    shared = min(overlap if overlap is not None else max_tokens // 3, room // 2)
    theirs.enable_truncation(max_tokens, stride=shared, strategy="only_second")
    wanted, sizes = [], []
    for row in rows:
        first = theirs.encode(row.question, row.passage)
        wanted += [first, *first.overflowing]
        sizes.append(1 + len(first.overflowing))
    assert ours.sizes.tolist() == sizes and (max(sizes) > 1) == (max_tokens < 64)
    for (ids, sentences), note, one in zip(
        ours.tokens, ours.notes, wanted, strict=True
    ):
        assert ids.tolist() == one.ids
        assert (sentences - 1).tolist() == one.type_ids
        for place, (sequence, span) in enumerate(zip(one.sequence_ids, one.offsets)):
            if sequence == 1:
                assert note.characters(place, place) == span


def test_a_label_names_the_answer_or_the_first_token_where_a_window_lacks_it():
    rows = questions.rows(40, longest=30, none=7)
    given = [
        asked(
            row["question"], row["context"], *zip(*row["answers"].values(), strict=True)
        )
        for row in rows
    ]
    found = encoded(given, max_tokens=16, overlap=4)
    ends = np.cumsum(found.sizes)
    for row, end, size in zip(rows, ends, found.sizes):
        answered = 0
        for place in range(end - size, end):
            note, (start, stop) = found.notes[place], found.label[place]
            assert note.question is found.notes[end - 1].question
            if start:
                begin, after = note.characters(start, stop)
                assert [row["context"][begin:after]] == row["answers"]["text"]
                answered += 1
            else:
                assert stop == 0
        assert (answered > 0) == bool(row["answers"]["text"])


def test_the_mask_knows_the_passage_and_no_padding():
    found = encoded([asked("which tool ?", "in town ."), asked("tool ?", "in .")])
    inputs = np.zeros((2, 2, 12), np.int32)
    for row, (ids, sentences) in enumerate(found.tokens):
        inputs[row, :, : len(ids)] = ids, sentences
    made = as_encoders_take(jnp.asarray(inputs))
    assert made["mask"].tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2, 1, 0, 0, 0],
        [1, 1, 1, 1, 2, 2, 1, 0, 0, 0, 0, 0],
    ]
    assert made["types"][0].tolist() == [0] * 5 + [1] * 4 + [0] * 3


@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.fast_runs("1")
def test_the_best_span_is_the_one_that_trying_all_finds(longest):
    rng = np.random.default_rng(longest)
    share, inside = rng.normal(size=(20, 9, 2)), rng.random((20, 9)) < 0.7
    inside[:, 4] = True
    start, end, score = best_spans(jnp.asarray(share), jnp.asarray(inside), longest)
    for row in range(20):
        spans = {
            (i, j): share[row, i, 0] + share[row, j, 1]
            for i in range(9)
            for j in range(i, min(i + longest, 9))
            if inside[row, i] and inside[row, j]
        }
        best = max(spans, key=lambda span: spans[span])
        assert (int(start[row]), int(end[row])) == best
        assert float(score[row]) == pytest.approx(spans[best], rel=1e-6)


@pytest.fixture(scope="module")
def measured(folder):
    """Returns a task, its parameters, a batch, and what it gives of the batch."""
    setup = make_setup(config(folder, model={"layers": 1}))
    task = setup.task
    params, _ = jax.jit(task.init)(jax.random.key(0))
    batch = task.prepare(setup.data.train.take(np.arange(6)), None, None)
    outputs = jax.jit(lambda params, batch: task.outputs({"params": params}, batch))
    forward = jax.jit(task.models.forward)
    logits, _ = forward({"params": params}, batch["inputs"])
    return task, params, batch, outputs, logits


def test_the_loss_is_the_mean_of_two_cross_entropies_over_the_passage(measured):
    _, params, batch, outputs, logits = measured
    mask, logits = np.asarray(batch["inputs"]["mask"]), np.asarray(logits, np.float64)
    wanted = []
    for row, label in enumerate(batch["label"]):
        may = [0, *np.flatnonzero(mask[row] == 2)]
        totals = np.log(np.exp(logits[row, may]).sum(axis=0))
        wanted.append(np.mean(totals - logits[row, label, [0, 1]]))
    np.testing.assert_allclose(outputs(params, batch)["loss"], wanted, rtol=1e-5)


def test_padding_and_a_late_start_change_nothing(measured):
    """The mask of the passage comes through all stages."""
    task, params, batch, outputs, _ = measured
    whole = outputs(params, batch)
    shorter = jax.tree.map(lambda x: x[:, :24], batch["inputs"])
    assert (np.asarray(batch["inputs"]["mask"])[:, 24:] == 0).all()

    @jax.jit
    def late(params, batch):
        variables = {"params": params}
        features = task.models.with_features(variables, batch, first="head")
        return task.outputs(variables, task.models.unpacked(features), first="head")

    for other in (outputs(params, {**batch, "inputs": shorter}), late(params, batch)):
        for name, array in whole.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-5, atol=1e-6)


def answered(task, outputs, windows):
    names = ("start", "end", "span", "none")
    rows = {name: np.array(column) for name, column in zip(names, zip(*outputs))}
    return task.records(rows, {"note": windows.notes})


def test_the_best_window_answers_and_none_only_if_no_window_has_one(folder):
    passage = " ".join(["in"] * 9) + " red ."
    rows = [asked("which colour ?", passage), asked("which tool ?", "saw in town .")]
    windows = encoded(rows, max_tokens=14, overlap=2)
    assert windows.sizes.tolist() == [2, 1]
    task = make_setup(config(folder)).task
    target = dataclasses.replace(task.target, unanswerable=True)
    other = dataclasses.replace(task, target=target)
    for asking, may in ((task, False), (other, True)):
        outputs = [(6, 6, -3.0, -0.5), (8, 8, -1.0, -2.0), (5, 5, -2.0, -1.0)]
        red, none = answered(asking, outputs, windows)
        assert red == {
            "answer": "red", "start": 27, "end": 30, "score": pytest.approx(np.exp(-1)),
        }  # fmt: skip
        assert none["answer"] == ("" if may else "saw")
        assert none["score"] == pytest.approx(np.exp(-1 if may else -2))
        assert none["start"] == (None if may else 0)


def test_squads_own_files_give_the_same(folder, tmp_path):
    ours = run_data(config(folder))
    for seed, split in enumerate(("train", "dev", "test")):
        rows = questions.rows(60 if split == "train" else 20, seed)
        content = json.dumps(questions.as_squad(rows))
        (tmp_path / f"{split}-v2.0.json").write_text(content)
    same = run_data(config(tmp_path, name="squad", tokenizer=f"file:{folder}"))
    assert same.fingerprint() == ours.fingerprint()
    assert not same.spec.inputs.unanswerable
    bad = {"data": [{"paragraphs": [{"context": "x"}, 3]}, {"title": ""}]}
    (tmp_path / "train-v2.0.json").write_text(json.dumps(bad))
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path, name="squad", tokenizer=f"file:{folder}"))
    text = str(error.value)
    assert "data[0].paragraphs[0] has no list 'qas'" in text
    assert "data[0].paragraphs[1] is no object" in text
    assert "data[1] has no list 'paragraphs'" in text


def test_what_is_wrong_with_questions_is_told_at_once(folder, tmp_path):
    questions.write(tmp_path)
    right = {"question": "which tool ?", "context": "in town saw ."}
    wrong = [
        {"text": ["saw"], "answer_start": [7]},
        {"text": ["drill"], "answer_start": [0]},
        {"text": [" "], "answer_start": [0]},
        {"text": ["saw"], "answer_start": ["8"]},
        {"text": ["saw"], "answer_start": []},
        "saw",
        None,
    ]
    lines = [json.dumps({**right, "answers": value}) for value in wrong]
    lines.append(json.dumps({"question": 3, "context": " ", "answers": []}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path))
    told = str(error.value).splitlines()
    assert len(told) == 10
    for number, text in (
        (1, "the answer 'saw' is not at character 7; it is at 8"),
        (2, "the answer 'drill' is not at character 0; the passage does not have it"),
        (3, "the answer ' ' is no text"),
        (4, "'answer_start' is '8', not the number of a character"),
        (5, "'answers' is {'text': ['saw'], 'answer_start': []}, not such as"),
        (6, "'answers' is 'saw', not such as"),
        (7, "'answers' is None, not such as"),
        (8, "'question' is 3, not a text"),
        (8, "'context' is empty"),
    ):
        assert any(f"train.jsonl, line {number}: {text}" in line for line in told), text
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "a", "text": "b"}))
    with pytest.raises(UserError, match="no column 'context'"):
        run_data(config(tmp_path))
    with pytest.raises(UserError, match="no column 'answers'"):
        run_data(config(tmp_path, text=("question", "text")))


def test_a_question_that_leaves_no_room_and_options_that_do_not_fit(folder, tmp_path):
    questions.write(tmp_path)
    row = {"context": "saw .", "answers": []}
    lines = [json.dumps({**row, "question": "which " * n}) for n in (29, 28, 40)]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        run_data(config(tmp_path))
    text = str(error.value)
    assert "dev.jsonl, line 1: the question takes 32 of max_tokens=32 tokens" in text
    assert "line 3: the question takes 43" in text and "line 2" not in text
    with pytest.raises(UserError, match="answers need two columns"):
        run_data(config(folder, text=("question",)))
    with pytest.raises(UserError, match="overlap: 17; from 0 to half of max_tokens"):
        run_data(config(folder, overlap=17))
    with pytest.raises(UserError, match="overlap: 4, but only passages have windows"):
        run_data(config(folder, overlap=4, labels="classes"))
    with pytest.raises(UserError, match="config.data.per_class: 2 needs classes"):
        run_data(config(folder, per_class=2))
    with pytest.raises(UserError) as error:
        make_setup(
            config(
                folder,
                model={"pool": "mean", "classes": 3},
                overrides=[
                    ("task.metrics", "('f_1',)"), ("task.max_answer_tokens", "0"),
                ],
            )
        )  # fmt: skip
    text = str(error.value)
    assert "no 'f_1'; did you mean 'f1'?" in text and "model.classes: 3" in text
    assert "max_answer_tokens: 0" in text and "config.model.pool" in text
    with pytest.raises(
        UserError, match="data.labels, for the task 'text': no 'answers'"
    ):
        metric_names(config(folder, overrides=[("task.name", "text")]))
    with pytest.raises(
        UserError, match="'qa' takes text with answers, but the data is"
    ):
        small.task_of(config(folder), small.spec())


def test_no_split_has_a_part_of_a_question_of_another(tmp_path):
    folder = questions.write(tmp_path, (("train", 40),), longest=30)
    fields = {"max_tokens": 16, "train": "train[:50%]", "validation": "train[50%:]"}
    data = run_data(config(folder / "train.jsonl", tokenizer=f"file:{folder}",
                           test=None, **{**fields, "train": "all[:50%]",
                                         "validation": "all[50%:]"}))  # fmt: skip
    parts = [data.train, data.held_out["validation"]]
    mine = [[note.question for note in part.on_host()["note"]] for part in parts]
    assert not {id(one) for one in mine[0]} & {id(one) for one in mine[1]}
    for part, owners in zip(parts, mine):
        assert len(part) > len({id(one) for one in owners}) == 20
        runs = [a for a, b in zip(owners, [*owners[1:], None]) if a is not b]
        assert len(runs) == 20  # Windows of a question stand one after another.


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = questions.write(
        tmp_path_factory.mktemp("learned"),
        (("train", 400), ("dev", 60), ("test", 60)),
        none=4,
    )
    plan = (
        Phase(name="all", steps=250, peak_lr=1e-2, optimizer="adam", warmup_steps=20),
    )
    found = config(folder, plan=plan, max_tokens=18, overlap=6, buckets=(18,))
    return folder, folder / "run", found, run(found, folder / "run")


def predicted(config, workdir, *inputs):
    output = workdir / "found.jsonl"
    options = Options(
        config="", workdir=workdir, inputs=tuple(map(str, inputs)), output=str(output)
    )
    predict_mode.main(config, options)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_learned_over_windows(learned):
    _, _, _, result = learned
    assert result["test/f1"] > 0.9 and result["test/exact_match"] > 0.85


@pytest.mark.slow
def test_predictions_have_the_answer_its_characters_and_a_score(learned, tmp_path):
    folder, workdir, given, result = learned
    rows = questions.rows(60, seed=2, none=4)
    found = predicted(given, workdir, folder / "test.jsonl")
    assert [line.pop("file") for line in found] == [
        f"{folder / 'test.jsonl'}#{n + 1}" for n in range(60)
    ]
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    scores = match_scores(
        [line["answer"] for line in found], [row["answers"]["text"] for row in rows]
    )
    assert scores["f1"] == pytest.approx(result["test/f1"])
    for line, row in zip(found, rows):
        if line["answer"]:
            assert row["context"][line["start"] : line["end"]] == line["answer"]
        else:
            assert line["start"] is None is line["end"]
        assert 0 <= line["score"] <= 1
    (tmp_path / "squad.json").write_text(json.dumps(questions.as_squad(rows)))
    columns = [f"{row['question']}\t{row['context']}" for row in rows]
    (tmp_path / "rows.tsv").write_text("\n".join(["question\tcontext", *columns]))
    again = predicted(given, workdir, tmp_path / "squad.json", tmp_path / "rows.tsv")
    answers = [line["answer"] for line in found]
    assert [line["answer"] for line in again] == answers * 2
    ask = pipeline(workdir)
    asked = [{key: row[key] for key in ("question", "context")} for row in rows[:5]]
    assert [line["answer"] for line in ask(asked)] == answers[:5]
    one = ask(asked[1])
    assert one == {k: v for k, v in ask(asked)[1].items()} and set(one) == {
        "answer", "start", "end", "score",
    }  # fmt: skip
    with pytest.raises(UserError, match="takes dicts with 'question' and 'context'"):
        ask("which tool ?")
    with pytest.raises(UserError, match="inputs, number 1: 'context' is empty"):
        ask([asked[0], {"question": "x", "context": ""}])
    (tmp_path / "a.txt").write_text("which tool ?\n")
    with pytest.raises(UserError, match="It takes .tsv, .csv, .jsonl, .json"):
        predicted(given, workdir, tmp_path / "a.txt")


@pytest.mark.slow
def test_an_export_gives_the_span_that_evaluation_finds(learned, tmp_path):
    folder, workdir, given, _ = learned
    output = tmp_path / "export"
    export_mode.main(
        given,
        Options(config="", workdir=workdir, formats=("jax",), output=str(output)),
    )
    from jax import export

    call = export.deserialize((output / "model.jax").read_bytes()).call
    task = make_setup(given).task
    data = run_data(given).held_out["test"]
    batch = data.take(np.arange(7))
    found = call(batch["inputs"])
    assert set(found) == {"start", "end", "none", "probability"}
    again = call(batch["inputs"][:3])
    np.testing.assert_array_equal(again["start"], found["start"][:3])
    mask = np.asarray(task.prepare(batch, None, None)["inputs"]["mask"])
    for row in range(7):
        assert (mask[row, found["start"][row] : found["end"][row] + 1] == 2).all()
