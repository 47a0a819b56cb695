"""`lmoe export`: a trained run as files that other tools read."""

from lmoe.cli.errors import told


def run(checkpoint: str, *, output: str, base_model: str | None) -> int:
    """Returns the exit code."""

    def action() -> None:
        from lmoe.build.announce import quiet_libraries
        from lmoe.inference.export import export_peft

        quiet_libraries()
        folder = export_peft(checkpoint, output, base_model)
        print(f"PEFT adapter in {folder}")

    return told(action)
