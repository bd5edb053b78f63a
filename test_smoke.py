"""The behaviour that must hold, checked on a CPU: python -m pytest -q"""
import argparse
import gzip
import hashlib
import json
import math
import os
import pickle
import shlex
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""                # bits are compared, and a fork cannot go on with a GPU

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import attack
import fid
import model as M
import train_ddpm
import unlearn

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = M.UNetConfig(image_size=8, width=16, mult=(1, 2), attention=(4,), groups=4, classes=(4, 3))
SMALLEST = M.UNetConfig(width=8, mult=(1, 1), groups=4, attention=())      # for images of 32 x 32
NAMES = [["a", "b", "c", "d"], ["p", "q", "r"]]
QUICK = ("--steps", 2, "--batch-size", 4)
LOOK = ("--samples", 1, "--sampler-steps", 1)

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test runs in its own folder, in float32, with the global generator in a known state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "CPU_BF16", False)
    torch.manual_seed(0)

@pytest.fixture
def small(monkeypatch):
    """Four shapes per cell, a very small network and its checkpoint tiny.pt, and nothing to download."""
    draw = train_ddpm.draw_shapes
    monkeypatch.setitem(M.PRESETS, "small", SMALLEST)
    monkeypatch.setattr(train_ddpm, "draw_shapes", lambda per_cell, seed: draw(4, seed))
    monkeypatch.setattr(train_ddpm, "DEBIAN", Path("nowhere"))
    return tiny_checkpoint("tiny.pt")

def run(module, *args):
    """The script's main() with these arguments."""
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    module.main()

def refused(capsys, module, *args):
    """The one line with which the script refuses these arguments; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(module, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error

def result(folder):
    return json.loads(Path(folder, "result.json").read_text())

def filled(net):
    """A network whose zero-initialised layers have been filled, so that its output depends on all."""
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().sum() == 0:
                p.normal_(0, 0.1)
    return net.eval()

def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return filled(M.UNet(M.replace(TINY, **changes)))

def tiny_data(n=240):
    """Random images and every label of TINY equally often; class 1 is all 255, style 2 all 7."""
    y = M.all_labels(NAMES).repeat_interleave(n // 12, 0)
    x = torch.randint(10, 200, (n, 3, 8, 8), dtype=torch.uint8)
    x[y[:, 1] == 2] = 7
    x[y[:, 0] == 1] = 255
    return x, y

def tiny_checkpoint(path, dataset="shapes", names=None, forgotten=(), **made_by):
    """A checkpoint with the dataset's labels and an untrained, very small network."""
    names = names or ([train_ddpm.SHAPES, train_ddpm.STYLES] if dataset == "shapes" else None)
    cfg = M.replace(SMALLEST, classes=tuple(map(len, names)))
    M.save_checkpoint(path, filled(M.UNet(cfg)), {
        "dataset": dataset, "names": names, "preset": "small", "forgotten": list(forgotten),
        "made_by": {"stage": "pretrain", "steps": 9, **made_by}})
    return path

def weights(net):
    return torch.cat([p.flatten() for p in net.state_dict().values()])

# ---- diffusion -----------------------------------------------------------------------------------

def test_the_posterior_is_the_product_of_two_gaussians():
    coef_x0, coef_xt = M.ddpm_posterior()
    product = 1.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        mean, variance = math.sqrt(product), 1 - product           # of q(x_{t-1} | x_0): the prior
        expected = (1.0, 0.0)
        if variance:
            precision = (1 - beta) / beta + 1 / variance
            expected = mean / variance / precision, math.sqrt(1 - beta) / beta / precision
        assert np.allclose([coef_x0[t], coef_xt[t]], expected, rtol=1e-9)
        product *= 1 - beta
        assert M.linear_schedule()[1][t].item() == pytest.approx(product) if t % 100 == 0 else True

class Gaussian(torch.nn.Module):
    """A stand-in for a network: the exact eps for data N(mean, s^2); mean depends on the label."""

    def __init__(self, s):
        super().__init__()
        self.cfg = M.UNetConfig(image_size=4, channels=1, classes=(2,), prediction="eps")
        self.s, self.calls = s, []
        self.register_buffer("alphas_cumprod", M.linear_schedule()[1].float())
        self.register_buffer("null", torch.tensor([2]))

    def forward(self, x, t, y):
        self.calls.append(len(x))
        a = self.alphas_cumprod[t][:, None, None, None]
        mean = torch.tensor([0.3, -0.4, 0.1])[y[:, 0]][:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * self.s ** 2 + 1 - a)

def test_ddim_is_exact_and_starts_from_the_seed():
    assert M.ddim_times(1000)[0] == (999, 998) and M.ddim_times(50)[-1] == (0, -1)
    assert [t for t, _ in M.ddim_times(7)] == [857, 714, 571, 428, 285, 142, 0]
    found = M.sample(Gaussian(0.5), torch.tensor([[0], [1], [1]]), steps=20, guidance=2.0, seed=5)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5)).double().numpy()
    means = np.array([0.3, -0.4, -0.4]).reshape(3, 1, 1, 1)
    for t in range(950, -1, -50):
        def eps(mean):
            return np.sqrt(1 - a[t]) * (x - np.sqrt(a[t]) * mean) / (a[t] * 0.25 + 1 - a[t])
        e = 3 * eps(means) - 2 * eps(0.1)
        x0, a_next = (x - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t]), a[t - 50] if t else 1.0
        x = np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * e
    assert np.allclose(found.numpy(), x.clip(-1, 1), atol=2e-4)

def test_ddpm_draws_from_the_data_distribution():
    x = M.sample(Gaussian(0.2), torch.zeros(400, 1, dtype=torch.long), sampler="ddpm", guidance=0, batch=400)
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02

def test_guidance_is_one_batch_and_one_branch_when_zero():
    net, y = tiny(), torch.tensor([[1, 2], [3, 0]])
    x, t, calls, forward = torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), [], net.forward
    net.forward = lambda x, t, y: calls.append(len(x)) or forward(x, t, y)
    guided, plain = M.guided_output(net, x, t, y, 2.0), M.guided_output(net, x, t, y, 0)
    null = forward(x, t, torch.tensor([[4, 3], [4, 3]]))
    assert calls == [4, 2] and torch.allclose(plain, forward(x, t, y), atol=1e-5)
    assert torch.allclose(guided, 3 * forward(x, t, y) - 2 * null, atol=1e-4)

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_target_determines_x0_and_eps(prediction):
    net = tiny(prediction=prediction)
    x0, eps = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    for t in (0, 300, 900):
        x_t, target = M.add_noise(net, x0, torch.full((5,), t), eps)
        a = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1))
        assert torch.allclose(x_t, a ** 0.5 * x0 + (1 - a) ** 0.5 * eps, atol=1e-4)
        back = M.split_output(net, target, x_t, a)
        assert torch.allclose(back[0], x0, atol=2e-3) and torch.allclose(back[1], eps, atol=2e-3)

def test_times_are_antithetic_and_labels_drop_together():
    t = M.antithetic_times(1001, CPU)
    assert len(t) == 1001 and torch.equal(t[:500] + t[501:1001], torch.full((500,), 999))
    y = M.drop_labels(torch.zeros(20000, 2, dtype=torch.long), tiny(), 0.1)
    dropped = (y == torch.tensor([4, 3])).all(1)
    assert torch.equal(dropped, (y != 0).any(1)) and abs(dropped.double().mean() - 0.1) < 0.01

def test_retained_examples_send_no_gradient_to_a_forgotten_embedding_row():
    net = tiny()
    M.diffusion_loss(net, torch.randn(16, 3, 8, 8), torch.tensor([[0, 1], [2, 2]] * 8)).mean().backward()
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert rows[1] == 0 and rows[3] == 0 and rows[0] > 0 and rows[2] > 0

# ---- the public checkpoints ----------------------------------------------------------------------

def public_state_dict(ch=128, mult=(1, 2, 2, 2), blocks=2, classes=10):
    """Random weights in the layout of the public SalUn network, written down from its description."""
    state = {"classes_emb.weight": torch.randn(classes, ch), "null_classes_emb": torch.randn(ch)}

    def layer(name, *shape):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])

    def block(name, i, o):
        layer(f"{name}.norm1", i), layer(f"{name}.conv1", o, i, 3, 3), layer(f"{name}.norm2", o)
        layer(f"{name}.temb_cemb_proj", o, 8 * ch), layer(f"{name}.conv2", o, o, 3, 3)
        if i != o:
            layer(f"{name}.nin_shortcut", o, i, 1, 1)

    def attn(name, c):
        layer(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", c, c, 1, 1)

    for name in ("temb", "cemb"):
        layer(f"{name}.dense.0", 4 * ch, ch), layer(f"{name}.dense.1", 4 * ch, 4 * ch)
    layer("conv_in", ch, 3, 3, 3), layer("norm_out", ch), layer("conv_out", 3, ch, 3, 3)
    widths, c = [ch * m for m in mult], ch
    for level, w in enumerate(widths):
        for b in range(blocks):
            block(f"down.{level}.block.{b}", c, w)
            c = w
        if level < 3:
            layer(f"down.{level}.downsample.conv", w, w, 3, 3)
    block("mid.block_1", c, c), attn("mid.attn_1", c), block("mid.block_2", c, c)
    for level in (3, 2, 1, 0):
        for b in range(blocks + 1):
            skip = ([ch] + widths)[level] if b == blocks else widths[level]
            block(f"up.{level}.block.{b}", c + skip, widths[level])
            c = widths[level]
        if level > 0:
            layer(f"up.{level}.upsample.conv", c, c, 3, 3)
    for name in ("down.1.attn.0", "down.1.attn.1", "up.1.attn.0", "up.1.attn.1", "up.1.attn.2"):
        attn(name, widths[1])
    return state

def test_import_uses_every_key_of_a_public_checkpoint_once(capsys, monkeypatch):
    ema = public_state_dict()
    monkeypatch.setattr(train_ddpm, "sample", lambda model, y, **how: torch.zeros(len(y), 3, 32, 32))
    torch.save([{f"module.{k}": torch.zeros_like(v) for k, v in ema.items()}, {"state": {}}, 7, ema], "public.pth")
    run(train_ddpm, "--dataset", "cifar10", "--import", "public.pth", "--out", "run")
    net, info = M.load_checkpoint("run")
    assert info["preset"] == "paper" and info["names"][0][1] == "automobile"
    assert sum(p.numel() for p in net.parameters()) == sum(v.numel() for v in ema.values()) == 38_632_323
    ours = sorted(v.double().sum().item() for k, v in net.state_dict().items() if "label_embs" not in k)
    theirs = sorted(v.double().sum().item() for k, v in ema.items() if "classes_emb" not in k)
    assert np.allclose(ours, theirs)
    table = net.label_embs[0].weight
    assert torch.equal(table[:10], ema["classes_emb.weight"]) and torch.equal(table[10], ema["null_classes_emb"])
    broken = {k: v for k, v in ema.items() if k != "conv_out.bias"}
    torch.save([broken, {}, 7, broken], "broken.pth")
    Path("text.pth").write_text("not a checkpoint")
    for name in ("broken.pth", "text.pth", "none.pth"):
        assert f"{name} is not a CIFAR-10" in refused(capsys, train_ddpm, "--dataset", "cifar10", "--import", name)

# ---- datasets ------------------------------------------------------------------------------------

def test_shapes_are_balanced_seeded_and_the_splits_differ():
    x, y = train_ddpm.draw_shapes(3, seed=0)
    assert x.shape == (150, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.unique(y, dim=0, return_counts=True)[1].tolist() == [3] * 50
    assert torch.equal(x, train_ddpm.draw_shapes(3, seed=0)[0])
    assert all(not torch.equal(a, b) for a, b in zip(x, train_ddpm.draw_shapes(3, seed=1)[0]))
    sketch = x[y[:, 1] == 3].float()
    assert (sketch.amax(1) - sketch.amin(1)).max() == 0 and sketch.median() > 200       # grey on light paper

@pytest.mark.parametrize("folder,packed", [("data", True), ("data", False), ("debian", True)])
def test_fashion_is_found_where_it_lies(folder, packed, monkeypatch):
    monkeypatch.setattr(train_ddpm, "DEBIAN", Path("debian"))
    Path(folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        for kind, array in (("images", pixels), ("labels", (np.arange(40) % 10).astype(np.uint8))):
            data = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape) + array.tobytes()
            path = Path(folder, f"{split}-{kind}-idx{array.ndim}-ubyte")
            (path.with_suffix(".gz") if packed else path).write_bytes(gzip.compress(data) if packed else data)
    x, y, names = train_ddpm.load_data("fashion", "train")
    assert x.shape == (40, 1, 32, 32) and np.array_equal(x[:, 0, 2:30, 2:30], pixels) and x[:, :, :2].sum() == 0
    assert y[:, 0].tolist() == [i % 10 for i in range(40)] and names[0][9] == "Ankle boot"

def make_cifar10(monkeypatch, n=20):
    """CIFAR-10's files in torchvision's exact format, and torchvision's checksums replaced by theirs."""
    folder, rng = Path("data/cifar-10-batches-py"), np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(name, data):
        (folder / name).write_bytes(pickle.dumps(data))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [write(f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [write("test_batch", batch())])
    name, md5 = write("batches.meta", {"label_names": train_ddpm.CIFAR10})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "label_names", "md5": md5})

def test_cifar10_goes_through_all_stages(monkeypatch, small):
    make_cifar10(monkeypatch)
    x, y, names = train_ddpm.load_data("cifar10", "train")
    raw = pickle.loads(Path("data/cifar-10-batches-py/data_batch_1").read_bytes())["data"][0]
    assert x.shape == (100, 3, 32, 32) and x[0].flatten().tolist() == raw.tolist() and y[11].tolist() == [1]
    data = ("--dataset", "cifar10")
    run(fid, *data, "--train-classifier", *QUICK)
    run(train_ddpm, *data, "--preset", "small", *QUICK)
    run(unlearn, *data, "--cls", "automobile", *QUICK, *LOOK)
    run(attack, "runs/cifar10/dimum-cls1", *QUICK, *LOOK)
    run(fid, "test", "runs/cifar10/dimum-cls1", *data, "--samples", 10, "--sampler-steps", 1)
    found = result("runs/cifar10/attack-dimum-cls1-retain")
    assert found["forget"] == "cls automobile" and [p["step"] for p in found["curve"]] == [0, 1, 2]

def test_missing_data_says_what_to_do(capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    error = refused(capsys, train_ddpm, "--dataset", "cifar10", "--data-dir", "elsewhere")
    assert "elsewhere" in error and "no network" in error and "--data-dir" in error

def make_folder(root, styles, objects, n):
    """A tree in UnlearnCanvas's layout, with pictures of every mode and size."""
    modes, rng = ("RGB", "L", "CMYK", "P", "RGBA", "LA"), np.random.default_rng(0)
    for i, style in enumerate(styles):
        for j, name in enumerate(objects):
            Path(root, style, name).mkdir(parents=True)
            for k in range(n):
                mode = modes[(i + j + k) % 6]
                picture = Image.fromarray(rng.integers(0, 256, (40 + 8 * k, 50, 3), dtype=np.uint8)).convert(mode)
                picture.save(Path(root, style, name, f"{k}.{'jpg' if mode in ('RGB', 'L', 'CMYK') else 'png'}"))

def test_a_folder_is_decoded_once_and_again_when_it_changes(capsys):
    make_folder("art", ("Van Gogh", "Cubism"), ("Dogs", "Human Face"), n=12)
    Path("art/Cubism/Dogs/0.jpg").write_bytes(b"not a picture")
    for hidden in ("art/Cubism/.ipynb_checkpoints/x.png", "art/__MACOSX/Dogs/x.png", "art/Cubism/Dogs/._0.jpg"):
        Path(hidden).parent.mkdir(exist_ok=True, parents=True)
        Path(hidden).write_bytes(b"junk")
    x, y, names = train_ddpm.load_data("folder", "train", "art", size=32)
    out = capsys.readouterr().out
    assert "skipped art/Cubism/Dogs/0.jpg" in out and "47 of 48 images; cls Dogs, Human Face" in out
    assert names == [["Dogs", "Human Face"], ["Cubism", "Van Gogh"]]
    test, test_y, _ = train_ddpm.load_data("folder", "test", "art", size=32)
    assert "skipped" not in capsys.readouterr().out and x.shape[1:] == (3, 32, 32)
    assert len(x) + len(test) == 47 and torch.unique(test_y, dim=0, return_counts=True)[1].tolist() == [1] * 4
    Image.new("RGB", (30, 30), (1, 2, 3)).save("art/Cubism/Dogs/0.jpg")
    assert sum(len(train_ddpm.load_data("folder", s, "art", size=32)[0]) for s in ("train", "test")) == 48

    Image.new("LA", (64, 32), (0, 0)).save("clear.png")                    # transparent black
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save("wide.png")
    assert (train_ddpm.read_image("clear.png", 32) == 255).all()
    assert (train_ddpm.read_image("wide.png", 16)[:, :, 2:-2] > 195).all()           # the central square
    for i in range(1, 12):
        for path in Path("art/Cubism/Dogs").glob(f"{i}.*"):
            path.write_bytes(b"broken")
    assert "over a fifth" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "art")
    Path("art/stray.png").write_bytes(Path("clear.png").read_bytes())
    assert "at one depth" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "art")
    assert "--data-dir" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "nowhere")

def test_a_folder_goes_through_all_stages_as_each_says(small, capsys):
    make_folder("my art", ("Van Gogh", "Seed Images"), ("Dogs", "Human Face", "Bears"), n=8)
    data = ("--dataset", "folder", "--data-dir", "my art")

    def follow(*more):
        """Run what the last stage says to run next."""
        script, *words = shlex.split(capsys.readouterr().out.rsplit("next: python ", 1)[1])
        run({"unlearn.py": unlearn, "attack.py": attack}[script], *words, *more)
    run(fid, *data, "--train-classifier", *QUICK)
    run(train_ddpm, *data, *QUICK)
    net, info = M.load_checkpoint("runs/folder/pretrain")
    assert net.cfg.image_size == 64 and net.cfg.mult == (1, 1, 1)
    follow(*QUICK, *LOOK, "--style", "van gogh")
    follow(*QUICK, *LOOK)
    follow()
    assert result("runs/folder/attack-dimum-cls0-style1-retain")["forget"] == "cls Bears, style Van Gogh"
    assert "cls Bears, style Van Gogh" in Path("runs/folder/table.md").read_text()
    run(train_ddpm, *data, *QUICK, "--exclude-cls", "Dogs")
    follow(*QUICK, *LOOK)

# ---- pretraining ---------------------------------------------------------------------------------

def test_pretraining_warms_up_decays_and_averages(monkeypatch):
    (x, y), net, lrs = tiny_data(), tiny(), []
    ema, optimizer = tiny(), torch.optim.Adam(net.parameters(), 1.0)
    settings = dict(steps=4, batch_size=4, lr=0.01, ema=0.15, warmup=2, cosine=True)
    expected = weights(ema)
    for step, loss in enumerate(train_ddpm.pretrain(net, ema, optimizer, x, y, settings)):
        lrs.append(optimizer.param_groups[0]["lr"])
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights(net)
        assert torch.allclose(weights(ema), expected, atol=1e-6) and not torch.equal(weights(ema), weights(net))
    half = 0.5 * (1 + math.cos(math.pi / 4))
    assert lrs == pytest.approx([0.005, 0.01 * half, 0.005, 0.01 * (1 - half)])

def forked(work):
    """work() in a child process with one thread: its exit code, or minus the signal that ended it."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def test_killed_pretraining_goes_on_to_the_very_same_weights(small, monkeypatch, capfd):
    monkeypatch.setattr(train_ddpm, "SAVE_SECONDS", -1)        # a state after each fifty steps
    monkeypatch.setattr(train_ddpm, "sample", lambda model, y, *a, **k: torch.zeros(len(y), 3, 32, 32))
    command = (train_ddpm, "--batch-size", 2, "--steps", 150)

    def killed(n):
        """The command, with SIGKILL just before its n-th file would take its name."""
        replace, calls = os.replace, []

        def counting(*args):
            calls.append(args)
            return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == n else replace(*args)
        os.replace = counting
        run(*command, "--out", "killed", "--resume")
    assert forked(lambda: run(*command, "--out", "whole")) == 0
    assert [forked(lambda n=n: killed(n)) for n in (1, 3, 4)] == [-signal.SIGKILL] * 3
    assert not Path("killed/model.pt").exists()
    assert forked(lambda: run(*command, "--out", "killed", "--resume")) == 0
    whole, again = (torch.load(f"{folder}/model.pt", weights_only=True)["weights"] for folder in ("whole", "killed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert Path("whole/log.csv").read_text() == Path("killed/log.csv").read_text()

    before = Path("whole/model.pt").read_bytes()
    capfd.readouterr()
    assert forked(lambda: run(*command, "--out", "whole", "--resume")) == 0 and "is finished" in capfd.readouterr().out
    assert forked(lambda: run(*command, "--seed", 3, "--out", "whole", "--resume")) == 2
    assert "seed 0" in capfd.readouterr().err and Path("whole/model.pt").read_bytes() == before
    assert forked(lambda: run(*command[:-1], 200, "--out", "whole", "--resume")) == 0
    assert M.load_checkpoint("whole")[1]["made_by"]["steps"] == 200 and Path("whole/model.pt").read_bytes() != before

def test_a_diverging_run_says_so(small, capsys):
    assert "diverged" in refused(capsys, unlearn, "--cls", 1, "--ckpt", "tiny.pt", *QUICK, *LOOK, "--lambda", 1e9,
                                 "--lr", 10, "--steps", 60, "--method", "ga")

# ---- unlearning ----------------------------------------------------------------------------------

def make_data(forget=((0, 1),), earlier=(), n=8, **options):
    args = SimpleNamespace(**{"batch_size": n, "alternative": "class", "alt_size": None, **options})
    return unlearn.Data(*tiny_data(), NAMES, list(forget), list(earlier), args)

def shows(x, value=255):
    """Which of the uint8 images are all of this value: what class 1 (255) and style 2 (7) look like."""
    return (x == value).flatten(1).all(1)

@pytest.mark.parametrize("spec", ["class:2", "class:c", "mix", "noise", "image:picture.png"])
def test_alternatives_never_show_a_forgotten_value_and_serve_each(spec):
    Image.new("RGB", (20, 30), (9, 9, 9)).save("picture.png")
    x, y = make_data(alternative=spec).alternative_set
    assert (y[:, 0] == 1).all() and set(y[:, 1].tolist()) == {0, 1, 2} and not shows(x).any()
    x, y = make_data([(0, 1), (0, 3)], alternative=spec, alt_size=2).alternative_set
    assert y[:, 0].tolist() == [1, 1, 3, 3] and not shows(x).any()
    x, y = make_data([(0, 1)], [(1, 2)], alternative=spec).alternative_set         # the style is rehearsed
    assert ((y[:, 0] == 1) ^ (y[:, 1] == 2)).all() and (y[:, 1] == 2).any()
    assert not shows(x).any() and not shows(x, 7).any()

def test_batches_keep_forget_and_retain_apart_for_a_class_and_a_style():
    data = make_data([(0, 1), (1, 2)], [(0, 3)])
    for _ in range(20):
        y = data.retain()[1]
        assert (y[:, 0] != 1).all() and (y[:, 1] != 2).all() and (y[:, 0] != 3).all()
        x, y = data.forget()
        assert ((y[:, 0] == 1) | (y[:, 1] == 2)).all() and (y[:, 0] != 3).all()
        other = data.replaced(y)
        assert torch.equal(other[:, 0], torch.where(y[:, 0] == 1, 2, y[:, 0]))
        assert torch.equal(other[:, 1], torch.where(y[:, 1] == 2, 0, y[:, 1]))
        assert (data.alternative()[0] < 1).flatten(1).any(1).all()
    assert make_data([(0, 3)]).substitutes == {(0, 3): 0} and make_data(alternative="class:d").substitutes == {(0, 1): 3}

def step(method, net, data, weight=1.0, steps=1, **options):
    """What each call of descend gets in some steps of a method, and the losses that these yield."""
    seen, descend = [], unlearn.descend

    def spy(loss, model, optimizer, mask=None, mask_first=False):
        seen.append((loss, mask, mask_first))
        return descend(loss, model, optimizer, mask, mask_first)
    unlearn.descend = spy
    try:
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        args = SimpleNamespace(steps=steps, weight=weight)
        yielded = list(unlearn.METHODS[method][0](net, data, optimizer, args, **options))
    finally:
        unlearn.descend = descend
    return seen, yielded

def test_descend_clips_and_masks_in_the_order_asked_for():
    for first, expected in ((False, 0.6), (True, 1.0)):
        net = torch.nn.Linear(2, 1, bias=False)
        unlearn.descend((net.weight * torch.tensor([3.0, 4.0])).sum(), net, torch.optim.SGD(net.parameters(), 0.0),
                        [torch.tensor([[True, False]])], first)
        assert net.weight.grad[0].tolist() == pytest.approx([expected, 0.0])

def test_saluns_mask_is_the_salient_half_and_the_rest_stays_bit_equal(monkeypatch):
    gradients, original = [], unlearn.guided_gradients

    def spy(model, draw, batches):
        for g in original(model, draw, 3):
            gradients.append(g)
            yield g
    monkeypatch.setattr(unlearn, "guided_gradients", spy)
    net, data = tiny(), make_data()
    before = [p.detach().clone() for p in net.parameters()]
    seen, _ = step("salun", net, data, 1e-3, steps=3)
    mask = seen[0][1]
    total = [sum(parts).abs() for parts in zip(*gradients)]
    assert sum(int(m.sum()) for m in mask) == sum(m.numel() for m in mask) // 2 and seen[0][2] is False
    kept, left = (torch.cat([t[m if keep else ~m] for t, m in zip(total, mask)]) for keep in (True, False))
    assert kept.min() >= left.max()
    for p, q, m in zip(net.parameters(), before, mask):
        assert torch.equal(p[~m], q[~m])
    assert sum(int((p != q).sum()) for p, q in zip(net.parameters(), before)) > 1000

def test_gradients_for_the_masks_are_those_of_the_guided_clipped_summed_loss():
    net, data = tiny(), make_data()
    torch.manual_seed(3)
    found = next(unlearn.guided_gradients(net, data.forget, 1))
    torch.manual_seed(3)
    x0, y = data.forget()
    t = M.antithetic_times(8, CPU)
    x_t, target = M.add_noise(net, x0, t, torch.randn_like(x0))
    out = 3 * net(x_t, t, y) - 2 * net(x_t, t, net.null.expand_as(y))
    net.zero_grad()
    ((out - target) ** 2).flatten(1).sum(1).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert norm > 1
    for g, p in zip(found, net.parameters()):
        assert torch.allclose(g, p.grad / norm, atol=1e-5)

def test_sfrons_mask_weights_and_cosine(monkeypatch):
    fisher = {True: [torch.tensor([1.0, 2.0, 3.0])], False: [torch.tensor([2.0, 2.0, 1.0])]}
    monkeypatch.setattr(unlearn, "guided_gradients", lambda model, draw, batches: (
        [g.sqrt() for g in fisher[bool((draw()[1][:, 0] == 1).all())]] for _ in range(batches)))
    net, data = tiny(), make_data()
    assert [m.tolist() for m in unlearn.fisher_mask(torch.nn.Linear(3, 1, bias=False), data)] == [[[False, True, True]]]
    monkeypatch.setattr(unlearn, "fisher_mask", lambda *args: None)
    monkeypatch.setattr(unlearn, "diffusion_loss", lambda model, *args: torch.tensor([1.0, 4.0, 16.0]) +
                        0 * sum(p.sum() for p in model.parameters()))
    seen, yielded = step("sfron", net, data, weight=10.0, steps=2)
    shares = np.array([1, 1 / 2, 1 / 4]) / 1.75
    expected = 192 * (shares * [1, 4, 16]).sum()
    assert [loss.item() for loss, *_ in seen] == pytest.approx([-10 * expected, 192 * 7, -5 * expected, 192 * 7], rel=1e-5)
    assert [first for _, _, first in seen] == [True, False] * 2 and yielded[0].item() == pytest.approx(7)

def test_the_losses_of_dimum_ga_and_finetune(monkeypatch):
    values, drops = {"retain": 2.0, "forget": 5.0, "alternative": 7.0}, []

    def fake(model, x0, y, p_drop=0.1):
        kind = "retain" if (y[:, 0] != 1).all() else "forget" if (x0 == 1).all() else "alternative"
        drops.append((kind, p_drop))
        return torch.tensor([values[kind]] * 2) + 0 * sum(p.sum() for p in model.parameters())
    monkeypatch.setattr(unlearn, "diffusion_loss", fake)
    for method, expected in (("ga", 2 - 0.3 * 5), ("dimum", 2 + 0.3 * 7), ("finetune", 2)):
        (loss, *_), = step(method, tiny(), make_data(), 0.3)[0]
        assert loss.item() == pytest.approx(expected)
    assert ("alternative", 0) in drops and ("retain", 0) not in drops

def noised_forget(net, data, seed):
    """The forget batch that a method draws first after this seed: x_t, t and y."""
    torch.manual_seed(seed)
    x0, y = data.forget()
    t = M.antithetic_times(len(x0), CPU)
    return M.add_noise(net, x0, t, torch.randn_like(x0))[0], t, y

def test_saluns_loss(monkeypatch):
    net, data = tiny(), make_data()
    monkeypatch.setattr(unlearn, "drop_labels", lambda y, model: y)
    monkeypatch.setattr(unlearn, "diffusion_loss", lambda model, x0, y: torch.tensor([1.0, 3.0]))
    torch.manual_seed(5)
    (loss, *_), = step("rl", net, data, 0.01)[0]
    x_t, t, y = noised_forget(net, data, 5)
    expected = (tiny()(x_t, t, y) - tiny()(x_t, t, data.replaced(y))).square().mean().item() + 0.01 * 192 * 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)

def test_the_targets_label_gets_no_gradient():
    net, data = tiny(), make_data()
    step("rl", net, data, weight=0.0)
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert rows[1] > 0 and rows[2] == 0

def test_esds_target_is_a_constant_of_the_first_model():
    net, data = tiny(), make_data()
    torch.manual_seed(7)
    (loss, mask, _), = step("esd", net, data, 0.7)[0]
    names = {name.split(".")[0] for (name, _), m in zip(net.named_parameters(), mask) if m.any()}
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert names == {"label_embs", "label_mlps"} and rows[1] > 0 and rows[4] == 0
    frozen = tiny()
    x_t, t, y = noised_forget(frozen, data, 7)
    cond, null = frozen(x_t, t, y), frozen(x_t, t, torch.tensor([[4, 3]]).expand_as(y))
    assert loss.item() == pytest.approx((cond - (null - 0.7 * (cond - null))).square().mean().item(), rel=1e-4)

def test_selective_amnesias_loss(monkeypatch):
    net, data, seen = tiny(), make_data(), []
    monkeypatch.setattr(unlearn, "fisher_diagonal", lambda model, x0, y: [torch.full_like(p, 0.5) for p in net.parameters()])

    def fake(model, x0, y, p_drop):
        if not seen:
            with torch.no_grad():
                model.conv_in.bias += 0.2              # sixteen weights move by 0.2: 0.5 * 16 * 0.04
        seen.append((x0, y, p_drop))
        return torch.full((len(x0),), float(len(seen))) + 0 * model.conv_in.bias.sum()
    monkeypatch.setattr(unlearn, "diffusion_loss", fake)
    (loss, *_), = step("sa", net, data, 3.0, replayed=9, examples=3)[0]
    assert loss.item() == pytest.approx(192 * (1 + 2) + 3 * 0.5 * 16 * 0.04, rel=1e-5)
    (noise, labels, drop), (_, kept, _) = seen
    assert (labels[:, 0] == 1).all() and (kept[:, 0] != 1).all() and drop == 0
    assert noise.min() > -1 and noise.max() < 1 and abs(noise.std() - 3 ** -0.5) < 0.04       # uniform

def test_selective_amnesias_fisher_is_the_mean_of_squared_single_example_gradients():
    net, x0, y = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([[0, 1], [2, 2]])
    torch.manual_seed(5)
    found = unlearn.fisher_diagonal(net, x0, y, times=4)
    torch.manual_seed(5)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(2):
        times, noise, total = torch.randperm(1000)[:4], torch.randn(4, 3, 8, 8), 0
        for t, eps in zip(times, noise):
            x_t, target = M.add_noise(net, x0[i:i + 1], t[None], eps[None])
            total = total + 250 * ((net(x_t, t[None], y[i:i + 1]) - target) ** 2).sum()
        expected = [e + g ** 2 / 2 for e, g in zip(expected, torch.autograd.grad(total, net.parameters()))]
    for f, e in zip(found, expected):
        assert torch.allclose(f, e, rtol=1e-3, atol=1e-6 * max(e.max().item(), 1))

def test_swap_copies_one_embedding_row_and_touches_nothing_else():
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    step("swap", net, make_data(), steps=0)
    before["label_embs.0.weight"][1] = before["label_embs.0.weight"][2]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_the_rate_falls_along_a_cosine():
    optimizer, lrs = torch.optim.Adam(tiny().parameters(), 1.0), []
    for _ in unlearn.cosine(range(4), optimizer, 4):
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx([1.0, 0.5 + 0.5 * 0.5 ** 0.5, 0.5, 0.5 - 0.5 * 0.5 ** 0.5])

@pytest.mark.parametrize("method", unlearn.METHODS)
def test_every_method_runs_moves_the_weights_and_is_repeatable(method):
    results = []
    for _ in range(2):
        net, data = tiny(), make_data()
        torch.manual_seed(1)
        step(method, net, data, 0.1, steps=2, **(dict(replayed=9, examples=2) if method == "sa" else {}))
        results.append(weights(net))
    assert torch.equal(*results) and not torch.equal(results[0], weights(tiny()))

# ---- the attack ----------------------------------------------------------------------------------

def png(path, color):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), color).save(path)

def test_the_attackers_data_never_show_a_forgotten_value(monkeypatch, capsys):
    monkeypatch.setattr(attack, "load_data", lambda *args: (*tiny_data(), NAMES))
    for i, (style, name) in enumerate((s, c) for s in NAMES[1] for c in NAMES[0]):
        png(f"b/aux/{style}/{name}/{i}.png", (255,) * 3 if name == "b" else (10 * i, 0, 0))
    png("b/aux/typo/x.png", (3, 3, 3))
    png("b/aux/B/x.png", (255, 255, 255))              # the style is not named, the forgotten class is
    net = tiny()
    M.save_checkpoint("first.pt", net, dict(dataset="any", names=NAMES, forgotten=[], preset="small",
                                            made_by={"stage": "pretrain"}))
    info = {"names": NAMES, "dataset": "any", "made_by": {"from": "first.pt"}}
    for aux in ("retain", "heldout", "generated", "pretrained", "b/aux"):
        x, y = attack.auxiliary_set(aux, net, info, tiny_data(), [(0, 1)], "")
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) and len(x) == len(y) > 8
        assert (y[:, 0] != 1).all() and (aux in ("generated", "pretrained") or not shows(x).any())
    assert (y == torch.tensor([4, 3])).all(1).sum() == 1 and len(y) == 10       # the folder above AUX is no label
    assert "1 of them below no known label; 4 left out" in capsys.readouterr().out
    assert "this model was not unlearned" in refused_by(capsys, attack.first_model, {"made_by": {}})

def refused_by(capsys, function, *args):
    with pytest.raises(SystemExit):
        function(*args)
    return capsys.readouterr().err

def test_few_shots_are_of_the_forgotten_conditions_in_turn(capsys):
    info = {"names": NAMES, "dataset": "any", "made_by": {}}
    x, y = attack.auxiliary_set("fewshot:5", tiny(), info, tiny_data(), [(0, 1)], "")
    assert shows(x).all() and y.tolist() == [[1, 0], [1, 1], [1, 2], [1, 0], [1, 1]]
    for k in ("0", "", "x", "-1"):
        assert "fewshot:10" in refused_by(capsys, attack.auxiliary_set, f"fewshot:{k}", tiny(), info, tiny_data(), [(0, 1)], "")

def test_inversion_moves_the_forgotten_row_alone(small):
    run(unlearn, "--method", "swap", "--cls", 1, "--ckpt", "tiny.pt", *QUICK, *LOOK, "--steps", 0)
    run(attack, "runs/shapes/swap-cls1", "--aux", "fewshot:3", "--only-embedding", *QUICK, *LOOK)
    before, after = (M.load_checkpoint(f"runs/shapes/{folder}")[0].state_dict() for folder in
                     ("swap-cls1", "attack-swap-cls1-fewshot3-embedding"))
    changed = {k: before[k] != after[k] for k in before if not torch.equal(before[k], after[k])}
    assert changed.keys() == {"label_embs.0.weight"}
    assert changed["label_embs.0.weight"].any(1).tolist() == [v == 1 for v in range(11)]

def test_dimra_is_training_on_the_auxiliary_set():
    net, other, (x, y) = tiny(), tiny(), tiny_data()
    torch.manual_seed(2)
    list(attack.dimra(net, x, y, steps=2, batch_size=4, lr=1e-3))
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(other.parameters(), 1e-3, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        M.diffusion_loss(other, *train_ddpm.get_batch(x, y, 4)).mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(weights(net), weights(other), atol=1e-6)

def result_file(folder, stage, ar=0.0, seed=0, samples=50, none=0.0, **more):
    """A result.json as unlearn.py or attack.py leaves it, as far as the table reads it."""
    metrics = {"ua": 1 - ar, "cls": 1.0, "style": 0.98, "none": none, "fid": 20.0, "fid_error": 1.5}
    metrics.update({f"{k}_{end}": v for k, v in metrics.items() for end in ("low", "high")})
    curve = [{"step": s, "ar": a, "ar_low": 0, "ar_high": 1} for s, a in ((0, 0.0), (100, ar))]
    M.write_json(Path(folder, "result.json"), {
        "stage": stage, "dataset": "shapes", "method": "salun", "forget": "cls square", "steps": 200, "seed": seed,
        "seconds": 7.0, "before": metrics, "after": metrics, "protocol": {"seed": seed, "samples": samples},
        **({"aux": "retain", "curve": curve, "half_life": 100 if ar > 0.5 else None} if stage == "attack" else {}), **more})

def test_the_table_joins_seeds_and_nothing_else(capsys):
    for seed, ar in enumerate((0.2, 0.4, 0.9)):
        result_file(f"runs/{seed}", "attack", ar, seed)
    result_file("runs/other", "attack", 0.2, samples=80)               # another protocol
    result_file("runs/none", "unlearn", none=0.3, steps=300)
    M.write_json(Path("runs/foreign/result.json"), {"stage": "attack"})
    Path("runs/bad").mkdir()
    Path("runs/bad/result.json").write_text("[")
    run(attack, "--table", "runs")
    assert capsys.readouterr().out.count("not a result of this code") == 2
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in Path("runs/table.md").read_text().splitlines()[:5]]
    cells = [dict(zip(rows[0], row)) for row in rows[2:]]
    assert [c["runs"] for c in cells] == ["3", "1", "1"] and cells[0]["AR"] == "50.0 (20..90)"
    assert cells[0]["half-life"] == "-, -, 100" and cells[1]["none"] == "30.0 [30, 30]" and cells[2]["none"] == ""
    assert cells[2]["AR"] == "20.0 [0, 100]" and cells[1]["UA"] == "100.0 [100, 100]" and cells[1]["AR"] == ""
    assert cells[1]["FID after"] == "20.0 +- 1.5" and Image.open("runs/attack_curves.png").size == (900, 420)

# ---- evaluation ----------------------------------------------------------------------------------

def test_frechet_distance_and_its_error():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) for _ in range(2))
    (mu1, c1), (mu2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    reference = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid.frechet_distance(a, b) == pytest.approx(reference, rel=1e-8)
    few = rng.normal(size=(5, 8))                      # singular covariance: fewer images than dimensions
    assert fid.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    real = rng.normal(size=(4000, 4))
    draws = [rng.normal(size=(300, 4)) * 1.5 for _ in range(40)]
    spread = np.std([fid.frechet_distance(real, x) for x in draws], ddof=1)
    assert 0.6 < np.mean([fid.fid_error(real, x) for x in draws[:10]]) / spread < 1.6

def test_inception_pools_as_pytorch_fid_does():
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(net.state_dict(), "inception.pth")
    patched, outputs = fid.inception("inception.pth"), {}
    for name in ("Mixed_6a", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        getattr(patched, name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
    with torch.inference_mode():
        found = patched(torch.rand(1, 3, 299, 299) * 2 - 1)
        x = outputs["Mixed_6a"]
        valid = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)          # the share of each window that is not padding
        branch = patched.Mixed_6b.branch_pool
        expected = F.relu(branch.bn(branch.conv(F.avg_pool2d(x, 3, 1, 1) / valid)))
        assert torch.allclose(outputs["Mixed_6b"][:, -192:], expected, atol=1e-5)
        windows = F.unfold(F.pad(outputs["Mixed_7b"], (1, 1, 1, 1), value=-9e9), 3).unflatten(1, (2048, 9)).amax(2)
        branch = patched.Mixed_7c.branch_pool
        expected = F.relu(branch.bn(branch.conv(windows.view(1, 2048, 8, 8))))
        assert torch.allclose(outputs["Mixed_7c"][:, -192:], expected, atol=1e-5)
        assert found.shape == (1, 2048) and torch.allclose(found, outputs["Mixed_7c"].mean((2, 3)), atol=1e-5)

def test_precision_and_recall_against_a_random_subset():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(30, 3)), rng.normal(size=(25, 3)) * 0.3

    def brute(points, centres):
        radius = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])
    assert fid.precision_recall(real, fake) == pytest.approx((brute(fake, real), brute(real, fake)))
    means = 50.0 * np.arange(10).repeat(200)[:, None]              # ten classes, one after the other
    real, fake = (means + rng.normal(size=(2000, 3)) for _ in range(2))
    assert min(fid.precision_recall(real, fake, most=300)) > 0.8           # the first 300 know two classes only

class Oracle(torch.nn.Module):
    """Reads the class from the mean of the first row, the style from that of the second; 9: none."""

    def __init__(self):
        super().__init__()
        self.heads = [torch.nn.Linear(1, 1)]

    def forward(self, x):
        seen = [(x[:, 0, row].mean(1) * 10).round().long() for row in (0, 1)]
        return [F.one_hot(torch.where(s == 9, n, s), n + 1) for s, n in zip(seen, (4, 3))]

    def features(self, x):
        return x[:, 0, :2].mean(2) + torch.linspace(0, 0.1, len(x))[:, None] ** 2

def test_scores_count_what_they_say():
    y = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 3 + [[2, 2]] * 3)
    drawn = y.clone()
    drawn[:2, 0] = torch.tensor([2, 9])                # of four squares one shows another class, one shows none
    drawn[4, 0], drawn[5, 1] = 3, 0
    x = torch.zeros(10, 1, 8, 8)
    x[:, :, 0], x[:, :, 1] = (drawn[:, i, None, None].expand(-1, 1, 8) / 10 for i in (0, 1))
    scores = fid.score(x, y, Oracle(), NAMES, [(0, 1)], torch.randn(50, 2))
    assert [scores[k] for k in ("ua", "none", "cls", "style")] == pytest.approx([1 / 2, 1 / 4, 5 / 6, 5 / 6])
    assert (scores["forget_samples"], scores["retain_samples"]) == (4, 6) and scores["fid_error"] > 0
    assert (scores["cls_low"], scores["cls_high"]) == pytest.approx((0.4365, 0.9699), abs=1e-3)        # Wilson, 5 of 6
    both = fid.score(x, y, Oracle(), NAMES, [(0, 1), (1, 2)], torch.randn(50, 2))
    assert both["ua_of"] == pytest.approx({"cls b": 1 / 2, "style r": 0}) and both["ua"] == pytest.approx(2 / 7)
    assert both["cls"] == pytest.approx(2 / 3) and both["retain_samples"] == 3

def test_conditions_are_the_counted_ones_and_the_retained_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "sample", lambda model, y, *args, **kwargs: asked.append(y) or torch.zeros(len(y), 1, 8, 8))
    monkeypatch.setattr(fid, "score", lambda *args: None)
    for count, retained in (([(0, 1)], True), ([(0, 1), (1, 2)], False)):
        fid.evaluate(None, None, NAMES, [(0, 1), (1, 2)], count, None, 12, 1, None, retained)
    y = asked[0].tolist()
    assert y[:4] == [[1, 0]] * 2 + [[1, 1]] * 2        # class 1, in no style that is forgotten itself
    assert all(c != 1 and s != 2 for c, s in y[4:]) and len(y) == 4 + 6
    assert all(c == 1 or s == 2 for c, s in asked[1].tolist()) and len(asked[1]) == 6

def test_the_judge_knows_what_is_left_of_a_picture_and_what_is_none():
    judge, accuracy = fid.load_classifier("shapes", "data", CPU, [train_ddpm.SHAPES, train_ddpm.STYLES])
    x, y = train_ddpm.draw_shapes(6, seed=77)
    x = x.float() / 127.5 - 1
    grey, (n, _, h, w) = x.mean(1, keepdim=True), x.shape

    def scaled(s):
        grid = F.affine_grid(torch.tensor([[[1 / s, 0, 0], [0, 1 / s, 0]]]).expand(n, 2, 3), x.shape, align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    for changed in (x, scaled(0.7), scaled(1.2), scaled(1.5), (2 * x).clamp(-1, 1), (grey + 2 * (x - grey)).clamp(-1, 1),
                    (x + torch.empty(n, 3, 1, 1).uniform_(-0.3, 0.3)).clamp(-1, 1), 0.5 * x, x[:, [2, 0, 1]]):
        hit = (fid.predict(judge, changed) == y).double()
        assert min(hit[y[:, 0] == i, 0].mean() for i in range(10)) > 0.96 and hit[:, 1].mean() > 0.99
    smooth = F.interpolate(torch.rand(500, 3, 5, 5) * 2 - 1, (h, w), mode="bicubic").clamp(-1, 1)
    for garbage in (torch.rand(500, 3, h, w) * 2 - 1, torch.randn(500, 3, h, w).clamp(-1, 1), smooth,
                    torch.rand(500, 3, 1, 1).expand(-1, -1, h, w) * 2 - 1):
        assert (fid.predict(judge, garbage) == torch.tensor([10, 5])).double().mean() > 0.98

def test_a_classifier_serves_its_own_data_and_the_newest_is_used(small, capsys):
    for folder, names in (("A", "ab"), ("C", "abc"), ("D", "ab")):
        for i, name in enumerate(names):
            for k in range(4):
                png(f"{folder}/{name}/{k}.png", (80 * i + (folder == "D"), 0, 0))

    def load(folder):
        names = train_ddpm.load_data("folder", "train", folder, size=32)[2]
        return fid.load_classifier("folder", folder, CPU, names)[0]
    for i, folder in enumerate("ACDC"):
        run(fid, "--train-classifier", "--dataset", "folder", "--data-dir", folder, "--image-size", 32, "--seed", i, *QUICK)
        os.utime(sorted(Path("runs/folder").glob("classifier*/model.pt"), key=lambda p: p.stat().st_mtime)[-1], (i, i))
    capsys.readouterr()
    newest = torch.load("runs/folder/classifier-4/model.pt", weights_only=True)["weights"]
    assert torch.equal(load("C").heads[0].weight, newest["heads.0.weight"].float())
    assert load("A").heads[0].out_features == 3 and "not used" in capsys.readouterr().out
    png("E/a/0.png", (1, 2, 3)), png("E/b/0.png", (1, 2, 3))
    assert "too few" in refused(capsys, fid, "--train-classifier", "--dataset", "folder", "--data-dir", "E")

def test_two_folders_of_any_size(capsys, monkeypatch):
    x, _ = train_ddpm.draw_shapes(1, seed=3)
    for i, image in enumerate(x):
        folder = Path("ab"[i // 25])
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32 + i // 25 * 8,) * 2).save(folder / f"{i}.png")
    run(fid, "a", "b", "--features", "classifier", "--out", "out")
    found = result("out")
    assert found["fid"] > 1 and found["fid_error"] > 0 and found["protocol"]["real_images"] == 25
    run(fid, "a", "a", "--features", "classifier", "--out", "same")
    assert result("same")["fid"] < 1e-3 and Image.open("out/samples.png").size == (20 * 66, 2 * 66)
    monkeypatch.setattr(fid, "inception", lambda *args: lambda x: x.mean(3).flatten(1)[:, ::150])
    run(fid, "a", "b", "--out", "inception")
    assert result("inception")["protocol"]["fid_features"] == "inception"
    picture = np.asarray(Image.open("b/25.png"), np.float32)
    expected = F.interpolate(torch.tensor(picture).permute(2, 0, 1)[None] / 255, (299, 299), mode="bilinear") * 2 - 1
    assert torch.allclose(fid.prepare(Path("b/25.png"), 299, 3, "inception"), expected, atol=1e-5)
    Path("empty").mkdir()
    Path("b/30.png").write_bytes(b"broken")
    assert "0 fake" in refused(capsys, fid, "a", "empty") and "b/30.png" in refused(capsys, fid, "a", "b")

def test_missing_inception_weights_are_named(capsys):
    assert "--inception-weights" in refused_by(capsys, fid.inception, "none.pth")

# ---- files and mistakes --------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)

def test_damaged_and_foreign_checkpoints_are_refused(capsys):
    good = Path(tiny_checkpoint("good.pt")).read_bytes()
    at = good.index(torch.load("good.pt", weights_only=True)["weights"]["conv_in.weight"].numpy().tobytes())
    Path("truncated.pt").write_bytes(good[:len(good) // 2])
    Path("flipped.pt").write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1:])
    Path("bomb.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"format": 99, "kind": "unet"}, "future.pt")
    torch.save({"weights": {}}, "foreign.pt")
    for name in ("truncated", "flipped", "bomb", "future", "foreign", "missing"):
        assert f"{name}.pt" in refused(capsys, unlearn, "--cls", 1, "--ckpt", f"{name}.pt")
    assert not Path("exploded").exists() and not Path("runs").exists()

def test_checkpoints_come_back_equal():
    net, info = tiny(), dict(dataset="any", names=NAMES, preset="paper", forgotten=[(0, 1), (1, 2)], made_by={})
    M.save_checkpoint("run/model.pt", net, info)
    for path in ("run", "run/model.pt"):
        loaded, found = M.load_checkpoint(path)
        assert torch.equal(weights(net), weights(loaded)) and loaded.cfg == net.cfg
        assert {k: found[k] for k in info} == info
    M.save_checkpoint("half.pt", net, info, half=True)
    assert torch.allclose(weights(net), weights(M.load_checkpoint("half.pt")[0]), atol=1e-3)
    assert os.listdir("run") == ["model.pt"]

def test_a_failed_write_leaves_the_old_file(capsys):
    M.write_file("kept", lambda p: p.write_text("old"))

    def broken(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    assert "No space left" in refused_by(capsys, M.write_file, "kept", broken)
    assert Path("kept").read_text() == "old" and os.listdir(".") == ["kept"]

MISTAKES = [
    (("--cls", "12"), "0 circle, 1 square"), (("--cls", "aeroplane"), "0 circle, 1 square"),
    (("--cls", "²"), "0 circle, 1 square"), ((), "say what to forget"),
    (("--cls", "1", "--alternative", "class:1"), "take another"), (("--cls", "1", "--alternative", "x"), "class:K, mix"),
    (("--cls", "1", "--alternative", "image:none.png"), "cannot be read"), (("--cls", "1", "--steps", "-5"), "from 0"),
    (("--cls", "1", "--lr", "nan"), "from 0 to 10"), (("--cls", *map(str, range(10))), "must remain"),
    (("--cls", "1", "--dataset", "fashion"), "draws shapes"), (("--cls", "1", "--device", "abacus"), "--device cpu"),
    (("--cls", "1", "--out", "/dev/null/run"), "--out"), (("--cls", "1", "--method", "magic"), "dimum"),
    (("--cls", "1", "--speed", "9"), "--help")]

@pytest.mark.parametrize("args,part", MISTAKES)
def test_mistakes_get_one_clear_line(args, part, small, capsys):
    assert part in refused(capsys, unlearn, "--ckpt", "tiny.pt", *args) and not Path("runs").exists()

def test_names_come_first_and_what_may_mean_two_values_is_refused(capsys):
    numbers = [str(i) for i in (1, 10, 2)]
    assert [M.find_value(text, numbers, "--cls") for text in ("10", "2", "0")] == [1, 2, 0]
    assert M.find_value("cat", ["Cat", "cat"], "--cls") == 1 and M.find_value("CAT", ["dog", "cat"], "--cls") == 1
    assert "--cls 1 may mean several of: 0 1, 1 10, 2 2" in refused_by(capsys, M.find_value, "1", numbers, "--cls")

def test_mistakes_of_the_other_stages(small, capsys):
    assert "--cls circle" in refused(capsys, attack, "tiny.pt") and "no such file" in refused(capsys, attack, "nothing")
    assert "none of retain" in refused(capsys, attack, "tiny.pt", "--cls", 1, "--aux", "nowhere", *LOOK)
    assert "no results" in refused(capsys, attack, "--table", ".")
    tiny_checkpoint("plain.pt", "folder", names=[["a", "b"]])
    assert "no styles" in refused(capsys, unlearn, "--style", 1, "--ckpt", "plain.pt")
    assert "nothing is left" in refused(capsys, train_ddpm, "--exclude-cls", *range(10))

def test_the_model_to_unlearn_is_the_shipped_one_or_a_finished_pretraining_as_long(small, capsys, monkeypatch):
    args = SimpleNamespace(ckpt=None, dataset=None)
    assert unlearn.find_model(args).resolve() == HERE / "assets/shapes.pt"
    tiny_checkpoint("runs/shapes/pretrain/model.pt")
    error = refused_by(capsys, unlearn.find_model, args)
    assert "9 steps" in error and "--ckpt runs/shapes/pretrain/model.pt" in error and "assets/shapes.pt" in error
    tiny_checkpoint("runs/shapes/pretrain/model.pt", steps=16000)
    assert unlearn.find_model(args) == Path("runs/shapes/pretrain/model.pt")
    assert "train_ddpm.py --dataset fashion" in refused_by(capsys, unlearn.find_model, SimpleNamespace(ckpt=None, dataset="fashion"))

def test_the_stages_write_what_they_promise_and_forget_one_after_the_other(small, capsys):
    for _ in range(2):
        run(unlearn, "--cls", "square", "--ckpt", "tiny.pt", *QUICK, *LOOK, "--eval-every", 1)
    first, second = Path("runs/shapes/dimum-cls1"), Path("runs/shapes/dimum-cls1-2")
    for name in ("model.pt", "result.json", "log.csv", "loss.png", "samples.png", "fid.png"):
        assert (first / name).is_file() and (second / name).is_file()
    assert torch.equal(weights(M.load_checkpoint(first)[0]), weights(M.load_checkpoint(second)[0]))
    found = result(first)
    assert [p["step"] for p in found["curve"]] == [0, 1, 2] and found["forget"] == "cls square"
    assert {"ua", "ua_low", "cls", "style", "none", "fid", "fid_error"} <= found["before"].keys() & found["after"].keys()
    assert {"sampler_steps", "guidance", "samples", "seed", "machine", "real_images"} <= found["protocol"].keys()
    assert "has forgotten cls square already" in refused(capsys, unlearn, "--cls", 1, "--ckpt", first)
    run(unlearn, "--style", "neon", "--ckpt", first, *QUICK, *LOOK)
    both = "runs/shapes/dimum-style4-after-dimum-cls1"
    assert M.load_checkpoint(both)[1]["forgotten"] == [(0, 1), (1, 4)]
    assert result(both)["after"]["ua_of"].keys() == {"cls square", "style neon"}
    styles = [name for name in train_ddpm.STYLES if name != "neon"]
    assert "must remain" in refused(capsys, unlearn, "--style", *styles, "--ckpt", both)
    run(attack, both, "--cls", 1, *QUICK, *LOOK)
    attacked = "runs/shapes/attack-dimum-style4-after-dimum-cls1-retain"
    assert result(attacked)["after"]["ua_of"].keys() == {"cls square"} and result(attacked)["after"]["retain_samples"] == 36
    run(unlearn, "--cls", 1, "--ckpt", attacked, *QUICK, *LOOK)        # what an attack brought back can go again
    run(M, both, "--cls", 1, "--style", "flat", "neon", "--n", 3, "--png", "files")
    assert len(list(Path("files").glob("*.png"))) == 6 and Path("runs/shapes/samples/samples.png").is_file()

def test_seconds_are_those_of_the_steps_alone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(fid.time, "time", lambda: clock[0])

    def steps():
        for _ in range(4):
            clock[0] += 1
            yield torch.tensor(0.5)
    losses, seconds = fid.follow(steps(), None, 4, 2, lambda step: clock.__setitem__(0, clock[0] + 100), CPU)
    assert seconds == 4.0 and losses.tolist() == [0.5] * 4 and clock[0] == 104

def test_killed_unlearning_leaves_nothing_that_the_next_start_trips_over(small):
    command = (unlearn, "--cls", 1, "--ckpt", "tiny.pt", *QUICK, *LOOK)

    def killed():
        M.os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        run(*command)

    def early():
        unlearn.follow = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        run(*command)
    assert forked(early) == -signal.SIGKILL and forked(killed) == -signal.SIGKILL
    assert not any(p.suffix in (".pt", ".json", ".csv", ".png") for p in Path("runs").rglob("*"))
    assert forked(lambda: run(*command)) == 0 and Path("runs/shapes/dimum-cls1/result.json").is_file()

# ---- every flag, with every kind of value --------------------------------------------------------

BASES = {M: ("tiny.pt",), train_ddpm: QUICK, fid: ("test", "tiny.pt", *QUICK, "--samples", 2, "--sampler-steps", 1),
         unlearn: ("--cls", 1, "--ckpt", "tiny.pt", *QUICK, *LOOK), attack: ("tiny.pt", "--cls", 1, *QUICK, *LOOK)}

def values_for(action):
    """(value, must it be refused?) pairs for one argument."""
    if action.nargs == 0:
        return [(None, False)]
    if hasattr(action.type, "low"):
        over = [(action.type.high + 1, True)] if action.type.high < math.inf else []
        return [(v, True) for v in ("x", "nan", action.type.low - 1)] + over + [(max(1, action.type.low), False)]
    if action.choices:
        return [("nonsense", True), *((choice, False) for choice in list(action.choices)[:1])]
    return [(v, False) for v in ("", "tiny.pt", "²")]

@pytest.mark.parametrize("module", BASES, ids=lambda m: m.__name__)
def test_no_flag_value_ends_in_a_traceback(module, small, monkeypatch, capsys):
    actions = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self: actions.extend(self._actions) or sys.exit(0))
        with pytest.raises(SystemExit):
            run(module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    for part in (M, train_ddpm, fid, unlearn, attack):
        monkeypatch.setattr(part, "sample", lambda model, y, *a, **k: torch.rand(len(y), 3, 32, 32), raising=False)
    monkeypatch.setattr(unlearn, "guided_gradients", lambda model, draw, batches: [[torch.rand_like(p) for p in model.parameters()]])
    monkeypatch.setitem(M.PRESETS, "paper", SMALLEST)
    for action in [a for a in actions if a.dest != "help"]:
        for value, must_fail in values_for(action):
            base = BASES[module]
            if action.option_strings:
                args = (*base, action.option_strings[0] + ("" if value is None else f"={value}"))
            else:
                args = (value, *base[1:]) if action.dest != "fake" else (base[0], value, *base[2:])
            capsys.readouterr()
            try:
                run(module, *args)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            error = capsys.readouterr().err
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 or code == 0 and not must_fail, \
                (args, code, error)

# ---- the shipped model ---------------------------------------------------------------------------

def test_the_shipped_model_draws_every_class_and_style_and_forgets_one():
    assert (HERE / "assets/shapes_classifier.pt").stat().st_size < 1e6
    net, info = M.load_checkpoint(HERE / "assets/shapes.pt")
    judge, accuracy = fid.load_classifier("shapes", "data", CPU, info["names"])
    y = M.all_labels(info["names"])
    seen = fid.predict(judge, M.sample(net, y, steps=10))
    assert min(accuracy) >= 0.99 and ((seen == y).double().mean(0) >= 0.93).all()
    images, labels, names = train_ddpm.load_data("shapes", "train")
    args = SimpleNamespace(batch_size=8, alternative="class:triangle", alt_size=None, steps=35, weight=1.0)
    data = unlearn.Data(images, labels, names, [(0, 1)], [], args)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    list(unlearn.cosine(unlearn.dimum(net.train(), data, optimizer, args), optimizer, 35))
    y = torch.tensor([[1, s] for s in range(5)] * 4)
    assert (fid.predict(judge, M.sample(net, y, steps=10))[:, 0] != 1).double().mean() >= 0.8
