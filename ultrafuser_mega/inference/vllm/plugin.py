"""What vLLM is told of fused models when it starts; its entry point ``vllm.general_plugins`` calls ``register``."""

from __future__ import annotations

LOAD_FORMAT = "ultrafuser"
#: ``model_type`` of a specialist -> the name of its class, as config.json has it in ``architectures``.
ARCHITECTURES = {
    "llama": "UltraFuserLlama",
    "mistral": "UltraFuserMistral",
    "qwen2": "UltraFuserQwen2",
    "qwen3": "UltraFuserQwen3",
}


def register() -> None:
    """Tell vLLM the model classes and how their weights are loaded; asked again, it does nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader

    known = ModelRegistry.get_supported_archs()
    if set(ARCHITECTURES.values()) <= set(known):
        return
    for architecture in ARCHITECTURES.values():
        ModelRegistry.register_model(architecture, f"ultrafuser_mega.inference.vllm.models:{architecture}")
    from ultrafuser_mega.inference.vllm.loader import FusedLoader

    register_model_loader(LOAD_FORMAT)(FusedLoader)
