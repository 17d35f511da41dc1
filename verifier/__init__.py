"""Is it right? The answer check and the step sandbox; knows nothing of trees, models or Ray."""

from __future__ import annotations

from verifier.boxes import extract_answer
from verifier.sandbox import (
    AsyncSandbox,
    Sandbox,
    SandboxError,
    SandboxLimits,
    StepResult,
    StepStatus,
)
from verifier.verify import GRADER_VERSION, Verdict, answers_match, verify_answer

__all__ = [
    "AsyncSandbox",
    "GRADER_VERSION",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "StepResult",
    "StepStatus",
    "Verdict",
    "answers_match",
    "extract_answer",
    "verify_answer",
]
