# All that is measured on the GPUs of one host, each step with its time limit, so that a machine lent for minutes gives
# as many whole steps as fit:
#
#     bash bench/on_n_gpus.sh RANKS FOLDER COMMIT [STEP ...]        by default check, tune, suites, proof, models
#
# RANKS: 2 or 4, of as many GPUs. FOLDER gets the tables and results under the names that bench/results/ and
# tp_overlap_kernels/dispatch/tables/ have for them, and logs/. To be run from the root of the repository, with the
# package installed. `suites` and `models` take the table that `tune` has made, if it ran before.
set -u
ranks=$1 folder=$2 commit=$3
shift 3
steps=${*:-check tune suites proof models}
at="h200x$ranks" table="nvidia_h200_w$ranks.json"
bench="python3 -m tp_overlap_kernels.bench"
layers="--preset qwen2.5-72b --preset llama-3-8b --tp $ranks"
[ "$ranks" = 2 ] && layers="--preset h200_baseline"
installed=$(python3 -c "import tp_overlap_kernels as tpo; print(tpo.__path__[0])")/dispatch/tables
mkdir -p "$folder/logs"

# limited SECONDS NAME COMMAND...: what it did and how long it took, in a line; the rest in logs/NAME.log.
limited() {
  local seconds=$1 name=$2 began=$SECONDS
  shift 2
  timeout "$seconds" "$@" > "$folder/logs/$name.log" 2>&1
  echo "$name: exit code $?, $((SECONDS - began)) s"
}

check() { # the smallest thing that can be wrong, first
  limited 60 check $bench run --ranks "$ranks" --layer 4096,1024 --m 16,1024 --mode graph --commit "$commit"
}

tune() {
  [ -f "$installed/$table" ] && cp "$installed/$table" "$folder/$table"
  for op in gemm_all_reduce gemm_reduce_scatter; do
    limited 260 "tune_$op" $bench tune $layers --ranks "$ranks" --op $op --merge --again --commit "$commit" \
      --out "$folder/$table"
  done
  [ -f "$folder/$table" ] && cp "$folder/$table" "$installed/$table"
}

suites() {
  for op in gemm_all_reduce gemm_reduce_scatter; do
    limited 120 "$op" $bench run $layers --ranks "$ranks" --op $op --mode graph --commit "$commit" \
      --json "$folder/${at}_$op.json"
  done
  limited 60 under_load $bench run $layers --ranks "$ranks" --op gemm_all_reduce --mode graph --m 2048,4096,8192 \
    --load-ms 100 --target-ms 30 --provider ours --provider matmul --provider matmul+nccl --commit "$commit" \
    --json "$folder/${at}_under_load.json"
}

proof() {
  mkdir -p "$folder/proof"
  part() { # SECONDS PART [COUNT]
    limited "$1" "$2" python3 -m tests.proof "$2" ${3:+--count "$3"} --world-size "$ranks" --limit-s "$(($1 - 10))" \
      --commit "$commit" --json "$folder/proof/$2_w$ranks.json"
  }
  part 150 soak 200000
  part 60 replay 20000
  part 60 bits 1000
  part 90 faults
  part 120 delay
}

models() {
  cases=""
  for case in 1x1000x1 1x2000x1 1x4000x1 1x8000x1 1x512x32 16x512x32 64x128x32; do cases="$cases --case $case"; done
  limited 150 one_batch_8b $bench one-batch --model llama-3-8b --ranks "$ranks" $cases --budget-s 135 \
    --commit "$commit" --result-file "$folder/${at}_one_batch.jsonl"
  limited 200 one_batch_72b $bench one-batch --model qwen2.5-72b --layers 16 --ranks "$ranks" $cases --budget-s 185 \
    --commit "$commit" --result-file "$folder/${at}_one_batch.jsonl"
}

for step in $steps; do
  case $step in
    check | tune | suites | proof | models) $step ;;
    *) echo "no step is called $step: there are check, tune, suites, proof, models" && exit 2 ;;
  esac
done
