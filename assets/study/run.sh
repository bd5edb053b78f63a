#!/bin/bash
# The study on equal terms: how long does forgetting last for what it cost? From the project's folder:
#
#     bash assets/study/run.sh                # two jobs at once, a thread each; can be stopped and started
#     bash assets/study/run.sh tables         # the tables and the figure, from results.csv
#     bash assets/study/run.sh cell dimum cls=square 0 low 200 3e-4         # one line of the plan
#
# Each run adds a row to results.csv; what has a row is skipped. To rerun a part, name another file in CSV
# and cut the plan down. Weights and the attack were chosen on class bar and style dots with seed 100
# (README.md beside this file), never on what is below. What matters most comes first, more seeds last.
set -e
export CSV=${CSV:-assets/study/results.csv} OMP_NUM_THREADS=1
RUNS=runs/study
MIDDLE="middle 200 1e-3"

plan() {
    for target in cls=square style=sketch; do
        for method in dimum salun sfron; do
            echo cell $method $target 0 $MIDDLE
            echo cell $method $target 0 low 200 3e-4
            echo cell $method $target 0 high 600 1e-3
        done
    done
    for method in dimum salun sfron; do echo cell $method cls=heart 0 $MIDDLE; done
    for target in cls=square style=sketch; do
        echo floor $target
        for method in rl ga esd sa finetune swap; do echo cell $method $target 0 $MIDDLE; done
        echo cell sfron $target 0 tenth 20 1e-3
    done
    for seed in 1 2; do
        for target in cls=square style=sketch cls=heart; do
            for method in dimum salun sfron; do echo cell $method $target $seed $MIDDLE; done
        done
    done
    for target in cls=square style=sketch; do
        for method in dimum salun sfron; do
            echo cell $method $target 1 low 200 3e-4
            echo cell $method $target 1 high 600 1e-3
        done
    done
}

cell() {        # METHOD FACTOR=VALUE SEED BUDGET STEPS RATE MORE...: unlearning, the attack on it, the row
    local name=$1-${2#*=}-$4-$3
    ! grep -q "^$name," $CSV 2> /dev/null || return 0
    [ -f $RUNS/$name/result.json ] || python unlearn.py --method $1 --$2 --seed $3 --steps $5 --lr $6 \
        --batch-size 16 --samples 60 --out $RUNS/$name "${@:7}"
    if [ $4-$3 = high-0 ]; then attack $name $RUNS/$name $3 3000; else attack $name $RUNS/$name $3 1000; fi
}

floor() {       # FACTOR=VALUE: a model that never saw it, and the attack on it
    local out=$RUNS/retrain-${1#*=}
    [ -f $out/result.json ] || python train_ddpm.py --exclude-$1 --out $out --resume
    attack retrain-${1#*=} $out 0 1000
}

attack() {      # NAME MODEL SEED STEPS MORE...: DiMRA on the retained data, the same for all
    ! grep -q "^$1," $CSV 2> /dev/null || return 0
    local out=$RUNS/$1-attack
    [ -f $out/result.json ] || python attack.py $2 --seed $3 --steps $4 --samples 240 --out $out \
        --every 50 100 200 400 700 1000 2000 "${@:5}"
    row $1 $2 $out
}

judge() {       # the second judge: other seed, twice the width, trained apart
    [ -f $RUNS/judge/model.pt ] || python -c "
import fid
fid.CLASSIFIERS['shapes'] = 48, 3000
fid.run(fid.main)" --train-classifier --seed 1 --out $RUNS/judge
}

row() {         # NAME UNLEARNED ATTACKED: 600 samples, both judges, and the curve as a line of the CSV
    python - "$@" $CSV <<'PYTHON'
import csv, json, sys, pathlib, torch
from types import SimpleNamespace
import fid
from model import find_value, load_checkpoint, load_file, shipped
from train_ddpm import load_data

name, unlearned, attacked, path = sys.argv[1:]
data = load_file("runs/study/judge/model.pt", "classifier")
judge = fid.Classifier(**data["args"]).eval()
judge.load_state_dict(data["weights"])
result = json.loads(pathlib.Path(attacked, "result.json").read_text("utf-8"))
factor, value = result["forget"].split()
models, info = [load_checkpoint(p)[0] for p in (unlearned, attacked)], load_checkpoint(unlearned)[1]
column = ("cls", "style").index(factor)
pair = column, find_value(value, info["names"][column], factor)
images, y, _ = load_data("shapes", "train")

def scored(model, step, samples, retained):
    """The metrics of both judges, on the same samples."""
    args = SimpleNamespace(dataset="shapes", data_dir="data", samples=samples, sampler_steps=20, seed=0)
    measure, _ = fid.evaluator(info, images, y, [pair], [pair], args, "ua")
    metrics, x, labels = measure(model, step, retained)
    return metrics, fid.score(x.float() / 127.5 - 1, labels, judge, info["names"], [pair], None)

(first, second), (_, last) = scored(models[0], 0, 600, True), scored(models[1], 1, 240, False)
made, curve, end = info["made_by"], {p["step"]: p["ar"] for p in result["curve"]}, result["curve"][-1]
line = {"name": name, "method": result["method"], "target": result["forget"], "seed": result["attack_seed"],
        "aux": result["aux"], **{k: made.get(k) for k in ("steps", "batch_size", "lr", "weight", "alternative")},
        "seconds": json.loads(pathlib.Path(unlearned, "result.json").read_text("utf-8")).get("seconds"),
        **{k: first[k] for k in ("ua", "cls", "style", "fid", "fid_error", "none")},
        **{f"second_{k}": second[k] for k in ("ua", "cls", "style")},
        **{f"ar_{s}": curve.get(s) for s in (0, 50, 100, 200, 400, 700, 1000, 2000, 3000)},
        "second_ar_end": last["ar"],
        **{f"end_{k}": end[k] for k in ("cls", "style", "fid", "fid_error", "none")}}
def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

u, a = map(weights, models)                            # how far both moved, and how much of it back
moved = u - weights(load_checkpoint(shipped("shapes.pt"))[0]) if "from" in made else u * torch.nan
line.update(moved=moved.norm(), attack_moved=(a - u).norm(), undone=-(a - u) @ moved / moved.square().sum())
line = {k: v if k == "lr" or v is None or isinstance(v, (str, int)) else round(float(v), 4) for k, v in line.items()}
new = not pathlib.Path(path).exists()
with open(path, "a", newline="") as file:
    writer = csv.DictWriter(file, line)
    if new:
        writer.writeheader()
    writer.writerow(line)
PYTHON
}

mkdir -p $RUNS
if [ $# = 0 ]; then
    judge
    plan | xargs -L 1 -P ${JOBS:-2} bash $0
else
    "$@"
fi
