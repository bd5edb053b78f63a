"""Stage 3: DiMRA, the relearning attack, and the table of all results.

    python attack.py runs/shapes/dimum-cls1                      # fine-tune on the retained training data
    python attack.py runs/shapes/salun-cls1 --aux heldout        # retained classes, images never trained on
    python attack.py runs/shapes/salun-cls1 --aux generated      # no data at all: the model's own samples
    python attack.py runs/shapes/salun-cls1 --aux my_images      # a folder: CLASS/*.png or STYLE/CLASS/*.png
    python attack.py assets/shapes.pt --cls 1                    # the original model: the curve's ceiling
    python attack.py --table runs/shapes                         # every result in one table and one picture
    python attack.py --demo                                      # GA comes back, DiMUM does not: a few minutes
    python attack.py --study runs/study                          # every method, class, seed and attacker: many hours

Beyond the paper's threat model, with images of what was forgotten:

    python attack.py runs/shapes/dimum-cls1 --aux fewshot:10                     # ten of them, beside the retained data
    python attack.py runs/shapes/dimum-cls1 --aux fewshot:10 --only-embedding    # learn the label's embedding alone

Threat model: the attacker holds the unlearned weights and knows how conditions are passed. It has no image of what
was forgotten. It trains with the ordinary diffusion loss on auxiliary data, and after every --every steps the
forgotten condition is sampled: AR is the share of samples in which the classifier recognises the forgotten value.
"""
import copy
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from fid import (evaluate, load_classifier, percent, pick, protocol, reference_features, save_before_after,
                 wilson)
from model import (COLORS, FACTORS, Parser, fail, fingerprint, forgotten_values, load_checkpoint, model_file, number,
                   pick_device, run_folder, run_script, sample, save_checkpoint, save_grid, save_plot, shipped,
                   to_uint8, write_csv, write_file, write_json)
from train_ddpm import (BROKEN, Loop, all_labels, common_flags, exclude, find_forgotten, find_images, get_batch,
                        having, load_data, read_image, train_step)

# cifar10: our reading of the paper's setting. small: the strongest found on shapes, class 1, against SFRon. AR was 78 %
# after 300 steps; with batch 16 it was 25 %, and with lr 2e-3 besides 22 %, with or without an average of the weights,
# after 50 % at step 75. 2,000 steps take seven times as long; they bring SalUn's to 35 % from 0, DiMUM's to 15 %, and
# those of two models that never saw a square to 8 and 0 %. embedding: with --only-embedding one image then brings 90 %
# of swap's squares back in 50 steps; at a rate of 1e-3 it was nothing in 75. every: steps between points of the curve.
DEFAULTS = {"cifar10": dict(steps=5000, batch_size=128, lr=1e-4, every=500),
            "small": dict(steps=300, batch_size=32, lr=1e-3, every=75),
            "embedding": dict(steps=200, batch_size=16, lr=0.05, every=40)}


# ---- the attacker's data ---------------------------------------------------------------------------------------

def auxiliary_set(aux, model, train, dataset, data_dir, device, names, gone, generated=500):
    """Images uint8 (N, C, H, W) and labels (N, F) with nothing of the forgotten values gone = {factor: [value, ...]}.

    aux: "retain" (from train, the training split's images and labels), "heldout" (test split), "generated" (sampled
    from the model under attack, retained conditions only, so that the rule holds whatever the model draws), or a
    folder whose subfolders name the labels.
    "fewshot:K" is outside these rules: K training images of the forgotten conditions, in turn from each.
    """
    if aux.startswith("fewshot:"):
        k = aux.partition(":")[2]
        if not k.isdecimal() or int(k) < 1:
            fail(f"--aux {aux}: say how many images, such as fewshot:10")
        images, y = train
        lost = having(y, gone)
        images, y = images[lost], y[lost]
        cells = torch.unique(y, dim=0)
        wanted = cells.repeat(math.ceil(int(k) / len(cells)), 1)[:int(k)]
        return pick(images, y, wanted), wanted
    if aux == "retain":
        return exclude(*train, gone)
    if aux == "heldout":
        images, y, _ = load_data(dataset, "test", data_dir, device, model.cfg.image_size)
        return exclude(images, y, gone)
    if aux == "generated":
        cells = all_labels(names, 1)
        cells = cells[~having(cells, gone)]
        y = cells.repeat_interleave(math.ceil(generated / len(cells)), 0)
        images = sample(model, y, steps=20, seed=99, label="generating the auxiliary set")
        return to_uint8(images).to(device), y.to(device)
    images, y = read_labelled_folder(aux, model, names)
    images, y = exclude(images.to(device), y.to(device), gone)
    if not len(y):
        fail(f"{aux} holds only what was forgotten; the attack needs images of something else")
    return images, y


def read_labelled_folder(folder, model, names):
    """Images under a folder, resized to the model's size, with labels from the names of the folders above them; an
    image whose folders do not name every factor gets the null label."""
    paths = find_images(folder)
    if not paths:
        fail(f"--aux {folder} is neither retain, heldout, generated nor fewshot:K, nor a folder with images in it")
    null, images, labels = model.null.cpu(), [], []
    for path in paths:
        try:
            images.append(read_image(path, model.cfg.image_size, "L" if model.cfg.channels == 1 else "RGB"))
        except BROKEN:
            fail(f"{path} is not a readable image; remove it")
        parts = [part.lower() for part in path.parent.parts]
        found = [[i for i, n in enumerate(factor) if n.lower() in parts] for factor in names]
        labels.append(torch.tensor([f[0] for f in found]) if all(found) else null)
    return torch.stack(images), torch.stack(labels)


# ---- the attack ------------------------------------------------------------------------------------------------

def dimra(model, images, y, steps, batch_size, lr, observe=None, flip=False, p_drop=0.1, ema=0.0, **keep):
    """Fine-tune the model in place, what of it requires a gradient, with the diffusion loss on the auxiliary set.

    Returns (the attacked model, the finished Loop); observe(step, model) looks at it on the way. With ema > 0 the
    attacked model is the moving average of the weights, whose decay rises to ema. keep: path, resume, settings and
    every of Loop. Source: DiMRA in Yuan et al. 2512.03564. Its optimiser and learning rate
    were not at hand: Adam, clipping at norm 1 and label dropout 0.1 as in pretraining are our reading.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, fused=True)
    averaged = copy.deepcopy(model).requires_grad_(False) if ema else model
    loop = Loop("attack", steps, model=model, optimizer=optimizer, **({"ema": averaged} if ema else {}),
                observe=lambda step: observe(step, averaged), **keep)
    model.train()
    for step in loop:
        loop.loss = train_step(model, averaged, optimizer, *get_batch(images, y, batch_size, flip), lr,
                               min(ema, (1 + step) / (10 + step)), p_drop)
    return averaged.eval(), loop


def weight_changes(first, unlearned, attacked, factor, values):
    """Where forgetting and relearning happen: {part: {"unlearn", "attack", "cosine"}}, by part of the network.

    unlearn and attack: length of the change of the part's weights, relative to the length of its first weights;
    cosine: between the two changes, -1 where the attack takes back what the unlearning did (None without a change).
    The three are models. The forgotten values' own label embeddings are a part of their own.
    """
    def parts(model):
        found = {}
        for name, p in model.named_parameters():
            p, group = p.detach(), re.split(r"[._]", name)[0]
            if name == f"label_embs.{factor}.weight":
                gone = torch.zeros(len(p), dtype=torch.bool, device=p.device)
                gone[values] = True
                found["forgotten embedding"] = [p[gone].flatten()]
                found.setdefault("other embeddings", []).append(p[~gone].flatten())
            else:
                part = "other embeddings" if name.startswith("label_embs") else f"{group} layers"
                found.setdefault(part, []).append(p.flatten())
        return {part: torch.cat(pieces) for part, pieces in found.items()}
    result = {}
    for (part, w), u, a in zip(parts(first).items(), parts(unlearned).values(), parts(attacked).values()):
        du, da, norm = u - w, a - u, w.norm()
        moved = du.norm() > 0 and da.norm() > 0
        result[part] = {"unlearn": (du.norm() / norm).item(), "attack": (da.norm() / norm).item(),
                        "cosine": (du @ da / du.norm() / da.norm()).item() if moved else None}
    return result


def curve_point(step, metrics):
    """One row of the AR curve from evaluate's metrics; AR is 1 - UA."""
    return {"step": step, "ar": 1 - metrics["ua"], "ar_low": 1 - metrics["ua_high"], "ar_high": 1 - metrics["ua_low"],
            **{k: metrics[k] for k in ("ira", "ira_low", "ira_high", "cra", "fid")}}


def half_at(steps, ar):
    """The first of these steps at which AR is above 50 %, or None."""
    return next((step for step, share in zip(steps, ar) if share > 0.5), None)


def columns(curve, *keys):
    """The lists of these values along a curve."""
    return tuple([point[k] for point in curve] for k in keys)


# ---- the table -------------------------------------------------------------------------------------------------

def area(curve):
    """Mean height of the AR curve (steps, AR, ...) over its steps (trapezoids), 0..1."""
    xs, ys = curve[:2]
    if xs[-1] == xs[0]:
        return ys[0]
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(xs, xs[1:], ys, ys[1:])) / (xs[-1] - xs[0])


def irreversibility(curve, floor, ceiling):
    """1 - (area under AR - floor's) / (ceiling's - floor's); 1: as after retraining, 0: as never unlearned.

    floor: the curve of the retrained model, ceiling: of the original one. None if either is missing or they coincide.
    """
    if not floor or not ceiling or abs(area(ceiling) - area(floor)) < 1e-9:
        return None
    return 1 - (area(curve) - area(floor)) / (area(ceiling) - area(floor))


UNLEARN_SETTINGS = ("steps", "batch_size", "lr", "weight", "embedding_lr", "alternative", "alt_size", "inverters")
ATTACK_SETTINGS = ("aux", "steps", "every", "batch_size", "lr", "p_drop", "ema", "trained")


def read_results(folder):
    """Every result.json under a folder, as a list of dicts."""
    results = []
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            results.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            print(f"skipped {path}: not readable as JSON")
    return results


def group_runs(results):
    """[(group, runs)]: runs are pairs (result of unlearn.py or None, result of attack.py or None) that differ in seed
    and in the values forgotten alone; group is a dict of what they share. An attack goes with the unlearning whose
    model it attacked."""
    attacks, pairs = [r for r in results if r.get("stage") == "attack"], []
    unlearned = {r.get("model", n): r for n, r in enumerate(results) if r.get("stage") == "unlearn"}      # each once
    for r in unlearned.values():
        mine = [a for a in attacks if a.get("ckpt") == r.get("model", "?")]
        pairs += [(r, a) for a in mine or [None]]
        attacks = [a for a in attacks if a not in mine]
    groups = {}
    for r, a in pairs + [(None, a) for a in attacks]:
        some = r or a
        made = some.get("unlearned") or {}         # the settings that made the model
        key = {"dataset": some["dataset"], "factor": some["forget"]["factor"], "method": some["method"],
               **{k: made.get(k) for k in UNLEARN_SETTINGS}}
        if a:
            key.update({f"attack {k}": a.get(k) for k in ATTACK_SETTINGS})
        groups.setdefault(json.dumps(key), (key, []))[1].append((r, a))
    return list(groups.values())


def mean_curve(attacks):
    """(steps, mean AR, lows, highs) of attacks: the lowest and highest run, or one run's Wilson interval."""
    if len(attacks) == 1:
        return columns(attacks[0]["curve"], "step", "ar", "ar_low", "ar_high")
    ar = list(zip(*(columns(a["curve"], "ar")[0] for a in attacks)))             # [step][run]
    return (*columns(attacks[0]["curve"], "step"), [sum(runs) / len(runs) for runs in ar], list(map(min, ar)),
            list(map(max, ar)))


def make_table(folder):
    """Gather every result.json under a folder into table.md, and all AR curves into attack_curves*.png."""
    groups = group_runs(read_results(folder))
    if not groups:
        fail(f"no results of unlearn.py or attack.py under {folder}; run 'python unlearn.py --cls 1' first")
    attacked = {id(key): mean_curve([a for _, a in runs]) for key, runs in groups if "attack aux" in key}

    def differing(key, prefix, *alike):
        """Settings of a group, those of the attack or the others, in which it differs from a group alike otherwise."""
        rivals = [other for other, _ in groups if all(other.get(k) == key.get(k) for k in alike)]
        names = [k for k in key if k.startswith("attack ") == bool(prefix) and k not in (*alike, "attack every")]
        return [f"{k.removeprefix(prefix)} {key[k]}" for k in names if any(r.get(k, key[k]) != key[k] for r in rivals)]

    def reference(method, key):
        """The curve of a method under the same attack."""
        same = [k for k in key if k.startswith("attack ") or k in ("dataset", "factor")]
        return next((attacked[id(k)] for k, _ in groups if id(k) in attacked and k["method"] == method
                     and all(k.get(s) == key[s] for s in same)), None)

    def percentage(runs, name):
        """Mean and, of several runs, their range."""
        values = [100 * r[name] for r in runs if r.get(name) is not None]
        spread = f" ({min(values):.0f}..{max(values):.0f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}" if values else "-"

    mean = lambda values, form: form.format(sum(values) / len(values)) if values and None not in values else "-"
    head = ("method", "forgets", "runs", "seconds", "UA", "IRA", "CRA", "FID before", "FID after", "attack", "AR",
            "peak", "IRA after", "half at", "irreversibility")
    rows, series = [], {}
    for key, runs in groups:
        unlearned, attacks = [r for r, _ in runs if r], [a for _, a in runs if a]
        label = " ".join([key["method"], *differing(key, "", "dataset", "factor", "method")])
        after = [r["after"] for r in unlearned]
        row = [label, ", ".join(sorted({n for pair in runs for n in (pair[0] or pair[1])["forget"]["names"]})),
               str(len(runs)), mean([r["train_seconds"] for r in unlearned], "{:.0f}"),
               *(percentage(after, k) for k in ("ua", "ira", "cra")),
               mean([r["before"]["fid"] for r in unlearned], "{:.2f}"), mean([m["fid"] for m in after], "{:.2f}")]
        if attacks:
            what = ", ".join([key["attack aux"], f"{key['attack steps']} steps",
                              *differing(key, "attack ", "dataset", "factor", "method", "attack aux", "attack steps")])
            curve = attacked[id(key)]
            ends = [{"ar": 1 - a["after"]["ua"], "n": a["after"]["ua_samples"]} for a in attacks]
            low, high = wilson(round(sum(e["ar"] * e["n"] for e in ends)), sum(e["n"] for e in ends))
            value = irreversibility(curve, reference("retrain", key), reference("original", key))
            peak, at = max((ar, -step) for step, ar in zip(*curve[:2]))
            row += [what, f"{percentage(ends, 'ar')} [{100 * low:.0f}, {100 * high:.0f}]",
                    f"{100 * peak:.0f} at {-at}", percentage([a["after"] for a in attacks], "ira"),
                    "-" if (half := half_at(*curve[:2])) is None else str(half),
                    "-" if value is None else f"{value:.2f}"]
            series.setdefault((key["dataset"], key["factor"], what), {})[label] = curve
        rows.append(row + ["-"] * (len(head) - len(row)))
    shown = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    lines = ["| " + " | ".join(row[i] for i in shown) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(shown))
    some = groups[0][1][0][0] or groups[0][1][0][1]
    notes = some["protocol"]
    lines += ["", f"Shares in %: mean, (lowest..highest run), [95 % Wilson interval of all samples]. Dataset "
              f"{notes['dataset']}; {notes['forget_samples']} + {notes['retain_samples']} samples after an unlearning, "
              f"{notes['sampler'].upper()} {notes['sampler_steps']} steps, guidance {notes['guidance']:g}; FID on "
              f"{notes['fid_features']} features against {notes['real_images']} training images. Seconds are those of "
              "the unlearning alone; peak: the highest AR on the way; half at: the first step with AR above 50 %."]
    text = "\n".join(lines)
    write_file(Path(folder, "table.md"), lambda p: p.write_text(text + "\n"))
    print(text + f"\n\nwrote {folder}/table.md")
    several = [len(set(words)) > 1 for words in zip(*series)]
    for kind, curves in series.items():            # a picture for classes, one for styles; for each attack its own
        words = [re.sub(r"[^\w.-]+", "-", word) for word, differs in zip(kind, several) if differs]
        path = Path(folder, "_".join(["attack_curves", *words]) + ".png")
        save_plot(path, curves, f"AR under attack: {' '.join(kind)}", "attack step", "AR", (0, 1))
        print(f"wrote {path}")


def save_weights(path, moved):
    """The picture of weight_changes, {method: [parts of each run, ...]}: a row per method, a column per part of the
    network; above, how far unlearning moved the part, below, the attack, relative to the part's length."""
    parts = list(next(iter(moved.values()))[0])
    mean = lambda runs, part, k: statistics.fmean([r[part][k] for r in runs if r[part][k] is not None] or [0.0])
    wide, high, left, top = 104, 58, 70, 34
    longest = max(mean(runs, part, k) for runs in moved.values() for part in parts for k in ("unlearn", "attack"))
    canvas = Image.new("RGB", (left + wide * len(parts), top + high * len(moved)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 2), "How far unlearning (blue) and the attack (orange) moved each part, relative to its length (bars "
              "on a root scale). cos -1: the attack takes the unlearning back.", fill="black")
    for row, method in enumerate(moved):
        draw.text((4, top + row * high + 10), method, fill="black")
    for i, part in enumerate(parts):
        x = left + i * wide
        draw.text((x, 18), part, fill="black")
        for row, runs in enumerate(moved.values()):
            y = top + row * high
            for dy, name, color in ((4, "unlearn", COLORS[0]), (20, "attack", COLORS[1])):
                value = mean(runs, part, name)
                draw.rectangle([x, y + dy, x + 1 + 60 * (value / longest) ** 0.5, y + dy + 10], fill=color)
                draw.text((x + 66, y + dy - 1), f"{value:.3f}", fill="black")
            draw.text((x, y + 36), f"cos {mean(runs, part, 'cosine'):+.2f}", fill="black")
    write_file(path, lambda p: canvas.save(p, "PNG"))


# ---- the demonstration and the study ---------------------------------------------------------------------------

def run_stage(script, *words):
    """One of the scripts with these arguments, as a user would start it; where it stops, so does this."""
    command = [str(word) for word in words]
    print(f"\n$ python {script} {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *command]).returncode
    if code:
        sys.exit(code)


def demo(device):
    """GA and DiMUM on the shipped model, an attack on both, and one picture of squares before, between and after."""
    started, folder, first = time.time(), run_folder(None, Path("runs", "demo")), shipped("shapes.pt")
    models = {"before": first}
    quick = ("--samples", 60, "--sampler-steps", 10)
    settings = {"ga": ("--steps", 70, "--batch-size", 20, "--lambda", 1),        # a lambda of 0.6 takes twice as long
                "dimum": ("--steps", 100, "--batch-size", 16)}
    for method, flags in settings.items():
        out, attacked = folder / method, folder / f"{method}-attacked"
        run_stage("unlearn.py", "--method", method, "--cls", 1, "--ckpt", first, *flags, *quick, "--out", out)
        run_stage("attack.py", out, "--steps", 50, "--every", 50, "--batch-size", 16, *quick, "--out", attacked)
        models.update({method: out / "model.pt", f"{method}, attacked": attacked / "model.pt"})
    names = load_checkpoint(first)[1]["names"]
    styles = [style for style in range(len(names[1])) for _ in range(2)]
    y = torch.tensor([[1, style] for style in styles])
    pictures = [sample(load_checkpoint(path, device)[0], y, steps=10) for path in models.values()]
    save_grid(torch.cat(pictures), folder / "demo.png", columns=len(y), rows=list(models),
              heads=[names[1][style] for style in styles])
    for method in settings:
        curve = json.loads((folder / f"{method}-attacked" / "result.json").read_text())["curve"]
        print(f"{method:>6}: AR {100 * curve[0]['ar']:.0f} % -> {100 * curve[-1]['ar']:.0f} % after "
              f"{curve[-1]['step']} steps on images without a single {names[0][1]}")
    print(f"wrote {folder}/demo.png in {time.time() - started:.0f} seconds\n"
          "next: python attack.py --study runs/study, or README's exercises")


def study_plan():
    """Yield (run folder, script, arguments) of every run of the study; "{}/" stands for the study's own folder. The
    first part of a run folder is the question: does it come back (classes, style, data, fashion), how fast (strength),
    DiMUM's own choices (choices), attackers who have images of what was forgotten (beyond)."""
    converging = ("salun", "sfron", "swap", "dimum")
    main = ("ga", *converging)
    usual = (*main, "dimum150")

    # Three classes and three seeds, but not all nine pairs, which two cores cannot carry; DiMUM on five classes.
    models = [
        ("cls", 1, 0, (*usual, "inverters4", "retrain", "retrain16000", "rl", "esd", "sa", "finetune")),
        ("cls", 4, 0, (*usual, "inverters4")), ("cls", 1, 1, usual), ("cls", 7, 0, usual), ("cls", 1, 2, usual),
        ("style", 3, 0, (*usual, "inverters4")), ("style", 3, 1, converging), ("style", 3, 2, converging),
        ("cls", 2, 0, ("dimum", "dimum150")), ("cls", 9, 0, ("dimum", "dimum150")), ("cls", 4, 0, ["retrain"])]
    for factor, value, seed, methods in models:
        part = {"cls": "classes", "style": "style"}[factor]
        what = f"{factor}{value}-seed{seed}"
        for method in methods:
            run = f"{part}/{what}/{method}"
            watched = what == "cls1-seed0" and method in main and method != "swap"
            yield unlearn_run(run, method, factor, value, *(("--eval-every", 40) if watched else ()), seed=seed)
            yield attack_run(run, "retain", seed=seed)
            if what == "cls4-seed0" and method in main:
                for aux in ("heldout", "generated"):
                    yield attack_run(run, aux, "--aux", aux, part="data")
        if "inverters4" in methods:
            yield from beyond_the_paper(f"{part}/{what}", ("inverters4", "dimum", "dimum150", "swap", "salun"))
        yield from beyond_the_paper(f"{part}/{what}", [m for m in methods if m.startswith("retrain")])
        if what == "cls1-seed0":
            yield from study_of_one()
    yield "fashion/pretrain", "train_ddpm.py", ("--dataset", "fashion")
    for value in (1, 8):
        for method in converging:
            run = f"fashion/cls{value}-seed0/{method}"
            yield unlearn_run(run, method, "cls", value, "--dataset", "fashion", "--ckpt",
                              "{}/fashion/pretrain/model.pt")
            yield attack_run(run, "retain")


def unlearn_run(run, method, factor, value, *more, seed=0):
    """A run of the plan. dimum150: with the steps that were the default before this study; retrain16000: with as many
    as the pretraining had."""
    method, *flags = {"dimum150": ("dimum", "--steps", 150), "inverters4": ("dimum", "--inverters", 4),
                      "retrain16000": ("retrain", "--steps", 16000)}.get(method, (method,))
    return run, "unlearn.py", ("--method", method, f"--{factor}", value, "--seed", seed, "--samples", 150, *flags,
                              *more)


def attack_run(run, name, *more, seed=0, part=None):
    """The plan's attack on a run, beside it or under another part of the study."""
    out = f"{part}/{run.partition('/')[2]}" if part else run
    return f"{out}-{name}", "attack.py", ("{}/" + run, "--seed", seed, *more)


def invert(run, k, steps=200):
    """The attack that learns nothing but the forgotten label's embedding, from k images."""
    return attack_run(run, f"invert{k}", "--aux", f"fewshot:{k}", "--only-embedding", "--steps", steps, "--every",
                      steps // 5, part="beyond")


def beyond_the_paper(folder, methods):
    """Attackers who have k images: they learn the forgotten label's embedding (invert), or everything (few)."""
    in_detail = folder == "classes/cls1-seed0"
    for method in methods:
        run = f"{folder}/{method}"
        for k in (10, 1) if in_detail else (10,):
            yield invert(run, k)
            yield attack_run(run, f"few{k}", "--aux", f"fewshot:{k}", "--steps", 200, "--every", 40, part="beyond")
        if in_detail:                              # the few-shot curve has risen by its second point: look closer
            yield attack_run(run, "few10-early", "--aux", "fewshot:10", "--steps", 40, "--every", 5, part="beyond")
        if method in ("inverters4", "retrain"):
            yield invert(run, 100, steps=400)


def study_of_one():
    """What is asked of one class and seed: the ceiling, a long attack (ten times SalUn's own steps) on what withstands
    the usual one, the attacker's settings, how far unlearning went, DiMUM's choices."""
    yield "classes/cls1-seed0/original-retain", "attack.py", (shipped("shapes.pt"), "--cls", 1)
    for method in ("dimum", "salun", "rl", "retrain", "retrain16000"):
        yield attack_run(f"classes/cls1-seed0/{method}", "2000-steps", "--steps", 2000, "--every", 200, part="strength")
    for name, flags in {"b16": ("--batch-size", 16), "b16-lr2e-3": ("--batch-size", 16, "--lr", 2e-3),
                        "b16-lr2e-3-ema": ("--batch-size", 16, "--lr", 2e-3, "--ema", 0.98), "lr3e-4": ("--lr", 3e-4),
                        "drop.5": ("--p-drop", 0.5), "frozen": ("--freeze-embeddings",)}.items():
        yield attack_run("classes/cls1-seed0/sfron", name, *flags, part="strength")
    runs = {f"strength/{method}-{n}": (method, "--steps", n) for method in ("salun", "dimum") for n in (50, 500)}
    runs.update({f"choices/{name}": ("dimum", *flags) for name, flags in {
        "mix": ("--alternative", "mix"), "noise": ("--alternative", "noise"), "one": ("--alt-size", 1),
        "lambda.3": ("--lambda", 0.3), "lambda3": ("--lambda", 3), "embedding10": ("--embedding-lr", 10)}.items()})
    for run, (method, *flags) in runs.items():
        yield unlearn_run(run, method, "cls", 1, *flags)
        yield attack_run(run, "retain")


def study(folder):
    """Run what is missing of the study under a folder, then make its tables and figures."""
    plan = [(Path(folder, name), script, [str(word).replace("{}", str(folder)) for word in words])
            for name, script, words in study_plan()]
    missing = [step for step in plan if not (step[0] / "result.json").is_file()]
    began = time.time()
    for n, (out, script, words) in enumerate(missing):
        left = f", {(time.time() - began) / n * (len(missing) - n) / 3600:.1f} hours left" if n else ""
        print(f"\nstudy: run {len(plan) - len(missing) + n + 1} of {len(plan)}{left}", flush=True)
        if script == "attack.py" and not model_file(words[0]).is_file():
            print(f"skipped {out}: {words[0]}/model.pt is gone; remove {words[0]} to have it made again")
            continue
        resume = ["--resume"] if (out / "train.pt").is_file() else []
        run_stage(script, *words, "--out", out, *resume)
    study_figures(folder)


def study_figures(folder):
    """The tables of a study's folder, one by question, and its two figures of class 1."""
    for part in sorted(path for path in Path(folder).glob("*") if path.is_dir() and read_results(path)):
        make_table(part)
    results = [r for r in read_results(Path(folder, "classes")) if r["forget"]["values"] == [1]]
    followed = {r["method"]: columns(r["curve"], "step", "fid") for r in results
                if r["stage"] == "unlearn" and r["curve"]}
    if followed:
        save_plot(Path(folder, "fid_during_unlearning.png"), followed, "FID of the retained conditions", "step", "FID")
    moved = {}
    for r in results:
        if r["stage"] == "attack" and r.get("weights"):
            moved.setdefault(r["run_name"], []).append(r["weights"])
    if moved:
        save_weights(Path(folder, "weights.png"), moved)


# ---- command line ----------------------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder of unlearn.py, or a checkpoint")
    common_flags(parser, 120, "images per point of the curve, a third of them under the forgotten condition", 20)
    group = parser.add_argument_group("attack")
    group.add_argument("--aux", default="retain", help="auxiliary data: retain, heldout, generated, a folder, or "
                       "fewshot:K, which is K images of what was forgotten")
    group.add_argument("--p-drop", type=number(float, 0, 1), default=0.1, help="share of examples without their label")
    group.add_argument("--ema", type=number(float, 0, 0.9999), default=0.0, metavar="X", help="decay of the average of "
                       "the attacker's weights; 0: none")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--only-embedding", action="store_true", help="learn the label embeddings alone")
    which.add_argument("--freeze-embeddings", action="store_true", help="learn all but the label embeddings")
    group.add_argument("--every", type=number(int, 1), metavar="N",
                       help="steps between points of the curve; default a quarter of --steps")
    group.add_argument("--cls", nargs="+", metavar="K", help="count this class, not what RUN says was forgotten")
    group.add_argument("--style", nargs="+", metavar="K", help="the same for a style")
    group.add_argument("--table", metavar="DIR", help="gather every result under DIR and stop")
    group.add_argument("--study", metavar="DIR", help="run what is missing of the study under DIR, and stop")
    group.add_argument("--demo", action="store_true", help="GA comes back, DiMUM does not: one picture, in minutes")
    args = parser.parse_args()
    if args.table:
        return make_table(args.table)
    if args.study:
        return study(args.study)
    if args.demo:
        return demo(pick_device(args.device))
    if not args.run:
        fail("name what to attack, such as: python attack.py runs/shapes/dimum-cls1; see 'python attack.py --help'")
    started, device = time.time(), pick_device(args.device)

    path = model_file(args.run)
    model, info = load_checkpoint(path, device)
    dataset, names, gone = info["dataset"], info["names"], forgotten_values(info)
    if args.cls or args.style:
        factor, values = find_forgotten(args, names)
    elif gone:
        factor = min(gone)
        values = gone[factor]
    else:
        fail(f"{path} has forgotten nothing; say what to count with --cls or --style, such as --cls 1")
    gone[factor] = sorted({*gone.get(factor, []), *values})
    method = info["made_by"].get("method", "original")
    opts = dict(DEFAULTS["embedding" if args.only_embedding else "cifar10" if model.cfg.width >= 128 else "small"])
    opts.update({k: v for k in ("steps", "batch_size", "lr") if (v := getattr(args, k)) is not None})
    opts["every"] = args.every or (max(1, opts["steps"] // 4) if args.steps else opts["every"])
    run_name = path.parent.name
    if method == "original":
        run_name = f"original-{FACTORS[factor]}{'-'.join(map(str, values))}"
    opts.update(p_drop=args.p_drop, ema=args.ema, trained="embedding" if args.only_embedding else
                "network" if args.freeze_embeddings else "all")
    aux_name = args.aux if args.aux in ("retain", "heldout", "generated") else Path(args.aux).name.replace(":", "")
    aux_name += {"all": "", "embedding": "-only-embedding", "network": "-freeze-embeddings"}[opts["trained"]]
    torch.manual_seed(args.seed)
    *train, _ = load_data(dataset, "train", args.data_dir, device, model.cfg.image_size)
    retained = exclude(*train, gone)
    images, y = auxiliary_set(args.aux, model, train, dataset, args.data_dir, device, names, gone)
    folder = run_folder(args.out, Path("runs", dataset, f"attack-{run_name}-{aux_name}"), args.resume)
    print(f"DiMRA on {path}: {len(images)} auxiliary images ({args.aux}), {opts['steps']} steps, batch "
          f"{opts['batch_size']}, lr {opts['lr']:g}; counting {FACTORS[factor]} "
          f"{', '.join(names[factor][v] for v in values)}")
    if args.aux.startswith("fewshot:") and args.only_embedding:
        opts["p_drop"] = 0.0                       # or the null embedding would learn the images, too
    elif args.aux.startswith("fewshot:"):          # half of each batch is retained data, to keep the rest as it is
        times = math.ceil(len(retained[1]) / len(y))
        images, y = (torch.cat([a, b.repeat(times, *[1] * (b.dim() - 1))]) for a, b in zip(retained, (images, y)))

    classifier, accuracy = load_classifier(dataset, args.data_dir, device, names, model.cfg.image_size)
    real_features = reference_features(classifier, *retained)

    def measure(step, subject, whole=False):
        metrics, *pictures = evaluate(subject, classifier, names, gone, factor, real_features, args.samples,
                                      args.sampler_steps, args.guidance, label=f"step {step}", keep=step == 0,
                                      retained=whole)
        point = curve_point(step, metrics)
        rest = f"   IRA {percent(metrics, 'ira')}   FID {metrics['fid'] or math.nan:.3f}" if whole else ""
        print(f"step {step:>6}: AR {100 * point['ar']:5.1f} % [{100 * point['ar_low']:.1f}, "
              f"{100 * point['ar_high']:.1f}]{rest}", flush=True)
        return point, metrics, *pictures
    first_point, before, pictures_before, y_eval = measure(0, model, whole=True)
    settings = {"dataset": dataset, "run": run_name, "aux": args.aux, "factor": factor, "values": values,
                "seed": args.seed, "ckpt": fingerprint(model)[:12], **opts}
    for name, p in model.named_parameters():
        table = name.startswith("label_embs")
        p.requires_grad_(name == f"label_embs.{factor}.weight" if args.only_embedding else
                         not (table and args.freeze_embeddings))
    model, loop = dimra(model, images, y, opts["steps"], opts["batch_size"], opts["lr"],
                        lambda step, subject: measure(step, subject)[0], flip=dataset == "cifar10",
                        p_drop=opts["p_drop"], ema=opts["ema"], every=opts["every"], path=folder / "train.pt",
                        resume=args.resume, settings=settings)
    last_point, after, pictures_after, _ = measure(opts["steps"], model, whole=True)
    origin = Path(info["made_by"].get("from", ""))
    weights = None
    if origin.is_file() and method != "retrain":
        first, unlearned = (load_checkpoint(file, device)[0] for file in (origin, path))
        weights = weight_changes(first, unlearned, model, factor, values)
    curve = [first_point, *loop.data["curve"], last_point]

    save_before_after(folder / "samples.png", names, gone, y_eval, pictures_before, pictures_after)
    save_checkpoint(folder / "model.pt", model, {
        "dataset": dataset, "names": names, "forgotten": {FACTORS[i]: v for i, v in gone.items()},
        "made_by": {"stage": "attack", "method": method, "from": str(path), **opts}})
    write_csv(folder / "log.csv", loop.data["log"])
    write_csv(folder / "curve.csv", curve)
    save_plot(folder / "curve.png", {
        "AR (comes back)": columns(curve, "step", "ar", "ar_low", "ar_high"),
        "IRA (quality kept)": columns([first_point, last_point], "step", "ira", "ira_low", "ira_high")},
        f"DiMRA on {run_name}, aux {aux_name}", "attack step", "share", (0, 1))
    write_json(folder / "result.json", {
        "stage": "attack", "dataset": dataset, "method": method, "run": str(path.parent), "run_name": run_name,
        "aux": aux_name,
        "forget": {"factor": FACTORS[factor], "values": values, "names": [names[factor][v] for v in values]},
        "before": before, "after": after, "curve": curve, "weights": weights, "ckpt": settings["ckpt"],
        "unlearned": info["made_by"] if method != "original" else None,
        "first_step_above_half": half_at(*columns(curve, "step", "ar")),
        "protocol": protocol(dataset, names, after, real_features, accuracy, args.sampler_steps, args.guidance, 1234,
                             args.seed, device), "args": vars(args), **opts,
        "seconds": round(time.time() - started, 1)})
    (folder / "train.pt").unlink()                 # the run is whole: there is nothing to resume
    if len(after["ua_of"]) > 1:
        print("AR of each: " + ", ".join(f"{name} {100 - 100 * ua:.1f} %" for name, ua in after["ua_of"].items()))
    print(f"({curve[-1]['step']} attack steps; {after['ua_samples']} + {after['ira_samples']} samples a point, "
          f"{args.sampler_steps} DDIM steps, guidance {args.guidance:g}; 95 % intervals)\n"
          f"wrote {folder}/result.json, curve.png and samples.png in {time.time() - started:.0f} seconds\n"
          f"next: python attack.py --table {folder.parent}")


if __name__ == "__main__":
    run_script(main)
