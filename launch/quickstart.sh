#!/usr/bin/env bash
# From a fresh clone to a trained model: makes .venv, installs cptrain, trains the preset "debug" on two CPU ranks.
# Settings may follow: bash launch/quickstart.sh --training.steps 20
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/venv.sh
. "$root/launch/venv.sh"
set_up ""

# Runs write to outputs/ in the working directory: keep it the same wherever this is called from.
cd "$root"
# One thread per rank, or two ranks on two cores get in each other's way; no GPU, of which there may be fewer than two.
environment="OMP_NUM_THREADS=1"
if command -v nvidia-smi >/dev/null; then
  environment+=" CUDA_VISIBLE_DEVICES="
fi
# shellcheck disable=SC2086 # two words
env $environment .venv/bin/torchrun --standalone --nproc-per-node 2 -m cptrain.train --config debug "$@"

train="$environment .venv/bin/torchrun --nproc-per-node 2 -m cptrain.train"
cat <<END

Done; everything is in $root/outputs/debug. From $root:

  Go on for more steps, from the last checkpoint. The learning rate falls until lr_scheduler.total_steps, else until
  training.steps: where that grows, say until when it was, or the rate jumps.
    $train --config debug --training.steps 360 --lr_scheduler.total_steps 180
  Look at the curves:
    .venv/bin/tensorboard --logdir outputs
  See what else is there, and every key with its meaning:
    .venv/bin/python -m cptrain.train --list-configs
    .venv/bin/python -m cptrain.train --help
  Train on your own text, in a run of another name:
    $train --config debug --job.name mine --data.source text --data.paths 'path/to/**/*.txt'
  See what a large preset would do on 8 GPUs, without any:
    .venv/bin/python -m cptrain.train --config llama_128k --dry-run --world-size 8
END
