"""`lmoe generate`: a prompt in, text out, with a KV cache."""

import sys
from contextlib import nullcontext
from pathlib import Path

from lmoe.cli.errors import told
from lmoe.errors import ConfigError


def run(
    checkpoint: str,
    *,
    prompt: str | None,
    prompt_file: str | None,
    base_model: str | None,
    domain: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> int:
    """Returns the exit code."""

    def action() -> None:
        text = read_prompt(prompt, prompt_file)
        from lmoe.build.announce import quiet_libraries
        from lmoe.inference.generate import stream_answer
        from lmoe.inference.load import load
        from lmoe.injection.tracing import domain as of_domain

        quiet_libraries()
        model, tokenizer = load(checkpoint, base_model=base_model)
        with nullcontext() if domain is None else of_domain(model, domain):
            stream_answer(
                model,
                tokenizer,
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                write=lambda piece: (sys.stdout.write(piece), sys.stdout.flush()),
            )
        sys.stdout.write("\n")

    return told(action)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from --prompt, --prompt-file or standard input.

    Raises:
        ConfigError: both given, none given, unreadable, or empty.
    """
    if prompt is not None and prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input")
    text = prompt if prompt is not None else _read(prompt_file)
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _read(prompt_file: str | None) -> str:
    try:
        if prompt_file in (None, "-"):
            return sys.stdin.read()
        return Path(prompt_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {prompt_file}: cannot be read: {error}") from None
