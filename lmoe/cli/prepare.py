"""`lmoe prepare`: fill the cache of tokenised rows, and say what they hold."""

from rich.console import Console
from rich.table import Table

from lmoe.cli.errors import told


def run(
    data: str,
    *,
    model: str,
    val: str | None,
    max_length: int,
    packing: bool,
    chat_template: str | None,
    cache_dir: str | None,
    seed: int,
    trust_remote_code: bool,
) -> int:
    """Returns the exit code."""

    def action() -> None:
        from lmoe.backbones.load import load_tokenizer, model_type
        from lmoe.config.backbone import BackboneConfig
        from lmoe.config.data import DataConfig
        from lmoe.config.problems import raise_problems
        from lmoe.data.prepare import prepare
        from lmoe.files.resources import resource_dir
        from lmoe.report.say import say
        from lmoe.rules.data import data_problems
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        config = DataConfig(
            path=data,
            val_path=val,
            max_length=max_length,
            packing=packing,
            chat_template=chat_template,
            cache_dir=cache_dir,
        )
        raise_problems(data_problems(config))
        backbone = BackboneConfig(model_name=model, trust_remote_code=trust_remote_code)
        prepared = prepare(
            config,
            load_tokenizer(backbone),
            seed=seed,
            bundled=resource_dir("data/sft"),
            packing_model_type=model_type(backbone),
        )
        console = Console()
        table = Table("", "training", "validation")
        for row in prepared.report.table():
            table.add_row(*row)
        console.print(table)
        for line in prepared.report.lines():
            say(console, line)

    return told(action)
