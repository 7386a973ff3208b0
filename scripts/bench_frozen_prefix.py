"""Claim: a head on a frozen backbone costs one forward pass, however many epochs.

.venv/bin/python scripts/bench_frozen_prefix.py --data=FOLDER [--photos=512] [--epochs=50]

FOLDER has photos, a folder a class. Trains a head on a frozen ResNet-50 at 224 pixels with
the command of this project, start-up, decoding and compiling included, with an empty cache
and then again; times forward passes of the same photos, one batch after another, before and
after it; and times two epochs of a plain PyTorch loop (frozen, eval mode, channels last,
photos decoded before) on the same weights, from which its time is extrapolated. A head of
torch is trained to the end on the same features, from the same start and in the same order,
to compare the accuracies. Needs torch and torchvision (`make oracles`). Weights are random:
no cost depends on them.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

# At higher rates the head is chaotic: a last bit moves the accuracy by six points.
RATE, BATCH = 1e-6, 16
# A table is computed in batches of a multiple of so many.
ROWS = 24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg: str = ""):
    """Returns the config; `arg` is photos,epochs,weights,folder."""
    from finetune_jax import config as configs
    from finetune_jax.plans.phase import Phase, as_config

    photos, epochs, weights, folder = arg.split(",")
    config = configs.default()
    config.data.update(
        name="folder", dir=folder, train=f"train[:{photos}]", test="test[:25%]",
        batch_size=BATCH, image_size=224, resize=256, mean=MEAN, std=STD,
    )  # fmt: skip
    config.model.name = "resnet50"
    config.init.pretrained, config.init.fresh = f"file:{weights}", ("head/.*",)
    head = Phase(
        name="head", epochs=float(epochs), optimizer="sgd", schedule="constant",
        optimizer_args={"momentum": 0.9}, peak_lr=RATE, batch_stats="hold",
        rules=(("head/.*", 1.0), (".*", 0.0)),
    )  # fmt: skip
    config.plan = as_config((head,))
    config.evaluate.batch_size = 2 * ROWS
    return config


def ours(address: str, workdir: pathlib.Path) -> float:
    """Returns the seconds that the command takes."""
    command = [
        sys.executable, "-m", "finetune_jax.main", f"--config={__file__}:{address}",
        f"--workdir={workdir}",
    ]  # fmt: skip
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - begin


def read(address: str):
    """Returns (setup, state, photos by split, batches of two epochs) of the run."""
    from finetune_jax import config as configs
    from finetune_jax.data.batches import training_batches
    from finetune_jax.training.setup import make_setup

    config, problems = configs.resolve(configs.load(f"{__file__}:{address}"))
    assert not problems, problems
    setup = make_setup(config)
    state, _ = setup.start()
    parts = (setup.data.train, setup.data.held_out["test"])
    photos = [part.take(np.arange(len(part)))["inputs"] for part in parts]
    batches = training_batches(
        setup.data.in_memory(1e12).train, seed=0, batch_size=BATCH, micro_batches=1,
        updates=range(2 * -(-len(photos[0]) // BATCH)),
    )  # fmt: skip
    return setup, state, photos, list(batches)


def forward_seconds(setup, state, photos: np.ndarray) -> float:
    """Returns the seconds of a compiled forward pass over the photos."""
    import functools

    import jax

    from finetune_jax.evaluation.eval_step import eval_step

    step = jax.jit(functools.partial(eval_step, task=setup.task))
    whole = len(photos) // BATCH * BATCH
    batches = [
        {
            "inputs": photos[at : at + BATCH],
            "position": np.arange(BATCH, dtype=np.int32),
        }
        for at in range(0, whole, BATCH)
    ]
    fixed = (state.params, state.batch_stats)
    jax.block_until_ready(step(*fixed, batches[0]))
    begin = time.perf_counter()
    for batch in batches:
        jax.block_until_ready(step(*fixed, batch))
    return (time.perf_counter() - begin) * len(photos) / whole


def torch_loop(weights: str, classes: int, batches: list) -> list[float]:
    """Returns the seconds of two epochs of the plain loop."""
    import torch  # type: ignore[import-not-found]
    from oracles import import_torchvision  # type: ignore[import-not-found]

    torchvision = import_torchvision()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torchvision.models.resnet50()
    model.load_state_dict(torch.load(weights))
    model.fc = torch.nn.Linear(2048, classes)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    model.eval().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=RATE, momentum=0.9)
    loss_of = torch.nn.CrossEntropyLoss()
    ready = []
    for batch in batches:
        x = batch["inputs"][0] / np.float32(255)
        x = (x - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        x = torch.from_numpy(x.transpose(0, 3, 1, 2))
        x = x.contiguous(memory_format=torch.channels_last)
        ready.append((x, torch.from_numpy(batch["label"][0]).long()))
    half, epochs_s = len(ready) // 2, []
    for part in (ready[:half], ready[half:]):
        begin = time.perf_counter()
        for x, label in part:
            loss = loss_of(model(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epochs_s.append(time.perf_counter() - begin)
    return epochs_s


def torch_accuracy(setup, state, epochs: int) -> float:
    """Returns the test accuracy of torch's head on the same features, trained as ours."""
    import torch  # type: ignore[import-not-found]

    from finetune_jax import config as configs
    from finetune_jax.data.order import training_order
    from finetune_jax.features.cache import frozen_prefix
    from finetune_jax.report.terminal import Terminal
    from finetune_jax.training.assembly import make_store

    store = make_store(setup, Terminal())
    assert store is not None
    mode = setup.phase(len(setup.plan) - 1).mode
    prefix = frozen_prefix(setup.task, state, mode)
    assert prefix is not None and prefix.first == "head"
    parts = (setup.data.train, setup.data.held_out["test"])
    found = []
    for part in parts:
        found.append(store.table(part, prefix, batch_size=ROWS))
        assert found[-1] is not None
    features = [torch.tensor(np.asarray(part.table)) for part in found]
    labels = [torch.from_numpy(part.label).long() for part in found]
    start = state.params["head"]["logits"]
    head = torch.nn.Linear(*start["kernel"].shape)
    head.load_state_dict(
        {
            "weight": torch.tensor(start["kernel"]).T,
            "bias": torch.tensor(start["bias"]),
        }
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE, momentum=0.9)
    order = training_order(found[0].label, configs.seeds(setup.config)["order"])
    for update in range(-(-epochs * len(labels[0]) // BATCH)):
        rows = order(update * BATCH, (update + 1) * BATCH)
        loss = torch.nn.functional.cross_entropy(
            head(features[0][rows]), labels[0][rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((head(features[1]).argmax(dim=1) == labels[1]).double().mean())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=50)
    given = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="bench_frozen_prefix-"))
    os.environ["FINETUNE_JAX_CACHE"] = str(root / "cache")
    os.environ.setdefault("NPROC", str(len(os.sched_getaffinity(0))))
    import torch  # type: ignore[import-not-found]
    from oracles import import_torchvision  # type: ignore[import-not-found]

    torchvision = import_torchvision()
    torch.manual_seed(0)
    weights = str(root / "resnet50.pth")
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    address = f"{given.photos},{given.epochs},{weights},{given.data}"
    setup, state, photos, batches = read(address)
    photos, seconds = np.concatenate(photos), []
    passes = [forward_seconds(setup, state, photos)]
    for number, name in enumerate(("first", "second")):
        workdir = root / f"run-{number}"
        seconds.append(ours(address, workdir))
        passes.append(forward_seconds(setup, state, photos))
        result = json.loads((workdir / "result.json").read_text())
        forward = (passes[-2] + passes[-1]) / 2
        print(
            f"{name} run {seconds[-1]:.1f} s = {seconds[-1] / forward:.2f} forward passes "
            f"of {len(photos)} photos ({passes[-2]:.1f} s before, {passes[-1]:.1f} s "
            f"after); test accuracy {result['test/accuracy']:.4f}",
            flush=True,
        )
    accuracy = torch_accuracy(setup, state, given.epochs)
    print(f"torch's head, trained alike: test accuracy {accuracy:.4f}", flush=True)
    epochs_s = torch_loop(weights, len(setup.data.spec.class_names), batches)
    theirs = min(epochs_s) * given.epochs
    print(
        f"torch: epochs of {epochs_s[0]:.1f} and {epochs_s[1]:.1f} s, {given.epochs} of "
        f"them {theirs:.0f} s = {theirs / seconds[0]:.1f} first runs"
    )


if __name__ == "__main__":
    main()
