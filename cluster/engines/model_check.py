"""Can a replica serve this directory, is there memory for it, and is it what the engine serves?

Every finding of the first two is one sentence that names the directory, what is wrong and what
would be right, and comes before an engine is started: an engine that fails to start takes tens of
seconds and reports from another process. The last is judged by what an engine says of fixed texts
once it has the weights (`check_fingerprint`).

A tokenizer can be replaced without a word: for some model types (`qwen2` for one) transformers
ignores the saved tokenizer class and builds its own pre-tokenizer, so that a model reads other ids
than it was trained on. The check encodes probes with the saved tokenizer file and with what
`AutoTokenizer` makes of it and refuses a difference.

Not covered: weights that are noise, and whether vLLM implements the architecture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.engine import EngineError
from rollout.prompt import MARKERS

GIB = 1 << 30

CPU_PROCESS_BYTES = int(1.5 * GIB)
"""What the two processes of a CPU replica hold besides weights and key-value cache (measured:
0.65 GiB in the actor, 0.8 GiB in the engine core, mostly libraries)."""

_PROBES = (
    "There are 63 boxes, 7 of them red.\nHow many (in %) are not?",
    "# Step 1: add\nx = 12 * (5 + y)\n    print(x / 3.25)\n",
    "Zoë paid 137 € for  two naïve paintings; \\frac{1}{2} of it was tax.",
)


class ModelCheckError(ValueError):
    """A directory cannot be served; the message says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the files of a checkpoint say about it."""

    path: str
    architecture: str
    """Class name in transformers, as `LlamaForCausalLM`."""
    model_type: str
    dtype: str
    """As saved: "float32", "bfloat16" or "float16"; "" if the config does not say."""
    max_positions: int
    """Longest text in tokens the model is made for."""
    num_labels: int
    weight_bytes: int
    shape: str
    """Everything of the config that decides tensor shapes and meaning, as canonical JSON: equal
    for two checkpoints that one engine can hold in turn."""
    tokenizer_digest: str
    """Equal for two checkpoints with the same tokenizer."""


def check_policy_checkpoint(path: str | Path, *, markers: Sequence[str] = MARKERS) -> ModelInfo:
    """Check that a directory is a policy: causal language model, tokenizer, step markers.

    Args:
        markers: texts that must be one token each; () for a model that was never fine-tuned.
    Raises:
        ModelCheckError: it is not.
    """
    info, tokenizer = _check_policy(path)
    missing = _split(markers, tokenizer)
    if missing:
        raise ModelCheckError(
            f"{path}: the tokenizer splits the step markers {', '.join(missing)} into several "
            "tokens: the model was never fine-tuned on them. Ask it with worked examples "
            "(search.template=bootstrap), or fine-tune it first"
        )
    return info


def check_untrained_policy(path: str | Path) -> ModelInfo:
    """Check that a directory is a policy that was never fine-tuned on the step markers.

    Raises:
        ModelCheckError: it is not.
    """
    info, tokenizer = _check_policy(path)
    if not _split(MARKERS, tokenizer):
        raise ModelCheckError(
            f"{path}: its tokenizer holds the step markers as tokens of their own, so it was made "
            "for a fine-tuned policy; worked examples (search.template=bootstrap) are for models "
            "to which markers are plain text. Choose search.template=rstar or short"
        )
    return info


def _check_policy(path: str | Path) -> tuple[ModelInfo, Any]:
    info, tokenizer = _check(Path(path))
    if not info.architecture.endswith("ForCausalLM"):
        raise ModelCheckError(
            f"{path}: architecture {info.architecture} is no causal language model; a policy's "
            "config.json names one as `...ForCausalLM`"
        )
    return info, tokenizer


def _split(markers: Sequence[str], tokenizer: Any) -> list[str]:
    """Markers that are several tokens."""
    return [m for m in markers if len(tokenizer(m, add_special_tokens=False).input_ids) != 1]


def check_preference_checkpoint(path: str | Path) -> ModelInfo:
    """Check that a directory is a process preference model: classifier with one label, tokenizer.

    Raises:
        ModelCheckError: it is not.
    """
    info, _ = _check(Path(path))
    if not info.architecture.endswith("ForSequenceClassification") or info.num_labels != 1:
        raise ModelCheckError(
            f"{path}: {info.architecture} with {info.num_labels} labels is no preference model; "
            "expected `...ForSequenceClassification` with one label"
        )
    return info


def check_cpu_memory(
    info: ModelInfo, *, bytes_per_weight: int, kv_cache_bytes: int, available_bytes: int
) -> int:
    """Bytes a CPU replica will hold.

    Args:
        bytes_per_weight: of the type it is served in.
        available_bytes: as `available_memory_bytes()`.
    Raises:
        ModelCheckError: more than there is.
    """
    weights = info.weight_bytes * bytes_per_weight // type_bytes(info.dtype)
    needed = weights + kv_cache_bytes + CPU_PROCESS_BYTES
    if needed > available_bytes:
        raise ModelCheckError(
            f"{info.path}: serving needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, "
            f"key-value cache {kv_cache_bytes / GIB:.1f}, processes "
            f"{CPU_PROCESS_BYTES / GIB:.1f}) but {available_bytes / GIB:.1f} GiB are available; "
            "lower kv_cache_gib, run fewer replicas or free memory"
        )
    return needed


def check_gpu_memory(
    info: ModelInfo,
    *,
    bytes_per_weight: int,
    num_gpus: int,
    utilization: float,
    free_bytes: int,
    total_bytes: int,
) -> int:
    """Bytes a replica will take of each GPU.

    Args:
        num_gpus: that the weights are spread over.
        utilization: share of the whole GPU the engine may use, in (0, 1].
    Raises:
        ModelCheckError: the share is not free, or the weights do not fit in it.
    """
    share = int(utilization * total_bytes)
    weights = info.weight_bytes * bytes_per_weight // type_bytes(info.dtype)
    per_gpu = weights // num_gpus
    if share > free_bytes:
        raise ModelCheckError(
            f"{info.path}: gpu_memory_utilization={utilization} asks for {share / GIB:.1f} GiB of "
            f"the GPU but {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB are free; lower "
            "gpu_memory_utilization or end what holds the memory"
        )
    if per_gpu > share:
        raise ModelCheckError(
            f"{info.path}: weights take {per_gpu / GIB:.1f} GiB of each GPU, more than "
            f"gpu_memory_utilization={utilization} allows ({share / GIB:.1f} GiB); raise it or "
            "tensor_parallel_size"
        )
    return share


def available_memory_bytes() -> int:
    """Memory this process could still take: of the machine, and of its control group if limited."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        # Cached file pages count as used but are given back on demand.
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(fields.get("inactive_file", 0))
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def check_fingerprint(
    first: Sequence[float],
    second: Sequence[float],
    previous: Sequence[float] | None,
    *,
    reference: Sequence[float] | None,
    weights_differ: bool,
    tolerance: float,
) -> None:
    """Check what an engine says of fixed texts after it took new weights.

    Args:
        first, second: of two calls, the prefix cache emptied between them.
        previous: of the weights before; None: there were none.
        reference: what transformers says of them with the new weights; None: not asked.
        weights_differ: the files differ from those before.
        tolerance: largest difference two calls, or engine and reference, may show.
    Raises:
        EngineError: a number is not finite, the two calls disagree, nothing changed, or it is not
            what the reference says.
    """
    if not all(math.isfinite(number) for number in first):
        raise EngineError(f"new weights give numbers that are not finite: {list(first)}")
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
    if apart > tolerance:
        raise EngineError(f"two calls with the same weights differ by {apart:.3g}")
    if weights_differ and previous is not None and list(first) == list(previous):
        raise EngineError("the weight files differ but the engine's output did not change")
    if reference is not None:
        apart = max(abs(a - b) for a, b in zip(first, reference, strict=True))
        if apart > tolerance:
            raise EngineError(f"the engine's output differs by {apart:.3g} from transformers'")


def weights_digest(path: str | Path) -> str:
    """Digest of names, sizes and samples of the weight files: other weights, other digest.

    Samples 64 blocks of 4 KiB a file, so that it costs the same for every model size.
    """
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted([*root.glob("*.safetensors"), *root.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def type_bytes(dtype: str) -> int:
    """Of one number of a type; an unknown one is taken for half precision."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)


def _check(path: Path) -> tuple[ModelInfo, Any]:
    """The checks of every model; returns its tokenizer besides."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ModelCheckError(
            f"{path}: {what}; expected a directory with config.json, weights and tokenizer "
            "(Hugging Face format)"
        )
    config = _read_config(path)
    weights = _weight_files(path)
    tokenizer = _load_tokenizer(path)
    text_config = config.get_text_config()
    architectures = config.architectures or []
    if not architectures:
        raise ModelCheckError(
            f'{path / "config.json"}: no "architectures"; expected as ["LlamaForCausalLM"]'
        )
    return (
        ModelInfo(
            path=str(path),
            architecture=architectures[0],
            model_type=config.model_type,
            dtype=str(config.dtype or "").removeprefix("torch."),
            max_positions=text_config.max_position_embeddings,
            num_labels=config.num_labels,
            weight_bytes=sum(file.stat().st_size for file in weights),
            shape=_shape(path),
            tokenizer_digest=_tokenizer_digest(tokenizer),
        ),
        tokenizer,
    )


def _read_config(path: Path) -> Any:
    file = path / "config.json"
    if not file.is_file():
        raise ModelCheckError(
            f"{path}: no config.json; expected a model directory in Hugging Face format"
        )
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelCheckError(f"{file}: not a JSON object: {error}") from error
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelCheckError(
            f"{file}: model_type {model_type!r} is not known to the installed transformers; "
            f"expected one it implements, as qwen2, llama or phi3 ({type(error).__name__})"
        ) from error


def _weight_files(path: Path) -> list[Path]:
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(path.glob(pattern))
        if files:
            break
    else:
        raise ModelCheckError(f"{path}: no weights; expected *.safetensors files")
    for index in path.glob("*.index.json"):
        named = set(json.loads(index.read_text())["weight_map"].values())
        lost = sorted(name for name in named if not (path / name).is_file())
        if lost:
            raise ModelCheckError(
                f"{path}: weights are incomplete: {index.name} names {', '.join(lost)}"
            )
    return files


def _load_tokenizer(path: Path) -> Any:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise ModelCheckError(
            f"{path}: no tokenizer ({', '.join(names)}); save it into the same directory with "
            "`tokenizer.save_pretrained`"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelCheckError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    saved_file = path / "tokenizer.json"
    if saved_file.is_file():
        from tokenizers import Tokenizer

        saved = Tokenizer.from_file(str(saved_file))
        for probe in _PROBES:
            meant = saved.encode(probe, add_special_tokens=False).ids
            made = tokenizer(probe, add_special_tokens=False).input_ids
            if meant != made:
                raise ModelCheckError(
                    f"{path}: AutoTokenizer replaces the saved tokenizer by {type(tokenizer)}: "
                    f"{probe[:24]!r} becomes {made[:8]}, in tokenizer.json it is {meant[:8]}; "
                    "save the model under a model_type whose tokenizer is taken as it is (llama)"
                )
    return tokenizer


def _shape(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    for key in ("transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype"):
        config.pop(key, None)
    return json.dumps(config, sort_keys=True)


def _tokenizer_digest(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    probes = [tokenizer(probe).input_ids for probe in _PROBES]
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()
