"""`lmoe`: one thin file a verb."""

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmoe import __version__
from lmoe.cli.threads import prepare_threads
from lmoe.config.evaluate import MAX_NEW_TOKENS
from lmoe.vocabulary import ExportFormat, GgufType, OnBadRow, Prompts, TaskName, TrainOn

if TYPE_CHECKING:
    from lmoe.cli.speak import SpeakerFlags

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


BASE = "hub name, local directory, folder/file.gguf, tiny, or smollm2_q4"
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


CHECKPOINT = "Run directory, adapter directory, or user/name of an adapter on the hub."
Checkpoint = Annotated[str | None, typer.Option(help=CHECKPOINT)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a --checkpoint on the hub.")]
BaseModel = Annotated[str | None, typer.Option(help="Backbone to use instead of the one the adapter names.")]
Domain = Annotated[str | None, typer.Option(help="Domain of all prompts, for moe.router=oracle.")]
Model = Annotated[str | None, typer.Option(help=f"Base to blend experts over: {BASE}.")]
Experts = Annotated[str | None, typer.Option(help="code=DIR,chat=DIR: PEFT adapters, or runs of dense_lora.")]
Weights = Annotated[str | None, typer.Option(help="0.7,0.3 in the order of --experts, or code=0.7,chat=0.3.")]
Router = Annotated[str | None, typer.Option(help="weighted, static, encoder (by the prompt) or arrow (by the token).")]
ExpertsTopK = Annotated[int | None, typer.Option(min=1, help="Experts that encoder and arrow choose.")]
RouterTemperature = Annotated[float | None, typer.Option(min=0.0, help="Of the choice of encoder and arrow.")]
Fit = Annotated[str | None, typer.Option(help="code=ROWS,…: prompts that tell encoder what an expert is for; kept.")]
Head = Annotated[
    str | None, typer.Option(help="For encoder: the trained router beside exported experts, by its folder.")
]
Precision = Annotated[str | None, typer.Option(help="Of --model: float32, bfloat16, float16, int8 or nf4.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; without: a GPU where there is one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that comes with the base, or beside the tokenizer.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0: from all.")]
Penalty = Annotated[float, typer.Option(min=0.1, help="Above 1: tokens that were there before become less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


@app.command()
def generate(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    prompt: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the prompt; - reads standard input.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows whose prompts are answered in batches: JSONL file, or a folder of them.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="With --rows: JSONL file to write, one line a row.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --rows: prompts in a batch; without: 8.")] = None,
    base_model: BaseModel = None,
    domain: Domain = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    router: Router = None,
    experts_top_k: ExpertsTopK = None,
    router_temperature: RouterTemperature = None,
    fit: Fit = None,
    head: Head = None,
    precision: Precision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
) -> None:
    """Write text with a trained mixture, or with a base and experts blended over it."""
    from lmoe.cli.generate import run, run_rows

    flags, sampling = _flags(context.params), _sampling(context.params)
    if rows is None and output is None and batch_size is None:
        raise typer.Exit(run(flags, sampling, prompt=prompt, prompt_file=prompt_file))
    prompts = {"--prompt": prompt, "--prompt-file": prompt_file}
    raise typer.Exit(run_rows(flags, sampling, prompts, rows=rows, output=output, batch_size=batch_size))


@app.command()
def chat(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    base_model: BaseModel = None,
    domain: Domain = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    router: Router = None,
    experts_top_k: ExpertsTopK = None,
    router_temperature: RouterTemperature = None,
    fit: Fit = None,
    head: Head = None,
    precision: Precision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a trained mixture or a blend; /weights code=0.7 chat=0.3 turns the knobs in between."""
    from lmoe.cli.chat import run

    raise typer.Exit(run(_flags(context.params), _sampling(context.params)))


Settings = Annotated[
    str | None, typer.Option("--config", help="YAML file with these settings, as max_queue: 8; flags win over it.")
]
Host = Annotated[str | None, typer.Option(help="Address to listen at; without: 127.0.0.1, this machine.")]
Name = Annotated[str | None, typer.Option(help="What clients call the model; without: lmoe.")]
CacheTokens = Annotated[int | None, typer.Option(help="Tokens that the KV cache holds; without: what fits.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, whatever is asked; without: 2048.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a request may take; without: 600.")]
Room = Annotated[int | None, typer.Option(help="Ranks kept free for experts that come later; without: 32.")]


@app.command()
def serve(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    base_model: BaseModel = None,
    domain: Domain = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    router: Router = None,
    experts_top_k: ExpertsTopK = None,
    router_temperature: RouterTemperature = None,
    fit: Fit = None,
    head: Head = None,
    precision: Precision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    config: Settings = None,
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 0: any free one; without: 8000.")] = None,
    name: Name = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens in one forward; without: 512.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Answers in a batch; without: 16.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Answers that wait; more are refused; without: 64.")] = None,
    cache_tokens: CacheTokens = None,
    max_tokens: MaxTokens = None,
    max_n: Annotated[int | None, typer.Option(help="Answers to one request; without: 8.")] = None,
    request_size: Annotated[int | None, typer.Option(help="Bytes of a request's body; without: 4000000.")] = None,
    upload_size: Annotated[
        int | None, typer.Option(help="Bytes of an expert that is uploaded; without: 0, none is taken.")
    ] = None,
    timeout: Timeout = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds that requests have to end when the server stops; without: 30.")
    ] = None,
    warm_up: Annotated[
        bool | None,
        typer.Option("--warm-up/--no-warm-up", help="Answer once before it says that it is ready; without: yes."),
    ] = None,
    log_file: Annotated[str | None, typer.Option(help="File of the request log; without: standard error.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask from a browser, https://example.org; repeatable.")
    ] = None,
    room: Room = None,
) -> None:
    """Serve a trained mixture, or a base with experts, as OpenAI's API does; each request may name its own mixture.

    Keys come from the environment: LMOE_API_KEY, and LMOE_ADMIN_TOKEN to change experts; or from files that
    LMOE_API_KEY_FILE and LMOE_ADMIN_TOKEN_FILE name.
    """
    from lmoe.cli.serve import run

    flags, settings = _server_flags(context.params)
    raise typer.Exit(run(flags, settings, config=config))


@app.command()
def play(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    base_model: BaseModel = None,
    domain: Domain = None,
    model: Model = None,
    experts: Experts = None,
    weights: Weights = None,
    router: Router = None,
    experts_top_k: ExpertsTopK = None,
    router_temperature: RouterTemperature = None,
    fit: Fit = None,
    head: Head = None,
    precision: Precision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    config: Settings = None,
    host: Host = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the page; 0: any free one; without: 8765, where taken any free one.")
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in your browser, or only say where it is.")
    ] = True,
    name: Name = None,
    cache_tokens: CacheTokens = None,
    max_tokens: MaxTokens = None,
    upload_size: Annotated[
        int | None, typer.Option(help="Bytes of an expert that is uploaded; 0: none is taken; without: 200000000.")
    ] = None,
    timeout: Timeout = None,
    log_file: Annotated[str | None, typer.Option(help="File of the request log; without: there is none.")] = None,
    room: Room = None,
) -> None:
    """Try a trained mixture, or a base with experts, in your browser: a page on this machine, with a slider an expert.

    The page asks the server of lmoe serve, under a key that is made anew at each start, or under LMOE_API_KEY and
    LMOE_ADMIN_TOKEN where they are set.
    """
    from lmoe.cli.play import run

    flags, settings = _server_flags(context.params)
    raise typer.Exit(run(flags, settings, config=config, browser=browser))


def _server_flags(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given of the flags that say which model speaks, and of the settings of a server."""
    from lmoe.cli.speak import SpeakerFlags
    from lmoe.serve.settings import ServeSettings

    given = {key: value for key, value in params.items() if value is not None}
    if not given["trust_remote_code"]:  # a file may say so
        del given["trust_remote_code"]
    if origins := given.pop("allow_origin", None):
        given["allow_origin"] = tuple(origins)
    speaks, settings = (
        {field.name: given[field.name] for field in fields(kind) if field.name in given}
        for kind in (SpeakerFlags, ServeSettings)
    )
    return speaks, settings


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

    asked = ExplainFlags(**{field.name: context.params[field.name] for field in fields(ExplainFlags)})
    raise typer.Exit(run(_flags(context.params), asked))


def _flags(given: dict[str, Any]) -> "SpeakerFlags":
    """The flags that say which model speaks."""
    from lmoe.cli.speak import SpeakerFlags

    return SpeakerFlags(**{field.name: given[field.name] for field in fields(SpeakerFlags) if field.name in given})


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that say how tokens are chosen."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return {name: given[name] for name in names}


@app.command()
def prepare(
    data: Annotated[
        str, typer.Option(help="File of rows, folder, data set of the hub, bundled or bundled_preference.")
    ] = "bundled",
    model: Annotated[str, typer.Option(help=f"Whose tokenizer and template: {BASE}.")] = "tiny",
    val: Annotated[str | None, typer.Option(help="Validation rows; without: a seeded share of the data.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row, in tokens.")] = 512,
    packing: Annotated[
        bool | None,
        typer.Option(help="Pack, and say how full the sequences are; left out: where the backbone keeps rows apart."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="What the rows call our keys: prompt=question,response=answer.")
    ] = None,
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Rows that cannot be used: end, naming the first five, or leave them out.")
    ] = OnBadRow.error,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    template_kwargs: Annotated[
        str | None, typer.Option(help='Variables of the template as JSON: {"enable_thinking": false}.')
    ] = None,
    template_date: Annotated[
        str | None, typer.Option(help="Day (YYYY-MM-DD) that a template is told which reads the date.")
    ] = None,
    train_on: Annotated[TrainOn, typer.Option(help="Turns that are learnt.")] = TrainOn.assistant,
    task: Annotated[
        TaskName, typer.Option(help="Objective that the rows are for: dpo, orpo and simpo learn from pairs of answers.")
    ] = TaskName.sft,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Folder of tokenised rows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    show: Annotated[
        int | None,
        typer.Option(min=1, help="Also show the first so many training rows of each domain, and what is learnt."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Page (.html) for the rows of --show; without: they are printed.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tokenise rows into the cache, say what they hold and what was dropped, and show what is learnt."""
    from lmoe.cli.prepare import run

    raise typer.Exit(
        run(
            data,
            model=model,
            val=val,
            max_length=max_length,
            packing=packing,
            columns=columns,
            on_bad_row=on_bad_row,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            template_date=template_date,
            train_on=train_on,
            task=task,
            num_proc=num_proc,
            cache_dir=cache_dir,
            seed=seed,
            show=show,
            output=output,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command()
def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Run directory or adapter directory; beside --model, its run, where its folder does not say."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model that was exported (native-moe, merged): losses, beside those of its run."),
    ] = None,
    revision: Revision = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows for losses and samples: JSONL file, folder, bundled, bundled_preference, judge (those that the "
            "run keeps for judging), or none; without: the run's own validation rows."
        ),
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(
            help="Objective to measure rows by; without: the run's, or else dpo of pairs and sft of all others."
        ),
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
    device: Device = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the results; without: evaluation/ of the run, adapter or model.")
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also as a W&B run with tables.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a trained mixture beside its base (losses, choices, samples, benchmarks), or what was exported of it."""
    from lmoe.cli.evaluate import run

    settings = {
        "checkpoint": checkpoint,
        "model": model,
        "base_model": base_model,
        "trust_remote_code": trust_remote_code,
        "data": data,
        "task": task,
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
    raise typer.Exit(run(settings, revision=revision, tasks=tasks, limit=limit, output=output, wandb=wandb))


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

    wanted = ExportFlags(**{field.name: context.params[field.name] for field in fields(ExportFlags)})
    raise typer.Exit(run(_flags(context.params), wanted))


@app.command()
def push(
    checkpoint: Annotated[str, typer.Option(help="Run directory, adapter directory, or a folder that was exported.")],
    name: Annotated[str, typer.Option(help="user/name on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to read; without: private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go, and show its card; needs no network and no token.")
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
