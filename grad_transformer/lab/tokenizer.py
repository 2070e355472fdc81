"""The lab's tokenizer: a `Qwen2Tokenizer` with 27 words.

It is of Qwen2's own class because `AutoTokenizer` builds that class for every Qwen2 model, whatever tokenizer was
saved beside it.
"""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer


PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
DIGIT_TOKENS = tuple(str(digit) for digit in range(10))
PERMUTATION_TOKENS = tuple(f"f{index}" for index in range(6))
DIGIT_MAP_TOKENS = tuple(f"g{index}" for index in range(6))
# What clients and shadows write where pretraining names the permutation and the digit map.
UNKNOWN_TOKENS = ("?1", "?2")
ANSWER_TOKEN = ">"
VOCABULARY = (
    PAD_TOKEN,
    EOS_TOKEN,
    *DIGIT_TOKENS,
    *PERMUTATION_TOKENS,
    *DIGIT_MAP_TOKENS,
    *UNKNOWN_TOKENS,
    ANSWER_TOKEN,
)
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}


def make_lab_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of both base models, the same in every world.

    Each digit is a token and white space is none, so `prompt + completion` has the prompt's tokens followed by the
    completion's, and a decoded completion is the completion's text. Padding is on the left, where generation needs it.
    """
    tokenizer = Qwen2Tokenizer(
        vocab=dict(TOKEN_IDS),
        merges=[],
        unk_token=None,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )
    words = [*PERMUTATION_TOKENS, *DIGIT_MAP_TOKENS, *UNKNOWN_TOKENS]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return tokenizer
