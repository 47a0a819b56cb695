"""Options that several verbs have: their types and their help."""

from typing import Annotated

import typer

BASE = "hub name, local directory, folder/file.gguf, tiny, or smollm2_q4"

Checkpoint = Annotated[
    str | None, typer.Option(help="Run directory, adapter directory, or user/name of an adapter on the hub.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a --checkpoint on the hub.")]
BaseModel = Annotated[str | None, typer.Option(help="Backbone to use instead of the one the adapter names.")]
Model = Annotated[str | None, typer.Option(help=f"Base to blend experts over: {BASE}.")]
Experts = Annotated[str | None, typer.Option(help="code=DIR,chat=DIR: PEFT adapters, or runs of dense_lora.")]
Weights = Annotated[str | None, typer.Option(help="0.7,0.3 in the order of --experts, or code=0.7,chat=0.3.")]
RouterTemperature = Annotated[float | None, typer.Option(min=0.0, help="Of the choice of encoder and arrow.")]
Precision = Annotated[str | None, typer.Option(help="Of --model: float32, bfloat16, float16, int8 or nf4.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; auto: layers over all GPUs; without: a GPU where there is one.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that comes with the base, or beside the tokenizer.")
]
