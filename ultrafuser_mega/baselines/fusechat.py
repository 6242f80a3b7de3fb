"""FuseChat (Wan et al. 2024): the pivot learns from every other specialist, once each; what comes of it is merged.

For each other specialist j a copy of the pivot is trained on the fused model's data. Of a sample's response it learns
the tokens and a distribution over each: that of the pivot or that of j, whichever gave the response the lower
cross-entropy (MinCE, per sample). With P that distribution and Q the copy's,

    loss = lambda CE(Q, tokens) - (1 - lambda) sum P log Q,    lambda = 0.9

which ``ops.distillation_loss`` computes, up to the entropy of P, without anyone's full logits. Both teachers read the
sample in their own form; the response's tokens are the same for all, so nothing is aligned.
The copies are then averaged matrix by matrix, each weighed by the mean square of its change (VaRM):

    w_j = E[(t_j - pivot)^2] / sum_k E[(t_k - pivot)^2]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.baselines.folder import Account, new_folder, write_beside_weights, write_card, write_losses
from ultrafuser_mega.baselines.heldout import Model, States, heldout_losses, load_model, response_states
from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.merging import write_combination
from ultrafuser_mega.baselines.tuned import opened, save_weights, tuned_config
from ultrafuser_mega.baselines.tuning import MicroLoss, Tuning, read_state, tune
from ultrafuser_mega.checkpoint.unfinished import refuse_out
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import EMBEDDING, read_json_object
from ultrafuser_mega.ops import cross_entropy_of_each, distillation_loss
from ultrafuser_mega.release.assemble import assemble_single
from ultrafuser_mega.reporting.records import SUMMARY_FILE
from ultrafuser_mega.runtime.device import choose_device
from ultrafuser_mega.training.stopping import Stop

LAMBDA = 0.9
PIVOT = "pivot"
TARGET = "target"  # sub-folder of a pair's run: what its copy of the pivot became


def fusechat(config: FuserConfig, out: Path, of: Sequence[str], *, resume: bool = False) -> Stop | None:
    """Train a copy of the pivot for every other specialist, merge, write ``out``; why it stopped before, if it did.

    Args:
        config: of the fused model's run.
        out: must not exist.
        of: specialists, the pivot first; the others may have any structure.
        resume: go on; pairs that are done are not trained again.

    Raises:
        InputError: there is one specialist only, nothing to resume, or the run cannot begin, go on or be written.
        DivergedError: training ruined the numbers.
    """
    refuse_out(out)
    pivot, *others = of
    if not others:
        raise InputError(f"--of {pivot}: a pivot and another specialist at least; --of takes the pivot first")
    targets: dict[str, Path] = {}
    for other in others:
        run_config = tuned_config(config, f"fusechat-{pivot}-{other}")
        plan, store = opened(run_config)
        targets[other] = run_config.run_dir / TARGET
        identity = {"pivot": pivot, "other": other, "lambda": LAMBDA}
        pair = Tuning(run_config, store, (pivot, other), identity, f"{pivot} learns from {other}")
        # Later pairs may not have begun; without the first one's state there is nothing to go on from.
        begun = resume and (pair.state.is_file() or other == others[0])
        if begun and targets[other].is_dir():
            read_state(pair)  # which sees that it was trained as it would be now
        elif stop := _train_pair(pair, resume=begun):
            return stop
    whole = tuned_config(config, "fusechat")
    folders = {PIVOT: whole.folders[pivot], **targets}
    ingredients = Ingredients.of(folders, plan.vocab_size)
    summaries = {other: read_json_object(folder.parent / SUMMARY_FILE)["eval"] for other, folder in targets.items()}
    words = f"{pivot} trained to predict as the better of itself and each of {', '.join(others)}, a copy for each, the "
    words += "copies merged by the size of their changes (FuseChat, Wan et al. 2024; VaRM)."
    account = Account(
        method="fusechat",
        words=words,
        config=whole,
        like=pivot,
        settings={"pivot": pivot, "others": others, "lambda": LAMBDA, "steps": whole.stage2.steps},
        made_of={name: whole.folders[name] for name in of},
    )
    with new_folder(out) as folder:
        write_combination(folder, ingredients, lambda tensor: variation_weights(ingredients, list(targets), tensor))
        fields = read_json_object(whole.folders[pivot] / "config.json")
        fields["tie_word_embeddings"] = ingredients.tied
        write_beside_weights(folder, account, fields, plan.vocab_size, ingredients.dtype(EMBEDDING))
        losses = heldout_losses(load_model(folder, choose_device(whole.device)), store, whole, pivot)
        write_losses(folder, losses, {"pairs": summaries, "steps": whole.stage2.steps})
        write_card(folder, account, out.name, losses)
    return None


def variation_weights(ingredients: Ingredients, targets: Sequence[str], tensor: str) -> dict[str, float]:
    """VaRM: target -> its weight for ``tensor``, by the mean square of its change; alike where nothing changed."""
    squares = dict.fromkeys(targets, 0.0)
    for rows in ingredients.row_blocks(tensor):
        pivot = ingredients.read(PIVOT, tensor, rows).double()
        for target in targets:
            squares[target] += float((ingredients.read(target, tensor, rows).double() - pivot).square().sum())
    total = sum(squares.values())
    if not total:
        return dict.fromkeys(targets, 1.0 / len(targets))
    return {target: square / total for target, square in squares.items()}


def best_teacher(losses: Tensor, counts: Sequence[int]) -> Tensor:
    """MinCE: gate logits (N, teachers), 0 for the teacher with the lower cross-entropy on a row's sample, else -inf.

    Args:
        losses: (teachers, N) of the response tokens.
        counts: response tokens of each sample; they sum to N.
    """
    means = torch.stack([part.mean(1) for part in losses.split(list(counts), dim=1)], dim=1)  # (teachers, samples)
    best = means.argmin(0).repeat_interleave(torch.tensor(counts, device=losses.device))
    return losses.new_full(losses.t().shape, float("-inf")).scatter_(1, best[:, None], 0.0)


def fusion_loss(student: States, teachers: Sequence[States], targets: Tensor, counts: Sequence[int]) -> MicroLoss:
    """What the copy is to learn of N response tokens, up to the entropy of P, which no weight changes.

    Args:
        student: (N, d) hidden states and (V, d) output head.
        teachers: the same of each, of their own widths.
        targets: (N,) the response tokens.
        counts: response tokens of each sample; they sum to N.
    """
    hidden, heads = [states.float() for states, _ in teachers], [head.float() for _, head in teachers]
    alike = hidden[0].new_zeros((len(targets), len(teachers)))
    shard: dict[str, Any] = {"group": None, "vocab_start": 0, "vocab_size": len(heads[0])}
    losses = cross_entropy_of_each(hidden, heads, alike, targets, **shard)[2:]
    gate = best_teacher(losses, counts)
    states, head = student
    found = distillation_loss(
        states.float(), head.float(), hidden, heads, gate, targets, labels=LAMBDA, reduction="sum"
    )
    return MicroLoss(found.row_losses, total=found.loss)


def _train_pair(pair: Tuning, *, resume: bool) -> Stop | None:
    config, store, (pivot, other) = pair.config, pair.store, pair.forms
    device = choose_device(config.device)
    teachers = {name: load_model(config.folders[name], device).eval().requires_grad_(False) for name in (pivot, other)}
    model = load_model(config.folders[pivot], device)
    model.resize_token_embeddings(store.vocab_size)

    def loss_of(model: Model, batch: MicroBatch) -> MicroLoss:
        with torch.no_grad():
            known = [response_states(teacher, batch, name, store.vocab_size) for name, teacher in teachers.items()]
        own = response_states(model, batch, pivot, store.vocab_size)
        return fusion_loss(own, known, batch.targets, batch.row_counts)

    if stop := tune(model, pair, loss_of, resume=resume):
        return stop
    target = config.run_dir / TARGET
    with new_folder(target) as folder:
        save_weights(model, folder, config)
        sources = {name: (config.folders[name], part.template) for name, part in config.specialists.items()}
        assemble_single(folder, sources, store.vocab_size, pivot, {})
    return None
