"""`dry_run=estimate`: say what a run would take, from the backbone's config alone."""

from rich.console import Console

from lmoe.config.run import RunConfig
from lmoe.estimate.cost import UTILISATION, rates, rough_duration
from lmoe.estimate.estimate import Estimate, estimate, largest_lesson, lessons_of
from lmoe.objectives.objective import objective_of
from lmoe.report.say import say
from lmoe.rules.routers import reads_prompts_first
from lmoe.run.announce import quiet_libraries
from lmoe.vocabulary import Strategy


def announce_estimate(config: RunConfig, console: Console) -> Estimate:
    """Estimate and print.

    Raises:
        LmoeError: no config of a backbone there, or no place for what is to be injected.
    """
    quiet_libraries()
    found = estimate(config)
    for line in [str(found.plan), *lines(config, found)]:
        say(console, line)
    return found


def lines(config: RunConfig, found: Estimate) -> list[str]:
    """Memory of a device, then time on known ones."""
    trainer, lesson = config.trainer, largest_lesson(lessons_of(config))
    data, each_row = lesson.data, objective_of(lesson.task).sequences
    processes, devices = trainer.processes, trainer.devices * trainer.num_nodes
    shared = trainer.strategy in (Strategy.fsdp2, Strategy.device_map) and devices > 1
    each = "its share of the weights" if shared else "all weights"
    two = "" if each_row == 1 else f" ({each_row} sequences each)"
    said = [
        f"estimate from the config of {config.backbone.full_name}, without its weights and without data",
        f"  {devices} device{'s' * (devices > 1)}, {each} on each; a micro-batch of {data.batch_size} rows{two} of "
        f"{data.max_length} tokens, {trainer.accumulate_grad_batches} in a step: "
        f"{data.batch_size * trainer.accumulate_grad_batches * processes:,} rows in a step over all devices",
        "memory of each device (peak of training, without the libraries' own)",
    ]
    memory = found.memory
    parts = [(name, getattr(memory, name)) for name in memory.PARTS]
    said += [f"  {name:<12}{value:>12,.1f} MB" for name, value in parts if value]
    said.append(f"  {'total':<12}{memory.total:>12,.1f} MB")
    said += _loading(config, found)
    flops = found.cost.flops_per_token() * found.tokens
    said.append(
        f"time of {flops / 1e12:,.3g} TFLOP a step and device, at {UTILISATION:.0%} of the peak; communication, data "
        "and validation not counted"
    )
    said += _reading(config, found)
    for name, rate in rates(trainer.precision).items():
        step = found.cost.step_seconds(found.tokens, rate)
        line = f"  {name:<12}{rough_duration(step):>10} a step"
        if trainer.max_epochs is None:
            line += f" {rough_duration(step * trainer.max_steps):>12} for {trainer.max_steps:,} steps"
        said.append(line)
    return said


def _loading(config: RunConfig, found: Estimate) -> list[str]:
    """What loading takes of a machine's RAM, which may be less than its GPUs have."""
    loop, each = config.trainer, found.host.base + found.memory.adapters
    here = loop.processes // loop.num_nodes
    several = "" if here == 1 else f" of each of {here} processes, {here * each:,.1f} MB on a machine"
    why = "" if found.host.whole is None else f"; each reads the whole base first: {found.host.whole}"
    return [f"RAM while the base is loaded: {each:,.1f} MB{several}{why}"]


def _reading(config: RunConfig, found: Estimate) -> list[str]:
    """What a router of the whole model costs beside that."""
    if not reads_prompts_first(config.moe):
        return []
    share = found.cost.reading_flops_per_token() / found.cost.flops_per_token()
    answer = (
        "an answer costs a second forward of its prompt (moe.prompt_experts=true)"
        if config.moe.prompt_experts
        else "an answer costs no more than without (moe.prompt_experts=false)"
    )
    return [
        f"  not counted: the router reads the prompts first, without gradients: {share:.0%} of that, were all tokens "
        f"prompts; {answer}"
    ]
