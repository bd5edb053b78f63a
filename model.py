"""Shared machinery: the conditional U-Net, the noise schedule, the loss, two samplers, checkpoints, pictures.

    from model import load_checkpoint, sample, save_grid
    model, info = load_checkpoint("assets/shapes.pt")
    y = torch.tensor([[1, 0], [8, 3]])                 # a flat square and a sketched heart
    save_grid(sample(model, y), "two.png")

Symbols are those of DDPM (Ho et al. 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t =
`alphas_cumprod[t]`. Labels `y` are a LongTensor (B, F): column 0 is the class, column 1 the style. The label row
`model.null` stands for "no condition" (classifier-free guidance, Ho & Salimans 2207.12598).
"""
import argparse
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

try:
    import fcntl
except ImportError:                 # Windows: run folders are not locked there
    fcntl = None

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

T = 1000            # diffusion steps
FORMAT = 1          # version of the checkpoint files
FACTORS = ("cls", "style")


# ---- network ---------------------------------------------------------------------------------------------------

@dataclass
class UNetConfig:
    """Everything that is needed to rebuild the network; saved inside every checkpoint."""
    image_size: int = 32
    channels: int = 3                    # of the image
    classes: tuple = (10, 5)             # number of values of each label factor
    width: int = 32                      # channels at full resolution
    mult: tuple = (1, 2, 2)              # channel multiplier of each resolution, full resolution first
    blocks: int = 1                      # residual blocks per resolution (one more on the way up)
    attention: tuple = (8,)              # resolutions with self-attention (the middle always has it)
    groups: int = 8                      # of GroupNorm
    dropout: float = 0.0
    prediction: str = "v"                # the network's output: "eps" or "v" = sqrt(a) eps - sqrt(1 - a) x_0


PRESETS = {
    # About a million parameters. It predicts v because flat colours are settled at large t, where x_0 computed
    # from eps has its error divided by sqrt(a_t), 1/158 at t = 999.
    "small": UNetConfig(),
    # Layer for layer the network of the public Selective Amnesia, SalUn and SFRon DDPM code.
    "paper": UNetConfig(width=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32, dropout=0.1,
                        prediction="eps"),
}


def make_config(preset, image_size, channels, classes):
    """The preset's UNetConfig for images (channels, image_size, image_size) and these numbers of label values. Every
    doubling of 32 x 32 adds a resolution at the bottom."""
    cfg = PRESETS[preset]
    mult = cfg.mult + cfg.mult[-1:] * int(math.log2(image_size // 32))
    return replace(cfg, image_size=image_size, channels=channels, classes=tuple(classes), mult=mult)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the projected condition. x (B, c_in, H, W), emb (B, d) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d, cfg):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(d, c_out)
        self.norm2 = nn.GroupNorm(cfg.groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)          # every block starts as its shortcut (DDPM's init_scale 0)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x), inplace=not torch.is_grad_enabled()))
        h += self.emb(emb)[:, :, None, None]       # in place: a convolution's output is not needed for its gradient
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=not torch.is_grad_enabled())))
        h += self.shortcut(x)
        return h


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, with 1x1 convolutions for q, k, v and the output."""

    def __init__(self, c, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))      # (B, H*W, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def upsampled_conv(x, conv):
    """conv (3x3) of x doubled by nearest neighbour: x (B, C, H, W) -> (B, C, 2H, 2W), with 4/9 of the multiplications.

    A pixel of the output sees only 2 x 2 different pixels of x, so the two are one transposed convolution of stride 2,
    whose 4x4 kernel is the 3x3 one smeared over 2 x 2. At very low resolutions making that kernel costs more.
    """
    if x.shape[2] < 8:
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    k = F.pad(conv.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    k = k[:, :, 1:, 1:] + k[:, :, 1:, :-1] + k[:, :, :-1, 1:] + k[:, :, :-1, :-1]
    return F.conv_transpose2d(x, k.contiguous(memory_format=torch.channels_last), conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution on one side of the U: residual blocks, attention after each, and the convolution that leaves."""

    def __init__(self, widths, c_out, d, resolution, resample, cfg):
        super().__init__()
        attend = resolution in cfg.attention
        self.blocks = nn.ModuleList(ResBlock(c, c_out, d, cfg) for c in widths)
        self.attns = nn.ModuleList(Attention(c_out, cfg) if attend else nn.Identity() for _ in widths)
        self.resample = resample


class UNet(nn.Module):
    """eps or v (B, C, H, W) from x_t (B, C, H, W), integer times t (B,) in 0..T-1 and labels y (B, F).

    Source: DDPM's network with label conditioning as in the public SalUn code (DDPM/models/diffusion.py there):
    time and label embeddings each pass a two-layer MLP and are concatenated; with several label factors the MLP
    outputs are summed.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        w, d = cfg.width, 4 * cfg.width
        mlp = lambda: nn.Sequential(nn.Linear(w, d), nn.SiLU(), nn.Linear(d, d))
        self.time_mlp = mlp()
        self.label_embs = nn.ModuleList(nn.Embedding(n + 1, w) for n in cfg.classes)     # the last row is "null"
        self.label_mlps = nn.ModuleList(mlp() for _ in cfg.classes)
        self.conv_in = nn.Conv2d(cfg.channels, w, 3, padding=1)

        widths = [w * m for m in cfg.mult]
        last = len(widths) - 1
        c, skips, down, up = w, [w], [], []
        for i, c_out in enumerate(widths):
            leave = nn.Conv2d(c_out, c_out, 3, stride=2) if i < last else None
            ins = [c] + [c_out] * (cfg.blocks - 1)
            down.append(Level(ins, c_out, 2 * d, cfg.image_size >> i, leave, cfg))
            skips += [c_out] * cfg.blocks + ([c_out] if i < last else [])
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
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.register_buffer("alphas_cumprod", linear_schedule()[1].float(), persistent=False)
        self.register_buffer("null", torch.tensor(cfg.classes), persistent=False)

    def forward(self, x, t, y):
        half = self.cfg.width // 2
        freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=x.device))
        angles = t.float()[:, None] * freqs
        time_emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], 1))
        label_emb = sum(m(e(y[:, i])) for i, (e, m) in enumerate(zip(self.label_embs, self.label_mlps)))
        emb = F.silu(torch.cat([time_emb, label_emb], 1))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for block, attn in zip(level.blocks, level.attns):
                h = attn(block(h, emb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(F.pad(h, (0, 1, 0, 1)))       # right and bottom only, as in the reference
                skips.append(h)
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, emb)), emb)
        for level in reversed(self.up):
            for block, attn in zip(level.blocks, level.attns):
                h = attn(block(torch.cat([h, skips.pop()], 1), emb))
            if level.resample is not None:
                h = upsampled_conv(h, level.resample)
        return self.conv_out(F.silu(self.norm_out(h)))


def drop_labels(y, model, p=0.1):
    """y (B, F) with each example's whole label row replaced by the null label with probability p."""
    drop = torch.rand(len(y), 1, device=y.device) < p
    return torch.where(drop, model.null, y)


# ---- diffusion -------------------------------------------------------------------------------------------------

def linear_schedule():
    """DDPM's betas (T,) from 1e-4 to 0.02 and alphas_cumprod (T,), both float64."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return betas, torch.cumprod(1 - betas, 0)


def antithetic_times(n, device):
    """n integer times in 0..T-1, in pairs t and T-1-t, which lowers the variance of the loss (DDIM's public code)."""
    t = torch.randint(0, T, (n // 2 + 1,), device=device)
    return torch.cat([t, T - 1 - t])[:n]


def add_noise(model, x0, t, eps):
    """x_t (B, C, H, W) for times t (B,), and the target the network is trained on (eps, or v)."""
    a = model.alphas_cumprod[t][:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    target = eps if model.cfg.prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0
    return x_t, target


def diffusion_loss(model, x0, y, p_drop=0.1):
    """Each example's loss (B,): the mean over pixels of (target - network)^2 at a random time.

    x0 (B, C, H, W) in [-1, 1], y (B, F); labels are dropped with probability p_drop. Source: DDPM equation 14,
    and Salimans & Ho 2202.00512 for v. (The public unlearning code sums over pixels: C*H*W times this.)
    """
    t = antithetic_times(len(x0), x0.device)
    x_t, target = add_noise(model, x0, t, torch.randn_like(x0))
    with autocast(x0.device):
        out = model(x_t, t, drop_labels(y, model, p_drop))
    return (out.float() - target).square().mean((1, 2, 3))


def guided_output(model, x_t, t, y, guidance):
    """(1 + w) network(y) - w network(null) as one batch; w = 0 costs one branch only.

    The weighting is that of the public unlearning code (w = 2 there is a guidance scale of 3 elsewhere).
    """
    with autocast(x_t.device):
        if guidance == 0:
            return model(x_t, t, y).float()
        null = model.null.expand_as(y)
        cond, uncond = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
    return (1 + guidance) * cond - guidance * uncond


def split_output(model, out, x_t, a):
    """x_0 and eps from the network's output at x_t; a = alphas_cumprod[t], a number."""
    if model.cfg.prediction == "v":
        return a ** 0.5 * x_t - (1 - a) ** 0.5 * out, a ** 0.5 * out + (1 - a) ** 0.5 * x_t
    return (x_t - (1 - a) ** 0.5 * out) / a ** 0.5, out


def ddpm_posterior():
    """q(x_{t-1} | x_t, x_0) for every t (DDPM equations 6-7): coefficients of x_0, of x_t, variance; float64 (T,)."""
    betas, a = linear_schedule()
    a_prev = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
    return (a_prev.sqrt() * betas / (1 - a), (1 - betas).sqrt() * (1 - a_prev) / (1 - a),
            betas * (1 - a_prev) / (1 - a))


def ddim_times(steps):
    """The visited times, largest first, and the one after each (-1 stands for x_0): evenly spaced from 0."""
    times = [i * T // steps for i in reversed(range(steps))]
    return list(zip(times, times[1:] + [-1]))


def ddim_coefficients(a, a_next, eta):
    """DDIM (2010.02502 equations 12 and 16): x_next = sqrt(a_next) x_0 + c eps + sigma noise. Returns c, sigma."""
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    return (1 - a_next - sigma ** 2) ** 0.5, sigma


@torch.inference_mode()
def sample(model, y, steps=50, sampler="ddim", eta=0.0, guidance=2.0, seed=0, batch=50, label=None):
    """Images (B, C, H, W), float in [-1, 1], for labels y (B, F).

    sampler "ddim": `steps` steps with noise share eta. "ddpm": all T ancestral steps with variance beta_t
    ("fixedlarge"), as in the public code; `steps` is ignored. DDPM clamps x_0 to [-1, 1] on the way, DDIM does not,
    again as in the public code. (Clamping x_0 in DDIM and keeping eps was tried: with guidance it leaves noise and
    grey where white should be.) Image i depends on seed and on i, not on the other labels, so two models asked with
    one seed start from the same noise. `label` shows a progress line.
    """
    device, shape = model.null.device, (model.cfg.channels, model.cfg.image_size, model.cfg.image_size)
    training, gen, out = model.training, torch.Generator(device).manual_seed(seed), []
    model.eval()
    betas, a_all = (s.tolist() for s in linear_schedule())
    posterior = [s.tolist() for s in ddpm_posterior()]
    times = ddim_times(steps) if sampler == "ddim" else [(t, t - 1) for t in reversed(range(T))]
    all_t = torch.tensor([t for t, _ in times], device=device)
    bar = Progress(label, math.ceil(len(y) / batch) * len(times), "step")
    for start in range(0, len(y), batch):
        labels = y[start:start + batch].to(device)
        randn = lambda: torch.randn(len(labels), *shape, device=device,
                                    generator=gen).contiguous(memory_format=torch.channels_last)
        x = randn()
        for i, (t, t_next) in enumerate(times):
            output = guided_output(model, x, all_t[i].expand(len(x)), labels, guidance)
            x0, eps = split_output(model, output, x, a_all[t])
            if sampler == "ddim":
                a_next = a_all[t_next] if t_next >= 0 else 1.0
                c, sigma = ddim_coefficients(a_all[t], a_next, eta)
                x = a_next ** 0.5 * x0 + c * eps + (sigma * randn() if sigma > 0 else 0)
            else:
                coef_x0, coef_xt, _ = (s[t] for s in posterior)
                x = coef_x0 * x0.clamp(-1, 1) + coef_xt * x + (betas[t] ** 0.5 * randn() if t > 0 else 0)
            bar.step()
        out.append(x.clamp(-1, 1).contiguous())
    model.train(training)
    bar.close()
    return torch.cat(out)


# ---- devices, errors, progress ---------------------------------------------------------------------------------

def native_bf16():
    """Does this CPU multiply bf16 in hardware? Where it does, a step takes 0.7 and sampling 0.45 of the float32
    time (measured on a 2-core AMD EPYC with avx512_bf16); where it does not, bf16 is slower."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


CPU_BF16 = native_bf16()


def autocast_on(device):
    """Does the network's forward pass run in bf16 there?"""
    return device.type == "cuda" or CPU_BF16


def autocast(device):
    """bf16 for the network's forward pass where the hardware has it; weights, losses and samplers stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast_on(device))


def machine(device):
    """What computes there, and how: "2 CPU threads, float32"."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{where}, {'bf16' if autocast_on(device) else 'float32'}"


def pick_device(name):
    """A torch.device from "auto", "cpu", "cuda"..., or one clear line."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        torch.backends.cudnn.benchmark = True      # shapes repeat: let cuDNN time its algorithms once
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        fail(f"device '{name}' cannot be used here ({str(e).splitlines()[0]}); try --device cpu")


def fail(message):
    """End the program for a mistake that the user can fix: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run_script(main):
    """main(), with Ctrl-C and full memory ending in one line like every other mishap."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: {resume_command()}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:         # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        fail("the memory is full; choose a smaller --batch-size or --samples")


def resume_command():
    """This command, to be pasted, with --resume."""
    command = ["python", *sys.argv]
    return shlex.join(command if "--resume" in command else [*command, "--resume"])


class Parser(argparse.ArgumentParser):
    """argparse whose help is the script's docstring, and whose errors are one line."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False, []) else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        fail(f"{message}; see 'python {self.prog} --help'")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or a float within [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole number' if kind is int else 'a number'} "
                                             f"{limits}")
        return value
    parse.low, parse.high = low, high
    return parse


class Progress:
    """Step, loss, rate and time left on one line; about twenty plain lines when the output is not a terminal."""

    def __init__(self, label, total, unit="step", start=0):
        self.label, self.total, self.unit, self.n, self.first = label, total, unit, start, start
        self.began = self.shown = time.time()
        self.tty = sys.stdout.isatty()

    def due(self):
        """Is it time to show a line? (Ask before fetching a loss from the GPU.)"""
        gap = 0.5 if self.tty else max(10.0, 0.05 * (time.time() - self.began) * self.total / max(self.n, 1))
        return self.label and time.time() - self.shown > gap

    def step(self, text=""):
        self.n += 1
        if self.due():
            self.show(text)

    def show(self, text=""):
        self.shown = time.time()
        rate = (self.n - self.first) / max(self.shown - self.began, 1e-9)
        left = (self.total - self.n) / max(rate, 1e-9)
        line = f"{self.label}: {self.unit} {self.n}/{self.total}  {text}  {rate:.1f}/s  {left / 60:.1f} min left"
        print(f"\r{line:<100}" if self.tty else line, end="" if self.tty else "\n", flush=True)

    def close(self):
        if self.label and self.tty:
            print("\r" + " " * 100 + "\r", end="", flush=True)


# ---- files -----------------------------------------------------------------------------------------------------

def write_file(path, write, required=True):
    """Call write(temporary path), then rename it to path: a kill leaves the old file or the new one, whole."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())                   # so that a power cut cannot leave the new name without its bytes
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        if required:
            fail(f"cannot write {path} ({e.strerror or e}); free some space, or choose another folder with --out")


def save_torch(path, data, required=True):
    """torch.save through memory: its own writer hides the system's reason for a failed write."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_file(path, lambda p: p.write_bytes(buffer.getbuffer()), required)


def write_json(path, data):
    write_file(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n"))


def write_csv(path, rows):
    """rows: a list of dicts with the same keys."""
    lines = [",".join(rows[0])] + [",".join(str(v) for v in row.values()) for row in rows] if rows else []
    write_file(path, lambda p: p.write_text("\n".join(lines) + "\n"))


LOCKS = []          # open descriptors of this process's run folders; the system lets go of them however it ends


def claim(folder):
    """Make the folder and lock it for this process; False if another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as e:
        fail(f"cannot write into {folder} ({e.strerror}); choose another folder with --out")
    if fcntl:
        LOCKS.append(os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(LOCKS.pop())
            return False
        except OSError:             # a file system without locks
            pass
    for leftover in folder.glob(".*.tmp"):         # of a killed process
        leftover.unlink()
    return True


def run_folder(out, default, resume=False):
    """The folder for a run, locked. An existing run is never overwritten: a new one takes the next free name, saying
    so. resume: the newest unfinished one; a finished one ends the program."""
    base = Path(out or default)
    name = lambda n: base if n == 1 else Path(f"{base}-{n}")
    if not resume:
        n = 1
        while not claim(name(n)) or any(name(n).iterdir()):
            n += 1
        if n > 1:
            state = "a finished" if (base / "result.json").is_file() else "an unfinished"
            print(f"{base} holds {state} run, which is kept; this one goes to {name(n)}")
        return name(n)
    n = 1
    while name(n + 1).is_dir():
        n += 1
    runs = [name(i) for i in range(1, n + 1)]
    unfinished = [folder for folder in runs if not (folder / "result.json").is_file()]
    if not unfinished:
        print(f"{runs[-1]} is finished: there is nothing to resume")
        sys.exit(0)
    if not claim(unfinished[-1]):
        fail(f"another process is working in {unfinished[-1]}; wait until it ends, or choose another folder with --out")
    return unfinished[-1]


def save_checkpoint(path, model, info, half=False):
    """Weights, config and provenance in one file. info: at least `dataset` and `names` (a list per label factor)."""
    weights = {k: v.detach().cpu().half() if half else v.detach().cpu().clone() for k, v in model.state_dict().items()}
    data = {"format": FORMAT, "kind": "unet", "config": asdict(model.cfg), "weights": weights, **info}
    save_torch(path, data)


def load_verified(path):
    """What torch.load finds in a file, without running any code in it; ValueError if the file is not whole."""
    try:
        with zipfile.ZipFile(path) as archive:     # torch.load does not look at the checksums in the file
            if archive.testzip():
                raise ValueError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError,
            OSError, KeyError, AttributeError, ImportError) as e:
        raise ValueError(str(e)) from e


def read_file(path, kind):
    """A dict saved by this project, read without running any code in it; one clear line if it is not one."""
    if not Path(path).is_file():
        fail(f"no such file: {path}; make a model with 'python train_ddpm.py', or name another with --ckpt")
    try:
        data = load_verified(path)
    except ValueError:
        fail(f"{path} is truncated, damaged or not a checkpoint of this project; copy or make it again")
    if not isinstance(data, dict) or data.get("kind") != kind:
        hint = "; if it is from the public SalUn code, convert it with 'python train_ddpm.py --import FILE'"
        fail(f"{path} is not a {kind} checkpoint of this project{hint if kind == 'unet' else ''}")
    if not data.get("format", 0) <= FORMAT:
        fail(f"{path} has format {data['format']}, this code reads up to {FORMAT}; update the code")
    return data


def shipped(name):
    """The path of a checkpoint that ships with the code, from the current folder where that is above it."""
    path = Path(__file__).parent / "assets" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def model_file(run):
    """The checkpoint in a run folder; any other path is a checkpoint's own."""
    return Path(run, "model.pt") if Path(run).is_dir() else Path(run)


def load_checkpoint(path, device="cpu"):
    """(model in eval mode and channels_last, info) from a file of save_checkpoint."""
    data = read_file(path, "unet")
    try:
        cfg = UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.pop("config").items()})
        model = UNet(cfg)
        model.load_state_dict({k: v.float() for k, v in data.pop("weights").items()})
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as e:
        fail(f"{path} does not fit this code's network ({str(e).splitlines()[0]}); train or convert it again")
    return model.to(device, memory_format=torch.channels_last).eval(), data


def fingerprint(*things):
    """SHA-256 over tensors, networks (their weights) and plain values."""
    digest = hashlib.sha256()
    for thing in things:
        for part in thing.state_dict().values() if isinstance(thing, nn.Module) else [thing]:
            if isinstance(part, torch.Tensor):
                digest.update(repr((part.dtype, part.shape)).encode())
                part = part.detach().cpu().contiguous().numpy().tobytes()
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def cached(compute, *inputs):
    """compute()'s tensors and plain values, kept in runs/cache under the fingerprint of all that they depend on."""
    path = Path("runs", "cache", f"{fingerprint(*inputs)}.pt")
    try:
        return load_verified(path)
    except ValueError:
        value = compute()
        save_torch(path, value, required=False)
        return value


def forgotten_values(info):
    """{factor index: [value, ...]} that the model of load_checkpoint's info has forgotten; {} for an original one."""
    return {i: info["forgotten"][name] for i, name in enumerate(FACTORS) if info.get("forgotten", {}).get(name)}


# ---- pictures --------------------------------------------------------------------------------------------------

def to_uint8(x):
    """[-1, 1] floats -> uint8 0..255 of the same shape."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=None, rows=(), heads=(), scale=2):
    """A PNG of images (N, C, H, W) in [-1, 1] or uint8, row by row, with names for rows and column heads."""
    images = (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    cell_w, cell_h = w * scale + 2, h * scale + 2
    left = 8 + 7 * max(map(len, rows)) if rows else 0
    top = 16 if heads else 0
    canvas = Image.new("RGB", (left + columns * cell_w, top + math.ceil(n / columns) * cell_h), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images.expand(n, 3, h, w).permute(0, 2, 3, 1).numpy()):
        tile = Image.fromarray(image).resize((w * scale, h * scale), Image.NEAREST)
        canvas.paste(tile, (left + i % columns * cell_w + 1, top + i // columns * cell_h + 1))
    for i, name in enumerate(rows):
        draw.text((4, top + i * cell_h + cell_h // 2 - 6), name, fill="black")
    for i, name in enumerate(heads):
        draw.text((left + i * columns * cell_w // len(heads) + 2, 2), name, fill="black")
    write_file(path, lambda p: canvas.save(p, "PNG"))


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f", "#a50026", "#6a3d9a",
          "#8b5a2b", "#b2df00")


def save_plot(path, series, title, xlabel, ylabel, y_range=None):
    """A PNG line plot. series: {name: (xs, ys)} or {name: (xs, ys, lows, highs)} with a shaded band."""
    high, left, right, top, bottom = 420, 64, max(180, 44 + 6 * max(map(len, series))), 34, 48      # right: the names
    wide = 580 + right
    points = [v for s in series.values() for ys in s[1:] for v in ys if v is not None]
    xs = [x for s in series.values() for x in s[0]]
    lo, hi = y_range or (min(points + [0]), max(points + [1e-9]) * 1.05)
    x_lo, x_hi = min(xs), max(max(xs), min(xs) + 1)
    place = lambda x, y: (left + (x - x_lo) / (x_hi - x_lo) * (wide - left - right),
                          high - bottom - (min(max(y, lo), hi) - lo) / (hi - lo) * (high - top - bottom))
    canvas = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")
    for i in range(6):
        x, y = x_lo + (x_hi - x_lo) * i / 5, lo + (hi - lo) * i / 5
        draw.line([place(x_lo, y), place(x_hi, y)], fill="#dddddd")
        draw.text((6, place(x_lo, y)[1] - 6), f"{y:.3g}", fill="black")
        draw.text((place(x, lo)[0] - 10, high - bottom + 6), f"{x:.0f}", fill="black")
    for i, (name, (xs, ys, *band)) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        if band:
            outline = [place(x, y) for x, y in zip(xs, band[1])] + [place(x, y) for x, y in zip(xs, band[0])][::-1]
            if len(xs) > 1:
                draw.polygon(outline, fill=color + "28")
        line = [place(x, y) for x, y in zip(xs, ys) if y is not None]
        draw.line(line, fill=color, width=2)
        for px, py in line:
            draw.ellipse([px - 2, py - 2, px + 2, py + 2], fill=color)
        draw.line([(wide - right + 10, top + 8 + 16 * i), (wide - right + 28, top + 8 + 16 * i)], fill=color, width=3)
        draw.text((wide - right + 33, top + 2 + 16 * i), name, fill="black")
    draw.text((left, 8), title, fill="black")
    draw.text((left + (wide - left - right) // 2 - 20, high - 20), xlabel, fill="black")
    draw.text((6, top - 18), ylabel, fill="black")
    write_file(path, lambda p: canvas.save(p, "PNG"))
