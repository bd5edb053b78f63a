"""The behaviour that must hold, checked in a few minutes on a CPU: python -m pytest -q"""
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                # bits are compared, and a fork cannot go on with a GPU

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
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
TINY = M.UNetConfig(image_size=8, width=16, mult=(1, 2), attention=(4,), groups=4, classes=(4, 3))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test runs in its own folder, in float32, with the global generator in a known state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "CPU_BF16", False)
    torch.manual_seed(0)


def run(module, *args):
    """The script's main() with these arguments."""
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        module.main()
    finally:
        while M.LOCKS:                                 # what the end of a process does
            os.close(M.LOCKS.pop())


def refused(capsys, module, *args):
    """The one line with which the script refuses these arguments; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(module, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def tiny(seed=0, **changes):
    """A tiny U-Net whose zero-initialised layers have been filled, so that its output depends on everything."""
    torch.manual_seed(seed)
    return filled(M.UNet(M.replace(TINY, **changes)))


def filled(net):
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().sum() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def tiny_data(n=240):
    """Random images and every label of TINY equally often; images of class 1 are all 255, of style 2 all 7."""
    y = train_ddpm.all_labels([range(4), range(3)], n // 12)
    x = torch.randint(10, 200, (n, 3, 8, 8), dtype=torch.uint8)
    x[y[:, 1] == 2] = 7
    x[y[:, 0] == 1] = 255
    return x, y


NAMES = [["a", "b", "c", "d"], ["p", "q", "r"]]


SMALLEST = M.UNetConfig(width=8, mult=(1, 1), groups=4, attention=())      # for images of 32 x 32


def tiny_checkpoint(path, dataset="shapes", names=None, **info):
    """A checkpoint with the shapes dataset's labels and an untrained, very small network."""
    names = names or train_ddpm.label_names(dataset)
    cfg = M.replace(SMALLEST, classes=tuple(map(len, names)), channels=1 if dataset == "fashion" else 3)
    M.save_checkpoint(path, filled(M.UNet(cfg)), {"dataset": dataset, "names": names, "forgotten": {},
                                          "made_by": {"stage": "pretrain"}, **info})
    return path


QUICK = ("--steps", 2, "--batch-size", 4, "--samples", 1, "--sampler-steps", 1)


# ---- diffusion -------------------------------------------------------------------------------------------------

def test_posterior_matches_an_independent_computation_for_every_t():
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    coef_x0, coef_xt, variance = M.ddpm_posterior()
    product = 1.0
    for t, beta in enumerate(betas):
        # a product of two Gaussians: q(x_t | x_{t-1}) as a likelihood of x_{t-1}, and q(x_{t-1} | x_0) as its prior
        prior_mean, prior_var = math.sqrt(product), 1 - product
        if prior_var == 0:
            expected = (1.0, 0.0, 0.0)
        else:
            precision = (1 - beta) / beta + 1 / prior_var
            expected = (prior_mean / prior_var / precision, math.sqrt(1 - beta) / beta / precision, 1 / precision)
        assert np.allclose([coef_x0[t], coef_xt[t], variance[t]], expected, rtol=1e-9, atol=1e-12)
        product *= 1 - beta


class Gaussian(torch.nn.Module):
    """A stand-in for a network: the exact eps for data N(mean, s^2), in closed form; mean depends on the label."""

    def __init__(self, s=0.5):
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


def test_ddim_without_noise_is_deterministic_and_exact():
    net, y = Gaussian(), torch.tensor([[0], [1], [1]])
    first, again = (M.sample(net, y, steps=20, guidance=2.0, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5)).double().numpy()
    means = np.array([0.3, -0.4])[y[:, 0].numpy()].reshape(3, 1, 1, 1)
    for t in range(950, -1, -50):
        eps = lambda mean: np.sqrt(1 - a[t]) * (x - np.sqrt(a[t]) * mean) / (a[t] * 0.25 + 1 - a[t])
        e = 3 * eps(means) - 2 * eps(0.1)
        x0 = (x - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t])
        a_next = a[t - 50] if t >= 50 else 1.0
        x = np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * e
    assert np.allclose(first.numpy(), x.clip(-1, 1), atol=2e-4)


def test_ddim_with_full_noise_over_all_steps_has_ddpms_variances():
    _, a = M.linear_schedule()
    assert M.ddim_times(1000)[0] == (999, 998) and M.ddim_times(1000)[-1] == (0, -1)
    for steps in (1, 7, 50, 600, 1000):
        times = [t for t, _ in M.ddim_times(steps)]
        assert len(set(times)) == steps and times[-1] == 0 and times[0] == (steps - 1) * 1000 // steps
    for t in range(1, 1000):
        _, sigma = M.ddim_coefficients(a[t], a[t - 1], eta=1.0)
        assert torch.isclose(sigma ** 2, M.ddpm_posterior()[2][t], rtol=1e-9)


def test_ddpm_sampler_draws_from_the_data_distribution():
    net = Gaussian(s=0.2)
    x = M.sample(net, torch.zeros(400, 1, dtype=torch.long), sampler="ddpm", guidance=0, batch=400)
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02
    assert set(net.calls) == {400}


def test_guidance_runs_both_branches_as_one_batch_and_none_when_zero():
    net, y = tiny(), torch.tensor([[1, 2], [3, 0]])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    calls, forward = [], net.forward
    net.forward = lambda x, t, y: calls.append(len(x)) or forward(x, t, y)
    guided, plain = M.guided_output(net, x, t, y, 2.0), M.guided_output(net, x, t, y, 0)
    assert calls == [4, 2]
    null = forward(x, t, torch.tensor([[4, 3], [4, 3]]))
    assert torch.allclose(plain, forward(x, t, y), atol=1e-5)
    assert torch.allclose(guided, 3 * forward(x, t, y) - 2 * null, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_target_determines_x0_and_eps(prediction):
    net = tiny(prediction=prediction)
    x0, eps = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    for t in (0, 300, 900):
        x_t, target = M.add_noise(net, x0, torch.full((5,), t), eps)
        back = M.split_output(net, target, x_t, net.alphas_cumprod[t])
        assert torch.allclose(back[0], x0, atol=2e-3) and torch.allclose(back[1], eps, atol=2e-3)


def test_a_picture_of_many_values_shows_some_of_them_and_the_forgotten_ones():
    names = [[f"class{i}" for i in range(20)], [f"style{i}" for i in range(60)]]
    y, layout = train_ddpm.show_labels(names, wanted={1: [59, 10]})
    assert y.shape == (10 * 13, 2) and layout["columns"] == 10 and layout["rows"][-1] == "style59"
    assert [tuple(v) for v in y[:2].tolist()] == [(0, 0), (2, 0)] and y[-1].tolist() == [18, 59]
    y, layout = train_ddpm.show_labels([names[0][:10]])
    assert y.flatten().tolist() == list(range(10)) * 4 and layout["rows"] == ()


def test_times_are_antithetic_and_labels_drop_together():
    t = M.antithetic_times(1001, torch.device("cpu"))
    assert len(t) == 1001 and torch.equal(t[:500] + t[501:1001], torch.full((500,), 999))
    y = M.drop_labels(torch.zeros(20000, 2, dtype=torch.long), tiny(), 0.1)
    dropped = (y == torch.tensor([4, 3])).all(1)
    assert torch.equal(dropped, (y != 0).any(1)) and abs(dropped.double().mean() - 0.1) < 0.01


def test_retained_examples_send_no_gradient_to_a_forgotten_embedding_row():
    net = tiny()
    M.diffusion_loss(net, torch.randn(16, 3, 8, 8), torch.tensor([[0, 1], [2, 2]] * 8)).mean().backward()
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert rows[1] == 0 and rows[3] == 0 and rows[0] > 0 and rows[2] > 0


# ---- the paper preset and the public checkpoints ---------------------------------------------------------------

def public_state_dict(ch=128, mult=(1, 2, 2, 2), blocks=2, classes=10):
    """Random weights in the layout of the public SalUn network, written down from its description."""
    state, conv = {}, lambda name, i, o, k: state.update({f"{name}.weight": torch.randn(o, i, k, k) * (i * k * k) ** -0.5,
                                                          f"{name}.bias": torch.randn(o) * 0.1})
    dense = lambda name, i, o: state.update({f"{name}.weight": torch.randn(o, i) * i ** -0.5, f"{name}.bias": torch.randn(o) * 0.1})
    norm = lambda name, c: state.update({f"{name}.weight": torch.rand(c) + 0.5, f"{name}.bias": torch.randn(c) * 0.1})

    def block(name, i, o):
        norm(f"{name}.norm1", i), conv(f"{name}.conv1", i, o, 3), dense(f"{name}.temb_cemb_proj", 8 * ch, o)
        norm(f"{name}.norm2", o), conv(f"{name}.conv2", o, o, 3)
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def attn(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    for name in ("temb", "cemb"):
        dense(f"{name}.dense.0", ch, 4 * ch), dense(f"{name}.dense.1", 4 * ch, 4 * ch)
    state["classes_emb.weight"], state["null_classes_emb"] = torch.randn(classes, ch), torch.randn(ch)
    conv("conv_in", 3, ch, 3)
    widths, c = [ch * m for m in mult], ch
    ins = [ch] + widths[:-1]
    for level, w in enumerate(widths):
        for b in range(blocks):
            block(f"down.{level}.block.{b}", c, w)
            c = w
            if level == 1:
                attn(f"down.{level}.attn.{b}", w)
        if level < 3:
            conv(f"down.{level}.downsample.conv", w, w, 3)
    block("mid.block_1", c, c), attn("mid.attn_1", c), block("mid.block_2", c, c)
    for level in (3, 2, 1, 0):
        for b in range(blocks + 1):
            skip = ins[level] if b == blocks else widths[level]
            block(f"up.{level}.block.{b}", c + skip, widths[level])
            c = widths[level]
            if level == 1:
                attn(f"up.{level}.attn.{b}", c)
        if level > 0:
            conv(f"up.{level}.upsample.conv", c, c, 3)
    norm("norm_out", c), conv("conv_out", c, 3, 3)
    return state


def test_import_uses_every_key_of_a_public_checkpoint_once(capsys):
    ema = public_state_dict()
    raw = {f"module.{k}": torch.zeros_like(v) for k, v in ema.items()}
    torch.save([raw, {"state": {}}, 7, ema], "public.pth")
    net = train_ddpm.import_public("public.pth", "cifar10", train_ddpm.label_names("cifar10"))
    assert sum(p.numel() for p in net.parameters()) == sum(v.numel() for v in ema.values()) == 38_632_323
    ours = sorted(v.double().sum().item() for k, v in net.state_dict().items() if "label_embs" not in k)
    theirs = sorted(v.double().sum().item() for k, v in ema.items() if "classes_emb" not in k)
    assert ours == theirs                              # the EMA weights, not the raw zeros
    table = net.label_embs[0].weight
    assert torch.equal(table[:10], ema["classes_emb.weight"]) and torch.equal(table[10], ema["null_classes_emb"])
    out = net.eval()(torch.randn(2, 3, 32, 32), torch.tensor([3, 900]), torch.tensor([[1], [10]]))
    assert out.shape == (2, 3, 32, 32) and out.isfinite().all()

    for broken in ({**ema, "conv_extra.weight": torch.zeros(3)}, {k: v for k, v in ema.items() if k != "conv_out.bias"}):
        torch.save([{f"module.{k}": v for k, v in broken.items()}, {}, 7, broken], "broken.pth")
        assert "differ from the paper preset" in refused(capsys, train_ddpm, "--dataset", "cifar10", "--import", "broken.pth")
    Path("text.pth").write_text("not a checkpoint")
    assert "text.pth is not a checkpoint" in refused(capsys, train_ddpm, "--dataset", "cifar10", "--import", "text.pth")


# ---- datasets --------------------------------------------------------------------------------------------------

def test_shapes_are_balanced_seeded_and_the_splits_differ():
    x, y = train_ddpm.draw_shapes(3, seed=0)
    assert x.shape == (150, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.unique(y, dim=0, return_counts=True)[1].tolist() == [3] * 50
    assert torch.equal(x, train_ddpm.draw_shapes(3, seed=0)[0])
    other = train_ddpm.draw_shapes(3, seed=1)[0]
    assert all(not torch.equal(a, b) for a, b in zip(x, other))
    sketch = x[y[:, 1] == 3].float()
    assert (sketch.amax(1) - sketch.amin(1)).max() == 0 and sketch.median() > 200       # grey ink on light paper


def write_idx(path, array):
    header = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def make_fashion(folder, n=40):
    """Fashion-MNIST's four files, with random pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))


def test_fashion_is_read_from_gz_files_and_padded():
    make_fashion(Path("data/FashionMNIST/raw"))
    x, y, names = train_ddpm.load_data("fashion", "train")
    raw = gzip.decompress(Path("data/FashionMNIST/raw/train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert x.shape == (40, 1, 32, 32) and x[:, 0, 2:30, 2:30].numpy().tobytes() == raw and x[:, :, :2].sum() == 0
    assert y[:, 0].tolist() == [i % 10 for i in range(40)] and names[0][9] == "Ankle boot"


def make_folder(root, styles, objects, n=3):
    """A tree in UnlearnCanvas's layout, with pictures of every mode."""
    modes = ("RGB", "L", "CMYK", "P", "RGBA", "LA")
    rng = np.random.default_rng(0)
    for i, style in enumerate(styles):
        for j, name in enumerate(objects):
            folder = Path(root, style, name)
            folder.mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 256, (40 + 8 * k, 50, 3), dtype=np.uint8)
                mode = modes[(i + j + k) % len(modes)]
                kind = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
                Image.fromarray(pixels).convert("RGB").convert(mode).save(folder / f"{k}.{kind}")


def test_a_folder_is_decoded_once_and_again_when_it_changes(capsys):
    make_folder("art", ("Van Gogh", "Seed_Images", "Cubism"), ("Dogs", "Human Face"), n=10)
    Path("art/Cubism/Dogs/0.jpg").write_bytes(b"not a picture")
    Path("art/Cubism/Dogs/notes.txt").write_text("skip me")
    x, y, names = train_ddpm.load_data("folder", "train", "art", size=32)
    out = capsys.readouterr().out
    assert "skipped art/Cubism/Dogs/0.jpg" in out and "skipped 1 of 60" in out
    assert names == [["Dogs", "Human Face"], ["Cubism", "Seed_Images", "Van Gogh"]]
    test, test_y, _ = train_ddpm.load_data("folder", "test", "art", size=32)
    assert "skipped" not in capsys.readouterr().out
    assert x.shape[1:] == (3, 32, 32) and x.dtype == torch.uint8 and len(x) + len(test) == 59 and 1 <= len(test) < 15
    assert torch.equal(x, train_ddpm.load_data("folder", "train", "art", size=32)[0])
    Image.new("RGB", (30, 30), (1, 2, 3)).save("art/Cubism/Dogs/0.jpg")
    again = [train_ddpm.load_data("folder", split, "art", size=32)[0] for split in ("train", "test")]
    assert sum(map(len, again)) == 60

    Image.new("LA", (64, 32), (0, 0)).save("clear.png")           # transparent black, twice as wide as high
    assert (train_ddpm.read_image("clear.png", 32) == 255).all()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save("wide.png")
    assert (train_ddpm.read_image("wide.png", 16)[:, :, 2:-2] > 195).all()          # the central square

    for i in range(1, 10):
        Path(f"art/Cubism/Dogs/{i}.jpg").write_bytes(b"broken")
        Path(f"art/Cubism/Human Face/{i}.jpg").write_bytes(b"broken")
    assert "more than a fifth" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "art")
    Path("art/stray.png").write_bytes(Path("clear.png").read_bytes())
    assert "at one depth" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "art")
    assert "--data-dir" in refused(capsys, train_ddpm, "--dataset", "folder", "--data-dir", "nowhere")


def test_a_folder_goes_through_all_stages_at_64_pixels_as_each_says(monkeypatch, capsys):
    make_folder("my art", ("Van Gogh", "Seed_Images"), ("Dogs", "Human Face", "Bears"), n=8)
    monkeypatch.setitem(M.PRESETS, "small", SMALLEST)
    data = ("--dataset", "folder", "--data-dir", "my art")

    def follow(*more):
        """What the last stage says to run next."""
        script, *words = shlex.split(capsys.readouterr().out.rsplit("next: python ", 1)[1])
        run({"unlearn.py": unlearn, "attack.py": attack, "fid.py": fid}[script], *words, *more)
    run(train_ddpm, *data, *QUICK)
    net, info = M.load_checkpoint("runs/folder/pretrain/model.pt")
    assert net.cfg.image_size == 64 and net.cfg.mult == (1, 1, 1)
    run(fid, *data, "--train-classifier", "--steps", 2, "--batch-size", 4)
    follow("--samples", 10, "--sampler-steps", 1)
    run(unlearn, *data, "--style", "van gogh", *QUICK)
    follow(*QUICK)
    result = json.loads(Path("runs/folder/attack-dimum-style1-retain/result.json").read_text())
    assert result["forget"]["names"] == ["Van Gogh"]


def make_cifar10(monkeypatch, n=20):
    """CIFAR-10's files in torchvision's exact format, and torchvision's checksums replaced by theirs."""
    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, data):
        (folder / name).write_bytes(pickle.dumps(data))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    batch = lambda: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [write(f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [write("test_batch", batch())])
    name, md5 = write("batches.meta", {"label_names": list(train_ddpm.CIFAR10)})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "label_names", "md5": md5})


def test_cifar10_goes_through_all_stages(monkeypatch, capsys):
    make_cifar10(monkeypatch)
    x, y, names = train_ddpm.load_data("cifar10", "train")
    assert x.shape == (100, 3, 32, 32) and names[0][1] == "automobile" and y[11].tolist() == [1]
    raw = pickle.loads(Path("data/cifar-10-batches-py/data_batch_1").read_bytes())["data"][0]
    assert x[0].flatten().tolist() == raw.tolist()
    paper = M.UNet(M.make_config("paper", 32, 3, (10,)))
    loss = M.diffusion_loss(paper, *train_ddpm.get_batch(x, y, 2, flip=True)).mean()
    loss.backward()
    assert loss.isfinite() and paper.conv_out.weight.grad.abs().sum() > 0

    data = ("--dataset", "cifar10")
    run(fid, *data, "--train-classifier", "--steps", 2, "--batch-size", 4)
    run(train_ddpm, *data, "--preset", "small", *QUICK)
    run(unlearn, *data, "--cls", "automobile", *QUICK, "--samples", 12)
    run(attack, "runs/cifar10/dimum-cls1", *QUICK, "--samples", 12)
    run(fid, "test", "runs/cifar10/dimum-cls1", *data, "--samples", 10, "--sampler-steps", 1)
    result = json.loads(Path("runs/cifar10/attack-dimum-cls1-retain/result.json").read_text())
    assert result["forget"] == {"factor": "cls", "values": [1], "names": ["automobile"]}
    assert [p["step"] for p in result["curve"]] == [0, 1, 2]


def test_missing_data_says_what_to_put_where(capsys, monkeypatch):
    def offline(url, timeout):
        raise OSError("no network")
    monkeypatch.setattr(train_ddpm, "urlopen", offline)
    error = refused(capsys, train_ddpm, "--dataset", "cifar10", "--data-dir", "elsewhere")
    assert "cifar-10-python.tar.gz" in error and "elsewhere" in error and "no network" in error


@pytest.mark.parametrize("dataset", ["fashion", "cifar10"])
def test_a_corrupt_or_interrupted_download_leaves_nothing(dataset, capsys, monkeypatch):
    def corrupt(url, timeout):
        assert url.startswith("https://")
        return io.BytesIO(b"half a file")

    def interrupted(url, timeout):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_ddpm, "FASHION_FOLDERS", train_ddpm.FASHION_FOLDERS[:2])
    monkeypatch.setattr(train_ddpm, "urlopen", corrupt)
    assert "wrong checksum" in refused(capsys, train_ddpm, "--dataset", dataset)
    assert list(Path("data").rglob("*")) == []
    monkeypatch.setattr(train_ddpm, "urlopen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_ddpm.load_data(dataset, "train")
    assert list(Path("data").rglob("*")) == []


def test_a_download_is_verified_unpacked_and_kept(monkeypatch):
    make_fashion(Path("there"))
    monkeypatch.setattr(train_ddpm, "FASHION_FOLDERS", train_ddpm.FASHION_FOLDERS[:2])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", [
        (p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in Path("there").iterdir()])
    fetched = lambda url, timeout: open(Path("there", url.rsplit("/", 1)[1]), "rb")
    monkeypatch.setattr(train_ddpm, "urlopen", fetched)
    first = train_ddpm.load_data("fashion", "train")[0]
    monkeypatch.setattr(train_ddpm, "urlopen", None)               # the second time nothing is fetched
    assert torch.equal(first, train_ddpm.load_data("fashion", "train")[0]) and first.shape == (40, 1, 32, 32)


def test_an_archive_put_there_by_hand_is_used(monkeypatch):
    make_cifar10(monkeypatch)
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add("data/cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree("data/cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5",
                        hashlib.md5(Path("data/cifar-10-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(train_ddpm, "urlopen", None)
    assert len(train_ddpm.load_data("cifar10", "train")[0]) == 100
    assert sorted(p.name for p in Path("data").iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


# ---- pretraining -----------------------------------------------------------------------------------------------

TRAIN = dict(steps=20, batch_size=4, lr=1e-3, ema=0.9, warmup=5, cosine=True)


def weights(net):
    return torch.cat([p.flatten() for p in net.state_dict().values()])


def test_same_seed_same_weights_and_resume_is_exact():
    x, y = tiny_data()

    def once(**options):
        net = tiny().train()
        torch.manual_seed(3)
        return train_ddpm.train(net, x, y, **TRAIN, **options)[0]
    whole = once()
    assert torch.equal(weights(whole), weights(once()))

    seen = []

    def interrupt(_):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        once(path=Path("train.pt"), preview=interrupt)
    assert stop.value.code == 130
    assert torch.load("train.pt", weights_only=True)["step"] == 8
    torch.manual_seed(12345)
    resumed = train_ddpm.train(tiny(seed=9).train(), x, y, **TRAIN, path=Path("train.pt"), resume=True)[0]
    assert torch.equal(weights(whole), weights(resumed))


def test_ema_and_learning_rate():
    rate = lambda step: train_ddpm.learning_rate(step, 100, 1.0, 10, True)
    assert rate(0) == pytest.approx(0.1) and rate(50) == pytest.approx(0.5) and rate(100) == pytest.approx(0)
    assert train_ddpm.learning_rate(99, 100, 0.5, 0, False) == 0.5


def test_excluded_values_are_not_trained_on():
    x, y = tiny_data()
    kept, labels = train_ddpm.exclude(x, y, {0: [1], 1: [2]})
    assert len(kept) == 240 * 3 // 4 * 2 // 3 and not ((kept == 255).all() or (labels[:, 0] == 1).any())
    assert not (labels[:, 1] == 2).any() and kept.max() < 255


# ---- unlearning ------------------------------------------------------------------------------------------------

def make_task(factor=0, values=(1,), weight=1.0, n=8):
    x, y = tiny_data()
    task = unlearn.Task(x, y, NAMES, factor, list(values), n, weight)
    task.alternative_set = unlearn.alternative_data(f"class:{task.substitute}", None, *task.retain_set, NAMES, factor,
                                                    list(values))
    return task


@pytest.mark.parametrize("spec", ["class:2", "class:c", "mix", "noise", "image:picture.png"])
def test_alternatives_never_contain_a_forgotten_value(spec):
    Image.new("RGB", (20, 30), (9, 9, 9)).save("picture.png")
    x, y = make_task().retain_set
    keep, labels = unlearn.alternative_data(spec, None, x, y, NAMES, 0, [1])
    assert len(keep) and (labels[:, 0] == 1).all() and set(labels[:, 1].tolist()) == {0, 1, 2}
    assert not (keep == 255).flatten(1).all(1).any()
    few, _ = unlearn.alternative_data(spec, 3, x, y, NAMES, 0, [1])
    assert len(few) == 3


def test_a_styles_alternative_is_the_same_class_in_another_style():
    x, y = make_task(1, [2]).retain_set
    keep, labels = unlearn.alternative_data("class:0", None, x, y, NAMES, 1, [2])
    assert (labels[:, 1] == 2).all()
    for cls in range(4):
        assert torch.equal(keep[labels[:, 0] == cls], x[(y[:, 0] == cls) & (y[:, 1] == 0)])


def test_batches_of_a_task_keep_forget_and_retain_apart():
    task = make_task()
    for _ in range(20):
        assert (task.retain()[1][:, 0] != 1).all() and (task.forget()[1][:, 0] == 1).all()
        assert (task.alternative()[1][:, 0] == 1).all() and (task.alternative()[0] < 1).any()
    y = task.forget()[1]
    assert (task.replaced(y)[:, 0] == 2).all() and torch.equal(task.replaced(y)[:, 1], y[:, 1])
    assert make_task(values=(1, 2)).substitute == 3 and make_task(values=(3,)).substitute == 0


def test_saluns_mask_keeps_half_and_the_rest_stays_bit_equal():
    net, task = tiny().train(), make_task(weight=1e-3)
    before = [p.detach().clone() for p in net.parameters()]
    unlearn.run_method("salun", net, task, steps=4, lr=1e-2)
    assert sum(int(m.sum()) for m in task.mask) == sum(m.numel() for m in task.mask) // 2
    moved = 0
    for p, q, m in zip(net.parameters(), before, task.mask):
        assert torch.equal(p[~m], q[~m])
        moved += int((p[m] != q[m]).sum())
    assert moved > 1000


def test_sfrons_mask_is_where_the_forget_fisher_dominates():
    net, task = tiny(), make_task()
    gradients = {"forget": [], "retain": []}
    original = unlearn.guided_gradients

    def spy(model, batches):
        batches = list(batches)
        kind = "forget" if (batches[0][1][:, 0] == 1).all() else "retain"
        for grads in original(model, batches):
            gradients[kind].append(grads)
            yield grads
    unlearn.guided_gradients = spy
    try:
        mask = unlearn.sfron_mask(net, task, batches=3)
    finally:
        unlearn.guided_gradients = original
    for i, m in enumerate(mask):
        f, r = (np.mean([g[i].double().numpy() ** 2 for g in gradients[kind]], 0) for kind in ("forget", "retain"))
        clear = np.abs(f - r) > 1e-6 * (f + r) + 1e-20
        assert np.array_equal(m.numpy()[clear], (f >= r)[clear])
    assert all(torch.cat([x.flatten() for x in g]).norm() <= 1.0001 for g in gradients["forget"])


def losses_of(method, task, net):
    """The losses one step of a method hands to the optimiser, and the masks with them."""
    seen = []

    def update(loss, mask=None, mask_first=False):
        seen.append((loss, mask, mask_first))
        return loss.detach()
    unlearn.METHODS[method](net, task, update)
    return seen


def test_ga_and_dimum_losses(monkeypatch):
    net, task = tiny(), make_task(weight=0.3)
    values = {"retain": torch.tensor([1.0, 3.0]), "forget": torch.tensor([5.0]), "alternative": torch.tensor([7.0])}
    drops = []

    def fake(model, x0, y, p_drop=0.1):
        kind = "retain" if (y[:, 0] != 1).all() else "forget" if (x0 == 1).all() else "alternative"
        drops.append((kind, p_drop))
        return values[kind]
    monkeypatch.setattr(unlearn, "diffusion_loss", fake)
    assert losses_of("ga", task, net)[0][0] == pytest.approx(2 - 0.3 * 5)
    assert losses_of("dimum", task, net)[0][0] == pytest.approx(2 + 0.3 * 7)
    assert ("alternative", 0) in drops
    assert losses_of("finetune", task, net)[0][0] == 2


def test_sfron_weights_each_example_by_its_inverse_root_loss(monkeypatch):
    net, task = tiny(), make_task(weight=10.0)
    task.mask, task.progress, task.pixels = ["mask"], 0.5, 1
    monkeypatch.setattr(unlearn, "diffusion_loss", lambda model, x0, y: torch.tensor([1.0, 4.0, 16.0]))
    ascent, retain = losses_of("sfron", task, net)
    shares = np.array([1, 1 / 2, 1 / 4]) / 1.75
    assert ascent[0].item() == pytest.approx(-5 * (shares * [1, 4, 16]).sum(), rel=1e-5)      # the cosine is at one half
    assert ascent[1:] == (["mask"], True) and retain[1] is None and retain[0] == 7


def test_random_labels_target_is_a_constant():
    net, task = tiny(), make_task(weight=0.0)
    (loss, *_), = losses_of("rl", task, net)
    loss.backward()
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert rows[1] > 0 and rows[2] == 0                # class 2 is the target's label: no gradient reaches it


def test_esds_target_is_a_constant_of_the_frozen_model():
    net, task = tiny(), make_task(weight=0.7)
    unlearn.prepare_esd(net, task)
    assert torch.equal(weights(net), weights(task.frozen)) and not any(p.requires_grad for p in task.frozen.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05
    torch.manual_seed(7)
    (loss, mask, _), = losses_of("esd", task, net)
    assert {n.split(".")[0] for (n, _), m in zip(net.named_parameters(), mask) if m.any()} == {"label_embs", "label_mlps"}
    loss.backward()
    rows = net.label_embs[0].weight.grad.abs().sum(1)
    assert rows[1] > 0 and rows[4] == 0                # the null branch is the frozen model's: no gradient reaches ours
    assert all(p.grad is None for p in task.frozen.parameters())

    torch.manual_seed(7)
    x0, y = task.forget()
    t = M.antithetic_times(len(x0), x0.device)
    x_t, _ = M.add_noise(net, x0, t, torch.randn_like(x0))
    with torch.no_grad():
        cond, null = task.frozen(x_t, t, y), task.frozen(x_t, t, torch.tensor([[4, 3]]).expand_as(y))
        expected = ((net(x_t, t, y) - (null - 0.7 * (cond - null))) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_selective_amnesias_loss(monkeypatch):
    net, task = tiny(), make_task(weight=3.0)
    task.frozen, task.replay_set = tiny(), task.retain_set
    task.fisher = [torch.full_like(p, 0.5) for p in net.parameters()]
    with torch.no_grad():
        net.conv_out.bias += 0.2                       # three weights move by 0.2: 0.5 * 3 * 0.04
    seen = []
    monkeypatch.setattr(unlearn, "diffusion_loss",
                        lambda model, x0, y, p_drop: seen.append((x0, y, p_drop)) or torch.full((len(x0),), float(len(seen))))
    (loss, *_), = losses_of("sa", task, net)
    assert loss.item() == pytest.approx(task.pixels * (1 + 2) + 3 * 0.5 * 3 * 0.04, rel=1e-5)
    (noise, labels, drop), (replay, kept, _) = seen
    assert (labels[:, 0] == 1).all() and (kept[:, 0] != 1).all() and drop == 0
    assert noise.min() > -1 and noise.max() < 1 and abs(noise.std() - 3 ** -0.5) < 0.02         # uniform in [-1, 1]


def test_selective_amnesias_fisher_is_the_mean_of_squared_single_example_gradients():
    net = tiny()
    x0, y = torch.randn(3, 3, 8, 8), torch.tensor([[0, 1], [2, 2], [3, 0]])
    torch.manual_seed(5)
    found = unlearn.sa_fisher(net, x0, y, times=4)
    torch.manual_seed(5)
    expected = [np.zeros(p.shape) for p in net.parameters()]
    for i in range(3):
        times, noise = torch.randperm(1000)[:4], torch.randn(4, 3, 8, 8)
        total = [np.zeros(p.shape) for p in net.parameters()]
        for t, eps in zip(times, noise):
            x_t, target = M.add_noise(net, x0[i:i + 1], t[None], eps[None])
            net.zero_grad()
            ((net(x_t, t[None], y[i:i + 1]) - target) ** 2).sum().backward()
            total = [a + (p.grad.numpy() if p.grad is not None else 0) * 250 for a, p in zip(total, net.parameters())]
        expected = [e + a ** 2 / 3 for e, a in zip(expected, total)]
    for f, e in zip(found, expected):
        assert np.allclose(f.numpy(), e, rtol=1e-3, atol=1e-6 * max(e.max(), 1))


def test_what_was_forgotten_earlier_stays_out_and_is_rehearsed(small_shapes):
    x, y = tiny_data()
    task = unlearn.Task(x, y, NAMES, 1, [2], 8, 1.0, earlier={0: [1]})
    assert task.gone == {0: [1], 1: [2]}
    for part in (task.retain_set, task.forget_set):
        assert len(part[1]) and (part[1][:, 0] != 1).all()
    assert (task.retain_set[1][:, 1] != 2).all() and (task.forget_set[1][:, 1] == 2).all()

    run(unlearn, "--cls", 1, "--ckpt", "tiny.pt", *QUICK)
    run(unlearn, "--style", "neon", "--ckpt", "runs/shapes/dimum-cls1/model.pt", *QUICK)
    folder = Path("runs/shapes/dimum-style4-after-dimum-cls1")
    assert M.load_checkpoint(folder / "model.pt")[1]["forgotten"] == {"cls": [1], "style": [4]}
    result = json.loads((folder / "result.json").read_text())
    assert result["after"]["ua_of"].keys() == {"cls square", "style neon"} and result["after"]["ira_samples"] == 9 * 4
    run(attack, folder, *QUICK)
    result = json.loads(Path("runs/shapes/attack-dimum-style4-after-dimum-cls1-retain/result.json").read_text())
    assert result["after"]["ua_of"].keys() == {"cls square", "style neon"}


def test_dimum_rehearses_the_alternatives_of_everything_forgotten(small_shapes, monkeypatch):
    tiny_checkpoint("before.pt", forgotten={"cls": [1]})
    sets = []
    monkeypatch.setattr(unlearn, "run_method", lambda method, model, task, *args, **kw: sets.append(task) or sys.exit(0))
    for again in (("--style", "neon"), ("--cls", "triangle")):
        with pytest.raises(SystemExit):
            run(unlearn, *again, "--ckpt", "before.pt", *QUICK)
    style, cls = (task.alternative_set[1] for task in sets)
    assert ((style[:, 0] == 1) ^ (style[:, 1] == 4)).all() and (style[:, 0] == 1).any() and (style[:, 1] == 4).any()
    assert set(cls[:, 0].tolist()) == {1, 2}


def test_inverters_look_for_the_forgotten_images_and_the_network_is_taught_the_alternative_there(monkeypatch):
    net, task = tiny().train(), make_task(weight=1.0)
    task.n_inverters = 2
    unlearn.prepare_dimum(net, task)
    rows = task.inverters.weight
    assert rows.shape == (2, 16) and (rows[0] - rows[1]).abs().max() > 0.1

    asked, forward = [], net.forward
    monkeypatch.setattr(net, "forward", lambda x, t, y: asked.append(y.clone()) or forward(x, t, y))
    y, row = torch.tensor([[1, 0], [1, 2], [3, 1], [1, 1]]), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(5)
    loss = unlearn.inverted_loss(net, task, rows, row, torch.zeros(4, 3, 8, 8), y)
    assert asked[0].tolist() == [[5, 0], [6, 2], [6, 1], [5, 1]]
    torch.manual_seed(5)
    with torch.no_grad():                              # the same, with each inverter's row written into the table
        t = M.antithetic_times(4, torch.device("cpu"))
        x_t, target = M.add_noise(net, torch.zeros(4, 3, 8, 8), t, torch.randn(4, 3, 8, 8))
        total, kept = 0.0, net.label_embs[0].weight.clone()
        for i, k in enumerate(row):
            net.label_embs[0].weight[y[i, 0]] = rows[k]
            total += (forward(x_t[i:i + 1], t[i:i + 1], y[i:i + 1]) - target[i:i + 1]).square().mean().item() / 4
            net.label_embs[0].weight.copy_(kept)
    assert loss.item() == pytest.approx(total, rel=1e-4)

    before, first = weights(net), rows.detach().clone()
    task.step = 1                                      # no restart is due
    unlearn.move_inverters(net, task)
    assert torch.equal(weights(net), before) and all(p.grad is None for p in net.parameters())
    assert torch.allclose((rows - first).abs(), torch.tensor(unlearn.INVERTER_RATE), atol=1e-5)      # Adam's first step
    task.step = unlearn.INVERTER_LIFE // 2             # the second one starts anew, the first goes on
    unlearn.move_inverters(net, task)
    assert (rows[0] - first[0]).abs().max() < 0.11 < (rows[1] - first[1]).abs().max()
    moments = task.inverter_steps.state[rows]["exp_avg"]
    assert moments[0].abs().sum() > 0 == moments[1].abs().sum()


def test_at_an_inverters_place_the_network_is_taught_what_the_nearest_label_draws(monkeypatch):
    net, task = tiny(), make_task(weight=1.0)
    task.n_inverters = 2
    unlearn.prepare_dimum(net, task)
    with torch.no_grad():                              # the first has come to class 3, the second has stayed at home
        task.inverters.weight.copy_(net.label_embs[0].weight[[3, 1]] + 0.01)
    seen = []
    monkeypatch.setattr(unlearn, "inverted_loss", lambda model, task, rows, row, x0, y: seen.append((row, x0, y)))
    unlearn.blocked_loss(net, task)
    (row, x0, y), half = seen[0], task.n // 4
    assert row.tolist() == [0] * half + [1] * half and y[:half, 0].tolist() == [3] * half
    images = {value: images for value, (images, _) in task.images_of.items()}
    assert images.keys() == {0, 1, 2, 3} and torch.equal(images[1], task.alternative_set[0])
    for drawn, value in ((x0[:half], 3), (x0[half:], 1)):
        pool = {tuple(x.flatten().tolist()) for x in images[value]}
        assert all(tuple(x.flatten().tolist()) in pool for x in M.to_uint8(drawn))


def test_inverters_know_what_replaced_each_value_and_what_was_forgotten_earlier():
    x, y = tiny_data()
    task = unlearn.Task(x, y, NAMES, 0, [1], 8, 1.0, earlier={0: [3], 1: [2]})
    sets = [unlearn.alternative_data("class:2", None, *task.retain_set, NAMES, 0, [1, 3]),
            unlearn.alternative_data("class:0", None, *task.retain_set, NAMES, 1, [2])]
    task.alternative_set, task.n_inverters = [torch.cat(part) for part in zip(*sets)], 1
    unlearn.prepare_dimum(tiny(), task)
    pool = {tuple(x.flatten().tolist()) for x in task.retain_set[0][task.retain_set[1][:, 0] == 2]}
    assert task.images_of.keys() == {0, 1, 2, 3}
    for value in (1, 3):
        images, labels = task.images_of[value]
        assert set(map(tuple, labels.tolist())) == {(value, 0), (value, 1)}        # of the style's alternatives none
        assert len(images) and all(tuple(x.flatten().tolist()) in pool for x in images)


def test_swap_copies_one_embedding_row_and_touches_nothing_else():
    net, task = tiny(), make_task()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    unlearn.run_method("swap", net, task, steps=0, lr=1e-3)
    row = before["label_embs.0.weight"]
    row[1] = row[2]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_label_embeddings_have_a_rate_of_their_own():
    moved = {}
    for factor in (0.0, 1.0, 5.0):
        net, task = tiny().train(), make_task()
        torch.manual_seed(1)
        unlearn.run_method("finetune", net, task, steps=1, lr=1e-3, embedding_lr=factor)
        moved[factor] = [(a - b).detach() for a, b in zip(net.parameters(), tiny().parameters())]
    for (name, _), none, one, five in zip(net.named_parameters(), *moved.values()):
        scale = 5 if name.startswith("label_embs") else 1
        assert torch.allclose(five, scale * one, atol=1e-6) and torch.allclose(none, one * (scale == 1), atol=1e-6), name


@pytest.mark.parametrize("method", sorted(unlearn.METHODS))
def test_every_method_runs_and_is_repeatable(method, monkeypatch):
    results, prepare_sa = [], unlearn.prepare_sa
    for _ in range(2):
        net, task = tiny().train(), make_task(weight=0.1)
        monkeypatch.setattr(unlearn, "PREPARE", {**unlearn.PREPARE, "sa": lambda m, t: prepare_sa(m, t, 3, 9)})
        torch.manual_seed(1)
        unlearn.run_method(method, net, task, steps=3, lr=1e-3)
        results.append(weights(net))
    assert torch.equal(*results) and not torch.equal(results[0], weights(tiny()))


# ---- the attack ------------------------------------------------------------------------------------------------

def test_the_attackers_data_never_contains_a_forgotten_value(monkeypatch):
    monkeypatch.setattr(attack, "load_data", lambda dataset, split, *rest: (*tiny_data(), NAMES))
    net, cpu = tiny(), torch.device("cpu")
    for i in range(4):
        for name in "abcd":
            Path(f"aux/{NAMES[1][i % 3]}/{name}").mkdir(parents=True, exist_ok=True)
            color = (255, 255, 255) if name == "b" else (10 * i, 0, 0)
            Image.new("RGB", (9, 9), color).save(f"aux/{NAMES[1][i % 3]}/{name}/{i}.png")
    Path("aux/unknown").mkdir()
    Image.new("RGB", (9, 9), (3, 3, 3)).save("aux/unknown/x.png")
    for aux in ("retain", "heldout", "generated", "aux"):
        x, y = attack.auxiliary_set(aux, net, tiny_data(), "any", "", cpu, NAMES, {0: [1]}, generated=9)
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) and len(x) == len(y) > 8
        assert (y[:, 0] != 1).all()
        if aux != "generated":
            assert not (x == 255).flatten(1).all(1).any()
    assert (y == torch.tensor([4, 3])).all(1).sum() == 1         # the picture in aux/unknown


def test_few_shots_are_of_the_forgotten_conditions_only(capsys):
    shots = lambda k: attack.auxiliary_set(f"fewshot:{k}", tiny(), tiny_data(), "any", "", "cpu", NAMES, {0: [1]})
    x, y = shots(5)
    assert len(x) == 5 and (x == 255).all() and y.tolist() == [[1, 0], [1, 1], [1, 2], [1, 0], [1, 1]]
    for k in ("0", "", "x", "-1"):
        with pytest.raises(SystemExit):
            shots(k)


def test_inverting_the_embedding_moves_the_forgotten_row_alone(small_shapes):
    run(unlearn, "--method", "swap", "--cls", 1, "--ckpt", "tiny.pt", *QUICK, "--steps", 0)
    run(attack, "runs/shapes/swap-cls1", "--aux", "fewshot:3", "--only-embedding", *QUICK)
    before, after = (M.load_checkpoint(f"runs/shapes/{folder}/model.pt")[0].state_dict() for folder in
                     ("swap-cls1", "attack-swap-cls1-fewshot3-only-embedding"))
    changed = {k: (before[k] != after[k]) for k in before if not torch.equal(before[k], after[k])}
    assert changed.keys() == {"label_embs.0.weight"}
    assert changed["label_embs.0.weight"].any(1).tolist() == [v == 1 for v in range(11)]
    moved = (after["label_embs.0.weight"] - before["label_embs.0.weight"]).abs().max()
    assert 0.05 < moved < 0.11                         # two steps of Adam at this attack's own rate
    run(attack, "runs/shapes/swap-cls1", "--freeze-embeddings", *QUICK)
    after = M.load_checkpoint("runs/shapes/attack-swap-cls1-retain-freeze-embeddings/model.pt")[0].state_dict()
    assert {k.startswith("label_embs") for k in before if torch.equal(before[k], after[k])} == {True}
    result = json.loads(Path("runs/shapes/attack-swap-cls1-retain-freeze-embeddings/result.json").read_text())
    parts = result["weights"]
    assert parts["forgotten embedding"]["unlearn"] > 0 == parts["forgotten embedding"]["attack"]
    assert parts["down layers"]["attack"] > 0 == parts["down layers"]["unlearn"] and parts["down layers"]["cosine"] is None


def test_the_attackers_average_of_weights(monkeypatch):
    x, y = tiny_data()
    net, seen = tiny(), []
    monkeypatch.setattr(train_ddpm, "diffusion_loss", lambda model, x0, y, p: seen.append(weights(model)) or
                        sum(p.sum() for p in model.parameters())[None])
    averaged, _ = attack.dimra(net, x, y, 3, 4, 1e-2, ema=0.9)
    seen.append(weights(net))
    expected = seen[0]
    for step, w in enumerate(seen[1:]):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * w
    assert torch.allclose(weights(averaged), expected, atol=1e-6) and not torch.allclose(expected, weights(net))


def test_weight_changes_against_a_small_computation():
    first, unlearned, attacked = tiny(), tiny(), tiny()
    with torch.no_grad():
        unlearned.conv_in.weight += 0.5
        attacked.conv_in.weight += 0.25                     # half of it taken back
        unlearned.label_embs[0].weight[1] *= 2
        attacked.label_embs[0].weight[1] *= 2
        attacked.label_embs[0].weight[2] *= 1.5
    parts = attack.weight_changes(first, unlearned, attacked, 0, [1])
    conv = parts["conv layers"]
    assert conv["cosine"] == pytest.approx(-1) and conv["unlearn"] == pytest.approx(2 * conv["attack"], rel=1e-5)
    own, others = parts["forgotten embedding"], parts["other embeddings"]
    assert own["unlearn"] == pytest.approx(1) and own["attack"] == 0 and own["cosine"] is None
    rest = [first.label_embs[0].weight[[0, 2, 3, 4]], first.label_embs[1].weight]
    total = sum(w.square().sum() for w in rest) ** 0.5
    assert others["attack"] == pytest.approx((0.5 * rest[0][1].norm() / total).item()) and others["unlearn"] == 0


def result_file(folder, stage, ar=0.0, seed=0, value=1, model="m", method="salun", **more):
    """A result.json as unlearn.py or attack.py leaves it, as far as the table reads it."""
    metrics = {"ua": 1 - ar, "ira": 1.0, "cra": None, "fid": 20.0, **{f"{k}_samples": 50 for k in ("ua", "ira", "cra")}}
    data = {"stage": stage, "dataset": "shapes", "method": method, "before": metrics, "after": metrics, "steps": 100,
            "forget": {"factor": "cls", "values": [value], "names": [train_ddpm.SHAPES[value]]}, "batch_size": 32,
            "lr": 1e-3, "args": {"seed": seed}, "protocol": {
                "dataset": "shapes", "forget_samples": 50, "retain_samples": 50, "sampler": "ddim", "sampler_steps": 20,
                "guidance": 2, "fid_features": "classifier", "real_images": 9}}
    data |= {"model": model, "train_seconds": 1.0, "curve": [],
             "unlearned": {"steps": more.get("steps", 100)}} if stage == "unlearn" else {
        "ckpt": model, "aux": "retain", "every": 50, "p_drop": 0.1, "ema": 0, "trained": "all",
        "curve": [{"step": s, "ar": a, "ar_low": 0, "ar_high": 1} for s, a in ((0, 0.0), (50, ar / 2), (100, ar))]}
    M.write_json(Path(folder, "result.json"), data | more)


def test_the_table_groups_seeds_and_values_and_keeps_settings_apart(capsys):
    for seed, value, ar in ((0, 1, 0.2), (1, 1, 0.4), (0, 3, 0.9)):
        result_file(f"runs/{seed}{value}", "unlearn", seed=seed, value=value, model=f"m{seed}{value}")
        result_file(f"runs/{seed}{value}-retain", "attack", ar, seed, value, f"m{seed}{value}")
    result_file("runs/long", "unlearn", model="long", steps=300)
    for inverters in (0, 4):                           # attacks on models whose own results lie elsewhere
        result_file(f"runs/elsewhere{inverters}", "attack", 0.1, method="dimum", unlearned={"inverters": inverters})
    result_file("runs/original", "attack", 1.0, method="original", model="none")
    sketch = {"factor": "style", "values": [3], "names": ["sketch"]}
    result_file("runs/style", "attack", 0.5, method="esd", model="none", forget=sketch)
    run(attack, "--table", "runs")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in Path("runs/table.md").read_text().splitlines()
            if line.startswith(("| method", "| salun", "| dimum", "| original"))]
    cells = {row[0]: dict(zip(rows[0], row)) for row in rows[1:]}
    assert rows[0] == ["method", "forgets", "runs", "seconds", "UA", "IRA", "FID before", "FID after", "attack", "AR",
                       "peak", "IRA after", "half at"]  # no style is kept or recognised here, nothing was retrained
    assert cells.keys() == {"salun steps 100", "salun steps 300", "original", "dimum inverters 0", "dimum inverters 4"}
    low, high = fid.wilson(75, 150)
    assert cells["salun steps 100"]["forgets"] == "cross, square" and cells["salun steps 100"]["runs"] == "3"
    assert cells["salun steps 100"]["AR"] == f"50.0 (20..90) [{100 * low:.0f}, {100 * high:.0f}]"
    assert cells["salun steps 100"]["peak"] == "50 at 100"
    assert {p.name for p in Path("runs").glob("*.png")} == {"attack_curves_cls.png", "attack_curves_style.png"}
    assert cells["salun steps 300"]["AR"] == "-" and cells["original"]["UA"] == "-" and cells["original"]["half at"] == "100"


def test_the_study_runs_what_is_missing_and_resumes_what_is_half_done(monkeypatch, capsys):
    plan = [("q1/a/salun", "unlearn.py", ("--cls", 1)), ("q1/a/salun-retain", "attack.py", ("{}/q1/a/salun",)),
            ("q1/a/gone-retain", "attack.py", ("{}/q1/a/gone",)), ("q1/b/salun", "unlearn.py", ("--cls", 3))]
    calls = []
    monkeypatch.setattr(attack, "study_plan", lambda: plan)
    monkeypatch.setattr(attack, "run_stage", lambda script, *words: calls.append((script, *map(str, words))) or result_file(
        words[words.index("--out") + 1], script[:-3]))
    result_file("s/q1/a/salun", "unlearn")
    Path("s/q1/a/salun/model.pt").touch()
    result_file("s/q1/a/gone", "unlearn")
    result_file("s/classes/x", "unlearn", model="x", curve=[{"step": s, "fid": 30.0 + s} for s in (0, 100)])
    part = {"unlearn": 0.5, "attack": 0.1, "cosine": -1.0}
    parts = {"down layers": part, "up layers": {**part, "cosine": None}}
    result_file("s/classes/y", "attack", run_name="salun", weights=parts)
    Path("s/q1/b/salun").mkdir(parents=True)
    Path("s/q1/b/salun/train.pt").touch()
    run(attack, "--study", "s")
    assert calls == [("attack.py", "s/q1/a/salun", "--out", "s/q1/a/salun-retain"),
                     ("unlearn.py", "--cls", "3", "--out", "s/q1/b/salun", "--resume")]
    assert "remove s/q1/a/gone" in capsys.readouterr().out           # its result is there, its weights are not
    assert Path("s/q1/table.md").read_text().count("| salun | square | 1 |") == 1          # equal models count once
    assert Image.open("s/weights.png").size == (70 + 2 * 104, 34 + 58)
    assert Image.open("s/fid_during_unlearning.png").size == (760, 420)
    run(attack, "--study", "s")
    assert len(calls) == 2


def test_the_plans_commands_are_accepted(monkeypatch):
    plan = list(attack.study_plan())
    assert len({name for name, *_ in plan}) == len(plan)
    known = set()
    for name, script, words in plan:
        flags = [w for w in map(str, words) if w.startswith("--")]
        text = (HERE / script).read_text() + (HERE / "train_ddpm.py").read_text()
        assert all(f'"{flag}"' in text for flag in flags)
        assert all(str(w)[3:].removesuffix("/model.pt") in known for w in words if str(w).startswith("{}/"))
        known.add(name)                                # what a run needs comes before it


def test_the_demonstration_ends_in_one_picture(small_shapes, monkeypatch, capsys):
    modules = {"unlearn.py": unlearn, "attack.py": attack}
    monkeypatch.setattr(attack, "run_stage", lambda script, *words: run(modules[script], *words, *QUICK))
    run(attack, "--demo")
    assert Image.open("runs/demo/demo.png").size == (8 + 7 * len("dimum, attacked") + 10 * 66, 16 + 5 * 66)
    assert "ga: AR" in capsys.readouterr().out


def test_area_and_irreversibility():
    curve = lambda *ars: ([10 * i * i for i in range(len(ars))], ars)
    assert attack.area(curve(0, 1)) == 0.5 and attack.area(curve(0, 1, 1)) == pytest.approx((5 + 30) / 40)
    floor, ceiling = curve(0, 0.2), curve(1, 1)
    assert attack.irreversibility(floor, floor, ceiling) == 1 and attack.irreversibility(ceiling, floor, ceiling) == 0
    assert attack.irreversibility(curve(0, 1), floor, ceiling) == pytest.approx(1 - 0.4 / 0.9)
    assert attack.irreversibility(curve(0, 1), None, ceiling) is None


# ---- evaluation ------------------------------------------------------------------------------------------------

def test_frechet_distance():
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.1, 2, 8), rng.uniform(0.1, 2, 8)
    closed = ((m1 - m2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert fid.frechet_distance(m1, np.diag(s1), m2, np.diag(s2)) == pytest.approx(closed, rel=1e-10)
    (mu1, c1), (mu2, c2) = (fid.statistics(rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))) for _ in range(2))
    reference = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid.frechet_distance(mu1, c1, mu2, c2) == pytest.approx(reference, rel=1e-8)
    few = rng.normal(size=(5, 8))                                # singular covariance: fewer images than dimensions
    assert fid.frechet_distance(*fid.statistics(few), *fid.statistics(few)) == pytest.approx(0, abs=1e-6)


def test_inception_pools_as_pytorch_fid_does():
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(net.state_dict(), "inception.pth")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    outputs = {}
    features, patched = fid.inception("inception.pth")
    for name in ("Mixed_6a", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        getattr(patched, name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
    with torch.inference_mode():
        found = features(images)
        x = outputs["Mixed_6a"]
        valid = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)        # the share of each window that is not padding
        pooled = patched.Mixed_6b.branch_pool.conv(F.avg_pool2d(x, 3, 1, 1) / valid)
        expected = F.relu(patched.Mixed_6b.branch_pool.bn(pooled))
        assert torch.allclose(outputs["Mixed_6b"][:, -192:], expected, atol=1e-5)
        windows = F.unfold(F.pad(outputs["Mixed_7b"], (1, 1, 1, 1), value=-9e9), 3).unflatten(1, (2048, 9)).amax(2)
        pooled = patched.Mixed_7c.branch_pool.conv(windows.view(2, 2048, 8, 8))
        expected = F.relu(patched.Mixed_7c.branch_pool.bn(pooled))
        assert torch.allclose(outputs["Mixed_7c"][:, -192:], expected, atol=1e-5)
        assert found.shape == (2, 2048) and torch.allclose(found, outputs["Mixed_7c"].mean((2, 3)), atol=1e-5)


def test_garbage_is_recognised_as_nothing():
    classifier, accuracy = fid.load_classifier("shapes", "data", torch.device("cpu"), train_ddpm.label_names("shapes"))
    x, y = train_ddpm.draw_shapes(4, seed=77)
    x = x.float() / 127.5 - 1
    assert (fid.predict(classifier, x) == y).double().mean() > 0.98
    torch.manual_seed(3)
    for spoilt in (fid.garbage(x), torch.rand_like(x) * 2 - 1, torch.randn_like(x).clamp(-1, 1)):
        assert (fid.predict(classifier, spoilt) == torch.tensor([10, 5])).double().mean() > 0.95


def test_a_pale_or_blotchy_image_is_still_recognised():
    classifier, _ = fid.load_classifier("shapes", "data", torch.device("cpu"), train_ddpm.label_names("shapes"))
    x, y = train_ddpm.draw_shapes(4, seed=78)
    x = x.float() / 127.5 - 1
    blot = 0.2 * torch.sin(torch.arange(32) / 5)[None, None, :, None]              # not of the kind it was trained with
    for faulty in (0.6 * x + 0.2, 0.7 * x + blot, (x + 0.15 * torch.randn_like(x)).clamp(-1, 1)):
        assert (fid.predict(classifier, faulty) == y).double().mean() > 0.95


@pytest.mark.parametrize("hits,n", [(0, 20), (7, 20), (20, 20), (500, 1000)])
def test_wilson_interval_agrees_with_scipy(hits, n):
    peer = scipy.stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert fid.wilson(hits, n) == pytest.approx((peer.low, peer.high), abs=1e-4)


def test_precision_and_recall():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(30, 3)), rng.normal(size=(25, 3)) * 0.3
    def brute(points, centres):
        radius = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])
    assert fid.precision_recall(real, fake) == pytest.approx((brute(fake, real), brute(real, fake)))
    assert fid.precision_recall(real, fake)[1] < 0.9


def test_scores_count_what_they_say():
    class Oracle(torch.nn.Module):
        """Reads the class from the mean of the first row, the style from that of the second."""
        def forward(self, x):
            return [F.one_hot((x[:, 0, row].mean(1) * 10).round().long(), 4) for row in (0, 1)]

        def features(self, x):
            return x[:, 0, :2].mean(2) + torch.linspace(0, 0.1, len(x))[:, None] ** 2
    y = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 3 + [[2, 2]] * 3)
    drawn = y.clone()
    drawn[:3, 0] = 2                                   # three of four forgotten samples show something else
    drawn[4, 0], drawn[5, 1] = 3, 0
    x = torch.zeros(10, 1, 8, 8)
    x[:, :, 0], x[:, :, 1] = (drawn[:, i, None, None].expand(-1, 1, 8) / 10 for i in (0, 1))
    scores = fid.score(x, y, Oracle(), {0: [1]}, 0, NAMES, torch.randn(50, 2))
    assert (scores["ua"], scores["ira"], scores["cra"]) == pytest.approx((3 / 4, 5 / 6, 5 / 6))
    assert (scores["ua_samples"], scores["ira_samples"]) == (4, 6)
    both = fid.score(x, y, Oracle(), {0: [1], 1: [2]}, 0, NAMES, torch.randn(50, 2))
    assert both["ua_of"] == pytest.approx({"cls b": 3 / 4, "style r": 0}) and both["ua"] == pytest.approx(3 / 7)
    assert both["ira"] == pytest.approx(2 / 3) and both["ira_samples"] == 3


def test_two_folders_with_the_classifier_and_bad_folders(capsys):
    x, _ = train_ddpm.draw_shapes(1, seed=3)
    for name, images in (("a", x[:25]), ("b", x[25:])):
        Path(name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{name}/{i}.png")
    run(fid, "a", "b", "--features", "classifier", "--out", "out")
    result = json.loads(Path("out/result.json").read_text())
    assert result["fid"] > 1 and result["protocol"]["real_images"] == 25 and Path("out/samples.png").is_file()
    run(fid, "a", "a", "--features", "classifier", "--out", "same")
    assert json.loads(Path("same/result.json").read_text())["fid"] < 1e-3
    Path("empty").mkdir()
    assert "holds 0 images" in refused(capsys, fid, "a", "empty")
    assert "--inception-weights" in refused(capsys, fid, "a", "b", "--inception-weights", "none.pth")


# ---- files and mistakes ----------------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_damaged_and_foreign_checkpoints_are_refused(capsys):
    good = Path(tiny_checkpoint("good.pt")).read_bytes()
    Path("truncated.pt").write_bytes(good[:len(good) // 2])
    Path("text.pt").write_text("hello")
    Path("bomb.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"format": 99, "kind": "unet"}, "future.pt")
    torch.save({"weights": {}}, "foreign.pt")
    for name in ("truncated", "text", "bomb", "future", "foreign", "missing"):
        assert f"{name}.pt" in refused(capsys, unlearn, "--cls", 1, "--ckpt", f"{name}.pt")
    assert not Path("exploded").exists() and not Path("runs").exists()


def test_checkpoints_come_back_equal_and_half_size_on_request():
    net = tiny()
    info = {"dataset": "shapes", "names": NAMES, "made_by": {}}
    M.save_checkpoint("full.pt", net, info)
    M.save_checkpoint("half.pt", net, info, half=True)
    loaded, data = M.load_checkpoint("full.pt")
    assert torch.equal(weights(net), weights(loaded)) and data["names"] == NAMES and loaded.cfg == net.cfg
    assert Path("half.pt").stat().st_size < 0.7 * Path("full.pt").stat().st_size
    assert torch.allclose(weights(net), weights(M.load_checkpoint("half.pt")[0]), atol=1e-3)
    assert [p.name for p in Path(".").glob(".*tmp")] == []


def test_a_failed_write_leaves_the_old_file(capsys):
    M.write_file("kept", lambda p: p.write_text("old"))

    def broken(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit) as stop:
        M.write_file("kept", broken)
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert Path("kept").read_text() == "old" and os.listdir(".") == ["kept"]


MISTAKES = [
    (("--cls", "12"), "0 circle, 1 square"),
    (("--cls", "aeroplane"), "0 circle, 1 square"),
    (("--cls", "²"), "0 circle, 1 square"),
    ((), "--cls or --style"),
    (("--cls", "1", "--style", "2"), "--cls or --style"),
    (("--cls", "1", "--alternative", "class:1"), "choose another value"),
    (("--cls", "1", "--alternative", "image:none.png"), "cannot be read"),
    (("--cls", "1", "--alternative", "rubbish"), "class:K, mix, image:PATH, noise"),
    (("--cls", "1", "--steps", "-5"), "at least 0"),
    (("--cls", "1", "--steps", "many"), "not a whole number"),
    (("--cls", "1", "--lr", "nan"), "not a number"),
    (("--cls", *map(str, range(10))), "at least one value must remain"),
    (("--cls", "1", "--dataset", "fashion"), "trained on shapes"),
    (("--cls", "1", "--device", "abacus"), "--device cpu"),
    (("--cls", "1", "--out", "/dev/null/run"), "--out"),
    (("--cls", "1", "--method", "magic"), "dimum"),
    (("--cls", "1", "--speed", "9"), "--help"),
]


@pytest.mark.parametrize("args,part", MISTAKES)
def test_mistakes_get_one_clear_line(args, part, capsys):
    tiny_checkpoint("tiny.pt")
    assert part in refused(capsys, unlearn, "--ckpt", "tiny.pt", *args)
    assert not Path("runs").exists()


def test_mistakes_of_the_other_stages(capsys):
    tiny_checkpoint("tiny.pt")
    assert "--cls or --style" in refused(capsys, attack, "tiny.pt")
    assert "no such file: nothing" in refused(capsys, attack, "nothing")
    assert "neither retain" in refused(capsys, attack, "tiny.pt", "--cls", 1, "--aux", "nowhere")
    assert "no results" in refused(capsys, attack, "--table", ".")
    assert "has no style" in refused(capsys, train_ddpm, "--dataset", "fashion", "--exclude-style", 1)
    assert "nothing is left" in refused(capsys, train_ddpm, "--exclude-cls", *range(10))


def test_the_four_stages_write_what_they_promise_and_keep_earlier_runs(small_shapes, capsys):
    for _ in range(2):
        run(unlearn, "--cls", "square", "--ckpt", "tiny.pt", *QUICK, "--samples", 60, "--eval-every", 1)
    assert "dimum-cls1 holds a finished run, which is kept" in capsys.readouterr().out
    first, second = Path("runs/shapes/dimum-cls1"), Path("runs/shapes/dimum-cls1-2")
    for name in ("model.pt", "result.json", "log.csv", "samples.png", "fid.png", "curve.csv"):
        assert (first / name).is_file() and (second / name).is_file()
    assert torch.equal(weights(M.load_checkpoint(first / "model.pt")[0]), weights(M.load_checkpoint(second / "model.pt")[0]))
    result = json.loads((first / "result.json").read_text())
    assert result["forget"] == {"factor": "cls", "values": [1], "names": ["square"]}
    assert {"ua", "ira", "cra", "fid", "fid_features", "ua_low"} <= result["before"].keys() & result["after"].keys()
    assert {"sampler", "sampler_steps", "guidance", "forget_samples", "seed", "machine"} <= result["protocol"].keys()
    run(unlearn, "--method", "retrain", "--cls", 1, "--ckpt", "tiny.pt", *QUICK)
    for folder in (first, "runs/shapes/retrain-cls1"):
        run(attack, folder, *QUICK)
    run(attack, "tiny.pt", "--cls", 1, *QUICK)
    run(attack, "--table", "runs")
    table = Path("runs/table.md").read_text()
    assert table.count("| dimum | square | 1 |") == table.count("| retrain | square | 1 |") == 1
    assert "| original | square | 1 |" in table and "| retain, 2 steps |" in table
    assert Image.open("runs/attack_curves.png").size == (760, 420)
    assert Image.open(first / "samples.png").size[0] > 600


# ---- unbreakable -----------------------------------------------------------------------------------------------

def forked(work):
    """work() in a child process: its exit code, or minus the signal that ended it. One thread, which a fork needs; so
    weights may be compared between children only."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_replace(n, *command):
    """A child that runs the command and gets SIGKILL just before its n-th file would take its final name."""
    def work():
        replace, calls = os.replace, []

        def counting(*args):
            calls.append(args)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(*args)
        os.replace = counting
        run(*command)
    return forked(work)


@pytest.fixture
def small_shapes(monkeypatch):
    """Shapes with a few images per cell, a tiny network and its checkpoint, no other data to be had, and a training state
    saved after every step."""
    def offline(url, timeout):
        raise OSError("no network")
    draw = train_ddpm.draw_shapes
    monkeypatch.setattr(train_ddpm, "urlopen", offline)
    monkeypatch.setattr(train_ddpm, "FASHION_FOLDERS", train_ddpm.FASHION_FOLDERS[:2])
    monkeypatch.setitem(M.PRESETS, "small", SMALLEST)
    monkeypatch.setattr(train_ddpm, "draw_shapes", lambda per_cell, seed: draw(4, seed))
    monkeypatch.setattr(train_ddpm, "SAVE_SECONDS", -1)
    return tiny_checkpoint("tiny.pt")


STAGES = {
    "train": (train_ddpm, "--exclude-cls", 3),
    "salun": (unlearn, "--method", "salun", "--cls", 1, "--ckpt", "tiny.pt", "--eval-every", 2),
    "dimum": (unlearn, "--style", "neon", "--ckpt", "tiny.pt"),
    "inverters": (unlearn, "--cls", 1, "--ckpt", "tiny.pt", "--inverters", 2),
    "retrain": (unlearn, "--method", "retrain", "--cls", 1, "--ckpt", "tiny.pt"),
    "attack": (attack, "tiny.pt", "--cls", 1, "--every", 2),
    "classifier": (fid, "--train-classifier"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_goes_on_to_the_very_same_weights(stage, small_shapes, monkeypatch):
    module, *args = STAGES[stage]
    mask = unlearn.salun_mask
    monkeypatch.setattr(unlearn, "salun_mask", lambda model, task: mask(model, task, batches=2))
    command = (module, *args, *QUICK, "--steps", 5)
    assert forked(lambda: run(*command, "--out", "whole")) == 0
    kills = 0
    for n in (1, 3, 2, 4):                             # the first states, then later ones, then the results
        resume = ("--resume",) if kills else ()
        kills += killed_at_replace(n, *command, "--out", "killed", *resume) == -signal.SIGKILL
    assert kills >= 3
    assert forked(lambda: run(*command, "--out", "killed", "--resume")) == 0
    whole, killed = (torch.load(f"{folder}/model.pt", weights_only=True)["weights"] for folder in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)
    same = lambda folder: [line.rsplit(",", 1)[0] for line in Path(folder, "log.csv").read_text().splitlines()]
    assert stage == "classifier" or same("whole") == same("killed")
    assert not list(Path("killed").glob(".*"))


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_the_losses_of_a_resumed_run_are_where_its_network_is():
    """Saved losses are on the CPU, those of the steps to come where the network is; the two are stacked."""
    net = tiny()
    loop = train_ddpm.Loop("training", 300, Path("train.pt"), model=net)
    loop.recent = [torch.tensor(0.5)]
    loop.save(1)
    resumed = train_ddpm.Loop("training", 300, Path("train.pt"), resume=True, model=net.to("meta"))
    assert [(loss.device.type, loss.shape) for loss in resumed.recent] == [("meta", ())]


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(small_shapes, capsys):
    command = (train_ddpm, *QUICK, "--out", "run")
    assert killed_at_replace(2, *command) == -signal.SIGKILL
    assert "steps 2" in refused(capsys, *command, "--resume", "--steps", 3)
    assert "seed 0" in refused(capsys, *command, "--resume", "--seed", 3)
    run(*command, "--resume")
    before = {p: p.stat().st_mtime_ns for p in Path("run").iterdir()}
    with pytest.raises(SystemExit) as stop:
        run(*command, "--resume")
    assert stop.value.code == 0 and "nothing to resume" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path("run").iterdir()}


def test_two_runs_in_one_folder_do_not_mix(small_shapes, capsys):
    assert M.claim(Path("run"))
    command = (train_ddpm, *QUICK, "--out", "run")
    assert forked(lambda: run(*command, "--resume")) == 2
    assert forked(lambda: run(*command)) == 0
    assert not any(Path("run").iterdir()) and Path("run-2/model.pt").is_file()


def test_a_file_size_limit_stops_with_a_clear_line_and_keeps_the_old_state(small_shapes, capfd):
    command = (train_ddpm, *QUICK, "--out", "run")
    assert killed_at_replace(2, *command) == -signal.SIGKILL
    state = Path("run/train.pt").read_bytes()
    capfd.readouterr()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        run(*command, "--resume")
    assert forked(limited) == 2
    error = capfd.readouterr().err
    assert "run/train.pt (File too large)" in error and error.count("\n") == 1
    assert Path("run/train.pt").read_bytes() == state and [p.name for p in Path("run").iterdir()] == ["train.pt"]


def test_a_diverging_run_names_the_step_and_keeps_the_last_good_state(small_shapes, capsys, monkeypatch):
    loss, calls = train_ddpm.diffusion_loss, []

    def explode(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.inf if len(calls) == 4 else 1)
    monkeypatch.setattr(train_ddpm, "diffusion_loss", explode)
    error = refused(capsys, train_ddpm, *QUICK, "--steps", 9, "--out", "run")
    assert "at step 4" in error and "inf" in error and "--lr" in error
    state = torch.load("run/train.pt", weights_only=True)
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["model"].values())

    monkeypatch.setattr(train_ddpm, "diffusion_loss", loss)
    net, (x, y) = tiny().train(), tiny_data()
    with torch.no_grad():
        net.label_embs[0].weight[3] = math.nan         # of a class that is not trained on: the loss stays finite
    keep = y[:, 0] != 3
    with pytest.raises(SystemExit):
        train_ddpm.train(net, x[keep], y[keep], **{**TRAIN, "steps": 1})
    assert "weights are not finite" in capsys.readouterr().err


def test_flipped_bits_are_noticed(capsys):
    good = Path(tiny_checkpoint("good.pt")).read_bytes()
    weights_at = good.index(M.load_verified("good.pt")["weights"]["conv_in.weight"].numpy().tobytes())
    whole = M.load_verified("good.pt")["weights"]
    refusals = 0
    for position in [*range(0, len(good), len(good) // 150), *range(len(good) - 150, len(good)), weights_at + 5]:
        flipped = bytearray(good)
        flipped[position] ^= 16
        Path("flipped.pt").write_bytes(flipped)
        try:
            found = M.load_verified("flipped.pt")["weights"]
            assert all(torch.equal(found[k], whole[k]) for k in whole)         # a date, or padding
        except ValueError:
            refusals += 1
    assert refusals > 100                              # the last was in a weight
    assert "flipped.pt is truncated, damaged" in refused(capsys, unlearn, "--cls", 1, "--ckpt", "flipped.pt")


def test_ctrl_c_ends_in_one_line_and_130(small_shapes, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(unlearn, "evaluate", interrupted)
    sys.argv = ["unlearn.py", "--cls", "1", "--ckpt", "tiny.pt", *map(str, QUICK)]
    with pytest.raises(SystemExit) as stop:
        M.run_script(unlearn.main)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "python unlearn.py --cls 1" in error and "--resume" in error


# ---- every flag, with every kind of value ----------------------------------------------------------------------

BASES = {train_ddpm: (), unlearn: ("--cls", 1, "--ckpt", "tiny.pt"), attack: ("tiny.pt", "--cls", 1),
         fid: ("test", "tiny.pt")}


def actions(module, monkeypatch):
    """The flags and positionals that the script's own parser knows, except --help."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(M.Parser, "parse_args", lambda self: found.extend(self._actions) or sys.exit(0))
        with pytest.raises(SystemExit):
            run(module)
    return [a for a in found if a.dest != "help"]


def values_for(action):
    """(value, must it be refused?) pairs for one argument."""
    if action.nargs == 0:
        return [(None, False)]
    if hasattr(action.type, "low"):
        low, high = action.type.low, action.type.high
        over = [(high + 1, True)] if high < math.inf else []
        accepted = [(v, False) for v in {low, max(1, low)}]
        return [(v, True) for v in ("x", "", "nan", "inf", "1e999", low - 1)] + over + accepted
    if action.choices:
        return [("nonsense", True), ("", True), *((choice, False) for choice in list(action.choices)[:2])]
    return [(v, False) for v in ("", ".", "nowhere/at/all", "tiny.pt", "-1", "1", "99", "²", "a b")]


@pytest.mark.parametrize("module", BASES, ids=lambda m: m.__name__)
def test_no_flag_value_ends_in_a_traceback(module, small_shapes, monkeypatch, capsys):
    monkeypatch.setattr(train_ddpm, "benchmark", lambda *args: None)
    monkeypatch.setattr(train_ddpm, "compile_network", lambda model: None)
    monkeypatch.setattr(attack, "study_plan", lambda: [])
    monkeypatch.setattr(attack, "demo", lambda device: None)
    monkeypatch.setattr(unlearn, "PREPARE", {})
    monkeypatch.setattr(train_ddpm, "SAVE_SECONDS", math.inf)          # or every run saves after each step
    for preset in M.PRESETS:                           # or stage 1 trains the whole network sixty times
        monkeypatch.setitem(M.PRESETS, preset, SMALLEST)
    monkeypatch.setattr(M, "T", 20)                    # or --sampler ddpm takes its 1,000 steps
    count = 0
    for action in actions(module, monkeypatch):
        for value, must_fail in values_for(action):
            base = (*BASES[module], *QUICK)
            if not action.option_strings:
                args = (value, *base[1:]) if action.dest != "fake" else ("test", value, *base[2:])
            else:
                args = (*base, action.option_strings[0] if value is None else f"{action.option_strings[0]}={value}")
            capsys.readouterr()
            try:
                run(module, *args)
                code = 0
            except SystemExit as stop:
                code = stop.code
            error = capsys.readouterr().err
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 or code == 0 and not must_fail, \
                (args, code, error)
            count += 1
    assert count > 60


EDGES = [
    (train_ddpm, "--steps", 0), (train_ddpm, "--batch-size", 500), (train_ddpm, "--guidance", 0),
    (train_ddpm, "--exclude-cls", *range(9)),
    (unlearn, "--cls", 1, "--ckpt", "tiny.pt", "--steps", 0), (unlearn, "--cls", *range(9), "--ckpt", "tiny.pt"),
    (unlearn, "--cls", 1, "--ckpt", "tiny.pt", "--batch-size", 1, "--steps", 1),
    (unlearn, "--cls", 1, "--ckpt", "tiny.pt", "--alt-size", 10 ** 9, "--samples", 300),
    (attack, "tiny.pt", "--cls", 1, "--steps", 0), (attack, "tiny.pt", "--cls", 1, "--every", 10 ** 9),
    (fid, "test", "tiny.pt", "--samples", 1000),
]


@pytest.mark.parametrize("module,args", [(m, a) for m, *a in EDGES])
def test_edges_work(module, args, small_shapes):
    run(module, *QUICK, *args)


# ---- the shipped model -----------------------------------------------------------------------------------------

def test_the_shipped_model_draws_every_class_and_style_and_forgets_one():
    assert (HERE / "assets/shapes.pt").stat().st_size < 6e6
    assert (HERE / "assets/shapes_classifier.pt").stat().st_size < 1e6
    net, info = M.load_checkpoint(HERE / "assets/shapes.pt")
    classifier, accuracy = fid.load_classifier("shapes", "data", torch.device("cpu"), info["names"])
    assert min(accuracy) >= 0.99
    y = train_ddpm.all_labels(info["names"], 1)
    x = M.sample(net, y, steps=10)
    assert ((fid.predict(classifier, x) == y).double().mean(0) >= 0.93).all()

    x, labels, names = train_ddpm.load_data("shapes", "train")
    task = unlearn.Task(x, labels, names, 0, [1], 16, 1.0)
    task.alternative_set = unlearn.alternative_data("class:triangle", None, *task.retain_set, names, 0, [1])
    unlearn.run_method("dimum", net, task, steps=35, lr=1e-3)
    y = torch.tensor([[1, s] for s in range(5)] * 4)
    seen = fid.predict(classifier, M.sample(net, y, steps=10))
    assert (seen[:, 0] != 1).double().mean() >= 0.8
