"""`lmoe`: one thin file a verb."""

import sys
from typing import Annotated

import typer

from lmoe.cli.export import ExportFormat
from lmoe.schema.evaluate import MAX_NEW_TOKENS, Prompts

app = typer.Typer(
    name="lmoe",
    help="Fine-tune a language model with a mixture of LoRA experts, and see what its routers do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMPOSED = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=COMPOSED, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a mixture: key=value …, composed by Hydra (lmoe train --help lists the groups)."""
    from lmoe.cli.train import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=COMPOSED, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Pre-train a small base from scratch: key=value …, composed by Hydra."""
    from lmoe.cli.pretrain import main as run

    raise typer.Exit(run(context.args))


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Option(help="Run directory or adapter directory.")],
    prompt: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the prompt; - reads standard input.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Backbone to use instead of the one the adapter names.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Domain of the prompt, for moe.router=oracle.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Write text with a trained mixture."""
    from lmoe.cli.generate import run

    raise typer.Exit(
        run(
            checkpoint,
            prompt=prompt,
            prompt_file=prompt_file,
            base_model=base_model,
            domain=domain,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    )


@app.command()
def prepare(
    data: Annotated[str, typer.Option(help="JSONL file, folder of them, hub data set, or bundled.")] = "bundled",
    model: Annotated[
        str, typer.Option(help="Hub name, local directory, or tiny: whose tokenizer and template.")
    ] = "tiny",
    val: Annotated[str | None, typer.Option(help="Validation rows; without: a seeded share of the data.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row, in tokens.")] = 512,
    packing: Annotated[bool, typer.Option(help="Also pack, and say how full the sequences are.")] = False,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Folder of tokenised rows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Tokenise rows into the cache, and say what they hold and what was dropped."""
    from lmoe.cli.prepare import run

    raise typer.Exit(
        run(
            data,
            model=model,
            val=val,
            max_length=max_length,
            packing=packing,
            chat_template=chat_template,
            cache_dir=cache_dir,
            seed=seed,
        )
    )


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="Run directory or adapter directory.")],
    data: Annotated[
        str | None,
        typer.Option(help="Rows for losses and samples: JSONL file, folder, bundled, or none; without: the run's own."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="Multiple-choice questions: JSONL file, folder of them, or bundled.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Prompts of each domain to answer.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a sample, in tokens.")] = MAX_NEW_TOKENS,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the LM evaluation harness, separated by commas (lmoe[eval]).")
    ] = None,
    task_path: Annotated[str | None, typer.Option(help="Folder with more tasks for the harness, as YAML.")] = None,
    prompts: Annotated[
        Prompts, typer.Option(help="auto: choices by the chat template where there is one, tasks as bare text.")
    ] = Prompts.auto,
    domain: Annotated[
        str | None, typer.Option(help="Domain of all questions and tasks, for moe.router=oracle.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Backbone to use instead of the one the adapter names.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each domain and task, the first ones; without: all.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest row, in tokens; without: the run's, or 512.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the few-shot examples of tasks.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; without: a GPU where there is one.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the results; without: evaluation/ of the run or adapter.")
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also as a W&B run with tables.")] = False,
) -> None:
    """Measure a trained mixture beside its base: losses, multiple choice, samples, benchmarks."""
    from lmoe.cli.evaluate import run

    settings = {
        "checkpoint": checkpoint,
        "base_model": base_model,
        "data": data,
        "choices": choices,
        "prompts": prompts,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "task_path": task_path,
        "domain": domain,
        "batch_size": batch_size,
        "max_length": max_length,
        "chat_template": chat_template,
        "seed": seed,
        "device": device,
    }
    raise typer.Exit(run(settings, tasks=tasks, limit=limit, output=output, wandb=wandb))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Option(help="Run directory or adapter directory.")],
    output: Annotated[str, typer.Option(help="Directory to write; must not exist, or be empty.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="peft: one PEFT adapter, of dense_lora or native_moe_expert_lora; peft-experts: one for each expert "
            "of mixture_lora; merged: a Hugging Face model; lmoe: an adapter without --without-expert."
        ),
    ] = ExportFormat.peft,
    base_model: Annotated[
        str | None, typer.Option(help="Backbone to use instead of the one the adapter names.")
    ] = None,
    without_expert: Annotated[
        str | None, typer.Option(help="lmoe: number or name of the expert of mixture_lora to leave out.")
    ] = None,
    average_experts: Annotated[
        bool, typer.Option("--average-experts", help="merged: the average of the experts, without routing.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="merged: validation rows to measure the loss on, before and after.")
    ] = None,
) -> None:
    """Write a trained run in a format that other tools read."""
    from lmoe.cli.export import run

    raise typer.Exit(
        run(
            checkpoint,
            output=output,
            format=format,
            base_model=base_model,
            without_expert=without_expert,
            average_experts=average_experts,
            data=data,
        )
    )


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Option(help="Run or checkpoint directory of EulerForge (mixture_lora).")],
    output: Annotated[str, typer.Option(help="Directory to write; must not exist, or be empty.")],
    base_model: Annotated[
        str | None, typer.Option(help="Backbone to use instead of the one the checkpoint names.")
    ] = None,
) -> None:
    """Make an adapter of a mixture that EulerForge has trained."""
    from lmoe.cli.convert import run

    raise typer.Exit(run(checkpoint, output=output, base_model=base_model))


def main() -> None:
    """Entry point of the `lmoe` command."""
    app(prog_name="lmoe", args=sys.argv[1:])
