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
N      = 20
SEED   = 0
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
.PHONY: help setup train test ddp zero tp pp ckpt links memory bench-dp bench-tp bench-pp bench-ckpt draw parity fuzz lint clean

help:  ## this
	@echo "make TARGET [PYTHON=...] [PIP_FLAGS=...]; launching targets take NPROC TP PP ARGS, train SCHEDULE too"
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP)  ## .venv with torch, numpy, pytest (unless PYTHON is given)

.venv/installed: requirements.txt
	@echo "Setting up .venv: downloads torch (200 MB for the CPU build, 3 GB on Linux with CUDA),"
	@echo "numpy and pytest. To use a Python that has them: make PYTHON=python3 ..."
	$(PYTHON_FOR_VENV) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

train: $(SETUP)  ## a GPT on 2 x 2 x 2 ranks, to a sample of its text (3 min on 2 cores)
	$(TORCHRUN) $(NPROC) -- train_3d.py --tp $(TP) --pp $(PP) --zero 1 --schedule $(SCHEDULE) \
	  --steps 200 --sample 100 $(ARGS)

test: $(SETUP)  ## the whole suite (7 min)
	$(PY) -m pytest -q $(ARGS)

ddp: NPROC = 2
ddp: $(SETUP)  ## proof of ddp.py beside one process (10 s)
	$(TORCHRUN) $(NPROC) ddp.py

zero: NPROC = 4
zero: $(SETUP)  ## proof of zero.py (10 s)
	$(TORCHRUN) $(NPROC) zero.py

tp: NPROC = 2
tp: $(SETUP)  ## proof of tensor_parallel.py (10 s)
	$(TORCHRUN) $(NPROC) tensor_parallel.py

pp: NPROC = 2
pp: $(SETUP)  ## proof of pipeline.py (10 s)
	$(TORCHRUN) $(NPROC) pipeline.py

ckpt: NPROC = 2
ckpt: $(SETUP)  ## proof of activation_ckpt.py (10 s)
	$(TORCHRUN) $(NPROC) activation_ckpt.py

draw: $(SETUP)  ## a schedule's timeline, bubble and memory: P=4 M=8 SCHEDULE=zb-v (a name, a file, all)
	@$(PY) -m tools.draw $(SCHEDULE) --p $(P) --m $(M) $(ARGS)

links: NPROC = 2
links: $(SETUP)  ## what each collective costs here, by size; OUT=FILE for JSON (10 s)
	$(TORCHRUN) $(NPROC) -m tools.links $(if $(OUT),--out $(OUT))

memory: NPROC = 4
memory: $(SETUP)  ## resident memory by ZeRO stage and recompute policy, beside the formulas (Linux, 1 min)
	$(PY) -m tools.memory --nproc $(NPROC)

bench-dp bench-tp bench-pp bench-ckpt: $(SETUP)  ## ours beside PyTorch's own; OUT=FILE for JSON (9 min)
	$(PY) -m tools.bench $(@:bench-%=%) $(if $(OUT),--out $(OUT)) $(ARGS)

parity: $(SETUP)  ## the layouts of NPROC ranks beside one process, one table (3 min)
	$(PY) -m tools.parity --nproc $(NPROC)

fuzz: $(SETUP)  ## N layouts drawn at random beside one process, from SEED (20 s)
	$(PY) -m tools.fuzz --n $(N) --seed $(SEED)

lint: $(SETUP)  ## ruff, if it is installed
	@$(PY) -m ruff --version > /dev/null || (echo "ruff is optional: $(PY) -m pip install ruff"; exit 1)
	$(PY) -m ruff check .

clean:  ## removes .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
