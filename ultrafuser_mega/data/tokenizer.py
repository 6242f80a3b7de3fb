"""The tokenizer in a specialist's folder, and the check that several of them agree.

How texts become ids is chat_format.py's subject, which releases share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer

from ultrafuser_mega.data.chat_format import SequenceTokenizer
from ultrafuser_mega.errors import InputError

_PROBES = (
    "Hello world",
    "  two  spaces and a tab\t.",
    "line one\nline two\n\n    indented",
    "naïve café, ﬁne Å Å Ⅳ ½",  # compatibility forms: a normaliser that folds them gives itself away
    "你好 мир 😀",
    'x = [1.5e-3] * 42  # print(f"{x!r}")',
    "$\\frac{1}{2}$ <b>bold</b> no\u00a0break",
)


class TextEncoder(SequenceTokenizer):
    """The tokenizer in a Hugging Face folder.

    Raises InputError where the folder holds no usable tokenizer: not there, not readable, not a fast
    one, without an EOS token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder; expected one with tokenizer.json or tokenizer.model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )  # unasked, every rank would wait for a person to answer
        except Exception as error:  # transformers raises many kinds here, some with pages of advice
            if not any((Path(folder) / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
                raise InputError(f"{folder}: holds no tokenizer; add its tokenizer.json or tokenizer.model") from None
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{folder}: its tokenizer is a program (auto_map in tokenizer_config.json), which is not run; "
                    "if tokenizer.json says it all, remove auto_map and set tokenizer_class: PreTrainedTokenizerFast"
                ) from None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{folder}: no tokenizer can be loaded from here: {reason}") from None
        if not tokenizer.is_fast:
            raise InputError(f"{folder}: only a slow Python tokenizer was found; save a tokenizer.json beside it")
        if tokenizer.eos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
        super().__init__(tokenizer)

    def pieces(self) -> dict[int, str]:
        """id -> piece, added tokens included."""
        return {token: piece for piece, token in self._backend.get_vocab(with_added_tokens=True).items()}

    def added(self) -> set[int]:
        """The ids of tokens that were added beside the trained vocabulary."""
        return set(self._backend.get_added_tokens_decoder())

    def describe(self) -> str:
        """Folder, class and size of the tokenizer, for messages."""
        return f"{self.folder}, {type(self.tokenizer).__name__} of {len(self.tokenizer)} tokens"

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        whole = f"{self.bos_id} {self.eos_id} {self._backend.to_str()}"
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def check_tokenizers(folders: Mapping[str, str | Path], vocab_size: int) -> dict[str, TextEncoder]:
    """Load every specialist's tokenizer and refuse those that disagree on the shared vocabulary.

    Compared over ids below ``vocab_size``: the piece of each id (an id that one tokenizer merely adds
    and another lacks is no disagreement), BOS, EOS, and how a handful of texts with spaces, line breaks,
    accents, other scripts and code are split. Raises InputError naming the two specialists, their tokenizers'
    classes and the first difference; where only tokens differ that each added by itself, also the ``vocab_size``
    below which all agree.
    """
    encoders = {name: TextEncoder(folder) for name, folder in folders.items()}
    (first_name, first), *others = encoders.items()
    for name, encoder in encoders.items():
        for kind, token in (("BOS", encoder.bos_id), ("EOS", encoder.eos_id)):
            if token is not None and token >= vocab_size:
                raise InputError(
                    f"{encoder.folder}: {name}'s {kind} id {token} lies beyond the shared vocabulary of {vocab_size}"
                )
    ends = []
    for name, other in others:
        difference = _first_difference(first, other, vocab_size)
        if not difference:
            continue
        end = _where_own_tokens_begin(first, other, vocab_size)
        what, here, there = difference
        disagreement = (
            f"tokenizers of {first_name} ({first.describe()}) and {name} ({other.describe()}) disagree: "
            f"{what} is {here} for {first_name} and {there} for {name}"
        )
        if end is None and what == "the EOS id" and _first_other_piece(first, other, vocab_size) is None:
            piece = first.tokenizer.eos_token
            raise InputError(
                f"{disagreement}; their pieces are the same: set eos_token to {piece!r} in "
                f"{other.folder}/tokenizer_config.json, as {first_name} has it, or the other way round"
            )
        if end is None:
            raise InputError(f"{disagreement}; fusing needs specialists of one tokenizer family")
        ends.append((end, disagreement))
    if ends:
        end, disagreement = min(ends)
        raise InputError(
            f"{disagreement}; below id {end} they agree, what differs are tokens that each added: set vocab_size: {end}"
        )
    return encoders


def shared_vocab_size(folders: Mapping[str, str | Path]) -> int:
    """The smallest ``vocab_size`` among the config.json of Hugging Face model folders."""
    sizes = []
    for name, folder in folders.items():
        path = Path(folder) / "config.json"
        try:
            size = json.loads(path.read_text())["vocab_size"]
        except OSError as error:
            raise InputError(f"{path}: cannot be read for {name}'s vocab_size: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: holds no vocab_size for {name}; expected a Hugging Face config.json") from None
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{path}: vocab_size is {size!r}; expected a positive whole number")
        sizes.append(size)
    return min(sizes)


def _first_difference(one: TextEncoder, two: TextEncoder, vocab_size: int) -> tuple[str, str, str] | None:
    for what, id_one, id_two in (("the BOS id", one.bos_id, two.bos_id), ("the EOS id", one.eos_id, two.eos_id)):
        if id_one != id_two:
            return what, str(id_one), str(id_two)
    pieces_one, pieces_two = one.pieces(), two.pieces()
    token = _first_other_piece(one, two, vocab_size)
    if token is not None:
        return f"the piece of id {token}", _quoted(pieces_one.get(token)), _quoted(pieces_two.get(token))
    for lead in (" ", ""):
        encoded = zip(_PROBES, one.encode_responses(_PROBES, lead), two.encode_responses(_PROBES, lead), strict=True)
        for text, ids_one, ids_two in encoded:
            for place in range(max(len(ids_one), len(ids_two))):
                if ids_one[place : place + 1] != ids_two[place : place + 1]:
                    what = f"token {place + 1} of {text!r}"
                    return what, _piece(ids_one, place, pieces_one), _piece(ids_two, place, pieces_two)
    return None


def _where_own_tokens_begin(one: TextEncoder, two: TextEncoder, vocab_size: int) -> int | None:
    """The first id from which on both have nothing but tokens of their own, if they agree below it; else None."""
    end = _first_other_piece(one, two, vocab_size)
    trained = (max(encoder.pieces().keys() - encoder.added(), default=-1) for encoder in (one, two))
    if end is None or end <= max(trained) or _first_difference(one, two, end):
        return None
    controls = (one.bos_id, one.eos_id)  # the other's are the same
    return None if any(token is not None and token >= end for token in controls) else end


def _first_other_piece(one: TextEncoder, two: TextEncoder, vocab_size: int) -> int | None:
    pieces_one, pieces_two = one.pieces(), two.pieces()
    added_one, added_two = one.added(), two.added()
    for token in range(vocab_size):
        here, there = pieces_one.get(token), pieces_two.get(token)
        only_added = (here is None and token in added_two) or (there is None and token in added_one)
        if here != there and not only_added:
            return token
    return None


def _quoted(piece: str | None) -> str:
    return "missing" if piece is None else repr(piece)


def _piece(ids: list[int], place: int, pieces: dict[int, str]) -> str:
    return _quoted(pieces.get(ids[place])) if place < len(ids) else "nothing"
