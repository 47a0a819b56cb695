"""Do exported models answer alike where nobody of us wrote the engine: `make engines`.

Small models of every architecture that is written as GGUF, and LoRA adapters over three of them, run in llama.cpp
(node-llama-cpp, installed into the user's cache the first time). In float32 its greedy tokens must be those of
Transformers, and the same text must give the same ids. Of float16 the share of tokens that agree is said.
Where Node is missing, or the package cannot be had, all of it is skipped with the reason, and that is no failure.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.engines.llama_cpp import PACKAGE, VERSION, Answer, LlamaCpp, Prompt, Unavailable, llama_cpp
from benchmarks.engines.models import MODELS, WITH_LORA, save_lora, save_model
from benchmarks.flags import RESULTS, positive
from benchmarks.machine import facts
from lmoe.export.gguf.lora import write_gguf_lora
from lmoe.export.gguf.model import write_gguf
from lmoe.files.resources import resource_dir
from lmoe.run.announce import quiet_libraries
from lmoe.vocabulary import GgufType

TEXTS = (
    "In 1998 there were 1,234,567 people; don't ask me why, it's 3.14159!",
    "def f(x):\n\treturn x**2  # square\n\n\nprint(f(3))",
    "Grüße aus Köln: naïve café, Ελλάδα, Москва, 日本語のテキスト, العربية ٣٤",
    "  leading spaces,   runs   of spaces   \n \n  and trailing ones   ",
    "👍🏽 emoji and ½ ² Ⅷ, non-breaking\u00a0space, SHOUTING'S I'LL WE'VE",
    "<|im_start|>user\nA turn written by hand<|im_end|>\n<|im_start|>assistant\n",
)
LONGEST = 400
"""Characters of a question."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One file in the engine.

    Args:
        name: of the model.
        kind: of its numbers.
        prompts: how many were put.
        same_ids: prompts whose text has the same ids.
        same_answers: prompts with the same greedy tokens to the end.
        agreeing: share of tokens before the first that differs.
        tokens: of Transformers, in all.
        seconds: of the engine, with loading.
    """

    name: str
    kind: str
    prompts: int
    same_ids: int
    same_answers: int
    agreeing: float
    tokens: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the ids are the same, and of float32 the answers too."""
        exact = self.kind != GgufType.f32 or self.same_answers == self.prompts
        return exact and self.same_ids == self.prompts


def main() -> int:
    """Returns the exit code: 1 where tokens or ids differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--prompts", type=positive, default=20, help="for each model")
    parser.add_argument("--tokens", type=positive, default=24, help="for each prompt")
    parser.add_argument(
        "--model", action="append", default=[], metavar="DIR", help="another model, beside the small ones"
    )
    parser.add_argument("--only", metavar="TEXT", help="models whose name holds it")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/engines.json")
    flags = parser.parse_args()
    quiet_libraries()
    begun, rows = time.monotonic(), []
    wanted = [name for name in (*MODELS, *flags.model) if flags.only is None or flags.only in name]
    try:
        engine = llama_cpp()
        for name in wanted:
            with tempfile.TemporaryDirectory(prefix="engines") as place:
                for row in rows_of(name, engine, Path(place), flags.prompts, flags.tokens):
                    print(line(row), flush=True)
                    rows.append(row)
    except Unavailable as reason:
        print(f"engines: skipped: {reason}")
        return 0
    print(f"{len(rows)} files in {time.monotonic() - begun:.0f} s, {PACKAGE} {VERSION}")
    if flags.record:
        about = facts(torch.device("cpu")) | {PACKAGE: VERSION}
        content = {"machine": about, "rows": [asdict(row) for row in rows]}
        (RESULTS / "engines.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(row.is_right for row in rows) else 1


def rows_of(name: str, engine: LlamaCpp, place: Path, count: int, tokens: int) -> list[Row]:
    """A model in float32 and float16, and a LoRA over it where one is tried.

    Args:
        name: one of MODELS, or a folder.
        place: for files.
        count: prompts.
    """
    folder, own = Path(name).expanduser(), name not in MODELS
    if own:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        folder = place / "model"
        model = save_model(name, folder)
    shown = folder.name if own else name
    prompts = prompts_for(AutoTokenizer.from_pretrained(folder), count)
    expected, rows = [greedy(model, prompt.ids, tokens) for prompt in prompts], []
    files = {kind: write_gguf(folder, place / f"{kind}.gguf", kind) for kind in GgufType}
    for kind, file in files.items():
        begun = time.monotonic()
        answers = engine.answers(file, prompts, tokens)
        rows.append(compared(shown, kind, prompts, expected, answers, time.monotonic() - begun))
    if name in WITH_LORA:
        adapted = save_lora(model, place / "peft")
        changed = [greedy(adapted, prompt.ids, tokens) for prompt in prompts]
        assert changed != expected
        lora = write_gguf_lora(place / "peft", place / "lora.gguf", str(folder)).file
        begun = time.monotonic()
        answers = engine.answers(files[GgufType.f32], prompts, tokens, lora=lora)
        rows.append(compared(f"{shown} + LoRA", GgufType.f32, prompts, changed, answers, time.monotonic() - begun))
    return rows


def prompts_for(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """Some awkward texts, and questions of the bundled validation rows in the model's own template."""
    texts: list[str] = [*TEXTS]
    files = sorted((resource_dir("data/sft") / "val").glob("*.jsonl"))
    rows = [json.loads(row) for file in files for row in file.read_text(encoding="utf-8").splitlines()[:count]]
    for row in rows[:: max(1, len(rows) // count)]:
        question = next(turn for turn in row["messages"] if turn["role"] == "user")
        asked = [{"role": "user", "content": question["content"][:LONGEST]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        texts.append(text)
    return [Prompt(text=text, ids=tokenizer.encode(text, add_special_tokens=False)) for text in texts[:count]]


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, as Transformers computes them, past every end of an answer."""
    inputs = torch.tensor([ids])
    found = model.generate(  # type: ignore[operator]
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        min_new_tokens=None,
        do_sample=False,
        eos_token_id=-1,
    )
    return found[0, len(ids) :].tolist()


def compared(
    name: str,
    kind: GgufType,
    prompts: Sequence[Prompt],
    expected: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    seconds: float,
) -> Row:
    """What agrees of the ids of all prompts and of the tokens behind them."""
    agreeing = total = same = 0
    for wanted, answer in zip(expected, answers, strict=True):
        found = answer.generated
        wanted = wanted[: len(found)]  # the engine stops where an answer ends
        first = next((i for i, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), len(found))
        agreeing, total, same = agreeing + first, total + len(found), same + (first == len(found) > 0)
    return Row(
        name=name,
        kind=kind,
        prompts=len(prompts),
        same_ids=sum(prompt.ids == answer.ids for prompt, answer in zip(prompts, answers, strict=True)),
        same_answers=same,
        agreeing=agreeing / max(total, 1),
        tokens=total,
        seconds=round(seconds, 2),
    )


def line(row: Row) -> str:
    """A row, for the terminal."""
    return (
        f"{row.name} ({row.kind}): ids {row.same_ids}/{row.prompts}, answers {row.same_answers}/{row.prompts}, "
        f"tokens {row.agreeing:.1%} of {row.tokens}, {row.seconds:.1f} s" + ("" if row.is_right else "  WRONG")
    )


if __name__ == "__main__":
    sys.exit(main())
