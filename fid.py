"""Evaluation: unlearning accuracy and the rest, FID; the classifier that they rest on.

    python fid.py test assets/shapes.pt                  # a model's samples against real images
    python fid.py real_folder fake_folder                # two folders: Inception as in pytorch-fid
    python fid.py real_folder fake_folder --features classifier --dataset shapes
    python fid.py --train-classifier                     # how assets/shapes_classifier.pt was made
    python fid.py --train-classifier --dataset folder --data-dir my_images

REAL and FAKE are each a folder of images, a checkpoint or run folder (samples are drawn from it),
or "train" or "test" (real images). FID uses InceptionV3 for two folders, else the features of the
data's own classifier, which know what matters there. The two are never comparable.
"""
import json
import os
import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.ops import Conv2dNormActivation

from model import (FACTORS, autocast, checkpoint_file, compile_network, explain, fail,
                   load_checkpoint, load_file, matches, matches_alone, pairs_text, pick_device,
                   progress, require, run, run_folder, sample, save_file, save_grid, say, shipped,
                   to_uint8, uses_bf16, write_text)
from train_ddpm import (UNREADABLE, conditions_of, data_key, find_images, get_batch, load_data,
                        picture_labels, read_image, set_defaults, stage_parser)

NOISE_SEED = 1234       # of all evaluations: all points of all curves start from the same noise

# ---- evaluation of a conditional model -----------------------------------------------------------

@dataclass
class Evaluation:
    """What all measurements of a run share, so that its points can be compared."""
    names: list                # the names of the values, a list per factor
    targets: list              # the (factor, value) pairs whose share is UA or AR
    forget: torch.Tensor       # labels (N, F) of samples that must not show a target
    retain: torch.Tensor       # labels (M, F) of samples of the retained conditions
    classifier: nn.Module
    reference: tuple           # moments of real images of the retained conditions; None without
    unlabelled: int            # number of samples without a label
    sampler_steps: int
    protocol: dict             # what the numbers rest on, for result.json

def prepare_evaluation(info, images, y, targets, forgotten, args):
    """The Evaluation of a model by DDIM samples with guidance 2. images, y: the training set;
    forgotten: the (factor, value) pairs that the model shall not draw; targets: those of them that
    UA or AR are about."""
    names, device = info["names"], images.device
    classifier, accuracy = load_classifier(args, device, names, images.shape[2])
    keep = ~matches(y, forgotten)
    real, real_y = balanced(images[keep], y[keep], 4500)
    reference = None
    if len(real) > 1:
        reference = moments(classifier_features(classifier, real), equal_weights(real_y))
    forget, retain = conditions(conditions_of(y), targets, forgotten, args.samples)
    require(len(forget), f"the data have no picture of {pairs_text(targets, names)} alone")
    unlabelled = min(100, args.samples)
    machine = f"{torch.get_num_threads()} threads of a {device.type}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    precision = "bf16" if uses_bf16(device) else "float32"
    protocol = {
        "dataset": info["dataset"],
        "classes": [len(n) for n in names],
        "samples": args.samples,
        "unlabelled_samples": unlabelled,
        "sampler": "ddim",
        "sampler_steps": args.sampler_steps,
        "guidance": 2.0,
        "unlabelled_guidance": 0.0,
        "noise_seed": NOISE_SEED,
        "seed": args.seed,
        "real_images": len(real),
        "real_split": "train",
        "fid_features": "classifier",
        "classifier_test_accuracy": accuracy,
        "machine": f"{machine}, {precision}",
    }
    return Evaluation(names, targets, forget, retain, classifier, reference, unlabelled,
                      args.sampler_steps, protocol)

def conditions(labels, targets, forgotten, samples):
    """Which of the conditions (K, F) that the data have are drawn: labels (N, F) with a target and
    nothing else that is forgotten, a third of `samples`; and labels (M, F) with nothing that is
    forgotten, the rest."""
    if samples < len(labels):
        say(f"--samples {samples} is less than one of each of {len(labels)} conditions; one of each "
            "is drawn")
    forget = labels[matches_alone(labels, targets, forgotten)]
    retain = labels[~matches(labels, forgotten)]
    return repeat(forget, samples / 3), repeat(retain, samples * 2 / 3)

def repeat(labels, n):
    """About n labels, equally many of each of the labels (N, F)."""
    each = max(1, round(n / max(1, len(labels))))
    return labels.repeat_interleave(each, 0)

def balanced(images, y, n):
    """About n images, the first equally many of every label combination in y (N, F)."""
    require(len(y), "no image is retained to compare with; forget, or measure, fewer values")
    labels = torch.unique(y, dim=0)
    each = max(1, n // len(labels))
    index = torch.cat([(y == label).all(1).nonzero()[:each, 0] for label in labels])
    return images[index], y[index]

def equal_weights(y):
    """A weight for each example, so that each of the labels y (N, F) counts the same in all."""
    _, label, counts = torch.unique(y, dim=0, return_inverse=True, return_counts=True)
    return (1 / counts[label]).cpu().numpy()

def draw_samples(model, y, sampler_steps, step, guidance=2.0):
    """Samples (N, C, H, W) in [-1, 1] for labels y (N, F), on the CPU, from the noise that every
    evaluation starts from; `step` is for the progress line."""
    x = sample(model, y, sampler_steps, guidance=guidance, seed=NOISE_SEED,
               label=f"step {step}").cpu()
    require(x.isfinite().all(), "the model diverged: its samples are not finite; lower --lr")
    return x

def score(images, y, evaluation):
    """Metrics of samples (N, C, H, W) drawn for labels y (N, F); shares in 0..1, or None.

    ua: unlearning accuracy, the share of the samples with a target in which no target that was
    asked for is recognised; ar: 1 - ua; ua_of: for each target alone.
    none: the share of these in which the classifier recognises no class or no style at all.
    cls, style: the share of the retained samples whose class, whose style is recognised
    (UnlearnCanvas, Zhang et al. 2402.11846: IRA for the factor unlearned in, CRA for the other).
    fid, fid_error: the retained samples against the reference, and its standard error.
    """
    names, targets = evaluation.names, evaluation.targets
    seen = predict(evaluation.classifier, images)
    hit = seen == y
    asked_and_seen = torch.where(hit, y, -1)
    shown = matches(asked_and_seen, targets)
    none = (seen == torch.tensor([len(n) for n in names])).any(1)
    forget = matches(y, targets)
    retained = ~forget
    groups = {"ua": ~shown[forget], "ar": shown[forget], "none": none[forget]}
    groups.update(zip(FACTORS, hit[retained].T))
    result = {"forget_samples": int(forget.sum()), "retain_samples": int(retained.sum()),
              "ua_of": {}, "fid": None, "fid_error": None}
    for name, hits in groups.items():
        result.update(share(name, hits))
    for pair in targets:
        hidden = ~matches(asked_and_seen, [pair])[matches(y, [pair])]
        result["ua_of"][pairs_text([pair], names)] = share("ua", hidden)["ua"]
    if evaluation.reference and result["retain_samples"] > 1:
        features = classifier_features(evaluation.classifier, images[retained])
        result["fid"] = frechet_distance(evaluation.reference, moments(features))
        result["fid_error"] = fid_error(evaluation.reference, features)
    return result

def leak(model, evaluation, step):
    """{"leak": the share of samples drawn without a label (the null label, guidance 0) in which a
    target is recognised, and the ends of its interval}: UA asks for the forgotten label alone."""
    y = model.null.cpu().expand(evaluation.unlabelled, -1)
    x = draw_samples(model, y, evaluation.sampler_steps, step, guidance=0)
    seen = predict(evaluation.classifier, x)
    return share("leak", matches(seen, evaluation.targets))

def share(name, hits):
    """{name: the share of a bool tensor that is True, name_low, name_high: the ends of its 95 %
    Wilson interval}; Nones if it is empty."""
    if len(hits) == 0:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    test = scipy.stats.binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(0.95, "wilson")
    return {name: test.statistic, f"{name}_low": low, f"{name}_high": high}

def percent(metrics, name):
    """"97.5 [94, 99]", in %, for a share in metrics, or "-"."""
    if metrics.get(name) is None:
        return "-"
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{100 * metrics[name]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

def fid_text(metrics):
    if metrics["fid"] is None:
        return "-"
    return f"{metrics['fid']:.1f} +- {metrics['fid_error']:.1f}"

def score_text(metrics, headline):
    """One line: UA or AR, as `headline` says, leak, what was retained, and "none" above 5 %."""
    parts = [f"{headline.upper()} {percent(metrics, headline)} %"]
    for name, title in (("leak", "leak"), ("cls", "class"), ("style", "style")):
        if metrics.get(name) is not None:
            parts.append(f"{title} {percent(metrics, name)} %")
    if metrics["none"] is not None and metrics["none"] > 0.05:
        parts.append(f"none {percent(metrics, 'none')} %")
    if metrics["fid"] is not None:
        parts.append(f"FID {fid_text(metrics)}")
    return "   ".join(parts)

def measure(model, evaluation, step, headline, retained=True):
    """Draw, score and print one point of a run; without the retained conditions and leak it is four
    times as fast. Returns (metrics, samples uint8 (N, C, H, W), those with a target first)."""
    y = evaluation.forget
    if retained:
        y = torch.cat([y, evaluation.retain])
    x = draw_samples(model, y, evaluation.sampler_steps, step)
    metrics = {"step": step, **score(x, y, evaluation)}
    if retained:
        metrics.update(leak(model, evaluation, step))
    say(f"step {step:>5}: {score_text(metrics, headline)}")
    return metrics, to_uint8(x)

def train_and_measure(model, training, evaluation, every, args, headline, retained):
    """Take args.steps of `training`, a generator of losses, and measure before, after, and every N
    steps for `every` [N], or at the steps it names; there with the retained conditions if
    `retained`. Returns (the metrics of each point, its samples, losses (steps,), the seconds of the
    steps alone)."""
    points = range(0, args.steps, every[0]) if len(every) == 1 else every
    losses = torch.zeros(args.steps, device=model.null.device)
    measured = [measure(model, evaluation, 0, headline)]
    began, paused = time.time(), 0.0
    for step, loss in enumerate(progress(training, "training", args.steps, losses=True), 1):
        losses[step - 1] = loss
        if step in points and step < args.steps:
            losses.cpu()                               # waits for a GPU
            pause = time.time()
            measured.append(measure(model, evaluation, step, headline, retained))
            paused += time.time() - pause
    losses = losses.cpu()
    seconds = round(time.time() - began - paused, 1)
    measured.append(measure(model, evaluation, args.steps, headline))
    curve = [metrics for metrics, _ in measured]
    samples = [x for _, x in measured]
    say(f"({len(evaluation.forget)} + {len(evaluation.retain)} samples with guidance 2, and "
        f"{evaluation.unlabelled} without a label or guidance for leak; {evaluation.sampler_steps} "
        f"DDIM steps, seed {args.seed}; 95 % intervals; FID on classifier features, with its standard "
        f"error; {seconds:.0f} s of training)")
    return curve, samples, losses, seconds

def save_before_after(path, evaluation, pairs, before, after):
    """Two rows of pictures, or blocks of rows: the samples before and after, one of each condition;
    `pairs` are always among these. Conditions of which no sample was drawn stay white."""
    y = torch.cat([evaluation.forget, evaluation.retain])
    wanted, layout = picture_labels(evaluation.names, pairs)
    used = Counter()
    index = []
    for label in wanted.tolist():
        drawn = (y == torch.tensor(label)).all(1).nonzero().flatten().tolist() or [-1]
        index.append(drawn[used[tuple(label)] % len(drawn)])
        used[tuple(label)] += 1
    white = torch.full_like(before[:1], 255)           # becomes image -1
    pictures = [torch.cat([x, white])[index] for x in (before, after)]
    layout["rows"] = [f"{when} {row}" for when in ("before", "after") for row in layout["rows"]]
    save_grid(torch.cat(pictures), path, **layout)

# ---- Frechet distance ----------------------------------------------------------------------------

def moments(features, weights=None):
    """Mean (D,) and covariance (D, D) of features (N, D), weighted by weights (N,), in float64."""
    features = np.asarray(features, np.float64)
    mean = np.average(features, axis=0, weights=weights)
    return mean, np.cov(features, rowvar=False, aweights=weights)

def frechet_distance(real, fake):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two sets' moments, Heusel et al.
    1706.08500. The root's trace is the sum of the roots of the eigenvalues of the symmetric
    cov1^(1/2) cov2 cov1^(1/2): faster than a matrix root, and never complex."""
    mu1, cov1 = real
    mu2, cov2 = fake
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    means = np.square(mu1 - mu2).sum()
    return max(0.0, float(means + np.trace(cov1) + np.trace(cov2) - 2 * cross))

def fid_error(real, fake, weights=None, resamples=20):
    """The FID's standard error: its spread over bootstrap resamples of the fake features (M, D),
    each with its weight (M,), against the real ones' moments."""
    rng = np.random.default_rng(0)
    n = len(fake)
    again = []
    for _ in range(resamples):
        index = rng.integers(n, size=n)
        chosen = None if weights is None else weights[index]
        again.append(frechet_distance(real, moments(fake[index], chosen)))
    return float(np.std(again, ddof=1))

# ---- InceptionV3 with FID's weights --------------------------------------------------------------

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")       # the end is its SHA-256's start

def inception(device):
    """pytorch-fid's InceptionV3: features (N, 2048) of images (N, 3, 299, 299) in [-1, 1].

    It is torchvision's with 1,008 outputs, except that the pooling branches leave the padding out
    of their averages and that the last block takes the maximum. The weights are downloaded once.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints").as_posix()
    with explain("Inception's weights cannot be loaded; add --features classifier, or put them in "
                 f"{cache} from {INCEPTION_URL}", OSError, RuntimeError):
        state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu",
                                                   check_hash=True, weights_only=True)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False)
    net.load_state_dict(state)

    def repool(block, pool, **options):
        kept = {}
        block.register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
        block.branch_pool.register_forward_pre_hook(
            lambda _, args: (pool(kept.pop("x"), 3, 1, 1, **options),))

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        repool(getattr(net, f"Mixed_{name}"), F.avg_pool2d, count_include_pad=False)
    repool(net.Mixed_7c, F.max_pool2d)
    net.fc = nn.Identity()
    return net.to(device).eval()

# ---- the classifier ------------------------------------------------------------------------------

CLASSIFIERS = {                 # (width, training steps)
    "shapes": (24, 3000),
    "fashion": (26, 10000),
    "cifar10": (64, 8000),
}

class Classifier(nn.Module):
    """A small CNN that names class and style: x (B, C, size, size) in [-1, 1] -> a list of logits
    per factor, whose last entry is "none": without it noise must be called something.
    `features(x)` (B, 4 * width) are what it knows of an image before naming it: for the FID."""
    def __init__(self, channels, classes, width, size=32):
        super().__init__()
        self.args = dict(channels=channels, classes=list(classes), width=width, size=size)
        w = width
        self.body = nn.Sequential(                             # to (B, 4 * width, 4, 4)
            Conv2dNormActivation(channels, w, 3, stride=size // 32),
            Conv2dNormActivation(w, 2 * w, 3, stride=2),
            Conv2dNormActivation(2 * w, 2 * w, 3),
            Conv2dNormActivation(2 * w, 4 * w, 3, stride=2),
            Conv2dNormActivation(4 * w, 4 * w, 3),
            Conv2dNormActivation(4 * w, 4 * w, 3, stride=2))
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(64 * w, 4 * w), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(4 * w, n + 1) for n in classes)

    def features(self, x):
        with autocast(x.device):
            return self.embed(self.body(x)).float()

    def forward(self, x):
        h = self.features(x)
        return [head(h) for head in self.heads]

@torch.inference_mode()
def in_batches(network, images, device):
    """network's outputs for images (N, C, H, W), uint8 or in [-1, 1], on the CPU."""
    outputs = []
    for x in images.split(250):
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        outputs.append(network(x.to(device)).cpu())
    return torch.cat(outputs)

def classifier_features(classifier, images):
    """The FID features (N, D) of images (N, C, H, W)."""
    device = classifier.heads[0].weight.device
    return in_batches(classifier.features, images, device).numpy()

def predict(classifier, images):
    """The recognised values (N, F) of images (N, C, H, W); the last value is "none"."""
    def recognised(x):
        return torch.stack([logits.argmax(1) for logits in classifier(x)], 1)

    return in_batches(recognised, images, classifier.heads[0].weight.device)

def uniform(low, high, x, *shape):
    """Random numbers (len(x), *shape), on the device of x."""
    return low + (high - low) * torch.rand(len(x), *shape, device=x.device)

def per_image(low, high, x):
    """A random number for each image of x (n, C, H, W): (n, 1, 1, 1)."""
    return uniform(low, high, x, 1, 1, 1)

def garbage(x):
    """What a ruined model may draw in place of x (n, C, H, W): noise of any grain, coloured or
    grey, on any ground, or flat colour, with at most a shadow (10 %) of x in it."""
    n, c, h, w = x.shape
    grains = []
    for size in (h, h // 2, h // 4, h // 8, 2, 1):
        noise = uniform(-1, 1, x, c, size, size)
        noise = noise + per_image(0, 1, x) * torch.randn_like(noise)
        grains.append(F.interpolate(noise, (h, w), mode="bilinear"))
    kind = torch.randint(len(grains), (n,), device=x.device)
    which = torch.arange(n, device=x.device)
    noise = torch.stack(grains)[kind, which]
    grey = per_image(0, 1, x) < 0.4
    noise = torch.where(grey, noise.mean(1, keepdim=True), noise)
    colour = uniform(-1, 1, x, c, 1, 1)
    ground = colour * per_image(0, 1, x).round()
    contrast = per_image(0.1, 1.5, x)
    noise = ground + contrast * noise
    fine = per_image(0, 0.2, x)
    noise = noise + fine * torch.randn_like(x)
    shadow = per_image(0, 0.1, x)
    return (shadow * x + (1 - shadow) * noise).clamp(-1, 1)

def augment(x):
    """x (n, C, H, W) as a damaged model may still draw it: enlarged or shrunk, turned, shifted,
    blurred, recoloured, pale or saturated, with a colour cast, blotches and noise. It must still be
    recognised: what a picture shows has not been forgotten, and what comes back is seldom clean."""
    n, c, h, w = x.shape
    scale = 2 ** uniform(-0.7, 0.8, x)
    turn = uniform(-0.2, 0.2, x)
    cos = turn.cos() / scale
    sin = turn.sin() / scale
    right = uniform(-0.2, 0.2, x)
    down = uniform(-0.2, 0.2, x)
    affine = torch.stack([cos, -sin, right, sin, cos, down], 1).view(n, 2, 3)
    places = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, places, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    x = x + per_image(0, 1, x) * (blurred - x)
    channels = uniform(0, 1, x, c).argsort(1)
    x = x.gather(1, channels[:, :, None, None].expand_as(x))
    grey = x.mean(1, keepdim=True)
    saturation = per_image(0.4, 2.5, x)
    x = grey + saturation * (x - grey)
    gain = 2 ** per_image(-1, 1.5, x)
    cast = uniform(-0.5, 0.5, x, c, 1, 1)
    x = (gain * x + cast).clamp(-1, 1)
    blotches = F.interpolate(uniform(-1, 1, x, c, 4, 4), (h, w), mode="bilinear")
    x = x + per_image(0, 0.3, x) * blotches
    noise = per_image(0, 0.2, x)
    return (x + noise * torch.randn_like(x)).clamp(-1, 1)

def classifier_steps(net, images, y, steps, batch_size, lr=3e-3, flip=False):
    """Train the classifier; yield each step's loss. Of a batch an eighth is garbage, to be called
    none, a quarter as it is, the rest augmented; all is shifted by up to 2 pixels."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(steps, 2), pct_start=0.1)
    none = torch.tensor([head.out_features - 1 for head in net.heads], device=y.device)
    for _ in range(steps):
        x, labels = get_batch(images, y, batch_size, flip)
        spoilt = max(len(x) // 8, 1)
        plain = len(x) * 3 // 8                        # the end of the images left as they are
        x[plain:] = augment(x[plain:])
        x[:spoilt] = garbage(x[:spoilt])
        labels[:spoilt] = none
        x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = sum(F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(net(x)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()

def train_classifier(args, device):
    """Train on the train split; save model.pt and samples.png, the test images it gets wrong."""
    images, y, names = load_data(args.dataset, "train", args.data_dir, device, args.image_size)
    x, labels, _ = load_data(args.dataset, "test", args.data_dir, size=args.image_size)
    require(len(x), f"'{args.data_dir}' has one picture of each class, too few for a classifier")
    if args.dataset in CLASSIFIERS:
        width, steps = CLASSIFIERS[args.dataset]
    else:
        width = 64
        steps = min(8000, max(200, len(images) // 2))
    set_defaults(args, steps=steps, batch_size=128)
    folder = run_folder(args.out or Path("runs", args.dataset, "classifier"))
    torch.manual_seed(args.seed)
    net = Classifier(images.shape[1], [len(n) for n in names], width, images.shape[2])
    net = net.to(device, memory_format=torch.channels_last)
    say(f"classifier of {args.dataset}: {len(images)} images, {args.steps} steps, batch "
        f"{args.batch_size}, into {folder}")
    flip = args.dataset in ("cifar10", "fashion")      # mirrored, they show the same
    training = classifier_steps(net, images, y, args.steps, args.batch_size, flip=flip)
    for _ in progress(training, "classifier", args.steps, losses=True):
        pass
    hit = predict(net.eval(), x) == labels
    accuracy = hit.double().mean(0).tolist()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(folder / "model.pt", "classifier", dict(
        names=names, args=net.args, seed=args.seed, steps=args.steps, accuracy=accuracy,
        weights=weights, key=data_key(args)))
    wrong = (~hit).any(1).nonzero()[:40, 0]
    save_grid(x[wrong] if len(wrong) else x[:40], folder / "samples.png", columns=10)
    say_hardest(hit, labels, names)
    say(f"accuracy on {len(x)} test images: {accuracy_text(accuracy)}\n"
        f"wrote {folder}/model.pt and samples.png")

def say_hardest(hit, y, names, most=12):
    """Say how often the values of each factor are recognised, the hardest first. hit, y: bool and
    label (N, F) of test images."""
    for i, values in enumerate(names):
        shares = [(hit[y[:, i] == v, i].double().mean().item(), name)
                  for v, name in enumerate(values) if (y[:, i] == v).any()]
        listed = [f"{name} {100 * share:.1f} %" for share, name in sorted(shares)[:most]]
        say(f"{FACTORS[i]} recognised, the hardest first: {', '.join(listed)}")

def accuracy_text(accuracy):
    return ", ".join(f"{factor} {100 * a:.1f} %" for factor, a in zip(FACTORS, accuracy))

def load_classifier(args, device, names, size=32):
    """(classifier, its test accuracy: a list per factor): the last one trained here for these
    names, size and pictures, else the shipped one."""
    trained = [path for path in Path("runs", args.dataset).glob("*/model.pt")
               if re.fullmatch(r"classifier(-\d+)?", path.parent.name)]
    trained.sort(key=lambda path: (len(path.parent.name), path.parent.name), reverse=True)
    key = data_key(args)
    for path in [*trained, shipped(f"{args.dataset}_classifier.pt")]:
        if not path.is_file():
            continue
        data = load_file(path, "classifier")
        if (data["names"], data["args"]["size"], data["key"]) != (names, size, key):
            say(f"{path} knows other {args.dataset} data: not used")
            continue
        net = Classifier(**data["args"]).to(device, memory_format=torch.channels_last)
        net.load_state_dict(data["weights"])
        say(f"classifier {path}: accuracy on test images: {accuracy_text(data['accuracy'])}")
        if min(data["accuracy"]) < 0.8:
            say("warning: below 80 % what it recognises means little; train it for more --steps")
        return net.eval(), data["accuracy"]
    command = f"python fid.py --train-classifier --dataset {args.dataset}"
    if args.dataset == "folder":
        command += f" --data-dir {shlex.quote(args.data_dir)} --image-size {size}"
    fail(f"there is no classifier of these data yet; run '{command}'")

# ---- command line --------------------------------------------------------------------------------

@dataclass
class Source:
    """REAL or FAKE: paths of pictures, or images uint8 with their labels and names."""
    images: list
    how: str                   # how they came, for the protocol
    y: torch.Tensor = None
    names: list = None

def is_model(source):
    return source not in ("train", "test") and checkpoint_file(source).is_file()

def load_source(source, args, device, size):
    """The Source that the user names; size: of a folder data set's images."""
    if source in ("train", "test"):
        x, y, names = load_data(args.dataset, source, args.data_dir, size=size)
        x, y = balanced(x, y, args.samples)
        return Source(x, f"{args.dataset} {source} split", y, names)
    if Path(source).is_dir() and not is_model(source):
        return Source(find_images(source), "folder")
    model, info = load_checkpoint(source, device)
    require(info["dataset"] == args.dataset, f"{source} draws {info['dataset']}; add --dataset "
            f"{info['dataset']}")
    if args.compile:
        compile_network(model)
    y = repeat(torch.tensor(info["conditions"]), args.samples)
    x = sample(model, y, args.sampler_steps, seed=args.seed, label="samples")
    how = f"samples, {args.sampler_steps} DDIM steps, guidance 2, seed {args.seed}"
    return Source(to_uint8(x).cpu(), how, y, info["names"])

@torch.inference_mode()
def features_of(images, network, device, label, size, channels, resize):
    """Features (N, D) of paths or uint8 images, batch by batch: they are never all in memory.
    resize: as pytorch-fid does, each by itself, bilinear without antialiasing."""
    def prepare(image):
        if isinstance(image, Path):
            with explain(f"{image} is not a readable image; remove it", *UNREADABLE):
                image = read_image(image, None if resize else size, channels)
        x = image[None].float() / 127.5 - 1
        if channels == 1:
            x = x.mean(1, keepdim=True)
        else:
            x = x.expand(-1, channels, -1, -1)
        return F.interpolate(x, (size, size), mode="bilinear")

    batches = [images[i:i + 50] for i in range(0, len(images), 50)]
    features = []
    for batch in progress(batches, label, len(batches)):
        x = torch.cat([prepare(image) for image in batch])
        features.append(network(x.to(device)).cpu())
    return torch.cat(features)

def parse_args():
    parser = stage_parser(__doc__, "fid, or classifier", samples=1000, sampler_steps=50)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("real", nargs="?", metavar="REAL", type=path,
         help="folder, checkpoint, train or test")
    flag("fake", nargs="?", metavar="FAKE", type=path,
         help="the same")
    flag("--features", choices=("inception", "classifier"),
         help="inception for two folders")
    flag("--image-size", type=int, choices=(32, 64, 128), default=64,
         help="of a folder (64)")
    flag("--train-classifier", action="store_true",
         help="train the dataset's classifier and stop")
    return parser.parse_args()

def main():
    args = parse_args()
    named = args.dataset
    set_defaults(args, dataset="shapes")
    device = pick_device(args.device)
    if args.train_classifier:
        train_classifier(args, device)
        return
    require(args.fake, "name two sources, such as: python fid.py test assets/shapes.pt")
    size = args.image_size
    for source in filter(is_model, (args.real, args.fake)):
        size = load_file(checkpoint_file(source), "unet")["config"]["image_size"]
    real = load_source(args.real, args, device, size)
    fake = load_source(args.fake, args, device, size)
    require(min(len(real.images), len(fake.images)) > 1, f"there are {len(real.images)} real and "
            f"{len(fake.images)} fake images; FID needs at least two of each")

    result = {"stage": "fid", "real": args.real, "fake": args.fake}
    two_folders = real.how == fake.how == "folder"
    kind = args.features or ("inception" if two_folders else "classifier")
    require(named or not two_folders or kind == "inception", "say by the classifier of which data the "
            "folders are to be compared, such as --dataset shapes")
    accuracy = None
    if kind == "inception":
        network = inception(device)
        how = dict(size=299, channels=3, resize=True)
    else:
        x, _, names = load_data(args.dataset, "test", args.data_dir, size=size)
        for name, source in ((args.real, real), (args.fake, fake)):
            require(source.names in (None, names), f"{name} knows other names than "
                    f"'{args.data_dir}'; give the folder that it was trained on with --data-dir")
        classifier, accuracy = load_classifier(args, device, names, x.shape[2])
        network = classifier.features
        how = dict(size=x.shape[2], channels=x.shape[1], resize=False)
        if fake.y is not None:
            hit = predict(classifier, fake.images) == fake.y
            for name, hits in zip(FACTORS, hit.T):
                result.update(share(name, hits))
                say(f"{name} recognised: {percent(result, name)} %")
    real_weights = None if real.y is None else equal_weights(real.y)
    fake_weights = None if fake.y is None else equal_weights(fake.y)
    reference = moments(features_of(real.images, network, device, "real", **how), real_weights)
    features = features_of(fake.images, network, device, "fake", **how).numpy()
    result["fid"] = frechet_distance(reference, moments(features, fake_weights))
    result["fid_error"] = fid_error(reference, features, fake_weights)
    say(f"FID ({kind} features): {result['fid']:.3f}, standard error {result['fid_error']:.3f}\n"
        f"real: {len(real.images)}, {real.how}; fake: {len(fake.images)}, {fake.how}")
    result["protocol"] = {
        "real": real.how, "real_images": len(real.images), "fake": fake.how,
        "fake_images": len(fake.images), "fid_features": kind, "classifier_test_accuracy": accuracy}

    folder = run_folder(args.out or Path("runs", args.dataset, "fid"))
    write_text(folder / "result.json", json.dumps({**result, "args": vars(args)}, indent=1))
    shown = []
    for source in (real, fake):
        shown += [source.images[i * len(source.images) // 20] for i in range(20)]
    x = features_of(shown, nn.Identity(), "cpu", None, size=64, channels=3, resize=False)
    save_grid(x, folder / "samples.png", columns=20, scale=1)
    say(f"wrote {folder}/result.json and samples.png (above: real, below: fake)")

if __name__ == "__main__":
    run(main)
