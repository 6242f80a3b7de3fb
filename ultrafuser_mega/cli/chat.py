"""``ultrafuser chat``."""

from __future__ import annotations

import sys

from ultrafuser_mega.cli.sampling_options import AnswerOptions, Model, System, takes_answer_options


@takes_answer_options(max_new_tokens=512)
def chat(model: Model, system: System = None, *, answer: AnswerOptions) -> None:
    """Talk to a fused model; /help at its prompt shows commands.

    A turn computes only what is new: caches keep the conversation.
    """
    from ultrafuser_mega.checkpoint.unfinished import refuse_existing
    from ultrafuser_mega.cli import terminal
    from ultrafuser_mega.inference.answer import Answerer
    from ultrafuser_mega.inference.batch import TraceFile
    from ultrafuser_mega.inference.model import opened_model

    limits, sampling, gate_trace = answer.limits, answer.sampling, answer.gate_trace
    serving = answer.serving(rows=1)
    if gate_trace is not None:
        refuse_existing(gate_trace)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()
    with opened_model(model, answer.device, answer.dtype) as opened:
        answerer = Answerer(opened, serving)
        with TraceFile(gate_trace, answerer.names) as traces:
            if interactive:
                print("Say something; /help shows what else there is.")
            printer = terminal.AnswerPrinter(answerer.names)
            read = input if interactive else lambda prompt: input()
            terminal.chat(answerer, printer, traces, limits, sampling, system, read)
