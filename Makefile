# make prints its targets. Variables change the defaults, and ARGS is passed on, for example
#
#   make train NPROC=4 TP=2 PP=1 ARGS="--steps 50 --zero 0"
#   make test PYTHON=python3                        an interpreter that has torch; installs nothing
#   make test PIP_FLAGS="--extra-index-url URL"     passed on to pip
#
# The lines that start with "#: " are the help. In brackets: the variables that a target uses.

NPROC  = 8
TP     = 2
PP     = 2
P      = 4
M      = 8
SCHEDULE = 1f1b
N      = 50
SEED   = 0
DRILLS = 20
CHECKPOINT =
RUNS   = $(or $(shell ls -t run.jsonl run-[0-9]*.jsonl 2> /dev/null | head -1),run.jsonl)
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
LAUNCH = @$(PY) -m tools.launch
GIVEN_OUT = $(if $(OUT),--out $(OUT))

.DEFAULT_GOAL := help

# Targets that were renamed: the old names still work.
NEW_NAME = $(patsubst zoo,mutants,$(patsubst drill,kill-ranks,$1))

# An unknown target is an error, with a suggestion.
ALL := help zoo drill .venv/installed
ALL += $(shell sed -n 's/^\#:  \([a-z][a-z0-9-]*\).*/\1/p' $(firstword $(MAKEFILE_LIST)))
UNKNOWN := $(firstword $(filter-out $(ALL),$(MAKECMDGOALS)))
ifneq ($(UNKNOWN),)
NEAR := $(shell python3 -c 'import difflib as d, sys; print(*d.get_close_matches(sys.argv[1], \
  sys.argv[2:], 1))' '$(UNKNOWN)' $(ALL))
$(error there is no target $(UNKNOWN)$(if $(NEAR),; the nearest is $(NEAR),: make lists them))
endif

# A variable on the command line that no target uses is an error.
GIVEN := $(strip $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v)))
GIVEN := $(filter-out PYTHON PIP_FLAGS PYTHON_FOR_VENV OMP_NUM_THREADS,$(filter-out -%,$(GIVEN)))
ifneq ($(and $(GIVEN),$(MAKECMDGOALS)),)
HELP_LINE = /^.: +$(goal) .*[[]/
USED := $(strip $(foreach goal,$(call NEW_NAME,$(MAKECMDGOALS)),$(shell awk \
  '$(HELP_LINE) { gsub(/.*[[]|[]].*|=[^] ]*/, ""); print }' $(firstword $(MAKEFILE_LIST)))))
UNUSED := $(filter-out $(USED),$(GIVEN))
ifneq ($(UNUSED),)
FLAGS := $(if $(filter ARGS,$(USED)),. Flags: ARGS="--flag value")
$(error make $(MAKECMDGOALS) does not use $(UNUSED). It uses: $(or $(USED),no variables)$(FLAGS))
endif
endif

help:
	@echo "make TARGET [VARIABLE=VALUE ...]        PYTHON=python3: a Python that has torch, not .venv"
	@echo "The duration is for 2 cores. In brackets: variables and their defaults; ARGS: more flags."
	@sed -n 's/^#://p' $(firstword $(MAKEFILE_LIST))

#:
#: Start
#:  setup             3 min   create .venv with torch, numpy, pytest; other targets do it too
#:  draw              3 s     draw a pipeline schedule  [P=4 M=8 SCHEDULE=1f1b ARGS]
#:  tp                10 s    compare tensor_parallel.py with one process  [NPROC=2]
#:  cp                10 s    compare context_parallel.py with one process  [NPROC=4]
#:  pp                10 s    compare pipeline.py with one process  [NPROC=2]
#:  ddp               10 s    compare ddp.py with one process  [NPROC=4]
#:  zero              10 s    compare ZeRO-1 and ZeRO-2 with one process  [NPROC=4]
#:  zero3             10 s    compare zero3.py with one process  [NPROC=4]
#:  ckpt              10 s    compare activation_ckpt.py with one process  [NPROC=2]
#:  train             3 min   train a GPT on 2 x 2 x 2 ranks  [NPROC=8 TP=2 PP=2 SCHEDULE=1f1b ARGS]
#:  sample            5 s     print text of the newest model of make train  [CHECKPOINT ARGS]
#:  plot              1 s     plot the losses of the newest make train  [RUNS OUT ARGS]

setup: $(SETUP)

.venv/installed: requirements.txt
	@echo "Setting up .venv: downloads torch (200 MB for the CPU build, 3 GB on Linux with CUDA),"
	@echo "numpy and pytest. To use a Python that has them: make PYTHON=python3 ..."
	$(PYTHON_FOR_VENV) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

draw: $(SETUP)
	@$(PY) -m tools.draw $(SCHEDULE) --p $(P) --m $(M) $(ARGS)

cp ddp zero zero3: NPROC = 4
tp pp ckpt: NPROC = 2
tp: FILE = tensor_parallel
cp: FILE = context_parallel
pp: FILE = pipeline
ckpt: FILE = activation_ckpt
ddp zero zero3 tp cp pp ckpt: $(SETUP)
	$(LAUNCH) $(NPROC) $(or $(FILE),$@).py

train: $(SETUP)
	$(LAUNCH) --save $(NPROC) train_3d.py --tp $(TP) --pp $(PP) --zero 1 --schedule $(SCHEDULE) \
	  --steps 200 --sample 100 $(ARGS)

sample: $(SETUP)
	@$(PY) -m tools.sample $(if $(CHECKPOINT),--checkpoint-dir $(CHECKPOINT)) $(ARGS)

plot: $(SETUP)
	@test -e $(firstword $(RUNS)) || { echo "$(firstword $(RUNS)) does not exist: run make train first" >&2; exit 2; }
	@$(PY) -m tools.plot $(RUNS) $(GIVEN_OUT) $(ARGS)

#:
#: Plan
#:  plan              5 s     recommend a layout, with its launch command  [ARGS]
#:                            ARGS="--model gpt-175b --gpus 1024"
#:  dry-run           10 s    count what one rank of 3072 stores, sends and computes  [ARGS]
#:  published         5 s     compare the cost model with published tables  [ARGS]
#:  plan-check        5 min   compare the cost model with this machine  [ARGS]

plan: $(SETUP)
	@$(PY) -m tools.plan.plan $(ARGS)

dry-run: MODEL = --world-size 3072 --rank 1536 --model gpt-1t --tp 8 --pp 64 --global-batch-size 3072
dry-run: $(SETUP)
	$(PY) -m tools.plan.dry_run $(or $(ARGS),$(MODEL) --micro-batch-size 1)

plan-check: MODULE = tools.plan.plan_check
published plan-check: $(SETUP)
	$(PY) -m $(or $(MODULE),tools.plan.published) $(ARGS)

#:
#: Verify
#:  test              5 min   run the fast tests; ARGS=tests/test_zero.py: those of a file  [ARGS]
#:  test-all          15 min  run all tests, as in CI  [ARGS]
#:  parity            5 min   compare all layouts of NPROC ranks with one process  [NPROC=8]
#:  fuzz              1 min   compare N random configurations with one process  [N=50 SEED=0 ARGS]
#:  races             12 min  run each overlapped path N times with random delays  [N=20 SEED=0]
#:  mutants           12 min  insert known bugs one by one; a test must fail for each  [ARGS]
#:  kill-ranks        5 min   kill and resume a run; losses must not change  [NPROC=4 DRILLS=20 ARGS]
#:  two-hosts         1 min   run torchrun on 2 simulated hosts, as root  [ARGS]

test: CHOSEN = -m "not slow"
test test-all: $(SETUP)
	$(PY) -m tests.run $(CHOSEN) $(ARGS)

parity: $(SETUP)
	$(PY) -m tools.verify.parity --nproc $(NPROC)

fuzz: $(SETUP)
	$(PY) -m tools.verify.fuzz --n $(N) --seed $(SEED) $(ARGS)

races: N = 20
races: $(SETUP)
	$(PY) -m tools.verify.races --n $(N) --seed $(SEED)

mutants: $(SETUP)
	$(PY) -m tools.verify.mutants $(ARGS)

kill-ranks: NPROC = 4
kill-ranks: $(SETUP)
	$(PY) -m tools.verify.kill_ranks --drills $(DRILLS) --nproc $(NPROC) $(ARGS)

two-hosts: $(SETUP)
	$(PY) -m tools.verify.two_hosts $(ARGS)

zoo: mutants
drill: kill-ranks

#:
#: Measure
#:  bench-dp          20 min  time a step next to PyTorch's DDP, FSDP and ZeRO  [OUT ARGS]
#:  bench-tp          13 min  time a step next to PyTorch's tensor parallelism  [OUT ARGS]
#:  bench-cp          9 min   time a step with long rows next to PyTorch's ring attention  [OUT ARGS]
#:  bench-pp          21 min  time a step next to PyTorch's pipelines  [OUT ARGS]
#:  bench-3d          9 min   time a step next to PyTorch's 3-D parallelism  [OUT ARGS]
#:  bench-ckpt        9 min   time a step next to PyTorch's activation checkpointing  [OUT ARGS]
#:  bench-checkpoint  8 min   time saving next to PyTorch's DCP and torch.save  [OUT ARGS]
#:  links             15 s    time each collective on this machine, by size  [NPROC=2 OUT ARGS]
#:  growth            4 min   time steps over layers, microbatches, ranks and schedules  [OUT ARGS]
#:  memory            3 min   measure memory: ZeRO, recomputation, long rows (Linux)  [NPROC=4 OUT]
#:  hierarchy         3 min   time traffic between simulated hosts, as root  [OUT ARGS]
#:  gpu-check         5 min   compare one GPU with a bare loop  [OUT ARGS]
#:  gpu-drill         10 min  check NCCL on one GPU; ARGS: names of checks  [OUT ARGS]
#:  node              30 min  measure a node of NPROC GPUs  [NPROC=8 OUT ARGS]

bench-checkpoint: BENCH = tools.bench.checkpoint
bench-dp bench-tp bench-cp bench-pp bench-3d bench-ckpt bench-checkpoint: $(SETUP)
	$(PY) -m $(or $(BENCH),tools.bench.compare $(@:bench-%=%)) $(GIVEN_OUT) $(ARGS)

links: NPROC = 2
links: $(SETUP)
	$(LAUNCH) $(NPROC) -m tools.bench.links $(GIVEN_OUT) $(ARGS)

growth: $(SETUP)
	$(PY) -m tools.bench.growth $(GIVEN_OUT) $(ARGS)

memory: NPROC = 4
memory: $(SETUP)
	$(PY) -m tools.bench.memory --nproc $(NPROC) $(GIVEN_OUT)

hierarchy: $(SETUP)
	$(PY) -m tools.bench.hierarchy $(GIVEN_OUT) $(ARGS)

gpu-check: $(SETUP)
	$(PY) -m tools.bench.gpu_check $(GIVEN_OUT) $(ARGS)

gpu-drill: $(SETUP)
	PYTHON=$(PY) tools/bench/gpu_drill.sh $(or $(OUT),gpu_drill.md) $(ARGS)

node: $(SETUP)
	$(PY) -m tools.bench.node --nproc $(NPROC) $(GIVEN_OUT) $(ARGS)

#:
#: Develop
#:  figures           1 s     draw the pictures of README and docs again: docs/img  [ARGS]
#:  tables            1 s     write the tables of README and docs from docs/bench again
#:  transcripts       20 min  rerun the commands of README and docs, update their output  [ARGS]
#:  lint              1 s     run ruff, if it is installed
#:  clean             1 s     remove .venv and caches; keep checkpoints and losses

figures: $(SETUP)
	$(PY) -m tools.figures $(ARGS)

tables: $(SETUP)
	$(PY) -m tools.bench.tables

transcripts: $(SETUP)
	$(PY) -m tools.transcripts $(ARGS)

lint: $(SETUP)
	@$(PY) -m ruff --version > /dev/null || (echo "ruff is optional: $(PY) -m pip install ruff"; exit 1)
	$(PY) -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup draw tp cp pp ddp zero zero3 ckpt train sample plot
.PHONY: plan dry-run published plan-check test test-all parity fuzz races mutants zoo kill-ranks drill
.PHONY: bench-dp bench-tp bench-cp bench-pp bench-3d bench-ckpt bench-checkpoint links memory
.PHONY: two-hosts hierarchy gpu-check gpu-drill node figures tables transcripts lint
.PHONY: growth clean
