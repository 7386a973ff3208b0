"""Extractive question answering: the span of a passage that answers a question."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.data.spec import DataSpec
from finetune_jax.data.text.questions import Question, Window
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.text_inputs import (
    TextInputs,
    questions,
    token_model,
    unknown_metrics,
)
from finetune_jax.tasks.objectives.squad import answer_scores, match_scores
from finetune_jax.tasks.task import ExampleScores, LossOutput

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("text", "answers"),)
METRICS = ("exact_match", "f1", "loss")
# Logits of a token: it is the first, or the last, of an answer.
LOGITS = 2


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanTarget:
    """The first and last token of an answer, in each window of a passage.

    Attributes:
        unanswerable: Whether questions may have no answer.
        max_answer_tokens: Maximum length of a predicted span.
        metric_names: Metrics of a split; 'loss' is always added.
    """

    unanswerable: bool
    max_answer_tokens: int = 30
    metric_names: tuple[str, ...] = METRICS

    head_kind = "spans"
    logits = LOGITS

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """Positions [2] of the answer's first and last token."""
        return jax.ShapeDtypeStruct((2,), np.dtype(np.int32))

    def loss(self, output: jax.Array, batch: Mapping) -> LossOutput:
        """Returns cross entropy and accuracy of windows."""
        log_BxTx2 = _log_probabilities(output, batch["inputs"]["mask"])
        weight_B, label_Bx2 = batch["weight"], batch["label"]
        right_B = jnp.all(jnp.argmax(log_BxTx2, axis=1) == label_Bx2, axis=-1)
        weight = jnp.sum(weight_B)
        loss = jnp.sum(_cross_entropy(log_BxTx2, label_Bx2) * weight_B), weight
        accuracy = jnp.sum(right_B * weight_B), weight
        return LossOutput(*loss, {"loss": loss, "accuracy": accuracy})

    def outputs(self, output: jax.Array, batch: Mapping) -> dict:
        """Returns the best span of each window, and log probabilities.

        'start' and 'end' are positions in the window; 'span' and 'none' are the log
        probabilities of the span and of no answer; 'loss' is that of the label, if known.
        """
        mask_BxT = batch["inputs"]["mask"]
        log_BxTx2 = _log_probabilities(output, mask_BxT)
        start_B, end_B, span_B = best_spans(
            log_BxTx2, mask_BxT == 2, self.max_answer_tokens
        )
        none_B = log_BxTx2[:, 0].sum(axis=-1)
        found = {"start": start_B, "end": end_B, "span": span_B, "none": none_B}
        if "label" in batch:
            found["loss"] = _cross_entropy(log_BxTx2, batch["label"])
        return found

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns the best span, and the probabilities of it and of no answer."""
        return {
            "start": outputs["start"],
            "end": outputs["end"],
            "none": jnp.exp(outputs["none"]),
            "probability": jnp.exp(outputs["span"]),
        }

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns scores over questions, and the loss over windows."""
        predicted, wanted = [], []
        for question, record in self._answered(outputs, batch):
            predicted.append(record["answer"])
            wanted.append(question.answers)
        found = match_scores(predicted, wanted)
        found["loss"] = float(outputs["loss"].astype(np.float64).mean())
        names = dict.fromkeys((*self.metric_names, "loss"))
        return {name: found[name] for name in names}

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns the scores of each question; losses are scaled to the mean of windows."""
        pairs = [
            answer_scores(record["answer"], question.answers)
            for question, record in self._answered(outputs, batch)
        ]
        exact, f1 = np.array(pairs, np.float64).reshape(-1, 2).T
        asked = [id(note.question) for note in batch["note"]]
        first = [at for at, one in enumerate(asked) if at == 0 or one != asked[at - 1]]
        loss = np.add.reduceat(outputs["loss"].astype(np.float64), first)
        known = {"exact_match": exact, "f1": f1}
        found = {name: known[name] for name in known if name in self.metric_names}
        found["loss"] = loss * len(first) / len(asked)
        return ExampleScores(scores=found, first=np.array(first))

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns nothing: every metric is defined on every split."""
        del labels
        return []

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the answer to each question, and its characters in the passage.

        'score' is the probability in the window; 'answer' is '' for no answer.
        """
        return [record for _, record in self._answered(outputs, batch)]

    def _answered(
        self, outputs: Mapping, batch: Mapping
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
            # In a window without any of its passage, the span is the first token.
            if start == 0 or (self.unanswerable and none > span):
                record |= {"answer": "", "start": None, "end": None}
                yield question, {**record, "score": float(np.exp(none))}
                continue
            begin, stop = windows[best].characters(start, end)
            text = question.passage.text[begin:stop]
            record |= {"answer": text, "start": begin, "end": stop}
            yield question, {**record, "score": float(np.exp(span))}


def _log_probabilities(logits_BxTx2: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Returns log probabilities over the positions that may be chosen.

    They are the positions of the passage, and the first one, which means no answer.
    """
    wide = jnp.promote_types(logits_BxTx2.dtype, jnp.float32)
    may_BxT = (mask_BxT == 2) | (jnp.arange(mask_BxT.shape[1]) == 0)[None]
    # Not the smallest number, so that the sum of two is finite.
    least = jnp.finfo(wide).min / 4
    logits_BxTx2 = jnp.where(may_BxT[..., None], logits_BxTx2.astype(wide), least)
    return jax.nn.log_softmax(logits_BxTx2, axis=1)


def _cross_entropy(log_BxTx2: jax.Array, label_Bx2: jax.Array) -> jax.Array:
    """Returns the mean over start and end, [B]."""
    chosen_Bx1x2 = jnp.take_along_axis(log_BxTx2, label_Bx2[:, None], axis=1)
    return -jnp.mean(chosen_Bx1x2, axis=(1, 2))


def best_spans(
    log_BxTx2: jax.Array, is_passage_BxT: jax.Array, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns start, end and score of the best span of each window.

    A span lies within the passage, does not end before it starts, and has at most
    `longest` tokens; its score is the sum of the scores of its start and its end.
    """
    none = -jnp.inf
    start_BxT = jnp.where(is_passage_BxT, log_BxTx2[..., 0], none)
    end_BxT = jnp.where(is_passage_BxT, log_BxTx2[..., 1], none)
    end_BxT = jnp.pad(end_BxT, ((0, 0), (0, longest - 1)), constant_values=none)
    places_T = jnp.arange(log_BxTx2.shape[1])
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
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`; its `pool` is 'none'.
        precision: 'float32', 'bfloat16' or 'float64'.
        max_answer_tokens: Maximum length of a predicted span.
        metrics: Some of `METRICS`.

    Raises:
        UserError: Labels that are no answers, something unknown or out of range, or a
            model that cannot read texts or pools a text to one vector.
    """
    problems = unknown_metrics(metrics, METRICS)
    if model["classes"] not in (None, LOGITS):
        problems.append(
            f"config.model.classes: {model['classes']}, but a token has {LOGITS} logits, "
            "of the start and of the end; None takes as many"
        )
    if max_answer_tokens < 1:
        problems.append(
            f"config.task.max_answer_tokens: {max_answer_tokens}; 1 or more is needed"
        )
    module = token_model(
        data, model, classes=LOGITS, precision=precision, problems=problems
    )
    target = SpanTarget(
        unanswerable=data.inputs.unanswerable,
        max_answer_tokens=min(max_answer_tokens, data.inputs.options.max_tokens),
        metric_names=metrics,
    )
    return one_model_task(module, TextInputs(data=data, encode=questions), target)
