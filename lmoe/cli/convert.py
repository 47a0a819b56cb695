"""`lmoe convert`: what another trainer left as an adapter of lmoe."""

from lmoe.cli.errors import told


def run(checkpoint: str, *, output: str, base_model: str | None) -> int:
    """Returns the exit code."""

    def action() -> None:
        from lmoe.build.announce import quiet_libraries
        from lmoe.inference.convert import convert_eulerforge

        quiet_libraries()
        print(f"adapter in {convert_eulerforge(checkpoint, output, base_model)}")

    return told(action)
