"""`README.md` of an export: the model, its results, and how each file is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# How programs are loaded: the kinds of data that are not texts, and texts.
_ARRAYS = {
    "jax": """\
`model.jax` has program and weights, takes inputs as files have them (they are scaled and
normalised inside) and runs on CPU and CUDA, in batches of any size. It needs jax, numpy and
flatbuffers, and `load.py`:""",
    "onnx": "`model.onnx` takes the same inputs:",
}
_TEXTS = {
    "jax": """\
`model.jax` has program and weights, and runs on CPU and CUDA, for batches of any size and
texts of any length up to the longest. It needs jax, numpy and flatbuffers, and `load.py`;
tokenizers makes the inputs:""",
    "onnx": "`model.onnx` takes the same inputs, padded to the longest:",
}
_TOKENS = """\
import numpy as np
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens})
tokenizer.enable_padding({padding})
found = tokenizer.encode_batch([{example}])
mask = np.array([text.attention_mask for text in found])
ids = np.array([text.ids for text in found]) * mask
sentences = (np.array([text.type_ids for text in found]) + 1) * mask
inputs = np.stack([ids, sentences], axis=1).astype(np.int32)"""
_CODE = {
    "jax": """\
from load import load

model = load()
print(model(inputs)["{output}"])""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
print(session.run(["{output}"], {{"inputs": inputs}})[0])""",
}


def make_card(
    *,
    manifest: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    about: Mapping[str, Any],
    step: int,
    advice: Mapping[str, str],
    formats: Sequence[str],
) -> str:
    """Returns the text.

    Args:
        manifest: `manifest.json` of the run.
        result: `result.json`; None while the run is not finished.
        about: Content of `model.json`.
        step: Step of the checkpoint.
        advice: How to load what depends on the model, by format.
        formats: Formats that were written.
    """
    config = manifest["config"]
    name, task = config["model"]["name"], config["task"]["name"]
    init = config["init"]["pretrained"] or "random weights"
    parts = [
        f"---\ntags:\n- finetune_jax\n- {name}\n---",
        f"# {name}, {task}",
        f"The checkpoint of step {step} of a run of finetune_jax "
        f"{manifest['packages'].get('finetune_jax')}, which began with {init}.",
        _labels(about),
        "## Metrics",
        _metrics(result, step),
        "## Inputs",
        _inputs(about),
        "## Files",
    ]
    advice = {**_of_programs(about), **advice}
    parts += [advice[key] for key in formats]
    parts += [
        "`model.json` has labels, inputs and preprocessing for programs.",
        "## Training",
        _plan(config["plan"]),
        _data(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_programs(about: Mapping[str, Any]) -> dict[str, str]:
    """Returns how a program is loaded and gets its inputs, by format."""
    output, text = next(reversed(about["outputs"])), about.get("text")
    said, found = _TEXTS if text else _ARRAYS, {}
    for key, code in _CODE.items():
        shape, dtype = (1, *about["inputs"]["shape"]), about["inputs"]["dtype"]
        inputs = f"import numpy as np\n\ninputs = np.zeros({shape}, {dtype!r})"
        if text:
            inputs = _TOKENS.format(
                max_tokens=text["max_tokens"],
                padding="" if key == "jax" else f"length={text['max_tokens']}",
                example='"A text."'
                if text["sentences"] == 1
                else '("One.", "Another.")',
            )
        code = code.format(output=output)
        found[key] = f"{said[key]}\n\n```python\n{inputs}\n\n{code}\n```"
    return found


def _labels(about: Mapping[str, Any]) -> str:
    if "labels" in about:
        labels = about["labels"]
        listed = ", ".join(labels)
        text = f"It tells {len(labels)} classes apart, in this order: {listed}."
        if "threshold" in about:
            text += (
                f" {labels[1]} is predicted from a probability of "
                f"{about['threshold']:.4g}, a threshold chosen on validation; the outputs "
                "are the probabilities, so apply it to them."
            )
        return text
    return f"It predicts {', '.join(about['targets'])}." if "targets" in about else ""


def _metrics(result: Mapping[str, Any] | None, step: int) -> str:
    """Returns a table, a row a split, of the checkpoint that is exported."""
    if result is None:
        return "The run is not finished; it has no result yet."
    found = result["final"] if step == result["steps"] else result["best"]
    rows: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        split, _, metric = key.rpartition("/")
        rows.setdefault(split, {})[metric] = value
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    body = [
        [split, *(f"{row[c]:.4f}" if c in row else "" for c in columns)]
        for split, row in rows.items()
    ]
    if not body:
        return "Nothing was measured."
    chosen = (
        "" if result["best_step"] is None else " `validation` chose the checkpoint."
    )
    return _table(["split", *columns], body) + (f"\n{chosen}" if chosen else "")


def _inputs(about: Mapping[str, Any]) -> str:
    inputs, looks = about["inputs"], about.get("preprocessing")
    text = f"{inputs['dtype']} of shape {[None, *inputs['shape']]}"
    if "text" in about:
        return (
            f"{text}: token ids, and at each token the number of its sentence, from 1; "
            f"both are 0 behind the end of a text. `tokenizer.json` makes them; a text "
            f"has {about['text']['max_tokens']} tokens at most, and what is longer is "
            "cut."
        )
    if looks is None:
        return f"{text}: as the data have them; the model normalises them itself."
    height, width, channels = inputs["shape"]
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    if looks["resize"] is None:
        how = f"resized to {width}x{height} ({looks['interpolation']}, antialiased)"
    else:
        how = (
            f"resized so that the shorter side is {looks['resize']} "
            f"({looks['interpolation']}, antialiased), and the centre of "
            f"{width}x{height} cut out"
        )
    return (
        f"{text}: images, {colour}, {how}. Where bytes are taken, the model scales them to "
        f"[0, 1] and normalises them itself, by mean {looks['mean']} and deviation "
        f"{looks['std']}."
    )


def _plan(plan: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for phase in plan:
        length = next(
            (f"{phase[k]} {k}" for k in ("steps", "epochs") if phase[k] is not None), ""
        )
        learns = [f"`{rule}` x {scale:g}" for rule, scale in phase["rules"] if scale]
        rate = phase["peak_lr"]
        rows.append(
            [
                phase["name"],
                length,
                ", ".join(learns).replace("|", "\\|"),
                phase["optimizer"],
                f"{rate:g}" if isinstance(rate, int | float) else str(rate),
                str(phase["schedule"]),
                f"{phase['weight_decay']:g}",
                phase["batch_stats"],
            ]
        )
    head = (
        "phase", "length", "learns", "optimizer", "rate", "schedule", "decay", "BatchNorm",
    )  # fmt: skip
    return _table(head, rows)


def _data(manifest: Mapping[str, Any]) -> str:
    data, config = manifest["data"], manifest["config"]["data"]
    lines = [
        f"- data: `{config['name']}`, {sum(data['train_counts']):,} examples of "
        f"`{config['train']}`, in batches of {config['batch_size']}; fingerprint "
        f"`{manifest['data_fingerprint']}`",
        f"- seed: {manifest['seed']}; precision: {manifest['config']['precision']}",
    ]
    for path, sha256 in manifest["weights_sha256"].items():
        lines.append(f"- began with `{path}`, sha256 `{sha256}`")
    if commit := manifest["git"]:
        dirty = ", changed since" if commit["dirty"] else ""
        lines.append(f"- code: commit `{commit['commit']}`{dirty}")
    kept = [f"{name} {manifest['packages'][name]}" for name in ("jax", "flax", "optax")]
    lines.append(f"- with {', '.join(kept)} on {manifest['device_kind']}")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown.

    >>> print(_table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
