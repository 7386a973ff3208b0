"""Claim: from a weight file to ready parameters takes no longer than in torch.

.venv/bin/python scripts/bench_loading.py [--rounds=5]

Writes safetensors of a ResNet-50 and a ViT-B/16 of torchvision and of a BERT-base of
transformers, with random weights, and turns them into parameters, each time in a process of
its own, ours and torch's in turn, whoever was second first in the next round.

Ours is what a run does: trace the model for its shapes, read the file and its digest,
report misfits, and put every leaf on the device. Torch's is
`Model(); load_state_dict(load_file(FILE))`, without a digest. At the end both read each
page of each parameter, in numpy. Imports and the start of jax's devices are not counted.
Prints medians and ratios of wall time and of process time, and the largest anonymous memory
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

PAGE = 1024  # Values of four bytes in a page of memory.
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
    """Seconds by the clock and of a core, and anonymous memory above that before."""

    def __enter__(self):
        """Begins."""
        self.memory = self.peak = anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        self.begin, self.cpu = time.perf_counter(), time.process_time()
        return self

    def _look(self):
        while not self.over.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *error):
        """Ends."""
        self.wall_s = time.perf_counter() - self.begin
        self.core_s = time.process_time() - self.cpu
        self.over.set()
        self.thread.join()
        self.peak = max(self.peak, anonymous()) - self.memory


def ours(name: str, file: str) -> Watch:
    """Loads a file into our model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from finetune_jax import models
    from finetune_jax.core import registry
    from finetune_jax.core.machine import uncollected
    from finetune_jax.tasks.components.text_inputs import tokens
    from finetune_jax.weights.addresses import read_weights
    from finetune_jax.weights.layout import layouts
    from finetune_jax.weights.merge import load_weights

    registry.modules(models)
    layouts()
    jax.devices()
    size, classes, _, _ = MODELS[name]
    with Watch() as watch:
        model = models.make_model(name, {"head": {}}, classes=classes)

        def init():
            x = tokens(jnp.ones((1, 2, 2), jnp.int32))
            if size is not None:
                x = jnp.zeros((1, size, size, 3))
            return model.init(jax.random.key(0), x, train=False)

        with uncollected():
            shapes = jax.eval_shape(init)
        weights = read_weights(f"file:{file}")
        variables = jax.device_put(load_weights(shapes, weights))
        leaves = jax.tree.leaves(jax.block_until_ready(variables))
        assert all(np.ravel(leaf)[::PAGE].sum() < np.inf for leaf in leaves)
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
    import numpy as np
    from oracles import import_torchvision, import_transformers  # type: ignore
    from safetensors.torch import load_file

    import_torchvision()
    getattr(import_transformers(), "BertForSequenceClassification")  # noqa: B009
    with Watch() as watch:
        made = module(name)
        made.load_state_dict(load_file(file))
        leaves = [p.detach().numpy() for p in made.state_dict().values()]
        assert all(np.ravel(leaf)[::PAGE].sum() < np.inf for leaf in leaves)
    return watch


def measured(kind: str, name: str, file: pathlib.Path) -> tuple[float, ...]:
    """Returns wall and process time in seconds, and memory as a multiple of the file."""
    command = [sys.executable, __file__, f"--one={kind}", f"--name={name}"]
    found = subprocess.run(
        [*command, f"--file={file}"], check=True, capture_output=True, text=True
    )
    *seconds, peak = json.loads(found.stdout.splitlines()[-1])
    return *seconds, peak / file.stat().st_size


def line(name: str, file: pathlib.Path, rounds: list[dict]) -> str:
    """Returns what was found for a model."""

    def median(kind: str, place: int) -> float:
        return statistics.median(found[kind][place] for found in rounds)

    def ratio(place: int) -> str:
        ratios = [found["ours"][place] / found["torch"][place] for found in rounds]
        return (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )

    peaks = [max(found[kind][2] for found in rounds) for kind in ("ours", "torch")]
    return (
        f"{name} ({file.stat().st_size / 1e6:.0f} MB): ours {median('ours', 0):.2f} s, "
        f"torch {median('torch', 0):.2f} s, ratio {ratio(0)}; process time "
        f"{median('ours', 1):.2f} s and {median('torch', 1):.2f} s, ratio {ratio(1)}; "
        f"anonymous memory {peaks[0]:.2f} and {peaks[1]:.2f} files"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("one", "name", "file"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        watch = {"ours": ours, "torch": torchs}[given.one](given.name, given.file)
        print(json.dumps([watch.wall_s, watch.core_s, watch.peak]))
        return
    from safetensors.torch import save_file

    root = pathlib.Path(tempfile.mkdtemp(prefix="bench_loading-"))
    for name in MODELS:
        file = root / f"{name}.safetensors"
        save_file(module(name).state_dict(), file)
        rounds = []
        for index in range(given.rounds):
            kinds = ("ours", "torch") if index % 2 == 0 else ("torch", "ours")
            rounds.append({kind: measured(kind, name, file) for kind in kinds})
        print(line(name, file, rounds), flush=True)
        file.unlink()


if __name__ == "__main__":
    main()
