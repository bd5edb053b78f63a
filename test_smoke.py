"""The behaviour that must hold, checked on a CPU without network: python -m pytest -q

The sections follow the scripts, and a test's name begins with the function that it guards. When your
own version of a function fails, read the test: it computes what was expected in another way.
"""
import colorsys
import gzip
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# bits are compared, a fork cannot go on with a GPU or with threads, and the networks are tiny
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor

import attack
import fid
import model
import train_ddpm
import unlearn

HERE = Path(__file__).parent
CPU = torch.device("cpu")
BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)

# networks for images of 8 x 8 with four classes in three styles, and of 32 x 32
TINY = model.UNetConfig(image_size=8, width=16, mult=(1, 2), attention=(4,), groups=4, classes=(4, 3))
SMALLEST = model.UNetConfig(width=8, mult=(1, 1), groups=4, attention=())
NAMES = [["a", "b", "c", "d"], ["p", "q", "r"]]
QUICK = "--steps 2 --batch-size 4"                              # of a training
BRIEF = QUICK + " --samples 1 --sampler-steps 1"                # of a training and its evaluation

# ---- helpers -------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test runs in its own folder, offline, in float32, with the generator in a known state."""
    offline = Mock(side_effect=OSError("no network in a test"))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr(model, "CPU_BF16", False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

@pytest.fixture
def small_world(monkeypatch):
    """Two shapes of each kind, a very small network, and its checkpoint tiny.pt."""
    draw_shapes = train_ddpm.draw_shapes
    monkeypatch.setattr(train_ddpm, "draw_shapes", lambda per_cell, seed: draw_shapes(2, seed))
    monkeypatch.setitem(model.PRESETS, "small", SMALLEST)
    save_tiny_checkpoint("tiny.pt")

def command(module, line):
    """Run a script's main() with this command line."""
    sys.argv = [f"{module.__name__}.py", *shlex.split(line)]
    module.main()

def refusal(capsys, function, *args):
    """The one line with which function(*args) ends the program, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error

def result_of(folder):
    return json.loads(Path(folder, "result.json").read_text())

def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])

def all_weights(network):
    """All weights of a network, or of a checkpoint's path, as one vector."""
    if not isinstance(network, torch.nn.Module):
        network, _ = model.load_checkpoint(network)
    return flat(network.parameters()).detach().clone()

def tiny_network(cfg=TINY, **changes):
    """A network in eval mode, the same each time, with random numbers also where it starts from
    zeros, so that every path through it counts."""
    torch.manual_seed(0)
    network = model.UNet(model.replace(cfg, **changes))
    for p in network.parameters():
        if not p.any():
            p.data += 0.1 * torch.randn_like(p)
    return network.eval()

def tiny_images():
    """Random images, 20 of every label of TINY. Class 1 is all 255 and style 2 all 7."""
    y = model.all_labels(NAMES).repeat_interleave(20, 0)
    x = torch.randint(10, 200, (240, 3, 8, 8), dtype=torch.uint8)
    x[y[:, 1] == 2] = 7
    x[y[:, 0] == 1] = 255
    return x, y

def all_equal(x, value):
    """Which of the images are of this value everywhere: what class 1 and style 2 look like."""
    return (x == value).flatten(1).all(1)

def save_tiny_checkpoint(path, **made_by):
    """A checkpoint of shapes with an untrained, very small network."""
    model.save_checkpoint(path, tiny_network(SMALLEST), {
        "dataset": "shapes", "names": [train_ddpm.SHAPES, train_ddpm.STYLES], "preset": "small",
        "forgotten": [], "made_by": {"stage": "pretrain", "method": "original", **made_by}})

def save_few_conditions(path, conditions):
    """tiny.pt as a model of data that have these conditions alone."""
    network, info = model.load_checkpoint("tiny.pt")
    model.save_checkpoint(path, network, {**info, "conditions": conditions})

def save_png(path, color):
    picture = Image.new("RGB", (9, 9), color)
    model.save_picture(picture, path)

def in_a_fork(work, *args):
    """work(*args) in a child process: its exit code, or minus the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    child.join()
    return child.exitcode

def killed_at_file(n, module, line):
    """The command, ended by SIGKILL just before its n-th file would take its name."""
    replace = os.replace
    files = itertools.count(1)

    def replace_or_die(*args):
        if next(files) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = replace_or_die
    command(module, line)

# ---- model.py: diffusion -------------------------------------------------------------------------

def column(t):
    """alphas_cumprod at times t (B,), in float64: (B, 1, 1, 1)."""
    return torch.tensor(ALPHAS_CUMPROD)[t].view(-1, 1, 1, 1)

def true_target(x_t, t, x0, prediction="eps"):
    """What a perfect network returns at x_t if the image under the noise is x0."""
    a = column(t)
    eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    if prediction == "v":
        eps = a.sqrt() * eps - (1 - a).sqrt() * x0
    return eps.float()

def network_of(forward, **changes):
    """A tiny network with this forward(x, t, y) in place of its own."""
    network = tiny_network(**changes)
    network.forward = forward
    return network

def network_that_sees(x0, **changes):
    """A network to which every image is x0 under noise."""
    return network_of(lambda x, t, y: true_target(x, t, x0), prediction="eps", **changes)

def gaussian_network(prediction):
    """The best network for images whose pixels are drawn from N(0.3, 0.2^2): the mean of what they
    may have been. With the null label it believes in N(0.1, 0.2^2)."""
    def forward(x_t, t, y):
        a = column(t)
        mean = torch.where(y[:, 0] == 4, 0.1, 0.3).view(-1, 1, 1, 1)
        trust = a.sqrt() * 0.2 ** 2 / (a * 0.2 ** 2 + 1 - a)
        x0 = mean + trust * (x_t - a.sqrt() * mean)
        return true_target(x_t, t, x0, prediction)

    return network_of(forward, prediction=prediction)

def record_calls(network):
    """The list to which all further calls of the network add their (x, t, y)."""
    calls = []
    forward = network.forward

    def forward_and_record(x, t, y):
        calls.append((x.detach().clone(), t, y))
        return forward(x, t, y)

    network.forward = forward_and_record
    return calls

def zero_network(**changes):
    return network_of(lambda x, t, y: torch.zeros_like(x), **changes)

def zero_labels(n):
    return torch.zeros(n, 2, dtype=torch.long)

def noise_images(n):
    return torch.randn(n, 3, 8, 8)

def three_examples():
    """x_t, t and y of three examples that have nothing in common."""
    t = torch.tensor([5, 400, 990])
    y = torch.tensor([[0, 1], [3, 2], [1, 0]])
    return noise_images(3), t, y

def fraction(flags):
    """How many of a bool tensor's entries are True: from 0 to 1."""
    return flags.double().mean().item()

def test_linear_schedule_has_betas_from_1e_4_to_0_02_in_equal_steps():
    betas, _ = model.linear_schedule()
    assert np.allclose(betas, BETAS, rtol=1e-12)
    assert len(betas) == model.T == 1000
    assert betas[0].item() == 1e-4

def test_linear_schedule_multiplies_all_alphas_up_to_its_own_time():
    _, a = model.linear_schedule()
    assert a[0].item() == pytest.approx(1 - 1e-4, rel=1e-12)
    assert np.allclose(a, ALPHAS_CUMPROD, rtol=1e-12)

@pytest.mark.parametrize("n", [1, 8, 1001])
def test_antithetic_times_are_pairs_t_and_999_minus_t(n):
    t = model.antithetic_times(n, CPU)
    first = n // 2 + 1
    partners = t[first:]
    assert len(t) == n
    assert (t[:len(partners)] + partners == 999).all()

def test_antithetic_times_are_spread_over_all_times():
    t = model.antithetic_times(20000, CPU)
    assert len(t.unique()) == 1000
    assert t.min() == 0
    assert t.max() == 999

@pytest.mark.parametrize("t", [0, 300, 999])
def test_add_noise_mixes_image_and_noise_as_equation_4_of_ddpm(t):
    x0, eps = noise_images(5), noise_images(5)
    times = torch.full((5,), t)
    x_t, _ = model.add_noise(tiny_network(), x0, times, eps)
    a = ALPHAS_CUMPROD[t]
    assert torch.allclose(x_t, a ** 0.5 * x0 + (1 - a) ** 0.5 * eps, atol=1e-4)

def test_add_noise_takes_a_time_for_each_example():
    x0, t, _ = three_examples()
    eps = noise_images(3)
    network = tiny_network()
    together, _ = model.add_noise(network, x0, t, eps)
    for i in range(3):
        one = slice(i, i + 1)
        alone, _ = model.add_noise(network, x0[one], t[one], eps[one])
        assert torch.equal(together[one], alone)

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_add_noise_returns_the_target_of_the_prediction(prediction):
    x0, t, _ = three_examples()
    eps = noise_images(3)
    network = tiny_network(prediction=prediction)
    x_t, target = model.add_noise(network, x0, t, eps)
    expected = true_target(x_t, t, x0, prediction)
    assert torch.allclose(target, expected, atol=1e-4)

@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [0, 300, 900])
def test_split_output_finds_x0_and_eps_from_the_target(prediction, t):
    network = tiny_network(prediction=prediction)
    x0, eps = noise_images(5), noise_images(5)
    times = torch.full((5,), t)
    x_t, target = model.add_noise(network, x0, times, eps)
    found_x0, found_eps = model.split_output(network, target, x_t, ALPHAS_CUMPROD[t])
    assert torch.allclose(found_x0, x0, atol=2e-3)
    assert torch.allclose(found_eps, eps, atol=2e-3)

def test_drop_labels_drops_all_factors_together():
    network = tiny_network()
    y = model.drop_labels(zero_labels(1000), network, 0.5)
    kept = (y == 0).all(1)
    dropped = (y == network.null).all(1)
    assert torch.equal(kept, ~dropped)

@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_drop_labels_drops_a_share_of_p(p):
    y = model.drop_labels(zero_labels(20000), tiny_network(), p)
    dropped = y[:, 0] == 4
    assert fraction(dropped) == pytest.approx(p, abs=0.01)

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_is_zero_for_a_network_that_knows_the_image(prediction):
    def forward(x, t, y):
        return true_target(x, t, x0, prediction)

    x0 = noise_images(16).clamp(-1, 1)
    network = network_of(forward, prediction=prediction)
    loss = model.diffusion_loss(network, x0, zero_labels(16))
    assert loss.max() < 1e-6, f"the network returned the right {prediction}, so the loss must be 0"

def test_diffusion_loss_is_that_of_each_example_by_itself():
    def forward(x, t, y):
        error = y[:, 0].view(-1, 1, 1, 1)
        return true_target(x, t, x0) + error

    x0 = noise_images(4).clamp(-1, 1)
    y = zero_labels(4)
    y[:, 0] = torch.arange(4)
    network = network_of(forward, prediction="eps")
    loss = model.diffusion_loss(network, x0, y, p_drop=0)
    assert loss.shape == (4,), "a loss for each example was expected, of shape (B,)"
    assert loss.tolist() == pytest.approx([0, 1, 4, 9], abs=1e-3), (
        "the network was wrong by 0, 1, 2 and 3 in every pixel: the losses are their squares")

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_is_a_mean_over_pixels_of_noise_of_variance_1(prediction):
    network = network_of(lambda x, t, y: torch.full_like(x, 2), prediction=prediction)
    x0 = noise_images(4000).sign() / 2
    loss = model.diffusion_loss(network, x0, zero_labels(4000))
    variance = 1.0                             # of the target, whose mean is 0
    if prediction == "v":                      # sqrt(a) eps - sqrt(1 - a) x0
        a = ALPHAS_CUMPROD.mean()
        variance = a + (1 - a) * 0.5 ** 2
    expected = variance + 2 ** 2
    assert loss.mean().item() == pytest.approx(expected, rel=0.03), (
        f"for a network that always says 2 the {prediction} loss is {expected:.2f} on average")

def test_diffusion_loss_draws_noise_for_every_pixel():
    network = zero_network(prediction="eps")
    x0 = torch.zeros(400, 3, 8, 8)
    loss = model.diffusion_loss(network, x0, zero_labels(400))
    assert loss.std() < 0.2, "192 independent pixels have a mean square close to 1 in every example"

def test_diffusion_loss_draws_a_time_for_every_example_from_all_times():
    network = zero_network()
    calls = record_calls(network)
    x0 = torch.zeros(10000, 3, 2, 2)
    model.diffusion_loss(network, x0, zero_labels(10000))
    t = torch.cat([t for _, t, _ in calls])
    assert len(t.unique()) > 950, "10,000 examples hit nearly all of the 1,000 times"
    assert t.min() == 0 and t.max() == 999, "times go from 0 to 999"

def test_diffusion_loss_draws_antithetic_times():
    """Not needed for a right loss: the pairs lower its variance."""
    network = zero_network()
    calls = record_calls(network)
    model.diffusion_loss(network, noise_images(64), zero_labels(64))
    t = torch.cat([t for _, t, _ in calls])
    paired = torch.isin(999 - t, t)
    assert paired.sum() >= 62, "each time t was expected with its partner 999 - t"

@pytest.mark.parametrize("p", [0, 0.1, 0.25])
def test_diffusion_loss_drops_labels_with_probability_p_drop(p):
    network = zero_network()
    calls = record_calls(network)
    x0 = torch.zeros(10000, 3, 2, 2)
    how = {} if p == 0.1 else {"p_drop": p}                    # 0.1 is the default
    model.diffusion_loss(network, x0, zero_labels(10000), **how)
    y = torch.cat([y for _, _, y in calls])
    dropped = (y == network.null).all(1)
    assert fraction(dropped) == pytest.approx(p, abs=0.02), (
        f"the network should have seen the null label with probability {p}")
    assert (y[~dropped] == 0).all(), "a row is dropped as a whole, or stays as it is"

def test_diffusion_loss_moves_the_embeddings_of_its_own_labels_alone():
    network = tiny_network()
    y = torch.tensor([[0, 1], [2, 2]] * 8)
    loss = model.diffusion_loss(network, noise_images(16), y)
    loss.mean().backward()
    moved = network.label_embs[0].weight.grad[:4].any(1)
    assert moved.tolist() == [True, False, True, False], "only classes 0 and 2 were in the batch"

@pytest.mark.parametrize("guidance", [0, 2.0, -0.5])
def test_guided_output_weighs_the_branches_with_1_plus_w_and_minus_w(guidance):
    network = tiny_network()
    x, t, y = three_examples()
    cond = network(x, t, y)
    null = network(x, t, network.null.expand(3, 2))
    expected = (1 + guidance) * cond - guidance * null
    found = model.guided_output(network, x, t, y, guidance)
    assert torch.allclose(found, expected, atol=1e-4), (
        "expected (1 + w) * network(x_t, t, y) - w * network(x_t, t, null)")

def test_guided_output_runs_both_branches_as_one_batch():
    """Not needed for a right output: one batch is faster."""
    network = tiny_network()
    calls = record_calls(network)
    model.guided_output(network, *three_examples(), 2.0)
    assert [len(x) for x, _, _ in calls] == [6], "one call with both branches is faster than two"

def test_guided_output_without_guidance_costs_one_branch():
    network = tiny_network()
    calls = record_calls(network)
    model.guided_output(network, *three_examples(), 0)
    assert sum(len(x) for x, _, _ in calls) == 3, "with w = 0 the null branch need not be computed"

def test_ddpm_posterior_is_the_product_of_two_gaussians():
    a, beta = ALPHAS_CUMPROD[:-1], BETAS[1:]                   # a: of x_{t-1}
    precision = 1 / (1 - a) + (1 - beta) / beta
    coef_x0, coef_xt = model.ddpm_posterior()
    expected_x0 = np.sqrt(a) / (1 - a) / precision
    expected_xt = np.sqrt(1 - beta) / beta / precision
    assert np.allclose(coef_x0[1:], expected_x0, rtol=1e-9)
    assert np.allclose(coef_xt[1:], expected_xt, rtol=1e-9)

def test_ddpm_posterior_ends_at_x0():
    coef_x0, coef_xt = model.ddpm_posterior()
    assert coef_x0[0].item() == pytest.approx(1)
    assert coef_xt[0].item() == 0

def ancestral(network, n):
    """n images of class 0 by ddpm_sample, without guidance."""
    generators = [torch.Generator().manual_seed(100 + i) for i in range(n)]
    return model.ddpm_sample(network, noise_images(n), zero_labels(n), 0, generators)

def test_ddpm_sample_draws_from_the_distribution_of_the_data():
    x = ancestral(gaussian_network("v"), 100)
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.2, abs=0.02)

def test_ddpm_sample_clamps_x0_and_adds_no_noise_in_the_last_step():
    x = ancestral(network_that_sees(5.0), 4)
    assert torch.allclose(x, torch.ones(1), atol=1e-4)

def test_ddpm_sample_adds_noise_of_variance_beta():
    network = network_that_sees(0.0)
    calls = record_calls(network)
    ancestral(network, 50)
    before, _, _ = calls[-2]                   # at t = 1
    after, _, _ = calls[-1]                    # at t = 0
    _, coef_xt = model.ddpm_posterior()
    noise = after - coef_xt[1].item() * before
    assert noise.var().item() == pytest.approx(BETAS[1], rel=0.05)

def test_ddpm_sample_draws_each_image_from_its_own_generator():
    network = gaussian_network("v")
    noise = noise_images(2)
    images = []
    for seeds in ([1, 2], [1, 3]):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images.append(model.ddpm_sample(network, noise, zero_labels(2), 0, generators))
    first, second = images
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=0.1)

@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_sample_equals_its_equation_step_by_step(prediction):
    network = gaussian_network(prediction)
    noise, _, y = three_examples()
    null = network.null.expand(3, 2)
    x = noise
    for t in range(950, -1, -50):
        a = ALPHAS_CUMPROD[t]
        a_next = ALPHAS_CUMPROD[t - 50] if t > 0 else 1.0
        times = torch.full((3,), t)
        out = 3 * network(x, times, y) - 2 * network(x, times, null)
        eps = out
        if prediction == "v":
            eps = a ** 0.5 * out + (1 - a) ** 0.5 * x
        x0 = (x - (1 - a) ** 0.5 * eps) / a ** 0.5
        x = a_next ** 0.5 * x0 + (1 - a_next) ** 0.5 * eps
    found = model.ddim_sample(network, noise, y, 2.0, 20)
    assert torch.allclose(found, x, atol=1e-3), (
        "20 steps with guidance 2, at t = 950, 900, ..., 50, 0, do not end where equation 12 ends")

def deterministic(network, steps=10):
    """Four images of class 0 by ddim_sample, without guidance."""
    return model.ddim_sample(network, noise_images(4), zero_labels(4), 0, steps)

def test_ddim_sample_asks_the_network_at_evenly_spaced_times_down_to_0():
    network = network_that_sees(0.0)
    calls = record_calls(network)
    deterministic(network, 20)
    times = [t.tolist() for _, t, _ in calls]
    assert times == [4 * [t] for t in range(950, -1, -50)], (
        "20 steps of 1,000 times are 50 apart: 950, 900, ..., 50, 0")

@pytest.mark.parametrize("steps", [1, 3, 70])
def test_ddim_sample_takes_any_number_of_steps(steps):
    network = network_that_sees(0.0)
    calls = record_calls(network)
    deterministic(network, steps)
    times = [t[0].item() for _, t, _ in calls]
    assert len(times) == steps, f"{steps} steps were asked for"
    assert times[-1] == 0, "the last step starts at time 0"
    gaps = -np.diff(times)
    assert (abs(gaps - 1000 / steps) < 1).all(), "the times are evenly spaced"

def test_ddim_sample_ends_at_x0_without_a_rest_of_noise():
    x0 = noise_images(4)
    x = deterministic(network_that_sees(x0))
    assert torch.allclose(x, x0, atol=1e-3), (
        "after the last step alphas_cumprod is 1: no noise is left, x is the network's x_0")

def test_ddim_sample_does_not_clamp_x0():
    x = deterministic(network_that_sees(5.0))
    assert ((x - 5).abs() < 0.01).all(), "x_0 is not clamped to [-1, 1]"

def test_ddim_sample_draws_no_noise():
    network = gaussian_network("eps")
    noise, y = noise_images(4), zero_labels(4)
    torch.manual_seed(1)
    first = model.ddim_sample(network, noise, y, 0, 10)
    torch.manual_seed(2)
    second = model.ddim_sample(network, noise, y, 0, 10)
    assert torch.equal(first, second), "from the same noise DDIM gives the same image"

def test_sample_clamps_its_images():
    x = model.sample(network_that_sees(5.0), zero_labels(2), steps=2)
    assert (x == 1).all()

def test_sample_draws_50_guided_ddim_steps_unless_told_otherwise():
    network = gaussian_network("v")
    calls = record_calls(network)
    found = model.sample(network, zero_labels(2), seed=5)
    times = {t[0].item() for _, t, _ in calls}
    assert times == set(range(0, 1000, 20))
    torch.manual_seed(5)
    noise = noise_images(2)
    expected = model.ddim_sample(network, noise, zero_labels(2), 2.0, 50)
    assert torch.allclose(found, expected.clamp(-1, 1), atol=1e-4)

def test_sample_with_ddpm_takes_all_1000_steps():
    network = network_that_sees(0.0)
    calls = record_calls(network)
    model.sample(network, zero_labels(2), sampler="ddpm", guidance=0)
    times = [t[0].item() for _, t, _ in calls]
    assert times == list(range(999, -1, -1))

@pytest.mark.parametrize("batch", [1, 2, 50])
def test_sample_draws_image_i_from_the_seed_and_i_alone(batch):
    network = tiny_network()
    y = model.all_labels(NAMES)
    other = y.flip(0)[:5]
    other[2] = y[2]
    whole = model.sample(network, y, steps=3, seed=7)
    part = model.sample(network, other, steps=3, seed=7, batch=batch)
    assert torch.allclose(part[2], whole[2], atol=1e-4)

@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sample_draws_the_same_images_in_batches_of_1_3_and_50(sampler):
    network = gaussian_network("v")
    whole, threes, ones = [model.sample(network, zero_labels(4), 3, sampler, seed=7, batch=n)
                           for n in (50, 3, 1)]
    assert torch.allclose(threes, whole, atol=1e-5)
    assert torch.allclose(ones, whole, atol=1e-5)

@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sample_draws_the_same_images_first_whatever_follows(sampler):
    network = gaussian_network("v")
    many = model.sample(network, zero_labels(40), 3, sampler, seed=7)
    few = model.sample(network, zero_labels(3), 3, sampler, seed=7)
    assert torch.allclose(few, many[:3], atol=1e-5)

def noise_of_ddpm(seed, t):
    """Two images before the step from time t (999: their start), and the noise added in it."""
    network = network_that_sees(0.0)
    calls = record_calls(network)
    model.sample(network, zero_labels(2), sampler="ddpm", guidance=0, seed=seed)
    before, _, _ = calls[999 - t]
    after, _, _ = calls[1000 - t]
    _, coef_xt = model.ddpm_posterior()
    noise = (after - coef_xt[t].item() * before) / BETAS[t] ** 0.5
    return before, noise

def test_sample_with_ddpm_draws_other_noise_in_its_steps_for_another_seed():
    _, first = noise_of_ddpm(seed=0, t=500)
    _, second = noise_of_ddpm(seed=1, t=500)
    assert not torch.allclose(first, second, atol=0.1)

@pytest.mark.parametrize("seed", [0, 1])
def test_sample_with_ddpm_does_not_draw_its_start_again(seed):
    start, noise = noise_of_ddpm(seed, t=999)
    difference = (noise[:, None] - start).abs().mean((2, 3, 4))        # (noise, start)
    assert difference.min() > 0.5

def test_sample_gives_two_models_the_same_noise():
    starts = []
    for x0 in (0.0, 0.9):
        network = network_that_sees(x0)
        calls = record_calls(network)
        model.sample(network, zero_labels(2), steps=2, seed=3)
        x, _, _ = calls[0]
        starts.append(x)
    assert torch.equal(*starts)

def test_sample_gives_other_images_for_another_seed():
    network = tiny_network()
    first = model.sample(network, zero_labels(2), steps=2, seed=0)
    second = model.sample(network, zero_labels(2), steps=2, seed=1)
    assert not torch.allclose(first, second, atol=0.1)

@pytest.mark.parametrize("training", [True, False])
def test_sample_runs_without_dropout_and_leaves_the_mode_as_it_was(training):
    def forward(x, t, y):
        modes.append(network.training)
        return x

    modes = []
    network = network_of(forward)
    network.train(training)
    model.sample(network, zero_labels(2), steps=2)
    assert not any(modes)
    assert network.training == training

# ---- model.py: network ---------------------------------------------------------------------------

def test_make_config_adds_a_resolution_for_each_doubling():
    small = model.make_config("small", 32, 3, [10])
    large = model.make_config("small", 128, 3, [10])
    assert small.mult == (1, 2, 2)
    assert large.mult == (1, 2, 2, 2, 2)

def test_make_config_leaves_the_preset_as_it_was():
    cfg = model.make_config("small", 64, 1, [7, 2])
    assert cfg.image_size == 64
    assert cfg.channels == 1
    assert cfg.classes == (7, 2)
    assert model.PRESETS["small"] == model.UNetConfig()

def test_resblock_starts_as_its_shortcut():
    block = model.ResBlock(16, 16, 64, TINY)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x, torch.randn(2, 64)), x)

def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(model.Attention(16, TINY)(x), x)

def test_attention_looks_at_every_position_as_softmax_says():
    attention = model.Attention(16, TINY)
    torch.nn.init.normal_(attention.proj.weight)
    x = torch.randn(2, 16, 4, 4)
    h = attention.norm(x)
    q = attention.q(h).flatten(2)              # (B, C, H*W)
    k = attention.k(h).flatten(2)
    v = attention.v(h).flatten(2)
    weights = (q.mT @ k / 16 ** 0.5).softmax(2)
    seen = (v @ weights.mT).view_as(x)
    expected = x + attention.proj(seen)
    assert torch.allclose(attention(x), expected, atol=1e-4)

def test_unet_of_the_paper_computes_what_the_public_network_computes():
    """The numbers come from the public code itself (SalUn's DDPM/models/diffusion.py), to which
    these weights were given under its own names."""
    cfg = model.make_config("paper", 32, 3, [10])
    network = model.UNet(cfg).eval()
    draw = np.random.RandomState(0)
    for p in network.state_dict().values():
        values = torch.from_numpy(draw.randn(*p.shape))
        p.copy_(values / p[0].numel() ** 0.5)
    x = torch.from_numpy(draw.randn(2, 3, 32, 32)).float()
    t = torch.tensor([10, 700])
    y = torch.tensor([[3], [10]])
    with torch.no_grad():
        out = network(x, t, y)
    first = out[0, :, 5, 7].tolist()
    second = out[1, :, 20, 30].tolist()
    assert first == pytest.approx([-1.4779, -2.0797, 1.0224], abs=1e-3)
    assert second == pytest.approx([-1.7180, -1.5150, 1.8112], abs=1e-3)

def test_unet_of_the_paper_has_38_632_323_weights():
    with torch.device("meta"):                                 # shapes without numbers
        network = model.UNet(model.make_config("paper", 32, 3, [10]))
    assert sum(p.numel() for p in network.parameters()) == 38_632_323

def test_unet_starts_with_an_output_of_zeros():
    out = model.UNet(TINY)(*three_examples())
    assert out.shape == (3, 3, 8, 8)
    assert not out.any()

def test_unet_keeps_the_null_label_in_the_last_row_of_each_embedding():
    network = tiny_network()
    assert network.null.tolist() == [4, 3]
    assert [len(table.weight) for table in network.label_embs] == [5, 4]

def test_unet_does_not_mix_the_examples_of_a_batch():
    network = tiny_network()
    x, t, y = three_examples()
    together = network(x, t, y)
    for i in range(3):
        one = slice(i, i + 1)
        alone = network(x[one], t[one], y[one])
        assert torch.allclose(together[one], alone, atol=1e-4)

@pytest.mark.parametrize("changed", ["t", "class", "style"])
def test_unet_sees_the_time_and_every_label_factor(changed):
    network = tiny_network()
    x, t, y = three_examples()
    first = network(x, t, y)
    if changed == "t":
        t = t + 1
    else:
        factor = ["class", "style"].index(changed)
        y[:, factor] = (y[:, factor] + 1) % 3
    assert (network(x, t, y) - first).abs().max() > 1e-3

def test_unet_moves_every_weight_in_training():
    network = tiny_network()
    y = model.all_labels([range(5), range(4)])                 # null labels, too
    out = network(noise_images(20), torch.arange(20), y)
    out.square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad.any(), name

def test_unet_returns_float32_where_the_hardware_multiplies_bf16(monkeypatch):
    network = tiny_network()
    x, t, y = three_examples()
    exact = network(x, t, y)
    monkeypatch.setattr(model, "CPU_BF16", True)
    rough = network(x, t, y)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).std() < 0.05 * exact.std()

# ---- model.py: checkpoints and files -------------------------------------------------------------

INFO = {
    "dataset": "any",
    "names": NAMES,
    "preset": "paper",
    "forgotten": [(0, 1), (1, 2)],
    "made_by": {"seed": 3},
}

def test_save_checkpoint_and_load_checkpoint_keep_every_weight():
    network = tiny_network()
    model.save_checkpoint("run/model.pt", network, INFO)
    loaded, _ = model.load_checkpoint("run/model.pt")
    assert torch.equal(all_weights(loaded), all_weights(network))
    assert not loaded.training

def test_save_checkpoint_and_load_checkpoint_keep_config_and_info():
    model.save_checkpoint("run/model.pt", tiny_network(prediction="eps"), INFO)
    loaded, info = model.load_checkpoint("run/model.pt")
    assert loaded.cfg == model.replace(TINY, prediction="eps")
    assert {key: info[key] for key in INFO} == INFO

def test_load_checkpoint_takes_a_run_folder():
    model.save_checkpoint("run/model.pt", tiny_network(), INFO)
    assert torch.equal(all_weights("run"), all_weights("run/model.pt"))

def test_load_checkpoint_keeps_the_conditions_that_the_data_have():
    conditions = [[0, 1], [3, 2]]
    model.save_checkpoint("tiny.pt", tiny_network(), {**INFO, "conditions": conditions})
    _, info = model.load_checkpoint("tiny.pt")
    assert info["conditions"] == conditions

def test_load_checkpoint_gives_an_old_checkpoint_all_conditions():
    model.save_checkpoint("old.pt", tiny_network(), INFO)
    assert "conditions" not in model.load_file("old.pt", "unet")
    _, info = model.load_checkpoint("old.pt")
    assert info["conditions"] == [[c, s] for c in range(4) for s in range(3)]

def test_load_checkpoint_gives_the_shipped_model_all_conditions():
    _, info = model.load_checkpoint(model.shipped("shapes.pt"))
    assert info["conditions"] == [[c, s] for c in range(10) for s in range(5)]

def test_load_checkpoint_names_the_weights_that_a_changed_network_lacks():
    model.save_checkpoint("tiny.pt", tiny_network(), INFO)
    data = model.load_file("tiny.pt", "unet")
    data["weights"]["first.weight"] = data["weights"].pop("conv_in.weight")
    model.save_file("changed.pt", "unet", data)
    with pytest.raises(RuntimeError, match="(?s)conv_in.weight.*first.weight"):
        model.load_checkpoint("changed.pt")

def test_shipped_files_are_found_from_any_folder(monkeypatch):
    home = Path(model.__file__).parent
    assert model.shipped("shapes.pt") == home.resolve() / "assets/shapes.pt"
    monkeypatch.chdir(home)
    assert model.shipped("shapes.pt") == Path("assets/shapes.pt")
    assert model.shipped("shapes.pt").is_file()

class Bomb:
    """What runs a command when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch exploded",)

def damage(path, kind):
    """Spoil a good checkpoint in one of the ways in which files are spoilt."""
    good = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif kind == "flipped bit":
        stored = tiny_network().conv_in.weight.detach().numpy().tobytes()
        assert good.count(stored) == 1
        flipped = bytes([stored[0] ^ 16]) + stored[1:]
        path.write_bytes(good.replace(stored, flipped))
    elif kind == "a pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")
    elif kind == "with a bomb":
        torch.save({"kind": "unet", "format": 2, "weights": Bomb()}, path)
    elif kind == "of the future":
        torch.save({"kind": "unet", "format": 99}, path)
    elif kind == "foreign":
        torch.save({"weights": {}}, path)
    elif kind == "of another kind":
        model.save_file(path, "classifier", {})
    elif kind == "missing":
        path.unlink()

@pytest.mark.parametrize("kind", ["truncated", "flipped bit", "a pickle", "with a bomb", "missing",
                                  "of the future", "foreign", "of another kind"])
def test_load_file_refuses_a_file_in_one_line_and_runs_nothing_in_it(kind, capsys):
    path = Path("model.pt")
    model.save_checkpoint(path, tiny_network(), INFO)
    damage(path, kind)
    assert "model.pt" in refusal(capsys, model.load_checkpoint, path)
    assert not Path("exploded").exists()

def test_write_file_makes_the_folder():
    model.write_text("new/folder/a.txt", "whole")
    assert os.listdir("new/folder") == ["a.txt"]

def write_half(tmp):
    tmp.write_text("half")
    raise OSError("No space left on device")

def test_write_file_keeps_the_old_file_when_the_disk_is_full(capsys):
    model.write_text("run/a.txt", "whole")
    assert "cannot write run/a.txt" in refusal(capsys, model.write_file, "run/a.txt", write_half)
    assert Path("run/a.txt").read_text() == "whole"

def test_write_file_leaves_no_temporary_file_when_the_disk_is_full(capsys):
    refusal(capsys, model.write_file, "run/a.txt", write_half)
    assert os.listdir("run") == []

def test_write_file_keeps_the_traceback_of_a_mistake_in_the_code():
    def mistaken(tmp):
        tmp.write_text("half")
        return undefined_name      # noqa: F821

    with pytest.raises(NameError):
        model.write_file("run/a.txt", mistaken)
    assert os.listdir("run") == []

def test_write_file_keeps_the_old_file_when_the_run_is_killed():
    def die(tmp):
        tmp.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    model.write_text("run/a.txt", "whole")
    assert in_a_fork(model.write_file, "run/a.txt", die) == -signal.SIGKILL
    assert Path("run/a.txt").read_text() == "whole"

def test_write_text_writes_what_utf_8_lacks_as_a_question_mark():
    model.write_text("a.txt", "caf\u00e9 \udcff\n")
    assert Path("a.txt").read_bytes() == b"caf\xc3\xa9 ?\n"

def test_run_folder_never_hands_out_one_folder_twice():
    folders = [model.run_folder("runs/a") for _ in range(3)]
    names = [folder.as_posix() for folder in folders]
    assert names == ["runs/a", "runs/a-2", "runs/a-3"]
    assert all(folder.is_dir() for folder in folders)

def test_run_folder_leaves_a_folder_of_the_user_alone():
    model.write_text("mine/notes.txt", "mine")
    assert model.run_folder("mine") == Path("mine-2")
    assert os.listdir("mine") == ["notes.txt"]

def test_run_folder_says_which_folder_it_took(capsys):
    model.run_folder("a")
    assert capsys.readouterr().out == ""
    model.run_folder("a")
    assert capsys.readouterr().out == "a exists: this run goes into a-2\n"

@pytest.mark.parametrize("base", [".", "..", "/", "/dev/null/run"])
def test_run_folder_refuses_what_cannot_be_a_folder_of_a_run(base, capsys):
    assert "--out" in refusal(capsys, model.run_folder, base)

def test_run_folder_names_the_folder_and_the_flag_that_moves_it(capsys):
    error = refusal(capsys, model.run_folder, "/dev/null/run", "--png")
    assert "/dev/null/run" in error
    assert "--png" in error and "--out" not in error

def claim_folders(start, names):
    """Claim a run's folder of each name, all at once with the others that wait for the start."""
    start.wait()
    for name in names:
        folder = model.run_folder(name)
        with open(folder / "owner.txt", "a") as file:
            file.write(f"{os.getpid()}\n")

def test_run_folder_gives_two_runs_at_the_same_time_a_folder_each():
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    names = [f"runs/{i}" for i in range(50)]
    jobs = [fork.Process(target=claim_folders, args=(start, names)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    owners = [path.read_text().split() for path in Path("runs").glob("*/owner.txt")]
    assert len(owners) == 100
    assert all(len(owner) == 1 for owner in owners)

@pytest.fixture
def stop(monkeypatch):
    """Call it for what happens when the program ends."""
    register = Mock()
    monkeypatch.setattr(model, "atexit", SimpleNamespace(register=register))

    def work():
        for call in register.call_args_list:
            function, *args = call.args
            function(*args)

    return work

def test_run_folder_removes_the_empty_folder_of_a_stopped_run(stop):
    folder = model.run_folder("runs/a")
    stop()
    assert not folder.exists()
    assert model.run_folder("runs/a") == folder

def test_run_folder_keeps_the_folder_of_a_run_that_wrote_something(stop):
    folder = model.run_folder("runs/a")
    model.write_text(folder / "log.csv", "step,loss")
    stop()
    assert os.listdir(folder) == ["log.csv"]

def test_scripts_use_nothing_that_windows_lacks():
    for script in (model, train_ddpm, fid, unlearn, attack):
        source = Path(script.__file__).read_text("utf-8")
        assert not re.search("fsync|fcntl|chmod|import signal|import resource", source)

# ---- model.py: pictures --------------------------------------------------------------------------

def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-3, -1, -0.999, 0.25, 1, 3])
    pixels = model.to_uint8(x)
    assert pixels.dtype == torch.uint8
    assert pixels.tolist() == [0, 0, 0, 159, 255, 255]

def test_to_uint8_returns_the_pixels_that_get_batch_took():
    pixels = torch.arange(256).byte()
    images = pixels.view(1, 1, 16, 16)
    x, _ = train_ddpm.get_batch(images, zero_labels(1), 1)
    assert torch.equal(model.to_uint8(x), images)

def test_to_pictures_takes_bytes_floats_and_grey_images():
    grey = torch.randint(0, 256, (2, 1, 8, 8)).byte()
    floats = grey.float() / 127.5 - 1
    color = grey.expand(-1, 3, -1, -1)
    for images in (grey, floats, color):
        pictures = model.to_pictures(images)
        assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
        blue = pictures[1].getchannel("B")
        assert np.array_equal(blue, grey[1, 0])

def test_draw_grid_puts_the_images_row_by_row():
    images = torch.zeros(5, 3, 4, 4).byte()
    images += 10 * torch.arange(5).view(5, 1, 1, 1).byte()
    canvas = model.draw_grid(images, columns=3, scale=2)
    assert canvas.size == (3 * 10, 2 * 10)
    red = np.asarray(canvas)[:, :, 0]
    middles = red[5::10, 5::10]                # one pixel of each image
    assert middles.tolist() == [[0, 10, 20], [30, 40, 255]]

def test_draw_grid_makes_room_for_the_names_of_rows_and_columns():
    images = torch.zeros(4, 3, 4, 4)
    plain = model.draw_grid(images, columns=2)
    named = model.draw_grid(images, columns=2, rows=["a long name", "b"], heads=["c", "d"])
    left = named.width - plain.width
    top = named.height - plain.height
    assert left > 50 and top > 10
    assert np.array_equal(np.asarray(named)[top:, left:], plain)

@pytest.mark.parametrize("low,high", [
    (0, 1),
    (0, 0),
    (-3, 0),
    (0, 1e-6),
    (-0.2, 17),
    (0, 16000),
])
def test_round_ticks_span_the_range_with_at_most_seven_ticks(low, high):
    ticks = model.round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low and ticks[-1] >= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])

def test_save_plot_draws_every_curve_in_its_colour():
    xs = [0, 1, 2]
    first = {"up": (xs, [0.0, 0.5, 1.0]), "flat": (xs, [0.3, 0.3, 0.3])}
    second = {"down": (xs, [0.9, 0.1, -0.2])}
    model.save_plot("plot.png", {"left": first, "right": second}, "step", "loss")
    picture = Image.open("plot.png").convert("RGB")
    colors = [color for _, color in picture.getcolors(10 ** 6)]
    for name in model.COLORS[:3]:
        assert ImageColor.getrgb(name) in colors
    assert picture.width == 2 * 440

def test_save_plot_takes_a_single_point():
    curves = {"one": ([0], [0.0])}
    model.save_plot("plot.png", {"title": curves}, "step", "loss")
    assert Image.open("plot.png").width == 440

# ---- model.py: labels ----------------------------------------------------------------------------

def test_all_labels_go_through_the_first_factor_slowest():
    y = model.all_labels([["a", "b"], ["x", "y", "z"]])
    assert y[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert y[:, 1].tolist() == [0, 1, 2, 0, 1, 2]

def test_all_labels_of_one_factor_are_its_values():
    y = model.all_labels([["a", "b", "c"]])
    assert y.tolist() == [[0], [1], [2]]

def test_matches_finds_labels_that_carry_any_of_the_pairs():
    y = model.all_labels([["a", "b"], ["x", "y", "z"]])
    found = model.matches(y, [(0, 1), (1, 2)])                 # class b or style z
    assert found.tolist() == [False, False, True, True, True, True]
    assert not model.matches(y, []).any()

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"             # one name, two spellings

@pytest.mark.parametrize("name", [DECOMPOSED, "CAF\u00c9", "CAFE\u0301", f" {COMPOSED} "])
def test_plain_is_the_same_for_all_spellings_of_a_name(name):
    assert model.plain(name) == model.plain(COMPOSED)

@pytest.mark.parametrize("name", ["cafe", "caf", "caf \u00e9", ""])
def test_plain_is_another_for_another_name(name):
    assert model.plain(name) != model.plain(COMPOSED)

@pytest.mark.parametrize("text,index", [
    ("cat", 1),
    ("Cat", 0),
    ("DOG", 2),
    ("2", 2),
])
def test_find_value_takes_a_name_a_name_in_other_letters_or_a_number(text, index):
    assert model.find_value(text, ["Cat", "cat", "dog"], "--cls") == index

@pytest.mark.parametrize("text,index", [
    ("1", 0),
    ("10", 1),
    ("2", 2),
    ("0", 0),
])
def test_find_value_prefers_a_name_to_a_number(text, index):
    assert model.find_value(text, ["1", "10", "2"], "--cls") == index

@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("text", [COMPOSED, DECOMPOSED, "CAFE\u0301", f"{COMPOSED} "])
def test_find_value_takes_a_name_in_another_spelling(name, text):
    assert model.find_value(text, ["tea", name], "--cls") == 1

def test_find_value_refuses_what_may_mean_two(capsys):
    error = refusal(capsys, model.find_value, "CAT", ["Cat", "cat"], "--cls")
    assert "--cls CAT may mean several of: 0 Cat, 1 cat" in error

@pytest.mark.parametrize("text", ["\u00b2", "-1", "3", "", "do"])
def test_find_value_lists_the_values_if_it_finds_none(text, capsys):
    error = refusal(capsys, model.find_value, text, ["Cat", "dog"], "--cls")
    assert f"--cls {text} is none of: 0 Cat, 1 dog" in error

def test_find_pairs_are_sorted_and_each_comes_once():
    args = SimpleNamespace(cls=["c", "0", "a"], style=["r"])
    pairs = model.find_pairs(args, NAMES)
    assert pairs == [(0, 0), (0, 2), (1, 2)]

def test_find_pairs_reads_flags_with_a_prefix():
    args = SimpleNamespace(cls=["c"], exclude_cls=None, exclude_style=["p"])
    assert model.find_pairs(args, NAMES, "exclude_") == [(1, 0)]

def test_find_pairs_refuses_a_style_of_data_without_styles(capsys):
    args = SimpleNamespace(cls=None, style=["1"])
    assert "no styles" in refusal(capsys, model.find_pairs, args, [["a", "b"]])

def test_pairs_text_and_pairs_slug_name_all_pairs():
    pairs = [(0, 1), (1, 2)]
    assert model.pairs_text(pairs, NAMES) == "cls b, style r"
    assert model.pairs_slug(pairs) == "cls1-style2"

# ---- model.py: command line ----------------------------------------------------------------------

def test_explain_catches_the_named_errors_alone(capsys):
    def work(error):
        with model.explain("give another file", OSError, EOFError):
            raise error

    assert refusal(capsys, work, EOFError("too short")) == "error: give another file (too short)\n"
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        work(RuntimeError("a mistake in the code"))

def test_explain_shows_the_first_line_of_an_error_or_its_type(capsys):
    def work(error):
        with model.explain("advice", ValueError):
            raise error

    assert refusal(capsys, work, ValueError("one\ntwo")) == "error: advice (one)\n"
    assert refusal(capsys, work, ValueError()) == "error: advice (ValueError)\n"

FULL_DISK = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")

def on_a_full_disk(module, line):
    """The command with a standard output that cannot be written."""
    sys.stdout = FULL_DISK.open("w")
    sys.argv = [f"{module.__name__}.py", *shlex.split(line)]
    model.run(module.main)

@needs_full_disk
def test_say_goes_on_when_standard_output_is_full(capfd):
    def work():
        sys.stdout = FULL_DISK.open("w")
        model.say("lost")
        model.say("lost, too")

    assert in_a_fork(work) == 0
    assert capfd.readouterr().err.count("standard output is lost") == 1

def test_say_goes_on_when_nobody_reads_on(capfd):
    def work():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        model.say("to nobody")
        Path("saved").touch()

    assert in_a_fork(work) == 0
    assert Path("saved").exists()
    assert capfd.readouterr().err.count("standard output is lost") == 1

def test_say_goes_on_when_nobody_reads_the_errors_either(monkeypatch):
    closed = Mock(write=Mock(side_effect=BrokenPipeError), errors="strict", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", closed)
    model.say("to nobody")
    assert closed.write.call_count == 2                # the words, and that they are lost
    model.say("still to nobody")

def test_run_keeps_the_traceback_of_a_mistake_in_the_code():
    with pytest.raises(RuntimeError, match="modified"):
        model.run(Mock(side_effect=RuntimeError("memory was modified in place")))

@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_run_says_in_one_line_that_the_memory_is_full(error, capsys):
    assert "--batch-size" in refusal(capsys, model.run, Mock(side_effect=error))

def test_run_ends_with_130_after_ctrl_c(capsys):
    with pytest.raises(SystemExit) as stop:
        model.run(Mock(side_effect=KeyboardInterrupt))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"

def test_run_shows_a_question_mark_for_letters_that_the_terminal_lacks(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    model.run(lambda: model.say("cls \u732b"))
    assert narrow.buffer.getvalue().startswith(b"cls ?")

def test_run_works_in_a_notebook(monkeypatch):
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    model.run(lambda: model.say("cls \u732b"))
    assert notebook.getvalue() == "cls \u732b\n"

@pytest.mark.parametrize("line", ["--speed 9", "--stp 9", "--step 9", "--steps x"])
def test_make_parser_refuses_unknown_flags_in_one_line(line, capsys):
    assert "--help" in refusal(capsys, command, train_ddpm, line)

@pytest.mark.parametrize("module,flag,found", [
    (train_ddpm, "--exclude-cls", ["1", "3"]),
    (train_ddpm, "--exclude-style", ["1", "3"]),
    (unlearn, "--cls", ["1", "3"]),
    (unlearn, "--style", ["1", "3"]),
    (unlearn, "--eval-every", [1, 3]),
    (attack, "--cls", ["1", "3"]),
    (attack, "--style", ["1", "3"]),
    (attack, "--every", [1, 3]),
])
def test_parse_args_adds_what_a_repeated_flag_names(module, flag, found, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", flag, "1", flag, "3"])
    args = vars(module.parse_args())
    assert args[flag[2:].replace("-", "_")] == found

@pytest.mark.parametrize("text", ["-1", "11", "nan", "inf", "x", ""])
def test_number_refuses_what_is_not_in_its_range(text, capsys):
    parser = model.make_parser("")
    parser.add_argument("--lr", type=model.number(float, 0, 10))
    assert "float from 0 to 10" in refusal(capsys, parser.parse_args, [f"--lr={text}"])

def test_number_takes_both_ends_of_its_range():
    parse = model.number(int, 1, 5)
    assert [parse("1"), parse("5")] == [1, 5]

@pytest.mark.parametrize("name", ["meta", "cuda", "cuda:1", "fpga", "x", ""])
def test_pick_device_refuses_in_one_line_what_is_not_here(name, capsys):
    error = refusal(capsys, model.pick_device, name)
    assert f"device '{name}' cannot be used here; try --device cpu" in error

def test_pick_device_takes_the_cpu_where_there_is_no_gpu():
    assert model.pick_device("auto") == model.pick_device("cpu") == CPU

def test_pick_device_takes_mps_only_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert model.pick_device("auto") == CPU

def test_uses_bf16_is_false_for_mps(monkeypatch):
    monkeypatch.setattr(model, "CPU_BF16", True)
    assert model.uses_bf16(CPU)
    assert not model.uses_bf16(torch.device("mps"))

def test_compile_network_needs_one_line_where_there_is_no_compiler(monkeypatch, capsys):
    class NoCompiler(torch._dynamo.exc.BackendCompilerFailed):
        def __init__(self):
            Exception.__init__(self, "No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", Mock(side_effect=NoCompiler))
    assert "leave it out" in refusal(capsys, model.compile_network, tiny_network())

@pytest.fixture
def minutes_pass(monkeypatch):
    """Whenever model.py looks at the clock, a minute has passed."""
    clock = itertools.count(0, 60)
    monkeypatch.setattr(model, "time", SimpleNamespace(time=lambda: next(clock)))

def test_progress_yields_the_items_and_says_nothing_without_a_label(minutes_pass, capsys):
    items = [1, 2, 3]
    assert list(model.progress(items, None, 3)) == items
    assert capsys.readouterr().out == ""

def test_progress_shows_the_label_and_how_far_it_is(minutes_pass, capsys):
    items = [2, 3, 4]
    assert list(model.progress(items, "steps", 4, start=1)) == items
    assert capsys.readouterr().out.startswith("steps: 2/4  0.0/s  2.0 min left\n")

def test_progress_shows_no_loss_unless_the_items_are_losses(minutes_pass, capsys):
    items = [torch.tensor(0.25)] * 4
    assert list(model.progress(items, "samples", 4)) == items
    assert "loss" not in capsys.readouterr().out

def test_progress_shows_the_losses_if_the_items_are_losses(minutes_pass, capsys):
    items = [torch.tensor(0.25)] * 4
    assert list(model.progress(items, "train", 4, losses=True)) == items
    assert "train: 1/4  loss 0.2500  " in capsys.readouterr().out

def test_main_of_model_draws_the_chosen_classes_in_the_chosen_styles(small_world, capsys):
    command(model, "tiny.pt --cls square --style 0 neon --n 3 --png files --out pictures")
    assert sorted(os.listdir("files")) == [f"0000{i}.png" for i in range(6)]
    assert os.listdir("pictures") == ["samples.png"]
    assert "6 images, cls square, style flat to cls square, style neon" in capsys.readouterr().out

def test_main_of_model_adds_what_a_repeated_flag_names(small_world, capsys):
    command(model, "tiny.pt --cls circle --cls square --style 0")
    assert "2 images, cls circle, style flat to cls square" in capsys.readouterr().out

def test_main_of_model_draws_the_conditions_that_the_data_have(small_world, monkeypatch):
    save_few_conditions("few.pt", [[0, 0], [1, 4]])
    draw = Mock(return_value=torch.zeros(4, 3, 32, 32))
    monkeypatch.setattr(model, "sample", draw)
    command(model, "few.pt --n 2")
    _, y = draw.call_args.args
    assert y.tolist() == [[0, 0], [0, 0], [1, 4], [1, 4]]

def test_main_of_model_refuses_a_condition_that_the_data_lack(small_world, capsys):
    save_few_conditions("few.pt", [[0, 0], [1, 4]])
    error = refusal(capsys, command, model, "few.pt --cls square --style flat")
    assert "no cls square, style flat together" in error
    assert not Path("runs").exists()

def test_main_of_model_draws_with_the_sampler_that_is_asked_for(small_world, monkeypatch):
    draw = Mock(return_value=torch.zeros(50, 3, 32, 32))
    monkeypatch.setattr(model, "sample", draw)
    command(model, "tiny.pt --sampler ddpm --seed 4")
    _, y = draw.call_args.args
    assert torch.equal(y, model.all_labels([range(10), range(5)]))
    assert draw.call_args.kwargs["sampler"] == "ddpm"
    assert draw.call_args.kwargs["seed"] == 4

def test_main_of_model_draws_without_a_label(small_world, monkeypatch, capsys):
    draw = Mock(return_value=torch.zeros(7, 3, 32, 32))
    monkeypatch.setattr(model, "sample", draw)
    command(model, "tiny.pt --unlabelled --n 7")
    _, y = draw.call_args.args
    assert y.tolist() == [[10, 5]] * 7
    assert draw.call_args.kwargs["guidance"] == 0
    assert "7 images, without a label" in capsys.readouterr().out

def test_main_of_model_draws_no_class_without_a_label(small_world, capsys):
    error = refusal(capsys, command, model, "tiny.pt --unlabelled --cls 1")
    assert "leave --cls and --style out" in error

@needs_full_disk
def test_main_of_model_writes_its_files_when_standard_output_is_full(small_world):
    script = [sys.executable, model.__file__, *"tiny.pt --cls 1 --style 1 --out pictures".split()]
    with FULL_DISK.open("w") as full:
        assert subprocess.run(script, stdout=full).returncode == 0
    assert os.listdir("pictures") == ["samples.png"]

# ---- train_ddpm.py: training ---------------------------------------------------------------------

def test_get_batch_scales_pixels_and_keeps_labels_with_their_images():
    images = torch.tensor([0, 51, 255]).byte().view(3, 1, 1, 1)
    y = torch.tensor([[0], [1], [2]])
    x, labels = train_ddpm.get_batch(images, y, 200)
    expected = torch.tensor([-1, -0.6, 1])[labels]
    assert torch.allclose(x.flatten(1), expected)
    assert len(labels.unique()) == 3

def test_get_batch_mirrors_half_of_the_images_where_that_is_asked_for():
    images = torch.tensor([0, 255]).byte().view(1, 1, 1, 2)    # black, and white on the right
    x, _ = train_ddpm.get_batch(images, zero_labels(1), 2000, flip=True)
    mirrored = x.flatten(1)[:, 0] == 1
    assert fraction(mirrored) == pytest.approx(0.5, abs=0.05)
    x, _ = train_ddpm.get_batch(images, zero_labels(1), 2000)
    assert (x.flatten(1)[:, 0] == -1).all()

def descended(slopes, mask=None, lr=0.0, **how):
    """Two weights of 1 after a step of descent down a loss with these slopes; their gradient."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.fill_(1)
    layer.weight.grad = torch.full((1, 2), 99.0)               # left over from an earlier step
    optimizer = torch.optim.SGD(layer.parameters(), lr)
    loss = (layer.weight * torch.tensor(slopes)).sum()
    returned = train_ddpm.descend(loss, layer, optimizer, mask, **how)
    assert returned.item() == pytest.approx(sum(slopes))
    assert not returned.requires_grad
    return layer.weight[0].tolist(), layer.weight.grad[0].tolist()

def test_descend_goes_down_the_loss():
    weights, _ = descended([0.3, 0.4], lr=1.0)
    assert weights == pytest.approx([0.7, 0.6])

def test_descend_clips_the_gradient_to_norm_1():
    _, gradient = descended([3.0, 4.0])
    assert gradient == pytest.approx([0.6, 0.8])

def test_descend_leaves_a_gradient_below_norm_1_as_it_is():
    _, gradient = descended([0.3, 0.4])
    assert gradient == pytest.approx([0.3, 0.4])

def test_descend_clips_before_it_masks():
    mask = [torch.tensor([[True, False]])]
    _, gradient = descended([3.0, 4.0], mask)
    assert gradient == pytest.approx([0.6, 0])

def test_descend_masks_before_it_clips_if_the_mask_is_to_be_first():
    mask = [torch.tensor([[True, False]])]
    _, gradient = descended([3.0, 4.0], mask, mask_first=True)
    assert gradient == pytest.approx([1, 0])

def training_settings(**changes):
    settings = dict(steps=4, batch_size=4, lr=0.01, ema=0.15, warmup=2, cosine=True)
    return SimpleNamespace(**{**settings, **changes})

def rates(settings, **how):
    """The learning rates of a training."""
    network = tiny_network()
    optimizer = torch.optim.Adam(network.parameters(), 1.0)
    x, y = tiny_images()
    steps = train_ddpm.pretrain(network, tiny_network(), optimizer, x, y, settings, **how)
    return [optimizer.param_groups[0]["lr"] for _ in steps]

def test_pretrain_warms_up_and_falls_along_a_cosine():
    half = 0.5 * (1 + np.cos(np.pi / 4))
    expected = [0.005, 0.01 * half, 0.005, 0.01 * (1 - half)]
    found = rates(training_settings())
    assert found == pytest.approx(expected)

def test_pretrain_keeps_its_rate_without_cosine_and_warmup():
    settings = training_settings(cosine=False, warmup=0)
    assert rates(settings) == [0.01] * 4

def test_pretrain_goes_on_where_it_starts():
    whole = rates(training_settings())
    rest = rates(training_settings(), start=2)
    assert rest == whole[2:]

def test_pretrain_averages_the_weights_with_a_decay_that_rises():
    network, ema = tiny_network(), tiny_network()
    optimizer = torch.optim.Adam(network.parameters(), 1.0)
    expected = all_weights(ema)
    x, y = tiny_images()
    steps = train_ddpm.pretrain(network, ema, optimizer, x, y, training_settings())
    decays = [1 / 10, 0.15, 0.15, 0.15]        # (1 + step) / (10 + step), at most 0.15
    for decay, _ in zip(decays, steps, strict=True):
        expected = decay * expected + (1 - decay) * all_weights(network)
        assert torch.allclose(all_weights(ema), expected, atol=1e-6)
    assert not torch.equal(all_weights(ema), all_weights(network))

def test_pretrain_lowers_the_loss():
    network = tiny_network()
    optimizer = torch.optim.Adam(network.parameters())
    settings = training_settings(steps=30, batch_size=16, lr=5e-3, cosine=False)
    x, y = tiny_images()
    steps = train_ddpm.pretrain(network, tiny_network(), optimizer, x, y, settings)
    losses = [loss.item() for loss in steps]
    first, last = losses[:5], losses[-15:]
    assert np.mean(last) < 0.8 * np.mean(first)

def test_write_losses_writes_means_of_200_groups_with_their_last_steps():
    train_ddpm.write_losses(Path("run"), torch.arange(400.0), "title")
    lines = Path("run/log.csv").read_text().splitlines()
    assert lines[:3] == ["step,loss", "2,0.5", "4,2.5"]
    assert len(lines) == 201 and lines[-1] == "400,398.5"
    assert Path("run/loss.png").is_file()

def test_write_losses_writes_nothing_of_a_training_without_steps():
    train_ddpm.write_losses(Path("run"), torch.zeros(0), "title")
    assert not Path("run").exists()

@pytest.fixture
def quick_pretraining(small_world, monkeypatch):
    """Pretraining saves its state after every fifty steps, and draws its pictures in one step."""
    def draw(network, y, **how):
        return model.sample(network, y, steps=1, guidance=0, **how)

    monkeypatch.setattr(train_ddpm, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train_ddpm, "sample", draw)

def test_load_state_goes_on_to_the_very_same_weights_after_kills(quick_pretraining):
    long = "--batch-size 2 --steps 100 --resume --out"
    assert in_a_fork(command, train_ddpm, f"{long} whole") == 0
    for n in (1, 3, 2):        # before its first state, after its first, and after its last
        code = in_a_fork(killed_at_file, n, train_ddpm, f"{long} again")
        assert code == -signal.SIGKILL
        assert not Path("again/model.pt").exists()
    assert in_a_fork(command, train_ddpm, f"{long} again") == 0
    assert torch.equal(all_weights("whole"), all_weights("again"))
    assert Path("whole/log.csv").read_text() == Path("again/log.csv").read_text()

@pytest.mark.parametrize("flags,reason", [
    ("--seed 3", "seed 0"),
    ("--batch-size 5", "batch_size 4"),
    ("--exclude-cls 1", "excluded []"),
])
def test_load_state_refuses_other_settings(flags, reason, quick_pretraining, capsys):
    command(train_ddpm, f"{QUICK} --out run")
    line = f"{QUICK} --out run --resume --steps 3 {flags}"
    error = refusal(capsys, command, train_ddpm, line)
    assert f"was begun with {reason}; give the same flags" in error

def test_load_state_refuses_other_pictures_of_the_same_names(quick_pretraining, capsys):
    line = f"--dataset folder --image-size 32 {QUICK} --out run --data-dir"
    save_artwork("few", ["p"], ["cat"], 2)
    save_artwork("more", ["p"], ["cat"], 6)
    command(train_ddpm, f"{line} few")
    error = refusal(capsys, command, train_ddpm, f"{line} more --resume --steps 3")
    assert "was begun with data " in error

def test_load_state_goes_on_with_a_copy_of_the_pictures(quick_pretraining):
    line = f"--dataset folder --image-size 32 {QUICK} --out run --data-dir"
    save_artwork("art", ["p"], ["cat"], 2)
    command(train_ddpm, f"{line} art")
    shutil.copytree("art", "copy/art", copy_function=shutil.copyfile)
    command(train_ddpm, f"{line} copy/art --resume --steps 3")
    assert result_of("run")["steps"] == 3

@pytest.mark.parametrize("steps", [1, 2])
def test_load_state_refuses_to_train_what_is_finished(steps, quick_pretraining, capsys):
    command(train_ddpm, f"{QUICK} --out run")
    line = f"{QUICK} --out run --resume --steps {steps}"
    assert "run is finished" in refusal(capsys, command, train_ddpm, line)

def test_load_state_trains_on_with_more_steps(quick_pretraining):
    command(train_ddpm, f"{QUICK} --out run")
    before = all_weights("run")
    log = Path("run/log.csv")
    two_steps = log.read_text()
    command(train_ddpm, f"{QUICK} --out run --resume --steps 3")
    assert not torch.equal(all_weights("run"), before)
    assert log.read_text().startswith(two_steps)
    assert not Path("run-2").exists()

def test_main_stops_where_another_job_trains_in_its_folder(quick_pretraining, monkeypatch, capsys):
    command(train_ddpm, f"{QUICK} --out run")
    state = Path("run/train.pt")

    def interrupted(*data):
        state.write_bytes(b"of the other job")
        return get_batch(*data)

    get_batch = train_ddpm.get_batch
    monkeypatch.setattr(train_ddpm, "get_batch", interrupted)
    weights = Path("run/model.pt").read_bytes()
    error = refusal(capsys, command, train_ddpm, f"{QUICK} --out run --resume --steps 3")
    assert "another job trains in run" in error
    assert state.read_bytes() == b"of the other job"
    assert Path("run/model.pt").read_bytes() == weights

# ---- train_ddpm.py: the embedded dataset ---------------------------------------------------------

@pytest.mark.parametrize("name", train_ddpm.SHAPES)
def test_shape_sdf_is_negative_inside_positive_outside_and_grows_by_the_distance(name):
    axis = torch.linspace(-2, 2, 401)
    x = axis[None, :]
    y = -axis[:, None]                         # the first row is the highest
    d = train_ddpm.shape_sdf(name, x, y)
    area = 4 ** 2 * fraction(d < 0)
    assert 1 < area < 2.5
    for edge in (d[0], d[-1], d[:, 0], d[:, -1]):
        assert edge.min() > 0.4
    slope = torch.hypot(*torch.gradient(d, spacing=0.01))
    assert slope.quantile(0.99) < 1.1

def test_shape_sdf_points_up():
    x = torch.zeros(2)
    y = torch.tensor([0.9, -0.9])
    top, bottom = train_ddpm.shape_sdf("triangle", x, y)
    assert top < 0 < bottom

def test_hsv_is_that_of_the_standard_library():
    colors = torch.rand(20, 3)
    h, s, v = colors.T[:, :, None, None]
    found = train_ddpm.hsv(h, s, v)
    expected = [colorsys.hsv_to_rgb(*color) for color in colors.tolist()]
    assert np.allclose(found.view(20, 3), expected, atol=1e-5)

def test_draw_shapes_draws_the_same_images_from_the_same_seed():
    first, _ = train_ddpm.draw_shapes(1, seed=3)
    again, _ = train_ddpm.draw_shapes(1, seed=3)
    other, _ = train_ddpm.draw_shapes(1, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

def test_draw_shapes_labels_the_images_of_each_shape_and_style():
    x, y = train_ddpm.draw_shapes(2, seed=0)
    assert x.shape == (100, 3, 32, 32)
    assert x.dtype == torch.uint8
    cells = model.all_labels([range(10), range(5)])
    assert torch.equal(y[::2], cells)
    assert torch.equal(y[1::2], cells)

def test_draw_shapes_draws_what_the_shipped_model_has_learned():
    x, _ = train_ddpm.draw_shapes(2, seed=0)
    brightness = x[::21].float().mean((1, 2, 3))
    expected = [109.9775, 103.7523, 66.2214, 85.5068, 231.0625]
    assert brightness.tolist() == pytest.approx(expected, abs=0.2)

# ---- train_ddpm.py: datasets ---------------------------------------------------------------------

def test_load_data_has_other_shapes_in_its_test_split(small_world):
    train, y, names = train_ddpm.load_data("shapes", "train")
    test, _, _ = train_ddpm.load_data("shapes", "test")
    assert names == [train_ddpm.SHAPES, train_ddpm.STYLES]
    assert len(y) == len(train) == 100
    assert not torch.equal(train, test)

def is_there(path, md5=None):
    return Path(path).is_file()

def write_idx(path, array, end):
    """An array of bytes in the format of MNIST's files."""
    head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    data = head + array.astype("u1").tobytes()
    if end == ".gz":
        data = gzip.compress(data)
    path.with_name(path.name + end).write_bytes(data)

@pytest.mark.parametrize("end", [".gz", ""])
def test_load_torchvision_reads_the_four_files_of_fashion_mnist(end, monkeypatch):
    utils = torchvision.datasets.utils
    monkeypatch.setattr(utils, "check_integrity", is_there)    # there are no checksums of ours
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive",
                        utils.download_and_extract_archive)
    raw = Path("data/FashionMNIST/raw")
    raw.mkdir(parents=True)
    x = np.arange(40 * 28 * 28).reshape(40, 28, 28) % 251
    y = np.arange(40) % 10
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", x, end)
        write_idx(raw / f"{split}-labels-idx1-ubyte", y, end)
    found, labels, names = train_ddpm.load_data("fashion", "train")
    assert found.shape == (40, 1, 32, 32)
    assert np.array_equal(found[:, 0, 2:-2, 2:-2], x)
    assert found.sum() == x.sum()              # the padding is black
    assert np.array_equal(labels[:, 0], y)
    assert names[0][9] == "Ankle boot"

@pytest.mark.parametrize("size", [0, 3, 1000])
def test_load_torchvision_refuses_a_file_that_is_not_whole(size, monkeypatch, capsys):
    raw = Path("data/FashionMNIST/raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", np.zeros((4, 28, 28)), "")
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.zeros(4), "")
    os.truncate(raw / "train-images-idx3-ubyte", size)
    error = refusal(capsys, train_ddpm.load_data, "fashion", "train")
    assert "put train-images-idx3-ubyte" in error

def write_cifar10(monkeypatch, labels):
    """The files of CIFAR-10, each with the 20 images that are returned."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", is_there)
    raw = torch.randint(0, 256, (20, 3072)).byte().numpy()
    data = {"data": raw, "labels": labels, "label_names": train_ddpm.CIFAR10}
    cifar10 = torchvision.datasets.CIFAR10
    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in ("batches.meta", *dict(cifar10.train_list + cifar10.test_list)):
        (folder / name).write_bytes(pickle.dumps(data))
    return raw

def test_load_torchvision_reads_cifar10_without_its_archive(monkeypatch):
    raw = write_cifar10(monkeypatch, [*range(10)] * 2)
    x, y, names = train_ddpm.load_data("cifar10", "train")
    assert x.shape == (100, 3, 32, 32)
    assert np.array_equal(x[:20].flatten(1), raw)
    assert y[11].item() == 1
    assert names[0][1] == "automobile"

def test_load_torchvision_refuses_labels_of_another_dataset(monkeypatch, capsys):
    write_cifar10(monkeypatch, [10] * 20)
    error = refusal(capsys, train_ddpm.load_data, "cifar10", "train")
    assert "labels that do not fit the images of cifar10" in error

@pytest.mark.parametrize("dataset", ["cifar10", "fashion"])
def test_load_torchvision_says_in_one_line_that_it_cannot_download(dataset, capsys):
    line = f"--dataset {dataset} --data-dir elsewhere"
    error = refusal(capsys, command, train_ddpm, line)
    assert f"{dataset} is not in 'elsewhere' and cannot be downloaded" in error

@pytest.mark.parametrize("dataset,what", [
    ("cifar10", "put cifar-10-python.tar.gz into elsewhere, "),
    ("fashion", "put train-images-idx3-ubyte, "),
    ("fashion", " into elsewhere/FashionMNIST/raw, "),
])
def test_load_torchvision_names_the_files_that_it_needs_and_their_place(dataset, what, capsys):
    line = f"--dataset {dataset} --data-dir elsewhere"
    assert what in refusal(capsys, command, train_ddpm, line)

def found_in(folder, **how):
    return [path.as_posix() for path in train_ddpm.find_images(Path(folder), **how)]

def touch(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

def test_find_images_finds_every_kind_of_picture_sorted():
    touch("set/b/2.JPG", "set/b/10.webp", "set/a/x.jfif", "set/c.ppm")
    assert found_in("set") == ["set/a/x.jfif", "set/b/10.webp", "set/b/2.JPG", "set/c.ppm"]

def test_find_images_leaves_out_what_is_hidden():
    touch("set/a/1.png", "set/a/._1.png", "set/.checkpoints/1.png", "set/__MACOSX/a/1.png")
    assert found_in("set") == ["set/a/1.png"]

@pytest.mark.parametrize("name", [
    "@eaDir",
    "lost+found",
    "#recycle",
    "$RECYCLE.BIN",
])
def test_find_images_leaves_out_the_folders_that_systems_make(name):
    touch("set/a/1.png", f"set/{name}/1.png", f"set/a/{name}/1.png")
    assert found_in("set") == ["set/a/1.png"]

def test_find_images_follows_links():
    touch("pool/a/1.png", "pool/2.png", "set/c/3.png")
    Path("set/b").symlink_to("../pool/a")
    Path("set/c/2.png").symlink_to("../../pool/2.png")
    assert found_in("set") == ["set/b/1.png", "set/c/2.png", "set/c/3.png"]

def test_find_images_counts_a_picture_once_whatever_links_lead_to_it():
    touch("pool/1.png")
    for name in ("a", "b", "c"):
        Path("set", name).mkdir(parents=True)
        Path("set", name, "1.png").symlink_to("../../pool/1.png")
    Path("set/d").symlink_to("../pool")
    assert len(found_in("set")) == 1

def test_find_images_prefers_a_pictures_own_path_to_links():
    touch("set/m/1.png")
    for link in ("a", "z"):
        Path("set", link).symlink_to("m")              # to the folder
    for link in ("0.png", "2.png"):
        Path("set/m", link).symlink_to("1.png")        # to the picture
    assert found_in("set") == ["set/m/1.png"]

def test_find_images_counts_two_folders_once_that_link_to_each_other():
    touch("set/a/1.png", "set/b/2.png")
    Path("set/a/more").symlink_to("../b")
    Path("set/b/more").symlink_to("../a")
    assert found_in("set") == ["set/a/1.png", "set/b/2.png"]

def test_find_images_does_not_follow_a_link_in_a_circle():
    touch("set/a/1.png")
    Path("set/a/loop").symlink_to("../../set")
    assert found_in("set") == ["set/a/1.png"]

def test_find_images_leaves_out_what_runs_have_written():
    touch("a/1.png", "runs/shapes/samples.png")
    assert found_in(".") == ["a/1.png"]

def test_find_images_says_what_it_left_out_unless_it_is_to_be_quiet(capsys):
    touch("set/a/1.png", "set/notes.txt", "set/README")
    found_in("set", quiet=True)
    assert capsys.readouterr().out == ""
    found_in("set")
    words = "set: left out 2 files or folders that hold no image that can be read"
    assert capsys.readouterr().out == f"{words} (README, notes.txt)\n"

def test_find_images_leaves_out_a_folder_that_cannot_be_read_and_says_which(monkeypatch, capsys):
    def iterdir(path):
        if path.name == "closed":
            raise PermissionError("Permission denied")
        return entries(path)

    entries = Path.iterdir
    touch("set/a/1.png", "set/closed/2.png")
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert found_in("set") == ["set/a/1.png"]
    out = capsys.readouterr().out
    assert out.startswith("set: left out 1 files or folders") and "(closed)" in out

def test_find_images_leaves_out_pictures_of_a_folder_that_may_be_listed_but_not_entered(
        monkeypatch, capsys):
    def stat(path, **how):
        if Path(path).parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return look(path, **how)

    look = os.stat
    touch("set/a/1.png", "set/closed/2.png")
    monkeypatch.setattr(os, "stat", stat)
    assert found_in("set") == ["set/a/1.png"]
    assert "(2.png)" in capsys.readouterr().out

def test_find_images_finds_nothing_in_a_folder_that_is_not_there():
    assert found_in("missing") == []

@pytest.mark.parametrize("mode,kind", [
    ("RGB", "png"),
    ("RGB", "jpeg"),
    ("RGB", "webp"),
    ("RGB", "ppm"),
    ("L", "jpeg"),
    ("CMYK", "jpeg"),
    ("P", "png"),
    ("P", "gif"),
    ("RGBA", "png"),
    ("LA", "png"),
    ("1", "png"),
])
def test_read_image_takes_pictures_of_every_mode(mode, kind):
    picture = Image.new("RGB", (40, 40))                       # black, and white on the right
    picture.paste("white", (20, 0, 40, 40))
    picture.convert(mode).save("a", kind)
    x = train_ddpm.read_image(Path("a"), 32)
    assert x.shape == (3, 32, 32)
    assert x.dtype == torch.uint8
    assert x[:, :, :12].max() < 12
    assert x[:, :, 20:].min() > 243

@pytest.mark.parametrize("end", ["png", "tiff"])
def test_read_image_keeps_the_upper_half_of_16_bits(end):
    ramp = np.arange(0, 65536, 64, "uint16").reshape(32, 32)
    Image.fromarray(ramp).save(f"a.{end}")
    x = train_ddpm.read_image(Path(f"a.{end}"), 32)
    assert np.array_equal(x[0], ramp // 256)

def test_read_image_keeps_small_numbers_of_32_bits():
    ramp = np.arange(256, dtype="int32").reshape(16, 16)
    Image.fromarray(ramp).save("a.tiff")
    x = train_ddpm.read_image(Path("a.tiff"), None)
    assert np.array_equal(x[0], ramp)

def test_read_image_refuses_floats_as_unreadable():
    Image.new("F", (4, 4)).save("a.tiff")
    with pytest.raises(train_ddpm.UNREADABLE):
        train_ddpm.read_image(Path("a.tiff"), 32)

def test_read_image_refuses_what_is_far_too_large_as_unreadable(monkeypatch):
    save_png("a.png", "red")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)         # a decompression bomb has 81
    with pytest.raises(train_ddpm.UNREADABLE):
        train_ddpm.read_image(Path("a.png"), 32)

@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_read_image_puts_transparent_pictures_on_white(mode):
    Image.new(mode, (64, 32)).save("a.png")                    # black, and wholly transparent
    x = train_ddpm.read_image(Path("a.png"), 32)
    assert (x == 255).all()

def test_read_image_turns_a_picture_as_its_exif_says():
    picture = Image.new("RGB", (32, 32))
    picture.paste("white", (0, 0, 32, 16))                     # white above, to be turned by 180
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save("a.png", exif=exif)
    x = train_ddpm.read_image(Path("a.png"), 32)
    assert (x[:, :16] == 0).all()
    assert (x[:, 16:] == 255).all()

def test_read_image_cuts_out_the_central_square():
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("white", (16, 0, 48, 32))
    picture.save("a.png")
    x = train_ddpm.read_image(Path("a.png"), 32)
    assert (x == 255).all()

def test_read_image_without_a_size_leaves_the_pixels_as_they_are():
    pixels = torch.randint(0, 256, (20, 30, 3)).byte().numpy()
    Image.fromarray(pixels).save("a.png")
    x = train_ddpm.read_image(Path("a.png"), None)
    assert np.array_equal(x.permute(1, 2, 0), pixels)

def test_read_image_makes_a_picture_grey_for_one_channel():
    save_png("a.png", (0, 255, 0))
    x = train_ddpm.read_image(Path("a.png"), None, channels=1)
    assert x.shape == (1, 9, 9)
    assert (x == 150).all()                    # 0.587 * 255: green is bright

def save_artwork(root, styles, classes, n):
    """n pictures of each class in each style, in UnlearnCanvas's layout, of the colours
    (number of the style, number of the class, number of the picture)."""
    for s, style in enumerate(styles):
        for c, name in enumerate(classes):
            for k in range(n):
                save_png(Path(root, style, name, f"{k}.png"), (s, c, k))

def load_art(split="train"):
    return train_ddpm.load_data("folder", split, "art", size=32)

def test_file_hash_is_the_sha_256_of_what_a_file_holds():
    Path("a").write_bytes(b"abc")
    assert train_ddpm.file_hash(Path("a")).startswith("ba7816bf8f01cfea414140de5dae2223")

def test_file_hash_reads_a_file_again_that_has_changed():
    path = Path("changed.txt")
    path.write_text("before")
    before = train_ddpm.file_hash(path)
    path.write_text("and after")
    assert train_ddpm.file_hash(path) != before

def test_file_hash_tells_files_of_one_name_in_two_places_apart(monkeypatch):
    hashes = set()
    for place in ("a", "b"):
        model.write_text(f"{place}/same.txt", place)
        with monkeypatch.context() as here:
            here.chdir(place)
            hashes.add(train_ddpm.file_hash(Path("same.txt")))
    assert len(hashes) == 2

def key_of(folder):
    args = SimpleNamespace(dataset="folder", data_dir=str(folder))
    return train_ddpm.data_key(args)

def test_folder_key_is_the_same_for_a_copy_in_another_place_with_other_dates():
    save_artwork("art", ["p"], ["cat"], 3)
    shutil.copytree("art", "other/place")
    for path in Path("other/place").rglob("*"):
        os.utime(path, (1, 1))
    assert key_of("other/place") == key_of("art")

def test_folder_key_does_not_depend_on_how_the_folder_is_written():
    save_artwork("art", ["p"], ["cat"], 3)
    keys = {key_of(folder) for folder in ("art", "./art/", "art/p/..", Path("art").absolute())}
    assert len(keys) == 1

def test_folder_key_is_another_for_other_contents_under_the_same_names():
    for folder, color in (("red", "red"), ("blue", "blue")):
        save_png(f"{folder}/cat/1.png", color)
        os.utime(f"{folder}/cat/1.png", (1, 1))
    assert key_of("red") != key_of("blue")

def test_folder_key_is_another_where_a_picture_lies_in_another_class():
    save_png("one/cat/1.png", "red")
    save_png("two/dog/1.png", "red")
    assert key_of("one") != key_of("two")

def test_folder_key_is_the_same_for_two_spellings_of_a_name():
    save_png(f"one/{COMPOSED}/1.png", "red")
    save_png(f"two/{DECOMPOSED}/1.png", "red")
    assert key_of("one") == key_of("two")

def test_data_key_is_empty_for_data_that_are_no_folder():
    args = SimpleNamespace(dataset="shapes", data_dir="missing")
    assert train_ddpm.data_key(args) == ""

def test_folder_labels_are_the_names_of_class_and_style():
    paths = [Path("art/z/cat/1.png"), Path("art/y/dog/1.png"), Path("art/y/cat/2.png")]
    y, names = train_ddpm.folder_labels(paths, Path("art"))
    assert names == [["cat", "dog"], ["y", "z"]]
    cat_z, dog_y, cat_y = y.tolist()
    assert cat_z == [0, 1]
    assert dog_y == [1, 0]
    assert cat_y == [0, 0]

def test_folder_labels_of_pictures_without_styles_are_the_classes():
    paths = [Path("pets/dog/1.png"), Path("pets/cat/1.png")]
    y, names = train_ddpm.folder_labels(paths, Path("pets"))
    assert names == [["cat", "dog"]]
    assert y.tolist() == [[1], [0]]

def test_folder_labels_take_two_spellings_of_a_name_for_one_class():
    paths = [Path("art/p", COMPOSED, "1.png"), Path("art/q", DECOMPOSED, "1.png")]
    y, names = train_ddpm.folder_labels(paths, Path("art"))
    assert y[:, 0].tolist() == [0, 0]
    assert names == [[COMPOSED], ["p", "q"]]

@pytest.mark.parametrize("files", ["", "1.png", "a/1.png a/b/1.png", "a/b/c/1.png"])
def test_folder_labels_refuse_pictures_that_are_not_at_one_depth(files, capsys):
    paths = [Path("art", name) for name in files.split()]
    assert "at one depth" in refusal(capsys, train_ddpm.folder_labels, paths, Path("art"))

@pytest.mark.parametrize("name", ["train", "Test", "val", "validation", "Training", "dev"])
def test_folder_labels_refuse_splits_in_the_place_of_styles(name, capsys):
    paths = [Path("art/sketch/cat/1.png"), Path("art", name, "cat/1.png")]
    error = refusal(capsys, train_ddpm.folder_labels, paths, Path("art"))
    assert f"is divided into {name}; name one of these" in error

def test_decode_skips_a_broken_picture_and_says_which(capsys):
    save_artwork("art", ["p"], ["cat"], 6)
    Path("art/p/cat/2.png").write_bytes(b"not a picture")
    x, readable = train_ddpm.decode(train_ddpm.find_images("art"), 32)
    assert readable.tolist() == [0, 1, 3, 4, 5]
    assert len(x) == 5
    assert "skipped art/p/cat/2.png: not a readable image" in capsys.readouterr().out

def test_decode_refuses_a_folder_with_over_a_fifth_of_broken_pictures(capsys):
    save_artwork("art", ["p"], ["cat"], 6)
    for k in (1, 2):
        Path(f"art/p/cat/{k}.png").write_bytes(b"not a picture")
    assert "over a fifth of 6" in refusal(capsys, load_art)

def test_load_folder_keeps_pictures_with_their_labels():
    save_artwork("art", ["p", "q"], ["cat", "dog"], 2)
    x, y, names = load_art()
    assert x.shape == (4, 3, 32, 32)
    assert names == [["cat", "dog"], ["p", "q"]]
    style, name = x[:, 0, 0, 0], x[:, 1, 0, 0]                 # the colours of save_artwork
    assert torch.equal(y[:, 0], name)
    assert torch.equal(y[:, 1], style)

def test_load_folder_holds_out_a_tenth_of_each_label():
    save_artwork("art", ["p", "q"], ["cat", "dog"], 20)
    _, y, names = load_art("test")
    for label in model.all_labels(names):
        assert (y == label).all(1).sum() == 2

def test_load_folder_shows_each_picture_in_one_split():
    save_artwork("art", ["p"], ["cat"], 30)
    train, _, _ = load_art()
    test, _, _ = load_art("test")
    numbers = torch.cat([train, test])[:, 2, 0, 0]             # the colours of save_artwork
    assert sorted(numbers.tolist()) == list(range(30))

@pytest.mark.parametrize("n", [2, 9, 19])
def test_load_folder_holds_out_one_of_few_pictures(n):
    save_artwork("art", ["p"], ["cat"], n)
    x, _, _ = load_art("test")
    assert len(x) == 1

def test_load_folder_trains_on_a_picture_that_is_alone():
    save_artwork("art", ["p"], ["cat"], 1)
    train, _, _ = load_art()
    test, _, _ = load_art("test")
    assert (len(train), len(test)) == (1, 0)

def test_load_folder_puts_two_copies_of_a_file_on_one_side():
    save_artwork("art", ["p"], ["cat"], 20)
    for k in range(20):
        shutil.copy(f"art/p/cat/{k}.png", f"art/p/cat/copy{k}.png")
        save_png(f"art/p/dog/{k}.png", (0, 0, k))      # the same file, in another class
    train, _, _ = load_art()
    test, _, _ = load_art("test")
    numbers, held_out = train[:, 2, 0, 0].tolist(), test[:, 2, 0, 0].tolist()
    assert len(numbers) + len(held_out) == 60
    assert held_out and not set(numbers) & set(held_out)

def test_load_folder_counts_a_picture_once_whatever_links_lead_to_it():
    save_artwork("art", ["p"], ["cat"], 12)
    for name in ("ant", "zoo"):
        Path("art/p", name).symlink_to("cat")
    train, _, names = load_art()
    test, _, _ = load_art("test")
    assert len(train) + len(test) == 12
    assert names == [["cat"], ["p"]]

def test_load_folder_refuses_a_folder_that_is_not_there(capsys):
    error = refusal(capsys, train_ddpm.load_data, "folder", "train", "missing")
    assert "there is no folder 'missing'" in error and "--data-dir" in error

@pytest.mark.parametrize("spelling", ["Cat", "cat ", "CAT"])
def test_load_folder_refuses_two_spellings_of_one_name(spelling, capsys):
    save_artwork("art", ["p"], ["cat", "dog", spelling], 2)
    error = refusal(capsys, load_art)
    assert "differ in their spelling alone" in error
    assert "'cat'" in error and repr(spelling) in error and "dog" not in error

def test_say_counts_cuts_a_long_list_of_names(capsys):
    names = [f"n{i:02}" for i in range(62)]
    y = torch.tensor([*range(62), 61])[:, None]
    train_ddpm.say_counts(Path("art"), y, [names])
    assert "n59 1, and 2 more, of 1 to 2 each\n" in capsys.readouterr().out

def test_load_folder_says_what_it_found_each_time_that_it_loads_the_train_split(capsys):
    save_artwork("art", ["p"], ["cat", "dog"], 3)
    for _ in range(2):
        load_art()
        out = capsys.readouterr().out
        assert out == "cls: cat 3, dog 3\nstyle: p 6\nart: 6 images\n"
    load_art("test")
    assert capsys.readouterr().out == ""

@pytest.fixture
def two_empty_classes():
    """Six cats, one dog whose picture is broken, and no cow."""
    save_artwork("art", ["p"], ["cat"], 6)
    Path("art/p/cow").mkdir()
    Path("art/p/dog").mkdir()
    Path("art/p/dog/1.png").write_bytes(b"not a picture")

def test_load_folder_names_the_classes_without_a_readable_picture(two_empty_classes, capsys):
    load_art()
    words = "without a readable picture of its own, so no class or style: cow, dog\n"
    assert words in capsys.readouterr().out

def test_load_folder_gives_no_number_to_a_class_without_a_readable_picture(two_empty_classes):
    _, y, names = load_art()
    assert names == [["cat"], ["p"]]
    assert y.unique(dim=0).tolist() == [[0, 0]]

def test_load_folder_names_no_folder_that_systems_make(capsys):
    save_artwork("art", ["p"], ["cat"], 2)
    touch("art/@eaDir/1.png", "art/p/.hidden/1.png")
    load_art()
    assert "without a readable picture" not in capsys.readouterr().out

def test_load_folder_decodes_a_folder_once(monkeypatch):
    save_artwork("art", ["p"], ["cat", "dog"], 3)
    first, _, _ = load_art()
    monkeypatch.setattr(train_ddpm, "read_image", None)        # it cannot be called again
    again, _, _ = load_art()
    assert torch.equal(first, again)

def test_load_folder_looks_again_when_a_picture_changes():
    folder = Path("art/p/cat")
    folder.mkdir(parents=True)
    for hour, color in enumerate(("black", "white")):
        for k in (0, 1):
            path = folder / f"{k}.bmp"                         # as large in black as in white
            Image.new("RGB", (9, 9), color).save(path)
            os.utime(path, (3600 * hour, 3600 * hour))
        x, _, _ = load_art()
    assert (x == 255).all()

def test_load_folder_does_not_count_a_broken_picture(capsys):
    save_artwork("art", ["p"], ["cat"], 6)
    Path("art/p/cat/2.png").write_bytes(b"not a picture")
    for _ in range(2):                                 # decoded, and as it was kept
        x, _, _ = load_art()
        assert len(x) == 4                             # one of five is held out
        assert "cat 5\nstyle: p 5\nart: 5 images\n" in capsys.readouterr().out

def test_load_folder_skips_a_picture_that_may_not_be_read(monkeypatch, capsys):
    def read_bytes(path):
        if path.name == "2.png":
            raise PermissionError("Permission denied")
        return read(path)

    def open_picture(path, *args):
        if Path(path).name == "2.png":
            raise PermissionError("Permission denied")
        return show(path, *args)

    read, show = Path.read_bytes, Image.open
    save_artwork("art", ["p"], ["cat"], 6)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Image, "open", open_picture)
    load_art()
    out = capsys.readouterr().out
    assert "skipped art/p/cat/2.png" in out
    assert "art: 5 images" in out

def test_load_folder_labels_a_copy_whose_names_are_spelt_in_another_way():
    for folder, form in (("one", "NFC"), ("two", "NFD")):
        save_png(Path(folder, unicodedata.normalize(form, "\u00e9pi"), "1.png"), "red")
        save_png(Path(folder, "zoo", "1.png"), "blue")
    for folder in ("one", "two"):                      # the second one is in the cache
        x, y, (names,) = train_ddpm.load_data("folder", "train", folder, size=32)
        red = x[:, 0, 0, 0] == 255
        classes = [names[label] for label in y[red, 0]]
        assert [model.plain(name) for name in classes] == ["\u00e9pi"]

def test_load_folder_names_no_flag_that_does_not_move_its_cache(capsys):
    save_artwork("art", ["p"], ["cat"], 2)
    touch("runs")                                      # so no folder can be made there
    with pytest.raises(SystemExit):
        load_art()
    error = capsys.readouterr().err
    assert "runs/cache" in error
    assert "--out" not in error

# ---- train_ddpm.py: the public checkpoints -------------------------------------------------------

# Some names in the public code (SalUn's DDPM/models/diffusion.py), and ours.
PUBLIC_NAMES = [
    ("temb.dense.0.weight", "time_mlp.0.weight"),
    ("temb.dense.1.bias", "time_mlp.2.bias"),
    ("cemb.dense.0.weight", "label_mlps.0.0.weight"),
    ("cemb.dense.1.bias", "label_mlps.0.2.bias"),
    ("conv_in.weight", "conv_in.weight"),
    ("down.0.block.0.temb_cemb_proj.weight", "down.0.blocks.0.emb.weight"),
    ("down.1.block.0.nin_shortcut.weight", "down.1.blocks.0.shortcut.weight"),
    ("down.1.attn.0.proj_out.weight", "down.1.attns.0.proj.weight"),
    ("down.0.downsample.conv.weight", "down.0.resample.weight"),
    ("mid.block_1.norm1.weight", "mid_block1.norm1.weight"),
    ("mid.attn_1.q.weight", "mid_attn.q.weight"),
    ("mid.block_2.conv2.bias", "mid_block2.conv2.bias"),
    ("up.0.block.0.nin_shortcut.weight", "up.0.blocks.0.shortcut.weight"),
    ("up.3.upsample.conv.bias", "up.3.resample.bias"),
    ("norm_out.bias", "norm_out.bias"),
    ("conv_out.weight", "conv_out.weight")]

def public_state(network):
    """The network's weights under their names in the public code."""
    parts = {"time_mlp.0": "temb.dense.0", "time_mlp.2": "temb.dense.1",
             "label_mlps.0.0": "cemb.dense.0", "label_mlps.0.2": "cemb.dense.1",
             "blocks": "block", "attns": "attn", "mid_block": "mid.block_",
             "mid_attn": "mid.attn_1", ".emb.": ".temb_cemb_proj.",
             "shortcut": "nin_shortcut", ".proj.": ".proj_out."}
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in parts.items():
            key = key.replace(ours, theirs)
        side = key.split(".")[0]               # down or up
        state[key.replace("resample", f"{side}sample.conv")] = value.clone()
    table = state.pop("label_embs.0.weight")
    state["classes_emb.weight"] = table[:10]
    state["null_classes_emb"] = table[10]
    return state

@pytest.fixture
def public(monkeypatch):
    """A slim network of the paper's layers, and its weights as a public state dict."""
    slim = model.replace(model.PRESETS["paper"], width=8, groups=4)
    monkeypatch.setitem(model.PRESETS, "paper", slim)
    network = tiny_network(slim, classes=(10,))
    return SimpleNamespace(network=network, state=public_state(network))

def save_public(raw, ema, path="public.pth"):
    """A checkpoint as the public code saves it: [model, optimiser, step, EMA]."""
    raw = {f"module.{key}": value for key, value in raw.items()}
    torch.save([raw, {"state": {}}, 7, ema], path)

def test_import_public_puts_every_weight_in_its_place(public):
    save_public(public.state, public.state)
    imported = train_ddpm.import_public("public.pth")
    assert torch.equal(all_weights(imported), all_weights(public.network))

@pytest.mark.parametrize("theirs,ours", PUBLIC_NAMES)
def test_import_public_knows_the_names_of_the_public_code(theirs, ours, public):
    public.state[theirs].fill_(7)
    save_public(public.state, public.state)
    state = train_ddpm.import_public("public.pth").state_dict()
    assert (state[ours] == 7).all()

def test_import_public_puts_the_null_embedding_into_the_last_row(public):
    public.state["null_classes_emb"].fill_(7)
    save_public(public.state, public.state)
    table = train_ddpm.import_public("public.pth").label_embs[0].weight
    assert (table == 7).all(1).tolist() == [False] * 10 + [True]

def test_import_public_takes_the_average_and_what_it_lacks_from_the_model(public):
    zeros = {key: torch.zeros_like(value) for key, value in public.state.items()}
    del public.state["conv_in.bias"]
    save_public(zeros, public.state)
    imported = train_ddpm.import_public("public.pth")
    assert torch.equal(imported.conv_in.weight, public.network.conv_in.weight)
    assert not imported.conv_in.bias.any()

@pytest.mark.parametrize("key", ["conv_in.weight", "conv_in.more"])
def test_import_public_refuses_shapes_and_keys_that_do_not_fit(key, public, capsys):
    save_public(public.state, {**public.state, key: torch.zeros(1)})
    assert "not a CIFAR-10 checkpoint" in refusal(capsys, train_ddpm.import_public, "public.pth")

@pytest.mark.parametrize("key", ["conv_in.weight", "null_classes_emb", "classes_emb.weight"])
def test_import_public_refuses_a_checkpoint_that_lacks_a_key(key, public, capsys):
    del public.state[key]
    save_public(public.state, public.state)
    assert "not a CIFAR-10 checkpoint" in refusal(capsys, train_ddpm.import_public, "public.pth")

@pytest.mark.parametrize("content", [None, {}, [], [1, 2], Bomb()])
def test_import_public_refuses_other_files_and_runs_nothing_in_them(content, capsys):
    torch.save(content, "public.pth")
    assert "not a CIFAR-10 checkpoint" in refusal(capsys, train_ddpm.import_public, "public.pth")
    assert not Path("exploded").exists()

def test_main_of_train_ddpm_converts_a_public_checkpoint(public, capsys):
    save_public(public.state, public.state)
    command(train_ddpm, "--import public.pth --out run")
    _, info = model.load_checkpoint("run")
    assert torch.equal(all_weights("run"), all_weights(public.network))
    assert info["dataset"] == "cifar10"
    assert info["preset"] == "paper"
    assert "next: python unlearn.py --cls 0 --ckpt run\n" in capsys.readouterr().out

# ---- train_ddpm.py: what all stages share --------------------------------------------------------

def test_set_defaults_fills_what_the_user_left_open_and_returns_all():
    args = SimpleNamespace(steps=0, lr=None)
    returned = train_ddpm.set_defaults(args, steps=5, lr=0.1, new=3)
    assert returned == dict(steps=0, lr=0.1, new=3)
    assert vars(args) == returned

def loading(dataset=None, data_dir="data"):
    return SimpleNamespace(dataset=dataset, data_dir=data_dir, device="cpu", compile=False)

def test_load_run_loads_the_data_of_the_model(small_world):
    args = loading()
    network, info, images, y = train_ddpm.load_run("tiny.pt", args)
    assert torch.equal(all_weights(network), all_weights("tiny.pt"))
    assert args.dataset == "shapes" and info["names"][0] == train_ddpm.SHAPES
    assert len(images) == len(y) == 100

def test_load_run_refuses_the_data_of_another_model(small_world, capsys):
    args = loading(dataset="fashion")
    assert "tiny.pt draws shapes" in refusal(capsys, train_ddpm.load_run, "tiny.pt", args)

def test_load_run_refuses_a_folder_with_other_names(small_world, capsys):
    save_artwork("art", ["p"], ["cat", "dog"], 2)
    names = [["cat", "cow"], ["p"]]
    info = dict(INFO, dataset="folder", names=names)
    model.save_checkpoint("cows.pt", tiny_network(SMALLEST, classes=(2, 1)), info)
    error = refusal(capsys, train_ddpm.load_run, "cows.pt", loading(data_dir="art"))
    assert "other names than 'art'" in error and "--data-dir" in error

def test_picture_labels_have_a_column_for_each_class_and_a_row_for_each_style():
    y, layout = train_ddpm.picture_labels(NAMES)
    assert layout == dict(columns=4, rows=NAMES[1], heads=NAMES[0])
    assert len(y) == 12
    assert y[:4, 0].tolist() == [0, 1, 2, 3]
    assert y[:, 1].tolist() == [0] * 4 + [1] * 4 + [2] * 4

def test_picture_labels_have_four_rows_where_there_are_no_styles():
    y, layout = train_ddpm.picture_labels([["a", "b"]])
    assert layout == dict(columns=2, rows=[""] * 4, heads=["a", "b"])
    assert y.tolist() == [[0], [1]] * 4

def test_picture_labels_show_few_of_many_values_and_those_that_matter():
    many = [str(i) for i in range(100)]
    _, layout = train_ddpm.picture_labels([many], pairs=[(0, 41)])
    heads = layout["heads"]
    assert "41" in heads
    assert len(heads) <= 13
    assert heads == sorted(heads, key=int)

def test_conditions_of_are_the_different_labels_sorted():
    y = torch.tensor([[2, 0], [0, 1], [2, 0], [0, 0]])
    assert train_ddpm.conditions_of(y).tolist() == [[0, 0], [0, 1], [2, 0]]

def test_save_samples_leaves_conditions_that_the_data_lack_white(monkeypatch):
    def draw(network, y, **how):
        return torch.zeros(len(y), 3, 8, 8)

    saved = Mock()
    monkeypatch.setattr(train_ddpm, "sample", draw)
    monkeypatch.setattr(train_ddpm, "save_grid", saved)
    labels = model.all_labels(NAMES)
    lacking = (labels == torch.tensor([1, 2])).all(1)
    train_ddpm.save_samples("x.png", tiny_network(), NAMES, labels[~lacking])
    white = all_equal(saved.call_args.args[0], 1)
    shown, _ = train_ddpm.picture_labels(NAMES)
    assert white.tolist() == [label == [1, 2] for label in shown.tolist()]

def test_started_from_keeps_the_path_and_the_sha_256_of_a_model():
    Path("model.pt").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    kept = train_ddpm.started_from(Path("model.pt").absolute())
    assert kept == {"from": str(Path("model.pt").absolute()), "from_sha256": expected}

def test_save_result_saves_the_model_and_how_it_was_made():
    args = SimpleNamespace(seed=3, data_dir="data")
    train_ddpm.save_result(Path("run"), tiny_network(), INFO, args, seconds=1.5)
    expected = dict(seed=3, dataset="any", seconds=1.5, args=vars(args))
    assert result_of("run") == expected
    assert torch.equal(all_weights("run"), all_weights(tiny_network()))

@pytest.mark.parametrize("folder", ["", "/home/code/", "../"])
def test_say_next_names_a_script_as_the_running_one_was_called(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{folder}unlearn.py", "--cls", "1"])
    touch("run/model.pt")
    train_ddpm.say_next(Path("run"), SimpleNamespace(data_dir="data"), ["attack.py", "run"])
    assert f"next: python {folder}attack.py run\n" in capsys.readouterr().out

def test_say_next_names_the_files_and_a_command_that_can_be_pasted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unlearn.py"])
    touch("run/model.pt", "run/.hidden", "run/log.csv")
    args = SimpleNamespace(data_dir="my art")
    train_ddpm.say_next(Path("run"), args, ["attack.py", "my run"])
    written, following = capsys.readouterr().out.splitlines()
    assert written == "wrote log.csv, model.pt into run"
    assert following == "next: python attack.py 'my run' --data-dir 'my art'"

# ---- train_ddpm.py: stage 1 ----------------------------------------------------------------------

def defaults(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ddpm.py", *line.split()])
    return train_ddpm.parse_args()

@pytest.mark.parametrize("line,dataset,preset,steps", [
    ("", "shapes", "small", 16000),
    ("--dataset fashion", "fashion", "small", 10000),
    ("--dataset fashion --preset paper", "fashion", "paper", 800000),
    ("--dataset cifar10", "cifar10", "paper", 800000),
    ("--import x.pth", "cifar10", "paper", 800000),
])
def test_parse_args_picks_preset_and_steps_by_dataset(line, dataset, preset, steps, monkeypatch):
    args = defaults(line, monkeypatch)
    assert args.dataset == dataset
    assert args.preset == preset
    assert args.steps == steps

def test_parse_args_prefers_what_the_user_says(monkeypatch):
    args = defaults("--dataset cifar10 --preset small --steps 0 --batch-size 7", monkeypatch)
    assert args.preset == "small"
    assert args.steps == 0
    assert args.batch_size == 7
    assert args.lr == train_ddpm.PRETRAIN["small"]["lr"]

def test_training_folder_is_named_after_what_is_left_out(quick_pretraining):
    command(train_ddpm, f"{QUICK} --exclude-cls square --exclude-style neon")
    assert os.listdir("runs/shapes") == ["pretrain-without-cls1-style4"]

def test_training_folder_is_a_new_one_for_a_second_training(quick_pretraining):
    command(train_ddpm, QUICK)
    command(train_ddpm, QUICK)
    first, second = sorted(Path("runs/shapes").iterdir())
    assert (first.name, second.name) == ("pretrain", "pretrain-2")
    assert torch.equal(all_weights(first), all_weights(second))

def test_training_folder_may_lie_in_the_home_folder(quick_pretraining):
    command(train_ddpm, f"{QUICK} --out '~/my run'")
    assert Path("home/my run/model.pt").is_file()
    assert not Path("~").exists()

def test_training_folder_refuses_to_resume_without_a_state(quick_pretraining, capsys):
    command(train_ddpm, f"{QUICK} --out run")
    os.remove("run/train.pt")
    error = refusal(capsys, command, train_ddpm, f"{QUICK} --out run --resume")
    assert "run has no train.pt to go on from" in error
    assert Path("run/model.pt").is_file()      # it is kept

def test_main_of_train_ddpm_leaves_what_it_promises(quick_pretraining, capsys):
    command(train_ddpm, f"{QUICK} --out run")
    promised = "log.csv loss.png model.pt result.json samples.png train.pt".split()
    assert sorted(os.listdir("run")) == promised
    assert result_of("run")["method"] == "original"
    assert result_of("run")["steps"] == 2
    assert "next: python unlearn.py --cls 0 --ckpt run\n" in capsys.readouterr().out

def test_main_of_train_ddpm_saves_the_averaged_weights(quick_pretraining, monkeypatch):
    train = Mock(wraps=train_ddpm.pretrain)
    monkeypatch.setattr(train_ddpm, "pretrain", train)
    command(train_ddpm, f"{QUICK} --out run")
    network, ema = train.call_args.args[:2]
    assert torch.equal(all_weights("run"), all_weights(ema))
    assert not torch.equal(all_weights("run"), all_weights(network))

def test_main_of_train_ddpm_saves_the_model_before_it_draws(quick_pretraining, monkeypatch):
    monkeypatch.setattr(train_ddpm, "save_grid", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        command(train_ddpm, f"{QUICK} --out run")
    assert {"model.pt", "result.json"} <= set(os.listdir("run"))

def test_main_of_train_ddpm_never_shows_what_is_excluded(quick_pretraining, monkeypatch, capsys):
    train = Mock(wraps=train_ddpm.pretrain)
    monkeypatch.setattr(train_ddpm, "pretrain", train)
    command(train_ddpm, f"{QUICK} --exclude-cls square --out run")
    images, y = train.call_args.args[3:5]
    assert len(images) == len(y) == 90
    assert (y[:, 0] != 1).all()
    _, info = model.load_checkpoint("run")
    assert info["forgotten"] == [(0, 1)]
    assert info["made_by"]["method"] == "retrain"
    assert "next: python attack.py run\n" in capsys.readouterr().out

def test_main_of_train_ddpm_refuses_to_exclude_everything(small_world, capsys):
    line = "--exclude-cls 0 1 2 3 4 5 6 7 8 9"
    assert "nothing is left to train on" in refusal(capsys, command, train_ddpm, line)
    assert not Path("runs").exists()

def test_main_of_train_ddpm_says_that_it_diverged(quick_pretraining, monkeypatch, capsys):
    settings = dict(train_ddpm.PRETRAIN["small"], lr=1e30)
    monkeypatch.setitem(train_ddpm.PRETRAIN, "small", settings)
    error = refusal(capsys, command, train_ddpm, f"{QUICK} --steps 3 --out run")
    assert "the training diverged" in error
    assert os.listdir("run") == []

def test_main_of_train_ddpm_saves_an_untrained_network_after_no_steps(quick_pretraining):
    command(train_ddpm, "--steps 0 --out run")
    torch.manual_seed(0)
    untrained = model.UNet(SMALLEST)
    assert torch.equal(all_weights("run"), all_weights(untrained))

def test_main_of_train_ddpm_trains_on_a_folder_of_64_by_64_pixels(quick_pretraining, capsys):
    save_artwork("my art", ["Van Gogh", "Cubism"], ["Dogs", "Bears"], 2)
    command(train_ddpm, f"--dataset folder --data-dir 'my art' {QUICK}")
    network, info = model.load_checkpoint("runs/folder/pretrain")
    assert network.cfg.image_size == 64
    assert network.cfg.mult == (1, 1, 1)
    assert info["names"] == [["Bears", "Dogs"], ["Cubism", "Van Gogh"]]
    following = capsys.readouterr().out.splitlines()[-1]
    assert following.endswith("--ckpt runs/folder/pretrain --data-dir 'my art'")

def test_main_of_train_ddpm_keeps_the_conditions_that_the_data_have(quick_pretraining):
    save_artwork("art", ["p", "q"], ["cat"], 2)
    save_artwork("art", ["p"], ["dog"], 2)
    line = f"--dataset folder --data-dir art --image-size 32 --exclude-cls cat {QUICK}"
    command(train_ddpm, f"{line} --out run")
    _, info = model.load_checkpoint("run")
    assert info["conditions"] == [[0, 0], [0, 1], [1, 0]]      # with what was left out

@needs_full_disk
def test_main_of_train_ddpm_writes_its_files_when_standard_output_is_full(quick_pretraining):
    assert in_a_fork(on_a_full_disk, train_ddpm, f"{QUICK} --out run") == 0
    assert {"model.pt", "result.json", "log.csv"} <= set(os.listdir("run"))

# ---- fid.py: evaluation --------------------------------------------------------------------------

SQUARE = [(0, 1)]               # class 1 of TINY, whose images are all 255
BOTH = [(0, 1), (1, 2)]         # and style 2, whose images are all 7
ALL = model.all_labels(NAMES)   # the conditions of the tiny_images()

def make_evaluation(targets, **changes):
    """An Evaluation with two forgotten samples for each target, and one of each retained label."""
    labels = model.all_labels(NAMES)
    forget = labels[model.matches(labels, targets)].repeat_interleave(2, 0)
    retain = labels[~model.matches(labels, targets)]
    parts = dict(names=NAMES, targets=targets, forget=forget, retain=retain, classifier=None,
                 reference=None, unlabelled=3, sampler_steps=1, protocol={})
    return fid.Evaluation(**{**parts, **changes})

def test_conditions_forgets_the_targets_and_nothing_else_that_is_forgotten():
    forget, _ = fid.conditions(ALL, SQUARE, BOTH, samples=12)
    assert forget.tolist() == [[1, 0]] * 2 + [[1, 1]] * 2       # 12 / 3 samples of two labels

def test_conditions_retains_no_forgotten_value():
    _, retain = fid.conditions(ALL, SQUARE, BOTH, samples=12)
    expected = [[c, s] for c in (0, 2, 3) for s in (0, 1)]
    assert retain.unique(dim=0).tolist() == expected

def test_conditions_draws_equally_many_of_each_label():
    for labels in fid.conditions(ALL, BOTH, BOTH, samples=60):
        counts = labels.unique(dim=0, return_counts=True)[1]
        assert len(set(counts.tolist())) == 1

def test_conditions_draws_none_that_the_data_lack():
    data_have = torch.tensor([[0, 0], [1, 0], [2, 1]])
    forget, retain = fid.conditions(data_have, SQUARE, SQUARE, samples=12)
    assert forget.tolist() == [[1, 0]] * 4
    assert retain.tolist() == [[0, 0]] * 4 + [[2, 1]] * 4

def test_conditions_says_that_it_draws_more_samples_than_were_asked_for(capsys):
    fid.conditions(ALL, SQUARE, SQUARE, samples=12)
    assert capsys.readouterr().out == ""
    forget, retain = fid.conditions(ALL, SQUARE, SQUARE, samples=11)
    assert len(forget) + len(retain) == 12
    assert "--samples 11 is less than one of each of 12" in capsys.readouterr().out

def test_balanced_takes_equally_many_of_each_label():
    x, y = tiny_images()
    few = (y == torch.tensor([3, 2])).all(1).nonzero()[:12, 0]  # one label with fewer pictures
    index = torch.cat([torch.arange(220), few])
    images, labels = fid.balanced(x[index], y[index], 72)
    assert labels.unique(dim=0, return_counts=True)[1].tolist() == [6] * 12
    assert torch.equal(all_equal(images, 255), labels[:, 0] == 1)      # each with its own image

def test_balanced_says_when_nothing_is_retained(capsys):
    x, y = tiny_images()
    assert "no image is retained" in refusal(capsys, fid.balanced, x[:0], y[:0], 10)

def test_draw_samples_guides_with_weight_2_from_the_noise_of_all_evaluations():
    y = model.all_labels(NAMES)
    expected = model.sample(tiny_network(), y, 2, guidance=2.0, seed=1234)
    assert torch.equal(fid.draw_samples(tiny_network(), y, 2, step=7), expected)

def test_draw_samples_says_that_a_model_has_diverged(capsys):
    network = tiny_network()
    network.conv_out.bias.data.fill_(torch.nan)
    y = model.all_labels(NAMES)
    assert "diverged" in refusal(capsys, fid.draw_samples, network, y, 1, 0)

@pytest.fixture
def prepare(monkeypatch):
    """Call it for the Evaluation of images x and labels y, for target class 1 where style 2 is
    forgotten, too; its reference images are in `pictures`."""
    pictures = []

    def features(classifier, images):
        pictures.append(images)
        return images.flatten(1).numpy()

    monkeypatch.setattr(fid, "load_classifier", lambda *args: (None, [0.97, 0.98]))
    monkeypatch.setattr(fid, "classifier_features", features)
    args = SimpleNamespace(samples=12, sampler_steps=3, seed=5)
    info = {"names": NAMES, "dataset": "any"}

    def work(x, y):
        evaluation = fid.prepare_evaluation(info, x, y, targets=SQUARE, forgotten=BOTH, args=args)
        return SimpleNamespace(evaluation=evaluation, pictures=torch.cat(pictures))

    return work

@pytest.fixture
def prepared(prepare):
    return prepare(*tiny_images())

def test_prepare_evaluation_compares_with_no_forgotten_image(prepared):
    assert len(prepared.pictures) == 120               # three classes in two styles
    assert not all_equal(prepared.pictures, 255).any()
    assert not all_equal(prepared.pictures, 7).any()

def test_prepare_evaluation_draws_no_other_forgotten_value(prepared):
    y = torch.cat([prepared.evaluation.forget, prepared.evaluation.retain])
    assert (y[:, 1] != 2).all()
    assert (prepared.evaluation.forget[:, 0] == 1).all()
    assert (prepared.evaluation.retain[:, 0] != 1).all()

def test_prepare_evaluation_counts_each_condition_of_the_real_images_the_same(prepare):
    x, y = tiny_images()
    rare = (y[:, 0] == 3).nonzero()[:, 0]
    keep = torch.ones(len(y), dtype=torch.bool)
    keep[rare] = torch.arange(len(rare)) % 20 == 0             # one of twenty
    mean, _ = prepare(x[keep], y[keep]).evaluation.reference
    retained = model.matches(y, [(0, 0), (0, 2)]) & (y[:, 1] != 2)
    common = x[retained].flatten(1).double().mean(0)           # four conditions of six
    others = x[keep & (y[:, 0] == 3) & (y[:, 1] != 2)].flatten(1).double().mean(0)
    assert np.allclose(mean, (4 * common + 2 * others) / 6)

def test_prepare_evaluation_draws_none_that_the_data_lack(prepare):
    x, y = tiny_images()
    lacking = (y == torch.tensor([1, 0])).all(1) | (y == torch.tensor([3, 1])).all(1)
    evaluation = prepare(x[~lacking], y[~lacking]).evaluation
    assert evaluation.forget.unique(dim=0).tolist() == [[1, 1]]
    expected = [[0, 0], [0, 1], [2, 0], [2, 1], [3, 0]]
    assert evaluation.retain.unique(dim=0).tolist() == expected

def test_prepare_evaluation_says_that_the_data_have_no_picture_of_the_target(prepare, capsys):
    x, y = tiny_images()
    keep = (y[:, 0] != 1) | (y[:, 1] == 2)             # class b in the forgotten style alone
    assert "no picture of cls b alone" in refusal(capsys, prepare, x[keep], y[keep])

def test_prepare_evaluation_records_the_protocol(prepared):
    protocol = prepared.evaluation.protocol
    expected = dict(dataset="any", samples=12, sampler="ddim", sampler_steps=3, guidance=2.0,
                    noise_seed=1234, seed=5, real_images=120, real_split="train",
                    fid_features="classifier", classifier_test_accuracy=[0.97, 0.98])
    assert {key: protocol[key] for key in expected} == expected
    assert prepared.evaluation.sampler_steps == 3

# four samples of class b in style p, then retained ones: three of a in q and three of c in r
SAMPLED = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 3 + [[2, 2]] * 3)

@pytest.fixture
def recognise(monkeypatch):
    """Call it to say what the classifier shall recognise in sample i: recognise(i, label)."""
    seen = SAMPLED.clone()
    monkeypatch.setattr(fid, "predict", lambda classifier, images: seen)

    def change(i, label):
        seen[i] = torch.tensor(label)

    return change

def score_of(targets, **changes):
    return fid.score(SAMPLED, SAMPLED, make_evaluation(targets, **changes))

def test_score_counts_the_samples_that_show_the_target(recognise):
    recognise(0, [2, 0])                               # another class, in the style asked for
    metrics = score_of(SQUARE)
    assert metrics["ua"] == 1 / 4
    assert metrics["ar"] == 3 / 4

def test_score_counts_a_target_only_where_it_was_asked_for(recognise):
    recognise(0, [2, 2])                               # style r was not asked for here
    recognise(4, [1, 1])                               # class b was not asked for here
    metrics = score_of(BOTH)
    assert metrics["forget_samples"] == 7              # of class b, or in style r
    assert metrics["ar"] == 6 / 7

def test_score_gives_the_ua_of_each_target(recognise):
    recognise(0, [2, 0])
    recognise(1, [4, 0])
    assert score_of(BOTH)["ua_of"] == {"cls b": 1 / 2, "style r": 0.0}

def test_score_counts_none_only_among_the_forgotten(recognise):
    recognise(0, [4, 0])                               # 4: no class is recognised
    recognise(4, [4, 3])                               # a retained sample
    metrics = score_of(SQUARE)
    assert metrics["none"] == 1 / 4
    assert metrics["ua"] == 1 / 4                      # what is not recognised is not drawn

def test_score_counts_a_missing_style_as_none(recognise):
    recognise(2, [1, 3])                               # 3: no style is recognised
    assert score_of(SQUARE)["none"] == 1 / 4

def test_score_gives_each_factor_of_the_retained_samples(recognise):
    recognise(0, [0, 1])                               # a forgotten one does not count
    recognise(4, [3, 1])
    recognise(5, [0, 0])
    recognise(6, [1, 0])
    metrics = score_of(SQUARE)
    assert metrics["cls"] == 4 / 6
    assert metrics["style"] == 4 / 6
    assert metrics["retain_samples"] == 6

def test_score_compares_the_retained_samples_alone(recognise, monkeypatch):
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(10, 3)))
    monkeypatch.setattr(fid, "classifier_features", lambda classifier, x: x.numpy())
    reference = fid.moments(rng.normal(size=(50, 3)))
    metrics = fid.score(features, SAMPLED, make_evaluation(SQUARE, reference=reference))
    expected = fid.frechet_distance(reference, fid.moments(features[4:]))
    assert metrics["fid"] == pytest.approx(expected)
    assert metrics["fid_error"] == fid.fid_error(reference, features[4:].numpy())

def test_score_has_no_number_where_nothing_is_retained(monkeypatch):
    y = torch.tensor([[1, 0]] * 4)
    seen = torch.tensor([[2, 0]] + [[1, 0]] * 3)
    monkeypatch.setattr(fid, "predict", lambda classifier, images: seen)
    metrics = fid.score(y, y, make_evaluation(SQUARE))
    assert metrics["cls"] is None
    assert metrics["fid"] is None
    assert metrics["ua"] == 1 / 4

def test_share_gives_wilsons_interval():
    hits = torch.tensor([True] * 5 + [False])
    n, p, z = 6, 5 / 6, 1.959964
    middle = (p + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z / (1 + z ** 2 / n) * np.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    expected = {"cls": p, "cls_low": middle - half, "cls_high": middle + half}
    assert fid.share("cls", hits) == pytest.approx(expected, abs=1e-6)

def test_share_of_nothing_has_no_number():
    nothing = fid.share("ar", torch.zeros(0, dtype=torch.bool))
    assert nothing == {"ar": None, "ar_low": None, "ar_high": None}

def metrics_of(**values):
    """What score returns, with these shares; the others are None."""
    metrics = {"fid": None, "fid_error": None}
    for name in ("ua", "ar", "none", "cls", "style"):
        value = values.get(name)
        metrics[name] = metrics[f"{name}_low"] = metrics[f"{name}_high"] = value
    return {**metrics, **values}

def test_score_text_shows_none_only_above_5_percent():
    assert "none" not in fid.score_text(metrics_of(ua=1.0, none=0.05), "ua")
    assert "none 6.0 [6, 6] %" in fid.score_text(metrics_of(ua=1.0, none=0.06), "ua")

def test_score_text_leaves_out_what_was_not_measured():
    text = fid.score_text(metrics_of(ar=0.25, cls=0.5), "ar")
    assert text == "AR 25.0 [25, 25] %   class 50.0 [50, 50] %"

@pytest.fixture
def measured_labels(monkeypatch):
    """The labels that measure() draws and scores, call by call."""
    asked = []

    def score_none(x, y, evaluation):
        asked.append(y)
        return metrics_of(ua=0.0)

    monkeypatch.setattr(fid, "score", score_none)
    seen = torch.tensor([[1, 0]] + [[0, 0]] * 3)
    monkeypatch.setattr(fid, "predict", lambda classifier, images: seen)
    return asked

@pytest.fixture
def unlabelled(monkeypatch):
    """leak() of a model whose four samples are a square, another class in style 2, a square in style
    2 and nothing of these; `unlabelled.draws` are the calls of sample()."""
    seen = torch.tensor([[1, 0], [0, 2], [1, 2], [0, 0]])
    draws = Mock(return_value=torch.zeros(4, 3, 8, 8))
    monkeypatch.setattr(fid, "sample", draws)
    monkeypatch.setattr(fid, "predict", lambda classifier, images: seen)

    def leak(targets):
        return fid.leak(tiny_network(), make_evaluation(targets, unlabelled=4), 0)

    leak.draws = draws
    return leak

@pytest.mark.parametrize("targets,share", [(SQUARE, 0.5), (BOTH, 0.75), ([(0, 3)], 0.0)])
def test_leak_is_the_share_in_which_a_forgotten_value_is_seen(targets, share, unlabelled):
    assert unlabelled(targets)["leak"] == share

def test_leak_asks_for_nothing(unlabelled):
    unlabelled(SQUARE)
    network, y = unlabelled.draws.call_args.args[:2]
    assert y.tolist() == [network.null.tolist()] * 4
    assert unlabelled.draws.call_args.kwargs["guidance"] == 0
    assert unlabelled.draws.call_args.kwargs["seed"] == fid.NOISE_SEED

@pytest.mark.parametrize("retained", [True, False])
def test_measure_counts_the_leak_beside_the_retained_conditions(
        retained, measured_labels, capsys):
    evaluation = make_evaluation(SQUARE)
    metrics, _ = fid.measure(tiny_network(), evaluation, 5, "ua", retained)
    assert ("leak" in metrics) == retained
    assert ("leak 25.0 [5, 70] %" in capsys.readouterr().out) == retained

def test_measure_draws_the_forgotten_conditions_first(measured_labels):
    evaluation = make_evaluation(SQUARE)
    _, samples = fid.measure(tiny_network(), evaluation, 5, "ua")
    expected = torch.cat([evaluation.forget, evaluation.retain])
    assert torch.equal(measured_labels[0], expected)
    assert len(samples) == len(expected)
    assert samples.dtype == torch.uint8

def test_measure_leaves_out_the_retained_conditions(measured_labels, capsys):
    evaluation = make_evaluation(SQUARE)
    metrics, samples = fid.measure(tiny_network(), evaluation, 5, "ua", retained=False)
    assert torch.equal(measured_labels[0], evaluation.forget)
    assert len(samples) == len(evaluation.forget)
    assert metrics["step"] == 5
    assert capsys.readouterr().out.startswith("step     5: UA 0.0")

@pytest.fixture
def timed(monkeypatch):
    """Call it for train_and_measure()'s answer on four steps, each of one second of a made-up
    clock; a measurement lasts a hundred. A point is [step, with the retained conditions or not]."""
    clock = [0.0]

    def measure_slowly(network, evaluation, step, headline, retained=True):
        clock[0] += 100
        return [step, retained], step

    def training():
        for loss in (4.0, 3.0, 2.0, 1.0):
            clock[0] += 1
            yield torch.tensor(loss)

    def answer(every, retained):
        args = SimpleNamespace(steps=4, sampler_steps=1, seed=0)
        return fid.train_and_measure(tiny_network(), training(), make_evaluation(SQUARE), every,
                                     args, headline="ar", retained=retained)

    monkeypatch.setattr(fid.time, "time", lambda: clock[0])
    monkeypatch.setattr(fid, "measure", measure_slowly)
    return answer

def test_train_and_measure_counts_the_seconds_of_the_steps_alone(timed):
    _, _, _, seconds = timed(every=[2], retained=False)
    assert seconds == 4.0

def test_train_and_measure_keeps_the_loss_of_every_step(timed):
    _, _, losses, _ = timed(every=[2], retained=False)
    assert losses.tolist() == [4.0, 3.0, 2.0, 1.0]

@pytest.mark.parametrize("every,steps", [([2], [0, 2, 4]), ([1, 3], [0, 1, 3, 4]), ([], [0, 4])])
def test_train_and_measure_measures_before_after_and_at_the_points(every, steps, timed):
    curve, samples, _, _ = timed(every, retained=True)
    assert [step for step, _ in curve] == steps
    assert samples == steps

def test_train_and_measure_leaves_the_retained_conditions_out_on_the_way(timed):
    curve, _, _, _ = timed(every=[2], retained=False)
    assert curve == [[0, True], [2, False], [4, True]]

def test_save_before_after_puts_each_sample_at_its_condition(monkeypatch):
    evaluation = make_evaluation(SQUARE)
    y = torch.cat([evaluation.forget, evaluation.retain])
    before = (10 * y[:, 0] + y[:, 1])[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8)
    saved = Mock()
    monkeypatch.setattr(fid, "save_grid", saved)
    fid.save_before_after("x.png", evaluation, SQUARE, before, before + 100)
    shown = saved.call_args.args[0][:, 0, 0, 0].tolist()
    expected = [10 * c + s for s in range(3) for c in range(4)]
    assert shown == expected + [100 + value for value in expected]

def test_save_before_after_leaves_what_was_not_drawn_white(monkeypatch):
    evaluation = make_evaluation(SQUARE, retain=torch.tensor([[0, 0]]))
    black = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    saved = Mock()
    monkeypatch.setattr(fid, "save_grid", saved)
    fid.save_before_after("x.png", evaluation, SQUARE, black, black)
    white = all_equal(saved.call_args.args[0], 255)
    labels = [[c, s] for s in range(3) for c in range(4)]
    drawn = [label[0] == 1 or label == [0, 0] for label in labels]
    assert white.tolist() == [not was_drawn for was_drawn in drawn] * 2

# ---- fid.py: Frechet distance --------------------------------------------------------------------

def mixed_features(seed, n=200, dims=6):
    """Features (n, dims) that depend on each other."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims)

def unequal_features():
    """270 features of one label, 10 of another, and the labels."""
    features = np.concatenate([mixed_features(0, n=270), mixed_features(1, n=10)])
    return features, torch.tensor([[0]] * 270 + [[1]] * 10)

def test_equal_weights_let_each_label_count_the_same_in_all():
    y = torch.tensor([[0, 0]] * 27 + [[0, 1]] + [[1, 1]] * 2)
    weights = fid.equal_weights(y)
    sums = [weights[:27].sum(), weights[27:28].sum(), weights[28:].sum()]
    assert sums == pytest.approx([sums[0]] * 3)

def test_moments_with_equal_weights_are_those_of_balanced_data():
    features, y = unequal_features()
    mean, cov = fid.moments(features, fid.equal_weights(y))
    balanced = np.concatenate([features[:270], np.repeat(features[270:], 27, 0)])
    assert np.allclose(mean, balanced.mean(0))
    assert np.allclose(cov, np.cov(balanced, rowvar=False, ddof=0), rtol=0.05, atol=0.05)

def test_moments_with_equal_weights_have_no_distance_from_balanced_data():
    features, y = unequal_features()
    balanced = fid.moments(np.concatenate([features[:270], np.repeat(features[270:], 27, 0)]))
    weighted = fid.moments(features, fid.equal_weights(y))
    distance = fid.frechet_distance(weighted, balanced)
    assert distance < 0.01 * fid.frechet_distance(fid.moments(features), balanced)

def test_moments_without_weights_are_those_of_numpy():
    features, _ = unequal_features()
    mean, cov = fid.moments(features)
    assert np.allclose(mean, features.mean(0))
    assert np.allclose(cov, np.cov(features, rowvar=False))

def test_frechet_distance_equals_the_one_with_a_matrix_root():
    a, b = mixed_features(0), mixed_features(1)
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = means + np.trace(cov1 + cov2 - 2 * root)
    found = fid.frechet_distance(fid.moments(a), fid.moments(b))
    assert found == pytest.approx(expected, rel=1e-6), \
        f"expected |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) = {expected}"

def test_frechet_distance_of_two_gaussians_of_one_dimension():
    real = np.array([3.0]), np.array([[4.0]])          # mean 3 and deviation 2
    fake = np.array([-1.0]), np.array([[25.0]])        # mean -1 and deviation 5
    found = fid.frechet_distance(real, fake)
    assert found == pytest.approx(4 ** 2 + 3 ** 2), \
        "in one dimension it is (mu1 - mu2)^2 + (sigma1 - sigma2)^2"

def test_frechet_distance_of_equal_sets_is_0():
    real = fid.moments(mixed_features(0))
    found = fid.frechet_distance(real, real)
    assert found == pytest.approx(0, abs=1e-6), "a set has the distance 0 from itself"

def test_frechet_distance_of_a_shifted_set_is_the_shift_squared():
    a = mixed_features(0)
    found = fid.frechet_distance(fid.moments(a), fid.moments(a + 3))
    assert found == pytest.approx(6 * 3 ** 2), "a shift changes the means alone"

def test_frechet_distance_is_symmetric():
    a, b = fid.moments(mixed_features(0)), fid.moments(mixed_features(1))
    found = fid.frechet_distance(a, b)
    assert found == pytest.approx(fid.frechet_distance(b, a)), "the distance has no direction"

def test_frechet_distance_takes_singular_covariances():
    a = mixed_features(0, n=4)                         # 4 pictures cannot fill 6 dimensions
    b = mixed_features(1, n=4)
    mean1, mean2 = a.mean(0), b.mean(0)
    # of centred features the root's trace is the sum of these singular values
    cross = np.linalg.svd((a - mean1) @ (b - mean2).T / 3, compute_uv=False).sum()
    traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected = ((mean1 - mean2) ** 2).sum() + traces - 2 * cross
    found = fid.frechet_distance(fid.moments(a), fid.moments(b))
    assert np.isreal(found), "the distance is a real number, also of fewer images than features"
    assert found == pytest.approx(expected, abs=1e-3), f"expected {expected}"

def test_fid_error_is_the_spread_over_new_samples():
    rng = np.random.default_rng(0)
    real = fid.moments(rng.normal(size=(4000, 4)))
    samples = rng.normal(size=(40, 300, 4)) * 1.5
    spread = np.std([fid.frechet_distance(real, fid.moments(x)) for x in samples], ddof=1)
    error = np.mean([fid.fid_error(real, x) for x in samples[:10]])
    assert 0.6 < error / spread < 1.6

# ---- fid.py: InceptionV3 -------------------------------------------------------------------------

def test_inception_pools_as_pytorch_fid_does(monkeypatch):
    options = dict(num_classes=1008, aux_logits=False, init_weights=False)
    state = torchvision.models.inception_v3(**options).state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **how: state)
    network = fid.inception(CPU)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        block = getattr(network, f"Mixed_{name}")
        branch = block.branch_pool
        pool = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        if name == "7c":                               # the last block takes the maximum
            pool = torch.nn.MaxPool2d(3, 1, 1)
        x = torch.randn(2, branch.conv.in_channels, 5, 5)
        expected = F.relu(branch.bn(branch.conv(pool(x))))
        found = block(x)[:, -expected.shape[1]:]
        assert torch.allclose(found, expected, atol=1e-5), f"Mixed_{name}"
    assert network(torch.rand(1, 3, 299, 299)).shape == (1, 2048)

def test_inception_that_cannot_be_had_leads_to_the_classifier(monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=OSError))
    assert "--features classifier" in refusal(capsys, fid.inception, CPU)

# ---- fid.py: the classifier ----------------------------------------------------------------------

def shipped_classifier():
    args = SimpleNamespace(dataset="shapes", data_dir="data")
    return fid.load_classifier(args, CPU, [train_ddpm.SHAPES, train_ddpm.STYLES])

def resized(x):
    return F.interpolate(x, (32, 32), mode="bilinear")

DAMAGES = {
    "none": lambda x: x,
    "larger": lambda x: resized(x[:, :, 5:-5, 5:-5]),
    "smaller": lambda x: resized(F.pad(x, (7, 7, 7, 7), mode="replicate")),
    "contrast": lambda x: 2 * x,
    "saturated": lambda x: 2 * x - x.mean(1, keepdim=True),
    "colour cast": lambda x: x + torch.empty(len(x), 3, 1, 1).uniform_(-0.3, 0.3),
    "pale": lambda x: 0.5 * x,
    "other colours": lambda x: x[:, [2, 0, 1]],
}

@pytest.mark.parametrize("damage", DAMAGES)
def test_classifier_knows_what_is_left_of_a_picture(damage):
    classifier, _ = shipped_classifier()
    x, y = train_ddpm.draw_shapes(6, seed=77)
    x = DAMAGES[damage](x.float() / 127.5 - 1)
    hit = (fid.predict(classifier, x.clamp(-1, 1)) == y).double()
    of_shape = [hit[y[:, 0] == shape, 0].mean() for shape in range(10)]
    assert min(of_shape) > 0.96
    assert hit[:, 1].mean() > 0.99

@pytest.mark.parametrize("grain", [32, 5, 1])                   # from pixels to flat colour
def test_classifier_calls_noise_none(grain):
    classifier, _ = shipped_classifier()
    x = resized(torch.rand(500, 3, grain, grain) * 2 - 1)
    none = torch.tensor([10, 5])
    assert (fid.predict(classifier, x) == none).double().mean() > 0.98

@pytest.mark.parametrize("spoil", [fid.garbage, fid.augment])
def test_garbage_and_augment_draw_other_images_of_the_same_range(spoil):
    x, _ = train_ddpm.draw_shapes(2, seed=1)
    x = x.float() / 127.5 - 1
    spoilt = spoil(x)
    assert spoilt.shape == x.shape
    assert spoilt.abs().max() <= 1
    assert (spoilt != x).flatten(1).any(1).all()

def test_classifier_steps_calls_an_eighth_none(monkeypatch):
    monkeypatch.setattr(fid, "garbage", lambda x: torch.full_like(x, -1))
    asked = []
    cross_entropy = F.cross_entropy

    def record(logits, labels):
        asked.append(labels)
        return cross_entropy(logits, labels)

    monkeypatch.setattr(fid.F, "cross_entropy", record)
    x, y = train_ddpm.draw_shapes(1, seed=1)
    network = fid.Classifier(3, (10, 5), width=4)
    list(fid.classifier_steps(network, x, y, steps=1, batch_size=32))
    shape, style = asked
    assert (shape == 10).tolist() == [True] * 4 + [False] * 28
    assert (style == 5).tolist() == [True] * 4 + [False] * 28

def test_predict_and_classifier_features_take_bytes_or_floats():
    x, _ = train_ddpm.draw_shapes(1, seed=1)
    floats = x.float() / 127.5 - 1
    classifier = fid.Classifier(3, (10, 5), width=4).eval()
    assert torch.equal(fid.predict(classifier, x), fid.predict(classifier, floats))
    features = fid.classifier_features(classifier, x)
    assert features.shape == (50, 16)
    assert np.array_equal(features, fid.classifier_features(classifier, floats))

TRAIN_CLASSIFIER = f"--train-classifier --dataset folder --image-size 32 {QUICK}"

def save_classes(folder, names):
    """Four pictures of like colours for each name; two folders differ in their pictures."""
    for name in names:
        for k in range(4):
            save_png(f"{folder}/{name}/{k}.png", (80 + k, ord(name), ord(folder)))

def classifier_of(folder, names):
    args = SimpleNamespace(dataset="folder", data_dir=folder)
    classifier, _ = fid.load_classifier(args, CPU, [names], size=32)
    return classifier

def test_say_hardest_says_the_share_of_each_value_that_has_images(capsys):
    y = torch.tensor([[0], [0], [2], [2], [2], [2]])
    hit = torch.tensor([[True], [True], [True], [False], [False], [False]])
    fid.say_hardest(hit, y, [["easy", "absent", "hard"]])
    expected = "cls recognised, the hardest first: hard 25.0 %, easy 100.0 %\n"
    assert capsys.readouterr().out == expected

def test_load_classifier_takes_the_last_by_number_whatever_its_date(small_world):
    save_classes("C", "ab")
    for number in (2, 9, 10):
        out = f"runs/folder/classifier-{number}"
        command(fid, f"{TRAIN_CLASSIFIER} --data-dir C --seed {number} --out {out}")
        os.utime(f"{out}/model.pt", (100 - number, 100 - number))
    last = torch.load("runs/folder/classifier-10/model.pt", weights_only=True)["weights"]
    found = classifier_of("C", ["a", "b"]).heads[0].weight
    assert torch.equal(found, last["heads.0.weight"].float())

def test_load_classifier_does_not_take_a_backup(small_world):
    save_classes("C", "ab")
    for name in ("classifier", "classifier-old", "my-classifier"):
        command(fid, f"{TRAIN_CLASSIFIER} --data-dir C --seed {len(name)} --out runs/folder/{name}")
    own = torch.load("runs/folder/classifier/model.pt", weights_only=True)["weights"]
    found = classifier_of("C", ["a", "b"]).heads[0].weight
    assert torch.equal(found, own["heads.0.weight"].float())

def test_load_classifier_takes_the_one_of_a_copy_of_the_pictures(small_world):
    save_classes("C", "ab")
    command(fid, f"{TRAIN_CLASSIFIER} --data-dir C")
    shutil.copytree("C", "copy/C", copy_function=shutil.copyfile)
    assert classifier_of("copy/C", ["a", "b"]).heads[0].out_features == 3

def test_load_classifier_says_which_it_took_and_how_well_it_judges(capsys):
    _, (shape, style) = shipped_classifier()
    path = model.shipped("shapes_classifier.pt")
    words = f"cls {100 * shape:.1f} %, style {100 * style:.1f} %"
    expected = f"classifier {path}: accuracy on test images: {words}\n"
    assert capsys.readouterr().out == expected

@pytest.mark.parametrize("accuracy,warned", [
    ([0.80, 0.99], False),
    ([0.79, 0.99], True),
    ([0.99, 0.79], True),
])
def test_load_classifier_warns_of_one_that_is_right_in_less_than_80_percent(
        accuracy, warned, capsys):
    poor = model.load_file(model.shipped("shapes_classifier.pt"), "classifier")
    model.save_file("runs/shapes/classifier/model.pt", "classifier", {**poor, "accuracy": accuracy})
    shipped_classifier()
    out = capsys.readouterr().out
    assert out.startswith("classifier runs/shapes/classifier/model.pt: ")
    assert ("warning: below 80 %" in out) == warned

def test_load_classifier_leaves_out_those_of_other_pictures(small_world, capsys):
    save_classes("C", "ab")
    save_classes("D", "ab")                            # the same names
    for i, folder in enumerate("CD"):
        command(fid, f"{TRAIN_CLASSIFIER} --data-dir {folder} --seed {i}")
    mine = torch.load("runs/folder/classifier/model.pt", weights_only=True)["weights"]
    found = classifier_of("C", ["a", "b"]).heads[0].weight
    assert torch.equal(found, mine["heads.0.weight"].float())
    os.remove("runs/folder/classifier/model.pt")
    refusal(capsys, classifier_of, "C", ["a", "b"])

def test_load_classifier_names_the_command_that_makes_one(small_world, capsys):
    save_classes("C", "ab")
    error = refusal(capsys, classifier_of, "C", ["a", "b"])
    script, line = error.split("run 'python ")[1].split("'")[0].split(" ", 1)
    assert script == "fid.py"
    assert not Path("runs").exists()                   # it trains nothing itself
    command(fid, f"{line} {QUICK}")
    assert classifier_of("C", ["a", "b"]).heads[0].out_features == 3

def test_train_classifier_needs_pictures_to_hold_out(small_world, capsys):
    save_png("one/a/1.png", "red")
    save_png("one/b/1.png", "blue")
    line = f"{TRAIN_CLASSIFIER} --data-dir one"
    assert "too few for a classifier" in refusal(capsys, command, fid, line)

# ---- fid.py: the command -------------------------------------------------------------------------

@pytest.fixture
def two_folders():
    """Shapes in the folders a and b, in sizes from 32 x 32 to 40 x 40."""
    images, _ = train_ddpm.draw_shapes(1, seed=3)
    for i, image in enumerate(images):
        folder, size = ("a", 32) if i < 25 else ("b", 40)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size))
        model.save_picture(picture, f"{folder}/{i}.png")

BY_SHAPES = "--features classifier --dataset shapes"

def test_main_measures_two_folders_of_any_size(two_folders):
    command(fid, f"a b {BY_SHAPES} --out out")
    result = result_of("out")
    assert result["fid"] > 1
    assert result["protocol"]["real_images"] == 25
    assert result["protocol"]["fid_features"] == "classifier"
    assert Image.open("out/samples.png").size == (20 * 66, 2 * 66)

def test_main_finds_no_distance_from_a_folder_to_itself(two_folders):
    command(fid, f"a a {BY_SHAPES} --out out")
    assert result_of("out")["fid"] < 1e-3

def test_main_judges_two_folders_only_by_a_data_set_that_is_named(two_folders, capsys):
    error = refusal(capsys, command, fid, "a b --features classifier")
    assert "such as --dataset shapes" in error
    assert not Path("runs").exists()

def test_main_counts_a_picture_once_whatever_links_lead_to_it(two_folders):
    Path("b/more").symlink_to("../a")
    Path("a/more").symlink_to("../b")
    Path("a/latest.png").symlink_to("0.png")
    command(fid, f"a b {BY_SHAPES} --out out")
    protocol = result_of("out")["protocol"]
    assert (protocol["real_images"], protocol["fake_images"]) == (50, 50)

def test_main_takes_inception_for_two_folders(two_folders, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=OSError))
    assert "Inception" in refusal(capsys, command, fid, "a b")

def test_main_names_a_picture_that_cannot_be_read(two_folders, capsys):
    Path("b/30.png").write_bytes(b"broken")
    assert "b/30.png" in refusal(capsys, command, fid, f"a b {BY_SHAPES}")

def test_main_says_that_a_folder_is_empty(two_folders, capsys):
    Path("empty").mkdir()
    error = refusal(capsys, command, fid, f"a empty {BY_SHAPES}")
    assert "25 real and 0 fake images" in error

def test_main_measures_a_model_and_what_it_draws(small_world):
    command(fid, "test tiny.pt --samples 50 --sampler-steps 1 --out out")
    result = result_of("out")
    assert {"cls", "cls_low", "style", "fid", "fid_error"} <= result.keys()
    assert result["protocol"]["fake"] == "samples, 1 DDIM steps, guidance 2, seed 0"

def test_main_finds_no_distance_from_unequal_classes_to_themselves(monkeypatch):
    for name, n in (("cat", 30), ("dog", 2)):
        for k in range(n):
            save_png(f"art/{name}/{k}.png", (7 * k, 90, 7 * n))
    mean_colour = Mock(features=lambda x: x.mean((2, 3)))
    monkeypatch.setattr(fid, "load_classifier", lambda *args: (mean_colour, [1.0]))
    monkeypatch.setattr(fid, "predict", lambda classifier, x: zero_labels(len(x))[:, :1])
    command(fid, "train train --dataset folder --data-dir art --image-size 32 --out out")
    assert result_of("out")["fid"] == pytest.approx(0, abs=1e-6)

def test_load_source_draws_the_conditions_that_the_data_have(small_world):
    conditions = [[0, 0], [1, 4], [2, 0]]
    save_few_conditions("few.pt", conditions)
    args = SimpleNamespace(dataset="shapes", samples=6, sampler_steps=1, seed=0, compile=False)
    source = fid.load_source("few.pt", args, CPU, 32)
    assert source.y.tolist() == [label for label in conditions for _ in range(2)]

def test_main_says_that_a_model_draws_other_data(small_world, capsys):
    error = refusal(capsys, command, fid, "test tiny.pt --dataset fashion")
    assert "fashion" in error

def test_main_of_fid_keeps_its_result_where_the_picture_fails(two_folders, monkeypatch):
    monkeypatch.setattr(fid, "save_grid", Mock(side_effect=NameError("gird")))
    with pytest.raises(NameError):
        command(fid, f"a b {BY_SHAPES} --out out")
    assert result_of("out")["fid"] > 1

def test_features_of_resizes_without_antialiasing():
    pixels = torch.randint(0, 256, (400, 640, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("large.png")
    floats = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    expected = F.interpolate(floats, (299, 299), mode="bilinear")
    paths = [Path("large.png")] * 2
    found = fid.features_of(paths, torch.nn.Identity(), CPU, None, size=299, channels=3, resize=True)
    assert torch.allclose(found, expected.expand(2, -1, -1, -1), atol=1e-5)

# ---- unlearn.py: what is forgotten, retained and learned instead ---------------------------------

def make_data(forget=SQUARE, earlier=(), **options):
    """The Data of tiny_images()."""
    settings = dict(batch_size=8, alternative="class", alt_size=None, dataset="any")
    args = SimpleNamespace(**{**settings, **options})
    x, y = tiny_images()
    return unlearn.Data(x, y, NAMES, list(forget), sorted({*forget, *earlier}), args)

def test_data_retains_no_forgotten_value():
    data = make_data(BOTH, earlier=[(0, 3)])
    x, y = data.retain_set
    assert y.unique(dim=0).tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert not (all_equal(x, 255) | all_equal(x, 7)).any()

def test_data_forgets_no_image_of_what_was_forgotten_earlier():
    _, y = make_data(BOTH, earlier=[(0, 3)]).forget_set
    assert ((y[:, 0] == 1) | (y[:, 1] == 2)).all()
    assert (y[:, 0] != 3).all()
    assert len(y) == 20 * (3 + 2)                      # class 1 in 3 styles, style 2 of two more

def test_data_draws_batches_of_its_sets():
    data = make_data(batch_size=100)
    for batch, value in ((data.retain(), False), (data.forget(), True)):
        x, y = batch
        assert x.shape == (100, 3, 8, 8)
        assert ((y[:, 0] == 1) == value).all()
        assert (all_equal(x, 1.0) == value).all()
    x, y = data.alternative()
    assert (y[:, 0] == 1).all()
    assert not all_equal(x, 1.0).any()

@pytest.mark.parametrize("dataset,mirrored", [("cifar10", True), ("shapes", False)])
def test_data_mirrors_only_cifar10(dataset, mirrored):
    data = make_data(dataset=dataset, batch_size=200)
    x, _ = data.retain()
    originals = data.retain_set[0].flatten(1).tolist()
    pixels = model.to_uint8(x).flatten(1).tolist()
    assert any(row not in originals for row in pixels) == mirrored

def test_data_counts_the_pixels_that_the_public_code_sums():
    assert make_data().pixels == 3 * 8 * 8

def test_data_replaced_changes_the_forgotten_values_alone():
    y = model.all_labels(NAMES)
    expected = y.clone()
    expected[y[:, 0] == 1, 0] = 2
    expected[y[:, 1] == 2, 1] = 0                      # after the last style comes the first
    before = y.clone()
    assert torch.equal(make_data(BOTH).replaced(y), expected)
    assert torch.equal(y, before)

def test_data_refuses_to_forget_everything(capsys):
    everything = [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert "forget fewer" in refusal(capsys, make_data, everything[:3], everything[3:])

@pytest.mark.parametrize("forget,earlier,expected", [
    ([(0, 1)], [], {(0, 1): 2}),
    ([(0, 3)], [], {(0, 3): 0}),                                # after the last comes the first
    ([(0, 1), (0, 2)], [], {(0, 1): 3, (0, 2): 3}),             # not another forgotten one
    ([(0, 3)], [(0, 0)], {(0, 0): 1, (0, 3): 1}),
    ([(0, 1), (1, 2)], [], {(0, 1): 2, (1, 2): 0}),
])
def test_substitutes_takes_the_next_value_that_is_not_forgotten(forget, earlier, expected):
    assert make_data(forget, earlier).substitutes == expected

def test_substitutes_takes_the_class_that_is_named():
    for text in ("class:3", "class:d"):
        found = make_data(earlier=[(0, 2)], alternative=text).substitutes
        assert found == {(0, 1): 3, (0, 2): 3}

@pytest.mark.parametrize("forget,spec,part", [
    (SQUARE, "class:1", "take another, such as class:0"),
    (SQUARE, "class:circle", "is none of: 0 a"),
    (BOTH, "class:0", "fits one factor"),
    (SQUARE, "x", "class:K, mix"),
    (SQUARE, "image:none.png", "cannot be read"),
])
def test_substitutes_and_alternative_set_refuse_what_cannot_stand_in(forget, spec, part, capsys):
    def ask():
        make_data(forget, alternative=spec)

    assert part in refusal(capsys, ask)

ALTERNATIVES = ["class", "class:3", "mix", "noise", "image:picture.png"]

@pytest.fixture
def grey_picture():
    save_png("picture.png", (9, 9, 9))

@pytest.mark.parametrize("spec", ALTERNATIVES)
def test_alternative_set_carries_the_forgotten_label_in_every_style(spec, grey_picture):
    _, y = make_data(alternative=spec).alternative_set
    assert y.unique(dim=0).tolist() == [[1, 0], [1, 1], [1, 2]]

@pytest.mark.parametrize("spec", ALTERNATIVES)
def test_alternative_set_shows_nothing_forgotten(spec, grey_picture):
    x, _ = make_data(SQUARE, earlier=[(1, 2)], alternative=spec).alternative_set
    assert not all_equal(x, 255).any()                 # of now
    assert not all_equal(x, 7).any()                   # of earlier

@pytest.mark.parametrize("spec", ALTERNATIVES)
def test_alternative_set_rehearses_what_was_forgotten_earlier(spec, grey_picture):
    _, y = make_data(SQUARE, earlier=[(1, 2)], alternative=spec).alternative_set
    now, before = y[:, 0] == 1, y[:, 1] == 2
    assert (now ^ before).all()
    assert before.sum() == 3 * 20                      # three retained classes in style 0

@pytest.mark.parametrize("spec", ALTERNATIVES)
def test_alternative_set_keeps_so_many_images_of_each(spec, grey_picture):
    data = make_data([(0, 1), (0, 2)], alternative=spec, alt_size=2)
    assert data.alternative_set[1][:, 0].tolist() == [1, 1, 2, 2]

def test_alternative_set_shows_images_of_the_substitute():
    data = make_data()
    x, y = data.alternative_set
    retained, labels = data.retain_set
    assert torch.equal(x, retained[labels[:, 0] == 2])
    assert torch.equal(y[:, 1], labels[labels[:, 0] == 2, 1])  # in their own styles

def test_alternative_set_mix_is_all_that_is_retained():
    data = make_data(alternative="mix")
    assert torch.equal(data.alternative_set[0], data.retain_set[0])

def test_alternative_set_image_is_one_picture(grey_picture):
    x, _ = make_data(alternative="image:picture.png").alternative_set
    assert all_equal(x, 9).all()

def test_alternative_set_noise_is_uniform():
    x, _ = make_data(alternative="noise").alternative_set
    assert x.double().mean() == pytest.approx(127.5, abs=2)
    assert x.double().std() == pytest.approx(256 / 12 ** 0.5, abs=1)

# ---- unlearn.py: the methods ---------------------------------------------------------------------

class ByLabel(torch.nn.Module):
    """A stand-in for a network that answers with one number everywhere: label_values[class]. The
    last one is that of the null label."""
    def __init__(self, *values):
        super().__init__()
        self.cfg = TINY
        self.label_values = torch.nn.Parameter(torch.tensor(values))
        self.register_buffer("null", torch.tensor(TINY.classes))
        self.register_buffer("alphas_cumprod", torch.tensor(ALPHAS_CUMPROD).float())
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.label_values[y[:, 0]][:, None, None, None].expand_as(x)

@pytest.fixture
def descents(monkeypatch):
    """The calls of descend, in a list: loss, mask, mask_first; each takes its step."""
    calls = []

    def record(loss, network, optimizer, mask=None, mask_first=False):
        calls.append(SimpleNamespace(loss=loss.item(), mask=mask, mask_first=mask_first))
        return train_ddpm.descend(loss, network, optimizer, mask, mask_first)

    monkeypatch.setattr(unlearn, "descend", record)
    monkeypatch.setattr(attack, "descend", record)
    return calls

@pytest.fixture
def known_losses(monkeypatch):
    """Makes the diffusion loss 2 for retained images, 5 for forgotten ones and 7 for others with
    the forgotten label, times label_values 0, 1 and 2 of a ByLabel. Its items are the probabilities
    with which their labels were dropped."""
    p_drops = {}
    values = torch.tensor([2.0, 5.0, 7.0])

    def loss(network, x0, y, p_drop=0.1):
        forgotten_label = y[:, 0] == 1
        other_image = ~all_equal(x0, 1.0)
        kind = forgotten_label.long() + (forgotten_label & other_image)
        for k in kind.tolist():
            p_drops[("retained", "forgotten", "alternative")[k]] = p_drop
        return network.label_values[kind] * values[kind]

    monkeypatch.setattr(unlearn, "diffusion_loss", loss)
    return p_drops

def take_steps(method, network, data=None, weight=1.0, steps=1, lr=1e-2, **options):
    """The losses that some steps of a method yield."""
    optimizer = torch.optim.Adam(network.parameters(), lr)
    args = SimpleNamespace(steps=steps, weight=weight)
    return list(method(network, data or make_data(), optimizer, args, **options))

def assert_loss(descents, network, formula, **terms):
    """The first step went down the sum of these terms, of which each has a parameter of its own."""
    expected = torch.tensor([terms.get(name, 0.0) for name in ("keep", "forget", "other")])
    assert descents[0].loss == pytest.approx(expected.sum().item()), f"expected {formula}"
    gradient = network.label_values.grad[:3]
    assert torch.allclose(gradient / gradient.norm(), expected / expected.norm(), atol=1e-5), \
        f"the gradient is not that of {formula}: was a term detached?"

def test_dimum_adds_the_loss_of_alternatives_with_the_forgotten_label(known_losses, descents):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)
    take_steps(unlearn.dimum, network, weight=0.3)
    formula = "l(D_r) + lambda * l(alternative images labelled c_f)"
    assert_loss(descents, network, formula, keep=2.0, other=0.3 * 7)

def test_dimum_drops_labels_of_the_retained_images_only(known_losses, descents):
    take_steps(unlearn.dimum, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0))
    expected = {"retained": 0.1, "alternative": 0}
    assert known_losses == expected, \
        "expected label dropout for D_r, none for the alternatives: null must not learn them"

def test_dimum_yields_the_loss_of_every_step(known_losses, descents):
    losses = take_steps(unlearn.dimum, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0), steps=3)
    assert len(losses) == len(descents) == 3, "expected args.steps steps, and a loss from each"
    assert [float(loss) for loss in losses] == pytest.approx([step.loss for step in descents])

def test_ga_subtracts_the_loss_of_the_forgotten_images(known_losses, descents):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)
    take_steps(unlearn.ga, network, weight=0.3)
    formula = "l(D_r) - weight * l(D_f)"
    assert_loss(descents, network, formula, keep=2.0, forget=-0.3 * 5)

def test_ga_drops_labels_in_both_terms(known_losses, descents):
    take_steps(unlearn.ga, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0))
    assert known_losses == {"retained": 0.1, "forgotten": 0.1}, \
        "expected the ordinary loss, with label dropout 0.1, of D_r and of D_f"

def test_finetune_descends_on_the_retained_images(known_losses, descents):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)
    take_steps(unlearn.finetune, network)
    assert_loss(descents, network, "l(D_r)", keep=2.0)
    assert known_losses == {"retained": 0.1}

# label_values for SalUn: c_f = 1 draws 1.0 and its substitute c' = 2 draws 4.0. The null label is
# halfway, so that a dropped label brings them closer: (1 - 2.5)^2 = 2.25 instead of (1 - 4)^2 = 9.
SALUN_VALUES = 1.0, 1.0, 4.0, 20.0, 2.5

@pytest.fixture
def everything_salient(monkeypatch):
    def all_true(network, *args, **options):
        return [torch.ones_like(p, dtype=torch.bool) for p in network.parameters()]

    monkeypatch.setattr(unlearn, "saliency_mask", all_true)

def test_salun_pulls_the_forgotten_label_to_its_substitute(everything_salient, known_losses, descents):
    data = make_data(batch_size=20000)
    take_steps(unlearn.salun, ByLabel(*SALUN_VALUES), data, weight=0)
    loss = descents[0].loss
    # 8.1 where a row is dropped in both branches or in none
    independently = 0.81 * 9 + 2 * 0.09 * 2.25
    assert independently - 0.1 < loss < 8.2, \
        f"expected MSE(network(c_f), network(c')), mean over pixels, labels dropped in both: {loss}"

def test_salun_sends_no_gradient_through_the_target(everything_salient, known_losses, descents):
    network = ByLabel(*SALUN_VALUES)
    take_steps(unlearn.salun, network)
    assert network.label_values.grad[2] == 0, \
        "the target network(x_t, c') must be a constant: c' itself must not move"

def test_salun_moves_the_forgotten_label_towards_the_target(everything_salient, known_losses, descents):
    network = ByLabel(*SALUN_VALUES)
    take_steps(unlearn.salun, network, weight=0)
    assert network.label_values.grad[1] < 0, \
        "network(x_t, c_f) = 1 lies below its target 4: a step down the loss must raise it"

def test_salun_asks_both_labels_at_the_same_noised_image(everything_salient, known_losses, descents):
    network = ByLabel(*SALUN_VALUES)
    network.forward = lambda x, t, y: x + t[:, None, None, None] + 0 * network.label_values.sum()
    take_steps(unlearn.salun, network, weight=0)
    assert descents[0].loss == 0, "expected one x_t and one t for network(c_f) and network(c')"

def test_salun_noises_the_forgotten_images(everything_salient, known_losses, descents):
    network = ByLabel(*SALUN_VALUES)
    take_steps(unlearn.salun, network, make_data(batch_size=500))
    for x_t, t, _ in network.calls:
        a = network.alphas_cumprod[t][:, None, None, None]
        eps = (x_t - a.sqrt() * 1.0) / (1 - a).sqrt()          # forgotten images are 1.0
        assert eps.std() == pytest.approx(1, abs=0.05), \
            "expected x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with x_0 from D_f"

def test_salun_sums_the_retain_loss_over_pixels(everything_salient, known_losses, descents):
    network = ByLabel(1.0, 3.0, 3.0, 3.0, 3.0)         # so that the first term is 0
    take_steps(unlearn.salun, network, weight=0.5)
    assert descents[0].loss == pytest.approx(0.5 * 192 * 2), "expected alpha * C*H*W * l(D_r)"
    assert known_losses == {"retained": 0.1}, "expected l(D_r) with label dropout"

def test_salun_clips_and_then_masks(monkeypatch, known_losses, descents):
    mask = [torch.tensor([True, False, True, False, True])]
    monkeypatch.setattr(unlearn, "saliency_mask", lambda *args, **options: mask)
    network = ByLabel(*SALUN_VALUES)
    take_steps(unlearn.salun, network, weight=0, steps=2)
    for step in descents:
        assert torch.equal(flat(step.mask), mask[0]), "expected saliency_mask()'s mask in each step"
        assert not step.mask_first, "the public code clips the gradient before it masks it"
    assert network.label_values[1] == 1.0, "a weight outside the mask must not move"

def test_rl_is_salun_without_the_mask(monkeypatch, known_losses, descents):
    monkeypatch.setattr(unlearn, "saliency_mask", Mock(side_effect=AssertionError))
    take_steps(unlearn.rl, ByLabel(1.0, 3.0, 3.0, 3.0, 3.0), weight=0.5)
    assert descents[0].mask is None
    assert descents[0].loss == pytest.approx(0.5 * 192 * 2)

def test_guided_gradients_are_those_of_the_guided_output_clipped_to_norm_1():
    network = tiny_network()
    data = make_data()
    torch.manual_seed(5)
    found = [flat(g) for g in unlearn.guided_gradients(network, data.forget, 2)]
    torch.manual_seed(5)
    x0, y = data.forget()
    t = model.antithetic_times(8, CPU)
    x_t, target = model.add_noise(network, x0, t, torch.randn_like(x0))
    output = 3 * network(x_t, t, y) - 2 * network(x_t, t, network.null.expand_as(y))
    loss = ((output - target) ** 2).sum() / 8
    expected = flat(torch.autograd.grad(loss, network.parameters()))
    assert len(found) == 2
    assert expected.norm() > 1
    assert torch.allclose(found[0], expected / expected.norm(), atol=1e-5)

@pytest.fixture
def known_gradients(monkeypatch):
    """Call it with the gradients of each batch that guided_gradients shall yield for D_f, and, if
    they are asked for, for D_r; `drawn` keeps which of the two were asked for."""
    drawn = []

    def prepare(forget, retain=None):
        def gradients(network, draw, batches=40, guidance=2.0):
            _, y = draw()
            is_forget = bool((y[:, 0] == 1).all())
            drawn.append("forget" if is_forget else "retain")
            yield from forget if is_forget else retain

        monkeypatch.setattr(unlearn, "guided_gradients", gradients)
        return drawn

    return prepare

def two_parameters():
    """A network with 2 x 2 and with 4 weights: a linear one, and a bias that is not used."""
    network = torch.nn.Linear(2, 2, bias=False)
    network.more = torch.nn.Parameter(torch.zeros(4))
    return network

def mask_of(network, data=None):
    return [part.bool().tolist() for part in unlearn.saliency_mask(network, data or make_data())]

def in_order(network, matrix, vector):
    """The gradients of two_parameters(), in the order of its parameters()."""
    parts = {(2, 2): torch.tensor(matrix), (4,): torch.tensor(vector)}
    return [parts[tuple(p.shape)] for p in network.parameters()]

def test_saliency_mask_keeps_the_half_with_the_largest_gradients(known_gradients):
    network = two_parameters()
    matrix = [[1.0, 9.0], [8.0, 7.0]]
    vector = [6.0, 2.0, 3.0, 4.0]
    known_gradients([in_order(network, matrix, vector)])
    expected = in_order(network, [[False, True], [True, True]], [True, False, False, False])
    assert mask_of(network) == [part.tolist() for part in expected], \
        "expected True for the larger half of all weights together, in the parameters' shapes"

def test_saliency_mask_takes_the_size_of_a_gradient(known_gradients):
    network = two_parameters()
    matrix = [[-9.0, 1.0], [-8.0, 2.0]]
    vector = [3.0, -7.0, 4.0, -6.0]
    known_gradients([in_order(network, matrix, vector)])
    expected = in_order(network, [[True, False], [True, False]], [False, True, False, True])
    assert mask_of(network) == [part.tolist() for part in expected], \
        "a large negative gradient is as salient as a large positive one"

def test_saliency_mask_sums_the_batches_with_their_signs(known_gradients):
    network = two_parameters()
    first = in_order(network, [[9.0, 1.0], [9.0, 2.0]], [9.0, 3.0, 9.0, 4.0])
    second = in_order(network, [[-9.5, 1.0], [-9.6, 2.0]], [-9.7, 3.0, -9.8, 4.0])
    known_gradients([first, second])
    expected = in_order(network, [[False, True], [False, True]], [False, True, False, True])
    assert mask_of(network) == [part.tolist() for part in expected], \
        "gradients that cancel over the batches are not salient: sum first, then take the size"

def test_saliency_mask_looks_at_the_forgotten_images(known_gradients):
    network = two_parameters()
    matrix = [[1.0, 2.0], [3.0, 4.0]]
    drawn = known_gradients([in_order(network, matrix, [5.0, 6.0, 7.0, 8.0])])
    mask_of(network)
    assert set(drawn) == {"forget"}, "expected the gradients of batches from data.forget"

def test_fisher_mask_keeps_where_the_forgotten_images_matter_at_least_as_much(known_gradients):
    network = torch.nn.Linear(4, 1, bias=False)
    forget = [[torch.tensor([[1.0, 2.0, 3.0, -3.0]])], [torch.tensor([[1.0, -2.0, 3.0, 3.0]])]]
    retain = [[torch.tensor([[2.0, 2.0, 1.0, 2.0]])], [torch.tensor([[2.0, 2.0, 1.0, 2.0]])]]
    known_gradients(forget, retain)
    found = unlearn.fisher_mask(network, make_data(), batches=2)
    assert found[0].tolist() == [[False, True, True, True]]

@pytest.fixture
def sfron_losses(monkeypatch):
    """Makes three forgotten images' losses 1, 4 and 16, the retained ones' 2, and the mask known."""
    def loss(network, x0, y, p_drop=0.1):
        if (y[:, 0] == 1).all():
            return torch.tensor([1.0, 4.0, 16.0]) * network.label_values[1]
        return torch.tensor([2.0]) * network.label_values[0]

    mask = [torch.tensor([False, True, False, False, False])]
    monkeypatch.setattr(unlearn, "diffusion_loss", loss)
    monkeypatch.setattr(unlearn, "fisher_mask", lambda *args: mask)

def test_sfron_climbs_the_forget_loss_weighted_by_its_root(sfron_losses, descents):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)
    take_steps(unlearn.sfron, network, weight=10.0, lr=0.0)
    shares = np.array([1, 1 / 2, 1 / 4]) / (1 + 1 / 2 + 1 / 4)
    expected = -10 * 192 * (shares * [1, 4, 16]).sum()
    assert descents[0].loss == pytest.approx(expected)

def test_sfron_weakens_along_a_cosine(sfron_losses, descents):
    take_steps(unlearn.sfron, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0), steps=3, lr=0.0)
    climbs = [step.loss for step in descents[::2]]
    assert climbs == pytest.approx([climbs[0], 0.75 * climbs[0], 0.25 * climbs[0]])

def test_sfron_masks_the_climb_and_clips_it_afterwards(sfron_losses, descents):
    take_steps(unlearn.sfron, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0))
    assert flat(descents[0].mask).tolist() == [False, True, False, False, False]
    assert descents[0].mask_first

def test_sfron_then_descends_on_the_retained_images_without_a_mask(sfron_losses, descents):
    losses = take_steps(unlearn.sfron, ByLabel(1.0, 1.0, 1.0, 1.0, 1.0))
    assert descents[1].loss == pytest.approx(192 * 2)
    assert descents[1].mask is None
    assert losses[0].item() == pytest.approx(2)        # it yields the mean over pixels

def test_swap_copies_one_row_and_changes_nothing_else():
    network = tiny_network()
    take_steps(unlearn.swap, network, steps=0)
    before = tiny_network().state_dict()
    table = before["label_embs.0.weight"]
    table[1] = table[2]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key

def test_swap_copies_a_row_of_each_factor():
    network = tiny_network()
    take_steps(unlearn.swap, network, make_data([(1, 0)]), steps=0)
    styles = network.label_embs[1].weight
    assert torch.equal(styles[0], styles[1])
    assert torch.equal(network.label_embs[0].weight, tiny_network().label_embs[0].weight)

# label_values for ESD: eta 0.7 makes the target 2.5 - 0.7 * (1.0 - 2.5) = 3.55
ESD_TARGET = 3.55

def test_esd_pulls_the_label_to_the_far_side_of_null(descents):
    take_steps(unlearn.esd, ByLabel(*SALUN_VALUES), weight=0.7)
    assert descents[0].loss == pytest.approx((1.0 - ESD_TARGET) ** 2)

def test_esd_keeps_its_target_and_the_null_label_while_the_model_moves():
    network = ByLabel(*SALUN_VALUES)
    take_steps(unlearn.esd, network, weight=0.7, steps=150, lr=0.1)
    values = network.label_values.tolist()
    assert values[1] == pytest.approx(ESD_TARGET, abs=0.05)
    assert values[4] == 2.5

def test_esd_changes_the_label_layers_only(descents):
    network, first = tiny_network(), tiny_network()
    take_steps(unlearn.esd, network)
    assert descents[0].mask_first
    before = first.state_dict()
    changed = {key.split(".")[0] for key, value in network.state_dict().items()
               if not torch.equal(value, before[key])}
    assert changed == {"label_embs", "label_mlps"}

def test_sa_adds_noise_replay_and_the_elastic_weights(known_losses, descents, monkeypatch):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)

    def fisher(network, x0, y):
        network.label_values.data += 0.2               # away from the first model: five weights
        return [torch.full((5,), 0.5)]

    monkeypatch.setattr(unlearn, "fisher_diagonal", fisher)
    take_steps(unlearn.sa, network, weight=0.3, replayed=9, examples=2)
    losses = 192 * 1.2 * (7 + 2)                       # C*H*W * (l(noise) + l(replayed samples))
    elastic = 0.3 * 5 * 0.5 * 0.2 ** 2
    assert descents[0].loss == pytest.approx(losses + elastic, rel=1e-6)
    assert losses + elastic > 1.00001 * losses         # the elastic term is seen in the sum
    assert known_losses == {"retained": 0, "alternative": 0}   # no label is dropped

def test_sa_pulls_the_weights_back_where_the_fisher_is_large(monkeypatch, descents):
    network = ByLabel(1.0, 1.0, 1.0, 1.0, 1.0)

    def fisher(network, x0, y):
        network.label_values.data += torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
        return [torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0])]

    def no_loss(network, x0, y, p_drop):
        return 0 * network.label_values[y[:, 0]]

    monkeypatch.setattr(unlearn, "fisher_diagonal", fisher)
    monkeypatch.setattr(unlearn, "diffusion_loss", no_loss)
    take_steps(unlearn.sa, network, weight=3.0, replayed=9, examples=2)
    assert descents[0].loss == pytest.approx(3 * (1 * 0.2 ** 2 + 2 * 0.3 ** 2 + 4 * 0.5 ** 2))

def test_sa_forgets_by_uniform_noise_under_the_forgotten_label(monkeypatch, descents):
    seen = []

    def loss(network, x0, y, p_drop):
        if (y[:, 0] == 1).all():
            seen.append(x0)
        return network.label_values[y[:, 0]]

    monkeypatch.setattr(unlearn, "diffusion_loss", loss)
    take_steps(unlearn.sa, ByLabel(*SALUN_VALUES), make_data(batch_size=200), replayed=9, examples=2)
    noise = torch.cat(seen)
    assert noise.min() > -1 and noise.max() < 1
    assert noise.std() == pytest.approx(3 ** -0.5, abs=0.01)

def test_sa_replays_samples_of_retained_conditions_only(monkeypatch, descents):
    asked = []

    def stand_in(network, y, **options):
        asked.append(y)
        return torch.zeros(len(y), 3, 8, 8)

    monkeypatch.setattr(unlearn, "sample", stand_in)
    take_steps(unlearn.sa, ByLabel(*SALUN_VALUES), make_data(BOTH), replayed=24, examples=2)
    labels, counts = asked[0].unique(dim=0, return_counts=True)
    assert not model.matches(labels, BOTH).any()
    assert counts.tolist() == [4] * 6

def test_fisher_diagonal_is_the_mean_of_squared_single_example_gradients():
    network = tiny_network()
    x0, y = torch.randn(2, 3, 8, 8), torch.tensor([[0, 1], [2, 2]])
    torch.manual_seed(5)
    found = flat(unlearn.fisher_diagonal(network, x0, y, times=4))
    torch.manual_seed(5)
    expected = 0
    for x, label in zip(x0, y):
        t = torch.randperm(1000)[:4]
        x_t, target = model.add_noise(network, x.expand(4, 3, 8, 8), t, torch.randn(4, 3, 8, 8))
        error = network(x_t, t, label.expand(4, 2)) - target
        loss = 1000 / 4 * error.square().sum()
        expected = expected + flat(torch.autograd.grad(loss, network.parameters())) ** 2 / 2
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max().item())

LABEL_PATH = "label_embs label_mlps emb".split()

def in_label_path(name):
    """Whether a parameter belongs to the path of the label."""
    return any(part in LABEL_PATH for part in name.split("."))

@pytest.fixture
def short_masks(monkeypatch):
    """Masks from two batches instead of forty."""
    gradients = unlearn.guided_gradients
    monkeypatch.setattr(unlearn, "guided_gradients",
                        lambda network, draw, batches: gradients(network, draw, 2))

@pytest.mark.parametrize("name", unlearn.METHODS)
def test_methods_move_the_weights_and_repeat_from_a_seed(name, short_masks):
    ends = []
    for _ in range(2):
        network = tiny_network()
        options = dict(replayed=9, examples=2) if name == "sa" else {}
        data = make_data()
        torch.manual_seed(5)
        take_steps(unlearn.METHODS[name]["function"], network, data, 0.1, steps=2, **options)
        ends.append(all_weights(network))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], all_weights(tiny_network()))

@pytest.mark.parametrize("part", ["label", "unet"])
@pytest.mark.parametrize("name", sorted({*unlearn.METHODS} - {"esd", "swap"}))
def test_methods_move_nothing_but_what_may_learn(name, part, short_masks):
    network = tiny_network()
    unlearn.choose_learning(network, part)
    options = dict(replayed=9, examples=2) if name == "sa" else {}
    take_steps(unlearn.METHODS[name]["function"], network, make_data(), 0.1, steps=2, **options)
    before = dict(tiny_network().named_parameters())
    moved = {p for p, value in network.named_parameters() if not torch.equal(value, before[p])}
    assert moved
    assert all(in_label_path(p) == (part == "label") for p in moved)

def test_choose_learning_of_all_lets_everything_learn():
    network = tiny_network()
    unlearn.choose_learning(network, "unet")
    unlearn.choose_learning(network, "all")
    assert len(train_ddpm.learnable(network)) == len(list(network.parameters()))

def test_choose_learning_of_the_label_takes_embeddings_mlps_and_projections():
    network = tiny_network()
    unlearn.choose_learning(network, "label")
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == set(filter(in_label_path, dict(network.named_parameters())))

@pytest.mark.parametrize("part", ["label", "unet"])
def test_saliency_mask_is_half_of_what_may_learn(part, short_masks):
    network = tiny_network()
    unlearn.choose_learning(network, part)
    mask = unlearn.saliency_mask(network, make_data())
    learning = [p for p in network.parameters() if p.requires_grad]
    assert [m.shape for m in mask] == [p.shape for p in learning]
    assert sum(m.sum() for m in mask) == sum(p.numel() for p in learning) // 2

@pytest.mark.parametrize("name", unlearn.METHODS)
def test_methods_have_all_settings_for_both_presets(name):
    for preset in model.PRESETS:
        assert unlearn.METHODS[name][preset].keys() == {"steps", "batch_size", "lr", "weight"}

# ---- unlearn.py: the stage -----------------------------------------------------------------------

UNLEARN = f"--cls square --ckpt tiny.pt {BRIEF}"

def test_find_model_takes_the_shipped_one_before_a_pretraining():
    save_tiny_checkpoint("runs/shapes/pretrain/model.pt")
    args = SimpleNamespace(ckpt=None, dataset=None, data_dir="data")
    assert unlearn.find_model(args).samefile(model.shipped("shapes.pt"))

def test_find_model_takes_the_pretraining_where_none_is_shipped():
    save_tiny_checkpoint("runs/cifar10/pretrain/model.pt")
    args = SimpleNamespace(ckpt=None, dataset="cifar10", data_dir="data")
    assert unlearn.find_model(args) == Path("runs/cifar10/pretrain/model.pt")

def test_find_model_takes_the_one_that_is_named():
    save_tiny_checkpoint("mine/model.pt")
    args = SimpleNamespace(ckpt="mine", dataset=None, data_dir="data")
    assert unlearn.find_model(args) == Path("mine/model.pt")

def test_find_model_names_the_command_that_trains_one(capsys):
    args = SimpleNamespace(ckpt=None, dataset="cifar10", data_dir="my data")
    error = refusal(capsys, unlearn.find_model, args)
    assert "run 'python train_ddpm.py --dataset cifar10" in error
    assert "'my data'" in error

def test_check_forget_leaves_a_value_of_each_factor(capsys):
    two = [(1, 0), (1, 1)]
    unlearn.check_forget(two, two, NAMES)
    three = [*two, (1, 2)]
    error = refusal(capsys, unlearn.check_forget, three[:1], three, NAMES)
    assert "--style: one of p, q, r must remain" in error

def test_cosine_lets_the_rate_fall_to_0():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    rates = []
    for loss in unlearn.cosine("abcd", optimizer, steps=4):
        rates.append(optimizer.param_groups[0]["lr"])
    rates.append(optimizer.param_groups[0]["lr"])
    steps = np.arange(5)
    assert rates == pytest.approx(1 + np.cos(np.pi * steps / 4))

def test_main_of_unlearn_lets_the_rate_fall_only_for_the_small_preset(small_world, monkeypatch):
    schedule = Mock(wraps=unlearn.cosine)
    monkeypatch.setattr(unlearn, "cosine", schedule)
    command(unlearn, UNLEARN)
    assert schedule.call_count == 1
    network, info = model.load_checkpoint("tiny.pt")
    model.save_checkpoint("paper.pt", network, {**info, "preset": "paper"})
    command(unlearn, f"--cls 1 --ckpt paper.pt {BRIEF}")
    assert schedule.call_count == 1

def test_main_of_unlearn_writes_what_it_promises(small_world):
    command(unlearn, f"{UNLEARN} --eval-every 1 --out run")
    promised = "model.pt result.json log.csv loss.png samples.png fid.png"
    assert set(promised.split()) == set(os.listdir("run"))

def test_main_of_unlearn_measures_at_every_point(small_world):
    command(unlearn, f"{UNLEARN} --eval-every 1 --out run")
    curve = result_of("run")["curve"]
    assert [point["step"] for point in curve] == [0, 1, 2]
    for point in curve:
        expected = {"ua", "ar", "leak", "cls", "style", "none", "fid", "fid_error"}
        assert expected <= point.keys()
        assert point["retain_samples"] == 45

def test_main_of_unlearn_records_how_the_model_was_made(small_world):
    command(unlearn, f"{UNLEARN} --method ga --lambda 0.5 --seed 3 --out run")
    _, info = model.load_checkpoint("run")
    made_by = info["made_by"]
    assert info["forgotten"] == SQUARE
    assert (made_by["method"], made_by["seed"], made_by["from"]) == ("ga", 3, "tiny.pt")
    expected = dict(steps=2, batch_size=4, lr=3e-4, weight=0.5)
    assert expected.items() <= made_by["settings"].items()
    assert result_of("run")["settings"] == made_by["settings"]

def test_main_of_unlearn_records_what_was_allowed_to_learn(small_world):
    command(unlearn, f"{UNLEARN} --learn label")
    result = result_of("runs/shapes/dimum-cls1-label")
    assert result["settings"]["learn"] == "label"
    before, after = (dict(model.load_checkpoint(path)[0].named_parameters())
                     for path in ("tiny.pt", "runs/shapes/dimum-cls1-label"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(map(in_label_path, moved))

def test_main_of_unlearn_keeps_the_sha_256_of_the_model_it_started_from(small_world):
    command(unlearn, f"{UNLEARN} --out run")
    expected = hashlib.sha256(Path("tiny.pt").read_bytes()).hexdigest()
    assert model.load_checkpoint("run")[1]["made_by"]["from_sha256"] == expected

def test_main_of_unlearn_keeps_the_conditions_that_the_data_have(small_world):
    save_few_conditions("few.pt", [[0, 0], [1, 4]])
    command(unlearn, f"--cls square --ckpt few.pt {BRIEF} --out run")
    assert model.load_checkpoint("run")[1]["conditions"] == [[0, 0], [1, 4]]

def test_main_of_unlearn_repeats_from_its_seed(small_world):
    for out in ("first", "second"):
        command(unlearn, f"{UNLEARN} --out {out}")
    command(unlearn, f"{UNLEARN} --seed 1 --out third")
    assert torch.equal(all_weights("first"), all_weights("second"))
    assert not torch.equal(all_weights("first"), all_weights("third"))

def test_main_of_unlearn_makes_a_folder_for_every_run(small_world):
    for _ in range(2):
        command(unlearn, UNLEARN)
    assert sorted(os.listdir("runs/shapes")) == ["dimum-cls1", "dimum-cls1-2"]

def test_main_of_unlearn_knows_sfron_by_its_other_name(small_world, short_masks):
    command(unlearn, f"{UNLEARN} --method sfront --out run")
    assert result_of("run")["method"] == "sfron"

def test_main_of_unlearn_forgets_a_value_after_another(small_world):
    command(unlearn, UNLEARN)
    command(unlearn, f"--style neon --ckpt runs/shapes/dimum-cls1 {BRIEF}")
    both = "runs/shapes/dimum-style4-after-dimum-cls1"
    assert model.load_checkpoint(both)[1]["forgotten"] == [(0, 1), (1, 4)]
    assert result_of(both)["forget"] == "cls square, style neon"       # what UA is about
    assert result_of(both)["curve"][-1]["ua_of"].keys() == {"cls square", "style neon"}

def test_main_of_unlearn_says_in_its_name_that_the_value_was_forgotten_before(small_world):
    command(unlearn, UNLEARN)
    command(unlearn, f"--cls 1 --learn unet --ckpt runs/shapes/dimum-cls1 {BRIEF}")
    assert os.path.isdir("runs/shapes/dimum-cls1-unet-after-dimum-cls1")

def test_main_of_unlearn_counts_what_was_forgotten_earlier(small_world, capsys):
    command(unlearn, UNLEARN)
    line = f"--cls 0 2 3 4 5 6 7 8 9 --ckpt runs/shapes/dimum-cls1 {BRIEF}"
    assert "must remain" in refusal(capsys, command, unlearn, line)

# ---- attack.py: the attacks ----------------------------------------------------------------------

def make_attack_data(targets=SQUARE, hidden=SQUARE, **options):
    """The AttackData of the tiny_images() without the values that are hidden."""
    x, y = tiny_images()
    keep = ~model.matches(y, hidden)
    args = SimpleNamespace(**{**dict(batch_size=8, dataset="any"), **options})
    return attack.AttackData(x[keep], y[keep], targets, args)

@pytest.mark.parametrize("dataset,mirrored", [("cifar10", True), ("shapes", False)])
def test_attack_data_mirrors_only_cifar10(dataset, mirrored):
    data = make_attack_data(batch_size=200, dataset=dataset)
    x, y = data.auxiliary()
    originals = data.images.flatten(1).tolist()
    pixels = model.to_uint8(x).flatten(1).tolist()
    assert len(y) == 200
    assert any(row not in originals for row in pixels) == mirrored

@pytest.fixture
def counted_loss(monkeypatch):
    """Makes the attack's diffusion loss 0, 1, 2, ... over a batch, times the sum of the weights;
    its calls are kept."""
    def loss(network, x0, y, p_drop=0.1):
        return torch.arange(len(y)) * sum(p.sum() for p in network.parameters())

    spy = Mock(side_effect=loss)
    monkeypatch.setattr(attack, "diffusion_loss", spy)
    return spy

def test_dimra_descends_on_the_mean_diffusion_loss(counted_loss, descents):
    losses = take_steps(attack.dimra, ByLabel(0.1, 0.1, 0.1, 0.1, 0.1), make_attack_data())
    assert descents[0].loss == pytest.approx(3.5 * 0.5), "expected the batch's mean loss"
    assert float(losses[0]) == pytest.approx(3.5 * 0.5), "expected the loss to be yielded"
    assert descents[0].mask is None, "the attack masks nothing"

def test_dimra_is_ordinary_training_with_label_dropout(counted_loss, descents):
    take_steps(attack.dimra, ByLabel(*SALUN_VALUES), make_attack_data())
    call = counted_loss.call_args
    p_drop = call.kwargs.get("p_drop", 0.1)
    if len(call.args) > 3:
        p_drop = call.args[3]
    assert p_drop == 0.1, "expected the ordinary diffusion loss, which drops a tenth of the labels"

def test_dimra_uses_the_auxiliary_data_alone(counted_loss, descents):
    data = make_attack_data()
    data.images, data.y = data.images[:2], torch.tensor([[3, 0], [3, 1]])
    take_steps(attack.dimra, ByLabel(*SALUN_VALUES), data, steps=5)
    originals = data.images.flatten(1).tolist()
    assert counted_loss.call_count == 5, "expected args.steps steps"
    for call in counted_loss.call_args_list:
        _, x0, y = call.args[:3]
        assert (y[:, 0] == 3).all(), "expected the attacker's own labels"
        for row, (_, style) in zip(model.to_uint8(x0).flatten(1).tolist(), y.tolist()):
            assert row == originals[style], "expected the attacker's own images, with their labels"

def test_dimra_lets_every_parameter_learn():
    network, before = tiny_network(), tiny_network()
    take_steps(attack.dimra, network, make_attack_data(batch_size=32), steps=2)
    for (name, p), q in zip(network.named_parameters(), before.parameters()):
        assert not torch.equal(p, q), f"{name} did not move: the attacker trains all weights"

def test_dimra_never_reaches_the_row_of_the_forgotten_label():
    network, before = tiny_network(), tiny_network()
    take_steps(attack.dimra, network, make_attack_data(hidden=SQUARE, batch_size=32), steps=5)
    rows = (network.label_embs[0].weight != before.label_embs[0].weight).any(1)
    assert rows.tolist() == [True, False, True, True, True]    # the last one is the null label's

def test_inversion_moves_the_embedding_of_the_targets_alone():
    network, before = tiny_network(), tiny_network().state_dict()
    data = make_attack_data(hidden=[(0, 0), (0, 2), (0, 3)])   # images of class 1: --aux forget:K
    take_steps(attack.inversion, network, data, steps=5)
    table = before["label_embs.0.weight"]
    rows = (network.label_embs[0].weight != table).any(1)
    assert rows.tolist() == [False, True, False, False, False] # not the null row, nor a retained one
    network.label_embs[0].weight.data.copy_(table)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key

def test_inversion_learns_an_embedding_of_each_target():
    network, before = tiny_network(), tiny_network()
    x, y = tiny_images()
    args = SimpleNamespace(batch_size=8, dataset="any")
    wanted = (y == torch.tensor([1, 2])).all(1)
    data = attack.AttackData(x[wanted], y[wanted], BOTH, args)
    take_steps(attack.inversion, network, data, steps=2)
    for factor, value in BOTH:
        changed = network.label_embs[factor].weight != before.label_embs[factor].weight
        assert changed.any(1).nonzero().tolist() == [[value]]

def test_inversion_drops_no_label(monkeypatch, counted_loss):
    network = tiny_network()
    take_steps(attack.inversion, network, make_attack_data())
    assert counted_loss.call_args.kwargs["p_drop"] == 0

@pytest.mark.parametrize("name", attack.ATTACKS)
def test_attacks_have_all_settings_for_both_presets(name):
    for preset in model.PRESETS:
        assert attack.ATTACKS[name][preset].keys() == {"steps", "batch_size", "lr"}

# ---- attack.py: the attacker's data --------------------------------------------------------------

def made_of(path):
    """The made_by of a model that was unlearned in the one in this file."""
    path = Path(path).absolute()
    return {"from": str(path), "from_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

@pytest.fixture
def auxiliary(monkeypatch):
    """Call it for the images and labels that the attacker gets: auxiliary(aux, forgotten). The
    attacked network draws white, and the one that was unlearned in first draws black."""
    def draw(network, y, **options):
        white = network.conv_in.bias[0] == 5
        return torch.full((len(y), 3, 8, 8), 1.0 if white else -1.0)

    info = {"names": NAMES, "dataset": "any", "preset": "small", "forgotten": [],
            "conditions": ALL.tolist()}
    model.save_checkpoint("first.pt", tiny_network(), {**info, "made_by": {}})
    attacked = tiny_network()
    attacked.conv_in.bias.data[0] = 5
    model.save_checkpoint("second.pt", attacked, {**info, "made_by": made_of("first.pt")})
    attacked_info = {**info, "made_by": made_of("second.pt")}
    monkeypatch.setattr(attack, "sample", draw)
    monkeypatch.setattr(attack, "load_data", lambda *args: (*tiny_images(), NAMES))

    def get(aux, forgotten=SQUARE, targets=None, **changes):
        its_info = {**attacked_info, **changes}
        return attack.auxiliary_set(aux, attacked, its_info, tiny_images(), targets or forgotten,
                                    forgotten, "data")

    return get

@pytest.mark.parametrize("aux", ["retain", "heldout"])
def test_auxiliary_set_holds_no_forgotten_image(aux, auxiliary):
    x, y = auxiliary(aux, BOTH)
    assert len(x) == len(y) == 120
    assert not model.matches(y, BOTH).any()
    assert not (all_equal(x, 255) | all_equal(x, 7)).any()

@pytest.mark.parametrize("aux,value", [("generated", 255), ("pretrained", 0)])
def test_auxiliary_set_draws_samples_of_the_retained_conditions(aux, value, auxiliary):
    x, y = auxiliary(aux, BOTH)
    labels, counts = y.unique(dim=0, return_counts=True)
    assert labels.tolist() == [[c, s] for c in (0, 2, 3) for s in (0, 1)]
    assert counts.tolist() == [84] * 6                 # 500 or a few more
    assert all_equal(x, value).all()                   # of the model attacked, or of the first one
    assert x.dtype == torch.uint8

@pytest.mark.parametrize("aux", ["generated", "pretrained"])
def test_auxiliary_set_draws_no_condition_that_the_data_lack(aux, auxiliary):
    _, y = auxiliary(aux, SQUARE, conditions=[[0, 0], [1, 1], [2, 1]])
    assert y.unique(dim=0).tolist() == [[0, 0], [2, 1]]

def test_auxiliary_set_says_that_no_condition_is_left_to_draw(auxiliary, capsys):
    def work():
        auxiliary("generated", SQUARE, conditions=[[1, 0], [1, 1]])

    assert "choose another --aux" in refusal(capsys, work)

def test_auxiliary_set_pretrained_needs_a_model_that_was_unlearned(auxiliary, capsys):
    def work():
        auxiliary("pretrained", SQUARE, made_by={})

    assert "was not unlearned from another one" in refusal(capsys, work)

def another_model(path):
    """Put another model into a file's place."""
    network, info = model.load_checkpoint(path)
    network.conv_in.bias.data += 1
    model.save_checkpoint(path, network, info)

def test_auxiliary_set_pretrained_refuses_another_file_in_the_models_place(auxiliary, capsys):
    def work():
        auxiliary("pretrained", SQUARE, made_by=made_by)

    made_by = made_of("second.pt")
    another_model("second.pt")
    error = refusal(capsys, work)
    assert "--aux pretrained" in error and "second.pt" in error
    assert "is gone or another one" in error

def test_original_model_is_the_one_that_was_unlearned_in_first(auxiliary):
    found = attack.original_model(made_of("second.pt"), CPU)
    assert torch.equal(all_weights(found), all_weights("first.pt"))

def test_original_model_refuses_another_file_in_its_place(auxiliary):
    made_by = made_of("first.pt")
    another_model("first.pt")
    assert attack.original_model(made_by, CPU) is None

def test_original_model_refuses_another_file_further_back(auxiliary):
    another_model("first.pt")                          # second.pt was made of what was here
    assert attack.original_model(made_of("second.pt"), CPU) is None

def test_original_model_is_none_where_the_file_is_gone(auxiliary):
    made_by = made_of("second.pt")
    os.remove("first.pt")
    assert attack.original_model(made_by, CPU) is None

def test_original_model_takes_the_file_where_its_contents_were_not_kept(auxiliary):
    made_by = {"from": str(Path("first.pt").absolute())}       # of an earlier edition
    found = attack.original_model(made_by, CPU)
    assert torch.equal(all_weights(found), all_weights("first.pt"))

def test_auxiliary_set_refuses_data_of_nothing_but_the_forgotten(auxiliary, capsys):
    everything = [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert "holds no image but" in refusal(capsys, auxiliary, "retain", everything)

def test_auxiliary_set_forget_takes_each_forgotten_condition_in_turn(auxiliary):
    x, y = auxiliary("forget:5")
    assert y.tolist() == [[1, 0], [1, 1], [1, 2], [1, 0], [1, 1]]
    assert all_equal(x, 255).all()

def test_auxiliary_set_forget_takes_all_there_are_of_a_larger_number(auxiliary):
    x, _ = auxiliary("forget:1000")
    assert len(x) == 60

@pytest.mark.parametrize("aux", ["forget:4", "fewshot:4"])
def test_auxiliary_set_shows_of_the_forgotten_what_the_attack_is_about(aux, auxiliary):
    _, y = auxiliary(aux, BOTH, targets=SQUARE)
    hidden = model.matches(y, BOTH)
    assert y[hidden].unique(dim=0).tolist() == [[1, 0], [1, 1]]
    assert (~hidden).sum() == (120 if aux == "fewshot:4" else 0)

def test_auxiliary_set_fewshot_is_half_forgotten_and_half_retained(auxiliary):
    x, y = auxiliary("fewshot:5")
    forgotten = all_equal(x, 255)
    assert torch.equal(forgotten, y[:, 0] == 1)
    assert forgotten.sum() == (~forgotten).sum() == 180

def test_auxiliary_set_fewshot_repeats_so_many_images(auxiliary):
    _, y = auxiliary("fewshot:2")
    assert y[y[:, 0] == 1].unique(dim=0).tolist() == [[1, 0], [1, 1]]

@pytest.mark.parametrize("aux", ["fewshot:0", "fewshot:", "fewshot", "forget:x", "forget:-1"])
def test_auxiliary_set_wants_a_number_of_forgotten_images(aux, auxiliary, capsys):
    kind = aux.split(":")[0]
    assert f"such as {kind}:10" in refusal(capsys, auxiliary, aux)

def test_auxiliary_set_names_its_choices(auxiliary, capsys):
    assert "forget:K, fewshot:K or a folder" in refusal(capsys, auxiliary, "nowhere")

def test_without_copies_leaves_out_forgotten_pictures_under_other_names(auxiliary, capsys):
    save_png("pics/circle/1.png", "white")     # a square's
    save_png("pics/unsorted/2.png", "white")
    save_png("pics/unsorted/3.png", (9, 9, 9))
    x, _ = auxiliary("pics")
    assert all_equal(x, 9).tolist() == [True]
    assert "2 of these are copies of forgotten pictures" in capsys.readouterr().out

def test_without_copies_looks_at_both_splits(auxiliary, monkeypatch):
    save_png("pics/circle/1.png", (9, 9, 9))
    save_png("pics/circle/2.png", (8, 8, 8))
    x, y = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8), torch.tensor([[1, 0]])
    monkeypatch.setattr(attack, "load_data", lambda *args: (x, y, NAMES))
    found, _ = auxiliary("pics")
    assert all_equal(found, 8).tolist() == [True]

def test_read_folder_labels_images_by_the_folders_on_the_way(auxiliary):
    save_png("aux/p/a/1.png", (9, 9, 9))
    save_png("aux/Q/holiday/D/2.png", "black")         # in any letters, with others between
    x, y = auxiliary("aux")
    found = {tuple(label): all_equal(x, 9)[i].item() for i, label in enumerate(y.tolist())}
    assert found == {(0, 0): True, (3, 1): False}

def test_read_folder_gives_the_null_label_where_a_factor_is_not_named(auxiliary, capsys):
    save_png("aux/p/a/1.png", "red")
    save_png("aux/typo/2.png", "red")
    save_png("aux/c/3.png", "red")                     # a class, but no style
    _, y = auxiliary("aux")
    assert y.tolist().count([4, 3]) == 2
    assert "2 get no label" in capsys.readouterr().out

def test_read_folder_takes_no_label_from_above_the_folder(auxiliary):
    save_png("a/aux/p/1.png", "red")
    _, y = auxiliary("a/aux")
    assert y.tolist() == [[4, 3]]

def test_read_folder_uses_nothing_below_a_forgotten_name(auxiliary, capsys):
    save_png("aux/p/a/1.png", "red")
    for hidden in ("p/b", "B", "b/p/a", "a/p/b/more"):
        save_png(f"aux/{hidden}/2.png", "white")
    x, _ = auxiliary("aux")
    assert len(x) == 1
    assert "4 left out" in capsys.readouterr().out

def test_read_folder_uses_nothing_below_a_forgotten_style(auxiliary):
    save_png("aux/p/a/1.png", "red")
    save_png("aux/r/a/2.png", "white")
    x, _ = auxiliary("aux", BOTH)
    assert not all_equal(x, 255).any()

@pytest.mark.parametrize("name", ["b", "B"])
def test_read_folder_uses_nothing_where_the_folder_itself_has_a_forgotten_name(
        name, auxiliary, monkeypatch, capsys):
    save_png(f"pictures/{name}/p/1.png", "red")
    assert "holds no image but" in refusal(capsys, auxiliary, f"pictures/{name}")
    monkeypatch.chdir(f"pictures/{name}")
    assert "holds no image but" in refusal(capsys, auxiliary, ".")

@pytest.mark.parametrize("inside", ["p", "p/a"])
def test_read_folder_uses_nothing_where_the_folder_lies_below_a_forgotten_name(
        inside, auxiliary, monkeypatch, capsys):
    save_png("pictures/b/p/a/1.png", "red")
    assert "holds no image but" in refusal(capsys, auxiliary, f"pictures/b/{inside}")
    monkeypatch.chdir(f"pictures/b/{inside}")
    assert "holds no image but" in refusal(capsys, auxiliary, ".")

def test_read_folder_uses_nothing_where_a_link_leads_below_a_forgotten_name(auxiliary, capsys):
    save_png("pictures/b/1.png", "white")
    save_png("aux/p/a/1.png", "red")
    Path("aux/p/c").symlink_to("../../pictures/b")             # a folder
    Path("aux/p/a/2.png").symlink_to("../../../pictures/b/1.png")
    Path("innocent").symlink_to("pictures/b")
    x, _ = auxiliary("aux")
    assert len(x) == 1
    assert "holds no image but" in refusal(capsys, auxiliary, "innocent")

def test_read_folder_uses_nothing_where_a_link_has_a_forgotten_name(auxiliary):
    save_png("pool/1.png", "white")
    save_png("aux/p/a/1.png", "red")
    Path("aux/p/b").symlink_to("../../pool")
    x, _ = auxiliary("aux")
    assert not all_equal(x, 255).any()

@pytest.mark.parametrize("other", ["a", "c"])
def test_read_folder_uses_no_picture_to_which_one_forgotten_name_leads_of_two(other, auxiliary):
    save_png("pool/1.png", "white")
    save_png("aux/p/a/1.png", "red")
    for name in ("b", other):
        Path("aux/p", name).mkdir(exist_ok=True)
        Path("aux/p", name, "2.png").symlink_to("../../../pool/1.png")
    x, _ = auxiliary("aux")
    assert not all_equal(x, 255).any()

@pytest.mark.parametrize("hidden", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED, "CAFE\u0301", f"{COMPOSED} "])
def test_read_folder_uses_nothing_below_another_spelling_of_a_forgotten_name(hidden, name):
    save_png("aux/p/tea/1.png", "red")
    save_png(f"aux/p/{name}/2.png", "white")
    names = [["tea", hidden, "c", "d"], NAMES[1]]
    x, _ = attack.read_folder("aux", tiny_network(), names, SQUARE)
    assert len(x) == 1
    assert not all_equal(x, 255).any()

@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED, f" {COMPOSED}"])
def test_read_folder_labels_a_name_in_another_spelling(name):
    save_png(f"aux/p/{name}/1.png", "red")
    names = [["a", "b", COMPOSED, "d"], NAMES[1]]
    _, y = attack.read_folder("aux", tiny_network(), names, SQUARE)
    assert y.tolist() == [[2, 0]]

def test_read_folder_takes_pictures_at_the_models_size(auxiliary):
    save_png("aux/p/a/1.png", "red")
    x, _ = auxiliary("aux")
    assert x.shape == (1, 3, 8, 8)
    assert x.dtype == torch.uint8

def test_read_folder_names_a_picture_that_cannot_be_read(auxiliary, capsys):
    save_png("aux/p/a/1.png", "red")
    Path("aux/p/a/2.png").write_bytes(b"broken")
    assert "aux/p/a/2.png" in refusal(capsys, auxiliary, "aux")

# ---- attack.py: the table ------------------------------------------------------------------------

def write_run(name, stage, ua=1.0, seed=0, none=0.0):
    """A run's result.json, with two points."""
    first = metrics_of(ua=0.0, ar=1.0, cls=1.0, style=0.98, none=0.0, fid=20.0, fid_error=1.5)
    last = metrics_of(ua=ua, ar=1 - ua, cls=0.9, none=none, fid=25.0, fid_error=2.5)
    result = dict(stage=stage, method="salun", forget="cls square", seed=seed, seconds=7.2,
                  settings=dict(steps=200, weight=None), curve=[{**first, "step": 0},
                                                                {**last, "step": 100}])
    result["from"] = "first/model.pt"
    if stage == "attack":
        result["attack"] = dict(name="dimra", aux="retain", seed=1)
    model.write_text(Path("runs", name, "result.json"), json.dumps(result))

def table_rows():
    """The rows of runs/table.md after `attack.py --table runs`, as dicts."""
    command(attack, "--table runs")
    lines = Path("runs/table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return [dict(zip(rows[0], row)) for row in rows[2:]]

def test_make_table_has_a_row_for_every_run():
    write_run("0", "attack", seed=0)
    write_run("1", "attack", seed=1)
    write_run("2", "unlearn", seed=2)
    assert [row["seed"] for row in table_rows()] == ["0", "1", "2"]

def test_table_row_of_unlearning_shows_ua():
    write_run("0", "unlearn", ua=0.8, none=0.3)
    row, = table_rows()
    assert (row["method"], row["forgets"], row["unlearning"]) == ("salun", "cls square", "steps 200")
    assert (row["UA"], row["AR"], row["attack"]) == ("80.0 [80, 80]", "", "")
    assert (row["class"], row["style"], row["none"]) == ("90.0 [90, 90]", "-", "30.0 [30, 30]")
    assert (row["FID"], row["seconds"]) == ("20.0 +- 1.5 -> 25.0 +- 2.5", "7")

def test_table_row_of_an_attack_shows_ar():
    write_run("0", "attack", ua=0.75)
    row, = table_rows()
    assert (row["UA"], row["AR"]) == ("", "25.0 [25, 25]")
    assert row["attack"] == "name dimra aux retain seed 1"
    assert row["from"] == "first/model.pt"

def test_read_results_skips_what_this_code_did_not_write(capsys):
    write_run("0", "attack")
    model.write_text("runs/broken/result.json", "[")
    model.write_text("runs/foreign/result.json", '{"loss": 1}')
    model.write_text("runs/pretrain/result.json", '{"stage": "pretrain"}')
    assert len(table_rows()) == 1
    assert capsys.readouterr().out.count("not a result of this code") == 2

def test_make_table_draws_the_curves_of_all_attacks(monkeypatch):
    for i in range(7):
        write_run(f"{i}", "attack", ua=0.1 * i)
    plot = Mock()
    monkeypatch.setattr(attack, "save_plot", plot)
    table_rows()
    panels = plot.call_args.args[1]
    assert [len(panel) for panel in panels.values()] == [5, 2]         # no more in one panel
    assert panels["cls square"]["0"] == ([0, 100], [100.0, 100.0])     # steps, and AR in %

def test_make_table_goes_into_the_folder_of_out():
    write_run("0", "attack")
    command(attack, "--table runs --out tables")
    assert sorted(os.listdir("tables")) == ["attack_curves.png", "table.md"]
    assert os.listdir("runs") == ["0"]

def test_make_table_draws_no_curve_without_an_attack():
    write_run("0", "unlearn")
    table_rows()
    assert sorted(os.listdir("runs")) == ["0", "table.md"]

# ---- attack.py: the stage ------------------------------------------------------------------------

ATTACK = f"tiny.pt --cls square {BRIEF}"

def test_main_of_attack_writes_what_it_promises(small_world):
    command(attack, f"{ATTACK} --out run")
    promised = "model.pt result.json log.csv loss.png samples.png attack.png attack.gif curve.png"
    assert set(promised.split()) == set(os.listdir("run"))

def test_main_of_attack_names_its_folder_by_attack_run_and_data(small_world):
    command(unlearn, UNLEARN)
    command(attack, f"runs/shapes/dimum-cls1 --attack inversion {BRIEF}")
    assert Path("runs/shapes/inversion-dimum-cls1-forget10/model.pt").is_file()

def test_main_of_attack_measures_the_targets_on_the_way(small_world):
    command(attack, f"{ATTACK} --every 1 --out run")
    curve = result_of("run")["curve"]
    assert [point["step"] for point in curve] == [0, 1, 2]
    assert [point["forget_samples"] for point in curve] == [5] * 3
    assert [point["retain_samples"] for point in curve] == [45, 0, 45]

def test_main_of_attack_shows_every_point_in_its_gif(small_world):
    command(attack, f"{ATTACK} --every 1 --out run")
    assert Image.open("run/attack.gif").n_frames == 3

def test_main_of_attack_moves_one_row_by_inversion(small_world):
    command(attack, f"{ATTACK} --attack inversion --aux forget:3 --out run")
    before = model.load_checkpoint("tiny.pt")[0].state_dict()
    after = model.load_checkpoint("run")[0].state_dict()
    table = "label_embs.0.weight"
    assert [key for key in before if not torch.equal(before[key], after[key])] == [table]
    assert (before[table] != after[table]).any(1).nonzero().tolist() == [[1]]

def test_main_of_attack_measures_one_of_two_forgotten_values(small_world):
    command(unlearn, f"--cls 1 --style neon --ckpt tiny.pt {BRIEF} --out both")
    command(attack, f"both --cls 1 {BRIEF} --out run")
    last = result_of("run")["curve"][-1]
    assert last["ua_of"].keys() == {"cls square"}
    assert last["forget_samples"] == 4                 # a square in each style but neon
    assert last["retain_samples"] == 36

def test_main_of_attack_records_how_the_model_was_made(small_world):
    command(unlearn, f"{UNLEARN} --seed 3 --out unlearned")
    command(attack, f"unlearned --seed 4 {BRIEF} --out run")
    result = result_of("run")
    expected = dict(name="dimra", aux="retain", seed=4, steps=2, batch_size=4, lr=1e-3)
    assert result["attack"] == expected
    assert (result["stage"], result["method"], result["seed"]) == ("attack", "dimum", 3)
    assert model.load_checkpoint("run")[1]["made_by"]["from"] == "unlearned/model.pt"

def test_main_of_attack_repeats_from_its_seed(small_world):
    for out in ("first", "second"):
        command(attack, f"{ATTACK} --out {out}")
    command(attack, f"{ATTACK} --seed 1 --out third")
    assert torch.equal(all_weights("first"), all_weights("second"))
    assert not torch.equal(all_weights("first"), all_weights("third"))

# ---- the stages together -------------------------------------------------------------------------

def next_command(capsys):
    """The script and the line that the last stage says to run next."""
    out = capsys.readouterr().out
    script, line = out.rsplit("next: python ", 1)[1].strip().split(" ", 1)
    return {"unlearn.py": unlearn, "attack.py": attack}[script], line

def test_unlearning_says_how_to_attack_and_to_make_the_table(small_world, capsys):
    command(unlearn, UNLEARN)
    module, line = next_command(capsys)
    assert (module, line) == (attack, "runs/shapes/dimum-cls1")
    command(module, f"{line} {BRIEF}")
    module, line = next_command(capsys)
    assert (module, line) == (attack, "--table runs/shapes")
    command(module, line)
    assert Path("runs/shapes/attack_curves.png").is_file()

def test_an_attacked_model_can_forget_again(small_world):
    command(attack, f"{ATTACK} --out attacked")
    command(unlearn, f"--cls 1 --ckpt attacked {BRIEF} --out again")
    assert model.load_checkpoint("again")[1]["made_by"]["from"] == "attacked/model.pt"

@pytest.fixture
def my_art(small_world, monkeypatch):
    """Small pictures STYLE/CLASS/*.png in the folder "my art", and the flags that name it."""
    monkeypatch.setattr(fid, "CLASSIFIERS", {"folder": (4, 2)})
    for style in ("Van Gogh", "Seed Images"):
        for name in ("Bears", "Dogs", "Human Face"):
            for k in range(2):
                save_png(f"my art/{style}/{name}/{k}.png", (100 * k, len(name), len(style)))
    return "--dataset folder --data-dir 'my art' --image-size 32"

def test_a_folder_goes_through_all_stages_as_each_says(my_art, capsys):
    command(fid, f"{my_art} --train-classifier {QUICK}")
    command(train_ddpm, f"{my_art} {QUICK}")
    for words in (f"{BRIEF} --method swap", BRIEF, ""):
        module, line = next_command(capsys)
        command(module, f"{line} {words}")
    table = Path("runs/folder/table.md").read_text()
    assert table.count("cls Bears") == 2               # unlearned, and attacked

def test_retraining_without_a_class_is_attacked_as_it_says(my_art, capsys):
    command(fid, f"{my_art} --train-classifier {QUICK}")
    command(train_ddpm, f"{my_art} --exclude-cls Bears {QUICK}")
    module, line = next_command(capsys)
    command(module, f"{line} {BRIEF} --out attacked")
    assert result_of("attacked")["method"] == "retrain"
    assert result_of("attacked")["forget"] == "cls Bears"

def test_a_style_with_a_space_is_forgotten_into_a_folder_at_home(my_art):
    command(fid, f"{my_art} --train-classifier {QUICK}")
    command(train_ddpm, f"{my_art} {QUICK}")
    data = "--dataset folder --data-dir 'my art' --ckpt runs/folder/pretrain"
    command(unlearn, f"{data} --style 'van gogh' --out '~/my run' {BRIEF}")
    assert result_of("home/my run")["forget"] == "style Van Gogh"
    assert not Path("~").exists()

def my_method(network, data, optimizer, args):
    """A method of one's own: make the forgotten images worse, and nothing else."""
    for _ in range(args.steps):
        loss = -args.weight * model.diffusion_loss(network, *data.forget()).mean()
        yield train_ddpm.descend(loss, network, optimizer)

def my_attack(network, data, optimizer, args):
    """An attack of one's own: DiMRA with every step taken twice."""
    for _ in range(args.steps):
        for _ in range(2):
            loss = model.diffusion_loss(network, *data.auxiliary()).mean()
            loss = train_ddpm.descend(loss, network, optimizer)
        yield loss

def test_a_method_and_an_attack_of_ones_own_run_and_are_in_the_table(small_world, monkeypatch):
    settings = dict(steps=1, batch_size=4, lr=1e-3)
    method = dict(function=my_method, small=dict(settings, weight=0.5), paper={})
    monkeypatch.setitem(unlearn.METHODS, "mine", method)
    monkeypatch.setitem(attack.ATTACKS, "again",
                        dict(function=my_attack, aux="retain", small=settings, paper={}))
    few = "--samples 1 --sampler-steps 1"
    command(unlearn, f"--method mine --cls 1 --ckpt tiny.pt {few}")
    command(attack, f"runs/shapes/mine-cls1 --attack again {few}")
    attacked, unlearned = table_rows()
    assert unlearned["method"] == attacked["method"] == "mine"
    assert "weight 0.5" in unlearned["unlearning"]
    assert "name again" in attacked["attack"]

@pytest.mark.parametrize("module,line", [(unlearn, UNLEARN), (attack, ATTACK)])
def test_main_keeps_model_result_and_traceback_where_a_picture_fails(
        module, line, small_world, monkeypatch):
    mistake = Mock(side_effect=NameError("name 'gird' is not defined"))
    monkeypatch.setattr(fid, "save_grid", mistake)
    monkeypatch.setattr(attack, "save_grid", mistake)
    with pytest.raises(NameError, match="gird"):
        command(module, f"{line} --out run")
    assert len(result_of("run")["curve"]) >= 2
    assert len(all_weights("run")) > 1000

@pytest.mark.parametrize("module,line", [(unlearn, UNLEARN), (attack, ATTACK)])
@pytest.mark.parametrize("n", [1, 3])
def test_main_leaves_no_half_file_after_a_kill(n, module, line, small_world):
    assert in_a_fork(killed_at_file, n, module, f"{line} --out run") == -signal.SIGKILL
    files = sorted(name for name in os.listdir("run") if not name.startswith("."))
    assert files[:2] == ["model.pt", "result.json"][:n - 1]
    assert len(files) == n - 1
    if n > 1:
        assert len(all_weights("run")) > 1000
        assert len(result_of("run")["curve"]) >= 2

MISTAKES = [
    (fid, "test", "name two sources"),
    (fid, "test nowhere.pt", "nowhere.pt"),
    (fid, "--train-classifier --dataset folder --data-dir none", "none"),
    (unlearn, "", "say what to forget"),
    (unlearn, "--cls ²", "0 circle, 1 square"),
    (unlearn, "--cls 1 --lr nan", "from 0 to 10"),
    (unlearn, "--cls 1 --alternative class:1", "take another"),
    (unlearn, "--cls 1 --alternative image:none.png", "cannot be read"),
    (unlearn, "--cls 1 --alternative x", "class:K, mix"),
    (unlearn, "--cls 1 --out /dev/null/run", "--out"),
    (unlearn, "--cls 1 --ckpt missing.pt", "missing.pt"),
    (unlearn, "--cls 1 --ckpt tiny.pt --dataset fashion", "draws shapes"),
    (unlearn, "--cls 1 --dataset cifar10", "train_ddpm.py --dataset cifar10"),
    (unlearn, "--cls 1 --method swap --learn unet", "leave --learn out"),
    (unlearn, "--cls 1 --method esd --learn unet", "leave --learn out"),
    (unlearn, "--speed 9", "--help"),
    (unlearn, f"{UNLEARN} --steps 20 --method ga --lambda 1e9 --lr 10", "diverged"),
    (attack, "", "name what to attack"),
    (attack, "tiny.pt", "--cls circle"),
    (attack, f"{ATTACK} --aux nowhere", "fewshot:K"),
    (attack, f"{ATTACK} --aux forget", "forget:10"),
    (attack, f"{ATTACK} --aux pretrained", "was not unlearned"),
    (attack, f"{ATTACK} --attack dimba", "--help"),
    (attack, "--table .", "no results"),
]

@pytest.mark.parametrize("module,line,part", MISTAKES)
def test_main_answers_a_mistake_with_one_line(module, line, part, small_world, capsys):
    assert part in refusal(capsys, command, module, line)
    assert not list(Path().rglob("result.json"))

def test_the_shipped_model_draws_every_class_and_style():
    network, info = model.load_checkpoint(HERE / "assets/shapes.pt")
    classifier, accuracy = shipped_classifier()
    y = model.all_labels(info["names"])
    hit = fid.predict(classifier, model.sample(network, y, steps=5)) == y
    assert min(accuracy) >= 0.99
    assert min(hit.double().mean(0)) >= 0.93

def test_35_steps_of_dimum_make_the_shipped_models_squares_vanish():
    network, info = model.load_checkpoint(HERE / "assets/shapes.pt")
    classifier, _ = shipped_classifier()
    images, y = train_ddpm.draw_shapes(40, seed=0)
    args = SimpleNamespace(batch_size=8, alternative="class:triangle", alt_size=None, steps=35,
                           weight=1.0, dataset="shapes")
    data = unlearn.Data(images, y, info["names"], SQUARE, SQUARE, args)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    training = unlearn.dimum(network.train(), data, optimizer, args)
    for _ in unlearn.cosine(training, optimizer, 35):
        pass
    squares = torch.tensor([[1, style] for style in range(5)] * 2)
    seen = fid.predict(classifier, model.sample(network, squares, steps=5))
    assert (seen[:, 0] != 1).double().mean() >= 0.8, "DiMUM should have made squares something else"

@pytest.mark.skipif(not (HERE / "assets/handout.py").is_file(), reason="this is a handout")
def test_handout_takes_out_a_body_whose_tests_fail_until_it_is_back(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "assets")
    handout = importlib.import_module("handout")
    copy = Path("copy").resolve()
    to_pass = handout.write_handout(copy, ["frechet_distance"], "frechet_distance")
    assert to_pass and all(name.startswith("test_frechet_distance_") for name in to_pass)
    shutil.copy(HERE / "fid.py", copy)
    assert handout.failing_tests(copy, "frechet_distance") == []
