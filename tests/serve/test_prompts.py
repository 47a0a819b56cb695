"""Prompts of conversations: as `lmoe generate` makes them, with earlier answers where a router needs to know them."""

import asyncio

from lmoe.generate.conversation import prompt_ids
from tests.serve.fake_engine import prompts, tokenizer

TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am well."},
    {"role": "user", "content": "Good."},
]


def test_a_conversation_has_the_tokens_that_generate_gives_it():
    made = prompts()
    found = asyncio.run(made.conversation(TURNS))
    assert found.ids == prompt_ids(tokenizer(), TURNS)[0].tolist()
    assert found.earlier is None
    made.close()


def test_a_router_that_decides_by_the_prompt_is_told_which_tokens_were_answers():
    made = prompts(by_prompt=True)
    found = asyncio.run(made.conversation(TURNS))
    assert found.earlier is not None and len(found.earlier) == len(found.ids)
    answers = [number for number, earlier in zip(found.ids, found.earlier, strict=True) if earlier]
    assert tokenizer().decode(answers, skip_special_tokens=True).strip() == "I am well."
    assert asyncio.run(made.conversation(TURNS[:1])).earlier is None
    made.close()


def test_prompts_made_at_the_same_time_do_not_disturb_one_another():
    made = prompts()

    async def scenario() -> None:
        found = await asyncio.gather(*(made.text(f"number {at}") for at in range(30)))
        assert [tokenizer().decode(one.ids, skip_special_tokens=True) for one in found] == [
            f"number {at}" for at in range(30)
        ]

    asyncio.run(scenario())
    made.close()
