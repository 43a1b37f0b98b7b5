"""Carry-over with a vLLM server."""

import asyncio
import json
import math
import resource
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import aiohttp
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context

from .engine import EngineUse
from .pool import Group, Response
from .sampling_parameters import request_parameters
from .vllm_weights import load_weights


# Seconds
ANSWER = 60.0  # for an answer, unless it takes generating
HEALTH = 10.0  # between checks that the server is alive
CLEAN_UP = 10.0  # for interrupting a server that has failed: what is left ends with its connection
ARRIVAL = 0.2  # for requests that are on their way when the server is interrupted

RESETS = 10  # attempts: a request that has just ended may still hold a part of the cache
OTHER_FILES = 512  # that this process may have open besides its connections


class VLLMServer:
    """
    Send the server a request for each response, and interrupt them together.

    They don't stream: the server answers an interrupted one with all its tokens at once. `/pause?mode=abort` is what
    vLLM's versions since 0.22 and all its processes obey.
    """

    def __init__(self, trainer: GRPOTrainer):
        """
        Raises:
            RuntimeError: if the server cannot interrupt requests.
        """
        self._trainer = trainer
        self._client: Any = getattr(trainer.vllm_generation, "vllm_client", None)  # on the main process
        self._interrupted = False
        self._on_main_process(self._check_pause)

    def prepare(self):
        """Load the current weights, if they changed.

        Raises:
            RuntimeError: if the server would go on with keys and values of older weights.
        """
        load_weights(self._trainer)
        self._on_main_process(self._reset_prefix_cache)

    def run(self, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool]) -> EngineUse:
        """Go on with responses until `enough()`; on the main process alone.

        Raises:
            RuntimeError: if the server fails. What was written stays, and unfinished responses can go on.
        """
        use = EngineUse()
        if unfinished and not enough():
            with profiling_context(self._trainer, "vLLM.generate"):
                _complete(self._run(unfinished, enough, use))
        return use

    def _on_main_process(self, check: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, None]]):
        """Ask the server something on the main process, and let all processes fail if that does."""
        failures: list[str | None] = []
        if self._trainer.accelerator.is_main_process:

            async def ask():
                async with _session() as session:
                    await check(session)

            try:
                _complete(ask())
                failures = [None]
            except RuntimeError as error:
                failures = [str(error)]
        (failure,) = gather_object(failures)
        if failure is not None:
            raise RuntimeError(failure)

    async def _check_pause(self, session: aiohttp.ClientSession):
        """Check that the server can be interrupted, and end a pause that a killed run has left behind."""
        if await self._ask(session, "/resume", may_lack=True) is None:
            raise RuntimeError(
                f"max_carry_over needs /pause and /resume, which the vLLM server at {self._client.base_url} lacks: "
                "start vLLM 0.22 or newer with VLLM_SERVER_DEV_MODE=1 in its environment, or set max_carry_over=0."
            )

    async def _reset_prefix_cache(self, session: aiohttp.ClientSession):
        for _ in range(RESETS):
            answer = await self._ask(session, "/reset_prefix_cache")
            if not answer or answer["success"]:  # vLLM before 0.26 doesn't say
                return
            await asyncio.sleep(ARRIVAL)
        raise RuntimeError(
            f"The vLLM server at {self._client.base_url} didn't reset its prefix cache, which holds keys and values of "
            "older weights: let no other program send it requests."
        )

    async def _run(self, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool], use: EngineUse):
        self._interrupted = False
        connections = asyncio.Semaphore(_allow_connections(len(unfinished)))
        async with _session() as session:
            health = asyncio.create_task(self._watch(session))
            requests = [asyncio.create_task(self._go_on(session, connections, *each, use)) for each in unfinished]
            try:
                for _, finished in zip(requests, asyncio.as_completed([health, *requests]), strict=False):
                    await finished
                    if enough():
                        break
                await self._interrupt(session, requests)
            except BaseException:
                with suppress(RuntimeError, TimeoutError):
                    await asyncio.wait_for(self._interrupt(session, requests), CLEAN_UP)
                raise
            finally:
                for task in (health, *requests):
                    task.cancel()
                await asyncio.gather(health, *requests, return_exceptions=True)

    async def _go_on(
        self,
        session: aiohttp.ClientSession,
        connections: asyncio.Semaphore,
        group: Group,
        response: Response,
        use: EngineUse,
    ):
        """Write a response until it ends or is interrupted."""
        body = request_parameters(self._trainer.args, group, response) | {
            "model": self._client.model,
            "prompt": group.prompt_ids + response.tokens,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        async with connections:
            if self._interrupted:
                return
            answer = await self._ask(session, "/v1/completions", body, generates=True)
        (choice,) = answer["choices"]
        tokens, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if tokens:
            use.prefilled_again += len(response.tokens)
            use.sampled += len(tokens)
        response.write(tokens, logps)
        response.finished = choice["finish_reason"] != "abort"
        if not (response.finished or self._interrupted):
            raise RuntimeError(
                f"The vLLM server at {self._client.base_url} aborted a request, and not for this run: let no other "
                "program pause or stop it."
            )

    async def _interrupt(self, session: aiohttp.ClientSession, requests: list[asyncio.Task]):
        """Abort what is running, until every request has answered: those that are on their way escape a round."""
        self._interrupted = True
        while unanswered := [request for request in requests if not request.done()]:
            await self._ask(session, "/pause?mode=abort")
            await asyncio.wait(unanswered, timeout=ARRIVAL)
        await self._ask(session, "/resume")
        for request in requests:
            request.result()

    async def _watch(self, session: aiohttp.ClientSession):
        """Fail if the server no longer answers: a request would wait for ever."""
        while True:
            await asyncio.sleep(HEALTH)
            await self._ask(session, "/health", method="GET")

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: dict[str, Any] | None = None,
        method: str = "POST",
        generates: bool = False,
        may_lack: bool = False,
    ) -> Any:
        """Return the server's answer, or `None` if it is empty, or if it `may_lack` that path."""
        address = self._client.base_url
        again = "look into its log, start it again, and resume the run from its last checkpoint."
        try:
            timeout = aiohttp.ClientTimeout(total=None if generates else ANSWER, sock_connect=ANSWER)
            async with session.request(method, address + path, json=body, timeout=timeout) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(f"The vLLM server at {address} does not answer {path} ({reason}): {again}") from error
        if answer.status == 404 and may_lack:
            return None
        if answer.status != 200:
            said = " ".join(text.split())[:300]
            raise RuntimeError(f"The vLLM server at {address} answered {path} with {answer.status} ({said}): {again}")
        return json.loads(text) if text else None


def _session() -> aiohttp.ClientSession:
    """Return a session that opens a connection for every request: one that is reused may just be closing."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


def _allow_connections(wanted: int) -> int:
    """Let this process open that many connections at once, or as many as the system allows, and return how many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted + OTHER_FILES:
        soft = min(wanted + OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), limits[1]))
    return int(max(1, min(wanted, soft - OTHER_FILES)))


def _complete(coroutine: Coroutine[Any, Any, None]):
    """Run a coroutine to its end; in a notebook, whose own loop holds this thread, in another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
