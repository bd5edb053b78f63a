"""The diffusion model: noise schedule, loss, guidance, samplers, U-Net; checkpoints and pictures.

    python model.py assets/shapes.pt                                    # every class in every style
    python model.py assets/shapes.pt --cls square --style neon --n 16   # one condition
    python model.py runs/shapes/dimum-cls1 --sampler ddpm               # all 1,000 ancestral steps
    python model.py assets/shapes.pt --unlabelled --n 100               # asked for nothing
    python model.py assets/shapes.pt --n 20 --png samples               # files, for any FID tool

Symbols are those of DDPM (Ho et al. 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t =
`alphas_cumprod[t]`. Labels `y` are a LongTensor (B, F): column 0 the class, column 1 the style. The
label row `model.null` means "no condition" (guidance, Ho & Salimans 2207.12598).
"""
import argparse
import atexit
import io
import math
import os
import pickle
import sys
import time
import unicodedata
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

T = 1000                        # diffusion steps
FACTORS = ("cls", "style")      # the columns of y

# ---- diffusion -----------------------------------------------------------------------------------

def linear_schedule():
    """DDPM's betas from 1e-4 to 0.02 and alphas_cumprod, each (T,) and float64."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return betas, torch.cumprod(1 - betas, 0)

def antithetic_times(n, device):
    """n times in 0..T-1, the second half T-1-t for the times t of the first: a loss of lower
    variance (DDIM's public code; where n is even, one time of each half has no partner)."""
    t = torch.randint(0, T, (n // 2 + 1,), device=device)
    return torch.cat([t, T - 1 - t])[:n]

def add_noise(model, x0, t, eps):
    """x_t (B, C, H, W) for times t (B,), and the target that the network learns: eps, or v."""
    a = model.alphas_cumprod[t][:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    if model.cfg.prediction == "v":
        return x_t, a.sqrt() * eps - (1 - a).sqrt() * x0
    return x_t, eps

def drop_labels(y, model, p=0.1):
    """y (B, F), each row replaced by the null label with probability p."""
    drop = torch.rand(len(y), 1, device=y.device) < p
    return torch.where(drop, model.null, y)

def diffusion_loss(model, x0, y, p_drop=0.1):
    """Each example's loss (B,): the mean over pixels of (target - network)^2 at a random time, for
    x0 (B, C, H, W) in [-1, 1] and y (B, F), whose rows are dropped with probability p_drop. Source:
    DDPM equation 14, Salimans & Ho 2202.00512 for v. (The public unlearning code sums pixels.)"""
    t = antithetic_times(len(x0), x0.device)
    x_t, target = add_noise(model, x0, t, torch.randn_like(x0))
    output = model(x_t, t, drop_labels(y, model, p_drop))
    return (output - target).square().mean((1, 2, 3))

def guided_output(model, x_t, t, y, guidance):
    """(1 + w) network(y) - w network(null) as one batch; w = 0 costs one branch only. (The public
    unlearning code's weighting: w = 2 there is a scale of 3 elsewhere.)"""
    if guidance == 0:
        return model(x_t, t, y)
    labels = torch.cat([y, model.null.expand_as(y)])
    both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
    cond, null = both.chunk(2)
    return (1 + guidance) * cond - guidance * null

def split_output(model, out, x_t, a):
    """x_0 and eps from the network's output at x_t; a = alphas_cumprod[t], a number."""
    if model.cfg.prediction == "v":
        x0 = a ** 0.5 * x_t - (1 - a) ** 0.5 * out
        eps = a ** 0.5 * out + (1 - a) ** 0.5 * x_t
    else:
        x0 = (x_t - (1 - a) ** 0.5 * out) / a ** 0.5
        eps = out
    return x0, eps

def ddpm_posterior():
    """Factors of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM equation 7): each (T,)."""
    betas, a = linear_schedule()
    a_prev = F.pad(a[:-1], (1, 0), value=1.0)
    coef_x0 = a_prev.sqrt() * betas / (1 - a)
    coef_xt = (1 - betas).sqrt() * (1 - a_prev) / (1 - a)
    return coef_x0, coef_xt

def ddpm_sample(model, x, y, guidance, generators):
    """x_0 by DDPM's T ancestral steps from noise x, with a generator for each image's noise. The
    variance is beta_t ("fixedlarge") and x_0 is clamped to [-1, 1], as in the public code."""
    betas, a = (s.tolist() for s in linear_schedule())
    coef_x0, coef_xt = (s.tolist() for s in ddpm_posterior())
    for t in reversed(range(T)):
        batch_t = torch.full((len(x),), t, device=x.device)
        out = guided_output(model, x, batch_t, y, guidance)
        x0, _ = split_output(model, out, x, a[t])
        x = coef_x0[t] * x0.clamp(-1, 1) + coef_xt[t] * x
        if t > 0:
            x = x + betas[t] ** 0.5 * draw_noise(x.shape[1:], generators).to(x.device)
    return x

def ddim_sample(model, x, y, guidance, steps):
    """x_0 by `steps` deterministic steps from noise x, at the times i T / steps, such as 950, 900,
    ..., 50, 0 (DDIM, Song et al. 2010.02502 equation 12 with sigma 0). x_0 is not clamped, as in the
    public code."""
    a = linear_schedule()[1].tolist() + [1.0]          # a[-1] belongs to x_0
    times = [i * T // steps for i in reversed(range(steps))]
    for t, t_next in zip(times, times[1:] + [-1]):
        batch_t = torch.full((len(x),), t, device=x.device)
        out = guided_output(model, x, batch_t, y, guidance)
        x0, eps = split_output(model, out, x, a[t])
        x = a[t_next] ** 0.5 * x0 + (1 - a[t_next]) ** 0.5 * eps
    return x

def draw_noise(shape, generators):
    """Noise (n, *shape), an image from each of n generators of the CPU: the same on every device,
    and however the images are divided into batches."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

@torch.inference_mode()
def sample(model, y, steps=50, sampler="ddim", guidance=2.0, seed=0, batch=50, label=None):
    """Images (B, C, H, W) in [-1, 1] for labels y (B, F); `steps` is for "ddim" only; `label`
    shows progress. Image i depends on seed and i, not on other labels: two models asked with one
    seed start from the same noise."""
    device = model.null.device
    shape = (model.cfg.channels, model.cfg.image_size, model.cfg.image_size)
    first = torch.Generator().manual_seed(seed)
    chance = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2 ** 32, (len(y),), generator=chance)        # of the steps of "ddpm"
    batches = y.to(device).split(batch)
    images = []
    was_training = model.training
    model.eval()
    for n, labels in enumerate(progress(batches, label, len(batches))):
        x = draw_noise(shape, [first] * len(labels)).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        if sampler == "ddim":
            x = ddim_sample(model, x, labels, guidance, steps)
        else:
            own = seeds[n * batch:n * batch + len(labels)].tolist()
            later = [torch.Generator().manual_seed(s) for s in own]
            x = ddpm_sample(model, x, labels, guidance, later)
        images.append(x.clamp(-1, 1).contiguous())
    model.train(was_training)
    return torch.cat(images)

# ---- network -------------------------------------------------------------------------------------

@dataclass
class UNetConfig:
    """Everything that is needed to rebuild the network; saved inside every checkpoint."""
    image_size: int = 32
    channels: int = 3                    # of the image
    classes: tuple = (10, 5)             # number of values of each label factor
    width: int = 32                      # channels at full resolution
    mult: tuple = (1, 2, 2)              # channels of each resolution, in widths, from the full one
    blocks: int = 1                      # residual blocks per resolution (one more on the way up)
    attention: tuple = (8,)              # resolutions with attention (the middle always has it)
    groups: int = 8                      # of GroupNorm
    dropout: float = 0.0
    prediction: str = "v"                # the output: "eps", or "v" = sqrt(a) eps - sqrt(1 - a) x_0

PRESETS = {
    # A million parameters. It predicts v because flat colours are settled at large t, where an x_0
    # computed from eps has its error divided by sqrt(a_t): 1/158 at t = 999.
    "small": UNetConfig(),
    # Layer for layer the network of the public Selective Amnesia, SalUn and SFRon DDPM code.
    "paper": UNetConfig(width=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32,
                        dropout=0.1, prediction="eps"),
}

def make_config(preset, image_size, channels, classes):
    """The preset for such images and numbers of values; doubling 32 x 32 adds a resolution."""
    cfg = PRESETS[preset]
    more = int(math.log2(image_size // 32))
    mult = cfg.mult + cfg.mult[-1:] * more
    return replace(cfg, image_size=image_size, channels=channels, classes=tuple(classes), mult=mult)

def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)

class ResBlock(nn.Module):
    """Two convolutions around the condition: x (B, c_in, H, W), emb (B, d) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, d, cfg):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(d, c_out)
        self.norm2 = nn.GroupNorm(cfg.groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv2)                       # the block starts as its shortcut, as in DDPM

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))

class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, with 1x1 convolutions for q, k, v."""
    def __init__(self, c, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj = nn.Conv2d(c, c, 1)
        zero(self.proj)

    def forward(self, x):
        h = self.norm(x)

        def positions(image):
            """(B, C, H, W) -> (B, 1 head, H*W, C)"""
            return image.flatten(2).transpose(1, 2)[:, None]

        h = F.scaled_dot_product_attention(
            positions(self.q(h)), positions(self.k(h)), positions(self.v(h)))
        h = h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])                      # (B, C, H, W)
        return x + self.proj(h)

class Level(nn.Module):
    """One resolution on one side of the U: blocks, attention, the convolution that leaves."""
    def __init__(self, widths, c_out, d, resolution, resample, cfg):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c, c_out, d, cfg) for c in widths)
        self.attns = nn.ModuleList()
        for _ in widths:
            has_attention = resolution in cfg.attention
            self.attns.append(Attention(c_out, cfg) if has_attention else nn.Identity())
        self.resample = resample

def mlp(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))

class UNet(nn.Module):
    """eps or v (B, C, H, W) from x_t (B, C, H, W), times t (B,) in 0..T-1 and labels y (B, F).

    Source: DDPM's network, conditioned as in the public SalUn code (DDPM/models/diffusion.py): time
    and label embedding pass an MLP each and are concatenated; several factors' MLPs are summed.
    """
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        w = cfg.width
        d = 4 * w
        self.time_mlp = mlp(w, d)
        self.label_embs = nn.ModuleList(nn.Embedding(n + 1, w) for n in cfg.classes)    # last: null
        self.label_mlps = nn.ModuleList(mlp(w, d) for _ in cfg.classes)
        self.conv_in = nn.Conv2d(cfg.channels, w, 3, padding=1)

        # Every feature map on the way down (a, b, c, d) is kept as a skip. On the way up each block
        # takes the newest one left and sees it beside what comes from below. With two resolutions
        # and one block:
        #
        #   x -> conv_in (a) -> block (b)              block(., b) -> block(., a) -> conv_out
        #                            |                      ^
        #                       stride 2 (c)            upsample
        #                            v                      |
        #                        block (d) -> middle -> block(., d) -> block(., c)
        widths = [w * m for m in cfg.mult]
        last = len(widths) - 1
        skips = [w]                            # the channels of a, b, ...
        c = w                                  # the channels of the feature map at this point
        self.down = nn.ModuleList()
        for i, c_out in enumerate(widths):
            ins = [c] + [c_out] * (cfg.blocks - 1)
            skips += [c_out] * cfg.blocks
            shrink = None
            if i < last:
                shrink = nn.Conv2d(c_out, c_out, 3, stride=2)
                skips.append(c_out)
            self.down.append(Level(ins, c_out, 2 * d, cfg.image_size >> i, shrink, cfg))
            c = c_out
        self.mid_block1 = ResBlock(c, c, 2 * d, cfg)
        self.mid_attn = Attention(c, cfg)
        self.mid_block2 = ResBlock(c, c, 2 * d, cfg)
        up = []
        for i, c_out in reversed(list(enumerate(widths))):
            ins = []
            for _ in range(cfg.blocks + 1):
                ins.append(c + skips.pop())
                c = c_out
            grow = nn.Conv2d(c_out, c_out, 3, padding=1) if i > 0 else None
            up.append(Level(ins, c_out, 2 * d, cfg.image_size >> i, grow, cfg))
        self.up = nn.ModuleList(reversed(up))      # up[i] and down[i] work at the same resolution
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.channels, 3, padding=1)
        zero(self.conv_out)
        self.register_buffer("alphas_cumprod", linear_schedule()[1].float(), persistent=False)
        self.register_buffer("null", torch.tensor(cfg.classes), persistent=False)

    def forward(self, x, t, y):
        half = self.cfg.width // 2
        freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=x.device))
        angles = t.float()[:, None] * freqs
        with autocast(x.device):                   # weights, losses and samplers stay float32
            emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], 1))
            label_emb = 0
            for i, (table, label_mlp) in enumerate(zip(self.label_embs, self.label_mlps)):
                label_emb = label_emb + label_mlp(table(y[:, i]))
            emb = F.silu(torch.cat([emb, label_emb], 1))

            h = self.conv_in(x)
            skips = [h]
            for level in self.down:
                for block, attn in zip(level.blocks, level.attns):
                    h = attn(block(h, emb))
                    skips.append(h)
                if level.resample is not None:
                    h = level.resample(F.pad(h, (0, 1, 0, 1)))     # right and bottom, as in SalUn
                    skips.append(h)
            h = self.mid_block2(self.mid_attn(self.mid_block1(h, emb)), emb)
            for level in reversed(self.up):
                for block, attn in zip(level.blocks, level.attns):
                    h = attn(block(torch.cat([h, skips.pop()], 1), emb))
                if level.resample is not None:
                    h = level.resample(F.interpolate(h, scale_factor=2, mode="nearest"))
            return self.conv_out(F.silu(self.norm_out(h))).float()

# bf16 only where the hardware multiplies it: elsewhere it is slower than float32
CPU_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()         # not in older PyTorch
CPU_BF16 = bool(CPU_FEATURES.get("avx512_bf16") or CPU_FEATURES.get("amx_bf16"))

def uses_bf16(device):
    return device.type == "cuda" or device.type == "cpu" and CPU_BF16

def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device))

# ---- checkpoints and files -----------------------------------------------------------------------

def save_checkpoint(path, model, info):
    """Weights, config and info in one file. info: dataset, names (a list per label factor),
    conditions (the labels that the data have), preset, forgotten (a list of (factor, value)),
    made_by (a dict with stage and settings)."""
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    save_file(path, "unet", {**info, "config": asdict(model.cfg), "weights": weights})

def load_checkpoint(path, device="cpu"):
    """(model in eval mode and channels_last, info as in save_checkpoint) of a file or folder. A
    UNet that you have changed fails here with PyTorch's list of the weights that do not fit."""
    info = load_file(checkpoint_file(path), "unet")
    info.setdefault("conditions", all_labels(info["names"]).tolist())
    config = info.pop("config")
    weights = info.pop("weights")
    model = UNet(UNetConfig(**config))
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.to(device, memory_format=torch.channels_last).eval(), info

def checkpoint_file(path):
    """The checkpoint in a run folder; any other path is a checkpoint's own."""
    path = Path(path)
    return path / "model.pt" if path.is_dir() else path

def shipped(name):
    """The path of a file in assets/, from the current folder if it lies below that."""
    path = Path(__file__).resolve().parent / "assets" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

def save_file(path, kind, data, **advice):
    """Tensors and plain values in one file; kind is "unet", "classifier", "training", "images"."""
    buffer = io.BytesIO()                      # on a full disk torch.save raises no OSError
    torch.save({**data, "kind": kind, "format": 2}, buffer)
    write_file(path, lambda tmp: tmp.write_bytes(buffer.getbuffer()), **advice)

def load_file(path, kind):
    """What save_file wrote, without running any code in the file; one line if it is not that."""
    require(Path(path).is_file(), f"no such file: {path}; make a model with 'python train_ddpm.py'")
    advice = (f"{path} is no whole {kind} file of this project; delete it and make it again (a "
              "public SalUn checkpoint is converted by 'python train_ddpm.py --import')")
    with explain(advice, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
        with zipfile.ZipFile(path) as archive:         # torch.load does not look at the checksums
            damaged = archive.testzip()
            has_data = any(name.endswith("data.pkl") for name in archive.namelist())
        require(has_data and damaged is None, advice)
        data = torch.load(path, map_location="cpu", weights_only=True)
    ours = isinstance(data, dict) and data.get("kind") == kind and data.get("format") == 2
    require(ours, advice)
    return data

def write_file(path, write, advice="free some space, or write elsewhere with --out"):
    """Call write(temporary path), then rename: a kill leaves the old file or the new one, whole.
    advice: what helps where it cannot be written."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain(f"cannot write {path}; {advice}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(tmp)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)

def write_text(path, text):
    write_file(path, lambda tmp: tmp.write_text(text, "utf-8", "replace"))

def run_folder(base, flag="--out"):
    """Make a folder for a run: `base`, or where that exists base-2, base-3, ... Whoever makes a
    folder owns it: two runs of one name never share one. flag: what names the folder."""
    base = Path(base)
    require(base.name not in ("", ".."), f"'{base}' is no folder of its own; try {flag} run")
    folder = base
    n = 1
    with explain(f"the folder {base} cannot be made; name one that you may write with {flag}",
                 OSError):
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                n += 1
                folder = base.with_name(f"{base.name}-{n}")
    if n > 1:
        say(f"{base} exists: this run goes into {folder}")
    atexit.register(remove_if_empty, folder)
    return folder

def remove_if_empty(folder):
    """A run that was stopped before it wrote anything leaves its folder's name free."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

# ---- pictures ------------------------------------------------------------------------------------

FONT = ImageFont.load_default(size=13)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")

def to_uint8(x):
    """[-1, 1] floats -> uint8 0..255 of the same shape."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def to_pictures(images):
    """A list of Pillow pictures of images (N, 1 or 3, H, W), uint8 or in [-1, 1]."""
    if images.dtype != torch.uint8:
        images = to_uint8(images)
    arrays = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]

def draw_grid(images, columns, rows=(), heads=(), scale=2):
    """A picture of images (N, C, H, W), uint8 or in [-1, 1], row by row, each pixel enlarged to
    scale x scale; rows and heads: the names of the rows and of the columns."""
    height, width = images.shape[2:]
    cell_w = width * scale + 2
    cell_h = height * scale + 2
    left = 8 + max(int(FONT.getlength(name)) for name in rows) if rows else 0
    top = 18 if heads else 0
    n_rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (left + columns * cell_w, top + n_rows * cell_h), "white")
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(to_pictures(images)):
        x = left + i % columns * cell_w
        y = top + i // columns * cell_h
        tile = picture.resize((width * scale, height * scale), Image.NEAREST)
        canvas.paste(tile, (x + 1, y + 1))
    for i, name in enumerate(rows):
        draw.text((4, top + (i + 0.5) * cell_h), name, "black", FONT, anchor="lm")
    for i, name in enumerate(heads):
        draw.text((left + i * cell_w + 2, 2), name[:cell_w // 6], "black", FONT)
    return canvas

def save_picture(canvas, path):
    write_file(path, lambda tmp: canvas.save(tmp, "PNG"))

def save_grid(images, path, columns, **options):
    save_picture(draw_grid(images, columns, **options), path)

def round_ticks(low, high):
    """At most seven multiples of 1, 2 or 5 times a power of ten that span low to high."""
    if low == high:
        high = low + 1
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * k for k in (1, 2, 5, 10) if high - low <= 5 * power * k)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]

def save_plot(path, panels, xlabel, ylabel, top=0):
    """A PNG of line plots, side by side and with the same axes, each with its legend below.
    panels: {title: {name: (xs, ys)}}; top: what the axis of y reaches at least."""
    curves = [curve for panel in panels.values() for curve in panel.values()]
    heights = [y for xs, ys in curves for y in ys]
    x_ticks = round_ticks(0, max(max(xs) for xs, ys in curves))
    y_ticks = round_ticks(min(0, *heights), max(top, *heights))
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = 350 + 20 * max(map(len, panels.values()))
    canvas = Image.new("RGB", (columns * 440, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, panel) in enumerate(panels.items()):
        left = i % columns * 440 + 70                  # of the axes
        above = i // columns * height + 50

        def place(x, y):
            right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
            down = (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0])
            return left + 350 * right, above + 240 * down

        def text(x, y, words, anchor):
            draw.text((x, y), words, "black", FONT, anchor=anchor)

        text(left, above - 42, title, "la")
        text(left - 64, above - 24, ylabel, "la")
        text(left + 175, above + 272, xlabel, "ma")
        for x in x_ticks:
            px, py = place(x, y_ticks[0])
            draw.line([(px, py), place(x, y_ticks[-1])], "#dddddd")
            text(px, py + 10, f"{x:g}", "ma")
        for y in y_ticks:
            px, py = place(x_ticks[0], y)
            draw.line([(px, py), place(x_ticks[-1], y)], "#dddddd")
            text(px - 12, py, f"{y:.4g}", "rm")
        for k, (name, (xs, ys)) in enumerate(panel.items()):
            color = COLORS[names.index(name) % len(COLORS)]
            points = [place(x, y) for x, y in zip(xs, ys)]
            draw.line(points, color, width=2)
            legend = above + 302 + 20 * k
            draw.line([(left, legend), (left + 30, legend)], color, width=2)
            text(left + 40, legend, name[:48], "lm")
            rings = [*points, (left + 15, legend)] if len(panel) > 1 else []
            for x, y in rings:                         # of different sizes: curves may coincide
                size = 2 + 1.5 * k
                draw.ellipse((x - size, y - size, x + size, y + size), None, color, width=2)
    save_picture(canvas, path)

# ---- labels --------------------------------------------------------------------------------------

def all_labels(names):
    """Labels (N, F): every combination of values, the first factor slowest."""
    return torch.cartesian_prod(*(torch.arange(len(n)) for n in names)).view(-1, len(names))

def matches(y, pairs):
    """Which of the labels y (N, F) carry one of the pairs [(factor, value), ...]: bool (N,)."""
    found = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for factor, value in pairs:
        found |= y[:, factor] == value
    return found

def matches_alone(y, pairs, forgotten):
    """Which of the labels y (N, F) carry one of the pairs, and nothing else that is forgotten."""
    others = [pair for pair in forgotten if pair not in pairs]
    return matches(y, pairs) & ~matches(y, others)

def plain(name):
    """A name in the form in which names are compared: of one spelling for an accented letter, in
    small letters, without spaces around."""
    return unicodedata.normalize("NFC", name).casefold().strip()

def find_value(text, names, flag):
    """The index of a value: exactly its name, else its name in another spelling (`plain`) or its
    number; fails if it is neither, or may be two."""
    found = [i for i, name in enumerate(names) if name == text]
    if not found:
        found = [i for i, name in enumerate(names) if plain(name) == plain(text) or str(i) == text]
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    require(found, f"{flag} {text} is none of: {listed}")
    require(len(found) == 1, f"{flag} {text} may mean several of: {listed}")
    return found[0]

def find_pairs(args, names, prefix=""):
    """The sorted (factor, value) pairs that the flags --cls and --style, after a prefix, name."""
    pairs = set()
    for factor, flag in enumerate(FACTORS):
        for text in getattr(args, prefix + flag) or []:
            require(factor < len(names), "these data have no styles; leave the flag out")
            pairs.add((factor, find_value(text, names[factor], f"--{flag}")))
    return sorted(pairs)

def pairs_text(pairs, names):
    """For people: "cls square, style neon"."""
    return ", ".join(f"{FACTORS[f]} {names[f][v]}" for f, v in pairs)

def pairs_slug(pairs):
    """For paths: "cls1-style4"."""
    return "-".join(f"{FACTORS[f]}{v}" for f, v in pairs)

# ---- command line --------------------------------------------------------------------------------

def fail(message):
    """End the program for a mistake that the user can mend: one line, exit code 2."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def require(condition, message):
    """Go on if the condition holds, else fail."""
    if not condition:
        fail(message)

@contextmanager
def explain(message, *errors):
    """Fail with the message where the block raises one of these errors. Name only errors that a
    user can mend: any other is a mistake in the code, and keeps its traceback."""
    try:
        yield
    except errors as e:
        reason = str(e).splitlines() or [type(e).__name__]
        fail(f"{message} ({reason[0][:100]})")

def say(*words, end="\n"):
    """print. Where standard output cannot be written (its disk is full, or "| head" has seen
    enough), the run goes on."""
    try:
        print(*words, end=end, flush=True)
    except OSError as e:
        sys.stdout = open(os.devnull, "w")
        with suppress(OSError):                        # "2>&1 | head" takes both
            print(f"standard output is lost ({e}); the run goes on without it", file=sys.stderr)

def run(main):
    """main() on the command line. What a user did, or can mend, ends without a traceback; a mistake
    in the code keeps its own."""
    if hasattr(sys.stdout, "reconfigure"):             # for names that the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        fail("the memory is full; close other programs, or give a smaller --batch-size")

def make_parser(doc):
    """argparse with the script's docstring as its help, and errors of one line."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see 'python {parser.prog} --help'")
    return parser

def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"number ({kind.__name__} from {low} to {high})"      # argparse's word for it
    return parse

def value_flags(flag, use, prefix=""):
    """Add the flags --cls and --style, after a prefix, which find_pairs reads. use: for the help."""
    for factor, values in zip(FACTORS, ("classes", "styles")):
        flag(f"--{prefix}{factor}", nargs="+", action="extend", metavar="K",
             help=f"{values} {use}, by name or number")

def pick_device(name):
    """A torch.device from "auto" (cuda, else cpu), "cpu", "cuda:1", "mps", ..."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"device '{name}' cannot be used here; try --device cpu",
                 RuntimeError, AssertionError):
        probe = torch.zeros(1, device=name)
        probe.item()                                   # "meta" has a device, but no numbers
    return probe.device

def compile_network(model):
    """torch.compile in place; one line where there is no compiler."""
    def probe(x):
        return x + 1

    with explain("--compile finds no compiler that works; leave it out",
                 torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(probe)(torch.zeros(2, device=model.null.device))
    model.compile()

def progress(items, label, total, start=0, losses=False):
    """Yield the items, after the first `start` of `total`. With a label, show rate and time left, and
    each item's value where they are losses: in one line on a terminal, else now and then."""
    began = shown = time.time()
    tty = sys.stdout.isatty()
    for n, item in enumerate(items, start + 1):
        yield item
        now = time.time()
        pause = 0.5 if tty else max(10, (now - began) / 2)
        if label is None or now - shown < pause:
            continue
        shown = now
        rate = (n - start) / (now - began)
        minutes = (total - n) / rate / 60
        loss = f"  loss {item.item():.4f}" if losses else ""
        line = f"{label}: {n}/{total}{loss}  {rate:.1f}/s  {minutes:.1f} min left"
        if tty:
            say(f"\r{line:<79}", end="")
        else:
            say(line)
    if label and tty:
        say("\r" + " " * 79 + "\r", end="")

def main():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("ckpt", metavar="CKPT", type=path,
         help="a checkpoint or a run folder")
    value_flags(flag, "to draw (default all)")
    flag("--unlabelled", action="store_true",
         help="ask for nothing: the null label, no guidance")
    flag("--n", type=number(int, 1), default=1,
         help="images of each class in each style, or without a label (1)")
    flag("--sampler", choices=("ddim", "ddpm"), default="ddim",
         help="50 steps (default) or all")
    flag("--seed", type=number(int, 0, 2 ** 31), default=0,
         help="of the noise (default 0)")
    flag("--png", metavar="DIR", type=path,
         help="also write every image as a file of its own")
    flag("--out", metavar="DIR", type=path,
         help="of the grid; default runs/<dataset>/samples")
    flag("--device", default="auto",
         help="auto (cuda, else cpu), cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    model, info = load_checkpoint(args.ckpt, pick_device(args.device))
    names = info["names"]
    chosen = find_pairs(args, names)
    y = torch.tensor(info["conditions"]).repeat_interleave(args.n, 0)
    for factor in range(len(names)):
        values = [pair for pair in chosen if pair[0] == factor]
        if values:
            y = y[matches(y, values)]
    require(len(y), f"the data of this model have no {pairs_text(chosen, names)} together")
    first = pairs_text(enumerate(y[0].tolist()), names)
    last = pairs_text(enumerate(y[-1].tolist()), names)
    shown = f"{first} to {last}, row by row"
    guidance = 2.0
    if args.unlabelled:
        require(not chosen, "--unlabelled asks for nothing: leave --cls and --style out")
        y = model.null.expand(args.n, -1)
        shown = "without a label"
        guidance = 0
    folder = run_folder(args.out or Path("runs", info["dataset"], "samples"))
    images = sample(model, y, sampler=args.sampler, guidance=guidance, seed=args.seed,
                    label="samples")
    columns = 10 if args.unlabelled else max(args.n, 10)
    save_grid(images, folder / "samples.png", columns=min(len(y), columns))
    say(f"wrote {folder}/samples.png: {len(y)} images, {shown}")
    if args.png:
        files = run_folder(args.png, "--png")
        for i, picture in enumerate(to_pictures(images)):
            save_picture(picture, files / f"{i:05}.png")
        say(f"wrote {len(y)} files into {files}")

if __name__ == "__main__":
    run(main)
