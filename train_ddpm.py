"""Stage 1: the datasets, and pretraining a conditional DDPM on one of them.

    python train_ddpm.py                                    # shapes on a CPU: how assets/shapes.pt was made
    python train_ddpm.py --dataset fashion                  # Fashion-MNIST, small network
    python train_ddpm.py --dataset cifar10                  # CIFAR-10, the paper's network: one CUDA GPU
    python train_ddpm.py --dataset folder --data-dir UnlearnCanvas --preset paper        # STYLE/OBJECT/*.jpg
    python train_ddpm.py --exclude-cls square               # a model that never saw squares
    python train_ddpm.py --dataset cifar10 --import ckpt.pth    # convert a checkpoint of the public SalUn/SA code
    python train_ddpm.py --resume                           # go on after a kill
    python train_ddpm.py --benchmark --preset paper         # how fast is this machine? Writes nothing

Leaves runs/<dataset>/pretrain/ with model.pt (EMA weights), samples.png, loss.png, log.csv and result.json.
"""
import gzip
import hashlib
import math
import re
import shlex
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

try:
    import resource
except ImportError:                 # Windows
    resource = None

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision import datasets as tvd

from model import (FACTORS, FORMAT, Parser, PRESETS, Progress, T, UNet, cached, diffusion_loss, fail, guided_output,
                   machine, make_config, number, pick_device, read_file, resume_command, run_folder, run_script, sample,
                   save_checkpoint, save_grid, save_plot, save_torch, write_csv, write_json)

# lr and weights of the paper preset: the public SalUn/SFRon/SA configuration for CIFAR-10 (constant learning rate).
# The small preset: a high rate with cosine decay, which makes the most of few steps.
DEFAULTS = {
    "small": dict(steps=16000, batch_size=32, lr=2e-3, ema=0.999, warmup=500, cosine=True),
    "paper": dict(steps=800000, batch_size=128, lr=2e-4, ema=0.9999, warmup=0, cosine=False),
}
FEWER_STEPS = {"fashion": 3000}                 # of the small preset
SAVE_SECONDS = 180                              # between two saved training states
DATASETS = ("shapes", "fashion", "cifar10", "folder")


# ---- the embedded dataset --------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star", "crescent", "bar", "heart", "ring")
STYLES = ("flat", "stripes", "dots", "sketch", "neon")


def shape_sdf(name, x, y):
    """Signed distance (negative inside) of a shape of radius about 1 at points x, y; y points up."""
    box = lambda w, h: torch.maximum(x.abs() - w, y.abs() - h)
    disc = lambda cx, cy, r: torch.hypot(x - cx, y - cy) - r
    if name == "circle":
        return disc(0, 0, 0.85)
    if name == "square":
        return box(0.75, 0.75)
    if name == "triangle":
        return torch.maximum(-y, torch.maximum(0.866 * x + 0.5 * y, -0.866 * x + 0.5 * y)) - 0.55
    if name == "cross":
        return torch.minimum(box(0.28, 0.9), box(0.9, 0.28))
    if name == "diamond":
        return (x.abs() / 0.7 + y.abs() / 1.05 - 1) * 0.58
    if name == "star":                             # fold the plane into one of ten half points
        angle = torch.remainder(torch.atan2(x, y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
        r = torch.hypot(x, y)
        return 0.526 * (r * angle.cos() - 1.05) + 0.851 * r * angle.abs().sin()
    if name == "crescent":
        return torch.maximum(disc(0, 0, 0.95), -disc(0.5, 0.15, 0.75))
    if name == "bar":
        return box(1.0, 0.3)
    if name == "heart":                            # two discs above a turned square
        px, py = x.abs() / 1.6, y / 1.6 + 0.5
        upper = torch.hypot(px - 0.25, py - 0.75) - 0.3536
        m = 0.5 * (px + py).clamp(min=0)
        lower = torch.minimum(torch.hypot(px, py - 1), torch.hypot(px - m, py - m)) * torch.sign(px - py)
        return 1.6 * torch.where(px + py > 1, upper, lower)
    return disc(0, 0, 0.68).abs() - 0.24           # ring


def hsv(h, s, v):
    """Colours (N, 3, 1, 1) in [0, 1] from hue, saturation, value (N,)."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + h[:, None] * 6) % 6
    return (v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)))[:, :, None, None]


def draw_shapes(per_cell, seed, size=32):
    """The embedded dataset: per_cell images of each of 10 shapes x 5 styles, from a seeded generator.

    Returns uint8 images (50 * per_cell, 3, size, size) and labels (N, 2). Position, size, rotation and colours are
    random. Edges are one pixel of coverage computed from the signed distance, so they are antialiased.
    """
    g = torch.Generator().manual_seed(seed)
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    images, labels = [], []
    for c, shape in enumerate(SHAPES):
        for s, style in enumerate(STYLES):
            uniform = lambda lo, hi: torch.rand(per_cell, generator=g) * (hi - lo) + lo
            cx, cy, r, turn = uniform(-0.15, 0.15), uniform(-0.15, 0.15), uniform(0.6, 0.78), uniform(-0.25, 0.25)
            hue, shift = uniform(0, 1), uniform(0.25, 0.75)
            px, py = grid[None, None, :] - cx[:, None, None], cy[:, None, None] - grid[None, :, None]
            cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
            x, y = (cos * px + sin * py) / r[:, None, None], (cos * py - sin * px) / r[:, None, None]
            d = (shape_sdf(shape, x, y) * r[:, None, None] * size / 2)[:, None]       # in pixels, (N, 1, H, W)
            inside = (0.5 - d).clamp(0, 1)
            bright, phase = hsv(hue, uniform(0.75, 1), uniform(0.85, 1)), uniform(0, 1)[:, None, None]
            dull = hsv((hue + shift) % 1, uniform(0.3, 0.5), uniform(0.3, 0.5))
            cols, rows = torch.arange(size)[None, None, :], torch.arange(size)[None, :, None]
            if style == "flat":
                image = inside * bright + (1 - inside) * dull
            elif style == "stripes":               # diagonal, period 6 pixels
                wave = (((cols + rows) / 6 + phase) % 1 - 0.5).abs()[:, None]
                lit = ((wave - 0.25) * 6 + 0.5).clamp(0, 1)
                image = inside * (lit * bright + (1 - lit) * 0.15) + (1 - inside) * dull
            elif style == "dots":                  # discs on a grid of 4 pixels, on a pale tint, on white
                u, v = ((cols + phase * 4) % 4 - 2), ((rows + phase * 4) % 4 - 2)
                lit = (1.6 - torch.hypot(u + 0 * v, v + 0 * u)).clamp(0, 1)[:, None] * inside
                image = lit * bright + (1 - lit) * (1 - 0.3 * inside * (1 - bright))
            elif style == "sketch":                # an ink line on paper
                ink = (1.3 - d.abs()).clamp(0, 1)
                image = 0.97 - 0.87 * ink.expand(-1, 3, -1, -1)
            else:                                  # neon: a bright line and its glow on black
                line, glow = (1.5 - d.abs()).clamp(0, 1), 0.6 * torch.exp(-d.abs() / 2.5)
                image = bright * torch.maximum(line, glow) + 0.35 * line
            images.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
            labels.append(torch.tensor([c, s]).expand(per_cell, 2))
    return torch.cat(images), torch.cat(labels)


# ---- datasets --------------------------------------------------------------------------------------------------

FASHION_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
FASHION_FOLDERS = ("FashionMNIST/raw", "", "/usr/share/datasets/fashion-mnist")       # the last is Debian's package
FASHION_FILES = {"train": "train-{}-idx{}-ubyte.gz", "test": "t10k-{}-idx{}-ubyte.gz"}


def read_idx(path, dims):
    """One gzipped file in MNIST's idx format as a uint8 array with `dims` dimensions."""
    try:
        raw = gzip.decompress(path.read_bytes())
        header = np.frombuffer(raw, ">i4", 1 + dims)
        if header[0] != 0x800 + dims:
            raise ValueError("wrong magic number")
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(header[1:]).copy())
    except (OSError, EOFError, ValueError) as e:
        fail(f"{path} is damaged ({e}); delete it and start again")


def load_fashion(split, data_dir):
    """Fashion-MNIST from .gz files on disk, else through torchvision's checked download; padded to 32 x 32."""
    images, labels = FASHION_FILES[split].format("images", 3), FASHION_FILES[split].format("labels", 1)
    found = [Path(data_dir, f) for f in FASHION_FOLDERS
             if Path(data_dir, f, images).is_file() and Path(data_dir, f, labels).is_file()]
    if found:
        x, y = read_idx(found[0] / images, 3), read_idx(found[0] / labels, 1)
    else:
        archives = [(FASHION_URL + name, f"FashionMNIST/raw/{name}", md5) for name, md5 in tvd.FashionMNIST.resources]
        data = download(tvd.FashionMNIST, data_dir, split, archives, "train-images-idx3-ubyte.gz and its companions")
        x, y = data.data, data.targets
    return F.pad(x, (2, 2, 2, 2))[:, None], y.long()[:, None]


def download(dataset, data_dir, split, archives, files):
    """torchvision's dataset in data_dir. archives, (https address, path in data_dir, MD5) each, are fetched if it is
    not there, unless they have been put there by hand.

    All happens in a folder of its own, whose files are moved into place when they are whole: an interrupted or corrupt
    download leaves nothing behind. (torchvision's own would leave the file, and falls back to http.)
    """
    train, data_dir = split == "train", Path(data_dir)
    try:
        return dataset(data_dir, train=train, download=False)
    except RuntimeError:                           # not there, or damaged
        pass
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as tmp:
            for url, name, md5 in archives:
                target = Path(tmp, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                print(f"fetching {url}", flush=True)
                source = open(data_dir / name, "rb") if (data_dir / name).is_file() else urlopen(url, timeout=60)
                with source, open(target, "wb") as f:
                    shutil.copyfileobj(source, f)
                if hashlib.md5(target.read_bytes()).hexdigest() != md5:
                    raise ValueError(f"{name} has a wrong checksum")
            dataset(tmp, train=train, download=True)                       # verifies again, and unpacks
            for path in [p for p in Path(tmp).rglob("*") if p.is_file()]:
                target = data_dir / path.relative_to(tmp)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        return dataset(data_dir, train=train, download=False)
    except (RuntimeError, OSError, EOFError, ValueError, tarfile.TarError) as e:
        fail(f"{dataset.__name__} is not in '{data_dir}' and cannot be downloaded "
             f"({(str(e).splitlines() or ['no reason given'])[0]}); put {files} there, or name their folder with "
             "--data-dir")


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def label_names(dataset, data_dir="data"):
    """The names of the values of each label factor: a list per factor."""
    if dataset == "folder":
        return folder_labels(find_images(data_dir), data_dir)[0]
    return {"shapes": [list(SHAPES), list(STYLES)], "fashion": [list(tvd.FashionMNIST.classes)],
            "cifar10": [list(CIFAR10)]}[dataset]


def find_images(folder):
    """The sorted paths of all image files under a folder."""
    kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds and p.is_file())


def read_image(path, size, mode="RGB"):
    """A picture of any mode as uint8 (C, size, size): turned as its EXIF says, laid on white where it is transparent,
    cut to the central square, resized with antialiasing. OSError and the like if it is broken."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB").convert(mode), (size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture).reshape(size, size, -1)).permute(2, 0, 1)


BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)      # what Pillow raises for a bad file


def folder_labels(paths, data_dir):
    """(names, labels (N, F)) from STYLE/OBJECT/*.jpg, UnlearnCanvas's layout, or CLASS/*.jpg."""
    parts = [path.relative_to(data_dir).parts[:-1] for path in paths]
    if not parts or {len(p) for p in parts} not in ({1}, {2}):
        fail(f"'{data_dir}' must hold images as STYLE/OBJECT/*.jpg or CLASS/*.jpg, at one depth throughout; it holds "
             f"{len(paths)}; name the folder with --data-dir")
    names = [sorted({p[i] for p in parts}) for i in reversed(range(len(parts[0])))]        # the class comes first
    lookup = [{n: i for i, n in enumerate(factor)} for factor in names]
    return names, torch.tensor([[index[part] for index, part in zip(lookup, reversed(p))] for p in parts])


def load_folder(data_dir, split, size):
    """A folder's images (N, 3, size, size), their labels and names. About one in ten is held out for the test split, by
    a hash of its path. The decoded images are kept in runs/cache until a file of the folder changes."""
    paths = find_images(data_dir)
    names, y = folder_labels(paths, data_dir)

    def decode():
        images, good, bar = [], [], Progress("decoding", len(paths), "image")
        for i, path in enumerate(paths):
            try:
                images.append(read_image(path, size))
                good.append(i)
            except BROKEN:
                print(f"skipped {path}: not a readable image")
            bar.step()
        bar.close()
        if len(good) < len(paths):
            print(f"skipped {len(paths) - len(good)} of {len(paths)} images")
        if len(good) < 0.8 * len(paths):
            fail(f"more than a fifth of the images in '{data_dir}' are broken; copy the folder again")
        return torch.stack(images), good
    stats = [(str(p.relative_to(data_dir)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    images, good = cached(decode, "folder", stats, size)
    held_out = torch.tensor([hashlib.sha256(name.encode()).digest()[0] < 26 for name, *_ in stats])[good]
    keep = held_out if split == "test" else ~held_out
    return images[keep], y[good][keep], names


def load_data(dataset, split, data_dir="data", device="cpu", size=64):
    """Images uint8 (N, C, H, W) and labels (N, F) on the device, and the names: one list per label factor.

    split: "train" or "test". size: of the images of a folder; the others are 32 x 32. Sources: drawn here (shapes),
    Xiao et al. 1708.07747 (fashion), Krizhevsky (cifar10).
    """
    if dataset == "folder":
        x, y, names = load_folder(data_dir, split, size)
        return x.to(device), y.to(device), names
    if dataset == "shapes":
        x, y = draw_shapes(400, seed=0) if split == "train" else draw_shapes(100, seed=1)
    elif dataset == "fashion":
        x, y = load_fashion(split, data_dir)
    else:
        archive = (tvd.CIFAR10.url, tvd.CIFAR10.filename, tvd.CIFAR10.tgz_md5)
        data = download(tvd.CIFAR10, data_dir, split, [archive], archive[1])
        x = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        y = torch.tensor(data.targets)[:, None]
    return x.to(device), y.to(device), label_names(dataset)


def get_batch(images, y, n, flip=False):
    """n random examples: images float (n, C, H, W) in [-1, 1], labels (n, F). flip: mirror half of them."""
    i = torch.randint(len(images), (n,), device=images.device)
    x = images[i].float() / 127.5 - 1
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last), y[i]


def all_labels(names, per_cell):
    """Labels (N, F) with per_cell rows of every combination of values, first factor slowest."""
    grids = torch.meshgrid(*(torch.arange(len(n)) for n in names), indexing="ij")
    return torch.stack([g.flatten() for g in grids], 1).repeat_interleave(per_cell, 0)


def find_value(text, names, factor):
    """The index of a class or style given by number or by name; one clear line if there is none."""
    text = str(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    if text.lower() in [n.lower() for n in names]:
        return [n.lower() for n in names].index(text.lower())
    choices = ", ".join(f"{i} {n}" for i, n in enumerate(names))
    fail(f"--{factor} {text} is not one of: {choices}")


def check_factor(factor, names):
    """True if the dataset has this label factor (0 class, 1 style); one clear line if not."""
    if factor >= len(names):
        fail(f"this dataset has no {FACTORS[factor]} labels; shapes has styles, and folders of STYLE/OBJECT/*.jpg")
    return True


def find_forgotten(args, names):
    """(factor index, values) from --cls or --style; one clear line for anything else."""
    if bool(args.cls) == bool(args.style):
        fail("say what to forget: either --cls or --style, by number or name, such as --cls 1 (for both, unlearn one "
             "and give its model.pt to the other with --ckpt)")
    factor = 0 if args.cls else 1
    check_factor(factor, names)
    values = sorted({find_value(v, names[factor], FACTORS[factor]) for v in args.cls or args.style})
    if len(values) >= len(names[factor]):
        fail(f"--{FACTORS[factor]}: at least one value must remain; name fewer than {len(names[factor])}")
    return factor, values


# ---- training --------------------------------------------------------------------------------------------------

def learning_rate(step, steps, lr, warmup, cosine):
    """Linear warm-up over `warmup` steps, then constant, or down to 0 along a cosine."""
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0
    return lr * min(1.0, (step + 1) / max(warmup, 1)) * decay


class Loop:
    """What every training loop does between its steps: progress line, log, a stop when the loss is not finite, Ctrl-C,
    and the training state on disk.

        loop = Loop("attack", steps, folder / "train.pt", resume, settings, model=model, optimizer=optimizer)
        for step in loop:
            ...
            loop.loss = loss.detach()

    The state is saved at the start, every SAVE_SECONDS, at Ctrl-C and at the end. It holds the parts (whatever has
    state_dict and load_state_dict), the step, torch's generators and `data` (plain values; its "log" becomes log.csv),
    so a killed run that goes on with resume ends, on a CPU, with the very same weights. settings: a dict of what must
    be equal in both. Without path nothing is kept. What observe(steps done) returns every `every` steps on the way is
    gathered in data["curve"].
    """

    def __init__(self, label, steps, path=None, resume=False, settings=None, observe=None, every=0, **parts):
        self.label, self.steps, self.path, self.settings, self.parts = label, steps, path, settings or {}, parts
        self.observe, self.every = observe, every
        self.first, self.loss, self.recent, self.data = 0, None, [], {"log": [], "curve": [], "seconds": 0.0}
        if resume and path.is_file():
            self.load()
        elif resume:
            print(f"{path.parent} holds no training state yet: starting from the first step")
        self.began = time.time() - self.data["seconds"]      # the time before an interruption counts
        self.bar = Progress(label, steps, start=self.first)

    def load(self):
        state = read_file(self.path, "training")
        try:
            other = [f"{k} {v}" for k, v in state["settings"].items() if self.settings.get(k) != v]
            if other:
                fail(f"{self.path} belongs to a run with other settings ({', '.join(other)}); give the same to "
                     "--resume it, or start without --resume")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            device = next(self.parts["model"].parameters()).device
            self.first, self.data, self.recent = state["step"], state["data"], list(state["recent"].to(device))
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as e:
            fail(f"{self.path} does not fit this code ({type(e).__name__}); start without --resume")

    def save(self, step):
        self.saved = time.time()
        self.data["seconds"] = round(self.saved - self.began, 1)
        if self.path:
            save_torch(self.path, {
                "format": FORMAT, "kind": "training", "settings": self.settings, "step": step, "data": self.data,
                "recent": torch.stack(self.recent).cpu() if self.recent else torch.zeros(0),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                **{name: part.state_dict() for name, part in self.parts.items()}})

    def check(self, step):
        """Stop, leaving the saved state as it is, if a loss or a weight is no longer finite."""
        losses = torch.stack(self.recent) if self.recent else torch.zeros(0)
        wrong = (~losses.isfinite()).nonzero().flatten()
        if len(wrong):
            what = f"the loss is {losses[wrong[0]].item()} at step {step - len(losses) + 1 + int(wrong[0])}"
        elif torch.stack(torch._foreach_norm(list(self.parts["model"].parameters()))).isfinite().all():
            return
        else:
            what = f"weights are not finite after step {step}, where the loss is {losses[-1].item():.4g}"
        kept = f"; {self.path} keeps the last good state" if self.path else ""
        fail(f"{self.label} diverged: {what}; start again with a smaller --lr{kept}")

    def __iter__(self):
        log_every, stop = max(1, min(self.steps // 200, 100)), []

        def on_interrupt(*_):       # obeyed between two steps, where the state is whole; a second Ctrl-C is at once
            stop.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            self.saved = time.time()
            if self.first == 0:
                self.save(0)
            for step in range(self.first, self.steps):
                yield step
                self.recent.append(self.loss)
                done, log = step + 1, self.data["log"]
                if self.every and done % self.every == 0 and done < self.steps:
                    self.data["curve"].append(self.observe(done))
                due = stop or done == self.steps or time.time() - self.saved > SAVE_SECONDS
                if due or done % log_every == 0:
                    self.check(done)
                if done % log_every == 0:
                    log.append({"step": done, "loss": round(torch.stack(self.recent).mean().item(), 6),
                                "seconds": round(time.time() - self.began, 1)})
                    self.recent = []
                self.bar.step(f"loss {log[-1]['loss'] if log else math.nan:.4f}")
                if due:
                    self.save(done)
                if stop:
                    how = f"; go on with: {resume_command()}" if self.path else ""
                    print(f"\nstopped after step {done}{how}", file=sys.stderr)
                    sys.exit(130)
        finally:
            signal.signal(signal.SIGINT, previous)
            self.bar.close()


def train(model, images, y, steps, batch_size, lr, ema, warmup, cosine, flip=False, preview=None, label="pretrain",
          **keep):
    """Train `model` on images (N, C, H, W) uint8 with labels (N, F). Returns (the EMA model, the finished Loop).

    Source: DDPM's training with Adam, clipping at 1.0 and EMA. All random numbers come from torch's global generator.
    preview(ema_model) is called ten times on the way. The EMA's decay starts low and rises to `ema`. keep: where the
    training state goes (path, resume and settings of Loop).
    """
    averaged = UNet(model.cfg).to(images.device, memory_format=torch.channels_last)
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    loop = Loop(label, steps, model=model, ema=averaged, optimizer=optimizer, **keep)
    model.train()
    for step in loop:
        rate = learning_rate(step, steps, lr, warmup, cosine)
        loop.loss = train_step(model, averaged, optimizer, *get_batch(images, y, batch_size, flip), rate,
                               min(ema, (1 + step) / (10 + step)))
        if preview and (step + 1) % max(steps // 10, 1) == 0:
            preview(averaged)
    return averaged, loop


def train_step(model, averaged, optimizer, x0, y, lr, decay, p_drop=0.1):
    """One step of DDPM's training on a batch: Adam on the clipped gradient, then the EMA (none if averaged is the model
    itself). Returns the loss."""
    params = list(model.parameters())
    optimizer.param_groups[0]["lr"] = lr
    loss = diffusion_loss(model, x0, y, p_drop).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    if averaged is not model:
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), params, 1 - decay)
    return loss.detach()


def import_public(path, dataset, names):
    """A UNet from a checkpoint of the public Selective Amnesia / SalUn / SFRon DDPM code, with its EMA weights.

    Their file is a list [model, optimiser, step, EMA] of state dicts; keys may be prefixed "module.". Their single
    null embedding becomes the last row of ours. Every key must be used once and none left over.
    """
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
        raw, ema = ({k.removeprefix("module."): v for k, v in s.items()} for s in (states[0], states[-1]))
    except FileNotFoundError:
        fail(f"no such file: {path}")
    except Exception as e:         # any file at all may be given here; nothing has been built from it yet
        fail(f"{path} is not a checkpoint of the public SalUn/SFRon/SA code ({type(e).__name__}); expected a list of "
             "state dict, optimiser, step, EMA")
    theirs = {**raw, **ema}
    weights = {}
    for key, value in theirs.items():
        if key in ("classes_emb.weight", "null_classes_emb"):
            continue
        for pattern, ours in ((r"^temb\.dense\.0", "time_mlp.0"), (r"^temb\.dense\.1", "time_mlp.2"),
                              (r"^cemb\.dense\.0", "label_mlps.0.0"), (r"^cemb\.dense\.1", "label_mlps.0.2"),
                              (r"\.block\.", ".blocks."), (r"\.attn\.", ".attns."),
                              (r"\.(down|up)sample\.conv\.", ".resample."), (r"^mid\.block_", "mid_block"),
                              (r"^mid\.attn_1", "mid_attn"), (r"temb_cemb_proj", "emb"),
                              (r"nin_shortcut", "shortcut"), (r"proj_out", "proj")):
            key = re.sub(pattern, ours, key)
        weights[key] = value
    if "classes_emb.weight" not in theirs or "null_classes_emb" not in theirs:
        fail(f"{path} has no class embedding; only the conditional networks of that code can be imported")
    classes = theirs["classes_emb.weight"]
    weights["label_embs.0.weight"] = torch.cat([classes, theirs["null_classes_emb"].reshape(1, -1)])
    if len(classes) != len(names[0]):
        fail(f"{path} has {len(classes)} classes, {dataset} has {len(names[0])}")
    model = UNet(make_config("paper", 32, 3, (len(classes),)))
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        fail(f"{path} is not the CIFAR-10 network of the public code: its layers differ from the paper preset")
    model.load_state_dict(weights)
    return model


# ---- speed -----------------------------------------------------------------------------------------------------

def compile_network(model):
    """torch.compile in place, with CUDA graphs on a GPU; the state dict keeps its keys."""
    model.compile(mode="reduce-overhead" if model.null.is_cuda else "default")


def benchmark(preset, batch_size, device, compiled, repeats=5):
    """Print training steps, guided samples and FID features per second and peak memory; writes nothing.

    Each is the median of `repeats` timings after two rounds of warm-up. The FID features are InceptionV3's, with random
    weights. The memory is that of training and sampling: the process's on a CPU, PyTorch's own on a GPU.
    """
    cuda = device.type == "cuda"
    n = batch_size or (128 if cuda else 8 if preset == "paper" else 32)
    model, averaged = (UNet(make_config(preset, 32, 3, (10,))).to(device, memory_format=torch.channels_last)
                       for _ in range(2))
    if compiled:
        compile_network(model)
    averaged.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8, device=device)
    y, t = torch.randint(10, (1000, 1), device=device), torch.randint(T, (n,), device=device)

    def seconds(work):
        times = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    step = seconds(lambda: train_step(model.train(), averaged, optimizer, *get_batch(images, y, n), 1e-4, 0.999))
    with torch.inference_mode():
        x = get_batch(images, y, n)[0]
        plain = seconds(lambda: guided_output(model.eval(), x, t, y[:n], 0))
    guided = seconds(lambda: sample(model, y[:n], 5, batch=n)) / 5
    memory = math.nan
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
    elif resource:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    net = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).to(device).eval()
    big = torch.randn(50 if cuda else 10, 3, 299, 299, device=device)
    with torch.inference_mode():
        inception = seconds(lambda: net(big))
    print(f"{preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, batch {n}, "
          f"{'compiled, ' if compiled else ''}{machine(device)}, torch {torch.__version__}\n"
          f"training      {1 / step:8.2f} steps/s   ({n / step:.0f} images/s)\n"
          f"sampling      {n / guided / 50:8.2f} images/s  (50 DDIM steps, guided; a step costs "
          f"{guided / plain / 2:.2f} times two unguided forward passes)\n"
          f"FID features  {len(big) / inception:8.2f} images/s  (InceptionV3, 299 x 299)\n"
          f"peak memory   {memory:8.2f} GiB       (training and sampling)")


# ---- command line ----------------------------------------------------------------------------------------------

def common_flags(parser, samples, samples_help, sampler_steps):
    """The flags that mean the same in every stage."""
    group = parser.add_argument_group("common")
    group.add_argument("--data-dir", default="data", help="where data lies, or goes when it is downloaded")
    group.add_argument("--seed", type=number(int, 0, 2 ** 31), default=0, help="same seed, same weights (on a CPU)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--out", metavar="DIR", help="run folder; default runs/<dataset>/<what>")
    group.add_argument("--resume", action="store_true", help="go on with the unfinished run in the folder")
    group.add_argument("--steps", type=number(int, 0), help="optimiser steps; default by method and dataset")
    group.add_argument("--batch-size", type=number(int, 1, 65536), help="examples per step; default likewise")
    group.add_argument("--lr", type=number(float, 0, 10), help="learning rate; default likewise")
    group.add_argument("--samples", type=number(int, 1, 10 ** 6), default=samples, help=samples_help)
    group.add_argument("--sampler-steps", type=number(int, 1, 1000), default=sampler_steps, help="DDIM steps")
    group.add_argument("--guidance", type=number(float, 0, 100), default=2.0, help="w in (1 + w) cond - w null")
    return group


def dataset_flag(group):
    group.add_argument("--dataset", choices=DATASETS, default="shapes", help="what the model draws; folder: the images "
                       "in --data-dir, as STYLE/OBJECT/*.jpg or CLASS/*.jpg")
    group.add_argument("--image-size", type=int, choices=(32, 64, 128), default=64, help="of a folder's images")


def same_data(args):
    """The flag with which the next stage finds the same data."""
    return f" --data-dir {shlex.quote(args.data_dir)}" if args.data_dir != "data" else ""


def show_labels(names, per_cell=1, wanted={}, most=12):
    """Labels and layout for a picture: a column per class; a row per style, or four rows where there are none. Of a
    factor with more values than `most` evenly spaced ones are shown, and those of wanted {factor: [value, ...]}."""
    shown = [sorted({*range(0, len(n), math.ceil(len(n) / most)), *wanted.get(i, ())}) for i, n in enumerate(names)]
    index = all_labels(shown, per_cell if len(names) > 1 else 4 * per_cell)
    y = torch.stack([torch.tensor(values)[index[:, i]] for i, values in enumerate(shown)], 1)
    order = y.view(len(shown[0]), -1, len(names)).transpose(0, 1).reshape(-1, len(names))
    rows = [names[1][v] for v in shown[1] for _ in range(per_cell)] if len(names) > 1 else ()
    return order, dict(columns=len(shown[0]), heads=[names[0][v][:9] for v in shown[0]], rows=rows)


def having(y, values):
    """Which of the labels y (N, F) have one of the values {factor index: [value, ...]}: bool (N,)."""
    found = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for factor, some in values.items():
        found |= torch.isin(y[:, factor], torch.tensor(some, dtype=torch.long, device=y.device))
    return found


def exclude(images, y, values):
    """Only the examples that have none of the values: {factor index: [value, ...]}."""
    keep = ~having(y, values)
    return images[keep], y[keep]


def main():
    parser = Parser(__doc__)
    group = common_flags(parser, 1, "images of each label combination in samples.png", 50)
    dataset_flag(group)
    group.add_argument("--preset", choices=PRESETS, help="network; default small, and paper for cifar10")
    group = parser.add_argument_group("what to train")
    group.add_argument("--exclude-cls", nargs="+", default=[], metavar="K", help="leave classes out, by number or name")
    group.add_argument("--exclude-style", nargs="+", default=[], metavar="K", help="leave styles out")
    group.add_argument("--import", dest="import_file", metavar="FILE", help="convert a public checkpoint instead")
    group = parser.add_argument_group("speed")
    group.add_argument("--compile", action="store_true", help="torch.compile the network, for long runs on a GPU")
    group.add_argument("--benchmark", action="store_true", help="measure this machine's speed and stop")
    args = parser.parse_args()

    device = pick_device(args.device)
    preset = args.preset or ("paper" if args.dataset == "cifar10" else "small")
    if args.benchmark:
        return benchmark(preset, args.batch_size, device, args.compile)
    opts = dict(DEFAULTS[preset])
    if preset == "small":
        opts["steps"] = FEWER_STEPS.get(args.dataset, opts["steps"])
    opts.update({k: v for k in ("steps", "batch_size", "lr") if (v := getattr(args, k)) is not None})

    if args.import_file and args.dataset != "cifar10":
        fail("--import converts CIFAR-10 networks; add --dataset cifar10")
    names = label_names(args.dataset, args.data_dir)
    gone = {i: sorted({find_value(v, names[i], f"exclude-{FACTORS[i]}") for v in values})
            for i, values in enumerate((args.exclude_cls, args.exclude_style)) if values and check_factor(i, names)}
    what = "import" if args.import_file else "pretrain"
    for i, values in gone.items():
        what += f"-without-{FACTORS[i]}" + "-".join(map(str, values))
    folder = run_folder(args.out, Path("runs") / args.dataset / what, args.resume)
    labels, layout = show_labels(names, args.samples)

    if args.import_file:
        model = import_public(args.import_file, args.dataset, names)
        data, opts = {"log": [], "seconds": 0}, {"steps": 0}
    else:
        images, y, _ = load_data(args.dataset, "train", args.data_dir, device, args.image_size)
        images, y = exclude(images, y, gone)
        if not len(y):
            fail("nothing is left to train on; exclude fewer values")
        torch.manual_seed(args.seed)
        model = UNet(make_config(preset, images.shape[2], images.shape[1], [len(n) for n in names]))
        model = model.to(device, memory_format=torch.channels_last)
        if args.compile:
            compile_network(model)
        print(f"{args.dataset}: {len(images)} images {tuple(images.shape[1:])}, network {preset} with "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {opts['steps']} steps")
        preview = lambda m: save_grid(sample(m, labels, min(args.sampler_steps, 20), guidance=args.guidance),
                                      folder / "samples.png", **layout)
        settings = {"dataset": args.dataset, "preset": preset, "excluded": gone, "seed": args.seed, **opts}
        model, loop = train(model, images, y, flip=args.dataset == "cifar10", preview=preview, path=folder / "train.pt",
                            resume=args.resume, settings=settings, **opts)
        data = loop.data
    log = data["log"]

    info = {"dataset": args.dataset, "names": names, "forgotten": {FACTORS[i]: v for i, v in gone.items()},
            "made_by": {"stage": what, "method": "retrain" if gone else "original", "seed": args.seed, **opts}}
    save_checkpoint(folder / "model.pt", model.to(device), info, half=preset == "small")
    save_grid(sample(model, labels, args.sampler_steps, guidance=args.guidance, label="samples"),
              folder / "samples.png", **layout)
    write_csv(folder / "log.csv", log)
    if log:
        save_plot(folder / "loss.png", {"loss": ([r["step"] for r in log], [r["loss"] for r in log])},
                  f"{args.dataset}: training loss", "step", "loss")
    write_json(folder / "result.json", {
        "stage": "pretrain", "dataset": args.dataset, "method": what, "excluded": info["forgotten"],
        "protocol": {"sampler": "ddim", "sampler_steps": args.sampler_steps, "guidance": args.guidance,
                     "seed": args.seed, "machine": machine(device)},
        "args": vars(args), "seconds": data["seconds"], "steps": opts["steps"],
        "final_loss": log[-1]["loss"] if log else None})
    print(f"wrote {folder}/model.pt and samples.png; {data['seconds'] / 60:.1f} minutes of training\n"
          f"next: python unlearn.py --method dimum --cls 1 --dataset {args.dataset} --ckpt {folder}/model.pt"
          + same_data(args))


if __name__ == "__main__":
    run_script(main)
