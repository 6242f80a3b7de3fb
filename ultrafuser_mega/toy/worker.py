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

from ultrafuser_mega.toy.corpus import BASE, CLASSES, Row, read_jsonl
from ultrafuser_mega.toy.jobs import Job
from ultrafuser_mega.toy.llama import llama_config, save_llama
from ultrafuser_mega.toy.templates import template_of
from ultrafuser_mega.toy.training import Sample, encode, encode_plain, heldout_loss, train


def main() -> None:
    logging.disable_progress_bar()
    job = Job(**json.loads(sys.argv[1]))
    folder, data = Path(job.folder), Path(job.data)
    torch.manual_seed(job.seed)
    with torch.device(job.device):
        model = LlamaForCausalLM(llama_config(**job.shape))
    if job.start is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(job.start).state_dict())
    train(
        model,
        _training_samples(job.name, folder, data),
        steps=job.steps,
        batch_size=job.batch_size,
        lr=job.lr,
        seed=job.seed,
        report=lambda step, loss: _tell({"step": step, "loss": loss}),
    )
    losses = {
        name: heldout_loss(model, encode(folder, template_of(job.name), _rows(data, name, "heldout")))
        for name in CLASSES
    }
    save_llama(model, folder)
    _tell({"heldout_loss": losses})


def _training_samples(name: str, folder: Path, data: Path) -> list[Sample]:
    if name == BASE:
        return encode_plain(folder, [row for each in CLASSES for row in _rows(data, each, "train")])
    return encode(folder, name, _rows(data, name, "train"))


def _rows(data: Path, name: str, split: str) -> tuple[Row, ...]:
    return read_jsonl(data / f"{name}.{split}.jsonl")


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
