"""The diffusion model: noise schedule, loss, guidance, samplers, U-Net; checkpoints and pictures.

    python model.py assets/shapes.pt                                    # every class in every style
    python model.py assets/shapes.pt --cls square --style neon --n 16   # one condition
    python model.py runs/shapes/dimum-cls1 --sampler ddpm               # all 1,000 ancestral steps
    python model.py assets/shapes.pt --n 20 --png samples               # files, for any FID tool

Symbols are those of DDPM (Ho et al. 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t =
`alphas_cumprod[t]`. Labels `y` are a LongTensor (B, F): column 0 the class, column 1 the style. The
label row `model.null` means "no condition" (guidance, Ho & Salimans 2207.12598).
"""
import argparse
import math
import os
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

T = 1000                        # diffusion steps
FACTORS = ("cls", "style")      # the columns of y

# ---- diffusion -----------------------------------------------------------------------------------

def linear_schedule():
    """DDPM's betas from 1e-4 to 0.02 and alphas_cumprod, each (T,) and float64."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return betas, torch.cumprod(1 - betas, 0)

def antithetic_times(n, device):
    """n times in 0..T-1, in pairs t and T-1-t: a loss of lower variance (DDIM's public code)."""
    t = torch.randint(0, T, (n // 2 + 1,), device=device)
    return torch.cat([t, T - 1 - t])[:n]

def add_noise(model, x0, t, eps):
    """x_t (B, C, H, W) for times t (B,), and the target that the network learns: eps, or v."""
    a = model.alphas_cumprod[t][:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    return x_t, eps if model.cfg.prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0

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
    return (model(x_t, t, drop_labels(y, model, p_drop)) - target).square().mean((1, 2, 3))

def guided_output(model, x_t, t, y, guidance):
    """(1 + w) network(y) - w network(null) as one batch; w = 0 costs one branch only. (The public
    unlearning code's weighting: w = 2 there is a scale of 3 elsewhere.)"""
    if guidance == 0:
        return model(x_t, t, y)
    both = torch.cat([y, model.null.expand_as(y)])
    cond, uncond = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return (1 + guidance) * cond - guidance * uncond

def split_output(model, out, x_t, a):
    """x_0 and eps from the network's output at x_t; a = alphas_cumprod[t], a number."""
    if model.cfg.prediction == "v":
        return a ** 0.5 * x_t - (1 - a) ** 0.5 * out, a ** 0.5 * out + (1 - a) ** 0.5 * x_t
    return (x_t - (1 - a) ** 0.5 * out) / a ** 0.5, out

def ddpm_posterior():
    """Factors of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM equation 7): each (T,)."""
    betas, a = linear_schedule()
    a_prev = F.pad(a[:-1], (1, 0), value=1.0)
    return a_prev.sqrt() * betas / (1 - a), (1 - betas).sqrt() * (1 - a_prev) / (1 - a)

def ddpm_sample(model, x, y, guidance, generator):
    """x_0 by DDPM's T ancestral steps from noise x. The variance is beta_t ("fixedlarge") and x_0
    is clamped to [-1, 1], as in the public code."""
    betas, a = (s.tolist() for s in linear_schedule())
    coef_x0, coef_xt = (s.tolist() for s in ddpm_posterior())
    for t in reversed(range(T)):
        out = guided_output(model, x, torch.full((len(x),), t, device=x.device), y, guidance)
        x0, _ = split_output(model, out, x, a[t])
        x = coef_x0[t] * x0.clamp(-1, 1) + coef_xt[t] * x
        if t > 0:
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = x + betas[t] ** 0.5 * noise
    return x

def ddim_sample(model, x, y, guidance, steps):
    """x_0 by `steps` deterministic steps from noise x, at evenly spaced times from 0 (DDIM, Song et
    al. 2010.02502 equation 12 with sigma 0). x_0 is not clamped, as in the public code."""
    a = linear_schedule()[1].tolist() + [1.0]          # a[-1] belongs to x_0
    times = [i * T // steps for i in reversed(range(steps))]
    for t, t_next in zip(times, times[1:] + [-1]):
        out = guided_output(model, x, torch.full((len(x),), t, device=x.device), y, guidance)
        x0, eps = split_output(model, out, x, a[t])
        x = a[t_next] ** 0.5 * x0 + (1 - a[t_next]) ** 0.5 * eps
    return x

@torch.inference_mode()
def sample(model, y, steps=50, sampler="ddim", guidance=2.0, seed=0, batch=50, label=None):
    """Images (B, C, H, W) in [-1, 1] for labels y (B, F); `steps` is for "ddim" only; `label`
    shows progress. Image i depends on seed and i, not on other labels: two models asked with one
    seed start from the same noise."""
    device, size, training, images = model.null.device, model.cfg.image_size, model.training, []
    generator, batches = torch.Generator(device).manual_seed(seed), y.to(device).split(batch)
    model.eval()
    for labels in progress(batches, label, len(batches)):
        shape = len(labels), model.cfg.channels, size, size
        x = torch.randn(shape, generator=generator, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        if sampler == "ddim":
            x = ddim_sample(model, x, labels, guidance, steps)
        else:
            x = ddpm_sample(model, x, labels, guidance, generator)
        images.append(x.clamp(-1, 1).contiguous())
    model.train(training)
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
    mult = cfg.mult + cfg.mult[-1:] * int(math.log2(image_size // 32))
    return replace(cfg, image_size=image_size, channels=channels, classes=tuple(classes), mult=mult)

def zero(layer):
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

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
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))
        zero(self.proj)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                          # (B, H*W, C)
        return x + self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]))

class Level(nn.Module):
    """One resolution on one side of the U: blocks, attention, the convolution that leaves."""
    def __init__(self, widths, c_out, d, resolution, resample, cfg):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c, c_out, d, cfg) for c in widths)
        attn = Attention if resolution in cfg.attention else nn.Identity       # takes any arguments
        self.attns = nn.ModuleList(attn(c_out, cfg) for _ in widths)
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
        w, d = cfg.width, 4 * cfg.width
        self.time_mlp = mlp(w, d)
        self.label_embs = nn.ModuleList(nn.Embedding(n + 1, w) for n in cfg.classes)    # last: null
        self.label_mlps = nn.ModuleList(mlp(w, d) for _ in cfg.classes)
        self.conv_in = nn.Conv2d(cfg.channels, w, 3, padding=1)

        widths = [w * m for m in cfg.mult]
        last = len(widths) - 1
        c, skips, down, up = w, [w], [], []
        for i, c_out in enumerate(widths):
            leave = nn.Conv2d(c_out, c_out, 3, stride=2) if i < last else None
            ins = [c] + [c_out] * (cfg.blocks - 1)
            down.append(Level(ins, c_out, 2 * d, cfg.image_size >> i, leave, cfg))
            skips += [c_out] * (cfg.blocks if i == last else cfg.blocks + 1)
            c = c_out
        self.down = nn.ModuleList(down)
        self.mid_block1, self.mid_attn = ResBlock(c, c, 2 * d, cfg), Attention(c, cfg)
        self.mid_block2 = ResBlock(c, c, 2 * d, cfg)
        for i, c_out in reversed(list(enumerate(widths))):
            ins = [(c if j == 0 else c_out) + skips.pop() for j in range(cfg.blocks + 1)]
            leave = nn.Conv2d(c_out, c_out, 3, padding=1) if i > 0 else None
            up.append(Level(ins, c_out, 2 * d, cfg.image_size >> i, leave, cfg))
            c = c_out
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
            tables = enumerate(zip(self.label_mlps, self.label_embs))
            label_emb = sum(mlp(table(y[:, i])) for i, (mlp, table) in tables)
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
    preset, forgotten (a list of (factor, value)), made_by (a dict with stage and settings)."""
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    save_file(path, "unet", {**info, "config": asdict(model.cfg), "weights": weights})

def load_checkpoint(path, device="cpu"):
    """(model in eval mode and channels_last, info as in save_checkpoint) of a file or folder."""
    path = checkpoint_file(path)
    info = load_file(path, "unet")
    with explain(f"{path} does not fit this code; make it again"):
        model = UNet(UNetConfig(**info.pop("config")))
        model.load_state_dict({k: v.float() for k, v in info.pop("weights").items()})
    return model.to(device, memory_format=torch.channels_last).eval(), info

def checkpoint_file(path):
    """The checkpoint in a run folder; any other path is a checkpoint's own."""
    path = Path(path)
    return path / "model.pt" if path.is_dir() else path

def shipped(name):
    """The path of a file in assets/, from the current folder if it lies below that."""
    path = Path(__file__).resolve().parent / "assets" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

def save_file(path, kind, data):
    write_file(path, lambda tmp: torch.save({**data, "kind": kind, "format": 2}, tmp))

def load_file(path, kind):
    """What save_file wrote, without running any code in the file; one line if it is not that."""
    require(Path(path).is_file(), f"no such file: {path}; make a model with 'python train_ddpm.py'")
    with explain(f"{path} is no whole {kind} file of this project; delete it and make it again (a "
                 "public SalUn checkpoint is converted by 'python train_ddpm.py --import')"):
        data = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:         # torch.load does not look at the checksums
            if archive.testzip() or (data["kind"], data["format"]) != (kind, 2):
                raise ValueError("damaged, or of another kind or version")
    return data

def write_file(path, write):
    """Call write(temporary path), then rename: a kill leaves the old file or the new one, whole."""
    path, tmp = Path(path), Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    with explain(f"cannot write {path}; free some space, or name another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(tmp)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)

def write_text(path, text):
    write_file(path, lambda tmp: tmp.write_text(text, "utf-8", "replace"))

def run_folder(base):
    """A folder for a run: `base`, or where that holds an earlier one base-2, base-3, ..."""
    folder, n = Path(base), 1
    require(folder.name not in ("", ".."), f"'{base}' is no folder of its own; try --out run")
    with explain(f"cannot write into {base}; choose another folder with --out"):
        while any(folder.glob("[!.]*")):               # a hidden file is what a kill left
            n += 1
            folder = Path(f"{base}-{n}")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()     # now, not after an hour
    return folder

# ---- pictures ------------------------------------------------------------------------------------

def to_uint8(x):
    """[-1, 1] floats -> uint8 0..255 of the same shape."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def draw_grid(images, columns, rows=(), heads=(), scale=2):
    """A picture of images (N, C, H, W), uint8 or in [-1, 1], row by row; names of rows, columns."""
    images = (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
    n, _, h, w = images.shape
    cell_w, cell_h = w * scale + 2, h * scale + 2
    left, top = 8 + 7 * max(map(len, rows)) if rows else 0, 16 if heads else 0
    canvas = Image.new("RGB", (left + columns * cell_w, top + -(-n // columns) * cell_h), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images.expand(n, 3, h, w).permute(0, 2, 3, 1).numpy()):
        tile = Image.fromarray(image).resize((w * scale, h * scale), Image.NEAREST)
        canvas.paste(tile, (left + i % columns * cell_w + 1, top + i // columns * cell_h + 1))
    for i, name in enumerate(rows):
        draw.text((4, top + i * cell_h + cell_h // 2 - 6), name, fill="black")
    for i, name in enumerate(heads):
        draw.text((left + i * cell_w + 2, 2), name[:cell_w // 6], fill="black")
    return canvas

def save_grid(images, path, *layout, **options):
    canvas = draw_grid(images, *layout, **options)
    write_file(path, lambda tmp: canvas.save(tmp, "PNG"))

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")

def save_plot(path, series, title, xlabel, top=None):
    """A PNG line plot of {name: (xs, ys)} or {name: (xs, ys, lows, highs)}, which adds a band."""
    heights = chain(*(s[1:] for s in series.values()))
    x_max = max(chain([1], *(s[0] for s in series.values())))
    y_max = top or 1.05 * max(chain([1e-9], *heights))
    canvas = Image.new("RGB", (900, 420), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")

    def line(xs, ys):
        return [(60 + x / x_max * 540, 372 - y / y_max * 338) for x, y in zip(xs, ys)]

    for i in range(6):
        x, y = 60 + 108 * i, 372 - 67.6 * i
        draw.line([(60, y), (600, y)], fill="#dddddd")
        draw.text((8, y - 6), f"{y_max * i / 5:.4g}", fill="black")
        draw.text((x - 10, 378), f"{x_max * i / 5:.0f}", fill="black")
    for i, (name, (xs, ys, *band)) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        if band and len(xs) > 1:
            draw.polygon(line(xs, band[1]) + line(xs, band[0])[::-1], fill=color + "28")
        draw.line(line(xs, ys), fill=color, width=2)
        draw.line([(610, 42 + 16 * i), (628, 42 + 16 * i)], fill=color, width=3)
        draw.text((633, 36 + 16 * i), name[:44], fill="black")
    draw.text((60, 8), title, fill="black")
    draw.text((300, 400), xlabel, fill="black")
    write_file(path, lambda tmp: canvas.save(tmp, "PNG"))

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

def find_value(text, names, flag):
    """The index of a value: exactly its name, else its name in other letters or its number; fails
    if it is neither, or may be two."""
    found = {i for i, n in enumerate(names) if n == text} or {
        i for i, n in enumerate(names) if text.lower() == n.lower() or text == str(i)}
    require(len(found) == 1, f"{flag} {text} {'may mean several' if found else 'is none'} of: "
            + ", ".join(f"{i} {n}" for i, n in enumerate(names)))
    return found.pop()

def find_pairs(args, names, prefix=""):
    """The sorted (factor, value) pairs that the flags --cls and --style, after a prefix, name."""
    pairs = set()
    for factor, name in enumerate(FACTORS):
        asked = getattr(args, prefix + name) or []
        require(factor < len(names) or not asked, "these data have no styles; leave the flag out")
        pairs |= {(factor, find_value(text, names[factor], f"--{name}")) for text in asked}
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
def explain(message):
    """Fail with the message and the error's own first line where the block raises an error."""
    try:
        yield
    except Exception as e:
        fail(f"{message} ({(str(e).splitlines() or [type(e).__name__])[0][:100]})")

def run(main):
    """main() on the command line: Ctrl-C, a closed pipe, a full GPU end it without a traceback."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):             # for names that the terminal cannot show
        sys.stdout.reconfigure(errors="replace", write_through=False)
    try:
        main()
    except BrokenPipeError:                            # "| head" has seen enough
        os._exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
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

def pick_device(name):
    """A torch.device from "auto" (cuda, else mps, else cpu), "cpu", "cuda:1", ..."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    if name == "auto":
        name = next(kind for kind, backend in backends.items() if backend.is_available())
    with explain(f"device '{name}' cannot be used here; try --device cpu"):
        probe = torch.zeros(1, device=name)
        probe.item()                                   # "meta" has a device, but no numbers
        return probe.device

def progress(items, label, total, start=0):
    """Yield the items, after the first `start` of `total`; with a label show rate and time left, in
    one line on a terminal, else now and then, and an item that is a loss."""
    began = shown = time.time()
    tty = sys.stdout.isatty()
    for n, item in enumerate(items, start + 1):
        yield item
        now = time.time()
        if label and now - shown > (0.5 if tty else max(10, (now - began) / 2)):
            shown, rate = now, (n - start) / (now - began)
            loss = "" if item.dim() else f"  loss {item.item():.4f}"
            left = (total - n) / rate / 60
            line = f"{label}: {n}/{total}{loss}  {rate:.1f}/s  {left:.1f} min left"
            print(f"\r{line:<79}" if tty else line, end="" if tty else "\n", flush=True)
    if label and tty:
        print("\r" + " " * 79 + "\r", end="", flush=True)

def main():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("ckpt", metavar="CKPT", type=path, help="a checkpoint or a run folder")
    flag("--cls", nargs="+", metavar="K", help="classes, by name or number; default all")
    flag("--style", nargs="+", metavar="K", help="styles, likewise")
    flag("--n", type=number(int, 1), default=1, help="images of each class in each style (1)")
    flag("--sampler", choices=("ddim", "ddpm"), default="ddim", help="50 steps (default) or all")
    flag("--seed", type=number(int, 0, 2 ** 31), default=0, help="of the noise (default 0)")
    flag("--png", metavar="DIR", type=path, help="also write every image as a file of its own")
    flag("--out", metavar="DIR", type=path, help="of the grid; default runs/<dataset>/samples")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    args = parser.parse_args()
    model, info = load_checkpoint(args.ckpt, pick_device(args.device))
    y = all_labels(info["names"]).repeat_interleave(args.n, 0)
    asked = find_pairs(args, info["names"])
    for factor in {f for f, _ in asked}:
        y = y[matches(y, [pair for pair in asked if pair[0] == factor])]
    folder = run_folder(args.out or Path("runs", info["dataset"], "samples"))
    images = to_uint8(sample(model, y, sampler=args.sampler, seed=args.seed, label="samples")).cpu()
    save_grid(images, folder / "samples.png", columns=min(len(y), max(args.n, 10)))
    first, last = (pairs_text(enumerate(y[i].tolist()), info["names"]) for i in (0, -1))
    print(f"wrote {folder}/samples.png: {len(y)} images, {first} to {last}, row by row")
    if args.png:
        files = run_folder(args.png)
        for i, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
            write_file(files / f"{i:05}.png", lambda tmp: Image.fromarray(image).save(tmp, "PNG"))
        print(f"wrote {len(y)} files into {files}")

if __name__ == "__main__":
    run(main)
