"""``ultrafuser generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.cli.sampling_options import AnswerOptions, Model, System, takes_answer_options
from ultrafuser_mega.errors import InputError


@takes_answer_options(max_new_tokens=256)
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="default: standard input", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it stands, without templates")] = False,
    system: System = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="JSON or JSONL file of prompts", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSONL file of answers; must not exist", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="prompts of --input at a time", min=1)] = 8,
    *,
    answer: AnswerOptions,
) -> None:
    """Answer one prompt, or a file of prompts.

    A prompt is an instruction: every specialist gets it in the template that it was trained with. On a terminal each
    token has the colour of the specialist with the largest gate weight.

    --input takes rows as training data has them (instruction, question, prompt, messages or conversations; answers may
    be missing) and writes them to --output with the fields "generated" and "finish_reason" (eos, stop or length).
    """
    if (input_ is None) != (output is None):
        raise InputError("--input and --output belong together; give both or neither")
    if input_ is not None and (prompt is not None or raw):
        raise InputError("--input: takes neither PROMPT nor --raw; leave one of them out")
    if raw and system:
        raise InputError("--system: --raw uses no templates; put the text into the prompt")
    # Behind what costs nothing: torch and transformers take seconds.
    from ultrafuser_mega.checkpoint.unfinished import refuse_existing
    from ultrafuser_mega.cli.terminal import AnswerPrinter
    from ultrafuser_mega.inference.answer import Answerer, check_text
    from ultrafuser_mega.inference.batch import PromptFile, TraceFile, answer_file
    from ultrafuser_mega.inference.model import opened_model

    limits, sampling, gate_trace = answer.limits, answer.sampling, answer.gate_trace
    serving = answer.serving(rows=1 if input_ is None else batch_size)
    source = PromptFile(input_) if input_ is not None else None
    text = prompt if prompt is not None or source is not None else sys.stdin.read()
    if text is not None:
        check_text("the prompt", text)
    if output is not None and gate_trace is not None and output.resolve() == gate_trace.resolve():
        raise InputError(f"--output, --gate-trace: both are {output}; give two files")
    for path in (output, gate_trace):
        if path is not None:
            refuse_existing(path)
    with opened_model(model, answer.device, answer.dtype) as opened:
        answerer = Answerer(opened, serving)
        if source is not None:
            assert output is not None
            prompts = source.encode(answerer, system)
            answer_file(answerer, source, prompts, output, gate_trace, limits, sampling)
            print(f"wrote {output}: {len(prompts)} answers")
            return
        assert text is not None
        if raw:
            encoded = answerer.encode_raw(text)
        else:
            opening = [{"role": "system", "content": system}] if system else []
            encoded = answerer.encode([*opening, {"role": "user", "content": text}])
        with TraceFile(gate_trace, answerer.names) as traces:
            traces.write(0, AnswerPrinter(answerer.names).stream(answerer, encoded, limits, sampling, lead=not raw))
