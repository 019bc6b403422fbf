# make: this help. Every target prints the command that it runs; copy it, change it.
#
#   make train NPROC=4 TP=2 PP=1 ARGS="--steps 50 --zero 0"
#   make test PYTHON=python3                        an interpreter that has torch; installs nothing
#   make test PIP_FLAGS="--extra-index-url URL"     passed on to pip

NPROC  = 8
TP     = 2
PP     = 2
P      = 4
M      = 8
SCHEDULE = 1f1b
N      = 50
SEED   = 0
DRILLS = 20
CHECKPOINT = checkpoints
RUNS   = run.jsonl
OUT    =
ARGS   =

ifdef PYTHON
PY    := $(PYTHON)
SETUP :=
else
PYTHON_FOR_VENV = python3
PY    := .venv/bin/python
SETUP := .venv/installed
endif

# One thread a rank: ranks share the cores already.
export OMP_NUM_THREADS = 1
TORCHRUN = $(PY) -m torch.distributed.run --standalone --nproc-per-node

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all sample ddp zero zero3 tp pp ckpt draw links memory parity fuzz zoo races drill
.PHONY: plan published plan-check dry-run two-hosts hierarchy gpu-check gpu-drill node plot figures lint clean
.PHONY: bench-dp bench-tp bench-pp bench-3d bench-ckpt bench-checkpoint

help:
	@echo "make TARGET [PYTHON=...] [PIP_FLAGS=...]; launching targets take NPROC TP PP ARGS, train SCHEDULE too"
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP)  ## .venv with torch, numpy, pytest (unless PYTHON is given)

.venv/installed: requirements.txt
	@echo "Setting up .venv: downloads torch (200 MB for the CPU build, 3 GB on Linux with CUDA),"
	@echo "numpy and pytest. To use a Python that has them: make PYTHON=python3 ..."
	$(PYTHON_FOR_VENV) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

train: $(SETUP)  ## train a GPT on 2 x 2 x 2 ranks and print a sample of its text (3 min on 2 cores)
	$(TORCHRUN) $(NPROC) -- train_3d.py --tp $(TP) --pp $(PP) --zero 1 --schedule $(SCHEDULE) \
	  --steps 200 --sample 100 $(ARGS)

sample: $(SETUP)  ## print text from a checkpoint: CHECKPOINT=DIR ARGS="--prompt 'def ' --top-k 40 --n 200"
	$(PY) -m tools.sample $(if $(findstring --init-from,$(ARGS)),,--checkpoint-dir $(CHECKPOINT)) $(ARGS)

test: CHOSEN = -m "not slow"
test test-all: $(SETUP)  ## the fast tests (3 to 5 min on 2 cores); all tests, as in CI (10 to 15 min)
	$(PY) -m tests.run $(CHOSEN) $(ARGS)

ddp zero zero3 tp pp ckpt: NPROC = $(if $(filter ddp zero zero3,$@),4,2)
tp: FILE = tensor_parallel
pp: FILE = pipeline
ckpt: FILE = activation_ckpt
ddp zero zero3 tp pp ckpt: $(SETUP)  ## compare a strategy file with one process (10 s)
	$(TORCHRUN) $(NPROC) $(or $(FILE),$@).py

draw: $(SETUP)  ## draw a schedule, with bubble and memory: P=4 M=8 SCHEDULE=zb-v (name, file, all) ARGS="--svg FILE"
	@$(PY) -m tools.draw $(SCHEDULE) --p $(P) --m $(M) $(ARGS)

links: NPROC = 2
links: $(SETUP)  ## time each collective on this machine, by size; OUT=FILE for JSON (10 s)
	$(TORCHRUN) $(NPROC) -m tools.bench.links $(if $(OUT),--out $(OUT))

memory: NPROC = 4
memory: $(SETUP)  ## resident memory by ZeRO stage and recompute policy, measured and predicted (Linux, 1 min)
	$(PY) -m tools.bench.memory --nproc $(NPROC)

bench-checkpoint: BENCH = tools.bench.checkpoint
bench-dp bench-tp bench-pp bench-3d bench-ckpt bench-checkpoint: $(SETUP)  ## step time compared with PyTorch's implementation; OUT=FILE (9 min)
	$(PY) -m $(or $(BENCH),tools.bench.compare $(@:bench-%=%)) $(if $(OUT),--out $(OUT)) $(ARGS)

parity: $(SETUP)  ## compare all layouts of NPROC ranks with one process, in one table (3 min)
	$(PY) -m tools.verify.parity --nproc $(NPROC)

fuzz: $(SETUP)  ## compare N random configurations with one process, from SEED (1 min)
	$(PY) -m tools.verify.fuzz --n $(N) --seed $(SEED) $(ARGS)

zoo: $(SETUP)  ## insert known bugs one by one into a copy and check that a test fails: ARGS="--only 9" (12 min)
	$(PY) -m tools.verify.mutants $(ARGS)

races: N = 20
races: $(SETUP)  ## N runs of each overlapped path under random delays, compared bit by bit (12 min)
	$(PY) -m tools.verify.races --n $(N) --seed $(SEED)

drill: NPROC = 4
drill: $(SETUP)  ## kill DRILLS ranks of a run at random and compare its losses with an undisturbed run (5 min)
	$(PY) -m tools.verify.kill_ranks --drills $(DRILLS) --nproc $(NPROC) $(ARGS)

plan: $(SETUP)  ## the recipe, the best layout and its launch command: ARGS="--model gpt-175b --gpus 1024"
	@$(PY) -m tools.plan.plan $(ARGS)

plan-check: MODULE = tools.plan.plan_check
published plan-check: $(SETUP)  ## compare the cost model with published tables (30 s); with this machine (5 min)
	$(PY) -m $(or $(MODULE),tools.plan.published) $(ARGS)

dry-run: MODEL = --world-size 3072 --rank 1536 --model gpt-1t --tp 8 --pp 64 --global-batch-size 3072
dry-run: $(SETUP)  ## run one rank of 3072 without memory and count its operations; ARGS for another run (1 min)
	$(PY) train_3d.py --dry-run $(or $(ARGS),$(MODEL) --micro-batch-size 1)

two-hosts hierarchy: $(SETUP)  ## torchrun on 2 simulated hosts; traffic and time between hosts (as root; 1, 3 min)
	$(PY) -m tools.bench.$(subst -,_,$@) $(if $(OUT),--out $(OUT)) $(ARGS)

gpu-drill: GPU_DRILL = PYTHON=$(PY) tools/bench/gpu_drill.sh $(or $(OUT),gpu_drill.md) $(ARGS)
gpu-check gpu-drill node: $(SETUP)  ## one GPU compared with a bare loop; NCCL on one GPU; NPROC GPUs: OUT=FILE (5, 10, 30 min)
	$(or $(GPU_DRILL),$(PY) -m tools.bench.$(subst -,_,$@) $(if $(filter node,$@),--nproc $(NPROC)) $(if $(OUT),--out $(OUT)) $(ARGS))

plot: $(SETUP)  ## plot losses over tokens, as SVG: RUNS="a.jsonl b.jsonl" OUT=runs.svg
	$(PY) -m tools.plot $(RUNS) $(if $(OUT),--out $(OUT))

figures: $(SETUP)  ## draw the pictures of README and docs again: docs/img/*.svg
	$(PY) -m tools.figures $(ARGS)

lint: $(SETUP)  ## ruff, if it is installed
	@$(PY) -m ruff --version > /dev/null || (echo "ruff is optional: $(PY) -m pip install ruff"; exit 1)
	$(PY) -m ruff check .

clean:  ## removes .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
