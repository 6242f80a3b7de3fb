"""``ultrafuser chat``."""

from __future__ import annotations

import sys

from ultrafuser_mega.cli.sampling_options import (
    Device,
    Dtype,
    GateTrace,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
)


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    gate_trace: GateTrace = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Talk to a fused model; /help at its prompt shows commands.

    A turn computes only what is new: caches keep the conversation.
    """
    from ultrafuser_mega.cli import terminal
    from ultrafuser_mega.inference.answer import Answerer, Limits
    from ultrafuser_mega.inference.batch import TraceFile, refuse_existing
    from ultrafuser_mega.inference.model import opened_model
    from ultrafuser_mega.inference.sampling import Sampling

    limits = Limits(max_new_tokens, tuple(stop or ()))
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if gate_trace is not None:
        refuse_existing(gate_trace)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()
    with opened_model(model, device, dtype) as opened:
        answerer = Answerer(opened)
        with TraceFile(gate_trace, answerer.names) as traces:
            if interactive:
                print("Say something; /help shows what else there is.")
            printer = terminal.AnswerPrinter(answerer.names)
            read = input if interactive else lambda prompt: input()
            terminal.chat(answerer, printer, traces, limits, sampling, system, read)
