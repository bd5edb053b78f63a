"""The study: where a model forgets decides what brings it back. The plan, its runs, its tables.

    python assets/study/study.py tables               # print results.csv as tables, draw curves.png
    bash assets/study/run.sh                          # run what has no row yet, two jobs at once
    python assets/study/study.py cell shapes cls=square dimum-unet 0          # a row of results.csv
    python assets/study/study.py invert shapes cls=square dimum-all   # sixteen of inversions.csv
    python assets/study/study.py weight shapes cls=bar salun-low 1e-3 # a row of tries.csv
    python assets/study/study.py plan                 # cells without a row; `tries`: the weights
    python assets/study/study.py second_classifier shapes
    python assets/study/study.py law OUT.png LABEL... # a row of pictures for each of these runs
    python assets/study/study.py nothing OUT.png RUN  # what is drawn without a label

The targets are all classes and styles of shapes but bar and dots, and all classes of Fashion-MNIST
but bag: these three choose the weights. The environment can name another folder for the tables
(TABLES), and for the second classifiers and the pictures of the runs (RUNS).
"""
import copy
import csv
import functools
import inspect
import os
import sys
import time
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import scipy.stats
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))        # where the scripts lie

import attack
import fid
import unlearn
from model import (FACTORS, explain, fail, find_value, load_checkpoint, load_file, make_parser,
                   matches, pick_device, require, run, save_grid, save_picture, say, shipped)
from train_ddpm import SHAPES, learnable, load_data

TABLES = Path(os.environ.get("TABLES", HERE))
RUNS = Path(os.environ.get("RUNS", "runs/study"))
DEVICE = pick_device("auto")

# ---- the plan ------------------------------------------------------------------------------------

# what is run: the method, what may learn, steps and rate
COST = dict(learn="all", steps=200, lr=1e-3)
ARMS = {
    "original": dict(COST, method="finetune", steps=0),
    "dimum-all": dict(COST, method="dimum"),
    "dimum-label": dict(COST, method="dimum", learn="label"),
    "dimum-unet": dict(COST, method="dimum", learn="unet"),
    "salun-all": dict(COST, method="salun"),
    "salun-label": dict(COST, method="salun", learn="label"),
    "salun-unet": dict(COST, method="salun", learn="unet"),
    "sfron": dict(COST, method="sfron"),
    "swap": dict(COST, method="swap", steps=0),
    "dimum-low": dict(COST, method="dimum", lr=3e-4),
    "salun-low": dict(COST, method="salun", lr=3e-4),
}
# {(dataset, method, rate): weight}, chosen on bar, dots and bag (tries.csv) by UA of at least 99 %,
# then by the shares of what is retained, then by FID. One sample more or less is a tie, and of tied
# weights the one of 1 is taken: DiMUM's, everywhere. SalUn's at 3e-4 is an exception: on dots no
# weight reaches 99 %, and 3e-4 costs class, 3e-3 fails on bar. No weight depends on what may learn
WEIGHTS = {
    ("shapes", "salun", 1e-3): 3e-3,
    ("shapes", "salun", 3e-4): 1e-3,
    ("shapes", "sfron", 1e-3): 10.0,
    ("fashion", "salun", 1e-3): 1e-2,
}
TRIES = {                                          # {(dataset, arm): the weights that are tried}
    ("shapes", "dimum-low"): (0.3, 1.0, 3.0),
    ("shapes", "salun-low"): (3e-4, 1e-3, 3e-3),
    ("fashion", "dimum-all"): (0.3, 1.0, 3.0),
    ("fashion", "salun-all"): (1e-3, 3e-3, 1e-2),
}
CHOOSING = {"shapes": ("cls=bar", "style=dots"), "fashion": ("cls=Bag",)}

AGAIN = ["cls=square", "cls=heart", "style=sketch", "style=neon"]      # with a second seed
SHAPES_TARGETS = AGAIN + ["style=flat", "style=stripes"] + [
    f"cls={name}" for name in SHAPES if name not in ("bar", "square", "heart")]
FASHION_TARGETS = [f"cls={name}" for name in FashionMNIST.classes if name != "Bag"]
MAIN_ARMS = ["dimum-label", "dimum-unet", "dimum-all", "salun-all"]
MORE_ARMS = ["original", "salun-label", "salun-unet", "dimum-low", "salun-low", "swap"]

def planned():
    """The cells (dataset, target, arm, seed), what matters most first."""
    cells = [product(["shapes"], SHAPES_TARGETS, MAIN_ARMS, [0]),
             product(["fashion"], FASHION_TARGETS, MAIN_ARMS[:-1], [0]),
             product(["shapes"], SHAPES_TARGETS, MORE_ARMS, [0]),
             product(["fashion"], FASHION_TARGETS, ["original", "salun-all"], [0]),
             product(["shapes"], SHAPES_TARGETS, ["sfron"], [0]),
             product(["shapes"], AGAIN, MAIN_ARMS, [1])]
    return chain(*cells)

def tries():
    """Print the weights that were not tried yet, one a line, as the words after `weight`."""
    done = {(line["method"], line["target"], float(line["rate"]), float(line["weight"]))
            for line in read_rows("tries.csv") if line["what"] == "weight"}
    for (dataset, arm), weights in TRIES.items():
        for target, weight in product(CHOOSING[dataset], weights):
            value = target.partition("=")[2]
            if (ARMS[arm]["method"], value, ARMS[arm]["lr"], weight) not in done:
                print(f"{dataset} {target} {arm} {weight}")

def finished():
    """The names of the cells that have a row."""
    return {line["name"] for line in read_rows("results.csv")}

def missing():
    """The planned cells that have no row yet."""
    done = finished()
    return [words for words in planned() if cell_name(*words) not in done]

def plan():
    """Print the missing cells, one a line, as the words after `cell`."""
    for dataset, target, arm, seed in missing():
        print(f"{dataset} '{target}' {arm} {seed}")

def weight_of(dataset, arm):
    """The chosen weight, or 1."""
    return WEIGHTS.get((dataset, ARMS[arm]["method"], ARMS[arm]["lr"]), 1.0)

def cell_name(dataset, target, arm, seed):
    return f"{dataset} {target} {arm} {seed}"

# ---- the tables ----------------------------------------------------------------------------------

POINTS = (0, 25, 50, 100, 200, 400)                # steps of DiMRA
INVERSION_POINTS = (75, 150)
MEASURED = ["ua", "cls", "style", "fid", "fid_error", "none", "leak"]
COLUMNS = {
    "results.csv": [
        "name", "dataset", "target", "arm", "seed", "steps", "lr", "weight", "seconds",
        *MEASURED, "second_ua", "moved",
        "back_row", "back_mlp", "back_path",       # AR with parts of the original put back
        *(f"ar_{step}" for step in POINTS), "second_ar_400", "leak_100", "leak_400",
        *(f"inversion_{step}" for step in INVERSION_POINTS), "second_inversion"],
    "tries.csv": [
        "what", "method", "target", "seed", "steps", "batch", "rate", "weight", "samples",
        "ua", "cls", "style", "fid", "fid_error", "none", "seconds", "ar", "chosen", "note"],
    "inversions.csv": ["name", "attacker", "ar_100", "ar_300"],
}

def write(table, line):
    """Add a row, a dict by COLUMNS; floats are rounded to four digits."""
    rounded = {}
    for key, value in line.items():
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        rounded[key] = value
    TABLES.mkdir(parents=True, exist_ok=True)
    with open(TABLES / table, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[table], lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(rounded)

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
    seconds)."""
    for own in Path("runs", dataset).glob("classifier*"):
        fail(f"the study measures by the shipped classifier; move {own} away")
    settings = ARMS[arm]
    before, info = load_checkpoint(shipped(f"{dataset}.pt"), DEVICE)
    images, y, names = load_data(dataset, "train", device=DEVICE)
    flag, _, name = target.partition("=")
    factor = FACTORS.index(flag)
    pairs = [(factor, find_value(name, names[factor], target))]
    args = SimpleNamespace(dataset=dataset, data_dir="data", seed=seed, steps=settings["steps"],
                           lr=settings["lr"], weight=weight, batch_size=16, alternative="class",
                           alt_size=None, samples=240, sampler_steps=20)
    evaluation = fid.prepare_evaluation(info, images, y, pairs, pairs, args)
    torch.manual_seed(seed)
    data = unlearn.Data(images, y, names, pairs, pairs, args)
    model = copy.deepcopy(before).train()
    unlearn.choose_learning(model, settings["learn"])
    optimizer = torch.optim.Adam(learnable(model), args.lr, fused=True)
    training = unlearn.METHODS[settings["method"]]["function"](model, data, optimizer, args)
    began = time.time()
    for _ in unlearn.cosine(training, optimizer, args.steps):
        pass
    seconds = time.time() - began
    unlearn.choose_learning(model, "all")
    return before, model, evaluation, (images, y), seconds

def try_weight(dataset, target, arm, weight):
    """A row of tries.csv: what an arm forgets and retains with a weight."""
    settings = ARMS[arm]
    _, model, evaluation, _, seconds = forget(dataset, target, arm, seed=100, weight=float(weight))
    metrics, _ = fid.measure(model, evaluation, settings["steps"], "ua")
    line = dict(what="weight", method=settings["method"], target=target.partition("=")[2],
                seed=100, steps=settings["steps"], batch=16, rate=settings["lr"], weight=weight,
                samples=f"{len(evaluation.forget)}+{len(evaluation.retain)}", seconds=seconds)
    for key in ("ua", "cls", "style", "fid", "fid_error", "none"):
        line[key] = metrics.get(key)
    write("tries.csv", line)

def cell(dataset, target, arm, seed):
    """A row of results.csv: what an arm forgets of a target, and what the attacks bring back. A run
    with a UA below 95 % is not attacked: its columns stay empty."""
    name = cell_name(dataset, target, arm, seed)
    require(name in [cell_name(*words) for words in planned()], f"{name} is not in the plan; such a "
            "line is: shapes cls=square dimum-unet 0")
    if name in finished():
        say(f"{name} has a row")
        return
    load_second(dataset)                               # fails before the minutes of training
    seed = int(seed)
    weight = weight_of(dataset, arm)
    before, model, evaluation, train, seconds = forget(dataset, target, arm, seed, weight)
    line = dict(name=name, dataset=dataset, target=target, arm=arm, seed=seed, weight=weight,
                steps=ARMS[arm]["steps"], lr=ARMS[arm]["lr"], seconds=seconds)
    metrics, samples = fid.measure(model, evaluation, line["steps"], "ua")
    line.update({key: metrics.get(key) for key in MEASURED})
    y = torch.cat([evaluation.forget, evaluation.retain])
    line["second_ua"] = score_again(samples, y, evaluation)["ua"]
    changes = [(p - p0).square().sum() for p, p0 in zip(model.parameters(), before.parameters())]
    line["moved"] = sum(changes).sqrt().item()
    if metrics["ua"] >= 0.95:
        few = replace(evaluation, forget=evaluation.forget[::2])
        if ARMS[arm]["learn"] == "all":
            line.update(put_back(before, model, few))
        relearned, before_attack, after_dimra = relearn(model, few, train, seed)
        inverted, after_inversion = invert_once(model, few, train, seed)
        line.update(relearned, **inverted)
        rows = torch.cat([before_attack[::2], after_dimra[::2], after_inversion[::2]])
        picture = line["name"].replace("/", "-") + ".png"
        save_grid(rows, RUNS / "pictures" / picture, columns=20,
                  rows=["unlearned", "DiMRA", "inversion"])
    write("results.csv", line)

def second_path(dataset):
    return RUNS / f"second_classifier-{dataset}" / "model.pt"

@functools.cache
def load_second(dataset):
    """The second classifier of a dataset; one line where there is none."""
    path = second_path(dataset)
    require(path.is_file(), "there is no second classifier yet; run 'python assets/study/study.py "
            f"second_classifier {dataset}'")
    data = load_file(path, "classifier")
    classifier = fid.Classifier(**data["args"]).to(DEVICE).eval()
    classifier.load_state_dict(data["weights"])
    return classifier

def score_again(samples, y, evaluation):
    """Metrics of samples by the second classifier of the dataset."""
    classifier = load_second(evaluation.protocol["dataset"])
    return fid.score(samples, y, replace(evaluation, classifier=classifier, reference=None))

def second_classifier(dataset):
    """Train a classifier with another seed and more width."""
    _, steps = fid.CLASSIFIERS[dataset]
    fid.CLASSIFIERS[dataset] = (40, steps)
    args = SimpleNamespace(dataset=dataset, data_dir="data", image_size=32, steps=None,
                           batch_size=None, seed=1, out=second_path(dataset).parent)
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
    """AR at POINTS of DiMRA with the retained data, and the leak on the way. Returns (columns,
    the samples before, the samples after)."""
    images, y = train
    keep = ~matches(y, evaluation.targets)
    attacked, data, optimizer = prepare_attack(model, (images[keep], y[keep]), evaluation, 32, 1e-3,
                                               seed)
    columns = {}
    columns["ar_0"], first = measure_ar(attacked, evaluation, 0)
    training = attack.dimra(attacked, data, optimizer, SimpleNamespace(steps=POINTS[-1]))
    for step, _ in enumerate(training, 1):
        if step in POINTS:
            columns[f"ar_{step}"], samples = measure_ar(attacked, evaluation, step)
        if step in (100, 400):
            columns[f"leak_{step}"] = fid.leak(attacked, evaluation, step)["leak"]
    columns["second_ar_400"] = score_again(samples, evaluation.forget, evaluation)["ar"]
    return columns, first, samples

def invert_once(model, evaluation, train, seed):
    """AR at INVERSION_POINTS of an attacker with ten pictures of the target, who starts from its
    own embedding. Returns (columns, the last samples)."""
    [(factor, value)] = evaluation.targets
    start = model.label_embs[factor].weight[value].detach()
    ars, samples = train_embedding(model, evaluation, train, 10, 0.05, start, INVERSION_POINTS,
                                   seed)
    columns = {f"inversion_{step}": ar for step, ar in ars.items()}
    columns["second_inversion"] = score_again(samples, evaluation.forget, evaluation)["ar"]
    return columns, samples

def train_embedding(model, evaluation, train, count, rate, start, points, seed):
    """Inversion with `count` pictures of the target, from an embedding `start` (width,). Returns
    ({step: AR} at the points, the last samples)."""
    pictures = attack.forgotten_images(*train, evaluation.targets, evaluation.targets,
                                       count, beside_retained=False)
    attacked, data, optimizer = prepare_attack(model, pictures, evaluation, 16, rate, seed)
    [(factor, value)] = evaluation.targets
    attacked.label_embs[factor].weight.data[value] = start
    training = attack.inversion(attacked, data, optimizer, SimpleNamespace(steps=points[-1]))
    ars = {}
    for step, _ in enumerate(training, 1):
        if step in points:
            ars[step], samples = measure_ar(attacked, evaluation, step)
    return ars, samples

# ---- sixteen attackers ---------------------------------------------------------------------------

def attackers(table, value):
    """{name: (pictures, rate, start)}: sixteen who train an embedding, from several starts in the
    embedding table (values + 1, width) of the forgotten value. A name is pictures-rate-start."""
    torch.manual_seed(0)
    others = [v for v in torch.randperm(len(table) - 1).tolist() if v != value]
    starts = {"own": table[value]}
    for other in others[:3]:
        starts[f"row{other}"] = table[other]
    starts["far"] = 2 * torch.randn(table.shape[1])
    found = {}
    for rate in (0.02, 0.05, 0.2):
        for name, start in starts.items():
            found[f"10-{rate}-{name}"] = (10, rate, start)
    found["100-0.05-own"] = (100, 0.05, table[value])
    return found

def invert(dataset, target, arm):
    """A row of inversions.csv for each of the sixteen attackers on an arm's model (seed 0)."""
    name = cell_name(dataset, target, arm, 0)
    done = {line["attacker"] for line in read_rows("inversions.csv") if line["name"] == name}
    if len(done) == 16:
        return
    _, model, evaluation, train, _ = forget(dataset, target, arm, 0, weight_of(dataset, arm))
    evaluation = replace(evaluation, forget=evaluation.forget[::2])
    [(factor, value)] = evaluation.targets
    table = model.label_embs[factor].weight.detach().clone()
    for attacker, (count, rate, start) in attackers(table, value).items():
        if attacker in done:
            continue
        ars, _ = train_embedding(model, evaluation, train, count, rate, start, (100, 300), seed=0)
        line = {f"ar_{step}": ar for step, ar in ars.items()}
        line.update(name=name, attacker=attacker)
        write("inversions.csv", line)

# ---- tables --------------------------------------------------------------------------------------

TEXT = ("name", "dataset", "target", "arm")

def read_results(seed=0):
    """{arm: {(dataset, target): row}} of a seed; numbers are floats, or None where nothing is."""
    runs = {arm: {} for arm in [*ARMS, "twice"]}       # a method that missed its goal and is gone
    for line in read_rows("results.csv"):
        for key, text in line.items():
            if key not in TEXT:
                line[key] = float(text) if text else None
        if line["seed"] == seed:
            runs[line["arm"]][line["dataset"], line["target"]] = line
    return runs

GROUPS = ("classes", "styles", "Fashion")

def group_of(key):
    """Classes, styles, or the classes of Fashion-MNIST; key: (dataset, target)."""
    dataset, target = key
    if dataset == "fashion":
        return "Fashion"
    return "classes" if target.startswith("cls") else "styles"

def higher_ar(line):
    """The AR of the stronger of the two attackers, each at its end."""
    return max(line["ar_400"], line["inversion_150"])

def value_of(line, key):
    """What a row has in a column, or what a function makes of the row."""
    return key(line) if callable(key) else line[key]

def mean(lines, key, scale=100):
    """The mean of a column, or of a function of a row, over the rows that have it, or "-"."""
    values = [value_of(line, key) for line in lines]
    values = [scale * value for value in values if value is not None]
    return f"{fmean(values):.1f}" if values else "-"

def differences(pairs, key):
    """The second row's column, or function of a row, less the first's, for each of pairs. Rounded:
    shares of 40 samples are no round numbers in binary, and a margin of 0.3 is one of twelve
    samples."""
    found = []
    for first, second in pairs:
        found.append(round(value_of(second, key) - value_of(first, key), 4))
    return found

def print_table(title, head, lines):
    """A Markdown table; head: the columns' names, such as "a | b"."""
    columns = head.count("|") + 1
    print(f"{title}\n\n| {head} |\n|{'---|' * columns}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print()

def print_arms(runs, title):
    """A line for each arm: what it forgot and retained, and what came back."""
    lines = []
    for arm, of_target in runs.items():
        rows = list(of_target.values())
        if not rows:
            continue
        attacked = [line for line in rows if line["ar_400"] is not None]
        line = [arm, f"{len(attacked)} of {len(rows)}"]
        line += [mean(rows, key) for key in ("ua", "none", "cls", "style")]
        line.append(f"{mean(rows, 'fid', scale=1)} +- {mean(rows, 'fid_error', scale=1)}")
        line.append(mean(rows, "leak"))
        line += [mean(attacked, key) for key in ("leak_400", "ar_0", "ar_100", "ar_400",
                                                 "inversion_150", higher_ar)]
        lines.append(line)
    print_table(f"{title}: means over targets, in %; what the attacks bring back, over the targets "
                "that the arm forgot (UA of at least 95 %)",
                "arm | forgotten | UA | none | class | style | FID | leak | leak after DiMRA "
                "| AR before | DiMRA 100 | DiMRA 400 | inversion 150 | higher of the two", lines)

def signs(values):
    """"9 / 1, p 0.02": how many are above and below 0, and how likely so uneven signs are if either
    is as likely (a two-sided sign test, without the zeros)."""
    above = sum(value > 0 for value in values)
    below = sum(value < 0 for value in values)
    if above + below == 0:
        return "0 / 0"
    return f"{above} / {below}, p {scipy.stats.binomtest(above, above + below).pvalue:.2g}"

def pairs_of(runs, first, second):
    """{(dataset, target): (row, row)} of the targets that two arms have both forgotten."""
    found = {}
    for key, line in runs[first].items():
        other = runs[second].get(key)
        if other and line["ar_400"] is not None and other["ar_400"] is not None:
            found[key] = line, other
    return found

def grouped(of_target, groups=(*GROUPS, "all")):
    """(group, what {(dataset, target): ...} holds of it) for each group of targets that has any; a
    group may also be a dataset."""
    for group in groups:
        found = [line for key, line in of_target.items() if group in (group_of(key), key[0], "all")]
        if found:
            yield group, found

def print_law(runs):
    """Question 1: DiMUM in the U-Net against DiMUM in the label's path."""
    lines = []
    for group, pairs in grouped(pairs_of(runs, "dimum-label", "dimum-unet")):
        label, unet = zip(*pairs)
        dimra = differences(pairs, "ar_400")
        inversion = differences(pairs, "inversion_150")
        both = [d >= 0.3 and i <= -0.3 for d, i in zip(dimra, inversion)]
        lines.append([
            group, len(pairs),
            mean(label, "ar_400"), mean(unet, "ar_400"), signs(dimra), sum(d >= 0.3 for d in dimra),
            mean(label, "inversion_150"), mean(unet, "inversion_150"), signs(inversion),
            sum(i <= -0.3 for i in inversion), sum(both)])
    print_table("1. DiMUM in the label's path alone, and in the rest of the U-Net alone: AR in % "
                "after 400 steps of DiMRA and 150 of inversion; on how many targets the U-Net's is "
                "higher / lower; on how many it is at least 30 points higher, or lower, and both",
                "group | targets | DiMRA, label | DiMRA, U-Net | higher / lower | 30 higher "
                "| inversion, label | inversion, U-Net | higher / lower | 30 lower | both", lines)

def print_targets(runs, arms):
    """Every target: AR under DiMRA and inversion of some arms."""
    keys = dict.fromkeys(key for arm in arms for key in runs[arm])
    lines = []
    for key in keys:
        line = [" ".join(key)]
        for arm in arms:
            row = runs[arm].get(key)
            text = "-"
            if row:
                text = f"UA {100 * row['ua']:.4g}"
                if row["ar_400"] is not None:
                    text = f"{100 * row['ar_400']:.4g}, {100 * row['inversion_150']:.4g}"
            line.append(text)
        lines.append(line)
    print_table("Each target: AR in % after DiMRA and inversion, or UA where it was not forgotten",
                "target | " + " | ".join(arms), lines)

PARTS = ("back_row", "back_mlp", "back_path")

def print_hidden(runs):
    """Question 2: what parts of the original bring back, and whether that predicts the attacks."""
    lines = []
    pooled = []
    for arm, of_target in runs.items():
        measured = {key: line for key, line in of_target.items() if line["back_row"] is not None}
        for group, rows in grouped(measured, ("classes", "shapes", "Fashion")):
            line = [f"{arm}, {group}", len(rows), *(mean(rows, key) for key in ("ar_0", *PARTS))]
            lines.append([*line, mean(rows, "moved", scale=1), *correlations(rows)])
            if group == "shapes" and arm != "swap":    # swap is nothing but a copied row
                pooled += rows
    lines.append(["all arms but swap, shapes", len(pooled), *["-"] * 5, *correlations(pooled)])
    print_table("2. With everything free: AR in % with parts of the original put back (the row, "
                "also its MLP, also the projections), how far the weights moved, and rank "
                "correlations over targets (none where a column does not vary). The runs of a "
                "target are not independent, so that the last line has no p",
                "arm, group | targets | nothing | row | MLP | projections | moved "
                "| MLP, inversion | projections, inversion | moved, inversion "
                "| MLP, DiMRA | projections, DiMRA | moved, DiMRA", lines)

def correlations(rows):
    """Spearman's correlations of what was put back, and of the distance, with AR after attacks."""
    found = []
    for attacked in ("inversion_150", "ar_400"):
        for key in ("back_mlp", "back_path", "moved"):
            xs = [row[key] for row in rows]
            ys = [row[attacked] for row in rows]
            text = "-"
            if len(rows) > 4 and len(set(xs)) > 1 and len(set(ys)) > 1:
                text = f"{scipy.stats.spearmanr(xs, ys).statistic:.2f}"
            found.append(text)
    return found

def print_methods(runs):
    """Question 3: DiMUM and SalUn at equal steps and rates, and each at both rates, on the targets
    that both arms forgot."""
    groups = ("classes", "styles", "shapes", "Fashion", "all")
    lines = []
    for first, second in (("dimum-all", "salun-all"), ("dimum-low", "salun-low"),
                          ("dimum-all", "dimum-low"), ("salun-all", "salun-low")):
        for group, pairs in grouped(pairs_of(runs, first, second), groups):
            line = [f"{first}, {second}", group, len(pairs)]
            for key in ("ar_100", "ar_400", "second_ar_400", "inversion_150"):
                line += [mean(rows, key) for rows in zip(*pairs)]
                line.append(signs(differences(pairs, key)))
            lines.append(line)
    print_table("3. Two arms on the targets that both forgot: AR in % of the first and of the second "
                "arm, and on how many targets the second's is higher / lower; after 400 steps also "
                "by the second classifier",
                "arms | group | targets | DiMRA 100, first | second | higher / lower "
                "| DiMRA 400, first | second | higher / lower "
                "| by the second classifier, first | second | higher / lower "
                "| inversion 150, first | second | higher / lower", lines)

def print_twice(runs):
    """Question 4: `twice`, which was taken out, against DiMUM with everything free, with the same
    steps."""
    lines = []
    for group, pairs in grouped(pairs_of(runs, "dimum-all", "twice")):
        line = [group, len(pairs)]
        for key in ("ar_400", "inversion_150", higher_ar, "cls", "style"):
            line += [mean(rows, key) for rows in zip(*pairs)]
        lines.append([*line, signs(differences(pairs, higher_ar))])
    print_table("4. DiMUM with everything free, and twice, a method that was taken out: AR in %, the "
                "higher of the two attackers' and on how many targets that of twice is higher / "
                "lower; class and style",
                "group | targets | DiMRA, DiMUM | twice | inversion, DiMUM | twice "
                "| higher of the two, DiMUM | twice | class, DiMUM | twice | style, DiMUM | twice "
                "| higher / lower", lines)

def print_inversions():
    """The strongest of the sixteen attackers on each model."""
    found = {}
    for line in read_rows("inversions.csv"):
        ar = 100 * max(float(line["ar_100"]), float(line["ar_300"]))
        found.setdefault(line["name"], {})[line["attacker"]] = ar
    lines = []
    for name, shares in found.items():
        best = max(shares, key=shares.get)
        lines.append([name, len(shares), f"{shares[best]:.1f}", best,
                      f"{shares.get('10-0.05-own', float('nan')):.1f}"])
    print_table("Inversion by sixteen attackers: the highest AR in %, of two points each, for "
                "each model; a retrained model never saw the target",
                "model | attackers | highest | by | 10-0.05-own", lines)

def print_judges(runs):
    """The runs in which the two classifiers differ by more than ten points."""
    lines = []
    for of_target in runs.values():
        for line in of_target.values():
            for first, second in (("ua", "second_ua"), ("ar_400", "second_ar_400"),
                                  ("inversion_150", "second_inversion")):
                if line[first] is not None and round(abs(line[first] - line[second]), 4) > 0.1:
                    shares = f"{100 * line[first]:.1f}", f"{100 * line[second]:.1f}"
                    lines.append([line["name"], first, *shares])
    print_table("Where the second classifier differs by more than ten points",
                "run | of | first | second", lines)

def tables():
    """Print the tables from results.csv and inversions.csv, and draw curves.png beside them."""
    runs = read_results()
    for group in GROUPS:
        chosen = {arm: {key: line for key, line in rows.items() if group_of(key) == group}
                  for arm, rows in runs.items()}
        print_arms(chosen, group)
    print_arms(complete(runs), "The targets that all of the main arms have")
    print_law(runs)
    print_targets(runs, [*MAIN_ARMS, "salun-label", "dimum-low", "salun-low", "twice"])
    print_hidden(runs)
    print_methods(runs)
    print_twice(runs)
    print_inversions()
    print_judges(runs)
    again = read_results(seed=1)
    if any(again.values()):
        print_arms(again, "The second seed")
    print(f"{len(missing())} cells have no row yet: python assets/study/study.py plan")
    draw_curves(runs)

def complete(runs):
    """The main arms, on the targets that each of them has."""
    keys = set.intersection(*(set(runs[arm]) for arm in MAIN_ARMS))
    return {arm: {key: line for key, line in runs[arm].items() if key in keys} for arm in MAIN_ARMS}

# ---- pictures ------------------------------------------------------------------------------------

FONT = ImageFont.load_default(size=14)
DRAWN = {"dimum-label": "#0072b2", "dimum-unet": "#d55e00", "dimum-all": "#009e73"}

def draw_curves(runs):
    """curves.png: AR by the step of an attack, a panel for each attack and a colour for each arm.
    Thin lines are targets, thick ones their means."""
    canvas = Image.new("RGB", (900, 360), "white")
    draw = ImageDraw.Draw(canvas)
    panels = {
        "AR in % under DiMRA (retained pictures)": [(step, f"ar_{step}") for step in POINTS],
        "AR in % under inversion (ten forgotten pictures)":
            [(0, "ar_0")] + [(step, f"inversion_{step}") for step in INVERSION_POINTS]}
    for i, (title, points) in enumerate(panels.items()):
        left = 60 + 440 * i
        last = points[-1][0]
        draw.text((left, 10), title, "black", FONT)
        for share in (0, 50, 100):
            y = 280 - 2.4 * share
            draw.line([(left, y), (left + 350, y)], "#dddddd")
            draw.text((left - 8, y), f"{share}", "black", FONT, anchor="rm")
        for step, _ in points:
            if step != 25:                             # no room beside 0 and 50
                draw.text((left + 350 * step / last, 288), f"{step}", "black", FONT, anchor="ma")
        for k, (arm, color) in enumerate(DRAWN.items()):
            rows = [line for line in runs[arm].values() if line["ar_400"] is not None]
            if not rows:
                continue
            curves = [[line[key] for _, key in points] for line in rows]
            curves.append([fmean(values) for values in zip(*curves)])
            for curve in curves:
                places = [(left + 350 * step / last, 280 - 240 * ar)
                          for (step, _), ar in zip(points, curve)]
                draw.line(places, color, width=5 if curve is curves[-1] else 1)
            draw.text((left + 120 * k, 330), f"{arm} ({len(rows)})", color, FONT)
        draw.text((left + 175, 308), "step of the attack", "black", FONT, anchor="ma")
    save_picture(canvas, TABLES / "curves.png")

def law(out, *folders):
    """README's first picture: a row for each unlearned model, with what the forgotten label draws
    before, after, and after the two attacks, whose folders lie beside it."""
    images = []
    for folder in folders:
        _, info = load_checkpoint(folder, DEVICE)
        y = torch.tensor(info["conditions"])
        y = y[matches(y, info["forgotten"])][:5]
        for path in (shipped("shapes.pt"), folder, f"{folder}-dimra", f"{folder}-inversion"):
            model, _ = load_checkpoint(path, DEVICE)
            x = fid.draw_samples(model, y, 20, Path(path).name)
            images += [x, torch.ones_like(x[:1])]      # a white picture parts the columns
    heads = []
    for name in ("before", "unlearned", "DiMRA", "inversion"):
        heads += [name] + [""] * len(y)
    save_grid(torch.cat(images), out, columns=len(heads), heads=heads,
              rows=[Path(folder).name for folder in folders])

def nothing(out, folder, count=40):
    """What is drawn without a label, before (above) and after (below) a model was unlearned. The
    pictures in which the classifier sees what was forgotten have a red frame."""
    _, info = load_checkpoint(folder, DEVICE)
    args = SimpleNamespace(dataset="shapes", data_dir="data")
    classifier, _ = fid.load_classifier(args, DEVICE, info["names"], 32)
    framed = []
    for path in (shipped("shapes.pt"), folder):
        model, _ = load_checkpoint(path, DEVICE)
        y = model.null.cpu().expand(count, -1)
        x = fid.draw_samples(model, y, 20, Path(path).name, guidance=0)
        shown = matches(fid.predict(classifier, x), info["forgotten"])
        red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
        wide = F.pad(x, (2, 2, 2, 2), value=1.0)
        wide[shown] = red
        wide[:, :, 2:-2, 2:-2] = x
        framed.append(wide)
        print(f"{path}: {int(shown.sum())} of {count} show what was forgotten")
    save_grid(torch.cat(framed), out, columns=count // 2)

# ---- command line --------------------------------------------------------------------------------

COMMANDS = {"tables": tables, "cell": cell, "invert": invert, "weight": try_weight, "plan": plan,
            "tries": tries, "second_classifier": second_classifier, "law": law, "nothing": nothing}

def main():
    """Call the function that the command line names."""
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", metavar="WORD", help="as above")
    args = parser.parse_args()
    command = COMMANDS[args.command]
    with explain(f"{args.command} takes other words; see --help", TypeError):
        inspect.signature(command).bind(*args.words)
    command(*args.words)

if __name__ == "__main__":
    run(main)
