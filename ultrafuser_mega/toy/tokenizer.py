"""A SentencePiece tokenizer trained like Llama-2's, and its Hugging Face form.

Settings that matter: BPE with byte fallback, digits split, white space kept as it is, a dummy prefix
(so a response tokenised on its own begins with a "▁The" piece), ids 0/1/2 for unk/bos/eos and no pad. The
Hugging Face files are written from the SentencePiece model with exact merge ranks, so both give the
same ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy.corpus import CLASSES, generate
from ultrafuser_mega.toy.templates import CHAT_TEMPLATES, prompt

SPACE = "▁"  # U+2581, how SentencePiece writes a space
SPECIALS = ("<unk>", "<s>", "</s>")


def train_sentencepiece(documents: Iterable[str], *, pieces: int) -> bytes:
    """Train a BPE model of exactly ``pieces`` pieces (256 bytes and 3 specials included); returns ``tokenizer.model``.

    Raises:
        InputError: ``pieces`` is too small for the characters of ``documents`` or larger than they support.
    """
    # A newline is a byte piece, as in Llama-2, so every line is a sentence of its own. Each sentence gets a
    # dummy prefix; taking one space off an indented line leaves the run of spaces that encoding will meet.
    lines = [line.removeprefix(" ") for document in documents for line in document.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"pieces = {pieces}: SentencePiece cannot train a tokenizer of this size ({reason})") from None
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes, *, chat_template: str, max_length: int) -> None:
    """Write a folder that ``AutoTokenizer`` loads: ``tokenizer.{model,json}``, its configuration and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    _fast_tokenizer(model).save(str(folder / "tokenizer.json"))
    unk, bos, eos = SPECIALS
    config = {
        "backend": "tokenizers",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_length,
        "tokenizer_class": "TokenizersBackend",
        "unk_token": unk,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template)


def tiny_tokenizer(out_dir: Path | str, pieces: int = 512) -> Path:
    """A trained tokenizer of ``pieces`` pieces in ``out_dir``, about a second's work: for tests."""
    rows = [row for name in CLASSES for row in generate(name, seed=0, train_rows=200, heldout_rows=0).train]
    model = train_sentencepiece((text for row in rows for text in (row.instruction, row.output)), pieces=pieces)
    write_tokenizer(Path(out_dir), model, chat_template=CHAT_TEMPLATES["text"], max_length=2048)
    return Path(out_dir)


def training_documents(rows: dict[str, Iterable[Any]]) -> Iterable[str]:
    """What the toy tokenizer is trained on: every class's rows (``Row``s by class) inside that class's own template."""
    for name, members in rows.items():
        for row in members:
            yield prompt(name, row.instruction)
            yield row.output


def _fast_tokenizer(model: bytes) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    unk, bos, eos = SPECIALS
    fast = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(processor, vocabulary), unk_token=unk, fuse_unk=True, byte_fallback=True
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (unk, bos, eos)])
    return fast


def _merges(processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, best piece first: SentencePiece merges by the rank of the result."""
    merges = []
    for piece, rank in vocabulary.items():
        if processor.is_byte(rank) or processor.is_control(rank) or processor.is_unknown(rank):
            continue
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(rank, left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    return [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
