"""The study's measurements and tables; the plan, run.sh, calls most of it.

    python assets/study/study.py tables                   # print results.csv, draw curves.png
    python assets/study/study.py figure OUT.png RUN RUN   # attacks' pictures, one below the other
    python assets/study/study.py second_classifier        # train the classifier for a second look
    python assets/study/study.py row NAME MODEL ATTACK    # a row: a model, and the attack on it
    python assets/study/study.py points NAME MODEL        # a row for each point while it unlearned
    python assets/study/study.py invert MODEL             # a row for each of eighteen inversions

MODEL and ATTACK are run folders; that of `invert` is named without the path. The environment can
change two places: CSV, where rows are added and read (results.csv beside this file) and beside
which pictures go, and RUNS, where the study's models lie (runs/study).
"""
import copy
import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))        # where the scripts lie

import attack
import fid
from model import (T, ddim_sample, diffusion_loss, linear_schedule, load_checkpoint, load_file,
                   make_parser, pairs_text, pick_device, require, run, save_grid, save_picture,
                   save_plot, shipped, split_output, to_uint8)
from train_ddpm import descend, load_data

CSV = Path(os.environ.get("CSV", HERE / "results.csv"))
RUNS = Path(os.environ.get("RUNS", "runs/study"))
DEVICE = pick_device("auto")
SAMPLES = 600                   # of an unlearned model: a third shows the target
END_SAMPLES = 240               # of an attacked one, as in its curve

# ---- rows of results.csv -------------------------------------------------------------------------

POINTS = (0, 50, 100, 200, 300, 400, 700, 1000, 2000, 3000)         # steps of attacks
TEXT_COLUMNS = ("name", "method", "target", "aux", "alternative")
COLUMNS = [
    "name", "method", "target", "seed", "aux",
    "steps", "batch_size", "lr", "weight", "alternative", "seconds",
    "ua", "cls", "style", "fid", "fid_error", "none",               # before the attack
    "second_ua", "second_cls", "second_style",                      # by the second classifier
    *(f"ar_{step}" for step in POINTS), "second_ar_end",
    "end_cls", "end_style", "end_fid", "end_fid_error", "end_none", # after the attack
    "moved", "attack_moved", "undone"]                              # see `distances`

def write(line):
    """Add a row, a dict by COLUMNS; floats are rounded to five digits."""
    rounded = {}
    for key, value in line.items():
        if isinstance(value, float):
            value = float(f"{value:.5g}")
        rounded[key] = value
    is_new = not CSV.exists()
    with open(CSV, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(rounded)

def read_result(folder):
    """The result.json of a run folder, a dict."""
    path = Path(folder, "result.json")
    require(path.is_file(), f"{folder} holds no result.json; name the folder of a finished run")
    return json.loads(path.read_text("utf-8"))

def prepare(info, samples):
    """fid's Evaluation of a model of shapes, by the same samples in the whole study."""
    images, y, _ = load_data("shapes", "train", device=DEVICE)
    forgotten = info["forgotten"]
    args = SimpleNamespace(dataset="shapes", data_dir="data", samples=samples, sampler_steps=20,
                           seed=0)
    return fid.prepare_evaluation(info, images, y, forgotten, forgotten, args)

def second_classifier():
    """Train a classifier with another seed and twice the width, into RUNS/second_classifier."""
    fid.CLASSIFIERS["shapes"] = (48, 3000)         # width and steps
    args = SimpleNamespace(dataset="shapes", data_dir="data", image_size=32, steps=None,
                           batch_size=None, seed=1, out=RUNS / "second_classifier")
    fid.train_classifier(args, DEVICE)

def score_again(samples, y, evaluation):
    """Metrics of the samples by the second classifier. It has no FID: the features differ."""
    data = load_file(RUNS / "second_classifier" / "model.pt", "classifier")
    classifier = fid.Classifier(**data["args"]).to(DEVICE).eval()
    classifier.load_state_dict(data["weights"])
    second = replace(evaluation, classifier=classifier, reference=None)
    return fid.score(samples, y, second)

def row(name, unlearned, attacked):
    """Both classifiers on the samples of an unlearned model, and the curve of the attack on it."""
    model, info = load_checkpoint(unlearned, DEVICE)
    after, _ = load_checkpoint(attacked, DEVICE)
    result = read_result(attacked)
    made_by = info["made_by"]
    settings = made_by.get("settings", made_by)    # a retrained model has no dict of its own

    evaluation = prepare(info, SAMPLES)
    first, samples = fid.measure(model, evaluation, 0, "ua")
    y = torch.cat([evaluation.forget, evaluation.retain])
    second = score_again(samples, y, evaluation)
    evaluation = prepare(info, END_SAMPLES)
    _, samples = fid.measure(after, evaluation, result["curve"][-1]["step"], "ar", retained=False)
    second_end = score_again(samples, evaluation.forget, evaluation)

    line = {"name": name, "method": result["method"], "target": result["forget"],
            "seed": result["attack"]["seed"], "aux": result["attack"]["aux"],
            "seconds": read_result(unlearned)["seconds"]}
    for key in ("steps", "batch_size", "lr", "weight", "alternative"):
        line[key] = settings.get(key)
    for key in ("ua", "cls", "style", "fid", "fid_error", "none"):
        line[key] = first[key]
    for key in ("ua", "cls", "style"):
        line[f"second_{key}"] = second[key]
    for point in result["curve"]:
        line[f"ar_{point['step']}"] = point["ar"]
    line["second_ar_end"] = second_end["ar"]
    for key in ("cls", "style", "fid", "fid_error", "none"):
        line[f"end_{key}"] = result["curve"][-1][key]
    if "from" in made_by:
        line.update(distances(model, after))
    write(line)

def flat_weights(model):
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def distances(unlearned, attacked):
    """How far unlearning and then the attack moved the weights, and which share of the first way
    the attack went back: the projection on it, 1 if all."""
    original, _ = load_checkpoint(shipped("shapes.pt"), DEVICE)
    way = flat_weights(unlearned) - flat_weights(original)
    way_back = flat_weights(attacked) - flat_weights(unlearned)
    undone = -(way_back @ way) / way.square().sum()
    return {"moved": way.norm().item(), "attack_moved": way_back.norm().item(),
            "undone": undone.item()}

def points(name, folder):
    """A row for each point at which an unlearning was measured."""
    result = read_result(folder)
    for point in result["curve"]:
        step = point["step"]
        line = {"name": f"{name}-{step}", "method": result["method"], "target": result["forget"],
                "seed": result["seed"], "steps": step}
        for key in ("ua", "cls", "style", "fid", "fid_error", "none"):
            line[key] = point[key]
        write(line)

# ---- inversion -----------------------------------------------------------------------------------

def inversion_with_mlp(model, data, optimizer, args):
    """attack.inversion, where the network behind the embedding (the label's MLP) learns, too."""
    [(factor, _)] = data.targets
    learned = (f"label_embs.{factor}.", f"label_mlps.{factor}.")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(learned))
    for _ in range(args.steps):
        loss = diffusion_loss(model, *data.auxiliary(), p_drop=0).mean()
        yield descend(loss, model, optimizer)

def attackers(table, value):
    """{name: (pictures, rate, start, function)}: sixteen from several starts in the embedding table
    (values + 1, width) of the forgotten value, and one who trains more."""
    torch.manual_seed(0)
    others = [v for v in torch.randperm(len(table) - 1).tolist() if v != value]
    starts = {"own": table[value]}
    for other in others[:3]:
        starts[f"row{other}"] = table[other]
    starts["far"] = 2 * torch.randn(table.shape[1])
    found = {}
    for rate in (0.02, 0.05, 0.2):
        for name, start in starts.items():
            found[f"10-{rate}-{name}"] = (10, rate, start, attack.inversion)
    found["100-0.05-own"] = (100, 0.05, table[value], attack.inversion)
    found["10-0.003-mlp"] = (10, 0.003, table[value], inversion_with_mlp)
    return found

def train_attacker(model, start, function, rate, data, evaluation):
    """[(step, AR, samples)] at two points of an inversion that starts from the embedding `start`;
    the model stays as it is."""
    [(factor, value)] = evaluation.targets
    attacked = copy.deepcopy(model).train()
    attacked.label_embs[factor].weight.data[value] = start
    optimizer = torch.optim.Adam(attacked.parameters(), rate, fused=True)
    torch.manual_seed(0)
    training = function(attacked, data, optimizer, SimpleNamespace(steps=300))
    measured = []
    for step, _ in enumerate(training, 1):
        if step in (100, 300):
            metrics, samples = fid.measure(attacked, evaluation, step, "ar", retained=False)
            measured.append((step, metrics["ar"], samples))
    return measured

def invert(name):
    """A row for each attacker who has pictures of what RUNS/name forgot, and a picture of what the
    strongest of the sixteen who train the embedding alone got. All are written at the end."""
    model, info = load_checkpoint(RUNS / name, DEVICE)
    forgotten = info["forgotten"]
    [(factor, value)] = forgotten
    train = load_data("shapes", "train", device=DEVICE)[:2]
    evaluation = prepare(info, samples=120)
    args = SimpleNamespace(batch_size=16, dataset="shapes")
    about = {"method": info["made_by"]["method"], "target": pairs_text(forgotten, info["names"]),
             "seed": info["made_by"]["seed"]}
    lines = []
    best_ar = -1
    table = model.label_embs[factor].weight.detach().clone()
    for attacker, (count, rate, start, function) in attackers(table, value).items():
        pictures, y = attack.auxiliary_set(f"forget:{count}", model, info, train, forgotten, "data")
        data = attack.AttackData(pictures, y, forgotten, args)
        line = {"name": f"{name}-invert-{attacker}", **about, "aux": f"inversion:{count}"}
        for step, ar, samples in train_attacker(model, start, function, rate, data, evaluation):
            line[f"ar_{step}"] = ar
            if ar > best_ar and function is attack.inversion:
                best_ar = ar
                best_samples = samples
        lines.append(line)
    save_grid(best_samples[::4], CSV.parent / f"{name}-invert.png", columns=10)
    ar = ar_near_pictures(name, model, info, train, evaluation)
    lines.append({"name": f"{name}-invert-10-x_T", **about, "aux": "inversion:10", "ar_300": ar})
    for line in lines:
        write(line)

def noise_of(model, x, y, steps=20):
    """The noise from which DDIM draws about the images x (N, C, H, W) in [-1, 1]: the steps of
    `ddim_sample` the other way, without guidance."""
    a = linear_schedule()[1].tolist() + [1.0]          # a[-1] belongs to x_0
    times = [-1] + [i * T // steps for i in range(steps)]
    for t, t_next in zip(times, times[1:]):
        batch_t = torch.full((len(x),), t_next, device=x.device)
        x0, eps = split_output(model, model(x, batch_t, y), x, a[t])
        x = a[t_next] ** 0.5 * x0 + (1 - a[t_next]) ** 0.5 * eps
    return x

@torch.inference_mode()
def ar_near_pictures(name, model, info, train, evaluation):
    """The AR of an attacker who trains nothing: he draws from noise halfway between fresh noise and
    that of ten pictures of the target."""
    pictures, y = attack.auxiliary_set("forget:10", model, info, train, info["forgotten"], "data")
    torch.manual_seed(0)
    noise = noise_of(model, pictures.float() / 127.5 - 1, y).repeat(4, 1, 1, 1)
    y = y.repeat(4, 1)
    halfway = (noise + torch.randn_like(noise)) / 2 ** 0.5
    x = ddim_sample(model, halfway, y, guidance=2.0, steps=20).clamp(-1, 1).cpu()
    save_grid(to_uint8(x), RUNS / f"{name}-x_T.png", columns=10)
    return fid.score(x, y.cpu(), evaluation)["ar"]

# ---- tables and curves ---------------------------------------------------------------------------

def read_rows():
    """The rows of results.csv, dicts. Numbers are floats, or None where there is none."""
    rows = []
    with open(CSV, newline="") as file:
        for line in csv.DictReader(file):
            for key in COLUMNS:
                if key not in TEXT_COLUMNS:
                    line[key] = float(line[key]) if line[key] else None
            rows.append(line)
    return rows

def budget_of(line):
    """(budget, more) from the name of a run, such as dimum-sketch-low-0: ("low", ""), or
    dimum-sketch-low-0-heldout: ("low", "heldout")."""
    value = line["target"].split()[1]
    rest = line["name"].removeprefix(f"{line['method']}-{value}")
    if not rest:                                       # a retrained model
        return "-", ""
    _, budget, _, *more = rest.split("-")              # the third is the seed
    return budget, " ".join(more)

def group_seeds(attacked):
    """{(target, method, budget, more): rows}, where only the seed differs."""
    groups = {}
    for line in attacked:
        key = (line["target"], line["method"], *budget_of(line))
        groups.setdefault(key, []).append(line)
    return dict(sorted(groups.items()))

def curve_of(line):
    """The attack's steps at which AR was measured, and AR in percent there."""
    steps = [step for step in POINTS if line[f"ar_{step}"] is not None]
    return steps, [100 * line[f"ar_{step}"] for step in steps]

def cell(runs, key, scale=100):
    """The mean of a column, with lowest and highest where these lie more than two apart."""
    values = [scale * line[key] for line in runs if line[key] is not None]
    if not values:
        return "-"
    low, high = min(values), max(values)
    ends = f" ({low:.0f}..{high:.0f})" if high - low > 2 else ""
    return f"{fmean(values):.1f}{ends}"

def print_table(title, head, lines):
    """A Markdown table; head: the columns' names, such as "a | b"."""
    columns = head.count("|") + 1
    print(f"{title}\n\n| {head} |\n|{'---|' * columns}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print()

def print_results(groups):
    """What was forgotten, what was retained, and what the attack brought back."""
    lines = []
    for key, runs in groups.items():
        error = fmean(line["fid_error"] for line in runs)
        line = [*key, len(runs)]
        line += [cell(runs, column) for column in ("ua", "cls", "style")]
        line.append(f"{cell(runs, 'fid', scale=1)} +- {error:.0f}")
        line += [cell(runs, f"ar_{step}") for step in (100, 400, 1000)]
        lines.append(line)
    print_table("Results: shares in percent, means of the seeds", "target | method | budget | more "
                "| seeds | UA | class | style | FID | AR 100 | AR 400 | AR 1000", lines)

def print_costs(groups):
    """What unlearning took, and what it and the attack did besides."""
    lines = []
    for key, runs in groups.items():
        line = [*key, cell(runs, "seconds", scale=1)]
        line += [cell(runs, column) for column in ("none", "end_cls", "end_style")]
        line += [cell(runs, column, scale=1) for column in ("end_fid", "moved", "attack_moved")]
        line.append(cell(runs, "undone"))
        lines.append(line)
    print_table("Costs and distances: seconds of unlearning (other jobs ran beside it); class, "
                "style and FID after the attack; how far unlearning and the attack moved the "
                "weights, and how much of the first, in percent, the second undid",
                "target | method | budget | more | seconds | none | class | style | FID | moved "
                "| attack moved | undone", lines)

def print_classifiers(attacked):
    """Every run by both classifiers, marked where they differ by more than ten points."""
    lines = []
    for line in attacked:
        _, ar = curve_of(line)
        pairs = [(100 * line[key], 100 * line[f"second_{key}"]) for key in ("ua", "cls", "style")]
        pairs.append((ar[-1], 100 * line["second_ar_end"]))
        cells = []
        for first, second in pairs:
            differ = " differ" if abs(first - second) > 10 else ""
            cells.append(f"{first:.1f}, {second:.1f}{differ}")
        lines.append([line["name"], *cells])
    print_table("Both classifiers, the second after the comma; AR at the end of the attack",
                "run | UA | class | style | AR", lines)

def print_inversions(rows):
    """A line for each model: its strongest attacker, and some of the others."""
    found = {}
    for line in rows:
        name, _, attacker = line["name"].partition("-invert-")
        if attacker:
            ar = 100 * max(line["ar_100"] or 0, line["ar_300"])
            found.setdefault(name, {})[attacker] = ar
    lines = []
    for name, shares in sorted(found.items()):
        with_mlp = shares.pop("10-0.003-mlp")
        near = shares.pop("10-x_T")
        best = max(shares, key=shares.get)
        numbers = [shares["10-0.05-own"], with_mlp, near]
        lines.append([name, f"{shares[best]:.1f}", best, *(f"{ar:.1f}" for ar in numbers)])
    print_table("Inversion: AR in percent, by pictures-rate-start", "run | highest of sixteen | by "
                "| 10-0.05-own | the label's MLP learns, too | from noise near the pictures'",
                lines)

def print_points(rows):
    """UA and FID on the way of the runs that were measured while they unlearned."""
    lines = []
    for line in rows:
        if "-fid-" in line["name"]:
            fid_and_error = f"{line['fid']:.1f} +- {line['fid_error']:.0f}"
            lines.append([line["name"], cell([line], "ua"), fid_and_error])
    print_table("While it unlearns: the steps are the last part of the name", "run | UA | FID",
                lines)

RATES = {"low": "small rate, 3e-4", "middle": "large rate, 1e-3"}

# three panels a row: the hearts, which have no low budget, end the first one
PANELS = [("cls square", "middle"), ("style sketch", "middle"), ("cls heart", "middle"),
          ("cls square", "low"), ("style sketch", "low")]
# `finetune` is left out: it forgets nothing, and its AR is 100 % from the start
METHODS = ("dimum", "salun", "rl", "swap", "sfron", "sa", "esd", "ga")

def mean_curve(runs):
    """curve_of, with the mean of the seeds."""
    steps, _ = curve_of(runs[0])
    curves = [curve_of(line)[1] for line in runs]
    return steps, [fmean(values) for values in zip(*curves)]

def draw_curves(groups):
    """curves.png: AR against the attack's step, a panel for each target and budget."""
    panels = {}
    for target, budget in PANELS:
        panel = {}
        for method in METHODS:
            runs = groups.get((target, method, budget, ""))
            if runs:
                panel[method] = mean_curve(runs)
        if panel:                                      # of a small plan some have none
            panels[f"{target.split()[1]}, {budget} budget ({RATES[budget]})"] = panel
    if panels:
        save_plot(CSV.parent / "curves.png", panels, "attack step", "AR in %", top=100)

def tables():
    """Print results.csv as tables, and draw curves.png beside it."""
    rows = read_rows()
    attacked = [line for line in rows if line["second_ar_end"] is not None]
    groups = group_seeds(attacked)
    print_results(groups)
    print_classifiers(attacked)
    print_inversions(rows)
    print_costs(groups)
    print_points(rows)
    draw_curves(groups)

# ---- pictures of several attacks -----------------------------------------------------------------

FONT = ImageFont.load_default(size=16)
LINE = 34                       # pixels above a picture, for its text

def attacker_text(aux, target):
    """The attacker's pictures in words."""
    words = {"retain": "the retained training pictures", "heldout": "held-out retained pictures",
             "generated": "its own samples", "pretrained": "the original model's samples"}
    kind, _, count = aux.partition(":")
    if kind == "forget":
        return f"{count} pictures of {target}"
    if kind == "fewshot":
        return f"the retained training pictures and {count} of {target}"
    return words.get(aux, f"the pictures in {aux}")

def attack_text(result):
    """What a run of attack.py is, in one line; result: its result.json."""
    target = result["forget"].replace("cls ", "class ")
    unlearning = result["settings"]
    if unlearning:
        model = (f"{result['method']} forgets {target} ({unlearning['steps']} steps, rate "
                 f"{unlearning['lr']:g})")
    elif result["method"] == "retrain":
        model = f"trained without {target}"
    else:
        model = f"the original model, which knows {target}"
    settings = result["attack"]
    return (f"{model}; {settings['name']} attacks it ({settings['steps']} steps, rate "
            f"{settings['lr']:g}) with {attacker_text(settings['aux'], target)}")

def figure(out, *runs):
    """Stack the pictures that attack.py left in several run folders, each below a line of text."""
    require(runs, "name the run folders of attacks after the picture's path")
    texts = []
    pictures = []
    for folder in runs:
        result = read_result(folder)
        require(result["stage"] == "attack", f"{folder} is no run of attack.py; leave it out")
        texts.append(attack_text(result))
        pictures.append(Image.open(Path(folder, "attack.png")).convert("RGB"))
    widths = [FONT.getlength(text) + 8 for text in texts]
    widths += [picture.width for picture in pictures]
    height = sum(picture.height + LINE for picture in pictures)
    canvas = Image.new("RGB", (int(max(widths)), height), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for text, picture in zip(texts, pictures):
        draw.text((4, top + 10), text, "black", FONT)
        canvas.paste(picture, (0, top + LINE))
        top += LINE + picture.height
    save_picture(canvas, out)

# ---- command line --------------------------------------------------------------------------------

COMMANDS = {"tables": tables, "figure": figure, "second_classifier": second_classifier,
            "row": row, "points": points, "invert": invert}

def main():
    """Call the function that the command line names."""
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", metavar="WORD", help="names and folders, as above")
    args = parser.parse_args()
    COMMANDS[args.command](*args.words)

if __name__ == "__main__":
    run(main)
