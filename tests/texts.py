"""Small texts, and a tokenizer that knows their words."""

import json

import numpy as np

WORDS = (
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "dull",
    "film",
    "plot",
    "the",
    "a",
    "is",
)
GOOD = 3  # The first words are good, as many after them bad.


def tokenizer(words=WORDS):
    """Returns what a tokenizer.json holds, made as those of BERT are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words)
    vocabulary = {word: index for index, word in enumerate(known)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made.to_str()


def rows(count, seed=0, longest=9):
    """Returns sentences and labels: '1' where the words are good."""
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        label = index % 2
        told = WORDS[:GOOD] if label else WORDS[GOOD : 2 * GOOD]
        others = rng.choice(WORDS[2 * GOOD :], rng.integers(1, longest))
        words = [*others, told[rng.integers(GOOD)]]
        found.append((" ".join(rng.permutation(words)), str(label)))
    return found


def write(folder, suffix="tsv", sizes=(("train", 40), ("dev", 20), ("test", 20))):
    """Writes a folder with the splits and a tokenizer; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(sizes):
        lines = []
        for text, label in rows(count, seed):
            if suffix == "jsonl":
                lines.append(json.dumps({"sentence": text, "label": int(label)}))
            else:
                lines.append(f"{text}{'	' if suffix == 'tsv' else ','}{label}")
        (folder / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


def write_tagged(
    folder,
    sizes=(("train", 40), ("dev", 20), ("test", 20)),
    columns=("words", "tags"),
):
    """Writes such a folder of sentences whose good words are entities; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(sizes):
        lines = []
        for text, _ in rows(count, seed):
            words = text.split()
            tags = ["B-GOOD" if word in WORDS[:GOOD] else "O" for word in words]
            lines.append(json.dumps(dict(zip(columns, (words, tags)))))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder
