"""OpenAI's own client, for models and for judges behind an endpoint."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from ultrafuser_mega.errors import InputError

_RETRIES = 8  # by the client, after 0.5 s, 1 s, 2 s, ... 8 s, or as long as the endpoint says
_TIMEOUT_S = 300.0


def open_client(what: str, url: str | None) -> Any:
    """An ``openai.OpenAI``, which tries again, more and more slowly, what is worth it.

    Args:
        what: is asked, for messages.
        url: of the endpoint, as "https://host/v1"; None: OpenAI's.

    Raises:
        InputError: the package or a key is missing.
    """
    if find_spec("openai") is None:
        raise InputError(f"{what}: the openai client is not installed; pip install 'ultrafuser_mega[evaluation]'")
    from openai import OpenAI, OpenAIError

    # An endpoint of one's own often wants no key, which the client does.
    key = os.environ.get("OPENAI_API_KEY") or ("none" if url else None)
    try:
        return OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT_S)
    except OpenAIError as error:
        raise InputError(f"{what}: {one_line(error)}; set OPENAI_API_KEY, or name an endpoint") from None


def one_line(error: Exception) -> str:
    """What the client has to say, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
