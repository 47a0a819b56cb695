"""`lmoe convert`: what another trainer left as an adapter of lmoe."""

from lmoe.cli.errors import exit_code_of


def run(checkpoint: str, *, output: str, base_model: str | None, trust_remote_code: bool) -> int:
    """Returns the exit code."""

    def action() -> None:
        from lmoe.peft.convert import convert_eulerforge
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        done = convert_eulerforge(checkpoint, output, base_model, trust_remote_code=trust_remote_code)
        print(f"adapter in {done}")

    return exit_code_of(action)
