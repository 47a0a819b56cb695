"""Names of the metrics of an evaluation in W&B: one for each domain and each sum over domains."""

import pytest

from lmoe.evaluate.results import ALL_TOKENS, MEAN, DomainLosses, Evaluation, ExportedLosses
from lmoe.evaluate.wandb_tables import metric_parts, metrics


@pytest.mark.parametrize(
    ("domain", "part"),
    [
        ("code", "code"),
        ("plain text", "plain_text"),
        ("math (hard)", "math_(hard)"),
        ("(old) code", "(old)_code"),
        ("all tokens", "all tokens"),
        ("all_tokens", "all_tokens (2)"),
        (ALL_TOKENS, "all_tokens"),
        (MEAN, "domain_mean"),
    ],
)
def test_brackets_are_taken_off_sums_alone_and_domains_give_way_to_them(domain, part):
    assert metric_parts([domain, ALL_TOKENS, MEAN])[domain] == part


def test_no_two_domains_have_one_name():
    domains = ["a b", "a_b", "a b_c", "a_b c", "all tokens", "all_tokens", "all_tokens (2)", ALL_TOKENS]
    parts = metric_parts(domains)
    assert len({*parts.values()}) == len(domains)
    assert (parts["a b"], parts["a_b"], parts[ALL_TOKENS]) == ("a b", "a_b", "all_tokens")


def test_a_domain_called_as_a_sum_is_hides_no_figure():
    names = ["all tokens", "math (hard)", ALL_TOKENS]
    losses = [
        DomainLosses(domain=name, label_tokens=1, off_loss=9.0, on_loss=float(n), off_perplexity=1, on_perplexity=1)
        for n, name in enumerate(names)
    ]
    logged = metrics(Evaluation(settings={}, losses=losses))
    assert logged["eval/all tokens/loss"] == 0 and logged["eval/math_(hard)/loss"] == 1
    assert logged["eval/all_tokens/loss"] == 2 and len(logged) == 6
    exported = [
        ExportedLosses(domain=name, label_tokens=1, loss=float(n), perplexity=1, run_loss=None)
        for n, name in enumerate(names)
    ]
    assert metrics(Evaluation(settings={}, exported=exported)) == {
        "eval/all tokens/loss": 0,
        "eval/math_(hard)/loss": 1,
        "eval/all_tokens/loss": 2,
    }
