from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from grad_transformer.lab import LabWorld, make_base_model, make_lab_tokenizer
from grad_transformer.lab.tokenizer import VOCABULARY


def test_prompt_and_completion_tokenise_apart_as_together(mini_world: LabWorld):
    tokenizer = make_lab_tokenizer()
    for row in mini_world.public_rows(3):
        prompt, completion = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
        assert (len(prompt), len(completion)) == (9, 6)
        assert tokenizer(row["prompt"] + row["completion"]).input_ids == prompt + completion
        assert tokenizer.decode([*completion, tokenizer.eos_token_id], skip_special_tokens=True) == row["completion"]


def test_auto_tokenizer_reads_the_same_tokenizer_beside_a_qwen2_model(tmp_path: Path, mini_world: LabWorld):
    tokenizer = make_lab_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_base_model(mini_world.preset.tinylm, seed=0).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(VOCABULARY) == 27
    assert loaded.convert_tokens_to_ids(list(VOCABULARY)) == list(range(27))
    for text in ("?1 ?2 314159 >951413", "f0 g5 314159 >951413", "".join(VOCABULARY)):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded("".join(VOCABULARY)).input_ids == list(range(27))
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")
