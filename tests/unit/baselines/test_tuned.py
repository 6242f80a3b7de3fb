"""A mixture of experts and a distilled model: what they compute, learn and are put together by; runs that go on."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.branched import branched_tree, write_branched
from support.command import ultrafuser
from support.tuning import plain_loss
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser_mega.baselines import btx
from ultrafuser_mega.baselines.fusechat import PIVOT, best_teacher, fusion_loss, variation_weights
from ultrafuser_mega.baselines.heldout import Model, load_model, response_logits, response_states, whole_shard
from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.tuned import opened, tuned_config
from ultrafuser_mega.baselines.tuning import MicroLoss, Tuning, row_losses, tune
from ultrafuser_mega.config import FuserConfig, Loss
from ultrafuser_mega.data.batches import EvaluationBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.errors import EXIT_BAD_INPUT, DivergedError, InputError
from ultrafuser_mega.inference.answer import Answerer, Limits
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.training.stopping import Stop

NAMES = ("text", "code", "math")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_branched(tmp_path_factory.mktemp("branched"))


@pytest.fixture
def config(branched: Path, tmp_path: Path) -> FuserConfig:
    return FuserConfig.model_validate(branched_tree(branched, tmp_path / "runs"))


@pytest.fixture
def config_path(branched: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(branched_tree(branched, tmp_path / "runs"), sort_keys=False))
    return path


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_mixture_of_equal_experts_is_the_dense_model(branched: Path, tmp_path: Path) -> None:
    ingredients = Ingredients.of(dict.fromkeys(NAMES, branched / "text"))
    btx.write_mixture(tmp_path, ingredients, seed=3, shard_bytes=50_000)
    ids = torch.arange(3, 60)[None]
    expected = logits(branched / "text", ids)
    # Top-2 weights sum to one; a third of three equal weights is rounded in float64: float32's steps alone.
    torch.testing.assert_close(logits(tmp_path, ids), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_mixture_sends_a_token_to_its_two_best_experts(branched: Path, tmp_path: Path) -> None:
    """The first layer of transformers' Mixtral against the specialists' own feed-forward parts."""
    ingredients = Ingredients.of({name: branched / name for name in NAMES})
    btx.write_mixture(tmp_path, ingredients, seed=3)
    model = load_model(tmp_path, CPU)
    block = model.model.layers[0].mlp
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    experts = torch.stack([load_model(branched / name, CPU).model.layers[0].mlp(states)[0] for name in NAMES])
    scores = states[0] @ block.gate.weight.t()
    top = scores.topk(2)
    weights = torch.zeros_like(scores).scatter(1, top.indices, top.values.softmax(1))
    expected = torch.einsum("tn,ntd->td", weights, experts)
    torch.testing.assert_close(block(states)[0], expected, rtol=1e-5, atol=1e-6)
    attention = [load_model(branched / name, CPU).model.layers[1].self_attn.q_proj.weight for name in NAMES]
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, torch.stack(attention).mean(0))


def test_balance_is_least_where_experts_share_alike() -> None:
    even = torch.eye(3).repeat(4, 1) * 20  # every token sure of one expert, a third of them of each
    uneven = torch.tensor([[20.0, 0.0, 0.0]]).repeat(12, 1)
    # top 1: N sum (1/N)(1/N) = 1; all to one expert: N.
    assert btx.balance((even,), 1).item() == pytest.approx(1.0, abs=1e-6)
    assert btx.balance((uneven, even), 1).item() == pytest.approx(4.0, abs=1e-5)
    scores = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], dtype=torch.float64)
    p = scores.softmax(1)
    kept = p * torch.tensor([[1, 1, 0], [1, 1, 0]])  # each token's two largest
    g = kept / kept.sum(1, keepdim=True)
    assert btx.balance((scores,), 2).item() == pytest.approx(3 * (g.mean(0) * p.mean(0)).sum().item(), rel=1e-6)


def test_families_that_mixtral_cannot_compute_are_refused(branched: Path) -> None:
    from dataclasses import replace

    ingredients = Ingredients.of({name: branched / name for name in NAMES})
    with pytest.raises(InputError, match=r"specialists\.text: qwen2 models have biases or norms"):
        btx.mixtral_config(replace(ingredients, architecture=replace(ingredients.architecture, family="qwen2")))


def test_minimal_cross_entropy_chooses_a_teacher_for_each_sample() -> None:
    losses, counts = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)), [2, 4, 1]
    gate = best_teacher(losses, counts)
    for part in (slice(0, 2), slice(2, 6), slice(6, 7)):
        best = int(losses[:, part].mean(1).argmin())
        assert bool((gate[part, best] == 0).all()) and bool((gate[part, 1 - best] == -torch.inf).all())


def test_a_copy_of_the_pivot_learns_tokens_and_the_better_distribution() -> None:
    """Values and gradients of 0.9 CE(Q, tokens) + 0.1 KL(P | Q), written out in float64."""
    generator = torch.Generator().manual_seed(4)
    models = [(torch.randn(5, d, generator=generator), torch.randn(11, d, generator=generator)) for d in (4, 3, 6)]
    targets, counts = torch.tensor([5, 0, 2, 10, 7]), [3, 2]
    logits = [h.double() @ w.double().t() for h, w in models]
    p = torch.cat(
        [
            min((z[part] for z in logits[1:]), key=lambda z, y=targets[part]: cross_entropy(z, y).item()).softmax(1)  # type: ignore[misc]
            for part in (slice(0, 3), slice(3, 5))
        ]
    )
    q = logits[0].softmax(1)
    rows = -0.9 * q.gather(1, targets[:, None])[:, 0].log() + 0.1 * (p * (p.log() - q.log())).sum(1)
    ds = q - 0.9 * torch.nn.functional.one_hot(targets, 11) - 0.1 * p
    hidden, head = models[0][0].requires_grad_(), models[0][1].requires_grad_()
    found = fusion_loss((hidden, head), models[1:], targets, counts)
    assert found.total is not None
    found.total.backward()
    torch.testing.assert_close(found.rows.double(), rows, rtol=1e-5, atol=1e-5)
    assert found.total.item() == pytest.approx(rows.sum().item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, (ds @ models[0][1].double()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.grad, (ds.t() @ models[0][0].double()).float(), rtol=1e-4, atol=1e-5)


def test_states_and_heads_are_those_of_the_logits(config: FuserConfig, branched: Path) -> None:
    store, model = opened(tuned_config(config, "any"))[1], load_model(branched / "math", CPU)
    batch = next(iter(EvaluationBatches(store, whole_shard(config, store, "math"), 2)))
    states, head = response_states(model, batch, "math", store.vocab_size)
    wanted = response_logits(model, batch, "math", store.vocab_size).logits[0]
    torch.testing.assert_close(states @ head.t(), wanted, rtol=1e-5, atol=1e-5)


def test_variation_weights_are_the_ratio_of_mean_squares(branched: Path) -> None:
    """W_j = E[(t_j - pivot)^2] / sum_k E[(t_k - pivot)^2], by matrix."""
    ingredients = Ingredients.of({PIVOT: branched / "base", "code": branched / "code", "math": branched / "math"})
    tensor = "model.layers.0.mlp.down_proj.weight"
    base, code, math_ = (
        load_file(branched / n / "model.safetensors")[tensor].double() for n in ("base", "code", "math")
    )
    squares = [(other - base).square().mean().item() for other in (code, math_)]
    found = variation_weights(ingredients, ["code", "math"], tensor)
    assert list(found.values()) == pytest.approx([s / sum(squares) for s in squares], rel=1e-12)
    still = Ingredients.of({PIVOT: branched / "base", "code": branched / "base", "math": branched / "base"})
    assert variation_weights(still, ["code", "math"], tensor) == {"code": 0.5, "math": 0.5}


def test_losses_of_rows_are_those_of_the_reference() -> None:
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = torch.tensor([1, 0, 8, 3])
    found = row_losses(values, targets, Loss(label_smoothing=0.1, z_loss=0.01))
    top = values.logsumexp(1)
    own = values.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, top - 0.9 * own - 0.1 * values.mean(1) + 0.01 * top.square())


def plain_run(config: FuserConfig) -> Tuning:
    tree = tuned_config(config, "plain").model_dump(mode="json")
    tree["optimizer"] |= {"weight_decay": 0.1}
    tree["stage2"] |= {"steps": 4, "lr": 2e-3}
    tree["checkpoint"] |= {"every": 1}
    whole = FuserConfig.model_validate(tree)
    return Tuning(whole, opened(whole)[1], ("text",), {}, "plain")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    config: FuserConfig, branched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plain_run(config)
    undisturbed = load_model(branched / "text", CPU)
    assert tune(undisturbed, run, plain_loss(run)) is None
    metrics = run.config.run_dir / "metrics.jsonl"
    steps = [r for r in map(json.loads, metrics.read_text().splitlines()) if r["kind"] == "step"]

    interrupted, asked = load_model(branched / "text", CPU), plain_loss(run)

    def interrupting(model: Model, batch: MicroBatch) -> MicroLoss:
        signal.raise_signal(signal.SIGTERM)
        return asked(model, batch)

    assert isinstance(tune(interrupted, run, interrupting), Stop)
    assert (run.config.run_dir.with_name("run-plain.1") / "metrics.jsonl").is_file()  # the first one's
    resumed = load_model(branched / "text", CPU)
    assert tune(resumed, run, asked, resume=True) is None
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    again = [r for r in map(json.loads, metrics.read_text().splitlines()) if r["kind"] == "step"]
    assert [r["loss"] for r in again] == [r["loss"] for r in steps]
    summary = json.loads((run.config.run_dir / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["eval"]["mean"]["fused"] > 0

    other = Tuning(run.config, run.store, ("text",), {"alpha": 1}, "plain")
    with pytest.raises(InputError, match="was written with alpha = None, not 1"):
        tune(resumed, other, asked, resume=True)
    with pytest.raises(DivergedError, match=r"step 1 of 4: loss nan"):
        tune(resumed, run, lambda model, batch: MicroLoss(asked(model, batch).rows * math.nan))


@pytest.mark.parametrize("method", ["btx", "fusechat"])
def test_a_tuned_baseline_becomes_a_folder(
    method: str, config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["baseline", method, "--config", config_path, "--of", "math,text,code", "--out", out]
    assert ultrafuser(monkeypatch, *arguments, "--resume") == EXIT_BAD_INPUT
    assert "state.pt: no such file; start without --resume" in capsys.readouterr().err and not out.exists()
    assert ultrafuser(monkeypatch, *arguments) == 0, capsys.readouterr()
    made = json.loads((out / "baseline.json").read_text())
    assert made["baseline"] == method and made["like"] == "math"
    assert "### Instruction" in (out / "chat_template.jinja").read_text()
    summary = json.loads((out / "summary.json").read_text())
    ids = torch.arange(3, 40)[None]
    found = logits(out, ids)
    assert found.shape == (1, 37, 400) and bool(found.isfinite().all())
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "MixtralForCausalLM" if method == "btx" else "LlamaForCausalLM"
    ]
    if method == "btx":  # the decoder computes what transformers does: of three tokens, the likeliest
        prompt: Any = AutoTokenizer.from_pretrained(out).apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        with opened_model(str(out), "cpu", None) as opened:
            answerer = Answerer(opened)
            events = answerer.stream([answerer.encode([{"role": "user", "content": "Hi"}])], Limits(3), Sampling())
            (answer,) = (event[1] for event in events if isinstance(event, tuple))
        assert [token.id for token in answer.tokens] == wanted[0, prompt.shape[1] :].tolist()
    if method == "fusechat":
        assert set(summary["pairs"]) == {"text", "code"}
        # Pairs that are done are kept: the merge alone is done again, and comes out the same.
        weights = (out / "model.safetensors").read_bytes()
        again = [*arguments[:-1], tmp_path / "again", "--resume"]
        capsys.readouterr()
        assert ultrafuser(monkeypatch, *again) == 0
        assert "stage 2 step" not in capsys.readouterr().err
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
