"""Extractive question answering: a passage's span that answers a question."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import problems_error
from finetune_jax.core.registry import closest
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.text.questions import Question, Window
from finetune_jax.tasks.components.text_inputs import initial, questions, token_model
from finetune_jax.tasks.objectives.squad import match_scores
from finetune_jax.tasks.task import Mode, Task

# Kinds of data and of labels.
ACCEPTS = (("text", "answers"),)
METRICS = ("exact_match", "f1", "loss")
# Of the start and of the end of an answer.
LOGITS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(Task):
    """Answers questions from passages, window by window.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        max_answer_tokens: No longer span is an answer.
        metric_names: What is measured on a split; 'loss' always is.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    max_answer_tokens: int = 30
    metric_names: tuple[str, ...] = METRICS

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Ids and sentences [2, T], and the places of the answer's first and last token."""
        kind = np.dtype(np.int32)
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, kind),
            "label": jax.ShapeDtypeStruct((2,), kind),
        }

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters, and no batch statistics."""
        return initial(self.models[""], rng)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs as encoders take them."""
        del rng, mode
        return {**batch, "inputs": questions(batch["inputs"])}

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns cross entropy and accuracy of windows as (total, weight) pairs."""
        del fixed, progress
        logits_BxTx2, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        share_BxTx2 = _log_shares(logits_BxTx2, _mask(batch, first))
        weight_B, label_Bx2 = batch["weight"], batch["label"]
        right_B = jnp.all(jnp.argmax(share_BxTx2, axis=1) == label_Bx2, axis=-1)
        weight = jnp.sum(weight_B)
        found = {
            "loss": (
                jnp.sum(_cross_entropy(share_BxTx2, label_Bx2) * weight_B),
                weight,
            ),
            "accuracy": (jnp.sum(right_B * weight_B), weight),
        }
        return found["loss"], (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns the best span of each window, and log probabilities.

        'start' and 'end' are places in the window, 'span' and 'none' the logarithms of how
        probable they are, and that there is no answer; 'loss' is that of the label.
        """
        del fixed
        logits_BxTx2, _ = self.given(params, batch_stats, batch, first=first)
        mask_BxT = _mask(batch, first)
        share_BxTx2 = _log_shares(logits_BxTx2, mask_BxT)
        start_B, end_B, span_B = best_spans(
            share_BxTx2, mask_BxT == 2, self.max_answer_tokens
        )
        return {
            "start": start_B,
            "end": end_B,
            "span": span_B,
            "none": share_BxTx2[:, 0].sum(axis=-1),
            "loss": _cross_entropy(share_BxTx2, batch["label"]),
        }

    def answers(self, outputs: dict) -> dict:
        """Returns the best span, and the probabilities of it and of no answer."""
        return {
            "start": outputs["start"],
            "end": outputs["end"],
            "none": jnp.exp(outputs["none"]),
            "probability": jnp.exp(outputs["span"]),
        }

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns scores over questions, and the loss over windows."""
        predicted, wanted = [], []
        for question, record in self._answered(outputs, batch):
            predicted.append(record["answer"])
            wanted.append(question.answers)
        found = match_scores(predicted, wanted)
        found["loss"] = float(outputs["loss"].astype(np.float64).mean())
        names = dict.fromkeys((*self.metric_names, "loss"))
        return {name: found[name] for name in names}

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the answer to each question, and the characters of the passage.

        'score' is its probability in its window; 'answer' is '' where there is none.
        """
        return [record for _, record in self._answered(outputs, batch)]

    def _answered(
        self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[Question, dict]]:
        """Yields questions and their records, the best of all their windows.

        Source: transformers' pipeline; there is no answer only if no window has one.
        """
        windows: list[Window] = list(batch["note"])
        rows = range(len(windows))
        for _, group in itertools.groupby(rows, lambda row: id(windows[row].question)):
            mine = list(group)
            best = max(mine, key=lambda row: outputs["span"][row])
            question, name = windows[best].question, windows[best].question.name
            span, none = outputs["span"][best], outputs["none"][mine].min()
            start, end = (int(outputs[key][best]) for key in ("start", "end"))
            record = {} if name is None else {"id": name}
            # Where a window has nothing of its passage, the span is the first token.
            if start == 0 or (self._may_be_none and none > span):
                record |= {"answer": "", "start": None, "end": None}
                yield question, {**record, "score": float(np.exp(none))}
                continue
            begin, stop = windows[best].characters(start, end)
            text = question.passage.text[begin:stop]
            record |= {"answer": text, "start": begin, "end": stop}
            yield question, {**record, "score": float(np.exp(span))}

    @property
    def _may_be_none(self) -> bool:
        return self.data.inputs.unanswerable


def _mask(batch: Mapping[str, Any], first: str | None) -> jax.Array:
    """Returns what `questions` made, which all stages pass on."""
    return batch["features" if first else "inputs"]["mask"]


def _log_shares(logits_BxTx2: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Returns logarithms of probabilities of the places that may be chosen.

    They are those of the passage, and the first, which stands for no answer.
    """
    wide = jnp.promote_types(logits_BxTx2.dtype, jnp.float32)
    may_BxT = (mask_BxT == 2) | (jnp.arange(mask_BxT.shape[1]) == 0)[None]
    # Not the least number, so that the sum of two is finite.
    least = jnp.finfo(wide).min / 4
    logits_BxTx2 = jnp.where(may_BxT[..., None], logits_BxTx2.astype(wide), least)
    return jax.nn.log_softmax(logits_BxTx2, axis=1)


def _cross_entropy(share_BxTx2: jax.Array, label_Bx2: jax.Array) -> jax.Array:
    """Returns the mean over start and end, [B]."""
    chosen_Bx1x2 = jnp.take_along_axis(share_BxTx2, label_Bx2[:, None], axis=1)
    return -jnp.mean(chosen_Bx1x2, axis=(1, 2))


def best_spans(
    share_BxTx2: jax.Array, is_passage_BxT: jax.Array, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns start, end and score of the best span of each window.

    A span lies within the passage, does not end before it starts, and has no more than
    `longest` tokens; its score is the sum of those of its start and its end.
    """
    none = -jnp.inf
    start_BxT = jnp.where(is_passage_BxT, share_BxTx2[..., 0], none)
    end_BxT = jnp.where(is_passage_BxT, share_BxTx2[..., 1], none)
    end_BxT = jnp.pad(end_BxT, ((0, 0), (0, longest - 1)), constant_values=none)
    places_T = jnp.arange(share_BxTx2.shape[1])
    reached_TxL = places_T[:, None] + jnp.arange(longest)[None]
    end_BxTxL = end_BxT[:, reached_TxL]
    span_BxT = start_BxT + jnp.max(end_BxTxL, axis=-1)
    start_Bx1 = jnp.argmax(span_BxT, axis=-1, keepdims=True)
    length_BxT = jnp.argmax(end_BxTxL, axis=-1)
    start_B = start_Bx1[:, 0].astype(jnp.int32)
    length_B = jnp.take_along_axis(length_BxT, start_Bx1, axis=1)[:, 0]
    return start_B, start_B + length_B.astype(jnp.int32), jnp.max(span_BxT, axis=-1)


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    max_answer_tokens: int = 30,
    metrics: tuple[str, ...] = METRICS,
) -> Questions:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`; its `pool` is 'none'.
        precision: 'float32', 'bfloat16' or 'float64'.
        max_answer_tokens: No longer span is predicted.
        metrics: Some of `METRICS`.

    Raises:
        UserError: Labels that are no answers, something unknown or out of range, or a
            model that cannot read texts or makes one vector of a text.
    """
    problems = [
        f"config.task.metrics: no {name!r}{closest(str(name), METRICS)}"
        for name in metrics
        if name not in METRICS
    ]
    if model["classes"] not in (None, LOGITS):
        problems.append(
            f"config.model.classes: {model['classes']}, but a token has {LOGITS} logits, "
            "of the start and of the end; None takes as many"
        )
    if max_answer_tokens < 1:
        problems.append(
            f"config.task.max_answer_tokens: {max_answer_tokens}; 1 or more is needed"
        )
    module, unfit = token_model(data, model, classes=LOGITS, precision=precision)
    if problems := problems + unfit:
        raise problems_error("The task does not fit:", problems)
    return Questions(
        models={"": module},
        data=data,
        max_answer_tokens=min(max_answer_tokens, data.inputs.options.max_tokens),
        metric_names=metrics,
    )
