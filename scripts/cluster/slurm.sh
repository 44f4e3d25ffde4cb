#!/bin/sh
#SBATCH --job-name=fda
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#
# One command of the project on all nodes of a SLURM job; --nodes, and --gpus-per-node where there are GPUs, go in front:
#
#   sbatch --nodes=5 --gpus-per-node=8 scripts/cluster/slurm.sh Vision/construct_fda.py --config my.yaml
#   sbatch --nodes=5 --gpus-per-node=8 scripts/cluster/slurm.sh scripts/compare.py --config my.yaml
#
# Submitted from the project's folder, on storage that all nodes see, with the environment of scripts/environment.sh in
# .venv. A job that ran out of time is submitted again: the same command goes on.
set -eu
if [ $# -eq 0 ]; then
    echo "slurm.sh: which command? scripts/cluster/slurm.sh Vision/construct_fda.py --config FILE" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?slurm.sh is for sbatch, which sets SLURM_SUBMIT_DIR}"
. .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
# A token for this job alone, handed on in the environment: other users can reach the nodes' ports.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
cpus=${SLURM_CPUS_ON_NODE:-1}
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" --num-cpus="$cpus" --block &
sleep "${FDA_RAY_WAIT:-20}"
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks="$((SLURM_JOB_NUM_NODES - 1))" --exclude="$head" \
        ray start --address="$head:$port" --num-cpus="$cpus" --block &
    sleep "${FDA_RAY_WAIT:-20}"
fi
python "$@" --run.engine ray --run.address "$head:$port"
