"""`lmoe export`: a trained run as files that other tools read."""

from enum import StrEnum

from lmoe.cli.errors import told
from lmoe.schema.problems import raise_problems, without_effect


class ExportFormat(StrEnum):
    """What `lmoe export` writes."""

    peft = "peft"
    peft_experts = "peft-experts"
    merged = "merged"
    lmoe = "lmoe"


def run(
    checkpoint: str,
    *,
    output: str,
    format: ExportFormat,
    base_model: str | None,
    without_expert: str | None,
    average_experts: bool,
    data: str | None,
) -> int:
    """Returns the exit code."""

    def action() -> None:
        raise_problems(
            _problems(format, base_model=base_model, without_expert=without_expert, average=average_experts, data=data)
        )
        from lmoe.build.announce import quiet_libraries
        from lmoe.inference import export

        quiet_libraries()
        match format:
            case ExportFormat.peft:
                print(f"PEFT adapter in {export.export_peft(checkpoint, output, base_model)}")
            case ExportFormat.peft_experts:
                for name, folder in export.export_peft_experts(checkpoint, output, base_model).items():
                    print(f"PEFT adapter of expert {name} in {folder}")
            case ExportFormat.lmoe:
                assert without_expert is not None
                print(f"adapter in {export.export_without_expert(checkpoint, output, without_expert)}")
            case ExportFormat.merged:
                merged = export.export_merged(checkpoint, output, base_model, average=average_experts, data=data)
                print(_merged_lines(merged, average=average_experts))

    return told(action)


def _problems(
    format: ExportFormat, *, base_model: str | None, without_expert: str | None, average: bool, data: str | None
) -> list[str]:
    with_format = f"with --format {format}"
    problems = []
    if format is ExportFormat.lmoe and without_expert is None:
        problems.append("--format lmoe writes an adapter with an expert less: name it with --without-expert")
    if format is ExportFormat.lmoe and base_model is not None:
        problems.append(without_effect("--base-model", f"{with_format}, which loads no backbone"))
    if format is not ExportFormat.lmoe and without_expert is not None:
        problems.append(without_effect("--without-expert", f"{with_format}; use --format lmoe"))
    if format is not ExportFormat.merged:
        given = {"--average-experts": average, "--data": data is not None}
        problems += [
            without_effect(option, f"{with_format}; use --format merged") for option, on in given.items() if on
        ]
    return problems


def _merged_lines(merged, *, average: bool) -> str:
    lines = [f"merged model in {merged.folder}"]
    if average:
        lines.append(
            "warning: the average of the experts is another model than the mixture: no router decides any more"
            + ("" if merged.loss_before is not None else "; --data ROWS measures what that costs")
        )
    if merged.loss_before is not None and merged.loss_after is not None:
        lines.append(
            f"loss on the validation rows: {merged.loss_before:.4f} with the adapters, {merged.loss_after:.4f} merged "
            f"({merged.loss_after - merged.loss_before:+.4f} nats per label token)"
        )
    return "\n".join(lines)
