"""A new head on frozen EfficientNet-Lite0, in plain PyTorch with timm.

.venv/bin/python experiments/comparison/photos_timm.py PHOTOS WEIGHTS [--epochs=10]

PHOTOS has one folder of photos per class; WEIGHTS is a folder that `--mode=export
--layout=timm` wrote, whose head is replaced. This is the loop that most tutorials have: the
frozen network runs in every epoch. The split is that of scikit-learn, 60, 20 and 20 %.
"""

import argparse
import pathlib
import time
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config


def main() -> None:
    """Trains, and prints validation and test accuracy and the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=pathlib.Path)
    parser.add_argument("weights")
    parser.add_argument("--epochs", type=int, default=10)
    flags = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    names = sorted(path.name for path in flags.photos.iterdir() if path.is_dir())
    files = [(p, names.index(p.parent.name)) for p in sorted(flags.photos.glob("*/*"))]
    labels = [label for _, label in files]
    train, rest = train_test_split(
        files, test_size=0.4, stratify=labels, random_state=0
    )
    validation, test = train_test_split(
        rest, test_size=0.5, stratify=[label for _, label in rest], random_state=0
    )
    model: Any = timm.create_model(f"local-dir:{flags.weights}", pretrained=True)
    model.reset_classifier(len(names))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    model.eval()  # Running averages of BatchNorm stay as they are.
    settings = resolve_model_data_config(model)
    transform: Any = create_transform(**settings, is_training=False)

    def batches(examples, shuffle=False):
        order = (
            torch.randperm(len(examples)) if shuffle else torch.arange(len(examples))
        )
        for rows in order.split(32):
            chosen = [examples[int(row)] for row in rows]
            images = [transform(Image.open(path).convert("RGB")) for path, _ in chosen]
            yield torch.stack(images), torch.tensor([label for _, label in chosen])

    def accuracy(examples):
        with torch.no_grad():
            right = sum((model(x).argmax(-1) == y).sum() for x, y in batches(examples))
        return float(right) / len(examples)

    optimizer = torch.optim.Adam(model.get_classifier().parameters(), lr=1e-3)
    best = 0.0, 0.0
    for epoch in range(flags.epochs):
        for x, y in batches(train, shuffle=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        best = max(best, (accuracy(validation), accuracy(test)))
        print(f"epoch {epoch + 1}: best {best}, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
