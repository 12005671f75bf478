# One verb each. Everything happens in $(VENV); no compiler beyond g++ or clang++, no torch and no nvcc need be there before.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# A process a core; tests move to the process that has none left.
SPREAD := --numprocesses auto --maxprocesses 8 --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo faults recipes test slowest check lint types docs bench evidence scaling quality time-to-quality slow wheel soak cuda \
	arm gpu-static clean

help:   ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/ready  ## the environment, with fastgan and the developers' tools installed in it

# Two stamps: a demo needs fastgan alone, not the tools that check it. What was set up for more serves for less.
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
RUNTIME := $(or $(wildcard $(VENV)/ready),$(VENV)/installed)

$(VENV)/installed $(VENV)/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@

$(VENV)/ready: EXTRAS := [dev]
# Tests compile the kernels of every CPU, whichever this one is.
$(VENV)/ready: export FASTGAN_TABLES = all

demo: $(RUNTIME)  ## train a GAN on bundled photographs of garments, a few minutes on 2 cores, into runs/demo
	$(BIN)/fastgan train --recipe dcgan-28 --data fashion-mnist --out runs/demo --overwrite \
		--batch-size 32 --steps 6000 --time-limit 240 --set "model_options={'g_width':32,'d_width':32}" \
		--set g_lr=5e-4 --set d_lr=5e-4 --set betas=0.5,0.999 --set ema=0.995 --set sample_every=500

# What runs/recipes trains: recipe, options that make it small enough for minutes on 2 cores, further settings.
define RECIPES
wgan-gp-28  {'dropout':0.0,'g_width':32,'d_width':32} --set g_lr=2e-4 --set d_lr=2e-4
wgan-gp-64  {'d_norm':False,'g_width':32,'d_width':32} --set g_lr=2e-4 --set d_lr=2e-4 --batch-size 32
r1-dcgan-64 {'d_norm':False,'g_width':32,'d_width':32} --set g_lr=2e-4 --set d_lr=2e-4 --set ema=0.99
sngan-32    {'g_width':32,'d_width':32} --batch-size 32
r3gan-small {'g_width':48,'d_width':48} --set g_lr=4e-4 --set d_lr=4e-4 --set ema=0.99
sagan-32    {'g_width':32,'d_width':32} --batch-size 32 --conditional
vit-gan-small {'g_width':32,'d_width':64,'depth':3} --set g_lr=4e-4 --set d_lr=4e-4 --set ema=0.99
endef
export RECIPES
LIMIT ?= 300

recipes: setup  ## train the penalty recipes at reduced width, five minutes each, into runs/recipes
	@echo "$$RECIPES" | while read -r name options settings; do \
		$(BIN)/fastgan train --recipe $$name --out runs/recipes/$$name --overwrite \
			--time-limit $(LIMIT) --set sample_every=0 --set "model_options=$$options" $$settings || exit 1; \
	done

# The product's own tests, run once more on the kernels of an ordinary laptop. Kernel tests run every table by themselves.
HELD := $(addprefix tests/test_,adam bias_act bn_act conv1d conv2d conv2d_weight conv_transpose2d convert gan_loss gn_act \
	linearised models nn penalties program step step_outputs strides trainer)

test: check  ## everything that CI runs: lint, types, docs, tests
	$(BIN)/python -m pytest -q -m "not slow" --durations 20 --junitxml build/tests.xml $(SPREAD)
	$(BIN)/python -m pytest -q -m "not slow" --kernels avx2 $(SPREAD) $(HELD:%=%.py)

slowest:  ## the twenty slowest tests of the last `make test`, into docs/evidence/tests.md
	$(BIN)/python tests/slowest.py

check: lint types docs

lint: setup  ## ruff, ruff format, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh')

types: setup  ## mypy on fastgan/
	$(BIN)/mypy

docs: setup  ## the documentation, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup  ## every benchmark against tuned PyTorch, under 10 minutes on 2 cores
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

evidence: setup  ## docs/evidence, and the tables of README and docs/performance.md, from benchmarks/results
	$(BIN)/python benchmarks/report.py

scaling: setup  ## the training step over batch size, image size and threads, 12 minutes; a picture in docs/images
	$(BIN)/pip install --quiet --constraint constraints.txt matplotlib
	$(BIN)/python benchmarks/scaling.py

quality: setup  ## five seeds in float32 PyTorch and in bf16 fastgan, about 12 minutes; a verdict and a picture
	$(BIN)/python benchmarks/quality.py

time-to-quality: setup  ## seconds until the same kernel distance, PyTorch and fastgan, three seeds, about 4 minutes; a picture
	$(BIN)/pip install --quiet --constraint constraints.txt matplotlib
	$(BIN)/python benchmarks/time_to_quality.py --png docs/images/time-to-quality.png

faults: setup  ## every call that writes a run's files interrupted once, the disk full at each, twenty kills
	$(BIN)/python -m pytest -q tests/faults

slow: setup  ## the long sweeps that `make test` leaves out, and `make cuda` where nvcc is found
	$(BIN)/python -m pytest -q -m slow $(SPREAD)
	if command -v nvcc; then $(MAKE) cuda; else echo "no nvcc here: csrc/cuda was not built ahead of time"; fi

MINUTES ?= 120

soak: setup  ## a run of MINUTES (120), and the slope of its memory: fails from 1 MB an hour on
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

# What a wheel's tests run in: the checkout without the package, so that only the installed one can be found.
AWAY  := $(or $(TMPDIR),/tmp)/fastgan-wheel
TESTS ?= tests

wheel: setup  ## dist/: an sdist and a wheel built from it; installed by itself it passes TESTS (all that are not slow)
	$(BIN)/pip install --quiet build auditwheel
	rm -rf dist $(AWAY)
	FASTGAN_TABLES=all $(BIN)/python -m build --outdir dist
	$(BIN)/auditwheel show dist/*.whl
	mkdir -p $(AWAY)
	git ls-files -z | grep -zvE '^(fastgan|kernels)/' | tar --create --null --files-from - | tar --extract --directory $(AWAY)
	$(PYTHON) -m venv $(AWAY)/venv
	$(AWAY)/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl pytest-xdist pybind11
	cd $(AWAY) && venv/bin/python -I -c "import fastgan; print(fastgan.__file__, fastgan.backends()['conv2d']['native'])"
	cd $(AWAY) && venv/bin/pytest -q -m "not slow" $(SPREAD) $(TESTS)

cuda: setup  ## every CUDA kernel built ahead of time by nvcc, as in a wheel, beside the installed core
	FASTGAN_CUDA=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/cuda
	cd build/cuda/fastgan && $(abspath $(BIN))/python -c "import torch, _C; print(_C.build_info()['cuda'])"

ARM     ?= aarch64-linux-gnu-g++
PROGRAM := build/aarch64/convolutions

arm:  ## the portable kernels compiled for aarch64, and their convolutions run under qemu against sums in double
	@command -v $(ARM) qemu-aarch64 >/dev/null || { echo "make arm needs a cross compiler and an emulator:" \
		"apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	mkdir -p $(dir $(PROGRAM))
	$(ARM) -std=c++20 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -fopenmp -static \
		-DISA=portable -Icsrc tests/emulation/aarch64/convolutions.cpp csrc/dispatch.cpp csrc/cpu/*.cpp -o $(PROGRAM)
	qemu-aarch64 $(PROGRAM)

gpu-static: setup  ## every GPU kernel compiled for every card, checked; writes the tables in docs/evidence/gpu-compiled.md
	$(BIN)/python tests/emulation/triton_static.py
	$(BIN)/python tests/emulation/cuda_static.py

clean:  ## the environment and everything built
	rm -rf $(VENV) build site runs *.egg-info fastgan/_C*.so
