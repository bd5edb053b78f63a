"""Stage 2: make a trained model stop generating a class or a style.

    python unlearn.py --method dimum --cls 1           # DiMUM: memorise another class for "square"
    python unlearn.py --method salun --cls square      # names work as well as numbers
    python unlearn.py --method dimum --style sketch    # a style; with --cls, too, both
    python unlearn.py --method sfron --cls 1 --eval-every 25         # follow UA and FID on the way
    python unlearn.py --method dimum --cls 1 --alternative mix --alt-size 50
    python unlearn.py --method dimum --cls 1 --learn unet            # into dimum-cls1-unet
    python unlearn.py --style neon --ckpt runs/shapes/dimum-cls1     # both are forgotten then

Leaves runs/<dataset>/<method>-cls1/: model.pt, result.json (the metrics at every point), log.csv,
loss.png, samples.png (above: before, below: after). D_f is what to forget and D_r what is retained,
c_f the forgotten label and c' its substitute; l(D) is the diffusion loss, the mean over pixels.
"""
import copy
import math
import os
import shlex
from pathlib import Path

import torch

from fid import prepare_evaluation, save_before_after, train_and_measure
from model import (FACTORS, T, add_noise, antithetic_times, checkpoint_file, diffusion_loss,
                   drop_labels, explain, fail, find_pairs, find_value, guided_output, matches,
                   matches_alone, number, pairs_slug, pairs_text, require, run, run_folder, sample,
                   save_plot, say, shipped, to_uint8, value_flags)
from train_ddpm import (UNREADABLE, descend, get_batch, learnable, load_run, read_image,
                        save_result, say_next, set_defaults, stage_parser, started_from,
                        write_losses)

class Data:
    """What a run forgets and retains, as random batches: x (n, C, H, W) in [-1, 1], labels y (n, F),
    whose column 0 is the class and column 1 the style (the factors 0 and 1).
    forget: the (factor, value) pairs to forget now; forgotten: these, and those that the model has
    forgotten before, of which no image is ever drawn, also where it shows what is to be forgotten
    now."""
    def __init__(self, images, y, names, forget, forgotten, args):
        to_retain = ~matches(y, forgotten)
        to_forget = matches_alone(y, forget, forgotten)
        require(to_forget.any() and to_retain.any(), "there is no image to forget, or none to "
                "retain; forget fewer values")
        self.forget_pairs = forget
        self.retain_set = images[to_retain], y[to_retain]
        self.forget_set = images[to_forget], y[to_forget]
        self.substitutes = substitutes(names, forget, forgotten, args.alternative)     # c' of each
        self.alternative_set = alternative_set(self.retain_set, self.substitutes, forget, args)
        self.n = args.batch_size
        self.flip = args.dataset == "cifar10"  # half are mirrored, as in the public code
        self.pixels = images[0].numel()        # C*H*W: the public code sums over pixels

    def retain(self):
        return get_batch(*self.retain_set, self.n, self.flip)

    def forget(self):
        return get_batch(*self.forget_set, self.n, self.flip)

    def alternative(self):
        """Images of c', labelled c_f."""
        return get_batch(*self.alternative_set, self.n, self.flip)

    def replaced(self, y):
        """Labels y with c' in place of c_f."""
        y = y.clone()
        for (factor, value), other in self.substitutes.items():
            y[:, factor] = torch.where(y[:, factor] == value, other, y[:, factor])
        return y

# ---- the methods: generators that take a step, yield its loss, and so on -------------------------
# fid.train_and_measure asks for one step after the other; between two steps it may draw samples.

def dimum(model, data, optimizer, args):
    """DiMUM: minimise l(D_r) + lambda * l(images of c' labelled c_f).

    The forgotten label is not pushed away from what it drew: it memorises something else, with the
    ordinary loss, which converges. Source: Yuan et al. 2512.03564. Its full text was not at hand:
    that the second term is the plain diffusion loss, without label dropout, is our reading of its
    abstract.
    """
    for _ in range(args.steps):
        keep = diffusion_loss(model, *data.retain()).mean()
        memorise = diffusion_loss(model, *data.alternative(), p_drop=0).mean()
        yield descend(keep + args.weight * memorise, model, optimizer)

def salun(model, data, optimizer, args, masked=True):
    """SalUn: minimise MSE(network(x_t, c_f), network(x_t, c')) on noised D_f + alpha * C*H*W *
    l(D_r), on the half of the weights that is most salient for D_f.

    Source: Fan et al. 2310.12508; saliency_unlearn of OPTML-Group/Unlearn-Saliency, which drops
    labels in both branches independently, and clips before it masks (alpha = weight, small because
    the sum over pixels is large).
    """
    mask = saliency_mask(model, data) if masked else None
    for _ in range(args.steps):
        x0, y = data.forget()
        t = antithetic_times(len(x0), x0.device)
        x_t, _ = add_noise(model, x0, t, torch.randn_like(x0))
        output = model(x_t, t, drop_labels(y, model))
        with torch.no_grad():                  # the target is a constant: c' itself must not move
            target = model(x_t, t, drop_labels(data.replaced(y), model))
        keep = data.pixels * diffusion_loss(model, *data.retain()).mean()
        loss = (output - target).square().mean() + args.weight * keep
        yield descend(loss, model, optimizer, mask)

def guided_gradients(model, draw, batches, guidance=2.0):
    """Yield the gradients, a list like learnable(model), of the *guided* output's summed-pixel
    loss, clipped to norm 1, for each of `batches` batches of draw(). The network is in eval mode
    until the last one was taken. Source: generate_mask and generate_fisher of the public SalUn and
    SFRon code, which take the guided output."""
    model.eval()
    for _ in range(batches):
        x0, y = draw()
        t = antithetic_times(len(x0), x0.device)
        x_t, target = add_noise(model, x0, t, torch.randn_like(x0))
        error = guided_output(model, x_t, t, y, guidance) - target
        model.zero_grad()
        error.square().sum((1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(learnable(model), 1.0)
        yield [p.grad.clone() for p in learnable(model)]
    model.train()

def saliency_mask(model, data, batches=40):
    """SalUn's mask: True for the half of all learnable weights whose forget loss gradients, summed
    over batches with their signs, are largest. Source: 2310.12508 equation 4 with the median as its
    threshold; of equal gradients the first ones count as larger, so that it is always half."""
    total = [torch.zeros_like(p) for p in learnable(model)]
    for gradients in guided_gradients(model, data.forget, batches):
        total = [a + g for a, g in zip(total, gradients)]
    flat = torch.cat([g.abs().flatten() for g in total])
    largest = flat.argsort(descending=True, stable=True)[:len(flat) // 2]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[largest] = True
    parts = mask.split([g.numel() for g in total])
    return [part.view_as(g) for part, g in zip(parts, total)]

def rl(model, data, optimizer, args):
    """Random label: SalUn without the mask (baseline)."""
    yield from salun(model, data, optimizer, args, masked=False)

def sfron(model, data, optimizer, args):
    """SFRon: a masked step *up* the forget loss, in which each example counts by 1/loss^0.5
    (normalised over the batch) and whose strength falls from `weight` along a cosine; then a step
    down l(D_r). Both together are one step of the run, whose loss is l(D_r) per pixel.

    Source: Huang et al. 2409.19732; sfron_forget with "adaga" and "ron" in
    K1nght/Unified-Unlearning-w-Remain-Geometry, which masks before it clips.
    """
    mask = fisher_mask(model, data)
    for step in range(args.steps):
        losses = data.pixels * diffusion_loss(model, *data.forget())
        counts = 1 / (losses.detach().sqrt() + 1e-8)
        strength = args.weight * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        weighted = counts / counts.sum() * losses
        forget = -strength * weighted.sum()
        descend(forget, model, optimizer, mask, mask_first=True)
        keep = data.pixels * diffusion_loss(model, *data.retain()).mean()
        yield descend(keep, model, optimizer) / data.pixels

def fisher_mask(model, data, batches=40):
    """SFRon's mask: True for the weights whose Fisher diagonal (mean squared batch gradient) on
    D_f is at least that on D_r. Source: 2409.19732 section 4, generate_fisher_mask there,
    threshold 1."""
    fisher = []
    for draw in (data.forget, data.retain):
        total = [torch.zeros_like(p) for p in learnable(model)]
        for gradients in guided_gradients(model, draw, batches):
            total = [a + g.square() / batches for a, g in zip(total, gradients)]
        fisher.append(total)
    return [(f + 1e-15) / (r + 1e-15) >= 1 for f, r in zip(*fisher)]

def ga(model, data, optimizer, args):
    """Gradient ascent: minimise l(D_r) - weight * l(D_f) (baseline)."""
    for _ in range(args.steps):
        keep = diffusion_loss(model, *data.retain()).mean()
        forget = diffusion_loss(model, *data.forget()).mean()
        yield descend(keep - args.weight * forget, model, optimizer)

def finetune(model, data, optimizer, args):
    """Fine-tuning: minimise l(D_r); what is forgotten is forgotten by itself (baseline)."""
    for _ in range(args.steps):
        yield descend(diffusion_loss(model, *data.retain()).mean(), model, optimizer)

def swap(model, data, optimizer, args):
    """Copy the embedding of c' over that of c_f, then fine-tune for args.steps, by default none
    (baseline). All other weights still know what c_f drew; retained data cannot bring it back,
    because they send the row of c_f no gradient."""
    with torch.no_grad():
        for factor, value in data.forget_pairs:
            table = model.label_embs[factor].weight
            table[value] = table[data.substitutes[factor, value]].clone()
    yield from finetune(model, data, optimizer, args)

def esd(model, data, optimizer, args):
    """ESD: minimise MSE(network(x_t, c_f), eps(null) - eta * (eps(c_f) - eps(null)) of a frozen copy
    of the model) on noised D_f: away from the label, as negative guidance goes. Only the label
    embeddings and their MLPs learn, and no label is dropped.

    Source: Gandikota et al. 2303.07345 equation 5, eta = weight. There x_t is sampled from the
    model; noised images of D_f stand for it here. v is affine in eps, so that the same
    formula holds for a v network.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    mask = [torch.full_like(p, name.startswith("label_"), dtype=torch.bool)
            for name, p in model.named_parameters()]
    for _ in range(args.steps):
        x0, y = data.forget()
        t = antithetic_times(len(x0), x0.device)
        x_t, _ = add_noise(model, x0, t, torch.randn_like(x0))
        cond = frozen(x_t, t, y)
        null = frozen(x_t, t, model.null.expand_as(y))
        target = null - args.weight * (cond - null)
        loss = (model(x_t, t, y) - target).square().mean()
        yield descend(loss, model, optimizer, mask, mask_first=True)

def sa(model, data, optimizer, args, replayed=200, examples=50):
    """Selective Amnesia: minimise C*H*W * (l(uniform noise labelled c_f) + l(replayed samples)) +
    weight * sum of Fisher * (weights' change)^2, without label dropout.

    Source: Heng & Soh 2305.10120; train_forget of clear-nus/selective-amnesia, whose factor gamma
    before the replay is 1. The replayed samples are drawn once, before the first step, by the model
    itself, of retained conditions only; the Fisher diagonal is that of these.
    """
    start = [p.detach().clone() for p in learnable(model)]
    conditions = torch.unique(data.retain_set[1], dim=0)
    labels = conditions.repeat_interleave(math.ceil(replayed / len(conditions)), 0)
    replayed_images = to_uint8(sample(model, labels, steps=20, seed=99, label="sa: replay"))
    replay = replayed_images, labels
    fisher = fisher_diagonal(model, *get_batch(*replay, examples))
    for _ in range(args.steps):
        x0, y = data.forget()
        noise = torch.rand_like(x0) * 2 - 1
        forget = diffusion_loss(model, noise, y, p_drop=0).mean()
        replayed_batch = get_batch(*replay, data.n, data.flip)
        keep = diffusion_loss(model, *replayed_batch, p_drop=0).mean()
        moved = zip(fisher, learnable(model), start)
        change = sum((f * (p - p0).square()).sum() for f, p, p0 in moved)
        loss = data.pixels * (forget + keep) + args.weight * change
        yield descend(loss, model, optimizer) / data.pixels

def fisher_diagonal(model, x0, y, times=10):
    """Selective Amnesia's Fisher diagonal, a list like learnable(model): the gradient of an
    example's summed-pixel loss, summed over timesteps, squared; the mean over examples (x0 (N, C,
    H, W), y (N, F)).

    Source: save_fim of clear-nus/selective-amnesia. It takes all 1,000 timesteps; here `times`
    random ones stand for them. (fisher_mask squares the gradients of whole batches instead.)
    """
    params = learnable(model)
    total = [torch.zeros_like(p) for p in params]
    model.eval()
    for x, label in zip(x0, y):
        x = x.expand(times, -1, -1, -1)
        label = label.expand(times, -1)
        t = torch.randperm(T, device=x.device)[:times]
        x_t, target = add_noise(model, x, t, torch.randn_like(x))
        loss = (model(x_t, t, label) - target).square().sum() * (T / times)
        for a, g in zip(total, torch.autograd.grad(loss, params)):
            a += g.square() / len(x0)
    model.train()
    return total

# ---- what a method changes, and at which rate ----------------------------------------------------

def choose_learning(model, part):
    """Let a part of the network learn: "label" is the label's path (the embeddings, their MLPs, the
    projections of label and time in the blocks), "unet" is the rest, "all" are both."""
    for name, p in model.named_parameters():
        in_path = name.startswith("label_") or ".emb." in name
        p.requires_grad_(part == "all" or in_path == (part == "label"))

def cosine(training, optimizer, steps):
    """The steps of a method, while its learning rate falls to 0 along a cosine: a generator waits
    after each step, and the optimiser takes the next one with the new rate."""
    lr = optimizer.param_groups[0]["lr"]
    for step, loss in enumerate(training, 1):
        yield loss
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))

# With the preset small all methods that can bear it have one budget; `weight` is the method's own
# (lambda, alpha, eta, ...), chosen on class bar and style dots (assets/study/README.md), and the
# rate falls to 0 along a cosine. With paper: what is known of the method's own paper or public code,
# with a constant rate.
BUDGET = dict(steps=200, batch_size=16, lr=1e-3, weight=1.0)
PAPER = dict(steps=1000, batch_size=128, lr=1e-4, weight=1.0)
METHODS = {
    "dimum": dict(
        function=dimum,
        small=BUDGET,
        paper=dict(PAPER, steps=10000, batch_size=64)),
    "salun": dict(
        function=salun,
        small=dict(BUDGET, weight=3e-3),
        paper=dict(PAPER, weight=1e-3)),
    "sfron": dict(
        function=sfron,
        small=dict(BUDGET, weight=10.0),
        paper=dict(PAPER, steps=150, weight=10.0)),
    "esd": dict(
        function=esd,
        small=dict(BUDGET, lr=3e-4),
        paper=dict(PAPER, lr=1e-5)),
    "sa": dict(
        function=sa,
        small=dict(BUDGET, weight=0.01),
        paper=dict(PAPER, steps=20000, weight=10.0)),
    "ga": dict(
        function=ga,
        small=dict(BUDGET, lr=3e-4, weight=0.6),
        paper=dict(PAPER, weight=0.05)),
    "rl": dict(
        function=rl,
        small=dict(BUDGET, weight=3e-3),
        paper=dict(PAPER, weight=1e-3)),
    "finetune": dict(
        function=finetune,
        small=BUDGET,
        paper=PAPER),
    "swap": dict(
        function=swap,
        small=dict(BUDGET, steps=0),
        paper=dict(PAPER, steps=0)),
}

FIXED_PART = ("esd", "swap")    # methods that say by themselves what they change

# ---- what is learned instead ---------------------------------------------------------------------

def substitutes(names, forget, forgotten, spec):
    """{(factor, value): c'} for all that is forgotten, such as {(0, 1): 2} for "square, replaced by
    triangle": the first value after it, (c_f + 1) mod K as in SalUn, that is not forgotten itself;
    for the pairs to forget now the K of "class:K", which can replace values of one factor only."""
    kind, _, name = spec.partition(":")
    chosen = forget if kind == "class" and name else []
    require(len({factor for factor, _ in chosen}) < 2, f"--alternative {spec} fits one factor: "
            "forget class and style one after the other")
    found = {}
    for factor, value in forgotten:
        free = [v for v in range(len(names[factor])) if (factor, v) not in forgotten]
        later = [v for v in free if v > value]
        other = later[0] if later else free[0]
        if (factor, value) in chosen:
            other = find_value(name, names[factor], "--alternative class:")
            require(other in free, f"--alternative {spec} is forgotten itself; take another, such "
                    f"as class:{free[0]}")
        found[factor, value] = other
    return found

def alternative_set(retain_set, substitutes, forget, args):
    """What DiMUM memorises, for all that is forgotten now or earlier: images uint8 (N, C, H, W),
    none of which shows it, and labels (N, F) *with the forgotten value in them*.

    args.alternative: "class" or "class:K" (images of c'; that the style stays as it is is our
    reading of the paper), "mix" (all retained images), "image:PATH" (one picture) or "noise"; what
    was forgotten earlier has "class". args.alt_size: a random subset of so many images for each.
    """
    sets_of_images = []
    sets_of_labels = []
    for (factor, value), other in substitutes.items():
        images, y = retain_set
        spec = args.alternative if (factor, value) in forget else "class"
        kind, _, path = spec.partition(":")
        require(kind in ("class", "image", "noise", "mix"), f"--alternative {spec} is not class:K, "
                "mix, image:PATH or noise")
        if kind == "class":
            same = y[:, factor] == other
            images, y = images[same], y[same]
        elif kind == "image":
            channels, size = images.shape[1:3]
            with explain(f"--alternative {spec} cannot be read; give the path of a picture",
                         *UNREADABLE):
                picture = read_image(os.path.expanduser(path), size, channels)
            y = torch.unique(y, dim=0)
            images = picture.to(y.device).expand(len(y), -1, -1, -1)
        elif kind == "noise":                          # a thousand pictures are enough to learn
            images = torch.randint(0, 256, images[:1000].shape, dtype=torch.uint8, device=y.device)
            y = y[torch.randint(len(y), (len(images),), device=y.device)]
        # "mix" keeps all retained images
        require(len(y), f"--alternative {spec} has no images; choose another")
        if args.alt_size and args.alt_size < len(y):
            index = torch.randperm(len(y))[:args.alt_size]
            images, y = images[index], y[index]
        y = y.clone()
        y[:, factor] = value
        sets_of_images.append(images)
        sets_of_labels.append(y)
    return torch.cat(sets_of_images), torch.cat(sets_of_labels)

# ---- stage 2 -------------------------------------------------------------------------------------

def find_model(args):
    """The checkpoint to unlearn in: --ckpt, else the shipped model, else the pretraining here."""
    if args.ckpt:
        return checkpoint_file(args.ckpt)
    name = args.dataset or "shapes"
    for path in (shipped(f"{name}.pt"), Path("runs", name, "pretrain", "model.pt")):
        if path.is_file():
            return path
    fail(f"there is no {name} model yet; run 'python train_ddpm.py --dataset {name} "
         f"--data-dir {shlex.quote(args.data_dir)}', or name one with --ckpt")

def check_forget(forget, forgotten, names):
    """One line where there is nothing to forget, or nothing would be left of a factor."""
    require(forget, "say what to forget, by name or number: --cls 1, --style sketch, or both")
    for factor, values in enumerate(names):
        gone = [pair for pair in forgotten if pair[0] == factor]
        require(len(gone) < len(values),
                f"--{FACTORS[factor]}: one of {', '.join(values)} must remain; forget fewer")

def parse_args():
    parser = stage_parser(__doc__, "<method>-cls1", samples=240, sampler_steps=20)
    flag = parser.add_argument
    flag("--method", choices=[*METHODS, "sfront"], default="dimum",
         help="default dimum")
    value_flags(flag, "to forget")
    flag("--ckpt", metavar="MODEL", type=os.path.expanduser,
         help="default: the shipped model, or the pretraining in runs/")
    flag("--lr", metavar="X", type=number(float, 0, 10),
         help="learning rate; default by method")
    flag("--learn", choices=("all", "label", "unet"), default="all",
         help="what may change: all (default), the label's path, or the rest of the U-Net")
    flag("--lambda", dest="weight", type=number(float, 0, 1e9), metavar="X",
         help="the method's weight: lambda, alpha, eta")
    flag("--alternative", default="class", metavar="SPEC", help="c': class:K, also for styles "
         "(default: the next value); for DiMUM also mix, image:PATH or noise")
    flag("--alt-size", type=number(int, 1), metavar="N",
         help="DiMUM memorises N images of each")
    flag("--eval-every", nargs="+", action="extend", type=number(int, 1), default=[],
         metavar="N",
         help="measure every N steps, or at several")
    args = parser.parse_args()
    if args.method == "sfront":                        # as the paper writes it
        args.method = "sfron"
    return args

def main():
    args = parse_args()
    path = find_model(args)
    model, info, images, y = load_run(path, args)
    names = info["names"]
    forget = find_pairs(args, names)
    forgotten = sorted({*forget, *info["forgotten"]})
    check_forget(forget, forgotten, names)
    fixed = args.method in FIXED_PART
    require(args.learn == "all" or not fixed, f"{args.method} says by itself what it changes; leave "
            "--learn out")
    method = METHODS[args.method]
    settings = set_defaults(args, **method[info["preset"]])    # into args, where no flag was given
    say(f"{args.method}: forget {pairs_text(forget, names)} in {path}; {args.steps} steps, "
        f"{args.batch_size} images a term, lr {args.lr:g}, weight {args.weight:g}")

    evaluation = prepare_evaluation(info, images, y, targets=forgotten, forgotten=forgotten,
                                    args=args)
    torch.manual_seed(args.seed)
    data = Data(images, y, names, forget, forgotten, args)
    name = f"{args.method}-{pairs_slug(forget)}"
    if args.learn != "all":
        name += f"-{args.learn}"
    if info["forgotten"]:
        name += f"-after-{path.parent.name}"
    folder = run_folder(args.out or Path("runs", args.dataset, name))
    choose_learning(model, args.learn)
    optimizer = torch.optim.Adam(learnable(model), args.lr, fused=True)
    training = method["function"](model.train(), data, optimizer, args)
    if info["preset"] == "small":
        training = cosine(training, optimizer, args.steps)

    curve, samples, losses, seconds = train_and_measure(
        model, training, evaluation, args.eval_every, args, headline="ua", retained=True)
    if len(forgotten) > 1:
        each = [f"{name} {100 * ua:.1f} %" for name, ua in curve[-1]["ua_of"].items()]
        say("UA of each:", ", ".join(each))

    settings.update(alternative=args.alternative, alt_size=args.alt_size)
    if not fixed:
        settings["learn"] = args.learn
    info["forgotten"] = forgotten
    info["made_by"] = {"stage": "unlearn", "method": args.method, "seed": args.seed,
                       "settings": settings, **started_from(path)}
    save_result(folder, model, info, args, forget=pairs_text(forgotten, names),
                seconds=seconds, curve=curve, protocol=evaluation.protocol)
    save_before_after(folder / "samples.png", evaluation, forgotten, samples[0], samples[-1])
    write_losses(folder, losses, args.method)
    if args.eval_every:
        known = [point for point in curve if point["fid"] is not None]
        steps = [point["step"] for point in known]
        fids = [point["fid"] for point in known]
        if known:
            panel = {args.method: (steps, fids)}
            save_plot(folder / "fid.png", {"FID of retained conditions": panel}, "step", "FID")
    say_next(folder, args, ["attack.py", folder.as_posix()])

if __name__ == "__main__":
    run(main)
