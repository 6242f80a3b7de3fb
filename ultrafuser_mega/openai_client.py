"""OpenAI's own client, for models, judges and writers of data behind an endpoint."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from ultrafuser_mega.errors import InputError

KEY = "OPENAI_API_KEY"
_RETRIES = 8  # by the client, after 0.5 s, 1 s, 2 s, ... 8 s, or as long as the endpoint says
_TIMEOUT_S = 300.0
_MOST_BYTES = 64 * 2**20  # of a reply: more than any model writes
_MOST_BYTES_OF_A_FILE = 8 * 2**30  # that a batch came to


def open_client(what: str, url: str | None) -> Any:
    """An ``openai.OpenAI``, which tries again, more and more slowly, what is worth it.

    Args:
        what: is asked, for messages.
        url: of the endpoint, as "https://host/v1"; None: OpenAI's.

    Raises:
        InputError: the package or a key is missing.
    """
    return _open("OpenAI", what, url, KEY, "evaluation", max_retries=_RETRIES, timeout=_TIMEOUT_S)


def open_async_client(what: str, url: str | None, key: str, timeout_s: float) -> Any:
    """An ``openai.AsyncOpenAI`` that tries nothing again, for a caller that counts what it asks.

    Args:
        what, url: as :func:`open_client` has them.
        key: the environment variable that holds the endpoint's key.
        timeout_s: of a request.

    Raises:
        InputError: the package or a key is missing.
    """
    return _open("AsyncOpenAI", what, url, key, "synthesis", max_retries=0, timeout=timeout_s)


def one_line(error: Exception) -> str:
    """What the client has to say, shortened."""
    said = "".join(sign if sign.isprintable() else " " for sign in str(error))  # what an endpoint says goes to consoles
    return " ".join(said.split())[:300] or type(error).__name__


def _bound(response: Any) -> None:
    response.stream = _bounded(response)


async def _bound_later(response: Any) -> None:
    response.stream = _bounded(response)


def _bounded(response: Any) -> Any:
    """The body of a response, which ends the request where it is compressed or too large."""
    library = import_module(type(response).__module__.partition(".")[0])  # httpx, or what takes its place
    stream, most = response.stream, _MOST_BYTES
    if response.request.url.path.endswith("/content"):
        most = _MOST_BYTES_OF_A_FILE
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise library.DecodingError(f"a reply in {encoding}, which was not asked for", request=response.request)
    size = 0

    def counted(part: bytes) -> bytes:
        nonlocal size
        size += len(part)
        if size > most:
            raise library.DecodingError(f"a reply of more than {most >> 20} MiB", request=response.request)
        return part

    class Bounded(library.AsyncByteStream, library.SyncByteStream):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[bytes]:
            for part in stream:
                yield counted(part)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in stream:
                yield counted(part)

        def close(self) -> None:
            stream.close()

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def _open(kind: str, what: str, url: str | None, key: str, extra: str, **settings: Any) -> Any:
    try:
        urlsplit(url or "").port  # noqa: B018  its error is what is wanted
    except ValueError as error:
        raise InputError(f"{what}: {url} is no address ({error}); expected one as http://localhost:8000/v1") from None
    if find_spec("openai") is None:
        raise InputError(f"{what}: the openai client is not installed; pip install 'ultrafuser_mega[{extra}]'")
    import openai

    # An endpoint of one's own often wants no key, which the client does.
    value = os.environ.get(key, "").strip() or ("none" if url else None)
    if value is not None and not (value.isascii() and value.isprintable()):
        raise InputError(f"{what}: the key in {key} holds what is no printable ASCII; set it again")
    if value is None and key != KEY:  # without a key the client would take OpenAI's
        raise InputError(f"{what}: no key; set {key}, or name an endpoint of your own")
    try:
        http = getattr(openai, f"Default{kind.removesuffix('OpenAI')}HttpxClient")
        hook = _bound_later if kind.startswith("Async") else _bound
        client = http(event_hooks={"response": [hook]}, timeout=settings["timeout"])
        # What is not compressed cannot unpack to more than it is.
        plain = {"Accept-Encoding": "identity"}
        return getattr(openai, kind)(base_url=url, api_key=value, http_client=client, default_headers=plain, **settings)
    except openai.OpenAIError as error:
        raise InputError(f"{what}: {one_line(error)}; set {key}, or name an endpoint") from None
