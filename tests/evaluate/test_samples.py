"""Samples: the answers of each row alone, whatever the batch, with the adapters off and on."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.data.encoded import opening
from lmoe.evaluate.rows import evaluation_rows
from lmoe.evaluate.samples import samples
from lmoe.evaluate.subject import Subject
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off, domain
from tests.micro import DOMAINS
from tests.tiny_models import randomise


@pytest.fixture(scope="module", params=["sequence", "oracle"])
def asked(request, micro):
    """Subject and rows, of a router that decides by prompt, and of one that goes by the domain."""
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    names = {"domains": list(DOMAINS[::-1])} if request.param == "oracle" else {}
    lmoe.inject(model, {"num_experts": 3, "lora_r": 4}, {"router": request.param, **names})
    randomise(model, std=0.2)
    subject = Subject(
        model=model.eval(), tokenizer=AutoTokenizer.from_pretrained(micro.model), batch_size=4, max_length=48
    )
    settings = EvaluateSettings(checkpoint="none", data=str(micro.val))
    rows, _ = evaluation_rows(settings, None, subject.tokenizer, injected(model).moe, max_length=48)
    return subject, rows


def test_each_sample_has_the_answers_that_its_prompt_gets_alone(asked):
    subject, data = asked
    found = samples(subject, data, count=2, max_new_tokens=6)
    assert [sample.domain for sample in found] == sorted([*DOMAINS, *DOMAINS])
    by_prompt = {}
    for row in (data.rows[i] for i in range(len(data.rows))):
        prompt, name = row.input_ids[None, : opening(row)].long(), data.domains[row.domain]
        about = domain(subject.model, name) if injected(subject.model).moe.router == "oracle" else nullcontext()

        def answer(prompt=prompt):
            ids = continue_ids(subject.model, subject.tokenizer, prompt, Sampling(max_new_tokens=6))
            return subject.tokenizer.decode(ids, skip_special_tokens=True)

        with about:
            on = answer()
            with adapters_off(subject.model):
                by_prompt[subject.tokenizer.decode(prompt[0])] = (name, answer(), on)
    assert [by_prompt[sample.prompt] for sample in found] == [(s.domain, s.off, s.on) for s in found]
    assert any(sample.off != sample.on for sample in found)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_batch_size_changes_no_sample(asked, batch_size):
    subject, data = asked
    expected = samples(subject, data, count=2, max_new_tokens=6)
    assert samples(replace(subject, batch_size=batch_size), data, count=2, max_new_tokens=6) == expected
