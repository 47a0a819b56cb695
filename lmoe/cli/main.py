"""`lmoe`: one thin file a verb."""

import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lmoe import __version__
from lmoe.cli.evaluate import EvaluateFlags
from lmoe.cli.flag_groups import flags_as_options
from lmoe.cli.options import (
    BaseModel,
    Checkpoint,
    Device,
    Experts,
    Model,
    Precision,
    Revision,
    TrustRemoteCode,
    Weights,
)
from lmoe.cli.prepare import PrepareFlags
from lmoe.cli.server_flags import PlayFlags, ServeFlags, given, given_settings
from lmoe.cli.speak import SamplingFlags, SpeakerFlags
from lmoe.cli.threads import prepare_threads
from lmoe.vocabulary import ExportFormat, GgufType

if TYPE_CHECKING:
    from lmoe.cli.explain import ExplainFlags
    from lmoe.cli.export import ExportFlags

Flags = TypeVar("Flags", "SpeakerFlags", "ExplainFlags", "ExportFlags")

app = typer.Typer(
    name="lmoe",
    help="Fine-tune a language model with a mixture of LoRA experts, and see what its routers do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lmoe {__version__}")
        raise typer.Exit


@app.callback()
def lmoe(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune a language model with a mixture of LoRA experts, and see what its routers do."""


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


@app.command(context_settings=COMPOSED, add_help_option=False)
def study(context: typer.Context) -> None:
    """Compare ways of fine-tuning: study=NAME key=value …, tuned alike, judged on rows of their own."""
    from lmoe.cli.study import main as run

    raise typer.Exit(run(context.args))


@app.command()
@flags_as_options
def generate(
    *,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    prompt: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the prompt; - reads standard input.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows whose prompts are answered in batches: JSONL file, or a folder of them.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="With --rows: JSONL file to write, one line a row.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --rows: prompts in a batch; without: 8.")] = None,
    speaks: SpeakerFlags,
    sampling: SamplingFlags,
) -> None:
    """Write text with a trained mixture, or with a base and experts blended over it."""
    from lmoe.cli.generate import run, run_rows

    if rows is None and output is None and batch_size is None:
        raise typer.Exit(run(speaks, asdict(sampling), prompt=prompt, prompt_file=prompt_file))
    prompts = {"--prompt": prompt, "--prompt-file": prompt_file}
    raise typer.Exit(run_rows(speaks, asdict(sampling), prompts, rows=rows, output=output, batch_size=batch_size))


@app.command()
@flags_as_options
def chat(speaks: SpeakerFlags, sampling: SamplingFlags) -> None:
    """Talk to a trained mixture or a blend; /weights code=0.7 chat=0.3 turns the knobs in between."""
    from lmoe.cli.chat import run

    raise typer.Exit(run(speaks, asdict(sampling)))


@app.command()
@flags_as_options
def serve(speaks: SpeakerFlags, server: ServeFlags) -> None:
    """Serve a trained mixture, or a base with experts, as OpenAI's API does; each request may name its own mixture.

    Keys come from the environment: LMOE_API_KEY, and LMOE_ADMIN_TOKEN to change experts; or from files that
    LMOE_API_KEY_FILE and LMOE_ADMIN_TOKEN_FILE name.
    """
    from lmoe.cli.serve import run

    raise typer.Exit(run(given(speaks), given_settings(server), config=server.config))


@app.command()
@flags_as_options
def play(speaks: SpeakerFlags, server: PlayFlags) -> None:
    """Try a trained mixture, or a base with experts, in your browser: a page on this machine, with a slider an expert.

    The page asks the server of lmoe serve, under a key that is made anew at each start, or under LMOE_API_KEY and
    LMOE_ADMIN_TOKEN where they are set.
    """
    from lmoe.cli.play import run

    raise typer.Exit(run(given(speaks), given_settings(server), config=server.config, browser=server.browser))


@app.command()
def watch(
    checkpoint: Annotated[str, typer.Option(help="Run directory, of a run that trains or has ended.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen at; 127.0.0.1: this machine alone.")] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Say the address, and open no browser.")] = False,
) -> None:
    """Show the page of a run in the browser while it trains, live from its files."""
    from lmoe.cli.watch import run

    raise typer.Exit(run(checkpoint, host=host, port=port, browser=not no_browser))


def _flags(kind: type[Flags], context: typer.Context) -> Flags:
    """A dataclass of flags, of which the command declares some or all."""
    declared = (field.name for field in fields(kind) if field.name in context.params)
    return kind(**{name: context.params[name] for name in declared})


@app.command()
def explain(
    context: typer.Context,
    output: Annotated[str, typer.Option(help="Page (.html) to write; the same as JSON is written beside it.")],
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    prompt: Annotated[str | None, typer.Option(help="What the user says; the model's answer is explained too.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows to explain with their own answers: JSONL file, or a folder of them.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Validation rows of the run of this domain; with --rows those of it; with --prompt its domain, for "
            "moe.router=oracle."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="Longest answer to --prompt, in tokens; without: 32.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to explain, the first ones; without: 3.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, max=4096, help="Longest text: a longer prompt is refused, a longer row cut.")
    ] = 1024,
    profile_rows: Annotated[
        int | None,
        typer.Option(min=0, help="Validation rows of each domain that experts are shown by; 0: none; without: 4."),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another run, on the same tokens.")] = None,
    compare_weights: Annotated[
        str | None, typer.Option(help="Other weights of the blend, on the same tokens; as --weights.")
    ] = None,
    base_model: BaseModel = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    router: Annotated[str | None, typer.Option(help="weighted or static.")] = None,
    precision: Precision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what each expert does to a text: its routing, and what is lost without each expert, token by token."""
    from lmoe.cli.explain import ExplainFlags, run

    raise typer.Exit(run(_flags(SpeakerFlags, context), _flags(ExplainFlags, context)))


@app.command()
@flags_as_options
def prepare(flags: PrepareFlags) -> None:
    """Tokenise rows into the cache, say what they hold and what was dropped, and show what is learnt."""
    from lmoe.cli.prepare import run

    raise typer.Exit(run(flags))


@app.command()
@flags_as_options
def evaluate(flags: EvaluateFlags) -> None:
    """Measure a trained mixture beside its base (losses, choices, samples, benchmarks), or what was exported of it."""
    from lmoe.cli.evaluate import run

    raise typer.Exit(run(flags))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run directories; the first is the baseline.", metavar="RUN RUN …")],
    baseline: Annotated[str | None, typer.Option(help="Which of the runs the others are compared with.")] = None,
    names: Annotated[str | None, typer.Option(help="Names of the arms, a,b, in the order of their first runs.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="judge: rows that the runs keep for judging; val: their validation rows; or a file or folder. "
            "Without: judge where there are such rows, else val."
        ),
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Domains whose rows count, a,b; without: all.")] = None,
    by_domain: Annotated[bool, typer.Option("--by-domain", help="Show each domain too.")] = False,
    margin: Annotated[float, typer.Option(help="Arms are equivalent within it, in nats a token.")] = 0.01,
    alpha: Annotated[float, typer.Option(help="Of each family of comparisons.")] = 0.05,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also runs that have not finished.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16,
    device: Device = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of compare.json and compare.csv; without: none is written.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare runs that exist on rows that they have not learnt: differences, how sure they are, verdicts."""
    from lmoe.cli.compare import run

    settings = {
        "baseline": baseline,
        "data": data,
        "margin": margin,
        "alpha": alpha,
        "unfinished": unfinished,
        "batch_size": batch_size,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    raise typer.Exit(run(runs, settings, names=names, domains=domains, by_domain=by_domain, output=output))


@app.command()
def export(
    context: typer.Context,
    output: Annotated[
        str,
        typer.Option(help="Directory to write; must not exist, or be empty. gguf, gguf-lora: a file NAME.gguf."),
    ],
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="peft: one PEFT adapter, of dense_lora, native_moe_expert_lora or a blend; peft-experts: one for each "
            "expert of mixture_lora; merged: a Hugging Face model; native-moe: moe_expert_lora or native experts as a "
            "mixture of Transformers' own; lmoe: an adapter less one expert, --without-expert; gguf: the Hugging Face "
            "model that --model names, for llama.cpp; gguf-lora: a LoRA for its --lora, of dense_lora, a PEFT adapter "
            "or a blend."
        ),
    ] = ExportFormat.peft,
    base_model: BaseModel = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of --model: float32, bfloat16, float16, int8 or nf4; native-moe: float32, bfloat16 or float16 to "
            "write, without: as the base is held."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="peft, gguf-lora of a blend, per-domain, prompt-router: the nearest adapter of this rank; without: "
            "all experts side by side.",
        ),
    ] = None,
    gguf_type: Annotated[
        GgufType | None, typer.Option(help="gguf, gguf-lora: type of the numbers; without: f16, of a LoRA f32.")
    ] = None,
    without_expert: Annotated[
        str | None, typer.Option(help="lmoe: number or name of the expert of mixture_lora to leave out.")
    ] = None,
    average_experts: Annotated[
        bool, typer.Option("--average-experts", help="merged: the average of the experts, without routing.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="merged, per-domain, prompt-router: rows to measure the loss on, before and after, or none; without: "
            "the run's own (merged: of an average)."
        ),
    ] = None,
) -> None:
    """Write a trained run, experts blended over a base, or a model, in a format that other tools read."""
    from lmoe.cli.export import ExportFlags, run

    raise typer.Exit(run(_flags(SpeakerFlags, context), _flags(ExportFlags, context)))


@app.command()
def push(
    checkpoint: Annotated[str, typer.Option(help="Run directory, adapter directory, or a folder that was exported.")],
    name: Annotated[str, typer.Option(help="user/name on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to read; without: private.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List what would go, and show its card; needs no network and no token. To who is signed in it says "
            "too which files of an earlier push would be taken away.",
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made where it is missing.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Name on the hub of the base, where it was trained on a local folder.")
    ] = None,
) -> None:
    """Share an adapter or an exported model on the Hugging Face hub, with a card; the token comes from HF_TOKEN or
    `hf auth login`."""
    from lmoe.cli.push import run

    settings = {
        "checkpoint": checkpoint,
        "name": name,
        "public": public,
        "revision": revision,
        "message": message,
        "base_model": base_model,
    }
    raise typer.Exit(run(settings, dry_run=dry_run))


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Option(help="Run or checkpoint directory of EulerForge (mixture_lora).")],
    output: Annotated[str, typer.Option(help="Directory to write; must not exist, or be empty.")],
    base_model: Annotated[
        str | None, typer.Option(help="Backbone to use instead of the one the checkpoint names.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make an adapter of a mixture that EulerForge has trained."""
    from lmoe.cli.convert import run

    raise typer.Exit(run(checkpoint, output=output, base_model=base_model, trust_remote_code=trust_remote_code))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is installed, what the machine has, and whether anything that lmoe needs is broken; for reports."""
    from lmoe.cli.doctor import run

    raise typer.Exit(run(as_json=json))


def main() -> None:
    """Entry point of the `lmoe` command."""
    prepare_threads()
    app(prog_name="lmoe", args=sys.argv[1:])
