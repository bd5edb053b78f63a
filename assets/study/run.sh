#!/bin/bash
# The plan of the study: every model that is unlearned, and every attack on it. From the project's
# folder:
#
#     bash assets/study/run.sh                # two jobs at once, a thread each; about 13 hours
#     bash assets/study/run.sh cell dimum cls=square 0 low 200 3e-4     # one line of the plan
#     python assets/study/study.py tables     # the tables and curves, from results.csv
#
# It can be stopped and started again. Each run adds a row to results.csv, and what has a row is
# skipped. To run a part anew, name another file in CSV and another folder for the models in RUNS,
# and cut the plan down. The settings were not chosen on what is below, but on the class bar and
# the style dots with seed 100 (README.md beside this file).
set -e
export CSV=${CSV:-assets/study/results.csv}
export RUNS=${RUNS:-runs/study}
export OMP_NUM_THREADS=1
STUDY="python assets/study/study.py"

plan() {
    for target in cls=square style=sketch; do
        for method in dimum salun sfron; do
            echo cell $method $target 0 low 200 3e-4
            echo cell $method $target 0 middle 200 1e-3
            echo cell $method $target 0 high 600 1e-3
        done
        for method in rl sa finetune swap; do
            echo cell $method $target 0 middle 200 1e-3
        done
        for method in ga esd; do
            echo cell $method $target 0 low 200 3e-4
        done
        echo cell sfron $target 0 tenth 20 1e-3
        echo cell sfron $target 0 gentle 600 3e-4        # in place of high, which ruins its model
        echo retrained $target
    done
    for method in dimum salun sfron; do
        echo cell $method cls=heart 0 middle 200 1e-3
        echo on_the_way $method cls=square
    done

    # a second seed, where forgetting does not last
    for target in cls=square style=sketch; do
        echo cell dimum $target 1 low 200 3e-4
        echo cell salun $target 1 low 200 3e-4
        echo cell dimum $target 1 high 600 1e-3
    done

    for target in square sketch; do
        for model in {dimum,salun,sfron,swap}-$target-middle-0 retrain-$target; do
            echo invert $model
        done
    done
    echo invert dimum-heart-middle-0

    # a substitute that is less like a sketch than neon, other attackers, longer attacks
    for method in dimum salun; do
        echo cell $method style=sketch 0 far 200 3e-4 --alternative class:flat
        for aux in heldout generated pretrained; do
            echo attack $method-sketch-low-0-$aux $RUNS/$method-sketch-low-0 0 1000 --aux $aux
        done
    done
    for model in salun-square-high-0 {dimum,salun}-sketch-high-0 dimum-sketch-high-1; do
        echo attack $model-long $RUNS/$model ${model##*-} 3000
    done
}

# ---- the lines of the plan -----------------------------------------------------------------------

cell() {             # METHOD FACTOR=VALUE SEED BUDGET STEPS RATE MORE...: unlearning and the attack
    local name=$1-${2#*=}-$4-$3
    if has_row $name; then return; fi
    if unfinished "$RUNS/$name"; then
        python unlearn.py --method $1 --$2 --seed $3 --steps $5 --lr $6 --batch-size 16 \
            --samples 60 --out $RUNS/$name "${@:7}"
    fi
    attack $name $RUNS/$name $3 1000
}

retrained() {        # FACTOR=VALUE: a model that never saw it, and the attack on it
    local name=retrain-${1#*=}
    if has_row $name; then return; fi
    if [ ! -f $RUNS/$name/result.json ]; then
        python train_ddpm.py --exclude-$1 --out $RUNS/$name --resume
    fi
    attack $name $RUNS/$name 0 1000
}

attack() {           # NAME MODEL SEED STEPS MORE...: DiMRA on the retained data, or what --aux says
    if has_row $1; then return; fi
    if unfinished "$RUNS/$1-attack"; then
        python attack.py $2 --seed $3 --steps $4 --samples 240 --out $RUNS/$1-attack \
            --every 50 100 200 400 700 1000 2000 "${@:5}"
    fi
    second_classifier
    $STUDY row $1 $2 $RUNS/$1-attack
}

on_the_way() {       # METHOD FACTOR=VALUE: FID and UA while it unlearns at the middle budget
    local name=$1-${2#*=}-fid
    if has_row $name-200; then return; fi
    if unfinished "$RUNS/$name"; then
        python unlearn.py --method $1 --$2 --samples 600 --out $RUNS/$name --eval-every 25 50 100
    fi
    $STUDY points $name $RUNS/$name
}

invert() {           # MODEL: eighteen attackers who have pictures of what it forgot
    if has_row $1-invert-10-x_T; then return; fi
    $STUDY invert $1
}

figure1() {          # README's first picture, into figure1.png
    rm -rf runs/first
    for size in small large; do
        lr=1e-3
        [ $size = small ] && lr=3e-4
        python unlearn.py --style sketch --samples 60 --lr $lr --out runs/first/$size
        python attack.py runs/first/$size --samples 60 --every 75 150 --out runs/first/attack-$size
    done
    $STUDY figure figure1.png runs/first/attack-small runs/first/attack-large
}

gpu() {              # the paper's network on Fashion-MNIST: not run yet; meant for 15 minutes of an H100
    rm -rf runs/gpu
    python train_ddpm.py --dataset fashion --preset paper --steps 8000 --compile --out runs/gpu/paper
    for method in dimum salun; do
        python unlearn.py --ckpt runs/gpu/paper --method $method --cls trouser --steps 300 \
            --batch-size 64 --samples 600 --compile --out runs/gpu/$method
        python attack.py runs/gpu/$method --steps 300 --batch-size 64 --samples 600 --every 100 \
            --compile --out runs/gpu/attack-$method
    done
}

# ---- what they share -----------------------------------------------------------------------------

has_row() {          # NAME: is it in results.csv?
    grep -q "^$1," $CSV 2> /dev/null && echo "$1 has a row: skipped"
}

unfinished() {       # FOLDER: has its run no result? What a stopped one left is removed
    [ ! -f "$1/result.json" ] && rm -rf "$1"
}

second_classifier() {
    if [ ! -f $RUNS/second_classifier/model.pt ]; then
        rm -rf "$RUNS/second_classifier"
        $STUDY second_classifier
    fi
}

mkdir -p $RUNS
if [ $# = 0 ]; then
    second_classifier                             # now, before two jobs want it at once
    plan | xargs -L 1 -P ${JOBS:-2} bash $0
else
    "$@"
fi
