#!/usr/bin/env bash
# One stage of a sweep: what run.sh does, on one node or several, in two commands that runs share.
#
#   OUT=out/a bash paper/pipeline.sh refs                   references of train.jsonl and test.jsonl, in OUT
#   OUT=out/a RUN=x bash paper/pipeline.sh train --beta=1   training and evaluation, in OUT/RUN
#
# The flags are train.py's. Set in the environment:
#   MODEL= DATA=       a model, and a folder with train.jsonl and test.jsonl (default: minicode's)
#   REWARD=tests       or FILE.py:NAME, or model:PATH
#   OUT=out RUN=qrpo   the folder of the references, and of the run in it
#   SEED=0             of sampling and training
#   GENERATE= SCORE=   more flags for generate_refs.py and score.py
#   EVALUATE=          more flags for generate_refs.py where it samples the policy, as --temperature=0.6;
#                      with them, refs also samples the reference model so, into OUT/base
#   ONLINE=            flags of examples/online.py: train on fresh samples afterwards, in OUT/RUN_online
#   NPROC=             processes of every stage, on each node (default: one a GPU, or one)
#   MASTER_ADDR=       on several nodes: the address by which they reach the first (default: its host name)
#   PYTHON=            an interpreter with the requirements installed (default: that of run.sh)
set -euo pipefail
trap 'exit $(($? ? $? : 143))' TERM  # when the stage in hand has saved, with its exit code
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$code/.venv/bin/python}
REWARD=${REWARD:-tests} OUT=${OUT:-out} RUN=${RUN:-qrpo} SEED=${SEED:-0}
if [ -z "${MODEL:-}${DATA:-}" ]; then
    [ "${1:-}" != refs ] || "$PYTHON" "$code/data/minicode/prepare.py"
    MODEL=$code/data/minicode/model DATA=$code/data/minicode GENERATE="--max_new_tokens=64 ${GENERATE:-}"
fi
: "${MODEL:?set MODEL as well as DATA}" "${DATA:?set DATA as well as MODEL}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # torchrun's 30 s are too short to save
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}  # a thread without work soon sleeps
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # batches differ in shape
NODES=${SLURM_JOB_NUM_NODES:-1}
if [ -z "${NPROC:-}" ]; then
    NPROC=1
    ! nvidia-smi &> /dev/null || NPROC=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
gpus=${SLURM_GPUS:-$((NODES * NPROC))}  # of the job, as in a100:8
if [ "$NODES" -gt 1 ] && [ "${gpus##*:}" != $((NODES * NPROC)) ]; then
    echo "error: $gpus GPUs lie unevenly on $NODES nodes; sbatch --gpus-per-node=N instead of --gpus" >&2
    exit 2
fi

one_a_line() { sed 's/ *$//; s/ \+--/\n--/g' <<< "$1"; }  # flags, whose values may hold spaces
mapfile -t GENERATE < <(one_a_line "--seed=$SEED ${GENERATE:-}")
mapfile -t SCORE < <(one_a_line "--reward=$REWARD ${SCORE:-}")
mapfile -t EVALUATE < <(one_a_line "--field=samples ${EVALUATE:-}")

launch() {  # run a script in one process, or under torchrun in NPROC, or in NPROC on each node of a SLURM job
    set -- "$code/$1" "${@:2}"
    if [ "$NODES" -gt 1 ]; then  # SIGUSR1 (save and stop) is for train.py alone, not for what starts it
        srun --nodes="$NODES" --ntasks="$NODES" ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
            bash -c 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' launch \
            "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$NPROC" \
            --master_addr="${MASTER_ADDR:-$(hostname)}" --master_port="$((20000 + SLURM_JOB_ID % 10000))" "$@"
    elif [ "$NPROC" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    else
        "$PYTHON" "$@"
    fi
}

generate_and_score() {  # model, data, folder, flags: samples in folder/sampled, rewarded in folder/rewarded
    launch generate_refs.py --model="$1" --data="$2" --out="$3/sampled" "${GENERATE[@]}" "${@:4}"
    launch score.py --data="$3/sampled" --out="$3/rewarded" "${SCORE[@]}"
}

evaluate() {  # a model's samples of the test prompts against the reference model's, in the model's folder
    generate_and_score "$1" "$OUT/test/rewarded" "$1/test" "${EVALUATE[@]}"
    "$PYTHON" "$code/evaluate.py" --model="$1" --ref_model="$MODEL" --data="$1/test/rewarded" --out="$1"
}

refs() {
    generate_and_score "$MODEL" "$DATA/train.jsonl" "$OUT/train"
    generate_and_score "$MODEL" "$DATA/test.jsonl" "$OUT/test"
    if [ ${#EVALUATE[@]} -gt 1 ]; then  # the reference model, sampled as trained ones are
        generate_and_score "$MODEL" "$OUT/test/rewarded" "$OUT/base" "${EVALUATE[@]}"
    fi
}

train() {
    local run=$OUT/$RUN
    launch train.py --model="$MODEL" --data="$OUT/train/rewarded" --eval_data="$OUT/test/rewarded" \
        --out="$run" --cache="$OUT/cache" --seed="$SEED" --resume "$@"
    for step in "$run"/checkpoints/step_*; do  # those of --save_every
        [ ! -d "$step" ] || evaluate "$step"
    done
    evaluate "$run"
    if [ -n "${ONLINE:-}" ]; then
        mapfile -t ONLINE < <(one_a_line "--seed=$SEED $ONLINE")
        launch examples/online.py --model="$run" --ref_model="$MODEL" --data="$OUT/train/rewarded" \
            --out="${run}_online" --resume --reward="$REWARD" --score="${SCORE[*]:1}" "${ONLINE[@]}"
        evaluate "${run}_online"
    fi
}

case ${1:-} in
    refs | train) "$@" ;;
    *) echo "error: refs or train, not '${1:-}'; see the top of $0" >&2; exit 2 ;;
esac
