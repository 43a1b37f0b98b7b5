"""Carry-over with the vLLM engine that TRL keeps in the trainer's process."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context

from .engine import EngineUse
from .pool import Group, Response
from .sampling_parameters import request_parameters
from .vllm_weights import load_weights


class VLLMColocated:
    """
    Run the engine's steps on the calling thread, so that they can stop after any of them.

    With tensor parallelism every process of a group calls it with the same responses in the same order. What it does
    then follows from these and from what the engine samples, which is the same on all of them.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.vllm = trainer.vllm_generation
        self.pool = trainer.accelerator.process_index // self.vllm.tensor_parallel_size
        self.numbers = count()

    def prepare(self):
        """Load the current weights, if they changed or the engine has discarded them.

        Raises:
            RuntimeError: if the engine would go on with keys and values of older weights.
        """
        load_weights(self.trainer, again=self.vllm._llm_weights_sleeping)
        if not self.vllm.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM didn't reset its prefix cache, which holds keys and values of older weights, because a request "
                "is still running: end every request that other code has added to trainer.vllm_generation.llm."
            )

    def run(self, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool]) -> EngineUse:
        """Go on with responses until `enough()`, and leave nothing in the engine."""
        if self.vllm.enable_sleep_mode:
            self.vllm.llm.wake_up(tags=["kv_cache"])
        if is_peft_model(self.vllm.model) and self.vllm.tensor_parallel_size > 1:
            # As TRL does: the adapter's gradients may still be on their way when the engine starts to communicate
            torch.distributed.barrier(device_ids=[self.vllm.accelerator.local_process_index])
        try:
            with profiling_context(self.trainer, "vLLM.generate"):
                return self._run(self.vllm.llm.llm_engine, unfinished, enough)
        finally:
            if self.vllm.enable_sleep_mode:
                self.vllm.llm.sleep(level=2)
                self.vllm._llm_weights_sleeping = True

    def _run(self, engine: Any, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool]) -> EngineUse:
        use = EngineUse(slots=engine.vllm_config.scheduler_config.max_num_seqs)
        running: dict[str, Response] = {}
        written: dict[str, int] = {}  # by those that haven't been given a slot in this call
        if enough():
            return use
        try:
            for group, response in unfinished:
                name = f"response-{next(self.numbers)}"
                running[name], written[name] = response, len(response.tokens)
                self._add(engine, name, group, response)
            while running:
                outputs = engine.step()
                use.steps += 1
                for output in outputs:
                    (completion,) = output.outputs
                    tokens = list(completion.token_ids)
                    logps = [
                        by_token[token].logprob for token, by_token in zip(tokens, completion.logprobs, strict=True)
                    ]
                    running[output.request_id].write(tokens, logps)
                    use.sampled += len(tokens)
                    use.prefilled_again += written.pop(output.request_id, 0)
                    if output.finished:
                        running.pop(output.request_id).finished = True
                if any(output.finished for output in outputs) and enough():
                    break
        finally:
            for name in running:  # one by one: the order in which vLLM ends several differs between processes
                engine.abort_request([name])
            self._empty(engine)
        return use

    def _add(self, engine: Any, name: str, group: Group, response: Response):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = request_parameters(self.trainer.args, group, response, self.pool)
        parameters |= {"detokenize": False, "output_kind": RequestOutputKind.DELTA}
        prompt = {"type": "token", "prompt_token_ids": group.prompt_ids + response.tokens}
        engine.add_request(name, prompt, SamplingParams(**parameters))

    def _empty(self, engine: Any):
        """Let the engine finish the step that it may have begun ahead, and forget the responses."""
        core = engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            engine.step()
        assert not engine.has_unfinished_requests()
