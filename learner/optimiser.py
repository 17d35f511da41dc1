"""DeepSpeed, which only this file imports: the engine and its settings, a step, the weights.

Batches are planned and packed by us (`learner.packing`): to DeepSpeed each step is one sample per
rank. Losses are sums divided by what the *global* batch holds; with DeepSpeed's averaging over
ranks undone, the gradient does not depend on how a batch was split.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist

from learner.fit import TrainConfig
from learner.packing import PlannedStep
from learner.preference_model import HEAD_NAME
from learner.prepare import quiet_loading, training_dtype
from learner.task import Task


def import_deepspeed() -> Any:
    """DeepSpeed, told which accelerator to use and to compile nothing on a CPU.

    On a CPU its first communication backend would build a shared-memory all-reduce in C++ (about
    40 s and a C++ compiler). Gloo carries what a CPU learner sends, so the operator is entered as
    not compatible in the table DeepSpeed asks before building.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    if not on_gpu:
        table = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        table["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed


def make_engine(
    objective: torch.nn.Module, config: TrainConfig
) -> tuple[Any, torch.optim.Optimizer]:
    """DeepSpeed's engine around an objective, and the optimiser for `set_learning_rate`."""
    deepspeed = import_deepspeed()
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, config),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )
    with quiet_loading():
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(
                config,
                dist.get_world_size(),
                bfloat16=training_dtype(config) == torch.bfloat16,
            ),
            dist_init_required=False,
        )
    return engine, optimizer


def deepspeed_config(config: TrainConfig, world_size: int, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's settings; batches are counted by us, so it sees one sample per step and rank."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm if _clips_itself(config) else 0.0,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _parameter_groups(objective: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without, the PPM's head with its own learning rate."""
    head_rate = getattr(config, "head_learning_rate", None) or config.learning_rate
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        rate = head_rate if name.startswith(f"model.{HEAD_NAME}.") else config.learning_rate
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_share(step: int, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a share of the peak."""
    warmup = math.ceil(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(num_steps - warmup, 1)
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_share + (1.0 - config.final_share) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Let every parameter group learn at this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def forward_backward(engine: Any, task: Task, step: PlannedStep, config: TrainConfig) -> float:
    """Forward and backward of one global batch; its loss, the same on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    scale = 1.0 / task.denominator(step)
    auxiliary = getattr(config, "lm_weight", 0.0)
    if auxiliary:
        tokens = max(task.total(task.trained, step), 1)
        auxiliary = auxiliary / tokens / scale
    total = torch.zeros((), device=engine.device)
    for number, shares in enumerate(step.micro):
        batch = task.pack(shares[rank]).to(engine.device)
        engine.set_gradient_accumulation_boundary(number + 1 == len(step.micro))
        loss = engine(batch, auxiliary) if auxiliary else engine(batch)
        loss = loss * scale
        total += loss.detach()
        # DeepSpeed averages gradients over the ranks; the loss is already a share of the whole.
        engine.backward(loss * world_size)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total)


def update(engine: Any, config: TrainConfig) -> float | None:
    """Clip and apply the gradient; its norm before clipping, None where DeepSpeed does not say."""
    if _clips_itself(config):
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    limit = config.clip_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
    # A gradient that is not finite must not reach the weights: the caller stops on its norm.
    if math.isfinite(norm):
        engine.step()
    return norm


def _clips_itself(config: TrainConfig) -> bool:
    """True if DeepSpeed's optimiser clips and knows the norm; plain float32 has none of its own."""
    return config.zero_stage > 0 or training_dtype(config) != torch.float32


def gathered_state(model: Any, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Whole weights on the host of rank 0 (empty elsewhere); tied weights once."""
    state: dict[str, torch.Tensor] = {}
    rank = dist.get_rank()
    for name, parameter in model.named_parameters():
        if config.zero_stage == 3:
            deepspeed = import_deepspeed()
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        elif rank == 0:
            state[name] = parameter.detach().cpu().contiguous()
    if rank == 0:
        kept = model.state_dict().keys()
        state |= {n: b.detach().cpu() for n, b in model.named_buffers() if n in kept}
    return state
