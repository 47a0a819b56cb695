"""The data section of the run that an adapter is of."""

from pathlib import Path

from lmoe.config.data import DataConfig
from lmoe.config.problems import size_problems
from lmoe.config.read import read_section
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown


def run_data(run: Path | None) -> tuple[DataConfig, int]:
    """The data section of a run, and the seed of its split; of an adapter on its own the defaults.

    Raises:
        CheckpointError: config.yaml cannot be read, or holds something else.
    """
    if run is None:
        return DataConfig(), 0
    file = run / CONFIG_FILE
    reader = Reader(cure="put back the file that the run has written, or move adapter/ out of the run")
    saved = reader.yaml(file)
    config, reading = read_section(DataConfig, {} if saved.get("data") is None else saved["data"], prefix="data")
    seed = saved.get("seed", 0)
    problems = reading.problems + ([] if type(seed) is int else [f"seed is {shown(seed)}, must be a whole number"])
    if problems := problems + size_problems(config, "data"):
        raise reader.refusal(file, f"its data section cannot be read: {'; '.join(problems)}")
    return config, seed
