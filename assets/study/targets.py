"""The study over all targets: where a model forgets decides what brings it back.

    python assets/study/targets.py tries                             # weights that have no row yet
    python assets/study/targets.py plan                              # cells that have no row yet
    python assets/study/targets.py cell shapes cls=square dimum-unet 0       # a row of targets.csv
    python assets/study/targets.py weight shapes cls=bar salun-low 1e-3      # a row of weights.csv
    python assets/study/targets.py second_classifier shapes          # train a classifier of its own
    bash assets/study/targets.sh                                     # all of it, two jobs at once

The targets are all classes and styles of shapes but bar and dots, and all classes of Fashion-MNIST
but bag: these three choose the weights. The environment can name another folder for the two tables
(TABLES) and for the second classifiers (RUNS).
"""
import copy
import csv
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import torch
from torchvision.datasets import FashionMNIST

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))        # where the scripts lie

import attack
import fid
import unlearn
from model import (FACTORS, find_value, load_checkpoint, load_file, make_parser, matches,
                   pairs_text, pick_device, run, shipped)
from train_ddpm import SHAPES, learnable, load_data

TABLES = Path(os.environ.get("TABLES", HERE))
RUNS = Path(os.environ.get("RUNS", "runs/study"))
DEVICE = pick_device("auto")

# ---- the plan ------------------------------------------------------------------------------------

# {arm: (method, what may learn, steps, rate)}
ARMS = {
    "dimum-all": ("dimum", "all", 200, 1e-3),
    "dimum-label": ("dimum", "label", 200, 1e-3),
    "dimum-unet": ("dimum", "unet", 200, 1e-3),
    "salun-all": ("salun", "all", 200, 1e-3),
    "salun-label": ("salun", "label", 200, 1e-3),
    "salun-unet": ("salun", "unet", 200, 1e-3),
    "twice": ("twice", "all", 200, 1e-3),
    "twice-400": ("twice", "all", 400, 1e-3),
    "sfron": ("sfron", "all", 200, 1e-3),
    "swap": ("swap", "all", 0, 1e-3),
    "dimum-low": ("dimum", "all", 200, 3e-4),
    "salun-low": ("salun", "all", 200, 3e-4),
}
# The weights, chosen on bar, dots and bag (weights.csv) by UA of at least 99 %, then by the shares
# of what is retained, then by FID. Keys: a method, an arm, or a dataset and an arm
WEIGHTS = {"dimum": 1.0, "twice": 1.0, "salun": 3e-3, "sfron": 10.0, "swap": 1.0}

# The weights that are tried. All arms of a method at a cost have the same weight, whatever may learn,
# and `twice`, which has DiMUM's loss, has DiMUM's. Those of shapes at the rate 1e-3 are in tries.csv
TRIES = {
    ("shapes", "salun-low"): (3e-4, 1e-3, 3e-3),
    ("fashion", "salun-all"): (1e-3, 3e-3, 1e-2),
    ("shapes", "dimum-low"): (0.3, 1.0, 3.0),
    ("fashion", "dimum-all"): (0.3, 1.0, 3.0),
}
CHOOSING = {"shapes": ("cls=bar", "style=dots"), "fashion": ("cls=Bag",)}

AGAIN = ["cls=square", "cls=heart", "style=sketch", "style=neon"]      # with a second seed
SHAPES_TARGETS = AGAIN + ["style=flat", "style=stripes"] + [
    f"cls={name}" for name in SHAPES if name not in ("bar", "square", "heart")]
FASHION_TARGETS = [f"cls={name}" for name in FashionMNIST.classes if name != "Bag"]
MAIN_ARMS = ["dimum-label", "dimum-unet", "dimum-all", "twice", "salun-all"]
MORE_ARMS = ["salun-label", "salun-unet", "twice-400", "dimum-low", "salun-low", "swap"]

def planned():
    """The cells (dataset, target, arm, seed), what matters most first."""
    cells = [product(["shapes"], SHAPES_TARGETS, MAIN_ARMS, [0]),
             product(["fashion"], FASHION_TARGETS, MAIN_ARMS[:-1], [0]),
             product(["shapes"], SHAPES_TARGETS, MORE_ARMS, [0]),
             product(["fashion"], FASHION_TARGETS, ["salun-all"], [0]),
             product(["shapes"], SHAPES_TARGETS, ["sfron"], [0]),
             product(["shapes"], AGAIN, MAIN_ARMS, [1])]
    return chain(*cells)

def tries():
    """Print the weights that were not tried yet, one a line, as the words after `weight`."""
    done = {(line["name"], float(line["weight"])) for line in read_rows("weights.csv")}
    for (dataset, arm), weights in TRIES.items():
        for target, weight in product(CHOOSING[dataset], weights):
            if (cell_name(dataset, target, arm, 100), weight) not in done:
                print(f"{dataset} {target} {arm} {weight}")

def plan():
    """Print the cells that have no row yet, one a line, as the words after `cell`."""
    done = {line["name"] for line in read_rows("targets.csv")}
    for dataset, target, arm, seed in planned():
        if cell_name(dataset, target, arm, seed) not in done:
            print(f"{dataset} '{target}' {arm} {seed}")

def weight_of(dataset, arm):
    """The weight of an arm: the one of the narrowest key."""
    for key in (f"{dataset} {arm}", arm, ARMS[arm][0]):
        if key in WEIGHTS:
            return WEIGHTS[key]

def cell_name(dataset, target, arm, seed):
    return f"{dataset} {target} {arm} {seed}"

# ---- the tables ----------------------------------------------------------------------------------

POINTS = (0, 25, 50, 100, 200, 400)                # steps of DiMRA
ABOUT = ["name", "dataset", "target", "arm", "seed", "steps", "lr", "weight", "seconds"]
FORGOTTEN = ["ua", "cls", "style", "fid", "fid_error", "none", "leak"]
COLUMNS = {
    "weights.csv": [*ABOUT, *FORGOTTEN],
    "targets.csv": [
        *ABOUT, *FORGOTTEN, "second_ua", "moved",
        "back_row", "back_mlp", "back_path",       # AR with parts of the original put back
        *(f"ar_{step}" for step in POINTS), "second_ar_400", "leak_100", "leak_400",
        "inversion", "second_inversion"],
}

def write(table, line):
    """Add a row, a dict by COLUMNS; floats are rounded to four digits."""
    rounded = {}
    for key, value in line.items():
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        rounded[key] = value
    path = TABLES / table
    with suppress(FileExistsError), open(path, "x", newline="") as file:
        csv.DictWriter(file, COLUMNS[table]).writeheader()
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, COLUMNS[table]).writerow(rounded)

def read_rows(table):
    """The rows of a table: dicts of text."""
    path = TABLES / table
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

# ---- a cell --------------------------------------------------------------------------------------

def forget(dataset, target, arm, seed, weight):
    """Unlearn as an arm says. Returns (the model before, the model after, evaluation, training set,
    a row's first columns)."""
    method, learn, steps, lr = ARMS[arm]
    before, info = load_checkpoint(shipped(f"{dataset}.pt"), DEVICE)
    images, y, names = load_data(dataset, "train", device=DEVICE)
    flag, _, name = target.partition("=")
    factor = FACTORS.index(flag)
    pairs = [(factor, find_value(name, names[factor], target))]
    args = SimpleNamespace(dataset=dataset, data_dir="data", seed=seed, steps=steps, lr=lr,
                           weight=weight, batch_size=16, alternative="class", alt_size=None,
                           samples=240, sampler_steps=20)
    evaluation = fid.prepare_evaluation(info, images, y, pairs, pairs, args)
    torch.manual_seed(seed)
    data = unlearn.Data(images, y, names, pairs, [], args)
    model = copy.deepcopy(before).train()
    unlearn.choose_learning(model, learn)
    optimizer = torch.optim.Adam(learnable(model), lr, fused=True)
    training = unlearn.METHODS[method]["function"](model, data, optimizer, args)
    began = time.time()
    for _ in unlearn.cosine(training, optimizer, steps):
        pass
    seconds = time.time() - began
    unlearn.choose_learning(model, "all")
    line = dict(name=cell_name(dataset, target, arm, seed), dataset=dataset,
                target=pairs_text(pairs, names), arm=arm, seed=seed, steps=steps, lr=lr,
                weight=weight, seconds=seconds)
    return before, model, evaluation, (images, y), line

def weight(dataset, target, arm, weight):
    """A row of weights.csv: what an arm forgets and retains with a weight."""
    _, model, evaluation, _, line = forget(dataset, target, arm, seed=100, weight=float(weight))
    metrics, _ = fid.measure(model, evaluation, line["steps"], "ua")
    write("weights.csv", {**line, **{key: metrics.get(key) for key in FORGOTTEN}})

def cell(dataset, target, arm, seed):
    """A row of targets.csv: what an arm forgets of a target, and what the attacks bring back. A run
    with a UA below 95 % is not attacked: its columns stay empty."""
    before, model, evaluation, train, line = forget(dataset, target, arm, int(seed),
                                                    weight_of(dataset, arm))
    metrics, samples = fid.measure(model, evaluation, line["steps"], "ua")
    line.update({key: metrics.get(key) for key in FORGOTTEN})
    y = torch.cat([evaluation.forget, evaluation.retain])
    line["second_ua"] = score_again(samples, y, evaluation)["ua"]
    changes = [(p - p0).square().sum() for p, p0 in zip(model.parameters(), before.parameters())]
    line["moved"] = sum(changes).sqrt().item()
    evaluation = replace(evaluation, forget=evaluation.forget[::2])
    if ARMS[arm][1] == "all":
        line.update(put_back(before, model, evaluation))
    if metrics["ua"] >= 0.95:
        line.update(relearn(model, evaluation, train, int(seed)))
        line.update(invert(model, evaluation, train, int(seed)))
    write("targets.csv", line)

def score_again(samples, y, evaluation):
    """Metrics of samples by the second classifier of the dataset."""
    path = RUNS / f"second_classifier-{evaluation.protocol['dataset']}" / "model.pt"
    data = load_file(path, "classifier")
    classifier = fid.Classifier(**data["args"]).to(DEVICE).eval()
    classifier.load_state_dict(data["weights"])
    return fid.score(samples, y, replace(evaluation, classifier=classifier, reference=None))

def second_classifier(dataset):
    """Train a classifier with another seed and more width."""
    _, steps = fid.CLASSIFIERS[dataset]
    fid.CLASSIFIERS[dataset] = (40, steps)
    args = SimpleNamespace(dataset=dataset, data_dir="data", image_size=32, steps=None,
                           batch_size=None, seed=1, out=RUNS / f"second_classifier-{dataset}")
    fid.train_classifier(args, DEVICE)

def put_back(before, model, evaluation):
    """The AR after parts of the original are put back: the label's row; with it its MLP; with these
    the blocks' projections of label and time, which all labels share."""
    [(factor, value)] = evaluation.targets
    original = dict(before.named_parameters())
    again = copy.deepcopy(model)
    result = {}
    with torch.no_grad():
        again.label_embs[factor].weight[value] = before.label_embs[factor].weight[value]
        result["back_row"], _ = measure_ar(again, evaluation, "row")
        again.label_mlps[factor].load_state_dict(before.label_mlps[factor].state_dict())
        result["back_mlp"], _ = measure_ar(again, evaluation, "mlp")
        for name, p in again.named_parameters():
            if ".emb." in name:
                p.copy_(original[name])
        result["back_path"], _ = measure_ar(again, evaluation, "path")
    return result

def measure_ar(model, evaluation, step):
    """The AR of a model, and the samples that show it."""
    metrics, samples = fid.measure(model, evaluation, step, "ar", retained=False)
    return metrics["ar"], samples

def prepare_attack(model, pictures, evaluation, batch_size, rate, seed):
    """What an attack takes: a copy of the model, the attacker's data, an optimiser."""
    args = SimpleNamespace(batch_size=batch_size, dataset=evaluation.protocol["dataset"])
    data = attack.AttackData(*pictures, evaluation.targets, args)
    attacked = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(attacked.parameters(), rate, fused=True)
    torch.manual_seed(seed)
    return attacked, data, optimizer

def relearn(model, evaluation, train, seed):
    """AR at POINTS of DiMRA with the retained data, and the leak on the way."""
    images, y = train
    keep = ~matches(y, evaluation.targets)
    attacked, data, optimizer = prepare_attack(model, (images[keep], y[keep]), evaluation, 32, 1e-3,
                                               seed)
    result = {}
    result["ar_0"], _ = measure_ar(attacked, evaluation, 0)
    training = attack.dimra(attacked, data, optimizer, SimpleNamespace(steps=POINTS[-1]))
    for step, _ in enumerate(training, 1):
        if step in POINTS:
            result[f"ar_{step}"], samples = measure_ar(attacked, evaluation, step)
        if step in (100, 400):
            result[f"leak_{step}"] = fid.leak(attacked, evaluation, step)["leak"]
    result["second_ar_400"] = score_again(samples, evaluation.forget, evaluation)["ar"]
    return result

def invert(model, evaluation, train, seed):
    """The AR of an attacker with ten pictures of the target, who trains its embedding alone."""
    pictures = attack.forgotten_images(*train, evaluation.targets, 10, beside_retained=False)
    attacked, data, optimizer = prepare_attack(model, pictures, evaluation, 16, 0.05, seed)
    for _ in attack.inversion(attacked, data, optimizer, SimpleNamespace(steps=150)):
        pass
    ar, samples = measure_ar(attacked, evaluation, 150)
    second = score_again(samples, evaluation.forget, evaluation)
    return {"inversion": ar, "second_inversion": second["ar"]}

# ---- command line --------------------------------------------------------------------------------

COMMANDS = {"tries": tries, "weight": weight, "plan": plan, "cell": cell,
            "second_classifier": second_classifier}

def main():
    """Call the function that the command line names."""
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", metavar="WORD", help="as above")
    args = parser.parse_args()
    COMMANDS[args.command](*args.words)

if __name__ == "__main__":
    run(main)
