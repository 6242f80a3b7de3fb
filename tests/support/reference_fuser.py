"""The fused model written a second time: one process, plain PyTorch, float64, straight from the paper.

Shares no code with the package: Llama from its definition, equations 1 and 2, gradients by autograd. Only the samples
come from the package's token store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultrafuser_mega.data.store import TokenStore


class ReferenceLlama:
    """A Hugging Face Llama folder as float64 leaves; calling it gives hidden states after the final norm.

    ``adapters``: name of a weight -> A and B, of which scale B A is added to it.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}
        self.scale = 1.0

    def __call__(self, ids: Tensor) -> Tensor:  # (s,) -> (s, d)
        c, w = self.config, self.weights | {n: self.merged(n) for n in self.adapters}
        heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
        x = w["model.embed_tokens.weight"][ids]
        e = x.shape[1] // heads
        theta = c["rope_parameters"]["rope_theta"]
        frequencies = theta ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)
        angles = torch.outer(torch.arange(len(ids), dtype=torch.float64), frequencies)  # (s, e / 2)
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            y = self._norm(x, p + "input_layernorm.weight")
            q, k, v = (
                (y @ w[f"{p}self_attn.{name}_proj.weight"].T).view(len(ids), n, e).transpose(0, 1)
                for name, n in (("q", heads), ("k", groups), ("v", groups))
            )
            q, k = self._rotate(q, angles), self._rotate(k, angles)
            k, v = (t.repeat_interleave(heads // groups, dim=0) for t in (k, v))
            scores = (q @ k.transpose(1, 2) / e**0.5).masked_fill(future, float("-inf"))
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), heads * e)
            x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
            y = self._norm(x, p + "post_attention_layernorm.weight")
            gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm.weight")

    def merged(self, name: str) -> Tensor:
        """A weight with its adapters' product added."""
        a, b = self.adapters[name]
        return self.weights[name] + self.scale * b @ a

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.weights[name]

    @staticmethod
    def _rotate(x: Tensor, angles: Tensor) -> Tensor:  # (heads, s, e): halves are rotated against each other
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1)

    def save_gradients(self, folder: Path) -> None:
        """Gradients under the names of their weights, so that whatever reads weights can read them."""
        zeros = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self._save({name: w.grad if w.grad is not None else zeros[name] for name, w in self.weights.items()}, folder)

    def save_weights(self, folder: Path) -> None:
        """The weights as a Hugging Face folder; where rows of the head were cut off, the model has no more rows."""
        rows = self.config["vocab_size"]
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        head = weights["lm_head.weight"]
        weights["lm_head.weight"] = torch.cat([head, head.new_zeros(rows - len(head), head.shape[1])])
        self._save(weights, folder)

    def _save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))


def fused_loss(
    specialists: dict[str, ReferenceLlama],
    gate: dict[str, Tensor],
    sequences: list[dict[str, tuple[list[int], list[int]]]],
    vocab_size: int,
) -> Tensor:
    """Mean cross-entropy over all response tokens (equation 2, per token), gradients into every weight.

    Args:
        specialists: name -> model, in the order of the gate's softmax.
        gate: ``w1`` (m, d) shared, or ``w1.<name>`` for each; ``b1`` (m,); ``w2`` (m,).
        sequences: per sample, specialist -> (ids, positions of the response tokens in them).
        vocab_size: entries of the shared vocabulary.
    """
    terms = []
    for sample in sequences:
        logits, scores, target = [], [], None
        for name, model in specialists.items():
            ids, positions = sample[name]
            h = model(torch.tensor(ids))[torch.tensor(positions) - 1]
            logits.append(h @ model.weights["lm_head.weight"][:vocab_size].T)
            hidden = torch.relu(h @ (gate["w1"] if "w1" in gate else gate[f"w1.{name}"]).T + gate["b1"])
            scores.append(hidden @ gate["w2"])
            target = torch.tensor(ids)[torch.tensor(positions)]
        weights = torch.stack(scores, dim=1).softmax(dim=1)
        z = torch.stack([weights[:, j, None] * o for j, o in enumerate(logits)]).sum(0)
        assert target is not None  # there are specialists
        terms.append(torch.nn.functional.cross_entropy(z, target, reduction="none"))
    return torch.cat(terms).mean()


def sequences_of(
    store: TokenStore, picks: Sequence[tuple[str, int]], specialists: Sequence[str]
) -> list[dict[str, tuple[list[int], list[int]]]]:
    """The training samples ``picks`` (class, index) as :func:`fused_loss` takes them."""
    sequences = []
    for class_name, index in picks:
        sample = store.split(class_name, "train")[index]
        sequence = {}
        for name in specialists:
            ids: list[int] = []
            positions: list[int] = []
            for prompt, response in zip(sample.prompts_of(name), sample.responses, strict=True):
                ids += prompt.tolist()
                positions += range(len(ids), len(ids) + len(response))
                ids += response.tolist()
            sequence[name] = (ids, positions)
        sequences.append(sequence)
    return sequences
