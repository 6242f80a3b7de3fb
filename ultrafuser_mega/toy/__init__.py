"""Toy specialists: small Llamas really trained on generated text, code and math instructions.

They stand in for real specialists where nothing can be downloaded: the embedded default, the demo
and the tests. :func:`make_toy` builds the trained trio; :func:`tiny_llama` and
:func:`tiny_tokenizer` write untrained folders in a moment.
"""

from __future__ import annotations

from ultrafuser_mega.toy.build import ToyFolders, ToyRecipe, make_toy
from ultrafuser_mega.toy.llama import tiny_llama
from ultrafuser_mega.toy.tokenizer import tiny_tokenizer

__all__ = ["ToyFolders", "ToyRecipe", "make_toy", "tiny_llama", "tiny_tokenizer"]
