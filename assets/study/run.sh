#!/bin/bash
# The study on equal terms: how long does forgetting last for what it cost? From the project's folder:
#
#     bash assets/study/run.sh                # two jobs at once, a thread each; can be stopped and started
#     bash assets/study/run.sh tables         # the tables and figures, from results.csv
#     bash assets/study/run.sh cell dimum cls=square 0 low 200 3e-4         # one line of the plan
#
# Each run adds a row to results.csv; what has a row is skipped. To rerun a part, name another file in CSV
# and cut the plan down. Weights and the attack were chosen on class bar and style dots with seed 100
# (README.md beside this file), never on what is below.
set -e
export CSV=${CSV:-assets/study/results.csv} RUNS=runs/study OMP_NUM_THREADS=1
MIDDLE="middle 200 1e-3"

plan() {
    for target in cls=square style=sketch; do
        for budget in "low 200 3e-4" "$MIDDLE" "high 600 1e-3"; do
            for method in dimum salun sfron; do echo cell $method $target 0 $budget; done
        done
        echo cell sfron $target 0 tenth 20 1e-3
        echo cell sfron $target 0 gentle 600 3e-4                    # the rate that it can live with, in place of high
        for method in rl sa finetune swap; do echo cell $method $target 0 $MIDDLE; done
        for method in ga esd; do echo cell $method $target 0 low 200 3e-4; done
        echo floor $target
    done
    for method in dimum salun sfron; do echo cell $method cls=heart 0 $MIDDLE; done
    for method in dimum salun sfron; do echo fids $method cls=square; done
    for method in dimum salun; do                                    # another seed, where forgetting does not last
        for target in cls=square style=sketch; do echo cell $method $target 1 low 200 3e-4; done
    done
    for target in cls=square style=sketch; do echo cell dimum $target 1 high 600 1e-3; done

    for run in {dimum,salun,sfron,swap}-{square,sketch}-middle-0 dimum-heart-middle-0 retrain-{square,sketch}; do
        echo invert $run                                             # dimum-robust's: see README.md
    done

    for method in dimum salun; do                                    # a substitute further away: low has neon
        echo cell $method style=sketch 0 far 200 3e-4 --alternative class:flat
    done
    for aux in heldout generated pretrained; do                      # other attackers
        for method in dimum salun; do
            echo attack $method-sketch-low-0-$aux $RUNS/$method-sketch-low-0 0 1000 --aux $aux
        done
    done
    for run in salun-square-high-0 {dimum,salun}-sketch-high-0 dimum-sketch-high-1; do
        echo attack $run-long $RUNS/$run ${run##*-} 3000
    done
}

cell() {        # METHOD FACTOR=VALUE SEED BUDGET STEPS RATE MORE...: unlearning, the attack on it, the row
    local name=$1-${2#*=}-$4-$3
    ! has $name || return 0
    [ -f $RUNS/$name/result.json ] || python unlearn.py --method $1 --$2 --seed $3 --steps $5 --lr $6 \
        --batch-size 16 --samples 60 --out $RUNS/$name "${@:7}"
    attack $name $RUNS/$name $3 1000
}

floor() {       # FACTOR=VALUE: a model that never saw it, and the attack on it
    local out=$RUNS/retrain-${1#*=}
    [ -f $out/result.json ] || python train_ddpm.py --exclude-$1 --out $out --resume
    attack retrain-${1#*=} $out 0 1000
}

attack() {      # NAME MODEL SEED STEPS MORE...: DiMRA on the retained data, the same for all
    ! has $1 || return 0
    local out=$RUNS/$1-attack
    [ -f $out/result.json ] || python attack.py $2 --seed $3 --steps $4 --samples 240 --out $out \
        --every 50 100 200 400 700 1000 2000 "${@:5}"
    judge
    numbers row $1 $2 $out
}

fids() {        # METHOD FACTOR=VALUE: FID and UA while it unlearns at the middle budget
    local name=$1-${2#*=}-fid
    ! has $name-200 || return 0
    [ -f $RUNS/$name/result.json ] || python unlearn.py --method $1 --$2 --samples 600 --out $RUNS/$name \
        --eval-every 25 50 100
    numbers points $name $RUNS/$name
}

invert() {      # RUN: inversion by eighteen attackers who hold images of what was forgotten
    has $1-invert-10-x_T || numbers invert $1
}

has() { grep -q "^$1," $CSV 2> /dev/null; }

judge() {       # the second judge: other seed, twice the width, trained apart
    [ -f $RUNS/judge/model.pt ] || python -c "
import fid
fid.CLASSIFIERS['shapes'] = 48, 3000
fid.run(fid.main)" --train-classifier --seed 1 --out $RUNS/judge
}

tables() { numbers tables; }

numbers() {
    python - "$@" <<'PYTHON'
import copy, csv, json, os, statistics, sys
from pathlib import Path
from types import SimpleNamespace

import torch

import attack
import fid
from model import (ddim_sample, linear_schedule, load_checkpoint, load_file, pairs_text, pick_device, save_grid, save_plot,
                   shipped, split_output, T, to_uint8)
from train_ddpm import load_data

CSV, RUNS, DEVICE = Path(os.environ["CSV"]), Path(os.environ["RUNS"]), pick_device("auto")
POINTS = (0, 50, 100, 200, 300, 400, 700, 1000, 2000, 3000)
COLUMNS = ["name", "method", "target", "seed", "aux", "steps", "batch_size", "lr", "weight", "alternative", "seconds",
           "ua", "cls", "style", "fid", "fid_error", "none", "second_ua", "second_cls", "second_style",
           *(f"ar_{s}" for s in POINTS), "second_ar_end",
           "end_cls", "end_style", "end_fid", "end_fid_error", "end_none", "moved", "attack_moved", "undone"]

def write(line):
    line = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}
    new = not CSV.exists()
    with open(CSV, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(line)

def result_of(run):
    return json.loads(Path(run, "result.json").read_text("utf-8"))

def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def row(name, unlearned, attacked):
    """Both judges on 600 samples of the unlearned model, and the curve of the attack on it."""
    result, (model, info) = result_of(attacked), load_checkpoint(unlearned, DEVICE)
    after, _ = load_checkpoint(attacked, DEVICE)
    (images, y, _), forgotten = load_data("shapes", "train", device=DEVICE), info["forgotten"]
    data = load_file(RUNS / "judge/model.pt", "classifier")
    judge = fid.Classifier(**data["args"]).to(DEVICE).eval()
    judge.load_state_dict(data["weights"])

    def scored(model, step, samples, retained):
        args = SimpleNamespace(dataset="shapes", data_dir="data", samples=samples, sampler_steps=20, seed=0)
        measure, _ = fid.evaluator(info, images, y, forgotten, forgotten, args, "ua")
        metrics, x, labels = measure(model, step, retained)
        return metrics, fid.score(x.float() / 127.5 - 1, labels, judge, info["names"], forgotten, None)

    (first, second), (_, last) = scored(model, 0, 600, True), scored(after, 1, 240, False)
    made, end = info["made_by"], result["curve"][-1]
    line = {"name": name, "method": result["method"], "target": result["forget"],
            "seed": result["attack_seed"], "aux": result["aux"], "seconds": result_of(unlearned).get("seconds"),
            **{k: made.get(k) for k in ("steps", "batch_size", "lr", "weight", "alternative")},
            **{k: first[k] for k in ("ua", "cls", "style", "fid", "fid_error", "none")},
            **{f"second_{k}": second[k] for k in ("ua", "cls", "style")},
            **{f"ar_{p['step']}": p["ar"] for p in result["curve"]}, "second_ar_end": last["ar"],
            **{f"end_{k}": end[k] for k in ("cls", "style", "fid", "fid_error", "none")}}
    if "from" in made:                                 # how far both moved, and how much of it back
        u, a, original = map(weights, (model, after, load_checkpoint(shipped("shapes.pt"), DEVICE)[0]))
        moved, back = u - original, a - u
        line.update(moved=moved.norm().item(), attack_moved=back.norm().item(),
                    undone=(-back @ moved / moved.square().sum()).item())
    write(line)

def points(name, run):
    """A row for each point at which an unlearning was measured."""
    result = result_of(run)
    for p in result["curve"]:
        write({"name": f"{name}-{p['step']}", "method": result["method"], "target": result["forget"],
               "seed": result["seed"], "steps": p["step"],
               **{k: p[k] for k in ("ua", "cls", "style", "fid", "fid_error", "none")}})

def noise_of(model, x, y, steps=20):
    """The x_T from which DDIM draws about the images x: its steps the other way, without guidance."""
    a = [*linear_schedule()[1].tolist(), 1.0]          # a[-1] belongs to x_0
    times = [-1, *(i * T // steps for i in range(steps))]
    for before, t in zip(times, times[1:]):
        x0, eps = split_output(model, model(x, torch.full((len(x),), t, device=x.device), y), x, a[before])
        x = a[t] ** 0.5 * x0 + (1 - a[t]) ** 0.5 * eps
    return x

def invert(name):
    """Inversion, where only the forgotten label's embedding learns: from ten images by three rates and from five
    starts, and from a hundred. A row each; the attacker's number is the highest AR among them. Two more by
    other ways: the label's MLP learns, too; and images drawn from x_T halfway between the ten's and noise."""
    (model, info), lines, best = load_checkpoint(RUNS / name, DEVICE), [], -1
    (factor, value), = forgotten = info["forgotten"]
    images, y, _ = load_data("shapes", "train", device=DEVICE)
    args = SimpleNamespace(dataset="shapes", data_dir="data", samples=120, sampler_steps=20, seed=0)
    measure, _ = fid.evaluator(info, images, y, forgotten, forgotten, args, "ar")
    table = model.label_embs[factor].weight.detach().clone()
    torch.manual_seed(0)
    others = [v for v in torch.randperm(len(table) - 1).tolist() if v != value][:3]
    starts = {"own": table[value], **{f"row{v}": table[v] for v in others}, "far": 2 * torch.randn(table.shape[1])}
    data = {n: attack.auxiliary_set(f"inversion:{n}", model, info, (images, y), forgotten, "data") for n in (10, 100)}
    label = f"label_embs.{factor}.",
    plan = {f"10-{rate}-{start}": (10, rate, start, label) for rate in (0.02, 0.05, 0.2) for start in starts}
    plan["100-0.05-own"] = 100, 0.05, "own", label
    plan["10-0.003-mlp"] = 10, 0.003, "own", (*label, f"label_mlps.{factor}.")
    for attacker, (count, rate, start, learns) in plan.items():
        attacked = copy.deepcopy(model)
        for key, p in attacked.named_parameters():
            p.requires_grad_(key.startswith(learns))
        attacked.label_embs[factor].weight.data[value] = starts[start]
        torch.manual_seed(0)
        line = {"name": f"{name}-invert-{attacker}", "method": info["made_by"]["method"],
                "target": pairs_text(forgotten, info["names"]), "seed": info["made_by"]["seed"], "aux": f"inversion:{count}"}
        for step, _ in enumerate(attack.dimra(attacked, *data[count], 300, 16, rate, p_drop=0.0), 1):
            if step in (100, 300):
                metrics, x, _ = measure(attacked, step, retained=False)
                line[f"ar_{step}"] = metrics["ar"]
                if metrics["ar"] > best and learns == label:     # samples of the strongest of the sixteen
                    best = metrics["ar"]
                    save_grid(x[::4], CSV.parent / f"{name}-invert.png", columns=10)
        lines.append(line)

    x, labels = data[10][0].float() / 127.5 - 1, data[10][1]
    judge, _ = fid.load_classifier(args, images.device, info["names"])
    torch.manual_seed(0)
    with torch.inference_mode():
        noise, y = noise_of(model.eval(), x, labels).repeat(4, 1, 1, 1), labels.repeat(4, 1)
        x = ddim_sample(model, (noise + torch.randn_like(noise)) / 2 ** 0.5, y, 2.0, 20)
    save_grid(to_uint8(x), RUNS / f"{name}-x_T.png", columns=10)
    metrics = fid.score(x.clamp(-1, 1).cpu(), y.cpu(), judge, info["names"], forgotten, None)
    lines.append({**lines[0], "name": f"{name}-invert-10-x_T", "ar_100": None, "ar_300": metrics["ar"]})
    for line in lines:
        write(line)

def curve(row):
    """The points of the attack, as in its result.json."""
    return [{"step": s, "ar": row[f"ar_{s}"]} for s in POINTS if row[f"ar_{s}"] != ""]

def show(runs, key, scale=100):
    """The mean, and from lowest to highest where there are several runs."""
    values = [scale * run[key] for run in runs if run[key] != ""]
    ends = f" ({min(values):.0f}..{max(values):.0f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{ends}" if values else "-"

def tables():
    """The results, the second judge beside the first, half_life.png and fid.png."""
    text = ("name", "method", "target", "aux", "alternative")
    rows = [{k: float(v) if v and k not in text else v for k, v in row.items()}
            for row in csv.DictReader(CSV.open(newline=""))]
    attacked = [row for row in rows if row["ar_1000"] != ""]
    groups, lives, fids = {}, {}, {}
    for row in attacked:
        name = f"{row['method']}-{row['target'].split()[1]}"
        _, budget, *more = (row["name"].removeprefix(name) + "-").split("-")          # then the seed
        groups.setdefault((row["target"], row["method"], budget, " ".join(more[1:]).strip()), []).append(row)
    first, more = [], []
    for key, runs in sorted(groups.items()):
        halves = [attack.half_life(curve(run)) for run in runs]
        error = statistics.fmean(run["fid_error"] for run in runs)
        first.append([*key, len(runs), *(show(runs, k) for k in ("ua", "cls", "style")),
                      f"{show(runs, 'fid', 1)} +- {error:.0f}", *(show(runs, f"ar_{s}") for s in (100, 400, 1000)),
                      ", ".join(halves)])
        more.append([*key, show(runs, "seconds", 1), *(show(runs, k) for k in ("none", "end_cls", "end_style")),
                     *(show(runs, k, 1) for k in ("end_fid", "moved", "attack_moved", "undone"))])
        steps = [1000 if half == "-" else min(int(half), 1000) for half in halves if half != "0"]
        if key[2] in ("low", "middle", "high") and not key[3] and steps:       # without what was not forgotten
            lives.setdefault(f"{key[1]} {key[0].split()[1]}", []).append(
                (1e3 * runs[0]["steps"] * runs[0]["lr"], statistics.fmean(steps), min(steps), max(steps)))

    for title, table in (
            ("runs | UA | retained class | retained style | FID | AR 100 | AR 400 | AR 1000 | half-life", first),
            ("seconds | none | class after the attack | style after | FID after | moved | attack moved | undone", more)):
        print(f"| target | method | budget | more | {title} |\n|" + "---|" * (len(table[0]) if table else 4))
        print("".join(f"| {' | '.join(map(str, line))} |\n" for line in table))
    print("Both judges, the second one after the comma:\n\n| run | UA | class | style | AR at the end |\n|---|---|---|---|---|")
    for row in attacked:
        pairs = [(row[k], row[f"second_{k}"]) for k in ("ua", "cls", "style")] + [(curve(row)[-1]["ar"], row["second_ar_end"])]
        cells = [f"{100 * a:.1f}, {100 * b:.1f}" + " differ" * (abs(a - b) > 0.1) for a, b in pairs]
        print(f"| {row['name']} | " + " | ".join(cells) + " |")

    print("\n| run | highest AR of sixteen inversions | by | from ten images at the own row, rate 0.05 | the label's MLP learns, "
          "too | from x_T near the images' |\n|---|---|---|---|---|---|")
    inversions = {}
    for row in rows:
        run, _, attacker = row["name"].partition("-invert-")
        if attacker:
            inversions.setdefault(run, {})[attacker] = max(row["ar_100"] or 0, row["ar_300"])
    for run, found in sorted(inversions.items()):
        others = [found.pop("10-0.003-mlp"), found.pop("10-x_T")]
        best = max(found, key=found.get)
        shares = " | ".join(f"{100 * share:.1f}" for share in (found["10-0.05-own"], *others))
        print(f"| {run} | {100 * found[best]:.1f} | {best} | {shares} |")

    for row in rows:
        if "-fid-" in row["name"]:
            low, high = row["fid"] - row["fid_error"], row["fid"] + row["fid_error"]
            fids.setdefault(f"{row['method']} {row['target']}", []).append((row["steps"], row["fid"], low, high))
    lives = {name: points for name, points in lives.items() if len(points) > 1}
    for i, points in enumerate(lives.values()):                      # apart, so that all are seen
        points[:] = [(x + 4 * i, *(y - 6 * i for y in ys)) for x, *ys in points]
    for name, series, title, xlabel, top in (
            ("half_life.png", lives, "half-life in attack steps (1000: then, or not in the attack; lines 6 apart)",
             "budget of unlearning: steps x rate x 1000", 1000),
            ("fid.png", fids, "FID of the retained conditions, +- its standard error", "step of unlearning", None)):
        if series:
            save_plot(CSV.parent / name, {k: tuple(zip(*sorted(v))) for k, v in series.items()}, title, xlabel, top)

globals()[sys.argv[1]](*sys.argv[2:])
PYTHON
}

mkdir -p $RUNS
if [ $# = 0 ]; then
    judge                                             # now, before two jobs want it at once
    plan | xargs -L 1 -P ${JOBS:-2} bash $0
else
    "$@"
fi
