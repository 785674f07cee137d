"""Clients that crowd an OpenAI-compatible server: the other half of `benchmarks load`, in vLLM's environment.

    python benchmarks/rivals/http_clients.py URL MODEL REQUESTS CLIENTS

Each prompt is asked alone first; under load the same words must come back, whole, streamed, or as far as a request that
was cancelled got. Requests that are too long or malformed must be refused with the right status. Prints one JSON line.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter

PROMPTS = [f"{start} {thing}" for start in ("The capital of", "A story about", "How to make", "The colour of")
           for thing in ("France", "an anvil", "bread", "the sea", "iron", "a clock")]  # fmt: skip
TOKENS = 24


class Crowd:
    """What the clients share: the connection, the right answers, and the counts."""

    def __init__(self, url: str, model: str) -> None:
        import openai  # noqa: PLC0415

        self.openai = openai
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.model = model
        self.right: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.waits: list[float] = []
        self.notes: list[str] = []

    async def _ask(self, prompt: str, **more: object) -> object:
        settings = {"model": self.model, "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return await self.client.completions.create(prompt=prompt, **settings | more)

    def _judge(self, prompt: str, text: str, *, whole: bool) -> None:
        right = self.right[prompt]
        if (text == right) if whole else right.startswith(text):
            self.counts["right" if whole else "right as far as it got"] += 1
        else:
            self.counts["wrong"] += 1
            self.notes.append(f"{prompt!r}: {text!r}, alone {right!r}")

    async def _one(self, order: random.Random) -> None:
        prompt, start = order.choice(PROMPTS), time.perf_counter()
        stream, kind = order.random() < 0.5, order.random()
        if kind < 0.12:
            await self._bad(order)
        elif kind < 0.12 + 1 / 3:
            await self._cancelled(prompt, stream, order)
        elif stream:
            text = ""
            async for chunk in await self._ask(prompt, stream=True):
                if not text:
                    self.waits.append(time.perf_counter() - start)
                text += chunk.choices[0].text if chunk.choices else ""
            self.counts["streamed"] += 1
            self._judge(prompt, text, whole=True)
        else:
            answer = await self._ask(prompt)
            self.counts["in one piece"] += 1
            self._judge(prompt, answer.choices[0].text, whole=True)

    async def _cancelled(self, prompt: str, stream: bool, order: random.Random) -> None:
        self.counts["cancelled"] += 1
        if not stream:
            try:
                await asyncio.wait_for(self._ask(prompt, max_tokens=200), order.uniform(0.05, 0.5))
            except TimeoutError:
                return
            return
        text, stop = "", order.randrange(1, 12)
        answer = await self._ask(prompt, stream=True)
        async for chunk in answer:
            text += chunk.choices[0].text if chunk.choices else ""
            stop -= 1
            if not stop:
                break
        await answer.close()
        self._judge(prompt, text, whole=False)

    async def _bad(self, order: random.Random) -> None:
        kind, status = order.choice(["too long", "too many tokens", "no such model", "malformed", "wrong type"]), None
        try:
            if kind == "too long":
                await self._ask("iron " * 5000)
            elif kind == "too many tokens":
                await self._ask(PROMPTS[0], max_tokens=-5)
            elif kind == "no such model":
                await self._ask(PROMPTS[0], model="nobody")
            elif kind == "malformed":
                await self.client.post("/completions", cast_to=object, content=b'{"model": "x", "prompt": [')
            else:
                await self._ask({"not": "a prompt"})  # type: ignore[arg-type]
        except self.openai.APIStatusError as error:
            status = error.status_code
        self.counts["refused" if status in (400, 404, 422) else "wrongly taken"] += 1
        if status not in (400, 404, 422):
            self.notes.append(f"{kind}: status {status}")

    async def _client_loop(self, number: int, requests: int) -> None:
        order = random.Random(number)
        for _ in range(requests):
            try:
                await self._one(order)
            except self.openai.APIError as error:
                self.counts["failed"] += 1
                self.notes.append(f"{type(error).__name__}: {error}")


async def main() -> None:
    url, model, requests, clients = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    crowd = Crowd(url, model)
    for prompt in PROMPTS:
        crowd.right[prompt] = (await crowd._ask(prompt)).choices[0].text
    start = time.perf_counter()
    await asyncio.gather(*(crowd._client_loop(number, requests // clients) for number in range(clients)))
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "counts": dict(crowd.counts), "waits": sorted(crowd.waits), "notes": crowd.notes[:8]}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
