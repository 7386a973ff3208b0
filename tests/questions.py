"""Small passages with questions whose answers are known, and a tokenizer for them."""

import json

import numpy as np
import texts

COLOURS = ("red", "blue", "green", "grey")
SHADES = ("dark", "light")
TOOLS = ("hammer", "saw", "drill", "pliers")
OTHERS = ("it", "in", "town", "and", "then", "left", "again", "home")
WORDS = (*COLOURS, *SHADES, *TOOLS, *OTHERS, "which", "colour", "tool", "?", ".", ",")


def tokenizer():
    """Returns what a tokenizer.json holds that knows the words."""
    return texts.tokenizer(WORDS)


def rows(count, seed=0, longest=12, none=0):
    """Returns questions, each on a passage with one colour and one tool.

    Args:
        count: How many.
        seed: Of what is drawn.
        longest: Other words of a passage.
        none: Every so many questions have no answer; 0: all have one.
    """
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        asked = ("colour", "tool")[index % 2]
        shade = [str(rng.choice(SHADES))] if rng.random() < 0.5 else []
        answers = {
            "colour": " ".join([*shade, str(rng.choice(COLOURS))]),
            "tool": str(rng.choice(TOOLS)),
        }
        is_none = none > 0 and index % none == 0
        told = [text for kind, text in answers.items() if not is_none or kind != asked]
        others = rng.choice(OTHERS, rng.integers(4, longest)).tolist()
        passage = " ".join(rng.permutation([*others, *told])) + " ."
        right = answers[asked]
        given = {"text": [], "answer_start": []}
        if not is_none:
            given = {"text": [right], "answer_start": [passage.index(right)]}
        found.append(
            {
                "id": f"{seed}-{index}",
                "question": f"which {asked} ?",
                "context": passage,
                "answers": given,
            }
        )
    return found


def write(folder, sizes=(("train", 60), ("dev", 20), ("test", 20)), **fields):
    """Writes a folder with the splits and a tokenizer; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(sizes):
        lines = [json.dumps(row) for row in rows(count, seed, **fields)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


def as_squad(given):
    """Returns the same questions as SQuAD's files have them."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": begin}
                        for text, begin in zip(*row["answers"].values())
                    ],
                    "is_impossible": not row["answers"]["text"],
                }
            ],
        }
        for row in given
    ]
    return {"version": "v2.0", "data": [{"title": "Told", "paragraphs": paragraphs}]}


def write_squad(folder, sizes=(("train", 60), ("dev", 20))):
    """Writes SQuAD's files and a tokenizer; returns the folder of the files."""
    inner = folder / "squad"
    inner.mkdir(parents=True)
    for seed, (split, count) in enumerate(sizes):
        content = json.dumps(as_squad(rows(count, seed)))
        (inner / f"{split}-v1.1.json").write_text(content)
    (folder / "tokenizer.json").write_text(tokenizer())
    return inner
