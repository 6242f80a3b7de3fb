"""Options that ``generate`` and ``chat`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="release folder, checkpoint or run (runs/<name>)", show_default=False)
]
System = Annotated[str | None, typer.Option(help="system text before the conversation", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(help="0: the most likely token; above: draws")]
TopK = Annotated[int, typer.Option(help="draw from the k most likely tokens; 0: all")]
TopP = Annotated[float, typer.Option(help="draw from the most likely tokens that add up to this probability")]
MinP = Annotated[float, typer.Option(help="draw from tokens at least this times as likely as the likeliest")]
RepetitionPenalty = Annotated[float, typer.Option(help="above 1 discourages tokens that were there before")]
Stop = Annotated[
    list[str] | None, typer.Option(help="text that ends an answer and is left out; repeatable", show_default=False)
]
Seed = Annotated[int, typer.Option(help="of the draws")]
GateTrace = Annotated[Path | None, typer.Option(help="JSONL to write: gate weights of every token", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:N, or one per specialist: cuda:0,cuda:1,cuda:2")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored", show_default=False)]
