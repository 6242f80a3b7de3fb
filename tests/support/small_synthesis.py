"""A small configuration of ``ultrafuser synthesize`` for tests."""

from __future__ import annotations

from typing import Any

import yaml

from ultrafuser_mega.config.load import parse_config
from ultrafuser_mega.synthesis.config import SynthesisConfig


def config_text(url: str, **keys: Any) -> str:
    """YAML: two classes of two topics with two sub-topics each, 12 instructions a class; ``keys`` as ``a__b=value``."""
    tree: dict[str, Any] = {
        "endpoints": {"here": {"url": url, "concurrency": 8, "timeout_s": 20.0}},
        "models": {"m": {"endpoint": "here", "model": "played", "price": {"read": 1.0, "written": 10.0}}},
        "steps": {
            name: {"model": "m", "max_tokens": 64, "per_call": 2}
            for name in (
                "meta_topics",
                "sub_topics",
                "instructions",
                "related",
                "complicated",
                "responses",
                "user_turns",
            )
        },
        "classes": {
            "text": {"domain": "daily life", "topics": [2, 4], "instructions": 12, "prompts": "text"},
            "code": {"domain": "programming", "topics": [2, 4], "instructions": 12, "prompts": "code"},
        },
    }
    for key, value in keys.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return yaml.safe_dump(tree, sort_keys=False)


def small_config(url: str, **keys: Any) -> SynthesisConfig:
    """The same, read."""
    return parse_config(SynthesisConfig, "the test's configuration", config_text(url, **keys))
