"""`lmoe export`: a trained run, or a base with experts blended over it, as files that other tools read."""

from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from lmoe.cli.errors import exit_code_of
from lmoe.cli.speak import SpeakerFlags, open_speaker
from lmoe.config.problems import raise_problems, without_effect
from lmoe.vocabulary import ExportFormat

if TYPE_CHECKING:
    from lmoe.blend.export import BlendExport
    from lmoe.export.export import Merged


@dataclass(slots=True, frozen=True, kw_only=True)
class ExportFlags:
    """The flags of `lmoe export` that say what is written, as they were given.

    Args:
        output, format: where and what.
        without_expert, average_experts, data: of some formats of a run.
        rank: of a blend as a PEFT adapter.
    """

    output: str
    format: ExportFormat
    without_expert: str | None = None
    average_experts: bool = False
    data: str | None = None
    rank: int | None = None

    def problems(self, source: SpeakerFlags) -> list[str]:
        """Flags that cannot stand together."""
        if found := source.problems():
            return found
        blend, with_format = source.checkpoint is None, f"with --format {self.format}"
        if blend and source.experts is None:
            return ["--model alone is what it was already; give --experts name=DIR,… to blend over it"]
        if blend and self.format not in (ExportFormat.peft, ExportFormat.merged):
            return [f"--format {self.format} is for --checkpoint; a blend is exported with --format peft or merged"]
        problems = []
        if self.format is ExportFormat.lmoe and self.without_expert is None:
            problems.append("--format lmoe writes an adapter with an expert less: name it with --without-expert")
        if self.format is ExportFormat.lmoe and source.base_model is not None:
            problems.append(without_effect("--base-model", f"{with_format}, which loads no backbone"))
        if self.format is ExportFormat.lmoe and source.trust_remote_code:
            problems.append(without_effect("--trust-remote-code", f"{with_format}, which loads no backbone"))
        if self.format is not ExportFormat.lmoe and self.without_expert is not None:
            problems.append(without_effect("--without-expert", f"{with_format}; use --format lmoe"))
        if blend or self.format is not ExportFormat.merged:
            why = "with --model, whose blend is merged exactly" if blend else f"{with_format}; use --format merged"
            given = {"--average-experts": self.average_experts, "--data": self.data is not None}
            problems += [without_effect(option, why) for option, on in given.items() if on]
        if self.rank is not None and (not blend or self.format is not ExportFormat.peft):
            problems.append(without_effect("--rank", "but on a blend with --format peft"))
        return problems


def run(source: SpeakerFlags, wanted: ExportFlags) -> int:
    """Returns the exit code."""

    def action() -> None:
        raise_problems(wanted.problems(source))
        if source.checkpoint is None:
            _of_blend(source, wanted)
        else:
            _of_checkpoint(source.checkpoint, source, wanted)

    return exit_code_of(action)


def _of_blend(source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.adapter.answer_end import write_answer_end

    speaker = open_speaker(source)
    assert speaker.blend is not None
    if wanted.format is ExportFormat.merged:
        print(f"merged model in {speaker.blend.save_merged(wanted.output, speaker.tokenizer)}")
        return
    done = speaker.blend.export(wanted.output, "cat" if wanted.rank is None else "svd", wanted.rank)
    speaker.tokenizer.save_pretrained(done.folder)
    write_answer_end(speaker.model, speaker.tokenizer, done.folder)
    print(_blend_line(done))


def _of_checkpoint(named: str, source: SpeakerFlags, wanted: ExportFlags) -> None:
    from lmoe.adapter.place import local_checkpoint
    from lmoe.export import export
    from lmoe.run.announce import quiet_libraries

    quiet_libraries()
    output, base_model, trust = wanted.output, source.base_model, source.trust_remote_code
    checkpoint = local_checkpoint(named, source.revision, trust_remote_code=trust)
    match wanted.format:
        case ExportFormat.peft:
            print(f"PEFT adapter in {export.export_peft(checkpoint, output, base_model, trust_remote_code=trust)}")
        case ExportFormat.peft_experts:
            folders = export.export_peft_experts(checkpoint, output, base_model, trust_remote_code=trust)
            for name, folder in folders.items():
                print(f"PEFT adapter of expert {name} in {folder}")
        case ExportFormat.lmoe:
            assert wanted.without_expert is not None
            print(f"adapter in {export.export_without_expert(checkpoint, output, wanted.without_expert)}")
        case ExportFormat.merged:
            average = wanted.average_experts
            merged = export.export_merged(
                *(checkpoint, output, base_model), average=average, data=wanted.data, trust_remote_code=trust
            )
            print(_merged_lines(merged, average=average))


def _blend_line(done: "BlendExport") -> str:
    low, high = min(done.ranks.values()), max(done.ranks.values())
    line = (
        f"PEFT adapter in {done.folder}: rank {low if low == high else f'{low} to {high}'} at {len(done.ranks)} sites"
    )
    if not any(done.errors.values()):
        return f"{line}, exact"
    worst = max(done.errors, key=lambda path: done.errors[path])
    return (
        f"{line}; |exact - written| / |exact| is {mean(done.errors.values()):.3f} on the mean and at most "
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
