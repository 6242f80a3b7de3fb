"""One training process of the toy trio: ``python -m ultrafuser_mega.toy.worker JOB`` (jobs.py starts it).

Trains, evaluates on the held-out rows of every class and saves; tells its progress as JSON lines on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from ultrafuser_mega.toy.corpus import CLASSES, read_jsonl
from ultrafuser_mega.toy.jobs import Job
from ultrafuser_mega.toy.llama import llama_config, save_llama
from ultrafuser_mega.toy.training import encode, heldout_loss, train


def main() -> None:
    logging.disable_progress_bar()
    job = Job(**json.loads(sys.argv[1]))
    folder, data = Path(job.folder), Path(job.data)
    torch.manual_seed(job.seed)
    with torch.device(job.device):
        model = LlamaForCausalLM(llama_config(**job.shape))
    train(
        model,
        encode(folder, job.name, read_jsonl(data / f"{job.name}.train.jsonl")),
        steps=job.steps,
        batch_size=job.batch_size,
        lr=job.lr,
        seed=job.seed,
        report=lambda step, loss: _tell({"step": step, "loss": loss}),
    )
    losses = {
        name: heldout_loss(model, encode(folder, job.name, read_jsonl(data / f"{name}.heldout.jsonl")))
        for name in CLASSES
    }
    save_llama(model, folder)
    _tell({"heldout_loss": losses})


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
