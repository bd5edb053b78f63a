#!/bin/bash
# The study over all targets (targets.py): its second classifiers, then every cell that has no row in
# targets.csv yet, two at once with a thread each. It can be stopped and started again. From the
# project's folder, with Fashion-MNIST in data/:
#
#     bash assets/study/targets.sh
#
# `targets.sh weights` tries weights first, on bar, dots and bag, into weights.csv; the chosen ones stand
# in targets.py.
set -eo pipefail
export OMP_NUM_THREADS=1
STUDY="python assets/study/targets.py"
if [ "${1:-}" = weights ]; then
    $STUDY tries | xargs -r -L 1 -P "${JOBS:-2}" $STUDY weight
    exit
fi
for dataset in shapes fashion; do
    folder=${RUNS:-runs/study}/second_classifier-$dataset
    if [ ! -f "$folder/model.pt" ]; then
        rm -rf "$folder"
        $STUDY second_classifier $dataset
    fi
done
$STUDY plan | xargs -r -L 1 -P "${JOBS:-2}" $STUDY cell
