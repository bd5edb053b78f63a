"""Stage 3: DiMRA, the relearning attack, and the table of all results.

    python attack.py runs/shapes/dimum-cls1                   # fine-tune on the retained data
    python attack.py runs/shapes/salun-cls1 --aux heldout     # retained classes, images never seen
    python attack.py runs/shapes/salun-cls1 --aux generated   # no data: the model's own samples
    python attack.py runs/shapes/salun-cls1 --aux pretrained  # samples of the original model
    python attack.py runs/shapes/salun-cls1 --aux my_images   # CLASS/*.png or STYLE/CLASS/*.png
    python attack.py assets/shapes.pt --cls 1                 # the original model: the ceiling
    python attack.py --table runs/shapes                      # every result in one table

Beyond the paper's threat model, with images of what was forgotten:

    python attack.py runs/shapes/dimum-cls1 --aux fewshot:10                    # relearning
    python attack.py runs/shapes/dimum-cls1 --aux inversion:10     # only the label's embedding

Leaves runs/<dataset>/attack-<run>-<aux>/: result.json, curve.png, attack.gif, samples.png, model.pt

Threat model: the attacker holds the unlearned weights and knows how conditions are passed. It has
no image of what was forgotten. AR is the share of samples of the forgotten condition in which the
classifier recognises the forgotten value.
"""
import json
import math
import os
import statistics
from pathlib import Path

import torch

from fid import evaluator, fid_text, follow, percent, save_before_after
from model import (all_labels, checkpoint_file, diffusion_loss, draw_grid, explain, find_pairs,
                   load_checkpoint, matches, number, pairs_slug, pairs_text, require, run,
                   run_folder, sample, save_plot, to_uint8, write_file, write_text)
from train_ddpm import (fill, find_images, finish, get_batch, load_data, load_run, read_image,
                        stage_parser, write_losses)

def dimra(model, images, y, steps, batch_size, lr, p_drop=0.1, flip=False):
    """DiMRA: train the unlearned model, what of it requires a gradient, on auxiliary images uint8
    (N, C, H, W) with labels y (N, F) by the ordinary diffusion loss; yield each step's loss.

    Source: Yuan et al. 2512.03564. Its optimiser and learning rate were not at hand: Adam,
    clipping at norm 1 and label dropout 0.1, as in pretraining, are our reading.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr, fused=True)
    model.train()
    for _ in range(steps):
        loss = diffusion_loss(model, *get_batch(images, y, batch_size, flip), p_drop).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        yield loss.detach()

DEFAULTS = {
    "paper": dict(steps=5000, batch_size=128, lr=1e-4),        # our reading of its setting
    "small": dict(steps=300, batch_size=32, lr=1e-3),  # chosen in assets/study/README.md
    "embedding": dict(steps=200, batch_size=16, lr=0.05),      # for inversion
}

# ---- the attacker's data -------------------------------------------------------------------------

def auxiliary_set(aux, model, info, train, forgotten, data_dir):
    """Images uint8 (N, C, H, W) and labels (N, F) on the model's device, nothing of `forgotten`.

    aux: "retain" (of `train`, the training images and labels), "heldout" (the test split),
    "generated" (500 samples of the model under attack), "pretrained" (of the model first unlearned
    in), or a folder. Outside the rules: "inversion:K", K training images of the forgotten
    conditions, in turn; "fewshot:K", these repeated to be half of all, beside the retained ones.
    """
    device, (images, y), (kind, _, k) = model.null.device, train, aux.partition(":")
    if kind in ("fewshot", "inversion"):
        require(k.isdecimal() and int(k) > 0, f"--aux {aux}: say how many, such as {kind}:10")
        keep = ~matches(y, forgotten)
        shots, labels = images[~keep], y[~keep]
        require(len(labels), f"--aux {aux}: these data hold no image of what was forgotten")
        same = (labels[:, None] == torch.unique(labels, dim=0)).all(2)     # (N, conditions)
        turn = (same.cumsum(0) * same).sum(1)                  # first of its condition, second, ...
        index = turn.argsort(stable=True)[:int(k)]
        if kind == "inversion":
            return shots[index], labels[index]
        index = index.repeat(math.ceil(int(keep.sum()) / len(index)))
        return torch.cat([images[keep], shots[index]]), torch.cat([y[keep], labels[index]])
    if aux in ("generated", "pretrained"):
        require(aux == "generated" or "from" in info["made_by"],
                "--aux pretrained: this model was not unlearned from another one")
        while aux == "pretrained" and "from" in info["made_by"]:
            model, info = load_checkpoint(info["made_by"]["from"], device)
        y = all_labels(info["names"]).to(device)
        y = y[~matches(y, forgotten)]
        y = y.repeat_interleave(math.ceil(500 / len(y)), 0)
        return to_uint8(sample(model, y, 20, seed=99, label=f"{aux} images")), y
    if aux == "heldout":
        images, y, _ = load_data(info["dataset"], "test", data_dir, device, model.cfg.image_size)
    elif aux != "retain":
        images, y = read_folder(aux, model, info["names"], forgotten)
    keep = ~matches(y, forgotten)
    require(keep.any(), f"--aux {aux} holds no image but of what was forgotten; choose another")
    return images[keep], y[keep]

def read_folder(folder, model, names, forgotten):
    """Images below a folder, at the model's size, labelled by the names of the folders on the way;
    one that these do not label in every factor gets the null label. No image below the name of a
    forgotten value is used, whatever else its folders say."""
    require(folder and Path(folder).is_dir(), f"--aux {folder} is not retain, heldout, generated, "
            "pretrained, fewshot:K, inversion:K or a folder")
    folder, images, labels, skipped, unknown = Path(folder), [], [], 0, set()
    null, own_name = model.null.tolist(), folder.resolve().name.lower()
    hidden = {names[f][v].lower() for f, v in forgotten}
    for path in find_images(folder):
        parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        if hidden & {*parts, own_name}:
            skipped += 1
            continue
        with explain(f"{path} is not a readable image; remove it"):
            images.append(read_image(path, model.cfg.image_size, model.cfg.channels))
        found = [[i for i, name in enumerate(values) if name.lower() in parts] for values in names]
        labels.append([values[0] for values in found] if all(found) else null)
        unknown |= set() if all(found) else {"/".join(parts)}
    require(images, f"--aux {folder} holds no image but of what was forgotten ({skipped} of these)")
    print(f"{folder}: {len(images)} auxiliary images; {labels.count(null)} get no label, because "
          f"their folders do not name all factors ({', '.join(sorted(unknown)[:9]) or '-'}); "
          f"{skipped} left out, below the name of what was forgotten")
    return torch.stack(images).to(model.null.device), torch.tensor(labels).to(model.null.device)

# ---- the table -----------------------------------------------------------------------------------

KEYS = ("stage", "dataset", "method", "forget")
SETTINGS = ("steps", "batch_size", "lr", "weight", "alternative", "alt_size")
ATTACK = ("aux", "attack_steps", "attack_batch_size", "attack_lr")

def mean(points, key):
    """In percent: the mean over runs with the lowest and the highest, or one run's interval."""
    values = [100 * p[key] for p in points if p.get(key) is not None]
    if len(values) > 1:
        return f"{statistics.fmean(values):.1f} ({min(values):.0f}..{max(values):.0f})"
    return percent(points[0], key)

def read_groups(folder):
    """Lists of the results under a folder that differ in nothing but their seeds."""
    groups = {}
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            r = json.loads(path.read_text("utf-8"))
            if r["stage"] == "unlearn" or r["stage"] == "attack" and r["aux"]:
                same = {k: r.get(k) for k in (*KEYS, *SETTINGS, *ATTACK)}
                same["protocol"] = {k: v for k, v in r["protocol"].items() if k != "seed"}
                same["points"] = [float(p["step"]) for p in r["curve"]]
                table_row([r])                         # it has all that a row needs
                groups.setdefault(json.dumps(same), []).append(r)
        except Exception:                              # whatever a foreign file holds
            print(f"skipped {path}: not a result of this code")
    return list(groups.values())

def half_life(curve):
    """The first point of an attack with AR above 50 %, or "-"."""
    return next((str(p["step"]) for p in curve if p["ar"] > 0.5), "-")

def table_row(runs):
    """{column: text} of the runs of a group."""
    r, first, last = runs[0], [r["curve"][0] for r in runs], [r["curve"][-1] for r in runs]
    fids = [fid_text(m[0]) if len(m) == 1 or m[0]["fid"] is None else
            f"{statistics.fmean(p['fid'] for p in m):.1f}" for m in (first, last)]
    row, attack = {"method": r["method"], "forgets": r["forget"]}, r["stage"] == "attack"
    for title, keys in {"unlearning": SETTINGS, "attack": ATTACK}.items():
        row[title] = " ".join(f"{k.removeprefix('attack_')} {r[k]}" for k in keys if r.get(k))
    row["runs"] = len(runs)
    row["seconds"] = f"{statistics.fmean(r['seconds'] for r in runs):.0f}"
    row["UA"] = "" if attack else mean(last, "ua")
    row["class"], row["style"] = mean(last, "cls"), mean(last, "style")
    row["FID"] = " -> ".join(fids)
    row["AR"] = mean(last, "ar") if attack else ""
    row["half-life"] = ", ".join(half_life(r["curve"]) for r in runs) if attack else ""
    row["none"] = mean(last, "none") if max(p["none"] for p in last) > 0.05 else ""
    return row

def make_table(folder):
    """A row for every group of results into table.md, the AR curves into attack_curves.png."""
    folder, curves = Path(folder), {}
    groups = read_groups(folder)
    require(groups, f"no results under {folder}; run 'python unlearn.py --cls 1' first")
    rows = [table_row(runs) for runs in groups]
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + (
        "\n\nShares in %: the mean (lowest..highest run), or one run's [95 % interval]; FID before "
        "and after; half-life: the first point with AR above 50 %, run by run.\n")
    write_text(folder / "table.md", text)
    for runs in groups:
        r = runs[0]
        if r["stage"] == "attack":
            heights = list(zip(*([p["ar"] for p in run["curve"]] for run in runs)))
            bands = [list(map(f, heights)) for f in (statistics.fmean, min, max)]
            name = f"{r['method']} {r['forget']} {r.get('steps')} x {r.get('lr')}; {r['aux']}"
            name += f" ({len(curves)})" if name in curves else ""
            curves[name] = [p["step"] for p in r["curve"]], *bands
    if curves:
        save_plot(folder / "attack_curves.png", curves, "AR under attack", "attack step", 1)
    print(f"{text}\nwrote {folder}/table.md" + (" and attack_curves.png" if curves else ""))

# ---- stage 3 -------------------------------------------------------------------------------------

def main():
    parser = stage_parser(__doc__, "attack-<run>-<aux>", samples=120, sampler_steps=20)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("run", nargs="?", metavar="RUN", type=path, help="a run folder, or a checkpoint")
    flag("--aux", type=path, default="retain", help="the attacker's data: retain (default), "
         "heldout, generated, pretrained, a folder, fewshot:K or inversion:K")
    flag("--lr", metavar="X", type=number(float, 0, 10), help="learning rate; default by preset")
    flag("--every", nargs="+", type=number(int, 1), metavar="N",
         help="measure every N steps, or at several; default four times")
    flag("--cls", nargs="+", metavar="K", help="count these, not all that was forgotten")
    flag("--style", nargs="+", metavar="K", help="the same for styles")
    flag("--table", metavar="DIR", type=path, help="gather every result under DIR and stop")
    flag("--compile", action="store_true", help="torch.compile the network: for long GPU runs")
    args = parser.parse_args()
    if args.table:
        return make_table(args.table)
    require(args.run, "name what to attack, such as runs/shapes/dimum-cls1; or see --help")
    path = checkpoint_file(args.run)
    model, info, *train = load_run(path, args)
    names, made_by, inversion = info["names"], info["made_by"], args.aux.startswith("inversion")
    count = find_pairs(args, names) or info["forgotten"]
    require(count, f"{path} has forgotten nothing; say what to count, such as --cls {names[0][0]}")
    forgotten = sorted({*count, *info["forgotten"]})
    settings = fill(args, **DEFAULTS["embedding" if inversion else info["preset"]])
    fill(args, every=[max(1, args.steps // 4)])

    images, y = auxiliary_set(args.aux, model, info, train, forgotten, args.data_dir)
    measure, protocol = evaluator(info, *train, forgotten, count, args, "ar")
    torch.manual_seed(args.seed)
    name = path.parent.name if "from" in made_by else f"{made_by['method']}-{pairs_slug(count)}"
    aux = Path(args.aux).resolve().name.replace(":", "")
    folder = run_folder(args.out or Path("runs", args.dataset, f"attack-{name}-{aux}"))
    print(f"DiMRA on {path}: {len(y)} auxiliary images ({args.aux}), {args.steps} steps, batch "
          f"{args.batch_size}, lr {args.lr:g}; counting {pairs_text(count, names)}")
    if inversion:                                      # the counted factors' embeddings alone learn
        for key, p in model.named_parameters():
            p.requires_grad_(key in [f"label_embs.{factor}.weight" for factor, _ in count])
    if args.compile:
        model.compile()
    # no dropped labels in an inversion: the null embedding would learn the images, too
    steps = dimra(model, images, y, args.steps, args.batch_size, args.lr, 0.0 if inversion else 0.1,
                  args.dataset == "cifar10")
    curve, losses, seconds, pictures, y = follow(model, steps, "attack", args, measure, args.every,
                                                 retained=False)
    write_losses(folder, losses, "attack")
    save_before_after(folder / "samples.png", names, forgotten, y, pictures)
    forget = torch.arange(curve[0]["forget_samples"])          # these come first
    shown = forget[::math.ceil(len(forget) / 20)]
    frames = [draw_grid(x[shown], 10, heads=(f"step {p['step']}",))
              for x, p in zip(pictures, curve)]
    write_file(folder / "attack.gif", lambda tmp: frames[0].save(
        tmp, "GIF", save_all=True, append_images=frames[1:], duration=700, loop=0))
    series = tuple([p[k] for p in curve] for k in ("step", "ar", "ar_low", "ar_high"))
    save_plot(folder / "curve.png", {"AR": series}, f"DiMRA on {name}, aux {aux}", "attack step", 1)
    settings = {f"attack_{k}": v for k, v in settings.items()}
    info["made_by"] = {**made_by, "stage": "attack", "aux": args.aux, "attack_seed": args.seed,
                       **settings, "from": str(path)}
    finish(folder, model, info, args, ["attack.py", "--table", folder.parent.as_posix()],
           forget=pairs_text(count, names), seconds=seconds, curve=curve, protocol=protocol)

if __name__ == "__main__":
    run(main)
