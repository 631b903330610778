"""vLLM's own API server in this process, over an engine that says what a test tells it to.

Everything is vLLM's but the model: routes, rendering, validation, detokenizer, stop strings, parsers, labels. Where the
engine core would sample a token, the next one of the script is taken.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvicorn
from transformers import TokenizersBackend
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.api_server import build_app, init_app_state
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.request import Request
from vllm_names import make_arg_parser

CONTEXT = 8192
TASKS = ("generate",)


@dataclass
class Script:
    """What the model says next, to every request."""

    answers: Sequence[Sequence[int]] = ()
    """Tokens; the first answer of a request says the first, and so on, from the start again."""
    step: int = 1
    """Tokens that come at once."""
    seen: list[EngineCoreRequest] = field(default_factory=list)


class ScriptedCore:
    """The engine core's client: the part of it that `AsyncLLM` calls."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, script: Script) -> None:
        self._script = script
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._aborted: set[str] = set()
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        script = self._script
        script.seen.append(request)
        tokens = script.answers[self._number % len(script.answers)]
        self._number += 1
        task = asyncio.create_task(self._generate(Request.from_engine_core_request(request, None), tokens, script.step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _generate(self, request: Request, tokens: Sequence[int], step: int) -> None:
        for start in range(0, len(tokens), step):
            await asyncio.sleep(0)
            if request.request_id in self._aborted:
                return
            new: list[int] = []
            for token in tokens[start : start + step]:
                new.append(token)
                request.append_output_token_ids(token)
                if check_stop(request, CONTEXT):
                    break
            ended = request.is_finished()
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=new,
                finish_reason=request.get_finished_reason(),
                stop_reason=request.stop_reason,
            )
            self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
            if ended:
                return
        raise AssertionError("the script is over, and nothing ended the answer")

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        self._aborted.update(request_ids)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return TASKS

    def shutdown(self, timeout: float | None = None) -> None:
        for task in self._tasks:
            task.cancel()


@dataclass
class ScriptedServer:
    """A server, and what its model says."""

    url: str
    script: Script
    tokenizer: TokenizersBackend
    app: Any

    def says(self, *texts: str, ends: bool = True, step: int = 1) -> int:
        """What the model says from now on; returns how many tokens the first of the texts has.

        Args:
            ends: the model ends its turn after the text. Otherwise something else must.
            step: tokens that come at once.
        """
        answers = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        length = len(answers[0])
        if ends:
            answers = [[*answer, self.tokenizer.eos_token_id] for answer in answers]
        self.script.answers, self.script.step = answers, step
        self.script.seen.clear()
        return length


@contextmanager
def serve(model: Path, *options: str) -> Iterator[ScriptedServer]:
    """vLLM's server with these options, for the config and tokenizer in the folder `model`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # on a busy machine a client may come before the server does
        port = listener.getsockname()[1]
        given = ["--model", str(model), "--served-model-name", "tiny", "--max-model-len", str(CONTEXT), *options]
        parser = make_arg_parser(FlexibleArgumentParser())
        # Derendering, from 0.30 on.
        given += ["--enable-scale-out"] * ("--enable-scale-out" in parser._option_string_actions)
        args = parser.parse_args(given)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        script, made = Script(), {}

        async def main() -> None:
            with mock.patch.object(EngineCoreClient, "make_async_mp_client", return_value=ScriptedCore(script)):
                engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
            app = build_app(args, TASKS, config.model_config)
            await init_app_state(engine, app.state, args, TASKS)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            made.update(app=app, server=server, tokenizer=engine.renderer.tokenizer)
            ready.set()
            await server.serve(sockets=[listener])

        ready = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                failure.append(error)
                ready.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        ready.wait()
        if failure:
            raise failure[0]
        try:
            yield ScriptedServer(f"http://127.0.0.1:{port}", script, made["tokenizer"], made["app"])
        finally:
            made["server"].should_exit = True
            thread.join(timeout=10)
