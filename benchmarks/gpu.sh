#!/usr/bin/env bash
# What to run when a GPU is lent, the most valuable first.
#
#   benchmarks/gpu.sh list              the parts, in order
#   benchmarks/gpu.sh cells [PART ...]  the names of their cells, as patterns
#   benchmarks/gpu.sh plan [PART ...]   what each part would run, and its cost; nothing is written
#   benchmarks/gpu.sh run [PART ...]    all parts or some, each for less than nine minutes
#
# A part that is stopped goes on when it is run again: finished cells stay, and trainings have checkpoints. What is done
# is kept as JSON: RUNS/paper-small/records has a file a cell and results.json the whole. With KEEP=FOLDER both are copied
# there after each part, the records as one archive. Records that are committed count as done.
#
#   RUNS=runs JOBS=4 SECONDS_EACH=480 KEEP= REMEND=remend     may be set before the command
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs}
JOBS=${JOBS:-4}
SECONDS_EACH=${SECONDS_EACH:-480}
KEEP=${KEEP:-}
REMEND=${REMEND:-remend}
STUDY=paper-small
COMMITTED=docs/measurements/records/$STUDY
LAST=45 # seconds after the limit in which a study gathers what there is

PARTS=(named paper base forgetting removed sparse science rest)

# The cells of a part, one pattern a line.
cells_of() {
  local group method
  case $1 in
    named) # three seeds of what the claims rest on
      for group in nf4 int3-g64 ffn-10; do
        for method in repair sft sdft repair-sdft; do echo "$group-tooluse-short/$method/*"; done
      done ;;
    paper) # off- then on-policy, as the paper does it
      for group in nf4 int3-g64 ffn-10; do echo "$group-tooluse-short/off-then-on/*"; done ;;
    base) # the base as teacher, beside the expert of repair-sdft
      for group in nf4 int3-g64 ffn-10; do echo "$group-tooluse-short/base-sdft/*"; done ;;
    forgetting)
      for method in sft off-policy sdft off-then-on; do echo "forgetting-tooluse-short/$method/*"; done ;;
    removed) # the rivals for removed layers among them
      for method in sft repair sdft repair-sdft off-then-on last-sft-teacher last-sdft; do
        echo "depth-5-tooluse-short/$method/0"
      done ;;
    sparse)
      for method in sft repair sdft repair-sdft off-then-on; do echo "wanda-2-4-tooluse-short/$method/0"; done ;;
    science)
      for group in nf4 int3-g64 ffn-10; do echo "$group-science-short/*/0"; done ;;
    rest) echo "*" ;;
    *) echo "unknown part $1; known: ${PARTS[*]}" >&2; return 2 ;;
  esac
}

# The words of the study's command line for a part.
words_of() {
  local pattern
  printf '%s\n' study "$STUDY" --out "$RUNS/$STUDY"
  while IFS= read -r pattern; do printf '%s\n' --only "$pattern"; done <<<"$(cells_of "$1")"
}

plan() {
  local words
  mapfile -t words < <(words_of "$1")
  "$REMEND" "${words[@]}" --dry-run | grep ' cells, '
}

run() {
  local words code=0
  mapfile -t words < <(words_of "$1")
  timeout --signal=INT --kill-after="$LAST" "$SECONDS_EACH" \
    "$REMEND" "${words[@]}" --from "$COMMITTED" --jobs "$JOBS" || code=$?
  keep
  # 124: the limit; 1: a cell failed, which the study tells and the others survive; 130: the study was interrupted
  case $code in 0 | 1 | 124 | 130) ;; *) return "$code" ;; esac
}

keep() {
  [[ -n $KEEP && -d $RUNS/$STUDY/records ]] || return 0
  mkdir -p "$KEEP"
  tar -czf "$KEEP/records.tar.gz" -C "$RUNS/$STUDY" records
  [[ ! -f $RUNS/$STUDY/results.json ]] || cp "$RUNS/$STUDY/results.json" "$KEEP/results.json"
}

main() {
  local verb=${1:-list} part
  shift || true
  local chosen=("$@")
  if [[ $# -eq 0 ]]; then chosen=("${PARTS[@]}"); fi
  for part in "${chosen[@]}"; do cells_of "$part" >/dev/null; done
  case $verb in
    list) printf '%s\n' "${chosen[@]}" ;;
    cells) for part in "${chosen[@]}"; do cells_of "$part"; done ;;
    plan | run)
      for part in "${chosen[@]}"; do
        echo "== $part"
        "$verb" "$part"
      done ;;
    *) echo "unknown word $verb; known: list, cells, plan, run" >&2; return 2 ;;
  esac
}

main "$@"
