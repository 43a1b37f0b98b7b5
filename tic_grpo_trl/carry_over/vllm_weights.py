"""The weights of a vLLM engine."""

from typing import Any

from trl.extras.profiling import profiling_context


def load_weights(trainer: Any, again: bool = False):
    """Load the current weights, as TRL does before it generates: once per update, or `again` if the engine lost them.

    Every process must call this, since gathering the weights is collective.
    """
    step = trainer.state.global_step
    if step != trainer._last_loaded_step or again:
        with profiling_context(trainer, "sync_weights"):
            trainer.vllm_generation.sync_weights()
        trainer._last_loaded_step = step
