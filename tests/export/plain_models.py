"""Run by a Python that does not import lmoe: logits and greedy tokens of every model in a folder, loaded plainly."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEW_TOKENS = 4


def answers(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of all tokens, and what follows greedily."""
    with torch.no_grad():
        model.generation_config.eos_token_id = None
        told = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        return {"logits": model(ids, attention_mask=torch.ones_like(ids)).logits, "tokens": told}


def main(folder: Path) -> None:
    ids, found = torch.load(folder / "ids.pt"), {}
    for place in sorted(path for path in folder.iterdir() if (path / "config.json").exists()):
        model, loading = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        assert not any(loading.values()), (place, loading)
        found[place.name] = answers(model.eval(), ids) | {"class": type(model).__name__}
    assert "lmoe" not in sys.modules
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
