"""Two tokenizers that real models use, Mistral's, from its own package."""

import base64
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizers

from klong_jax.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

RANKS = 12_000  # of 131,072: enough to be real, few enough to be built in a second
MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>")


def carried(name: str) -> Path:
    """A file of the mistral-common package, which is not imported."""
    package = find_spec("mistral_common")
    assert package and package.submodule_search_locations, "the dev extra has mistral-common"
    return Path(package.submodule_search_locations[0]) / "data" / name


@cache
def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer(carried("mistral_instruct_tokenizer_240323.model.v3"))


@cache
def bpe() -> HuggingFaceTokenizer:
    """The most frequent tokens of Mistral's byte-level BPE."""
    tekken = json.loads(carried("tekken_240718.json").read_text())
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in tekken["vocab"][:RANKS]}
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    alphabet = byte_letters()
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [
        (spell(token[:cut]), spell(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    inner = HfTokenizers(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, spelled])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(MARKS))
    return HuggingFaceTokenizer(inner)


def byte_letters() -> list[str]:
    """How a byte-level BPE spells each byte: itself where it prints, else a letter from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]
