"""``ultrafuser serve``."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ultrafuser_mega.cli.sampling_options import Model
from ultrafuser_mega.errors import InputError

if TYPE_CHECKING:  # importing them for a --help would take seconds
    from ultrafuser_mega.inference.embedded import Serving
    from ultrafuser_mega.inference.model import OpenedModel
    from ultrafuser_mega.inference.text_engine import TextEngine

Kind = Literal["embedded", "vllm"]
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="of the model, for clients; default: MODEL's last part", show_default=False)
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="file with a key on each line, of which clients show one", show_default=False),
    ] = None,
    queue: Annotated[int, typer.Option(help="answers under way or waiting; more get 429", min=1)] = 512,
    drain: Annotated[float, typer.Option(help="seconds that answers have to finish after SIGTERM", min=0)] = 60.0,
    rows: Annotated[int, typer.Option(help="answers that are computed at a time, at most", min=1)] = 64,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB for the caches of all specialists; default: by what is free", show_default=False),
    ] = None,
    draft: Annotated[
        int | None,
        typer.Option(
            help="tokens that the leading specialist drafts for the others to check, or that are guessed for a "
            "model alone, for the same answers sooner; 0: none; default: 8, where each specialist has a device none",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Kind, typer.Option(help="embedded, or vllm: an engine of vLLM's for each specialist (docs/serving_vllm.md)")
    ] = "embedded",
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda:N, or one per specialist: cuda:0,cuda:1,cuda:2; with vllm, several that are joined, "
            "as in cuda:0+cuda:1, share a specialist"
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored", show_default=False)
    ] = None,
) -> None:
    """Serve a model to many clients at once, in OpenAI's protocol, with a page to chat at /.

    Keys are also taken from ULTRAFUSER_API_KEY. SIGTERM ends the server: answers under way may finish.
    """
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serve needs {error.name}: pip install 'ultrafuser_mega[serve]'") from None
    from ultrafuser_mega.inference.embedded import Serving
    from ultrafuser_mega.serving.keys import Keys
    from ultrafuser_mega.serving.server import Settings, listen
    from ultrafuser_mega.serving.server import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serving = Serving(rows, memory, draft)
    keys = Keys.load(api_keys)
    listener = listen(host, port)
    # While the model is loaded; an exception, so that what was begun, as other processes, is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    called = name or Path(model.rstrip("/")).name
    settings = Settings(host, port, called, keys, most=queue, drain=drain)
    started = _vllm if engine == "vllm" else _embedded
    with started(model, device, dtype, serving) as (opened, text):
        if host not in _LOCAL and not keys:
            logging.warning("anyone who reaches %s may ask: --api-keys or ULTRAFUSER_API_KEY sets keys", host)
        raise typer.Exit(run(opened, text, listener, settings))


@contextmanager
def _embedded(model: str, device: str, dtype: str | None, serving: Serving) -> Iterator[tuple[OpenedModel, TextEngine]]:
    from ultrafuser_mega.inference.embedded import text_engine
    from ultrafuser_mega.inference.model import opened_model

    with opened_model(model, device, dtype) as opened:
        yield opened, text_engine(opened, serving)


@contextmanager
def _vllm(model: str, device: str, dtype: str | None, serving: Serving) -> Iterator[tuple[OpenedModel, TextEngine]]:
    from ultrafuser_mega.inference.model import described_model
    from ultrafuser_mega.inference.text_engine import TextEngine
    from ultrafuser_mega.inference.vllm.engine import VllmEngine
    from ultrafuser_mega.inference.vllm.placing import Placing

    if serving.draft:
        raise InputError(f"--draft {serving.draft}: not with --engine vllm, whose specialists work side by side")
    placing = Placing(device, serving.rows, serving.memory)
    with described_model(model, dtype) as opened, VllmEngine(model, opened, placing) as engine:
        yield opened, TextEngine(engine, opened.tokenizer, opened.model.config.response_lead, opened.eos)
