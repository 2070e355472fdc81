"""The provider, for a client whose task no shadow showed: generate, choose and refine on public prompts.

python examples/refine.py acme/qwen2.5-3b-to-7b@v1.0 acme/deltas@v1.0 bank-a/adapter@v1.0 public.jsonl llm-adapter
"""

import sys

from grad_transformer import GradTransformer
from grad_transformer.finetuning import load_rows
from grad_transformer.refinement import RefinementArguments, fit_candidates, refine_clients, shadow_annotators
from grad_transformer.shadow import load_delta_dataset


def main(mapper_id: str, dataset_id: str, adapter_id: str, prompts: str, output_dir: str) -> None:
    mapper = GradTransformer.from_pretrained(mapper_id)
    source, target = mapper.tokenizers()
    deltas, arguments = load_delta_dataset(dataset_id), RefinementArguments()
    client, _ = source.read_client(adapter_id)
    (refined,), _ = refine_clients(
        mapper,
        fit_candidates(deltas),
        [client],
        load_rows(prompts),
        arguments,
        annotators=shadow_annotators(deltas, arguments),
    )
    target.decode_delta(refined.delta_P).save_pretrained(output_dir)
    print(f"{refined.candidate}: agreement {refined.agreement_by_round}, possible {refined.expected_agreement:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
