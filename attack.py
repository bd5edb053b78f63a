"""Stage 3: DiMRA, the relearning attack, and the table of all results.

    python attack.py runs/shapes/dimum-cls1                      # fine-tune on the retained training data
    python attack.py runs/shapes/salun-cls1 --aux heldout        # retained classes, images never trained on
    python attack.py runs/shapes/salun-cls1 --aux generated      # no data at all: the model's own samples
    python attack.py runs/shapes/salun-cls1 --aux my_images      # a folder: CLASS/*.png or STYLE/CLASS/*.png
    python attack.py assets/shapes.pt --cls 1                    # the original model: the curve's ceiling
    python attack.py --table runs/shapes                         # every result in one table and one picture

Threat model: the attacker holds the unlearned weights and knows how conditions are passed. It has no image of what
was forgotten. It trains with the ordinary diffusion loss on auxiliary data, and after every --every steps the
forgotten condition is sampled: AR is the share of samples in which the classifier recognises the forgotten value.
"""
import json
import math
import time
from pathlib import Path

import torch

from fid import evaluate, load_classifier, percent, protocol, reference_features, save_before_after
from model import (FACTORS, Parser, diffusion_loss, fail, fingerprint, forgotten_values, load_checkpoint, number,
                   pick_device, run_folder, run_script, sample, save_checkpoint, save_plot, to_uint8, write_csv,
                   write_file, write_json)
from train_ddpm import (BROKEN, Loop, all_labels, common_flags, exclude, find_forgotten, find_images, get_batch,
                        load_data, read_image)

# cifar10: our reading of the paper's setting; small: found on shapes. every: steps between points of the curve.
DEFAULTS = {"cifar10": dict(steps=5000, batch_size=128, lr=1e-4, every=500),
            "small": dict(steps=300, batch_size=32, lr=1e-3, every=75)}


# ---- the attacker's data ---------------------------------------------------------------------------------------

def auxiliary_set(aux, model, dataset, data_dir, device, names, gone, generated=500):
    """Images uint8 (N, C, H, W) and labels (N, F) with nothing of the forgotten values gone = {factor: [value, ...]}.

    aux: "retain" (training split), "heldout" (test split), "generated" (sampled from the model under attack, retained
    conditions only, so that the rule holds whatever the model draws), or a folder whose subfolders name the labels.
    """
    if aux in ("retain", "heldout"):
        split = "train" if aux == "retain" else "test"
        images, y, _ = load_data(dataset, split, data_dir, device, model.cfg.image_size)
        return exclude(images, y, gone)
    if aux == "generated":
        cells = all_labels(names, 1)
        _, cells = exclude(cells, cells, gone)
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
        fail(f"--aux {folder} is neither retain, heldout nor generated, nor a folder with images in it")
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

def dimra(model, images, y, steps, batch_size, lr, observe=None, every=0, flip=False, **keep):
    """Fine-tune the model in place with the diffusion loss on the auxiliary set. Returns the finished Loop, whose
    data["curve"] has what observe(step) returned every `every` steps on the way. keep: path, resume, settings of Loop.

    Source: DiMRA in Yuan et al. 2512.03564. Its optimiser and learning rate were not at hand: Adam, clipping at norm 1
    and label dropout 0.1 as in pretraining are our reading.
    """
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr, fused=True)
    loop = Loop("attack", steps, model=model, optimizer=optimizer, **keep)
    curve = loop.data.setdefault("curve", [])
    model.train()
    for step in loop:
        loss = diffusion_loss(model, *get_batch(images, y, batch_size, flip)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        loop.loss = loss.detach()
        if every and (step + 1) % every == 0 and step + 1 < steps:
            curve.append(observe(step + 1))
            model.train()
    model.eval()
    return loop


def curve_point(step, metrics):
    """One row of the AR curve from evaluate's metrics; AR is 1 - UA."""
    return {"step": step, "ar": 1 - metrics["ua"], "ar_low": 1 - metrics["ua_high"], "ar_high": 1 - metrics["ua_low"],
            **{k: metrics[k] for k in ("ira", "ira_low", "ira_high", "cra", "fid")}}


def columns(curve, *keys):
    """The lists of these values along a curve."""
    return tuple([point[k] for point in curve] for k in keys)


# ---- the table -------------------------------------------------------------------------------------------------

def area(curve):
    """Mean height of the AR curve over its steps (trapezoids), 0..1."""
    xs, ys = [p["step"] for p in curve], [p["ar"] for p in curve]
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


def make_table(folder):
    """Gather every result.json under a folder into table.md, and all AR curves into attack_curves.png."""
    results = []
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            results.append((path.parent, json.loads(path.read_text())))
        except (OSError, ValueError):
            print(f"skipped {path}: not readable as JSON")
    unlearned = [(p, r) for p, r in results if r.get("stage") == "unlearn"]
    attacks = [(p, r) for p, r in results if r.get("stage") == "attack"]
    if not unlearned and not attacks:
        fail(f"no results of unlearn.py or attack.py under {folder}; run 'python unlearn.py --cls 1' first")

    def curves(method, like):
        same = [r for _, r in attacks if all(r[k] == like[k] for k in ("dataset", "forget", "aux"))]
        return next((r["curve"] for r in same if r["method"] == method), None)
    head = ("run", "forgets", "steps", "seconds", "UA", "IRA", "CRA", "FID before", "FID after", "AR after attack",
            "irreversibility")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    shown = set()
    share = lambda m, k: "-" if m.get(k) is None else f"{100 * m[k]:.1f}"
    final = lambda a: "{aux}: {ar:.0f} [{ar_low:.0f}, {ar_high:.0f}] after {step}".format(
        aux=a["aux"], step=a["curve"][-1]["step"], **{k: 100 * a["curve"][-1][k] for k in ("ar", "ar_low", "ar_high")})
    fid = lambda m: "-" if m.get("fid") is None else f"{m['fid']:.2f}"
    for path, r in unlearned:
        found = []
        for attack_path, a in attacks:
            if a["run_name"] == path.name and a["dataset"] == r["dataset"]:
                shown.add(attack_path)
                value = irreversibility(a["curve"], curves("retrain", a), curves("original", a))
                found.append((final(a), "-" if value is None else f"{value:.2f}"))
        lines.append("| " + " | ".join((
            path.name, " ".join(r["forget"]["names"]), str(r["steps"]), f"{r['train_seconds']:.0f}",
            *(share(r["after"], k) for k in ("ua", "ira", "cra")), fid(r["before"]), fid(r["after"]),
            "; ".join(f for f, _ in found) or "-", "; ".join(v for _, v in found) or "-")) + " |")
    for path, a in attacks:
        if path not in shown:
            lines.append(f"| {path.name} | {' '.join(a['forget']['names'])} |" + " - |" * 7 + f" {final(a)} | - |")
    some = next(iter([r for _, r in unlearned] or [r for _, r in attacks]))
    notes = some["protocol"]
    lines += ["", f"Shares in %, AR with its 95 % Wilson interval. Dataset {notes['dataset']}; "
              f"{notes['forget_samples']} + {notes['retain_samples']} samples, {notes['sampler'].upper()} "
              f"{notes['sampler_steps']} steps, guidance {notes['guidance']:g}, seed {notes['seed']}; FID on "
              f"{notes['fid_features']} features against {notes['real_images']} training images. Seconds are those of "
              "the unlearning alone."]
    text = "\n".join(lines)
    write_file(Path(folder, "table.md"), lambda p: p.write_text(text + "\n"))
    print(text + f"\n\nwrote {folder}/table.md")
    if attacks:
        series = {f"{a['run_name']} {a['aux']}": columns(a["curve"], "step", "ar", "ar_low", "ar_high")
                  for _, a in attacks}
        save_plot(Path(folder, "attack_curves.png"), series, "AR under DiMRA", "attack step", "AR", (0, 1))
        print(f"wrote {folder}/attack_curves.png")


# ---- command line ----------------------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder of unlearn.py, or a checkpoint")
    common_flags(parser, 120, "images per point of the curve, a third of them under the forgotten condition", 20)
    group = parser.add_argument_group("attack")
    group.add_argument("--aux", default="retain", help="auxiliary data: retain, heldout, generated, or a folder")
    group.add_argument("--every", type=number(int, 1), metavar="N",
                       help="steps between points of the curve; default a quarter of --steps")
    group.add_argument("--cls", nargs="+", metavar="K", help="count this class, not what RUN says was forgotten")
    group.add_argument("--style", nargs="+", metavar="K", help="the same for a style")
    group.add_argument("--table", metavar="DIR", help="gather every result under DIR and stop")
    args = parser.parse_args()
    if args.table:
        return make_table(args.table)
    if not args.run:
        fail("name what to attack, such as: python attack.py runs/shapes/dimum-cls1; see 'python attack.py --help'")
    started, device = time.time(), pick_device(args.device)

    path = Path(args.run, "model.pt") if Path(args.run).is_dir() else Path(args.run)
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
    opts = dict(DEFAULTS["cifar10" if model.cfg.width >= 128 else "small"])
    opts.update({k: v for k in ("steps", "batch_size", "lr") if (v := getattr(args, k)) is not None})
    opts["every"] = args.every or (max(1, opts["steps"] // 4) if args.steps else opts["every"])
    run_name = path.parent.name
    if method == "original":
        run_name = f"original-{FACTORS[factor]}{'-'.join(map(str, values))}"
    aux_name = args.aux if args.aux in ("retain", "heldout", "generated") else Path(args.aux).name
    torch.manual_seed(args.seed)
    images, y = auxiliary_set(args.aux, model, dataset, args.data_dir, device, names, gone)
    folder = run_folder(args.out, Path("runs", dataset, f"attack-{run_name}-{aux_name}"), args.resume)
    print(f"DiMRA on {path}: {len(images)} auxiliary images ({args.aux}), {opts['steps']} steps, batch "
          f"{opts['batch_size']}, lr {opts['lr']:g}; counting {FACTORS[factor]} "
          f"{', '.join(names[factor][v] for v in values)}")

    classifier, accuracy = load_classifier(dataset, args.data_dir, device, names, model.cfg.image_size)
    kept = images, y
    if args.aux != "retain":
        kept = auxiliary_set("retain", model, dataset, args.data_dir, device, names, gone)
    real_features = reference_features(classifier, *kept)

    def measure(step, keep=False):
        metrics, pictures, y_eval = evaluate(model, classifier, names, gone, factor, real_features, args.samples,
                                             args.sampler_steps, args.guidance, label=f"step {step}", keep=keep)
        point = curve_point(step, metrics)
        print(f"step {step:>6}: AR {100 * point['ar']:5.1f} % [{100 * point['ar_low']:.1f}, "
              f"{100 * point['ar_high']:.1f}]   IRA {percent(metrics, 'ira')}   FID {metrics['fid'] or math.nan:.3f}",
              flush=True)
        return metrics, point, pictures, y_eval
    before, first_point, pictures_before, y_eval = measure(0, keep=True)
    settings = {"dataset": dataset, "run": run_name, "aux": args.aux, "factor": factor, "values": values,
                "seed": args.seed, "ckpt": fingerprint(model)[:12], **opts}
    loop = dimra(model, images, y, opts["steps"], opts["batch_size"], opts["lr"], lambda step: measure(step)[1],
                 opts["every"], flip=dataset == "cifar10", path=folder / "train.pt", resume=args.resume,
                 settings=settings)
    after, last_point, pictures_after, _ = measure(opts["steps"])
    curve = [first_point, *loop.data["curve"], last_point]

    save_before_after(folder / "samples.png", names, gone, y_eval, pictures_before, pictures_after)
    save_checkpoint(folder / "model.pt", model, {
        "dataset": dataset, "names": names, "forgotten": {FACTORS[i]: v for i, v in gone.items()},
        "made_by": {"stage": "attack", "method": method, "from": str(path), **opts}})
    write_csv(folder / "log.csv", loop.data["log"])
    write_csv(folder / "curve.csv", curve)
    save_plot(folder / "curve.png", {"AR (comes back)": columns(curve, "step", "ar", "ar_low", "ar_high"),
                                     "IRA (quality kept)": columns(curve, "step", "ira", "ira_low", "ira_high")},
              f"DiMRA on {run_name}, aux {aux_name}", "attack step", "share", (0, 1))
    write_json(folder / "result.json", {
        "stage": "attack", "dataset": dataset, "method": method, "run": str(path.parent), "run_name": run_name,
        "aux": aux_name,
        "forget": {"factor": FACTORS[factor], "values": values, "names": [names[factor][v] for v in values]},
        "before": before, "after": after, "curve": curve,
        "first_step_above_half": next((p["step"] for p in curve if p["ar"] > 0.5), None),
        "protocol": protocol(dataset, names, after, real_features, accuracy, args.sampler_steps, args.guidance, 1234,
                             args.seed), "args": vars(args), **opts, "seconds": round(time.time() - started, 1)})
    (folder / "train.pt").unlink()                 # the run is whole: there is nothing to resume
    if len(after["ua_of"]) > 1:
        print("AR of each: " + ", ".join(f"{name} {100 - 100 * ua:.1f} %" for name, ua in after["ua_of"].items()))
    print(f"({curve[-1]['step']} attack steps; {after['ua_samples']} + {after['ira_samples']} samples a point, "
          f"{args.sampler_steps} DDIM steps, guidance {args.guidance:g}; 95 % intervals)\n"
          f"wrote {folder}/result.json, curve.png and samples.png in {time.time() - started:.0f} seconds\n"
          f"next: python attack.py --table runs/{dataset}")


if __name__ == "__main__":
    run_script(main)
