# Icebox. `make help` lists the targets; NAME=value after a target changes what it works on.

PYTHON  ?= python3
EXTRAS  ?=
DATASET ?=
HEAD    ?=
WEIGHTS ?=
MAX_BAD ?=
PHOTOS  ?=
THINGSVISION ?=
export DATASET HEAD WEIGHTS MAX_BAD PHOTOS THINGSVISION  # reach the commands as they were typed, blanks and quotes included

VENV := .venv
BIN  := $(VENV)/bin
CLI  := $(BIN)/python cli.py
# What is not said here is as the command line, or a file, has it.
OF_DATASET = $(if $(DATASET),--dataset "$$DATASET") $(if $(WEIGHTS),--weights "$$WEIGHTS") $(if $(MAX_BAD),--max-bad "$$MAX_BAD")
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup quickstart features train-head freeze finetune sweep report bench test test-all lint check format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  with DATASET= HEAD= WEIGHTS= MAX_BAD= (features … sweep), EXTRAS=gpu,onnx,remote,… (setup), PYTHON= (setup)"

setup: $(VENV)/.ready ## install Icebox into .venv; EXTRAS=gpu adds TensorFlow's CUDA build
ifneq ($(EXTRAS),)
	$(PIP) --editable '.[$(EXTRAS)]'
endif

quickstart: setup ## from nothing to features, three heads, and a report of the best, on digits
	$(CLI) features
	$(CLI) train-head --head logreg
	$(CLI) train-head --head gap --patience 5
	$(CLI) train-head --head flatten --patience 3
	$(CLI) runs ls
	$(CLI) report best

features: setup ## compute the features of DATASET that are missing
	$(CLI) features $(OF_DATASET)

train-head: setup ## train HEAD on the cached features of DATASET
	$(CLI) train-head $(if $(HEAD),--head "$$HEAD") $(OF_DATASET)

freeze: setup ## train a head on the whole, frozen backbone, from the images of DATASET
	$(CLI) freeze $(OF_DATASET)

finetune: setup ## fine-tune the backbone's last layers on cached rows of DATASET, computing what is missing
	$(CLI) finetune --from-cache $(OF_DATASET)

sweep: setup ## try heads and settings on the cached features of DATASET
	$(CLI) sweep $(OF_DATASET)

report: setup ## a page of the best run on the dataset of the latest: data/reports/
	$(CLI) report best

bench: $(VENV)/.ready-dev ## measure speed and size on DATASET, a folder, with WEIGHTS, a file (PHOTOS, THINGSVISION): hours
	$(BIN)/python benchmarks/all.py --dataset "$${DATASET:-digits}" --weights "$${WEIGHTS:-auto}" \
		$(if $(PHOTOS),--photos "$$PHOTOS") $(if $(THINGSVISION),--thingsvision "$$THINGSVISION")

test: $(VENV)/.ready-dev ## set up and run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.ready-dev ## the tests that take long as well
	$(BIN)/python -m pytest -n 2 --dist worksteal --all

lint: $(VENV)/.ready-dev ## format and lint (ruff), types (pyright)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test ## all of the above

format: $(VENV)/.ready-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.ready-dev ## write docs/cli.md anew
	COLUMNS=80 $(BIN)/python -m typer cli.py utils docs --name "python cli.py" --title "The command line" --output docs/cli.md

clean: ## remove .venv and caches of tools; data/ is left alone
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing Icebox into $(VENV): a minute or two, about 3 GB"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Icebox needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	@touch $@
