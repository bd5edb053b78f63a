"""Evaluation: unlearning accuracy and the rest, FID, precision, recall; the classifier that judges.

    python fid.py test assets/shapes.pt                  # a model's samples against real images
    python fid.py real_folder fake_folder                # two folders: Inception as in pytorch-fid
    python fid.py real_folder fake_folder --features classifier
    python fid.py --train-classifier                     # how assets/shapes_classifier.pt was made
    python fid.py --train-classifier --dataset folder --data-dir my_images

REAL and FAKE are each a folder of images, a checkpoint or run folder (samples are drawn from it),
or "train" or "test" (real images). FID uses InceptionV3 for two folders, else the features of the
data's own classifier, which know what matters there. The two are never comparable.
"""
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.ops import Conv2dNormActivation

from model import (FACTORS, all_labels, autocast, explain, load_checkpoint, load_file, matches,
                   pairs_text, pick_device, progress, require, run, run_folder, sample, save_file,
                   save_grid, shipped, to_uint8, uses_bf16, write_text)
from train_ddpm import (fill, find_images, folder_key, get_batch, load_data, picture_labels,
                        read_image, stage_parser)

NOISE_SEED = 1234       # of all evaluations: all points of all curves start from the same noise

# ---- evaluation of a conditional model -----------------------------------------------------------

def evaluator(info, images, y, forgotten, count, args, first):
    """(measure, protocol): a function that samples a model (DDIM, guidance 2) and scores it, and
    what its numbers rest on. images, y: the training set; FID compares with its retained images.

    forgotten: the (factor, value) pairs that the model shall not draw; count: those that are
    counted. measure(model, step, retained=True) draws a third of args.samples of conditions with a
    counted and no other forgotten pair and, if retained, the rest of conditions without a forgotten
    pair. It prints (first: "ua" or "ar") and returns (metrics of `score`, images uint8, y).
    """
    names, device, keep = info["names"], images.device, ~matches(y, forgotten)
    judge, accuracy = load_classifier(args, device, names, images.shape[2])
    real, _ = balanced(images[keep], y[keep], 4500)
    reference = moments(judge_features(judge, real)) if len(real) > 1 else None
    cells = all_labels(names)
    others = [pair for pair in forgotten if pair not in count]
    forget = repeat(cells[matches(cells, count) & ~matches(cells, others)], args.samples / 3)
    retain = repeat(cells[~matches(cells, forgotten)], args.samples * 2 / 3)

    def measure(model, step, retained=True):
        y = torch.cat([forget, retain]) if retained else forget
        x = sample(model, y, args.sampler_steps, seed=NOISE_SEED, label=f"step {step}").cpu()
        require(x.isfinite().all(), "the model diverged: its samples are not finite; lower --lr")
        metrics = {"step": step, **score(x, y, judge, names, count, reference)}
        print(f"step {step:>5}: {score_text(metrics, first)}", flush=True)
        return metrics, to_uint8(x), y

    threads = f"{torch.get_num_threads()} threads of a {device.type}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return measure, {
        "dataset": info["dataset"], "classes": [len(n) for n in names], "samples": args.samples,
        "real_images": len(real), "real_split": "train", "sampler": "ddim", "guidance": 2.0,
        "sampler_steps": args.sampler_steps, "noise_seed": NOISE_SEED, "seed": args.seed,
        "fid_features": "classifier", "classifier_test_accuracy": accuracy,
        "machine": f"{machine}, {'bf16' if uses_bf16(device) else 'float32'}"}

def repeat(cells, n):
    """About n labels, equally many of each of the cells (N, F)."""
    return cells.repeat_interleave(max(1, round(n / max(1, len(cells)))), 0)

def balanced(images, y, n):
    """About n images, the first equally many of every label combination in y (N, F)."""
    require(len(y), "no image is retained to compare with; forget, or count, fewer values")
    cells = torch.unique(y, dim=0)
    index = [(y == cell).all(1).nonzero()[:max(1, n // len(cells)), 0] for cell in cells]
    return images[torch.cat(index)], y[torch.cat(index)]

def score(images, y, judge, names, count, reference):
    """Metrics of samples (N, C, H, W) drawn for labels y (N, F); shares in 0..1, or None.

    ua: unlearning accuracy, the share of the samples with a counted pair in which no counted value
    that was asked for is recognised; ar: 1 - ua; ua_of: for each pair alone.
    none: the share of these in which the judge recognises no class or no style at all.
    cls, style: the share of the retained samples whose class, whose style is recognised
    (UnlearnCanvas, Zhang et al. 2402.11846: IRA for the factor unlearned in, CRA for the other).
    fid, fid_error: the retained samples against the reference (`moments`), and its standard error.
    """
    seen, forget = predict(judge, images), matches(y, count)
    hit, none = seen == y, (seen == torch.tensor([len(n) for n in names])).any(1)

    def shown(pairs):
        """Of the samples with one of the pairs: is a value that was asked for recognised?"""
        return matches(torch.where(hit, y, -1), pairs)[matches(y, pairs)]

    groups = {"ua": ~shown(count), "ar": shown(count), "none": none[forget],
              **dict(zip(FACTORS, hit[~forget].T))}
    result = {"ua_of": {pairs_text([pair], names): share(~shown([pair]))[0] for pair in count},
              "forget_samples": int(forget.sum()), "retain_samples": int((~forget).sum()),
              "fid": None, "fid_error": None}
    for name, hits in groups.items():
        result.update(zip((name, f"{name}_low", f"{name}_high"), share(hits)))
    if reference and result["retain_samples"] > 1:
        features = judge_features(judge, images[~forget])
        result["fid"] = frechet_distance(reference, moments(features))
        result["fid_error"] = fid_error(reference, features)
    return result

def share(hits):
    """(share, low, high) of a bool tensor, with its 95 % Wilson interval; Nones if it is empty."""
    if not len(hits):
        return None, None, None
    test = scipy.stats.binomtest(int(hits.sum()), len(hits))
    return test.statistic, *test.proportion_ci(0.95, "wilson")

def percent(metrics, name):
    """"97.5 [94, 99]", in %, for a share in metrics, or "-"."""
    if metrics.get(name) is None:
        return "-"
    value, low, high = (100 * metrics[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.1f} [{low:.0f}, {high:.0f}]"

def fid_text(metrics):
    return "-" if metrics["fid"] is None else f"{metrics['fid']:.1f} +- {metrics['fid_error']:.1f}"

def score_text(metrics, first):
    """One line: the first share, what was retained where it was drawn, and "none" above 5 %."""
    titles = {first: first.upper(), "cls": "class", "style": "style", "none": "none"}
    line = "   ".join(f"{title} {percent(metrics, k)} %" for k, title in titles.items()
                      if metrics.get(k) is not None and (k != "none" or metrics[k] > 0.05))
    return line if metrics["fid"] is None else f"{line}   FID {fid_text(metrics)}"

def follow(model, steps, label, args, measure, when, retained):
    """Take args.steps of a generator of losses, measuring before, after and, if retained with the
    retained conditions, every N steps for `when` [N] or at several steps. Returns (metrics of each
    point, losses (steps,), the seconds of the steps alone, images of each point, the labels of the
    first and the last)."""
    when = range(0, args.steps, when[0]) if len(when) == 1 else when
    losses, points = torch.zeros(args.steps, device=model.null.device), [measure(model, 0)]
    began, paused = time.time(), 0.0
    for step, loss in enumerate(progress(steps, label, args.steps), 1):
        losses[step - 1] = loss
        if step in when and step < args.steps:
            losses.cpu()                               # waits for a GPU
            pause = time.time()
            points.append(measure(model, step, retained))
            paused += time.time() - pause
    losses = losses.cpu()
    seconds = time.time() - began - paused
    curve, pictures, labels = zip(*points, measure(model, args.steps))
    print(f"({curve[0]['forget_samples']} + {curve[0]['retain_samples']} samples, "
          f"{args.sampler_steps} DDIM steps, guidance 2, seed {args.seed}; 95 % intervals; FID on "
          f"classifier features, with its standard error; {seconds:.0f} s of training)")
    return list(curve), losses, round(seconds, 1), pictures, labels[0]

def save_before_after(path, names, forgotten, y, pictures):
    """The first and the last of pictures (N, C, H, W), for labels y (N, F), one above the other."""
    wanted, layout = picture_labels(names, forgotten)
    white, used, index = torch.full_like(pictures[0][:1], 255), Counter(), []
    for label in map(tuple, wanted.tolist()):          # one that was not sampled stays white
        same = (y == torch.tensor(label)).all(1).nonzero().flatten().tolist() or [-1]
        index.append(same[used[label] % len(same)])
        used[label] += 1
    before, after = (torch.cat([pictures[i], white])[index] for i in (0, -1))
    layout["rows"] = [f"{when} {row}" for when in ("before", "after") for row in layout["rows"]]
    save_grid(torch.cat([before, after]), path, **layout)

# ---- Frechet distance, precision and recall ------------------------------------------------------

def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)

def frechet_distance(real, fake):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two sets' moments, Heusel et al.
    1706.08500. The root's trace is the sum of the roots of the eigenvalues of the symmetric
    cov1^(1/2) cov2 cov1^(1/2): faster than a matrix root, and never complex."""
    (mu1, cov1), (mu2, cov2) = real, fake
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    means = np.square(mu1 - mu2).sum()
    return max(0.0, float(means + np.trace(cov1) + np.trace(cov2) - 2 * cross))

def fid_error(real, fake, resamples=20):
    """The FID's standard error: its spread over bootstrap resamples of the fake features (M, D),
    against the real ones' moments."""
    rng, n, again = np.random.default_rng(0), len(fake), []
    for _ in range(resamples):
        again.append(frechet_distance(real, moments(fake[rng.integers(n, size=n)])))
    return float(np.std(again, ddof=1))

def precision_recall(real, fake, k=3, most=2000):
    """Improved precision and recall (Kynkaanniemi et al. 1904.06991), each in 0..1, of a random
    subset of at most `most` of the features (N, D) and (M, D): precision is the share of fake
    features within the k-th neighbour's distance of some real one, recall the reverse."""
    rng = np.random.default_rng(0)
    real, fake = (torch.as_tensor(x[rng.permutation(len(x))[:most]]).double() for x in (real, fake))

    def covered(points, centres):
        rank = min(k + 1, len(centres))        # the first neighbour is the point itself
        radius = torch.cdist(centres, centres).kthvalue(rank, 1).values
        return (torch.cdist(points, centres) <= radius).any(1).double().mean().item()
    return covered(fake, real), covered(real, fake)

# ---- InceptionV3 with FID's weights --------------------------------------------------------------

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")       # the end is its SHA-256's start

def inception(device):
    """pytorch-fid's InceptionV3: features (N, 2048) of images (N, 3, 299, 299) in [-1, 1].

    It is torchvision's with 1,008 outputs, except that the pooling branches leave the padding out
    of their averages and that the last block takes the maximum. The weights are downloaded once.
    """
    with explain("Inception's weights cannot be loaded; add --features classifier, or put them in "
                 f"{Path(torch.hub.get_dir(), 'checkpoints').as_posix()} from {INCEPTION_URL}"):
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

CLASSIFIERS = {"shapes": (24, 3000), "fashion": (32, 1500), "cifar10": (64, 8000)}  # width, steps

class Classifier(nn.Module):
    """A small CNN that names class and style: x (B, C, size, size) in [-1, 1] -> a list of logits
    per factor, whose last entry is "none": without it noise must be called something.
    `features(x)` (B, 4 * width) are what it knows of an image before naming it: for the FID."""
    def __init__(self, channels, classes, width, size=32):
        super().__init__()
        self.args = dict(channels=channels, classes=list(classes), width=width, size=size)
        w = width
        layers = ((channels, w, size // 32), (w, 2 * w, 2), (2 * w, 2 * w, 1),  # in, out, stride
                  (2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 4 * w, 2))
        self.body = nn.Sequential(*(Conv2dNormActivation(a, b, 3, s) for a, b, s in layers))
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
    scaled = (x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x for x in images.split(250))
    return torch.cat([network(x.to(device)).cpu() for x in scaled])

def judge_features(judge, images):
    """The FID features (N, D) of images (N, C, H, W)."""
    return in_batches(judge.features, images, judge.heads[0].weight.device).numpy()

def predict(judge, images):
    """The recognised values (N, F) of images (N, C, H, W); the last value is "none"."""
    def answers(x):
        return torch.stack([logits.argmax(1) for logits in judge(x)], 1)
    return in_batches(answers, images, judge.heads[0].weight.device)

def uniform(low, high, x, *shape):
    """Random numbers (len(x), *shape), on the device of x."""
    return low + (high - low) * torch.rand(len(x), *shape, device=x.device)

def garbage(x):
    """What a ruined model may draw in place of x (n, C, H, W): noise of any grain, coloured or
    grey, on any ground, or flat colour, with at most a shadow (10 %) of x in it."""
    (n, c, h, w), grains = x.shape, []
    for size in (h, h // 2, h // 4, h // 8, 2, 1):
        noise = uniform(-1, 1, x, c, size, size)
        noise = noise + uniform(0, 1, x, 1, 1, 1) * torch.randn_like(noise)
        grains.append(F.interpolate(noise, (h, w), mode="bilinear"))
    kind = torch.randint(len(grains), (n,), device=x.device)
    noise = torch.stack(grains)[kind, torch.arange(n, device=x.device)]
    noise = torch.where(uniform(0, 1, x, 1, 1, 1) < 0.4, noise.mean(1, keepdim=True), noise)
    ground = uniform(-1, 1, x, c, 1, 1) * uniform(0, 1, x, 1, 1, 1).round()
    noise = ground + uniform(0.1, 1.5, x, 1, 1, 1) * noise
    noise = noise + uniform(0, 0.2, x, 1, 1, 1) * torch.randn_like(x)
    shadow = uniform(0, 0.1, x, 1, 1, 1)
    return (shadow * x + (1 - shadow) * noise).clamp(-1, 1)

def augment(x):
    """x (n, C, H, W) as a damaged model may still draw it: enlarged or shrunk, turned, shifted,
    blurred, recoloured, pale or saturated, with a colour cast, blotches and noise. It must still be
    recognised: what a picture shows has not been forgotten, and what comes back is seldom clean."""
    n, c, h, w = x.shape
    scale, turn = 2 ** uniform(-0.7, 0.8, x), uniform(-0.2, 0.2, x)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    affine = [cos, -sin, uniform(-0.2, 0.2, x), sin, cos, uniform(-0.2, 0.2, x)]
    places = F.affine_grid(torch.stack(affine, 1).view(n, 2, 3), x.shape, align_corners=False)
    x = F.grid_sample(x, places, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    x = x + uniform(0, 1, x, 1, 1, 1) * (blurred - x)
    channels = uniform(0, 1, x, c).argsort(1)[:, :, None, None]
    x = x.gather(1, channels.expand_as(x))
    grey = x.mean(1, keepdim=True)
    x = grey + uniform(0.4, 2.5, x, 1, 1, 1) * (x - grey)
    x = 2 ** uniform(-1, 1.5, x, 1, 1, 1) * x + uniform(-0.5, 0.5, x, c, 1, 1)
    blotches = F.interpolate(uniform(-1, 1, x, c, 4, 4), (h, w), mode="bilinear")
    x = x.clamp(-1, 1) + uniform(0, 0.3, x, 1, 1, 1) * blotches
    return (x + uniform(0, 0.2, x, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)

def classifier_steps(net, images, y, steps, batch_size, lr=3e-3, flip=False):
    """Train the classifier; yield each step's loss. Of a batch an eighth is garbage, to be called
    none, a quarter as it is, the rest augmented; all is shifted by up to 2 pixels."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(steps, 2), pct_start=0.1)
    none = torch.tensor([head.out_features - 1 for head in net.heads], device=y.device)
    for _ in range(steps):
        x, labels = get_batch(images, y, batch_size, flip)
        spoilt, plain = max(len(x) // 8, 1), len(x) * 3 // 8
        x[plain:] = augment(x[plain:])
        x[:spoilt], labels[:spoilt] = garbage(x[:spoilt]), none
        x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = sum(F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(net(x)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()

def train_classifier(folder, args, device, size, steps=None, batch_size=128):
    """Train on the train split; save model.pt and samples.png (test images that it gets wrong) into
    `folder`. Returns (classifier, accuracy on the test split: a list per factor)."""
    images, y, names = load_data(args.dataset, "train", args.data_dir, device, size)
    x, labels, _ = load_data(args.dataset, "test", args.data_dir, size=size)
    require(len(x), f"'{args.data_dir}' has one picture of each class, too few for a classifier")
    width, usual = CLASSIFIERS.get(args.dataset, (64, min(8000, max(200, len(images) // 2))))
    steps = usual if steps is None else steps
    torch.manual_seed(args.seed)
    net = Classifier(images.shape[1], [len(n) for n in names], width, images.shape[2])
    net = net.to(device, memory_format=torch.channels_last)
    print(f"classifier of {args.dataset}: {len(images)} images, {steps} steps, batch {batch_size}")
    training = classifier_steps(net, images, y, steps, batch_size, flip=args.dataset == "cifar10")
    list(progress(training, "classifier", steps))
    hit = predict(net.eval(), x) == labels
    accuracy, wrong = hit.double().mean(0).tolist(), (~hit).any(1).nonzero()[:40, 0]
    save_grid(x[wrong] if len(wrong) else x[:40], folder / "samples.png", columns=10)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(folder / "model.pt", "classifier", dict(
        names=names, args=net.args, seed=args.seed, steps=steps, accuracy=accuracy, weights=weights,
        key=data_key(args)))
    words = ", ".join(f"{factor} {100 * a:.2f} %" for factor, a in zip(FACTORS, accuracy))
    print(f"accuracy on {len(x)} test images: {words}\nwrote {folder}/model.pt and samples.png")
    return net, accuracy

def data_key(args):
    """What tells two data sets with the same names apart: a folder's files."""
    folder = Path(args.data_dir)
    return folder_key(find_images(folder, quiet=True)) if args.dataset == "folder" else ""

def load_classifier(args, device, names, size=32):
    """(classifier, its test accuracy): the newest one trained here for these names, size and
    folder, else the shipped one, else it is trained now."""
    runs, key = Path("runs", args.dataset), data_key(args)
    paths = sorted(runs.glob("classifier*/model.pt"), key=lambda path: -path.stat().st_mtime)
    for path in filter(Path.is_file, [*paths, shipped(f"{args.dataset}_classifier.pt")]):
        data = load_file(path, "classifier")
        if (data["names"], data["args"]["size"], data["key"]) == (names, size, key):
            net = Classifier(**data["args"]).to(device, memory_format=torch.channels_last)
            net.load_state_dict(data["weights"])
            return net.eval(), data["accuracy"]
        print(f"{path} knows other {args.dataset} data: not used")
    return train_classifier(run_folder(runs / "classifier"), args, device, size)

# ---- command line --------------------------------------------------------------------------------

def images_from(source, args, device):
    """(paths or uint8 images, labels, how they came, names) of REAL or FAKE; None if unknown."""
    folder, steps, seed = Path(source), args.sampler_steps, args.seed
    if source in ("train", "test"):
        x, y, names = load_data(args.dataset, source, args.data_dir, size=args.image_size)
        return *balanced(x, y, args.samples), f"{args.dataset} {source} split", names
    if folder.is_dir() and not (folder / "model.pt").is_file():
        return find_images(folder), None, "folder", None
    model, info = load_checkpoint(source, device)
    made = info["dataset"]
    require(made == args.dataset, f"{source} draws {made}; add --dataset {made}")
    y, args.image_size = repeat(all_labels(info["names"]), args.samples), model.cfg.image_size
    x = to_uint8(sample(model, y, steps, seed=seed, label="samples")).cpu()
    return x, y, f"samples, {steps} DDIM steps, guidance 2, seed {seed}", info["names"]

@torch.inference_mode()
def features_of(images, network, device, label, size, channels, resize):
    """Features (N, D) of paths or uint8 images, batch by batch: they are never all in memory.
    resize: as pytorch-fid does, each by itself, bilinear without antialiasing."""
    def prepare(image):
        if isinstance(image, Path):
            with explain(f"{image} is not a readable image; remove it"):
                image = read_image(image, None if resize else size, channels)
        x = image[None].float() / 127.5 - 1
        x = x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
        return F.interpolate(x, (size, size), mode="bilinear")

    batches = [images[i:i + 50] for i in range(0, len(images), 50)]
    prepared = (torch.cat([prepare(image) for image in batch]) for batch in batches)
    return torch.cat([network(x.to(device)).cpu() for x in progress(prepared, label, len(batches))])

def main():
    parser = stage_parser(__doc__, "fid, or classifier", samples=1000)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("real", nargs="?", metavar="REAL", type=path, help="folder, checkpoint, train or test")
    flag("fake", nargs="?", metavar="FAKE", type=path, help="the same")
    flag("--features", choices=("inception", "classifier"), help="inception for two folders")
    flag("--image-size", type=int, choices=(32, 64, 128), default=64, help="of a folder (64)")
    flag("--train-classifier", action="store_true", help="train the dataset's classifier and stop")
    args = parser.parse_args()
    device = pick_device(args.device)
    fill(args, dataset="shapes")
    if args.train_classifier:
        folder = run_folder(args.out or Path("runs", args.dataset, "classifier"))
        train_classifier(folder, args, device, args.image_size, args.steps, args.batch_size or 128)
        return
    require(args.fake, "name two sources, such as: python fid.py test assets/shapes.pt")
    sources = [args.real, args.fake]
    sources.sort(key=("train", "test").__contains__)   # a model first: it knows its image size
    found = {source: images_from(source, args, device) for source in sources}
    (real, _, real_how, real_names), (fake, y, fake_how, fake_names) = (
        found[source] for source in (args.real, args.fake))
    require(min(len(real), len(fake)) > 1, f"there are {len(real)} real and {len(fake)} fake "
            "images; FID needs at least two of each")
    kind = args.features or ("inception" if real_how == fake_how == "folder" else "classifier")
    result, accuracy = {"stage": "fid", "real": args.real, "fake": args.fake}, None
    if kind == "inception":
        network, how = inception(device), (299, 3, True)
    else:
        x, _, names = load_data(args.dataset, "test", args.data_dir, size=args.image_size)
        for source, known in ((args.real, real_names), (args.fake, fake_names)):
            require(known in (None, names), f"{source} knows other names than '{args.data_dir}'; "
                    "give the folder that it was trained on with --data-dir")
        judge, accuracy = load_classifier(args, device, names, x.shape[2])
        network, how = judge.features, (x.shape[2], x.shape[1], False)
        for name, hit in zip(FACTORS, () if y is None else (predict(judge, fake) == y).T):
            result.update(zip((name, f"{name}_low", f"{name}_high"), share(hit)))
            print(f"{name} recognised: {percent(result, name)} %")
    f1 = features_of(real, network, device, "real", *how).numpy()
    f2 = features_of(fake, network, device, "fake", *how).numpy()
    reference = moments(f1)
    result["fid"] = frechet_distance(reference, moments(f2))
    print(f"FID ({kind} features): {result['fid']:.3f}", flush=True)
    result["precision"], result["recall"] = precision_recall(f1, f2)
    result["fid_error"] = fid_error(reference, f2)
    print(f"standard error {result['fid_error']:.3f}, precision {result['precision']:.3f}, recall "
          f"{result['recall']:.3f}\nreal: {len(real)}, {real_how}; fake: {len(fake)}, {fake_how}")
    result["protocol"] = {"real": real_how, "real_images": len(real), "fake": fake_how,
                          "fake_images": len(fake), "fid_features": kind, "precision_subset": 2000,
                          "classifier_test_accuracy": accuracy}
    folder = run_folder(args.out or Path("runs", args.dataset, "fid"))
    rows = [[x[i * len(x) // 20] for i in range(20)] for x in (real, fake)]
    shown = features_of(sum(rows, []), nn.Identity(), "cpu", None, 64, 3, False)
    save_grid(shown, folder / "samples.png", columns=20, scale=1)
    write_text(folder / "result.json", json.dumps({**result, "args": vars(args)}, indent=1))
    print(f"wrote {folder}/result.json and samples.png (above: real, below: fake)")

if __name__ == "__main__":
    run(main)
