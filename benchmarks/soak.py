"""Many clients at a live server, some of which go away, send nonsense, or change its experts: is anybody lost or wrong?

`python -m benchmarks.soak --requests 1000` or `--minutes 10`. The server is `lmoe serve` in a process of its own, over
a base with three experts. What each greedy request must bring is known beforehand from `generate`, alone, one mixture
at a time; an answer may part from it where the two best tokens lie closer than 1e-3 (counted). Memory is RssAnon of
the server after a fifth of the requests and at the end.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lmoe
from benchmarks.decode_entrants import write_experts
from benchmarks.flags import positive
from benchmarks.machine import facts
from lmoe.adapter.answer_end import end_tokens
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.serve.text import TokenTexts

MODULE = "benchmarks.soak"
TOKEN = "for-this-run-only"
CLOSE, MOST_PARTED, MOST_GROWTH = 1e-3, 0.005, 1.02
ANSWER = 16
"""Tokens of an answer, at most."""
TINY = Path(__file__).parents[1] / "data" / "tiny"
EXPERTS: Sequence[str] = ("code", "chat", "sql")
MIXTURES: Sequence[dict[str, float]] = (
    {"code": 1.0},
    {"chat": 0.7, "sql": 0.3},
    {"sql": 0.5, "code": -0.2},
    {"code": 0.0},
    {"chat": 1.0},
    {"code": 0.5, "chat": 0.5},
)
BAD = (
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "a", "experts": {"nobody": 1}}',
    b'{"prompt": "a", "experts": {"code": NaN}}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "unknown": 1}',
)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the requests.

    Args:
        kinds: requests by what they were.
        right: answers as they must be.
        parted: answers that parted at a token whose rival was nearly as likely.
        wrong: answers that parted elsewhere, with what was got.
        lost: requests without an answer or the refusal that they deserve, with why.
        rss: MB by number of requests.
        seconds: of all of them.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    right: int = 0
    parted: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    rss: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(slots=True, frozen=True)
class Expected:
    """An answer, and how far its best token lies before the second best at each place.

    Args:
        tokens: their texts.
        margins: natural logarithms.
    """

    tokens: list[str]
    margins: list[float]


class Soak:
    """All the clients of one server.

    Args:
        address: of the server.
        process: of the server.
        prompts: token ids.
        expected: by prompt and mixture, as places in their lists.
        spare: experts that come and go.
        seed: of what the clients do.
    """

    def __init__(
        self, address: str, process: int, prompts: Sequence[Sequence[int]], expected: dict[tuple[int, int], Expected],
        spare: Sequence[Path], seed: int,
    ) -> None:  # fmt: skip
        self.address, self.process, self.prompts, self.expected, self.spare = address, process, prompts, expected, spare
        self.draw, self.outcome, self.sent = random.Random(seed), Outcome(), 0
        self.changing = asyncio.Lock()

    async def client(self, http: httpx.AsyncClient, more: "asyncio.Queue[int | None]", first: int) -> None:
        """One client, until there is no more to send."""
        while (await more.get()) is not None:
            self.sent += 1
            if self.sent == first:
                self.outcome.rss[self.sent] = rss_anon(self.process)
            kind = self.draw.choices(("answer", "stream", "abort", "bad", "change"), (50, 20, 15, 10, 5))[0]
            self.outcome.kinds[kind] = self.outcome.kinds.get(kind, 0) + 1
            try:
                await getattr(self, kind)(http)
            except Exception as error:
                self.outcome.lost.append(f"{kind}: {type(error).__name__}: {error}")

    async def answer(self, http: httpx.AsyncClient) -> None:
        prompt, mixture, body = self._body()
        found = await http.post("/v1/completions", json=body)
        if found.status_code != 200:
            self.outcome.lost.append(f"answer: {found.status_code} {found.text[:200]}")
            return
        self._compare(prompt, mixture, found.json()["choices"][0]["logprobs"]["tokens"])

    async def stream(self, http: httpx.AsyncClient) -> None:
        prompt, mixture, body = self._body()
        got, ended = [], False
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    for choice in json.loads(line[6:])["choices"]:
                        got += (choice.get("logprobs") or {}).get("tokens", [])
        if not ended:
            self.outcome.lost.append(f"stream: ended without [DONE] after {len(got)} tokens")
            return
        self._compare(prompt, mixture, got)

    async def abort(self, http: httpx.AsyncClient) -> None:
        _, _, body = self._body()
        if self.draw.random() < 0.5:
            async with http.stream(
                "POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 200}
            ) as answer:
                async for _ in answer.aiter_lines():
                    break
        else:
            waiting = asyncio.create_task(http.post("/v1/completions", json=body | {"max_tokens": 200}))
            await asyncio.sleep(self.draw.random() * 0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def bad(self, http: httpx.AsyncClient) -> None:
        found = await http.post(
            "/v1/completions", content=self.draw.choice(BAD), headers={"content-type": "application/json"}
        )
        if not 400 <= found.status_code < 500:
            self.outcome.lost.append(f"bad: {found.status_code} {found.text[:200]}")

    async def change(self, http: httpx.AsyncClient) -> None:
        async with self.changing:  # each change is then known to be one that can be
            head = {"authorization": f"Bearer {TOKEN}"}
            known = {expert["name"]: expert for expert in (await http.get("/v1/experts")).json()["data"]}
            place = {"place": str(self.draw.choice(self.spare))}
            if "spare" not in known:
                found = await http.post("/v1/experts", json={"name": "spare", **place}, headers=head)
            else:
                way = self.draw.choice(
                    ("replace", "remove", "roll_back" if known["spare"]["can_roll_back"] else "replace")
                )
                if way == "replace":
                    found = await http.put("/v1/experts/spare", json=place, headers=head)
                elif way == "remove":
                    found = await http.delete("/v1/experts/spare", headers=head)
                else:
                    found = await http.post("/v1/experts/spare/roll_back", headers=head)
            if found.status_code >= 300:
                self.outcome.lost.append(f"change: {found.status_code} {found.text[:200]}")

    def _body(self) -> tuple[int, int, dict[str, Any]]:
        prompt, mixture = self.draw.randrange(len(self.prompts)), self.draw.randrange(len(MIXTURES))
        body = {"model": "lmoe", "prompt": self.prompts[prompt], "experts": MIXTURES[mixture], "temperature": 0}
        return prompt, mixture, body | {"max_tokens": ANSWER, "logprobs": 0}

    def _compare(self, prompt: int, mixture: int, got: Sequence[str]) -> None:
        expected, tokens = self.expected[prompt, mixture], list(got)
        if tokens == expected.tokens:
            self.outcome.right += 1
            return
        same = next((n for n, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b), len(tokens))
        if same < len(expected.margins) and expected.margins[same] < CLOSE:
            self.outcome.parted += 1
        else:
            self.outcome.wrong.append(f"prompt {prompt}, mixture {mixture}: {tokens} instead of {expected.tokens}")


@torch.no_grad()
def expected_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Expected:
    """What `generate` answers to a prompt alone, without the token that ends it."""
    ends, texts = end_tokens(model, tokenizer), TokenTexts(tokenizer)
    given = torch.tensor([list(ids)])
    found = model.generate(  # type: ignore[operator]
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=ANSWER, do_sample=False,
        eos_token_id=ends or None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = found.sequences[0, len(ids) :].tolist()
    margins = [float(best[0] - best[1]) for best in (logits[0].float().topk(2).values for logits in found.logits)]
    kept = [texts.of(token).text for token in tokens if token not in ends]
    return Expected(kept, margins)


def rss_anon(process: int) -> float:
    """MB (10^6 bytes) of a process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def start_server(base: str, places: dict[str, Path], folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server in a process of its own, and its address.

    Args:
        folder: gets its logs.

    Raises:
        RuntimeError: it does not start.
    """
    command = [sys.executable, "-c", "from lmoe.cli.main import main; main()", "serve", "--model", base, "--port", "0"]
    experts = ",".join(f"{name}={places[name]}" for name in EXPERTS)
    command += ["--experts", experts, "--room", "64", "--log-file", str(folder / "requests.jsonl")]
    said = folder / "said.txt"
    with said.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"LMOE_ADMIN_TOKEN": TOKEN})
    while process.poll() is None:
        if (found := re.search(r"http://[\d.]+:\d+", said.read_text())) is not None:
            return process, found[0]
        time.sleep(0.1)
    raise RuntimeError(f"the server has not started:\n{said.read_text()}")


async def soaked(soak: Soak, flags: argparse.Namespace) -> Outcome:
    """Send all requests, and wait for them."""
    more: asyncio.Queue[int | None] = asyncio.Queue(maxsize=1)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=soak.address, timeout=120, limits=limits) as http:
        while (await http.get("/health")).status_code != 200:
            await asyncio.sleep(0.2)
        began = time.perf_counter()
        fifth = (flags.requests or 1000) // 5
        clients = [asyncio.create_task(soak.client(http, more, fifth)) for _ in range(flags.clients)]
        number = 0
        while number < flags.requests if flags.minutes is None else time.perf_counter() - began < 60 * flags.minutes:
            await more.put(number)
            number += 1
        for _ in clients:
            await more.put(None)
        await asyncio.gather(*clients)
        soak.outcome.seconds = time.perf_counter() - began
        await asyncio.sleep(1)
        soak.outcome.rss[number] = rss_anon(soak.process)
        if (await http.get("/health")).status_code != 200:
            soak.outcome.lost.append("the server is not healthy at the end")
    return soak.outcome


def main(given: Sequence[str] | None = None) -> int:
    """Runs, prints, and returns 1 where somebody was lost or wrong."""
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--model", default=str(TINY), help="base; float32")
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--minutes", type=float, help="as long as that, in place of a number of requests")
    parser.add_argument("--clients", type=positive, default=12)
    parser.add_argument("--prompts", type=positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(given)
    config = BackboneConfig(model_name=flags.model)
    model, tokenizer = load_model(config).eval(), load_tokenizer(config)
    draw = torch.Generator().manual_seed(flags.seed)
    size = len(tokenizer)
    prompts = [
        torch.randint(5, size, (int(torch.randint(3, 60, (1,), generator=draw)),), generator=draw).tolist()
        for _ in range(flags.prompts)
    ]
    with TemporaryDirectory() as folder:
        written = list(write_experts(model, Path(folder), len(EXPERTS) + 2, 8).values())
        places = dict(zip(EXPERTS, written, strict=False))
        expected = {}
        with lmoe.Blend(model, places) as blend:
            for number, mixture in enumerate(MIXTURES):
                blend.weights = mixture
                for prompt, ids in enumerate(prompts):
                    expected[prompt, number] = expected_of(model, tokenizer, ids)
        process, address = start_server(flags.model, places, Path(folder))
        try:
            soak = Soak(address, process.pid, prompts, expected, written[len(EXPERTS) :], flags.seed)
            outcome = asyncio.run(soaked(soak, flags))
        finally:
            process.terminate()
            code = process.wait(60)
    early, late = outcome.rss[min(outcome.rss)], outcome.rss[max(outcome.rss)]
    answers = outcome.right + outcome.parted + len(outcome.wrong)
    report = asdict(outcome) | {
        "growth": round(late / early, 4), "parted_share": round(outcome.parted / max(1, answers), 4), "exit": code,
        "requests": soak.sent, "machine": facts(torch.device("cpu")),
    }  # fmt: skip
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    kept = not outcome.wrong and not outcome.lost and late <= MOST_GROWTH * early
    return 0 if kept and outcome.parted <= MOST_PARTED * answers and code == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
