# make run PROMPT="a red apple"    a picture from the demo model, torch-free
# make test                        the development environment and every quick test
# make check, slow, exhaustive, triton-check, soak, gpu-check, wheel-check, newest-check, demo, demo-teacher: see each
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PROMPT ?= a red apple
export OUTPUT ?= out/picture.png
SLOW ?= tests
# Tests side by side, a file in one process; each takes one core and 1.5 GB, of the slow ones up to 6 GB.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile
QUICK := not slow and not exhaustive and not gpu and not triton
# What touches diffusers or transformers; the runtime imports neither, and of the export one whole run is enough.
NEWEST_TESTS ?= tests/bksdm tests/evaluation tests/training $(addprefix tests/export/test_,reference.py wrappers.py \
	cli.py::test_an_export_prints_a_table_and_the_path)
RUN := .venv-run
DEV := .venv
NEWEST := .venv-newest
GPU := .venv-gpu
TRITON := .venv-triton
BIN := $(DEV)/bin

.PHONY: run test check format lint types contracts slow exhaustive triton-check soak gpu-check wheel-check newest-check demo demo-teacher clean

run: $(RUN)/.ready
	@mkdir -p "$$(dirname "$$OUTPUT")"
	@$(RUN)/bin/bksdm-run -o "$$OUTPUT" -- "$$PROMPT"

test: $(DEV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "$(QUICK)"

check: format lint types contracts test

format: $(DEV)/.ready
	$(BIN)/ruff format --check .

lint: $(DEV)/.ready
	$(BIN)/ruff check .

types: $(DEV)/.ready
	$(BIN)/basedpyright

contracts: $(DEV)/.ready
	$(BIN)/lint-imports

slow: $(DEV)/.ready           # full-size graphs, kills, whole trainings: minutes and gigabytes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --no-loadscope-reorder -m slow $(SLOW)

exhaustive: $(DEV)/.ready     # every size and variant of what `slow` has a few of
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --no-loadscope-reorder -m exhaustive

triton-check: $(DEV)/.ready $(TRITON)/.ready   # the model repository on a real tritonserver, without a container
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m triton tests/triton

soak: $(DEV)/.ready $(TRITON)/.ready           # 15 minutes of mixed load on it; triton-check has two
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/serving.py soak

gpu-check: $(GPU)/.ready      # what needs a CUDA device; each test's name as it ends
	@$(GPU)/bin/python -c "from bksdm_runtime.engine import has_cuda; raise SystemExit(None if has_cuda() else 'gpu-check: no CUDA device here, nothing was checked')"
	$(GPU)/bin/python -m pytest -v -m gpu

wheel-check: $(DEV)/.ready    # what a user installs: the wheel with one extra, in an empty environment, on each Python
	DEV="$(DEV)" bash .ci/wheel-check

newest-check: $(NEWEST)/.ready   # the newest diffusers and transformers, which exclude Optimum
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(SIDE_BY_SIDE) -m "$(QUICK)" $(NEWEST_TESTS)

# The runtime's environment: numpy, pillow, tokenizers, onnxruntime; no torch.
$(RUN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(RUN)
	$(RUN)/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu]"
	@touch $@

# torch first and by its version, so that no other package picks a build for you.
$(DEV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DEV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(NEWEST)/.ready: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $$(grep '^torch==' constraints-newest.txt)
	$(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[export,training,evaluation]" pytest pytest-xdist hypothesis scipy
	@touch $@

# onnxruntime and onnxruntime-gpu share their files: one goes before the other comes.
$(GPU)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(GPU)
	$(GPU)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(GPU)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(GPU)/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(GPU)/bin/python -m pip install --quiet -c constraints.txt -e ".[cuda]"
	-$(GPU)/bin/python -m pip install --quiet "tensorrt>=10"   # from NVIDIA's own index; its tests are left out without it
	@touch $@

# tritonserver 2.51 and its Python backend; what its models import is the runtime alone.
$(TRITON)/.ready: pyproject.toml constraints-triton.txt
	$(PYTHON) -m venv --clear $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --no-deps $$(grep '^nvidia-pytriton==' constraints-triton.txt)
	$(TRITON)/bin/python -m pip install --quiet -c constraints-triton.txt -e ".[cpu]"
	@touch $@

demo: $(DEV)/.ready           # distil the demo, its teacher's small student, anew and put it in its two places
	test -d data/emoji || $(BIN)/bksdm-train data -o data/emoji --sources fluent --groups animals-nature,food-drink
	$(BIN)/bksdm-train cache --teacher checkpoints/demo-teacher --data data/emoji/train -o runs/demo-cache --no-flip
	$(BIN)/bksdm-train distill --variant small --teacher checkpoints/demo-teacher --data runs/demo-cache -o runs/demo \
		--steps 1500 --batch-size 64 --learning-rate 4e-4 --warmup 100 --decay-share 0.25 --ema-decay 0.999 \
		--snr-gamma 5 --caption-dropout 0.1 --no-flip --seed 7 --checkpoint-every 250
	rm -rf checkpoints/.demo && cp -r runs/demo/checkpoint checkpoints/.demo
	cp checkpoints/demo/README.md runs/demo/training.json runs/demo/loss.png checkpoints/.demo/
	rm -rf checkpoints/demo && mv checkpoints/.demo checkpoints/demo
	$(BIN)/bksdm-export --weights demo --storage fp16 -o runtime/bksdm_runtime/demo --force
	$(BIN)/bksdm-eval retrieval --data data/emoji/train -o checkpoints/demo/retrieval.json
	$(BIN)/bksdm-eval student checkpoints/demo --teacher checkpoints/demo-teacher --data data/emoji \
		--grid checkpoints/demo/samples.png -o checkpoints/demo/scores.json

demo-teacher: $(DEV)/.ready   # train the demo's teacher anew, in the two runs that made it: four hours of a CPU core
	test -d data/emoji || $(BIN)/bksdm-train data -o data/emoji --sources fluent --groups animals-nature,food-drink
	$(BIN)/bksdm-train teacher --data data/emoji -o runs/demo-first --preset cpu --threads 1
	$(BIN)/bksdm-train teacher --data data/emoji -o runs/demo-teacher --preset family --init runs/demo-first/checkpoint \
		--unet-steps 4500 --threads 1
	rm -rf checkpoints/.teacher && cp -r runs/demo-teacher/checkpoint checkpoints/.teacher
	cp checkpoints/demo-teacher/README.md runs/demo-teacher/training.json runs/demo-teacher/*.png checkpoints/.teacher/
	rm -rf checkpoints/demo-teacher && mv checkpoints/.teacher checkpoints/demo-teacher
	$(BIN)/bksdm-eval student checkpoints/demo-teacher --teacher checkpoints/demo-teacher --data data/emoji \
		-o checkpoints/demo-teacher/scores.json

clean:
	rm -rf $(RUN) $(DEV) $(NEWEST) $(GPU) $(TRITON) dist build .pytest_cache .ruff_cache
