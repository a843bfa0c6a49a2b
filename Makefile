# Each command below makes .venv on its first use, from requirements.lock.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
CHAPTERS =
LAB =
EXPORT = $(BIN)/python tools/export.py
NBVAL = --nbval-lax --nbval-cell-timeout=600 --nbval-sanitize-with tests/nbval.cfg

.PHONY: help tour test lab book sync run export pull format check experiments bench lock

help:  ## print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' Makefile | while read -r name what; \
		do printf '  make %-12s %s\n' "$$name" "$$what"; done

tour: $(READY)  ## train a tokenizer and a Llama on the built-in town, in minutes
	$(BIN)/llama2-lite tour

# Without its reordering, since pytest-xdist leaves files with few tests for the end. The
# slowest are among them, and the other process would wait for the last one.
test: tour  ## run every test and every chapter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder $(NBVAL) \
		tests $(wildcard book/[0-9]*.ipynb)

lab: sync  ## open the book in JupyterLab
	$(BIN)/jupyter lab $(LAB) book

book: $(READY)  ## build the site into _build/html
	$(BIN)/jupyter-book build book --config _config.yml --path-output . \
		-W -n --keep-going

sync: $(READY)  ## bring the text and the notebook of each chapter into step
	$(EXPORT) sync $(CHAPTERS)

run: $(READY)  ## re-execute notebooks: all, or those of CHAPTERS="05 06"
	$(EXPORT) run $(CHAPTERS)

export: $(READY)  ## write the modules of llama2_lite from the chapters
	$(EXPORT) export $(CHAPTERS)

pull: $(READY)  ## take modules edited in an editor over into their chapters
	$(EXPORT) pull $(CHAPTERS)

format: sync  ## format all code, in chapters too
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(EXPORT) export

check: $(READY)  ## fail if chapters, modules or outputs disagree, or code is untidy
	@status=0; \
	$(EXPORT) check || status=1; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

experiments: $(READY)  ## repeat the studies stored in book/results (hours)
	for script in $$(grep -l write_result benchmarks/*.py); do \
		$(BIN)/python $$script || exit 1; done

bench: $(READY)  ## compare speed with transformers
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/decoding.py

# What a fresh environment holds, without what differs between machines: torch chooses
# the packages for the GPU by itself. Its version is the one the figures were measured with.
lock:  ## choose the newest versions of all dependencies but torch
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install torch==2.13.0 '.[book,dev]'
	.venv-lock/bin/pip freeze --all --exclude pip --exclude llama2_lite \
		| sed -E -e '/^(nvidia|cuda|triton)/d' \
		-e 's/\+[a-z0-9.]*$$//' > requirements.lock
	rm -rf .venv-lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"error: this needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing what requirements.lock lists; the first time takes minutes"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
