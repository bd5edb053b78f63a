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
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import struct
import sys
import time
import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets as tvd

from model import (FACTORS, PRESETS, T, UNet, all_labels, compile_network, diffusion_loss, explain,
                   find_pairs, load_checkpoint, load_file, make_config, make_parser, matches,
                   number, pairs_slug, pick_device, plain, progress, require, run, run_folder, sample,
                   save_checkpoint, save_file, save_grid, save_plot, say, value_flags, write_text)

PRETRAIN = {
    # A high rate with cosine decay makes the most of few steps.
    "small": dict(
        steps=16000, batch_size=32, lr=2e-3,
        ema=0.999, warmup=500, cosine=True),
    # The public SalUn, SFRon and SA configuration for CIFAR-10.
    "paper": dict(
        steps=800000, batch_size=128, lr=2e-4,
        ema=0.9999, warmup=0, cosine=False),
}
FASHION_STEPS = 10000           # of the small preset
SAVE_SECONDS = 120              # between two saved training states

# ---- training ------------------------------------------------------------------------------------

def get_batch(images, y, n, flip=False):
    """n random examples: images float (n, C, H, W) in [-1, 1], labels (n, F). flip: mirror half."""
    i = torch.randint(len(images), (n,), device=images.device)
    x = images[i].float() / 127.5 - 1
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last), y[i]

def learnable(model):
    """The parameters that learn: a list of those that require a gradient, by default all."""
    return [p for p in model.parameters() if p.requires_grad]

def descend(loss, model, optimizer, mask=None, mask_first=False):
    """One optimiser step down the loss, which is returned: the step of pretraining, of every method
    of unlearning and of every attack. The gradient is clipped to norm 1 and set to 0 where the mask
    (a bool tensor for each learnable parameter) is False: after the clipping, or before it
    (mask_first)."""
    params = learnable(model)
    optimizer.zero_grad()
    loss.backward()
    if not mask_first:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    if mask:
        for p, m in zip(params, mask):
            p.grad.mul_(m)
    if mask_first:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    return loss.detach()

def pretrain(model, ema, optimizer, images, y, args, flip=False, start=0):
    """Train `model` on images uint8 (N, C, H, W) with labels y (N, F); yield each step's loss.

    Source: DDPM: Adam, clipping at norm 1, and a moving average of the weights, `ema`, whose decay
    rises to args.ema. The rate warms up, then is constant or falls to 0 along a cosine.
    """
    params = list(model.parameters())
    averaged = list(ema.parameters())
    model.train()
    for step in range(start, args.steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.cosine else 1.0
        rise = min(1, (step + 1) / max(args.warmup, 1))
        optimizer.param_groups[0]["lr"] = args.lr * fall * rise
        x0, labels = get_batch(images, y, args.batch_size, flip)
        loss = descend(diffusion_loss(model, x0, labels).mean(), model, optimizer)
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, params, 1 - decay)
        yield loss

def save_state(path, settings, losses, seconds, parts):
    """The whole training state after len(losses) steps; parts: {name: what has a state_dict}."""
    save_file(path, "training", dict(
        settings=settings, losses=losses, seconds=seconds, rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state_all(),               # [] without a GPU
        parts={name: part.state_dict() for name, part in parts.items()}))

def load_state(path, settings, parts):
    """Put a saved state back into parts and random generators. Returns (losses, seconds)."""
    state = load_file(path, "training")
    saved = state["settings"]
    other = [f"{key} {value}" for key, value in saved.items()
             if key != "steps" and settings[key] != value]
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

def write_losses(folder, losses, title):
    """log.csv and loss.png: the means of up to 200 equal groups of the losses (steps,)."""
    if len(losses) == 0:
        return
    groups = losses.cpu().tensor_split(min(200, len(losses)))
    ys = [group.mean().item() for group in groups]
    xs = torch.tensor([len(group) for group in groups]).cumsum(0).tolist()
    write_text(folder / "log.csv", "step,loss\n" + "".join(f"{x},{y}\n" for x, y in zip(xs, ys)))
    save_plot(folder / "loss.png", {title: {"training loss": (xs, ys)}}, "step", "loss")

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
        px = x.abs() / 1.6
        py = y / 1.6 + 0.5
        upper = torch.hypot(px - 0.25, py - 0.75) - 0.3536
        m = 0.5 * (px + py).clamp(min=0)
        lower = torch.minimum(torch.hypot(px, py - 1), torch.hypot(px - m, py - m))
        return 1.6 * torch.where(px + py > 1, upper, lower * torch.sign(px - py))
    return disc(0, 0, 0.68).abs() - 0.24       # ring

def hsv(h, s, v):
    """Colours (N, 3, 1, 1) in [0, 1] from hue, saturation, value (N, 1, 1)."""
    channel = torch.tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (channel + h[:, None] * 6) % 6
    missing = torch.minimum(k, 4 - k).clamp(0, 1)
    return v[:, None] * (1 - s[:, None] * missing)

def draw_shapes(per_cell, seed, size=32):
    """The embedded dataset: uint8 images (N, 3, size, size) and labels (N, 2), per_cell images of
    each of 10 shapes x 5 styles, of random position, size, rotation and colours. An edge is one
    pixel of coverage computed from the distance: antialiased."""
    g = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    cols = torch.arange(size)[None, None, :]
    images = []

    def uniform(lo, hi):
        return torch.rand(per_cell, 1, 1, generator=g) * (hi - lo) + lo

    for shape, style in product(SHAPES, STYLES):
        cx = uniform(-0.15, 0.15)
        cy = uniform(-0.15, 0.15)
        r = uniform(0.6, 0.78)
        turn = uniform(-0.25, 0.25)
        hue = uniform(0, 1)
        shift = uniform(0.25, 0.75)                            # from the bright to the dull hue
        px = axis[None, None, :] - cx
        py = cy - axis[None, :, None]
        cos, sin = turn.cos(), turn.sin()
        across = (cos * px + sin * py) / r                     # in the shape's own coordinates
        up = (cos * py - sin * px) / r
        d = shape_sdf(shape, across, up) * r * size / 2        # in pixels
        d = d[:, None]                                         # (N, 1, H, W)
        inside = (0.5 - d).clamp(0, 1)
        bright = hsv(hue, uniform(0.75, 1), uniform(0.85, 1))
        phase = uniform(0, 1)
        dull = hsv((hue + shift) % 1, uniform(0.3, 0.5), uniform(0.3, 0.5))
        if style == "flat":
            image = inside * bright + (1 - inside) * dull
        elif style == "stripes":               # diagonal, period 6 pixels
            position = ((cols + cols.mT) / 6 + phase) % 1
            wave = (position - 0.5).abs()[:, None]
            lit = ((wave - 0.25) * 6 + 0.5).clamp(0, 1)
            striped = lit * bright + (1 - lit) * 0.15
            image = inside * striped + (1 - inside) * dull
        elif style == "dots":                  # discs on a grid of 4 pixels, a pale tint, white
            u = (cols + phase * 4) % 4 - 2
            disc = (1.6 - torch.hypot(u, u.mT)).clamp(0, 1)
            lit = disc[:, None] * inside
            paper = 1 - 0.3 * inside * (1 - bright)
            image = lit * bright + (1 - lit) * paper
        elif style == "sketch":                # an ink line on paper
            ink = (1.3 - d.abs()).clamp(0, 1)
            image = (0.97 - 0.87 * ink).expand(-1, 3, -1, -1)
        else:                                  # neon: a bright line and its glow on black
            line = (1.5 - d.abs()).clamp(0, 1)
            glow = 0.6 * torch.exp(-d.abs() / 2.5)
            image = bright * torch.maximum(line, glow) + 0.35 * line
        images.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    y = all_labels([SHAPES, STYLES]).repeat_interleave(per_cell, 0)
    return torch.cat(images), y

# ---- datasets ------------------------------------------------------------------------------------

DATASETS = ("shapes", "fashion", "cifar10", "folder")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGE_KINDS = set(".png .jpg .jpeg .jfif .bmp .webp .tif .tiff .gif .ppm .pgm".split())
NOT_DATA = (".", "__MACOSX", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN")
SPLIT_NAME = re.compile("(train|test|val|valid|validat|eval|evaluat|dev)(ing|ion)?")

def load_data(dataset, split, data_dir="data", device="cpu", size=64):
    """Images uint8 (N, C, H, W) and labels (N, F) on the device, and the names: a list per factor.

    split: "train" or "test". size: of a folder's images; the others are 32 x 32. Sources: drawn
    here (shapes), Xiao et al. 1708.07747 (fashion), Krizhevsky 2009 (cifar10).
    """
    if dataset == "shapes":
        x, y = draw_shapes(400, seed=0) if split == "train" else draw_shapes(100, seed=1)
        names = [SHAPES, STYLES]
    elif dataset == "folder":
        x, y, names = load_folder(Path(data_dir), split, size)
    else:
        x, y, names = load_torchvision(dataset, split, data_dir)
    return x.to(device), y.to(device), names

def load_torchvision(dataset, split, data_dir):
    """Fashion-MNIST, padded to 32 x 32, or CIFAR-10; downloaded unless they are in data_dir."""
    if dataset == "fashion":
        kind = tvd.FashionMNIST
        files = [name.removesuffix(".gz") for name, _ in kind.resources]       # unpacked
        place = Path(data_dir, "FashionMNIST", "raw")
    else:
        kind = tvd.CIFAR10
        files = [kind.filename]
        place = Path(data_dir)
    with explain(f"{dataset} is not in '{data_dir}' and cannot be downloaded; put "
                 f"{', '.join(files)} into {place.as_posix()}, or name the folder with --data-dir",
                 OSError, RuntimeError, EOFError, ValueError, AssertionError):
        data = kind(data_dir, train=split == "train", download=True)
    y = torch.as_tensor(data.targets)[:, None]
    if dataset == "fashion":
        x = F.pad(data.data, (2, 2, 2, 2))[:, None]
        names = [data.classes]
    else:
        x = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        names = [CIFAR10]
    require(len(x) == len(y) and 0 <= y.min() and y.max() < len(names[0]),
            f"'{data_dir}' holds labels that do not fit the images of {dataset}; get it again")
    return x, y, names

def find_images(folder, quiet=False):
    """The sorted paths of all image files below a folder. Links are followed, and a file counts
    once, whatever links lead to it. Left out, and said: files that are no images, folders that
    cannot be read. Left out: hidden files, and folders that systems make (NOT_DATA)."""
    left_out = []
    found = {}                                         # {the file itself: a path that leads to it}
    visited = {Path("runs").resolve()}                 # what we wrote is no data
    folders = [Path(folder)]
    links = []                                         # come last: a folder's own path counts
    while folders or links:
        place = folders.pop() if folders else links.pop()
        own = place.resolve()
        if own in visited:
            continue
        visited.add(own)
        try:
            entries = sorted(place.iterdir())
        except OSError:
            left_out.append(place)
            continue
        for path in entries:
            if path.name.startswith(NOT_DATA):
                continue
            if os.path.isdir(path):            # Path.is_dir fails where it may not look
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() not in IMAGE_KINDS or not os.path.isfile(path):
                left_out.append(path)
            elif path.is_symlink():
                found.setdefault(path.resolve(), path)
            else:
                found[path.resolve()] = path
    if left_out and not quiet:
        names = ", ".join(path.name for path in left_out[:9])
        say(f"{folder}: left out {len(left_out)} files or folders that hold no image that can be "
            f"read ({names})")
    return sorted(found.values(), key=composed)

def composed(path):
    """The parts of a path in one spelling: systems differ in how they write an accented letter."""
    return [unicodedata.normalize("NFC", part) for part in path.parts]

def file_hash(path):
    """The SHA-256 of a file, which is read once as long as it does not change; "" of one that may
    not be read."""
    path = Path(path).absolute()
    stat = path.stat()
    try:
        return hash_of(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return ""

@functools.cache
def hash_of(path, size, changed):
    """The hash for file_hash; size and changed are there to tell a changed file from a known one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

# what Pillow raises for a file that is broken, no picture, or far too large
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)

def read_image(path, size, channels=3):
    """A picture of any mode as uint8 (channels, size, size): turned as its EXIF says, on white
    where it is transparent, cut to the central square, resized with antialiasing. size None: as it
    lies in the file. Raises one of UNREADABLE."""
    with Image.open(path) as picture:
        if picture.mode == "F":
            raise ValueError("of floats, whose range is unknown")
        if picture.mode.startswith("I"):               # 16 bits, which Pillow would cut at 255
            array = np.asarray(picture).clip(0, 65535)
            if picture.mode != "I" or array.max() > 255:
                array = array // 256
            picture = Image.fromarray(array.astype(np.uint8))
        if size:
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.LANCZOS)
        picture = picture.convert("RGB")
        if channels == 1:
            picture = picture.convert("L")
        array = np.array(picture)
    return torch.from_numpy(array).view(*array.shape[:2], channels).permute(2, 0, 1)

def folder_key(paths, folder):
    """A fingerprint of a folder's pictures: their names below it and their contents."""
    files = []
    for path in paths:
        files.append((composed(path.relative_to(folder)), file_hash(path)))
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()

def folder_labels(paths, data_dir):
    """Labels (N, F) and names of pictures STYLE/CLASS/x.jpg or CLASS/x.jpg below data_dir."""
    parents = [composed(path.relative_to(data_dir))[:-1] for path in paths]
    depths = {len(folders) for folders in parents}
    require(depths in ({1}, {2}),
            f"'{data_dir}' must hold images as STYLE/OBJECT/*.jpg or CLASS/*.jpg, at one depth; it "
            f"holds {len(paths)} images; name the folder with --data-dir")
    columns = [[folders[-1] for folders in parents]]           # the class: next to the picture
    if depths == {2}:
        columns.append([folders[0] for folders in parents])    # the style: above the class
    names = [sorted(set(column)) for column in columns]
    splits = [name for name in names[-1] if SPLIT_NAME.fullmatch(name.lower())]
    require(not splits, f"'{data_dir}' is divided into {', '.join(splits)}; name one of "
            "these folders with --data-dir, or rename it if it is a class or a style")
    for values in names:
        spellings = Counter(plain(name) for name in values)
        alike = [name for name in values if spellings[plain(name)] > 1]
        require(not alike, f"'{data_dir}' has names that differ in their spelling alone: "
                f"{', '.join(map(repr, alike))}; rename them, or put their pictures together")
    numbers = [torch.tensor([values.index(name) for name in column])
               for values, column in zip(names, columns)]
    return torch.stack(numbers, 1), names

def decode(paths, size):
    """Images uint8 (N, 3, size, size) of the readable pictures, and their indices (N,)."""
    images = []
    readable = []
    for i, path in enumerate(progress(paths, "decoding", len(paths))):
        try:
            images.append(read_image(path, size))
            readable.append(i)
        except UNREADABLE as e:
            say(f"skipped {path}: not a readable image ({type(e).__name__})")
    require(len(readable) >= 0.8 * len(paths), f"over a fifth of {len(paths)} pictures are broken")
    return torch.stack(images), torch.tensor(readable)

def load_folder(data_dir, split, size):
    """Images (N, 3, size, size), labels and names of STYLE/OBJECT/*.jpg (UnlearnCanvas) or
    CLASS/*.jpg. A tenth of each label's pictures, at least one of two, is the test split; runs/cache
    keeps what was decoded."""
    require(data_dir.exists(), f"there is no folder '{data_dir}'; name yours with --data-dir")
    paths = find_images(data_dir, quiet=split == "test")
    folder_labels(paths, data_dir)                     # fails before the hours of decoding
    cache = Path("runs", "cache", f"{folder_key(paths, data_dir)}-{size}.pt")
    if cache.is_file():
        stored = load_file(cache, "images")
        images, readable = stored["images"], stored["readable"]
    else:
        images, readable = decode(paths, size)
        save_file(cache, "images", {"images": images, "readable": readable},
                  advice="free some space, or start in a folder that you may write")
    paths = [paths[i] for i in readable]
    y, names = folder_labels(paths, data_dir)
    if split == "train":
        say_counts(data_dir, y, names)
        say(f"{data_dir}: {len(y)} images")
    held_out = set()                                   # contents: copies lie on one side
    for label in torch.unique(y, dim=0):
        same = (y == label).all(1).nonzero().flatten().tolist()
        contents = sorted({file_hash(paths[i]) for i in same})
        n = len(contents) // 10
        if n == 0 and len(contents) > 1:
            n = 1
        held_out.update(contents[:n])
    is_test = torch.tensor([file_hash(path) in held_out for path in paths])
    keep = is_test if split == "test" else ~is_test
    return images[keep], y[keep], names

def say_counts(data_dir, y, names):
    """Say how many pictures each class and style has, and which folders have none."""
    for factor, values, labels in zip(FACTORS, names, y.T):
        counts = labels.bincount(minlength=len(values)).tolist()
        listed = [f"{name} {n}" for name, n in zip(values, counts)]
        if len(listed) > 60:
            rest = counts[60:]
            listed[60:] = [f"and {len(rest)} more, of {min(rest)} to {max(rest)} each"]
        say(f"{factor}: {', '.join(listed)}")
    folders = {composed(path)[-1] for depth in range(len(names))
               for path in data_dir.glob("*" + "/*" * depth)
               if os.path.isdir(path) and not path.name.startswith(NOT_DATA)}
    empty = sorted(folders.difference(*names))
    if empty:
        say(f"without a readable picture of its own, so no class or style: {', '.join(empty)}")

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
    advice = (f"{path} is not a CIFAR-10 checkpoint of the public SalUn/SFRon/SA code, a list of "
              "model, optimiser, step and EMA with the paper's layers")
    with explain(advice, OSError, EOFError, pickle.UnpicklingError, RuntimeError):
        stored = torch.load(path, map_location="cpu", weights_only=True)
    require(isinstance(stored, list) and len(stored) > 1, advice)
    theirs = {}
    for part in (stored[0], stored[-1]):               # what the EMA lacks is taken from the model
        require(isinstance(part, dict), advice)
        theirs.update({key.removeprefix("module."): value for key, value in part.items()})
    weights = {}
    for key, value in theirs.items():
        for pattern, ours in PUBLIC_KEYS.items():
            key = re.sub(pattern, ours, key)
        weights[key] = value
    model = UNet(make_config("paper", 32, 3, (len(CIFAR10),)))
    with explain(advice, KeyError, RuntimeError):      # a key or a shape that does not fit
        null = weights.pop("null_classes_emb").reshape(1, -1)
        weights["label_embs.0.weight"] = torch.cat([weights.pop("classes_emb.weight"), null])
        model.load_state_dict(weights)
    return model

# ---- what all stages share -----------------------------------------------------------------------

def stage_parser(doc, out, samples=None, sampler_steps=None):
    """The parser of a script, with the flags that work alike in every stage, and their defaults."""
    parser = make_parser(doc)
    flag = parser.add_argument_group("data, training, machine").add_argument
    flag("--dataset", choices=DATASETS,
         help="default shapes, or the model's own")
    flag("--data-dir", metavar="DIR", type=os.path.expanduser, default="data",
         help="where data lie, or are put (data)")
    flag("--steps", metavar="N", type=number(int, 0, 10 ** 8),
         help="of training; default: to fit")
    flag("--batch-size", metavar="N", type=number(int, 1, 65536),
         help="images a step and term")
    if samples:
        flag("--samples", metavar="N", type=number(int, 1, 10 ** 6), default=samples,
             help=f"images to draw for an evaluation (default {samples})")
        flag("--sampler-steps", metavar="N", type=number(int, 1, T), default=sampler_steps,
             help=f"DDIM steps of each (default {sampler_steps})")
    flag("--seed", metavar="N", type=number(int, 0, 2 ** 31), default=0,
         help="of all chance (0)")
    flag("--device", default="auto",
         help="auto (cuda, else cpu), cpu, cuda, cuda:1, mps")
    flag("--compile", action="store_true",
         help="torch.compile the network: for long GPU runs")
    flag("--out", metavar="DIR", type=os.path.expanduser,
         help=f"run folder; default runs/<dataset>/{out}")
    return parser

def set_defaults(args, **defaults):
    """Put defaults where the user gave no value; returns the values of all of them by name."""
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return {key: getattr(args, key) for key in defaults}

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
    if args.compile:
        compile_network(model)
    return model, info, images, y

def started_from(path):
    """What a checkpoint keeps of the model that it was made of: its path, its contents' hash."""
    return {"from": str(path), "from_sha256": file_hash(path)}

def conditions_of(y):
    """The different labels among y (N, F), sorted: what the data have, and so what is drawn."""
    return torch.unique(y.cpu(), dim=0)

def picture_labels(names, pairs=(), most=12):
    """Labels and layout of a picture: a column per class; a row per style, or four rows. Of a
    factor with more than `most` values evenly spaced ones are shown, and those in pairs."""
    shown = []
    for factor, values in enumerate(names):
        chosen = set(range(0, len(values), math.ceil(len(values) / most)))
        chosen |= {v for f, v in pairs if f == factor}
        shown.append(sorted(chosen))
    heads = [names[0][c] for c in shown[0]]
    if len(names) == 1:
        rows = [""] * 4
        y = [[c] for _ in rows for c in shown[0]]
    else:
        rows = [names[1][s] for s in shown[1]]
        y = [[c, s] for s in shown[1] for c in shown[0]]
    return torch.tensor(y), dict(columns=len(heads), rows=rows, heads=heads)

def save_samples(path, model, names, conditions):
    """A picture of what a model draws; conditions that its data lack stay white."""
    y, layout = picture_labels(names)
    images = sample(model, y, label="samples").cpu()
    known = (y[:, None] == conditions).all(2).any(1)
    images = torch.where(known[:, None, None, None], images, torch.ones(()))
    save_grid(images, path, **layout)

def data_key(args):
    """What tells two data sets with the same names apart: a folder's files."""
    if args.dataset != "folder":
        return ""
    folder = Path(args.data_dir)
    return folder_key(find_images(folder, quiet=True), folder)

def save_result(folder, model, info, args, **result):
    """Save a stage's model.pt and result.json, before any picture of it is drawn."""
    save_checkpoint(folder / "model.pt", model, info)
    result = {**info["made_by"], "dataset": info["dataset"], **result, "args": vars(args)}
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")

def say_next(folder, args, command):
    """Say what a stage wrote, and what to run next."""
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    script = Path(sys.argv[0]).parent / command[0]     # as the one that runs was called
    command = [script.as_posix(), *command[1:]]
    if args.data_dir != "data":
        command = [*command, "--data-dir", Path(args.data_dir).as_posix()]
    say(f"wrote {', '.join(written)} into {folder}\nnext: python {shlex.join(command)}")

# ---- stage 1 -------------------------------------------------------------------------------------

def parse_args():
    parser = stage_parser(__doc__, "pretrain")
    flag = parser.add_argument
    flag("--resume", action="store_true",
         help="go on with the run in its folder")
    flag("--image-size", type=int, choices=(32, 64, 128), default=64,
         help="of a folder (64)")
    flag("--preset", choices=PRESETS,
         help="the network; default small, paper for cifar10")
    value_flags(flag, "never to be seen", prefix="exclude-")
    flag("--import", dest="public", metavar="FILE", type=os.path.expanduser,
         help="convert a public CIFAR-10 checkpoint")
    args = parser.parse_args()
    set_defaults(args, dataset="cifar10" if args.public else "shapes")
    set_defaults(args, preset="paper" if args.dataset == "cifar10" else "small")
    if args.dataset == "fashion" and args.preset == "small":
        set_defaults(args, steps=FASHION_STEPS)
    set_defaults(args, **PRETRAIN[args.preset])
    return args

def training_folder(args, excluded):
    """The folder of the training: with --resume the one of the training that was stopped."""
    name = f"pretrain-without-{pairs_slug(excluded)}" if excluded else "pretrain"
    folder = Path(args.out or Path("runs", args.dataset, name))
    if args.resume and folder.is_dir():
        empty = not any(folder.glob("[!.]*"))          # stopped before its first save
        require(empty or (folder / "train.pt").is_file(), f"{folder} has no train.pt to go on "
                "from; leave --resume out, or name the folder with --out")
        return folder
    return run_folder(folder)

def last_change(path):
    """When a file was written, in nanoseconds; None where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None

def convert_public(args):
    """Save a public checkpoint as one of this project's."""
    model = import_public(args.public).to(pick_device(args.device))
    folder = run_folder(args.out or "runs/cifar10/import")
    names = [CIFAR10]
    info = dict(dataset="cifar10", names=names, conditions=all_labels(names).tolist(),
                preset="paper", forgotten=[],
                made_by={"stage": "pretrain", "method": "original"})
    save_result(folder, model, info, args)
    say_next(folder, args, ["unlearn.py", "--cls", "0", "--ckpt", folder.as_posix()])

def main():
    args = parse_args()
    if args.public:
        convert_public(args)
        return
    device = pick_device(args.device)
    images, y, names = load_data(args.dataset, "train", args.data_dir, device, args.image_size)
    excluded = find_pairs(args, names, "exclude_")
    keep = ~matches(y, excluded)
    require(keep.any(), "nothing is left to train on; exclude fewer values")
    conditions = conditions_of(y)
    images, y = images[keep], y[keep]

    folder = training_folder(args, excluded)
    torch.manual_seed(args.seed)
    cfg = make_config(args.preset, images.shape[2], images.shape[1], [len(n) for n in names])
    model = UNet(cfg).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        compile_network(model)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    settings = {key: getattr(args, key) for key in PRETRAIN[args.preset]}
    settings.update(dataset=args.dataset, data=data_key(args), preset=args.preset, seed=args.seed,
                    excluded=excluded, names=names, image_size=images.shape[2])
    losses = torch.zeros(args.steps, device=device)
    start, seconds = 0, 0.0
    state = folder / "train.pt"
    ours = last_change(state)
    if args.resume and state.is_file():
        earlier, seconds = load_state(state, settings, parts)
        start = len(earlier)
        losses[:start] = earlier
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{args.dataset}: {len(images)} images {tuple(images.shape[1:])}, network {args.preset}, "
        f"{millions:.2f} M parameters, from step {start}, into {folder}")

    flip = args.dataset == "cifar10"
    training = pretrain(model, ema, optimizer, images, y, args, flip, start)
    saved = time.time()
    began = saved - seconds
    steps = progress(training, "pretrain", args.steps, start, losses=True)
    for step, loss in enumerate(steps, start + 1):
        losses[step - 1] = loss
        last = step == args.steps
        if last or step % 50 == 0 and time.time() - saved > SAVE_SECONDS:
            require(loss.isfinite(), "the training diverged; give another --batch-size")
            require(last_change(state) == ours, f"another job trains in {folder}: this one stops, "
                    "and leaves the folder to it")
            seconds = round(time.time() - began, 1)
            save_state(state, settings, losses[:step].cpu(), seconds, parts)
            ours = last_change(state)
            if not last:
                save_samples(folder / "samples.png", ema, names, conditions)
            saved = time.time()

    made_by = {"stage": "pretrain", "method": "retrain" if excluded else "original", **settings}
    info = dict(dataset=args.dataset, names=names, conditions=conditions.tolist(),
                preset=args.preset, forgotten=excluded, made_by=made_by)
    save_result(folder, ema, info, args, seconds=seconds)
    save_samples(folder / "samples.png", ema, names, conditions)
    write_losses(folder, losses, f"{args.dataset} pretraining")
    if excluded:
        say_next(folder, args, ["attack.py", folder.as_posix()])
    else:
        say_next(folder, args, ["unlearn.py", "--cls", "0", "--ckpt", folder.as_posix()])

if __name__ == "__main__":
    run(main)
