"""Problems of the section `backbone` that show without loading it."""

from lmoe.config.backbone import BackboneConfig
from lmoe.files.gguf import SUFFIX, gguf_files, split_gguf
from lmoe.files.places import expanded, is_dir, is_file, is_local
from lmoe.files.resources import BASES, missing_base
from lmoe.vocabulary import QUANTISED


def backbone_problems(backbone: BackboneConfig) -> list[str]:
    """What is wrong in the section `backbone`."""
    if not backbone.model_name:
        return ["backbone.model_name is required: a hub name, a local directory, or tiny"]
    if (problem := missing_base(backbone.model_name)) is not None:
        return [f"backbone.model_name={backbone.model_name}: {problem}"]
    return [] if backbone.gguf_file is None else gguf_problems(backbone, backbone.gguf_file)


def gguf_problems(backbone: BackboneConfig, file: str) -> list[str]:
    """What is wrong with a base that is a GGUF file.

    Args:
        file: its name, backbone.gguf_file.
    """
    name, problems = backbone.model_name, []
    if backbone.precision in QUANTISED:
        problems.append(
            f"backbone.precision={backbone.precision} would quantise {file} a second time: a GGUF file is dequantised "
            "into float32, bfloat16 or float16; choose one of them"
        )
    if split_gguf(name)[1] is not None:
        return [*problems, f"backbone.model_name={name} and backbone.gguf_file={file} name two files; give one of them"]
    if "/" in file or not file.lower().endswith(SUFFIX):
        return [*problems, f"backbone.gguf_file={file}: must be the name of a file that ends in {SUFFIX}"]
    if name in BASES:
        return [*problems, f"backbone.gguf_file={file} has no effect with backbone.model_name={name}; leave it out"]
    folder = expanded(name)
    if is_dir(folder):
        if not is_file(folder / file):
            problems.append(
                f"backbone.model_name={backbone.full_name}: no such file{_instead(name, gguf_files(folder))}"
            )
    elif "/" not in name and not is_local(name):
        problems.append(
            f"backbone.model_name={backbone.full_name}: there is no folder {name} here, and a file of the hub is named "
            f"owner/repository/{file}"
        )
    return problems


def _instead(folder: str, files: list[str]) -> str:
    return f"; {folder} has {', '.join(files)}" if files else f"; {folder} has none that ends in {SUFFIX}"
