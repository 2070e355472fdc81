"""The paper's six tasks, and the class for tasks of one's own: where rows are, what is asked, how answers are scored.

```python
task = TASKS["gsm8k"]
rows = task.load(split="train", tokenizer=tokenizer)               # from the Hub, at the task's revision
rows = task.load("gsm8k_test.jsonl", tokenizer=tokenizer)          # or from a file with the same columns
scores = task.evaluate(model, tokenizer, rows)                     # RowScores, each row from 0 to 1
```

A task of one's own is a small class:

```python
class Capitals(Task):
    name = "capitals"
    columns = ("country", "capital")

    def question(self, row):
        return f"What is the capital of {row['country']}?"

    def answer(self, row):
        return row["capital"]
```
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..documents import parse_json
from ..errors import DataError
from ..finetuning.sources import load_table
from .answers import ANSWER_MARK, SPAN_SEPARATOR, final_letter, final_number, rouge1, same_spans
from .scoring import Rows, RowScores, score_rows


class Task(ABC):
    """One task. A subclass says what is asked and answered; most need no more than that.

    Attributes:
        name (`str`): goes into the rows' `task` column.
        columns (`tuple[str, ...]`): columns that the rows must have.
        hub_id, hub_config, revision (`str`, *optional*): the dataset on the Hub, its configuration, and the commit
            that `load` takes; without a commit the newest.
        splits (`tuple[str, ...]`): splits on the Hub that have answers.
        max_new_tokens (`int`): room for a generated answer.
        metric_name (`str`): what the score is called.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    hub_id: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    revision: ClassVar[str | None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    max_new_tokens: ClassVar[int] = 64
    metric_name: ClassVar[str] = "exact match"

    @abstractmethod
    def question(self, row: Mapping[str, Any]) -> str:
        """What the model is asked."""

    @abstractmethod
    def answer(self, row: Mapping[str, Any]) -> str:
        """What fine-tuning teaches it to say: reasoning, where there is some, and the final answer."""

    def extract(self, text: str) -> str:
        """The final answer in what the model said; default: all of it."""
        return text.strip()

    def score(self, prediction: str, reference: str) -> float:
        """From 0 to 1; both are whole texts, generated and true. Default: whether their final answers are equal."""
        expected = self.extract(reference)
        return float(expected != "" and self.extract(prediction) == expected)

    def references(self, row: Mapping[str, Any]) -> list[str]:
        """All answers that are accepted, the first being the one that is taught."""
        return [self.answer(row)]

    # What follows is the same for all tasks.

    def metric(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """[`~Task.score`] of each pair, `(N,)`, as [`score_rows`] takes it."""
        return np.array([self.score(p, r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)

    def load(
        self,
        path_or_repo: str | Path | None = None,
        *,
        split: str = "train",
        revision: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[dict[str, Any]]:
        """Rows to train on and to score.

        Args:
            path_or_repo (`str` or `Path`, *optional*): a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of
                such files, or a dataset on the Hub, with the task's columns; default: the task's own dataset. In a CSV
                file, columns that are no text hold JSON.
            split (`str`, *optional*, defaults to `"train"`): split, or part of one.
            revision (`str`, *optional*): revision on the Hub; default: the task's own, for its own dataset.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): see [`~Task.rows`].

        Raises:
            [`DataError`]: nothing to read there, a missing column, or a row that cannot be used.
        """
        if path_or_repo is None:
            if self.hub_id is None:
                raise DataError(f"Task {self.name} has no dataset of its own.", expected="a path or repository")
            table = load_table(self.hub_id, split=split, revision=revision or self.revision, name=self.hub_config)
        else:
            table = load_table(path_or_repo, split=split, revision=revision)
        return self.rows(table, tokenizer=tokenizer)

    def rows(
        self, table: Dataset | Iterable[Mapping[str, Any]], *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[dict[str, Any]]:
        """Public rows to rows with `prompt`, `completion`, `task`, and `references` where several are accepted.

        Args:
            table (`Dataset` or rows): with the task's columns.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): where it has a chat template, prompt and completion are
                messages; otherwise, and without one, they are text.

        Raises:
            [`DataError`]: a missing column, or a row that cannot be used.
        """
        chat = tokenizer is not None and tokenizer.chat_template is not None
        rows = []
        for index, row in enumerate(table):
            missing = [name for name in self.columns if name not in row]
            if missing:
                raise DataError(
                    f"Row {index} is not one of task {self.name}.",
                    expected=f"columns {', '.join(self.columns)}",
                    found=", ".join(row),
                )
            try:
                question, references = self.question(row), self.references(row)
            except (KeyError, TypeError, ValueError, IndexError) as cause:
                raise DataError(f"Row {index} cannot be used for task {self.name}.", found=repr(cause)) from cause
            rows.append(self._row(question, references, chat))
        if not rows:
            raise DataError(f"There are no rows of task {self.name}.", expected="at least one row", found=0)
        return rows

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, *, batch_size: int = 64
    ) -> RowScores:
        """Generate an answer for every row and score it."""
        return score_rows(
            model, tokenizer, rows, batch_size=batch_size, max_new_tokens=self.max_new_tokens, metric=self.metric
        )

    def _row(self, question: str, references: Sequence[str], chat: bool) -> dict[str, Any]:
        answer = references[0]
        row: dict[str, Any] = {"prompt": f"{question}\n\nAnswer:", "completion": f" {answer}", "task": self.name}
        if chat:
            row["prompt"] = [{"role": "user", "content": question}]
            row["completion"] = [{"role": "assistant", "content": answer}]
        return row if len(references) == 1 else {**row, "references": list(references)}


class Gsm8k(Task):
    """Grade-school mathematics; the solution ends in `#### 42`."""

    name = "gsm8k"
    columns = ("question", "answer")
    hub_id, hub_config, revision = "openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee"
    splits = ("train", "test")
    max_new_tokens = 320

    def question(self, row: Mapping[str, Any]) -> str:
        return f"{row['question'].strip()}\n\nReason step by step, then write the result after {ANSWER_MARK}."

    def answer(self, row: Mapping[str, Any]) -> str:
        return row["answer"].strip()

    def extract(self, text: str) -> str:
        return final_number(text)


class AquaRat(Task):
    """Algebra with five options and a rationale; the completion ends in `#### C`."""

    name = "aqua_rat"
    columns = ("question", "options", "rationale", "correct")
    hub_id, hub_config, revision = "deepmind/aqua_rat", "raw", "33301c6a050c96af81f63cad5562cb5363e88971"
    max_new_tokens = 320

    def question(self, row: Mapping[str, Any]) -> str:
        options = "\n".join(_structure(row["options"]))
        return (
            f"{row['question'].strip()}\n{options}\n\n"
            f"Reason step by step, then write the letter of the right option after {ANSWER_MARK}."
        )

    def answer(self, row: Mapping[str, Any]) -> str:
        return f"{row['rationale'].strip()}\n{ANSWER_MARK} {_letter(row['correct'])}"

    def extract(self, text: str) -> str:
        return final_letter(text)


class CommonsenseQa(Task):
    """Everyday knowledge with five options; the completion is the letter. The test split has no answers."""

    name = "commonsense_qa"
    columns = ("question", "choices", "answerKey")
    hub_id, revision = "tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155"
    splits = ("train", "validation")
    max_new_tokens = 16

    def question(self, row: Mapping[str, Any]) -> str:
        choices = _structure(row["choices"])
        lines = [f"{label}) {text}" for label, text in zip(choices["label"], choices["text"], strict=True)]
        return "\n".join([row["question"].strip(), *lines, "", "Answer with the letter of the best option."])

    def answer(self, row: Mapping[str, Any]) -> str:
        return _letter(row["answerKey"])

    def extract(self, text: str) -> str:
        return final_letter(text)


class Drop(Task):
    """Questions on a passage, answered by numbers, dates or spans; exact match as in its official evaluation.

    Args:
        several_annotators (`bool`, *optional*, defaults to `False`): the rows are of the Hub's validation split, whose
            `spans` are those of all annotators without saying whose: each is accepted by itself. In the training
            split they are the spans of one answer, and all of them are asked for.
    """

    name = "drop"
    columns = ("passage", "question", "answers_spans")
    hub_id, revision = "ucinlp/drop", "95cda593fae71b60b5b19f82de3fcf3298c1239c"
    splits = ("train", "validation")
    max_new_tokens = 48

    def __init__(self, *, several_annotators: bool = False):
        self.several_annotators = several_annotators

    def question(self, row: Mapping[str, Any]) -> str:
        return (
            f"{row['passage'].strip()}\n\nQuestion: {row['question'].strip()}\n"
            f"Answer with a number, a date, or words of the passage; several parts with{SPAN_SEPARATOR}between them."
        )

    def answer(self, row: Mapping[str, Any]) -> str:
        return self.references(row)[0]

    def references(self, row: Mapping[str, Any]) -> list[str]:
        spans = [str(span).strip() for span in _structure(row["answers_spans"])["spans"]]
        if not any(spans):
            raise ValueError("no answer")
        return list(dict.fromkeys(spans)) if self.several_annotators else [SPAN_SEPARATOR.join(spans)]

    def score(self, prediction: str, reference: str) -> float:
        return same_spans(prediction, reference)


class _Dialogue(Task):
    columns = ("dialogue", "summary")
    max_new_tokens = 128
    metric_name = "ROUGE-1"

    def question(self, row: Mapping[str, Any]) -> str:
        return f"Summarise the conversation in a few sentences.\n\n{row['dialogue'].strip()}"

    def answer(self, row: Mapping[str, Any]) -> str:
        return row["summary"].strip()

    def score(self, prediction: str, reference: str) -> float:
        return rouge1(prediction, reference)


class SamSum(_Dialogue):
    """Messenger conversations and their summaries, from the mirror that needs no loading script."""

    name = "samsum"
    hub_id = "knkarthick/samsum"


class DialogSum(_Dialogue):
    """Spoken conversations and their summaries."""

    name = "dialogsum"
    hub_id = "knkarthick/dialogsum"


TASKS: dict[str, Task] = {
    task.name: task for task in (AquaRat(), Gsm8k(), CommonsenseQa(), Drop(), SamSum(), DialogSum())
}


def _structure(value: Any) -> Any:
    """A list or mapping; a CSV file holds it as JSON."""
    return parse_json(value) if isinstance(value, str) else value


def _letter(value: str) -> str:
    letter = value.strip().upper()
    if len(letter) != 1:
        raise ValueError(f"no letter of an option: {value!r}")
    return letter
