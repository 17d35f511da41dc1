"""What this project adds to vLLM's worker, inside the engine process.

vLLM 0.32 loads new weights in place (`reload_weights`), but on a CPU a linear layer multiplies with
a packed copy of its weight, and the reload renews that copy only for layers the checkpoint names.
An output head that is tied to the input embedding is not named: it would go on with the packed
weights of the first checkpoint. The first tokens of a greedy text hardly show it (the embeddings of
two rounds are alike); samples turn to noise.
"""

from __future__ import annotations

from typing import Any


class EngineWorkerExtension:
    """Mixed into vLLM's worker by name; its methods are called with `collective_rpc`."""

    model_runner: Any

    def repack_tied_head(self) -> bool:
        """Renew the packed weight of a tied output head; False where there is none."""
        model = self.model_runner.get_model()
        head = getattr(model, "lm_head", None)
        embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
        if head is None or embedding is None or not model.config.tie_word_embeddings:
            return False
        if not hasattr(head, "cpu_linear"):
            return False  # multiplies with the shared weight itself
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
        return True
