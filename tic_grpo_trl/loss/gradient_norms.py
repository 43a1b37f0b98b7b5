"""The norm of every response's own gradient, exactly, and the log-probabilities that come with it."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from trl.models.utils import disable_gradient_checkpointing

from ..forward.packed_forward import ForwardOutput, PackedForward
from ..forward.responses import PADDED_SIDE, loss_mask, sequences
from ..rollout.micro_batches import active_responses, take_responses


def check_weights_are_whole(accelerator: Accelerator):
    """Raise a ValueError where processes hold parts of the weights, so that none can differentiate alone."""
    plugin = accelerator.state.deepspeed_plugin
    sharded = "FSDP" if accelerator.distributed_type == DistributedType.FSDP else ""
    sharded = "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else sharded
    if sharded:
        raise ValueError(
            f"baseline_norms='gradients' differentiates response by response on each process, but {sharded} shards the "
            "weights: set baseline_norms='tokens', or use DDP or ZeRO-2."
        )


def logps_and_squared_norms(
    forward: PackedForward, micro_batch: dict[str, Any], count: Callable[[ForwardOutput], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log π_θ(o_{i,t}) and ‖∇ log P_θ(o_i)‖² over the trained parameters, by passes for each response.

    Args:
        forward: makes a forward pass for each response, which a backward pass follows.
        micro_batch: its responses, without images; those that are not active get 0.
        count: called with each forward pass.

    Returns:
        (B, T) log-probabilities in nats, without gradient, and (B,) squared norms; float32.
    """
    policy: Any = forward.model()
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    active = active_responses(micro_batch, only_advantages=True)
    logps = torch.zeros(micro_batch["completion_ids"].shape, device=active.device)
    norms = torch.zeros(len(active), device=active.device)
    checkpointing: Any = forward.args.gradient_checkpointing_kwargs
    responses = {name: micro_batch[name] for name in PADDED_SIDE if micro_batch.get(name) is not None}
    for index in active.nonzero().flatten().tolist():
        response = take_responses(responses, [index], blanks=0, trim=True)
        ids, mask = sequences(response)
        # reentrant checkpointing allows no gradient of single tensors
        with torch.enable_grad(), disable_gradient_checkpointing(policy, checkpointing):
            output = forward(policy, ids, mask, response["completion_ids"].size(1))
        count(output)
        logps[index, : output.logps.size(1)] = output.logps[0].detach()
        log_p = (output.logps * loss_mask(response)).sum()
        gradients = torch.autograd.grad(log_p, parameters, allow_unused=True)
        norms[index] = sum(gradient.float().square().sum() for gradient in gradients if gradient is not None)
    return logps, norms
