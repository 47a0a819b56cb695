"""Made tests/adapter/fixtures/format_2, once: one router for the whole model, whose experts act on prompts too."""

from tests.adapter.make_format_1 import write

if __name__ == "__main__":
    write("format_2", {"router": "sequence", "router_scope": "model", "router_layer": 1, "prompt_experts": True})
