"""Started by test_vllm_colocated.py: goes on with responses in a real engine while the weights change, and notes all.

Started in several processes, it spreads the engine's tensors over them. Arguments: a folder for the results, one file
per process, and whether the engine schedules steps ahead (`async`) or not (`sync`)."""

from vllm_engine import SETTINGS, one_engine_on_cpu, weights_of  # isort: skip (first, because of its settings)

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.platforms.cpu import CpuPlatform

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over.pool import Group, Pool, Response
from tic_grpo_trl.carry_over.vllm_colocated import VLLMColocated
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


SLOTS, GROUP, BEGUN, CALLS = 16, 4, 6, 4  # the engine's, responses of a group, groups of a pool, generation calls
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # that share the engine
PROBE = 8  # prompts that an evaluation generates for
SEEDED = {"generation_kwargs": {"seed": 42}}
SCENARIOS = {
    "plain": SEEDED,
    "again": SEEDED,
    "short": {"max_completion_length": 20},
    "options": {
        "temperature": 0.8,
        "repetition_penalty": 1.4,
        "generation_kwargs": {"min_tokens": 20},
    },
    "past the model's length": {"max_completion_length": 500, "generation_kwargs": {"ignore_eos": True}},
}


def noted(responses: list[Response]) -> list[dict]:
    return [asdict(each) for each in responses]


def perturb(model, seed: int, size: float = 0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)


def left_in(llm) -> int:
    """Requests and steps that the engine still knows of."""
    core = llm.llm_engine.engine_core.engine_core
    return llm.llm_engine.get_num_unfinished_requests() + core.scheduler.has_requests() + len(core.batch_queue or ())


class Driver:
    """Does with the engine what a trainer with carry-over does, and notes it."""

    def __init__(self, trainer: TICGRPOTrainer, prompts: list[list[int]]):
        self.trainer, self.prompts = trainer, prompts
        perturb(trainer.model, 99, 0.3)  # so that lengths differ
        self.start = weights_of(trainer.model, False)
        self.engine = VLLMColocated(trainer)

    def reset(self, **settings):
        """Take the weights of the start, and these settings."""
        self.trainer.model.load_state_dict(self.start)
        defaults = {"max_completion_length": 48, "temperature": 1.0, "repetition_penalty": 1.0}
        for name, value in (defaults | {"generation_kwargs": None} | settings).items():
            setattr(self.trainer.args, name, value)
        self.trainer.state.global_step += 1

    def fill(self, pool: Pool):
        while len(pool.groups) < BEGUN:
            number = pool.admitted
            pool.admit(Group(number, number, {}, self.prompts[number], [Response() for _ in range(GROUP)]))

    def evaluate(self) -> dict:
        """As TRL evaluates."""
        prompts = self.prompts[-PROBE:]
        _, ids, logps, _ = self.trainer.vllm_generation.generate(prompts, None, 1)
        return {"prompts": prompts, "tokens": ids, "logps": [[each[0] for each in row] for row in logps]}

    def scenario(self, settings: dict) -> dict:
        """Several calls with other weights in each, one group released by each."""
        self.reset(**settings)
        pool, calls, llm = Pool(prompts=1, max_carry_over=2), [], self.trainer.vllm_generation.llm
        for call in range(CALLS):
            self.fill(pool)
            before = {group.number: noted(group.responses) for group in pool.groups}
            asked = []

            def enough(asked=asked):
                asked.append(sum(each.finished for group in pool.groups for each in group.responses))
                return len(asked) > 1 and pool.chosen() is not None  # also where the pool has a rollout at once

            self.engine.prepare()
            use = self.engine.run(pool.unfinished, enough)
            left = left_in(llm)
            groups, released = list(pool.groups), pool.release()
            calls.append(
                {
                    "weights": weights_of(self.trainer.model, False),
                    "before": before,
                    "after": {group.number: (group.prompt_ids, noted(group.responses)) for group in groups},
                    "released": [group.number for group in released],
                    "use": asdict(use),
                    "asked": asked,
                    "left": left,
                    "evaluated": self.evaluate() if settings == SEEDED else None,
                }
            )
            perturb(self.trainer.model, call)
            self.trainer.state.global_step += 1
        return {"calls": calls, "settings": settings, "slots": llm.llm_engine.vllm_config.scheduler_config.max_num_seqs}

    def interrupted_by_an_error(self) -> dict:
        """What is left in the engine, and in the pool, when `enough` raises."""
        self.reset()
        pool = Pool(prompts=1, max_carry_over=2)
        self.fill(pool)

        def enough():
            if any(each.finished for group in pool.groups for each in group.responses):
                raise KeyboardInterrupt
            return False

        self.engine.prepare()
        try:
            self.engine.run(pool.unfinished, enough)
        except KeyboardInterrupt:
            left = left_in(self.trainer.vllm_generation.llm)
        self.engine.prepare()  # raises if the engine still holds anything
        written = {group.number: (group.prompt_ids, noted(group.responses)) for group in pool.groups}
        return {"left": left, "written": written, "weights": self.start}

    def request_of_others(self) -> str:
        """What `prepare` says while another request is running."""
        llm = self.trainer.vllm_generation.llm
        prompt = {"type": "token", "prompt_token_ids": self.prompts[0]}
        llm.llm_engine.add_request("of others", prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(3):
            llm.llm_engine.step()
        try:
            self.engine.prepare()
            said = ""
        except RuntimeError as error:
            said = str(error)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        self.engine.prepare()
        return said

    def asleep(self) -> list[tuple]:
        """The engine's sleep during two calls with the same weights; the CPU build has none, so it is only noted."""
        self.reset()
        vllm, pool, noted = self.trainer.vllm_generation, Pool(prompts=1, max_carry_over=2), []
        llm, load, step = vllm.llm, vllm.sync_weights, vllm.llm.llm_engine.step
        llm.sleep = lambda level: noted.append(("sleep", level))
        llm.wake_up = lambda tags: noted.append(("wake up", *tags))
        llm.llm_engine.step = lambda: noted.append(("step",)) or step() if noted[-1:] != [("step",)] else step()
        vllm.sync_weights = lambda: noted.append(("load",)) or load()
        vllm.enable_sleep_mode = vllm._llm_weights_sleeping = True
        for _ in range(2):
            self.fill(pool)
            self.engine.prepare()
            self.engine.run(pool.unfinished, lambda: noted[-1] == ("step",) and pool.chosen() is not None)
            pool.release()
        vllm.enable_sleep_mode = vllm._llm_weights_sleeping = False
        del llm.sleep, llm.wake_up, llm.llm_engine.step, vllm.sync_weights
        return noted

    def loads(self) -> list[int]:
        """How often weights have been loaded after each call of `prepare`; they change before the third."""
        loaded, load = [], self.trainer.vllm_generation.sync_weights
        self.trainer.vllm_generation.sync_weights = lambda: loaded.append(0) or load()
        self.reset()
        counts = []
        for call in range(3):
            self.trainer.state.global_step += call == 2
            self.engine.prepare()
            counts.append(len(loaded))
        del self.trainer.vllm_generation.sync_weights
        return counts


def schedule_ahead(ahead: bool):
    """Whether the engine begins a step before it has looked at the last one. It does on GPUs; on CPUs it can."""
    check = CpuPlatform.check_and_update_config

    def checked(config):
        check(config)
        config.scheduler_config.async_scheduling = ahead

    CpuPlatform.check_and_update_config = staticmethod(checked)


def main(folder: Path, scheduling: str):
    one_engine_on_cpu("float32")
    schedule_ahead(scheduling == "async")
    dataset = make_dataset("train", 64, 0)
    settings = {"behaviour_policy": "sampler", "vllm_mode": "colocate", "max_steps": 1, "steps_per_generation": 1}
    settings |= {"per_device_train_batch_size": SLOTS // PROCESSES, "vllm_tensor_parallel_size": PROCESSES}
    trainer = TICGRPOTrainer(
        model=STARTER_MODEL,
        reward_funcs=exact_match_reward,
        args=TICGRPOConfig(str(folder / "out"), **SETTINGS | settings),
        train_dataset=dataset,
    )
    prompts = trainer._tokenize_prompts([example["prompt"] for example in dataset])[0]
    driver = Driver(trainer, prompts)
    noted = {name: driver.scenario(settings) for name, settings in SCENARIOS.items()}
    noted["error"] = driver.interrupted_by_an_error()
    noted["others"], noted["asleep"], noted["loads"] = driver.request_of_others(), driver.asleep(), driver.loads()
    noted["ahead"] = bool(trainer.vllm_generation.llm.llm_engine.engine_core.engine_core.batch_queue_size > 1)
    torch.save(noted, folder / f"{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
