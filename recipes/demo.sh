#!/bin/sh
# The whole way on a real 135M-parameter model, on any machine: quantize, measure, write text.
# `make demo` calls this with the virtual environment's commands first on PATH.
set -eu
mkdir -p demo

echo "== What this machine can do"
compress doctor

echo "== Quantize SmolLM2-135M to 4 bits with GPTQ, calibrated on its own text"
compress run recipes/gptq-w4.yaml --out demo/smollm2-gptq-w4 --overwrite

echo "== What the checkpoint holds"
compress inspect demo/smollm2-gptq-w4

echo "== What it cost, on Python's own documentation (a text that every Python carries)"
python -c 'import pydoc_data.topics as t; print(*t.topics.values(), sep="\n")' > demo/python-docs.txt
compress eval demo/smollm2-gptq-w4 --against smollm2 --text demo/python-docs.txt --windows 16

echo "The page demo/smollm2-gptq-w4/report.html shows it all"

echo "== And it writes"
compress generate demo/smollm2-gptq-w4 --chat --prompt "What is the capital of France?" --max-tokens 40
