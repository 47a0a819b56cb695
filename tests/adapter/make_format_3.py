"""Made tests/adapter/fixtures/format_3, once: a reward model."""

from tests.adapter.make_format_1 import write

if __name__ == "__main__":
    write("format_3", {}, reward_head=True)
