#!/bin/bash
# The study: every model that is unlearned, and every attack on it. From the project's folder, with
# Fashion-MNIST in data/ (README.md there says how):
#
#     bash assets/study/run.sh                  # what has no row yet, two jobs at once, a thread each
#     bash assets/study/run.sh weights          # first, to choose weights: bar, dots and bag
#     bash assets/study/run.sh figure1          # README's first picture, in ten minutes
#     bash assets/study/run.sh nothing          # README's other picture
#     python assets/study/study.py tables       # the tables and curves, from results.csv
#
# It can be stopped and started again: each run adds a row to a table (TABLES), and what has a row is
# skipped. The second classifiers, and a picture of each run, go into RUNS.
set -eo pipefail
STUDY="env OMP_NUM_THREADS=1 python assets/study/study.py"

weights() {
    $STUDY tries | xargs -r -L 1 -P "${JOBS:-2}" $STUDY weight
}

cells() {
    for dataset in shapes fashion; do
        local folder=${RUNS:-runs/study}/second_classifier-$dataset
        if [ ! -f "$folder/model.pt" ]; then
            rm -rf "$folder"
            $STUDY second_classifier $dataset
        fi
    done
    $STUDY plan | xargs -r -L 1 -P "${JOBS:-2}" bash "$0" cell || echo "a cell failed, see above"
}

cell() {                 # false: xargs would stop at the status of a kill, and not go on to the next
    $STUDY cell "$@" || false
}

attackers() {            # sixteen inversions of each; what is retrained has its rows already
    for target in cls=square style=sketch cls=heart; do
        echo shapes $target dimum-all
    done | xargs -L 1 -P "${JOBS:-2}" $STUDY invert
}

figure1() {              # three models and two attacks on each, by the scripts that README explains
    rm -rf runs/law
    python unlearn.py --cls square --learn label --samples 30 --out runs/law/label
    python unlearn.py --cls square --learn unet --samples 30 --out runs/law/unet
    python unlearn.py --cls square --samples 30 --out runs/law/all
    for name in label unet all; do
        python attack.py runs/law/$name --samples 30 --steps 200 --every 200 \
            --out runs/law/$name-dimra
        python attack.py runs/law/$name --samples 30 --steps 150 --every 150 --attack inversion \
            --out runs/law/$name-inversion
    done
    python assets/study/study.py law figure1.png runs/law/label runs/law/unet runs/law/all
}

nothing() {              # README's picture of what is drawn without a label
    rm -rf runs/nothing
    python unlearn.py --style sketch --out runs/nothing
    python assets/study/study.py nothing nothing.png runs/nothing
}

gpu() {                  # the paper's network on Fashion-MNIST: not run yet; meant for 15 minutes of an H100
    rm -rf runs/gpu
    python train_ddpm.py --dataset fashion --preset paper --steps 8000 --compile --out runs/gpu/paper
    for learn in label unet; do
        python unlearn.py --ckpt runs/gpu/paper --cls trouser --learn $learn --steps 300 \
            --batch-size 64 --samples 600 --compile --out runs/gpu/$learn
        python attack.py runs/gpu/$learn --steps 300 --batch-size 64 --samples 600 --every 100 \
            --compile --out runs/gpu/attack-$learn
    done
}

study() {
    cells
    attackers
}

"${@:-study}"
