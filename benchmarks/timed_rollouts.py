"""Time the rollouts of a trainer with a colocated vLLM engine that generates prescribed lengths."""

import gc
import math
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import GROUP, SETTINGS, UPDATES, Scale, make_model, make_tokenizer
from datasets import Dataset
from prescribed_lengths import EngineWork, PrescribedEngine, Responses, Workload
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


@dataclass(frozen=True)
class Kind:
    """A trainer: TRL's, or ours with these settings."""

    max_carry_over: int = 0
    oversampling: float = 2.0
    trl: bool = False

    @property
    def name(self) -> str:
        return "TRL" if self.trl else f"S = {self.max_carry_over}"

    def steady(self, rollouts: list["Timed"]) -> list["Timed"]:
        """Leave out a run's first rollouts, in which the pool fills, and its end, where nothing new is begun.

        What is left is whole periods, if it is as long as one: a response that needs many steps is written in
        `max_carry_over + oversampling` calls, and holds up one of them.
        """
        if not self.max_carry_over:
            return rollouts[1:]
        ahead = math.ceil(self.oversampling)
        period = self.max_carry_over + ahead
        left = rollouts[period : len(rollouts) - ahead + 1]
        return left[len(left) % period :] or left


@dataclass
class Timed:
    """One rollout.

    Attributes:
        work: what the engine did.
        generation, whole: seconds of wall-clock time for generation alone, and with rewards and all updates.
        generation_cpu, whole_cpu: the same in seconds of this process's CPU time.
        tokens: completion tokens trained on.
    """

    work: EngineWork
    generation: float
    whole: float
    generation_cpu: float
    whole_cpu: float
    tokens: int


@dataclass
class Clock:
    """Seconds of wall-clock and of CPU time that some functions took."""

    wall: float = 0.0
    cpu: float = 0.0

    def timed(self, function):
        def timed(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu

        return timed


class Run(TrainerCallback):
    """A trainer that makes a rollout whenever it is its turn, and notes times.

    Transformers' loop is in charge of a training run, so it runs in a thread of its own, which waits between turns.
    """

    def __init__(self, kind: Kind, workload: Workload, rollouts: int):
        self.kind, self.workload, self.left = kind, workload, rollouts
        self.responses = Responses(workload)
        self.rollouts: list[Timed] = []
        self.trained: dict[int, int] = defaultdict(int)  # how often each prompt was trained on
        self._generation, self._tokens = Clock(), 0
        self._turn, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

    def begin(self, trainer: Any):
        """Let `trainer` wait for its first turn."""
        trainer._generate = self._generation.timed(trainer._generate)
        if getattr(trainer, "carry_over", None):
            trainer.carry_over.collect = self._generation.timed(trainer.carry_over.collect)
        trainer.add_callback(self)
        threading.Thread(target=self._train, args=(trainer,), daemon=True).start()

    def _train(self, trainer: Any):
        self._wait()
        try:
            trainer.train()
        except BaseException as error:
            self._error = error
        self._end.release()

    def make_rollout(self, engine: PrescribedEngine):
        """Make the next rollout and all updates on it."""
        engine.responses = self.responses
        self.left -= 1
        self._turn.release()
        self._end.acquire()
        if self._error:
            raise self._error

    def finish(self):
        """Let training end, and check that each prompt was trained on once and nothing else was generated."""
        self._turn.release()
        self._end.acquire()
        assert set(self.trained.values()) == {1}
        assert len(self.trained) == len(self.rollouts) * len(self.workload.lengths) // self.workload.rollouts
        for (number, index), tokens in self.responses.written.items():
            assert len(tokens) == self.workload.lengths[number][index]

    def reward(self, prompts, completion_ids, **kwargs):
        """Reward every second response of a group (TRL's signature), after checking all lengths."""
        for start in range(0, len(prompts), GROUP):
            number = int(prompts[start].split()[0][1:]) - 2
            lengths = tuple(map(len, completion_ids[start : start + GROUP]))
            assert lengths == self.workload.lengths[number], f"prompt {number}: {lengths}"
            self.trained[number] += 1
        self._tokens = sum(map(len, completion_ids))
        return [float(index % 2) for index in range(len(prompts))]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % UPDATES == 0:
            wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
            used, work = self._generation, self.responses.end_call()
            self.rollouts.append(Timed(work, used.wall, wall, used.cpu, cpu, self._tokens))
            used.wall = used.cpu = 0.0
            self._end.release()
            self._wait()

    def _wait(self):
        self._turn.acquire()
        self._wall, self._cpu = time.perf_counter(), time.process_time()


class Bench:
    """Trainers that share one engine.

    Args:
        scale: sizes of the model and of a rollout.
        longest: most tokens of a response in any workload.
        folder: for the model.
    """

    def __init__(self, scale: Scale, longest: int, folder: Path):
        self.scale, self.longest, self.folder = scale, longest, folder
        self.engine: PrescribedEngine | None = None
        make_model(scale).save_pretrained(folder)
        make_tokenizer(scale.model["vocab_size"]).save_pretrained(folder)

    def run(self, kinds: Sequence[Kind], workload: Workload, seldom: dict[Kind, int]) -> dict[Kind, list[Timed]]:
        """Train with each kind of trainer on the same workload; each rollout is made by all of them in turn.

        Args:
            kinds: trainers.
            workload: prompts and lengths.
            seldom: trainers that wait for all responses, whose rollouts are all alike, take part in one of so many
                turns, by kind.

        Returns:
            The rollouts of each trainer.

        Raises:
            AssertionError: if a response doesn't have its prescribed length, or a prompt isn't trained on exactly once.
        """
        runs = []
        for kind in kinds:
            run = Run(kind, workload, workload.rollouts // seldom.get(kind, 1))
            trainer = self._trainer(kind, run)
            if self.engine is None:
                self.engine = PrescribedEngine(trainer.vllm_generation.llm.llm_engine)
                assert self.engine.slots == self.scale.responses
            run.begin(trainer)
            runs.append(run)
        gc.collect()
        assert self.engine is not None
        for turn in range(workload.rollouts):
            for run in runs:
                if turn % seldom.get(run.kind, 1) == 0:
                    run.make_rollout(self.engine)
        for run in runs:
            run.finish()
        return {run.kind: run.rollouts for run in runs}

    def _trainer(self, kind: Kind, run: Run) -> Any:
        def reward(**inputs):
            return run.reward(**inputs)

        responses = self.scale.responses
        settings: dict[str, Any] = {
            "output_dir": tempfile.mkdtemp(dir=self.folder),
            **SETTINGS,
            "logging_steps": UPDATES,
            "max_steps": UPDATES * run.left,
            "num_generations": GROUP,
            "per_device_train_batch_size": responses // UPDATES // 2,
            "steps_per_generation": 2 * UPDATES,
            "gradient_accumulation_steps": 2,
            "max_completion_length": self.longest,
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": self.longest + 32,
        }
        trainer_class: Any
        if kind.trl:
            trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
        else:
            options = {"max_carry_over": kind.max_carry_over, "oversampling": kind.oversampling}
            trainer_class, args = TICGRPOTrainer, TICGRPOConfig(**settings, **options)
        data = Dataset.from_dict({"prompt": run.workload.prompts})
        trainer = trainer_class(model=str(self.folder), reward_funcs=reward, args=args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        return trainer
