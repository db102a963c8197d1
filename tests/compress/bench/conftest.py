"""A server with OpenAI's streams whose every pause is known, in a thread of its own."""

import asyncio
import json
import threading
from contextlib import ExitStack, contextmanager

import pytest
from aiohttp import web


class FakeServer:
    """Answers with `tokens` words: the first after `first` s, each other after `gap` s.

    From the second on they come `together` at a time, all at the end of their gaps, as from a
    server that drafts.  It counts the tokens so far in every event if asked to.

    What a request's text says decides otherwise: see `answer`.
    """

    def __init__(self, first=0.05, gap=0.02, tokens=5, usage=True, together=1):
        self.first, self.gap, self.tokens, self.usage = first, gap, tokens, usage
        self.together = together
        self.bodies = []
        self.keys = []
        self.now = self.most = 0  # requests at once
        self.url = ""

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self._answer(request, body)
        finally:
            self.now -= 1

    async def _answer(self, request, body):
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if "refuse" in text:
            error = {"error": {"message": "the queue is full", "type": "overloaded", "code": None}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        if "nonsense" in text:
            return web.Response(text="data: no JSON\n\n", content_type="text/event-stream")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body

        counts = {"prompt_tokens": len(text.split()), "completion_tokens": 0}
        counting = body["stream_options"].get("continuous_usage_stats", False)

        async def send(value):
            if counting and "choices" in value:
                value = {**value, "usage": counts}
            await response.write(f"data: {json.dumps(value)}\n\n".encode())

        def choice(text, finish=None):
            part = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": finish, **part}]}

        if chat:
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await response.write(b": a comment\n\n")
        for number in range(0 if "silent" in text else self.tokens):
            await asyncio.sleep(self.gap if number else self.first)
            if number == 2 and "cut" in text:
                request.transport.close()
                return response
            if number == 2 and "end early" in text:
                return response
            if number == 2 and "fail" in text:
                await send({"error": {"message": "the engine has failed", "type": "server_error"}})
                return response
            counts["completion_tokens"] += 1
            if number % self.together == 0 or number + 1 == self.tokens:
                await send(choice("word "))
        await send(choice("", "length"))
        if self.usage:
            await send({"choices": [], "usage": counts})
        await response.write(b"data: [DONE]\n\n")
        return response

    @contextmanager
    def running(self):
        """Serve on a free port until the block ends; yields this object, with its `url`."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def start():
            app = web.Application()
            app.router.add_get("/v1/models", self.models)
            for route in ("/v1/chat/completions", "/v1/completions"):
                app.router.add_post(route, self.answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return runner

        def wait(coroutine):
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

        runner = wait(start())
        try:
            yield self
        finally:
            wait(runner.cleanup())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@pytest.fixture
def fake_server():
    """A function that starts a FakeServer with the given pauses; all end with the test."""
    with ExitStack() as stack:
        yield lambda **pauses: stack.enter_context(FakeServer(**pauses).running())
