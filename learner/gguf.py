"""An ordinary Hugging Face directory from a GGUF file.

    python -m learner.gguf FILE.gguf DIR

llama.cpp's one-file format is how pretrained weights travel where no model hub can be reached. Its
quantised tensors are spelled out, in bfloat16: the model is the one the file holds, not the one it
was quantised from. transformers reads the format with the `gguf` package
(requirements/pretrained.txt).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rollout.files import new_folder


def convert(file: Path, target: Path) -> Path:
    """Write the model and the tokenizer (chat template included) of a GGUF file as a directory.

    Args:
        file: a GGUF file of an architecture that transformers knows.
        target: written whole or not at all; used as it is if it is there.
    Returns:
        `target`.
    Raises:
        ValueError: the file holds something else than what was read (says which tensors).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if target.exists():
        return target
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = read.config
    # What was read is plain tensors, and refuses to be saved for having been quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    differing = model.load_state_dict(read.state_dict(), strict=False)
    if differing.missing_keys or differing.unexpected_keys:
        names = [*differing.missing_keys, *differing.unexpected_keys]
        raise ValueError(f"{file}: tensors that do not fit the architecture: {', '.join(names)}")
    with new_folder(target) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("target", type=Path, help="directory to write")
    options = parser.parse_args()
    try:
        print(convert(options.file, options.target))
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
