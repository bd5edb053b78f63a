"""Evaluation: the classifier, UA / IRA / CRA / AR with their intervals, FID, precision and recall.

    python fid.py --train-classifier                           # shapes: how assets/shapes_classifier.pt was made
    python fid.py --train-classifier --dataset fashion
    python fid.py test runs/shapes/pretrain/model.pt           # a model's samples against the real test images
    python fid.py real_folder fake_folder                      # two folders of images, InceptionV3 as in pytorch-fid
    python fid.py real_folder fake_folder --features classifier --dataset shapes

REAL and FAKE are each a folder of images, a checkpoint (samples are drawn from it), or "train" or "test" (the
dataset's real images). FID uses InceptionV3 for two folders, and for the rest the features of the dataset's own
classifier, which know what matters in it; the two are never comparable, and the output always names the features.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

from model import (FACTORS, Parser, Progress, autocast_on, cached, fail, load_checkpoint, machine, model_file,
                   pick_device, read_file, run_folder, run_script, sample, save_grid, save_torch, shipped, to_uint8,
                   write_json)
from train_ddpm import (Loop, all_labels, common_flags, dataset_flag, find_images, get_batch, having, label_names,
                        learning_rate, load_data, same_data, show_labels)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")          # the name ends with the start of its SHA-256
CLASSIFIER = {                                                    # width, steps at batch 128
    "shapes": (16, 600), "fashion": (32, 1500), "cifar10": (64, 8000), "folder": (64, 8000),
}
# What a kept evaluation depends on besides its inputs: change a line here, and nothing old is looked up.
CODE = [Path(__file__).with_name(name).read_bytes() for name in ("model.py", "train_ddpm.py", "fid.py")]


# ---- the classifier --------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small CNN that names the class (and the style). x (B, C, size, size) in [-1, 1] -> a list of logits per factor,
    whose last entry stands for "none of these": without it noise must be called something, and was called a square.

    `features(x)` (B, 4 * width) are what it knows about an image before naming it; they serve as FID features.
    """

    def __init__(self, channels, classes, width, size=32):
        super().__init__()
        self.args = dict(channels=channels, classes=list(classes), width=width, size=size)
        block = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b),
                                                   nn.ReLU())
        w = width
        self.body = nn.Sequential(block(channels, w, size // 32), block(w, 2 * w, 2), block(2 * w, 2 * w, 1),
                                  block(2 * w, 4 * w, 2), block(4 * w, 4 * w, 1), block(4 * w, 4 * w, 2))
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(64 * w, 4 * w), nn.ReLU())       # keeps where things are
        self.heads = nn.ModuleList(nn.Linear(4 * w, n + 1) for n in classes)

    def features(self, x):
        return self.embed(self.body(x))

    def forward(self, x):
        h = self.features(x)
        return [head(h) for head in self.heads]


@torch.inference_mode()
def in_batches(f, images, batch=250, label=None):
    """f over images (N, C, H, W), uint8 or float in [-1, 1], in batches; the results concatenated on the CPU."""
    bar, out = Progress(label, math.ceil(len(images) / batch), "batch"), []
    for part in images.split(batch):
        out.append(f(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part).cpu())
        bar.step()
    bar.close()
    return torch.cat(out)


def predict(classifier, images):
    """The recognised value of every factor, (N, F), for images (N, C, H, W); its number of values stands for none."""
    return in_batches(lambda x: torch.stack([logits.argmax(1) for logits in classifier(x)], 1), images)


def garbage(x):
    """What a ruined model may draw in place of x (n, C, H, W): pixel noise, smooth noise or one flat colour, with at
    most a shadow (10 %) of x in it."""
    n, c, h, w = x.shape
    uniform = lambda *size: torch.rand(n, c, *size, device=x.device) * 2 - 1
    kinds = torch.stack([uniform(h, w), F.interpolate(2 * uniform(5, 5), (h, w), mode="bilinear"),
                         uniform(1, 1).expand(-1, -1, h, w)])
    noise = kinds[torch.randint(3, (n,), device=x.device), torch.arange(n, device=x.device)]
    shadow = 0.1 * torch.rand(n, 1, 1, 1, device=x.device)
    return (shadow * x + (1 - shadow) * noise).clamp(-1, 1)


def worn(x):
    """x (n, C, H, W) as a half-trained model would draw it: paler, under a colour cast and blotches, with pixel noise.
    Such an image must still be recognised: what comes back seldom comes back clean."""
    n, c, h, w = x.shape
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(n, *size, device=x.device)
    blotches = F.interpolate(uniform(-1, 1, c, 4, 4), (h, w), mode="bilinear")
    x = uniform(0.5, 1, 1, 1, 1) * x + uniform(-0.3, 0.3, c, 1, 1) + uniform(0, 0.3, 1, 1, 1) * blotches
    return (x + uniform(0, 0.2, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def train_classifier(dataset, data_dir, device, size, seed=0, steps=None, batch_size=128, lr=3e-3, **keep):
    """Train on the train split; returns (classifier, accuracy on the test split per factor, the Loop). Images are
    shifted by up to 2 pixels; half of every batch is worn, and an eighth is garbage, to be called none."""
    torch.manual_seed(seed)
    images, y, names = load_data(dataset, "train", data_dir, device, size)
    width, default_steps = CLASSIFIER[dataset]
    steps = default_steps if steps is None else steps
    net = Classifier(images.shape[1], [len(n) for n in names], width, images.shape[2])
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    settings = dict(dataset=dataset, seed=seed, steps=steps, batch_size=batch_size, lr=lr)
    none = torch.tensor([len(n) for n in names], device=device)
    loop = Loop("classifier", steps, settings=settings, model=net, optimizer=optimizer, **keep)
    for step in loop:
        x, labels = get_batch(images, y, batch_size, flip=dataset == "cifar10")
        dx, dy = torch.randint(-2, 3, (2,)).tolist()
        x = x.roll((dx, dy), (2, 3)) + 0.05 * torch.randn_like(x)
        spoilt, half = max(len(x) // 8, 1), len(x) // 2
        x[half:] = worn(x[half:])
        x[:spoilt], labels[:spoilt] = garbage(x[:spoilt]), none
        loss = sum(F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(net(x)))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, 100, cosine=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loop.loss = loss.detach()
    net.eval()
    x, labels, _ = load_data(dataset, "test", data_dir, device, size)
    return net, (predict(net, x) == labels.cpu()).double().mean(0).tolist(), loop


def save_classifier(path, net, dataset, accuracy):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_torch(path, {"format": 1, "kind": "classifier", "dataset": dataset, "args": net.args, "accuracy": accuracy,
                      "weights": weights})


def load_classifier(dataset, data_dir, device, names, size=32):
    """The dataset's classifier: the one trained here, else the shipped one, else it is trained now. names and size say
    what it must know and see."""
    trained = Path("runs", dataset, "classifier", "model.pt")
    path = trained if trained.is_file() else shipped(f"{dataset}_classifier.pt")
    if not path.is_file():
        print(f"{dataset} has no classifier yet; training one (kept in {trained})")
        with torch.random.fork_rng():              # whether there was one already must not change the caller's seed
            net, accuracy, _ = train_classifier(dataset, data_dir, device, size)
        save_classifier(trained, net, dataset, accuracy)
        path = trained
    data = read_file(path, "classifier")
    try:
        net = Classifier(**data["args"])
        net.load_state_dict(data["weights"])
        if (net.args["classes"], net.args["size"]) != ([len(n) for n in names], size):
            raise ValueError("other labels or another image size")
    except (RuntimeError, TypeError, KeyError, ValueError) as e:
        fail(f"{path} does not fit ({str(e).splitlines()[0]}); delete it, or train it again with "
             f"'python fid.py --train-classifier --dataset {dataset}'")
    return net.float().to(device, memory_format=torch.channels_last).eval(), data["accuracy"]


# ---- Frechet distance, precision and recall --------------------------------------------------------------------

def statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64 numpy."""
    f = np.asarray(features, dtype=np.float64)
    return f.mean(0), np.cov(f, rowvar=False)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), Heusel et al. 1706.08500.

    The trace of the root is the sum of the roots of the eigenvalues of cov1^(1/2) cov2 cov1^(1/2): two symmetric
    eigen-decompositions, several times faster than a general matrix root of the product, and never complex.
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross))    # rounding aside


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 1904.06991) of features (N, D) and (M, D), each in 0..1.

    Precision: share of fake features that lie within the k-th neighbour's distance of some real one; recall: vice
    versa.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()

    def covered(points, centres):
        radius = torch.cdist(centres, centres).kthvalue(min(k + 1, len(centres)), 1).values    # the first is itself
        return (torch.cdist(points, centres) <= radius).any(1).double().mean().item()
    return covered(fake, real), covered(real, fake)


def wilson(hits, n, z=1.96):
    """95 % Wilson interval (low, high) of a proportion hits/n."""
    p, centre = hits / n, (hits / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def inception(weights=None, device="cpu"):
    """InceptionV3 with FID's weights: a function from images (N, C, H, W) in [-1, 1] to features (N, 2048), and the
    network itself.

    It is pytorch-fid's network: torchvision's with 1,008 outputs, except that the pooling branches leave the padding
    out of their averages, and that the last block takes the maximum instead. Images are resized to 299 x 299
    (bilinear, not antialiased). weights: a file; without it the release file is downloaded and its checksum verified.
    """
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(state)
    except Exception as e:         # network, checksum, file and format errors alike end in one line
        fail(f"Inception's weights cannot be loaded ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:90]}); get "
             f"{INCEPTION_URL} and name it with --inception-weights, or use --features classifier")

    def repool(block, pool):
        kept = {}
        block.register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
        block.branch_pool.register_forward_pre_hook(lambda _, args: (pool(kept.pop("x")),))

    average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        repool(getattr(net, f"Mixed_{name}"), average)
    repool(net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
    net.fc = nn.Identity()
    net = net.to(device).eval()
    return lambda x: net(F.interpolate(x.to(device).expand(-1, 3, -1, -1), (299, 299), mode="bilinear")), net


# ---- evaluation of a conditional model -------------------------------------------------------------------------

def balanced(images, y, per_cell):
    """The first per_cell images of every label combination that occurs in y (N, F)."""
    cells = torch.unique(y, dim=0)
    index = torch.cat([(y == cell).all(1).nonzero()[:per_cell, 0] for cell in cells])
    return images[index], y[index]


def reference_features(classifier, images, y, n=4500):
    """The features (about n, D) that samples are compared with: of equally many images of every label combination."""
    images, _ = balanced(images, y, max(1, n // len(torch.unique(y, dim=0))))
    return in_batches(classifier.features, images)


def split_labels(names, gone, samples):
    """Labels to sample: (forgotten (N1, F), retained (N2, F)). A third of `samples` goes to the conditions with a value
    of gone, {factor: [value, ...]}, the rest to the others, spread evenly over all combinations (at least one each)."""
    cells = all_labels(names, 1)
    lost = having(cells, gone)
    share = lambda part, n: part.repeat_interleave(max(1, round(n / max(len(part), 1))), 0)
    return share(cells[lost], samples / 3), share(cells[~lost], samples * 2 / 3)


def score(images, y, classifier, gone, factor, names, real_features):
    """The metrics of samples (N, C, H, W) drawn for labels y (N, F): shares as fractions with 95 % intervals.

    ua: samples of the forgotten conditions, those with a value of gone, in which no forgotten value that was asked for
    is recognised; ua_of says it for each value alone. ira: samples of the retained conditions whose value of `factor`
    is recognised. cra: the same samples, the other factor (None if there is none). fid, precision, recall: the retained
    samples against real_features (M, D). Source of the names: UnlearnCanvas (Zhang et al. 2402.11846).
    """
    hit = predict(classifier, images) == y
    asked = {(f, v): y[:, f] == v for f, values in gone.items() for v in values}
    shown = torch.stack([hit[:, f] & of for (f, _), of in asked.items()]).any(0)
    forgotten = torch.stack(list(asked.values())).any(0)
    result = {}

    def put(name, hits):
        n = len(hits)
        low, high = wilson(int(hits.sum()), n) if n else (None, None)
        result.update({name: float(hits.double().mean()) if n else None, f"{name}_low": low, f"{name}_high": high,
                       f"{name}_samples": n})
    put("ua", ~shown[forgotten])
    put("ira", hit[~forgotten, factor])
    put("cra", hit[~forgotten, 1 - factor] if y.shape[1] > 1 else hit[:0, 0])
    result["ua_of"] = {f"{FACTORS[f]} {names[f][v]}": float((~hit[of, f]).double().mean())
                       for (f, v), of in asked.items()}
    kept = images[~forgotten]
    if len(kept) > 1 and len(real_features) > 1:
        features = in_batches(classifier.features, kept)
        result["fid"] = frechet_distance(*statistics(real_features), *statistics(features))
        result["precision"], result["recall"] = precision_recall(real_features[:2000], features)
    else:
        result.update(fid=None, precision=None, recall=None)
    result["fid_features"] = "classifier"
    return result


def evaluate(model, classifier, names, gone, factor, real_features, samples=240, steps=20, guidance=2.0, seed=1234,
             label="evaluation", keep=False, retained=True):
    """Sample forgotten and retained conditions (DDIM, guided) and score them. Returns (metrics, images uint8, labels).
    keep: look the answer up if this model has been evaluated like this before, else keep it. retained=False: the
    forgotten conditions alone."""
    y = torch.cat(split_labels(names, gone, samples)[:2 if retained else 1])

    def compute():
        images = sample(model, y, steps=steps, guidance=guidance, seed=seed, label=label)
        return score(images, y, classifier, gone, factor, names, real_features), to_uint8(images).cpu(), y
    if not keep:
        return compute()
    device = model.null.device.type
    return cached(compute, *CODE, model, model.cfg, classifier, real_features, y, steps, guidance, seed, gone, factor,
                  device, autocast_on(model.null.device))


def pick(images, y, wanted):
    """For each row of wanted (M, F) one of the images (N, C, H, W) whose label in y (N, F) it is, in turn."""
    used, index = {}, []
    for label in wanted.tolist():
        matches = (y == torch.tensor(label, device=y.device)).all(1).nonzero().flatten()
        used[tuple(label)] = used.get(tuple(label), -1) + 1
        index.append(matches[used[tuple(label)] % len(matches)])
    return images[torch.stack(index)]


def save_before_after(path, names, gone, y, before, after):
    """The picture of two evaluations, images (N, C, H, W) drawn for labels y (N, F): one above the other. What is
    gone, {factor: [value, ...]}, is shown in any case."""
    wanted, layout = show_labels(names, wanted=gone)
    rows = [f"{when} {style}" for when in ("before", "after") for style in layout["rows"] or ("", "", "", "")]
    save_grid(torch.cat([pick(images, y, wanted) for images in (before, after)]), path, **{**layout, "rows": rows})


def protocol(dataset, names, metrics, real_features, accuracy, steps, guidance, seed, train_seed, device):
    """What a reader needs to reproduce the numbers."""
    return {"dataset": dataset, "classes": [len(n) for n in names], "forget_samples": metrics["ua_samples"],
            "retain_samples": metrics["ira_samples"], "real_images": len(real_features), "real_split": "train",
            "sampler": "ddim", "sampler_steps": steps, "eta": 0, "guidance": guidance, "sampling_seed": seed,
            "seed": train_seed, "fid_features": "classifier", "classifier_test_accuracy": accuracy,
            "machine": machine(device)}


def percent(metrics, name):
    """"97.5 % [94.2, 99.0]" for a share in metrics, or "-"."""
    if metrics.get(name) is None:
        return "-"
    return f"{100 * metrics[name]:.1f} % [{100 * metrics[name + '_low']:.1f}, {100 * metrics[name + '_high']:.1f}]"


# ---- command line ----------------------------------------------------------------------------------------------

def read_folder(folder):
    """All images under a folder as uint8 (N, 3, H, W); all must have one size."""
    paths = find_images(folder)
    if len(paths) < 2:
        fail(f"{folder} holds {len(paths)} images; FID needs at least two (.png, .jpg, .bmp, .webp)")
    images = []
    for path in paths:
        try:
            images.append(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1))
        except OSError:
            fail(f"{path} is not a readable image; remove it")
        if images[-1].shape != images[0].shape:
            fail(f"{path} has another size than {paths[0]}; resize the images to one size")
    return torch.stack(images)


def images_from(source, args, device):
    """(uint8 images, labels or None, how they came) for a folder, a checkpoint, or "train"/"test"."""
    if source in ("train", "test"):
        x, y, names = load_data(args.dataset, source, args.data_dir, size=args.image_size)
        x, y = balanced(x, y, max(1, args.samples // len(all_labels(names, 1))))
        return x, y, f"{args.dataset} {source} split"
    path = model_file(source)
    if Path(source).is_dir() and not path.is_file():
        return read_folder(source), None, "folder"
    model, info = load_checkpoint(path, device)
    if info["dataset"] != args.dataset:
        fail(f"{path} draws {info['dataset']}; add --dataset {info['dataset']}")
    y = all_labels(info["names"], 1)
    y = y.repeat_interleave(max(1, args.samples // len(y)), 0)
    x = sample(model, y, steps=args.sampler_steps, guidance=args.guidance, sampler=args.sampler, seed=args.seed,
               label="samples")
    steps = 1000 if args.sampler == "ddpm" else args.sampler_steps
    how = f"samples, {steps} {args.sampler.upper()} steps, guidance {args.guidance:g}, seed {args.seed}"
    return to_uint8(x).cpu(), y, how


def main():
    parser = Parser(__doc__)
    parser.add_argument("real", nargs="?", metavar="REAL", help="folder, checkpoint, run folder, train or test")
    parser.add_argument("fake", nargs="?", metavar="FAKE", help="the same")
    dataset_flag(common_flags(parser, 1000, "images of a checkpoint or of a split", 50))
    group = parser.add_argument_group("evaluation")
    group.add_argument("--features", choices=("inception", "classifier"), help="default: inception for two folders, "
                       "else the dataset's classifier")
    group.add_argument("--inception-weights", metavar="FILE", help="pytorch-fid's weights, if there is no network")
    group.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="for checkpoints")
    group.add_argument("--train-classifier", action="store_true", help="train the dataset's classifier and stop "
                       "(--steps, --batch-size, --lr and --resume are for this)")
    args = parser.parse_args()
    device, started = pick_device(args.device), time.time()

    if args.train_classifier:
        folder = run_folder(args.out, Path("runs") / args.dataset / "classifier", args.resume)
        options = {k: v for k in ("steps", "batch_size", "lr") if (v := getattr(args, k)) is not None}
        net, accuracy, loop = train_classifier(args.dataset, args.data_dir, device, args.image_size, args.seed,
                                               path=folder / "train.pt", resume=args.resume, **options)
        save_classifier(folder / "model.pt", net, args.dataset, accuracy)
        x, y, _ = load_data(args.dataset, "test", args.data_dir, device, args.image_size)
        wrong = (predict(net, x) != y.cpu()).any(1).nonzero()[:40, 0]
        save_grid(x[wrong if len(wrong) else slice(0, 40)], folder / "samples.png", columns=10)
        write_json(folder / "result.json", {
            "stage": "classifier", "dataset": args.dataset, "accuracy": dict(zip(FACTORS, accuracy)),
            "args": vars(args),
            "protocol": {"split": "test", "images": len(x), "seed": args.seed}, "steps": loop.steps,
            "seconds": loop.data["seconds"]})
        print("accuracy on the test split: " + ", ".join(f"{f} {100 * a:.2f} %" for f, a in zip(FACTORS, accuracy)))
        size = f" --image-size {args.image_size}" if args.image_size != 64 else ""
        model = "assets/shapes.pt" if args.dataset == "shapes" else f"runs/{args.dataset}/pretrain"
        print(f"wrote {folder}/model.pt, and samples.png with images it gets wrong\n"
              f"next: python fid.py test {model} --dataset {args.dataset}{same_data(args)}{size}")
        return
    if not args.real or not args.fake:
        fail("name two sources, such as: python fid.py test assets/shapes.pt; see 'python fid.py --help'")

    (real, _, real_how), (fake, y, fake_how) = (images_from(s, args, device) for s in (args.real, args.fake))
    if min(len(real), len(fake)) < 2:
        fail(f"there are {len(real)} real and {len(fake)} fake images; FID needs at least two of each")
    kind = args.features or ("inception" if real_how == fake_how == "folder" else "classifier")
    result = {"stage": "fid", "dataset": args.dataset, "real": args.real, "fake": args.fake, "fid_features": kind}
    accuracy = None
    if kind == "inception":
        extract, network = inception(args.inception_weights, device)
    else:
        names, size = label_names(args.dataset, args.data_dir), real.shape[2] if args.dataset == "folder" else 32
        if real.shape[2:] != (size, size) or fake.shape[2:] != (size, size):
            fail(f"the classifier looks at {size} x {size} images only; use --features inception for these")
        classifier, accuracy = load_classifier(args.dataset, args.data_dir, device, names, size)
        channels = classifier.args["channels"]
        real, fake = (x.float().mean(1, keepdim=True).to(torch.uint8) if x.shape[1] > channels else
                      x.expand(-1, channels, -1, -1) for x in (real, fake))
        extract, network = lambda x: classifier.features(x.to(device)), classifier
        if y is not None:
            hits = predict(classifier.cpu(), fake) == y
            classifier.to(device)
            for i, factor in enumerate(FACTORS[:y.shape[1]]):
                low, high = wilson(int(hits[:, i].sum()), len(hits))
                result.update({factor: hits[:, i].double().mean().item(), f"{factor}_low": low, f"{factor}_high": high})
                print(f"{factor} recognised: {percent(result, factor)}")
    f1 = cached(lambda: in_batches(extract, real, 50, "real"), *CODE, real, kind, network)
    f2 = in_batches(extract, fake, 50, "fake")
    result["fid"] = frechet_distance(*statistics(f1), *statistics(f2))
    result["precision"], result["recall"] = precision_recall(f1, f2)
    result["protocol"] = {"dataset": args.dataset, "real_images": len(real), "fake_images": len(fake), "real": real_how,
                          "fake": fake_how, "fid_features": kind, "seed": args.seed,
                          "classifier_test_accuracy": accuracy, "machine": machine(device)}
    result.update(args=vars(args), seconds=round(time.time() - started, 1), steps=0)
    print(f"FID ({kind} features): {result['fid']:.3f}   precision {result['precision']:.3f}   recall "
          f"{result['recall']:.3f}\nreal: {len(real)} images, {real_how}; fake: {len(fake)} images, {fake_how}")
    folder = run_folder(args.out, Path("runs") / args.dataset / "fid")
    n = min(40, len(real), len(fake))
    pick = lambda x: x[torch.linspace(0, len(x) - 1, n).long()].expand(-1, 3, -1, -1)
    if real.shape[2:] == fake.shape[2:]:
        save_grid(torch.cat([pick(real), pick(fake)]), folder / "samples.png", columns=n)
    write_json(folder / "result.json", result)
    print(f"wrote {folder}/result.json and samples.png (above: real, below: fake)")


if __name__ == "__main__":
    run_script(main)
