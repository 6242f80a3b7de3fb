"""Fixtures: two released trios, Llamas with a gate layer each and Qwens with a shared one, and their references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.release_folder import PIECES, Reference, write_release, write_specialist

from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

# name -> family, vocabulary rows, hidden size, template; the names are in no alphabetical order.
TRIOS = {
    "llamas": {
        "text": ("llama", PIECES, 64, "ultralm"),
        "code": ("mistral", PIECES + 16, 48, "codellama"),
        "math": ("llama", PIECES + 1, 96, "wizardmath"),
    },
    "qwens": {
        "text": ("qwen2", PIECES + 16, 64, "hf"),
        "code": ("qwen3", PIECES, 64, "hf"),
        "math": ("qwen2", PIECES + 1, 64, "wizardmath"),
    },
}


@pytest.fixture(scope="session")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trio -> specialist -> its Hugging Face folder and the name of its template."""
    root = tmp_path_factory.mktemp("specialists")
    return {
        trio: {
            name: (
                write_specialist(root / trio / name, family, vocab_rows=rows, hidden_size=width, seed=seed),
                template,
            )
            for seed, (name, (family, rows, width, template)) in enumerate(members.items())
        }
        for trio, members in TRIOS.items()
    }


@pytest.fixture(scope="session")
def releases(specialists: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trio -> its release folder; read only."""
    root = tmp_path_factory.mktemp("releases")
    return {trio: write_release(root / trio, members) for trio, members in specialists.items()}


@pytest.fixture(scope="session")
def models(releases: Any) -> dict[str, UltraFuserForCausalLM]:
    return {trio: UltraFuserForCausalLM.from_pretrained(folder).eval() for trio, folder in releases.items()}


@pytest.fixture(scope="session")
def references(releases: Any) -> dict[str, Reference]:
    return {trio: Reference.load(folder) for trio, folder in releases.items()}


@pytest.fixture(scope="session")
def roundings(references: Any) -> dict[str, float]:
    return {trio: reference.rounding() for trio, reference in references.items()}


@pytest.fixture(params=TRIOS)
def trio(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def release(releases: Any, trio: Path) -> Path:
    return releases[trio]


@pytest.fixture
def model(models: Any, trio: Path) -> UltraFuserForCausalLM:
    return models[trio]


@pytest.fixture
def reference(references: Any, trio: Path) -> Reference:
    return references[trio]


@pytest.fixture
def close(roundings: Any, trio: str) -> dict[str, float]:
    """Tolerance of the model's logits and gate weights."""
    return {"atol": roundings[trio], "rtol": 0.0}
