"""Reference: one text at a time, neither batch nor padding nor cache; tokens are found by a walk over characters."""

import torch
from torch import nn


def token_loglikelihoods(model: nn.Module, tokenizer, text: str, first: int, last: int, **encoding) -> list[float]:
    """Log-probability of every token that has a character of text[first:last], given all tokens before it."""
    encoded = tokenizer(text, return_offsets_mapping=True, **encoding)
    ids = encoded["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    found = []
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        if place > 0 and any(first <= character < last for character in range(start, end)):
            found.append(float(logits[place - 1].log_softmax(-1)[ids[place]]))
    return found


def chat(tokenizer, question: str, answer: str) -> tuple[str, int, int]:
    """The rendering of a question and its answer, and where the answer's characters are."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    head = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(head + answer)
    return text, len(head), len(head) + len(answer)
