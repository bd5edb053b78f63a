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
import json
import math
import os
import re
import shlex
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets as tvd

from model import (FACTORS, PRESETS, T, UNet, all_labels, diffusion_loss, explain, fail, find_pairs,
                   load_checkpoint, load_file, make_config, make_parser, matches, number,
                   pairs_slug, pick_device, progress, require, run, run_folder, sample,
                   save_checkpoint, save_file, save_grid, save_plot, write_file, write_text)

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

def pretrain(model, ema, optimizer, images, y, args, flip=False, start=0):
    """Train `model` on images uint8 (N, C, H, W) with labels y (N, F); yield each step's loss.

    Source: DDPM: Adam, clipping at norm 1, and a moving average of the weights, `ema`, whose decay
    rises to args.ema. The rate warms up, then is constant or falls to 0 along a cosine.
    """
    params, averaged = list(model.parameters()), list(ema.parameters())
    model.train()
    for step in range(start, args.steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.cosine else 1.0
        optimizer.param_groups[0]["lr"] = args.lr * fall * min(1, (step + 1) / max(args.warmup, 1))
        loss = diffusion_loss(model, *get_batch(images, y, args.batch_size, flip)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, params, 1 - decay)
        yield loss.detach()

def save_state(path, settings, losses, seconds, parts):
    """The whole training state after len(losses) steps; parts: {name: what has a state_dict}."""
    save_file(path, "training", dict(
        settings=settings, losses=losses, seconds=seconds, rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state_all(),               # [] without a GPU
        parts={name: part.state_dict() for name, part in parts.items()}))

def load_state(path, settings, parts):
    """Put a saved state back into parts and random generators. Returns (losses, seconds)."""
    state = load_file(path, "training")
    other = [f"{k} {v}" for k, v in state["settings"].items() if k != "steps" and settings[k] != v]
    require(not other, f"{path} was begun with {', '.join(other)}; give the same flags and data")
    done = len(state["losses"])
    finished = done == settings["steps"] and (path.parent / "model.pt").is_file()
    require(done <= settings["steps"] and not finished,
            f"{path.parent} is finished; to train on, give more --steps than {done}")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["losses"], state["seconds"]

def write_losses(folder, losses, label):
    """log.csv, the mean of every (at most about 200) group of losses (steps,), and loss.png."""
    every = max(1, len(losses) // 200)
    ys = [part.mean().item() for part in losses.cpu().split(every) if len(part)]
    xs = [min((i + 1) * every, len(losses)) for i in range(len(ys))]
    lines = ["step,loss", *(f"{x},{y}" for x, y in zip(xs, ys))]
    write_text(folder / "log.csv", "\n".join(lines) + "\n")
    save_plot(folder / "loss.png", {"loss": (xs, ys)}, f"{label}: training loss", "step")

# ---- the embedded dataset ------------------------------------------------------------------------

SHAPES = "circle square triangle cross diamond star crescent bar heart ring".split()
STYLES = "flat stripes dots sketch neon".split()

def shape_sdf(name, x, y):
    """Signed distance (negative inside) of a shape of radius about 1 at points x, y (up)."""
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
    each of 10 shapes x 5 styles, of random position, size, rotation and colours. An edge is one
    pixel of coverage computed from the distance: antialiased."""
    g, y, images = torch.Generator().manual_seed(seed), all_labels([SHAPES, STYLES]), []
    axis, cols = (torch.arange(size) + 0.5) / size * 2 - 1, torch.arange(size)[None, None, :]

    def uniform(lo, hi):
        return torch.rand(per_cell, 1, 1, generator=g) * (hi - lo) + lo

    for shape, style in product(SHAPES, STYLES):
        cx, cy, r = uniform(-0.15, 0.15), uniform(-0.15, 0.15), uniform(0.6, 0.78)
        turn, hue, shift = uniform(-0.25, 0.25), uniform(0, 1), uniform(0.25, 0.75)
        px, py = axis[None, None, :] - cx, cy - axis[None, :, None]
        cos, sin = turn.cos(), turn.sin()
        d = shape_sdf(shape, (cos * px + sin * py) / r, (cos * py - sin * px) / r)
        d = (d * r * size / 2)[:, None]                        # in pixels, (N, 1, H, W)
        inside = (0.5 - d).clamp(0, 1)
        bright, phase = hsv(hue, uniform(0.75, 1), uniform(0.85, 1)), uniform(0, 1)
        dull = hsv((hue + shift) % 1, uniform(0.3, 0.5), uniform(0.3, 0.5))
        if style == "flat":
            image = inside * bright + (1 - inside) * dull
        elif style == "stripes":               # diagonal, period 6 pixels
            wave = (((cols + cols.mT) / 6 + phase) % 1 - 0.5).abs()[:, None]
            lit = ((wave - 0.25) * 6 + 0.5).clamp(0, 1)
            image = inside * (lit * bright + (1 - lit) * 0.15) + (1 - inside) * dull
        elif style == "dots":                  # discs on a grid of 4 pixels, a pale tint, white
            u = (cols + phase * 4) % 4 - 2
            lit = (1.6 - torch.hypot(u, u.mT)).clamp(0, 1)[:, None] * inside
            image = lit * bright + (1 - lit) * (1 - 0.3 * inside * (1 - bright))
        elif style == "sketch":                # an ink line on paper
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
IMAGE_KINDS = set(".png .jpg .jpeg .jfif .bmp .webp .tif .tiff .gif .ppm .pgm".split())

def load_data(dataset, split, data_dir="data", device="cpu", size=64):
    """Images uint8 (N, C, H, W) and labels (N, F) on the device, and the names: a list per factor.

    split: "train" or "test". size: of a folder's images; the others are 32 x 32. Sources: drawn
    here (shapes), Xiao et al. 1708.07747 (fashion), Krizhevsky 2009 (cifar10).
    """
    data_dir, train = Path(data_dir), split == "train"
    if dataset == "folder":
        x, y, names = load_folder(data_dir, split, size)
    elif dataset == "shapes":
        x, y = draw_shapes(400, seed=0) if train else draw_shapes(100, seed=1)
        names = [SHAPES, STYLES]
    else:
        with explain(f"{dataset} is not in '{data_dir}' and cannot be downloaded; put its files "
                     "there, or name their folder with --data-dir"):
            if dataset == "fashion":
                unpack_fashion(data_dir)
                data = tvd.FashionMNIST(data_dir, train, download=True)
                x, names = F.pad(data.data, (2, 2, 2, 2))[:, None], [data.classes]
            else:
                data = tvd.CIFAR10(data_dir, train, download=True)
                x, names = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), [CIFAR10]
        y = torch.as_tensor(data.targets)[:, None]
        require(len(x) == len(y) and 0 <= y.min() and y.max() < len(names[0]),
                f"'{data_dir}' holds labels that do not fit the images of {dataset}; get it again")
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

def find_images(folder, quiet=False):
    """The sorted paths of all image files below a folder, links followed, hidden ones left out."""
    found, runs = [], Path("runs").resolve()

    def unreadable(error):
        fail(f"the folder {error.filename} cannot be read ({error.strerror}); name another")

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(place).resolve()
        skip = here, *here.parents, runs               # links that loop, and what we wrote
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))
                      and Path(place, name).resolve() not in skip]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    images = sorted(p for p in found if p.suffix.lower() in IMAGE_KINDS and p.is_file())
    if len(images) < len(found) and not quiet:
        kinds = sorted({path.suffix or path.name for path in set(found).difference(images)})[:9]
        print(f"{folder}: left out {len(found) - len(images)} files that are no images "
              f"({', '.join(kinds)})")
    return images

def read_image(path, size, channels=3):
    """A picture of any mode as uint8 (channels, size, size): turned as its EXIF says, on white
    where it is transparent, cut to the central square, resized with antialiasing. size None: as it
    lies in the file. Raises what Pillow raises."""
    with Image.open(path) as picture:
        if picture.mode == "F":
            raise ValueError("of floats, whose range is unknown")
        if picture.mode.startswith("I"):               # 16 bits, which Pillow would cut at 255
            array = np.asarray(picture).clip(0, 65535)
            array = array // 256 if picture.mode != "I" or array.max() > 255 else array
            picture = Image.fromarray(array.astype(np.uint8))
        if size:
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.LANCZOS)
        array = np.array(picture.convert("RGB").convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1)

def folder_key(paths):
    """A fingerprint of a folder's images: it changes when one of them does."""
    stats = [(path.parts[-3:], path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()

def load_folder(data_dir, split, size):
    """Images (N, 3, size, size), labels and names of STYLE/OBJECT/*.jpg (UnlearnCanvas) or
    CLASS/*.jpg. A tenth of each label's images, at least one of two, is the test split; runs/cache
    keeps all."""
    paths = find_images(data_dir, quiet=split == "test")
    columns = list(zip(*(path.relative_to(data_dir).parts[-2::-1] for path in paths)))
    require(len({len(path.parts) for path in paths}) == 1 and len(columns) in (1, 2),
            f"'{data_dir}' must hold images as STYLE/OBJECT/*.jpg or CLASS/*.jpg, at one depth; it "
            f"holds {len(paths)} images; name the folder with --data-dir")
    factors = [np.unique(column, return_inverse=True) for column in columns]       # class first
    names, y = [values.tolist() for values, _ in factors], np.stack([i for _, i in factors], 1)
    splits = {n for n in names[-1] if re.fullmatch("(train|test|val|valid|validat|eval|evaluat|dev)"
                                                   "(ing|ion)?", n.lower())}
    require(not splits, f"'{data_dir}' is divided into {', '.join(sorted(splits))}; name one of "
            "these folders with --data-dir, or rename it if it is a class or a style")
    cache, images, good = Path("runs", "cache", f"{folder_key(paths)}-{size}.pt"), [], []
    if cache.is_file():
        data = load_file(cache, "images")
    else:
        for n in progress(torch.arange(len(paths)), "decoding", len(paths)):
            try:
                images.append(read_image(paths[n], size))
                good.append(n)
            except Exception as e:                     # whatever Pillow says of a broken file
                print(f"skipped {paths[n]}: not a readable image ({type(e).__name__})")
        require(len(good) >= 0.8 * len(paths), f"over a fifth of '{data_dir}' is broken")
        data = {"images": torch.stack(images), "good": torch.stack(good)}
        if len(good) == len(paths):                    # else they are looked at again
            save_file(cache, "images", data)
        for factor, values, labels in zip(FACTORS, names, y[good].T):
            counts = zip(values, np.bincount(labels, minlength=len(values)))
            print(f"{factor}: " + ", ".join(f"{name} {n}" for name, n in counts))
        print(f"{data_dir}: {len(good)} of {len(paths)} images")
    y, files = torch.from_numpy(y)[data["good"]], [paths[i].name for i in data["good"]]
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for cell in torch.unique(y, dim=0):
        index = (y == cell).all(1).nonzero().flatten().tolist()
        index.sort(key=lambda i: hashlib.sha256(os.fsencode(files[i])).digest())
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
        raw, *_, ema = torch.load(path, map_location="cpu", weights_only=True)
        theirs = {k.removeprefix("module."): v for k, v in [*raw.items(), *ema.items()]}
        null = theirs.pop("null_classes_emb").reshape(1, -1)
        weights = {"label_embs.0.weight": torch.cat([theirs.pop("classes_emb.weight"), null])}
        for key, value in theirs.items():
            for pattern, ours in PUBLIC_KEYS.items():
                key = re.sub(pattern, ours, key)
            weights[key] = value
        model = UNet(make_config("paper", 32, 3, (len(CIFAR10),)))
        model.load_state_dict(weights)
    return model

# ---- stage 1 and what all stages share -----------------------------------------------------------

def stage_parser(doc, out, samples=None, sampler_steps=50):
    """The parser of a script, with the flags that work alike in every stage, and their defaults."""
    parser = make_parser(doc)
    flag = parser.add_argument_group("data, training, machine").add_argument
    flag("--dataset", choices=DATASETS, help="default shapes, or the model's own")
    flag("--data-dir", metavar="DIR", type=os.path.expanduser, default="data",
         help="where data lie, or are put (data)")
    flag("--steps", metavar="N", type=number(int, 0, 10 ** 8), help="of training; default: to fit")
    flag("--batch-size", metavar="N", type=number(int, 1, 65536), help="images a step and term")
    flag("--samples", metavar="N", type=number(int, 1, 10 ** 6), default=samples,
         help=f"images to draw (default {samples or 'one of each condition'})")
    flag("--sampler-steps", metavar="N", type=number(int, 1, T), default=sampler_steps,
         help=f"DDIM steps of each (default {sampler_steps})")
    flag("--seed", metavar="N", type=number(int, 0, 2 ** 31), default=0, help="of all chance (0)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    flag("--out", metavar="DIR", type=os.path.expanduser,
         help=f"run folder; default runs/<dataset>/{out}")
    return parser

def fill(args, **usual):
    """Put usual values where the user gave none; returns all of them by name."""
    for key, value in usual.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return {key: getattr(args, key) for key in usual}

def load_run(path, args):
    """(model, info, training images, labels) of a checkpoint and its data, as args say."""
    model, info = load_checkpoint(path, pick_device(args.device))
    require(args.dataset in (None, info["dataset"]), f"{path} draws {info['dataset']}: leave "
            "--dataset out, or name another model")
    args.dataset = info["dataset"]
    size, device = model.cfg.image_size, model.null.device
    images, y, names = load_data(args.dataset, "train", args.data_dir, device, size)
    require(names == info["names"], f"{path} knows other names than '{args.data_dir}': give the "
            "folder that it was trained on with --data-dir")
    return model, info, images, y

def picture_labels(names, pairs=(), most=12):
    """Labels and layout of a picture: a column per class; a row per style, or four rows. Of a
    factor with more than `most` values evenly spaced ones are shown, and those in pairs."""
    y = all_labels(names)
    for factor, values in enumerate(names):
        spaced = [(factor, v) for v in range(0, len(values), math.ceil(len(values) / most))]
        y = y[matches(y, spaced + [pair for pair in pairs if pair[0] == factor])]
    heads = [names[0][c] for c in y[:, 0].unique()]
    y = y.view(len(heads), -1, len(names)).transpose(0, 1).reshape(-1, len(names))
    if len(names) == 1:
        return y.repeat(4, 1), dict(columns=len(heads), rows=[""] * 4, heads=heads)
    rows = [names[1][s] for s in y[::len(heads), 1]]
    return y, dict(columns=len(heads), rows=rows, heads=heads)

def finish(folder, model, info, args, command, **result):
    """Save the model and result.json of a stage; say what was written and what to run next."""
    save_checkpoint(folder / "model.pt", model, info)
    result = {**info["made_by"], "dataset": info["dataset"], **result, "args": vars(args)}
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if args.data_dir != "data":
        command = [*command, "--data-dir", Path(args.data_dir).as_posix()]
    print(f"wrote {', '.join(written)} into {folder}\nnext: python {shlex.join(command)}")

def train(args, images, y, names, excluded, folder):
    """Pretrain from the first step, or with --resume from the saved state. Returns (EMA model,
    settings and seconds)."""
    settings = {k: vars(args)[k] for k in ("dataset", "preset", "seed", *PRETRAIN[args.preset])}
    settings.update(excluded=excluded, names=names, image_size=images.shape[2])
    state = folder / "train.pt"
    torch.manual_seed(args.seed)
    cfg = make_config(args.preset, images.shape[2], images.shape[1], [len(n) for n in names])
    model = UNet(cfg).to(images.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    parts, start, seconds = dict(model=model, ema=ema, optimizer=optimizer), 0, 0.0
    losses = torch.zeros(args.steps, device=images.device)
    if args.resume and state.is_file():
        done, seconds = load_state(state, settings, parts)
        start, losses[:len(done)] = len(done), done
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.dataset}: {len(images)} images {tuple(images.shape[1:])}, network {args.preset}, "
          f"{millions:.2f} M parameters, from step {start}, into {folder}")
    labels, layout = picture_labels(names)
    training = pretrain(model, ema, optimizer, images, y, args, args.dataset == "cifar10", start)
    saved, began = time.time(), time.time() - seconds
    for step, loss in enumerate(progress(training, "pretrain", args.steps, start), start + 1):
        losses[step - 1] = loss
        if step == args.steps or step % 50 == 0 and time.time() - saved > SAVE_SECONDS:
            require(loss.isfinite(), "the training diverged; give another --batch-size")
            seconds = round(time.time() - began, 1)
            save_state(state, settings, losses[:step].cpu(), seconds, parts)
            drawn = sample(ema, labels[:args.samples], args.sampler_steps, label="samples")
            save_grid(drawn, folder / "samples.png", **layout)
            saved = time.time()
    write_losses(folder, losses, f"{args.dataset} pretraining")
    return ema, {**settings, "seconds": seconds}

def main():
    parser = stage_parser(__doc__, "pretrain")
    flag = parser.add_argument
    flag("--resume", action="store_true", help="go on with the run in its folder")
    flag("--image-size", type=int, choices=(32, 64, 128), default=64, help="of a folder (64)")
    flag("--preset", choices=PRESETS, help="the network; default small, paper for cifar10")
    flag("--exclude-cls", nargs="+", metavar="K", help="classes never to be seen")
    flag("--exclude-style", nargs="+", metavar="K", help="styles never to be seen")
    flag("--import", dest="public", metavar="FILE", type=os.path.expanduser,
         help="convert a public CIFAR-10 checkpoint")
    flag("--compile", action="store_true", help="torch.compile the network: for long GPU runs")
    args = parser.parse_args()
    device = pick_device(args.device)
    fill(args, dataset="cifar10" if args.public else "shapes")
    fill(args, preset="paper" if args.dataset == "cifar10" else "small")
    if args.dataset == "fashion" and args.preset == "small":
        fill(args, steps=FASHION_STEPS)
    fill(args, **PRETRAIN[args.preset])
    if args.public:
        model, names, excluded, made_by = import_public(args.public).to(device), [CIFAR10], [], {}
        folder = run_folder(args.out or "runs/cifar10/import")
    else:
        images, y, names = load_data(args.dataset, "train", args.data_dir, device, args.image_size)
        excluded = find_pairs(args, names, "exclude_")
        keep = ~matches(y, excluded)
        require(keep.any(), "nothing is left to train on; exclude fewer values")
        what = f"pretrain-without-{pairs_slug(excluded)}" if excluded else "pretrain"
        folder = Path(args.out or Path("runs", args.dataset, what))
        if not args.resume or not (folder / "train.pt").is_file():
            require(not args.resume or not any(folder.glob("[!.]*")), f"{folder} has no train.pt "
                    "to go on from; leave --resume out, or name the folder with --out")
            folder = run_folder(folder)
        model, made_by = train(args, images[keep], y[keep], names, excluded, folder)
    command = ["attack.py", folder.as_posix()]
    if not excluded:
        cls = "0" if names[0][0].startswith("-") else names[0][0]          # no flag
        command = ["unlearn.py", "--method", "dimum", "--cls", cls, "--ckpt", folder.as_posix()]
    made_by = {"stage": "pretrain", "method": "retrain" if excluded else "original", **made_by}
    info = dict(dataset=args.dataset, names=names, preset=args.preset, forgotten=excluded)
    finish(folder, model, {**info, "made_by": made_by}, args, command)

if __name__ == "__main__":
    run(main)
