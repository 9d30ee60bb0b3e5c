#!/usr/bin/env bash
# A newcomer's first hour, from a clone to a recovered model of one's own, by commands alone. Prints how long each took.
#
#   tests/first_hour.sh [DIR]          DIR: where everything is written; by default a new temporary directory
#
# Set PIP_ARGS as for make. The clone is this script's own checkout, copied, so that nothing that is installed there helps.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
export XDG_CACHE_HOME="$work/cache" REMEND_CACHE="$work/cache/remend"
total=0

step() {
    local title=$1 began=$SECONDS
    shift
    echo "== $title: $*"
    "$@"
    echo "== $((SECONDS - began)) s: $title"
    total=$((total + SECONDS - began))
}

fail() {
    echo "failed: $1" >&2
    exit 1
}

git clone --quiet "$source" "$work/remend"
cd "$work/remend"
step "install" make .venv/ready PIP_ARGS="${PIP_ARGS:-}"
export PATH="$work/remend/.venv/bin:$PATH"
cd "$work"

step "demo" remend demo --out runs/demo
step "a damaged student" remend degrade quantize smollm2 --format int4-g32-sym --no-probe --out student
step "check" remend check --student student --teacher smollm2 --steps 8
step "recover without data" remend recover --student student --teacher smollm2 --steps 8 --out runs/own

# data as people have it: the recipe's sample of prompts in three other forms
remend recipes cp recover .
python - <<'PY'
import csv, json
from datasets import Dataset

prompts = [json.loads(line)["prompt"] for line in open("prompts.jsonl", encoding="utf-8")][:48]
with open("questions.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerows([["question"], *([prompt] for prompt in prompts)])
with open("sharegpt.json", "w", encoding="utf-8") as file:
    talks = [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": "Yes."}]} for p in prompts]
    json.dump(talks, file)
Dataset.from_list([{"prompt": prompt} for prompt in prompts]).to_parquet("prompts.parquet")
PY
short=(--student student --teacher smollm2 --steps 2 --no-repair --max-new-tokens 16)
step "from CSV" remend recover "${short[@]}" --data questions.csv --columns prompt=question --out runs/csv
step "from ShareGPT" remend recover "${short[@]}" --data sharegpt.json --out runs/sharegpt
step "from parquet" remend recover "${short[@]}" --data prompts.parquet --out runs/parquet

# Ctrl-C after the first checkpoint, then on from another directory
interrupted() {
    set +e
    # a job in the background of a script ignores Ctrl-C unless it is told otherwise
    python - "$@" <<'PY'
import os, signal, subprocess, sys, time

run = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
while run.poll() is None and not (os.path.isdir("runs/stopped/checkpoints") and os.listdir("runs/stopped/checkpoints")):
    time.sleep(0.2)
run.send_signal(signal.SIGINT)
sys.exit(0 if run.wait() == 130 else 1)
PY
    local code=$?
    set -e
    return $code
}
long=(--student student --teacher smollm2 --data prompts.parquet --steps 12 --no-repair --max-new-tokens 16)
step "Ctrl-C" interrupted remend recover "${long[@]}" --save-every 2 --out runs/stopped
[ ! -e runs/stopped/summary.json ] || fail "the run ended before it was interrupted"
(cd / && step "resume from another directory" remend recover --resume "$work/runs/stopped")
[ -e runs/stopped/summary.json ] || fail "the resumed run has no summary"

step "export" remend export runs/own --format compressed-tensors --out served
step "report" remend report runs/csv runs/sharegpt --out runs/compared
for page in runs/own/report.html runs/compared/report.html served/README.md runs/own/model/README.md; do
    [ -s "$page" ] || fail "$page is missing"
done
echo "all of it: $((SECONDS / 60)) min; everything is in $work"
