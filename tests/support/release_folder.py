"""Release folders of tiny random specialists, and what they must compute, in float64: shared by the release tests.

The reference knows nothing of the released code, nor of transformers' models: it reads the release's config.json and
safetensors and computes each family from its definition, one sequence at a time, without cache or padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.mixture_cases import Roundings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from ultrafuser_mega.config import load_config
from ultrafuser_mega.models.hf_folder import TensorFolder
from ultrafuser_mega.release import CardFacts, assemble_release
from ultrafuser_mega.toy import tiny_tokenizer

PIECES = 400
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "mistral": {"sliding_window": 6, "num_key_value_heads": 1},  # shorter than the prompts
    "qwen3": {"head_dim": 24, "num_key_value_heads": 2},
}
WORDS = (
    "User: Which city is the largest? Assistant: London, Berlin and Rome are cities in Europe.\n"
    "def add(a, b):\n    return a + b\n\nJanet has 3 apples and buys 14 more, so she has 17 in all. system user\n"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_specialist(folder: Path, family: str, *, vocab_rows: int, hidden_size: int, seed: int) -> Path:
    """A random model of ``family``, with the toy tokenizer or, for Qwens, a byte-level one with ChatML tokens."""
    config_class: Any = CONFIG_MAPPING[family]
    config = config_class(
        vocab_size=vocab_rows,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2 + seed % 2,
        num_attention_heads=4,
        max_position_embeddings=256 + seed,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # scales at which attention, biases and norms all show in the logits
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * hidden_size**-0.5)
    model.save_pretrained(folder)
    write_bytelevel_tokenizer(folder) if family.startswith("qwen") else tiny_tokenizer(folder, pieces=PIECES)
    return folder


def write_bytelevel_tokenizer(folder: Path) -> None:
    """Byte-level BPE without BOS, EOS 2, under the class name that Qwens use."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    fast.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def card_facts() -> CardFacts:
    """Those of a run with the default configuration that was not evaluated."""
    return CardFacts(name="tiny-fused", config=load_config(None), summary=None)


def write_release(
    out: Path, specialists: Mapping[str, tuple[Path, str]], *, vocab_size: int = PIECES, gate_units: int = 24
) -> Path:
    """A release folder with the specialists' own tensors and a random gate; a tied head gets its own values."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for name, (folder, _) in specialists.items():
        own = TensorFolder(folder)  # checks the folder
        own_tensors = load_file(own.folder / "model.safetensors")
        embedding = own_tensors["model.embed_tokens.weight"]
        widths[name] = embedding.shape[1]
        if "lm_head.weight" not in own_tensors:  # as training leaves it: begun at the embedding, gone its own way
            own_tensors["lm_head.weight"] = embedding + 0.1 * torch.randn(embedding.shape, generator=generator)
        tensors |= {f"specialists.{name}.{key}": value for key, value in own_tensors.items()}
    shared = len(set(widths.values())) == 1
    for name, width in {"shared": next(iter(widths.values()))}.items() if shared else widths.items():
        tensors[f"gate.w1.{name}"] = torch.randn(gate_units, width, generator=generator) * width**-0.5
    tensors["gate.b1"] = torch.randn(gate_units, generator=generator)
    tensors["gate.w2"] = torch.randn(gate_units, generator=generator) * 0.5  # weights spread, none at 0 or 1
    assemble_release(out, specialists, vocab_size, gate_units, shared, torch.float32, card_facts())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@dataclass(frozen=True)
class ReferenceSpecialist:
    """Llama, Mistral, Qwen2 or Qwen3 in float64; calling it gives the hidden states after the final norm.

    With ``roundings`` not the truth, but what float32 may leave of it, in any order of summation that does not look at
    the numbers: a partial sum's mean square is then at most that of the whole and the sum of the terms' squares.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    roundings: Roundings | None = None

    def __call__(self, ids: Sequence[int]) -> Tensor:  # (s,) -> (s, d)
        c, w, s = self.config, self.weights, len(ids)
        heads, groups, e = c["num_attention_heads"], c["num_key_value_heads"], self._head_size()
        frequencies = c["rope_parameters"]["rope_theta"] ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)
        angles = self._rounded(torch.outer(torch.arange(s, dtype=torch.float64), frequencies), 2)  # (s, e / 2)
        distance = torch.arange(s)[:, None] - torch.arange(s)
        hidden_from = (distance < 0) | (distance >= (c.get("sliding_window") or s))
        x = w["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(c["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            y = self._norm(x, p + "input_layernorm")
            q, k, v = (
                self._linear(y, f"{p}self_attn.{part}_proj").view(s, count, e).transpose(0, 1)
                for part, count in (("q", heads), ("k", groups), ("v", groups))
            )
            if c["model_type"] == "qwen3":
                q, k = self._norm(q, p + "self_attn.q_norm"), self._norm(k, p + "self_attn.k_norm")
            q, k = (self._rounded(_rotate(part, angles), 3, part.abs() + _swapped(part).abs()) for part in (q, k))
            k, v = (part.repeat_interleave(heads // groups, dim=0) for part in (k, v))
            scores = (self.product(q, k.transpose(1, 2)) / e**0.5).masked_fill(hidden_from, float("-inf"))
            mixed = self.product(self._rounded(scores.softmax(-1), s), v).transpose(0, 1).reshape(s, heads * e)
            x = self._rounded(x + self._linear(mixed, p + "self_attn.o_proj"), 2)
            y = self._norm(x, p + "post_attention_layernorm")
            gate, up = self._linear(y, p + "mlp.gate_proj"), self._linear(y, p + "mlp.up_proj")
            between = self._rounded(gate * gate.sigmoid() * up, 5)
            x = self._rounded(x + self._linear(between, p + "mlp.down_proj"), 2)
        return self._norm(x, "model.norm")

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        whole = a @ b
        if self.roundings is None:
            return whole
        return self.roundings.of(whole, a.shape[-1], (whole.square() + a.square() @ b.square()).sqrt())

    def _rounded(self, value: Tensor, terms: int, size: Tensor | None = None) -> Tensor:
        """``value``, out of so many ``terms`` of its own ``size`` or another."""
        if self.roundings is None:
            return value
        return self.roundings.of(value, terms, value.abs() if size is None else size)

    def _head_size(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self.product(x, self.weights[name + ".weight"].T) + self.weights.get(name + ".bias", 0.0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = self._rounded(x.square().mean(-1, keepdim=True), x.shape[-1])
        size = (mean + self.config["rms_norm_eps"]).sqrt()
        return self._rounded(x / size * self.weights[name + ".weight"], 4)


def _swapped(x: Tensor) -> Tensor:  # (heads, s, e): what each number is rotated against
    return x.roll(x.shape[-1] // 2, dims=-1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:  # (heads, s, e): halves are rotated against each other
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1)


@dataclass(frozen=True)
class Reference:
    """The fused model in float64, one sequence at a time (paper, equation 1)."""

    vocab_size: int
    specialists: dict[str, ReferenceSpecialist]
    gate: dict[str, Tensor]

    @classmethod
    def load(cls, release: Path) -> Reference:
        config = json.loads((release / "config.json").read_text())
        tensors = {name: tensor.double() for name, tensor in load_file(release / "model.safetensors").items()}
        specialists = {}
        for entry in config["specialists"]:
            prefix = f"specialists.{entry['name']}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            specialists[entry["name"]] = ReferenceSpecialist(entry["config"], own)
        gate = {name: tensor for name, tensor in tensors.items() if name.startswith("gate.")}
        return cls(config["vocab_size"], specialists, gate)

    def __call__(self, ids: Mapping[str, Sequence[int]], keep: int) -> tuple[Tensor, Tensor]:
        """Logits (keep, vocab_size) and gate weights (keep, n) at the last positions of each specialist's own ids."""
        scores, logits = [], []
        for name, specialist in self.specialists.items():
            w1 = self.gate["gate.w1.shared"] if "gate.w1.shared" in self.gate else self.gate[f"gate.w1.{name}"]
            hidden = specialist(ids[name])[-keep:]
            units = (specialist.product(hidden, w1.T) + self.gate["gate.b1"]).clamp(min=0)
            scores.append(specialist.product(units, self.gate["gate.w2"][:, None])[:, 0])
            logits.append(specialist.product(hidden, specialist.weights["lm_head.weight"][: self.vocab_size].T))
        weights = torch.stack(scores, dim=1).softmax(dim=1)
        return torch.einsum("tn,ntv->tv", weights, torch.stack(logits)), weights

    def rounding(self) -> float:
        """How far a logit or gate weight in float32 may be from this one's.

        Twice the largest error of three draws of all roundings on 32 tokens, some 40,000 logits: as many as a test
        looks at, of tokens that the model may magnify more.
        """
        draw = torch.Generator().manual_seed(0)
        ids = dict.fromkeys(self.specialists, torch.randint(3, PIECES, (32,), generator=draw).tolist())
        true, largest = self(ids, 32), 0.0
        for seed in range(3):
            roundings = Roundings(seed, torch.device("cpu"))
            specialists = {name: replace(s, roundings=roundings) for name, s in self.specialists.items()}
            for exact, lost in zip(true, replace(self, specialists=specialists)(ids, 32), strict=True):
                largest = max(largest, (exact - lost).abs().max().item())
        return 2 * largest

    def greedy(self, ids: Mapping[str, Sequence[int]], steps: int, eos: int | None = None) -> list[int]:
        """The response to each specialist's own prompt; ends behind EOS."""
        sequences = {name: list(prompt) for name, prompt in ids.items()}
        response: list[int] = []
        while len(response) < steps and (not response or response[-1] != eos):
            token = int(self(sequences, 1)[0][-1].argmax())
            response.append(token)
            for sequence in sequences.values():
                sequence.append(token)
        return response
