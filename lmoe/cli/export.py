"""`lmoe export`: a trained run, or a base with experts blended over it, as files that other tools read."""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from lmoe.cli.errors import exit_code_of, with_flag_names
from lmoe.cli.speak import SpeakerFlags, open_speaker
from lmoe.config.problems import at_least, raise_problems, without_effect
from lmoe.errors import keys_renamed
from lmoe.files.wording import shown
from lmoe.vocabulary import QUANTISED, BackbonePrecision, ExportFormat, GgufType

if TYPE_CHECKING:
    from lmoe.blend.export import BlendExport
    from lmoe.export.export import Merged
    from lmoe.export.gguf.lora import GgufLora
    from lmoe.export.per_domain import DomainPrice

OF_BLENDS = (ExportFormat.peft, ExportFormat.merged, ExportFormat.gguf_lora)
WITH_RANK = (ExportFormat.peft, ExportFormat.gguf_lora)
BY_DOMAIN = (ExportFormat.per_domain, ExportFormat.prompt_router)
"""Formats that are another model than the mixture, at a price."""
FILES = (ExportFormat.gguf, ExportFormat.gguf_lora)
"""Formats that are one file, and not a folder."""


WRITTEN = tuple(precision.value for precision in BackbonePrecision if precision not in QUANTISED)


@dataclass(slots=True, frozen=True, kw_only=True)
class ExportFlags:
    """The flags of `lmoe export` that say what is written, as they were given.

    Args:
        output, format: where and what.
        without_expert, average_experts, data: of some formats of a run.
        rank: of a blend as a PEFT adapter, or as a LoRA for llama.cpp; of the adapters of domains.
        gguf_type: of the numbers in a GGUF file.
    """

    output: str
    format: ExportFormat
    without_expert: str | None = None
    average_experts: bool = False
    data: str | None = None
    rank: int | None = None
    gguf_type: GgufType | None = None

    def problems(self, source: SpeakerFlags) -> list[str]:
        """Flags that cannot stand together."""
        writes_precision = self.format is ExportFormat.native_moe and source.checkpoint is not None
        of_source = (replace(source, precision=None) if writes_precision else source).problems()
        if found := of_source or self._source_problems(source):
            return found
        blend, with_format = source.checkpoint is None, f"with --format {self.format}"
        problems = []
        if writes_precision and source.precision is not None and source.precision not in WRITTEN:
            problems.append(f"--precision {source.precision}: allowed {with_format}: {', '.join(WRITTEN)}")
        if self.format is ExportFormat.lmoe and self.without_expert is None:
            problems.append("--format lmoe writes an adapter with an expert less: name it with --without-expert")
        if self.format is ExportFormat.lmoe and source.base_model is not None:
            problems.append(without_effect("--base-model", f"{with_format}, which loads no backbone"))
        if self.format is ExportFormat.lmoe and source.trust_remote_code:
            problems.append(without_effect("--trust-remote-code", f"{with_format}, which loads no backbone"))
        if self.format is not ExportFormat.lmoe and self.without_expert is not None:
            problems.append(without_effect("--without-expert", f"{with_format}; use --format lmoe"))
        if self.format is ExportFormat.gguf and source.precision is not None:
            problems.append(without_effect("--precision", f"{with_format}; --gguf-type is the type that is written"))
        if self.format in FILES and source.trust_remote_code and source.experts is None:
            problems.append(without_effect("--trust-remote-code", f"{with_format}, which runs no code of a model"))
        if self.format not in FILES and self.gguf_type is not None:
            problems.append(without_effect("--gguf-type", f"{with_format}; use --format gguf or gguf-lora"))
        if self.format in BY_DOMAIN:
            if self.average_experts:
                problems.append(without_effect("--average-experts", f"{with_format}; use --format merged"))
        elif blend or self.format is not ExportFormat.merged:
            exact = blend and self.format is not ExportFormat.gguf
            why = "with --model, whose blend is merged exactly" if exact else f"{with_format}; use --format merged"
            given = {"--average-experts": self.average_experts, "--data": self.data is not None}
            problems += [without_effect(option, why) for option, on in given.items() if on]
        if self.rank is not None and self.format in BY_DOMAIN:
            problems += at_least(self.rank, 1, "--rank")
        elif self.rank is not None and (not blend or self.format not in WITH_RANK):
            formats = f"on a blend with --format {' or '.join(WITH_RANK)}, on a run with {' or '.join(BY_DOMAIN)}"
            problems.append(without_effect("--rank", f"but {formats}"))
        return problems

    def _source_problems(self, source: SpeakerFlags) -> list[str]:
        """What cannot be written in the format that was asked for."""
        blend = source.checkpoint is None and source.experts is not None
        if self.format is ExportFormat.gguf:
            if source.checkpoint is None and not blend:
                return []
            given = "a blend" if blend else "a run"
            return [
                f"--format gguf takes a Hugging Face folder, not {given}; write one first (--format native-moe of "
                "moe_expert_lora and native experts, merged where experts can be merged), then export it with --model "
                "FOLDER --format gguf"
            ]
        if source.checkpoint is None and not blend:
            return ["--model alone is what it was already; give --experts name=DIR,… to blend over it"]
        if blend and self.format not in OF_BLENDS:
            allowed = f"{', '.join(OF_BLENDS[:-1])} or {OF_BLENDS[-1]}"
            return [f"--format {self.format} is for --checkpoint; a blend is exported with --format {allowed}"]
        return []


def run(source: SpeakerFlags, wanted: ExportFlags) -> int:
    """Returns the exit code."""

    def action() -> None:
        raise_problems(wanted.problems(source))
        if wanted.format is ExportFormat.gguf:
            _as_gguf(source, wanted)
        elif source.checkpoint is None:
            _of_blend(source, wanted)
        else:
            _of_checkpoint(source.checkpoint, source, wanted)

    return exit_code_of(action)


def _as_gguf(source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.export.gguf.model import write_gguf
    from lmoe.run.announce import quiet_libraries

    quiet_libraries()
    assert source.model is not None
    kind = wanted.gguf_type or GgufType.f16
    with keys_renamed({"backbone.model_name=": "--model ", "backbone.model_name": "--model"}):
        print(f"GGUF model ({kind}) in {write_gguf(source.model, wanted.output, kind)}")


def _of_blend(source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.adapter.answer_end import write_answer_end

    if wanted.format is ExportFormat.gguf_lora:
        print(_lora_line(_blend_as_gguf(source, wanted)))
        return
    speaker = open_speaker(source)
    assert speaker.blend is not None
    if wanted.format is ExportFormat.merged:
        print(f"merged model in {speaker.blend.save_merged(wanted.output, speaker.tokenizer)}")
        return
    done = speaker.blend.export(wanted.output, "cat" if wanted.rank is None else "svd", wanted.rank)
    speaker.tokenizer.save_pretrained(done.folder)
    write_answer_end(speaker.model, speaker.tokenizer, done.folder)
    print(_blend_line(done))


def _blend_as_gguf(source: SpeakerFlags, wanted: ExportFlags) -> "GgufLora":
    from lmoe.export.gguf.file import gguf_output
    from lmoe.export.gguf.lora import write_gguf_lora

    gguf_output(wanted.output)  # a refusal comes before the base is loaded
    speaker = open_speaker(source)
    assert speaker.blend is not None and source.model is not None
    with tempfile.TemporaryDirectory(prefix="lmoe_lora") as place:
        done = speaker.blend.export(f"{place}/peft", "cat" if wanted.rank is None else "svd", wanted.rank)
        if any(done.errors.values()):
            print(_error_of(done))
        return write_gguf_lora(done.folder, wanted.output, source.model, wanted.gguf_type or GgufType.f32)


def _of_checkpoint(named: str, source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.adapter.place import local_checkpoint
    from lmoe.export import export
    from lmoe.peft.router_head import HEAD_FILE
    from lmoe.run.announce import quiet_libraries

    quiet_libraries()
    output, base_model, trust = wanted.output, source.base_model, source.trust_remote_code
    is_peft = wanted.format is ExportFormat.gguf_lora and source.revision is None  # may be one of the hub
    checkpoint = named if is_peft else local_checkpoint(named, source.revision, trust_remote_code=trust)
    match wanted.format:
        case ExportFormat.native_moe:
            _native_moe(str(checkpoint), source, output)
        case ExportFormat.peft:
            print(f"PEFT adapter in {export.export_peft(checkpoint, output, base_model, trust_remote_code=trust)}")
        case ExportFormat.peft_experts:
            folders = export.export_peft_experts(checkpoint, output, base_model, trust_remote_code=trust)
            for name, folder in folders.items():
                print(f"PEFT adapter of expert {name} in {folder}")
            head = Path(output).expanduser() / HEAD_FILE
            if head.exists():
                print(f"router of the run in {head}: a blend decides by it with --router encoder --head {output}")
        case ExportFormat.per_domain | ExportFormat.prompt_router:
            _by_domain(checkpoint, source, wanted)
        case ExportFormat.lmoe:
            assert wanted.without_expert is not None
            print(f"adapter in {export.export_without_expert(checkpoint, output, wanted.without_expert)}")
        case ExportFormat.merged:
            average = wanted.average_experts
            merged = export.export_merged(
                *(checkpoint, output, base_model), average=average, data=wanted.data, trust_remote_code=trust
            )
            print(_merged_lines(merged, average=average))
        case ExportFormat.gguf_lora:
            from lmoe.export.gguf.lora import write_gguf_lora

            print(_lora_line(write_gguf_lora(str(checkpoint), output, base_model, wanted.gguf_type or GgufType.f32)))


def _by_domain(checkpoint: str | Path, source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.export.per_domain import export_per_domain
    from lmoe.peft.router_head import HEAD_FILE

    with_head = wanted.format is ExportFormat.prompt_router
    done = export_per_domain(
        *(checkpoint, wanted.output, source.base_model),
        rank=wanted.rank,
        head=with_head,
        data=wanted.data,
        trust_remote_code=source.trust_remote_code,
        say=lambda line: print(line, flush=True),
    )
    for name, folder in done.folders.items():
        cut = f"; |mean blend - written| / |mean blend| is {done.errors[name]:.3f}" if wanted.rank is not None else ""
        print(f"PEFT adapter of {shown(done.domains[name])} in {folder}{cut}")
    if with_head:
        head = Path(wanted.output).expanduser() / HEAD_FILE
        print(f"router of prompts in {head}: a blend decides by it with --router encoder --head {wanted.output}")
    if done.prices:
        print("\n".join(_price_lines(done.prices)))


def _price_lines(prices: Sequence["DomainPrice"]) -> list[str]:
    """What each adapter costs, and all of them on the mean over domains."""
    header = ["nats per label token", "rows", "mixture", "adapter", "price"]
    rows = [
        [shown(p.domain), f"{p.rows:,}", f"{p.exact:.4f}", f"{p.adapter:.4f}", f"{p.adapter - p.exact:+.4f}"]
        for p in prices
    ]
    means = [mean(p.exact for p in prices), mean(p.adapter for p in prices)]
    last = ["mean", "", f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[1] - means[0]:+.4f}"]
    routed = [p.routed for p in prices if p.routed is not None]
    if routed:
        header += ["by prompt", "price", "chosen"]
        for row, p in zip(rows, prices, strict=True):
            row += [f"{p.routed:.4f}", f"{(p.routed or 0) - p.exact:+.4f}", f"{p.chosen:.1%}"]
        chosen = mean(p.chosen or 0 for p in prices)
        last += [f"{mean(routed):.4f}", f"{mean(routed) - means[0]:+.4f}", f"{chosen:.1%}"]
    widths = [max(len(row[column]) for row in (header, *rows, last)) for column in range(len(header))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in (header, *rows, last))
    ]


def _lora_line(done: "GgufLora") -> str:
    low, high = min(done.ranks.values()), max(done.ranks.values())
    ranks = low if low == high else f"{low} to {high}"
    return f"LoRA for llama.cpp (--lora) in {done.file}: rank {ranks} at {len(done.ranks)} weights"


def _native_moe(checkpoint: str, source: SpeakerFlags, output: str) -> None:
    from lmoe.export.native_moe import export_native_moe

    folder = export_native_moe(
        *(checkpoint, output, source.base_model),
        precision=None if source.precision is None else BackbonePrecision(source.precision),
        say=lambda line: print(with_flag_names(line), flush=True),
        trust_remote_code=source.trust_remote_code,
    )
    print(f"mixture in {folder}; whether it is what was trained: lmoe evaluate --model {shlex.quote(str(folder))}")


def _blend_line(done: "BlendExport") -> str:
    low, high = min(done.ranks.values()), max(done.ranks.values())
    line = (
        f"PEFT adapter in {done.folder}: rank {low if low == high else f'{low} to {high}'} at {len(done.ranks)} sites"
    )
    if not any(done.errors.values()):
        return f"{line}, exact"
    return f"{line}; {_error_of(done)}"


def _error_of(done: "BlendExport") -> str:
    worst = max(done.errors, key=lambda path: done.errors[path])
    return (
        f"|exact - written| / |exact| is {mean(done.errors.values()):.3f} on the mean and at most "
        f"{done.errors[worst]:.3f}, at {worst}"
    )


def _merged_lines(merged: "Merged", *, average: bool) -> str:
    lines = [f"merged model in {merged.folder}"]
    if average:
        lines.append(
            "warning: the average of the experts is another model than the mixture: no router decides any more"
        )
    if merged.loss_before is not None and merged.loss_after is not None:
        lines.append(
            f"loss on the validation rows: {merged.loss_before:.4f} with the adapters, {merged.loss_after:.4f} merged "
            f"({merged.loss_after - merged.loss_before:+.4f} nats per label token)"
        )
    return "\n".join(lines)
