"""A real vLLM server of a small model on the CPU, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.engines.arguments import engine_environment
from cluster.engines.config import EngineConfig

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 240.0


@contextmanager
def serving_model(model: Path, log: Path, *, max_model_len: int) -> Iterator[str]:
    """Serve a checkpoint as "mini"; gives the address up to and with /v1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1")
    for name, value in engine_environment(EngineConfig(), on_cpu=True).items():
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "mini"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(max_model_len), "--block-size", "32", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    command += ["--enable-prompt-tokens-details"]
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=sink)
    try:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < give_up_s, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
