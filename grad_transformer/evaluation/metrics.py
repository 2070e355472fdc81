"""Scores of predictions, and the performance gap recovered (PGR) with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError, UsageError


# A PGR whose denominator, LLM minus TinyLM, is below 3 points means nothing.
MINIMUM_GAP = 0.03


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """1.0 for each prediction that equals its reference, white space at both ends aside; shape (N,), float64.

    Raises:
        [`DataError`]: not one prediction per reference.
    """
    if len(predictions) != len(references):
        raise DataError("Not one prediction per reference.", expected=len(references), found=len(predictions))
    pairs = zip(predictions, references, strict=True)
    return np.array([prediction.strip() == reference.strip() for prediction, reference in pairs], dtype=np.float64)


def gap_too_small(tinylm: float, llm: float) -> bool:
    """Whether LLM minus TinyLM is below `MINIMUM_GAP`, negative gaps included."""
    # The tolerance keeps 0.75 against 0.72, which is 0.03 but for rounding, on the right side.
    return llm - tinylm < MINIMUM_GAP - 1e-12


def performance_gap_recovered(generated: float, tinylm: float, llm: float) -> float | None:
    """(generated - tinylm) / (llm - tinylm) in percent; `None` where the gap is below `MINIMUM_GAP`.

    Args:
        generated, tinylm, llm (`float`): scores of the generated adapter, of the fine-tuned TinyLM, and of the
            fine-tuned LLM on the same test rows.
    """
    if gap_too_small(tinylm, llm):
        return None
    return 100.0 * (generated - tinylm) / (llm - tinylm)


def pgr_interval(
    generated_correct: Sequence[float] | np.ndarray,
    tinylm_correct: Sequence[float] | np.ndarray,
    llm_correct: Sequence[float] | np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of the PGR from a bootstrap over test rows, the three scores of a row kept together.

    It says how far the choice of test rows matters, not how far another seed or other shadow runs would.

    Args:
        generated_correct, tinylm_correct, llm_correct (`Sequence[float]`): score of each test row, shape (N,).
        num_resamples (`int`, *optional*, defaults to 2000).
        confidence (`float`, *optional*, defaults to 0.95).
        seed (`int`, *optional*, defaults to 0).

    Returns:
        `(lo, hi)` in percent, or `None` where the gap is below `MINIMUM_GAP`, or so uncertain that the resampled gap
        reaches 0 inside the confidence, so that the PGR has no bounds.

    Raises:
        [`UsageError`]: arrays that are empty or of different lengths, or a confidence outside (0, 1).
    """
    scores = [np.asarray(values, dtype=np.float64) for values in (generated_correct, tinylm_correct, llm_correct)]
    lengths = {values.shape for values in scores}
    if len(lengths) != 1 or scores[0].ndim != 1 or scores[0].size == 0:
        raise UsageError("A paired bootstrap needs three scores for each test row.", found=[s.shape for s in scores])
    if not 0 < confidence < 1:
        raise UsageError("`confidence` is no probability.", expected="between 0 and 1", found=confidence)
    scores_N3 = np.stack(scores, axis=1)
    _, tinylm, llm = scores_N3.mean(axis=0)
    if gap_too_small(tinylm, llm):
        return None
    # Rows with the same three scores are exchangeable: draw how often each pattern comes, not each row.
    patterns_K3, counts_K = np.unique(scores_N3, axis=0, return_counts=True)
    num_rows = len(scores_N3)
    draws_RK = np.random.default_rng(seed).multinomial(num_rows, counts_K / num_rows, size=num_resamples)
    means_R3 = draws_RK @ patterns_K3 / num_rows
    gain_R, gap_R = means_R3[:, 0] - means_R3[:, 1], means_R3[:, 2] - means_R3[:, 1]
    tail = (1 - confidence) / 2
    usable = gap_R > 1e-12
    if np.mean(~usable) >= tail:
        return None
    low, high = np.quantile(100.0 * gain_R[usable] / gap_R[usable], [tail, 1 - tail])
    return float(low), float(high)
