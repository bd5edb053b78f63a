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
    python attack.py runs/shapes/dimum-cls1 --aux fewshot:10 --only-embedding   # inversion

Threat model: the attacker holds the unlearned weights and knows how conditions are passed. It has
no image of what was forgotten. AR is the share of samples of the forgotten condition in which the
classifier recognises the forgotten value.
"""
import json
import math
import shlex
import statistics
from pathlib import Path

import torch

from fid import evaluator, fid_text, follow, percent, save_before_after
from model import (all_labels, checkpoint_file, diffusion_loss, explain, find_pairs,
                   load_checkpoint, make_parser, matches, number, pairs_slug, pairs_text,
                   pick_device, require, run, run_folder, sample, save_checkpoint, save_plot,
                   to_uint8, write_file, write_json)
from train_ddpm import (data_flags, find_images, get_batch, load_data, override, read_image,
                        step_flags, write_losses)

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

# Steps, batch size, learning rate. paper: our reading of its setting. small: the strongest found on
# shapes against SFRon. embedding: for --only-embedding.
DEFAULTS = {"paper": (5000, 128, 1e-4), "small": (300, 32, 1e-3), "embedding": (200, 16, 0.05)}

# ---- the attacker's data -------------------------------------------------------------------------

def auxiliary_set(aux, model, info, train, forgotten, data_dir):
    """Images uint8 (N, C, H, W) and labels (N, F) on the model's device, with nothing of
    `forgotten`.

    aux: "retain" (of `train`, the training images and labels), "heldout" (the test split),
    "generated" (500 samples of the model under attack), "pretrained" (of the model that was
    unlearned in), or a folder. "fewshot:K" is outside the rules: K training images of the
    forgotten conditions, in turn.
    """
    device, (images, y), (kind, _, k) = model.null.device, train, aux.partition(":")
    if kind == "fewshot":
        require(k.isdecimal() and int(k) > 0, f"--aux {aux}: say how many, such as fewshot:10")
        images, y = (part[matches(train[1], forgotten)] for part in train)
        same = (y[:, None] == torch.unique(y, dim=0)).all(2)       # (N, conditions)
        turn = (same.cumsum(0) * same).sum(1)                      # first of its condition, second, ...
        index = turn.argsort(stable=True)[:int(k)]
        return images[index], y[index]
    if aux in ("generated", "pretrained"):
        if aux == "pretrained":
            model = load_checkpoint(first_model(info), device)[0]
        y = all_labels(info["names"]).to(device)
        y = y[~matches(y, forgotten)]
        y = y.repeat_interleave(math.ceil(500 / len(y)), 0)
        return to_uint8(sample(model, y, 20, seed=99, label=f"{aux} images")), y
    if aux == "heldout":
        images, y, _ = load_data(info["dataset"], "test", data_dir, device, model.cfg.image_size)
    elif aux != "retain":
        images, y = read_folder(aux, model, info["names"], forgotten)
    keep = ~matches(y, forgotten)
    return images[keep], y[keep]

def first_model(info):
    """The path of the model that was first unlearned in."""
    path = None
    while "from" in info["made_by"]:
        path = Path(info["made_by"]["from"])
        info = load_checkpoint(path)[1]
    require(path, "--aux pretrained: this model was not unlearned from another one")
    return path

def read_folder(folder, model, names, forgotten):
    """Images below a folder, at the model's size, labelled by the names of the folders on the way;
    one that these do not label in every factor gets the null label. No image below the name of a
    forgotten value is used, whatever else its folders say."""
    null, images, labels, skipped = model.null.tolist(), [], [], 0
    hidden = {names[f][v].lower() for f, v in forgotten}
    for path in find_images(folder):
        parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        if hidden & set(parts):
            skipped += 1
            continue
        with explain(f"{path} is not a readable image; remove it"):
            mode = "L" if model.cfg.channels == 1 else "RGB"
            images.append(read_image(path, model.cfg.image_size, mode))
        found = [[i for i, name in enumerate(values) if name.lower() in parts] for values in names]
        labels.append([values[0] for values in found] if all(found) else null)
    require(images, f"--aux {folder} is not retain, heldout, generated, pretrained, fewshot:K or a "
            f"folder with images of something else than was forgotten ({skipped} of that)")
    print(f"{folder}: {len(images)} auxiliary images, {labels.count(null)} of them below no known "
          f"label; {skipped} left out, below the name of what was forgotten")
    return torch.stack(images).to(model.null.device), torch.tensor(labels).to(model.null.device)

# ---- the table -----------------------------------------------------------------------------------

def mean(runs, key, scale=100):
    """The mean over runs, in percent, with the lowest and highest run, or a single run's
    interval."""
    values = [scale * r[key] for r in runs if r.get(key) is not None]
    if len(values) > 1:
        return f"{statistics.fmean(values):.1f} ({min(values):.0f}..{max(values):.0f})"
    if not values or f"{key}_low" not in runs[0]:
        return f"{values[0]:.1f}" if values else "-"
    low, high = (100 * runs[0][f"{key}_{end}"] for end in ("low", "high"))
    return f"{values[0]:.1f} [{low:.0f}, {high:.0f}]"

def read_groups(folder):
    """Lists of the results under a folder that differ in nothing but their seeds."""
    groups = {}
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            r = json.loads(path.read_text("utf-8"))
            if r["stage"] in ("unlearn", "attack"):
                same = {k: r.get(k) for k in (*KEYS, *SETTINGS, *ATTACK)}
                same["protocol"] = {k: v for k, v in r["protocol"].items() if k != "seed"}
                groups.setdefault(json.dumps(same), []).append(r)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"skipped {path}: not a result of this code")
    return list(groups.values())

KEYS = ("stage", "dataset", "method", "forget")
SETTINGS = ("steps", "batch_size", "lr", "weight", "alternative", "alt_size")
ATTACK = ("aux", "attack_steps", "attack_batch_size", "attack_lr", "only_embedding")

def make_table(folder):
    """A row for every group of results into table.md, the AR curves into attack_curves.png."""
    groups, curves = read_groups(folder), {}
    require(groups, f"no results under {folder}; run 'python unlearn.py --cls 1' first")
    head = ("method", "forgets", "unlearning", "attack", "runs", "seconds", "UA", "class", "style",
            "FID before", "FID after", "none", "AR", "half-life")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for runs in groups:
        r, before, after = runs[0], [r["before"] for r in runs], [r["after"] for r in runs]
        how, attack = (" ".join(f"{k.removeprefix('attack_')} {r[k]}" for k in keys if r.get(k))
                       for keys in (SETTINGS, ATTACK))
        fids = [fid_text(m[0]) if len(m) == 1 else mean(m, "fid", 1) for m in (before, after)]
        none = mean(after, "none") if max(m["none"] for m in after) > 0.05 else ""
        row = [r["method"], r["forget"], how, attack, str(len(runs)), mean(runs, "seconds", 1),
               mean(after, "ua"), mean(after, "cls"), mean(after, "style"), *fids, none, "", ""]
        if r["stage"] == "attack":
            row[6], row[-2] = "", mean([m["curve"][-1] for m in runs], "ar")
            row[-1] = ", ".join(str(m["half_life"]).replace("None", "-") for m in runs)
            heights = list(zip(*([p["ar"] for p in m["curve"]] for m in runs)))
            means, lows, highs = (list(map(f, heights)) for f in (statistics.fmean, min, max))
            name = f"{r['method']} {r['forget']} {r.get('steps')} x {r.get('lr')}; {r['aux']}"
            name += "" if name not in curves else f" ({len(curves)})"
            curves[name] = [p["step"] for p in r["curve"]], means, lows, highs
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Shares in %: the mean (lowest..highest run), or one run's [95 % interval]; FID "
              "with its standard error; half-life: the first point with AR above 50 %, run by run."]
    text = "\n".join(lines) + "\n"
    write_file(Path(folder, "table.md"), lambda tmp: tmp.write_text(text, "utf-8"))
    if curves:
        save_plot(Path(folder, "attack_curves.png"), curves, "AR under attack", "attack step", 1)
    print(f"{text}\nwrote {folder}/table.md" + (" and attack_curves.png" if curves else ""))

# ---- stage 3 -------------------------------------------------------------------------------------

def restrict(model, images, y, train, forgotten, count, args):
    """With --only-embedding the label embeddings of the counted factors alone learn; few-shot images
    (with labels y) come half and half with retained ones of `train`. Returns (images, y, label dropout)."""
    if args.only_embedding:
        for key, p in model.named_parameters():
            p.requires_grad_(key in [f"label_embs.{factor}.weight" for factor, _ in count])
        return images, y, 0.0                  # or the null embedding would learn the images, too
    if args.aux.startswith("fewshot:"):        # half of a batch is retained data, to keep the rest
        retained = [part[~matches(train[1], forgotten)] for part in train]
        times = math.ceil(len(retained[1]) / len(y))
        images = torch.cat([retained[0], images.repeat(times, 1, 1, 1)])
        y = torch.cat([retained[1], y.repeat(times, 1)])
    return images, y, 0.1

def parse():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("run", nargs="?", metavar="RUN", help="a run folder of unlearn.py, or a checkpoint")
    flag("--aux", default="retain", help="the attacker's data: retain (default), heldout, "
         "generated, pretrained, a folder, or fewshot:K")
    flag("--only-embedding", action="store_true", help="learn the label embeddings alone")
    flag("--every", type=number(int, 1), metavar="N", help="steps from point to point; a quarter")
    flag("--cls", nargs="+", metavar="K", help="count these, not all that was forgotten")
    flag("--style", nargs="+", metavar="K", help="the same for styles")
    flag("--table", metavar="DIR", help="gather every result under DIR and stop")
    flag("--samples", type=number(int, 1, 10 ** 6), default=120, help="a third forgotten (120)")
    flag("--sampler-steps", type=number(int, 1, 1000), default=20, help="DDIM steps (default 20)")
    flag("--lr", type=number(float, 0, 10), help="learning rate; default by preset")
    data_flags(parser, "attack-<run>-<aux>")
    step_flags(parser)
    return parser.parse_args()

def main():
    args = parse()
    if args.table:
        return make_table(args.table)
    require(args.run, "name what to attack, such as runs/shapes/dimum-cls1; or see --help")
    device, path = pick_device(args.device), checkpoint_file(args.run)
    model, info = load_checkpoint(path, device)
    names, made_by, args.dataset = info["names"], info["made_by"], info["dataset"]
    count = find_pairs(args, names) or info["forgotten"]
    require(count, f"{path} has forgotten nothing; say what to count, such as --cls {names[0][0]}")
    forgotten, keys = sorted({*count, *info["forgotten"]}), ("steps", "batch_size", "lr")
    usual = DEFAULTS["embedding" if args.only_embedding else info["preset"]]
    vars(args).update(override(dict(zip(keys, usual)), args, *keys))
    every = args.every or max(1, args.steps // 4)

    train = load_data(args.dataset, "train", args.data_dir, device, model.cfg.image_size)[:2]
    measure, protocol = evaluator(info, *train, forgotten, count, args, device)
    torch.manual_seed(args.seed)
    images, y = auxiliary_set(args.aux, model, info, train, forgotten, args.data_dir)
    name = f"{made_by.get('method', 'original')}-{pairs_slug(count)}"
    name = path.parent.name if "from" in made_by else name
    aux = Path(args.aux).name.replace(":", "") + ("-embedding" if args.only_embedding else "")
    folder = run_folder(args.out or Path("runs", args.dataset, f"attack-{name}-{aux}"))
    print(f"DiMRA on {path}: {len(y)} auxiliary images ({args.aux}), {args.steps} steps, batch "
          f"{args.batch_size}, lr {args.lr:g}; counting {pairs_text(count, names)}")
    images, y, p_drop = restrict(model, images, y, train, forgotten, count, args)
    curve = []
    if args.compile:
        model.compile()

    def look(step, retained=False):
        metrics, *pictures = measure(model, label=f"step {step}", retained=retained)
        point = {"step": step, "ar": 1 - metrics["ua"], "ar_low": 1 - metrics["ua_high"],
                 "ar_high": 1 - metrics["ua_low"], "none": metrics["none"]}
        curve.append(point)
        rest = f"   class {percent(metrics, 'cls')}   FID {fid_text(metrics)}" if retained else ""
        print(f"step {step:>5}: AR {percent(point, 'ar')}{rest}", flush=True)
        return metrics, *pictures

    before, images_before, labels = look(0, True)
    steps = dimra(model, images, y, args.steps, args.batch_size, args.lr, p_drop,
                  args.dataset == "cifar10")
    losses, seconds = follow(steps, "attack", args.steps, every, look, device)
    after, images_after, _ = look(args.steps, True)
    write_losses(folder, losses, "attack")
    save_before_after(folder / "samples.png", names, forgotten, labels, images_before, images_after)
    series = tuple([p[k] for p in curve] for k in ("step", "ar", "ar_low", "ar_high"))
    save_plot(folder / "curve.png", {"AR": series}, f"DiMRA on {name}, aux {aux}", "attack step", 1)
    made_by = {"method": "original", **made_by, "stage": "attack", "aux": args.aux,
               "only_embedding": args.only_embedding, "attack_seed": args.seed,
               **{f"attack_{key}": getattr(args, key) for key in keys}}
    save_checkpoint(folder / "model.pt", model, {**info, "made_by": {**made_by, "from": str(path)}})
    write_json(folder / "result.json", {
        **made_by, "dataset": args.dataset, "forget": pairs_text(count, names), "seconds": seconds,
        "half_life": next((p["step"] for p in curve if p["ar"] > 0.5), None), "curve": curve,
        "before": before, "after": after, "protocol": protocol, "args": vars(args)})
    print(f"({after['forget_samples']} samples a point, {after['retain_samples']} retained at both "
          f"ends, {args.sampler_steps} DDIM steps, guidance 2, seed {args.seed}; 95 % intervals)\n"
          f"wrote {folder}/result.json, curve.png, samples.png; {seconds:.0f} s of attack\n"
          f"next: python attack.py --table {shlex.quote(str(folder.parent))}")

if __name__ == "__main__":
    run(main)
