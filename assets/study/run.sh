#!/bin/bash
# The study on equal terms: how long does forgetting last for what it cost? From the project's folder:
#
#     bash assets/study/run.sh            # about 14 hours on two cores; it can be stopped and started
#
# Each run adds a row to results.csv; what has a row is skipped. To rerun a part, cut down the lists and
# name another file in CSV. Weights and the attack were chosen on class bar and style dots with seed 100
# (README.md beside this file), never on what is below.
set -e
CSV=${CSV:-assets/study/results.csv}
RUNS=runs/study
POINTS="50 100 200 400 700"
mkdir -p $RUNS

# a second judge: other seed, twice the width, trained apart
[ -f $RUNS/judge/model.pt ] || python -c "
import fid
fid.CLASSIFIERS['shapes'] = 48, 3000
fid.run(fid.main)" --train-classifier --seed 1 --out $RUNS/judge

row() {         # NAME UNLEARNED ATTACKED: the results of both as a line of the CSV
    python - "$@" "$CSV" <<'PYTHON'
import csv, json, sys, pathlib, torch
import fid
from model import all_labels, find_value, load_checkpoint, load_file, matches, sample

name, unlearned, attacked, path = sys.argv[1:]
data = load_file("runs/study/judge/model.pt", "classifier")
judge = fid.Classifier(**data["args"])
judge.load_state_dict(data["weights"])
before, after = (json.loads(pathlib.Path(run, "result.json").read_text("utf-8")) for run in (unlearned, attacked))
factor, value = after["forget"].split()
_, info = load_checkpoint(attacked)
column = ("cls", "style").index(factor)
pair = column, find_value(value, info["names"][column], factor)
y = all_labels(info["names"])
y = y[matches(y, [pair])].repeat_interleave(max(1, 100 // int(matches(y, [pair]).sum())), 0)

def second(run):
    """The share of samples in which the second judge recognises what was forgotten."""
    images = sample(load_checkpoint(run)[0], y, 20, seed=fid.NOISE_SEED, label="second judge")
    return (fid.predict(judge.eval(), images)[:, column] == pair[1]).double().mean().item()

first, last = before.get("curve", [{}])[-1], after["curve"][-1]
line = {"name": name, "method": after["method"], "target": after["forget"], "seed": after["attack_seed"],
        **{k: before.get(k) for k in ("steps", "batch_size", "lr", "weight", "seconds")},
        **{k: first.get(k) for k in ("ua", "cls", "style", "fid", "fid_error", "none")},
        **{f"ar_{p['step']}": p["ar"] for p in after["curve"]},
        **{f"attacked_{k}": last[k] for k in ("cls", "style", "fid", "fid_error", "none")},
        "second_ar_0": second(unlearned), "second_ar_end": second(attacked)}
line = {k: round(v, 4) if isinstance(v, float) and k != "lr" else v for k, v in line.items()}
new = not pathlib.Path(path).exists()
with open(path, "a", newline="") as file:
    writer = csv.DictWriter(file, line, extrasaction="ignore")
    if new:
        writer.writeheader()
    writer.writerow(line)
PYTHON
}

cell() {        # METHOD TARGET SEED BUDGET STEPS RATE: unlearning, the attack on it, the row
    local name=$1-${2// /-}-$4-$3
    local out=$RUNS/$name
    ! grep -q "^$name," $CSV 2> /dev/null || return 0
    [ -f $out/result.json ] || python unlearn.py --method $1 --$2 --seed $3 --steps $5 --lr $6 \
        --batch-size 16 --samples 600 --out $out
    attack $name $out $3
}

attack() {      # NAME MODEL SEED MORE...: DiMRA on the retained data, the same for all
    ! grep -q "^$1," $CSV 2> /dev/null || return 0
    [ -f $RUNS/$1-attack/result.json ] || python attack.py $2 --seed $3 --steps 1000 --every $POINTS \
        --samples 300 --out $RUNS/$1-attack "${@:4}"
    row $1 $2 $RUNS/$1-attack
}

for target in "cls square" "style sketch" "cls heart"; do
    for seed in 0 1 2; do
        for method in dimum salun sfron; do
            cell $method "$target" $seed middle 200 1e-3
        done
    done
done
for target in "cls square" "style sketch"; do
    for seed in 0 1; do
        for method in dimum salun sfron; do
            cell $method "$target" $seed low 200 3e-4
            cell $method "$target" $seed high 600 1e-3
        done
    done
    for method in rl ga esd sa finetune swap; do
        cell $method "$target" 0 middle 200 1e-3
    done
    cell sfron "$target" 0 tenth 20 1e-3
    floor=$RUNS/retrain-${target// /-}
    [ -f $floor/result.json ] || python train_ddpm.py --exclude-$target --out $floor
    attack retrain-${target// /-} $floor 0
done
