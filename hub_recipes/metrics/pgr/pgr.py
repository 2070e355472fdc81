"""Performance gap recovered (PGR), as a metric for `evaluate.load`."""

import datasets
import evaluate


MINIMUM_GAP = 0.03


class PGR(evaluate.Metric):
    """In percent: 0 is the fine-tuned small model, 100 the fine-tuned large one."""

    def _info(self):
        features = {name: datasets.Value("float64") for name in ("predictions", "tinylm", "llm_finetuned")}
        return evaluate.MetricInfo(
            description="Performance gap recovered between a small fine-tuned model and a large one, in percent.",
            citation="",
            inputs_description=(
                "predictions, tinylm, llm_finetuned: scores from 0 to 1 of the same test rows, of the large model "
                "with the generated adapter, the fine-tuned small model and the fine-tuned large one."
            ),
            features=datasets.Features(features),
        )

    def _compute(self, predictions, tinylm, llm_finetuned):
        generated, small, large = (sum(scores) / len(scores) for scores in (predictions, tinylm, llm_finetuned))
        gap = large - small
        pgr = None if gap < MINIMUM_GAP - 1e-12 else 100.0 * (generated - small) / gap
        return {"pgr": pgr, "gap": gap}
