"""Started by test_carry_over_server.py: lets the engine of carry-over write responses, and notes what happened.

Arguments: a folder for the results, the server's address, its process and the names of what to do. Weights take the way
over a file, see vllm_server.py."""

from vllm_engine import SETTINGS  # isort: skip (first, because of its settings)

import asyncio
import copy
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import requests
import torch
import torch.distributed as dist
from vllm_server import transfer_by_file

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over import vllm_server
from tic_grpo_trl.carry_over.pool import Group, Pool, Response
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


LONGEST, TEMPERATURE = 96, 0.8


def make_trainer(folder: Path, address: str) -> TICGRPOTrainer:
    own = {"vllm_mode": "server", "vllm_server_base_url": address, "behaviour_policy": "sampler"}
    return TICGRPOTrainer(
        model=STARTER_MODEL,
        reward_funcs=exact_match_reward,
        args=TICGRPOConfig(
            str(folder), **SETTINGS | own | {"temperature": TEMPERATURE, "max_completion_length": LONGEST}
        ),
        train_dataset=make_dataset("train", 200, 0),
    )


class Runs:
    """Each method is something to do."""

    def __init__(self, folder: Path, address: str, process: int):
        self.address, self.process = address, process
        self.trainer = make_trainer(folder, address)
        self.engine = vllm_server.VLLMServer(self.trainer)

    def pool(self, groups: int) -> Pool:
        """Groups that nothing has been written for; a rollout takes one."""
        pool, examples = Pool(prompts=1, max_carry_over=groups), self.trainer.train_dataset
        for number in range(groups):
            example = examples[number % len(examples)]
            (prompt_ids,), *_ = self.trainer._tokenize_prompts([example["prompt"]])
            pool.admit(
                Group(number, number, example, prompt_ids, [Response() for _ in range(self.trainer.num_generations)])
            )
        return pool

    def post(self, path: str):
        answer = requests.post(self.address + path, timeout=60)
        assert answer.status_code == 200
        return answer

    def is_empty(self) -> bool:
        """Whether no request holds a part of the cache."""
        return self.post("/reset_prefix_cache").json()["success"]

    def failure(self, act) -> str:
        try:
            act()
        except RuntimeError as error:
            return str(error)
        return "none"

    def move_weights(self, far: float):
        generator = torch.Generator().manual_seed(self.trainer.state.global_step)
        with torch.no_grad():
            for weights in self.trainer.model.parameters():
                noise = torch.randn(weights.shape, generator=generator)
                weights += far * weights.square().mean().sqrt() * noise
        self.trainer.state.global_step += 1

    def weights(self) -> dict:
        return {name: value.detach().clone() for name, value in self.trainer.model.state_dict().items()}

    def versions(self) -> dict:
        """Write responses with three versions of the weights, and evaluate between two."""
        pool, released, weights, uses, before, empty = self.pool(16), [], [], [], [], []
        responses = [each for group in pool.groups for each in group.responses]
        for call in range(3):
            self.move_weights(0.05 if call else 0.4)  # the first: away from short responses
            self.engine.prepare()
            last = call == 2
            weights.append(self.weights())
            before.append(copy.deepcopy(responses))
            use = self.engine.run(
                pool.unfinished, lambda last=last: not pool.unfinished if last else pool.chosen() is not None
            )
            uses.append(vars(use))
            empty.append(self.is_empty())
            released += pool.release()
            start = time.monotonic()
            evaluated = self.trainer.vllm_generation.vllm_client.generate([[5, 6]], n=4, max_tokens=8)
            seconds = time.monotonic() - start
        groups = released + pool.groups
        return {
            "weights": weights,
            "groups": [(group.prompt_ids, [vars(each) for each in group.responses]) for group in groups],
            "before": [[(each.tokens, each.logps) for each in of_call] for of_call in before],
            "after": [(each.tokens, each.logps) for each in responses],
            "uses": uses,
            "empty": empty,
            "evaluated": (len(evaluated["completion_ids"]), seconds),
        }

    def _write(self, pool: Pool, complete: int) -> dict:
        """Go on until so many groups are complete."""
        responses = [each for group in pool.groups for each in group.responses]
        before = [len(each.tokens) for each in responses]
        self.engine.prepare()
        use = self.engine.run(pool.unfinished, lambda: sum(group.complete for group in pool.groups) >= complete)
        return {
            "before": before,
            "responses": [(each.tokens, each.logps, each.finished) for each in responses],
            "use": vars(use),
            "empty": self.is_empty(),
        }

    def many(self) -> list:
        """512 requests at once, in a process that may have 256 files open, but can ask for more."""
        _, most = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        pool = self.pool(64)
        noted = [copy.deepcopy(self._write(pool, complete)) for complete in (1, 16, 64)]
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return noted

    def at_once(self) -> list:
        """Interrupted while most requests are on their way."""
        pool = self.pool(64)
        self.engine.prepare()
        asked = []
        use = self.engine.run(pool.unfinished, lambda: bool(asked.append(1)) or len(asked) > 1)
        responses = [(each.tokens, each.logps, each.finished) for group in pool.groups for each in group.responses]
        return [{"before": [0] * 512, "responses": responses, "use": vars(use), "empty": self.is_empty()}]

    def few_connections(self) -> dict:
        other_files = vllm_server.OTHER_FILES
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        vllm_server.OTHER_FILES = limits[1] - 20
        noted = self._write(self.pool(16), 16)
        vllm_server.OTHER_FILES = other_files
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return noted

    def notebook(self) -> dict:
        async def cell():
            return self._write(self.pool(2), 2)

        return asyncio.run(cell())

    def exception(self) -> dict:
        """What the caller raises passes through, and leaves nothing on the server."""
        pool = self.pool(8)

        def enough():
            if any(each.finished for group in pool.groups for each in group.responses):
                raise LookupError
            return False

        raised = False
        try:
            self.engine.run(pool.unfinished, enough)
        except LookupError:
            raised = True
        left = [(each.tokens, each.logps, each.finished) for group in pool.groups for each in group.responses]
        return {"raised": raised, "empty": self.is_empty(), "responses": left}

    def aborted(self) -> str:
        """Another program interrupts the requests."""
        pool = self.pool(64)

        def enough():
            self.post("/pause?mode=abort")
            self.post("/resume")
            return not pool.unfinished

        failure = self.failure(lambda: self.engine.run(pool.unfinished, enough))
        assert self.is_empty()
        return failure

    def refused(self) -> str:
        """A request that the server answers with an error."""
        group = Group(0, 0, {}, [10**6], [Response()])
        return self.failure(lambda: self.engine.run([(group, group.responses[0])], lambda: False))

    def cache(self) -> str:
        """The cache can't be reset while another program's requests are running."""
        if self.trainer.accelerator.is_main_process:
            body = {"model": self.engine._client.model, "prompt": [[5, 6]] * 8, "n": 64}
            url, body = f"{self.address}/v1/completions", body | {"max_tokens": 100, "ignore_eos": True}
            thread = threading.Thread(target=lambda: requests.post(url, json=body, timeout=60))
            thread.start()
            time.sleep(0.5)
        failure = self.failure(self.engine.prepare)
        if self.trainer.accelerator.is_main_process:
            self.post("/pause?mode=abort")
            self.post("/resume")
            thread.join()
        return failure

    def paused(self) -> list:
        """A run that was killed has left the server paused."""
        self.post("/pause?mode=abort")
        vllm_server.VLLMServer(self.trainer)
        return self.trainer.vllm_generation.vllm_client.generate([[5, 6]], max_tokens=8)["completion_ids"]

    def lacking(self) -> str:
        """A server without the endpoints."""

        class NotFound(BaseHTTPRequestHandler):
            def do_POST(self):
                self.send_error(404)

            def log_message(self, *args):
                pass

        client, server = self.trainer.vllm_generation.vllm_client, HTTPServer(("127.0.0.1", 0), NotFound)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client.base_url = f"http://127.0.0.1:{server.server_port}"
        failure = self.failure(lambda: vllm_server.VLLMServer(self.trainer))
        client.base_url = self.address
        server.shutdown()
        return failure

    def _lose(self, act) -> dict:
        """Do something to all processes of the server when 20 responses are finished."""
        pool, server = self.pool(64), psutil.Process(self.process)
        responses = [each for group in pool.groups for each in group.responses]
        finished, since = [], []

        def enough():
            finished[:] = [copy.deepcopy(each) for each in responses if each.finished]
            if len(finished) >= 20 and not since:
                for process in [server, *server.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        act(process)
                since.append(time.monotonic())
            return False

        failure = self.failure(lambda: self.engine.run(pool.unfinished, enough))
        return {
            "failure": failure,
            "seconds": time.monotonic() - since[0],
            "kept": all(each in responses for each in finished) and len(finished) >= 20,
            "responses": [(each.tokens, each.logps, each.finished) for each in responses],
        }

    def frozen(self) -> dict:
        seconds = vllm_server.HEALTH, vllm_server.ANSWER
        vllm_server.HEALTH, vllm_server.ANSWER = 1.0, 2.0
        try:
            return self._lose(lambda process: process.send_signal(signal.SIGSTOP))
        finally:
            vllm_server.HEALTH, vllm_server.ANSWER = seconds
            server = psutil.Process(self.process)
            for process in [server, *server.children(recursive=True)]:
                process.send_signal(signal.SIGCONT)

    def killed(self) -> dict:
        return self._lose(lambda process: process.kill())


if __name__ == "__main__":
    folder, address, process, names = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    transfer_by_file(folder / "weights")
    runs = Runs(folder / "out", address, process)
    for name in names:
        torch.save(getattr(runs, name)(), folder / f"{name}-{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
