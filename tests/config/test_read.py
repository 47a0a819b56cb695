"""Values become what the dataclasses say, or problems in our words; none hides another."""

import pytest
from omegaconf import OmegaConf

from lmoe.config.pretrain import PretrainConfig
from lmoe.config.read import independent, read_section
from lmoe.config.run import RunConfig
from lmoe.vocabulary import BackbonePrecision, Role

WRONG = [
    ({"optim": {"lr": "abc"}}, "optim.lr is abc, must be a number"),
    ({"injection": {"lora_r": 1.5}}, "injection.lora_r is 1.5, must be a whole number"),
    ({"injection": {"lora_r": True}}, "injection.lora_r is true, must be a whole number"),
    ({"injection": {"lora_r": None}}, "injection.lora_r is null, must be a whole number"),
    ({"injection": {"use_rslora": "perhaps"}}, "injection.use_rslora is perhaps, must be true or false"),
    ({"name": [1]}, "name is [1], must be text"),
    ({"moe": {"domains": [[1]]}}, "moe.domains[0] is [1], must be text"),
    ({"injection": {"layer_indices": [[1]]}}, "injection.layer_indices[0] is [1], must be a whole number"),
    ({"injection": {"num_experts_by_layer": [2, [4]]}}, "injection.num_experts_by_layer[1] is [4], must be a whole"),
    ({"injection": {"lora_r_by_layer": 4}}, "injection.lora_r_by_layer is 4, must be a list of whole numbers"),
    ({"optim": {"betas": [[0.9], 0.9]}}, "optim.betas[0] is [0.9], must be a number"),
    ({"phase": {"phases": {"a": {"target_layers": [[1]]}}}}, "phase.phases.a.target_layers[0] is [1], must be a whole"),
    ({"phase": {"phases": {"a": {"trainable": [["lora"]]}}}}, "phase.phases.a.trainable[0] is [lora]; allowed: "),
    ({"phase": {"phases": {"a": {"lora_handoff": {"experts": [[0]]}}}}}, "phase.phases.a.lora_handoff.experts[0] is"),
    ({"moe": None}, "moe is null, must be a mapping with keys such as router"),
    ({"injection": 3}, "injection is 3, must be a mapping with keys such as strategy"),
    ({"phase": {"phases": None}}, "phase.phases is null, must be a mapping by name"),
    ({"phase": {"phases": {"a": None}}}, "phase.phases.a is null, must be a mapping with keys such as start"),
    ({"phase": {"phases": {1: {}}}}, "phase.phases: the name 1 must be text"),
    ({"backbone": {"precision": "int4"}}, "backbone.precision is int4; allowed: float32, bfloat16, float16, int8, nf4; "
     "did you mean nf4?"),
    ({"moe": {"router_dtype": "float16"}}, "moe.router_dtype is float16; allowed: float32, bfloat16"),
    ({"moe": {"scale": "half"}}, "moe.scale is half; allowed: sum_to_one, unit, raw, null"),
    ({"data": {"batchsize": 3}}, "data.batchsize: no such key; did you mean batch_size?"),
    ({"data": {"path": "???"}}, "data.path is required"),
    ({"data": {"columns": {"prompt": None}}}, "data.columns.prompt is null, must be text"),
    ({"data": {"columns": {"prompt": ["q"]}}}, "data.columns.prompt is [q], must be text"),
    ({"data": {"sources": {"a": {"path": "x", "columns": {"text": None}}}}}, "data.sources.a.columns.text is null"),
    ({"name": "${injection.nosuch}"}, "name is ${injection.nosuch}, which cannot be resolved"),
    ({"name": "${name}"}, "name is ${name}, which cannot be resolved"),
    ({"optim": {"lr": "9" * 5000}}, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[str(said) for _, said in WRONG])
def test_a_value_of_the_wrong_kind_is_one_problem_that_names_its_key(given, said):
    _, reading = read_section(RunConfig, OmegaConf.create(given))
    if said is None:  # a number without end is none that float can hold, which is said with the other sizes
        assert reading.problems == []
        return
    (problem,) = reading.problems
    assert problem.startswith(said)


def test_all_problems_of_all_sections_come_at_once():
    given = {"optim": {"lr": "abc", "lrr": 1}, "moe": {"router": "topk"}, "injection": [], "sed": 3}
    config, reading = read_section(RunConfig, given)
    assert len(reading.problems) == 5
    assert (config.optim.lr, config.injection.lora_r) == (RunConfig().optim.lr, RunConfig().injection.lora_r)


def test_a_value_may_be_written_as_omegaconf_takes_it():
    given = {
        "seed": "7",
        "optim": {"lr": "1e-5", "eps": 1},
        "phase": {"phases": {"a": {"start": 0, "trainable": ["lora", Role.router]}}},
        "injection": {"use_rslora": "yes", "attn_lora": {"enabled": 0}},
        "backbone": {"precision": "nf4"},
        "name": 3,
    }
    ours, reading = read_section(RunConfig, given)
    assert reading.problems == []
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), given))
    assert ours == typed
    assert ours.backbone.precision is BackbonePrecision.nf4
    assert type(ours.optim.eps) is float


def test_a_problem_that_comes_of_a_refused_value_is_left_out_and_others_stay():
    problems = ["a.b is beyond a.c=3", "a.bc is 3", "x.a.b is 3", "a.c is 1, more than a.b[0]"]
    assert independent(problems, ["a.b"]) == ["a.bc is 3", "x.a.b is 3"]


def test_a_required_key_of_a_pretraining_is_named():
    _, reading = read_section(PretrainConfig, OmegaConf.create({"corpus": {"path": "???"}, "model": {"vocab": 3}}))
    assert reading.problems == ["corpus.path is required", "model.vocab: no such key; did you mean vocab_size?"]


def test_a_name_in_a_mapping_may_be_written_as_a_number():
    config, reading = read_section(RunConfig, {"data": {"columns": {"prompt": 5}}})
    assert (reading.problems, config.data.columns) == ([], {"prompt": "5"})
