# All the work is in make.py; without make: `python make.py book`, `python make.py test`, ...
PYTHON ?= python3

.PHONY: book test notebooks nbval lint clean
book test notebooks nbval lint clean:
	@$(PYTHON) make.py $@
