"""Claim: from a weight file to ready parameters takes no longer than in torch.

python scripts/bench_loading.py [--rounds=3]

Writes safetensors of a ResNet-50 and a ViT-B/16 of torchvision and of a BERT-base of
transformers, with random weights, and turns them into parameters, each time in a process of
its own: ours (shapes, file, digest, every leaf as we keep it), and torch's
`Model(); load_state_dict(load_file(FILE))`; every page is touched at the end. Imports are
not counted. Prints the ratio of the times, and the anonymous memory that each took at most,
as a multiple of the file. Needs torch, torchvision and transformers (`make oracles`).
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

# Ours, with the argument that makes it whole, and the libraries of theirs.
MODELS = {
    "resnet50": (224, 1000, "torchvision", "resnet50"),
    "vit_base_patch16": (224, 1000, "torchvision", "vit_b_16"),
    "bert_base": (None, 2, "transformers", "BertForSequenceClassification"),
}


def anonymous() -> int:
    """Returns the bytes of memory that are no file's. Linux."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Watch:
    """Seconds, and the most anonymous memory above that at the beginning."""

    def __enter__(self):
        """Begins."""
        self.before = self.peak = anonymous()
        self.over, self.begin = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while not self.over.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *error):
        """Ends."""
        self.seconds = time.perf_counter() - self.begin
        self.over.set()
        self.thread.join()
        self.peak = max(self.peak, anonymous()) - self.before


def ours(name: str, file: str) -> Watch:
    """Loads a file into our model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from finetune_jax.encoders import tokens
    from finetune_jax.models import make_model
    from finetune_jax.pretrained.addresses import read_weights
    from finetune_jax.pretrained.load import load_weights

    size, classes, _, _ = MODELS[name]
    with Watch() as watch:
        model = make_model(name, {"head": {}}, classes=classes)
        x = tokens(jnp.ones((1, 2, 2), jnp.int32))
        if size is not None:
            x = jnp.zeros((1, size, size, 3))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
        variables = load_weights(shapes, read_weights(f"file:{file}"))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    return watch


def module(name: str):
    """Returns torch's module."""
    from oracles import import_torchvision, import_transformers  # type: ignore

    _, _, library, theirs = MODELS[name]
    if library == "torchvision":
        return getattr(import_torchvision().models, theirs)()
    transformers = import_transformers()
    return getattr(transformers, theirs)(transformers.BertConfig())


def torchs(name: str, file: str) -> Watch:
    """Loads a file into torch's module."""
    import torch  # type: ignore[import-not-found]
    from oracles import import_torchvision, import_transformers  # type: ignore
    from safetensors.torch import load_file

    import_torchvision()
    getattr(import_transformers(), "BertForSequenceClassification")  # noqa: B009
    with Watch() as watch:
        made = module(name)
        made.load_state_dict(load_file(file))
        assert all(torch.isfinite(p).all() for p in made.state_dict().values())
    return watch


def measured(kind: str, name: str, file: pathlib.Path) -> tuple[float, float]:
    """Returns seconds, and memory as a multiple of the file, of a process."""
    command = [sys.executable, __file__, f"--one={kind}", f"--name={name}"]
    found = subprocess.run(
        [*command, f"--file={file}"], check=True, capture_output=True, text=True
    )
    seconds, peak = json.loads(found.stdout.splitlines()[-1])
    return seconds, peak / file.stat().st_size


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("one", "name", "file"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        watch = {"ours": ours, "torch": torchs}[given.one](given.name, given.file)
        print(json.dumps([watch.seconds, watch.peak]))
        return
    from safetensors.torch import save_file

    root = pathlib.Path(tempfile.mkdtemp(prefix="bench_loading-"))
    for name in MODELS:
        file = root / f"{name}.safetensors"
        save_file(module(name).state_dict(), file)
        rounds = [
            [measured(kind, name, file) for kind in ("ours", "torch")]
            for _ in range(given.rounds)
        ]
        ratios = [mine[0] / theirs[0] for mine, theirs in rounds]
        seconds = [statistics.median(r[k][0] for r in rounds) for k in (0, 1)]
        peaks = [max(r[k][1] for r in rounds) for k in (0, 1)]
        print(
            f"{name} ({file.stat().st_size / 1e6:.0f} MB): ours {seconds[0]:.2f} s, torch "
            f"{seconds[1]:.2f} s, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} "
            f"to {max(ratios):.2f}); anonymous memory {peaks[0]:.2f} and {peaks[1]:.2f} "
            "files",
            flush=True,
        )


if __name__ == "__main__":
    main()
