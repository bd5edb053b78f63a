"""The behaviour that must hold, checked on a CPU: python -m pytest -q"""
import gzip, io, itertools, json, multiprocessing, os, pickle, re, shlex, signal, sys      # noqa: E401
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# bits are compared, a fork cannot go on with a GPU or with threads, and the networks are tiny
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import numpy as np, pytest, scipy.linalg, torch, torchvision      # noqa: E401
import torch.nn.functional as F
from PIL import Image

import attack, fid, model as M, train_ddpm, unlearn        # noqa: E401

HERE, CPU, BETAS = Path(__file__).parent, torch.device("cpu"), np.linspace(1e-4, 0.02, 1000)
A = np.cumprod(1 - BETAS)                                              # alphas_cumprod
TINY = M.UNetConfig(image_size=8, width=16, mult=(1, 2), attention=(4,), groups=4, classes=(4, 3))
SMALLEST = M.UNetConfig(width=8, mult=(1, 1), groups=4, attention=())  # for images of 32 x 32
NAMES = [["a", "b", "c", "d"], ["p", "q", "r"]]
QUICK, LOOK = "--steps 2 --batch-size 4", "--steps 2 --batch-size 4 --samples 1 --sampler-steps 1"

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test runs in its own folder, offline, in float32, with the generator in a known state."""
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", Mock(side_effect=OSError))
    monkeypatch.setattr(train_ddpm, "DEBIAN", Path("debian"))
    monkeypatch.setattr(M, "CPU_BF16", False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

@pytest.fixture
def small(monkeypatch):  # Two shapes per cell, a very small network and its checkpoint tiny.pt
    monkeypatch.setitem(M.PRESETS, "small", SMALLEST)
    monkeypatch.setattr(train_ddpm, "draw_shapes", lambda n, seed, draw=train_ddpm.draw_shapes: draw(2, seed))
    tiny_checkpoint("tiny.pt")

def run(module, command):  # The script's main() with this command line
    sys.argv = [f"{module.__name__}.py", *shlex.split(command)]
    module.main()

def refused(capsys, function, *args):  # The one line with which function(*args) ends the program; exit code 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error

def result(folder):
    return json.loads(Path(folder, "result.json").read_text())

def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])

def new(cfg=TINY, **changes):
    """A network in eval mode, always the same, with random numbers also where it starts from zeros."""
    torch.manual_seed(0)
    net = M.UNet(M.replace(cfg, **changes))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p) * (not p.any())
    return net.eval()

def tiny_data():  # Random images, 20 of every label of TINY; class 1 is all 255, style 2 all 7
    y = M.all_labels(NAMES).repeat_interleave(20, 0)
    x = torch.randint(10, 200, (240, 3, 8, 8), dtype=torch.uint8)
    x[y[:, 1] == 2], x[y[:, 0] == 1] = 7, 255
    return x, y

def shows(x, value=255):  # Which of the images are all of this value: what class 1 (255) and style 2 (7) look like
    return (x == value).flatten(1).all(1)

def tiny_checkpoint(path, **made_by):  # A checkpoint of shapes with an untrained, very small network
    M.save_checkpoint(path, new(SMALLEST), {
        "dataset": "shapes", "names": [train_ddpm.SHAPES, train_ddpm.STYLES], "preset": "small",
        "forgotten": [], "made_by": {"stage": "pretrain", "method": "original", "steps": 9, **made_by}})

def weights(net):  # All weights of a network, or of a checkpoint, as one vector
    return flat((net if isinstance(net, torch.nn.Module) else M.load_checkpoint(net)[0]).parameters())

def classifier(dataset, names, data_dir="data"):
    return fid.load_classifier(SimpleNamespace(dataset=dataset, data_dir=data_dir), CPU, names)

def png(path, color):
    M.write_file(path, lambda tmp: Image.new("RGB", (9, 9), color).save(tmp, "PNG"))

def forked(work, *args):  # work(*args) in a child process: its exit code, or minus the signal that ended it
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start(), child.join()
    return child.exitcode

def killed_at(n, module, command):  # The command, with SIGKILL just before its n-th file would take its name
    replace, files = os.replace, itertools.count(1)
    os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(files) == n else replace(*args)
    run(module, command)

# ---- diffusion, data, pretraining ----------------------------------------------------------------

def test_the_posterior_is_the_product_of_two_gaussians():
    a, beta, found = A[:-1], BETAS[1:], torch.stack(M.ddpm_posterior())    # a: of x_{t-1}
    precision = 1 / (1 - a) + (1 - beta) / beta
    expected = np.sqrt(a) / (1 - a) / precision, np.sqrt(1 - beta) / beta / precision
    assert np.allclose(found[:, 1:], expected, rtol=1e-9) and np.allclose(found[:, 0], (1, 0))

class Gaussian(torch.nn.Module):
    """A stand-in for a network: the exact eps for data N(0.3, 0.2^2), for the null label N(0.1, 0.2^2)."""
    cfg, null = M.UNetConfig(image_size=4, channels=1, classes=(1,), prediction="eps"), torch.tensor([1])
    def forward(self, x, t, y):
        a, mean = (torch.tensor(v).view(-1, 1, 1, 1) for v in (A[t], np.array([0.3, 0.1])[y]))
        return ((1 - a).sqrt() * (x - a.sqrt() * mean) / (a * 0.2 ** 2 + 1 - a)).float()

def test_ddim_is_exact_and_guided_in_one_batch_and_ddpm_draws_from_the_data_distribution():
    net, y = Gaussian(), torch.zeros(400, 1, dtype=torch.long)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    for t in range(950, -1, -50):
        eps = 3 * net(x, torch.full((3,), t), y[:3]) - 2 * net(x, torch.full((3,), t), y[:3] + 1)
        x0, after = (x - (1 - A[t]) ** 0.5 * eps) / A[t] ** 0.5, A[t - 50] if t else 1.0
        x = after ** 0.5 * x0 + (1 - after) ** 0.5 * eps
    forward = net.forward = Mock(wraps=net.forward)
    assert torch.allclose(M.sample(net, y[:3], steps=20, guidance=2.0, seed=5), x.clamp(-1, 1), atol=2e-4)
    assert [len(call.args[0]) for call in forward.call_args_list] == [6] * 20
    x = M.sample(net, y, sampler="ddpm", guidance=0, batch=400)        # without guidance: one branch
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02 and len(forward.call_args.args[0]) == 400

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_target_determines_x0_and_eps(prediction):
    net, (x0, eps) = new(prediction=prediction), torch.randn(2, 5, 3, 8, 8)
    for t in (0, 300, 900):
        x_t, target = M.add_noise(net, x0, torch.full((5,), t), eps)
        found = torch.stack(M.split_output(net, target, x_t, A[t]))
        assert torch.allclose(x_t, A[t] ** 0.5 * x0 + (1 - A[t]) ** 0.5 * eps, atol=1e-4)
        assert torch.allclose(found, torch.stack([x0, eps]), atol=2e-3)

def test_times_are_antithetic_and_labels_drop_together_and_rows_do_not_mix():
    t, net = M.antithetic_times(1001, CPU), new()
    assert len(t) == 1001 and (t[:500] + t[501:1001] == 999).all()
    y = M.drop_labels(torch.zeros(20000, 2, dtype=torch.long), net, 0.1)
    dropped = (y == torch.tensor([4, 3])).all(1)
    assert torch.equal(dropped, (y != 0).any(1)) and abs(dropped.double().mean() - 0.1) < 0.01
    M.diffusion_loss(net, torch.randn(16, 3, 8, 8), torch.tensor([[0, 1], [2, 2]] * 8)).mean().backward()
    assert net.label_embs[0].weight.grad[:4].any(1).tolist() == [True, False, True, False]

def test_import_uses_every_key_of_a_public_checkpoint_once(capsys, monkeypatch):
    public = {"time_mlp.0": "temb.dense.0", "time_mlp.2": "temb.dense.1", "label_mlps.0.0": "cemb.dense.0",
              "label_mlps.0.2": "cemb.dense.1", r"(down|up)\.(\d)\.resample": r"\1.\2.\1sample.conv",
              "blocks": "block", "attns": "attn", "mid_block": "mid.block_", "mid_attn": "mid.attn_1",
              r"\.emb\.": ".temb_cemb_proj.", "shortcut": "nin_shortcut", r"\.proj\.": ".proj_out."}
    monkeypatch.setattr(train_ddpm, "sample", lambda model, y, **how: torch.zeros(len(y), 3, 32, 32))
    ema, expected = {}, new(M.PRESETS["paper"], classes=(10,)).state_dict()
    for key, value in expected.items():                # under its name in the public code
        for ours, theirs in public.items():
            key = re.sub(ours, theirs, key)
        ema[key] = value
    table = ema.pop("label_embs.0.weight")
    ema.update({"classes_emb.weight": table[:10], "null_classes_emb": table[10]})
    raw = {f"module.{k}": torch.zeros_like(v) for k, v in ema.items()}
    torch.save([raw, {"state": {}}, 7, ema], "public.pth")
    run(train_ddpm, "--dataset cifar10 --import public.pth --out run")
    net, info = M.load_checkpoint("run")
    assert all(torch.equal(v, expected[k]) for k, v in net.state_dict().items())
    assert len(weights(net)) == 38_632_323 and info["preset"] == "paper"
    del raw["module.conv_out.bias"]
    torch.save([raw, {}, 7, raw], "broken.pth")
    assert "not a CIFAR-10" in refused(capsys, run, train_ddpm, "--dataset cifar10 --import broken.pth")

@pytest.mark.parametrize("folder,end", [("data", ".gz"), ("data", ""), ("debian", ".gz")])
def test_fashion_is_found_where_it_lies(folder, end):
    x, y = np.random.default_rng(0).integers(0, 256, (40, 28, 28)), np.arange(40) % 10
    for name, array in (("images-idx3", x), ("labels-idx1", y)):
        head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
        data = (gzip.compress if end else bytes)(head + array.astype("u1").tobytes())
        for split in ("train", "t10k"):
            M.write_file(f"{folder}/{split}-{name}-ubyte{end}", lambda tmp: tmp.write_bytes(data))
    found, labels, names = train_ddpm.load_data("fashion", "train")
    assert np.array_equal(found[:, 0], np.pad(x, ((0, 0), (2, 2), (2, 2))))
    assert np.array_equal(labels[:, 0], y) and names[0][9] == "Ankle boot"

def follow(capsys, more=""):  # Run what the last stage says to run next
    script, words = capsys.readouterr().out.rsplit("next: python ", 1)[1].strip().split(" ", 1)
    run({"unlearn.py": unlearn, "attack.py": attack}[script], f"{words} {more}")

def test_cifar10_is_found_without_its_archive(monkeypatch):
    cifar, raw = torchvision.datasets.CIFAR10, torch.randint(0, 256, (20, 3072), dtype=torch.uint8).numpy()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    data = pickle.dumps({"data": raw, "labels": [*range(10)] * 2, "label_names": train_ddpm.CIFAR10})
    for name in ("batches.meta", *dict(cifar.train_list + cifar.test_list)):
        M.write_file(f"data/cifar-10-batches-py/{name}", lambda tmp: tmp.write_bytes(data))
    x, y, _ = train_ddpm.load_data("cifar10", "train")
    assert x.shape == (100, 3, 32, 32) and np.array_equal(x[:20].flatten(1), raw) and y[11] == 1

def make_folder(root, styles, objects, n):  # A tree in UnlearnCanvas's layout, with pictures of every mode and size
    modes, rng = ("RGB", "L", "CMYK", "P", "RGBA", "LA"), np.random.default_rng(0)
    for i, (style, name, k) in enumerate(itertools.product(styles, objects, range(n))):
        picture = Image.fromarray(rng.integers(0, 256, (40 + 8 * k, 50, 3), dtype=np.uint8))
        Path(root, style, name).mkdir(parents=True, exist_ok=True)
        picture.convert(modes[i % 6]).save(Path(root, style, name, f"{k}.{'jpg' if i % 6 < 3 else 'png'}"))

def test_a_folder_is_decoded_once_and_again_when_it_changes(capsys):
    make_folder("art", ("Van Gogh", "Cubism"), ("Dogs", "Human Face"), n=12)
    dogs = sorted(Path("art/Cubism/Dogs").iterdir())
    dogs[0].write_bytes(b"not a picture")
    for hidden in ("Cubism/.ipynb_checkpoints/x.png", "__MACOSX/Dogs/x.png", "Cubism/Dogs/._0.jpg"):
        M.write_file(f"art/{hidden}", lambda tmp: tmp.write_bytes(b"junk"))
    x, _, names = train_ddpm.load_data("folder", "train", "art", size=32)
    out = capsys.readouterr().out
    assert f"skipped {dogs[0]}" in out and "cls: Dogs 23, Human Face 24" in out and "47 of 48 images" in out
    test, y, _ = train_ddpm.load_data("folder", "test", "art", size=32)
    assert (len(x), len(test)) == (43, 4) and torch.equal(y.unique(dim=0), M.all_labels(names))    # one each
    Image.new("LA", (64, 32), (0, 0)).save(dogs[0], "PNG")     # transparent black, to be put on white
    x, test = (train_ddpm.load_data("folder", split, "art", size=32)[0] for split in ("train", "test"))
    assert shows(test).sum() == 1 and capsys.readouterr().out.count("48 of 48 images") == 1
    [path.write_bytes(b"broken") for path in dogs]
    assert "over a fifth" in refused(capsys, run, train_ddpm, "--dataset folder --data-dir art")

def test_a_folder_goes_through_all_stages_as_each_says(small, capsys):
    make_folder("my art", ("Van Gogh", "Seed Images"), ("Dogs", "Human Face", "Bears"), n=2)
    data = f"--dataset folder --data-dir 'my art' {QUICK}"
    run(fid, f"{data} --train-classifier"), run(train_ddpm, data)
    assert M.load_checkpoint("runs/folder/pretrain")[0].cfg.mult == (1, 1, 1)          # for 64 x 64
    follow(capsys, f"{LOOK} --method swap"), follow(capsys, LOOK), follow(capsys)
    assert "cls Bears" in Path("runs/folder/table.md").read_text()
    run(train_ddpm, f"{data} --exclude-cls Bears"), follow(capsys, LOOK)
    run(unlearn, f"{data} {LOOK} --ckpt runs/folder/pretrain --style 'van gogh' --out '~/my run'")
    follow(capsys, LOOK)
    assert Path("home/my run/model.pt").is_file() and not Path("~").exists()
    png("one/a/1.png", "red"), png("one/b/2.png", "blue")      # nothing can be held out
    assert "too few" in refused(capsys, run, fid, "--dataset folder --data-dir one --train-classifier")

def test_pictures_and_folders_as_users_have_them(capsys, monkeypatch):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype("uint16")
    for end in "png tif tiff gif ppm jfif".split():
        folder, kind = Path("set", "ab"[end in "gif ppm jfif"]), {"jfif": "JPEG"}.get(end)
        picture = Image.fromarray(ramp if end in ("png", "tif") else (ramp // 256).astype("uint8"))
        M.write_file(folder / f"1.{end}", lambda tmp: picture.save(tmp, kind or end.replace("tif", "tiff")[:4]))
    Path("set/c").symlink_to("a"), Path("set/a/loop").symlink_to("../../set"), Path("set/notes.txt").touch()
    x, y, names = train_ddpm.load_data("folder", "train", "set", size=32)
    out = capsys.readouterr().out
    assert "left out 1 files that are no images (.txt)" in out and names == [["a", "b", "c"]]
    assert (x[:, 0].float() - torch.tensor(ramp // 256).float()).abs().max() <= 16     # JPEG, GIF
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)        # a decompression bomb
    assert "not a readable image" in refused(capsys, run, fid, "set/a set/b --features classifier")
    png("split/train/a/1.png", "red"), png("split/val/a/1.png", "red")
    assert "divided into train, val" in refused(capsys, run, train_ddpm, "--dataset folder --data-dir split")

def test_pretraining_warms_up_decays_and_averages():
    (x, y), net, ema, lrs = tiny_data(), new(), new(), []
    optimizer, expected = torch.optim.Adam(net.parameters(), 1.0), weights(ema)
    settings = SimpleNamespace(steps=4, batch_size=4, lr=0.01, ema=0.15, warmup=2, cosine=True)
    for step, _ in enumerate(train_ddpm.pretrain(net, ema, optimizer, x, y, settings)):
        lrs.append(optimizer.param_groups[0]["lr"])
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights(net)
        assert torch.allclose(weights(ema), expected, atol=1e-6) and not torch.equal(expected, weights(net))
    half = 0.5 * (1 + np.cos(np.pi / 4))
    assert lrs == pytest.approx([0.005, 0.01 * half, 0.005, 0.01 * (1 - half)])

def test_killed_pretraining_goes_on_to_the_very_same_weights(small, monkeypatch, capfd):
    monkeypatch.setattr(train_ddpm, "SAVE_SECONDS", -1)        # a state after each fifty steps
    monkeypatch.setattr(train_ddpm, "sample", lambda model, y, *a, **k: torch.zeros(len(y), 3, 32, 32))
    whole, again = (f"--batch-size 2 --steps 150 --out {name} --resume" for name in ("whole", "again"))
    assert forked(run, train_ddpm, whole) == 0
    assert [forked(killed_at, n, train_ddpm, again) for n in (1, 3, 4)] == [-signal.SIGKILL] * 3
    assert not Path("again/model.pt").exists() and forked(run, train_ddpm, again) == 0
    assert torch.equal(before := weights("whole"), weights("again"))
    assert Path("whole/log.csv").read_text() == Path("again/log.csv").read_text()
    assert forked(run, train_ddpm, f"{whole} --seed 3") == 2 and "seed 0" in capfd.readouterr().err
    assert forked(run, train_ddpm, whole) == 2 and "is finished" in capfd.readouterr().err
    assert forked(run, train_ddpm, f"{whole} --steps 200") == 0 and not torch.equal(before, weights("whole"))
    assert not os.remove("whole/train.pt") and forked(run, train_ddpm, whole) == 2     # the model is kept

# ---- unlearning and the attack -------------------------------------------------------------------

def make_data(forget=((0, 1),), earlier=(), **options):
    args = SimpleNamespace(**{"batch_size": 8, "alternative": "class", "alt_size": None, "dataset": "any",
                              **options})
    return unlearn.Data(*tiny_data(), NAMES, list(forget), list(earlier), args)

@pytest.mark.parametrize("spec", ["class:2", "class:c", "mix", "noise", "image:picture.png"])
def test_alternatives_never_show_a_forgotten_value_and_serve_each(spec):
    png("picture.png", (9, 9, 9))
    x, y = make_data(alternative=spec).alternative_set
    assert (y[:, 0] == 1).all() and set(y[:, 1].tolist()) == {0, 1, 2} and not shows(x).any()
    x, y = make_data([(0, 1), (0, 3)], alternative=spec, alt_size=2).alternative_set
    assert y[:, 0].tolist() == [1, 1, 3, 3] and not shows(x).any()
    x, y = make_data([(0, 1)], [(1, 2)], alternative=spec).alternative_set     # the style is rehearsed
    assert ((y[:, 0] == 1) ^ (y[:, 1] == 2)).all() and (y[:, 1] == 2).any()
    assert not (shows(x) | shows(x, 7)).any()

def test_batches_keep_forget_and_retain_apart_for_a_class_and_a_style():
    data = make_data([(0, 1), (1, 2)], [(0, 3)])
    for _ in range(20):
        y = data.forget()[1]
        c, s = y.T
        assert ((c == 1) | (s == 2)).all() and (c != 3).all()
        other = torch.stack([torch.where(c == 1, 2, c), torch.where(s == 2, 0, s)], 1)
        assert torch.equal(data.replaced(y), other) and not shows(data.alternative()[0], 1.0).any()
        assert not M.matches(data.retain()[1], [(0, 1), (1, 2), (0, 3)]).any()
    assert make_data([(0, 3)]).substitutes == {(0, 3): 0}

@pytest.fixture
def descend(monkeypatch):  # Records the calls of unlearn.descend; the masks are computed from three batches
    spy, gradients = Mock(wraps=unlearn.descend), unlearn.guided_gradients
    monkeypatch.setattr(unlearn, "descend", spy)
    monkeypatch.setattr(unlearn, "guided_gradients", lambda model, draw, batches: gradients(model, draw, 3))
    return spy

def take(method, net, data, weight=1.0, steps=1):  # The losses that some steps of a method yield, from seed 5
    torch.manual_seed(5)
    few = dict(replayed=9, examples=2) if method == "sa" else {}
    optimizer, args = torch.optim.Adam(net.parameters(), 1e-2), SimpleNamespace(steps=steps, weight=weight)
    return list(unlearn.METHODS[method][0](net, data, optimizer, args, **few))

def noised_forget(net, data):  # The forget batch that a method draws first from seed 5: x_t, its target, t and y
    torch.manual_seed(5)
    x0, y = data.forget()
    t = M.antithetic_times(len(x0), CPU)
    return *M.add_noise(net, x0, t, torch.randn_like(x0)), t, y

@pytest.mark.parametrize("mask_first,expected", [(False, 0.6), (True, 1.0)])
def test_descend_clips_and_masks_in_the_order_asked_for(mask_first, expected):
    net, mask = torch.nn.Linear(2, 1, bias=False), [torch.tensor([[True, False]])]
    loss, optimizer = (net.weight * torch.tensor([3.0, 4.0])).sum(), torch.optim.SGD(net.parameters(), 0.0)
    unlearn.descend(loss, net, optimizer, mask, mask_first)
    assert net.weight.grad[0].tolist() == pytest.approx([expected, 0.0])

def test_saluns_mask_is_half_of_the_weights_by_guided_clipped_summed_gradients(descend):
    net, data = new(), make_data()
    torch.manual_seed(5)
    found = torch.stack([flat(g) for g in unlearn.guided_gradients(net, data.forget, 3)])
    x_t, target, t, y = noised_forget(net, data)
    out = 3 * net(x_t, t, y) - 2 * net(x_t, t, net.null.expand_as(y))
    expected = flat(torch.autograd.grad(((out - target) ** 2).sum() / 8, net.parameters()))
    assert expected.norm() > 1 and torch.allclose(found[0], expected / expected.norm(), atol=1e-5)
    take("salun", net, data, 1e-3, steps=3)
    mask, total = flat(descend.call_args.args[3]), found.sum(0).abs()
    after, before = weights(net), weights(new())
    assert mask.sum() == len(mask) // 2 and total[mask].min() >= total[~mask].max()
    assert torch.equal(after[~mask], before[~mask]) and (after != before).sum() > 1000

def constant(net, *values):  # Losses of these values, with a gradient of zeros: a stand-in for the diffusion loss
    return torch.tensor(values) + 0 * weights(net).sum()

def test_sfrons_mask_weights_and_cosine(descend, monkeypatch):
    def gradients(model, draw, batches):
        forget = (draw()[1][:, 0] == 1).all()
        return [[torch.tensor([1.0, 2.0, 3.0] if forget else [2.0, 2.0, 1.0]).sqrt()]] * batches
    monkeypatch.setattr(unlearn, "guided_gradients", gradients)
    assert unlearn.fisher_mask(torch.nn.Linear(3, 1), make_data())[0].tolist() == [[False, True, True]]
    monkeypatch.setattr(unlearn, "fisher_mask", lambda *args: None)
    monkeypatch.setattr(unlearn, "diffusion_loss", lambda net, *args: constant(net, 1.0, 4.0, 16.0))
    kept, calls = take("sfron", new(), make_data(), weight=10.0, steps=2), descend.call_args_list
    forget = 192 * (1 * 1 + 1 / 2 * 4 + 1 / 4 * 16) / (1 + 1 / 2 + 1 / 4)
    assert [call.args[0].item() for call in calls] == pytest.approx([-10 * forget, 1344, -5 * forget, 1344])
    assert [call.kwargs for call in calls] == [{"mask_first": True}, {}] * 2 and kept[0] == pytest.approx(7)

@pytest.mark.parametrize("method,expected,without_drop", [
    ("finetune", 2, set()), ("ga", 2 - 0.3 * 5, set()), ("dimum", 2 + 0.3 * 7, {"other"}),
    ("sa", 192 * (2 + 7) + 0.3 * 0.5 * 16 * 0.2 ** 2, {"other", "retain"})])
def test_losses_that_are_sums_of_diffusion_losses(method, expected, without_drop, descend, monkeypatch):
    """2 for retained images, 5 for forgotten ones, 7 for others with the forgotten label."""
    def loss(net, x0, y, p_drop=0.1):
        kind = "retain" if (y[:, 0] != 1).all() else "forget" if (x0 == 1).all() else "other"
        found[kind] = x0, p_drop
        return constant(net, values[kind])
    def fisher(net, *args):
        net.conv_in.bias.data += 0.2                   # sixteen weights
        return [torch.full_like(p, 0.5) for p in net.parameters()]
    values, found = {"retain": 2.0, "forget": 5.0, "other": 7.0}, {}
    monkeypatch.setattr(unlearn, "diffusion_loss", loss)
    monkeypatch.setattr(unlearn, "fisher_diagonal", fisher)
    take(method, new(), make_data(), 0.3)
    assert descend.call_args.args[0].item() == pytest.approx(expected)
    assert {kind for kind, (_, p_drop) in found.items() if p_drop == 0} == without_drop
    noise = found["other"][0] if method == "sa" else torch.rand(9999) * 2 - 1
    assert noise.min() > -1 and noise.max() < 1 and abs(noise.std() - 3 ** -0.5) < 0.04        # uniform

@pytest.mark.parametrize("method,weight", [("rl", 0.01), ("esd", 0.7)])
def test_saluns_and_esds_targets_are_constants(method, weight, descend, monkeypatch):
    monkeypatch.setattr(unlearn, "drop_labels", lambda y, model: y)
    monkeypatch.setattr(unlearn, "diffusion_loss", lambda model, x0, y: torch.tensor([1.0, 3.0]))
    net, first, data = new(), new(), make_data()
    take(method, net, data, weight)
    x_t, _, t, y = noised_forget(first, data)
    cond, other, null = (first(x_t, t, label) for label in (y, data.replaced(y), net.null.expand_as(y)))
    target, retain = (other, 192 * 2) if method == "rl" else (null - weight * (cond - null), 0)
    expected = (cond - target.detach()).square().mean() + weight * retain
    assert descend.call_args.args[0].item() == pytest.approx(expected.item(), rel=1e-4)
    g, e = net.label_embs[0].weight.grad, torch.autograd.grad(expected, first.label_embs[0].weight)[0]
    assert torch.allclose(g / g.norm(), e / e.norm(), atol=1e-4) and not g[2].any()
    assert torch.equal(net.conv_in.weight, first.conv_in.weight) == (method == "esd")

def test_selective_amnesias_fisher_is_the_mean_of_squared_single_example_gradients():
    net, x0, y, expected = new(), torch.randn(2, 3, 8, 8), torch.tensor([[0, 1], [2, 2]]), 0
    torch.manual_seed(5)
    found = flat(unlearn.fisher_diagonal(net, x0, y, times=4))
    torch.manual_seed(5)
    for x, label in zip(x0, y):
        t, eps = torch.randperm(1000)[:4], torch.randn(4, 3, 8, 8)
        x_t, target = M.add_noise(net, x.expand(4, 3, 8, 8), t, eps)
        loss = 1000 / 4 * ((net(x_t, t, label.expand(4, 2)) - target) ** 2).sum()
        expected = expected + flat(torch.autograd.grad(loss, net.parameters())) ** 2 / 2
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())

@pytest.mark.parametrize("method", unlearn.METHODS)
def test_every_method_runs_moves_the_weights_and_is_repeatable(method, descend):
    first, second = nets = new(), new()
    for net in nets:
        torch.manual_seed(1), take(method, net, make_data(), 0.1, steps=2)
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(new()))

def test_the_attackers_data_never_show_a_forgotten_value_but_few_shots_do(monkeypatch, capsys):
    monkeypatch.setattr(attack, "load_data", lambda *args: (*tiny_data(), NAMES))
    monkeypatch.setattr(attack, "sample", lambda model, y, *args, **how: M.sample(model, y, 1))
    for i, (c, s) in enumerate(M.all_labels(NAMES).tolist()):
        png(f"b/aux/{NAMES[1][s]}/{NAMES[0][c]}/{i}.png", (255,) * 3 if c == 1 else (10 * i, 0, 0))
    png("b/aux/typo/x.png", (3, 3, 3)), png("b/aux/B/x.png", (255, 255, 255))          # b is forgotten
    net, info = new(), {"names": NAMES, "dataset": "any", "made_by": {"from": "first.pt"}}
    M.save_checkpoint("first.pt", net, {**info, "forgotten": [], "made_by": {}})
    rest = net, info, tiny_data(), [(0, 1)], ""
    for aux in ("retain", "heldout", "generated", "pretrained", "b/aux"):
        x, y = attack.auxiliary_set(aux, *rest)
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) and len(x) == len(y) > 8
        assert (y[:, 0] != 1).all() and (aux in ("generated", "pretrained") or not shows(x).any())
    assert len(y) == 10 and (y == net.null).all(1).sum() == 1          # a folder above AUX is no label
    assert re.search(r"; 1 get no label, .* \(typo\); 4 left out", capsys.readouterr().out)
    x, y = attack.auxiliary_set("inversion:5", *rest)
    assert shows(x).all() and y.tolist() == [[1, 0], [1, 1], [1, 2], [1, 0], [1, 1]]       # in turn
    x, y = attack.auxiliary_set("fewshot:5", *rest)
    assert (~shows(x)).sum() == shows(x).sum() == 180 and torch.equal(shows(x), y[:, 0] == 1)
    for k in ("0", "", "x", "-1"):
        assert "fewshot:10" in refused(capsys, attack.auxiliary_set, f"fewshot:{k}", *rest)

def test_swap_copies_one_embedding_row_and_inversion_moves_it_alone(small):
    run(unlearn, f"--method swap --cls 1 --ckpt tiny.pt {LOOK} --steps 0 --out swap")
    run(attack, f"swap --aux inversion:3 {LOOK} --out attack")
    paths, table = ("tiny.pt", "swap", "attack"), "label_embs.0.weight"
    first, swapped, attacked = (M.load_checkpoint(path)[0].state_dict() for path in paths)
    for before, after in ((first, swapped), (swapped, attacked)):
        assert [k for k in before if not torch.equal(before[k], after[k])] == [table]
        assert (before[table] != after[table]).any(1).nonzero().tolist() == [[1]]
    assert torch.equal(swapped[table][1], first[table][2])

def test_dimra_is_ordinary_training_on_the_auxiliary_set():
    net, other, ema, (x, y) = new(), new(), new(), tiny_data()
    settings = SimpleNamespace(steps=2, batch_size=4, lr=1e-3, ema=0.9, warmup=0, cosine=False)
    torch.manual_seed(2), list(attack.dimra(net, x, y, steps=2, batch_size=4, lr=1e-3))
    optimizer = torch.optim.Adam(other.parameters(), fused=True)
    torch.manual_seed(2), list(train_ddpm.pretrain(other, ema, optimizer, x, y, settings))
    assert torch.allclose(weights(net), weights(other), atol=1e-6) and (weights(net) != weights(ema)).any()

def test_the_table_joins_seeds_and_nothing_else(capsys):
    def write(name, stage, ar=0.0, seed=0, samples=50, none=0.0):
        metrics = {"ua": 1 - ar, "cls": 1.0, "style": 0.98, "none": none, "fid": 20.0, "fid_error": 1.5, "ar": ar}
        metrics.update({f"{k}_{end}": v for k, v in metrics.items() for end in ("low", "high")})
        curve = [{**metrics, "step": 0, "ar": 0.0}, {**metrics, "step": 100, "ar_low": 0, "ar_high": 1}]
        M.write_text(Path("runs", name, "result.json"), json.dumps({
            "stage": stage, "dataset": "shapes", "method": "salun", "forget": "cls square", "seed": seed,
            "seconds": 7.0, "curve": curve, "aux": "retain", "protocol": {"seed": seed, "samples": samples}}))
    write("0", "attack", 0.2), write("1", "attack", 0.4, seed=1), write("2", "attack", 0.9, seed=2)
    write("other", "attack", 0.2, samples=80), write("none", "unlearn", none=0.3)
    M.write_text("runs/foreign/result.json", '{"stage": "attack"}'), M.write_text("runs/bad/result.json", "[")
    run(attack, "--table runs")
    assert capsys.readouterr().out.count("not a result of this code") == 2
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in Path("runs/table.md").read_text().splitlines() if line.startswith("|")]
    seeds, none, other = (dict(zip(rows[0], row)) for row in rows[2:])
    assert (seeds["runs"], seeds["AR"], seeds["half-life"]) == ("3", "50.0 (20..90)", "-, -, 100")
    assert (other["runs"], other["AR"], other["none"]) == ("1", "20.0 [0, 100]", "")
    assert (none["UA"], none["AR"], none["none"]) == ("100.0 [100, 100]", "", "30.0 [30, 30]")
    assert none["FID"] == "20.0 +- 1.5 -> 20.0 +- 1.5" and Path("runs/attack_curves.png").is_file()

# ---- evaluation, files, command lines ------------------------------------------------------------

def test_frechet_distance_its_error_precision_and_recall():
    def covered(points, centres):
        radius = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2))[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radius).any(1).mean()
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) for _ in range(2))
    c1, c2, means = np.cov(a, rowvar=False), np.cov(b, rowvar=False), a.mean(0) - b.mean(0)
    reference = (means ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid.frechet_distance(fid.moments(a), fid.moments(b)) == pytest.approx(reference, rel=1e-8)
    assert fid.frechet_distance(*[fid.moments(a[:5])] * 2) == pytest.approx(0, abs=1e-6)    # a singular covariance
    real, draws = fid.moments(rng.normal(size=(4000, 4))), rng.normal(size=(40, 300, 4)) * 1.5
    spread = np.std([fid.frechet_distance(real, fid.moments(x)) for x in draws], ddof=1)
    assert 0.6 < np.mean([fid.fid_error(real, x) for x in draws[:10]]) / spread < 1.6
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(25, 3)) * 0.3
    assert fid.precision_recall(a, b) == pytest.approx((covered(b, a), covered(a, b)))
    classes = 50.0 * np.arange(10).repeat(200)[:, None]        # ten, one after the other
    a, b = classes + rng.normal(size=(2, 2000, 3))
    assert min(fid.precision_recall(a, b[::-1], most=300)) > 0.8       # the first 300 share no class

def test_inception_pools_as_pytorch_fid_does(monkeypatch):
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **how: net.state_dict())
    net, average = fid.inception(CPU), torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        block, pool = getattr(net, f"Mixed_{name}"), torch.nn.MaxPool2d(3, 1, 1) if name == "7c" else average
        branch, x = block.branch_pool, torch.randn(2, block.branch_pool.conv.in_channels, 5, 5)
        expected = F.relu(branch.bn(branch.conv(pool(x))))
        assert torch.allclose(block(x)[:, -expected.shape[1]:], expected, atol=1e-5)
    assert net(torch.rand(1, 3, 299, 299)).shape == (1, 2048)

def test_scores_count_what_they_say_for_counted_and_retained_conditions(monkeypatch):
    y = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 3 + [[2, 2]] * 3)
    seen = y.clone()
    seen[0, 0], seen[1, 0], seen[4, 0], seen[5, 1] = 2, 4, 3, 0        # 4: no class is recognised
    monkeypatch.setattr(fid, "predict", lambda judge, images: seen)
    one = fid.score(y, y, None, NAMES, [(0, 1)], reference=None)
    assert [one[k] for k in ("ua", "none", "cls", "style")] == pytest.approx([1 / 2, 1 / 4, 5 / 6, 5 / 6])
    assert [one["cls_low"], one["cls_high"]] == pytest.approx([0.4365, 0.9699], abs=1e-3)      # Wilson
    both = fid.score(y, y, None, NAMES, [(0, 1), (1, 2)], reference=None)
    assert both["ua_of"] == pytest.approx({"cls b": 1 / 2, "style r": 0}) and both["retain_samples"] == 3
    assert (both["ua"], both["cls"]) == pytest.approx((2 / 7, 2 / 3))
    monkeypatch.setattr(fid, "sample", lambda model, y, *args, **how: torch.zeros(len(y), 1, 8, 8))
    monkeypatch.setattr(fid, "load_classifier", lambda *args: (None, 1.0))
    monkeypatch.setattr(fid, "judge_features", lambda judge, images: images.flatten(1).numpy())
    monkeypatch.setattr(fid, "score", lambda *args: {"fid": None})
    monkeypatch.setattr(fid, "score_text", lambda *args: "")
    args, both = SimpleNamespace(samples=12, sampler_steps=1, seed=0), [(0, 1), (1, 2)]
    rest = {"names": NAMES, "dataset": "any"}, *tiny_data(), both
    y = fid.evaluator(*rest, both[:1], args, "ua")[0](None, 0)[2]
    assert y[:4].tolist() == [[1, 0]] * 2 + [[1, 1]] * 2       # in no style that is forgotten itself
    assert len(y) == 4 + 6 and not M.matches(y[4:], both).any()
    y = fid.evaluator(*rest, both, args, "ua")[0](None, 0, retained=False)[2]
    assert len(y) == 6 and M.matches(y, both).all()

def test_the_judge_knows_what_is_left_of_a_picture_and_what_is_none():
    judge, _ = classifier("shapes", [train_ddpm.SHAPES, train_ddpm.STYLES])
    x, y = train_ddpm.draw_shapes(6, seed=77)
    x = x.float() / 127.5 - 1
    grey, cast = x.mean(1, keepdim=True), torch.empty(len(x), 3, 1, 1).uniform_(-0.3, 0.3)
    resize = torch.nn.Upsample((32, 32), mode="bilinear")
    larger, smaller = resize(x[:, :, 5:-5, 5:-5]), resize(F.pad(x, (7, 7, 7, 7), mode="replicate"))
    for changed in (x, larger, smaller, 2 * x, 2 * x - grey, x + cast, 0.5 * x, x[:, [2, 0, 1]]):
        hit = (fid.predict(judge, changed.clamp(-1, 1)) == y).double()
        assert min(hit[y[:, 0] == i, 0].mean() for i in range(10)) > 0.96 and hit[:, 1].mean() > 0.99
    for grain in (32, 5, 1):                           # of noise: from pixels to flat colour
        found = fid.predict(judge, resize(torch.rand(500, 3, grain, grain) * 2 - 1))
        assert (found == torch.tensor([10, 5])).double().mean() > 0.98

def test_a_classifier_serves_its_own_data_and_the_newest_is_used(small, capsys):
    train = f"--train-classifier --dataset folder --image-size 32 {QUICK} --data-dir"
    for folder, name, k in itertools.product("ACD", "abc", range(4)):
        if folder == "C" or name != "c":               # A and D differ in their pictures alone
            png(f"{folder}/{name}/{k}.png", (80, ord(name), ord(folder)))
    for i, folder in enumerate("ACDC"):
        run(fid, f"{train} {folder} --seed {i} --out runs/folder/classifier-{i}")
        os.utime(f"runs/folder/classifier-{i}/model.pt", (i, i))
    newest = torch.load("runs/folder/classifier-3/model.pt", weights_only=True)["weights"]
    judge, _ = classifier("folder", [["a", "b", "c"]], "C")
    assert torch.equal(judge.heads[0].weight, newest["heads.0.weight"].float())
    judge, _ = classifier("folder", [["a", "b"]], "A")
    assert judge.heads[0].out_features == 3 and capsys.readouterr().out.count("not used") == 3

def test_two_folders_of_any_size(capsys, monkeypatch):
    for i, image in enumerate(train_ddpm.draw_shapes(1, seed=3)[0]):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32 + i // 25 * 8,) * 2)
        M.write_file(f"{'ab'[i // 25]}/{i}.png", lambda tmp: picture.save(tmp, "PNG"))
    run(fid, "a b --features classifier --out out"), run(fid, "a a --features classifier --out same")
    assert result("out")["fid"] > 1 and result("out")["protocol"]["real_images"] == 25
    assert result("same")["fid"] < 1e-3 and Image.open("out/samples.png").size == (20 * 66, 2 * 66)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=OSError))
    assert "--features classifier" in refused(capsys, run, fid, "a b")         # and no download
    pixels = torch.randint(0, 256, (400, 640, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("large.png")                  # to be resized without antialiasing
    expected = F.interpolate(pixels.permute(2, 0, 1)[None] / 127.5 - 1, (299, 299), mode="bilinear")
    found = fid.features_of([Path("large.png")] * 2, torch.nn.Identity(), CPU, None, 299, 3, True)
    assert torch.allclose(found, expected.expand(2, -1, -1, -1), atol=1e-5)
    Path("b/30.png").write_bytes(b"broken"), Path("empty").mkdir()
    errors = [refused(capsys, run, fid, words) for words in ("a empty", "a b --features classifier")]
    assert "0 fake" in errors[0] and "b/30.png" in errors[1]

def test_files_come_back_equal_survive_a_failed_write_and_are_refused_if_damaged(capsys):
    net, info = new(), {"dataset": "any", "names": NAMES, "preset": "paper", "made_by": {"seed": 3},
                        "forgotten": [(0, 1), (1, 2)]}
    M.save_checkpoint("run/model.pt", net, info)
    loaded, found = M.load_checkpoint("run")
    assert torch.equal(weights(net), weights(loaded)) and (loaded.cfg, {**found, **info}) == (net.cfg, found)
    good, stored = Path("run/model.pt").read_bytes(), net.conv_in.weight.detach().numpy().tobytes()
    Path("truncated.pt").write_bytes(good[:len(good) // 2])
    Path("flipped.pt").write_bytes(good.replace(stored, bytes([stored[0] ^ 16]) + stored[1:]))
    Path("bomb.pt").write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")     # a pickle that runs a command
    torch.save({"format": 99, "kind": "unet"}, "future.pt"), torch.save({"weights": {}}, "foreign.pt")
    for name in ("truncated", "flipped", "bomb", "future", "foreign", "missing"):
        assert f"{name}.pt" in refused(capsys, run, unlearn, f"--cls 1 --ckpt {name}.pt")
    assert not Path("exploded").exists() and not Path("runs").exists()
    failing = lambda tmp: [tmp.write_text("half"), tmp.mkdir()]        # the second raises an error
    assert "cannot write run/model.pt" in refused(capsys, M.write_file, "run/model.pt", failing)
    assert Path("run/model.pt").read_bytes() == good and os.listdir("run") == ["model.pt"]

@pytest.mark.parametrize("module,command,part", [
    (unlearn, "--cls ²", "0 circle, 1 square"), (unlearn, "--cls 1 --lr nan", "from 0 to 10"),
    (unlearn, "", "say what to forget"), (unlearn, "--cls 1 --alternative class:1", "take another"),
    (unlearn, "--cls 1 --alternative image:none.png", "cannot be read"), (unlearn, "--speed 9", "--help"),
    (unlearn, "--cls 1 --alternative x", "class:K, mix"), (unlearn, "--cls 1 --out /dev/null/run", "--out"),
    (unlearn, "--cls 1 --ckpt tiny.pt --dataset fashion", "draws shapes"),
    (unlearn, "--cls 1 --dataset fashion", "train_ddpm.py --dataset fashion"),
    (unlearn, f"--cls 1 --ckpt tiny.pt {LOOK} --steps 50 --method ga --lambda 1e9 --lr 10", "diverged"),
    (attack, f"tiny.pt --cls 1 --aux nowhere {LOOK}", "fewshot:K"), (attack, "--table .", "no results"),
    (train_ddpm, "--exclude-cls 0 1 2 3 4 5 6 7 8 9", "nothing is left"), (attack, "tiny.pt", "--cls circle"),
    (train_ddpm, "--dataset cifar10 --data-dir elsewhere", "'elsewhere' and cannot be downloaded")])
def test_mistakes_get_one_clear_line(module, command, part, small, capsys):
    assert part in refused(capsys, run, module, command) and not list(Path().rglob("result.json"))

def test_values_and_models_are_found_and_what_may_mean_two_is_refused(capsys):
    trained = Path("runs/shapes/pretrain/model.pt")
    assert [M.find_value(text, ["1", "10", "2"], "--cls") for text in ("1", "10", "2", "0")] == [0, 1, 2, 0]
    assert [M.find_value(text, ["Cat", "cat", "dog"], "--cls") for text in ("cat", "DOG")] == [1, 2]
    assert "--cls CAT may mean several" in refused(capsys, M.find_value, "CAT", ["Cat", "cat"], "--cls")
    args = SimpleNamespace(ckpt=None, dataset=None, data_dir="data", cls=None, style=["1"])
    assert "no styles" in refused(capsys, M.find_pairs, args, [["a", "b"]])
    assert unlearn.find_model(args).samefile(HERE / "assets/shapes.pt")
    tiny_checkpoint(trained)                           # of 9 steps: is it a try, or meant?
    error = refused(capsys, unlearn.find_model, args)
    assert "9 steps" in error and f"--ckpt {trained}" in error and "assets/shapes.pt" in error
    tiny_checkpoint(trained, steps=16000)
    assert unlearn.find_model(args) == trained

def test_the_stages_survive_a_kill_and_write_what_they_promise_and_forget_in_turn(small, capsys):
    command = f"--cls square --ckpt tiny.pt {LOOK} --eval-every 1"
    first, second = Path("runs/shapes/dimum-cls1"), Path("runs/shapes/dimum-cls1-2")
    assert forked(killed_at, 1, unlearn, command) == -signal.SIGKILL
    assert not [p for p in Path("runs").rglob("*") if p.is_file() and not p.name.startswith(".")]
    for folder in (first, second):                     # the first start after the kill uses its folder
        run(unlearn, command)
        assert {*"model.pt result.json log.csv loss.png samples.png fid.png".split()} <= {*os.listdir(folder)}
    curve = result(first)["curve"]
    assert torch.equal(weights(first), weights(second)) and [p["step"] for p in curve] == [0, 1, 2]
    assert {"ua", "ar", "cls", "style", "none", "fid", "fid_error"} <= curve[0].keys()
    assert "has forgotten cls square already" in refused(capsys, run, unlearn, f"--cls 1 --ckpt {first}")
    run(unlearn, f"--style neon --ckpt {first} {LOOK}")
    both = "runs/shapes/dimum-style4-after-dimum-cls1"
    assert result(both)["curve"][-1]["ua_of"].keys() == {"cls square", "style neon"}
    assert "must remain" in refused(capsys, run, unlearn, f"--style 0 1 2 3 --ckpt {both}")
    run(attack, f"{both} --cls 1 {LOOK} --out attacked")
    assert result("attacked")["curve"][-1]["ua_of"].keys() == {"cls square"}
    run(unlearn, f"--cls 1 --ckpt attacked {LOOK}")            # what an attack brought back can go again
    run(M, f"{both} --cls 1 --style flat neon --n 3 --png files --out pictures")
    assert len(list(Path("files").glob("*.png"))) == 6 and Path("pictures/samples.png").is_file()

def test_output_and_devices_never_end_in_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", narrow := io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    M.run(lambda: print("cls \u732b", flush=True))
    assert narrow.buffer.getvalue().startswith(b"cls ?")
    monkeypatch.setattr(sys, "stdout", io.StringIO())          # as in a notebook
    M.run(lambda: print("\u732b"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)      # but it is not here
    assert "device 'mps' cannot be used here; try --device cpu" in refused(capsys, M.pick_device, "auto")
    with pytest.raises(SystemExit, match="130"):
        M.run(Mock(side_effect=KeyboardInterrupt))
    sources = [path.read_text("utf-8") for path in HERE.glob("*.py") if path.name != "test_smoke.py"]
    assert not re.search("fsync|fcntl|chmod|import signal|import resource", "".join(sources))  # not on Windows

def test_seconds_are_those_of_the_steps_alone(monkeypatch):
    def wait(seconds, result=torch.tensor(0.5)):
        clock[0] += seconds
        return result
    def measure(model, step, retained=True):
        return wait(100, ({"step": step, "forget_samples": 1, "retain_samples": retained}, None, None))
    clock, args = [0.0], SimpleNamespace(steps=4, sampler_steps=1, seed=0)
    monkeypatch.setattr(fid.time, "time", lambda: clock[0])
    curve, losses, seconds, *_ = fid.follow(new(), (wait(1) for _ in range(4)), None, args, measure, [2], False)
    assert (seconds, losses.tolist(), clock[0]) == (4.0, [0.5] * 4, 304)
    assert [(p["step"], p["retain_samples"]) for p in curve] == [(0, True), (2, False), (4, True)]

@pytest.mark.parametrize("module,base", [
    (M, "tiny.pt"), (train_ddpm, QUICK), (fid, f"test tiny.pt {QUICK} --samples 2 --sampler-steps 1"),
    (unlearn, f"--cls 1 --ckpt tiny.pt {LOOK}"), (attack, f"tiny.pt --cls 1 {LOOK}")])
def test_no_flag_value_ends_in_a_traceback(module, base, small, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(module, "--help")
    flags = re.findall("^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(flags) > 5
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(fid, "fid_error", lambda *args: 0.0)
    monkeypatch.setitem(M.PRESETS, "paper", SMALLEST)
    for script in (M, train_ddpm, fid, unlearn, attack):
        monkeypatch.setattr(script, "sample", lambda model, y, *a, **k: torch.rand(len(y), 3, 32, 32))
    for flag, value in itertools.product(flags, ("", "=", "=-1", "=1")):
        try:
            code = run(module, f"{base} {flag}{value}") or 0
        except SystemExit as stop:
            code = stop.code or 0
        error = capsys.readouterr().err
        assert code == 0 or code == 2 and error.startswith("error: ") and error.count("\n") == 1, flag + value

def test_the_shipped_model_draws_every_class_and_style_and_forgets_one():
    net, info = M.load_checkpoint(HERE / "assets/shapes.pt")
    (judge, accuracy), y = classifier("shapes", info["names"]), M.all_labels(info["names"])
    hit = fid.predict(judge, M.sample(net, y, steps=10)) == y
    assert min(accuracy) >= 0.99 and min(hit.double().mean(0)) >= 0.93
    args = SimpleNamespace(batch_size=8, alternative="class:triangle", alt_size=None, steps=35, weight=1.0,
                           dataset="shapes")
    data = unlearn.Data(*train_ddpm.load_data("shapes", "train"), [(0, 1)], [], args)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    list(unlearn.cosine(unlearn.dimum(net.train(), data, optimizer, args), optimizer, 35))
    seen = fid.predict(judge, M.sample(net, y[y[:, 0] == 1].repeat(2, 1), steps=10))
    assert (seen[:, 0] != 1).double().mean() >= 0.8 and optimizer.param_groups[0]["lr"] < 1e-9
