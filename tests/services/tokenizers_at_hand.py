"""Tokenizers of every kind, small enough to be made in a test."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from services.text import REPLACEMENT, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234 times. It's fine! Isn't it?",
    "  two  spaces\n\nand lines\t ",
    "你好世界。 naïve café, straße, Ελληνικά",
]
SPECIAL = ["<s>", "</s>", "<unk>"]
PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
LETTERS = [chr(byte) for byte in range(256)]  # how byte-level tokenizers write a byte
for letter, byte in enumerate(sorted(set(range(256)) - PRINTABLE), start=256):
    LETTERS[byte] = chr(letter)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def byte_level_bpe_of_torn_characters() -> tokenizers.Tokenizer:
    """Tokens that end in the middle of one character and begin in the middle of another."""
    vocab = {letter: byte for byte, letter in enumerate(LETTERS)}
    for piece in ("bd a0", "bd a0 e4", "a0 e4", "a0 e4 bd"):  # of 你, whose bytes are e4 bd a0
        vocab["".join(LETTERS[byte] for byte in bytes.fromhex(piece))] = len(vocab)
    vocab[""] = len(vocab)  # some vocabularies are filled up with tokens of nothing
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_fallback_bpe() -> tokenizers.Tokenizer:
    """As SentencePiece BPE models are told in tokenizer.json."""
    words = ["▁", "▁the", "▁a", "a", "b", "c", "the", "▁quick", "fox", ".", ",", "▁▁", "你", REPLACEMENT]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *words])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace_unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def suffix_bpe() -> tokenizers.Tokenizer:
    """The last token of a text is decoded differently: the space after a word is told by the next one."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False),
    )
    return tokenizer


def words_without_decoder() -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate([*SPECIAL, "one", "two", "three", ""])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


BUILDERS: list[Callable[[], tokenizers.Tokenizer]] = [
    byte_level_bpe,
    byte_level_bpe_of_torn_characters,
    byte_fallback_bpe,
    metaspace_unigram,
    wordpiece,
    suffix_bpe,
    words_without_decoder,
]
every_tokenizer = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


@cache
def tokenizer_of(build: Callable[[], tokenizers.Tokenizer]) -> Tokenizer:
    return saved(build())


@cache
def vocab_of(build: Callable[[], tokenizers.Tokenizer]) -> dict[str, int]:
    return build().get_vocab(with_added_tokens=True)


def saved(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        tokenizer.save(str(file))
        return Tokenizer(file)
