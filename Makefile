# make setup [EXTRAS=dev,…]   .venv with everything; does nothing the second time
# make demo                   set-up, then train and show a tool-using agent (minutes, two cores, no GPU)
# make test                   set-up, lint, types and tests
#
# PYTHON=…       the interpreter of .venv (3.11 or newer)
# TORCH_SPEC=…   torch's requirement, TORCH_INDEX=… the index it comes from (both have working defaults)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
PYTHON ?=
EXTRAS ?=
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
AREAL_DEMO_START ?= $(shell date +%s)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

comma := ,
stamp = .venv/.setup$(if $(1),-$(subst $(comma),-,$(1)))
# pip repeats a warning for each unreachable place of its configuration; everything else it says is passed on.
PIP := pip() { "$(PY)" -m pip "$$@" 2> >(grep -v "is ignored: it is " >&2); }

.PHONY: help setup system demo test lint ci clean
help:
	@sed -n 's/^# \?//p;/^$$/q' Makefile

setup: $(call stamp,$(EXTRAS))

.venv/.setup%: export EXTRAS := $(EXTRAS)
$(call stamp,$(EXTRAS)): pyproject.toml .venv/.torch
	@$(PIP)
	echo "setup: installing areal-agents$(if $(EXTRAS),[$(EXTRAS)]) and its dependencies"
	pip install -q -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	touch $@

# Without a GPU, torch's CPU build: a CUDA build would add gigabytes. pip's default place is asked first (some mirrors
# hold CPU builds); where that build wants CUDA packages, PyTorch's CPU index is taken.
.venv/.torch: .venv/.created
	@$(PIP)
	spec='$(TORCH_SPEC)'; index='$(TORCH_INDEX)'
	if [[ -z "$$index" ]] && ! nvidia-smi >/dev/null 2>&1; then
	  pip install -q --dry-run --ignore-installed --no-deps --report .venv/torch.json "$$spec" || index='$(CPU_INDEX)'
	  if [[ -z "$$index" ]] && ! "$(PY)" - .venv/torch.json <<'PYTHON'
	import json, sys
	from pip._vendor.packaging.requirements import Requirement
	wheel = json.load(open(sys.argv[1]))["install"][0]
	needs = [Requirement(r) for r in wheel["metadata"].get("requires_dist", [])]
	needs = [r.name.lower() for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
	sys.exit(any(name.startswith(("nvidia", "cuda")) for name in needs))
	PYTHON
	  then index='$(CPU_INDEX)'; fi
	fi
	echo "setup: installing $$spec from $${index:-pip's default index} (large; takes a minute or more)"
	pip install -q "$$spec" $${index:+--index-url "$$index"} || { echo "error: $$spec could not be installed from $${index:-pip's default index}. Set TORCH_INDEX to an index you can reach, or TORCH_SPEC to a version it has." >&2; exit 1; }
	touch $@

.venv/.created:
	@$(MAKE) system
	for p in "$(PYTHON)" /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
	  if [[ -n "$$p" ]] && "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	    echo "setup: making .venv with $$("$$p" -V)"
	    "$$p" -m venv .venv
	    touch $@
	    exit 0
	  fi
	done
	echo "error: no Python 3.11 or newer with venv was found. Install one (Debian, Ubuntu: python3.11 and python3.11-venv or newer) or set PYTHON=/path/to/python3" >&2
	exit 1

# The system's Python is tried first: the sandbox tests change to a plain user, who cannot run one below /root.
# As root with apt-get the missing system packages are installed; otherwise they are named.
system:
	@missing=()
	command -v bwrap >/dev/null || missing+=(bubblewrap)
	[[ $$(uname) != Linux ]] || /sbin/ldconfig -p | grep -q 'libseccomp\.so\.2' || missing+=(libseccomp2)
	usable=no
	for p in "$(PYTHON)" /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
	  if [[ -n "$$p" ]] && "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then usable=yes; break; fi
	done
	[[ $$usable == yes ]] || missing+=(python3 python3-venv)
	if (( $${#missing[@]} == 0 )); then exit 0; fi
	if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then
	  echo "setup: installing system packages: $${missing[*]}"
	  apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null
	else
	  echo "error: system packages are missing: $${missing[*]}" >&2
	  echo "Install them, then run make again (Debian, Ubuntu: sudo apt-get install -y $${missing[*]})" >&2
	  exit 1
	fi

demo: $(call stamp,$(EXTRAS))
	@.venv/bin/areal-agents model pull smollm2
	AREAL_DEMO_START=$(AREAL_DEMO_START) $(PY) benchmarks/demo.py --seed 0 --out runs/demo

lint: $(call stamp,dev)
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test:
	@$(MAKE) setup EXTRAS=dev
	$(MAKE) EXTRAS=dev lint
	.venv/bin/areal-agents model pull smollm2
	$(PY) -m pytest --durations=15

ci: test

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
