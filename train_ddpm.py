"""Stage 1: pretrain a conditional DDPM on labelled images; the datasets.

    python train_ddpm.py                            # shapes on a CPU: how assets/shapes.pt was made
    python train_ddpm.py --dataset fashion          # Fashion-MNIST, small network
    python train_ddpm.py --dataset cifar10          # CIFAR-10, the paper's network: one CUDA GPU
    python train_ddpm.py --dataset folder --data-dir my_images    # CLASS/*.jpg or STYLE/CLASS/*.jpg
    python train_ddpm.py --exclude-cls square       # retraining: a model that never saw a square
    python train_ddpm.py --resume                   # go on after a kill, or with more --steps
    python train_ddpm.py --dataset cifar10 --import ckpt.pth    # convert a public SalUn checkpoint

Leaves runs/<dataset>/pretrain/: model.pt (EMA weights), samples.png, loss.png, log.csv, result.json
"""
import copy
import gzip
import hashlib
import math
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets as tvd

from model import (FACTORS, PRESETS, UNet, all_labels, diffusion_loss, explain, find_pairs,
                   make_config, make_parser, matches, number, pairs_slug, pick_device, progress,
                   read_file, require, run, run_folder, sample, save_checkpoint, save_grid,
                   save_plot, write_file, write_json)

PRETRAIN = {
    # A high rate with cosine decay makes the most of few steps.
    "small": dict(steps=16000, batch_size=32, lr=2e-3, ema=0.999, warmup=500, cosine=True),
    # The public SalUn, SFRon and SA configuration for CIFAR-10.
    "paper": dict(steps=800000, batch_size=128, lr=2e-4, ema=0.9999, warmup=0, cosine=False),
}
FASHION_STEPS = 3000            # of the small preset
SAVE_SECONDS = 120              # between two saved training states

# ---- training ------------------------------------------------------------------------------------

def get_batch(images, y, n, flip=False):
    """n random examples: images float (n, C, H, W) in [-1, 1], labels (n, F). flip: mirror half."""
    i = torch.randint(len(images), (n,), device=images.device)
    x = images[i].float() / 127.5 - 1
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last), y[i]

def pretrain(model, ema, optimizer, images, y, settings, flip=False, start=0):
    """Train `model` on images uint8 (N, C, H, W) with labels y (N, F); yield each step's loss.

    Source: DDPM: Adam, clipping at norm 1, and a moving average of the weights, `ema`, whose decay
    rises to settings["ema"]. The rate warms up, then is constant or falls to 0 along a cosine.
    """
    steps, params, averaged = settings["steps"], list(model.parameters()), list(ema.parameters())
    model.train()
    for step in range(start, steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if settings["cosine"] else 1.0
        warm = min(1.0, (step + 1) / max(settings["warmup"], 1))
        optimizer.param_groups[0]["lr"] = settings["lr"] * warm * fall
        x0, labels = get_batch(images, y, settings["batch_size"], flip)
        loss = diffusion_loss(model, x0, labels).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(settings["ema"], (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, params, 1 - decay)
        yield loss.detach()

def save_state(path, step, settings, losses, seconds, parts):
    """The whole training state after `step` steps; parts: {name: what has a state_dict}."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    data = dict(format=1, kind="training", step=step, settings=settings, seconds=seconds,
                parts={name: part.state_dict() for name, part in parts.items()},
                losses=losses[:step].cpu(), rng=torch.get_rng_state(), cuda_rng=cuda)
    write_file(path, lambda tmp: torch.save(data, tmp))

def load_state(path, settings, losses, parts):
    """Put a saved state back into losses, parts and generators. Returns (step, seconds so far)."""
    state = read_file(path, "training")
    other = [f"{k} {v}" for k, v in state["settings"].items() if k != "steps" and settings[k] != v]
    require(not other, f"{path} belongs to a run with other settings: give {', '.join(other)}")
    if state["step"] >= settings["steps"]:
        print(f"{path.parent} is finished ({state['step']} steps); to train on, give more --steps")
        sys.exit(0)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    losses[:state["step"]] = state["losses"]
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["seconds"]

def write_losses(folder, losses, label):
    """log.csv, the mean of every (at most about 200) group of losses (steps,), and loss.png."""
    every = max(1, len(losses) // 200)
    ys = [part.mean().item() for part in losses.split(every)] if len(losses) else []
    xs = [min((i + 1) * every, len(losses)) for i in range(len(ys))]
    lines = ["step,loss", *(f"{x},{y:.6f}" for x, y in zip(xs, ys))]
    write_file(folder / "log.csv", lambda tmp: tmp.write_text("\n".join(lines) + "\n"))
    save_plot(folder / "loss.png", {"loss": (xs, ys)}, f"{label}: training loss", "step")

# ---- the embedded dataset ------------------------------------------------------------------------

SHAPES = ["circle", "square", "triangle", "cross", "diamond", "star", "crescent", "bar", "heart",
          "ring"]
STYLES = ["flat", "stripes", "dots", "sketch", "neon"]

def shape_sdf(name, x, y):
    """Signed distance (negative inside) of a shape of radius about 1 at points x, y; y points
    up."""
    def box(w, h):
        return torch.maximum(x.abs() - w, y.abs() - h)

    def disc(cx, cy, r):
        return torch.hypot(x - cx, y - cy) - r

    if name == "circle":
        return disc(0, 0, 0.85)
    if name == "square":
        return box(0.75, 0.75)
    if name == "triangle":
        sides = torch.maximum(0.866 * x + 0.5 * y, -0.866 * x + 0.5 * y)
        return torch.maximum(-y, sides) - 0.55
    if name == "cross":
        return torch.minimum(box(0.28, 0.9), box(0.9, 0.28))
    if name == "diamond":
        return (x.abs() / 0.7 + y.abs() / 1.05 - 1) * 0.58
    if name == "star":                         # fold the plane into one of ten half points
        angle = torch.remainder(torch.atan2(x, y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
        r = torch.hypot(x, y)
        return 0.526 * (r * angle.cos() - 1.05) + 0.851 * r * angle.abs().sin()
    if name == "crescent":
        return torch.maximum(disc(0, 0, 0.95), -disc(0.5, 0.15, 0.75))
    if name == "bar":
        return box(1.0, 0.3)
    if name == "heart":                        # two discs above a turned square
        px, py = x.abs() / 1.6, y / 1.6 + 0.5
        upper = torch.hypot(px - 0.25, py - 0.75) - 0.3536
        m = 0.5 * (px + py).clamp(min=0)
        lower = torch.minimum(torch.hypot(px, py - 1), torch.hypot(px - m, py - m))
        return 1.6 * torch.where(px + py > 1, upper, lower * torch.sign(px - py))
    return disc(0, 0, 0.68).abs() - 0.24       # ring

def hsv(h, s, v):
    """Colours (N, 3, 1, 1) in [0, 1] from hue, saturation, value (N, 1, 1)."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + h[:, None] * 6) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))

def draw_shapes(per_cell, seed, size=32):
    """The embedded dataset: uint8 images (N, 3, size, size) and labels (N, 2), per_cell images of
    each of 10 shapes x 5 styles from a seeded generator. Position, size, rotation and colours are
    random; an edge is one pixel of coverage computed from the distance: antialiased."""
    g, y, images = torch.Generator().manual_seed(seed), all_labels([SHAPES, STYLES]), []
    axis, cols = (torch.arange(size) + 0.5) / size * 2 - 1, torch.arange(size)[None, None, :]

    def uniform(lo, hi):
        return torch.rand(per_cell, 1, 1, generator=g) * (hi - lo) + lo

    for c, s in y.tolist():
        cx, cy, r = uniform(-0.15, 0.15), uniform(-0.15, 0.15), uniform(0.6, 0.78)
        turn, hue, shift = uniform(-0.25, 0.25), uniform(0, 1), uniform(0.25, 0.75)
        px, py = axis[None, None, :] - cx, cy - axis[None, :, None]
        cos, sin = turn.cos(), turn.sin()
        d = shape_sdf(SHAPES[c], (cos * px + sin * py) / r, (cos * py - sin * px) / r)
        d = (d * r * size / 2)[:, None]                        # in pixels, (N, 1, H, W)
        inside = (0.5 - d).clamp(0, 1)
        bright, phase = hsv(hue, uniform(0.75, 1), uniform(0.85, 1)), uniform(0, 1)
        dull = hsv((hue + shift) % 1, uniform(0.3, 0.5), uniform(0.3, 0.5))
        if STYLES[s] == "flat":
            image = inside * bright + (1 - inside) * dull
        elif STYLES[s] == "stripes":           # diagonal, period 6 pixels
            wave = (((cols + cols.mT) / 6 + phase) % 1 - 0.5).abs()[:, None]
            lit = ((wave - 0.25) * 6 + 0.5).clamp(0, 1)
            image = inside * (lit * bright + (1 - lit) * 0.15) + (1 - inside) * dull
        elif STYLES[s] == "dots":              # discs on a grid of 4 pixels, a pale tint, white
            u = (cols + phase * 4) % 4 - 2
            lit = (1.6 - torch.hypot(u, u.mT)).clamp(0, 1)[:, None] * inside
            image = lit * bright + (1 - lit) * (1 - 0.3 * inside * (1 - bright))
        elif STYLES[s] == "sketch":            # an ink line on paper
            image = 0.97 - 0.87 * (1.3 - d.abs()).clamp(0, 1).expand(-1, 3, -1, -1)
        else:                                  # neon: a bright line and its glow on black
            line, glow = (1.5 - d.abs()).clamp(0, 1), 0.6 * torch.exp(-d.abs() / 2.5)
            image = bright * torch.maximum(line, glow) + 0.35 * line
        images.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), y.repeat_interleave(per_cell, 0)

# ---- datasets ------------------------------------------------------------------------------------

DATASETS = ("shapes", "fashion", "cifar10", "folder")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")         # its package dataset-fashion-mnist
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGE_KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # for a bad file

def load_data(dataset, split, data_dir="data", device="cpu", size=64):
    """Images uint8 (N, C, H, W) and labels (N, F) on the device, and the names: a list per factor.

    split: "train" or "test". size: of a folder's images; the others are 32 x 32. Sources: drawn
    here (shapes), Xiao et al. 1708.07747 (fashion), Krizhevsky 2009 (cifar10).
    """
    data_dir = Path(data_dir).expanduser()
    if dataset == "folder":
        x, y, names = load_folder(data_dir, split, size)
    elif dataset == "shapes":
        x, y = draw_shapes(400, seed=0) if split == "train" else draw_shapes(100, seed=1)
        names = [SHAPES, STYLES]
    else:
        source = {"fashion": tvd.FashionMNIST, "cifar10": tvd.CIFAR10}[dataset]
        with explain(f"{dataset} is not in '{data_dir}' and cannot be downloaded; put its files "
                     "there, or name their folder with --data-dir"):
            if dataset == "fashion":
                unpack_fashion(data_dir)
            data = source(data_dir, train=split == "train", download=True)
        y, names = torch.as_tensor(data.targets)[:, None], [data.classes]
        if dataset == "fashion":
            x = F.pad(data.data, (2, 2, 2, 2))[:, None]
        else:
            x, names = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), [CIFAR10]
    return x.to(device), y.to(device), names

def unpack_fashion(data_dir):
    """Put Fashion-MNIST's files, in data_dir or Debian's package, to where torchvision looks."""
    raw = data_dir / "FashionMNIST" / "raw"
    for packed, _ in tvd.FashionMNIST.resources:
        target = raw / packed.removesuffix(".gz")
        for source in (raw / packed, data_dir / packed, data_dir / target.name, DEBIAN / packed):
            if source.is_file() and not target.is_file():
                content = (gzip.open if source.suffix == ".gz" else open)(source, "rb").read()
                write_file(target, lambda tmp: tmp.write_bytes(content))

def find_images(folder):
    """The sorted paths of all image files under a folder, without hidden files and folders."""
    found = []
    for path in Path(folder).rglob("*"):
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_KINDS and path.is_file() and not hidden:
            found.append(path)
    return sorted(found)

def read_image(path, size, mode="RGB"):
    """A picture of any mode as uint8 (C, size, size): turned as its EXIF says, on white where it
    is transparent, cut to the central square, resized with antialiasing. Raises one of BROKEN."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB").convert(mode), (size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture).reshape(size, size, -1)).permute(2, 0, 1)

def folder_key(paths):
    """A fingerprint of a folder's images: it changes when one of them does."""
    stats = [(path.parts[-3:], path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()

def load_folder(data_dir, split, size):
    """Images (N, 3, size, size), labels and names of STYLE/OBJECT/*.jpg (UnlearnCanvas) or
    CLASS/*.jpg. A tenth of each label's images, at least one of two, is the test split; runs/cache
    keeps all."""
    paths = find_images(data_dir)
    columns = list(zip(*(path.relative_to(data_dir).parts[-2::-1] for path in paths)))
    require(len({len(path.parts) for path in paths}) == 1 and len(columns) in (1, 2),
            f"'{data_dir}' must hold images as STYLE/OBJECT/*.jpg or CLASS/*.jpg, at one depth; it "
            f"holds {len(paths)} images; name the folder with --data-dir")
    names = [sorted(set(column)) for column in columns]        # the class comes first
    cache, images, good = Path("runs", "cache", f"{folder_key(paths)}-{size}.pt"), [], []
    if cache.is_file():
        data = read_file(cache, "images")
    else:
        for n in progress(paths, "decoding", len(paths)):
            try:
                images.append(read_image(paths[n - 1], size))
                good.append(n - 1)
            except BROKEN:
                print(f"skipped {paths[n - 1]}: not a readable image")
        require(len(good) >= 0.8 * len(paths), f"over a fifth of '{data_dir}' is broken")
        found = "; ".join(f"{factor} {', '.join(n)}" for factor, n in zip(FACTORS, names))
        print(f"{data_dir}: {len(good)} of {len(paths)} images; {found}")
        data = {"format": 1, "kind": "images", "images": torch.stack(images), "good": good}
        write_file(cache, lambda tmp: torch.save(data, tmp))
    labels = [[names[f].index(column[i]) for f, column in enumerate(columns)] for i in data["good"]]
    y, held_out = torch.tensor(labels), torch.zeros(len(labels), dtype=torch.bool)
    for cell in torch.unique(y, dim=0):
        index = (y == cell).all(1).nonzero().flatten().tolist()
        index.sort(key=lambda i: hashlib.sha256(paths[data["good"][i]].name.encode()).digest())
        held_out[index[:max(len(index) // 10, len(index) > 1)]] = True
    keep = held_out if split == "test" else ~held_out
    return data["images"][keep], y[keep], names

# ---- the public checkpoints ----------------------------------------------------------------------

PUBLIC_KEYS = {r"^temb\.dense\.0": "time_mlp.0", r"^temb\.dense\.1": "time_mlp.2",
               r"^cemb\.dense\.0": "label_mlps.0.0", r"^cemb\.dense\.1": "label_mlps.0.2",
               r"\.block\.": ".blocks.", r"\.attn\.": ".attns.", r"^mid\.block_": "mid_block",
               r"^mid\.attn_1": "mid_attn", r"\.(down|up)sample\.conv\.": ".resample.",
               r"temb_cemb_proj": "emb", r"nin_shortcut": "shortcut", r"proj_out": "proj"}

def import_public(path):
    """The CIFAR-10 UNet of a checkpoint of the public Selective Amnesia / SalUn / SFRon DDPM code.

    Their file is a list [model, optimiser, step, EMA] of state dicts; their null embedding becomes
    the last row of ours. The EMA weights are taken, which sample best (the public unlearning
    starts from the raw ones). Every key must be used once.
    """
    with explain(f"{path} is not a CIFAR-10 checkpoint of the public SalUn/SFRon/SA code, a list "
                 "of model, optimiser, step and EMA with the paper's layers"):
        states, theirs = torch.load(path, map_location="cpu", weights_only=True), {}
        for state in (states[0], states[-1]):
            theirs.update({k.removeprefix("module."): v for k, v in state.items()})
        classes, null = theirs.pop("classes_emb.weight"), theirs.pop("null_classes_emb")
        weights = {"label_embs.0.weight": torch.cat([classes, null.reshape(1, -1)])}
        for key, value in theirs.items():
            for pattern, ours in PUBLIC_KEYS.items():
                key = re.sub(pattern, ours, key)
            weights[key] = value
        model = UNet(make_config("paper", 32, 3, (len(CIFAR10),)))
        model.load_state_dict(weights)
    return model

# ---- stage 1 -------------------------------------------------------------------------------------

def data_flags(parser, out):
    """The flags of every stage that work alike."""
    flag = parser.add_argument_group("data and machine").add_argument
    flag("--data-dir", default="data", help="where data lies or is downloaded to (default data)")
    flag("--seed", type=number(int, 0, 2 ** 31), default=0, help="same seed, same result (0)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    flag("--out", metavar="DIR", help=f"run folder; default runs/<dataset>/{out}")

def dataset_flag(flag):
    flag("--dataset", choices=DATASETS, help="what the model draws (default shapes); folder: "
         "CLASS/*.jpg or STYLE/CLASS/*.jpg in --data-dir")

def step_flags(parser):
    """The flags of the stages that train the network."""
    flag = parser.add_argument_group("training").add_argument
    flag("--steps", type=number(int, 0), help="optimiser steps; default by preset")
    flag("--batch-size", type=number(int, 1, 65536), help="images a step and term; likewise")
    flag("--compile", action="store_true", help="torch.compile the network: for long GPU runs")

def override(settings, args, *names):
    """settings, with what the user gave on the command line in its place."""
    return {**settings, **{k: getattr(args, k) for k in names if getattr(args, k) is not None}}

def data_words(args):
    """The flag with which the next stage finds the same data."""
    return f" --data-dir {shlex.quote(args.data_dir)}" if args.data_dir != "data" else ""

def picture_labels(names, pairs=(), most=12):
    """Labels and layout of a picture: a column per class; a row per style, or four rows. Of a
    factor with more than `most` values evenly spaced ones are shown, and those in pairs."""
    y = all_labels(names)
    for factor, values in enumerate(names):
        spaced = [(factor, v) for v in range(0, len(values), -(-len(values) // most))]
        y = y[matches(y, spaced + [pair for pair in pairs if pair[0] == factor])]
    classes = y[:, 0].unique().tolist()
    y = y.view(len(classes), -1, len(names)).transpose(0, 1).reshape(-1, len(names))
    if len(names) == 1:
        y = y.repeat(4, 1)
    rows = [names[1][s] for s in y[::len(classes), 1].tolist()] if len(names) > 1 else [""] * 4
    return y, dict(columns=len(classes), rows=rows, heads=[names[0][c] for c in classes])

def finish(folder, model, args, preset, names, excluded, made_by):
    """Write the model, its picture and result.json, and say what comes next."""
    labels, layout = picture_labels(names)
    save_grid(sample(model, labels, label="samples"), folder / "samples.png", **layout)
    made_by = {"stage": "pretrain", "method": "retrain" if excluded else "original", **made_by}
    save_checkpoint(folder / "model.pt", model, half=preset == "small", info=dict(
        dataset=args.dataset, names=names, preset=preset, forgotten=excluded, made_by=made_by))
    write_json(folder / "result.json", {**made_by, "args": vars(args), "protocol": {
        "sampler": "ddim", "sampler_steps": 50, "guidance": 2.0, "sampling_seed": 0}})
    script = "attack.py" if excluded else f"unlearn.py --method dimum --cls {names[0][0]!r} --ckpt"
    print(f"wrote {folder}/model.pt and samples.png\n"
          f"next: python {script} {shlex.quote(str(folder))}{data_words(args)}")

def train(args, preset, settings, device):
    """Pretrain from the first step, or with --resume from the saved state; save everything."""
    images, y, names = load_data(args.dataset, "train", args.data_dir, device, args.image_size)
    excluded = find_pairs(args, names, "exclude-")
    keep = ~matches(y, excluded)
    images, y = images[keep], y[keep]
    require(len(y), "nothing is left to train on; exclude fewer values")
    settings.update(dataset=args.dataset, preset=preset, seed=args.seed, excluded=excluded)
    what = f"pretrain-without-{pairs_slug(excluded)}" if excluded else "pretrain"
    base = Path(args.out or Path("runs", args.dataset, what)).expanduser()
    folder = base if args.resume else run_folder(base)

    torch.manual_seed(args.seed)
    model = UNet(make_config(preset, images.shape[2], images.shape[1], [len(n) for n in names]))
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"], fused=True)
    parts, state = dict(model=model, ema=ema, optimizer=optimizer), folder / "train.pt"
    steps, start, before = settings["steps"], 0, 0.0
    losses = torch.zeros(steps, device=device)
    if args.resume and state.is_file():
        start, before = load_state(state, settings, losses, parts)
    print(f"{args.dataset}: {len(images)} images {tuple(images.shape[1:])}, network {preset} with "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, into {folder}")

    labels, layout = picture_labels(names)
    flip = args.dataset == "cifar10"
    training = pretrain(model, ema, optimizer, images, y, settings, flip, start)
    began = saved = time.time()
    for step in progress(training, "pretrain", steps, start, losses):
        # at a step whose loss `progress` has checked
        if step % 50 == 0 and step < steps and time.time() - saved > SAVE_SECONDS:
            save_state(state, step, settings, losses, before + time.time() - began, parts)
            save_grid(sample(ema, labels, 20), folder / "samples.png", **layout)
            saved = time.time()
    seconds = round(before + time.time() - began, 1)
    write_losses(folder, losses.cpu(), f"{args.dataset} pretraining")
    finish(folder, ema, args, preset, names, excluded, {**settings, "seconds": seconds})
    save_state(state, steps, settings, losses, seconds, parts)     # last: now it is "finished"

def main():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    dataset_flag(flag)
    data_flags(parser, "pretrain")
    step_flags(parser)
    flag("--resume", action="store_true", help="go on with the run in its folder")
    flag("--image-size", type=int, choices=(32, 64, 128), default=64, help="of a folder (64)")
    flag("--preset", choices=PRESETS, help="the network; default small, paper for cifar10")
    flag("--exclude-cls", nargs="+", metavar="K", help="classes never to be seen")
    flag("--exclude-style", nargs="+", metavar="K", help="styles never to be seen")
    flag("--import", dest="public", metavar="FILE", help="convert a public checkpoint")
    args = parser.parse_args()
    device, args.dataset = pick_device(args.device), args.dataset or "shapes"
    preset = args.preset or ("paper" if args.dataset == "cifar10" else "small")
    settings = override(PRETRAIN[preset], args, "steps", "batch_size")
    if args.dataset == "fashion" and preset == "small" and args.steps is None:
        settings["steps"] = FASHION_STEPS
    if not args.public:
        return train(args, preset, settings, device)
    require(args.dataset == "cifar10", "--import converts CIFAR-10 networks; add --dataset cifar10")
    model = import_public(args.public).to(device, memory_format=torch.channels_last)
    folder = run_folder(args.out or Path("runs", "cifar10", "import"))
    finish(folder, model, args, "paper", [CIFAR10], [], {"steps": 0, "from_public": args.public})

if __name__ == "__main__":
    run(main)
