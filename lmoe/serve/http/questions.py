"""From the body of a request to what the engine is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmoe.serve.http.answers import ChatShape, CompletionShape, Shape
from lmoe.serve.http.bodies import TOKENS, Asked, ChatBody, CompletionBody
from lmoe.serve.http.limits import room_for
from lmoe.serve.http.mixture_names import mixture_of
from lmoe.serve.http.problem import Problem
from lmoe.serve.http.service import Service
from lmoe.serve.prompts import Prompt
from lmoe.serve.request import Request, SamplingSettings


@dataclass(slots=True, frozen=True, kw_only=True)
class Question:
    """What a client asks.

    Args:
        body: its own words.
        shape: of the answers.
        requests: one for each answer.
        prompt_tokens: of all prompts, each counted once.
    """

    body: Asked
    shape: Shape
    requests: Sequence[Request]
    prompt_tokens: int


async def chat_question(service: Service, body: ChatBody) -> Question:
    """The question of a conversation.

    Raises:
        Problem: it cannot be asked.
        RefusedError: the chat template refuses it.
    """
    mixture = _mixture(service, body)
    prompt = await service.prompts.conversation(body.turns(), body.shown_tools())
    shape = ChatShape(model=body.model or service.settings.name, texts=service.prompts.texts)
    return _question(service, body, shape, [prompt], mixture)


async def completion_question(service: Service, body: CompletionBody) -> Question:
    """The question of texts that are to be continued.

    Raises:
        Problem: it cannot be asked.
    """
    mixture = _mixture(service, body, prompts=len(body.prompt))
    prompts = [await _prompt(service, one) for one in body.prompt]
    before: list[str] = []
    if body.echo:
        texts = [one if isinstance(one, str) else str(service.prompts.tokenizer.decode(one)) for one in body.prompt]
        before = [text for text in texts for _ in range(body.n)]
    shape = CompletionShape(model=body.model or service.settings.name, texts=service.prompts.texts, before=before)
    return _question(service, body, shape, prompts, mixture)


async def _prompt(service: Service, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return await service.prompts.text(given)
    _check_tokens(service, given, "prompt")
    return Prompt(given)


def _check_tokens(service: Service, tokens: Sequence[int], field: str) -> None:
    wrong = next((token for token in tokens if not 0 <= token < service.prompts.vocabulary), None)
    if wrong is not None:
        most = service.prompts.vocabulary - 1
        raise Problem(400, f"{field}: there is no token {wrong}; ids go from 0 to {most:,}", field, "invalid_value")


def _mixture(service: Service, body: Asked, prompts: int = 1) -> dict[str, float] | None:
    """The weights that a body names, after what can be checked before its prompt is read."""
    if body.n * prompts > service.settings.max_n:
        what = "n" if prompts == 1 else "n times the number of prompts"
        most = service.settings.max_n
        raise Problem(400, f"{what} is {body.n * prompts:,}, must be at most {most:,}", "n", "invalid_value")
    _check_tokens(service, list(body.logit_bias), "logit_bias")
    return mixture_of(body.model, body.experts, served=service.settings.name, known=service.experts())


def _question(
    service: Service, body: Asked, shape: Shape, prompts: Sequence[Prompt], mixture: dict[str, float] | None
) -> Question:
    requests = []
    for prompt in prompts:
        most = room_for(
            len(prompt.ids),
            body.most_tokens,
            context=service.engine.context,
            of_cache=service.engine.limited_by_cache,
            most=service.settings.max_tokens,
            field="messages" if isinstance(body, ChatBody) else "prompt",
        )
        for number in range(body.n):
            requests.append(
                Request(
                    prompt=prompt.ids,
                    max_tokens=most,
                    end_tokens=service.prompts.ends,
                    sampling=_sampling(body, number),
                    mixture=mixture,
                    earlier_answers=prompt.earlier,
                    top_logprobs=body.wanted_logprobs,
                    load=bool(body.lmoe),
                    expert_weights=body.lmoe == TOKENS,
                )
            )
    return Question(body=body, shape=shape, requests=requests, prompt_tokens=sum(len(prompt.ids) for prompt in prompts))


def _sampling(body: Asked, number: int) -> SamplingSettings:
    """How an answer's tokens are chosen; of several to one prompt each has a seed of its own."""
    return SamplingSettings(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else body.seed + number,
    )
