#!/bin/bash
# The study over all targets (targets.py): its second classifiers, then every cell that has no row in
# targets.csv yet, two at once with a thread each. It can be stopped and started again. From the
# project's folder, with Fashion-MNIST in data/:
#
#     bash assets/study/targets.sh
#
# The weights were chosen before, on bar, dots and bag: every line of weights.csv is
# `python assets/study/targets.py weight DATASET TARGET ARM WEIGHT`.
set -e
export OMP_NUM_THREADS=1
STUDY="python assets/study/targets.py"
for dataset in shapes fashion; do
    [ -f "${RUNS:-runs/study}/second_classifier-$dataset/model.pt" ] || $STUDY second_classifier $dataset
done
$STUDY plan | xargs -L 1 -P "${JOBS:-2}" $STUDY cell
